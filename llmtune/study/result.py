"""What came out of a study, and the configuration that repeats its best trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.config import RunConfig
from llmtune.runs import as_json
from llmtune.runs.documents import write_atomically

Number = float | int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One finished trial.

    Attributes:
        state: complete, pruned (stopped because it fell behind) or failed.
        value: The best value of the study's metric in this run; None when it failed.
        params: Key of the configuration -> what the trial ran with.
        reason: Why it failed.
    """

    number: int
    state: str
    value: float | None
    params: Mapping[str, Number]
    run_dir: Path
    reason: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "number": self.number,
            "state": self.state,
            "value": self.value,
            "params": dict(self.params),
            "run_dir": str(self.run_dir),
            "reason": self.reason,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """The outcome of a study.

    Attributes:
        study: Its name.
        dir: Everything about it.
        metric: What trials were judged by.
        trials: Every finished trial, by number.
        best: The complete trial with the best value.
        default: Trial 0, which ran with the preset's own values.
        greater_is_better: Direction of ``metric``.
        config_path: YAML that ``llmtune train --config`` runs: the best trial's configuration.
    """

    study: str
    dir: Path
    metric: str
    trials: tuple[TrialRecord, ...]
    best: TrialRecord
    default: TrialRecord
    greater_is_better: bool
    config_path: Path

    @property
    def improvement(self) -> float | None:
        """How much better the best is than the preset, relative to the preset; None when that cannot be said."""
        best, default = self.best.value, self.default.value
        if best is None or default is None or default == 0:
            return None
        gain = best - default if self.greater_is_better else default - best
        return gain / abs(default)

    @property
    def text(self) -> str:
        """The outcome in one sentence."""
        counts = {state: sum(trial.state == state for trial in self.trials) for state in ("pruned", "failed")}
        also = "".join(f", {count} {state}" for state, count in counts.items() if count)
        start = f"{len(self.trials)} trials{also}: best {self.metric} {self.best.value:.4f} in trial {self.best.number}"
        if self.default.value is None:
            return f"{start}; the preset's own values failed."
        if self.best.number == self.default.number:
            return f"{start}, which is the preset itself."
        change = f" ({self.improvement:+.1%})" if self.improvement is not None else ""
        return f"{start}, {self.default.value:.4f} with the preset's own values{change}."

    def rows(self) -> list[tuple[str, str, str, str]]:
        """The trials as table rows, best first: number, state, value, parameters (or why it failed)."""
        sign = -1 if self.greater_is_better else 1
        order = sorted(
            self.trials, key=lambda trial: (trial.state != "complete", trial.value is None, sign * (trial.value or 0))
        )
        return [
            (
                f"{trial.number}{' (preset)' if trial.number == 0 else ''}",
                trial.state,
                "" if trial.value is None else f"{trial.value:.4f}",
                trial.reason or shown(trial.params),
            )
            for trial in order
        ]

    def to_json(self) -> dict[str, Any]:
        """The document of ``study --json``; a non-finite number is a string."""
        document = {
            "study": self.study,
            "trials": len(self.trials),
            "best": {"params": dict(self.best.params), "value": self.best.value, "number": self.best.number},
            "default": {"value": self.default.value},
            "improvement": self.improvement,
            "metric": self.metric,
            "trial_list": [trial.to_json() for trial in self.trials],
            "config": str(self.config_path),
            "run_dir": str(self.best.run_dir),
        }
        plain: dict[str, Any] = as_json(document)
        return plain


def shown(params: Mapping[str, Number]) -> str:
    """Parameters on one line, by their short names."""
    return "  ".join(f"{key.split('.')[-1]} {value:.4g}" for key, value in params.items())


def best_of(trials: Sequence[TrialRecord], *, greater_is_better: bool) -> TrialRecord | None:
    """The complete trial with the best value, the earliest of equals; None when none is complete."""
    complete = [trial for trial in trials if trial.state == "complete" and trial.value is not None]
    sign = -1 if greater_is_better else 1
    return min(complete, key=lambda trial: (sign * (trial.value or 0.0), trial.number), default=None)


def write_best(result: StudyResult, config: RunConfig, *, model: str, method: str) -> None:
    """Write the configuration of the best trial, so that the file holds the old best or the new one at any moment.

    Args:
        result: The study so far.
        config: What the user asked of every trial.
        model: The model that was trained.
        method: How it was trained.
    """
    import yaml

    document = config.asked()
    for group in ("output", "recover"):
        document.pop(group, None)
    for name, value in document.get("data", {}).items():
        if name in ("path", "eval_path", "chat_template"):
            document["data"][name] = str(Path(value).absolute())
    document.setdefault("model", {})["id"] = model
    document.setdefault("train", {}).update(preset=config.train.preset, method=method)
    for key, number in result.best.params.items():
        group, leaf = key.split(".")
        document.setdefault(group, {})[leaf] = number
    lines = [
        f"# The best configuration of study {result.study}.",
        f"# {result.text}",
        f"# Train it with: llmtune train --config {result.config_path}",
    ]
    if config.data.path is None:
        lines.append("# The study ran on rows in memory: name the data, llmtune train DATA --config …")
    lines += [
        f"# {key}: {value:.6g} (the preset: {result.default.params[key]:.6g})"
        for key, value in result.best.params.items()
        if key in result.default.params
    ]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(document, sort_keys=False)
    write_atomically(result.config_path, text.encode("utf-8", "replace"))
