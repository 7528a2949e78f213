"""Peak learning rate for the model, the method, the adapter and the run at hand.

A preset gives the rate of LoRA for one width, rank 16 with alpha 32, `REFERENCE_BATCH` and runs of `LONG_UPDATES` or
more. It is carried over with these factors:

- width: ``(2000 / hidden) ^ e``, and LoRA at 10 times the rate of full fine-tuning, 15 times in short runs (LoRA
  Without Regret, Schulman et al., Thinking Machines, 2025, and its cookbook);
- rank and alpha: learning is stable over ranks where ``alpha / sqrt(rank)`` times the rate is constant (rsLoRA,
  Kalajdzievski, arXiv:2312.03732);
- batch: for Adam the rate grows with its square root (Malladi et al., arXiv:2205.10287).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from llmtune.presets.facts import RateRule

REFERENCE_RANK, REFERENCE_ALPHA, REFERENCE_BATCH = 16, 32, 32
# Narrower models take the rate of this width: the formula rises without end, and builtin:tiny (256 wide) leaves fields
# unlearned above 1e-3. llmtune: chosen, the width of SmolLM2-135M, the narrowest model whose rates were compared.
LEAST_WIDTH = 576
# LoRA over full fine-tuning: in runs of up to so many updates, and from so many on; between them by the logarithm.
SHORT_TIMES, LONG_TIMES = 15.0, 10.0
SHORT_UPDATES, LONG_UPDATES = 100, 1_000
# The batch changes the rate by at most these factors: beyond, noise no longer rules the step. llmtune: chosen.
LEAST_BATCH_FACTOR, MOST_BATCH_FACTOR = 0.5, 1.5
# A rate that differs from the usual one by more than this factor is warned of. llmtune: chosen.
FAR_OFF = 30.0


def rate_factors(
    rule: RateRule, *, hidden: int, method: str, rank: int, alpha: int, batch: int, updates: int
) -> Mapping[str, float]:
    """Return what the preset's rate is multiplied by, with the reason for each factor that is not 1.

    Args:
        rule: Of the preset.
        hidden: Width of the residual stream.
        method: ``lora``, ``qlora`` or ``full``.
        rank: Of the adapter; without effect under full fine-tuning, as is ``alpha``.
        alpha: Of the adapter.
        batch: Rows of one update.
        updates: Updates of the run.
    """
    factors = {
        f"width {hidden:,} instead of {rule.hidden:,}": (rule.hidden / max(hidden, LEAST_WIDTH)) ** rule.exponent
    }
    factors[f"{batch} rows per update instead of {REFERENCE_BATCH}"] = batch_factor(batch)
    if method == "full":
        factors["full fine-tuning"] = 1 / LONG_TIMES
    else:
        factors[f"{updates:,} updates"] = lora_times(updates) / LONG_TIMES
        scale, usual = alpha / math.sqrt(rank), REFERENCE_ALPHA / math.sqrt(REFERENCE_RANK)
        factors[f"rank {rank} with alpha {alpha}"] = usual / scale
    return {why: factor for why, factor in factors.items() if factor != 1}


def lora_times(updates: int) -> float:
    """Return how many times the rate of full fine-tuning LoRA takes in a run of so many updates."""
    share = math.log(max(updates, 1) / SHORT_UPDATES) / math.log(LONG_UPDATES / SHORT_UPDATES)
    return SHORT_TIMES + (LONG_TIMES - SHORT_TIMES) * min(1.0, max(0.0, share))


def batch_factor(batch: int) -> float:
    """Return the factor for a batch of so many rows."""
    return min(MOST_BATCH_FACTOR, max(LEAST_BATCH_FACTOR, math.sqrt(batch / REFERENCE_BATCH)))


def rounded(rate: float) -> float:
    """Return a rate of two digits."""
    return float(f"{rate:.1e}")
