"""Arguments and options that several commands share, and the configuration they add up to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtune.console import speaker

if TYPE_CHECKING:
    from llmtune.config import RunConfig

MaybeData = Annotated[
    str | None, typer.Argument(metavar="DATA", help="File, directory or glob; may be left out when --config names it.")
]
Data = Annotated[str, typer.Argument(metavar="DATA", help="File, directory or glob.")]
Run = Annotated[str, typer.Argument(metavar="RUN", help="A run directory, the name of a run, or its beginning.")]

Model = Annotated[
    str | None, typer.Option("--model", metavar="ID", help="auto, a Hub id, a local directory or builtin:tiny.")
]
Preset = Annotated[
    str | None, typer.Option("--preset", metavar="GOAL", help="highspeed, quality (the default) or bestaccuracy.")
]
Method = Annotated[str | None, typer.Option("--method", metavar="METHOD", help="auto, lora, qlora or full.")]
Output = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="The run directory; a new one below runs/ if not given.")
]
EvalData = Annotated[
    str | None,
    typer.Option("--eval-data", metavar="FILE", help="Held-out data; else the split or a share of DATA."),
]
Format = Annotated[
    str | None,
    typer.Option("--format", metavar="NAME", help="Take the rows for this format instead of recognising it."),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="FILE",
        help="YAML file of the keys that --set takes too. May be repeated; a later file replaces an earlier one.",
    ),
]
Env = Annotated[
    str | None,
    typer.Option("--env", metavar="NAME", help="Which of the environments: in --config to use; also LLMTUNE_ENV."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any configuration key, e.g. epochs=3. May be repeated."),
]
Resume = Annotated[
    str | None,
    typer.Option("--resume", metavar="HOW", help="auto (continue if there is something), never, or a checkpoint."),
]
Restarts = Annotated[
    int | None,
    typer.Option("--restarts", metavar="N", min=0, help="Start a killed or hung training again, up to N times."),
]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Of order, split, dropout, initialisation.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", metavar="N", help="Stop after this many updates.")]
HardwareFile = Annotated[
    str | None, typer.Option("--hardware", metavar="FILE", help="Plan for the machine of this llmtune doctor --json.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked on the command line; what was not is None."""

    data: str | None = None
    model: str | None = None
    preset: str | None = None
    method: str | None = None
    output: str | None = None
    eval_data: str | None = None
    resume: str | None = None
    restarts: int | None = None
    seed: int | None = None
    max_steps: int | None = None

    def overrides(self) -> dict[str, Any]:
        """The same as keys of the configuration."""
        keys = {
            "data.path": self.data,
            "data.eval_path": self.eval_data,
            "model.id": self.model,
            "train.preset": self.preset,
            "train.method": self.method,
            "train.seed": self.seed,
            "train.max_steps": self.max_steps,
            "output.dir": self.output,
            "recover.resume": self.resume,
            "recover.restarts": self.restarts,
        }
        return {key: value for key, value in keys.items() if value is not None}


def configured(asked: Asked, config: list[str] | None, settings: list[str] | None, env: str | None = None) -> RunConfig:
    """The configuration of flags, ``--set``, ``--config``, ``--env`` and environment together.

    Where files disagree, the one that decided is named. The data are looked for at once, so that a mistyped name is
    told before the seconds that torch takes to load.

    Raises:
        ConfigError: Every problem at once.
        DataError: There are no such data.
    """
    from llmtune.config import load_config
    from llmtune.data import find, resolve_evaluation

    wanted = load_config(asked.overrides(), settings=settings or (), file=config, env=env)
    for note in wanted.origin.notes:
        speaker.say(note)
    if wanted.data.path is not None:
        find(wanted.data.path, text_rows=wanted.data.text_rows)
    if wanted.data.eval_path is not None:
        resolve_evaluation(wanted.data.eval_path, text_rows=wanted.data.text_rows)
    return wanted


def find_run(text: str) -> Path:
    """The directory of the run that the user means.

    Raises:
        RunNotFoundError: Nothing, or more than one run, answers to it.
    """
    from llmtune.config import load_config, store_url
    from llmtune.runs import RunStore

    return RunStore(store_url(), root=load_config().output.root).find(text)
