"""Finetuning of Stage C ("prior") or Stage B ("decoder") of any checkpoint on a folder of captioned pictures.

`finetune(FinetuneSettings(stage="prior", data=Path("pictures"), output=Path("mine")))` writes a checkpoint.
For several GPUs: `torchrun --nproc-per-node N -m cascade.training.finetune prior --data DIR -o OUT`.
"""

from cascade.training.finetune.settings import FinetuneSettings
from cascade.training.finetune.trainer import finetune

__all__ = ["FinetuneSettings", "finetune"]
