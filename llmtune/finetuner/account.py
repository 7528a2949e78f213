"""The account of a run: which directory it has, what is written at its start and at every kind of end."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llmtune.checkpoints import list_checkpoints, step_of
from llmtune.config import RunConfig, store_url
from llmtune.console import speaker
from llmtune.data import DataReport, summarise, unused_sentence
from llmtune.errors import (
    ConfigError,
    LlmtuneError,
    OutputError,
    Preempted,
    RecoveryExhausted,
    RunNotFoundError,
    TrainingError,
    UserCodeError,
)
from llmtune.finetuner.result import RunResult
from llmtune.hardware import Hardware
from llmtune.hardware.processes import ending
from llmtune.planning import Plan
from llmtune.planning.correction import experience
from llmtune.runs import RunDirectory, RunStore, choose_directory, derive_name, is_run, redact
from llmtune.training.recovery import (
    Attempt,
    Failure,
    Remedy,
    attempts_of,
    classify,
    note_incident,
    recovery,
    write_failure,
)
from llmtune.training.recovery.origin import phase_of, updates_done
from llmtune.training.recovery.report import failure_text, resume_command

if TYPE_CHECKING:
    from llmtune.training import TrainingOutcome

PACKAGES = ("llmtune", "torch", "transformers", "accelerate", "peft", "datasets", "bitsandbytes", "optuna", "numpy")


def open_run(config: RunConfig, identity: dict[str, str], *, data_name: str) -> RunDirectory:
    """The directory this configuration runs in: as given, else derived so that the same command finds it again.

    Raises:
        OutputError: It cannot be written, or holds a run of another identity, or one that ``--resume never`` forbids
            to continue.
    """
    fresh = config.recover.resume == "never"
    if config.output.dir is not None:
        path = Path(config.output.dir)
        if fresh and is_run(path):
            raise OutputError(f"{path} already holds a run and --resume never was given; choose another --output")
        return RunDirectory.create(path, identity=identity)
    name = derive_name(data_name=data_name, model_id=identity["model"], identity_hash=identity["config"])
    return RunDirectory.create(
        choose_directory(config.output.root, name, {"fresh": "yes"} if fresh else identity), identity=identity
    )


def require_writable(config: RunConfig) -> None:
    """Fail now, not after an hour of tokenising, when the output cannot be written.

    Raises:
        OutputError: The nearest existing directory of the output refuses a new file.
    """
    wanted = Path(config.output.dir or config.output.root).absolute()
    place = next(path for path in (wanted, *wanted.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise OutputError(f"cannot write to {place}: {error.strerror}. Choose another --output.") from None


def tell_data(report: DataReport) -> None:
    """Say what is learned of the data, and what would be worth doing about it."""
    found = report.supervision
    if found is not None:
        learned = f"{found.supervised_tokens:,} of {found.tokens:,} tokens are learned ({found.supervised_share:.0%})"
        speaker.say(f"supervision: {learned}, every mask proven by decoding")
    tell_unused(report.unused)
    if report.bad_rows:
        listed = summarise(report.problems, more=report.num_problems - len(report.problems))
        speaker.warn(f"data: {report.bad_rows:,} of {report.rows:,} rows are skipped: {listed}")
    if report.dropped_duplicates:
        speaker.say(
            f"data: {report.dropped_duplicates:,} rows are left out because they repeat others or the evaluation data"
        )
    for advice in report.advice:
        tell = speaker.warn if advice.severity == "warning" else speaker.say
        tell(f"data: {advice.finding}. {advice.suggestion}")


def tell_unused(names: Sequence[str]) -> None:
    """Name the columns and parts of the data that hold something and are not read."""
    if names:
        speaker.say(f"data: {unused_sentence(names)}")


def begin(run: RunDirectory, *, config: RunConfig, plan: Plan, fingerprint: str, hardware: Hardware) -> None:
    """Write what is known before weights load: configuration, plan and environment."""
    run.update_run(
        status="planned",
        command=shlex.join(sys.argv),
        config=config.to_json(),
        config_files=list(config.origin.files),
        config_env=config.origin.env,
        seeds={"seed": plan.seed.value},
        parent_run=None,
        model=plan.model.value,
        data=config.data.path or ", ".join(source.path for source in config.data.sources) or None,
        preset=plan.preset.value,
        data_fingerprint=fingerprint,
    )
    run.add_plan(plan.to_json())
    run.write_environment(environment(hardware, fingerprint))


def started(run: RunDirectory, plan: Plan, resume_from: Path | None, processes: int) -> None:
    """The run begins or goes on; from here on it is never discarded."""
    step = step_of(resume_from) if resume_from else 0
    source = str(resume_from.relative_to(run.path)) if resume_from and resume_from.is_relative_to(run.path) else None
    run.update_run(status="running")
    run.event("run_started", step, resumed_from=source, processes=processes, pid=os.getpid())
    run.event("plan", step, file=run.plans[-1].name, memory_bytes=plan.memory.peak_bytes, updates=plan.updates.value)
    run.write_status(
        state="running", step=step, of=plan.updates.value, eta_seconds=None, loss=None, last_checkpoint=source
    )
    index(run)


def environment(hardware: Hardware, data_fingerprint: str) -> dict[str, Any]:
    """Versions, machine, commit, threads: what it takes to do it again."""
    import torch

    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    wanted = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT", "CUDA_VISIBLE_DEVICES", "WORLD_SIZE", "HF_HUB_OFFLINE")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "hardware": hardware.to_json(),
        "git_commit": _git_commit(),
        "data_fingerprint": data_fingerprint,
        "threads": {"torch": torch.get_num_threads(), "interop": torch.get_num_interop_threads()},
        "environment": {name: os.environ[name] for name in wanted if name in os.environ},
    }


def _git_commit() -> str | None:
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@contextmanager
def told(run: RunDirectory) -> Iterator[None]:
    """Whatever ends the block is written down: status, event, failure report, exit code, report page, run store.

    Raises:
        RecoveryExhausted: What the machine did could not be mended; names the last good checkpoint and the report.
        UserCodeError: A callback or metric of the user's raised; names it.
        LlmtuneError: What was raised on purpose, as it was; else a defect of ours, whose traceback is named.
    """
    try:
        yield
    except Preempted as stop:
        step = _last_step(run)
        command = resume_command(run)
        run.event("preempted", step, reason=str(stop), command=command)
        _close(run, "preempted", Preempted.exit_code)
        raise Preempted(f"{stop}. Continue with: {command}") from None
    except Exception as error:
        with ending():
            ended = _failed(run, error)
        if ended is error:
            raise
        raise ended from error


def finish(run: RunDirectory, outcome: TrainingOutcome) -> RunResult:
    """Write down a run that came to its end."""
    metric = run.run["config"]["evaluate"]["metric"]
    value = outcome.metrics.get(metric, outcome.metrics.get(metric.removeprefix("eval_")))
    best = None if outcome.best_step is None else {"metric": metric, "value": value, "step": outcome.best_step}
    run.update_run(metrics=dict(outcome.metrics), best=best)
    run.event("run_finished", outcome.steps, metrics=dict(outcome.metrics), best_step=outcome.best_step)
    _close(run, "finished", 0)
    return RunResult.of(run)


def index(run: RunDirectory) -> None:
    """Tell the run store; losing the store loses nothing, so its failure is a warning."""
    try:
        RunStore(store_url(), root=run.run["config"]["output"]["root"]).index(run.path)
    except ConfigError:
        raise
    except Exception as error:  # the store is an index over run directories, whatever its database says
        speaker.warn(f"the run store could not be written: {error}; `llmtune runs --rebuild` makes it anew")


def _failed(run: RunDirectory, error: Exception) -> LlmtuneError:
    """Write down what ended the run; returns what to raise."""
    failure = classify(
        error,
        step=_last_step(run) if (done := updates_done(error)) is None else done,
        phase=phase_of(error),
        free_disk_bytes=lambda: shutil.disk_usage(run.path).free,
        free_inodes=lambda: _free_inodes(run.path),
        needed_disk_bytes=_checkpoint_bytes(run),
    )
    attempts = attempts_of(run.events())
    plan = _plan_of(run)
    remedy = None if plan is None else recovery(failure, plan, attempts)
    checkpoint = _last_good(run)
    action = "restart" if remedy is not None and remedy.action in ("restart", "restart_loader") else "stop"
    try:
        report = write_failure(run, error, failure, action=action, tried=attempts, checkpoint=checkpoint)
    except (OutputError, RunNotFoundError):
        report = _aside(failure_text(run, error, failure, tried=attempts, checkpoint=checkpoint))
    ended = _to_raise(run, error, failure, report, checkpoint, _why(error, failure, remedy, attempts))
    with _as_far_as_possible():
        if failure.kind != "refused":
            note_incident(run, failure)
        where = str(report.relative_to(run.path)) if report.is_relative_to(run.path) else str(report)
        run.event("run_failed", _last_step(run), kind=failure.kind, cause=failure.cause, failure=where)
        _close(run, "failed", ended.exit_code)
    return ended


def _to_raise(
    run: RunDirectory, error: Exception, failure: Failure, report: Path, checkpoint: Path | None, reason: str
) -> LlmtuneError:
    """The error for the user: one sentence for what happened, one for where the account is, one for what to do."""
    stands = "There is no checkpoint yet" if checkpoint is None else f"The last good checkpoint is {checkpoint}"
    account = f"{stands}; continue with: {resume_command(run)}. Failure report: {report}"
    if type(error) is TrainingError:
        return TrainingError(f"{error}. {account}")
    nothing_started = isinstance(error, OutputError) and failure.step == 0
    if isinstance(error, RecoveryExhausted):
        return RecoveryExhausted(failure, reason, account)
    if isinstance(error, LlmtuneError) and (failure.kind != "disk" or nothing_started):
        return error
    raised = f"{type(error).__name__}: {error}"
    text = report.with_suffix(".txt")
    if failure.kind == "user_code":
        return UserCodeError(
            f"your {failure.evidence['owner']} raised {raised} ({failure.evidence['where']}). It is not tried again: "
            f"mend it, then continue with: {resume_command(run)}. The traceback is in {text}"
        )
    if failure.kind == "defect":
        return LlmtuneError(
            f"{raised}. This is a defect of llmtune or of code handed to it; the traceback is in {text}"
        )
    return RecoveryExhausted(failure, reason, account)


def _why(error: Exception, failure: Failure, remedy: Remedy | None, attempts: Sequence[Attempt]) -> str:
    """Why it ends here: what was tried in vain, else what happened."""
    if isinstance(error, RecoveryExhausted):
        return error.reason
    in_vain = any(one.failure.kind == failure.kind for one in attempts)
    return remedy.reason if in_vain and remedy is not None and remedy.action == "stop" else failure.cause


@contextmanager
def _as_far_as_possible() -> Iterator[None]:
    """A block that writes into the run directory, which may be what failed: that is said, the first error stands."""
    try:
        yield
    except (OutputError, RunNotFoundError) as error:
        speaker.warn(f"the end of the run could not be written down: {error}")


def _aside(text: str) -> Path:
    """A report that the run directory cannot take, in the folder for temporary files."""
    descriptor, name = tempfile.mkstemp(prefix="llmtune-failure-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(redact(text))
    return Path(name)


def _plan_of(run: RunDirectory) -> Plan | None:
    try:
        document = run.latest_plan()
    except RunNotFoundError:
        return None
    return None if document is None else Plan.from_json(document)


def _last_good(run: RunDirectory) -> Path | None:
    """The newest healthy checkpoint; where none is, the newest that verifies."""
    try:
        verified = [info for info in list_checkpoints(run.checkpoints) if info.verified]
    except OSError:
        return None
    best = next((info for info in verified if info.healthy), next(iter(verified), None))
    return None if best is None else best.path


def _checkpoint_bytes(run: RunDirectory) -> int | None:
    """What the newest checkpoint takes on disk, as a measure of what the next one needs."""
    try:
        newest = max(run.checkpoints.glob("checkpoint-*"), key=step_of, default=None)
        return None if newest is None else sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    except (OSError, ValueError):
        return None


def _free_inodes(path: Path) -> int | None:
    """Inodes that are left; None where the file system counts none."""
    found = os.statvfs(path)
    return found.f_favail if found.f_files else None


def _close(run: RunDirectory, status: str, exit_code: int) -> None:
    run.end(status, exit_code=exit_code)
    if measured := _measured(run, run.steps()):
        run.update_run(**measured)
    try:
        if run.run["config"]["monitor"]["report"]:
            from llmtune.reporting import write_report

            write_report(run.path)
    except Exception as error:  # the report retells what the run directory holds; without it nothing is lost
        speaker.warn(f"the report could not be written: {error!r}; try `llmtune report {run.path}`")
    try:
        index(run)
    except ConfigError as error:  # its address was good when the run began; what ended the run counts
        speaker.warn(str(error))


def _measured(run: RunDirectory, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """What the run took, for its report, and what that teaches about predictions, for the runs after it."""
    document = run.latest_plan()
    if document is None or not steps:
        return {}
    saves = [event.get("seconds", 0.0) for event in run.events() if event["event"] == "checkpoint_saved"]
    seconds = [step["step_seconds"] for step in steps]
    usual = median(seconds[1:] or seconds)  # the first one compiles kernels
    peak = max(step["memory_bytes"] for step in steps)
    took = {
        "steps": len(steps),
        "step_seconds": usual,
        "training_seconds": sum(seconds),
        "evaluation_seconds": sum(evaluation.get("seconds", 0.0) for evaluation in run.evaluations()),
        "save_seconds": sum(saves),
        "memory_bytes": peak,
    }
    plan = Plan.from_json(document)
    if plan.measured is None:
        return {"measured": took}
    learned = experience(
        plan.measured,
        precision=plan.precision.value,
        quantization=plan.quantization.value,
        step_seconds=usual,
        peak_bytes=None if plan.token_budget.source == "measured" else peak,
    )
    return {"measured": took, "experience": learned.to_json()}


def _last_step(run: RunDirectory) -> int:
    steps = run.steps()
    return int(steps[-1]["step"]) if steps else 0
