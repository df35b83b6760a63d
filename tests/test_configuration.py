"""Training configurations: typed files, overrides, messages, and the published values."""

import json
from dataclasses import asdict

import pytest
import yaml

from modeling_chex import ChexConfig, ChexGeneratorConfig, ChexPostDecoderConfig
from training.configuration import (
    CONFIG_DIR,
    StageConfig,
    check_model_keys,
    load_config,
    model_keys,
    read_resolved,
)
from training.loop import learning_rate_factor
from training.objectives import STAGE1_WEIGHTS, STAGE2_WEIGHTS, STAGE3_WEIGHTS


STAGES = ("pretrain_clip", "stage1", "stage2", "pretrain_generator", "stage3")
FILES = sorted(path for path in CONFIG_DIR.rglob("*.yaml") if path.parent.name != "accelerate")  # not ours


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONFIG_DIR)))
def test_every_file_loads(path):
    config = load_config(path)
    assert config.stage == path.stem
    if config.stage == "pretrain_clip":
        check_model_keys(config.model, model_keys(ChexConfig))
        ChexConfig(**config.model)
    elif config.stage == "pretrain_generator":
        check_model_keys(config.model, model_keys(ChexGeneratorConfig))
        ChexGeneratorConfig(**config.model)
    else:
        assert set(config.model) <= {"post_decoder_config"}
        check_model_keys(config.model.get("post_decoder_config", {}), model_keys(ChexPostDecoderConfig))
        assert config.objectives.weights.active()


def test_both_sizes_have_all_stages():
    assert {path.stem for path in CONFIG_DIR.glob("*.yaml")} == {*STAGES, "finetune"}
    assert {path.stem for path in (CONFIG_DIR / "phantom").glob("*.yaml")} == set(STAGES)


def test_published_files_form_a_chain():
    """The default commands, run one after the other, hand their models on."""
    config = {stage: load_config(CONFIG_DIR / f"{stage}.yaml") for stage in STAGES}
    model = {stage: f"{config[stage].output_dir}/model" for stage in STAGES}
    assert config["pretrain_clip"].init_from is None
    assert config["stage1"].init_from == model["pretrain_clip"]
    assert config["stage2"].init_from == model["stage1"]
    assert config["pretrain_generator"].init_from == model["pretrain_clip"]
    assert config["stage3"].init_from == model["stage2"]
    assert config["stage3"].generator_from == model["pretrain_generator"]
    assert len(set(model.values())) == len(STAGES)


@pytest.mark.parametrize(
    ("stage", "batch", "accumulation", "epochs", "peak", "warmup", "decay"),
    [
        ("stage1", 256, 1, 50, 1e-4, 1000, 1e-5),
        ("stage2", 256, 1, 200, 1e-3, 1000, 1e-5),
        ("pretrain_generator", 64, 8, 50, 3e-4, 1250, 1e-5),
        ("stage3", 8, 32, 20, 3e-4, 312, 1e-3),
    ],
)
def test_published_optimisation(stage, batch, accumulation, epochs, peak, warmup, decay):
    options = load_config(CONFIG_DIR / f"{stage}.yaml").optimization
    assert (options.batch_size, options.gradient_accumulation_steps) == (batch, accumulation)
    assert (options.epochs, options.max_steps) == (epochs, None)
    assert (options.learning_rate, options.min_learning_rate) == (peak, 1e-7)
    assert (options.warmup_steps, options.weight_decay, options.max_grad_norm) == (warmup, decay, 1.0)


@pytest.mark.parametrize(
    ("stage", "weights"), [("stage1", STAGE1_WEIGHTS), ("stage2", STAGE2_WEIGHTS), ("stage3", STAGE3_WEIGHTS)]
)
def test_published_objectives(stage, weights):
    config = load_config(CONFIG_DIR / f"{stage}.yaml")
    options = config.objectives
    assert options.weights == weights
    assert (options.sentence.global_temperature, options.sentence.temperature) == (0.2, 0.25)
    assert (options.pathology.temperature, options.anatomy.temperature) == (0.2, 0.25)
    assert (options.anatomies_per_step, options.classes_per_step, options.anatomy.subsample_negatives) == (20, 10, 10)
    assert options.anatomies_per_classification is None
    assert options.sentences_per_image is None
    assert options.region_encoding == ("token" if stage == "stage1" else "random")
    assert options.multi_anatomies == (stage == "stage1")
    detection = asdict(options.pathology.detection)
    costs = [detection[f"cost_{name}"] for name in ("l1", "giou", "class", "score")]
    assert costs == [5, 2, 1, 3]
    assert [detection[f"loss_{name}"] for name in ("l1", "giou", "score")] == [5, 2, 3]
    assert (detection["matching"], detection["focal_alpha"], detection["focal_gamma"]) == ("balanced", None, 2)


def test_published_parts():
    config = {stage: load_config(CONFIG_DIR / f"{stage}.yaml") for stage in STAGES}
    assert (config["stage1"].trainable, config["stage1"].frozen_vision_layers) == (("vision_model", "detector"), 9)
    assert config["stage2"].trainable == ("post_decoder",)
    assert config["stage3"].trainable == ("post_decoder", "sentence_generator")
    assert config["stage2"].model == {"post_decoder_config": {"region_drop": 0.3}}
    assert config["stage3"].model == {"post_decoder_config": {"region_drop": 0.1}}
    assert config["stage3"].objectives.sentences_per_generation == 32
    # full size is the default of the model's configuration
    assert config["pretrain_clip"].model == config["pretrain_generator"].model == {}


@pytest.mark.parametrize("stage", ["stage1", "stage2", "stage3"])
def test_published_augmentation(stage):
    augmentation = load_config(CONFIG_DIR / f"{stage}.yaml").resolved_augmentation
    assert augmentation.crop_area == (0.5, 1.0)
    assert augmentation.crop_aspect == pytest.approx((3 / 4, 4 / 3))
    assert (augmentation.rotation, augmentation.translation, augmentation.scale) == (10.0, 0.02, (0.95, 1.0))
    assert (augmentation.brightness, augmentation.contrast) == (0.4, 0.4)
    assert (augmentation.blur_probability, augmentation.blur_sigma) == (0.5, (0.1, 5.0))
    assert augmentation.flip == "off"  # names and sentences keep their sides


def test_schedule_of_the_published_stage():
    options = load_config(CONFIG_DIR / "stage1.yaml").optimization
    peak = options.learning_rate
    assert peak * learning_rate_factor(999, 40_000, options) == pytest.approx(1e-4)
    assert peak * learning_rate_factor(499, 40_000, options) == pytest.approx(5e-5)
    assert peak * learning_rate_factor(20_000, 40_000, options) == pytest.approx((1e-4 + 1e-7) / 2)
    assert peak * learning_rate_factor(40_000, 40_000, options) == pytest.approx(1e-7)
    assert peak * learning_rate_factor(50_000, 40_000, options) == pytest.approx(1e-7)


def test_defaults_and_types(tmp_path):
    path = write(
        tmp_path,
        """
        stage: stage1
        trainable: [vision_model, detector]
        optimization: {learning_rate: 1e-3, weight_decay: 0, max_steps: null, max_grad_norm: null}
        augmentation: {crop_area: [1, 1.0]}
        model: {anything: [1, {nested: yes}]}
        """,
    )
    config = load_config(path)
    assert config.trainable == ("vision_model", "detector")
    assert config.optimization.learning_rate == 1e-3  # YAML reads 1e-3 as text
    assert isinstance(config.optimization.weight_decay, float)
    assert config.optimization.max_steps is None
    assert config.optimization.max_grad_norm is None
    assert config.augmentation.crop_area == (1.0, 1.0)
    assert all(isinstance(value, float) for value in config.augmentation.crop_area)
    assert config.model == {"anything": [1, {"nested": True}]}
    assert config.optimization.batch_size == StageConfig().optimization.batch_size


def test_an_empty_file_is_all_defaults(tmp_path):
    assert load_config(write(tmp_path, "")) == StageConfig()


def test_overrides(tmp_path):
    path = write(tmp_path, "stage: stage1\noptimization: {batch_size: 8, epochs: 3}")
    config = load_config(
        path,
        [
            "optimization.batch_size=64",
            "optimization.max_steps=10",
            "objectives.pathology.detection.cost_l1=4",
            "objectives.weights.sentence_mse=1e-2",
            "model.detector_config.num_layers=2",
            "trainable=[detector]",
            "init_from=runs/a=b",
            "tracking.trackers=[]",
        ],
    )
    assert (config.optimization.batch_size, config.optimization.epochs, config.optimization.max_steps) == (64, 3, 10)
    assert config.objectives.pathology.detection.cost_l1 == 4.0
    assert config.objectives.weights.sentence_mse == 0.01
    assert config.model == {"detector_config": {"num_layers": 2}}
    assert config.trainable == ("detector",)
    assert config.init_from == "runs/a=b"
    assert config.tracking.trackers == ()
    assert load_config(path, ["init_from=null"]).init_from is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimisation.batch_size=3", "unknown key 'optimisation'. Did you mean 'optimization'?"),
        ("optimization.batchsize=3", "optimization: unknown key 'batchsize'. Did you mean 'batch_size'?"),
        ("objectives.weights.sentence_mes=1", "weights: unknown key 'sentence_mes'. Did you mean 'sentence_mse'?"),
        ("objectives.anatomy.detection.qqq=1", "unknown key 'qqq'. Known keys: cost_l1, cost_giou,"),
        ("optimization.batch_size=many", "optimization: batch_size must be of type int, not 'many'"),
        ("optimization.batch_size=2.5", "batch_size must be of type int, not 2.5"),
        ("optimization.batch_size=true", "batch_size must be of type int, not True"),
        ("optimization.batch_size=null", "batch_size must be of type int, not None"),
        ("optimization.batch_size=0", "optimization: batch_size must be greater than 0, not 0"),
        ("optimization.learning_rate=fast", "learning_rate must be of type float, not 'fast'"),
        ("optimization.learning_rate=false", "learning_rate must be of type float, not False"),
        ("optimization.learning_rate=-1", "learning_rate must be greater than 0"),
        ("optimization.max_steps=all", "max_steps must be of type int, not 'all'"),
        (
            "objectives.region_encoding=points",
            "region_encoding must be one of 'token', 'bbox', 'random', not 'points'",
        ),
        ("objective_mode=Official", "objective_mode must be one of 'corrected', 'official', not 'Official'"),
        ("objectives.mode=official", "objectives: unknown key 'mode'. It is now called 'objective_mode'."),
        ("objective_mod=official", "unknown key 'objective_mod'. Did you mean 'objective_mode'?"),
        ("objectives.multi_anatomies=1", "multi_anatomies must be of type bool, not 1"),
        ("mixed_precision=half", "mixed_precision must be one of 'no', 'fp16', 'bf16', 'auto', not 'half'"),
        ("augmentation.crop_area=[1]", "crop_area must be a list of 2, not [1]"),
        ("augmentation.crop_area=0.5", "crop_area must be a list of 2, not 0.5"),
        ("augmentation.crop_area=[a, b]", "crop_area must be of type float, not 'a'"),
        ("trainable=detector", "trainable must be a list of values, not 'detector'"),
        ("trainable=[1]", "trainable must be of type str, not 1"),
        ("optimization=3", "optimization is a section and needs a mapping of keys, not 3"),
        ("model=tiny", "model must be of type dict, not 'tiny'"),
        ("output_dir=5", "output_dir must be of type str, not 5"),
        ("optimization.batch_size", "'optimization.batch_size' must have the form section.key=value"),
        ("stage.name=1", "'stage.name=1' goes through 'stage', which is not a section"),
        ("output_dir=[runs", "The value of the override 'output_dir=[runs' is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path, override, message):
    path = write(tmp_path, "stage: stage1")
    with pytest.raises(ValueError) as error:
        load_config(path, [override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_mistakes_in_a_file_name_the_file(tmp_path):
    path = write(tmp_path, "stage: stage1\ntracking: {log_evry: 5}")
    with pytest.raises(ValueError, match="log_every") as error:
        load_config(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("text", ["- stage1", "stage1", "3"])
def test_a_file_without_keys(tmp_path, text):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="must hold a mapping of configuration keys") as error:
        load_config(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_yaml(tmp_path):
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(write(tmp_path, "stage: [stage1"))


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no training configuration at .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_settings_of_the_model_are_checked():
    known = model_keys(ChexConfig)
    check_model_keys({"projection_dim": 8, "detector_config": {"num_layers": 1}, "post_decoder_config": None}, known)
    with pytest.raises(ValueError, match="model: unknown key 'projection_dims'. Did you mean 'projection_dim'?"):
        check_model_keys({"projection_dims": 8}, known)
    with pytest.raises(
        ValueError, match=r"model.detector_config: unknown key 'num_layer'. Did you mean 'num_layers'?"
    ):
        check_model_keys({"detector_config": {"num_layer": 1}}, known)
    with pytest.raises(ValueError, match="model: unknown key 'detector_config'. Known keys: none"):
        check_model_keys({"detector_config": {}}, {})
    check_model_keys({"n_embd": 8, "hidden_size": 8}, model_keys(ChexGeneratorConfig))  # GPT-2 has two names for it


def test_to_dict_is_plain(tmp_path):
    """What a run writes down can be loaded again and gives the same configuration."""
    config = load_config(CONFIG_DIR / "stage1.yaml", ["optimization.max_steps=3"])
    text = yaml.safe_dump(json.loads(json.dumps(config.to_dict())))
    assert load_config(write(tmp_path, text)).to_dict() == config.to_dict() == read_resolved(text)


def test_one_switch_for_the_official_training():
    """What it decides can still be chosen apart, and is written out for each run."""
    path = CONFIG_DIR / "stage2.yaml"
    right, official = load_config(path), load_config(path, ["objective_mode=official"])
    assert not right.is_official and official.is_official
    assert (right.frozen_in_train_mode, official.frozen_in_train_mode) == (False, True)
    assert (right.resolved_augmentation.flip, official.resolved_augmentation.flip) == ("off", "reference")
    written = official.to_dict()
    assert (written["augmentation"]["flip"], written["keep_frozen_in_train_mode"]) == ("reference", True)
    given = ["objective_mode=official", "augmentation.flip=consistent", "keep_frozen_in_train_mode=false"]
    mixed = load_config(path, given)
    assert (mixed.resolved_augmentation.flip, mixed.frozen_in_train_mode) == ("consistent", False)


def test_runs_of_earlier_versions_are_recognised():
    """Their files lack options that are younger, and have keys that have moved."""
    config = load_config(CONFIG_DIR / "stage1.yaml", ["objective_mode=official", "augmentation.flip=off"])
    values = json.loads(json.dumps(config.to_dict()))
    del values["objectives"]["sentence"]["identical_negatives"]
    values["objectives"]["mode"] = values.pop("objective_mode")
    assert read_resolved(yaml.safe_dump(values)) == config.to_dict()
    values["seed"] = 7
    assert read_resolved(yaml.safe_dump(values)) != config.to_dict()
    assert read_resolved(yaml.safe_dump(values | {"unheard_of": 1})) is None
    assert read_resolved("[broken") is None
    assert read_resolved("text") is None
