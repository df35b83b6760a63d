"""The phantom: geometry, boxes, labels, texts, determinism, and a real Arrow build."""

import hashlib
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from processing_chex.vocabulary import ANATOMY_NAMES, LATERAL_PARTNERS, PHANTOM_CLASSES
from training.data import phantom
from training.data.phantom import (
    PhantomChestXray,
    PhantomConfig,
    phantom_datasets,
    phantom_record,
    render_phantom,
    subject_index,
)
from training.data.phantom_text import LUNG_CLASSES, label_text, vocabulary


SEED = 11
REGION = {name: index for index, name in enumerate(ANATOMY_NAMES)}
CLASS = {name: index for index, name in enumerate(PHANTOM_CLASSES)}


@pytest.fixture(scope="module")
def studies():
    """Many studies without their pictures, which take most of the time."""
    draw = phantom.draw_film
    phantom.draw_film = lambda *args: np.zeros((128, 128), dtype=np.uint8)
    try:
        return [render_phantom(SEED, index) for index in range(1600)]
    finally:
        phantom.draw_film = draw


@pytest.fixture(scope="module")
def pictures():
    return [render_phantom(SEED, index, 256, with_masks=True) for index in range(60)]


def positives(text):
    return {name for name, value in label_text(text).items() if value}


def named(row):
    return {name for name, value in zip(PHANTOM_CLASSES, row, strict=True) if value}


def extent(mask):
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=float)


# -- pictures --


def test_same_number_same_picture_other_number_other_picture():
    first, again, other = render_phantom(SEED, 5), render_phantom(SEED, 5), render_phantom(SEED, 6)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.sentences == again.sentences
    assert first.image.dtype == np.uint8
    assert np.abs(first.image.astype(int) - other.image).mean() > 5
    assert np.abs(first.image.astype(int) - render_phantom(SEED + 1, 5).image).mean() > 5


def test_another_process_draws_the_same():
    code = (
        "import hashlib; from training.data.phantom import phantom_record\n"
        "print(hashlib.sha256(repr([phantom_record(11, i, 96) for i in (0, 1, 2)]).encode()).hexdigest())"
    )
    root = Path(phantom.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "PYTHONHASHSEED": "1"}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    here = hashlib.sha256(repr([phantom_record(SEED, index, 96) for index in (0, 1, 2)]).encode()).hexdigest()
    assert result.stdout.strip() == here


@pytest.mark.parametrize("index", range(8))
def test_boxes_scale_with_the_image(index):
    small, large = render_phantom(SEED, index, 128), render_phantom(SEED, index, 512)
    np.testing.assert_allclose(small.anatomy_boxes * 4, large.anatomy_boxes, atol=1e-3)
    assert [found.phrase for found in small.objects] == [found.phrase for found in large.objects]
    for one, other in zip(small.objects, large.objects, strict=True):
        np.testing.assert_allclose(np.array(one.box) * 4, other.box, atol=1e-3)
    assert small.sentences == large.sentences
    shrunk = np.asarray(Image.fromarray(large.image).reduce(4), dtype=float)
    # Same picture up to noise, sampling and the burned-in letters.
    assert np.corrcoef(shrunk.ravel(), small.image.ravel().astype(float))[0, 1] > 0.97


@pytest.mark.parametrize("size", [64, 100, 224, (160, 128), (96, 200), (300, 256)])
def test_any_size(size):
    sample = render_phantom(SEED, 3, size)
    height, width = (size, size) if isinstance(size, int) else size
    assert sample.image.shape == (height, width)
    boxes = sample.anatomy_boxes[sample.anatomy_present]
    assert (boxes >= 0).all()
    assert (boxes[:, [2]] <= width).all()
    assert (boxes[:, [3]] <= height).all()
    square = render_phantom(SEED, 3, min(height, width))
    # A longer side only adds film around the same square.
    shift = np.tile([(width - min(height, width)) / 2, (height - min(height, width)) / 2], 2)
    lung = REGION["right hilar structures"]
    np.testing.assert_allclose(sample.anatomy_boxes[lung], square.anatomy_boxes[lung] + shift, atol=1e-3)


@pytest.mark.parametrize("size", [63, (64, 40), (64, 300)])
def test_impossible_size(size):
    with pytest.raises(ValueError, match="at least 64"):
        render_phantom(SEED, 0, size)


def test_negative_numbers():
    with pytest.raises(ValueError, match="negative"):
        render_phantom(-1, 0)


def test_looks_like_a_radiograph(pictures):
    for sample in pictures:
        image = sample.image.astype(float)
        boxes = sample.anatomy_boxes.astype(int)

        def mean(name, image=image, boxes=boxes):
            x0, y0, x1, y1 = boxes[REGION[name]]
            return image[y0:y1, x0:x1].mean()

        clear = [
            side
            for side in ("right", "left")
            if not sample.anatomy_labels[REGION[f"{side} upper lung zone"]].any()
            and sample.anatomy_present[REGION[f"{side} upper lung zone"]]
        ]
        for side in clear:
            assert mean(f"{side} upper lung zone") + 25 < mean("cardiac silhouette")
        assert image.std() > 25


def test_lung_boxes_are_the_extent_of_the_drawn_lungs(pictures):
    for sample in pictures:
        lung = sample.masks["lung"] > 0.5
        box = sample.anatomy_boxes[[REGION["right lung"], REGION["left lung"]]]
        middle = int((box[0, 2] + box[1, 0]) / 2)
        for side, part in enumerate((lung[:, :middle], lung[:, middle:])):
            found = extent(part) + (0 if side == 0 else np.array([middle, 0, middle, 0]))
            inside = np.array(sample.visible_frame)
            found = np.clip(found, np.tile(inside[:2], 2), np.tile(inside[2:], 2))
            np.testing.assert_allclose(box[side], found, atol=2.5, err_msg=f"{sample.index} {side}")


def test_heart_box_is_the_extent_of_the_drawn_heart(pictures):
    for sample in pictures:
        if not sample.anatomy_present[REGION["cardiac silhouette"]]:
            continue
        box = sample.anatomy_boxes[REGION["cardiac silhouette"]]
        found = extent(sample.masks["heart"] > 0.5)
        np.testing.assert_allclose(box[[0, 2]], found[[0, 2]], atol=4.0, err_msg=str(sample.index))


def test_finding_boxes_are_the_extent_of_the_drawn_findings(pictures):
    checked = set()
    for sample in pictures:
        groups = []
        for found in sample.objects:
            if found.category == "Edema" and groups and groups[-1][0].category == "Edema":
                groups[-1].append(found)
            else:
                groups.append([found])
        for number, group in enumerate(groups):
            mask = sample.masks.get(f"finding {number}")
            if mask is None:
                assert group[0].category == "Cardiomegaly"
                continue
            boxes = np.array([found.box for found in group])
            hull = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
            found = np.clip(
                extent(mask > 0.4 * mask.max()),
                np.tile(np.array(sample.visible_frame)[:2], 2),
                np.tile(np.array(sample.visible_frame)[2:], 2),
            )
            intersection = np.clip(np.minimum(hull[2:], found[2:]) - np.maximum(hull[:2], found[:2]), 0, None).prod()
            union = (hull[2:] - hull[:2]).prod() + (found[2:] - found[:2]).prod() - intersection
            assert intersection / union > 0.6, (sample.index, group[0].category, hull, found)
            checked.add(group[0].category)
    assert checked == set(PHANTOM_CLASSES) - {"Cardiomegaly"}


@pytest.mark.parametrize(
    ("name", "darker"), [("Nodule", False), ("Mass", False), ("Consolidation", False), ("Pleural effusion", False)]
)
def test_findings_change_the_film_where_their_box_is(name, darker, pictures):
    contrasts = []
    for sample in pictures:
        number = -1
        for position, found in enumerate(sample.objects):
            if not (found.category == "Edema" and position and sample.objects[position - 1].category == "Edema"):
                number += 1
            if found.category != name:
                continue
            mask = sample.masks[f"finding {number}"] > 0.5
            x0, y0, x1, y1 = np.round(found.box).astype(int)
            window = np.s_[max(0, y0 - 8) : y1 + 8, max(0, x0 - 8) : x1 + 8]
            lung = sample.masks["lung"][window] > 0.9
            inside, outside = mask[window] & lung, ~mask[window] & lung
            if inside.sum() > 10 and outside.sum() > 10:
                contrasts.append(sample.image[window][inside].mean() - sample.image[window][outside].mean())
    assert len(contrasts) >= 5
    assert np.mean(contrasts) > 8
    # Some must stay faint: no class is a bright blob on black.
    assert min(contrasts) < 60


# -- sides --


def test_patient_right_is_image_left(studies):
    for sample in studies[:400]:
        boxes, present = sample.anatomy_boxes, sample.anatomy_present
        for index, partner in enumerate(LATERAL_PARTNERS):
            if ANATOMY_NAMES[index].startswith("right ") and partner != index and present[index] and present[partner]:
                assert boxes[index, [0, 2]].mean() < boxes[partner, [0, 2]].mean()
        assert boxes[REGION["aortic arch"], 2] > boxes[REGION["spine"], [0, 2]].mean()
        heart = boxes[REGION["cardiac silhouette"]]
        carina = boxes[REGION["carina"]]
        assert heart[2] - carina[[0, 2]].mean() > carina[[0, 2]].mean() - heart[0]


def test_finding_sides_agree_with_boxes_labels_and_words(studies):
    seen = set()
    for sample in studies:
        for found in sample.objects:
            if not found.side:
                continue
            other = {"right": "left", "left": "right"}[found.side]
            assert re.search(rf"\b{found.side}\b", found.phrase.lower())
            assert not re.search(rf"\b{other}\b", found.phrase.lower())
            assert sample.anatomy_labels[REGION[f"{found.side} lung"], CLASS[found.category]] == 1
            x = (found.box[0] + found.box[2]) / 2
            lung, opposite = (sample.anatomy_boxes[REGION[f"{side} lung"]] for side in (found.side, other))
            assert abs(x - lung[[0, 2]].mean()) < abs(x - opposite[[0, 2]].mean())
            seen.add((found.category, found.side, found.severity))
    lateral = [name for name in PHANTOM_CLASSES if name not in ("Cardiomegaly", "Edema")]
    assert len(seen) == len(lateral) * 2 * 3


def test_findings_lie_in_the_regions_they_are_labelled_in(studies):
    for sample in studies[:800]:
        for found in sample.objects:
            regions = np.flatnonzero(sample.anatomy_labels[:, CLASS[found.category]])
            assert len(regions)
            box = np.array(found.box)
            touching = [
                region
                for region in regions
                if (np.minimum(box[2:], sample.anatomy_boxes[region, 2:])
                    > np.maximum(box[:2], sample.anatomy_boxes[region, :2]) - 2).all()
            ]  # fmt: skip
            assert touching, (sample.index, found)


# -- labels --


def test_boxes_are_valid(studies):
    for sample in studies:
        boxes = sample.anatomy_boxes
        assert (boxes[~sample.anatomy_present] == 0).all()
        assert (boxes[sample.anatomy_present, 2:] > boxes[sample.anatomy_present, :2]).all()
        assert not sample.anatomy_labels[~sample.anatomy_present].any()
        for found in sample.objects:
            x0, y0, x1, y1 = found.box
            assert 0 <= x0 < x1 <= 128
            assert 0 <= y0 < y1 <= 128
            assert min(x1 - x0, y1 - y0) > 1.2, (sample.index, found)
            assert sample.class_labels[CLASS[found.category]] == 1
        assert {found.category for found in sample.objects} == named(sample.class_labels)
    present = np.mean([sample.anatomy_present for sample in studies], axis=0)
    assert present.min() > 0.97
    assert present.min() < 1.0, "badly centred films must cut something off now and then"


def test_prevalence(studies):
    labels = np.array([sample.class_labels for sample in studies])
    share = labels.mean(axis=0)
    assert (share > 0.14).all(), share
    assert (share < 0.26).all(), share
    assert 0.26 < (labels.sum(axis=1) == 0).mean() < 0.34
    assert labels.sum(axis=1).max() == 3
    assert 0.3 < np.mean([sample.view == "AP" for sample in studies]) < 0.5
    both = [len([o for o in s.objects if o.category == "Pleural effusion"]) == 2 for s in studies]
    assert 0.02 < np.mean(both) < 0.08


def test_sizes_of_findings(studies):
    for sample in studies[:800]:
        for found in sample.objects:
            diameter = max(found.box[2] - found.box[0], found.box[3] - found.box[1]) / 128
            if found.category == "Nodule":
                assert 0.018 < diameter < 0.072
            elif found.category == "Mass":
                assert 0.05 < diameter < 0.20


def test_cardiothoracic_ratio(studies):
    large = CLASS["Cardiomegaly"]
    ratios = {0: [], 1: []}
    for sample in studies:
        ratios[int(sample.class_labels[large])].append(sample.heart_ratio)
        if sample.class_labels[large]:
            box = next(found.box for found in sample.objects if found.category == "Cardiomegaly")
            np.testing.assert_allclose(box, sample.anatomy_boxes[REGION["cardiac silhouette"]], atol=1e-4)
    assert min(ratios[1]) > 0.5 > max(ratios[0])
    assert max(ratios[0]) > 0.48, "borderline normal hearts must exist"


# -- text --


def test_labeller_reads_every_generated_text(studies):
    for sample in studies:
        assert positives(" ".join(sample.sentences)) == named(sample.class_labels), sample.sentences
        for sentences, row in zip(sample.anatomy_sentences, sample.anatomy_labels, strict=True):
            assert positives(" ".join(sentences)) == named(row), sentences
        for found in sample.objects:
            assert label_text(found.phrase) == {found.category: 1}


def test_labeller_survives_lost_capitals_and_full_stops(studies):
    for sample in studies[:600]:
        for sentence in sample.sentences:
            assert label_text(sentence.lower().rstrip(".")) == label_text(sentence)
        report = "\n".join(sentence.upper().rstrip(".") for sentence in sample.sentences)
        assert positives(report) == named(sample.class_labels)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("The trachea is midline.", {}),
        ("the lungs are clear", dict.fromkeys(LUNG_CLASSES, 0)),
        ("The right lower lung zone is clear.", dict.fromkeys(LUNG_CLASSES, 0)),
        ("The left costophrenic angle is sharp.", {"Pleural effusion": 0}),
        ("Blunting of the left costophrenic angle", {"Pleural effusion": 1}),
        ("No blunting of the left costophrenic angle.", {"Pleural effusion": 0}),
        ("The heart is not enlarged.", {"Cardiomegaly": 0}),
        ("The heart is severely enlarged.", {"Cardiomegaly": 1}),
        ("The heart size is at the upper limit of normal.", {"Cardiomegaly": 0}),
        ("The left hilar structures are enlarged by a small mass.", {"Mass": 1}),
        ("No nodule or mass.", {"Nodule": 0, "Mass": 0}),
        ("No edema but small nodules", {"Edema": 0, "Nodule": 1}),
        ("Small effusion without pneumothorax.", {"Pleural effusion": 1, "Pneumothorax": 0}),
        ("no pneumothorax the heart is enlarged", {"Pneumothorax": 0, "Cardiomegaly": 1}),
        ("Pneumothorax is not seen.", {"Pneumothorax": 0}),
        ("No edema. Mild edema in the left lung.", {"Edema": 1}),
        ("massive pleural effusion", {"Pleural effusion": 1}),
        ("small smalll left plural effusion xyz of of", {"Pleural effusion": 1}),
    ],
)
def test_labeller_cases(text, expected):
    assert label_text(text) == expected


def test_grammar_is_small_but_varied(studies):
    words, longest = set(), 0
    negated = total = 0
    for sample in studies:
        assert 3 <= len(sample.sentences) <= 7
        assert len(set(sample.sentences)) == len(sample.sentences)
        texts = [*sample.sentences, *(found.phrase for found in sample.objects), *sum(sample.anatomy_sentences, [])]
        for text in texts:
            assert text[0].isupper()
            assert text.endswith(".")
            found = re.findall(r"[a-z-]+", text.lower())
            words.update(found)
            longest = max(longest, len(found))
        negated += sum(bool(re.search(r"\b(no|not)\b", text.lower())) for text in sample.sentences)
        total += len(sample.sentences)
    assert words <= vocabulary()
    assert len(words) < 250
    assert longest <= 14
    assert 0.2 < negated / total < 0.6
    assert len({sentence for sample in studies for sentence in sample.sentences}) > 300


def test_most_regions_are_described(studies):
    share = np.mean([[bool(sentences) for sentences in sample.anatomy_sentences] for sample in studies], axis=0)
    silent = {name for name, value in zip(ANATOMY_NAMES, share, strict=True) if value == 0}
    assert silent == {"svc", "cavoatrial junction", "right atrium"}
    assert (share > 0.9).sum() >= 22


# -- data set --


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phantom")
    sizes = {"seed": SEED, "image_size": 64, "num_train": 130, "num_validation": 20, "num_test": 30}
    return folder, sizes, phantom_datasets(folder, num_proc=2, **sizes)


def test_build(built):
    _, sizes, splits = built
    assert {name: len(split) for name, split in splits.items()} == {"train": 130, "validation": 20, "test": 30}
    identifiers, people = [], {}
    for name, split in splits.items():
        for key in ("sample_id", "image_id"):
            assert all(value.startswith("phantom-") for value in split[key])
        identifiers += split["sample_id"]
        people[name] = set(split["subject_id"])
    assert len(set(identifiers)) == 180
    assert not people["train"] & people["test"]
    assert not people["train"] & people["validation"]
    assert not people["test"] & people["validation"]
    assert len(people["train"]) < 130, "some people have two studies"

    row = splits["test"][4]
    direct = render_phantom(SEED, phantom.SPLIT_OFFSETS["test"] + 4, sizes["image_size"])
    np.testing.assert_array_equal(np.asarray(row["image"]), direct.image)
    np.testing.assert_allclose(row["anatomy_boxes"], direct.anatomy_boxes)
    assert row["sentences"] == direct.sentences
    assert row["class_labels"] == direct.class_labels.tolist()
    assert [o["phrase"] for o in row["objects"]] == [found.phrase for found in direct.objects]
    categories = splits["test"].features["objects"].feature["category"]
    assert categories.names == list(PHANTOM_CLASSES)
    assert (row["height"], row["width"]) == (64, 64)


def test_second_call_reuses_the_build(built, caplog):
    folder, sizes, splits = built
    with caplog.at_level(logging.INFO, logger="training.data.phantom"):
        again = phantom_datasets(folder, **sizes)
    assert "Reusing" in caplog.text
    assert again["train"][0] == splits["train"][0]


def test_cache_depends_on_configuration_and_code(built, monkeypatch):
    folder, sizes, _ = built
    cache = str(folder)
    same = PhantomChestXray(cache_dir=cache, **sizes).cache_dir
    assert Path(same).is_dir()
    assert PhantomChestXray(cache_dir=cache, **(sizes | {"image_size": 96})).cache_dir != same
    assert PhantomChestXray(cache_dir=cache, **(sizes | {"seed": SEED + 1})).cache_dir != same
    monkeypatch.setattr(phantom, "generator_fingerprint", lambda: "something else")
    assert PhantomChestXray(cache_dir=cache, **sizes).cache_dir != same


def test_split_of_zero_images_is_left_out(tmp_path):
    splits = phantom_datasets(tmp_path, num_train=0, num_validation=0, num_test=3, image_size=64)
    assert list(splits) == ["test"]
    picture = splits["test"].with_format(None)[0]["image"]
    assert picture.size == (64, 64)


def test_png_is_lossless():
    sample = render_phantom(SEED, 1)
    stored = phantom_record(SEED, 1)["image"]["bytes"]
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(stored))), sample.image)


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"image_size": 63}, "at least 64"),
        ({"num_train": -1}, "num_train"),
        ({"num_test": 10**9}, "num_test"),
        ({"seed": -1}, "seed"),
        ({"image_size": 128.0}, "integer"),
        ({"num_train": 0, "num_validation": 0, "num_test": 0}, "no images"),
    ],
)
def test_invalid_configuration(values, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        PhantomConfig(**values)
    with pytest.raises(ValueError, match=match):
        PhantomChestXray(cache_dir=str(tmp_path), **values)


def test_two_studies_of_a_person_share_the_body():
    pairs = [index for index in range(0, 200, 2) if subject_index(SEED, index + 1) == index]
    assert 15 < len(pairs) < 50
    assert all(subject_index(SEED, index) == index for index in range(0, 200, 2))
    sentences = [
        [s.anatomy_sentences[REGION["spine"]] for s in (render_phantom(SEED, i), render_phantom(SEED, i + 1))]
        for i in pairs[:6]
    ]
    assert all(one == two for one, two in sentences)
    assert any(
        render_phantom(SEED, index).class_labels.tolist() != render_phantom(SEED, index + 1).class_labels.tolist()
        for index in pairs[:6]
    )


def test_anatomy_beside_the_film_is_not_drawn():
    # The stomach's bubble of this study lies wholly below the film.
    assert render_phantom(7, 12608).image.shape == (128, 128)
