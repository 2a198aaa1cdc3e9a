"""The plan: sizes from shapes alone, bytes beside what code really holds, and refusals that say what would help."""

import logging
import weakref
from dataclasses import replace

import pytest
import torch
import whole_models
from tiny import save_tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import crvq_hf
from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.algorithm.fit import fit_weight
from crvq_hf.commands.cli import main
from crvq_hf.pipeline import plan as pipeline_plan
from crvq_hf.planning import memory
from crvq_hf.planning.plan import Machine, plan_of
from crvq_hf.planning.sizes import BlockSizes, sizes_of
from crvq_hf.resources import distributed

GB = 10**9
LARGE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
LARGE |= {"num_attention_heads": 64, "num_key_value_heads": 8}


def empty(architecture: str, **changes):
    with torch.device("meta"):
        return whole_models.make(architecture, torch.bfloat16, **changes)


@pytest.fixture(scope="module")
def large():
    """Sizes of a Llama of 70 billion weights."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE)).to(torch.bfloat16)
    return sizes_of(model, CRVQConfig())


def machine(device: str = "cpu", gpu: int = 80, ram: int = 32, disk: int = 1000, **changes) -> Machine:
    return Machine(device, (gpu if device == "cuda" else ram) * GB, ram * GB, disk * GB, loaded=False, is_absent=True)


def work(**changes) -> memory.Work:
    fields = {"first": 64 * 256, "all": 384 * 256, "batch": 2048, "step": 256, "bfloat16": True}
    return memory.Work(**{"tunes_blocks": True, "tunes_end_to_end": True} | fields | changes)


def test_sizes_of_a_llama(large):
    assert len(large.blocks) == 80 and large.hidden == 8192 and large.vocabulary == 128256
    widths = [[[layer.out_features for layer in group] for group in stage] for stage in large.blocks[7].stages]
    assert widths == [[[8192, 1024, 1024]], [[8192]], [[28672, 28672]], [[8192]]]
    assert large.blocks[0].weights == 855_638_016 and large.blocks[0].others == 2 * 8192
    assert large.outside == 2 * 128256 * 8192 + 8192
    assert large.dense_bytes == 2 * (80 * (855_638_016 + 2 * 8192) + large.outside)


@pytest.mark.parametrize("architecture", whole_models.ARCHITECTURES)
def test_sizes_of_other_models(architecture):
    model = empty(architecture)
    parameters = sum(p.numel() for p in model.parameters())
    sizes = sizes_of(model, CRVQConfig(nbits_per_codebook=4))
    assert sizes.dense_bytes == 2 * parameters
    assert all(block.layers for block in sizes.blocks)
    groups = [len(group) for stage in sizes.blocks[0].stages for group in stage]
    assert max(groups) >= 2 or architecture == "gpt2"  # q, k and v share a Hessian


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while inside."""

    def __init__(self, *given):
        super().__init__()
        self.now, self.most = 0, 0
        self.known = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.known:
                storage = tensor.untyped_storage()
                key, nbytes = storage._cdata, storage.nbytes()
                self.known[key] = nbytes
                self.now += nbytes
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.free, key)
        return result

    def free(self, key):
        self.now -= self.known.pop(key)


@pytest.mark.parametrize(("n", "k"), [(512, 256), (256, 256), (64, 512), (1024, 128)])
@pytest.mark.parametrize("in_group_size", [4, 8])
def test_what_fitting_a_layer_holds(n, k, in_group_size, monkeypatch):
    monkeypatch.setattr("crvq_hf.algorithm.fit.ROUNDS", 2)
    shape = CRVQConfig(in_group_size=in_group_size, nbits_per_codebook=4).layer_shape(k, n)
    weight, hessian = torch.randn(n, k), torch.eye(k)
    with Held(weight, hessian) as held:
        fit_weight(
            weight,
            hessian,
            in_group_size=in_group_size,
            codebook_size=16,
            num_extended_codebooks=1,
            num_critical_groups=shape.num_critical_groups,
            generator=torch.Generator().manual_seed(0),
        )
    block = BlockSizes((((shape,),),), 0)
    planned = memory.fitting_bytes(block, work(first=0)) - weight.nbytes - hessian.nbytes
    assert 0.85 * planned < held.most < 1.1 * planned


def test_a_large_model_on_small_machines(large):
    """Read block by block it fits in 32 GB, but for what tunes all of it at once."""
    plan = plan_of(large, work(), machine())
    assert plan.memory["model"] == 2 * large.outside
    with pytest.raises(ValueError, match="needs .* GB of memory, 32.0 GB are free; give e2e_finetune_epochs=0"):
        plan.check()
    plan_of(large, work(tunes_end_to_end=False, all=64 * 256), machine()).check()
    plan = plan_of(large, work(), machine(ram=16))
    with pytest.raises(ValueError, match="no option makes it fit; take a machine with more memory"):
        plan.check()
    whole = plan_of(large, work(), replace(machine(ram=400), is_absent=False))
    assert whole.memory["model"] == large.dense_bytes
    whole.check()


def test_a_gpu_has_the_phases(large):
    plan = plan_of(large, work(), machine("cuda", ram=64))
    assert plan.device_peak > max(plan.phases.values()) and plan.memory_peak == sum(plan.memory.values())
    with pytest.raises(ValueError, match="GB of memory of cuda, 80.0 GB are free; give e2e_finetune_epochs=0"):
        plan.check()
    with pytest.raises(ValueError, match="no option makes it fit this GPU; give device='cpu'"):
        plan_of(large, work(), machine("cuda", gpu=8, ram=64)).check()


def test_the_disk_and_the_text(large):
    plan = plan_of(large, work(tunes_end_to_end=False, all=64 * 256), machine(disk=5))
    with pytest.raises(ValueError, match="GB of disk, 5.00 GB are free; free some, or name a folder elsewhere"):
        plan.check()
    much = work(tunes_end_to_end=False, first=10**6, all=10**6)
    with pytest.raises(ValueError, match="fewer nsamples or a shorter seqlen"):
        plan_of(large, much, machine()).check()


def test_what_is_loaded_is_not_asked_for_again(large):
    roomy = replace(machine(ram=100), is_absent=False)
    light = work(tunes_end_to_end=False, all=64 * 256)
    assert plan_of(large, light, roomy).missing() and not plan_of(large, light, replace(roomy, loaded=True)).missing()


def test_a_folder_is_planned_without_its_weights(tmp_path, capsys, monkeypatch):
    folder = save_tiny(tmp_path / "dense")
    (folder / "model.safetensors").write_bytes(b"")
    plan = crvq_hf.plan(folder, CRVQConfig(nbits_per_codebook=4, seqlen=16))
    assert set(plan.seconds) == {"writing its text", "running blocks", "Hessians", "fitting layers"} | {
        "block fine-tuning",
        "end-to-end fine-tuning",
    }
    assert all(value > 0 for value in plan.seconds.values())
    command = ["quantize", str(folder), str(tmp_path / "out"), "--plan", "--seqlen", "16", "--nbits-per-codebook", "4"]
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "LlamaForCausalLM: 2 blocks" in told and "an estimate from short pieces timed here" in told
    monkeypatch.setattr(distributed, "available_memory_bytes", lambda: 10**6)
    assert main(command) == 2
    assert "crvq: error: Quantizing LlamaForCausalLM needs" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_run_that_does_not_fit_is_refused_before_the_work(tmp_path, monkeypatch, caplog):
    model = whole_models.make("llama")
    config = CRVQConfig(**whole_models.FIELDS, work_dir=tmp_path / "work")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr(distributed, "available_memory_bytes", lambda: 10**5)
    with caplog.at_level(logging.INFO, "crvq"), pytest.raises(ValueError, match="LlamaForCausalLM needs .* of memory"):
        quantize_model(model, config=config)
    assert any(record.message.startswith("Plan: memory: ") for record in caplog.records)
    assert not (tmp_path / "work").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_is_not_built_without_numbers_has_no_plan(monkeypatch):
    def fail(*args):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(pipeline_plan, "plan_of_model", fail)
    pipeline_plan.check_plan(whole_models.make("llama"), CRVQConfig())


def test_embeddings_in_codes_are_planned(large):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LARGE)).to(torch.bfloat16)
    coded = sizes_of(model, CRVQConfig(embedding_bits=4))
    table = 128256 * 8192
    assert large.stored_outside == 2 * large.outside
    assert 0.99 * table < coded.stored_outside - 2 * 8192 <= table  # two of half a byte a weight
    plain, more = (plan_of(coded, work(codes_embeddings=codes), machine()) for codes in (False, True))
    assert 12 * table <= more.phases["embeddings"] < 14 * table  # of each weight three numbers, and a search
    assert more.phases["end-to-end fine-tuning"] > plain.phases["end-to-end fine-tuning"]
    assert memory.finished_bytes(coded) < memory.finished_bytes(large)
