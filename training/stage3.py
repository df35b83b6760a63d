"""
Stage 3: sentence generator and post decoder learn to describe regions.

    accelerate launch training/stage3.py --config training/configs/phantom/stage3.yaml output_dir=runs/stage3 \\
        init_from=runs/stage2/model generator_from=runs/generator/model
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from modeling_chex import ChexPostDecoderConfig, ChexSentenceGenerator
from training.configuration import StageConfig, check_model_keys, model_keys
from training.loop import StageParts, run_as_script, run_command
from training.model_setup import load_stage_model
from training.stages import supervised_stage


def build(config: StageConfig) -> StageParts:
    check_model_keys(config.model, {"post_decoder_config": model_keys(ChexPostDecoderConfig)})
    folder = config.generator_from
    if not folder or not (Path(folder) / "config.json").is_file():
        raise ValueError(
            f"Stage 3 starts from a pre-trained sentence generator, but `generator_from` is {folder!r}, which holds "
            "none. Run training/pretrain_generator.py first, or set `generator_from` to a folder that its run has "
            "written."
        )
    generator = ChexSentenceGenerator.from_pretrained(folder)
    model, processor = load_stage_model(
        config.init_from, "Stage 3", generator_config=generator.config, **_post_decoder(config)
    )
    model.sentence_generator = generator
    if model.post_decoder is not None and "region_drop" in config.model.get("post_decoder_config", {}):
        model.config.post_decoder_config.region_drop = config.model["post_decoder_config"]["region_drop"]
    return supervised_stage(config, model, processor)


def _post_decoder(config: StageConfig) -> dict[str, Any]:
    """
    What stage 3 changes about the post decoder of the model that it starts from: usually nothing.

    For ablations, `model.post_decoder_config: null` leaves it out, and with a description of more than `region_drop`
    a model of stage 1 gets a new one, so that all parts can be trained at once.
    """
    wanted = config.model.get("post_decoder_config", {})
    if wanted is None:
        return {"post_decoder_config": None}
    source = Path(config.init_from or "") / "config.json"
    if not source.is_file() or json.loads(source.read_text(encoding="utf-8")).get("post_decoder_config") is not None:
        check_model_keys(wanted, {"region_drop": None}, "model.post_decoder_config")
        return {}
    if set(wanted) <= {"region_drop"}:
        raise ValueError(
            f"Stage 3 starts from a model of stage 2, but the model in `init_from` ({config.init_from!r}) has no post "
            "decoder. Run training/stage2.py first, or set `init_from` to a folder that its run has written."
        )
    return {"post_decoder_config": wanted}


def main(argv: Sequence[str] | None = None) -> Path | None:
    return run_command("stage3", build, argv, __doc__)


if __name__ == "__main__":
    run_as_script(main)
