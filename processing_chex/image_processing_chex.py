"""Image processor for ChEX."""

from typing import Any, TypedDict

import numpy as np
import PIL.Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling, SizeDict
from transformers.processing_utils import Unpack
from transformers.utils import TensorType

from .box_geometry import image_frame
from .errors import ChexInputError
from .image_loading import load_image


class ChexImageProcessorKwargs(TypedDict, total=False):
    """Only the arguments that have an effect: every other one is an error rather than ignored.

    size (`int` or `dict`):
        Side of the square input in pixels.
    geometry (`str`):
        `"center_crop"` cuts the long side to the central square, as in the ChEX evaluation; `"letterbox"` keeps the
        whole image and pads the short side with black.
    resample (`PILImageResampling`):
        Filter of the resizing, with antialiasing.
    do_rescale (`bool`), rescale_factor (`float`):
        Factor for grey values on the scale of 8 bits, 0 to 255, to which images of every bit depth are mapped first.
        Without it they stay in [0, 1], as with the usual factor of 1/255.
    do_normalize (`bool`), image_mean, image_std (`float` or a list of one or three):
        Normalisation of the grey values, in every channel or in each.
    do_convert_rgb (`bool`):
        Only true: any image, in grey or colour, becomes three equal channels.
    return_tensors (`str`):
        `"pt"` or `"np"`.
    """

    size: int | list[int] | tuple[int, ...] | dict[str, int] | SizeDict | None
    geometry: str | None
    resample: PILImageResampling | int | None
    do_rescale: bool | None
    rescale_factor: float | int | None
    do_normalize: bool | None
    image_mean: float | list[float] | tuple[float, ...] | None
    image_std: float | list[float] | tuple[float, ...] | None
    do_convert_rgb: bool | None
    return_tensors: str | TensorType | None


class ChexImageProcessor(PilBackend):
    """Turns radiographs into the square, normalised input of ChEX.

    Every image is read as grey values in [0, 1] (see `image_loading.load_image` for what is accepted and how bit
    depths are mapped), mapped to a `size` x `size` square by the `geometry`, normalised and repeated to three equal
    channels. The output holds

    - `pixel_values`: float32 (B, 3, size, size);
    - `image_frames`: float32 (B, 4), the `xyxy` rectangle in original pixels that the square covers. It lies inside
      the image for `"center_crop"` and sticks out for `"letterbox"`; `x_original = x0 + x_normalised * (x1 - x0)`;
    - `original_sizes`: int64 (B, 2), (height, width) in pixels.

    There is one backend, PIL: results do not depend on whether torchvision is installed.
    """

    valid_kwargs = ChexImageProcessorKwargs
    model_input_names = ["pixel_values", "image_frames", "original_sizes"]

    geometry = "center_crop"
    size = {"height": 224, "width": 224}
    resample = PILImageResampling.BILINEAR
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = 0.505
    image_std = 0.248
    do_convert_rgb = True

    def __init__(self, **kwargs: Unpack[ChexImageProcessorKwargs]):
        super().__init__(**kwargs)
        image_frame(1, 1, self.geometry)  # raises for an unknown geometry

    def frame(self, height: int, width: int, geometry: str | None = None) -> tuple[float, float, float, float]:
        """The `xyxy` rectangle, in pixels of a `height` x `width` image, that the network square covers."""
        return image_frame(height, width, geometry or self.geometry)

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return super()._standardize_kwargs(default_to_square=True, **kwargs)

    def _prepare_image_like_inputs(self, images: Any, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        """Read one image or a list of images -> list of float32 (H, W) arrays in [0, 1]."""
        if isinstance(images, (list, tuple)):
            return [load_image(image, name=f"image {number}") for number, image in enumerate(images, start=1)]
        if getattr(images, "ndim", 0) == 4:  # a batch as one array or tensor
            return [load_image(image, name=f"image {number}") for number, image in enumerate(images, start=1)]
        return [load_image(images)]

    def _preprocess(
        self,
        images: list[np.ndarray],
        size: SizeDict,
        geometry: str,
        resample: PILImageResampling | int,
        do_rescale: bool,
        rescale_factor: float | None,
        do_normalize: bool,
        image_mean: float | list[float] | tuple[float, ...],
        image_std: float | list[float] | tuple[float, ...],
        do_convert_rgb: bool | None = None,
        return_tensors: str | TensorType | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        if size.height is None or size.height != size.width:
            raise ChexInputError(f"size must be one number, the side of the square input, but it is {dict(size)}.")
        if do_convert_rgb is False:
            raise ChexInputError("do_convert_rgb cannot be False: the image encoder takes three (equal) channels.")
        side = size.height
        frames = [image_frame(*image.shape, geometry) for image in images]
        pixel_values = np.empty((len(images), 3, side, side), dtype=np.float32)
        for output, image, frame in zip(pixel_values, images, frames, strict=True):
            output[:] = resize_frame(image, frame, side, resample)
        if do_rescale and rescale_factor is not None and rescale_factor != 1 / 255:
            pixel_values *= np.float32(255 * rescale_factor)
        if do_normalize:
            pixel_values = (pixel_values - per_channel("image_mean", image_mean)) / per_channel("image_std", image_std)
        data = {
            "pixel_values": pixel_values,
            "image_frames": np.array(frames, dtype=np.float32).reshape(-1, 4),
            "original_sizes": np.array([image.shape for image in images], dtype=np.int64).reshape(-1, 2),
        }
        return BatchFeature(data, tensor_type=return_tensors)


def per_channel(name: str, value: float | list[float] | tuple[float, ...]) -> np.ndarray:
    """One number, or one for each of the three channels -> float32 (1 or 3, 1, 1)."""
    values = np.array(value, dtype=np.float32).reshape(-1, 1, 1)
    if len(values) not in (1, 3):
        raise ChexInputError(f"{name} has {len(values)} values: give one number, or one for each of three channels.")
    return values


def resize_frame(
    image: np.ndarray, frame: tuple[float, float, float, float], side: int, resample: PILImageResampling | int
) -> np.ndarray:
    """Resample the square `frame` of a grey image (H, W) to (side, side); what lies outside the image is black."""
    height, width = image.shape
    x0, y0, x1, y1 = (int(edge) for edge in frame)
    # Cut out first: Pillow's `box` argument would let pixels from beyond the edge into the filter.
    picture = PIL.Image.fromarray(np.ascontiguousarray(image[max(y0, 0) : y1, max(x0, 0) : x1], dtype=np.float32))
    if picture.size == (x1 - x0, y1 - y0):
        return np.asarray(picture.resize((side, side), resample))
    # Resampling is separable: shrink the long axis first, then pad the other one at full resolution. This gives the
    # pixels of the padded square without ever holding it, however elongated the image is.
    if width >= height:
        picture, offset, canvas = picture.resize((side, height), resample), (0, -y0), (side, y1 - y0)
    else:
        picture, offset, canvas = picture.resize((width, side), resample), (-x0, 0), (x1 - x0, side)
    padded = PIL.Image.new("F", canvas)
    padded.paste(picture, offset)
    return np.asarray(padded.resize((side, side), resample))


__all__ = ["ChexImageProcessor"]
