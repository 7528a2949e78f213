"""A save killed, starved or cut off at any point, many times over: one process trains up to the save, each trial is a
fork of it. Run as a program, with a case in JSON as its argument; prints what came out as JSON.

    python tests/crash_trials.py '{"root": "/tmp/x", "model": "builtin:tiny", "fault": "kill", "points": 8}'

What happens to a fork happens in the kernel: strace stops it at a system call, a tmpfs has no room left. The directory
that is left behind is kept, one of each kind, and continued by a process that has never seen the run. It must end bit
for bit as the run that nothing happened to.

Keys of a case: ``fault`` (kill, fsync, room, inodes, power, damage), ``when`` (save, first, export), ``asynchronous``,
``thread`` (main, writer: which one is watched), ``system`` (ours, stock: the plain Trainer), ``points`` (how many,
evenly spread; 0 is all of them).
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Calls that change what is on disk, or force it there. ``openat`` counts where it creates or empties.
MUTATING = (
    *("openat", "creat", "write", "pwrite64", "writev", "ftruncate", "truncate", "fallocate", "copy_file_range"),
    *("sendfile", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat", "unlink", "unlinkat"),
    *("mkdir", "mkdirat", "rmdir", "chmod", "fchmod", "fchmodat", "fsync", "fdatasync", "utimensat"),
)
SAVED_STEP, STEPS = 6, 7
PAUSE_STEP = {"save": SAVED_STEP, "first": 2, "export": None}
CALL = re.compile(r"^(?:\d+ +)?(\w+)\((.*)\) += (-?\d+|\?)")
READ_BY_A_RESUME = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, ctypes.c_ulong(-1)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is done to the save; see the keys above."""

    root: str
    model: str
    fault: str = "kill"
    when: str = "save"
    asynchronous: bool = False
    thread: str = "main"
    system: str = "ours"
    points: int = 8
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return Path(self.root) / "disk" / "run"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the watched thread: the ``number``-th of its name, from 1."""

    name: str
    number: int
    line: str


# --- the run ----------------------------------------------------------------------------------------------------------


def whole_run(case: Case) -> tuple[dict[str, Any], list[str]]:
    """What comes out if nothing happens, and the modules it took: imported once, they need not be in every fork."""
    known = set(sys.modules)
    return train(case, Path(case.root) / "whole", []), sorted(set(sys.modules) - known)


def train(case: Case, output: Path, callbacks: list[Any]) -> dict[str, Any]:
    """Train, and return what must come out the same."""
    if case.system == "stock":
        from stock_run import train_stock

        return train_stock(case.model, output / "checkpoints", callbacks, steps=STEPS, resume=False)
    from tuning import tune

    saving = {"save.every_steps": 2, "save.keep": 2, "save.asynchronous": case.asynchronous}
    how = {"max_steps": STEPS, "evaluate.every_steps": 2, "dropout": 0.1}
    tune(case.model, output, callbacks=callbacks, **how | saving | case.settings)
    return outcome(output)


def outcome(run: Path) -> dict[str, Any]:
    """What must come out the same: history of updates and evaluations, and the weights bit for bit."""
    from tuning import evaluations, history, weights

    digest = hashlib.sha256()
    for name, tensor in sorted(weights(run).items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return {"history": history(run), "evaluations": evaluations(run), "weights": digest.hexdigest()}


def in_fork(act: Callable[[], Any], *, quiet: bool = True) -> Any:
    """What ``act`` returns, done by a fork of this process; a string where it raised."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        if quiet:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            answer = act()
        except BaseException as error:
            answer = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-3000:]}"
        with os.fdopen(writing, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


# --- one trial --------------------------------------------------------------------------------------------------------


def pause(case: Case) -> Any:
    """A callback of the run: at the pause it makes all trials, in forks, and ends the process."""
    from transformers import TrainerCallback

    class Pause(TrainerCallback):
        """Stops the run before the save, and each fork after it."""

        in_trial = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.in_trial and state.global_step == PAUSE_STEP[case.when]:
                self.make_trials()

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if not self.in_trial and case.when == "export":
                self.make_trials()

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.in_trial and state.global_step == PAUSE_STEP[case.when]:
                os._exit(0)

        def make_trials(self) -> None:
            if (go := all_trials(case)) is not None:  # this is a fork: train on
                self.in_trial = True
                go()

    return Pause()


def all_trials(case: Case) -> Callable[[], None] | None:
    """In a fork, what to do before it trains on; the original process never returns."""
    pristine = Path(case.root) / "pristine"
    shutil.copytree(case.run, pristine, symlinks=True)
    trial: Iterator[Callable[[], None] | None] = _FAULTS[case.fault](case, pristine)
    for go in trial:
        if go is not None:
            return go
    os._exit(0)


def restore(pristine: Path, run: Path) -> None:
    """Put the run back as it was at the pause; the lock file stays, its holder lives."""
    for path in run.iterdir():
        if path.name not in (".lock", ".lock.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in pristine.iterdir():
        if path.name not in (".lock", ".lock.json"):
            target = run / path.name
            shutil.copytree(path, target, symlinks=True) if path.is_dir() else shutil.copy2(path, target)


class Fork:
    """One fork that waits to be let go. ``pid`` is 0 in the fork itself.

    Args:
        thread: Which thread the parent watches; the fork says which that is once it exists.
    """

    def __init__(self, thread: str) -> None:
        self._told, tell = os.pipe()
        wait, self._go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0)
            self._meet = partial(_meet, tell, wait)
            self._thread = thread
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        else:
            os.close(tell)
            os.close(wait)

    def begin(self) -> None:
        """In the fork: wait for the parent, now or when the writer starts."""
        if self._thread == "main":
            self._meet()
            return

        def first_call(frame: Any, event: str, arg: Any) -> None:
            sys.settrace(None)
            if threading.current_thread().name == "llmtune-save":
                self._meet()

        threading.settrace(first_call)

    def watched(self) -> int:
        """In the parent: the thread to watch."""
        return int(os.read(self._told, 32))

    def let_go(self) -> int:
        """In the parent: let it run, and return its status as of ``os.waitpid``."""
        os.write(self._go, b"go")
        status = os.waitpid(self.pid, 0)[1]
        os.close(self._told)
        os.close(self._go)
        return status


def _meet(tell: int, wait: int) -> None:
    os.write(tell, str(threading.get_native_id()).encode())
    os.read(wait, 2)


def traced(case: Case, *options: str, log: Path | None = None) -> Iterator[Any]:
    """Yields what a fork does before it trains on; at the end, in the parent, its status."""
    fork = Fork(case.thread)
    if fork.pid == 0:
        yield fork.begin
    tid = fork.watched()
    where = ["-o", str(log or os.devnull)]
    names = ",".join(f"?{name}" for name in MUTATING)
    command = ["strace", "-y", "-s", "0", *where, "-e", f"trace={names}", *options, "-p", str(tid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        said = tracer.stderr.readline()
        if "attached" not in said:
            os.kill(fork.pid, signal.SIGKILL)
            raise RuntimeError(f"strace does not attach: {said}{tracer.stderr.read()}")
        status = fork.let_go()
        tracer.stderr.read()
    yield status


def calls_of(log: Path, run: Path) -> list[Call]:
    """Every mutating call below ``run`` of a recorded trial."""
    counts: Counter[str] = Counter()
    calls = []
    for line in log.read_text(errors="replace").splitlines():
        if (match := CALL.match(line)) is None:
            continue
        name = match[1]
        counts[name] += 1
        writes = name != "openat" or "O_CREAT" in line or "O_TRUNC" in line
        if writes and str(run) in line:
            calls.append(Call(name=name, number=counts[name], line=line))
    return calls


def spread(calls: list[Call], points: int) -> list[Call]:
    """``points`` of them, evenly spread; those at a rename and the two behind one are always among them."""
    if points == 0 or points >= len(calls):
        return calls
    chosen = {round(i * (len(calls) - 1) / max(points - 1, 1)) for i in range(points)}
    for index, call in enumerate(calls):
        if call.name == "rename" and re.search(r'(/checkpoint-\d+|.trash-[^/]*)"\)', call.line):
            chosen |= {min(index + behind, len(calls) - 1) for behind in range(3)}
    return [calls[index] for index in sorted(chosen)]


class States:
    """Directories that trials left behind, one of each kind, in ``root/states``."""

    def __init__(self, case: Case) -> None:
        self._case, self._place = case, Path(case.root) / "states"
        self._place.mkdir(exist_ok=True)
        self._known: dict[str, int] = {}
        self.trials: list[dict[str, Any]] = []

    def add(self, what: str, tree: Path | None = None, **facts: Any) -> None:
        tree = tree or self._case.run
        key = _kind(tree)
        if key not in self._known:
            self._known[key] = len(self._known)
            shutil.copytree(tree, self._place / str(self._known[key]), symlinks=True)
        self.trials.append({"what": what, "state": self._known[key]} | facts)
        (Path(self._case.root) / "trials.json").write_text(json.dumps(self.trials))


def _kind(tree: Path) -> str:
    """A digest of everything that a resume could see, random names and times left out."""
    digest = hashlib.sha256()
    for path in sorted(tree.rglob("*")):
        name = str(path.relative_to(tree))
        if name.startswith((".lock", ".spares", ".tmp")):
            continue
        content = b""
        if name == "events.jsonl":
            content = path.read_bytes()
            content = str(content.count(b"\n")).encode() + bytes(content[-1:] == b"\n")
        elif name == "run.json":
            content = json.dumps(json.loads(path.read_bytes()).get("status")).encode()
        elif path.is_file() and name.startswith(("checkpoints", "adapter", "model", "plan")):
            content = path.read_bytes()
        shown = re.sub(r"-\d+-[0-9a-f]{8}|-[0-9a-f]{8}\b|\.\d+\.[0-9a-f]{8}|tmp\w+", "-*", name)
        digest.update(f"{shown}\0".encode() + hashlib.sha256(content).digest())
    return digest.hexdigest()


# --- what is done -----------------------------------------------------------------------------------------------------


def _record(case: Case, pristine: Path, log: Path) -> Iterator[Any]:
    for step in traced(case, log=log):
        yield step if callable(step) else None


def _kill(case: Case, pristine: Path) -> Iterator[Any]:
    """Every chosen call is struck in a fork of its own; what is told is the last call that fork made."""
    log, states = Path(case.root) / "calls.log", States(case)
    yield from _record(case, pristine, log)
    states.add("nothing")
    trial = log.with_name("trial.log")
    for call in spread(calls_of(log, case.run), case.points):
        restore(pristine, case.run)
        for step in traced(case, "-e", f"inject={call.name}:signal=SIGKILL:when={call.number}", log=trial):
            if callable(step):
                yield step
            else:
                struck = calls_of(trial, case.run)[-1]
                states.add(f"killed at {struck.line[:160]}", killed=os.WIFSIGNALED(step))


def _fsync(case: Case, pristine: Path) -> Iterator[Any]:
    """The disk refuses to sync: once, and from some call on for ever."""
    log, states = Path(case.root) / "calls.log", States(case)
    yield from _record(case, pristine, log)
    syncs = [call for call in calls_of(log, case.run) if call.name == "fsync" and "/checkpoints" in call.line]
    for call in spread(syncs, case.points):
        for lasting in ("", "+"):
            restore(pristine, case.run)
            for step in traced(case, "-e", f"inject=fsync:error=EIO:when={call.number}{lasting}"):
                if callable(step):
                    yield step
                else:
                    states.add(f"EIO at {call.line[:120]}", lasting=bool(lasting), status=step)


def _shrunk(case: Case, pristine: Path, option: str, amounts: list[int]) -> Iterator[Any]:
    """Leave so much room on the disk of the run, grow until the save succeeds."""
    states, disk = States(case), Path(case.root) / "disk"
    for amount in amounts:
        restore(pristine, case.run)
        used = os.statvfs(disk)
        if option == "size":
            total = (used.f_blocks - used.f_bfree) * used.f_frsize + amount
        else:
            total = used.f_files - used.f_ffree + amount
        _mount(disk, f"remount,{option}={total}")
        (Path(case.root) / "said").unlink(missing_ok=True)
        fork = Fork("main")
        if fork.pid == 0:
            yield fork.begin
        fork.watched()
        status = fork.let_go()
        _mount(disk, "remount,size=1g,nr_inodes=1m")
        states.add(f"{amount} of {option} left", status=status, failed=_failure(case))
        if status == 0:
            return


def _failure(case: Case) -> str:
    run, told = case.run, Path(case.root) / "said"
    reports = sorted((run / "failures").glob("*.json")) if (run / "failures").is_dir() else []
    said = [json.loads(path.read_bytes())["message"] for path in reports]
    return told.read_text() if told.exists() else (said[-1] if said else "")


def _mount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], check=True, capture_output=True)


def _room(case: Case, pristine: Path) -> Iterator[Any]:
    yield from _shrunk(case, pristine, "size", [number * 24 * 1024 for number in range(40)])


def _inodes(case: Case, pristine: Path) -> Iterator[Any]:
    yield from _shrunk(case, pristine, "nr_inodes", list(range(0, 60, 3)))


def _power(case: Case, pristine: Path) -> Iterator[Any]:
    """The power fails after each call: what was not forced to disk is gone, or is there as zeros."""
    from power_loss import crash_states

    log, states = Path(case.root) / "calls.log", States(case)
    yield from _record(case, pristine, log)
    after = Path(case.root) / "after"
    shutil.copytree(case.run, after, symlinks=True)
    for what, tree in crash_states(log, case.run, before=pristine, after=after, place=Path(case.root) / "crashed"):
        states.add(what, tree)


def _damage(case: Case, pristine: Path) -> Iterator[Any]:
    """The save succeeds; then each file that a resume reads is damaged in each way, one at a time."""
    states = States(case)
    yield from _record(case, pristine, Path(case.root) / "calls.log")
    newest = case.run / "checkpoints" / f"checkpoint-{SAVED_STEP}"
    for name in READ_BY_A_RESUME:
        content = (newest / name).read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
        tail = content[: -min(4096, middle)] + bytes(min(4096, middle))
        ways = {"truncated": content[:middle], "zeroed tail": tail, "bit flip": flipped}
        (newest / name).unlink()
        states.add("file missing", file=name)
        for way, damaged in ways.items():
            (newest / name).write_bytes(damaged)
            states.add(way, file=name)
        (newest / name).write_bytes(content)


_FAULTS: dict[str, Any] = {"kill": _kill, "fsync": _fsync, "room": _room, "inodes": _inodes, "power": _power} | {
    "damage": _damage
}


# --- the whole --------------------------------------------------------------------------------------------------------


def subject(case: Case) -> None:
    # What is written at most once a second is written always: a call has the same number in every fork.
    from llmtune.runs import heartbeat
    from llmtune.training import watchers

    watchers.STATUS_SECONDS = heartbeat._EVERY_SECONDS = -1.0
    try:
        train(case, case.run, [pause(case)])
    except Exception as error:  # of a fork, in its trial
        (Path(case.root) / "said").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)
    os._exit(0)


def resumed(case: Case, state: Path) -> dict[str, Any]:
    """Continue a directory that was left behind, where it was left; says what came out and what had to be given up."""
    from tuning import ROWS, events

    from llmtune import FineTuner

    shutil.rmtree(case.run)
    shutil.copytree(state, case.run, symlinks=True)
    if case.system == "stock":
        from stock_run import train_stock

        result = train_stock(case.model, case.run / "checkpoints", [], steps=STEPS, resume=True)
        return result | {"from": None, "rest": []}
    FineTuner.resume(case.run, ROWS)
    starts = events(case.run, "run_started")
    left = sorted(path.name for place in (case.run, case.run / "checkpoints") for path in place.iterdir())
    rest = [name for name in left if name.startswith((".staging", ".trash"))]
    return outcome(case.run) | {"from": starts[-1]["resumed_from"] if len(starts) > 1 else None, "rest": rest}


def main() -> None:
    case = Case(**json.loads(sys.argv[1]))
    disk = Path(case.root) / "disk"
    disk.mkdir(parents=True)
    mounted = case.fault in ("room", "inodes")
    if mounted:
        _mount(disk, "size=1g,nr_inodes=1m")
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import llmtune.training.train  # noqa: F401

    torch.set_num_threads(1)
    try:
        if isinstance(found := in_fork(lambda: whole_run(case)), str):
            raise RuntimeError(found)
        whole, modules = found
        for module in modules:
            with suppress(ImportError):
                importlib.import_module(module)
        said = in_fork(lambda: subject(case), quiet=False)
        trials = json.loads((Path(case.root) / "trials.json").read_text())
        results = {}
        for state in sorted((Path(case.root) / "states").iterdir(), key=lambda path: int(path.name)):
            results[state.name] = in_fork(lambda state=state: resumed(case, state))  # type: ignore[misc]
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)
    equal = [n for n, one in results.items() if isinstance(one, dict) and all(one[k] == whole[k] for k in whole)]
    broken = {n: one for n, one in results.items() if n not in equal}
    froms = {n: one["from"] for n, one in results.items() if isinstance(one, dict)}
    rests = {n: one["rest"] for n, one in results.items() if isinstance(one, dict) and one["rest"]}
    json.dump(
        {
            "trials": trials,
            "states": len(results),
            "equal": len(equal),
            "broken": {n: one if isinstance(one, str) else "differs" for n, one in broken.items()},
            "from": froms,
            "rests": rests,
            "said": said,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
