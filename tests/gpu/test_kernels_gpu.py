"""What only a GPU shows: kernels on CUDA against the CPU's plain torch, and no host synchronisation."""

import pytest
import torch

from fourfold.formats import PackedStack, PackFormat, StackShape, decode_stack
from fourfold.formats.quantize import pack_stack
from fourfold.kernels import LowRank, combine, dispatch, packed_linear, reference_linear, route
from fourfold.kernels.decode import decode

pytestmark = pytest.mark.gpu
FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("fp4", 128, True),
    PackFormat("nf4", 32),
    PackFormat("int8"),
]


def stack_on(device: str, fmt: PackFormat, w: torch.Tensor, parts: int = 2) -> PackedStack:
    return pack_stack(PackedStack.empty(fmt, StackShape(*w.shape, parts=parts), device), w.to(device), "w")


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [256, 1407])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_decoding_gives_the_bits_of_plain_torch(fmt: PackFormat, columns: int, dtype: torch.dtype) -> None:
    stack = stack_on("cuda", fmt, torch.randn(5, 96, columns))
    ours = decode(stack, dtype)
    assert torch.equal(ours, decode_stack(stack, dtype))
    on_cpu = PackedStack.from_tensors(fmt, stack.shape, {s: t.cpu() for s, t in stack.tensors()})
    assert torch.equal(ours.cpu(), decode_stack(on_cpu, dtype))


@pytest.mark.parametrize("fmt", FORMATS[:3], ids=str)
def test_four_bit_packing_equals_bitsandbytes_on_cuda(fmt: PackFormat) -> None:
    import bitsandbytes.functional as bnb

    w = torch.randn(3, 64, 512).bfloat16().cuda()
    stack = stack_on("cuda", fmt, w)
    for e in range(3):
        for p, matrix in enumerate(w[e].chunk(2)):
            data, state = bnb.quantize_4bit(
                matrix.contiguous(),
                blocksize=fmt.blocksize,
                quant_type=fmt.quant_type,
                compress_statistics=fmt.double_quant,
            )
            rows = slice(32 * p, 32 * p + 32)
            assert torch.equal(stack.data[e, rows].reshape(-1, 1), data)
            absmax = stack.absmax[e, rows].flatten()
            assert torch.equal(absmax if fmt.double_quant else absmax.view(torch.float32), state.absmax)
            wanted = bnb.dequantize_4bit(data, state)
            assert torch.equal(decode(stack, torch.bfloat16)[e, rows], wanted)


def test_more_than_two_to_the_31_elements() -> None:
    """bitsandbytes' kernels count in 32 bit; a stack may be larger."""
    shape = StackShape(80, 4096, 8192)  # 2.7e9 weights
    stack = PackedStack.empty(PackFormat("nf4"), shape, "cuda")
    stack.data.fill_(0x7F)
    stack.absmax.view(torch.float32).fill_(2.0)
    w = torch.randn(4096, 8192, device="cuda")
    from fourfold.formats.quantize import Packer

    packer = Packer(stack, "w")
    packer.pack_(79, 0, w)
    decoded = decode(stack, torch.bfloat16)
    assert torch.equal(decoded[79], decode_stack(stack.experts(79, 80), torch.bfloat16)[0])
    assert torch.equal(decoded[0, 0, :2].float(), torch.tensor([0.0, 2.0], device="cuda"))


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("limit", [None, 3 * 128 * 256 * 2])
@pytest.mark.parametrize("rank", [5, 16])
@pytest.mark.parametrize("counts", [[64] * 8, [63, 1000, 0, 1, 0, 37, 5, 0]])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_product_and_gradients(fmt: PackFormat, counts: list[int], rank: int, limit: int | None) -> None:
    """In bf16 no worse than decoding and multiplying expert by expert in bf16, against fp32."""
    E, N, K = len(counts), 128, 256
    stack = stack_on("cuda", fmt, torch.randn(E, N, K) * 0.1)
    x = torch.randn(sum(counts), K, device="cuda")
    a = torch.randn(E, rank, K, device="cuda") * 0.1
    b = torch.randn(E, N, rank, device="cuda") * 0.1
    offsets = torch.tensor(counts, device="cuda").cumsum(0).int()
    probe = torch.randn(sum(counts), N, device="cuda")

    def results(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
        xs, aa, bb = (t.to(dtype).requires_grad_() for t in (x, a, b))
        if kind == "ours":
            y = packed_linear(xs, stack, offsets, LowRank(aa, bb), workspace_bytes=limit)
        else:
            y = reference_linear(xs, stack, offsets, aa, bb)
        return [
            y.detach().float(),
            *(g.float() for g in torch.autograd.grad((y * probe.to(dtype)).sum(), (xs, aa, bb))),
        ]

    exact = results("reference", torch.float32)
    for name, mine, plain, wanted in zip(
        ("y", "dx", "da", "db"),
        results("ours", torch.bfloat16),
        results("reference", torch.bfloat16),
        exact,
        strict=True,
    ):
        error, allowed = (mine - wanted).norm(), (plain - wanted).norm()
        assert mine.isfinite().all(), name
        assert error <= 1.1 * allowed, (
            f"{name}: {error / wanted.norm():.1e}, plain bf16 {allowed / wanted.norm():.1e}"
        )


def test_forward_and_backward_without_host_synchronisation() -> None:
    E, N, K, T, k = 8, 128, 256, 512, 2
    stack = stack_on("cuda", PackFormat("nf4", 64, True), torch.randn(E, N, K) * 0.1)
    down = stack_on("cuda", PackFormat("nf4", 64, True), torch.randn(E, K, N) * 0.1, parts=1)
    x = torch.randn(T, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    a = torch.randn(E, 8, K, device="cuda", requires_grad=True)
    b = torch.randn(E, N, 8, device="cuda", requires_grad=True)
    weights, index = torch.softmax(torch.randn(T, E, device="cuda"), -1).topk(k)
    weights.requires_grad_()

    def step() -> None:
        routing = route(index, E)
        y = packed_linear(dispatch(x, routing), stack, routing.offsets_E, LowRank(a, b))
        out = combine(packed_linear(y, down, routing.offsets_E), weights, routing, torch.bfloat16)
        out.sum().backward()

    step()  # kernels are compiled
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert a.grad is not None
    assert a.grad.abs().sum() > 0


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_routing_equals_the_cpu(weights_dtype: torch.dtype) -> None:
    T, k, E, H = 301, 4, 60, 1000
    index = torch.stack([torch.randperm(E)[:k] for _ in range(T)])
    x, weights = torch.randn(T, H), torch.rand(T, k).to(weights_dtype)
    probe = torch.randn(T, H)

    def results(device: str) -> list[torch.Tensor]:
        xs = x.to(device).requires_grad_()
        ws = weights.to(device).requires_grad_()
        routing = route(index.to(device), E)
        out = combine(dispatch(xs, routing) * 1.5, ws, routing, torch.float32)
        grads = torch.autograd.grad((out * probe.to(device)).sum(), (xs, ws))
        return [t.cpu().float() for t in (out.detach(), *grads)]

    for ours, wanted in zip(results("cuda"), results("cpu"), strict=True):
        torch.testing.assert_close(
            ours, wanted, rtol=2e-5 if weights_dtype == torch.float32 else 1e-2, atol=1e-3
        )
