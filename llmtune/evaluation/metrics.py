"""Measures of generated answers against references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# What a user hands over in ``metrics={"name": fn}``: answers and references of the same rows, in order -> one number.
Metric = Callable[[Sequence[str], Sequence[str]], float]


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Share of answers equal to their reference, white space at the ends aside; in [0, 1]."""
    if not references:
        return 0.0
    hits = sum(answer.strip() == reference.strip() for answer, reference in zip(answers, references, strict=True))
    return hits / len(references)


# Its value times the rows is a number of rows, which is what people are told: "61 of 64".
exact_match.counts_rows = True  # type: ignore[attr-defined]


def counts_rows(metric: Metric) -> bool:
    """Return whether a metric is the share of rows that are right, as its attribute ``counts_rows`` says."""
    return bool(getattr(metric, "counts_rows", False))
