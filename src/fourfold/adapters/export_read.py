"""Reading an adapter for export: its configuration, its factors, and which way its files pack them.

Four ways of packing give files of equal keys, two of them of equal shapes: what is read wrongly raises
nothing and answers nonsense. So the marks that the writers leave decide (`peft_version`, `lora_B_layout`),
then shapes, and where neither does, the caller is asked.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import InvalidVersion, Version

from fourfold.adapters.export_base import Target
from fourfold.adapters.factor_file import AdapterFile, Lazy
from fourfold.errors import AdapterError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SOURCE_LAYOUTS = ("peft", "peft-0.18", "unsloth")
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.(?:lora_(?P<linear>[AB])\.weight|lora_embedding_(?P<embedding>[AB]))")
_ASK = f"pass --source-layout (source_layout=): {', '.join(SOURCE_LAYOUTS)}"

# Settings that change what the factors mean; with the value that means nothing. Servers refuse or ignore
# them.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False, {}),
    "megatron_config": (None, {}),
}
# Initialisations that leave the base's weights as they are, at least once the adapter is saved.
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "lora_ga", "mica")


@dataclass(frozen=True)
class Module:
    """LoRA factors of one module as the file holds them, A and B, and whether they are an embedding's."""

    a: Lazy
    b: Lazy
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies in its folder.

    Attributes:
        folder: where.
        config: adapter_config.json.
        modules: name in the file, without PEFT's prefix -> factors.
        file: that holds them.
    """

    folder: Path
    config: dict[str, Any]
    modules: dict[str, Module]
    file: AdapterFile | None = None

    def rank(self, name: str) -> int:
        """r of a module or parameter, as `rank_pattern` says."""
        return int(_by_pattern(self.config.get("rank_pattern"), name, self.config["r"]))

    def scaling(self, name: str) -> float:
        """What multiplies ``B A`` there: alpha / r, or alpha / sqrt(r) with rsLoRA."""
        alpha = _by_pattern(self.config.get("alpha_pattern"), name, self.config["lora_alpha"])
        rank = self.rank(name)
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def parameters(self, experts: str) -> list[str]:
        """Names of the parameters of module ``experts`` that `target_parameters` names."""
        found = []
        for target in self.config.get("target_parameters") or ():
            container, _, parameter = target.rpartition(".")
            fits = not container or experts == container or experts.endswith(f".{container}")
            if fits and parameter not in found:
                found.append(parameter)
        return found


def _by_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key that matches the end of the name, from a dot on."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter and refuse what has no meaning as plain LoRA.

    Raises:
        AdapterError: there is none, it is damaged or pickled, or it holds what servers would refuse.
    """
    folder = Path(folder).expanduser()
    path = folder / CONFIG
    if not path.is_file():
        raise AdapterError(f"{folder} holds no adapter (no {CONFIG} in it)")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise TypeError("it is no object")
        for name in ("r", "lora_alpha"):
            if (
                isinstance(config[name], bool)
                or not isinstance(config[name], (int, float))
                or config[name] <= 0
            ):
                raise ValueError(f"{name} is {config[name]!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise AdapterError(f"{path} is no adapter's configuration ({error!r})") from error
    _refuse(config, path)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise AdapterError(f"{folder} holds no {WEIGHTS}; other formats are not read")
    file = AdapterFile(weights)
    return Adapter(folder, config, _modules({key: file.lazy(key) for key in file.shapes}, weights), file)


def _refuse(config: Mapping[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be exported")
    for name, harmless in _REFUSED.items():
        if config.get(name) not in harmless:
            raise AdapterError(
                f"{path}: {name}={config[name]!r} cannot be exported: servers refuse it, or ignore it and "
                "answer otherwise. Merge the adapter into its base instead"
            )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower() not in _HARMLESS_INITS:
        raise AdapterError(
            f"{path}: init_lora_weights={init!r} changes the base's weights when PEFT loads the adapter, "
            "which servers do not; convert it to plain LoRA when saving "
            "(path_initial_model_for_weight_conversion)"
        )


def _modules(tensors: Mapping[str, Lazy], path: Path) -> dict[str, Module]:
    halves: dict[str, dict[str, Lazy]] = {}
    embeddings = set()
    for key, tensor in tensors.items():
        match = _FACTOR.fullmatch(key.removeprefix(_PREFIX))
        if match is None:
            advice = "an adapter with such tensors cannot be exported"
            if key.endswith(".base_layer.weight"):
                advice = "save it with save_embedding_layers=False, if the vocabulary is the base's own"
            raise AdapterError(f"{path}: {key} is no LoRA factor; {advice}")
        if len(tensor.shape) < 2:
            raise AdapterError(f"{path}: {key} is {list(tensor.shape)}, and a LoRA factor is a matrix")
        halves.setdefault(match["module"], {})[match["linear"] or match["embedding"]] = tensor
        if match["embedding"]:
            embeddings.add(match["module"])
    for name, pair in halves.items():
        if pair.keys() != {"A", "B"}:
            raise AdapterError(f"{path}: {name} has lora_{next(iter(pair))} but not the other factor")
    return {name: Module(pair["A"], pair["B"], name in embeddings) for name, pair in halves.items()}


@dataclass(frozen=True)
class Packing:
    """Which way an adapter packs experts.

    Attributes:
        grouped: B's expert is the slowest axis (Unsloth's older files).
        writer: the first of PEFT's releases that write as this one did: ``0.17``, ``0.19.0`` or ``0.19.1``;
            None where nothing says.
        asked: the caller said so.
    """

    grouped: bool
    writer: str | None
    asked: bool


def packing_of(adapter: Adapter, source_layout: str | None) -> Packing:
    """From the caller's word or the adapter's marks.

    Raises:
        AdapterError: they contradict each other, or there is a trace of Unsloth without the mark.
    """
    if source_layout not in (None, *SOURCE_LAYOUTS):
        raise AdapterError(f"source_layout={source_layout!r} is none of {', '.join(SOURCE_LAYOUTS)}")
    path = adapter.folder / CONFIG
    mark = adapter.config.get("lora_B_layout")
    if mark not in (None, "rank_major", "grouped_by_expert"):
        raise AdapterError(f"{path}: lora_B_layout={mark!r} is unknown; {_ASK} after removing that key")
    writer = _writer(adapter.config.get("peft_version"))
    if source_layout is None:
        traces = _by_unsloth(adapter)
        if mark is None and traces:
            raise AdapterError(
                f"{path}: Unsloth wrote it, but lora_B_layout is missing; both orders of lora_B fit its "
                "shapes, and the wrong one gives every expert another's update. If it was trained with a "
                f"release of before September 2026 it is unsloth, else peft: {_ASK}"
            )
        return Packing(mark == "grouped_by_expert", writer, asked=False)
    if mark is not None and (mark == "grouped_by_expert") != (source_layout == "unsloth"):
        raise AdapterError(
            f"{path} says lora_B_layout={mark!r}, which contradicts --source-layout {source_layout}"
        )
    if source_layout == "unsloth":
        return Packing(True, writer, asked=True)
    if source_layout == "peft":
        return Packing(False, "0.19.1", asked=True)
    return Packing(False, "0.19.0" if writer == "0.19.0" else "0.17", asked=True)


def _by_unsloth(adapter: Adapter) -> bool:
    """Whether Unsloth may have trained it; what Fourfold trained has its own file beside it."""
    if (adapter.folder / "fourfold.json").is_file():
        return False
    marked = (adapter.config.get("auto_mapping") or {}).get("unsloth_fixed", False)
    named = re.search(r"(^|/)(models--)?unsloth(/|--)", str(adapter.config.get("base_model_name_or_path")))
    return bool(marked or named)


def _writer(version: Any) -> str | None:
    """By `peft_version`, which PEFT did not write at all before 0.18."""
    try:
        parsed = Version(str(version).partition("@")[0])
    except InvalidVersion:
        return None
    if parsed.is_prerelease and parsed.release in ((0, 19, 0), (0, 19, 1)):
        return None
    if parsed < Version("0.19.0"):
        return "0.17"
    return "0.19.0" if parsed < Version("0.19.1") else "0.19.1"


def swapped(
    packing: Packing, factors: Mapping[str, Module], targets: Mapping[str, Target] | None, where: str
) -> bool:
    """Whether in and out are exchanged in the factors of one experts module (in all of them, or in none).

    Args:
        packing: of the adapter.
        factors: parameter -> flat factors.
        targets: parameter -> what the base has there, if known.
        where: the module, for messages.

    Raises:
        AdapterError: nothing tells, or shapes contradict the caller or the base.
    """
    by_shape = _by_base(factors, targets, where) if targets else _by_each_other(factors, where)
    by_mark: bool | None = None
    if packing.writer is not None and targets:
        target = next(iter(targets.values()))
        # Which axis of the parameter A is as wide as: 0.17 took the first; 0.19.0 looked at
        # `is_transposed`, and exchanged the wrong ones; 0.19.1 exchanges the others.
        first = {"0.17": True, "0.19.0": not target.says_transposed, "0.19.1": target.says_transposed}
        by_mark = first[packing.writer] != target.stored_transposed
    elif packing.writer == "0.17":
        # Of experts stored out-by-in, as all but a few are, if the caller says so; shapes know better.
        by_mark = True if packing.asked else None
    elif packing.writer is not None:
        by_mark = packing.writer == "0.19.0"  # (if experts stored in-by-out say so)
    if by_shape is None and by_mark is None:
        raise AdapterError(
            f"{where}: peft_version does not tell which way round the factors are, and both ways fit their "
            f"shapes; {_ASK}, or name the base's configuration (--base)"
        )
    if by_shape is not None and by_mark is not None and by_shape != by_mark and packing.asked and targets:
        raise AdapterError(f"{where}: the factors' shapes contradict --source-layout")
    result = by_shape if by_shape is not None else by_mark
    assert result is not None
    return result


def _by_base(factors: Mapping[str, Module], targets: Mapping[str, Target], where: str) -> bool | None:
    answers = set()
    for parameter, module in factors.items():
        target = targets[parameter]
        widths, straight = (module.a.shape[1], module.b.shape[0]), (target.columns, target.rows)
        if widths == straight[::-1] != straight:
            answers.add(True)
        elif widths == straight != straight[::-1]:
            answers.add(False)
        elif widths != straight:
            raise AdapterError(
                f"{where}.{parameter}: factors for {widths[0]} in and {widths[1]} out, but the base has "
                f"{straight[0]} in and {straight[1]} out; it is another model's"
            )
    if len(answers) > 1:
        raise AdapterError(f"{where}: the factors of {' and '.join(factors)} are not the same way round")
    return answers.pop() if answers else None


def _by_each_other(factors: Mapping[str, Module], where: str) -> bool | None:
    """Without the base: what goes into gate_up comes out of down, and half of what gate_up gives goes in."""
    if set(factors) != {"gate_up_proj", "down_proj"}:
        return None
    up, down = factors["gate_up_proj"], factors["down_proj"]
    straight = up.a.shape[1] == down.b.shape[0] and up.b.shape[0] == 2 * down.a.shape[1]
    exchanged = up.b.shape[0] == down.a.shape[1] and up.a.shape[1] == 2 * down.b.shape[0]
    if not straight and not exchanged:
        raise AdapterError(f"{where}: the factors of gate_up_proj and down_proj do not belong together")
    return exchanged
