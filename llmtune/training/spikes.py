"""Spikes of loss and gradient norm, told from the noise around them by medians. Imports no torch.

Everything is done in logarithms, so that a factor counts the same at a loss of 10 and of 0.1. One quantity is compared
with the median of the `LEVEL` values before it, which follows its trend; how far values usually stray from that is the
median absolute deviation over the last `WINDOW` of them. What strays further than ``threshold`` times that is a spike.
Where noise has heavy tails, so that ordinary values stray far now and then, the limit rises with the worst of them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

# Values that the present level is the median of: short, so that a trend of the first updates is followed.
LEVEL = 16
# Deviations that the usual noise is estimated from.
WINDOW = 128
# Nothing is judged before so many deviations: the worst of 32 is what the limit rises with.
LEAST = 32
# Makes the median absolute deviation that of a normal distribution: 1 / Phi^-1(3/4).
NORMAL = 1.4826
# What the worst of WINDOW normal values comes to, in standard deviations (its median is 2.8, rounded up).
USUAL_WORST = 3.0
# The limit never rises beyond so many times the threshold, whatever happened at the start (an estimate).
MOST_RISE = 3.0
# Noise below this is taken for this much, in logarithms: a loss that hardly varies does not spike at 1.3 times itself
# (an estimate; at the default threshold of 8 a spike is at least a factor of 1.5).
LEAST_NOISE = 0.05
# Up to so much noise above its level a gradient is ordinary; a spike is clipped to that.
ORDINARY = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deviation:
    """One value against its recent past.

    Attributes:
        z: How far above its level it is, by the usual noise.
        limit: From which ``z`` on it counts as a spike.
        level: What is usual, in the unit of the value.
        ordinary: The largest that is still ordinary, in the unit of the value.
    """

    z: float
    limit: float
    level: float
    ordinary: float

    @property
    def spikes(self) -> bool:
        """Whether it is no noise any more."""
        return self.z > self.limit


class Track:
    """The recent past of one positive quantity; a value that is not finite or not above zero never enters it.

    Args:
        threshold: Robust z-score from which on a value is a spike, where noise has no heavy tails.
    """

    def __init__(self, threshold: float) -> None:
        self._threshold = threshold
        self._values: deque[float] = deque(maxlen=LEVEL)
        self._strays: deque[float] = deque(maxlen=WINDOW)

    def judge(self, value: float) -> Deviation | None:
        """``value`` against what is usual; None where it says nothing, or too little is known yet."""
        if not _tells(value) or len(self._strays) < LEAST:
            return None
        level = median(self._values)
        noise = max(NORMAL * median(map(abs, self._strays)), LEAST_NOISE)
        worst = max(self._strays) / noise
        return Deviation(
            z=(math.log(value) - level) / noise,
            limit=self._threshold * min(max(1.0, worst / USUAL_WORST), MOST_RISE),
            level=_exp(level),
            ordinary=_exp(level + ORDINARY * noise),
        )

    def take_in(self, value: float) -> None:
        """Count an ordinary value among the recent ones."""
        if not _tells(value):
            return
        logarithm = math.log(value)
        if len(self._values) == LEVEL:
            self._strays.append(logarithm - median(self._values))
        self._values.append(logarithm)

    def state(self) -> dict[str, list[float]]:
        """What a checkpoint keeps of it."""
        return {"values": list(self._values), "strays": list(self._strays)}

    def restore(self, kept: Mapping[str, Sequence[float]]) -> None:
        """Go on from what a checkpoint kept."""
        self._values = deque(kept["values"], maxlen=LEVEL)
        self._strays = deque(kept["strays"], maxlen=WINDOW)


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """One update whose loss or gradient norm is no noise any more.

    Attributes:
        of: ``loss``, ``gradient norm`` or ``loss and gradient norm``.
        loss: How the loss deviates; None where nothing is known.
        grad_norm: The same of the gradient norm, before clipping.
    """

    of: str
    loss: Deviation | None
    grad_norm: Deviation | None


class SpikeDetector:
    """Compares every update with those before it.

    Args:
        threshold: See `Track`.
        wait: Updates at the start that are taken in but not judged: while the learning rate warms up, loss and gradient
            norm do not go on as before.
    """

    def __init__(self, *, threshold: float, wait: int) -> None:
        self._wait = wait
        self._loss, self._norm = Track(threshold), Track(threshold)

    def see(self, step: int, loss: float, grad_norm: float) -> Spike | None:
        """Judge one update, and take it in unless it is a spike.

        Args:
            step: Updates done before it.
            loss: Mean negative log likelihood, in nats.
            grad_norm: Norm of all gradients before clipping.
        """
        judged = step >= self._wait
        by_loss, by_norm = (
            track.judge(value) if judged else None for track, value in ((self._loss, loss), (self._norm, grad_norm))
        )
        found = [
            name for name, one in (("loss", by_loss), ("gradient norm", by_norm)) if one is not None and one.spikes
        ]
        if found:
            return Spike(of=" and ".join(found), loss=by_loss, grad_norm=by_norm)
        self._loss.take_in(loss)
        self._norm.take_in(grad_norm)
        return None

    def state(self) -> dict[str, dict[str, list[float]]]:
        """What a checkpoint keeps of it."""
        return {"loss": self._loss.state(), "grad_norm": self._norm.state()}

    def restore(self, kept: Mapping[str, Mapping[str, Sequence[float]]]) -> None:
        """Go on from what a checkpoint kept."""
        self._loss.restore(kept["loss"])
        self._norm.restore(kept["grad_norm"])


def _tells(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _exp(logarithm: float) -> float:
    return math.exp(min(logarithm, 700.0))  # beyond that a float is infinite
