"""`fourfold plan` with experts in host memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny
from fourfold.cli import main
from tiny_chat import Settings, data_files, moe_folder, settings, write_config

__all__ = ["data_files", "moe_folder", "settings", "write_config"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.qwen3_moe(architectures=["Qwen3MoeForCausalLM"], num_hidden_layers=6).save_pretrained(folder)
    return str(folder)


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    status = main(["plan", *arguments, "sequence_len=64", "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_budget_alone_sends_the_rest_to_host_memory(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, resident = planned(capsys, model)
    assert resident["offload"] is None
    experts = resident["parts"]["experts"]
    status, data = planned(capsys, model, "--gpu-budget", str(8 * experts // 10))
    assert status == 0
    found = data["offload"]
    assert (found["kind"], found["resident_modules"], found["streamed_modules"]) == ("auto", 2, 4)
    assert found["resident_bytes"] + found["host_bytes"] == experts
    assert data["parts"]["experts"] == found["resident_bytes"] + found["buffer_bytes"]
    assert sum(data["parts"].values()) == data["peak"]
    assert found["pace"]["copied_bytes_per_step"] == 2 * found["buffer_bytes"]


def test_what_a_step_waits_for_is_said(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [model, "experts_offload=cpu", "--link-bandwidth", "1MB/s", "--step-seconds", "0.01"]
    assert main(["plan", *asked, "sequence_len=64", "--gpu", "24GiB"]) == 0
    shown = capsys.readouterr().out
    for words in ("where experts lie", "2 buffers", "6 modules", "peak of the process", "bound by the link"):
        assert words in shown
    assert "0.0 GB/s (given)" in shown
    assert "(as given)" in shown
    assert main(["plan", model, "experts_offload=cpu", "sequence_len=64"]) == 0
    shown = capsys.readouterr().out
    assert "(assumed: PCIe 4.0 x16)" in shown
    assert "an estimate: " in shown
    assert "hidden behind computing" in shown


def test_auto_keeps_as_many_as_the_card_has_room_for(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "experts_offload=auto", "--gpu", "24GiB"]) == 0
    assert "All experts stay on the card: nothing is copied." in capsys.readouterr().out
    _, resident = planned(capsys, model)
    card = resident["peak"] - resident["parts"]["experts"] // 3 + 2 * 640 * 2**20
    status, data = planned(capsys, model, "experts_offload=auto", "--gpu", str(card))
    assert status == 0
    assert 0 < data["offload"]["streamed_modules"] < 6
    assert data["fits"] is True


def test_host_memory_is_suggested_where_a_card_is_too_small(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, resident = planned(capsys, model)
    card = str(int((resident["peak"] - resident["parts"]["experts"] // 3) / 0.97) + 640 * 2**20)
    status, data = planned(capsys, model, "--gpu", card)
    assert status == 1
    (found,) = (s for s in data["suggestions"] if "experts_offload" in s["keys"])
    assert found["keys"] == {"experts_offload": "auto"}
    assert found["peak"] <= data["room"]
    status, data = planned(capsys, model, "--gpu", str(641 * 2**20), "experts_offload=cpu")
    assert status == 1
    assert not any("experts_offload" in s["keys"] for s in data["suggestions"])


def test_a_file_with_experts_in_host_memory(
    settings: Settings,
    write_config: Callable[[dict[str, Any]], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = str(write_config(settings(experts_offload="auto", gpu_budget="1GiB")))
    status, data = planned(capsys, config, "--gpu", "24GiB")
    assert status == 0
    assert (data["settings"]["experts_offload"], data["settings"]["gpu_budget"]) == ("auto", 2**30)
    assert data["offload"]["streamed_modules"] == 0
    status, data = planned(capsys, config, "--gpu", "24GiB", "gpu_budget=null", "experts_offload=cpu")
    assert data["offload"]["resident_modules"] == 0


def test_a_packed_checkpoint_is_planned_from_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nf4 = {"experts_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    tiny.save(tiny.qwen3_moe(num_hidden_layers=6), tmp_path / "plain")
    tiny.packed_folder(tmp_path / "plain", tmp_path / "packed", **nf4)
    for folder in ("plain", "packed"):  # (what is not packed yet can be planned too)
        asked = [str(tmp_path / folder), "experts_offload=disk", "sequence_len=64"]
        assert main(["plan", *asked, "--disk-bandwidth", "1MB", "--step-seconds", "1"]) == 0
        shown = capsys.readouterr().out
        assert "6 modules, mapped" in shown
        assert "read ahead, and small scales" in shown
        assert "MiB from disk" in shown or "GiB from disk" in shown


def test_without_a_gpu_nothing_is_said_of_links(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, data = planned(capsys, model, "--cpu", "experts_offload=cpu")
    assert status == 0
    assert data["offload"]["pace"] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--gpu-budget", "some"], "--gpu-budget: 'some' is no number of bytes. Write 25GB, say."),
        (["--gpu-budget", "1"], "one module's take"),
        (["--gpu-budget", "1GiB", "experts_offload=cpu"], "gpu_budget: has no effect"),
        (["--link-bandwidth", "fast"], "--link-bandwidth: 'fast' is no number of bytes"),
        (["--link-bandwidth", "0"], "--link-bandwidth: '0' is no number of bytes"),
        (["--disk-bandwidth", "3 discs"], "--disk-bandwidth: '3 discs' is no number of bytes"),
        (["--link-bandwidth", "1GB"], "--link-bandwidth: has no effect on a run with experts_offload: null"),
        (
            ["experts_offload=cpu", "--disk-bandwidth", "1GB"],
            "--disk-bandwidth: has no effect on a run with experts_offload: cpu. Set experts_offload=disk",
        ),
        (["--step-seconds", "0"], "--step-seconds: 0.0 is no time. Write 0.54, say."),
        (["--step-seconds", "nan"], "--step-seconds: nan is no time"),
        (["experts_offload=auto"], "no card is known. Name its size (--gpu 24GiB)"),
        (["experts_offload=auto", "--cpu"], "no card is known"),
        (["experts_offload=cpu", "load_in_4bit=false", "adapter=lora"], "is for packed experts"),
    ],
)
def test_bad_input_is_answered(
    model: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    keys = [each for each in arguments if "=" in each]
    flags = [each for each in arguments if "=" not in each]
    assert main(["plan", model, "sequence_len=64", *keys, *flags]) == 2
    assert message in capsys.readouterr().err
