"""Every kind of picture that people have, and every kind of file that is none."""

import io
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from tokenizer_hf.errors import ConfigurationError, ImageError
from tokenizer_hf.image_processing_image_tokenizer import (
    ImageTokenizerImageProcessor,
    open_image,
)

RED, BLUE = (220, 30, 40), (20, 40, 210)


def two_halves(size=(40, 20)) -> Image.Image:
    """Red on the left, blue on the right."""
    picture = Image.new("RGB", size, RED)
    picture.paste(BLUE, (size[0] // 2, 0, size[0], size[1]))
    return picture


def encoded(picture: Image.Image, kind: str = "PNG", **settings) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **settings)
    return buffer.getvalue()


def near(picture: Image.Image, position: tuple[int, int], colour, tolerance: int = 2) -> bool:
    pixel = picture.getpixel(position)
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, colour, strict=True))


def test_all_sources_give_the_same_picture(tmp_path):
    picture = two_halves()
    path = tmp_path / "picture.png"
    picture.save(path)
    expected = np.asarray(picture)
    for source in (path, str(path), path.read_bytes(), picture, np.asarray(picture)):
        opened = open_image(source)
        assert opened.mode == "RGB"
        assert np.array_equal(np.asarray(opened), expected)


def test_the_result_does_not_depend_on_the_source():
    picture = two_halves()
    opened = open_image(picture)
    opened.putpixel((0, 0), (1, 2, 3))
    assert picture.getpixel((0, 0)) == RED


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = two_halves()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    opened = open_image(encoded(stored, exif=exif))
    assert opened.size == upright.size
    assert near(opened, (2, 10), RED) and near(opened, (37, 10), BLUE)


def test_transparency_lies_over_white():
    picture = Image.new("RGBA", (4, 1), (*RED, 255))
    picture.putpixel((1, 0), (*RED, 0))
    picture.putpixel((2, 0), (0, 0, 0, 128))
    for source in (picture, encoded(picture), np.asarray(picture)):
        opened = open_image(source)
        assert opened.getpixel((0, 0)) == RED
        assert opened.getpixel((1, 0)) == (255, 255, 255)
        assert near(opened, (2, 0), (127, 127, 127))


def test_transparent_palette_and_grey():
    palette = two_halves().quantize(2)
    transparent = palette.getpixel((0, 0))
    opened = open_image(encoded(palette, transparency=transparent))
    assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert near(opened, (39, 0), BLUE)
    grey = Image.new("LA", (2, 1), (10, 255))
    grey.putpixel((1, 0), (10, 0))
    assert open_image(encoded(grey)).getpixel((0, 0)) == (10, 10, 10)
    assert open_image(encoded(grey)).getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes(mode):
    black_white = Image.new("RGB", (2, 1), (0, 0, 0))
    black_white.putpixel((1, 0), (255, 255, 255))
    if mode == "LAB":
        picture = Image.new("LAB", (2, 1), (0, 128, 128))
        picture.putpixel((1, 0), (255, 128, 128))
    else:
        picture = black_white.convert(mode)
    opened = open_image(picture)
    assert near(opened, (0, 0), (0, 0, 0), 3)
    assert near(opened, (1, 0), (255, 255, 255), 3)


def test_cmyk_and_grey_jpeg():
    assert near(open_image(encoded(two_halves().convert("CMYK"), "JPEG")), (5, 10), RED, 12)
    assert near(open_image(encoded(Image.new("L", (9, 9), 77), "JPEG")), (4, 4), (77,) * 3)


def test_16_bit_greys_keep_their_range():
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values)))
    assert [opened.getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    wide = Image.fromarray(values.astype(np.int32))
    assert [open_image(wide).getpixel((x, 0))[0] for x in range(4)] == [0, 1, 128, 255]
    floats = Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32))
    assert [open_image(floats).getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_the_first_frame_of_an_animation_with_a_warning(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE)]
    path = tmp_path / "moving.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=r"moving.gif' has 2 frames; only the first one is used"):
        opened = open_image(path)
    assert near(opened, (4, 4), RED)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_image(two_halves())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello, I am a text file", "is not a picture in a format that Pillow reads"),
        (b"", "is not a picture"),
        (encoded(two_halves((300, 300)))[:-200], "cannot be read as a picture"),
        (encoded(two_halves((300, 300)), "JPEG")[:900], "cannot be read as a picture"),
        (encoded(two_halves())[:20], "is not a picture|cannot be read as a picture"),
    ],
    ids=["text", "empty", "torn png", "torn jpeg", "torn header"],
)
def test_files_that_are_no_pictures(content, message, tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    for source in (path, content):
        with pytest.raises(ImageError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(ImageError, match=r"picture\.png"):
        open_image(path)


def test_flipped_bytes_are_refused_or_read_but_never_crash():
    good = bytearray(encoded(two_halves((64, 64))))
    generator = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(good)
        for position in generator.integers(0, len(bad), 3):
            bad[position] = generator.integers(0, 256)
        with suppress(ImageError):
            assert open_image(bytes(bad)).mode == "RGB"


def test_things_that_are_no_pictures(tmp_path):
    with pytest.raises(ImageError, match="No such file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(ImageError, match="Is a directory"):
        open_image(tmp_path)
    with pytest.raises(ImageError, match="a int came; expected a path, bytes"):
        open_image(3)  # type: ignore[arg-type]
    for array in (np.zeros((4, 4, 3)), np.zeros((4, 4, 2), np.uint8), np.zeros((0, 4), np.uint8)):
        with pytest.raises(ImageError, match="expected uint8 of shape"):
            open_image(array)


def test_too_many_pixels_are_refused_before_decoding():
    picture = encoded(Image.new("L", (2000, 1000)))
    assert open_image(picture, max_pixels=2_000_000).size == (2000, 1000)
    with pytest.raises(ImageError, match="2000 × 1000 pixels; expected at most 1999999"):
        open_image(picture, max_pixels=1_999_999)
    torn = encoded(Image.new("1", (15000, 15000)))[:2000]
    with pytest.raises(ImageError, match="pixels"):
        open_image(torn)


@pytest.mark.parametrize("mode", ["shortest_edge_crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (31, 17), (64, 64)])
def test_any_shape_of_picture_fits(mode, size):
    processor = ImageTokenizerImageProcessor(size=16, resize_mode=mode)
    pixel_values = processor(Image.new("RGB", size, RED))["pixel_values"]
    assert pixel_values.shape == (1, 3, 16, 16)
    assert pixel_values.dtype == torch.float32
    assert pixel_values.isfinite().all() and pixel_values.abs().max() <= 1


def test_resize_modes_crop_squash_and_pad():
    wide = Image.new("RGB", (90, 30), BLUE)
    wide.paste(RED, (30, 0, 60, 30))  # blue, red, blue

    def corner_and_middle(mode):
        (picture,) = [ImageTokenizerImageProcessor(size=30, resize_mode=mode).fit(wide)]
        return picture.getpixel((1, 1)), picture.getpixel((15, 15))

    assert corner_and_middle("shortest_edge_crop") == (RED, RED)
    assert corner_and_middle("squash") == (BLUE, RED)
    assert corner_and_middle("pad") == ((255, 255, 255), RED)


def test_the_range_and_the_way_back():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.fromarray(np.stack([levels, levels[::-1], levels.T], axis=-1))
    processor = ImageTokenizerImageProcessor(size=16)
    pixel_values = processor([picture, picture])["pixel_values"]
    assert pixel_values.shape == (2, 3, 16, 16)
    assert pixel_values.min() == -1 and pixel_values.max() == 1
    back = processor.postprocess(pixel_values)
    assert all(np.array_equal(np.asarray(one), np.asarray(picture)) for one in back)
    assert processor.postprocess(pixel_values.bfloat16() * 3)[0].getpixel((0, 0))[0] == 0
    assert isinstance(processor(picture, return_tensors="np")["pixel_values"], np.ndarray)


def test_saved_and_loaded(tmp_path):
    processor = ImageTokenizerImageProcessor(
        size=24, resize_mode="pad", resample="bilinear", pad_colour=(1, 2, 3), max_pixels=1000
    )
    processor.save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
    again = ImageTokenizerImageProcessor.from_pretrained(tmp_path)
    assert again.to_dict() == processor.to_dict()
    assert again.fit(Image.new("RGB", (20, 10))).getpixel((0, 0)) == (1, 2, 3)
    with pytest.raises(ImageError, match="at most 1000 pixels"):
        again(Image.new("RGB", (40, 40)))


def test_settings_that_cannot_be():
    with pytest.raises(ConfigurationError, match="resize_mode is 'stretch'; expected one of"):
        ImageTokenizerImageProcessor(resize_mode="stretch")
    with pytest.raises(ConfigurationError, match="resample"):
        ImageTokenizerImageProcessor(resample="best")
    with pytest.raises(ConfigurationError, match="size is 0"):
        ImageTokenizerImageProcessor(size=0)
    with pytest.raises(ImageError, match="empty list"):
        ImageTokenizerImageProcessor()([])
