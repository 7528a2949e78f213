"""Packing: no row sees another. Per token, loss and gradient of packed rows are those of the rows alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factories import FAMILIES, WITHOUT_SDPA, family_config
from hypothesis import given
from hypothesis import strategies as st
from tuning import evaluations, events, history, losses, tune, weights

from llmtune.data import Encoded, collate, collate_packed, micro_batches, pack_rows
from llmtune.errors import ConfigError
from llmtune.planning.batching import PACKABLE
from llmtune.training.train import require_own_positions
from llmtune.training.updates import UpdateCollator, UpdateSampler

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(lambda values: np.array(values, np.int32))
ATTENTION = ("sdpa", "eager")
# The sliding window is shorter than a packed sequence and than one of the rows.
VARIANTS = [*FAMILIES, "mistral with a window", "gemma2 with a window", "gemma3_text with a window"]
CASES = [(v, a) for v in VARIANTS for a in ATTENTION if a == "eager" or v.partition(" ")[0] not in WITHOUT_SDPA]
VOCABULARY = 256


def random_rows(*lengths: int, seed: int = 0) -> list[Encoded]:
    rng = np.random.default_rng(seed)
    return [
        Encoded(
            input_ids=rng.integers(3, VOCABULARY, length).astype(np.int32),
            supervised=(rng.random(length) < 0.6) | (np.arange(length) == 0),  # the first is learned by nobody
        )
        for length in lengths
    ]


def model_of(variant: str, attention: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    family, _, window = variant.partition(" ")
    changes: dict[str, Any] = {"sliding_window": 5} if window else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = family_config(family, vocab_size=VOCABULARY, **changes)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        for parameter in model.parameters():  # large enough for attention to matter
            parameter.data.mul_(3) if parameter.dim() > 1 else None
    model.config.use_cache = False  # as Trainer sets it: with a cache, packed rows are not recognised
    assert model.config._attn_implementation == attention
    return model.eval()


def token_losses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of every supervised token of a batch, in order: float [tokens]."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits, labels = model(**inputs).logits[:, :-1], batch["labels"][:, 1:]
    return torch.nn.functional.cross_entropy(logits[labels != -100], labels[labels != -100], reduction="none")


def gradient(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    for batch in batches:
        (model(**batch, num_items_in_batch=1).loss / count).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------ which rows lie together


@given(lengths=LENGTHS, budget=st.integers(1, 1000), most=st.none() | st.integers(1, 8))
def test_sequences_hold_every_row_once_within_the_budget(lengths: np.ndarray, budget: int, most: int | None) -> None:
    rows = list(range(len(lengths)))[::2]
    state = np.random.get_state()[1].copy()
    sequences = pack_rows(lengths, rows, token_budget=budget, max_rows=most)
    assert sorted(row for sequence in sequences for row in sequence) == rows
    tokens = [int(lengths[sequence].sum()) for sequence in sequences]
    assert all(len(s) == 1 or t <= budget for s, t in zip(sequences, tokens, strict=True))
    assert most is None or all(len(sequence) <= most for sequence in sequences)
    assert tokens == sorted(tokens, reverse=True)
    assert sequences == pack_rows(lengths, rows[::-1], token_budget=budget, max_rows=most)
    assert (np.random.get_state()[1] == state).all()
    if most is None and all(length <= budget for length in lengths):
        assert sum(tokens) > budget * (len(sequences) - 1) / 2  # no two sequences would fit into one


@pytest.mark.parametrize(("median", "spread", "longest"), [(234, 0.4, 730), (60, 0.85, 1024), (148, 0.6, 1024)])
def test_sequences_are_full(median: int, spread: float, longest: int) -> None:
    """Lengths as those of GSM8K, and log-normal mixes whose longest rows are about twenty times the median."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), spread, 256), 8, longest).astype(np.int32)
    fewest = -(-int(lengths.sum()) // 1024)
    assert len(pack_rows(lengths, range(256), token_budget=1024)) <= fewest + 1


def test_a_packed_sequence_as_tensors() -> None:
    rows = [
        Encoded(input_ids=np.array([5, 6, 7], np.int32), supervised=np.array([True, False, True])),
        Encoded(input_ids=np.array([8, 9], np.int32), supervised=np.array([True, True])),
    ]
    batch = collate_packed(rows, pad_token_id=0, pad_multiple=8)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7, 8, 9, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2]],
        "labels": [[-100, -100, 7, -100, 9, -100, -100, -100]],  # 8 begins a row: 7 must not predict it
    }
    assert {tuple(tensor.shape) for tensor in collate_packed(rows, 0).values()} == {(1, 5)}


@given(lengths=LENGTHS, multiple=st.sampled_from([1, 8]))
def test_packed_and_padded_rows_learn_the_same_tokens(lengths: np.ndarray, multiple: int) -> None:
    items = [(row, number) for number, row in enumerate(random_rows(*lengths))]
    counts = []
    for packing in (False, True):
        collator = UpdateCollator(pad_token_id=0, token_budget=512, max_rows=64, packing=packing, pad_multiple=multiple)
        update = collator(items)
        learned = [batch["labels"][:, 1:] for batch in update.micro_batches]
        tokens = sorted(int(token) for labels in learned for token in labels[labels != -100])
        counts.append((update.num_rows, update.num_tokens, update.num_supervised_tokens, tokens))
    assert counts[0] == counts[1]
    assert counts[0][2] == sum(int(row.supervised[1:].sum()) for row, _ in items)


def test_a_filler_learns_nothing() -> None:
    collator = UpdateCollator(pad_token_id=0, token_budget=512, max_rows=64, packing=True)
    update = collator([(random_rows(9)[0], ~0)])
    assert (update.num_rows, update.num_tokens, update.num_supervised_tokens) == (0, 0, 0)
    assert len(update.micro_batches) == 1


# ------------------------------------------------------------------ what the model makes of it


def test_every_architecture_that_may_be_packed_is_proven_here() -> None:
    assert set(FAMILIES) == PACKABLE


@pytest.mark.parametrize(("variant", "attention"), CASES)
def test_packed_rows_are_the_rows_alone(variant: str, attention: str) -> None:
    model, rows = model_of(variant, attention), random_rows(11, 3, 1, 17, 2, 11)
    packed = collate_packed(rows, 0, pad_multiple=8)
    with torch.no_grad():
        together = model(**{name: packed[name] for name in ("input_ids", "position_ids")}).logits[0]
        ends = np.cumsum([len(row.input_ids) for row in rows])
        for row, end in zip(rows, ends, strict=True):
            alone = model(input_ids=torch.tensor(row.input_ids[None].astype(np.int64))).logits[0]
            assert (together[end - len(alone) : end] - alone).abs().max() < 1e-5
        mine = token_losses(model, packed)
        alone = torch.cat([token_losses(model, collate([row], 0)) for row in rows])
    assert len(mine) == len(alone)
    assert (mine - alone).abs().max() < 1e-5
    assert (mine - alone).mean().abs() < 1e-5


@pytest.mark.parametrize(("variant", "attention"), CASES)
def test_the_check_sees_contamination(variant: str, attention: str) -> None:
    model, rows = model_of(variant, attention), random_rows(11, 3, 1, 17, 2, 11)
    packed = collate_packed(rows, 0)
    del packed["position_ids"]
    with torch.no_grad():
        mine = token_losses(model, packed)
        alone = torch.cat([token_losses(model, collate([row], 0)) for row in rows])
    assert (mine - alone).abs().max() > 1e-2
    assert (mine - alone)[: int(rows[0].supervised[1:].sum())].abs().max() < 1e-5  # the first row has none before it


@pytest.mark.parametrize(("variant", "attention"), CASES)
def test_the_gradient_of_an_update_does_not_depend_on_how_it_is_cut(variant: str, attention: str) -> None:
    model, rows = model_of(variant, attention), random_rows(11, 3, 9, 17, 2, 11, 30, 4)
    lengths = np.array([len(row.input_ids) for row in rows])
    alone = gradient(model, [collate([row], 0) for row in rows])
    padded = [collate([rows[i] for i in cut], 0) for cut in micro_batches(lengths, range(8), token_budget=40)]
    packed = [
        collate_packed([rows[i] for i in cut], 0, pad_multiple=8)
        for cut in pack_rows(lengths, range(8), token_budget=40)
    ]
    assert len(packed) < len(padded) < len(rows)
    largest = max(float(tensor.abs().max()) for tensor in alone.values())
    for batches in (padded, packed):
        other = gradient(model, batches)
        assert other.keys() == alone.keys()
        assert max(float((other[name] - alone[name]).abs().max()) for name in alone) < 1e-5 * max(1.0, largest)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_two_ranks_learn_what_one_does(packing: bool) -> None:
    """Five rows over two ranks in updates of two: the last update leaves one rank a filler."""
    model, rows = model_of("mistral with a window", "sdpa"), random_rows(11, 30, 9, 17, 12)
    lengths = np.array([len(row.input_ids) for row in rows])
    collator = UpdateCollator(pad_token_id=0, token_budget=40, max_rows=8, packing=packing)

    def updates(rank: int, num_ranks: int) -> list[list[dict[str, torch.Tensor]]]:
        sampler = UpdateSampler(lengths, global_batch_size=2, seed=0, rank=rank, num_ranks=num_ranks)
        items = [[(rows[max(i, ~i)], i) for i in share] for share in sampler]
        return [list(collator(item).micro_batches) for item in items]

    for alone, *shares in zip(updates(0, 1), updates(0, 2), updates(1, 2), strict=True):
        one, two = gradient(model, alone), gradient(model, [batch for share in shares for batch in share])
        largest = max(float(tensor.abs().max()) for tensor in one.values())
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5 * max(1.0, largest)


# ------------------------------------------------------------------ whole runs


@pytest.mark.parametrize(
    "way",
    [{"token_budget": 128}, *(pytest.param(way, marks=pytest.mark.slow) for way in ({}, {"micro_batch_size": 2}))],
    ids=str,
)
def test_a_packed_run_is_the_padded_run(
    family_model: Callable[[str], Path], tmp_path: Path, way: dict[str, int]
) -> None:
    for name, packing in (("padded", False), ("packed", True)):
        tune(family_model("mistral"), tmp_path / name, packing=packing, max_steps=3, **way)
    padded, packed = tmp_path / "padded", tmp_path / "packed"
    assert [step[4:] for step in history(padded)] == [step[4:] for step in history(packed)]  # the same tokens
    assert np.abs(np.subtract(losses(padded), losses(packed))).max() < 2e-6
    first = weights(padded)
    assert max(float((first[name] - tensor).abs().max()) for name, tensor in weights(packed).items()) < 1e-5
    assert evaluations(packed) == pytest.approx(evaluations(padded), abs=1e-5)
    if "micro_batch_size" in way:
        assert {event["micro_batch_size"] for event in events(packed, "step")} == {way["micro_batch_size"]}


def test_longrope_is_packed_up_to_its_switch_only() -> None:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 128}
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, **factors}
    config = family_config("phi3", rope_parameters=rope, original_max_position_embeddings=128)
    require_own_positions(config, 128)
    require_own_positions(family_config("phi3"), 500)
    with pytest.raises(ConfigError, match="longest row has 129 tokens, and above 128"):
        require_own_positions(config, 129)
