"""Runs that are really killed, and what has to be equal afterwards.

Every run is a process of its own, forked from a server that has imported everything and computed nothing: a fork of a
process that has used its threads may hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from tuning import ROWS, evaluations, history, settings, weights

from llmtune import FineTuner
from llmtune.errors import LlmtuneError
from llmtune.runs import RunDirectory

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["cutting", "llmtune.training.train", "llmtune.training.rewind", "peft", "bitsandbytes"])
UPDATES = 20
# One thread: sums are made in one order, and a forked process starts none.
CUT = {"max_steps": UPDATES, "dropout": 0.1, "threads": 1, "evaluate.every_steps": 7, "probe": False, "keep": 2}
MODES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "qlora": {"method": "qlora", "precision": "bf16"},
    "full": {"method": "full"},
}
# 8 rows per update: in one pass, or in three.
ACCUMULATION = {1: {"micro_batch_size": 8}, 3: {"micro_batch_size": 3}}


def matrix_settings(mode: str, packing: bool, passes: int) -> dict[str, Any]:
    """Settings of one cell of the matrix."""
    return CUT | MODES[mode] | ACCUMULATION[passes] | {"packing": packing, "token_budget": 4096}


class KillIn(TrainerCallback):
    """SIGKILLs this process in the middle of an update: its gradients are there, the weights have not moved."""

    def __init__(self, update: int) -> None:
        self.update = update

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.update:
            os.kill(os.getpid(), signal.SIGKILL)


def in_process(work: Callable[..., object], *args: Any, **keywords: Any) -> int:
    """Do ``work`` in a process of its own; returns its exit code, minus the signal where one ended it."""
    process = _SERVER.Process(target=_worked, args=(work, args, keywords))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _worked(work: Callable[..., object], args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    try:
        work(*args, **keywords)
    except LlmtuneError as error:
        sys.exit(error.exit_code)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


def train(model: Path | str, output: Path, *callbacks: Any, kill_in: int | None = None, **changes: Any) -> None:
    """Train ``ROWS``; with ``kill_in`` the process dies in that update."""
    killers = [KillIn(kill_in)] if kill_in else []
    FineTuner(ROWS, callbacks=[*callbacks, *killers], **settings(model, output, **changes)).train()


def resume(output: Path, *callbacks: Any, kill_in: int | None = None, **changes: Any) -> None:
    """Resume a run on ``ROWS``; with ``kill_in`` the process dies in that update."""
    killers = [KillIn(kill_in)] if kill_in else []
    FineTuner.resume(output, ROWS, callbacks=[*callbacks, *killers], **changes)


def cut_and_resumed(model: Path | str, output: Path, k: int, *callbacks: Any, **changes: Any) -> None:
    """A run that saves after update ``k``, dies in the next one, and is resumed to its end."""
    code = in_process(train, model, output, *callbacks, kill_in=k + 1, **changes, **{"save.every_steps": k})
    assert code == -signal.SIGKILL
    assert (output / "checkpoints" / f"checkpoint-{k}").is_dir()
    assert in_process(resume, output, *callbacks) == 0
    started = [event for event in RunDirectory.open(output).events() if event["event"] == "run_started"]
    assert started[-1]["resumed_from"] == f"checkpoints/checkpoint-{k}"


def assert_equal(one: Path, other: Path) -> None:
    """History, evaluations, result, and all that a further resume would read are bitwise equal."""
    import torch

    assert history(one) == history(other)
    assert evaluations(one) == evaluations(other)
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert RunDirectory.open(one).run["metrics"] == RunDirectory.open(other).run["metrics"]
    last = max(step[0] for step in history(one))
    places = [run / "checkpoints" / f"checkpoint-{last}" for run in (one, other)]
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_same(*(torch.load(place / name, weights_only=False) for place in places))


def assert_same(one: Any, other: Any) -> None:
    """Bitwise equality of nested values with tensors and arrays in them."""
    import numpy as np
    import torch

    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, np.ndarray):
        assert np.array_equal(one, other)
    else:
        assert one == other
