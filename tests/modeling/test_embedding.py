"""Embeddings and heads in 8 bits and fewer: what they compute, ties, and every way of saving and loading them."""

import copy
import json
import pickle

import pytest
import torch
from crvq_kernels import dequantize_rows
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import SIZES
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.info import read_info
from crvq_hf.commands.info import describe
from crvq_hf.modeling.coded import CodedEmbedding, CodedHead
from crvq_hf.modeling.embedding import Int8Embedding, Int8Head, Rows
from crvq_hf.modeling.rows import quantize_rows

pytestmark = pytest.mark.usefixtures("pipeline")

EIGHT = CRVQConfig(dataset=None, embedding_bits=8)
# Gemma's scaled embedding, GPT-2's position embedding, a scaled embedding as BART's, a head with a bias.
CASES = {
    "llama": {"tie_word_embeddings": False},
    "llama tied": {"tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"n_inner": 64},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "xglm": {"ffn_dim": 64, "scale_embedding": True},
    "phi": {},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}


@pytest.fixture(params=[8, 2.5], ids="{} bits".format)
def quantized(request):
    """The config of each kind of quantized rows."""
    return CRVQConfig(dataset=None, embedding_bits=request.param)


def classes(config) -> tuple[type, type]:
    return (CodedEmbedding, CodedHead) if config.has_coded_embeddings else (Int8Embedding, Int8Head)


@pytest.fixture
def make():
    """Returns a function (case of CASES, dtype) -> random dense model of 64 tokens and 32 channels."""

    def make(case: str, dtype: torch.dtype = torch.float32):
        config = AutoConfig.for_model(case.split()[0], **SIZES | CASES[case])
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def assert_equal_checkpoints(folder, other) -> None:
    first, second = ({k: v for f in d.glob("*.safetensors") for k, v in load_file(f).items()} for d in (folder, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_rows_are_within_half_a_step():
    weight = torch.randn(50, 32) * torch.logspace(-3, 2, 50)[:, None]
    weight[7] = 0
    numbers, scales = quantize_rows(weight)
    assert numbers.dtype == torch.int8 and scales.dtype == weight.dtype
    assert torch.equal(scales, scales.half().float())
    error = (dequantize_rows(numbers, scales, torch.float32) - weight).abs().amax(dim=1)
    assert (error <= 0.51 * scales + 127 * scales * 2**-11).all()  # the scale is rounded to float16
    assert (numbers[7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_of_half_precision_models_survive_float16(dtype):
    _, scales = quantize_rows(torch.randn(50, 32).to(dtype))
    assert scales.dtype == dtype and torch.equal(scales.half().to(dtype), scales)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e38])
def test_rows_that_do_not_fit_are_refused(value):
    weight = torch.randn(9, 8)
    weight[3, 2] = value
    with pytest.raises(ValueError, match="does not fit 8 bits.*embedding_bits=16"):
        quantize_rows(weight)


@pytest.mark.parametrize("case", CASES)
def test_model_computes_what_its_dequantized_embeddings_say(quantized, make, tokens, case):
    model = quantize_model(make(case), config=quantized)
    assert (type(model.get_input_embeddings()), type(model.get_output_embeddings())) == classes(quantized)
    assert model.dtype == torch.float32
    found = logits(model, tokens)
    dense = copy.deepcopy(model).dequantize()
    assert not any(isinstance(module, Rows) for module in dense.modules())
    torch.testing.assert_close(logits(dense, tokens), found, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_comes_back_bit_equal(quantized, make, tokens, tmp_path, case, dtype):
    model = quantize_model(make(case, dtype), config=quantized)
    expected = logits(model, tokens)
    for folder in (tmp_path / "once", tmp_path / "twice"):
        model.save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        assert (type(embedding), type(head)) == classes(quantized)
        assert not any(p.requires_grad for part in (embedding, head) for p in part.parameters())
        assert model.dtype == embedding.weight_row_scale.dtype == dtype
        assert torch.equal(logits(model, tokens), expected)
    assert_equal_checkpoints(tmp_path / "once", tmp_path / "twice")


def test_tied_rows_are_stored_once_and_stay_tied(quantized, make, tmp_path):
    model = quantize_model(make("llama tied"), config=quantized)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name in stored if name.startswith("lm_head")]
    assert stored["model.embed_tokens.weight"].dtype == classes(quantized)[0].numbers
    assert stored["model.embed_tokens.weight_row_scale"].dtype == torch.float16
    for tied in (model, AutoModelForCausalLM.from_pretrained(tmp_path), copy.deepcopy(model), model.bfloat16()):
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        for name in tied.lm_head.companions:
            assert tied.lm_head.get_parameter(name) is tied.model.embed_tokens.get_parameter(name)
    state = model.state_dict()
    assert model.load_state_dict(state) and "lm_head.weight_row_scale" not in state
    dense = model.dequantize()
    assert type(dense.lm_head) is torch.nn.Linear and type(dense.model.embed_tokens) is torch.nn.Embedding
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


def test_untied_head_has_rows_of_its_own(quantized, make, tmp_path):
    model = quantize_model(make("llama"), config=quantized)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["lm_head.weight"].dtype == classes(quantized)[0].numbers and stored[
        "lm_head.weight_row_scale"
    ].shape == (64,)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not loaded.lm_head.tied and loaded.lm_head.weight is not loaded.model.embed_tokens.weight


def test_position_embeddings_and_biases_stay(quantized, make, tmp_path):
    gpt2 = quantize_model(make("gpt2"), config=quantized)
    assert type(gpt2.transformer.wpe) is torch.nn.Embedding
    phi = make("phi")
    bias = torch.nn.init.normal_(phi.lm_head.bias).detach().clone()
    quantize_model(phi, config=quantized).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(loaded.lm_head.bias, bias.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["llama tied", "gemma3_text"])
def test_dtype_of_loading(quantized, make, tokens, tmp_path, case, dtype):
    model = quantize_model(make(case), config=quantized)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype and logits(loaded, tokens).dtype == dtype
    assert loaded.get_input_embeddings().weight.detach().dtype == classes(quantized)[0].numbers
    with torch.no_grad():
        moved = model.to(dtype).get_input_embeddings()
        assert torch.equal(loaded.get_input_embeddings()(tokens), moved(tokens))
    dense = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=dtype, quantization_config=CRVQConfig(dequantize=True)
    )
    assert type(dense.get_input_embeddings()).__name__ in ("Embedding", "Gemma3TextScaledWordEmbedding")
    close = {torch.float32: 2e-3}.get(dtype, 5e-2)
    torch.testing.assert_close(logits(dense, tokens), logits(loaded, tokens), rtol=close, atol=close)
    dense.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype)
    assert torch.equal(logits(again, tokens), logits(dense, tokens))


def test_format_version_follows_from_the_contents(make, tmp_path):
    old, older = (CRVQConfig(dataset=None, codebook_bits=16, embedding_bits=bits) for bits in (8, 16))
    for config, version in ((older, 1), (old, 2), (EIGHT, 3)):
        folder = tmp_path / str(version)
        quantize_model(make("llama"), config=config).save_pretrained(folder)
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert stored["format_version"] == version and stored.get("embedding_bits", 16) == config.embedding_bits
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.metadata()["crvq_format_version"] == str(version)


def test_info_counts_the_bytes(make, tmp_path):
    model = quantize_model(make("llama tied"), config=EIGHT)
    model.save_pretrained(tmp_path)
    info = read_info(str(tmp_path))
    assert "model.embed_tokens in 8 bits, 64 rows, 0.002 MB (2,176 bytes" in describe(info)  # 64 * 32 + 64 * 2
    assert not any("embed_tokens" in name for name in info.dense)
    plain = quantize_model(make("llama tied"), config=CRVQConfig(dataset=None))
    plain.save_pretrained(tmp_path / "16")
    assert read_info(str(tmp_path / "16")).bits_per_weight == info.bits_per_weight
    assert "in 8 bits" not in describe(read_info(str(tmp_path / "16")))


def test_other_heads_and_the_base_model(quantized, make, tokens, tmp_path):
    model = quantize_model(make("llama"), config=quantized)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(base(tokens).last_hidden_state, model.model(tokens).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert type(classifier.score) is torch.nn.Linear
    assert type(classifier.model.embed_tokens) is classes(quantized)[0]


@pytest.mark.parametrize("case", ["llama", "llama tied"])
def test_state_dict_without_files(quantized, make, tokens, tmp_path, case):
    model = quantize_model(make(case), config=quantized)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    loaded = type(model).from_pretrained(None, config=config, state_dict=model.state_dict())
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("case", ["llama", "llama tied"])
def test_another_state_is_loaded(quantized, make, tokens, case):
    model, other = (quantize_model(make(case), config=quantized) for _ in range(2))
    assert not torch.equal(logits(model, tokens), expected := logits(other, tokens))
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model, tokens), expected)


@pytest.mark.parametrize("case", ["llama", "llama tied"])
def test_transforms_and_traces(quantized, make, tokens, case):
    model = quantize_model(make(case), config=quantized)
    embedding, head, x = model.model.embed_tokens, model.lm_head, torch.randn(3, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(embedding)(tokens), embedding(tokens))
        torch.testing.assert_close(torch.func.vmap(head)(x), head(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.jit.trace(head, x)(x), head(x), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.jit.trace(embedding, tokens)(tokens), embedding(tokens))
    jacobian = torch.func.jacrev(head)(x[0])
    torch.testing.assert_close(jacobian, head.dequantize(torch.float32), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "llama tied"])
def test_sharded_and_on_disk(quantized, make, tokens, tmp_path, case):
    model = quantize_model(make(case), config=quantized)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    device_map = {"model.embed_tokens": "disk", "lm_head": "disk", "model.layers": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.embed_tokens.weight.is_meta
    assert offloaded.model.embed_tokens.weight.dtype == offloaded.lm_head.weight.dtype == torch.float32
    # Blocks run untiled beside a disk, so by other code.
    torch.testing.assert_close(logits(offloaded, tokens), logits(model, tokens), rtol=1e-3, atol=1e-3)
    offloaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert torch.equal(logits(again, tokens), logits(model, tokens))
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == (case == "llama tied")
    with pytest.raises(ValueError, match="whole model on one device"):
        offloaded.dequantize()


@pytest.mark.parametrize("case", ["llama tied", "gpt2"])
def test_resizing_is_refused_until_dequantized(quantized, make, tmp_path, case):
    model = quantize_model(make(case), config=quantized)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, loaded, copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
        assert one.resize_token_embeddings() is one.get_input_embeddings()
        assert one.resize_token_embeddings(64, pad_to_multiple_of=32) is one.get_input_embeddings()
        for arguments in ({"new_num_tokens": 70}, {"new_num_tokens": 40}, {"pad_to_multiple_of": 100}):
            with pytest.raises(ValueError, match="cannot be resized .from 64 tokens to"):
                one.resize_token_embeddings(**arguments)
        with pytest.raises(ValueError, match="cannot be resized"):
            one.base_model.resize_token_embeddings(70)
    assert loaded.dequantize().resize_token_embeddings(70).weight.shape == (70, 32)


def test_an_embedding_that_computes_something_else_stays_with_its_tied_head(make, tmp_path, caplog):
    model = make("llama tied")

    class Doubled(torch.nn.Embedding):
        def forward(self, input):
            return 2 * super().forward(input)

    model.model.embed_tokens.__class__ = Doubled
    quantize_model(model, config=EIGHT)
    assert type(model.lm_head) is torch.nn.Linear and "Doubled stays as it is" in caplog.text
    assert model.config.quantization_config.embedding_bits == 16
    assert model.resize_token_embeddings(70).weight.shape == (70, 32)


def test_generate_and_compile(quantized, make, tokens):
    model = quantize_model(make("llama tied"), config=quantized)
    cached = model.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(
        model.generate(tokens[:1], max_new_tokens=4, do_sample=False, cache_implementation="static"), cached
    )
    x = torch.randn(2, 32)
    with torch.no_grad():
        for part, given in ((model.lm_head, x), (model.model.embed_tokens, tokens)):
            compiled = torch.compile(part, fullgraph=True, backend=checks_dtypes)
            torch.testing.assert_close(compiled(given), part(given))
            exported = torch.export.export(part, (given,)).module()
            torch.testing.assert_close(exported(given), part(given))


def checks_dtypes(program, inputs):
    """A compiler that fails where a program was made for inputs of other dtypes than it gets: those read garbage."""
    places = [node.meta["example_value"].dtype for node in program.graph.nodes if node.op == "placeholder"]
    assert places == [torch.Tensor.dtype.__get__(tensor) for tensor in inputs]
    return program.forward


def test_compiled_code_is_told_the_dtype_of_the_model(quantized, make):
    head = quantize_model(make("llama tied"), config=quantized).lm_head
    x = torch.randn(2, 32, dtype=torch.float64)

    def cast(x):  # as the code of several models does
        return head(x.to(head.weight.dtype)), head.weight[3]

    expected = cast(x)
    found = torch.compile(cast, fullgraph=True, backend=checks_dtypes)(x)
    torch.testing.assert_close(found, expected)
    assert expected[0].dtype == torch.float32 and found[0].abs().max() > 0


def change_tensors(folder, change) -> None:
    from safetensors.torch import save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.embed_tokens.weight"), "lacks the tensor model.embed_tokens.weight"),
        (lambda t: t.pop("model.embed_tokens.weight_row_scale"), "embedding_bits is 8, .* for nothing"),
        (lambda t: t.update({"model.embed_tokens.weight_row_scale": torch.ones(3).half()}), "expected I8 .V, H. and"),
        (lambda t: t["model.embed_tokens.weight_row_scale"][5].fill_(torch.nan), "row_scale holds NaN"),
        (lambda t: t.update({"model.norm.weight_row_scale": torch.ones(32).half()}), "model.norm.weight is F32"),
    ],
    ids=["no weight", "no scales", "short scales", "nan", "not an embedding"],
)
def test_damage_is_named(make, tmp_path, change, words):
    quantize_model(make("llama tied"), config=EIGHT).save_pretrained(tmp_path)
    change_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_rows_without_the_config_saying_so(make, tmp_path):
    quantize_model(make("llama tied"), config=EIGHT).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= {"embedding_bits": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="embedding_bits is 16, 8-bit rows are stored for model.embed_tokens"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("case", ["llama", "llama tied", "gpt2"])
def test_weights_say_the_dtype_of_the_model(quantized, make, tokens, tmp_path, case):
    """Mamba 2, xLSTM and others cast hidden states to `lm_head.weight.dtype`."""
    model = quantize_model(make(case, torch.bfloat16), config=quantized)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for one in (model, loaded, copy.deepcopy(model), model.to(torch.float32), pickle.loads(pickle.dumps(loaded))):
        for part in (one.get_input_embeddings(), one.get_output_embeddings()):
            assert part.weight.dtype == part.weight_row_scale.dtype == one.dtype
            assert part.weight.detach().dtype == classes(quantized)[0].numbers
            rows = part.to_dense(one.dtype).weight
            for index in (3, (3, slice(None)), torch.tensor([2, 5]), slice(1, 4), (slice(None), slice(2, 4))):
                assert torch.equal(part.weight[index], rows[index])
            assert torch.zeros(1, dtype=torch.float64).to(part.weight.dtype).dtype == one.dtype
        assert logits(one, tokens).dtype == one.dtype
    assert {tensor.dtype for name, tensor in loaded.state_dict().items() if "embed" in name} <= {
        torch.int8, torch.uint8, torch.int32, torch.float16, torch.bfloat16,
    }  # fmt: skip


def test_parts_without_a_table_of_tokens(make, tokens, monkeypatch):
    """Vision towers raise NotImplementedError where they are asked for their embedding."""
    model = make("llama")

    def none(self):
        raise NotImplementedError

    monkeypatch.setattr(type(model.model), "get_input_embeddings", none)
    monkeypatch.setattr(type(model), "get_input_embeddings", lambda self: self.model.embed_tokens)
    quantize_model(model, config=EIGHT)
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(100)
    assert logits(model, tokens).isfinite().all()
