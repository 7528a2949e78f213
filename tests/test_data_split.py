"""Held-out rows: the same ones every time, never a text that is also trained on, never too few to mean anything."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_support import CHATML, tokenizer

from llmtune.data import encode, split
from llmtune.data.split import held_out_rows, kept_together
from llmtune.errors import DataError


@pytest.fixture
def tok():
    return tokenizer("byte_level")


def rows(count: int) -> list[dict]:
    return [{"question": f"What is {n}?", "answer": f"It is {n}" + " and more" * (n % 7)} for n in range(count)]


def texts(dataset) -> list[bytes]:
    return [dataset[i].input_ids.tobytes() for i in range(len(dataset))]


@pytest.mark.parametrize(("count", "fraction", "expected"), [(100, 0.1, 10), (2, 0.1, 1), (3, 0.9, 1), (7, 0.2, 1)])
def test_split_sizes(tmp_path, tok, count, fraction, expected):
    dataset = encode(rows(count), tok, template=CHATML, cache_dir=tmp_path)
    train, held_out = split(dataset, fraction, seed=1)
    assert (len(train), len(held_out)) == (count - expected, expected)
    assert sorted(texts(train) + texts(held_out)) == sorted(texts(dataset))


def test_split_depends_on_seed_and_content_alone(tmp_path, tok):
    forward = encode(rows(60), tok, template=CHATML, cache_dir=tmp_path)
    backward = encode(rows(60)[::-1], tok, template=CHATML, cache_dir=tmp_path)
    held_out = [set(texts(split(data, 0.2, seed)[1])) for data, seed in ((forward, 3), (backward, 3), (forward, 4))]
    assert held_out[0] == held_out[1] != held_out[2]


@pytest.mark.parametrize("seed", range(5))
def test_identical_rows_are_never_on_both_sides(tmp_path, tok, seed):
    data = rows(20) * 3 + rows(1) * 30
    dataset = encode(data, tok, template=CHATML, cache_dir=tmp_path)
    train, held_out = split(dataset, 0.1, seed)
    assert 1 <= len(held_out) <= 9
    assert not set(texts(train)) & set(texts(held_out))


def test_nothing_to_hold_out(tmp_path, tok):
    dataset = encode(rows(1) * 4, tok, template=CHATML, cache_dir=tmp_path)
    with pytest.raises(DataError, match="--eval-data FILE"):
        split(dataset, 0.1, seed=0)
    with pytest.raises(ValueError, match="between 0 and 1"):
        split(dataset, 1.0, seed=0)


# ── by group ─────────────────────────────────────────────────────────────────────────────────────────────────────

families = st.lists(st.integers(1, 9), min_size=2, max_size=60)  # sizes of groups of near duplicates


def of_sizes(sizes: list[int]) -> tuple[np.ndarray, np.ndarray]:
    groups = np.repeat(np.arange(len(sizes)), sizes)
    contents = (np.arange(len(groups), dtype=np.uint64) + 1) * np.uint64(0x9E3779B97F4A7C15)
    return groups, contents


@given(families, st.floats(0.001, 0.999), st.integers())
@settings(deadline=None)
def test_groups_never_straddle(sizes, fraction, seed):
    groups, contents = of_sizes(sizes)
    held_out = held_out_rows(groups, contents, fraction, seed)
    rest = np.setdiff1d(np.arange(len(groups)), held_out)
    assert not set(groups[held_out].tolist()) & set(groups[rest].tolist())
    assert 1 <= len(held_out) <= max(len(groups) // 2, min(sizes))
    assert len(rest)
    assert (np.diff(held_out) > 0).all()


@given(families, st.integers(0, 99), st.randoms())
@settings(deadline=None)
def test_the_order_of_rows_does_not_matter(sizes, seed, rng):
    groups, contents = of_sizes(sizes)
    order = list(range(len(groups)))
    rng.shuffle(order)
    names = dict(zip(range(len(sizes)), rng.sample(range(1000), len(sizes)), strict=True))
    renamed = np.array([names[group] for group in groups[order].tolist()])
    first = contents[held_out_rows(groups, contents, 0.2, seed)]
    again = contents[order][held_out_rows(renamed, contents[order], 0.2, seed)]
    assert sorted(first.tolist()) == sorted(again.tolist())


def test_every_group_is_as_likely_as_another():
    groups, contents = of_sizes([3] * 20)
    counts = Counter(int(g) for seed in range(400) for g in set(groups[held_out_rows(groups, contents, 0.2, seed)]))
    assert len(counts) == 20
    assert all(40 < count < 130 for count in counts.values())  # 80 expected


def test_one_row_alone_does_not_stand_for_all():
    groups, contents = of_sizes([1] + [11] * 9)
    held_out = held_out_rows(groups, contents, 0.1, seed=0)
    assert len(held_out) in (11, 12)


def test_a_template_is_no_group():
    """Half of the rows chain together: they are held out like the others, by their own content."""
    groups, contents = of_sizes([500] + [5] * 100)
    held_out = held_out_rows(groups, contents, 0.1, seed=0)
    assert len(held_out) == 100
    assert 20 < (groups[held_out] == 0).sum() < 80
    together = kept_together(groups, contents)
    rest = np.setdiff1d(np.arange(1000), held_out)
    assert not set(together[held_out].tolist()) & set(together[rest].tolist())
    contents[:250] = contents[250:500]  # exact copies stay together all the same
    held_out = held_out_rows(groups, contents, 0.1, seed=0)
    assert not set(contents[held_out].tolist()) & set(np.delete(contents, held_out).tolist())


@pytest.mark.parametrize("sizes", [[100, 100, 100, 100], [50, 5, 5], [3, 2, 2]])
def test_what_is_no_template_stays_whole(sizes):
    groups, contents = of_sizes(sizes)
    assert kept_together(groups, contents).tolist() == groups.tolist()


def test_near_duplicates_all_of_one_text_are_split_by_content():
    groups, contents = of_sizes([10])
    assert len(held_out_rows(groups, contents, 0.2, seed=0)) == 2
    with pytest.raises(DataError, match="10 rows, 1 of them distinct"):
        held_out_rows(groups, np.zeros(10, np.uint64), 0.2, seed=0)
