"""Counting, sheet and card, with an artist that draws what it is told, except where it is told not to."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from PIL import Image
from torch import nn

from cascade.checkpoints.load import load_cascade
from cascade.evaluation.card import write_card
from cascade.evaluation.evaluate import (
    BATCH_SIZE,
    NUM_TIMED,
    Report,
    Score,
    draw_and_judge,
    evaluate,
    free_captions,
    held_out_captions,
)
from cascade.evaluation.reconstruction import Reconstruction
from cascade.evaluation.sheet import save_sheet
from cascade.models import LoRAs
from cascade.networks.effnet import EffNetEncoder
from cascade.sizes import NativeSizes
from cascade.tasks.settings import ImageSettings
from cascade.training.captions import Caption
from cascade.training.encoder import TINY_EFFNET
from cascade.training.scenes import Scene, Thing, render
from tests.cascade.small_models import small_cascade

SETTINGS = ImageSettings(prompt="-", seed=5)


def drawn(one: Caption) -> Image.Image:
    """A picture of what a caption states, with any background and places where it states none."""
    facts = one.facts
    mentions = [mention for mention in ("first", "second") if f"{mention}_shape" in facts]
    used = {facts[f"{mention}_colour"] for mention in mentions}
    background = facts.get(
        "background", next(colour for colour in ("white", "red", "blue") if colour not in used)
    )
    free = {"left": (0.23, 0.5), "right": (0.77, 0.5), "top": (0.5, 0.23), "bottom": (0.5, 0.77)}
    default = ["centre"] if len(mentions) == 1 else ["left", "right"]
    things = []
    for mention, place in zip(mentions, default, strict=True):
        x, y = (free | {"centre": (0.5, 0.5)})[facts.get(f"{mention}_place", place)]
        radius = {"small": 32, "medium": 48, "large": 54}[facts.get(f"{mention}_size", "medium")]
        shape, colour = facts[f"{mention}_shape"], facts[f"{mention}_colour"]
        things.append(Thing(shape, colour, 256 * x, 256 * y, radius))
    return Image.fromarray(render(Scene(256, 256, background, tuple(things))))


class Artist:
    """Draws prompts that it knows; every `wrong_every`th picture is blank."""

    def __init__(self, captions: list[Caption], wrong_every: int = 10**9) -> None:
        self.known = {one.text: one for one in captions}
        self.wrong_every = wrong_every
        self.batches: list[list[ImageSettings]] = []
        self.count = 0

    def __call__(self, requests: list[ImageSettings]) -> list[Image.Image]:
        self.batches.append(requests)
        images = []
        for request in requests:
            self.count += 1
            blank = Image.new("RGB", (256, 256), "white")
            is_wrong = self.count % self.wrong_every == 0
            images.append(blank if is_wrong else drawn(self.known[request.prompt]))
        return images


@pytest.fixture(scope="module")
def report() -> Report:
    captions = held_out_captions(40, seed=3)
    judged, seconds = draw_and_judge(Artist(captions, 10), captions, SETTINGS, lambda _: None)
    return Report("fake", SETTINGS, judged, judged[:10], seconds, Reconstruction(100, 27.25, 97))


def test_prompts_alternate_between_one_and_two_things_and_depend_on_the_seed() -> None:
    captions = held_out_captions(20, seed=1)
    assert ["second_shape" in one.facts for one in captions] == [False, True] * 10
    assert captions == held_out_captions(20, seed=1)
    assert captions != held_out_captions(20, seed=2)


def test_free_prompts_state_what_can_be_drawn() -> None:
    captions = free_captions()
    assert len({one.text for one in captions}) == len(captions) == 370
    for one in captions:
        assert all(one.labels()[1:3]), one
        colours = [value for name, value in one.facts.items() if name.endswith("colour")]
        assert len({*colours, one.facts.get("background")}) == len(colours) + 1, one
    asked = [len(one.facts) for one in captions]
    assert min(asked) >= 2
    assert sum("background" not in one.facts for one in captions) > 20


def test_a_perfect_artist_is_right_in_everything() -> None:
    captions = held_out_captions(60, seed=4)
    judged, _ = draw_and_judge(Artist(captions), captions, SETTINGS, lambda _: None)
    report = Report("fake", SETTINGS, judged, (), 1.0, None)
    assert report.score("is_right") == Score(60, 60)
    assert report.score("is_right", 1) == Score(30, 30)
    for aspect in ("background", "place"):
        score = report.score(aspect)
        assert score.right == score.of < 60


def test_blank_pictures_are_counted_as_wrong(report: Report) -> None:
    assert report.score("is_right") == Score(36, 40)
    assert report.score("count", 2) == Score(16, 20)
    assert report.score("count", 1) == Score(20, 20)


def test_some_are_drawn_alone_and_the_rest_in_batches_with_seeds_of_their_own() -> None:
    captions = held_out_captions(NUM_TIMED + BATCH_SIZE + 2, seed=4)
    artist = Artist(captions)
    done: list[int] = []
    draw_and_judge(artist, captions, SETTINGS, done.append)
    assert [len(batch) for batch in artist.batches] == [1] * NUM_TIMED + [BATCH_SIZE, 2]
    seeds = [request.seed for batch in artist.batches for request in batch]
    assert seeds == list(range(5, 5 + len(captions)))
    assert done[-1] == len(captions)


def test_a_score_reads_as_a_share() -> None:
    assert str(Score(19, 20)) == "95.0 % (19/20)"
    assert str(Score(0, 0)) == "-"


def test_the_sheet_frames_right_pictures_green_and_wrong_ones_red(tmp_path: Path, report: Report) -> None:
    save_sheet(report.judged[:20], tmp_path / "sheet.png")
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"), int)
    assert sheet.shape == (2 * (256 + 12 + 92) + 12, 10 * 268 + 12, 3)
    frames = [sheet[12 - 2 + row * 360, 100 + column * 268] for row in range(2) for column in range(10)]
    is_green = [frame[1] > frame[0] for frame in frames]
    assert is_green == [one.verdict.is_right for one in report.judged[:20]]
    assert not all(is_green)


def test_the_card_states_figures_parameters_and_limits(tmp_path: Path, report: Report) -> None:
    models = small_cascade(text_encoder=SimpleNamespace(model=nn.Linear(2, 3)))
    write_card(report, models, tmp_path / "card.md", "All of it took an hour on two cores.")
    card = (tmp_path / "card.md").read_text(encoding="utf-8")
    assert card.startswith("# fake: a small Stable Cascade\n")
    assert "| all of these | 100.0 % (20/20) | 80.0 % (16/20) | 90.0 % (36/40) |" in card
    assert "| all of these | 100.0 % (5/5) | 80.0 % (4/5) | 90.0 % (9/10) |" in card
    assert "| text tower | 9 |" in card
    assert "vision tower | 0" not in card
    assert "27.2 dB, 97 of 100 verified" in card
    assert "All of it took an hour on two cores." in card
    for heading in ("Data", "Recipe", "Figures", "Limits", "Licence"):
        assert f"\n## {heading}\n" in card
    assert "`cascade train lcm`" not in card


def test_the_card_tells_how_the_lora_that_lies_beside_was_trained(tmp_path: Path, report: Report) -> None:
    loras = cast(LoRAs, SimpleNamespace(names=lambda: ["lcm", "azure"]))
    models = replace(small_cascade(text_encoder=SimpleNamespace(model=nn.Linear(2, 3))), loras=loras)
    write_card(report, models, tmp_path / "card.md")
    assert "is repeated by `cascade train lcm`" in (tmp_path / "card.md").read_text(encoding="utf-8")


def test_a_random_checkpoint_is_evaluated_and_judged_wrong() -> None:
    models = small_cascade(
        NativeSizes(((256, 256),), resamples=True), effnet=EffNetEncoder(TINY_EFFNET).eval()
    )
    done: list[tuple[int, int]] = []
    report = evaluate(
        models,
        2,
        seed=9,
        steps=1,
        decoder_steps=1,
        num_free=1,
        num_reconstructions=2,
        progress=lambda made, total: done.append((made, total)),
    )
    assert report.score("is_right") == Score(0, 2)
    assert [one.image.size for one in report.judged] == [(256, 256)] * 2
    assert [one.caption for one in report.free] == free_captions()[:1]
    assert report.seconds_per_picture > 0
    assert report.reconstruction is not None
    assert (report.reconstruction.count, report.reconstruction.verified) == (2, 0)
    assert 0 < report.reconstruction.decibels < 20
    assert done == [(1, 5), (2, 5), (3, 5), (5, 5)]


def test_the_embedded_checkpoint_understands_free_wordings() -> None:
    report = evaluate(load_cascade("tiny", device="cpu"), 12, num_free=24, num_reconstructions=0)
    assert report.score("is_right").right >= 11
    assert report.score("is_right", free=True).right >= 19
