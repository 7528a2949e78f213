"""Commands that look at data: check."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtune.cli.app import command
from llmtune.cli.leakage import show_leakage
from llmtune.cli.options import Asked, Config, Env, EvalData, Format, Json, MaybeData, Set, configured
from llmtune.console import quieten_libraries, speaker
from llmtune.errors import ConfigError, DataError
from llmtune.units import format_bytes

if TYPE_CHECKING:
    from llmtune.config import RunConfig
    from llmtune.data import DataReport
    from llmtune.finetuner.rows import Inputs

# What a terminal shows of a long list; --json has all of it.
MOST_PROBLEMS = 20
# Near duplicates are looked for without being asked in data up to this size: about five seconds on two cores.
NEAR_DUPLICATES_UP_TO_BYTES = 100_000_000

TokensOf = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="Also tokenise for this model and check what is learned.")
]
Fix = Annotated[
    str | None,
    typer.Option("--fix", metavar="OUT", help="Write the good rows to OUT.jsonl, the others to OUT.quarantine.jsonl."),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite the files of --fix where they exist.")]
Near = Annotated[
    bool | None,
    typer.Option(
        "--near-duplicates/--no-near-duplicates",
        help="Look for rows that nearly repeat others; the default for data up to 100 MB.",
    ),
]


@command("check", example="llmtune check chats.jsonl\nllmtune check chats.jsonl --fix clean.jsonl")
def check(
    data: MaybeData = None,
    model: TokensOf = None,
    eval_data: EvalData = None,
    format: Format = None,
    config: Config = None,
    env: Env = None,
    settings: Set = None,
    fix: Fix = None,
    force: Force = False,
    near: Near = None,
    as_json: Json = False,
) -> None:
    """Find every problem in DATA.

    Reads every row and reports with file and line; exit code 3 when there are problems.
    """
    from llmtune.finetuner.rows import inputs_of, tell_reading

    _require_place(fix, data, force=force)
    format_setting = [] if format is None else [f"data.format={format}"]
    asked = Asked(data=data, model=model, eval_data=eval_data)
    wanted = configured(asked, config, [*(settings or ()), *format_setting], env)
    inputs = inputs_of(wanted, None)
    tell_reading(inputs)
    report, tokenizer = _report(wanted, inputs, with_tokens=model is not None, near=near)
    _show(report, as_json)
    if fix is not None:
        from llmtune.data import write_fixed
        from llmtune.hardware.processes import stoppable

        with stoppable():
            good, bad = write_fixed(
                inputs.train, fix, tokenizer=tokenizer, supervise=wanted.data.supervise, overwrite=force
            )
        speaker.say(f"{good:,} good rows written to {fix}, {bad:,} rows to the quarantine file beside it")
        if good:
            return
    if not report.ok:
        raise typer.Exit(DataError.exit_code)


def _require_place(fix: str | None, data: str | None, *, force: bool) -> None:
    """Refuse --fix where its files cannot go, before anything is read."""
    from llmtune.data.fix import require_place

    if fix is not None:
        require_place(Path(fix), data, overwrite=force)
    elif force:
        raise ConfigError("--force", ["is only valid with --fix OUT, whose files it overwrites"])


def _report(wanted: RunConfig, inputs: Inputs, *, with_tokens: bool, near: bool | None) -> tuple[DataReport, Any]:
    """The report, and the tokenizer that helped with it."""
    from llmtune.finetuner import facts, rows

    num_bytes = sum(reading.source.num_bytes for reading in inputs.train)
    if near is None:
        near = num_bytes <= NEAR_DUPLICATES_UP_TO_BYTES
    report = rows.check_data(
        inputs, near_duplicates=near and not with_tokens, compare=not (with_tokens and inputs.trainable)
    )
    if not with_tokens:
        return report, None
    quieten_libraries()
    model = facts.model_of(wanted, facts.machine_of(wanted), inputs, download=True)
    assert model.tokenizer is not None
    if not inputs.trainable:
        return report, model.tokenizer
    data = rows.examined(wanted, inputs, model.tokenizer, model.spec)
    return rows.full_report(report, data), model.tokenizer


def _show(report: DataReport, as_json: bool) -> None:
    if as_json:
        speaker.emit(report.to_json())
        return
    from llmtune.reporting import data_account

    account = data_account(report.to_json())
    if report.problems:
        found = report.problems[:MOST_PROBLEMS]
        shown = [(p.place, p.field, f"{p.problem}; {p.hint}" if p.hint else p.problem) for p in found]
        speaker.table("Problems", ("where", "field", "problem"), shown)
    if report.num_problems > MOST_PROBLEMS:
        speaker.show(f"… and {report.num_problems - MOST_PROBLEMS:,} more problems; --json lists up to 10,000.")
    facts: list[tuple[str, object]] = [
        ("format", f"{report.format} ({report.reason})"),
        ("rows", f"{report.rows:,}, {report.bad_rows:,} of them with a problem"),
        ("size", format_bytes(report.bytes)),
    ]
    if report.unused:
        facts.append(("not used", ", ".join(report.unused)))
    facts += [(spread.name, _plain(spread.values)) for spread in account.spreads]
    facts += [(name, _plain(value)) for name, value in (*account.text, *account.supervision)]
    if account.complexity is not None:
        facts.append(("complexity", f"{account.complexity:.2f} on a scale from 0 to 1 ({account.size_class} data)"))
    facts += [(f"duplicates, {name}", _plain(value)) for name, value in account.duplicates.items()]
    facts += [(f"leakage, {name}", _plain(value)) for name, value in account.leakage.items()]
    if report.duplicates.near_rows is None:
        facts.append(("near duplicates", "not looked for; --near-duplicates does"))
    speaker.table("", ("fact", "value"), [(name.replace("_", " "), value) for name, value in facts])
    if report.advice:
        advice = [(each.severity, f"{each.finding}. {each.suggestion}") for each in report.advice]
        speaker.table("Advice", ("", "what and why"), advice)
    if report.leakage is not None and report.leakage.places:
        show_leakage(report.leakage)
    if report.not_trainable is not None:
        speaker.warn(report.not_trainable)
    speaker.show(report.verdict)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_plain(item)}" for key, item in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.3g}"
    return f"{int(value):,}" if isinstance(value, (int, float)) else str(value)
