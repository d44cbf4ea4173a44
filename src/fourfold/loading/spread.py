"""Expert parallelism: every rank loads, packs, keeps and computes some of the experts, and tokens travel.

It is transformers' own (`DistributedConfig(tp_size=N, ep_size=N)`): its plan says which parameters lie on
which rank, its loader reads a rank's part, and its implementations (`EPImplementationInterface`) bring tokens
to their experts and back. What is done here is what they do not know of packed experts: their scales are cut
with the bytes, a rank's module is one of fewer experts, and LoRA factors go along.

All ranks hold the same batch, and compute everything but the experts alike: attention stays whole on each
(its rules in the model's plan for tensor parallelism are left aside: packed rows of a Linear cannot be cut).
So what is trained of it has to stay alike, which is seen to here, too: gradients are averaged over the ranks,
and a step that begins with other numbers or another batch on some rank is an error.

T tokens, k experts a token, H hidden.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel

from fourfold.errors import ConfigurationError
from fourfold.experts import ExpertsLayout, PackedExperts, Projection
from fourfold.experts.part import Part, alike_parameters, cut_layout, cut_projection
from fourfold.kernels import LowRank

DISPATCH, CUT, BY_TENSOR_PARALLELISM = "ep_dispatch_experts", "grouped_gemm", "moe_tp_experts"


def _instead(config: Any) -> str:
    sizes = ("tp_size", "ep_size", "fsdp_size", "dp_replicate_size", "pp_size")
    ranks = max(getattr(config, size, None) or 1 for size in sizes)
    return f"pass DistributedConfig(tp_size={ranks}, ep_size={ranks}) for expert parallelism"


def refuse_shards(model: PreTrainedModel) -> None:
    """transformers' own FSDP cuts tensors before they are packed, and knows no scales.

    Raises:
        ConfigurationError: the model is to be loaded so.
    """
    config = getattr(model.config, "distributed_config", None)
    shards = max(getattr(config, size, None) or 1 for size in ("fsdp_size", "dp_replicate_size"))
    if shards > 1:
        raise ConfigurationError(
            f"distributed_config with fsdp_size or dp_replicate_size of {shards} cuts experts before they "
            "can be packed. Load the model by fourfold.distributed.load_sharded, in which each rank packs "
            f"its own experts, add adapters, and call fourfold.distributed.shard; or {_instead(config)}"
        )


def is_wanted(model: PreTrainedModel) -> bool:
    """Whether a model is to be loaded with its packed experts spread over the ranks.

    Raises:
        ConfigurationError: its `distributed_config` asks for something else that cuts them.
    """
    config = getattr(model.config, "distributed_config", None)
    if config is None:
        return False
    tp = getattr(config, "tp_size", None) or 1
    ep = getattr(config, "ep_size", None) or (tp if getattr(config, "enable_expert_parallel", False) else 1)
    if (getattr(config, "pp_size", None) or 1) > 1:
        raise ConfigurationError(
            "distributed_config with pp_size (pipeline parallelism) is not supported with packed experts: "
            f"leave it out, or {_instead(config)}"
        )
    if tp > 1 and ep == 1:
        raise ConfigurationError(
            f"distributed_config with tp_size={tp} is tensor parallelism, which cuts rows of packed "
            f"matrices. Spread whole experts: {_instead(config)}"
        )
    if ep > 1 and not _has_implementations():
        raise ConfigurationError(
            "this transformers cuts experts in a way that knows no packed ones; install transformers>=5.23 "
            "for expert parallelism, or load the model by fourfold.distributed.load_sharded"
        )
    if ep > 1 and config.tp_plan is not None:
        raise ConfigurationError(
            f"distributed_config has tp_plan={config.tp_plan!r}, and of a packed model experts alone are "
            f"cut. Leave it out: {_instead(config)}"
        )
    return ep > 1


def _has_implementations() -> bool:
    try:
        from transformers.distributed.expert_parallel import EPImplementationInterface  # noqa: F401
    except ImportError:
        return False
    return True


def plan_(model: PreTrainedModel, packed: Iterable[str]) -> None:
    """Make the model's plans ready for packed experts: companions are cut as well, and nothing but experts.

    Raises:
        ConfigurationError: the plan does not spread all packed experts, or cannot evenly.
    """
    from transformers.distributed.parallel_utils import replace_layer_number_by_wildcard

    config: Any = model.config.distributed_config
    plan = {**model.ep_plan, **(config.ep_plan or {})}
    added: dict[str, str] = {}
    for name in packed:
        module, wild = model.get_submodule(name), replace_layer_number_by_wildcard(name)
        assert isinstance(module, PackedExperts)
        layout = module.fourfold_layout
        if not isinstance(layout, ExpertsLayout):
            raise ConfigurationError(
                f"{name} ({type(module).__name__}) runs its own forward, into which no rank can bring "
                "tokens; leave ep_size out, and use fourfold.distributed.load_sharded and shard"
            )
        wanted = {wild: DISPATCH}
        for projection in layout.projections:
            wanted |= {f"{wild}.{leaf}": CUT for leaf in (projection.name, projection.bias) if leaf}
            added |= {
                f"{wild}.{projection.name}{suffix}": CUT
                for suffix in projection.shape.tensors(module.fourfold_format)
                if suffix
            }
        if any(plan.get(key) != style for key, style in wanted.items()):
            raise ConfigurationError(
                f"the ep_plan of {type(model).__name__} does not spread {name} by whole experts. Pass "
                f"DistributedConfig(..., ep_plan={wanted!r}), or leave ep_size out"
            )
        if layout.num_experts % config.ep_size:
            raise ConfigurationError(
                f"{name} has {layout.num_experts} experts, which {config.ep_size} ranks do not divide; "
                "choose another ep_size, or fourfold.distributed.load_sharded and shard, which cut unevenly"
            )
    model.ep_plan.update(added)
    # transformers wants a plan for tensor parallelism wherever tp_size is above 1, and drops from it what the
    # other plan has: so this comes to nothing, and attention stays whole.
    model._tp_plan = {key: BY_TENSOR_PARALLELISM for key, style in plan.items() if style == DISPATCH}


def own_projection(module: PackedExperts, projection: Projection) -> tuple[Projection, Part | None]:
    """While loading: a projection as this rank holds it, and which part of the whole that is."""
    parameter: Any = module._parameters[projection.name]
    if not hasattr(parameter, "device_mesh"):
        return projection, None
    part = Part(parameter.device_mesh.get_local_rank(), parameter.device_mesh.size())
    return cut_projection(projection, part), part


def wrap_(model: PreTrainedModel, packed: Iterable[str]) -> None:
    """After reading: packed tensors say that they are parts of packed ones.

    (The loader wraps what it was given like the floating point parameter that stood there.)
    """
    for name in packed:
        module = model.get_submodule(name)
        assert isinstance(module, PackedExperts)
        for projection in module.fourfold_layout.projections:
            shape, dtype = projection.shape.tensors(module.fourfold_format)[""]
            old: Any = module._parameters[projection.name]
            local = old.to_local()
            if local.dtype != dtype or tuple(old.shape) == shape:
                continue
            stride = torch.empty(shape, dtype=dtype, device="meta").stride()
            made: Any = DTensor.from_local(
                local,
                old.device_mesh,
                old.placements,
                run_check=False,
                shape=torch.Size(shape),
                stride=stride,
            )
            parameter: Any = nn.Parameter(made, requires_grad=False)
            parameter._is_hf_initialized = getattr(old, "_is_hf_initialized", False)
            module._parameters[projection.name] = parameter


def spread_(model: PreTrainedModel, packed: Iterable[str]) -> None:
    """After loading: let packed experts reach those of other ranks, and keep what is trained alike."""
    modules = [model.get_submodule(name) for name in packed]
    implementation = model.config.distributed_config.ep_implementation
    group: Any = None
    for module in modules:
        assert isinstance(module, PackedExperts)
        first: Any = module._parameters[module.fourfold_layout.projections[0].name]
        spread = Spread(module, implementation, first.device_mesh)
        module.__dict__.pop("forward", None)  # transformers', which knows no factors
        module.fourfold_spread, group = spread, spread.group
        module.fourfold_layout = cut_layout(module.fourfold_layout, spread.part)
    alike = _Alike(model, group)
    first_of_all: Any = modules[0]
    first_of_all.fourfold_spread.begin = alike.watch


class Spread:
    """The experts of one module on all ranks (`PackedExperts.fourfold_spread`).

    Attributes:
        part: which of them are here.
        group: the processes that share them.
        experts: of all ranks together.
        begin: is called when this module's turn comes in training; of the first one in the model.
    """

    begin: Callable[[], Any] | None = None

    def __init__(self, module: PackedExperts, implementation: str, mesh: Any) -> None:
        from transformers.distributed.expert_parallel import EPImplementationInterface

        self.part = Part(mesh.get_local_rank(), mesh.size())
        self.group: dist.ProcessGroup = mesh.get_group()
        self.experts = module.fourfold_layout.num_experts
        start, stop = self.part.of(self.experts)
        self.here = stop - start
        implementations: Any = EPImplementationInterface()
        own = SimpleNamespace(
            forward=self._own_experts, num_experts=self.here, config=getattr(module, "config", None)
        )
        self._bring = implementations[implementation](own, mesh, mesh)
        self._running: tuple[PackedExperts, Mapping[str, LowRank]] | None = None

    def __call__(
        self,
        module: PackedExperts,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
        low_rank: Mapping[str, LowRank],
    ) -> torch.Tensor:
        if self.begin is not None and module.training:
            self.begin()
        self._running = (module, low_rank)
        try:
            output: torch.Tensor = self._bring(hidden_states, top_k_index, top_k_weights)
        finally:
            self._running = None
        return output.to(hidden_states.dtype)

    def _own_experts(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Experts of this rank on what was brought to them, by their numbers here.

        An index past the last of them (with weight 0) stands for an expert of another rank.
        """
        from fourfold.experts.forward import routed_forward

        assert self._running is not None
        module, low_rank = self._running
        index_S, k = top_k_index.reshape(-1), top_k_index.shape[1]
        rows_R = (index_S < self.here).nonzero().flatten()
        if rows_R.numel() == index_S.numel():
            return routed_forward(module, hidden_states, top_k_index, top_k_weights, low_rank)
        if not rows_R.numel():  # (one all the same, of weight 0: every rank has to take part in backward)
            rows_R = rows_R.new_zeros(1)
        found_RH = routed_forward(
            module,
            hidden_states[rows_R // k],
            index_S[rows_R].clamp(max=self.here - 1).unsqueeze(1),
            top_k_weights.reshape(-1)[rows_R].unsqueeze(1),
            low_rank,
        )
        out_SH = found_RH.new_zeros(index_S.numel(), found_RH.shape[1]).index_copy(0, rows_R, found_RH)
        return out_SH.view(-1, k, found_RH.shape[1]).float().sum(dim=1).to(found_RH.dtype)


class _Alike:
    """Sees to it that ranks which compute the same do: batches, and what is trained beside experts."""

    def __init__(self, model: PreTrainedModel, group: dist.ProcessGroup) -> None:
        self.group, self._model = group, weakref.ref(model)
        self._averaged: Any = WeakIdKeyDictionary()  # (as a set)
        model.get_input_embeddings().register_forward_pre_hook(self._begin)

    def _begin(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """With the batch that the model was given."""
        if arguments:
            self._check(arguments[0], self.watch() if torch.is_grad_enabled() else {})

    def watch(self) -> dict[str, nn.Parameter]:
        """What the ranks train in common; its gradients are averaged from now on."""
        model = self._model()
        trained = {} if model is None else alike_parameters(model)
        for parameter in trained.values():
            if parameter not in self._averaged:
                parameter.register_post_accumulate_grad_hook(self._average)
                self._averaged[parameter] = True
        return trained

    @torch.no_grad()
    def _average(self, parameter: torch.Tensor) -> None:
        # (of accumulated ones, what was averaged before stays what it is)
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=self.group)
        parameter.grad /= dist.get_world_size(self.group)

    @torch.no_grad()
    def _check(self, ids: torch.Tensor, trained: Mapping[str, nn.Parameter]) -> None:
        sums = [_digest(ids), *map(_digest, trained.values())]
        found = torch.stack([value.to(ids.device) for value in sums])
        both = torch.stack([found, -found])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self.group)
        wrong = (both[0] != -both[1]).nonzero().flatten().tolist()
        if not wrong:
            return
        if wrong[0] == 0:
            raise ConfigurationError(
                "the ranks were given different batches. With expert parallelism all of them compute the "
                "same one, each its experts' part: give every rank the same rows (no sampler that divides)"
            )
        raise ConfigurationError(
            f"{list(trained)[wrong[0] - 1]} and {len(wrong) - 1} more trained parameters differ between the "
            "ranks, which have to hold the same. Call torch.manual_seed with the same number on every rank "
            "before adapters are added, and clip gradients by fourfold.distributed.clip_grad_norm_: a rank "
            "by itself does not know the norm of the others' experts"
        )


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's shape and bits, one number; bits are weighted by where they stand."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).to(torch.int64)
    place = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * place).sum() * 31 + sum(size * 17**axis for axis, size in enumerate(tensor.shape))
