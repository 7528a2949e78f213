"""Commands that look at data: check."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import Asked, Config, Data, Json, Set, configured
from llmtune.console import quieten_libraries, speaker
from llmtune.errors import DataError
from llmtune.units import format_bytes

if TYPE_CHECKING:
    from llmtune.config import RunConfig
    from llmtune.data import DataReport, Source

# What a terminal shows of a long list; --json has all of it.
MOST_PROBLEMS = 20

TokensOf = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="Also tokenise for this model and check what is learned.")
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="Take the rows for this format instead of recognising it."),
]
Fix = Annotated[
    str | None,
    typer.Option("--fix", metavar="OUT", help="Write the good rows to OUT.jsonl, the others to OUT.quarantine.jsonl."),
]


@command("check", example="llmtune check chats.jsonl\nllmtune check chats.jsonl --fix clean.jsonl")
def check(
    data: Data,
    model: TokensOf = None,
    format: Format = None,
    config: Config = None,
    settings: Set = None,
    fix: Fix = None,
    as_json: Json = False,
) -> None:
    """Find every problem in DATA.

    Reads every row and reports with file and line; exit code 3 when there are problems.
    """
    from llmtune.data import resolve, write_fixed

    format_setting = [] if format is None else [f"data.format={format}"]
    wanted = configured(Asked(data=data, model=model), config, [*(settings or ()), *format_setting])
    source = resolve(data)
    report = _report(wanted, source, with_tokens=model is not None)
    _show(report, as_json)
    if fix is not None:
        good, bad = write_fixed(source, fix, report=report, format=wanted.data.format, columns=wanted.data.columns)
        speaker.say(f"{good:,} good rows written to {fix}, {bad:,} rows to the quarantine file beside it")
        if good:
            return
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


def _report(wanted: RunConfig, source: Source, *, with_tokens: bool) -> DataReport:
    from llmtune.data import check as check_rows

    form, columns = wanted.data.format, wanted.data.columns
    if not with_tokens:
        return check_rows(source, format=form, columns=columns)
    from llmtune.finetuner import facts

    quieten_libraries()
    model = facts.model_of(wanted, facts.machine_of(wanted), source, download=True)
    return check_rows(
        source,
        format=form,
        columns=columns,
        tokenizer=model.tokenizer,
        max_length=wanted.data.max_length or model.spec.context,
    )


def _show(report: DataReport, as_json: bool) -> None:
    if as_json:
        speaker.emit(report.to_json())
        return
    rows: list[tuple[str, object]] = [
        ("format", f"{report.format} ({report.reason})"),
        ("rows", f"{report.rows:,}, {report.bad_rows:,} of them with a problem"),
        ("size", format_bytes(report.bytes)),
    ]
    rows += [(name.replace("_", " "), _plain(value)) for name, value in report.statistics.items()]
    if report.supervision is not None:
        counts = report.supervision
        rows += [("tokens", f"{counts.tokens:,}"), ("supervised tokens", f"{counts.supervised_tokens:,}")]
        rows += [(name.replace("_", " "), _plain(value)) for name, value in counts.to_json().items()]
    speaker.table("", ("fact", "value"), rows)
    if report.problems:
        found = report.problems[:MOST_PROBLEMS]
        shown = [(f"{p.file}:{p.line}", p.field, f"{p.problem}; {p.hint}" if p.hint else p.problem) for p in found]
        speaker.table("Problems", ("where", "field", "problem"), shown)
    if len(report.problems) > MOST_PROBLEMS:
        speaker.show(f"… and {len(report.problems) - MOST_PROBLEMS:,} more problems; --json lists all of them.")


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
