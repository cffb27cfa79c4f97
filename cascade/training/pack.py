"""Packs the finished components of a run into a checkpoint folder, in fp16 and in the ordinary layout."""

import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from cascade.checkpoints.load import load_cascade
from cascade.checkpoints.save import save_cascade
from cascade.checkpoints.sums import write_sums
from cascade.errors import CheckpointError
from cascade.sizes import NativeSizes
from cascade.training.scenes import NATIVE_SIZES
from cascade.training.stage_b import SCHEDULE as DECODER_SCHEDULE
from cascade.training.stage_c import SCHEDULE as PRIOR_SCHEDULE
from cascade.training.times import save_times
from cascade.training.wordings import FREE_TEXT_ENCODER

COMPONENTS = {  # and their folders in a run
    "prior": "prior",
    "decoder": "decoder",
    "vqgan": "vqgan",
    "text_encoder": FREE_TEXT_ENCODER,
    "tokenizer": "tokenizer",
    "image_encoder": "image_encoder",
    "feature_extractor": "feature_extractor",
    "effnet_encoder": "effnet_encoder",
    "previewer": "previewer",
}


def pack(run: Path, destination: Path) -> None:
    """Assemble RUN/prior, RUN/decoder, ... in `destination`, which is replaced once the new one is complete.

    Raises:
        CheckpointError: a component is not trained yet, or does not fit the others.
    """
    missing = [folder for folder in COMPONENTS.values() if not (run / folder).is_dir()]
    if missing:
        raise CheckpointError(f"{run}: not trained yet: {', '.join(missing)}")
    with tempfile.TemporaryDirectory(dir=run) as folder:
        assembled, packed = Path(folder, "assembled"), Path(folder, "packed")
        for name, trained in COMPONENTS.items():  # without the states of the training, which lie beside them
            shutil.copytree(run / trained, assembled / name)
        models = replace(
            load_cascade(assembled, device="cpu", dtype="float32"),
            prior_schedule=PRIOR_SCHEDULE,
            decoder_schedule=DECODER_SCHEDULE,
            native=NativeSizes(NATIVE_SIZES, resamples=True),
        )
        save_cascade(models, packed, torch.float16)
        save_times(run, packed)
        write_sums(packed)
        shutil.rmtree(destination, ignore_errors=True)
        shutil.move(packed, destination)


def num_bytes(folder: Path) -> int:
    """Return the size of all files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    """Pack the run given on the command line into the folder given after it."""
    pack(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
