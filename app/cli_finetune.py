"""`cascade train prior` and `cascade train decoder`: finetune any checkpoint on captioned pictures."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from app import cli_options as options

STAGES = {
    "prior": ("Stage C", "to draw the semantic latents of a picture from its caption"),
    "decoder": ("Stage B", "to draw a picture from its semantic latents"),
}

Data = Annotated[
    Path,
    Option(
        "--data",
        metavar="DIR",
        help="Folder of pictures with captions (.txt, metadata.jsonl or file names) or .tar shards.",
    ),
]
Output = Annotated[
    Path,
    Option(
        "--output",
        "-o",
        metavar="DIR",
        help="New checkpoint; the state of the run lies beside it, in DIR.training.",
    ),
]
Steps = Annotated[int, Option(metavar="N", help="Updates of the weights.")]
Batch = Annotated[int, Option(metavar="N", help="Pictures per update.")]
Accumulate = Annotated[int, Option(metavar="N", help="Passes per update: less memory, the same update.")]
LearningRate = Annotated[float, Option(metavar="RATE", help="Of AdamW, after warm-up.")]
Warmup = Annotated[int, Option(metavar="N", help="Updates until the full learning rate.")]
Weighting = Annotated[str, Option(metavar="NAME", help="Of noise levels in the loss: p2 or adaptive.")]
EmaDecay = Annotated[float, Option(metavar="SHARE", help="Of the averaged weights; 0: none.")]
ImageSize = Annotated[
    int | None,
    Option(metavar="PIXELS", help="Side of a square as large as all pictures.", show_default="native"),
]
Seed = Annotated[int, Option(metavar="N", help="Of order, noise and dropout.")]
Checkpointing = Annotated[
    bool, Option("--checkpointing", help="Recompute activations: less memory, more time.")
]
Bf16 = Annotated[bool | None, Option("--bf16/--no-bf16", help="Autocast.", show_default="on a GPU")]
Cache = Annotated[bool, Option("--cache/--no-cache", help="Keep the latents of Stage C on the disk.")]
SheetEvery = Annotated[int, Option(metavar="N", help="Updates between sheets of samples; 0: none.")]
SaveEvery = Annotated[int, Option(metavar="N", help="Updates between saved states.")]
SaveDtype = Annotated[
    str, Option(metavar="DTYPE", help="Of the new checkpoint: float32, bfloat16 or float16.")
]


def add_to(train: typer.Typer) -> None:
    """Add the two commands, which differ only in the stage."""
    for name, (network, learns) in STAGES.items():
        text = _HELP.format(name=name, network=network, learns=learns)
        train.command(name, help=text)(finetune)


def finetune(
    context: typer.Context,
    data: Data,
    output: Output,
    model: options.Model = "tiny",
    steps: Steps = 1000,
    batch: Batch = 16,
    accumulate: Accumulate = 1,
    learning_rate: LearningRate = 1e-4,
    warmup: Warmup = 10,
    weighting: Weighting = "p2",
    ema_decay: EmaDecay = 0.99,
    image_size: ImageSize = None,
    seed: Seed = 0,
    checkpointing: Checkpointing = False,
    bf16: Bf16 = None,
    cache: Cache = True,
    sheet_every: SheetEvery = 250,
    save_every: SaveEvery = 250,
    save_dtype: SaveDtype = "float32",
    device: options.Device = "auto",
) -> None:
    """Finetune the stage that the command is named after."""
    from cascade.training.finetune import FinetuneSettings
    from cascade.training.finetune import finetune as run

    settings = FinetuneSettings(
        stage=context.info_name,  # type: ignore[arg-type]  # checked by the settings themselves
        data=data,
        output=output,
        model=model,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        warmup=warmup,
        weighting=weighting,  # type: ignore[arg-type]  # the same
        ema_decay=ema_decay,
        image_size=image_size,
        seed=seed,
        checkpointing=checkpointing,
        bf16=bf16,
        cache=cache,
        sheet_every=sheet_every,
        save_every=save_every,
        save_dtype=save_dtype,
        device=device,
    )
    run(settings)


_HELP = """Finetune {network} of a checkpoint on pictures with captions.

It learns {learns}. An interrupted run goes on where it was when it is called again.

\b
Examples:
  cascade train {name} --data pictures -o mine --steps 200
  cascade train {name} --data shards --model DIR -o mine --batch 64 --accumulate 8 --checkpointing
  torchrun --nproc-per-node 8 -m cascade.training.finetune {name} --data shards --model DIR -o mine
"""
