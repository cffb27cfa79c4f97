"""Loading of a name, folder or repository into models that are ready to run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import nn

from cascade.checkpoints.configs import CONFIG_CLASSES, schedule_config, usual_injections
from cascade.checkpoints.files import (
    LORA_FOLDER,
    TOKENIZER_FILES,
    Part,
    are_equal,
    by_kind,
    companion,
    find_parts,
    folder_beside,
    ranked,
    scan,
    stated_native_sizes,
)
from cascade.checkpoints.fill import fill
from cascade.checkpoints.keys import Component
from cascade.checkpoints.sums import check_sums
from cascade.checkpoints.towers import build_tower, load_processor, load_tokenizer
from cascade.conditioning import ImageEncoder, TextEncoder
from cascade.config import CONTROL_KINDS, SCHEDULE_B, SCHEDULE_C, ControlNetConfig, ScheduleConfig
from cascade.errors import CheckpointError, InvalidSetting
from cascade.lora.library import LoRALibrary
from cascade.models import Models
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.networks.previewer import Previewer
from cascade.networks.stage_a import StageA
from cascade.networks.stage_b import StageB
from cascade.networks.stage_c import StageC
from cascade.sizes import NativeSizes

EMBEDDED = {"tiny": Path(__file__).parents[1] / "tiny"}
DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}

_CLASSES: Mapping[Component, type[nn.Module]] = {
    Component.STAGE_C: StageC,
    Component.STAGE_B: StageB,
    Component.STAGE_A: StageA,
    Component.EFFNET_ENCODER: EffNetEncoder,
    Component.PREVIEWER: Previewer,
    Component.CONTROLNET: ControlNet,
}
# Small, run once per request or preview, and sensitive: always in full precision.
_ALWAYS_FP32 = (Component.EFFNET_ENCODER, Component.PREVIEWER)


def load_cascade(
    source: str | PathLike[str] = "tiny",
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    controlnets: str | PathLike[str] | None = None,
) -> Models:
    """Load a whole checkpoint.

    Args:
        source: "tiny" (shipped with the library), a folder in any published layout, one of the files in such
            a folder, or a repository of the Hugging Face hub such as "stabilityai/stable-cascade".
        device: "auto" takes CUDA where it is available.
        dtype: "float32" or "bfloat16"; "auto" takes the first on a CPU and the second on a GPU.
        revision: commit, branch or tag of a repository.
        token: access token of the hub.
        variant: words that file or folder names must have: "bf16", "lite", "lite.bf16".
        local_files_only: never ask the hub; use what was downloaded before.
        controlnets: a folder or file of ControlNets, preferred to those of the checkpoint.

    Raises:
        CheckpointError: `source` is unknown, or a part is missing, damaged or refused; names what is wrong.
        InvalidSetting: device, dtype or variant is unknown.
    """
    chosen_device = parse_device(device)
    chosen_dtype = parse_dtype(dtype, chosen_device)
    paths = _resolve(source, revision, token, variant, local_files_only)
    for path in paths:
        check_sums(path.parent if path.is_file() else path)
    candidates = find_parts(*paths, variant=variant, dtype=chosen_dtype)
    if controlnets is not None:
        further = _controlnets_in(Path(controlnets).expanduser(), chosen_dtype)
        candidates[Component.CONTROLNET] = [*further, *candidates.get(Component.CONTROLNET, ())]
    return _Loader(candidates, chosen_device, chosen_dtype).models(str(source))


def load_network(
    path: str | PathLike[str],
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
) -> nn.Module:
    """Load one component from its file or folder; a CLIP tower is returned as transformers' class.

    Raises `CheckpointError` unless exactly one component is there.
    """
    parts = scan(existing(path)).parts
    if len(parts) != 1:
        found = ", ".join(part.component for part in parts) or "none"
        raise CheckpointError(f"{path}: should hold one component, holds {found}")
    chosen_device = parse_device(device)
    return _load_part(parts[0], chosen_device, parse_dtype(dtype, chosen_device))


def load_controlnet(path: str | PathLike[str], models: Models) -> ControlNet:
    """Load a ControlNet from a file of its own, for use with `models`.

    `replace(models, controlnets={**models.controlnets, net.kind: net})` adds it to the models.

    Raises `CheckpointError` unless the file holds one ControlNet and it fits the Stage C of `models`.
    """
    parts = _controlnets_in(existing(path), models.dtype)
    if len(parts) != 1:
        raise CheckpointError(f"{path}: should hold one controlnet, holds {len(parts) or 'none'}")
    return _load_controlnet(parts[0], models.stage_c, models.device, models.dtype)


def parse_device(device: str | torch.device) -> torch.device:
    """Return an available device; "auto" is the first GPU, or else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    allowed = ["auto", "cpu"] + [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    is_there = chosen is not None and (
        chosen.type == "cpu" or (chosen.type == "cuda" and (chosen.index or 0) < torch.cuda.device_count())
    )
    if chosen is None or not is_there:
        raise InvalidSetting("device", f"{str(device)!r} is not here; allowed are {', '.join(allowed)}")
    return chosen


def parse_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of the weights; "auto" is float32 on a CPU and bfloat16 elsewhere."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    if name in ("float16", "fp16", "half"):
        raise InvalidSetting(
            "dtype",
            "float16 is refused: the activations of Stage C exceed its range and pictures turn black; "
            "use bfloat16, which takes as little memory",
        )
    if name not in DTYPES:
        raise InvalidSetting("dtype", f"{name!r} is unknown; allowed are auto, float32, bfloat16")
    return DTYPES[name]


def _controlnets_in(path: Path, dtype: torch.dtype) -> list[Part]:
    """Return the ControlNets of a folder or file, the preferred ones first."""
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or folder of ControlNets")
    return ranked(scan(path).parts, path, dtype=dtype).get(Component.CONTROLNET, [])


def _resolve(
    source: str | PathLike[str],
    revision: str | None,
    token: str | None,
    variant: str | None,
    local_files_only: bool,
) -> tuple[Path, ...]:
    """Return the folder or file of a source; two folders for a pair of repositories, downloaded if needed."""
    if source in EMBEDDED:
        return (existing(EMBEDDED[str(source)]),)
    from cascade.checkpoints.hub import REPOSITORY, download

    if source != "" and Path(source).expanduser().exists():
        return (existing(source),)
    if not REPOSITORY.fullmatch(str(source)):
        raise CheckpointError(
            f"{_no_such(source)}; give {', '.join(EMBEDDED)}, a folder, a .safetensors file in its folder, "
            "or a repository such as stabilityai/stable-cascade"
        )
    return download(
        str(source), revision=revision, token=token, variant=variant, local_files_only=local_files_only
    )


def existing(source: str | PathLike[str]) -> Path:
    """Return the path of `source`, or of "tiny"; raise `CheckpointError` with what is allowed otherwise."""
    path = EMBEDDED.get(str(source), Path(source).expanduser())
    if source == "" or not path.exists():  # for Path, an empty name is the current folder
        raise CheckpointError(
            f"{_no_such(source)}; give {', '.join(EMBEDDED)}, a folder or a .safetensors file; "
            "`cascade download OWNER/NAME` fetches a repository and prints its folder"
        )
    return path


def _no_such(source: str | PathLike[str]) -> str:
    return f"{source or 'an empty name'}: no such checkpoint"


class _Loader:
    """Loader of the parts of a checkpoint that belong together."""

    def __init__(
        self, candidates: Mapping[Component, Sequence[Part]], device: torch.device, dtype: torch.dtype
    ) -> None:
        self.candidates = candidates
        self.device = device
        self.dtype = dtype
        self.prior = candidates[Component.STAGE_C][0]
        self.decoder = candidates[Component.STAGE_B][0]

    def models(self, name: str) -> Models:
        """Load everything into one object. Quick checks come first."""
        texts = self.candidates[Component.TEXT_ENCODER]
        prior_text, decoder_text = companion(self.prior, texts), companion(self.decoder, texts)
        tokenizer = _tokenizer_folder(self.prior, prior_text)
        is_shared = are_equal(prior_text, decoder_text)
        decoder_tokenizer = tokenizer if is_shared else _tokenizer_folder(self.decoder, decoder_text)
        schedules = self._schedules()
        native = _native_sizes(self.prior, self.decoder)

        text_encoder = self._text_encoder(prior_text, tokenizer)
        stage_c = cast(StageC, self._load(self.prior))
        stage_a = companion(self.decoder, self.candidates[Component.STAGE_A])
        return Models(
            stage_a=cast(StageA, self._load(stage_a)),
            stage_b=cast(StageB, self._load(self.decoder)),
            stage_c=stage_c,
            text_encoder=text_encoder,
            decoder_text_encoder=text_encoder
            if is_shared
            else self._text_encoder(decoder_text, decoder_tokenizer),
            prior_schedule=schedules[0],
            decoder_schedule=schedules[1],
            image_encoder=self._image_encoder(),
            effnet=cast(EffNetEncoder | None, self._optional(Component.EFFNET_ENCODER)),
            loras=LoRALibrary([self.prior.root / LORA_FOLDER]),
            previewer=cast(Previewer | None, self._optional(Component.PREVIEWER)),
            controlnets=self._controlnets(stage_c),
            native=native,
            device=self.device,
            dtype=self.dtype,
            name=name,
            stated_scale_factor=stage_a.stated.get("scale_factor"),
        )

    def _load(self, part: Part) -> nn.Module:
        return _load_part(part, self.device, self.dtype)

    def _optional(self, component: Component) -> nn.Module | None:
        parts = self.candidates.get(component)
        return self._load(companion(self.prior, parts)) if parts else None

    def _controlnets(self, stage_c: StageC) -> dict[str, ControlNet]:
        """Load one of each kind, except those for a Stage C of other widths, such as the large one's."""
        parts = by_kind(self.candidates.get(Component.CONTROLNET, ()))
        return {
            kind: _load_controlnet(part, stage_c, self.device, self.dtype)
            for kind, part in parts.items()
            if kind in CONTROL_KINDS and _suits(part, stage_c)
        }

    def _text_encoder(self, part: Part, tokenizer: Path) -> TextEncoder:
        return TextEncoder(load_tokenizer(tokenizer), self._load(part))

    def _image_encoder(self) -> ImageEncoder | None:
        model = self._optional(Component.IMAGE_ENCODER)
        if model is None:
            return None
        names = ("prior_feature_extractor", "feature_extractor", "prior_image_processor")
        folder = folder_beside(self.prior, names, ("preprocessor_config.json",))
        return ImageEncoder(load_processor(folder), model)

    def _schedules(self) -> tuple[ScheduleConfig, ScheduleConfig]:
        file = "scheduler_config.json"
        prior = folder_beside(self.prior, ("prior_scheduler", "scheduler"), (file,))
        decoder = folder_beside(self.decoder, ("scheduler",), (file,))
        return (
            schedule_config(prior / file if prior else None, SCHEDULE_C),
            schedule_config(decoder / file if decoder else None, SCHEDULE_B),
        )


def build(part: Part) -> nn.Module:
    """Build the network of a part on the meta device, without memory."""
    if part.component not in CONFIG_CLASSES:
        try:
            return build_tower(part.component, part.tensors, part.stated)
        except CheckpointError as error:
            raise CheckpointError(f"{part}: {error}") from error
    config = part.config
    try:
        with torch.device("meta"):
            return _CLASSES[part.component](config)
    except (RuntimeError, TypeError, ValueError) as error:  # sizes too large for torch, or not divisible
        line = str(error).partition("\n")[0]
        raise CheckpointError(f"{part}: no network can have these dimensions: {line}") from error


def _load_part(part: Part, device: torch.device, dtype: torch.dtype) -> nn.Module:
    network = build(part)
    is_sensitive = part.component in _ALWAYS_FP32 or getattr(network.config, "mode", "") == "effnet"
    kept = torch.float32 if is_sensitive else dtype
    return fill(network, part.tensors, device=device, dtype=kept, source=str(part))


def _suits(controlnet: Part, stage_c: StageC) -> bool:
    """Tell whether all maps of a ControlNet have widths that Stage C has."""
    config = controlnet.config
    assert isinstance(config, ControlNetConfig)
    return set(config.out_channels) <= set(stage_c.config.block_out_channels)


def _load_controlnet(part: Part, stage_c: StageC, device: torch.device, dtype: torch.dtype) -> ControlNet:
    """Load a ControlNet and check that its injections, stated or usual, are places of Stage C."""
    network = cast(ControlNet, _load_part(part, device, dtype))
    levels = stage_c.control_levels
    if "injections" not in part.stated:
        injections = usual_injections(len(network.injections), len(levels))
        network.config = replace(network.config, injections=injections)
    for place, width in zip(network.injections, network.config.out_channels, strict=True):
        if place >= len(levels):
            raise CheckpointError(
                f"{part}: injects before ResBlock {place}, but Stage C has {len(levels)}, counted from 0"
            )
        if width != (expected := stage_c.config.block_out_channels[levels[place]]):
            raise CheckpointError(
                f"{part}: adds {width} channels before ResBlock {place} of Stage C, which has {expected}"
            )
    return network


def _tokenizer_folder(stage: Part, text: Part) -> Path:
    is_prior = stage.component is Component.STAGE_C
    names = ("prior_tokenizer", "tokenizer") if is_prior else ("tokenizer", "prior_tokenizer")
    folder = folder_beside(text, names, TOKENIZER_FILES) or folder_beside(stage, names, TOKENIZER_FILES)
    if folder is None:
        raise CheckpointError(
            f"{text.pipeline}: the tokenizer is missing: put the folder tokenizer/ of the repository "
            "stabilityai/stable-cascade (tokenizer.json, or vocab.json and merges.txt) beside the weights, "
            "or fetch it with `cascade download stabilityai/stable-cascade`"
        )
    return folder


def _native_sizes(*parts: Part) -> NativeSizes:
    """Return the sizes at which a checkpoint was trained, if it states them."""
    for part in parts:
        if sizes := stated_native_sizes(part):
            return NativeSizes(tuple((width, height) for width, height in sizes), resamples=True)
    return NativeSizes()
