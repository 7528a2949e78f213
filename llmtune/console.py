"""The one place that prints. Facts go to stdout, everything said on the way goes to stderr.

Nothing here decides what to say; it knows only where it may be said: no progress bar outside a terminal,
no colour under ``NO_COLOR``, nothing but warnings and errors under ``--quiet``, and only the main process of a
distributed run speaks.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


class Speaker:
    """Prints for one process. ``quiet`` drops what is merely informative; ``muted`` drops all but errors."""

    def __init__(self) -> None:
        self.quiet = False
        self.muted = False
        self._live: Console | None = None  # of the running progress bar, which lines have to be printed above

    def _console(self, stream: str) -> Console:
        from rich.console import Console

        if stream == "err" and self._live is not None:
            return self._live
        console = Console(stderr=stream == "err", soft_wrap=True, highlight=False)
        if not console.is_terminal:
            console = Console(stderr=stream == "err", soft_wrap=True, highlight=False, width=120, no_color=True)
        return console

    @property
    def interactive(self) -> bool:
        """Whether a person is watching stderr, so that moving displays make sense."""
        return sys.stderr.isatty() and not self.quiet and not self.muted

    @property
    def answered(self) -> bool:
        """Whether a person is there who reads what is said and can answer it."""
        return self.interactive and sys.stdin.isatty()

    def say(self, text: str, *, bold: bool = False) -> None:
        """One informative line on stderr."""
        if not self.quiet and not self.muted:
            self._console("err").print(text, style="bold" if bold else None, markup=False)

    def ask(self, prompt: str) -> str:
        """What a person types behind ``prompt``, which stands on stderr. Ask only where `answered`.

        Raises:
            EOFError: The input has ended.
        """
        return self._console("err").input(f"{prompt} ", markup=False, emoji=False).strip()

    def warn(self, text: str) -> None:
        """One warning on stderr; shown under ``--quiet`` too."""
        if not self.muted:
            self._console("err").print(f"warning: {text}", style="yellow", markup=False)

    def error(self, text: str) -> None:
        """One error on stderr; always shown."""
        self._console("err").print(text, style="red", markup=False)

    def show(self, renderable: Any) -> None:
        """A result for people, on stdout: text or any rich renderable."""
        if not self.muted:
            if isinstance(renderable, str):
                self._console("out").print(renderable, markup=False)
            else:
                self._console("out").print(renderable)

    def emit(self, document: Any) -> None:
        """A result for programs: one JSON document on stdout."""
        import orjson

        if not self.muted:
            sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")
            sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table on stdout; the last column wraps, the others do not."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for i, column in enumerate(columns):
            table.add_column(column, no_wrap=i < len(columns) - 1, overflow="fold")
        for row in rows:
            table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
        self.show(table)

    @contextmanager
    def progress(self, description: str, total: float | None) -> Iterator[ProgressBar]:
        """A progress bar with remaining time on a terminal; silent elsewhere."""
        if not self.interactive:
            yield ProgressBar(None, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console("err"),
            transient=True,
        ) as bar:
            self._live = bar.console
            try:
                yield ProgressBar(bar, bar.add_task(description, total=total, note=""))
            finally:
                self._live = None


class ProgressBar:
    """Handle of one running progress bar; does nothing where no bar is shown."""

    def __init__(self, bar: Progress | None, task: Any) -> None:
        self._bar, self._task = bar, task

    def update(self, completed: float, note: str = "") -> None:
        """Move the bar to ``completed`` and put ``note`` behind it."""
        if self._bar is not None:
            self._bar.update(self._task, completed=completed, note=note)


speaker = Speaker()


def quieten_libraries() -> None:
    """Keep the libraries below us from talking over us: what they say is for those who call them directly.

    Their errors still come through as exceptions. Progress bars of downloads stay where a person is watching.
    """
    import logging

    for name in ("transformers", "datasets", "accelerate", "peft", "bitsandbytes", "torch.distributed", "optuna"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    # bitsandbytes says once per layer that LLM.int8() computes in fp16, which is how it is defined.
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()  # "Loading weights": it is over in a moment
    if "datasets" in sys.modules:  # the user's own data came with it; nothing here needs it, and it takes half a second
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
    if not speaker.interactive:
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
