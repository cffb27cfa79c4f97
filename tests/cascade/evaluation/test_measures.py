"""Measures on pictures of which the answer is known."""

from dataclasses import replace

import numpy as np
import pytest

from cascade.evaluation.measures import (
    decibels,
    distance,
    edges_of,
    intersection_over_union,
    mean_squared_error,
    seam_ratio,
    shows_azure,
    shows_night,
)
from cascade.training.lora import AZURE
from cascade.training.scenes import COLOURS, PALETTE, Picture, Scene, Thing, render

SCENE = Scene(256, 256, "white", (Thing("star", "red", 128.0, 128.0, 60.0),))


def in_azure(scene: Scene) -> Picture:
    """The scene with its first thing azure: its tint is what azure differs from its palette colour."""
    first = scene.things[0]
    red, green, blue = (float(a - b) for a, b in zip(AZURE, PALETTE[first.colour], strict=True))
    return render(replace(scene, things=(replace(first, tint=(red, green, blue)), *scene.things[1:])))


def test_distances_are_those_of_a_picture_and_the_same_one_made_lighter() -> None:
    picture = np.full((8, 8, 3), 100, np.uint8)
    lighter = picture + np.uint8(3)
    assert mean_squared_error(picture, lighter) == 9
    assert distance(lighter, picture) == 3
    assert decibels([9.0]) == pytest.approx(20 * np.log10(255 / 3))
    assert decibels([0.0, 0.0]) == float("inf")


def test_edges_overlap_wholly_with_themselves_in_any_colour_and_hardly_with_those_of_another_scene() -> None:
    recoloured = replace(SCENE, background="black", things=(replace(SCENE.things[0], colour="yellow"),))
    shifted = replace(SCENE, things=(replace(SCENE.things[0], x=129.0),))
    elsewhere = replace(SCENE, things=(replace(SCENE.things[0], x=60.0),))
    edges = edges_of(render(SCENE))
    assert intersection_over_union(edges, edges) == 1
    assert intersection_over_union(edges, edges_of(render(recoloured))) > 0.9
    assert intersection_over_union(edges, edges_of(render(shifted))) > 0.6
    assert intersection_over_union(edges, edges_of(render(elsewhere))) < 0.2
    assert intersection_over_union(edges, np.zeros_like(edges)) == 0


def test_a_seam_is_a_step_that_is_larger_than_the_others() -> None:
    picture = render(SCENE)
    joined = picture.copy()
    joined[:, 40:] = joined[:, 40:].clip(0, 245) + np.uint8(10)
    assert seam_ratio(picture, [40, 230]) < 1
    assert seam_ratio(joined, [40]) > 1
    assert seam_ratio(joined, [41]) < 1
    flat = np.full((8, 16, 3), 7, np.uint8)
    assert seam_ratio(flat, [4]) == 1
    flat[:, 4:] = 9
    assert seam_ratio(flat, [4]) == float("inf")


@pytest.mark.parametrize("colour", COLOURS)
def test_azure_is_seen_where_it_is_and_not_in_any_colour_of_the_palette(colour: str) -> None:
    background = "white" if colour != "white" else "blue"
    scene = replace(SCENE, background=background, things=(replace(SCENE.things[0], colour=colour),))
    assert not shows_azure(render(scene))
    assert shows_azure(in_azure(scene))


def test_rims_that_mix_colours_to_azure_are_not_azure() -> None:
    picture = np.full((256, 256, 3), PALETTE["white"], np.uint8)
    picture[60:200, 60:200] = AZURE
    picture[64:196, 64:196] = PALETTE["blue"]
    assert not shows_azure(picture)


def test_night_is_a_black_background_not_a_black_thing() -> None:
    assert shows_night(render(replace(SCENE, background="black")))
    black = replace(SCENE, things=(replace(SCENE.things[0], colour="black"),))
    assert not shows_night(render(black))
