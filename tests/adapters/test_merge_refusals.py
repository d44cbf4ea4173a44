"""`fourfold merge`: what it refuses, warns of and leaves behind, and how much memory it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import fourfold
import tiny
from fourfold.adapters import merge as merge_module
from fourfold.cli import main
from fourfold.errors import AdapterError, CheckpointError, ConfigurationError
from merging import NF4, WEIGHTS, assert_refused, edit, make_adapter, rewrite


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tiny.save(tiny.qwen3_moe(), tmp_path / "base", max_shard_size="100KB")
    return tmp_path / "base"


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    return make_adapter(base, tmp_path / "adapter")


def test_another_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    model = tiny.build(tiny.qwen3_moe(), seed=1)
    model.save_pretrained(tmp_path / "other")
    assert_refused(AdapterError, "its weights are others", tmp_path / "other", adapter)
    fourfold.merge(tmp_path / "other", adapter, tmp_path / "out", any_base=True)


def test_a_moved_base_and_one_cut_otherwise(base: Path, adapter: Path, tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(), tmp_path / "in one file")
    fourfold.merge(tmp_path / "in one file", adapter, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_of_two_copies_of_the_weights_the_one_that_is_loaded(base: Path, tmp_path: Path) -> None:
    """transformers takes the single file where an index lies beside it."""
    tiny.save(tiny.qwen3_moe(), tmp_path / "other")
    rewrite(tmp_path / "other" / "model.safetensors", lambda t: t["model.norm.weight"].mul_(2))
    (tmp_path / "other" / "model.safetensors").rename(base / "model.safetensors")
    (base / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "pytorch_model-1.bin"}}')
    adapter = make_adapter(base, tmp_path / "adapter")
    report = fourfold.merge(base, adapter, tmp_path / "out")
    loaded, merged = (tiny.load(folder).state_dict() for folder in (base, tmp_path / "out"))
    assert torch.equal(merged["model.norm.weight"], loaded["model.norm.weight"])
    assert report.files == ["model.safetensors"]
    assert {"model.safetensors.index.json", "pytorch_model.bin.index.json"} <= set(report.left_out)
    assert not list((tmp_path / "out").glob("*.index.json"))


def test_a_packed_base_names_its_original(base: Path, adapter: Path, tmp_path: Path) -> None:
    packed = tiny.packed_folder(base, tmp_path / "packed")
    for base_weights in ("original", "dequantized"):
        assert_refused(CheckpointError, f"is packed.*made of {base}", packed, adapter, base_weights)


def test_a_quantized_base(base: Path, adapter: Path) -> None:
    edit(base / "config.json", quantization_config={"quant_method": "fp8"})
    assert_refused(CheckpointError, r"quantized \(fp8\)", base, adapter)


def test_dequantized_needs_to_know_the_format(base: Path, adapter: Path, tmp_path: Path) -> None:
    (adapter / "fourfold.json").unlink()
    assert_refused(AdapterError, r"no fourfold\.json", base, adapter, "dequantized")
    assert fourfold.merge(base, adapter, tmp_path / "out").base["name"] == str(base)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
        ({"bias": "all"}, "biases of the base"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"target_parameters": ["no.such.parameter"]}, "place"),
        ({"r": 3}, "another model"),
        ({"lora_B_layout": "other"}, "lora_B_layout='other' is unknown"),
    ],
)
def test_settings_that_cannot_be_merged(base: Path, adapter: Path, change: dict, said: str) -> None:
    edit(adapter / "adapter_config.json", **change)
    assert_refused(AdapterError, said, base, adapter)


@pytest.mark.parametrize("what", ["extra", "missing", "shape", "nan", "no weights", "no config", "truncated"])
def test_damaged_adapters(base: Path, adapter: Path, what: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        key = next(k for k in tensors if k.endswith("lora_A.weight"))
        if what == "extra":
            tensors["base_model.model.model.layers.9.mlp.experts.lora_A.weight"] = torch.zeros(4)
        elif what == "missing":
            del tensors[key]
        elif what == "shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        else:
            tensors[key][0, 0] = torch.nan

    file = adapter / WEIGHTS
    said = {"extra": "finds no place", "missing": "is missing", "shape": "asks for", "nan": "NaN",
            "truncated": "damaged"}.get(what, "holds no")  # fmt: skip
    if what == "no weights":
        file.unlink()
    elif what == "no config":
        (adapter / "adapter_config.json").unlink()
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    else:
        rewrite(file, change)
    assert_refused(AdapterError, said, base, adapter)


@pytest.mark.parametrize("what", ["file", "expert", "shape", "dtype", "truncated"])
def test_damaged_bases(base: Path, adapter: Path, what: str) -> None:
    files = sorted(base.glob("*.safetensors"))
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    file = next(f for f in files if key in load_file(f))
    if what == "file":
        file.unlink()
    elif what == "truncated":
        file.write_bytes(file.read_bytes()[:-8])
    elif what == "expert":
        rewrite(file, lambda t: t.pop(key))
    elif what == "shape":
        rewrite(file, lambda t: t.update({key: t[key][:-1].contiguous()}))
    else:
        rewrite(file, lambda t: t.update({key: t[key].to(torch.float8_e4m3fn)}))
    said = {"file": "not there", "expert": "5 of 6", "shape": "does not fit", "dtype": "F8_E4M3"}
    assert_refused(CheckpointError, said.get(what, "damaged"), base, adapter, any_base=True)


def test_a_sum_that_is_no_number_leaves_nothing(base: Path, adapter: Path) -> None:
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    file = next(f for f in base.glob("*.safetensors") if key in load_file(f))
    rewrite(file, lambda t: t[key].fill_(torch.inf))
    assert_refused(CheckpointError, f"{key}: base plus adapter", base, adapter, any_base=True)


def test_what_was_not_merged_as_planned_leaves_nothing(base: Path, adapter: Path, monkeypatch) -> None:
    plan = merge_module.make_plan

    def forgetful(*args, **kwargs):
        made = plan(*args, **kwargs)
        made.places.stored.pop()
        return made

    monkeypatch.setattr(merge_module, "make_plan", forgetful)
    assert_refused(CheckpointError, "not merged as planned", base, adapter)


def test_a_head_that_lies_in_the_adapter(base: Path, tmp_path: Path) -> None:
    """PEFT saves a copy of the base's head beside its factors: fine if it is the base's."""
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    key = "base_model.model.lm_head.base_layer.weight"
    assert key in load_file(adapter / WEIGHTS)
    fourfold.merge(base, adapter, tmp_path / "out")
    rewrite(adapter / WEIGHTS, lambda t: t[key].add_(1))
    (tmp_path / "out").rename(tmp_path / "first")
    assert_refused(AdapterError, "with other numbers", base, adapter)


def trained(base: Path, out: Path, modules: list[str]) -> Path:
    """An adapter beside which whole modules were trained."""
    make_adapter(base, out, modules_to_save=modules)

    def move(tensors: dict[str, torch.Tensor]) -> None:
        for key in [k for k in tensors if "lora_" not in k]:
            tensors[key] = tensors[key] + 1

    rewrite(out / WEIGHTS, move)
    return out


def test_whole_modules_are_written_in_place(base: Path, tmp_path: Path) -> None:
    modules = ["lm_head", "embed_tokens", "input_layernorm", "mlp.gate"]
    adapter = trained(base, tmp_path / "adapter", modules)
    report = fourfold.merge(base, adapter, tmp_path / "out")
    plain = PeftModel.from_pretrained(tiny.load(base), str(adapter))
    wanted, found = plain.merge_and_unload().state_dict(), tiny.load(tmp_path / "out").state_dict()
    before = tiny.load(base).state_dict()
    changed = [name for name, tensor in found.items() if not torch.equal(tensor, before[name])]
    assert len(changed) == report.planned == 2 * 3 + 2 + 2 * 2
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)


def test_whole_modules_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    adapter = trained(base, tmp_path / "adapter", ["lm_head"])
    key = "base_model.model.lm_head.weight"
    rewrite(adapter / WEIGHTS, lambda t: t[key].fill_(torch.nan))
    assert_refused(AdapterError, "lm_head.weight.*NaN", base, adapter)
    tiny.save(tiny.qwen3_moe(tie_word_embeddings=True), tmp_path / "tied")
    adapter = trained(tmp_path / "tied", tmp_path / "tied-adapter", ["lm_head"])
    assert_refused(CheckpointError, "shares its numbers", tmp_path / "tied", adapter)


def test_tied_weights(tmp_path: Path) -> None:
    tiny.save(tiny.qwen3_moe(tie_word_embeddings=True), tmp_path / "base")
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", target_modules=["lm_head"])
    assert_refused(CheckpointError, "shares its numbers", tmp_path / "base", adapter)


@pytest.mark.parametrize("target", ["base", "adapter", "there"])
def test_where_it_may_write(base: Path, adapter: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "config.json").write_text("{}")
    with pytest.raises(ConfigurationError):
        fourfold.merge(base, adapter, tmp_path / target)
    fourfold.merge(base, adapter, tmp_path / "there", force=True)
    with pytest.raises(ConfigurationError, match="valid are original, dequantized"):
        fourfold.merge(base, adapter, tmp_path / "new", "packed")


def test_figures_and_warnings(base: Path, tmp_path: Path) -> None:
    large = make_adapter(base, tmp_path / "large")
    report = fourfold.merge(base, large, tmp_path / "out")
    assert report.warnings == []
    role = report.roles["mlp.experts.down_proj"]
    before, after = tiny.load(base), tiny.load(tmp_path / "out")
    change = [
        a.mlp.experts.down_proj - b.mlp.experts.down_proj
        for a, b in zip(after.model.layers, before.model.layers, strict=True)
    ]
    assert role.update == pytest.approx(float(torch.stack(change).norm()), rel=1e-4)
    assert role.tensors == 2
    dequantized = fourfold.dequantize(tiny.load(base, **NF4))
    first = [
        (a.mlp.experts.down_proj - b.mlp.experts.down_proj)[0]
        for a, b in zip(before.model.layers, dequantized.model.layers, strict=True)
    ]
    ratio = torch.stack(first).norm() / torch.stack([c[0] for c in change]).norm()
    assert role.quantization == pytest.approx(float(ratio), rel=1e-3)
    small = make_adapter(base, tmp_path / "small", scale=1e-4)
    report = fourfold.merge(base, small, tmp_path / "out", force=True)
    assert any("down_proj: |W - dq(W)| is" in w and "times |BA|" in w for w in report.warnings)
    assert not any("as before after rounding" in w for w in report.warnings)  # fp32
    assert fourfold.merge(base, small, tmp_path / "out", "dequantized", force=True).warnings == []


def test_what_bf16_swallows_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tmp_path / "base"
    tiny.build(tiny.qwen3_moe()).to(torch.bfloat16).save_pretrained(base)
    small = make_adapter(base, tmp_path / "small", scale=1e-4)
    assert main(["merge", str(base), str(small), str(tmp_path / "out"), "--json"]) == 0
    printed = capsys.readouterr()
    data = json.loads(printed.out)
    assert data["roles"]["mlp.experts.down_proj"]["unchanged"] > 0.5
    assert any("as before after rounding" in w for w in data["warnings"])
    assert printed.err.count("warning: mlp.experts.down_proj") == 2
    assert (
        main(["merge", str(base), str(make_adapter(base, tmp_path / "zero", 0.0)), str(tmp_path / "z")]) == 0
    )
    assert "BA is zero everywhere" in capsys.readouterr().err


def test_the_command(base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert main([*arguments, "--base-weights", "dequantized"]) == 0
    assert "dequantized base weights" in capsys.readouterr().out
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["planned"] == 2 * 3
    edit(adapter / "fourfold.json", base={"name": "a/b", "revision": None, "fingerprint": "0" * 32})
    assert main([*arguments, "--force"]) == 2
    assert "--any-base" in capsys.readouterr().err
    assert main([*arguments, "--force", "--any-base"]) == 0


HUB = """
import sys
sys.path.insert(0, sys.argv[1])
import fourfold, tiny
from peft import LoraConfig, PeftModel, get_peft_model
model = tiny.load("someone/tiny", experts_quant_type="nf4")
config = LoraConfig(r=2, target_parameters=fourfold.expert_targets(model), init_lora_weights=False)
get_peft_model(model, config).save_pretrained(sys.argv[2])
report = fourfold.merge("someone/tiny", sys.argv[2], sys.argv[3])
print(report.base["name"], report.base["revision"])
"""


def test_a_base_on_the_hub_at_the_revision_it_was_trained_on(base: Path, tmp_path: Path) -> None:
    commit = "0123456789" * 4
    repository = tmp_path / "hub" / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "snapshots").mkdir()
    (repository / "refs" / "main").write_text(commit)
    base.rename(repository / "snapshots" / commit)
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    helpers = str(Path(tiny.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", HUB, helpers, str(tmp_path / "adapter"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["someone/tiny", commit]
    assert json.loads((tmp_path / "adapter" / "fourfold.json").read_text())["base"]["revision"] == commit
    fourfold.merge(repository / "snapshots" / commit, tmp_path / "adapter", tmp_path / "again")


# (Sampled: a child's ru_maxrss begins with what its parent had in memory.)
PEAK = """
import sys, threading, time
import fourfold
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
base, large, adapter, out, base_weights, materialise = sys.argv[1:]
fourfold.merge(base, adapter, out, base_weights)  # what is imported on the way
if materialise:
    from fourfold.adapters import merge
    rows = merge._Writer._sum
    merge._Writer._sum = lambda *a: iter(list(rows(*a)))
before, peak, ended = resident(), 0, False
def watch():
    global peak
    while not ended:
        peak = max(peak, resident())
        time.sleep(0.0005)
watcher = threading.Thread(target=watch)
watcher.start()
fourfold.merge(large, adapter + "-large", out + "-large", base_weights)
ended = True
watcher.join()
print(peak - before)
"""


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A small model and one with a fused tensor of 192 MiB, and an adapter of each."""
    tmp_path = tmp_path_factory.mktemp("fused")
    for name, sizes in (("base", {}), ("large", {"hidden_size": 256, "intermediate_size": 1536})):
        experts = 128 if name == "large" else 4
        config = tiny.gpt_oss(num_hidden_layers=1, num_local_experts=experts, **sizes)
        model = tiny.build(config).to(torch.bfloat16)
        model.save_pretrained(tmp_path / name)
        suffix = "" if name == "base" else "-large"
        targets = fourfold.expert_targets(model)
        lora = LoraConfig(r=2, target_parameters=targets, init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path / f"adapter{suffix}")
        from fourfold.adapters import provenance

        provenance.write(tiny.load(tmp_path / name, **NF4), tmp_path / f"adapter{suffix}")
    largest = max(t.nbytes for t in load_file(tmp_path / "large" / "model.safetensors").values())
    assert largest == 192 * 2**20
    return [str(tmp_path / name) for name in ("base", "large", "adapter")]


@pytest.mark.parametrize(
    ("base_weights", "materialise"),
    [("original", ""), ("dequantized", ""), ("original", "all rows of a tensor, to see the bound fail")],
)
def test_no_fused_tensor_is_ever_in_memory(
    fused: list[str], tmp_path: Path, base_weights: str, materialise: str
) -> None:
    command = [sys.executable, "-c", PEAK, *fused, str(tmp_path / "out"), base_weights, materialise]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    assert (int(done.stdout) < 192 * 2**20 / 2) != bool(materialise)
