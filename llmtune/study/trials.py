"""The trials of one study in Optuna's storage: which one is next, and how each ended."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from llmtune.errors import ConfigError, MissingExtraError, OutputError
from llmtune.study.result import Number, TrialRecord
from llmtune.study.settled import Settled
from llmtune.study.space import grid

SAMPLERS = ("tpe", "gp", "random", "grid")
PRUNERS = ("median", "none")
STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
# Trials before the model of a sampler speaks: half of Optuna's ten, since a trial here is a whole training run.
STARTUP_TRIALS = 5
# Attributes of a trial.
RUN_DIR, PARAMS, REASON = "run_dir", "params", "reason"


class Trials:
    """The trials of one study. Make one with :func:`open_trials`; one process at a time has it.

    Args:
        study: Optuna's study.
        folder: The study's directory; run directories are noted relative to it.
        settled: What the study was begun with.
    """

    def __init__(self, study: Any, folder: Path, settled: Settled) -> None:
        self._study, self._folder, self._settled = study, folder, settled

    def finished(self) -> tuple[TrialRecord, ...]:
        """Every complete, pruned and failed trial, by number."""
        frozen = self._study.get_trials(deepcopy=False, states=tuple(STATES))
        return tuple(self._record(trial) for trial in sorted(frozen, key=lambda trial: trial.number))

    def next(self) -> Any | None:
        """The trial to run now, or None when a grid is exhausted.

        A trial that is still running belongs to a process that died, since this one alone has the study: it is
        continued with its number and parameters.
        """
        everything = self._study.get_trials(deepcopy=False)
        running = [trial for trial in everything if trial.state == TrialState.RUNNING]
        if running:
            self._study.sampler = self._sampler(running[0].number)
            return optuna.trial.Trial(self._study, running[0]._trial_id)
        waiting = [trial for trial in everything if trial.state == TrialState.WAITING]
        number = waiting[0].number if waiting else len(everything)
        if not waiting and number == 0:
            self._study.enqueue_trial(self._preset_inside())
        elif not waiting and self._settled.sampler == "grid":
            points = [point for point in grid(self._settled.space, self._settled.seed) if not self._is_preset(point)]
            if number > len(points):
                return None
            self._study.enqueue_trial(points[number - 1])
        self._study.sampler = self._sampler(number)
        return self._study.ask()

    def parameters(self, trial: Any) -> dict[str, Number]:
        """What ``trial`` runs with. Trial 0 has the preset's own values, even where they lie outside the space."""
        if trial.number > 0:
            return {dimension.key: dimension.suggest(trial) for dimension in self._settled.space}
        inside = self._preset_inside()
        for dimension in self._settled.space:
            if dimension.key in inside:
                dimension.suggest(trial)
        return self._preset()

    def begin(self, trial: Any, params: Mapping[str, Number], run_dir: Path) -> None:
        """Note what a trial runs with, and where."""
        trial.set_user_attr(PARAMS, dict(params))
        trial.set_user_attr(RUN_DIR, run_dir.relative_to(self._folder).as_posix())

    def complete(self, trial: Any, value: float) -> None:
        """The trial ran to its end."""
        if math.isnan(value):
            self.fail(trial, "the metric is not a number")
        else:
            self._study.tell(trial, value)

    def prune(self, trial: Any) -> None:
        """The trial was stopped because it fell behind."""
        self._study.tell(trial, state=TrialState.PRUNED)

    def fail(self, trial: Any, reason: str) -> None:
        """The trial could not be run; that is a result too."""
        trial.set_user_attr(REASON, reason)
        self._study.tell(trial, state=TrialState.FAIL)

    def _preset(self) -> dict[str, Number]:
        values = {dimension.key: self._settled.defaults[dimension.key] for dimension in self._settled.space}
        return {key: value for key, value in values.items() if value is not None}

    def _preset_inside(self) -> dict[str, Number]:
        """The preset's values that lie in the space; only these can be told to the sampler."""
        preset = self._preset()
        return {d.key: preset[d.key] for d in self._settled.space if d.key in preset and d.contains(preset[d.key])}

    def _is_preset(self, point: Mapping[str, Number]) -> bool:
        preset = self._preset()
        return all(key in preset and math.isclose(preset[key], value) for key, value in point.items())

    def _sampler(self, number: int) -> Any:
        """The sampler of one trial. Seeded by its number, so that a study that was interrupted asks what it would have.

        A grid is enqueued point by point: Optuna's own sampler works inside ``Study.optimize`` only.
        """
        seed = (self._settled.seed + number) % 2**32
        if self._settled.sampler == "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        if self._settled.sampler == "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
        return optuna.samplers.RandomSampler(seed=seed)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        attributes = trial.user_attrs
        return TrialRecord(
            number=trial.number,
            state=STATES[trial.state],
            value=trial.value,
            params=attributes.get(PARAMS, trial.params),
            run_dir=self._folder / attributes[RUN_DIR],
            reason=attributes.get(REASON),
        )


@contextmanager
def open_trials(url: str | None, folder: Path, settled: Settled) -> Iterator[Trials]:
    """The study's trials in ``url``, or in ``study.db`` in its directory.

    Raises:
        ConfigError: The storage cannot be used; a password in its URL is not shown.
        OutputError: The storage holds the trials of another study of this name.
    """
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = _storage(url, folder)
    pruner = optuna.pruners.NopPruner()
    if settled.pruner == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    try:
        study = optuna.create_study(
            storage=storage,
            study_name=settled.name,
            direction="maximize" if settled.greater_is_better else "minimize",
            pruner=pruner,
            load_if_exists=True,
        )
        _own(study, folder if url else None, settled)
        yield Trials(study, folder, settled)
    finally:
        storage.remove_session()
        storage.engine.dispose()
        optuna.logging.set_verbosity(verbosity)


def require_sampler(name: str) -> None:
    """Refuse a sampler whose package is missing.

    Raises:
        MissingExtraError: With the command that installs it.
    """
    from importlib.util import find_spec

    if name == "gp" and find_spec("scipy") is None:
        raise MissingExtraError("scipy", "gp", "--sampler gp")


def _storage(url: str | None, folder: Path) -> Any:
    from sqlalchemy import URL, make_url
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    example = "expected e.g. sqlite:///study.db or postgresql+psycopg://user@host/database"
    try:
        parsed = make_url(url) if url else URL.create("sqlite", database=str(folder / "study.db"))
    except (ArgumentError, ValueError):
        raise ConfigError("--storage", [f"got a text that is no database URL, {example}"]) from None
    where = parsed.render_as_string(hide_password=True)
    try:
        return optuna.storages.RDBStorage(parsed.render_as_string(hide_password=False))
    except (SQLAlchemyError, ImportError, RuntimeError, optuna.exceptions.OptunaError) as error:
        reason = str(getattr(error, "orig", None) or error).split("\n")[0]
        if parsed.password:
            reason = reason.replace(str(parsed.password), "***")
        raise ConfigError("--storage", [f"cannot use {where}: {reason}; {example}"]) from error


def _own(study: Any, folder: Path | None, settled: Settled) -> None:
    """Put the study's identity into the storage, or compare it with what is there."""
    wanted: dict[str, Any] = {"identity": dict(settled.identity), "dir": str(folder) if folder else None}
    held = study.user_attrs.get("llmtune")
    if held is None:
        study.set_user_attr("llmtune", wanted)
    elif held != wanted:
        raise OutputError(
            f"the storage holds another study named {settled.name}: {_spelled(held)}; this one is {_spelled(wanted)}. "
            "Choose another --storage or another --output."
        )


def _spelled(facts: Mapping[str, Any]) -> str:
    parts: Sequence[str] = [f"{key} {value}" for key, value in sorted(facts["identity"].items())]
    return ", ".join([*parts, *([f"in {facts['dir']}"] if facts["dir"] else [])])
