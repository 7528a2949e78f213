"""What a run learns from and is judged on: found, checked, encoded, freed of what must not be there, held out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llmtune.config import RunConfig, SourceConfig, cache_dir
from llmtune.console import speaker
from llmtune.data import (
    DataReport,
    DataStats,
    Duplicates,
    EncodedDataset,
    Found,
    Groups,
    Leakage,
    Reading,
    Source,
    Survey,
    advise,
    check,
    contamination,
    duplicate_groups,
    encode,
    find,
    ignored_names,
    read,
    require_supervised,
    resolve_evaluation,
    split,
    survey,
)
from llmtune.errors import ConfigError, DataError
from llmtune.models import ModelSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

# Held out when no evaluation data is given: a tenth, and never more rows than give a steady mean.
EVAL_FRACTION, MOST_EVAL_ROWS = 0.1, 500
# Near duplicates are looked for among so many rows: 10 s and 550 MB on two cores. Beyond, exact ones alone.
MOST_COMPARED_ROWS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The data of a run, recognised but not yet read: the parts of the training data, and evaluation data if given.

    ``split_notices``: which splits of the data are read.
    """

    train: tuple[Reading, ...]
    evaluation: Reading | None
    split_notices: tuple[str, ...] = ()

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is likely a mistake in how the data is read; each sentence once."""
        return tuple(dict.fromkeys(each for source in self._sources for each in source.warnings))

    @property
    def notices(self) -> tuple[str, ...]:
        """What else a person should know about how the data is read; each sentence once."""
        told = (each for source in self._sources for each in source.notices)
        return tuple(dict.fromkeys((*self.split_notices, *told)))

    @property
    def _sources(self) -> tuple[Source, ...]:
        readings = self.train if self.evaluation is None else (*self.train, self.evaluation)
        return tuple(reading.source for reading in readings)

    @property
    def trainable(self) -> bool:
        """Whether all of it can be trained on; judgements of answers cannot."""
        return all(reading.format.trainable for reading in self.train)

    @property
    def name(self) -> str:
        """What a run on this data is called after."""
        first = self.train[0].source.name
        return first if len(self.train) == 1 else f"{first}-and-{len(self.train) - 1}-more"

    @property
    def fingerprint(self) -> str:
        """SHA-256 that changes when training or evaluation data change."""
        parts = [reading.source.fingerprint for reading in self.train]
        parts.append(self.evaluation.source.fingerprint if self.evaluation else "held out")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """What is learned from and judged on; the rows are None while only estimates are known.

    ``complexity``: how varied the training text is, 0 to 1. ``unused``: names of columns and parts of the training rows
    that hold something and are not read. ``encoded``: all rows that were given for training, before
    any were held out or, ``num_dropped``, left out as duplicates. ``duplicates``, ``leakage``: among all of them.
    ``leaked``: numbers of the evaluation rows that are trained on all the same.
    """

    train: EncodedDataset | None
    eval: EncodedDataset | None
    stats: DataStats
    eval_rows: int
    fingerprint: str
    complexity: float
    encoded: EncodedDataset | None = None
    unused: tuple[str, ...] = ()
    num_dropped: int = 0
    duplicates: Duplicates | None = None
    leakage: Leakage | None = None
    leaked: tuple[int, ...] = ()


def inputs_of(config: RunConfig, data: Any) -> Inputs:
    """Training and evaluation data, found and recognised.

    The evaluation data is ``data.eval_path``, else the validation or test split of a folder or ``DatasetDict``. A mix
    has no evaluation split of its own, and ``data.eval_fraction`` asks for rows of the training data instead.

    Raises:
        DataError: The data cannot be found, or its format cannot be recognised.
        ConfigError: No data is named, or both a path and a mix.
    """
    wanted = config.data
    parts: tuple[SourceConfig | None, ...] = wanted.sources or (None,)
    if data is not None or wanted.path is not None:
        if wanted.sources:
            raise ConfigError("data", ["both data.path and data.sources are given; list the path among the sources"])
        found: tuple[Found, ...] = (find(wanted.path if data is None else data, text_rows=wanted.text_rows),)
    elif wanted.sources:
        found = tuple(find(source.path, text_rows=wanted.text_rows) for source in wanted.sources)
    else:
        raise ConfigError(
            "DATA", ["no data was given; pass a file, a directory or a glob, or --config with data.sources"]
        )
    train = tuple(_reading(config, each.train, part) for each, part in zip(found, parts, strict=True))
    evaluation, uses_split = None, False
    if wanted.eval_path:
        evaluation = _reading(config, resolve_evaluation(wanted.eval_path, text_rows=wanted.text_rows))
    elif len(found) == 1 and found[0].evaluation is not None and wanted.eval_fraction is None:
        evaluation, uses_split = _own_evaluation(config, found[0], found[0].evaluation), True
    told = tuple(notice for each in found for notice in each.notices(with_evaluation=uses_split))
    return Inputs(train=train, evaluation=evaluation, split_notices=told)


def evaluation_inputs(config: RunConfig, data: Any) -> Inputs:
    """Other data to judge on, found and recognised, as if it were training data: every row counts.

    Raises:
        DataError: See `inputs_of`.
    """
    source = resolve_evaluation(data, text_rows=config.data.text_rows)
    return Inputs(train=(_reading(config, source),), evaluation=None)


def _reading(config: RunConfig, source: Source, part: SourceConfig | None = None) -> Reading:
    wanted, weight = config.data, 1.0 if part is None else part.weight
    return read(
        source,
        format=(None if part is None else part.format) or wanted.format,
        columns=(None if part is None else part.columns) or wanted.columns,
        ignore_columns=wanted.ignore_columns,
        weight=weight,
    )


def _own_evaluation(config: RunConfig, found: Found, source: Source) -> Reading:
    """The data's own evaluation split; nobody has named it, so an error says how to do without."""
    try:
        return _reading(config, source)
    except DataError as error:
        raise DataError(
            f"{error} This is the {found.split} split of {found.place}. To hold out a share of the training data "
            "instead, pass --set data.eval_fraction=0.1."
        ) from error


def tell_reading(inputs: Inputs) -> None:
    """Say how the data is read, where that is not plain: splits, skipped files, encodings, delimiters."""
    for warning in inputs.warnings:
        speaker.warn(warning)
    for notice in inputs.notices:
        speaker.say(notice)


def check_data(inputs: Inputs, *, near_duplicates: bool = False, compare: bool = False) -> DataReport:
    """Read every row of the training data and collect every problem; nothing is tokenised.

    Args:
        inputs: The data.
        near_duplicates: Also look for rows that nearly repeat others.
        compare: Also look for evaluation rows that occur in the training data, where evaluation data is given.
    """
    evaluation = inputs.evaluation if compare else None
    with speaker.progress("checking the data", None) as bar:
        report = check(inputs.train, near_duplicates=near_duplicates, evaluation=evaluation, progress=bar.update)
    return replace(report, notices=tuple(dict.fromkeys((*inputs.warnings, *inputs.notices, *report.notices))))


def examined(config: RunConfig, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> Data:
    """Encode the training data to look at it: nothing is refused, dropped or held out."""
    whole = _encode(config, inputs.train, tokenizer, spec, "the data", report_only=True)
    groups = _groups(whole)
    leakage = None
    if inputs.evaluation is not None:
        judged = _encode(config, (inputs.evaluation,), tokenizer, spec, "evaluation data", report_only=True)
        leakage = _leakage(whole, judged)
    return Data(
        train=whole,
        eval=None,
        stats=whole.stats,
        eval_rows=0,
        fingerprint=inputs.fingerprint,
        complexity=surveyed(inputs.train).complexity,
        encoded=whole,
        unused=_unused(inputs, whole.facts.unused),
        duplicates=groups.facts(whole.location),
        leakage=leakage,
    )


def surveyed(readings: Sequence[Reading]) -> Survey:
    """Sizes of the rows and how varied their text is; files that were looked at before are not read again."""
    with speaker.progress("looking at the data", None) as bar:
        return survey(readings, cache_dir=cache_dir() / "surveys", progress=bar.update)


def estimate(config: RunConfig, inputs: Inputs, found: Survey, *, bytes_per_token: float, context: int) -> Data:
    """What is known about the data before there is a tokenizer; ``found`` is the survey of the training data."""
    dropped_above = config.data.max_length or context if config.data.too_long != "refuse" else None
    stats = found.stats(bytes_per_token=bytes_per_token, max_length=dropped_above)
    if inputs.evaluation is not None:
        eval_rows = sum(part.num_rows for part in surveyed((inputs.evaluation,)).parts)
    else:
        kept = sum(part.num_rows for part in found.parts) - stats.dropped_too_long
        eval_rows = num_held_out(kept, eval_share(config, kept))
        stats = _without(stats, eval_rows / max(kept, 1))
    return Data(
        train=None,
        eval=None,
        stats=stats,
        eval_rows=eval_rows,
        fingerprint=inputs.fingerprint,
        complexity=found.complexity,
        unused=_unused(inputs, found.unused),
    )


def _unused(inputs: Inputs, names: Sequence[str]) -> tuple[str, ...]:
    ignored = ignored_names(inputs.train)
    return tuple(name for name in names if name not in ignored)


def num_held_out(rows: int, share: float) -> int:
    """Return the number of rows that `llmtune.data.split` holds out, where no row repeats another."""
    return min(max(1, round(rows * share)), max(1, rows // 2)) if share > 0 and rows > 1 else 0


def _without(stats: DataStats, share: float) -> DataStats:
    """Return the statistics without the held-out share of the rows; the lengths keep their distribution."""
    counts = ("rows", "tokens", "supervised_tokens")
    return replace(stats, **{name: round(getattr(stats, name) * (1 - share)) for name in counts})


def tokenised(config: RunConfig, inputs: Inputs, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec) -> Data:
    """Encoded rows, without those that must not be there, and held-out rows that share no text with them.

    Raises:
        DataError: Bad rows, rows too long, nothing left, or supervision that would teach something else.
    """
    whole = _encode(config, inputs.train, tokenizer, spec, "training data")
    groups = _groups(whole)
    kept, leakage, held_out = _kept(config, groups), None, None
    leaked: tuple[int, ...] = ()
    if inputs.evaluation is not None:
        held_out = _encode(config, (inputs.evaluation,), tokenizer, spec, "evaluation data")
        leakage = _leakage(whole, held_out)
        if config.data.duplicates == "keep":
            leaked = tuple(leakage.leaked_rows.tolist())
        else:
            kept = np.setdiff1d(kept, leakage.training_rows)
    train = whole if len(kept) == len(whole) else whole.select(kept)
    if held_out is None and (share := eval_share(config, len(train))) > 0:
        train, held_out = split(train, share, config.train.seed, groups=groups if train is whole else _groups(train))
    return Data(
        train=train,
        eval=held_out,
        stats=train.stats,
        eval_rows=0 if held_out is None else len(held_out),
        fingerprint=inputs.fingerprint,
        complexity=surveyed(inputs.train).complexity,
        encoded=whole,
        unused=_unused(inputs, whole.facts.unused),
        num_dropped=len(whole) - len(kept),
        duplicates=groups.facts(whole.location),
        leakage=leakage,
        leaked=leaked,
    )


def _groups(dataset: EncodedDataset) -> Groups:
    near = len(dataset) <= MOST_COMPARED_ROWS
    return duplicate_groups(dataset.digests, dataset.signatures if near else None)


def _leakage(train: EncodedDataset, evaluation: EncodedDataset) -> Leakage:
    near = len(train) + len(evaluation) <= MOST_COMPARED_ROWS
    signatures = (train.signatures, evaluation.signatures) if near else (None, None)
    found = contamination(train.digests, signatures[0], evaluation.digests, signatures[1])
    return found.located(evaluation.location, train.location)


def _kept(config: RunConfig, groups: Groups) -> NDArray[np.int64]:
    """The rows that stay under ``data.duplicates``."""
    stays = {"keep": np.arange(len(groups.exact)), "drop_exact": groups.exact, "drop_near": groups.kept}
    return np.unique(stays[config.data.duplicates])


def full_report(report: DataReport, data: Data) -> DataReport:
    """What `check_data` found in the text, and what is known since the rows were encoded."""
    if data.encoded is None:
        return report
    found = data.encoded.facts
    worth_telling = data.duplicates, data.leakage
    if data.num_dropped:
        worth_telling = None, None  # the person has decided about them
    return replace(
        report,
        bad_rows=found.bad_rows,
        num_problems=found.num_problems,
        problems=found.problems,
        supervision=found.supervision,
        duplicates=data.duplicates or report.duplicates,
        dropped_duplicates=data.num_dropped,
        unused=data.unused,
        leakage=data.leakage,
        advice=advise(report.statistics, worth_telling[0], found.supervision, worth_telling[1]),
    )


def eval_share(config: RunConfig, rows: int) -> float:
    """Share of the rows that is held out for evaluation."""
    if config.data.eval_fraction is not None:
        return config.data.eval_fraction
    return min(EVAL_FRACTION, MOST_EVAL_ROWS / max(rows, 1))


def _encode(
    config: RunConfig,
    readings: Sequence[Reading],
    tokenizer: PreTrainedTokenizerBase,
    spec: ModelSpec,
    what: str,
    *,
    report_only: bool = False,
) -> EncodedDataset:
    with speaker.progress(f"tokenising {what}", None) as bar:
        encoded = encode(
            readings,
            tokenizer,
            max_length=config.data.max_length or spec.context,
            vocab_size=spec.shape.vocabulary,
            too_long=config.data.too_long,
            supervise=config.data.supervise,
            on_bad_row="report" if report_only else config.data.on_bad_row,
            cache_dir=cache_dir() / "tokens",
            progress=bar.update,
        )
    if not report_only:
        require_supervised(encoded.facts.supervision)
    return encoded
