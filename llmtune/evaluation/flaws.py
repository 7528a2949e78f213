"""Answers that no loss tells of: those that are empty, repeat themselves or never end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Flaw = Literal["empty", "repeats", "endless"]
FLAWS: tuple[Flaw, ...] = get_args(Flaw)

# A loop is one n-gram of at most so many tokens, at least so often in a row, over at least so many tokens: a rule of
# dashes or "ha ha ha" is none. llmtune: chosen.
LONGEST_PERIOD, LEAST_REPEATS, LEAST_LOOP = 64, 4, 16
# An answer that stops at the limit is endless only where the reference takes at most this share of it. llmtune: chosen.
WELL_WITHIN = 0.25
# Flawed answers that decide: this share of all, or so much more often than the base model. llmtune: chosen.
MOST_FLAWED, MOST_MORE_FLAWED, LEAST_MORE_FLAWED = 0.5, 0.125, 2


def flaw_of(
    answer: Sequence[int], reference: Sequence[int], *, text: str, reference_text: str, stopped: bool, limit: int
) -> Flaw | None:
    """Return what is wrong with an answer as an answer, whatever it says; None where nothing is.

    What the reference does too is no flaw: an empty reference, a reference that repeats itself, a long reference.

    Args:
        answer: Token ids without the stop token.
        reference: Token ids of the answer in the data.
        text: The answer as text.
        reference_text: The reference as text.
        stopped: Whether the answer ended with a stop token.
        limit: Most new tokens that the answer could have.
    """
    if not text.strip():
        return "empty" if reference_text.strip() else None
    if loops(answer, cut=not stopped) and not loops(reference, cut=False):
        return "repeats"
    return "endless" if not stopped and len(reference) <= WELL_WITHIN * limit else None


def loops(tokens: Sequence[int], *, cut: bool) -> bool:
    """Return whether one n-gram, repeated back to back, makes up half of an answer, or the end of one that was cut."""
    ids = np.asarray(tokens, np.int64)
    count = len(ids)
    for period in range(1, min(LONGEST_PERIOD, count // LEAST_REPEATS) + 1):
        differs = np.flatnonzero(ids[period:] != ids[:-period])
        # Stretches in which each token equals the one a period before it, each with the first period itself.
        edges = np.concatenate([[-1], differs, [count - period]])
        stretches = np.diff(edges) - 1 + period
        least = max(LEAST_LOOP, LEAST_REPEATS * period)
        if stretches.max() >= max(least, count / 2) or (cut and stretches[-1] >= least):
            return True
    return False


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCheck:
    """Flaws of the answers of both models to the same prompts.

    Attributes:
        checked: Prompts.
        tuned: Flawed answers of the tuned model, by flaw.
        base: The same of the base model.
        spoiled: Prompts with a flawed answer of the tuned model alone.
        mended: Prompts with a flawed answer of the base model alone.
    """

    checked: int
    tuned: dict[str, int]
    base: dict[str, int]
    spoiled: int
    mended: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[str | None, str | None]]) -> AnswerCheck:
        """Count the flaws of (base, tuned) answers, prompt by prompt."""
        pairs = list(pairs)
        return cls(
            checked=len(pairs),
            tuned=_counts(after for _, after in pairs),
            base=_counts(before for before, _ in pairs),
            spoiled=sum(after is not None and before is None for before, after in pairs),
            mended=sum(before is not None and after is None for before, after in pairs),
        )

    @property
    def flawed(self) -> int:
        """Flawed answers of the tuned model."""
        return sum(self.tuned.values())

    @property
    def spoils_the_verdict(self) -> bool:
        """Whether the tuned model's answers are too often flawed to call it better, whatever its loss."""
        more = self.spoiled - self.mended
        return bool(self.checked) and (
            self.flawed >= MOST_FLAWED * self.checked or more >= max(LEAST_MORE_FLAWED, MOST_MORE_FLAWED * self.checked)
        )

    def to_json(self) -> dict[str, Any]:
        """Counts by model and flaw."""
        counts = {name: {flaw: of.get(flaw, 0) for flaw in FLAWS} for name, of in _both(self)}
        return {"checked": self.checked} | counts


def _counts(found: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(flaw for flaw in found if flaw in FLAWS))


def _both(check: AnswerCheck) -> tuple[tuple[str, dict[str, int]], ...]:
    return ("base", check.base), ("tuned", check.tuned)
