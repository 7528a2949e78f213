"""The command that searches: study."""

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
    Preset,
    Seed,
    Set,
    configured,
)

Trials = Annotated[int, typer.Option("--trials", metavar="N", min=1, help="Trials in all, earlier ones included.")]
Sampler = Annotated[str, typer.Option("--sampler", metavar="NAME", help="tpe, gp, random or grid.")]
Pruner = Annotated[str, typer.Option("--pruner", metavar="NAME", help="median (stop what falls behind) or none.")]
Storage = Annotated[
    str | None,
    typer.Option("--storage", metavar="URL", help="Database of the study; SQLite in its directory if not given."),
]
Space = Annotated[
    str | None,
    typer.Option("--space", metavar="FILE", help="YAML file of what may vary; around the preset if not given."),
]
StudyDir = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="Directory of the study; one below runs/ if not given.")
]


@command("study", example="llmtune study chats.jsonl --trials 12\nllmtune study chats.jsonl --space space.yaml --json")
def study(
    data: MaybeData = None,
    trials: Trials = 20,
    sampler: Sampler = "tpe",
    pruner: Pruner = "median",
    storage: Storage = None,
    space: Space = None,
    output: StudyDir = None,
    model: Model = None,
    preset: Preset = None,
    method: Method = None,
    eval_data: EvalData = None,
    config: Config = None,
    env: Env = None,
    settings: Set = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Search for better training numbers.

    Every trial is a real run; the first one has the preset's own numbers. The same command continues a study that was
    stopped. The best configuration is written as YAML for llmtune train --config.
    """
    from llmtune.cli.tell import tell_study
    from llmtune.hardware.processes import stoppable
    from llmtune.study import Study

    asked = Asked(data=data, model=model, preset=preset, method=method, eval_data=eval_data, seed=seed)
    search = Study(
        config=configured(asked, config, settings, env),
        trials=trials,
        sampler=sampler,
        pruner=pruner,
        storage=storage,
        space=space,
        output=output,
    )
    with stoppable():
        result = search.run()
    tell_study(result, as_json)
