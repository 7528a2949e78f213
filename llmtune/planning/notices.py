"""What a user should know beside the numbers of a plan."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace

from llmtune.hardware.device import torch_type
from llmtune.models import Download
from llmtune.planning.plan import Plan
from llmtune.planning.request import PlanRequest
from llmtune.registry.trackers import ALL, resolve_trackers
from llmtune.units import format_bytes, format_seconds


def notices_of(request: PlanRequest, plan: Plan, plan_of: Callable[[PlanRequest], Plan]) -> tuple[str, ...]:
    """Estimates, things asked for in vain, devices left idle.

    Args:
        request: The facts.
        plan: What was decided.
        plan_of: Decides for other facts.
    """
    notices = [request.preset.notice] if request.preset.notice else []
    stats = request.stats
    if stats.estimated:
        notices.append("Token counts are estimated from bytes: the model's tokenizer has not been downloaded.")
        if stats.length_max > request.spec.context:
            notices.append(
                f"The longest row has about {stats.length_max:,} tokens, more than the context of "
                f"{request.spec.context:,}: training would refuse it, or drop it with --set data.too_long=drop."
            )
    if plan.download is not None:
        notices.append(_download(plan.download, plan.download_shortage()))
    if request.eval_rows == 0:
        notices.append("No rows are held out, so there is no evaluation, no best checkpoint and no early stopping.")
    asked = request.config.adapter
    set_in_vain = [leaf for leaf in ("rank", "alpha", "dropout", "targets") if getattr(asked, leaf) is not None]
    if plan.method.value == "full" and set_in_vain:
        notices.append(f"Full fine-tuning has no adapter: adapter.{', adapter.'.join(set_in_vain)} has no effect.")
    if request.config.monitor.report_to == (ALL,):
        found = ", ".join(resolve_trackers((ALL,))) or "no tracker can be used here, see llmtune doctor"
        notices.append(f"monitor.report_to=all: {found}.")
    if plan.fits and (idle := _idle_devices(request, plan, plan_of)):
        notices.append(idle)
    return tuple(notices)


def _download(wanted: Download, shortage: str | None) -> str:
    if shortage is not None:
        return f"{shortage}. Training would refuse to start."
    free = "" if wanted.free_bytes is None else f", where {format_bytes(wanted.free_bytes)} are free"
    return f"About {format_bytes(wanted.bytes)} of weights will be downloaded to {wanted.directory}{free}."


def devices_like(request: PlanRequest) -> int:
    """Accelerators of the kind that trains; 0 on a CPU."""
    if request.kind == "cpu":
        return 0
    return sum(torch_type(accelerator) == request.device.type for accelerator in request.hardware.accelerators)


def launch_command(request: PlanRequest, configuration: str, processes: int) -> str:
    """The command that trains the same on several devices, with a shipped configuration of accelerate."""
    asked = request.config.asked()
    data = asked.pop("data", {})
    words = ["train", data.pop("path", "DATA"), "--model", request.spec.id]
    for group in ("data", "train", "adapter", "evaluate", "save"):
        settings = data if group == "data" else asked.get(group, {})
        for leaf, value in settings.items():
            if leaf != "device":
                words += ["--set", f"{group}.{leaf}={json.dumps(value) if not isinstance(value, str) else value}"]
    config = f'"$(llmtune accelerate-config {configuration})"'
    return f"accelerate launch --config_file {config} --num_processes {processes} -m llmtune {shlex.join(words)}"


def _idle_devices(request: PlanRequest, plan: Plan, plan_of: Callable[[PlanRequest], Plan]) -> str | None:
    count = devices_like(request)
    if request.processes > 1 or count < 2 or request.device.type != "cuda":
        return None
    together = plan_of(replace(request, processes=count))
    if not together.fits or together.time.total_seconds >= plan.time.total_seconds:
        return None
    return (
        f"{count} GPUs are here and this plan uses one. All of them would take about "
        f"{format_seconds(together.time.total_seconds)} instead of {format_seconds(plan.time.total_seconds)}: "
        f"{launch_command(request, 'ddp', count)}"
    )
