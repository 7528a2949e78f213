"""Compressed files are read as what they wrap, under their own name, and damage is named."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtune.cli import main
from llmtune.config import cache_dir, load_config
from llmtune.data import check, read, resolve
from llmtune.data.fix import write_fixed
from llmtune.data.scan import Scanner, scan
from llmtune.errors import DataError, OutputError
from llmtune.finetuner.rows import inputs_of

ROWS = [{"question": f"What is {i}?", "answer": f"It is {i}, größer"} for i in range(20)]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


def plain(path: Path) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".csv":
        path.write_text("question;answer\n" + "".join(f"{row['question']};{row['answer']}\n" for row in ROWS))
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".txt":
        path.write_text("One document.\n")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def compressed(path: Path, suffix: str) -> Path:
    packed = path.with_name(path.name + suffix)
    packed.write_bytes(COMPRESS[suffix](path.read_bytes()))
    return packed


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name", ["d.jsonl", "d.json", "d.csv", "d.parquet", "d.txt"])
def test_a_compressed_file_is_read_as_what_it_wraps(tmp_path, name, suffix):
    path = plain(tmp_path / name)
    packed = compressed(path, suffix)
    assert [row.value for row in resolve(packed)] == [row.value for row in resolve(path)]
    assert {row.file for row in resolve(packed)} == {str(packed)}
    assert resolve(packed).fingerprint == resolve(path).fingerprint
    assert resolve(packed).name == "d"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_members_one_after_the_other_are_one_file(tmp_path, suffix):
    """As ``cat a.gz b.gz`` makes them."""
    path = tmp_path / f"d.jsonl{suffix}"
    lines = plain(tmp_path / "d.jsonl").read_bytes().splitlines(keepends=True)
    path.write_bytes(COMPRESS[suffix](b"".join(lines[:7])) + COMPRESS[suffix](b"".join(lines[7:])))
    assert len(list(read(path))) == len(ROWS)


def test_folders_and_globs_and_splits(tmp_path):
    for number, suffix in enumerate(COMPRESS):
        compressed(plain(tmp_path / f"train-{number}.jsonl"), suffix)
        (tmp_path / f"train-{number}.jsonl").unlink()
    compressed(plain(tmp_path / "validation.jsonl"), ".gz")
    (tmp_path / "validation.jsonl").unlink()
    inputs = inputs_of(load_config({}, environ={}), str(tmp_path))
    assert len(list(inputs.train[0])) == 4 * len(ROWS)
    assert inputs.evaluation.source.labels == (str(tmp_path / "validation.jsonl.gz"),)
    assert len(list(read(str(tmp_path / "train*.jsonl.*")))) == 4 * len(ROWS)


def test_a_compressed_file_in_another_encoding(tmp_path):
    path = tmp_path / "d.csv"
    path.write_bytes(plain(path).read_text().encode("cp1252"))
    packed = compressed(path, ".gz")
    assert [row.value for row in resolve(packed)] == ROWS
    (warning,) = resolve(packed).warnings
    assert warning.startswith(f"{packed}: read as Windows-1252")


def test_problems_and_the_quarantine_name_the_archive_and_hold_the_row(tmp_path):
    path = plain(tmp_path / "d.jsonl")
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n')
    packed = compressed(path, ".zst")
    (problem,) = check(packed).problems
    assert str(problem).startswith(f"{packed}:21: invalid UTF-8")
    assert write_fixed(packed, tmp_path / "out.jsonl") == (20, 1)
    (entry,) = map(orjson.loads, (tmp_path / "out.quarantine.jsonl").read_bytes().splitlines())
    assert (entry["file"], entry["line"], entry["raw"]) == (str(packed), 21, '{"question": "\ufffd"}')
    damaged = tmp_path / "d.parquet"
    damaged.write_bytes(b"no table" * 10)
    with pytest.raises(DataError, match=r"d\.parquet\.gz: not a readable Parquet file"):
        read(compressed(damaged, ".gz"))


def test_several_processes_read_parts_of_one_archive(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b"".join(json.dumps(row | {"n": i}).encode() + b"\n" for i, row in enumerate(ROWS * 200)))
    readings = (read(compressed(path, ".gz")),)
    one, two = (scan(Scanner(readings=readings), processes=n, chunk_bytes=20_000) for n in (1, 2))
    assert (one.rows, one.lines, one.digests) == (two.rows, two.lines, two.digests)
    assert one.rows == len(ROWS) * 200
    assert len(one.chunks) > 4


def test_the_copy_is_made_once_and_depends_on_the_content_alone(tmp_path):
    packed = compressed(plain(tmp_path / "d.jsonl"), ".gz")
    (copy,) = resolve(packed).files
    assert copy.is_relative_to(cache_dir())
    inode = copy.stat().st_ino
    moved = packed.with_name("e.jsonl.gz")
    packed.rename(moved)
    assert resolve(moved).files == (copy,)
    assert copy.stat().st_ino == inode
    moved.write_bytes(gzip.compress(b'{"text": "other"}\n'))
    assert [row.value for row in resolve(moved)] == [{"text": "other"}]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", ["cut", "bytes", "no archive"])
def test_a_damaged_archive_is_named_and_leaves_nothing(tmp_path, suffix, damage):
    packed = compressed(plain(tmp_path / "d.jsonl"), suffix)
    raw = packed.read_bytes()
    middle = len(raw) // 2
    packed.write_bytes(
        {"cut": raw[:-6], "bytes": raw[:middle] + b"\xff" * 30 + raw[middle + 30 :], "no archive": b'{"text": "a"}\n'}[
            damage
        ]
    )
    with pytest.raises(
        DataError, match=rf"d\.jsonl\{suffix}: the \w+ archive is damaged or cut off .*Write or download"
    ):
        read(packed)
    assert not [file for file in cache_dir().rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_an_empty_archive_and_names_that_say_too_little(tmp_path):
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DataError, match=r"d\.jsonl\.gz: the file is empty"):
        read(tmp_path / "d.jsonl.gz")
    for name, said in (
        ("chats.gz", "no extension before it says what it holds"),
        ("chats.tar.gz", "an archive of several files; unpack it"),
        ("chats.xlsx.gz", r"the extension '\.xlsx' is not supported"),
    ):
        (tmp_path / name).write_bytes(gzip.compress(b"x"))
        with pytest.raises(DataError, match=said):
            read(tmp_path / name)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MiB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    if not mounted or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("suffix", COMPRESS)
def test_an_archive_larger_than_the_disk_ends_before_the_disk_is_full(tmp_path, small_disk, suffix, monkeypatch):
    monkeypatch.setenv("LLMTUNE_CACHE", str(small_disk))
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"text": "' + b"a" * 64_000_000 + b'"}\n')
    packed = compressed(path, suffix)
    assert packed.stat().st_size < 200_000
    with pytest.raises(
        OutputError, match=r"d\.jsonl\.\w+: its readable copy cannot be written .*the disk is full.*LLMTUNE_CACHE"
    ):
        read(packed)
    assert shutil.disk_usage(small_disk).free > 7_000_000
    assert main(["check", str(packed)]) == 2
    monkeypatch.setenv("LLMTUNE_CACHE", str(tmp_path / "cache"))
    assert main(["check", str(packed)]) == 3  # its row is too large, which is said


def test_processes_that_need_the_same_copy_at_once(tmp_path):
    packed = compressed(plain(tmp_path / "d.jsonl"), ".xz")
    code = f"from llmtune.data import read; print(len(list(read({str(packed)!r}))))"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].strip() for process in started] == [str(len(ROWS))] * 3
