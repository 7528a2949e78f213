"""The parent of a training: when it starts it again, when it does not, and what it passes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtune import restarts
from llmtune.checkpoints.manifest import write_manifest
from llmtune.errors import ConfigError, Preempted, TrainingError
from llmtune.hardware.processes import SUPERVISOR, is_supervised, stoppable
from llmtune.restarts import Progress, Supervision, progress_of, supervise
from llmtune.runs import RunDirectory

ROOT = str(Path(__file__).parents[1])
IDENTITY = {"data": "d", "model": "m", "config": "c"}

# Stands in for a training: each start does the next of a list of acts, with a real run directory and its real lock.
CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from llmtune.runs import RunDirectory
from llmtune.runs.heartbeat import Heartbeat

place, acts, starts = Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3])
number = len(starts.read_text().split()) if starts.exists() else 0
with starts.open("a") as file:
    file.write(f"{os.getpid()} ")
act = acts[min(number, len(acts) - 1)]
if act.get("early"):
    os.kill(os.getpid(), act["early"])
run = RunDirectory.create(place, identity={"data": "d", "model": "m", "config": "c"})
with run.lock():
    if number == 0:
        run.update_run(status="running")
    for step in act.get("steps", []):
        run.event("step", step, loss=1.0)
    if act.get("beats"):
        Heartbeat(run.path).beat()
    if act.get("wait"):
        received = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: received.append(int(number)))
        (starts.parent / "ready").touch()
        while not received:
            time.sleep(0.01)
        (starts.parent / "asked").write_text(str(received))
    if act.get("report"):
        run.write_failure(RuntimeError("x"), kind="hardware", cause="the device was lost", action=act["report"])
    if act.get("kill"):
        os.kill(os.getpid(), act["kill"])
    if act.get("beats"):
        time.sleep(60)
os._exit(act.get("exit", 0))
"""


@pytest.fixture(autouse=True)
def _no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restarts, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(restarts, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(restarts, "SEARCH_SECONDS", 0.02)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Supervision]:
    def make(
        *acts: dict[str, Any], restarts: int = 9, hang_seconds: float = 60.0, derived: bool = False
    ) -> Supervision:
        (tmp_path / "child.py").write_text(CHILD)
        run = tmp_path / "runs" / "r"
        command = [sys.executable, str(tmp_path / "child.py"), str(run), json.dumps(acts), str(tmp_path / "starts")]
        return Supervision(
            command=command,
            restarts=restarts,
            hang_seconds=hang_seconds,
            output=None if derived else run,
            root=tmp_path / "runs",
        )

    return make


def starts(tmp_path: Path) -> int:
    return len((tmp_path / "starts").read_text().split())


def told(tmp_path: Path) -> list[tuple[str, Any]]:
    events = RunDirectory.open(tmp_path / "runs" / "r").events()
    return [(e["event"], e.get("kind") or e.get("action")) for e in events if e["event"] != "step"]


KILL, SEGV = int(signal.SIGKILL), int(signal.SIGSEGV)


@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.parametrize("how", [{"kill": KILL}, {"kill": SEGV}, {"exit": 137}, {"exit": 139}])
def test_a_killed_training_is_started_again(
    job: Callable[..., Supervision], tmp_path: Path, how: dict[str, int], derived: bool
) -> None:
    assert supervise(job({"steps": [1]} | how, {"steps": [2]}, derived=derived)) == 0
    assert starts(tmp_path) == 2
    assert told(tmp_path) == [("incident", "killed"), ("recovery", "restart")]
    run = RunDirectory.open(tmp_path / "runs" / "r")
    (recovery,) = [event for event in run.events() if event["event"] == "recovery"]
    assert (recovery["step"], recovery["restart"]) == (1, 1)
    assert not run.is_live


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 75, 130])
def test_what_another_start_would_not_change_is_not_started_again(
    job: Callable[..., Supervision], tmp_path: Path, code: int
) -> None:
    assert supervise(job({"steps": [1], "exit": code})) == code
    assert starts(tmp_path) == 1
    assert told(tmp_path) == []


def test_a_failure_report_decides(job: Callable[..., Supervision], tmp_path: Path) -> None:
    assert supervise(job({"steps": [1], "report": "restart", "exit": 5}, {"report": "stop", "exit": 5})) == 5
    assert starts(tmp_path) == 2
    assert told(tmp_path) == [("recovery", "restart")]


@pytest.mark.parametrize("code", [2, 3, 4, 6])
def test_errors_of_the_user_are_final_whatever_was_reported(
    job: Callable[..., Supervision], tmp_path: Path, code: int
) -> None:
    assert supervise(job({"report": "restart", "exit": code})) == code
    assert starts(tmp_path) == 1


def test_nothing_is_repeated_without_progress(job: Callable[..., Supervision], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"2 starts in a row made no progress.*1\. .*SIGKILL.*2\. ") as caught:
        supervise(job({"steps": [1], "kill": KILL}))
    assert starts(tmp_path) == 3  # the first one made the step that the others repeat
    assert caught.value.exit_code == 5
    run = RunDirectory.open(tmp_path / "runs" / "r")
    assert (run.run["status"], run.read_json("status.json")["exit_code"]) == ("failed", 5)
    (report,) = (run.path / "failures").glob("*.json")
    assert len(json.loads(report.read_text())["evidence"]["tried"]) == 3
    assert str(report) in str(caught.value)
    assert told(tmp_path)[-1] == ("run_failed", "killed")


def test_a_training_that_dies_before_it_has_a_directory_is_given_up(
    job: Callable[..., Supervision], tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match="Nothing was trained yet"):
        supervise(job({"early": KILL}))
    assert starts(tmp_path) == 2
    assert not (tmp_path / "runs").exists()


def test_progress_renews_patience_but_not_the_number_of_restarts(
    job: Callable[..., Supervision], tmp_path: Path
) -> None:
    acts = [{"steps": [step], "kill": KILL} for step in (1, 2, 3)]
    with pytest.raises(TrainingError, match="started again 2 times, which is all"):
        supervise(job(*acts, {}, restarts=2))
    assert starts(tmp_path) == 3


def test_a_new_checkpoint_is_progress_only_if_it_verifies(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "r", identity=IDENTITY)
    for step in (2, 4):
        checkpoint = run.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"w" * step)
        write_manifest(checkpoint, {"step": step})
    assert progress_of(run, Progress()) == Progress(checkpoint=4)
    (run.checkpoints / "checkpoint-4" / "weights").write_bytes(b"other")
    assert progress_of(run, Progress()) == Progress(checkpoint=2)
    assert progress_of(run, Progress(checkpoint=2, step=7)) == Progress(checkpoint=2, step=7)
    run.event("step", 9, loss=1.0)
    assert progress_of(run, Progress(checkpoint=2, step=7)) == Progress(checkpoint=2, step=9)


@pytest.mark.parametrize("how", [{}, {"kill": int(signal.SIGSTOP)}])
def test_a_training_without_a_sign_of_life_is_killed_and_started_again(
    job: Callable[..., Supervision], tmp_path: Path, how: dict[str, int]
) -> None:
    assert supervise(job({"steps": [1], "beats": True} | how, {}, hang_seconds=0.3)) == 0
    assert starts(tmp_path) == 2
    assert told(tmp_path) == [("incident", "hung"), ("recovery", "restart")]


def test_under_a_launcher_it_is_refused(job: Callable[..., Supervision], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match=r"torchrun --max-restarts"):
        supervise(job({}))


def test_a_run_that_was_told_where_to_begin_goes_on_from_where_it_came(tmp_path: Path) -> None:
    def again(resume: str, run: RunDirectory | None) -> list[str]:
        job = Supervision(command=["x"], restarts=1, hang_seconds=1, output=None, root=tmp_path, resume=resume)
        return job.command_again(run)

    run = RunDirectory.create(tmp_path / "r", identity=IDENTITY)
    goes_on = ["x", "--resume", "auto", "--output", str(run.path)]
    assert again("auto", run) == again("never", None) == again("some/checkpoint-4", run) == ["x"]
    assert again("never", run) == goes_on
    (run.checkpoints / "checkpoint-8").mkdir(parents=True)
    assert again("some/checkpoint-4", run) == goes_on


# ---------------------------------------------------------------------- the parent as a process of its own

PARENT = """
import sys
from pathlib import Path
from llmtune import restarts
from llmtune.restarts import Supervision, supervise

restarts.FIRST_PAUSE = 0.01
place = Path(sys.argv[1])
code = supervise(Supervision(command=sys.argv[2:], restarts=3, hang_seconds=60, output=place, root=place.parent))
heavy = [name for name in ("torch", "transformers", "datasets", "peft", "accelerate", "numpy") if name in sys.modules]
sys.stderr.write(",".join(heavy))
sys.exit(code)
"""


def parent(job: Supervision) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(job.output), *job.command]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on_and_75_ends(job: Callable[..., Supervision], tmp_path: Path, number: int) -> None:
    process = parent(job({"wait": True, "exit": 75}))
    wait_for(tmp_path / "ready", process)
    child = int((tmp_path / "starts").read_text())
    assert os.getpgid(child) == child  # a terminal's Ctrl-C does not reach it on its own
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, b"")
    assert (tmp_path / "asked").read_text() == str([int(number)])
    assert starts(tmp_path) == 1


def test_a_signal_that_kills_a_child_without_handlers_ends_with_75(
    job: Callable[..., Supervision], tmp_path: Path
) -> None:
    process = parent(job({"beats": True}))
    wait_for(tmp_path / "runs" / "r" / ".heartbeat", process)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert starts(tmp_path) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_a_killed_parent_takes_its_child_along(job: Callable[..., Supervision], tmp_path: Path) -> None:
    process = parent(job({"wait": True, "exit": 75}))
    wait_for(tmp_path / "ready", process)
    process.kill()
    process.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while not (tmp_path / "asked").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (tmp_path / "asked").read_text() == str([int(signal.SIGTERM)])


def test_the_parent_loads_nothing_heavy_and_output_passes_untouched(tmp_path: Path) -> None:
    output = b"\xff\x00 not text\r\x1b[31m" * 1000
    code = f"import os; os.write(1, {output!r})"
    job = Supervision(
        command=[sys.executable, "-c", code], restarts=1, hang_seconds=60, output=tmp_path / "r", root=tmp_path
    )
    out, err = parent(job).communicate(timeout=60)
    assert (out, err) == (output, b"")


# ---------------------------------------------------------------------- signals outside of the loop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_block_with_nothing_to_save_at_once(number: int) -> None:
    before = signal.getsignal(number)
    reached = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            reached.append("after the signal")
        except Exception:  # what libraries do on the way
            reached.append("caught")

    with pytest.raises(Preempted, match=signal.Signals(number).name) as caught, stoppable():
        work()
    assert reached == []
    assert caught.value.exit_code == 75
    assert signal.getsignal(number) is before


def test_supervision_does_not_reach_grandchildren(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SUPERVISOR, str(os.getppid()))
    assert is_supervised()
    code = "from llmtune.hardware.processes import is_supervised; print(is_supervised())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
