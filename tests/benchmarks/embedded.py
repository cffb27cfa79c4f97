"""A picture of the embedded checkpoint from prompt to pixels, ours and diffusers', with the same noise."""

from typing import Any

import torch

from cascade import Cascade
from tests.benchmarks.measure import Advance, Comparison, compare
from tests.benchmarks.weights import in_diffusers

PROMPT = "a red circle on a blue background"
STEPS, GUIDANCE, DECODER_STEPS = 20, 4.0, 10
SIDE = 256
SEED = 7


def embedded_comparisons(source: str, rounds: int, advance: Advance) -> list[Comparison]:
    """One picture at a time with one thread and with all, and the official preset for itself."""
    cascade = Cascade.from_pretrained(source, device="cpu", dtype="float32")
    script = DiffusersScript(cascade)
    settings: dict[str, Any] = {"steps": STEPS, "guidance_scale": GUIDANCE, "decoder_steps": DECODER_STEPS}

    def ours(preset: str) -> Any:
        return cascade.text_to_image(PROMPT, seed=SEED, width=SIDE, height=SIDE, preset=preset, **settings)

    threads = torch.get_num_threads()
    results = []
    for count in sorted({threads, 1}, reverse=True):
        torch.set_num_threads(count)
        name = f"embedded picture, {SIDE}x{SIDE}, 20+10 steps, {count} thread{'s' if count > 1 else ''}"
        results.append(
            compare(name, lambda: ours("diffusers"), script, rounds=rounds, target=0.5, advance=advance)
        )
    torch.set_num_threads(threads)
    official = f"embedded picture, preset official, {threads} threads"
    results.append(compare(official, lambda: ours("official"), None, rounds=rounds, advance=advance))
    return results


class DiffusersScript:
    """What a user of diffusers runs, on our weights: both pipelines, one generator."""

    def __init__(self, cascade: Cascade) -> None:
        import diffusers

        self.prior = diffusers.StableCascadePriorPipeline(
            tokenizer=cascade.text_encoder.tokenizer,
            text_encoder=cascade.text_encoder.model,
            prior=in_diffusers(cascade.stage_c),
            scheduler=diffusers.DDPMWuerstchenScheduler(),
        )
        self.decoder = diffusers.StableCascadeDecoderPipeline(
            decoder=in_diffusers(cascade.stage_b),
            tokenizer=cascade.decoder_text_encoder.tokenizer,
            text_encoder=cascade.decoder_text_encoder.model,
            scheduler=diffusers.DDPMWuerstchenScheduler(),
            vqgan=in_diffusers(cascade.stage_a),
        )
        for pipeline in (self.prior, self.decoder):
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self) -> Any:
        """One picture."""
        generator = torch.Generator("cpu").manual_seed(SEED)
        prior = self.prior(
            prompt=PROMPT,
            height=SIDE,
            width=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
        )
        return self.decoder(
            image_embeddings=prior.image_embeddings,
            prompt=PROMPT,
            num_inference_steps=DECODER_STEPS,
            guidance_scale=0.0,
            generator=generator,
        ).images[0]
