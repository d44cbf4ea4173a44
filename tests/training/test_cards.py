"""Keys of models sharded over several cards: what is wrong in them, and what they contradict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config_text import SOUND
from fourfold.cli import main
from fourfold.training.read_config import examine


def look(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return examine(path)


def test_nulls_ask_for_nothing(tmp_path: Path) -> None:
    examined = look(tmp_path, SOUND + "fsdp: []\nfsdp_config:\nfsdp_version: null\ndeepspeed:\n")
    assert examined.sound
    assert examined.at_start == []


@pytest.mark.parametrize(
    ("lines", "key", "said"),
    [
        ("deepspeed: z.json\nfsdp_config: {fsdp_version: 2}", "deepspeed", "given beside FSDP. Keep one"),
        ("fsdp_config: {offload_parms: true}", "fsdp_config.offload_parms", "unknown setting. Did you mean"),
        ("fsdp_config: {1: 2}", "fsdp_config.1", "unknown setting"),
        ("fsdp_config: [a]", "fsdp_config", "a list is none of its values. Give a mapping"),
        ("fsdp_version: true", "fsdp_version", "a bool is none of its values"),
        ("fsdp_version: 1", "fsdp_version", "1, which flattens parameters of one type; packed ones"),
        (
            "fsdp_config: {fsdp_version: 2}\noptimizer: paged_adamw_8bit",
            "optimizer",
            "paged_adamw_8bit keeps its state in a form that FSDP cannot shard. Write adamw_torch_8bit",
        ),
    ],
)
def test_what_is_wrong_in_them(tmp_path: Path, lines: str, key: str, said: str) -> None:
    text = SOUND + lines + "\n"
    [problem] = look(tmp_path, text).problems
    assert (problem.key, problem.not_yet) == (key, False)
    assert f"{problem.what}. {problem.remedy}".startswith(said)
    assert text.splitlines()[int(problem.where.removeprefix("line ")) - 1].startswith(key.split(".")[0])


@pytest.mark.parametrize("name", ["activation_checkpointing", "fsdp_activation_checkpointing"])
def test_layers_are_recomputed_once_where_both_keys_ask_for_it(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers refuses both at once; published files have both."""
    both = SOUND + f"gradient_checkpointing: true\nfsdp_version: 2\nfsdp_config:\n  {name}: true\n"
    examined = look(tmp_path, both)
    assert examined.sound, examined.complaint()
    [said] = [entry for entry in examined.instead if entry.key.startswith("fsdp_config")]
    assert (said.key, said.where) == (f"fsdp_config.{name}", "line 10")
    assert said.what.startswith("beside gradient_checkpointing, which recomputes the same:")
    assert main(["validate", str(tmp_path / "config.yaml")]) == 0
    assert "that one is used, once; the same results" in capsys.readouterr().out
    alone = both.replace("gradient_checkpointing: true", "gradient_checkpointing: false", 1)
    assert not [entry for entry in look(tmp_path, alone).instead if entry.key.startswith("fsdp_config")]


def test_eight_bit_without_cards_is_no_matter(tmp_path: Path) -> None:
    assert look(tmp_path, SOUND + "optimizer: paged_adamw_8bit\n").sound
