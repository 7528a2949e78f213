"""The closed registry of data formats: how each is recognised, and how a row of it becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtune.data.messages import (
    RowReporter,
    Turn,
    answered,
    check_order,
    collected,
    is_list,
    kind_of,
    objects,
    parsed_json,
    plain_chat,
    read_messages,
    role_hint,
    tool_calls,
)
from llmtune.data.records import Conversation, Document, Message, PreferencePair, Problem, Record, SourceRow

_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}

Converter = Callable[[Mapping[str, Any], RowReporter], Record | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of rows. ``required`` fields recognise it, ``optional`` ones are read too.

    ``plain``: the fast way for a row without anything odd; None from it means that ``converter`` must look.
    """

    name: str
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    trainable: bool = True
    converter: Converter
    plain: Callable[[SourceRow], Record | None] | None = None

    def has_fields(self, row: Mapping[str, Any]) -> bool:
        """Whether ``row`` has what is required. A null field counts as absent: tables have it in every row."""
        return all(row.get(field) is not None for field in self.required)

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """Why ``row`` has this format, or None."""
        if not self.has_fields(row) or (self.name == "kto" and not isinstance(row["label"], bool)):
            return None
        return f"the rows have {' and '.join(map(repr, self.required))}"

    def convert(self, row: SourceRow, texts: frozenset[str] = frozenset()) -> Record | list[Problem]:
        """The record of ``row``, or everything that is wrong with it. ``texts``: see `RowReporter`."""
        if self.plain is not None:
            record: Record | None = self.plain(row)
            if record is not None:
                return record
        report = RowReporter(row, texts)
        record = self.converter(row.value, report)
        if report.problems or record is None:
            return report.problems
        return record


def _chat(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    if row.get("messages") is None:
        report.text(row, "messages")
        return None
    turns = read_messages(row["messages"], report, "messages")
    tools = objects(parsed_json(row.get("tools")), report, "tools")
    return None if turns is None else _conversation(answered(turns, report, "messages"), report, tools)


def _conversation(
    messages: Sequence[Message] | None, report: RowReporter, tools: tuple[Mapping[str, Any], ...] | None = None
) -> Conversation | None:
    if messages is None:
        return None
    return Conversation(messages=tuple(messages), tools=tools, file=report.row.file, line=report.row.line)


def _sharegpt(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    listed = row.get("conversations")
    if listed is None:
        report.text(row, "conversations")
        return None
    if not is_list(listed):
        report.add("conversations", f"expected a list of turns, got {kind_of(listed)}", "write a list")
        return None
    if not listed:
        report.add("conversations", "the field 'conversations' holds no turns", "add turns, or remove the row")
    turns: list[Turn] = []
    if row.get("system") is not None:
        system = report.text(row, "system", blank=True)
        if system:
            turns.append(Turn(role="system", field="system", message=Message(role="system", content=system)))
    turns += [_sharegpt_turn(turn, report, f"conversations[{i}]") for i, turn in enumerate(listed)]
    tools = objects(parsed_json(row.get("tools")), report, "tools")
    return _conversation(answered(turns, report, "conversations"), report, tools) if listed else None


def _sharegpt_turn(turn: Any, report: RowReporter, path: str) -> Turn:
    bad = Turn(role=None, field=f"{path}.from", message=None)
    if not isinstance(turn, Mapping):
        report.add(path, f"the turn is {kind_of(turn)}, expected an object with from and value", "write an object")
        return bad
    if "from" not in turn and "role" in turn:
        report.add(
            f"{path}.from",
            "the turn has 'role', expected 'from' and 'value'",
            "these are chat messages: --set data.columns.messages=conversations",
        )
        return bad
    speaker = report.text(turn, "from", path=f"{path}.")
    role = _SHAREGPT_ROLES.get(speaker) if speaker is not None else None
    if speaker is not None and role is None:
        hint = role_hint(speaker, tuple(_SHAREGPT_ROLES))
        report.add(
            f"{path}.from", f"unknown role {speaker!r}{hint}", "use system, human, gpt, function_call or observation"
        )
    value = report.text(turn, "value", path=f"{path}.", blank=role != "assistant")
    if role is None or value is None:
        return Turn(role=role, field=f"{path}.from", message=None)
    message: Message | None = Message(role=role, content=value)
    if speaker == "function_call":
        message = _function_call(value, report, f"{path}.value")
    return Turn(role=role, field=f"{path}.from", message=message)


def _function_call(value: str, report: RowReporter, field: str) -> Message | None:
    call = parsed_json(value)
    if not isinstance(call, (dict, list)):
        report.add(field, "the function call is not valid JSON", 'write {"name": …, "arguments": …}')
        return None
    before = len(report.problems)
    listed = [{"type": "function", "function": item} for item in (call if isinstance(call, list) else [call])]
    calls = tool_calls(listed, report, field)
    return Message(role="assistant", content="", tool_calls=calls) if len(report.problems) == before else None


def _alpaca(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    instruction = report.text(row, "instruction")
    output = report.text(row, "output")
    extra = {key: report.text(row, key, blank=True) for key in ("input", "system") if row.get(key) is not None}
    turns: list[Message] = []
    if extra.get("system"):
        turns.append(Message(role="system", content=extra["system"] or ""))
    turns += _history(row.get("history"), report)
    if instruction is None or output is None:
        return None
    prompt = f"{instruction}\n{extra['input']}" if (extra.get("input") or "").strip() else instruction
    return _conversation((*turns, *_exchange(prompt, output)), report)


def _history(history: Any, report: RowReporter) -> list[Message]:
    turns: list[Message] = []
    if history is None:
        return turns
    pairs = history if isinstance(history, Sequence) and not isinstance(history, str) else [history]
    for i, pair in enumerate(pairs):
        if (
            not isinstance(pair, Sequence)
            or isinstance(pair, str)
            or len(pair) != 2
            or not all(isinstance(text, str) and text.strip() for text in pair)
        ):
            report.add(f"history[{i}]", "expected a pair of texts [question, answer]", "write two texts per turn")
            continue
        turns += _exchange(pair[0], pair[1])
    return turns


def _exchange(question: str, answer: str) -> tuple[Message, Message]:
    return Message(role="user", content=question), Message(role="assistant", content=answer)


def _pair(question: str, answer: str) -> Converter:
    def convert(row: Mapping[str, Any], report: RowReporter) -> Record | None:
        asked, answered = report.text(row, question), report.text(row, answer)
        if asked is None or answered is None:
            return None
        return _conversation(_exchange(asked, answered), report)

    return convert


def _side(row: Mapping[str, Any], key: str, report: RowReporter) -> list[Turn] | None:
    """A prompt or an answer that is a text or a list of messages."""
    value = row.get(key)
    role = "user" if key == "prompt" else "assistant"
    if not is_list(value):
        text = report.text(row, key)
        message = None if text is None else Message(role=role, content=text)
        return [Turn(role=role, field=key, message=message)]
    return read_messages(value, report, key)


def _prompt(row: Mapping[str, Any], report: RowReporter) -> tuple[tuple[Message, ...] | None, Turn | None]:
    """The given messages, when all are good, and the last turn."""
    turns = _side(row, "prompt", report)
    if not turns:
        return None, None
    check_order(turns, report)
    return collected(turns), turns[-1]


def _answer(
    row: Mapping[str, Any], key: str, report: RowReporter, before: Turn | None = None
) -> tuple[Message, ...] | None:
    turns = _side(row, key, report)
    return None if turns is None else answered(turns, report, key, before=before)


def _prompt_completion(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt, last = _prompt(row, report)
    completion = _answer(row, "completion", report, last)
    if prompt is None or completion is None:
        return None
    given = tuple(replace(each, supervised=False) if each.role == "assistant" else each for each in prompt)
    return _conversation((*given, *completion), report)


def _preference(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt = _prompt(row, report)[0] if row.get("prompt") is not None else ()
    # Many data sets repeat the prompt at the beginning of both answers, so these begin as they like.
    chosen, rejected = _answer(row, "chosen", report), _answer(row, "rejected", report)
    if prompt is None or chosen is None or rejected is None:
        return None
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, file=report.row.file, line=report.row.line)


def _kto(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt, last = _prompt(row, report)
    completion = _answer(row, "completion", report, last)
    label = row.get("label")
    if not isinstance(label, bool):
        report.add("label", f"the label is {kind_of(label)}, expected true or false", "write true or false")
        return None
    if prompt is None or completion is None:
        return None
    return PreferencePair(prompt=prompt, chosen=completion, label=label, file=report.row.file, line=report.row.line)


def _text(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    text = report.text(row, "text")
    return None if text is None else Document(text=text, file=report.row.file, line=report.row.line)


FORMATS: tuple[Format, ...] = (
    Format(name="chat", title="chat", required=("messages",), optional=("tools",), converter=_chat, plain=plain_chat),
    Format(
        name="sharegpt",
        title="ShareGPT",
        required=("conversations",),
        optional=("system", "tools"),
        converter=_sharegpt,
    ),
    Format(
        name="alpaca",
        title="Alpaca",
        required=("instruction", "output"),
        optional=("input", "system", "history"),
        converter=_alpaca,
    ),
    Format(
        name="kto",
        title="KTO",
        required=("prompt", "completion", "label"),
        trainable=False,
        converter=_kto,
    ),
    Format(
        name="prompt_completion",
        title="prompt/completion",
        required=("prompt", "completion"),
        converter=_prompt_completion,
    ),
    *(
        Format(
            name="question_answer",
            title=f"question/answer ({question}/{answer})",
            required=(question, answer),
            converter=_pair(question, answer),
        )
        for question, answer in (("question", "answer"), ("query", "response"), ("input", "output"))
    ),
    Format(
        name="preference",
        title="preference",
        required=("chosen", "rejected"),
        optional=("prompt",),
        trainable=False,
        converter=_preference,
    ),
    Format(name="text", title="plain text", required=("text",), converter=_text),
)
FORMAT_NAMES = tuple(dict.fromkeys(each.name for each in FORMATS))


def candidates(row: Mapping[str, Any], among: Sequence[Format] = FORMATS) -> tuple[Format, ...]:
    """The formats that ``row`` may have; one that another reads completely and more is not listed."""
    found = [each for each in among if each.detect(row) is not None]
    return tuple(
        each
        for each in found
        if not any(other is not each and set(each.required) < {*other.required, *other.optional} for other in found)
    )
