"""A copy of all that a checkpoint holds, in host memory, and how it is written: file for file as the Trainer writes it.

What is copied is what changes from save to save. What never changes during a run (tokenizer, configurations) is handed
over as the bytes of an earlier save.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

RNG_NAME = "rng_state.pth"
# Copies in host memory by what they are copies of: device, address, type, shape and strides.
Room = dict[tuple[Any, ...], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What was true at one moment, to be written later.

    Attributes:
        weights: Of an adapter, its parameters by their names in the model; else the whole state of the model.
    """

    model: Any
    weights: dict[str, torch.Tensor]
    optimizer: Any
    scheduler: Any
    scaler: Any
    rng: dict[str, Any]
    state: TrainerState

    @classmethod
    def take(
        cls, *, model: Any, optimizer: Any, scheduler: Any, scaler: Any, state: TrainerState, room: Room | None = None
    ) -> Snapshot:
        """Copy everything; the caller is between two updates, and ``state`` is its own copy already.

        ``room`` is where tensors of an earlier snapshot lie, which is written by now: they are copied over, because new
        memory takes several times as long as the copy.
        """
        memo = Copies({} if room is None else room)
        weights, states = _weights(model, memo), in_host_memory(optimizer.state_dict(), memo)
        if room is not None:
            room.clear()
            room.update(memo.tensors)
        return cls(
            model=model,
            weights=weights,
            optimizer=states,
            scheduler=copy.deepcopy(scheduler.state_dict()),
            scaler=None if scaler is None else copy.deepcopy(scaler.state_dict()),
            rng=_random_states(),
            state=state,
        )

    def write(self, directory: Path, constant: Mapping[str, bytes]) -> None:
        """Write a whole checkpoint: what was copied, and the files that never change."""
        directory.mkdir(parents=True)
        _write_weights(self.model, self.weights, directory)
        torch.save(self.optimizer, directory / OPTIMIZER_NAME)
        torch.save(self.scheduler, directory / SCHEDULER_NAME)
        if self.scaler is not None:
            torch.save(self.scaler, directory / SCALER_NAME)
        torch.save(self.rng, directory / RNG_NAME)
        for name, content in constant.items():
            (directory / name).write_bytes(content)
        self.state.save_to_json(str(directory / TRAINER_STATE_NAME))


def is_adapter(model: Any) -> bool:
    """Whether ``model`` is a base model with an adapter of peft."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def state_bytes(model: Any, optimizer: Any) -> int:
    """Bytes of what a save writes of weights and optimizer."""
    adapter = is_adapter(model)
    weights = [p for p in model.parameters() if p.requires_grad or not adapter]
    kept = getattr(optimizer, "state", None) or {}
    states = [value for state in kept.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in [*weights, *states])


class Copies:
    """What has been copied in one snapshot: what was one object stays one, so that it is written as before.

    Args:
        room: Tensors in host memory that may be copied over.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self.tensors: Room = {}
        self.containers: dict[int, tuple[Any, Any]] = {}

    def tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The copy of a tensor."""
        value = value.detach()
        if not value.numel():
            return value.to("cpu", copy=True)
        key = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in self.tensors:
            there = self._room.get(key)
            self.tensors[key] = value.to("cpu", copy=True) if there is None else there.copy_(value)
        return self.tensors[key]


def in_host_memory(value: Any, memo: Copies) -> Any:
    """A copy whose tensors lie in host memory."""
    if isinstance(value, torch.Tensor):
        return memo.tensor(value)
    if isinstance(value, dict | list | tuple):
        kept = memo.containers.get(id(value))
        if kept is None:  # the original is kept beside its copy: were it freed, another object could get its id
            kept = memo.containers[id(value)] = (value, _container_in_host_memory(value, memo))
        return kept[1]
    return copy.deepcopy(value)


def _container_in_host_memory(value: dict[Any, Any] | list[Any] | tuple[Any, ...], memo: Copies) -> Any:
    if isinstance(value, dict):
        return {key: in_host_memory(item, memo) for key, item in value.items()}
    return type(value)([in_host_memory(item, memo) for item in value])


def _weights(model: Any, memo: Copies) -> dict[str, torch.Tensor]:
    if not is_adapter(model):
        copied: dict[str, torch.Tensor] = in_host_memory(dict(model.state_dict()), memo)
        return copied
    # Frozen weights never change, and peft only looks for their names: they are not copied.
    named = model.named_parameters(remove_duplicate=False)
    return {name: in_host_memory(p.detach(), memo) if p.requires_grad else p.detach() for name, p in named}


def _write_weights(model: Any, weights: dict[str, torch.Tensor], directory: Path) -> None:
    if not is_adapter(model):
        assert isinstance(model, PreTrainedModel)
        model.save_pretrained(directory, state_dict=dict(weights))
        return
    from peft import get_peft_model_state_dict
    from peft.utils import SAFETENSORS_WEIGHTS_NAME

    adapter = get_peft_model_state_dict(model, state_dict=weights)
    tensors = {name: tensor.contiguous() for name, tensor in adapter.items()}
    save_file(tensors, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})


def _random_states() -> dict[str, Any]:
    """As the Trainer saves them in one process."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states
