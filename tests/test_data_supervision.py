"""The supervision check: every count, every reason not to start, and that parts add up to the whole."""

from __future__ import annotations

import copy
import json
import pickle

import numpy as np
import pytest
from test_data_support import CHATML, tokenizer

from llmtune.data import ChatEncoder, Conversation, Document, Encoded, Message
from llmtune.data.supervision import SupervisionTally, require_supervised, tokenizer_problems
from llmtune.data.truncation import Cut, left_out, shorten
from llmtune.errors import DataError

TOK = tokenizer("byte_level")


def row(answer: str, line: int = 1, *, weight: bool = True) -> Conversation:
    messages = (Message(role="user", content="What?"), Message(role="assistant", content=answer, supervised=weight))
    return Conversation(messages=messages, file="d.jsonl", line=line)


def made(ids: list[int], mask: list[int]) -> Encoded:
    return Encoded(input_ids=np.asarray(ids, np.int32), supervised=np.asarray(mask, np.bool_))


def tally(encoder: ChatEncoder | None = None, **more) -> SupervisionTally:
    return SupervisionTally.of(encoder or ChatEncoder(TOK, CHATML), **more)


def test_counts_of_good_rows():
    encoder = ChatEncoder(TOK, CHATML)
    counts = tally(encoder, vocab_size=len(TOK))
    rows = [row("a" * n, line=n) for n in range(1, 101)]
    encoded = encoder.encode_batch(rows)
    for record, result in zip(rows, encoded, strict=True):
        counts.add(record, result)
    supervision = counts.supervision()
    lengths = sorted(len(result.input_ids) for result in encoded)
    shares = sorted(result.supervised.mean() for result in encoded)
    assert (supervision.rows, supervision.tokens) == (100, sum(lengths))
    assert supervision.supervised_tokens == sum(result.supervised.sum() for result in encoded)
    assert (supervision.length_p50, supervision.length_p95) == (lengths[50], lengths[95])
    assert (supervision.length_p99, supervision.length_max) == (lengths[99], lengths[99])
    assert supervision.longest_row == "d.jsonl:100"
    found = [supervision.supervised_share_p5, supervision.supervised_share_p50, supervision.supervised_share_p95]
    assert found == pytest.approx([shares[5], shares[50], shares[95]])
    assert supervision.stop_token_supervised
    assert supervision.bos_once
    assert supervision.ids_in_vocabulary
    assert not supervision.pad_is_eos
    require_supervised(supervision)


def test_the_document_of_check_keeps_its_keys():
    document = json.loads(json.dumps(tally().supervision().to_json()))
    keys = "stop_token_supervised rows_without_supervision rows_truncated rows_too_long supervised_share length_p50 "
    keys += (
        "length_p95 length_p99 length_max supervised_share_p5 supervised_share_p50 supervised_share_p95 rows_dropped "
    )
    keys += "tokens_lost answer_tokens_lost turns_lost bos_once ids_in_vocabulary pad_is_eos unknown_share "
    keys += "byte_fallback_share longest_row"
    assert set(keys.split()) <= set(document)
    assert document["stop_token_supervised"] is False  # of no rows nothing is true
    assert document["length_max"] == 0


def test_rows_that_were_cut_count_as_they_are_trained_on():
    encoder = ChatEncoder(TOK, CHATML)
    counts = tally(encoder, max_length=20)
    short, long = row("a", 1), row("a b " * 20, 2)
    short_ids, long_ids = encoder.encode(short), encoder.encode(long)
    messages = (*short.messages, Message(role="user", content="x " * 9), Message(role="assistant", content="b"))
    turns = Conversation(messages=messages, file="d.jsonl", line=3)
    turns_ids = encoder.encode(turns)
    cut = shorten(encoder, turns, turns_ids, max_length=20, policy="left")
    counts.add(short, short_ids)
    counts.add(long, long_ids, left_out(long_ids))
    counts.add(turns, turns_ids, cut)
    counts.add(row("a b " * 20, 4), long_ids)
    supervision = counts.supervision()
    assert (supervision.rows, supervision.rows_too_long) == (3, 3)
    assert (supervision.rows_truncated, supervision.rows_dropped) == (1, 1)
    assert supervision.tokens_lost == len(long_ids.input_ids) + cut.tokens_lost
    assert supervision.answer_tokens_lost == long_ids.supervised.sum() + cut.answer_tokens_lost
    assert supervision.tokens == len(short_ids.input_ids) + 20 + len(long_ids.input_ids)
    assert supervision.longest_row == "d.jsonl:4"


def test_a_document_cut_off_at_its_end_needs_no_stop_token():
    encoder = ChatEncoder(TOK)
    counts = tally(encoder)
    document = Document(text="one two three four", file="f", line=1)
    encoded = encoder.encode(document)
    counts.add(document, encoded, shorten(encoder, document, encoded, max_length=4, policy="left"))
    counts.add(document, encoded)
    assert counts.supervision().stop_token_supervised
    counts.add(document, made([5, 6], [1, 1]))
    assert not counts.supervision().stop_token_supervised


def test_where_the_whole_text_is_learned_a_line_break_may_follow_the_stop_token():
    encoder = ChatEncoder(TOK, CHATML, supervise="text")
    counts = tally(encoder)
    counts.add(row("a"), encoder.encode(row("a")))
    supervision = counts.supervision()
    assert supervision.stop_token_supervised
    assert supervision.supervised_share == 1.0
    require_supervised(supervision)


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_parts_add_up(parts):
    encoder = ChatEncoder(TOK, CHATML)
    rows = [row("a" * (n % 9 + 1), line=n, weight=n % 5 > 0) for n in range(40)]
    encoded = encoder.encode_batch(rows)
    whole = tally(encoder, vocab_size=300, max_length=12)
    pieces = [tally(encoder, vocab_size=300, max_length=12) for _ in range(parts)]
    for n, (record, result) in enumerate(zip(rows, encoded, strict=True)):
        cut = Cut(encoded=result, tokens_lost=3, answer_tokens_lost=1, turns_lost=2) if n % 3 == 0 else None
        whole.add(record, result, cut)
        pieces[n * parts // len(rows)].add(record, result, cut)
    total = pieces[0]
    for piece in pieces[1:]:
        total.merge(pickle.loads(pickle.dumps(piece)))
    assert total.supervision() == whole.supervision()
    assert whole.supervision().rows_without_supervision == 8


def test_a_row_takes_a_few_machine_integers():
    counts = tally()
    empty = len(pickle.dumps(counts))
    encoded = ChatEncoder(TOK, CHATML).encode(row("a"))
    for n in range(10_000):
        counts.add(row("a", n), encoded)
    assert (len(pickle.dumps(counts)) - empty) / 10_000 < 10


def test_unknown_tokens_and_single_bytes_are_counted():
    tok = tokenizer("metaspace")
    encoder = ChatEncoder(tok, CHATML)
    counts = tally(encoder)
    encoded = encoder.encode(row("日本"))
    counts.add(row("日本"), encoded)
    single = sum(token.startswith("<0x") for token in tok.convert_ids_to_tokens(encoded.input_ids.tolist()))
    assert single >= 6
    assert counts.supervision().byte_fallback_share == single / len(encoded.input_ids)
    assert counts.supervision().unknown_share == 0
    words = copy.deepcopy(tok)
    words.unk_token = "<unk>"
    counts = tally(ChatEncoder(words, CHATML))
    counts.add(row("a"), made([words.unk_token_id, 7, 8, words.eos_token_id], [0, 1, 1, 1]))
    assert counts.supervision().unknown_share == 0.25


# ── reasons not to start ─────────────────────────────────────────────────────────────────────────────────────────


def test_every_reason_is_given_at_once_with_places_and_the_way_out():
    eos, bos = TOK.eos_token_id, TOK.bos_token_id
    counts = tally(vocab_size=1000)
    counts.add(row("a", 1), made([bos, 5, eos], [0, 1, 1]))
    counts.add(row("a", 2), made([bos, 5, eos], [0, 0, 0]))
    counts.add(row("a", 3), made([bos, 5, 6], [0, 1, 1]))
    counts.add(row("a", 4), made([bos, bos, 5, eos], [0, 0, 1, 1]))
    counts.add(row("a", 5), made([bos, 1000, eos], [0, 1, 1]))
    supervision = counts.supervision()
    assert (supervision.rows_without_supervision, supervision.rows_without_stop) == (1, 1)
    assert not supervision.stop_token_supervised
    assert not supervision.bos_once
    assert not supervision.ids_in_vocabulary
    with pytest.raises(DataError) as error:
        require_supervised(supervision)
    message = str(error.value)
    for part in (
        "4 reasons not to start.",
        "1 of 5 rows (d.jsonl:2) hold no token to learn. Give an answer in each a weight of 1",
        "1 of 5 rows (d.jsonl:3) end without a supervised stop token",
        "--set data.chat_template=FILE",
        "Rows (d.jsonl:4 …) begin with two beginning-of-text tokens.",
        "Rows (d.jsonl:5 …) hold token ids that the model has no embedding for.",
    ):
        assert part in message


def test_only_a_few_places_are_listed():
    counts = tally()
    for n in range(50):
        counts.add(row("a", n), made([5, 6], [0, 0]))
    with pytest.raises(
        DataError, match=r"^50 of 50 rows \(d\.jsonl:0, d\.jsonl:1, d\.jsonl:2, d\.jsonl:3, d\.jsonl:4\)"
    ):
        require_supervised(counts.supervision())


def test_no_rows_are_a_reason():
    with pytest.raises(DataError, match="There is no row to learn from"):
        require_supervised(tally().supervision())
    counts = tally()
    counts.add(row("a"), made([5] * 9, [1] * 9), left_out(made([5] * 9, [1] * 9)))
    with pytest.raises(DataError, match=r"all 1 were left out for their length\. Raise --set data\.max_length"):
        require_supervised(counts.supervision())


def test_pad_as_eos_is_harmless_because_masks_go_by_position():
    tok = copy.deepcopy(TOK)
    tok.pad_token = tok.eos_token
    encoder = ChatEncoder(tok, CHATML.replace("<|im_end|>", "</s>"))
    counts = tally(encoder)
    counts.add(row("a"), encoder.encode(row("a")))
    supervision = counts.supervision()
    assert supervision.pad_is_eos
    assert supervision.stop_token_supervised
    require_supervised(supervision)


def test_what_is_wrong_with_a_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert tokenizer_problems(TOK) == []
    without = copy.deepcopy(TOK)
    without.eos_token = None
    assert "has no end-of-text token" in tokenizer_problems(without)[0]
    # One token for everything, as GPT-2 has it: nothing is unknown to a byte-level tokenizer.
    one = copy.deepcopy(TOK)
    one.bos_token = one.unk_token = one.pad_token = one.eos_token
    assert tokenizer_problems(one) == []
    backend = Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="</s>", pad_token="</s>")
    assert "both at the end of a text and for what it does not know" in tokenizer_problems(words)[0]
    counts = tally(ChatEncoder(words, CHATML))
    counts.add(row("a"), made([1, 0], [0, 1]))
    with pytest.raises(DataError, match=r"^The tokenizer writes '</s>' both"):
        require_supervised(counts.supervision())
