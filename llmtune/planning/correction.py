"""What was measured about earlier predictions, and how it mends the next ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """Factors on what the formulas say.

    Attributes:
        memory: Measured over predicted bytes of everything that is not there before training: the formula's tensors
            less the weights.
        seconds: Measured over predicted seconds of one update.
        basis: What they rest on: ``none``, ``runs`` (earlier runs on this machine) or ``probe`` (this very run).
        reason: In words, for the choices that depend on them.
    """

    memory: float
    seconds: float
    basis: str
    reason: str


NO_CORRECTION = Correction(
    memory=1.0, seconds=1.0, basis="none", reason="nothing has been measured on this machine yet"
)
