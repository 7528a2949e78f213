"""Statistics of text from mergeable tallies, the complexity score, and advice."""

from __future__ import annotations

import json
import pickle
import random
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import Conversation, Document, Message, PreferencePair
from llmtune.data import statistics as module
from llmtune.data.advice import advise
from llmtune.data.duplicates import Duplicates, Leakage, content_digest
from llmtune.data.statistics import (
    COMPLEXITY_PARTS,
    TextTally,
    complexity,
    compression_ratio,
    distinct_2,
    scripts,
)

LISTED = (  # keys that other programs read
    "good_rows",
    "chars",
    "answer_chars",
    "turns",
    "roles",
    "rows_with_system",
    "rows_with_tools",
)


def chat(*texts: str, system: str | None = None, tools=None) -> Conversation:
    roles = ["user", "assistant"] * len(texts)
    messages = [Message(role="system", content=system)] if system is not None else []
    messages += [Message(role=role, content=text) for role, text in zip(roles, texts, strict=False)]
    return Conversation(messages=tuple(messages), tools=tools, file="d.jsonl", line=1)


def document(text: str) -> Document:
    return Document(text=text, file="d.txt", line=1)


def text_of(record) -> str:
    if isinstance(record, Document):
        return record.text
    messages = record.messages if isinstance(record, Conversation) else (*record.prompt, *record.chosen)
    return "\n".join(message.content for message in messages)


def tally(records) -> TextTally:
    counted = TextTally()
    for record in records:
        counted.add(record, content_digest(text_of(record)))
    return counted


def sentence(seed: int, words: int = 12) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 8))) for _ in range(words)) + "."


def test_counts():
    records = [
        chat("Hi", "Hello", system="Be kind."),
        chat("1", "22", "333", "4444"),
        chat("Größe?", "12 cm", tools=({"type": "function"},)),
    ]
    statistics = tally(records).statistics()
    assert set(LISTED) <= set(statistics)
    assert statistics["good_rows"] == 3
    assert statistics["size_class"] == "small"
    assert statistics["chars"] == {"total": 36, "p50": 11, "p95": 15, "p99": 15, "max": 15}
    assert statistics["bytes"] == {"total": 38, "p50": 13, "p95": 15, "p99": 15, "max": 15}
    assert statistics["answer_chars"]["total"] == 16
    assert statistics["turns"] == {"total": 4, "p50": 1, "p95": 2, "p99": 2, "max": 2}
    assert statistics["roles"] == {"assistant": 4, "system": 1, "user": 4}
    assert (statistics["rows_with_system"], statistics["rows_with_tools"]) == (1, 1)
    assert statistics["sampled_rows"] == 3
    assert json.loads(json.dumps(statistics)) == statistics


def test_documents_have_no_turns():
    statistics = tally([document("Lima is the capital of Peru."), document("")]).statistics()
    assert statistics["good_rows"] == 2
    assert statistics["chars"]["max"] == 28
    assert "turns" not in statistics
    assert statistics["repetition"] == {"answer": 0.0, "prompt": 0.0}
    assert statistics["complexity"]["parts"]["log2_answer_chars"]["value"] == np.log2(28)


def test_preference_pairs_count_what_is_chosen():
    messages = chat("Hi", "Hello").messages
    pair = PreferencePair(prompt=messages[:1], chosen=messages[1:], rejected=messages[1:], file="d", line=1)
    statistics = tally([pair]).statistics()
    assert statistics["chars"]["total"] == 7
    assert statistics["roles"] == {"assistant": 1, "user": 1}


def test_no_rows():
    statistics = TextTally().statistics()
    assert statistics["good_rows"] == statistics["sampled_rows"] == statistics["chars"]["max"] == 0
    assert 0 <= statistics["complexity"]["score"] <= 1
    assert [advice.kind for advice in advise(statistics)] == ["few_rows"]


words = st.text("abc 12=é東;`{\n", max_size=12)
records = st.lists(
    st.one_of(
        st.builds(document, words),
        st.builds(chat, words, words),
        st.builds(chat, words, words, words, words, system=words, tools=st.sampled_from([None, ({},)])),
    ),
    max_size=40,
)


@given(records, st.data())
@settings(max_examples=150, deadline=None)
def test_however_the_rows_are_divided_the_statistics_agree(rows, data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE_ROWS", 8)  # so that most rows are left out of the sample
        patch.setattr(module, "SAMPLE_CHARS", 16)
        whole = tally(rows).statistics()
        mixed = data.draw(st.permutations(rows))
        cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
        parts = [tally(mixed[a:b]) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
        merged = TextTally()
        for part in data.draw(st.permutations(parts)):
            merged.merge(pickle.loads(pickle.dumps(part)))
        assert merged.statistics() == whole
        assert whole["sampled_rows"] == min(8, len({content_digest(text_of(row)) for row in rows}))
        assert 0 <= whole["complexity"]["score"] <= 1


def test_the_sample_is_bounded_in_rows_and_characters():
    counted = tally(chat(f"{seed} " * 40_000, "yes" * 9_000) for seed in range(30))
    assert len(pickle.dumps(counted)) < 30 * (module.SAMPLE_CHARS + 500)
    counted = TextTally()
    for digest in range(10_000):
        counted.add(document("a"), digest)
    assert counted.statistics()["sampled_rows"] == module.SAMPLE_ROWS
    assert len(counted._sample) <= module.SAMPLE_ROWS * 5 // 4


def test_scripts():
    shares = scripts(["Lima: 12 €", "Лима", "東京タワー", "Ｌｉ", "a\ud800\ue000"])  # noqa: RUF001
    assert list(shares) == ["latin", "cyrillic", "cjk", "katakana", "katakana-hiragana"]
    assert shares["latin"] == pytest.approx(7 / 16)
    assert sum(shares.values()) == pytest.approx(1)
    assert scripts(["12", ""]) == scripts([]) == {}


def test_diversity():
    same, varied = [sentence(0)] * 500, [sentence(seed) for seed in range(500)]
    assert distinct_2(same) < 0.05 < 0.9 < distinct_2(varied)
    assert compression_ratio(same) < 0.05 < 0.4 < compression_ratio(varied)
    assert distinct_2(["东京" * 600]) < 0.05
    assert distinct_2(varied) == pytest.approx(distinct_2(varied * 3), abs=0.01)  # not a matter of size
    assert distinct_2([]) == compression_ratio([]) == 0


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("```python\nx\n```", "code"),
        ("def f(x):\n    return x", "code"),
        ("int main() {\n}", "code"),
        ("It is 3 + 4 = 7", "math"),
        (r"\frac{1}{2}", "math"),
        ("On 2024-05-17 call 555-1234; from what I import goods {", None),
    ],
)
def test_structure(text, kind):
    structure = tally([chat("What?", text)]).statistics()["structure"]
    assert structure == {name: float(name == kind) for name in ("code", "math", "tools")} | {
        "any": float(kind is not None)
    }


def test_repetition_counts_answers_and_prompts():
    rows = [
        chat(f"{sentence(seed)}", "positive" if seed % 4 else sentence(seed), system="Label.") for seed in range(40)
    ]
    statistics = tally(rows).statistics()
    assert statistics["repetition"] == {"answer": 0.75, "prompt": 0.0, "most_common_answer": "positive"}
    rows = [chat("Tell me a story.", sentence(seed)) for seed in range(10)]
    assert tally(rows).statistics()["repetition"]["prompt"] == 1.0


# ── complexity ───────────────────────────────────────────────────────────────────────────────────────────────────

values = st.fixed_dictionaries({name: st.floats(0, 100) for name in COMPLEXITY_PARTS})


@given(values, st.sampled_from(list(COMPLEXITY_PARTS)), st.floats(0, 100))
@settings(deadline=None)
def test_complexity_rises_with_every_part(value, name, more):
    low, high = complexity(value), complexity(value | {name: value[name] + more})
    assert 0 <= low["score"] <= high["score"] + 1e-12 <= 1 + 1e-12


def test_complexity_says_how_it_is_made():
    document = complexity({name: one_at for name, (_, _, one_at) in COMPLEXITY_PARTS.items()})
    assert document["score"] == pytest.approx(1)
    assert complexity(dict.fromkeys(COMPLEXITY_PARTS, 0.0))["score"] == 0
    for part in complexity(dict.fromkeys(COMPLEXITY_PARTS, 0.4))["parts"].values():
        rise = (part["value"] - part["zero_at"]) / (part["one_at"] - part["zero_at"])
        assert part["score"] == min(1, max(0, rise))
    assert "weight" in document["definition"]


def test_complexity_orders_what_people_would_order():
    labels = [chat(f"Good or bad? It was {seed % 9}.", "good" if seed % 2 else "bad") for seed in range(200)]
    facts = [chat(sentence(seed), sentence(seed + 1)) for seed in range(200)]
    code = [chat(*[sentence(seed * 9 + i, 60) + "\n```\nx = 1\n```" for i in range(8)]) for seed in range(50)]
    scores = [tally(rows).statistics()["complexity"]["score"] for rows in (labels, facts, code)]
    assert scores[0] < 0.2 < scores[1] < 0.7 < scores[2]


# ── advice ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Learned:
    """The fields of Supervision that advice reads, of a data set with nothing to mend."""

    length_p95: int = 500
    length_p99: int = 700
    length_max: int = 900
    supervised_share_p50: float = 0.4
    unknown_share: float = 0.0
    byte_fallback_share: float = 0.01
    rows_too_long: int = 0
    rows_truncated: int = 0
    rows_dropped: int = 0
    tokens_lost: int = 0
    answer_tokens_lost: int = 0
    turns_lost: int = 0


@pytest.fixture(scope="module")
def well() -> dict:
    return tally(chat(sentence(seed), sentence(-seed)) for seed in range(1, 1_200)).statistics()


def kinds(*args) -> list[tuple[str, str]]:
    return [(advice.kind, advice.severity) for advice in advise(*args)]


def duplicates(rows: int = 100, exact: int = 0, near: int | None = 0) -> Duplicates:
    return Duplicates(
        rows=rows, exact_rows=exact, exact_groups=exact, near_rows=near, near_groups=near, largest_group=1
    )


def leakage(exact: int, near: int | None) -> Leakage:
    return Leakage(
        rows=100,
        exact_rows=np.arange(exact),
        near_rows=None if near is None else np.arange(near),
        training_rows=np.arange(exact + (near or 0)),
        examples=(),
    )


def test_silent_when_all_is_well(well):
    assert advise(well) == ()
    assert advise(well, duplicates(near=None), Learned(), leakage(0, None)) == ()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"good_rows": 400}, [("few_rows", "info")]),
        ({"repetition": {"answer": 0.4, "prompt": 0, "most_common_answer": "no"}}, [("imbalance", "info")]),
        ({"repetition": {"answer": 0.9, "prompt": 0, "most_common_answer": "no"}}, [("imbalance", "warning")]),
        ({"scripts": {"latin": 0.95, "cyrillic": 0.05}}, [("mixed_scripts", "info")]),
        ({"scripts": {"cyrillic": 0.95, "latin": 0.03, "greek": 0.02}}, []),
        ({"scripts": {"cjk": 0.9, "hiragana": 0.05, "katakana": 0.05}}, []),
        ({"diversity": {"distinct_2": 0.2, "compression_ratio": 0.4}}, [("low_diversity", "info")]),
        ({"diversity": {"distinct_2": 0.9, "compression_ratio": 0.05}}, [("low_diversity", "info")]),
        ({"repetition": {"answer": 1.0, "prompt": 0, "most_common_answer": "no"}, "sampled_rows": 5}, []),
    ],
)
def test_advice_about_text(well, change, expected):
    assert kinds(well | change) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (duplicates(exact=2), [("duplicates", "warning")]),
        (duplicates(rows=10_000, exact=2), [("duplicates", "info")]),
        (duplicates(near=2), [("near_duplicates", "info")]),
        (duplicates(exact=5, near=20), [("duplicates", "warning"), ("near_duplicates", "warning")]),
    ],
)
def test_advice_about_duplicates(well, given, expected):
    assert kinds(well, given) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"length_max": 9_000}, [("long_tail", "info")]),
        ({"supervised_share_p50": 0.02}, [("low_supervision", "warning")]),
        ({"unknown_share": 0.01}, [("unknown_tokens", "warning")]),
        ({"byte_fallback_share": 0.2}, [("byte_fallback", "warning")]),
        ({"rows_too_long": 3, "rows_dropped": 3, "tokens_lost": 9_000}, [("too_long", "warning")]),
    ],
)
def test_advice_about_supervision(well, change, expected):
    assert kinds(well, None, replace(Learned(), **change)) == expected


@pytest.mark.parametrize("given", [leakage(1, None), leakage(0, 1), leakage(3, 2)])
def test_advice_about_leakage(well, given):
    assert kinds(well, None, None, given) == [("leakage", "warning")]


def test_flags_in_advice_are_keys_of_the_configuration(well):
    import re

    from llmtune.config import RunConfig

    poor = well | {"good_rows": 3, "diversity": {"distinct_2": 0.1, "compression_ratio": 0.1}}
    learned = Learned(
        length_max=90_000, supervised_share_p50=0.0, unknown_share=1.0, byte_fallback_share=1.0, rows_too_long=1
    )
    found = advise(poor, duplicates(exact=9, near=9), learned, leakage(1, 1))
    assert len(found) == 10
    assert [advice.severity for advice in found] == sorted((a.severity for a in found), reverse=True)
    flags = re.findall(r"--set (\w+)\.(\w+)=(\w+)", " ".join(advice.suggestion for advice in found))
    assert len(flags) >= 6
    for group, key, value in flags:
        RunConfig(**{group: {key: int(value) if value.isdigit() else value}})
    assert all(json.dumps(advice.to_json()) for advice in found)
