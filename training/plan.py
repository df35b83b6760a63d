"""What a run is going to do, computed before it starts."""

import math
from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn

from training.configuration import OptimizationConfig, StageConfig
from training.distributed import precision_of


@dataclass(frozen=True)
class Schedule:
    """
    Batches and updates of a run.

    Attributes:
        batches: Of an epoch, in each process; what does not fill a batch in every process is left out.
        accumulated: Batches to an update; the last update of an epoch may have fewer.
        updates: Of an epoch.
        total: Updates of the run.
    """

    batches: int
    accumulated: int
    updates: int
    total: int

    @classmethod
    def of(cls, options: OptimizationConfig, batches: int) -> "Schedule":
        updates = math.ceil(batches / options.gradient_accumulation_steps)
        total = options.max_steps if options.max_steps is not None else options.epochs * updates
        return cls(batches, options.gradient_accumulation_steps, updates, total)


def memory_of(module: nn.Module, config: StageConfig, precision: str, processes: int) -> dict[str, int]:
    """Bytes that training holds in each process all the time, by purpose; nothing is sharded."""
    parameters, buffers = list(module.parameters()), list(module.buffers())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    size = sum(parameter.nbytes for parameter in trained)
    memory = {
        "weights": sum(parameter.nbytes for parameter in parameters),
        "features and tokens of texts": sum(buffer.nbytes for buffer in buffers),
        "gradients": size,
        "AdamW's two moments": 2 * size,
    }
    if config.optimization.ema_decay is not None:
        memory["moving average"] = size
    if precision in ("bf16", "fp16"):
        memory[f"{precision} copies of trained weights (while a batch is computed)"] = 2 * sum(
            parameter.numel() for parameter in trained
        )
    if processes > 1:
        memory["gradient buckets between processes"] = size
    return memory


def describe_plan(config: StageConfig, module: nn.Module, items: tuple[int, int], accelerator: Accelerator) -> str:
    """
    The plan of a run as text.

    Args:
        module: The supervision with its model; which parameters are trained is settled.
        items: Numbers of training and validation items.
    """
    options, processes = config.optimization, accelerator.num_processes
    precision = precision_of(accelerator)
    schedule = Schedule.of(options, items[0] // options.batch_size // processes)
    parts = {name: child for name, child in module.model.named_children() if child is not None}
    rows = [(name, _counts(child)) for name, child in parts.items()]
    total = _counts(module)
    own = tuple(sum(counts[kind] for _, counts in rows) for kind in (0, 1))
    if total != own:
        rows.append(("others", (total[0] - own[0], total[1] - own[1])))
    lines = [
        f"{config.stage} in {config.output_dir}",
        "",
        f"{'parameters':<24}{'trained':>16}{'frozen':>16}",
        *(f"  {name:<22}{trained:>16,}{frozen:>16,}" for name, (trained, frozen) in [*rows, ("all", total)]),
        "",
        f"items         {items[0]:,} for training, {min(items[1], config.tracking.validation_images):,} to validate",
        f"update        {options.batch_size} items x {schedule.accumulated} batches x {processes} processes = "
        f"{options.batch_size * schedule.accumulated * processes} items",
        f"epoch         {schedule.batches:,} batches in each process = {schedule.updates:,} updates",
        f"run           {schedule.total:,} updates = {schedule.total / schedule.updates:.1f} epochs",
        f"learning rate {options.learning_rate:g}, after {options.warmup_steps} updates of warm-up falling to "
        f"{options.min_learning_rate:g}",
        *(["objectives    with the defects of the official training"] if config.is_official else []),
        f"precision     {precision if precision != 'no' else 'float32'} on {accelerator.device}",
        "",
        "memory of each process, without activations",
    ]
    memory = memory_of(module, config, precision, processes)
    width = max(map(len, memory)) + 2
    lines += [
        f"  {name:<{width}}{size / 2**20:>12,.1f} MiB"
        for name, size in [*memory.items(), ("all", sum(memory.values()))]
    ]
    return "\n".join(lines)


def _counts(module: nn.Module) -> tuple[int, int]:
    """Trained and frozen parameters."""
    parameters = list(module.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    return trained, sum(parameter.numel() for parameter in parameters) - trained


__all__ = ["Schedule", "describe_plan", "memory_of"]
