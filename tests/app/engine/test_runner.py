"""The bridge with the real networks at tiny dimensions: the engine gets what the library makes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.contract import Decoded, Work
from app.engine.protocol import Configure, Ready, Run
from app.engine.runner import CascadeRunner, CascadeTrack
from app.engine.scheduler import BatchKey
from app.errors import GenerationFailed, InvalidRequest, OutOfMemory
from app.schemas import GenerationRequest
from cascade.sizes import NativeSizes
from cascade.tasks.rehearsal import Rehearsal
from cascade.tasks.settings import LoRAUse
from tests.app.pictures import file, sample
from tests.cascade.small_models import small_cascade

NATIVE = NativeSizes(((128, 128), (192, 128)), resamples=True)
PRIOR, DECODER = (3, 3), (32, 32)
MEASURED: dict[str, float] = {"prior": 0.001, "decoder": 0.002, "decode": 0.003}


@pytest.fixture(autouse=True)
def _steady_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row takes its time, and a step something more, whatever this machine is busy with."""
    monkeypatch.setattr(Rehearsal, "seconds", lambda _, stage, rows: MEASURED[stage] * (1 + rows))


def configure(**members: Any) -> Configure:
    plain: dict[str, Any] = {"model": "small", "device": "cpu", "dtype": "float32", "max_rows": 16}
    return Configure(**plain | members)


def loaded(**members: Any) -> tuple[CascadeRunner, Ready]:
    runner = CascadeRunner()
    return runner, runner.take(small_cascade(NATIVE, name="small"), configure(**members))


@pytest.fixture(scope="module")
def runner() -> CascadeRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rehearsal, "seconds", lambda _, stage, rows: MEASURED[stage] * (1 + rows))
        return loaded()[0]


def run(seed: int = 7, latents: bytes | None = None, **members: Any) -> Run:
    steps = {"prior_num_inference_steps": 2, "decoder_num_inference_steps": 1}
    size = {"width": 128, "height": 128}
    request = GenerationRequest.model_validate(
        {"prompt": "a red circle", "seeds": (seed,), **steps, **size, **members}
    )
    return Run(
        job="job_1",
        index=0,
        seed=seed,
        tenant="",
        priority=0,
        deadline=None,
        waited=0.0,
        request=request.model_dump_json().encode(),
        latents=latents,
    )


def begun(runner: CascadeRunner, *args: Any, **members: Any) -> CascadeTrack:
    track = runner.start(run(*args, **members))
    runner.begin(track)
    return track


def finished(runner: CascadeRunner, *tracks: CascadeTrack) -> Sequence[Decoded]:
    for stage in ("prior", "decoder"):
        while active := [track for track in tracks if track.work[0].key.stage == stage]:
            runner.step(active)
            for track in active:
                if track.work[0].key.stage != stage:
                    runner.check(track)
    return [finish() for finish in runner.decode(tracks)]


def test_what_is_told_when_the_model_is_ready() -> None:
    _, ready = loaded()
    assert (ready.device, ready.dtype) == ("cpu", "float32")
    assert (ready.native_width, ready.native_height) == (128, 128)
    assert ready.max_samples == 1000
    assert ready.full_rows == 8
    assert ready.step_seconds == {
        "prior:3x3": 0.001 * 9 / 8,
        "decoder:32x32": 0.002 * 9 / 8,
        "decode:32x32": 0.003 * 3 / 2,
    }


def test_memory_bounds_the_pictures_aboard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.tasks.rehearsal.limit_bytes", lambda _: 0)
    runner, ready = loaded()
    assert ready.max_samples == 1
    assert runner.cap(BatchKey("prior", PRIOR)) == 1


def test_a_track_lists_what_lies_ahead(runner: CascadeRunner) -> None:
    decode = Work(BatchKey("decode", DECODER), 1, 1)
    assert runner.start(run()).work == [
        Work(BatchKey("prior", PRIOR), 2, 2),
        Work(BatchKey("decoder", DECODER), 1, 1),
        decode,
    ]
    wide = runner.start(run(width=384, height=256, prior_guidance_scale=1.0, decoder_guidance_scale=1.1))
    assert wide.work[:2] == [
        Work(BatchKey("prior", (3, 5)), 1, 2),
        Work(BatchKey("decoder", (32, 48)), 2, 1),
    ]


def test_a_track_follows_its_steps(runner: CascadeRunner) -> None:
    track = begun(runner)
    seen = []
    for _ in range(3):
        runner.step([track])
        seen.append((track.work[0].key.stage, track.work[0].steps, track.step, track.latents is None))
    assert seen == [("prior", 1, 1, True), ("decoder", 1, 0, False), ("decode", 1, 0, False)]
    assert track.latents is not None
    assert len(track.latents) == 16 * 3 * 3 * 4


def test_the_picture_of_a_track_is_the_seeds(runner: CascadeRunner) -> None:
    made = finished(runner, *(begun(runner, seed) for seed in (7, 8, 7)))
    assert made[0] == made[2]
    assert made[0] != made[1]


def test_a_picture_is_what_the_library_makes(runner: CascadeRunner) -> None:
    settings: dict[str, Any] = {"guidance_scale": 2.0, "negative_prompt": "blue", "sampler": "ddim"}
    [expected] = small_cascade(NATIVE).text_to_image(
        "a red circle", seed=7, steps=2, decoder_steps=1, **settings
    )
    track = begun(runner, prior_guidance_scale=2.0, negative_prompt="blue", sampler="ddim")
    [made] = finished(runner, track)
    difference = np.frombuffer(made.pixels, np.uint8) - np.asarray(expected.image).ravel().astype(np.int16)
    assert np.abs(difference).max() <= 1
    assert np.asarray(expected.image).std() > 5, "a flat picture would prove nothing"
    assert (made.width, made.height, made.resampled_from) == (128, 128, None)
    assert (made.prompt_tokens, made.prompt_truncated) == (3, False)


def test_other_sizes_are_resampled_and_long_prompts_cut(runner: CascadeRunner) -> None:
    [made] = finished(runner, begun(runner, width=256, height=64, prompt="word " * 20))
    assert (made.width, made.height, made.resampled_from) == (256, 64, (192, 128))
    assert len(made.pixels) == 256 * 64 * 3
    assert made.prompt_truncated
    assert made.prompt_tokens == 20


def test_strict_pictures_are_the_same_in_any_company() -> None:
    runner, _ = loaded(is_strict=True)
    assert runner.cap(BatchKey("prior", PRIOR)) == 1
    alone = [finished(runner, begun(runner, seed))[0].pixels for seed in range(4)]
    together = finished(runner, *(begun(runner, seed) for seed in range(4)))
    assert [made.pixels for made in together] == alone


def test_a_picture_goes_on_from_kept_latents(runner: CascadeRunner) -> None:
    whole = begun(runner)
    [expected] = finished(runner, whole)
    again = begun(runner, 7, whole.latents)
    assert again.work[0].key.stage == "decoder"
    assert again.latents == whole.latents
    assert finished(runner, again)[0].pixels == expected.pixels


def test_latents_kept_of_another_model_are_not_used(runner: CascadeRunner) -> None:
    track = begun(runner, 7, bytes(8))
    assert track.work[0].key.stage == "prior"
    assert track.latents is None


def test_the_settings_of_a_request_survive_the_translation(runner: CascadeRunner) -> None:
    members: dict[str, Any] = {
        "negative_prompt": "blue", "width": 256, "height": 192, "prior_num_inference_steps": 3,
        "prior_guidance_scale": 2.5, "decoder_num_inference_steps": 4, "decoder_guidance_scale": 1.5,
        "preset": "diffusers", "sampler": "lcm",
    }  # fmt: skip
    settings = runner.start(run(9, **members)).drawing.picture.settings
    assert (settings.prompt, settings.negative_prompt, settings.seed) == ("a red circle", "blue", 9)
    assert (settings.width, settings.height, settings.num_images) == (256, 192, 1)
    assert (settings.steps, settings.guidance_scale) == (3, 2.5)
    assert (settings.decoder_steps, settings.decoder_guidance_scale) == (4, 1.5)
    assert (settings.preset, settings.sampler) == ("diffusers", "lcm")


def test_pictures_and_what_goes_with_them_survive_it_too(runner: CascadeRunner) -> None:
    source, mask = sample(size=(128, 128)), Image.new("L", (128, 128), 255)
    inputs = {f"{number:064x}": file(picture) for number, picture in enumerate((source, mask))}
    one, two = ({"sha256": name, "width": 128, "height": 128} for name in inputs)
    members: dict[str, Any] = {
        "image": one, "mask": two, "strength": 0.4, "feather": 3, "guidance_interval": (0.1, 0.6),
        "image_prompts": [{"image": one, "weight": 0.5}], "weighted_prompt": True, "long_prompt": True,
        "control": {"type": "inpaint", "image": one, "scale": 0.5, "start": 0.1, "end": 0.9},
        "loras": [{"name": "ink", "scale": -0.5}], "prior_num_inference_steps": 10,
    }  # fmt: skip
    given = msgspec.structs.replace(run(9, **members), inputs=inputs)
    track = runner.start(given)
    settings = track.drawing.picture.settings
    assert settings.image is not None
    assert settings.image.tobytes() == source.tobytes()
    assert settings.mask is not None
    assert settings.mask.getextrema() == (255, 255)
    assert (settings.strength, settings.feather, settings.guidance_interval) == (0.4, 3, (0.1, 0.6))
    assert [prompt.weight for prompt in settings.image_prompts] == [0.5]
    assert settings.control is not None
    assert (settings.control.kind, settings.control.scale) == ("inpainting", 0.5)
    assert (settings.control.start, settings.control.end, settings.control.preprocess) == (0.1, 0.9, True)
    assert settings.loras == (LoRAUse("ink", -0.5),)
    assert settings.weighted_prompt
    assert settings.long_prompt
    prior = [work for work in track.work if work.key.stage == "prior"]
    assert [(work.rows, work.steps) for work in prior] == [(1, 1), (2, 2), (1, 1)]
    with pytest.raises(InvalidRequest):  # this model has nothing of all that
        runner.begin(track)


def test_a_picture_that_is_kept_needs_no_step_of_stage_c(runner: CascadeRunner) -> None:
    picture = {"sha256": "0" * 64, "width": 128, "height": 128}
    given = msgspec.structs.replace(
        run(image=picture, strength=0), inputs={"0" * 64: file(sample(size=(128, 128)))}
    )
    assert [part.key.stage for part in runner.start(given).work] == ["decoder", "decode"]


def test_an_impossible_picture_is_the_callers_error(runner: CascadeRunner) -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt must not be blank") as caught:
        runner.start(run(prompt=" "))
    assert caught.value.param == "prompt"


def test_nan_fails_the_picture(runner: CascadeRunner) -> None:
    track = begun(runner)
    while track.work[0].key.stage == "prior":
        runner.step([track])
    runner.check(track)
    track.drawing.semantic = torch.full((16, *PRIOR), float("nan"))
    with pytest.raises(GenerationFailed, match="Stage C are not finite"):
        runner.check(track)
    assert not runner.retry_in_fp32(track), "it was made in fp32"
    finished(runner, track := begun(runner))
    track.drawing.latents = torch.zeros(4, *DECODER) / 0
    with pytest.raises(GenerationFailed, match="pixels are not finite"):
        runner.decode([track])


def test_in_less_precision_a_failed_stage_is_made_again() -> None:
    models = small_cascade(NATIVE, dtype=torch.bfloat16)
    for network in (models.stage_a, models.stage_b, models.stage_c):
        network.to(torch.bfloat16)
    runner = CascadeRunner()
    assert runner.take(models, configure()).dtype == "bfloat16"
    track = begun(runner)
    for _ in range(2):
        runner.step([track])
    assert track.work[0].key.stage == "decoder"
    assert runner.retry_in_fp32(track)
    assert track.work[0] == Work(BatchKey("prior", PRIOR, "fp32"), 2, 2)
    assert track.step == 0
    assert track.latents is None
    for _ in range(2):
        runner.step([track])
    assert runner.retry_in_fp32(track) is False
    assert track.work[0].key == BatchKey("decoder", DECODER)
    finished(runner, track)
    assert runner.retry_in_fp32(track), "Stage B has a second try of its own"
    finished(runner, track)
    assert runner.retry_in_fp32(track) is False


def test_guidance_for_a_part_of_the_run_is_work_in_parts(runner: CascadeRunner) -> None:
    members: dict[str, Any] = {"guidance_interval": (0.25, 0.75), "prior_num_inference_steps": 8}
    track = begun(runner, **members)
    rows = []
    while track.work[0].key.stage == "prior":
        rows.append(track.work[0].rows)
        runner.step([track])
    assert rows == [1, 1, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory: 0x7f"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_ends_is_told_as_such(
    runner: CascadeRunner, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    track = begun(runner)
    monkeypatch.setattr("cascade.tasks.drawing.Studio.step", fail)
    with pytest.raises(OutOfMemory, match="not enough memory") as caught:
        runner.step([track])
    assert "0x7f" not in str(caught.value)
    assert track.step == 0


def test_other_errors_stay_what_they_are(runner: CascadeRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr("cascade.tasks.drawing.Studio.step", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        runner.step([begun(runner)])


def test_caps_are_lowered_by_halves(runner: CascadeRunner) -> None:
    key = BatchKey("prior", PRIOR, "some adapter")
    assert runner.cap(key) == 8
    runner.halve(key)
    assert runner.cap(key) == 4


def test_previews_need_a_previewer(runner: CascadeRunner) -> None:
    track = begun(runner)
    runner.step([track])
    assert runner.preview(track) is None
    drawing = CascadeRunner()
    drawing.take(small_cascade(NATIVE, previewer=lambda clean: torch.rand(1, 3, 24, 40)), configure())
    drawing.step([track := begun(drawing)])
    preview = drawing.preview(track)
    assert preview is not None
    assert preview[:2] == (40, 24)
    assert len(preview[2]) == 40 * 24 * 3


def test_the_encoding_of_texts_is_counted() -> None:
    runner = CascadeRunner()
    assert (runner.counts, runner.device_memory_bytes()) == ({}, 0)
    runner.take(small_cascade(NATIVE), configure())
    begun(runner)
    begun(runner)
    assert runner.counts["cache_misses"] == 2
    assert runner.counts["cache_hits"] > 0
    assert runner.device_memory_bytes() == 0


def test_what_was_expected_has_its_texts_encoded() -> None:
    runner = CascadeRunner()
    runner.take(small_cascade(NATIVE), configure())
    runner.expect(run().request)
    assert runner.counts["cache_misses"] == 2
    begun(runner)
    assert runner.counts["cache_misses"] == 2


class Rehearsals:
    """Which steps were measured, and which only made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.measured: list[tuple[str, int]] = []
        self.made: list[tuple[str, int]] = []

        def seconds(_: Rehearsal, stage: str, rows: int) -> float:
            self.measured.append((stage, rows))
            return 0.001 * rows

        monkeypatch.setattr(Rehearsal, "seconds", seconds)
        monkeypatch.setattr(Rehearsal, "make", lambda _, stage, rows: self.made.append((stage, rows)))


ONCE = [("prior", 1), ("decoder", 1), ("decode", 1)]
TWICE = [("prior", 1), ("prior", 2), ("decoder", 1), ("decoder", 2), ("decode", 1), ("decode", 2)]


def test_what_was_measured_is_remembered_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rehearsals = Rehearsals(monkeypatch)
    _, first = loaded(cache_dir=str(tmp_path))
    measured = list(rehearsals.measured)  # what brought little is measured once more
    assert (list(dict.fromkeys(measured)), rehearsals.made) == (TWICE, [])
    _, second = loaded(cache_dir=str(tmp_path))
    assert (rehearsals.measured, rehearsals.made) == (measured, ONCE)
    assert first == second


@pytest.mark.parametrize("change", [{"is_strict": True}, {"max_rows": 4}, {"compile": "graphs"}])
def test_another_way_of_working_is_measured_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    rehearsals = Rehearsals(monkeypatch)
    loaded(cache_dir=str(tmp_path))
    loaded(cache_dir=str(tmp_path), **change)
    assert len(rehearsals.measured) > len(TWICE)
    assert rehearsals.made == []


def test_graphs_of_all_measured_rows_are_recorded_before_ready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsals = Rehearsals(monkeypatch)
    loaded(cache_dir=str(tmp_path), compile="graphs")
    loaded(cache_dir=str(tmp_path), compile="graphs")
    assert rehearsals.made == TWICE


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded()
    assert list(tmp_path.iterdir()) == []
