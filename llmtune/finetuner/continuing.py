"""How a begun run goes on, and what it means for it that something has changed since; see `changes.TABLE`."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtune.config import RunConfig, load_config, resolve_key
from llmtune.console import speaker
from llmtune.errors import ConfigError, OutputError, RunNotFoundError
from llmtune.finetuner.changes import DATA, DEVICE, PACKAGES, PROCESSES, SHARDING, Change
from llmtune.planning import Plan, PlanRequest, make_plan
from llmtune.runs import RunDirectory

if TYPE_CHECKING:
    from llmtune.finetuner.facts import BaseModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Continued:
    """How a begun run goes on.

    Attributes:
        plan: What it goes on by.
        changes: What is not as it was when it was begun; all of it can be taken.
        extends: Whether there are more updates to make than it was begun with.
        is_new_plan: Whether ``plan`` is another one than it went by so far.
    """

    plan: Plan
    changes: tuple[Change, ...]
    extends: bool
    is_new_plan: bool


def changed_settings(run: RunDirectory, config: RunConfig, identity: Mapping[str, str]) -> tuple[Change, ...]:
    """What differs from what the run was begun with, of all that decides its result: data and configuration."""
    if not run.run.get("config"):  # it was stopped before anything was decided
        return ()
    before, now = _deciding(_begun_with(run)), _deciding(config)
    found = [Change(name=key, before=before[key], now=now[key]) for key in now if before[key] != now[key]]
    held = run.run.get("identity") or {}
    if held.get("data") != identity["data"]:
        found.append(Change(name=DATA, before=held.get("data"), now=identity["data"]))
    return tuple(found)


def changed_surroundings(run: RunDirectory, begun: Plan, fresh: Plan) -> tuple[Change, ...]:
    """What changed around a begun run that nobody has set: processes, kind of device, versions of packages."""
    found = []
    if begun.processes.value != fresh.processes.value:
        found.append(Change(name=PROCESSES, before=begun.processes.value, now=fresh.processes.value))
    if begun.sharding.value != fresh.sharding.value:
        found.append(Change(name=SHARDING, before=begun.sharding.value, now=fresh.sharding.value))
    if begun.device.value.split(":")[0] != fresh.device.value.split(":")[0]:
        found.append(Change(name=DEVICE, before=begun.device.value, now=fresh.device.value))
    before = run.read_json("environment.json").get("versions", {})
    differing = [name for name, version in before.items() if version is not None and version != _version(name)]
    if differing:
        old, new = ({name: of(name) for name in differing} for of in (before.get, _version))
        found.append(Change(name=PACKAGES, before=old, now=new))
    return tuple(found)


def require_continuable(
    run: RunDirectory, identity: Mapping[str, str], changes: Sequence[Change], *, asked: bool
) -> None:
    """Let a begun run go on with ``changes``, or refuse.

    Args:
        run: The begun run.
        identity: That of the present command.
        changes: What differs.
        asked: The run itself was named, to be continued with these changes; else a new one was asked for in its place.

    Raises:
        OutputError: Names both identities, every difference, and the ways out.
    """
    refused = [change for change in changes if change.rule.effect == "refused"]
    unasked = [change for change in changes if change.flag is not None and change.rule.effect != "extends"]
    if refused or (unasked and not asked):
        raise OutputError(
            f"{_another(run, identity)}. In detail: {'; '.join(map(str, refused or unasked))}. "
            f"{_ways_out(run, changes, refused)}"
        )


def _another(run: RunDirectory, identity: Mapping[str, str]) -> str:
    held = run.run.get("identity") or {}
    differing = ", ".join(sorted(key for key in held.keys() | identity.keys() if held.get(key) != identity.get(key)))
    if not differing:
        return f"{run.path} cannot go on under other conditions"
    both = f"it has {_spelled(held)}, this one has {_spelled(identity)}"
    return f"{run.path} holds another run: {both} ({differing} differs)"


def _ways_out(run: RunDirectory, changes: Sequence[Change], refused: Sequence[Change]) -> str:
    resume = f"llmtune resume {run.path}"
    ways = [f"continue the run as it was begun with `{resume}`", "start another with another --output"]
    flags = [change.flag for change in changes if change.flag is not None]
    if flags and not refused:
        ways.insert(1, f"take the change from here on with `{' '.join([resume, *flags])}`")
    if any(change.name == DATA for change in refused):
        ways[0] = "put the data back as they were"
    return f"Ways out: {'; '.join(ways)}."


def continued(
    run: RunDirectory,
    identity: Mapping[str, str],
    request: PlanRequest,
    fresh: Plan,
    changes: Sequence[Change],
    *,
    asked: bool,
) -> Continued | None:
    """How ``run`` goes on; None where it has not begun.

    Args:
        run: The run of this command.
        identity: That of this command.
        request: What a plan is made from now.
        fresh: The plan made from it.
        changes: See `changed_settings`.
        asked: See `require_continuable`.

    Raises:
        OutputError: Something around the run has changed that it cannot go on with, or it would become shorter unasked.
    """
    document, is_finished = run.latest_plan(), run.run["status"] == "finished"
    if document is None or not (is_finished or run.steps()):
        return None
    begun = Plan.from_json(document)
    changes = (*changes, *changed_surroundings(run, begun, fresh))
    require_continuable(run, identity, changes, asked=asked)
    plan = plan_to_continue_by(begun, request, changes)
    before, now = begun.updates.value, plan.updates.value
    if now < before and not (asked or is_finished):
        raise OutputError(
            f"{_another(run, identity)}: {before:,} updates, of which {now:,} were asked for now. "
            f"{_ways_out(run, changes, [])}"
        )
    return Continued(plan=plan, changes=changes, extends=now > before, is_new_plan=plan != begun)


def plan_to_continue_by(in_force: Plan, request: PlanRequest, changes: Iterable[Change]) -> Plan:
    """The plan in force with everything chosen anew that ``changes`` ask for, and nothing else."""
    names = {name for change in changes for name in change.rule.choices}
    if not names:
        return in_force
    train = request.config.train.model_copy(
        update={"global_batch_size": in_force.global_batch_size.value, "method": in_force.method.value}
    )
    config = request.config.model_copy(update={"train": train})
    fresh = make_plan(replace(request, config=config), alternatives=False)
    anew = {name: getattr(fresh, name) for name in names}
    return replace(in_force, **anew, time=fresh.time)


def take_up(
    run: RunDirectory,
    identity: Mapping[str, str],
    config: RunConfig,
    base: BaseModel,
    continued: Continued | None,
    checkpoint: Path | None,
) -> None:
    """Before the first update: write down what the run goes on by, and say what has changed.

    Raises:
        OutputError: The base model is not the one that the run, or the checkpoint, was begun with.
    """
    from llmtune.checkpoints import read_manifest, set_aside_after, step_of
    from llmtune.training.rewind import leave_course

    made_with = run.run.get("base_model") or (read_manifest(checkpoint).get("base_model") if checkpoint else None)
    if made_with is not None:
        require_same_base(run, made_with, base)
    step = step_of(checkpoint) if checkpoint else 0
    if checkpoint is not None and config.recover.resume != "auto":
        leave_course(run, checkpoint, step)
    elif checkpoint is not None:  # those after it were rejected, and said so
        set_aside_after(run.checkpoints, step)
    run.update_run(identity=dict(identity), base_model=base.to_json())
    if continued is None or not continued.changes:
        return
    if continued.is_new_plan:
        run.add_plan(continued.plan.to_json())
    for change in continued.changes:
        speaker.warn(f"changed since the run was begun: {change}")
    told = run.run.get("changes", [])
    changes = [*told, *({"step": step} | change.to_json() for change in continued.changes)]
    run.update_run(config=config.to_json(), changes=changes)


def configuration_of(run: RunDirectory, settings: Mapping[str, Any], flags: Sequence[str]) -> RunConfig:
    """The configuration that a run was begun with, and changes on top of it.

    Args:
        run: The begun run.
        settings: Keys, in full or by a unique leaf name, with values.
        flags: Changes as of ``--set``: ``key=value``.

    Raises:
        ConfigError: A key or value that cannot be used.
        RunNotFoundError: It was stopped before it had a configuration.
    """
    document, problems = _begun_with(run).to_json(), []
    document["recover"]["resume"] = "auto"  # how it was begun is over
    asked = set()
    for key, value in [*settings.items(), *(flag.split("=", 1) for flag in flags if "=" in flag)]:
        try:
            full = resolve_key(key)
        except ValueError as error:
            problems.append(str(error))
            continue
        asked.add(full)
        if key in settings:
            group, _, leaf = full.partition(".")
            document[group][leaf] = value
    if problems:
        raise ConfigError("resume", problems)
    if "train.epochs" in asked and "train.max_steps" not in asked:
        document["train"]["max_steps"] = None  # it would win over what is asked for now
    return load_config(document, settings=flags, environ={}, where="resume")


def require_same_base(run: RunDirectory, before: Mapping[str, Any], now: BaseModel) -> None:
    """Refuse to go on from another base model; a commit of the Hub, or the content of all files, tells it.

    Raises:
        OutputError: Names the files that differ.
    """
    held = before["files"]
    if held == now.files or (before["commit"] is not None and before["commit"] == now.commit):
        return
    differing = sorted(name for name in held.keys() | now.files.keys() if held.get(name) != now.files.get(name))
    commit = before["commit"]
    back = f"take those of then with `--set model.revision={commit}`" if commit else "put those of then back"
    raise OutputError(
        f"{run.path} was begun with another base model: {', '.join(differing)} differ; the weights of its checkpoints "
        f"belong to that one. Ways out: {back}; start another run with another --output."
    )


def require_same_run(checkpoint: Path, manifest: Mapping[str, Any], run: RunDirectory) -> None:
    """Refuse a checkpoint that was made by another run.

    Raises:
        ConfigError: Names both identities.
    """
    if checkpoint.absolute().parent == run.checkpoints:
        return
    held, own = manifest.get("identity") or {}, run.run.get("identity") or {}
    if dict(held) != dict(own):
        differing = ", ".join(sorted(key for key in held.keys() | own.keys() if held.get(key) != own.get(key)))
        raise ConfigError(
            "--resume",
            [
                f"{checkpoint} is of another run: its manifest has {_spelled(held)}, this run has {_spelled(own)} "
                f"({differing} differs); --resume auto takes this run's own checkpoints"
            ],
        )


def _begun_with(run: RunDirectory) -> RunConfig:
    document = run.run.get("config")
    if not document:
        raise RunNotFoundError(
            f"{run.path} was stopped before it was planned; give the command again that was to start it"
        )
    return load_config(document, environ={}, where=str(run.path / "run.json"))


def _deciding(config: RunConfig) -> dict[str, Any]:
    """Every key that is part of a run's identity, with its value; places of files are not."""
    document = config.to_json()
    keys = {
        f"{group}.{leaf}": value
        for group, values in document.items()
        if group not in ("output", "recover", "monitor")
        for leaf, value in values.items()
        if f"{group}.{leaf}" not in ("data.path", "data.eval_path")
    }
    keys["data.sources"] = [{k: v for k, v in source.items() if k != "path"} for source in keys["data.sources"]]
    return keys


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _spelled(identity: Mapping[str, str]) -> str:
    return ", ".join(f"{key} {value}" for key, value in sorted(identity.items())) or "no identity"
