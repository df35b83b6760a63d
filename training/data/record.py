"""The common record: one row for one image, the same columns for every data set."""

from collections.abc import Sequence

import datasets


VIEWS = ("PA", "AP")


def record_features(classes: Sequence[str]) -> datasets.Features:
    """
    Features of the common record of a data set with the given finding classes.

    A column that a data set does not annotate is None; an empty list says that it does and that nothing was found.

    - `sample_id`, `subject_id`, `study_id`, `image_id`: strings, the first unique.
    - `image`: the radiograph; `height`, `width`: size of the original in pixels. Prepared data hold a smaller image
      of the same proportions, and boxes stay in pixels of the original.
    - `view`: PA or AP, -1 if unknown.
    - `sentences`: of the report.
    - `anatomy_boxes` (29, 4), `anatomy_present` (29): pixels xyxy, zeros where absent; `anatomy_labels` (29, C): 1
      present, 0 absent or not mentioned; `anatomy_sentences`: one list for each region.
    - `objects`: boxes of findings in pixels xyxy, each with its class and what is written about it ("" for nothing).
    - `class_labels` (C): of the whole image; 1 present, 0 absent or not mentioned.
    """
    # Lists of regions have no fixed length in the schema: of fixed lists within fixed lists, pyarrow 26 mixes up the
    # values when a shuffled stream takes rows from several tables.
    string = datasets.Value("string")
    box = datasets.List(datasets.Value("float32"), length=4)
    # Arrow has no lists of fixed length 0; without classes the columns of labels are None.
    labels = datasets.List(datasets.Value("int8"), length=max(len(classes), 1))
    return datasets.Features(
        {
            "sample_id": string,
            "subject_id": string,
            "study_id": string,
            "image_id": string,
            "image": datasets.Image(),
            "height": datasets.Value("int32"),
            "width": datasets.Value("int32"),
            "view": datasets.ClassLabel(names=list(VIEWS)),
            "sentences": datasets.List(string),
            "anatomy_boxes": datasets.List(box),
            "anatomy_present": datasets.List(datasets.Value("bool")),
            "anatomy_labels": datasets.List(labels),
            "anatomy_sentences": datasets.List(datasets.List(string)),
            "objects": datasets.List(
                {"bbox": box, "category": datasets.ClassLabel(names=list(classes)), "phrase": string}
            ),
            "class_labels": labels,
        }
    )


_COLUMNS = tuple(record_features(["none"]))


def empty_record(**known: object) -> dict:
    """A record with the given columns, in which nothing else is annotated."""
    record = dict.fromkeys(_COLUMNS) | {"view": -1}
    if unknown := set(known) - set(record):
        raise ValueError(f"The common record has no columns {sorted(unknown)}.")
    return record | known


def record_classes(features: datasets.Features) -> list[str]:
    """The finding classes of a data set in index order, from the features of its records."""
    return list(features["objects"].feature["category"].names)


__all__ = ["VIEWS", "empty_record", "record_classes", "record_features"]
