"""The libraries underneath, kept quiet: their progress bars and log lines would drown what a verb says."""

from __future__ import annotations

import logging
import warnings


def quiet(debug: bool) -> None:
    """Errors only, unless ``debug``. To be called before they are imported: some complain on import."""
    if not debug:
        warnings.simplefilter("ignore", FutureWarning)  # to the libraries' developers, not to their users
        # (before the next line, with which bitsandbytes is imported, too)
        for name in ("accelerate", "trl", "bitsandbytes", "datasets", "peft", "torchao"):
            logging.getLogger(name).setLevel(logging.ERROR)

    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not debug:
        transformers.utils.logging.set_verbosity_error()
