"""
Stage 3: sentence generator and post decoder learn to describe regions.

    accelerate launch training/stage3.py --config training/configs/phantom/stage3.yaml output_dir=runs/stage3 \
        init_from=runs/stage2/model generator_from=runs/generator/model
"""

from collections.abc import Sequence
from pathlib import Path

from modeling_chex import ChexSentenceGenerator
from training.configuration import StageConfig, check_model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stages import supervised_stage


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, {"post_decoder_config": {"region_drop": None}})
    folder = config.generator_from
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"Stage 3 starts from a pre-trained sentence generator, but `generator_from` is {folder!r}, which holds "
            "none. Run training/pretrain_generator.py first, or set `generator_from` to a folder that its run has "
            "written."
        )
    generator = ChexSentenceGenerator.from_pretrained(folder)
    model, processor = load_stage_model(config.init_from, "Stage 3", generator_config=generator.config)
    if model.post_decoder is None:
        raise ValueError(
            f"Stage 3 starts from a model of stage 2, but the model in `init_from` ({config.init_from!r}) has no post "
            "decoder. Run training/stage2.py first, or set `init_from` to a folder that its run has written."
        )
    model.sentence_generator = generator
    model.config.post_decoder_config.region_drop = config.model.get("post_decoder_config", {}).get(
        "region_drop", model.config.post_decoder_config.region_drop
    )
    return supervised_stage(config, model, processor)


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("stage3", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
