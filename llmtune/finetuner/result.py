"""What came out of a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtune.reporting import Verdict
from llmtune.reporting.verdict import evidence_of, judge
from llmtune.runs import RunDirectory


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """The outcome of one run.

    Attributes:
        run_dir: Everything about the run.
        adapter_dir: The adapter, or the whole model of full fine-tuning; None while there is none.
        status: planned, running, finished, preempted or failed.
        metrics: ``train_loss``; with evaluation data ``eval_loss``, ``perplexity``, ``base_eval_loss``, user metrics.
        incidents: What went wrong and was survived, as events.
        steps: Updates done.
        verdict: Whether the result is better than its base model, and what that rests on.
    """

    run_dir: Path
    adapter_dir: Path | None
    status: str
    metrics: Mapping[str, float]
    incidents: tuple[Mapping[str, Any], ...]
    steps: int
    verdict: Verdict

    @classmethod
    def of(cls, run: RunDirectory) -> RunResult:
        """Read the outcome from a run directory."""
        document, events = run.run, list(run.events())
        incidents = tuple(event for event in events if event["event"] in ("incident", "recovery"))
        evidence = evidence_of(document, run.evaluations(), events)
        return cls(
            run_dir=run.path,
            adapter_dir=run.final,
            status=document["status"],
            metrics={name: float(value) for name, value in (document.get("metrics") or {}).items()},
            incidents=incidents,
            steps=document.get("steps") or 0,
            verdict=judge(evidence, is_over=document["status"] == "finished"),
        )

    def to_json(self) -> dict[str, Any]:
        """The document of ``train --json``."""
        return {
            "run_dir": str(self.run_dir),
            "adapter_dir": str(self.adapter_dir) if self.adapter_dir else None,
            "status": self.status,
            "metrics": dict(self.metrics),
            "incidents": [dict(incident) for incident in self.incidents],
            "steps": self.steps,
            "verdict": self.verdict.to_json(),
        }
