"""Peak learning rate from the model's width, the method, the adapter and the length of the run.

The formula is that of LoRA Without Regret (Schulman et al., Thinking Machines, 2025) and its cookbook:
``5e-5 · t · (2000 / hidden)^e``, where ``e`` depends on the family and ``t`` is 1 for full fine-tuning and 10 for LoRA,
15 in short runs. It was found with ``alpha = 32`` and ``1 / rank`` scaling, so the rate does not depend on the rank;
where a preset scales by a fixed ``alpha / rank``, the rate falls with alpha. For Adam the rate grows with the square root
of the batch (Malladi et al., arXiv:2205.10287).
"""

from __future__ import annotations

import math

BASE_RATE, REFERENCE_WIDTH, REFERENCE_ALPHA, REFERENCE_BATCH = 5e-5, 2000, 32, 32
# LoRA over full fine-tuning: in runs of up to so many updates, and from so many on; between them by the logarithm.
SHORT_TIMES, LONG_TIMES = 15.0, 10.0
SHORT_UPDATES, LONG_UPDATES = 100, 1_000
# The batch changes the rate by at most these factors: beyond, noise no longer rules the step. llmtune: chosen.
LEAST_BATCH_FACTOR, MOST_BATCH_FACTOR = 0.5, 1.5
# Fast runs end early and take larger steps; careful ones take more and smaller steps. llmtune: chosen.
GOAL_FACTORS = {"highspeed": 1.25, "quality": 1.0, "bestaccuracy": 0.75}
# Rates that differ from the usual one by more than this factor are warned of.
FAR_OFF = 30


def peak_rate(
    *, hidden: int, exponent: float, method: str, alpha: int, batch: int, updates: int, goal: str = "quality"
) -> float:
    """Return the peak learning rate, rounded to two digits.

    Args:
        hidden: Width of the residual stream.
        exponent: How strongly the rate falls with the width in this family.
        method: ``lora``, ``qlora`` or ``full``.
        alpha: The adapter's alpha; of no effect under full fine-tuning.
        batch: Rows of one update.
        updates: Updates of the run.
        goal: ``highspeed``, ``quality`` or ``bestaccuracy``.
    """
    rate = BASE_RATE * (REFERENCE_WIDTH / hidden) ** exponent * batch_factor(batch) * GOAL_FACTORS[goal]
    if method != "full":
        rate *= lora_times(updates) * REFERENCE_ALPHA / alpha
    return float(f"{rate:.1e}")


def lora_times(updates: int) -> float:
    """Return how many times the rate of full fine-tuning LoRA takes in a run of so many updates."""
    share = math.log(max(updates, 1) / SHORT_UPDATES) / math.log(LONG_UPDATES / SHORT_UPDATES)
    return SHORT_TIMES + (LONG_TIMES - SHORT_TIMES) * min(1.0, max(0.0, share))


def batch_factor(batch: int) -> float:
    """Return the factor for a batch of so many rows."""
    return min(MOST_BATCH_FACTOR, max(LEAST_BATCH_FACTOR, math.sqrt(batch / REFERENCE_BATCH)))
