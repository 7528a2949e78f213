"""Batching: every row once, budgets kept, ranks balanced, nothing random that was not asked for."""

from __future__ import annotations

import sys
from subprocess import run

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import (
    Encoded,
    Part,
    collate,
    epoch_order,
    epoch_rows,
    micro_batches,
    pass_tokens,
    pass_width,
    shard_rows,
)
from llmtune.training.updates import UpdateSampler

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40).map(lambda values: np.array(values, np.int32))
MULTIPLES = st.sampled_from([1, 8, 16, 64])


def tokens_of(lengths, batches, multiple):
    return [len(batch) * pass_width(int(lengths[batch].max()), len(batch), multiple) for batch in batches]


@given(longest=st.integers(0, 500), rows=st.integers(1, 40), multiple=MULTIPLES)
def test_tokens_of_passes_lie_on_a_grid(longest, rows, multiple):
    """The least width that holds the longest row, is one of eight, and makes the pass a multiple."""
    width = pass_width(longest, rows, multiple)
    fitting = (w for w in range(max(longest, 1), 2000) if w % min(multiple, 8) == 0 and w * rows % multiple == 0)
    assert width == next(fitting)
    assert pass_tokens(longest, rows, multiple).tolist() == [
        count * pass_width(longest, count, multiple) for count in range(1, rows + 1)
    ]


@given(lengths=LENGTHS, budget=st.integers(1, 1000), most=st.none() | st.integers(1, 8), multiple=MULTIPLES)
def test_micro_batches_hold_every_row_once_within_the_budget(lengths, budget, most, multiple):
    rows = list(range(len(lengths)))[::2]
    how = {"token_budget": budget, "max_rows": most, "pad_multiple": multiple}
    batches = micro_batches(lengths, rows, **how)
    assert sorted(row for batch in batches for row in batch) == rows
    for batch, tokens in zip(batches, tokens_of(lengths, batches, multiple), strict=True):
        assert len(batch) == 1 or tokens <= budget
        assert most is None or len(batch) <= most
    longest = [int(lengths[batch].max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)
    assert batches == micro_batches(lengths, rows[::-1], **how)


def partitions(rows):
    """All ways to cut a set of rows into non-empty subsets."""
    if not rows:
        yield []
        return
    first, *others = rows
    for smaller in partitions(others):
        yield [[first], *smaller]
        for i in range(len(smaller)):
            yield [*smaller[:i], [first, *smaller[i]], *smaller[i + 1 :]]


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=7).map(lambda values: np.array(values, np.int32)),
    budget=st.integers(1, 120),
    most=st.none() | st.integers(1, 4),
    multiple=MULTIPLES,
    overhead=st.none() | st.integers(0, 60),
)
def test_no_partition_is_better(lengths, budget, most, multiple, overhead):
    """Against all partitions into any subsets: the fewest passes, then the least padding; or the least of their sum."""

    def cost(batches):
        tokens = sum(tokens_of(lengths, batches, multiple))
        return (len(batches), tokens) if overhead is None else tokens + overhead * len(batches)

    def allowed(batches):
        return all(
            len(batch) == 1 or (tokens <= budget and len(batch) <= (most or len(batch)))
            for batch, tokens in zip(batches, tokens_of(lengths, batches, multiple), strict=True)
        )

    found = micro_batches(
        lengths,
        range(len(lengths)),
        token_budget=budget,
        max_rows=most,
        pad_multiple=multiple,
        pass_overhead_tokens=overhead,
    )
    assert cost(found) == min(cost(batches) for batches in partitions(list(range(len(lengths)))) if allowed(batches))


def test_no_rows_no_passes():
    assert micro_batches(np.zeros(0, np.int32), [], token_budget=8) == []


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


def test_little_is_padded():
    """Lengths as those of GSM8K (at most 3 %), and mixes whose longest rows are twenty times the median (5 %)."""
    rng = np.random.default_rng(0)
    for median, spread, most in ((234, 0.38, 0.03), (70, 0.8, 0.05), (100, 0.75, 0.05)):
        real = cut = 0
        for _ in range(8):
            lengths = np.clip(rng.lognormal(np.log(median), spread, 256), 8, 20 * median).astype(np.int32)
            batches = micro_batches(lengths, range(256), token_budget=1024, pad_multiple=8, pass_overhead_tokens=64)
            real, cut = real + int(lengths.sum()), cut + sum(tokens_of(lengths, batches, 8))
        assert 1 - real / cut < most


# ------------------------------------------------------------------ epochs


def test_epochs_are_permutations_that_leave_the_global_generator_alone():
    state = np.random.get_state()[1].copy()
    rows = (Part(num_rows=50),)
    order = epoch_order(rows, seed=1, epoch=0)
    assert sorted(order) == list(range(50))
    assert order.tolist() == epoch_order(rows, seed=1, epoch=0).tolist()
    assert order.tolist() != epoch_order(rows, seed=1, epoch=1).tolist()
    assert order.tolist() != epoch_order(rows, seed=2, epoch=0).tolist()
    assert (np.random.get_state()[1] == state).all()


def test_one_part_has_the_order_that_runs_began_with():
    """Written down, because a resumed run continues the order it was started with."""
    assert epoch_order([Part(num_rows=8)], 42, 0).tolist() == [7, 0, 4, 2, 1, 3, 5, 6]
    assert epoch_order([Part(num_rows=8)], 42, 1).tolist() == [5, 1, 4, 7, 3, 0, 2, 6]


PARTS = st.lists(
    st.builds(Part, num_rows=st.integers(0, 40), weight=st.floats(0.01, 3)), min_size=1, max_size=4
).filter(lambda parts: any(part.num_rows for part in parts))


@given(parts=PARTS, seed=st.integers(0, 2**32 - 1), epochs=st.integers(1, 12))
def test_a_mix_sees_the_rows_of_a_part_equally_often(parts, seed, epochs):
    counts = np.zeros(sum(part.num_rows for part in parts), np.int64)
    for epoch in range(epochs):
        order = epoch_order(parts, seed, epoch)
        assert len(order) == epoch_rows(parts)
        assert order.dtype == np.int64
        first = 0
        for part in parts:
            once = np.bincount(order[(order >= first) & (order < first + part.num_rows)] - first, minlength=1)
            assert once.sum() == part.rows_per_epoch
            assert part.num_rows == 0 or abs(part.rows_per_epoch - part.weight * part.num_rows) <= 1
            if part.num_rows:
                assert once.max() - once.min() <= 1
            first += part.num_rows
        counts += np.bincount(order, minlength=len(counts))
    first = 0
    for part in parts:
        seen = counts[first : first + part.num_rows]
        assert part.num_rows == 0 or seen.max() - seen.min() <= 1
        first += part.num_rows


def test_half_a_weight_sees_every_row_in_two_epochs():
    parts = (Part(num_rows=10), Part(num_rows=6, weight=0.5), Part(num_rows=4, weight=2.0))
    assert epoch_rows(parts) == 10 + 3 + 8
    halves = [[row for row in epoch_order(parts, 7, epoch) if 10 <= row < 16] for epoch in (4, 5)]
    assert sorted(halves[0] + halves[1]) == list(range(10, 16))
    assert epoch_order(parts, 7, 4).tolist() != epoch_order(parts, 7, 6).tolist()


def test_a_part_with_a_tiny_weight_is_not_left_out():
    assert epoch_rows([Part(num_rows=3, weight=0.01)]) == 1
    assert epoch_rows([Part(num_rows=0, weight=5)]) == 0


@given(lengths=LENGTHS, batch=st.integers(1, 20), ranks=st.integers(1, 4), weight=st.sampled_from([0.3, 1.0, 2.5]))
def test_the_ranks_of_an_update_hold_the_rows_that_one_would(lengths, batch, ranks, weight):
    def updates(rank, num_ranks):
        sampler = UpdateSampler(
            lengths,
            [Part(num_rows=len(lengths), weight=weight)],
            global_batch_size=batch,
            seed=3,
            rank=rank,
            num_ranks=num_ranks,
        )
        sampler.set_epoch(2)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    alone, shared = updates(0, 1), [updates(rank, ranks) for rank in range(ranks)]
    for number, rows in enumerate(alone):
        together = [row for share in shared for row in share[number]]
        assert sorted(row for row in together if row >= 0) == sorted(rows)
        assert all(share[number] for share in shared)  # a rank without rows gets a filler


# ------------------------------------------------------------------ tensors


def test_collate_pads_right_and_labels_what_is_learned():
    rows = [
        Encoded(input_ids=np.array([5, 6, 7], np.int32), supervised=np.array([False, True, True])),
        Encoded(input_ids=np.arange(9, dtype=np.int32), supervised=np.ones(9, np.bool_)),
    ]
    batch = collate(rows, pad_token_id=7, pad_multiple=8)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, 16)
    )
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 9]
    # The pad token is learned where the row says so (7 at the end of the answer), and only there.
    assert batch["labels"][0].tolist() == [-100, 6, 7] + [-100] * 13
    assert collate(rows, pad_token_id=7)["input_ids"].shape == (2, 9)


def test_the_package_is_light_to_import():
    heavy = "{'torch', 'transformers', 'datasets', 'peft', 'optuna', 'pyarrow', 'tokenizers'}"
    code = f"import sys, llmtune.data; print(sorted({heavy} & set(sys.modules)))"
    assert run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
