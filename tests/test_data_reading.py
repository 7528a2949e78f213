"""Sources, containers and formats: every shape in every container, and every way a row can be wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import (
    FORMATS,
    Conversation,
    Document,
    Message,
    PreferencePair,
    Problem,
    SourceRow,
    encode,
    read,
    resolve,
    strict_json,
)
from llmtune.data import containers as containers_module
from llmtune.errors import ConfigError, DataError

USER, ANSWER = Message(role="user", content="What?"), Message(role="assistant", content="Lima, é\n日本")
CHAT = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Lima, é\n日本"}]}
FLAT_EXAMPLES = {
    "alpaca": {"instruction": "What?", "output": "Lima, é\n日本"},
    "prompt/completion": {"prompt": "What?", "completion": "Lima, é\n日本"},
    "question/answer (question/answer)": {"question": "What?", "answer": "Lima, é\n日本"},
    "question/answer (query/response)": {"query": "What?", "response": "Lima, é\n日本"},
    "question/answer (input/output)": {"input": "What?", "output": "Lima, é\n日本"},
}
EXAMPLES = {
    "chat": CHAT,
    "sharegpt": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Lima, é\n日本"}]},
    **FLAT_EXAMPLES,
}


def write(path: Path, rows: list[dict]) -> Path:
    """The rows in the container that the extension names."""
    kind = path.suffix
    if kind == ".jsonl" or path.stem == "lines":
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif kind in (".csv", ".tsv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if path.stem == "stream" else pa.ipc.new_file
        with new(str(path), table.schema) as sink:
            sink.write_table(table)
    return path


def problems_of(data, **kwargs) -> list[Problem]:
    return [problem for item in read(data, **kwargs) if isinstance(item, list) for problem in item]


FILES = ["d.jsonl", "d.json", "lines.json", "d.csv", "d.tsv", "d.parquet", "d.arrow", "stream.arrow"]
# A table of text cannot hold a list of messages.
PAIRS = [(n, f) for n in EXAMPLES for f in FILES if n in FLAT_EXAMPLES or not f.endswith((".csv", ".tsv"))]


@pytest.mark.parametrize(("name", "file"), PAIRS)
def test_every_format_in_every_container_gives_the_same_conversation(tmp_path, name, file):
    path = write(tmp_path / file, [EXAMPLES[name]] * 3)
    reading = read(path)
    assert reading.format.title.lower() == name
    records = list(reading)
    assert [record.messages for record in records] == [(USER, ANSWER)] * 3
    assert {record.file for record in records} == {str(path)}
    first = 1 if file.endswith((".jsonl", ".json", ".parquet", ".arrow")) else 2
    assert records[0].line == first


def test_all_formats_of_the_registry_are_examples_of_the_contract_test():
    untested = {each.title.lower() for each in FORMATS} - set(EXAMPLES)
    assert untested == {"kto", "preference", "plain text"}  # each has a test of its own


@pytest.mark.parametrize("name", EXAMPLES)
def test_rows_in_memory(name):
    assert [record.messages for record in read([EXAMPLES[name]])] == [(USER, ANSWER)]


def test_datasets_dataset():
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([CHAT, CHAT])
    assert [record.messages for record in read(data)] == [(USER, ANSWER)] * 2
    assert resolve(data).fingerprint == resolve([CHAT, CHAT]).fingerprint
    assert [record.messages for record in read(datasets.DatasetDict({"train": data}))] == [(USER, ANSWER)] * 2


@pytest.mark.parametrize("suffix", [".txt", ".md"])
def test_a_text_file_is_one_document_unless_lines_are_asked_for(tmp_path, suffix):
    path = tmp_path / f"d{suffix}"
    path.write_bytes("\ufeffone\r\n\r\n \ntwo é\r\n".encode())
    assert list(read(path)) == [Document(text="one\n\n \ntwo é", file=str(path), line=1)]
    assert list(read(path, text_rows="lines")) == [
        Document(text="one", file=str(path), line=1),
        Document(text="two é", file=str(path), line=4),
    ]
    assert resolve(path).fingerprint != resolve(path, text_rows="lines").fingerprint


def test_text_fields():
    assert list(read([{"text": "one"}])) == [Document(text="one", file="rows", line=1)]


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "Do", "input": "it", "output": "done", "system": "Be", "history": [["a", "b"]]}
    messages = next(iter(read([row]))).messages
    assert [(m.role, m.content) for m in messages] == [
        ("system", "Be"),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "Do\nit"),
        ("assistant", "done"),
    ]


def test_sharegpt_with_system_and_tools():
    row = {
        "system": "Be",
        "tools": '[{"name": "now"}]',
        "conversations": [
            {"from": "human", "value": "time?"},
            {"from": "function_call", "value": '{"name": "now", "arguments": {}}'},
            {"from": "observation", "value": "noon"},
            {"from": "gpt", "value": "Noon."},
        ],
    }
    record = next(iter(read([row])))
    assert [message.role for message in record.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert record.messages[2].tool_calls == ({"type": "function", "function": {"name": "now", "arguments": {}}},)
    assert record.tools == ({"name": "now"},)


def test_prompt_as_messages_is_given_and_not_learned():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    record = next(iter(read([{"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}])))
    assert [message.supervised for message in record.messages if message.role == "assistant"] == [False, True]


def test_weight_zero_is_not_learned():
    turns = [("user", "a", None), ("assistant", "b", 0), ("user", "c", None), ("assistant", "d", 1)]
    row = {"messages": [{"role": r, "content": c, "weight": w} for r, c, w in turns]}
    record = next(iter(read([row])))
    assert [message.supervised for message in record.messages if message.role == "assistant"] == [False, True]
    row["messages"][3]["weight"] = 0
    assert "nothing would be learned" in problems_of([row])[0].problem


def test_preference_and_kto_are_recognised_and_refused_for_training(tmp_path):
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    record = next(iter(read([pair])))
    assert isinstance(record, PreferencePair)
    assert record.rejected == (Message(role="assistant", content="bad"),)
    kto = next(iter(read([{"prompt": "p", "completion": "c", "label": False}])))
    assert kto.label is False
    for rows in ([pair], [{"prompt": "p", "completion": "c", "label": True}]):
        with pytest.raises(DataError, match="supervised fine-tuning cannot use it"):
            encode(rows, None, cache_dir=tmp_path)


def test_keys_that_a_template_may_read_are_kept():
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "thinking": "hm"}]}
    assert next(iter(read([row]))).messages[1].to_template() == {"role": "assistant", "content": "b", "thinking": "hm"}


# ── what is wrong with a row ─────────────────────────────────────────────────────────────────────────────────────


def chat(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


BAD_CHATS = [
    (chat(("user", "a")), "messages", "there is no assistant turn"),
    (chat(("user", "a"), ("assistant", "b"), ("user", "c")), "messages[2].role", "the last message has role 'user'"),
    (chat(("user", "a"), ("agent", "b")), "messages[1].role", "did you mean 'assistant'?"),
    (chat(("Usr", "a"), ("assistant", "b")), "messages[0].role", "did you mean 'user'?"),
    (chat(("user", "a"), ("assistant", " ")), "messages[1].content", "is empty"),
    (chat(("user", "a"), ("assistant", None)), "messages[1].content", "is null"),
    (
        chat(("user", [{"type": "image_url", "image_url": {"url": "a.png"}}]), ("assistant", "b")),
        "messages[0].content[0]",
        "a part of type 'image_url', and only text",
    ),
    (chat(("user", 3), ("assistant", "b")), "messages[0].content", "is a number, expected a text"),
    (chat((None, "a"), ("assistant", "b")), "messages[0].role", "is null"),
    ({"messages": [{"content": "a"}]}, "messages[0].role", "is missing"),
    ({"messages": [{"role": "assistant"}]}, "messages[0].content", "is missing"),
    ({"messages": ["a"]}, "messages[0]", "is a text, expected an object"),
    ({"messages": []}, "messages", "holds no messages"),
    ({"messages": "hello"}, "messages", "expected a list of messages"),
    ({"messages": None}, "messages", "is null"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "messages[0].weight", "expected 0 or 1"),
    ({"messages": [{"role": "assistant", "content": "", "tool_calls": "x"}]}, "messages[0].tool_calls", "a text"),
    ({"other": 1}, "messages", "is missing"),
    ({"question": "a", "answer": "b"}, None, "the row is question/answer"),
]


@pytest.mark.parametrize(("row", "field", "text"), BAD_CHATS)
def test_bad_chat_rows_are_named(row, field, text):
    problems = problems_of([CHAT, row])
    assert any(p.line == 2 and p.field == field and text in p.problem and p.hint for p in problems), problems


BAD_OTHERS = [
    ({"instruction": "a", "output": None}, FLAT_EXAMPLES["alpaca"], "output", "is null"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, FLAT_EXAMPLES["alpaca"], "history[0]", "pair of texts"),
    ({"instruction": "a", "output": "b", "input": 3}, FLAT_EXAMPLES["alpaca"], "input", "is a number"),
    ({"conversations": [{"from": "robot", "value": "a"}]}, EXAMPLES["sharegpt"], "conversations[0].from", "unknown"),
    ({"conversations": ["a"]}, EXAMPLES["sharegpt"], "conversations[0]", "is a text"),
    ({"conversations": []}, EXAMPLES["sharegpt"], "conversations", "holds no messages"),
    (
        {"conversations": [{"from": "function_call", "value": '{"name": "f", "arguments": 3}'}]},
        EXAMPLES["sharegpt"],
        "conversations[0].value[0].function.arguments",
        "the arguments are a number",
    ),
    ({"conversations": "a"}, EXAMPLES["sharegpt"], "conversations", "expected a list of messages"),
    (
        {"conversations": [{"from": "function_call", "value": "now()"}]},
        EXAMPLES["sharegpt"],
        "conversations[0].value",
        "not valid JSON",
    ),
    ({"question": "", "answer": "b"}, {"question": "a", "answer": "b"}, "question", "is empty"),
    ({"question": "a"}, {"question": "a", "answer": "b"}, "answer", "is missing"),
    ({"prompt": "a", "completion": 7}, {"prompt": "a", "completion": "b"}, "completion", "is a number"),
    ({"text": "  "}, {"text": "a"}, "text", "is empty"),
    (
        {"prompt": "a", "completion": "b", "label": "yes"},
        {"prompt": "a", "completion": "b", "label": True},
        "label",
        "the label is a text, expected true or false",
    ),
    (
        {"prompt": "a", "completion": "b"},
        {"prompt": "a", "completion": "b", "label": True},
        None,
        "the row is prompt/completion",
    ),
    ({"chosen": "a", "rejected": ""}, {"chosen": "a", "rejected": "b"}, "rejected", "is empty"),
]


@pytest.mark.parametrize(("row", "good", "field", "text"), BAD_OTHERS)
def test_bad_rows_of_other_formats_are_named(row, good, field, text):
    problems = problems_of([good, good, row])
    assert any(p.line == 3 and p.field == field and text in p.problem for p in problems), problems


def test_all_problems_of_a_row_are_reported_at_once():
    problems = problems_of([CHAT, chat(("robot", None), ("assistant", 1))])
    assert [problem.field for problem in problems] == ["messages[0].role", "messages[0].content", "messages[1].content"]


def test_a_row_that_is_no_dict():
    assert "expected a dict" in problems_of([CHAT, "hello"])[0].problem


# ── lines ────────────────────────────────────────────────────────────────────────────────────────────────────────

GOOD_LINE = b'{"text": "a \\" b: {[, \\u00e9"}'
BAD_LINES = [
    (b'{"text": "\xff"}', "invalid UTF-8: byte 0xff at column 11"),
    (b'{"text": "a', "the JSON is cut off"),
    (b'{"text": "a\x00"}', "a NUL character"),
    (b'{"text": "\\ud800"}', "a lone surrogate U+D800 at column 11"),
    (b'{"text": NaN}', "not valid JSON"),
    (b"[1, 2]", "the row is an array"),
    (b"null", "the row is null"),
    (b"3", "the row is a number"),
    (b'"text"', "the row is a string"),
    (b'{"text": "a", "text": "b"}', "the key 'text' occurs twice"),
    (b'{"text": "a", "\\u0074ext" : "b"}', "the key 'text' occurs twice"),
    (b'{"text": "a", "x": {"y": [{"z": 1, "z" : 2}]}}', "the key 'z' occurs twice"),
    (b'{"text": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested 5,001 levels deep"),
]


@pytest.mark.parametrize(("line", "text"), BAD_LINES)
def test_bad_lines_are_named_and_reading_goes_on(tmp_path, line, text):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD_LINE + b"\r\n\n" + line + b"\n" + GOOD_LINE)
    first, problems, last = read(path)
    assert (first.text, first.line, last.line) == ('a " b: {[, é', 1, 4)
    assert problems[0].line == 3
    assert text in problems[0].problem


def test_a_huge_integer_and_a_long_line_are_read(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "%s", "n": %s}' % (b"a" * 15_000_000, b"9" * 30))
    assert len(next(iter(read(path))).text) == 15_000_000


def test_a_damaged_array(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('[{"text": "a"}, {"text": }, {"text": "b"}, {"text": "c')
    items = list(read(path))
    assert [items[0].text, items[2].text] == ["a", "b"]
    assert "not valid JSON" in items[1][0].problem
    assert items[1][0].line == 2
    assert "cut off" in items[3][0].problem
    path.write_text('[{"text": "a"}] x')
    assert len(problems_of(path)) == 1


def test_a_single_object_spread_over_lines_is_explained(tmp_path):
    path = tmp_path / "d.json"
    path.write_text('{\n "data": []\n}')
    with pytest.raises(DataError, match="one JSON object spread over lines"):
        list(read(path))


def test_bad_csv_rows(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(b'question,answer\n"a\nb",c\nonly\nx,\xff\n\nd,e\n"f,g')
    reading = list(read(path))
    assert reading[0].line == 2
    assert reading[3].line == 7
    problems = [item[0] for item in reading if isinstance(item, list)]
    assert [(p.line, p.problem.split(":")[0]) for p in problems] == [
        (4, "1 cells, the header has 2"),
        (5, "invalid UTF-8"),
        (8, "not valid CSV"),
    ]
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="the header names 'a' twice"):
        read(path)
    path.write_text('"a,b\n1,2\n')
    with pytest.raises(DataError, match="the header cannot be read"):
        read(path)


def test_arrow_with_invalid_text(tmp_path):
    array = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xff")]
    )
    path = tmp_path / "d.parquet"
    pq.write_table(pa.table({"text": array}), path)
    good, bad = read(path)
    assert good.text == "a"
    assert bad[0].problem == "invalid UTF-8"


@pytest.mark.parametrize("name", ["d.parquet", "d.arrow"])
def test_a_broken_table_is_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"this is not a table at all" * 10)
    with pytest.raises(DataError, match="not a readable"):
        read(path)


# ── recognition ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_ambiguous_rows_name_the_candidates_and_the_flag():
    rows = [CHAT | {"text": "hello"}]
    with pytest.raises(DataError, match=r"more than one format: chat .* plain text .*--set data\.format=chat"):
        read(rows)
    assert read(rows, format="text").format.name == "text"
    assert read(rows, format="chat").reason.endswith("(said so)")


def test_a_format_that_reads_more_wins_over_one_that_reads_less():
    assert read([{"instruction": "a", "input": "", "output": "b"}]).format.name == "alpaca"
    assert read([{"prompt": "a", "chosen": "b", "rejected": "c"}]).format.name == "preference"


def test_mixed_files_name_the_lines_that_differ():
    problems = problems_of([CHAT, {"text": "a"}, CHAT, {"question": "a", "answer": "b"}])
    assert [problem.line for problem in problems] == [2, 4]
    assert problems[0].problem == "the row is plain text, the other rows are chat"


def test_unrecognised_rows_list_what_is_there():
    with pytest.raises(DataError, match=r"not recognised; the row has 'foo', 'bar'"):
        read([{"foo": 1, "bar": 2}])


def test_null_columns_of_a_table_do_not_confuse(tmp_path):
    path = write(tmp_path / "d.parquet", [CHAT | {"text": None}, CHAT | {"text": None}])
    assert read(path).format.name == "chat"


def test_columns_map_fields():
    rows = [{"q": "What?", "a": "Lima, é\n日本", "text": "x"}]
    reading = read(rows, columns={"prompt": "q", "completion": "a"})
    assert next(iter(reading)).messages == (USER, ANSWER)
    with pytest.raises(DataError, match=r"no column 'qq' \(did you mean 'q'\?\)"):
        read(rows, columns={"prompt": "qq", "completion": "a"})
    with pytest.raises(ConfigError, match="did you mean 'prompt'"):
        read(rows, columns={"promt": "q"})
    assert problems_of([*rows, {"a": "b"}], columns={"prompt": "q", "completion": "a"})[0].field == "q"


def test_unknown_format_is_a_configuration_error():
    with pytest.raises(ConfigError, match="did you mean 'sharegpt'"):
        read([CHAT], format="sharegtp")


def test_no_readable_row(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("nonsense\n")
    with pytest.raises(DataError, match=r"d\.jsonl:1: not valid JSON"):
        read(path)
    path.write_text("\n\n")
    with pytest.raises(DataError, match="no rows"):
        read(path)


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_missing_file_names_the_nearest(tmp_path):
    write(tmp_path / "chats.jsonl", [CHAT])
    with pytest.raises(DataError, match=r"Did you mean '.*chats\.jsonl'"):
        resolve(tmp_path / "chat.jsonl")
    with pytest.raises(DataError, match="does not exist either"):
        resolve(tmp_path / "no" / "chat.jsonl")


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "d.txt"])
def test_empty_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match="the file is empty"):
        resolve(tmp_path / name)


def test_unsupported_extension_lists_the_supported(tmp_path):
    path = tmp_path / "d.xlsx"
    path.write_text("x")
    with pytest.raises(DataError, match=r"'\.xlsx' is not supported; expected \.jsonl"):
        resolve(path)
    with pytest.raises(DataError, match="type int cannot be read"):
        resolve(3)
    with pytest.raises(DataError, match="no rows"):
        resolve([])


def test_directories_and_globs_are_read_in_order(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".hidden.jsonl", "README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, [{"text": name}]) if name.endswith("l") else (tmp_path / name).write_text("about")
    assert [record.text for record in read(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert [record.text for record in read(str(tmp_path / "*.jsonl"))] == ["a.jsonl", "b.jsonl"]
    assert resolve(tmp_path).name == tmp_path.name
    with pytest.raises(DataError, match="no file matches"):
        resolve(str(tmp_path / "*.csv"))
    write(tmp_path / "d.csv", [{"text": "x"}])
    with pytest.raises(DataError, match=r"different kinds lie together: csv \(d\.csv\), jsonl \(a\.jsonl\)"):
        resolve(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        resolve(tmp_path / "empty")


def test_a_saved_dataset_directory_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([CHAT]).save_to_disk(tmp_path / "saved")
    assert [record.messages for record in read(tmp_path / "saved")] == [(USER, ANSWER)]


def test_fingerprint_depends_on_content_and_order_alone(tmp_path):
    one, two = {"text": "one"}, {"text": "two"}
    paths = [
        write(tmp_path / name, rows)
        for name, rows in [("a.jsonl", [one, two]), ("b.jsonl", [one, two]), ("c.jsonl", [two, one])]
    ]
    same, again, other = [resolve(path).fingerprint for path in paths]
    assert same == again != other
    assert resolve([one, two]).fingerprint != resolve([two, one]).fingerprint
    write(paths[0], [one])
    assert resolve(paths[0]).fingerprint != same
    assert resolve([{"n": 10**30}]).fingerprint != resolve([{"n": 10**31}]).fingerprint


# ── properties ───────────────────────────────────────────────────────────────────────────────────────────────────

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(st.characters(codec="utf-8"), max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=4), JSON, max_size=4), max_size=6)


@settings(max_examples=60, deadline=None)
@given(
    rows=ROWS, noise=st.binary(max_size=20).filter(lambda b: b"\n" not in b), at=st.integers(0, 6), crlf=st.booleans()
)
def test_every_good_line_is_read_and_every_bad_one_named(tmp_path_factory, rows, noise, at, crlf):
    end = b"\r\n" if crlf else b"\n"
    lines = [json.dumps(row, ensure_ascii=bool(at % 2)).encode() for row in rows]
    at = min(at, len(lines))
    lines.insert(at, noise)
    path = tmp_path_factory.mktemp("lines") / "d.jsonl"
    path.write_bytes(b"".join(line + end for line in lines))
    items = list(containers_module.read_jsonl(path))
    expected = {number: row for number, row in zip([n for n in range(len(lines)) if n != at], rows, strict=True)}
    good = {item.line - 1: item.value for item in items if isinstance(item, SourceRow)}
    bad = {item.line - 1 for item in items if isinstance(item, Problem)}
    try:
        value = orjson.loads(noise)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        expected[at] = value
    assert good == expected
    assert bad == (set() if at in expected or not noise.strip(b" \t\r\n\v\f") else {at})


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, indent=st.sampled_from([None, 0, 2]), chunk=st.integers(1, 40))
def test_arrays_are_read_in_chunks_of_any_size(tmp_path_factory, rows, indent, chunk):
    path = tmp_path_factory.mktemp("arrays") / "d.json"
    path.write_text(" \n" + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    before, strict_json._CHUNK_BYTES = strict_json._CHUNK_BYTES, chunk
    try:
        assert [item.value for item in containers_module.read_json(path)] == rows
    finally:
        strict_json._CHUNK_BYTES = before


def _repeats_a_key(raw: str) -> bool:
    repeats = []
    json.loads(raw, object_pairs_hook=lambda pairs: repeats.append(len({k for k, _ in pairs}) < len(pairs)))
    return any(repeats)


@settings(max_examples=200, deadline=None)
@given(
    pairs=st.lists(st.tuples(st.text('ab":\\ {', max_size=2), JSON), max_size=4),
    space=st.sampled_from(["", " ", "\t"]),
)
def test_duplicate_keys_are_never_missed_and_never_invented(pairs, space):
    raw = "{" + ",".join(f"{json.dumps(key)}{space}:{json.dumps(value)}" for key, value in pairs) + "}"
    result = strict_json.parse_object(raw.encode(), "f", 1)
    assert isinstance(result, Problem) == _repeats_a_key(raw)


def test_source_rows_are_conversations_with_their_place(tmp_path):
    path = write(tmp_path / "d.jsonl", [CHAT])
    assert list(read(path)) == [Conversation(messages=(USER, ANSWER), file=str(path), line=1)]
