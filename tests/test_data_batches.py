"""Batching: every row once, budgets kept, ranks balanced, nothing random that was not asked for."""

from __future__ import annotations

import sys
from subprocess import run

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llmtune.data import Encoded, collate, epoch_order, micro_batches, shard_rows

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(lambda values: np.array(values, np.int32))


@given(lengths=LENGTHS, budget=st.integers(1, 1000), most=st.none() | st.integers(1, 8))
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, most):
    rows = list(range(len(lengths)))[::2]
    batches = micro_batches(lengths, rows, token_budget=budget, max_rows=most)
    assert sorted(row for batch in batches for row in batch) == rows
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[batch]) <= budget
        assert most is None or len(batch) <= most
    assert batches == micro_batches(lengths, rows[::-1], token_budget=budget, max_rows=most)


@given(lengths=LENGTHS, world_size=st.integers(1, 6))
def test_ranks_share_the_rows(lengths, world_size):
    rows = list(range(len(lengths)))
    shards = shard_rows(rows, lengths, world_size)
    assert len(shards) == world_size
    assert sorted(row for shard in shards for row in shard) == rows
    counts = [len(shard) for shard in shards]
    assert max(counts) - min(counts) <= 1
    assert shards == shard_rows(rows[::-1], lengths, world_size)


def test_ranks_are_balanced_by_tokens():
    lengths = np.array([100, 100, 1, 1, 50, 50, 60, 40], np.int32)
    tokens = [int(lengths[shard].sum()) for shard in shard_rows(range(8), lengths, 2)]
    assert max(tokens) - min(tokens) <= 20


def test_grouping_by_length_saves_padding():
    lengths = np.random.default_rng(0).lognormal(5, 0.6, 64).astype(np.int32)
    batches = micro_batches(lengths, range(64), token_budget=1024)
    padded = sum(len(batch) * int(lengths[batch].max()) for batch in batches)
    assert padded < 1.15 * lengths.sum()


def test_epochs_are_permutations_that_leave_the_global_generator_alone():
    state = np.random.get_state()[1].copy()
    order = epoch_order(50, seed=1, epoch=0)
    assert sorted(order) == list(range(50))
    assert order.tolist() == epoch_order(50, seed=1, epoch=0).tolist()
    assert order.tolist() != epoch_order(50, seed=1, epoch=1).tolist()
    assert order.tolist() != epoch_order(50, seed=2, epoch=0).tolist()
    assert (np.random.get_state()[1] == state).all()


def test_collate_pads_right_and_labels_what_is_learned():
    rows = [
        Encoded(input_ids=np.array([5, 6, 7], np.int32), supervised=np.array([False, True, True])),
        Encoded(input_ids=np.arange(9, dtype=np.int32), supervised=np.ones(9, np.bool_)),
    ]
    batch = collate(rows, pad_token_id=7)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 16)
    )
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    # The pad token is learned where the row says so (7 at the end of the answer), and only there.
    assert batch["labels"][0].tolist() == [-100, 6, 7] + [-100] * 13


def test_the_package_is_light_to_import():
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'optuna', 'pyarrow', 'tokenizers'}"
    code = f"import sys, llmtune.data; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
