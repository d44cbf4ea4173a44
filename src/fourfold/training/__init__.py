"""From a YAML file to an adapter: the schema, the data, the run on TRL's trainer, what is shown and written.

Importing this package imports neither torch nor transformers, so that a file is validated in well under a
second; ``fourfold.training.run`` is where they begin.
"""

from fourfold.training.read_config import load_config
from fourfold.training.schema import TrainConfig

__all__ = ["TrainConfig", "load_config"]
