"""Before the first update of a new run: what its largest pass takes, measured in the path that trains.

At most two passes, forward and backward, through the model as the Trainer has wrapped it. Afterwards weights,
gradients, random states and the order of the data are what they were: a probed run computes what one without does.
"""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmtune.console import speaker
from llmtune.data import IGNORED, collate, collate_packed, pass_tokens, pass_width
from llmtune.planning import Plan, PlanRequest
from llmtune.planning.measurement import Measurement, Pass
from llmtune.planning.replan import budget_after, formula_of, replan
from llmtune.training.meter import MemoryMeter, is_out_of_memory
from llmtune.training.rehearsal import Rehearsed, rehearse
from llmtune.training.shortage import random_states
from llmtune.training.trainer import UpdateTrainer
from llmtune.training.updates import UpdateLoader
from llmtune.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from llmtune.training.train import TrainingJob

# Updates whose passes are counted to tell what a usual one holds.
COUNTED_UPDATES = 8
# The matrix that a step of the optimizer is timed on.
TIMED_SHAPE = (1024, 1024)


class BeforeFirstUpdate(TrainerCallback):
    """Probes and rehearses once the Trainer has wrapped the model, and lets the run train by what was found.

    Its errors end the run: they are what it is for.
    """

    def __init__(self, job: TrainingJob, trainer: UpdateTrainer, request: PlanRequest, meter: MemoryMeter) -> None:
        self._job, self._trainer, self._request, self._meter = job, trainer, request, meter

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, adjust the token budget, rehearse, write the plan down."""
        job, trainer = self._job, self._trainer
        with untouched(trainer.model):
            probed = _Probe(job, trainer, self._meter).run()
            if probed.budget is not None:  # else the new plan refuses, and there is nothing to rehearse for
                trainer.set_token_budget(probed.budget)
                rehearsed = rehearse(job, trainer)
            else:
                rehearsed = Rehearsed.nothing()
        plan = _agreed_plan(job, self._request, probed, rehearsed)
        trainer.recoveries.plan = plan
        self._meter.restart()
        if job.ranks.is_main:
            path = job.run.add_plan(plan.to_json())
            job.run.event("plan", 0, file=path.name, memory_bytes=plan.memory.peak_bytes, updates=plan.updates.value)
            if plan.token_budget != job.plan.token_budget:
                speaker.warn(f"token budget: {plan.token_budget.reason}")
            speaker.say(f"measured: {plan.summary()}")


@contextmanager
def untouched(model: torch.nn.Module) -> Iterator[None]:
    """A block after which gradients, buffers, plain attributes of modules and all random states are as before.

    Rotary embeddings of some models keep what the longest row so far has taught them; it must not be the probe's.
    """
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    plain = [
        (m, {k: v for k, v in vars(m).items() if v is None or isinstance(v, bool | int | float | str)})
        for m in model.modules()
    ]
    restore_random_states = random_states(next(model.parameters()).device)
    try:
        yield
    finally:
        restore_random_states()
        for module, name, buffer, content in buffers:
            buffer.copy_(content)
            module._buffers[name] = buffer
        for module, attributes in plain:
            vars(module).update(attributes)
        for parameter in model.parameters():
            parameter.grad = None


def largest_rows(
    lengths: NDArray[np.int32], *, token_budget: int, max_rows: int, pad_multiple: int, packing: bool
) -> list[int]:
    """The rows of the largest pass that can occur: most padded tokens, and of several such the longest rows.

    Args:
        lengths: Tokens of every row.
        token_budget: Most padded tokens of a pass; a longer row goes alone.
        max_rows: Most rows of a pass.
        pad_multiple: See `pass_width`.
        packing: Whether rows are laid end to end instead of being padded.
    """
    order = np.argsort(-lengths, kind="stable")
    if packing:
        ascending = lengths[order][::-1]
        rows: list[int] = []
        left, end = token_budget, len(order)
        while end > 0 and len(rows) < max_rows:
            end = min(end, int(np.searchsorted(ascending, left, side="right")))
            if end == 0:
                break
            rows.append(int(order[len(order) - end]))
            left -= int(ascending[end - 1])
            end -= 1
        return rows or [int(order[0])]
    # Of a run of rows the first is the longest; of equally long ones, the first leaves most to follow.
    longest, starts = np.unique(-lengths[order], return_index=True)
    best, chosen = 0, slice(0)
    for length, start in zip(-longest, starts, strict=True):
        most = max(1, min(max_rows, len(order) - start, token_budget // max(1, length)))
        tokens = pass_tokens(int(length), most, pad_multiple)
        tokens[1:] *= tokens[1:] <= token_budget
        count = int(tokens.argmax())
        if tokens[count] > best:
            best, chosen = int(tokens[count]), slice(start, start + count + 1)
    return [int(row) for row in order[chosen]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What one or two passes showed.

    Attributes:
        budget: The token budget that memory holds; None where not even one row fits.
        loaded_bytes: What was there before.
        loaded_tensor_bytes: Of it, tensors, where the device tells them apart.
        gradient_bytes: Of the trained weights.
        longest: Padded tokens of the longest row.
        passes: What was run.
        update_tokens: Padded tokens of a usual update of one process.
        update_passes: Passes of a usual update of one process.
        optimizer_seconds: One step of the optimizer.
    """

    budget: int | None
    loaded_bytes: int
    loaded_tensor_bytes: int
    gradient_bytes: int
    longest: int
    passes: tuple[Pass, ...]
    update_tokens: float
    update_passes: float
    optimizer_seconds: float


class _Probe:
    """The passes of one probe; every rank runs the same ones, and they agree on the largest of what they saw."""

    def __init__(self, job: TrainingJob, trainer: UpdateTrainer, meter: MemoryMeter) -> None:
        self._job, self._trainer, self._meter = job, trainer, meter
        self._model = trainer.model_wrapped
        self._trained = [p for p in trainer.model.parameters() if p.requires_grad]

    def run(self) -> Probed:
        """One pass with the largest batch; a second one with a smaller batch if need be, else with a typical one."""
        plan, lengths = self._job.plan, self._job.train_data.lengths
        longest = pass_width(int(lengths.max()), 1, 1 if plan.packing.value else plan.pad_multiple.value)
        _read_all(self._trainer.model)
        self._meter.restart()
        loaded, tensors = self._largest([self._meter.used(), self._meter.used_by_tensors()])
        (gradients,) = self._largest([sum(parameter.nbytes for parameter in self._trained)])
        base = loaded + gradients

        def after(passes: Sequence[Pass]) -> int | None:
            return budget_after(plan, longest=longest, base_bytes=base, passes=passes)

        budget: int | None = plan.token_budget.value
        passes = [self._pass(self._largest_batch(plan.token_budget.value), plan.token_budget.value, worst=True)]
        budget = after(passes)
        if budget is not None:
            shrinks = budget != plan.token_budget.value
            batch = self._largest_batch(budget) if shrinks else self._typical_batch(budget)
            passes.append(self._pass(batch, budget, worst=shrinks))
            budget = after(passes)
        for parameter in self._trained:
            parameter.grad = None
        tokens, count = self._usual_update(budget or longest)
        return Probed(
            budget=budget,
            loaded_bytes=loaded,
            loaded_tensor_bytes=tensors,
            gradient_bytes=gradients,
            longest=longest,
            passes=tuple(passes),
            update_tokens=tokens,
            update_passes=count,
            optimizer_seconds=self._optimizer_seconds(),
        )

    def _pass(self, batch: dict[str, torch.Tensor], budget: int, *, worst: bool) -> Pass:
        device, ran_out = self._trainer.args.device, False
        self._model.train()
        # Gradients are there in every pass of an update but its first; a smaller budget makes several of one.
        several = self._job.plan.accumulation.value > 1 or budget != self._job.plan.token_budget.value
        for parameter in self._trained:
            parameter.grad = torch.zeros_like(parameter) if several else None
        scale = 1.0 / max(1, int((batch["labels"][:, 1:] != IGNORED).sum()))
        with self._meter.counting():
            _finish(device)
            began = time.perf_counter()
            try:
                # Without reduction a rank that runs out of memory leaves none waiting; FSDP reduces layer by layer.
                reduces = self._trainer.is_fsdp_enabled
                self._trainer.forward_and_backward(self._model, batch, scale, reduces=reduces)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                ran_out = True
            _finish(device)
            seconds = time.perf_counter() - began
        peak = self._meter.peak()
        if ran_out:
            gc.collect()
        failed, peak, microseconds = self._largest([int(ran_out), peak, round(seconds * 1e6)])
        rows, width = batch["input_ids"].shape
        one = Pass(
            worst=worst,
            token_budget=budget,
            rows=rows,
            tokens=rows * width,
            peak_bytes=peak,
            seconds=microseconds / 1e6,
            ran_out=failed > 0,
        )
        _tell(one, self._job.plan)
        return one

    def _largest(self, numbers: list[int]) -> list[int]:
        """The largest of each number over all ranks."""
        if self._job.ranks.size == 1:
            return numbers
        mine = torch.tensor([numbers], dtype=torch.int64, device=self._trainer.args.device)
        found: list[int] = self._trainer.accelerator.gather(mine).max(dim=0).values.tolist()
        return found

    def _largest_batch(self, token_budget: int) -> dict[str, torch.Tensor]:
        plan, data = self._job.plan, self._job.train_data
        share = math.ceil(plan.global_batch_size.value / self._job.ranks.size)
        rows = largest_rows(
            data.lengths,
            token_budget=token_budget,
            max_rows=min(plan.micro_batch_size.value, share),
            pad_multiple=plan.pad_multiple.value,
            packing=plan.packing.value,
        )
        put_together = collate_packed if plan.packing.value else collate
        pad = self._job.tokenizer.pad_token_id
        return put_together([data[row] for row in rows], pad, pad_multiple=plan.pad_multiple.value)

    def _updates(self, token_budget: int, count: int) -> list[list[dict[str, torch.Tensor]]]:
        """The micro-batches of this rank's first updates."""
        collator = self._trainer.collator(token_budget)
        sampler = self._trainer.sampler()
        loader = UpdateLoader(self._job.train_data, sampler, collator, num_workers=0, pin_memory=False)
        return [list(update.micro_batches) for update in itertools.islice(loader, count)]

    def _typical_batch(self, token_budget: int) -> dict[str, torch.Tensor]:
        (batches,) = self._updates(token_budget, 1)
        return sorted(batches, key=lambda batch: batch["input_ids"].numel())[len(batches) // 2]

    def _usual_update(self, token_budget: int) -> tuple[float, float]:
        updates = self._updates(token_budget, COUNTED_UPDATES)
        tokens = [sum(batch["input_ids"].numel() for batch in update) for update in updates]
        most = self._largest([round(1000 * float(np.mean(tokens))), round(1000 * np.mean([len(u) for u in updates]))])
        return most[0] / 1000, most[1] / 1000

    def _optimizer_seconds(self) -> float:
        """Clipping and one step, timed on a matrix of its own and scaled to the weights that are trained."""
        device = self._trainer.args.device
        trained: int = sum(parameter.numel() for parameter in self._trained)
        weight = torch.nn.Parameter(torch.zeros(TIMED_SHAPE, device=device))
        weight.grad = torch.full_like(weight, 1e-3)
        optimizer = self._optimizer([weight])
        seconds, share = 0.0, trained / weight.numel()
        for _ in range(2):  # the first step makes the moments
            _finish(device)
            began = time.perf_counter()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            _finish(device)
            seconds = time.perf_counter() - began
        return seconds * share

    def _optimizer(self, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """The run's optimizer on other weights; AdamW where it wants the whole model (galore, apollo, lomo)."""
        args = self._trainer.args
        if not args.optim.startswith(("galore", "apollo", "lomo", "adalomo")):
            kind, arguments = self._trainer.get_optimizer_cls_and_kwargs(args, self._trainer.model)
            made: torch.optim.Optimizer = kind(weights, **arguments)
            return made
        return torch.optim.AdamW(weights, fused=args.device.type in ("cpu", "cuda"))


def _agreed_plan(job: TrainingJob, request: PlanRequest, probed: Probed, rehearsed: Rehearsed) -> Plan:
    """The plan to train by, made by the main process for all.

    Raises:
        PlanError: Not even one row fits.
    """
    formula = formula_of(job.plan, request.correction)
    measured = Measurement(
        device=request.device.name,
        parameters=request.spec.parameters,
        passes=probed.passes,
        loaded_bytes=probed.loaded_bytes,
        loaded_tensor_bytes=probed.loaded_tensor_bytes,
        gradient_bytes=probed.gradient_bytes,
        longest_tokens=probed.longest,
        predicted_bytes=formula.grown_bytes,
        predicted_pass_bytes=formula.pass_bytes,
        predicted_step_seconds=formula.step_seconds,
        update_tokens=probed.update_tokens,
        update_passes=probed.update_passes,
        optimizer_seconds=probed.optimizer_seconds,
        evaluation_seconds=rehearsed.evaluation_seconds,
        save_seconds=rehearsed.save_seconds,
        result_bytes=rehearsed.result_bytes,
    )
    plan = job.ranks.from_main(job.ranks.agreed(lambda: replan(request, job.plan, measured), main_only=True))
    assert plan is not None, "the main process has made one, or has raised"
    return replace(plan, notices=(*plan.notices, *rehearsed.notices))


def _tell(one: Pass, plan: Plan) -> None:
    kind = "largest" if one.worst else "typical"
    took = "ran out of memory after" if one.ran_out else "took"
    speaker.say(
        f"probe: the {kind} pass, {one.rows} rows and {one.tokens:,} padded tokens, {took} "
        f"{format_seconds(one.seconds)}; {format_bytes(one.peak_bytes)} at most, "
        f"{format_bytes(plan.memory.peak_bytes)} predicted for the run"
    )


def _read_all(model: torch.nn.Module) -> None:
    """Touch every page of weights mapped from a file, so that they count as loaded and not as part of a pass."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if type(tensor.data) is torch.Tensor and tensor.device.type == "cpu" and tensor.is_contiguous():
            tensor.detach().view(-1).view(torch.uint8)[::4096].sum()


def _finish(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
