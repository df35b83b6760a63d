"""Verification of a raw download before hours are spent on it: every problem at once, not the first."""

import hashlib
import os
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from pathlib import Path

from tqdm.auto import tqdm

from training.data import builder_class
from training.data.download import CHECKSUMS, read_checksums
from training.data.raw import (
    SKIP_HINT,
    DroppedRecord,
    RawBuilder,
    RejectedRecord,
    builder_options,
    is_missing,
    login_page_hint,
    read_bytes,
)


SEVERITIES = ("error", "warning", "info")
_EXAMPLES = 5
# Levels above the root of a source in which the list of checksums is looked for.
_LEVELS_ABOVE = 2
_SEARCHED_FILES = 50_000


@dataclass(frozen=True)
class Problem:
    """
    Attributes:
        severity: "error" if something is missing, damaged or contradictory, "warning" for what was allowed, "info".
        path: File or folder that it is about.
        message: One paragraph with the remedy.
    """

    severity: str
    path: str
    message: str


@dataclass(frozen=True)
class PublishedCount:
    """What was found of something beside what its publishers state: fewer are no mistake, if only a part is wanted."""

    what: str
    found: int
    published: int


@dataclass
class RawCheck:
    """
    Result of `check_raw`.

    Attributes:
        name: Data set.
        problems: All that was found, errors first.
        sources: Short name -> root of each raw download that was found.
        counts: Beside the published ones.
        funnel: Images left after each filter, one line for each split.
        images, missing: Images that the tables ask for, and those of them without a file.
        checksums: Files whose checksum was compared.
        decoded: Images of the sample that were decoded and whose records were made.
        left_out: Images of the sample that the rules of the paper leave out.
    """

    name: str
    problems: list[Problem] = field(default_factory=list)
    sources: dict[str, Path] = field(default_factory=dict)
    counts: list[PublishedCount] = field(default_factory=list)
    funnel: str = ""
    images: int = 0
    missing: int = 0
    checksums: int = 0
    decoded: int = 0
    left_out: int = 0

    @property
    def ok(self) -> bool:
        """No errors."""
        return not any(problem.severity == "error" for problem in self.problems)

    def __str__(self) -> str:
        return "\n".join(check_lines(self))

    def add(self, severity: str, path: object, message: str) -> None:
        self.problems.append(Problem(severity, str(path), " ".join(message.split())))


def _all(items: Mapping[str, Sequence[dict]]) -> list[dict]:
    return [item for of_split in items.values() for item in of_split]


def _phrases(items: Mapping[str, Sequence[dict]]) -> int:
    return sum(len({(row["category_name"], row["label_text"]) for row in item["boxes"]}) for item in _all(items))


# Data set -> what its publishers count, how many, and how many there are by (items of each split, filter counts).
_Items, _Counts = Mapping[str, Sequence[dict]], Mapping[str, Mapping[str, int]]
_PUBLISHED: dict[str, list[tuple[str, int, Callable[[_Items, _Counts], int]]]] = {
    "mimic-cxr": [
        ("images in the metadata", 377_110, lambda items, counts: sum(split["images"] for split in counts.values())),
    ],
    "chest-imagenome": [("scene graphs", 242_072, lambda items, counts: counts["scene graphs"]["files"])],
    "ms-cxr": [("pairs of image and phrase", 1_162, lambda items, counts: _phrases(items))],
    "vindr-cxr": [
        ("images of the training split", 15_000, lambda items, counts: counts["train"]["images"]),
        (
            "images of the test split (validation and test here)",
            3_000,
            lambda items, counts: counts["validation"]["images"] + counts["test"]["images"],
        ),
    ],
    "nih-cxr14": [
        ("images with boxes", 880, lambda items, counts: sum(bool(item["boxes"]) for item in _all(items))),
        ("boxes", 984, lambda items, counts: sum(len(item["boxes"] or ()) for item in _all(items))),
    ],
}


def check_raw(
    name: str,
    *,
    data_dir: str | Path | None = None,
    checksums: bool = False,
    sample: int = 20,
    progress: bool = True,
    **options: object,
) -> RawCheck:
    """
    Verifies a raw download: are its parts found and their tables and archives readable with the right columns, are
    the images there that the tables ask for, do checksums match where they were published and downloaded, and do a
    few images and their records decode.

    Args:
        name: Data set by its name on the command line.
        data_dir: Folder that all sources are below; see also `options` and the environment variables of the sources.
        checksums: Compare those of the images too, which reads all of them; those of tables are compared anyway.
        sample: How many images to decode, drawn with a fixed seed.
        progress: Show bars, if there is a terminal.
        options: Fields of the builder's configuration, such as `jpg_dir` or `missing`.

    Raises:
        ValueError: Unknown data set or option. What is wrong with the data is in the result instead.
    """
    cls = builder_class(name)
    config = {key for key in (item.name for item in fields(cls.BUILDER_CONFIG_CLASS)) if key.endswith("_dir")}
    config = (config - {"data_dir"}) | set(builder_options(cls))
    if unknown := set(options) - config:
        raise ValueError(
            f"{cls.TITLE} has no option {', '.join(sorted(unknown))}. Known: {', '.join(sorted(config))}."
        )
    options = {key: value for key, value in options.items() if value is not None}
    if data_dir is not None:
        options["data_dir"] = str(data_dir)

    check = RawCheck(cls.DATASET)
    with tempfile.TemporaryDirectory() as cache:
        builder = _construct(cls, check, options, cache)
        tables = builder.table_files() if builder else _files_like_tables(check.sources.values())
        _check_tables(check, tables)
        items = _read_items(check, builder) if builder else {}
        present = _check_images(check, builder, items) if items else []
        _check_checksums(check, tables, present if checksums else [], progress)
        if builder and present:
            _check_sample(check, builder, present, sample, progress)
    check.problems.sort(key=lambda problem: SEVERITIES.index(problem.severity))
    return check


def _construct(cls: type[RawBuilder], check: RawCheck, options: Mapping[str, object], cache: str) -> RawBuilder | None:
    """The builder, or None with all sources that are missing among the problems."""
    try:
        builder = cls(cache_dir=cache, **options)
    except (FileNotFoundError, ValueError) as error:
        failure = error
    else:
        check.sources = dict(builder.folders)
        _note_nesting(check, cls, options)
        return builder
    for source in cls.SOURCES:
        if source.key == "report" and options.get("reports") is False:
            continue
        probe = object.__new__(cls)  # looks for one source: a builder stops at the first that is missing
        probe.SOURCES = (source,)
        try:
            check.sources |= probe._find_sources(dict(options))
        except (FileNotFoundError, ValueError) as error:
            check.add("error", options.get(f"{source.key}_dir") or options.get("data_dir") or source.title, str(error))
    if not check.problems:  # all of them are there, but not complete
        check.add("error", next(iter(check.sources.values()), ""), str(failure))
    return None


def _note_nesting(check: RawCheck, cls: type[RawBuilder], options: Mapping[str, object]) -> None:
    for source in cls.SOURCES:
        given = options.get(f"{source.key}_dir") or options.get("data_dir") or os.environ.get(source.variable)
        if source.key in check.sources and given and Path(str(given)).resolve() != check.sources[source.key]:
            check.add("info", check.sources[source.key], f"{source.title} was found here, below {given}.")


def _files_like_tables(roots: Iterable[Path]) -> list[Path]:
    """Tables and archives below roots, for a download that is too incomplete for its builder."""
    patterns = ("*.csv", "*.csv.gz", "*.zip", "*/*.csv")
    return sorted({path for root in roots for pattern in patterns for path in root.glob(pattern)})


def _check_tables(check: RawCheck, tables: Iterable[Path]) -> None:
    """Empty files, web pages in place of data, archives that are cut off."""
    for path in tables:
        if not path.is_file():
            continue
        try:
            if path.suffix == ".zip":
                _check_archive(path)
            else:
                read_bytes(path)
        except (ValueError, OSError) as error:
            check.add("error", path, str(error))


def _check_archive(path: Path) -> None:
    """
    Raises:
        ValueError: The archive has no directory, which stands at its end, or one of three members is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            for name in {names[0], names[len(names) // 2], names[-1]} if names else ():
                archive.read(name)
    except Exception as error:  # damaged archives raise nearly anything
        with open(path, "rb") as stream:
            head = stream.read(512).lstrip()
        if head[:1] == b"<":
            raise ValueError(f"{path} {login_page_hint()}") from error
        raise ValueError(f"{path} is truncated or damaged ({error}): download it again.") from error
    if not names:
        raise ValueError(f"{path} is an archive without files: download it again.")


def _read_items(check: RawCheck, builder: RawBuilder) -> dict[str, list[dict]]:
    try:
        items = builder.items()
    except (ValueError, OSError) as error:
        known = {problem.path for problem in check.problems if problem.severity == "error"}
        if not any(path and path in str(error) for path in known):  # else a table that was found unreadable before
            check.add("error", next(iter(builder.folders.values())), str(error))
        return {}
    check.funnel = builder.funnel()
    check.images = sum(map(len, items.values()))
    for what, published, count in _PUBLISHED.get(check.name, ()):
        check.counts.append(PublishedCount(what, count(items, builder.counts), published))
    return items


def _check_images(check: RawCheck, builder: RawBuilder, items: Mapping[str, Sequence[dict]]) -> list[dict]:
    """The items whose image is there."""
    present, missing = [], []
    for split, of_split in items.items():
        absent = [item for item in of_split if is_missing(item["image_path"])]
        gone = {item["sample_id"] for item in absent}
        present += [item for item in of_split if item["sample_id"] not in gone]
        missing += absent
        if absent:
            ids = ", ".join(item["sample_id"] for item in absent[:_EXAMPLES])
            check.add(
                "warning" if builder.config.missing == "skip" else "error",
                absent[0]["image_path"],
                f"{len(absent):,} of {len(of_split):,} images of the {split} split have no file, such as {ids}; the "
                f"first should be {absent[0]['image_path']}. Complete the files. "
                f"{SKIP_HINT}",
            )
    check.missing = len(missing)
    partial = sum(Path(f"{item['image_path']}.partial").is_file() for item in missing)
    if partial:
        check.add("info", missing[0]["image_path"], f"{partial:,} of the missing images are partly downloaded.")
    if missing and not present:
        name = Path(missing[0]["image_path"]).name
        for root in builder.folders.values():
            if (found := _look_for(root, name)) is not None:
                check.add(
                    "error",
                    found,
                    f"No image is where it should be, but {found} was found instead of {missing[0]['image_path']}: "
                    "the folders are nested otherwise than in the release. Move them.",
                )
    return present


def _look_for(root: Path, name: str) -> Path | None:
    """A file of this name at or below a folder, within the first so many files."""
    seen = 0
    for folder, _, files in os.walk(root):
        if name in files:
            return Path(folder, name)
        seen += len(files)
        if seen > _SEARCHED_FILES:
            break
    return None


def _check_checksums(check: RawCheck, tables: Iterable[Path], images: Sequence[dict], progress: bool) -> None:
    lists = {}
    for root in check.sources.values():
        for folder in (root, *list(root.parents)[:_LEVELS_ABOVE]):
            if (folder / CHECKSUMS).is_file():
                lists[folder] = folder / CHECKSUMS
                break
    paths = [path.resolve() for path in tables if path.is_file()]
    paths += [Path(item["image_path"]) for item in images]
    # Each file belongs to the innermost list above it.
    by_list: dict[Path, list[Path]] = {folder: [] for folder in lists}
    for path in paths:
        folder = next((parent for parent in path.parents if parent in lists), None)
        if folder is not None:
            by_list[folder].append(path)
    expected: list[tuple[Path, str]] = []
    for folder, members in by_list.items():
        names = {path.relative_to(folder).as_posix(): path for path in members}
        digests = read_checksums(lists[folder], names)
        expected += [(names[name], digest) for name, digest in digests.items()]
    if not expected and check.sources:
        check.add(
            "info",
            next(iter(check.sources.values())),
            f"There is no {CHECKSUMS} beside the data, so that contents were not compared with published checksums.",
        )
    with ThreadPoolExecutor(4) as pool:
        digests = pool.map(_sha256, (path for path, _ in expected))
        bar = tqdm(
            zip(expected, digests, strict=True),
            total=len(expected),
            desc="Comparing checksums",
            unit="file",
            disable=None if progress else True,
            leave=False,
        )
        wrong = [path for (path, digest), found in bar if found != digest]
    check.checksums = len(expected)
    for path in wrong[:_EXAMPLES]:
        check.add(
            "error", path, f"{path} does not match its checksum in {CHECKSUMS}: delete it and download it again."
        )
    if len(wrong) > _EXAMPLES:
        check.add(
            "error", wrong[_EXAMPLES], f"{len(wrong):,} files in all do not match their checksums; five are listed."
        )


def _sha256(path: Path) -> str | None:
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError:  # cannot be read: certainly no match
        return None


def _check_sample(check: RawCheck, builder: RawBuilder, present: Sequence[dict], size: int, progress: bool) -> None:
    chosen = random.Random(0).sample(list(present), min(size, len(present)))
    for item in tqdm(chosen, desc="Decoding a sample", unit="image", disable=None if progress else True, leave=False):
        path = item["image_path"]
        try:
            builder.record(item)
            builder.load_image(path)
            check.decoded += 1
        except DroppedRecord:
            check.left_out += 1
        except RejectedRecord as error:
            check.add("error", path, f"{item['sample_id']} ({path}) cannot be used: {error}.")
        except Exception as error:  # damaged files raise nearly anything
            check.add("error", path, f"{item['sample_id']} ({path}) cannot be read ({type(error).__name__}: {error}).")


def check_lines(check: RawCheck) -> list[str]:
    """The result as lines of text for a terminal."""
    lines = [f"{check.name}: {'no errors' if check.ok else 'not usable as it is'}"]
    lines += [f"  found {key}: {folder}" for key, folder in check.sources.items()]
    lines += [f"  {line}" for line in check.funnel.splitlines()]
    for count in check.counts:
        difference = "as published" if count.found == count.published else f"published: {count.published:,}"
        lines.append(f"  {count.found:,} {count.what} ({difference})")
    if check.images:
        lines.append(f"  {check.images - check.missing:,} of {check.images:,} image files are there")
    if check.checksums:
        lines.append(f"  {check.checksums:,} files compared with their published checksums")
    if check.decoded or check.left_out:
        left_out = f", {check.left_out:,} left out by the rules of the paper" if check.left_out else ""
        lines.append(f"  {check.decoded:,} images of a sample decoded{left_out}")
    lines += [f"{problem.severity}: {problem.message}" for problem in check.problems]
    return lines


__all__ = ["Problem", "PublishedCount", "RawCheck", "check_lines", "check_raw"]
