"""Boxes as pure functions of tensors.

Two formats exist. Inside the model a box is `cxcywh`: centre, width and height, normalised to the square that the
network sees. Outside it is `xyxy`: left, top, right, bottom in pixels of the original image, where pixel `i` covers
the interval `[i, i + 1)`. The link between the two is the *image frame*: the `xyxy` rectangle in original pixels that
the network square covers, so that `x_original = x0 + x_normalised * (x1 - x0)`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ChexInputError


GEOMETRIES = ("center_crop", "letterbox")

# A box may stick out of its image by this many pixels before it counts as wrong: annotation tools round.
OUTSIDE_TOLERANCE = 1.0


def image_frame(height: int, width: int, geometry: str) -> tuple[float, float, float, float]:
    """The square of the original image that the network sees, as `xyxy` pixels.

    `"center_crop"` takes the central square of the short side (the ChEX evaluation geometry) and lies inside the
    image; `"letterbox"` takes the square of the long side and sticks out on both sides of the short one.
    """
    if geometry not in GEOMETRIES:
        raise ChexInputError(f"geometry must be one of {', '.join(GEOMETRIES)}, but it is {geometry!r}.")
    side = min(height, width) if geometry == "center_crop" else max(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return float(left), float(top), float(left + side), float(top + side)


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size to corners."""
    center, size = boxes_cxcywh[..., :2], boxes_cxcywh[..., 2:]
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners to centre and size."""
    top_left, bottom_right = boxes_xyxy[..., :2], boxes_xyxy[..., 2:]
    return torch.cat([(top_left + bottom_right) / 2, bottom_right - top_left], dim=-1)


def pixels_to_normalized(boxes_xyxy: Tensor, frames: Tensor) -> Tensor:
    """(..., 4) `xyxy` pixels of the original image to normalised `cxcywh`; `frames` (..., 4) broadcasts."""
    origin, side = frames[..., :2], frames[..., 2:] - frames[..., :2]
    return xyxy_to_cxcywh((boxes_xyxy - torch.cat([origin, origin], dim=-1)) / torch.cat([side, side], dim=-1))


def normalized_to_pixels(boxes_cxcywh: Tensor, frames: Tensor) -> Tensor:
    """(..., 4) normalised `cxcywh` to `xyxy` pixels of the original image; `frames` (..., 4) broadcasts."""
    origin, side = frames[..., :2], frames[..., 2:] - frames[..., :2]
    return cxcywh_to_xyxy(boxes_cxcywh) * torch.cat([side, side], dim=-1) + torch.cat([origin, origin], dim=-1)


def clip_boxes(boxes_xyxy: Tensor, sizes: Tensor) -> Tensor:
    """Clamp (..., 4) `xyxy` pixel boxes to images of `sizes` (..., 2), as (height, width); `sizes` broadcasts."""
    limits = sizes.to(boxes_xyxy).flip(-1)
    return torch.minimum(boxes_xyxy.clamp(min=0), torch.cat([limits, limits], dim=-1))


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Intersection over union of (N, 4) with (M, 4) `xyxy` boxes -> (N, M); 0 where both boxes are empty."""
    top_left = torch.maximum(boxes1_xyxy[:, None, :2], boxes2_xyxy[None, :, :2])
    bottom_right = torch.minimum(boxes1_xyxy[:, None, 2:], boxes2_xyxy[None, :, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    area1, area2 = ((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1) for boxes in (boxes1_xyxy, boxes2_xyxy))
    union = area1[:, None] + area2[None, :] - intersection
    return torch.where(union > 0, intersection / union.clamp(min=torch.finfo(union.dtype).tiny), 0.0)


def class_wise_nms(boxes_xyxy: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression within each class.

    Args:
        boxes_xyxy: (N, 4), in any unit.
        scores: (N,).
        labels: (N,) class indices; boxes of different classes never suppress each other.
        iou_threshold: a box is dropped if it overlaps a better one of its class by more than this.

    Returns:
        Indices of the kept boxes, best score first; ties keep the input order.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes_xyxy, labels = boxes_xyxy[order].float(), labels[order]
    suppresses = (box_iou(boxes_xyxy, boxes_xyxy) > iou_threshold) & (labels[:, None] == labels[None, :])
    keep = torch.ones(len(order), dtype=torch.bool, device=scores.device)
    for index in range(len(order)):
        if keep[index]:
            keep[index + 1 :] &= ~suppresses[index, index + 1 :]
    return order[keep]


def enclosing_boxes(boxes_xyxy: Tensor) -> Tensor:
    """The smallest box around each group of R boxes: (..., R, 4) `xyxy` -> (..., 4)."""
    return torch.cat([boxes_xyxy[..., :2].amin(-2), boxes_xyxy[..., 2:].amax(-2)], dim=-1)


def validate_boxes(
    boxes_xyxy: Tensor | Sequence[Sequence[float]], height: int, width: int, image_name: str = "the image"
) -> Tensor:
    """Check user boxes against their image.

    Args:
        boxes_xyxy: M boxes as `xyxy` pixels of the original image.
        height, width: size of that image in pixels.
        image_name: how an error message calls the image.

    Returns:
        float32 (M, 4), clipped to the image (a box may stick out by up to one pixel).

    Raises:
        ChexInputError: naming the first box that is not four finite numbers, is inverted, or leaves the image.
    """
    checked = []
    for number, box in enumerate(boxes_xyxy, start=1):
        values = torch.as_tensor(box, dtype=torch.float32).flatten()
        shown = f"box {number} ({', '.join(f'{value:g}' for value in values.tolist())}) of {image_name}"
        where = f"the image is {width} x {height} pixels (width x height)"
        if values.numel() != 4:
            raise ChexInputError(f"{shown} has {values.numel()} numbers: a box is x0,y0,x1,y1 in pixels; {where}.")
        if not values.isfinite().all():
            raise ChexInputError(f"{shown} is not finite: a box is four numbers x0,y0,x1,y1 in pixels; {where}.")
        x0, y0, x1, y1 = values.tolist()
        if x1 <= x0 or y1 <= y0:
            raise ChexInputError(
                f"{shown} is inverted or empty: give the left, top, right and bottom edge in this order, "
                f"with x0 < x1 and y0 < y1; {where}."
            )
        if min(x0, y0) < -OUTSIDE_TOLERANCE or x1 > width + OUTSIDE_TOLERANCE or y1 > height + OUTSIDE_TOLERANCE:
            raise ChexInputError(f"{shown} lies outside the image: {where}; give pixel coordinates inside it.")
        clipped = clip_boxes(values, torch.tensor([height, width]))
        if (clipped[2:] <= clipped[:2]).any():
            raise ChexInputError(f"{shown} lies outside the image: {where}; give pixel coordinates inside it.")
        checked.append(clipped)
    return torch.stack(checked) if checked else torch.zeros(0, 4)
