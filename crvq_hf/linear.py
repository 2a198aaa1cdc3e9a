"""`CRVQLinear`: a linear layer that keeps its weight quantized.

The one border between two vocabularies: checkpoints say `weight`, `weight_codebooks`, `weight_scale`, `weight_order`;
`QuantizedWeight` and everything below it say codes, codebooks, scales, channel_order.
"""

from __future__ import annotations

from collections.abc import Callable

import crvq_kernels
import torch
from torch import Tensor, nn

from .quantized_weight import TENSOR_NAMES, LayerShape, QuantizedWeight


class CRVQLinear(nn.Linear):
    """`y = x @ dequantize(weight).T + bias`, straight from the codes.

    A subclass of `nn.Linear`, so that code which looks for linear layers (PEFT, `_init_weights` of the models) finds
    one; its `weight` holds packed codes, not numbers. All tensors are parameters without gradient, because
    transformers and accelerate offload parameters, not buffers.

    Attributes:
        nbits: e, bits per code.
        num_critical_groups: Gc.
        conv1d: whether this layer took the place of a transformers `Conv1D`; only dequantizing the model needs it.
        weight: `[N, ceil(V*e/8)]`, uint8, packed codes.
        weight_codebooks: `[1+E, C, d]`, float16.
        weight_scale: `[N]`, float16.
        weight_order: `[K]`, smallest integer dtype that fits.
        bias: `[N]`, dtype of the model, or None.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        in_group_size: int,
        nbits: int,
        num_codebooks: int,
        codebook_size: int,
        num_critical_groups: int,
        bias_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a layer with uninitialised tensors; see the attributes for their shapes."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.nbits = nbits
        self.num_critical_groups = num_critical_groups
        self.conv1d = False
        shape = LayerShape(
            in_features=in_features,
            out_features=out_features,
            in_group_size=in_group_size,
            nbits=nbits,
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            num_critical_groups=num_critical_groups,
        )
        for name, (size, dtype) in shape.tensors().items():
            self.register_parameter(name, _frozen(torch.empty(size, dtype=dtype, device=device)))
        bias_tensor = torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", _frozen(bias_tensor))

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> CRVQLinear:
        """Returns a layer that holds the tensors of `weight` and `bias` (`[N]` or None) without copying them."""
        layer = cls.from_shape(weight.shape, bias=bias is not None, bias_dtype=None, device="meta")
        for name, tensor in weight.tensors().items():
            setattr(layer, name, _frozen(tensor))
        layer.bias = _frozen(bias)
        return layer

    @classmethod
    def from_shape(
        cls, shape: LayerShape, *, bias: bool, bias_dtype: torch.dtype | None, device: torch.device | str | None
    ) -> CRVQLinear:
        """Returns a layer of the given shape with uninitialised tensors."""
        return cls(
            in_features=shape.in_features,
            out_features=shape.out_features,
            bias=bias,
            in_group_size=shape.in_group_size,
            nbits=shape.nbits,
            num_codebooks=shape.num_codebooks,
            codebook_size=shape.codebook_size,
            num_critical_groups=shape.num_critical_groups,
            bias_dtype=bias_dtype,
            device=device,
        )

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the layer's tensors, shared and not copied, under their names in the algorithm."""
        tensors = {name: getattr(self, name).detach() for name in TENSOR_NAMES}
        return QuantizedWeight.from_tensors(tensors, self.nbits, self.num_critical_groups)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[N, K]` in `dtype`, as an `nn.Linear` would hold it."""
        return self.quantized_weight().dequantize(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., N]` in the dtype of `input`, `[..., K]`."""
        return crvq_kernels.linear(
            input,
            self.weight,
            self.weight_codebooks,
            self.weight_scale,
            self.weight_order,
            self.bias,
            self.nbits,
            self.num_critical_groups,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CRVQLinear:
        """Moves the quantized tensors but never casts them: `model.to(torch.bfloat16)` casts only the bias."""
        bias = self.bias
        follows = [] if bias is None else [bias, bias.grad]

        def move(tensor: Tensor) -> Tensor:
            if any(tensor is other for other in follows):
                return fn(tensor)
            probe = fn(tensor.new_empty(1))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        return super()._apply(move, recurse)

    def extra_repr(self) -> str:
        """Returns the numbers a reader of a printed model wants."""
        num_codebooks, codebook_size, in_group_size = self.weight_codebooks.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nbits={self.nbits}, in_group_size={in_group_size}, codebooks={num_codebooks}x{codebook_size}, "
            f"num_critical_groups={self.num_critical_groups}"
        )


def _frozen(tensor: Tensor | None) -> nn.Parameter | None:
    """Returns `tensor` as a parameter without gradient, None for None."""
    return None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
