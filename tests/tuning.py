"""Small real runs for tests: rows, a shortcut to ``FineTuner``, and what to read from a finished run."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from llmtune import FineTuner, RunResult
from llmtune.runs import RunDirectory

NAMES = ("Arden", "Bo", "Cyra", "Dunmore", "Eli", "Fenwick", "Gala", "Hob")
# Answers of very different lengths, so that a mean over rows and a mean over tokens differ.
ROWS = [
    {
        "question": f"Who keeps lamp {number}?",
        "answer": " ".join([f"{NAMES[number % 8]} keeps lamp {number}."] * (1 + number % 4)),
    }
    for number in range(26)
]


def settings(model: Path | str, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run of a few updates that writes no page and asks for no samples."""
    return {
        "model": str(model),
        "output": str(output),
        "output.root": str(output.parent),
        "max_steps": 6,
        "global_batch_size": 8,
        "learning_rate": 1e-3,
        "precision": "fp32",
        "rank": 4,
        "dropout": 0.0,
        "evaluate.every_steps": 3,
        "save.every_steps": 2,
        "num_samples": 0,
        "report": False,
    } | changes


def tune(model: Path | str, output: Path, data: Any = None, **changes: Any) -> RunResult:
    """Train on ``ROWS`` or ``data``; ``callbacks`` and ``metrics`` go to ``FineTuner``, all else is configuration."""
    own = {name: changes.pop(name) for name in ("callbacks", "metrics") if name in changes}
    return FineTuner(ROWS if data is None else data, **own, **settings(model, output, **changes)).train()


def history(run_dir: Path) -> list[tuple[int, float, float, float, int, int]]:
    """Step, loss, gradient norm, learning rate and token counts of every update."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "num_tokens", "num_supervised_tokens")
    return [tuple(step[key] for key in keys) for step in RunDirectory.open(run_dir).steps()]  # type: ignore[misc]


def losses(run_dir: Path) -> list[float]:
    """Loss of every update."""
    return [step[1] for step in history(run_dir)]


def evaluations(run_dir: Path) -> dict[int, float]:
    """Evaluation loss by step."""
    return {entry["step"]: entry["eval_loss"] for entry in RunDirectory.open(run_dir).evaluations()}


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """All events of one kind."""
    return [event for event in RunDirectory.open(run_dir).events() if event["event"] == kind]


def weights(run_dir: Path) -> dict[str, Any]:
    """Tensors of the final adapter or model."""
    from safetensors.torch import load_file

    final = RunDirectory.open(run_dir).final
    assert final is not None
    name = "adapter_model.safetensors" if final.name == "adapter" else "model.safetensors"
    return load_file(final / name)


class SignalAt(TrainerCallback):
    """Sends this process a real signal while an update runs."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), self.number)
