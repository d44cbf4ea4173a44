"""The source of the kernel: `hopper.cu` with its matrix instructions written out."""

from __future__ import annotations

import functools
from pathlib import Path

_INSTRUCTION = """template <> __device__ __forceinline__ void {name}<{boxes}>(
    float (&d)[{count}], {parameters}, u64 rows) {{
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n{n}k16.f32." TYPE "." TYPE " "
      "{{{results}}}, "
      "{weights}, %{rows}, 1, 1, 1, {transposed};"
      : {outputs}
      : {inputs}, "l"(rows));
}}
"""
_REGISTERS = ("wgmma", "u32 a0, u32 a1, u32 a2, u32 a3", ("a0", "a1", "a2", "a3"))
_SHARED = ("wgmma_shared", "u64 weights", ("weights",))


def _instruction(boxes: int, name: str, parameters: str, inputs: tuple[str, ...]) -> str:
    """64 columns of the result times ``64 * boxes`` rows; weights from registers or from shared memory."""
    count = 32 * boxes
    places = [f"%{count + i}" for i in range(len(inputs))]
    in_registers = len(inputs) > 1
    return (
        _INSTRUCTION.format(
            name=name,
            boxes=boxes,
            count=count,
            n=64 * boxes,
            parameters=parameters,
            results=", ".join(f"%{i}" for i in range(count)),
            weights="{{" + ", ".join(places) + "}}" if in_registers else places[0],
            rows=count + len(inputs),
            transposed="0" if in_registers else '" WIDE_TEXT ", 0',
            outputs=", ".join(f'"+f"(d[{i}])' for i in range(count)),
            inputs=", ".join(f'"{"r" if in_registers else "l"}"({each})' for each in inputs),
        )
        .replace("{{", "{")
        .replace("}}", "}")
    )


@functools.cache
def source() -> str:
    """CUDA C++, complete."""
    parts = [
        '#if HALF\n#define TYPE "f16"\n#else\n#define TYPE "bf16"\n#endif\n',
        '#if WIDE\n#define WIDE_TEXT "1"\n#else\n#define WIDE_TEXT "0"\n#endif\n',
    ]
    for name, parameters, inputs in (_REGISTERS, _SHARED):
        parts.append(
            f"template <int BOXES> __device__ __forceinline__ void {name}(\n"
            f"    float (&d)[BOXES * 32], {parameters}, u64 rows);\n"
        )
        parts += [_instruction(boxes, name, parameters, inputs) for boxes in (1, 2, 3, 4)]
    text = (Path(__file__).parent / "hopper.cu").read_text(encoding="utf-8")
    return text.replace("//WGMMA", "".join(parts))


THREADS = 384
CLUSTER = 2


def shared_bytes(bits: int) -> int:
    """Dynamic shared memory of a block, as `hopper.cu` lays it out; of weights of 4, 8 or 16 bits."""
    rows, weights, scales = 4 * 256 * 64 * 2, 4 * 128 * 64 * bits // 8, 4 * 128 * 4
    table = 256 * 16 * 8 if bits == 4 else 0
    staged, tiles, barriers = 2 * 64 * 64 * 2, (1024 + 4) * 4, 2 * 4 * 8
    return rows + weights + scales + table + staged + tiles + barriers
