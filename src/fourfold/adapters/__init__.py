"""PEFT: the parameter wrapper, adding and loading adapters. The only place that imports peft."""
