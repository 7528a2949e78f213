"""The speed benchmark's own arithmetic and manners, with sides that only pretend to train."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import bench_speed
from bench_speed import Bench, Case, chosen, figures, interpreter, table
from speed_cases import (
    ENVIRONMENTS,
    EOS,
    MODELS,
    OWN,
    PEERS,
    PEERS_DIRECTORY,
    RANK,
    REFERENCE,
    SHAPES,
    SPECIALS,
    TEMPLATE,
    Row,
    make_rows,
    write_rows,
    write_tokenizer,
)
from speed_sides import (
    Expected,
    OutOfMemoryError,
    Protocol,
    Side,
    SideFailedError,
    Ticks,
    compare,
    deviation,
    started,
)

# Speaks as a worker does: loss 2.0, rows of 10 tokens, two per update, of which 8 are learned.
FAKE = """
import json, os, sys, time
seconds, loss, tokens = float(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
print(json.dumps({"ready": True, "versions": {"fake": sys.argv[4]}}), flush=True)
for line in sys.stdin:
    n = json.loads(line)["n"]
    if len(sys.argv) > 5:
        sys.exit(sys.argv[5])
    print(json.dumps({"seconds": n * seconds, "step_seconds": [seconds] * n, "tokens": n * tokens,
        "supervised": 0, "losses": [loss] * n, "peak_bytes": 2**20 * int(tokens / seconds)}), flush=True)
"""
ROWS = [Row(input_ids=list(range(10)), masked=6)] * 200
HOW = Protocol(pairs=3, steps=2, warm=1, others_limit=5.0, checked=2)


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Any]:
    with ExitStack() as stack:

        def start(name: str, *, seconds: float = 1.0, loss: float = 2.0, tokens: int = 20, end: str = "") -> Side:
            words = [str(seconds), str(loss), str(tokens), name, *([end] if end else [])]
            command = [sys.executable, "-S", "-c", FAKE, *words]
            return stack.enter_context(
                started(command, log=tmp_path / f"{name}.txt", env=dict(os.environ), patience=30.0)
            )

        yield start


@pytest.fixture
def calm(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Percent of others in each sample to come; 0 when nothing is left."""
    planned: list[float] = []
    monkeypatch.setattr(Ticks, "others_since", lambda self, before: planned.pop(0) if planned else 0.0)
    return planned


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SHAPES)
def test_lengths_have_the_percentiles_of_their_shape(name: str) -> None:
    shape = SHAPES[name]
    lengths = np.array(shape.lengths(2000))
    assert np.percentile(lengths, 50) == pytest.approx(shape.p50, rel=0.01)
    assert np.percentile(lengths, 95) == pytest.approx(shape.p95, rel=0.02)
    assert lengths.max() <= shape.longest
    assert shape.lengths(2000) == lengths.tolist()


@settings(max_examples=20, deadline=None)
@given(share=st.sampled_from([0.2, 0.45, 1.0]), shape=st.sampled_from(sorted(SHAPES)), count=st.integers(8, 64))
def test_rows_have_the_lengths_and_the_supervised_share(share: float, shape: str, count: int) -> None:
    rows = make_rows(SHAPES[shape], share, 1024, count)
    assert [len(row.input_ids) for row in rows] == SHAPES[shape].lengths(count)
    for row in rows:
        length = len(row.input_ids)
        assert row.input_ids[-1] == EOS
        assert all(0 <= number < 1024 for number in row.input_ids)
        wanted = length - 1 if share == 1.0 else min(max(share * length, 2), length - 3)
        assert abs(row.supervised - wanted) <= 0.5


@pytest.mark.parametrize("share", [0.45, 1.0])
def test_texts_give_the_very_ids_in_the_order_of_training(tmp_path: Path, share: float) -> None:
    from transformers import AutoTokenizer

    from llmtune.data import Part, encode, epoch_order

    write_tokenizer(1024, tmp_path)
    rows = make_rows(SHAPES["alpaca"], share, 1024, 24)
    order = epoch_order((Part(num_rows=24),), 42, 0).tolist()
    ids, texts = write_rows(rows, tmp_path, lambda count: order)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.chat_template == TEMPLATE
    supervise: Any = "all" if share < 1 else "text"
    data = encode(str(texts), tokenizer, cache_dir=tmp_path / "cache", supervise=supervise, vocab_size=1024)
    for row, place, line in zip(rows, order, ids.read_text().splitlines(), strict=True):
        encoded = data[place]
        assert encoded.input_ids.tolist() == row.input_ids == json.loads(line)["input_ids"]
        assert int(encoded.supervised[1:].sum()) == row.supervised


def test_arithmetic_is_that_of_the_formula() -> None:
    model = MODELS["tiny"]
    weights = model.layers * (64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 192)
    adapter = model.layers * RANK * (2 * 128 + 2 * 96 + 3 * 256)
    lengths, supervised = [10, 30], 7
    attention = 6 * 64 * model.layers * (10 * 10 + 30 * 30)
    assert model.flops(lengths, supervised) == pytest.approx(
        40 * (4 * weights + 6 * adapter) + 4 * supervised * 1024 * 64 + attention
    )


# ── manners ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pairs_are_of_the_same_rows_and_the_ratio_is_of_rates(fake: Any, calm: list[float]) -> None:
    found = compare(fake("own", seconds=0.5), fake("peer", seconds=1.5), "trl", ROWS, 2, [2.0, 2.0], HOW)
    assert [pair["ratio"] for pair in found["pairs"]] == [pytest.approx(3.0)] * 3
    assert all(pair["own"]["lengths"] == pair["peer"]["lengths"] == [10] * 4 for pair in found["pairs"])
    assert all(pair["own"]["supervised"] == 16 for pair in found["pairs"])
    assert found["rejected_others_percent"] == []


def test_disturbed_pairs_are_measured_again(fake: Any, calm: list[float]) -> None:
    calm += [0.0, 40.0, 4.0, 4.0]
    found = compare(fake("own"), fake("peer"), "trl", ROWS, 2, [2.0, 2.0], HOW)
    assert len(found["pairs"]) == 3
    assert found["rejected_others_percent"] == [40.0]
    assert max(pair["peer"]["others_percent"] for pair in found["pairs"]) <= HOW.others_limit


def test_nothing_is_said_when_every_pair_is_disturbed(fake: Any, calm: list[float]) -> None:
    calm += [30.0] * 100
    with pytest.raises(SideFailedError, match="other programs took 30 %"):
        compare(fake("own"), fake("peer"), "trl", ROWS, 2, [2.0, 2.0], HOW)
    assert len(calm) == 100 - 2 * 2 * HOW.pairs  # bounded: two tries per pair, two samples each


def test_another_loss_is_not_timed(fake: Any, calm: list[float]) -> None:
    with pytest.raises(SideFailedError, match=r"the loss of trl leaves that of the fp32 Trainer by 5\.00 %"):
        compare(fake("own"), fake("peer", loss=2.1), "trl", ROWS, 2, [2.0, 2.0], HOW)
    assert deviation([2.0, 1.0], [2.0, 1.01]) == pytest.approx(0.01 / 1.01)


def test_cut_rows_are_not_timed(fake: Any, calm: list[float]) -> None:
    with pytest.raises(SideFailedError, match="trl saw 38 tokens in rows that have 40"):
        compare(fake("own"), fake("peer", tokens=19), "trl", ROWS, 2, [2.0, 2.0], HOW)


def test_other_labels_are_noticed() -> None:
    found = {"losses": [1.0], "tokens": 20, "supervised": 9}
    with pytest.raises(SideFailedError, match="learned 9 tokens instead of 8"):
        Expected(ROWS, 2).take("trl", found)


def test_a_side_that_dies_says_why(fake: Any) -> None:
    side = fake("peer", end="ValueError: no kernel for this")
    with pytest.raises(SideFailedError, match="ended with code 1: ValueError: no kernel for this"):
        side.steps(1)


def test_whoever_runs_out_of_memory_gets_fewer_rows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fake: Any, calm: list[float]
) -> None:
    case = Case(model="tiny", shape="chat", supervised=0.45, threads=1, root=tmp_path, work=tmp_path)
    monkeypatch.setattr(Case, "build", lambda self, updates: ROWS)
    bench = Bench(case, HOW, tmp_path, 30.0)
    monkeypatch.setattr(Bench, "_program", lambda self, name: [])
    asked = []

    def start(self: Bench, name: str, most_rows: int = 8) -> Any:
        asked.append((name, most_rows))
        raise OutOfMemoryError("killed")

    monkeypatch.setattr(Bench, "_started", start)
    line = bench.against("trl", [2.0, 2.0])
    assert line["absent"] == "killed"
    assert line["flags"].endswith("more than 1 rows per pass ran out of memory")
    assert len(asked) == 4


def test_a_side_is_stopped_between_its_turns(fake: Any) -> None:
    side = fake("peer")

    def state() -> str:
        return Path(f"/proc/{side.session}/stat").read_text().rpartition(") ")[2][0]

    os.waitid(os.P_PID, side.session, os.WSTOPPED | os.WNOWAIT)
    assert state() == "T"
    side.steps(1)
    os.waitid(os.P_PID, side.session, os.WSTOPPED | os.WNOWAIT)
    assert state() == "T"


def test_what_a_side_takes_is_not_taken_by_others() -> None:
    hertz, cores = os.sysconf("SC_CLK_TCK"), os.cpu_count() or 1
    before, after = Ticks(1000, 100, 10.0), Ticks(1000 + 2 * hertz * cores, 100 + 2 * hertz * cores - hertz, 12.0)
    assert after.others_since(before) == pytest.approx(100 / (2 * cores))
    before, begun = Ticks.now([os.getsid(0)]), time.process_time()
    while time.process_time() - begun < 0.2:
        pass
    assert Ticks.now([os.getsid(0)]).own >= before.own + 0.1 * hertz


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────


def document(fake: Any) -> dict[str, Any]:
    found = compare(fake("own", seconds=0.5), fake("peer", seconds=1.0), "trl", ROWS, 2, [2.0, 2.0], HOW)
    line = {"peer": "trl", "flags": PEERS["trl"].flags, **found}
    line["figures"] = figures(line, MODELS["tiny"], 1e9)
    return {
        "command": "python bench_speed.py",
        "machine": bench_speed.machine(),
        "gemm_flops": [0.9e9, 1e9],
        "case": {"model": "tiny", "shape": "chat", "supervised": 0.45, "threads": 2, "batch": 2},
        "protocol": {key: getattr(HOW, key) for key in Protocol.__slots__},
        "versions": line["figures"]["own"]["versions"],
        "lines": [line, {"peer": "litgpt", "flags": "bf16-true", "absent": "cannot be installed: | no wheel"}],
    }


def test_the_figures_follow_from_the_samples(fake: Any, calm: list[float]) -> None:
    got = document(fake)["lines"][0]["figures"]
    assert got["ratio"] == got["ratio_least"] == got["ratio_most"] == pytest.approx(2.0)
    assert got["own"]["tokens_per_second"] == pytest.approx(40.0)
    assert got["own"]["supervised_per_second"] == pytest.approx(16.0)
    assert got["memory_ratio"] == pytest.approx(2.0)
    assert got["peer"]["mfu"] == pytest.approx(MODELS["tiny"].flops([10] * 4, 16) / 2.0 / 1e9)
    assert got["own"]["loss_deviation"] == 0.0


def test_the_table_has_a_cell_for_every_column_and_json_holds_it_all(fake: Any, calm: list[float]) -> None:
    whole = document(fake)
    assert json.loads(json.dumps(whole))["lines"][0]["pairs"]
    text = table(whole)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4
    assert {row.count("|") for row in rows} == {rows[0].count("|")}
    assert "2.00 × (2.00–2.00)" in rows[2]
    assert "40 : 20" in rows[2]
    assert "cannot be installed: / no wheel" in rows[3]
    assert "- trl: fake peer" in text
    assert f"- {OWN}: fake own" in text


# ── peers ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_peer_has_a_driver_and_an_environment_and_drivers_know_nothing_of_llmtune() -> None:
    for peer in PEERS.values():
        text = (PEERS_DIRECTORY / peer.driver).read_text(encoding="utf-8")
        if peer.environment == OWN:
            assert "FineTuner(" in text
        else:
            assert peer.environment in ENVIRONMENTS
            assert "llmtune" not in text.replace("llmtune_run", "")
    assert all("==" in each for pins in ENVIRONMENTS.values() for each in pins.requirements + pins.alone)
    assert REFERENCE in PEERS
    assert len(SPECIALS) == 5


def test_a_peer_that_is_not_there_says_why(tmp_path: Path) -> None:
    with pytest.raises(SideFailedError, match=r"not prepared: bench_speed\.py --prepare hf"):
        interpreter(tmp_path, "hf")
    (tmp_path / "hf.json").write_text(json.dumps({"failed": "ERROR: no wheel"}))
    with pytest.raises(SideFailedError, match="cannot be installed: ERROR: no wheel"):
        interpreter(tmp_path, "hf")


def test_unknown_peers_are_refused() -> None:
    assert chosen("", ["a", "b"]) == ["a", "b"]
    assert chosen("b", ["a", "b"]) == ["b"]
    with pytest.raises(SystemExit, match="unknown: c; known: a, b"):
        chosen("a,c", ["a", "b"])
