"""Copies of fp32 masters in the precision that products are computed in.

The optimizer and checkpoints see the fp32 parameter alone. A product of bf16 activations needs its values in bf16; they
are cast once and kept until the parameter changes. A copy costs 2 bytes per value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


class _Steps:
    """How many optimizer steps this process has taken: some optimizers write to memory without torch seeing it."""

    taken = 0

    @classmethod
    def count(cls, *_: Any) -> None:
        cls.taken += 1


register_optimizer_step_post_hook(_Steps.count)


class MasterCopy:
    """The values of one parameter in another dtype, made anew whenever the parameter may have changed.

    What counts as a change: a write that autograd sees (``load_state_dict``, ``add_``, ``copy_``), another storage,
    shape, dtype or device (``.to()``, ``.data = …``), a step of any ``torch.optim.Optimizer``, be it written so that
    torch sees it or not. A write past autograd, as ``.data.copy_()`` is, is seen unless a pass came between it and
    the optimizer's last step; where no gradient is recorded nothing is kept, so that evaluation sees every write.

    A copy that was handed out is never written to again, so a backward pass uses the values its forward pass had.
    """

    __slots__ = ("_copy", "_master", "_state")

    def __init__(self) -> None:
        self._copy: torch.Tensor | None = None
        self._master: torch.Tensor | None = None
        self._state: tuple[int, int] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> MasterCopy:
        return MasterCopy()

    def __reduce__(self) -> tuple[type[MasterCopy], tuple[()]]:
        return MasterCopy, ()

    def of(self, master: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The values of ``master`` in ``dtype``, without gradient; ``master``'s own memory where that is its dtype."""
        values = master.detach()
        if values.dtype == dtype:
            return values
        # A traced graph casts whenever it runs, and fake tensors have no address.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or type(values) is not torch.Tensor:
            return values.to(dtype)
        state = (master._version, _Steps.taken)
        if self._copy is None or self._state != state or self._copy.dtype != dtype or not self._same_place(values):
            # Holding on to the storage keeps its address from being given to another one.
            self._copy, self._master, self._state = values.to(dtype), values, state
        return self._copy

    def _same_place(self, values: torch.Tensor) -> bool:
        held = self._master
        return (
            held is not None
            and held.data_ptr() == values.data_ptr()
            and held.dtype == values.dtype
            and held.device == values.device
            and held.shape == values.shape
            and held.stride() == values.stride()
        )
