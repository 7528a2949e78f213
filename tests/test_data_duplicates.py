"""Digests, signatures, groups of duplicates and rows that leak from training into evaluation."""

from __future__ import annotations

import random
import string
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data.duplicates import (
    LEAST_SHINGLES,
    SIGNATURE_BYTES,
    contamination,
    content_digest,
    duplicate_groups,
    signature,
)

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in ("a", "e", "io", "u") for c in ("", "l", "rn", "sk", "t")]


def prose(seed: int, words: int = 120) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words))


def changed(text: str, number: int, seed: int) -> str:
    """The text with ``number`` words, far apart, replaced: 3 shingles each."""
    words = text.split()
    for position in random.Random(seed).sample(range(2, len(words) - 2, 4), number):
        words[position] = f"new{seed}x{position}"
    return " ".join(words)


def arrays(texts: list[str]):
    digests = np.array([content_digest(text) for text in texts], np.uint64)
    signatures = np.frombuffer(b"".join(map(signature, texts)), np.uint8).reshape(-1, SIGNATURE_BYTES)
    return digests, signatures


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}


def jaccard(a: str, b: str) -> float:
    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


def estimated(a: str, b: str) -> float:
    left, right = (np.frombuffer(signature(text), "<u4") for text in (a, b))
    return float((left == right).mean())


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "other",
    [
        "Lima is the capital of Peru.",
        "LIMA is  the\ncapital of Peru",
        '"Lima", is the capital (of Peru)!\r\n',
        "“Lima” is the capital of Peru…",
        "\uff2c\uff49\uff4d\uff41 is the\u00a0capital of Peru",
    ],
)
def test_what_exact_leaves_out(other):
    assert content_digest(other) == content_digest("Lima is the capital of Peru")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("12+7", "12-7"),
        ("3.14", "31.4"),
        ("3.14", "314"),
        ("1 23", "12 3"),
        ("1, 2", "12"),
        ("5²", "52"),
        ("-5", "5"),
        ("a < b", "a > b"),
        ("?!", "..."),
        ("", " "),
        ("“", "”"),
        ("Лима", "Лимa"),
        ("العربية", "العربيه"),
        ("東京", "京東"),
        ("\ud800", "\ud801"),
    ],
)
def test_what_counts(one, other):
    assert content_digest(one) != content_digest(other)


def test_a_digest_is_64_bits_and_stays_what_it_is():
    # Stored beside encoded rows: a change makes every cache stale.
    assert content_digest("Lima is the capital of Peru.") == DIGEST
    assert content_digest("Größe: 12,5 cm") == DIGEST_UMLAUT


DIGEST, DIGEST_UMLAUT = 0xC311F277E22C78D8, 0x210FBC552914550B


def significant(text: str) -> list[str]:
    """Letters and digits, in order, by the plainest means."""
    return [character for character in text.upper().lower() if character.isalnum()]


@given(st.text(string.ascii_letters + string.digits + " .,!\n", max_size=30), st.text(max_size=30))
@settings(deadline=None)
def test_different_letters_have_different_digests(one, other):
    assert 0 <= content_digest(one) < 1 << 64
    if significant(one) != significant(other) and (significant(one) or significant(other)) and other.isascii():
        assert content_digest(one) != content_digest(other)


@given(
    st.text(st.characters(codec="utf-8", categories=["L", "Nd"]), min_size=1),
    st.text(" \n\t!?;:\"'()", max_size=5),
    st.text(" \n\t.,", max_size=5),
)
@settings(deadline=None)
def test_case_space_and_punctuation_do_not_count(text, before, after):
    assert content_digest(before + text + after) == content_digest(text)
    if text.isascii():
        assert content_digest(text.upper()) == content_digest(text.lower())


# ── signatures ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_signature_is_what_datasketch_makes_of_the_shingles():
    from datasketch import MinHash

    from llmtune.data import duplicates

    values = duplicates._shingles(prose(1).encode())
    plain = MinHash(num_perm=SIGNATURE_BYTES // 4, seed=1, scheme="affine32", hashfunc=int)
    for value in values.tolist():
        plain.update(value)
    assert signature(prose(1)) == plain.hashvalues.astype("<u4").tobytes()
    assert len(values) == len(shingles(prose(1)))
    long = prose(2, words=40_000)
    assert len(signature(long)) == SIGNATURE_BYTES
    assert estimated(long, long + " and no more than that") == 1


def test_a_signature_is_the_same_in_another_process():
    code = "from llmtune.data.duplicates import signature; print(signature('one two three four ' * 9 + 'é').hex())"
    here = signature("one two three four " * 9 + "é").hex()
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


@pytest.mark.parametrize("number", [0, 1, 3, 6, 12, 25])
def test_signatures_estimate_the_share_of_common_shingles(number):
    pairs = [(prose(seed), changed(prose(seed), number, seed)) for seed in range(30)]
    error = np.mean([estimated(a, b) - jaccard(a, b) for a, b in pairs])
    assert abs(error) < 0.05  # the standard error of the mean of 30 is 0.01


def test_scripts_without_spaces_are_compared_by_characters():
    rng = random.Random(0)
    text = "".join(chr(rng.randrange(0x4E00, 0x5000)) for _ in range(300)) + "。"
    other = text[:150] + "新" + text[151:]
    assert estimated(text, other) > 0.9
    assert estimated(text, text[::-1]) < 0.1


@pytest.mark.parametrize("text", ["", "?", "one", "What is 12+7?", " ".join(["word"] * (LEAST_SHINGLES + 1)), "東京"])
def test_short_texts_are_not_compared(text):
    assert signature(text) == bytes(SIGNATURE_BYTES)


@given(st.text())
@settings(deadline=None)
def test_any_text_has_a_signature(text):
    assert len(signature(text)) == SIGNATURE_BYTES


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_exact_groups():
    texts = ["a", "b", "A!", "c", "b.", "a"]
    digests, signatures = arrays(texts)
    for given_signatures in (None, signatures):
        groups = duplicate_groups(digests, given_signatures)
        assert groups.exact.tolist() == groups.group.tolist() == groups.kept.tolist() == [0, 1, 0, 3, 1, 0]
    facts = duplicate_groups(digests, None).facts(lambda row: ("d.jsonl", row + 1))
    assert (facts.exact_rows, facts.exact_groups, facts.near_rows, facts.largest_group) == (3, 2, None, 3)
    assert [(e.line, e.of_line, e.near) for e in facts.examples] == [(3, 1, False), (5, 2, False), (6, 1, False)]


@pytest.mark.parametrize("count", [0, 1])
def test_no_rows_and_one(count):
    groups = duplicate_groups(*arrays([prose(1)] * count))
    facts = groups.facts(lambda row: ("d", row))
    assert (facts.rows, facts.exact_rows, facts.near_rows, facts.largest_group) == (count, 0, 0, count)


def test_near_groups_and_their_facts():
    texts = [prose(0), prose(1), changed(prose(0), 2, 5), prose(1).upper(), changed(prose(1), 1, 6), prose(2)]
    groups = duplicate_groups(*arrays(texts))
    assert groups.exact.tolist() == [0, 1, 2, 1, 4, 5]
    assert groups.group.tolist() == groups.kept.tolist() == [0, 1, 0, 1, 1, 5]
    facts = groups.facts(lambda row: ("d.jsonl", row + 1))
    document = facts.to_json()
    assert document.pop("examples")[0] == {
        "file": "d.jsonl",
        "line": 3,
        "of_file": "d.jsonl",
        "of_line": 1,
        "near": True,
    }
    assert document == {
        "rows": 6,
        "exact_rows": 1,
        "exact_groups": 1,
        "near_rows": 2,
        "near_groups": 2,
        "largest_group": 3,
    }
    many = duplicate_groups(*arrays([prose(0)] * 40)).facts(lambda row: ("d", row))
    assert len(many.examples) == 20


def test_recall_and_precision_at_the_threshold():
    """Measured 2026-11 on 6,000 pairs, share found by the pair's own share of common shingles, from 0.65 in steps of
    0.05: 0.02, 0.13, 0.28, 0.61, 0.89, 0.99, 1, 1; below 0.65 at most 0.005. In all: recall 0.90, precision 0.91."""
    found: dict[float, list[bool]] = {}
    texts, pairs = [], []
    for seed in range(1_500):
        base = prose(seed)
        other = changed(base, seed % 15, seed)
        pairs.append((len(texts), jaccard(base, other)))
        texts += [base, other]
    groups = duplicate_groups(*arrays(texts))
    for row, share in pairs:
        found.setdefault(int(share * 20) / 20, []).append(bool(groups.group[row + 1] == groups.group[row]))
    rates = {share: np.mean(hits) for share, hits in found.items()}
    assert all(rate > 0.95 for share, rate in rates.items() if share >= 0.9)
    assert all(rate > 0.75 for share, rate in rates.items() if share == 0.85)
    assert all(rate < 0.1 for share, rate in rates.items() if share <= 0.65)
    assert len(set(groups.group[::2].tolist())) == 1_500  # and never two that have nothing to do with each other


def test_a_chain_is_one_group_but_only_what_is_alike_is_left_out():
    chain = [prose(0)]
    for link in range(18):
        chain.append(changed(chain[-1], 2, link))
    groups = duplicate_groups(*arrays(chain))
    assert len(set(groups.group.tolist())) == 1
    assert jaccard(chain[0], chain[-1]) < 0.5
    assert 1 < len(set(groups.kept.tolist())) < len(chain)
    for row, kept in enumerate(groups.kept.tolist()):
        assert row == kept or (kept < row and estimated(chain[row], chain[kept]) >= 0.8)
        assert groups.kept[kept] == kept


def test_templates_with_other_numbers_are_not_lumped():
    texts = [f"Q: What is {a}+{b}? A: {a} plus {b} is {a + b}." for a in range(2, 12) for b in range(2, 12)]
    groups = duplicate_groups(*arrays(texts))
    assert groups.group.tolist() == list(range(100))


def test_thousands_of_near_duplicates_of_one_text_are_one_group():
    texts = [changed(prose(0), 2, seed) for seed in range(3_000)]
    groups = duplicate_groups(*arrays(texts))
    assert (groups.group == 0).mean() > 0.99


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_groups_do_not_depend_on_the_order_of_rows(data):
    texts = [prose(seed, 40) for seed in range(6)]
    texts += [changed(texts[seed % 6], seed % 3, seed) for seed in range(12)] + ["short", "Short."]
    order = data.draw(st.permutations(range(len(texts))))
    digests, signatures = arrays(texts)
    plain, mixed = duplicate_groups(digests, signatures), duplicate_groups(digests[order], signatures[order])
    for name in ("exact", "group"):
        numbers = getattr(plain, name)[order], getattr(mixed, name)
        assert len(set(zip(*(n.tolist() for n in numbers), strict=True))) == len(set(numbers[0].tolist()))
        assert len(set(numbers[0].tolist())) == len(set(numbers[1].tolist()))
    rows = np.arange(len(texts))
    assert (mixed.exact <= rows).all()
    assert (mixed.group <= mixed.kept).all()
    assert (mixed.kept <= mixed.exact).all()
    assert (mixed.group[mixed.kept] == mixed.group).all()


# ── contamination ────────────────────────────────────────────────────────────────────────────────────────────────


def test_contamination():
    training = [prose(seed) for seed in range(50)] + [prose(3), changed(prose(4), 1, 1)]
    evaluation = [prose(100), prose(3).upper(), changed(prose(7), 2, 2), prose(4), "short"]
    leakage = contamination(*arrays(training), *arrays(evaluation))
    assert leakage.exact_rows.tolist() == [1, 3]
    assert leakage.near_rows.tolist() == [2]
    assert leakage.training_rows.tolist() == [3, 4, 7, 50, 51]
    assert leakage.examples == ((1, 3), (2, 7), (3, 4))
    assert leakage.leaked == 3
    assert leakage.to_json() == {
        "rows": 5,
        "exact_rows": 2,
        "near_rows": 1,
        "training_rows": 5,
        "examples": [{"eval_row": a, "training_row": b} for a, b in leakage.examples],
    }


def test_contamination_by_exact_text_alone():
    training, evaluation = arrays(["a", "b", "b"]), arrays(["B", "c"])
    leakage = contamination(training[0], None, evaluation[0], None)
    assert (leakage.exact_rows.tolist(), leakage.near_rows, leakage.training_rows.tolist()) == ([0], None, [1, 2])


@pytest.mark.parametrize(("training", "evaluation"), [(0, 0), (0, 3), (3, 0)])
def test_contamination_without_rows(training, evaluation):
    texts = [prose(seed) for seed in range(3)]
    leakage = contamination(*arrays(texts[:training]), *arrays(texts[:evaluation]))
    assert (leakage.rows, leakage.leaked, len(leakage.training_rows)) == (evaluation, 0, 0)


def test_contamination_of_many_rows():
    training = [prose(seed) for seed in range(400)]
    evaluation = [changed(prose(seed), 1, seed) for seed in range(100)] + [prose(seed) for seed in range(1000, 1100)]
    leakage = contamination(*arrays(training), *arrays(evaluation))
    assert set(leakage.near_rows.tolist()) <= set(range(100))
    assert len(leakage.near_rows) >= 95
    assert leakage.training_rows.tolist() == leakage.near_rows.tolist()
