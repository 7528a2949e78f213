"""Nothing that a row says is dropped without a word: it is read, named as not used, or the row is refused."""

from __future__ import annotations

import ast
import json
import re
import shlex
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_containers import ROWS

from llmtune.cli.program import main
from llmtune.data import Document, Problem, check, read
from llmtune.errors import ConfigError, DataError

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "Lima"}]


def record_of(row: dict[str, Any], **settings: Any) -> Any:
    (record,) = read([row], **settings)
    assert not isinstance(record, list), record
    return record


def said(row: dict[str, Any], **settings: Any) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in record_of(row, **settings).messages]


def refused(row: dict[str, Any], **settings: Any) -> Problem:
    (problems,) = read([row], **settings)
    assert isinstance(problems, list), problems
    return problems[0]


# ── fields of other formats ──────────────────────────────────────────────────────────────────────────────────────

FLAT = [
    {"question": "What?", "answer": "Lima"},
    {"query": "What?", "response": "Lima"},
    {"input": "What?", "output": "Lima"},
    {"instruction": "What?", "output": "Lima"},
    {"prompt": "What?", "completion": "Lima"},
]
CONVERSATIONAL = [
    *FLAT,
    {"messages": CHAT},
    {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Lima"}]},
]


@pytest.mark.parametrize("row", CONVERSATIONAL, ids=lambda row: next(iter(row)))
def test_system_history_and_tools_are_read_in_every_format(row: dict[str, Any]) -> None:
    extra = {"system": "Be brief.", "history": [["a", "b"]], "tools": [{"name": "now"}]}
    record = record_of(row | extra)
    expected = [("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "What?"), ("assistant", "Lima")]
    assert [(message.role, message.content) for message in record.messages] == expected
    assert record.tools == ({"name": "now"},)
    assert record.unused == ()
    as_text = extra | {"history": json.dumps(extra["history"]), "tools": json.dumps(extra["tools"])}
    assert record_of(row | as_text).messages == record.messages


@pytest.mark.parametrize("row", CONVERSATIONAL, ids=lambda row: next(iter(row)))
def test_older_functions_are_tools(row: dict[str, Any]) -> None:
    record = record_of(row | {"functions": [{"name": "now"}]})
    assert record.tools == ({"type": "function", "function": {"name": "now"}},)
    assert refused(row | {"functions": [{"name": "now"}], "tools": [{"name": "then"}]}).field == "functions"


def test_an_older_function_call_is_a_tool_call_whatever_the_content_is() -> None:
    call = {"name": "now", "arguments": '{"zone": "PET"}'}
    for content in (None, "", "Let me see."):
        turns = [
            CHAT[0],
            {"role": "assistant", "content": content, "function_call": call},
            {"role": "function", "name": "now", "content": "noon"},
            {"role": "assistant", "content": "Noon."},
        ]
        record = record_of({"messages": turns})
        called = {"type": "function", "function": {"name": "now", "arguments": {"zone": "PET"}}}
        assert record.messages[1].tool_calls == (called,)
        assert record.messages[1].content == (content or "")
        assert (record.messages[2].role, record.messages[2].name) == ("tool", "now")
        assert (record.unused, record.extra_keys) == ((), ())


def test_a_system_prompt_stands_before_the_history_and_is_not_said_twice() -> None:
    row = {"system": "Be.", "messages": [{"role": "system", "content": "Be."}, *CHAT], "history": [["a", "b"]]}
    assert [role for role, _ in said(row)] == ["system", "user", "assistant", "user", "assistant"]
    row["messages"][0]["content"] = "Do."
    assert said(row)[:3] == [("system", "Be."), ("system", "Do."), ("user", "a")]


@pytest.mark.parametrize("row", [FLAT[0], FLAT[1], FLAT[2], FLAT[4]], ids=lambda row: next(iter(row)))
def test_a_context_stands_before_the_question(row: dict[str, Any]) -> None:
    assert said(row | {"context": "Peru."})[0] == ("user", "Peru.\n\nWhat?")
    assert said(row | {"context": None})[0] == ("user", "What?")


def test_alpaca_takes_a_context_for_its_input() -> None:
    row = {"instruction": "Say", "output": "A", "context": "a"}
    assert said(row)[0] == ("user", "Say\na")
    assert refused(row | {"input": "b"}).field == "context"


def test_an_instruction_beside_a_question_is_refused_until_it_is_said_what_it_is() -> None:
    row = FLAT[0] | {"instruction": "Answer briefly."}
    problem = refused(row)
    assert problem.field == "instruction"
    assert "--set data.columns.system=instruction" in problem.hint
    assert said(row, columns={"system": "instruction"})[0] == ("system", "Answer briefly.")
    assert said(row, ignore_columns=["instruction"]) == said(FLAT[0])


@pytest.mark.parametrize("column", ["image", "images", "video", "videos", "audio", "audios", "Images"])
@pytest.mark.parametrize("row", CONVERSATIONAL, ids=lambda row: next(iter(row)))
def test_pictures_and_sounds_are_refused(row: dict[str, Any], column: str) -> None:
    problem = refused(row | {column: ["a.png"]})
    assert problem.field == column
    assert f"--set data.ignore_columns={column}" in problem.hint
    assert record_of(row | {column: ["a.png"]}, ignore_columns=[column]).unused == ()
    for nothing in (None, [], "", " "):
        assert record_of(row | {column: nothing}).unused == ()


@pytest.mark.parametrize("column", ["image", "images", "videos", "audio"])
def test_pictures_and_sounds_of_a_turn_are_refused(column: str) -> None:
    turns = [CHAT[0] | {column: ["a.png"]}, CHAT[1]]
    assert refused({"messages": turns}).field == f"messages[0].{column}"
    assert record_of({"messages": [CHAT[0] | {column: []}, CHAT[1]]}).extra_keys == ()


@pytest.mark.parametrize("fields", [{"role": "prompter"}, {"replies": [{"text": "b"}]}, {"parent_id": "x"}])
def test_a_message_of_a_tree_is_no_document(fields: dict[str, Any]) -> None:
    row = {"text": "Where is Lima?", **fields}
    (field,) = fields
    assert "conversation tree" in refused(row).problem
    assert f"--set data.ignore_columns={field}" in refused(row).hint
    assert record_of(row, ignore_columns=[field]) == Document(text="Where is Lima?", file="rows", line=1)


# ── columns that nothing reads ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", ROWS)
def test_other_columns_are_named_once_sorted_and_can_be_ignored(shape: str) -> None:
    rows = [row | {"topic": "geography", "source": {"page": ["Atlas"]}, "id": 7, "note": " "} for row in ROWS[shape]]
    report = check(rows)
    assert report.unused == ("source", "topic")
    assert "not used: source, topic" in str(report)
    assert report.to_json()["unused_columns"] == ["source", "topic"]
    assert next(iter(read(rows, ignore_columns=["topic"]))).unused == ("source",)


def test_keys_inside_messages_turns_and_parts_are_named() -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "What?", "cache": {"kind": "short"}}], "mood": "curious"},
        {"role": "assistant", "content": "Lima", "reasoning_content": "Peru's capital.", "tool_call_id": "1", "n": 3},
    ]
    report = check([{"messages": turns}] * 3)
    assert report.unused == ("messages[].content[].cache", "messages[].mood")
    shares = [{"from": "human", "value": "What?", "mood": "curious"}, {"from": "gpt", "value": "Lima"}]
    assert check([{"conversations": shares}]).unused == ("conversations[].mood",)


def test_numbers_that_weigh_a_row_and_switches_are_named_too() -> None:
    report = check([{"messages": CHAT, "score": 0.5, "weight": 0, "label": 7, "flag": True, "id": 3}])
    assert report.unused == ("flag", "label", "score", "weight")


def test_a_mapped_field_that_hides_a_column_is_named() -> None:
    row = {"prompt": "What?", "completion": "Rome", "better": "Lima"}
    record = record_of(row, columns={"completion": "better"})
    assert record.messages[1].content == "Lima"
    assert record.unused == ("completion (the column)",)


# ── mappings ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("row", CONVERSATIONAL, ids=lambda row: next(iter(row)))
def test_a_mapping_is_used_or_refused(row: dict[str, Any]) -> None:
    there = row | {"persona": "Be brief."}
    assert said(there, columns={"system": "persona"})[0] == ("system", "Be brief.")
    with pytest.raises(ConfigError, match=r"rows have no field 'chosen'.*the fields of .* are .*system"):
        read([there], columns={"chosen": "persona"})


def test_an_optional_column_may_be_missing_in_some_rows_and_must_be_in_one() -> None:
    rows = [FLAT[0] | {"persona": "Be brief."}, FLAT[0]]
    first, second = read(rows, columns={"system": "persona"})
    assert [len(record.messages) for record in (first, second)] == [3, 2]
    with pytest.raises(DataError, match=r"no column 'persone' \(did you mean 'persona'\?\)"):
        read(rows, columns={"system": "persone"})


def test_columns_are_told_by_plain_names() -> None:
    for question, answer in [
        ("Question", " Answer"),
        ("q", "a"),
        ("prompt", "response"),
        ("user", "assistant"),
        ("Input", "Output"),
    ]:
        reading = read([{question: "What?", answer: "Lima"}])
        assert [message.content for message in next(iter(reading)).messages] == ["What?", "Lima"]
        assert repr(question) in reading.reason or question == "prompt"
        assert repr(answer) in reading.reason
    row = {"System Prompt": "Be.", "User-Message": "What?", "ASSISTANT": "Lima"}
    assert said(row) == [("system", "Be."), ("user", "What?"), ("assistant", "Lima")]
    row = {"instruction": "What?", "context": "Peru.", "response": "Lima", "category": "qa"}
    assert said(row) == [("user", "What?\nPeru."), ("assistant", "Lima")]
    assert record_of(row).unused == ("category",)
    assert said({"Messages": json.dumps(CHAT)}) == [("user", "What?"), ("assistant", "Lima")]


def test_nothing_is_guessed_where_two_columns_could_be_meant() -> None:
    with pytest.raises(DataError, match="the format is not recognised"):
        read([{"prompt": "What?", "response": "Lima", "reply": "Rome"}])


@pytest.mark.parametrize(
    "row",
    [
        {"topic": "Peru", "body": "What is the capital of it?", "verdict": "It is Lima, a city."},
        {"question": "What?", "my reply": "Lima", "n": 3},
        {"column with = and 'quotes'": "What?", "b c": "Lima"},
        {"lonely": "A text of its own."},
    ],
)
def test_what_cannot_be_told_ends_with_a_command_that_works(tmp_path: Path, row: dict[str, Any]) -> None:
    file = tmp_path / "some data.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as error:
        read(file)
    message = str(error.value)
    assert all(repr(column) in message for column in row)
    command = shlex.split(message[message.index("llmtune check") :])
    assert main([*command[1:], "--quiet"]) == 0
    with pytest.raises(DataError) as error:
        read([row])
    mapping = re.search(r"FineTuner\(rows, columns=(\{.*\})\)", str(error.value))
    assert mapping is not None
    assert not isinstance(next(iter(read([row], columns=ast.literal_eval(mapping[1])))), list)


# ── judgements ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", "1"])
@pytest.mark.parametrize("row", [CONVERSATIONAL[4], *CONVERSATIONAL[5:]], ids=lambda row: next(iter(row)))
def test_a_verdict_beside_an_answer_is_a_judgement_and_not_an_answer_to_learn(row: dict[str, Any], label: Any) -> None:
    report = check([row | {"label": label}])
    assert report.format == "kto"
    assert "train cannot use kto data" in report.verdict
    assert report.to_json()["trainable"] is False
    assert "supervised fine-tuning cannot use it" in str(report)


@pytest.mark.parametrize("row", FLAT[:4], ids=lambda row: next(iter(row)))
def test_a_verdict_beside_other_answers_refuses_the_row(row: dict[str, Any]) -> None:
    assert "a verdict on its answer" in refused(row | {"label": False}).problem
    assert record_of(row | {"label": False}, ignore_columns=["label"]).unused == ()


def test_a_late_verdict_refuses_its_row() -> None:
    rows = [{"messages": CHAT}] * 300 + [{"messages": CHAT, "label": False}]
    report = check(rows)
    assert (report.bad_rows, report.problems[0].line, report.problems[0].field) == (1, 301, "label")


def test_chosen_and_rejected_turns_are_preference_data() -> None:
    prompt = [{"from": "human", "value": "What?"}]
    pair = {"chosen": {"from": "gpt", "value": "Lima"}, "rejected": {"from": "gpt", "value": "Rome"}}
    for row in ({"conversations": prompt} | pair, {"messages": CHAT[:1]} | pair, {"prompt": "What?"} | pair):
        record = record_of(row)
        assert [message.content for message in (*record.prompt, *record.chosen, *record.rejected)] == [
            "What?",
            "Lima",
            "Rome",
        ]


@pytest.mark.parametrize("shape", [shape for shape in ROWS if read(ROWS[shape]).format.trainable is False])
def test_the_way_out_of_a_judgement_works(tmp_path: Path, shape: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS[shape]), encoding="utf-8")
    instead = read(file).instead
    assert instead.startswith("--set data.format=")
    assert main(["check", str(file), "--quiet", *shlex.split(instead)]) == 0
    pairs = dict(flag.split("=", 1) for flag in shlex.split(instead) if "=" in flag)
    columns = {key.split(".")[2]: value for key, value in pairs.items() if key.startswith("data.columns.")}
    assert read(file, format=pairs["data.format"], columns=columns).format.trainable


# ── turns ────────────────────────────────────────────────────────────────────────────────────────────────────────

OFF = [("weight", 0), ("weight", 0.0), ("train", False), ("training", False), ("loss", False), ("loss_weight", 0.0)]


@pytest.mark.parametrize(("mark", "value"), OFF)
@pytest.mark.parametrize("shape", ["messages", "conversations"])
def test_marks_of_other_toolkits_are_obeyed(shape: str, mark: str, value: Any) -> None:
    chat = shape == "messages"
    role, text = ("role", "content") if chat else ("from", "value")
    turns = [
        {role: "user" if chat else "human", text: "a"},
        {role: "assistant" if chat else "gpt", text: "b", mark: value},
        {role: "user" if chat else "human", text: "c", mark: value},
        {role: "assistant" if chat else "gpt", text: "d", mark: type(value)(1)},
    ]
    record = record_of({shape: turns})
    assert [message.supervised for message in record.messages if message.role == "assistant"] == [False, True]
    assert (record.unused, record.extra_keys) == ((), ())
    turns[3][mark] = 0.5
    assert "expected 0 or 1" in refused({shape: turns}).problem
    turns[3][mark] = "yes"
    assert "expected 0 or 1" in refused({shape: turns}).problem
    turns[3][mark], turns[0][mark] = value, type(value)(1)
    turns[1][mark] = type(value)(1)
    assert record_of({shape: turns}).unused == (f"{shape}[].{mark} of 'user' turns",)


def test_marks_that_contradict_each_other_are_refused() -> None:
    turns = [CHAT[0], CHAT[1] | {"train": True, "weight": 0}]
    assert "contradict each other" in refused({"messages": turns}).problem


@pytest.mark.parametrize(
    ("role", "meant"),
    [
        ("human", "user"),
        ("prompter", "user"),
        ("User", "user"),
        ("ai", "assistant"),
        ("bot", "assistant"),
        ("gpt", "assistant"),
        ("model", "assistant"),
        ("ASSISTANT", "assistant"),
    ],
)
def test_roles_by_other_names(role: str, meant: str) -> None:
    turns = [dict(turn) for turn in (*CHAT, *CHAT)]
    for turn in turns:
        turn["role"] = role if turn["role"] == meant else turn["role"]
    assert [name for name, _ in said({"messages": turns})] == ["user", "assistant"] * 2
    shares = [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    assert said({"conversations": shares}) == said({"messages": turns}) == said({"messages": shares})
    assert said({"conversations": turns}) == said({"messages": turns})


def test_a_content_in_parts_is_one_text_with_its_reasoning_and_calls() -> None:
    parts = [
        {"type": "reasoning", "value": "Peru's capital. "},
        {"type": "text", "text": "It is "},
        {"type": "text", "value": "Lima"},
        "!",
        {"type": "tool_call", "value": '{"name": "map", "arguments": {"city": "Lima"}}'},
    ]
    turns = [CHAT[0], {"role": "assistant", "content": parts}, {"role": "tool", "content": "shown"}, CHAT[1]]
    message = record_of({"messages": turns}).messages[1]
    assert message.content == "It is Lima!"
    assert message.extra == {"reasoning_content": "Peru's capital. "}
    assert message.tool_calls == ({"type": "function", "function": {"name": "map", "arguments": {"city": "Lima"}}},)


@pytest.mark.parametrize(
    "part", [{"type": "image"}, {"type": "image_url", "image_url": {"url": "x"}}, {"type": "text"}, 3, None]
)
def test_other_parts_are_refused(part: Any) -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "What?"}, part]}, CHAT[1]]
    assert refused({"messages": turns}).field == "messages[0].content[1]"


# ── the property ─────────────────────────────────────────────────────────────────────────────────────────────────

MARK = "inserted somewhere"


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a row where a text stands or a key could be added."""
    if isinstance(value, dict):
        return [(*path, "+"), *(place for key, item in value.items() for place in places(item, (*path, key)))]
    if isinstance(value, list):
        return [place for i, item in enumerate(value) for place in places(item, (*path, i))]
    return [path] if isinstance(value, str) else []


def inserted(row: dict[str, Any], place: tuple[Any, ...], key: str) -> dict[str, Any]:
    changed = deepcopy(row)
    *way, last = place
    target: Any = changed
    for step in way:
        target = target[step]
    if last == "+":
        target[key] = MARK
    else:
        target[last] = f"{target[last]} {MARK}"
    return changed


KEYS = st.sampled_from(
    "topic system history context input tools functions images label text role train weight name function_call "
    "tool_calls content value from reasoning_content refusal chosen messages conversations prompt question".split()
)


@settings(max_examples=400, deadline=None)
@given(data=st.data(), shape=st.sampled_from(sorted(ROWS)), key=KEYS)
def test_a_text_anywhere_is_read_or_named_or_the_row_refused(data: st.DataObject, shape: str, key: str) -> None:
    row = data.draw(st.sampled_from(ROWS[shape]))
    place = data.draw(st.sampled_from(places(row)))
    changed = inserted(row, place, key)
    try:
        reading = read([*ROWS[shape], changed])
    except (DataError, ConfigError):
        return
    *_, record = reading
    if isinstance(record, list):
        return
    if isinstance(record, Document):
        read_texts = record.text
    else:
        messages = getattr(record, "messages", None) or (*record.prompt, *record.chosen, *(record.rejected or ()))
        whole = [message.to_template() for message in messages], getattr(record, "tools", None)
        read_texts = json.dumps(whole, ensure_ascii=False)
    names = (*record.unused, *record.extra_keys)
    told = place[-1] if place[-1] != "+" else key
    assert MARK in read_texts or any(str(told) in name or str(place[0]) in name for name in names), (place, key, names)


# ── where it is said ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_check_plan_train_and_the_report_name_what_is_not_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"{n}.", "topic": "sums", "author": "me"} for n in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = ("--model", "builtin:tiny", "--set", "data.ignore_columns=author")
    for command in (("check",), ("check", *model), ("plan", *model)):
        assert main([command[0], str(file), *command[1:]]) == 0
        said = capsys.readouterr()
        assert "topic" in said.out + said.err
        assert ("author" in said.out + said.err) == (command == ("check",))
    run = tmp_path / "run"
    assert main(["train", str(file), *model, "--max-steps", "1", "--set", "probe=false", "--output", str(run)]) == 0
    assert "data: not used: topic\n" in capsys.readouterr().err
    assert json.loads((run / "data_report.json").read_text())["unused_columns"] == ["topic"]
    assert "Not used: topic." in (run / "report.html").read_text(encoding="utf-8")
