"""What bitsandbytes' public functions make of one matrix, under the names of Fourfold's storage."""

import bitsandbytes.functional as bnb
import torch

from fourfold.formats import PackFormat


def alone(w_NK: torch.Tensor, fmt: PackFormat) -> dict[str, torch.Tensor]:
    """Suffix -> stored tensor (flattened as bitsandbytes leaves it; scales as their int32 bits)."""
    if fmt.quant_type == "int8":
        codes, absmax, _ = bnb.int8_vectorwise_quant(w_NK.half().contiguous())
        return {"": codes, "_absmax": absmax.view(torch.int32)}
    padded = torch.nn.functional.pad(w_NK, (0, -w_NK.shape[1] % fmt.blocksize)).contiguous()
    data, state = bnb.quantize_4bit(
        padded, blocksize=fmt.blocksize, quant_type=fmt.quant_type, compress_statistics=fmt.double_quant
    )
    if not fmt.double_quant:
        return {"": data, "_absmax": state.absmax.view(torch.int32)}
    return {
        "": data,
        "_absmax": state.absmax,
        "_absmax_scale": state.state2.absmax.view(torch.int32),
        "_absmax_offset": state.offset.view(torch.int32),
    }
