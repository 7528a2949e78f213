"""Committed checkpoints: complete or invisible, verified before use, never the wrong one deleted."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtune.checkpoints import MANIFEST, commit, list_checkpoints, newest_verified, retain, sweep_leftovers, verify
from llmtune.checkpoints.commit import staging_root
from llmtune.errors import CheckpointError


def make(root: Path, step: int, content: bytes = b"weights", **facts: object) -> Path:
    staged = staging_root(root, step) / f"checkpoint-{step}"
    (staged / "nested").mkdir(parents=True)
    (staged / "model.bin").write_bytes(content)
    (staged / "nested" / "state.json").write_text("{}")
    (staged / "training_args.bin").write_bytes(b"pickled token")
    done = commit(staged, root / f"checkpoint-{step}", {"step": step, "finite_weights": True, "metrics": {}} | facts)
    sweep_leftovers(root)
    return done


def test_a_committed_checkpoint_verifies_and_keeps_no_pickled_arguments(tmp_path: Path) -> None:
    path = make(tmp_path, 3, metrics={"eval_loss": 1.5})
    assert verify(path).ok
    assert sorted(p.name for p in path.rglob("*")) == [MANIFEST, "model.bin", "nested", "state.json"]
    (info,) = list_checkpoints(tmp_path)
    assert info.to_json() == {
        "step": 3,
        "path": str(path),
        "verified": True,
        "reason": "every file matches its manifest",
        "metrics": {"eval_loss": 1.5},
        "bytes": len(b"weights") + 2,
        "healthy": True,
    }
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def _truncate(path: Path) -> None:
    (path / "model.bin").write_bytes(b"wei")


def _zero(path: Path) -> None:
    (path / "model.bin").write_bytes(b"\0" * 7)


def _extra(path: Path) -> None:
    (path / "extra.bin").write_bytes(b"x")


def _missing(path: Path) -> None:
    (path / "nested" / "state.json").unlink()


def _no_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def _edited_manifest(path: Path) -> None:
    document = json.loads((path / MANIFEST).read_text())
    document["step"] = 3.0 if document["step"] == 4 else 3
    document["metrics"] = {"eval_loss": 0.0}
    (path / MANIFEST).write_text(json.dumps(document))


def _garbled_manifest(path: Path) -> None:
    (path / MANIFEST).write_bytes(b"\xff{")


def _symlink(path: Path) -> None:
    (path / "model.bin").rename(path.parent / "elsewhere.bin")
    (path / "model.bin").symlink_to(path.parent / "elsewhere.bin")


DAMAGES = [_truncate, _zero, _extra, _missing, _no_manifest, _edited_manifest, _garbled_manifest, _symlink]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.strip("_"))
def test_damage_is_seen_and_the_one_before_is_taken(tmp_path: Path, damage: object) -> None:
    older, newer = make(tmp_path, 3), make(tmp_path, 4)
    damage(newer)  # type: ignore[operator]
    rejected = []
    assert newest_verified(tmp_path, rejected.append) == older
    assert [(info.step, info.verified, info.healthy) for info in rejected] == [(4, False, False)]
    assert rejected[0].reason


def test_a_renamed_checkpoint_is_rejected(tmp_path: Path) -> None:
    make(tmp_path, 3).rename(tmp_path / "checkpoint-9")
    assert "holds step 3" in verify(tmp_path / "checkpoint-9").reason


def test_when_none_verifies_nothing_is_restarted_silently(tmp_path: Path) -> None:
    _truncate(make(tmp_path, 3))
    with pytest.raises(CheckpointError, match=r"none of 1 checkpoints verifies.*--output"):
        newest_verified(tmp_path, lambda info: None)
    assert newest_verified(tmp_path / "nothing-here", lambda info: None) is None


@settings(max_examples=60, deadline=None)
@given(offset=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_no_bit_flip_is_silent(tmp_path_factory: pytest.TempPathFactory, offset: int, bit: int) -> None:
    root = tmp_path_factory.mktemp("flip")
    path = make(root, 1, content=bytes(range(256)) * 8)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    target = files[offset % len(files)]
    data = bytearray(target.read_bytes())
    position = offset % len(data)
    data[position] ^= 1 << bit
    target.write_bytes(data)
    assert not verify(path).ok


def test_committing_a_step_again_keeps_the_good_one_and_puts_a_bad_one_aside(tmp_path: Path) -> None:
    path = make(tmp_path, 5, content=b"first")
    make(tmp_path, 5, content=b"second")
    assert (path / "model.bin").read_bytes() == b"first"
    _truncate(path)
    make(tmp_path, 5, content=b"third")
    assert (path / "model.bin").read_bytes() == b"third"
    assert [p.name.split("-")[0] for p in tmp_path.iterdir() if p != path] == [".quarantine"]


def test_a_failed_commit_leaves_what_was_there_and_no_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = make(tmp_path, 1)
    real = os.fsync

    def refuse(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path, 2)
    monkeypatch.setattr(os, "fsync", real)
    sweep_leftovers(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"]
    assert verify(good).ok


def test_retention_keeps_the_newest_by_step_the_best_and_the_newest_healthy(tmp_path: Path) -> None:
    for step in (9, 10, 100, 11, 12):
        make(tmp_path, step, finite_weights=step not in (100, 12))
    os.utime(tmp_path / "checkpoint-100", (0, 0))  # the clock was stepped back: age is not what counts
    gone = retain(tmp_path, keep=2, best=tmp_path / "checkpoint-9")
    assert gone == [10]
    assert [info.step for info in list_checkpoints(tmp_path)] == [100, 12, 11, 9]


def test_a_checkpoint_that_does_not_verify_never_counts_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make(tmp_path, step)
    _truncate(tmp_path / "checkpoint-4")
    _truncate(tmp_path / "checkpoint-3")
    assert retain(tmp_path, keep=2, best=None) == []
    assert newest_verified(tmp_path, lambda info: None) == tmp_path / "checkpoint-2"


def test_leftovers_of_a_killed_process_are_swept_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 1)
    (tmp_path / ".staging-2-1-aa" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / ".trash-checkpoint-0-bb").mkdir()
    (tmp_path / "checkpoint-notes").mkdir()
    sweep_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-notes"]
    shutil.rmtree(tmp_path / "checkpoint-1")
    assert list_checkpoints(tmp_path) == []
