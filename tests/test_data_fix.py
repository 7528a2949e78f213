"""``check --fix``: where its files go, that they appear together, and that nothing else is left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtune.cli import main
from llmtune.data import fix
from llmtune.data.fix import write_fixed
from llmtune.errors import ConfigError, OutputError

ROWS = [{"question": f"What is {i}?", "answer": "" if i % 5 == 0 else f"It is {i}."} for i in range(20)]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture
def place(tmp_path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("existing", ["good.jsonl", "good.quarantine.jsonl"])
def test_an_existing_file_is_refused_before_anything_is_read_and_force_overwrites_it(data, place, capsys, existing):
    (place / existing).write_text("mine")
    missing = str(data.with_name("missing.jsonl"))
    out = str(place / "good.jsonl")
    assert main(["check", missing, "--fix", out]) == 2  # not 3: the data was not looked for
    said = capsys.readouterr().err
    assert f"{place / existing} exists. Pass --force to overwrite it" in said
    assert files(place) == {existing: "mine"}
    with pytest.raises(OutputError, match="exists"):
        write_fixed(missing, out)
    assert main(["check", str(data), "--fix", out, "--force"]) == 0
    found = files(place)
    assert sorted(found) == ["good.jsonl", "good.quarantine.jsonl"]
    assert [len(text.splitlines()) for _, text in sorted(found.items())] == [16, 4]


def test_places_that_cannot_be_written_are_refused_before_anything_is_read(data, place, capsys):
    (place / "folder.jsonl").mkdir()
    for out, said in (
        (place / "none" / "good.jsonl", "there is no directory"),
        (place / "folder.jsonl", "it is a directory"),
        (place / "good.csv", "expected the name of a new .jsonl file"),
        (data, "would overwrite the data"),
    ):
        for force in ([], ["--force"]):
            assert main(["check", str(data), "--fix", str(out), *force]) == 2
            assert said in capsys.readouterr().err
    assert main(["check", str(data.parent), "--fix", str(data)]) == 2
    assert "would overwrite the data" in capsys.readouterr().err
    assert main(["check", str(data), "--force"]) == 2
    assert "--force: is only valid with --fix" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="would overwrite the data"):
        write_fixed(data, data, overwrite=True)
    assert data.read_text().count("\n") == len(ROWS)
    assert sorted(path.name for path in place.iterdir()) == ["folder.jsonl"]


def test_a_mix_names_a_source_that_works(data, place, capsys):
    other = shutil.copy(data, data.with_name("e.jsonl"))
    config = place / "mix.yaml"
    config.write_text(f"data:\n  sources:\n  - path: {data}\n  - path: {other}\n")
    assert main(["check", "--config", str(config), "--fix", str(place / "good.jsonl")]) == 2
    named = re.search(r"one of its sources as DATA: (\S+),", capsys.readouterr().err)[1]
    assert main(["check", named, "--fix", str(place / "good.jsonl")]) == 0


@pytest.fixture
def full_disk(tmp_path):
    """A disk of 64 KiB; skips where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_full_disk_leaves_what_was_there_before(data, full_disk, capsys, replaced):
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS * 100))
    before = {"good.jsonl": "mine", "good.quarantine.jsonl": "mine too"} if replaced else {}
    for name, text in before.items():
        (full_disk / name).write_text(text)
    assert main(["check", str(data), "--fix", str(full_disk / "good.jsonl"), *(["--force"] * replaced)]) == 2
    said = capsys.readouterr().err
    assert (
        f"OutputError: cannot write {full_disk / 'good.jsonl'} and {full_disk / 'good.quarantine.jsonl'}: No space"
        in said
    )
    assert files(full_disk) == before
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main(["check", str(data), "--fix", str(full_disk / "good.jsonl"), "--force"]) == 0


@pytest.mark.parametrize("replaced", [False, True])
def test_files_that_cannot_both_be_put_in_place_are_both_as_before(place, replaced):
    before = {"good.jsonl": "mine"} if replaced else {}
    for name, text in before.items():
        (place / name).write_text(text)
    for name in ("a.tmp", "b.tmp"):
        (place / name).write_text("new")
    with pytest.raises(FileNotFoundError):
        fix._put_in_place({place / "good.jsonl": place / "a.tmp", place / "gone" / "q.jsonl": place / "b.tmp"})
    (place / "b.tmp").unlink()
    assert files(place) == before


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(tmp_path, place, sent):
    pipe = tmp_path / "d.jsonl"  # large enough to be interrupted while rows are written
    pipe.write_text("".join(json.dumps(row) + "\n" for row in ROWS) * 20_000)
    command = [
        sys.executable,
        "-m",
        "llmtune",
        "check",
        str(pipe),
        "--no-near-duplicates",
        "--fix",
        str(place / "good.jsonl"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(path.stat().st_size for path in place.iterdir()):
            break
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "stopped by" in said
    assert files(place) == {}
