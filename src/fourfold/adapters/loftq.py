"""LoRA on packed experts that begins with what packing lost.

Packing turns ``W`` into ``dq(W)``; LoRA usually begins with ``BA = 0``, so training begins at ``dq(W)``. Here
it begins at the ``scaling * BA`` of its rank that is closest to ``W - dq(W)`` (LoftQ, Li et al. 2023,
https://arxiv.org/abs/2310.08659, with one step: the packed bytes stay as they are. Its further steps quantize
``W - BA`` anew, which would make another base of every adapter.)

Such an adapter is right on the packed base (or its dequantized numbers) alone: on the original weights the
initial BA would be added to what it already makes up for. So ``fourfold.json`` says ``"init": "loftq"``, and
what puts an adapter on original weights (`merge`, `export`) asks for it.

E experts, P and Q the axes of a matrix as the model stores it, R rank, K in, N out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fourfold.adapters import provenance
from fourfold.adapters.low_rank_fit import fit, fit_stacked
from fourfold.adapters.merge_plan import local_folder
from fourfold.adapters.wrapper import ParamWrapper
from fourfold.errors import AdapterError, CheckpointError
from fourfold.experts.layout import name_suffix
from fourfold.experts.part import refuse_spread
from fourfold.kernels.decode import decode
from fourfold.loading.headers import checkpoint_files
from fourfold.loading.matrices import read_matrices
from fourfold.loading.origin import Origin, origin_of_files
from fourfold.loading.places import Places, find_places
from fourfold.loading.raw import read_raw
from fourfold.loading.skeleton import read_config, skeleton_like

# No format loses that much of any matrix (NF4 0.09, FP4 in blocks of 4096 below 0.3); other weights do.
_OTHER_WEIGHTS = 0.5
Progress = Callable[[int, int, str], None]


@dataclass
class RoleError:
    """Errors of all parameters of a role, as squares of norms until they are asked for.

    Attributes:
        parameters: how many.
        before: ``|W - dq(W)| / |W|``.
        after: ``|W - dq(W) - scaling * BA| / |W|``, with the factors as they are held.
    """

    parameters: int
    before: float
    after: float


@dataclass
class _Sums:
    parameters: int = 0
    weight: float = 0.0
    before: float = 0.0
    after: float = 0.0

    def figures(self) -> RoleError:
        weight = self.weight or 1.0
        return RoleError(self.parameters, (self.before / weight) ** 0.5, (self.after / weight) ** 0.5)


@dataclass(frozen=True)
class LoftQ:
    """What `loftq_init` did.

    Attributes:
        adapter: its name.
        base: whose weights were compared with.
        roles: suffix of the parameters -> errors before and after.
    """

    adapter: str
    base: dict[str, Any]
    roles: dict[str, RoleError]

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return asdict(self)


@torch.no_grad()
def loftq_init(
    model: nn.Module,
    base: str | Path | None = None,
    adapter_name: str = "default",
    *,
    any_base: bool = False,
    progress: Progress | None = None,
) -> LoftQ:
    """Begin LoRA on packed experts with the best approximation of what packing lost.

    Call it after `get_peft_model` (or `add_adapter`), before training. Factors on Linears are left alone. One
    matrix of the original is in memory at a time.

    Args:
        model: packed, with an adapter whose B is zero.
        base: the checkpoint that was packed, in high precision: a local folder or a hub id; None is the one
            that the model was loaded from or packed from.
        adapter_name: which adapter.
        any_base: do not compare ``base`` with the one that the model was made of.
        progress: is called with parameters done, their total, and the name of the next one.

    Returns:
        Errors before and after, by role.

    Raises:
        AdapterError: there is no such adapter on packed experts, it has begun already (B is not zero), its
            scaling is not positive, or the packed weights are not here as a whole (offloaded, sharded); the
            adapter is as it was.
        CheckpointError: the base is another one than was packed, packed itself, quantized or damaged; the
            adapter's B is zero as it was, its A may have changed.
    """
    refuse_spread(
        model,
        "loftq_init reads the original weights of all of them",
        "Call it on a model in one process, save that adapter, and go on from it here",
    )
    layers = _layers(model, adapter_name)
    folder, origin = _find_base(model, base, any_base)
    names = [_parameter(layer) for layer in layers]
    original = getattr(model, "get_base_model", lambda: model)()
    tensors = [tensor for file in checkpoint_files(folder) for tensor in read_raw(file).tensors]
    places = find_places(skeleton_like(original), tensors, names)
    sums: dict[str, _Sums] = {}
    try:
        for number, (layer, name) in enumerate(zip(layers, names, strict=True)):
            if progress is not None:
                progress(number, len(layers), name)
            role = sums.setdefault(name_suffix(name), _Sums())
            _Fitting(layer, adapter_name, places, name, role).run()
            role.parameters += 1
    except BaseException:
        for layer in layers:
            layer.lora_B[adapter_name].weight.zero_()
        raise
    provenance.set_init(model, adapter_name, provenance.LOFTQ)
    if progress is not None:
        progress(len(layers), len(layers), "")
    return LoftQ(adapter_name, origin.to_dict(), {role: s.figures() for role, s in sums.items()})


def _layers(model: nn.Module, adapter_name: str) -> list[ParamWrapper]:
    wrappers = [module for module in model.modules() if isinstance(module, ParamWrapper)]
    known = list(getattr(model, "peft_config", None) or {})
    if adapter_name not in known:
        raise AdapterError(
            f"the model has no adapter {adapter_name!r}; it has {', '.join(known) or 'none'}. Call "
            "loftq_init after get_peft_model, with the adapter's name"
        )
    layers = [layer for layer in wrappers if adapter_name in layer.lora_A]
    if not layers:
        raise AdapterError(
            f"adapter {adapter_name!r} has no factors on packed experts, so there is nothing that packing "
            "lost; target_parameters=fourfold.expert_targets(model) targets them, on a model that was loaded "
            "with MoeBitsAndBytesConfig"
        )
    for layer in layers:
        name, tensors = _parameter(layer), dict(layer._experts().stack(layer._projection()).tensors())
        a_weight, b_weight = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        held = [*tensors.values(), a_weight, b_weight]
        if any(tensor.is_meta or hasattr(tensor, "placements") for tensor in held):
            raise AdapterError(
                f"{name} is offloaded or sharded, so its matrices cannot be read here; call loftq_init "
                "before the model is distributed, with all of it on devices"
            )
        if bool(b_weight.any()):
            raise AdapterError(
                f"lora_B of {name} is not zero: adapter {adapter_name!r} was trained or loaded, or made with "
                "init_lora_weights=False, and would be overwritten. Call loftq_init on a new adapter"
            )
        if not layer.scaling[adapter_name] > 0:
            raise AdapterError(
                f"{name} has a scaling of {layer.scaling[adapter_name]}, with which BA cannot make up for "
                "anything; set lora_alpha to a positive number"
            )
    return layers


def _parameter(layer: ParamWrapper) -> str:
    return f"{layer._experts().fourfold_name}.{layer.parameter_name}"


def _find_base(model: nn.Module, base: str | Path | None, any_base: bool) -> tuple[Path, Origin]:
    """The folder of the original and what lies there."""
    described = provenance.describe(model)
    packed_from = Origin.from_dict(described["base"], provenance.FILE) if described else None
    if base is None:
        if packed_from is None:
            raise AdapterError(
                "the model does not say which checkpoint it was packed from; pass base= (a folder or a hub "
                "id)"
            )
        base = packed_from.name
    folder = local_folder(base, described)
    stored = getattr(read_config(folder), "quantization_config", None)
    if stored is not None:
        raise CheckpointError(
            f"{base} is packed or quantized itself, so what packing lost is not to be seen there; pass base= "
            "with the checkpoint in high precision"
            + (f": the model was made of {packed_from}" if packed_from is not None else "")
        )
    origin = origin_of_files(str(base), checkpoint_files(folder))
    if packed_from is not None and not any_base and not packed_from.is_same(origin):
        raise CheckpointError(
            f"the model was packed from {packed_from}, and {origin} holds other weights; pass base= with the "
            "checkpoint that was packed, or any_base=True"
        )
    return folder, origin


class _Fitting:
    """One parameter's factors."""

    def __init__(
        self, layer: ParamWrapper, adapter_name: str, places: Places, name: str, sums: _Sums
    ) -> None:
        self.layer, self.places, self.name, self.sums = layer, places, name, sums
        self.experts, self.projection = layer._experts(), layer._projection()
        self.matrices = self.projection.shape.experts
        self.scaling = float(layer.scaling[adapter_name])
        a_weight, b_weight = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        self.a_MRK = a_weight.view(layer.num_experts, -1, a_weight.shape[1])
        self.b_NRM = b_weight.view(b_weight.shape[0], -1, layer.num_experts)
        self.rank = self.a_MRK.shape[1]

    def run(self) -> None:
        if self.layer._param_ndim == 2:
            self._one_for_all()
            return
        for expert, e_PQ in enumerate(self._lost(count=True)):
            left_PR, right_RQ = fit(e_PQ, self.rank)
            if not self.layer._did_swap_in_out_features:  # A belongs to the first axis
                self._set(expert, right_RQ.T, left_PR.T)
                left_PR, right_RQ = self.a_MRK[expert].T, self.b_NRM[:, :, expert].T
            else:
                self._set(expert, left_PR, right_RQ)
                left_PR, right_RQ = self.b_NRM[:, :, expert], self.a_MRK[expert]
            self._count(e_PQ, left_PR, right_RQ)

    def _one_for_all(self) -> None:
        """A flattened parameter: all experts share A."""
        lefts, right_RQ = fit_stacked(self._lost, self.rank)
        rows = self.b_NRM.shape[0] // self.matrices
        self._set(0, torch.cat(list(lefts)), right_RQ)
        for expert, e_PQ in enumerate(self._lost(count=True)):
            left_PR = self.b_NRM[expert * rows : (expert + 1) * rows, :, 0]
            self._count(e_PQ, left_PR, self.a_MRK[0])

    def _set(self, matrix: int, b_NR: torch.Tensor, a_RK: torch.Tensor) -> None:
        """Where the error has a smaller rank than the factors, rows of A stay as they began (with zeros in
        both, no gradient would ever reach them), and B stays zero.
        """
        found, root = a_RK.shape[0], self.scaling**0.5
        self.a_MRK[matrix, :found].copy_(a_RK / root)
        self.b_NRM[:, :found, matrix].copy_(b_NR / root)

    def _count(self, e_PQ: torch.Tensor, left_PR: torch.Tensor, right_RQ: torch.Tensor) -> None:
        rest_PQ = torch.addmm(e_PQ, left_PR.float(), right_RQ.float(), alpha=-self.scaling)
        self.sums.before += _square(e_PQ)
        self.sums.after += _square(rest_PQ)

    def _lost(self, count: bool = False) -> Iterator[torch.Tensor]:
        """``W - dq(W)`` of each expert, fp32 ``[P, Q]`` as the model stores it."""
        stack, layout = self.experts.stack(self.projection), self.experts.fourfold_layout
        device = self.experts.computing_device  # (the factors' own, also with experts in host memory)
        for expert, original_PQ in enumerate(read_matrices(self.places, self.name, self.matrices)):
            w_PQ = original_PQ.to(device)
            decoded_ENK = decode(stack.experts(expert, expert + 1).to(device), torch.float32)
            decoded_PQ = layout.from_stack(decoded_ENK, self.projection)
            e_PQ = w_PQ - decoded_PQ.view(decoded_PQ.shape[-2:])
            weight, lost = _square(w_PQ), _square(e_PQ)
            if not lost <= _OTHER_WEIGHTS**2 * weight:
                raise CheckpointError(
                    f"{self.name}: expert {expert} of the base is not what was packed (they differ by "
                    f"{(lost / weight) ** 0.5 if weight else float('inf'):.2g} of its norm); pass base= with "
                    "the checkpoint that was"
                )
            if count:
                self.sums.weight += weight
            yield e_PQ


def _square(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) ** 2


__all__ = ["LoftQ", "RoleError", "loftq_init"]
