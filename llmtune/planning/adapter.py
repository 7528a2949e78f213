"""The adapter: rank, alpha, dropout and where it sits. The preset's numbers, moved where data and model ask for it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest
from llmtune.units import format_count

# What a weight can hold and what a token has to teach, in bits: 2 (Allen-Zhu and Li, Knowledge Capacity Scaling Laws,
# arXiv:2404.05405) and about 1 (Schulman et al., LoRA Without Regret, 2025, which compares the two).
BITS_PER_PARAMETER, BITS_PER_TOKEN = 2.0, 1.0
# A token of plain text teaches less and one of varied text more than that: by this factor at complexity 0 and at 1.
# llmtune: chosen.
PLAIN_FACTOR, VARIED_FACTOR = 0.5, 1.5
# A rank grows to at most so many times the preset's and to this number. llmtune: chosen; LoRA Without Regret finds
# nothing between ranks 256 and 512 on data of up to a million rows.
MOST_TIMES, MOST_RANK = 4, 256
# An adapter with more parameters per supervised token than this is halved, not below the smallest rank of the presets.
# llmtune: chosen; a smaller adapter learns as much from so little data and forgets less (arXiv:2405.09673).
MOST_PARAMETERS_PER_TOKEN, LEAST_RANK = 2_500, 8
# From here on data is repeated so often, and the adapter so much larger than what is in it, that it is learned by
# heart. llmtune: chosen. Dropout is then at least what QLoRA takes up to 13B (arXiv:2305.14314).
MANY_EPOCHS, ROOMY_PARAMETERS_PER_TOKEN, STRONG_DROPOUT = 3.0, 500, 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterChoices:
    """What the adapter is. Under full fine-tuning there is none, and the reasons say so."""

    rank: Choice[int]
    alpha: Choice[int]
    dropout: Choice[float]
    targets: Choice[tuple[str, ...]]


def choose_adapter(request: PlanRequest, method: str, epochs: float) -> AdapterChoices:
    """What the user set, else the preset's numbers moved by the rules above; alpha keeps the preset's ratio to rank."""
    asked = request.config.adapter
    targets = asked_or(asked.targets, "adapter.targets", _targets(request))
    rank = asked_or(asked.rank, "adapter.rank", _rank(request, targets.value))
    chosen = AdapterChoices(
        rank=rank,
        alpha=asked_or(asked.alpha, "adapter.alpha", _alpha(request, rank)),
        dropout=asked_or(
            asked.dropout, "adapter.dropout", _dropout(request, epochs, _per_token(request, rank.value, targets.value))
        ),
        targets=targets,
    )
    if method == "full":
        unused = {
            field.name: replace(choice, reason="not used: full fine-tuning trains the weights themselves", changes="")
            for field in fields(chosen)
            if (choice := getattr(chosen, field.name)).source != "user"
        }
        return replace(chosen, **unused)
    return chosen


def memorises(request: PlanRequest, parameters: int, epochs: float) -> bool:
    """Whether so many trained weights see so little data so often that they will know it by heart."""
    return epochs >= MANY_EPOCHS and parameters > ROOMY_PARAMETERS_PER_TOKEN * _supervised_tokens(request)


def _rank(request: PlanRequest, targets: tuple[str, ...]) -> Choice[int]:
    preset: Choice[int] = request.of_preset("rank")
    per_rank = request.spec.adapter_parameters(1, targets)
    if per_rank == 0:
        return preset
    tokens = _supervised_tokens(request)
    varied = 0.5 if request.complexity is None else request.complexity
    bits = BITS_PER_TOKEN * (PLAIN_FACTOR + (VARIED_FACTOR - PLAIN_FACTOR) * varied) * tokens
    rank, most = preset.value, min(MOST_TIMES * preset.value, max(MOST_RANK, preset.value))
    while BITS_PER_PARAMETER * per_rank * rank < bits and rank * 2 <= most:
        rank *= 2
    if rank > preset.value:
        reason = (
            f"{preset.value} in the preset; {format_count(tokens)} supervised tokens hold about {format_count(bits)} "
            f"bits, and an adapter takes {BITS_PER_PARAMETER:g} per parameter (LoRA Without Regret)"
        )
        return Choice(rank, reason, "derived", f"{preset.value} with fewer rows")
    while per_rank * rank > MOST_PARAMETERS_PER_TOKEN * tokens and rank // 2 >= LEAST_RANK:
        rank //= 2
    if rank < preset.value:
        reason = (
            f"{preset.value} in the preset; {format_count(tokens)} supervised tokens do not fill "
            f"{format_count(per_rank * preset.value)} parameters, and a smaller adapter forgets less (arXiv:2405.09673)"
        )
        return Choice(rank, reason, "derived", f"{preset.value} with more rows")
    return preset


def _alpha(request: PlanRequest, rank: Choice[int]) -> Choice[int]:
    level = request.level
    if rank.value == level.rank:
        return request.of_preset("alpha")
    ratio = level.alpha / level.rank
    whose = "your rank" if rank.source == "user" else "the rank"
    return Choice(max(1, round(rank.value * ratio)), f"keeps the preset's ratio of {ratio:g} to {whose}", "derived")


def _dropout(request: PlanRequest, epochs: float, per_token: float) -> Choice[float]:
    preset: Choice[float] = request.of_preset("dropout")
    if epochs <= 1 and preset.value > 0:
        reason = (
            f"{preset.value:g} in the preset; each row is seen once at most, and then dropout costs more than it gives "
            "(arXiv:2505.24788)"
        )
        return Choice(0.0, reason, "derived", f"{preset.value:g} with more than one epoch")
    if epochs >= MANY_EPOCHS and per_token > ROOMY_PARAMETERS_PER_TOKEN and preset.value < STRONG_DROPOUT:
        reason = (
            f"{preset.value:g} in the preset; {epochs:g} passes with {format_count(per_token)} parameters per "
            "supervised token would learn the rows by heart; 0.1 is what QLoRA takes"
        )
        return Choice(STRONG_DROPOUT, reason, "derived", f"{preset.value:g} with more rows or fewer epochs")
    return preset


def _per_token(request: PlanRequest, rank: int, targets: tuple[str, ...]) -> float:
    return request.spec.adapter_parameters(rank, targets) / _supervised_tokens(request)


def _supervised_tokens(request: PlanRequest) -> int:
    return max(1, request.stats.supervised_tokens)


def _targets(request: PlanRequest) -> Choice[tuple[str, ...]]:
    targets = tuple(request.preset.lora_targets)
    if not request.spec.targeted(targets):
        return Choice(("all-linear",), "none of the preset's module names occur in this model", "derived")
    where = "every linear layer" if "all-linear" in targets else "every linear layer of the decoder"
    reason = f"the {request.preset.family} preset: {where}; adapters on attention alone fall behind (QLoRA, figure 2)"
    return Choice(targets, reason, "preset")
