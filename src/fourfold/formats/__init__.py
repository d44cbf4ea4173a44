"""How numbers are packed. Plain torch: no models, no transformers, no PEFT.

- `codebooks`: the values that a 4-bit code or an 8-bit absmax code stands for.
- `packed`: `PackFormat` (the settings), `PackedStack` (a stack of packed matrices), decoding in plain torch.
- `quantize`: packing one matrix into a slot of a stack, by bitsandbytes' own quantizers.
"""

from fourfold.formats.packed import COMPANION_SUFFIXES, PackedStack, PackFormat, StackShape, decode_stack

__all__ = ["COMPANION_SUFFIXES", "PackFormat", "PackedStack", "StackShape", "decode_stack"]
