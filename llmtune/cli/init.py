"""The wizard: init."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtune.cli.app import command
from llmtune.cli.interview import WIDEST, Interview, aligned
from llmtune.cli.options import (
    Asked,
    EvalData,
    Format,
    HardwareFile,
    Json,
    Method,
    Model,
    Output,
    Preset,
    Set,
    configured,
)
from llmtune.console import speaker
from llmtune.errors import ConfigError, DataError, OutputError, UnknownColumnsError
from llmtune.units import format_bytes, format_seconds, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from llmtune.config import RunConfig
    from llmtune.data import DataReport
    from llmtune.planning import Plan
    from llmtune.wizard import Draft, Limits, Wizard

CONFIG_FILE = "llmtune.yaml"
_SECONDS = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}

Data = Annotated[str | None, typer.Argument(metavar="DATA", help="File, directory or glob; asked for if not given.")]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", metavar="SIZE", help="Keep the run within this memory, e.g. 8GB.")
]
MaxTime = Annotated[
    str | None,
    typer.Option("--max-time", metavar="TIME", help="Keep the predicted time within this, e.g. 90min or 2h."),
]
OutputFile = Annotated[
    str, typer.Option("--output-file", "-o", metavar="FILE", help="Where to write the configuration.")
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the file if it exists.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: options answer, defaults for the rest.")]


@command("init", example="llmtune init chats.jsonl\nllmtune init chats.jsonl --yes --preset quality --max-memory 8GB")
def init(
    data: Data = None,
    model: Model = None,
    preset: Preset = None,
    method: Method = None,
    output: Output = None,
    eval_data: EvalData = None,
    format: Format = None,
    settings: Set = None,
    max_memory: MaxMemory = None,
    max_time: MaxTime = None,
    hardware: HardwareFile = None,
    output_file: OutputFile = CONFIG_FILE,
    force: Force = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Write a configuration for train, question by question.

    Checks DATA, asks at most five questions, each with what the answers would cost on this machine, shows the plan
    and writes a commented YAML file. Outside a terminal, or with --yes, nothing is asked.
    """
    interview, file = Interview(answered=speaker.answered and not yes and not as_json), Path(output_file)
    _require_place(file, replaceable=force or interview.answered)
    asked = Asked(data=data, model=model, preset=preset, method=method, output=output, eval_data=eval_data)
    try:
        wanted = configured(asked, None, [*(settings or ()), *([f"data.format={format}"] if format else ())])
        wizard, wanted = _wizard(wanted, _limits(max_memory, max_time), hardware, interview, as_json=as_json)
        draft, file = _drafted(wizard, wanted, interview, file, force=force)
        _write(file, draft.text)
    except (KeyboardInterrupt, EOFError):
        from llmtune.cli.program import INTERRUPTED

        speaker.error("\nstopped; nothing was written")
        raise typer.Exit(INTERRUPTED) from None
    _tell(draft, file, as_json)


def _require_place(file: Path, *, replaceable: bool) -> None:
    if not file.parent.is_dir():
        raise OutputError(f"cannot write {file}: there is no directory {file.parent}; make it, or name another file")
    if file.is_dir():
        raise OutputError(f"cannot write {file}: it is a directory; choose another --output-file")
    if file.exists() and not replaceable:
        raise OutputError(f"{file} exists; pass --force to overwrite it, or another --output-file")


def _limits(max_memory: str | None, max_time: str | None) -> Limits:
    from llmtune.wizard import Limits

    problems: list[str] = []
    max_bytes = max_seconds = None
    if max_memory is not None:
        try:
            max_bytes = parse_bytes(max_memory)
        except ValueError as error:
            problems.append(f"--max-memory: {error}")
    if max_time is not None:
        match = re.fullmatch(r"\s*(\d*\.?\d+)\s*([a-z]+)\s*", max_time.lower())
        if match and match[2] in _SECONDS:
            max_seconds = float(match[1]) * _SECONDS[match[2]]
        else:
            problems.append(f"--max-time: got '{max_time}', expected a time such as 90min or 2h")
    if problems:
        raise ConfigError("command line", problems)
    return Limits(max_bytes=max_bytes, max_seconds=max_seconds)


def _wizard(
    wanted: RunConfig, limits: Limits, hardware: str | None, interview: Interview, *, as_json: bool
) -> tuple[Wizard, RunConfig]:
    """Machine and data, looked at and told of.

    Raises:
        Exit: The data have problems, which are listed as `check` does.
    """
    from llmtune.finetuner import facts, rows
    from llmtune.hardware import Hardware
    from llmtune.wizard import Wizard, data_question, settled

    machine = facts.machine_of(wanted, None if hardware is None else Hardware.from_file(hardware))
    speaker.say(f"machine: {machine.hardware.describe()}")
    if wanted.data.path is None and not wanted.data.sources:
        if not interview.answered:
            raise ConfigError("DATA", ["no data was given; pass a file, a directory or a glob"])
        names = [path.name for path in Path().iterdir() if path.is_file()]
        wanted = settled(wanted, interview.ask(data_question(names)))
    try:
        inputs = rows.inputs_of(wanted, None)
    except UnknownColumnsError as unknown:
        if not interview.answered or not unknown.columns:
            raise
        wanted = settled(wanted, _columns(unknown, interview))
        inputs = rows.inputs_of(wanted, None)
    rows.tell_reading(inputs)
    report = rows.check_data(inputs)
    _require_good(report, wanted, as_json=as_json)
    _tell_data(report)
    return Wizard(machine=machine, inputs=inputs, report=report, limits=limits), wanted


def _columns(unknown: UnknownColumnsError, interview: Interview) -> Mapping[str, Any]:
    """Ask which columns are question and answer, or which one holds texts."""
    from llmtune.wizard import column_question

    chosen = interview.ask(column_question("prompt", unknown, {}))
    field = "completion" if chosen else "text"
    if chosen and len(unknown.columns) < 2:
        raise unknown
    return interview.ask(column_question(field, unknown, chosen.get("data.columns", {})))


def _require_good(report: DataReport, wanted: RunConfig, *, as_json: bool) -> None:
    try:
        report.raise_if_bad(wanted.data.on_bad_row)
    except DataError:
        from llmtune.cli.data import check
        from llmtune.config.write import settings_of

        settings = [f"{key}={value}" for key, value in settings_of(wanted).items() if key.startswith("data.")]
        check(settings=settings, near=False, as_json=as_json)  # lists every problem and ends with exit code 3
        raise


def _tell_data(report: DataReport) -> None:
    from llmtune.finetuner.account import tell_data

    found = f"{report.rows:,} rows, {format_bytes(report.bytes)}, {report.format} ({report.reason})"
    speaker.say(f"data: {found}" + ("" if report.bad_rows else ", no problems"))
    tell_data(report)


def _drafted(wizard: Wizard, wanted: RunConfig, interview: Interview, file: Path, *, force: bool) -> tuple[Draft, Path]:
    """What is decided, by questions where somebody answers them, and where it goes."""
    from llmtune.wizard import decide, file_question

    situation = wizard.begin(wanted)
    if interview.answered:
        situation = decide(situation, interview.ask)
        if file.exists() and not force:
            file = Path(interview.ask(file_question(file))["file"])
    return wizard.draft(situation.config, str(file)), file


def _write(file: Path, text: str) -> None:
    from llmtune.runs.documents import write_atomically

    try:
        write_atomically(file, text.encode())
    except OSError as error:
        raise OutputError(f"cannot write {file}: {error.strerror}; choose another --output-file") from None


def _tell(draft: Draft, file: Path, as_json: bool) -> None:
    """The plan in short, the file, and what to do with it."""
    from llmtune.cli.tell import show_next

    if as_json:
        speaker.emit({"file": str(file), **draft.to_json()})
        return
    speaker.show("\nPlan")
    for line in aligned([*_in_short(draft.plan)], WIDEST):
        speaker.show(line)
    for notice in draft.plan.notices:
        speaker.warn(notice)
    if draft.config.model.token is not None:
        speaker.warn(f"the access token is not written to {file}; set HF_TOKEN when you train")
    speaker.show(f"\nWritten to {file}: every number with its reason.")
    quoted = shlex.quote(str(file))
    show_next(
        [
            ("train", f"llmtune train --config {quoted}"),
            ("see the whole plan", f"llmtune plan --config {quoted}"),
        ]
    )


def _in_short(plan: Plan) -> Iterator[tuple[str, str]]:
    method = plan.method.value
    adapter = "" if method == "full" else f", rank {plan.rank.value}"
    yield "model", plan.model.value
    yield "method", f"{method}{adapter}, {plan.precision.value} on {plan.device.value}"
    yield "rows", f"{plan.data_size.reason}, the longest of {plan.max_length.value:,} tokens"
    passes = f"{plan.epochs.value:g} {'pass' if plan.epochs.value == 1 else 'passes'}"
    updates = f"{plan.updates.value:,} updates of {plan.global_batch_size.value} rows"
    yield "training", f"{passes}, {updates}, learning rate up to {plan.learning_rate.value:g}"
    memory, time = plan.memory, plan.time
    peak, free = format_bytes(memory.peak_bytes), format_bytes(memory.free_bytes)
    yield "memory", f"{peak} of {free} free on {memory.device}: {'fits' if plan.fits else 'does not fit'}"
    yield "disk", f"{format_bytes(plan.disk_bytes)} of {format_bytes(plan.disk_free_bytes)} free"
    low, high = format_seconds(time.low_seconds), format_seconds(time.high_seconds)
    yield "time", f"about {format_seconds(time.total_seconds)}; {low} to {high} would be no surprise"
