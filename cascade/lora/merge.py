"""Merging of LoRAs into copies of the weights: of those that cannot stay beside them, or are always used."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace

import torch

from cascade.conditioning import TextEncoder
from cascade.lora.lora import LoRA, combine
from cascade.models import Models
from cascade.networks.adapters import Adapter


@torch.no_grad()
def merge(models: Models, uses: Sequence[tuple[LoRA, float]]) -> Models:
    """Return models whose Stage C is a copy with the LoRAs in its weights; other networks are shared.

    The text encoder shares its tower and uses the LoRAs' words and changes by default.
    """
    adapter = combine(models, uses, for_merging=True)
    stage_c = deepcopy(models.stage_c)
    for block, changes in adapter.blocks.items():
        for place, change in changes.items():
            path = f"{block}.{place}" if block else place
            weight = stage_c.get_parameter(path + ("_weight" if place.endswith(".in_proj") else ".weight"))
            added = change.dense(weight.flatten(1)).view(weight.shape)
            weight.copy_(weight.float() + added)
    if not adapter.changes_text:
        return replace(models, stage_c=stage_c)
    own = Adapter({}, adapter.text, adapter.words, adapter.rows)
    text = TextEncoder(models.text_encoder.tokenizer, models.text_encoder.model, own)
    decoder = models.decoder_text_encoder
    is_shared = decoder is models.text_encoder
    decoder_text = text if is_shared else TextEncoder(decoder.tokenizer, decoder.model, own)
    return replace(models, stage_c=stage_c, text_encoder=text, decoder_text_encoder=decoder_text)
