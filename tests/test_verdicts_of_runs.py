"""What a run says about itself: the same verdict everywhere, counts of rows, and answers that spoil a good loss."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tuning import ROWS, events, settings, tune

from llmtune import FineTuner
from llmtune.cli.tell import introduce_demo, show_metrics, tell_demo
from llmtune.evaluation import exact_match
from llmtune.finetuner import RunResult, TunedRun
from llmtune.reporting import summarise
from llmtune.runs import RunDirectory

Model = Callable[[str], Path]


def test_answers_that_repeat_themselves_spoil_a_loss_that_fell(tmp_path: Path) -> None:
    """The model learns the words of the references, and to say them forty times."""
    train = [{"question": f"Say lamp {number}.", "answer": " ".join(["lamp"] * 40)} for number in range(40)]
    held_out = [{"question": f"Say lamp {number}.", "answer": "lamp lamp lamp"} for number in range(50, 62)]
    path = tmp_path / "heldout.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in held_out))
    how = settings("builtin:tiny", tmp_path / "run", max_steps=16, num_samples=12, max_new_tokens=48, probe=False)
    result = FineTuner(train, eval_path=str(path), **how).train()
    assert result.verdict.interval is not None
    assert result.verdict.interval.high < 0, "the loss did not fall, so that there is nothing to spoil"
    assert result.verdict.kind == "not_better"
    assert "whatever the loss, because of its answers" in result.verdict.text
    assert result.verdict.answers is not None
    assert result.verdict.answers.tuned.get("repeats", 0) >= 6
    assert {event["tuned_flaw"] for event in events(result.run_dir, "sample") if event["step"]} >= {"repeats"}
    again = TunedRun.open(result.run_dir, data=train).evaluate(str(path))
    assert again.kind == "not_better"
    assert again.to_json()["answers"]["tuned"]["repeats"] >= 6


@pytest.fixture(scope="module")
def counted(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run with a metric that counts rows, of the first 5 of its 10 held-out rows, and one that does not."""

    def half(answers: Sequence[str], references: Sequence[str]) -> float:
        return 0.5

    how = {"eval_fraction": 0.4, "metric_rows": 5, "num_samples": 5, "max_new_tokens": 6, "report": True}
    metrics = {"exact_match": exact_match, "half": half}
    return tune(family_model("llama"), tmp_path_factory.mktemp("counted") / "run", metrics=metrics, **how)


def test_a_share_of_rows_is_told_as_a_count(counted: RunResult, capsys: pytest.CaptureFixture[str]) -> None:
    told = [event["rows_right"] for event in events(counted.run_dir, "evaluation")]
    assert told == [{"exact_match": {"right": 0, "rows": 5}}] * 3
    show_metrics(summarise(counted.run_dir))
    shown = " ".join(capsys.readouterr().out.split())
    assert "exact match 0 of 5 0 of 5" in shown
    assert "half 0.5 0.5" in shown
    assert "0 of 5" in (counted.run_dir / "report.html").read_text(encoding="utf-8")


def test_the_same_verdict_is_told_everywhere(counted: RunResult) -> None:
    verdict = summarise(counted.run_dir).verdict
    assert counted.verdict == verdict
    assert counted.to_json()["verdict"]["text"] == verdict.text
    assert RunResult.of(RunDirectory.open(counted.run_dir)).verdict == verdict
    assert verdict.text in (counted.run_dir / "report.html").read_text(encoding="utf-8").replace("&#39;", "'")
    assert verdict.rows == 10
    opened = TunedRun.open(counted.run_dir, data=ROWS).evaluate()
    assert opened.judgement.interval == verdict.interval
    assert (opened.rows, opened.tokens) == (verdict.rows, verdict.tokens)


def test_the_demo_says_how_many_it_judges_and_shows_misses(
    counted: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    introduce_demo(held_out=80, judged=64)
    assert "the answers to the first 64 of them are judged" in capsys.readouterr().err
    tell_demo(counted, as_json=False)
    shown = capsys.readouterr().out
    assert "miss 1 of 5" in shown
    assert "hit 1" not in shown
    assert "0 of 5 before, 0 of 5 after" in shown
    tell_demo(counted, as_json=True)
    samples = json.loads(capsys.readouterr().out)["samples"]
    assert [sample["right"] for sample in samples] == [False] * 5


def test_a_run_without_evaluation_says_that_nothing_was_measured(family_model: Model, tmp_path: Path) -> None:
    result = tune(family_model("llama"), tmp_path / "run", max_steps=1, eval_fraction=0.0)
    assert (result.verdict.kind, result.verdict.rows) == ("no_evaluation", None)
