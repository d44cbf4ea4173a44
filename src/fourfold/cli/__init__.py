"""The command line: one verb a file, thin. Exit status 0 done, 1 a check says no, 2 wrong input, 3 broke on
the way."""

from fourfold.cli.main import main

__all__ = ["main"]
