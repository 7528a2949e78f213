"""Memory that runs out inside an update changes how the update is cut, and nothing else."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import save_family_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from shortages import Ledger, RunsOut, changed_models
from transformers.modeling_layers import GradientCheckpointingLayer
from tuning import ROWS, evaluations, events, losses, tune, weights

from llmtune import Plan
from llmtune.data import Encoded, collate, collate_packed
from llmtune.errors import RecoveryExhausted
from llmtune.runs import RunDirectory
from llmtune.training import memory_guard
from llmtune.training.memory_guard import FRESH_SECONDS, MemoryGuard, OutOfMemoryError, bytes_left
from llmtune.training.meter import is_out_of_memory
from llmtune.training.recovery.policy import SMALL_LOSS_CHUNK
from llmtune.training.shortage import cut, random_states
from llmtune.training.updates import UpdateCollator

MIB = 2**20
STEPS = 4
# Adam makes steps of the same size from gradients of any size, so that their rounding is seen in the weights as a share
# of the learning rate.
HOW: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-4, "probe": False, "evaluate.every_steps": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, so that one lies in the middle."""
    directory = tmp_path_factory.mktemp("model") / "TinyLlama-three"
    return save_family_model("llama", directory, num_hidden_layers=3)


@pytest.fixture(scope="module")
def unharmed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Ledger]]:
    """``unharmed(**how)``: the same run without the fault, made once, and what it computed."""
    made: dict[str, tuple[Path, Ledger]] = {}

    def run(**how: Any) -> tuple[Path, Ledger]:
        key = json.dumps(how, sort_keys=True)
        if key not in made:
            ledger, path = Ledger(), tmp_path_factory.mktemp("unharmed") / "run"
            with changed_models(ledger):
                tune(model, path, callbacks=[ledger], **HOW | how)
            made[key] = path, ledger
        return made[key]

    return run


def harmed(model: Path, path: Path, fault: RunsOut, **how: Any) -> Ledger:
    """A run with the fault."""
    ledger = Ledger()
    with changed_models(ledger, fault):
        assert tune(model, path, callbacks=[ledger, fault], **HOW | how).status == "finished"
    return ledger


def drift(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def plans_of(run_dir: Path) -> list[Plan]:
    run = RunDirectory.open(run_dir)
    return [Plan.from_json(run.read_json(path.name)) for path in run.plans]


def require_same_course(run: Path, ledger: Ledger, reference: tuple[Path, Ledger]) -> None:
    """As many updates of the same rows in the same order, and the same weights."""
    path, expected = reference
    assert [sorted(rows) for rows in ledger.updates] == [sorted(rows) for rows in expected.updates]
    assert len(ledger.updates) == STEPS
    assert [step["global_batch_size"] for step in events(run, "step")] == [8, 8, 7, 8]
    assert [step["num_supervised_tokens"] for step in events(run, "step")] == [
        step["num_supervised_tokens"] for step in events(path, "step")
    ]
    assert np.abs(np.subtract(losses(run), losses(path))).max() < 2e-6  # the last bit of a loss of 8
    assert drift(run, path) < 1e-6


# --- what goes on as if nothing had happened --------------------------------------------------------------------------


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_it_may_run_out_at_any_step(model: Path, tmp_path: Path, unharmed: Any, step: int) -> None:
    fault = RunsOut(once_at_step=step)
    ledger = harmed(model, tmp_path / "run", fault)
    require_same_course(tmp_path / "run", ledger, unharmed())
    assert fault.raised == 1
    (incident,), (recovery,) = events(tmp_path / "run", "incident"), events(tmp_path / "run", "recovery")
    assert (incident["kind"], incident["step"], recovery["action"]) == ("out_of_memory", step - 1, "split")


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    "how",
    [{}, {"packing": True}, {"method": "full"}, {"micro_batch_size": 4}],
    ids=["padded", "packed", "full", "four"],
)
def test_it_may_run_out_whenever_a_pass_has_more_rows(
    model: Path, tmp_path: Path, unharmed: Any, rows: int, how: dict[str, Any]
) -> None:
    fault = RunsOut(above_rows=rows)
    ledger = harmed(model, tmp_path / "run", fault, **how)
    reference = unharmed(**how)
    if how.get("method") == "full":  # Adam makes of a gradient that is all but zero a step of full size
        assert [sorted(seen) for seen in ledger.updates] == [sorted(seen) for seen in reference[1].updates]
        difference = float(torch.linalg.vector_norm(ledger.gradients[0] - reference[1].gradients[0]))
        assert difference < 1e-5 * float(torch.linalg.vector_norm(reference[1].gradients[0]))
    else:
        require_same_course(tmp_path / "run", ledger, reference)
    assert fault.raised > 0
    before, *_, plan = plans_of(tmp_path / "run")
    assert plan.token_budget.value < before.token_budget.value
    assert plan.token_budget.source == "measured"
    assert plan.global_batch_size == before.global_batch_size
    assert events(tmp_path / "run", "plan")[-1]["file"] == RunDirectory.open(tmp_path / "run").plans[-1].name
    assert max(step["micro_batch_size"] for step in events(tmp_path / "run", "step")) <= 8


def test_the_size_that_fits_is_remembered(model: Path, tmp_path: Path) -> None:
    fault = RunsOut(above_tokens=150)
    harmed(model, tmp_path / "run", fault)
    assert {event["step"] for event in events(tmp_path / "run", "incident")} == {0}  # the first update, no other
    assert fault.raised == len(events(tmp_path / "run", "incident")) <= 3
    assert plans_of(tmp_path / "run")[-1].token_budget.value <= 150


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow)])
def test_updates_that_workers_have_collated_are_cut_too(
    model: Path, tmp_path: Path, unharmed: Any, workers: int
) -> None:
    fault = RunsOut(above_tokens=150)
    ledger = harmed(model, tmp_path / "run", fault, num_workers=workers)
    require_same_course(tmp_path / "run", ledger, unharmed())
    assert {event["step"] for event in events(tmp_path / "run", "incident")} == {0}


def test_dice_fall_again_as_they_fell(model: Path, tmp_path: Path, unharmed: Any) -> None:
    """With one row in a pass nothing is cut: the replay recomputes activations, and draws the same dropout."""
    how = {"dropout": 0.3, "micro_batch_size": 1}
    ledger = harmed(model, tmp_path / "run", RunsOut(once_at_step=2, after_passes=3), **how)
    require_same_course(tmp_path / "run", ledger, unharmed(**how))
    (recovery,) = events(tmp_path / "run", "recovery")
    assert recovery["action"] == "checkpoint_activations"
    assert plans_of(tmp_path / "run")[-1].checkpoint_every.value == 1


# --- what is done when one row is too much ----------------------------------------------------------------------------


def test_activations_are_recomputed_when_one_row_is_too_much(model: Path, tmp_path: Path, unharmed: Any) -> None:
    fault = RunsOut(above_rows=0, unless_recomputed=True)
    ledger = harmed(model, tmp_path / "run", fault)
    require_same_course(tmp_path / "run", ledger, unharmed())
    actions = [event["action"] for event in events(tmp_path / "run", "recovery")]
    assert actions[-1] == "checkpoint_activations"
    assert set(actions[:-1]) == {"split"}
    plan = plans_of(tmp_path / "run")[-1]
    assert (plan.activation_checkpointing.value, plan.activation_checkpointing.source) == (True, "measured")


def test_fewer_logits_are_there_at_once_when_even_that_is_too_much(model: Path, tmp_path: Path, unharmed: Any) -> None:
    fault = RunsOut(above_rows=0, unless_chunked=SMALL_LOSS_CHUNK)
    ledger = harmed(model, tmp_path / "run", fault)
    require_same_course(tmp_path / "run", ledger, unharmed())
    told = [event for event in events(tmp_path / "run", "recovery") if event["action"] == "chunk_loss"]
    assert [event["loss_chunk_rows"] for event in told] == [SMALL_LOSS_CHUNK]


def test_one_row_that_fits_by_no_means_is_named(model: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    fault = RunsOut(above_tokens=40)
    with pytest.raises(RecoveryExhausted, match=r"rows\.jsonl line \d+, \d\d tokens") as stopped:
        harmed(model, tmp_path / "run", fault, data=str(data))
    assert stopped.value.exit_code == 5
    row = int(str(stopped.value).split("line ")[1].split(",")[0])
    assert len(ROWS[row - 1]["answer"]) == max(len(one["answer"]) for one in ROWS if one["answer"].count("keeps") == 4)
    run = RunDirectory.open(tmp_path / "run")
    assert run.run["status"] == "failed"
    assert events(run.path, "step") == []
    assert len(list((run.path / "failures").glob("*.json"))) == 1


# --- what other errors do ---------------------------------------------------------------------------------------------


def test_another_error_is_not_taken_for_a_shortage(model: Path, tmp_path: Path) -> None:
    fault = RunsOut(above_rows=0, error=RuntimeError("shapes do not match"))
    with pytest.raises(Exception, match="shapes do not match"):
        harmed(model, tmp_path / "run", fault)
    assert fault.raised == 1
    assert events(tmp_path / "run", "recovery") == []


def test_a_skipped_update_makes_no_pass_and_moves_no_weight(
    model: Path, tmp_path: Path, unharmed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtune.training.trainer import UpdateTrainer

    real = UpdateTrainer.training_step

    def step(self: UpdateTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        self.skipped.add(1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(UpdateTrainer, "training_step", step)
    ledger = Ledger()
    with changed_models(ledger):
        tune(model, tmp_path / "run", callbacks=[ledger], **HOW)
    _, expected = unharmed()
    assert [len(rows) for rows in ledger.updates] == [8, 0, 7, 8]
    assert [sorted(ledger.updates[i]) for i in (0, 2, 3)] == [sorted(expected.updates[i]) for i in (0, 2, 3)]
    assert ledger.gradients[1] is None
    assert torch.equal(ledger.weights[1], ledger.weights[2])
    assert [step["global_batch_size"] for step in events(tmp_path / "run", "step")] == [8, 8, 7, 8]


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_evaluation_has_its_own_size(model: Path, tmp_path: Path, unharmed: Any) -> None:
    fault = RunsOut(above_rows=1, in_evaluation=True)
    harmed(model, tmp_path / "run", fault)
    path, _ = unharmed()
    for step, loss in evaluations(path).items():
        assert evaluations(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)
    assert drift(tmp_path / "run", path) == 0  # updates are cut as they were
    assert {event["action"] for event in events(tmp_path / "run", "recovery")} == {"smaller_evaluation"}
    assert {event["step"] for event in events(tmp_path / "run", "incident")} == {0}
    assert len(plans_of(tmp_path / "run")) == 1


def test_an_evaluation_of_one_row_has_fewer_logits_at_once(model: Path, tmp_path: Path, unharmed: Any) -> None:
    fault = RunsOut(above_rows=0, unless_chunked=SMALL_LOSS_CHUNK, in_evaluation=True)
    harmed(model, tmp_path / "run", fault)
    path, _ = unharmed()
    for step, loss in evaluations(path).items():
        assert evaluations(tmp_path / "run")[step] == pytest.approx(loss, abs=1e-5)
    assert drift(tmp_path / "run", path) < 1e-6
    told = [event for event in events(tmp_path / "run", "recovery") if event["action"] == "chunk_loss"]
    assert [event["loss_chunk_rows"] for event in told] == [SMALL_LOSS_CHUNK]


def test_answers_have_their_own_size(model: Path, tmp_path: Path) -> None:
    """Three prompts at once, then one; the answers are the same, and a metric sees them all."""

    def answered(run: Path) -> list[tuple[str, str, str]]:
        return [(event["prompt"], event["base"], event["tuned"]) for event in events(run, "sample")]

    seen: list[int] = []
    how: dict[str, Any] = {"num_samples": 3, "evaluate.max_new_tokens": 4, "max_steps": 2}
    how |= {"metrics": {"count": lambda answers, references: seen.append(len(answers)) or 1.0}}
    tune(model, tmp_path / "whole", **how)
    asked = list(seen)
    fault = RunsOut(above_rows=1, in_evaluation=True)
    with changed_models(fault):
        tune(model, tmp_path / "run", callbacks=[fault], **how)
    assert answered(tmp_path / "run") == answered(tmp_path / "whole")
    assert seen == asked * 2
    told = [event for event in events(tmp_path / "run", "recovery") if "prompts_at_once" in event]
    assert [event["prompts_at_once"] for event in told] == [1]


# --- cutting: pure ----------------------------------------------------------------------------------------------------


def random_rows(lengths: list[int]) -> list[Encoded]:
    rng = np.random.default_rng(sum(lengths))
    return [Encoded(input_ids=rng.integers(3, 90, n, dtype=np.int32), supervised=rng.random(n) < 0.7) for n in lengths]


@hypothesis_settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    limit=st.integers(1, 20).map(lambda n: 8 * n),
    multiple=st.sampled_from([1, 8, 64]),
    packing=st.booleans(),
)
def test_pieces_are_the_rows_put_together_anew(lengths: list[int], limit: int, multiple: int, packing: bool) -> None:
    rows = random_rows(lengths)
    collator = UpdateCollator(pad_token_id=0, token_budget=400, max_rows=64, packing=packing, pad_multiple=multiple)
    update = collator([(row, 100 + number) for number, row in enumerate(rows)])
    pieces = cut(update, limit, pad_token_id=0, pad_multiple=multiple)
    assert [row for piece in pieces.rows for row in piece] == [row for batch in update.rows for row in batch]
    assert sorted(row for piece in pieces.rows for row in piece) == [100 + number for number in range(len(rows))]
    put_together = collate_packed if packing else collate
    for batch, numbers in zip(pieces.micro_batches, pieces.rows, strict=True):
        assert batch["input_ids"].numel() <= limit or len(numbers) == 1
        if batch["input_ids"].numel() <= limit and any(batch is whole for whole in update.micro_batches):
            continue  # it was small enough
        expected = put_together([rows[number - 100] for number in numbers], 0, pad_multiple=multiple)
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], tensor) for name, tensor in expected.items())
    assert pieces.max_rows == max(len(numbers) for numbers in pieces.rows)
    same = ("num_rows", "num_tokens", "num_supervised_tokens")
    assert [getattr(pieces, name) for name in same] == [getattr(update, name) for name in same]


def test_all_dice_are_put_back() -> None:
    restore = random_states(torch.device("cpu"))
    first = random.random(), np.random.rand(), float(torch.rand(()))
    restore()
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == first


# --- the guard --------------------------------------------------------------------------------------------------------


class Layers(torch.nn.Module):
    """Holds so many bytes for every token of a pass."""

    def __init__(self, bytes_per_token: int) -> None:
        super().__init__()
        self.bytes_per_token = bytes_per_token

    def forward(self, tokens: int) -> None:
        held = bytearray(b"x") * (tokens * self.bytes_per_token)
        del held


def test_a_pass_that_is_known_not_to_fit_is_not_begun() -> None:
    left, layers = [2000 * MIB], Layers(MIB)
    guard = MemoryGuard(layers, lambda: left[0])
    with guard.passing(200):
        layers(200)
    with guard.passing(200):  # it fitted, and goes on to fit
        layers(200)
    assert guard._reserve is not None
    left[0] = guard._reserve + 100 * MIB
    guard._asked_at -= FRESH_SECONDS
    with pytest.raises(OutOfMemoryError, match="a pass of 200 tokens takes") as error, guard.passing(200):
        pytest.fail("it was begun")
    assert is_out_of_memory(error.value)
    with guard.passing(50):  # a quarter of it does
        layers(50)


class Growing(GradientCheckpointingLayer):
    """A layer after which so many bytes more are resident."""

    def __init__(self, resident: list[int], growth: int) -> None:
        super().__init__()
        self.resident, self.growth = resident, growth

    def forward(self) -> None:
        self.resident[0] += self.growth


@pytest.mark.parametrize(("unused", "goes_on"), [(150, True), (50, False)])
def test_what_the_heap_does_not_use_is_given_back_before_a_pass_is_broken_off(
    monkeypatch: pytest.MonkeyPatch, unused: int, goes_on: bool
) -> None:
    resident, held, limit = [1000 * MIB], [unused * MIB], 1200 * MIB

    def trim() -> None:
        resident[0] -= held.pop() if held else 0

    monkeypatch.setattr(memory_guard, "resident_bytes", lambda: resident[0])
    monkeypatch.setattr(memory_guard, "trim_heap", trim)
    layer = Growing(resident, 90 * MIB)
    guard = MemoryGuard(layer, lambda: limit - resident[0])
    with guard.watching(), nullcontext() if goes_on else pytest.raises(OutOfMemoryError, match=r"90\.0 MiB"):
        layer()
        layer()  # a third such step would not fit
    assert resident[0] == (1180 - unused) * MIB


def test_what_is_left_is_known_here() -> None:
    left = bytes_left()
    assert left is None or 0 < left < 2**50


# --- ranks ------------------------------------------------------------------------------------------------------------

TWO_RANKS = """
import atexit, json, os, pathlib, sys
import torch
from shortages import Ledger, RunsOut, changed_models
from tuning import ROWS, tune

@atexit.register  # what is registered first is called last
def tell():
    threads = [pathlib.Path(task, "comm").read_text() for task in pathlib.Path("/proc/self/task").glob("*")]
    print(json.dumps(told | {"talking": sum("gloo" in name for name in threads)}), flush=True)

model, output, fails = sys.argv[1:]
rank = int(os.environ["RANK"])
fault = RunsOut(above_rows=2) if fails == "yes" and rank == 1 else RunsOut()
with changed_models(fault):
    tune(model, pathlib.Path(output), max_steps=4, learning_rate=1e-4, probe=False, device="cpu",
         callbacks=[fault], **{"evaluate.every_steps": 4, "num_workers": 0})
told = {"rank": rank, "raised": fault.raised, "passes": fault.passes}
"""


def two_ranks(model: Path, output: Path, *, fails: bool) -> list[dict[str, Any]]:
    script = output.parent / "two.py"
    script.write_text(TWO_RANKS)
    tests = Path(__file__).parent
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests.parent}"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        environment.pop(name, None)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    how = [str(model), str(output), "yes" if fails else "no"]
    done = subprocess.run([*launch, *how], capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"rank"')]
    assert [one["talking"] for one in told] == [0, 0]  # a thread of gloo's would abort a rank that is done
    return sorted(told, key=lambda one: int(one["rank"]))


@pytest.mark.slow
def test_when_one_rank_runs_out_all_do_the_update_again(model: Path, tmp_path: Path, unharmed: Any) -> None:
    whole = two_ranks(model, tmp_path / "whole", fails=False)
    short = two_ranks(model, tmp_path / "short", fails=True)
    assert [one["raised"] for one in whole] == [0, 0]
    assert short[0]["raised"] == 0
    assert short[1]["raised"] > 0
    assert short[0]["passes"] > whole[0]["passes"]  # rank 0 had room, and went along
    assert drift(tmp_path / "whole", tmp_path / "short") < 1e-6
    assert np.abs(np.subtract(losses(tmp_path / "whole"), losses(tmp_path / "short"))).max() < 1e-6
    assert np.abs(np.subtract(losses(tmp_path / "whole"), losses(unharmed()[0]))).max() < 1e-5
    incidents = events(tmp_path / "short", "incident")
    assert len(incidents) == short[1]["raised"]  # told once, by the main process
    assert {incident["rank"] for incident in incidents} == {1}
