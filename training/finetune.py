"""
Fine-tuning: a model of any stage learns from other data. Unlike stages 1 to 3 it keeps all parts of the model, and
trains those that `trainable` names. Losses that the data cannot teach are off. See docs/finetune.md.

    accelerate launch training/finetune.py init_from=runs/demo/model output_dir=runs/mine \\
        'data.subsets=[{folder: prepared/mydata}]' 'trainable=[detector]'
"""

from collections.abc import Sequence
from pathlib import Path

from training.configuration import StageConfig, check_model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stages import supervised_stage


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, {})
    if config.generator_from is not None:
        raise ValueError("`generator_from` has no effect in fine-tuning: the generator is that of `init_from`.")
    model, processor = load_stage_model(config.init_from, "Fine-tuning")
    return supervised_stage(config, model, processor)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("finetune", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
