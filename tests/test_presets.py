"""Every shipped preset keeps the same contract; recognition, requirements and broken files."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtune.config import load_config
from llmtune.errors import ConfigError
from llmtune.presets import (
    GOALS,
    METHODS,
    SCHEDULES,
    SIZES,
    CatalogueEntry,
    ModelShape,
    Preset,
    catalogue,
    dataset_size,
    find_entry,
)
from llmtune.presets.custom import SETTINGS
from llmtune.presets.reading import LEVEL_FIELDS, preset_files
from llmtune.units import GIB

FAMILIES = Preset.families()
NAMED = tuple(family for family in FAMILIES if family != "generic")
ENTRIES = [pytest.param(entry, id=entry.id) for entry in catalogue()]
TINY_DIR = Path(__file__).parents[1] / "llmtune" / "builtin" / "tiny"

TINYLLAMA_EPOCHS_AND_RATES = {
    "highspeed": {"small": (2, 1e-3), "medium": (1, 8e-4), "large": (1, 5e-4)},
    "quality": {"small": (5, 3e-4), "medium": (3, 5e-4), "large": (2, 5e-4)},
    "bestaccuracy": {"small": (8, 1e-4), "medium": (5, 2e-4), "large": (3, 3e-4)},
}


def build_model(model_type: str, **settings: Any) -> Any:
    """A randomly initialised model of an architecture, on the meta device: no memory, no weights."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))


def model_of_shape(model_type: str, shape: ModelShape) -> Any:
    """The full-size architecture of a catalogue entry."""
    settings: dict[str, Any] = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp_width,
        "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied_head,
        "pad_token_id": 0,
    }
    if model_type not in ("phi", "phi3", "qwen2"):
        settings["head_dim"] = shape.head_dim
    return build_model(model_type, **settings)


def linear_names(model: Any) -> set[str]:
    import torch

    head = model.get_output_embeddings()
    return {
        path.rsplit(".", 1)[-1]
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def document(family: str = "qwen") -> dict[str, Any]:
    loaded = yaml.safe_load(preset_files()[family].read_text(encoding="utf-8"))
    assert isinstance(loaded, dict)
    return loaded


def read(tmp_path: Path, content: object) -> Preset:
    path = tmp_path / "mine.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
    return Preset.from_file(path)


# --- every preset -------------------------------------------------------------------------------------------------


def test_the_expected_families_are_there() -> None:
    assert {"tinyllama", "llama", "gemma", "phi", "mistral", "qwen", "tiny"} <= set(NAMED)
    assert FAMILIES[-1] == "generic"


@pytest.mark.parametrize("family", FAMILIES)
def test_preset_is_valid_and_named_after_its_file(family: str) -> None:
    preset = Preset.load(family)
    assert preset.validate() == (True, [])
    assert preset.family == family
    assert preset == Preset.from_file(preset_files()[family])
    json.dumps(preset.to_json())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_of_every_level_has_a_source(family: str) -> None:
    preset = Preset.load(family)
    for goal in GOALS:
        for size in SIZES:
            level = preset.level(goal, size)
            assert set(level.sources) == set(LEVEL_FIELDS)
            assert all(len(source) > 10 for source in level.sources.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_source_is_used(family: str) -> None:
    preset = Preset.load(family)
    used = {source for goal in GOALS for size in SIZES for source in preset.level(goal, size).sources.values()}
    in_catalogue = " ".join(entry.source for entry in preset.catalogue)
    used |= {preset.rate.source} if preset.rate else set()
    unused = [key for key, text in document(family)["sources"].items() if text not in used and text not in in_catalogue]
    assert unused == []


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_evaluated_is_also_saved(family: str) -> None:
    preset = Preset.load(family)
    for goal in GOALS:
        for size in SIZES:
            level = preset.level(goal, size)
            assert level.saves_per_epoch == level.evals_per_epoch


@pytest.mark.parametrize("family", NAMED)
def test_targets_are_all_linear_modules_of_the_family(family: str) -> None:
    preset = Preset.load(family)
    names: set[str] = set()
    for model_type in preset.recognition.model_types:
        model = build_model(
            model_type,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            pad_token_id=0,
        )
        assert type(model).__name__ in preset.recognition.architectures
        names |= linear_names(model)
    assert set(preset.lora_targets) == names


def test_schedules_are_known_to_transformers() -> None:
    from transformers.trainer_utils import SchedulerType

    assert set(SCHEDULES) <= {schedule.value for schedule in SchedulerType}


def test_tinyllama_levels_are_the_ones_laid_down() -> None:
    preset = Preset.load("tinyllama")
    found = {
        goal: {size: (preset.level(goal, size).epochs, preset.level(goal, size).learning_rate) for size in SIZES}
        for goal in GOALS
    }
    assert found == TINYLLAMA_EPOCHS_AND_RATES


def test_only_the_generic_preset_has_a_notice_and_it_adapts_all_linear_layers() -> None:
    generic = Preset.load("generic")
    assert generic.notice
    assert generic.lora_targets == ("all-linear",)
    assert generic.catalogue == ()
    assert all(Preset.load(family).notice is None for family in NAMED)


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, "small"), (999, "small"), (1_000, "medium"), (9_999, "medium"), (10_000, "large"), (10**9, "large")],
)
def test_dataset_size(rows: int, size: str) -> None:
    assert dataset_size(rows) == size


def test_presets_load_without_heavy_imports() -> None:
    script = (
        "import sys; from llmtune.presets import catalogue; catalogue(); "
        "sys.exit(str({'torch', 'transformers', 'datasets', 'peft', 'optuna'} & set(sys.modules) or '') or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- the catalogue ------------------------------------------------------------------------------------------------


def test_catalogue_ids_are_unique_and_found() -> None:
    ids = [entry.id for entry in catalogue()]
    assert len(ids) == len(set(ids))
    assert all(find_entry(model_id) is not None for model_id in ids)
    assert find_entry("Qwen/Qwen9-900B") is None


@pytest.mark.parametrize("entry", ENTRIES)
def test_parameters_agree_with_the_shape(entry: CatalogueEntry) -> None:
    shape = entry.shape
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = shape.hidden * query + 2 * shape.hidden * key_value + query * shape.hidden
    mlp = shape.hidden * shape.mlp_width * (3 if shape.gated_mlp else 2)
    embeddings = shape.vocabulary * shape.hidden * (1 if shape.tied_head else 2)
    assert shape.layers * (attention + mlp) + embeddings == pytest.approx(entry.parameters, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES)
def test_parameters_are_exactly_those_of_the_architecture(entry: CatalogueEntry) -> None:
    model = model_of_shape(entry.model_type, entry.shape)
    assert type(model).__name__ == entry.architecture
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


@pytest.mark.parametrize("entry", ENTRIES)
def test_minimum_memory_is_what_its_source_says(entry: CatalogueEntry) -> None:
    shape, tokens, rank = entry.shape, 512, 16
    query, key_value = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    matrices = [(shape.hidden, query), (shape.hidden, key_value), (shape.hidden, key_value), (query, shape.hidden)]
    matrices += [(shape.hidden, shape.mlp_width)] * (3 if shape.gated_mlp else 2)
    if entry.model_type == "phi3":  # query, key and value are one matrix, gate and up another
        matrices = [(shape.hidden, query + 2 * key_value), (query, shape.hidden)]
        matrices += [(shape.hidden, 2 * shape.mlp_width), (shape.mlp_width, shape.hidden)]
    block = shape.layers * sum(a * b for a, b in matrices)
    adapter = shape.layers * rank * sum(a + b for a, b in matrices)
    activations = tokens * (2 * shape.hidden * shape.layers + 2 * (16 * shape.hidden + 8 * shape.mlp_width))
    always = activations + 12 * shape.vocabulary * tokens + 0.6 * GIB
    nf4 = 0.5 + 1 / 64 + 4 / (64 * 256)  # four bits, an 8-bit scale per 64 values, an fp32 scale per 256 of those
    expected = {
        "lora": 2 * entry.parameters + 16 * adapter + always,
        "qlora": nf4 * block + 4 * (entry.parameters - block) + 16 * adapter + always,
        "full": 16 * entry.parameters + always,
    }
    assert set(entry.minimum_memory_bytes) == set(METHODS)
    for method, least in expected.items():
        rounded = math.ceil(least / GIB * 10) / 10 * GIB
        assert entry.minimum_memory_bytes[method] == pytest.approx(rounded, abs=1)


def test_the_embedded_model_is_as_catalogued() -> None:
    if not (TINY_DIR / "config.json").is_file():
        pytest.skip("the embedded model is not here")
    entry = find_entry("builtin:tiny")
    assert entry is not None
    config = json.loads((TINY_DIR / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [entry.architecture]
    assert entry.context == config["max_position_embeddings"]
    assert entry.shape == ModelShape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        mlp_width=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        gated_mlp=True,
        tied_head=config["tie_word_embeddings"],
    )
    model = model_of_shape(entry.model_type, entry.shape)
    assert sum(parameter.numel() for parameter in model.parameters()) == entry.parameters


# --- recognition --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", ENTRIES)
def test_catalogued_models_are_recognised_by_name_and_by_shape(entry: CatalogueEntry) -> None:
    assert Preset.recognise(entry.model_type, entry.architecture, entry.id).family == entry.family
    assert Preset.recognise(name=entry.id).family == entry.family
    assert Preset.recognise(entry.model_type, entry.architecture, "/data/my-model", entry.shape).family == entry.family


@pytest.mark.parametrize(
    ("model_type", "architecture", "name", "family"),
    [
        ("llama", "LlamaForCausalLM", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T", "tinyllama"),
        ("llama", "LlamaForCausalLM", "someone/tiny_llama-chat", "tinyllama"),
        ("llama", "LlamaForCausalLM", "C:\\models\\TinyLlama-1.1B\\", "tinyllama"),
        ("llama", "LlamaForCausalLM", "meta-llama/Llama-3.2-1B", "llama"),
        ("llama", "LlamaForCausalLM", "runs/tinyllama/merged", "llama"),
        ("llama", "LlamaForCausalLM", "lmsys/vicuna-7b-v1.5", "llama"),
        ("llama", "LlamaForCausalLM", "builtin:tiny", "tiny"),
        ("llama", None, None, "llama"),
        (None, None, "meta-llama/Meta-Llama-3-8B-Instruct", "llama"),
        (None, None, "/data/llama3_1", "llama"),
        ("smollm3", "SmolLM3ForCausalLM", "someone/their-model", "llama"),
        ("smollm3", None, None, "llama"),
        ("mllama", "MllamaForConditionalGeneration", "meta-llama/Llama-3.2-11B-Vision", "generic"),
        ("llama4_text", "Llama4ForCausalLM", "meta-llama/Llama-4-Scout-17B-16E", "generic"),
        ("gemma2", "Gemma2ForCausalLM", None, "gemma"),
        ("gemma3_text", "Gemma3ForCausalLM", "someone/medical", "gemma"),
        ("gemma3_text", None, None, "gemma"),
        ("gemma3", "Gemma3ForConditionalGeneration", "google/gemma-3-4b-it", "gemma"),
        (None, None, "google/gemma-2-9b-it", "gemma"),
        ("gemma3n_text", "Gemma3nForCausalLM", "google/gemma-3n-E2B", "generic"),
        ("mistral", "MistralForCausalLM", "mistralai/Mistral-Small-24B-Base-2501", "mistral"),
        ("phi", "PhiForCausalLM", "cognitivecomputations/dolphin-2_6-phi-2", "phi"),
        ("phi3", "Phi3ForCausalLM", "microsoft/phi-4", "phi"),
        ("phimoe", "PhimoeForCausalLM", "microsoft/Phi-3.5-MoE-instruct", "generic"),
        ("mistral", "MistralForCausalLM", "HuggingFaceH4/zephyr-7b-beta", "mistral"),
        ("mistral", None, None, "mistral"),
        ("mixtral", "MixtralForCausalLM", "mistralai/Mixtral-8x7B-v0.1", "generic"),
        ("mistral", "MistralForCausalLM", "someone/qwen2-mistral-mix", "mistral"),
        ("qwen2", "Qwen2ForCausalLM", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "qwen"),
        ("qwen3", "Qwen3ForCausalLM", None, "qwen"),
        ("qwen3_moe", "Qwen3MoeForCausalLM", "Qwen/Qwen3-30B-A3B", "generic"),
        (None, "Qwen3ForCausalLM", None, "qwen"),
        ("gpt2", "GPT2LMHeadModel", "openai-community/gpt2", "generic"),
        (None, None, None, "generic"),
    ],
)
def test_recognition(model_type: str | None, architecture: str | None, name: str | None, family: str) -> None:
    preset = Preset.recognise(model_type, architecture, name)
    assert preset.family == family
    assert (preset.notice is not None) == (family == "generic")


# --- chat templates -----------------------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And one?"},
    {"role": "assistant", "content": "Five."},
]
TEMPLATES = [family for family in FAMILIES if Preset.load(family).chat_template is not None]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("start", [0, 1], ids=["with system", "without system"])
def test_answers_follow_the_prompt_and_end_with_the_stop_token(tokenizer: Any, family: str, start: int) -> None:
    template = Preset.load(family).chat_template

    def render(messages: list[dict[str, str]], prompt: bool) -> str:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
        assert isinstance(rendered, str)
        return rendered

    chat = CHAT[start:]
    for index, message in enumerate(chat):
        if message["role"] == "assistant":
            asked, answered = render(chat[:index], True), render(chat[: index + 1], False)
            assert answered.startswith(asked)
            assert answered[len(asked) :].lstrip(" ") == message["content"] + "</s>"
            assert render(chat, False).startswith(answered)


@pytest.mark.parametrize("family", TEMPLATES)
def test_templates_refuse_roles_they_do_not_know(tokenizer: Any, family: str) -> None:
    from jinja2.exceptions import TemplateError

    with pytest.raises(TemplateError, match="got tool"):
        tokenizer.apply_chat_template(
            [*CHAT, {"role": "tool", "content": "4"}], chat_template=Preset.load(family).chat_template, tokenize=False
        )


@pytest.mark.parametrize("family", ["phi", "mistral", "generic"])
def test_templates_for_base_models_use_no_special_token_but_the_tokenizers_own(tokenizer: Any, family: str) -> None:
    rendered = tokenizer.apply_chat_template(CHAT, chat_template=Preset.load(family).chat_template, tokenize=False)
    assert not re.search(r"<\||\[INST\]", rendered)


# --- custom -------------------------------------------------------------------------------------------------------


def test_custom_overrides_one_level_and_says_so() -> None:
    base = Preset.load("qwen")
    preset = Preset.custom({"family": "qwen", "goal": "quality", "size": "small", "epochs": 2, "learning_rate": "5e-5"})
    level = preset.level("quality", "small")
    assert (level.epochs, level.learning_rate) == (2, 5e-5)
    assert level.sources["epochs"] == level.sources["learning_rate"] == "custom"
    assert level.sources["rank"] == base.level("quality", "small").sources["rank"]
    assert preset.level("quality", "medium") == base.level("quality", "medium")
    assert preset.level("highspeed", "small") == base.level("highspeed", "small")
    assert preset.validate() == (True, [])


def test_custom_without_goal_changes_every_level_of_the_generic_preset() -> None:
    preset = Preset.custom({"rank": 64})
    assert preset.family == "generic"
    for goal in GOALS:
        for size in SIZES:
            before, after = Preset.load("generic").level(goal, size), preset.level(goal, size)
            assert after.rank == 64
            assert after.alpha / after.rank == before.alpha / before.rank
            assert after.sources["alpha"].startswith("custom: keeps")


def test_custom_alpha_is_kept_as_given() -> None:
    level = Preset.custom({"rank": 4, "alpha": 5}).level("quality", "small")
    assert (level.rank, level.alpha, level.sources["alpha"]) == (4, 5, "custom")


def test_a_custom_preset_is_used_through_its_settings() -> None:
    preset = Preset.custom({"family": "qwen", "rank": 64, "epochs": 2, "evals_per_epoch": 3})
    settings = preset.settings("quality", "small")
    level = preset.level("quality", "small")
    assert settings["adapter.rank"] == 64
    assert settings["adapter.alpha"] == 128
    assert settings["train.epochs"] == 2
    config = load_config(settings, environ={})
    # The rate depends on model and run, so the plan decides it, unless it is one's own.
    assert (config.train.learning_rate, config.train.schedule) == (None, level.schedule)
    own = Preset.custom({"family": "qwen", "learning_rate": 7e-5}).settings("quality", "small")
    assert own["train.learning_rate"] == 7e-5
    assert Preset.load("tinyllama").settings("quality", "small")["train.learning_rate"] == 3e-4
    assert (config.train.warmup_ratio, config.train.weight_decay) == (level.warmup_ratio, level.weight_decay)
    assert config.adapter.dropout == level.dropout
    # What has no key counts passes where the configuration counts updates.
    assert set(LEVEL_FIELDS) - set(SETTINGS) == {"evals_per_epoch", "saves_per_epoch"}
    with pytest.raises(ConfigError, match="did you mean 'quality'"):
        preset.settings("qualty", "small")


@pytest.mark.parametrize("method", [None, *METHODS])
def test_custom_memory_filters_the_catalogue(method: str | None) -> None:
    requirements = {"family": "qwen", "max_memory": "10GiB"} | ({"method": method} if method else {})
    kept = Preset.custom(requirements).catalogue
    for entry in Preset.load("qwen").catalogue:
        sizes = entry.minimum_memory_bytes
        need = sizes[method] if method else min(sizes.values())
        assert (entry in kept) == (need <= 10 * GIB)
    assert 0 < len(kept) < len(Preset.load("qwen").catalogue)


def test_custom_reports_every_problem_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Preset.custom({"family": "qwenn", "learing_rate": 1e-4, "rank": 1.5, "goal": "fast"})
    text = str(caught.value)
    assert "4 problems" in text
    assert "did you mean 'learning_rate'?" in text
    assert "did you mean 'qwen'?" in text
    assert "rank: got 1.5, expected a whole number" in text
    assert "goal: got 'fast', expected one of highspeed, quality, bestaccuracy" in text


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ({"learning_rate": 2}, r"learning_rate: got 2.0, expected a number in \(0, 1\]"),
        ({"epochs": 0}, "epochs: got 0.0, expected a number above 0"),
        ({"schedule": "cosin"}, "schedule: got 'cosin', expected one of linear, cosine"),
        ({"max_memory": "much"}, "max_memory: got 'much', expected a size such as 24GiB"),
        ({"family": "mistral", "max_memory": "1GiB"}, "no model of the family mistral fits in 1.0 GiB; the smallest"),
    ],
)
def test_custom_refuses_what_cannot_be(requirements: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Preset.custom(requirements)


# --- wrong names and broken files ---------------------------------------------------------------------------------


def test_unknown_family_goal_and_size_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no preset 'mistrall', did you mean 'mistral'"):
        Preset.load("mistrall")
    with pytest.raises(ConfigError, match=r"2 problems.*did you mean 'quality'.*did you mean 'small'"):
        Preset.load("qwen").level("qualty", "smal")


def test_a_changed_copy_of_a_shipped_file_is_read(tmp_path: Path) -> None:
    mine = document()
    mine["levels"]["quality"]["every"]["rank"] = [24, "unsloth"]
    assert read(tmp_path, mine).level("quality", "small").rank == 24


def test_problems_of_a_file_are_reported_together(tmp_path: Path) -> None:
    broken = document()
    broken["lora_target"] = broken.pop("lora_targets")
    broken["levels"]["every"]["shedule"] = broken["levels"]["every"].pop("schedule")
    broken["levels"]["quality"]["small"]["epochs"] = 3
    broken["levels"]["quality"]["medium"]["epochs"] = [2, "unslot"]
    broken["catalogue"][0]["shape"]["hidden"] = "wide"
    broken["catalogue"][1]["gated"] = "no"
    del broken["catalogue"][2]["licence"]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, broken)
    text = str(caught.value)
    assert text.startswith(str(tmp_path / "mine.yaml"))
    for expected in (
        "lora_target: unknown key, did you mean 'lora_targets'?",
        "lora_targets: is missing",
        "levels.every.shedule: unknown key, did you mean 'schedule'?",
        "levels.quality.small.epochs: got 3, expected [value, source]: every number carries its source",
        "levels.quality.medium.epochs: source 'unslot' is not one of 'sources', did you mean 'unsloth'?",
        "shape.hidden: got 'wide', expected a whole number",
        "gated: got 'no', expected true or false",
        "licence: is missing",
    ):
        assert expected in text


def test_a_number_that_no_level_gives_is_missing(tmp_path: Path) -> None:
    broken = document()
    del broken["levels"]["every"]["schedule"]
    with pytest.raises(ConfigError, match=r"levels\.highspeed\.small: schedule missing here and under 'every'"):
        read(tmp_path, broken)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("goal", "size"), [("quality", "small"), ("bestaccuracy", None)])
def test_a_level_that_is_missing_is_refused_by_file_goal_and_size(
    tmp_path: Path, family: str, goal: str, size: str | None
) -> None:
    broken = document(family)
    if size is None:
        del broken["levels"][goal]
    else:
        del broken["levels"][goal][size]
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, broken)
    assert str(caught.value).startswith(f"{tmp_path / 'mine.yaml'}: ")
    for one in (size,) if size else SIZES:
        assert re.search(rf"levels\.{goal}\.{one}: [^·]*epochs[^·]* missing here and under 'every'", str(caught.value))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "is not valid YAML"),
        ("", "expected a mapping"),
        ("- 1", "expected a mapping"),
        ("levels: 3", "levels: got 3, expected a mapping"),
        ("catalogue: {}", "catalogue: got {}, expected a list of models"),
        ("sources: [a]", "sources: got"),
    ],
)
def test_files_that_are_no_presets(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        read(tmp_path, content)


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Preset.from_file(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"title: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        Preset.from_file(tmp_path / "latin.yaml")


def test_validate_lists_what_does_not_make_sense(tmp_path: Path) -> None:
    wrong = document()
    wrong["levels"]["quality"]["small"] = {"learning_rate": [3, "qlora"], "rank": [0, "qlora"], "epochs": [-1, "qlora"]}
    wrong["levels"]["quality"]["medium"]["dropout"] = [1.0, "qlora"]
    wrong["recognise"]["names"] = ["(unclosed"]
    wrong["lora_targets"] = ["all-linear", "q_proj"]
    wrong["chat_template"] = "{{ messages }}"
    wrong["catalogue"][0]["parameters"] = 7
    wrong["catalogue"][0]["architecture"] = "LlamaForCausalLM"
    wrong["catalogue"][1]["shape"]["kv_heads"] = 5
    wrong["catalogue"][1]["minimum_memory"]["qlora"] = "1TiB"
    wrong["catalogue"][2]["bytes_per_token"] = 40
    wrong["catalogue"][2]["context"] = 0
    wrong["catalogue"][2]["released"] = "April 2025"
    wrong["catalogue"].append(wrong["catalogue"][3])
    ok, problems = read(tmp_path, wrong).validate()
    assert not ok
    for expected in (
        "levels.quality.small.learning_rate: got 3.0",
        "levels.quality.small.rank: got 0",
        "levels.quality.small.epochs: got -1.0",
        "levels.quality.medium.dropout: got 1.0",
        "is no regular expression",
        "all-linear stands beside other names",
        "does not mention eos_token",
        "parameters: got 7",
        "is not one that the family is recognised by",
        "heads cannot share 5",
        "expected qlora <= full and lora <= full",
        "bytes_per_token: got 40",
        "context: got 0",
        "released: got 'April 2025'",
        "is listed 2 times",
    ):
        assert any(expected in problem for problem in problems), expected


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["family", "sources", "levels", "every", "quality", "small", "rank", "catalogue", "shape"]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_yaml_is_a_preset_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    with pytest.raises(ConfigError):
        read(tmp_path_factory.mktemp("any"), content)
