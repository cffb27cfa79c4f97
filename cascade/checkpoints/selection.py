"""Selection of the repository files that are needed to make pictures."""

import re
from collections.abc import Iterable, Iterator

from cascade.checkpoints.transfer import RemoteFile
from cascade.errors import InvalidSetting

VARIANT_WORDS = ("bf16", "fp32", "lite")

_NETWORKS = ("prior", "decoder", "prior_prior")
_OTHER_WEIGHTS = ("vqgan", "text_encoder", "image_encoder", "prior_text_encoder", "prior_image_encoder")
_SMALL_FOLDERS = (
    "tokenizer",
    "scheduler",
    "feature_extractor",
    "prior_tokenizer",
    "prior_scheduler",
    "prior_feature_extractor",
)
_ROOT_FILES = ("model_index.json", "effnet_encoder.safetensors", "previewer.safetensors")
CONTROLNETS = re.compile(r"controlnet/[\w.-]+\.safetensors")  # as the official repository has them
_ORIGINAL = re.compile(r"stage_([abc])(_lite)?(_bf16)?\.safetensors")


def select_files(
    offered: Iterable[RemoteFile], words: frozenset[str], *, controlnets: bool = False
) -> list[RemoteFile]:
    """Select the files that pictures need, in one variant: diffusers' folders, or else original files.

    ControlNets, which only some pictures need, are included on request.
    """
    by_name = {file.name: file for file in offered}
    lite = "_lite" if "lite" in words else ""
    folders = [f"{name}{lite}" for name in _NETWORKS]
    networks = [name for folder in folders for name in _weights_of(folder, by_name, words)]
    networks = networks or list(_original_files(by_name, words))
    if not networks:
        return []
    others = [name for folder in _OTHER_WEIGHTS for name in _weights_of(folder, by_name, words)]
    small = [name for name in by_name if name.split("/")[0] in _SMALL_FOLDERS and name.count("/") == 1]
    root = [name for name in _ROOT_FILES if name in by_name]
    extras = [name for name in by_name if controlnets and CONTROLNETS.fullmatch(name)]
    return [by_name[name] for name in dict.fromkeys([*root, *small, *others, *networks, *extras])]


def _weights_of(folder: str, names: Iterable[str], words: frozenset[str]) -> list[str]:
    """Return config.json and safetensors of one variant in a folder; bf16 unless fp32 is requested."""
    inside = [name for name in names if name.rpartition("/")[0] == folder]
    weights = [name for name in inside if name.endswith(".safetensors") or ".safetensors.index" in name]
    half = [name for name in weights if ".bf16" in name]
    full = [name for name in weights if not re.search(r"\.(bf16|fp16|non_ema)", name)]
    chosen = full if ("fp32" in words and full) or not half else half
    return [f"{folder}/config.json", *chosen] if f"{folder}/config.json" in inside and chosen else []


def _original_files(names: Iterable[str], words: frozenset[str]) -> Iterator[str]:
    """Yield the file that matches best for each stage."""
    stages: dict[str, list[tuple[bool, bool, str]]] = {}
    for name in names:
        if match := _ORIGINAL.fullmatch(name):
            is_other_size = bool(match[2]) != ("lite" in words)
            is_other_type = bool(match[3]) != ("fp32" not in words)
            stages.setdefault(match[1], []).append((is_other_size, is_other_type, name))
    for candidates in stages.values():
        yield min(candidates)[2]


def variant_words(variant: str | None) -> frozenset[str]:
    """Split a variant such as "lite.bf16" into words; raise `InvalidSetting` for an unknown one."""
    words = frozenset(re.split(r"[._,-]", variant.lower())) if variant else frozenset()
    if unknown := words.difference(VARIANT_WORDS):
        allowed = ", ".join(VARIANT_WORDS)
        raise InvalidSetting("variant", f"{', '.join(sorted(unknown))!r} is unknown; allowed are {allowed}")
    return words
