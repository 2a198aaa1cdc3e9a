"""Puts the channels of many tokens into channel order, through shared memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import NUM_STAGES, REORDER_MAX_BYTES, reorder_warps


@triton.jit
def reorder_kernel(x_ptr, order_ptr, y_ptr, K, BLOCK: tl.constexpr):
    """Writes `y[m, k] = x[m, order[k]]` for one token: x and y `[M, K]`, order `[K]`, all contiguous.

    The token is read in one piece and gathered from shared memory: from DRAM or a cache, every channel of two bytes
    would come with the 30 bytes beside it.
    """
    start = tl.program_id(0).to(tl.int64) * K
    channel = tl.arange(0, BLOCK)
    mask = channel < K
    x = tl.load(x_ptr + start + channel, mask=mask, other=0)
    place = tl.load(order_ptr + channel, mask=mask, other=0).to(tl.int32)
    tl.store(y_ptr + start + channel, tl.gather(x, place, axis=0), mask=mask)


def reorder(x: Tensor, channel_order: Tensor) -> Tensor:
    """Returns `x[:, channel_order]`.

    Args:
        x: `[M, K]`, `M >= 1`, elements of two or four bytes.
        channel_order: `[K]`, any integer dtype.
    """
    num_tokens, in_features = x.shape
    block = max(32, triton.next_power_of_2(in_features))
    if block * x.element_size() > REORDER_MAX_BYTES:
        return x.index_select(1, channel_order.int())
    # Only moved, so any dtype of the same size does: the interpreter has no bfloat16.
    bits = torch.int16 if x.element_size() == 2 else torch.int32
    y = torch.empty(num_tokens, in_features, dtype=x.dtype, device=x.device)
    reorder_kernel[(num_tokens,)](
        x.contiguous().view(bits),
        channel_order.contiguous(),
        y.view(bits),
        in_features,
        BLOCK=block,
        num_warps=reorder_warps(block),
        num_stages=NUM_STAGES,
    )
    return y
