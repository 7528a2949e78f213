"""Rows to records: one converter for each shape of rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from llmtune.data.messages import Turn, answered, check_order, collected, read_messages
from llmtune.data.records import Conversation, Document, Message, PreferencePair, Record
from llmtune.data.reporter import RowReporter, is_blank, is_list, kind_of, parsed_cell
from llmtune.data.tools import offered_tools

Row = Mapping[str, Any]
Converter = Callable[[Row, RowReporter], Record | None]

# Ways in which a verdict on an answer is written, in lower case.
_VERDICTS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}


def listed(field: str) -> Converter:
    """Return the converter of rows whose turns are listed in ``field``."""

    def convert(row: Row, report: RowReporter) -> Record | None:
        turns = _after_surroundings(row, _listed_turns(row, field, report), report)
        tools = offered_tools(row, report)
        messages = None if turns is None else answered(turns, report, field)
        if messages is None:
            return None
        return Conversation(messages=messages, tools=tools, file=report.row.file, line=report.row.line)

    return convert


def alpaca(row: Row, report: RowReporter) -> Record | None:
    """Convert ``instruction``, optional ``input`` or ``context``, and ``output``."""
    prompt = report.text(row, "instruction")
    given = [report.text(row, field) for field in ("input", "context") if not is_blank(row.get(field))]
    if len(given) > 1:
        report.add("context", "the row has 'input' and 'context'", "join them in 'input'")
    if prompt is not None and given:
        prompt = f"{prompt}\n{given[0]}"
    return _exchange_of(row, report, prompt, "output")


def pair(question: str, answer: str) -> Converter:
    """Return the converter of rows that are a question and its answer, two texts.

    A ``context`` stands before the question, an ``input`` after it, as Alpaca has it.
    """

    def convert(row: Row, report: RowReporter) -> Record | None:
        return _exchange_of(row, report, _with_surroundings(row, report.text(row, question), question, report), answer)

    return convert


def prompt_completion(row: Row, report: RowReporter) -> Record | None:
    """Convert ``prompt`` and ``completion``, texts or lists of messages. Answers in the prompt are not learned."""
    prompt, last = _prompt(row, report)
    completion = _answer(row, "completion", report, last)
    tools = offered_tools(row, report)
    if prompt is None or completion is None:
        return None
    given = tuple(replace(each, supervised=False) if each.role == "assistant" else each for each in prompt)
    return Conversation(messages=(*given, *completion), tools=tools, file=report.row.file, line=report.row.line)


def preference(row: Row, report: RowReporter) -> Record | None:
    """Convert two answers to one prompt: ``chosen`` and ``rejected``."""
    # Many data sets repeat the prompt at the beginning of both answers, so these begin as they like.
    prompt = _prompt(row, report)[0]
    chosen, rejected = _answer(row, "chosen", report), _answer(row, "rejected", report)
    return _judged(report, prompt, chosen, rejected=rejected) if rejected is not None else None


def whole_preference(chosen: str, rejected: str) -> Converter:
    """Return the converter of rows with two whole conversations, a better and a worse one."""

    def convert(row: Row, report: RowReporter) -> Record | None:
        return _judged(report, (), _answer(row, chosen, report), rejected=_answer(row, rejected, report))

    return convert


def rejected_reply(rejected: str) -> Converter:
    """Return the converter of rows with ``messages`` and, in ``rejected``, a worse last answer or conversation."""

    def convert(row: Row, report: RowReporter) -> Record | None:
        turns = _listed_turns(row, "messages", report)
        chosen = None if turns is None else answered(turns, report, "messages")
        return _judged(report, (), chosen, rejected=_answer(row, rejected, report))

    return convert


def kto(row: Row, report: RowReporter) -> Record | None:
    """Convert one answer and the verdict on it: ``prompt``, ``completion`` and ``label``."""
    prompt, last = _prompt(row, report)
    completion = _answer(row, "completion", report, last)
    return _judged(report, prompt, completion, label=_label(row, report))


def listed_kto(field: str) -> Converter:
    """Return the converter of rows with a conversation in ``field`` and the verdict on its last answer."""

    def convert(row: Row, report: RowReporter) -> Record | None:
        turns = _listed_turns(row, field, report)
        turns = _after_surroundings(row, turns, report)
        messages = None if turns is None else answered(turns, report, field)
        label = _label(row, report)
        return None if messages is None else _judged(report, messages[:-1], messages[-1:], label=label)

    return convert


def text(row: Row, report: RowReporter) -> Record | None:
    """Convert a document. A message of a conversation tree is none."""
    tree = [field for field in ("role", "replies", "parent_id") if not is_blank(row.get(field))]
    if tree:
        report.add(
            tree[0],
            f"the row is a message of a conversation tree (it has {', '.join(map(repr, tree))}), not a document",
            "write each path through the tree as messages, or learn the texts alone with "
            f"--set data.ignore_columns={','.join(tree)}",
        )
    found = report.text(row, "text")
    return None if found is None else Document(text=found, file=report.row.file, line=report.row.line)


def verdict(value: object) -> bool | None:
    """Return the verdict that ``value`` is: true, false, 1 or 0, also as text; None where it is none."""
    if isinstance(value, (bool, int, float, str)):
        return _VERDICTS.get(str(value).strip().lower())
    return None


def _exchange_of(row: Row, report: RowReporter, prompt: str | None, answer: str) -> Record | None:
    """Return a conversation of one question and its answer, after what stands before it."""
    reply = report.text(row, answer)
    before = _after_surroundings(row, [], report) or []
    tools = offered_tools(row, report)
    if prompt is None or reply is None:
        return None
    messages = [turn.message for turn in before if turn.message is not None]
    messages += [Message(role="user", content=prompt), Message(role="assistant", content=reply)]
    return Conversation(messages=tuple(messages), tools=tools, file=report.row.file, line=report.row.line)


def _with_surroundings(row: Row, prompt: str | None, field: str, report: RowReporter) -> str | None:
    """Return a prompt with the ``context`` of its row before it and the ``input`` after it."""
    context = None if is_blank(row.get("context")) else report.text(row, "context")
    given = None if field == "input" or is_blank(row.get("input")) else report.text(row, "input")
    if prompt is None:
        return None
    prompt = prompt if context is None else f"{context}\n\n{prompt}"
    return prompt if given is None else f"{prompt}\n{given}"


def _judged(
    report: RowReporter,
    prompt: tuple[Message, ...] | None,
    chosen: tuple[Message, ...] | None,
    *,
    rejected: tuple[Message, ...] | None = None,
    label: bool | None = None,
) -> Record | None:
    if prompt is None or chosen is None:
        return None
    place = {"file": report.row.file, "line": report.row.line}
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, label=label, **place)  # type: ignore[arg-type]


def _label(row: Row, report: RowReporter) -> bool | None:
    label = verdict(row.get("label"))
    if label is None:
        report.add("label", f"the label is {kind_of(row.get('label'))}, expected true or false", "write true or false")
    return label


def _listed_turns(row: Row, field: str, report: RowReporter) -> list[Turn] | None:
    if row.get(field) is None:
        report.text(row, field)
        return None
    return read_messages(row[field], report, field)


def _after_surroundings(row: Row, turns: list[Turn] | None, report: RowReporter) -> list[Turn] | None:
    """Return the turns of a row after its ``system`` prompt and its ``history``."""
    before: list[Turn] = []
    if not is_blank(row.get("system")):
        system = report.text(row, "system")
        message = None if system is None else Message(role="system", content=system)
        before.append(Turn(role="system", field="system", message=message))
    history = [] if row.get("history") is None else _history(parsed_cell(row["history"]), report)
    if turns is None or not (before or history):
        return turns
    first = next((i for i, turn in enumerate(turns) if turn.role not in ("system", "developer")), len(turns))
    leading = [turn for turn in turns[:first] if not before or turn.message != before[0].message]
    return [*before, *leading, *history, *turns[first:]]


def _history(history: Any, report: RowReporter) -> list[Turn]:
    if is_blank(history):
        return []
    pairs = history if is_list(history) else [history]
    if all(isinstance(each, Mapping) for each in pairs):
        return read_messages(pairs, report, "history") or []
    turns: list[Turn] = []
    for i, each in enumerate(pairs):
        if not is_list(each) or len(each) != 2 or any(not isinstance(text, str) or is_blank(text) for text in each):
            report.add(f"history[{i}]", "expected a pair of texts [question, answer]", "write two texts per turn")
            continue
        for role, content in zip(("user", "assistant"), each, strict=True):
            if report.row.clean or report.undamaged(content, f"history[{i}]"):
                message = Message(role=role, content=content)
                turns.append(Turn(role=role, field=f"history[{i}]", message=message))
    return turns


def _side(row: Row, key: str, report: RowReporter) -> list[Turn] | None:
    """Return a prompt or an answer that is a text, a message or a list of messages."""
    value = row.get(key)
    role = "user" if key == "prompt" else "assistant"
    if isinstance(value, str) and value.lstrip().startswith(("[{", "{")):
        value = cell if _is_message(cell := parsed_cell(value)) else value
    if isinstance(value, Mapping):
        value = [value]
    if is_list(value):
        for field in ("context", "input") if key == "prompt" else ():
            if not is_blank(row.get(field)):
                report.add(field, f"the row has '{field}' beside a prompt of messages", "put it into a message")
        return read_messages(value, report, key)
    found = report.text(row, key)
    if key == "prompt":
        found = _with_surroundings(row, found, key, report)
    message = None if found is None else Message(role=role, content=found)
    return [Turn(role=role, field=key, message=message)]


def _is_message(cell: Any) -> bool:
    """Return whether what a text cell holds is a message or a list of messages, and not merely JSON."""
    each = cell if isinstance(cell, list) else [cell]
    keys = ({"role", "content"}, {"from", "value"})
    return bool(each) and all(isinstance(one, Mapping) and any(key <= one.keys() for key in keys) for one in each)


def _prompt(row: Row, report: RowReporter) -> tuple[tuple[Message, ...] | None, Turn | None]:
    """Return the given messages, when all are good, and the last turn: a prompt, and what stands before it."""
    field = next((field for field in ("prompt", "messages", "conversations") if row.get(field) is not None), None)
    if field is None and "prompt" not in row:
        return (), None
    if field in ("prompt", None):
        turns = _side(row, "prompt", report)
        report.unused.update({other: None for other in ("messages", "conversations") if not is_blank(row.get(other))})
    else:
        turns = _listed_turns(row, field, report)
    turns = _after_surroundings(row, turns, report)
    if not turns:
        return None, None
    check_order(turns, report)
    return collected(turns), turns[-1]


def _answer(row: Row, key: str, report: RowReporter, before: Turn | None = None) -> tuple[Message, ...] | None:
    turns = _side(row, key, report)
    return None if turns is None else answered(turns, report, key, before=before)
