"""A layer under everything that does more with a tensor than compute with it: tracing, `torch.func`, modes, tangents.

The kernel of the CPU is called past PyTorch's dispatcher where nothing of that is going on, and nowhere else.
"""

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from crvq_hf import CRVQLinear
from crvq_hf.modeling.embedding import Int8Head
from crvq_hf.modeling.rows import quantize_rows
from crvq_hf.modeling.table import ROW_SCALE


def head_of(dense: nn.Linear) -> Int8Head:
    numbers, scales = quantize_rows(dense.weight)
    return Int8Head(dense, {"weight": numbers, ROW_SCALE: scales})


@pytest.fixture
def weight(make_weight):
    return make_weight(64, 24, nbits_per_codebook=6, critical_ratio=0.25)


@pytest.fixture
def layer(weight):
    return CRVQLinear.from_quantized(weight, torch.randn(24)).tile_()


@pytest.fixture
def dense(layer, weight):
    linear = nn.Linear(64, 24).requires_grad_(False)
    linear.weight.copy_(weight.dequantize(torch.float32))
    linear.bias.copy_(layer.bias)
    return linear


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def forward_tangent(module, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent))).tangent


def bias_tangent(module, x, tangent):
    twin = copy.deepcopy(module)
    with forward_ad.dual_level():
        bias = forward_ad.make_dual(twin.bias.detach(), tangent[0, :24].contiguous())
        return forward_ad.unpack_dual(torch.func.functional_call(twin, {"bias": bias}, x)).tangent.expand(3, 24)


TRANSFORMS = {
    "functionalize": lambda f, x, t: torch.func.functionalize(f)(x),
    "vmap": lambda f, x, t: torch.func.vmap(f)(x),
    "vmap out": lambda f, x, t: torch.func.vmap(f, in_dims=1, out_dims=1)(x.T.contiguous()),
    "vmap twice": lambda f, x, t: torch.func.vmap(torch.func.vmap(f))(torch.stack([x, t])),
    "grad": lambda f, x, t: torch.func.grad(lambda v: f(v).square().sum())(x),
    "vmap of grad": lambda f, x, t: torch.func.vmap(torch.func.grad(lambda v: f(v).square().sum()))(x),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,)),
    "vjp": lambda f, x, t: torch.func.vjp(f, x)[1](t[:, :24].contiguous()),
    "jacrev": lambda f, x, t: torch.func.jacrev(f)(x[0]),
    "jacfwd": lambda f, x, t: torch.func.jacfwd(f)(x[0]),
    "hessian": lambda f, x, t: torch.func.hessian(lambda v: f(v).square().sum())(x[0]),
    "linearize": lambda f, x, t: torch.func.linearize(f, x)[1](t),
    "forward AD": forward_tangent,
    "forward AD of the bias": bias_tangent,
    "trace": lambda f, x, t: torch.jit.trace(f, x, check_trace=False)(t),
    "export": lambda f, x, t: torch.export.export(f, (x,)).module()(t),
    "compile": lambda f, x, t: torch.compile(f, fullgraph=True, backend="aot_eager")(x),
    "compiled jvp": lambda f, x, t: torch.compile(lambda v: torch.func.jvp(f, (v,), (t,))[1], backend="eager")(x),
    "make_fx": lambda f, x, t: make_fx(f)(x)(t),
    "make_fx before dispatch": lambda f, x, t: make_fx(f, pre_dispatch=True)(x)(t),
    "gradient of a gradient": lambda f, x, t: torch.autograd.functional.hvp(lambda v: f(v).square().sum(), x, t),
}


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "stored"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())
def test_a_transform_gives_what_it_gives_for_a_dense_layer(weight, layer, dense, transform, tiled):
    if not tiled:
        layer = CRVQLinear.from_quantized(weight, layer.bias)
    x, tangent = torch.randn(3, 64), torch.randn(3, 64)
    layer(x)  # so that it is packed for the kernel
    for ours, theirs in zip(transform(layer, x, tangent), transform(dense, x, tangent), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "name", [name for name in TRANSFORMS if "compile" not in name and name != "forward AD of the bias"]
)
def test_a_head_in_8_bits_under_a_transform(name, dtype):
    dense = nn.Linear(64, 24, bias=False).to(dtype).requires_grad_(False)
    head = head_of(dense)
    x, tangent = torch.randn(3, 64).to(dtype), torch.randn(3, 64).to(dtype)
    results = zip(TRANSFORMS[name](head, x, tangent), TRANSFORMS[name](head.to_dense(dtype), x, tangent), strict=True)
    for ours, theirs in results:
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()


def test_a_traced_head_takes_any_number_of_tokens():
    dense = nn.Linear(64, 24)
    head = head_of(dense)
    trace = torch.jit.trace(head, torch.randn(3, 64))
    x = torch.randn(20, 64)
    close(trace(x), head(x))


def test_layers_of_an_ensemble(make_weight, layer):
    weights = [make_weight(64, 24, nbits_per_codebook=6, critical_ratio=0.25) for _ in range(3)]
    layers = [CRVQLinear.from_quantized(weight, torch.randn(24)).tile_() for weight in weights]
    parameters, buffers = torch.func.stack_module_state(layers)
    x = torch.randn(5, 64)
    y = torch.func.vmap(lambda p, b: torch.func.functional_call(layer, (p, b), x))(parameters, buffers)
    close(y, torch.stack([one(x) for one in layers]))


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Seen, SeenFunctions])
def test_a_mode_sees_the_layer(layer, mode):
    x = torch.randn(3, 64)
    expected = layer(x)
    with mode() as seen:
        assert torch.equal(layer(x), expected)
    assert any("crvq.linear" in name for name in seen.names)


class Traced(torch.Tensor):
    """A subclass that notes what was done with it."""

    names: list = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.names.append(str(func))
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_subclass_sees_the_layer_and_stays(layer):
    x = torch.randn(3, 64)
    y = layer(x.as_subclass(Traced))
    assert type(y) is Traced and any("crvq.linear" in name for name in Traced.names)
    close(y.as_subclass(torch.Tensor), layer(x))


def test_a_trace_holds_the_operator(layer):
    assert "crvq::linear" in str(torch.jit.trace(layer, torch.randn(3, 64)).inlined_graph)


def test_numbers_that_lie_in_memory_with_the_other_sign(layer):
    z = torch.complex(torch.randn(3, 64), torch.randn(3, 64))
    x = z.conj().imag
    assert x.is_neg()
    close(layer(x), layer(-z.imag.contiguous()))


def test_a_bias_that_is_computed(layer):
    class Double(nn.Module):
        def forward(self, bias):
            return 2 * bias

    x = torch.randn(3, 64)
    expected = layer(x) + layer.bias
    parametrize.register_parametrization(layer, "bias", Double())
    close(layer(x), expected)


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_default_dtype_changes_nothing(weight, layer, default, dtype, num_tokens):
    before = torch.get_default_dtype()
    x = torch.randn(num_tokens, 64).to(dtype)
    expected = layer(x), layer.dequantize(dtype), CRVQLinear.from_quantized(weight, layer.bias)(x)
    try:
        torch.set_default_dtype(default)
        found = layer(x), layer.dequantize(dtype), CRVQLinear.from_quantized(weight, layer.bias)(x)
    finally:
        torch.set_default_dtype(before)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("num_tokens", [1, 40, 300])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_changes_nothing(weight, layer, device, num_tokens):
    x = torch.randn(num_tokens, 64)
    expected = layer(x), layer.dequantize(torch.float32), CRVQLinear.from_quantized(weight, layer.bias)(x)
    with torch.device(device):
        found = layer(x), layer.dequantize(torch.float32), CRVQLinear.from_quantized(weight, layer.bias)(x)
    assert all(torch.equal(a, b) and a.device == b.device for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tiled", [True, False], ids=["tiled", "stored"])
@pytest.mark.parametrize("shape", [(64,), (1, 64), (2, 1, 64), (2, 150, 64), (0, 64)])
@pytest.mark.parametrize("grad", ["x", "bias", "none", "no_grad"])
def test_the_output_can_be_changed_in_place(weight, layer, dense, shape, grad, tiled):
    if not tiled:
        layer = CRVQLinear.from_quantized(weight, layer.bias)
    x = torch.randn(shape)
    results = []
    for module in (layer, dense):
        own = x.clone().requires_grad_(grad == "x")
        module.bias.requires_grad_(grad == "bias")
        with torch.set_grad_enabled(grad != "no_grad"):
            y = module(own)
            assert module is dense or y._base is None  # no view
            y += 1
            y.mul_(y.detach() + 2)
        if grad in ("x", "bias"):
            y.square().sum().backward()
        results.append((y.detach(), own.grad if grad == "x" else module.bias.grad))
    close(results[0][0], results[1][0])
    if grad in ("x", "bias"):
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-2, atol=1e-2)
