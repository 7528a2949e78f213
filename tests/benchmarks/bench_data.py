"""How fast data is checked and tokenised, in how much memory, and how little padding is left.

    python tests/benchmarks/bench_data.py                    # all of it: 1 GB of chat JSONL, about ten minutes
    python tests/benchmarks/bench_data.py --megabytes 100    # a quick look

Everything is measured from outside: commands run in processes of their own, memory is read from the operating system
over the whole process tree, the bare tokenizer runs in the same process as ours, in turns. Nothing else may run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

PAIRS = 5
PACKAGES = ("llmtune", "torch", "transformers", "tokenizers", "datasets", "datasketch", "loky", "orjson", "numpy")


# ── the data ─────────────────────────────────────────────────────────────────────────────────────────────────────


def write_chats(path: Path, num_bytes: int, *, seed: int = 0) -> int:
    """Chat JSONL of words that follow Zipf's law, 1 to 3 exchanges a row, about 1.7 KB; returns the number of rows."""
    rng = random.Random(seed)
    letters = "eeeeeeettttaaaaooooiiinnnssshhrrddlluuccmmffwwyygpbvk"  # about as often as in English
    words = ["".join(rng.choices(letters, k=min(12, 1 + int(rng.expovariate(0.25))))) for _ in range(20_000)]
    cumulative = np.cumsum(1 / np.arange(1, len(words) + 1)).tolist()

    def text(scale: float) -> str:
        return " ".join(rng.choices(words, cum_weights=cumulative, k=1 + int(rng.lognormvariate(scale, 0.8)))) + "."

    rows = size = 0
    with open(path, "w", encoding="utf-8") as file:
        while size < num_bytes:
            messages = [{"role": "system", "content": text(2.5)}] if rng.random() < 0.3 else []
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                messages += [
                    {"role": "user", "content": text(3.4)},
                    {"role": "assistant", "content": text(4.6)},
                ]
            size += file.write(json.dumps({"id": rows, "messages": messages}, ensure_ascii=False) + "\n")
            rows += 1
    return rows


def log_normal_lengths(count: int = 100_000) -> np.ndarray:
    """Tokens per row: median 100, with a tail 20 times as long."""
    lengths = np.random.default_rng(0).lognormal(np.log(100), 0.8, count)
    return np.clip(lengths, 8, 2_000).astype(np.int32)


# ── measuring ────────────────────────────────────────────────────────────────────────────────────────────────────


def run_measured(command: Sequence[str], env: dict[str, str] | None = None) -> tuple[float, int, str]:
    """Seconds, peak resident bytes of the whole process tree (sampled every 20 ms) and standard output of a command."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = psutil.Popen(command, stdout=out, stderr=subprocess.PIPE, env={**os.environ, **(env or {})})
        peak = 0
        while process.poll() is None:
            peak = max(peak, _tree_bytes(process))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        if process.returncode != 0:
            raise SystemExit(f"{' '.join(command)} failed:\n{process.stderr.read().decode()}")
        out.seek(0)
        return seconds, peak, out.read()


def _tree_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        members = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for member in members:
        try:
            total += member.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def in_turns(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float, list[float]]:
    """Median seconds of both, and the ratio first / second of each of ``PAIRS`` pairs run one after the other."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(PAIRS):
        for function, taken in zip((first, second), seconds, strict=True):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
    ratios = [a / b for a, b in zip(*seconds, strict=True)]
    return statistics.median(seconds[0]), statistics.median(seconds[1]), ratios


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────


def bench_check(path: Path) -> dict[str, Any]:
    """``llmtune check`` from the command to its last line, start-up included; near duplicates timed apart."""
    path.read_bytes()  # both from the page cache
    megabytes = path.stat().st_size / 1e6
    command = [sys.executable, "-m", "llmtune", "check", str(path), "--json"]
    seconds, peak, out = run_measured([*command, "--no-near-duplicates"])
    near_seconds, near_peak, near_out = run_measured([*command, "--near-duplicates"])
    return {
        "megabytes": round(megabytes),
        "rows": json.loads(out)["rows"],
        "seconds": seconds,
        "megabytes_per_second": megabytes / seconds,
        "peak_tree_bytes": peak,
        "with_near_duplicates_seconds": near_seconds,
        "with_near_duplicates_peak_tree_bytes": near_peak,
        "duplicates": json.loads(near_out)["duplicates"],
    }


def bench_encode(path: Path, tokenizer: Any) -> dict[str, Any]:
    """Tokens, masks and proof of a file against ``encode_batch`` on the same rendered texts."""
    from llmtune.data import encode, read

    conversations = [[message.to_template() for message in record.messages] for record in read(path)]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    backend = tokenizer.backend_tokenizer

    def bare() -> None:
        for start in range(0, len(texts), 1000):
            backend.encode_batch(texts[start : start + 1000], add_special_tokens=False)

    def ours() -> None:
        with tempfile.TemporaryDirectory() as cache:
            encode(path, tokenizer, cache_dir=cache)

    bare_seconds, our_seconds, ratios = in_turns(bare, ours)
    return {
        "rows": len(texts),
        "megabytes": sum(map(len, texts)) / 1e6,
        "encode_batch_seconds": bare_seconds,
        "encode_seconds": our_seconds,
        "share_of_encode_batch": statistics.median(ratios),
        "share_min_max": [min(ratios), max(ratios)],
    }


_TOKENISE = """
import sys, time
from transformers import AutoTokenizer
from llmtune.data import encode
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
start = time.perf_counter()
rows = encode(sys.argv[1], tokenizer, cache_dir=sys.argv[3])
print(len(rows), time.perf_counter() - start)
"""


def bench_cache(path: Path, tokenizer: Any, directory: Path) -> dict[str, Any]:
    """The same data twice, each in a process of its own; memory is the whole tree's."""
    saved, cache = directory / "tokenizer", directory / "cache"
    tokenizer.save_pretrained(saved)
    command = [sys.executable, "-c", _TOKENISE, str(path), str(saved), str(cache)]
    _, first_peak, first = run_measured(command)
    _, second_peak, second = run_measured(command)
    return {
        "rows": int(first.split()[0]),
        "first_seconds": float(first.split()[1]),
        "first_peak_tree_bytes": first_peak,
        "second_seconds": float(second.split()[1]),
        "second_peak_tree_bytes": second_peak,
    }


def bench_batches(lengths: np.ndarray, token_budget: int) -> list[dict[str, Any]]:
    """Padding and packing inside effective batches of one epoch."""
    from llmtune.data import Part, epoch_order, micro_batches, pack_rows, padded
    from llmtune.planning.batching import CPU_PASS_OVERHEAD_TOKENS

    order = epoch_order([Part(num_rows=len(lengths))], 42, 0)
    found = []
    for batch in (16, 64, 256):
        filled = fewest_filled = greedy = real = packed = passes = fewest_passes = 0
        seconds = []
        for first in range(0, min(len(order), 40 * batch) - batch + 1, batch):
            rows = order[first : first + batch].tolist()
            start = time.perf_counter()
            pieces = micro_batches(
                lengths,
                rows,
                token_budget=token_budget,
                pad_multiple=8,
                pass_overhead_tokens=CPU_PASS_OVERHEAD_TOKENS,
            )
            seconds.append(time.perf_counter() - start)
            filled += sum(len(piece) * padded(int(lengths[piece].max()), 8) for piece in pieces)
            passes += len(pieces)
            fewest = micro_batches(lengths, rows, token_budget=token_budget, pad_multiple=8)
            fewest_filled += sum(len(piece) * padded(int(lengths[piece].max()), 8) for piece in fewest)
            fewest_passes += len(fewest)
            greedy += _greedy_filled(lengths[rows], token_budget)
            real += int(lengths[rows].sum())
            packed += len(pack_rows(lengths, rows, token_budget=token_budget)) * token_budget
        found.append(
            {
                "global_batch_size": batch,
                "padding": 1 - real / filled,
                "passes": passes,
                "padding_with_the_fewest_passes": 1 - real / fewest_filled,
                "fewest_passes": fewest_passes,
                "padding_of_a_greedy_cut": 1 - real / greedy,
                "packing_efficiency": real / packed,
                "milliseconds_per_update": 1e3 * statistics.median(seconds),
            }
        )
    return found


def _greedy_filled(lengths: np.ndarray, budget: int) -> int:
    """Padded tokens when rows, longest first, fill one micro-batch after the other."""
    total, longest, count = 0, 0, 0
    for length in sorted((-(-length // 8) * 8 for length in lengths.tolist()), reverse=True):
        if count and (count + 1) * longest <= budget:
            count += 1
        else:
            total += longest * count
            longest, count = length, 1
    return total + longest * count


# ── the account ──────────────────────────────────────────────────────────────────────────────────────────────────


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=1000, help="size of the chat file that is checked")
    parser.add_argument("--encode-megabytes", type=int, default=40, help="size of the one tokenised in turns")
    parser.add_argument("--cache-rows", type=int, default=100_000, help="rows of the one tokenised twice")
    parser.add_argument("--gsm8k", type=Path, help="GSM8K as JSONL, for the padding of real lengths")
    parser.add_argument("--tokenizer", help="directory of another tokenizer than builtin:tiny's")
    parser.add_argument("--only", choices=["check", "encode", "cache", "batches"], action="append")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    arguments = parser.parse_args()
    wanted = arguments.only or ["check", "encode", "cache", "batches"]
    figures: dict[str, Any] = {
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_bytes": psutil.virtual_memory().total},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "command": " ".join(sys.argv),
        "load_before": os.getloadavg()[0],
    }
    print(json.dumps(figures, indent=2))
    tokenizer = _tokenizer(arguments.tokenizer)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if "check" in wanted:
            path = directory / "large.jsonl"
            write_chats(path, arguments.megabytes * 1_000_000)
            _tell(figures, "check", bench_check(path))
            path.unlink()
        if "encode" in wanted:
            path = directory / "medium.jsonl"
            write_chats(path, arguments.encode_megabytes * 1_000_000, seed=1)
            _tell(figures, "encode", bench_encode(path, tokenizer))
        if "cache" in wanted:
            path = directory / "rows.jsonl"
            with open(path, "w", encoding="utf-8") as file:
                rng = random.Random(2)
                for number in range(arguments.cache_rows):
                    words = " ".join(str(rng.randrange(10_000)) for _ in range(60))
                    file.write(json.dumps({"question": f"What is {number}?", "answer": words}) + "\n")
            _tell(figures, "cache", bench_cache(path, tokenizer, directory))
        if "batches" in wanted:
            _tell(figures, "log-normal lengths", bench_batches(log_normal_lengths(), 1024))
            if arguments.gsm8k:
                from llmtune.data import encode

                rows = encode(arguments.gsm8k, tokenizer, cache_dir=directory)
                _tell(figures, "GSM8K lengths", bench_batches(np.asarray(rows.lengths), 1024))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def _tell(figures: dict[str, Any], name: str, found: Any) -> None:
    figures[name] = found
    print(json.dumps({name: found}, indent=2), flush=True)


def _tokenizer(directory: str | None) -> Any:
    from transformers import AutoTokenizer

    from llmtune.builtin import tiny_path

    return AutoTokenizer.from_pretrained(directory or tiny_path())


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
