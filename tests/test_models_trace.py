"""What a layer keeps: as written down, as traced on fake tensors, and as torch's allocator tells."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import pytest
from factories import ARCHITECTURES, FAMILIES, family_config
from memory_plans import CPU, GPU, METHODS, catalogued, footprint, location_of, predicted, spelled

from llmtune.models import read_spec
from llmtune.planning.memory import BYTES_PER_VALUE
from llmtune.planning.memory.layers import LAYERS, layer_costs
from llmtune.planning.memory.passes import PassSimulation
from llmtune.planning.memory.weights import standing


def sooner(every, usual):
    """Parameters of a test; those that are not among the usual ones are left to the slow tests."""
    return [
        pytest.param(*one, marks=() if one in usual else pytest.mark.slow, id="-".join(map(spelled, one)))
        for one in every
    ]


def on_meta(config, how):
    """The model as a run would load it, on the meta device."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    full = how.method == "full"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if full else dtypes[how.precision])
        if not full:
            targets = "all-linear" if "all-linear" in how.targets else list(how.targets)
            lora = LoraConfig(
                r=how.rank,
                lora_dropout=how.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
                fan_in_fan_out=config.model_type == "gpt2",
            )
            model = get_peft_model(model, lora)
    model.config.use_cache = False
    model.train()
    if how.checkpoint_every:
        model.activation_checkpointing_enable(every_n_layers=how.checkpoint_every)
    autocasts = how.precision != "fp32" and (full or how.precision == "fp16")
    return model, dtypes[how.precision] if autocasts else None


WAYS = (
    {},
    {"precision": "fp32"},
    {"precision": "fp16"},
    {"dropout": 0.1},
    {"precision": "fp32", "dropout": 0.1, "targets": ("q_proj", "qkv_proj", "fc1", "down_proj")},
    {"checkpoint_every": 1},
    {"method": "full", "precision": "fp32"},
    {"method": "full"},
    {"method": "full", "checkpoint_every": 1},
    {"precision": "fp32", "checkpoint_every": 2},
)


CLOSED = [family for family in FAMILIES if ARCHITECTURES[family] in LAYERS]
# Mistral, Qwen2 and SmolLM3 do what Llama does: two ways are enough to see that.
AS_LLAMA = ("mistral", "qwen2", "smollm3")
WRITTEN = [(family, way) for family in CLOSED for way in (WAYS[2:4] if family in AS_LLAMA else WAYS)]
USUAL = [(family, way) for family, way in WRITTEN if family == "phi" or way == WAYS[3]]


@pytest.mark.parametrize(("family", "way"), sooner(WRITTEN, USUAL))
def test_what_is_written_down_is_what_autograd_keeps(family, way):
    """Without the kernels, which stand back from fake tensors as they do from sharded ones."""
    from llmtune.models.trace import PassTrace, decoder_layers

    config = family_config(family, num_hidden_layers=3, hidden_size=64, intermediate_size=192, vocab_size=512)
    spec, how = (
        read_spec(location_of(config), family),
        footprint(**way, tokens=4 * 128, width=128, rank=4, sharding="fsdp2"),
    )
    assert spec.activations is None
    model, autocast = on_meta(config, how)
    trace = PassTrace(model, decoder_layers(model)).run(rows=4, width=128, autocast=autocast)
    first, other, head = layer_costs(spec, how, on_cpu=True)
    again = [how.checkpoint_every > 0 and number % how.checkpoint_every == 0 for number in range(3)]
    kept = [cost.start if anew else cost.saved for cost, anew in zip((first, other, other), again, strict=True)]
    if False in again:  # the first layer that is kept also keeps cos and sin, which all share
        item = 4 if how.method == "full" else BYTES_PER_VALUE[how.precision]
        kept[again.index(False)] += 2 * how.width * spec.shape.head_dim * item
    # Phi rotates half of each head, so that its cos and sin are half as wide.
    tolerance = 0.02 if family == "phi" else 0.002
    assert [layer.saved for layer in trace.layers] == pytest.approx(kept, rel=tolerance)
    ids = 8 * how.tokens if how.method == "full" else 0  # of the embedding, counted with the micro-batch
    assert trace.outside.saved == pytest.approx(head.saved + ids, rel=0.002)


TRACED = [("qwen3", {}), ("phi", {"precision": "fp32"}), ("phi3", {"method": "full"})]
MORE = [(family, way) for family in CLOSED for _, way in TRACED if (family, way) not in TRACED]


@pytest.mark.parametrize(("family", "way"), sooner([*TRACED, *MORE], TRACED[:1]))
def test_a_family_that_is_traced_needs_what_is_written_down(family, way):
    import torch
    from transformers import AutoModelForCausalLM

    from llmtune.models.trace import trace_activations

    config = family_config(family, num_hidden_layers=3, hidden_size=64, intermediate_size=192, vocab_size=512)
    spec = read_spec(location_of(config), family)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    traced = replace(spec, activations=trace_activations(model))
    asked = way | {"tokens": 4096, "width": 512, "targets": ("q_proj", "qkv_proj", "fc1", "down_proj")}
    closed, other = predicted(spec, CPU, **asked), predicted(traced, CPU, **asked)
    # A bit more: what an adapter needs while it runs is counted at the fullest moment of the layer without it.
    assert 0.98 <= other.tensor_peak_bytes / closed.tensor_peak_bytes <= 1.12


SMALL = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 512}
GEMMA = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 192, "query_pre_attn_scalar": 16}
OTHERS = {
    "gpt2": SMALL,
    "opt": SMALL | {"ffn_dim": 256, "word_embed_proj_dim": 64},
    "falcon": SMALL,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": SMALL | {"intermediate_size": 256},
}


@pytest.mark.parametrize("kind", sooner([(kind,) for kind in OTHERS], [("opt",)]))
def test_an_architecture_without_a_closed_form_is_traced(kind):
    from transformers import AutoConfig

    spec = read_spec(location_of(AutoConfig.for_model(kind, **OTHERS[kind])), "generic")
    assert spec.architecture not in LAYERS
    assert spec.activations is not None
    for where in (CPU, GPU):
        small, large = (predicted(spec, where, tokens=tokens) for tokens in (512, 4096))
        assert small.terms["activations"] < large.terms["activations"]
        assert predicted(spec, where, checkpoint_every=1).peak_bytes < predicted(spec, where).peak_bytes
    again = read_spec(location_of(AutoConfig.for_model(kind, **OTHERS[kind])), "generic")
    assert again.activations is spec.activations


def test_a_model_that_cannot_be_traced_is_estimated_from_its_widths():
    spec = replace(catalogued("LlamaForCausalLM"), architecture="UnheardOfForCausalLM")
    for how in METHODS:
        guessed, known = predicted(spec, **how), predicted(catalogued("LlamaForCausalLM"), **how)
        # Of what is not known it is not assumed that the kernels take it.
        assert 0.7 <= guessed.peak_bytes / known.peak_bytes <= 1.6


# ------------------------------------------------------------------ against torch's allocator


def allocated(model, batch, autocast) -> int:
    """Most bytes that one forward and backward pass allocates at once, as torch's profiler reports them."""
    import contextlib

    import torch
    from torch.profiler import ProfilerActivity, profile

    computing = torch.autocast("cpu", dtype=autocast) if autocast else contextlib.nullcontext()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        with computing:
            loss = model(**batch, num_items_in_batch=1).loss
        loss.backward()
    found, alive = [], list(profiler.profiler.kineto_results.experimental_event_tree())
    while alive:
        event = alive.pop()
        alive += event.children
        if event.name == "[memory]":
            found.append((event.start_time_ns, len(found), event.extra_fields))
    live, peak, known = 0, 0, {}
    for _, _, block in sorted(found, key=lambda one: one[:2]):
        if block.alloc_size > 0:
            known[block.ptr] = block.alloc_size
            live += block.alloc_size
        else:
            live -= known.pop(block.ptr, 0)
        peak = max(peak, live)
    return peak


@pytest.fixture
def _seen_by_torch(monkeypatch):
    """Masks of dropout are numpy's memory, of which torch's allocator knows nothing: copied into its own."""
    from llmtune.kernels import adapters

    draw = adapters.draw_mask
    monkeypatch.setattr(adapters, "draw_mask", lambda x, kept: draw(x, kept).clone())


REAL = (
    ("llama", {"dropout": 0.1, "checkpoint_every": 2}),
    ("phi", {"precision": "fp32"}),
    ("qwen3", {"method": "full"}),
    ("gpt2", {}),
    ("llama", {}),
    ("phi3", {"checkpoint_every": 1}),
    ("gpt2", {"method": "full", "precision": "fp32"}),
    ("qwen3", {"checkpoint_every": 1}),
    ("llama", {"packed": True, "checkpoint_every": 1}),
    ("mistral", {"packed": True, "precision": "fp32", "dropout": 0.1}),
    ("phi", {"method": "full", "checkpoint_every": 1}),
    ("phi3", {"rows": 1, "width": 96}),
    ("qwen2", {"method": "full", "accumulates": False}),
)


@pytest.mark.usefixtures("_seen_by_torch")
@pytest.mark.parametrize("vector", [False, True], ids=["amx", "vector"])
@pytest.mark.parametrize(
    ("kind", "way"), REAL, ids=lambda part: part if isinstance(part, str) else "-".join(map(str, part.values()))
)
def test_a_pass_takes_what_was_predicted(kind, way, vector, monkeypatch):
    import torch
    from transformers import AutoConfig

    from llmtune.kernels import attach_kernels, cpu_attention

    monkeypatch.setattr(cpu_attention, "_vector_bf16", lambda: vector)

    # A small vocabulary, so that the peak lies in the layers and not always at the loss.
    small = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 384, "vocab_size": 64}
    config = AutoConfig.for_model("gpt2", **SMALL, n_inner=384) if kind == "gpt2" else family_config(kind, **small)
    spec = read_spec(location_of(config), kind)
    rows, width = way.get("rows", 4), way.get("width", 128)
    asked = {name: value for name, value in way.items() if name not in ("rows", "width")}
    how = footprint(**asked, tokens=rows * width, width=width, targets=("all-linear",), vector_bf16=vector)
    model, autocast = on_meta(config, how)
    model = model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        torch.nn.init.zeros_(tensor)
    refused = attach_kernels(model, device="cpu")
    assert bool(refused) == (kind == "gpt2" and how.method != "full")  # an adapter on Conv1D is PEFT's
    ids = torch.zeros(rows, width, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    if how.packed:
        batch = {name: tensor.view(1, -1) for name, tensor in batch.items()}
        batch["position_ids"] = torch.arange(width).repeat(rows)[None]
    model(**batch, num_items_in_batch=1).loss.backward()  # kernels are compiled, gradients there
    if not how.accumulates:
        model.zero_grad()
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured = allocated(model, batch, autocast)
    trained = standing(spec, how, on_cpu=True).trained
    passes = PassSimulation(spec, how, trained=trained, on_cpu=True)
    # Ids, mask and labels were there before, the adapter's copies, and gradients of an earlier pass.
    before = 24 * how.tokens + passes.adapter_copies + (4 * trained if how.accumulates else 0)
    took = passes.peak().total - before
    assert took == pytest.approx(measured, rel=0.06 if kind == "gpt2" else 0.02)
