"""Tables as people have them: delimiters, Excel's first line, blanks in headers, and text that is not UTF-8."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.cli import main
from llmtune.config import load_config
from llmtune.data import check, read, resolve
from llmtune.data.fix import write_fixed
from llmtune.data.tables import DELIMITERS, dialect_of
from llmtune.errors import DataError
from llmtune.finetuner.rows import inputs_of

ROWS = [
    {"question": "What, exactly; is | it?", "answer": 'It is "so":\ta, b; c | d\nand a second line'},
    {"question": "And?", "answer": "Nothing."},
]


def table(rows: list[dict[str, str]], delimiter: str, *, quoting: int = csv.QUOTE_MINIMAL, end: str = "\r\n") -> str:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def turns(path: Path) -> list[tuple[str, str]]:
    found = []
    for record in read(path):
        assert not isinstance(record, list), record
        found.append((record.messages[0].content, record.messages[1].content))
    return found


def expected(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["question"], row["answer"]) for row in rows]


def told(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    inputs = inputs_of(load_config({}, environ={}), str(path))
    return inputs.notices, inputs.warnings


# ── delimiters ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_every_delimiter_is_recognised_and_said_where_it_is_not_the_usual_one(tmp_path, suffix, delimiter, quoting):
    path = tmp_path / f"d{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + table(ROWS, delimiter, quoting=quoting).encode())
    assert turns(path) == expected(ROWS)
    usual = {".csv": ",", ".tsv": "\t"}[suffix]
    notices = () if delimiter == usual else (f"{path}: read with the {DELIMITERS[delimiter]} as delimiter.",)
    assert told(path) == (notices, ())


CELLS = st.text(
    st.characters(codec="utf-8", exclude_characters="\x00\r", exclude_categories=["Cs"]), min_size=1
).filter(str.strip)


@settings(max_examples=80, deadline=None)
@given(
    delimiter=st.sampled_from(list(DELIMITERS)),
    cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=8),
    header=st.permutations(["question", "answer", "my notes"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
def test_what_stands_in_cells_never_changes_the_delimiter(tmp_path_factory, delimiter, cells, header, quoting):
    rows = [{name: {"question": q, "answer": a, "my notes": q + a}[name] for name in header} for q, a in cells]
    path = tmp_path_factory.mktemp("tables") / "d.csv"
    path.write_bytes(table(rows, delimiter, quoting=quoting).encode())
    assert [dict(row.value) for row in resolve(path)] == rows


HEADERS = {
    "a text of one column": ("text\nOne, two; three\nFour\tfive | six\n", ","),
    "delimiters in most rows of one column": ("text\n" + "a;b\n" * 9, ","),
    "another delimiter in a quoted name": ('"question; or not",answer\na,b\n', ","),
    "another delimiter in every name": ("id;question, in full;answer\n1;What, why;Because, so\n", ";"),
    "the usual one first": ("question,answer|long\na,b|c\nd,e|f\n", ","),
    "no rows": ("question;answer\n", ";"),
    "damaged rows": ("question;answer\na;b;c\nd\ne;f;g;h\ni;j\n", ";"),
    "damaged rows of the usual one": ("question,answer\na,b,c\nd\ne,f,g\n", ","),
    "a title with a bar": ("Notes | by hand, of everybody\nalpha\nbeta\n", ","),
    "a sentence with one": ("Is this; a header of names or is it some long sentence\nalpha\nbeta\ngamma\n", ","),
    "long cells": ("question|answer\n" + f"{'x, ' * 60_000}|y\n" * 3, "|"),
    "one long cell over lines": ('question;answer\n"' + "a, b\n" * 30_000 + '";c\n', ";"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_the_header_decides(tmp_path, name):
    text, delimiter = HEADERS[name]
    (tmp_path / "d.csv").write_text(text)
    assert dialect_of(tmp_path / "d.csv", ",").delimiter == delimiter


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\n', "SEP=;\n", "sep=;;\n"])
def test_excels_first_line_is_obeyed_and_lines_are_counted(tmp_path, first):
    path = tmp_path / "d.csv"
    path.write_bytes(first.encode() + b"question;answer\na, b;c\nonly\nd;e\n")
    (problem,) = check(path).problems
    assert (problem.line, problem.problem) == (4, "1 cells, the header has 2")
    assert "';'" in problem.hint
    write_fixed(path, tmp_path / "out.jsonl")
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert entry["raw"] == "only"
    path.write_bytes(b"sep=^\nquestion^answer\na,b;c^d\n")
    assert turns(path) == [("a,b;c", "d")]


def test_blanks_around_names_and_columns_without_one(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text(" question ;\tanswer\u00a0;;\na;b;;\n", encoding="utf-8")
    assert [dict(row.value) for row in resolve(path)] == [
        {"question": "a", "answer": "b", "column 3": "", "column 4": ""}
    ]
    assert turns(path) == [("a", "b")]
    path.write_text("question,question ,answer\na,b,c\n")
    with pytest.raises(DataError, match=r"d\.csv:1: the header names 'question' twice; rename one column"):
        read(path)


# ── encodings ────────────────────────────────────────────────────────────────────────────────────────────────────

CONTENT = {
    ".csv": table(ROWS, ";"),
    ".tsv": table(ROWS, "\t"),
    ".jsonl": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS),
    ".json": json.dumps(ROWS, ensure_ascii=False, indent=1),
    ".txt": "One document.\nTwo lines, größer – “so”.",
}


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_unicode_of_every_width_in_every_text_container(tmp_path, suffix, encoding):
    plain, other = tmp_path / f"plain{suffix}", tmp_path / f"other{suffix}"
    text = CONTENT[suffix].replace("Nothing", "Größe, “日本” 🙂")
    plain.write_bytes(text.encode())
    other.write_bytes(text.encode(encoding))
    (first, *rest), (again, *more) = list(resolve(plain)), list(resolve(other))
    assert [row.value for row in (first, *rest)] == [row.value for row in (again, *more)]
    assert again.file == str(other)
    guessed = encoding in ("utf-16-le", "utf-16-be")
    assert len(told(other)[1]) == guessed
    if not guessed and suffix != ".json":
        assert resolve(other).fingerprint == resolve(plain).fingerprint or encoding == "utf-8-sig"


WESTERN = {
    "German": "Wie heißt die größte Stadt?;Köln ist es nicht – „Berlin“ wäre übrigens größer.",
    "French": "Où est né Molière ?;Il est né à Paris, où il a vécu jusqu’à sa mort… «\xa0très célèbre\xa0».",
    "Spanish": "¿Dónde está el niño?;El niño está en la montaña, según su compañera.",
    "Portuguese": "O que é o pão?;É um alimento à base de farinha; não há açúcar.",
    "Swedish": "Vad är det?;Det är på ön – en å.",
    "English": "What’s “this”?;It’s a café – costs £5 or 6 €.",
    "capitals": "ÜBER;DIE GRÖSSE ÄNDERT NICHTS, ÉCOLE",
}


@pytest.mark.parametrize("language", WESTERN)
@pytest.mark.parametrize("suffix", [".csv", ".txt", ".jsonl"])
def test_windows_1252_is_read_and_said(tmp_path, language, suffix):
    path = tmp_path / f"d{suffix}"
    question, _, answer = WESTERN[language].partition(";")
    row = {"question": question, "answer": answer.replace(";", ",")}
    text = {
        ".csv": f"question;answer\nWhat?;That.\n{row['question']};{row['answer']}\n",
        ".txt": f"First line\n\n{question} {answer}",
        ".jsonl": json.dumps(ROWS[1]) + "\n\n" + json.dumps(row, ensure_ascii=False) + "\n",
    }[suffix]
    path.write_bytes(text.encode("cp1252"))
    (warning,) = told(path)[1]
    assert warning.startswith(f"{path}: read as Windows-1252, because the file is not UTF-8; line 3 reads ")
    if suffix == ".txt":
        assert next(iter(read(path))).text == text
    else:
        assert turns(path)[1] == (row["question"], row["answer"])
    report = check(path)
    assert report.ok
    assert report.notices[0] == warning


def test_windows_1252_that_begins_late_in_a_table(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(
        b"question,answer\n" + b"What is it?,It is that and that.\n" * 60_000 + "Wo?,In Köln\n".encode("cp1252")
    )
    *_, last = turns(path)
    assert last == ("Wo?", "In Köln")
    assert "line 60,002 reads 'Wo?,In Köln'" in told(path)[1][0]


UNEXPLAINED = {
    "one byte in UTF-8": "question,answer\nWo?,Köln\nWo?,Düsseldorf\n".encode() + b"Wo?,M\xfcnchen\n",
    "one byte that is no word": b"question,answer\na,b\na,\xe9\na,b\n",
    "Russian": "question,answer\nКто?,Это он и она\n".encode("cp1251"),  # noqa: RUF001
    "Greek": "question,answer\nΠού είναι;,Είναι εδώ\n".encode("cp1253", "ignore"),  # noqa: RUF001
    "Polish": "question,answer\nGdzie był ząb?,Łódź leży w środku i był tu książę\n".encode("cp1250"),
    "Chinese": "question,answer\n你好吗,我很好谢谢你\n".encode("gbk"),
    "Japanese": "question,answer\nこれは何,それは本です。\n".encode("shift-jis"),
    "Korean": "question,answer\n이것은,무엇입니까\n".encode("euc-kr"),
    "noise": b"question,answer\n" + bytes(range(128, 256)) + b",b\n",
    "cut characters": b"question,answer\ncaf\xc3,b\nna\xc3ve,c\n",
}


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_other_bytes_stay_the_problem_of_their_row(tmp_path, name):
    path = tmp_path / "d.csv"
    path.write_bytes(UNEXPLAINED[name])
    source = resolve(path)
    assert source.files == (path,)
    assert source.warnings == ()
    problems = {item.problem for item in source if not hasattr(item, "value")}
    assert "invalid UTF-8" in problems


def test_files_of_different_encodings_are_said_in_one_sentence(tmp_path):
    for name, encoding in (("a", "cp1252"), ("b", "utf-8"), ("c", "cp1252"), ("d", "utf-16")):
        (tmp_path / f"{name}.csv").write_bytes(f"question;answer\n{name}?;größer\n".encode(encoding))
    assert turns(tmp_path) == [(f"{name}?", "größer") for name in "abcd"]
    notices, (warning,) = told(tmp_path)
    assert f"(also {tmp_path / 'c.csv'})" in warning
    assert len(notices) == 1
    assert resolve(tmp_path).labels == tuple(str(tmp_path / f"{name}.csv") for name in "abcd")


def test_the_quarantine_of_a_converted_table_has_the_text_as_it_reads(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes("question;answer\nWo?;Köln\nnur größer\n".encode("cp1252"))
    assert write_fixed(path, tmp_path / "out.jsonl") == (1, 1)
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert (entry["file"], entry["line"], entry["raw"]) == (str(path), 3, "nur größer")
    assert orjson.loads((tmp_path / "out.jsonl").read_bytes()) == {"question": "Wo?", "answer": "Köln"}


def test_the_notices_of_a_table_are_said_once_by_each_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d.csv"
    rows = "".join(f"Wie groß ist {i}?;{i} ist größer\n" for i in range(30))
    path.write_bytes(f"question;answer\n{rows}".encode("cp1252"))
    model = ("--model", "builtin:tiny")
    for command in (
        ["check"],
        ["preview", *model],
        ["plan", *model],
        ["init", "--yes", *model, "-o", str(tmp_path / "c.yaml")],
    ):
        assert main([command[0], str(path), *command[1:]]) == 0
        said = capsys.readouterr().err
        assert said.count("semicolon as delimiter") == 1, command
        assert said.count("warning: ") == said.count("read as Windows-1252") == 1, command
