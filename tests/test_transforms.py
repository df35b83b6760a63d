"""Augmentation: boxes follow the pixels, draws are reproducible, the blur is a Gaussian."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
import torch

from training.configuration import AugmentationConfig
from training.transforms import (
    MIN_VISIBLE_SHARE,
    Augmentation,
    GeometricTransform,
    _convolve,
    _convolve_together,
    gaussian_blur,
    normalise,
)


SIDE = 96
IDENTITY = AugmentationConfig(
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    rotation=0.0,
    translation=0.0,
    scale=(1.0, 1.0),
    brightness=0.0,
    contrast=0.0,
    blur_probability=0.0,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def maps(config, count, seed=0):
    augmentation = Augmentation(config, seed)
    return augmentation.geometry(augmentation.draws(torch.arange(count)))


def changed(config, images, seed=0):
    augmentation = Augmentation(config, seed)
    return augmentation.intensity(images, augmentation.draws(torch.arange(len(images))))


def rectangles(count, seed, low=0.1, high=0.9):
    """Random pixel-aligned rectangles: images (N, 1, S, S) with value 1 inside, boxes (N, 1, 4) normalised cxcywh."""
    rng = np.random.default_rng(seed)
    images = torch.zeros(count, 1, SIDE, SIDE)
    boxes = torch.zeros(count, 1, 4)
    for index in range(count):
        width, height = rng.integers(8, 40, 2)
        left = rng.integers(int(low * SIDE), int(high * SIDE) - width)
        top = rng.integers(int(low * SIDE), int(high * SIDE) - height)
        images[index, 0, top : top + height, left : left + width] = 1.0
        centre = torch.tensor([left + width / 2, top + height / 2, width, height])
        boxes[index, 0] = centre / SIDE
    return images, boxes


def edges(boxes):
    """Pixel xyxy (N, 4) of normalised cxcywh (N, 1, 4)."""
    centre, size = boxes[:, 0, :2], boxes[:, 0, 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1) * SIDE


def hulls(images):
    """Pixel xyxy (N, 4) around what is brighter than one half; NaN where nothing is."""
    found = []
    for image in images[:, 0]:
        rows, columns = torch.where(image > 0.5)
        if len(rows) == 0:
            found.append([math.nan] * 4)
        else:
            found.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
    return torch.tensor(found)


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_the_pixels(seed, flip):
    images, boxes = rectangles(48, seed)
    transform = maps(AugmentationConfig(flip="reference", flip_probability=flip), 48, seed)
    moved, kept = transform.boxes(boxes, torch.ones(48, 1, dtype=torch.bool))
    box, hull = edges(moved), hulls(transform.images(images))
    # at the border the hull of the visible part of a rotated rectangle is smaller than the visible part of its hull
    inside = kept[:, 0] & (box[:, :2] > 0.5).all(1) & (box[:, 2:] < SIDE - 0.5).all(1)
    assert inside.sum() > 15
    assert (box - hull)[inside].abs().max() <= 1.5


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_clipped_like_the_pixels(seed):
    config = dataclasses.replace(IDENTITY, crop_area=(0.3, 0.5), crop_aspect=(0.75, 1.33), flip="reference")
    images, boxes = rectangles(48, seed, low=0.0, high=1.0)
    transform = maps(config, 48, seed)
    moved, kept = transform.boxes(boxes, torch.ones(48, 1, dtype=torch.bool))
    kept, box, hull = kept[:, 0], edges(moved), hulls(transform.images(images))
    large = kept & ((box[:, 2:] - box[:, :2]) > 3).all(1)
    assert 10 < large.sum() < 48
    clipped = ((box <= 0) | (box >= SIDE)).any(1)
    assert (large & clipped).sum() > 5
    assert (box - hull)[large].abs().max() <= 1.5
    assert (box >= -1e-4).all()
    assert (box <= SIDE + 1e-4).all()
    assert (moved[~kept] == 0).all()


def test_a_mirror_alone_is_exact():
    images, boxes = rectangles(8, 0)
    transform = maps(dataclasses.replace(IDENTITY, flip="reference", flip_probability=1.0), 8)
    torch.testing.assert_close(transform.images(images), images.flip(-1), atol=1e-5, rtol=0)
    moved, _ = transform.boxes(boxes, torch.ones(8, 1, dtype=torch.bool))
    expected = boxes.clone()
    expected[..., 0] = 1 - expected[..., 0]
    torch.testing.assert_close(moved, expected)


def test_half_of_the_images_are_mirrored():
    for flip in ("reference", "consistent"):
        transform = maps(AugmentationConfig(flip=flip), 400)
        assert 150 < transform.mirrored.sum() < 250
        assert (transform.crop[:, 1, 1] > 0).all()
    for flip in ("off", None):
        assert not maps(AugmentationConfig(flip=flip), 400).mirrored.any()


def test_nothing_changes_without_augmentation():
    images = torch.rand(5, 1, SIDE, SIDE, generator=generator(1))
    _, boxes = rectangles(5, 1)
    mask = torch.tensor([True, True, False, True, True])[:, None]
    transform = maps(IDENTITY, 5)
    moved, kept = transform.boxes(boxes, mask)
    torch.testing.assert_close(transform.images(images), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(changed(IDENTITY, images), images, atol=1e-6, rtol=0)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(moved[mask], boxes[mask])
    assert (moved[~mask] == 0).all()


def test_any_number_of_box_axes():
    """(N, A, 4) and (N, C, T, 4) are moved alike, also when there is none."""
    transform = maps(AugmentationConfig(), 3)
    boxes = torch.rand(3, 6, 4, generator=generator(1)) * 0.3 + 0.2
    mask = torch.rand(3, 6, generator=generator(2)) < 0.7
    moved, kept = transform.boxes(boxes, mask)
    folded, folded_mask = transform.boxes(boxes.view(3, 2, 3, 4), mask.view(3, 2, 3))
    assert torch.equal(folded.view(3, 6, 4), moved)
    assert torch.equal(folded_mask.view(3, 6), kept)
    none, none_mask = transform.boxes(boxes[:, :0], mask[:, :0])
    assert (none.shape, none_mask.shape) == ((3, 0, 4), (3, 0))


@pytest.mark.parametrize(("share", "stays"), [(0.0, False), (0.09, False), (0.11, True), (0.5, True), (1.0, True)])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("step", ["crop", "affine"])
def test_boxes_with_less_than_a_tenth_inside_are_dropped(share, stays, axis, step):
    assert MIN_VISIBLE_SHARE == 0.1
    matrix = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    matrix[0, axis, 2] = 0.5 + 0.2 * (1 - share)  # moves the box from [0.5, 0.7] across the border at 0
    box = torch.full((1, 1, 4), 0.2)
    box[..., :2] = 0.6
    nothing = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    transform = GeometricTransform(**{"crop": nothing, "affine": nothing} | {step: matrix})
    moved, kept = transform.boxes(box, torch.ones(1, 1, dtype=torch.bool))
    assert kept.item() == stays
    expected = torch.zeros(4)
    if stays:
        expected = torch.tensor([0.6, 0.6, 0.2, 0.2])
        expected[axis], expected[axis + 2] = 0.1 * share, 0.2 * share
    torch.testing.assert_close(moved[0, 0], expected, atol=1e-6, rtol=1e-5)


def test_an_image_is_changed_by_its_seed_epoch_and_number_alone():
    images = torch.rand(7, 1, 32, 32, generator=generator(0))
    boxes, mask = torch.rand(7, 4, 4, generator=generator(1)), torch.ones(7, 4, dtype=torch.bool)

    def augment(rows, seed=5, epoch=2):
        augmentation = Augmentation(AugmentationConfig(flip="reference"), seed)
        draws = augmentation.draws(100 + torch.tensor(rows), epoch)
        transform = augmentation.geometry(draws)
        moved, kept = transform.boxes(boxes[rows], mask[rows])
        return augmentation.intensity(transform.images(images[rows]), draws), moved, kept

    together = augment(list(range(7)))
    for other in (augment([6, 2, 0, 4]), augment([2])):
        for rows in ([6, 2, 0, 4], [2]):
            if len(other[0]) == len(rows):
                for one, all_of_them in zip(other, together, strict=True):
                    torch.testing.assert_close(one, all_of_them[rows], atol=1e-6, rtol=0)
    assert Augmentation(AugmentationConfig()).draws(torch.tensor([-1, 4])).shape == (2, Augmentation.NUM_DRAWS)
    for other in (augment(list(range(7)), seed=6), augment(list(range(7)), epoch=3)):
        assert all((one - another).abs().max() > 0.01 for one, another in zip(other[0], together[0], strict=True))


def test_draws_stay_in_their_ranges():
    transform = maps(AugmentationConfig(), 2000)
    size = transform.crop[:, [0, 1], [0, 1]]
    assert transform.crop[:, [0, 1], [1, 0]].abs().max() == 0
    assert size.min() > 0
    assert (size <= 1).all()
    area, aspect = size.prod(1), size[:, 0] / size[:, 1]
    assert 0.5 <= area.min() < 0.52
    assert area.max() > 0.95
    assert 0.75 - 1e-4 <= aspect.min() < 0.8
    assert 1.25 < aspect.max() <= 4 / 3 + 1e-4
    corners = torch.stack([transform.crop[..., 2], transform.crop[..., 2] + size], 1)
    assert corners.min() >= 0
    assert corners.max() <= 1 + 1e-6
    scaled = maps(dataclasses.replace(IDENTITY, scale=(0.95, 1.0), translation=0.02), 2000).affine
    size = scaled[:, [0, 1], [0, 1]]
    assert 1 - 1e-5 <= size.min() < 1.01
    assert 1.04 < size.max() <= 1 / 0.95 + 1e-5
    shift = 0.5 - (0.5 - scaled[..., 2]) / size  # of the centre, forwards
    assert 0.019 < shift.abs().max() <= 0.02 + 1e-5
    rotated = maps(dataclasses.replace(IDENTITY, rotation=10.0), 2000).affine
    angle = torch.rad2deg(torch.atan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert 9.8 < angle.abs().max() <= 10.0 + 1e-4
    assert angle.min() < -9 < 9 < angle.max()
    centre = rotated[..., :2] @ torch.full((2, 1), 0.5) + rotated[..., 2:]
    torch.testing.assert_close(centre, torch.full_like(centre, 0.5), atol=1e-6, rtol=0)


def test_a_crop_that_never_fits_is_the_whole_image():
    transform = maps(AugmentationConfig(crop_area=(0.99, 1.0), crop_aspect=(2.0, 3.0)), 5)
    torch.testing.assert_close(transform.crop, torch.eye(2, 3).expand(5, -1, -1))


def test_the_affine_map_sees_no_more_than_the_crop():
    """As if the crop had been made first: black where the map reaches beyond it, though the image goes on there."""
    config = dataclasses.replace(IDENTITY, crop_area=(0.5, 0.5), scale=(0.8, 0.8))
    result = maps(config, 3).images(torch.ones(3, 1, 200, 200))
    border = 20  # pixels of 200 on each side
    assert (result[..., border + 1 : -border - 1, border + 1 : -border - 1] > 0.999).all()
    for edge in (result[..., : border - 1, :], result[..., 1 - border :, :], result[..., : border - 1]):
        assert (edge == 0).all()


def test_a_crop_keeps_the_grey_values_at_its_border():
    """Nothing beyond the crop, and nothing black, is mixed into its outermost pixels."""
    config = dataclasses.replace(IDENTITY, crop_area=(0.5, 1.0), crop_aspect=(0.75, 4 / 3), flip="reference")
    transform = maps(config, 20)
    torch.testing.assert_close(transform.images(torch.ones(20, 1, 64, 64), 56), torch.ones(20, 1, 56, 56))
    inside = torch.zeros(20, 1, 64, 64)  # 1 in the pixels that belong to the crop as a whole
    box = transform.crop @ torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0]]) * 64
    for image, corners in zip(inside, box.sort(-1).values, strict=True):
        (x0, x1), (y0, y1) = (edges.add(torch.tensor([-1e-4, 1e-4])).tolist() for edges in corners)
        image[:, max(math.floor(y0), 0) : math.ceil(y1), max(math.floor(x0), 0) : math.ceil(x1)] = 1.0
    torch.testing.assert_close(transform.images(inside, 56), torch.ones(20, 1, 56, 56))


def step_by_step(image, boxes, crop, mirrored, linear, shift, side):
    """
    The official steps one after another: the pixels of a crop (x0, y0, x1, y1) resized, perhaps mirrored, then mapped
    by `linear` about the centre and moved by `shift` (fractions). After each step boxes (K, 4), xyxy, are clipped, and
    dropped (NaN) if less than a tenth is left.
    """

    def clip(boxes):
        clipped = boxes.clip(0, 1)
        area, left = ((part[:, 2:] - part[:, :2]).prod(-1) for part in (boxes, clipped))
        return np.where(((left > 0) & (left >= 0.1 * area))[:, None], clipped, np.nan)

    size = image.shape[0]
    x0, y0, x1, y1 = crop
    pixels = np.arange(side) + 0.5
    places = np.meshgrid(pixels * (y1 - y0) / side - 0.5, pixels * (x1 - x0) / side - 0.5, indexing="ij")
    image = scipy.ndimage.map_coordinates(image[y0:y1, x0:x1], places, order=1, mode="nearest")
    boxes = clip((boxes * size - np.array([x0, y0, x0, y0])) / np.array([x1 - x0, y1 - y0] * 2))
    if mirrored:
        image, boxes = image[:, ::-1], np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], -1)
    x, y = np.meshgrid(pixels / side, pixels / side)
    inverse = np.linalg.inv(linear)
    x, y = (inverse[row, 0] * (x - 0.5 - shift[0]) + inverse[row, 1] * (y - 0.5 - shift[1]) + 0.5 for row in (0, 1))
    image = scipy.ndimage.map_coordinates(image, [y * side - 0.5, x * side - 0.5], order=1, mode="grid-constant")
    corners = np.stack([boxes[:, [0, 2, 0, 2]], boxes[:, [1, 1, 3, 3]]], -1) - 0.5
    corners = corners @ linear.T + 0.5 + shift
    return image, clip(np.concatenate([corners.min(1), corners.max(1)], -1))


def test_one_resampling_gives_what_the_official_steps_give():
    rng, count, size, side = np.random.default_rng(0), 12, 80, 70
    images = scipy.ndimage.gaussian_filter(rng.random((count, size, size)), (0, 3, 3))
    images = (images - images.min()) / np.ptp(images)
    corners = rng.random((count, 60, 2, 2))
    corners[:, :30] = corners[:, :30, :1] + rng.uniform(0, 0.06, (count, 30, 2, 2))  # small ones are cut off oftener
    boxes = np.sort(corners, 2).clip(0, 1).reshape(count, 60, 4)
    crops, affines, expected = [], [], []
    for number in range(count):
        low, extent = rng.integers(0, 15, 2), rng.integers(55, 66, 2)
        crop, mirrored = np.concatenate([low, low + extent]), bool(number % 2)
        angle, scale, shift = math.radians(rng.uniform(-10, 10)), rng.uniform(0.95, 1, 2), rng.uniform(-0.02, 0.02, 2)
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        expected.append(step_by_step(images[number], boxes[number], crop, mirrored, turn * scale, shift, side))
        inverse = np.linalg.inv(turn * scale)
        width, height = extent / size
        x = [-width, 0, (low[0] + extent[0]) / size] if mirrored else [width, 0, low[0] / size]
        crops.append([x, [0, height, low[1] / size]])
        affines.append(np.concatenate([inverse, (0.5 - inverse @ (0.5 + shift))[:, None]], -1))
    transform = GeometricTransform(*(torch.tensor(np.array(part), dtype=torch.float32) for part in (crops, affines)))
    found = transform.images(torch.tensor(images[:, None], dtype=torch.float32), side)[:, 0].numpy()
    difference = np.abs(found - np.stack([image for image, _ in expected]))
    assert difference.max() < 0.03 and difference.mean() < 0.003  # of two interpolations and one

    wanted = np.stack([moved for _, moved in expected])
    given = torch.tensor(np.concatenate([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1))
    moved, kept = transform.boxes(given.float(), torch.ones(count, 60, dtype=torch.bool))
    there = ~np.isnan(wanted).any(-1)
    assert np.array_equal(kept.numpy(), there) and 100 < there.sum() < there.size - 20
    moved = moved.numpy()
    moved = np.concatenate([moved[..., :2] - moved[..., 2:] / 2, moved[..., :2] + moved[..., 2:] / 2], -1)
    assert np.abs(moved - wanted)[there].max() < 1e-5


def test_the_smallest_boxes_are_kept():
    box = torch.tensor([0.5, 0.5, 1.1e-3, 1.1e-3]).view(1, 1, 4)
    halved = torch.eye(2, 3)[None].clone()
    halved[0, 0, 2] = 0.5  # half of it is left of the border
    moved, kept = GeometricTransform(halved, torch.eye(2, 3)[None]).boxes(box, torch.ones(1, 1, dtype=torch.bool))
    assert kept.all()
    torch.testing.assert_close(moved[0, 0, 2:], torch.tensor([0.55e-3, 1.1e-3]), atol=1e-6, rtol=0)


def test_draws_are_distributed_as_the_official_ones():
    """Uniform and independent, by Kolmogorov and Smirnov's test; seeds are fixed, so this never fails by chance."""
    config = AugmentationConfig(flip="reference")
    transform = maps(config, 4000)
    forward = torch.linalg.inv(transform.affine[..., :2])
    angle = torch.rad2deg(torch.atan2(forward[:, 1, 0], forward[:, 0, 0]))
    scale = forward.norm(dim=1)
    shift = 0.5 - transform.affine[..., 2:]  # of the centre, backwards
    shift = (forward @ (shift - transform.affine[..., :2] @ torch.full((2, 1), 0.5))).squeeze(-1)
    size = transform.crop[:, [0, 1], [0, 1]].abs()
    place = torch.minimum(transform.crop[..., 2], transform.crop[..., 2] + transform.crop[:, [0, 1], [0, 1]])
    values = {"angle": (angle + 10) / 20}
    for axis, name in enumerate("xy"):
        values[f"scale {name}"] = (scale[:, axis] - 0.95) / 0.05
        values[f"shift {name}"] = (shift[:, axis] + 0.02) / 0.04
        values[f"place {name}"] = place[:, axis] / (1 - size[:, axis])
    for name, value in values.items():
        assert scipy.stats.kstest(value.double().clamp(0, 1).numpy(), "uniform").pvalue > 0.01, name
    values["mirrored"] = transform.mirrored.float()
    correlation = torch.corrcoef(torch.stack(list(values.values()))) - torch.eye(len(values))
    assert correlation.abs().max() < 0.06
    assert transform.mirrored.float().mean().item() == pytest.approx(0.5, abs=0.03)

    # a crop is drawn again until it fits, officially in whole pixels of 256
    rng, expected = np.random.default_rng(1), []
    while len(expected) < 4000:
        area, aspect = rng.uniform(0.5, 1), math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(256 * math.sqrt(area * aspect)), round(256 * math.sqrt(area / aspect))
        if width <= 256 and height <= 256:
            expected.append((width / 256, height / 256))
    for axis in (0, 1):
        assert scipy.stats.ks_2samp(size[:, axis].numpy(), np.array(expected)[:, axis]).pvalue > 0.01


def test_half_of_the_blurs_have_three_pixels_and_a_quarter_is_none():
    config = dataclasses.replace(IDENTITY, blur_probability=1.0, blur_sigma=(2.0, 2.0))
    image = torch.zeros(1000, 1, 33, 33)
    image[..., 16, 16] = 1.0
    wide = (changed(config, image)[:, 0, 16] > 1e-6).sum(-1)
    counts = {int(size): int((wide == size).sum()) for size in wide.unique()}
    assert counts.keys() == {1, 3, 17}
    for size, share in {1: 0.25, 3: 0.5, 17: 0.25}.items():
        assert counts[size] == pytest.approx(1000 * share, abs=50)
    half = changed(dataclasses.replace(config, blur_probability=0.5), image)[:, 0, 16]
    assert ((half > 1e-6).sum(-1) == 1).float().mean().item() == pytest.approx(0.625, abs=0.05)


@pytest.mark.parametrize("brighter_first", [True, False])
def test_brightness_and_contrast_are_clipped_one_by_one(brighter_first):
    images = torch.linspace(0, 1, 64).view(1, 1, 8, 8)
    augmentation = Augmentation(AugmentationConfig(blur_probability=0.0))
    draws = augmentation.draws(torch.tensor([0]))
    start = 2 * Augmentation.CROP_TRIES + 8
    draws[0, start : start + 3] = torch.tensor([0.875, 0.25, 0.2 if brighter_first else 0.8])  # 1.3 and 0.8
    if brighter_first:
        expected = (images * 1.3).clamp(0, 1)
        expected = (expected * 0.8 + expected.mean() * 0.2).clamp(0, 1)
    else:
        expected = ((images * 0.8 + 0.5 * 0.2).clamp(0, 1) * 1.3).clamp(0, 1)
    torch.testing.assert_close(augmentation.intensity(images.clone(), draws), expected)


def test_pixels_are_the_steps_one_after_another():
    grey = torch.randint(0, 256, (19, 1, 40, 44), generator=generator(0), dtype=torch.uint8)
    augmentation = Augmentation(AugmentationConfig(flip="reference"))
    draws = augmentation.draws(torch.arange(19))
    transform = augmentation.geometry(draws)
    result = augmentation.pixels(grey, transform, draws, 32)
    expected = augmentation.intensity(transform.images(grey / 255, 32), draws)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(augmentation.pixels(grey / 255, transform, draws, 32), expected, atol=1e-5, rtol=0)
    assert augmentation.pixels(grey, transform, draws).shape == (19, 1, 40, 44)


def test_pixels_do_not_depend_on_the_rest_of_the_batch():
    grey = torch.randint(0, 256, (13, 1, 40, 40), generator=generator(0), dtype=torch.uint8)
    augmentation = Augmentation(AugmentationConfig(flip="reference", blur_probability=1.0))
    copy = grey.clone()

    def augment(rows):
        draws = augmentation.draws(rows)
        return augmentation.pixels(grey[rows], augmentation.geometry(draws), draws, 32)

    together = augment(torch.arange(13))
    for rows in (
        torch.tensor([12, 3, 7]),
        torch.arange(1, 13),
        torch.tensor([5]),
        torch.tensor([], dtype=torch.int64),
    ):
        torch.testing.assert_close(augment(rows), together[rows], atol=1e-6, rtol=0)
    assert torch.equal(grey, copy)


def test_another_size_of_the_output():
    images = torch.rand(2, 1, 64, 64, generator=generator(0))
    result = maps(IDENTITY, 2).images(images, side=32)
    assert result.shape == (2, 1, 32, 32)
    pooled = torch.nn.functional.avg_pool2d(images, 2)  # what bilinear sampling between four pixels is
    torch.testing.assert_close(result, pooled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_intensities_stay_in_range(seed):
    images = torch.rand(16, 1, 24, 24, generator=generator(seed))
    images[0], images[1] = 0.0, 1.0
    result = changed(AugmentationConfig(), images.clone(), seed)
    assert result.shape == images.shape
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6
    assert not torch.equal(result, images)


def test_brightness_and_contrast_are_drawn_for_each_image():
    config = dataclasses.replace(IDENTITY, brightness=0.4, contrast=0.4)
    images = torch.full((64, 1, 8, 8), 0.4)
    images[..., :4] = 0.6
    result = changed(config, images)
    mean = result.mean((1, 2, 3)) / 0.5
    spread = (result[..., 0, 0] - result[..., 0, 7])[:, 0] / 0.2 / mean  # brightness scales the spread as well
    for factor in (mean, spread):
        assert 0.6 - 1e-4 <= factor.min() < 0.7
        assert 1.3 < factor.max() <= 1.4 + 1e-4


def test_the_input_of_the_blur_is_not_changed():
    config = dataclasses.replace(IDENTITY, blur_probability=1.0)
    images = torch.rand(12, 1, 24, 24, generator=generator(0))
    copy = images.clone()
    result = changed(config, images)
    assert torch.equal(images, copy)
    blurred = (result - images).abs().amax((1, 2, 3)) > 1e-3
    assert 0 < (~blurred).sum() < 12  # a quarter of the kernels have one pixel


@pytest.mark.parametrize("sigma", [0.1, 0.3, 1.0, 2.7, 5.0])
def test_blur_is_scipys(sigma):
    images = torch.rand(3, 1, 40, 56, generator=generator(0))
    result = gaussian_blur(images, torch.full((3,), sigma))
    radius = round(8 * sigma + 1) // 2  # of the odd size that OpenCV takes for floating-point images
    blurred = (0, 0, sigma, sigma), (0, 0, radius, radius)
    expected = scipy.ndimage.gaussian_filter(images.double().numpy(), blurred[0], mode="mirror", radius=blurred[1])
    torch.testing.assert_close(result.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


def test_blur_of_an_image_does_not_depend_on_the_others():
    images = torch.rand(3, 1, 32, 32, generator=generator(0))
    sigma, reach = torch.tensor([0.5, 4.0, 2.0]), torch.tensor([math.inf, 1.0, math.inf])
    together = gaussian_blur(images, sigma, reach)
    for index in range(3):
        alone = gaussian_blur(images[index : index + 1], sigma[index : index + 1], reach[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, atol=1e-6, rtol=0)


def test_blur_with_a_small_kernel():
    image = torch.zeros(1, 1, 9, 9)
    image[..., 4, 4] = 1.0
    result = gaussian_blur(image, torch.tensor([1.0]), torch.tensor([1.0]))[0, 0]
    weights = torch.tensor([math.exp(-0.5), 1.0, math.exp(-0.5)])
    weights /= weights.sum()
    torch.testing.assert_close(result[3:6, 3:6], weights[:, None] * weights)
    assert result.count_nonzero() == 9
    torch.testing.assert_close(result.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("size", [(32, 32), (33, 70), (5, 40), (96, 31)])
def test_blur_of_one_image_and_of_many_at_once_agree(size):
    """Processors blur images one by one, by block matrices; other devices all of them, by convolution."""
    images = torch.rand(4, 1, *size, generator=generator(0))
    radius = min(7, min(size) - 1)
    distance = torch.arange(-radius, radius + 1)
    kernels = torch.exp(-0.5 * (distance / torch.tensor([0.5, 1.0, 2.0, 9.0])[:, None]) ** 2)
    for reach in (radius, 2, 1):
        cut = kernels[:, radius - reach : radius + reach + 1]
        cut = cut / cut.sum(1, keepdim=True)
        alone = torch.stack([_convolve(image[0], kernel) for image, kernel in zip(images, cut, strict=True)])
        torch.testing.assert_close(_convolve_together(images, cut)[:, 0], alone, atol=1e-6, rtol=0)


def test_blur_wider_than_the_image():
    image = torch.rand(1, 1, 6, 50, generator=generator(0))
    result = gaussian_blur(image, torch.tensor([4.0]))
    expected = scipy.ndimage.gaussian_filter(image.double().numpy(), (0, 0, 4, 4), mode="mirror", radius=(0, 0, 5, 5))
    torch.testing.assert_close(result.double(), torch.from_numpy(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("channels", [(1, 1), (3, 1), (1, 3), (3, 3)])
def test_normalisation(channels):
    images = torch.rand(2, 1, 5, 6, generator=generator(0))
    mean, std = (torch.rand(count, 1, 1, generator=generator(count)) + 0.1 for count in channels)
    expected = (images - mean) / std
    result = normalise(images, mean, std)
    assert torch.equal(result, expected)
    assert (result is images) == (channels == (1, 1))
