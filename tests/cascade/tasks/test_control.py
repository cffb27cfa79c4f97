"""What each ControlNet reads of the picture that a request brings."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor

from cascade.config import ControlNetConfig, EffNetConfig, EffNetStage
from cascade.errors import CheckpointError, InvalidSetting
from cascade.models import Models
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.sizes import NativeSizes, SizePlan, plan_size
from cascade.tasks.control import find_edges, prepare_control, read_map
from cascade.tasks.settings import Control, FeatureMap
from tests.cascade.networks.reference import noise, randomized
from tests.cascade.small_models import small_cascade

STAGES = tuple(EffNetStage("fused", 1, 2, 8, 1) for _ in range(4))
CANNY = ControlNetConfig("effnet", 1, 12, (0, 2), (16, 16), stem_channels=4, stages=STAGES)
CONFIGS = {
    "canny": CANNY,
    "inpainting": replace(CANNY, in_channels=4),
    "super_resolution": ControlNetConfig("large", 16, 8, (1,), (16,), hidden_channels=(12, 8), num_blocks=1),
    "identity": ControlNetConfig("simple", 5, 8, (0, 1, 2, 3), (16,) * 4, hidden_channels=(8,)),
}
PLAN = plan_size(512, 384, NativeSizes())  # 12 x 9 cells, 384 x 288 pixels for the encoder


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def models() -> Models:
    return small_cascade(
        effnet=randomized(EffNetEncoder(EffNetConfig(8, STAGES, 16)), seed=1),
        controlnets={kind: randomized(ControlNet(config), seed=2) for kind, config in CONFIGS.items()},
    )


@pytest.fixture
def seen(models: Models, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Tensor]:
    """What the network of a control is given."""

    def read(control: Control, plan: SizePlan = PLAN) -> Tensor:
        given: list[Tensor] = []
        forward = ControlNet.forward

        def noted(network: ControlNet, x: Tensor, strength: float = 1.0) -> tuple[Tensor, ...]:
            given.append(x)
            return forward(network, x, strength)

        monkeypatch.setattr(ControlNet, "forward", noted)
        prepare_control(models, control, plan)
        [x] = given
        return x

    return read


def drawing(width: int = 512, height: int = 384) -> Image.Image:
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.rectangle((width // 4, height // 4, width // 2, height // 2), fill="black")
    pen.rectangle((0, height // 2 + 20, width // 3, height), fill=(215, 215, 215))  # too faint an edge
    pen.ellipse((width // 2, height // 2, width - 20, height - 20), fill="red")
    return image


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("size", [(512, 384), (1024, 1024), (72, 280)])
def test_maps_have_the_grid_of_the_picture_and_scale(
    models: Models, kind: str, size: tuple[int, int]
) -> None:
    picture: Image.Image | FeatureMap = drawing(*size)
    if kind == "inpainting":
        assert isinstance(picture, Image.Image)
        picture.putalpha(128)
    if kind == "identity":
        picture = FeatureMap(noise(1, 5, 7, 3))
    plan = plan_size(*size, NativeSizes())
    full = prepare_control(models, Control(kind, picture), plan)
    weak = prepare_control(models, Control(kind, picture, scale=0.5), plan)
    assert len(full) == len(CONFIGS[kind].injections)
    for one, other in zip(full, weak, strict=True):
        assert one.shape == (1, *plan.prior_grid, 16)
        assert one.std() > 1e-3
        assert torch.allclose(other, 0.5 * one, atol=1e-6)


def test_edges_are_the_official_filters(seen: Callable[..., Tensor]) -> None:
    picture = drawing()
    pixels = np.asarray(picture.resize((384, 288), Image.Resampling.BILINEAR))
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float()
    square = F.interpolate(planes, (224, 224), mode="bilinear", align_corners=False)
    found = cv2.Canny(square[0].permute(1, 2, 0).round().to(torch.uint8).numpy(), 100, 200)
    back = torch.from_numpy(found)[None, None].float() / 255
    expected = F.interpolate(back, (288, 384), mode="bilinear", align_corners=False)
    edges = seen(Control("canny", picture))
    assert edges.shape == (1, 1, 288, 384)
    assert (edges - expected).abs().mean() < 0.002  # 8-bit rounding of the filter's own resizing
    assert 0.01 < edges.mean() < 0.1
    assert edges[0, 0, 200:, :100].max() == 0, "the faint rectangle"
    assert edges.max() == 1
    assert edges[0, 0, 40:60, 40:60].max() == 0, "nothing stands there"
    assert edges[0, 0, 100:120, 90:102].max() > 0.7, "the left side of the rectangle"


def test_edges_of_a_small_checkpoint_are_found_in_the_picture_itself(
    models: Models, seen: Callable[..., Tensor]
) -> None:
    plan = plan_size(256, 256, NativeSizes(((256, 256),), resamples=True))
    picture = drawing(256, 256)
    edges = seen(Control("canny", picture), plan)
    expected = find_edges(np.asarray(picture), 192, 192)
    assert torch.equal(edges[0, 0], torch.from_numpy(expected) / 255)


def test_edges_already_found_are_taken_as_they_are(seen: Callable[..., Tensor]) -> None:
    lines = np.zeros((384, 512), np.uint8)
    lines[:, 256:] = 255
    edges = seen(Control("canny", Image.fromarray(lines), preprocess=False))
    assert edges.shape == (1, 1, 288, 384)
    assert edges[..., :190].max() == 0
    assert edges[..., 194:].min() == 1


def test_inpainting_reads_white_and_a_mask_where_it_paints(seen: Callable[..., Tensor]) -> None:
    picture = Image.new("RGB", (512, 384), (0, 128, 255))
    alpha = np.full((384, 512), 255, np.uint8)
    alpha[100:200, 300:] = 0
    alpha[4, 4] = 254  # hardly transparent is transparent, too
    picture.putalpha(Image.fromarray(alpha))
    read = seen(Control("inpainting", picture))
    assert read.shape == (1, 4, 288, 384)
    mask = read[0, 3]
    assert set(mask.unique().tolist()) == {0, 1}
    assert mask[75:150, 225:].min() == 1
    assert mask[3, 3] == 1
    assert mask[160:].max() == 0
    assert 0.107 < mask.mean() < 0.112
    assert (read[0, :3][:, mask > 0] == 1).all()
    kept = read[0, :3][:, mask == 0]
    assert torch.allclose(kept.mean(dim=1), torch.tensor([0, 128, 255]) / 255, atol=1e-4)


def test_inpainting_needs_transparency(models: Models) -> None:
    with pytest.raises(InvalidSetting, match="transparent where it is painted"):
        prepare_control(models, Control("inpainting", drawing()), PLAN)


@pytest.mark.parametrize("size", [(512, 384), (512, 512)], ids=["9 rows", "12 rows"])
def test_super_resolution_reads_each_cell_of_half_the_grid_twice(
    models: Models, seen: Callable[..., Tensor], size: tuple[int, int]
) -> None:
    plan = plan_size(*size, NativeSizes())
    rows, columns = plan.prior_grid
    picture = drawing(*size)
    latents = seen(Control("super_resolution", picture), plan)
    assert latents.shape == (1, 16, rows, columns)
    assert models.effnet is not None
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    half = (32 * -(-rows // 2), 32 * -(-columns // 2))
    small = F.interpolate(pixels, half, mode="bilinear", align_corners=False, antialias=True)
    expected = models.effnet(small).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(latents, expected[..., :rows, :columns], atol=1e-5)


def test_identity_reads_numbers(models: Models, seen: Callable[..., Tensor], tmp_path: Path) -> None:
    values = noise(1, 5, 7, 3)
    save_file({"map": values.half()}, tmp_path / "face.safetensors")
    assert torch.equal(seen(Control("identity", read_map(tmp_path / "face.safetensors")))[0], values.half())
    with pytest.raises(InvalidSetting, match="reads maps of 5 channels, but gets 4"):
        prepare_control(models, Control("identity", FeatureMap(noise(1, 4, 7, 3))), PLAN)
    with pytest.raises(InvalidSetting, match="not a picture"):
        prepare_control(models, Control("identity", drawing()), PLAN)
    with pytest.raises(InvalidSetting, match="canny reads a picture"):
        prepare_control(models, Control("canny", FeatureMap(values)), PLAN)


def test_maps_of_identity_are_checked(tmp_path: Path) -> None:
    for values in (torch.zeros(3, 4), torch.full((3, 2, 2), torch.nan), torch.zeros(3, 0, 2)):
        with pytest.raises(InvalidSetting, match="must be a map of finite numbers"):
            FeatureMap(values)
    file = tmp_path / "two.safetensors"
    save_file({"a": torch.zeros(2, 2, 2), "b": torch.zeros(2, 2, 2)}, file)
    with pytest.raises(InvalidSetting, match="must hold one tensor of floats"):
        read_map(file)
    file.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        read_map(file)


def test_what_is_not_installed_names_what_is(models: Models) -> None:
    fewer = replace(models, controlnets={kind: models.controlnets[kind] for kind in ("identity", "canny")})
    with pytest.raises(InvalidSetting) as raised:
        prepare_control(fewer, Control("inpainting", drawing()), PLAN)
    assert raised.value.field == "control"
    assert raised.value.message == (
        "the ControlNet inpainting is not installed; installed are: canny, identity"
    )
    with pytest.raises(InvalidSetting, match="installed are: none"):
        prepare_control(replace(models, controlnets={}), Control("canny", drawing()), PLAN)
    with pytest.raises(InvalidSetting, match="no encoder"):
        prepare_control(replace(models, effnet=None), Control("super_resolution", drawing()), PLAN)


def test_a_picture_of_another_shape_is_cut_centrally(seen: Callable[..., Tensor]) -> None:
    wide = Image.new("RGB", (1024, 384), "red")
    wide.paste(drawing(), (256, 0))
    assert torch.equal(seen(Control("canny", wide)), seen(Control("canny", drawing())))


def test_a_picture_is_turned_as_its_camera_says(seen: Callable[..., Tensor], tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    drawing().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "x.png", exif=exif)
    turned = Image.open(tmp_path / "x.png")
    assert torch.equal(seen(Control("canny", turned)), seen(Control("canny", drawing())))
