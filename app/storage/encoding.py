"""Encoding of pixels as PNG, JPEG or WebP, each marked as made by a model.

The mark is XMP metadata (IPTC `DigitalSourceType`), which platforms look for; it leaves the pixels unchanged.
On request the settings are embedded too, as the `parameters` text that many tools read.
"""

import json
from collections.abc import Mapping
from io import BytesIO
from types import MappingProxyType

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from app.schemas import Control, GenerationRequest, OutputFormat

MIME_TYPES: dict[str, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
AI_MADE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"

PNG_LEVEL = 2  # deflate above 3 takes several times as long for a few per cent
NOTHING: Mapping[str, object] = MappingProxyType({})
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286

XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    f' Iptc4xmpExt:DigitalSourceType="{AI_MADE}"/>'
    "</rdf:RDF></x:xmpmeta>"
    '<?xpacket end="w"?>'
)


def encode(
    image: Image.Image, output_format: OutputFormat, quality: int, parameters: str | None = None
) -> bytes:
    """Encode as `output_format`, with the mark. `quality` (1 to 100) counts for JPEG and WebP only.

    `parameters` is the text to embed; None embeds nothing but the mark.
    """
    file = BytesIO()
    xmp = XMP.encode()
    if output_format == "png":
        image.save(file, "PNG", compress_level=PNG_LEVEL, pnginfo=_png_texts(parameters))
    elif output_format == "jpeg":
        subsampling = "4:4:4" if quality >= 90 else "4:2:0"
        image.save(file, "JPEG", quality=quality, subsampling=subsampling, xmp=xmp, exif=_exif(parameters))
    else:
        image.save(file, "WEBP", quality=quality, xmp=xmp, exif=_exif(parameters))
    return file.getvalue()


def parameters_text(
    generation: GenerationRequest, seed: int, model: str, further: Mapping[str, object] = NOTHING
) -> str:
    """Return the settings of the picture of `seed`, as text in A1111's format.

    Of input pictures it tells the settings but not the content, and leaves out defaults. `further` are
    settings that are not part of a request.
    """
    settings = {
        "Steps": generation.prior_num_inference_steps,
        "Sampler": generation.sampler,
        "CFG scale": generation.prior_guidance_scale,
        "Seed": seed,
        "Size": f"{generation.width}x{generation.height}",
        "Model": model,
        "Decoder steps": generation.decoder_num_inference_steps,
        "Decoder CFG scale": generation.decoder_guidance_scale,
        "Preset": generation.preset,
        **_guides(generation),
        **further,
    }
    lines = [generation.prompt]
    if generation.negative_prompt:
        lines.append(f"Negative prompt: {generation.negative_prompt}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in settings.items())])


def _guides(generation: GenerationRequest) -> dict[str, object]:
    """Return what guides a picture besides the prompt, named as in A1111 and its ControlNet extension."""
    start, end = generation.guidance_interval
    guides = {
        "Denoising strength": None if generation.image is None else generation.denoising_strength,
        "Masked": generation.mask is not None or None,
        "Feather": generation.feather or None,
        "Anchor": generation.anchor,
        "Image prompts": ", ".join(str(prompt.weight) for prompt in generation.image_prompts) or None,
        "ControlNet 0": generation.control and _control(generation.control),
        "Loras": ", ".join(f"{lora.name}: {lora.scale}" for lora in generation.loras) or None,
        "Guidance interval": None if (start, end) == (0.0, 1.0) else f"{start} to {end}",
        "Weighted prompt": generation.weighted_prompt or None,
        "Long prompt": generation.long_prompt or None,
    }
    return {name: value for name, value in guides.items() if value is not None}


def _control(control: Control) -> str:
    module = control.type if control.preprocess else "none"
    faithful = "" if control.faithful is None else f", Faithful: {control.faithful}"
    return (
        f"Module: {module}, Model: {control.type}, Weight: {control.scale}, "
        f"Guidance Start: {control.start}, Guidance End: {control.end}{faithful}"
    )


def _quoted(value: object) -> str:
    """Quote a value that contains separators as a JSON string, as readers of this text expect."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def _png_texts(parameters: str | None) -> PngInfo:
    texts = PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", XMP)
    if parameters is not None:
        texts.add_itxt("parameters", parameters.replace("\0", ""))  # as PNG's section 11.3.3.4 wants it
    return texts


def _exif(parameters: str | None) -> Image.Exif:
    """Return EXIF with the text as user comment, in UTF-16 as the standard requires."""
    exif = Image.Exif()
    if parameters is not None:
        # A JPEG marker segment holds 65,533 bytes: longer texts are cut rather than refused.
        comment = b"UNICODE\x00" + parameters[:30_000].encode("utf-16-be", "replace")[:64_000]
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = comment
    return exif
