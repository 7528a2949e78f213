"""JSON objects read strictly: valid UTF-8, no key twice, nothing cut off, every refusal with its real reason."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import orjson

from llmtune.data.records import Problem, SourceRow
from llmtune.units import format_bytes

# 16 MiB of text are about four million tokens, more than any context holds; a longer row is damage or not a row.
MAX_ROW_BYTES = 16 << 20
# Where orjson stops; a training example needs a handful of levels.
_MAX_DEPTH = 1024
_NESTS = frozenset((dict, list))
_CHUNK_BYTES = 1 << 20
_KEY = re.compile(rb'"[ \t\r\n]*:')
_STRUCTURE = re.compile(rb'["\[\]{},]')
_STRING_BODY = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)
_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_TOKEN = re.compile(_STRING + rb"|[\[\]{}:,]", re.DOTALL)
_CONSTANT = re.compile(_STRING.decode() + r"|-?Infinity|NaN", re.DOTALL)
# Control characters stand in JSON only escaped, apart from DEL. Tab, line feed and carriage return (\u0009, \u000a,
# \u000d) are let through by the exact test of the texts; this one only has to miss none.
_ESCAPED_CONTROL = re.compile(rb"\\(?:u00[017]|[bf])")
_INNER_SURROGATE = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
# Pairs of surrogates, single ones (group 1), and the other escapes.
_ESCAPE = re.compile(r"\\(?:u(?:d[89ab]..\\ud[c-f]..|(d[89a-f]..)|....)|[^u])", re.IGNORECASE)


def parse_object(raw: bytes, file: str, line: int) -> SourceRow | Problem:
    """One JSON object, strictly: valid UTF-8, no duplicate keys, nothing cut off."""
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        value = _second_opinion(raw.rstrip(b"\r\n"), file, line)
        if isinstance(value, Problem):
            return value
    if type(value) is not dict:
        return _problem(
            file, line, f"the row is {_json_kind(value)}, expected an object", 'write {"field": value, …}, one per row'
        )
    # Every key ends with a quote and a colon, and texts can only add to such pairs: equal counts prove that no key
    # was lost to a duplicate.
    if len(_KEY.findall(raw)) != _num_keys(value):
        duplicate = _duplicate_key(raw)
        if duplicate is not None:
            return _problem(
                file, line, f"the key '{duplicate}' occurs twice", "remove or rename one of the two", duplicate
            )
    clean = b"\x7f" not in raw and (b"\\" not in raw or _ESCAPED_CONTROL.search(raw) is None)
    return SourceRow(file=file, line=line, value=value, raw=raw, clean=clean)


def too_large(file: str, line: int, span: tuple[int, int]) -> Problem:
    """The `Problem` of a row that is larger than `MAX_ROW_BYTES`."""
    size, most = format_bytes(span[1] - span[0]), format_bytes(MAX_ROW_BYTES)
    return Problem(
        file=file,
        line=line,
        field=None,
        problem=f"the row has {size}, more than the {most} that a row may have",
        hint="split the text into several rows; a file whose line ends are lost must be written again",
        span=span,
    )


def read_array(file: BinaryIO, name: str) -> Iterator[SourceRow | Problem]:
    """The elements of a JSON array, from where ``file`` stands; ``line`` is the number of the element."""
    for number, (start, element, end) in enumerate(_array_elements(file), start=1):
        if isinstance(element, bytes):
            row = parse_object(element, name, number)
            yield row if isinstance(row, SourceRow) else replace(row, span=(start, end))
        elif element == "too large":
            yield too_large(name, number, (start, end))
        else:
            problem = _problem(name, number, element, "the file is damaged; write it again")
            yield replace(problem, span=(start, end))


def _array_elements(file: BinaryIO) -> Iterator[tuple[int, bytes | str, int]]:
    """Each element between its first and last byte, found by counting brackets; or what is wrong with it, in words."""
    base = file.tell()  # where the buffer begins in the file
    buffer, pos, start, depth, dropped, in_string = b"", 0, 0, 0, 0, False
    while True:
        match = None
        if in_string:
            pos = _end_of(_STRING_BODY.match(buffer, pos))
            if pos < len(buffer) and buffer[pos] == 0x22:
                in_string, pos = False, pos + 1
        if not in_string:
            match = _STRUCTURE.search(buffer, pos)
            pos = len(buffer) if match is None else match.end()
        if match is None:
            if dropped or pos - start > MAX_ROW_BYTES:  # counted, no longer held
                dropped, start = dropped + pos - start, pos
            block = file.read(_CHUNK_BYTES)
            if not block:
                yield base + start - dropped, "the array is cut off", base + len(buffer)
                return
            base += start
            buffer, pos, start = buffer[start:] + block, pos - start, 0
            continue
        mark = match[0]
        if mark == b'"':
            in_string = True
        elif mark in b"[{":
            depth += 1
            if depth == 1:
                start, dropped = pos, 0
        elif depth > 1:
            depth -= mark != b","
        else:
            size = dropped + pos - 1 - start
            element = b"" if dropped else buffer[start : pos - 1]
            if size > MAX_ROW_BYTES or mark == b"," or element.strip():
                yield base + pos - 1 - size, "too large" if size > MAX_ROW_BYTES else element, base + pos - 1
            start, dropped = pos, 0
            if mark != b",":
                break
    rest = buffer[pos:]
    while rest and not rest.strip():
        base, pos, rest = base + pos + len(rest), 0, file.read(_CHUNK_BYTES)
    if rest:
        yield base + pos, "there is text after the end of the array", file.seek(0, 2)


def _end_of(match: re.Match[bytes] | None) -> int:
    assert match is not None, "the body of a string may be empty, so it always matches"
    return match.end()


def _num_keys(value: dict[str, Any]) -> int:
    """How many keys an object and all below it have; quick for lists of flat objects, as chats are."""
    count = len(value)
    for child in value.values():
        if type(child) is list:
            for item in child:
                if type(item) is not dict:
                    if type(item) is list:
                        return _num_keys_below(value)
                    continue
                count += len(item)
                for inner in item.values():
                    if type(inner) is not str and type(inner) in _NESTS:
                        return _num_keys_below(value)
        elif type(child) is dict:
            return _num_keys_below(value)
    return count


def _num_keys_below(value: dict[str, Any]) -> int:
    count = 0
    stack: list[Any] = [value]
    while stack:
        item = stack.pop()
        if type(item) is dict:
            count += len(item)
            item = item.values()
        stack += [child for child in item if type(child) in _NESTS]
    return count


def _duplicate_key(raw: bytes) -> str | None:
    """The first key that an object of valid JSON repeats; without recursion, however deep it is."""
    objects: list[set[str] | None] = []  # None for a list
    last = b""
    for token in _TOKEN.findall(raw):
        if token == b"{":
            objects.append(set())
        elif token == b"[":
            objects.append(None)
        elif token in b"}]":
            objects.pop()
        elif token == b":":
            key: str = orjson.loads(last) if b"\\" in last else last[1:-1].decode()
            keys = objects[-1]
            assert keys is not None, "a colon outside of an object is not valid JSON"
            if key in keys:
                return key
            keys.add(key)
        last = token
    return None


class _NotANumber(Exception):
    """A literal that Python reads and JSON does not know."""


def _second_opinion(raw: bytes, file: str, line: int) -> Any:
    """The value where only the parser's limits were hit (huge numbers); else the `Problem` with the real reason."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        if bad.reason == "unexpected end of data":  # within the last character
            return _cut_off(file, line)
        return _undecodable(raw, bad.start, file, line)
    if "\x00" in text:
        return _problem(file, line, f"a NUL character at column {text.index(chr(0)) + 1}", "remove it")
    depth = _depth(raw)
    if depth > _MAX_DEPTH:
        return _problem(file, line, f"nested {depth:,} levels deep, more than {_MAX_DEPTH:,}", "flatten the row")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_int=_integer)
    except _NotANumber as constant:
        column = next(match.start() for match in _CONSTANT.finditer(text) if match[0][0] != '"') + 1
        return _problem(
            file, line, f"not valid JSON: {constant} at column {column}, JSON has no such number", "write null instead"
        )
    except RecursionError:
        return _problem(file, line, f"nested {depth:,} levels deep", "flatten the row")
    except ValueError:
        return _malformed(text, file, line)
    surrogate = _lone_surrogate(text)
    if surrogate is not None:
        return _surrogate_problem(file, line, *surrogate)
    return value


def _malformed(text: str, file: str, line: int) -> Problem:
    error = _refusal(text)
    if error.pos >= len(text.rstrip()) or "unexpected end" in error.msg:
        return _cut_off(file, line)
    if "control character" in error.msg and error.pos < len(text):
        name = code_point(text[error.pos])
        return _problem(
            file, line, f"not valid JSON: the control character {name} at column {error.pos + 1}", "remove or escape it"
        )
    return _problem(file, line, f"not valid JSON: {error.msg} at column {error.pos + 1}", "correct the row")


def _refusal(text: str) -> orjson.JSONDecodeError:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return error
    raise AssertionError("orjson reads nothing that Python refuses")


def _cut_off(file: str, line: int) -> Problem:
    return _problem(file, line, "the JSON is cut off", "complete or remove the row")


def _undecodable(raw: bytes, start: int, file: str, line: int) -> Problem:
    surrogate = _INNER_SURROGATE.match(raw, start)
    if surrogate is not None:
        found = surrogate[0].decode("utf-8", "surrogatepass")
        return _surrogate_problem(file, line, found, start + 1)
    return invalid_utf8(raw, start, file, line)


def invalid_utf8(raw: bytes, start: int, file: str, line: int) -> Problem:
    """The `Problem` of a line whose byte at ``start`` is not UTF-8."""
    return _problem(
        file, line, f"invalid UTF-8: byte 0x{raw[start]:02x} at column {start + 1}", "save the file as UTF-8"
    )


def _surrogate_problem(file: str, line: int, found: str, column: int) -> Problem:
    return _problem(
        file,
        line,
        f"a lone surrogate {code_point(found)} at column {column}, half of a character",
        "write the whole character, or remove it",
    )


def _lone_surrogate(text: str) -> tuple[str, int] | None:
    """The first half of a character that is written as an escape, and its column."""
    for match in _ESCAPE.finditer(text):
        if match[1]:
            return chr(int(match[1], 16)), match.start() + 1
    return None


def _depth(raw: bytes) -> int:
    deepest = depth = 0
    for token in _TOKEN.findall(raw):
        if token in b"[{":
            depth += 1
            deepest = max(deepest, depth)
        elif token in b"]}":
            depth -= 1
    return deepest


def _refuse(constant: str) -> Any:
    raise _NotANumber(constant)


def _integer(digits: str) -> float:
    # Python converts no integers of more than 4,300 digits; as long a number is only ever carried along.
    return int(digits) if len(digits) < 4000 else float(digits)


def code_point(char: str) -> str:
    """``U+0007``."""
    return f"U+{ord(char):04X}"


def _json_kind(value: object) -> str:
    if value is None:
        return "null"
    return {list: "an array", str: "a string", bool: "a boolean"}.get(type(value), "a number")


def _problem(file: str, line: int, problem: str, hint: str, field: str | None = None) -> Problem:
    return Problem(file=file, line=line, field=field, problem=problem, hint=hint)
