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
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

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
            _settle_environment()
            function(**given)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
        app.command(name, epilog=f"\b\nExample:\n{lines}")(run)
        return function

    return register


def _settle_environment() -> None:
    """What the libraries below heed when they are imported, before anything can be asked of them.

    No telemetry is sent. A tokenizer would otherwise warn whenever a data loader process is forked, and bitsandbytes
    of a kernel that it does not need. What the user has set stays.
    """
    import logging
    import os

    from llmtune.hardware import yield_cores

    yield_cores()
    for name, value in {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "true"}.items():
        os.environ.setdefault(name, value)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
