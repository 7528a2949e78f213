"""``llmtune verify-resume``."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import (
    Asked,
    Config,
    Env,
    EvalData,
    Json,
    MaybeData,
    Method,
    Model,
    Output,
    Preset,
    Seed,
    Set,
    configured,
)

Steps = Annotated[int, typer.Option("--steps", metavar="N", help="Updates of both runs.")]
At = Annotated[
    int | None, typer.Option("--at", metavar="K", help="Kill after the save of this update; the middle if not given.")
]


@command(
    "verify-resume",
    example="llmtune verify-resume chats.jsonl --steps 10 --at 4\nllmtune verify-resume --config run.yaml --json",
)
def verify_resume(
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
    steps: Steps = 10,
    at: At = None,
    as_json: Json = False,
) -> None:
    """Prove that a killed run ends as one that was never interrupted.

    Trains your configuration twice for a few updates. The second run is really killed after a save, and resumed.
    Weights, optimizer, random states, position in the data and history are compared bit for bit. Exit code 0 when
    they are equal, 1 when not.
    """
    from llmtune.console import speaker
    from llmtune.finetuner.verify_resume import verify_resume as verify

    asked = Asked(
        data=data,
        model=model,
        preset=preset,
        method=method,
        output=output,
        eval_data=eval_data,
        seed=seed,
    )
    result = verify(configured(asked, config, settings, env), steps=steps, at=steps // 2 if at is None else at)
    if as_json:
        speaker.emit(result.to_json())
    else:
        rows = [(what, str(count)) for what, count in result.compared.items()]
        speaker.table("Compared bit for bit", ("what", "equal parts"), rows)
        verdict = "equal" if result.equal else f"different: {result.difference}"
        speaker.show(f"Killed after update {result.at} of {result.steps} and resumed: {verdict}")
    if not result.equal:
        raise typer.Exit(1)
