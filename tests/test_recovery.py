"""What went wrong is recognised by what is said about it; what is done about it ends, and never repeats in vain."""

from __future__ import annotations

import errno
import json
import multiprocessing.process
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from failures import OUT_OF_MEMORY, asked, small_disk
from hypothesis import given, settings
from hypothesis import strategies as st
from machines import request_for

from llmtune.errors import CheckpointError, OutputError, PlanError, Preempted, RecoveryExhausted, TrainingError
from llmtune.planning import Choice, Plan, make_plan
from llmtune.runs import RunDirectory
from llmtune.training.recovery import (
    KINDS,
    Attempt,
    Budgets,
    Failure,
    FailureKind,
    Remedy,
    attempts_of,
    classify,
    is_out_of_memory,
    note_incident,
    note_recovery,
    recovery,
    write_failure,
)
from llmtune.training.recovery.policy import HEALTHY_UPDATES, LADDERS, MOST_ATTEMPTS
from llmtune.training.watchdog import surviving

PLAN = make_plan(request_for())
GIB = 2**30


def plan(**choices: Any) -> Plan:
    return replace(PLAN, **{name: Choice(value, "test", "user") for name, value in choices.items()})


KEEPS_ALL = plan(activation_checkpointing=False, checkpoint_every=0, activation_offload=False)


def failure(kind: FailureKind, step: int = 5, cause: str = "cause", **evidence: Any) -> Failure:
    return Failure(kind=kind, cause=cause, step=step, evidence=evidence, remedy="remedy")


def told(error: BaseException, *, phase: str = "step", **disk: Any) -> Failure:
    return classify(error, step=7, phase=phase, **disk)


# --- what is said about memory, devices, workers and ranks ------------------------------------------------------------

HARDWARE = {
    "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be": "uncorrectable ECC error",
    "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.": "Xid error of the driver",
    "CUDA error: an illegal memory access was encountered": "illegal memory access on the device",
    "CUDA error: unspecified launch failure": "illegal memory access on the device",
    "HIP error: hipErrorIllegalAddress": "illegal memory access on the device",
    "CUDA error: misaligned address": "illegal memory access on the device",
    "NCCL error in: ../ProcessGroupNCCL.cpp:1269, remote process exited or there was a network error, "
    "NCCL version 2.21.5\nncclRemoteError: A call failed possibly due to a network error": "NCCL error",
    "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=42, OpType=ALLREDUCE)": "NCCL error",
    "NCCL communicator was aborted on rank 1.": "NCCL error",
    "Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost. Reboot": "the device was lost",
    "CUDA error: all CUDA-capable device(s) is/are busy or unavailable": "the device was lost",
    "CUDA error: no CUDA-capable device is detected": "the device was lost",
    "CUDA error: unknown error": "the device was lost",
    "CUDA error: the launch timed out and was terminated": "the device was lost",
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)": "the device was lost",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(...)`": "an operation on the device failed",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED": "an operation on the device failed",
}
OTHERS: dict[str, tuple[str, str]] = {
    "DataLoader worker (pid 4711) is killed by signal: Killed. ": ("worker", "a worker of the data loader was killed"),
    "DataLoader worker (pid(s) 12, 13) exited unexpectedly": ("worker", "a worker of the data loader was killed"),
    "DataLoader worker (pid 9) exited unexpectedly with exit code 1. Details are lost due to multiprocessing.": (
        "worker",
        "a worker of the data loader was killed",
    ),
    "DataLoader worker (pid 8) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
    "shared memory. Please try to raise your shared memory limit.": (
        "worker",
        "shared memory of the data loader ran out",
    ),
    "Pin memory thread exited unexpectedly": ("worker", "a worker of the data loader was killed"),
    "received 0 items of ancdata": ("worker", "too many open files"),
    "Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\nx\n"
    "MemoryError: std::bad_alloc": ("worker", "memory ran out in a worker of the data loader"),
    "DataLoader timed out after 60 seconds": ("hung", "the data loader hangs"),
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5": (
        "killed",
        "another rank is gone",
    ),
    "CUDA error: device-side assert triggered": ("defect", "an assertion failed on the device"),
}
NEITHER = [
    "shapes do not match",
    "CUDA error: invalid configuration argument",
    "CUDA error: no kernel image is available for execution on the device",
    "out of resource: shared memory, Required: 132096, Hardware limit: 101376",
    "NCCL error in: x, invalid usage, ncclInvalidUsage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_every_out_of_memory_text(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert told(RuntimeError(text)).kind == "out_of_memory"
    assert told(RuntimeError(text), phase="evaluation").kind == "evaluation_out_of_memory"
    assert not is_out_of_memory(ValueError(text))  # said by somebody else


@pytest.mark.parametrize(("text", "cause"), HARDWARE.items())
def test_every_hardware_text_says_what_to_check(text: str, cause: str) -> None:
    found = told(RuntimeError(text))
    assert (found.kind, found.cause) == ("hardware", cause)
    assert "`" in found.remedy  # a command to look with
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("text", OTHERS)
def test_workers_ranks_and_assertions(text: str) -> None:
    found = told(RuntimeError(text))
    assert (found.kind, found.cause) == OTHERS[text]


@pytest.mark.parametrize("text", NEITHER)
def test_what_resembles_them_is_a_defect(text: str) -> None:
    assert told(RuntimeError(text)).kind == "defect"
    assert not is_out_of_memory(RuntimeError(text))


def raised(call: Callable[[], Any]) -> Exception:
    """What ``call`` really raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever the library raises is the point
        call()
    return caught.value


def test_memory_that_really_runs_out() -> None:
    from torch.nn import functional

    weights = torch.ones(4, 4)
    for call in (
        lambda: torch.empty(10**15),
        lambda: np.ones(10**15),
        lambda: bytearray(2**62),
        lambda: functional.pad(weights, (0, 10**14)),
    ):
        found = told(raised(call))
        assert (found.kind, found.cause) == ("out_of_memory", "memory of the machine ran out")
    device = told(torch.OutOfMemoryError("Allocation on device 0 would exceed allowed memory."))
    assert device.cause == "memory of the device ran out"
    fork = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
    assert told(fork).kind == "out_of_memory"


def test_what_was_asked_for_is_evidence() -> None:
    found = told(torch.OutOfMemoryError(OUT_OF_MEMORY[0]))
    assert found.evidence["tried_to_allocate"] == "2.00 GiB"
    assert (found.evidence["phase"], found.step) == ("step", 7)


def test_an_error_raised_while_another_is_handled_is_told_by_the_first() -> None:
    def both() -> None:
        try:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY[0])
        except RuntimeError:
            raise KeyError("cleaning up")  # noqa: B904  what a clean-up that fails looks like

    assert told(raised(both)).kind == "out_of_memory"


class _Dies(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


class _Asks(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        bytearray(2**62)
        return index


def test_a_worker_that_is_really_killed_or_really_runs_out() -> None:
    def load(data: torch.utils.data.Dataset[int]) -> list[Any]:
        return list(torch.utils.data.DataLoader(data, num_workers=1))

    assert told(raised(lambda: load(_Dies()))).kind == "worker"
    found = told(raised(lambda: load(_Asks())))
    assert (found.kind, found.cause) == ("worker", "memory ran out in a worker of the data loader")


class _Gives(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((16,), index)


def test_a_frozen_worker_whose_connection_ends_before_it_counts_as_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel closes its connections first: torch asks at once whether it lives, and hears that it does."""
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "is_alive", lambda process: True)
    starts: list[Any] = []
    lost: list[str] = []

    def start() -> Iterator[torch.Tensor]:
        starts.append(iter(torch.utils.data.DataLoader(_Gives(), batch_size=2, num_workers=1)))
        return starts[-1]

    items: list[list[int]] = []
    for item in surviving(start, start, lost.append):
        items.append(item[:, 0].tolist())
        if len(items) == 1:
            assert starts[0]._worker_result_queue._reader.poll(30)  # what was sent has to be fetched from the worker
            (worker,) = starts[0]._workers
            os.kill(worker.pid, signal.SIGSTOP)
            threading.Timer(0.2, worker.kill).start()
    assert items == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert len(starts) == 2
    assert lost[0].startswith("a worker of the data loader was killed (")


# --- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_a_full_disk_by_every_library_that_writes(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = {"w": torch.ones(2**20)}
    writers: dict[str, Callable[[Path], Any]] = {
        "torch": lambda path: torch.save(tensors, path),
        "safetensors": lambda path: save_file(tensors, path),
        "python": lambda path: path.write_bytes(bytes(2**22)),
    }
    for name, write in writers.items():
        with small_disk(tmp_path, "1m") as place:
            error = raised(lambda: write(place / name))  # noqa: B023
            found = told(error, phase="save", **asked(place, 2**22))
            assert (found.kind, found.cause) == ("disk", "the disk is full"), (name, error)
            assert (found.evidence["needed_bytes"], found.evidence["mendable"]) == (2**22, True)
            assert found.evidence["free_bytes"] <= 2**20  # safetensors asks for all of it before it writes
            assert "4.0 MiB needed" in found.remedy


@pytest.mark.fault
def test_inodes_that_run_out(tmp_path: Path) -> None:
    with small_disk(tmp_path, "1m", inodes=4) as place:

        def fill() -> None:
            for number in range(9):
                (place / str(number)).touch()

        error = raised(fill)
        assert told(error, **asked(place)).cause == "the file system has no inodes left"


@pytest.mark.parametrize(
    ("number", "cause", "mendable"),
    [
        (errno.ENOSPC, "the disk is full", True),
        (errno.EDQUOT, "the disk quota is reached", True),
        (errno.EIO, "the disk reports an I/O error", True),
        (errno.EROFS, "the file system is read-only", False),
        (errno.ENOENT, "the run directory is gone", False),
        (errno.EACCES, "the run directory may not be written", False),
    ],
)
def test_every_error_of_a_disk(number: int, cause: str, mendable: bool) -> None:
    error = OSError(number, os.strerror(number), "checkpoints/x")
    wrapped = OutputError("cannot write")
    wrapped.__cause__ = error
    for one in (error, wrapped):
        found = told(one, phase="save")
        assert (found.kind, found.cause, found.evidence["mendable"]) == ("disk", cause, mendable)
        action = recovery(found, PLAN, []).action
        assert action == ("free_disk" if mendable else "stop")
        assert recovery(found, PLAN, [Attempt(failure=found, action=action)]).action == "stop"


def test_a_write_that_failed_is_told_by_asking_the_disk() -> None:
    error = RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0")
    assert told(error, phase="save", free_disk_bytes=lambda: 4096).cause == "the disk is full"
    assert told(error, phase="save", free_disk_bytes=lambda: 2**40).cause == "a file was not written"
    assert told(error, phase="save", free_disk_bytes=lambda: GIB, needed_disk_bytes=2 * GIB).cause == "the disk is full"
    assert told(error, phase="save", free_inodes=lambda: 0).cause == "the file system has no inodes left"

    def gone() -> int:
        raise FileNotFoundError(errno.ENOENT, "gone")

    assert told(error, phase="save", free_disk_bytes=gone).kind == "disk"

    def without_memory() -> None:
        try:
            raise RuntimeError("Could not allocate bytes object!")
        finally:
            raise error  # torch.save closes its file whatever happened

    assert told(raised(without_memory), phase="save").kind == "out_of_memory"


def test_a_file_that_is_missing_elsewhere_is_no_fault_of_the_disk() -> None:
    assert told(FileNotFoundError(errno.ENOENT, "no such file", "x"), phase="step").kind == "defect"


def test_a_damaged_file_of_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.ones(8)}, tmp_path / "model.safetensors")
    torch.save({"w": torch.ones(8)}, tmp_path / "optimizer.pt")
    for name, read in (("model.safetensors", load_file), ("optimizer.pt", torch.load)):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:40])
        error = raised(lambda: read(path))  # noqa: B023
        assert told(error, phase="load").kind == "corrupt_checkpoint", error
        assert recovery(told(error, phase="load"), PLAN, []).action == "previous_checkpoint"


# --- what llmtune itself raises, and whose code it was ----------------------------------------------------------------


def test_what_is_raised_on_purpose_keeps_its_meaning() -> None:
    assert told(Preempted("stopped")).kind == "preempted"
    assert told(KeyboardInterrupt()).kind == "preempted"
    assert told(CheckpointError("none of 3 verifies")).kind == "corrupt_checkpoint"
    assert recovery(told(CheckpointError("none of 3 verifies")), PLAN, []).action == "stop"
    refused = told(PlanError("does not fit"))
    assert (refused.kind, refused.cause) == ("refused", "does not fit")
    assert told(TrainingError("stopped")).kind == "refused"
    over = TrainingError("stopped")
    over.__cause__ = torch.OutOfMemoryError(OUT_OF_MEMORY[0])
    assert told(over).kind == "out_of_memory"
    held = failure("spike")
    assert told(RecoveryExhausted(held, "three rollbacks did not help")) is held


def test_code_without_a_traceback_or_outside_a_run_is_nobodys() -> None:
    assert told(ValueError("x")).cause == "ValueError"
    assert told(raised(lambda: [][0])).kind == "defect"  # this file has called nothing of llmtune's


# --- laws -------------------------------------------------------------------------------------------------------------

NEVER_RETRIED: tuple[FailureKind, ...] = ("user_code", "preempted", "refused", "defect")
FAILURES = st.builds(
    Failure,
    kind=st.sampled_from(KINDS),
    cause=st.sampled_from(["one", "another", "third"]),
    step=st.integers(0, 40),
    evidence=st.fixed_dictionaries(
        {},
        optional={
            "rows": st.integers(1, 64),
            "tokens": st.integers(1, 4096),
            "phase": st.sampled_from(["step", "load", "save"]),
            "where": st.sampled_from(["loader", "step"]),
            "mendable": st.booleans(),
        },
    ),
    remedy=st.just("remedy"),
)
PLANS = st.builds(
    plan,
    activation_checkpointing=st.booleans(),
    checkpoint_every=st.integers(0, 4),
    activation_offload=st.booleans(),
)
BUDGETS = st.builds(Budgets, skips=st.integers(0, 20), rollbacks=st.integers(0, 9))


def lived(failures: Iterator[Failure], under: Plan, budgets: Budgets) -> list[tuple[Failure, Remedy]]:
    """What is done about one failure after another, up to the end or the last failure."""
    history: list[Attempt] = []
    done: list[tuple[Failure, Remedy]] = []
    for one in failures:
        remedy = recovery(one, under, history, budgets)
        done.append((one, remedy))
        if remedy.action == "stop":
            break
        history.append(Attempt(failure=one, action=remedy.action))
    return done


@given(kinds=st.lists(FAILURES, min_size=1, max_size=12), under=PLANS, budgets=BUDGETS)
@settings(max_examples=150, deadline=None)
def test_without_progress_it_ends(kinds: list[Failure], under: Plan, budgets: Budgets) -> None:
    first = max(kinds, key=lambda one: one.step)

    def for_ever() -> Iterator[Failure]:
        yield first
        while True:
            yield from kinds

    done = lived(for_ever(), under, budgets)
    assert done[-1][1].action == "stop"
    assert len(done) <= MOST_ATTEMPTS + 1


@given(failures=st.lists(FAILURES, min_size=1, max_size=60), under=PLANS, budgets=BUDGETS)
@settings(max_examples=150, deadline=None)
def test_nothing_is_done_twice_about_the_same(failures: list[Failure], under: Plan, budgets: Budgets) -> None:
    """Without progress, the same remedy with the same changes is not taken again at the same (kind, cause, step)."""
    seen: set[tuple[Any, ...]] = set()
    furthest = -1
    for one, remedy in lived(iter(failures), under, budgets):
        if one.step > furthest:
            seen, furthest = set(), one.step
        changes = json.dumps(dict(remedy.changes), sort_keys=True)
        taken = (one.key, remedy.action, changes)
        if remedy.action not in ("stop", "previous_checkpoint"):
            assert taken not in seen
        seen.add(taken)


@given(history=st.lists(FAILURES, max_size=20), one=FAILURES, under=PLANS)
def test_the_same_facts_give_the_same_answer(history: list[Failure], one: Failure, under: Plan) -> None:
    attempts = [Attempt(failure=past, action="restart") for past in history]
    before = list(attempts)
    first = recovery(one, under, attempts)
    assert recovery(one, under, tuple(attempts)) == first
    assert attempts == before
    assert first.reason


@given(one=FAILURES, under=PLANS, history=st.lists(FAILURES, max_size=5))
def test_what_must_never_happen(one: Failure, under: Plan, history: list[Failure]) -> None:
    remedy = recovery(one, under, [Attempt(failure=past, action="restart") for past in history])
    if one.kind in NEVER_RETRIED:
        assert remedy.action == "stop"
    if one.kind == "hardware":
        assert remedy.action in ("restart", "stop")
        assert remedy.changes["save"] is False
    if one.kind == "evaluation_out_of_memory":
        assert remedy.action in ("smaller_evaluation", "chunk_loss", "stop")
    if one.evidence.get("rows") == 1:
        assert remedy.action not in ("split", "smaller_evaluation")


def test_every_kind_has_a_row_in_the_table() -> None:
    assert set(LADDERS) == set(KINDS)
    assert {kind for kind, ladder in LADDERS.items() if not ladder} == set(NEVER_RETRIED)


def actions(failures: list[Failure], under: Plan = KEEPS_ALL, budgets: Budgets | None = None) -> list[str]:
    return [remedy.action for _, remedy in lived(iter(failures), under, budgets or Budgets())]


def test_memory_pieces_then_activations_then_host_then_stop() -> None:
    sizes = [failure("out_of_memory", rows=rows) for rows in (8, 4, 2, 1, 1, 1)]
    done = lived(iter(sizes), KEEPS_ALL, Budgets())
    assert [remedy.action for _, remedy in done] == [
        *["split"] * 3,
        "checkpoint_activations",
        "offload_activations",
        "stop",
    ]
    assert [remedy.changes for _, remedy in done[:3]] == [{"rows": 4}, {"rows": 2}, {"rows": 1}]
    assert done[3][1].changes == {"activation_checkpointing": True, "checkpoint_every": 1}
    assert "one row alone" in done[-1][1].reason
    recomputes = plan(activation_checkpointing=True, checkpoint_every=1, activation_offload=True)
    assert actions([failure("out_of_memory", rows=1)], recomputes) == ["stop"]
    chunks = [failure("out_of_memory", rows=1, loss_chunk_rows=rows) for rows in (512, 64)]
    assert actions(chunks, recomputes) == ["chunk_loss", "stop"]
    assert actions([failure("out_of_memory", rows=8, phase="load")]) == ["stop"]


def test_pieces_get_smaller_by_tokens_where_passes_of_one_update_differ() -> None:
    passes = [failure("out_of_memory", rows=2, tokens=tokens) for tokens in (128, 64, 66)]
    done = lived(iter(passes), KEEPS_ALL, Budgets())
    assert [remedy.changes for _, remedy in done] == [{"tokens": 64}, {"tokens": 32}, {"tokens": 16}]


def test_memory_that_runs_out_at_every_step_is_progress_each_time() -> None:
    assert set(actions([failure("out_of_memory", step, rows=8) for step in range(200)])) == {"split"}


def test_numbers_are_skipped_then_rolled_back_then_it_stops() -> None:
    every_step = [failure("non_finite", step) for step in range(20)]
    assert actions(every_step) == ["skip_update"] * 10 + ["roll_back"] * 3 + ["stop"]
    assert actions(every_step, budgets=Budgets(skips=2, rollbacks=1)) == ["skip_update"] * 2 + ["roll_back", "stop"]
    far_apart = [failure("non_finite", step * (HEALTHY_UPDATES + 1)) for step in range(30)]
    assert set(actions(far_apart)) == {"skip_update"}


def test_a_spike_is_clipped_then_rolled_back_with_a_lower_rate() -> None:
    done = lived((failure("spike", step) for step in range(10)), PLAN, Budgets(rollbacks=1))
    assert [remedy.action for _, remedy in done] == ["clip"] * 3 + ["roll_back", "stop"]
    assert done[3][1].changes["learning_rate_factor"] < 1


def test_the_rest_of_the_table() -> None:
    assert actions([failure("divergence", step) for step in range(5)]) == ["lower_learning_rate"] * 3 + ["stop"]
    assert actions([failure("worker")] * 3) == ["restart_loader", "restart", "stop"]
    assert actions([failure("hung", where="loader")] * 3) == ["restart_loader", "restart", "stop"]
    assert actions([failure("hung", where="step")] * 2) == ["restart", "stop"]
    assert actions([failure("killed")] * 2) == ["restart", "stop"]
    assert actions([failure("killed", step) for step in (5, 6, 7)]) == ["restart"] * 3  # each time further
    assert actions([failure("hardware")] * 2) == ["restart", "stop"]
    evaluations = [failure("evaluation_out_of_memory", rows=rows, loss_chunk_rows=512) for rows in (4, 2, 1, 1)]
    assert actions(evaluations) == ["smaller_evaluation", "smaller_evaluation", "chunk_loss", "stop"]
    assert actions([failure("evaluation_out_of_memory", rows=1)]) == ["stop"]


# --- the account ------------------------------------------------------------------------------------------------------


def test_what_was_tried_is_read_back_from_the_events(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", identity={})
    first, second = failure("out_of_memory", 3, rows=8, kind_of="x"), failure("spike", 9)
    for one in (first, second):
        remedy = recovery(one, KEEPS_ALL, [])
        note_incident(run, one)
        note_incident(run, one)  # told once, however often it is noted
        note_recovery(run, one, remedy)
    run.event("recovery", 9, action="restart", reason="of another kind of event")
    attempts = attempts_of(run.events())
    assert [(one.failure.key, one.action) for one in attempts] == [(first.key, "split"), (second.key, "clip")]
    assert attempts[0].failure.evidence == {"rows": 8, "kind_of": "x"}
    assert [event["event"] for event in run.events()] == ["incident", "recovery"] * 2 + ["recovery"]


def test_a_failure_report_tells_programs_and_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "t" * 30
    run = RunDirectory.create(tmp_path / "run", identity={})
    error = raised(lambda: torch.empty(10**15))
    error.args = (f"{error} {secret}",)
    found = told(error, free_disk_bytes=lambda: 1)
    past = [Attempt(failure=failure("spike", 3, "loss spike"), action="roll_back")]
    report = write_failure(run, error, found, action="restart", tried=past, checkpoint=run.checkpoints / "checkpoint-6")
    document = json.loads(report.read_text())
    assert report.parent == run.path / "failures"
    assert (document["kind"], document["cause"], document["step"]) == (found.kind, found.cause, 7)
    assert (document["action"], document["tried"]) == ("restart", ["step 3: loss spike, roll back"])
    assert document["resume"] == f"llmtune resume {run.path}"
    assert document["checkpoint"].endswith("checkpoint-6")
    text = (report.parent / document["traceback"]).read_text()
    for told_to_people in (found.cause, found.remedy, "loss spike, roll back", document["resume"], "Traceback"):
        assert told_to_people in text, told_to_people
    assert secret not in text + report.read_text()


def test_recovery_needs_no_torch() -> None:
    code = "import sys, llmtune.training.recovery; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
