"""``fourfold verify DIR_OR_MODEL``: bytes by role and dtype, and whether every expert is packed.

Reads config.json and the headers of the safetensors files; no weight is read.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from fourfold.cli.outcome import DONE, SAYS_NO, Outcome
from fourfold.cli.show import say
from fourfold.errors import CheckpointError, ConfigurationError, UnquantizedExpertsError
from fourfold.loading.paths import is_meant_as_path


def configure(parser: argparse.ArgumentParser) -> None:
    """The verb's arguments."""
    parser.add_argument("directory", help="the folder of a checkpoint, or its id on the hub")


def execute(args: argparse.Namespace, console: Console) -> Outcome:
    """Exit status 0 where all experts are packed (or skipped on request), 1 where any is not."""
    folder = Path(args.directory)
    is_local = folder.is_dir()
    if not (folder / "config.json").is_file() and (is_local or is_meant_as_path(args.directory)):
        raise ConfigurationError(
            f"{folder}: no such folder, or no config.json in it. Name a checkpoint's folder."
        )

    import fourfold
    from fourfold.cli.libraries import quiet
    from fourfold.loading.headers import check_packed, checkpoint_files, hub_headers, read_headers
    from fourfold.loading.skeleton import build_skeleton
    from fourfold.planning.report import make_report
    from fourfold.training.summary import packed_table

    quiet(args.debug)
    model = build_skeleton(args.directory)
    remote = None if is_local else hub_headers(args.directory)
    report = make_report(model).to_dict()
    status, unpacked, message = DONE, [], "every expert is packed (by config.json and the files' headers)"
    try:
        fourfold.verify(model)
        headers = read_headers(checkpoint_files(folder)) if remote is None else remote
        unpacked = check_packed(model, headers, complete=True)
    except UnquantizedExpertsError as error:
        status, unpacked, message = SAYS_NO, error.tensors, str(error)
    except CheckpointError as error:
        status, message = SAYS_NO, str(error)
    if unpacked and status == DONE:
        status = SAYS_NO
        message = (
            f"config.json says that experts are packed, but the files hold {len(unpacked)} of their tensors "
            f"in high precision ({unpacked[0]}, ...). Take the right files, or quantization_config out of "
            "config.json"
        )
    if not report["experts"]:
        message = "no experts: a dense model"
    console.print(packed_table(report))
    say(console, message)
    return Outcome(
        status, {"ok": status == DONE, "message": message, "unquantized": unpacked, "report": report}
    )
