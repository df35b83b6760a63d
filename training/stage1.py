"""
Stage 1: image encoder and prompt detector learn to locate and classify what sentences, anatomy names and pathology
names ask for.

    accelerate launch training/stage1.py --config training/configs/phantom/stage1.yaml output_dir=runs/stage1 \\
        init_from=runs/clip/model
"""

from collections.abc import Sequence
from pathlib import Path

from training.configuration import StageConfig, check_model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stages import supervised_stage


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, {"attention_mode": None})
    model, processor = load_stage_model(
        config.init_from, "Stage 1", post_decoder_config=None, generator_config=None, **config.model
    )
    return supervised_stage(config, model, processor)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("stage1", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
