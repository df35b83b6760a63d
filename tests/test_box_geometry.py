"""Box arithmetic: conversions, frames, validation, suppression."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from processing_chex.box_geometry import (
    GEOMETRIES,
    box_iou,
    class_wise_nms,
    clip_boxes,
    cxcywh_to_xyxy,
    enclosing_boxes,
    image_frame,
    normalized_to_pixels,
    pixels_to_normalized,
    validate_boxes,
    xyxy_to_cxcywh,
)
from processing_chex.errors import ChexInputError


@st.composite
def image_and_box(draw):
    height, width = draw(st.integers(1, 6000)), draw(st.integers(1, 6000))
    fractions = [draw(st.floats(0, 1, width=32)) for _ in range(4)]
    x0, x1 = sorted((fractions[0] * width, fractions[1] * width))
    y0, y1 = sorted((fractions[2] * height, fractions[3] * height))
    return height, width, torch.tensor([x0, y0, x1, y1], dtype=torch.float32)


@given(image_and_box(), st.sampled_from(GEOMETRIES))
@settings(max_examples=300, deadline=None)
def test_pixels_survive_the_round_trip_at_any_aspect_ratio(case, geometry):
    height, width, box = case
    frame = torch.tensor(image_frame(height, width, geometry))
    back = normalized_to_pixels(pixels_to_normalized(box, frame), frame)
    assert (back - box).abs().max() < 0.5


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_frames_are_centred_squares(height, width):
    for geometry in GEOMETRIES:
        x0, y0, x1, y1 = image_frame(height, width, geometry)
        side = min(height, width) if geometry == "center_crop" else max(height, width)
        assert x1 - x0 == y1 - y0 == side
        assert abs((x0 + x1) / 2 - width / 2) <= 0.5
        assert abs((y0 + y1) / 2 - height / 2) <= 0.5
    x0, y0, x1, y1 = image_frame(height, width, "center_crop")
    assert x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
    x0, y0, x1, y1 = image_frame(height, width, "letterbox")
    assert x0 <= 0 and y0 <= 0 and x1 >= width and y1 >= height


def test_frame_numbers():
    assert image_frame(100, 161, "center_crop") == (30, 0, 130, 100)
    assert image_frame(100, 160, "letterbox") == (0, -30, 160, 130)
    with pytest.raises(ChexInputError, match="center_crop, letterbox"):
        image_frame(10, 10, "stretch")


def test_format_conversion_keeps_shape_and_inverts():
    boxes = torch.rand(2, 3, 4)
    assert torch.allclose(xyxy_to_cxcywh(cxcywh_to_xyxy(boxes)), boxes, atol=1e-6)
    assert cxcywh_to_xyxy(torch.tensor([0.5, 0.5, 0.2, 0.4])).tolist() == pytest.approx([0.4, 0.3, 0.6, 0.7])
    assert cxcywh_to_xyxy(torch.zeros(0, 4)).shape == (0, 4)


def test_frames_broadcast_over_a_batch():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0]], [[0.5, 0.5, 1.0, 1.0]]])
    frames = torch.tensor([[10.0, 0.0, 30.0, 20.0], [0.0, -5.0, 50.0, 45.0]])
    assert torch.equal(normalized_to_pixels(boxes, frames[:, None]), frames[:, None])


def test_clip_uses_height_and_width():
    boxes = torch.tensor([[-5.0, -5.0, 100.0, 100.0]])
    assert clip_boxes(boxes, torch.tensor([20, 30])).tolist() == [[0, 0, 30, 20]]


def test_iou():
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]])
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [5.0, 5.0, 6.0, 6.0], [1.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(box_iou(a, b), torch.tensor([[1 / 3, 0, 0], [0, 0, 0]]))


def test_nms_is_per_class_and_best_first():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]])
    scores = torch.tensor([0.5, 0.9, 0.7, 0.1])
    assert class_wise_nms(boxes, scores, torch.tensor([0, 0, 1, 0]), 0.5).tolist() == [1, 2, 3]
    assert class_wise_nms(boxes, scores, torch.zeros(4), 0.5).tolist() == [1, 3]
    assert class_wise_nms(boxes, scores, torch.zeros(4), 0.95).tolist() == [1, 2, 3]
    assert class_wise_nms(boxes[:0], scores[:0], torch.zeros(0), 0.5).tolist() == []


@given(st.integers(0, 12), st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_nms_keeps_no_overlap_and_explains_every_drop(count, seed):
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator)
    boxes = torch.cat([corners, corners + 0.5 * torch.rand(count, 2, generator=generator)], dim=1)
    scores = torch.rand(count, generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    kept = class_wise_nms(boxes, scores, labels, 0.3)
    clash = (box_iou(boxes, boxes) > 0.3) & (labels[:, None] == labels[None])
    clash.fill_diagonal_(False)
    assert not clash[kept][:, kept].any()
    for dropped in set(range(count)) - set(kept.tolist()):
        assert any(clash[dropped, k] and scores[k] >= scores[dropped] for k in kept)


def test_enclosing_box():
    boxes = torch.tensor([[[1.0, 2, 3, 4], [0, 3, 2, 9]], [[5, 5, 6, 6], [5, 5, 6, 6]]])
    assert enclosing_boxes(boxes).tolist() == [[0, 2, 3, 9], [5, 5, 6, 6]]


def test_valid_boxes_pass_and_are_clipped_to_the_image():
    assert validate_boxes([[0, 0, 30, 20]], 20, 30).tolist() == [[0, 0, 30, 20]]
    assert validate_boxes([[-0.5, 0, 30.9, 20]], 20, 30).tolist() == [[0, 0, 30, 20]]
    assert validate_boxes(np.array([[1.5, 2, 3, 4]]), 20, 30).tolist() == [[1.5, 2, 3, 4]]
    assert validate_boxes([], 20, 30).shape == (0, 4)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        ([5, 5, 2, 10], "inverted or empty"),
        ([5, 5, 5, 10], "inverted or empty"),
        ([5, 5, 40, 10], "outside"),
        ([-3, 5, 10, 10], "outside"),
        ([30.5, 1, 30.9, 10], "outside"),
        ([5, 5, float("nan"), 10], "not finite"),
        ([5, 5, float("inf"), 10], "not finite"),
        ([5, 5, 10], "3 numbers"),
    ],
)
def test_wrong_boxes_are_named_with_the_image_size(box, message):
    with pytest.raises(ChexInputError, match=message) as error:
        validate_boxes([[0, 0, 5, 5], box], 20, 30, image_name="scan.png")
    assert "box 2" in str(error.value)
    assert "scan.png" in str(error.value)
    assert "30 x 20" in str(error.value)
