"""Whose code an exception comes from, as its traceback tells."""

from __future__ import annotations

import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

OURS = "llmtune"
# Code that nobody who starts a run has written, wherever it is installed.
LIBRARIES = frozenset(
    {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "datasets", "safetensors", "tokenizers", "numpy"}
    | {"pyarrow", "optuna", "deepspeed", "triton", "huggingface_hub"}
)
# Functions in which each phase of a run happens: ours, and those of ``transformers.Trainer`` that they override.
_PHASES = {
    "training_step": "step",
    "evaluate": "evaluation",
    "_save_checkpoint": "save",
    "save_final": "finish",
    "take_up": "load",
    "restore_best": "load",
    "_load_from_checkpoint": "load",
    "_load_optimizer_and_scheduler": "load",
    "_load_rng_state": "load",
    "_load_scaler": "load",
    "call_event": "callback",
}
# Where a process is that waits for its loader, and the function there that takes what a worker sends.
LOADER, _FROM_WORKERS = "torch.utils.data.dataloader", "_try_get_data"
# The function of ours that calls the user's metrics.
_CALLS_METRICS = "attach_metrics.<locals>.measure"


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Code that was handed to llmtune.

    Attributes:
        owner: Whose it is, e.g. ``callback Notifier.on_step_end`` or ``metric rouge``.
        where: File and line that raised.
        is_hook: Whether llmtune called it as a callback or metric; else it is code inside a model or a data set.
    """

    owner: str
    where: str
    is_hook: bool


Frames = list[tuple[FrameType, int]]


def origin_of(error: BaseException) -> Origin | None:
    """The code of the user's that raised ``error``; None where it was ours or a library's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    for index in range(len(frames)):
        owner = _callback(frames, index) or _metric(frames, index)
        if owner is not None:
            return Origin(owner=owner, where=_place(frames, index), is_hook=True)
    first = next((index for index, (frame, _) in enumerate(frames) if _root(frame) == OURS), len(frames))
    for index in range(len(frames) - 1, first, -1):
        frame = frames[index][0]
        if _root(frame) == OURS:
            return None
        if not _is_library(frame):
            return Origin(owner=f"code {_function(frame)}", where=_line(frames[index]), is_hook=False)
    return None


def phase_of(error: BaseException) -> str:
    """What the run was doing: load, step, evaluation, save, callback or finish; ``step`` where nothing else is seen."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [frame.f_code.co_name for frame in frames if _root(frame) in (OURS, "transformers")]
    return next((_PHASES[name] for name in reversed(names) if name in _PHASES), "step")


def lost_a_worker(error: BaseException) -> bool:
    """Whether the connection to a worker of a data loader broke: it is gone, and torch did not see that yet."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    fetching = any((_module(frame), frame.f_code.co_name) == (LOADER, _FROM_WORKERS) for frame in frames)
    return fetching and isinstance(error, ConnectionError | EOFError)


def updates_done(error: BaseException) -> int | None:
    """Updates that the Trainer had done when ``error`` was raised in its loop; None outside of it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if _root(frame) == "transformers" and frame.f_code.co_name in ("train", "_inner_training_loop"):
            step = getattr(getattr(frame.f_locals.get("self"), "state", None), "global_step", None)
            if isinstance(step, int):
                return step
    return None


def raised_at(error: BaseException) -> tuple[str, str]:
    """Function and place of the innermost line of ours, else of the innermost line; empty without a traceback."""
    frames = list(traceback.walk_tb(error.__traceback__))
    if not frames:
        return "", ""
    ours = [entry for entry in frames if _root(entry[0]) == OURS]
    chosen = (ours or frames)[-1]
    return f"{_module(chosen[0])}.{_function(chosen[0])}", _line(chosen)


def _callback(frames: Frames, index: int) -> str | None:
    """``callback Name.on_event`` for the frame that the Trainer has called as one, unless it is one of ours."""
    frame = frames[index][0]
    if index == 0 or frames[index - 1][0].f_code.co_name != "call_event":
        return None
    holder = type(frame.f_locals.get("self"))
    if not any(base.__name__ == "TrainerCallback" for base in holder.__mro__):
        return None
    root = holder.__module__.partition(".")[0]
    if root == OURS:
        return None
    of = " of transformers" if root == "transformers" else ""
    return f"callback {holder.__name__}.{frame.f_code.co_name}{of}"


def _metric(frames: Frames, index: int) -> str | None:
    """``metric name`` for the frame that `_CALLS_METRICS` has called, or for itself where the metric has none."""
    frame = frames[index][0]
    if not _calls_metrics(frame):
        return None
    inner = frames[index + 1][0] if index + 1 < len(frames) else None
    if inner is not None and (_calls_metrics(inner) or _root(inner) == OURS):
        return None
    name = frame.f_locals.get("name")
    return f"metric {name if isinstance(name, str) else _function(inner or frame)}"


def _calls_metrics(frame: FrameType) -> bool:
    return _root(frame) == OURS and frame.f_code.co_qualname.startswith(_CALLS_METRICS)


def _place(frames: Frames, index: int) -> str:
    """The innermost line from ``index`` on that no library wrote, which is where to look."""
    own = [entry for entry in frames[index:] if _root(entry[0]) != OURS and not _is_library(entry[0])]
    return _line((own or frames[index:])[-1])


def _line(entry: tuple[FrameType, int]) -> str:
    return f"{entry[0].f_code.co_filename}:{entry[1]}"


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _root(frame: FrameType) -> str:
    return _module(frame).partition(".")[0]


def _function(frame: FrameType) -> str:
    return frame.f_code.co_qualname.rpartition("<locals>.")[2]


def _is_library(frame: FrameType) -> bool:
    root, file = _root(frame), frame.f_code.co_filename
    if root in LIBRARIES or root in sys.stdlib_module_names or file.startswith("<"):
        return True
    return not {"site-packages", "dist-packages"}.isdisjoint(Path(file).parts)
