"""Turns an engine's pixels into files. To be called in threads: encoding takes tens of milliseconds."""

import hashlib

from PIL import Image

from app.engine.protocol import Pixels, Previewed
from app.jobs.job import Job, StoredImage
from app.storage.credentials import Credentials
from app.storage.encoding import MIME_TYPES, encode, parameters_text
from app.storage.images import new_name

PREVIEW_QUALITY = 80


def encode_picture(made: Pixels, job: Job, model: str, credentials: Credentials) -> tuple[StoredImage, bytes]:
    """Encode, mark and sign a picture as its request asks. Raises SigningFailed."""
    request, seed = job.request, job.request.seeds[made.index]
    text = parameters_text(request, seed, model) if request.embed_metadata else None
    image = Image.frombytes("RGB", (made.width, made.height), made.pixels)
    content = encode(image, request.output_format, request.output_quality, text)
    content = credentials.sign(content, request.output_format, is_edit=request.is_edit)
    stored = StoredImage(
        index=made.index,
        seed=seed,
        name=new_name(content, request.output_format),
        width=made.width,
        height=made.height,
        mime_type=MIME_TYPES[request.output_format],
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        resampled_from=made.resampled_from,
        prompt_truncated=made.prompt_truncated,
        prompt_tokens=made.prompt_tokens,
    )
    return stored, content


def encode_preview(made: Previewed, job: Job, credentials: Credentials) -> bytes:
    """Encode a preview as WebP, marked and signed like the picture. Raises SigningFailed."""
    image = Image.frombytes("RGB", (made.width, made.height), made.pixels)
    return credentials.sign(encode(image, "webp", PREVIEW_QUALITY), "webp", is_edit=job.request.is_edit)
