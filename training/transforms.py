"""Augmentation of whole batches on their device: one resampling for all geometric steps, boxes carried exactly."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.image_transforms import center_to_corners_format, corners_to_center_format

from training.configuration import AugmentationConfig


# A box is dropped when less than this share of its area stays in the image (as in the official transforms).
MIN_VISIBLE_SHARE = 0.1
# On a processor, where larger parts would not stay in its caches
IMAGES_AT_ONCE = 2
BLUR_BLOCK = 32


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
        return _resample(images, *self.places(images.shape[2:], side))

    def places(self, input_size: Sequence[int], side: int | None = None) -> tuple[Tensor, ...]:
        """
        Where in the input (height, width) the pixels of the output are, as `_resample` takes it. Everything small is
        computed here for all images, so that they can be resampled a few at a time.
        """
        height, width = input_size if side is None else (side, side)
        affine, crop = _centred(self.affine), _centred(self.crop)
        columns, rows = (((torch.arange(n, device=crop.device) + 0.5) * 2 / n - 1) for n in (width, height))
        columns, rows = affine[..., :1] * columns + affine[..., 2:], affine[..., 1:2] * rows  # in the crop
        lengths = torch.tensor([[width], [height]], device=crop.device)
        input_lengths = torch.tensor([[input_size[1]], [input_size[0]]], device=crop.device)
        scale, shift = crop.diagonal(dim1=1, dim2=2)[..., None], crop[..., 2:]
        # from the centre of the crop to that of its last pixel, of the input or of the output, whichever is larger
        reach = scale.abs() - 1 / torch.minimum(input_lengths, lengths / scale.abs())
        return (
            (columns * scale + shift)[:, :, None],
            (rows * scale)[..., None],
            (shift - reach)[..., None],
            (shift + reach)[..., None],
            (columns * (lengths / 2))[:, :, None],
            (rows * (lengths / 2))[..., None],
        )

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


def _resample(
    images: Tensor, columns: Tensor, rows: Tensor, first: Tensor, last: Tensor, crop_columns: Tensor, crop_rows: Tensor
) -> Tensor:
    """
    Images (N, 1, H, W) at places in [-1, 1] that are sums of `columns` (N, 2, 1, W) and `rows` (N, 2, H, 1), x before
    y, and kept between `first` and `last` (N, 2, 1, 1). They fade to 0 where the sums of `crop_columns` and
    `crop_rows`, in pixels of the output from the centre of the crop, leave the crop.
    """
    grid = columns + rows  # much faster than `affine_grid`
    torch.maximum(grid, first, out=grid)
    torch.minimum(grid, last, out=grid)
    resampled = F.grid_sample(
        images, grid.permute(0, 2, 3, 1), mode="bilinear", padding_mode="border", align_corners=False
    )
    border = torch.tensor(grid.shape[:1:-1], device=grid.device).view(2, 1, 1) / 2 + 0.5
    inside = torch.add(crop_columns, crop_rows, out=grid).abs_().sub_(border).clamp_(-1, 0)  # -1 inside, for x and y
    return resampled.mul_(inside[:, :1]).mul_(inside[:, 1:])


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
        mirrored = draws[:, 2] < (0.0 if config.flip in (None, "off") else config.flip_probability)
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

    def pixels(self, images: Tensor, transform: GeometricTransform, draws: Tensor, side: int | None = None) -> Tensor:
        """
        Images (N, 1, H, W), uint8 or in [0, 1], moved by `transform`, the geometry of these draws, and changed in
        intensity: float (N, 1, H, W) or (N, 1, side, side) in [0, 1].
        """
        places = transform.places(images.shape[2:], side)
        levels = [level.to(images.device) for level in self._levels(draws)]
        if not images.is_floating_point():
            levels[0] = levels[0] / 255
        height, width = places[1].shape[2], places[0].shape[3]
        shape = (len(images), 1, height, width)
        if images.device.type == "cpu":
            # What its caches hold is several times as fast; and NumPy asks for huge pages, unlike PyTorch.
            at_once, result = IMAGES_AT_ONCE, torch.from_numpy(np.empty(shape, dtype=np.float32))
        else:
            at_once, result = max(len(images), 1), torch.empty(shape, device=images.device)
        for output, part, *rest in zip(*(x.split(at_once) for x in (result, images, *places, *levels)), strict=True):
            resampled = _resample(part.float(), *rest[: len(places)])
            output.copy_(_adjust(resampled, *rest[len(places) :]))
        return self._blur(result, draws)

    def intensity(self, images: Tensor, draws: Tensor) -> Tensor:
        """Brightness and contrast factors in random order, clipped to [0, 1], then blur; images (N, 1, H, W)."""
        return self._blur(_adjust(images.clone(), *(level.to(images) for level in self._levels(draws))), draws)

    def _levels(self, draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Factors of brightness before contrast, of contrast, and of brightness after it, each (N, 1, 1, 1)."""
        config, draws = self.config, draws[:, 2 * self.CROP_TRIES + 8 :, None, None, None]
        brightness = _scaled(draws[:, 0], (max(0.0, 1 - config.brightness), 1 + config.brightness))
        contrast = _scaled(draws[:, 1], (max(0.0, 1 - config.contrast), 1 + config.contrast))
        brighter_first = draws[:, 2] < 0.5
        return brightness.where(brighter_first, 1.0), contrast, brightness.masked_fill(brighter_first, 1.0)

    def _blur(self, images: Tensor, draws: Tensor) -> Tensor:
        """Blurs some of the images (N, 1, H, W), in place."""
        draws = draws[:, 2 * self.CROP_TRIES + 8 :]
        sigma = _scaled(draws[:, 4], self.config.blur_sigma)
        # As officially, the kernel has 3 pixels (50 %), 1, which is no blur (25 %), or what sigma asks for (25 %).
        kind = draws[:, 5]
        reach = torch.where(kind < 0.5, 1.0, math.inf)
        blurred = (draws[:, 3] < self.config.blur_probability) & (kind < 0.75)
        for wide in (False, True):  # apart, since every kernel is as wide as the widest of its group
            group = (blurred & (reach.isinf() == wide)).nonzero().squeeze(1)
            if len(group):
                chosen = group.to(images.device)
                images[chosen] = gaussian_blur(images[chosen], sigma[group], reach[group])
        return images


def _adjust(images: Tensor, before: Tensor, contrast: Tensor, after: Tensor) -> Tensor:
    """Factors (N, 1, 1, 1) of brightness, contrast and again brightness, one after another, in place."""
    images.mul_(before).clamp_(0, 1)
    mean = images.mean(dim=(-2, -1), keepdim=True)
    images.mul_(contrast).add_(mean * (1 - contrast)).clamp_(0, 1)
    return images.mul_(after).clamp_(0, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images (N, 1, H, W) less a mean, over a standard deviation (C, 1, 1), as (N, C, H, W); in place if C is 1."""
    if len(mean) == len(std) == 1:  # large new arrays cost more than the arithmetic
        return images.sub_(mean).div_(std)
    return (images - mean) / std


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
    limit = limit.clamp(1, min(images.shape[2:]) - 1).to(torch.int64)  # no more can be mirrored
    radius = int(limit.max())
    distance = torch.arange(-radius, radius + 1)
    kernels = torch.exp(-0.5 * (distance / sigma[:, None]) ** 2) * (distance.abs() <= limit[:, None])
    kernels = (kernels / kernels.sum(-1, keepdim=True)).to(images)
    if images.device.type != "cpu":
        return _convolve_together(images, kernels)
    cut = (kernel[radius - own : radius + own + 1] for kernel, own in zip(kernels, limit.tolist(), strict=True))
    return torch.stack([_convolve(image[0], kernel) for image, kernel in zip(images, cut, strict=True)])[:, None]


def _convolve_together(images: Tensor, kernels: Tensor) -> Tensor:
    """Images (N, 1, H, W) with a kernel (N, 2R + 1) for each along both axes; slow on processors, for small N most."""
    radius = kernels.shape[1] // 2
    channels = F.pad(images.transpose(0, 1), (radius,) * 4, mode="reflect")  # one group for each image
    channels = F.conv2d(channels, kernels[:, None, :, None], groups=len(kernels))
    return F.conv2d(channels, kernels[:, None, None, :], groups=len(kernels)).transpose(0, 1)


def _convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """An image (H, W) with a symmetric kernel (2R + 1) along both axes."""
    (height, width), radius = image.shape, len(kernel) // 2
    image = F.pad(image[None], (radius,) * 4, mode="reflect")[0]
    if radius <= 2:
        for axis, length in enumerate((height, width)):
            shifted = [image.narrow(axis, start, length) for start in range(2 * radius + 1)]
            image = shifted[radius] * kernel[radius]
            for part, weight in zip(shifted, kernel.tolist(), strict=True):
                if part is not shifted[radius]:
                    image.add_(part, alpha=weight)
        return image
    # A band matrix times overlapping blocks of rows, then of columns: most of the matrix of all rows would be zero.
    size = BLUR_BLOCK + 2 * radius
    band = image.new_zeros(BLUR_BLOCK, size)
    band.as_strided((BLUR_BLOCK, len(kernel)), (size + 1, 1)).copy_(kernel.expand(BLUR_BLOCK, -1))
    image = F.pad(image, (0, -width % BLUR_BLOCK, 0, -height % BLUR_BLOCK))
    blocks = image.unfold(0, size, BLUR_BLOCK).mT  # (blocks, size, W + 2R)
    image = (band.expand(len(blocks), -1, -1) @ blocks).flatten(0, 1)
    blocks = image.unfold(1, size, BLUR_BLOCK).transpose(0, 1)  # (blocks, H, size)
    image = torch.bmm(blocks, band.T.expand(len(blocks), -1, -1))
    return image.transpose(0, 1).flatten(1)[:height, :width]


__all__ = ["MIN_VISIBLE_SHARE", "Augmentation", "GeometricTransform", "gaussian_blur", "normalise"]
