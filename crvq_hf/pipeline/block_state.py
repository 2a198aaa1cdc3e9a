"""What quantizing changes in a block, to be kept and put back, and the dtypes it has meanwhile lost."""

import torch
from torch import Tensor, nn

from ..config import CRVQConfig
from ..modeling.linear import CRVQLinear
from ..modeling.replace import linear_size, set_quantized_
from ..quantized_weight import QuantizedWeight


def tunable_state(module: nn.Module) -> dict[str, Tensor]:
    """Returns all that quantizing changes: the tensors of quantized layers, and the norms and biases."""
    quantized = [name for name, child in module.named_modules() if isinstance(child, CRVQLinear)]
    return {
        name: parameter
        for name, parameter in module.named_parameters()
        if parameter.dim() <= 1 or name.rpartition(".")[0] in quantized
    }


@torch.no_grad()
def load_block_(
    block: nn.Module,
    names: list[str],
    tensors: dict[str, Tensor],
    config: CRVQConfig,
    path: str,
    device: torch.device,
) -> None:
    """Puts finished linears, norms and biases, as `tunable_state` has returned them, into a block.

    Args:
        block: with dense linears.
        names: those to replace.
        tensors: by name.
        config: that they were quantized with.
        path: name of the block in the model.
        device: where the quantized linears go.
    """
    for name in names:
        in_features, out_features = linear_size(block.get_submodule(name))
        shape = config.of_layer(f"{path}.{name}").layer_shape(in_features, out_features)
        own = {
            key.removeprefix(f"{name}."): value.to(device)
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        set_quantized_(block, name, QuantizedWeight.from_tensors(own, shape.nbits, shape.num_critical_groups))
    for name, parameter in block.named_parameters():
        if name in tensors:
            parameter.data = tensors[name].to(parameter.device)


def dtypes_of(module: nn.Module) -> dict[str, torch.dtype]:
    """Returns the dtype of every parameter and buffer by name."""
    return {name: t.dtype for name, t in (*module.named_parameters(), *module.named_buffers())}


def restore_dtypes_(module: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """Casts what is still a float tensor back to what it was before the module went to fp32."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in dtypes and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes[name])
