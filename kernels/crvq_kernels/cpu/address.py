"""The one way by which C code gets at the memory of a tensor."""

import torch
from torch import Tensor


def address(tensor: Tensor, dtype: torch.dtype, numel: int) -> int:
    """Returns where `numel` elements of `dtype` lie one after the other in the CPU's memory.

    C reads and writes what it is told, so no address reaches it that has not passed here. That is good as long as the
    tensor, or its storage, lives.

    Raises:
        ValueError: the tensor is of another dtype or size, is not contiguous, not on the CPU, or has no memory.
    """
    if tensor.dtype is dtype and tensor.numel() == numel and tensor.is_contiguous() and tensor.is_cpu:
        if (place := tensor.data_ptr()) or not numel:
            return place
    raise ValueError(
        f"the compiled kernel takes {numel} elements of {dtype}, contiguous and in the CPU's memory, got "
        f"{tensor.dtype} and {list(tensor.shape)}, strides {list(tensor.stride())}, on {tensor.device}"
    )
