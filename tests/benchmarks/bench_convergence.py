"""Whether llmtune learns what an fp32 Trainer learns: the same start, rows, order and rate, by seed.

    python tests/benchmarks/bench_convergence.py                               # builtin:tiny, LoRA, ten seeds
    python tests/benchmarks/bench_convergence.py --model 50m --steps 300       # from random weights, all trained
    python tests/benchmarks/bench_convergence.py --model 50m --steps 120 --task prose --batch 8 --jobs 2
    python tests/benchmarks/bench_convergence.py --model 50m --data gsm8k.jsonl --heldout-data gsm8k-test.jsonl
    python tests/benchmarks/bench_convergence.py --json convergence.json

Each seed trains twice: as a user of llmtune does (``FineTuner`` in bf16, everything for speed that it chooses), and
with a stock ``transformers.Trainer`` in fp32 that begins with the same values and gets the same rows in each update,
with the settings that our run had. Both results are saved, loaded with transformers and peft alone, and scored on the
same held-out rows in fp32. Two more columns tell how far apart runs are that differ in less: a Trainer with
``bf16=True`` on the same fp32 weights (what bf16 is usually taken to be), and fp32 again from a start that differs in
the last bits (``--neighbours``).

Gradients are compared at the same weights: at updates 1, 100 and the last, those that our run has are given to the
stock fp32 model, which computes the gradient of the update's rows once more. So does a stock bf16 one (peft on a bf16
base; under autocast where all weights are trained), which tells what is bf16's and what is ours.

The rows are arithmetic word problems that llmtune's own corpus makes, with answers that end as GSM8K's do; they are
not GSM8K. With ``--data`` it is that file, JSON lines with a ``question`` and an ``answer`` as GSM8K's own have them.
``--task prose`` are paragraphs of the docstrings of Python's own library: text of people that every machine has.
``--task demo`` are the rows of ``llmtune demo``, which ``builtin:tiny`` learns by heart: the loss comes to a few
hundredths, and no two runs that differ in any rounding agree within 0.5 % of that.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shlex
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from convergence_cases import TASKS, Study, Tokens, build_model, encode, read_rows, rows_of
from convergence_sides import Recorder, Reference, cosine, least_cosine, neighbour, train_ours
from peers.common import IGNORED
from speed_sides import deviation

from llmtune.builtin import tiny_path

MOST_LOSS, LEAST_COSINE = 0.005, 0.999

# ── one seed ─────────────────────────────────────────────────────────────────────────────────────────────────────


def one_seed(study: Study, seed: int, work: Path, *, neighbours: bool = False) -> dict[str, Any]:
    """Train on both sides and compare; everything the table says of this seed."""
    began = time.monotonic()
    model = str(tiny_path()) if study.model == "tiny" else str(build_model(work / "model", seed))
    record, ours = train_ours(study, "builtin:tiny" if study.model == "tiny" else model, seed, work)
    base = Reference(model, ours if study.method == "lora" else None, study.threads)
    heldout, train = (encode(rows, base.tokenizer) for rows in (study.heldout, study.train))
    require_rows(record.updates, train)
    losses, theirs = base.train(record.start, record, work / "fp32")

    def result(where: Path) -> float:
        """Held-out loss of what was saved there."""
        files = (model, where) if study.method == "lora" else (str(where), None)
        return base.loss(Reference(*files, study.threads).model(), heldout)

    found: dict[str, Any] = {
        "seed": seed,
        "start_loss": base.loss(base.model(record.start), heldout),
        "loss": result(ours),
        "reference_loss": result(theirs),
        "train_loss_deviation": deviation(record.losses, losses),
        "train_losses": record.losses,
        "reference_train_losses": losses,
        "learning_rate": record.args.learning_rate,
        "recoveries": record.recoveries,
        "supervised": sum(label != IGNORED for row in heldout for label in row["labels"]),
    }
    found["deviation"] = found["loss"] / found["reference_loss"] - 1
    found["cosines"] = _cosines(record, base, full=study.method == "full")
    if neighbours:
        _, halved = base.train(record.start, record, work / "bf16", bf16=True)
        found["trainer_bf16_deviation"] = result(halved) / found["reference_loss"] - 1
        _, near = base.train(neighbour(record.start, seed), record, work / "near")
        found["neighbour_deviation"] = result(near) / found["reference_loss"] - 1
    return found | {"seconds": time.monotonic() - began}


def _run_seed(study: Study, seed: int, *, root: Path, neighbours: bool) -> dict[str, Any]:
    """`one_seed` in a directory of its own, which is removed; what was found is told at once."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    work = root / f"seed-{seed}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    found = one_seed(study, seed, work, neighbours=neighbours)
    told = {name: value for name, value in found.items() if not name.endswith("losses")}
    print(json.dumps(told), file=sys.stderr, flush=True)
    shutil.rmtree(work)
    return found


def _cosines(record: Recorder, base: Reference, *, full: bool) -> dict[str, Any]:
    """By update: ours of all weights and of the worst one, and that of transformers and peft in bf16 as they are."""
    model, found = base.model(record.start), {}
    narrow = base.model(record.start, dtype=torch.float32 if full else torch.bfloat16)
    for step, point in record.points.items():
        rows = record.updates[step - 1]
        expected = base.gradients(model, point.weights, rows)
        stock = base.gradients(narrow, point.weights, rows, autocast=full)
        least, name = least_cosine(point.gradients, expected)
        found[str(step)] = {
            "all": cosine(point.gradients, expected),
            "stock": cosine(stock, expected),
            "least": least,
            "least_of": name,
        }
    return found


def require_rows(updates: Sequence[Sequence[Tokens]], train: Sequence[Tokens]) -> None:
    """Our run has to have learned from what transformers makes of the rows, each once in an epoch."""

    def key(row: Tokens) -> tuple[Any, ...]:
        return tuple(row["input_ids"]), tuple(row["labels"])

    known = Counter(map(key, train))
    seen = [key(row) for update in updates for row in update]
    for start in range(0, len(seen), len(train)):
        epoch = Counter(seen[start : start + len(train)])
        if epoch - known:
            raise SystemExit("llmtune has other rows than transformers makes of the same data")


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def verdict(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of all seeds, and whether that is good enough."""
    loss = max(abs(seed["deviation"]) for seed in found)
    least = min(step["all"] for seed in found for step in seed["cosines"].values())
    return {"most_deviation": loss, "least_cosine": least, "holds": loss <= MOST_LOSS and least >= LEAST_COSINE}


def table(document: Mapping[str, Any]) -> str:
    """The whole result in Markdown."""
    study, seeds, overall = document["study"], document["seeds"], document["verdict"]
    steps = list(seeds[0]["cosines"])
    more = "trainer_bf16_deviation" in seeds[0]
    heads = ["seed", "loss before", "llmtune bf16", "Trainer fp32", "off by", "largest of a training loss"]
    heads += [f"cosine, update {step}" for step in steps] + ["least: single weight", "least: stock bf16"]
    heads += ["Trainer bf16=True off by", "fp32, start ± 2⁻⁹, off by"] if more else []
    what = "LoRA on builtin:tiny" if study["method"] == "lora" else "all weights of a random 50M model"
    lines = [
        f"## {what}, {study['task']}",
        "",
        f"{study['steps']} updates of {study['batch']} rows, rate {seeds[0]['learning_rate']:g}; "
        f"{study['train']:,} rows, scored on {study['heldout']:,} others ({seeds[0]['supervised']:,} tokens); "
        f"torch {document['versions']['torch']}, transformers {document['versions']['transformers']}.",
        "",
        f"    {document['command']}",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + " --- |" * len(heads),
    ]
    for seed in seeds:
        least = min(seed["cosines"].values(), key=lambda step: step["least"])
        cells = [
            str(seed["seed"]),
            *(f"{seed[name]:.4f}" for name in ("start_loss", "loss", "reference_loss")),
            f"{seed['deviation']:+.3%}",
            f"{seed['train_loss_deviation']:.2%}",
            *(f"{seed['cosines'][step]['all']:.6f}" for step in steps),
            f"{least['least']:.5f}",
            f"{min(step['stock'] for step in seed['cosines'].values()):.6f}",
        ]
        cells += [f"{seed[n]:+.3%}" for n in ("trainer_bf16_deviation", "neighbour_deviation")] if more else []
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        f"\nSeed {seed['seed']}: the run of llmtune recovered by {', '.join(seed['recoveries'])}."
        for seed in seeds
        if seed["recoveries"]
    ]
    said = "holds" if overall["holds"] else "DOES NOT HOLD"
    lines += [
        "",
        f"Over {len(seeds)} seeds: evaluation loss off by {overall['most_deviation']:.3%} at most (allowed "
        f"{MOST_LOSS:.1%}), gradient cosine {overall['least_cosine']:.6f} at least (wanted {LEAST_COSINE}): {said}.",
    ]
    return "\n".join(lines)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def study_of(asked: argparse.Namespace) -> Study:
    """What the command line asks for; embedded rows where it names no files."""
    tiny = asked.model == "tiny"
    batch = asked.batch or (16 if tiny else 32)
    steps = asked.steps or (120 if tiny else 300)
    if asked.data:
        rows = read_rows(asked.data)
        others = read_rows(asked.heldout_data) if asked.heldout_data else rows[-asked.heldout :]
        train, task = rows if asked.heldout_data else rows[: -asked.heldout], f"text of {asked.data.name}"
    else:
        train, others = rows_of(asked.task, min(steps * batch, 8000), asked.heldout)
        task = TASKS[asked.task]
    return Study(
        model=asked.model,
        task=task,
        train=train[: len(train) - len(train) % batch],
        heldout=others,
        steps=steps,
        batch=batch,
        learning_rate=asked.rate or (None if tiny else 5e-4),
        threads=max(1, asked.threads // asked.jobs),
        changes={},
    )


def run(study: Study, seeds: Sequence[int], root: Path, *, neighbours: bool = False, jobs: int = 1) -> dict[str, Any]:
    """All seeds, ``jobs`` of them at a time in processes of their own; what they write is removed."""
    import transformers

    task = partial(_run_seed, study, root=root, neighbours=neighbours)
    if jobs == 1:
        found = [task(seed) for seed in seeds]
    else:
        # Not forked: torch's threads do not live on in a fork.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
            found = list(workers.map(task, seeds))
    told = asdict(study) | {"train": len(study.train), "heldout": len(study.heldout), "method": study.method}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"study": told, "seeds": found, "verdict": verdict(found), "versions": versions}


def main() -> int:
    """The command line; 1 where what is asked does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("tiny", "50m"), default="tiny")
    parser.add_argument("--task", choices=tuple(TASKS), default="words", help="embedded rows")
    parser.add_argument("--data", type=Path, help="JSON lines with question and answer, such as GSM8K's train.jsonl")
    parser.add_argument("--heldout-data", type=Path, help="those to be scored on; else the last rows of --data")
    parser.add_argument("--heldout", type=int, default=80, help="how many rows are scored where they have no file")
    parser.add_argument("--seeds", type=int, default=10, help="0, 1, 2, …")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="updates; 120, 50m: 300")
    parser.add_argument("--batch", type=int, help="rows per update; 16, 50m: 32")
    parser.add_argument("--rate", type=float, help="peak learning rate; llmtune's own, 50m: 5e-4")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all jobs together")
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time; nothing is timed here")
    parser.add_argument("--neighbours", action="store_true", help="train two more times per seed, see above")
    parser.add_argument("--root", type=Path, help="where runs are written; a temporary directory")
    parser.add_argument("--json", type=Path, help="write everything there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.root) as root:
        seeds = range(asked.first_seed, asked.first_seed + asked.seeds)
        document = run(study_of(asked), seeds, Path(root), neighbours=asked.neighbours, jobs=asked.jobs)
    document["command"] = shlex.join(["python", "tests/benchmarks/bench_convergence.py", *sys.argv[1:]])
    if asked.json:
        asked.json.write_text(json.dumps(document, indent=1), encoding="utf-8")
    print(table(document))
    return 0 if document["verdict"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(main())
