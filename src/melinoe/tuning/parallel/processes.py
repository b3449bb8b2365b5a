"""The processes of one run, as `accelerate launch` or `torchrun` started them: one where nobody did.

All of them read the same data, plan the same steps and hold the same weights; each takes its part of a step's
rows. The first one writes files and speaks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed

from melinoe.errors import MelinoeError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of the run.

    index: of this process, 0 .. count - 1. device: where collective operations want their tensors.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def join(cls, device: str) -> Processes:
        """Meets the others, where there are any; the launcher's environment tells them apart.

        Args:
            device: "cpu" (then they talk over gloo) or "cuda".

        Raises:
            MelinoeError: accelerate was told to shard in its own way.
        """
        for wanted in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{wanted}", "false").lower() == "true":
                raise MelinoeError(
                    f"tune does not run under accelerate's {wanted}, which would divide what is trained as"
                    " well",
                    next_step="launch with a plain multi-GPU configuration; --shard divides the frozen"
                    " weights",
                )
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=device == "cpu")
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all processes, in each of them."""
        if self.count == 1:
            return values
        total = values.to(self.device, copy=True)
        distributed.all_reduce(total)
        return total.to(values.device)

    def ask_first(self, question: Callable[[], T]) -> T:
        """What `question` returns in the first process, which alone calls it.

        Its MelinoeError is raised in all.
        """
        if self.count == 1:
            return question()
        answer: list[tuple[T | None, MelinoeError | None]] = [(None, None)]
        if self.is_first:
            try:
                answer = [(question(), None)]
            except MelinoeError as error:
                answer = [(None, error)]
        distributed.broadcast_object_list(answer, src=0, device=self.device)
        value, problem = answer[0]
        if problem is not None:
            raise problem
        return value  # type: ignore[return-value]


def leave() -> None:
    """Ends the group of processes, where there is one, when all of them have come this far.

    Left to the end of the interpreter, the threads of gloo may still be at work on connections that another
    process has closed: on a busy machine that ended a run that had succeeded with SIGABRT. Whoever calls
    `tune` in a group of their own keeps it; the command line leaves the group that it joined.
    """
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
