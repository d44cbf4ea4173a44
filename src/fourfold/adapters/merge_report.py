"""What is said of a merge: figures by role, and when they are worth a warning."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

# |W - dq(W)| over |BA| beyond which a warning is given, and the share of weights that the sum leaves as they
# were.
FAR_LARGER = 10.0
MOSTLY = 0.5


@dataclass
class RoleFigures:
    """What was done to all parameters of one role, e.g. ``mlp.experts.down_proj``.

    Attributes:
        tensors: parameters.
        update: norm of BA.
        rounding: norm of what rounding to the file's dtype lost of the sum.
        unchanged: share of the weights that BA would change and that are as before after rounding.
        quantization: norm of ``W - dq(W)`` over that of BA, where the adapter says how W was packed
            (measured on the first matrix of each parameter), else None.
    """

    tensors: int
    update: float
    rounding: float
    unchanged: float
    quantization: float | None


@dataclass
class MergedCheckpoint:
    """What `merge` wrote.

    Attributes:
        folder: where it is.
        base: what was merged into.
        base_weights: ``original`` or ``dequantized``.
        files: names of the safetensors files.
        adapter_tensors: of the adapter, all of them merged.
        planned: parameters that were to be changed, which are those that were.
        keys: stored tensors that were rewritten; all others are the base's bytes.
        copied: other files, the base's bytes too.
        left_out: files with weights that the base's index does not name; they would hold the unmerged ones.
        resumed: of ``files``, those that a killed run had written already.
        roles: figures by role.
        warnings: what to look at.
        seconds: how long it took.
    """

    folder: str
    base: dict[str, Any]
    base_weights: str
    files: list[str]
    adapter_tensors: int
    planned: int
    keys: int
    copied: list[str]
    left_out: list[str]
    resumed: list[str]
    roles: dict[str, RoleFigures]
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Sums:
    """Squares and counts behind `RoleFigures`."""

    parameters: set[str] = field(default_factory=set)
    update: float = 0.0
    rounding: float = 0.0
    moved: int = 0
    unchanged: int = 0
    sampled_update: float = 0.0
    sampled_quantization: float = 0.0

    def figures(self) -> RoleFigures:
        sampled = self.sampled_update and self.sampled_quantization
        return RoleFigures(
            tensors=len(self.parameters),
            update=self.update**0.5,
            rounding=self.rounding**0.5,
            unchanged=self.unchanged / self.moved if self.moved else 0.0,
            quantization=(self.sampled_quantization / self.sampled_update) ** 0.5 if sampled else None,
        )

    def add(self, other: Sums) -> None:
        """Add the sums of other tensors."""
        self.parameters |= other.parameters
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))


_NUMBERS = tuple(f.name for f in fields(Sums) if f.name != "parameters")


@dataclass
class Tally:
    """What was done while one file was written.

    Attributes:
        written: keys that were rewritten.
        applied: parameter -> weights of it that were written.
        sums: by role.
    """

    written: set[str] = field(default_factory=set)
    applied: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Sums] = field(default_factory=dict)

    def add(self, other: Tally) -> None:
        """Add what was done for another file."""
        self.written |= other.written
        for name, weights in other.applied.items():
            self.applied[name] = self.applied.get(name, 0) + weights
        for role, sums in other.sums.items():
            self.sums.setdefault(role, Sums()).add(sums)

    def to_dict(self) -> dict[str, Any]:
        """In JSON's types."""
        sums = {role: asdict(of) | {"parameters": sorted(of.parameters)} for role, of in self.sums.items()}
        return {"written": sorted(self.written), "applied": self.applied, "sums": sums}

    @classmethod
    def read(cls, stored: Any) -> Tally | None:
        """What `to_dict` gave; None of anything else (another release may have written it)."""
        try:
            sums = {
                role: Sums(**(of | {"parameters": set(of["parameters"])}))
                for role, of in stored["sums"].items()
            }
            return cls(set(stored["written"]), dict(stored["applied"]), sums)
        except (KeyError, TypeError, AttributeError, ValueError):
            return None


def find_warnings(roles: dict[str, RoleFigures], base_weights: str) -> list[str]:
    """What a user should look at, with the figures behind it."""
    said = []
    for role, figures in roles.items():
        ratio = figures.quantization
        if base_weights == "original" and ratio is not None and ratio > FAR_LARGER:
            said.append(
                f"{role}: |W - dq(W)| is {ratio:.0f} times |BA|: the merged model differs more from the one "
                "that was trained than the adapter changed it. Compare with base_weights=dequantized"
            )
        if figures.unchanged > MOSTLY:
            said.append(
                f"{role}: {figures.unchanged:.0%} of the weights that BA changes are as before after "
                f"rounding (|rounding| {figures.rounding:.2g}, |BA| {figures.update:.2g}): much of the "
                "adapter is lost in the base's dtype. Serve it unmerged, or merge into a copy of the base in "
                "fp32"
            )
        if figures.update == 0:
            said.append(f"{role}: BA is zero everywhere; was the adapter trained?")
    return said
