"""What this processor has instructions for, beside those that the library finds out itself."""

import torch


def multiplies_bfloat16() -> bool:
    """Returns whether the processor multiplies bfloat16 numbers; elsewhere such products take several times as long.

    It is looked up, not measured: runs on a busy machine must not differ from others.
    """
    instructions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private: where they are gone, fp32 it is
    return any(getattr(torch.cpu, name, bool)() for name in instructions)
