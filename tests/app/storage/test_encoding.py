"""Every format carries the mark that a model made the picture; the pixels stay as they were."""

import zlib
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.storage.encoding import AI_MADE, MIME_TYPES, XMP, encode
from cascade import marks

FORMATS = list(MIME_TYPES)


@pytest.fixture
def image() -> Image.Image:
    gradient = Image.linear_gradient("L").resize((96, 64))
    return Image.merge("RGB", (gradient, gradient.transpose(Image.Transpose.ROTATE_180), gradient))


def reopened(content: bytes) -> Image.Image:
    image = Image.open(BytesIO(content))
    image.load()
    return image


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("parameters", [None, "a prompt\nSteps: 20"])
def test_the_mark_is_there(image: Image.Image, output_format: Any, parameters: str | None) -> None:
    content = encode(image, output_format, 90, parameters)
    packet = reopened(content).info["xmp"]
    text = packet.decode() if isinstance(packet, bytes) else packet
    assert f'Iptc4xmpExt:DigitalSourceType="{AI_MADE}"' in text
    assert text.startswith("<?xpacket begin=")
    assert AI_MADE.endswith("/trainedAlgorithmicMedia")


def test_the_mark_is_in_the_place_that_the_format_has_for_it(image: Image.Image) -> None:
    png = encode(image, "png", 90)
    assert b"iTXtXML:com.adobe.xmp\x00" in png
    assert png.index(b"iTXt") < png.index(b"IDAT")
    assert b"\xff\xe1" in encode(image, "jpeg", 90)[:4000]
    assert b"http://ns.adobe.com/xap/1.0/\x00" in encode(image, "jpeg", 90)[:4000]
    webp = encode(image, "webp", 90)
    assert (webp[:4], webp[8:12]) == (b"RIFF", b"WEBP")
    assert b"XMP " in webp


def test_png_keeps_every_pixel(image: Image.Image) -> None:
    for parameters in (None, "text"):
        assert reopened(encode(image, "png", 90, parameters)).tobytes() == image.tobytes()


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_the_mark_does_not_change_the_pixels(image: Image.Image, output_format: Any) -> None:
    plain = BytesIO()
    image.save(plain, output_format.upper(), quality=80)
    marked = reopened(encode(image, output_format, 80))
    assert marked.tobytes() == reopened(plain.getvalue()).tobytes()
    assert reopened(encode(image, output_format, 80, "text")).tobytes() == marked.tobytes()


def test_quality_costs_bytes(image: Image.Image) -> None:
    noise = Image.effect_noise((256, 256), 80).convert("RGB")
    for output_format in ("jpeg", "webp"):
        low, high = (len(encode(noise, output_format, quality)) for quality in (10, 95))
        assert low < high / 2


PARAMETERS = 'a "red" ♥ circle\nNegative prompt: blue\nSteps: 20, Seed: 7'


def test_the_settings_are_embedded_when_asked_for(image: Image.Image) -> None:
    assert reopened(encode(image, "png", 90, PARAMETERS)).info["parameters"] == PARAMETERS
    assert "parameters" not in reopened(encode(image, "png", 90)).info
    for output_format in ("jpeg", "webp"):
        exif = reopened(encode(image, output_format, 90, PARAMETERS)).getexif()
        comment = exif.get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\x00"
        assert comment[8:].decode("utf-16-be") == PARAMETERS
        assert not reopened(encode(image, output_format, 90)).getexif()


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("letter", ["x", "é", "😀"])
def test_the_longest_prompt_fits(image: Image.Image, output_format: Any, letter: str) -> None:
    content = encode(image, output_format, 90, letter * 64_000)
    assert reopened(content).size == image.size


def test_png_finds_what_repeats() -> None:
    gradient = Image.linear_gradient("L").resize((512, 512))
    tile = Image.effect_noise((32, 32), 80)
    tiled = Image.new("L", (512, 512))
    for x, y in product(range(0, 512, 32), repeat=2):
        tiled.paste(tile, (x, y))
    for image in (gradient.convert("1"), tiled):
        runs_only = BytesIO()
        image.convert("RGB").save(runs_only, "PNG", compress_level=1, compress_type=zlib.Z_RLE)
        assert len(encode(image.convert("RGB"), "png", 90)) < 0.6 * len(runs_only.getvalue())


def test_no_text_has_a_zero(image: Image.Image) -> None:
    content = encode(image, "png", 90, "a red \0 circle")
    assert reopened(content).info["parameters"] == "a red  circle"


def test_sheets_have_the_same_mark(image: Image.Image, tmp_path: Path) -> None:
    marks.save_png(image, tmp_path / "new" / "sheet.png")
    assert (marks.AI_MADE, marks.XMP) == (AI_MADE, XMP)
    assert reopened((tmp_path / "new" / "sheet.png").read_bytes()).info["xmp"] == XMP.encode()
