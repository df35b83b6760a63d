"""Metrics of texts: hand-worked examples, agreement with pycocoevalcap, sacrebleu and rouge-score, bootstrap, Java."""

import importlib.util
import json
import os
import shutil
import stat
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.bootstrap import Statistic, bootstrap, point_estimate
from evaluation.metrics.bleu.bleu import BleuStatistic, bleu
from evaluation.metrics.cider.cider import CiderStatistic, DocumentFrequencies, cider
from evaluation.metrics.meteor.meteor import (
    MeteorError,
    MeteorProgram,
    MeteorStatistic,
    find_jar,
    find_java,
    meteor,
    meteor_by_normality,
    meteor_ratio,
    meteor_score,
    meteor_statistics,
    summable,
)
from evaluation.metrics.rouge_l.rouge_l import RougeLStatistic, lcs_length, rouge_l
from evaluation.metrics.text_preparation import prepare_pairs, prepare_text
from evaluation.metrics.unavailable import MetricUnavailable


METRICS = Path(__file__).parents[1] / "evaluation" / "metrics"
TEXT = (
    "The lungs are clear without focal consolidation , pleural effusion or pneumothorax . Heart size is normal mild "
    "cardiomegaly unchanged bibasilar atelectasis right left small moderate increased interstitial edema oedème ≥5mm"
)
WORDS = TEXT.split()

# The METEOR program's answers to SCORE for these pairs (candidate, reference), and to EVAL for all seven and for the
# first one three times: scores of the pairs, then of the set.
RECORDED_PAIRS = [
    ("The heart is normal .", "The heart is normal ."),
    ("", "No pleural effusion ."),
    ("Pneumothorax", "Cardiomegaly is present ."),
    ("Mild cardiomegaly with pulmonary oedemas .", "There is mild cardiac enlargement and pulmonary edema ."),
    ("Effusions effusion effusion the the the right", "Small right pleural effusion in the right lung"),
    (
        "The lungs are clear without focal opacity . No effusion .",
        "Lungs are clear . There is no focal consolidation , pleural effusion or pneumothorax .",
    ),
    ("Naïve café — ≥ 5 mm nodule", "A naive nodule measuring 5 mm or more"),
]
RECORDED_STATISTICS = """\
5.0 5.0 3.0 3.0 2.0 2.0 3.0 3.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 1.0 5.0 5.0
0.0 4.0 0.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
1.0 4.0 0.0 2.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
6.0 9.0 2.0 4.0 2.0 2.0 1.0 1.0 0.0 0.0 0.0 0.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 2.0 4.0 4.0
7.0 8.0 3.0 2.0 2.0 2.0 1.0 1.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 2.0 3.0 3.0
11.0 15.0 5.0 8.0 4.0 4.0 4.0 4.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 6.0 8.0 8.0
7.0 8.0 1.0 3.0 3.0 3.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 2.0 3.0 3.0"""
RECORDED_SCORES = [1.0, 0.0, 0.0, 0.24603259304163622, 0.16244918294944122, 0.24685978261811184, 0.2215216131128744]
RECORDED_SET_SCORE = 0.22331005978995902
RECORDED_REPEATED_SCORE = 1.0


def random_text(rng, longest=25):
    return " ".join(rng.choice(WORDS, size=rng.integers(1, longest + 1)))


def random_pairs(seed, number=40, num_references=1):
    """Candidates that share words and passages with their references; empty, one-word, repeated and equal ones too."""
    rng = np.random.default_rng(seed)
    references = [[random_text(rng) for _ in range(num_references)] for _ in range(number)]
    candidates = []
    for index, (reference, *_) in enumerate(references):
        words = reference.split()
        changed = [word if rng.random() < 0.7 else str(rng.choice(WORDS)) for word in words]
        special = {0: "", 1: reference, 2: "effusion", 3: "the the the the the"}
        candidates.append(special.get(index, " ".join(changed[: rng.integers(1, len(changed) + 1)])))
    return candidates, references


def recorded_statistics():
    return np.array([line.split() for line in RECORDED_STATISTICS.splitlines()], dtype=np.float64)


def count_words(candidates, references):
    """Stands in for the METEOR program: counts of equal words, each matched word a chunk of its own."""
    rows = []
    for candidate, texts in zip(candidates, references, strict=True):
        first, second = candidate.split(), texts[0].split()
        common = len(set(first) & set(second))
        row = np.zeros(23)
        row[[0, 1, 4, 5, 20, 21, 22]] = len(first), len(second), common, common, common, common, common
        rows.append(row)
    return np.array(rows).reshape(-1, 23)


# -- preparation ------------------------------------------------------------------------------------------------------


def test_prepared_text():
    assert (
        prepare_text("Heart is normal.\n\tNo effusion..  Size 1.5 cm. ")
        == "Heart is normal . No effusion . . Size 1 .5 cm ."
    )
    assert prepare_text("Clear Lungs.", lowercase=True) == "clear lungs ."
    assert prepare_text(" \u00a0\r\n") == ""


def test_pairs_without_reference_are_dropped_and_counted():
    pairs = prepare_pairs(["a.", "b", "c", ""], ["x", " \n", ["", "y."], "z"], units=[0, 0, 2, 2], num_units=5)
    assert pairs.candidates == ["a .", "c", ""]
    assert pairs.references == [["x"], ["y ."], ["z"]]
    assert (pairs.units.tolist(), pairs.kept.tolist(), pairs.num_units, pairs.dropped) == ([0, 2, 2], [0, 2, 3], 5, 1)
    assert [members.tolist() for members in pairs.members()] == [[0], [], [1, 2], [], []]
    result = bleu(["a", "b"], ["a", ""])
    assert (result["count"], result["dropped"], result["bleu1"]) == (1, 1, pytest.approx(1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["a"], []), "1 candidates for 0 references"),
        ((["a", None], ["x", "y"]), r"`candidates\[1\]` is a NoneType"),
        ((["a", "b"], ["x", float("nan")]), r"`references\[1\]` is neither"),
        ((["a", "b"], ["x", ["y", 3]]), r"`references\[1\]` is neither"),
        ((["a", "b"], ["x", "y"], [0]), r"shape \(1,\) for 2 pairs"),
        ((["a", "b"], ["x", "y"], [0, -1]), r"`units\[1\]` is -1"),
        ((["a", "b"], ["x", "y"], [0.0, 1.0]), "float64"),
        ((["a", "b"], ["x", "y"], [0, 4], 3), r"`units\[1\]` is 4, but num_units is 3"),
        ((["a"], ["x"], None, None, False, True), "part of the preparation"),
    ],
)
def test_bad_texts(arguments, message):
    with pytest.raises(ValueError, match=message):
        prepare_pairs(*arguments)


@pytest.mark.parametrize("metric", [bleu, rouge_l, cider])
def test_nothing_to_score_is_undefined(metric):
    result = metric([], [])
    assert result.pop("count") == result.pop("dropped") == 0
    assert set(result.values()) == {None}
    with pytest.raises(ValueError, match="pass `batch_size`"):
        metric(["a"], ["a"], official=True)


# -- BLEU, ROUGE-L, CIDEr ---------------------------------------------------------------------------------------------


def test_bleu_by_hand():
    # Clipping: of three "the" two match; no bigram but "the cat" does.
    result = bleu(["the the the cat"], ["the cat the mat"])
    assert result["bleu1"] == pytest.approx(3 / 4)
    assert result["bleu2"] == pytest.approx((3 / 4 * 1 / 3) ** 0.5)
    # Of the lengths 2 and 4, equally close to 3, the shorter one: no penalty; against 4 words alone there is one.
    assert bleu(["a b c"], [["a b", "a b c d"]])["bleu3"] == pytest.approx(1)
    assert bleu(["a b c"], ["a b c d"])["bleu1"] == pytest.approx(np.exp(1 - 4 / 3))


def test_images_with_several_pairs():
    # Over all pairs 3 of 4 words match; image 0 has 2 of 2, image 1 1 of 2.
    result = bleu(["a", "b", "c x"], ["a", "b", "c d"], units=[0, 0, 1])
    assert result["bleu1"] == pytest.approx(3 / 4)
    assert result["bleu1_ex"] == pytest.approx((1 + 1 / 2) / 2)
    scores = rouge_l(["a", "x", "c"], ["a", "b", "c"], units=[0, 0, 1])
    assert (scores["rouge_l"], scores["rouge_l_ex"]) == (pytest.approx(2 / 3), pytest.approx(3 / 4))


def test_official_numbering_merges_images_of_different_batches():
    candidates, references = ["a", "x", "c d", "y"], ["a", "b", "c d", "d"]
    official = bleu(candidates, references, official=True, batch_size=2)
    # Batches (0, 1), (2, 3): images 0 and 2 share a number, as do 1 and 3.
    assert official["bleu1_ex"] == bleu(candidates, references, units=[0, 1, 0, 1])["bleu1_ex"] == pytest.approx(0.5)
    right = bleu(candidates, references)
    assert official["bleu1"] == right["bleu1"]
    # A batch that holds the whole set changes nothing.
    assert bleu(candidates, references, official=True, batch_size=9) == right
    third = rouge_l(["a", "x", "c"], ["a", "b", "c"], official=True, batch_size=2)
    assert third["rouge_l_ex"] == pytest.approx((1 + 0) / 2)


@given(st.lists(st.sampled_from("abc"), max_size=9), st.lists(st.sampled_from("abcd"), max_size=9))
def test_common_subsequence(first, second):
    table = np.zeros((len(first) + 1, len(second) + 1), dtype=int)
    for i, one in enumerate(first):
        for j, other in enumerate(second):
            table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
    assert lcs_length(first, second) == table[-1, -1]


def test_rouge_l_by_hand():
    # Common "a c": P = 2/3, R = 2/4.
    expected = (1 + 1.44) * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3)
    assert rouge_l(["a b c"], ["a x c d"])["rouge_l"] == pytest.approx(expected)
    assert rouge_l(["a b c"], ["a x c d"], beta=1)["rouge_l"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))


def test_cider_by_hand():
    # Two documents: "a" is in both (weight 0), "b", "c", "x" weigh log 2. Texts of two words: unigrams and one bigram.
    result = cider(["a b", "a x"], ["a b", "a c"])
    # Pair 0: cosines 1 for unigrams and bigrams, none for trigrams; pair 1: nothing in common but "a".
    assert result["cider"] == pytest.approx((10 * 2 / 4 + 0) / 2)
    assert cider(["a b"], ["a b"])["cider"] == 0  # log 1 = 0
    assert result["cider_ex"] == 0


def test_cider_with_frequencies_of_a_corpus(tmp_path):
    candidates, references = random_pairs(3)
    corpus = [texts[0] for texts in random_pairs(4, 200)[1]]
    frequencies = DocumentFrequencies.from_documents(corpus, prepare=True)
    assert frequencies.num_documents == 200
    assert frequencies.counts["effusion",] == sum("effusion" in text.split() for text in corpus)
    expected = cider(candidates, references, corpus=frequencies)
    assert expected["cider"] != pytest.approx(cider(candidates, references)["cider"], rel=1e-3)
    # One pair per image and fixed frequencies: both means are the same, and a part of the set keeps its scores.
    assert expected["cider_ex"] == pytest.approx(expected["cider"])
    halves = [
        cider(candidates[part], references[part], corpus=frequencies)["cider"] for part in (slice(20), slice(20, 40))
    ]
    assert np.mean(halves) == pytest.approx(expected["cider"])
    # The references themselves as the corpus are the default.
    assert cider(candidates, references, corpus=references)["cider"] == pytest.approx(
        cider(candidates, references)["cider"]
    )

    plain, lines = tmp_path / "corpus.txt", tmp_path / "corpus.jsonl"
    plain.write_text("\n".join(corpus) + "\n\n", encoding="utf-8")
    lines.write_text("".join(json.dumps([text]) + "\n" for text in corpus), encoding="utf-8")
    for path in (plain, str(lines)):
        assert cider(candidates, references, corpus=path) == expected
    lines.write_text('"a"\n{"text": "b"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: neither a text"):
        cider(candidates, references, corpus=lines)
    lines.write_text('"a"\n"b\n', encoding="utf-8")
    with pytest.raises(ValueError, match="line 2: not JSON"):
        cider(candidates, references, corpus=lines)
    with pytest.raises(FileNotFoundError, match="no corpus file"):
        cider(candidates, references, corpus=tmp_path / "none.txt")
    with pytest.raises(ValueError, match="no documents"):
        cider(candidates, references, corpus=[])


# -- other packages ---------------------------------------------------------------------------------------------------


def coco_scores(scorer, candidates, references):
    """(score, scores) of a scorer of pycocoevalcap."""
    targets = dict(enumerate(references))
    arguments = {"verbose": 0} if type(scorer).__name__ == "Bleu" else {}
    return scorer.compute_score(targets, {key: [text] for key, text in enumerate(candidates)}, **arguments)


@pytest.mark.parametrize("num_references", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_pycocoevalcap_agrees(seed, num_references):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (`make test` installs it)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = random_pairs(seed, num_references=num_references)
    ours = bleu(candidates, references, prepare=False)
    score, scores = coco_scores(Bleu(4), candidates, references)
    assert [ours[f"bleu{order}"] for order in range(1, 5)] == pytest.approx(score, rel=1e-12)
    assert [ours[f"bleu{order}_ex"] for order in range(1, 5)] == pytest.approx(np.mean(scores, axis=1), rel=1e-12)

    for metric, scorer in ((rouge_l, Rouge()), (cider, Cider())):
        name = metric.__name__
        score, scores = coco_scores(scorer, candidates, references)
        assert metric(candidates, references, prepare=False)[name] == pytest.approx(score, rel=1e-12)
        # Each pair: drawn alone out of the set.
        pairs = prepare_pairs(candidates, references, prepare=False)
        statistic = {"rouge_l": RougeLStatistic, "cider": CiderStatistic}[name](pairs)
        assert statistic(np.eye(len(pairs)))[:, 0] == pytest.approx(scores, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_images_agree_with_pycocoevalcap(seed):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (`make test` installs it)")
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    candidates, references = random_pairs(seed)
    units = np.random.default_rng(seed).integers(0, 7, len(candidates))
    images = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    for metric, scorer in ((bleu, Bleu(4)), (rouge_l, Rouge()), (cider, Cider())):
        parts = [
            coco_scores(scorer, [candidates[i] for i in image], [references[i] for i in image])[0] for image in images
        ]
        expected = np.mean(np.reshape(parts, (len(images), -1)), axis=0)
        ours = metric(candidates, references, units=units, prepare=False)
        assert [value for name, value in ours.items() if name.endswith("_ex")] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("num_references", [1, 2])
def test_sacrebleu_agrees(num_references):
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (`make test` installs it)")
    candidates, references = random_pairs(11, num_references=num_references)
    ours = bleu(candidates, references, prepare=False)
    for order in range(1, 5):
        scorer = sacrebleu.BLEU(tokenize="none", smooth_method="none", max_ngram_order=order)
        # Percent; the constants of pycocoevalcap shift its result by about 1e-9.
        expected = scorer.corpus_score(candidates, [list(column) for column in zip(*references, strict=True)]).score
        assert ours[f"bleu{order}"] == pytest.approx(expected / 100, rel=1e-8)


def test_rouge_score_agrees():
    scoring = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed (see Makefile)")

    class Blanks:
        def tokenize(self, text):
            return text.split()

    scorer = scoring.RougeScorer(["rougeL"], tokenizer=Blanks())
    candidates, references = random_pairs(12)
    scores = [scorer.score(texts[0], text)["rougeL"] for text, texts in zip(candidates, references, strict=True)]
    # That package reports F1, which is beta 1.
    assert rouge_l(candidates, references, prepare=False, beta=1)["rouge_l"] == pytest.approx(
        np.mean([score.fmeasure for score in scores])
    )
    recall_heavy = [
        2.44 * s.precision * s.recall / (s.recall + 1.44 * s.precision) if s.recall else 0.0 for s in scores
    ]
    assert rouge_l(candidates, references, prepare=False)["rouge_l"] == pytest.approx(np.mean(recall_heavy))


# -- bootstrap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "cider", "meteor"])
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_counts_are_repeated_images(name, seed):
    rng = np.random.default_rng(seed)
    candidates, references = random_pairs(seed, 30)
    units = np.sort(rng.integers(0, 9, 30))
    normal = rng.random(30) < 0.5
    frequencies = DocumentFrequencies.from_documents(references)

    def build(chosen, chosen_units, num_units):
        pairs = prepare_pairs(
            [candidates[i] for i in chosen], [references[i] for i in chosen], chosen_units, num_units
        )
        if name == "bleu":
            return BleuStatistic(pairs)
        if name == "rouge_l":
            return RougeLStatistic(pairs)
        if name == "cider":
            return CiderStatistic(pairs, frequencies)
        return MeteorStatistic(pairs, normal[chosen], True, count_words)

    statistic = build(np.arange(30), units, 10)  # image 9 has no text
    assert isinstance(statistic, Statistic)
    counts = rng.integers(0, 3, (4, 10))
    values = statistic(counts)
    assert values.shape == (4, len(statistic.names))
    for row, value in zip(counts, values, strict=True):
        drawn = np.repeat(np.arange(10), row)
        members = [np.flatnonzero(units == image) for image in drawn]
        chosen = np.concatenate([*members, np.zeros(0, dtype=int)])
        chosen_units = np.repeat(np.arange(len(drawn)), [len(part) for part in members])
        expected = point_estimate(build(chosen, chosen_units, len(drawn)))
        assert value == pytest.approx(expected, rel=1e-9, nan_ok=True)
    with pytest.raises(ValueError, match="one column per unit"):
        statistic(np.ones((2, 9)))


def test_resamples_without_text_are_undefined():
    pairs = prepare_pairs(["a b"], ["a b"], [1], 3)
    for statistic in (BleuStatistic(pairs), RougeLStatistic(pairs), CiderStatistic(pairs)):
        values = statistic(np.array([[3, 0, 0], [0, 1, 2]]))
        assert np.isnan(values[0]).all() and not np.isnan(values[1]).any()
    result = bootstrap(RougeLStatistic(pairs), 50, seed=1)["rouge_l"]
    assert result["value"] == 1 and 0 < result["undefined"] < 50


@pytest.mark.parametrize("name", ["bleu", "rouge_l", "cider"])
def test_evaluate_loads_the_metric(name, tmp_path):
    metric = evaluate.load(str(METRICS / name), cache_dir=str(tmp_path))
    candidates, references = ["The heart is normal.", "Clear."], ["Heart is normal.", "Lungs are clear."]
    expected = {"bleu": bleu, "rouge_l": rouge_l, "cider": cider}[name](candidates, references, units=[0, 0])
    assert metric.compute(predictions=candidates, references=references, units=[0, 0]) == expected
    several = metric.compute(predictions=candidates, references=[["Heart.", "Heart is normal."], ["Clear lungs."]])
    assert several[{"bleu": "bleu1"}.get(name, name)] > 0
    nothing = metric.compute(predictions=[], references=[])
    assert (nothing[{"bleu": "bleu1"}.get(name, name)], nothing["count"]) == (None, 0)
    with pytest.raises(ValueError, match="differ in length: 0 predictions and 2 references"):
        metric.compute(predictions=[], references=references)


# -- METEOR: its formula ----------------------------------------------------------------------------------------------


def test_meteor_formula_gives_the_programs_scores():
    statistics = recorded_statistics()
    assert meteor_score(statistics) == pytest.approx(RECORDED_SCORES, rel=1e-12)
    assert meteor_score(summable(statistics)) == pytest.approx(RECORDED_SCORES, rel=1e-12)
    assert meteor_score(summable(statistics).sum(0)) == pytest.approx(RECORDED_SET_SCORE, rel=1e-12)
    # Three times the same perfect pair: its chunk does not count, or the set would score 0.57.
    assert meteor_score(summable(statistics[[0, 0, 0]]).sum(0)) == pytest.approx(RECORDED_REPEATED_SCORE)
    assert meteor_score(statistics[[0, 0, 0]].sum(0)) == pytest.approx(1 - 0.6 * 0.2**0.2)


def test_meteor_statistic_on_recorded_counts():
    candidates, references = zip(*RECORDED_PAIRS, strict=True)
    table = dict(zip(RECORDED_PAIRS, recorded_statistics(), strict=True))

    def look_up(left, right):
        return np.array([table[candidate, texts[0]] for candidate, texts in zip(left, right, strict=True)])

    pairs = prepare_pairs(candidates, references, units=[0, 0, 1, 1, 1, 2, 2])
    statistic = MeteorStatistic(pairs, normal=[True] + 6 * [False], segment_statistics=look_up)
    assert statistic.names == ("meteor", "meteor_ex", "meteor_normal", "meteor_abnormal")
    everything, per_image, normal, abnormal = point_estimate(statistic)
    assert everything == pytest.approx(RECORDED_SET_SCORE)
    sums = [meteor_score(summable(recorded_statistics())[part].sum(0)) for part in ([0, 1], [2, 3, 4], [5, 6])]
    assert per_image == pytest.approx(np.mean(sums))
    assert normal == 1
    assert abnormal == pytest.approx(meteor_score(recorded_statistics()[1:].sum(0)))
    assert statistic(np.array([[0, 0, 3]]))[0, 0] == pytest.approx(meteor_score(recorded_statistics()[5:].sum(0)))
    assert np.isnan(statistic(np.array([[0, 1, 0]]))[0, 2])
    with pytest.raises(ValueError, match="`normal` has 3 entries for 7 pairs"):
        MeteorStatistic(pairs, normal=[True] * 3, segment_statistics=look_up)
    with pytest.raises(ValueError, match=r"returned the shape \(0, 23\)"):
        MeteorStatistic(pairs, segment_statistics=lambda left, right: np.zeros((0, 23)))


def test_meteor_ratio_compares_with_the_other_regions_of_the_image():
    seen = []

    def recorder(candidates, references):
        seen.extend((text, texts[0]) for text, texts in zip(candidates, references, strict=True))
        return count_words(candidates, references)

    candidates, references, units = ["a b", "c d", "a b", "e"], ["a b", "c x", "a b", "e"], [0, 0, 0, 1]
    pairs = prepare_pairs(candidates, references, units)
    statistic = MeteorStatistic(pairs, mismatched=True, segment_statistics=recorder)
    # Each combination within an image once; "e" is alone in its image.
    assert sorted(seen) == sorted({("a b", "a b"), ("a b", "c x"), ("c d", "a b"), ("c d", "c x"), ("e", "e")})
    matched = summable(count_words(candidates, [[text] for text in references])).sum(0)
    others = [("a b", "c x"), ("a b", "a b"), ("c d", "a b"), ("c d", "a b"), ("a b", "a b"), ("a b", "c x")]
    mismatched = summable(count_words([left for left, _ in others], [[right] for _, right in others])).sum(0)
    expected = meteor_score(matched) / meteor_score(mismatched)
    values = dict(zip(statistic.names, point_estimate(statistic), strict=True))
    assert values["meteor_ratio"] == pytest.approx(expected)
    assert np.isnan(statistic(np.array([[0, 2]]))[0, -1])  # no mismatched pair


# -- METEOR: the process, with a stand-in for Java --------------------------------------------------------------------


@pytest.fixture
def stand_in(tmp_path):
    """Makes a `java` that runs the given Python lines for each line of its input, and a jar file with its table."""

    def make(body, before=""):
        program = tmp_path / "java"
        program.write_text(
            f"#!{sys.executable}\nimport os, sys, time\n{before}\n"
            f"for number, line in enumerate(sys.stdin.buffer):\n    {body}\n    sys.stdout.flush()\n",
            encoding="utf-8",
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        (tmp_path / "data").mkdir(exist_ok=True)
        for name in ("meteor.jar", "data/paraphrase-en.gz"):
            (tmp_path / name).touch()
        return {"jar": tmp_path / "meteor.jar", "java": program}

    return make


ZEROS = "print(number, *[0.0] * 22)"


def test_many_pairs_stream_through_the_process(stand_in):
    # Far more than the pipes of both directions hold.
    number = 6000
    text = "no pleural effusion " * 20
    statistics = meteor_statistics([text] * number, [[text]] * number, **stand_in(ZEROS))
    assert statistics.shape == (number, 23)
    assert (statistics[:, 0] == np.arange(number)).all()


def test_texts_reach_the_process_on_one_line(stand_in, tmp_path):
    path = tmp_path / "received"
    program = stand_in(f"open({str(path)!r}, 'ab').write(line); {ZEROS}")
    candidates = ["a ||| b|||c\nd\r\n", "", "œdème ≥ 5\u2028mm \ud800"]
    meteor_statistics(candidates, [["x\ny", "|||"], ["z"], ["w"]], **program)
    assert path.read_text(encoding="utf-8").split("\n") == [
        "SCORE ||| x y |||  ||| a bc d",
        "SCORE ||| z ||| ",
        "SCORE ||| w ||| œdème ≥ 5 mm ?",
        "",
    ]


def test_a_process_that_dies_says_why(stand_in):
    program = stand_in(f"{ZEROS} if number < 2 else (sys.stderr.write('java.lang.OutOfMemoryError\\n'), sys.exit(3))")
    with MeteorProgram(**program) as running:
        with pytest.raises(MeteorError, match=r"ended with code 3 at pair 3 of 50: java.lang.OutOfMemoryError"):
            running.statistics(["a"] * 50, [["b"]] * 50)
        with pytest.raises(MeteorError, match="was closed"):
            running.statistics(["a"], [["b"]])


def test_a_process_that_never_starts_to_answer(stand_in):
    with pytest.raises(MeteorError, match="ended with code 1 at pair 1 of 1: no JVM"):
        meteor_statistics(["a"], [["b"]], **stand_in(ZEROS, "sys.exit('no JVM')"))


def test_a_process_that_hangs_is_ended(stand_in):
    with MeteorProgram(**stand_in("time.sleep(600)"), timeout=0.5) as running:
        with pytest.raises(MeteorError, match=r"no answer for 0.5 s at pair 1 of 20000"):
            running.statistics(["a " * 100] * 20000, [["b"]] * 20000)
        assert running._process.poll() is not None


def test_an_answer_that_is_none(stand_in):
    with pytest.raises(MeteorError, match="answered 'Error: specify' instead of 23 counts at pair 1 of 1"):
        meteor_statistics(["a"], [["b"]], **stand_in("print('Error: specify')"))


def test_the_process_ends_with_its_owner(stand_in):
    running = MeteorProgram(**stand_in(ZEROS))
    process = running._process
    assert running.statistics(["a"], [["b"]]).shape == (1, 23)
    assert process.poll() is None
    del running
    assert process.wait(timeout=20) is not None


def test_missing_parts_are_named(stand_in, tmp_path, monkeypatch):
    program = stand_in(ZEROS)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("CHEX_METEOR_JAR", str(program["jar"]))
    assert find_jar() == program["jar"]
    assert find_java(program["java"]) == str(program["java"])
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(MetricUnavailable, match="needs Java 8 or newer"):
        meteor(["a"], ["b"])
    (tmp_path / "jdk" / "bin").mkdir(parents=True)
    os.link(program["java"], tmp_path / "jdk" / "bin" / "java")
    monkeypatch.setenv("JAVA_HOME", str(tmp_path / "jdk"))
    assert find_java() == str(tmp_path / "jdk" / "bin" / "java")
    assert meteor(["a"], ["b"])["meteor"] == 0
    (tmp_path / "data" / "paraphrase-en.gz").unlink()
    with pytest.raises(MetricUnavailable, match="the paraphrase table .*: the environment variable CHEX_METEOR_JAR"):
        meteor(["a"], ["b"])
    with pytest.raises(MetricUnavailable, match="the program .*: the argument `jar` names it"):
        meteor(["a"], ["b"], jar=tmp_path / "other.jar")
    monkeypatch.delenv("CHEX_METEOR_JAR")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MetricUnavailable, match="pip install --no-deps pycocoevalcap.*CHEX_METEOR_JAR"):
        meteor(["a"], ["b"])
    assert meteor([], []) == {"meteor": None, "meteor_ex": None, "count": 0, "dropped": 0}  # needs no program


def test_a_java_that_cannot_be_started(stand_in):
    program = stand_in(ZEROS)
    program["java"].write_bytes(b"\x00\x01")
    with pytest.raises(MetricUnavailable, match="cannot be started"):
        meteor(["a"], ["b"], **program)


# -- METEOR: the program itself ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program():
    try:
        find_jar()
        find_java()
    except MetricUnavailable as error:
        pytest.skip(str(error))
    with MeteorProgram() as running:
        yield running


def test_meteor_agrees_with_the_wrapper_of_pycocoevalcap(program):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed (`make test` installs it)")
    from pycocoevalcap.meteor.meteor import Meteor

    if not shutil.which("java"):
        pytest.skip("pycocoevalcap looks for java on the path only")
    wrapper = Meteor()
    try:
        for seed, num_references in ((1, 1), (2, 3)):
            candidates, references = random_pairs(seed, num_references=num_references)
            candidates[5:7] = ["a ||| b|||c  d", "Naïve œdème ; ≥5mm (right) -- don't"]
            references[8][0] = candidates[8]
            score, scores = coco_scores(wrapper, candidates, references)
            pairs = prepare_pairs(candidates, references, prepare=False)
            statistic = MeteorStatistic(pairs, segment_statistics=program.statistics)
            everything, per_image = point_estimate(statistic)
            assert everything == pytest.approx(score, rel=1e-12)
            assert per_image == pytest.approx(np.mean(scores), rel=1e-12)
            assert statistic(np.eye(len(pairs)))[:, 0] == pytest.approx(scores, rel=1e-12)
    finally:
        wrapper.meteor_p.kill()


def test_recorded_counts_are_still_the_programs(program):
    candidates, references = zip(*RECORDED_PAIRS, strict=True)
    statistics = program.statistics(candidates, [[text] for text in references])
    assert statistics.tolist() == recorded_statistics().tolist()
    # A pair's counts do not depend on what came before.
    assert (
        program.statistics(candidates[::-1], [[text] for text in references[::-1]]).tolist()
        == statistics[::-1].tolist()
    )


def test_meteor_in_a_foreign_locale_and_folder(program, tmp_path, monkeypatch):
    """One start of the program for all of: an odd path, a Turkish locale, the `evaluate` module."""
    folder = tmp_path / "çalışma alanı"
    (folder / "data").mkdir(parents=True)
    for name in ("meteor-1.5.jar", "data/paraphrase-en.gz"):
        (folder / name).symlink_to(find_jar().parent / name)
    monkeypatch.setenv("CHEX_METEOR_JAR", str(folder / "meteor-1.5.jar"))
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=tr -Duser.country=TR")
    monkeypatch.setenv("LC_ALL", "C")
    metric = evaluate.load(str(METRICS / "meteor"), cache_dir=str(tmp_path / "cache"))
    result = metric.compute(
        predictions=["INTERSTITIAL THICKENING", "Clear lungs.", "x"],
        references=["interstitial thickening", "Edema.", "x y"],
        units=[0, 0, 1],
        normal=[False, True, True],
        mismatched=True,
        official=True,
        batch_size=1,
    )
    assert result["meteor_abnormal"] == 1
    assert result["meteor_ex"] == result["meteor"]  # batches of one image: all have number 0
    assert result["count"] == 3 and 0 < result["meteor_normal"] < 1 and result["meteor_ratio"] is None


def test_short_functions(stand_in):
    program = stand_in(
        "parts = line.decode().split('|||'); n = int(parts[1].split() == parts[2].split());"
        "print(2.0, 2.0, 0.0, 0.0, 1.0 + n, 1.0 + n, *[0.0] * 14, 1.0 + (1 - n), 2.0, 2.0)"
    )
    candidates, references = ["a b", "c d"], ["a b", "c x"]
    equal, other = 1.0, 0.5 * (1 - 0.6)
    assert meteor_by_normality(candidates, references, [True, False], **program) == {
        "meteor_normal": pytest.approx(equal),
        "meteor_abnormal": pytest.approx(other),
    }
    both = 0.75 * (1 - 0.6 * 0.5**0.2)  # chunks: 0 of the equal pair and 2 of the other one, of 4 words
    assert meteor_ratio(candidates, references, [0, 0], **program) == pytest.approx(both / other)
    result = meteor(candidates, references, **program)
    assert result["meteor_ex"] == pytest.approx((equal + other) / 2)
    official = meteor(candidates, references, official=True, batch_size=1, **program)
    assert official == result | {"meteor_ex": pytest.approx(both)}  # both images have the number 0
    with pytest.raises(ValueError, match="pass `batch_size`"):
        meteor(candidates, references, official=True, **program)


def test_example_of_the_documentation():
    text = (METRICS.parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    names = {}
    exec(next(block for block in blocks if "prepare_pairs(" in block), names)
    assert (names["result"]["count"], names["result"]["dropped"]) == (2, 1)
    assert point_estimate(names["BleuStatistic"](names["pairs"]))[0] == names["result"]["bleu1"]
