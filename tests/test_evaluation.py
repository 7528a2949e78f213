"""Loss and its interval, answers and their flaws, exact match."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tuning import ROWS

from llmtune.data import encode
from llmtune.evaluation import (
    LEAST_ROWS,
    Interval,
    Scores,
    answer,
    answers_to,
    as_base,
    counts_rows,
    exact_match,
    paired_interval,
    prompts_of,
    score,
)
from llmtune.evaluation.flaws import flaw_of
from llmtune.kernels import attach_kernels

Model = Callable[[str], Path]


@pytest.fixture
def loaded(family_model: Model, tmp_path: Path) -> tuple[object, object, object]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(family_model("llama"))
    model = AutoModelForCausalLM.from_pretrained(family_model("llama"), dtype=torch.float32)
    return model, tokenizer, encode(ROWS, tokenizer, cache_dir=tmp_path)


def test_exact_match_ignores_white_space_at_the_ends_only() -> None:
    assert exact_match([" a ", "b c", "d"], ["a", "b  c", "d"]) == pytest.approx(2 / 3)
    assert exact_match([], []) == 0.0


def test_the_loss_does_not_depend_on_batching_or_ranks(loaded: tuple[object, object, object]) -> None:
    model, tokenizer, rows = loaded
    how = {"pad_token_id": tokenizer.pad_token_id, "device": "cpu"}  # type: ignore[attr-defined]
    model.train()  # type: ignore[attr-defined]
    whole = score(model, rows, token_budget=4096, **how)  # type: ignore[arg-type]
    assert model.training  # type: ignore[attr-defined]
    single = score(model, rows, token_budget=1, **how)  # type: ignore[arg-type]
    parts = [score(model, rows, token_budget=256, rank=rank, num_ranks=3, **how) for rank in range(3)]  # type: ignore[arg-type]
    assert single.num_tokens == whole.num_tokens == sum(part.num_tokens for part in parts)
    assert single.loss == pytest.approx(whole.loss, abs=1e-5)
    assert sum(part.loss_sum for part in parts) / whole.num_tokens == pytest.approx(whole.loss, abs=1e-5)
    assert whole.perplexity == pytest.approx(math.exp(whole.loss))


def test_a_hopeless_model_has_infinite_perplexity_and_no_tokens_no_loss() -> None:
    assert Scores(loss_sum=1e6, num_tokens=1).perplexity == math.inf
    assert Scores(loss_sum=0.0, num_tokens=0).loss == 0.0


def test_a_prompt_ends_where_the_last_answer_begins(loaded: tuple[object, object, object], tmp_path: Path) -> None:
    _, tokenizer, rows = loaded
    (first, *_) = prompts_of(rows, tokenizer, 3)  # type: ignore[arg-type]
    assert first.reference == ROWS[0]["answer"]
    assert first.text.endswith(str(ROWS[0]["question"]))
    turns = [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Uno."},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "Due."},
    ]
    (last,) = prompts_of(encode([{"messages": turns}], tokenizer, cache_dir=tmp_path / "turns"), tokenizer, 9)
    assert last.reference == "Due."
    assert "Uno." in last.text
    assert prompts_of(encode([{"text": "no prompt here"}], tokenizer, cache_dir=tmp_path / "text"), tokenizer, 9) == []


def test_an_answer_is_the_same_alone_and_in_a_batch(loaded: tuple[object, object, object]) -> None:
    model, tokenizer, rows = loaded
    prompts = prompts_of(rows, tokenizer, 5)  # type: ignore[arg-type]
    how = {"max_new_tokens": 6, "device": "cpu"}
    together = answer(model, tokenizer, prompts, **how)  # type: ignore[arg-type]
    assert together == [answer(model, tokenizer, [prompt], **how)[0] for prompt in prompts]  # type: ignore[arg-type]
    with as_base(model) as same:
        assert same is model


# --- losses of single rows ----------------------------------------------------------------------------------------


def test_the_losses_of_rows_are_those_of_the_rows_alone(loaded: tuple[object, object, object]) -> None:
    model, tokenizer, rows = loaded
    how = {"pad_token_id": tokenizer.pad_token_id, "device": "cpu"}  # type: ignore[attr-defined]
    assert score(model, rows, token_budget=4096, **how).rows is None  # type: ignore[arg-type]
    alone = score(model, rows, token_budget=4096, one_by_one=True, **how).rows  # type: ignore[arg-type]
    attach_kernels(model, device="cpu")
    together = score(model, rows, token_budget=4096, **how)  # type: ignore[arg-type]
    assert alone is not None
    assert together.rows is not None
    assert together.rows.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.rows.tokens.tolist() == alone.tokens.tolist()
    assert together.rows.losses.sum() == pytest.approx(together.loss_sum, rel=1e-9)
    assert together.rows.tokens.sum() == together.num_tokens
    for row in (0, 7, 25):
        one = score(model, rows.select([row]), token_budget=4096, **how)  # type: ignore[attr-defined, arg-type]
        assert together.rows.losses[row] == pytest.approx(one.loss_sum, rel=1e-5)
    chosen = np.arange(len(ROWS)) < 3
    assert together.rows.mean(chosen) == pytest.approx(alone.losses[:3].sum() / alone.tokens[:3].sum(), rel=1e-5)


def test_ranks_share_the_rows(loaded: tuple[object, object, object]) -> None:
    model, tokenizer, rows = loaded
    attach_kernels(model, device="cpu")
    how = {"pad_token_id": tokenizer.pad_token_id, "device": "cpu", "token_budget": 512}  # type: ignore[attr-defined]
    parts = [score(model, rows, rank=rank, num_ranks=3, **how).rows for rank in range(3)]  # type: ignore[arg-type]
    whole = score(model, rows, **how).rows  # type: ignore[arg-type]
    assert whole is not None
    assert sum(part.losses for part in parts if part) == pytest.approx(whole.losses, rel=1e-5)
    assert sum(part.tokens for part in parts if part).tolist() == whole.tokens.tolist()  # type: ignore[union-attr]


# --- the interval -------------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_the_mean_over_tokens() -> None:
    draws = np.random.default_rng(0)
    tokens = draws.integers(5, 50, 4000)
    base = draws.gamma(2.0, 1.0, 4000) * tokens
    each = draws.normal(-0.1, 0.5, 4000)
    found = paired_interval(base, base + each * tokens, tokens)
    assert found is not None
    mean = (each * tokens).sum() / tokens.sum()
    assert found.value == pytest.approx(mean)
    # The delta method, for a ratio of sums over 4,000 rows (Cochran 1977, chapter 6).
    spread = 1.96 * (tokens * (each - mean)).std() / tokens.mean() / math.sqrt(4000)
    assert (found.low, found.high) == pytest.approx((mean - spread, mean + spread), abs=0.1 * spread)
    assert found == paired_interval(base, base + each * tokens, tokens)


@pytest.mark.parametrize("rows", [1, LEAST_ROWS - 1])
def test_few_rows_have_no_interval(rows: int) -> None:
    ones = np.ones(rows)
    assert paired_interval(3 * ones, ones, ones.astype(int)) is None
    more = np.ones(LEAST_ROWS)
    assert paired_interval(3 * more, more, more.astype(int)) == Interval(value=-2.0, low=-2.0, high=-2.0)


def test_rows_without_tokens_and_losses_without_end_give_no_interval() -> None:
    ones = np.ones(LEAST_ROWS)
    nothing = np.r_[0, np.ones(LEAST_ROWS - 1)].astype(int)
    assert paired_interval(3 * ones, ones, nothing) is None
    assert paired_interval(np.full(LEAST_ROWS, math.inf), ones, ones.astype(int)) is None


@given(st.lists(st.tuples(st.floats(-5, 5), st.integers(1, 90)), min_size=LEAST_ROWS, max_size=60))
def test_the_measured_difference_lies_within_its_interval_and_changes_sign_with_the_models(
    rows: list[tuple[float, int]],
) -> None:
    each, tokens = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    base = np.full(len(rows), 7.0) * tokens
    found = paired_interval(base, base + each * tokens, tokens, resamples=400)
    turned = paired_interval(base + each * tokens, base, tokens, resamples=400)
    assert found is not None
    assert turned is not None
    assert min(each) - 1e-6 <= found.low <= found.high <= max(each) + 1e-6
    assert turned.value == pytest.approx(-found.value, abs=1e-9)
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low), abs=1e-9)


# --- flaws of answers ---------------------------------------------------------------------------------------------

TWENTY = list(range(100, 120))


@pytest.mark.parametrize(
    ("answer_ids", "reference", "stopped", "limit", "flaw"),
    [
        (TWENTY, TWENTY, True, 64, None),
        ([7] * 40, TWENTY, False, 40, "repeats"),
        ([7, 8, 9] * 10, TWENTY, True, 64, "repeats"),
        (list(range(30)) * 4, TWENTY, False, 120, "repeats"),
        (list(range(80)) + [7, 8] * 20, TWENTY, False, 120, "repeats"),  # the end of one that was cut
        (list(range(80)) + [7, 8] * 20, TWENTY, True, 200, None),
        ([7] * 15, TWENTY, True, 64, None),  # a rule of dashes
        ([7, 8, 9] * 10, [7, 8, 9] * 8, True, 64, None),  # so does the reference
        (list(range(80)), TWENTY, False, 80, "endless"),
        (list(range(64)), list(range(17)), False, 64, None),  # a long reference: the limit says nothing
        (list(range(64)), list(range(16)), False, 64, "endless"),
        (list(range(500)) * 2, list(range(900)), False, 1000, None),  # twice is no loop
    ],
)
def test_a_flaw_is_what_the_reference_does_not_do(
    answer_ids: list[int], reference: list[int], stopped: bool, limit: int, flaw: str | None
) -> None:
    how = {"text": "some", "reference_text": "words", "stopped": stopped, "limit": limit}
    assert flaw_of(answer_ids, reference, **how) == flaw  # type: ignore[arg-type]


def test_an_empty_answer_is_one_unless_the_reference_is_empty() -> None:
    how = {"stopped": True, "limit": 64}
    assert flaw_of([], TWENTY, text=" ", reference_text="words", **how) == "empty"  # type: ignore[arg-type]
    assert flaw_of([], [], text="", reference_text="", **how) is None  # type: ignore[arg-type]


def test_an_answer_knows_whether_it_ended(loaded: tuple[object, object, object]) -> None:
    model, tokenizer, rows = loaded
    prompts = prompts_of(rows, tokenizer, 5)  # type: ignore[arg-type]
    long = answers_to(model, tokenizer, prompts, max_new_tokens=24, device="cpu")
    assert [given.text for given in long] == answer(model, tokenizer, prompts, max_new_tokens=24, device="cpu")
    assert all(given.stopped == (len(given.ids) < 24) and given.limit == 24 for given in long)
    last = int(long[0].ids[2])
    tokenizer.eos_token_id = last  # type: ignore[attr-defined]
    (short,) = answers_to(model, tokenizer, prompts[:1], max_new_tokens=24, device="cpu")
    assert short.stopped
    assert short.ids == long[0].ids[: long[0].ids.index(last)]


def test_exact_match_counts_rows_and_a_measure_of_ones_own_does_when_it_says_so() -> None:
    assert counts_rows(exact_match)
    assert not counts_rows(lambda answers, references: 0.5)
