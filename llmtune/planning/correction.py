"""What was measured about earlier predictions, and how it mends the next ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from llmtune.planning.measurement import Measurement

# Runs that count at most, the newest: drivers and libraries change what older ones say.
NEWEST = 5
# Models of what size teach something about another: within this factor of parameters.
SIZE_FACTOR = 4.0
# A factor beyond these says more about what else went on than about the formulas. Estimates.
MEMORY_RANGE, SECONDS_RANGE = (0.8, 2.0), (0.25, 4.0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """What one run has shown about the formulas.

    Attributes:
        device: Name of the processor or accelerator it ran on.
        precision: bf16, fp16, tf32 or fp32 arithmetic.
        quantization: nf4, int8 or None.
        parameters: Of its model.
        memory: Measured over predicted bytes, see `Correction`.
        seconds: Measured over predicted seconds of one update.
    """

    device: str
    precision: str
    quantization: str | None
    parameters: int
    memory: float
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The ``experience`` object of ``run.json``."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Experience:
        """The inverse of ``to_json``.

        Raises:
            TypeError: Keys are missing or unknown: another version wrote it.
        """
        return cls(**document)


def experience(
    measured: Measurement,
    *,
    precision: str,
    quantization: str | None,
    step_seconds: float | None,
    peak_bytes: int | None,
) -> Experience:
    """What a run teaches: its own updates where it made any, and its probe, whose passes were larger.

    Args:
        measured: What its probe found.
        precision: Of its plan.
        quantization: Of its plan.
        step_seconds: A usual update of it.
        peak_bytes: Most that its updates took, of tensors; None where they were not those that were predicted.
    """
    grown = 0 if peak_bytes is None else peak_bytes - measured.loaded_tensor_bytes
    memory = max(measured.memory_factor, grown / max(measured.predicted_bytes, 1))
    took = step_seconds or measured.step_seconds or measured.predicted_step_seconds
    return Experience(
        device=measured.device,
        precision=precision,
        quantization=quantization,
        parameters=measured.parameters,
        memory=memory,
        seconds=took / max(measured.predicted_step_seconds, 1e-9),
    )


def correction(
    experiences: Sequence[Experience], *, device: str, precision: str, quantization: str | None, parameters: int
) -> Correction:
    """The median of the newest runs that resemble what is planned.

    Args:
        experiences: Of runs on this machine, newest first.
        device: Name of the processor or accelerator that will train.
        precision: Of the plan.
        quantization: Of the plan.
        parameters: Of the model.
    """
    alike = [
        one
        for one in experiences
        if (one.device, one.precision, one.quantization) == (device, precision, quantization)
        and max(one.parameters, parameters) <= SIZE_FACTOR * max(1, min(one.parameters, parameters))
    ][:NEWEST]
    if not alike:
        return NO_CORRECTION
    memory = _within(median(one.memory for one in alike), MEMORY_RANGE)
    seconds = _within(median(one.seconds for one in alike), SECONDS_RANGE)
    runs = f"{len(alike)} earlier runs" if len(alike) > 1 else "one earlier run"
    reason = f"{runs} here with a model of similar size took {memory:.2f} times the memory and {seconds:.2f} times the"
    return Correction(memory=memory, seconds=seconds, basis="runs", reason=f"{reason} time that the formulas say")


def _within(value: float, limits: tuple[float, float]) -> float:
    return min(max(value, limits[0]), limits[1])
