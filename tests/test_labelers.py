"""Labellers: loading by name, checks of their answers, CheXbert and the conversion of its published file."""

import re
import sys
import textwrap

import pytest
import torch
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from evaluation.labelers import CHEXPERT_CLASSES, CheckedLabeler, Labeler, LabelerUnavailable, load_labeler
from evaluation.labelers.chexbert import ChexbertConfig, ChexbertLabeler, ChexbertModel
from evaluation.labelers.chexbert_checkpoint import convert_chexbert, load_bert_tokenizer, published_shapes
from evaluation.metrics.unavailable import MetricUnavailable
from processing_chex.errors import ChexInputError
from processing_chex.vocabulary import PHANTOM_CLASSES
from space_app.convert_command import convert_app
from training.data.phantom_text import label_text


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "no", "edema", "heart", "is", "large", "effusion", ".", "##s"]
TINY = {"vocab_size": len(WORDS), "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY |= {"intermediate_size": 96, "max_position_embeddings": 40}
TEXTS = ["No edema.", "", "Heart is  large.\nEdema.", " ", "effusion " * 100, "effusions"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# -- loading and checks -----------------------------------------------------------------------------------------------


def test_the_phantom_labeller_is_the_exact_one():
    labeler = load_labeler("phantom")
    texts = ["Mild cardiomegaly.", "No pleural effusion.", ""]
    assert labeler(texts) == [label_text(text) for text in texts]
    assert labeler(texts)[0] == {"Cardiomegaly": 1}
    assert isinstance(labeler, Labeler)
    assert (labeler.name, labeler.classes) == ("phantom", tuple(PHANTOM_CLASSES))


PLUGIN = """
    calls = []

    class Reader:
        name, classes = "reader", ("Edema",)
        def __init__(self, device="nowhere"):
            self.device = device
        def __call__(self, texts):
            calls.append(list(texts))
            return [{"Edema": 1} if "edema" in text else {} for text in texts]

    ready = Reader("ready")

    def make():
        return Reader("made")

    def answers(result):
        reader = Reader()
        reader.__class__ = type("Other", (Reader,), {"__call__": lambda self, texts: result})
        return reader

    text = "edema"
    number = answers(7)
    too_few = answers([{}])
    not_dicts = answers(["Edema", "Edema"])
    unknown_class = answers([{"Fracture": 1}, {}])
    unknown_value = answers([{}, {"Edema": 2}])

    class NoClasses:
        name = "x"
        def __call__(self, texts):
            return []

    class TextClasses(NoClasses):
        classes = "Edema"

    class TwiceClasses(NoClasses):
        classes = ("Edema", "Edema")
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "own_labels.py").write_text(textwrap.dedent(PLUGIN), encoding="utf-8")
    (tmp_path / "broken_labels.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_labels"
    sys.modules.pop("own_labels", None)


def test_plugins_as_object_class_and_function(plugin):
    for attribute, device in (("ready", "ready"), ("Reader", "cuda:3"), ("make", "made")):
        labeler = load_labeler(f"{plugin}:{attribute}", device="cuda:3")
        assert labeler.labeler.device == device
        assert labeler(["edema", "none"]) == [{"Edema": 1}, {}]


def test_equal_texts_are_labelled_once(plugin):
    labeler = load_labeler(f"{plugin}:ready")
    assert labeler(["edema", "a", "edema"]) == [{"Edema": 1}, {}, {"Edema": 1}]
    first = labeler(["edema"])[0]
    first.clear()  # answers are copies
    assert labeler(["b", "edema"]) == [{}, {"Edema": 1}]
    assert sys.modules[plugin].calls == [["edema", "a"], ["b"]]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("other", "no labeller 'other'; known are \"phantom\""),
        ("no_such_module.x:y", "there is no module 'no_such_module'"),
        ("own_labels.inner:y", "there is no module 'own_labels.inner'"),
        ("broken_labels:y", "importing broken_labels failed: No module named 'no_such_package'"),
        ("own_labels:y", "own_labels has no attribute 'y'"),
        ("own_labels:text", "str lacks name, classes, __call__"),
        ("own_labels:answers", "it needs: result"),
        ("own_labels:NoClasses", "NoClasses lacks classes"),
        ("own_labels:TextClasses", "its `classes` are 'Edema', not a sequence"),
        ("own_labels:TwiceClasses", "some occur twice"),
    ],
)
def test_what_is_no_labeller(plugin, spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_labeler(spec)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("number", "returned a int; expected a list"),
        ("too_few", "returned 1 results for 2 texts"),
        ("not_dicts", "returned a str for 'a'"),
        ("unknown_class", "'reader' reports 'Fracture' for 'a', which is not one of its classes: Edema"),
        ("unknown_value", "gives Edema the value 2 for 'b'"),
    ],
)
def test_wrong_answers_of_a_labeller(plugin, attribute, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_labeler(f"{plugin}:{attribute}")(["a", "b"])


def test_a_labeller_takes_a_list_of_texts():
    labeler = load_labeler("phantom")
    with pytest.raises(ValueError, match="a list of texts, not a single text"):
        labeler("Edema.")
    with pytest.raises(ValueError, match=re.escape("`texts[1]` is a NoneType")):
        labeler(["Edema.", None])


# -- CheXbert ---------------------------------------------------------------------------------------------------------


def published(config, module="module.", seed=0):
    """A random file as published: BERT and its pooler, heads, and what the training saved beside."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        f"{module}{name}": torch.randn(shape, generator=generator) * 0.2
        for name, shape in published_shapes(config).items()
    }
    state[f"{module}bert.embeddings.position_ids"] = torch.arange(config.max_position_embeddings)[None]
    return {"epoch": 3, "model_state_dict": state, "optimizer_state_dict": {"state": {}, "param_groups": [{"lr": 1}]}}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Checkpoint, folder."""
    folder = tmp_path_factory.mktemp("chexbert")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    checkpoint = published(ChexbertConfig(**TINY))
    # The published file has the format of before PyTorch 1.6.
    torch.save(checkpoint, folder / "chexbert.pth", _use_new_zipfile_serialization=False)
    result = convert_chexbert(folder / "chexbert.pth", folder / "out", str(folder / "vocab.txt"))
    assert result.output == folder / "out"
    return checkpoint, folder


def reference_forward(checkpoint, input_ids, mask):
    """The published architecture written anew: BertModel, last hidden state of [CLS], 14 linear maps."""
    state = {key.removeprefix("module."): value for key, value in checkpoint["model_state_dict"].items()}
    bert = BertModel(BertConfig(**TINY)).eval()
    own = {key.removeprefix("bert."): value for key, value in state.items() if key.startswith("bert.")}
    own.pop("embeddings.position_ids")
    bert.load_state_dict(own)
    with torch.no_grad():
        feature = bert(input_ids, attention_mask=mask)[0][:, 0]
        return [
            torch.nn.functional.linear(
                feature, state[f"linear_heads.{head}.weight"], state[f"linear_heads.{head}.bias"]
            )
            for head in range(14)
        ]


def test_the_converted_model_computes_what_the_published_one_does(converted):
    checkpoint, folder = converted
    model = ChexbertModel.from_pretrained(folder / "out").eval()
    input_ids = torch.randint(5, len(WORDS), (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(input_ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        logits = model(input_ids, mask).logits
    assert [tuple(head.shape) for head in logits] == [(3, 4)] * 13 + [(3, 2)]
    for ours, reference in zip(logits, reference_forward(checkpoint, input_ids, mask), strict=True):
        assert torch.equal(ours, reference)


def test_labels_are_those_of_each_text_alone(converted):
    checkpoint, folder = converted
    labeler = load_labeler(f"chexbert:{folder / 'out'}", batch_size=2)
    tokenizer = load_bert_tokenizer(str(folder / "vocab.txt"), len(WORDS))
    for text, labels in zip(TEXTS, labeler(TEXTS), strict=True):
        if not text.strip():
            assert labels == {"No Finding": 1}
            continue
        tokens = tokenizer.tokenize(" ".join(text.lower().split()))
        ids = tokenizer.convert_tokens_to_ids(["[CLS]", *tokens[: TINY["max_position_embeddings"] - 2], "[SEP]"])
        heads = reference_forward(checkpoint, torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long))
        meaning = {1: 1, 2: 0, 3: -1}  # positive, negative, uncertain; 0 is blank
        answers = [int(head.argmax()) for head in heads]
        expected = {name: meaning[answer] for name, answer in zip(CHEXPERT_CLASSES, answers, strict=True) if answer}
        assert labels == expected
    assert labeler.classes == CHEXPERT_CLASSES
    assert len({str(labels) for labels in labeler(TEXTS)}) > 2


def test_tokens_are_lower_cased_word_pieces_cut_at_the_end(converted):
    _, folder = converted
    labeler = load_labeler(f"chexbert:{folder / 'out'}").labeler
    seen = []
    labeler.model.register_forward_pre_hook(lambda module, args: seen.append(args))
    labeler(["Heart is  LARGE.\n Effusions", "edema " * 99])
    input_ids, mask = seen[0]
    tokens = [labeler.tokenizer.convert_ids_to_tokens(row) for row in input_ids.tolist()]
    assert tokens[0] == ["[CLS]", *["edema"] * 38, "[SEP]"]  # longest first, 40 positions
    assert tokens[1][:8] == ["[CLS]", "heart", "is", "large", ".", "effusion", "##s", "[SEP]"]
    assert set(tokens[1][8:]) == {"[PAD]"}
    assert mask.sum(1).tolist() == [40, 8]


def test_default_sizes_are_those_of_the_published_file():
    shapes = published_shapes(ChexbertConfig())
    expected = {
        "bert.embeddings.word_embeddings.weight": (30522, 768),
        "bert.embeddings.position_embeddings.weight": (512, 768),
        "bert.embeddings.token_type_embeddings.weight": (2, 768),
        "bert.embeddings.LayerNorm.weight": (768,),
        "bert.embeddings.LayerNorm.bias": (768,),
        "bert.pooler.dense.weight": (768, 768),
        "bert.pooler.dense.bias": (768,),
    }
    square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    for layer in range(12):
        prefix = f"bert.encoder.layer.{layer}"
        for name in square:
            expected |= {f"{prefix}.{name}.weight": (768, 768), f"{prefix}.{name}.bias": (768,)}
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            expected |= {f"{prefix}.{name}.weight": (768,), f"{prefix}.{name}.bias": (768,)}
        expected |= {f"{prefix}.intermediate.dense.weight": (3072, 768), f"{prefix}.intermediate.dense.bias": (3072,)}
        expected |= {f"{prefix}.output.dense.weight": (768, 3072), f"{prefix}.output.dense.bias": (768,)}
    for head in range(14):
        classes = 4 if head < 13 else 2
        expected |= {f"linear_heads.{head}.weight": (classes, 768), f"linear_heads.{head}.bias": (classes,)}
    assert shapes == expected
    assert CHEXPERT_CLASSES[13] == "No Finding"
    assert CHEXPERT_CLASSES[:2] == ("Enlarged Cardiomediastinum", "Cardiomegaly")


def save(folder, change, module="module."):
    checkpoint = published(ChexbertConfig(**TINY), module)
    checkpoint = change(checkpoint["model_state_dict"]) or checkpoint
    torch.save(checkpoint, folder / "changed.pth")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder / "changed.pth", folder / "out", str(folder / "vocab.txt")


def test_a_file_without_prefix_pooler_and_training_state(converted, tmp_path):
    def change(state):
        return {key: value for key, value in state.items() if "pooler" not in key and "position_ids" not in key}

    convert_chexbert(*save(tmp_path, change, module=""))
    ours, other = (ChexbertModel.from_pretrained(folder / "out") for folder in (tmp_path, converted[1]))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), other.parameters(), strict=True))


def test_every_key_that_does_not_fit_is_listed(tmp_path):
    def change(state):
        del state["module.linear_heads.3.bias"]
        state["module.bert.extra.weight"] = torch.zeros(2)
        state["module.linear_heads.5.weight"] = torch.zeros(3, 128)
        state["module.linear_heads.6.weight"] = torch.full((4, 128), float("nan"))
        state["module.linear_heads.7.bias"] = torch.zeros(4, dtype=torch.long)

    with pytest.raises(ChexInputError) as raised:
        convert_chexbert(*save(tmp_path, change))
    for part in (
        "1 unknown: bert.extra.weight",
        "1 missing: linear_heads.3.bias",
        "linear_heads.5.weight is (3, 128) instead of (4, 128)",
        "1 without floating-point numbers: linear_heads.7.bias",
        "infinite or not a number: linear_heads.6.weight",
    ):
        assert part in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["changed.pth", "vocab.txt"]  # nothing is left


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code of the checkpoint ran')",)


def test_unusable_files(tmp_path):
    _, out, vocabulary = save(tmp_path, lambda state: None)
    with pytest.raises(ChexInputError, match="There is no file"):
        convert_chexbert(tmp_path / "none.pth", out, vocabulary)
    torch.save({"model_state_dict": {"fc.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(ChexInputError, match="no BERT with 14 linear heads .its keys start with fc.weight"):
        convert_chexbert(tmp_path / "other.pth", out, vocabulary)
    for new_format in (False, True):
        torch.save({"model_state_dict": Evil()}, tmp_path / "evil.pth", _use_new_zipfile_serialization=new_format)
        with pytest.raises(ChexInputError, match="was refused"):
            convert_chexbert(tmp_path / "evil.pth", out, vocabulary)
    assert not out.exists()


def test_unusable_tokenizers(tmp_path):
    source, out, _ = save(tmp_path, lambda state: None)
    (tmp_path / "short.txt").write_text("\n".join(WORDS[:-1]) + "\n", encoding="utf-8")
    with pytest.raises(ChexInputError, match=f"12 tokens, but the checkpoint {len(WORDS)}"):
        convert_chexbert(source, out, str(tmp_path / "short.txt"))
    (tmp_path / "empty").mkdir()
    for missing in (str(tmp_path / "empty"), "no/such-tokenizer"):
        with pytest.raises(ChexInputError, match="There is no BERT tokenizer at"):
            convert_chexbert(source, out, missing)


def test_the_command(tmp_path):
    source, out, vocabulary = save(tmp_path, lambda state: None)
    arguments = ["chexbert", str(source), str(out), "--tokenizer", vocabulary]
    result = CliRunner().invoke(convert_app, arguments)
    assert result.exit_code == 0, result.output
    assert f"chex evaluate --labeler chexbert:{out}" in result.output
    again = CliRunner().invoke(convert_app, arguments)
    assert again.exit_code != 0
    assert "is there already" in again.output
    assert CliRunner().invoke(convert_app, [*arguments, "--overwrite"]).exit_code == 0
    (out / "config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    result = CliRunner().invoke(convert_app, [*arguments, "--overwrite"])
    assert "no CheXbert, so it is not replaced" in result.output


def test_absent_weights_say_what_is_needed(tmp_path, converted):
    for spec in ("chexbert", "chexbert:", f"chexbert:{tmp_path / 'none'}", f"chexbert:{tmp_path}"):
        with pytest.raises(LabelerUnavailable) as raised:
            load_labeler(spec)
        assert isinstance(raised.value, MetricUnavailable)
        for part in ("stanfordmlgroup/CheXbert", "chex convert chexbert chexbert.pth FOLDER"):
            assert part in str(raised.value)


def test_incomplete_folders(tmp_path, converted):
    model = ChexbertModel.from_pretrained(converted[1] / "out")
    model.save_pretrained(tmp_path)
    with pytest.raises(LabelerUnavailable, match="tokenizer"):
        ChexbertLabeler.from_folder(tmp_path)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "linear_heads.2.bias"}
    model.save_pretrained(tmp_path, state_dict=tensors)
    load_bert_tokenizer(str(converted[1] / "vocab.txt"), len(WORDS)).save_pretrained(tmp_path)
    with pytest.raises(LabelerUnavailable, match="not those of a CheXbert: linear_heads.2.bias"):
        load_labeler(f"chexbert:{tmp_path}")
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(LabelerUnavailable, match="cannot be loaded"):
        load_labeler(f"chexbert:{tmp_path}")


def test_checked_labeler_wraps_any_labeller():
    class Reader:
        name, classes = "reader", ["Edema"]

        def __call__(self, texts):
            return [{"Edema": -1} for _ in texts]

    labeler = CheckedLabeler(Reader())
    assert labeler(text for text in ("a", "b")) == [{"Edema": -1}] * 2
    assert labeler.classes == ("Edema",)
