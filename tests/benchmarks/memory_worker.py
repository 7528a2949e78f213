"""How much memory one run of llmtune really takes: a program of its own that knows nothing of any prediction.

    python tests/benchmarks/memory_worker.py '{"architecture": "llama", "hidden": 512, "method": "lora", "rows": 4}'

A case is JSON, in the argument or on stdin; what is left out is as in ``memory_cases.DEFAULTS``. The answer is JSON.

Every case is a true ``FineTuner(...).train()`` on a model with random weights and on rows of exactly ``width`` tokens,
``rows`` of them in each forward pass. It is run twice, in two fresh processes:

tracked
    Under torch's profiler, which reports every allocation and release of the CPU allocator, also those inside an
    operation. ``tensor_peak_bytes`` is the most that was alive at once, plus the weights that are mapped from their
    file and that no allocator knows. oneDNN's own scratch memory and numpy's arrays are not tensors.
plain
    Without it: ``rss_*`` is the resident set as the kernel saw it (VmHWM), ``step_seconds`` the time of each update.

Keys of the answer, all in bytes or seconds::

    tensor_peak_bytes          as above; peak_by_phase: the most within load, forward, backward, clip, optimizer,
                               evaluation, save and everything else
    held_bytes                 the most of: heap so far (heap_bytes at last), which does not shrink, and the blocks
                               alive that are too large for it; what glibc keeps for these tensors without any gaps
    standing_bytes             alive after loading: weights, buffers, adapter; mapped_bytes of them are mapped
    saved_for_backward_bytes   alive after a training forward pass less alive before it, the most of all passes
    at_peak                    what is alive at the peak: [{phase, op, bytes, count}], largest first
    live_after_updates         alive after each update; a leak would grow it
    unknown_frees              releases of memory that was never seen to be allocated; not 0 means that tracking leaks
    rss_before_model_bytes     before the weights are loaded, libraries imported and data encoded
    rss_loaded_bytes           just after loading; rss_load_peak_bytes: the most until then
    rss_peak_bytes             the most of the whole run; rss_file_bytes: file pages in the resident set at its end
    step_seconds               of each update, and step_cpu_seconds of all threads
    trained                    parameters that are trained
    plans                      the plan*.json that the run wrote, oldest first
    checkpointed_layers        decoder layers that are recomputed in the backward pass
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_cases import build, complete, settings_of

# ── one run, watched ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watch:
    """Puts names on what a run does, from outside: the loaded model, the passes, clipping, optimizer and saves."""

    on_load: Callable[[Any], None]
    before_load: Callable[[], None]
    phase: Callable[[str], contextlib.AbstractContextManager[Any]]
    step_seconds: list[float] = field(default_factory=list)
    step_cpu_seconds: list[float] = field(default_factory=list)
    trained: int = 0
    checkpointed_layers: int = 0

    def attach(self) -> Any:
        """Wrap what the run will call; returns the callback that it has to be given."""
        from accelerate import Accelerator
        from accelerate.optimizer import AcceleratedOptimizer
        from transformers import TrainerCallback

        import llmtune.models
        from llmtune.training.trainer import UpdateTrainer

        load = llmtune.models.load_for_training

        def load_watched(*args: Any, **kwargs: Any) -> Any:
            self.before_load()
            with self.phase("load"):
                model = load(*args, **kwargs)
            self.on_load(model)
            self._name_passes(model)
            return model

        llmtune.models.load_for_training = load_watched
        for owner, method, name in (
            (Accelerator, "backward", "backward"),
            (Accelerator, "clip_grad_norm_", "clip"),
            (AcceleratedOptimizer, "step", "optimizer"),
            (UpdateTrainer, "_save_checkpoint", "save"),
            (UpdateTrainer, "save_final", "save"),
        ):
            self._name(owner, method, name)
        watch = self

        class Clock(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.checkpointed_layers = _checkpointed(kwargs["model"])
                self.started = time.perf_counter(), time.process_time()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                watch.step_seconds.append(time.perf_counter() - self.started[0])
                watch.step_cpu_seconds.append(time.process_time() - self.started[1])
                with watch.phase("updated"):
                    pass

        return Clock()

    def _name(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def named(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return original(*args, **kwargs)

        setattr(owner, method, named)

    def _name_passes(self, model: Any) -> None:
        self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        running: list[Any] = []

        def enter(module: Any, *_: Any) -> None:
            running.append(self.phase("forward" if module.training else "evaluation"))
            running[-1].__enter__()

        def leave(*_: Any) -> None:
            running.pop().__exit__(None, None, None)

        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave)


def _checkpointed(model: Any) -> int:
    """Decoder layers whose forward pass is recomputed."""
    layers = (module for module in model.modules() if type(module).__name__.endswith(("DecoderLayer", "Block")))
    return sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)


def _train(case: dict[str, Any], root: Path, watch: Watch) -> list[dict[str, Any]]:
    """Train; what the run wrote down as its plans, oldest first."""
    from llmtune import FineTuner

    with tempfile.TemporaryDirectory() as output:
        run = Path(output) / "run"
        callback = watch.attach()
        FineTuner(callbacks=[callback], **settings_of(case, root, run)).train()
        plans = sorted(run.glob("plan*.json"), key=lambda path: (len(path.name), path.name))
        return [json.loads(path.read_text(encoding="utf-8")) for path in plans]


def plain(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """Resident set and time of a run, with nothing that watches tensors."""
    found: dict[str, Any] = {}
    peaks = [0]

    def before_reset(event: str, arguments: tuple[Any, ...]) -> None:
        # Written to, this file makes the kernel's peak count from there; llmtune measures parts of a run in this way.
        if event == "open" and str(arguments[0]).endswith("/clear_refs"):
            peaks.append(_status("VmHWM"))

    def before_load() -> None:
        found["rss_before_model_bytes"] = _status("VmRSS")

    def on_load(_: Any) -> None:
        found["rss_loaded_bytes"], found["rss_load_peak_bytes"] = _status("VmRSS"), max(*peaks, _status("VmHWM"))

    sys.addaudithook(before_reset)

    watch = Watch(on_load, before_load, lambda name: contextlib.nullcontext())
    plans = _train(case, root, watch)
    return found | {
        "plans": plans,
        "rss_peak_bytes": max(*peaks, _status("VmHWM")),
        "rss_file_bytes": _status("RssFile"),
        "rss_end_bytes": _status("VmRSS"),
        "step_seconds": watch.step_seconds,
        "step_cpu_seconds": watch.step_cpu_seconds,
    }


def _status(key: str) -> int:
    """A line of /proc/self/status in bytes; VmHWM is the peak of the resident set."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def tracked(case: dict[str, Any], root: Path) -> dict[str, Any]:
    """Every tensor of a run, from the allocator's own events."""
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the profiler sees one thread; weights are otherwise read by four
    _draw_into_tensors()
    from torch.autograd.profiler import record_function
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True)
    standing: list[tuple[int, int]] = []
    watch = Watch(
        lambda model: standing.extend(_ranges(model)),
        profiler.start,
        lambda name: record_function(f"phase:{name}"),
    )
    _train(case, root, watch)
    profiler.stop()
    results: Any = profiler.profiler
    return _account(results.kineto_results.experimental_event_tree(), standing) | {
        "trained": watch.trained,
        "checkpointed_layers": watch.checkpointed_layers,
    }


def _draw_into_tensors() -> None:
    """Masks of dropout are numpy's memory, which no allocator of torch reports: copied into a tensor's."""
    from llmtune.kernels import adapters

    draw = adapters.draw_mask
    adapters.draw_mask = lambda x, kept: draw(x, kept).clone()


def _ranges(model: Any) -> Iterator[tuple[int, int]]:
    """First byte and the one after the last of each parameter and buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size()


# ── from events to figures ───────────────────────────────────────────────────────────────────────────────────────


# Smaller blocks glibc takes from its heap once some were freed (DEFAULT_MMAP_THRESHOLD_MAX of malloc.c, 64 bit),
# and the heap does not shrink; larger ones it maps and gives back.
HEAP_BYTES = 32 * 2**20


@dataclass
class _Event:
    time: int
    order: int
    kind: str  # alloc, enter, leave
    name: str = ""
    pointer: int = 0
    size: int = 0


def _flatten(tree: Any) -> list[_Event]:
    """Allocations with the operations around them, and borders of phases, in the order of time."""
    events: list[_Event] = []
    stack: list[tuple[Any, tuple[str, ...]]] = [(node, ()) for node in reversed(tree)]
    while stack:
        node, path = stack.pop()
        name = node.name
        if name == "[memory]":
            extra = node.extra_fields
            shown = " > ".join(path[-4:])
            events.append(_Event(node.start_time_ns, len(events), "alloc", shown, extra.ptr, extra.alloc_size))
        elif name.startswith("phase:"):
            events.append(_Event(node.start_time_ns, len(events), "enter", name[6:]))
            events.append(_Event(node.end_time_ns, len(events) + 10**12, "leave", name[6:]))
        below = path if name.startswith(("phase:", "ProfilerStep")) else (*path, name.removeprefix("aten::"))
        stack += [(child, below) for child in reversed(node.children)]
    return sorted(events, key=lambda event: (event.time, event.order))


def _account(tree: Any, standing: list[tuple[int, int]]) -> dict[str, Any]:
    live: dict[int, int] = {}
    total = unknown = peak = saved = small = most_small = held = 0
    mapped = 0
    phases: list[tuple[str, int]] = []
    peaks: dict[str, int] = defaultdict(int)
    after_updates: list[int] = []
    standing_bytes = peak_number = 0
    events = _flatten(tree)
    for number, event in enumerate(events):
        if event.kind == "enter":
            phases.append((event.name, total))
        elif event.kind == "leave":
            name, before = phases.pop()
            assert name == event.name, (name, event.name)
            if name == "load":
                known = [(pointer, pointer + size) for pointer, size in live.items()]
                mapped = _covered([*known, *standing]) - _covered(known)
                standing_bytes = total + mapped
                total += mapped
            elif name == "forward":
                saved = max(saved, total - before)
            elif name == "updated":
                after_updates.append(total)
        elif event.size > 0:
            live[event.pointer] = event.size
            total += event.size
            small += event.size if event.size < HEAP_BYTES else 0
        elif event.pointer in live:
            size = live.pop(event.pointer)
            total -= size
            small -= size if size < HEAP_BYTES else 0
        else:
            unknown += 1
        phase = phases[-1][0] if phases else "other"
        peaks[phase] = max(peaks[phase], total)
        most_small = max(most_small, small)
        held = max(held, most_small + total - small)
        if total > peak:
            peak, peak_number = total, number
    peaks.pop("updated", None)
    return {
        "tensor_peak_bytes": peak,
        "held_bytes": held,
        "heap_bytes": most_small,
        "peak_by_phase": dict(peaks),
        "standing_bytes": standing_bytes,
        "mapped_bytes": mapped,
        "saved_for_backward_bytes": saved,
        "live_after_updates": after_updates,
        "unknown_frees": unknown,
        "at_peak": _grouped(events[: peak_number + 1]),
    }


def _covered(ranges: list[tuple[int, int]]) -> int:
    """Bytes that lie in at least one of these ranges."""
    covered = end = 0
    for first, last in sorted(ranges):
        covered += max(0, last - max(first, end))
        end = max(end, last)
    return covered


def _grouped(events: list[_Event]) -> list[dict[str, Any]]:
    """What is alive after these events, by phase and operation."""
    live: dict[int, tuple[str, str, int]] = {}
    phases = ["other"]
    for event in events:
        if event.kind == "enter":
            phases.append(event.name)
        elif event.kind == "leave":
            phases.pop()
        elif event.size > 0:
            live[event.pointer] = (phases[-1], event.name, event.size)
        else:
            live.pop(event.pointer, None)
    groups: dict[tuple[str, str], list[int]] = defaultdict(list)
    for phase, op, size in live.values():
        groups[phase, op].append(size)
    largest = sorted(groups.items(), key=lambda group: -sum(group[1]))[:60]
    return [{"phase": p, "op": op, "bytes": sum(s), "count": len(s)} for (p, op), s in largest]


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────

ROLES = {"build": build, "plain": plain, "tracked": tracked}


def measure(case: dict[str, Any], root: Path, roles: tuple[str, ...] = ("tracked", "plain")) -> dict[str, Any]:
    """Build what is missing, run the case in a fresh process per role, and put the answers together.

    Raises:
        RuntimeError: A process failed; with the end of what it said.
    """
    found: dict[str, Any] = {}
    for role in ("build", *roles):
        command = [sys.executable, __file__, "--role", role, "--root", str(root), json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | surroundings(root))
        if done.returncode != 0:
            raise RuntimeError(f"{role} of {json.dumps(case)} failed:\n{done.stderr[-3000:]}")
        found |= json.loads(done.stdout.splitlines()[-1])
    return found


def surroundings(root: Path) -> dict[str, str]:
    """Environment of every process: nothing of the user's caches and store is read or written; the command's heap."""
    return {
        "HF_HUB_OFFLINE": "1",
        "LLMTUNE_CACHE": str(root / "cache"),
        "LLMTUNE_STORE": f"sqlite:///{root}/store.db",
        # What the command llmtune sets for itself before anything is loaded.
        "GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0",
    }


def main() -> None:
    """Read one case, measure it, write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="?", help="JSON; read from stdin when left out")
    parser.add_argument("--root", type=Path, help="where models and rows are kept for the next call")
    parser.add_argument("--role", choices=tuple(ROLES), help="do this part in this very process")
    parser.add_argument("--only", choices=("plain", "tracked"), help="leave the other run out")
    asked = parser.parse_args()
    case = complete(json.loads(asked.case or sys.stdin.read()))
    case.pop("name", None)
    with contextlib.ExitStack() as stack:
        root = asked.root or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if asked.role:
            with contextlib.redirect_stdout(sys.stderr):
                found = ROLES[asked.role](case, root)
            print(json.dumps(found))
        else:
            print(json.dumps(measure(case, root, (asked.only,) if asked.only else ("tracked", "plain")), indent=1))


if __name__ == "__main__":
    main()
