"""Pictures as files: names, formats, the grid of all pictures, and writing all files or none."""

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from app.schemas import GenerationRequest, OutputFormat
    from cascade import Control, GeneratedImage, ImageSettings
    from cascade.networks.previewer import Previewer
    from cascade.tasks.settings import FeatureMap

FORMATS: Mapping[str, "OutputFormat"] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
CONTROL_TYPES = {"inpainting": "inpaint"}  # kinds that have another name over HTTP
GRID_GAP = 4  # pixels between the pictures of a grid


def picture_format(path: Path, option: str = "output") -> "OutputFormat":
    """Return the format of the suffix. An error names `option`.

    Raises:
        InvalidSetting: the suffix is of no format that can be written.
    """
    from cascade.errors import InvalidSetting

    try:
        return FORMATS[path.suffix.lower()]
    except KeyError:
        message = f"must end in {', '.join(FORMATS)}, not {path.suffix or path.name!r}"
        raise InvalidSetting(option, message) from None


def check_folder(path: Path, option: str = "output") -> None:
    """Raise InvalidSetting, before the work is done, if its result could not be saved."""
    from cascade.errors import InvalidSetting

    folder = path.parent
    if not folder.is_dir():
        raise InvalidSetting(option, f"the folder {folder} does not exist")
    if path.is_dir():
        raise InvalidSetting(option, f"{path} is a folder")
    if not os.access(folder, os.W_OK):
        raise InvalidSetting(option, f"the folder {folder} may not be written to")


def check_output(path: Path, option: str = "output") -> None:
    """Check the format and the folder of a picture file that is to be written."""
    picture_format(path, option)
    check_folder(path, option)


def numbered(path: Path, count: int) -> list[Path]:
    """Return the path itself for one picture, else NAME-0.png, NAME-1.png, ..."""
    if count == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{index}") for index in range(count)]


def grid_path(path: Path) -> Path:
    """Return NAME-grid.png."""
    return path.with_stem(f"{path.stem}-grid")


def save_pictures(
    pictures: Sequence["GeneratedImage"],
    output: Path,
    *,
    quality: int,
    has_grid: bool,
    named_model: str | None,
) -> None:
    """Write all pictures, and with `has_grid` also their grid.

    Args:
        named_model: name of the model, to write it and the settings into the files; None for neither.

    Raises:
        OSError: a file could not be written; in that case none is.
    """
    from app.storage.encoding import encode, parameters_text

    output_format = picture_format(output)
    files = {}
    for path, picture in zip(numbered(output, len(pictures)), pictures, strict=True):
        text = None
        if named_model is not None:
            settings = picture.settings
            assert settings.seed is not None
            text = parameters_text(as_request(settings), settings.seed, named_model, _beyond_http(settings))
        files[path] = encode(picture.image, output_format, quality, text)
    if has_grid:
        sheet = contact_sheet([picture.image for picture in pictures])
        files[grid_path(output)] = encode(sheet, output_format, quality)
    write_all(files)


def contact_sheet(images: list["Image"]) -> "Image":
    """Arrange all pictures, which have one size, in a roughly square grid."""
    from PIL import Image

    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    size = (columns * (width + GRID_GAP) - GRID_GAP, rows * (height + GRID_GAP) - GRID_GAP)
    sheet = Image.new("RGB", size, "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (column * (width + GRID_GAP), row * (height + GRID_GAP)))
    return sheet


def as_request(settings: "ImageSettings") -> "GenerationRequest":
    """Return the complete settings of one picture as the request that the server would have received."""
    from app.schemas import GenerationRequest
    from app.storage.decoding import mask_of

    mask = settings.mask
    if mask is None and settings.image is not None and settings.repaints and settings.anchor is None:
        mask = mask_of(settings.image.convert("RGBA"))
    return GenerationRequest.model_validate(
        {
            "prompt": settings.prompt,
            "negative_prompt": settings.negative_prompt,
            "width": settings.width,
            "height": settings.height,
            "seeds": (settings.seed,),
            "prior_num_inference_steps": settings.steps,
            "prior_guidance_scale": settings.guidance_scale,
            "decoder_num_inference_steps": settings.decoder_steps,
            "decoder_guidance_scale": settings.decoder_guidance_scale,
            "preset": settings.preset,
            "sampler": settings.sampler,
            "image": settings.image and _reference(settings.image),
            "strength": settings.strength,
            "mask": mask and _reference(mask),
            "feather": settings.feather if settings.image is not None else 0,
            "anchor": settings.anchor,
            "image_prompts": [
                {"image": _reference(prompt.image), "weight": prompt.weight}
                for prompt in settings.image_prompts
            ],
            "control": settings.control and _control(settings.control),
            "loras": [{"name": lora.name, "scale": lora.scale} for lora in settings.loras],
            "guidance_interval": settings.guidance_interval,
            "weighted_prompt": settings.weighted_prompt,
            "long_prompt": settings.long_prompt,
        }
    )


def _control(control: "Control") -> dict[str, object]:
    return {
        "type": CONTROL_TYPES.get(control.kind, control.kind),
        "image": _reference(control.image),
        "scale": control.scale,
        "start": control.start,
        "end": control.end,
        "preprocess": control.preprocess,
        "faithful": control.faithful,
    }


def _reference(picture: "Image | FeatureMap") -> dict[str, object]:
    """Return a reference to a picture or a feature map: its size and the digest of its values."""
    from cascade.tasks.settings import FeatureMap

    if isinstance(picture, FeatureMap):
        _, height, width = picture.values.shape
        content = picture.values.float().contiguous().numpy().tobytes()
    else:
        width, height = picture.size
        content = picture.convert("RGBA").tobytes()
    return {"sha256": hashlib.sha256(content).hexdigest(), "width": width, "height": height}


def _beyond_http(settings: "ImageSettings") -> dict[str, object]:
    """Return settings that only the command line has, where they differ from the default."""
    unusual = {
        "Two generators": settings.preset == "diffusers" and not settings.shares_generator,
        "Noise at sampling shift": settings.image is not None and settings.noise_at_sampling_shift,
    }
    return {name: True for name, is_so in unusual.items() if is_so}


def save_preview(previewer: "Previewer", latents: "Tensor", path: Path) -> None:
    """Write to `path` what Stage C is drawing, all pictures in a grid.

    Args:
        latents: (b, 16, h, w), as `Progress` has them.
    """
    import torch

    from app.storage.encoding import encode
    from cascade.tasks.picture import to_images

    with torch.inference_mode():
        pixels = previewer(latents.to(next(previewer.parameters()).dtype))
    write_all({path: encode(contact_sheet(to_images(pixels)), picture_format(path, "preview"), 90)})


def write_all(files: Mapping[Path, bytes]) -> None:
    """Write every file, or none if one cannot be written."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    try:
        for path, content in files.items():
            partial[path].write_bytes(content)
        for path, written in partial.items():
            written.replace(path)
    except BaseException:  # also Ctrl-C
        for written in partial.values():
            written.unlink(missing_ok=True)
        raise
