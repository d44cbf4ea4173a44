"""The conformance matrix: every model type with experts, through everything that loading promises.

- `tiny_models`: a tiny random model of a type, from its configuration class alone.
- `row`: what is found about one model type.
- `modules`: an experts module by itself, against the same numbers, the original, and damage.
- `checks`: one row: packing, saving, reloading, dequantizing.
- `table`: the file, and what got worse.
"""
