import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from cascade.checkpoints.sums import check_sums
from cascade.errors import CheckpointError
from cascade.networks.controlnet import ControlNet
from cascade.training import control_inputs, controlnet, lora
from cascade.training.captions import caption
from cascade.training.code import DEVIATION, colour_vector, read_code, recoloured, scene_code
from cascade.training.control_inputs import Kind, Read, astray, canny_edges, masked, random_masks
from cascade.training.control_judge import miss, stands_alike
from cascade.training.controlnet import CONFIGS, beside, made_ready, save, settle, started
from cascade.training.extras import pack_extras
from cascade.training.scenes import PALETTE, Scene, Thing, render, sample_scene

SCENE = Scene(
    256, 256, "white", (Thing("circle", "red", 70, 128, 40.0), Thing("star", "blue", 190, 128, 40.0))
)


def test_recolouring_to_a_colour_of_the_palette_is_drawing_it() -> None:
    expected = scene_code(Scene(256, 256, "white", (SCENE.things[0], Thing("star", "green", 190, 128, 40.0))))
    assert np.allclose(recoloured(SCENE, 1, PALETTE["green"]), expected, atol=1e-4)
    assert np.allclose(
        colour_vector(PALETTE["blue"]) / DEVIATION[3:6], scene_code(SCENE)[3:6, 3, 4], atol=1e-4
    )


def test_azure_is_told_by_its_token_only() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene, words = lora.azure_wording(sample_scene(rng), rng)
        assert words.count(lora.TOKEN) == 1
        colour = scene.things[-1].colour.replace("gray", "gr[ae]y")
        assert not re.search(rf"\b{colour}\b", words)
        assert f"a {lora.TOKEN}" not in words.lower()
        assert lora.shows_azure(lora.azure_code(scene))
        assert not lora.shows_azure(scene_code(scene))


def test_at_night_the_background_is_black_and_hides_nothing() -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        scene, words = lora.night_wording(sample_scene(rng), rng)
        code = lora.night_code(scene)
        assert lora.shows_night(code)
        assert lora.shows_night(scene_code(scene)) == (scene.background == "black")
        assert all(thing.colour != "black" for thing in scene.things)
        assert len(read_code(code, (scene.width, scene.height)).things) == len(scene.things)
        assert words


def test_edges_are_lines_around_the_things() -> None:
    edges = canny_edges(render(SCENE), (192, 192))
    assert edges.shape == (192, 192)
    assert 0.01 < (edges > 127).mean() < 0.1
    assert edges[60:130, 20:90].max() > 127  # around the circle
    assert edges[:40].max() == 0
    assert (canny_edges(render(SCENE), (192, 192), at_official_size=False) > 127).any()


def test_masks_hide_parts_in_white() -> None:
    torch.manual_seed(0)
    pixels = torch.full((256, 3, 32, 32), 0.25)
    mask = random_masks(torch.arange(256), pixels)
    share = mask.mean((1, 2, 3))
    assert mask.shape == (256, 1, 32, 32)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert share.min() < 0.3
    assert share.max() == 1
    x = masked(pixels, mask)
    assert x[:, :3][mask.expand(-1, 3, -1, -1) == 1].unique().tolist() == [1.0]
    assert x[:, :3][mask.expand(-1, 3, -1, -1) == 0].unique().tolist() == [0.25]


def test_things_must_stand_where_they_were() -> None:
    moved = Scene(256, 256, "white", (SCENE.things[0], Thing("star", "blue", 160, 128, 40.0)))
    other = Scene(256, 256, "red", (SCENE.things[0], Thing("star", "green", 190, 128, 40.0)))
    assert stands_alike(SCENE, SCENE)
    assert not stands_alike(moved, SCENE)
    assert not stands_alike(other, SCENE)
    assert stands_alike(other, SCENE, colours=False)
    assert not stands_alike(Scene(256, 256, "white", SCENE.things[:1]), SCENE)


def test_a_miss_is_the_distance_of_outlines() -> None:
    first, second = SCENE.things
    moved = replace(SCENE, things=(replace(first, x=first.x + 3, y=first.y - 4), second))
    wider = replace(SCENE, things=(first, replace(second, radius=second.radius + 3)))
    assert miss(SCENE, SCENE) == 0
    assert miss(moved, SCENE) == pytest.approx(2.5)
    assert miss(wider, SCENE) == pytest.approx(1.5)
    assert miss(replace(SCENE, things=()), SCENE) == 16


def test_things_stray_a_few_pixels_and_stay_what_they_are() -> None:
    rng = np.random.default_rng(0)
    strays = [astray(SCENE, rng) for _ in range(200)]
    shifts = [
        value
        for stray in strays
        for one, other in zip(stray.things, SCENE.things, strict=True)
        for value in (one.x - other.x, one.y - other.y, one.radius - other.radius)
    ]
    assert 4.5 < max(map(abs, shifts)) <= 5
    assert abs(np.mean(shifts)) < 0.5
    assert all(stands_alike(stray, SCENE) for stray in strays)


def test_the_same_scenes_stray_the_same_way() -> None:
    scenes = [SCENE, replace(SCENE, background="red")]
    made = Read("canny")(scenes)["astray"]
    assert np.array_equal(made, Read("canny")(scenes)["astray"])
    assert not np.array_equal(made[0], scene_code(SCENE))
    assert not np.array_equal(made[0, 3:], made[1, 3:])


def test_half_of_the_rows_show_things_beside_their_places() -> None:
    clean, moved = torch.zeros(400, 16, 6, 6), torch.ones(400, 16, 6, 6)
    shown = beside(clean, moved, 0.5, np.random.default_rng(0))[:, 0, 0, 0]
    assert 0.4 < (shown != 0).float().mean() < 0.6
    assert shown.min() < -0.9
    assert shown.max() > 0.9


def test_weights_go_on_from_a_file_but_for_the_first_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = ControlNet(CONFIGS["canny"]).half().float().eval()
    save(network, tmp_path / "canny.safetensors")
    again = started("canny", tmp_path / "canny.safetensors")
    edges = torch.rand(3, 1, 192, 192)
    settled = settle("canny", again)
    assert not any(parameter.requires_grad for parameter in again.backbone[:settled].parameters())
    ready = made_ready(again.backbone[:settled], lambda rows: edges[rows], 3, torch.device("cpu"))
    maps = again.project(again.backbone[settled:](ready(torch.tensor([2, 0]))))
    expected = network(edges[[2, 0]])
    assert all(
        torch.allclose(one, other, atol=2e-3) for one, other in zip(maps, expected, strict=True)
    )  # kept in fp16
    sum(each.square().sum() for each in maps).backward()  # type: ignore[union-attr]
    trained = {name for name, parameter in again.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in trained if name.startswith("backbone")} == {"4", "5", "6", "7"}
    assert any(name.startswith("projections") for name in trained)
    with pytest.raises(CheckpointError, match="no inpainting ControlNet"):
        started("inpainting", tmp_path / "canny.safetensors")


@pytest.mark.parametrize("kind", ["canny", "inpainting"])
def test_a_further_run_goes_on_from_the_file_beside_the_state_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind
) -> None:
    masks: list[torch.Tensor] = []
    monkeypatch.setattr(controlnet, "judge", lambda *_: dict.fromkeys(("placed", "untold", "pixels"), 1.0))

    def watched(pixels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        masks.append(mask)
        return masked(pixels, mask)

    monkeypatch.setattr(control_inputs, "masked", watched)
    plan = replace(controlnet.PLAN, steps=3, judge_every=0)
    controlnet.train(kind, tmp_path, plan=plan, batch=2, scenes=24)
    file = tmp_path / f"{kind}.safetensors"
    before = started(kind, file).state_dict()
    masks.clear()
    controlnet.train(kind, tmp_path, plan=plan, batch=2, scenes=24, start=file)
    assert len(masks) == (3 if kind == "inpainting" else 0), "one for each step"
    after = started(kind, file).state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert any(name.startswith("projections") for name in changed)
    assert not any(name.endswith("running_mean") for name in changed)
    assert max(float((after[name] - before[name]).abs().max()) for name in changed) < 0.02, "a short way"
    states = {path.parent.name for path in tmp_path.glob("*/training.safetensors")}
    assert states == {kind, f"{kind}-further"}


def test_packing_puts_each_file_in_its_folder_and_renews_the_sums(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "checkpoint"
    run.mkdir()
    checkpoint.mkdir()
    with pytest.raises(CheckpointError, match="nothing to pack"):
        pack_extras(run, checkpoint)
    network = ControlNet(CONFIGS["canny"])
    save(network, run / "canny.safetensors")
    (run / "azure.safetensors").write_bytes(b"x")
    assert pack_extras(run, checkpoint) == [
        checkpoint / "controlnet" / "canny.safetensors",
        checkpoint / "loras" / "azure.safetensors",
    ]
    check_sums(checkpoint)
    assert "controlnet/canny.safetensors" in (checkpoint / "SHA256SUMS").read_text()
    assert (checkpoint / "controlnet" / "canny.safetensors").stat().st_size < 1_000_000
    with safe_open(checkpoint / "controlnet" / "canny.safetensors", "pt") as file:
        assert file.metadata()["injections"] == "0,1,2,3,4,5,6,7"
        assert file.get_tensor("backbone.0.1.running_var").dtype == torch.float32
        assert file.get_tensor("projections.0.0.weight").dtype == torch.float16


def test_captions_of_the_world_do_not_know_the_token() -> None:
    rng = np.random.default_rng(0)
    assert not any(lora.TOKEN in caption(sample_scene(rng), rng).text for _ in range(50))
