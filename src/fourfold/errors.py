"""Every exception a user of Fourfold can meet.

One base class, so that ``except fourfold.errors.FourfoldError`` catches them all. A message says what is
wrong, where (module, tensor, key or file), and what to do about it. ``exit_status`` is what the command line
returns for it: 1 a check says no, 2 the input is wrong, 3 it broke on the way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class FourfoldError(Exception):
    """Base class of all errors raised by Fourfold."""

    exit_status = 2


class ConfigurationError(FourfoldError, ValueError):
    """A setting is unknown, malformed, or contradicts another one."""


class StoredFormatError(ConfigurationError):
    """A checkpoint is packed in another format than the one asked for, and is taken over only as it is.

    Attributes:
        settings: arguments of `MoeBitsAndBytesConfig` that ask for what is stored.
    """

    def __init__(self, stored: str, asked: str, settings: Mapping[str, Any]) -> None:
        self.stored, self.asked, self.settings = stored, asked, dict(settings)
        super().__init__(self.advising(", ".join(f"{name}={value!r}" for name, value in settings.items())))

    def advising(self, arguments: str) -> str:
        """The message, with ``settings`` as whoever asked writes them."""
        return (
            f"the checkpoint's {self.stored}, and the configuration asks for {self.asked}; quantizing twice "
            f"would round twice. Pass what is stored: {arguments}"
        )


class UnsupportedExpertsError(FourfoldError):
    """An experts module has a layout that cannot be packed (yet); the message names the setting that leaves
    it alone.
    """


class NoExpertsError(FourfoldError):
    """An operation on experts was asked of a model that has none."""


class UnquantizedExpertsError(FourfoldError):
    """Expert tensors are in high precision although nobody asked for that.

    Attributes:
        tensors: the full name of every such tensor.
    """

    exit_status = 1

    def __init__(self, message: str, tensors: Sequence[str]) -> None:
        super().__init__(message)
        self.tensors = list(tensors)


class CheckpointError(FourfoldError):
    """A checkpoint is missing a tensor, or holds one of a wrong shape, dtype or content."""


class AdapterError(FourfoldError, ValueError):
    """A LoRA setting has no correct meaning for packed experts, or a target matches nothing."""


class DataError(FourfoldError, ValueError):
    """A dataset is missing, malformed or empty; the message names file and line."""


class TrainingError(FourfoldError):
    """A run broke on the way (loss not finite, a factor without gradient, memory exhausted)."""

    exit_status = 3
