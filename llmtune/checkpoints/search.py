"""Everything that is known about a checkpoint by one flat name each, and the checkpoints of which something is true."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from llmtune.checkpoints.listing import CheckpointInfo
from llmtune.errors import ConfigError, did_you_mean

_COMPARED: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
_CONDITION = re.compile(r"\s*([\w.\-]+)\s*(<=|>=|!=|=|<|>)\s*(.*?)\s*")
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


def facts_of(info: CheckpointInfo) -> dict[str, Any]:
    """What is known about one checkpoint, by dotted name: ``step``, ``eval_loss``, ``versions.torch``."""
    known = {"step": info.step, "path": str(info.path), "verified": info.verified, "reason": info.reason}
    known |= {"healthy": info.healthy, "bytes": info.num_bytes}
    rest = {name: value for name, value in info.facts.items() if name not in (*known, "metrics", "manifest_sha256")}
    return known | dict(info.metrics) | dict(_flat(rest))


def matching(infos: Iterable[CheckpointInfo], conditions: Sequence[str]) -> list[CheckpointInfo]:
    """Those of which every condition is true, in the order given.

    Args:
        infos: Some checkpoints.
        conditions: ``eval_loss<1.5``, ``healthy=true``, ``versions.torch!=2.12.0``: a name of `facts_of`, one of
            ``= != < <= > >=``, and a value. What a checkpoint does not say is true of nothing.

    Raises:
        ConfigError: A condition cannot be read, or names what no checkpoint says; lists all of them.
    """
    told = [(info, facts_of(info)) for info in infos]
    known = {name for _, facts in told for name in facts}
    tests, problems = [], []
    for condition in conditions:
        found = _CONDITION.fullmatch(condition)
        if found is None:
            problems.append(f"got '{condition}', expected NAME=VALUE with one of {' '.join(_COMPARED)}")
        elif told and found[1] not in known:
            problems.append(f"'{found[1]}' is in no checkpoint{did_you_mean(found[1], known)}")
        else:
            tests.append((found[1], _COMPARED[found[2]], found[3]))
    if problems:
        raise ConfigError("--where", problems)
    return [info for info, facts in told if all(_holds(facts, *test) for test in tests)]


def _holds(facts: Mapping[str, Any], name: str, compare: Callable[[Any, Any], bool], wanted: str) -> bool:
    value = facts.get(name)
    if value is None:
        return False
    if isinstance(value, bool):
        return wanted.lower() in _WORDS and compare(value, _WORDS[wanted.lower()])
    if isinstance(value, int | float):
        try:
            return compare(value, float(wanted))
        except ValueError:
            return False
    return compare(str(value), wanted)


def _flat(facts: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
