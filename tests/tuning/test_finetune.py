"""Fine-tuning: gradients against definitions, modules put back as they were, runs that can be taken up again."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from crvq_kernels import channel_index, codebook_ids, pack_codes
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crvq_hf import CRVQLinear
from crvq_hf.quantized_weight import QuantizedWeight, normalised, order_dtype
from crvq_hf.tuning import tunable as module
from crvq_hf.tuning.block import finetune_block_
from crvq_hf.tuning.losses import distillation_loss, relative_loss
from crvq_hf.tuning.trainer import Trainer, learning_rate, shuffled
from crvq_hf.tuning.tunable import TunableLinear, _QuantizedProduct, groups_served, tunable

pytestmark = pytest.mark.usefixtures("precision", "quiet")


def random_linear(k: int = 32, n: int = 24, d: int = 8, nbits: int = 4, extended: int = 2, bias: bool = True):
    """Returns a random `CRVQLinear`."""
    critical = 2 if extended else 0
    size = min(2**nbits, 16)
    weight = QuantizedWeight(
        pack_codes(torch.randint(size, (n, k // d + extended * critical)), nbits),
        torch.randn(1 + extended, size, d).half(),
        torch.rand(n).add(0.1).half(),
        torch.randperm(k).to(order_dtype(k)),
        nbits,
        critical,
    )
    return CRVQLinear.from_quantized(weight, torch.randn(n) if bias else None)


class Block(nn.Module):
    """Norm, two quantized linears, a dense one, a residual: all that a decoder block has for fine-tuning."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up = random_linear(32, 48)
        self.down = random_linear(48, 32, extended=0, bias=False)
        self.router = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        h = self.norm(x)
        return x + 0.05 * self.down(F.silu(self.up(h))) + 0.1 * self.router(h)


@pytest.fixture
def block():
    return Block().eval()


def reconstruct_by_definition(codebooks, scales, codes, order, critical):
    """Returns the dense weight, one virtual group at a time; plain differentiable PyTorch."""
    num_codebooks, _, d = codebooks.shape
    groups = len(order) // d
    ids = codebook_ids(groups, num_codebooks, critical)
    index = channel_index(order, d, num_codebooks, critical)
    weight = torch.zeros(len(codes), len(order), dtype=codebooks.dtype)
    for v in range(codes.shape[1]):
        vectors = codebooks[ids[v]][codes[:, v].long()]
        weight = weight.index_add(1, index[v * d : (v + 1) * d], vectors)
    return weight * scales[:, None]


@pytest.mark.parametrize(("d", "extended", "critical"), [(4, 0, 0), (8, 1, 1), (8, 3, 2), (16, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_product_and_its_gradients_are_the_definition(d, extended, critical, dtype, at_once, monkeypatch):
    monkeypatch.setattr(module, "_SUMMED_AT_ONCE", at_once)
    n, groups, size = 7, 4, 5
    x = torch.randn(9, groups * d, dtype=dtype, requires_grad=True)
    codebooks = torch.randn(1 + extended, size, d, dtype=dtype, requires_grad=True)
    scales = torch.randn(n, dtype=dtype, requires_grad=True)
    codes = torch.randint(size, (n, groups + extended * critical), dtype=torch.int32)
    order = torch.randperm(groups * d)
    upstream = torch.randn(9, n, dtype=dtype)
    served = groups_served(codes, 1 + extended, size, critical)
    found = _QuantizedProduct.apply(x, codebooks, scales, codes, order, served)
    wanted = x @ reconstruct_by_definition(codebooks, scales, codes, order, critical).T
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad((y * upstream).sum(), (x, codebooks, scales)) for y in (found, wanted)]
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference)


def test_product_gradcheck():
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    codebooks = torch.randn(3, 4, 4, dtype=torch.float64, requires_grad=True)
    scales = torch.randn(5, dtype=torch.float64, requires_grad=True)
    codes, order = torch.randint(4, (5, 3 + 2 * 2)).int(), torch.randperm(12)
    served = groups_served(codes, 3, 4, 2)
    assert torch.autograd.gradcheck(
        lambda *args: _QuantizedProduct.apply(*args, codes, order, served), (x, codebooks, scales)
    )


def cut(values, starts):
    return [values[a:b].tolist() for a, b in zip(starts.tolist(), [*starts.tolist()[1:], len(values)], strict=True)]


def test_groups_served_by_every_codeword(monkeypatch):
    codes = torch.tensor([[1, 0, 1, 2], [1, 1, 0, 2]], dtype=torch.uint8)  # three groups, one of them critical
    groups, pieces, first = groups_served(codes, num_codebooks=2, codebook_size=4, critical=1)
    assert cut(groups, pieces[first[:2]]) == [[1, 5], [0, 2, 3, 4, 0, 3]]
    monkeypatch.setattr(module, "_SUMMED_AT_ONCE", 3)
    groups, pieces, first = groups_served(codes, num_codebooks=2, codebook_size=4, critical=1)
    assert cut(groups, pieces) == [[1, 5], [0, 2, 3], [4], [0, 3]]
    assert cut(torch.arange(len(pieces)), first) == [[0], [1, 2], [], [], [], [], [3], []]


def test_gradients_of_a_tunable_linear_arrive_in_fp32_under_autocast():
    linear = TunableLinear(random_linear())
    with torch.autocast("cpu", torch.bfloat16):
        linear(torch.randn(3, 32)).float().square().sum().backward()
    for parameter in (linear.codebooks, linear.relative_scales):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all() and parameter.grad.any()


@pytest.mark.parametrize("codebook_bits", [8, 16])
def test_what_is_tuned_is_what_is_stored(codebook_bits):
    linear = random_linear()
    books, _ = normalised(torch.randn(3, 16, 8), codebook_bits)
    linear = CRVQLinear.from_quantized(dataclasses.replace(linear.quantized_weight(), codebooks=books), None)
    tuned = TunableLinear(linear)
    with torch.no_grad():
        tuned.codebooks.mul_(1.7).add_(0.01 * torch.randn(3, 16, 8))
        tuned.relative_scales.mul_(0.9)
    x = torch.randn(5, 32)
    y = tuned(x)
    y.square().sum().backward()
    assert tuned.codebooks.grad.any()  # through the rounding
    assert (y - tuned.to_linear()(x)).norm() < 1e-3 * y.norm()  # float16 scales, far below the steps of int8
    assert tuned.to_linear().quantized_weight().codebook_bits == codebook_bits


@pytest.mark.parametrize("tokens", [(1, 1), (1, 63), (2, 32), (1, 65), (3, 50)], ids=str)
def test_distillation_loss_is_kl_div(tokens):
    logits = (3 * torch.randn(*tokens, 40)).requires_grad_(True)
    teacher = 3 * torch.randn(*tokens, 40)
    found = distillation_loss(logits, teacher)
    wanted = F.kl_div(
        F.log_softmax(logits, -1).flatten(0, 1),
        F.log_softmax(teacher, -1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    mine, reference = (torch.autograd.grad(3 * loss, logits)[0] for loss in (found, wanted))
    assert mine.shape == logits.shape
    torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-7)


def test_distillation_loss_of_bfloat16_logits():
    logits = (3 * torch.randn(2, 50, 40)).bfloat16().requires_grad_(True)
    teacher = (3 * torch.randn(2, 50, 40)).bfloat16()
    loss = distillation_loss(logits, teacher)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(
        float(distillation_loss(logits.detach().float(), teacher.float())), rel=1e-5
    )
    assert torch.autograd.grad(loss, logits)[0].dtype == torch.bfloat16


def test_no_divergence_from_oneself_nor_under_a_shift_or_huge_logits():
    teacher = 1000 * torch.randn(2, 5, 40)
    assert float(distillation_loss(teacher.clone(), teacher)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(teacher + 7.0, teacher)) == pytest.approx(0, abs=1e-3)
    assert math.isfinite(float(distillation_loss(-teacher, teacher)))


def test_relative_loss():
    target = torch.randn(2, 6, 16)
    assert float(relative_loss(target, target)) == 0
    assert float(relative_loss(torch.zeros_like(target), target)) == pytest.approx(math.log(2), rel=1e-5)
    output = torch.randn(2, 6, 16)
    scale = torch.rand(2, 6, 1) + 0.1  # tokens of any size count alike
    torch.testing.assert_close(relative_loss(output * scale, target * scale), relative_loss(output, target))
    assert relative_loss(output, torch.zeros_like(target)).isfinite()


@given(steps=st.integers(1, 500))
def test_learning_rate_warms_up_and_falls(steps):
    rates = [learning_rate(step, steps, 0.5) for step in range(steps)]
    assert max(rates) == 0.5 and min(rates) > 0
    top = rates.index(0.5)
    assert top <= steps / 20
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    if steps >= 20:
        assert rates[-1] < 0.02


def test_every_epoch_is_a_new_permutation():
    order = shuffled(20, 3, 1)
    epochs = [order[:20], order[20:40], order[40:]]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert order == shuffled(20, 3, 1) and order != shuffled(20, 3, 2)
    assert shuffled(4, 0, 1) == []


def snapshot(module: nn.Module):
    """Returns all that must be as before: classes, attributes, dtypes, flags, training modes."""
    modules = {
        name: (type(child), child.training, getattr(child, "conv1d", None), getattr(child, "nbits", None))
        for name, child in module.named_modules()
    }
    return modules, {name: (p.dtype, p.shape, p.requires_grad, p.grad) for name, p in module.named_parameters()}


def test_what_is_still_dense_takes_up_the_error(block):
    """The dense layer, 100 times as large as usual, moves relative to its size, and the loss falls further."""
    block.router.weight.data *= 100
    inputs = list(torch.randn(30, 2, 8, 32))
    target = copy.deepcopy(block)
    target.router.weight.data *= 1 + 0.02 * torch.randn(32, 32)
    targets = [target(x).detach() for x in inputs]
    before, losses = block.router.weight.clone(), {}
    for dense in ((), ("router",)):
        tuned = copy.deepcopy(block)
        losses[dense] = finetune_block_(tuned, tuned, inputs, targets, epochs=4, peak=8e-3, seed=0, dense=dense)[1]
        change = (tuned.router.weight - before).norm() / before.norm()
        assert (change == 0) if not dense else (0.005 < change < 0.1)
        assert tuned.router.weight.requires_grad and tuned.router.weight.grad is None
    assert losses[("router",)] < 0.5 * losses[()]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_tunable_puts_everything_back(block, train):
    block.train(train)
    block.up.conv1d = True
    block.router.weight.requires_grad_(False)
    before, weights = snapshot(block), block.up.dequantize(torch.float32)
    codes, order = block.up.weight.clone(), block.up.weight_order.clone()
    with tunable(block) as parameters:
        assert isinstance(block.up, TunableLinear) and isinstance(block.down, TunableLinear)
        names = {id(p): name for name, p in block.named_parameters()}
        assert {names[id(p)] for p in parameters} == {
            "norm.weight",
            "norm.bias",
            "up.codebooks",
            "up.relative_scales",
            "up.bias",
            "down.codebooks",
            "down.relative_scales",
        }
        trainable = {name for name, p in block.named_parameters() if p.requires_grad}
        assert trainable == {names[id(p)] for p in parameters}
        block(torch.randn(2, 3, 32)).sum().backward()
    assert snapshot(block) == before
    assert torch.equal(block.up.weight, codes) and torch.equal(block.up.weight_order, order)
    assert (block.up.dequantize(torch.float32) - weights).norm() < 1e-3 * weights.norm()


def test_tunable_puts_everything_back_after_an_error(block):
    before = snapshot(block)
    with pytest.raises(KeyError), tunable(block) as parameters:
        assert parameters
        raise KeyError
    assert snapshot(block) == before


def test_a_tunable_linear_computes_what_the_quantized_one_does():
    linear, x = random_linear(), torch.randn(5, 32)
    torch.testing.assert_close(TunableLinear(linear)(x), linear(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(TunableLinear(linear).to_linear()(x), linear(x), rtol=5e-3, atol=5e-3)


def test_codebooks_of_zeros_stay_finite():
    linear = random_linear()
    linear.weight_codebooks.zero_()
    back = TunableLinear(linear).to_linear()
    back.quantized_weight().check()
    assert not back.dequantize(torch.float32).any()


def some_parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 3), (5,), (2,)
    return [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in shapes]


def take_steps(trainer: Trainer, steps: range) -> list[float]:
    """The last parameter never gets a gradient, as in an expert that sees no token; the second only at odd steps."""
    losses = []
    for number in steps:
        first, second, _ = trainer.parameters
        loss = (first - number).square().mean()
        losses.append(trainer.step(number, loss + second.sin().sum() if number % 2 else loss))
    return losses


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_a_trainer_goes_on_bit_for_bit(stop):
    whole = Trainer(some_parameters(), 10, 0.1)
    losses = take_steps(whole, range(10))
    half = Trainer(some_parameters(), 10, 0.1)
    first = take_steps(half, range(stop))
    state = {key: value.clone() for key, value in half.state().items()}
    again = Trainer([nn.Parameter(torch.zeros_like(p)) for p in some_parameters()], 10, 0.1)
    again.load_state(state)
    assert first + take_steps(again, range(stop, 10)) == losses
    for mine, reference in zip(again.parameters, whole.parameters, strict=True):
        assert torch.equal(mine, reference)
    assert again.state().keys() == whole.state().keys()
    assert all(torch.equal(again.state()[key], value) for key, value in whole.state().items())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_is_refused(value):
    trainer = Trainer(some_parameters(), 10, 0.1)
    before = [p.detach().clone() for p in trainer.parameters]
    with pytest.raises(ValueError, match=f"a loss of {value} at step 3; try a smaller learning rate"):
        trainer.step(3, trainer.parameters[0].abs().sum() * float(value))
    assert all(torch.equal(p, b) for p, b in zip(trainer.parameters, before, strict=True))


def damaged_copy(block: Block) -> Block:
    """Returns a block whose codebooks, scales and norm are off by some noise."""
    copied = copy.deepcopy(block)
    for linear in (copied.up, copied.down):
        linear.weight_codebooks.add_(0.3 * torch.randn_like(linear.weight_codebooks))
        linear.weight_scale.mul_(0.8)
    copied.norm.weight.data.mul_(1.1)
    return copied


def test_fine_tuning_a_block_brings_it_closer(block):
    inputs = [torch.randn(2, 8, 32) for _ in range(8)]
    with torch.no_grad():
        targets = [block(x) for x in inputs]
    student = damaged_copy(block)

    @torch.no_grad()
    def loss() -> float:
        return sum(float(relative_loss(student(x), y)) for x, y in zip(inputs, targets, strict=True)) / 8

    before = loss()
    first, last = finetune_block_(student, student, inputs, targets, epochs=10, peak=8e-3, seed=0)
    assert first == pytest.approx(before, rel=0.3)
    assert last < 0.5 * first and loss() < 0.5 * before
    assert isinstance(student.up, CRVQLinear) and student.norm.weight.grad is None
    student.up.quantized_weight().check()


def test_fine_tuning_a_block_is_deterministic(block):
    inputs = [torch.randn(2, 8, 32) for _ in range(4)]
    targets = [x + 1 for x in inputs]
    results = []
    for seed in (0, 0, 1):
        student = copy.deepcopy(block)
        losses = finetune_block_(student, student, inputs, targets, epochs=2, peak=8e-3, seed=seed)
        results.append((losses, student.state_dict()))
    assert results[0][0] == results[1][0] != results[2][0]
    assert all(torch.equal(value, results[1][1][key]) for key, value in results[0][1].items())


def test_a_block_that_gives_nan_is_refused_and_put_back(block):
    before = snapshot(block)
    inputs = [torch.full((1, 4, 32), float("nan"))]
    with pytest.raises(ValueError, match="loss of nan at step 0"):
        finetune_block_(block, block, inputs, [torch.randn(1, 4, 32)], epochs=1, peak=1e-3, seed=0)
    assert snapshot(block) == before
