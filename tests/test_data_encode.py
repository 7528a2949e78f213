"""Encoding as a whole: the cache, rows too long, bad rows, the report, the repaired file."""

from __future__ import annotations

import json
import pickle
import sys

import numpy as np
import orjson
import pytest
from test_data_support import CHATML, LLAMA2, tokenizer

from llmtune.data import ChatEncoder, DataStats, check, encode, read, split, survey, write_fixed
from llmtune.errors import ConfigError, DataError


@pytest.fixture
def tok():
    return tokenizer("byte_level")


def rows(count: int, *, start: int = 0) -> list[dict]:
    return [
        {"question": f"What is {n}?", "answer": f"It is {n}" + " and more" * (n % 7)}
        for n in range(start, start + count)
    ]


def write(path, lines) -> object:
    path.write_bytes(b"".join((line if isinstance(line, bytes) else orjson.dumps(line)) + b"\n" for line in lines))
    return path


def test_encoded_rows_are_those_of_the_encoder_in_order(tmp_path, tok):
    path = write(tmp_path / "d.jsonl", rows(600))
    done = []
    dataset = encode(path, tok, template=CHATML, cache_dir=tmp_path / "cache", progress=done.append)
    expected = ChatEncoder(tok, CHATML).encode_batch(list(read(path)))
    assert len(dataset) == 600
    for i in (0, 1, 255, 256, 599, -1):
        assert dataset[i].input_ids.tolist() == expected[i].input_ids.tolist()
        assert dataset[i].supervised.tolist() == expected[i].supervised.tolist()
    assert dataset.lengths.tolist() == [len(row.input_ids) for row in expected]
    assert dataset.supervised_counts.tolist() == [row.supervised.sum() for row in expected]
    assert dataset.location(5) == (str(path), 6)
    assert done == sorted(done)
    assert done[-1] == 600
    with pytest.raises(IndexError):
        dataset[600]


def test_stats(tmp_path, tok):
    dataset = encode(rows(100), tok, template=CHATML, cache_dir=tmp_path)
    stats = dataset.stats
    assert (stats.rows, stats.tokens) == (100, int(dataset.lengths.sum()))
    assert stats.supervised_tokens == int(dataset.supervised_counts.sum())
    ordered = sorted(dataset.lengths)
    assert (stats.length_p50, stats.length_p95, stats.length_p99, stats.length_max) == tuple(
        ordered[i] for i in (50, 95, 99, 99)
    )
    assert 0 < stats.supervised_share < 1
    assert json.loads(json.dumps(stats.to_json()))["estimated"] is False


def test_the_second_time_nothing_is_tokenised(tmp_path, tok):
    path, cache = write(tmp_path / "d.jsonl", rows(10)), tmp_path / "cache"
    first = encode(path, tok, template=CHATML, cache_dir=cache)
    calls = []
    again = encode(path, tok, template=CHATML, cache_dir=cache, progress=calls.append)
    assert calls == []
    assert again.stats == first.stats
    moved = path.rename(tmp_path / "moved.jsonl")
    found = encode(moved, tok, template=CHATML, cache_dir=cache, progress=calls.append)
    assert calls == []
    assert found.location(0) == (str(moved), 1)


def test_places_are_told_by_the_names_that_files_have_now(tmp_path, tok):
    data = [*rows(3), {"question": "a", "answer": ""}, {"question": "long", "answer": "word " * 99}]
    settings = dict(template=CHATML, cache_dir=tmp_path / "cache", on_bad_row="report", max_length=60)
    path = write(tmp_path / "d.jsonl", data)
    encode(path, tok, **settings)
    moved = path.rename(tmp_path / "with:colon.jsonl")
    found = encode(moved, tok, **settings).facts
    assert [problem.file for problem in found.problems] == [str(moved)]
    assert found.supervision.longest_row.startswith(f"{moved}:")
    assert found.too_long_at[0].startswith(f"{moved}:5 (")
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


def test_whatever_changes_the_rows_changes_the_cache(tmp_path, tok):
    kinds = [
        dict(data=rows(5), tokenizer=tok, template=CHATML),
        dict(data=rows(5)[::-1], tokenizer=tok, template=CHATML),
        dict(data=rows(5), tokenizer=tokenizer("metaspace"), template=CHATML),
        dict(data=rows(5), tokenizer=tok, template=LLAMA2),
        dict(data=rows(5), tokenizer=tok, template=CHATML, max_length=1000),
        dict(data=rows(5), tokenizer=tok, template=CHATML, max_length=1000, too_long="left"),
        dict(data=rows(5), tokenizer=tok, template=CHATML, max_length=1000, too_long="turns"),
        dict(data=rows(5), tokenizer=tok, template=CHATML, supervise="last"),
        dict(data=rows(5), tokenizer=tok, template=CHATML, vocab_size=500),
        dict(data=rows(5), tokenizer=tok, template=CHATML, columns={"question": "answer", "answer": "question"}),
    ]
    for number, kind in enumerate(kinds, start=1):
        kind = dict(kind)
        encode(kind.pop("data"), kind.pop("tokenizer"), cache_dir=tmp_path, **kind)
        assert len(list(tmp_path.glob("*.arrow"))) == number
    # Policies that leave the same rows share them.
    encode(rows(5), tok, template=CHATML, cache_dir=tmp_path, max_length=1000, too_long="drop", on_bad_row="skip")
    assert len(list(tmp_path.glob("*.arrow"))) == len(kinds)


def test_padding_and_truncation_of_an_earlier_call_do_not_change_the_cache(tmp_path):
    tok = pickle.loads(pickle.dumps(tokenizer("byte_level")))
    encode(rows(5), tok, template=CHATML, cache_dir=tmp_path)
    tok(["a", "b c"], padding=True, truncation=True, max_length=4)
    encode(rows(5), tok, template=CHATML, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no facts", "facts cut"])
def test_a_damaged_cache_is_built_again(tmp_path, tok, damage):
    first = encode(rows(20), tok, template=CHATML, cache_dir=tmp_path)
    expected = [first[i].input_ids.tolist() for i in range(20)]
    del first
    (file,) = tmp_path.glob("*.arrow")
    content = file.read_bytes()
    facts = file.with_suffix(".json")
    if damage == "no facts":
        facts.unlink()
    elif damage == "facts cut":
        facts.write_bytes(facts.read_bytes()[:10])
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        file.unlink()
        file.write_bytes({"truncated": content[:middle], "flipped": flipped, "empty": b""}[damage])
    again = encode(rows(20), tok, template=CHATML, cache_dir=tmp_path)
    assert [again[i].input_ids.tolist() for i in range(20)] == expected
    assert file.read_bytes() == content


def test_nothing_half_written_is_left_behind(tmp_path, tok):
    with pytest.raises(ConfigError):
        encode(rows(3), tok, cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix != ".lock"] == []
    with pytest.raises(DataError):
        encode([*rows(3), {"question": "a", "answer": None}], tok, template=CHATML, cache_dir=tmp_path)
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.suffix != ".lock") == [".arrow", ".json"]


def test_selection_and_pickle(tmp_path, tok):
    dataset = encode(rows(10), tok, template=CHATML, cache_dir=tmp_path)
    chosen = dataset.select([7, 2, 2]).select([0, 2])
    assert [chosen.location(i)[1] for i in range(2)] == [8, 3]
    copied = pickle.loads(pickle.dumps(chosen))
    assert copied[1].input_ids.tolist() == dataset[2].input_ids.tolist()
    assert copied.lengths.tolist() == dataset.lengths[[7, 2]].tolist()
    assert len(dataset.select([])) == 0
    assert dataset.select([]).stats.tokens == 0


# ── policies ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_long_rows_are_refused_with_the_way_out_or_dropped_and_counted(tmp_path, tok):
    long = {"question": "long", "answer": "word " * 300}
    data = [*rows(3), long, *rows(3), long]
    with pytest.raises(DataError) as error:
        encode(data, tok, template=CHATML, cache_dir=tmp_path, max_length=100)
    text = str(error.value)
    assert "2 of 8 rows are longer than data.max_length=100 tokens: rows:4 (" in text
    assert "--set data.too_long=drop" in text
    longest = int(text.split("--set data.max_length=")[1].split(",")[0])
    assert len(encode(data, tok, template=CHATML, cache_dir=tmp_path, max_length=longest)) == 8
    dataset = encode(data, tok, template=CHATML, cache_dir=tmp_path, max_length=100, too_long="drop")
    assert (len(dataset), dataset.stats.dropped_too_long) == (6, 2)
    assert dataset.location(3) == ("rows", 5)
    with pytest.raises(DataError, match="2 of 2 rows"):
        encode([long, long], tok, template=CHATML, cache_dir=tmp_path, max_length=100, too_long="drop")


def test_bad_rows_are_one_error_or_skipped_and_listed(tmp_path, tok):
    path = write(tmp_path / "d.jsonl", [*rows(3), b'{"question": "a"', {"question": "a", "answer": None}, *rows(3)])
    with pytest.raises(DataError) as error:
        encode(path, tok, template=CHATML, cache_dir=tmp_path)
    text = str(error.value)
    assert f"{path}:4: the JSON is cut off" in text
    assert f"{path}:5:answer: the field 'answer' is null" in text
    assert "--set data.on_bad_row=skip (2 of 8 rows affected)" in text
    dataset = encode(path, tok, template=CHATML, cache_dir=tmp_path, on_bad_row="skip")
    assert (len(dataset), dataset.stats.skipped_bad) == (6, 2)
    assert [problem.line for problem in dataset.facts.problems] == [4, 5]
    bad = [{"question": "a", "answer": ""}] * 20
    with pytest.raises(DataError, match=r"20 problems.*and 10 more.*20 of 20 rows affected"):
        encode(bad, tok, template=CHATML, cache_dir=tmp_path, on_bad_row="skip")


def test_template_refusals_are_bad_rows_too(tmp_path, tok):
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    data = [{"messages": turns[1:]}, {"messages": turns}]
    with pytest.raises(DataError, match=r"rows:2: the chat template refuses the row: .*alternate.*\(1 of 2 rows"):
        encode(data, tok, template=LLAMA2, cache_dir=tmp_path)
    assert len(encode(data, tok, template=LLAMA2, cache_dir=tmp_path, on_bad_row="skip")) == 1


def test_texts(tmp_path, tok):
    path = tmp_path / "d.txt"
    path.write_text("one line\nanother line\n")
    dataset = encode(path, tok, cache_dir=tmp_path / "cache")
    assert tok.decode(dataset[0].input_ids) == "one line\nanother line</s>"
    dataset = encode(read(path, text_rows="lines"), tok, cache_dir=tmp_path / "cache")
    assert dataset.stats.supervised_tokens == dataset.stats.tokens
    assert tok.decode(dataset[1].input_ids) == "another line</s>"


def test_estimates_without_a_tokenizer(tok, tmp_path):
    data = rows(200)
    real = encode(data, tok, template=CHATML, cache_dir=tmp_path).stats
    per_token = sum(len(row["question"]) + len(row["answer"]) for row in data) / (real.tokens - 200 * 15)
    estimated = survey([read([*data, {"question": 1, "answer": ""}])]).stats(bytes_per_token=per_token)
    assert estimated.estimated
    assert (estimated.rows, estimated.skipped_bad) == (200, 1)
    assert abs(estimated.tokens / real.tokens - 1) < 0.2
    assert 0 < estimated.supervised_tokens < estimated.tokens
    shortened = survey([read(data)]).stats(bytes_per_token=per_token, max_length=estimated.length_p50)
    assert shortened.dropped_too_long > 0
    assert survey([read([{"text": "12345678"}])]).stats(bytes_per_token=4) == DataStats(
        rows=1,
        tokens=3,
        supervised_tokens=3,
        length_p50=3,
        length_p95=3,
        length_p99=3,
        length_max=3,
        estimated=True,
    )


# ── check ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_report_of_good_data(tmp_path, tok):
    path = write(tmp_path / "d.jsonl", rows(50))
    report = check(path)
    assert report.ok
    assert (report.format, report.rows, report.bytes) == ("question_answer", 50, path.stat().st_size)
    assert report.statistics["roles"] == {"assistant": 50, "user": 50}
    assert "tokens" not in report.to_json()
    report.raise_if_bad()


def test_what_is_learned_is_counted_with_the_rows(tmp_path, tok):
    cache = tmp_path / "cache"
    whole = encode(rows(50), tok, template=CHATML, cache_dir=cache)
    found = whole.facts.supervision
    assert (found.tokens, found.supervised_tokens) == (whole.stats.tokens, whole.stats.supervised_tokens)
    assert (found.stop_token_supervised, found.rows_without_supervision, found.rows_truncated) == (True, 0, 0)
    shorter = encode(rows(50), tok, template=CHATML, cache_dir=cache, max_length=found.length_p50, on_bad_row="report")
    counts = shorter.facts.supervision
    assert counts.rows_too_long == counts.rows_dropped == shorter.facts.too_long == 50 - len(shorter) > 0
    assert counts.tokens + counts.tokens_lost == found.tokens


def test_only_reported_nothing_is_refused_and_everything_listed_in_order(tmp_path, tok):
    system = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    lines = [
        {"messages": system[1:]},
        {"messages": system},
        b"{broken",
        {"messages": [{"role": "robot", "content": None}]},
        {"messages": system[1:]},
    ]
    path = write(tmp_path / "d.jsonl", lines)
    found = encode(path, tok, template=LLAMA2, cache_dir=tmp_path / "cache", on_bad_row="report").facts
    assert (found.rows, found.bad_rows, found.num_problems) == (5, 3, 4)
    assert [problem.line for problem in found.problems] == [2, 3, 4, 4]
    assert set(found.problems[0].to_json()) == {"file", "line", "field", "problem", "hint"}
    bad = {"question": "a", "answer": ""}
    assert len(encode([bad], tok, template=CHATML, cache_dir=tmp_path / "cache", on_bad_row="report")) == 0


def test_processes_and_chunks_do_not_change_the_rows(tmp_path, tok, monkeypatch):
    data = [*rows(300), {"question": "a", "answer": ""}, *rows(5, start=400)]
    path = write(tmp_path / "d.jsonl", data)
    settings = dict(template=CHATML, on_bad_row="skip", max_length=40, too_long="left")
    one = encode(path, tok, cache_dir=tmp_path / "one", **settings)
    monkeypatch.setattr(sys.modules["llmtune.data.encode"], "_CHUNK_BYTES", 2_000)
    two = encode(path, tok, cache_dir=tmp_path / "two", processes=2, **settings)
    assert one.facts == two.facts
    assert [one.location(i) for i in range(len(one))] == [two.location(i) for i in range(len(two))]
    assert [one[i].input_ids.tolist() for i in range(len(one))] == [two[i].input_ids.tolist() for i in range(len(two))]
    assert one.digests.tolist() == two.digests.tolist()
    assert (one.signatures == two.signatures).all()


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_large_file_is_encoded_piece_by_piece(tmp_path, tok, monkeypatch, suffix):
    path = tmp_path / f"d{suffix}"
    path.write_bytes(orjson.dumps(rows(900)) if suffix == ".json" else b"\n".join(map(orjson.dumps, rows(900))))
    whole = encode(path, tok, template=CHATML, cache_dir=tmp_path / "whole")
    monkeypatch.setattr(sys.modules["llmtune.data.encode"], "_PIECE_TOKENS", 1_000)
    done = []
    pieces = encode(path, tok, template=CHATML, cache_dir=tmp_path / "pieces", progress=done.append)
    assert len(done) > 3
    assert pieces.facts == whole.facts
    assert pieces.lengths.tolist() == whole.lengths.tolist()
    assert pieces[899].input_ids.tolist() == whole[899].input_ids.tolist()


# ── mixes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def mix(*weights: float) -> list:
    parts = [rows(10), [{"instruction": "Say hi", "output": f"hi {n}"} for n in range(6)], rows(4, start=50)]
    return [read(part, weight=weight) for part, weight in zip(parts, weights, strict=True)]


def test_a_mix_keeps_its_parts_in_order_and_its_weights(tmp_path, tok):
    dataset = encode(mix(1.0, 2.0, 0.5), tok, template=CHATML, cache_dir=tmp_path)
    assert len(dataset) == 20
    assert [(part.num_rows, part.weight) for part in dataset.parts] == [(10, 1.0), (6, 2.0), (4, 0.5)]
    assert dataset.rows_per_epoch == dataset.stats.rows == 10 + 12 + 2
    assert dataset.stats.tokens == sum(dataset.lengths[:10]) + 2 * sum(dataset.lengths[10:16]) + round(
        sum(dataset.lengths[16:]) / 2
    )
    chosen = dataset.select([0, 3, 11, 17, 19])
    assert [part.num_rows for part in chosen.parts] == [2, 1, 2]
    assert pickle.loads(pickle.dumps(chosen)).parts == chosen.parts
    # Weights are no part of the rows.
    encode(mix(1.0, 1.0, 1.0), tok, template=CHATML, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.arrow"))) == 1


def test_a_split_of_a_mix_keeps_its_weights(tmp_path, tok):
    train, held_out = split(encode(mix(1.0, 2.0, 0.5), tok, template=CHATML, cache_dir=tmp_path), 0.2, seed=3)
    assert sum(part.num_rows for part in train.parts) == len(train)
    assert [part.weight for part in train.parts] == [1.0, 2.0, 0.5]
    assert len(train) + len(held_out) == 20


def test_one_report_about_a_mix():
    report = check(mix(1.0, 2.0, 0.5))
    assert (report.rows, report.format) == (20, "question_answer + alpaca")
    assert report.statistics["good_rows"] == 20


def test_one_bad_row_reads_as_in_the_standards(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report = check(write(tmp_path / "chats.jsonl", [good, {"messages": good["messages"][:1]}]))
    with pytest.raises(DataError) as error:
        report.raise_if_bad()
    assert str(error.value).removeprefix(str(tmp_path) + "/") == (
        "chats.jsonl:2:messages: there is no assistant turn, so nothing to learn. Add the answer, or remove the row, "
        "or pass --set data.on_bad_row=skip (1 of 2 rows affected)."
    )


def test_preference_data_is_counted_too():
    report = check([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    assert (report.ok, report.format) == (True, "preference")


def test_fixed_file_and_quarantine(tmp_path):
    good = rows(4)
    path = write(tmp_path / "d.jsonl", [good[0], b"{broken", good[1], {"question": "a", "answer": ""}, *good[2:]])
    out = tmp_path / "clean.jsonl"
    assert write_fixed(path, out) == (4, 2)
    assert [orjson.loads(line) for line in out.read_bytes().splitlines()] == good
    quarantined = [orjson.loads(line) for line in (tmp_path / "clean.quarantine.jsonl").read_bytes().splitlines()]
    assert [(entry["line"], entry["row"] is None) for entry in quarantined] == [(2, True), (4, False)]
    assert "is empty" in quarantined[1]["problems"][0]["problem"]
    assert check(out).ok
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.jsonl", "clean.quarantine.jsonl", "d.jsonl"]
    for bad in (path, tmp_path / "clean.csv"):
        with pytest.raises(ConfigError, match=r"a new \.jsonl file"):
            write_fixed(path, bad)


def test_rows_are_views_and_cannot_be_changed(tmp_path, tok):
    row = encode(rows(1), tok, template=CHATML, cache_dir=tmp_path)[0]
    assert isinstance(row.input_ids, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        row.input_ids[0] = 1
