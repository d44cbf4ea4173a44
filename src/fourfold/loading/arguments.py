"""Names of the arguments of `MoeBitsAndBytesConfig`, by what they concern.

Imports nothing, so that a file of settings can be checked against them without torch.
"""

from __future__ import annotations

# For weights in 4 bit.
BNB_4BIT = (
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_quant_storage",
)
# For weights in 8 bit.
BNB_8BIT = ("llm_int8_threshold", "llm_int8_has_fp16_weight")
# For either.
BNB_BOTH = (
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    "experts_quant_type",
    "experts_blocksize",
)
# Arguments of BitsAndBytesConfig that concern Linears alone; the report says so.
LINEARS_ONLY = (
    "bnb_4bit_quant_storage",
    "llm_int8_threshold",
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
)
# What a plain BitsAndBytesConfig takes.
PLAIN = (
    "load_in_8bit",
    "load_in_4bit",
    "llm_int8_skip_modules",
    "llm_int8_enable_fp32_cpu_offload",
    *BNB_4BIT,
    *BNB_8BIT,
)
