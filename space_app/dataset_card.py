"""The dataset card of a prepared phantom."""

from pathlib import Path
from typing import Any

from processing_chex.vocabulary import ANATOMY_NAMES
from training.data.preparation import PhantomSource
from training.data.prepared import DATA_FOLDER, PreparedInfo


def dataset_card(folder: str | Path, info: PreparedInfo, repo: str, licence: str | None = None) -> str:
    """README.md of the phantom for the Hub: what it holds, how it was drawn, what it is not for.

    Args:
        folder: Prepared by `chex data prepare phantom`.
        info: Its manifest.
        repo: `USER/NAME`, under which the data are loaded in the example.
        licence: Identifier of the Hub; default apache-2.0, the licence of the program that draws them.
    """
    licence = licence or "apache-2.0"
    options = "\n".join(f"    --option {name}={_written(value)} \\" for name, value in sorted(info.options.items()))
    rows = "\n".join(
        f"| {name} | {split.records:,} | {sum(shard.bytes for shard in split.shards) / 1e6:.1f} MB |"
        for name, split in info.splits.items()
    )
    made = ", ".join(f"{name} {version}" for name, version in info.made_with.items())
    return f"""---
{card_data(info, repo, licence).to_yaml()}
---

# {repo.split("/")[-1]}

Synthetic frontal chest radiographs with everything that ChEX learns from: boxes of 29 anatomical regions with labels
and sentences, boxes of {len(info.classes)} findings with the phrases that describe them, reports, and labels of whole
images. **Every picture is drawn by a program and every text comes from a small grammar. No patient is in it, and it
says nothing about patients.** It is there to test, teach and demonstrate without credentialed data.

```python
from datasets import load_dataset

data = load_dataset("{repo}", split="{next(iter(info.splits))}")
print(data[0]["sentences"], data[0]["objects"])
```

## Content

| split | images | size |
|---|---|---|
{rows}

Images are grey {info.image_format}, at most {info.size} pixels on the shorter side.

- `image`; `height`, `width`: size that the boxes refer to; `view`: PA or AP.
- `sentences`: the report, one sentence each.
- `anatomy_boxes`: x0, y0, x1, y1 in pixels of each region, in the order below; zeros where `anatomy_present` is false.
  `anatomy_labels` (1 or 0 for each finding) and `anatomy_sentences` of each region.
- `objects`: `bbox`, `category` and `phrase` of each finding. `class_labels`: 1 or 0 for each finding,
  of the whole image.
- `sample_id`, `subject_id`, `study_id`, `image_id`: running numbers.

Findings: {", ".join(info.classes)}.

Regions: {", ".join(ANATOMY_NAMES)}.

## How it was made

With `chex-transformers`, an implementation of [ChEX](https://arxiv.org/abs/2404.15770):

```bash
chex data prepare phantom --out phantom --size {info.size} --image-format {info.image_format.lower()} \\
{options.removesuffix(" " + chr(92))}
```

Images depend on the seed alone: the command draws them again, pixel for pixel. Fingerprint of what it was made from:
`{info.fingerprint}`; of the content: `{info.content}`. Made with {made}.

## Intended use

Testing pipelines, teaching, demonstrations. Numbers that a model reaches on it measure the software, not the reading
of radiographs. Not for training, validating or advertising anything that meets patients.

## Limitations

Frontal views alone; few kinds of findings with simple shapes; texts without the abbreviations, errors and uncertainty
of real reports; frequencies that were chosen, not observed; no age, sex or origin.

## Licence

{licence}. There are no personal data in it.
"""


def card_data(info: PreparedInfo, repo: str, licence: str) -> Any:
    """The metadata as `huggingface_hub.DatasetCardData`, with `configs` and `dataset_info`."""
    import datasets
    from huggingface_hub import DatasetCardData

    features = PhantomSource(**info.options).info.features
    splits = datasets.SplitDict()
    for name, split in info.splits.items():
        splits.add(
            datasets.SplitInfo(name, num_bytes=sum(shard.bytes for shard in split.shards), num_examples=split.records)
        )
    size = sum(shard.bytes for shard in info.shards)
    described = datasets.DatasetInfo(features=features, splits=splits, download_size=size, dataset_size=size)
    return DatasetCardData(
        language="en",
        license=licence,
        annotations_creators="machine-generated",
        language_creators="machine-generated",
        source_datasets="original",
        multilinguality="monolingual",
        size_categories=size_category(sum(split.records for split in info.splits.values())),
        task_categories=["object-detection", "zero-shot-object-detection", "image-to-text"],
        pretty_name=repo.split("/")[-1],
        tags=["chex", "chest-x-ray", "radiology", "synthetic"],
        config_names=["default"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": name, "path": f"{DATA_FOLDER}/{name}-*.parquet"} for name in info.splits],
            }
        ],
        dataset_info=described._to_yaml_dict(),
    )


def size_category(records: int) -> str:
    """The Hub's name for a number of records."""
    bounds = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    return next((name for bound, name in bounds if records < bound), "1M<n<10M")


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


__all__ = ["card_data", "dataset_card", "size_category"]
