"""The tuning data that comes with llmtune: two small tasks that the base model cannot do and a fine-tuned one can.

Both ask for a fixed format that the pre-training corpus does not contain. Held-out rows use the same sentence patterns
with names and things that occur nowhere in the tuning rows (``is_reserved``), so only reading helps.

* demo (chat messages): an order in words becomes a JSON object.
* harbour log (Alpaca): a report of a ship's arrival becomes one line of a log.

Run ``python -m llmtune.builtin.tasks`` from a checkout to write the files again; they are the same every time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

from llmtune.builtin import words as w
from llmtune.builtin.corpus import invent_name, is_reserved

TRAIN_ROWS, HELDOUT_ROWS = 800, 80
Row = dict[str, object]

_GOODS = [*w.FOODS, *w.MATERIALS, *(f"{thing}s" for thing in w.THINGS)]


def _pick(rng: Random, pool: Sequence[str], *, reserved: bool) -> str:
    return rng.choice([word for word in pool if is_reserved(word) == reserved])


def order_row(rng: Random, *, reserved: bool) -> Row:
    """One order as chat messages; the answer is a JSON object with customer, order and town."""
    customer = f"{invent_name(rng, reserved=reserved)} {invent_name(rng, reserved=reserved)}"
    town = invent_name(rng, reserved=reserved)
    kind = rng.choice(rng.choice((w.COLOURS, w.MATERIALS, w.QUALITIES)))
    order = f"crate of {rng.randint(2, 99)} {kind} {_pick(rng, w.THINGS, reserved=reserved)}s"
    sentence = rng.choice(
        (
            f"Please pack a {order} for {customer} in {town}.",
            f"Somebody in {town} needs a {order}. It is for {customer}.",
            f"A {order} is waiting in {town} for {customer}.",
            f"We have a new order for {customer}: a {order}, to be delivered in {town}.",
            f"Could you leave a {order} for {customer} at the shop in {town}?",
            f"There is a shop in {town} that wants a {order} for {customer}.",
            f"This is for {customer}, who lives in {town} and would like a {order}.",
            f"Our friends in {town} have paid for {customer}, who gets a {order}.",
        )
    )
    answer = json.dumps({"customer": customer, "order": order, "town": town})
    return {"messages": [{"role": "user", "content": sentence}, {"role": "assistant", "content": answer}]}


def log_row(rng: Random, *, reserved: bool) -> Row:
    """One report as instruction, input and output; the output is ``ship: … | from: … | to: … | cargo: … | day: …``."""
    ship, origin, port = (invent_name(rng, reserved=reserved) for _ in range(3))
    goods, n, day = _pick(rng, _GOODS, reserved=reserved), rng.randint(2, 99), rng.choice(w.DAYS)
    report = rng.choice(
        (
            f"On {day} the ship {ship} came to {port} with {n} crates of {goods} from {origin}.",
            f"The {ship} left {origin} with {n} crates of {goods} and reached {port} on {day}.",
            f"{n} crates of {goods} arrived in {port} on {day}. The {ship} had carried them from {origin}.",
            f"It was {day} when the {ship} from {origin} landed {n} crates of {goods} at {port}.",
            f"From {origin} to {port} the {ship} carried {n} crates of {goods}. She came in on {day}.",
            f"{port} received {n} crates of {goods} on {day}. They came from {origin} on the {ship}.",
        )
    )
    return {
        "instruction": "Write this report as one line of the harbour log.",
        "input": report,
        "output": f"ship: {ship} | from: {origin} | to: {port} | cargo: {n} crates of {goods} | day: {day}",
    }


def make_rows(make: Callable[..., Row], count: int, *, reserved: bool, seed: int) -> list[Row]:
    """``count`` rows of one task; with ``reserved`` about names and things that no other row uses."""
    rng = Random(seed)
    return [make(rng, reserved=reserved) for _ in range(count)]


def files() -> dict[Path, list[Row]]:
    """Every shipped data file of a checkout, by path, and the rows it holds."""
    package = Path(__file__).parent
    demo, examples = package / "demo", package.parents[1] / "examples"
    return {
        demo / "train.jsonl": make_rows(order_row, TRAIN_ROWS, reserved=False, seed=1),
        demo / "heldout.jsonl": make_rows(order_row, HELDOUT_ROWS, reserved=True, seed=2),
        examples / "harbour_log.jsonl": make_rows(log_row, TRAIN_ROWS, reserved=False, seed=3),
        examples / "harbour_log_heldout.jsonl": make_rows(log_row, HELDOUT_ROWS, reserved=True, seed=4),
    }


def main() -> None:
    """Writes the data files of a checkout."""
    for path, rows in files().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
