"""The stored tensors of one CRVQ layer: shapes, checks, bytes.

Everything that must know which tensors a quantized layer has, and of what shape, asks `LayerShape`;
everything that holds such tensors is a `QuantizedWeight`. How codes lie in memory is up to `crvq_kernels.packing`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import crvq_kernels
import torch
from crvq_kernels import decode_codebooks, encode_codebooks, packing
from crvq_kernels.packing import INT8_UNITS
from torch import Tensor

if TYPE_CHECKING:
    from .algorithm.fit import LayerCodes

TENSOR_NAMES = ("weight", "weight_codebooks", "weight_scale", "weight_order")


def num_critical_groups(
    in_features: int, in_group_size: int, critical_ratio: float, num_extended_codebooks: int
) -> int:
    """Returns how many groups of a layer are critical, i.e. get codes from the extended codebooks too.

    At least one as soon as anything is to be extended: a layer so small that `critical_ratio` rounds to no group
    still gets one.

    Args:
        in_features: K, channels of the layer.
        in_group_size: d, channels per group.
        critical_ratio: wanted share of critical channels, 0 to 0.5.
        num_extended_codebooks: E.
    """
    if critical_ratio == 0 or num_extended_codebooks == 0:
        return 0
    return max(1, math.floor(critical_ratio * in_features / in_group_size))


def order_dtype(in_features: int) -> torch.dtype:
    """Returns the smallest integer dtype that can hold a channel number of a layer with `in_features` channels."""
    if in_features <= 256:
        return torch.uint8
    return torch.int16 if in_features <= 32768 else torch.int32


def normalised(codebooks: Tensor, codebook_bits: int) -> tuple[Tensor, Tensor]:
    """Returns codebooks as they are stored, and the factor by which row scales must grow.

    Args:
        codebooks: `[1 + E, C, d]`, fp32, of any size.
        codebook_bits: 16 makes them float16 of unit root mean square, 8 int8 of which one entry is -127 or 127.
    """
    if codebook_bits == 16:
        size = codebooks.square().mean().sqrt().clamp_min(1e-12)
        return (codebooks / size).half(), size
    size = (codebooks.abs().max() * (INT8_UNITS / 127)).clamp_min(1e-12)
    return encode_codebooks(codebooks / size), size


@dataclass(frozen=True)
class LayerShape:
    """All numbers that fix the tensors of one quantized layer.

    Attributes:
        in_features: K, a multiple of `in_group_size`.
        out_features: N.
        in_group_size: d, channels per code.
        nbits: e, bits per code.
        num_codebooks: 1 + E, or 1 when no group is critical.
        codebook_size: C, entries per codebook, at most `2**nbits`.
        num_critical_groups: Gc.
        codebook_bits: 8 or 16, bits per codebook entry.
    """

    in_features: int
    out_features: int
    in_group_size: int
    nbits: int
    num_codebooks: int
    codebook_size: int
    num_critical_groups: int
    codebook_bits: int

    @property
    def num_groups(self) -> int:
        """G, base groups per row."""
        return self.in_features // self.in_group_size

    @property
    def num_virtual_groups(self) -> int:
        """V = G + E * Gc, codes per row."""
        return packing.num_virtual_groups(
            self.in_features, self.in_group_size, self.num_codebooks, self.num_critical_groups
        )

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns shape and dtype of every stored tensor, bias apart, by its name in `TENSOR_NAMES`."""
        width = packing.packed_width(self.num_virtual_groups, self.nbits)
        codebooks = torch.int8 if self.codebook_bits == 8 else torch.float16
        return {
            "weight": ((self.out_features, width), torch.uint8),
            "weight_codebooks": ((self.num_codebooks, self.codebook_size, self.in_group_size), codebooks),
            "weight_scale": ((self.out_features,), torch.float16),
            "weight_order": ((self.in_features,), order_dtype(self.in_features)),
        }

    @property
    def fit_options(self) -> dict[str, int]:
        """The arguments of `fit_weight` that make a layer of this shape."""
        return {
            "in_group_size": self.in_group_size,
            "codebook_size": self.codebook_size,
            "num_extended_codebooks": self.num_codebooks - 1,
            "num_critical_groups": self.num_critical_groups,
        }

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors, bias apart."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, channel order counted, per weight of the dense layer."""
        return self.nbytes * 8 / (self.out_features * self.in_features)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight matrix `[N, K]` as codes, codebooks, scales and a channel order.

    Attributes:
        codes: `[N, ceil(V*e/8)]`, uint8, packed codes, rows contiguous (see `crvq_kernels.packing`).
        codebooks: `[1+E, C, d]`, float16 or int8 (see `decode_codebooks`), base codebook first.
        scales: `[N]`, float16, one factor per output row.
        channel_order: `[K]`, integer, new-to-old: entry i is the original number of the channel at place i.
        nbits: e, bits per code.
        num_critical_groups: Gc, how many of the leading groups have extended codes.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor
    channel_order: Tensor
    nbits: int
    num_critical_groups: int

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], nbits: int, num_critical_groups: int) -> QuantizedWeight:
        """Returns the weight made of `tensors`, keyed by `TENSOR_NAMES` (other keys are ignored).

        Raises:
            ValueError: a tensor is missing.
        """
        missing = [name for name in TENSOR_NAMES if name not in tensors]
        if missing:
            raise ValueError(f"A quantized weight needs the tensors {list(TENSOR_NAMES)}, but {missing} are missing.")
        return cls(*(tensors[name] for name in TENSOR_NAMES), nbits=nbits, num_critical_groups=num_critical_groups)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the stored tensors by their names in a checkpoint."""
        return dict(zip(TENSOR_NAMES, (self.codes, self.codebooks, self.scales, self.channel_order), strict=True))

    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns codes, codebooks (float16), scales and channel order as the kernels take them."""
        return self.codes, decode_codebooks(self.codebooks), self.scales, self.channel_order

    @property
    def out_features(self) -> int:
        """N."""
        return self.scales.shape[0]

    @property
    def in_features(self) -> int:
        """K."""
        return self.channel_order.shape[0]

    @property
    def in_group_size(self) -> int:
        """d."""
        return self.codebooks.shape[2]

    @property
    def num_codebooks(self) -> int:
        """1 + E."""
        return self.codebooks.shape[0]

    @property
    def codebook_bits(self) -> int:
        """Bits per codebook entry, 8 or 16."""
        return 8 * self.codebooks.element_size()

    @property
    def num_groups(self) -> int:
        """G."""
        return self.shape.num_groups

    @property
    def num_virtual_groups(self) -> int:
        """V."""
        return self.shape.num_virtual_groups

    @property
    def shape(self) -> LayerShape:
        """The numbers that the tensors must agree with."""
        return LayerShape(
            in_features=self.in_features,
            out_features=self.out_features,
            in_group_size=self.in_group_size,
            nbits=self.nbits,
            num_codebooks=self.num_codebooks,
            codebook_size=self.codebooks.shape[1],
            num_critical_groups=self.num_critical_groups,
            codebook_bits=self.codebook_bits,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits, channel order counted, per weight of the dense layer."""
        return self.nbytes * 8 / (self.out_features * self.in_features)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[N, K]` in `dtype`, channels in their original order."""
        return crvq_kernels.dequantize(*self.operands(), self.nbits, self.num_critical_groups, dtype)

    def check(self, name: str = "quantized weight") -> None:
        """Checks the tensors against each other and their values.

        Args:
            name: what the messages call this weight, e.g. the name of its module.

        Raises:
            ValueError: a shape or dtype is wrong, a codebook or scale is not finite, the channel order is no
                permutation, or a code points past the end of its codebook.
        """
        self._check_shapes(name)
        for tensor_name, tensor in (("weight_codebooks", self.codebooks), ("weight_scale", self.scales)):
            if not tensor.isfinite().all():
                raise ValueError(f"{name}.{tensor_name} holds NaN or infinite values; the checkpoint is damaged.")
        order = self.channel_order.long()
        if not order.sort().values.equal(torch.arange(self.in_features, device=order.device)):
            raise ValueError(
                f"{name}.weight_order must hold every channel 0..{self.in_features - 1} exactly once, "
                f"found values from {order.min().item()} to {order.max().item()} with repeats or gaps."
            )
        codebook_size = self.codebooks.shape[1]
        if codebook_size < 2**self.nbits:
            highest = packing.unpack_codes(self.codes, self.nbits, self.num_virtual_groups).max().item()
            if highest >= codebook_size:
                raise ValueError(
                    f"{name}.weight holds code {highest}, but its codebooks have only {codebook_size} entries "
                    f"(codes 0..{codebook_size - 1} are allowed)."
                )

    def _check_shapes(self, name: str) -> None:
        """Raises ValueError unless all four tensors have the dtype and shape that the others ask for."""
        for tensor_name, tensor, dims in zip(TENSOR_NAMES, self.tensors().values(), (2, 3, 1, 1), strict=True):
            if tensor.dim() != dims or tensor.numel() == 0:
                raise ValueError(
                    f"{name}.{tensor_name} must be a non-empty tensor of {dims} dimensions, "
                    f"found shape {list(tensor.shape)}."
                )
        if self.in_features % self.in_group_size != 0:
            raise ValueError(
                f"{name}: {self.in_features} channels (weight_order) cannot be cut into groups of "
                f"{self.in_group_size} (last dimension of weight_codebooks)."
            )
        if self.codebooks.shape[1] > 2**self.nbits:
            raise ValueError(
                f"{name}.weight_codebooks has {self.codebooks.shape[1]} entries per codebook, but codes of "
                f"{self.nbits} bits reach only {2**self.nbits}."
            )
        if not 0 <= self.num_critical_groups <= self.num_groups:
            raise ValueError(
                f"{name}: num_critical_groups must be between 0 and {self.num_groups}, "
                f"found {self.num_critical_groups}."
            )
        tensors = self.tensors()
        for tensor_name, (shape, dtype) in self.shape.tensors().items():
            found = tensors[tensor_name]
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(
                    f"{name}.{tensor_name} must be {dtype} of shape {list(shape)}, "
                    f"found {found.dtype} of shape {list(found.shape)}."
                )


def to_stored(fitted: LayerCodes, nbits: int, codebook_bits: int) -> QuantizedWeight:
    """Returns a fitted layer as it is stored: codes packed, codebooks normalised, scales fp16.

    Raises:
        ValueError: the weight is too large for fp16 scales.
    """
    codebooks, size = normalised(fitted.codebooks, codebook_bits)
    scales = (fitted.scales * size).half()
    if not scales.isfinite().all():
        raise ValueError(
            f"A row scale of {float((fitted.scales * size).max()):.3g} does not fit float16 (65504 at most); "
            "leave this layer dense with modules_to_not_convert."
        )
    return QuantizedWeight(
        packing.pack_codes(fitted.codes, nbits),
        codebooks,
        scales,
        fitted.channel_order.to(order_dtype(len(fitted.channel_order))),
        nbits,
        fitted.num_critical_groups,
    )
