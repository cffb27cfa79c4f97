import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cascade.checkpoints import transfer
from cascade.checkpoints.files import find_parts
from cascade.checkpoints.hub import LOCK_NAME, OFFICIAL_LICENCE, download
from cascade.checkpoints.keys import Component
from cascade.checkpoints.load import load_cascade
from cascade.checkpoints.selection import select_files
from cascade.checkpoints.transfer import RemoteFile
from cascade.errors import CheckpointError, InvalidSetting
from tests.cascade.checkpoints.local_hub import Hub, Repository, serve_hub
from tests.cascade.checkpoints.test_files import add_bf16, split

DECODER, PRIOR = "stabilityai/stable-cascade", "stabilityai/stable-cascade-prior"


@pytest.fixture(scope="module")
def mirror(saved_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both official repositories in small, with everything that is not needed, too."""
    root = tmp_path_factory.mktemp("mirror")
    split(saved_folder, root / "prior", root / "decoder")
    for name in ("prior", "decoder"):
        add_bf16(root / name)
        (root / name / "README.md").write_text("A card.")
    shutil.copytree(root / "decoder" / "decoder", root / "decoder" / "decoder_lite")
    shutil.copytree(root / "prior" / "prior", root / "prior" / "prior_lite")
    save_file({"blocks.0.weight": torch.zeros(1)}, root / "decoder" / "stage_c.safetensors")
    (root / "decoder" / "controlnet").mkdir()
    for channels, kind in ((1, "canny"), (4, "inpainting")):
        tensors = {"projections.0.0.weight": torch.zeros(channels)}
        save_file(tensors, root / "decoder" / "controlnet" / f"{kind}.safetensors")
    return root


@pytest.fixture
def hub(mirror: Path) -> Iterator[Hub]:
    decoder, prior = Repository(mirror / "decoder"), Repository(mirror / "prior", commit="b" * 40)
    with serve_hub(Hub({DECODER: decoder, PRIOR: prior})) as serving:
        yield serving


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path) -> "partial[tuple[Path, ...]]":
    return partial(download, cache=tmp_path / "cache", endpoint=hub.endpoint, notify=lambda _: None)


@pytest.mark.parametrize(("asked", "other"), [(DECODER, PRIOR), (PRIOR, DECODER)])
def test_either_repository_brings_the_other(asked: str, other: str, fetch: partial, hub: Hub) -> None:
    folders = fetch(asked)
    assert [folder.name for folder in folders] == [hub.repositories[name].commit for name in (asked, other)]
    parts = find_parts(*folders)
    assert {Component.STAGE_A, Component.STAGE_B, Component.STAGE_C, Component.IMAGE_ENCODER} <= parts.keys()


def test_only_what_is_needed_is_fetched(fetch: partial, hub: Hub) -> None:
    fetch(DECODER)
    weights = [name for name in hub.downloads if name.endswith(".safetensors")]
    assert len(weights) == len(set(weights)) == 6
    assert all(".bf16." in name for name in weights)
    assert not [name for name in hub.downloads if "lite" in name or "README" in name or "stage_c" in name]


def test_controlnets_come_when_they_are_asked_for_and_stay(fetch: partial, hub: Hub) -> None:
    (plain, _) = fetch(DECODER)
    hub.requests.clear()
    (folder, _) = fetch(DECODER, controlnets=True)
    assert folder == plain
    fetched = [name.partition("/")[2] for name in hub.downloads]
    assert [name for name in fetched if name.endswith(".safetensors")] == [
        "controlnet/canny.safetensors",
        "controlnet/inpainting.safetensors",
    ]
    assert Component.CONTROLNET in find_parts(*fetch(DECODER))
    hub.requests.clear()
    hub.repositories[DECODER].commit = "c" * 40
    assert fetch(DECODER, controlnets=True)[0] == folder, "the pin holds for them too"
    assert fetch(DECODER, controlnets=True, local_files_only=True)[0] == folder
    assert not [name for name in hub.downloads if "controlnet" in name]


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ("fp32", "decoder/diffusion_pytorch_model.safetensors"),
        ("lite", "decoder_lite/diffusion_pytorch_model.bf16.safetensors"),
        ("lite.fp32", "decoder_lite/diffusion_pytorch_model.safetensors"),
    ],
)
def test_variants_choose_the_files(variant: str, expected: str, fetch: partial, hub: Hub) -> None:
    (first, *_) = fetch(DECODER, variant=variant)
    assert (first / expected).is_file()
    assert len([name for name in hub.downloads if name.split("/")[1].startswith("decoder")]) == 2


def test_an_unknown_variant_is_refused_before_anything_is_asked(fetch: partial, hub: Hub) -> None:
    with pytest.raises(InvalidSetting, match=r"variant: 'int4' is unknown; allowed are bf16, fp32, lite"):
        fetch(DECODER, variant="int4")
    assert hub.requests == []


def test_the_commit_is_pinned_and_the_hub_not_asked_again(fetch: partial, hub: Hub, tmp_path: Path) -> None:
    folders = fetch(DECODER)
    lock = json.loads((tmp_path / "cache" / LOCK_NAME).read_text())
    assert {entry["commit"] for entry in lock.values()} == {"a" * 40, "b" * 40}
    hub.requests.clear()
    hub.repositories[DECODER].commit = "c" * 40
    assert fetch(DECODER) == folders
    assert fetch(DECODER, local_files_only=True) == folders
    assert fetch(DECODER, revision="a" * 40) == folders
    assert hub.requests == []
    assert fetch(DECODER, revision="main")[0].name == "c" * 40
    assert fetch(DECODER)[0].name == "c" * 40


def test_a_revision_can_be_a_tag_or_a_commit(fetch: partial, hub: Hub) -> None:
    hub.repositories[DECODER].branches = ("main", "v1")
    assert fetch(DECODER, revision="v1")[0].name == "a" * 40
    assert fetch(DECODER, revision="a" * 40)[0].name == "a" * 40
    with pytest.raises(CheckpointError, match="stable-cascade: there is no such revision"):
        fetch(DECODER, revision="v2")


def test_a_stopped_download_goes_on_where_it_stopped(
    fetch: partial, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:  # stopped with a whole file that is not yet checked
        patched.setattr(transfer, "sha256", stop)
        with pytest.raises(KeyboardInterrupt):
            fetch(DECODER)
    (partial_file,) = (tmp_path / "cache").rglob("*.partial")
    size = partial_file.stat().st_size
    os.truncate(partial_file, size - 1_000)
    hub.requests.clear()
    assert find_parts(*fetch(DECODER))
    assert hub.ranges == [f"bytes={size - 1_000}-"]


def test_a_line_that_goes_dead_is_tried_again(fetch: partial, hub: Hub) -> None:
    hub.cut_after = 100_000
    assert find_parts(*fetch(DECODER))
    assert hub.cut_after is None


def test_licence_and_size_are_told_once_before_the_download(fetch: partial, hub: Hub) -> None:
    told: list[tuple[str, int]] = []
    fetch(PRIOR, notify=lambda message: told.append((message, len(hub.downloads))))
    names = [message.split(",")[0] for message, _ in told]
    assert names == [f"Downloading {PRIOR}", f"Downloading {DECODER}"]
    assert all(OFFICIAL_LICENCE in message for message, _ in told)
    assert told[0][1] == 0
    told.clear()
    fetch(PRIOR, notify=lambda message: told.append((message, 0)))
    assert told == []


def test_damaged_bytes_are_named_with_both_sums_and_deleted(fetch: partial, hub: Hub, tmp_path: Path) -> None:
    hub.spoiled = b"\x00" * 16
    message = r"arrived damaged.*sha256 should be [0-9a-f]{64}, is [0-9a-f]{64}"
    with pytest.raises(CheckpointError, match=message):
        fetch(DECODER)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    assert not (tmp_path / "cache" / LOCK_NAME).exists()
    hub.spoiled = b""
    assert find_parts(*fetch(DECODER))


def test_offline_without_a_download_says_what_to_do(fetch: partial, hub: Hub) -> None:
    with pytest.raises(CheckpointError, match=f"run `cascade download {DECODER}` where there is a network"):
        fetch(DECODER, local_files_only=True)
    assert hub.requests == []


def test_a_token_opens_a_gated_repository(fetch: partial, hub: Hub) -> None:
    hub.repositories[DECODER].token = "secret"
    with pytest.raises(CheckpointError, match="accept the terms on its page, then give a token"):
        fetch(DECODER, token="wrong")
    fetch(DECODER, token="secret")
    assert hub.tokens == {"wrong", "secret"}


def test_an_unknown_repository_is_named(fetch: partial) -> None:
    with pytest.raises(CheckpointError, match="who/knows: there is no such repository"):
        fetch("who/knows")


def test_a_hub_that_is_not_there_is_named(fetch: partial) -> None:
    with pytest.raises(CheckpointError, match="stable-cascade: cannot be downloaded"):
        fetch(DECODER, endpoint="http://127.0.0.1:9")


def test_a_repository_of_something_else_is_refused(fetch: partial, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "unet.safetensors").write_bytes(b"x")
    hub.repositories["who/else"] = Repository(tmp_path / "foreign")
    with pytest.raises(CheckpointError, match=r"no Stable Cascade checkpoint; it has unet\.safetensors"):
        fetch("who/else")


def test_too_small_a_disk_is_noticed_before_the_download(
    fetch: partial, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")  # noqa: PYI024
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10_000, 0, 1_000))
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, 1,000 are free"):
        fetch(DECODER)
    assert hub.downloads == []


def test_original_files_are_taken_where_there_are_no_folders() -> None:
    names = ["stage_a.safetensors", "effnet_encoder.safetensors", "text_encoder/config.json"]
    ends = ["", "_bf16", "_lite", "_lite_bf16"]
    names += [f"stage_{stage}{end}.safetensors" for stage in "bc" for end in ends]
    names += ["text_encoder/model.safetensors", "tokenizer/vocab.json", "training/optimizer.safetensors"]
    offered = [RemoteFile(name, 1, None) for name in names]
    always = {"stage_a.safetensors", "effnet_encoder.safetensors", "tokenizer/vocab.json"}
    always |= {"text_encoder/config.json", "text_encoder/model.safetensors"}
    for words, end in [((), "_bf16"), (("lite",), "_lite_bf16"), (("lite", "fp32"), "_lite")]:
        chosen = {file.name for file in select_files(offered, frozenset(words))}
        assert chosen == always | {f"stage_b{end}.safetensors", f"stage_c{end}.safetensors"}


def test_a_malformed_lock_is_named(fetch: partial, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / LOCK_NAME).write_text("{")
    with pytest.raises(CheckpointError, match=f"{LOCK_NAME}: malformed; delete it"):
        fetch(DECODER)


@pytest.mark.slow
def test_the_environment_names_the_hub_and_turns_it_off(hub: Hub, tmp_path: Path) -> None:
    """In a process of its own: the hub library reads the environment when it is imported."""
    script = f"from cascade.checkpoints.load import load_cascade; print(load_cascade({DECODER!r}).name)"
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    for extra in ({}, {"HF_HUB_OFFLINE": "1"}):
        run = subprocess.run(
            [sys.executable, "-c", script],
            env=environment | extra,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.strip() == DECODER
        assert ("Non-Commercial" in run.stderr) == (not extra)
    assert not hub.tokens - {None}


def test_a_repository_loads_like_a_folder(
    fetch: partial, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(DECODER)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    models = load_cascade(DECODER)
    assert models.name == DECODER
    assert models.image_encoder is not None
    assert hub.requests == []
