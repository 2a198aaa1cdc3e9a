"""Blocks run one at a time give what they give in the model, or the model is refused."""

import pytest
import torch
import transformers
from many_models import MODELS, REFUSED, build
from shrink import tiny_model
from tiny import TEXT, tiny_tokenizer
from torch import nn
from whole_models import ARCHITECTURES, make, tokens_for

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.blocks.rehearsal import rehearse
from crvq_hf.blocks.runner import State, run_on
from crvq_hf.blocks.trees import hidden_of
from crvq_hf.pipeline import streams
from crvq_hf.pipeline.streams import Stream


def watched(model, blocks, tokens) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Returns the hidden states that the blocks of a whole model give, by number, and what the model gives."""
    found: dict[int, torch.Tensor] = {}

    def note(index):
        return lambda module, args, output: found.update({index: hidden_of(output).clone()})

    handles = [block.register_forward_hook(note(index)) for index, block in enumerate(blocks)]
    with torch.no_grad():
        output = hidden_of(run_on(model, {"input_ids": tokens}))
    for handle in handles:
        handle.remove()
    return found, output


def assert_same(found, wanted) -> None:
    assert found.shape == wanted.shape and wanted.norm() > 0
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


def check_one_by_one(model) -> None:
    """Moves texts past all blocks, in batches of two, and compares with the model."""
    runner = rehearse(model)
    tokens = tokens_for(model, (5, 12))
    tokens[3, -4:] = 0  # padding, of which masks or pooling may be made
    wanted, output = watched(model, runner.blocks, tokens)
    assert wanted.keys() == set(runner.order)
    stream = Stream(runner, tokens)
    assert [len(state) for state in stream.states] == [2, 2, 1]
    for index in runner.order:
        pieces = [runner.call(index, runner.arguments(index, state)) for state in stream.steps()]
        stream.move(index, lambda state, index=index: runner.call(index, runner.arguments(index, state)))
        assert_same(stream.hidden, wanted[index])
        assert len(pieces) == 5
        for piece, state in zip(pieces, stream.steps(), strict=True):
            assert_same(hidden_of(piece.output), state.hidden)
    with torch.no_grad():
        found = [hidden_of(runner.output(state)) for state in stream.states]
    assert_same(torch.cat(found), output)
    assert all("forward" not in block.__dict__ for block in runner.blocks)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(streams, "RUN_TOKENS", 24)
    monkeypatch.setattr(streams, "STEP_TOKENS", 12)


@pytest.mark.parametrize("architecture", MODELS)
def test_blocks_one_by_one_give_what_they_give_in_the_model(architecture):
    check_one_by_one(build(architecture))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_also_with_every_kind_of_attention_mask(architecture, attention):
    """Sliding windows have a mask only for texts longer than they are, and so than those of the rehearsal."""
    check_one_by_one(make(architecture, attention=attention))


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_cannot_be_run_one_by_one_is_refused(architecture):
    with pytest.raises(ValueError, match=REFUSED[architecture][3] + ".*use dataset=None"):
        rehearse(build(architecture))


@pytest.mark.parametrize("architecture", ["per-layer inputs, AltUp", "returns a pair"])
def test_in_half_precision_too(architecture):
    model = build(architecture, torch.bfloat16)
    leaves = rehearse(model).leaves[0]
    assert leaves[0].dtype == torch.bfloat16


def test_only_what_is_handed_on_is_kept():
    """Attention weights that a block returns would take more memory than all else."""
    runner = rehearse(build("positions for each head and text"))
    assert len(runner.leaves[0]) == 1 and runner.other_bytes == 0
    assert rehearse(build("an encoder and its decoder")).keeps_all  # its first block's position bias


class Memory(nn.Module):
    """A block that is given one state more at each run."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block, self.runs = block, 0

    def forward(self, hidden, *args, **kwargs):
        self.runs += 1
        return self.block(hidden, *args, **kwargs) * self.runs


def test_a_block_that_remembers_its_runs_is_refused():
    model = make("llama")
    model.model.layers[1] = Memory(model.model.layers[1])
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: model.layers.1, run block by block, does not give"):
        rehearse(model)


class Remembering(nn.Module):
    """A block that leaves its input for all later ones, in a dict that it is given."""

    def __init__(self, block: nn.Module, model: nn.Module):
        super().__init__()
        self.block = block
        self.register_forward_pre_hook(lambda _, args, kw: (args, {"left": model.left} | kw), with_kwargs=True)

    def forward(self, hidden, *args, left, **kwargs):
        left[len(left)] = hidden
        return self.block(sum(left.values()), *args, **kwargs)


def test_what_blocks_leave_for_later_ones_is_kept():
    """Also where it is the very tensor that the stream keeps hidden states in."""
    model = make("llama", num_hidden_layers=4)
    model.get_input_embeddings().register_forward_hook(lambda *_: setattr(model, "left", {}))
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = Remembering(block, model)
    check_one_by_one(model)


def test_a_model_that_takes_no_text_alone_is_refused():
    model = make("llama")
    model.forward = model.model.forward = lambda input_ids, pixel_values: None
    with pytest.raises(
        ValueError, match="LlamaForCausalLM cannot be calibrated on text alone .*pixel_values.*weights"
    ):
        rehearse(model)


def test_tokens_that_mean_something_are_left_alone(monkeypatch):
    """The place of an image, say; Llama 3 has a list of end tokens. Padding is at the end of a text, as ever."""
    model, seen = make("llama"), []
    model.config.image_token_index, model.config.eos_token_id = 7, [11, 12]
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda input_ids, **kw: seen.append(input_ids) or forward(input_ids, **kw))
    rehearse(model)
    used = set(torch.cat(seen[:3]).flatten().tolist())
    assert len(used) > 20 and not used & {1, 7, 11, 12}
    assert [tokens.shape for tokens in seen[:3]] == [(2, 8), (2, 8), (3, 8)]
    assert [int((tokens == 0).sum()) for tokens in seen[:3]] == [0, 1, 0] and seen[1][0, -1] == 0


def test_the_rehearsal_is_cheap(monkeypatch):
    """A few dozen tokens, whatever the model."""
    model, seen = make("llama"), []
    forward = model.forward

    def count(input_ids, **kwargs):
        seen.append(input_ids.numel())
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", count)
    runner = rehearse(model)
    assert sum(seen[:3]) < 100  # later ones stop at a block, or have only what follows the blocks to do
    assert isinstance(model, transformers.PreTrainedModel) and runner.has_head
    runner.arguments(0, State({"input_ids": tokens_for(model)}))


def test_whether_autograd_can_follow_blocks(caplog, tmp_path):
    """Reformer's blocks run without gradients: such a model is calibrated and not tuned."""
    assert rehearse(build("returns a pair")).has_gradients
    model = tiny_model("reformer", transformers.AutoModelForCausalLM)
    assert not rehearse(model).has_gradients
    fields = {"nsamples": 1, "e2e_nsamples": 1, "seqlen": 8, "nbits_per_codebook": 4, "work_dir": tmp_path / "work"}
    quantize_model(model, tiny_tokenizer(), CRVQConfig(dataset=[TEXT], **fields))
    assert model.crvq_report["e2e_loss"] is None
    assert "Autograd cannot follow the blocks of ReformerModelWithLMHead" in caplog.text
