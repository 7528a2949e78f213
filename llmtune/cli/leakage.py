"""Evaluation rows that are also trained on, as a terminal shows them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtune.console import speaker

if TYPE_CHECKING:
    from llmtune.data import Leakage

# What a terminal shows of them; --json has the first 20.
MOST_SHOWN = 5


def show_leakage(leakage: Leakage) -> None:
    """Name the first leaked rows, and say how many there are."""
    if not leakage.leaked:
        return
    kinds = f"{len(leakage.exact_rows):,} exactly"
    kinds += "" if leakage.near_rows is None else f", {len(leakage.near_rows):,} nearly"
    speaker.show(f"{leakage.leaked:,} of {leakage.rows:,} evaluation rows are trained on ({kinds}):")
    for each in leakage.places[:MOST_SHOWN]:
        how = "nearly repeats" if each.near else "repeats"
        speaker.show(f"  {each.file}:{each.line} {how} {each.of_file}:{each.of_line}")
    if leakage.leaked > MOST_SHOWN:
        speaker.show(f"  … and {leakage.leaked - MOST_SHOWN:,} more; --json lists the first 20.")
