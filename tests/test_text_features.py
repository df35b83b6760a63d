"""The cache of text features on disk, and the tables that training reads texts from."""

import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import set_seed

import training.text_features as text_features
from modeling_chex import ChexConfig, ChexModel
from training.build_tokenizers import build_tokenizers
from training.text_features import ENTRY, FeatureTable, TextFeatures, TokenTable, encode_texts, encoder_fingerprint


ROOT = Path(__file__).parent.parent
WORDS = ("no", "small", "large", "right", "left", "lower", "upper", "lung", "effusion", "opacity", "heart", "normal")
TEXTS = [" ".join(random.Random(number).choices(WORDS, k=1 + number % 12)) + f" {number}" for number in range(60)]


def build(seed: int = 0, width: int = 32):
    """A small prompt encoder and both tokenizers."""
    prompts, sentences = build_tokenizers(TEXTS, 600, 600, context_length=32)
    set_seed(seed)
    encoder = {"hidden_size": width, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ChexConfig(
        projection_dim=width,
        vision_config=encoder | {"image_size": 32, "patch_size": 16, "projection_dim": width},
        text_config=encoder
        | {"max_position_embeddings": 32, "projection_dim": width, "vocab_size": len(prompts)}
        | {f"{name}_token_id": getattr(prompts, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        detector_config={"num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
        post_decoder_config=None,
        generator_config=None,
    )
    return ChexModel(config).eval(), prompts, sentences


@pytest.fixture(scope="module")
def parts():
    return build()


@pytest.fixture
def encoded(monkeypatch):
    """The texts that the encoder is called with, in order."""
    calls, encode = [], text_features.encode_texts

    def counted(model, tokenizer, texts, *args):
        calls.extend(texts)
        return encode(model, tokenizer, texts, *args)

    monkeypatch.setattr(text_features, "encode_texts", counted)
    return calls


def one_by_one(parts, texts):
    model, tokenizer, _ = parts
    with torch.no_grad():
        ids = [tokenizer(text, truncation=True, return_tensors="pt")["input_ids"] for text in texts]
        return torch.cat([model.get_prompt_features(row) for row in ids])


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- encoding


def test_features_are_those_of_each_text_alone(parts):
    model, tokenizer, _ = parts
    model.train()
    close(encode_texts(model, tokenizer, TEXTS, batch_size=7), one_by_one(parts, TEXTS))
    assert model.text_model.training and model.training
    model.eval()
    assert encode_texts(model, tokenizer, []).shape == (0, 32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_text_is_encoded_once(parts, tmp_path, encoded, dtype):
    model, tokenizer, _ = parts
    expected = one_by_one(parts, TEXTS)

    def cache():  # each a run of its own
        return TextFeatures(model, tokenizer, tmp_path, dtype)

    first = cache().encode(TEXTS[:20] + TEXTS[:5])
    assert sorted(encoded) == sorted(TEXTS[:20])
    second = cache().encode(TEXTS[10:40])
    assert sorted(encoded) == sorted(TEXTS[:40])
    again = cache().encode(TEXTS[:40])
    assert len(encoded) == 40
    assert torch.equal(first, torch.cat([again[:20], again[:5]]))
    assert torch.equal(second, again[10:])
    if dtype == "float32":
        close(again, expected[:40])
    else:
        assert torch.equal(again, again.half().float()) and not torch.equal(again, expected[:40])
        torch.testing.assert_close(again, expected[:40], rtol=1e-3, atol=1e-3)
    (folder,) = tmp_path.iterdir()
    assert (folder / "features.bin").stat().st_size == 40 * 32 * np.dtype(dtype).itemsize


def test_without_a_folder_nothing_is_kept(parts, tmp_path, encoded, monkeypatch):
    monkeypatch.chdir(tmp_path)
    features = TextFeatures(parts[0], parts[1])
    for _ in range(2):
        close(features.encode(TEXTS[:4]), one_by_one(parts, TEXTS[:4]))
    assert len(encoded) == 8
    assert list(tmp_path.iterdir()) == []


# --- what the cache belongs to


def test_the_fingerprint_is_of_encoder_tokenizer_and_precision(parts):
    model, tokenizer, _ = parts
    mine = encoder_fingerprint(model, tokenizer)
    tokenizer(TEXTS[:2], padding=True, truncation=True)  # leaves its marks in the tokenizer
    again, other_tokenizer, _ = build()
    assert mine == encoder_fingerprint(model, tokenizer) == encoder_fingerprint(again, other_tokenizer)

    def changed(change):
        other, prompts, _ = build()
        change(other, prompts)
        return encoder_fingerprint(other, prompts)

    def weight(other, prompts):
        with torch.no_grad():
            other.text_model.encoder.layers[1].mlp.fc1.bias[3] += 1e-6

    def projection(other, prompts):
        with torch.no_grad():
            other.text_projection.weight[0, 0] += 1e-6

    def activation(other, prompts):
        other.config.text_config.hidden_act = "gelu"

    different = {
        changed(weight),
        changed(projection),
        changed(activation),
        changed(lambda other, prompts: other.bfloat16()),
        changed(lambda other, prompts: prompts.add_tokens(["cardiomegaly"])),
        changed(lambda other, prompts: setattr(prompts, "model_max_length", 8)),
        mine,
    }
    assert len(different) == 7

    def detector(other, prompts):
        for part in (other.detector, other.vision_model):
            torch.nn.init.zeros_(next(part.parameters()))

    assert changed(detector) == mine, "the other parts do not matter"


def test_another_encoder_has_features_of_its_own(parts, tmp_path, encoded):
    other = build(seed=1)
    mine, theirs = (TextFeatures(*each[:2], tmp_path).encode(TEXTS[:3]) for each in (parts, other))
    assert len(encoded) == 6
    close(theirs, one_by_one(other, TEXTS[:3]))
    assert not torch.allclose(mine, theirs, atol=1e-2)


# --- damage


def damaged(path, change):
    content = bytearray(path.read_bytes())
    path.write_bytes(change(content))


def flipped(place):
    def change(content):
        content[place] ^= 0x40
        return content

    return change


@pytest.mark.parametrize(
    ("file", "change", "lost", "told"),
    [
        ("features.bin", flipped(128 * 7 + 3), 1, "1 features are damaged"),
        ("features.bin", lambda content: content[: 128 * 15 + 60], 5, "5 features are damaged"),
        ("features.bin", lambda content: b"", 20, "20 features are damaged"),
        ("index.bin", flipped(20 * 4 + 18), 1, "1 features are damaged"),
        ("index.bin", flipped(20 * 4 + 2), 1, ""),
        ("index.bin", lambda content: content[: 20 * 12 + 7], 8, "8 features without an index"),
        ("index.bin", lambda content: b"\xff" * 33, 20, "19 features without an index"),
    ],
)
def test_damage_is_repaired(parts, tmp_path, encoded, caplog, file, change, lost, told):
    """Bytes that changed, files that were cut off: what is left is used, the rest encoded again."""
    model, tokenizer, _ = parts
    expected = TextFeatures(model, tokenizer, tmp_path).encode(TEXTS[:20])
    (folder,) = tmp_path.iterdir()
    damaged(folder / file, change)
    encoded.clear()
    close(TextFeatures(model, tokenizer, tmp_path).encode(TEXTS[:20]), expected)
    assert len(encoded) == lost
    assert told in caplog.text
    caplog.clear()
    features = TextFeatures(model, tokenizer, tmp_path)
    close(features.encode(TEXTS[:25]), torch.cat([expected, one_by_one(parts, TEXTS[20:25])]))
    assert len(encoded) == lost + 5
    assert caplog.text == ""


@pytest.mark.parametrize("file", ["features.bin", "index.bin"])
def test_a_file_that_is_gone(parts, tmp_path, encoded, file):
    model, tokenizer, _ = parts
    expected = TextFeatures(model, tokenizer, tmp_path).encode(TEXTS[:20])
    (folder,) = tmp_path.iterdir()
    (folder / file).unlink()
    encoded.clear()
    for _ in range(2):
        close(TextFeatures(model, tokenizer, tmp_path).encode(TEXTS[:20]), expected)
    assert len(encoded) == 20


def test_rows_in_use_never_change(parts, tmp_path):
    """Also when another run repairs what it finds damaged in the index."""
    model, tokenizer, _ = parts
    cache = TextFeatures(model, tokenizer, tmp_path)
    rows, places = cache._look_up(TEXTS[:20])
    expected = np.array(rows[places])
    (folder,) = tmp_path.iterdir()
    damaged(folder / "index.bin", lambda content: content[: 20 * 3 + 1])
    cache.encode(TEXTS)
    assert np.array_equal(rows[places], expected)
    close(cache.encode(TEXTS), one_by_one(parts, TEXTS))


def test_a_cache_that_cannot_be_written(parts, tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot be kept in .*file.*set data.cache_dir to another folder"):
        TextFeatures(parts[0], parts[1], tmp_path / "file").encode(TEXTS[:2])


# --- several processes

WRITER = """
import sys, time
sys.path.insert(0, sys.argv[4])
import torch
torch.set_num_threads(1)
import training.text_features as text_features
from tests.test_text_features import TEXTS, build
model, tokenizer, _ = build()
text_features.CHUNK = 3
encode = text_features.encode_texts
def slow(model, tokenizer, texts, *args):
    for text in texts:
        print(text, flush=True)
    time.sleep(float(sys.argv[3]))
    return encode(model, tokenizer, texts, *args)
text_features.encode_texts = slow
start, end = map(int, sys.argv[2].split(":"))
text_features.TextFeatures(model, tokenizer, sys.argv[1]).encode(TEXTS[start:end])
"""


def writer(folder, texts, seconds):
    command = [sys.executable, "-c", WRITER, str(folder), texts, str(seconds), str(ROOT)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_processes_at_once(parts, tmp_path, encoded):
    """Two runs with overlapping texts: none is encoded twice, and all features are right."""
    processes = [writer(tmp_path, texts, 0.05) for texts in ("0:40", "20:60")]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    written = [text for output, _ in results for text in output.splitlines()]
    assert sorted(written) == sorted(TEXTS)
    close(TextFeatures(parts[0], parts[1], tmp_path).encode(TEXTS), one_by_one(parts, TEXTS))
    assert encoded == []


def test_a_killed_process_leaves_what_it_has_encoded(parts, tmp_path, encoded, caplog):
    process = writer(tmp_path, "0:60", 0.1)
    for _ in range(10):  # two or three chunks
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    close(TextFeatures(parts[0], parts[1], tmp_path).encode(TEXTS), one_by_one(parts, TEXTS))
    assert 45 < len(encoded) < 60
    assert "Waiting" not in caplog.text, "the lock has died with its holder"


def test_appending_is_killed_at_any_instant(parts, tmp_path, encoded, monkeypatch):
    """After each of its writes, and within them."""
    model, tokenizer, _ = parts
    TextFeatures(model, tokenizer, tmp_path / "start").encode(TEXTS[:5])
    expected = one_by_one(parts, TEXTS[:20])
    (folder,) = (tmp_path / "start").iterdir()
    TextFeatures(model, tokenizer, tmp_path / "end").encode(TEXTS[:5])
    TextFeatures(model, tokenizer, tmp_path / "end").encode(TEXTS[:20])
    features, index = ((tmp_path / "end" / folder.name / name).read_bytes() for name in ("features.bin", "index.bin"))
    states = [(size, 5 * ENTRY.itemsize) for size in range(5 * 128, 20 * 128 + 1, 331)]
    states += [(20 * 128, size) for size in range(5 * ENTRY.itemsize, 20 * ENTRY.itemsize, 37)]
    for number, (written, entries) in enumerate(states):
        state = tmp_path / str(number)
        shutil.copytree(tmp_path / "start", state)
        (state / folder.name / "features.bin").write_bytes(features[:written])
        (state / folder.name / "index.bin").write_bytes(index[:entries])
        encoded.clear()
        close(TextFeatures(model, tokenizer, state).encode(TEXTS[:20]), expected)
        assert len(encoded) == 20 - entries // ENTRY.itemsize
        encoded.clear()
        close(TextFeatures(model, tokenizer, state).encode(TEXTS[:20]), expected)
        assert encoded == []


# --- tables


def test_large_tables_stay_on_disk(parts, tmp_path, monkeypatch):
    model, tokenizer, _ = parts
    numbers = torch.tensor([[3, -1, 3], [59, 0, -1]])
    cache = TextFeatures(model, tokenizer, tmp_path)
    small = cache.table(TEXTS)
    monkeypatch.setattr(text_features, "DEVICE_BYTES", 1000)
    large = cache.table(TEXTS)
    assert [name for name, _ in small.named_buffers()] == ["features"]
    assert list(large.named_buffers()) == [] and isinstance(large.stored.base, np.memmap)
    assert small.state_dict() == large.state_dict() == {}
    expected = one_by_one(parts, TEXTS)[numbers.clamp_min(0)] * (numbers >= 0)[..., None]
    for table in (small, large):
        found = table(numbers)
        assert found.dtype == torch.float32
        close(found, expected)
        assert table(numbers[:, :0]).shape == (2, 0, 32)
        assert table(torch.full((2, 3), -1)).tolist() == torch.zeros(2, 3, 32).tolist()


def test_a_table_of_nothing():
    table = FeatureTable(torch.zeros(0, 8))
    assert table(torch.full((2, 1), -1)).tolist() == torch.zeros(2, 1, 8).tolist()


@pytest.mark.parametrize("start_and_end", [False, True])
def test_tokens_are_those_of_the_tokenizer(parts, monkeypatch, start_and_end):
    _, prompts, sentences = parts
    tokenizer = sentences if start_and_end else prompts
    monkeypatch.setattr(text_features, "CHUNK", 7)
    table = TokenTable(tokenizer, TEXTS, max_length=9, start_and_end=start_and_end)
    for numbers in ([5], [0, 59, 12, 12], list(range(60))):
        texts = [TEXTS[number] for number in numbers]
        if start_and_end:
            texts = [f"{tokenizer.bos_token}{text}{tokenizer.eos_token}" for text in texts]
        expected = tokenizer(
            texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=9,
            add_special_tokens=not start_and_end,
            return_tensors="pt",
        )
        ids, mask = table(torch.tensor(numbers))
        assert torch.equal(ids, expected["input_ids"]) and ids.dtype == torch.int64
        assert torch.equal(mask, expected["attention_mask"])


def test_tokens_take_the_room_of_their_texts(parts):
    """One long text among many does not make all of them long."""
    texts = TEXTS + [" ".join(WORDS * 20)]
    table = TokenTable(parts[2], texts, max_length=500, start_and_end=True)
    assert table.lengths[-1] > 10 * table.lengths[:-1].float().mean()
    assert len(table.ids) == table.lengths.sum()
    assert table(torch.tensor([0]))[0].shape[1] == table.lengths[0]
    assert len(TokenTable(parts[2], [], max_length=5).ids) == 0
