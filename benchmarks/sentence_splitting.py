"""
How well the rules for sentences of reports agree with hand-made fragments, beside two naive rules, and their speed.

The rules were written with the development half of the fragments; the held-out half was not looked at. Exact: share of
fragments of which all sentences are right. F1: of the positions inside fragments at which a sentence ends.

Run from the repository root: `python benchmarks/sentence_splitting.py`.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from training.data.report_text import SentenceSplitter, split_sentences


FRAGMENTS = Path(__file__).parent.parent / "tests" / "data" / "sentence_fragments.jsonl"
HALVES = ("development", "held-out")


def load_fragments(path: Path = FRAGMENTS) -> list[dict]:
    """Fragments with `text`, its `sentences` (blanks and line breaks as one blank), `category` and `half`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def split_at_stop_and_blank(text: str) -> list[str]:
    """Naive: at each full stop with a blank."""
    return [part for part in text.split(". ") if part.strip()]


def split_by_regex(text: str) -> list[str]:
    """Naive: after each full stop, question or exclamation mark before white space and a capital, at blank lines."""
    return [part for part in re.split(r"(?<=[.?!])\s+(?=[A-Z])|\n\s*\n", text) if part.strip()]


SPLITTERS: dict[str, SentenceSplitter] = {
    "rules": split_sentences,
    '". "': split_at_stop_and_blank,
    "regex": split_by_regex,
}


def inner_ends(sentences: Iterable[str]) -> set[int]:
    """Ends of all sentences but the last, counted in characters other than white space and full stops."""
    ends, position = [], 0
    for sentence in sentences:
        position += len(re.sub(r"[\s.]", "", sentence))
        ends.append(position)
    # The naive rule drops full stops: they must not decide.
    return set(ends[:-1]) - {0, position}


def agreement(splitter: SentenceSplitter, fragments: Iterable[dict]) -> tuple[float, float, list[dict]]:
    """Share of fragments split exactly, F1 of the inner sentence ends, and the fragments that differ."""
    wrong, count, hits, found, expected = [], 0, 0, 0, 0
    for fragment in fragments:
        sentences = [" ".join(sentence.split()) for sentence in splitter(fragment["text"])]
        ends, gold = inner_ends(sentences), inner_ends(fragment["sentences"])
        hits, found, expected, count = hits + len(ends & gold), found + len(ends), expected + len(gold), count + 1
        if ends != gold or (not sentences) != (not fragment["sentences"]):
            wrong.append(fragment | {"found": sentences})
    return 1 - len(wrong) / count, 2 * hits / (found + expected), wrong


def megabytes_per_second(splitter: SentenceSplitter, fragments: list[dict], rounds: int = 3) -> float:
    """Text per second of processor time, best of several rounds."""
    texts = [fragment["text"] for fragment in fragments] * 5
    best = float("inf")
    for _ in range(rounds):
        start = time.process_time()
        for text in texts:
            splitter(text)
        best = min(best, time.process_time() - start)
    return sum(len(text.encode()) for text in texts) / best / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--errors", choices=HALVES, help="print the fragments of this half that the rules split wrongly"
    )
    arguments = parser.parse_args()
    fragments = load_fragments()
    halves = {half: [fragment for fragment in fragments if fragment["half"] == half] for half in HALVES}
    print(f"{'splitter':10s}" + "".join(f"{half} exact     F1   " for half in HALVES) + "MB/s")
    for name, splitter in SPLITTERS.items():
        scores = [agreement(splitter, halves[half])[:2] for half in HALVES]
        cells = "".join(
            f"{exact:{len(half) + 6}.3f}  {f1:5.3f}   " for half, (exact, f1) in zip(HALVES, scores, strict=True)
        )
        print(f"{name:10s}{cells}{megabytes_per_second(splitter, fragments):4.1f}")
    if arguments.errors:
        by_category = defaultdict(list)
        for fragment in agreement(split_sentences, halves[arguments.errors])[2]:
            by_category[fragment["category"]].append(fragment)
        for category, wrong in by_category.items():
            print(f"\n{category}")
            for fragment in wrong:
                print(f"  text     {fragment['text']!r}")
                print(f"  expected {fragment['sentences']}\n  found    {fragment['found']}")


if __name__ == "__main__":
    main()
