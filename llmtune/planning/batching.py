"""How many rows and tokens go through the model at once, and how much that is at most."""

from __future__ import annotations

import math

from llmtune.errors import ConfigError
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.memory import BYTES_PER_VALUE, Footprint
from llmtune.planning.request import PAD_MULTIPLE, PlanRequest

# Padded tokens per forward pass. CPU: 768–1,024 was fastest on 0.1–1B models on two AMX cores; one GPU is bound by
# kernel launches below 16k tokens at 1B.
TOKEN_BUDGET = {"cpu": 1024, "accelerator": 16384}

# What one forward and backward pass costs beside its tokens, in tokens. CPU: about 90 for a Llama of four layers, 256
# wide, on one AMX core, and less the wider a model is. Accelerators are bound by kernel launches: the fewest passes.
PASS_OVERHEAD_TOKENS = {"cpu": 64, "accelerator": None}

# Architectures of transformers whose attention is proven, per token, to keep packed rows apart (sliding windows too).
PACKABLE = frozenset({"llama", "mistral", "phi", "phi3", "qwen2", "qwen3"})

# Up to this hidden width one thread is faster than two: builtin:tiny (256 wide) took 0.32 s per update with one thread
# and 0.38 s with two that yield while waiting, on two AMX cores.
ONE_THREAD_UP_TO = 256


def threads(request: PlanRequest) -> Choice[int]:
    """CPU threads of one process."""
    cores = max(1, request.hardware.cpu.usable_cores // request.processes)
    if request.device.type != "cpu":
        chosen = Choice(cores, "cores per process; the accelerator does the arithmetic", "derived")
    elif request.spec.shape.hidden <= ONE_THREAD_UP_TO:
        reason = f"matrices {request.spec.shape.hidden} wide are done before a second thread has woken up"
        chosen = Choice(1, reason, "derived")
    else:
        chosen = Choice(cores, "usable cores per process", "derived")
    return asked_or(request.config.train.threads, "train.threads", chosen)


def token_budgets(request: PlanRequest) -> list[int]:
    """Budgets worth trying, largest first: what the user set, else the usual one and its halves down to one row."""
    asked, longest = request.config.train, request.longest
    if asked.token_budget is not None:
        return [asked.token_budget]
    if asked.micro_batch_size is not None:
        return [asked.micro_batch_size * longest]
    budgets = [max(_usual(request), longest)]
    while budgets[-1] // 2 > longest:
        budgets.append(budgets[-1] // 2)
    return budgets if budgets[-1] == longest else [*budgets, longest]


def token_budget(request: PlanRequest, budget: int, *, fits: bool) -> Choice[int]:
    """The budget that was taken, and why."""
    asked, longest, usual = request.config.train, request.longest, _usual(request)
    if asked.token_budget is not None:
        return Choice(budget, "you set train.token_budget", "user")
    if asked.micro_batch_size is not None:
        return Choice(
            budget, f"your train.micro_batch_size times the longest row, {longest:,} padded tokens", "derived"
        )
    if budget == longest > usual:
        reason = f"one longest row at a time; it has more tokens than the usual {usual:,}"
    elif not fits:
        reason = "one longest row at a time, which takes the least memory"
    elif budget == usual:
        reason = f"fills this {_kind(request)}: larger passes are not faster; no row is longer"
    else:
        reason = f"the fastest size that fits memory; the usual one is {usual:,}"
    return Choice(budget, reason, "derived")


def micro_batch_size(request: PlanRequest, budget: int, batch: int) -> Choice[int]:
    """Most rows per forward pass."""
    share = request.share(batch)
    reason = f"all {share} rows of an update on one process, as far as {budget:,} tokens hold them"
    return asked_or(request.config.train.micro_batch_size, "train.micro_batch_size", Choice(share, reason, "derived"))


def pad_multiple(request: PlanRequest) -> Choice[int]:
    """What widths of padded rows are multiples of."""
    reasons = {
        "cpu": "few different shapes: a CPU's matrix kernels are compiled anew for each, about 0.1 s",
        "accelerator": "tensor cores work on blocks of eight 2-byte values",
    }
    return Choice(PAD_MULTIPLE, reasons[request.kind], "derived")


def pass_overhead_tokens(request: PlanRequest) -> Choice[int | None]:
    """What a forward pass costs beside its tokens, in tokens."""
    overhead = PASS_OVERHEAD_TOKENS[request.kind]
    if overhead is None:
        return Choice(None, "an update takes the fewest passes: kernel launches cost more than padding", "derived")
    return Choice(overhead, "one more pass is worth it where it saves more padding than this", "derived")


def packing(request: PlanRequest, budget: int) -> Choice[bool]:
    """Whether rows are laid end to end instead of being padded."""
    if request.kind == "cpu":
        reason = (
            "padding costs less than the mask of a packed sequence: GSM8K took 1.2 to 1.4 times as long when packed"
        )
    else:
        reason = (
            f"attention over variable lengths is not there yet: a packed sequence of {budget:,} tokens would need a "
            "mask of its square"
        )
    return asked_or(request.config.train.packing, "train.packing", Choice(False, reason, "derived"))


def require_packable(request: PlanRequest) -> None:
    """Refuse packing where rows of one sequence are not proven to stay apart.

    Raises:
        ConfigError: ``train.packing`` with an architecture outside ``PACKABLE``, or with code from the Hub.
    """
    if not request.config.train.packing:
        return
    problem = None
    if request.spec.model_type not in PACKABLE:
        problem = (
            f"{request.spec.id} is of type '{request.spec.model_type}', and packed rows are proven to stay apart for "
            f"{', '.join(sorted(PACKABLE))} alone (state-space and linear attention run over the border of rows)"
        )
    elif request.config.model.trust_remote_code:
        problem = "the model may run its repository's own code (model.trust_remote_code), which may mix packed rows"
    if problem is not None:
        raise ConfigError("configuration", [f"train.packing: got true, but {problem}; leave it out, rows are padded"])


def packing_mask_bytes(request: PlanRequest, footprint: Footprint) -> int:
    """The masks of one packed sequence: a boolean one, and one as wide as the queries per layer kept for its backward.

    `torch.nn.functional.scaled_dot_product_attention` turns a boolean mask into one of the queries' type.
    """
    layers = 1 if footprint.checkpoint_every else request.spec.shape.layers
    return footprint.tokens**2 * (1 + BYTES_PER_VALUE[footprint.precision] * layers)


def accumulation(request: PlanRequest, budget: int, rows_per_pass: int, batch: int) -> Choice[int]:
    """Forward passes per update on one process, on average."""
    share = request.share(batch)
    passes = max(math.ceil(share / rows_per_pass), math.ceil(share * request.mean_length / budget))
    reason = f"passes that make up the {share} rows of an update on one process, on average; the batch stays exact"
    return Choice(passes, reason, "derived")


def most_tokens(request: PlanRequest, budget: int, rows_per_pass: int, batch: int) -> int:
    """Padded tokens of the largest forward pass: both limits hold, and a row above the budget goes alone."""
    rows = min(rows_per_pass, request.share(batch))
    return min(max(budget, request.longest), rows * request.longest)


def _kind(request: PlanRequest) -> str:
    return "CPU" if request.kind == "cpu" else "accelerator"


def _usual(request: PlanRequest) -> int:
    return TOKEN_BUDGET[request.kind]
