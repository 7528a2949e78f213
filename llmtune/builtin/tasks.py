"""The tuning data that comes with llmtune: two small tasks that the base model cannot do and a fine-tuned one can.

Both ask for a fixed format that the pre-training corpus does not contain. Held-out rows use the same sentence patterns
with names that occur nowhere in the tuning rows (``is_reserved``), so only reading helps.

* demo (chat messages): a request for a parcel becomes a JSON object.
* harbour log (Alpaca): a report of a ship's arrival becomes one line of a log.

Run ``python -m llmtune.builtin.tasks`` from a checkout to write the files again; they are the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from llmtune.builtin.corpus import invent_name

TRAIN_ROWS, HELDOUT_ROWS = 800, 80
Row = dict[str, object]


def parcel_row(rng: Random, *, reserved: bool) -> Row:
    """One request as chat messages; the answer is a JSON object with ``from``, ``to`` and ``town``."""
    sender, receiver, town = (invent_name(rng, reserved=reserved) for _ in range(3))
    request = rng.choice(
        (
            f"Please send the parcel of {sender} to {receiver} in {town}.",
            f"A parcel from {sender} goes to {receiver}, who lives in {town}.",
            f"{sender} has a parcel for {receiver}. It has to be in {town}.",
            f"Hello, this is {sender}. Please bring my parcel to {receiver} in {town}.",
            f"The parcel for {receiver} comes from {sender} and has to reach {town}.",
            f"My name is {sender} and I have a parcel for {receiver}. Bring it to {town}.",
        )
    )
    answer = json.dumps({"from": sender, "to": receiver, "town": town})
    return {"messages": [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]}


def log_row(rng: Random, *, reserved: bool) -> Row:
    """One report as instruction, input and output; the output is ``ship: … | from: … | to: …``."""
    ship, origin, port = (invent_name(rng, reserved=reserved) for _ in range(3))
    report = rng.choice(
        (
            f"The ship {ship} came to {port} from {origin}.",
            f"The {ship} left {origin} and reached {port} in the evening.",
            f"It was late when the {ship} from {origin} landed at {port}.",
            f"From {origin} to {port} the {ship} had good wind.",
            f"{port} saw a new ship today. The {ship} came from {origin}.",
        )
    )
    return {
        "instruction": "Write this report as one line of the harbour log.",
        "input": report,
        "output": f"ship: {ship} | from: {origin} | to: {port}",
    }


def make_rows(make: Callable[..., Row], count: int, *, reserved: bool, seed: int) -> list[Row]:
    """``count`` rows of one task; with ``reserved`` about names that no other row uses."""
    rng = Random(seed)
    return [make(rng, reserved=reserved) for _ in range(count)]


# The held-out seeds were drawn after wording and learning rate had been settled on other seeds.
def files() -> dict[Path, list[Row]]:
    """Every shipped data file of a checkout, by path, and the rows it holds."""
    package = Path(__file__).parent
    demo, examples = package / "demo", package.parents[1] / "examples"
    return {
        demo / "train.jsonl": make_rows(parcel_row, TRAIN_ROWS, reserved=False, seed=1),
        demo / "heldout.jsonl": make_rows(parcel_row, HELDOUT_ROWS, reserved=True, seed=20),
        examples / "harbour_log.jsonl": make_rows(log_row, TRAIN_ROWS, reserved=False, seed=3),
        examples / "harbour_log_heldout.jsonl": make_rows(log_row, HELDOUT_ROWS, reserved=True, seed=40),
    }


def main() -> None:
    """Writes the data files of a checkout."""
    for path, rows in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
