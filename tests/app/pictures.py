"""Pictures as they arrive from outside, good ones and bad ones."""

import base64
import struct
import zlib
from io import BytesIO
from typing import Any

from PIL import Image

from app.storage.images import ImageStore, new_name

SIZE = (96, 64)


def sample(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Left red, right blue; with an alpha channel the lower half is transparent."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    if mode == "RGBA":
        alpha = Image.new("L", size, 255)
        alpha.paste(0, (0, size[1] // 2, *size))
        image.putalpha(alpha)
        return image
    return image.convert(mode)


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    content = BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def data_uri(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def bomb(width: int, height: int) -> bytes:
    """A small PNG file of very many grey pixels, all of which are there."""
    rows = zlib.compressobj(9)
    row = b"\0" + bytes(width)
    pixels = b"".join(rows.compress(row) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def kept(images: ImageStore, content: bytes, extension: str) -> str:
    """Save a finished picture; returns its name."""
    name = new_name(content, extension)
    images.save(content, name)
    return name
