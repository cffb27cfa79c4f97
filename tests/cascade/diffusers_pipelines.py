"""Small random pipelines built and saved by diffusers itself: what the parity tests compare with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline, StableCascadePriorPipeline
from diffusers.models import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

_BLOCK = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]
_TEXT_WIDTH, _IMAGE_WIDTH = 96, 48
_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Pipelines:
    """The two pipelines that a user of diffusers loads."""

    prior: StableCascadePriorPipeline
    decoder: StableCascadeDecoderPipeline

    def save(self, folder: Path) -> None:
        """Both into one folder; what they share is written twice, the same."""
        self.prior.save_pretrained(folder)
        self.decoder.save_pretrained(folder)

    def script(
        self,
        prompt: str,
        seed: int,
        *,
        negative_prompt: str | None = None,
        height: int = 256,
        width: int = 256,
        steps: int = 20,
        guidance_scale: float = 4.0,
        decoder_steps: int = 10,
        decoder_guidance_scale: float = 0.0,
        one_generator: bool = True,
    ) -> Image.Image:
        """What the user's script does, with one generator for both pipelines or a new one for each."""
        generator = torch.Generator("cpu").manual_seed(seed)
        prior_output = self.prior(
            prompt=prompt,
            negative_prompt=negative_prompt,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        if not one_generator:
            generator = torch.Generator("cpu").manual_seed(seed)
        image: Image.Image = self.decoder(
            image_embeddings=prior_output.image_embeddings,
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=decoder_steps,
            guidance_scale=decoder_guidance_scale,
            generator=generator,
        ).images[0]
        return image


def random_pipelines(seed: int) -> Pipelines:
    """Pipelines at a configuration that nobody published, with no weight left at zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, text_encoder = _tokenizer(), _randomize(_text_encoder())
        prior = StableCascadePriorPipeline(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=_randomize(_stage_c()),
            scheduler=DDPMWuerstchenScheduler(),
            feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32),
            image_encoder=_randomize(_image_encoder()),
        )
        decoder = StableCascadeDecoderPipeline(
            decoder=_randomize(_stage_b()),
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=DDPMWuerstchenScheduler(),
            vqgan=_stage_a(),
        )
    for pipeline in (prior, decoder):
        pipeline.set_progress_bar_config(disable=True)
    return Pipelines(prior, decoder)


def _stage_c() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=16,
        out_channels=16,
        patch_size=1,
        conditioning_dim=128,
        block_out_channels=(128, 128),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(_BLOCK, _BLOCK),
        clip_text_in_channels=_TEXT_WIDTH,
        clip_text_pooled_in_channels=_TEXT_WIDTH,
        clip_image_in_channels=_IMAGE_WIDTH,
        timestep_conditioning_type=("sca", "crp"),
        switch_level=(False,),
    )


def _stage_b() -> StableCascadeUNet:
    return StableCascadeUNet(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=64,
        block_out_channels=(32, 64, 128),
        num_attention_heads=(0, 0, 2),
        down_num_layers_per_block=(1, 2, 1),
        up_num_layers_per_block=(1, 2, 1),
        down_blocks_repeat_mappers=(1, 1, 1),
        up_blocks_repeat_mappers=(2, 2, 1),
        block_types_per_layer=(_BLOCK[:2], _BLOCK[:2], _BLOCK),
        clip_text_pooled_in_channels=_TEXT_WIDTH,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        dropout=(0.0, 0.0, 0.1),
        timestep_conditioning_type=("sca",),
    )


def _stage_a() -> PaellaVQModel:
    """Random stages make latents that are far too large: decode them faintly, or pictures are masks."""
    stage_a = _randomize(PaellaVQModel(embed_dim=32, bottleneck_blocks=2, num_vq_embeddings=64))
    with torch.no_grad():
        stage_a.out_block[0].weight *= 0.003
        stage_a.out_block[0].bias.fill_(0.5)
    return stage_a


def _text_encoder() -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=514,
            hidden_size=_TEXT_WIDTH,
            intermediate_size=192,
            projection_dim=_TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=3,
            max_position_embeddings=_TOKENS,
            hidden_act="gelu",
            bos_token_id=512,
            eos_token_id=513,
            pad_token_id=513,
        )
    )


def _image_encoder() -> CLIPVisionModelWithProjection:
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            projection_dim=_IMAGE_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        )
    )


def _tokenizer() -> CLIPTokenizer:
    """Byte-level, without merges: every byte inside a word and at its end, begin and end of the text."""
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=_TOKENS)


def _byte_letters() -> list[str]:
    """A printable letter for every byte, as byte-level tokenizers write them."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]


def _randomize(module: Any) -> Any:
    """Draw every weight, also those that start at zero or one, so that each matters in a comparison."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.dim() > 1 and weight.shape[0] > 1:
                weight.normal_(0, (weight[0].numel()) ** -0.5)
            elif "norm" in name and name.endswith("weight"):
                weight.normal_(1, 0.2)
            else:
                weight.normal_(0, 0.2)
        for name, statistic in module.named_buffers():
            if name.endswith("running_mean"):
                statistic.normal_(0, 0.2)
            elif name.endswith("running_var"):
                statistic.uniform_(0.5, 2)
    return module.eval()
