"""A budget of bits: kept within 1 %, never exceeded, refused where it cannot be met."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.headers import bits_per_weight, read_headers
from crvq_hf.config import BUDGETED, FIELDS
from crvq_hf.modeling.replace import linear_size, quantizable_linears
from crvq_hf.selection.budget import within_budget

pytestmark = pytest.mark.usefixtures("pipeline")


def blocks(number, sizes):
    """Returns the sizes of the layers of a model by name, those of one block given."""
    return {f"model.layers.{block}.{layer}": size for block in range(number) for layer, size in enumerate(sizes)}


SMOLLM2 = blocks(30, [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)])
LLAMA_7B = blocks(32, [(4096, 4096)] * 4 + [(4096, 11008)] * 2 + [(11008, 4096)])


def bits_of(config: CRVQConfig, sizes) -> float:
    shapes = [config.of_layer(name).layer_shape(*size) for name, size in sizes.items()]
    return 8 * sum(shape.nbytes for shape in shapes) / sum(k * n for k, n in sizes.values())


@pytest.mark.parametrize("sizes", [SMOLLM2, LLAMA_7B], ids=["SmolLM2-135M", "Llama-2-7B"])
@given(bits=st.floats(1.0, 4.0))
def test_from_one_to_four_bits(sizes, bits):
    found = within_budget(CRVQConfig(bits=bits), sizes)
    assert 0.99 * bits <= bits_of(found, sizes) <= bits
    assert found.bits is None and "bits" not in found.to_dict()


def test_what_is_chosen():
    chosen = {bits: within_budget(CRVQConfig(bits=bits), LLAMA_7B) for bits in (1.0, 1.01, 1.1, 1.6, 2.0, 2.5, 4.0)}
    fields = [(c.in_group_size, c.nbits_per_codebook, c.num_extended_codebooks) for c in chosen.values()]
    # Scales and orders need some bits, too: not the whole of 1.0, 2.0 and 4.0 is for codes.
    assert fields == [(8, 7, 1), (8, 8, 1), (8, 8, 1), (4, 6, 1), (4, 7, 1), (4, 8, 1), (4, 8, 1)]
    assert chosen[1.1].critical_ratio == pytest.approx(0.078, abs=0.01)
    assert chosen[2.5].critical_ratio == pytest.approx(0.23, abs=0.01)


@pytest.mark.parametrize(("bits", "of_first_block"), [(1.35, 2.11), (2.0, 3.0), (3.0, 3.5)])
def test_the_first_block_has_more(bits, of_first_block):
    found = within_budget(CRVQConfig(bits=bits), SMOLLM2)
    assert list(found.overrides) == ["layers.0"] and list(found.overrides["layers.0"]) == ["critical_ratio"]
    first = {name: size for name, size in SMOLLM2.items() if name.startswith("model.layers.0.")}
    assert bits_of(found, first) == pytest.approx(of_first_block, abs=0.01)


def test_a_first_block_that_costs_the_others_too_much_has_no_more():
    assert within_budget(CRVQConfig(bits=1.15), SMOLLM2).overrides is None
    assert within_budget(CRVQConfig(bits=1.5), blocks(24, LLAMA_7B.values())).overrides is None
    assert within_budget(CRVQConfig(bits=1.5), blocks(25, LLAMA_7B.values())).overrides


def test_other_fields_stay():
    config = CRVQConfig(bits=1.5, seqlen=128, nsamples=7, codebook_bits=16, device="cpu", work_dir="w")
    found = within_budget(config, LLAMA_7B)
    assert (found.seqlen, found.nsamples, found.codebook_bits) == (128, 7, 16)
    assert (found.device, found.work_dir, config.bits) == ("cpu", "w", 1.5)
    assert within_budget(found, LLAMA_7B) is found


@pytest.mark.parametrize("bits", [1.2, 2.4])
def test_layers_that_its_groups_do_not_fit_are_not_counted(make_model, bits):
    model = make_model("llama", hidden_size=512, intermediate_size=132)  # only groups of 4 fit down_proj
    config = CRVQConfig(dataset=None, bits=bits)
    sizes = {name: linear_size(linear) for name, linear in quantizable_linears(model, config)[0].items()}
    found = within_budget(config, sizes)
    assert found.in_group_size == (8 if bits < 2 else 4)
    quantized = {name: linear_size(linear) for name, linear in quantizable_linears(model, found)[0].items()}
    assert (quantized == sizes) == (found.in_group_size == 4)
    assert 0.99 * bits <= bits_of(found, quantized) <= bits


@pytest.mark.parametrize("bits", [0.5, 0.51])
def test_what_cannot_be_met_is_refused(bits):
    with pytest.raises(ValueError, match=rf"bits={bits:g} cannot be met within 1 % .* whose least is 0\.\d+ bits"):
        within_budget(CRVQConfig(bits=bits), SMOLLM2)


@pytest.mark.parametrize("name", BUDGETED)
def test_budget_and_what_it_decides_exclude_each_other(name):
    with pytest.raises(ValueError, match=f"bits=1.1 chooses .*; leave out {name}"):
        CRVQConfig(bits=1.1, **{name: FIELDS[name].default})
    config = CRVQConfig(bits=1.1)
    assert CRVQConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_checkpoint_meets_it_and_says_how(make_model, tmp_path):
    model = quantize_model(make_model("llama", hidden_size=256), config=CRVQConfig(dataset=None, bits=3.0))
    model.save_pretrained(tmp_path)
    assert 2.97 <= bits_per_weight(read_headers(tmp_path)) <= 3.0
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert "bits" not in stored and stored["num_extended_codebooks"] >= 1 and stored["critical_ratio"] > 0
