"""One radiograph, whatever it comes in, as grey values in [0, 1]."""

import warnings
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps

from .dicom import bit_depth_maximum, is_dicom, may_be_bare_dicom, read_dicom
from .errors import ChexInputError


# Only plain raster formats: Pillow would start Ghostscript for an EPS file.
FILE_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "JPEG2000", "PPM", "WEBP", "GIF")
# ITU-R 601-2, as Pillow's own conversion to grey; three equal channels come out unchanged.
LUMA_WEIGHTS = np.array([0.299, 0.587, 0.114])
# Floats may miss [0, 1] by this much, as resampling filters leave them, and are then clipped.
RANGE_TOLERANCE = 1e-3


def load_image(image: Any, name: str = "the image") -> np.ndarray:
    """Read or convert one image to grey values.

    Args:
        image: a path to a PNG, JPEG, TIFF, BMP, WebP or DICOM file (told apart by content, not by name); a PIL image;
            or a numpy array or torch tensor of shape (H, W), (H, W, C) or (C, H, W) with C in {1, 3, 4}.
        name: how an error message calls an image that has no file name.

    8-bit values are divided by 255. Wider integers, as in 16-bit PNG, are divided by the full scale of the smallest
    detector depth (8, 10, 12, 14 or 16 bits) that holds the largest pixel, since files rarely state the depth. Floats
    must already lie in [0, 1]. Colour becomes luma, transparent pixels become black. The orientation tag of a camera
    file is applied. DICOM values go through `dicom.read_dicom`.

    Returns:
        float32 (height, width) in [0, 1].

    Raises:
        ChexInputError: naming the file or image, for anything that cannot be read as one image.
    """
    if isinstance(image, (str, PathLike)):
        return _load_file(Path(image))
    if isinstance(image, PIL.Image.Image):
        return _grey(_pil_values(image, name), name)
    if hasattr(image, "detach"):  # a torch tensor
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    if isinstance(image, np.ndarray):
        return _grey(_channels_last(image, name), name)
    raise ChexInputError(
        f"{name} is a {type(image).__name__}, but an image is a path, a PIL image, a numpy array or a torch tensor."
    )


def _load_file(path: Path) -> np.ndarray:
    try:
        if path.is_dir():
            raise ChexInputError(f"{path} is a folder, but an image file is needed: name the files in it one by one.")
        if not path.exists():
            raise ChexInputError(f"{path} does not exist: check the path of the image.")
        if path.stat().st_size == 0:
            raise ChexInputError(f"{path} is empty (0 bytes): copy or export the image again.")
        if is_dicom(path):
            return read_dicom(path)
    except OSError as error:
        raise ChexInputError(f"{path} cannot be opened ({error.strerror}): check the path and its rights.") from error
    PIL.Image.init()
    formats = [name for name in FILE_FORMATS if name in PIL.Image.OPEN]  # those that Pillow was built with
    try:
        with PIL.Image.open(path, formats=formats) as image:
            return _grey(_pil_values(image, str(path)), str(path))
    except PIL.UnidentifiedImageError as error:
        if may_be_bare_dicom(path):
            return read_dicom(path)
        raise ChexInputError(f"{path} is not an image: ChEX reads PNG, JPEG, TIFF and DICOM files.") from error
    except PIL.Image.DecompressionBombError as error:
        raise ChexInputError(f"{path} has far too many pixels for a radiograph ({error}): scale it down.") from error
    except ChexInputError:
        raise
    except Exception as error:  # a damaged header raises nearly anything
        raise ChexInputError(f"{path} is truncated or damaged ({error}): copy or export the image again.") from error


def _pil_values(image: PIL.Image.Image, name: str) -> np.ndarray:
    """Decode a PIL image to an array (H, W) or (H, W, 3 | 4) of its own bit depth."""
    # An MPO file is a photograph with a preview in its second frame.
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ChexInputError(
            f"{name} has {image.n_frames} frames, but ChEX explains single images: export one as PNG."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about metadata that plays no role here
            image.load()
            image = PIL.ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return np.asarray(image)
        if image.has_transparency_data:
            return np.asarray(image.convert("RGBA"))
        return np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, struct.error, zlib.error, ...
        raise ChexInputError(f"{name} is truncated or damaged ({error}): copy or export the image again.") from error


def _channels_last(array: np.ndarray, name: str) -> np.ndarray:
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ChexInputError(
            f"{name} has the shape {array.shape}, but one image is (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 "
            "channels: pass several images as a list."
        )
    return array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array


def _grey(array: np.ndarray, name: str) -> np.ndarray:
    """(H, W) or (H, W, 3 | 4) of any number type -> float32 (H, W) in [0, 1]."""
    if array.size == 0:
        raise ChexInputError(f"{name} has no pixels (shape {array.shape}): pass an image of at least one pixel.")
    array = _to_unit_range(array, name)
    if array.ndim == 3:
        luma = array[..., :3] @ LUMA_WEIGHTS.astype(np.float32)
        array = luma * array[..., 3] if array.shape[-1] == 4 else luma
    return np.clip(array, 0.0, 1.0, dtype=np.float32)


def _to_unit_range(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.bool_:
        return array.astype(np.float32)
    if array.dtype == np.uint8:
        return array.astype(np.float32) / 255
    if np.issubdtype(array.dtype, np.integer):
        lowest, highest = int(array.min()), int(array.max())
        if lowest < 0 or highest > 65535:
            raise ChexInputError(
                f"{name} has integer pixels from {lowest} to {highest}, but they must lie in 0..65535: "
                "map them to 16 bits, or to floats in [0, 1]."
            )
        return (array / bit_depth_maximum(highest)).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        raise ChexInputError(f"{name} has pixels of type {array.dtype}: use integers, or floats in [0, 1].")
    lowest, highest = float(array.min()), float(array.max())
    if not np.isfinite([lowest, highest]).all():
        raise ChexInputError(f"{name} contains NaN or infinite pixels: replace them by values in [0, 1].")
    if lowest < -RANGE_TOLERANCE or highest > 1 + RANGE_TOLERANCE:
        raise ChexInputError(
            f"{name} has float pixels from {lowest:g} to {highest:g}, but floats must lie in [0, 1]: divide by the "
            "full scale (255 for 8 bits); the mean and deviation are applied later."
        )
    return array.astype(np.float32)
