"""The command line: results, exit statuses, --json on standard output alone, one clear message for each
mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import fourfold
from fourfold import errors
from fourfold.cli import main
from fourfold.cli.main import COMMANDS, explain
from tiny_chat import Settings

Write = Callable[[dict[str, Any]], Path]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    """Exit status, what standard output holds (nothing but JSON), standard error."""
    status = main([*arguments, "--json"])
    captured = capsys.readouterr()
    return status, strictly(captured.out), captured.err


def strictly(text: str) -> dict[str, Any]:
    """JSON as the standard has it: Python's own reader takes NaN and Infinity as well."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    result: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return result


@pytest.fixture(scope="module")
def packed_folder(moe_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, packed and saved."""
    from fourfold.training.generation import load_for_generation

    folder = tmp_path_factory.mktemp("packed")
    model, tokenizer = load_for_generation(str(moe_folder), 4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("fourfold 0.")
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in COMMANDS)


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        out = capsys.readouterr().out
        assert "--json" in out
        assert "--debug" in out


def test_an_unknown_command_lists_the_valid_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert all(name in err for name in ("trian", *COMMANDS))
    assert main([]) == 2


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("train", "validate", "data"):
        assert main([name]) == 2
        assert capsys.readouterr().err.endswith("the following arguments are required: config\n")


def test_libraries_are_silent(moe_folder: Path) -> None:
    """Also what they say when they are imported."""
    command = [sys.executable, "-m", "fourfold", "generate", str(moe_folder), "--prompt", "a"]
    done = subprocess.run([*command, "--max-new-tokens", "1"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_wrong_file_is_answered_without_torch(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    lines = ["base_model: m", "adapter: qlora", "load_in_4bit: true", "lora_rank: 8", "datasets: [{path: d}]"]
    config.write_text("\n".join(lines))
    code = (
        "import sys; from fourfold.cli import main\n"
        f"assert main(['train', {str(config)!r}]) == 2\n"
        "assert main(['train', '--help']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "line 4, lora_rank: unknown key. Did you mean `lora_r`?" in done.stderr


def test_train(capsys: pytest.CaptureFixture[str], settings: Settings, write_config: Write) -> None:
    config = write_config(settings(max_steps=6, eval_steps=0))
    status, data, _ = run_json(capsys, "train", str(config), "max_steps=2")
    assert status == 0
    assert data["steps"] == 2
    assert Path(data["adapter"], "adapter_model.safetensors").is_file()
    assert data == json.loads(Path(data["adapter"], "report.json").read_text())


def test_overrides_may_stand_after_options(
    capsys: pytest.CaptureFixture[str], settings: Settings, write_config: Write
) -> None:
    config = str(write_config(settings(eval_steps=0)))
    for arguments in (
        [config, "--json", "lora_rnk=1"],
        ["--json", config, "lora_rnk=1"],
        [config, "seed=2", "--json", "lora_rnk=1"],
    ):
        assert main(["train", *arguments]) == 2
        assert (
            "command line (lora_rnk=1), lora_rnk: unknown"
            in strictly(capsys.readouterr().out)["error"]["message"]
        )
    assert main(["train", config, "--json", "--fast"]) == 2
    assert "unrecognized arguments: --fast" in capsys.readouterr().err
    assert main(["verify", "folder", "another"]) == 2
    assert "unrecognized arguments: another" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "required: config"),
        (["trian"], "invalid choice: 'trian'"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "abc"], "'abc' is no positive whole number"),
        (["generate", "m", "--prompt", "a", "--max-new-tokens", "0"], "'0' is no positive whole number"),
    ],
)
def test_wrong_usage_is_json_too(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    status = main([*arguments, "--json"])
    captured = capsys.readouterr()
    assert status == 2
    assert said in strictly(captured.out)["error"]["message"]
    assert said in captured.err
    assert captured.err.startswith("usage: fourfold")
    assert main(arguments) == 2
    assert capsys.readouterr().out == ""


def test_a_single_held_out_answer_gives_valid_json(
    capsys: pytest.CaptureFixture[str], settings: Settings, write_config: Write
) -> None:
    config = write_config(settings(max_steps=2, eval_steps=0, test_datasets=None, val_set_size=1))
    status, data, _ = run_json(capsys, "train", str(config))
    assert status == 0
    assert data["held_out_loss"]["improvement"]["standard_error"] is None
    strictly(Path(data["adapter"], "report.json").read_text())


def test_train_shows_the_table(
    capsys: pytest.CaptureFixture[str], settings: Settings, write_config: Write
) -> None:
    assert main(["train", str(write_config(settings(max_steps=1, warmup_steps=0, eval_steps=0)))]) == 0
    out = capsys.readouterr().out
    assert "held-out after" in out
    assert "NF4" in out
    assert "step 1/1" in out


def test_bad_input_of_train(
    capsys: pytest.CaptureFixture[str],
    settings: Settings,
    write_config: Write,
    dense_folder: Path,
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": []}\n')
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lora_rank": 8}, "lora_rank: unknown key"),
        ({"load_in_8bit": True}, "load_in_8bit: contradicts load_in_4bit"),
        ({"base_model": str(tmp_path / "nowhere")}, "there is no folder"),
        ({"base_model": str(dense_folder), "lora_target_parameters": ["mlp.experts.down_proj"]}, "dense"),
        ({"datasets": [{"path": str(rows)}]}, "rows.jsonl, line 1: `messages` is empty"),
        ({"lora_target_modules": ["wq"]}, "'wq' matches no module"),
    ]
    for changes, said in cases:
        status, data, err = run_json(capsys, "train", str(write_config(settings(**changes))))
        assert status == 2, changes
        assert said in err, changes
        assert said in data["error"]["message"], changes
        assert data["error"]["exit_status"] == 2
        assert "Traceback" not in err
    assert main(["train", str(tmp_path / "nowhere.yaml")]) == 2


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", str(tmp_path / "nowhere.yaml"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_inspect(capsys: pytest.CaptureFixture[str], moe_folder: Path) -> None:
    status, data, _ = run_json(capsys, "inspect", str(moe_folder))
    assert status == 0
    assert data["targets"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    [group] = data["groups"]
    assert (group["count"], group["num_experts"]) == (2, 4)
    assert group["bytes"]["bf16"] == 2 * 2 * 4 * 3 * 64 * 128
    assert main(["inspect", str(moe_folder / "config.json")]) == 0
    out = capsys.readouterr().out
    assert "lora_target_parameters: mlp.experts.gate_up_proj, mlp.experts.down_proj" in out
    assert "in_product" not in out


def test_inspect_shows_how_products_are_computed(
    capsys: pytest.CaptureFixture[str], moe_folder: Path
) -> None:
    from fourfold.kernels.ways import RULE, describe

    status, data, _ = run_json(capsys, "inspect", str(moe_folder), "--ways")
    assert status == 0
    assert data["ways"] == describe()
    assert main(["inspect", str(moe_folder), "--ways"]) == 0
    out = capsys.readouterr().out
    assert all(str(line) in out for line in RULE)


def test_inspect_a_dense_model(capsys: pytest.CaptureFixture[str], dense_folder: Path) -> None:
    assert main(["inspect", str(dense_folder)]) == 0
    assert "no experts" in capsys.readouterr().out


def test_inspect_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert main(["inspect", "run.yaml"]) == 2
    assert "configures a run, not a model" in capsys.readouterr().err


def test_verify(
    capsys: pytest.CaptureFixture[str], packed_folder: Path, moe_folder: Path, tmp_path: Path
) -> None:
    status, data, _ = run_json(capsys, "verify", str(packed_folder))
    assert (status, data["ok"], data["unquantized"]) == (0, True, [])
    rows = data["report"]["rows"]
    assert {row["dtype"] for row in rows if row["role"] == "experts"} == {"NF4 /64 double-quantized"}

    status, data, _ = run_json(capsys, "verify", str(moe_folder))
    assert (status, data["ok"]) == (1, False)
    assert len(data["unquantized"]) == 4
    assert "model.layers.0.mlp.experts.gate_up_proj" in data["unquantized"]

    assert main(["verify", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_verify_reads_the_headers_of_the_files(
    capsys: pytest.CaptureFixture[str], packed_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def verify(change) -> tuple[int, str]:
        folder = tmp_path / "copy"
        shutil.copytree(packed_folder, folder)
        change(folder)
        status, data, _ = run_json(capsys, "verify", str(folder))
        shutil.rmtree(folder)
        return status, data["message"]

    def edit(mend):
        def change(folder: Path) -> None:
            tensors = load_file(folder / "model.safetensors")
            save_file(mend(tensors), folder / "model.safetensors")

        return change

    def in_bf16(tensors):
        return {k: v.bfloat16() if k.endswith("experts.down_proj") else v for k, v in tensors.items()}

    def without_absmax(tensors):
        return {k: v for k, v in tensors.items() if not k.endswith("experts.down_proj_absmax")}

    def cut(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])

    def outside(folder: Path) -> None:
        index = {"weight_map": {"a": "../model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        (folder / "model.safetensors").unlink()  # beside it the index would not be read

    assert verify(lambda folder: (folder / "model.safetensors").unlink()) == (1, mock.ANY)
    assert "high precision" in verify(edit(in_bf16))[1]
    assert "no tensor" in verify(edit(without_absmax))[1]
    assert "truncated" in verify(cut)[1]
    assert "outside its folder" in verify(outside)[1]
    assert all(verify(c)[0] == 1 for c in (edit(in_bf16), edit(without_absmax), cut, outside))


def test_verify_of_a_model_on_the_hub_reads_headers_only(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    packed_folder: Path,
    moe_folder: Path,
) -> None:
    """The hub is played by two folders: what is asked of it are configurations and headers."""
    import huggingface_hub
    from huggingface_hub.errors import NotASafetensorsRepoError
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    from fourfold.loading import skeleton
    from fourfold.loading.headers import checkpoint_files, read_headers

    hub = {"somebody/packed": packed_folder, "somebody/plain": moe_folder, "somebody/pickled": moe_folder}

    def metadata(repo_id: str) -> SafetensorsRepoMetadata:
        if repo_id == "somebody/pickled":
            raise NotASafetensorsRepoError("no safetensors in there")
        files = {}
        for file in checkpoint_files(hub[repo_id]):
            tensors = {k: TensorInfo(h.dtype, list(h.shape), (0, 0)) for k, h in read_headers([file]).items()}
            files[file.name] = SafetensorsFileMetadata({}, tensors)
        return SafetensorsRepoMetadata(None, False, {}, files)

    read_config = skeleton.read_config
    monkeypatch.setattr(
        skeleton, "read_config", lambda model, *rest: read_config(hub.get(str(model), model), *rest)
    )
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    monkeypatch.chdir(tmp_path)
    status, data, _ = run_json(capsys, "verify", "somebody/packed")
    assert status == 0
    assert data["ok"] is True
    assert run_json(capsys, "verify", "somebody/plain")[0] == 1
    assert main(["verify", "somebody/pickled"]) == 2
    assert "holds no readable safetensors" in capsys.readouterr().err

    # The configuration is in the cache, and there is no network: httpx' errors are no OSErrors.
    class NoNetworkError(Exception):
        pass

    def unreachable(repo_id: str) -> SafetensorsRepoMetadata:
        raise NoNetworkError("connection refused")

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", unreachable)
    assert main(["verify", "somebody/packed"]) == 2
    assert "cannot be read from the hub: connection refused" in capsys.readouterr().err
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    # A configuration that says packed over files that are not:
    plain = metadata("somebody/plain")
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo_id: plain)
    status, data, _ = run_json(capsys, "verify", "somebody/packed")
    assert status == 1
    assert "cannot be read" in data["message"]


def test_verify_a_dense_model(capsys: pytest.CaptureFixture[str], dense_folder: Path) -> None:
    assert main(["verify", str(dense_folder)]) == 0
    assert "no experts" in capsys.readouterr().out


@pytest.mark.parametrize("how", [[], ["--load-in-8bit"], ["--no-quantization"], ["--sample"]])
def test_generate(capsys: pytest.CaptureFixture[str], moe_folder: Path, how: list[str]) -> None:
    arguments = ["generate", str(moe_folder), "--prompt", "what is red", "--max-new-tokens", "4", *how]
    status, data, _ = run_json(capsys, *arguments)
    assert status == 0
    assert 1 <= data["new_tokens"] <= 4
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "what" not in out.split("\n")[0]  # the prompt is not repeated
    if "--sample" not in how:
        assert data["text"].split() == out.split()


def test_generate_from_a_packed_checkpoint_with_an_adapter(
    capsys: pytest.CaptureFixture[str],
    packed_folder: Path,
    moe_folder: Path,
    settings: Settings,
    write_config: Write,
) -> None:
    config = settings(max_steps=30, eval_steps=0)
    assert main(["train", str(write_config(config))]) == 0
    capsys.readouterr()
    question = ["--prompt", "what colour is the snow", "--max-new-tokens", "8"]
    adapter = ["--adapter", config["output_dir"]]
    _, packed, _ = run_json(capsys, "generate", str(packed_folder), *question, *adapter)
    _, fresh, _ = run_json(capsys, "generate", str(moe_folder), *question, *adapter)
    _, base, _ = run_json(capsys, "generate", str(moe_folder), *question)
    assert packed["text"] == fresh["text"]
    assert packed["text"].startswith("the ")  # an answer of the kind it was trained on
    assert base["text"] != packed["text"]


def test_generate_packs_as_the_base_of_the_adapter_was(
    capsys: pytest.CaptureFixture[str], moe_folder: Path, settings: Settings, write_config: Write
) -> None:
    """Format and skips stand beside the adapter, which is refused on a base packed otherwise."""
    skips = ["v_proj", "lm_head"]
    bnb = {"bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": skips}
    config = settings(max_steps=2, eval_steps=0, bnb_config_kwargs=bnb)
    assert main(["train", str(write_config(config))]) == 0
    question = ["generate", str(moe_folder), "--prompt", "what colour is the snow", "--max-new-tokens", "2"]
    adapter = ["--adapter", config["output_dir"]]
    assert main([*question, *adapter]) == 0
    capsys.readouterr()
    assert main([*question, *adapter, "--load-in-4bit"]) == 2
    assert "was trained on experts packed as FP4" in capsys.readouterr().err
    assert main([*question, *adapter, "--skip-modules", "v_proj"]) == 2
    capsys.readouterr()


def test_generate_leaves_modules_in_high_precision(moe_folder: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    from fourfold.training.generation import load_for_generation

    model, _ = load_for_generation(str(moe_folder), None, None, ["v_proj"])
    kinds = {name.rpartition(".")[2]: type(module) for name, module in model.named_modules()}
    assert (kinds["v_proj"], kinds["q_proj"]) == (torch.nn.Linear, Linear4bit)
    assert fourfold.verify(model).experts[0].format.startswith("NF4")


def test_bad_input_of_generate(
    capsys: pytest.CaptureFixture[str], moe_folder: Path, packed_folder: Path, tmp_path: Path
) -> None:
    cases = [
        ([str(tmp_path / "nowhere"), "--prompt", "a"], "there is no folder"),
        ([str(moe_folder), "--prompt", "a", "--adapter", str(tmp_path)], "no adapter there"),
        ([str(packed_folder), "--prompt", "a", "--load-in-8bit"], "packed already"),
        ([str(packed_folder), "--prompt", "a", "--skip-modules", "v_proj"], "packed already"),
        (
            [str(moe_folder), "--prompt", "a", "--no-quantization", "--skip-modules", "v"],
            "nothing to be left",
        ),
        ([str(moe_folder), "--prompt", "a", "--load-in-8bit", "--load-in-4bit"], "not allowed with"),
        ([str(moe_folder), "--prompt", "a", "--max-new-tokens", "0"], "no positive whole number"),
    ]
    for arguments, said in cases:
        assert main(["generate", *arguments]) == 2, arguments
        assert said in capsys.readouterr().err, arguments


def test_exceptions_become_exit_statuses() -> None:
    full = OSError(28, "No space left on device")
    cases: list[tuple[BaseException, int, str]] = [
        (errors.ConfigurationError("wrong"), 2, "wrong"),
        (errors.UnquantizedExpertsError("no", ["a"]), 1, "no"),
        (errors.TrainingError("broke"), 3, "broke"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 3, "Lower micro_batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 3, "Lower micro_batch_size"),
        (MemoryError(), 3, "Lower micro_batch_size"),
        (OSError("m is not a local folder and is not a valid model identifier"), 2, "not a local folder"),
        (FileNotFoundError(2, "No such file"), 2, "No such file"),
        (full, 3, "No space left"),
        (RuntimeError("something\nlong"), 3, "RuntimeError: something (--debug"),
    ]
    for error, status, said in cases:
        got, message = explain(error)
        assert got == status, error
        assert said in message
        assert "\n" not in message


@pytest.mark.parametrize("arguments", [["schema"], ["schema", "--json"], ["validate", "CONFIG"]])
def test_a_reader_that_goes_ends_a_command_quietly(arguments: list[str], tmp_path: Path) -> None:
    """As ``| head`` does: no message, neither of the command nor of the interpreter at its end."""
    config = tmp_path / "config.yaml"
    config.write_text("base_model: m\nadapter: qlora\nload_in_4bit: true\ndatasets: [{path: d}]\n")
    command = [sys.executable, "-m", "fourfold", *arguments]
    command = [str(config) if part == "CONFIG" else part for part in command]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    assert (process.wait(timeout=60), said) == (141, "")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of a connection, say, while standard output is still read."""
    from fourfold.cli import schema

    def broken(*_: Any) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(schema, "execute", broken)
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as out, os.fdopen(reader) as read:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["schema"]) == 3
        read.close()
        assert main(["schema"]) == 141
