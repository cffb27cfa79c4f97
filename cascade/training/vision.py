"""The vision tower of the tiny checkpoint: pictures into the space of the frozen text tower.

Contrast with the captions ties it to the text. Linear readings, thrown away afterwards, keep every fact of
the scene in the embedding, as in the text tower; another one asks each patch for the semantic code at its
place, without which shapes stay at chance for very long.
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

from cascade.training.captions import ATTRIBUTES, Caption, caption, scene_facts
from cascade.training.code import CHANNELS, scene_code
from cascade.training.loop import Plan, fit
from cascade.training.scenes import Scene, held_out_generator, render, sample_scene, sample_size
from cascade.training.text import HIDDEN, MAX_TOKENS, accuracy, attribute_losses

SIDE = 64
PLAN = Plan(steps=2500, learning_rate=1e-3, seed=22, save_every=50)
BATCH_SIZE = 64
_PATCHES = 8  # along each side
_CODE_WEIGHT = 10.0
_SHARPNESS = 20.0  # of the softmax over similarities


def train(run: Path, plan: Plan = PLAN) -> None:
    """Train against `run`/text_encoder and save `run`/image_encoder and `run`/feature_extractor."""
    tokenizer = CLIPTokenizer.from_pretrained(run / "tokenizer")
    text = CLIPTextModelWithProjection.from_pretrained(run / "text_encoder").eval().requires_grad_(False)
    torch.manual_seed(plan.seed)
    training = VisionTraining(CLIPVisionModelWithProjection(vision_config()))

    def loss(module: nn.Module, step: int, rng: np.random.Generator) -> tuple[Tensor, dict[str, float]]:
        del step
        batch = sample_batch(rng, BATCH_SIZE, tokenizer, text)
        with torch.autocast("cpu", torch.bfloat16):
            embedding, scores, codes = module(batch.pixels)
        contrast = contrastive_loss(embedding, batch.text_embeddings)
        code = F.mse_loss(codes, batch.codes)
        figures = {"contrast": contrast.item(), "code": code.item()}
        figures["shape"] = accuracy(scores, batch.labels, "first_shape")
        return contrast + attribute_losses(scores, batch.labels) + _CODE_WEIGHT * code, figures

    average = fit(training, loss, plan, run / "vision_training", title="vision tower")
    assert isinstance(average, VisionTraining)
    average.vision.save_pretrained(run / "image_encoder")
    image_processor().save_pretrained(run / "feature_extractor")
    batch = sample_batch(held_out_generator(1), 512, tokenizer, text)
    figures = evaluate(average, batch)
    (run / "vision_training" / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


@dataclass(frozen=True, slots=True)
class Batch:
    """Pictures, the embeddings of their captions, and the scenes' facts as classes."""

    pixels: Tensor  # (b, 3, 64, 64), normalised
    text_embeddings: Tensor  # (b, 128)
    labels: Tensor  # (b, attributes)
    codes: Tensor  # (b, 16, 8, 8), one node per patch


class VisionTraining(nn.Module):
    """The vision tower with linear readings of its embedding."""

    def __init__(self, vision: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.vision = vision
        self.read = nn.Linear(HIDDEN, sum(len(values) + 1 for values in ATTRIBUTES.values()))
        self.read_code = nn.Linear(HIDDEN, CHANNELS)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The embedding (b, 128), the scores of all classes of all attributes, the code (b, 16, 8, 8)."""
        output = self.vision(pixel_values=pixels)
        embedding, patches = output.image_embeds, output.last_hidden_state[:, 1:]
        codes = self.read_code(patches).transpose(1, 2).unflatten(2, (_PATCHES, _PATCHES))
        return embedding.float(), self.read(embedding).float(), codes.float()


def vision_config() -> CLIPVisionConfig:
    """As wide and deep as the text tower; 8x8 patches of 8 pixels."""
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
    """Squeezes a picture of any aspect to 64x64, so that nothing at its sides is cut off."""
    side = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False)


def sample_batch(
    rng: np.random.Generator, count: int, tokenizer: CLIPTokenizer, text: CLIPTextModelWithProjection
) -> Batch:
    """Fresh scenes, drawn and captioned."""
    scenes = [sample_scene(rng, sample_size(rng)) for _ in range(count)]
    words = [caption(scene, rng).text for scene in scenes]
    tokens = tokenizer(
        words, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        embeddings = text(**tokens).text_embeds
    labels = torch.tensor([Caption("", scene_facts(scene)).labels() for scene in scenes])
    codes = [torch.from_numpy(scene_code(scene))[None] for scene in scenes]
    patches = [F.interpolate(code, (_PATCHES, _PATCHES), mode="bilinear") for code in codes]
    return Batch(prepare(scenes), embeddings, labels, torch.cat(patches))


def prepare(scenes: list[Scene]) -> Tensor:
    """Draw scenes and do what the image processor does, an order faster."""
    processor = image_processor()
    images = [Image.fromarray(render(scene)) for scene in scenes]
    small = np.stack([np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images])
    mean, deviation = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((torch.from_numpy(small) / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def contrastive_loss(images: Tensor, texts: Tensor) -> Tensor:
    """Each picture finds its caption in the batch, and each caption its picture (CLIP)."""
    similarity = _SHARPNESS * F.normalize(images, dim=1) @ F.normalize(texts, dim=1).T
    target = torch.arange(len(images))
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


@torch.inference_mode()
def evaluate(training: VisionTraining, batch: Batch) -> dict[str, float]:
    """Accuracy of each attribute of the scenes, and how often a caption is nearest to its picture."""
    embedding, scores, _ = training.eval()(batch.pixels)
    figures = {name: accuracy(scores, batch.labels, name) for name in ATTRIBUTES}
    similarity = F.normalize(embedding, dim=1) @ F.normalize(batch.text_embeddings, dim=1).T
    order = similarity.argsort(dim=1, descending=True)
    hits = order == torch.arange(len(order))[:, None]
    return figures | {f"recall at {k}": hits[:, :k].any(1).float().mean().item() for k in (1, 5)}


def main() -> None:
    """Train into the folder given on the command line."""
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))


if __name__ == "__main__":
    main()
