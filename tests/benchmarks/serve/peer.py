"""A picture server as people write it today: FastAPI, diffusers' pipelines, and one lock around them.

It answers the part of OpenAI's contract that the load needs, so that both servers get the very same requests.
`python -m tests.benchmarks.serve.peer --checkpoint FOLDER` serves a checkpoint in diffusers' layout.
"""

import argparse
import base64
import io
import threading
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Body(BaseModel):
    """What the load sends; the names are those of our server."""

    prompt: str
    negative_prompt: str = ""
    n: int = 1
    size: str = "256x256"
    seed: int = 0
    prior_num_inference_steps: int = 20
    prior_guidance_scale: float = 4.0
    decoder_num_inference_steps: int = 10


class Pipelines:
    """The two pipelines of the model card."""

    def __init__(self, checkpoint: Path) -> None:
        from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline

        options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
        self._prior = StableCascadePriorPipeline.from_pretrained(checkpoint, **options)
        self._decoder = StableCascadeDecoderPipeline.from_pretrained(checkpoint, **options)
        for pipeline in (self._prior, self._decoder):
            pipeline.set_progress_bar_config(disable=True)

    def __call__(self, body: Body) -> list[Any]:
        """All pictures of a request, as PIL images."""
        width, height = map(int, body.size.split("x"))
        generator = torch.Generator("cpu").manual_seed(body.seed)
        prior = self._prior(
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            width=width,
            height=height,
            num_inference_steps=body.prior_num_inference_steps,
            guidance_scale=body.prior_guidance_scale,
            num_images_per_prompt=body.n,
            generator=generator,
        )
        images: list[Any] = self._decoder(
            image_embeddings=prior.image_embeddings,
            prompt=body.prompt,
            negative_prompt=body.negative_prompt,
            num_inference_steps=body.decoder_num_inference_steps,
            guidance_scale=0.0,
            generator=generator,
        ).images
        return images


def build(pipelines: Pipelines) -> FastAPI:
    """The server. FastAPI runs the plain function in one of its forty threads; the lock lets one through."""
    app = FastAPI()
    lock = threading.Lock()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    def generate(body: Body) -> dict[str, Any]:
        with lock:
            images = pipelines(body)
        return {"data": [{"b64_json": _png(image)} for image in images]}

    return app


def _png(image: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def main() -> None:
    """Load and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, help="of torch; as torch chooses when absent")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    app = build(Pipelines(arguments.checkpoint))
    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
