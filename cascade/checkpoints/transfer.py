"""Download of one file from the Hugging Face hub into its cache, resumable and verified."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.checkpoints.sums import sha256
from cascade.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import HfApi


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file that the hub offers."""

    name: str
    num_bytes: int
    sha256: str | None


def fetch_file(api: "HfApi", repository: str, commit: str, file: RemoteFile, cache: Path) -> None:
    """Put a file into the snapshot of a commit, unless it is already there.

    Large files are first downloaded under a name that outlives the process, because the hub library loses
    partial files when it is stopped. The library then finds them complete and only links them.

    Raises:
        CheckpointError: the hub refuses or cannot be reached, or the bytes are not those that it promised.
    """
    with clear_errors(f"{repository}: {file.name}"):
        if file.sha256:
            _collect(api, repository, commit, file, cache)
        api.hf_hub_download(repository, file.name, revision=commit, cache_dir=str(cache))


def _collect(api: "HfApi", repository: str, commit: str, file: RemoteFile, cache: Path) -> None:
    """Download a file with a known checksum into the blobs, resuming what an earlier run has left."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import (  # type: ignore[attr-defined]
        WeakFileLock,
        build_hf_headers,
        http_get,
    )

    blob = repository_folder(cache, repository) / "blobs" / str(file.sha256)
    partial = blob.with_name(f"{blob.name}.partial")
    blob.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(f"{partial}.lock"):
        if blob.exists():
            return
        with partial.open("ab") as out:
            http_get(
                hf_hub_url(repository, file.name, revision=commit, endpoint=api.endpoint),
                out,
                resume_size=out.tell(),
                headers=build_hf_headers(token=api.token),
                expected_size=file.num_bytes,
                displayed_filename=file.name,
            )
        found = sha256(partial)
        if found != file.sha256:
            partial.unlink()
            raise CheckpointError(
                f"{repository}: {file.name} arrived damaged and was deleted: "
                f"sha256 should be {file.sha256}, is {found}"
            )
        partial.replace(blob)


def repository_folder(cache: Path, repository: str) -> Path:
    """Return the folder in which the hub library keeps a repository."""
    return cache / f"models--{repository.replace('/', '--')}"


@contextmanager
def clear_errors(what: str) -> Iterator[None]:
    """Convert errors of the hub library to a `CheckpointError` of one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except CheckpointError:
        raise
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
