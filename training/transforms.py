"""Augmentation of whole batches on their device: one resampling for all geometric steps, boxes carried exactly."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

from training.configuration import AugmentationConfig


# A box is dropped when less than this share of its area stays in the image (as in the official transforms).
MIN_VISIBLE_SHARE = 0.1


@dataclass
class GeometricTransform:
    """
    Affine maps of normalised image coordinates, one for each image of a batch.

    Attributes:
        matrix (`Tensor` of shape `(N, 2, 3)`): Output to input, as `grid_sample` wants it, but for coordinates in
            [0, 1] instead of [-1, 1].
    """

    matrix: Tensor

    def images(self, images: Tensor) -> Tensor:
        """Resamples images (N, 1, H, W) bilinearly; what lies outside is 0."""
        linear, shift = self.matrix[..., :2], self.matrix[..., 2]
        centred = 2 * (shift + linear.sum(-1) / 2) - 1  # the same map in [-1, 1] coordinates
        grid = F.affine_grid(torch.cat([linear, centred[..., None]], -1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    def boxes(self, boxes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """
        Moves boxes (N, ..., 4), normalised cxcywh, and clips them to the image; a rotated box becomes the hull of its
        corners. Returns the boxes and the mask (N, ...) of those of which at least a tenth remains.
        """
        linear, shift = self.matrix[..., :2], self.matrix[..., 2]
        inverse = torch.linalg.inv(linear)
        corners = center_to_corners_format(boxes).flatten(1, -2)  # (N, K, 4)
        points = corners[..., [0, 1, 2, 1, 0, 3, 2, 3]].unflatten(-1, (4, 2)).flatten(1, 2)  # (N, 4K, 2)
        points = ((points - shift[:, None]) @ inverse.mT).unflatten(1, (-1, 4))
        moved = torch.cat([points.amin(2), points.amax(2)], -1)
        clipped = moved.clamp(0, 1)
        area, visible = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (moved, clipped))
        kept = (visible > 1e-6) & (visible >= MIN_VISIBLE_SHARE * area)
        kept = kept.view(mask.shape) & mask
        return corners_to_center_format(clipped).view(boxes.shape) * kept[..., None], kept


class Augmentation:
    """
    Random resized crop, mirror, affine map, brightness and contrast, blur, with the official ranges.

    Crop, mirror and affine map are composed into one matrix and the image is resampled once, where the official
    pipeline resamples after every step.
    """

    def __init__(self, config: AugmentationConfig):
        self.config = config

    def sample(self, count: int, generator: torch.Generator) -> GeometricTransform:
        """Draws the maps of `count` images."""
        config = self.config

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(count, generator=generator)

        area = uniform(*config.crop_area)
        aspect = uniform(math.log(config.crop_aspect[0]), math.log(config.crop_aspect[1])).exp()
        width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
        left, top = uniform(0, 1) * (1 - width), uniform(0, 1) * (1 - height)
        mirrored = torch.rand(count, generator=generator) < config.flip_probability

        angle = torch.deg2rad(uniform(-config.rotation, config.rotation))
        scale_x, scale_y = uniform(*config.scale), uniform(*config.scale)
        shift_x, shift_y = (uniform(-config.translation, config.translation) for _ in range(2))
        # forward: scale about the centre, rotate, shift; its inverse takes output to the cropped image
        cos, sin = angle.cos(), angle.sin()
        forward = torch.stack(
            [torch.stack([cos * scale_x, -sin * scale_y], -1), torch.stack([sin * scale_x, cos * scale_y], -1)], -2
        )
        linear = torch.linalg.inv(forward)
        centre = torch.full((count, 2), 0.5)
        offset = centre - (linear @ (centre + torch.stack([shift_x, shift_y], -1))[..., None]).squeeze(-1)

        size = torch.stack([torch.where(mirrored, -width, width), height], -1)
        origin = torch.stack([torch.where(mirrored, left + width, left), top], -1)
        return GeometricTransform(torch.cat([size[..., None] * linear, (origin + size * offset)[..., None]], -1))

    def intensity(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Brightness and contrast factors in random order, clipped to [0, 1], then blur; images (N, 1, H, W)."""
        config, count = self.config, images.shape[0]

        def factor(extent: float) -> Tensor:
            return (1 - extent + 2 * extent * torch.rand(count, 1, 1, 1, generator=generator)).to(images.device)

        def brighten(values: Tensor) -> Tensor:
            return (values * brightness).clamp(0, 1)

        def stretch(values: Tensor) -> Tensor:
            mean = values.mean(dim=(-2, -1), keepdim=True)
            return (mean + (values - mean) * contrast).clamp(0, 1)

        brightness, contrast = factor(config.brightness), factor(config.contrast)
        steps = [brighten, stretch]
        if torch.rand(1, generator=generator) < 0.5:
            steps.reverse()
        for step in steps:
            images = step(images)
        blurred = torch.rand(count, generator=generator) < config.blur_probability
        sigma = config.blur_sigma[0] + (config.blur_sigma[1] - config.blur_sigma[0]) * torch.rand(
            count, generator=generator
        )
        # As officially, the kernel has 3 pixels (50 %), 1, which is no blur (25 %), or what sigma asks for (25 %).
        kind = torch.rand(count, generator=generator)
        reach = torch.where(kind < 0.5, 1.0, math.inf)
        blurred &= kind < 0.75
        if blurred.any():
            images = images.clone()
            images[blurred] = gaussian_blur(images[blurred], sigma[blurred], reach[blurred])
        return images


def gaussian_blur(images: Tensor, sigma: Tensor, reach: Tensor | None = None) -> Tensor:
    """
    Separable blur of images (N, 1, H, W) with a standard deviation (N,) in pixels for each; edges are repeated. The
    kernel ends at 4 standard deviations, or at `reach` (N,) pixels from its centre if that is less.
    """
    limit = (4 * sigma).round() if reach is None else torch.minimum((4 * sigma).round(), reach)
    radius = max(1, int(limit.max()))
    distance = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (distance / sigma.to(images)[:, None]) ** 2)
    kernel = kernel * (distance.abs() <= limit.to(images)[:, None])
    kernel = kernel / kernel.sum(-1, keepdim=True)
    channels = F.pad(images.transpose(0, 1), (radius,) * 4, mode="replicate")  # one group for each image
    channels = F.conv2d(channels, kernel[:, None, :, None], groups=len(kernel))
    return F.conv2d(channels, kernel[:, None, None, :], groups=len(kernel)).transpose(0, 1)


__all__ = ["MIN_VISIBLE_SHARE", "Augmentation", "GeometricTransform", "gaussian_blur"]
