"""Reading a checkpoint from its headers alone."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from crvq_hf import CRVQConfig, quantize_model
from crvq_hf.checkpoint.headers import bits_per_weight, check_layer, layer_sizes, quantized_modules, read_headers

pytestmark = pytest.mark.usefixtures("pipeline")


@pytest.fixture
def folder(make_model, tmp_path):
    model = quantize_model(make_model("opt"), config=CRVQConfig(dataset=None))
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="8KB")
    return tmp_path


def test_headers_say_what_the_tensors_are(folder):
    tensors = load_file(folder / "one" / "model.safetensors")
    headers = read_headers(folder / "one")
    assert headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert headers[name].shape == tuple(tensor.shape) and headers[name].nbytes == tensor.nbytes
    assert headers["model.decoder.layers.0.fc1.weight"].dtype == "U8"
    assert headers["model.decoder.layers.0.fc1.weight"].file == str(folder / "one" / "model.safetensors")


def test_every_way_to_name_a_checkpoint(folder):
    one = read_headers(folder / "one" / "model.safetensors")
    files = sorted((folder / "many").glob("*.safetensors"))
    assert len(files) > 2
    for source in (folder / "one", str(folder / "one"), folder / "many", files, [str(file) for file in files]):
        headers = read_headers(source)
        assert {name: info.shape for name, info in headers.items()} == {name: info.shape for name, info in one.items()}


def test_quantized_modules_and_their_bits(folder):
    headers = read_headers(folder / "many")
    modules = quantized_modules(headers)
    assert len(modules) == 12 and "model.decoder.layers.1.fc2" in modules and "lm_head" not in modules
    config = CRVQConfig()
    sizes = layer_sizes(headers)
    assert sizes["model.decoder.layers.1.fc2"].nbytes == config.layer_shape(64, 32).nbytes
    assert sizes["model.decoder.layers.1.fc2"].bits_per_weight == config.layer_shape(64, 32).bits_per_weight
    shapes = 2 * (4 * [config.layer_shape(32, 32)] + [config.layer_shape(32, 64), config.layer_shape(64, 32)])
    expected = 8 * sum(shape.nbytes for shape in shapes) / sum(s.in_features * s.out_features for s in shapes)
    assert bits_per_weight(headers) == expected


def test_bits_without_a_layer(tmp_path):
    save_file({"a.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="None of the 1 tensors"):
        bits_per_weight(read_headers(tmp_path))


def test_incomplete_layer(folder):
    headers = read_headers(folder / "one")
    del headers["model.decoder.layers.0.fc1.weight_order"]
    with pytest.raises(ValueError, match="lacks the tensor model.decoder.layers.0.fc1.weight_order"):
        layer_sizes(headers)


def test_check_layer(folder):
    headers = read_headers(folder / "one")
    name = "model.decoder.layers.0.fc1"
    check_layer(headers, name, CRVQConfig(), 32, 64, bias=True)
    with pytest.raises(ValueError, match=rf"{name}.weight is U8 \[64, 5\], expected U8 \[65, 5\]"):
        check_layer(headers, name, CRVQConfig(), 32, 65, bias=True)
    save_file({f"{name}.bias": torch.ones(3)}, folder / "bias.safetensors")
    with pytest.raises(ValueError, match=rf"{name}.bias is \[3\], expected \[64\]"):
        check_layer(headers | read_headers(folder / "bias.safetensors"), name, CRVQConfig(), 32, 64, bias=True)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="holds no model.safetensors and no model.safetensors.index.json"):
        read_headers(tmp_path)
    with pytest.raises(ValueError, match="nowhere.safetensors cannot be read"):
        read_headers(tmp_path / "nowhere.safetensors")


def test_missing_shard(folder):
    next((folder / "many").glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match="model-00002-of-.* cannot be read .*incomplete"):
        read_headers(folder / "many")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(folder, text):
    (folder / "many" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json is damaged"):
        read_headers(folder / "many")


def test_truncated_file_anywhere(folder):
    path = folder / "one" / "model.safetensors"
    content = path.read_bytes()
    for keep in [0, 1, 7, 8, 9, 200, len(content) // 2, len(content) - 1]:
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="model.safetensors is (no safetensors file|truncated or damaged)"):
            read_headers(path)
    path.write_bytes(content + b"x")
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_headers(path)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        json.dumps([1]).encode(),
        json.dumps({"a": {}}).encode(),
        json.dumps({"a": {"shape": [1], "dtype": "U8", "data_offsets": [0]}}).encode(),
        json.dumps({"a": {"shape": 3, "dtype": "U8", "data_offsets": [0, 1]}}).encode(),
        json.dumps({"a": 3}).encode(),
    ],
)
def test_damaged_header(tmp_path, header):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(ValueError, match="is no safetensors file, or its header is damaged"):
        read_headers(path)


def test_header_length_beyond_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(ValueError, match="is no safetensors file"):
        read_headers(path)
