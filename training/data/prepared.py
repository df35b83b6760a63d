"""Prepared folders: what their manifest says, and opening them as `datasets` objects."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet


FORMAT_VERSION = 1
MANIFEST = "manifest.json"
REJECTED = "rejected.csv"
DATA_FOLDER = "data"


@dataclass(frozen=True)
class PreparedShard:
    """One Parquet file: its path relative to the folder, rows, bytes and SHA-256."""

    file: str
    records: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class PreparedSplit:
    """
    One split.

    Attributes:
        records: Rows of all shards.
        dropped: Reason -> images that the paper's rules left out when their files were read.
        notes: What was left out of records (boxes, labels), and how often.
        rejected: Images with unusable files, listed in rejected.csv.
        shards: Parquet files in order.
    """

    records: int
    dropped: dict[str, int]
    notes: dict[str, int]
    rejected: int
    shards: tuple[PreparedShard, ...]


@dataclass(frozen=True)
class PreparedInfo:
    """
    The manifest of a prepared folder.

    Attributes:
        dataset, title: Name on the command line, and as in messages.
        fingerprint: Of everything that the folder was made from: raw files, options, size, version of the code.
        size: Shorter side of the images in pixels; smaller originals keep their size.
        image_format: Of the images: PGM, PNG or JPEG.
        options: Of the builder.
        classes: Finding classes in index order.
        filters: Split or table -> images left after each filter of the tables, in the order of the filters.
        made_with: Versions of the libraries that decoded and wrote.
    """

    dataset: str
    title: str
    fingerprint: str
    size: int
    image_format: str
    options: dict[str, object]
    classes: tuple[str, ...]
    filters: dict[str, dict[str, int]]
    splits: dict[str, PreparedSplit]
    made_with: dict[str, str]

    @property
    def shards(self) -> list[PreparedShard]:
        """Of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    @property
    def content(self) -> str:
        """Digest of all shards: the same for equal data, wherever and whenever they were made."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.file}:{shard.sha256}\n".encode())
        return digest.hexdigest()[:16]

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT_VERSION, **asdict(self)}, indent=1, ensure_ascii=False) + "\n"


def is_prepared(folder: str | Path) -> bool:
    """Whether a folder has a manifest."""
    return (Path(folder) / MANIFEST).is_file()


def read_info(folder: str | Path) -> PreparedInfo:
    """
    The manifest of a prepared folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another format version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        reason = "has no manifest.json" if Path(folder).is_dir() else "does not exist"
        raise FileNotFoundError(f"{folder} is no prepared folder: it {reason}. 'chex data prepare' makes one.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        version = values.pop("format")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{path} has the format version {version}, but this version reads {FORMAT_VERSION}: prepare the data "
                "again."
            )
        splits = {
            name: PreparedSplit(**split | {"shards": tuple(PreparedShard(**shard) for shard in split["shards"])})
            for name, split in values.pop("splits").items()
        }
        return PreparedInfo(**values | {"splits": splits, "classes": tuple(values["classes"])})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error}): prepare the data again.") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_folder(folder: str | Path, info: PreparedInfo, *, hashes: bool = False) -> None:
    """
    Compare the shards with the manifest: presence and size, which takes no time, and with `hashes` their content.

    Raises:
        FileNotFoundError: A shard is missing.
        ValueError: A shard has another size or content.
    """
    remedy = "Copy the folder again, or prepare the data again with --overwrite."
    for shard in info.shards:
        path = Path(folder) / shard.file
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing although the manifest lists it. {remedy}")
        size = path.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"{path} has {size:,} bytes where the manifest says {shard.bytes:,}. {remedy}")
        if hashes and file_sha256(path) != shard.sha256:
            raise ValueError(f"{path} is damaged: its SHA-256 is not that of the manifest. {remedy}")


def open_prepared(
    folder: str | Path,
    split: str | None = None,
    streaming: bool = False,
    cache_dir: str | Path | None = None,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict:
    """
    Open a prepared folder.

    The map-style form is memory-mapped from an Arrow copy in the cache of `datasets`, which is made once for each
    content of the folder. The streaming form reads the Parquet files themselves: no second copy, and each file is a
    shard that `split_dataset_by_node` and the workers of a `DataLoader` share out.

    Args:
        split: One split, or None for all of them as a dict.
        cache_dir: Of the Arrow copy; default: the cache of `datasets`.
        num_proc: Processes that make the Arrow copy.

    Raises:
        FileNotFoundError: The folder has no manifest, or a shard is missing.
        ValueError: An unknown split, a shard of the wrong size, or a damaged manifest.
    """
    folder = Path(folder).absolute()
    info = read_info(folder)
    check_folder(folder, info)
    if split is not None and split not in info.splits:
        raise ValueError(f"{folder} has no split {split!r}. It has: {', '.join(info.splits)}.")
    files = {
        name: DataFilesList(
            [str(folder / shard.file) for shard in part.shards], [(shard.sha256,) for shard in part.shards]
        )
        for name, part in info.splits.items()
    }
    builder = Parquet(
        cache_dir=cache_dir and str(cache_dir),
        dataset_name=info.dataset,
        # The place in the cache: of the content, so that a rebuilt folder never meets an old copy.
        config_id=info.content,
        data_files=DataFilesDict(files),
    )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare(num_proc=num_proc)
    return builder.as_dataset(split=split)


__all__ = [
    "FORMAT_VERSION",
    "PreparedInfo",
    "PreparedShard",
    "PreparedSplit",
    "check_folder",
    "file_sha256",
    "is_prepared",
    "open_prepared",
    "read_info",
]
