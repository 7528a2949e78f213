"""Locating, describing and loading models: real architectures, built from their configurations."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from factories import (
    ARCHITECTURES,
    FAMILIES,
    PRESETS,
    TIED,
    WIDE_HEADS,
    WITHOUT_TEMPLATE,
    family_config,
    save_family_model,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file

from llmtune.builtin import tiny_path
from llmtune.config import ModelConfig
from llmtune.errors import ModelError
from llmtune.kernels import attach_kernels
from llmtune.models import (
    load_for_training,
    load_tokenizer,
    load_tuned,
    locate,
    preset_of,
    read_spec,
    spec_from_entry,
)
from llmtune.presets import Preset, catalogue

METHODS = {"lora": ("lora", None), "nf4": ("qlora", "nf4"), "int8": ("qlora", "int8"), "full": ("full", None)}
# bitsandbytes says once per layer that LLM.int8() computes in fp16, which is how it is defined.
INT8_CASTS = "ignore:MatMul8bitLt"
# peft 0.21 reads `is_gradient_checkpointing`, which transformers 5.23 has renamed; nothing of ours does.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def located(path, **settings):
    return locate(ModelConfig(id=str(path), **settings))


def refusal(path, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        located(path, **settings)
    return str(caught.value)


def loaded(location, kind: str, *, precision: str = "fp32", targets=("all-linear",), rank: int = 4, device="cpu"):
    method, quantization = METHODS[kind]
    torch.manual_seed(0)
    return load_for_training(
        location,
        precision=precision,
        method=method,
        quantization=quantization,
        rank=rank,
        alpha=2 * rank,
        dropout=0.0,
        targets=targets,
        device=device,
    )


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def losses(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss


@pytest.fixture
def copied(family_model, tmp_path):
    """A model directory to break: ``copied(family)``."""
    return lambda family: shutil.copytree(family_model(family), tmp_path / family_model(family).name)


def edit_config(path, **changes):
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# ------------------------------------------------------------------ locating


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_located_and_recognised(family_model, family):
    location = located(family_model(family))
    assert location.config.model_type == family
    assert (location.source, location.revision, location.offline) == (str(family_model(family)), None, False)
    assert preset_of(location).family == PRESETS[family]


def test_a_copy_under_another_name_is_recognised_by_its_shape(tmp_path):
    shape = next(entry.shape for entry in catalogue() if entry.id.startswith("TinyLlama/"))
    config = family_config(
        "llama",
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
    )
    config.save_pretrained(tmp_path / "base")
    assert preset_of(located(tmp_path / "base")).family == "tinyllama"
    config.num_hidden_layers = 3
    config.save_pretrained(tmp_path / "base")
    assert preset_of(located(tmp_path / "base")).family == "llama"


def test_a_copy_of_the_builtin_model_is_recognised_by_its_shape(tmp_path):
    shutil.copytree(tiny_path(), tmp_path / "Llama-like")
    assert preset_of(located(tmp_path / "Llama-like")).family == "tiny"


def test_the_builtin_model():
    location = located("builtin:tiny")
    assert location.source == str(tiny_path())
    assert preset_of(location).family == "tiny"
    assert "only builtin model is 'builtin:tiny'" in refusal("builtin:huge")


def test_a_home_directory_is_expanded(family_model, monkeypatch):
    path = family_model("llama")
    monkeypatch.setenv("HOME", str(path.parent))
    assert located(f"~/{path.name}").source == str(path)


def test_places_that_hold_no_model(tmp_path, family_model):
    assert "no such directory" in refusal(tmp_path / "nowhere")
    assert "no such directory" in refusal("./nowhere")
    assert "has no config.json; expected a directory written by save_pretrained" in refusal(tmp_path)
    assert "is a file; expected a directory" in refusal(family_model("llama") / "model.safetensors")
    assert "is a directory, but model.revision=v2 is for Hub models" in refusal(family_model("llama"), revision="v2")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{ not json", "config.json cannot be used"),
        ("[]", "config.json cannot be used"),
        ("{}", "config.json cannot be used"),
        ('{"model_type": "neverheard"}', "config.json cannot be used"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "config.json cannot be used"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "is a BertForMaskedLM, not a causal"),
        ('{"model_type": "bert", "architectures": ["BertModel"]}', "is a BertModel, not a causal"),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}', "not a causal language model"),
        ('{"model_type": "t5"}', "is a t5, not a causal"),
        ('{"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}', "not a causal"),
    ],
)
def test_configurations_that_cannot_be_trained_on(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    message = refusal(tmp_path)
    assert says in message
    assert str(tmp_path) in message
    assert len(message) < 600


def test_gpt2_is_causal_and_gets_the_generic_preset(tmp_path):
    from transformers import GPT2Config

    GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, architectures=["GPT2LMHeadModel"]).save_pretrained(
        tmp_path
    )
    location = located(tmp_path)
    assert preset_of(location).family == "generic"
    spec = read_spec(location, "generic")
    assert {module.name for module in spec.linears} == {"c_attn", "c_proj", "c_fc"}
    assert (spec.shape.hidden, spec.shape.heads, spec.shape.mlp_width, spec.context) == (32, 4, 128, 1024)


def test_gemma_that_reads_images_is_tuned_on_text(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config

    text = family_config("gemma3_text").to_dict() | {"num_hidden_layers": 3}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(
        architectures=["Gemma3ForConditionalGeneration"],
        text_config=text | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    location = located(tmp_path)
    preset = preset_of(location)
    assert preset.family == "gemma"
    spec = read_spec(location, preset.family)
    assert (spec.shape.hidden, spec.shape.layers, spec.shape.vocabulary) == (32, 3, 3072)
    model = loaded(location, "lora", targets=preset.lora_targets).train()
    assert trainable(model) == spec.adapter_parameters(4, preset.lora_targets)
    ids = torch.arange(3, 35).reshape(2, 16)
    model(input_ids=ids, labels=ids).loss.backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    idle = {name for name, p in model.named_parameters() if p.requires_grad} - learning
    assert len(learning) == 2 * 7 * 3
    assert all("vision_tower" in name for name in idle)
    upstream = model(input_ids=ids, labels=ids).loss
    attach_kernels(model, device="cpu")
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(upstream.item(), rel=1e-6)


def test_code_of_the_repository_is_not_run_unless_trusted(tmp_path):
    marker = tmp_path / "was_run"
    (tmp_path / "configuration_foreign.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig\n"
        "class ForeignConfig(LlamaConfig):\n    model_type = 'foreign'\n"
    )
    auto_map = {"AutoConfig": "configuration_foreign.ForeignConfig", "AutoModelForCausalLM": "modeling_foreign.Foreign"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "foreign", "auto_map": auto_map, "architectures": ["Foreign"]})
    )
    message = refusal(tmp_path)
    assert "wants to run Python code from its own repository, which is off" in message
    assert "--set model.trust_remote_code=true" in message
    assert not marker.exists()
    assert located(tmp_path, trust_remote_code=True).config.model_type == "foreign"
    assert marker.exists()


def test_remote_code_of_a_known_architecture_is_ignored_when_not_trusted(copied):
    path = copied("llama")
    edit_config(path, auto_map={"AutoModelForCausalLM": "modeling_foreign.Foreign"}, architectures=["Foreign"])
    assert "is a Foreign, not a causal language model" in refusal(path)


def test_the_access_token_is_not_in_the_repr(family_model):
    location = located(family_model("llama"), token="hf_secret")
    assert location.load_arguments()["token"] == "hf_secret"
    assert "hf_secret" not in repr(location)


# ------------------------------------------------------------------ describing


@pytest.mark.parametrize("family", FAMILIES)
def test_spec_is_exact(family_model, family):
    from transformers import AutoModelForCausalLM

    spec = read_spec(located(family_model(family)), PRESETS[family])
    model = AutoModelForCausalLM.from_pretrained(family_model(family))
    assert spec.parameters == sum(p.numel() for p in model.parameters())
    layers = [m for m in model.model.modules() if isinstance(m, torch.nn.Linear)]
    assert spec.block_parameters == sum(m.weight.numel() for m in layers)
    assert sum(module.count for module in spec.linears) == len(layers)
    assert spec.head_parameters == model.get_output_embeddings().weight.numel()
    assert spec.architecture == ARCHITECTURES[family] == type(model).__name__
    assert (spec.model_type, spec.family, spec.known_from) == (family, PRESETS[family], "config")
    assert (spec.shape.hidden, spec.shape.layers, spec.context) == (32, 2, 512)
    assert spec.shape.gated_mlp == (family != "phi")
    assert spec.shape.tied_head == (family in TIED)
    assert spec.shape.head_dim == (16 if family in WIDE_HEADS else 8)


def test_reading_a_spec_takes_no_memory_for_weights(tmp_path):
    config = family_config("llama", hidden_size=8192, intermediate_size=32768, num_hidden_layers=80)
    config.save_pretrained(tmp_path)
    assert read_spec(located(tmp_path), "generic").parameters > 50e9


def test_a_configuration_that_builds_no_model(copied):
    path = copied("llama")
    edit_config(path, hidden_act="unheard")
    location = located(path)
    with pytest.raises(ModelError, match="no model can be built from its config"):
        read_spec(location, "generic")


@pytest.mark.parametrize("preset_targets", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_parameters_are_what_peft_attaches(family_model, family, preset_targets):
    location = located(family_model(family))
    targets = Preset.load(PRESETS[family]).lora_targets if preset_targets else ("all-linear",)
    spec = read_spec(location, PRESETS[family])
    model = loaded(location, "lora", targets=targets, rank=4)
    assert trainable(model) == spec.adapter_parameters(4, targets) > 0
    if preset_targets:  # every linear module of the decoder, the head excluded
        assert spec.targeted(targets) == spec.linears


def test_a_target_may_be_a_paths_end(family_model):
    location = located(family_model("llama"))
    targets = ("self_attn.q_proj", "v_proj")
    assert trainable(loaded(location, "lora", targets=targets)) == read_spec(location, "").adapter_parameters(
        4, targets
    )


@pytest.mark.parametrize(
    "entry",
    {entry.architecture + str(entry.shape.gated_mlp): entry for entry in catalogue()}.values(),
    ids=lambda entry: entry.architecture,
)
def test_the_catalogues_spec_is_that_of_the_real_architecture(tmp_path, entry):
    shape = entry.shape
    config = family_config(
        entry.model_type,
        architectures=[entry.architecture],
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.mlp_width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=entry.context,
        tie_word_embeddings=shape.tied_head,
        **({} if entry.model_type in ("phi", "phi3") else {"head_dim": shape.head_dim}),
    )
    config.save_pretrained(tmp_path)
    real, known = read_spec(located(tmp_path), entry.family), spec_from_entry(entry)
    assert (known.known_from, known.id) == ("catalogue", entry.id)
    assert known.block_parameters == real.block_parameters
    assert known.parameters == real.parameters
    assert known.context == real.context
    assert known.shape == real.shape
    assert sorted(map(repr, known.linears)) == sorted(map(repr, real.linears))
    targets = Preset.load(entry.family).lora_targets
    assert known.adapter_parameters(16, targets) == real.adapter_parameters(16, targets) > 0
    assert known.adapter_parameters(16, ("all-linear",)) == real.adapter_parameters(16, ("all-linear",))


# ------------------------------------------------------------------ tokenizers


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizers_have_stop_and_padding(family_model, family):
    tokenizer = load_tokenizer(located(family_model(family)))
    assert tokenizer.eos_token_id == 1
    assert tokenizer.pad_token_id == 2
    assert (tokenizer.chat_template is None) == (family in WITHOUT_TEMPLATE)


def test_a_chat_template_of_your_own(family_model):
    assert load_tokenizer(located(family_model("phi")), "{{ messages }}").chat_template == "{{ messages }}"


def without_pad(path, **special):
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(path)


def test_padding_is_the_unknown_token_before_it_is_the_stop_token(copied):
    path = copied("llama")
    without_pad(path)
    assert load_tokenizer(located(path)).pad_token == "<|eos|>"
    without_pad(path, unk_token="<|bos|>")
    assert load_tokenizer(located(path)).pad_token == "<|bos|>"


def test_a_padding_token_without_an_embedding_is_not_used(copied):
    path = copied("llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    assert tokenizer.pad_token_id >= 3072
    tokenizer.save_pretrained(path)
    assert load_tokenizer(located(path)).pad_token == "<|eos|>"


def test_tokenizers_that_cannot_be_used(copied):
    path = copied("llama")
    without_pad(path, eos_token=None)
    with pytest.raises(ModelError, match="names no eos token"):
        load_tokenizer(located(path))
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(located(path))
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(located(path))


# ------------------------------------------------------------------ loading


@pytest.mark.filterwarnings(INT8_CASTS)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_trained_is_fp32_and_the_base_is_as_planned(family_model, family, kind):
    location = located(family_model(family))
    spec = read_spec(location, PRESETS[family])
    model = loaded(location, kind, precision="bf16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
    if kind == "full":
        assert (frozen, trainable(model)) == (set(), spec.parameters)
        return
    assert trainable(model) == spec.adapter_parameters(4, ("all-linear",))
    assert (
        frozen
        == {
            "lora": {torch.bfloat16},
            "nf4": {torch.uint8, torch.bfloat16},
            "int8": {torch.int8, torch.bfloat16},
        }[kind]
    )
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.base_model_name_or_path) == (4, 8, location.source)
    ids = torch.arange(3, 19).reshape(2, 8)
    model(input_ids=ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None and bool(torch.isfinite(grad).all()) for grad in grads.values())
    assert all(bool(grad.any()) for name, grad in grads.items() if "lora_B" in name)


def test_a_quantised_base_beside_fp16_adds_up_in_fp32_and_is_mapped_no_more(family_model):
    location = located(family_model("llama"))
    for precision, expected in (("fp16", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        model = loaded(location, "nf4", precision=precision)
        rest = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
        assert {p.dtype for p in rest} == {expected}
        with open("/proc/self/maps") as maps:
            assert str(location.source) not in maps.read()


@pytest.mark.filterwarnings(INT8_CASTS)
@pytest.mark.parametrize("kind", METHODS)
def test_an_evaluation_in_between_changes_no_gradient(family_model, kind):
    # bitsandbytes repacks 4-bit weights at an evaluation on some CPUs, and the packed format has no backward pass.
    model = loaded(located(family_model("llama")), kind, precision="bf16")
    ids = torch.arange(3, 35).reshape(2, 16)

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    before = gradients()
    first = losses(model.eval(), ids)
    after = gradients()
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert torch.equal(losses(model.eval(), ids), first)


@pytest.mark.parametrize("family", TIED)
def test_full_tuning_keeps_head_and_embedding_tied(family_model, family):
    model = loaded(located(family_model(family)), "full")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.filterwarnings(INT8_CASTS)
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_result_answers_as_the_trained_model_did(family_model, family, kind, tmp_path):
    location = located(family_model(family))
    precision = "fp32" if kind == "full" else "bf16"
    model = loaded(location, kind, precision=precision)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    ids = torch.arange(3, 35).reshape(2, 16)
    expected = losses(model.eval(), ids)
    model.save_pretrained(tmp_path)
    tuned = load_tuned(
        location,
        adapter_dir=None if kind == "full" else tmp_path,
        model_dir=tmp_path if kind == "full" else None,
        precision=precision,
        quantization=METHODS[kind][1],
        device="cpu",
    )
    assert not tuned.training
    assert torch.equal(losses(tuned, ids), expected)
    if kind != "full":
        with tuned.disable_adapter():
            assert not torch.equal(losses(tuned, ids), expected)


def test_targets_that_the_model_does_not_have(family_model):
    with pytest.raises(ModelError, match="no adapter can be attached"):
        loaded(located(family_model("phi3")), "lora", targets=("q_proj",))


def test_weights_that_cannot_be_loaded(copied):
    path = copied("llama")
    weights = path / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights are missing \(model.layers.1.mlp.down_proj.weight"):
        loaded(located(path), "lora")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        loaded(located(path), "full")
    weights.unlink()
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        loaded(located(path), "full")


def test_weights_of_another_shape_are_refused(copied):
    path = copied("llama")
    edit_config(path, intermediate_size=96)
    with pytest.raises(ModelError, match="its weights cannot be loaded"):
        loaded(located(path), "lora")


def test_a_location_can_be_changed_for_another_cache_rule(family_model):
    offline = replace(located(family_model("llama")), offline=True)
    assert offline.load_arguments()["local_files_only"] is True
    assert load_tokenizer(offline).eos_token_id == 1


def test_the_directory_given_stays_as_it_was(family_model):
    path = family_model("llama")
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    loaded(located(path), "lora")
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_save_family_model_is_reproducible(tmp_path):
    state = torch.random.get_rng_state()
    one, two = (save_family_model("phi", tmp_path / name) / "model.safetensors" for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    assert torch.equal(torch.random.get_rng_state(), state)
