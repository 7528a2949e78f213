"""The adapter: rank, alpha, dropout and where it sits."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoices:
    """What the adapter is. Under full fine-tuning there is none, and the reasons say so."""

    rank: Choice[int]
    alpha: Choice[int]
    dropout: Choice[float]
    targets: Choice[tuple[str, ...]]


def choose_adapter(request: PlanRequest, method: str) -> AdapterChoices:
    """What the user set, else the preset's numbers; a rank of your own keeps the preset's ratio of alpha to rank."""
    asked, level = request.config.adapter, request.level
    alpha: Choice[int] = request.of_preset("alpha")
    if asked.rank is not None and asked.alpha is None:
        ratio = level.alpha / level.rank
        reason = f"keeps the preset's ratio of {ratio:g} to your rank"
        alpha = Choice(max(1, round(asked.rank * ratio)), reason, "derived")
    chosen = AdapterChoices(
        rank=asked_or(asked.rank, "adapter.rank", request.of_preset("rank")),
        alpha=asked_or(asked.alpha, "adapter.alpha", alpha),
        dropout=asked_or(asked.dropout, "adapter.dropout", request.of_preset("dropout")),
        targets=asked_or(asked.targets, "adapter.targets", _targets(request)),
    )
    if method == "full":
        unused = {
            field.name: replace(choice, reason="not used: full fine-tuning trains the weights themselves")
            for field in fields(chosen)
            if (choice := getattr(chosen, field.name)).source != "user"
        }
        return replace(chosen, **unused)
    return chosen


def _targets(request: PlanRequest) -> Choice[tuple[str, ...]]:
    targets = tuple(request.preset.lora_targets)
    if not request.spec.targeted(targets):
        return Choice(("all-linear",), "none of the preset's module names occur in this model", "derived")
    return Choice(targets, f"the {request.preset.family} preset", "preset")
