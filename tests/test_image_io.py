"""Reading images: every format and bit depth in, grey values in [0, 1] out, one clear error otherwise."""

import numpy as np
import PIL.Image
import pytest
import torch
from pydicom.uid import JPEGLSLossless

from processing_chex import dicom
from processing_chex.dicom import bit_depth_maximum, read_dicom
from processing_chex.errors import ChexInputError
from processing_chex.image_loading import load_image

from .image_factory import gradient, lookup_table, pydicom_sample, save_dicom, save_image


def test_png_jpeg_and_array_agree(tmp_path):
    array = gradient(40, 30)
    png = load_image(save_image(tmp_path / "a.png", array))
    assert png.dtype == np.float32
    assert png.shape == (40, 30)
    assert np.array_equal(png, array.astype(np.float32) / 255)
    assert np.array_equal(png, load_image(str(tmp_path / "a.png")))
    assert np.abs(load_image(save_image(tmp_path / "a.jpg", array, quality=95)) - png).max() < 0.03
    for same in (array, array[..., None], np.repeat(array[..., None], 3, -1), array / 255, array / np.float32(255)):
        assert np.allclose(load_image(same), png, atol=1e-6)
        assert np.allclose(load_image(torch.tensor(same)), png, atol=1e-6)
    assert np.allclose(load_image(torch.tensor(array)[None].repeat(3, 1, 1)), png, atol=1e-6)
    assert np.array_equal(load_image(PIL.Image.fromarray(array)), png)


def test_sixteen_bit_png_keeps_its_depth(tmp_path):
    array = gradient(64, 1030, 65535, np.uint16)
    grey = load_image(save_image(tmp_path / "deep.png", array))
    assert np.allclose(grey, array / 65535, atol=1e-6)
    assert len(np.unique(grey)) > 256


@pytest.mark.parametrize(("bits", "largest"), [(8, 255), (10, 800), (12, 4095), (14, 4096), (16, 40000)])
def test_full_scale_of_wide_integers_is_the_detector_depth(tmp_path, bits, largest):
    array = gradient(20, 20, largest, np.uint16)
    expected = array / (2**bits - 1)
    assert bit_depth_maximum(largest) == 2**bits - 1
    for image in (array, array.astype(np.int64), save_image(tmp_path / "a.png", array)):
        assert np.allclose(load_image(image), expected, atol=1e-6)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_constant_images_do_not_divide_by_zero(tmp_path, value):
    array = np.full((5, 6), value, dtype=np.uint8)
    assert np.allclose(load_image(save_image(tmp_path / "c.png", array)), value / 255)
    assert np.isfinite(load_image(array.astype(np.uint16))).all()
    assert np.isfinite(load_image(save_dicom(tmp_path / "c.dcm", array.astype(np.uint16)))).all()


def test_palette_alpha_bilevel_and_colour(tmp_path):
    array = gradient(16, 16)
    image = PIL.Image.fromarray(array)
    image.convert("RGB").quantize(256).save(tmp_path / "palette.png")
    assert np.abs(load_image(tmp_path / "palette.png") - array / 255).max() < 0.02
    rgba = np.dstack([array] * 3 + [np.full_like(array, 255)])
    rgba[:8, :, 3] = 0
    transparent = load_image(save_image(tmp_path / "alpha.png", rgba))
    assert (transparent[:8] == 0).all()
    assert np.allclose(transparent[8:], array[8:] / 255, atol=1e-6)
    assert np.allclose(load_image(rgba), transparent, atol=1e-6)
    image.convert("LA").save(tmp_path / "la.png")
    assert np.allclose(load_image(tmp_path / "la.png"), array / 255, atol=1e-6)
    image.convert("1").save(tmp_path / "bilevel.png")
    assert set(np.unique(load_image(tmp_path / "bilevel.png"))) == {0.0, 1.0}
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert np.abs(load_image(tmp_path / "cmyk.jpg") - array / 255).max() < 0.1
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 0] = 255
    assert np.allclose(load_image(red), 0.299, atol=1e-4)


def test_orientation_tag_is_applied(tmp_path):
    array = gradient(40, 20)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise to display
    save_image(tmp_path / "rotated.jpg", array, exif=exif, quality=95)
    assert load_image(tmp_path / "rotated.jpg").shape == (20, 40)
    assert np.abs(load_image(tmp_path / "rotated.jpg") - np.rot90(array, -1) / 255).max() < 0.05


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((4, 4), np.nan), "NaN"),
        (np.full((4, 4), np.inf), "infinite"),
        (np.full((4, 4), 200.0), "from 200 to 200"),
        (np.full((4, 4), -1.0), "from -1 to -1"),
        (np.full((4, 4), -1, dtype=np.int16), "from -1 to -1"),
        (np.full((4, 4), 70000), "70000"),
        (np.zeros((0, 4)), "no pixels"),
        (np.zeros((2, 4, 4, 3)), "shape"),
        (np.zeros((5, 4, 2)), "shape"),
        (np.zeros(4), "shape"),
        (np.zeros((4, 4), dtype=complex), "complex"),
        (3, "int"),
        (None, "NoneType"),
    ],
)
def test_unusable_arrays_are_named(array, message):
    with pytest.raises(ChexInputError, match=message) as error:
        load_image(array, name="image 3")
    assert "image 3" in str(error.value)


def test_unusable_files_are_named(tmp_path):
    png = save_image(tmp_path / "a.png", np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8))
    jpg = save_image(tmp_path / "a.jpg", gradient(64, 64))
    cases = {
        "missing.png": (None, "does not exist"),
        "empty.png": (b"", "0 bytes"),
        "empty.dcm": (b"", "0 bytes"),
        "text.png": (b"this is no image", "not an image"),
        "text.dcm": (b"this is no image", "not an image"),
        "half.png": (png.read_bytes()[:2000], "truncated or damaged"),
        "half.jpg": (jpg.read_bytes()[: len(jpg.read_bytes()) // 2], "truncated or damaged"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
        "marker.dcm": (b"\0" * 128 + b"DICM", "without pixel data"),
    }
    for name, (content, message) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ChexInputError, match=message) as error:
            load_image(path)
        assert str(path) in str(error.value)
    with pytest.raises(ChexInputError, match="folder"):
        load_image(tmp_path)


def test_animations_and_bombs_are_refused(tmp_path, monkeypatch):
    frames = [PIL.Image.fromarray(gradient(8, 8, maximum)) for maximum in (255, 100)]
    frames[0].save(tmp_path / "two.tiff", save_all=True, append_images=frames[1:])
    with pytest.raises(ChexInputError, match="2 frames"):
        load_image(tmp_path / "two.tiff")
    save_image(tmp_path / "large.png", gradient(64, 64))
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ChexInputError, match="far too many pixels"):
        load_image(tmp_path / "large.png")


# DICOM


@pytest.mark.parametrize(("dtype", "bits"), [(np.uint8, 8), (np.uint16, 12), (np.uint16, 16)])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_dicom_full_range_without_window(tmp_path, dtype, bits, photometric):
    array = gradient(20, 30, 2**bits - 1, dtype)
    path = save_dicom(tmp_path / "plain", array, bits_stored=bits, PhotometricInterpretation=photometric)
    expected = array / (2**bits - 1)
    assert np.allclose(load_image(path), 1 - expected if photometric == "MONOCHROME1" else expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of pydicom, about the damage
def test_dicom_with_any_damaged_byte_is_read_or_refused(tmp_path):
    """Value types, lengths and values of the header, one byte at a time: never another exception."""
    content = save_dicom(tmp_path / "whole", gradient(8, 8).astype(np.uint8)).read_bytes()
    path = tmp_path / "damaged"
    refused = 0
    for place in range(128, len(content) - 64):
        damaged = bytearray(content)
        damaged[place] ^= 0x15
        path.write_bytes(damaged)
        try:
            pixels = load_image(path)
        except ChexInputError as error:
            assert str(path) in str(error)
            refused += 1
        else:
            assert pixels.dtype == np.float32 and pixels.min() >= 0 and pixels.max() <= 1
    assert refused > 50


def test_dicom_signed_and_overlay_bits(tmp_path):
    signed = gradient(10, 10, 4095, np.int16) - 2048
    path = save_dicom(tmp_path / "signed", signed.astype(np.int16), bits_stored=12)
    assert np.allclose(load_image(path), (signed + 2048) / 4095, atol=1e-6)
    array = gradient(10, 10, 4095, np.uint16)
    path = save_dicom(tmp_path / "overlay", array | 0x8000, bits_stored=12)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)


def test_dicom_window_then_inversion(tmp_path):
    array = gradient(50, 50, 4095, np.uint16)
    window = {"WindowCenter": 1000, "WindowWidth": 501}
    expected = np.clip((array - 999.5) / 500 + 0.5, 0, 1)
    path = save_dicom(tmp_path / "window", array, bits_stored=12, **window)
    assert np.allclose(load_image(path), expected, atol=1e-6)
    path = save_dicom(tmp_path / "mono1", array, bits_stored=12, PhotometricInterpretation="MONOCHROME1", **window)
    assert np.allclose(load_image(path), 1 - expected, atol=1e-6)
    path = save_dicom(tmp_path / "two", array, bits_stored=12, WindowCenter=[1000, 5], WindowWidth=[501, 5])
    assert np.allclose(load_image(path), expected, atol=1e-6)
    path = save_dicom(tmp_path / "exact", array, bits_stored=12, VOILUTFunction="LINEAR_EXACT", **window)
    assert np.allclose(load_image(path), np.clip((array - 1000.0) / 501 + 0.5, 0, 1), atol=1e-6)
    path = save_dicom(tmp_path / "sigmoid", array, bits_stored=12, VOILUTFunction="SIGMOID", **window)
    assert np.allclose(load_image(path), 1 / (1 + np.exp(-4 * (array - 1000.0) / 501)), atol=1e-6)
    path = save_dicom(tmp_path / "broken", array, bits_stored=12, WindowCenter=1000, WindowWidth=0)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)


def test_dicom_rescale_comes_before_the_window(tmp_path):
    array = gradient(50, 50, 4095, np.uint16)
    rescale = {"RescaleSlope": 2, "RescaleIntercept": -1000}
    path = save_dicom(tmp_path / "rescaled", array, bits_stored=12, **rescale, WindowCenter=0, WindowWidth=1001)
    assert np.allclose(load_image(path), np.clip((2.0 * array - 1000 + 0.5) / 1000 + 0.5, 0, 1), atol=1e-6)
    path = save_dicom(tmp_path / "range", array, bits_stored=12, **rescale)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)
    path = save_dicom(tmp_path / "negative", array, bits_stored=12, RescaleSlope=-1, RescaleIntercept=4095)
    assert np.allclose(load_image(path), 1 - array / 4095, atol=1e-6)


def test_dicom_lookup_tables(tmp_path):
    array = gradient(30, 30, 1023, np.uint16)
    squares = np.rint((np.arange(1024) / 1023) ** 2 * 4095)
    voi = lookup_table(squares, 0, 12)
    # A table is preferred over a window.
    path = save_dicom(tmp_path / "voi", array, bits_stored=10, VOILUTSequence=voi, WindowCenter=1, WindowWidth=2)
    assert np.allclose(load_image(path), squares[array] / 4095, atol=1e-6)
    path = save_dicom(
        tmp_path / "mono1", array, bits_stored=10, VOILUTSequence=voi, PhotometricInterpretation="MONOCHROME1"
    )
    assert np.allclose(load_image(path), 1 - squares[array] / 4095, atol=1e-6)
    # An 8-bit table over 10-bit pixels, and values below and above the table.
    short = lookup_table(np.arange(256) // 2, 500, 8)
    path = save_dicom(tmp_path / "short", array, bits_stored=10, VOILUTSequence=short)
    assert np.allclose(load_image(path), (np.clip(array.astype(int) - 500, 0, 255) // 2) / 255, atol=1e-6)
    path = save_dicom(tmp_path / "modality", array, bits_stored=10, ModalityLUTSequence=lookup_table(squares, 0, 12))
    assert np.allclose(load_image(path), squares[array] / 4095, atol=1e-6)


def test_dicom_is_recognised_by_content(tmp_path):
    array = gradient(12, 12, 4095, np.uint16)
    path = save_dicom(tmp_path / "really_dicom.png", array, bits_stored=12)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)
    path = save_dicom(tmp_path / "no_preamble", array, bits_stored=12, preamble=False)
    assert not dicom.is_dicom(path)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)
    path = save_dicom(tmp_path / "no_modality.dcm", array, bits_stored=12, Modality=None)
    assert np.allclose(load_image(path), array / 4095, atol=1e-6)


def test_unusable_dicoms_are_named(tmp_path, monkeypatch):
    array = gradient(12, 12, 4095, np.uint16)
    whole = save_dicom(tmp_path / "whole.dcm", array, bits_stored=12).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[:-100])
    colour = np.zeros((4, 4, 3), dtype=np.uint8)
    cases = {
        tmp_path / "cut.dcm": "cannot be decoded: the file seems to be cut off",
        save_dicom(tmp_path / "ct.dcm", array, bits_stored=12, Modality="CT"): "CT .computed tomography.",
        save_dicom(tmp_path / "mg.dcm", array, bits_stored=12, Modality="MG"): "MG .mammography.",
        save_dicom(tmp_path / "none.dcm", None): "without pixel data",
        save_dicom(
            tmp_path / "frames.dcm", np.stack([array] * 2).reshape(24, 12), Rows=12, NumberOfFrames=2
        ): "2 frames",
        save_dicom(
            tmp_path / "colour.dcm", colour, SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0
        ): "colour",
        save_dicom(
            tmp_path / "lut.dcm", array, VOILUTSequence=lookup_table(np.zeros(0), 0, 8)
        ): "unusable grey scale attributes",
        pydicom_sample("liver.dcm"): "modality",
        pydicom_sample("OT-PAL-8-face.dcm"): "modality",
    }
    for path, message in cases.items():
        with pytest.raises(ChexInputError, match=message) as error:
            load_image(path)
        assert str(path) in str(error.value)
    monkeypatch.setattr(dicom, "pydicom", None)
    with pytest.raises(ChexInputError, match="pip install pydicom"):
        load_image(tmp_path / "whole.dcm")


def test_missing_decoder_names_the_package(tmp_path):
    import pydicom
    from pydicom.encaps import encapsulate

    path = save_dicom(tmp_path / "jpegls.dcm", gradient(12, 12, 4095, np.uint16), bits_stored=12)
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = encapsulate([b"no code stream"])
    dataset["PixelData"].is_undefined_length = True
    dataset.save_as(path)
    with pytest.raises(ChexInputError, match="JPEG-LS.*pylibjpeg"):
        load_image(path)


def test_a_real_radiograph():
    grey = read_dicom(pydicom_sample("RG1_UNCR.dcm"))
    assert grey.shape == (1955, 1841)
    assert grey.min() >= 0 and grey.max() <= 1
    # MONOCHROME1 was inverted: the air above the shoulder is darker than lung, and lung darker than the spine.
    air, lung, spine = grey[60:160, :50].mean(), grey[480:540, 380:430].mean(), grey[900:1000, 850:950].mean()
    assert air + 0.1 < lung < spine - 0.1
    # The same picture behind another codec
    assert np.abs(grey - read_dicom(pydicom_sample("RG1_J2KR.dcm"))).max() < 1e-3
