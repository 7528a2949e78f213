"""Rows that a run was trained on are known to it: named when they are given as evaluation data, and never held out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as how_often
from hypothesis import strategies as st
from tuning import SignalAt, events, settings

from llmtune import FineTuner
from llmtune.cli.program import main
from llmtune.data import contamination
from llmtune.data.duplicates import SIGNATURE_BYTES, signature
from llmtune.errors import Preempted
from llmtune.finetuner import TunedRun
from llmtune.finetuner.training_rows import FILE, TrainingRows, _halved, _widened
from llmtune.reporting import summarise
from llmtune.runs import RunDirectory

Model = Callable[[str], Path]
WORDS = "amber bold cedar drift ember fjord grove haven ivory jolly karst lumen mossy north ochre plume quill".split()


def row(number: int, *, changed: str = "") -> dict[str, str]:
    """A row of about 60 words that shares few shingles with those of other numbers; ``changed`` replaces one word."""
    words = [WORDS[draw] for draw in np.random.default_rng(number).integers(0, len(WORDS), 60)]
    if changed:
        words[30] = changed
    return {"question": f"What does lamp {number} say?", "answer": " ".join(words)}


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows))
    return path


TRAINED = [row(number) for number in range(24)]
FRESH = [row(number) for number in range(100, 112)]
# Two exact copies, one of them in capitals, and a near one, among rows that are new.
MIXED = [*FRESH[:6], TRAINED[3], row(5, changed="zephyr"), *FRESH[6:], {k: v.upper() for k, v in TRAINED[9].items()}]
LEAKED_LINES, NEAR_LINES = {7: 4, 8: 6, 15: 10}, {8}


@pytest.fixture(scope="module")
def run(family_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose training data is gone."""
    root = tmp_path_factory.mktemp("leakage")
    data = write(root / "lamps.jsonl", TRAINED)
    how = settings(family_model("llama"), root / "run", max_steps=2, eval_fraction=0.0)
    result = FineTuner(data, **how).train()
    data.unlink()
    return result.run_dir


def test_leaked_rows_are_named_and_left_out_though_the_training_data_is_gone(run: Path, tmp_path: Path) -> None:
    verdict = TunedRun.open(run).evaluate(str(write(tmp_path / "mixed.jsonl", MIXED)), answers=0)
    document = verdict.to_json()
    leakage = document["leakage"]
    assert (leakage["rows"], leakage["exact_rows"], leakage["near_rows"], leakage["training_rows"]) == (15, 2, 1, 3)
    named = {each["line"]: (each["of_line"], each["near"]) for each in leakage["examples"]}
    assert named == {line: (of, line in NEAR_LINES) for line, of in LEAKED_LINES.items()}
    assert all(
        each["file"].endswith("mixed.jsonl") and each["of_file"].endswith("lamps.jsonl") for each in leakage["examples"]
    )
    fresh = TunedRun.open(run).evaluate(str(write(tmp_path / "fresh.jsonl", FRESH)), answers=0)
    assert fresh.leakage is not None
    assert fresh.leakage.leaked == 0
    assert (verdict.rows, verdict.tokens) == (fresh.rows, fresh.tokens) == (12, fresh.tokens)
    assert verdict.loss == pytest.approx(fresh.loss, rel=1e-5)
    assert verdict.base_loss == pytest.approx(fresh.base_loss, rel=1e-5)
    assert "12 held-out rows" in verdict.text
    assert "3 evaluation rows are also trained on and left out" in verdict.text
    assert document["interval"]["value"] == pytest.approx(verdict.loss - verdict.base_loss, abs=1e-9)


def test_the_command_says_so_too(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mixed = write(tmp_path / "mixed.jsonl", MIXED)
    assert main(["eval", str(run), "--eval-data", str(mixed), "--answers", "0"]) == 0
    shown = capsys.readouterr().out
    assert "3 of 15 evaluation rows are trained on (2 exactly, 1 nearly)" in shown
    assert "mixed.jsonl:8" in shown
    assert main(["eval", str(run), "--eval-data", str(mixed), "--answers", "0", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert {"base", "tuned", "rows", "interval", "verdict", "leakage", "base_eval_loss", "eval_loss"} <= document.keys()
    assert document["leakage"]["exact_rows"] == 2


def test_where_all_rows_are_leaked_there_is_no_verdict(run: Path, tmp_path: Path) -> None:
    verdict = TunedRun.open(run).evaluate(str(write(tmp_path / "same.jsonl", TRAINED)))
    assert (verdict.kind, verdict.rows, verdict.loss, verdict.base_loss) == ("no_evaluation", 0, None, None)
    assert "all 24 evaluation rows are also trained on" in verdict.text
    assert verdict.to_json()["tuned"] == {"loss": None, "perplexity": None}
    assert json.loads(json.dumps(verdict.to_json()))["interval"] is None


def test_what_is_kept_holds_no_text_and_is_small(run: Path) -> None:
    content = (run / FILE).read_bytes()
    assert len(content) < 144 * len(TRAINED) + 2_500
    assert not any(word.encode() in content for word in WORDS)
    with np.load(run / FILE, allow_pickle=False) as arrays:
        assert {name: len(arrays[name]) for name in arrays.files} == {
            "digests": 24,
            "signatures": 24,
            "file_numbers": 24,
            "lines": 24,
            "file_names": 1,
        }


def test_a_resumed_run_keeps_what_it_began_with(family_model: Model, tmp_path: Path) -> None:
    data = write(tmp_path / "lamps.jsonl", TRAINED)
    how = settings(family_model("llama"), tmp_path / "run", max_steps=4, eval_fraction=0.25)
    with pytest.raises(Preempted):
        FineTuner(data, callbacks=[SignalAt(2)], **how).train()
    kept = (tmp_path / "run" / FILE).read_bytes()
    FineTuner.resume(tmp_path / "run")
    assert (tmp_path / "run" / FILE).read_bytes() == kept
    whole = TunedRun.open(tmp_path / "run").evaluate(str(data), answers=0)
    assert whole.leakage is not None
    assert (whole.rows, len(whole.leakage.exact_rows)) == (6, 18)  # the rows that were held out are in the file too
    assert TunedRun.open(tmp_path / "run").evaluate(answers=0).rows == 6


def test_a_run_of_an_earlier_version_is_compared_by_its_data_or_says_that_it_cannot(
    family_model: Model, tmp_path: Path
) -> None:
    data = write(tmp_path / "lamps.jsonl", TRAINED)
    how = settings(family_model("llama"), tmp_path / "run", max_steps=1, eval_fraction=0.0)
    run = FineTuner(data, **how).train().run_dir
    (run / FILE).unlink()
    mixed = str(write(tmp_path / "mixed.jsonl", MIXED))
    known = TunedRun.open(run).evaluate(mixed, answers=0)
    assert known.leakage is not None
    assert known.leakage.leaked == 3
    write(data, TRAINED[:20])
    unknown = TunedRun.open(run).evaluate(mixed, answers=0)
    assert (unknown.leakage, unknown.rows) == (None, 15)
    assert "Whether these rows were trained on is not known" in unknown.text
    assert "held-out" not in unknown.text
    (run / FILE).write_bytes(b"PK\x03\x04 torn")
    assert TunedRun.open(run).evaluate(mixed, answers=0).leakage is None


@pytest.mark.parametrize(("duplicates", "held_out"), [("keep", 12), ("drop_exact", 15)])
def test_a_run_leaves_evaluation_rows_out_that_it_trains_on(
    family_model: Model, tmp_path: Path, duplicates: str, held_out: int
) -> None:
    how = settings(family_model("llama"), tmp_path / "run", max_steps=3)
    how |= {"data.eval_path": str(write(tmp_path / "mixed.jsonl", MIXED)), "data.duplicates": duplicates}
    result = FineTuner(write(tmp_path / "lamps.jsonl", TRAINED), **how).train()
    (*_, last) = events(result.run_dir, "evaluation")
    assert (last["num_rows"], last["held_out"]["rows"]) == (15, held_out)
    assert result.verdict.rows == held_out
    assert ("also trained on" in result.verdict.text) == (held_out == 12)
    assert summarise(result.run_dir).verdict == result.verdict
    opened = TunedRun.open(result.run_dir).evaluate()
    assert opened.rows == held_out
    assert (opened.loss, opened.base_loss) == (result.verdict.loss, result.verdict.base_loss)
    assert opened.judgement.interval == result.verdict.interval


def test_check_compares_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, mixed = write(tmp_path / "lamps.jsonl", TRAINED), write(tmp_path / "mixed.jsonl", MIXED)
    assert main(["check", str(data), "--eval-data", str(mixed), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    leakage = report["leakage"]
    assert (leakage["rows"], leakage["exact_rows"], leakage["near_rows"], leakage["training_rows"]) == (15, 2, 1, 3)
    assert {each["line"]: each["of_line"] for each in leakage["examples"]} == LEAKED_LINES
    assert "leakage" in {advice["kind"] for advice in report["advice"]}
    assert main(["check", str(data), "--eval-data", str(mixed), "--no-near-duplicates", "--json"]) == 0
    leakage = json.loads(capsys.readouterr().out)["leakage"]
    assert (leakage["exact_rows"], leakage["near_rows"]) == (2, None)
    assert main(["check", str(data), "--eval-data", str(mixed)]) == 0
    shown = capsys.readouterr().out
    assert "3 of 15 evaluation rows are trained on" in shown
    assert "mixed.jsonl:15" in shown
    assert main(["check", str(data), "--eval-data", str(mixed), "--model", "builtin:tiny", "--json"]) == 0
    with_model = json.loads(capsys.readouterr().out)["leakage"]
    assert with_model == json.loads(json.dumps(with_model | {"exact_rows": 2, "near_rows": 1}))
    assert {each["line"]: each["of_line"] for each in with_model["examples"]} == LEAKED_LINES
    assert main(["check", str(data), "--json"]) == 0
    assert "leakage" not in json.loads(capsys.readouterr().out)


def signatures(rows: list[dict[str, Any]]) -> Any:
    texts = (f"{each['question']} {each['answer']}" for each in rows)
    return np.frombuffer(b"".join(map(signature, texts)), np.uint8).reshape(-1, SIGNATURE_BYTES)


@how_often(max_examples=25)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.integers(0, 12))
def test_half_of_a_signature_tells_near_rows_as_the_whole_does(numbers: list[int], count: int) -> None:
    train = [row(number) for number in range(20)] + [{"question": "short", "answer": "row"}]
    judged = [row(number, changed="zephyr" if at < count else "") for at, number in enumerate(numbers)]
    judged += [{"question": "short", "answer": "line"}]
    digests = np.arange(len(train), dtype=np.uint64), np.arange(1000, 1000 + len(judged), dtype=np.uint64)
    whole = contamination(digests[0], signatures(train), digests[1], signatures(judged))
    halves = [_widened(_halved(signatures(rows))) for rows in (train, judged)]
    half = contamination(digests[0], halves[0], digests[1], halves[1])
    assert whole.near_rows is not None
    assert half.near_rows is not None
    assert half.near_rows.tolist() == whole.near_rows.tolist()
    assert half.examples == whole.examples


def test_a_run_without_what_it_was_trained_on_reads_as_none(tmp_path: Path) -> None:
    made = RunDirectory.create(tmp_path / "run", identity={})
    assert TrainingRows.load(made) is None
