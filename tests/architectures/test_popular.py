"""Popular architectures come through: quantized with calibration and tuning, saved, loaded, written with, dequantized.

`make sweep` tries all that transformers knows.
"""

import pytest
import transformers
from checks import AFTER, BEFORE, REFUSED, RIGHT, WRONG, Verdict, auto_class, check
from shrink import tiny_config
from sweep import TABLE, table, tried_before

# The most that may stay dense of the weights of their blocks: what chooses experts, what other code reads.
POPULAR = {
    "bamba": 0.02,
    "blip-2": 0,
    "bloom": 0,
    "cohere2": 0,
    "dbrx": 0.01,
    "deepseek_v3": 0.01,
    "exaone4": 0,
    "falcon": 0,
    "gemma2": 0,
    "gemma3": 0,
    "gemma3n_text": 0.03,
    "gemma4_text": 0.03,
    "glm4_moe": 0.01,
    "gpt2": 0,
    "gpt_neox": 0,
    "gpt_oss": 0.01,
    "granite": 0,
    "jetmoe": 0.01,
    "lfm2": 0.02,
    "llama": 0,
    "llama4_text": 0.01,
    "llava": 0,
    "mamba": 0.2,
    "mamba2": 0.03,
    "mistral": 0,
    "mixtral": 0.01,
    "mpt": 0,
    "nemotron_h": 0.05,
    "olmo2": 0,
    "opt": 0,
    "phi3": 0,
    "qwen2": 0,
    "qwen2_moe": 0.01,
    "qwen3": 0,
    "qwen3_5_text": 0.02,
    "qwen3_moe": 0.01,
    "qwen3_next": 0.02,
    "qwen3_omni_moe_thinker": 0.01,
    "qwen3_vl": 0,
    "smollm3": 0,
    "stablelm": 0,
    "starcoder2": 0,
}


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("architecture", POPULAR)
def test_architecture(architecture):
    verdict = check(architecture, nsamples=1, e2e_nsamples=1, seqlen=8)
    assert verdict.verdict == RIGHT, verdict.why
    assert verdict.dense <= POPULAR[architecture] + 1e-9


def test_configs_are_tiny():
    config = tiny_config("mixtral")
    assert (config.hidden_size, config.num_hidden_layers, config.num_local_experts) == (64, 2, 4)
    assert auto_class("llava").__name__ == "AutoModelForImageTextToText"


def test_what_is_refused_with_an_advice_is_right_when_it_is_followed(monkeypatch):
    verdict = check("vision-encoder-decoder")
    assert verdict.verdict == REFUSED and verdict.dense == 0 and "use dataset=None" in verdict.why
    monkeypatch.setattr("checks._difference", lambda *args: "too much")
    verdict = check("vision-encoder-decoder")
    assert verdict.verdict == WRONG and verdict.why == "with dataset=None: dequantizing: too much"


def test_lines_of_the_table_can_be_replaced():
    before = tried_before()
    text = table([before[name] for name in sorted(before)])
    assert text.replace(transformers.__version__, "") == TABLE.read_text(encoding="utf-8").replace("5.23.0", "")
    again = table(
        [Verdict("llama", WRONG, 0.25, "a | b") if name == "llama" else before[name] for name in sorted(before)]
    )
    assert "| llama | wrong | 25 % | a / b |" in again
    assert len(again.splitlines()) == len(text.splitlines())


def test_the_table_has_no_fault():
    verdicts = [verdict.verdict for verdict in tried_before().values()]
    assert not {WRONG, BEFORE, AFTER} & set(verdicts)
    assert len(verdicts) - verdicts.count(RIGHT) - verdicts.count(REFUSED) <= 8
