"""The source of the kernel: `products.cu` with its matrix instructions written out."""

from __future__ import annotations

from pathlib import Path

_INSTRUCTION = """template <> __device__ __forceinline__ void wgmma<{boxes}>(
    float (&d)[{count}], u32 a0, u32 a1, u32 a2, u32 a3, u64 rows) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32." TYPE "." TYPE " "
      "{{{results}}}, "
      "{{%{a0}, %{a1}, %{a2}, %{a3}}}, %{rows}, 1, 1, 1, 0;"
      : {outputs}
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(rows));
}}
"""


def _instruction(boxes: int) -> str:
    """64 columns of the result times ``64 * boxes`` rows."""
    count = 32 * boxes
    return _INSTRUCTION.format(
        boxes=boxes,
        count=count,
        n=64 * boxes,
        results=", ".join(f"%{i}" for i in range(count)),
        outputs=", ".join(f'"+f"(d[{i}])' for i in range(count)),
        a0=count,
        a1=count + 1,
        a2=count + 2,
        a3=count + 3,
        rows=count + 4,
    )


def source() -> str:
    """CUDA C++, complete."""
    head = (
        '#if HALF\n#define TYPE "f16"\n#else\n#define TYPE "bf16"\n#endif\n'
        "template <int BOXES> __device__ __forceinline__ void wgmma(\n"
        "    float (&d)[BOXES * 32], u32 a0, u32 a1, u32 a2, u32 a3, u64 rows);\n"
    )
    text = (Path(__file__).parent / "products.cu").read_text(encoding="utf-8")
    return text.replace("//WGMMA", head + "".join(_instruction(boxes) for boxes in (1, 2, 3, 4)))


THREADS = 384


def shared_bytes(int8: bool) -> int:
    """Dynamic shared memory of a block, as `products.cu` lays it out."""
    rows, weights, scales = 4 * 256 * 64 * 2, 4 * 128 * (64 if int8 else 32), 4 * 128 * 4
    table = 0 if int8 else 256 * 16 * 8
    tiles, barriers = (1024 + 4) * 4, 2 * 4 * 8
    return rows + weights + scales + table + tiles + barriers
