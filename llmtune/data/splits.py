"""The splits of a folder or a ``DatasetDict``: what to learn from, what to judge on, and what is neither.

Split names are recognised as Hugging Face ``datasets`` does (``datasets.data_files``): a keyword between separators, in
the name of a file or of a folder above it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from llmtune.data.kinds import SUPPORTED, holds_json, kind_of, stem_of
from llmtune.data.listing import files_of, listed, pattern_of, saved_splits, without_descriptions
from llmtune.errors import DataError

Role = Literal["train", "validation", "test"]

# `SPLIT_KEYWORDS` of datasets 5.2, and "heldout": rows of that name must not be learned. The order decides about names
# that say two things ("train-dev"): they are held out.
KEYWORDS: dict[Role, tuple[str, ...]] = {
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation", "held[-_ ]?out", "holdout"),
    "train": ("train", "training"),
}
_SEPARATOR = "[-._ 0-9]"
_ROLES: dict[Role, re.Pattern[str]] = {
    role: re.compile(f"(?:.*{_SEPARATOR})?(?:{'|'.join(words)})(?:{_SEPARATOR}.*)?") for role, words in KEYWORDS.items()
}
_HELD_OUT: tuple[Role, ...] = ("validation", "test")
# Names of documents are prose ("test-plan.md"), so that a split is said only at their end: "train", "wiki.test-01".
_ROLES_OF_DOCUMENTS: dict[Role, re.Pattern[str]] = {
    role: re.compile(f"(?:.*{_SEPARATOR})?(?:{'|'.join(words)}){_SEPARATOR}*") for role, words in KEYWORDS.items()
}
# `train_sft-00000-of-00003.parquet`: the name of a split, then the number of the part.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What one file, or one split of a ``DatasetDict``, is for. ``name``: of the split, where it has one."""

    role: Role | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Places in a list of `Split`s by what they are for. ``split``: the role of ``evaluation``, "" where it is empty.

    ``train`` is empty where there is none, or more than one, to learn from.
    """

    train: tuple[int, ...]
    evaluation: tuple[int, ...] = ()
    split: str = ""
    unused: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The files of a folder by what they are for.

    ``split``: the role of ``evaluation``, "" where it is empty. ``unused``: data that is neither learned nor judged on.
    ``skipped``: files that hold no data.
    """

    train: tuple[Path, ...]
    evaluation: tuple[Path, ...] = ()
    split: str = ""
    unused: tuple[Path, ...] = ()
    skipped: tuple[Path, ...] = ()


def role_of(name: str, patterns: dict[Role, re.Pattern[str]] = _ROLES) -> Role | None:
    """What a file, a folder or a split of that name is for."""
    return next((role for role, pattern in patterns.items() if pattern.fullmatch(name.lower())), None)


def choose(splits: Sequence[Split]) -> Choice:
    """Learn from the training split, judge on validation, else on test.

    A single split is learned whatever its name. Without a training split, what is not held out is learned.
    """
    places: dict[Role | None, tuple[int, ...]] = {
        role: tuple(place for place, split in enumerate(splits) if split.role == role) for role in (*KEYWORDS, None)
    }
    unnamed = tuple(place for place in places[None] if splits[place].name is None)
    named = tuple(place for place in places[None] if splits[place].name is not None)
    held_out = [role for role in _HELD_OUT if places[role]]
    train = places["train"] or places[None]
    if not held_out and places["train"]:
        return Choice(train=tuple(sorted((*places["train"], *unnamed))), unused=named)
    if len(held_out) == 1 and not train:
        return Choice(train=places[held_out[0]])
    if not places["train"] and len({splits[place].name for place in train}) > 1:
        train = ()
    if not held_out:
        return Choice(train=train)
    first = splits[places[held_out[0]][0]].name
    evaluation = tuple(place for place in places[held_out[0]] if splits[place].name == first)
    rest = set(range(len(splits))) - {*train, *evaluation}
    return Choice(train=train, evaluation=evaluation, split=held_out[0], unused=tuple(sorted(rest)))


def layout_of(directory: Path) -> Layout:
    """What to do with each file of a folder.

    Raises:
        DataError: No data files, several data sets, or splits without one to learn from.
    """
    saved = saved_splits(directory)
    found, skipped = files_of(directory, within=None if saved is None else tuple(saved))
    found, descriptions = without_descriptions(found, directory)
    skipped = sorted([*skipped, *descriptions])
    if not found:
        held = f"; it holds {listed(skipped, directory)}" if skipped else ""
        raise DataError(f"{directory}: no data files in this directory{held}. Expected {SUPPORTED}.")
    splits = _splits(found, directory) if saved is None else _saved(found, directory)
    choice = choose(splits)
    _require_one_data_set(directory, found, splits, choice)
    train, evaluation, unused = (
        tuple(found[place] for place in places) for places in (choice.train, choice.evaluation, choice.unused)
    )
    return Layout(train=train, evaluation=evaluation, split=choice.split, unused=unused, skipped=tuple(skipped))


def roles_in(files: Sequence[Path]) -> set[Role]:
    """The roles that the names of files say."""
    return {role for file in files if (role := role_of(stem_of(file))) is not None}


def _splits(files: Sequence[Path], directory: Path) -> list[Split]:
    """What each file is for by its folders, else by its name."""
    are_documents = all(kind_of(file) == "text" for file in files) and not holds_json(files[0])
    patterns = _ROLES_OF_DOCUMENTS if are_documents else _ROLES
    splits = [_split(file.relative_to(directory), patterns) for file in files]
    if are_documents and not any(split.role == "train" for split in splits):
        return [Split()] * len(files)
    return splits


def _split(path: Path, patterns: dict[Role, re.Pattern[str]]) -> Split:
    above = [role for part in path.parent.parts if (role := role_of(part, patterns)) is not None]
    if above:
        return Split(role=next((role for role in above if role != "train"), "train"))
    role, shard = role_of(stem_of(path), patterns), _SHARD.fullmatch(stem_of(path))
    # Only in a folder of this name do shards have the name of a split, whatever it is.
    named = shard is not None and (role is not None or path.parent.name == "data")
    return Split(role=role, name=shard[1] if shard and named else None)


def _saved(files: Sequence[Path], directory: Path) -> list[Split]:
    """A saved ``DatasetDict`` has a folder for each split."""
    names = [file.relative_to(directory).parts[0] for file in files]
    return [Split(role=role_of(name), name=name) for name in names]


def _require_one_data_set(directory: Path, files: Sequence[Path], splits: Sequence[Split], choice: Choice) -> None:
    """Refuse a folder that leaves open what to learn from.

    Raises:
        DataError: Names what there is to choose from.
    """
    if not choice.train:
        named: dict[str, list[Path]] = {}
        for file, split in zip(files, splits, strict=True):
            named.setdefault(split.name or split.role or stem_of(file), []).append(file)
        raise DataError(
            f"{directory}: none of the splits {', '.join(named)} is the one to learn from by its name. "
            f"Name its files: {_alternatives(named.values())}."
        )
    train = [(files[place], splits[place]) for place in choice.train]
    parts: dict[str, list[Path]] = {}
    for file, split in train:
        if split.name is not None:
            parts.setdefault(split.name, []).append(file)
    if len(parts) > 1:
        raise DataError(
            f"{directory}: there are several splits to learn from: {', '.join(parts)}. "
            f"Name the files of one: {_alternatives(parts.values())}."
        )
    if not choice.evaluation and not choice.unused:
        return
    sets: dict[Path, list[Path]] = {}
    for file, _ in train:
        sets.setdefault(_data_set(file.relative_to(directory)), []).append(file)
    if len(sets) > 1:
        ways = [[directory / name] if name.parts else found for name, found in sets.items()]
        raise DataError(
            f"{directory}: the folder holds several data sets, each with splits of its own: "
            f"{', '.join(str(name) for name in sets)}. Name one: {_alternatives(ways)}."
        )


def _data_set(path: Path) -> Path:
    """The folder of the data set that a file belongs to: that above its split's."""
    for number, part in enumerate(path.parent.parts):
        if role_of(part) is not None:
            return Path(*path.parts[:number])
    return path.parent


def _alternatives(groups: Iterable[Sequence[Path]]) -> str:
    return " or ".join(map(pattern_of, groups))
