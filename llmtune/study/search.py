"""The study: trials one after another, each a real run, until there are as many as were asked for."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import RunConfig, load_config
from llmtune.console import speaker
from llmtune.errors import ConfigError, PlanError, Preempted, TrainingError, did_you_mean
from llmtune.finetuner import facts
from llmtune.finetuner.rows import check_data, inputs_of, tell_reading
from llmtune.runs import RunDirectory, number
from llmtune.study.result import Number, StudyResult, TrialRecord, best_of, shown, write_best
from llmtune.study.settled import Settled, held, read_settled, study_directory
from llmtune.study.space import Dimension, default_space, read_space
from llmtune.training.meter import is_out_of_memory

if TYPE_CHECKING:
    from llmtune.planning import Plan
    from llmtune.presets import Preset
    from llmtune.study.trials import Trials

# What a run does for its reader and a trial has no reader for; none of it changes what is trained.
TRIAL_SETTINGS: Mapping[str, Any] = {
    "recover.resume": "auto",
    "monitor.report": False,
    "evaluate.base": False,
    "evaluate.num_samples": 0,
}


class Study:
    """Search training numbers for a model and data with Optuna; the preset's own values are trial 0.

        result = Study("data.jsonl", trials=20, preset="quality").run()

    A study that was stopped, however it was stopped, is continued by the same command.

    Args:
        data: As for ``FineTuner``.
        trials: Finished trials the study shall have in the end, those of earlier calls included.
        sampler: ``tpe``, ``gp``, ``random`` or ``grid``.
        pruner: ``median`` stops a trial that is worse than the median of the others at the same step; ``none``.
        storage: Database URL of the trials; SQLite in the study's directory when not given.
        space: What is searched: a YAML file or a mapping, ``{"learning_rate": {"low": 1e-4, "high": 1e-2, "log":
            True}}``. When not given, the most important numbers around the preset's, except those that are set.
        output: The study's directory; derived from data, model and settings when not given.
        metrics: As for ``FineTuner``.
        config: A YAML file of ``RunConfig`` keys, several of them (a later one replaces an earlier one), or a
            ``RunConfig``.
        env: Which of the ``environments:`` of the files to use.
        **settings: ``RunConfig`` keys that all trials share.

    Raises:
        ConfigError: An argument that cannot be used; all of them at once.
    """

    def __init__(
        self,
        data: Any = None,
        *,
        trials: int = 20,
        sampler: str = "tpe",
        pruner: str = "median",
        storage: str | None = None,
        space: str | Path | Mapping[str, Any] | None = None,
        output: str | Path | None = None,
        metrics: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] | None = None,
        config: str | Path | Sequence[str | Path] | RunConfig | None = None,
        env: str | None = None,
        **settings: Any,
    ) -> None:
        from llmtune.study.trials import PRUNERS, SAMPLERS, require_sampler

        problems = [
            f"{name}: got {choice!r}{did_you_mean(str(choice), known)}"
            for name, choice, known in (("sampler", sampler, SAMPLERS), ("pruner", pruner, PRUNERS))
            if choice not in known
        ]
        if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
            problems.append(f"trials: got {trials!r}, expected an integer >= 1")
        if problems:
            raise ConfigError("study", problems)
        require_sampler(sampler)
        given: dict[str, Any] = {}
        if isinstance(data, str | os.PathLike):
            given["data.path"], data = os.fspath(data), None
        if output is not None:
            given["output.dir"] = os.fspath(output)
        if not isinstance(config, RunConfig):
            config = load_config(settings, file=config, env=env, where="study")
            for note in config.origin.notes:
                speaker.say(note)
        elif given_too := [*settings, *(["env"] if env else [])]:
            raise ConfigError("study", [f"got a RunConfig and also {', '.join(given_too)}; give one of them"])
        self.config = _replaced(config, given)
        self._data, self._metrics = data, metrics
        self._trials, self._sampler, self._pruner, self._storage = trials, sampler, pruner, storage
        self._space = read_space(space) if space is not None else None

    def run(self) -> StudyResult:
        """Run trials until there are as many as were asked for, and write the best configuration.

        Raises:
            Preempted: A signal came; the same command continues the study.
            TrainingError: No trial came to its end.
            LlmtuneError: What the data, the model or the configuration are at fault for stops the study.
        """
        from llmtune.study.trials import open_trials

        inputs = inputs_of(self.config, self._data)
        tell_reading(inputs)
        identity = self._identity(inputs.fingerprint)
        path = study_directory(self.config.output.dir, self.config.output.root, identity, inputs.name)
        settled = read_settled(path, identity) or self._settle(path.name, identity)
        with held(path, settled) as settled, open_trials(self._storage, path, settled) as trials:
            speaker.say(f"study: {path}")
            with speaker.progress("trials", self._trials) as bar:
                while (done := len(trials.finished())) < self._trials:
                    bar.update(done)
                    trial = trials.next()
                    if trial is None:
                        speaker.warn(f"the grid has no more points: the study ends with {done} trials")
                        break
                    self._run_trial(trials, trial, path, settled)
                    self._tell(trials.finished(), trial.number, settled)
                    self._result(trials, path, settled)
            result = self._result(trials, path, settled)
        if result is None:
            reasons = "; ".join(f"trial {record.number}: {record.reason}" for record in trials.finished()[:3])
            raise TrainingError(f"no trial of {path} came to its end: {reasons}")
        return result

    # ------------------------------------------------------------------ what stays the same

    def _identity(self, fingerprint: str) -> dict[str, str]:
        model, search = self.config.model, (self._sampler, self._pruner, [d.to_json() for d in self._space or ()])
        return {
            "data": fingerprint[:12],
            "model": model.id + (f"@{model.revision}" if model.revision else ""),
            "config": self.config.identity_hash()[:12],
            "search": hashlib.sha256(json.dumps(search, sort_keys=True).encode()).hexdigest()[:12],
        }

    def _settle(self, name: str, identity: Mapping[str, str]) -> Settled:
        """Look at data, model and machine once, before anything is written."""
        from llmtune.training.arguments import greater_is_better

        config = self.config
        machine = facts.machine_of(config)
        inputs = inputs_of(config, self._data)
        check_data(inputs).raise_if_bad(config.data.on_bad_row)
        model = facts.model_of(config, machine, inputs, download=True)
        data = facts.data_of(config, model, inputs)
        if data.eval_rows == 0:
            raise ConfigError("study", ["no rows are held out to judge trials on; give --eval-data, or more rows"])
        plan = facts.plan_of(config, machine, model, data, processes=1)
        full = plan.method.value == "full"
        if full and (useless := [d.key for d in self._space or () if d.key.startswith("adapter.")]):
            raise ConfigError("space", [f"{key}: full fine-tuning has no adapter" for key in useless])
        asked = [f"{group}.{leaf}" for group, values in config.asked().items() for leaf in values]
        space = self._space or default_space(
            {key: _default(key, config, plan, model.preset) for key in _SEARCHED_BY_DEFAULT}, full=full, fixed=asked
        )
        return Settled(
            name=name,
            identity=identity,
            settings=config.to_json(),
            sampler=self._sampler,
            pruner=self._pruner,
            seed=plan.seed.value,
            model=plan.model.value,
            method=plan.method.value,
            space=space,
            defaults={dimension.key: _default(dimension.key, config, plan, model.preset) for dimension in space},
            metric=config.evaluate.metric,
            greater_is_better=greater_is_better(config),
        )

    # ------------------------------------------------------------------ one trial

    def _run_trial(self, trials: Trials, trial: Any, path: Path, settled: Settled) -> None:
        """Train one trial, or continue it, and note how it ended."""
        from llmtune.finetuner import FineTuner
        from llmtune.study.pruning import PruningGuard
        from llmtune.study.readback import read_back
        from llmtune.training.arguments import metric_key

        params = trials.parameters(trial)
        run_dir = path / "trials" / f"trial-{trial.number:03d}"
        trials.begin(trial, params, run_dir)
        config = trial_config(self.config, settled, params, run_dir)
        guard = PruningGuard(trial, metric=metric_key(config), run_dir=run_dir)
        try:
            with _quietly():
                FineTuner(self._data, callbacks=[guard], metrics=self._metrics, config=config).train()
        except Preempted:
            raise Preempted(
                f"stopped in trial {trial.number}; {len(trials.finished())} of {self._trials} trials are done. "
                f"The same command continues the study in {path}"
            ) from None
        except (TrainingError, PlanError) as error:
            trials.fail(trial, str(error))
            return
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            trials.fail(trial, f"memory ran out before the first update: {error}")
            return
        run = RunDirectory.open(run_dir)
        read_back(run, params)
        if guard.pruned_at is not None:
            trials.prune(trial)
        else:
            trials.complete(trial, _value(run, settled.metric))

    def _tell(self, finished: Sequence[TrialRecord], trial_number: int, settled: Settled) -> None:
        """One line per trial."""
        record = next(record for record in finished if record.number == trial_number)
        value = "" if record.value is None else f"  {settled.metric} {record.value:.4f}"
        why = f": {record.reason}" if record.reason else ""
        speaker.say(
            f"{len(finished)}/{self._trials}  trial {record.number}{value}  {shown(record.params)}  {record.state}{why}"
        )

    def _result(self, trials: Trials, path: Path, settled: Settled) -> StudyResult | None:
        """The outcome so far, written as YAML; None while no trial is complete."""
        finished = trials.finished()
        best = best_of(finished, greater_is_better=settled.greater_is_better)
        if best is None:
            return None
        result = StudyResult(
            study=settled.name,
            dir=path,
            metric=settled.metric,
            trials=finished,
            best=best,
            default=finished[0],
            greater_is_better=settled.greater_is_better,
            config_path=path / "best.yaml",
        )
        write_best(result, self.config, model=settled.model, method=settled.method)
        return result


_SEARCHED_BY_DEFAULT = ("train.learning_rate", "train.weight_decay", "adapter.rank", "adapter.dropout")


def trial_config(config: RunConfig, settled: Settled, params: Mapping[str, Number], run_dir: Path) -> RunConfig:
    """The configuration of one trial: what the user asked, what is settled, and the trial's parameters."""
    settled_keys = {"model.id": settled.model, "train.method": settled.method}
    # Trials have a store of their own, so that `llmtune runs` lists the runs that people started.
    places = {"output.dir": str(run_dir), "output.root": str(run_dir.parent)}
    return _replaced(config, {**params, **settled_keys, **places, **TRIAL_SETTINGS})


def _replaced(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """``config`` with some keys replaced, validated again; unlike a round trip through JSON it keeps the token."""
    document = config.model_dump(exclude_unset=True)
    for key, value in changes.items():
        group, leaf = key.split(".")
        document.setdefault(group, {})[leaf] = value
    return RunConfig.model_validate(document)


def _default(key: str, config: RunConfig, plan: Plan, preset: Preset) -> float | None:
    """What a plain run would use for ``key``."""
    group, leaf = key.split(".")
    asked: float | None = getattr(getattr(config, group), leaf)
    if asked is not None:
        return asked
    if leaf == "warmup_ratio":  # the plan has it in updates
        return preset.level(config.train.preset, plan.data_size.value).warmup_ratio
    choice = getattr(plan, leaf, None)
    return choice.value if choice is not None else None


def _value(run: RunDirectory, metric: str) -> float:
    """The run's best value of the metric; not a number when no evaluation gave a finite one."""
    if not run.evaluations():
        raise ConfigError("study", [f"{run.path} ended without an evaluation; lower evaluate.every_steps"])
    best = run.run["best"]
    value = number(best["value"]) if best else None
    return float("nan") if value is None else value


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what a run says to warnings: a study has one line per trial."""
    before = speaker.quiet
    speaker.quiet = True
    try:
        yield
    finally:
        speaker.quiet = before


__all__ = ["Dimension", "Study", "trial_config"]
