"""The loop: what it computes, what it keeps, how it stops and goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback
from tuning import ROWS, SignalAt, evaluations, events, history, losses, settings, tune, weights

from llmtune import FineTuner
from llmtune.data import encode, epoch_order, split
from llmtune.errors import LlmtuneError, Preempted
from llmtune.runs import RunDirectory

Model = Callable[[str], Path]


# --- what is computed -------------------------------------------------------------------------------------------------


def test_how_an_update_is_cut_changes_nothing(family_model: Model, tmp_path: Path) -> None:
    cuts = [{"micro_batch_size": 1}, {"micro_batch_size": 8}, {"token_budget": 64}, {"token_budget": 4096}]
    for number, cut in enumerate(cuts):
        tune(family_model("llama"), tmp_path / str(number), **cut)
    reference, first = losses(tmp_path / "0"), weights(tmp_path / "0")
    for number in range(1, len(cuts)):
        other = losses(tmp_path / str(number))
        assert np.abs(np.subtract(reference, other)).max() < 2e-6
        assert np.abs(np.mean(np.subtract(reference, other))) < 1e-6
        drift = max(float((first[k] - v).abs().max()) for k, v in weights(tmp_path / str(number)).items())
        assert drift < 1e-5
    passes = [events(tmp_path / str(n), "step")[0]["micro_batch_size"] for n in range(2)]
    assert passes[0] == 1 < passes[1] <= 8


def test_the_trajectory_is_that_of_a_plain_loop(family_model: Model, tmp_path: Path) -> None:
    """An independent loop: same rows per update, mean over supervised tokens, AdamW, clipping, constant rate."""
    result = tune(
        family_model("llama"), tmp_path / "run", method="full", schedule="constant", warmup_ratio=0, weight_decay=0.1
    )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = family_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    data, _ = split(encode(ROWS, tokenizer, cache_dir=tmp_path / "tokens"), 0.1, 42)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).train()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    expected = []
    updates = [
        order[i : i + 8] for epoch in range(2) for order in [epoch_order(data.parts, 42, epoch)] for i in (0, 8, 16)
    ]
    for rows in updates[: result.steps]:
        total, count = torch.zeros(()), 0
        for row in rows:
            encoded = data[int(row)]
            ids = torch.tensor(encoded.input_ids, dtype=torch.long)
            learned = torch.tensor(encoded.supervised)[1:]
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
            total = total - log_p[learned, ids[1:][learned]].sum()
            count += int(learned.sum())
        (total / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(total.detach()) / count)
    assert np.abs(np.subtract(expected, losses(tmp_path / "run"))).max() < 2e-5


def test_every_number_of_a_step_is_written(family_model: Model, tmp_path: Path) -> None:
    tune(family_model("llama"), tmp_path / "run")
    steps = events(tmp_path / "run", "step")
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert step["global_batch_size"] == 8 or step["step"] % 3 == 0  # 23 rows: the third update holds seven
        assert 0 < step["num_supervised_tokens"] < step["num_tokens"]
        assert step["tokens_per_second"] == pytest.approx(step["num_tokens"] / step["step_seconds"])
        assert step["memory_bytes"] > 50 * 2**20
    assert sum(step["num_tokens"] for step in steps[:3]) == sum(step["num_tokens"] for step in steps[3:])


def test_a_nan_loss_is_written_not_hidden(family_model: Model, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)

    tune(family_model("llama"), tmp_path / "run", callbacks=[Poison()], **{"evaluate.every_steps": 6})
    assert losses(tmp_path / "run")[2] == "nan"
    assert (tmp_path / "run" / "events.jsonl").read_text().count("NaN") == 0


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_result(family_model: Model, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tune(family_model("llama"), tmp_path / "run", learning_rate=0.3, max_steps=12, schedule="constant", keep=2)
    by_step = {step: loss for step, loss in evaluations(tmp_path / "run").items() if step > 0}
    best = min(by_step, key=lambda step: by_step[step])
    assert RunDirectory.open(tmp_path / "run").run["best"] == {
        "metric": "eval_loss",
        "value": by_step[best],
        "step": best,
    }
    saved = load_file(tmp_path / "run" / "checkpoints" / f"checkpoint-{best}" / "adapter_model.safetensors")
    assert all(torch.equal(saved[name], tensor) for name, tensor in weights(tmp_path / "run").items())
    kept = {int(p.name.split("-")[1]) for p in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {12, 10, best} | {max(step for step in kept)}
    deleted = [event["deleted_step"] for event in events(tmp_path / "run", "checkpoint_deleted")]
    assert set(deleted).isdisjoint(kept)


def test_the_adapter_loads_in_plain_peft_with_the_same_loss(family_model: Model, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = tune(family_model("llama"), tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(result.adapter_dir)
    base = AutoModelForCausalLM.from_pretrained(family_model("llama"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(result.adapter_dir)).eval()
    _, held_out = split(encode(ROWS, tokenizer, cache_dir=tmp_path / "tokens"), 0.1, 42)
    total, count = 0.0, 0
    for row in range(len(held_out)):
        ids = torch.tensor(held_out[row].input_ids, dtype=torch.long)
        learned = torch.tensor(held_out[row].supervised)[1:]
        with torch.no_grad():
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
        total -= float(log_p[learned, ids[1:][learned]].sum())
        count += int(learned.sum())
    assert total / count == pytest.approx(result.metrics["eval_loss"], abs=1e-5)
    assert result.metrics["eval_loss"] < result.metrics["base_eval_loss"]
    assert result.metrics["perplexity"] == pytest.approx(math.exp(result.metrics["eval_loss"]))


def test_no_evaluation_data_means_no_evaluation(family_model: Model, tmp_path: Path) -> None:
    result = tune(family_model("llama"), tmp_path / "run", eval_fraction=0)
    assert set(result.metrics) == {"train_loss"}
    assert result.metrics["train_loss"] == pytest.approx(np.mean(losses(tmp_path / "run")))
    assert events(tmp_path / "run", "evaluation") == []
    assert result.adapter_dir is not None


def test_own_metrics_choose_the_best_and_are_reported(family_model: Model, tmp_path: Path) -> None:
    seen: list[tuple[list[str], list[str]]] = []

    def calls(answers: Any, references: Any) -> float:
        seen.append((list(answers), list(references)))
        return float(-len(seen))  # the first evaluation of a trained model is the best

    result = tune(
        family_model("llama"),
        tmp_path / "run",
        metrics={"calls": calls},
        metric="calls",
        max_new_tokens=4,
        metric_rows=2,
    )
    assert len(seen) == 4  # rehearsal, base, step 3, step 6
    assert all(len(answers) == len(references) == 2 for answers, references in seen)
    assert seen[0][1][0] in {row["answer"] for row in ROWS}
    assert result.metrics["calls"] == -3.0
    assert result.metrics["base_calls"] == -2.0
    assert RunDirectory.open(tmp_path / "run").run["best"] == {"metric": "calls", "value": -3.0, "step": 3}


# --- how it stops and goes on -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_stopped_by_a_signal_and_resumed_is_bitwise_what_never_stopped(
    family_model: Model, tmp_path: Path, cut: int
) -> None:
    how = {"dropout": 0.1, "max_steps": 7, "patience": 5}
    tune(family_model("llama"), tmp_path / "whole", **how)
    with pytest.raises(Preempted, match=f"after step {cut}. Continue with: llmtune resume") as stopped:
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(cut)], **how)
    assert stopped.value.exit_code == 75
    run = RunDirectory.open(tmp_path / "cut")
    assert (run.run["status"], run.read_json("status.json")["exit_code"]) == ("preempted", 75)
    result = FineTuner.resume(tmp_path / "cut", ROWS)
    assert result.status == "finished"
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert evaluations(tmp_path / "cut") == evaluations(tmp_path / "whole")
    whole = weights(tmp_path / "whole")
    assert all(torch.equal(whole[name], tensor) for name, tensor in weights(tmp_path / "cut").items())
    assert result.metrics == RunDirectory.open(tmp_path / "whole").run["metrics"]
    assert events(tmp_path / "cut", "run_started")[1]["resumed_from"] == f"checkpoints/checkpoint-{cut}"


def test_patience_off_goes_to_the_end_where_patience_would_stop(family_model: Model, tmp_path: Path) -> None:
    never_better = {"evaluate.every_steps": 1, "min_delta": 100.0, "max_steps": 5}
    tune(family_model("llama"), tmp_path / "two", patience=2, **never_better)
    assert [event["step"] for event in events(tmp_path / "two", "early_stop")] == [2]
    tune(family_model("llama"), tmp_path / "off", patience="off", **never_better)
    assert events(tmp_path / "off", "early_stop") == []
    assert len(losses(tmp_path / "off")) == 5


def test_early_stopping_counts_on_across_a_resume(family_model: Model, tmp_path: Path) -> None:
    how = {"learning_rate": 0.5, "schedule": "constant", "max_steps": 30, "patience": 3, "min_delta": 0.05}
    how["evaluate.every_steps"] = 2
    tune(family_model("llama"), tmp_path / "whole", **how)
    (stop,) = events(tmp_path / "whole", "early_stop")
    assert 0 < stop["step"] < 30
    assert "has not improved" in stop["reason"]
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "cut", callbacks=[SignalAt(stop["step"] - 1)], **how)
    FineTuner.resume(tmp_path / "cut", ROWS)
    assert [event["step"] for event in events(tmp_path / "cut", "early_stop")] == [stop["step"]]


def test_a_finished_run_is_not_trained_again(family_model: Model, tmp_path: Path) -> None:
    first = tune(family_model("llama"), tmp_path / "run")
    before = (tmp_path / "run" / "events.jsonl").read_bytes()
    again = tune(family_model("llama"), tmp_path / "run")
    assert (again.status, again.metrics, again.steps) == ("finished", first.metrics, 6)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == before


def test_stopped_after_the_last_update_no_further_one_is_made(family_model: Model, tmp_path: Path) -> None:
    """``Trainer`` makes one update too many when a run of no whole number of epochs is resumed at its end."""
    import shutil

    whole = tune(family_model("llama"), tmp_path / "run", max_steps=7)
    run, expected = RunDirectory.open(tmp_path / "run"), weights(tmp_path / "run")
    shutil.rmtree(run.adapter)
    run.update_run(status="running", metrics=None, best=None)
    again = FineTuner.resume(tmp_path / "run", ROWS)
    assert len(events(tmp_path / "run", "step")) == 7
    assert (again.metrics, again.steps) == (whole.metrics, 7)
    assert all(torch.equal(expected[name], tensor) for name, tensor in weights(tmp_path / "run").items())


def test_a_damaged_checkpoint_is_passed_over_and_said_so(family_model: Model, tmp_path: Path) -> None:
    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "run", callbacks=[SignalAt(5)])
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-5" / "optimizer.pt"
    newest.write_bytes(newest.read_bytes()[:-1])
    FineTuner.resume(tmp_path / "run", ROWS)
    (rejected,) = events(tmp_path / "run", "checkpoint_rejected")
    assert (rejected["step"], "optimizer.pt" in rejected["reason"]) == (5, True)
    assert events(tmp_path / "run", "run_started")[1]["resumed_from"] == "checkpoints/checkpoint-4"


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_an_error_in_a_users_callback_is_told_as_such(family_model: Model, tmp_path: Path) -> None:
    class Broken(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise ZeroDivisionError("my own mistake")

    with pytest.raises(LlmtuneError, match=r"my own mistake.*traceback is in"):
        tune(family_model("llama"), tmp_path / "run", callbacks=[Broken()])
    run = RunDirectory.open(tmp_path / "run")
    assert run.run["status"] == "failed"
    (failed,) = events(tmp_path / "run", "run_failed")
    report = run.read_json(failed["failure"])
    assert report["exception"] == "ZeroDivisionError"
    assert "on_step_end" in (tmp_path / "run" / "failures" / report["traceback"]).read_text()


def test_a_watcher_that_fails_does_not_stop_the_run(
    family_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmtune.training.watchers import ProgressDisplay

    def fail(self: ProgressDisplay, state: Any, logs: Any, seconds: float) -> None:
        raise RuntimeError("no terminal")

    monkeypatch.setattr(ProgressDisplay, "stepped", fail)
    assert tune(family_model("llama"), tmp_path / "run").status == "finished"
    assert capsys.readouterr().err.count("ProgressDisplay failed and is switched off") == 1
    assert len(events(tmp_path / "run", "step")) == 6


def test_the_loop_never_uses_what_would_change_a_run_silently(family_model: Model, tmp_path: Path) -> None:
    seen: list[Any] = []

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(args)

    tune(family_model("llama"), tmp_path / "run", callbacks=[Look()])
    (args,) = seen
    assert args.logging_nan_inf_filter is False
    assert args.auto_find_batch_size is False
    assert args.gradient_accumulation_steps == 1
    assert args.save_total_limit is None


def test_two_runs_cannot_write_one_directory(family_model: Model, tmp_path: Path) -> None:
    from llmtune.errors import OutputError

    with pytest.raises(Preempted):
        tune(family_model("llama"), tmp_path / "run", callbacks=[SignalAt(2)])
    with RunDirectory.open(tmp_path / "run").lock(), pytest.raises(OutputError, match=r"in use: process \d+"):
        FineTuner.resume(tmp_path / "run", ROWS)
    with pytest.raises(OutputError, match="holds another run"):
        tune(family_model("llama"), tmp_path / "run", rank=8)
    assert settings("m", tmp_path)["rank"] == 4


def test_an_evaluation_leaves_the_gradients_of_a_quantised_model_alone(tmp_path: Path) -> None:
    """bitsandbytes repacks 4-bit weights on some CPUs at the first evaluation; then no gradient passes through."""
    how = {"method": "qlora", "precision": "bf16", "learning_rate": 1e-9, "schedule": "constant", "max_steps": 2}
    tune("builtin:tiny", tmp_path / "evaluated", **how, **{"evaluate.base": True})
    tune("builtin:tiny", tmp_path / "not", **how, **{"evaluate.base": False})
    evaluated, untouched = history(tmp_path / "evaluated"), history(tmp_path / "not")
    assert evaluated == untouched
    assert min(step[2] for step in evaluated) > 0
