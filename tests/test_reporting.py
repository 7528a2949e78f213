"""A report is made from any run directory, tells the truth about it and fetches nothing."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llmtune.errors import RunNotFoundError
from llmtune.evaluation import AnswerCheck, Interval
from llmtune.reporting import EvaluationRow, summarise, write_report
from llmtune.reporting.charts import thin
from llmtune.reporting.facts import Curve
from llmtune.reporting.verdict import Evidence, judge, overfitting_note
from llmtune.runs import RunDirectory

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
IDENTITY = {"data": "d1", "model": "m1", "config": "c1"}


def choice(value: object, source: str = "derived", reason: str = "because") -> dict[str, object]:
    return {"value": value, "reason": reason, "source": source}


def plan(**changes: object) -> dict[str, object]:
    choices = {
        "model": choice("builtin:tiny", "user", "you set model.id"),
        "updates": choice(120, "derived", "960 rows x 1 epoch / 8 rows per update"),
        "micro_batch_size": choice(8, "derived", "the largest that fits"),
        "learning_rate": choice(0.0005, "preset", "level quality of preset tiny"),
        "targets": choice(["q_proj", "v_proj"], "preset"),
        "patience": choice(None, "default"),
    }
    choices |= {name: choice(value, "measured", "a probe ran out of memory") for name, value in changes.items()}
    terms = {"weights": 12e6, "optimizer_state": 3e6, "activations": 90e6}
    memory = {"device": "cpu", "total_bytes": 8e9, "free_bytes": 6e9, "peak_bytes": 1.1e9, "terms": terms}
    time = {"step_seconds": 0.2, "total_seconds": 26.0}
    return {"choices": choices, "memory": memory, "time": time, "fits": True, "notices": ["token counts are estimated"]}


def data_report(*, text: str = "Where is the order?") -> dict[str, object]:
    spread = {"total": 96_000, "p50": 80, "p95": 340, "p99": 510, "max": 2210}
    part = {"value": 7.5, "score": 0.5625, "weight": 0.25, "zero_at": 3.0, "one_at": 11.0}
    return {
        "format": "question_answer",
        "reason": "the rows have 'question' and 'answer'",
        "rows": 9_600,
        "bad_rows": 3,
        "bytes": 1_234_567,
        "problems": [{"file": text, "line": 7, "field": "answer", "problem": text, "hint": "fix it"}] * 30,
        "statistics": {
            "good_rows": 9_597,
            "size_class": "medium",
            "chars": spread,
            "turns": {"total": 9_597, "p50": 1, "p95": 1, "p99": 3, "max": 12},
            "roles": {"assistant": 9_700, "user": 9_700},
            "scripts": {"latin": 0.981, "cyrillic": 0.019},
            "diversity": {"distinct_2": 0.82, "compression_ratio": 0.31},
            "repetition": {"answer": 0.02, "prompt": 0.0, "most_common_answer": text},
            "complexity": {"score": 0.4375, "parts": {"log2_answer_chars": part}, "definition": "sum over the parts"},
            "a_new_one": {"of": {"depth": 0.25}},
        },
        "tokens": 1_200_000,
        "supervised_tokens": 396_000,
        "supervision": {
            "length_p50": 110,
            "length_p95": 300,
            "length_p99": 480,
            "length_max": 1_900,
            "supervised_share_p5": 0.04,
            "supervised_share_p50": 0.33,
            "supervised_share_p95": 0.61,
            "stop_token_supervised": True,
            "bos_once": False,
            "ids_in_vocabulary": True,
            "rows_without_supervision": 0,
            "rows_truncated": 12,
            "answer_tokens_lost": 345,
            "unknown_share": 0.0,
            "byte_fallback_share": 0.0123,
        },
        "duplicates": {
            "rows": 9_597,
            "exact_rows": 120,
            "exact_groups": 40,
            "near_rows": 31,
            "near_groups": 9,
            "examples": [{"file": text, "line": 9, "of_file": text, "of_line": 2, "near": True}],
        },
        "leakage": {"rows": 500, "exact_rows": 2, "near_rows": 1, "training_rows": 3, "examples": []},
        "advice": [
            {"kind": "near_duplicates", "severity": "info", "finding": f"31 rows repeat {text}", "suggestion": text},
            {
                "kind": "duplicates",
                "severity": "warning",
                "finding": "120 rows repeat",
                "suggestion": "Drop them.",
            },
        ],
    }


def full_run(path: Path, *, text: str = "Where is the order?", updates: int = 120) -> RunDirectory:
    run = RunDirectory.create(path, identity=IDENTITY)
    best = {"metric": "eval_loss", "value": 0.9, "step": 80}
    run.update_run(
        status="running", model="builtin:tiny", data=text, preset="quality", command=["llmtune", "train", text]
    )
    run.write_environment({"versions": {"torch": "2.13.0"}, "hardware": {"ram_total_bytes": 8e9}, "note": text})
    problem = {"file": text, "line": 7, "field": "answer", "problem": text, "hint": "fix it"}
    report = {"format": "question/answer", "rows": 960, "bytes": 123456, "problems": [problem] * 30}
    run.write_json("data_report.json", report | {"statistics": {"tokens": {"median": 40}}, "supervision": {"x": text}})
    run.add_plan(plan())
    run.event("run_started", 0)
    counted = {"rows_right": {"exact_match": {"right": 61, "rows": 64}}, "num_rows": 64}
    difference = {"value": -2.1, "low": -2.3, "high": -1.9, "confidence": 0.95}
    held_out = {"rows": 64, "tokens": 1234, "base_loss": 3.0, "loss": 0.9, "difference": difference}
    run.event("evaluation", 0, eval_loss=3.0, perplexity=20.1, **counted)
    for step in range(1, updates + 1):
        run.event(
            "step",
            step,
            loss=3.0 * math.exp(-step / 40) + 0.6 + 0.15 * math.sin(step * 2.4),
            learning_rate=5e-4 * min(1, step / 10) * (1 - step / (updates + 1)),
            grad_norm=math.nan if step == 60 else 1 + 5 / step,
            num_tokens=800,
            num_supervised_tokens=300,
            tokens_per_second=4000 + 100 * math.sin(step),
            step_seconds=0.21,
            micro_batch_size=8,
            global_batch_size=8,
            memory_bytes=1_000_000_000 + step,
        )
        if step % 40 == 0:
            loss = 0.9 + abs(step - 80) / 400
            run.event("evaluation", step, eval_loss=loss, perplexity=2.5, held_out=held_out, **counted)
            told = {"base": "??", "tuned": f"{text} at step {step}", "base_flaw": "repeats", "tuned_flaw": None}
            run.event("sample", step, prompt=text, reference=None, **told)
    run.event("incident", 60, kind="non_finite", cause=text, evidence={"grad_norm": math.nan})
    run.event("recovery", 60, action="micro-batch halved")
    run.add_plan(plan(micro_batch_size=4))
    run.event("run_finished", updates)
    run.adapter.mkdir()
    metrics = {"train_loss": 0.7, "eval_loss": 0.9, "base_eval_loss": 3.0}
    metrics |= {"exact_match": 61 / 64, "base_exact_match": 0.0, "words_right": 0.5, "base_words_right": 0.25}
    run.update_run(status="finished", steps=updates, best=best, metrics=metrics)
    return run


class Page(HTMLParser):
    """Collects what a page shows and what it would load."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self._skips = False
        self.feed(html)
        self.close()

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._skips = tag in ("script", "style")
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "data", "srcset")]

    def handle_endtag(self, tag: str) -> None:
        self._skips = False

    def handle_data(self, data: str) -> None:
        if not self._skips:
            self.texts.append(data)


def page(run: RunDirectory) -> Page:
    path = write_report(run.path)
    assert path == run.report
    return Page(path.read_text(encoding="utf-8"))


def test_a_full_run_is_told(tmp_path: Path) -> None:
    text = page(full_run(tmp_path / "orders-tiny-3f9a1c")).text
    for told in (
        "Better than the base model: held-out loss went from 3 to 0.9 (-70 %), perplexity from 20.09 to 2.46.",
        "64 held-out rows with 1,234 tokens: tuned minus base is -2.1 per token, 95 % interval -2.3 to -1.9.",
        "Of 1 answer none is empty, repeats itself or never ends (base model: 1 of 1).",
        "Finished after 120 steps.",
        "Held-out loss was lowest at step 80 (0.9) and rose to 1 by step 120",
        "1 step(s) had a loss or gradient norm that was not finite",
        "eval_loss 0.9 at step 80",
        "96k, 36k supervised",
        "kind: non_finite; cause: Where is the order?; evidence.grad norm: nan",
        "action: micro-batch halved",
        "micro batch size 8 4 a probe ran out of memory",
        "learning rate 0.0005 preset level quality of preset tiny",
        "targets q_proj, v_proj",
        "exact match 0 of 64 61 of 64 +61",
        "words right 0.25 0.5 +0.25",
        "quantity predicted measured measured / predicted",
        "peak memory on cpu 1.0 GiB 953.7 MiB 0.91 ×",
        "time of one step (median) 0.2 s 0.21 s 1.05 ×",
        "activations 85.8 MiB",
        "base model (repeats itself) ?? tuned model Where is the order? at step 120",
        "10 more are in data_report.json",
        "rows 960",
        "bytes 121 KiB",
        "versions · torch 2.13.0",
        "llmtune chat ",
        "token counts are estimated",
    ):
        assert told in text, told
    assert "llmtune resume" not in text
    assert "Where is the order? at step 40" not in text


def test_the_page_is_one_file_that_loads_nothing(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    found = page(run)
    assert found.loads == []
    assert {"link", "iframe", "img"} & set(found.tags) == set()
    html = run.report.read_text(encoding="utf-8")
    assert "default-src 'none'" in html
    assert html.count("Plotly.newPlot(") == 5
    assert not re.search(r"<script[^>]+src|<link[^>]+href|@import|url\(['\"]?http", html)


def test_hostile_data_stays_text(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r", text=HOSTILE)
    found = page(run)
    html = run.report.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "<img" not in html
    assert found.tags.count("script") == 1 + 5
    assert HOSTILE in found.text


def test_a_run_that_failed_at_the_start_is_told(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", identity=IDENTITY)
    run.update_run(status="running")
    run.event("run_started", 0)
    try:
        raise MemoryError("no room")
    except MemoryError as error:
        run.write_failure(error, kind="out_of_memory", cause="The weights do not fit.", remedy="Use --method qlora.")
    run.event("run_failed", 0, kind="out_of_memory")
    run.update_run(status="failed")
    text = page(run).text
    for told in (
        "Failed at step 0: The weights do not fit.",
        "Not measured: no evaluation on held-out rows",
        "out_of_memory : The weights do not fit. Use --method qlora. (failures/0001-out_of_memory.json)",
        "the run stopped before a plan was made",
        "llmtune resume",
    ):
        assert told in text, told


def test_a_run_without_anything_and_one_with_torn_and_odd_files(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", identity={})
    assert "Planned; training has not begun." in page(run).text
    (run.path / "events.jsonl").write_bytes(
        b'{"time": "?", "event": "step", "step": 3, "loss": "nan", "memory_bytes": [], "step_seconds": "x"}\n'
        b'{"event": "evaluation", "step": 3, "eval_loss": "inf"}\n{"event": "sample", "step": 3, "prompt": 5}\n'
        b'{"event": "step", "st'
    )
    for name, content in [
        ("plan.json", '{"choices": {"updates": 7, "rank": null}, "memory": [], "notices": 3}'),
        ("data_report.json", '{"problems": [1, {"line": 2}], "statistics": null}'),
        ("environment.json", "{"),
    ]:
        (run.path / name).write_text(content)
    run.update_run(status="running", metrics="none", best=5)
    found = page(run)
    assert "Stopped without a word at step 3" in found.text
    assert summarise(run.path).non_finite_steps == 1


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunNotFoundError):
        write_report(tmp_path)


def test_the_summary_is_json_with_the_keys_of_the_list(tmp_path: Path) -> None:
    document = summarise(full_run(tmp_path / "r").path).to_json()
    keys = {"name", "dir", "status", "model", "data", "preset", "started", "finished", "steps", "best", "verdict"}
    assert keys <= set(document)
    assert document["verdict"]["kind"] == "better"
    assert document["data_report"]["statistics.tokens.median"] == 40
    json.dumps(document, allow_nan=False)


def test_a_live_run_is_running_and_a_moved_run_is_whole(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    run.update_run(status="running")
    with run.lock():
        assert summarise(run.path).state == "Running, at step 120 of 120."
    shutil.move(run.path, tmp_path / "moved")
    assert summarise(tmp_path / "moved").dir == str(tmp_path / "moved")


def test_measured_time_leaves_out_the_pause_between_two_sessions(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    events = [("00:00:00", "run_started", 0), ("00:01:00", "step", 1), ("05:00:00", "run_started", 1)]
    lines = [
        {"time": f"2026-01-01T{time}Z", "event": event, "step": step}
        for time, event, step in [*events, ("05:00:30", "step", 2)]
    ]
    (run.path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (whole,) = (item for item in summarise(run.path).predictions if item.name == "time of the whole run")
    assert whole.measured == 90.0


def probed_run(path: Path, *, updates: int = 120) -> RunDirectory:
    """A run whose second plan followed a probe, with the seconds of its evaluations and saves."""
    run = full_run(path, updates=updates)
    for name in ("plan.json", "plan-2.json"):
        (run.path / name).unlink()
    first, second = plan(), plan(micro_batch_size=4)
    first["time"] = {
        "step_seconds": 0.1,
        "total_seconds": 15.0,
        "low_seconds": 7.5,
        "high_seconds": 45.0,
        "terms": {"start": 1.0, "training": 12.0, "evaluation": 1.5, "saving": 0.5},
        "basis": "nominal",
    }
    second["time"] = {
        "step_seconds": 0.2,
        "total_seconds": 28.0,
        "low_seconds": 22.0,
        "high_seconds": 36.0,
        "terms": {"start": 1.0, "training": 24.0, "evaluation": 2.0, "saving": 1.0},
        "basis": "measured",
    }
    assert isinstance(second["memory"], dict)
    second["memory"] = second["memory"] | {"peak_bytes": 1.0e9}
    second["measured"] = {"passes": [{"tokens": 1024}]}
    run.add_plan(first)
    run.add_plan(second)
    lines = (run.path / "events.jsonl").read_text().splitlines()
    told = []
    for line in map(json.loads, lines):
        seconds = {"evaluation": 0.6}.get(line["event"])
        told.append(line | ({"seconds": seconds} if seconds else {}))
        if line["event"] == "evaluation" and line["step"]:
            told.append({"time": line["time"], "event": "checkpoint_saved", "step": line["step"], "seconds": 0.25})
    told[0]["time"], told[-1]["time"] = "2026-01-01T00:00:00Z", "2026-01-01T00:00:30Z"
    for line in told[1:-1]:
        line["time"] = "2026-01-01T00:00:10Z"
    (run.path / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    return run


def test_a_probed_run_is_compared_with_both_plans(tmp_path: Path) -> None:
    run = probed_run(tmp_path / "r")
    text = page(run).text
    for told in (
        "quantity first plan after the probe measured measured / first plan measured / after the probe",
        "peak memory on cpu 1.0 GiB 953.7 MiB 953.7 MiB 0.91 × 1.00 ×",
        "time of one step (median) 0.1 s 0.2 s 0.21 s 2.10 × 1.05 ×",
        "evaluations, 4 in all 1.5 s 2 s 2.4 s 1.60 × 1.20 ×",
        "checkpoints saved, 3 in all 0.5 s 1 s 0.75 s 1.50 × 0.75 ×",
        "time of the whole run 15 s 28 s 30 s 2.00 × 1.07 ×",
        "first predicted from data sheets and common experience",
        "After the probe",
        "It took as long as the last plan held possible.",
    ):
        assert told in text, told
    document = summarise(run.path).to_json()
    (memory, *_) = document["predictions"]
    assert {"name", "unit", "predicted", "probed", "measured"} <= set(memory)
    assert run.report.read_text(encoding="utf-8").count("after the probe") >= 2  # in the table and in the chart


def test_a_run_that_ended_early_is_not_compared_with_the_whole(tmp_path: Path) -> None:
    run = probed_run(tmp_path / "r", updates=100)
    found = {item.name: item for item in summarise(run.path).predictions}
    assert found["time of the whole run"].measured == 30.0
    assert found["time of the whole run"].ratio is None
    assert found["evaluations, 3 in all"].probed_ratio is None
    assert found["time of one step (median)"].ratio is not None
    text = page(run).text
    assert "The run ended before its last planned update, so that totals cannot be compared." in text
    assert "held possible" not in text


def test_seconds_of_an_evaluation_are_no_measure_of_quality(tmp_path: Path) -> None:
    run = probed_run(tmp_path / "r")
    run.update_run(metrics=None)
    assert "seconds" not in {metric.name for metric in summarise(run.path).metrics}


def test_the_data_are_told(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    run.write_json("data_report.json", data_report())
    text = page(run).text
    for told in (
        "5 warning(s) about the data, see Data below.",
        "format question_answer (the rows have 'question' and 'answer') rows 9,600 size 1.2 MiB",
        "tokens 1.2M, 33 % supervised size class medium complexity 0.44 on a scale from 0 to 1",
        "duplicates 120 exact in 40 groups, 31 near in 9 groups",
        "evaluation rows also in training 2 exact, 1 near of 500",
        "median p95 p99 max characters 80 340 510 2,210 answers 1 1 3 12 tokens 110 300 480 1,900",
        "share of tokens supervised 4.0 % 33 % 61 %",
        "scripts latin: 98 %, cyrillic: 1.9 %",
        "roles assistant: 9,700, user: 9,700",
        "diversity distinct 2: 82 %, compression ratio: 31 %",
        "a new one of: depth: 25 %",
        "stop token supervised yes",
        "answer tokens lost 345",
        "byte fallback share 1.2 %",
        "Complexity 0.44",
        "log2 answer chars 7.5 0.56 25 %",
        "sum over the parts",
        "Where is the order?:9 Where is the order?:2 nearly",
        "10 more are in data_report.json",
        "statistics · complexity · score 0.4375",
    ):
        assert told in text, told
    notices = [
        "warning 3 of 9,600 rows have a problem and were left out. The problems are listed below.",
        "warning Rows do not begin with exactly one beginning-of-text token.",
        "warning 12 rows were cut to the longest length that is trained on.",
        "warning 3 evaluation rows are also trained on: the evaluation will flatter.",
        "warning 120 rows repeat. Drop them.",
        "info 31 rows repeat Where is the order? Where is the order?",
    ]
    places = [text.find(notice) for notice in notices]
    assert -1 not in places, notices[places.index(-1)]
    assert places == sorted(places)
    assert text.count("120 rows repeat") == 1


def test_leakage_is_told_once(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    advice = [{"kind": "leakage", "severity": "warning", "finding": "3 of 500 leak", "suggestion": "Take them out."}]
    run.write_json("data_report.json", data_report() | {"advice": advice})
    text = page(run).text
    assert "3 of 500 leak. Take them out." in text
    assert "the evaluation will flatter" not in text


def test_data_without_faults_give_no_notice(tmp_path: Path) -> None:
    run = full_run(tmp_path / "r")
    report = data_report() | {"bad_rows": 0, "advice": [], "problems": []}
    report |= {"supervision": {"bos_once": True, "rows_truncated": 0}, "duplicates": {"exact_rows": 0}}
    run.write_json("data_report.json", report | {"leakage": {"exact_rows": 0, "near_rows": None}})
    text = page(run).text
    assert "about the data" not in text
    assert "duplicates none evaluation rows also in training none" in text


@pytest.mark.parametrize("key", sorted(data_report()))
@pytest.mark.parametrize("odd", [None, 5, "x", [1, {"kind": []}], {"a": [], "b": {"p5": "nan", "p50": None, "p95": 1}}])
def test_the_data_section_takes_what_is_there(tmp_path: Path, key: str, odd: object) -> None:
    run = RunDirectory.create(tmp_path / "r", identity={})
    run.write_json("data_report.json", data_report() | {key: odd})
    assert "Data" in page(run).text
    run.write_json("data_report.json", {name: value for name, value in data_report().items() if name != key})
    assert "Data" in page(run).text
    run.write_json("data_report.json", {})
    assert "Figures" not in page(run).text


def test_hostile_data_reports_stay_text(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", identity={})
    run.write_json("data_report.json", data_report(text=HOSTILE))
    found = page(run)
    assert {"script", "img"} & set(found.tags) == set()
    assert found.loads == []
    assert found.text.count(HOSTILE) > 5


@pytest.mark.parametrize(
    ("base", "tuned", "kind"),
    [
        (3.0, 2.0, "no_interval"),
        (2.0, 2.0, "not_better"),
        (2.0, 3.0, "not_better"),
        (2.0, math.nan, "not_better"),
        (math.inf, 2.0, "better"),
        (None, 2.0, "no_evaluation"),
        (2.0, None, "no_evaluation"),
        (1e9, 1e8, "no_interval"),
    ],
)
def test_losses_without_an_interval_prove_nothing(base: float | None, tuned: float | None, kind: str) -> None:
    assert judge(Evidence(base_loss=base, loss=tuned, rows=64), is_over=True).kind == kind


def interval(low: float, high: float) -> Interval:
    return Interval(value=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("low", "high", "rows", "kind", "words"),
    [
        (-0.3, -0.1, 64, "better", "Better than the base model"),
        (0.1, 0.3, 64, "worse", "Worse than the base model"),
        (-0.3, 0.1, 64, "not_better", "No better than the base model"),
        (0.0, 0.0, 64, "not_better", "includes zero"),
        (-0.3, -0.1, 10, "better", "10 held-out rows with 500 tokens"),
    ],
)
def test_the_interval_decides(low: float, high: float, rows: int, kind: str, words: str) -> None:
    found = judge(Evidence(base_loss=2.0, loss=1.8, rows=rows, tokens=500, interval=interval(low, high)))
    assert found.kind == kind
    assert words in found.text


def test_few_rows_are_too_few_to_tell_and_what_would_do_is_said() -> None:
    found = judge(Evidence(base_loss=3.0, loss=1.0, rows=9, tokens=90))
    assert found.kind == "too_few_rows"
    assert "Too few rows to tell" in found.text
    assert "At least 10 rows are needed" in found.text


@pytest.mark.parametrize(
    ("base", "tuned", "kind"),
    [
        ([None] * 16, ["endless"] * 8 + [None] * 8, "not_better"),
        (["endless"] * 16, ["endless"] * 16, "not_better"),
        ([None] * 16, ["empty"] * 2 + [None] * 14, "not_better"),
        ([None] * 16, ["repeats"] + [None] * 15, "better"),
        (["endless"] * 16, ["repeats"] * 2 + [None] * 14, "better"),
        ([None] * 64, ["repeats"] * 7 + [None] * 57, "better"),
        ([None] * 64, ["repeats"] * 8 + [None] * 56, "not_better"),
    ],
)
def test_flawed_answers_count_whatever_the_loss_says(base: list[Any], tuned: list[Any], kind: str) -> None:
    check = AnswerCheck.of(zip(base, tuned, strict=True))
    found = judge(Evidence(base_loss=3.0, loss=1.0, rows=64, interval=interval(-2.1, -1.9), answers=check))
    assert found.kind == kind
    if check.flawed:
        assert f"of {len(base)})" in found.text


def test_leaked_rows_are_never_called_held_out() -> None:
    found = judge(Evidence(base_loss=None, loss=None, rows=0, leaked=20))
    assert found.kind == "no_evaluation"
    assert "all 20 evaluation rows are also trained on" in found.text
    some = judge(Evidence(base_loss=3.0, loss=1.0, rows=12, leaked=8, interval=interval(-2.1, -1.9)))
    assert "12 held-out rows" in some.text
    assert "8 evaluation rows are also trained on and left out" in some.text
    unknown = judge(Evidence(base_loss=3.0, loss=1.0, rows=12, interval=interval(-2.1, -1.9), is_held_out=False))
    assert "held-out" not in unknown.text


def test_overfitting_is_told_only_when_the_loss_rose_clearly() -> None:
    def note(*losses: float) -> str | None:
        rows = (EvaluationRow(step=step, values={"eval_loss": loss}) for step, loss in enumerate(losses))
        return overfitting_note(tuple(rows))

    assert note(3.0, 1.0, 2.0) is not None
    assert note(3.0, 1.0, 1.001) is None
    assert note(3.0, 2.0, 1.0, math.nan) is None
    assert note(3.0) is None


def test_thinning_keeps_spikes_and_order() -> None:
    values = [1.0] * 50_000
    values[33_333], values[7], values[44_444] = 99.0, -5.0, math.nan
    thinned = thin(Curve(steps=tuple(range(50_000)), values=tuple(values)))
    assert len(thinned.steps) <= 2000
    assert list(thinned.steps) == sorted(set(thinned.steps))
    assert {99.0, -5.0} <= set(thinned.values)
    assert any(math.isnan(value) for value in thinned.values)
