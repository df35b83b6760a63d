"""Records in memory: boxes, texts and images of the phantom as the training loop gets them."""

from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from processing_chex import ChexImageProcessor
from processing_chex.image_loading import load_image
from processing_chex.vocabulary import ANATOMY_NAMES, PHANTOM_CLASSES
from training.collate import Batch, RecordDataset, TextTable, first, normalised_boxes
from training.data.phantom import phantom_datasets, phantom_features, phantom_record


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A real build of the phantom, the way training reads it."""
    return phantom_datasets(
        tmp_path_factory.mktemp("phantom"), seed=5, image_size=80, num_train=24, num_validation=8, num_test=8
    )["train"]


@pytest.fixture(scope="module", params=[(96, 128), (128, 88)], ids=["wide", "tall"])
def oblong(request):
    rows = [phantom_record(5, index, size=request.param) for index in range(10)]
    return datasets.Dataset.from_list(rows, features=phantom_features())


@pytest.fixture(scope="module")
def read(square):
    texts = TextTable()
    return RecordDataset(square, ChexImageProcessor(size=64), texts), texts


def undo(boxes, frame):
    """Pixel xyxy (..., 4) of normalised cxcywh boxes (..., 4) in a frame (4,)."""
    x0, y0, x1, y1 = frame
    size = np.array([x1 - x0, y1 - y0])
    centre, half = boxes[..., :2] * size + (x0, y0), boxes[..., 2:] * size / 2
    return np.concatenate([centre - half, centre + half], -1)


def clipped(boxes, frame):
    """Pixel boxes cut off at the frame, and the share of their area that is left."""
    x0, y0, x1, y1 = frame
    inside = np.stack(
        [
            boxes[..., 0].clip(x0, x1),
            boxes[..., 1].clip(y0, y1),
            boxes[..., 2].clip(x0, x1),
            boxes[..., 3].clip(y0, y1),
        ],
        -1,
    )
    area = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return inside, (inside[..., 2:] - inside[..., :2]).prod(-1) / np.maximum(area, 1e-9)


def check_geometry(records, dataset, image_processor):
    """Boxes of the arrays, taken back to pixels, are the record's, cut off at the frame."""
    compared = 0
    for row, item in zip(records, dataset, strict=True):
        frame = image_processor.frame(row["height"], row["width"])
        expected, share = clipped(np.array(row["anatomy_boxes"]), frame)
        present = np.array(row["anatomy_present"]) & (share >= 0.1)
        assert np.array_equal(item.anatomy_present[0].numpy(), present)
        found = undo(item.anatomy_boxes[0].numpy(), frame)
        assert np.abs(found - expected)[present].max() <= 0.5
        assert (item.anatomy_boxes[0].numpy()[~present] == 0).all()
        seen = dict.fromkeys(range(len(PHANTOM_CLASSES)), 0)
        for thing in row["objects"]:
            box, share = clipped(np.array(thing["bbox"]), frame)
            if share < 0.1:
                continue
            slot = (0, thing["category"], seen[thing["category"]])
            seen[thing["category"]] += 1
            assert item.class_box_mask[slot]
            assert np.abs(undo(item.class_boxes[slot].numpy(), frame) - box).max() <= 0.5
            compared += 1
        assert item.class_box_mask[0].sum(1).tolist() == list(seen.values())
    assert compared > 5


def check_ranges(dataset):
    for name in ("anatomy_boxes", "class_boxes"):
        boxes = dataset.arrays[name]
        corners = np.concatenate([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
        assert boxes.dtype == np.float32
        assert corners.min() >= -1e-6
        assert corners.max() <= 1 + 1e-6
        mask = dataset.arrays["anatomy_present" if name == "anatomy_boxes" else "class_box_mask"]
        assert (boxes[..., 2:][mask] > 0).all()
        assert (boxes[~mask] == 0).all()


def test_geometry_of_square_records(square, read):
    dataset, _ = read
    check_ranges(dataset)
    check_geometry(square, dataset, ChexImageProcessor(size=64))


@pytest.mark.parametrize("geometry", ["center_crop", "letterbox"])
def test_geometry_of_oblong_records(oblong, geometry):
    image_processor = ChexImageProcessor(size=64, geometry=geometry)
    dataset = RecordDataset(oblong, image_processor, TextTable())
    check_ranges(dataset)
    check_geometry(oblong, dataset, image_processor)


def test_a_crop_hides_boxes_that_a_letterbox_shows(oblong):
    cropped, whole = (
        RecordDataset(oblong, ChexImageProcessor(size=64, geometry=geometry), TextTable()).arrays["anatomy_boxes"]
        for geometry in ("center_crop", "letterbox")
    )
    recorded = np.array(oblong["anatomy_present"]).sum()
    assert (whole[..., 2] > 0).sum() == recorded
    assert (cropped[..., 2] > 0).sum() <= recorded
    # the square of the letterbox is larger, so everything in it is smaller
    assert (whole[..., 2:].prod(-1) <= cropped[..., 2:].prod(-1) + 1e-6)[cropped[..., 2] > 0].mean() > 0.9


def test_images_are_the_processors(square, read):
    """Training and inference see the same pixels, up to the eight bits in which they are kept."""
    dataset, _ = read
    image_processor = ChexImageProcessor(size=64)
    for index in range(4):
        pixel_values = image_processor(square[index]["image"], return_tensors="np")["pixel_values"][0]
        grey = pixel_values[0] * image_processor.image_std + image_processor.image_mean
        assert np.abs(grey - dataset.arrays["images"][index, 0] / 255).max() <= 0.5 / 255 + 1e-5


def test_images_of_the_same_size_are_kept(square):
    dataset = RecordDataset(square, ChexImageProcessor(size=80), TextTable())
    for index in range(4):
        assert np.abs(load_image(square[index]["image"]) * 255 - dataset.arrays["images"][index, 0]).max() <= 0.5


def test_texts_and_labels_round_trip(square, read):
    dataset, table = read
    texts = table.texts
    assert len(set(texts)) == len(texts) == len(table)
    assert all(table.add(text) == index for index, text in enumerate(texts))

    def spell(ids):
        ids = ids.tolist()
        count = sum(index >= 0 for index in ids)
        assert all(index >= 0 for index in ids[:count]), "padding comes last"
        return [texts[index] for index in ids[:count]]

    phrases = 0
    for row, item in zip(square, dataset, strict=True):
        assert spell(item.sentences[0]) == row["sentences"]
        for index in range(len(ANATOMY_NAMES)):
            sentences = row["anatomy_sentences"][index]
            assert spell(item.anatomy_sentences[0, index]) == sentences
            joined = item.anatomy_texts[0, index]
            assert (texts[joined] if joined >= 0 else "") == " ".join(sentences)
        assert item.anatomy_labels[0].tolist() == [[label > 0 for label in region] for region in row["anatomy_labels"]]
        assert item.class_labels[0].tolist() == [label > 0 for label in row["class_labels"]]
        for number in range(len(PHANTOM_CLASSES)):
            written = [thing["phrase"] for thing in row["objects"] if thing["category"] == number]
            assert spell(item.class_phrases[0, number]) == written
            phrases += len(written)
    assert phrases > 5


def test_padding(read):
    arrays = read[0].arrays
    assert (arrays["sentences"] >= 0).any(0).all(), "as wide as the longest report"
    assert (arrays["sentences"] < 0).any()
    assert (arrays["anatomy_sentences"] >= 0).any((0, 1)).all()
    assert arrays["class_box_mask"].any((0, 1)).all(), "as many slots as the most boxes of a class"
    assert (arrays["class_phrases"] >= 0).sum() == arrays["class_box_mask"].sum()


def test_a_table_is_shared_between_splits(square):
    texts = TextTable()
    first_half = RecordDataset(square.select(range(12)), ChexImageProcessor(size=32), texts)
    known = list(texts.texts)
    second_half = RecordDataset(square.select(range(12, 24)), ChexImageProcessor(size=32), texts)
    assert texts.texts[: len(known)] == known
    assert first_half.arrays["sentences"].max() < len(known) <= second_half.arrays["sentences"].max() < len(texts)


def test_images_without_findings_or_sentences():
    rows = [phantom_record(5, index, size=64) for index in range(3)]
    for row in rows[:2]:
        row["objects"], row["sentences"] = [], []
        row["anatomy_sentences"] = [[] for _ in ANATOMY_NAMES]
    records = datasets.Dataset.from_list(rows, features=phantom_features())
    dataset = RecordDataset(records, ChexImageProcessor(size=32), TextTable())
    assert (dataset.arrays["sentences"][:2] == -1).all()
    assert (dataset.arrays["anatomy_texts"][:2] == -1).all()
    assert not dataset.arrays["class_box_mask"][:2].any()
    empty = RecordDataset(records.select([0]), ChexImageProcessor(size=32), TextTable())
    assert empty[0].sentences.shape == (1, 0)
    assert empty[0].class_boxes.shape == (1, len(PHANTOM_CLASSES), 1, 4)


def equal(first_batch, second_batch):
    return all(
        torch.equal(getattr(first_batch, item.name), getattr(second_batch, item.name)) for item in fields(Batch)
    )


def joined(items):
    return Batch(**{item.name: torch.cat([getattr(one, item.name) for one in items]) for item in fields(Batch)})


def test_batches_are_their_items(read):
    dataset, _ = read
    loader = DataLoader(dataset, batch_size=7, collate_fn=first)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [7, 7, 7, 3]
    assert equal(joined(batches), joined([dataset[index] for index in range(len(dataset))]))
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(24))
    assert equal(dataset.__getitems__([3, 0, 3])[0], joined([dataset[3], dataset[0], dataset[3]]))


def test_two_workers_give_the_same_batches(read):
    dataset, _ = read

    def batches(workers):
        return list(
            DataLoader(
                dataset,
                batch_size=7,
                shuffle=True,
                generator=torch.Generator().manual_seed(1),
                collate_fn=first,
                num_workers=workers,
            )
        )

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 4
    assert all(equal(one, other) for one, other in zip(alone, shared, strict=True))
    assert alone[0].index.tolist() != list(range(7))


def test_a_batch_moves_as_a_whole(read):
    batch = read[0][0].to(torch.device("meta"))
    assert all(getattr(batch, item.name).device.type == "meta" for item in fields(Batch))


def test_normalised_boxes():
    frames = np.array([[10.0, 0.0, 110.0, 100.0]], dtype=np.float32)
    boxes = np.array(
        [[[20, 30, 60, 50], [0, 0, 20, 10], [0, 0, 11, 10], [200, 0, 300, 10], [50, 50, 50, 60]]], dtype=np.float32
    )
    found, visible = normalised_boxes(boxes, frames[:, None])
    assert visible.tolist() == [[True, True, True, False, False]]
    np.testing.assert_allclose(found[0, 0], [0.3, 0.4, 0.4, 0.2], atol=1e-6)
    np.testing.assert_allclose(found[0, 1], [0.05, 0.05, 0.1, 0.1], atol=1e-6)
