"""Augmentation: boxes follow the pixels, draws are reproducible, the blur is a Gaussian."""

import dataclasses
import math

import numpy as np
import pytest
import scipy.ndimage
import torch

from training.configuration import AugmentationConfig
from training.transforms import MIN_VISIBLE_SHARE, Augmentation, GeometricTransform, gaussian_blur


SIDE = 96
IDENTITY = AugmentationConfig(
    crop_area=(1.0, 1.0),
    crop_aspect=(1.0, 1.0),
    rotation=0.0,
    translation=0.0,
    scale=(1.0, 1.0),
    flip_probability=0.0,
    brightness=0.0,
    contrast=0.0,
    blur_probability=0.0,
)


def generator(seed):
    return torch.Generator().manual_seed(seed)


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
    transform = Augmentation(AugmentationConfig(flip_probability=flip)).sample(48, generator(seed))
    moved, kept = transform.boxes(boxes, torch.ones(48, 1, dtype=torch.bool))
    box, hull = edges(moved), hulls(transform.images(images))
    # at the border the hull of the visible part of a rotated rectangle is smaller than the visible part of its hull
    inside = kept[:, 0] & (box[:, :2] > 0.5).all(1) & (box[:, 2:] < SIDE - 0.5).all(1)
    assert inside.sum() > 15
    assert (box - hull)[inside].abs().max() <= 1.5


@pytest.mark.parametrize("seed", range(4))
def test_boxes_are_clipped_like_the_pixels(seed):
    config = AugmentationConfig(rotation=0.0, crop_area=(0.3, 0.5), flip_probability=0.5)
    images, boxes = rectangles(48, seed, low=0.0, high=1.0)
    transform = Augmentation(config).sample(48, generator(seed))
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
    transform = Augmentation(dataclasses.replace(IDENTITY, flip_probability=1.0)).sample(8, generator(0))
    torch.testing.assert_close(transform.images(images), images.flip(-1), atol=1e-5, rtol=0)
    moved, _ = transform.boxes(boxes, torch.ones(8, 1, dtype=torch.bool))
    expected = boxes.clone()
    expected[..., 0] = 1 - expected[..., 0]
    torch.testing.assert_close(moved, expected)


def test_half_of_the_images_are_mirrored():
    matrix = Augmentation(AugmentationConfig(flip_probability=0.5, rotation=0.0)).sample(400, generator(0)).matrix
    assert 150 < (matrix[:, 0, 0] < 0).sum() < 250
    assert (matrix[:, 1, 1] > 0).all()


def test_nothing_changes_without_augmentation():
    augmentation = Augmentation(IDENTITY)
    images = torch.rand(5, 1, SIDE, SIDE, generator=generator(1))
    _, boxes = rectangles(5, 1)
    mask = torch.tensor([True, True, False, True, True])[:, None]
    transform = augmentation.sample(5, generator(2))
    moved, kept = transform.boxes(boxes, mask)
    torch.testing.assert_close(transform.images(images), images, atol=1e-5, rtol=0)
    torch.testing.assert_close(augmentation.intensity(images, generator(3)), images, atol=1e-6, rtol=0)
    assert torch.equal(kept, mask)
    torch.testing.assert_close(moved[mask], boxes[mask])
    assert (moved[~mask] == 0).all()


def test_any_number_of_box_axes():
    """(N, A, 4) and (N, C, T, 4) are moved alike, also when there is none."""
    transform = Augmentation(AugmentationConfig()).sample(3, generator(0))
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
def test_boxes_with_less_than_a_tenth_inside_are_dropped(share, stays, axis):
    assert MIN_VISIBLE_SHARE == 0.1
    matrix = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    matrix[0, axis, 2] = 0.5 + 0.2 * (1 - share)  # moves the box from [0.5, 0.7] across the border at 0
    box = torch.full((1, 1, 4), 0.2)
    box[..., :2] = 0.6
    moved, kept = GeometricTransform(matrix).boxes(box, torch.ones(1, 1, dtype=torch.bool))
    assert kept.item() == stays
    expected = torch.zeros(4)
    if stays:
        expected = torch.tensor([0.6, 0.6, 0.2, 0.2])
        expected[axis], expected[axis + 2] = 0.1 * share, 0.2 * share
    torch.testing.assert_close(moved[0, 0], expected, atol=1e-6, rtol=1e-5)


def test_draws_depend_on_the_seed_alone():
    augmentation, images = Augmentation(AugmentationConfig()), torch.rand(6, 1, 32, 32, generator=generator(0))
    first, again, other = (augmentation.sample(6, generator(seed)).matrix for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    first, again, other = (augmentation.intensity(images, generator(seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_draws_stay_in_their_ranges():
    matrix = Augmentation(AugmentationConfig(rotation=0.0)).sample(2000, generator(0)).matrix
    size = matrix[:, [0, 1], [0, 1]]  # (N, 2): side of the crop over the scale of the affine map
    assert matrix[:, [0, 1], [1, 0]].abs().max() < 1e-6
    assert (size <= 1 / 0.95 + 1e-5).all()
    assert (size.prod(1) >= 0.4).all()  # half of the area, less what a clamped side loses
    corners = torch.stack([matrix[..., 2], matrix[..., 2] + size], 1)
    assert corners.min() >= -0.06
    assert corners.max() <= 1.06
    rotated = Augmentation(dataclasses.replace(IDENTITY, rotation=10.0)).sample(2000, generator(0)).matrix
    angle = torch.rad2deg(torch.atan2(rotated[:, 1, 0], rotated[:, 0, 0]))
    assert 9.8 < angle.abs().max() <= 10.0 + 1e-4
    assert angle.min() < -9 < 9 < angle.max()
    centre = rotated[..., :2] @ torch.full((2, 1), 0.5) + rotated[..., 2:]
    torch.testing.assert_close(centre, torch.full_like(centre, 0.5), atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_intensities_stay_in_range(seed):
    images = torch.rand(16, 1, 24, 24, generator=generator(seed))
    images[0], images[1] = 0.0, 1.0
    result = Augmentation(AugmentationConfig()).intensity(images.clone(), generator(seed))
    assert result.shape == images.shape
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6
    assert not torch.equal(result, images)


def test_brightness_and_contrast_are_drawn_for_each_image():
    config = dataclasses.replace(IDENTITY, brightness=0.4, contrast=0.4)
    images = torch.full((64, 1, 8, 8), 0.4)
    images[..., :4] = 0.6
    result = Augmentation(config).intensity(images, generator(0))
    mean = result.mean((1, 2, 3)) / 0.5
    spread = (result[..., 0, 0] - result[..., 0, 7])[:, 0] / 0.2 / mean  # brightness scales the spread as well
    for factor in (mean, spread):
        assert 0.6 - 1e-4 <= factor.min() < 0.7
        assert 1.3 < factor.max() <= 1.4 + 1e-4


def test_the_input_of_the_blur_is_not_changed():
    config = dataclasses.replace(IDENTITY, blur_probability=1.0)
    images = torch.rand(12, 1, 24, 24, generator=generator(0))
    copy = images.clone()
    result = Augmentation(config).intensity(images, generator(1))
    assert torch.equal(images, copy)
    changed = (result - images).abs().amax((1, 2, 3)) > 1e-3
    assert 0 < (~changed).sum() < 12  # a quarter of the kernels have one pixel


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.7, 5.0])
def test_blur_is_scipys(sigma):
    images = torch.rand(3, 1, 40, 56, generator=generator(0))
    result = gaussian_blur(images, torch.full((3,), sigma))
    expected = scipy.ndimage.gaussian_filter(images.double().numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
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
