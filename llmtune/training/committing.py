"""The Trainer's saves and loads: staged by it, committed by us, in the foreground or behind.

Upstream's hooks for saving are touched here alone, those for updates and evaluation in ``trainer.py``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from llmtune.checkpoints import best_of, list_checkpoints, step_of, verify
from llmtune.checkpoints.compression import COMPRESSED, expanded
from llmtune.console import speaker
from llmtune.errors import CheckpointError
from llmtune.training.continuity import exported
from llmtune.training.ranks import Ranks
from llmtune.training.saved_facts import are_finite
from llmtune.training.saving import CheckpointSaver, unreadable
from llmtune.training.snapshot import Room, Snapshot, state_bytes


class CommittingTrainer(Trainer):
    """``transformers.Trainer`` whose checkpoints are committed; a subclass says what their manifests hold.

    Args:
        args: Its ``output_dir`` is where checkpoints are committed.
        ranks: The processes of this launch.
        asynchronous: Whether checkpoints are written in the background, from a copy in host memory.
        compress_optimizer: Whether they keep the optimizer's state compressed.
        **rest: See the Trainer.

    Attributes:
        save_seconds: Of the latest save, from its beginning to its commit.
        save_blocking_seconds: How long training stood still for it.
    """

    def __init__(
        self, *, args: TrainingArguments, ranks: Ranks, asynchronous: bool, compress_optimizer: bool, **rest: Any
    ) -> None:
        self._ranks, self._asynchronous = ranks, asynchronous and ranks.size == 1
        self._committed_to = Path(args.output_dir)
        self._staging: Path | None = None
        self._saver = CheckpointSaver(self._committed_to, ranks, compress=compress_optimizer)
        if asynchronous and ranks.size > 1:
            speaker.warn(
                "save.asynchronous: several processes train together, so checkpoints are written in the foreground"
            )
        self._room: Room = {}  # of the latest save in the background, for the next one
        self._save_due = False  # by an evaluation or a callback, and to be written in the background
        self._saved_step: int | None = None
        self.save_seconds = 0.0
        self.save_blocking_seconds = 0.0
        self.control: TrainerControl
        super().__init__(args=args, **rest)

    def manifest_facts(self) -> Mapping[str, Any]:
        """What the manifest of a save at this moment says beyond its files and whether its weights are finite."""
        raise NotImplementedError

    # ------------------------------------------------------------------ saving

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """The same loop; a save in flight is finished before an error leaves it.

        Raises:
            CheckpointError: This version of transformers cannot read the state in the checkpoint.
        """
        if resume_from_checkpoint and (objection := unreadable(Path(resume_from_checkpoint))):
            raise CheckpointError(f"{resume_from_checkpoint} is not used: {objection}")
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except BaseException:
            try:
                self._tell_saved(wait=True)
            except Exception as error:  # what ended training counts; that the save failed too is said
                speaker.warn(f"the save in flight failed too: {error}")
            raise

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._tell_saved(wait=True)
        return super()._finalize_training(*args, **kwargs)

    def _maybe_log_save_evaluate(
        self, tr_loss: torch.Tensor, grad_norm: Any, model: torch.nn.Module, trial: Any, *args: Any, **kwargs: Any
    ) -> None:
        self._tell_saved(wait=False)
        self._saved_step = None
        behind = self._goes_behind()
        if behind:  # the Trainer would tell of the save before it is committed
            self._save_due, self.control.should_save = self.control.should_save, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        if behind and self._save_due and self._saved_step != self.state.global_step:
            self._save_behind()
        self._save_due = False

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        is_best = bool(super()._determine_best_metric(metrics, trial))
        if is_best and self._goes_behind():
            self._save_due = True
        elif is_best:  # a best step that is not saved cannot be gone back to
            self.control.should_save = True
        return is_best

    def _goes_behind(self) -> bool:
        """Whether a save due now is written in the background; the last one before a stop is not."""
        return self._asynchronous and self._saver.can_go_behind and not self.control.should_training_stop

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or self._committed_to)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """In the foreground: staged by the Trainer, committed by us; on disk when this returns."""
        self._tell_saved(wait=True)
        began, step = time.perf_counter(), self.state.global_step
        save = super()._save_checkpoint

        def write(root: Path) -> None:
            for name, kept in self.state.stateful_callbacks.items():
                if isinstance(kept, list):  # the Trainer adds to it, and a resume would take the oldest
                    self.state.stateful_callbacks[name] = []
            self._staging = root
            try:
                save(model, trial)
            finally:
                self._staging = None
                self._note_best()
            if self.args.should_save:
                _point_to_committed(root / f"checkpoint-{step}", self.state.best_model_checkpoint)

        self._saver.best = self.state.best_model_checkpoint
        needed = state_bytes(self.model, self.optimizer)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self._saver.save(
            step,
            write,
            lambda: dict(self.manifest_facts()) | {"finite_weights": are_finite(trained)},
            needed_bytes=needed,
        )
        self._saved_step = step
        self.save_seconds = self.save_blocking_seconds = time.perf_counter() - began

    def _save_behind(self) -> None:
        self._tell_saved(wait=True)
        began = time.perf_counter()
        self.store_flos()
        self._saver.best = self.state.best_model_checkpoint
        self._note_best()
        snapshot = Snapshot.take(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.lr_scheduler,
            scaler=getattr(self.accelerator, "scaler", None),
            state=self._state_now(),
            room=self._room,
        )
        needed = state_bytes(self.model, self.optimizer)
        self._saver.save_behind(snapshot, self.manifest_facts(), needed_bytes=needed)
        self._saved_step = self.state.global_step
        self.save_blocking_seconds = time.perf_counter() - began

    def _tell_saved(self, *, wait: bool) -> None:
        """Tell callbacks of the save that was committed in the background, with the Trainer's state as it was then."""
        saved = self._saver.collect(wait=wait)
        if saved is None:
            return
        self.save_seconds = saved.seconds
        due = self.control.should_save
        self.control = self.callback_handler.on_save(self.args, saved.state, self.control)
        self.control.should_save = due or self.control.should_save

    def _state_now(self) -> TrainerState:
        """A copy of the Trainer's state as a save in the foreground would write it."""
        state: TrainerState = copy.copy(self.state)
        state.log_history = list(self.state.log_history)
        due, self.control.should_save = self.control.should_save, True
        callbacks = [one for one in self.callback_handler.callbacks if isinstance(one, ExportableState)]
        state.stateful_callbacks = copy.deepcopy(exported([*callbacks, self.control]))
        self.control.should_save = due
        return state

    def _note_best(self) -> None:
        if self.state.best_global_step and self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(self._committed_to / f"checkpoint-{self.state.global_step}")

    # ------------------------------------------------------------------ restoring

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not (Path(checkpoint) / COMPRESSED).is_file():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with expanded(Path(checkpoint), beside=[SCHEDULER_NAME]) as whole:
            super()._load_optimizer_and_scheduler(str(whole))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self.accelerator.scaler is not None:  # a file for one that this run does not have is not read
            super()._load_scaler(checkpoint)

    def take_up(self, checkpoint: Path) -> None:
        """Load weights and history of a checkpoint without training on.

        For a run that was stopped after its last update: ``train`` would make one update too many.

        Raises:
            CheckpointError: This version of transformers cannot read the state in the checkpoint.
        """
        if objection := unreadable(checkpoint):
            raise CheckpointError(f"{checkpoint} is not used: {objection}")
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))

    def restore_best(self) -> int | None:
        """Load the best checkpoint's weights unless they are the present ones; returns its step, if there is one.

        It is verified first. One that has been damaged meanwhile is not loaded: the best of those that verify is.
        """
        if self.state.best_model_checkpoint is None:
            return None
        best = self._ranks.from_main(self._verified_best() if self._ranks.is_main else None)
        if best is None:
            return int(self.state.global_step)
        if step_of(best) != self.state.global_step:
            self._load_from_checkpoint(str(best), self.model_wrapped if self.is_fsdp_enabled else None)
        return step_of(best)

    def _verified_best(self) -> Path | None:
        best = Path(self.state.best_model_checkpoint)
        if step_of(best) == self.state.global_step:
            return best  # these weights are in memory
        result = verify(best)
        if result.ok:
            return best
        metric, greater = str(self.args.metric_for_best_model), bool(self.args.greater_is_better)
        other = best_of(list_checkpoints(self._committed_to), metric, greater_is_better=greater)
        instead = "the last weights are the result" if other is None else f"{other.path.name} is the result"
        speaker.warn(f"the best checkpoint, {best.name}, cannot be used: {result.reason}; {instead}")
        return other.path if other is not None else None

    def save_final(self, directory: Path) -> None:
        """Write adapter or model, and tokenizer with its chat template, loadable by peft or transformers alone."""
        self.save_model(str(directory), _internal_call=True)
        if self._ranks.is_main:
            (directory / "training_args.bin").unlink(missing_ok=True)
            for path in directory.glob("*.safetensors"):
                path.chmod(0o644)  # safetensors writes 0600


def _point_to_committed(staged: Path, best: str | None) -> None:
    """The Trainer wrote the best checkpoint's path while it still lay in the staging folder."""
    path = staged / TRAINER_STATE_NAME
    state = json.loads(path.read_text(encoding="utf-8"))
    state["best_model_checkpoint"] = best
    path.write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
