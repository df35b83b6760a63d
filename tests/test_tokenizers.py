"""Tokenizers learned from a corpus, and the recorded ids of the sentence tokenizer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer, GPT2Tokenizer

from training.build_tokenizers import build_tokenizers


GOLDEN = Path(__file__).parent / "golden"
SENTENCES = [
    "There is a small pleural effusion at the left base.",
    "No pneumothorax.",
    "The heart is enlarged.",
    "Consolidation in the right lower lung zone, likely pneumonia.",
] * 3


@pytest.fixture(scope="module")
def tokenizers():
    return build_tokenizers(SENTENCES, clip_vocab_size=580, generator_vocab_size=320, context_length=16)


def test_sizes_and_special_tokens(tokenizers):
    clip, generator = tokenizers
    assert len(clip) <= 580 and len(generator) <= 320
    assert max(clip.get_vocab().values()) == len(clip) - 1 == clip.eos_token_id == clip.pad_token_id
    assert sorted(clip.get_vocab().values()) == list(range(len(clip)))
    assert clip.bos_token_id == len(clip) - 2
    assert generator.bos_token_id == generator.eos_token_id == generator.pad_token_id == len(generator) - 1
    assert sorted(generator.get_vocab().values()) == list(range(len(generator)))


def test_clip_tokenizer_lower_cases_and_truncates_with_the_end_kept(tokenizers):
    clip, _ = tokenizers
    assert clip.model_max_length == 16
    assert clip("No PNEUMOTHORAX.")["input_ids"] == clip("no  pneumothorax .")["input_ids"]
    ids = clip("small pleural effusion " * 30, truncation=True)["input_ids"]
    assert len(ids) == 16
    assert ids[0] == clip.bos_token_id and ids[-1] == clip.eos_token_id
    padded = clip(["No pneumothorax.", "Heart"], padding=True)
    assert padded["input_ids"][1][-1] == clip.pad_token_id and padded["attention_mask"][1][-1] == 0


def test_any_text_can_be_encoded(tokenizers):
    clip, generator = tokenizers
    text = "Größe 5 cm, β-blocker 心臓 (unseen)!"
    assert generator.decode(generator(text)["input_ids"]) == text
    decoded = clip.decode(clip(text)["input_ids"], skip_special_tokens=True)
    assert decoded.replace(" ", "") == text.lower().replace(" ", "")
    assert generator("")["input_ids"] == []


def test_merges_shorten_known_text(tokenizers):
    clip, generator = tokenizers
    for tokenizer in (clip, generator):
        assert len(tokenizer.tokenize("small pleural effusion")) < len("small pleural effusion") / 2


def test_sentences_are_framed_by_the_special_token(tokenizers):
    _, generator = tokenizers
    text = f"{generator.bos_token}No pneumothorax.{generator.eos_token}"
    ids = generator(text)["input_ids"]
    assert ids[0] == ids[-1] == generator.eos_token_id
    assert generator.decode(ids, skip_special_tokens=True) == "No pneumothorax."


def test_order_of_the_texts_does_not_matter(tokenizers):
    again = build_tokenizers(SENTENCES[::-1], clip_vocab_size=580, generator_vocab_size=320, context_length=16)
    for first, second in zip(tokenizers, again, strict=True):
        assert first.get_vocab() == second.get_vocab()


def test_other_processes_learn_the_same(tokenizers):
    code = (
        "import json, sys; from training.build_tokenizers import build_tokenizers;"
        "clip, gpt = build_tokenizers(json.load(sys.stdin), 580, 320, 16);"
        "print(json.dumps([clip.get_vocab(), gpt.get_vocab()]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(SENTENCES),
        capture_output=True,
        text=True,
        check=True,
        cwd=GOLDEN.parents[1],
        timeout=120,
    )
    assert json.loads(run.stdout) == [tokenizer.get_vocab() for tokenizer in tokenizers]


def test_save_and_load(tokenizers, tmp_path):
    for name, tokenizer in zip(("clip", "gpt"), tokenizers, strict=True):
        tokenizer.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        for text in (*SENTENCES, "Unseen words!"):
            assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_too_small_a_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="514"):
        build_tokenizers(SENTENCES, clip_vocab_size=300)
    with pytest.raises(ValueError, match="257"):
        build_tokenizers(SENTENCES, generator_vocab_size=256)


def test_recorded_sentence_ids():
    tokenizer = GPT2Tokenizer(
        vocab=str(GOLDEN / "gpt_tokenizer" / "vocab.json"), merges=str(GOLDEN / "gpt_tokenizer" / "merges.txt")
    )
    golden = json.loads((GOLDEN / "golden.json").read_text(encoding="utf-8"))
    assert len(golden["gpt_tokenizer"]) >= 10
    for case in golden["gpt_tokenizer"]:
        assert tokenizer(case["text"])["input_ids"] == case["ids"], case["text"]
    assert tokenizer.eos_token_id == golden["lm_special"]["eos"]
