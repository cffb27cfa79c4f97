"""Downloading checkpoints from the Hugging Face hub, or from a mirror that speaks its protocol.

A repository is pinned to a commit: the first download resolves "main" (or what the user names) once and
remembers the commit, with the files and their sha256, in `cascade.lock.json` in the hub's cache. Later loads
use the pinned files without asking the hub. Naming a revision again, even "main", moves the pin.
"""

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.checkpoints.selection import CONTROLNETS, select_files, variant_words
from cascade.checkpoints.transfer import RemoteFile, clear_errors, fetch_file, repository_folder
from cascade.checkpoints.writing import write_json
from cascade.errors import CheckpointError, InvalidSetting

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
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

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pin:
    """A downloaded commit and its files, with their sha256 where the hub states one."""

    commit: str
    files: Mapping[str, str | None]


def download(
    repository: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    variant: str | None = None,
    controlnets: bool = False,
    local_files_only: bool = False,
    cache: Path | None = None,
    endpoint: str | None = None,
    notify: Callable[[str], None] = _log.warning,
) -> tuple[Path, ...]:
    """Download the needed files of a repository, and of its other half if it is one of the official pair.

    Interrupted downloads resume where they stopped. Progress bars are the hub library's own.

    Args:
        repository: owner/name.
        revision: commit, branch or tag; for an official repository it applies to the one that is named.
        token: access token; None takes the one that `hf auth login` stored.
        variant: "bf16" (the default where it exists), "fp32", "lite", or "lite.bf16" and so on.
        controlnets: also fetch the ControlNets in the folder controlnet: three in the official repository,
            1.3 GB, for the full Stage C. Loading uses them from then on.
        local_files_only: use what is in the cache and never ask the hub, as HF_HUB_OFFLINE=1 does.
        cache: the hub's cache folder; None takes the library's own.
        endpoint: address of the hub; None takes HF_ENDPOINT.
        notify: called with licence and size, once for each repository, before its files are fetched.

    Returns:
        The folders of the repository and of its other half.

    Raises:
        CheckpointError: the hub refuses, cannot be reached or sent wrong bytes, or the disk is full.
        InvalidSetting: `variant` is unknown, or `repository` is not of the form owner/name.
    """
    if not REPOSITORY.fullmatch(repository):
        raise InvalidSetting(
            "repository", f"must be OWNER/NAME, such as stabilityai/stable-cascade, but is {repository!r}"
        )
    from huggingface_hub import HfApi, constants

    words = variant_words(variant)
    cache = cache or Path(constants.HF_HUB_CACHE)
    api = HfApi(endpoint=endpoint, token=token)
    is_offline = local_files_only or bool(constants.HF_HUB_OFFLINE)
    names = [repository, *([PAIRS[repository]] if repository in PAIRS else [])]
    wanted = {name: revision if name == repository else None for name in names}
    return tuple(
        _Repository(api, name, cache, words, controlnets=controlnets).fetch(asked, is_offline, notify)
        for name, asked in wanted.items()
    )


class _Repository:
    """One repository in one cache."""

    def __init__(
        self, api: "HfApi", name: str, cache: Path, words: frozenset[str], *, controlnets: bool
    ) -> None:
        self.api = api
        self.name = name
        self.cache = cache
        self.words = words
        self.controlnets = controlnets

    def fetch(self, revision: str | None, is_offline: bool, notify: Callable[[str], None]) -> Path:
        """Return the folder of the pinned commit, after downloading the files that it lacks."""
        pin = self._pin()
        if pin and not self._absent(pin):
            is_asked_for = revision in (None, pin.commit) and not self._lacks_controlnets(pin)
            if is_offline or is_asked_for:
                return self._snapshot(pin.commit)
        if is_offline:
            return self._unpinned_snapshot(revision)
        with clear_errors(self.name):
            commit, offered = self._offer(revision or (pin.commit if pin else "main"))
        files = select_files(offered, self.words, controlnets=self.controlnets)
        if not files:
            listed = ", ".join(file.name for file in offered[:10]) or "no files"
            raise CheckpointError(f"{self.name}: holds no Stable Cascade checkpoint; it has {listed}")
        new = [file for file in files if not (self._snapshot(commit) / file.name).exists()]
        if new:
            self._announce(new, notify)
        for file in files:
            fetch_file(self.api, self.name, commit, file, self.cache)
        known = pin.files if pin and pin.commit == commit else {}
        self._remember(Pin(commit, {**known, **{file.name: file.sha256 for file in files}}))
        return self._snapshot(commit)

    def _offer(self, revision: str) -> tuple[str, list[RemoteFile]]:
        """Return the commit of a revision and its files."""
        info = self.api.model_info(self.name, revision=revision, files_metadata=True)
        files = [
            RemoteFile(entry.rfilename, entry.size or 0, entry.lfs.sha256 if entry.lfs else None)
            for entry in info.siblings or []
        ]
        return str(info.sha), files

    def _announce(self, files: Iterable[RemoteFile], notify: Callable[[str], None]) -> None:
        """Report licence and size; raise `CheckpointError` if the disk has too little space."""
        num_bytes = sum(file.num_bytes for file in files)
        self.cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache).free
        if num_bytes > free:
            raise CheckpointError(f"{self.cache}: {self.name} needs {num_bytes:,} bytes, {free:,} are free")
        licence = OFFICIAL_LICENCE if self.name in PAIRS else "Its licence stands on its page."
        notify(f"Downloading {self.name}, {num_bytes / 1e9:.2f} GB. {licence}")

    def _snapshot(self, commit: str) -> Path:
        return repository_folder(self.cache, self.name) / "snapshots" / commit

    def _unpinned_snapshot(self, revision: str | None) -> Path:
        """Return, when offline, the snapshot that another tool has left in the hub's cache."""
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
        return f"{self.name} {kind}"

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

    def _lacks_controlnets(self, pin: Pin) -> bool:
        """Tell whether ControlNets are wanted and none has been fetched so far."""
        return self.controlnets and not any(map(CONTROLNETS.fullmatch, pin.files))
