"""Other processes: what objectives need from them, how long to wait for them, what to say when they are missing."""

import contextlib
import datetime
import functools
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.objectives import SINGLE_PROCESS, Collectives, StepTotals


logger = logging.getLogger(__name__)

# How long a process waits for others, in minutes, unless the environment variable says otherwise. Longest they wait
# for the main process, while it writes a model or runs tasks of the evaluation.
TIMEOUT_VARIABLE, TIMEOUT_MINUTES = "CHEX_PROCESS_TIMEOUT_MINUTES", 30.0
# What Gloo and NCCL say when a process that they wait for is gone or late.
_LOST = re.compile(
    r"gloo|connection (reset|closed|refused)|broken pipe|timed out waiting|nccl|socket timeout", re.IGNORECASE
)


def process_collectives(totals: StepTotals | None = None) -> Collectives:
    """Collectives over all processes, or the trivial ones without `torch.distributed`; for one part of a step."""
    alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
    collectives = SINGLE_PROCESS if alone else Collectives(sum=_sum, gather_all=_gather_all)
    return collectives if totals is None else replace(collectives, totals=totals, calls=type(collectives.calls)())


def _sum(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def _gather_all(tensors: Sequence[Tensor]) -> list[Tensor]:
    """
    Concatenates each tensor with that of all other processes along the first axis; smaller ones are padded with zeros
    (False). Half precision becomes float32, in which the gradients of all processes are added.
    """
    halves = (torch.bfloat16, torch.float16)
    tensors = [tensor.float() if tensor.dtype in halves else tensor for tensor in tensors]
    shapes = torch.tensor([size for tensor in tensors for size in tensor.shape], device=tensors[0].device)
    dist.all_reduce(shapes, op=dist.ReduceOp.MAX)
    sizes, gathered = iter(shapes.tolist()), []
    for tensor in tensors:
        missing = [next(sizes) - size for size in tensor.shape]
        padding = [extra for count in reversed(missing) for extra in (0, count)]  # `pad` starts with the last axis
        padded = F.pad(tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor, padding)
        gathered.append(torch.cat(_AllGather.apply(padded)).to(tensor.dtype))
    return gathered


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


def process_group_options() -> InitProcessGroupKwargs:
    """
    How long processes wait for each other.

    Raises:
        ValueError: The environment variable for it is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_MINUTES))
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ValueError(f"{TIMEOUT_VARIABLE} must be a number of minutes greater than 0, not {text!r}.")
    return InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=minutes))


def set_up_deepspeed(config: dict[str, Any], precision: str, max_grad_norm: float | None) -> None:
    """
    Makes DeepSpeed train as the other launchers do: the loop's accumulation and clipping, and mixed precision with
    float32 weights; its own would round the weights, those that are saved as well.

    Args:
        config: DeepSpeed's configuration, changed in place; what it says about all that does not count.
        precision: "bf16" or "no".
        max_grad_norm: Where gradients are clipped, None for nowhere.

    Raises:
        ValueError: It spreads the weights, or should use float16.
    """
    if config["zero_optimization"]["stage"] > 2:
        raise ValueError(
            "DeepSpeed's ZeRO-3 spreads the weights over the processes, and what this run saves would be incomplete: "
            "set zero_stage to 2, or use FSDP."
        )
    if precision == "fp16":
        raise ValueError("mixed_precision=fp16 is not supported with DeepSpeed: set it to bf16, no or auto.")
    autocast = {"enabled": precision == "bf16", "dtype": "bfloat16", "lower_precision_safe_modules": []}
    config |= {
        "torch_autocast": autocast,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
    }


def set_up_fsdp(accelerator: Accelerator, module: nn.Module) -> None:
    """
    Makes FSDP2 train in the mixed precision of the other launchers: autocast with float32 weights. Its own would
    compute everything in bfloat16, boxes as well, and round the losses.
    """
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    forward = module.forward

    @functools.wraps(forward)
    def in_mixed_precision(*arguments: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*arguments, **options)

    module.forward = in_mixed_precision


def precision_of(accelerator: Accelerator) -> str:
    """Mixed precision of a run: "bf16", "fp16" or "no"."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return "bf16" if accelerator.state.deepspeed_plugin.deepspeed_config["torch_autocast"]["enabled"] else "no"
    return accelerator.mixed_precision


@contextlib.contextmanager
def whole_weights(accelerator: Accelerator, module: nn.Module) -> Iterator[None]:
    """
    Inside, the module of the main process has whole weights, to be saved, where they are spread over the processes.
    All processes must enter; the module computes nothing inside.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        yield
        return
    weights = accelerator.get_state_dict(module)  # leaves every part with its shards, which a pass may not do
    spread = [(part, dict(part._parameters)) for part in module.modules()]
    if accelerator.is_main_process:
        _insert(weights, accelerator.unwrap_model(module))
    try:
        yield
    finally:
        for part, parameters in spread:
            part._parameters.update(parameters)


def gather_weights(accelerator: Accelerator, module: nn.Module) -> None:
    """The same for good: at the end of training, which cannot go on with such weights."""
    if accelerator.distributed_type == DistributedType.FSDP:
        weights = accelerator.get_state_dict(module)
        if accelerator.is_main_process:
            _insert(weights, accelerator.unwrap_model(module))


def _insert(weights: Mapping[str, Tensor], module: nn.Module) -> None:
    for name, weight in weights.items():
        owner, _, attribute = name.rpartition(".")
        if isinstance(getattr(module.get_submodule(owner), attribute), nn.Parameter):
            setattr(module.get_submodule(owner), attribute, nn.Parameter(weight, requires_grad=False))
    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            part.tie_weights()


def leave_processes() -> None:
    """Takes leave of the other processes, at the end of a script."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def warn_of_missing_processes(num_processes: int) -> None:
    """`accelerate launch` starts one process where it cannot start more, as on a CPU, and says nothing."""
    # It announces the meeting point of several processes, but none of them gets a number.
    if num_processes == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        logger.warning(
            "The launcher was asked for several processes but has started one, which trains with a batch for one "
            "process. On CPUs use: torchrun --nproc_per_node N SCRIPT ..."
        )


def lost_process(error: BaseException) -> str | None:
    """What to say if an error comes from another process that is gone or does not answer; None for other errors."""
    if not isinstance(error, RuntimeError) or not dist.is_available() or not dist.is_initialized():
        return None
    if not isinstance(error, dist.DistError) and not _LOST.search(str(error)):
        return None
    # its first sentence, without the place in the source of the library
    reason = re.sub(r"^\[[^\]]*\] ", "", str(error).strip().splitlines()[0]).split(". ")[0].rstrip(".")
    return (
        f"Process {dist.get_rank()} of {dist.get_world_size()} has lost another one, which ended or did not answer "
        f"in time ({reason}). Its own message says why, if it left one; one killed for memory leaves none. The "
        "same command goes on from the last checkpoint."
    )


__all__ = [
    "gather_weights",
    "leave_processes",
    "lost_process",
    "precision_of",
    "process_collectives",
    "process_group_options",
    "set_up_deepspeed",
    "set_up_fsdp",
    "warn_of_missing_processes",
    "whole_weights",
]
