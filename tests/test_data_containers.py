"""The same rows give the same conversations, whatever container they come in, and no null of Arrow's is learned."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.data import FORMATS, Conversation, Document, PreferencePair, read

CITY = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CLOCK = {
    "name": "time",
    "description": "The time.",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string", "enum": ["UTC", "PET"]}}},
}
WRAPPED = [{"type": "function", "function": CITY}, {"type": "function", "function": CLOCK}]


def called(name: str, arguments: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def turns(question: str, name: str, arguments: dict[str, Any], result: str) -> list[dict[str, Any]]:
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "", "tool_calls": called(name, arguments)},
        {"role": "tool", "content": result, "name": name},
        {"role": "assistant", "content": f"It is {result}.", "reasoning_content": "Look it up."},
    ]


def shares(question: str, name: str, arguments: dict[str, Any], result: str) -> list[dict[str, Any]]:
    return [
        {"from": "human", "value": question},
        {"from": "function_call", "value": json.dumps({"name": name, "arguments": arguments})},
        {"from": "observation", "value": result},
        {"from": "gpt", "value": f"It is {result}."},
    ]


# Two rows of each shape whose objects have different keys, so that Arrow adds nulls at every depth.
ROWS: dict[str, list[dict[str, Any]]] = {
    "messages": [
        {"messages": turns("Hot?", "weather", {"city": "Lima"}, "20 °C"), "tools": WRAPPED[:1]},
        {"messages": turns("Late?", "time", {"zone": "PET", "exact": True}, "noon"), "tools": WRAPPED},
    ],
    "conversations": [
        {"conversations": shares("Hot?", "weather", {"city": "Lima"}, "20 °C"), "tools": [CITY], "system": "Be brief."},
        {"conversations": shares("Late?", "time", {"zone": "PET"}, "noon"), "tools": [CLOCK]},
    ],
    "instruction+output": [
        {"instruction": "Say", "input": "a", "output": "A", "system": "Be brief.", "history": [["x", "y"]]},
        {"instruction": "Say", "input": "", "output": "B\n日本"},
    ],
    "prompt+completion": [
        {"prompt": [{"role": "user", "content": "Hot?"}], "completion": turns("", "time", {"zone": "UTC"}, "noon")[1:]},
        {
            "prompt": [{"role": "user", "content": "a", "name": "Ann"}],
            "completion": [{"role": "assistant", "content": "b"}],
        },
    ],
    "question+answer": [
        {"question": "What?", "answer": "Lima", "context": "Peru.", "tools": [CITY]},
        {"question": "When?", "answer": "Noon", "history": [["q", "a"], ["r", "b"]], "tools": [CLOCK]},
    ],
    "query+response": [{"query": "What?", "response": "Lima", "system": "Be."}, {"query": "When?", "response": "Noon"}],
    "input+output": [{"input": "What?", "output": "Lima"}, {"input": "When?", "output": "Noon", "functions": [CLOCK]}],
    "text": [{"text": "One.\nTwo."}, {"text": "日本"}],
    "prompt+completion+label": [
        {"prompt": "What?", "completion": "Lima", "label": True},
        {"prompt": "When?", "completion": "Nine", "label": False},
    ],
    "messages+label": [
        {"messages": turns("Hot?", "weather", {"city": "Lima"}, "20 °C"), "label": True},
        {"messages": turns("Late?", "time", {"zone": "PET"}, "noon"), "label": False},
    ],
    "conversations+label": [
        {"conversations": shares("Hot?", "weather", {"city": "Lima"}, "20 °C"), "label": False},
        {"conversations": shares("Late?", "time", {"zone": "PET"}, "noon"), "label": True},
    ],
    "chosen+rejected": [
        {"prompt": "What?", "chosen": "Lima", "rejected": "Rome"},
        {"prompt": "When?", "chosen": "Noon", "rejected": "Never", "system": "Be brief."},
    ],
    "chosen_messages+rejected_messages": [
        {
            "chosen_messages": turns("Hot?", "weather", {"city": "Lima"}, "20 °C"),
            "rejected_messages": turns("Hot?", "time", {"zone": "PET"}, "noon"),
        },
        {
            "chosen_messages": turns("Late?", "time", {"exact": 1}, "noon"),
            "rejected_messages": turns("Late?", "weather", {"city": "Lima"}, "20 °C"),
        },
    ],
    "messages+rejected_response": [
        {"messages": turns("Hot?", "weather", {"city": "Lima"}, "20 °C"), "rejected_response": "No."},
        {"messages": turns("Late?", "time", {"zone": "PET"}, "noon"), "rejected_response": "Yes."},
    ],
    "messages+rejected_messages": [
        {
            "messages": turns("Hot?", "weather", {"city": "Lima"}, "20 °C"),
            "rejected_messages": [{"role": "assistant", "content": "No."}],
        },
        {
            "messages": turns("Late?", "time", {"zone": "PET"}, "noon"),
            "rejected_messages": [{"role": "assistant", "content": "Yes.", "name": "b"}],
        },
    ],
}


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    file = path / "d.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def _json(path: Path, rows: list[dict[str, Any]]) -> Path:
    file = path / "d.json"
    file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return file


def _table(path: Path, rows: list[dict[str, Any]], delimiter: str, suffix: str) -> Path:
    file = path / f"d{suffix}"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with file.open("w", newline="", encoding="utf-8") as text:
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerow(columns)
        for row in rows:
            cells = [row.get(column, "") for column in columns]
            writer.writerow([cell if isinstance(cell, (str, bool)) else json.dumps(cell) for cell in cells])
    return file


def _pandas_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_csv(path / "p.csv", index=False)
    return path / "p.csv"


def _pyarrow_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(_arrow_table(rows), path / "d.parquet")
    return path / "d.parquet"


def _pandas_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_parquet(path / "p.parquet")
    return path / "p.parquet"


def _arrow_table(rows: list[dict[str, Any]]) -> pa.Table:
    columns = dict.fromkeys(key for row in rows for key in row)
    return pa.table({column: [row.get(column) for row in rows] for column in columns})


def _arrow(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = _arrow_table(rows)
    with pa.ipc.new_file(str(path / "d.arrow"), table.schema) as sink:
        sink.write_table(table)
    return path / "d.arrow"


def _dataset(path: Path, rows: list[dict[str, Any]]) -> Any:
    import datasets

    columns = dict.fromkeys(key for row in rows for key in row)
    return datasets.Dataset.from_list([{column: row.get(column) for column in columns} for row in rows])


def _json_dataset(path: Path, rows: list[dict[str, Any]]) -> Any:
    """As ``load_dataset("json", …)`` of today stores objects of different shapes."""
    import datasets

    columns = dict.fromkeys(key for row in rows for key in row)
    return datasets.Dataset.from_list(
        [{column: row.get(column) for column in columns} for row in rows], on_mixed_types="use_json"
    )


def _dataset_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    _dataset(path, rows).to_parquet(path / "d.parquet")
    return path / "d.parquet"


def _json_dataset_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    _json_dataset(path, rows).to_parquet(path / "d.parquet")
    return path / "d.parquet"


def _saved_dataset(path: Path, rows: list[dict[str, Any]]) -> Path:
    _json_dataset(path, rows).save_to_disk(path / "saved")
    return path / "saved"


def _pandas_records(path: Path, rows: list[dict[str, Any]]) -> Any:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(rows).to_parquet(path / "p.parquet")
    return pandas.read_parquet(path / "p.parquet").to_dict("records")


CONTAINERS = {
    "jsonl": _jsonl,
    "json": _json,
    "csv": lambda path, rows: _table(path, rows, ",", ".csv"),
    "tsv": lambda path, rows: _table(path, rows, "\t", ".tsv"),
    "csv of pandas": _pandas_csv,
    "parquet of pyarrow": _pyarrow_parquet,
    "parquet of pandas": _pandas_parquet,
    "parquet of datasets": _dataset_parquet,
    "parquet of datasets with Json": _json_dataset_parquet,
    "arrow": _arrow,
    "saved dataset": _saved_dataset,
    "dataset": _dataset,
    "dataset with Json": _json_dataset,
    "list": lambda path, rows: rows,
    "records of pandas": _pandas_records,
}


def said(data: Any) -> list[Any]:
    """All that the records of ``data`` say, places apart."""
    found = []
    for record in read(data):
        assert not isinstance(record, list), record
        if isinstance(record, Conversation):
            found.append((record.messages, record.tools))
        elif isinstance(record, Document):
            found.append(record.text)
        else:
            assert isinstance(record, PreferencePair)
            found.append((record.prompt, record.chosen, record.rejected, record.label))
    return found


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("shape", ROWS)
def test_every_shape_says_the_same_in_every_container(tmp_path: Path, shape: str, container: str) -> None:
    rows = ROWS[shape]
    assert "+".join(read(rows).format.required) == shape
    data = CONTAINERS[container](tmp_path, rows)
    assert read(data).format.required == tuple(shape.split("+"))
    assert said(data) == said(rows)


def test_every_shape_of_the_registry_is_among_them() -> None:
    assert set(ROWS) == {"+".join(each.required) for each in FORMATS}


@pytest.mark.parametrize("container", CONTAINERS)
def test_no_null_is_learned_at_any_depth(tmp_path: Path, container: str) -> None:
    (first, tools), (second, _) = said(CONTAINERS[container](tmp_path, ROWS["messages"]))
    assert first[1].tool_calls == tuple(called("weather", {"city": "Lima"}))
    assert second[1].tool_calls == tuple(called("time", {"zone": "PET", "exact": True}))
    assert tools == (WRAPPED[0],)
    assert first[0].extra is None


def test_a_null_that_a_json_file_says_itself_is_named_and_a_text_keeps_it(tmp_path: Path) -> None:
    row = ROWS["messages"][0]
    call = {"name": "weather", "arguments": {"city": "Lima", "zone": None}}
    written = row | {"messages": [row["messages"][0], {"role": "assistant", "content": "", "tool_calls": [call]}]}
    record = next(iter(read(_jsonl(tmp_path, [written]))))
    assert record.messages[1].tool_calls == ({"name": "weather", "arguments": {"city": "Lima"}},)
    assert record.unused == ("null values in tool_calls",)
    call["arguments"] = json.dumps(call["arguments"])
    record = next(iter(read(_jsonl(tmp_path, [written]))))
    assert record.messages[1].tool_calls == ({"name": "weather", "arguments": {"city": "Lima", "zone": None}},)
    assert record.unused == ()


NAMES = st.text("abc", min_size=1, max_size=2)
OBJECTS = st.recursive(
    st.dictionaries(NAMES, st.text("xyz", max_size=3), min_size=1, max_size=3),
    lambda inner: st.dictionaries(st.text("def", min_size=1, max_size=2), inner, min_size=1, max_size=2),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None)
@given(arguments=st.lists(OBJECTS, min_size=2, max_size=4))
def test_arguments_of_any_shapes_say_the_same_in_arrow(arguments: list[dict[str, Any]]) -> None:
    rows = [{"messages": turns("q", "f", each, "r")} for each in arguments]
    try:
        dataset = _dataset(Path(), rows)
    except pa.ArrowInvalid:  # one name for a text and an object, which no Arrow column can hold
        return
    assert said(dataset) == said(rows)
