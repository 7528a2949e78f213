"""What was measured before the first update of a run: at most two passes, one evaluation, one save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One micro-batch forward and backward, as the slowest and the fullest of all ranks saw it.

    Attributes:
        worst: Whether it was the largest that ``token_budget`` allows; else a typical one.
        token_budget: The budget it was cut for, in padded tokens.
        rows: Its rows.
        tokens: Its padded tokens.
        peak_bytes: Highest use of the device, or resident set on a CPU, of all that was there.
        seconds: From the start of the forward pass to the end of the backward one.
        ran_out: Whether memory ran out; then ``peak_bytes`` and ``seconds`` say how far it came.
    """

    worst: bool
    token_budget: int
    rows: int
    tokens: int
    peak_bytes: int
    seconds: float
    ran_out: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the probe and the rehearsals of one run found.

    Attributes:
        device: Name of the processor or accelerator.
        parameters: Of the model.
        passes: What was run; at most two.
        loaded_bytes: Use of the device, or resident set, before the first pass: interpreter, weights, adapter.
        loaded_tensor_bytes: As ``loaded_bytes``, of tensors alone where the device tells them apart.
        gradient_bytes: What the gradients of the trained weights take.
        longest_tokens: Padded tokens of the longest row: no budget can go below it.
        predicted_bytes: What the formula says, uncorrected, of everything that is not there before training.
        predicted_pass_bytes: What the formula says, uncorrected, of the largest pass, gradients included.
        predicted_step_seconds: What the formula says, uncorrected, of one update.
        update_tokens: Padded tokens of one process in one update under the budget settled on, on average.
        update_passes: Forward passes of one process in one update under that budget, on average.
        optimizer_seconds: One step of the optimizer.
        evaluation_seconds: One whole evaluation, reckoned from a few rows; None without evaluation data.
        save_seconds: One checkpoint, reckoned from the result's files.
        result_bytes: The result's files.
    """

    device: str
    parameters: int
    passes: tuple[Pass, ...]
    loaded_bytes: int
    loaded_tensor_bytes: int
    gradient_bytes: int
    longest_tokens: int
    predicted_bytes: int
    predicted_pass_bytes: int
    predicted_step_seconds: float
    update_tokens: float
    update_passes: float
    optimizer_seconds: float
    evaluation_seconds: float | None
    save_seconds: float
    result_bytes: int

    @property
    def step_seconds(self) -> float | None:
        """One update: its padded tokens at the rate of the passes that got through; None if none did.

        The first pass of a shape compiles kernels. Where two are alike the later one counts, else both: a run of many
        shapes meets new ones again and again.
        """
        timed = [one for one in self.passes if not one.ran_out]
        if not timed:
            return None
        if timed[0].tokens == timed[-1].tokens:
            timed = timed[-1:]
        rate = sum(one.seconds for one in timed) / sum(one.tokens for one in timed)
        return self.update_tokens * rate + self.optimizer_seconds

    @property
    def memory_factor(self) -> float:
        """Measured over predicted bytes of the largest pass; one that ran out of memory tells the least it can be."""
        worst = next((one for one in self.passes if one.worst and not one.ran_out), self.passes[0])
        predicted = self.predicted_pass_bytes * worst.tokens / self.passes[0].tokens
        return max(worst.peak_bytes - self.loaded_bytes, 1) / max(predicted, 1.0)

    def to_json(self) -> dict[str, Any]:
        """The ``measured`` object of a plan."""
        return asdict(self) | {"passes": [asdict(one) for one in self.passes]}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """The inverse of ``to_json``."""
        return cls(**{**document, "passes": tuple(Pass(**one) for one in document["passes"])})
