"""What the heads differentiate by hand: the nearest ETF as a function of class means, and sums over processes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from ufm import heads
from ufm.etf import pullback


class Nearest(torch.autograd.Function):
    """The nearest ETF to averaged means (d, K) and its U, as a function of the batch's means, which enter the average at a rate (1, K)."""

    @staticmethod
    def forward(ctx: Any, batch: Tensor, means: Tensor, rate: Tensor, options: heads.NearestETF, previous: Tensor | None) -> Any:
        nearest = options.nearest(means, previous)
        ctx.nearest, ctx.rate, ctx.guard = nearest, rate, options.guard
        ctx.mark_non_differentiable(nearest.U)
        return nearest.W.clone(), nearest.U  # a copy: ctx and an output of its own would keep each other alive

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_W: Tensor, _: Tensor) -> Any:
        with no_autocast(grad_W):
            return ctx.rate * pullback(ctx.nearest, grad_W, guard=ctx.guard), None, None, None, None


nearest_etf: Any = Nearest.apply


class OverProcesses(torch.autograd.Function):
    """The sum S of a tensor's S_r over processes r. Each loss L_r is a function of all of S, so the gradient of sum_r L_r in S_r is the sum
    of theirs in S; the mean over processes that DDP takes turns sum_r L_r into the mean loss of the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        return _summed(part)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


over_processes: Any = OverProcesses.apply


def _summed(part: Tensor) -> Tensor:
    total = part.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def no_autocast(x: Tensor) -> Any:
    """A context in which products on x's device keep their precision."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
