"""The training tests' fixtures, for the quickstart."""

from tiny_chat import data_files, dense_folder, moe_folder, settings, tokenizer, write_config

__all__ = ["data_files", "dense_folder", "moe_folder", "settings", "tokenizer", "write_config"]
