"""Packing on CUDA: batches have the bytes that bitsandbytes makes of each matrix, and cost little memory."""

import gc

import pytest
import torch
from transformers.core_model_loading import spawn_materialize

from bnb_reference import alone
from fourfold.formats import PackedStack, PackFormat, StackShape
from fourfold.formats.quantize import Packer, batch_bytes, pack_stack
from fourfold.loading.reading import THREADS, read_slices, staged
from fourfold.loading.staging import GROUP_BYTES, deferred, read_groups

pytestmark = pytest.mark.gpu
FORMATS = [
    PackFormat("nf4"),
    PackFormat("nf4", 64, True),
    PackFormat("fp4", 128, True),
    PackFormat("fp4", 32),
    PackFormat("int8"),
]
# Experts, rows of a part, columns: many in a batch, blocks no multiple of 256, padded rows, an odd count of
# matrices, and matrices larger than a batch.
SHAPES = [(9, 768, 2048), (33, 42, 64), (7, 24, 1407), (3, 1408, 704), (2, 2048, 7168)]


def assert_as_if_alone(stack: PackedStack, w_ENK: torch.Tensor) -> None:
    slots = {suffix: t.reshape(t.shape[0] * stack.shape.parts, -1) for suffix, t in stack.tensors()}
    for number, matrix in enumerate(m for w_NK in w_ENK for m in w_NK.chunk(stack.shape.parts)):
        for suffix, wanted in alone(matrix, stack.fmt).items():
            assert torch.equal(slots[suffix][number], wanted.flatten()), (suffix, number)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_batches_equal_bitsandbytes_matrix_by_matrix(
    fmt: PackFormat, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    experts, rows, columns = shape
    w = torch.randn(experts, 2 * rows, columns, device="cuda").to(dtype)
    w *= torch.logspace(-2, 1, experts, device="cuda")[:, None, None].to(dtype)
    packer = Packer(PackedStack.empty(fmt, StackShape(experts, 2 * rows, columns, 2), "cuda"), "w")
    for expert in range(experts):
        for part, matrix in enumerate(w[expert].chunk(2)):
            packer.pack_(expert, part, matrix.cpu() if expert == 1 else matrix)
    assert_as_if_alone(packer.finish(), w)
    fused = PackedStack.empty(fmt, StackShape(experts, 2 * rows, columns, 2), "cuda")
    assert_as_if_alone(pack_stack(fused, w, "w"), w)


@pytest.mark.parametrize("way", ["batches", "staged", "direct"])
@pytest.mark.parametrize("matrix", [(768, 2048), (1408, 2048), (2048, 7168)])
@pytest.mark.parametrize("fmt", [PackFormat("nf4", 64, True), PackFormat("int8")], ids=str)
def test_peak_is_one_matrix_and_64_mib_above_the_result(
    fmt: PackFormat, matrix: tuple[int, int], way: str
) -> None:
    rows, columns = matrix
    experts = 16 if rows > 1000 else 64
    on_disk = torch.randn(rows, columns).bfloat16()
    sources = [
        spawn_materialize(None, on_disk, "cuda", torch.bfloat16)
        if way != "direct"
        else lambda: on_disk.to("cuda")
        for _ in range(2 * experts)
    ]
    torch.zeros(1, device="cuda")
    pack_stack(PackedStack.empty(fmt, StackShape(1, 64, 64), "cuda"), torch.zeros(1, 64, 64).cuda(), "w")
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    packer = Packer(PackedStack.empty(fmt, StackShape(experts, 2 * rows, columns, 2), "cuda"), "w")
    known = staged(sources) if way == "batches" else None
    assert way != "batches" or known is not None or on_disk.nbytes > GROUP_BYTES
    if known is not None:
        for w_MnK in read_groups(known, THREADS):
            packer.pack_batch_(w_MnK)
            del w_MnK
    for number, w_NK in enumerate(read_slices(sources) if known is None else ()):
        assert w_NK is not None
        packer.pack_(number // 2, number % 2, w_NK)
        del w_NK
    stack = packer.finish()
    result = sum(t.nbytes for _, t in stack.tensors())
    above = torch.cuda.max_memory_allocated() - before - result
    assert above <= on_disk.nbytes + 64 * 2**20
    assert torch.cuda.memory_allocated() - before <= result + 2**20
    assert batch_bytes(torch.device("cuda")) > batch_bytes(torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_staged_slices_are_those_that_the_loader_would_read(dtype: torch.dtype) -> None:
    made = [torch.randn(1024, 1024 + 8 * (i % 7 == 0)).to(dtype) for i in range(60)]
    sources = [spawn_materialize(None, t, "cuda:0", torch.bfloat16) for t in made]
    assert all(deferred(source) is not None for source in sources)
    stream = torch.cuda.Stream()
    for context in (torch.cuda.stream(None), torch.cuda.stream(stream)):
        with context:
            for source, tensor in zip(sources, read_slices(sources), strict=True):
                assert tensor is not None
                busy = tensor.new_zeros(4096, 4096)
                busy @ busy
                assert torch.equal(tensor, source())


def test_slices_come_in_order_whoever_reads_them() -> None:
    made = [torch.full((64, 64), float(i)) for i in range(50)]
    sources = [lambda t=t: t.to("cuda") for t in made]
    for number, tensor in enumerate(read_slices(sources)):
        assert tensor is not None
        assert torch.equal(tensor.cpu(), made[number])


def test_what_a_reader_raises_comes_out() -> None:
    def broken() -> torch.Tensor:
        raise OSError("the disk is gone")

    sources = [lambda: torch.zeros(4, device="cuda"), lambda: torch.zeros(4, device="cuda"), broken]
    with pytest.raises(OSError, match="the disk is gone"):
        list(read_slices(sources))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_foreign_formats_decode_to_the_bits_of_the_cpu(dtype: torch.dtype) -> None:
    from fourfold.formats.foreign import decode_fp8, decode_mxfp4

    blocks = torch.randint(0, 256, (3, 500, 45, 16), dtype=torch.uint8)
    scales = torch.randint(0, 254, (3, 500, 45), dtype=torch.uint8)
    ours = decode_mxfp4(blocks.cuda(), scales.cuda(), dtype).cpu()
    assert torch.equal(ours.view(torch.uint8), decode_mxfp4(blocks, scales, dtype).view(torch.uint8))
    codes, tiles = torch.randn(2000, 7168).to(torch.float8_e4m3fn), torch.rand(16, 56)
    ours = decode_fp8(codes.cuda(), tiles.cuda(), (128, 128), dtype).cpu()
    assert torch.equal(ours, decode_fp8(codes, tiles, (128, 128), dtype))


def test_reading_ahead_changes_nothing(tmp_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    import fourfold
    import tiny
    from fourfold.loading import converters, reading

    tiny.save(tiny.mixtral(), tmp_path)
    settings = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def load() -> dict[str, torch.Tensor]:
        arguments = {"device_map": {"": "cuda:0"}, "dtype": torch.bfloat16}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, **arguments)
        return model.state_dict()

    in_groups: list[int] = []

    def counted(slices, threads):
        in_groups.append(len(slices))
        return read_groups(slices, threads)

    monkeypatch.setattr(converters, "read_groups", counted)
    ahead = load()
    assert sum(in_groups) > 0
    monkeypatch.setattr(reading, "deferred", lambda source: None)
    monkeypatch.setattr(reading, "slices_ahead", lambda nbytes: 0)
    for name, tensor in load().items():
        assert tensor.is_cuda
        assert torch.equal(tensor, ahead[name]), name


def test_a_packed_checkpoint_is_read_ahead_into_its_places(tmp_path, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    import fourfold
    import tiny
    from fourfold.loading import ahead

    config = tiny.qwen3_moe(hidden_size=256, moe_intermediate_size=512, num_experts=32, num_hidden_layers=6)
    tiny.save(config, tmp_path / "plain")
    settings = fourfold.MoeBitsAndBytesConfig(experts_quant_type="nf4", bnb_4bit_use_double_quant=True)
    arguments = {"device_map": {"": "cuda:0"}, "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=settings, **arguments
    )
    model.save_pretrained(tmp_path / "packed")
    wanted = model.state_dict()
    packed = [p.nbytes for p in model.parameters() if not p.is_floating_point()]
    monkeypatch.setattr(ahead, "PIECE_BYTES", 2**20)
    for device_map in ({"": 0}, "auto"):
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "packed", device_map=device_map, dtype=torch.bfloat16
        )
        # (What a thread of the loader has begun is left to it: one or another of them.)
        assert sum(packed) >= again.hf_quantizer.read_ahead_bytes >= sum(packed) / 2, device_map
        for name, tensor in again.state_dict().items():
            assert tensor.is_cuda, name
            assert torch.equal(tensor, wanted[name]), name
