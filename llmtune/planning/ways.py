"""Ways to run that the user leaves open: what each takes, and which of them wins.

Of the ways that fit memory the fastest wins, and of those about as fast the plainest. Asked of other amounts of memory,
the same rule says what more or less of it would change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmtune.planning.adapter import AdapterChoices, choose_adapter
from llmtune.planning.batching import CPU_PASS_OVERHEAD_TOKENS, Load, load_of, token_budgets
from llmtune.planning.execution import threads_of
from llmtune.planning.footprints import memory_of, time_of, training_of, workload_of
from llmtune.planning.memory import USABLE_SHARE, Footprint, MemoryEstimate
from llmtune.planning.precision import PrecisionChoices, choose_precision
from llmtune.planning.request import PlanRequest
from llmtune.planning.schedule import LengthChoices
from llmtune.units import format_bytes

OPTIMIZER = "adamw_torch_fused"
# AdamW with its two moments in 8 bits, block by block (arXiv:2110.02861); the paged one lets the driver move them to
# host memory, on CUDA alone. The first runs on CPUs too (tried with bitsandbytes 0.50, where the second warns and does
# the same).
OPTIMIZER_8BIT, OPTIMIZER_PAGED = "adamw_bnb_8bit", "paged_adamw_8bit"
# Ways this close to the fastest are as fast: predictions are no finer. llmtune: chosen.
FASTEST_WITHIN = 1.02
# Quantised base weights have to be this many times as fast where both fit: what they lose is little, but not nothing,
# and merging the adapter loses a little more. llmtune: chosen.
QUANTISED_FASTER = 1.25
# Sharding that splits weights: bitsandbytes' weights and states are not made for it.
SPLITS_WEIGHTS = ("fsdp2", "zero3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to run; see ``Footprint`` for what the fields mean."""

    method: str
    optimizer: str
    checkpoint_every: int
    offload: bool
    token_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A way and what it comes to, except for its memory.

    Attributes:
        seconds: Of one update with its share of the evaluations.
    """

    way: Way
    load: Load
    adapter: AdapterChoices
    precision: PrecisionChoices
    footprint: Footprint
    seconds: float


class Search:
    """The way that wins; memory is predicted only of as many ways as that takes.

    Args:
        request: The facts.
        candidates: All ways, the plainest first; not empty.
    """

    def __init__(self, request: PlanRequest, candidates: Sequence[Candidate]) -> None:
        self._request, self.candidates = request, tuple(candidates)
        self._memories: dict[Way, MemoryEstimate] = {}

    def memory(self, candidate: Candidate) -> MemoryEstimate:
        """Predicted once for each way."""
        if candidate.way not in self._memories:
            self._memories[candidate.way] = memory_of(self._request, candidate.footprint)
        return self._memories[candidate.way]

    @cached_property
    def least(self) -> Candidate:
        """The way that takes the least memory: one of those with the smallest passes."""
        smallest = min(one.way.token_budget for one in self.candidates)
        return min(
            (one for one in self.candidates if one.way.token_budget == smallest),
            key=lambda one: self.memory(one).peak_bytes,
        )

    @cached_property
    def best(self) -> Candidate:
        """The winner among the ways that fit; when none does, the one that takes the least memory."""
        fastest = min(self.candidates, key=lambda one: one.seconds)
        if not self.memory(fastest).fits and not self.memory(self.least).fits:
            return self.least
        return _winner(self.candidates, lambda one: self.memory(one).fits) or self.least

    def changes(self, part: Callable[[Way], Any], shown: Callable[[Any], str] = str) -> str:
        """What more or less memory would make of a part of the way: ``lora from 16.5 GiB free``."""
        if not self.memory(self.best).fits:
            return ""
        value, limit = part(self.best.way), self.memory(self.best).free_bytes * USABLE_SHARE
        more = next((step for step in self._steps if step[0] > limit and part(step[1].way) != value), None)
        found = [] if more is None else [f"{shown(part(more[1].way))} from {_free(more[0])} free"]
        from_here = limit
        for needed, winner in reversed([step for step in self._steps if step[0] <= limit]):
            if part(winner.way) != value:
                found.append(f"{shown(part(winner.way))} below {_free(from_here)} free")
                break
            from_here = needed
        return ", ".join(found)

    @cached_property
    def _steps(self) -> list[tuple[float, Candidate]]:
        """Memory from which another way wins, and that way, by growing memory."""
        needs = {one.way: self.memory(one).peak_bytes for one in self.candidates}
        steps: list[tuple[float, Candidate]] = []
        for limit in sorted(set(needs.values())):
            winner = _winner(self.candidates, lambda one, limit=limit: needs[one.way] <= limit)  # type: ignore[misc]
            if winner is not None and (not steps or steps[-1][1] is not winner):
                steps.append((limit, winner))
        return steps


def search_ways(request: PlanRequest, length: LengthChoices) -> Search:
    """Look among the ways with the usual optimizer, and only where none of them fits among those with smaller ones."""
    kinds = {
        method: (choose_adapter(request, method, length.epochs.value), choose_precision(request, method))
        for method in _methods(request)
    }
    loads = _loads(request, length, *next(iter(kinds.items())))
    candidates: list[Candidate] = []
    for optimizer in _optimizers(request):
        ways = _ways(request, optimizer, loads)
        candidates += [_candidate(request, length, way, load, *kinds[way.method]) for way, load in ways]
        search = Search(request, candidates)
        if search.memory(search.best).fits:
            break
    return search


def _winner(candidates: Sequence[Candidate], fits: Callable[[Candidate], bool]) -> Candidate | None:
    """Of the ways that fit the plainest of the fastest, with base weights as they are unless that is much slower."""

    def counted(one: Candidate) -> float:
        return one.seconds * (1.0 if one.footprint.quantization is None else QUANTISED_FASTER)

    fastest = next((one for one in sorted(candidates, key=counted) if fits(one)), None)
    if fastest is None:
        return None
    return next(
        one
        for one in candidates
        if one.seconds <= FASTEST_WITHIN * fastest.seconds
        and one.footprint.quantization == fastest.footprint.quantization
        and fits(one)
    )


def _free(needed: float) -> str:
    """Free memory that a plan needs which takes this much."""
    return format_bytes(needed / USABLE_SHARE)


def _loads(
    request: PlanRequest, length: LengthChoices, method: str, kind: tuple[AdapterChoices, PrecisionChoices]
) -> list[Load]:
    """What an update comes to under each token budget, cut so that padding and the number of passes are in balance."""
    budgets, batch = token_budgets(request), length.global_batch_size.value
    if request.kind == "cpu":
        return [load_of(request, budget, batch, CPU_PASS_OVERHEAD_TOKENS) for budget in budgets]
    typical = load_of(request, budgets[0], batch, 0)
    every, offload = _checkpointing(request)[0]
    way = Way(method=method, optimizer=OPTIMIZER, checkpoint_every=every, offload=offload, token_budget=typical.budget)
    footprint = _footprint(request, way, typical, *kind)

    def seconds(tokens: float, passes: float) -> float:
        workload = training_of(request, replace(typical, tokens=tokens, passes=passes), 1)
        return time_of(request, footprint, workload).step_seconds

    # A pass costs what its kernels take to launch, or to read the weights where there are tokens enough to wait for;
    # rows of all lengths are in between.
    many, few = 10.0**7, 1_000.0
    per_token = (seconds(2 * many, 1) - seconds(many, 1)) / many
    launch, read = (seconds(1, 2 * few) - seconds(1, few)) / few, (seconds(many, few) - seconds(many, 1)) / few
    overheads = [round(cost / per_token) for cost in (read, math.sqrt(read * launch), launch)]
    best = min(
        (load_of(request, budgets[0], batch, overhead) for overhead in overheads),
        key=lambda load: seconds(load.tokens, load.passes),
    )
    # The smallest first, and none that is cut as a smaller one is: it would take more memory and be no faster.
    loads = [load_of(request, budget, batch, best.pass_overhead_tokens) for budget in reversed(budgets)]
    return list({(load.tokens, load.passes): load for load in reversed(loads)}.values())[::-1]


def _candidate(
    request: PlanRequest,
    length: LengthChoices,
    way: Way,
    load: Load,
    adapter: AdapterChoices,
    precision: PrecisionChoices,
) -> Candidate:
    updates = length.updates.value
    footprint = _footprint(request, way, load, adapter, precision, passes=load.passes * updates)
    evaluations = math.ceil(request.level.evals_per_epoch * length.epochs.value) + 1 if request.eval_rows else 0
    run = workload_of(request, load, updates, evaluations=evaluations, saves=0, save_bytes=0)
    terms = time_of(request, footprint, run).terms
    return Candidate(
        way=way,
        load=load,
        adapter=adapter,
        precision=precision,
        footprint=footprint,
        seconds=(terms["training"] + terms.get("evaluation", 0.0)) / updates,
    )


def _footprint(
    request: PlanRequest,
    way: Way,
    load: Load,
    adapter: AdapterChoices,
    precision: PrecisionChoices,
    *,
    passes: float = 1,
) -> Footprint:
    """The part of a way that decides memory; ``passes`` of the whole run."""
    return Footprint(
        method=way.method,
        quantization=precision.quantization.value,
        precision=precision.precision.value,
        rank=adapter.rank.value,
        targets=adapter.targets.value,
        dropout=adapter.dropout.value,
        tokens=load.most_tokens,
        width=load.most_width,
        packed=bool(request.config.train.packing),
        checkpoint_every=way.checkpoint_every,
        offload=way.offload,
        optimizer=way.optimizer,
        sharding=request.sharding,
        processes=request.processes,
        accumulates=load.passes > 1,
        # Every multiple of the padding occurs in a long run; passes of rows all alike are full ones and one last.
        shapes=2 if request.equally_long else max(1, min(load.most_tokens // request.pad_multiple, math.ceil(passes))),
        varlen=request.has_varlen,
        window=request.spec.window,
        threads=threads_of(request),
        vector_bf16=request.hardware.cpu.vector_bf16,
    )


def _ways(request: PlanRequest, optimizer: str, loads: list[Load]) -> Iterator[tuple[Way, Load]]:
    """Ways to run, the plainest first; what the user fixed stays fixed."""
    for method in _methods(request):
        for every, offload in _checkpointing(request):
            for load in loads:
                way = Way(
                    method=method,
                    optimizer=optimizer,
                    checkpoint_every=every,
                    offload=offload,
                    token_budget=load.budget,
                )
                yield way, load


def _optimizers(request: PlanRequest) -> list[str]:
    asked, device = request.config.train.optimizer, request.device.type
    if asked is not None:
        return [asked]
    if device == "mps" or request.sharding in SPLITS_WEIGHTS:
        return [OPTIMIZER]
    return [OPTIMIZER, OPTIMIZER_8BIT, *([OPTIMIZER_PAGED] if device == "cuda" else [])]


def _methods(request: PlanRequest) -> list[str]:
    """Full fine-tuning only when asked for: adapters learn as much from data that they have room for."""
    asked = request.config.train.method
    if asked is not None:
        return [asked]
    # bitsandbytes' 4-bit weights on Apple's GPUs have not been tried with a backward pass.
    quantizes = request.device.type != "mps" and request.sharding not in SPLITS_WEIGHTS
    return ["lora", "qlora"] if quantizes else ["lora"]


def _checkpointing(request: PlanRequest) -> list[tuple[int, bool]]:
    """Every n-th layer recomputed, and whether what it starts from waits in host memory; the plainest first."""
    train = request.config.train
    if train.activation_checkpointing is False:
        return [(0, False)]
    every = [2, 1] if train.checkpoint_every is None else [train.checkpoint_every]
    if train.activation_offload:
        return [(n, True) for n in every]
    asked = train.activation_checkpointing or train.checkpoint_every is not None
    ways = [*([] if asked else [(0, False)]), *((n, False) for n in every)]
    # A CPU has no other memory to move to, and Apple's GPUs share theirs.
    if train.activation_offload is None and request.device.type in ("cuda", "xpu"):
        ways.append((every[-1], True))
    return ways
