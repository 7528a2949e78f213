"""The bf16 path learns what an fp32 Trainer learns; ``benchmarks/bench_convergence.py`` does the same at length."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
from bench_convergence import LEAST_COSINE, MOST_LOSS, one_seed, require_rows, run, table, verdict
from convergence_cases import Study, rows_of
from convergence_sides import cosine, least_cosine


def study(steps: int, batch: int, heldout: int) -> Study:
    train, others = rows_of("words", steps * batch, heldout)
    return Study(
        model="tiny",
        task="words",
        train=train,
        heldout=others,
        steps=steps,
        batch=batch,
        learning_rate=None,
        threads=1,
        changes={"train.probe": False},
    )


def test_a_few_updates_in_bf16_are_those_of_a_trainer_in_fp32(tmp_path: Path) -> None:
    found = one_seed(study(6, 8, 16), 0, tmp_path)
    assert found["recoveries"] == []
    assert abs(found["deviation"]) <= MOST_LOSS
    assert found["train_loss_deviation"] <= 2 * MOST_LOSS
    assert list(found["cosines"]) == ["1", "6"]
    assert all(step["all"] >= LEAST_COSINE for step in found["cosines"].values())
    # Something was learned, by both, from the same start: else all of this would be easy.
    assert found["loss"] < 0.9 * found["start_loss"]
    assert len(found["train_losses"]) == len(found["reference_train_losses"]) == 6


@pytest.mark.slow
def test_many_updates_of_the_embedded_model(tmp_path: Path) -> None:
    document = run(study(60, 16, 40), range(1), tmp_path)
    print(table(document | {"command": "pytest -m slow tests/test_convergence.py"}))
    assert [seed["recoveries"] for seed in document["seeds"]] == [[]]
    assert document["verdict"]["most_deviation"] <= MOST_LOSS
    assert document["verdict"]["least_cosine"] >= LEAST_COSINE
    assert document["verdict"]["holds"]


# ------------------------------------------------------------------ the comparison itself


def test_cosine_is_that_of_all_weights_together() -> None:
    ours = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0])}
    theirs = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([-4.0])}
    assert cosine(ours, ours) == pytest.approx(1.0)
    assert cosine(ours, theirs) == pytest.approx((9 - 16) / 25)
    assert least_cosine(ours, theirs) == (pytest.approx(-1.0), "b")
    assert cosine({"a": torch.zeros(2)}, {"a": torch.zeros(2)}) == 1.0  # A of an adapter whose B is zero
    assert cosine({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 0.0
    with pytest.raises(SystemExit, match="other weights"):
        cosine(ours, {"a": ours["a"]})


@pytest.mark.parametrize(
    ("deviations", "cosines", "holds"),
    [((0.004, -0.005), (0.999, 1.0), True), ((0.001, -0.006), (1.0, 1.0), False), ((0.0, 0.0), (1.0, 0.9989), False)],
)
def test_the_worst_seed_decides(deviations: tuple[float, ...], cosines: tuple[float, ...], holds: bool) -> None:
    seeds = [{"deviation": d, "cosines": {"1": {"all": c}}} for d, c in zip(deviations, cosines, strict=True)]
    found = verdict(seeds)
    assert found["holds"] is holds
    assert found["most_deviation"] == max(map(abs, deviations))
    assert found["least_cosine"] == min(cosines)


def test_rows_that_differ_are_refused() -> None:
    rows = [{"input_ids": [number, 7, 8], "labels": [-100, 7, 8]} for number in range(4)]
    require_rows([rows[2:], rows[:2], rows[:2]], rows)
    other = {"input_ids": [0, 7, 8], "labels": [-100, -100, 8]}
    with pytest.raises(SystemExit, match="other rows"):
        require_rows([[other, *rows[1:2]], rows[2:]], rows)
    with pytest.raises(SystemExit, match="other rows"):
        require_rows([[rows[0], rows[0]], rows[2:]], rows)
