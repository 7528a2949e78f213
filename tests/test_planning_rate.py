"""The peak learning rate: from the width, the adapter, the batch and the length of the run."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtune.planning.rate import batch_factor, lora_times, rate_factors
from llmtune.presets import Preset
from llmtune.presets.facts import RateRule

LLAMA = RateRule(hidden=4096, exponent=0.781, source="s")
USUAL = {"hidden": 4096, "method": "lora", "rank": 16, "alpha": 32, "batch": 32, "updates": 1_000}


def factor(**changes: object) -> float:
    return math.prod(rate_factors(LLAMA, **(USUAL | changes)).values())


def test_the_rate_of_the_preset_is_for_the_usual_run() -> None:
    assert rate_factors(LLAMA, **USUAL) == {}


@pytest.mark.parametrize(
    ("hidden", "rate"), [(2000, 5.0e-4), (576, 1.32e-3), (2048, 4.91e-4), (4096, 2.86e-4), (8192, 1.66e-4)]
)
def test_long_runs_of_llama_take_the_rate_of_the_cookbook(hidden: int, rate: float) -> None:
    preset = Preset.load("llama")
    assert preset.rate is not None
    factors = rate_factors(preset.rate, **(USUAL | {"hidden": hidden}))
    level = preset.level("quality", "large")
    assert level.learning_rate * math.prod(factors.values()) == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(("hidden", "rate"), [(896, 5.32e-4), (3584, 4.78e-4), (5120, 4.65e-4)])
def test_long_runs_of_qwen_do_too(hidden: int, rate: float) -> None:
    preset = Preset.load("qwen")
    assert preset.rate is not None
    factors = rate_factors(preset.rate, **(USUAL | {"hidden": hidden}))
    assert preset.level("quality", "large").learning_rate * math.prod(factors.values()) == pytest.approx(rate, rel=0.02)


def test_narrow_models_take_the_rate_of_the_narrowest_that_was_tried() -> None:
    assert factor(hidden=32) == factor(hidden=576) > factor(hidden=577)


def test_short_runs_take_half_as_much_again_and_full_fine_tuning_a_tenth() -> None:
    assert factor(updates=20) == factor(updates=100) == pytest.approx(1.5)
    assert factor(updates=5_000) == pytest.approx(1.0)
    assert factor(method="full") == pytest.approx(0.1)
    assert factor(method="full", updates=20, rank=64, alpha=8) == pytest.approx(0.1)
    assert factor(method="qlora", updates=20) == factor(updates=20)


@given(rank=st.integers(1, 256), times=st.floats(0.25, 4))
def test_alpha_over_the_root_of_the_rank_times_the_rate_is_constant(rank: int, times: float) -> None:
    alpha = max(1, round(times * rank))
    assert factor(rank=rank, alpha=alpha) * alpha / math.sqrt(rank) == pytest.approx(32 / math.sqrt(16))


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_factors_are_monotone_and_bounded(one: int, other: int) -> None:
    fewer, more = sorted((one, other))
    assert 15 >= lora_times(fewer) >= lora_times(more) >= 10
    assert 0.5 <= batch_factor(fewer) <= batch_factor(more) <= 1.5


@pytest.mark.parametrize("family", ["tinyllama", "tiny"])
def test_models_with_numbers_of_their_own_keep_them(family: str) -> None:
    assert Preset.load(family).rate is None
