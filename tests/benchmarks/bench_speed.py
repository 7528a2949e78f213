"""How fast llmtune trains beside its peers: the same model, rows, adapter and loss, timed by turns on one machine.

    python tests/benchmarks/bench_speed.py --prepare                       # the peers' environments, once
    python tests/benchmarks/bench_speed.py                                 # 135M shape, chat lengths, share 0.45
    python tests/benchmarks/bench_speed.py --model 0.5b --shape uniform --supervised 1 --peers trl,trl-best
    python tests/benchmarks/bench_speed.py --model 135m,0.5b --shape '' --supervised 0.2,0.45,1 --json speed.json

Both sides are processes of their own that train as their users do and wait between updates (``peers/common.py`` has
the conversation). First both do a few updates whose losses must be those of an fp32 ``Trainer``; a side that learns
something else is not timed. Then they are timed by turns, ours, theirs, ours, theirs, on the same rows, while the other
is stopped. What other programs took of the processors is recorded, and pairs with more than ``--others`` percent are
measured again. Figures are of real tokens; padding does not count. Nothing else may run.

Wheels of torch without CUDA: set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu for ``--prepare``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

from speed_cases import (
    ENVIRONMENTS,
    MODELS,
    MOST_ROWS,
    OURS,
    OWN,
    PASS_TOKENS,
    PEERS,
    PEERS_DIRECTORY,
    REFERENCE,
    SEED,
    SHAPES,
    Job,
    Model,
    Peer,
    Row,
    Shape,
    build_model,
    make_rows,
    write_rows,
)
from speed_sides import (
    OTHERS_LIMIT,
    Expected,
    OutOfMemoryError,
    Protocol,
    Side,
    SideFailedError,
    compare,
    rate,
    started,
)

GIB, MIB = 2**30, 2**20

# ── a case ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A model, a shape of rows and a share of supervised tokens, built in ``root``; workers write to ``work``."""

    model: str
    shape: str
    supervised: float
    threads: int
    root: Path
    work: Path

    @property
    def sizes(self) -> Model:
        return MODELS[self.model]

    @property
    def rows_shape(self) -> Shape:
        return SHAPES[self.shape]

    def build(self, updates: int) -> list[Row]:
        """Write what is missing; the rows of so many updates, in the order of training."""
        from llmtune.data import Part, epoch_order

        build_model(self.sizes, self._model)
        rows = make_rows(self.rows_shape, self.supervised, self.sizes.vocabulary, updates * self.rows_shape.batch)
        self._data.mkdir(parents=True, exist_ok=True)
        write_rows(rows, self._data, lambda count: epoch_order((Part(num_rows=count),), SEED, 0).tolist())
        return rows

    def job(self, mode: str, rows: Sequence[Row], work: Path, most_rows: int) -> Path:
        """The file that tells a worker what to do."""
        batch = self.rows_shape.batch
        mean = statistics.fmean(len(row.input_ids) for row in rows)
        fitting = [n for n in range(1, batch + 1) if batch % n == 0 and n * mean <= PASS_TOKENS]
        work.mkdir(parents=True)
        return Job(
            model=str(self._model / "model"),
            rows=str(self._data / "rows.jsonl"),
            texts=str(self._data / "texts.jsonl"),
            adapter=str(self._model / "adapter.safetensors"),
            mode=mode,
            batch=batch,
            pass_rows=min(max(fitting, default=1), most_rows),
            most_rows=most_rows,
            steps=len(rows) // batch,
            threads=self.threads,
            longest=self.rows_shape.longest,
            masked=self.supervised < 1,
            work=str(work),
        ).write(work / "job.json")

    @property
    def _model(self) -> Path:
        return self.root / f"model-{self.model}"

    @property
    def _data(self) -> Path:
        return self.root / f"rows-{self.model}-{self.shape}-{self.supervised:g}"


class Bench:
    """Runs the comparisons of one case."""

    def __init__(self, case: Case, how: Protocol, environments: Path, patience: float) -> None:
        self._case, self._how, self._environments, self._patience = case, how, environments, patience
        self._rows = case.build(how.most_updates)
        self._count = 0

    def reference(self) -> dict[str, Any]:
        """Losses of the first updates of a Trainer in fp32.

        Raises:
            SideFailedError: It does not run here.
        """
        with self._started(REFERENCE) as side:
            found = Expected(self._rows, self._case.rows_shape.batch).take(REFERENCE, side.steps(self._how.checked))
            return found | {"ready": side.ready}

    def against(self, name: str, reference: Sequence[float]) -> dict[str, Any]:
        """One line of the table; ``absent`` says why there is nothing more in it.

        Whoever runs out of memory is given half as many rows per pass, as its user would do.
        """
        flags, most = PEERS[name].flags, MOST_ROWS
        while True:
            try:
                self._program(name)  # before ours is started for nothing
                with self._started(OWN) as own, self._started(name, most) as peer:
                    batch = self._case.rows_shape.batch
                    found = compare(own, peer, name, self._rows, batch, reference, self._how)
                return {"peer": name, "flags": flags, **found}
            except SideFailedError as error:
                if not isinstance(error, OutOfMemoryError) or most == 1:
                    return {"peer": name, "flags": flags, "absent": str(error)}
            most //= 2
            flags = f"{PEERS[name].flags}; more than {most} rows per pass ran out of memory"

    def _started(self, name: str, most_rows: int = MOST_ROWS) -> AbstractContextManager[Side]:
        side, program = self._side(name), self._program(name)
        self._count += 1
        work = self._case.work / f"{self._count:02d}-{name}"
        job = self._case.job(side.mode, self._rows, work, most_rows)
        env = surroundings(self._case.work)
        return started([*program, str(job)], log=work / "stderr.txt", env=env, patience=self._patience)

    def _side(self, name: str) -> Peer:
        return OURS if name == OWN else PEERS[name]

    def _program(self, name: str) -> list[str]:
        side = self._side(name)
        return [interpreter(self._environments, side.environment), str(PEERS_DIRECTORY / side.driver)]


def surroundings(root: Path) -> dict[str, str]:
    """Environment of every worker: no network, nothing of the user's caches, threads not restricted from outside."""
    limits = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS", "PYTHONPATH")
    kept = {key: value for key, value in os.environ.items() if key not in limits}
    return kept | {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(root / "cache" / "hf"),
        "LLMTUNE_CACHE": str(root / "cache"),
        "LLMTUNE_STORE": f"sqlite:///{root}/store.db",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]) + os.pathsep + str(PEERS_DIRECTORY),
        "PYTHONDONTWRITEBYTECODE": "1",
    }


# ── environments of peers ────────────────────────────────────────────────────────────────────────────────────────


def interpreter(environments: Path, name: str) -> str:
    """The Python of a prepared environment, or of this one.

    Raises:
        SideFailedError: It is not prepared, or could not be.
    """
    if name == OWN:
        return sys.executable
    try:
        noted = json.loads((environments / f"{name}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SideFailedError(f"not prepared: bench_speed.py --prepare {name}") from None
    if noted["failed"]:
        raise SideFailedError(f"cannot be installed: {noted['failed']}")
    return str(environments / name / "bin" / "python")


def prepare(environments: Path, names: Sequence[str]) -> int:
    """Make the environments of these, with the versions that `ENVIRONMENTS` pins; how many failed."""
    failures = 0
    for name in names:
        wanted = ENVIRONMENTS[name]
        print(f"{name}: {' '.join(wanted.requirements + wanted.alone)}", flush=True)
        directory = environments / name
        program = str(directory / "bin" / "python")
        if not Path(program).exists():
            subprocess.run([sys.executable, "-m", "venv", str(directory)], check=True)
        failed = _pip(program, "install", *wanted.requirements)
        if wanted.alone:
            failed = failed or _pip(program, "install", "--no-deps", *wanted.alone)
        if wanted.removed:
            failed = failed or _pip(program, "uninstall", "--yes", *wanted.removed)
        document = {**asdict(wanted), "failed": failed}
        (environments / f"{name}.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
        print(f"{name}: {failed or 'ready'}", flush=True)
        failures += bool(failed)
    return failures


def _pip(program: str, *arguments: str) -> str:
    """What pip says has gone wrong; empty where nothing has."""
    done = subprocess.run([program, "-m", "pip", "--quiet", *arguments], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if line.startswith("ERROR: ")] or done.stderr.splitlines()
    return "" if done.returncode == 0 else (said[-1] if said else f"pip ended with {done.returncode}")[:300]


# ── what the machine can do ──────────────────────────────────────────────────────────────────────────────────────

_GEMM = """
import statistics, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))
a, b = (torch.randn(int(sys.argv[2]), int(sys.argv[2])).bfloat16() for _ in range(2))
seconds = []
for _ in range(int(sys.argv[3])):
    began = time.perf_counter()
    a @ b
    seconds.append(time.perf_counter() - began)
print(2 * len(a) ** 3 / statistics.median(seconds[1:]))
"""


def gemm_rate(threads: int, width: int = 4096, tries: int = 12) -> float:
    """FLOP/s of a bf16 product of square matrices, in a process of its own."""
    command = [sys.executable, "-c", _GEMM, str(threads), str(width), str(tries)]
    env = {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


def machine() -> dict[str, Any]:
    """What was measured on."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    facts = dict(line.split("\t", 1) for line in lines if "\t" in line)
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", ": unknown").split(":", 1)[1].strip(),
        "matrix_units": sorted({"amx_bf16", "avx512_bf16", "avx512f", "avx2"} & set(flags)),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
    }


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def figures(line: dict[str, Any], sizes: Model, calibration: float) -> dict[str, Any]:
    """What the table says of one comparison."""
    pairs, name = line["pairs"], line["peer"]
    ratios = [pair["ratio"] for pair in pairs]
    found: dict[str, Any] = {
        "ratio": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "pairs": len(pairs),
        "rejected": len(line["rejected_others_percent"]),
        "most_others_percent": max(pair[side]["others_percent"] for pair in pairs for side in ("own", "peer")),
    }
    for side, called in (("own", OWN), ("peer", name)):
        samples = [pair[side] for pair in pairs]
        start = line["start"][called]
        found[side] = {
            "tokens_per_second": statistics.median(map(rate, samples)),
            "supervised_per_second": statistics.median(taken["supervised"] / taken["seconds"] for taken in samples),
            "peak_bytes": max(taken["peak_bytes"] for taken in samples),
            "mfu": statistics.median(
                sizes.flops(taken["lengths"], taken["supervised"]) / taken["seconds"] / calibration for taken in samples
            ),
            "ready_seconds": start["ready"]["seconds"],
            "first_seconds": start["first"]["seconds"],
            "loss_deviation": start["loss_deviation"],
            "versions": start["ready"]["versions"],
        }
    found["memory_ratio"] = found["own"]["peak_bytes"] / found["peer"]["peak_bytes"]
    return found


HEADER = (
    "| peer | faster by (least–most) | tokens/s, ours : theirs | of them supervised | memory, ours : theirs | "
    "MFU, ours : theirs | ready and first updates, s | loss off by |"
)


def table(document: dict[str, Any]) -> str:
    """The whole result in Markdown."""
    case, how, lines = document["case"], document["protocol"], document["lines"]
    host = document["machine"]
    calibration = document["gemm_flops"]
    text = [
        f"## {case['model']}, {case['shape']} lengths, supervised share {case['supervised']:g}",
        "",
        f"{host['cpu']}, {host['cores']} cores ({', '.join(host['matrix_units'])}), "
        f"{host['memory_bytes'] / GIB:.0f} GiB, {host['system']}. "
        f"bf16 GEMM {max(calibration) / 1e12:.3g} TFLOP/s ({', '.join(f'{c / 1e12:.3g}' for c in calibration)}). "
        f"{case['batch']} rows per update, {how['steps']} updates per sample, {how['pairs']} pairs; at most "
        f"{how['others_limit']:g} % of the processors with others.",
        "",
        f"    {document['command']}",
        "",
        HEADER,
        "|" + " --- |" * (HEADER.count("|") - 1),
    ]
    text += [_row(line) for line in lines]
    told = {OWN: document["versions"]} | {
        line["peer"]: line["figures"]["peer"]["versions"] for line in lines if "figures" in line
    }
    text += ["", *(f"- {name}: {', '.join(f'{k} {v}' for k, v in found.items())}" for name, found in told.items())]
    return "\n".join(text)


def _row(line: dict[str, Any]) -> str:
    title = f"| {line['peer']} ({line['flags']}) |"
    if "absent" in line:
        return f"{title} {line['absent'].replace('|', '/')} |" + " |" * (HEADER.count("|") - 3)
    got = line["figures"]
    own, peer = got["own"], got["peer"]
    few = "" if not got["rejected"] else f", {got['pairs']} pairs, {got['rejected']} rejected"
    cells = [
        f"{got['ratio']:.2f} × ({got['ratio_least']:.2f}–{got['ratio_most']:.2f}{few})",
        f"{own['tokens_per_second']:,.0f} : {peer['tokens_per_second']:,.0f}",
        f"{own['supervised_per_second']:,.0f} : {peer['supervised_per_second']:,.0f}",
        f"{own['peak_bytes'] / MIB:,.0f} : {peer['peak_bytes'] / MIB:,.0f} MiB ({100 * got['memory_ratio']:.0f} %)",
        f"{100 * own['mfu']:.1f} : {100 * peer['mfu']:.1f} %",
        " : ".join(f"{side['ready_seconds']:.1f} + {side['first_seconds']:.1f}" for side in (own, peer)),
        f"{100 * own['loss_deviation']:.2f} : {100 * peer['loss_deviation']:.2f} %",
    ]
    return f"{title} {' | '.join(cells)} |"


def run(case: Case, how: Protocol, peers: Sequence[str], environments: Path, patience: float) -> dict[str, Any]:
    """Everything that was measured, as JSON has it."""
    calibration = [gemm_rate(case.threads)]
    bench = Bench(case, how, environments, patience)
    document: dict[str, Any] = {
        "command": shlex.join(["python", *sys.argv]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": machine(),
        "case": {"model": case.model, "shape": case.shape, "supervised": case.supervised, "threads": case.threads}
        | {"batch": case.rows_shape.batch},
        "protocol": {key: getattr(how, key) for key in Protocol.__slots__},
        "versions": {},
    }
    document["reference"] = bench.reference()
    lines = []
    for name in peers:
        print(f"{name} …", file=sys.stderr, flush=True)
        lines.append(bench.against(name, document["reference"]["losses"]))
    calibration.append(gemm_rate(case.threads))
    for line in lines:
        if "pairs" in line:
            line["figures"] = figures(line, case.sizes, max(calibration))
            document["versions"] = line["figures"]["own"]["versions"]
    return document | {"gemm_flops": calibration, "lines": lines}


def chosen(text: str, known: Sequence[str]) -> list[str]:
    """Names of a list with commas; all of them for an empty one."""
    names = [name.strip() for name in text.split(",") if name.strip()] or list(known)
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main() -> int:
    """Prepare environments, or measure cases and print a table of each; not 0 when something could not be done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmtune-bench-peers"
    parser.add_argument("--model", default="135m", help=f"{', '.join(MODELS)}; several with commas, '' for all")
    parser.add_argument("--shape", default="chat", help=f"lengths of rows: {', '.join(SHAPES)}; likewise")
    parser.add_argument("--supervised", default="0.45", help="shares of tokens that are learned, with commas")
    parser.add_argument("--peers", default="", help="names with commas; all when left out")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates per sample")
    parser.add_argument("--warm", type=int, default=2, help="updates before the first sample, besides the checked ones")
    parser.add_argument("--others", type=float, default=OTHERS_LIMIT, help="percent that other programs may take")
    parser.add_argument("--patience", type=float, default=3600, help="seconds that one answer of a worker may take")
    parser.add_argument("--environments", type=Path, default=cache, help="where the peers' environments are")
    parser.add_argument("--root", type=Path, help="where models and rows are kept for the next time")
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--prepare", nargs="?", const="", help="make environments, all or those named, and stop")
    asked = parser.parse_args()
    if asked.prepare is not None:
        asked.environments.mkdir(parents=True, exist_ok=True)
        return min(1, prepare(asked.environments, chosen(asked.prepare, list(ENVIRONMENTS))))
    peers = chosen(asked.peers, [name for name in PEERS if name != REFERENCE])
    how = Protocol(pairs=asked.pairs, steps=asked.steps, warm=asked.warm, others_limit=asked.others)
    if asked.root:
        asked.root.mkdir(parents=True, exist_ok=True)
    shares = [float(share) for share in asked.supervised.split(",")]
    cases = product(chosen(asked.model, list(MODELS)), chosen(asked.shape, list(SHAPES)), shares)
    documents: list[dict[str, Any]] = []
    failed = False
    for model, shape, supervised in cases:
        with tempfile.TemporaryDirectory(dir=asked.root) as directory:
            case = Case(
                model=model,
                shape=shape,
                supervised=supervised,
                threads=len(os.sched_getaffinity(0)),
                root=asked.root or Path(directory),
                work=Path(directory),
            )
            try:
                documents.append(run(case, how, peers, asked.environments, asked.patience))
            except SideFailedError as error:
                print(f"the reference ({REFERENCE}) cannot be had: {error}", file=sys.stderr)
                failed = True
                continue
        print(table(documents[-1]) + "\n", flush=True)
        failed |= any(OWN in line.get("absent", "") for line in documents[-1]["lines"])  # ours was found wrong
        if asked.json:  # after each case: a night's work is not lost with its last one
            asked.json.write_text(json.dumps({"format": 2, "cases": documents}, indent=1), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
