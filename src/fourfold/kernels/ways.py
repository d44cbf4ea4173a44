"""The ways to compute the product over packed experts, and the rule that chooses one.

    python -m fourfold.kernels        the rule, and what this machine can do

All ways compute the same sum from the same decoded weights (fp32 code times fp32 absmax, rounded once); they
differ in where those lie meanwhile:

- ``reference``    one expert after the other is decoded and multiplied in plain torch
- ``workspace``    a projection of the layer is decoded (or as much of it as ``workspace_bytes`` allows) and
  multiplied by `grouped_mm`
- ``in_product``   weights are decoded inside the product, in registers; experts without rows are not read
- ``hopper``       the same in instructions of GPUs of capability 9.x (`kernels.cuda.hopper`)
- ``few_rows``     the same, made for few rows an expert, forward alone (`kernels.cuda.few_rows`)

`RULE` is read from the top; the first line that fits, and whose way can do the problem, decides. To add a way
is to add an entry to `WAYS` and a line to `RULE`. Nothing is read from the environment: a module's ``way``
attribute, or the argument of the same name, takes the place of the rule.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fourfold.errors import ConfigurationError
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.plain import PlainStack
from fourfold.kernels.decode import HAS_TRITON
from fourfold.kernels.workspace import workspace_product

Stack = PackedStack | PlainStack
HALF = (torch.bfloat16, torch.float16)


class Problem(NamedTuple):
    """What a way is chosen for: one product of one projection.

    (A named tuple: it is made, and looked up, for every product.)

    Attributes:
        device: type of the device.
        capability: of a CUDA device.
        dtype: of rows and decoded weights.
        fmt: how the weights are packed; None where they are not.
        rows: routed rows, all experts together.
        experts: matrices of the stack.
        out: rows of a matrix.
        columns: columns of a matrix.
        rank: low-rank columns, 0 for none.
        transposed: the gradient of the input.
        plain: dtype and strides (of experts, rows, columns) of weights that are not packed.
        aligned: whether the weights begin at a multiple of 16 bytes.
    """

    device: str
    capability: tuple[int, int] | None
    dtype: torch.dtype
    fmt: PackFormat | None
    rows: int
    experts: int
    out: int
    columns: int
    rank: int = 0
    transposed: bool = False
    plain: tuple[torch.dtype, tuple[int, ...]] | None = None
    aligned: bool = True

    @property
    def rows_per_expert(self) -> float:
        """Mean over the experts that can have a row (which do is known on the device alone)."""
        return self.rows / max(1, min(self.rows, self.experts))


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def problem(rows_SM: torch.Tensor, stack: Stack, rank: int = 0, *, transposed: bool = False) -> Problem:
    """The problem of multiplying these rows with this stack."""
    shape = stack.shape
    return Problem(
        rows_SM.device.type,
        _capability(rows_SM.device),
        rows_SM.dtype,
        None if isinstance(stack, PlainStack) else stack.fmt,
        rows_SM.shape[0],
        shape.experts,
        shape.rows,
        shape.columns,
        rank,
        transposed,
        (stack.data.dtype, stack.data.stride()) if isinstance(stack, PlainStack) else None,
        # (what torch allocates on a GPU begins at a multiple of 512; a compiler's tensors have no address)
        stack.data.storage_offset() * stack.data.element_size() % 16 == 0,
    )


@dataclass(frozen=True)
class Way:
    """One way.

    Attributes:
        what: one line for people.
        cannot: why a problem is beyond it, or None.
        product: as `workspace_product`, with the low-rank columns behind the rows.
        wide: it wants them there; else it also takes them apart, as ``h_SR``.
        takes_plain: it multiplies with weights that are not packed where they lie, low-rank columns included.
        forward_alone: gradients of the input are left to the rule, also where this way is asked for.
    """

    what: str
    cannot: Callable[[Problem], str | None]
    product: Callable[..., torch.Tensor]
    wide: bool = True
    takes_plain: bool = False
    forward_alone: bool = False


def _never(problem: Problem) -> str | None:
    return None


def _reference(
    rows_SM: torch.Tensor,
    stack: Stack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None,
    limit: int | None,
    *,
    transposed: bool,
) -> torch.Tensor:
    return workspace_product(rows_SM, stack, offsets_E, factor, 0, transposed=transposed)


def _interpreting() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


def _cannot_in_product(problem: Problem) -> str | None:
    if not HAS_TRITON:
        return "it needs Triton, which is not installed"
    if problem.device != "cuda" and not _interpreting():
        return f"it runs on CUDA, and the rows are on {problem.device}"
    if problem.capability is not None and problem.capability < (8, 0):
        major, minor = problem.capability
        return f"it needs a GPU of capability 8.0 or more, and this one has {major}.{minor}"
    if problem.dtype not in (*HALF, torch.float32):
        return f"it computes in bf16, fp16 and fp32, not in {problem.dtype}"
    return None


def _in_product(
    rows_SM: torch.Tensor,
    stack: Stack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None,
    limit: int | None,
    *,
    transposed: bool,
    h_SR: torch.Tensor | None = None,
) -> torch.Tensor:
    from fourfold.kernels.product_triton import product_triton

    if factor is not None and h_SR is None:
        columns = stack.shape.rows if transposed else stack.shape.columns
        rows_SM, h_SR = rows_SM[:, :columns], rows_SM[:, columns:]
    return product_triton(rows_SM, stack, offsets_E, h_SR, factor, transposed=transposed)


def _cannot_hopper(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA, and the rows are on {problem.device}"
    from fourfold.kernels.cuda import hopper

    shape = StackShape(problem.experts, problem.out, problem.columns)
    return hopper.refusal(
        problem.fmt, shape, problem.dtype, problem.capability, plain=problem.plain, aligned=problem.aligned
    )


def _hopper(
    rows_SM: torch.Tensor,
    stack: Stack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None,
    limit: int | None,
    *,
    transposed: bool,
    h_SR: torch.Tensor | None = None,
) -> torch.Tensor:
    from fourfold.kernels.cuda import hopper

    return hopper.hopper_product(rows_SM, stack, offsets_E, factor, transposed=transposed, low_SR=h_SR)


def _cannot_few_rows(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"it runs on CUDA, and the rows are on {problem.device}"
    from fourfold.kernels.cuda import few_rows

    return few_rows.refusal(
        problem.fmt,
        StackShape(problem.experts, problem.out, problem.columns),
        problem.dtype,
        problem.capability,
        transposed=problem.transposed,
        aligned=problem.aligned,
    )


def _few_rows(
    rows_SM: torch.Tensor,
    stack: Stack,
    offsets_E: torch.Tensor,
    factor: torch.Tensor | None,
    limit: int | None,
    *,
    transposed: bool,
    h_SR: torch.Tensor | None = None,
) -> torch.Tensor:
    from fourfold.kernels.cuda.few_rows import few_rows_product

    assert isinstance(stack, PackedStack)
    assert not transposed
    return few_rows_product(rows_SM, stack, offsets_E, factor, h_SR)


WAYS: dict[str, Way] = {
    "reference": Way("one expert after the other, decoded and multiplied in plain torch", _never, _reference),
    "workspace": Way("a projection decoded into a workspace, one grouped product", _never, workspace_product),
    "in_product": Way(
        "decoded inside the product (Triton); reads the experts that have rows",
        _cannot_in_product,
        _in_product,
        wide=False,
        takes_plain=True,
    ),
    "hopper": Way(
        "decoded inside the product (CUDA C++, capability 9.x)",
        _cannot_hopper,
        _hopper,
        wide=False,
        takes_plain=True,
    ),
    "few_rows": Way(
        "decoded inside the product, few rows an expert, forward (CUDA C++)",
        _cannot_few_rows,
        _few_rows,
        wide=False,
        forward_alone=True,
    ),
}


@dataclass(frozen=True)
class Line:
    """A line of the rule: ``way`` where all that is said of the problem holds.

    Attributes:
        way: name of the way.
        device: type of the device, None for any.
        dtypes: of the rows, None for any.
        most_rows_per_expert: `Problem.rows_per_expert` at most.
        most_rows: rows at most.
        packed: whether the weights are; None for either.
    """

    way: str
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    most_rows_per_expert: float | None = None
    most_rows: int | None = None
    packed: bool | None = None

    def fits(self, problem: Problem) -> bool:
        return (
            self.device in (None, problem.device)
            and (self.dtypes is None or problem.dtype in self.dtypes)
            and (self.most_rows_per_expert is None or problem.rows_per_expert <= self.most_rows_per_expert)
            and (self.most_rows is None or problem.rows <= self.most_rows)
            and self.packed in (None, problem.plain is None)
        )

    def __str__(self) -> str:
        said = [] if self.device is None else [self.device]
        if self.dtypes is not None:
            said.append(" or ".join(str(d).removeprefix("torch.") for d in self.dtypes))
        if self.most_rows_per_expert is not None:
            said.append(f"at most {self.most_rows_per_expert:g} rows an expert")
        if self.most_rows is not None:
            said.append(f"at most {self.most_rows} rows")
        if self.packed is not None:
            said.append("packed weights" if self.packed else "weights that are not packed")
        return ", ".join(said) or "everything else"


# Two rows an expert before `hopper` are measured on an H100; eight on other cards are a guess.
# In fp16, which `grouped_mm` does not take, the same Triton product would multiply a decoded workspace.
RULE: tuple[Line, ...] = (
    Line("few_rows", "cuda", HALF, most_rows_per_expert=2),
    Line("hopper", "cuda", HALF),
    Line("few_rows", "cuda", HALF, most_rows_per_expert=8),
    Line("in_product", "cuda", HALF, packed=False),
    Line("in_product", "cuda", (torch.float16,)),
    Line("in_product", "cuda", (torch.bfloat16,), most_rows_per_expert=16),
    Line("in_product", "cuda", (torch.bfloat16,), most_rows=128),
    Line("workspace", "cuda"),
    Line("reference"),
)


def possible(problem: Problem) -> list[str]:
    """Names of the ways that can do a problem."""
    return [name for name, way in WAYS.items() if way.cannot(problem) is None]


@functools.lru_cache(maxsize=4096)
def _by_rule(problem: Problem, rule: tuple[Line, ...]) -> str:
    return next(line.way for line in rule if line.fits(problem) and WAYS[line.way].cannot(problem) is None)


def choose(problem: Problem, asked: str | None = None, where: str = "") -> str:
    """Name of the way to go.

    Args:
        problem: what is to be computed.
        asked: take this one instead of the rule's.
        where: who asks, for the message.

    Raises:
        ConfigurationError: ``asked`` is unknown, or cannot do this.
    """
    if asked is None or (problem.transposed and asked in WAYS and WAYS[asked].forward_alone):
        return _by_rule(problem, RULE)
    reason = WAYS[asked].cannot(problem) if asked in WAYS else "there is no such way"
    if reason is not None:
        raise ConfigurationError(
            f"{where + ': ' if where else ''}way={asked!r}: {reason}. Possible here: "
            f"{', '.join(possible(problem))}; None leaves the choice to the rule "
            "(python -m fourfold.kernels prints it)"
        )
    return asked


def _here() -> Problem:
    """A product on the best device of this machine."""
    cuda = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if cuda else None
    fmt = PackFormat("nf4")
    return Problem("cuda" if cuda else "cpu", capability, torch.bfloat16, fmt, 1024, 128, 1536, 2048)


def describe() -> str:
    """The ways, whether this machine can go them, and the rule, as text."""
    here = _here()
    version = "" if here.capability is None else ", capability {}.{}".format(*here.capability)
    lines = [f"ways to multiply with packed experts (here: {here.device}{version})"]
    for name, way in WAYS.items():
        reason = way.cannot(here)
        lines.append(f"  {name:11} {way.what}" + ("" if reason is None else f"\n{'':14}not here: {reason}"))
    lines.append("rule, first line that fits:")
    lines += [f"  {line.way:11} {line}" for line in RULE]
    return "\n".join(lines)
