"""Loss, answers and exact match."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tuning import ROWS

from llmtune.data import encode
from llmtune.evaluation import Scores, answer, as_base, exact_match, prompts_of, score

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
