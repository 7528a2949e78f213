"""How the machine is used beside the model: threads, data loading, compilation."""

from __future__ import annotations

from dataclasses import dataclass

from llmtune.planning.batching import Load
from llmtune.planning.choice import Choice, asked_or
from llmtune.planning.request import PlanRequest
from llmtune.units import format_seconds

# Up to this hidden width one thread is faster than two: builtin:tiny (256 wide) took 0.32 s per update with one thread
# and 0.38 s with two that yield while waiting, on two AMX cores.
ONE_THREAD_UP_TO = 256

# Seconds to cut and pad one update, per row and per token, doubled for slower cores: 6 to 29 microseconds a row of 140
# to 2,600 tokens on one Xeon core (numpy 2, torch 2.13).
COLLATE_ROW_SECONDS, COLLATE_TOKEN_SECONDS = 12e-6, 20e-9
# A GPU that waits for data longer than this share of a step gets workers; two keep one batch ahead each.
# llmtune: chosen.
STARVED_SHARE, FEW_WORKERS = 0.05, 2

# Compiling the decoder layers for one shape on a GPU, in seconds, and what it then saves of a step: an estimate from 14
# to 32 s on two AMX cores, and from 1.14 to 1.27 times as fast, published for bucketed shapes.
COMPILE_SECONDS, COMPILE_SAVES = 23.0, 0.17
# Different shapes after which torch.compile gives up and runs what is left uncompiled (torch._dynamo.config,
# recompile_limit in torch 2.13).
MOST_SHAPES = 8
# Pay-back is reckoned from nominal rates, so it has to be this many times the cost. llmtune: chosen.
PAYBACK = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionChoices:
    """What does not change the result, only the time it takes."""

    compile: Choice[bool]
    threads: Choice[int]
    num_workers: Choice[int]
    pin_memory: Choice[bool]


def choose_execution(
    request: PlanRequest, load: Load, *, rows: int, step_seconds: float, updates: int, quantized: bool
) -> ExecutionChoices:
    """Threads, workers, pinning and compilation for ``rows`` per update on one process."""
    train = request.config.train
    cuda = request.device.type == "cuda"
    pinning = "page-locked memory lets a GPU fetch batches by itself" if cuda else "for CUDA alone"
    return ExecutionChoices(
        compile=asked_or(
            train.compile, "train.compile", _compile(request, load, step_seconds * updates, updates, quantized)
        ),
        threads=asked_or(train.threads, "train.threads", _threads(request)),
        num_workers=asked_or(train.num_workers, "train.num_workers", _workers(request, load, rows, step_seconds)),
        pin_memory=Choice(cuda, pinning, "derived"),
    )


def threads_of(request: PlanRequest) -> int:
    """CPU threads of one process."""
    return request.config.train.threads or _threads(request).value


def _threads(request: PlanRequest) -> Choice[int]:
    cores = max(1, request.hardware.cpu.usable_cores // request.processes)
    if request.device.type != "cpu":
        return Choice(cores, "cores per process; the accelerator does the arithmetic", "derived")
    if request.spec.shape.hidden <= ONE_THREAD_UP_TO:
        reason = f"matrices {request.spec.shape.hidden} wide are done before a second thread has woken up"
        return Choice(1, reason, "derived", f"{cores} with a wider model" if cores > 1 else "")
    return Choice(cores, "usable cores per process", "derived")


def _workers(request: PlanRequest, load: Load, rows: int, step_seconds: float) -> Choice[int]:
    if request.kind == "cpu":
        return Choice(0, "rows are memory-mapped and tokenised; a worker would take a core from training", "derived")
    seconds = COLLATE_ROW_SECONDS * rows + COLLATE_TOKEN_SECONDS * load.tokens
    share = seconds / step_seconds
    if share <= STARVED_SHARE:
        reason = f"padding one update takes about {1000 * seconds:.1f} ms, {100 * share:.1g} % of a step"
        return Choice(0, reason, "derived", f"{FEW_WORKERS} above {100 * STARVED_SHARE:g} %")
    reason = f"padding one update takes about {100 * share:.0f} % of a step: the GPU would wait for it"
    return Choice(FEW_WORKERS, reason, "derived", f"0 below {100 * STARVED_SHARE:g} %")


def _compile(request: PlanRequest, load: Load, seconds: float, updates: int, quantized: bool) -> Choice[bool]:
    """Whether compilation pays: what it saves over the run against what its shapes cost."""
    if not request.hardware.can_compile:
        return Choice(False, "what torch.compile calls is not installed; llmtune doctor says what", "derived")
    if request.config.train.packing:
        return Choice(False, "rows of a packed sequence attend one by one, which no graph holds", "derived")
    changes = "--set train.compile=true"
    if request.kind == "cpu":
        # A Llama of 135M parameters, 8 rows of 1,000 tokens, all learned: 480 tokens per second with compiled layers,
        # 527 without, and 45 s more before the first update (two AMX cores, torch 2.13).
        return Choice(
            False, "the kernels that take the place of its layers are faster than compiled ones", "derived", changes
        )
    if quantized:
        return Choice(False, "quantised layers are no graph that a compiler sees through", "derived")
    # Every multiple of eight up to the longest row may be a width of a pass, unless all rows are as long.
    stats = request.stats
    widths = (request.longest - request.padded(stats.length_p50)) // 8 * 2 + 1
    shapes = max(load.shapes, min(widths, round(load.passes * updates)))
    if shapes > MOST_SHAPES:
        reason = f"passes come in about {shapes:,} shapes, and each is compiled anew, up to {MOST_SHAPES}"
        return Choice(False, reason, "derived", changes)
    cost, saved = COMPILE_SECONDS * shapes, COMPILE_SAVES * seconds
    sums = f"{shapes} shapes take about {format_seconds(cost)} to compile and save about {format_seconds(saved)}"
    if saved > PAYBACK * cost:
        return Choice(True, sums, "derived", "--set train.compile=false")
    return Choice(False, sums, "derived", f"a run about {PAYBACK * cost / max(saved, 1e-9):.2g} times as long")
