"""Killed at every mutating system call of one whole save and the retention after it, in every way of saving.

Each directory that is left behind, one of each kind, is continued by another process and ends bit for bit as the run
that nothing happened to. Run by hand; prints one line per case.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trials import needs_strace, survived, trials

pytestmark = pytest.mark.sweep

Model = Callable[[str], Path]
SAVE: set[str | None] = {"checkpoints/checkpoint-4", "checkpoints/checkpoint-6"}
CASES: dict[str, dict[str, Any]] = {
    "a save in the foreground": {},
    "a save in the background, its writer": {"asynchronous": True, "thread": "writer"},
    "a save in the background, the training thread": {"asynchronous": True, "thread": "main"},
    "the first save ever": {"when": "first"},
    "the final export": {"when": "export"},
    "a compressed save": {"settings": {"save.compress_optimizer": True}},
    "a full model": {"settings": {"method": "full"}},
}


@needs_strace
@pytest.mark.parametrize("name", list(CASES))
def test_killed_at_every_mutating_call(
    name: str, family_model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = CASES[name]
    result = trials(tmp_path / "t", family_model("llama"), points=0, **case)
    killed = [one for one in result["trials"] if one.get("killed")]
    with capsys.disabled():
        counts = f"{len(killed)} kills, {result['states']} directory states, {result['equal']} resumed bitwise equal"
        print(f"\n{name}: {counts}")
    first: set[str | None] = {None, "checkpoints/checkpoint-2"}
    last: set[str | None] = {None, "checkpoints/checkpoint-7"}
    survived(result, started_from={"first": first, "export": last}.get(str(case.get("when")), SAVE))
    assert len(killed) > 20
