"""Augmentation of whole batches on their device: one resampling for all geometric steps, boxes carried exactly."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

from training.configuration import AugmentationConfig


# A box is dropped when less than this share of its area stays in the image (as in the official transforms).
MIN_VISIBLE_SHARE = 0.1
IMAGES_AT_ONCE = 8


@dataclass
class GeometricTransform:
    """
    A crop with perhaps a mirror, then an affine map of what was cropped, one of each for every image of a batch. Both
    are affine maps `A x + b` of coordinates in [0, 1], from output to input, as resampling needs them.

    Attributes:
        crop (`Tensor` of shape `(N, 2, 3)`): From the cropped image to the input; its linear part is diagonal.
        affine (`Tensor` of shape `(N, 2, 3)`): From the output to the cropped image.
    """

    crop: Tensor
    affine: Tensor

    @property
    def mirrored(self) -> Tensor:
        """Which images (N,) are mirrored."""
        return self.crop[:, 0, 0] < 0

    def to(self, device: torch.device) -> "GeometricTransform":
        return GeometricTransform(self.crop.to(device), self.affine.to(device))

    def images(self, images: Tensor, side: int | None = None) -> Tensor:
        """
        Resamples images (N, 1, H, W) bilinearly to (N, 1, H, W) or (N, 1, side, side). The affine map sees no more
        than the crop, as if the crop had been made before: pixels at its border are repeated for half a pixel, and
        fade to 0, which is what lies outside, over the next one.
        """
        if images.device.type == "cpu" and len(images) > IMAGES_AT_ONCE:  # large temporaries cost more than the work
            parts = (part.split(IMAGES_AT_ONCE) for part in (self.crop, self.affine, images))
            return torch.cat(
                [GeometricTransform(*maps).images(part, side) for *maps, part in zip(*parts, strict=True)]
            )
        height, width = images.shape[2:] if side is None else (side, side)
        affine, crop = _centred(self.affine), _centred(self.crop)
        # x and y in [-1, 1] as sums of rows and columns, much faster than `affine_grid`
        columns, rows = (((torch.arange(n, device=images.device) + 0.5) * 2 / n - 1) for n in (width, height))
        source, inside = [], []
        for axis, (length, input_length) in enumerate(((width, images.shape[3]), (height, images.shape[2]))):
            place = (affine[:, axis, 0, None] * columns + affine[:, axis, 2, None])[:, None, :]
            place = place + (affine[:, axis, 1, None] * rows)[:, :, None]  # in the crop
            inside.append(torch.rsub(place.abs(), 1).mul_(length / 2).add_(0.5).clamp_(0, 1))
            scale, shift = crop[:, axis, axis], crop[:, axis, 2]
            last = 1 - (1 / (scale.abs() * input_length).clamp_max(length)).view(-1, 1, 1)  # centre of the last pixel
            place = torch.minimum(torch.maximum(place, -last, out=place), last, out=place)
            source.append(place.mul_(scale.view(-1, 1, 1)).add_(shift.view(-1, 1, 1)))
        grid = torch.view_as_real(torch.complex(*source))  # the same as `stack`, much faster
        resampled = F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return resampled.mul_(inside[0].mul_(inside[1])[:, None])

    def boxes(self, boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """
        Moves boxes (N, ..., 4), normalised cxcywh; a rotated box becomes the hull of its corners. After the crop and
        after the affine map boxes are clipped, and those of which less than a tenth remains are dropped.

        Returns:
            The boxes, zeros where dropped or not in the mask, and the mask (N, ...) of those that are left.
        """
        corners, kept = center_to_corners_format(boxes).flatten(1, -2), mask.flatten(1)  # (N, K, 4)
        for matrix in (self.crop, self.affine):
            inverse = torch.linalg.inv(matrix[..., :2])
            points = corners[..., [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(-1, (4, 2)).flatten(1, 2)  # (N, 4K, 2)
            points = ((points - matrix[:, None, :, 2]) @ inverse.mT).unflatten(1, (-1, 4))
            moved = torch.cat([points.amin(2), points.amax(2)], -1)
            corners = moved.clamp(0, 1)
            area, visible = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (moved, corners))
            kept = kept & (visible > 0) & (visible >= MIN_VISIBLE_SHARE * area)
        return (corners_to_center_format(corners) * kept[..., None]).view(boxes.shape), kept.view(mask.shape)


def _centred(matrix: Tensor) -> Tensor:
    """Affine maps (N, 2, 3) of coordinates in [0, 1] for coordinates in [-1, 1]."""
    linear, shift = matrix[..., :2], matrix[..., 2]
    return torch.cat([linear, (2 * shift + linear.sum(-1) - 1)[..., None]], -1)


class Augmentation:
    """
    Random resized crop, mirror, affine map, brightness and contrast, blur, with the official ranges.

    What happens to an image depends on (seed, epoch, index of the image) alone, wherever and beside whichever others
    it is processed. Crop, mirror and affine map take one resampling; the official pipeline resamples in every step.
    """

    CROP_TRIES = 10
    NUM_DRAWS = 2 * CROP_TRIES + 14

    def __init__(self, config: AugmentationConfig, seed: int = 0):
        self.config, self.seed = config, seed

    def draws(self, index: Tensor, epoch: int = 0) -> Tensor:
        """
        Uniform numbers in [0, 1) (N, `NUM_DRAWS`), float32 on the CPU, for the images with these numbers (N,), -1 for
        a stand-in that is no image.
        """
        keys = ([self.seed, epoch, number + 1] for number in index.tolist())
        rows = [np.random.default_rng(key).random(self.NUM_DRAWS) for key in keys]
        return torch.from_numpy(np.array(rows, dtype=np.float32).reshape(-1, self.NUM_DRAWS))

    def geometry(self, draws: Tensor) -> GeometricTransform:
        """The maps of images with these draws (N, `NUM_DRAWS`)."""
        config, tries, draws = self.config, draws[:, : 2 * self.CROP_TRIES], draws[:, 2 * self.CROP_TRIES :]
        area = _scaled(tries[:, : self.CROP_TRIES], config.crop_area)
        aspect = _scaled(tries[:, self.CROP_TRIES :], tuple(map(math.log, config.crop_aspect))).exp()
        sizes = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], -1)  # (N, tries, 2)
        # the first crop that fits; if there is none, the whole image, whose aspect of 1 is allowed
        fits = (sizes <= 1).all(-1)
        first = fits.to(torch.uint8).argmax(1)
        size = sizes[torch.arange(len(sizes)), first].where(fits.any(1, keepdim=True), torch.ones(1))
        origin = draws[:, 0:2] * (1 - size)
        mirrored = draws[:, 2] < (config.flip_probability if config.flip != "off" else 0.0)
        origin[:, 0] += size[:, 0] * mirrored
        size[:, 0] *= 1 - 2.0 * mirrored
        crop = torch.cat([torch.diag_embed(size), origin[..., None]], -1)

        angle = torch.deg2rad(_scaled(draws[:, 3], (-config.rotation, config.rotation)))
        scale = _scaled(draws[:, 4:6], config.scale)
        shift = _scaled(draws[:, 6:8], (-config.translation, config.translation))
        cos, sin = angle.cos(), angle.sin()
        # forward: scale about the centre, rotate, shift; its inverse takes output to the cropped image
        rotation = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
        linear = torch.linalg.inv(rotation * scale[:, None, :])
        offset = 0.5 - (linear @ (0.5 + shift)[..., None]).squeeze(-1)
        return GeometricTransform(crop, torch.cat([linear, offset[..., None]], -1))

    def intensity(self, images: Tensor, draws: Tensor) -> Tensor:
        """Brightness and contrast factors in random order, clipped to [0, 1], then blur; images (N, 1, H, W)."""
        config = self.config
        draws = draws[:, 2 * self.CROP_TRIES + 8 :]
        on_device = draws.to(images)[..., None, None, None]
        brightness = _scaled(on_device[:, 0], (max(0.0, 1 - config.brightness), 1 + config.brightness))
        contrast = _scaled(on_device[:, 1], (max(0.0, 1 - config.contrast), 1 + config.contrast))
        brighter_first = on_device[:, 2] < 0.5

        images = (images * brightness.where(brighter_first, 1.0)).clamp_(0, 1)
        mean = images.mean(dim=(-2, -1), keepdim=True)
        images = images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
        images = images.mul_(brightness.masked_fill(brighter_first, 1.0)).clamp_(0, 1)

        sigma = _scaled(draws[:, 4], config.blur_sigma)
        # As officially, the kernel has 3 pixels (50 %), 1, which is no blur (25 %), or what sigma asks for (25 %).
        kind = draws[:, 5]
        reach = torch.where(kind < 0.5, 1.0, math.inf)
        blurred = (draws[:, 3] < config.blur_probability) & (kind < 0.75)
        for wide in (False, True):  # apart, since every kernel is as wide as the widest of its group
            group = (blurred & (reach.isinf() if wide else ~reach.isinf())).nonzero().squeeze(1)
            if len(group):
                chosen = group.to(images.device)
                images[chosen] = gaussian_blur(images[chosen], sigma[group], reach[group])
        return images


def _scaled(draws: Tensor, limits: tuple[float, float]) -> Tensor:
    low, high = limits
    return low + (high - low) * draws


def gaussian_blur(images: Tensor, sigma: Tensor, reach: Tensor | None = None) -> Tensor:
    """
    Separable blur of images (N, 1, H, W) with a standard deviation (N,) in pixels for each; at the edges the image is
    mirrored about the last pixel. The kernel ends at 4 standard deviations, or at `reach` (N,) pixels from its centre
    if that is less.
    """
    limit = (8 * sigma + 1).round().div(2, rounding_mode="floor")  # as OpenCV's, of an odd size
    limit = limit if reach is None else torch.minimum(limit, reach)
    radius = min(max(1, int(limit.max())), min(images.shape[2:]) - 1)  # no more can be mirrored
    distance = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (distance / sigma.to(images)[:, None]) ** 2)
    kernel = kernel * (distance.abs() <= limit.to(images)[:, None])
    kernel = kernel / kernel.sum(-1, keepdim=True)
    channels = F.pad(images.transpose(0, 1), (radius,) * 4, mode="reflect")  # one group for each image
    channels = F.conv2d(channels, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(channels, kernel[:, None, None, :], groups=len(kernel)).transpose(0, 1)


__all__ = ["MIN_VISIBLE_SHARE", "Augmentation", "GeometricTransform", "gaussian_blur"]
