"""``llmtune checkpoints``: what a run has kept, whether it can be trusted, which is best, and what to do with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtune.cli.app import command
from llmtune.cli.options import Json, Run, find_run
from llmtune.console import speaker

if TYPE_CHECKING:
    from llmtune.checkpoints import CheckpointInfo

ACTIONS = ("list", "info", "verify", "best", "prune", "average")

Action = Annotated[
    str, typer.Argument(metavar="[ACTION]", help="list (the default), info, verify, best, prune or average.")
]
Metric = Annotated[
    str | None,
    typer.Option("--metric", metavar="NAME", help="What best means; the run's own evaluate.metric if not given."),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where", metavar="CONDITION", help="list: those of which it is true, e.g. 'eval_loss<1.5'; repeatable."
    ),
]
Step = Annotated[int | None, typer.Option("--step", metavar="N", help="info: of which; the newest if not given.")]
Keep = Annotated[int | None, typer.Option("--keep", metavar="N", help="prune: newest ones kept besides the best.")]
Last = Annotated[int | None, typer.Option("--last", metavar="N", help="average: the newest N; 3 if not given.")]
Best = Annotated[int | None, typer.Option("--best", metavar="N", help="average: the best N by --metric instead.")]
Target = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="average: where it goes; RUN/averaged if not given.")
]


@command(
    "checkpoints",
    example="""
llmtune checkpoints chats-tinyllama-3f9a1c --where healthy=true --where 'eval_loss<1.5'
llmtune checkpoints chats-tinyllama-3f9a1c average --best 3 --output averaged""",
)
def checkpoints(
    run: Run,
    action: Action = "list",
    where: Where = None,
    step: Step = None,
    metric: Metric = None,
    keep: Keep = None,
    last: Last = None,
    best: Best = None,
    output: Target = None,
    as_json: Json = False,
) -> None:
    """Show the checkpoints of a run, or do something with them.

    list shows them, and verify ends with code 6 if a file of any differs from its manifest; both read every byte. info
    shows everything that is known about one, by the names that --where takes. best names the best one. prune deletes
    old ones; the best, the newest healthy one and what does not verify stay. average writes the arithmetic mean of
    several as a directory that peft or transformers loads.
    """
    given = {"--where": where, "--step": step, "--keep": keep, "--last": last, "--best": best, "--output": output}
    _require(action, {name for name, value in given.items() if value is not None})
    path = find_run(run)
    if action == "list":
        _list(path, where or [], as_json)
    elif action == "info":
        _info(path, step, as_json)
    elif action == "verify":
        _verify(path, as_json)
    elif action == "best":
        _best(path, metric, as_json)
    elif action == "prune":
        _prune(path, keep, metric, as_json)
    else:
        _average(path, last, best, metric, output, as_json)


def _require(action: str, given: set[str]) -> None:
    from llmtune.errors import ConfigError, did_you_mean

    if action not in ACTIONS:
        raise ConfigError("checkpoints", [f"'{action}' is unknown{did_you_mean(action, ACTIONS)}"])
    taken = {
        "list": {"--where"},
        "info": {"--step"},
        "prune": {"--keep"},
        "average": {"--last", "--best", "--output"},
    }.get(action, set())
    problems = [f"{name} means nothing to {action}" for name in sorted(given - taken)]
    if {"--last", "--best"} <= given:
        problems.append("got --last and --best; give one of them")
    if problems:
        raise ConfigError("checkpoints", problems)


def _list(run: Path, where: list[str], as_json: bool) -> None:
    from llmtune.checkpoints import matching

    infos = matching(_infos(run), where)
    if as_json:
        speaker.emit([_shown(info) for info in infos])
    elif not infos:
        speaker.say(f"{run} has no {'such ' if where else ''}checkpoints")
    else:
        _table(infos)


def _info(run: Path, step: int | None, as_json: bool) -> None:
    from llmtune.checkpoints import facts_of
    from llmtune.errors import ConfigError

    infos = {info.step: info for info in _infos(run)}
    wanted = step if step is not None else max(infos, default=None)
    if wanted not in infos:
        known = ", ".join(map(str, infos)) or "none"
        raise ConfigError("--step", [f"{run} has no checkpoint of step {wanted or 'any'}; there are: {known}"])
    facts = facts_of(infos[wanted])
    if as_json:
        speaker.emit(facts)
    else:
        speaker.table("", ("name", "value"), [(name, _number(value)) for name, value in facts.items()])


def _verify(run: Path, as_json: bool) -> None:
    from llmtune.errors import CheckpointError

    infos = _infos(run)
    if as_json:
        speaker.emit([_shown(info) for info in infos])
    else:
        for info in infos:
            speaker.show(f"{info.path.name}: {info.reason}")
    bad = [info for info in infos if not info.verified]
    if bad:
        named = ", ".join(f"{info.path.name} ({info.reason})" for info in bad)
        raise CheckpointError(
            f"{run}: {len(bad)} of {len(infos)} checkpoints do not verify: {named}. A resume passes over them; "
            "restore them from a backup, or leave them"
        )


def _best(run: Path, metric: str | None, as_json: bool) -> None:
    info = _ranked(run, metric)[0]
    if as_json:
        speaker.emit(_shown(info))
    else:
        speaker.show(str(info.path))


def _prune(run: Path, keep: int | None, metric: str | None, as_json: bool) -> None:
    from llmtune.checkpoints import best_of, list_checkpoints, retain
    from llmtune.checkpoints.retention import FEWEST
    from llmtune.errors import ConfigError
    from llmtune.runs import RunDirectory

    if keep is not None and keep < FEWEST:
        raise ConfigError("--keep", [f"got {keep}, expected {FEWEST} or more: one alone would be no safety"])
    directory = RunDirectory.open(run)
    settings = directory.run["config"]
    name, greater = _metric(settings, metric)
    with directory.lock():
        best = best_of(list_checkpoints(directory.checkpoints), name, greater_is_better=greater)
        done = retain(
            directory.checkpoints,
            keep=settings["save"]["keep"] if keep is None else keep,
            best=best.path if best is not None else None,
        )
        for step in done.deleted:
            directory.event("checkpoint_deleted", step, deleted_step=step)
        for info in done.rejected:
            directory.event("checkpoint_rejected", info.step, path=info.path.name, reason=info.reason)
    if as_json:
        speaker.emit({"deleted": list(done.deleted), "put_aside": [info.step for info in done.rejected]})
        return
    deleted = ", ".join(str(step) for step in done.deleted) or "none"
    speaker.show(f"deleted: {deleted}")
    for info in done.rejected:
        speaker.warn(f"{info.path.name} is put aside: {info.reason}")


def _average(
    run: Path, last: int | None, best: int | None, metric: str | None, output: str | None, as_json: bool
) -> None:
    from llmtune.checkpoints import average
    from llmtune.errors import CheckpointError

    wanted = best or last or 3
    infos = _ranked(run, metric) if best is not None else [info for info in _infos(run) if info.verified]
    if len(infos) < wanted:
        raise CheckpointError(f"{run}: {wanted} checkpoints were to be averaged, and {len(infos)} can be")
    chosen = infos[:wanted]
    target = average([info.path for info in chosen], Path(output) if output is not None else run / "averaged")
    if as_json:
        speaker.emit({"path": str(target), "steps": [info.step for info in chosen]})
    else:
        speaker.show(f"{target}: the mean of steps {', '.join(str(info.step) for info in chosen)}")


def _infos(run: Path) -> list[CheckpointInfo]:
    from llmtune.checkpoints import list_checkpoints
    from llmtune.runs import RunDirectory

    return list_checkpoints(RunDirectory.open(run).checkpoints)


def _ranked(run: Path, metric: str | None) -> list[CheckpointInfo]:
    """Verified checkpoints that have the metric, best first."""
    from llmtune.checkpoints import metric_of
    from llmtune.errors import CheckpointError, ConfigError, did_you_mean
    from llmtune.runs import RunDirectory

    name, greater = _metric(RunDirectory.open(run).run["config"], metric)
    good = [info for info in _infos(run) if info.verified]
    values = {info.step: metric_of(info, name) for info in good}
    having = [info for info in good if values[info.step] is not None]
    if not having:
        known = sorted({key for info in good for key in info.metrics})
        if known and metric is not None:
            raise ConfigError("--metric", [f"'{metric}' is in no checkpoint{did_you_mean(metric, known)}"])
        raise CheckpointError(f"{run}: no checkpoint that verifies has the metric {name}")
    sign = 1 if greater else -1
    return sorted(having, key=lambda info: (sign * (values[info.step] or 0.0), info.step), reverse=True)


def _metric(config: dict[str, Any], asked: str | None) -> tuple[str, bool]:
    """Name and direction: as the run was set, for another metric smaller is better for losses and perplexity."""
    set_to = config["evaluate"]
    name = asked or set_to["metric"]
    if name.removeprefix("eval_") == set_to["metric"].removeprefix("eval_") and set_to["greater_is_better"] is not None:
        return name, bool(set_to["greater_is_better"])
    return name, not name.endswith(("loss", "perplexity"))


def _shown(info: CheckpointInfo) -> dict[str, Any]:
    """One entry of the JSON: the keys of the contract, and what else its manifest says."""
    told = ("cursor", "data_fingerprint", "versions", "num_ranks")
    return info.to_json() | {key: info.facts[key] for key in told if key in info.facts}


def _table(infos: list[CheckpointInfo]) -> None:
    from llmtune.units import format_bytes

    rows = [
        (
            info.step,
            "yes" if info.verified else "no",
            "yes" if info.healthy else "no",
            format_bytes(info.num_bytes) if info.verified else "",
            "  ".join(f"{key.removeprefix('eval_')} {_number(value)}" for key, value in sorted(info.metrics.items()))
            if info.verified
            else info.reason,
        )
        for info in infos
    ]
    speaker.table("", ("step", "verified", "healthy", "size", "metrics"), rows)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
