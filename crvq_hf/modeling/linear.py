"""`CRVQLinear`: a linear layer that keeps its weight quantized.

The one border between two vocabularies: checkpoints say `weight`, `weight_codebooks`, `weight_scale`, `weight_order`;
`QuantizedWeight` and everything below it say codes, codebooks, scales, channel_order.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import crvq_kernels
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantized_weight import TENSOR_NAMES, LayerShape, QuantizedWeight, decode_codebooks, encode_codebooks
from .frozen import FrozenParameter, as_traced

# Arguments of the kernels.
_operands = itemgetter("weight", "weight_codebooks", "weight_scale", "weight_order", "bias")


class CRVQLinear(nn.Linear):
    """`y = x @ dequantize(weight).T + bias`, straight from the codes.

    A subclass of `nn.Linear`, so that code which looks for linear layers (PEFT, `_init_weights` of the models) finds
    one; its `weight` holds packed codes, not numbers. All tensors are parameters without gradient, because
    transformers and accelerate offload parameters, not buffers.

    Attributes:
        nbits: e, bits per code.
        num_critical_groups: Gc.
        codebook_bits: bits of a codebook entry where it is stored, 8 or 16.
        conv1d: whether this layer took the place of a transformers `Conv1D`; only dequantizing the model needs it.
        weight: uint8, packed codes: as stored, `[N, ceil(V*e/8)]`, or tiled for the kernels, one-dimensional.
        weight_codebooks: `[1+E, C, d]`: as stored, int8 or float16, or float16 for the kernels.
        weight_scale: `[N]`, float16.
        weight_order: `[K]`, smallest integer dtype that fits.
        bias: `[N]`, dtype of the model, or None.
    """

    _compute_dtype = torch.float32

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
        codebook_bits: int,
        bias_dtype: torch.dtype,
        device: torch.device | str | None = None,
    ) -> None:
        """Makes a layer with uninitialised tensors; see the attributes for their shapes."""
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.nbits = nbits
        self.num_critical_groups = num_critical_groups
        self.codebook_bits = codebook_bits
        self.conv1d = False
        if bias_dtype is not None:
            self._compute_dtype = bias_dtype
        self._packed: crvq_kernels.CPULayer | None = None
        shape = LayerShape(
            in_features=in_features,
            out_features=out_features,
            in_group_size=in_group_size,
            nbits=nbits,
            num_codebooks=num_codebooks,
            codebook_size=codebook_size,
            num_critical_groups=num_critical_groups,
            codebook_bits=codebook_bits,
        )
        for name, (size, dtype) in shape.tensors().items():
            self.register_parameter(name, _frozen(torch.empty(size, dtype=dtype, device=device)))
        bias_tensor = torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", _untrained(bias_tensor))

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> CRVQLinear:
        """Returns a layer that holds the tensors of `weight` and `bias` (`[N]` or None) without copying them."""
        layer = cls.from_shape(weight.shape, bias=bias is not None, bias_dtype=None, device="meta")
        for name, tensor in weight.tensors().items():
            setattr(layer, name, _frozen(tensor))
        layer.bias = _untrained(bias)
        return layer

    def tile_(self) -> CRVQLinear:
        """Puts codes and codebooks into the layout that is fastest where they are; what is saved stays the same.

        Layers whose tensors are moved for each forward by accelerate's hooks are left as they are stored.
        """
        if not (self.packed.is_meta or hasattr(self, "_hf_hook")):
            self.weight_codebooks = _frozen(decode_codebooks(self.weight_codebooks))
            tiled = crvq_kernels.prefers_tiles(self.packed.device)
            if tiled != self._is_tiled:
                weight = crvq_kernels.tile_codes(*self._codes()) if tiled else self._stored_weight()
                self.weight = _frozen(weight)
        return self

    @property
    def packed(self) -> nn.Parameter:
        """The parameter `weight`, also where `adapters` has the attribute show the dense weight."""
        return self._parameters["weight"]

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the model, which PEFT gives to adapters; follows `to`, `half` and so on."""
        cast_by_hand = self.weight_scale.dtype == torch.float32  # `prepare_model_for_kbit_training` of PEFT
        return torch.float32 if cast_by_hand else self._compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: torch.dtype) -> None:
        self._compute_dtype = dtype

    @property
    def _is_tiled(self) -> bool:
        return self.packed.dim() == 1

    def _codes(self) -> tuple[Tensor, int, int]:
        """Returns the codes as they are, bits per code, and the number of codes per row."""
        num_codebooks, _, in_group_size = self.weight_codebooks.shape
        num_codes = crvq_kernels.num_virtual_groups(
            self.in_features, in_group_size, num_codebooks, self.num_critical_groups
        )
        return self.packed.detach(), self.nbits, num_codes

    def _stored_weight(self) -> Tensor:
        """Returns the codes as they are stored, `[N, ceil(V*e/8)]`."""
        weight, nbits, num_codes = self._codes()
        return crvq_kernels.untile_codes(weight, nbits, self.out_features, num_codes) if self._is_tiled else weight

    def _stored_codebooks(self) -> Tensor:
        """Returns the codebooks as they are stored."""
        codebooks = self.weight_codebooks.detach()
        if self.codebook_bits == 8 and codebooks.is_floating_point():
            return encode_codebooks(codebooks)
        return codebooks if self.codebook_bits == 8 else codebooks.half()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Saves the tensors as they are stored, whatever became of them here."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # PEFT casts what is float in `prepare_model_for_kbit_training`.
        destination[f"{prefix}weight_scale"] = destination[f"{prefix}weight_scale"].half()
        destination[f"{prefix}weight_codebooks"] = self._stored_codebooks()
        if self._is_tiled:
            destination[f"{prefix}weight"] = self._stored_weight()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads stored codes and codebooks."""
        tiled, decoded = self._is_tiled, self.weight_codebooks.dtype != torch.int8
        if tiled:
            self.weight = _frozen(self._stored_weight())
        self.weight_codebooks = _frozen(self._stored_codebooks())
        super()._load_from_state_dict(*args, **kwargs)
        if tiled:
            self.tile_()
        elif decoded:
            self.weight_codebooks = _frozen(decode_codebooks(self.weight_codebooks))

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
            codebook_bits=shape.codebook_bits,
            bias_dtype=bias_dtype,
            device=device,
        )

    def quantized_weight(self) -> QuantizedWeight:
        """Returns the layer's tensors as they are stored, under their names in the algorithm; copied if need be."""
        stored = {"weight": self._stored_weight(), "weight_codebooks": self._stored_codebooks()}
        tensors = {name: self._parameters[name].detach() for name in TENSOR_NAMES} | stored
        return QuantizedWeight.from_tensors(tensors, self.nbits, self.num_critical_groups)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[N, K]` in `dtype`, as an `nn.Linear` would hold it."""
        tensors = [self.packed, decode_codebooks(self.weight_codebooks), self.weight_scale, self.weight_order]
        exact = torch.float32 if dtype == torch.float64 else dtype
        return crvq_kernels.dequantize(*tensors, self.nbits, self.num_critical_groups, exact).to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Returns `[..., N]` in the dtype of `input`, `[..., K]`."""
        if input.dtype == torch.float64:  # no kernel has it
            return F.linear(input, self.dequantize(input.dtype), self.bias)
        if crvq_kernels.is_plain(input, self._parameters.get("bias")) and input.is_cpu:
            if (layer := self._cpu_layer()) is not None:
                return layer(input)
        return crvq_kernels.linear(
            input,
            as_traced(self.packed),
            decode_codebooks(as_traced(self.weight_codebooks)),
            as_traced(self.weight_scale),
            as_traced(self.weight_order),
            self.bias,
            self.nbits,
            self.num_critical_groups,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out what is packed for the CPU kernel: it holds addresses."""
        return self.__dict__ | {"_packed": None}

    def _cpu_layer(self) -> crvq_kernels.CPULayer | None:
        """Returns the layer packed for the CPU kernel, anew if a tensor has changed; None if it is not tiled."""
        try:
            tensors = _operands(self._parameters)
        except KeyError:  # one of them is computed: a parametrization has taken its place
            return None
        if self._packed is None or not self._packed.is_of(*tensors):
            if tensors[0] is None or tensors[0].dim() != 1 or not crvq_kernels.prefers_tiles("cpu"):
                return None
            self._packed = crvq_kernels.CPULayer(*tensors, self.nbits, self.num_critical_groups)
        return self._packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CRVQLinear:
        """Moves the quantized tensors but never casts them: `model.to(torch.bfloat16)` casts only the bias.

        Codes that were tiled are laid out anew for the device they come to.
        """
        bias = self.bias
        follows = [] if bias is None else [bias, bias.grad]

        def move(tensor: Tensor) -> Tensor:
            if any(tensor is other for other in follows):
                return fn(tensor)
            probe = fn(tensor.new_empty(1))
            return fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)

        self._packed = None  # it holds on to the memory that is left
        super()._apply(move, recurse)
        self._compute_dtype = fn(torch.empty(1, dtype=self._compute_dtype)).dtype
        return self.tile_() if self._is_tiled else self

    def extra_repr(self) -> str:
        """Returns the numbers a reader of a printed model wants."""
        num_codebooks, codebook_size, in_group_size = self.weight_codebooks.shape
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"nbits={self.nbits}, in_group_size={in_group_size}, codebooks={num_codebooks}x{codebook_size}, "
            f"codebook_bits={self.codebook_bits}, "
            f"num_critical_groups={self.num_critical_groups}"
        )


def _frozen(tensor: Tensor) -> FrozenParameter:
    """Returns `tensor` as a parameter that has no gradient."""
    return FrozenParameter(tensor.detach(), requires_grad=False)


def _untrained(bias: Tensor | None) -> nn.Parameter | None:
    """Returns a bias as a parameter without gradient, None for None."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
