"""The differentiable steps as operators of torch, for `torch.compile` and `torch.export`.

A tracer cannot look into a step: it reads offsets on the host (on a CPU), launches kernels, and takes a
packed stack as an object. So each step is an operator of the library ``fourfold`` as well, of plain tensors
and numbers, with a fake implementation (shapes and strides of the results), and with its gradient as a second
operator. The compiler sees one node each, and fuses what lies between them: the gate, biases, casts of LoRA's
factors.

Nothing is computed here. An operator runs the forward or backward of the autograd function of the same step
with a stand-in for autograd's context, so the bits are the same either way. Outside of a compiler the
functions are used: one costs the host 24 us a call (of an H100), an operator with a gradient is one of those
with a dispatch around it (13 us). `linear`, `layer` and `routing` ask `torch.compiler.is_compiling()`.

What a function saves for backward is a result of its operator, for an operator may return nothing that
shares memory with what it was given: a result that is not kept (or is an input) is an empty tensor. The fake
implementations say which (`linear.py`, `layer.py`); `torch.library.opcheck` compares them with the real
results in a test.

A packed stack is written out as its four tensors, its format and its shape (`stack_arguments`).

S rows sorted by expert, T tokens, k experts a token, E experts, K in, N out, R rank, H hidden, I
intermediate.
"""

from fourfold.kernels.operators.layer import silu_experts
from fourfold.kernels.operators.linear import packed_linear
from fourfold.kernels.operators.routing import combine, dispatch, route

__all__ = ["combine", "dispatch", "packed_linear", "route", "silu_experts"]
