"""The command's heap: restarted once with what it needs, in the same process, and only where it helps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmtune import heap
from llmtune.hardware.probes import _heap
from llmtune.heap import LARGE_PAGES, NO_SMALL_CACHES, VARIABLE, leaves_holes

PROGRAM = """
import json, os, sys
before = os.environ.get("STARTED_AS")
os.environ.setdefault("STARTED_AS", str(os.getpid()))
from pathlib import Path
from llmtune import heap
from llmtune.heap import VARIABLE, restart_with_tuned_heap
heap.ON_REQUEST = Path(os.environ["PAGES"])
restart_with_tuned_heap()
told = {"pid": os.getpid(), "first": before, "heap": os.environ.get(VARIABLE), "argv": sys.argv[1:]}
print(json.dumps(told | {"stdin": sys.stdin.read()}))
"""


SOURCES = Path(heap.__file__).parents[1]
BOTH = f"{NO_SMALL_CACHES}:{LARGE_PAGES}"


def started(
    version: str, environ: dict[str, str], tmp_path: Path, pages: str | None = "always [madvise] never"
) -> dict[str, object]:
    """What a program sees that restarts itself on a machine with this C library and these large pages."""
    if pages is not None:
        (tmp_path / "enabled").write_text(pages)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    # Where the library is another one: said by the environment's sitecustomize.
    (tmp_path / "sitecustomize.py").write_text(f"import os; os.confstr = lambda name: {version!r}")
    clean = {key: value for key, value in os.environ.items() if key not in (VARIABLE, "STARTED_AS")}
    done = subprocess.run(
        [sys.executable, str(script), "train", "a file.jsonl"],
        input="yes\n",
        capture_output=True,
        text=True,
        check=True,
        env=clean | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{SOURCES}", "PAGES": str(tmp_path / "enabled")} | environ,
    )
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
def test_the_command_is_the_same_process_with_the_same_arguments_and_input(tmp_path: Path) -> None:
    told = started("glibc 2.36", {}, tmp_path)
    assert told["heap"] == BOTH
    assert told["first"] == str(told["pid"]), "restarted once, in the process that was started"
    assert (told["argv"], told["stdin"]) == (["train", "a file.jsonl"], "yes\n")


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
@pytest.mark.parametrize(
    ("version", "environ", "heap_of_it"),
    [
        ("glibc 2.39", {}, LARGE_PAGES),
        ("glibc 2.31", {VARIABLE: "glibc.malloc.arena_max=2"}, f"glibc.malloc.arena_max=2:{NO_SMALL_CACHES}"),
        ("", {}, None),
    ],
)
def test_restarted_where_it_helps_and_what_the_user_set_stays(
    version: str, environ: dict[str, str], heap_of_it: str | None, tmp_path: Path
) -> None:
    assert started(version, environ, tmp_path)["heap"] == heap_of_it


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
@pytest.mark.parametrize("pages", ["[always] madvise never", "always madvise [never]", None])
@pytest.mark.parametrize(("version", "heap_of_it"), [("glibc 2.36", NO_SMALL_CACHES), ("glibc 2.39", None)])
def test_large_pages_are_asked_for_where_the_kernel_gives_them_on_request(
    pages: str | None, version: str, heap_of_it: str | None, tmp_path: Path
) -> None:
    assert started(version, {}, tmp_path, pages)["heap"] == heap_of_it


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library")
@pytest.mark.parametrize("own", ["glibc.malloc.tcache_count=3", "glibc.malloc.mxfast=64", NO_SMALL_CACHES])
def test_a_user_who_decided_about_a_setting_is_left_alone(own: str, tmp_path: Path) -> None:
    assert started("glibc 2.36", {VARIABLE: own}, tmp_path)["heap"] == f"{own}:{LARGE_PAGES}"
    own = f"{own}:glibc.malloc.hugetlb=0"
    told = started("glibc 2.36", {VARIABLE: own}, tmp_path)
    assert (told["heap"], told["first"]) == (own, None)


@pytest.mark.parametrize(
    ("library", "holes"),
    [("glibc 2.36", True), ("glibc 2.38", True), ("glibc 2.39", False), ("glibc 3.0", False), ("", False)],
)
def test_which_libraries_leave_holes(library: str, holes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.os, "confstr", lambda name: library, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert leaves_holes() is holes
    monkeypatch.setenv(VARIABLE, NO_SMALL_CACHES)
    assert leaves_holes() is False


def test_a_system_without_that_name_has_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(heap.os, "confstr", unknown, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert not leaves_holes()


@pytest.mark.parametrize(
    ("library", "tunables"),
    [("glibc 2.36", BOTH), ("glibc 2.40", LARGE_PAGES), ("glibc 2.31", NO_SMALL_CACHES), ("", "")],
)
def test_doctor_has_the_settings_for_programs_of_ones_own(
    library: str, tunables: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heap.os, "confstr", lambda name: library, raising=False)
    monkeypatch.setattr(heap, "ON_REQUEST", tmp_path / "enabled")
    (tmp_path / "enabled").write_text("always [madvise] never")
    found = _heap()
    assert found.available == bool(tunables)
    assert found.why.endswith(f"{VARIABLE}={tunables}") == bool(tunables)


def test_the_installed_command_says_that_its_heap_has_no_holes() -> None:
    """The fact that plans rest on, as seen by the very process that trains."""
    clean = {key: value for key, value in os.environ.items() if key != VARIABLE}
    command = [sys.executable, "-m", "llmtune", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=clean)
    assert json.loads(done.stdout)["hardware"]["heap_leaves_holes"] is False
