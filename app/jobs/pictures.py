"""Turns an engine's pixels into files. To be called in threads: encoding takes tens of milliseconds."""

import hashlib

from PIL import Image

from app.engine.protocol import Pixels, Previewed
from app.jobs.job import Job, StoredImage
from app.storage.encoding import MIME_TYPES, encode, parameters_text
from app.storage.images import ImageStore

PREVIEW_QUALITY = 80


def keep_picture(made: Pixels, job: Job, images: ImageStore, model: str) -> StoredImage:
    """Encode and mark a picture as its request asks, and put it into the store. Raises StorageFull."""
    request, seed = job.request, job.request.seeds[made.index]
    text = parameters_text(request, seed, model) if request.embed_metadata else None
    image = Image.frombytes("RGB", (made.width, made.height), made.pixels)
    content = encode(image, request.output_format, request.output_quality, text)
    return StoredImage(
        index=made.index,
        seed=seed,
        name=images.save(content, request.output_format),
        width=made.width,
        height=made.height,
        mime_type=MIME_TYPES[request.output_format],
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        resampled_from=made.resampled_from,
        prompt_truncated=made.prompt_truncated,
        prompt_tokens=made.prompt_tokens,
    )


def encode_preview(made: Previewed) -> bytes:
    """Encode a preview as WebP, with the mark."""
    image = Image.frombytes("RGB", (made.width, made.height), made.pixels)
    return encode(image, "webp", PREVIEW_QUALITY)
