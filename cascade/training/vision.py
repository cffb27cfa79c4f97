"""Trains the tiny vision tower to embed a picture as the frozen text tower embeds its caption.

The target is the embedding of a caption that states everything: by distance, so that a network that reads one
can read the other (`image_prompts`), and by contrast. Linear heads, discarded afterwards, lead there step by
step: from the first layer they read which parts of each patch a thing covers, whatever the colours are; from
the second the semantic code at the patch; and from the embedding every fact of the scene. Without the first,
shapes stay at chance for very long.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from cascade.training.captions import ATTRIBUTES, Caption, full_caption, scene_facts
from cascade.training.code import CHANNELS, scene_code
from cascade.training.layouts import Layouts
from cascade.training.loop import Plan, fit
from cascade.training.scenes import Scene, held_out_generator, render, sample_scene, sample_size
from cascade.training.text import HIDDEN, MAX_TOKENS, accuracy, attribute_losses

SIDE = 64
PLAN = Plan(
    steps=8000,
    learning_rate=1e-3,
    matrix_rate=4e-3,
    warmup=100,
    ema_decay=0.998,
    final_fraction=0.02,
    seed=22,
    save_every=100,
    judge_every=500,
)
BATCH_SIZE = 64
_PATCHES = 8  # along each side
_PARTS = 4  # of a patch, along each side
_LAYOUTS = 6000
_PART_WEIGHT = 10.0
_CODE_WEIGHT = 10.0
_TEXT_WEIGHT = 5.0
_SHARPNESS = 20.0  # of the softmax over similarities


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train against `run`/text_encoder and save `run`/image_encoder and `run`/feature_extractor."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(run / "text_encoder").eval().requires_grad_(False)
    text.float()
    torch.manual_seed(plan.seed)
    training = VisionTraining(CLIPVisionModelWithProjection(vision_config()))
    layouts = Layouts.draw(np.random.default_rng(plan.seed), _LAYOUTS, SIDE)
    spread = embed(text, tokenizer, [full_caption(scene) for scene in layouts.scenes[:2000]]).std(0)

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        del step
        scenes, pixels, covered = layouts.paint(rng, BATCH_SIZE)
        batch = make_batch(scenes, normalised(pixels), covered, tokenizer, text)
        with torch.autocast("cpu", torch.bfloat16):
            reading = module(batch.pixels)
        contrast = contrastive_loss(reading.embedding, batch.text_embeddings)
        distance = ((reading.embedding - batch.text_embeddings) / spread).square().mean()
        parts = F.mse_loss(reading.parts, batch.parts)
        code = F.mse_loss(reading.codes, batch.codes)
        figures = {"text": distance.item(), "parts": parts.item(), "code": code.item()}
        figures |= {
            name: accuracy(reading.scores, batch.labels, name) for name in ("first_colour", "first_shape")
        }
        leading = _PART_WEIGHT * parts + _CODE_WEIGHT * code
        facts = attribute_losses(reading.scores, batch.labels)
        return contrast + facts + leading + _TEXT_WEIGHT * distance, figures

    held_out = drawn_batch(held_out_generator(1), 512, tokenizer, text)

    def report(module: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(module, VisionTraining)
        module.vision.save_pretrained(run / "image_encoder")
        figures = evaluate(module, held_out, spread)
        shown = ("first_shape", "second_shape", "near_colour", "first_place", "recall at 1", "text")
        return {name: figures[name] for name in shown}

    average = fit(training, loss, plan, run / "vision_training", title="vision tower", judge=report)
    assert isinstance(average, VisionTraining)
    image_processor().save_pretrained(run / "feature_extractor")
    figures = evaluate(average, held_out, spread)
    (run / "vision_training" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures, the embeddings of their captions, and the targets of the linear heads."""

    pixels: Tensor  # (b, 3, 64, 64), normalised
    text_embeddings: Tensor  # (b, 128)
    labels: Tensor  # (b, attributes)
    parts: Tensor  # (b, 16, 8, 8): share of each part of a patch that is covered
    codes: Tensor  # (b, 16, 8, 8), one node per patch
    scenes: list[Scene]


@dataclass(frozen=True, slots=True)
class Reading:
    """The tower's embeddings of pictures and the outputs of the linear heads, in fp32."""

    embedding: Tensor  # (b, 128)
    scores: Tensor  # (b, classes) of all classes of all attributes
    parts: Tensor  # (b, 16, 8, 8)
    codes: Tensor  # (b, 16, 8, 8)


class VisionTraining(nn.Module):
    """The vision tower with linear heads on its layers and on its embedding."""

    def __init__(self, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.vision = vision
        self.read = nn.Linear(HIDDEN, sum(len(values) + 1 for values in ATTRIBUTES.values()))
        self.read_parts = nn.Linear(HIDDEN, _PARTS**2)
        self.read_code = nn.Linear(HIDDEN, CHANNELS)

    def forward(self, pixels: Tensor) -> Reading:
        """Embed pictures (b, 3, 64, 64) and apply the linear heads."""
        output = self.vision(pixel_values=pixels, output_hidden_states=True)
        _, first, second, *_ = output.hidden_states
        return Reading(
            embedding=output.image_embeds.float(),
            scores=self.read(output.image_embeds).float(),
            parts=_per_patch(self.read_parts, first),
            codes=_per_patch(self.read_code, second),
        )


def _per_patch(read: nn.Linear, states: Tensor) -> Tensor:
    """Apply a head to normed states (b, 1 + 64, width) of class and patches: (b, channels, 8, 8)."""
    patches = F.layer_norm(states[:, 1:], states.shape[-1:])
    read_out: Tensor = read(patches).transpose(1, 2).unflatten(2, (_PATCHES, _PATCHES))
    return read_out.float()


def vision_config() -> CLIPVisionConfig:
    """Return a configuration as wide and deep as the text tower's, with 8x8 patches of 8 pixels."""
    return CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=SIDE // _PATCHES,
        hidden_act="quick_gelu",
        attn_implementation="eager",
    )


def image_processor() -> CLIPImageProcessorPil:
    """Return a processor that squeezes pictures of any aspect to 64x64, so that nothing is cut off."""
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)


def drawn_batch(
    rng: np.random.Generator, count: int, tokenizer: CLIPTokenizer, text: CLIPTextModelWithProjection
) -> Batch:
    """Render fresh scenes, resized as the pictures of requests are; the targets `parts` are left at zero."""
    scenes = [sample_scene(rng, sample_size(rng)) for _ in range(count)]
    return make_batch(scenes, prepare(scenes), torch.zeros(count, SIDE, SIDE), tokenizer, text)


def make_batch(
    scenes: list[Scene],
    pixels: Tensor,
    covered: Tensor,
    tokenizer: CLIPTokenizer,
    text: CLIPTextModelWithProjection,
) -> Batch:
    """Return pictures of scenes with all targets."""
    labels = torch.tensor([Caption("", scene_facts(scene)).labels() for scene in scenes])
    codes = [torch.from_numpy(scene_code(scene))[None] for scene in scenes]
    patches = [F.interpolate(code, (_PATCHES, _PATCHES), mode="bilinear") for code in codes]
    parts = F.pixel_unshuffle(F.avg_pool2d(covered[:, None], SIDE // _PATCHES // _PARTS), _PARTS)
    embeddings = embed(text, tokenizer, [full_caption(scene) for scene in scenes])
    return Batch(pixels, embeddings, labels, parts, torch.cat(patches), scenes)


@torch.no_grad()
def embed(text: CLIPTextModelWithProjection, tokenizer: CLIPTokenizer, words: list[str]) -> Tensor:
    """Return the embeddings of captions, (b, 128)."""
    tokens = tokenizer(words, padding="longest", max_length=MAX_TOKENS, truncation=True, return_tensors="pt")
    embeddings: Tensor = text(**tokens).text_embeds
    return embeddings


def prepare(scenes: list[Scene]) -> Tensor:
    """Render scenes and do what the image processor does, an order of magnitude faster."""
    images = [Image.fromarray(render(scene)) for scene in scenes]
    small = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images])
    return normalised(torch.from_numpy(small).permute(0, 3, 1, 2))


def normalised(pixels: Tensor) -> Tensor:
    """Normalise pixels (b, 3, h, w) in 0..255 as the tower reads them."""
    processor = image_processor()
    mean, deviation = (
        torch.tensor(values).view(1, 3, 1, 1) for values in (processor.image_mean, processor.image_std)
    )
    return ((pixels / 255 - mean) / deviation).contiguous()


def contrastive_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Return CLIP's loss: each picture has to find its caption in the batch, and each caption its picture."""
    similarity = _SHARPNESS * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    target = torch.arange(len(images))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


@torch.inference_mode()
def evaluate(training: VisionTraining, batch: Batch, spread: Tensor) -> dict[str, float]:
    """Return attribute accuracies, recall at 1 and 5, and squared distance to the texts over `spread`."""
    parts = [training.eval()(part) for part in torch.split(batch.pixels, 128)]
    scores = torch.cat([part.scores for part in parts])
    embedding = torch.cat([part.embedding for part in parts])
    figures = {name: accuracy(scores, batch.labels, name) for name in ATTRIBUTES}
    similarity = F.normalize(embedding, dim=1) @ F.normalize(batch.text_embeddings, dim=1).T
    order = similarity.argsort(dim=1, descending=True)
    hits = order == torch.arange(len(order))[:, None]
    figures |= {f"recall at {k}": hits[:, :k].any(1).float().mean().item() for k in (1, 5)}
    distance = ((embedding - batch.text_embeddings) / spread).square().mean()
    return figures | {"text": distance.item()}


def main() -> None:
    """Train into the folder given on the command line."""
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
