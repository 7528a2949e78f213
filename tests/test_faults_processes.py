"""Faults 49 to 58 of the catalogue: signals, workers, ranks, clocks, and several processes at once.

Each is injected for real into a process of its own. What is left must go on, and end bitwise as if nothing had
happened.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tuning import ROWS, evaluations, events, history, settings, weights

from llmtune import FineTuner
from llmtune.hardware import accelerate_config_path
from llmtune.runs import RunDirectory

pytestmark = [pytest.mark.fault, pytest.mark.slow]
Model = Callable[[str], Path]
ROOT = str(Path(__file__).parents[1])
# Longer than anything here takes on a busy machine, so that a hang is told from slowness.
PATIENCE_SECONDS = 240

# One run with one fault in it: ``driver.py {"data": …, "settings": {…}, "fault": …, "step": …}``.
DRIVER = """
import json, multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from transformers import TrainerCallback
from llmtune import FineTuner
from llmtune.errors import LlmtuneError

asked = json.loads(sys.argv[1])
fault, at, number = asked["fault"], asked.get("step", 0), asked.get("signal", int(signal.SIGTERM))
place = Path(asked["settings"]["output"])
once = place.parent / f"{place.name}-fault-done"


def strike(pid, number):
    if not once.exists():
        once.touch()
        os.kill(pid, number)


class Inject(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 != at:
            return
        if fault == "step":
            strike(os.getpid(), number)
        elif fault == "slow":
            (place.parent / "in-step").touch()
            until = time.monotonic() + 120
            while time.monotonic() < until:
                time.sleep(0.01)
        elif fault == "worker":
            strike(next(child.pid for child in multiprocessing.active_children() if child.daemon), number)
        elif fault == "loader":
            for child in multiprocessing.active_children():
                if child.daemon:
                    os.kill(child.pid, signal.SIGSTOP)
        elif fault == "rank" and os.environ.get("RANK") == str(asked["rank"]):
            strike(os.getpid(), number)
        elif fault == "hang" and not once.exists():
            once.touch()
            threading.Event().wait()


def measure(answers, references):
    if fault == "evaluation":
        measure.calls = getattr(measure, "calls", 0) + 1
        if measure.calls == asked["call"]:
            strike(os.getpid(), number)
    return 0.0


def strike_in_save():
    while not list(place.glob(f"checkpoints/.staging-{at}-*/checkpoint-{at}")):
        time.sleep(0.0002)
    strike(os.getpid(), number)


if fault == "save":
    threading.Thread(target=strike_in_save, daemon=True).start()
metrics = {"zero": measure} if asked.get("measures") else None
try:
    FineTuner(asked["data"], callbacks=[Inject()], metrics=metrics, **asked["settings"]).train()
except LlmtuneError as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's runs are, with their data and the driver."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "lamps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "driver.py").write_text(textwrap.dedent(DRIVER))
    return folder


@pytest.fixture(scope="module")
def how(family_model: Model, place: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a run by its name."""

    def make(name: str, **changes: Any) -> dict[str, Any]:
        return settings(family_model("llama"), place / name, dropout=0.1, max_steps=6, **changes)

    return make


@pytest.fixture(scope="module")
def whole(place: Path, how: Callable[..., dict[str, Any]]) -> Path:
    """The run that nothing happened to."""
    FineTuner(str(place / "lamps.jsonl"), **how("whole")).train()
    return place / "whole"


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
    return kept | threads | {"PYTHONPATH": os.pathsep.join([ROOT, kept.get("PYTHONPATH", "")])}


def drive(place: Path, how: dict[str, Any], fault: str, *launch: str, **facts: Any) -> subprocess.Popen[str]:
    asked = {"data": str(place / "lamps.jsonl"), "settings": how, "fault": fault} | facts
    command = [*(launch or (sys.executable,)), str(place / "driver.py"), json.dumps(asked)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and stderr of a process; one that hangs is killed with all that it has started."""
    try:
        _, err = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, err = process.communicate()
        pytest.fail(f"it hangs: {err}")
    return process.returncode, err


def until(found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not found():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def goes_on_as(whole: Path, run: Path) -> None:
    """Continue ``run``; it ends bitwise like ``whole``."""
    import torch

    assert FineTuner.resume(run).status == "finished"
    assert history(run) == history(whole)
    expected, found = weights(whole), weights(run)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], tensor) for name, tensor in found.items())
    assert not [path for path in run.rglob(".staging-*")]


# ---------------------------------------------------------------------- 49 to 51: signals


@pytest.mark.parametrize(
    "when",
    [
        pytest.param("before the data", marks=pytest.mark.sweep),
        pytest.param("data are read", marks=pytest.mark.sweep),
        "weights are loaded",
    ],
)
def test_fault_49_sigterm_before_the_loop(place: Path, how: Any, whole: Path, tmp_path: Path, when: str) -> None:
    """From the command line, since what is before training is the command's."""
    run = place / f"load-{when.replace(' ', '-')}"
    keys = [
        part
        for key, value in how(run.name).items()
        for part in ("--set", f"{key}={value if isinstance(value, str) else json.dumps(value)}")
    ]
    keys = [part.replace("output=", "output.dir=") if part.startswith("output=") else part for part in keys]
    keys = [part.replace("model=", "model.id=") if part.startswith("model=") else part for part in keys]
    command = [sys.executable, "-m", "llmtune", "train", str(place / "lamps.jsonl"), *keys]
    with (tmp_path / "err").open("w") as err:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=err, env=environment(), text=True)
    signs: dict[str, Callable[[], object]] = {
        "before the data": lambda: b"libtorch" in Path(f"/proc/{process.pid}/maps").read_bytes(),
        "data are read": lambda: "data: " in (tmp_path / "err").read_text(),
        "weights are loaded": lambda: (run / "plan.json").exists(),
    }
    until(signs[when], process)
    process.terminate()
    process.wait(PATIENCE_SECONDS)
    text = (tmp_path / "err").read_text()
    assert process.returncode == 75, text
    assert "Traceback" not in text
    assert not run.exists()  # nothing was trained: nothing half-made is left
    subprocess.run(command, capture_output=True, env=environment(), timeout=PATIENCE_SECONDS, check=True)
    assert history(run) == history(whole)


def test_fault_49_sigterm_in_a_step(place: Path, how: Any, whole: Path) -> None:
    code, err = ended(drive(place, how("term-step"), "step", step=3))
    assert code == 75, err
    run = RunDirectory.open(place / "term-step")
    assert run.run["status"] == "preempted"
    assert [step["step"] for step in run.steps()] == [1, 2, 3]
    assert f"llmtune resume {run.path}" in err
    goes_on_as(whole, run.path)


def test_fault_49_sigterm_in_an_evaluation(place: Path, how: Any, whole: Path) -> None:
    extra = {"evaluate.metric_rows": 2, "max_new_tokens": 2}
    facts = {"measures": True, "call": 3}  # rehearsal, base model, step 3
    code, err = ended(drive(place, how("term-evaluation", **extra), "evaluation", **facts))
    assert code == 75, err
    run = RunDirectory.open(place / "term-evaluation")
    assert [step["step"] for step in run.steps()] == [1, 2, 3]
    assert list(evaluations(run.path)) == [0, 3]
    code, err = ended(drive(place, how("term-evaluation", **extra), "none", measures=True))
    assert code == 0, err
    assert history(run.path) == history(whole)


@pytest.mark.sweep
def test_fault_49_sigterm_in_the_evaluation_of_the_base_model(place: Path, how: Any, whole: Path) -> None:
    extra = {"evaluate.metric_rows": 2, "max_new_tokens": 2}
    code, err = ended(drive(place, how("term-base", **extra), "evaluation", measures=True, call=2))
    assert code == 75, err
    assert RunDirectory.open(place / "term-base").steps() == []
    code, err = ended(drive(place, how("term-base", **extra), "none", measures=True))
    assert code == 0, err
    assert history(place / "term-base") == history(whole)


def test_fault_49_sigterm_in_a_save(place: Path, how: Any, whole: Path) -> None:
    code, err = ended(drive(place, how("term-save"), "save", step=4))
    assert code == 75, err
    run = RunDirectory.open(place / "term-save")
    assert run.run["status"] == "preempted"
    last = run.steps()[-1]["step"]
    assert last in (4, 5)  # 5 where the signal came as the save had just ended
    assert (run.checkpoints / f"checkpoint-{last}" / "manifest.json").exists()
    goes_on_as(whole, run.path)


def test_fault_50_sigterm_twice_and_then_kill(place: Path, how: Any, whole: Path) -> None:
    process = drive(place, how("term-twice"), "slow", step=4)
    until((place / "in-step").exists, process)
    process.terminate()
    time.sleep(0.3)
    assert process.poll() is None  # the first one waits for the end of the step
    process.terminate()
    code, err = ended(process)
    assert code == 75, err
    run = RunDirectory.open(place / "term-twice")
    assert [step["step"] for step in run.steps()] == [1, 2, 3]
    copy = place / "term-kill"
    shutil.copytree(run.path, copy)
    goes_on_as(whole, run.path)

    (place / "in-step").unlink()
    shutil.rmtree(run.path)
    copy.rename(run.path)
    process = drive(place, how("term-twice"), "slow", step=4)
    until((place / "in-step").exists, process)
    process.terminate()
    process.kill()
    code, _ = ended(process)
    assert code == -signal.SIGKILL
    goes_on_as(whole, run.path)


def test_fault_51_sigint(place: Path, how: Any, whole: Path) -> None:
    code, err = ended(drive(place, how("int"), "step", step=3, signal=int(signal.SIGINT)))
    assert code == 75, err
    assert "Traceback" not in err
    run = RunDirectory.open(place / "int")
    assert "SIGINT" in events(run.path, "preempted")[0]["reason"]
    assert [step["step"] for step in run.steps()] == [1, 2, 3]
    goes_on_as(whole, run.path)


# ---------------------------------------------------------------------- 52 and 53: the loader


def test_fault_52_a_loader_worker_is_killed(place: Path, how: Any, whole: Path) -> None:
    asked = how("worker", num_workers=2)
    code, err = ended(drive(place, asked, "worker", step=2, signal=int(signal.SIGKILL)))
    assert code == 0, err
    run = place / "worker"
    assert [event["kind"] for event in events(run, "incident")] == ["worker"]
    assert [event["action"] for event in events(run, "recovery")] == ["restart_loader"]
    assert len(events(run, "run_started")) == 1  # in place
    assert history(run) == history(whole)


def test_fault_53_the_loader_hangs(place: Path, how: Any, whole: Path) -> None:
    """Its workers are frozen: the loader is started again in place, once."""
    asked = how("loader", num_workers=1) | {"recover.hang_seconds": 30}  # a worker that starts anew is no hang
    code, err = ended(drive(place, asked, "loader", step=2))
    run = RunDirectory.open(place / "loader")
    assert code == 0, err
    assert [event["action"] for event in run.events() if event["event"] == "recovery"] == ["restart_loader"]
    (report,) = (run.path / "failures").glob("*-worker.json")
    stacks = report.with_suffix(".txt").read_text()
    assert "dataloader.py" in stacks
    assert "most recent call first" in stacks
    assert history(run.path) == history(whole)


def test_fault_53_a_step_hangs(place: Path, how: Any, whole: Path) -> None:
    asked = how("hang") | {"recover.hang_seconds": 8}
    code, err = ended(drive(place, asked, "hang", step=4))
    assert code == 5, err
    assert "no sign of life" in err
    run = RunDirectory.open(place / "hang")
    assert (run.run["status"], run.read_json("status.json")["exit_code"]) == ("failed", 5)
    (report,) = (run.path / "failures").glob("*.json")
    document = json.loads(report.read_text())
    assert (document["kind"], document["action"], document["evidence"]["step"]) == ("hung", "restart", 3)
    assert "on_step_begin" in (report.parent / document["traceback"]).read_text()
    assert [event["kind"] for event in events(run.path, "incident")] == ["hung"]
    goes_on_as(whole, run.path)


# ---------------------------------------------------------------------- 54: ranks


@pytest.mark.parametrize(
    ("rank", "number"),
    [
        pytest.param(1, signal.SIGKILL, id="second killed"),
        pytest.param(0, signal.SIGSTOP, id="main frozen", marks=pytest.mark.sweep),
        pytest.param(0, signal.SIGKILL, id="main killed", marks=pytest.mark.sweep),
        pytest.param(1, signal.SIGSTOP, id="second frozen", marks=pytest.mark.sweep),
    ],
)
def test_fault_54_a_rank_is_gone(place: Path, how: Any, rank: int, number: int) -> None:
    name = f"rank-{rank}-{int(number)}"
    asked = how(name) | {"recover.hang_seconds": 10, "global_batch_size": 6}
    config = str(accelerate_config_path("cpu_ddp"))
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
    code, err = ended(drive(place, asked, "rank", *accelerate, step=4, rank=rank, signal=int(number)))
    assert code != 0
    run = RunDirectory.open(place / name)
    reports = [json.loads(path.read_text()) for path in (run.path / "failures").glob("*.json")]
    assert reports, err
    assert {report["kind"] for report in reports} <= {"killed", "hung"}, reports
    assert [step["step"] for step in run.steps()][-1] == 3
    code, err = ended(drive(place, asked, "none", *accelerate))
    assert code == 0, err
    assert run.run["status"] == "finished"
    assert [step["step"] for step in run.steps()] == [1, 2, 3, 4, 5, 6]
    # The evaluation after step 3 was the best so far, and the best is saved.
    assert events(run.path, "run_started")[-1]["resumed_from"] == "checkpoints/checkpoint-3"


# ---------------------------------------------------------------------- 55: the clock

SHIFTED = """
import os, time

_shift = float(os.environ["TEST_CLOCK_SHIFT"])
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + _shift
time.time_ns = lambda: _time_ns() + int(_shift * 1e9)
"""


@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_fault_55_the_clock_is_stepped(
    place: Path, how: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shift: float
) -> None:
    """Between two parts of a run: the second has another clock, and files of the first seem that much younger."""
    asked = how(f"clock{shift:+.0f}", keep=2) | {"save.every_steps": 1}
    code, err = ended(drive(place, asked, "step", step=3))
    assert code == 75, err
    run = RunDirectory.open(Path(asked["output"]))
    for path in [run.path, *run.path.rglob("*")]:
        os.utime(path, times=(path.stat().st_atime - shift, path.stat().st_mtime - shift))
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(SHIFTED))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("TEST_CLOCK_SHIFT", str(shift))
    if faketime := _libfaketime():
        monkeypatch.setenv("LD_PRELOAD", faketime)
        monkeypatch.setenv("FAKETIME", f"{shift:+.0f}s")
        monkeypatch.setenv("TEST_CLOCK_SHIFT", "0")
    code, err = ended(drive(place, asked, "none"))
    assert code == 0, err
    assert events(run.path, "run_started")[1]["resumed_from"] == "checkpoints/checkpoint-3"
    assert history(run.path) == history(whole)
    best = run.run["best"]["step"]
    kept = {path.name for path in run.checkpoints.iterdir()}
    assert kept >= {"checkpoint-6", "checkpoint-5", f"checkpoint-{best}"}
    assert "checkpoint-2" not in kept - {f"checkpoint-{best}"}


def _libfaketime() -> str | None:
    found = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), *Path("/usr/lib/faketime").glob("libfaketime.so.1")]
    return str(found[0]) if found else None


# ---------------------------------------------------------------------- 56 and 57: several at once


def test_fault_56_two_runs_in_one_directory(place: Path, how: Any, whole: Path) -> None:
    first = drive(place, how("shared"), "slow", step=3)
    (place / "in-step").unlink(missing_ok=True)
    until((place / "in-step").exists, first)
    code, err = ended(drive(place, how("shared"), "none"))
    assert code == 2, err
    assert f"is in use: process {first.pid} on " in err
    first.kill()
    ended(first)
    run = RunDirectory.open(place / "shared")
    assert [step["step"] for step in run.steps()] == [1, 2]
    goes_on_as(whole, run.path)  # what the dead one held does not count


def test_fault_56_a_lock_is_free_though_a_child_of_its_holder_lives(tmp_path: Path) -> None:
    """Workers are forked from the process that holds the lock, and may outlive it for some seconds."""
    code = """
    import os, sys, time
    from llmtune.runs import RunDirectory
    run = RunDirectory.create(sys.argv[1], identity={})
    hears, says = os.pipe()
    with run.lock():
        if os.fork() == 0:
            os.write(says, b"!")
            time.sleep(30)
            os._exit(0)
        os.read(hears, 1)
        print("held", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "r")]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    run = RunDirectory.open(tmp_path / "r")
    assert run.is_live
    process.kill()
    process.wait()
    try:
        assert not run.is_live
        with run.lock():
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


STUDY = """
import json, sys, time
from pathlib import Path
from llmtune.errors import LlmtuneError
from llmtune.study import Study

if __name__ == "__main__":
    data, output, gate, number, settings = *sys.argv[1:5], json.loads(sys.argv[5])
    study = Study(data, trials=2, output=output, **settings)
    import llmtune.study.trials, llmtune.finetuner.facade, llmtune.training.train, transformers
    Path(gate, number).touch()
    while len(list(Path(gate).iterdir())) < 6:
        time.sleep(0.001)
    try:
        study.run()
    except LlmtuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


def test_fault_57_six_workers_start_one_study_together(place: Path, tmp_path: Path) -> None:
    """One has the study at a time; the others are told who has it, and none of them damages its storage."""
    import sqlite3

    (tmp_path / "study.py").write_text(textwrap.dedent(STUDY))
    (tmp_path / "gate").mkdir()
    how = {"model": "builtin:tiny", "max_steps": 2, "global_batch_size": 4, "evaluate.every_steps": 1}
    command = [sys.executable, str(tmp_path / "study.py"), str(place / "lamps.jsonl"), str(tmp_path / "s")]
    workers = [
        subprocess.Popen(
            [*command, str(tmp_path / "gate"), str(number), json.dumps(how)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
            text=True,
            start_new_session=True,
        )
        for number in range(6)
    ]
    results = [ended(worker) for worker in workers]
    codes = sorted(code for code, _ in results)
    assert codes[0] == 0, results
    assert set(codes) <= {0, 2}, results
    assert all("is in use: " in err for code, err in results if code == 2)
    with sqlite3.connect(tmp_path / "s" / "study.db") as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        states = database.execute("SELECT state FROM trials").fetchall()
    assert [state for (state,) in states] == ["COMPLETE", "COMPLETE"]
    assert len(list((tmp_path / "s" / "trials").glob("trial-*"))) == 2
