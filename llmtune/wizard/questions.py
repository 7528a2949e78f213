"""The questions of ``llmtune init``: which are worth asking, and what each answer would come to on this machine.

Pure functions over facts. Nothing here prints or reads; every number shown comes from a plan.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from llmtune.errors import DataError, LlmtuneError, PlanError, UnknownColumnsError
from llmtune.finetuner.facts import USUAL_BYTES_PER_TOKEN
from llmtune.finetuner.rows import eval_share
from llmtune.presets import GOALS, CatalogueEntry, find_entry
from llmtune.units import format_count
from llmtune.wizard.outlook import Outlook, Situation, settled, was_set

# Shortest row that a limit may leave, as `data.max_length` demands.
LEAST_LENGTH = 16
# Rows are rather left out than cut when at most this share of them is too long. llmtune: chosen.
FEW = 0.01
# Below so many held-out rows a loss says little. llmtune: chosen.
FEW_HELD_OUT = 20
# Words in the names of files that are kept for evaluation, the likeliest first.
HELD_OUT_WORDS = ("eval", "evaluation", "valid", "validation", "val", "dev", "heldout", "held", "test")
# So many files are listed at most.
MOST_FILES = 9
# What is typed where no column is a question.
NO_QUESTION = "none"
_EXAMPLE_CHARS = 60
DATA_SUFFIXES = (".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".json", ".arrow")


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One answer that is proposed.

    Attributes:
        name: What is typed to choose it; its number works too.
        cells: What it would come to, a text for each column of the question.
        settings: Configuration keys it sets.
        problem: Why it cannot be chosen, if so.
    """

    name: str
    cells: tuple[str, ...] = ()
    settings: Mapping[str, Any]
    problem: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Something to ask.

    Attributes:
        title: The question.
        explanation: What depends on the answer, here.
        columns: Headings of the options and their cells.
        default: Name of the option that Enter takes; empty where there is none.
        flag: What answers it on the command line.
        free: What may be typed besides the options.
        other: Reads what was typed besides the options; raises ValueError or LlmtuneError where it cannot be used.
    """

    title: str
    explanation: str
    columns: tuple[str, ...] = ()
    options: tuple[Option, ...]
    default: str
    flag: str
    free: str = ""
    other: Callable[[str], Mapping[str, Any]] | None = None

    @property
    def expected(self) -> str:
        """What can be typed, in words."""
        if self.other is not None:
            return f"a number up to {len(self.options)}, or {self.free}" if self.options else self.free
        return f"one of {', '.join(option.name for option in self.options)}, or a number up to {len(self.options)}"

    def read(self, text: str) -> Mapping[str, Any]:
        """The keys that an answer sets: an option's number, its name or an unmistakable beginning of it, or free text.

        Raises:
            ValueError: It cannot be used; says what was expected.
            LlmtuneError: Free text that turned out not to be usable.
        """
        text = text.strip() or self.default
        if not text:
            raise ValueError(f"expected {self.expected}")
        names = [option.name for option in self.options]
        if text.isdecimal() and 1 <= int(text) <= len(names):
            chosen = self.options[int(text) - 1]
        elif text in names:
            chosen = self.options[names.index(text)]
        elif self.other is not None and not text.isdecimal():
            return self.other(text)
        else:
            begun = [option for option in self.options if option.name.startswith(text.lower())]
            if len(begun) != 1:
                raise ValueError(f"got '{text}', expected {self.expected}")
            chosen = begun[0]
        if chosen.problem is not None:
            raise ValueError(f"{chosen.name} {chosen.problem}; expected {self.expected}")
        return chosen.settings


def data_question(names: Iterable[str]) -> Question:
    """Which data to train on, of the files that lie here; those named as evaluation data come last."""
    files = [name for name in names if name.lower().endswith(DATA_SUFFIXES)]
    files.sort(key=lambda name: (_held_out_rank(name), "train" not in name.lower(), name))
    options = tuple(Option(name=name, settings={"data.path": name}) for name in files[:MOST_FILES])
    return Question(
        title="Which data should be learned from?",
        explanation="A file of chats, instructions, questions and answers or plain text; a directory or glob of such.",
        options=options,
        default=options[0].name if options else "",
        flag="DATA",
        free="a file, directory or glob",
        other=_path_to("data.path"),
    )


def column_question(field: str, unknown: UnknownColumnsError, taken: Mapping[str, str]) -> Question:
    """Return the question which column holds ``field``: ``prompt``, ``completion`` or ``text``.

    Args:
        field: What is looked for.
        unknown: The columns there are.
        taken: Columns that were chosen before, by field.
    """
    titles = {
        "prompt": "Which column is the question?",
        "completion": "Which column is the answer?",
        "text": "Which column holds the texts to learn?",
    }
    columns = {name: text for name, text in unknown.columns.items() if name not in taken.values()}
    options = [
        Option(name=name, cells=(shorten(text, _EXAMPLE_CHARS),), settings={"data.columns": {**taken, field: name}})
        for name, text in columns.items()
    ]
    if field == "prompt":
        options.append(Option(name=NO_QUESTION, cells=("the rows are texts, not questions and answers",), settings={}))
    likely = unknown.likely.get(field, NO_QUESTION if field == "prompt" else options[0].name)
    return Question(
        title=titles[field],
        explanation="The columns have no names that say what they are." if field == "prompt" else "",
        columns=("column", "the first text in it"),
        options=tuple(options),
        default=likely if likely in columns or likely == NO_QUESTION else options[0].name,
        flag=f"--set data.columns.{field}=COLUMN",
    )


def long_rows_question(situation: Situation) -> Question | None:
    """What to do with rows that are too long for the model or for memory; nothing to ask where none is."""
    config = situation.config
    if was_set(config, "data.too_long") or config.data.max_length is not None:
        return None
    whole = situation.outlook({})
    if isinstance(whole, Outlook) and whole.plan.fits and whole.stats.length_max <= whole.spec.context:
        return None
    if isinstance(whole, LlmtuneError) and not isinstance(whole, PlanError | DataError):
        return None
    entry = find_entry(config.model.id)
    bytes_per_token = entry.bytes_per_token if entry is not None else USUAL_BYTES_PER_TOKEN
    sizes = situation.survey.stats(bytes_per_token=bytes_per_token)
    dropping = situation.outlook({"data.too_long": "drop"})
    limits = [sizes.length_p99, sizes.length_p95, sizes.length_p50]
    beyond = False
    if isinstance(dropping, Outlook) and was_set(config, "model.id") and sizes.length_max > dropping.spec.context:
        limits, beyond = [dropping.spec.context, *limits], True
    for limit in limits:
        cut = situation.outlook({"data.max_length": limit, "data.too_long": "drop"}) if limit >= LEAST_LENGTH else None
        if isinstance(cut, Outlook) and cut.plan.fits:
            break
    else:
        return None
    affected = situation.survey.stats(bytes_per_token=bytes_per_token, max_length=limit).dropped_too_long
    if affected == 0:
        return None
    share = affected / situation.survey.text_bytes.size
    many = f"{affected:,} rows ({share:.1%})" if affected > 1 else "one row"
    ways = {"left": f"cuts the beginning of {many}; the last answer stays whole"}
    if situation.report.format == "text":
        ways["left"] = f"keeps the first {limit:,} tokens of {many}"
    elif situation.report.statistics["turns"]["max"] > 1:
        ways = {"turns": f"takes the oldest turns out of {many}; system prompts stay"} | ways
    ways["drop"] = f"leaves {many} out"
    model = _short(cut.plan.model.value)
    why = f"{model} reads {cut.spec.context:,}" if beyond else "would need more memory than is free"
    return Question(
        title=f"What should be done with rows of more than {limit:,} tokens?",
        explanation=(
            f"The longest row has about {sizes.length_max:,} tokens; {why}. Limited to {limit:,} tokens, "
            f"{model} trains in about {cut.time} with {cut.memory}."
        ),
        columns=("", "what happens"),
        options=tuple(
            Option(name=way, cells=(what,), settings={"data.max_length": limit, "data.too_long": way})
            for way, what in ways.items()
        ),
        default="drop" if share <= FEW else next(iter(ways)),
        flag="--set data.too_long=… --set data.max_length=…",
    )


def goal_question(situation: Situation) -> Question | None:
    """What to aim at, with the model, time and memory of each aim.

    Raises:
        LlmtuneError: Nothing can be trained, whatever is aimed at.
    """
    if was_set(situation.config, "train.preset"):
        return None
    looks = {goal: situation.outlook({"train.preset": goal}) for goal in GOALS}
    possible = [goal for goal, look in looks.items() if isinstance(look, Outlook) and look.problem is None]
    if not possible:
        situation.look(situation.config).require()
    free = situation.config.model.id == "auto"
    return Question(
        title="What should the training aim for?",
        explanation=(
            "highspeed gives a first impression: few passes with a small adapter. bestaccuracy takes more passes and a "
            "larger adapter, and looks more often for the best state. quality lies between. Predicted for this machine:"
        ),
        columns=("aim", *(["model"] if free else []), "passes", "time", "memory", ""),
        options=tuple(_goal_option(goal, look, with_model=free) for goal, look in looks.items()),
        default="quality" if "quality" in possible else possible[0],
        flag="--preset",
    )


def _goal_option(goal: str, look: Outlook | LlmtuneError, *, with_model: bool) -> Option:
    settings = {"train.preset": goal}
    if isinstance(look, LlmtuneError):
        empty = ("–",) * (4 if with_model else 3)
        return Option(name=goal, cells=(*empty, "not possible"), settings=settings, problem=f"is not possible: {look}")
    model = [_short(look.plan.model.value)] if with_model else []
    cells = (*model, f"{look.plan.epochs.value:g}", look.time, look.memory, look.verdict)
    return Option(name=goal, cells=cells, settings=settings, problem=look.problem)


def model_question(situation: Situation) -> Question | None:
    """Which model: the one chosen, its neighbours in size, or any other; nothing to ask where one was named.

    Raises:
        LlmtuneError: None can be trained.
    """
    if was_set(situation.config, "model.id"):
        return None
    chosen = situation.look(situation.config)
    chosen.require()
    entry = find_entry(chosen.plan.model.value)
    if entry is None:
        return None
    longest = chosen.plan.max_length.value if situation.config.data.too_long == "refuse" else 0
    smaller, larger = neighbours(entry, [each for each in situation.offered if each.context >= longest])
    options = [_model_option(situation, each) for each in (smaller, entry, larger) if each is not None]
    if len(options) == 1:
        return None
    return Question(
        title="Which model should be trained?",
        explanation=f"{_short(entry.id)} is proposed: {chosen.plan.model.reason}.",
        columns=("model", "size", "time", "memory", "licence", ""),
        options=tuple(options),
        default=entry.id,
        flag="--model",
        free="a Hub id or a directory",
        other=lambda text: _usable_model(situation, text),
    )


def neighbours(
    entry: CatalogueEntry, entries: Iterable[CatalogueEntry]
) -> tuple[CatalogueEntry | None, CatalogueEntry | None]:
    """The next smaller and the next larger model; of those of one size the one that follows instructions, the newer."""
    listed = [each for each in entries if each.parameters != entry.parameters]
    ranked = sorted(reversed(listed), key=lambda each: not each.instruct)
    smaller = [each for each in ranked if each.parameters < entry.parameters]
    larger = [each for each in ranked if each.parameters > entry.parameters]
    return (
        max(smaller, key=lambda each: each.parameters, default=None),
        min(larger, key=lambda each: each.parameters, default=None),
    )


def _model_option(situation: Situation, entry: CatalogueEntry) -> Option:
    settings, size = {"model.id": entry.id}, format_count(entry.parameters)
    look = situation.outlook(settings)
    if isinstance(look, LlmtuneError):
        cells = (size, "–", "–", entry.licence, "not possible")
        return Option(name=entry.id, cells=cells, settings=settings, problem=f"is not possible: {look}")
    cells = (size, look.time, look.memory, entry.licence, look.verdict)
    return Option(name=entry.id, cells=cells, settings=settings, problem=look.problem)


def _usable_model(situation: Situation, text: str) -> Mapping[str, Any]:
    settings = {"model.id": text}
    look = situation.look(settled(situation.config, settings))
    if look.problem:
        raise ValueError(f"{text} {look.problem}; expected a smaller one")
    if situation.config.data.too_long == "refuse" and look.stats.length_max > look.spec.context:
        raise ValueError(
            f"the longest row has about {look.stats.length_max:,} tokens, and {text} reads {look.spec.context:,}; "
            "expected a model with a longer context"
        )
    return settings


def held_out_question(situation: Situation) -> Question | None:
    """What to judge the training by.

    Raises:
        LlmtuneError: There is nothing to judge, since it cannot be trained.
    """
    config = situation.config
    situation.look(config).require()
    if situation.has_evaluation or config.data.eval_path is not None or was_set(config, "data.eval_fraction"):
        return None
    rows = situation.report.rows - situation.report.bad_rows
    count = int(rows * eval_share(config, rows))
    said = f"{count:,} of {rows:,} rows, drawn at random, are not learned from"
    if count < FEW_HELD_OUT:
        said += "; so few measure roughly"
    files = [
        Option(name=name, cells=("all rows of this file; nothing is held back",), settings={"data.eval_path": name})
        for name in situation.beside[:3]
    ]
    share = Option(name="share", cells=(said,), settings={})
    none = Option(
        name="none",
        cells=("learns from all rows; no best checkpoint, no early stopping",),
        settings={"data.eval_fraction": 0.0},
    )
    options = (*files, share, none)
    return Question(
        title="What should the training be judged by?",
        explanation="Rows it has not learned from tell when to stop, which checkpoint is best, and what it was worth.",
        columns=("", "what it means"),
        options=options,
        default=options[0].name,
        flag="--eval-data",
        free="a file",
        other=_path_to("data.eval_path"),
    )


def held_out_beside(name: str, names: Iterable[str]) -> tuple[str, ...]:
    """Files that are named as evaluation data of ``name``: ``valid.jsonl`` beside ``train.jsonl``; likeliest first."""
    stem, suffix = Path(name).stem, Path(name).suffix
    others = [other for other in names if other != name and Path(other).suffix == suffix]
    ranked = sorted((rank, other) for other in others if (rank := _held_out_rank(other, stem)))
    return () if _held_out_rank(name) else tuple(other for _, other in ranked)


def _held_out_rank(name: str, of: str = "") -> int:
    """How likely a name is one of evaluation data, 1 the likeliest; 0 where it is not.

    Besides the word that says so, only ``train`` or words of the data's own name may stand in it.
    """
    words = set(re.findall(r"[a-z]+", Path(name).stem.lower()))
    said = [rank for rank, word in enumerate(HELD_OUT_WORDS, 1) if word in words]
    strange = words - set(re.findall(r"[a-z]+", of.lower())) - {*HELD_OUT_WORDS, "out", "set", "data", "train"}
    return min(said) if said and not (of and strange) else 0


def file_question(path: Path) -> Question:
    """Where to write the configuration when there is a file of that name already."""
    free = next(
        name
        for number in range(2, 10**6)
        if not (name := path.with_name(f"{path.stem}-{number}{path.suffix}")).exists()
    )

    def other(text: str) -> Mapping[str, Any]:
        if Path(text).exists():
            raise ValueError(f"{text} exists; expected the name of a new file")
        if not Path(text).parent.is_dir():
            raise ValueError(f"there is no directory {Path(text).parent}; expected the name of a new file")
        return {"file": text}

    return Question(
        title=f"{path} exists. Where should the configuration be written?",
        explanation="",
        options=(
            Option(name=str(free), settings={"file": str(free)}),
            Option(name="overwrite", cells=(f"replaces {path}",), settings={"file": str(path)}),
        ),
        default=str(free),
        flag="--output-file",
        free="the name of a new file",
        other=other,
    )


def _path_to(key: str) -> Callable[[str], Mapping[str, Any]]:
    def other(text: str) -> Mapping[str, Any]:
        from llmtune.data import read

        with suppress(UnknownColumnsError):  # a question of its own
            read(text)  # found, and of a format that is recognised
        return {key: text}

    return other


def _short(model_id: str) -> str:
    return model_id.rsplit("/", 1)[-1]
