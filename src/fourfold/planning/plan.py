"""The memory of a training run, before a weight is read.

Weights are counted as `verify` counts them after loading, on a skeleton of the same shapes; adapters and
gradients are fp32 parameters of that skeleton with LoRA on it; the optimizer holds what `optimizers` says;
activations come from a step on fake tensors (`simulate`). The peak is the greatest of three moments:

- forward and loss: what is kept for backward grows, the loss lies on top
- backward: gradients grow while what was kept goes; each layer adds what it recomputes and works with
- the optimizer's step: all gradients, and what the optimizer makes on the way
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from fourfold.adapters.peft_lora import add_lora
from fourfold.errors import ConfigurationError, NoExpertsError
from fourfold.experts import expert_targets
from fourfold.loading.config import MoeBitsAndBytesConfig
from fourfold.loading.prepare import prepare
from fourfold.loading.skeleton import build_skeleton, read_config
from fourfold.offloading.sizes import parse_bytes
from fourfold.planning.card import CONTEXT_BYTES, spare
from fourfold.planning.optimizers import STATES, optimizer_bytes
from fourfold.planning.placement import ExpertUnits, Placement, check_asked, place
from fourfold.planning.report import Report, make_report
from fourfold.planning.simulate import Activations, simulate_step
from fourfold.planning.standins import Target

# cuBLAS keeps a workspace once a product has run: 32 MiB on Hopper and later, else 8 MiB and a little.
LIBRARIES = {True: 32 * 2**20, False: 8519680}


@dataclass(frozen=True)
class Settings:
    """What the memory of a run depends on.

    Attributes:
        quantization: as for `from_pretrained`; None where nothing is packed while loading.
        target_modules: LoRA targets among the modules; None is the attention projections.
        target_parameters: among the parameters; None is the experts' projections.
        r: rank.
        rank_pattern: other ranks by name.
        exclude_modules: not wrapped though a target.
        modules_to_save: modules trained as a whole, in fp32.
        batch: examples in a micro batch.
        length: tokens of each.
        accumulation: micro batches in a step.
        bf16: whether the model is in bf16 (else fp32).
        checkpointing: whether activations are recomputed.
        optimizer: the trainer's name of it.
        padded: whether examples of a batch differ in length.
        loss_positions: how many positions of an example have a loss; None is all.
        experts_offload: where packed experts lie: "cpu" (host memory), "auto" (as many on the card as fit) or
            "disk"; None is where ``quantization`` says, which is the card if it says nothing.
        gpu_budget: with "auto", bytes that experts may take on the card; None is what ``card`` leaves.
        card: bytes of it.
    """

    quantization: MoeBitsAndBytesConfig | None = None
    target_modules: tuple[str, ...] | str | None = None
    target_parameters: tuple[str, ...] | None = None
    r: int = 8
    rank_pattern: tuple[tuple[str, int], ...] = ()
    exclude_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    batch: int = 1
    length: int = 2048
    accumulation: int = 1
    bf16: bool = True
    checkpointing: bool = True
    optimizer: str = "adamw_torch_fused"
    padded: bool = False
    loss_positions: int | None = None
    experts_offload: str | None = None
    gpu_budget: int | None = None
    card: int | None = None

    def __post_init__(self) -> None:
        check_asked(self.__dict__)
        if self.optimizer not in STATES:
            raise ConfigurationError(f"optimizer: {self.optimizer} is not one of {', '.join(STATES)}")


@dataclass
class Plan:
    """Bytes of a run; ``str(plan)`` says the peak, `to_dict` is for machines.

    Attributes:
        model: what was planned.
        settings: the settings, as text and numbers.
        target: what it would run on.
        weights: of the loaded model, by role and format.
        trained: parameters of the adapters.
        adapters: their bytes.
        optimizer: the optimizer's states on the device.
        optimizer_paged: and in paged memory.
        optimizer_step: what a step makes on the way.
        libraries: what cuBLAS keeps.
        activations: of a micro batch, with the checkpointing asked for.
        otherwise: the same with the other choice of checkpointing.
        accumulates: whether gradients are there when a micro batch begins.
        unknown: why activations are not known; then `peak` is without them, a lower bound.
        experts: bytes of packed experts among the weights.
        placement: where those lie; None is all on the device.
    """

    model: str
    settings: dict[str, Any]
    target: Target
    weights: Report
    trained: int
    adapters: int
    optimizer: int
    optimizer_paged: int
    optimizer_step: int
    libraries: int
    activations: Activations | None
    otherwise: Activations | None = None
    accumulates: bool = False
    unknown: str = ""
    notes: list[str] = field(default_factory=list)
    experts: int = 0
    placement: Placement | None = None

    @property
    def away(self) -> int:
        """Of the weights' bytes, those that the device does not hold (buffers for them are on it)."""
        return 0 if self.placement is None else self.experts - self.placement.on_device

    def beside_experts(self, card: int) -> int:
        """What a card of so many bytes has to keep free for the run, when all but its experts is loaded."""
        return max(0, self.peak - (self.weights.bytes - self.away) + spare(card))

    @property
    def gradients(self) -> int:
        """Of all adapters (as large as they are)."""
        return self.adapters

    @property
    def resident(self) -> int:
        """What lies there between two steps."""
        return self.weights.bytes - self.away + self.adapters + self.optimizer + self.libraries

    def working(self, activations: Activations | None) -> int:
        """The most that a step needs beside what is resident."""
        moments = [self.gradients + self.optimizer_step]
        if activations is not None:
            peak = activations.peak
            if self.accumulates:
                peak = self.gradients + activations.peak_beside_gradients
            moments.append(peak)
        return max(moments)

    @property
    def peak(self) -> int:
        """The most that is allocated at a time."""
        return self.resident + self.working(self.activations)

    @property
    def peak_otherwise(self) -> int | None:
        """The same with the other choice of checkpointing."""
        return None if self.otherwise is None else self.resident + self.working(self.otherwise)

    def parts(self) -> dict[str, int]:
        """The peak, by what it is made of."""
        parts: dict[str, int] = {}
        for row in self.weights.rows:
            name = row.role if row.role in ("experts", "linears") else "other weights"
            parts[name] = parts.get(name, 0) + row.bytes
        if self.away:
            parts["experts"] -= self.away
        parts["adapters"] = self.adapters
        parts["optimizer"] = self.optimizer
        parts["gradients"] = self.gradients
        # (in backward the last gradients are not there yet, and some of what was kept is gone)
        rest = self.working(self.activations) - self.gradients
        if rest < 0:
            parts["gradients"] += rest
            rest = 0
        kept = 0 if self.activations is None else min(rest, self.activations.kept)
        parts["activations kept"] = kept
        parts["working memory"] = rest - kept
        parts["libraries"] = self.libraries
        return {name: count for name, count in parts.items() if count}

    def to_dict(self) -> dict[str, Any]:
        """Everything, for ``--json``."""
        return {
            "model": self.model,
            "settings": self.settings,
            "target": asdict(self.target),
            "weights": self.weights.to_dict(),
            "trained_parameters": self.trained,
            "adapters": self.adapters,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "optimizer_paged": self.optimizer_paged,
            "optimizer_step": self.optimizer_step,
            "libraries": self.libraries,
            "activations": None if self.activations is None else asdict(self.activations),
            "activations_otherwise": None if self.otherwise is None else asdict(self.otherwise),
            "activations_unknown": self.unknown or None,
            "offload": None if self.placement is None else self.placement.to_dict(),
            "resident": self.resident,
            "peak": self.peak,
            "peak_otherwise": self.peak_otherwise,
            "parts": self.parts(),
        }

    def __str__(self) -> str:
        lower = "at least " if self.activations is None else ""
        peak, resident = self.peak / 2**30, self.resident / 2**30
        return f"{self.model}: {lower}{peak:.2f} GiB, {resident:.2f} of them resident"


class Planner:
    """Plans of one model under different settings; what they share is computed once.

    Args:
        model: local folder, bare ``config.json``, hub id, or a configuration.
        target: what it would run on.
    """

    def __init__(self, model: str | Path | PretrainedConfig, target: Target | None = None) -> None:
        self.name = type(model).__name__ if isinstance(model, PretrainedConfig) else str(model)
        self.config = model if isinstance(model, PretrainedConfig) else read_config(model)
        self.target = target or here()
        self._activations: dict[tuple[Any, ...], tuple[Activations | None, str]] = {}
        self._adapted: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        self._reports: dict[tuple[Any, ...], Report] = {}
        self._experts: dict[tuple[Any, ...], ExpertUnits] = {}

    def skeleton(self, settings: Settings) -> Any:
        """The model as it would be loaded, without weights."""
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        return build_skeleton(self.config, settings.quantization, dtype=dtype, causal=True)

    def with_adapters(self, settings: Settings) -> Any:
        """The same with LoRA on it."""
        model = prepare(self.skeleton(settings), gradient_checkpointing=False)
        modules, parameters = settings.target_modules, settings.target_parameters
        if parameters is None:
            parameters = default_parameters(model)
        if modules is None:
            modules = tuple(attention_projections(model))
        excluded = settings.exclude_modules
        with torch.device("meta"):
            return add_lora(
                model,
                r=settings.r,
                alpha=settings.r,
                target_modules=modules if isinstance(modules, str) else list(modules),
                target_parameters=list(parameters),
                rank_pattern=dict(settings.rank_pattern),
                exclude_modules=list(excluded) if isinstance(excluded, tuple) else excluded,
                modules_to_save=list(settings.modules_to_save) or None,
            )

    def plan(self, settings: Settings, *, both: bool = False) -> Plan:
        """Plan one run.

        Args:
            settings: its settings.
            both: also what the other choice of checkpointing would mean.

        Raises:
            FourfoldError: the model cannot be loaded like that, or a target is none.
        """
        report, shapes = self._weights(settings)
        bytes_ = optimizer_bytes(settings.optimizer, shapes, on_gpu=self.target.is_cuda)
        activations, unknown = self._simulate(settings, settings.checkpointing)
        otherwise = None
        if both and activations is not None:
            otherwise, _ = self._simulate(settings, not settings.checkpointing)
        trained = sum(torch.Size(shape).numel() for shape in shapes)
        hopper = (self.target.capability or (0, 0)) >= (9, 0)
        units = self._units(settings)
        plan = Plan(
            model=self.name,
            settings=described(settings),
            target=self.target,
            weights=report,
            trained=trained,
            adapters=4 * trained,
            optimizer=bytes_.states,
            optimizer_paged=bytes_.paged,
            optimizer_step=bytes_.step,
            libraries=LIBRARIES[hopper] if self.target.is_cuda else 0,
            activations=activations,
            otherwise=otherwise,
            accumulates=settings.accumulation > 1,
            unknown=unknown,
            experts=sum(units.stored),
        )
        plan.placement = self._placement(settings, units, plan)
        return plan

    def floor(self, settings: Settings) -> int:
        """What the peak cannot be below, whatever its activations: found without running a step."""
        report, shapes = self._weights(settings)
        bytes_ = optimizer_bytes(settings.optimizer, shapes, on_gpu=self.target.is_cuda)
        trained = sum(torch.Size(shape).numel() for shape in shapes)
        away, units = 0, self._units(settings)
        if self._kind(settings) is not None and units.sizes and self.target.is_cuda:
            away = sum(units.stored) - max(units.sizes)  # (one buffer is the least)
        return report.bytes - away + bytes_.states + bytes_.step + 8 * trained

    def _kind(self, settings: Settings) -> str | None:
        if settings.experts_offload is not None:
            return settings.experts_offload
        return None if settings.quantization is None else settings.quantization.experts_device

    def _units(self, settings: Settings) -> ExpertUnits:
        """The packed experts."""
        base = _base_key(settings)
        if base not in self._experts:
            self._experts[base] = ExpertUnits.of(self.skeleton(settings))
        return self._experts[base]

    def _placement(self, settings: Settings, units: ExpertUnits, plan: Plan) -> Placement | None:
        """Where experts lie. ``plan`` is that of all of them on the device.

        Raises:
            ConfigurationError: nothing is known of the card's memory, or the budget has no room for a module.
        """
        kind, is_cuda = self._kind(settings), self.target.is_cuda
        if kind is None or not units.sizes:
            return None
        budget = settings.gpu_budget
        if kind == "auto" and budget is None:
            if not is_cuda or settings.card is None:
                raise ConfigurationError(
                    "experts_offload: auto keeps as many experts on the card as it has room for, and no card "
                    "is known. Name its size (--gpu 24GiB), give gpu_budget, or set experts_offload: cpu."
                )
            # What `offload` finds free when the rest of the model is loaded, less what the run needs then. (A
            # card that has not even room for one module is too small, which the peak says.)
            free = settings.card - CONTEXT_BYTES - (plan.weights.bytes - plan.experts)
            budget = max(free - plan.beside_experts(settings.card), max(units.sizes))
        return place(kind, units, budget, checkpointing=settings.checkpointing, is_cuda=is_cuda)

    def _weights(self, settings: Settings) -> tuple[Report, list[tuple[int, ...]]]:
        base = _base_key(settings)
        if base not in self._reports:
            self._reports[base] = make_report(self.skeleton(settings))
        key = (*base, *_adapters_key(settings))
        if key not in self._adapted:
            model = self.with_adapters(settings)
            self._adapted[key] = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
        return self._reports[base], self._adapted[key]

    def _simulate(self, settings: Settings, checkpointing: bool) -> tuple[Activations | None, str]:
        key = (*_base_key(settings), *_adapters_key(settings), settings.batch, settings.length)
        key += (settings.padded, settings.loss_positions, checkpointing)
        if key not in self._activations:
            model = self.with_adapters(settings)
            try:
                found = simulate_step(
                    model,
                    self.target,
                    batch=settings.batch,
                    length=settings.length,
                    bf16=settings.bf16,
                    checkpointing=checkpointing,
                    padded=settings.padded,
                    loss_positions=settings.loss_positions,
                )
                self._activations[key] = (found, "")
            except Exception as error:  # a model's own code may raise anything where it wants numbers
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._activations[key] = (None, reason)
        return self._activations[key]


def _base_key(settings: Settings) -> tuple[Any, ...]:
    """Of the model as it is loaded (where its experts lie is no part of what a checkpoint says)."""
    quantized = None if settings.quantization is None else str(settings.quantization.to_dict())
    return quantized, settings.bf16


def _adapters_key(settings: Settings) -> tuple[Any, ...]:
    return (
        settings.target_modules,
        settings.target_parameters,
        settings.r,
        settings.rank_pattern,
        settings.exclude_modules,
        settings.modules_to_save,
    )


def described(settings: Settings) -> dict[str, Any]:
    """Settings as numbers and text."""
    found = asdict(settings)
    quantization = settings.quantization
    found["quantization"] = None if quantization is None else quantization.to_diff_dict()
    found["rank_pattern"] = dict(settings.rank_pattern)
    return found


def here() -> Target:
    """This machine: its first GPU, or its CPU."""
    if torch.cuda.is_available():
        return Target("cuda", torch.cuda.get_device_capability())
    return Target("cpu", None)


def default_parameters(model: Any) -> tuple[str, ...]:
    """The experts' projections, where there are any that can be trained."""
    try:
        return tuple(expert_targets(model))
    except NoExpertsError:
        return ()


def attention_projections(model: torch.nn.Module) -> list[str]:
    """Names of the Linears directly inside attention modules: q/k/v/o_proj in most models, MLA's or fused
    ones in others.

    Directly: what lies deeper (a sparse-attention indexer) may lie beside the path of the gradient.
    """
    found: dict[str, None] = {}
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        inside = parent.rpartition(".")[2].lower()
        if isinstance(module, torch.nn.Linear) and ("attn" in inside or "attention" in inside):
            found.setdefault(leaf)
    return list(found)


def plan(
    model: str | Path | PretrainedConfig,
    *,
    quantization_config: MoeBitsAndBytesConfig | None = None,
    capability: tuple[int, int] | None = None,
    **settings: Any,
) -> Plan:
    """The memory that training a model needs; no weight is read.

    Args:
        model: local folder, bare ``config.json``, hub id, or a configuration.
        quantization_config: as for ``from_pretrained``; None is NF4 with double quantization.
        capability: of the GPU; None is this machine's, or 8.0 where it has none.
        settings: of `Settings`: ``r``, ``batch``, ``length``, ``checkpointing``, ``optimizer``,
            ``experts_offload``, ``gpu_budget``, ``card`` (bytes, or ``"24GiB"``), ...

    Raises:
        FourfoldError: there is no such model, or a setting has no meaning for it.
    """
    if capability is None and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
    if quantization_config is None:
        quantization_config = MoeBitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
    known: Mapping[str, Any] = Settings.__dataclass_fields__
    unknown = [name for name in settings if name not in known]
    if unknown:
        raise ConfigurationError(f"plan: {unknown[0]} is no setting; they are {', '.join(known)}")
    for name in ("gpu_budget", "card"):
        if isinstance(settings.get(name), str):
            settings[name] = parse_bytes(settings[name])
    planner = Planner(model, Target("cuda", capability or (8, 0)))
    return planner.plan(Settings(quantization=quantization_config, **settings), both=True)
