"""Low-rank adapters in torch: the reference serves, for what native code does not cover is rare and small."""

from octavo_kernels.reference.lora import lora_expand, lora_linear, lora_shrink

__all__ = ["lora_expand", "lora_linear", "lora_shrink"]
