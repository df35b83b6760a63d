"""Synthetic chest radiographs ("phantom") with exact boxes, labels and texts, and the `datasets` builder for them.

No patient was involved: images are drawn, not learned. Every identifier starts with "phantom-". The records have the
same fields as those of the real data sets, so each task of ChEX can be learned and evaluated on them.
"""

import hashlib
import io
import logging
import zlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES

from .phantom_anatomy import SIDE_NAMES, Dice, Pose, clip_boxes_to_frame, hull_boxes, sample_body, sample_pose
from .phantom_drawing import draw_film
from .phantom_findings import sample_findings
from .phantom_text import SEVERITY_WORDS, Facts, finding_phrase, region_sentences, report_sentences
from .record import record_features


logger = logging.getLogger(__name__)

# Version of the data set, as the builder reports it.
GENERATOR_VERSION = "1.0.0"

MIN_SIZE = 64
# Splits draw from index ranges that never meet, so a test image does not depend on how many training images there are.
SPLIT_OFFSETS = {"train": 0, "validation": 10_000_000, "test": 20_000_000}
MAX_SPLIT_SIZE = 10_000_000
# Share of index pairs (2k, 2k + 1) that are two studies of one person.
PAIR_SHARE = 0.3
# Smallest share of an anatomy box that must lie on the film, and of a finding's box.
MIN_ANATOMY_SHARE = 0.1
MIN_FINDING_SHARE = 0.75

_CLASS_INDEX = {name: index for index, name in enumerate(PHANTOM_CLASSES)}


@dataclass(slots=True)
class PhantomObject:
    """A finding with its box.

    Attributes:
        box: (x0, y0, x1, y1) pixels.
        category: One of the phantom classes.
        side: "right", "left" or "" (both sides or none).
        severity: Severity word of the class ("mild" ... or "small" ...).
        phrase: Sentence that names it; the two boxes of an edema share one phrase.
    """

    box: tuple[float, float, float, float]
    category: str
    side: str
    severity: str
    phrase: str


@dataclass(slots=True)
class PhantomSample:
    """One synthetic study with everything known about it.

    Attributes:
        seed, index: What it was drawn from.
        image: (H, W) uint8.
        view: "PA" or "AP".
        anatomy_boxes: (29, 4) float32 xyxy pixels, zeros where absent.
        anatomy_present: (29,) bool.
        anatomy_labels: (29, 8) int8, 1 where a finding of the class touches the region.
        anatomy_sentences: 29 lists of sentences.
        objects: Findings with boxes.
        class_labels: (8,) int8.
        sentences: The report.
        heart_ratio: Cardiothoracic ratio as drawn.
        visible_frame: (x0, y0, x1, y1) pixels of the film inside the collimation; all boxes are clipped to it.
        masks: Only if asked for: "lung", "heart", "finding 0", ... as (H, W) float32.
    """

    seed: int
    index: int
    image: np.ndarray
    view: str
    anatomy_boxes: np.ndarray
    anatomy_present: np.ndarray
    anatomy_labels: np.ndarray
    anatomy_sentences: list[list[str]]
    objects: list[PhantomObject]
    class_labels: np.ndarray
    sentences: list[str]
    heart_ratio: float
    visible_frame: tuple[float, float, float, float]
    masks: dict[str, np.ndarray] = field(default_factory=dict)


@lru_cache(maxsize=64)
def _is_pair(seed: int, pair: int) -> bool:
    return np.random.default_rng([seed, 3, pair]).random() < PAIR_SHARE


def subject_index(seed: int, index: int) -> int:
    """The person of a study: pairs (2k, 2k + 1) are the same person in a fixed share of cases."""
    pair = index // 2
    return 2 * pair if _is_pair(seed, pair) else index


def _check_size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < MIN_SIZE or max(height, width) > 4 * min(height, width):
        raise ValueError(
            f"The phantom cannot be drawn at {height} x {width} pixels: both sides must be at least {MIN_SIZE}, and "
            "the longer at most 4 times the shorter. Choose a larger size."
        )
    return height, width


def render_phantom(
    seed: int, index: int, size: int | tuple[int, int] = 128, *, with_masks: bool = False
) -> PhantomSample:
    """Draw one synthetic study; deterministic in (seed, index), the same person at every size.

    Args:
        seed: Non-negative seed of the whole collection.
        index: Non-negative number of the study.
        size: Side of the square image, or (height, width), in pixels.
        with_masks: Also return the masks of lungs, heart and findings.

    Raises:
        ValueError: If seed or index is negative or the size is too small or too elongated.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"Seed and index of a phantom must not be negative, got seed {seed} and index {index}.")
    height, width = _check_size(size)
    body = sample_body(Dice(np.random.default_rng([seed, 0, subject_index(seed, index)]), 64))
    rng = np.random.default_rng([seed, 1, index])
    dice = Dice(rng)
    pose = sample_pose(dice)
    findings, thorax = sample_findings(dice, body, pose)
    bubble = None
    if dice.chance(0.55):
        dome = thorax.domes[1]
        bubble = (dice.uniform(0.13, 0.19), dome + 0.075, dice.uniform(0.03, 0.055), dice.uniform(0.022, 0.035))
        if any(f.category == "Pleural effusion" and f.side == 1 and f.severity == 2 for f in findings):
            bubble = None

    _keep_on_film(pose, [outline for finding in findings for outline in finding.outlines])
    matrix, offset = pose.matrix(height, width)
    visible = pose.visible(height, width)

    outlines = [*thorax.anatomy_outlines(), *(outline for finding in findings for outline in finding.outlines)]
    all_boxes, shares = clip_boxes_to_frame(hull_boxes(outlines, matrix, offset), visible)
    present = shares[: len(ANATOMY_NAMES)] >= MIN_ANATOMY_SHARE
    boxes = np.where(present[:, None], all_boxes[: len(ANATOMY_NAMES)], 0.0).astype(np.float32)
    finding_boxes = iter(all_boxes[len(ANATOMY_NAMES) :].tolist())

    labels = np.zeros((len(ANATOMY_NAMES), len(PHANTOM_CLASSES)), dtype=np.int8)
    class_labels = np.zeros(len(PHANTOM_CLASSES), dtype=np.int8)
    phrases, objects = [], []
    for finding in findings:
        phrase = finding_phrase(finding, dice)
        phrases.append(phrase)
        class_labels[_CLASS_INDEX[finding.category]] = 1
        for region in finding.regions:
            if present[region]:
                labels[region, _CLASS_INDEX[finding.category]] = 1
        for _ in finding.outlines:
            objects.append(
                PhantomObject(
                    box=tuple(next(finding_boxes)),
                    category=finding.category,
                    side=SIDE_NAMES.get(finding.side, ""),
                    severity=SEVERITY_WORDS[finding.category][finding.severity],
                    phrase=phrase,
                )
            )
    heart_ratio = (thorax.heart_right + thorax.heart_left) / sum(thorax.widths.values())
    facts = Facts(heart_ratio, bubble is not None, body.knob_size, body.spine_sway)
    sentences = report_sentences(findings, phrases, facts, dice)
    anatomy_sentences: list[list[str]] = [[] for _ in ANATOMY_NAMES]
    for region in np.flatnonzero(present).tolist():
        touching = [finding for finding in findings if region in finding.regions]
        anatomy_sentences[region] = region_sentences(region, touching, facts, dice)
    masks: dict[str, np.ndarray] = {}
    image = draw_film(body, pose, thorax, findings, bubble, dice, rng, height, width, masks if with_masks else None)
    return PhantomSample(
        seed=seed,
        index=index,
        image=image,
        view="AP" if pose.anteroposterior else "PA",
        anatomy_boxes=boxes,
        anatomy_present=present,
        anatomy_labels=labels,
        anatomy_sentences=anatomy_sentences,
        objects=objects,
        class_labels=class_labels,
        sentences=sentences,
        heart_ratio=heart_ratio,
        visible_frame=tuple(visible.tolist()),
        masks=masks,
    )


def _keep_on_film(pose: Pose, outlines: list[np.ndarray]) -> None:
    """Move the person towards the middle of the film until every finding is well visible on a square film."""
    if not outlines:
        return
    for _ in range(6):
        matrix, offset = pose.matrix(1000, 1000)
        visible = pose.visible(1000, 1000)
        _, shares = clip_boxes_to_frame(hull_boxes(outlines, matrix, offset), visible)
        if shares.min() >= MIN_FINDING_SHARE:
            return
        pose.shift_x *= 0.5
        pose.shift_y *= 0.5
        pose.angle *= 0.7
        pose.zoom = min(pose.zoom, 0.5 * (pose.zoom + 0.96))
        pose.margins = tuple(0.5 * margin for margin in pose.margins)


def encode_png(image: np.ndarray) -> bytes:
    """PNG bytes of an (H, W) uint8 image."""
    buffer = io.BytesIO()
    # Film noise has no repeats to find: run lengths and Huffman codes alone are faster and even smaller.
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)
    return buffer.getvalue()


def phantom_record(seed: int, index: int, size: int | tuple[int, int] = 128) -> dict:
    """One row of the phantom data set in the common record of all data sets, image as PNG bytes."""
    return sample_to_record(render_phantom(seed, index, size))


def sample_to_record(sample: PhantomSample) -> dict:
    """The common record of a rendered study."""
    study = f"phantom-{sample.seed}-{sample.index:08d}"
    height, width = sample.image.shape
    return {
        "sample_id": study,
        "subject_id": f"phantom-{sample.seed}-p{subject_index(sample.seed, sample.index):08d}",
        "study_id": f"phantom-{sample.seed}-s{sample.index:08d}",
        "image_id": study,
        "image": {"path": None, "bytes": encode_png(sample.image)},
        "height": height,
        "width": width,
        "view": sample.view,
        "sentences": sample.sentences,
        "anatomy_boxes": sample.anatomy_boxes.tolist(),
        "anatomy_present": sample.anatomy_present.tolist(),
        "anatomy_labels": sample.anatomy_labels.tolist(),
        "anatomy_sentences": sample.anatomy_sentences,
        "objects": [
            {"bbox": list(found.box), "category": found.category, "phrase": found.phrase} for found in sample.objects
        ],
        "class_labels": sample.class_labels.tolist(),
    }


def phantom_features() -> datasets.Features:
    """Features of the common record with the phantom's eight classes."""
    return record_features(PHANTOM_CLASSES)


@lru_cache(maxsize=1)
def generator_fingerprint() -> str:
    """Digest of everything that decides what is drawn and written: version and source of the phantom's modules."""
    digest = hashlib.sha256(GENERATOR_VERSION.encode())
    for path in sorted(Path(__file__).parent.glob("phantom*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass
class PhantomConfig(datasets.BuilderConfig):
    """What to draw.

    Args:
        seed: Seed of the collection.
        image_size: Side of the square images in pixels.
        num_train, num_validation, num_test: Images per split; a split of 0 images is left out.
        generator: Fingerprint of the drawing code, set by the builder, so that a change of the code is a new build.

    Raises:
        ValueError: For a size below 64, negative counts, a negative seed, or no images at all.
    """

    name: str = "default"
    seed: int = 7
    image_size: int = 128
    num_train: int = 8000
    num_validation: int = 400
    num_test: int = 800
    generator: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("seed", "image_size", "num_train", "num_validation", "num_test"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"PhantomConfig.{key} must be an integer, got {value!r}.")
        if self.seed < 0:
            raise ValueError(f"PhantomConfig.seed must not be negative, got {self.seed}.")
        if self.image_size < MIN_SIZE:
            raise ValueError(
                f"PhantomConfig.image_size must be at least {MIN_SIZE} pixels, got {self.image_size}: smaller images "
                "cannot show the findings."
            )
        counts = self.split_sizes()
        for split, count in counts.items():
            if not 0 <= count <= MAX_SPLIT_SIZE:
                raise ValueError(f"PhantomConfig.num_{split} must lie between 0 and {MAX_SPLIT_SIZE:,}, got {count}.")
        if not any(counts.values()):
            raise ValueError("PhantomConfig asks for no images: set num_train, num_validation or num_test above 0.")

    def split_sizes(self) -> dict[str, int]:
        """Split name -> number of images."""
        return {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}


class PhantomChestXray(datasets.GeneratorBasedBuilder):
    """Builder of the phantom data set (construct it in Python; there is nothing to download).

    Example:
        >>> builder = PhantomChestXray(num_train=100, num_validation=0, num_test=20, cache_dir="phantom")
        >>> builder.download_and_prepare(num_proc=2)
        >>> train = builder.as_dataset(split="train")
    """

    BUILDER_CONFIG_CLASS = PhantomConfig
    BUILDER_CONFIGS = [PhantomConfig(name="default")]
    DEFAULT_CONFIG_NAME = "default"
    VERSION = datasets.Version(GENERATOR_VERSION)
    DEFAULT_WRITER_BATCH_SIZE = 200

    def __init__(self, *args: object, **kwargs: object) -> None:
        # Only arguments that are passed enter the identity of the cache.
        kwargs.setdefault("generator", generator_fingerprint())
        super().__init__(*args, **kwargs)
        # `datasets` sets the fields of a copied configuration one by one, past its own check.
        self.config.__post_init__()

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Synthetic chest radiographs with exact boxes, labels and reports. Not from patients.",
            features=phantom_features(),
        )

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        config = self.config
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={"starts": starts, "seed": config.seed, "size": config.image_size, "end": end},
            )
            for split, count in config.split_sizes().items()
            if count
            for starts, end in [_blocks(SPLIT_OFFSETS[split], count)]
        ]

    def _generate_examples(self, starts: list[int], seed: int, size: int, end: int):
        for start in starts:
            for index in range(start, min(start + _BLOCK, end)):
                yield index, phantom_record(seed, index, size)


# Images per unit of work; `datasets` hands lists of units to its processes.
_BLOCK = 50


def _blocks(offset: int, count: int) -> tuple[list[int], int]:
    return list(range(offset, offset + count, _BLOCK)), offset + count


def phantom_datasets(cache_dir: str | Path, num_proc: int | None = None, **config: object) -> datasets.DatasetDict:
    """Build the phantom, or reuse an existing build of the same configuration, and open all splits.

    Args:
        cache_dir: Folder of the Arrow files.
        num_proc: Processes for building.
        config: Fields of `PhantomConfig`.
    """
    builder = PhantomChestXray(cache_dir=str(cache_dir), **config)
    done = Path(builder.cache_dir).is_dir()
    if done:
        logger.info("Reusing the phantom in %s.", builder.cache_dir)
    else:
        logger.info("Building the phantom in %s.", builder.cache_dir)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset()
