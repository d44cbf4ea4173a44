"""What a model and a run must be for the model to be sharded (`fsdp_keys`); before a weight is read."""

from __future__ import annotations

from transformers import PreTrainedModel

from fourfold.distributed.blocks import blocks
from fourfold.errors import ConfigurationError
from fourfold.training import processes
from fourfold.training.fsdp_keys import sharding
from fourfold.training.schema import TrainConfig

START = "torchrun --nproc_per_node N -m fourfold train CONFIG"


def check_sharding(config: TrainConfig, skeleton: PreTrainedModel) -> None:
    """What has to be known of the model and of the processes.

    Raises:
        ConfigurationError: the run has one process, names classes of layers that the model has not, or trains
            the output layer as a whole.
    """
    wanted = sharding(config)
    if wanted is None:
        return
    if processes.count() == 1:
        raise ConfigurationError(
            "fsdp_config: a model is sharded over several processes, and this run has one. Start it by "
            f"`{START}`, or drop the keys of FSDP."
        )
    known = {type(layer).__name__ for _, layer in blocks(skeleton)}
    wrong = [name for name in wanted.layers if name not in known]
    if wrong:
        raise ConfigurationError(
            f"fsdp_config.transformer_layer_cls_to_wrap: {', '.join(wrong)} is no class of layer of "
            f"{type(skeleton).__name__}; they are {', '.join(sorted(known)) or 'none'}, and are found by "
            "themselves. Drop it."
        )
    head = skeleton.get_output_embeddings()
    for name in config.lora_modules_to_save or []:
        for path, module in skeleton.named_modules():
            shared = head is not None and getattr(module, "weight", None) is head.weight
            if shared and (path == name or path.endswith(f".{name}")):
                raise ConfigurationError(
                    f"lora_modules_to_save: {name} is the output layer, whose weight the loss takes by "
                    "itself, past what adds up its gradients over processes. Take it out, or drop the keys "
                    "of FSDP."
                )
