"""
Features of many texts: memory of a training process, time to encode and to open the cache, time to read batches.

    python benchmarks/text_features.py --texts 1000000 --encoder tiny
    python benchmarks/text_features.py --texts 2000 --encoder full

`tiny` has one narrow layer but the full 512 features, so that a million texts are encoded in minutes on a CPU; `full`
is the published prompt encoder with random weights, for its throughput. Memory is that of the process which no other
one can share (RssAnon), and the pages of files that it has mapped (RssFile).
"""

import argparse
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import set_seed

from modeling_chex import ChexConfig, ChexModel
from training.build_tokenizers import build_tokenizers
from training.text_features import TextFeatures, TokenTable


WORDS = (
    *("there", "is", "a", "small", "large", "moderate", "right", "left", "bilateral", "pleural", "effusion", "with"),
    *(
        "adjacent",
        "atelectasis",
        "no",
        "evidence",
        "of",
        "pneumothorax",
        "or",
        "focal",
        "consolidation",
        "heart",
        "size",
    ),
)


def sentences(count: int) -> Iterator[str]:
    """Distinct ones of 4 to 20 words."""
    draw = random.Random(0)
    for number in range(count):
        yield " ".join([*draw.choices(WORDS, k=draw.randint(3, 19)), str(number)])


def build_model(encoder: str, tokenizer) -> ChexModel:
    full = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return ChexModel(
        ChexConfig(
            vision_config=tiny | {"image_size": 32, "patch_size": 16},
            text_config=(full if encoder == "full" else tiny) | special | {"vocab_size": len(tokenizer)},
            detector_config={"num_layers": 1, "intermediate_size": 32},
            post_decoder_config=None,
            generator_config=None,
        )
    )


def memory() -> str:
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return ", ".join(f"{name} {int(status[name].split()[0]) / 1024:,.0f} MiB" for name in ("RssAnon", "RssFile"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=1_000_000)
    parser.add_argument("--encoder", choices=("tiny", "full"), default="tiny")
    parser.add_argument("--dtype", choices=("float32", "float16"), default="float32")
    parser.add_argument("--cache", type=Path, help="folder to keep; default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prompts, generator_tokenizer = build_tokenizers(list(sentences(2000)), context_length=77)
    set_seed(0)
    model = build_model(arguments.encoder, prompts)
    texts = list(sentences(arguments.texts))
    print(f"{len(texts):,} texts: {memory()}")
    with tempfile.TemporaryDirectory() as temporary:
        cache_dir = arguments.cache or Path(temporary)
        for attempt in ("encoded", "opened"):
            start = time.perf_counter()
            features = TextFeatures(model, prompts, cache_dir, arguments.dtype)
            fingerprint = time.perf_counter() - start
            table = features.table(texts)
            seconds = time.perf_counter() - start
            print(
                f"{attempt} in {seconds:.1f} s (fingerprint {fingerprint:.2f} s), {len(texts) / seconds:,.0f} "
                f"texts/s; {'on disk' if table.stored is not None else 'in memory'}: {memory()}"
            )
        start = time.perf_counter()
        tokens = TokenTable(generator_tokenizer, texts, max_length=128, start_and_end=True)
        print(f"{len(tokens.ids):,} tokens in {time.perf_counter() - start:.1f} s: {memory()}")
        numbers = torch.randint(len(texts), (50, 256, 5))
        start = time.perf_counter()
        for batch in numbers:
            table(batch)
        gathered = (time.perf_counter() - start) / len(numbers)
        start = time.perf_counter()
        for batch in numbers:
            tokens(batch.flatten()[:64])
        tokenised = (time.perf_counter() - start) / len(numbers)
        print(
            f"a batch of 256 x 5 texts: features {gathered * 1e3:.1f} ms; tokens of 64: {tokenised * 1e3:.2f} ms; "
            f"{memory()}"
        )


if __name__ == "__main__":
    main()
