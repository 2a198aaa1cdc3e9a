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
from crvq_kernels import decode_codebooks, encode_codebooks
from torch import Tensor, nn
from torch.nn import functional as F

from ..quantized_weight import LayerShape, QuantizedWeight, order_dtype
from .frozen import frozen_parameter

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
        weight_codebooks: `[1+E, C, d]`: as stored, int8 or float16, or float16 for the kernels of a CPU.
        weight_scale: `[N]`, float16.
        weight_order: `[K]`: as stored, the smallest integer dtype that fits, or int32 in place of int16, which neither
            gloo nor NCCL send from one process to another.
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
            self.register_parameter(name, frozen_parameter(torch.empty(size, dtype=dtype, device=device)))
        bias_tensor = torch.empty(out_features, dtype=bias_dtype, device=device) if bias else None
        self.register_parameter("bias", _untrained(bias_tensor))

    @classmethod
    def from_quantized(cls, weight: QuantizedWeight, bias: Tensor | None) -> CRVQLinear:
        """Returns a layer that holds the tensors of `weight` and `bias` (`[N]` or None) without copying them."""
        layer = cls.from_shape(weight.shape, bias=bias is not None, bias_dtype=None, device="meta")
        for name, tensor in weight.tensors().items():
            setattr(layer, name, frozen_parameter(tensor))
        layer.bias = _untrained(bias)
        return layer

    def tile_(self) -> CRVQLinear:
        """Puts all tensors into the layout that is best where they are; what is saved stays the same.

        Layers whose tensors are brought for each forward by accelerate's hooks are left as they are stored.
        """
        if not (self.packed.is_meta or brings_tensors(getattr(self, "_hf_hook", None))):
            stored = crvq_kernels.prefers_int8_codebooks(self.packed.device) and self.codebook_bits == 8
            codebooks = self._stored_codebooks() if stored else decode_codebooks(self.weight_codebooks)
            self._put("weight_codebooks", codebooks)
            if self.weight_order.dtype == torch.int16:
                self._put("weight_order", self.weight_order.int())
            tiled = crvq_kernels.prefers_tiles(self.packed.device)
            if tiled != self._is_tiled:
                weight = crvq_kernels.tile_codes(*self._codes()) if tiled else self._stored_weight()
                self._put("weight", weight)
        return self

    def _put(self, name: str, tensor: Tensor) -> None:
        """Makes `tensor` the parameter `name`, with what others (transformers) have noted on the one before."""
        parameter = nn.Parameter(tensor.detach(), requires_grad=False)
        parameter.__dict__.update(self._parameters[name].__dict__)
        setattr(self, name, frozen_parameter(parameter))

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
        if not self._is_tiled:
            return weight
        return _on_whole(weight, lambda whole: crvq_kernels.untile_codes(whole, nbits, self.out_features, num_codes))

    def _stored_codebooks(self) -> Tensor:
        """Returns the codebooks as they are stored."""
        codebooks = self.weight_codebooks.detach()
        if self.codebook_bits == 8 and codebooks.is_floating_point():
            return encode_codebooks(codebooks)
        return codebooks if self.codebook_bits == 8 else codebooks.half()

    def _stored_order(self) -> Tensor:
        """Returns the channel order as it is stored."""
        order, dtype = self.weight_order.detach(), order_dtype(self.in_features)
        return order if order.dtype == dtype else _on_whole(order, lambda whole: whole.to(dtype))

    def _stored(self) -> dict[str, Tensor]:
        """Returns the tensors by their names in `TENSOR_NAMES` as they are stored, whatever became of them here."""
        return {
            "weight": self._stored_weight(),
            "weight_codebooks": self._stored_codebooks(),
            "weight_scale": self.weight_scale.detach().half(),  # PEFT casts what is float for its training
            "weight_order": self._stored_order(),
        }

    def _store_(self) -> None:
        """Undoes `tile_`."""
        for name, tensor in self._stored().items():
            parameter = self._parameters[name]
            if tensor.dtype != parameter.dtype or tensor.shape != parameter.shape:
                self._put(name, tensor)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """Saves the tensors as they are stored."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self._stored().items():
            destination[prefix + name] = tensor

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Loads tensors as they are stored."""
        tiled, decoded, order = self._is_tiled, self.weight_codebooks.dtype != torch.int8, self.weight_order.dtype
        self._store_()
        super()._load_from_state_dict(*args, **kwargs)
        if tiled:
            self.tile_()
            return
        if decoded:
            self._put("weight_codebooks", decode_codebooks(self.weight_codebooks))
        if self.weight_order.dtype != order:
            self._put("weight_order", self.weight_order.to(order))

    def __setattr__(self, name: str, value: Any) -> None:
        """Shows accelerate the tensors as they are stored while it hooks itself in (it keeps the forward first).

        It brings tensors from a state dict, in shapes that must be those of the parameters.
        """
        super().__setattr__(name, value)
        if name == "_old_forward":
            self._store_()
        elif name == "_hf_hook":
            self.tile_()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        if name == "_hf_hook":
            self.tile_()

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
        return QuantizedWeight.from_tensors(self._stored(), self.nbits, self.num_critical_groups)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the dense weight `[N, K]` in `dtype`, as an `nn.Linear` would hold it."""
        tensors = [self.packed, self.weight_codebooks, self.weight_scale, self.weight_order]
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
            self.packed,
            self.weight_codebooks,
            self.weight_scale,
            self.weight_order,
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


def brings_tensors(hook: Any) -> bool:
    """Returns whether a hook of accelerate brings a module's tensors for each forward and takes them away again."""
    return any(getattr(part, "offload", False) for part in getattr(hook, "hooks", [hook]))


def _on_whole(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `change(tensor)`; of one that is shared out over processes (FSDP2), what it makes of the whole is."""
    if not hasattr(tensor, "full_tensor"):
        return change(tensor)
    from torch.distributed.tensor import Replicate, distribute_tensor

    whole, mesh = change(tensor.full_tensor()), tensor.device_mesh
    # Shares of int16 could not be sent when they are to be put together again.
    placements = [Replicate()] * mesh.ndim if whole.dtype == torch.int16 else tensor.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)  # all have the whole: nothing need be sent


def _untrained(bias: Tensor | None) -> nn.Parameter | None:
    """Returns a bias as a parameter without gradient, None for None."""
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
