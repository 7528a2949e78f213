"""The closed registry of data formats: how each is recognised, and how a row of it becomes a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llmtune.data.records import Conversation, Document, Message, PreferencePair, Problem, Record, SourceRow
from llmtune.errors import nearest

ROLES = ("system", "developer", "user", "assistant", "tool")
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
# What people write for a role, where spelling alone would not find the name that was meant.
_ROLE_MEANT = {
    "bot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
    "agent": "assistant",
    "human": "user",
    "customer": "user",
    "prompter": "user",
    "function": "tool",
    "observation": "tool",
    "instruction": "system",
}


class RowReporter:
    """Collects the problems of one row while it is converted."""

    def __init__(self, row: SourceRow) -> None:
        self.row = row
        self.problems: list[Problem] = []

    def add(self, field: str | None, problem: str, hint: str) -> None:
        """Report one problem of this row."""
        self.problems.append(Problem(file=self.row.file, line=self.row.line, field=field, problem=problem, hint=hint))

    def text(self, values: Mapping[str, Any], key: str, *, path: str = "", blank: bool = False) -> str | None:
        """The string at ``key``; a missing, null, wrong or (unless ``blank``) empty value is reported."""
        field = path + key
        if key not in values:
            self.add(field, f"the field '{key}' is missing", f"add '{key}'")
            return None
        value = values[key]
        if value is None:
            self.add(field, f"the field '{key}' is null", "give a text, or remove the row")
        elif not isinstance(value, str):
            self.add(field, f"the field '{key}' is {kind_of(value)}, expected a text", "write it as a text")
        elif not blank and not value.strip():
            self.add(field, f"the field '{key}' is empty", "give a text, or remove the row")
        else:
            return value
        return None


Converter = Callable[[Mapping[str, Any], RowReporter], Record | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One shape of rows. ``required`` fields recognise it, ``optional`` ones are read too."""

    name: str
    title: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    trainable: bool = True
    converter: Converter

    def detect(self, row: Mapping[str, Any]) -> str | None:
        """Why ``row`` has this format, or None. A null field counts as absent: tables have it in every row."""
        if any(row.get(field) is None for field in self.required):
            return None
        if self.name == "kto" and not isinstance(row["label"], bool):
            return None
        return f"the rows have {' and '.join(map(repr, self.required))}"

    def convert(self, row: SourceRow) -> Record | list[Problem]:
        """The record of ``row``, or everything that is wrong with it."""
        report = RowReporter(row)
        record = self.converter(row.value, report)
        if report.problems or record is None:
            return report.problems
        return record


def kind_of(value: object) -> str:
    """A value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    kinds = {str: "a text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"a {type(value).__name__}")


def _messages(values: Any, report: RowReporter, field: str, *, end: str = "assistant") -> tuple[Message, ...] | None:
    """Validated messages; ``end`` is the role of the last one (``assistant`` or ``prompt``: anything else)."""
    if not isinstance(values, Sequence) or isinstance(values, str):
        report.add(field, f"the field '{field}' is {kind_of(values)}, expected a list of messages", "write a list")
        return None
    if not values:
        report.add(field, f"the field '{field}' holds no messages", "add messages, or remove the row")
        return None
    before = len(report.problems)
    messages = [_message(value, report, f"{field}[{i}]") for i, value in enumerate(values)]
    if len(report.problems) > before:
        return None
    checked = tuple(message for message in messages if message is not None)
    last = checked[-1].role
    if end == "assistant" and last != "assistant":
        report.add(
            f"{field}[{len(checked) - 1}].role",
            f"the last message has role '{last}'; a training example must end with 'assistant'",
            "add the answer, or remove the last message",
        )
        return None
    if end == "assistant" and not any(message.supervised for message in checked if message.role == "assistant"):
        report.add(field, "every assistant turn has weight 0, nothing would be learned", "remove the row")
        return None
    return checked


def _message(value: Any, report: RowReporter, path: str) -> Message | None:
    if not isinstance(value, Mapping):
        report.add(
            path, f"the message is {kind_of(value)}, expected an object with role and content", "write an object"
        )
        return None
    role = _role(value, report, path)
    calls = _objects(value.get("tool_calls"), report, f"{path}.tool_calls")
    content: str | None = ""
    if calls is None or value.get("content") is not None:
        # A user may say nothing (a model continues freely); an assistant that says nothing teaches nothing.
        blank = bool(calls) or role != "assistant"
        content = report.text(value, "content", path=f"{path}.", blank=blank)
    weight = value.get("weight")
    if weight not in (None, 0, 1):
        report.add(f"{path}.weight", f"the weight is {weight!r}, expected 0 or 1", "write 0 to read it, 1 to learn it")
    if role is None or content is None:
        return None
    known = ("role", "content", "tool_calls", "name", "weight")
    extra = {key: item for key, item in value.items() if key not in known and item is not None}
    name = value.get("name")
    return Message(role=role, content=content, tool_calls=calls, name=name, extra=extra or None, supervised=weight != 0)


def _role(value: Mapping[str, Any], report: RowReporter, path: str) -> str | None:
    if "role" not in value and "from" in value:
        report.add(
            f"{path}.role",
            "the message has 'from' and 'value', expected 'role' and 'content'",
            "this is ShareGPT: --set data.format=sharegpt --set data.columns.conversations=FIELD",
        )
        return None
    role = report.text(value, "role", path=f"{path}.")
    if role is not None and role not in ROLES:
        report.add(f"{path}.role", f"unknown role {role!r}{role_hint(role, ROLES)}", f"use {', '.join(ROLES)}")
        return None
    return role


def role_hint(role: str, known: Sequence[str]) -> str:
    """``" — did you mean 'assistant'?"`` where a role was probably meant."""
    lowered = role.strip().lower()
    match = lowered if lowered in known else _ROLE_MEANT.get(lowered)
    match = match if match in known else nearest(lowered, known)
    return f" — did you mean '{match}'?" if match else ""


def _objects(value: Any, report: RowReporter, field: str) -> tuple[Mapping[str, Any], ...] | None:
    """A list of objects (tools, tool calls); null and empty are the same as absent."""
    if value is None or (isinstance(value, Sequence) and not value):
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, Mapping) for v in value):
        report.add(field, f"expected a list of objects, got {kind_of(value)}", "write a list of objects")
        return None
    return tuple(value)


def _chat(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    if row.get("messages") is None:
        report.text(row, "messages")
        return None
    messages = _messages(row["messages"], report, "messages")
    tools = _objects(row.get("tools"), report, "tools")
    return _conversation(messages, report, tools)


def _conversation(
    messages: Sequence[Message] | None, report: RowReporter, tools: tuple[Mapping[str, Any], ...] | None = None
) -> Conversation | None:
    if messages is None:
        return None
    return Conversation(messages=tuple(messages), tools=tools, file=report.row.file, line=report.row.line)


def _sharegpt(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    turns = row.get("conversations")
    if turns is None:
        report.text(row, "conversations")
        return None
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        report.add("conversations", f"expected a list of turns, got {kind_of(turns)}", "write a list")
        return None
    converted: list[Any] = []
    if row.get("system") is not None:
        system = report.text(row, "system", blank=True)
        if system:
            converted.append({"role": "system", "content": system})
    for i, turn in enumerate(turns):
        converted.append(_sharegpt_turn(turn, report, f"conversations[{i}]"))
    if report.problems:
        return None
    messages = _messages(converted, report, "conversations")
    return _conversation(messages, report, _objects(_parsed(row.get("tools")), report, "tools"))


def _sharegpt_turn(turn: Any, report: RowReporter, path: str) -> dict[str, Any] | None:
    if not isinstance(turn, Mapping):
        report.add(path, f"the turn is {kind_of(turn)}, expected an object with from and value", "write an object")
        return None
    if "from" not in turn and "role" in turn:
        report.add(
            f"{path}.from",
            "the turn has 'role', expected 'from' and 'value'",
            "these are chat messages: --set data.columns.messages=conversations",
        )
        return None
    speaker = report.text(turn, "from", path=f"{path}.")
    if speaker is None:
        return None
    role = _SHAREGPT_ROLES.get(speaker)
    if role is None:
        hint = role_hint(speaker, tuple(_SHAREGPT_ROLES))
        report.add(
            f"{path}.from", f"unknown speaker {speaker!r}{hint}", "use system, human, gpt, function_call or observation"
        )
        return None
    value = report.text(turn, "value", path=f"{path}.", blank=role != "assistant")
    if value is None:
        return None
    if speaker == "function_call":
        call = _parsed(value)
        if not isinstance(call, (dict, list)):
            report.add(f"{path}.value", "the function call is not valid JSON", 'write {"name": …, "arguments": …}')
            return None
        calls = call if isinstance(call, list) else [call]
        return {"role": role, "tool_calls": [{"type": "function", "function": item} for item in calls]}
    return {"role": role, "content": value}


def _parsed(value: Any) -> Any:
    """The JSON inside a text, where there is any; ShareGPT writes tools and calls as text."""
    import orjson

    if not isinstance(value, str):
        return value
    try:
        return orjson.loads(value) if value.strip() else None
    except orjson.JSONDecodeError:
        return value


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


def _side(row: Mapping[str, Any], key: str, report: RowReporter) -> tuple[Message, ...] | None:
    """A prompt or an answer that is a text or a list of messages."""
    value = row.get(key)
    role = "user" if key == "prompt" else "assistant"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _messages(value, report, key, end="any" if key == "prompt" else "assistant")
    text = report.text(row, key)
    return None if text is None else (Message(role=role, content=text),)


def _prompt_completion(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt, completion = _side(row, "prompt", report), _side(row, "completion", report)
    if prompt is None or completion is None:
        return None
    given = tuple(replace(each, supervised=False) if each.role == "assistant" else each for each in prompt)
    return _conversation((*given, *completion), report)


def _preference(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt: tuple[Message, ...] | None = ()
    if row.get("prompt") is not None:
        prompt = _side(row, "prompt", report)
    chosen, rejected = _side(row, "chosen", report), _side(row, "rejected", report)
    if prompt is None or chosen is None or rejected is None:
        return None
    return PreferencePair(prompt=prompt, chosen=chosen, rejected=rejected, file=report.row.file, line=report.row.line)


def _kto(row: Mapping[str, Any], report: RowReporter) -> Record | None:
    prompt, completion = _side(row, "prompt", report), _side(row, "completion", report)
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
    Format(name="chat", title="chat", required=("messages",), optional=("tools",), converter=_chat),
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
