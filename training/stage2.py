"""
Stage 2: the post decoder learns to refine region features while everything else stays frozen.

    accelerate launch training/stage2.py --config training/configs/phantom/stage2.yaml output_dir=runs/stage2 \\
        init_from=runs/stage1/model
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_chex import ChexPostDecoderConfig
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stages import supervised_stage


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, {"post_decoder_config": model_keys(ChexPostDecoderConfig)})
    post_decoder_config = config.model.get("post_decoder_config", {})
    model, processor = load_stage_model(
        config.init_from, "Stage 2", post_decoder_config=post_decoder_config, generator_config=None
    )
    return supervised_stage(config, model, processor)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("stage2", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
