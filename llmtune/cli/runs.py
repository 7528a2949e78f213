"""Commands that tell of runs: runs, show, report."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import Json, Run, find_run
from llmtune.console import speaker

Root = Annotated[
    str | None, typer.Option("--root", metavar="DIR", help="Folder of runs; runs/ or LLMTUNE_OUTPUT_ROOT if not given.")
]
Rebuild = Annotated[bool, typer.Option("--rebuild", help="Make the index anew from the run directories first.")]
Status = Annotated[
    str | None, typer.Option("--status", metavar="STATUS", help="planned, running, finished, preempted or failed.")
]
OfModel = Annotated[str | None, typer.Option("--model", metavar="TEXT", help="Only models whose id contains this.")]
Open = Annotated[bool, typer.Option("--open", help="Open it in the browser.")]


@command("runs", example="llmtune runs --status finished")
def runs(
    root: Root = None, rebuild: Rebuild = False, status: Status = None, model: OfModel = None, as_json: Json = False
) -> None:
    """List runs, newest first."""
    from llmtune.config import load_config, store_url
    from llmtune.errors import ConfigError, did_you_mean
    from llmtune.runs import STATUSES, RunStore

    if status is not None and status not in STATUSES:
        raise ConfigError("--status", [f"'{status}' is unknown{did_you_mean(status, STATUSES)}"])
    store = RunStore(store_url(), root=load_config({"output.root": root}).output.root)
    if rebuild:
        speaker.say(f"{len(store.rebuild())} runs indexed")
    found = store.runs(status=status, model=model)
    if as_json:
        speaker.emit([record.to_json() for record in found])
    elif not found:
        speaker.say(f"no runs in {store.root}")
    else:
        columns = ("name", "status", "model", "steps", "started", "best")
        rows = [(r.name, r.status, r.model, r.steps, (r.started or "")[:16], _best(r.best)) for r in found]
        speaker.table("", columns, rows)


@command("show", example="llmtune show chats-tinyllama-3f9a1c")
def show(run: Run, as_json: Json = False) -> None:
    """Tell what became of a run.

    State, verdict, measures, incidents, the plan with its reasons, and what to do next.
    """
    from llmtune.cli.tell import show_metrics, show_next, show_plan
    from llmtune.reporting import summarise

    summary = summarise(find_run(run))
    if as_json:
        speaker.emit(summary.to_json())
        return
    speaker.show(f"{summary.name}: {summary.state}")
    speaker.show(summary.verdict.text)
    if summary.note:
        speaker.show(summary.note)
    facts = [("directory", summary.dir), ("model", summary.model), ("data", summary.data_name)]
    facts += [("preset", summary.preset), ("started", summary.started), ("ended", summary.finished)]
    speaker.table("", ("fact", "value"), facts)
    show_metrics(summary)
    if summary.happenings:
        rows = [(item.step, item.event.replace("_", " "), item.text) for item in summary.happenings]
        speaker.table("What happened", ("step", "event", "what"), rows)
    if summary.plan:
        show_plan((row.choice, row.value, row.source, row.reason) for row in summary.plan)
    show_next(summary.next_commands)


@command("report", example="llmtune report chats-tinyllama-3f9a1c --open")
def report(run: Run, open_it: Open = False) -> None:
    """Write the report of a run anew.

    Prints where report.html is.
    """
    from llmtune.reporting import write_report

    path = write_report(find_run(run))
    speaker.show(str(path))
    if open_it:
        import webbrowser

        if not webbrowser.open(path.as_uri()):
            speaker.warn("no browser could be started")


def _best(best: dict[str, object] | None) -> str:
    if not best:
        return ""
    value = best.get("value")
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"{best.get('metric')} {shown} at step {best.get('step')}"
