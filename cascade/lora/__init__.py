"""LoRAs: read from any public layout, combined for a row, and used without changing a weight.

How they reach a picture:

    adapter = models.loras.adapter(models, [("azure", 1.0)])  # names with scales; None for no names
    text = models.text_encoder.encode([prompt], adapter=adapter)
    condition = models.stage_c.prepare(text.hidden, text.pooled, image_embeds, adapters=[adapter])

The same names and scales give the same object. `prepare` takes one adapter, or None, for each row; the
condition keeps them, and `Condition.cat` joins rows of all kinds. Guided and unguided rows are both prepared
with the picture's adapter, and both its prompts are encoded with it. Cached embeddings and conditions have
the adapter in their key. Without LoRAs, everything is called as before, at no cost. If `Adapter.changes_text`
is false, prompts need no encoding of their own.

For training, build an `Adapter.of({path: Change(down, up * scale)})` from parameters in every call of the
loss, with paths such as "down_blocks.0.2.attention.attn.in_proj"; gradients flow to both factors.
"""

from cascade.lora.library import LoRALibrary
from cascade.lora.lora import LoRA, combine, read_lora
from cascade.lora.merge import merge
from cascade.networks.adapters import Adapter, Change

__all__ = ["Adapter", "Change", "LoRA", "LoRALibrary", "combine", "merge", "read_lora"]
