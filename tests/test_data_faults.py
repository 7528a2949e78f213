"""Faults 59 to 67: damage that happens to data. Each is put into a file, named at its line, and reading goes on."""

from __future__ import annotations

import base64
import json
import tracemalloc
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtune.data import check, read
from llmtune.data.fix import write_fixed
from llmtune.data.records import Problem
from llmtune.errors import DataError

pytestmark = pytest.mark.fault

GOOD = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Lima, é\n日本"}]}
PAIR = {"question": "What?", "answer": "Lima"}


def encoded(row: dict) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def problems_of(path: Path, *lines: bytes, good: dict = GOOD) -> list[tuple[int, str | None, str]]:
    """What is said of ``lines`` between good rows, which must all be read: line from 1, field and problem."""
    path.write_bytes(b"\n".join([encoded(good), *lines, encoded(good)]))
    report = check(path)
    assert report.rows - report.bad_rows == 2 + len([line for line in lines if line.strip()]) - report.bad_rows
    assert report.bad_rows == len({problem.line for problem in report.problems})
    good_rows, bad_rows = write_fixed(path, path.with_name("fixed.jsonl"), overwrite=True)
    assert (good_rows, bad_rows) == (report.rows - report.bad_rows, report.bad_rows)
    return [(problem.line - 1, problem.field, problem.problem) for problem in report.problems]


@pytest.mark.parametrize("byte", [b"\xff", b"\xc3(", b"\xf0\x9f\x98", b"\xc0\xaf", b"\x80"])
def test_fault_59_invalid_utf8(tmp_path, byte):
    bad = encoded(GOOD).replace(b"What", byte)
    ((line, _, problem),) = problems_of(tmp_path / "d.jsonl", bad, encoded(GOOD))
    assert (line, problem.split(" at")[0]) == (1, f"invalid UTF-8: byte 0x{byte[0]:02x}")


def test_fault_59_invalid_utf8_in_other_containers(tmp_path):
    (tmp_path / "d.csv").write_bytes(b"question,answer\na,b\na,\xe9\na,b\n")
    (tmp_path / "d.txt").write_bytes(b"a\n\xe9\nb\n")
    (tmp_path / "d.json").write_bytes(b'[{"text": "a"}, {"text": "\xe9"}, {"text": "b"}]')
    texts = pa.Array.from_buffers(
        pa.string(),
        3,
        [None, pa.py_buffer(b"".join(n.to_bytes(4, "little") for n in range(4))), pa.py_buffer(b"a\xe9b")],
    )
    pq.write_table(pa.table({"text": texts}), tmp_path / "d.parquet")
    for name, line in (("d.csv", 3), ("d.txt", 2), ("d.json", 2), ("d.parquet", 2)):
        report = check(read(tmp_path / name, text_rows="lines"))
        assert (report.rows, [(problem.line, problem.problem[:13]) for problem in report.problems]) == (
            3,
            [(line, "invalid UTF-8")],
        )


def test_fault_59_invalid_utf8_in_a_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("é\n".encode() + b"ab\xe9\nc")
    (tmp_path / "b.txt").write_bytes(b"fine")
    report = check(tmp_path)
    assert [(p.file, p.line, p.problem) for p in report.problems] == [
        (str(tmp_path / "a.txt"), 1, "invalid UTF-8: byte 0xe9 at line 2, column 3")
    ]
    write_fixed(tmp_path, tmp_path / "out.jsonl")
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert base64.b64decode(entry["raw_base64"]) == "é\n".encode() + b"ab\xe9\nc"


def test_fault_60_type_changes_between_rows(tmp_path):
    for value, kind in ((7, "a number"), (True, "a boolean"), (["x"], "a list"), ({"x": 1}, "an object")):
        found = problems_of(tmp_path / "d.jsonl", encoded(PAIR | {"answer": value}), good=PAIR)
        assert found == [(1, "answer", f"the field 'answer' is {kind}, expected a text as in the other rows")]
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": 1.5}]
    found = problems_of(tmp_path / "d.jsonl", encoded({"messages": turns}))
    expected = "the field 'content' is a number, expected a text as in the other rows"
    assert found == [(1, "messages[1].content", expected)]
    found = problems_of(tmp_path / "d.jsonl", encoded({"messages": "hello"}))
    assert found == [(1, "messages", "the field 'messages' is a text, expected a list of messages")]
    # A prompt may be a text in one row and a list of messages in another: what is meant is certain in both.
    prompt = {"prompt": "a", "completion": "b"}
    assert not problems_of(tmp_path / "d.jsonl", encoded(prompt | {"prompt": turns[:1]}), good=prompt)


def test_fault_61_null_or_missing_field(tmp_path):
    found = problems_of(
        tmp_path / "d.jsonl", encoded(PAIR | {"answer": None}), encoded({"question": "a"}), encoded({}), good=PAIR
    )
    assert found == [
        (1, "answer", "the field 'answer' is null"),
        (2, "answer", "the field 'answer' is missing"),
        (3, "question", "the field 'question' is missing"),
        (3, "answer", "the field 'answer' is missing"),
    ]
    path = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR, PAIR | {"answer": None}, PAIR]), path)
    assert [str(problem) for problem in check(path).problems] == [
        f"{path}: row group 0, row 2, answer: the field 'answer' is null"
    ]


def test_fault_62_huge_integer_and_nan_literal(tmp_path):
    huge = [b"9" * digits for digits in (20, 400, 5000)] + [b"-" + b"9" * 400, b"1e400"]
    beside = [encoded(GOOD)[:-1] + b', "n": %s}' % number for number in huge]
    assert not problems_of(tmp_path / "d.jsonl", *beside)
    kept = (tmp_path / "fixed.jsonl").read_bytes().splitlines()
    assert kept[1:-1] == beside  # not rounded on the way
    inside = [encoded(GOOD).replace(b'"What?"', number) for number in huge]
    found = problems_of(tmp_path / "d.jsonl", *inside)
    expected = "the field 'content' is a number, expected a text as in the other rows"
    assert found == [(line, "messages[0].content", expected) for line in range(1, 6)]
    literals = [encoded(GOOD)[:-1] + b', "NaN": %s}' % name for name in (b"NaN", b"Infinity", b"-Infinity")]
    column = len(encoded(GOOD).decode()) + len(', "NaN": ')
    assert problems_of(tmp_path / "d.jsonl", *literals) == [
        (line, None, f"not valid JSON: {name} at column {column}, JSON has no such number")
        for line, name in ((1, "NaN"), (2, "Infinity"), (3, "-Infinity"))
    ]


def test_fault_63_extra_column(tmp_path):
    extra = GOOD | {"source": {"url": None, "tags": [1, 2]}, "score": 0.5}
    assert not problems_of(tmp_path / "d.jsonl", encoded(extra), encoded({"id": 1} | GOOD))
    (tmp_path / "d.csv").write_text("question,answer,source\na,b,c\na,b\na,b,c,d\na,b,c\n")
    report = check(tmp_path / "d.csv")
    assert [(problem.line, problem.problem) for problem in report.problems] == [
        (3, "2 cells, the header has 3"),
        (4, "4 cells, the header has 3"),
    ]


def test_fault_64_truncated_line(tmp_path):
    whole = encoded(GOOD)
    lines = [whole[:size] for size in range(1, len(whole))]
    assert problems_of(tmp_path / "d.jsonl", *lines) == [
        (line, None, "the JSON is cut off") for line in range(1, len(whole))
    ]


def test_fault_64_nul_and_other_control_characters(tmp_path):
    raw = [encoded(GOOD).replace(b"What", bytes([code])) for code in (0, 7, 31)]
    escaped = [encoded(GOOD).replace(b"What", b"\\u%04x" % code) for code in (0, 7, 31, 127)]
    escaped += [encoded(GOOD).replace(b"What", text) for text in (b"\\b", b"\\f", b"\x7f")]
    fine = encoded(GOOD).replace(b"What", b"\\t\\n\\r\\u0009\\u000a\\u000D\\\\b\\\\u0007")
    found = problems_of(tmp_path / "d.jsonl", *raw, *escaped, fine)
    column = encoded(GOOD).index(b"What") + 1
    assert found[:3] == [
        (1, None, f"a NUL character at column {column}"),
        (2, None, f"not valid JSON: the control character U+0007 at column {column}"),
        (3, None, f"not valid JSON: the control character U+001F at column {column}"),
    ]
    codes = ("0000", "0007", "001F", "007F", "0008", "000C", "007F")
    assert found[3:] == [
        (line, "messages[0].content", f"the control character U+{code} at character 1")
        for line, code in enumerate(codes, start=4)
    ]


def test_fault_64_lone_surrogate(tmp_path):
    pieces = (b"\\ud800", b"\\uDFFF", b"\\ud83d\\u0041", b"\xed\xa0\x80", b"\xed\xbf\xbf")
    lines = [encoded(GOOD).replace(b"What", piece) for piece in pieces]
    pair = encoded(GOOD).replace(b"What", b"\\ud83d\\ude00 \\\\ud800")
    column = encoded(GOOD).index(b"What") + 1
    assert problems_of(tmp_path / "d.jsonl", *lines, pair) == [
        (line, None, f"a lone surrogate U+{code} at column {column}, half of a character")
        for line, code in enumerate(("D800", "DFFF", "D83D", "D800", "DFFF"), start=1)
    ]
    (problem,) = check([PAIR, PAIR | {"answer": "a\ud800"}]).problems
    assert problem.problem == "the lone surrogate U+D800 at character 2"


def test_fault_64_duplicate_key(tmp_path):
    lines = [
        encoded(GOOD)[:-1] + b', "messages": []}',
        encoded(GOOD)[:-1] + b', "a": {"b": [{"c": ":", "c" : 2}]}}',
        encoded(GOOD)[:-1] + b', "a": "\\": \\":", "\\u0061"\t:1}',
        encoded(GOOD)[:-1] + b', "a": "\\": \\" :", "b": ":", ":": 0, "": 1}',
        encoded(GOOD)[:-1] + b', "a": ' + b'{"a":' * 900 + b'{"x": 1, "x": 2}' + b"}" * 901,
    ]
    assert problems_of(tmp_path / "d.jsonl", *lines) == [
        (line, key, f"the key '{key}' occurs twice") for line, key in ((1, "messages"), (2, "c"), (3, "a"), (5, "x"))
    ]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_fault_64_utf16(tmp_path, encoding):
    path = tmp_path / "d.jsonl"
    bad = json.dumps(GOOD, ensure_ascii=False)[:-5] + "é"
    path.write_text("\n".join([json.dumps(GOOD, ensure_ascii=False), bad, json.dumps(GOOD)]), encoding=encoding)
    report = check(path)
    assert [(p.file, p.line, p.problem) for p in report.problems] == [(str(path), 2, "the JSON is cut off")]
    assert [r.messages[1].content for r in read(path) if not isinstance(r, list)] == [
        GOOD["messages"][1]["content"]
    ] * 2
    write_fixed(path, tmp_path / "out.jsonl")
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert (entry["file"], entry["raw"]) == (str(path), bad)


def test_fault_64_damaged_utf16(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes("question,answer\na,b\n".encode("utf-16") + b"\x00\xd8\x20\x00")  # half of a pair
    with pytest.raises(DataError, match=r"d\.csv: damaged UTF-16 text"):
        check(path)


def test_fault_65_nesting_of_5000_levels(tmp_path):
    lines = [
        encoded(GOOD)[:-1] + b', "a": ' + opening * 5000 + closing * 5000 + b"}"
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}"))
    ]
    lines[1] = lines[1].replace(b":}", b":1}")
    assert problems_of(tmp_path / "d.jsonl", *lines) == [
        (line, None, "nested 5,001 levels deep, more than 1,024") for line in (1, 2)
    ]
    cut_off = encoded(GOOD)[:-1] + b', "a": ' + b"[" * 5000
    assert problems_of(tmp_path / "d.jsonl", cut_off)[0][0] == 1


@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.tsv", "d.txt", "d.parquet", "d.arrow"])
def test_fault_66_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{name}: the file is empty; expected at least one row"):
        check(tmp_path / name)
    if name not in ("d.parquet", "d.arrow"):
        (tmp_path / name).write_bytes(b"[ ]\n" if name == "d.json" else b"\xef\xbb\xbf\n\r\n\n")
        with pytest.raises(DataError, match="no rows; expected at least one example"):
            check(tmp_path / name)


def test_fault_66_empty_tables(tmp_path):
    table = pa.table({"text": pa.array([], pa.string())})
    pq.write_table(table, tmp_path / "d.parquet")
    with pa.ipc.new_file(str(tmp_path / "d.arrow"), table.schema) as sink:
        sink.write_table(table)
    for name in ("d.parquet", "d.arrow"):
        with pytest.raises(DataError, match="no rows; expected at least one example"):
            check(tmp_path / name)


def test_fault_67_bom_crlf_and_blank_lines(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\r\n" + encoded(GOOD) + b"\r\n\r\n \t\n" + encoded(GOOD) + b"\r\n\n" + encoded(GOOD))
    report = check(path)
    assert (report.rows, report.problems) == (3, ())
    assert [record.line for record in read(path)] == [2, 5, 7]
    assert report.duplicates.exact_rows == 2


@pytest.mark.parametrize("name", ["d.jsonl", "d.txt", "d.csv", "d.json"])
def test_fault_67_a_line_of_20_megabytes(tmp_path, name):
    size = 60_000_000
    block = b"a" * 1_000_000
    begin, end = {
        "d.jsonl": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
        "d.txt": (b"a\n", b"\nb\n"),
        "d.csv": (b"text\na\n", b"\nb\n"),
        "d.json": (b'[{"text": "a"}, {"text": "', b'"}, {"text": "b"}]'),
    }[name]
    with open(tmp_path / name, "wb") as file:
        file.write(begin)
        for _ in range(size // len(block)):
            file.write(block)
        file.write(end)
    check(read(tmp_path / name, text_rows="lines"))  # what is imported on the way counts for nothing
    tracemalloc.start()
    report = check(read(tmp_path / name, text_rows="lines"))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    line = 3 if name == "d.csv" else 2
    assert [(problem.line, problem.problem) for problem in report.problems] == [
        (line, "the row has 57.2 MiB, more than the 16.0 MiB that a row may have")
    ]
    assert report.rows == 3
    assert peak_bytes < 40_000_000
    write_fixed(read(tmp_path / name, text_rows="lines"), tmp_path / "out.jsonl")
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert entry["raw"].count("a") == size
    assert isinstance(report.problems[0], Problem)


def test_fault_67_a_document_of_60_megabytes(tmp_path):
    path = tmp_path / "d.txt"
    path.write_bytes(b"a\n" * 30_000_000)
    (tmp_path / "e.txt").write_text("fine")
    check(tmp_path)
    tracemalloc.start()
    report = check(tmp_path)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(p.line, p.problem) for p in report.problems] == [
        (1, "the row has 57.2 MiB, more than the 16.0 MiB that a row may have")
    ]
    assert peak_bytes < 40_000_000
    write_fixed(tmp_path, tmp_path / "out.jsonl")
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert len(entry["raw"]) >= 59_999_998
