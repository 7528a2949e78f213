"""How many rows and tokens go through the model at once, and how much that is at most."""

from __future__ import annotations

import math

from llmtune.data import padded
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest

# Padded tokens per forward pass. CPU: 768–1,024 was fastest on 0.1–1B models on two AMX cores; one GPU is bound by
# kernel launches below 16k tokens at 1B.
TOKEN_BUDGET = {"cpu": 1024, "accelerator": 16384}

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
    share, median = request.share(batch), padded(request.stats.length_p50)
    rows = max(1, budget // median)
    if rows >= share:
        reason = f"all {share} rows of an update on one process, as far as {budget:,} tokens hold them"
    else:
        reason = f"{budget:,} tokens hold {rows} rows of the median length, {median} padded tokens"
    return asked_or(
        request.config.train.micro_batch_size, "train.micro_batch_size", Choice(min(rows, share), reason, "derived")
    )


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
    return "CPU" if request.device.type == "cpu" else "accelerator"


def _usual(request: PlanRequest) -> int:
    return TOKEN_BUDGET[_kind(request).lower()]
