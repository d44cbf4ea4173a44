"""Keys of the base model: where it is, and how it is held in memory."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fourfold.training.key_types import Attention, Names, PathText, Strict, Text, only, refuse_yet


class SpecialTokens(Strict):
    """Tokens with a meaning of their own; each must be in the model's vocabulary."""

    bos_token: Text | None = Field(None, description="begins a text")
    eos_token: Text | None = Field(None, description="ends a text or turn")
    pad_token: Text | None = Field(None, description="fills batches")
    unk_token: Text | None = Field(None, description="stands for what is unknown")
    additional_special_tokens: Names | None = Field(None, description="further ones, a list")


class ModelKeys(Strict):
    """What is trained on."""

    base_model: PathText = Field(description="a folder, or a model's id on the hub")
    model_type: Annotated[
        Literal["AutoModelForCausalLM"], only(("AutoModelForCausalLM",), "Drop it: it is read off the model.")
    ] = Field("AutoModelForCausalLM", description="`AutoModelForCausalLM`: what config.json names")
    tokenizer_type: Annotated[
        Literal["AutoTokenizer"], only(("AutoTokenizer",), "Drop it: it is read off the model.")
    ] = Field("AutoTokenizer", description="`AutoTokenizer`: what the tokenizer's files name")
    special_tokens: SpecialTokens | None = Field(
        None, description="a mapping such as {pad_token: ...}, of tokens that the vocabulary has"
    )
    attn_implementation: Annotated[
        Attention | None,
        refuse_yet(
            lambda value: isinstance(value, str) and "/" in value,
            "kernels from the hub",
            "Take sdpa, or an installed flash_attention_2.",
        ),
    ] = Field(None, description="the name of an attention; absent means what transformers chooses")
    flash_attention: bool = Field(False, description="true: as attn_implementation: flash_attention_2")
    sdp_attention: bool = Field(False, description="true: as attn_implementation: sdpa")
    flex_attention: bool = Field(False, description="true: as attn_implementation: flex_attention")
    eager_attention: bool = Field(False, description="true: as attn_implementation: eager")
    adapter: Literal["qlora", "lora"] = Field(description="`qlora` (with load_in_4bit) or `lora`")
    load_in_4bit: bool = Field(False, description="true or false")
    load_in_8bit: bool = Field(False, description="true or false")
    quantize_moe_experts: bool | None = Field(
        None, description="true or false; absent means true wherever load_in_4bit or load_in_8bit is"
    )
    bnb_config_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="a mapping of quantization settings"
    )
    trust_remote_code: bool = Field(
        False, description="true: run the code that a model's repository brings; false refuses such a model"
    )
