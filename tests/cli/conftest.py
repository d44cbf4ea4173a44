"""The training tests' fixtures, for the command line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from tiny_chat import data_files, dense_folder, moe_folder, settings, tokenizer, write_config

__all__ = ["data_files", "dense_folder", "moe_folder", "settings", "tokenizer", "write_config"]
