"""Safe decoding of untrusted pictures: nothing that a file claims is trusted before its pixels are decoded.

Only PNG, JPEG and WebP are read, told apart by their content. The size in the header is checked before a
pixel is decoded. The result is plain: 8 bits, upright, sRGB, one frame, no metadata, no more pixels than the
largest picture that can be requested. Call it in threads: large pictures take a second.
"""

import zlib
from contextlib import suppress
from io import BytesIO

from PIL import Image, ImageCms, ImageMath, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP")
PNG_LEVEL = 1

# Chosen so that decoding takes less than 300 MB: WebP needs 20 bytes a pixel. A JPEG of more pixels than
# needed is decoded at a half, a quarter or an eighth of its size.
MOST_PIXELS = {"PNG": 16_777_216, "JPEG": 50_000_000, "MPO": 50_000_000, "WEBP": 10_000_000}
LONGEST_SIDE = 16_384

OPAQUE = 255
_TRUE_COLOUR = ("RGB", "RGBA", "L")
_PNG = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_CHUNKS = 100_000

_DEEP = ("I", "I;16", "I;16B", "I;16L", "F")


class BrokenPicture(ValueError):
    """A picture that is not accepted; the message follows the member's name, as in "image is damaged"."""


def decode_picture(content: bytes, max_pixels: int) -> Image.Image:
    """Decode the picture in a file as RGB, or as RGBA if some of it is transparent.

    One of more than `max_pixels` is scaled down to that. Raises BrokenPicture.
    """
    if content.startswith(_PNG):
        content = _sound_png(content)
    try:
        # No other plugin is ever tried: each is code that reads hostile bytes.
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            _check_claim(file)
            return _plain(file, max_pixels)
    except BrokenPicture:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BrokenPicture("has too many pixels") from None
    except UnidentifiedImageError:
        raise BrokenPicture("must be a picture in PNG, JPEG or WebP") from None
    except Exception as error:  # decoders may raise anything for damaged bytes
        raise BrokenPicture("is damaged and cannot be read") from error


def encode_picture(image: Image.Image) -> bytes:
    """Encode as PNG, with nothing but the pixels: equal pixels give equal files."""
    file = BytesIO()
    image.save(file, "PNG", compress_level=PNG_LEVEL)
    return file.getvalue()


def opaque(image: Image.Image) -> Image.Image:
    """Flatten transparency onto white."""
    if image.mode != "RGBA":
        return image
    ground = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(ground, image).convert("RGB")


def mask_of(image: Image.Image) -> Image.Image:
    """Return a picture as a one-channel mask, which marks its transparent or else its white parts."""
    return transparency(image) or image.convert("L")


def transparency(image: Image.Image) -> Image.Image | None:
    """Return a mask that is white where a picture is transparent; None if it is opaque."""
    return ImageOps.invert(image.getchannel("A")) if image.mode == "RGBA" else None


def _sound_png(content: bytes) -> bytes:
    """Return the file without its texts, which may be longer than Pillow reads. Raises BrokenPicture.

    Checksums are verified here, because Pillow ignores those of pixels and decodes damaged data.
    """
    sound, position = bytearray(_PNG), len(_PNG)
    for _ in range(_MAX_CHUNKS):
        end = position + 12 + int.from_bytes(content[position : position + 4])
        if end > len(content):
            break  # the file is truncated
        body, checksum = memoryview(content)[position + 4 : end - 4], content[end - 4 : end]
        if zlib.crc32(body) != int.from_bytes(checksum):
            raise BrokenPicture("is damaged and cannot be read")
        kind = content[position + 4 : position + 8]
        if kind not in _TEXTS:
            sound += content[position:end]
        position = end
        if kind == b"IEND":
            return bytes(sound)  # what follows is not part of the picture
    return bytes(sound + content[position:])


def _check_claim(file: Image.Image) -> None:
    """Raise BrokenPicture for a size that is too large, before anything is decoded."""
    most = MOST_PIXELS[file.format or ""]
    if file.width * file.height > most or max(file.size) > LONGEST_SIDE:
        raise BrokenPicture(
            f"may have {most} pixels as {file.format} and {LONGEST_SIDE} on a side, "
            f"but has {file.width}x{file.height}"
        )


def _plain(file: Image.Image, max_pixels: int) -> Image.Image:
    """Decode the first frame. Each step works on fewer bytes than the one before, and frees them."""
    size = _within(file.size, max_pixels)
    if file.format in ("JPEG", "MPO"):
        file.draft(None, size)  # never below this size
    orientation = file.getexif().get(0x0112)
    profile = file.info.get("icc_profile")
    file.load()
    image = _true_colour(file)
    if image.size != size:
        image = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    image = _in_srgb(image, profile)
    turn = _TURNS.get(orientation or 1)
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "RGBA" and image.getchannel("A").getextrema() == (OPAQUE, OPAQUE):
        return image.convert("RGB")
    return image if image.mode == "RGBA" else image.convert("RGB")


_Turn = Image.Transpose
_TURNS = {
    2: _Turn.FLIP_LEFT_RIGHT,
    3: _Turn.ROTATE_180,
    4: _Turn.FLIP_TOP_BOTTOM,
    5: _Turn.TRANSPOSE,
    6: _Turn.ROTATE_270,
    7: _Turn.TRANSVERSE,
    8: _Turn.ROTATE_90,
}


def _within(size: tuple[int, int], max_pixels: int) -> tuple[int, int]:
    """Scale a size down to at most `max_pixels`."""
    width, height = size
    if width * height <= max_pixels:
        return size
    factor = (max_pixels / (width * height)) ** 0.5
    return max(int(width * factor), 1), max(int(height * factor), 1)


def _true_colour(file: Image.Image) -> Image.Image:
    """Convert to eight bits of L, RGB, RGBA or CMYK."""
    if file.mode in _DEEP:
        return _eight_bits(file, file.info.get("transparency"))
    if file.mode in ("LA", "La", "PA", "RGBa") or file.has_transparency_data:
        return file.convert("RGBA")
    return file if file.mode in (*_TRUE_COLOUR, "CMYK") else file.convert("RGB")


def _eight_bits(file: Image.Image, transparent: int | None) -> Image.Image:
    """Scale 16-bit grey, of which one value may be transparent, to 8 bits; Pillow itself clips at 255."""
    grey = file.convert("I")
    plain = grey.point(_scale_down).convert("L")
    if transparent is None:
        return plain
    alpha = ImageMath.lambda_eval(
        lambda of: of["convert"]((of["grey"] != transparent) * OPAQUE, "L"), grey=grey
    )
    return Image.merge("RGBA", (plain, plain, plain, alpha))


def _scale_down(value: float) -> float:
    return value * (1 / 257)


def _in_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert to sRGB by the profile of the file, if that is usable."""
    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    colours = image.convert("RGB") if image.mode == "RGBA" else image
    if profile:
        with suppress(Exception):  # a damaged profile, or one of other channels, is ignored
            colours = _converted(colours, profile)
    colours = colours.convert("RGB")
    if alpha is not None:
        colours.putalpha(alpha)
    return colours


def _converted(colours: Image.Image, profile: bytes) -> Image.Image:
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    converted = ImageCms.profileToProfile(colours, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None, "not in place"
    return converted
