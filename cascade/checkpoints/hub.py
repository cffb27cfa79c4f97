"""Downloading checkpoints from the Hugging Face hub, or from a mirror that speaks its protocol.

A repository is pinned to a commit: the first download resolves "main" (or what the user names) once and
remembers the commit, with the files and their sha256, in `cascade.lock.json` in the hub's cache. Later loads
use the pinned files without asking the hub. Naming a revision again, also "main", moves the pin.
"""

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.checkpoints.writing import write_json
from cascade.errors import CheckpointError, InvalidSetting

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOCK_NAME = "cascade.lock.json"
# The official model is two repositories; either one stands for both.
PAIRS = {
    "stabilityai/stable-cascade": "stabilityai/stable-cascade-prior",
    "stabilityai/stable-cascade-prior": "stabilityai/stable-cascade",
}
OFFICIAL_LICENCE = (
    "The weights are under the Stability AI Non-Commercial Research Community License: research and other "
    "non-commercial use only. See https://huggingface.co/stabilityai/stable-cascade/blob/main/LICENSE"
)
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
_ORIGINAL = re.compile(r"stage_([abc])(_lite)?(_bf16)?\.safetensors")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pin:
    """What was downloaded: a commit, and the files of it with their sha256 where the hub states one."""

    commit: str
    files: Mapping[str, str | None]


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that the hub offers."""

    name: str
    num_bytes: int
    sha256: str | None


def download(
    repository: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    variant: str | None = None,
    local_files_only: bool = False,
    cache: Path | None = None,
    endpoint: str | None = None,
    notify: Callable[[str], None] = _log.warning,
) -> tuple[Path, ...]:
    """Fetch what is needed of a repository, and of its other half if it is one of the two official ones.

    Interrupted downloads go on where they stopped. Progress bars are the hub library's own.

    Args:
        repository: owner/name.
        revision: commit, branch or tag; for an official repository it applies to the one that is named.
        token: access token; None takes the one that `hf auth login` stored.
        variant: "bf16" (taken where there is one), "fp32", "lite", or "lite.bf16" and so on.
        local_files_only: use what is there and never ask the hub, as HF_HUB_OFFLINE=1 does.
        cache: the hub's cache folder; None takes the library's own.
        endpoint: address of the hub; None takes HF_ENDPOINT.
        notify: is told licence and size once, before anything is fetched.

    Returns:
        The folders of the repository and of its other half.

    Raises:
        CheckpointError: the hub refuses, cannot be reached or sent wrong bytes, or the disk is full.
        InvalidSetting: `variant` is unknown.
    """
    from huggingface_hub import HfApi, constants

    words = _variant_words(variant)
    cache = cache or Path(constants.HF_HUB_CACHE)
    api = HfApi(endpoint=endpoint, token=token)
    is_offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
    names = [repository, *([PAIRS[repository]] if repository in PAIRS else [])]
    wanted = {name: revision if name == repository else None for name in names}
    return tuple(
        _Repository(api, name, cache, words).fetch(asked, is_offline, notify)
        for name, asked in wanted.items()
    )


class _Repository:
    """One repository in one cache."""

    def __init__(self, api: "HfApi", name: str, cache: Path, words: frozenset[str]) -> None:
        self.api = api
        self.name = name
        self.cache = cache
        self.words = words

    def fetch(self, revision: str | None, is_offline: bool, notify: Callable[[str], None]) -> Path:
        """The folder of the pinned commit, with all files."""
        pin = self._pin()
        if pin and (is_offline or revision in (None, pin.commit)) and not self._absent(pin):
            return self._snapshot(pin.commit)
        if is_offline:
            return self._unpinned_snapshot(revision)
        with _clear_errors(self.name):
            commit, offered = self._offer(revision or (pin.commit if pin else "main"))
        files = select_files(offered, self.words)
        if not files:
            listed = ", ".join(file.name for file in offered[:10]) or "no files"
            raise CheckpointError(f"{self.name}: holds no Stable Cascade checkpoint; it has {listed}")
        new = [file for file in files if not (self._snapshot(commit) / file.name).exists()]
        if new:
            self._announce(new, notify)
        for file in files:
            self._fetch_file(file, commit, is_new=file in new)
        self._remember(Pin(commit, {file.name: file.sha256 for file in files}))
        return self._snapshot(commit)

    def _offer(self, revision: str) -> tuple[str, list[RemoteFile]]:
        """The commit of a revision and its files."""
        info = self.api.model_info(self.name, revision=revision, files_metadata=True)
        files = [
            RemoteFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings or []
        ]
        return str(info.sha), files

    def _announce(self, files: Iterable[RemoteFile], notify: Callable[[str], None]) -> None:
        """State licence and size, and refuse what the disk cannot hold."""
        num_bytes = sum(file.num_bytes for file in files)
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if num_bytes > free:
            raise CheckpointError(f"{self.cache}: {self.name} needs {num_bytes:,} bytes, {free:,} are free")
        licence = OFFICIAL_LICENCE if self.name in PAIRS else "Its licence stands on its page."
        notify(f"Downloading {self.name}, {num_bytes / 1e9:.2f} GB. {licence}")

    def _fetch_file(self, file: RemoteFile, commit: str, *, is_new: bool) -> None:
        with _clear_errors(f"{self.name}: {file.name}"):
            path = Path(
                self.api.hf_hub_download(self.name, file.name, revision=commit, cache_dir=str(self.cache))
            )
            found = _sha256(path) if is_new and file.sha256 else file.sha256
        if found != file.sha256:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.name}: {file.name} arrived damaged and was deleted: "
                f"sha256 should be {file.sha256}, is {found}"
            )

    def _snapshot(self, commit: str) -> Path:
        return self.cache / f"models--{self.name.replace('/', '--')}" / "snapshots" / commit

    def _unpinned_snapshot(self, revision: str | None) -> Path:
        """Offline: what other tools have left in the hub's cache."""
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(
                self.name, revision=revision, cache_dir=str(self.cache), local_files_only=True
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{self.name}: not downloaded completely, and the hub may not be asked; "
                f"run `cascade download {self.name}` where there is a network"
            ) from error
        return Path(folder)

    @property
    def _key(self) -> str:
        kind = ".".join(sorted(self.words)) or "default"
        return f"{self.api.endpoint}/{self.name} {kind}"

    def _pin(self) -> Pin | None:
        entry = self._lock().get(self._key)
        try:
            return Pin(**entry) if entry else None
        except TypeError as error:
            raise CheckpointError(
                f"{self.cache / LOCK_NAME}: malformed; delete it to resolve anew"
            ) from error

    def _lock(self) -> dict[str, Any]:
        path = self.cache / LOCK_NAME
        if not path.is_file():
            return {}
        try:
            content: dict[str, Any] = json.loads(path.read_text())
        except ValueError as error:
            raise CheckpointError(f"{path}: malformed; delete it to resolve anew") from error
        return content

    def _remember(self, pin: Pin) -> None:
        write_json(self.cache / LOCK_NAME, self._lock() | {self._key: asdict(pin)})

    def _absent(self, pin: Pin) -> list[str]:
        return [name for name in pin.files if not (self._snapshot(pin.commit) / name).exists()]


def select_files(offered: Iterable[RemoteFile], words: frozenset[str]) -> list[RemoteFile]:
    """The files that pictures need, in one variant: diffusers' folders, or else original files."""
    by_name = {file.name: file for file in offered}
    lite = "_lite" if "lite" in words else ""
    folders = [f"{name}{lite}" for name in _NETWORKS] + list(_OTHER_WEIGHTS)
    chosen = [name for folder in folders for name in _weights_of(folder, by_name, words)]
    if not chosen:
        chosen = list(_original_files(by_name, words))
        chosen += [name for folder in _OTHER_WEIGHTS[1:] for name in _weights_of(folder, by_name, words)]
    if not chosen:
        return []
    small = [name for name in by_name if name.split("/")[0] in _SMALL_FOLDERS and name.count("/") == 1]
    root = [name for name in _ROOT_FILES if name in by_name]
    return [by_name[name] for name in dict.fromkeys([*root, *small, *chosen])]


def _weights_of(folder: str, names: Iterable[str], words: frozenset[str]) -> list[str]:
    """config.json and safetensors of one variant in a folder; bf16 unless fp32 is asked for."""
    inside = [name for name in names if name.rpartition("/")[0] == folder]
    weights = [name for name in inside if name.endswith(".safetensors") or ".safetensors.index" in name]
    half = [name for name in weights if ".bf16" in name]
    full = [name for name in weights if not re.search(r"\.(bf16|fp16|non_ema)", name)]
    chosen = full if ("fp32" in words and full) or not half else half
    return [f"{folder}/config.json", *chosen] if f"{folder}/config.json" in inside and chosen else []


def _original_files(names: Iterable[str], words: frozenset[str]) -> Iterator[str]:
    """One file for each stage."""
    stages: dict[str, list[tuple[bool, bool, str]]] = {}
    for name in names:
        if match := _ORIGINAL.fullmatch(name):
            is_other_size = bool(match[2]) != ("lite" in words)
            is_other_type = bool(match[3]) != ("fp32" not in words)
            stages.setdefault(match[1], []).append((is_other_size, is_other_type, name))
    for candidates in stages.values():
        yield min(candidates)[2]


def _variant_words(variant: str | None) -> frozenset[str]:
    words = frozenset(re.split(r"[._,-]", variant.lower())) if variant else frozenset()
    if unknown := words.difference(VARIANT_WORDS):
        allowed = ", ".join(VARIANT_WORDS)
        raise InvalidSetting("variant", f"{', '.join(sorted(unknown))!r} is unknown; allowed are {allowed}")
    return words


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _clear_errors(what: str) -> Iterator[None]:
    """Turn what the hub library raises into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{what}: access must be granted: accept the terms on its page, then give a token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{what}: there is no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{what}: there is no such repository, or it is private: give a token"
        ) from error
    except errors.HfHubHTTPError as error:
        raise CheckpointError(f"{what}: the hub answers {error.response.status_code}") from error
    except (OSError, ValueError, errors.HTTPError) as error:  # type: ignore[attr-defined]
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{what}: cannot be downloaded: {reason[0]}; run it again to go on") from error
