"""Table, targets and projection of `benchmarks/distributed.py`; plain arithmetic on what was measured."""

from __future__ import annotations

from typing import Any

MIB = 2**20
# Of Qwen3-30B-A3B: one expert's three matrices in bf16, as they are read to be packed.
ONE_EXPERT = 3 * 2048 * 768 * 2
MACHINE = 8  # GPUs of one machine
PROJECTED = (8, 64)


def _most(result: dict[str, Any], key: str) -> float | None:
    values = [rank[key] for rank in result.get("ranks", []) if rank.get(key) is not None]
    return max(values) if values else None


def _mib(value: float | None) -> str:
    return "" if value is None else f"{value / MIB:,.1f}"


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| variant | GPUs | load s | peak loading MiB | resident MiB | peak training MiB | step ms | "
        "tokens/s | sent a step and rank, MiB | first loss | last loss | losses apart | adapters apart |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in results:
        if "step_ms" not in r:
            lines.append(f"| {r['variant']} | {r.get('failure', 'failed')} " + "| " * 11 + "|")
            continue
        losses = r.get("loss_difference", r.get("loss_noise"))
        adapters = r.get("adapter_difference", r.get("adapter_noise"))
        noise = " (noise)" if "loss_noise" in r else ""
        cells = [
            r["variant"],
            str(r["world"]),
            f"{_most(r, 'load_seconds'):.1f}",
            _mib(_most(r, "peak_loading")),
            _mib(_most(r, "resident_bytes")),
            _mib(_most(r, "peak_training")),
            f"{r['step_ms']:.1f}",
            f"{r['tokens_per_second']:,.0f}",
            f"{sum(r['sent'].values()) / MIB:,.1f}",
            f"{r['losses'][0]:.4f}",
            f"{r['losses'][-1]:.4f}",
            "" if losses is None else f"{losses:.1e}{noise}",
            "" if adapters is None else f"{adapters:.1e}{noise}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def targets(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to be reached, as far as the variants measured can tell."""
    by_name = {r["variant"]: r for r in results if "step_ms" in r}
    found: list[dict[str, Any]] = []

    def expect(what: str, value: float | None, bound: float, *, at_least: bool = False) -> None:
        if value is not None:
            reached = value >= bound if at_least else value <= bound
            found.append({"what": what, "value": value, "bound": bound, "reached": reached})

    one = by_name.get("one")
    for name in ("ddp", "fsdp2"):
        ours = by_name.get(name)
        if one is None or ours is None:
            continue
        per_gpu = ours["tokens_per_second"] / one["tokens_per_second"]
        expect(f"{name}: tokens/s over one GPU's", per_gpu, 0.9 * ours["world"], at_least=True)
        for key in ("loss", "adapter"):
            # two runs that differ by noise alone may differ by it twice
            noise = 2 * one[f"{key}_noise"]
            expect(f"{name}: {key} apart from one process", ours.get(f"{key}_difference"), noise)
        if (planned := ours.get("planned_sent")) is not None:
            apart = abs(sum(ours["sent"].values()) / planned - 1)
            expect(f"{name}: bytes sent apart from those planned", apart, 0.01)
    if one is not None and (ours := by_name.get("fsdp2")) is not None:
        share = (_most(ours, "resident_bytes") or 0) / (_most(one, "resident_bytes") or 1)
        expect("fsdp2: resident over one GPU's", share, 1 / ours["world"] + 0.05)
        if (peak := _most(ours, "peak_loading")) is not None:
            bound = (_most(ours, "loaded_allocated") or 0) + ONE_EXPERT + 256 * MIB
            expect("fsdp2: peak while loading", peak, bound)
    return found


def project(results: list[dict[str, Any]], network: float) -> dict[str, Any]:
    """Tokens per second on more GPUs, on paper, from bytes and times that were measured.

    Args:
        results: of the variants.
        network: bytes per second, in GB, that one GPU has between machines.

    Returns:
        ``rows`` by variant and number of GPUs, and ``text`` with the formula.
    """
    by_name = {r["variant"]: r for r in results if "step_ms" in r}
    one = by_name.get("one")
    text = [
        "Projection (not measured): step = compute + sent(N) / speed where nothing overlaps, and the larger "
        "of the two where all does; sent(N) = sent(n) * (N - 1)/N * n/(n - 1), since a ring of N sends "
        "(N - 1)/N of the whole; compute is the step of one GPU; speed is the measured link within a machine "
        f"of {MACHINE}, and {network:g} GB/s a GPU between machines; tokens/s = N * tokens a GPU / step.",
    ]
    rows: list[dict[str, Any]] = []
    for name in ("ddp", "fsdp2"):
        ours = by_name.get(name)
        if one is None or ours is None or ours.get("link_bytes_per_second") is None:
            continue
        n, sent = ours["world"], sum(ours["sent"].values())
        compute = one["step_ms"] / 1e3
        for N in PROJECTED:
            sent_N = sent * (N - 1) / N * n / (n - 1)
            speed = ours["link_bytes_per_second"]
            if N > MACHINE:
                speed = min(speed, network * 1e9)
            tokens = [
                N * ours["tokens_per_gpu"] / s
                for s in (compute + sent_N / speed, max(compute, sent_N / speed))
            ]
            rows.append(
                {"variant": name, "gpus": N, "sent": sent_N, "speed": speed, "tokens_per_second": tokens}
            )
            text.append(
                f"{name}, {N} GPUs: sent {sent_N / MIB:,.0f} MiB a step and GPU at {speed / 1e9:.1f} GB/s = "
                f"{sent_N / speed * 1e3:.1f} ms beside {compute * 1e3:.1f} ms: {tokens[0]:,.0f} to "
                f"{tokens[1]:,.0f} tokens/s"
            )
    return {"rows": rows, "text": text}
