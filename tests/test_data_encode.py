"""Encoding as a whole: the cache, rows too long, bad rows, the report, the repaired file, the split."""

from __future__ import annotations

import json
import pickle

import numpy as np
import orjson
import pytest
from test_data_support import CHATML, LLAMA2, tokenizer

from llmtune.data import ChatEncoder, DataStats, check, encode, estimate_stats, read, split, write_fixed
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
    assert done == [256, 512, 600]
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


def test_whatever_changes_the_rows_changes_the_cache(tmp_path, tok):
    kinds = [
        dict(data=rows(5), tokenizer=tok, template=CHATML),
        dict(data=rows(5)[::-1], tokenizer=tok, template=CHATML),
        dict(data=rows(5), tokenizer=tokenizer("metaspace"), template=CHATML),
        dict(data=rows(5), tokenizer=tok, template=LLAMA2),
        dict(data=rows(5), tokenizer=tok, template=CHATML, max_length=1000),
        dict(data=rows(5), tokenizer=tok, template=CHATML, max_length=1000, too_long="drop"),
        dict(data=rows(5), tokenizer=tok, template=CHATML, on_bad_row="skip"),
        dict(data=rows(5), tokenizer=tok, template=CHATML, columns={"question": "answer", "answer": "question"}),
    ]
    for number, kind in enumerate(kinds, start=1):
        kind = dict(kind)
        encode(kind.pop("data"), kind.pop("tokenizer"), cache_dir=tmp_path, **kind)
        assert len(list(tmp_path.glob("*.arrow"))) == number


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
    with pytest.raises(DataError):
        encode([*rows(3), {"question": "a", "answer": None}], tok, template=CHATML, cache_dir=tmp_path)
    with pytest.raises(ConfigError):
        encode(rows(3), tok, cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir() if file.suffix != ".lock"] == []


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
    assert [problem.line for problem in dataset.problems] == [4, 5]
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
    assert dataset.stats.supervised_tokens == dataset.stats.tokens
    assert tok.decode(dataset[1].input_ids) == "another line</s>"


def test_estimates_without_a_tokenizer(tok, tmp_path):
    data = rows(200)
    real = encode(data, tok, template=CHATML, cache_dir=tmp_path).stats
    per_token = sum(len(row["question"]) + len(row["answer"]) for row in data) / (real.tokens - 200 * 15)
    estimated = estimate_stats([*data, {"question": 1, "answer": ""}], bytes_per_token=per_token)
    assert estimated.estimated
    assert (estimated.rows, estimated.skipped_bad) == (200, 1)
    assert abs(estimated.tokens / real.tokens - 1) < 0.2
    assert 0 < estimated.supervised_tokens < estimated.tokens
    assert estimate_stats(data, bytes_per_token=per_token, max_length=estimated.length_p50).dropped_too_long > 0
    assert estimate_stats([{"text": "12345678"}], bytes_per_token=4) == DataStats(
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
    median = encode(path, tok, template=CHATML, cache_dir=tmp_path / "cache").stats.length_p50
    document = json.loads(json.dumps(check(path, tokenizer=tok, template=CHATML, max_length=median).to_json()))
    stats = encode(path, tok, template=CHATML, cache_dir=tmp_path / "cache").stats
    assert (document["tokens"], document["supervised_tokens"]) == (stats.tokens, stats.supervised_tokens)
    supervision = document["supervision"]
    assert supervision["stop_token_supervised"] is True
    assert (supervision["rows_without_supervision"], supervision["rows_truncated"]) == (0, 0)
    assert 0 < supervision["rows_too_long"] < 50


def test_report_of_bad_data_lists_everything_in_order(tmp_path, tok):
    system = [{"role": r, "content": "x"} for r in ("system", "user", "assistant")]
    lines = [
        {"messages": system[1:]},
        {"messages": system},
        b"{broken",
        {"messages": [{"role": "bot", "content": None}]},
        {"messages": system[1:]},
    ]
    path = write(tmp_path / "d.jsonl", lines)
    report = check(path, tokenizer=tok, template=LLAMA2)
    assert not report.ok
    assert (report.rows, report.bad_rows) == (5, 3)
    assert [problem.line for problem in report.problems] == [2, 3, 4, 4]
    assert set(report.to_json()["problems"][0]) == {"file", "line", "field", "problem", "hint"}
    report.raise_if_bad("skip")
    with pytest.raises(DataError, match=r"4 problems\. .*d\.jsonl:2: .*\(3 of 5 rows affected\)"):
        report.raise_if_bad()


def test_one_bad_row_reads_as_in_the_standards(tmp_path):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    report = check(write(tmp_path / "chats.jsonl", [good, {"messages": good["messages"][:1]}]))
    with pytest.raises(DataError) as error:
        report.raise_if_bad()
    assert str(error.value).removeprefix(str(tmp_path) + "/") == (
        "chats.jsonl:2:messages[0].role: the last message has role 'user'; a training example must end with "
        "'assistant'. Add the answer, or remove the last message, or pass --set data.on_bad_row=skip "
        "(1 of 2 rows affected)."
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


# ── split ────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_rows_are_views_and_cannot_be_changed(tmp_path, tok):
    row = encode(rows(1), tok, template=CHATML, cache_dir=tmp_path)[0]
    assert isinstance(row.input_ids, np.ndarray)
    with pytest.raises(ValueError, match="read-only"):
        row.input_ids[0] = 1
