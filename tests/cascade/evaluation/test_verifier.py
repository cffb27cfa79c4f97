"""The verifier on ground truth: it accepts what is drawn as told, and rejects each way of being wrong."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from cascade.evaluation.verifier import UNCLEAR, Verdict, judge, read_picture
from cascade.training.captions import caption, scene_facts
from cascade.training.scenes import (
    PALETTE,
    SHAPES,
    Picture,
    Scene,
    Thing,
    held_out_generator,
    render,
    sample_scene,
    sample_size,
)

RIGHT = Verdict(background=True, count=True, colours=True, shapes=True, place=True, size=True)
STAR = Thing("star", "red", 128, 128, 50)
ONE = Scene(256, 256, "white", (STAR,))
TWO = Scene(256, 256, "gray", (Thing("ring", "blue", 59, 128, 45), Thing("circle", "pink", 197, 128, 30)))


def verdict(asked: Scene, picture: Picture) -> Verdict:
    return judge(scene_facts(asked), read_picture(picture))


def changed(picture: Picture, noise: float = 0, blur: float = 0) -> Picture:
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(blur)), float)
    rng = np.random.default_rng(0)
    return (blurred + noise * rng.standard_normal(blurred.shape)).clip(0, 255).astype(np.uint8)


def test_all_drawn_scenes_are_right() -> None:
    rng = held_out_generator(21)
    for _ in range(600):
        scene = sample_scene(rng, sample_size(rng))
        seen = read_picture(render(scene))
        assert judge(scene_facts(scene), seen) == RIGHT, scene
        assert judge(caption(scene, rng).facts, seen).is_right, scene
        for found, drawn in zip(seen.in_order(), scene.in_order(), strict=True):
            assert (found.x, found.y, found.radius) == pytest.approx(
                (drawn.x, drawn.y, drawn.radius), abs=1.5
            )


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "star"])
def test_another_shape_is_wrong(shape: str) -> None:
    picture = render(Scene(256, 256, "white", (replace(STAR, shape=shape),)))
    assert verdict(ONE, picture) == replace(RIGHT, shapes=False)


@pytest.mark.parametrize("colour", [colour for colour in PALETTE if colour not in ("red", "white")])
def test_another_colour_is_wrong(colour: str) -> None:
    picture = render(Scene(256, 256, "white", (replace(STAR, colour=colour),)))
    seen = verdict(ONE, picture)
    assert not seen.colours
    assert seen.shapes
    assert not seen.is_right


@pytest.mark.parametrize("background", [colour for colour in PALETTE if colour not in ("red", "white")])
def test_another_background_is_wrong(background: str) -> None:
    picture = render(replace(ONE, background=background))
    assert verdict(ONE, picture) == replace(RIGHT, background=False)


@pytest.mark.parametrize(
    "things", [(), TWO.things[:1], TWO.things[1:], (*TWO.things, replace(STAR, y=215, radius=28))]
)
def test_another_number_is_wrong(things: tuple[Thing, ...]) -> None:
    seen = verdict(TWO, render(replace(TWO, things=things)))
    assert not seen.count
    assert not seen.is_right


def test_swapped_shapes_are_wrong() -> None:
    ring, circle = TWO.things
    picture = render(replace(TWO, things=(replace(ring, shape="circle"), replace(circle, shape="ring"))))
    seen = verdict(TWO, picture)
    assert seen.colours
    assert not seen.shapes
    assert not seen.is_right


def test_swapped_sides_are_a_wrong_place_of_a_right_picture() -> None:
    ring, circle = TWO.things
    picture = render(replace(TWO, things=(replace(ring, x=circle.x), replace(circle, x=ring.x))))
    seen = verdict(TWO, picture)
    assert seen.is_right
    assert seen.place is False


def test_another_size_is_reported() -> None:
    seen = verdict(ONE, render(replace(ONE, things=(replace(STAR, radius=75),))))
    assert seen.is_right
    assert seen.size is False


def test_what_is_not_stated_is_not_judged() -> None:
    seen = judge({"first_shape": "star", "first_colour": "red"}, read_picture(render(ONE)))
    assert seen == Verdict(background=None, count=True, colours=True, shapes=True, place=None, size=None)
    assert seen.is_right


@pytest.mark.parametrize("scene", [ONE, TWO])
@pytest.mark.parametrize("blur", [2.5, 4, 8, 16])
def test_blurred_pictures_are_wrong(scene: Scene, blur: float) -> None:
    assert not verdict(scene, changed(render(scene), blur=blur)).is_right


@pytest.mark.parametrize("scene", [ONE, TWO])
def test_slight_noise_and_softness_are_forgiven(scene: Scene) -> None:
    assert verdict(scene, changed(render(scene), noise=4, blur=0.8)) == RIGHT


def test_heavy_noise_is_wrong() -> None:
    assert not verdict(ONE, changed(render(ONE), noise=70)).is_right


def test_a_thing_of_two_colours_has_none() -> None:
    picture = render(Scene(256, 256, "white", (Thing("circle", "red", 128, 128, 60),))).copy()
    blue = render(Scene(256, 256, "white", (Thing("circle", "blue", 128, 128, 60),)))
    picture[:, 128:] = blue[:, 128:]
    assert read_picture(picture).things[0].colour == UNCLEAR


def test_a_shape_that_is_none_is_unclear() -> None:
    picture = render(Scene(256, 256, "white", ())).copy()
    picture[60:200, 60:80] = PALETTE["red"]
    picture[180:200, 60:200] = PALETTE["red"]
    assert read_picture(picture).things[0].shape == UNCLEAR


def test_specks_are_no_things() -> None:
    picture = render(ONE).copy()
    picture[10:30, 10:30] = PALETTE["blue"]
    assert verdict(ONE, picture) == RIGHT
    picture[10:40, 10:40] = PALETTE["blue"]
    assert not verdict(ONE, picture).count
