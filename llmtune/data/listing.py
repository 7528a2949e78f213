"""The files of a folder: which hold data, which describe it, and a pattern that names some of them."""

from __future__ import annotations

import glob
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmtune.data.kinds import inner_suffix, kind_of, stem_of
from llmtune.errors import DataError

# What `datasets` writes beside data; the names are reserved (see `FILES_TO_IGNORE` in `datasets.data_files`).
_METADATA = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
# Text files about data, where they lie beside data of another kind.
_DESCRIPTION = re.compile(r"(?:readme|licen[sc]e|notice|citation|requirements|changelog|contributing)\b.*", re.I)


def files_of(directory: Path, *, within: Sequence[str] | None = None) -> tuple[list[Path], list[Path]]:
    """Files with data below a folder, and other files, both sorted; hidden ones and metadata are neither.

    A folder written by ``Dataset.save_to_disk`` has the files that its ``state.json`` names.

    Args:
        directory: The folder.
        within: Only look into these sub-folders.

    Raises:
        DataError: A file that a ``state.json`` names is missing.
    """
    found: list[Path] = []
    skipped: list[Path] = []
    for folder, below, names in os.walk(directory):
        below[:] = [name for name in below if not name.startswith((".", "__"))]
        here = Path(folder)
        if here == directory and within is not None:
            below[:] = [name for name in below if name in within]
        saved = _saved_files(here) if "state.json" in names else None
        for path in (here / name for name in names if not name.startswith(".")):
            if path in (saved or ()) or (saved is None and kind_of(path) and path.name not in _METADATA):
                found.append(path)
            elif path.name not in _METADATA or (saved is None and path.name == "config.json"):
                skipped.append(path)
    return sorted(path for path in found if path.is_file()), sorted(skipped)


def saved_splits(directory: Path) -> tuple[str, ...] | None:
    """The splits of a folder written by ``DatasetDict.save_to_disk``; None for another folder.

    Raises:
        DataError: A split is missing.
    """
    names = _read_json(directory / "dataset_dict.json").get("splits")
    if not isinstance(names, list) or not names:
        return None
    missing = [name for name in names if not (directory / str(name)).is_dir()]
    if missing:
        raise DataError(
            f"{directory}: dataset_dict.json names the splits {', '.join(map(str, names))}, and the folder of "
            f"{', '.join(map(str, missing))} is missing. Copy or save the whole folder again."
        )
    return tuple(map(str, names))


def without_descriptions(files: Sequence[Path], directory: Path) -> tuple[list[Path], list[Path]]:
    """The files that are data, and the text files that describe it.

    Beside data of another kind, ``.md`` files and ``LICENSE.txt`` and its like are descriptions; beside ``.txt`` files,
    only the ``README.md`` of the folder itself.
    """
    tables = [file for file in files if kind_of(file) != "text"]
    texts = [file for file in files if kind_of(file) == "text" and inner_suffix(file) != ".md"]
    about = {
        file
        for file in files
        if kind_of(file) == "text"
        and (
            (tables and (inner_suffix(file) == ".md" or _DESCRIPTION.fullmatch(file.name)))
            or (texts and file == directory / "README.md")
        )
    }
    return [file for file in files if file not in about], sorted(about)


def pattern_of(files: Sequence[Path]) -> str:
    """A path or glob, quoted for a shell, that names exactly these files; the first file where none does."""
    wanted = {str(file) for file in files}
    first = files[0]
    if len(files) > 1:
        above = Path(os.path.commonpath([file.parent for file in files]))
        here, suffix = glob.escape(str(above)), _common_end(files)
        begin = glob.escape(os.path.commonprefix([file.name for file in files]))  # noqa: RUF071  names, not paths
        for tail in (f"*{suffix}", f"{begin}*{suffix}", f"{begin}*", f"**/*{suffix}"):
            if wanted == {name for name in glob.glob(f"{here}/{tail}", recursive=True) if os.path.isfile(name)}:
                return shlex.quote(f"{here}/{tail}")
    return shlex.quote(str(first))


def listed(files: Sequence[Path], base: Path | None = None, *, most: int = 3) -> str:
    """The first files, relative to ``base``, and how many follow."""
    names = [str(file.relative_to(base) if base and file.is_relative_to(base) else file) for file in files]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def of_saved_data_sets(files: Sequence[Path]) -> list[Path]:
    """The files without those that lie in a saved ``Dataset`` and are not part of it, such as caches of ``map``."""
    saved = {folder: _saved_files(folder) for folder in {file.parent for file in files}}
    return [file for file in files if (own := saved[file.parent]) is None or file in own]


def _common_end(files: Sequence[Path]) -> str:
    suffixes = {file.name.removeprefix(stem_of(file)) for file in files}
    return suffixes.pop() if len(suffixes) == 1 else ""


def _saved_files(folder: Path) -> set[Path] | None:
    """The files of a saved ``Dataset``; None where ``state.json`` is not of one.

    Raises:
        DataError: A file is missing, or rows were selected by an index that is not applied here.
    """
    state = _read_json(folder / "state.json")
    entries = state.get("_data_files")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and "filename" in entry for entry in entries):
        return None
    if state.get("_indices_data_files"):
        raise DataError(
            f"{folder}: the data set was saved with a selection of its rows, as datasets did before 2.0. "
            "Load it with datasets.load_from_disk and save it again."
        )
    files = {folder / str(entry["filename"]) for entry in entries}
    missing = sorted(str(file.relative_to(folder)) for file in files if file.parent != folder or not file.is_file())
    if missing:
        raise DataError(
            f"{folder}: state.json names {', '.join(missing)}, missing in this folder. Save the data set again."
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
