"""The processes of one launch, and how they agree."""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from llmtune.errors import LlmtuneError, TrainingError
from llmtune.hardware import follow_parent

T = TypeVar("T")


class Ranks:
    """This process among those that train together; a launch of one process is the ordinary case.

    Args:
        on_cpu: Whether ranks talk over gloo on the CPU.
    """

    def __init__(self, *, on_cpu: bool) -> None:
        from accelerate import PartialState

        if "LOCAL_RANK" in os.environ:
            follow_parent()
        self._state = PartialState(cpu=on_cpu)

    @property
    def rank(self) -> int:
        """Number of this process, 0 on the main one."""
        return int(self._state.process_index)

    @property
    def size(self) -> int:
        """How many processes train together."""
        return int(self._state.num_processes)

    @property
    def is_main(self) -> bool:
        """Whether this process writes the account of the run."""
        return bool(self._state.is_main_process)

    @property
    def device(self) -> str:
        """Torch's name of this process's device."""
        return str(self._state.device)

    def wait(self) -> None:
        """Until every rank is here."""
        self._state.wait_for_everyone()

    def part_at_exit(self) -> None:
        """Let the interpreter, when it ends, first wait for the threads that have talked to the other ranks.

        gloo's threads let go of tensors a moment after their sender has gone on, and need the interpreter for it; one
        that finds it gone aborts the process. After a failure they may be waiting for ranks that are gone, so this is
        for work that is done. With NCCL a rank that is done would wait for those that are not.
        """
        if self.size > 1 and self._state.backend == "gloo":
            atexit.register(self._part)

    def _part(self) -> None:
        gc.collect()  # the model as it was wrapped for training is garbage by now, and would keep the threads alive
        self._state.destroy_process_group()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the main process leaves before the others enter it."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def agreed(self, act: Callable[[], T], *, main_only: bool = False) -> T | None:
        """What ``act`` returns; an error on the main process ends the others too, instead of leaving them waiting.

        Args:
            act: Done on every rank, or on the main one alone; the others get None.
            main_only: Whether it is done on the main one alone.

        Raises:
            TrainingError: On the other ranks, with what the main process raised.
        """
        result: T | None = None
        failed: LlmtuneError | None = None
        if self.is_main or not main_only:
            try:
                result = act()
            except LlmtuneError as error:
                failed = error
        told = self.from_main(None if failed is None else str(failed))
        if failed is not None:
            raise failed
        if told is not None:
            raise TrainingError(told)
        return result

    @property
    def is_sharded(self) -> bool:
        """Whether the model is spread over the ranks (FSDP, DeepSpeed), so that none can use it alone."""
        from accelerate.utils import DistributedType

        return self._state.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)

    def from_main(self, value: T) -> T:
        """The main process's ``value`` on every rank (pickled; sent only between ranks of this launch)."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        box: list[Any] = [value]
        broadcast_object_list(box, from_process=0)
        result: T = box[0]
        return result
