"""Whatever is in a config or a header, reading it succeeds or ends in a ValueError of one sentence."""

import json
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from crvq_hf import CRVQConfig
from crvq_hf.checkpoint.headers import (
    bits_per_weight,
    check_embeddings,
    embedding_bytes,
    layer_sizes,
    read_headers,
    read_index,
    read_metadata,
)
from crvq_hf.checkpoint.verify import verify
from crvq_hf.config import FIELDS

MANY = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
FEWER = settings(MANY, max_examples=80)

numbers = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([0, 1, 2, 4, 8, 16])
plain = st.none() | st.booleans() | numbers | st.text(max_size=8)
anything = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)

TENSORS = {
    "model.layers.0.q.weight": torch.zeros(8, 3, dtype=torch.uint8),
    "model.layers.0.q.weight_codebooks": torch.zeros(1, 16, 8).half(),
    "model.layers.0.q.weight_scale": torch.zeros(8).half(),
    "model.layers.0.q.weight_order": torch.zeros(16, dtype=torch.uint8),
    "model.embed_tokens.weight": torch.zeros(6, 16, dtype=torch.int8),
    "model.embed_tokens.weight_row_scale": torch.zeros(6).half(),
}
FILE = save(TENSORS, {"format": "pt", "crvq_sha256": "{}"})
LENGTH = struct.unpack("<Q", FILE[:8])[0]
HEADER = json.loads(FILE[8 : 8 + LENGTH])


def value_error_or(call):
    """Returns what `call` returns, or None after a ValueError that is one sentence or more with an end."""
    try:
        return call()
    except ValueError as error:
        # Not a decoder's own: those do not name the file.
        assert type(error) is ValueError, repr(error)
        assert re.search(r"[.?)]$", str(error)) and len(str(error)) > 20 and "\n" not in repr(str(error)), str(error)
        return None


@MANY
@given(st.dictionaries(st.sampled_from([*FIELDS]) | st.text(max_size=12), anything, max_size=6))
@example({"format_version": True})
@example({"embedding_bits": [8]})
@example({"in_group_size": {}})
@example({"critical_ratio": 10**400})
@example({"modules_to_not_convert": ["(" * 3000]})
@example({"modules_to_not_convert": ["(?:" * 500 + ")" * 500]})
@example({"seed": float("nan")})
@example({"self": None})
def test_config_fields(fields):
    config = value_error_or(lambda: CRVQConfig.from_dict(fields))
    if config is not None:
        stored = json.loads(config.to_json_string()) if json.dumps(config.to_dict(), default=str) else None
        assert stored["quant_method"] == "crvq"
        value_error_or(lambda: config.layer_shape(32, 16).tensors())


def read_all(file):
    tensors = read_headers(file)
    metadata = read_metadata(file)
    assert all(isinstance(text, str) for item in metadata.items() for text in item)
    for use in (layer_sizes, bits_per_weight, embedding_bytes, lambda t: check_embeddings(t, CRVQConfig())):
        value_error_or(lambda use=use: use(tensors))
    return tensors


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@MANY
@given(st.binary(max_size=300))
@example(b"")
@example(struct.pack("<Q", 2**64 - 1) + b"{}")
@example(struct.pack("<Q", 2) + b"{}")
@example(struct.pack("<Q", 20_000) + b"[" * 20_000)
@example(struct.pack("<Q", 10_006) + b'{"a":' + b"9" * 10_000 + b"}")
def test_bytes_that_are_no_file(path, content):
    path.write_bytes(content)
    value_error_or(lambda: read_all(path))


@MANY
@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(0, 255)), max_size=6), st.integers(0, len(FILE)))
def test_bytes_changed_in_a_file(path, changes, size):
    content = bytearray(FILE)
    for place, byte in changes:
        content[place] = byte
    path.write_bytes(content[:size] if size % 5 == 0 else content)
    value_error_or(lambda: read_all(path))


names = st.sampled_from([*HEADER, "__metadata__"]) | st.text(max_size=6)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F16", "U8", "I8", "F32"]) | plain,
        "shape": st.lists(numbers, max_size=3) | anything,
        "data_offsets": st.lists(numbers, max_size=3) | anything,
    },
)


@MANY
@given(st.dictionaries(names, entries | anything, max_size=4), st.integers(0, 64))
@example({"model.norm.weight_row_scale": {"dtype": "F16", "shape": [], "data_offsets": [0, 2]}}, 0)
@example({"a": {"dtype": "F16", "shape": [10**400], "data_offsets": [0, 2]}}, 0)
def test_entries_of_a_header(path, changes, more):
    text = json.dumps(HEADER | changes).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + FILE[8 + LENGTH :] + bytes(more))
    value_error_or(lambda: read_all(path))


@MANY
@given(anything | st.fixed_dictionaries({"weight_map": anything | st.dictionaries(names, plain, max_size=4)}))
@example({"weight_map": {"a": "../../etc/passwd"}})
@example({"weight_map": {"a": "b\0"}})
@example({"weight_map": {"a": ".."}})
def test_index(path, index):
    folder = path.parent / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    places = value_error_or(lambda: read_index(folder))
    if places:
        assert all("/" not in name for name in places.values())
        value_error_or(lambda: read_headers(folder))


@FEWER
@given(
    st.dictionaries(names, entries | anything, max_size=1),
    st.dictionaries(st.sampled_from([*FIELDS]), anything, max_size=1) | anything,
    anything,
)
def test_verify_returns_sentences(path, changes, config, hashes):
    folder = path.parent / "checkpoint"
    folder.mkdir(exist_ok=True)
    quantization = {"quant_method": "crvq", **config} if isinstance(config, dict) else config
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    header = HEADER | {"__metadata__": {"crvq_sha256": json.dumps(hashes), "crvq_format_version": "1"}} | changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + FILE[8 + LENGTH :])
    problems = verify(folder).problems
    assert all(isinstance(problem, str) and problem for problem in problems)
