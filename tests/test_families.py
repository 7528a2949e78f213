"""Every family trains with its preset through the same call, with every method; the result loads without llmtune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factories import FAMILIES, PRESETS, save_family_model
from tuning import ROWS, events, settings

from llmtune import FineTuner
from llmtune.presets import Preset
from llmtune.runs import RunDirectory

METHODS = {"lora": {}, "qlora": {}, "qlora-int8": {"quantization": "int8"}, "full": {}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_trains_one_epoch_with_its_preset(
    family_model: Callable[[str], Path], tmp_path: Path, family: str, method: str
) -> None:
    free = ("max_steps", "learning_rate", "rank", "dropout", "precision")
    how = {k: v for k, v in settings(family_model(family), tmp_path / "run").items() if k not in free}
    tuner = FineTuner(ROWS, preset="quality", epochs=1, method=method.removesuffix("-int8"), **(how | METHODS[method]))
    result = tuner.train()
    plan = RunDirectory.open(result.run_dir).latest_plan()
    assert plan is not None
    assert plan["choices"]["schedule"]["reason"].startswith(f"{PRESETS[family]} preset, quality, small data: ")
    assert [step["step"] for step in events(result.run_dir, "step")] == [1, 2, 3]
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert tuner.evaluate().loss == pytest.approx(result.metrics["eval_loss"], rel=2e-3)
    _loads_without_llmtune(family_model(family), result.adapter_dir, full=method == "full")


def test_a_llama_under_another_name_trains_with_the_preset_of_llamas(tmp_path: Path) -> None:
    model = save_family_model("llama", tmp_path / "model-of-ours")
    how = {k: v for k, v in settings(model, tmp_path / "run").items() if k not in ("learning_rate", "rank", "dropout")}
    result = FineTuner(ROWS, preset="quality", **how).train()
    plan = RunDirectory.open(result.run_dir).latest_plan()
    assert plan is not None
    level = Preset.load("llama").level("quality", "small")
    assert plan["choices"]["rank"]["value"] == level.rank
    assert plan["choices"]["schedule"]["reason"].startswith("llama preset, quality, small data: ")
    assert "not known" not in " ".join(plan["notices"])
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]


def _loads_without_llmtune(base: Path, saved: Path | None, *, full: bool) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert saved is not None
    tokenizer = AutoTokenizer.from_pretrained(saved)
    assert tokenizer.chat_template
    model = AutoModelForCausalLM.from_pretrained(saved if full else base)
    if not full:
        model = PeftModel.from_pretrained(model, str(saved))
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who keeps lamp 3?"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    assert torch.isfinite(model(ids).logits).all()
