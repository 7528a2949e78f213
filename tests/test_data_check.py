"""Check and fix: every problem of a file with its line, the same for any division of the work, and nothing lost."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import test_data_support
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtune.cli import main
from llmtune.data import check, encode, read, resolve
from llmtune.data import scan as scan_module
from llmtune.data.check import data_report
from llmtune.data.fix import write_fixed
from llmtune.data.records import Problem, SourceRow, record_text
from llmtune.data.scan import Scanner, scan
from llmtune.data.strict_json import MAX_ROW_BYTES
from llmtune.errors import ConfigError, DataError


def chat(*turns, **more) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns], **more}


def line(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


GOOD = chat(("system", "Be brief."), ("user", "What?"), ("assistant", 'Lima: "é"\n日本'))
TOOL = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": "{1}"}}]}

# One problem each: the line, the field and the beginning of what is said.
PLANTED: list[tuple[bytes, str | None, str]] = [
    (line(GOOD).replace("é".encode(), b"\xe9"), None, "invalid UTF-8: byte 0xe9"),
    (line(GOOD)[:-9], None, "the JSON is cut off"),
    (line(GOOD).replace(b"What", b"Wh\x00t"), None, "a NUL character"),
    (line(GOOD).replace(b'"content"', b'"content": "no", "content"', 1), "content", "the key 'content' occurs twice"),
    (
        line(chat(("user", 3), ("assistant", "b"))),
        "messages[0].content",
        "the field 'content' is a number, expected a text as in the other rows",
    ),
    (line(chat(("user", None), ("assistant", "b"))), "messages[0].content", "the field 'content' is null"),
    (line({"messages": [{"role": "assistant"}]}), "messages[0].content", "the field 'content' is missing"),
    (line(chat(("user", "a"), ("agent", "b"))), "messages[1].role", "unknown role 'agent' — did you mean 'assistant'?"),
    (line(chat(("user", "a"), ("assistant", "\n "))), "messages[1].content", "the assistant's turn is empty"),
    (line(chat(("system", "a"), ("user", "b"))), "messages", "there is no assistant turn"),
    (
        line(chat(("user", "a"), ("user", "b"), ("assistant", "c"))),
        "messages[1].role",
        "turns out of order: a 'user' turn after a 'user' turn",
    ),
    (
        line(chat(("user", [{"type": "image_url", "image_url": "a.png"}]), ("assistant", "b"))),
        "messages[0].content[0]",
        "the content has a part of type 'image_url', and only text can be trained",
    ),
    (line(chat(("user", "a" * MAX_ROW_BYTES), ("assistant", "b"))), None, "the row has 16.0 MiB, more than"),
    (
        line(chat(("user", "a"), ("assistant", "ding\x07"))),
        "messages[1].content",
        "the control character U+0007 at character 5",
    ),
    (line(GOOD).replace(b"What", b"\\udc00"), None, "a lone surrogate U+DC00"),
    (line(chat(("user", "a"), ("assistant", "b"), score=float("nan"))), None, "not valid JSON: NaN at column"),
    (
        line({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}),
        "messages[0].weight",
        "the weight is 0.5, expected 0 or 1",
    ),
    (
        line({"messages": [{"role": "user", "content": "a"}, TOOL]}),
        "messages[1].tool_calls[0].function.arguments",
        "the arguments are a text, expected an object",
    ),
    (b'["not", "an", "object"]', None, "the row is an array, expected an object"),
    (
        line({"question": "a", "answer": "b"}),
        None,
        "the row is question/answer (question/answer), the other rows are chat",
    ),
]


def test_twenty_planted_problems_are_listed_with_their_lines_and_nothing_else(tmp_path, capsys):
    assert len(PLANTED) == 20
    lines, expected = [line(GOOD)] * 3, []
    for bad, field, text in PLANTED:
        lines += [bad, b"", line(GOOD)]
        expected.append((len(lines) - 2, field, text))
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\n".join(lines))
    report = check(path)
    assert (report.rows, report.bad_rows, report.num_problems) == (43, 20, 20)
    for problem, (number, field, text) in zip(report.problems, expected, strict=True):
        assert (problem.line, problem.field) == (number, field), problem
        assert problem.problem.startswith(text), problem
        assert problem.hint
    assert report.problems[0].to_json().keys() == {"file", "line", "field", "problem", "hint"}
    with pytest.raises(DataError, match="20 problems"):
        report.raise_if_bad()
    report.raise_if_bad("skip")
    printed = str(report).splitlines()
    assert printed[0] == "43 rows, chat (the rows have 'messages'), 20 of them with a problem"
    assert [f"{path}:{number}:" in told for (number, *_), told in zip(expected, printed[1:], strict=False)] == [
        True
    ] * 20
    assert main(["check", str(path), "--json"]) == DataError.exit_code == 3
    document = json.loads(capsys.readouterr().out)
    assert [problem["line"] for problem in document["problems"]] == [number for number, *_ in expected]


ORDERS = [
    ("sua", None),
    ("sdua", None),
    ("a", None),
    ("sa", None),
    ("aua", None),
    ("uatta", None),
    ("uatua", None),
    ("suua", 2),
    ("uaa", 2),
    ("uasua", 2),
    ("usa", 1),
    ("tua", 0),
    ("uta", 1),
    ("sta", 1),
]
ROLES = {"s": "system", "d": "developer", "u": "user", "a": "assistant", "t": "tool"}


@pytest.mark.parametrize(("roles", "wrong"), ORDERS)
def test_the_order_of_turns(roles, wrong):
    report = check([GOOD, chat(*((ROLES[letter], "text") for letter in roles))])
    assert [problem.field for problem in report.problems] == ([] if wrong is None else [f"messages[{wrong}].role"])


def test_two_assistant_turns_are_in_order_when_one_calls_a_tool():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": '{"zone": "UTC"}'}}]}
    said = {"role": "assistant", "content": "Let me see."}
    for first, second in ((call, said), (said, call)):
        record = next(iter(read([{"messages": [{"role": "user", "content": "Time?"}, first, second]}])))
        calls = [message.tool_calls for message in record.messages if message.tool_calls]
        assert calls == [({"function": {"name": "now", "arguments": {"zone": "UTC"}}},)]


def test_the_order_runs_on_from_a_prompt_into_its_completion():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (problem,) = check([{"prompt": "a", "completion": "b"}, {"prompt": prompt, "completion": "c"}]).problems
    assert (problem.line, problem.field) == (2, "completion")
    pair = {"prompt": "a", "chosen": [*prompt], "rejected": "no"}  # the prompt repeated, as UltraFeedback has it
    assert check([pair]).ok


def test_sharegpt_turns_are_named_by_their_own_place():
    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    bad = {"system": "Be", "conversations": [{"from": "human", "value": "a"}] * 2 + [{"from": "gpt", "value": "b"}]}
    (problem,) = check([good, bad]).problems
    assert problem.field == "conversations[1].from"


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────

ROWS = [
    GOOD,
    chat(("user", 'Grüße, 😀 \\ " : {[ \t'), ("assistant", "a\u2028b"), ("user", "x"), ("assistant", "y"), id=1),
    chat(("user", "t"), ("assistant", "<call>"), ("tool", "7"), ("tool", "8"), ("assistant", "15"), note=None, n=[{}]),
    chat(("assistant", "Hello."), ("user", ""), ("assistant", '":')),
]
VALID = b"".join(json.dumps(row, ensure_ascii=bool(i % 2)).encode() + b"\n" for i, row in enumerate(ROWS * 2))


class _Repeated(Exception):
    pass


def _no_repeats(pairs):
    if len({key for key, _ in pairs}) < len(pairs):
        raise _Repeated
    return dict(pairs)


def _no_constant(name):
    raise ValueError(name)


def is_good(raw: bytes) -> bool:
    """Whether a line is a chat to learn from: Python's own JSON, and the rules written down a second time."""
    try:
        row = json.loads(raw.decode(), object_pairs_hook=_no_repeats, parse_constant=_no_constant)
        json.dumps(row, ensure_ascii=False).encode()
    except (ValueError, _Repeated):
        return False
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return False
    roles = [message.get("role") for message in messages]
    contents = [message.get("content") for message in messages]
    if not all(isinstance(text, str) for text in roles + contents):
        return False
    roles = [role.strip().lower() for role in roles]
    if not set(roles) <= set(ROLES.values()):
        return False
    order = "".join(role[0] for role in roles)
    if not order.endswith("a") or re.search("uu|aa|ut|[sd]t|[uat][sd]|^t", order):
        return False
    if any(role == "assistant" and not text.strip() for role, text in zip(roles, contents, strict=True)):
        return False
    return not any((ord(char) < 32 and char not in "\t\n\r") or char == "\x7f" for char in "".join(contents))


def damaged(data: bytes, damage: list[tuple[str, int, bytes]]) -> bytes:
    for kind, at, content in damage:
        at %= len(data) + 1
        size = len(content)
        if kind == "flip":
            data = data[:at] + bytes(byte ^ 1 << size for byte in data[at : at + 1]) + data[at + 1 :]
        elif kind == "delete":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + content + data[at:]
        elif kind == "cut":
            data = data[: max(at, 1)]
        else:
            data = data[:at] + data[at + 1 : at + 2] + data[at : at + 1] + data[at + 2 :]
    return data


PIECES = [b"\n", b'"', b"\\", b"\r\n", b"\\u0007", b"\x7f", b"\\ud800", b"1e999", b"9" * 5000]
DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "flip", "delete", "insert", "swap", "cut"]),
        st.integers(0, len(VALID)),
        st.binary(max_size=7)
        | st.sampled_from([b"\n", b'"', b"\\", b"\r\n", b"\\u0007", b"\x7f", b"\\ud800", b"1e999"]),
    ),
    min_size=1,
    max_size=4,
)


def test_what_is_damaged_below_is_good_before():
    assert all(map(is_good, VALID.splitlines()))
    assert not any(
        is_good(bad) for bad, *_ in PLANTED if not any(beyond in bad for beyond in (b"weight", b"tool_calls", b"aaa"))
    )


@settings(max_examples=800, deadline=None)
@given(damage=DAMAGE)
@example(damage=[("insert", 14, b"\\u0000")])
@example(damage=[("insert", 0, b"\xef\xbb\xbf"), ("insert", 0, b"\xef\xbb\xbf")])
def test_damaged_bytes_never_crash_and_every_broken_row_is_named_at_its_line(tmp_path_factory, damage):
    data = damaged(VALID, damage)
    path = tmp_path_factory.mktemp("damage") / "d.jsonl"
    path.write_bytes(data)
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = {number: is_good(raw) for number, raw in enumerate(lines, start=1) if raw.strip()}
    try:
        report = check(path)
    except DataError:
        report = None  # not one row is good
    if report is None:
        assert not any(rows.values())
        return
    assert report.rows == len(rows)
    assert report.bad_rows == len({problem.line for problem in report.problems})
    assert {problem.line for problem in report.problems} == {number for number, good in rows.items() if not good}


# ── any division of the work ─────────────────────────────────────────────────────────────────────────────────────


def mixed_file(path: Path) -> Path:
    """Good rows, some of them repeated, with the planted problems (but the long row) and blank lines among them."""
    bad = [raw for raw, *_ in PLANTED if len(raw) < 1000]
    lines = []
    for i in range(60):
        words = " ".join(f"word{(i // 2 * 7 + j) % 50}" for j in range(40))
        lines += [line(chat(("user", words), ("assistant", f"{words}{'.' * (i % 2)}"))), bad[i % len(bad)], b" \r"]
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    return path


@pytest.mark.parametrize("chunk_bytes", [1, 7, 333, 5_000, 1 << 20])
def test_the_report_does_not_depend_on_the_size_of_chunks(tmp_path, chunk_bytes):
    path = mixed_file(tmp_path / "d.jsonl")
    whole = check(path, near_duplicates=True)
    assert whole.duplicates.exact_rows > 0
    reading = read(path)
    tally = scan(Scanner(readings=(reading,), signatures=True), chunk_bytes=chunk_bytes)
    assert data_report((reading,), tally, near_duplicates=True) == whole


def test_the_report_does_not_depend_on_the_number_of_processes(tmp_path):
    path, done = mixed_file(tmp_path / "d.jsonl"), []
    reading = read(path)
    tally = scan(Scanner(readings=(reading,)), processes=2, chunk_bytes=3_000, progress=done.append)
    report = data_report((reading,), tally)
    assert report == check(path, processes=1)
    assert len(done) > 2
    assert done == sorted(done)
    assert done[-1] == report.rows


def test_at_most_so_many_problems_are_kept_and_all_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(scan_module, "MOST_PROBLEMS", 5)
    path = tmp_path / "d.jsonl"
    path.write_bytes(line(GOOD) + b"\n" + b"oops\n" * 20)
    reading = read(path)
    report = data_report((reading,), scan(Scanner(readings=(reading,)), chunk_bytes=10))
    assert (report.num_problems, report.bad_rows) == (20, 20)
    assert [problem.line for problem in report.problems] == [2, 3, 4, 5, 6]
    assert report.to_json()["num_problems"] == 20
    with pytest.raises(DataError, match=r"20 problems.*and 15 more"):
        report.raise_if_bad()


TEXT_ROWS = [{"question": f"What is {i}?", "answer": f"Line one\nline two, é {i}"} for i in range(70)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    kind = path.suffix
    if kind == ".jsonl":
        path.write_bytes(b"".join(line(row) + b"\r\n\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=2), encoding="utf-8")
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=9)
    elif kind == ".arrow":
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with new(str(path), table.schema) as sink:
            for batch in table.to_batches(max_chunksize=8):
                sink.write_batch(batch)
    else:
        import csv

        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize(
    "name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.arrow", "stream.arrow", "rows"]
)
def test_chunks_hold_every_row_once_and_in_order(tmp_path, name, chunk_bytes):
    source = resolve(TEXT_ROWS if name == "rows" else write_rows(tmp_path / name, TEXT_ROWS))
    assert source.in_memory == (name == "rows")
    chunks = list(source.chunks(chunk_bytes))
    rows = [row for chunk in chunks for row in source.read(chunk)]
    assert [row.value for row in rows if isinstance(row, SourceRow)] == TEXT_ROWS
    assert rows == list(source)
    assert [row.line for row in rows] == sorted({row.line for row in rows})
    *_, last = [part for part in map(list, map(source.read, chunks)) if part]  # a chunk may hold blank lines alone
    assert rows[-len(last) :] == last
    if chunk_bytes == 1 and name not in ("d.json", "d.csv", "d.tsv"):
        assert len(chunks) > 5


def test_records_say_the_same_in_every_container(tmp_path):
    texts = [record_text(record) for record in read(TEXT_ROWS)]
    for name in ("d.jsonl", "d.json", "d.csv", "d.tsv", "d.parquet", "d.arrow", "stream.arrow"):
        assert [record_text(record) for record in read(write_rows(tmp_path / name, TEXT_ROWS))] == texts
    assert texts[0] == "user\nWhat is 0?\nassistant\nLine one\nline two, é 0"


def test_the_text_of_a_record_holds_all_that_tells_it_from_others():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": {"n": 10**30}}}]}
    rows = [GOOD, GOOD | {"tools": [{"name": "now"}]}, {"messages": [call]}, {"messages": [call | {"content": "x"}]}]
    pairs = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    pairs += [{"prompt": "p", "chosen": "c", "rejected": wrong} for wrong in ("d", "e")]
    texts = [record_text(record) for row in rows + pairs for record in read([row])]
    assert len(set(texts)) == len(texts) == 8
    assert [record_text(record) for record in read(rows)] == texts[:4]


def test_a_damaged_row_group_is_named(tmp_path):
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist(TEXT_ROWS), path, row_group_size=35, compression="zstd")
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).dictionary_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DataError, match="row group 1 cannot be read"):
        check(path)


def test_parquet_problems_name_row_group_and_row(tmp_path):
    rows = [*TEXT_ROWS]
    rows[20] = {"question": "a", "answer": None}
    path = write_rows(tmp_path / "d.parquet", rows)
    (problem,) = check(path).problems
    assert str(problem) == f"{path}: row group 2, row 21, answer: the field 'answer' is null"
    assert problem.to_json()["row_group"] == 2


# ── fix ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_fixed_file_and_quarantine_together_hold_every_byte_that_matters(tmp_path):
    path, out = mixed_file(tmp_path / "d.jsonl"), tmp_path / "clean.jsonl"
    huge = b'{"n": 123456789012345678901234567890, "messages": [{"role": "assistant", "content": "a"}]}'
    path.write_bytes(path.read_bytes() + b"\n" + huge)
    report = check(path)
    good, bad = write_fixed(path, out)
    assert (good, bad) == (report.rows - report.bad_rows, report.bad_rows)
    assert check(out).ok
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    by_line = {problem.line for problem in report.problems}
    kept = [raw for number, raw in enumerate(lines, start=1) if number not in by_line and raw.strip()]
    assert out.read_bytes().splitlines() == kept  # as they were written, huge numbers too
    quarantined = [orjson.loads(raw) for raw in (tmp_path / "clean.quarantine.jsonl").read_bytes().splitlines()]
    assert {entry["line"] for entry in quarantined} == by_line
    for entry in quarantined:
        original = lines[entry["line"] - 1]
        assert entry["file"] == str(path)
        assert entry["problems"][0].keys() == {"field", "problem", "hint"}
        if entry["row"] is not None:
            assert entry["row"] == orjson.loads(original)
        elif "raw_base64" in entry:
            assert base64.b64decode(entry["raw_base64"]) == original
            assert entry["raw"] == original.decode(errors="replace")
        else:
            assert entry["raw"].encode() == original
    assert sorted(file.name for file in tmp_path.iterdir()) == ["clean.jsonl", "clean.quarantine.jsonl", "d.jsonl"]


def quarantine_of(path: Path) -> list[dict]:
    write_fixed(path, path.with_name("out.jsonl"), overwrite=True)
    return [orjson.loads(raw) for raw in path.with_name("out.quarantine.jsonl").read_bytes().splitlines()]


def test_the_quarantine_holds_the_text_of_damaged_tables_and_arrays(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'\xef\xbb\xbfquestion,answer\nx,y\n"only\n one"\nx,\xff\n')
    assert [(entry["raw"], entry["line"]) for entry in quarantine_of(path)] == [('"only\n one"', 3), ("x,\ufffd", 5)]
    path = tmp_path / "d.json"
    path.write_text(' [\n{"text":\n "a"},\n{"text": tru},\n{"text": "b"}]\nx\n', encoding="utf-8")
    entries = quarantine_of(path)
    assert [entry["raw"] for entry in entries] == ['\n{"text": tru}', "\nx"]
    assert entries[1]["problems"][0]["problem"] == "there is text after the end of the array"
    assert path.with_name("out.jsonl").read_bytes().splitlines() == [b'{"text":  "a"}', b'{"text": "b"}']


def test_a_row_of_20_megabytes_is_quarantined_whole(tmp_path):
    for name, before, after in (("d.jsonl", b'{"text": "a"}\n', b"\n"), ("d.json", b'[{"text": "a"},', b"]")):
        path = tmp_path / name
        row = b'{"text": "%s\xff"}' % ("é".encode() * 10_000_000)
        path.write_bytes(before + row + after)
        (entry,) = quarantine_of(path)
        assert (entry["line"], entry["row"], entry["raw"]) == (2, None, row.decode(errors="replace"))
        assert base64.b64decode(entry["raw_base64"]) == row


@pytest.mark.parametrize("out", ["d.jsonl", "other.txt", "sub.jsonl"])
def test_the_data_itself_is_never_overwritten(tmp_path, out):
    for name in ("d.jsonl", "sub.quarantine.jsonl"):
        (tmp_path / name).write_bytes(line(GOOD) + b"\n")
    with pytest.raises(ConfigError, match=r"name of a new \.jsonl file"):
        write_fixed(str(tmp_path / "*.jsonl"), tmp_path / out, overwrite=True)


def test_rows_in_memory_are_fixed_too(tmp_path):
    rows = [GOOD | {"n": 10**30}, GOOD | {"note": "\ud800"}, chat(("user", "a")), "no row"]
    assert write_fixed(rows, tmp_path / "out.jsonl") == (2, 2)
    assert [json.loads(raw) for raw in (tmp_path / "out.jsonl").read_text().splitlines()] == rows[:2]


# ── with a tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def tokenizer():
    return test_data_support.tokenizer("byte_level")


def tokenised_rows() -> list[dict]:
    rows = [chat(("user", f"What is {i}?"), ("assistant", "It is " + "many " * i)) for i in range(40)]
    rows[17] = chat(("user", "What?<|im_end|>"), ("assistant", "That."))
    return rows


def test_what_the_encoder_refuses_is_a_problem_of_its_row_and_put_aside(tmp_path, tokenizer):
    path = write_rows(tmp_path / "d.parquet", tokenised_rows())
    template = test_data_support.CHATML
    found = encode(path, tokenizer, template=template, cache_dir=tmp_path, on_bad_row="report").facts
    (problem,) = found.problems
    assert (problem.line, problem.row_group) == (18, 1)
    assert "special token" in problem.problem
    assert found.supervision.rows == 39
    assert write_fixed(path, tmp_path / "out.jsonl", tokenizer=tokenizer, template=template) == (39, 1)
    assert len(encode(tmp_path / "out.jsonl", tokenizer, template=template, cache_dir=tmp_path)) == 39


def test_problems_say_where_they_are():
    problem = Problem(file="d.jsonl", line=3, field="text", problem="it is empty", hint="fill it")
    assert str(problem) == "d.jsonl:3:text: it is empty"
