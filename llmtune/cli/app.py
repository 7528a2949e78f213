"""The program without its commands, and how a command is added to it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from llmtune.console import speaker

PROGRAM = "llmtune"

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results, warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries below say.")]

# Plain help: it can be read by grep, and rich need not be loaded to print it.
app = typer.Typer(name=PROGRAM, add_completion=False, rich_markup_mode=None, suggest_commands=False)


def command(name: str, *, example: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command: its docstring is the help, and ``--quiet`` and ``--debug`` are added to its options.

    Args:
        name: What the user types after ``llmtune``.
        example: One line of shell per line.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in (("quiet", Quiet), ("debug", Debug))
        ]
        parameters = [*signature.parameters.values(), *added]

        @functools.wraps(function)
        def run(*, quiet: bool, debug: bool, **given: Any) -> None:
            speaker.quiet = speaker.quiet or quiet
            if not debug:
                quieten_libraries()
            function(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
        app.command(name, epilog=f"\b\nExample:\n{lines}")(run)
        return function

    return register


def quieten_libraries() -> None:
    """Tell the libraries below to keep to errors: no advice, no progress bars of their own, no telemetry.

    Only environment and logging are touched, so that nothing is imported; what the user has set stays.
    """
    import logging
    import os
    import warnings

    quiet_settings = {
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "true",  # unset, it warns whenever a data loader process is forked
    }
    if not speaker.interactive:
        quiet_settings["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name, value in quiet_settings.items():
        os.environ.setdefault(name, value)
    for name in ("accelerate", "bitsandbytes", "datasets", "optuna", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
    libraries = "accelerate|bitsandbytes|datasets|huggingface_hub|optuna|peft|torch|transformers"
    warnings.filterwarnings("ignore", module=rf"({libraries})\b")
