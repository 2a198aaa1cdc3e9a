"""The border to C: what may pass it, and that all that does has passed the one check."""

import ast
from pathlib import Path

import pytest
import torch
from crvq_kernels import CPULayer, cpu
from crvq_kernels.cpu.address import address

FOLDER = Path(cpu.__file__).parent


def test_an_address_is_that_of_the_first_element():
    x = torch.randn(4, 6, dtype=torch.float32)
    assert address(x, torch.float32, 24) == x.data_ptr()
    assert address(x[1:], torch.float32, 18) == x.data_ptr() + 24
    assert address(x[:0], torch.float32, 0) == x[:0].data_ptr()


def emptied():
    x = torch.zeros(24, dtype=torch.float32)
    x.untyped_storage().resize_(0)
    return x


WRONG = {
    "dtype": lambda: torch.zeros(24, dtype=torch.bfloat16),
    "fewer": lambda: torch.zeros(23, dtype=torch.float32),
    "more": lambda: torch.zeros(25, dtype=torch.float32),
    "transposed": lambda: torch.zeros(4, 6, dtype=torch.float32).T,
    "strided": lambda: torch.zeros(48, dtype=torch.float32)[::2],
    "expanded": lambda: torch.zeros(1, dtype=torch.float32).expand(24),
    "device": lambda: torch.zeros(24, dtype=torch.float32, device="meta"),
    "freed": emptied,
    "functional": lambda: torch._to_functional_tensor(torch.zeros(24, dtype=torch.float32)),
}


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG.keys())
def test_anything_else_is_refused(make):
    with pytest.raises(ValueError, match="takes 24 elements of torch.float32, contiguous and in the CPU's"):
        address(make(), torch.float32, 24)


@pytest.mark.parametrize("position", range(5))
@pytest.mark.parametrize("wrong", ["dtype", "shorter", "strided", "meta", "freed"])
def test_a_layer_of_anything_else_is_refused(make_layer, position, wrong):
    layer = make_layer(64, 128)
    args = [layer.tiles, *layer.tensors[1:], layer.bias]
    tensor = args[position].clone()
    if wrong == "dtype":
        tensor = tensor.to(torch.complex64)
    elif wrong == "shorter":
        tensor = tensor[..., :-1].contiguous()
    elif wrong == "strided":
        tensor = torch.stack([tensor, tensor], -1)[..., 0]
    elif wrong == "meta":
        tensor = tensor.to("meta")
    else:
        tensor.untyped_storage().resize_(0)
    args[position] = tensor
    with pytest.raises(ValueError, match="the compiled kernel takes|not those of a tiled layer|must|multiple"):
        CPULayer(*args, *layer.constants)


@pytest.mark.parametrize("position", range(5))
def test_no_other_memory_comes_to_lie_where_a_layer_reads(make_layer, position):
    """A tensor's data may be swapped twice: the second time a smaller piece can get the address of the first."""
    layer = make_layer(256, 2048)
    args = [layer.tiles, *layer.tensors[1:], layer.bias]
    args[position] = tensor = args[position].clone()
    packed = CPULayer(*args, *layer.constants)
    size, place = tensor.nbytes, tensor.data_ptr()
    tensor.data = torch.empty(0, dtype=tensor.dtype)
    others = [torch.empty(size, dtype=torch.uint8) for _ in range(50)]
    assert all(other.data_ptr() != place for other in others) and not packed.is_of(*args)


def test_every_address_passes_the_check():
    """No other file asks a tensor for its address to hand it to C; comparing addresses is not that."""
    asking = {}
    for file in FOLDER.glob("*.py"):
        for function in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(function, ast.FunctionDef):
                names = [node.attr for node in ast.walk(function) if isinstance(node, ast.Attribute)]
                if "data_ptr" in names or "ctypes" in names:
                    asking.setdefault(file.name, []).append(function.name)
    assert asking == {"address.py": ["address"], "binding.py": ["is_of"]}
