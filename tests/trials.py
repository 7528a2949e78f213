"""How tests run ``crash_trials.py``: in a process of its own, and what must have come out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("crash_trials.py")
needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    done = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True)
    return done.returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="this process may not mount a tmpfs")


def trials(root: Path, model: Path | str, **case: Any) -> dict[str, Any]:
    """What came out of one case; see ``crash_trials.py``."""
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    given = json.dumps({"root": str(root), "model": str(model)} | case)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), given],
        capture_output=True,
        text=True,
        check=False,
        env=surroundings,
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def survived(result: dict[str, Any], *, started_from: set[str | None]) -> None:
    """Every directory that was left behind was continued, to the same end bit for bit, from where it had to be."""
    assert result["states"] > 0
    told = {n: [one["what"] for one in result["trials"] if str(one["state"]) == n][:2] for n in result["broken"]}
    assert result["broken"] == {}, told
    assert result["equal"] == result["states"]
    assert set(result["from"].values()) <= started_from
    assert result["rests"] == {}  # leftovers are swept
