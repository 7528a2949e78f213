"""Commands that use a finished run: eval, chat."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from llmtune.cli.app import command
from llmtune.cli.leakage import show_leakage
from llmtune.cli.options import EvalData, Json, Run, find_run
from llmtune.console import quieten_libraries, speaker

if TYPE_CHECKING:
    from llmtune.finetuner import TunedRun

Once = Annotated[str | None, typer.Option("--once", metavar="PROMPT", help="Answer this one prompt and stop.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer; that of the run's samples.")
]

NumAnswers = Annotated[
    int | None,
    typer.Option(
        "--answers", metavar="N", min=0, help="Prompts that both models answer, to see whether answers end; 16, or 0."
    ),
]


@command("eval", example="llmtune eval chats-tinyllama-3f9a1c --eval-data new.jsonl")
def evaluate(run: Run, eval_data: EvalData = None, answers: NumAnswers = None, as_json: Json = False) -> None:
    """Measure a tuned model against its base.

    Loss and answers of both on the rows the run held out, or on other data. Rows that the run was trained on are named
    and left out.
    """
    verdict = _open(run).evaluate(eval_data, answers=answers)
    if as_json:
        speaker.emit(verdict.to_json())
        return
    if verdict.leakage is not None:
        show_leakage(verdict.leakage)
    speaker.show(verdict.text)


@command(
    "chat",
    example="llmtune chat chats-tinyllama-3f9a1c\n"
    "llmtune chat chats-tinyllama-3f9a1c --once 'What do you sell?'\n"
    "llmtune chat chats-tinyllama-3f9a1c < prompts.txt > answers.txt",
)
def chat(run: Run, once: Once = None, max_new_tokens: MaxNewTokens = None, as_json: Json = False) -> None:
    """Talk to a tuned model.

    Ctrl-D ends, /new begins a new conversation. Piped input is taken as one prompt per line and gives one
    answer per line; a line break inside an answer is written as a backslash and n.
    """
    tuned = _open(run)
    if once is not None:
        answer = tuned.generate(once, max_new_tokens=max_new_tokens)
        speaker.emit({"prompt": once, "answer": answer}) if as_json else speaker.show(answer)
    elif not sys.stdin.isatty():
        answers = _answers(tuned, max_new_tokens)
        if as_json:
            speaker.emit([{"prompt": prompt, "answer": answer} for prompt, answer in answers])
            return
        for _, answer in answers:
            speaker.show(answer.replace("\n", "\\n"))  # one line each, so that answers stay beside their prompts
    else:
        _converse(tuned, max_new_tokens)


def _open(run: str) -> TunedRun:
    from llmtune.finetuner import TunedRun

    path = find_run(run)
    quieten_libraries()
    return TunedRun.open(path)


def _answers(tuned: TunedRun, max_new_tokens: int | None) -> Iterator[tuple[str, str]]:
    """Every line of stdin with its answer; each is a conversation of its own."""
    for line in sys.stdin:
        if prompt := line.strip():
            yield prompt, tuned.generate(prompt, max_new_tokens=max_new_tokens)


def _converse(tuned: TunedRun, max_new_tokens: int | None) -> None:
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # input() then has history and editing; Windows goes without

    speaker.say(f"Talking to {tuned.run.name}. Ctrl-D ends, /new begins a new conversation.")
    messages: list[dict[str, str]] = []
    while True:
        try:
            prompt = input("you> ").strip()
        except EOFError:
            speaker.say("")
            return
        if prompt == "/new":
            messages.clear()
        elif prompt:
            messages.append({"role": "user", "content": prompt})
            answer = tuned.generate(messages, max_new_tokens=max_new_tokens)
            messages.append({"role": "assistant", "content": answer})
            speaker.show(answer)
