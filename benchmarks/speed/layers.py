"""Random CRVQ layers for the kernels, of the default format or the paper's, no bias."""

from dataclasses import dataclass

import torch
from crvq_kernels import dequantize_ref, encode_codebooks, num_virtual_groups, pack_codes, tile_codes
from torch import Tensor

Tensors = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Form:
    """What a layer is made of: further codebooks for the critical share of its channels, bits of a codebook entry."""

    num_extended: int
    critical_share: float
    codebook_bits: int


DEFAULT, PAPER = Form(1, 0.04, 8), Form(3, 0.02, 16)
FORMS = {"default": DEFAULT, "paper": PAPER}


@dataclass(frozen=True)
class Layer:
    """A random layer.

    Attributes:
        stored: codes, codebooks, scales and channel order, as in a checkpoint.
        tensors: the same with the codes tiled, as the kernels take them.
        constants: bits of a code, critical groups.
    """

    stored: Tensors
    tensors: Tensors
    constants: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def dense(self) -> Tensor:
        """Returns the weight by the reference, `[N, K]`, fp32."""
        return dequantize_ref(*self.stored, *self.constants)


def random_layer(
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
    in_group_size: int = 8,
    nbits: int = 8,
    form: Form = PAPER,
) -> Layer:
    """Returns a layer with that many output and input features; its outputs are about as large as its inputs."""
    out_features, in_features = shape
    num_codebooks = 1 + form.num_extended
    critical = max(1, int(in_features // in_group_size * form.critical_share))
    num_critical_groups = critical if form.num_extended else 0
    num_codes = num_virtual_groups(in_features, in_group_size, num_codebooks, num_critical_groups)
    codes = torch.randint(0, 2**nbits, (out_features, num_codes), dtype=torch.int16, device=device)
    order = torch.randperm(in_features, device=device).to(torch.uint8 if in_features <= 256 else torch.int16)
    codebooks = torch.randn(num_codebooks, 2**nbits, in_group_size, device=device).clamp_(-3.9, 3.9)
    codebooks = encode_codebooks(codebooks) if form.codebook_bits == 8 else codebooks.half()
    scales = (torch.rand(out_features, device=device) + 0.5).div(in_features**0.5).half()
    packed = pack_codes(codes, nbits)
    tiles = tile_codes(packed, nbits, num_codes)
    others = (codebooks, scales, order)
    return Layer((packed, *others), (tiles, *others), (nbits, num_critical_groups))
