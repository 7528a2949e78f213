"""Learning rates of transformers' schedules, with a warm-up that starts above zero.

Of a schedule of n updates with w updates of warm-up, update i (counted from 1) has the rate::

    i <= w    peak × i / w                   equal steps; update w has the peak
    i > w     the schedule's formula after i - 1 updates: the peak at update w + 1, and the end value after n updates

transformers starts its warm-up at zero, so that its first update changes nothing. What follows the warm-up is
transformers' own, to the bit. The last update therefore has the last rate before the end value (zero for ``linear`` and
``cosine``, ``lr_end`` for ``polynomial``), which itself is the rate after n updates. Where warm-up takes all updates,
the last of them has the peak.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.optim.lr_scheduler import LambdaLR

Formula = Callable[[int], float]


def warm_from_the_first_update(scheduler: Any, *, warmup: int, updates: int) -> Any:
    """Return ``scheduler`` with a warm-up that starts above zero.

    A schedule without warm-up, or with one that starts above zero already, is returned as it is.

    Args:
        scheduler: As transformers has made it for an optimizer that has not stepped yet.
        warmup: Updates of warm-up.
        updates: Updates of the whole schedule.
    """
    if warmup < 1 or not isinstance(scheduler, LambdaLR):
        return scheduler
    if all(formula(0) > 0 for formula in scheduler.lr_lambdas):
        return scheduler
    # As transformers does it: a partial object has no attributes, so a checkpoint cannot bring back an old formula.
    formulas: list[Formula] = [
        partial(share_of_peak, formula=of, warmup=warmup, updates=updates) for of in scheduler.lr_lambdas
    ]
    return LambdaLR(scheduler.optimizer, formulas)


def share_of_peak(done: int, *, formula: Formula, warmup: int, updates: int) -> float:
    """Return the learning rate of the update after ``done`` others, as a share of the peak.

    Args:
        done: Updates made so far.
        formula: The schedule of transformers: a share of the peak for each number of updates made.
        warmup: Updates of warm-up.
        updates: Updates of the whole schedule.
    """
    if done + 1 < warmup:
        return formula(done + 1)  # transformers' warm-up, one update ahead: also cosine and square-root shapes
    if done + 1 == warmup or warmup >= updates:
        return 1.0
    return formula(done)
