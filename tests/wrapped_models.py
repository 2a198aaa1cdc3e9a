"""What two processes check of a model in PyTorch's wrappers; test_wrappers.py starts it with `torch.distributed.run`.

    wrapped_models.py OUT

Writes what each process found to OUT/rank<N>.
"""

import itertools
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from whole_models import random_model

out, rank = Path(sys.argv[1]), int(os.environ["RANK"])
dist.init_process_group("gloo")
TOKENS = torch.arange(3, 27).view(2, 12)


def lora(model):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def equal_states(found, expected):
    assert list(found) == list(expected)
    for name, tensor in found.items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        assert whole.dtype == expected[name].dtype and torch.equal(whole, expected[name]), name


def ddp(bits):
    alone = lora(random_model(0, bits))
    loss = alone(input_ids=TOKENS[rank : rank + 1], labels=TOKENS[rank : rank + 1]).loss
    loss.backward()
    model = lora(random_model(rank, bits))  # that of the first process reaches the others
    wrapped = DistributedDataParallel(model)
    equal_states(model.state_dict(), alone.state_dict())
    assert torch.equal(wrapped(input_ids=TOKENS).logits, alone(input_ids=TOKENS).logits)
    wrapped(input_ids=TOKENS[rank : rank + 1], labels=TOKENS[rank : rank + 1]).loss.backward()
    expected = dict(alone.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = expected[name].grad.clone()
            dist.all_reduce(grad)
            torch.testing.assert_close(parameter.grad, grad / 2)


def broadcast(bits):
    model, expected = random_model(rank, bits), random_model(0, bits)
    for tensor in [*model.parameters(), *model.buffers()]:
        dist.broadcast(tensor.detach(), 0)
    equal_states(model.state_dict(), expected.state_dict())
    assert torch.equal(model(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)


def fsdp(bits):
    expected, model = random_model(0, bits), random_model(0, bits)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert torch.equal(model(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)
    state = model.state_dict()
    equal_states(state, expected.state_dict())
    assert all(hasattr(tensor, "full_tensor") for tensor in state.values())
    gathered = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    equal_states(gathered, expected.state_dict())
    assert torch.equal(model(input_ids=TOKENS).logits, expected(input_ids=TOKENS).logits)


for check, bits in itertools.product((ddp, broadcast, fsdp), (16, 8)):
    check(bits)
(out / f"rank{rank}").write_text("done")
dist.destroy_process_group()
