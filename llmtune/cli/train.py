"""Commands that train, or say what would be trained: train, resume, plan, demo."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import (
    Asked,
    Config,
    Env,
    EvalData,
    HardwareFile,
    Json,
    MaxSteps,
    MaybeData,
    Method,
    Model,
    Output,
    Preset,
    Restarts,
    Resume,
    Run,
    Seed,
    Set,
    configured,
    find_run,
)

if TYPE_CHECKING:
    from llmtune.config import RunConfig
    from llmtune.finetuner import RunResult

DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop; the same as llmtune plan.")]


@command("train", example="llmtune train chats.jsonl --preset quality\nllmtune train --config run.yaml --set epochs=3")
def train(
    data: MaybeData = None,
    model: Model = None,
    preset: Preset = None,
    method: Method = None,
    output: Output = None,
    eval_data: EvalData = None,
    config: Config = None,
    env: Env = None,
    settings: Set = None,
    resume: Resume = None,
    restarts: Restarts = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a model on DATA.

    The run directory holds the result and an account of it. The same command continues a run that was stopped.
    """
    asked = Asked(
        data=data,
        model=model,
        preset=preset,
        method=method,
        output=output,
        eval_data=eval_data,
        resume=resume,
        restarts=restarts,
        seed=seed,
        max_steps=max_steps,
    )
    wanted = configured(asked, config, settings, env)
    if dry_run:
        _plan(wanted, None, as_json)
        return

    def run() -> RunResult:
        from llmtune.finetuner import FineTuner

        return FineTuner(config=wanted).train()

    _carry_out(run, wanted, None, as_json)


@command("resume", example="llmtune resume runs/chats-tinyllama-3f9a1c\nllmtune resume chats-tiny --set max_steps=400")
def resume_run(run: Run, settings: Set = None, as_json: Json = False) -> None:
    """Continue a stopped run, or extend a finished one.

    It keeps the configuration it was started with, except for what --set changes. What a begun run cannot take is
    refused.
    """
    from llmtune.finetuner.continuing import configuration_of
    from llmtune.runs import RunDirectory

    path, flags = find_run(run), settings or []

    def go_on() -> RunResult:
        from llmtune.finetuner import FineTuner

        return FineTuner.resume(path, flags=flags)

    _carry_out(go_on, configuration_of(RunDirectory.open(path), {}, flags), path, as_json)


def _carry_out(train: Callable[[], RunResult], config: RunConfig, run: Path | None, as_json: bool) -> None:
    """Train in this process, or in a child that is started again when that was asked for.

    Args:
        train: Trains; loads torch.
        config: What was asked.
        run: The run directory, where a run is continued by its name.
        as_json: Whether the result is told as JSON.

    Raises:
        Preempted: A signal came; what was saved before stands.
    """
    from llmtune.hardware.processes import is_supervised, stoppable

    if config.recover.restarts and not is_supervised():
        from llmtune.restarts import Supervision, own_command, supervise

        output = run or (Path(config.output.dir) if config.output.dir is not None else None)
        job = Supervision(
            command=own_command(),
            restarts=config.recover.restarts,
            hang_seconds=config.recover.hang_seconds,
            output=output,
            root=Path(config.output.root),
            resume="auto" if run is not None else config.recover.resume,
        )
        raise typer.Exit(supervise(job))
    with stoppable():
        from llmtune.cli.tell import tell_result

        tell_result(train(), as_json)


@command(
    "plan", example="llmtune plan chats.jsonl --model auto\nllmtune plan chats.jsonl --hardware server.json --json"
)
def plan(
    data: MaybeData = None,
    model: Model = None,
    preset: Preset = None,
    method: Method = None,
    output: Output = None,
    eval_data: EvalData = None,
    config: Config = None,
    env: Env = None,
    settings: Set = None,
    seed: Seed = None,
    max_steps: MaxSteps = None,
    hardware: HardwareFile = None,
    as_json: Json = False,
) -> None:
    """Show what train would do, and why.

    Each number comes with its reason, and with them the memory and time it will take; no weights are loaded. Exit
    code 4 when it does not fit.
    """
    asked = Asked(
        data=data,
        model=model,
        preset=preset,
        method=method,
        output=output,
        eval_data=eval_data,
        seed=seed,
        max_steps=max_steps,
    )
    _plan(configured(asked, config, settings, env), hardware, as_json)


def _plan(wanted: RunConfig, hardware: str | None, as_json: bool) -> None:
    from llmtune.cli.tell import tell_plan
    from llmtune.finetuner import FineTuner
    from llmtune.hardware import Hardware

    machine = None if hardware is None else Hardware.from_file(hardware)
    tell_plan(FineTuner(config=wanted).plan(machine), as_json)


@command("demo", example="llmtune demo")
def demo(output: Output = None, as_json: Json = False) -> None:
    """Train a small model here and now, and compare.

    It ships with llmtune, as do the data: no network is needed, and two minutes are enough.
    """
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    from llmtune.builtin import TINY_ID, demo_heldout_path, demo_train_path
    from llmtune.cli.tell import introduce_demo, tell_demo
    from llmtune.evaluation import exact_match
    from llmtune.finetuner import FineTuner
    from llmtune.hardware.processes import stoppable

    asked = Asked(
        data=str(demo_train_path()),
        eval_data=str(demo_heldout_path()),
        model=TINY_ID,
        preset="highspeed",
        output=output,
    )
    wanted = configured(asked, None, None)
    judged = wanted.evaluate.metric_rows
    wanted = configured(asked, None, [f"evaluate.num_samples={judged}"])  # so that misses can be shown too
    with open(demo_heldout_path(), encoding="utf-8") as held_out:
        introduce_demo(held_out=sum(1 for _ in held_out), judged=judged)
    tuner = FineTuner(config=wanted, metrics={"exact_match": exact_match})
    with stoppable():
        tell_demo(tuner.train(), as_json)
