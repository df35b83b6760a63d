"""Auto classes, and folders that bring their own code to a process in which this package is not installed."""

import builtins
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, pipeline

from modeling_chex import ChexConfig, ChexModel, ChexPipeline, ChexSentenceGenerator, add_code, save_with_code
from processing_chex import ChexImageProcessor, ChexProcessor

from .image_factory import gradient, save_image
from .test_cli import save_tiny_model


# `processing_chex` and the others are installed as links to this repository: only an import hook really hides them.
HIDE_PACKAGES = """
import sys
PACKAGES = ("modeling_chex", "processing_chex", "training", "evaluation", "space_app", "tests")
class Hide:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in PACKAGES:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hide)
for package in PACKAGES:
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{package} must be hidden here")
"""
BOX = [20, 10, 70, 80]
PROMPTS = ["Heart", "Effusion, left"]

# Loads a folder, answers, saves it again in two ways, and loads these too.
USE_FOLDER = """
import json
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

prompts, box, image, folder, *again = json.loads(sys.argv[1])
trust = {"trust_remote_code": True}


def load(folder):
    model = AutoModel.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    image_processor = AutoImageProcessor.from_pretrained(folder, **trust)
    for part in (AutoConfig.from_pretrained(folder, **trust), model, processor, image_processor):
        assert type(part).__module__.startswith("transformers_modules."), type(part)
    stored = load_file(Path(folder) / "model.safetensors")
    state_dict = model.state_dict()
    for name, tensor in stored.items():
        assert torch.equal(state_dict[name], tensor), name
    assert set(state_dict) - set(stored) == {"sentence_generator.language_model.lm_head.weight"}
    assert image_processor.to_dict() == processor.image_processor.to_dict()
    return model, processor


def answer(model, processor):
    inputs = processor(images=image, text=prompts, boxes=[box])
    with torch.no_grad():
        outputs = model(**inputs)
    names = ("boxes", "region_boxes", "region_scores", "query_scores", "query_features", "region_features")
    tensors = {name: outputs[name].contiguous() for name in names}
    tensors["sequences"] = model.generate(**inputs)
    return tensors


def ask(folder):
    chex = pipeline("chest-xray-explanation", model=folder, device="cpu", **trust)
    assert type(chex).__module__.startswith("transformers_modules."), type(chex)
    return chex, chex(image, prompts=prompts, boxes=[box], threshold=0.2)


model, processor = load(folder)
tensors = answer(model, processor)
save_file(tensors, again[0] + ".safetensors")
chex, result = ask(folder)
print(json.dumps(result))

chex.save_pretrained(again[0])
assert ask(again[0])[1] == result
model.save_pretrained(again[1])
processor.save_pretrained(again[1])
for other in again:
    repeated = answer(*load(other))
    assert all(torch.equal(repeated[name], tensor) for name, tensor in tensors.items())
"""


def run_without_package(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", HIDE_PACKAGES + code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("plain"), stage=3)


@pytest.fixture(scope="module")
def loaded(plain_folder):
    return AutoModel.from_pretrained(plain_folder), AutoProcessor.from_pretrained(plain_folder)


@pytest.fixture(scope="module")
def code_folder(loaded, tmp_path_factory):
    folder = tmp_path_factory.mktemp("with_code") / "model"
    save_with_code(*loaded, folder)
    return folder


@pytest.fixture
def never_asked(monkeypatch):
    def ask(*args):
        raise AssertionError("loading must not ask whether code is trusted")

    monkeypatch.setattr(builtins, "input", ask)


# In a process with the package


@pytest.mark.parametrize("name", ["plain_folder", "code_folder"])
@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_own_classes_come_first(request, name, trust, never_asked):
    folder = str(request.getfixturevalue(name))
    assert type(AutoConfig.from_pretrained(folder, **trust)) is ChexConfig
    model = AutoModel.from_pretrained(folder, **trust)
    assert type(model) is ChexModel
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert type(processor) is ChexProcessor and processor.generator_tokenizer is not None
    for backend in (None, "pil", "torchvision"):
        image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend, **trust)
        assert type(image_processor) is ChexImageProcessor
    assert len(AutoTokenizer.from_pretrained(folder, **trust)) == model.config.text_config.vocab_size
    chex = pipeline("chest-xray-explanation", model=folder, device="cpu", **trust)
    assert (type(chex), type(chex.model), type(chex.processor)) == (ChexPipeline, ChexModel, ChexProcessor)


def test_sentence_generator_has_an_auto_class(loaded, tmp_path):
    generator = loaded[0].sentence_generator
    generator.save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is ChexSentenceGenerator


def test_code_is_all_that_is_added(loaded, tmp_path):
    model, processor = loaded
    before = model.config.to_dict(), processor.to_dict()
    save_with_code(model, processor, tmp_path / "code", max_shard_size="50KB")
    assert (model.config.to_dict(), processor.to_dict()) == before
    assert (tmp_path / "code" / "model.safetensors.index.json").is_file()
    model.save_pretrained(tmp_path / "plain")
    processor.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    for name in ("config.json", "processor_config.json"):
        plain = json.loads((tmp_path / "plain" / name).read_text(encoding="utf-8"))
        with_code = json.loads((tmp_path / "code" / name).read_text(encoding="utf-8"))
        assert with_code.pop("auto_map")
        if name == "config.json":
            assert list(with_code.pop("custom_pipelines")) == ["chest-xray-explanation"]
        else:
            assert with_code["image_processor"].pop("auto_map")
        assert with_code == plain


def test_code_of_a_folder_without_tokenizers(loaded, tmp_path):
    model, processor = loaded
    model.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    add_code(tmp_path, ChexModel, None, ChexImageProcessor)
    code = """
from transformers import AutoImageProcessor, AutoModel
for auto in (AutoModel, AutoImageProcessor):
    print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""
    run = run_without_package(code, tmp_path, str(tmp_path))
    assert run.stdout.split() == ["ChexModel", "ChexImageProcessor"], run.stderr


# In a process without it


def test_folder_with_code_needs_no_package(code_folder, loaded, tmp_path):
    image = str(save_image(tmp_path / "scan.png", gradient(90, 120)))
    again = [str(tmp_path / "again"), str(tmp_path / "once_more")]
    run = run_without_package(USE_FOLDER, tmp_path, json.dumps([PROMPTS, BOX, image, str(code_folder), *again]))
    assert run.returncode == 0, run.stderr
    model, processor = loaded
    inputs = processor(images=image, text=PROMPTS, boxes=[BOX])
    with torch.no_grad():
        outputs = model(**inputs)
    tensors = load_file(tmp_path / "again.safetensors")
    assert torch.equal(tensors.pop("sequences"), model.generate(**inputs))
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, outputs[name], rtol=0, atol=1e-6)
    result = json.loads(run.stdout.splitlines()[-1])
    chex = ChexPipeline(model=model, processor=processor, device="cpu")
    assert result == chex(image, prompts=PROMPTS, boxes=[BOX], threshold=0.2)
    assert all(answer["sentence"] for answer in result["answers"])
    # What that process has saved is at home here again.
    assert type(AutoModel.from_pretrained(again[0])) is ChexModel
    assert type(pipeline("chest-xray-explanation", model=again[0], device="cpu")) is ChexPipeline


def test_code_is_run_only_if_trusted(code_folder, tmp_path):
    code = "from transformers import AutoModel\nAutoModel.from_pretrained(sys.argv[1])"
    run = run_without_package(code, tmp_path, str(code_folder))
    assert run.returncode != 0 and "trust_remote_code=True" in run.stderr
    assert not (tmp_path / "modules" / "transformers_modules").exists()


def test_registering_by_hand_carries_the_code_too(plain_folder, tmp_path):
    """As in the documentation of Transformers; in a process of its own, because registering lasts."""
    code = """
import sys
from modeling_chex import ChexConfig, ChexModel
from processing_chex import ChexImageProcessor, ChexProcessor
for cls in (ChexConfig, ChexModel, ChexProcessor, ChexImageProcessor):
    cls.register_for_auto_class()
ChexModel.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
ChexProcessor.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
    folder = str(tmp_path / "model")
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(plain_folder), folder], check=True, cwd=root, timeout=300)
    code = """
from transformers import AutoModel, AutoProcessor
for auto in (AutoModel, AutoProcessor):
    print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)
"""
    run = run_without_package(code, tmp_path, folder)
    assert run.stdout.split() == ["ChexModel", "ChexProcessor"], run.stderr
