"""`MoeBitsAndBytesConfig`: every setting of bitsandbytes, for experts as for Linears."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import BitsAndBytesConfig

from fourfold.errors import CheckpointError, ConfigurationError
from fourfold.formats import PackFormat
from fourfold.loading.arguments import LINEARS_ONLY, PLAIN
from fourfold.loading.origin import Origin
from fourfold.version import __version__

QUANT_METHOD = "fourfold"
FORMAT_VERSION = 1
MODEL_NAMES = (
    "model"  # tensors are stored under the model's own names (absent: under the names of the original)
)
_EXPERTS_TYPES = (None, "nf4", "fp4", "int8", "none")


class MoeBitsAndBytesConfig(BitsAndBytesConfig):
    """Quantization of Linears by bitsandbytes, and of fused experts in the same formats.

    Takes every argument of transformers' `BitsAndBytesConfig` with its meaning and default (4 bit is FP4
    unless ``bnb_4bit_quant_type`` says otherwise), except that ``bnb_4bit_compute_dtype`` left unset means
    the model's dtype (bitsandbytes' own default multiplies in fp32).

    Args:
        experts_quant_type: ``None`` follows the Linears (``load_in_4bit``: ``bnb_4bit_quant_type``;
            ``load_in_8bit``: INT8); ``"nf4"``, ``"fp4"``, ``"int8"`` set another format for experts (also
            with neither ``load_in_4bit`` nor ``load_in_8bit``: then experts alone are quantized); ``"none"``
            leaves experts in high precision.
        experts_blocksize: values that share one absmax in 4-bit experts; 64 is bitsandbytes' own for Linears.
        experts_device: ``"cpu"`` puts packed experts straight into host memory, from where each module's are
            brought to the device that the device map says while it computes (see `fourfold.offload`);
            ``"disk"`` leaves them in the files of a checkpoint that is packed already, from where each
            module's are read ahead of their use; None puts them where the device map says. A matter of this
            machine: it is not stored, and is given for packed checkpoints too.

    Attributes:
        read_from: the configuration of a checkpoint in another quantized format that is being read; never
            written.
        base: the checkpoint that was packed, as far as it is known; set while loading, and stored.

    Raises:
        ConfigurationError: unknown settings, or settings that contradict each other.
        CheckpointError: the settings come from a checkpoint of a newer format.
    """

    def __init__(
        self,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        llm_int8_threshold: float = 6.0,
        llm_int8_skip_modules: list[str] | None = None,
        llm_int8_enable_fp32_cpu_offload: bool = False,
        llm_int8_has_fp16_weight: bool = False,
        bnb_4bit_compute_dtype: torch.dtype | str | None = None,
        bnb_4bit_quant_type: str | None = None,
        bnb_4bit_use_double_quant: bool = False,
        bnb_4bit_quant_storage: torch.dtype | str | None = None,
        experts_quant_type: str | None = None,
        experts_blocksize: int = 64,
        experts_device: str | None = None,
        **kwargs: Any,
    ) -> None:
        if (stored := kwargs.pop("linears", None)) is not None:  # how a checkpoint says what `to_dict` wrote
            if stored not in ("4bit", "8bit", "none"):
                raise CheckpointError(f"config.json says linears={stored!r}; valid are 4bit, 8bit, none")
            load_in_4bit, load_in_8bit = stored == "4bit", stored == "8bit"
        version = kwargs.pop("format_version", FORMAT_VERSION)
        tensor_names = kwargs.pop("tensor_names", None)  # set by the quantizer, of what it has packed
        base = Origin.from_dict(kwargs.pop("base", None), "quantization_config")  # (likewise)
        for known in ("quant_method", "fourfold_version", "_load_in_4bit", "_load_in_8bit"):
            kwargs.pop(known, None)
        if kwargs:
            raise ConfigurationError(f"unknown quantization setting(s): {', '.join(sorted(kwargs))}")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise CheckpointError(
                f"this checkpoint has Fourfold's format version {version}, and this release reads up to "
                f"{FORMAT_VERSION}; install a newer fourfold"
            )
        if load_in_4bit and load_in_8bit:
            raise ConfigurationError("load_in_4bit and load_in_8bit are both set; choose one")
        if bnb_4bit_quant_type is not None and stored is None and load_in_8bit:
            raise ConfigurationError(
                f"bnb_4bit_quant_type={bnb_4bit_quant_type!r} has no meaning with load_in_8bit; set "
                "load_in_4bit instead, or experts_quant_type for 4-bit experts beside 8-bit Linears"
            )
        super().__init__(
            load_in_8bit=load_in_8bit,
            load_in_4bit=load_in_4bit,
            llm_int8_threshold=llm_int8_threshold,
            llm_int8_skip_modules=llm_int8_skip_modules,
            llm_int8_enable_fp32_cpu_offload=llm_int8_enable_fp32_cpu_offload,
            llm_int8_has_fp16_weight=llm_int8_has_fp16_weight,
            bnb_4bit_compute_dtype=bnb_4bit_compute_dtype,
            bnb_4bit_quant_type="fp4" if bnb_4bit_quant_type is None else bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=bnb_4bit_use_double_quant,
            bnb_4bit_quant_storage=bnb_4bit_quant_storage,
        )
        self.quant_method = QUANT_METHOD
        self.compute_dtype_is_set = bnb_4bit_compute_dtype is not None
        self.experts_quant_type = experts_quant_type
        self.experts_blocksize = experts_blocksize
        self.experts_device = experts_device
        self.or_disk = False  # with "cpu": experts stay on disk where host memory does not hold them
        self.read_from: dict[str, Any] | None = None
        self.tensor_names = tensor_names
        self.base = base
        self.only_written = False  # set by `quantize_checkpoint`: weights pass through, nothing is computed
        self._check()

    def reading(self, stored: dict[str, Any]) -> MoeBitsAndBytesConfig:
        """A copy for a checkpoint that is stored in another format, described by ``stored``."""
        made = copy.copy(self)
        made.read_from = stored
        return made

    def _check(self) -> None:
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ConfigurationError(f"bnb_4bit_quant_type={self.bnb_4bit_quant_type!r}; valid are nf4, fp4")
        if self.experts_quant_type not in _EXPERTS_TYPES:
            raise ConfigurationError(
                f"experts_quant_type={self.experts_quant_type!r}; valid are None (as the Linears), nf4, fp4, "
                "int8, none"
            )
        if self.tensor_names not in (None, MODEL_NAMES):
            raise CheckpointError(
                f"this checkpoint has tensor_names={self.tensor_names!r}, which this release does not know; "
                "install a newer fourfold"
            )
        fmt = self.experts_format()
        if self.experts_device not in (None, "cpu", "disk"):
            raise ConfigurationError(
                f"experts_device={self.experts_device!r}; valid are 'cpu' (host memory), 'disk' (the files "
                "of a packed checkpoint) and None (where the device map says)"
            )
        if self.experts_device is not None and fmt is None and self.is_linear_quantized:
            raise ConfigurationError(
                f"experts_device={self.experts_device!r} is for packed experts, and these stay in high "
                "precision; leave it out, or choose an experts_quant_type"
            )
        if fmt is None and not self.is_linear_quantized:
            raise ConfigurationError(
                "nothing is to be quantized: set load_in_4bit or load_in_8bit, or an experts_quant_type"
            )
        if self.experts_blocksize != 64 and (fmt is None or not fmt.is_4bit):
            raise ConfigurationError(
                f"experts_blocksize={self.experts_blocksize} has no meaning for experts in "
                f"{'high precision' if fmt is None else 'INT8 (one absmax per row)'}; leave it out"
            )
        if self.bnb_4bit_use_double_quant and not self.load_in_4bit and not (fmt and fmt.is_4bit):
            raise ConfigurationError("bnb_4bit_use_double_quant is set but nothing is quantized to 4 bit")

    @property
    def is_linear_quantized(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    def experts_format(self) -> PackFormat | None:
        """How experts are packed; None leaves them in high precision."""
        quant_type = self.experts_quant_type
        if quant_type is None:
            if self.load_in_8bit:
                quant_type = "int8"
            elif self.load_in_4bit:
                quant_type = self.bnb_4bit_quant_type
        if quant_type in (None, "none"):
            return None
        if quant_type == "int8":
            return PackFormat("int8")
        return PackFormat(quant_type, self.experts_blocksize, self.bnb_4bit_use_double_quant)

    def is_quantizable(self) -> bool:
        return True

    def quantization_method(self) -> str | None:
        return super().quantization_method() or QUANT_METHOD

    def linears_config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """The plain configuration that Linears are quantized with; ``dtype`` is the model's."""
        settings = {name: getattr(self, name) for name in PLAIN}
        if not self.compute_dtype_is_set:
            settings["bnb_4bit_compute_dtype"] = dtype
        return BitsAndBytesConfig(**settings)

    def to_dict(self) -> dict[str, Any]:
        """What is written into ``config.json``.

        Without ``load_in_4bit``: transformers looks at that key before ``quant_method``, and would take a
        packed checkpoint for one of plain bitsandbytes.
        """
        return {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "fourfold_version": __version__,
            "tensor_names": self.tensor_names,
            "base": self.base.to_dict() if self.base else None,
            "linears": "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else "none",
            "llm_int8_threshold": self.llm_int8_threshold,
            "llm_int8_skip_modules": self.llm_int8_skip_modules,
            "llm_int8_enable_fp32_cpu_offload": self.llm_int8_enable_fp32_cpu_offload,
            "llm_int8_has_fp16_weight": self.llm_int8_has_fp16_weight,
            "bnb_4bit_compute_dtype": (
                str(self.bnb_4bit_compute_dtype).removeprefix("torch.") if self.compute_dtype_is_set else None
            ),
            "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
            "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
            "bnb_4bit_quant_storage": str(self.bnb_4bit_quant_storage).removeprefix("torch."),
            "experts_quant_type": self.experts_quant_type,
            "experts_blocksize": self.experts_blocksize,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def linears_only_settings(self) -> list[str]:
        """Settings that differ from their default and concern Linears alone, for the report."""
        default = {"llm_int8_threshold": 6.0, "bnb_4bit_quant_storage": torch.uint8}
        return [n for n in LINEARS_ONLY if getattr(self, n) != default.get(n, False)]
