"""Finetuning for `torchrun`, which starts one of these processes for each GPU."""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from cascade.errors import CheckpointError, InvalidSetting
from cascade.training.finetune.settings import STAGES, FinetuneSettings
from cascade.training.finetune.trainer import finetune

_KINDS: dict[str, Any] = {"image_size": int, "bf16": bool}


def main(arguments: list[str] | None = None) -> int:
    """Run with the settings of the command line: --name VALUE for each of `FinetuneSettings`."""
    parser = argparse.ArgumentParser("python -m cascade.training.finetune", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    for field in dataclasses.fields(FinetuneSettings):
        if field.name == "stage":
            continue
        flag = f"--{field.name.replace('_', '-')}"
        flags = ("-o", flag) if field.name == "output" else (flag,)
        if field.default is dataclasses.MISSING:
            parser.add_argument(*flags, type=Path, required=True)
        elif isinstance(field.default, bool) or _KINDS.get(field.name) is bool:
            parser.add_argument(*flags, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            kind = _KINDS.get(field.name, type(field.default))
            parser.add_argument(*flags, type=kind, default=field.default)
    try:
        finetune(FinetuneSettings(**vars(parser.parse_args(arguments))))
    except (CheckpointError, InvalidSetting) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
