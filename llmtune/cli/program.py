"""``main``: runs one command and turns whatever happens into an exit code and, if it must be, one message."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from llmtune.cli.app import PROGRAM, Debug, Quiet, app
from llmtune.console import speaker
from llmtune.errors import ConfigError, LlmtuneError, did_you_mean, nearest

# In the order in which the help lists their commands.
FAMILIES = ("train", "init", "data", "preview", "runs", "checkpoints", "verify_resume", "use", "study", "machine")

# What a shell reports for a process ended by SIGINT and by SIGPIPE.
INTERRUPTED, PIPE_CLOSED = 130, 141


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            speaker.show(f"{PROGRAM} {version(PROGRAM)}")
        except PackageNotFoundError:
            speaker.show(f"{PROGRAM} (not installed: running from {Path(__file__).parents[2]})")
        raise typer.Exit


@app.callback(epilog="\b\nExample:\n  llmtune demo\n  llmtune train chats.jsonl --preset quality")
def _program(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version.")
    ] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fine-tune language models: every automatic number explained, nothing lost."""
    speaker.quiet = quiet


def commands() -> Any:
    """The program with all its commands, as typer's group."""
    for family in FAMILIES:
        import_module(f"llmtune.cli.{family}")
    return get_command(app)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: What follows the name of the program; that of this process when None.

    Returns:
        The exit code, see ``llmtune.errors``.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    speaker.quiet = speaker.muted = False
    group = commands()
    try:
        with group.make_context(PROGRAM, arguments or ["--help"]) as context:
            group.invoke(context)
        sys.stdout.flush()
        return 0
    except typer.Exit as end:
        return end.exit_code
    except typer.TyperException as error:
        return _failed(_usage_error(error, group))
    except LlmtuneError as error:
        return _failed(error, debug=_debugging(arguments))
    except (KeyboardInterrupt, typer.Abort):
        speaker.error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return PIPE_CLOSED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich ends a program whose reader is gone
            return PIPE_CLOSED
        raise
    except Exception as error:
        return _failed(_defect(error), debug=_debugging(arguments))


def _debugging(arguments: Sequence[str]) -> bool:
    return "--debug" in arguments or os.environ.get("LLMTUNE_DEBUG", "0") not in ("", "0")


def _failed(error: LlmtuneError, *, debug: bool = False) -> int:
    from llmtune.runs import redact

    if debug:
        import traceback

        sys.stderr.write(redact("".join(traceback.format_exception(error))))
    else:
        speaker.error(redact(f"{type(error).__name__}: {error}"))
    return error.exit_code


def _usage_error(error: typer.TyperException, group: Any) -> ConfigError:
    """What typer found wrong with the command line, in one sentence with the nearest thing that would be right."""
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else PROGRAM
    text = error.format_message().strip().rstrip(".")
    if unknown := re.match(r"No such command '(.*)'", text):
        problem = f"no such command '{unknown[1]}'{did_you_mean(unknown[1], group.commands)}"
    elif unknown := re.match(r"No such option: (\S+)", text):
        options = [name for option in context.command.params for name in option.opts] if context else []
        hint = _as_a_key(unknown[1]) if "--set" in options else None
        near = nearest(unknown[1], [*options, "--help"])
        problem = f"no such option {unknown[1]}" + (f"; {hint}" if hint else f", did you mean {near}?" if near else "")
    else:
        problem = text[:1].lower() + text[1:]
    return ConfigError(where, [f"{problem} (see {where} --help)"])


def _as_a_key(option: str) -> str | None:
    """Return the hint for an option that is a key of the configuration or another toolkit's name of a key."""
    from llmtune.config.aliases import HINTS, plain_name
    from llmtune.config.load import resolve_key

    name = plain_name(option.strip("-"))
    if name in HINTS:
        return HINTS[name]
    try:
        return f"give it as --set {resolve_key(name)}=VALUE"
    except ValueError:
        return None


def _defect(error: Exception) -> LlmtuneError:
    """A message that names the file with the traceback."""
    import tempfile
    import traceback

    from llmtune.runs import redact

    descriptor, name = tempfile.mkstemp(prefix=f"{PROGRAM}-traceback-", suffix=".txt")
    with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(redact("".join(traceback.format_exception(error))))
    defect = LlmtuneError(
        f"{type(error).__name__}: {error}. This is a defect of llmtune; please report it with {Path(name)}, which "
        "holds the traceback"
    )
    defect.__cause__ = error
    return defect


def _close_stdout() -> None:
    """Whoever read our output is gone; keep the interpreter from complaining about it when it ends."""
    with suppress(OSError, ValueError):  # a stdout that is no file, as in tests, has nothing to redirect
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
