"""Rows that are too long: what stays is whole, what goes is counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_data_support import CHATML, GOOD_TEMPLATES, LLAMA2, TOOLS, tokenizer

from llmtune.data import ChatEncoder, Conversation, Document, Message
from llmtune.data.truncation import left_out, shorten

TOK = tokenizer("byte_level")
BOS, EOS = TOK.bos_token_id, TOK.eos_token_id


def row(*turns: str, system: str | None = None, tools: object = None) -> Conversation:
    messages = [Message(role=role, content=turn) for role, turn in zip(["user", "assistant"] * 9, turns, strict=False)]
    if system is not None:
        messages.insert(0, Message(role="system", content=system))
    return Conversation(messages=tuple(messages), tools=tools, file="d.jsonl", line=1)


def text(encoded) -> str:
    return TOK.decode(encoded.input_ids)


def learned(encoded) -> str:
    return TOK.decode(encoded.input_ids[encoded.supervised])


def cut(record, max_length, policy, template=CHATML, supervise="all"):
    encoder = ChatEncoder(TOK, template, supervise=supervise)
    encoded = encoder.encode(record)
    assert len(encoded.input_ids) > max_length
    return encoded, shorten(encoder, record, encoded, max_length=max_length, policy=policy)


# ── left ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_left_keeps_the_newest_tokens():
    record = row("What is the capital of Peru?", "Lima")
    encoded, result = cut(record, 12, "left")
    assert result.encoded.input_ids.tolist() == encoded.input_ids[-12:].tolist()
    assert learned(result.encoded) == "Lima<|im_end|>"
    assert (result.tokens_lost, result.answer_tokens_lost, result.turns_lost) == (len(encoded.input_ids) - 12, 0, 0)


def test_left_keeps_the_beginning_of_the_text():
    record = row("What is the capital of Peru?", "Lima", "And of Ecuador, a country in the north?", "Quito")
    encoded, result = cut(record, 30, "left", LLAMA2)
    assert result.encoded.input_ids.tolist() == [BOS, *encoded.input_ids[-29:].tolist()]
    assert not result.encoded.supervised[0]
    assert len(result.encoded.input_ids) == 30


def test_left_does_not_learn_an_answer_without_its_beginning():
    record = row("a", "one two three four", "b", "five")
    whole = ChatEncoder(TOK, CHATML).encode(record)
    first, last = (int(np.flatnonzero(whole.supervised)[i]) for i in (0, -1))
    answers = int(whole.supervised.sum())
    for start in range(first + 1, last):
        _, result = cut(record, len(whole.input_ids) - start, "left")
        if result.encoded is None:
            assert result == left_out(whole)
            continue
        kept = learned(result.encoded)
        assert kept == "five<|im_end|>"
        assert result.answer_tokens_lost == answers - int(result.encoded.supervised.sum())
    _, result = cut(record, len(whole.input_ids) - first, "left")
    assert learned(result.encoded) == "five<|im_end|>"  # no token of the prompt is left before the first answer
    _, result = cut(record, len(whole.input_ids) - first + 1, "left")
    assert result.answer_tokens_lost == 0


def test_left_leaves_out_a_row_whose_last_answer_does_not_fit_behind_a_prompt():
    record = row("a", "one two three four five six seven")
    whole = ChatEncoder(TOK, CHATML).encode(record)
    begin = int(np.flatnonzero(whole.supervised)[0])
    length = len(whole.input_ids)
    assert cut(record, length - begin + 1, "left")[1].encoded is not None
    for max_length in (length - begin, length - begin - 1, 1):
        _, result = cut(record, max_length, "left")
        assert result.encoded is None
        assert (result.tokens_lost, result.answer_tokens_lost) == (length, int(whole.supervised.sum()))


def test_left_leaves_out_a_row_without_an_answer():
    messages = (Message(role="user", content="a" * 40), Message(role="assistant", content="b", supervised=False))
    _, result = cut(Conversation(messages=messages, file="f", line=1), 10, "left")
    assert result.encoded is None
    assert result.answer_tokens_lost == 0


def test_left_of_a_whole_text_keeps_its_end():
    encoded, result = cut(row("What is the capital?", "Lima"), 9, "left", supervise="text")
    assert result.encoded.input_ids.tolist() == encoded.input_ids[-9:].tolist()
    assert result.encoded.supervised.all()
    assert result.answer_tokens_lost == result.tokens_lost == len(encoded.input_ids) - 9


def test_a_document_keeps_its_beginning_and_no_end():
    record = Document(text="One, two, three and four make ten", file="f", line=1)
    encoded, result = cut(record, 6, "left")
    assert result.encoded.input_ids.tolist() == encoded.input_ids[:6].tolist()
    assert EOS not in result.encoded.input_ids
    assert result.encoded.supervised.all()
    assert result.tokens_lost == result.answer_tokens_lost == len(encoded.input_ids) - 6
    assert cut(record, 6, "turns")[1].encoded is None


# ── turns ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_turns_go_whole_and_oldest_first():
    record = row("q1", "a1", "q2", "a2", "q3", "a3", system="Be kind")
    encoder = ChatEncoder(TOK, CHATML)
    expected = [encoder.encode(row(*turns, system="Be kind")) for turns in (("q2", "a2", "q3", "a3"), ("q3", "a3"))]
    full = len(encoder.encode(record).input_ids)
    for max_length in range(len(expected[1].input_ids), full):
        encoded, result = cut(record, max_length, "turns")
        turns = 1 if max_length >= len(expected[0].input_ids) else 2
        assert result.turns_lost == turns
        assert text(result.encoded) == text(expected[turns - 1])
        assert learned(result.encoded) == learned(expected[turns - 1])
        assert result.tokens_lost == len(encoded.input_ids) - len(result.encoded.input_ids)
        assert result.answer_tokens_lost == encoded.supervised.sum() - result.encoded.supervised.sum()
    _, result = cut(record, len(expected[1].input_ids) - 1, "turns")
    assert (result.encoded, result.tokens_lost, result.turns_lost) == (None, full, 0)


def test_a_turn_is_a_question_and_all_that_answers_it_and_tools_stay():
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    messages = (
        Message(role="user", content="time?"),
        Message(role="assistant", content="", tool_calls=(call,)),
        Message(role="tool", content="noon"),
        Message(role="assistant", content="Noon."),
        Message(role="user", content="thanks"),
        Message(role="assistant", content="Fine."),
    )
    record = Conversation(messages=messages, tools=({"name": "now"},), file="f", line=1)
    whole = ChatEncoder(TOK, TOOLS).encode(record)
    _, result = cut(record, len(whole.input_ids) - 1, "turns", TOOLS)
    assert result.turns_lost == 1
    assert text(result.encoded) == (
        '<|im_start|>system\n[{"name": "now"}]<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n'
        "<|im_start|>assistant\nFine.<|im_end|>\n"
    )


def test_a_row_of_one_turn_cannot_lose_any():
    assert cut(row("a" * 40, "b"), 20, "turns")[1].encoded is None


def test_rows_of_many_turns_are_bisected():
    record = row(*[f"{kind}{i}" for i in range(9) for kind in "qa"])
    encoder, calls = ChatEncoder(TOK, CHATML), []

    class Counting(ChatEncoder):
        def encode_batch(self, records):
            calls.append(len(records))
            return super().encode_batch(records)

    encoded = encoder.encode(record)
    result = shorten(Counting(TOK, CHATML), record, encoded, max_length=len(encoded.input_ids) // 2, policy="turns")
    assert result.turns_lost == 5
    assert len(calls) <= 4


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=150, deadline=None)
@given(
    turns=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
    name=st.sampled_from(sorted(GOOD_TEMPLATES)),
    share=st.floats(0.02, 0.99),
    policy=st.sampled_from(["left", "turns"]),
    supervise=st.sampled_from(["all", "last", "completion", "text"]),
)
# The cut falls before a turn that has a beginning-of-text token of its own.
@example(turns=[(1, 1), (17, 30), (5, 30)], name="llama2", share=0.4140625, policy="left", supervise="all")
def test_nothing_is_lost_uncounted(turns, name, share, policy, supervise):
    record = row(*[f"{chr(97 + i)} " * count for i, turn in enumerate(turns) for count in turn])
    encoder = ChatEncoder(TOK, GOOD_TEMPLATES[name], supervise=supervise)
    encoded = encoder.encode(record)
    max_length = max(1, int(len(encoded.input_ids) * share))
    result = shorten(encoder, record, encoded, max_length=max_length, policy=policy)
    kept = result.encoded
    tokens, answers = (0, 0) if kept is None else (len(kept.input_ids), int(kept.supervised.sum()))
    assert tokens <= max_length
    assert tokens + result.tokens_lost == len(encoded.input_ids)
    assert answers + result.answer_tokens_lost == encoded.supervised.sum()
    if kept is None or supervise == "text":
        return
    assert 0 < answers < tokens
    assert kept.input_ids.dtype == np.int32
    last = record.messages[-1].content.strip()
    assert learned(kept).rstrip().removesuffix("</s>").removesuffix("<|im_end|>").rstrip().endswith(last)
    assert (encoded.input_ids[0] == BOS) == (kept.input_ids[0] == BOS)
    assert list(kept.input_ids[:2]).count(BOS) <= 1


@pytest.mark.parametrize("policy", ["left", "turns"])
def test_the_row_itself_is_left_as_it_was(policy):
    record = row("a b c", "d", "e", "f")
    encoder = ChatEncoder(TOK, CHATML)
    encoded = encoder.encode(record)
    before = (encoded.input_ids.copy(), encoded.supervised.copy())
    shorten(encoder, record, encoded, max_length=len(encoded.input_ids) - 3, policy=policy)
    assert (encoded.input_ids == before[0]).all()
    assert (encoded.supervised == before[1]).all()
