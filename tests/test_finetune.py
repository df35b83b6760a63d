"""Fine-tuning: the recipe of docs/finetune.md, what is on and off, what is kept, and adapters."""

import builtins
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling_chex import ChexModel
from processing_chex import ChexProcessor
from space_app.cli import app
from training import finetune, pretrain_generator, stage3
from training.annotations import KINDS, TERMS, annotated_kinds, usable_weights
from training.configuration import CONFIG_DIR, load_config
from training.data.preparation import prepare
from training.objectives import ObjectiveWeights

from .test_cli import save_tiny_model


RECIPE = Path(__file__).parents[1] / "docs" / "finetune.md"
TINY = ("optimization.batch_size=3", "optimization.max_steps=2", "optimization.warmup_steps=1", "mixed_precision=no")
BOXES = {"objects": [{"bbox": [20, 30, 60, 70], "category": "Pleural effusion"}]}
PHRASES = {"objects": [{"bbox": [20, 30, 60, 70], "category": "Pleural effusion", "phrase": "Small effusion."}]}
SENTENCES = {"sentences": ["The heart is enlarged.", "No pneumothorax."]}
LABELS = {"class_labels": ["Pleural effusion"]}
REGIONS = {"anatomy_boxes": {"right lung": [10, 10, 50, 90], "cardiac silhouette": [40, 40, 80, 80]}}
REGION_LABELS = REGIONS | {"anatomy_labels": {"right lung": ["Pleural effusion"]}}
REGION_SENTENCES = REGIONS | {"anatomy_sentences": {"right lung": ["There is a small pleural effusion."]}}
EVERYTHING = PHRASES | SENTENCES | LABELS | REGION_LABELS | REGION_SENTENCES


def write_own_data(folder: Path, *annotations: dict) -> Path:
    """Six images, the last two for validation; image n has the n-th annotation (cyclically)."""
    (folder / "scans").mkdir(parents=True)
    rng, lines = np.random.default_rng(0), []
    for number in range(1, 7):
        name = f"scans/{number:04d}.png"
        Image.fromarray(rng.integers(0, 255, (100, 100), dtype=np.uint8)).save(folder / name)
        row = {"image": name, "split": "train" if number < 5 else "validation"}
        lines.append(json.dumps(row | annotations[(number - 1) % len(annotations)]) + "\n")
    (folder / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def prepared(folder: Path, *annotations: dict) -> Path:
    prepare("own", folder / "prepared", data_dir=write_own_data(folder / "raw", *annotations), num_proc=1)
    return folder / "prepared"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), stage=3)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Own data in which images have everything, boxes of findings alone, or nothing."""
    return prepared(tmp_path_factory.mktemp("complete"), EVERYTHING, EVERYTHING, BOXES, {})


def tune(output_dir, model_dir, data_dir, *overrides, trainable=("detector",), stage=finetune):
    subsets = [{"folder": str(data_dir)}]
    given = (f"init_from={model_dir}", f"output_dir={output_dir}", f"data.cache_dir={output_dir.parent / 'cache'}")
    given += (f"data.subsets={json.dumps(subsets)}", f"trainable={json.dumps(list(trainable))}", "data.side=64")
    return stage.main([*given, *TINY, *overrides])


def changed_tensors(before, after):
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (before, after))
    assert before.keys() == after.keys()
    return {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}


def parts_of(names):
    return {name.split(".")[0] for name in names}


def history(model_dir):
    lines = (model_dir.parent / "history.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def off_lines(caplog):
    return [record.message for record in caplog.records if "Losses that are off" in record.message]


# --- the recipe


@pytest.fixture(scope="module")
def phantom(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prepared") / "phantom"
    sizes = {"image_size": 64, "num_train": 4, "num_validation": 2, "num_test": 0}
    prepare("phantom", folder, size=64, num_proc=1, options=sizes)
    return folder


def recipe_commands():
    blocks = re.findall(r"```bash\n(.*?)```", RECIPE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def has_peft():
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.parametrize(
    "annotations",
    [[EVERYTHING, BOXES, SENTENCES, REGIONS, {}], [BOXES], [SENTENCES], [REGIONS]],
    ids=["mixed", "boxes", "sentences", "regions"],
)
def test_the_recipe(model_dir, phantom, tmp_path, monkeypatch, annotations):
    """Every command of the recipe; what the data cannot teach is refused with the reason, and nothing else is."""
    monkeypatch.chdir(tmp_path)
    write_own_data(tmp_path / "mydata", *annotations)
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "model").symlink_to(model_dir)
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "phantom").symlink_to(phantom)
    commands = recipe_commands()
    assert len(commands) == 9
    refused = set()
    for command in commands:
        if command[0] == "chex":
            if "runs/mine-detector/model" in command and "detector" in refused:
                command = [word.replace("mine-detector", "mine-mixed") for word in command]
            result = CliRunner().invoke(app, command[1:])
            assert result.exit_code == 0, (command, result.output)
            continue
        assert command[:3] == ["accelerate", "launch", "training/finetune.py"]
        (output,) = (word.split("=")[1] for word in command if word.startswith("output_dir="))
        arguments = [*command[3:], *TINY, "data.side=64"]
        try:
            folder = finetune.main(arguments)
        except ValueError as error:
            if "lora=" in " ".join(command) and not has_peft():
                assert "pip install peft" in str(error)
            else:
                assert "Nothing can be learned" in str(error)
                refused.add(output.removeprefix("runs/mine-"))
            continue
        if "--dry-run" in command:
            assert folder is None and not Path(output).exists()
        else:
            assert changed_tensors(model_dir, folder)
    # sentences also reach the detector, whose features they are compared with
    learned_from_boxes = {"features", "sentences"} | ({"adapted"} if has_peft() else set())
    assert refused == (learned_from_boxes if annotations in ([BOXES], [REGIONS]) else set())
    if len(annotations) > 1:
        answer = CliRunner().invoke(
            app, ["explain", "mydata/scans/0001.png", "--box", "10,10,50,60", "--model", "runs/mine-mixed/model"]
        )
        assert answer.exit_code == 0, answer.output


def test_the_published_configuration_names_every_loss_of_the_paper():
    weights = load_config(CONFIG_DIR / "finetune.yaml").objectives.weights
    assert weights.active() == set(TERMS) - {"sentence_detection", "anatomy_presence", "anatomy_statement"}


# --- what is kept


@pytest.mark.parametrize("part", ["detector", "post_decoder", "sentence_generator"])
def test_only_the_named_part_changes(model_dir, complete, tmp_path, part):
    folder = tune(tmp_path / "run", model_dir, complete, trainable=[part])
    assert parts_of(changed_tensors(model_dir, folder)) == {part}
    tokenizers = [ChexProcessor.from_pretrained(path).generator_tokenizer for path in (model_dir, folder)]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_models_without_the_later_parts(complete, tmp_path, caplog):
    first = save_tiny_model(tmp_path / "first", stage=1)
    folder = tune(tmp_path / "run", first, complete)
    assert parts_of(changed_tensors(first, folder)) == {"detector"}
    (line,) = off_lines(caplog)
    assert "sentence_generation, anatomy_generation (the model has no sentence generator)" in line
    with pytest.raises(ValueError, match="`trainable` names 'post_decoder', which is not a part of this model"):
        tune(tmp_path / "other", first, complete, trainable=["post_decoder"])


def test_weights_in_half_precision_are_trained_in_full(model_dir, complete, tmp_path):
    half = tmp_path / "half"
    model = ChexModel.from_pretrained(model_dir, dtype=torch.bfloat16)
    model.save_pretrained(half)
    ChexProcessor.from_pretrained(model_dir).save_pretrained(half)
    folder = tune(tmp_path / "run", half, complete, "optimization.learning_rate=1e-6")
    weights, before = (load_file(path / "model.safetensors") for path in (folder, half))
    assert {tensor.dtype for tensor in before.values()} == {torch.bfloat16}
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    name = "detector.layers.0.fc1.weight"
    assert 0 < (weights[name] - before[name].float()).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init_from=nowhere"], "Fine-tuning starts from an earlier stage, but `init_from` is 'nowhere'"),
        (["generator_from=nowhere"], "`generator_from` has no effect in fine-tuning"),
        (["trainable=[text_model]"], "`trainable` names 'text_model', but the prompt encoder is frozen"),
        (["trainable=[]"], "Nothing can be learned, because every configured loss is off: .*what is trained, nothing"),
        (["model={projection_dim: 3}"], "unknown key 'projection_dim'"),
    ],
)
def test_mistakes(model_dir, complete, tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "run", model_dir, complete, *overrides)
    assert not (tmp_path / "run").exists()


# --- losses that are off


@pytest.mark.parametrize(
    ("annotation", "kinds"),
    [
        ({}, set()),
        (BOXES, {"boxes of findings"}),
        (PHRASES, {"boxes of findings", "phrases of boxes"}),
        ({"objects": []}, set()),
        (SENTENCES, {"sentences"}),
        ({"sentences": []}, set()),
        (LABELS, {"class labels"}),
        (REGIONS, {"boxes of regions"}),
        ({"anatomy_boxes": {}}, set()),
        (REGION_LABELS, {"boxes of regions", "labels of regions with boxes"}),
        (REGION_SENTENCES, {"boxes of regions", "sentences of regions with boxes"}),
        ({"anatomy_sentences": REGION_SENTENCES["anatomy_sentences"]}, set()),
        ({"anatomy_labels": REGION_LABELS["anatomy_labels"]}, set()),
        (REGIONS | {"anatomy_sentences": {}}, {"boxes of regions"}),
        (EVERYTHING, set(KINDS)),
    ],
)
def test_what_is_annotated(tmp_path, annotation, kinds):
    from training.data.own_data import OwnData

    builder = OwnData(own_dir=str(write_own_data(tmp_path / "raw", {}, annotation)), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()

    class Part:
        records = builder.as_dataset(split="train").with_format("arrow")

        def __len__(self):
            return len(self.records)

    assert annotated_kinds(Part()) == kinds


def test_every_loss_is_known():
    assert set(TERMS) == set(vars(ObjectiveWeights()))


def test_published_stages_are_as_configured():
    """Nothing is off in stages 1 to 3 with complete data."""

    class Model:
        sentence_generator = object()

    for path in [*CONFIG_DIR.glob("stage*.yaml"), *(CONFIG_DIR / "phantom").glob("stage*.yaml")]:
        config = load_config(path)
        weights, off = usable_weights(config.objectives.weights, KINDS, Model(), config.trainable)
        assert weights == config.objectives.weights and off is None


def test_what_is_off_is_said_once(model_dir, tmp_path, caplog):
    folder = tune(tmp_path / "run", model_dir, prepared(tmp_path, BOXES))
    (line,) = off_lines(caplog)
    assert line == (
        "finetune: Losses that are off: global_contrastive, sentence_contrastive, sentence_mse, sentence_generation "
        "(the training data have no sentences); pathology_classification (the training data have no class labels); "
        "anatomy_detection (the training data have no boxes of regions); anatomy_classification (the training data "
        "have no labels of regions with boxes); anatomy_mse, anatomy_generation (the training data have no sentences "
        "of regions with boxes)."
    )
    for entry in history(folder):
        assert {name for name in entry if name in TERMS} == {"pathology_detection"}


def test_a_loss_is_on_if_any_data_set_of_a_mixture_has_its_annotations(model_dir, tmp_path, caplog):
    folders = [prepared(tmp_path / name, part) for name, part in (("boxes", BOXES), ("sentences", SENTENCES))]
    subsets = json.dumps([{"folder": str(folder)} for folder in folders])
    folder = tune(tmp_path / "run", model_dir, folders[0], f"data.subsets={subsets}")
    (line,) = off_lines(caplog)
    assert "no sentences)" not in line and "boxes of findings" not in line
    assert "global_contrastive (no influence on what is trained, detector)" in line
    terms = {name for name in history(folder)[-1] if name in TERMS}
    assert terms == {"pathology_detection", "sentence_contrastive", "sentence_mse", "sentence_generation"}


def test_data_without_any_of_the_configured_annotations(model_dir, tmp_path):
    with pytest.raises(
        ValueError, match="Nothing can be learned, because every configured loss is off: .*no sentences"
    ):
        tune(tmp_path / "run", model_dir, prepared(tmp_path, {}))
    assert not (tmp_path / "run").exists()


def test_stages_say_it_too(model_dir, tmp_path, caplog):
    data = prepared(tmp_path, SENTENCES)
    given = (f"generator_from={save_generator(model_dir, tmp_path / 'generator')}",)
    folder = tune(
        tmp_path / "run", model_dir, data, *given, trainable=("post_decoder", "sentence_generator"), stage=stage3
    )
    (line,) = off_lines(caplog)
    assert line.startswith("stage3: Losses that are off: anatomy_mse, anatomy_generation (the training data have no")
    assert {name for name in history(folder)[-1] if name in TERMS} == {"sentence_mse", "sentence_generation"}


def save_generator(model_dir, folder):
    """As generator pre-training leaves it."""
    ChexModel.from_pretrained(model_dir).sentence_generator.save_pretrained(folder)
    ChexProcessor.from_pretrained(model_dir).save_pretrained(folder)
    return folder


def test_generator_pretraining_needs_sentences(model_dir, tmp_path):
    with pytest.raises(ValueError, match="The training data have no sentences"):
        given = ("generator_init=null", "model={n_embd: 16, n_layer: 1, n_head: 2}")
        tune(tmp_path / "run", model_dir, prepared(tmp_path, BOXES), *given, stage=pretrain_generator)


# --- adapters

ADAPTED = ("c_attn", "c_proj", "c_fc", "fc1", "fc2")


def test_without_peft(model_dir, complete, tmp_path, monkeypatch):
    importing = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "peft":
            raise ImportError("No module named 'peft'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"`lora` needs the package peft, .*`pip install peft`"):
        tune(tmp_path / "run", model_dir, complete, "lora={rank: 2}", trainable=["sentence_generator"])
    assert tune(tmp_path / "plain", model_dir, complete).is_dir(), "nothing else needs it"


@pytest.fixture(scope="module")
def adapted(model_dir, complete, tmp_path_factory):
    pytest.importorskip("peft")
    given = (
        "lora={rank: 2, alpha: 8, save_adapter: true}",
        "optimization.learning_rate=0.01",
        "tracking.save_every=1",
    )
    folder = tmp_path_factory.mktemp("adapted")
    return tune(folder / "run", model_dir, complete, *given, trainable=["post_decoder", "sentence_generator"])


def test_adapters_change_only_what_they_adapt(model_dir, adapted):
    changed = changed_tensors(model_dir, adapted)
    assert parts_of(changed) == {"post_decoder", "sentence_generator"}
    generator = {name for name in changed if name.startswith("sentence_generator.")}
    before, after = (load_file(folder / "model.safetensors") for folder in (model_dir, adapted))
    targets = {name for name in before if name.startswith("sentence_generator.") and name.split(".")[-2] in ADAPTED}
    assert generator == {name for name in targets if name.endswith(".weight")}
    for name in generator:
        singular = torch.linalg.svdvals(after[name] - before[name])
        assert singular[1] > 0 and singular[2] < 1e-5 * singular[0], "of rank 2"


def test_the_adapted_model_is_a_plain_one(adapted, model_dir):
    model, loading = ChexModel.from_pretrained(adapted, output_loading_info=True)
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {path.name for path in (adapted / "adapter").iterdir()} >= {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert model.sentence_generator.language_model.lm_head.weight is (
        model.sentence_generator.language_model.transformer.wte.weight
    )


def generator_outputs(generator, features):
    ids = torch.tensor([[1, 4, 7, 2], [1, 9, 3, 5]])
    with torch.no_grad():
        return generator.eval()(input_ids=ids, features=features).logits


def test_merged_equals_unmerged(adapted, model_dir):
    """The merged model, and the adapters on the generator that the run started from, write the same."""
    from peft import PeftModel

    features = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    expected = generator_outputs(ChexModel.from_pretrained(adapted).sentence_generator, features)
    base = ChexModel.from_pretrained(model_dir).sentence_generator
    assert (generator_outputs(base, features) - expected).abs().max() > 1e-2
    base.load_adapter(str(adapted / "adapter"))
    torch.testing.assert_close(generator_outputs(base, features), expected, rtol=1e-4, atol=1e-5)
    wrapped = PeftModel.from_pretrained(ChexModel.from_pretrained(model_dir).sentence_generator, adapted / "adapter")
    torch.testing.assert_close(generator_outputs(wrapped, features), expected, rtol=1e-4, atol=1e-5)


def test_adapters_start_as_nothing(model_dir, complete, tmp_path):
    """With a learning rate of next to nothing, the merged model is the model that the run started from."""
    pytest.importorskip("peft")
    given = (
        "lora={targets: [c_attn, prefix_projection.fc2]}",
        "optimization.learning_rate=1e-30",
        "optimization.min_learning_rate=0",
    )
    folder = tune(tmp_path / "run", model_dir, complete, *given, trainable=["sentence_generator"])
    assert changed_tensors(model_dir, folder) == set()
    assert not (folder / "adapter").exists()


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("{targets: [c_attention]}", "names 'c_attention', which is no linear layer of the sentence generator"),
        ("{targets: [lm_head]}", "names 'lm_head', which is no linear layer"),
    ],
)
def test_targets_of_adapters(model_dir, complete, tmp_path, lora, message):
    pytest.importorskip("peft")
    with pytest.raises(ValueError, match=message):
        tune(tmp_path / "run", model_dir, complete, f"lora={lora}", trainable=["sentence_generator"])


@pytest.mark.parametrize("lora", ["{rank: 0}", "{alpha: 0}", "{dropout: 1}", "{targets: []}", "{ranks: 3}", "5"])
def test_settings_of_adapters(lora):
    with pytest.raises(ValueError, match="lora"):
        load_config(CONFIG_DIR / "finetune.yaml", ["trainable=[sentence_generator]", f"lora={lora}"])


def test_adapters_need_the_generator_to_be_trained():
    with pytest.raises(ValueError, match="lora adapts the sentence generator: add sentence_generator to trainable"):
        load_config(CONFIG_DIR / "finetune.yaml", ["lora={}"])
    assert load_config(CONFIG_DIR / "finetune.yaml", ["lora={}", "trainable=[sentence_generator]"]).lora.rank == 8
