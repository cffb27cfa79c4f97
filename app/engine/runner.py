"""The bridge to `cascade`, and the only module of the server that imports it: requests in, pixels out.

Everything heavy is imported inside the methods, which only an engine process calls: the loop's thread begins,
steps and checks pictures, the finisher's decodes and previews them.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from app.engine.caps import Caps
from app.engine.contract import Decoded, Work
from app.engine.profile import (
    STAGES,
    Profile,
    load_profile,
    measure,
    row_seconds,
    save_profile,
    shape_name,
)
from app.engine.protocol import Configure, Ready, Run
from app.engine.scheduler import BatchKey, Stage
from app.errors import GenerationFailed, InvalidRequest, ModelUnusable, OutOfMemory
from app.schemas import GenerationRequest, PictureRef

if TYPE_CHECKING:
    from PIL import Image

    from cascade import ImageSettings
    from cascade.models import Models
    from cascade.tasks.drawing import Drawing, Studio
    from cascade.tasks.rehearsal import Rehearsal

MAX_ROWS = 64
MAX_SAMPLES = 1000
# Kinds of ControlNets that read pictures, by their names in requests. "identity" reads an embedding.
CONTROLS = {"canny": "canny", "inpaint": "inpainting", "super_resolution": "super_resolution"}
FP32 = "fp32"  # in a batch key: repeated steps, which use fp32 weights


@dataclass(slots=True, eq=False)
class CascadeTrack:
    """The track of a drawing, as the engine sees it."""

    drawing: "Drawing"
    latents: bytes | None = None
    step: int = field(init=False)
    work: list[Work] = field(init=False)

    def __post_init__(self) -> None:
        self.follow()

    def follow(self) -> None:
        """Update the track to the state of the drawing."""
        drawing = self.drawing
        self.step, self.work = drawing.step, _work_ahead(drawing)
        if drawing.semantic is None:
            self.latents = None
        elif self.latents is None:
            from cascade.tasks.picture import to_bytes

            self.latents = to_bytes(drawing.semantic)


class CascadeRunner:
    """Makes pictures with a checkpoint."""

    _configure: Configure
    _models: "Models"
    _caps: Caps

    def __init__(self) -> None:
        self._studio: Studio | None = None
        self._pictures: WeakValueDictionary[str, Image.Image] = WeakValueDictionary()  # shared by drawings

    @property
    def counts(self) -> Mapping[str, int]:
        """Hits and misses of the cache of text encodings."""
        if self._studio is None:
            return {}
        return {"cache_hits": self._studio.texts.hits, "cache_misses": self._studio.texts.misses}

    def load(self, configure: Configure) -> Ready:
        """Read the checkpoint onto the device, measure how many rows are best, and warm up."""
        from cascade import CheckpointError, InvalidSetting
        from cascade.checkpoints.load import load_cascade
        from cascade.cpu import give_way, keep_freed_memory, suit_threads

        keep_freed_memory()
        try:
            models = load_cascade(configure.model, device=configure.device, dtype=configure.dtype)
            _add_extras(models, configure)
        except (CheckpointError, InvalidSetting) as error:
            raise ModelUnusable(str(error)) from error
        give_way(models.device)
        suit_threads(models)
        ready = self.take(models, configure)
        gc.collect()
        gc.freeze()  # else each scan of permanent objects would delay a tick by a tenth of a second
        return ready

    def take(self, models: "Models", configure: Configure) -> Ready:
        """Prepare to work with a checkpoint that is loaded already."""
        from cascade.acceleration import accelerate, keeping_graphs
        from cascade.tasks.drawing import Studio
        from cascade.tasks.rehearsal import Rehearsal

        self._models, self._configure = models, configure
        networks = {
            "prior": accelerate(models.stage_c, configure.compile, models.device),
            "decoder": accelerate(models.stage_b, configure.compile, models.device),
        }
        rehearsal = Rehearsal(models, networks, models.native.sizes[0])
        with keeping_graphs(networks.values()):
            profile = self._profile(rehearsal)
        self._caps = Caps(profile, max_rows=self._max_rows)
        self._studio = Studio(models, networks)
        width, height = models.native.sizes[0]
        return Ready(
            device=str(models.device),
            dtype=str(models.dtype).removeprefix("torch."),
            native_width=width,
            native_height=height,
            max_samples=min(rehearsal.num_pictures(), MAX_SAMPLES),
            step_seconds=row_seconds(profile),
            full_rows=self._caps.largest,
            reads_pictures=models.effnet is not None,
            reads_image_prompts=models.image_encoder is not None,
            controls=tuple(name for name, kind in CONTROLS.items() if kind in models.controlnets),
            lora_dirs=tuple(str(folder) for folder in _lora_folders(models)),
        )

    def expect(self, request: bytes) -> None:
        """Begin a picture that is never drawn, so that what its texts need is cached."""
        with _memory_errors(), _refusals():
            self._at_work.begin(self._drawing(request, seed=0, inputs={}))

    def start(self, run: Run) -> CascadeTrack:
        """Plan a picture without computing anything."""
        from cascade.tasks.picture import from_bytes

        drawing = self._drawing(run.request, run.seed, run.inputs)
        if run.latents is not None:
            with suppress(ValueError):  # made by another model: start with Stage C
                shape = drawing.picture.prior_shape
                drawing.resume(from_bytes(run.latents, shape, self._models.device))
        return CascadeTrack(drawing, run.latents)

    def begin(self, track: CascadeTrack) -> None:
        """Encode the text and the request's pictures, and draw the noise."""
        with _memory_errors(), _refusals():
            self._at_work.begin(track.drawing)

    def step(self, tracks: Sequence[CascadeTrack]) -> None:
        """Advance pictures of one key by one step, or none of them if anything fails."""
        with _memory_errors():
            self._at_work.step([track.drawing for track in tracks], self.cap(tracks[0].work[0].key))
        for track in tracks:
            track.follow()

    def check(self, track: CascadeTrack) -> None:
        """Check the latents of the stage that ended last."""
        with _flaws():
            track.drawing.check()

    def retry_in_fp32(self, track: CascadeTrack) -> bool:
        """Return to the start of the stage that ended last, with a copy of its network in fp32."""
        with _memory_errors():
            is_back = self._at_work.retry_in_fp32(track.drawing)
        track.follow()
        return is_back

    def decode(self, tracks: Sequence[CascadeTrack]) -> list[Callable[[], Decoded]]:
        """Run Stage A, in as many calls as memory requires; each callable finishes its picture."""
        with _memory_errors(), _flaws():
            images = self._at_work.decode([track.drawing for track in tracks])
        return [partial(_decoded, track, image) for track, image in zip(tracks, images, strict=True)]

    def preview(self, track: CascadeTrack) -> tuple[int, int, bytes] | None:
        """Decode Stage C's current estimate, if it is at work and the checkpoint has a previewer."""
        with _memory_errors():
            image = self._at_work.preview(track.drawing)
        return None if image is None else (*image.size, image.tobytes())

    def drop(self, track: CascadeTrack) -> None:
        """Free what is kept for a picture that nobody wants any more."""
        self._at_work.forget(track.drawing)

    def cap(self, key: BatchKey) -> int:
        """Return how many rows may be stepped together."""
        return self._caps.cap(key)

    def halve(self, key: BatchKey) -> None:
        """Halve the cap, because memory was not enough."""
        self._caps.halve(key)

    def device_memory_bytes(self) -> int:
        """Return the bytes in use on a GPU, 0 on a CPU, which uses the memory of the process."""
        if self._studio is None or self._models.device.type != "cuda":
            return 0
        from cascade.devices import used_bytes

        return used_bytes(self._models.device)

    def _drawing(self, request: bytes, seed: int, inputs: Mapping[str, bytes]) -> "Drawing":
        from cascade.tasks.drawing import Drawing
        from cascade.tasks.picture import plan_pictures

        asked = GenerationRequest.model_validate_json(request)
        with _refusals():
            [picture] = plan_pictures(self._models, _settings(asked, seed, self._opened(inputs)))
        return Drawing(picture, self._models)

    def _opened(self, inputs: Mapping[str, bytes]) -> Callable[[PictureRef], "Image.Image"]:
        """Return what decodes the files in `inputs`, which pictures in progress share."""
        from PIL import Image

        def opened(picture: PictureRef) -> Image.Image:
            image = self._pictures.get(picture.sha256)
            if image is None:
                image = Image.open(BytesIO(inputs[picture.sha256]), formats=("PNG",))  # we wrote it ourselves
                image.load()
                self._pictures[picture.sha256] = image
            return image

        return opened

    @property
    def _at_work(self) -> "Studio":
        assert self._studio is not None, "load() comes first"
        return self._studio

    @property
    def _max_rows(self) -> int:
        return 1 if self._configure.is_strict else self._configure.max_rows or MAX_ROWS

    def _profile(self, rehearsal: "Rehearsal") -> Profile:
        """Measure the steps of a picture of native size, or load an earlier measurement."""
        path = self._profile_path()
        known = load_profile(path) if path else None
        if known is not None:
            for stage in STAGES:
                measured = known[shape_name(stage, rehearsal.shape(stage))]
                for rows in [1] if self._configure.compile == "off" else measured:
                    rehearsal.make(stage, rows)  # loads libraries, records graphs
            return known

        def seconds(stage: Stage, rows: int) -> float:
            with _memory_errors():
                return rehearsal.seconds(stage, rows)

        profile = {
            shape_name(stage, rehearsal.shape(stage)): measured
            for stage, measured in measure(seconds, rehearsal.has_room_for_twice, self._max_rows).items()
        }
        if path:
            save_profile(path, profile)
        return profile

    def _profile_path(self) -> Path | None:
        """Return the file of the profile for this device and these settings; None if none is kept."""
        if self._configure.cache_dir is None:
            return None
        import torch

        from cascade.devices import device_name

        models = self._models
        facts = (
            device_name(models.device),
            torch.get_num_threads(),
            torch.__version__,
            models.dtype,
            self._configure.compile,
            self._max_rows,
            models.native.sizes,
            *(network.config for network in (models.stage_a, models.stage_b, models.stage_c)),
        )
        digest = sha256(repr(facts).encode()).hexdigest()[:16]
        return Path(self._configure.cache_dir) / f"profile-{digest}.json"


@contextmanager
def _memory_errors() -> Iterator[None]:
    """Turn torch's errors about a lack of memory into OutOfMemory."""
    import torch

    try:
        yield
    except (MemoryError, RuntimeError) as error:
        is_about_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not is_about_memory and "can't allocate memory" not in str(error):
            raise
        torch.cuda.empty_cache()
        message = "the device has not enough memory for this; ask for fewer pixels or pictures"
        raise OutOfMemory(message) from error


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn errors of `cascade` about a request, or about a LoRA that it names, into InvalidRequest."""
    from cascade import CheckpointError, InvalidSetting

    try:
        yield
    except InvalidSetting as error:
        raise InvalidRequest(f"{error.field} {error.message}", param=error.field) from error
    except CheckpointError as error:
        raise InvalidRequest(f"loras: {error}", param="loras") from error


@contextmanager
def _flaws() -> Iterator[None]:
    """Turn a result that cannot be a picture into GenerationFailed."""
    from cascade import FlawedResult

    try:
        yield
    except FlawedResult as error:
        raise GenerationFailed(f"{error}; another seed may do better") from error


def _add_extras(models: "Models", configure: Configure) -> None:
    """Add the LoRAs and ControlNets of the operator's folders to those of the checkpoint."""
    from cascade.checkpoints.load import load_controlnet
    from cascade.lora import LoRALibrary

    if configure.lora_dir is not None:
        models.loras = LoRALibrary([*_lora_folders(models), Path(configure.lora_dir)])
    if configure.controlnet_dir is not None:
        found = sorted(Path(configure.controlnet_dir).glob("*.safetensors"))
        networks = [load_controlnet(path, models) for path in found]
        models.controlnets = {**models.controlnets, **{network.kind: network for network in networks}}


def _lora_folders(models: "Models") -> tuple[Path, ...]:
    from cascade.lora import LoRALibrary

    return models.loras.folders if isinstance(models.loras, LoRALibrary) else ()


def _settings(
    request: GenerationRequest, seed: int, opened: Callable[[PictureRef], "Image.Image"]
) -> "ImageSettings":
    from cascade import ImageSettings
    from cascade.tasks.settings import Control, ImagePrompt, LoRAUse

    control = request.control
    return ImageSettings(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=request.width,
        height=request.height,
        seed=seed,
        steps=request.prior_num_inference_steps,
        guidance_scale=request.prior_guidance_scale,
        decoder_steps=request.decoder_num_inference_steps,
        decoder_guidance_scale=request.decoder_guidance_scale,
        preset=request.preset,
        sampler=request.sampler,
        image=None if request.image is None else opened(request.image),
        strength=request.strength,
        mask=None if request.mask is None else opened(request.mask),
        feather=request.feather,
        anchor=request.anchor,
        image_prompts=tuple(
            ImagePrompt(opened(prompt.image), prompt.weight) for prompt in request.image_prompts
        ),
        control=None
        if control is None
        else Control(
            kind=CONTROLS[control.type],
            image=opened(control.image),
            scale=control.scale,
            start=control.start,
            end=control.end,
            preprocess=control.preprocess,
            faithful=control.faithful,
        ),
        loras=tuple(LoRAUse(lora.name, lora.scale) for lora in request.loras),
        guidance_interval=request.guidance_interval,
        weighted_prompt=request.weighted_prompt,
        long_prompt=request.long_prompt,
    )


def _work_ahead(drawing: "Drawing") -> list[Work]:
    """Return the work left of a picture. With a guidance interval Stage C has up to three parts."""
    picture, plan, step = drawing.picture, drawing.picture.plan, drawing.step
    decode = Work(BatchKey("decode", plan.decoder_grid), 1, 1)
    if drawing.stage == "decode":
        return [decode]
    if drawing.stage == "decoder":
        return [_decoder_work(drawing, step), decode]
    key = BatchKey("prior", plan.prior_grid, FP32 if drawing.fp32_stage == "prior" else "")
    guided = picture.settings.guided_steps
    prior = []
    for end, rows in ((guided.start, 1), (guided.stop, 2), (picture.prior_steps, 1)):
        if end > step:
            prior.append(Work(key, rows, end - step))
            step = end
    return [*prior, _decoder_work(drawing, 0), decode]


def _decoder_work(drawing: "Drawing", step: int) -> Work:
    picture = drawing.picture
    key = BatchKey("decoder", picture.plan.decoder_grid, FP32 if drawing.fp32_stage == "decoder" else "")
    return Work(key, picture.decoder_rows, picture.decoder_steps - step)


def _decoded(track: CascadeTrack, finished: Callable[[], "Image.Image"]) -> Decoded:
    image, drawing = finished(), track.drawing
    assert drawing.text is not None, "begin() comes first"
    return Decoded(
        width=image.width,
        height=image.height,
        pixels=image.tobytes(),
        resampled_from=drawing.picture.plan.resampled_from,
        prompt_truncated=drawing.text.truncated[0],
        prompt_tokens=drawing.text.num_tokens[0],
    )
