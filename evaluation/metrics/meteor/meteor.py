"""METEOR 1.5 (English, with normalisation): alignments by the METEOR program in Java, scores by its formula in NumPy.

The program aligns candidate and reference by equal words, stems, synonyms and paraphrases and reports 23 counts per
pair. METEOR of any set of pairs follows from the sum of these counts, so bootstrapping needs no Java. With content and
function words weighted 0.75 and 0.25 and the four kinds of matches weighted 1, 0.6, 0.8, 0.6:

    P, R = weighted matches / weighted words of candidate, reference;  F = 1 / (0.15 / P + 0.85 / R)
    METEOR = F (1 - 0.6 f^0.2),  f = chunks / matched words (mean of both sides)

where two texts that match as a whole in one chunk count no chunk.

The program is `meteor-1.5.jar` with `data/paraphrase-en.gz` beside it: an argument, else the environment variable
CHEX_METEOR_JAR, else that of an installed pycocoevalcap. It needs Java 8 or newer.

Usable directly and through `evaluate.load("evaluation/metrics/meteor")`, without a network; the `evaluation` package
must be importable.
"""

import contextlib
import importlib.util
import os
import queue
import shutil
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

import datasets
import evaluate
import numpy as np

from evaluation.bootstrap import check_counts
from evaluation.metrics.checked_batches import CheckedBatches
from evaluation.metrics.text_preparation import (
    TextPairs,
    named_values,
    prepare_pairs,
    ratio,
    unit_sums,
)
from evaluation.metrics.unavailable import MetricUnavailable


NUM_STATISTICS = 23
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGE_WEIGHTS = np.array([1.0, 0.6, 0.8, 0.6])  # equal words, stems, synonyms, paraphrases
_CHUNKS = 20  # column of the statistics
JAR_VARIABLE = "CHEX_METEOR_JAR"
TIMEOUT = 300.0  # seconds; loading the tables takes about 10 of a free machine

# (P candidates, P lists of references) -> (P, 23)
SegmentStatistics = Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]

_DESCRIPTION = "METEOR 1.5 over all pairs and as a mean over images; matched against mismatched pairs; by normality."
_CITATION = ""
_KWARGS = """
Args:
    predictions: generated texts.
    references: one reference text, or a list of them, per prediction; pairs with an empty reference are left out.
    units: the image of each pair (integers from 0); left out: one pair per image.
    prepare: " ." for ".", white space merged (default); off for prepared texts.
    lowercase: lower-case the texts (no effect on METEOR, which does so itself).
    official: number the images from 0 in each batch of `batch_size`, as the official code does: changes meteor_ex.
    normal: one bool per prediction, whether the region is normal: adds meteor_normal and meteor_abnormal.
    mismatched: adds meteor_ratio, METEOR of the pairs over METEOR of all other combinations within an image.
    jar, java: the program, if it is not to be searched for.
    timeout: seconds to wait for the next answer of the program.
Returns:
    meteor: over all pairs (from summed counts); meteor_ex: METEOR of each image's pairs, then the mean over images;
    meteor_normal, meteor_abnormal, meteor_ratio if asked for; count: pairs; dropped: pairs with an empty reference.
    None where there is no pair (for meteor_ratio: where the mismatched pairs score 0 or there are none).
"""


class MeteorError(MetricUnavailable):
    """The METEOR program was found, but failed: it ended, did not answer in time, or answered something else."""


# -- the score --------------------------------------------------------------------------------------------------------


def meteor_score(statistics: np.ndarray) -> np.ndarray:
    """METEOR (...) of the statistics (..., 23) of pairs, or of sums of `summable` ones; 0 where nothing matches.

    Order of the statistics: words of candidate and reference; function words of both; for each kind of match the
    matched content words of both and the matched function words of both; chunks; matched words of both.
    """
    statistics = np.asarray(statistics, dtype=np.float64)
    words, function_words = statistics[..., 0:2], statistics[..., 2:4]
    stages = statistics[..., 4:20].reshape(*statistics.shape[:-1], 4, 4)
    content_matches, function_matches = stages[..., 0:2], stages[..., 2:4]
    chunks, matched_words = statistics[..., _CHUNKS], statistics[..., 21:23]

    lengths = DELTA * (words - function_words) + (1 - DELTA) * function_words
    matches = np.einsum("s,...sk->...k", STAGE_WEIGHTS, DELTA * content_matches + (1 - DELTA) * function_matches)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(matches / lengths, -1, 0)
        f_mean = 1 / ((1 - ALPHA) / precision + ALPHA / recall)
        fragmentation = chunks / (matched_words.sum(-1) / 2)
    score = f_mean * (1 - GAMMA * np.where(_whole(statistics), 0.0, fragmentation) ** BETA)
    return np.where(np.isnan(score), 0.0, np.maximum(score, 0.0))


def summable(statistics: np.ndarray) -> np.ndarray:
    """Statistics (..., 23) of pairs as the program adds them up: the one chunk of two equal texts does not count.

    The score of a pair stays the same, and `meteor_score` of a sum is the program's score of the set.
    """
    result = np.array(statistics, dtype=np.float64)
    result[_whole(result), _CHUNKS] = 0.0
    return result


def _whole(statistics: np.ndarray) -> np.ndarray:
    """Whether all words of both sides are matched in one chunk."""
    matches = statistics[..., 4:20].reshape(*statistics.shape[:-1], 8, 2).sum(-2)
    return (matches == statistics[..., 0:2]).all(-1) & (statistics[..., _CHUNKS] == 1)


# -- the program ------------------------------------------------------------------------------------------------------


def find_jar(jar: str | os.PathLike | None = None) -> Path:
    """The METEOR program: `jar`, else $CHEX_METEOR_JAR, else that of pycocoevalcap.

    Raises:
        MetricUnavailable: if it, or its paraphrase table, is missing.
    """
    given = jar or os.environ.get(JAR_VARIABLE)
    if given:
        path = Path(given).expanduser().absolute()
        source = "the argument `jar`" if jar else f"the environment variable {JAR_VARIABLE}"
        remedy = f"{source} names it"
    else:
        package = importlib.util.find_spec("pycocoevalcap")
        if package is None or not package.submodule_search_locations:
            raise MetricUnavailable(
                "METEOR needs the program meteor-1.5.jar. `pip install --no-deps pycocoevalcap` brings it (104 MB), "
                f"or let {JAR_VARIABLE} name the jar of an unpacked METEOR 1.5."
            )
        path = Path(next(iter(package.submodule_search_locations))) / "meteor" / "meteor-1.5.jar"
        remedy = f"install pycocoevalcap anew or let {JAR_VARIABLE} name the jar of an unpacked METEOR 1.5"
    for part, name in ((path, "the program"), (path.parent / "data" / "paraphrase-en.gz", "the paraphrase table")):
        if not part.is_file():
            raise MetricUnavailable(f"METEOR needs {name} {part}, which is not a file: {remedy}.")
    return path


def find_java(java: str | os.PathLike | None = None) -> str:
    """The Java program: `java`, else that of $JAVA_HOME, else that on the path.

    Raises:
        MetricUnavailable: if there is none.
    """
    home = os.environ.get("JAVA_HOME")
    for candidate in (java,) if java else (home and os.path.join(home, "bin", "java"), "java"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return str(found)
    raise MetricUnavailable(
        f"METEOR needs Java 8 or newer, and {java or 'java'} is no program on the path"
        f"{'' if java else ' nor in $JAVA_HOME'}: install it, e.g. Debian's default-jre-headless."
    )


class MeteorProgram:
    """The running METEOR program; a context manager. Starting takes some seconds, so keep it for several calls.

    The program ends with the block, with an error, and with the Python process, whatever way that ends.

    Args:
        jar, java: see `find_jar` and `find_java`.
        memory: Java's limit of its heap.
        timeout: seconds to wait for the next answer; the first one includes loading the tables.

    Raises:
        MetricUnavailable: if the jar, its paraphrase table or Java is missing.
    """

    def __init__(
        self,
        jar: str | os.PathLike | None = None,
        java: str | os.PathLike | None = None,
        memory: str = "2G",
        timeout: float = TIMEOUT,
    ):
        jar = find_jar(jar)
        # Without a language of its own the JVM lower-cases as the user's language does (Turkish I). The locale is for
        # file names: in the C locale Java finds no path with an accent.
        command = [find_java(java), f"-Xmx{memory}", "-XX:+UseSerialGC", "-Dfile.encoding=UTF-8"]
        command += [
            "-Duser.language=en",
            "-Duser.country=US",
            "-jar",
            str(jar),
            "-",
            "-",
            "-stdio",
            "-l",
            "en",
            "-norm",
        ]
        self._timeout = timeout
        # A file, as an unread pipe would block the program.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the program)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env={**os.environ, "LC_ALL": "C.UTF-8"},
            )
        except OSError as error:
            raise MetricUnavailable(f"METEOR needs Java, and {command[0]} cannot be started: {error}.") from None
        self._answers: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read_lines, args=(self._process.stdout, self._answers), daemon=True).start()
        self._end = weakref.finalize(self, _end_process, self._process, self._errors)

    def __enter__(self) -> "MeteorProgram":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Ends the program; may be called again."""
        self._end()

    def statistics(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """The 23 counts of each pair, (P, 23) float64; of several references the best one counts.

        "|||", which separates texts for the program, is taken out of them, and line breaks become blanks.

        Raises:
            MeteorError: if the program ends, does not answer within the timeout, or answers something else. It is
                closed then.
        """
        if not self._end.alive:
            raise MeteorError("The METEOR program was closed; start a new one.")
        lines = [
            " ||| ".join(("SCORE", *map(_on_one_line, texts), _on_one_line(candidate)))
            for candidate, texts in zip(candidates, references, strict=True)
        ]
        # A thread, since both pipes are small: the program stops reading when nobody reads its answers.
        writer = threading.Thread(target=_write_lines, args=(self._process.stdin, lines), daemon=True)
        writer.start()
        try:
            rows = [self._next(index, len(lines)) for index in range(len(lines))]
        except BaseException:
            self.close()
            raise
        finally:
            writer.join()
        return np.array(rows, dtype=np.float64).reshape(-1, NUM_STATISTICS)

    def _next(self, index: int, total: int) -> list[float]:
        where = f"pair {index + 1} of {total}"
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            raise MeteorError(f"METEOR gave no answer for {self._timeout:g} s at {where}.") from None
        if line is None:
            code = self._process.wait()
            self._errors.seek(0)
            message = self._errors.read()[-2000:].decode("utf-8", "replace").strip()
            raise MeteorError(f"METEOR's Java process ended with code {code} at {where}: {message or 'no message'}")
        try:
            values = [float(value) for value in line.split()]
        except ValueError:
            values = []
        if len(values) != NUM_STATISTICS:
            answer = line.decode("utf-8", "replace").strip()
            raise MeteorError(f"METEOR answered {answer!r} instead of {NUM_STATISTICS} counts at {where}.")
        return values


def _on_one_line(text: str) -> str:
    return " ".join(text.replace("|||", "").split())


def _read_lines(stream: IO[bytes], answers: queue.SimpleQueue) -> None:
    with stream:
        for line in stream:
            answers.put(line)
    answers.put(None)


def _write_lines(stream: IO[bytes], lines: list[str]) -> None:
    try:
        for line in lines:
            # A lone surrogate has no UTF-8 form and would end this thread.
            stream.write(line.encode("utf-8", "replace") + b"\n")
        stream.flush()
    except (OSError, ValueError):
        return  # The program ended or was closed: the reader, which sees it too, says so.


def _end_process(process: subprocess.Popen, errors: IO[bytes]) -> None:
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):  # what was still in the buffer has no reader any more
        process.stdin.close()
    errors.close()


def meteor_statistics(
    candidates: Sequence[str],
    references: Sequence[Sequence[str]],
    jar: str | os.PathLike | None = None,
    java: str | os.PathLike | None = None,
    timeout: float = TIMEOUT,
) -> np.ndarray:
    """`MeteorProgram.statistics` of a program started for this call; see there."""
    if not len(candidates):
        return np.zeros((0, NUM_STATISTICS))
    with MeteorProgram(jar, java, timeout=timeout) as program:
        return program.statistics(candidates, references)


# -- the metric -------------------------------------------------------------------------------------------------------


class MeteorStatistic:
    """METEOR for bootstrapping. `names`: meteor (over all pairs) and meteor_ex (mean over images), and if asked for
    meteor_normal and meteor_abnormal (pairs of normal and of other regions) and meteor_ratio.

    Args:
        pairs: prepared texts (`prepare_pairs`); `num_units` is their number of images.
        normal: (input pairs,) bool, for every pair that was given to `prepare_pairs`, also those it dropped.
        mismatched: adds meteor_ratio: METEOR of the pairs over METEOR of all pairs of a candidate with the reference
            of another pair of its image, both from counts summed over the images (1 for texts that say the same about
            every region). Each different combination is aligned once.
        segment_statistics: the function (candidates, references) -> (P, 23) to use: `statistics` of a running
            `MeteorProgram`, or a look-up of counts stored before. Left out: a program is started for this call.

    Attributes:
        sums: (num_units, 24) the summed counts of each image's pairs and, last, their number.

    Raises:
        MetricUnavailable: if Java or the jar is missing, or (`MeteorError`) if the program fails.
        ValueError: if `normal` has another length.
    """

    def __init__(
        self,
        pairs: TextPairs,
        normal: Sequence[bool] | None = None,
        mismatched: bool = False,
        segment_statistics: SegmentStatistics = meteor_statistics,
    ):
        if normal is not None and len(normal) != len(pairs) + pairs.dropped:
            raise ValueError(
                f"`normal` has {len(normal)} entries for {len(pairs) + pairs.dropped} pairs: give one per pair, those "
                "with an empty reference included."
            )
        self.num_units = pairs.num_units
        own = np.arange(len(pairs))
        left, right = _other_pairs(pairs) if mismatched else (own[:0], own[:0])
        statistics, index = _align(
            pairs, np.concatenate([own, left]), np.concatenate([own, right]), segment_statistics
        )
        matched = statistics[index[: len(pairs)]]
        self.names: tuple[str, ...] = ("meteor", "meteor_ex")
        self.sums = unit_sums(matched, pairs.units, pairs.num_units)
        self._group_sums: list[np.ndarray] = []
        if normal is not None:
            self.names += ("meteor_normal", "meteor_abnormal")
            chosen = np.asarray(normal, dtype=bool)[pairs.kept]
            self._group_sums = [
                unit_sums(matched[group], pairs.units[group], pairs.num_units) for group in (chosen, ~chosen)
            ]
        self._mismatched_sums = None
        if mismatched:
            self.names += ("meteor_ratio",)
            # By column: the mismatched pairs may be millions.
            units, index = pairs.units[left], index[len(pairs) :]
            self._mismatched_sums = np.column_stack(
                [np.bincount(units, weights=column[index], minlength=pairs.num_units) for column in statistics.T]
            )

    def __call__(self, counts: np.ndarray) -> np.ndarray:
        """`counts` (B, N), how often each image was drawn -> (B, len(names)); NaN where undefined."""
        counts = check_counts(counts, self.num_units).astype(np.float64)
        values = [_score_or_nan(counts @ self.sums), _mean_over_units(counts, self.sums)]
        values += [_score_or_nan(counts @ sums) for sums in self._group_sums]
        if self._mismatched_sums is not None:
            values.append(ratio(values[0], meteor_score((counts @ self._mismatched_sums)[:, :-1])))
        return np.stack(values, axis=1)


def _other_pairs(pairs: TextPairs) -> tuple[np.ndarray, np.ndarray]:
    """Pair numbers (candidate, reference) of all combinations of two different pairs of one image."""
    left: list[np.ndarray] = []
    right: list[np.ndarray] = []
    for members in pairs.members():
        first, second = np.nonzero(~np.eye(len(members), dtype=bool))
        left.append(members[first])
        right.append(members[second])
    empty = [np.zeros(0, dtype=np.int64)]
    return np.concatenate(left or empty), np.concatenate(right or empty)


def _align(
    pairs: TextPairs, left: np.ndarray, right: np.ndarray, segment_statistics: SegmentStatistics
) -> tuple[np.ndarray, np.ndarray]:
    """Counts, and a 1, of the different combinations of candidate `left` and reference `right`, and their indices."""
    candidates: dict[str, int] = {}
    candidate_ids = np.array(
        [candidates.setdefault(text, len(candidates)) for text in pairs.candidates], dtype=np.int64
    )
    references: dict[tuple[str, ...], int] = {}
    reference_ids = np.array(
        [references.setdefault(tuple(texts), len(references)) for texts in pairs.references], dtype=np.int64
    )
    stride = max(1, len(references))
    combinations, index = np.unique(candidate_ids[left] * stride + reference_ids[right], return_inverse=True)
    candidate_texts, reference_texts = list(candidates), list(references)
    statistics = np.asarray(
        segment_statistics(
            [candidate_texts[combination // stride] for combination in combinations],
            [list(reference_texts[combination % stride]) for combination in combinations],
        ),
        dtype=np.float64,
    )
    if statistics.shape != (len(combinations), NUM_STATISTICS):
        raise ValueError(
            f"`segment_statistics` returned the shape {statistics.shape} for {len(combinations)} pairs; expected "
            f"({len(combinations)}, {NUM_STATISTICS})."
        )
    return np.column_stack([summable(statistics), np.ones(len(combinations))]), index


def _score_or_nan(sums: np.ndarray) -> np.ndarray:
    return np.where(sums[:, -1] > 0, meteor_score(sums[:, :-1]), np.nan)


def _mean_over_units(counts: np.ndarray, sums: np.ndarray) -> np.ndarray:
    present = sums[:, -1] > 0
    return ratio(counts @ np.where(present, meteor_score(sums[:, :-1]), 0.0), counts @ present)


def meteor(
    candidates: Sequence[str],
    references: Sequence[str | Sequence[str]],
    units: Sequence[int] | None = None,
    prepare: bool = True,
    lowercase: bool = False,
    official: bool = False,
    batch_size: int | None = None,
    normal: Sequence[bool] | None = None,
    mismatched: bool = False,
    jar: str | os.PathLike | None = None,
    java: str | os.PathLike | None = None,
    timeout: float = TIMEOUT,
) -> dict:
    """METEOR; see the module's `_KWARGS` for arguments and result, and the module for the formula.

    Raises:
        ValueError: as `prepare_pairs`, for `official` without `batch_size`, or for `normal` of another length.
        MetricUnavailable: if Java or the jar is missing, or (`MeteorError`) if the program fails.
    """
    pairs = prepare_pairs(candidates, references, units, None, prepare, lowercase)
    numbers = pairs.numbered_per_batch(batch_size) if official else pairs
    statistic = MeteorStatistic(
        pairs, normal, mismatched, partial(meteor_statistics, jar=jar, java=java, timeout=timeout)
    )
    result = named_values(statistic)
    if official and len(pairs):
        sums = unit_sums(statistic.sums, np.arange(pairs.num_units) % batch_size, numbers.num_units)
        result["meteor_ex"] = float(_mean_over_units(np.ones((1, len(sums))), sums)[0])
    return {**result, "count": len(pairs), "dropped": pairs.dropped}


def meteor_ratio(
    candidates: Sequence[str], references: Sequence[str | Sequence[str]], units: Sequence[int], **kwargs
) -> float | None:
    """METEOR of the pairs over METEOR of all mismatched pairs within an image; see `meteor`, also for `kwargs`."""
    return meteor(candidates, references, units, mismatched=True, **kwargs)["meteor_ratio"]


def meteor_by_normality(
    candidates: Sequence[str], references: Sequence[str | Sequence[str]], normal: Sequence[bool], **kwargs
) -> dict[str, float | None]:
    """METEOR of normal and of abnormal regions, {"meteor_normal", "meteor_abnormal"}; see `meteor`."""
    result = meteor(candidates, references, normal=normal, **kwargs)
    return {name: result[name] for name in ("meteor_normal", "meteor_abnormal")}


class Meteor(CheckedBatches, evaluate.Metric):
    """`evaluate` wrapper of `meteor`."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS,
            features=[
                datasets.Features({"predictions": text, "references": text}),
                datasets.Features({"predictions": text, "references": datasets.List(text)}),
            ],
        )

    def _compute(self, predictions: list, references: list, **kwargs) -> dict:
        return meteor(predictions, references, **kwargs)
