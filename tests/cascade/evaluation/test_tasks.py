"""Scores of tasks, with an easel that draws as it is told: what is right, and what is not."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import pytest
from PIL import Image

from cascade.errors import InvalidSetting
from cascade.evaluation import picture_tasks, trained_tasks
from cascade.evaluation.figures import Easel, Figure, share
from cascade.evaluation.picture_tasks import box_mask, has_both, same_things, stand_alike, stands_there
from cascade.evaluation.tasks import TASKS, choose_tasks, evaluate_tasks
from cascade.evaluation.verifier import read_picture
from cascade.models import Models
from cascade.networks.controlnet import ControlNet
from cascade.networks.effnet import EffNetEncoder
from cascade.sizes import NativeSizes
from cascade.tasks.settings import ImageSettings
from cascade.training.encoder import TINY_EFFNET
from cascade.training.scenes import Picture, Scene, Thing, render
from tests.cascade.small_models import small_cascade

SCENE = Scene(
    256,
    256,
    "white",
    (Thing("star", "red", 59.0, 128.0, 40.0), Thing("ring", "blue", 197.0, 128.0, 40.0)),
)
Draw = Callable[[ImageSettings], Image.Image]


@dataclass(slots=True)
class Copyist(Easel):
    """Draws each request by a function, without models."""

    drawing: Draw = field(kw_only=True)

    def draw(self, name: str, requests: Sequence[ImageSettings]) -> list[Picture]:
        """The pictures, noted under their name."""
        self.report(len(requests))
        return self.show(name, [self.drawing(request) for request in requests])


def scores(task: Callable[[Easel], list[Figure]], drawing: Draw, count: int = 2) -> dict[str, Figure]:
    """Figures by the start of their names."""
    easel = Copyist(small_cascade(), count, drawing=drawing)
    return {figure.name.partition(" (of")[0]: figure for figure in task(easel)}


def the_source(request: ImageSettings) -> Image.Image:
    """The picture or the image prompt of a request, as it is."""
    image = request.image or request.image_prompts[0].image
    if request.width is None:
        return image
    canvas = Image.new("RGB", (request.width, request.height or 256), image.getpixel((0, 0)))
    canvas.paste(image, ((canvas.width - image.width) // 2, 0))
    return canvas


def a_little_darker(request: ImageSettings) -> Image.Image:
    """The source with another grain."""
    return the_source(request).point(lambda value: max(0, value - 6))


def test_figures_know_their_bounds_and_say_them() -> None:
    hits = share("right", [True, True, True, False], least=0.85)
    assert (str(hits), hits.target, hits.met) == ("75 %", "at least 85 %", False)
    assert share("right", [True] * 4, least=1).met
    assert not Figure("seam", 1.2, most=1).met
    assert Figure("seam", 0.9, most=1).target == "at most 1"
    assert not Figure("noise", float("nan"), least=0).met
    assert Figure("noise", 31.25, unit="dB").target == ""


def test_things_are_the_same_wherever_they_stand_and_alike_only_where_they_stood() -> None:
    swapped = replace(SCENE, things=tuple(replace(thing, x=256 - thing.x) for thing in SCENE.things))
    recoloured = replace(SCENE, things=(replace(SCENE.things[0], colour="pink"), SCENE.things[1]))
    assert same_things(SCENE, read_picture(render(SCENE)))
    assert stand_alike(SCENE, read_picture(render(SCENE)))
    assert same_things(SCENE, read_picture(render(swapped)))
    assert not stand_alike(SCENE, read_picture(render(swapped)))
    assert not same_things(SCENE, read_picture(render(recoloured)))


def test_two_scenes_mix_where_something_of_each_is_seen() -> None:
    other = Scene(256, 256, "black", (Thing("cross", "green", 128.0, 128.0, 40.0),))
    mixed = replace(SCENE, background="black")
    assert has_both((SCENE, other), mixed)
    assert not has_both((SCENE, other), SCENE)
    assert not has_both((SCENE, other), other)


def test_a_masked_thing_is_judged_by_what_stands_in_the_mask() -> None:
    mask = box_mask(SCENE, SCENE.things[1])
    wanted = replace(SCENE.things[1], shape="diamond", colour="green")
    changed = replace(SCENE, things=(SCENE.things[0], wanted))
    assert stands_there(wanted, mask, read_picture(render(changed)))
    assert not stands_there(wanted, mask, read_picture(render(SCENE)))
    assert not stands_there(wanted, mask, replace(SCENE, things=SCENE.things[:1]))
    blank = render(replace(SCENE, things=SCENE.things[:1]))
    assert (render(SCENE)[mask == 0] == blank[mask == 0]).all(), "the mask covers the thing wholly"


def test_strength_without_effect_does_not_grow_and_a_background_that_stays_is_not_another() -> None:
    figures = scores(picture_tasks.image_to_image, the_source)
    assert not figures["least growth of the distance from strength to strength"].met
    [right] = [figure for name, figure in figures.items() if name.endswith(": verified")]
    assert right.value == 0


def test_a_picture_that_is_copied_is_no_variation() -> None:
    figures = scores(picture_tasks.variation, the_source)
    assert figures["the same things"].met
    assert not figures["the pixels differ"].met
    assert not figures["two image prompts: traits of both"].met
    assert scores(picture_tasks.variation, a_little_darker)["the pixels differ"].met


def test_inpainting_that_paints_nothing_keeps_all_and_shows_nothing_new() -> None:
    figures = scores(picture_tasks.inpainting, the_source)
    assert figures["without a ControlNet: pixels that are kept are the same"].met
    assert figures["without a ControlNet: the masked thing is what the prompt says"].value == 0
    assert figures["outpainting: step across the seam, of that elsewhere"].met
    figures = scores(picture_tasks.inpainting, a_little_darker)
    assert figures["without a ControlNet: pixels that are kept are the same"].value == 0
    assert figures["outpainting: pixels that are kept are the same"].value == 0


def test_what_a_checkpoint_has_not_is_not_scored() -> None:
    easel = Copyist(small_cascade(), 2, drawing=the_source)
    for task in (trained_tasks.lcm, trained_tasks.lora, trained_tasks.canny, trained_tasks.super_resolution):
        assert task(easel) == []


def test_control_is_measured_by_edges_against_no_control_and_enlarging_against_bicubic() -> None:
    def obedient(request: ImageSettings) -> Image.Image:
        if request.control is None:
            return blank(request)
        assert isinstance(request.control.image, Image.Image)
        return request.control.image.resize((256, 256), Image.Resampling.BICUBIC)

    controlnets = {
        kind: cast(ControlNet, None) for kind in ("canny", "super_resolution")
    }  # asked for by name only
    models = replace(small_cascade(), controlnets=controlnets)
    easel = Copyist(models, 2, drawing=obedient)
    overlap, without, multiple, near = trained_tasks.canny(easel)
    assert (overlap.value, without.value, near.value) == (1, 0, 1)
    assert overlap.met
    assert multiple.met
    figures = trained_tasks.super_resolution(easel)
    assert len(figures) == 5 * 3
    for ours, bicubic, agreeing, better, _ in (figures[:5], figures[5:10], figures[10:]):
        assert ours.value == bicubic.value > 25
        assert agreeing.value > bicubic.value
        assert better.value == 0
    assert not trained_tasks.canny(Copyist(models, 2, drawing=blank))[0].met


def blank(_: ImageSettings) -> Image.Image:
    """A picture of nothing."""
    return Image.new("RGB", (256, 256), "white")


def test_tasks_are_chosen_by_name_and_a_wrong_one_is_refused() -> None:
    assert choose_tasks(["lcm", "reconstruct"]) == ["reconstruct", "lcm"]
    assert choose_tasks(["all"]) == list(TASKS)
    with pytest.raises(InvalidSetting, match="but is 'video'"):
        choose_tasks(["video"])


@pytest.mark.slow
def test_progress_counts_to_the_number_of_pictures(models: Models) -> None:
    seen: list[tuple[int, int]] = []
    scored = evaluate_tasks(models, ["reconstruct"], 1, progress=lambda *both: seen.append(both))
    assert len(scored["reconstruct"]) == 10
    assert seen[-1] == (5, 5)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.fixture(scope="module")
def models() -> Models:
    """Networks of random weights, which make pictures of no use."""
    return small_cascade(NativeSizes(((256, 256),), resamples=True), effnet=EffNetEncoder(TINY_EFFNET).eval())


@pytest.mark.parametrize("hidden", ["background", "thing"])
def test_a_prompt_for_night_names_a_background_that_is_not_black(hidden: str) -> None:
    black = replace(SCENE.things[0], colour="black")
    scene = (
        replace(SCENE, background="black")
        if hidden == "background"
        else replace(SCENE, things=(black, SCENE.things[1]))
    )
    rng = np.random.default_rng(0)
    plain = trained_tasks.without_black(scene)
    assert "black" not in {plain.background, *(thing.colour for thing in plain.things)}
    assert len({plain.background, *(thing.colour for thing in plain.things)}) == 3
    for _ in range(40):
        prompt = trained_tasks._lesson("night", scene, rng)
        assert "black" not in prompt
        assert plain.background in prompt.lower()
