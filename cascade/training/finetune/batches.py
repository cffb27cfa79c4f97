"""Training batches of a stage, from indices of pictures: noised latents and their condition."""

import hashlib
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.errors import CheckpointError
from cascade.models import Models
from cascade.networks.effnet import STRIDE, EffNetEncoder, resize_for_encoder
from cascade.sampling.schedule import CosineSchedule
from cascade.training.finetune.buckets import Size
from cascade.training.finetune.dataset import Example
from cascade.training.finetune.objective import Batch, noised
from cascade.training.finetune.parallel import World
from cascade.training.finetune.pictures import LatentCache, Pictures, encoded
from cascade.training.finetune.settings import FinetuneSettings

BatchSource = Callable[[int, int, Sequence[int]], Batch]  # batch number, bucket, indices of its pictures

_SMALLEST = 0.5  # Stage B: the semantic encoder sees the picture at this share of its size or more


def make_source(
    settings: FinetuneSettings,
    world: World,
    models: Models,
    pictures: Pictures,
    sizes: Sequence[Size],
    say: Callable[[str], None],
) -> BatchSource:
    """Return the source of a stage's batches; the networks that it needs are moved to the device.

    Raises `CheckpointError` if the checkpoint has no semantic encoder.
    """
    if models.effnet is None:
        raise CheckpointError(
            f"{models.name}: has no effnet_encoder, which turns pictures into latents of Stage C; put "
            "effnet_encoder.safetensors of stabilityai/stable-cascade beside the weights"
        )
    kind = _PriorSource if settings.stage == "prior" else _DecoderSource
    return kind(settings, world, models, models.effnet, pictures, sizes, say)


class _Source:
    """The base of both stages' sources of batches."""

    def __init__(
        self,
        settings: FinetuneSettings,
        world: World,
        models: Models,
        effnet: EffNetEncoder,
        pictures: Pictures,
        sizes: Sequence[Size],
        say: Callable[[str], None],
    ) -> None:
        self.settings = settings
        self.world = world
        self.models = models
        self.effnet = effnet.to(world.device).eval()
        self.pictures = pictures
        self.sizes = sizes
        self.say = say
        self.too_long: set[str] = set()
        self.text = models.text_encoder if settings.stage == "prior" else models.decoder_text_encoder
        if isinstance(model := getattr(self.text, "model", None), nn.Module):
            model.to(world.device).eval()

    def _rows(self, number: int, indices: Sequence[int]) -> tuple[list[int], list[np.random.Generator]]:
        """Return this process's rows of a global batch, and a generator for each."""
        places = range(self.world.rank, len(indices), self.world.size)
        rngs = [np.random.default_rng((self.settings.seed, number, place)) for place in places]
        return [indices[place] for place in places], rngs

    def _texts(
        self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]
    ) -> tuple[Tensor, Tensor]:
        """Return hidden and pooled text embeddings; dropped captions are replaced by the empty one."""
        share = self.settings.caption_dropout
        words = ["" if rng.random() < share else e.caption for e, rng in zip(examples, rngs, strict=True)]
        embeddings = self.text.encode(words)
        for example, is_cut in zip(examples, embeddings.truncated, strict=True):
            if is_cut and example.name not in self.too_long:
                self.too_long.add(example.name)
                self.say(f"{example.name}: the caption is too long for the text tower; its end is not read")
        return embeddings.hidden.clone(), embeddings.pooled.clone()


class _PriorSource(_Source):
    """Batches of Stage C, which learns the semantic latents of a picture."""

    def __call__(self, number: int, bucket: int, indices: Sequence[int]) -> Batch:
        mine, rngs = self._rows(number, indices)
        size = self.sizes[bucket]
        examples, clean = encoded(
            self.pictures, mine, bucket, size, self._encode, cache=self._cache(), rngs=rngs
        )
        hidden, pooled = self._texts(examples, rngs)
        images = self._images(examples, rngs)
        return noised(
            clean.to(self.world.device),
            (hidden, pooled, images),
            CosineSchedule(self.models.prior_schedule).unshifted,
            rngs,
            pyramid=False,
        )

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.effnet(resize_for_encoder(pixels.to(self.world.device)))).float()

    def _cache(self) -> LatentCache | None:
        if not self.settings.cache:
            return None
        weights = cast(Tensor, self.effnet.mapper[0].weight).detach().float().cpu().contiguous()
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
        return LatentCache(self.settings.work / "latents", digest)

    def _images(self, examples: Sequence[Example], rngs: Sequence[np.random.Generator]) -> Tensor:
        """Return CLIP embeddings of the few pictures that are not dropped, and zeros for the others."""
        width = self.models.stage_c.config.clip_image_in_channels
        embeddings = torch.zeros(len(examples), 1, width, device=self.world.device)
        shown = [row for row, rng in enumerate(rngs) if rng.random() >= self.settings.image_dropout]
        if self.models.image_encoder is not None and shown:
            self.models.image_encoder.model.to(self.world.device)
            seen = self.models.image_encoder.encode([examples[row].open() for row in shown])
            embeddings[shown] = seen.clone().to(embeddings)
        return embeddings


class _DecoderSource(_Source):
    """Batches of Stage B, which learns Stage A's latents, given the semantic latents of the same picture."""

    def __call__(self, number: int, bucket: int, indices: Sequence[int]) -> Batch:
        mine, rngs = self._rows(number, indices)
        size = self.sizes[bucket]
        read = [self.pictures.pixels(i, bucket, size, rng) for i, rng in zip(mine, rngs, strict=True)]
        examples = [example for example, _ in read]
        pixels = torch.stack([values for _, values in read]).to(self.world.device)
        _, pooled = self._texts(examples, rngs)
        whole_batch = np.random.default_rng((self.settings.seed, number))  # one scale for all its rows
        semantic = self._semantic(pixels, whole_batch.uniform(_SMALLEST, 1.0))
        return noised(
            self._encode(pixels),
            (self._disturbed(semantic, rngs), pooled),
            CosineSchedule(self.models.decoder_schedule).unshifted,
            rngs,
            pyramid=True,
        )

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        stage_a = self.models.stage_a.to(self.world.device)
        own = stage_a.config.scale_factor / self.models.scale_factor("official")
        return stage_a.encode(pixels) * own

    @torch.no_grad()
    def _semantic(self, pixels: Tensor, scale: float) -> Tensor:
        """Encode pictures at `scale`, or at the encoder's own if the checkpoint has fixed sizes."""
        if self.models.native.resamples:
            return cast(Tensor, self.effnet(resize_for_encoder(pixels))).float()
        height, width = (max(STRIDE, int(side * scale) // STRIDE * STRIDE) for side in pixels.shape[-2:])
        small = F.interpolate(pixels, (height, width), mode="nearest")
        return cast(Tensor, self.effnet(small)).float()

    def _disturbed(self, semantic: Tensor, rngs: Sequence[np.random.Generator]) -> Tensor:
        rows = []
        for row, rng in zip(semantic, rngs, strict=True):
            kept = float(rng.random() >= self.settings.effnet_dropout)
            sigma = self.settings.effnet_noise * rng.random()
            noise = torch.from_numpy(rng.standard_normal(tuple(row.shape), dtype=np.float32))
            rows.append(kept * (row + sigma * noise.to(row)))
        return torch.stack(rows)
