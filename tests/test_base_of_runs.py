"""The base model that a run is compared with is the one it was trained on, at the same precision."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning import ROWS, SignalAt, settings, tune

from llmtune import FineTuner
from llmtune.cli.program import main
from llmtune.errors import ModelError, OutputError, Preempted
from llmtune.finetuner import TunedRun
from llmtune.runs import RunDirectory

Model = Callable[[str], Path]
HOW: dict[str, Any] = {"max_steps": 4, "eval_fraction": 0.4}
# How the base is held: in fp32, in bf16, in 8 and 4 bits, and all of it trained with and without autocast.
WAYS = {
    "lora fp32": {"method": "lora", "precision": "fp32"},
    "lora bf16": {"method": "lora", "precision": "bf16"},
    "qlora int8": {"method": "qlora", "precision": "bf16", "quantization": "int8"},
    "qlora nf4": {"method": "qlora", "precision": "bf16", "quantization": "nf4"},
    "full fp32": {"method": "full", "precision": "fp32"},
    "full bf16": {"method": "full", "precision": "bf16"},
}


@pytest.fixture
def base(family_model: Model, tmp_path: Path) -> Path:
    """A base model in a folder of its own, which a test may change."""
    return Path(shutil.copytree(family_model("llama"), tmp_path / "base"))


@pytest.mark.parametrize("way", WAYS)
def test_the_base_scores_as_it_did_before_step_1(base: Path, tmp_path: Path, way: str) -> None:
    result = tune(base, tmp_path / "run", **HOW, **WAYS[way])
    verdict = TunedRun.open(result.run_dir, data=ROWS).evaluate(answers=0)
    assert verdict.base_loss == pytest.approx(result.metrics["base_eval_loss"], rel=1e-12)
    assert verdict.loss == pytest.approx(result.metrics["eval_loss"], rel=1e-12)
    assert verdict.judgement.interval == result.verdict.interval


@pytest.mark.parametrize("method", ["lora", "full"])
def test_after_a_resume_it_is_still_the_untouched_base(base: Path, tmp_path: Path, method: str) -> None:
    whole = tune(base, tmp_path / "whole", method=method, **HOW)
    with pytest.raises(Preempted):
        tune(base, tmp_path / "cut", method=method, callbacks=[SignalAt(3)], **HOW)
    resumed = FineTuner.resume(tmp_path / "cut", ROWS)
    assert resumed.metrics["base_eval_loss"] == whole.metrics["base_eval_loss"]
    assert resumed.verdict == whole.verdict
    verdict = TunedRun.open(resumed.run_dir, data=ROWS).evaluate(answers=0)
    assert verdict.base_loss == pytest.approx(resumed.metrics["base_eval_loss"], rel=1e-12)


def flip(path: Path) -> None:
    """Change one byte of the weights, and leave size and time of the file as they were."""
    import os

    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_changed_base_is_refused(base: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = tune(base, tmp_path / "run", method=method, **HOW)
    flip(base / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"is not the base model that .*run was trained on: model\.safetensors differ"
    ) as caught:
        TunedRun.open(result.run_dir, data=ROWS).evaluate(answers=0)
    assert caught.value.exit_code == 2
    answering = ["chat", str(result.run_dir), "--once", "Who?", "--max-new-tokens", "3"]
    assert main(answering) == (2 if method == "lora" else 0)  # a whole tuned model answers without its base
    assert ("train again on this model" in capsys.readouterr().err) == (method == "lora")
    flip(base / "model.safetensors")
    assert TunedRun.open(result.run_dir, data=ROWS).evaluate(answers=0).rows > 0


def test_a_run_does_not_go_on_from_a_changed_base(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        tune(base, tmp_path / "run", callbacks=[SignalAt(3)], **HOW)
    flip(base / "model.safetensors")
    with pytest.raises(OutputError, match=r"begun with another base model: model\.safetensors differ"):
        FineTuner.resume(tmp_path / "run", ROWS)


def test_a_file_that_is_new_in_the_base_counts_too(base: Path, tmp_path: Path) -> None:
    result = tune(base, tmp_path / "run", **HOW)
    (base / "adapter_config.json").write_text("{}")  # transformers would load an adapter by it
    with pytest.raises(ModelError, match=r"adapter_config\.json differ"):
        TunedRun.open(result.run_dir, data=ROWS).generate("Who?", max_new_tokens=2)


def test_a_run_that_names_no_base_says_that_it_is_not_checked(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = FineTuner(ROWS, **settings(base, tmp_path / "run", **HOW)).train()
    RunDirectory.open(result.run_dir).update_run(base_model=None)
    assert TunedRun.open(result.run_dir, data=ROWS).evaluate(answers=0).rows > 0
    assert "does not say which base model" in capsys.readouterr().err
