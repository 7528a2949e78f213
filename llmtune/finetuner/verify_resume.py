"""Proof on the user's own configuration: train, kill, resume, and compare with a run that nothing has interrupted.

Both runs are processes of their own. One of them kills itself with SIGKILL right after a save, and a third process
resumes it. Compared is what they leave on disk.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig, load_config
from llmtune.console import speaker
from llmtune.errors import ConfigError, TrainingError
from llmtune.planning import Plan
from llmtune.runs import RunDirectory

# Of the plan's choices those that are taken again, so that a machine that is busier now does not plan another run.
PINNED = {
    "method": "train.method",
    "precision": "train.precision",
    "global_batch_size": "train.global_batch_size",
    "micro_batch_size": "train.micro_batch_size",
    "token_budget": "train.token_budget",
    "packing": "train.packing",
    "activation_checkpointing": "train.activation_checkpointing",
    "activation_offload": "train.activation_offload",
    "optimizer": "train.optimizer",
    "compile": "train.compile",
    "num_workers": "train.num_workers",
    "threads": "train.threads",
    "model": "model.id",
}
# What a step's line says beside the mathematics.
MEASURED = frozenset({"time", "tokens_per_second", "step_seconds", "memory_bytes", "seconds"})
# Of a trainer state: where the checkpoint lay.
PLACES = frozenset({"best_model_checkpoint"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Whether a resumed run ended as the uninterrupted one.

    Attributes:
        steps: Updates of both runs.
        at: Update after whose save one of them was killed.
        compared: What was compared, in order; each with how many parts of it were equal.
        difference: The first difference in words; None where there is none.
    """

    steps: int
    at: int
    compared: Mapping[str, int]
    difference: str | None

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.difference is None

    def to_json(self) -> dict[str, Any]:
        """The document of ``verify-resume --json``."""
        return {
            "equal": self.equal,
            "steps": self.steps,
            "at": self.at,
            "compared": dict(self.compared),
            "difference": self.difference,
        }


def verify_resume(config: RunConfig, *, steps: int, at: int) -> Comparison:
    """Train ``steps`` updates of ``config`` twice, one of them killed after the save of update ``at`` and resumed.

    Raises:
        ConfigError: ``at`` is not a step before the last.
        TrainingError: One of the runs did not end; its own message is shown.
    """
    if not 0 < at < steps:
        raise ConfigError("--at", [f"got {at}, expected a step from 1 to {steps - 1}, before the last of --steps"])
    place = Path(config.output.dir or config.output.root).absolute()
    parent = next(path for path in (place, *place.parents) if path.is_dir())
    with tempfile.TemporaryDirectory(prefix=".verify-resume-", dir=parent) as scratch:
        whole, cut = Path(scratch, "whole"), Path(scratch, "cut")
        wanted = _tamed(config, steps=steps, at=at)
        _train(_into(wanted, whole))
        speaker.say(f"{steps} updates without interruption: done")
        _train(_into(_pinned(wanted, whole), cut), kill_at=at)
        speaker.say(f"killed with SIGKILL after the save of update {at}")
        _train(wanted, resume=cut)
        speaker.say("resumed, and trained to the end")
        return compare(whole, cut, steps=steps, at=at)


def _tamed(config: RunConfig, *, steps: int, at: int) -> RunConfig:
    """The user's configuration, as long as asked for, saving at ``at`` and at the end, without what is only shown."""
    train = config.train.model_copy(update={"max_steps": steps, "probe": False})
    changes = {
        "train": train,
        "evaluate": config.evaluate.model_copy(update={"num_samples": 0}),
        "save": config.save.model_copy(update={"every_steps": at}),
        "recover": config.recover.model_copy(update={"resume": "auto", "restarts": 0}),
        "monitor": config.monitor.model_copy(update={"report": False, "report_to": ()}),
    }
    return config.model_copy(update=changes)


def _pinned(config: RunConfig, run_dir: Path) -> RunConfig:
    """``config`` with what the plan of ``run_dir`` chose by the state of the machine."""
    document = RunDirectory.open(run_dir).latest_plan()
    assert document is not None
    plan, settings = Plan.from_json(document), config.to_json()
    for choice, key in PINNED.items():
        group, leaf = key.split(".")
        settings[group][leaf] = getattr(plan, choice).value
    if plan.activation_checkpointing.value:
        settings["train"]["checkpoint_every"] = plan.checkpoint_every.value
    pinned = load_config(settings, environ={}, where="the uninterrupted run")
    return pinned.model_copy(update={"model": pinned.model.model_copy(update={"token": config.model.token})})


def _into(config: RunConfig, directory: Path) -> RunConfig:
    output = config.output.model_copy(update={"dir": str(directory), "root": str(directory.parent)})
    return config.model_copy(update={"output": output})


# ---------------------------------------------------------------------------------------------------- processes


def _train(config: RunConfig, *, resume: Path | None = None, kill_at: int | None = None) -> None:
    """Train ``config``, or resume a run of it, in a process of its own."""
    order = {"config": config.to_json()} if resume is None else {"resume": str(resume)}
    environment = {name: value for name, value in os.environ.items() if name != "LLMTUNE_STORE"}
    if config.model.token is not None:  # never by a file or an argument
        environment["HF_TOKEN"] = config.model.token.get_secret_value()
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(order | {"kill_at": kill_at}),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment,
    )
    expected = 0 if kill_at is None else -signal.SIGKILL
    if done.returncode != expected:
        last = "\n".join(done.stderr.strip().splitlines()[-15:])
        raise TrainingError(f"a run ended with code {done.returncode}, expected {expected}: {last}")


def _child() -> int:
    """One run, as told on stdin."""
    from llmtune.errors import LlmtuneError
    from llmtune.finetuner.facade import FineTuner

    order = json.load(sys.stdin)
    speaker.quiet = True
    try:
        if "resume" in order:
            FineTuner.resume(order["resume"])
        else:
            config = load_config(order["config"], environ={}, where="verify-resume")
            callbacks = [_killer(order["kill_at"])] if order["kill_at"] else []
            FineTuner(config=config, callbacks=callbacks).train()
    except LlmtuneError as error:
        speaker.error(f"{type(error).__name__}: {error}")
        return error.exit_code
    return 0


def _killer(step: int) -> Any:
    from transformers import TrainerCallback

    class KillAfterSave(TrainerCallback):
        """Ends this process as the kernel would, without a last word."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:  # its save is committed, whether it was written at once or in the background
                while not Path(args.output_dir, f"checkpoint-{step}").is_dir():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)

    return KillAfterSave()


# ---------------------------------------------------------------------------------------------------- comparison


def compare(whole: Path, cut: Path, *, steps: int, at: int) -> Comparison:
    """Compare what two runs left on disk, bit for bit; the first difference ends it."""
    compared: dict[str, int] = {}
    for what, parts in _parts(whole, cut, steps, at):
        compared[what] = 0
        for name, first, second in parts:
            difference = _difference(first, second)
            if difference is not None:
                return Comparison(steps=steps, at=at, compared=compared, difference=f"{what}, {name}: {difference}")
            compared[what] += 1
    return Comparison(steps=steps, at=at, compared=compared, difference=None)


def _parts(whole: Path, cut: Path, steps: int, at: int) -> Iterator[tuple[str, Iterator[tuple[str, Any, Any]]]]:
    """What is compared, from what explains most to what is affected by all: name, and its parts in pairs."""
    runs = RunDirectory.open(whole), RunDirectory.open(cut)
    resumed = [event.get("resumed_from") for event in runs[1].events() if event["event"] == "run_started"]
    yield "resumed from", iter([("checkpoint", f"checkpoints/checkpoint-{at}", resumed[-1])])
    plans = [{name: choice.value for name, choice in Plan.from_json(run.latest_plan() or {}).choices()} for run in runs]
    yield "plan", _pairs(*plans)
    yield "history", _pairs(*(_by_step(run.steps()) for run in runs))
    yield "evaluations", _pairs(*(_by_step(run.evaluations()) for run in runs))
    folders = [run.checkpoints / f"checkpoint-{steps}" for run in runs]
    files = {str(path.relative_to(folder)) for folder in folders for path in folder.rglob("*") if path.is_file()}
    for name in sorted(files):
        if name == "manifest.json":
            continue  # hashes of all the rest
        yield _called(name), _pairs(*(_content(folder / name) for folder in folders))
    finals = [run.final or run.path for run in runs]
    for name in sorted({path.name for final in finals for path in final.glob("*.safetensors")}):
        yield f"result {name}", _pairs(*(_content(final / name) for final in finals))


def _called(name: str) -> str:
    kinds = {
        ".safetensors": "weights",
        "optimizer": "optimizer",
        "scheduler": "schedule",
        "rng_state": "random states",
        "trainer_state": "cursor and history",
    }
    kind = next((kind for mark, kind in kinds.items() if mark in name), "file")
    return f"{kind} {name}"


def _by_step(events: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        f"step {event['step']}, {name}": value
        for event in events
        for name, value in event.items()
        if name not in MEASURED
    }


def _content(path: Path) -> dict[str, Any]:
    """A file as named values: tensors, numbers of a trainer state, or its bytes."""
    if not path.is_file():
        return {}
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        tensors: dict[str, Any] = load_file(path)
        return tensors
    if path.name == "trainer_state.json":
        return dict(_flat(json.loads(path.read_text(encoding="utf-8"))))
    if path.suffix in (".pt", ".pth"):
        import torch
        from transformers.trainer_pt_utils import safe_globals

        with safe_globals():
            return dict(_flat(torch.load(path, map_location="cpu", weights_only=True)))
    return {"bytes": path.read_bytes()}


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in PLACES:
                yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{number}]")
    else:
        yield name, value


def _pairs(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    for name in [*first, *(name for name in second if name not in first)]:
        yield name, first.get(name, "missing"), second.get(name, "missing")


def _difference(first: Any, second: Any) -> str | None:
    """How two values differ, bit for bit; None where they are equal."""
    import numpy as np
    import torch

    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        if first.shape != second.shape or first.dtype != second.dtype:
            return f"{first.dtype} {list(first.shape)} became {second.dtype} {list(second.shape)}"
        if torch.equal(first.flatten().view(torch.uint8), second.flatten().view(torch.uint8)):
            return None
        apart = (first.double() - second.double()).abs()
        return f"{int((apart != 0).sum())} of {apart.numel()} numbers differ, by up to {float(apart.max()):.3g}"
    if isinstance(first, np.ndarray) and isinstance(second, np.ndarray):
        return None if np.array_equal(first, second) else "the arrays differ"
    if isinstance(first, bytes) and isinstance(second, bytes):
        return None if first == second else f"{len(first):,} and {len(second):,} bytes differ"
    both_nan = isinstance(first, float) and isinstance(second, float) and math.isnan(first) and math.isnan(second)
    return None if both_nan or first == second else f"{first} became {second}"


if __name__ == "__main__":
    raise SystemExit(_child())
