"""Several data sets in one batch: classes, masks, repeats, mirrored sides, processes and workers, streams."""

import collections
import zlib
from dataclasses import fields

import datasets
import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from processing_chex import ChexImageProcessor
from processing_chex.prompt_sets import class_prompts, merge_prompt_sets, prompts_for_classes
from processing_chex.vocabulary import ANATOMY_NAMES, LATERAL_PARTNERS, PHANTOM_CLASSES, VINDR_CLASSES
from training.collate import (
    Batch,
    MixedDataset,
    RecordDataset,
    RecordReader,
    RecordStream,
    TextTable,
    concatenate,
    first,
    mirror_text,
    occurring_texts,
    repeats_of,
)
from training.data.phantom import encode_png, phantom_features, phantom_record
from training.data.record import empty_record, record_features
from training.transforms import GeometricTransform


SIDE = 32
PROCESSOR = ChexImageProcessor(size=SIDE)


def phantoms(count):
    return datasets.Dataset.from_list(
        [phantom_record(5, n, size=64) for n in range(count)], features=phantom_features()
    )


def readings(count):
    """Records as of VinDr-CXR: labels and boxes of findings, nothing about anatomy, no texts."""
    rng, rows = np.random.default_rng(0), []
    for number in range(count):
        labels = rng.random(len(VINDR_CLASSES)) < 0.2
        objects = []
        for category in labels.nonzero()[0].tolist():
            for _ in range(rng.integers(1, 4)):
                x, y = rng.uniform(0, 60, 2).tolist()
                objects.append({"bbox": [x, y, x + 30, y + 20], "category": category, "phrase": ""})
        image = rng.integers(0, 256, (90, 110), dtype=np.uint8)
        known = {"image": {"bytes": encode_png(image), "path": None}, "height": 90, "width": 110, "objects": objects}
        known |= {"sample_id": f"reading-{number}", "class_labels": labels.astype(np.int8).tolist()}
        rows.append(empty_record(**known))
    return datasets.Dataset.from_list(rows, features=record_features(VINDR_CLASSES))


@pytest.fixture(scope="module")
def parts():
    """Both with the classes of both, read from their records when they are needed."""
    texts = TextTable()
    prompts, places = merge_prompt_sets([prompts_for_classes(names) for names in (PHANTOM_CLASSES, VINDR_CLASSES)])
    options = {"texts": texts, "in_memory": False, "num_classes": len(prompts.names)}
    return [
        RecordDataset(records, PROCESSOR, class_index=index, **options)
        for records, index in zip((phantoms(12), readings(5)), places, strict=True)
    ]


def assert_equal(one, other):
    for item in fields(Batch):
        assert torch.equal(getattr(one, item.name), getattr(other, item.name)), item.name


# --- classes and prompts


def test_prompts_of_several_data_sets():
    merged, places = merge_prompt_sets(
        [prompts_for_classes(names) for names in (PHANTOM_CLASSES, VINDR_CLASSES, PHANTOM_CLASSES, ["Own/finding"])]
    )
    assert len(merged.names) == 8 + 22 + 1
    assert places == [list(range(8)), list(range(8, 30)), list(range(8)), [30]]
    assert merged.names[8:10] == ("vindrcxr/Aortic enlargement", "vindrcxr/Atelectasis")
    assert merged.positive["vindrcxr/ILD"] == class_prompts("vindr").positive["ILD"]
    assert merged.box["phantom/Mass"] == ["Mass"]
    assert (merged.positive["Own/finding"], merged.negative["Own/finding"]) == (
        ["Own or finding"],
        ["No own or finding"],
    )


def test_what_a_data_set_annotates(parts):
    drawn, read = (part.__getitems__(range(4))[0] for part in parts)
    assert drawn.has_sentences.all() and drawn.has_anatomy_boxes.all() and drawn.has_anatomy_sentences.all()
    for has in (drawn.has_class_boxes, drawn.has_class_labels, drawn.has_anatomy_labels):
        assert has[:, :8].all() and not has[:, 8:].any()
    assert not (read.has_sentences.any() or read.has_anatomy_boxes.any() or read.has_anatomy_sentences.any())
    assert not read.has_anatomy_labels.any()
    for has in (read.has_class_boxes, read.has_class_labels):
        assert has[:, 8:].all() and not has[:, :8].any()
    for name in ("anatomy_present", "anatomy_labels", "anatomy_boxes"):
        assert not getattr(read, name).any()
    assert (read.anatomy_texts == -1).all() and read.sentences.shape == (4, 0)


def test_labels_and_boxes_stand_at_their_classes(parts):
    records, dataset = readings(5), parts[1]
    batch = dataset.__getitems__(range(5))[0]
    boxes = 0
    for number, row in enumerate(records):
        assert batch.class_labels[number, 8:].tolist() == [bool(label) for label in row["class_labels"]]
        assert not batch.class_labels[number, :8].any()
        for category in range(len(VINDR_CLASSES)):
            own = [item["bbox"] for item in row["objects"] if item["category"] == category]
            mask = batch.class_box_mask[number, 8 + category]
            assert mask.tolist() == [True] * len(own) + [False] * (len(mask) - len(own))
            for box, found in zip(own, batch.class_boxes[number, 8 + category], strict=False):
                x0, y0, x1, y1 = (np.array(box) - [10, 0, 10, 0]).clip(0, 90) / 90  # the central square
                expected = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
                np.testing.assert_allclose(found, expected, atol=1e-5)
                boxes += 1
    assert boxes > 20


def test_a_box_that_is_cut_away_takes_its_phrase_with_it():
    image = {"bytes": encode_png(np.zeros((40, 80), dtype=np.uint8)), "path": None}
    objects = [
        {"bbox": box, "category": 3, "phrase": phrase}
        for box, phrase in [([0, 0, 19, 9], "gone"), ([30, 0, 50, 20], "here")]
    ]
    row = empty_record(sample_id="a", image=image, height=40, width=80, objects=objects)
    texts = TextTable()
    records = datasets.Dataset.from_list([row], features=record_features(VINDR_CLASSES))
    batch = RecordDataset(records, PROCESSOR, texts)[0]
    assert batch.class_box_mask[0, 3].tolist() == [True]
    assert texts.texts[batch.class_phrases[0, 3, 0]] == "here"


def test_boxes_are_in_pixels_of_the_original_whatever_size_is_stored():
    """A record that holds a smaller copy of its image gives the same boxes."""
    row = phantom_record(5, 3, size=(96, 128))
    small = row | {"height": 960, "width": 1280}
    small["anatomy_boxes"] = (np.array(row["anatomy_boxes"]) * 10).tolist()
    small["objects"] = [item | {"bbox": [10 * edge for edge in item["bbox"]]} for item in row["objects"]]
    records = datasets.Dataset.from_list([row, small], features=phantom_features())
    one, other = (RecordDataset(records, PROCESSOR, TextTable())[index] for index in range(2))
    assert one.class_box_mask.any()
    for name in ("anatomy_boxes", "class_boxes", "images"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), atol=1e-5, rtol=0)


@pytest.mark.parametrize("classes", [["a"], []])
def test_records_without_any_annotation(classes):
    image = {"bytes": encode_png(np.zeros((40, 40), dtype=np.uint8)), "path": None}
    rows = [empty_record(sample_id=str(number), image=image, height=40, width=40) for number in range(3)]
    records = datasets.Dataset.from_list(rows, features=record_features(classes))
    batch = RecordDataset(records, PROCESSOR, TextTable())[1]
    assert batch.class_boxes.shape == (1, len(classes), 1, 4)
    for item in fields(Batch):
        if item.name.startswith("has_"):
            assert not getattr(batch, item.name).any(), item.name


# --- reading


def test_reading_on_demand_gives_what_is_kept_in_memory():
    records, texts = phantoms(12), TextTable()
    kept, lazy = (RecordDataset(records, PROCESSOR, texts, in_memory) for in_memory in (True, False))
    for indices in ([3], [0, 7, 7, 2], list(range(12))):
        one, other = kept.__getitems__(indices)[0], lazy.__getitems__(indices)[0]
        for item in fields(Batch):
            expected, found = getattr(one, item.name), getattr(other, item.name)
            window = tuple(slice(size) for size in found.shape)  # padded to the longest of the batch, not of the split
            assert torch.equal(expected[window], found), item.name
            assert (expected > 0).sum() == (found > 0).sum()


def test_a_larger_side_than_the_network_input():
    dataset = RecordDataset(phantoms(2), PROCESSOR, TextTable(), side=48)
    assert dataset[0].images.shape == (1, 1, 48, 48)


def test_joining_batches_pads_them(parts):
    drawn, read = (part.__getitems__([0, 1])[0] for part in parts)
    joined = concatenate([drawn, read])
    for item in fields(Batch):
        for rows, source in ((slice(0, 2), drawn), (slice(2, 4), read)):
            value = getattr(source, item.name)
            window = (rows, *(slice(size) for size in value.shape[1:]))
            assert torch.equal(getattr(joined, item.name)[window], value), item.name
    assert (joined.sentences[2:] == -1).all()


def test_texts_as_often_as_they_occur(parts):
    texts = parts[0].reader.texts.texts
    rows = phantoms(12)
    written = [text for row in rows["sentences"] for text in row]
    regions = [region for row in rows["anatomy_sentences"] for region in row if region]
    mixed = MixedDataset(parts, [3, 1])
    spelled = collections.Counter(texts[number] for number in occurring_texts(mixed).tolist())
    assert spelled == collections.Counter(written + [" ".join(region) for region in regions])
    spelled = collections.Counter(texts[number] for number in occurring_texts(mixed, joined=False).tolist())
    assert spelled == collections.Counter(written + [text for region in regions for text in region])


# --- mixing


def test_mixed_batches_are_those_of_the_parts(parts):
    mixed = MixedDataset(parts, [1, 4])
    assert len(mixed) == 12 + 4 * 5
    batch = mixed.__getitems__([13, 2, 31, 0, 18])[0]
    assert batch.index.tolist() == [13, 2, 31, 0, 18]
    for row, (part, index) in enumerate([(1, 1), (0, 2), (1, 4), (0, 0), (1, 1)]):
        single = parts[part][index]
        for item in fields(Batch):
            if item.name != "index":
                value = getattr(single, item.name)[0]
                window = (row, *(slice(size) for size in value.shape))
                assert torch.equal(getattr(batch, item.name)[window], value), item.name
    with pytest.raises(IndexError):
        mixed.__getitems__([32])


@pytest.mark.parametrize(
    ("sizes", "factors", "balanced", "repeats"),
    [
        ([230_000, 15_000], [1, 1], [False, True], [1, 15]),  # 15.33
        ([15_000, 230_000], [1, 1], [True, False], [15, 1]),
        ([100, 40], [1, 1], [False, True], [1, 2]),  # 2.5: halves to even
        ([100, 40], [1, 3], [False, False], [1, 3]),
        ([100, 10, 30], [2, 0.5, 1], [False, True, True], [2, 5, 3]),
        ([100, 100], [1, 1], [True, True], [1, 1]),
    ],
)
def test_repeats(sizes, factors, balanced, repeats):
    assert repeats_of(sizes, factors, balanced) == repeats


def test_a_data_set_that_would_never_occur():
    with pytest.raises(ValueError, match="Data set 2 of 2 would be used 0.40 times an epoch and so not at all"):
        repeats_of([10, 10], [1, 0.4], [False, False])


def test_processes_share_an_epoch_without_overlap(parts):
    mixed = MixedDataset(parts, [1, 4])

    def epoch(processes, batch_size, seed):
        """The batches of all processes, dealt as Accelerate deals them."""
        loaders = []
        for rank in range(processes):
            sampler = RandomSampler(mixed, generator=torch.Generator().manual_seed(seed))
            batches = BatchSamplerShard(BatchSampler(sampler, batch_size, drop_last=True), processes, rank)
            loaders.append(DataLoader(mixed, batch_sampler=batches, collate_fn=first))
        return [[batch.index.tolist() for batch in loader] for loader in loaders]

    ((whole),) = epoch(1, 8, seed=3)
    assert sorted(sum(whole, [])) == list(range(32))
    halves = epoch(2, 4, seed=3)
    assert [a + b for a, b in zip(*halves, strict=True)] == whole, (
        "two processes see what one with twice the batch sees"
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_number_of_workers(parts, workers):
    mixed = MixedDataset(parts, [1, 2])

    def batches(count):
        order = torch.Generator().manual_seed(1)
        return list(DataLoader(mixed, 5, shuffle=True, generator=order, collate_fn=first, num_workers=count))

    for one, other in zip(batches(0), batches(workers), strict=True):
        assert_equal(one, other)


# --- mirrored sides


@pytest.mark.parametrize(
    ("text", "mirrored"),
    [
        ("Right lower lung zone", "Left lower lung zone"),
        ("LEFT and right-sided effusions", "RIGHT and left-sided effusions"),
        ("Shift to the left, leftward deviation.", "Shift to the right, rightward deviation."),
        ("Upright view, bright cleft, outright leftover", "Upright view, bright cleft, outright leftover"),
        ("Bilateral effusions", "Bilateral effusions"),
        ("Blunting of the right heart border.", "Blunting of the left heart border."),
        ("Effusion on the left.", "Effusion on the right."),
        ("Right.", "Left."),
        ("RIGHT>LEFT, left/right (left) right's", "LEFT>RIGHT, right/left (right) left's"),
        ("Left-to-right shunt, leftmost, rightsided", "Right-to-left shunt, rightmost, leftsided"),
        ("Line in the R arm, L apex, RLL opacity", "Line in the R arm, L apex, RLL opacity"),
        ("", ""),
    ],
)
def test_mirrored_texts(text, mirrored):
    assert mirror_text(text) == mirrored
    assert mirror_text(mirrored) == text


def test_mirrored_numbers():
    texts = TextTable(["Left effusion", "No effusion", "Right effusion", "right apex"])
    mirrored = texts.mirror_ids()
    assert texts.texts[4:] == ["left apex"]
    assert mirrored.tolist() == [2, 1, 0, 4, 3]
    assert mirrored[mirrored].tolist() == list(range(5))


def test_sides_of_mirrored_images_change_places(parts):
    mirror_ids = (texts := parts[0].reader.texts).mirror_ids()
    batch = parts[0].__getitems__(range(4))[0]
    rows = torch.tensor([True, False, True, False])
    swapped = batch.swap_sides(rows, mirror_ids)
    for row in range(4):
        for region, partner in enumerate(LATERAL_PARTNERS):
            source = partner if rows[row] else region
            for name in ("anatomy_boxes", "anatomy_present", "anatomy_labels"):
                assert torch.equal(getattr(swapped, name)[row, region], getattr(batch, name)[row, source])
        for name in ("sentences", "anatomy_sentences", "anatomy_texts", "class_phrases"):
            before, after = getattr(batch, name)[row], getattr(swapped, name)[row]
            if name.startswith("anatomy") and rows[row]:
                before = before[list(LATERAL_PARTNERS)]
            for one, other in zip(before.flatten().tolist(), after.flatten().tolist(), strict=True):
                assert (one < 0) == (other < 0)
                expected = mirror_text(texts.texts[one]) if rows[row] else texts.texts[one]
                assert one < 0 or texts.texts[other] == expected
    assert not torch.equal(swapped.sentences, batch.sentences)
    assert_equal(swapped.swap_sides(rows, mirror_ids), batch)
    assert len(ANATOMY_NAMES) == len(LATERAL_PARTNERS)


def test_sides_in_the_whole_path(parts):
    """A mirrored image with "consistent" is what "off" gives for the mirrored record, and "reference" is not."""
    texts = parts[0].reader.texts
    mirror_ids = texts.mirror_ids()
    batch = parts[0].__getitems__(range(6))[0]
    crop = torch.eye(2, 3).repeat(6, 1, 1)
    crop[::2, 0] = torch.tensor([-1.0, 0.0, 1.0])
    transform = GeometricTransform(crop, torch.eye(2, 3).repeat(6, 1, 1))
    rows = transform.mirrored
    assert rows.tolist() == [True, False] * 3
    moved, present = transform.boxes(batch.anatomy_boxes, batch.anatomy_present)
    reference = batch.replace(anatomy_boxes=moved, anatomy_present=present)
    consistent = reference.swap_sides(rows, mirror_ids)
    right, left = (ANATOMY_NAMES.index(f"{side} lung") for side in ("right", "left"))
    for swapped, on_the_left in ((consistent, 6), (reference, 3)):  # the right lung is seen on the left
        assert swapped.anatomy_present[:, [left, right]].all()
        assert (swapped.anatomy_boxes[:, right, 0] < swapped.anatomy_boxes[:, left, 0]).sum() == on_the_left
    compared = 0
    for row, phrases in enumerate(consistent.class_phrases):
        for number, box in zip(phrases.flatten().tolist(), batch.class_boxes[row].flatten(0, 1), strict=True):
            words = texts.texts[number].lower().split() if number >= 0 else []
            if ("left" in words) != ("right" in words):
                x = 1 - box[0] if rows[row] else box[0]
                assert ("right" in words) == (x < 0.5)
                compared += 1
    assert compared > 3


# --- streams


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """24 records in 6 Parquet files."""
    folder, records = tmp_path_factory.mktemp("shards"), phantoms(24)
    for number in range(6):
        records.shard(6, number, contiguous=True).to_parquet(folder / f"train-{number:05d}-of-00006.parquet")
    return records, [str(path) for path in sorted(folder.iterdir())]


def stream(files, reader, batch_size=5, **options):
    return RecordStream(files, reader, batch_size, **options)


def by_name(batches):
    """Image number -> its row in the batch, cut to what is valid."""
    found = {}
    for batch in batches:
        for row, number in enumerate(batch.index.tolist()):
            assert number not in found, "an image came twice"
            found[number] = {item.name: getattr(batch, item.name)[row] for item in fields(Batch)}
    return found


@pytest.mark.parametrize(("ranks", "workers", "buffer"), [(1, 0, 0), (1, 2, 7), (2, 0, 7), (2, 2, 0), (3, 2, 5)])
def test_a_stream_gives_every_record_once(shards, ranks, workers, buffer):
    records, files = shards
    texts = TextTable()
    expected = RecordDataset(records, PROCESSOR, texts)
    reader = RecordReader(records.features, PROCESSOR, texts)
    batches = []
    for rank in range(ranks):
        part = stream(files, reader, shuffle_buffer=buffer, seed=4, rank=rank, world_size=ranks)
        batches += list(DataLoader(part, batch_size=None, num_workers=workers))
    found = by_name(batches)
    assert len(found) == 24
    rows = {batch["images"].numpy().tobytes(): batch for batch in found.values()}
    for index in range(24):
        one = expected[index]
        other = rows[one.images[0].numpy().tobytes()]
        for item in fields(Batch):
            if item.name != "index":
                wide, narrow = getattr(one, item.name)[0], other[item.name]
                assert torch.equal(wide[tuple(slice(size) for size in narrow.shape)], narrow), item.name
                assert (wide > 0).sum() == (narrow > 0).sum(), item.name


def test_the_order_of_a_stream(shards):
    records, files = shards
    texts, same = TextTable(), TextTable()
    texts.add_shards(files)
    same.add_records(records)
    assert set(texts.texts) == set(same.texts)
    reader = RecordReader(records.features, PROCESSOR, texts)

    def order(epoch=0, **options):
        part = stream(files, reader, **options)
        part.set_epoch(epoch)
        return [number for batch in part for number in batch.index.tolist()]

    plain, shuffled = order(), order(shuffle_buffer=8, seed=1)
    assert plain != shuffled == order(shuffle_buffer=8, seed=1)
    assert sorted(plain) == sorted(shuffled)
    assert len({tuple(order(epoch, shuffle_buffer=8, seed=1)) for epoch in range(3)}) == 3
    assert order(shuffle_buffer=8, seed=2) != shuffled


def test_workers_that_stay_get_the_next_epoch(shards):
    records, files = shards
    texts = TextTable()
    texts.add_shards(files)
    part = stream(files, RecordReader(records.features, PROCESSOR, texts), shuffle_buffer=8)
    loader = DataLoader(part, batch_size=None, num_workers=1, persistent_workers=True)
    orders = []
    for epoch in (0, 1, 0):
        part.set_epoch(epoch)
        orders.append([number for batch in loader for number in batch.index.tolist()])
    assert orders[0] == orders[2] != orders[1]
    assert part.epoch == 0


def test_a_stream_is_shuffled_further_than_a_batch(shards):
    """Records of several shards meet in a batch, and the first batch does not hold the first records only."""
    records, files = shards
    texts = TextTable()
    texts.add_shards(files)
    part = stream(files, RecordReader(records.features, PROCESSOR, texts), 4, shuffle_buffer=16, seed=3)
    place = {zlib.crc32(name.encode()): number for number, name in enumerate(records["sample_id"])}
    batches = [[place[number] for number in batch.index.tolist()] for batch in part]
    assert [len(batch) for batch in batches] == [4] * 6
    assert all(len({number // 4 for number in batch}) > 1 for batch in batches)


def test_fewer_shards_than_processes(shards):
    with pytest.raises(ValueError, match="6 shards cannot be shared by 7 processes"):
        stream(shards[1], None, world_size=7)
