"""One process or several that train together: who takes which rows, and how their gradients add up.

Started by `accelerate launch` there are several; each holds the whole adapter, takes its share of every batch, and
after the sum of the gradients takes the same step. Alone, all of this does nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mech.errors import MechError

T = TypeVar("T")


@dataclass(frozen=True)
class Team:
    """This process and how many there are."""

    index: int = 0
    size: int = 1

    @classmethod
    def join(cls) -> "Team":
        """The team that `accelerate launch` (or torchrun) started; a team of one otherwise."""
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return cls()
        from accelerate import PartialState

        # Without being told, accelerate takes a machine without accelerators for one process.
        state = PartialState(cpu=not torch.accelerator.is_available())
        if state.num_processes != int(os.environ["WORLD_SIZE"]):
            raise MechError(
                f"started as one of {os.environ['WORLD_SIZE']} processes, joined {state.num_processes}"
            )
        return cls(state.process_index, state.num_processes)

    @property
    def leads(self) -> bool:
        """Whether this process writes the files."""
        return self.index == 0

    def share(self, rows: Sequence[T]) -> list[T]:
        """This process's part of a batch."""
        return list(rows[self.index :: self.size])

    def sum_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over all processes, in one message; where none has one, there is none, and no step is taken."""
        if self.size == 1:
            return
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), _had_gradients(parameters, gradients[0])])
        torch.distributed.all_reduce(flat)
        *parts, had = flat.split([*(g.numel() for g in gradients), len(parameters)])
        for parameter, part, n in zip(parameters, parts, had.tolist(), strict=True):
            parameter.grad = part.view_as(parameter) if n else None

    def sum(self, value: float, device: torch.device) -> float:
        """A number, summed over all processes."""
        if self.size == 1:
            return value
        total: Tensor = torch.tensor(value, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(total)
        return float(total)

    def wait(self) -> None:
        """Go on when all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def _had_gradients(parameters: Sequence[torch.nn.Parameter], like: Tensor) -> Tensor:
    """1 for each parameter with a gradient, 0 for others (maps of experts that no token of the batch came to)."""
    return torch.tensor([float(p.grad is not None) for p in parameters], dtype=like.dtype, device=like.device)
