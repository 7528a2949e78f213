"""The command that shows rows token by token: preview."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.options import Asked, Config, Data, Env, Format, Json, Model, Set, configured
from llmtune.console import quieten_libraries, speaker
from llmtune.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

    from llmtune.config import RunConfig
    from llmtune.data.preview import PreviewRow, PreviewToken

# What a terminal shows of a long row: half of it from the beginning, half from the end. --html and --json have all.
MOST_TOKENS = 600

# Two shades each, so that neighbours can be told apart; both colours are set, so that they suit any terminal.
_LEARNED = ("grey93 on #14663f", "grey93 on #1d8754")
_GIVEN = ("grey82 on grey19", "grey82 on grey27")
_SPECIAL = "bold orange1"
_BORDER, _UNFINISHED = "│", "◦"

Rows = Annotated[int, typer.Option("--rows", metavar="N", min=1, help="How many rows.")]
Line = Annotated[int, typer.Option("--line", metavar="L", min=1, help="Start at this line of DATA.")]
Html = Annotated[
    str | None, typer.Option("--html", metavar="FILE", help="Write the rows to this page instead of printing them.")
]


@command("preview", example="llmtune preview chats.jsonl\nllmtune preview chats.jsonl --line 118 --html rows.html")
def preview(
    data: Data,
    model: Model = None,
    format: Format = None,
    config: Config = None,
    env: Env = None,
    settings: Set = None,
    rows: Rows = 3,
    line: Line = 1,
    html: Html = None,
    as_json: Json = False,
) -> None:
    """Show rows of DATA as the model will see them, with what is learned marked.

    Token by token, with the model's own template; exit code 3 when none of the rows can be trained on.
    """
    format_setting = [] if format is None else [f"data.format={format}"]
    wanted = configured(Asked(data=data, model=model), config, [*(settings or ()), *format_setting], env)
    model_id, found = _rows(wanted, rows=rows, line=line)
    if as_json:
        speaker.emit({"model": model_id, "supervise": wanted.data.supervise, "rows": [row.to_json() for row in found]})
    if html is not None:
        from llmtune.reporting.preview import write_preview

        path = write_preview(found, Path(html), model=model_id)
        speaker.say(f"{len(found):,} {'row' if len(found) == 1 else 'rows'} written to {path}")
    elif not as_json:
        speaker.show(_Display(found))
    if not any(row.tokens for row in found):
        raise typer.Exit(DataError.exit_code)


def _rows(wanted: RunConfig, *, rows: int, line: int) -> tuple[str, list[PreviewRow]]:
    """The model that is meant, and the rows as it sees them."""
    from llmtune.data import ChatEncoder
    from llmtune.data import preview as take_apart
    from llmtune.finetuner import facts
    from llmtune.finetuner.rows import inputs_of, tell_reading

    quieten_libraries()
    inputs = inputs_of(wanted, None)
    tell_reading(inputs)
    model = facts.model_of(wanted, facts.machine_of(wanted), inputs, download=True)
    encoder = ChatEncoder(model.tokenizer, supervise=wanted.data.supervise)
    found = take_apart(
        inputs.train[0],
        encoder,
        rows=rows,
        line=line,
        max_length=wanted.data.max_length or model.spec.context,
        too_long=wanted.data.too_long,
    )
    return model.spec.id, found


class _Display:
    """Rows on a terminal: shades where there are enough colours, brackets and bars where there are not."""

    def __init__(self, rows: Sequence[PreviewRow]) -> None:
        self._rows = rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        from llmtune.reporting.preview import visible

        shaded = console.color_system in ("256", "truecolor") and not console.no_color
        draw = _shaded if shaded else _bracketed
        yield _legend(shaded=shaded, unfinished=any(not token.text for row in self._rows for token in row.tokens))
        for row in self._rows:
            yield Text(f"\n{row.file}:{row.line}", style="bold").append(f"  {_account(row)}", style="not bold")
            for problem in row.problems:
                yield Text(visible(f"{problem.field or 'row'}: {problem.problem}; {problem.hint}"), style="red")
            if row.tokens:
                text = _clipped(row.tokens, draw)
                yield from _folded(text, options.max_width) if console.is_terminal else [text]


def _account(row: PreviewRow) -> str:
    if not row.tokens:
        return "cannot be encoded"
    return f"{len(row.tokens):,} tokens, {row.num_supervised:,} supervised ({row.supervised_share * 100:.0f} %)"


def _legend(*, shaded: bool, unfinished: bool) -> Text:
    from rich.text import Text

    if shaded:
        parts = [Text(" learned ", _LEARNED[0]), Text(" given ", _GIVEN[0]), Text("special token", _SPECIAL)]
    else:
        parts = [Text("⟦learned⟧", "underline green"), Text(f"token{_BORDER}token")]
    parts.append(Text("↵ new line"))
    if unfinished:
        parts.append(Text(f"{_UNFINISHED} first bytes of a character"))
    return Text("   ").join(parts)


def _clipped(tokens: Sequence[PreviewToken], draw: Callable[[Sequence[PreviewToken]], Text]) -> Text:
    if len(tokens) <= MOST_TOKENS:
        return draw(tokens)
    from rich.text import Text

    half = MOST_TOKENS // 2
    left_out = tokens[half:-half]
    learned = sum(token.supervised for token in left_out)
    note = f"\n… {len(left_out):,} tokens left out here, {learned:,} of them supervised; --html and --json have all …\n"
    return Text.assemble(draw(tokens[:half]), (note, "yellow"), draw(tokens[-half:]))


def _shaded(tokens: Sequence[PreviewToken]) -> Text:
    from rich.text import Text

    text = Text()
    for index, token in enumerate(tokens):
        shades = _LEARNED if token.supervised else _GIVEN
        text.append(_shown(token), f"{shades[index % 2]} {_SPECIAL if token.special else ''}")
    return text


def _bracketed(tokens: Sequence[PreviewToken]) -> Text:
    from rich.text import Text

    border = Text.assemble((_BORDER, "dim"))
    text = Text()
    for learned, run in groupby(tokens, key=lambda token: token.supervised):
        pieces = [Text(_shown(token), style=_style(token)) for token in run]
        text.append("⟦" if learned else "").append_text(border.join(pieces)).append("⟧" if learned else "")
    return text


def _folded(text: Text, width: int) -> Iterator[Text]:
    """Lines that fit, blanks kept. A terminal left to itself may paint the rest of a line with the last shade."""
    from rich.cells import chop_cells

    for line in text.split("\n", allow_blank=True):
        yield from line.divide(list(accumulate(map(len, chop_cells(line.plain, width))))[:-1])


def _style(token: PreviewToken) -> str:
    return " ".join(["bold"] * token.special + ["underline green"] * token.supervised)


def _shown(token: PreviewToken) -> str:
    from llmtune.reporting.preview import visible

    return visible(token.text).replace("\n", "↵\n") or _UNFINISHED
