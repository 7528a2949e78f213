"""Faults 38, 45 and 48: every out-of-memory text, the same failure after a rollback, code of the user's that raises."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from failures import OUT_OF_MEMORY, small_disk
from machines import request_for
from transformers import TrainerCallback
from tuning import ROWS, SignalAt, events, tune, weights

from llmtune import FineTuner
from llmtune.errors import LlmtuneError, Preempted, RecoveryExhausted, UserCodeError
from llmtune.finetuner import account
from llmtune.finetuner.account import told
from llmtune.planning import make_plan
from llmtune.runs import RunDirectory
from llmtune.training.recovery import Attempt, Failure, is_out_of_memory, recovery

pytestmark = pytest.mark.fault
Model = Callable[[str], Path]


def reports(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((run_dir / "failures").glob("*.json"))]


def traceback_of(run_dir: Path) -> str:
    (report,) = reports(run_dir)
    return (run_dir / "failures" / report["traceback"]).read_text()


@pytest.mark.parametrize("text", OUT_OF_MEMORY, ids=lambda text: text[:40])
def test_fault_38_every_out_of_memory_text(family_model: Model, text: str) -> None:
    """Raised inside the backward pass of a middle layer, where autograd hands it on."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family_model("llama"))

    def fail(module: Any, grad_input: Any, grad_output: Any) -> None:
        raise RuntimeError(text)

    model.model.layers[0].register_full_backward_hook(fail)
    ids = torch.arange(8)[None]
    with pytest.raises(RuntimeError) as caught:
        model(input_ids=ids, labels=ids).loss.backward()
    assert is_out_of_memory(caught.value)


def test_fault_45_same_failure_after_rollback_stops() -> None:
    plan = make_plan(request_for())
    history: list[Attempt] = []
    nan = Failure(kind="non_finite", cause="gradient is NaN", step=12, evidence={}, remedy="look at the rows")
    taken = []
    for _ in range(9):
        remedy = recovery(nan, plan, history)
        taken.append(remedy.action)
        if remedy.action == "stop":
            break
        history.append(Attempt(failure=nan, action=remedy.action))
    assert taken == ["skip_update", "roll_back", "stop"]
    assert "gradient is NaN came back at step 12 after: skip update, roll back" in remedy.reason


class Broken(TrainerCallback):
    """Raises at the end of one step."""

    def __init__(self, step: int) -> None:
        self.step, self.calls = step, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.calls += 1
            self._divide(0)

    def _divide(self, by: int) -> float:
        return 1 / by


def test_a_launcher_that_ends_this_process_waits_for_the_account(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal of the moment in which it is written what has ended the run."""
    written = account.write_failure

    def write(*args: Any, **kwargs: Any) -> Path:
        os.kill(os.getpid(), signal.SIGTERM)
        return written(*args, **kwargs)

    monkeypatch.setattr(account, "write_failure", write)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UserCodeError):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Broken(1)])
    (report,) = reports(tmp_path / "run")
    assert report["kind"] == "user_code"
    assert RunDirectory.open(tmp_path / "run").run["exit_code"] == 1
    assert signal.getsignal(signal.SIGTERM) is before


def test_fault_48_user_callback_raises(family_model: Model, tmp_path: Path) -> None:
    callback, run_dir = Broken(3), tmp_path / "run"
    message = (
        r"your callback Broken\.on_step_end raised ZeroDivisionError: .*test_faults_failures\.py:\d+.*not tried again"
    )
    with pytest.raises(UserCodeError, match=message) as caught:
        tune(family_model("llama"), run_dir, callbacks=[callback])
    assert caught.value.exit_code == 1
    assert callback.calls == 1
    assert f"continue with: llmtune resume {run_dir}" in str(caught.value)
    (report,) = reports(run_dir)
    assert (report["kind"], report["action"], report["step"]) == ("user_code", "stop", 3)
    assert report["cause"] == "ZeroDivisionError in callback Broken.on_step_end"
    assert report["evidence"]["owner"] == "callback Broken.on_step_end"
    assert report["checkpoint"] == str(run_dir / "checkpoints" / "checkpoint-2")
    text = traceback_of(run_dir)
    assert text.startswith("what happened")
    assert "return 1 / by" in text
    run = RunDirectory.open(run_dir)
    assert (run.run["status"], run.run["exit_code"]) == ("failed", 1)
    (failed,), (incident,) = events(run_dir, "run_failed"), events(run_dir, "incident")
    assert failed["failure"] == "failures/0001-user_code.json"
    assert (incident["kind"], incident["step"]) == ("user_code", 3)
    # Mended, it goes on and ends as if nothing had been.
    whole = tune(family_model("llama"), tmp_path / "whole")
    result = FineTuner.resume(run_dir, ROWS)
    assert (result.status, result.metrics) == ("finished", whole.metrics)
    assert [event["kind"] for event in result.incidents] == ["user_code"]
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(run_dir).items())


def test_fault_48_user_metric_raises_in_the_middle(family_model: Model, tmp_path: Path) -> None:
    calls: list[int] = []

    def wordiness(answers: Sequence[str], references: Sequence[str]) -> float:
        calls.append(1)
        return float(len(answers)) if len(calls) < 3 else math.log(0.0)  # the rehearsal and the base model go well

    how = {"metrics": {"wordiness": wordiness}, "max_new_tokens": 4, "metric_rows": 2}
    with pytest.raises(UserCodeError, match=r"your metric wordiness raised ValueError"):
        tune(family_model("llama"), tmp_path / "run", **how)
    (report,) = reports(tmp_path / "run")
    assert (report["kind"], report["evidence"]["owner"]) == ("user_code", "metric wordiness")
    assert report["evidence"]["phase"] == "evaluation"


def test_fault_48_a_mistake_inside_a_model_is_not_called_ours(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune import models

    real = models.load_for_training

    def hooked(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        layer = model.get_base_model().model.layers[1]

        def own_hook(module: Any, inputs: Any) -> None:
            raise LookupError("my own layer")

        layer.register_forward_pre_hook(own_hook)
        return model

    monkeypatch.setattr(models, "load_for_training", hooked)
    with pytest.raises(UserCodeError, match=r"your code own_hook raised LookupError: my own layer"):
        tune(family_model("llama"), tmp_path / "run", **{"train.probe": False})


class Breaks(TrainerCallback):
    """Makes the trainer fail as a machine would, from inside its own code."""

    def __init__(self, step: int, error: Exception) -> None:
        self.step, self.error = step, error

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            layer = model.get_base_model().model.layers[1]

            def fail(module: Any, grad_input: Any, grad_output: Any) -> None:
                raise self.error

            layer.register_full_backward_hook(fail)


def test_a_failing_device_names_checkpoint_and_report_and_asks_for_a_restart(
    family_model: Model, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    ecc = RuntimeError("CUDA error: uncorrectable ECC error encountered")
    with pytest.raises(RecoveryExhausted, match="uncorrectable ECC error") as caught:
        tune(family_model("llama"), run_dir, callbacks=[Breaks(4, ecc)], report=True)
    assert caught.value.exit_code == 5
    (report,) = reports(run_dir)
    message = str(caught.value)
    saved = [event["step"] for event in events(run_dir, "checkpoint_saved")]
    assert max(saved) <= 3  # nothing is saved from a dead device
    for named in (
        f"The last good checkpoint is {run_dir / 'checkpoints' / f'checkpoint-{saved[-1]}'}",
        f"continue with: llmtune resume {run_dir}",
        f"Failure report: {run_dir / 'failures' / '0001-hardware.json'}",
        "nvidia-smi",
    ):
        assert named in message, named
    assert (report["kind"], report["action"], report["step"]) == ("hardware", "restart", 3)
    page = (run_dir / "report.html").read_text()
    assert "uncorrectable ECC error" in page
    assert FineTuner.resume(run_dir, ROWS).status == "finished"


def test_a_defect_is_told_as_ours(family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtune.training.trainer import UpdateTrainer

    monkeypatch.setattr(UpdateTrainer, "sampler", None)
    with pytest.raises(LlmtuneError, match=r"TypeError: .* This is a defect of llmtune") as caught:
        tune(family_model("llama"), tmp_path / "run")
    assert caught.value.exit_code == 1
    (report,) = reports(tmp_path / "run")
    assert report["cause"] == "TypeError in llmtune.training.trainer.UpdateTrainer.get_train_dataloader"


def test_a_report_that_its_own_disk_cannot_take_lies_elsewhere(tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m") as place:
        run = RunDirectory.create(place / "run", identity={})
        run.update_run(config={"monitor": {"report": False}, "output": {"root": str(tmp_path)}})
        with (place / "filler").open("wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(bytes(4096))
        with pytest.raises(RecoveryExhausted, match="the disk is full") as caught, told(run):
            torch.save(torch.ones(2**20), run.path / "weights.pt")
        message = str(caught.value)
        report = Path(message.rpartition("Failure report: ")[2])
        assert report.is_file()
        assert not report.is_relative_to(place)
        assert "Traceback" in report.read_text()
        report.unlink()


def test_a_signal_is_no_failure(family_model: Model, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "run", callbacks=[SignalAt(2)])
    assert not (tmp_path / "run" / "failures").exists()
