"""Pictures from outside: plain ones come out, whatever came in, and nothing hostile costs much."""

import subprocess
import sys
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from app.storage.decoding import BrokenPicture, decode_picture, encode_picture, mask_of, opaque, transparency
from tests.app.pictures import SIZE, bomb, file, sample

MAX_PIXELS = 10_000
RED, BLUE = (255, 0, 0), (0, 0, 255)


def near(image: Image.Image, place: tuple[int, int], colour: tuple[int, int, int]) -> bool:
    found = image.convert("RGB").getpixel(place)
    return max(abs(a - b) for a, b in zip(found, colour, strict=True)) <= 8  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "kind", "out"),
    [
        ("RGB", "PNG", "RGB"),
        ("RGBA", "PNG", "RGBA"),
        ("P", "PNG", "RGB"),
        ("RGB", "JPEG", "RGB"),
        ("CMYK", "JPEG", "RGB"),
        ("RGB", "WEBP", "RGB"),
        ("RGBA", "WEBP", "RGBA"),
    ],
)
def test_every_kind_becomes_plain(mode: str, kind: str, out: str) -> None:
    image = decode_picture(file(sample(mode), kind), MAX_PIXELS)
    assert (image.mode, image.size) == (out, SIZE)
    assert near(image, (10, 10), RED)
    assert near(image, (80, 10), BLUE)
    assert not image.info.get("exif")


def test_grey_two_colours_and_a_transparent_palette() -> None:
    grey = decode_picture(file(Image.new("L", SIZE, 100)), MAX_PIXELS)
    assert (grey.mode, grey.getpixel((0, 0))) == ("RGB", (100, 100, 100))
    assert decode_picture(file(Image.new("1", SIZE, 1)), MAX_PIXELS).getpixel((0, 0)) == (255, 255, 255)
    palette = decode_picture(file(sample("P"), transparency=sample("P").getpixel((0, 0))), MAX_PIXELS)
    assert palette.mode == "RGBA"
    assert transparency(palette) is not None


def test_sixteen_bits_become_eight() -> None:
    values = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(1, 256).repeat(4, 0)
    image = decode_picture(file(Image.fromarray(values)), MAX_PIXELS)
    red = np.asarray(image)[0, :, 0].astype(int)
    assert np.abs(red - np.arange(256)).max() <= 1


def test_one_value_of_sixteen_bits_may_be_transparent() -> None:
    values = np.full((4, 6), 30_000, dtype=np.uint16)
    values[:, :2] = 65_535
    image = decode_picture(file(Image.fromarray(values), transparency=65_535), MAX_PIXELS)
    assert image.mode == "RGBA"
    pixels = np.asarray(image)
    assert pixels[0, :, 3].tolist() == [0, 0, 255, 255, 255, 255]
    assert pixels[3, 5].tolist() == [116, 116, 116, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_is_applied(orientation: int) -> None:
    """Stored pixels and tag come out as a viewer shows them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = sample()
    picture.paste((0, 255, 0), (0, 0, 20, 20))
    content = file(picture, "JPEG", quality=95, exif=exif)
    expected = ImageOps.exif_transpose(Image.open(BytesIO(content)))
    image = decode_picture(content, MAX_PIXELS)
    assert image.size == expected.size
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() == 0


def test_a_colour_profile_is_applied_and_a_broken_one_ignored() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    swapped = decode_picture(file(sample(), icc_profile=profile), MAX_PIXELS)  # of other channels: ignored
    assert near(swapped, (10, 10), RED)
    assert near(decode_picture(file(sample(), icc_profile=b"nonsense"), MAX_PIXELS), (10, 10), RED)
    # The primaries of sRGB with another gamma: mid grey must move.
    srgb = ImageCms.createProfile("sRGB")
    plain = file(
        Image.new("RGB", SIZE, (128, 128, 128)), icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes()
    )
    assert near(decode_picture(plain, MAX_PIXELS), (0, 0), (128, 128, 128))


def test_the_first_frame_counts() -> None:
    frames = [sample(), Image.new("RGB", SIZE, "lime")]
    for kind in ("PNG", "WEBP"):
        content = file(frames[0], kind, save_all=True, append_images=frames[1:], duration=100)
        assert Image.open(BytesIO(content)).n_frames == 2  # type: ignore[attr-defined]
        assert near(decode_picture(content, MAX_PIXELS), (10, 10), RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_large_pictures_are_scaled_to_what_can_be_used(kind: str) -> None:
    image = decode_picture(file(sample(size=(1200, 800)), kind), 240_000)
    assert image.size == (600, 400)
    assert near(image, (100, 100), RED)
    assert near(image, (500, 100), BLUE)


def test_other_formats_are_refused_whatever_they_are_called() -> None:
    for kind in ("GIF", "BMP", "TIFF", "ICO", "PPM"):
        with pytest.raises(BrokenPicture, match="must be a picture in PNG, JPEG or WebP"):
            decode_picture(file(sample(), kind), MAX_PIXELS)
    for content in (
        b"",
        b"hello",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
    ):
        with pytest.raises(BrokenPicture):
            decode_picture(content, MAX_PIXELS)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_cut_off_file_is_refused(kind: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = file(noise, kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BrokenPicture):
            decode_picture(content[: int(share * len(content))], MAX_PIXELS)


def test_pixels_of_which_any_byte_is_wrong_are_named() -> None:
    """Although many of them could be drawn."""
    content = file(sample(size=(64, 64)))
    start = content.index(b"IDAT")
    for place in range(start, content.index(b"IEND") - 4):
        damaged = bytearray(content)
        damaged[place] ^= 0x10
        with pytest.raises(BrokenPicture, match="is damaged"):
            decode_picture(bytes(damaged), MAX_PIXELS)


def test_texts_of_any_length_are_left_out() -> None:
    texts = PngInfo()
    texts.add_text("short", "x")
    texts.add_text("long", "x" * 3_000_000, zip=True)
    texts.add_itxt("XML:com.adobe.xmp", "y" * 3_000_000, zip=True)
    assert decode_picture(file(sample(), pnginfo=texts), MAX_PIXELS).tobytes() == sample().tobytes()


@pytest.mark.parametrize("padding", [b"\n", bytes(11), bytes(12), bytes(5000), b"IEND" * 20])
def test_what_follows_a_picture_is_no_part_of_it(padding: bytes) -> None:
    assert decode_picture(file(sample()) + padding, MAX_PIXELS).tobytes() == sample().tobytes()


def test_a_claim_is_checked_before_pixels_are_made() -> None:
    with pytest.raises(BrokenPicture, match="16777216 pixels"):
        decode_picture(bomb(5000, 5000), MAX_PIXELS)
    with pytest.raises(BrokenPicture, match="16384 on a side"):
        decode_picture(bomb(20_000, 1), MAX_PIXELS)
    claim = bytearray(file(sample()))
    claim[16:24] = (2**31 - 1).to_bytes(4) * 2
    with pytest.raises(BrokenPicture):
        decode_picture(bytes(claim), MAX_PIXELS)


BITES = """
import resource, sys
from app.storage.decoding import BrokenPicture, decode_picture
from tests.app.pictures import bomb, file, sample
name = sys.argv[1]
content = {
    "bomb": lambda: bomb(13000, 13000),
    "png": lambda: file(sample("RGBA", (4096, 4096)), compress_level=1),
    "webp": lambda: file(sample("RGBA", (4000, 2500)), "WEBP", quality=10, method=0),
    "jpeg": lambda: file(sample("RGB", (8000, 6000)), "JPEG"),
}[name]
open(sys.argv[2], "wb").write(content())
"""
PEAK = """
import sys
from app.storage.decoding import BrokenPicture, decode_picture
content = open(sys.argv[1], "rb").read()
try:
    decode_picture(content, 4_194_304)
except BrokenPicture:
    pass
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) // 1024)  # getrusage would tell the peak of the tests that started this
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bomb", "png", "webp", "jpeg"])
def test_no_file_takes_more_than_300_mb(name: str, tmp_path: object) -> None:
    path = f"{tmp_path}/file"
    subprocess.run([sys.executable, "-c", BITES, name, path], check=True)
    done = subprocess.run([sys.executable, "-c", PEAK, path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 300, done.stdout


GOOD = [
    file(sample("RGBA")),
    file(sample("P"), transparency=1),
    file(sample(), "JPEG", progressive=True),
    file(sample("CMYK"), "JPEG"),
    file(sample("RGBA"), "WEBP", lossless=True),
]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_of_any_kind_is_either_survived_or_named(data: st.DataObject) -> None:
    content = bytearray(data.draw(st.sampled_from(GOOD)))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    with suppress(BrokenPicture):  # and nothing else
        image = decode_picture(bytes(content), MAX_PIXELS)
        assert image.mode in ("RGB", "RGBA")
        assert image.width * image.height <= MAX_PIXELS


def test_a_stored_file_has_pixels_and_nothing_else() -> None:
    exif = Image.Exif()
    exif[0x010E] = "where I live"
    content = encode_picture(decode_picture(file(sample(), exif=exif) + b"<script>", MAX_PIXELS))
    assert b"where I live" not in content
    assert b"script" not in content
    assert content == encode_picture(decode_picture(file(sample(), "PNG", compress_level=9), MAX_PIXELS))


def test_masks_are_what_is_transparent_or_else_white() -> None:
    mask = mask_of(sample("RGBA"))
    assert (mask.mode, mask.getpixel((5, 5)), mask.getpixel((5, 60))) == ("L", 0, 255)
    white = Image.new("RGB", SIZE, "black")
    white.paste("white", (0, 0, 10, 10))
    assert [mask_of(white).getpixel(place) for place in ((5, 5), (50, 50))] == [255, 0]
    assert transparency(white) is None
    flat = opaque(sample("RGBA"))
    assert (flat.mode, flat.getpixel((5, 60)), flat.getpixel((5, 5))) == ("RGB", (255, 255, 255), RED)
