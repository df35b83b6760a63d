"""What the objectives need from the other processes of a distributed run."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from training.objectives import SINGLE_PROCESS, Collectives


def process_collectives() -> Collectives:
    """Collectives over all processes, or the trivial ones without `torch.distributed`."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return SINGLE_PROCESS
    return Collectives(sum=_sum, gather=_gather)


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _gather(tensor: Tensor) -> Tensor:
    """Concatenates the tensors of all processes along the first axis; smaller ones are padded with zeros (False)."""
    shape = torch.tensor(tensor.shape, device=tensor.device)
    dist.all_reduce(shape, op=dist.ReduceOp.MAX)
    missing = [longest - size for size, longest in zip(tensor.shape, shape.tolist(), strict=True)]
    padding = [extra for count in reversed(missing) for extra in (0, count)]  # `pad` starts with the last axis
    padded = F.pad(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor, padding)
    return torch.cat(_AllGather.apply(padded)).to(tensor.dtype)


class _AllGather(torch.autograd.Function):
    """The tensors of all processes; the gradient of each is the sum of what all processes have for it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> tuple[Tensor, ...]:
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, tensor.contiguous())
        return tuple(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        total = torch.stack(gradients)
        dist.all_reduce(total)
        return total[dist.get_rank()]


__all__ = ["process_collectives"]
