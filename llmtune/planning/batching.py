"""How many rows and tokens go through the model at once, and how much that is at most."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmtune.data import micro_batches
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest

# Padded tokens per forward pass. CPU: 768-1,024 was fastest on 0.1-1B models on two AMX cores; one GPU is bound by
# kernel launches below 16k tokens at 1B.
TOKEN_BUDGET = {"cpu": 1024, "accelerator": 16384}

# What one forward and backward pass costs beside its tokens, in tokens, on a CPU: about 90 for a Llama of four layers,
# 256 wide, on one AMX core, and less the wider a model is.
CPU_PASS_OVERHEAD_TOKENS = 64

# Architectures of transformers whose attention is proven, per token, to keep packed rows apart (sliding windows too).
PACKABLE = frozenset({"gemma2", "gemma3_text", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "smollm3"})

# Rows of the typical update that padding is reckoned on; more rows hardly pad less (2.5 % of GSM8K at 256).
TYPICAL_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What one process computes in a typical update under one token budget.

    Attributes:
        budget: The token budget.
        pass_overhead_tokens: What a pass costs beside its tokens, in tokens.
        tokens: Padded tokens of its share of the update.
        passes: Forward passes, on average.
        width: Padded tokens of a sequence, on average; where rows are packed, those that one of them attends over.
        most_tokens: Padded tokens of the largest forward pass there can be.
        most_width: Padded tokens of the longest sequence in it.
        shapes: Different numbers of rows and widths among the passes of one update.
    """

    budget: int
    pass_overhead_tokens: int
    tokens: float
    passes: float
    width: float
    most_tokens: int
    most_width: int
    shapes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchChoices:
    """How the rows of one update are cut into forward passes."""

    micro_batch_size: Choice[int]
    packing: Choice[bool]
    pad_multiple: Choice[int]
    pass_overhead_tokens: Choice[int]
    accumulation: Choice[int]


def choose_batches(request: PlanRequest, load: Load, batch: int) -> BatchChoices:
    """Everything about forward passes that follows from the token budget that was taken."""
    share = request.share(batch)
    together = f"all {share} rows of an update on one process, as far as {load.budget:,} tokens hold them"
    passes = f"passes that make up the {share} rows of an update on one process, on average; the batch stays exact"
    return BatchChoices(
        micro_batch_size=asked_or(
            request.config.train.micro_batch_size, "train.micro_batch_size", Choice(share, together, "derived")
        ),
        packing=_packing(request, load),
        pad_multiple=_pad_multiple(request),
        pass_overhead_tokens=_pass_overhead_tokens(request, load),
        accumulation=Choice(math.ceil(load.passes), passes, "derived"),
    )


def token_budgets(request: PlanRequest) -> list[int]:
    """Budgets worth trying, largest first: what the user set, else the usual one, 3/4, 1/2, 3/8 … down to one row."""
    asked, longest = request.config.train, request.longest
    if asked.token_budget is not None:
        return [asked.token_budget]
    if asked.micro_batch_size is not None:
        return [asked.micro_batch_size * longest]
    budgets = [max(TOKEN_BUDGET[request.kind], longest)]
    while (next_one := _next_budget(budgets)) > longest:
        budgets.append(next_one)
    return budgets if budgets[-1] == longest else [*budgets, longest]


def _next_budget(budgets: list[int]) -> int:
    """Three quarters of the largest, then half of the last but one, in turn."""
    return budgets[0] * 3 // 4 if len(budgets) == 1 else budgets[-2] // 2


def why_budget(request: PlanRequest, budget: int, *, fits: bool, short_of_memory: bool) -> Choice[int]:
    """The budget that was taken, and why; ``short_of_memory``: a larger one would be faster and does not fit."""
    asked, longest, usual = request.config.train, request.longest, TOKEN_BUDGET[request.kind]
    if asked.token_budget is not None:
        return Choice(budget, "you set train.token_budget", "user")
    if asked.micro_batch_size is not None:
        reason = f"your train.micro_batch_size times the longest row, {longest:,} padded tokens"
        return Choice(budget, reason, "derived")
    if budget == longest > usual:
        reason = f"one longest row at a time; it has more tokens than the usual {usual:,}"
    elif not fits:
        reason = "one longest row at a time, which takes the least memory"
    elif short_of_memory:
        reason = f"the fastest size that fits memory; the usual one is {usual:,}"
    elif budget == usual:
        kind = "CPU" if request.kind == "cpu" else "accelerator"
        reason = f"fills this {kind}: larger passes are not faster; no row is longer"
    else:
        reason = f"as fast as the usual {usual:,} on rows of these lengths, and takes less memory"
    return Choice(budget, reason, "derived")


def load_of(request: PlanRequest, budget: int, batch: int, overhead: int) -> Load:
    """What a typical update comes to: rows of the lengths that the data has, cut as training cuts them.

    Args:
        request: The facts.
        budget: Most padded tokens of a pass.
        batch: Rows of an update, over all processes.
        overhead: What a pass costs beside its tokens, in tokens.
    """
    share = request.share(batch)
    asked = request.config.train.micro_batch_size
    rows = share if asked is None else min(asked, share)
    # Both limits hold, and a row above the budget goes alone.
    most = min(max(budget, request.longest), rows * request.longest)
    if request.config.train.packing:
        passes = max(math.ceil(share / rows), math.ceil(share * request.mean_length / budget))
        tokens = share * request.mean_length
        return Load(
            budget=budget,
            pass_overhead_tokens=overhead,
            tokens=tokens,
            passes=passes,
            width=request.mean_length if has_documents(request) else most,
            most_tokens=most,
            most_width=min(most, request.longest),
            shapes=passes,
        )
    lengths = request.typical_lengths(min(share, TYPICAL_ROWS))
    pieces = micro_batches(
        lengths,
        range(len(lengths)),
        token_budget=budget,
        max_rows=rows,
        pad_multiple=request.pad_multiple,
        pass_overhead_tokens=overhead,
    )
    shapes = [(len(piece), request.padded(int(max(lengths[row] for row in piece)), len(piece))) for piece in pieces]
    padded_tokens = sum(count * width for count, width in shapes)
    per_row = request.mean_length * padded_tokens / float(lengths.sum())
    return Load(
        budget=budget,
        pass_overhead_tokens=overhead,
        tokens=per_row * share,
        passes=len(pieces) * share / len(lengths),
        width=per_row,
        most_tokens=most,
        most_width=min(most, request.longest),
        shapes=len(set(shapes)),
    )


def has_documents(request: PlanRequest) -> bool:
    """Whether attention takes packed rows one by one here; else every token attends over the sequence, masked."""
    return request.sharding is None and (request.kind == "cpu" or request.has_varlen)


def packing_problem(request: PlanRequest) -> list[str]:
    """Why packing is refused: rows of one sequence are not proven to stay apart."""
    if not request.config.train.packing:
        return []
    if request.spec.model_type not in PACKABLE:
        problem = (
            f"{request.spec.id} is of type '{request.spec.model_type}', and packed rows are proven to stay apart for "
            f"{', '.join(sorted(PACKABLE))} alone (state-space and linear attention run over the border of rows)"
        )
    elif request.config.model.trust_remote_code:
        problem = "the model may run its repository's own code (model.trust_remote_code), which may mix packed rows"
    else:
        return []
    return [f"train.packing: got true, but {problem}; leave it out, rows are padded"]


def _packing(request: PlanRequest, load: Load) -> Choice[bool]:
    """Whether rows are laid end to end instead of being padded."""
    padding = f"rows of about one length go together: padding adds {load.width / request.mean_length - 1:.0%} to them"
    if not has_documents(request):
        reason = f"here a packed sequence of {load.budget:,} tokens would need a mask of its square"
    elif request.kind == "cpu":
        # Llama, 576 wide, six layers, LoRA, passes of 1,024 tokens, 32 rows of 145 and of 230 tokens on average; one
        # AMX core, processor time.
        reason = f"{padding}, and packed rows took 0.99 to 1.01 times as long"
    else:
        reason = f"{padding}, and packing was not timed on an accelerator"
    return asked_or(request.config.train.packing, "train.packing", Choice(False, reason, "derived"))


def _pad_multiple(request: PlanRequest) -> Choice[int]:
    """What the tokens of passes are multiples of."""
    reasons = {
        "cpu": "few different sizes: a CPU's matrix kernels are compiled anew for each, about 0.1 s",
        "accelerator": "tensor cores work on blocks of eight 2-byte values",
    }
    return Choice(request.pad_multiple, reasons[request.kind], "derived")


def _pass_overhead_tokens(request: PlanRequest, load: Load) -> Choice[int]:
    """What a forward pass costs beside its tokens, in tokens."""
    overhead = load.pass_overhead_tokens
    if request.kind == "cpu":
        return Choice(overhead, "one more pass is worth it where it saves more padding than this", "derived")
    reason = (
        "launching the kernels and reading the weights of one more pass take about as long as so many tokens; it is "
        "worth it where it saves more padding"
    )
    return Choice(overhead, reason, "derived")
