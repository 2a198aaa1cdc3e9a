"""Calls the CPU kernel through the binding, for the address sanitizer to watch. test_sanitizers.py runs it.

    python sanitize.py LIBRARY

Prints "done" if every result was that of the reference. Then the check of addresses is taken away and too little
memory handed over, which the sanitizer is to see.
"""

import itertools
import os
import sys
from pathlib import Path

import torch

for name in [name for name in os.environ if name.startswith("CRVQ_")]:
    del os.environ[name]
sys.path[:0] = [str(Path(__file__).parents[1])]
from conftest import make_layer  # noqa: E402
from crvq_kernels import CPULayer, cpu, dequantize_ref, linear, linear_ref  # noqa: E402
from crvq_kernels.cpu import binding  # noqa: E402
from crvq_kernels.cpu.rows import int8_rows  # noqa: E402

make = make_layer._get_wrapped_function()()
binding.FILE = Path(sys.argv[1])
torch.manual_seed(0)
torch.set_num_threads(2)
torch.set_default_dtype(torch.bfloat16)  # what is allocated must not follow it

SHAPES = [(100, 72, 8, 8, 3, 2), (33, 144, 4, 11, 1, 3), (64, 256, 16, 4, 0, 0), (17, 1032, 8, 12, 7, 1)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
for level, shape in itertools.product(cpu.library().supported, SHAPES):
    cpu.library().level = level
    layer = make(*shape, dtype=torch.float32)
    args = (layer.tiles, *layer.tensors[1:], layer.bias)
    for dtype, (tokens, weights_per_step) in itertools.product(DTYPES, [(1, 40), (3, 40), (70, 40), (70, 2**20)]):
        binding._WEIGHTS_PER_STEP = weights_per_step
        x = torch.randn(tokens, shape[1]).to(dtype)
        y = linear(x, *args, *layer.constants)
        expected = linear_ref(x.float(), *layer.linear_args(True))
        assert y.dtype == dtype and (y - expected).norm() < 1e-2 * expected.norm()
    weight = CPULayer(*args, *layer.constants).dequantize(torch.bfloat16)
    assert torch.equal(weight, dequantize_ref(*layer.tensors, *layer.constants, torch.bfloat16))
for level, dtype in itertools.product(cpu.library().supported, DTYPES):
    cpu.library().level = level
    numbers = torch.randint(-127, 128, (2009, 201), dtype=torch.int8)
    x, scales = torch.randn(7, 201, dtype=dtype), torch.rand(2009, dtype=dtype)
    expected = x.double() @ (numbers.double() * scales.double()[:, None]).T
    assert (int8_rows(x, numbers, scales) - expected).norm() < 1e-5 * expected.norm()
print("done", flush=True)

allocate, binding.address = torch.empty, lambda tensor, dtype, numel: tensor.data_ptr()
torch.empty = lambda *size, dtype, device: allocate(*size, device=device)
CPULayer(*args, *layer.constants).dequantize(torch.float32)
