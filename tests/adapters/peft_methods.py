"""Every method of the installed PEFT on a quantized model: what it does there, beside the same model made dense.

    python tests/adapters/peft_methods.py        # prints the table of tests/adapters/PEFT.md

`CASES` names a config of each method in PEFT's registry, and of the variants that ask something else of a layer.
"""

import copy
import functools
import importlib.util
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import create_arrow_model
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.tuners.lora.loraga import preprocess_loraga

sys.path.insert(0, str(Path(__file__).parents[1]))
from random_models import quantized_model

TOKENS = torch.randint(64, (2, 12), generator=torch.Generator().manual_seed(0))
LINEAR = {"target_modules": ["q_proj", "down_proj"]}
PROMPT = {"num_virtual_tokens": 4}
LORA = LINEAR | {"r": 4}
# By name of the method: its variants, each with the arguments of its config.
CASES = {
    "LORA": {
        "": LORA,
        "not the identity": LORA | {"init_lora_weights": False},
        "bias": LORA | {"bias": "all"},
        "lora_bias": LORA | {"lora_bias": True},
        "rslora": LORA | {"use_rslora": True},
        "DoRA": LORA | {"use_dora": True, "init_lora_weights": False},
        "gaussian": LORA | {"init_lora_weights": "gaussian"},
        "orthogonal": LORA | {"init_lora_weights": "orthogonal"},
        "PiSSA": LORA | {"init_lora_weights": "pissa"},
        "PiSSA, fast": LORA | {"init_lora_weights": "pissa_niter_4"},
        "OLoRA": LORA | {"init_lora_weights": "olora"},
        "LoftQ": LORA | {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
        "EVA": LORA | {"init_lora_weights": "eva", "eva_config": "EvaConfig"},
        "CorDA": LORA | {"init_lora_weights": "corda", "corda_config": "CordaConfig"},
        "LoRA-GA": LORA | {"init_lora_weights": "lora_ga", "lora_ga_config": "LoraGAConfig"},
        "QALoRA": LORA | {"use_qalora": True, "qalora_group_size": 8},
        "aLoRA": LORA | {"alora_invocation_tokens": TOKENS[0, 3:4].tolist()},
        "MonteCLoRA": LORA | {"monteclora_config": "MontecloraConfig"},
        "KaSA": LORA | {"kasa_config": "KasaConfig"},
        "VeLoRA": LORA | {"velora_config": "VeloraConfig"},
        "BD-LoRA": LORA
        | {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["down_proj"], "nblocks": 2}},
        "Arrow": LORA | {"arrow_config": "ArrowConfig"},
        "layer replication": LORA | {"layer_replication": [[0, 1], [0, 1]]},
        "target_parameters": {"r": 4, "target_modules": [], "target_parameters": ["q_proj.weight"]},
        "embedding, head": {"r": 4, "target_modules": ["embed_tokens", "lm_head"], "init_lora_weights": False},
        "all-linear": {"r": 4, "target_modules": "all-linear", "init_lora_weights": False},
        "modules_to_save, head": LORA | {"modules_to_save": ["lm_head"]},
        "modules_to_save, layers": LORA | {"modules_to_save": ["gate_proj"]},
        "trainable tokens": LORA | {"trainable_token_indices": [3, 5]},
    },
    "ADALORA": {"": LORA | {"total_step": 10, "target_r": 2, "init_r": 4}},
    "ADAMSS": {
        "": LINEAR | {"r": 8, "num_subspaces": 2},
        "dynamic": LINEAR | {"r": 8, "num_subspaces": 2, "use_dynamic_rank": True},
    },
    "ADAPTION_PROMPT": {"": {"adapter_len": 4, "adapter_layers": 1}},
    "BEFT": {"": {"target_modules": ["q_proj"]}},
    "BOFT": {"": LINEAR | {"boft_block_size": 4, "init_weights": False}},
    "C3A": {"": LINEAR | {"block_size": 16}},
    "CARTRIDGE": {"": PROMPT},
    "CPT": {"": {"cpt_token_ids": [1, 2, 3, 4], "cpt_mask": [1, 1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2, 4]}},
    "DEFT": {
        "": LINEAR | {"r": 4, "init_weights": False},
        "qr": LINEAR | {"r": 4, "decomposition_method": "qr"},
        "PaRa": LINEAR | {"r": 4, "para": True},
    },
    "DELORA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "FOURIERFT": {"": LINEAR | {"n_frequency": 50}},
    "FROD": {"": LINEAR | {"progressbar": False}},
    "GLORA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "GRALORA": {"": LINEAR | {"r": 4, "init_weights": False}, "hybrid": LINEAR | {"r": 4, "hybrid_r": 2}},
    "HIRA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "HRA": {
        "": LINEAR | {"r": 4, "init_weights": False},
        "GS": LINEAR | {"r": 4, "apply_GS": True, "init_weights": False},
    },
    "IA3": {"": LINEAR | {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}},
    "LILY": {"": LINEAR | {"r": 4, "init_weights": False}},
    "LN_TUNING": {"": {"target_modules": ["input_layernorm"]}},
    "LOHA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "LOKR": {"": LINEAR | {"r": 4, "init_weights": False}},
    "MISS": {
        "": LINEAR | {"r": 8, "init_weights": False},
        "bat": LINEAR | {"r": 8, "init_weights": "bat"},
        "mini": LINEAR | {"r": 8, "init_weights": "mini", "mini_r": 8},
    },
    "OFT": {
        "": LINEAR | {"oft_block_size": 8, "init_weights": False},
        "COFT": LINEAR | {"oft_block_size": 8, "coft": True},
    },
    "SHIRA": {"": LINEAR | {"r": 2, "init_weights": False}},
    "PROMPT_TUNING": {"": PROMPT},
    "MULTITASK_PROMPT_TUNING": {"": PROMPT | {"num_tasks": 2}},
    "OSF": {"": LINEAR | {"effective_rank": 4, "init_weights": False}},
    "P_TUNING": {"": PROMPT | {"encoder_hidden_size": 16}},
    "PEANUT": {"": LINEAR | {"r": 4, "init_weights": False}, "deep": LINEAR | {"r": 4, "depth": 2}},
    "POLY": {"": LORA | {"n_tasks": 2, "n_skills": 2}},
    "PREFIX_TUNING": {"": PROMPT, "projection": PROMPT | {"prefix_projection": True, "encoder_hidden_size": 16}},
    "PSOFT": {
        "": LINEAR | {"r": 4, "psoft_alpha": 4},
        "pissa_init": LINEAR | {"r": 4, "psoft_alpha": 4, "ab_svd_init": "pissa_init"},
    },
    "PVERA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "RANDLORA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "ROAD": {
        "": LINEAR | {"group_size": 8, "init_weights": False},
        "4": LINEAR | {"group_size": 8, "variant": "road_4"},
    },
    "SHADOW": {"": {"shadow_num_hidden_layers": 1, "shadow_dropout": 0.0}},
    "SUPERTUNING": {"": LINEAR | {"init_weights": False}, "Supra": LINEAR | {"r": 4}},
    "TINYLORA": {"": LINEAR | {"u": 8, "init_weights": "uniform"}},
    "TRAINABLE_TOKENS": {"": {"token_indices": [3, 5]}},
    "UNILORA": {"": LINEAR},
    "VBLORA": {"": LINEAR | {"vector_length": 16, "num_vectors": 8}},
    "VERA": {"": LINEAR | {"r": 4, "init_weights": False}},
    "WAVEFT": {"": LINEAR | {"n_frequency": 50, "init_weights": False}},
    "XLORA": {"": {"hidden_size": 32, "xlora_size": 8, "adapters": "saved"}},
}
FORWARD = {"POLY": {"task_ids": torch.tensor([0, 1])}, "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1])}}
# Steps of training are 0.05 long but for these: methods whose parameters count for more, or for less.
STEPS = {"RANDLORA": 0.001, "UNILORA": 2.0, "VBLORA": 2.0, "ADALORA": 2.0, "LOHA": 0.5, "POLY": 1.0, "C3A": 1.0}
HEAD = """# PEFT's methods on quantized layers

Made by `python tests/adapters/peft_methods.py` with PEFT {version}, checked line by line by
`test_peft_methods.py`: of {cases} cases {right} are right, the others are refused. The second column has the settings
beside the defaults; `CASES` in the program has them in full.

*right*: a model with quantized linear layers and an 8-bit embedding and head, and the same model made dense, have
logits within 1e-5 of each other (relative), before and after three steps of training, and the steps change them.
Refusals are a ValueError from `get_peft_model`, or from what PEFT wants to be called before it, and leave the model as
it was. Merging that would change codes is refused with:

> {merging}

| method | settings | on quantized layers | merging |
| --- | --- | --- | --- |
"""


@dataclass
class Outcome:
    """What a method does on the quantized model: `sentence` if refused, else errors relative to the dense model's."""

    sentence: str | None = None
    forward: float = 0.0
    trained: float = 0.0
    change: float = 0.0
    trains: bool = True
    merged: float | None = None
    merging: str = ""

    @property
    def right(self) -> bool:
        """Whether all is that of the dense model, and training has an effect where there is something to train."""
        errors = (self.forward, self.trained, self.merged or 0.0)
        return max(errors) < 1e-5 and (self.change > 5e-5 or not self.trains)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def make_config(method: str, variant: str, folder: str):
    """Returns the config of a case; what it names by the name of a class is made."""
    arguments = {"task_type": "CAUSAL_LM"} | copy.deepcopy(CASES[method][variant])
    for name, value in arguments.items():
        if isinstance(value, str) and value.endswith("Config"):
            arguments[name] = getattr(peft.tuners.lora.config, value)()
    if arguments.get("adapters") == "saved":
        arguments["adapters"] = {name: f"{folder}/{name}" for name in ("0", "1")}
    return peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method](**arguments)


def adapt(model, method: str, variant: str, folder: str):
    """Returns the model with the adapters of a case, made ready for them as PEFT's documentation says."""
    config = make_config(method, variant, folder)
    tokens = {"input_ids": TOKENS}
    if method == "XLORA":
        model.config.use_cache = False
    if variant == "Arrow":
        config.arrow_config.top_k = 2
        return create_arrow_model(model, [f"{folder}/0", f"{folder}/1"], config.arrow_config)
    if variant == "CorDA" and importlib.util.find_spec("attr"):  # which PEFT imports there and does not install
        from peft.tuners.lora.corda import preprocess_corda

        preprocess_corda(model, config, run_model=lambda: model(TOKENS[:1]))
    if variant == "LoRA-GA":
        preprocess_loraga(model, config, lambda: model(**tokens, labels=TOKENS).loss.backward())
    adapted = peft.get_peft_model(model, config)
    if variant == "EVA":
        batch = tokens | {"attention_mask": torch.ones_like(TOKENS)}
        initialize_lora_eva_weights(adapted, [batch] * 2, show_progress_bar=False)
    return adapted


def logits(model, method: str) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS, **FORWARD.get(method, {})).logits


def train(adapted, method: str) -> None:
    """Takes three steps along the gradient, each of one length."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    for step in range(3):
        torch.manual_seed(step)
        loss = adapted.train()(input_ids=TOKENS, labels=TOKENS, **FORWARD.get(method, {})).loss
        if not loss.requires_grad:
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for parameter in (parameter for parameter in trained if parameter.grad is not None):
            parameter.data -= STEPS.get(method, 0.05) * parameter.grad
            parameter.grad = None


def merge(adapted):
    """Returns the model with its adapters merged, or the sentence of a refusal, or None where PEFT has no merging."""
    try:
        return adapted.merge_and_unload()
    except (AttributeError, NotImplementedError):
        return None
    except ValueError as error:
        return str(error)


@functools.cache
def try_case(method: str, variant: str) -> Outcome:
    """Returns what a case does; errors that are no refusals are raised."""
    model = quantized_model("llama", num_hidden_layers=1)
    dense = quantized_model("llama", num_hidden_layers=1).dequantize()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if method == "XLORA" or variant == "Arrow":
            for name in ("0", "1"):
                torch.manual_seed(int(name))
                lora = peft.get_peft_model(copy.deepcopy(dense), make_config("LORA", "not the identity", folder))
                lora.save_pretrained(f"{folder}/{name}")
        results = []
        for base in (model, dense):
            torch.manual_seed(0)
            try:
                adapted = adapt(base, method, variant, folder)
            except (ValueError, ImportError) as error:  # packages that PEFT lacks for a method it would refuse
                assert base is model, error
                return Outcome(sentence=str(error))
            before = logits(adapted, method)
            train(adapted, method)
            results.append((adapted, before, logits(adapted, method)))
        (adapted, *found), (reference, *expected) = results
        outcome = Outcome(
            forward=relative(found[0], expected[0]),
            trained=relative(found[1], expected[1]),
            change=relative(found[1], found[0]),
            trains=variant != "Arrow",  # combines adapters that are done
        )
        merged = merge(adapted)
        if isinstance(merged, str):
            outcome.merging = merged
            outcome.merged = relative(logits(adapted, method), found[1])
        elif merged is not None:
            outcome.merged = relative(logits(merged, method), logits(merge(reference), method))
    return outcome


def row(method: str, variant: str, outcome: Outcome) -> str:
    """Returns the line of the table for a case."""
    if outcome.sentence:
        return f"| {method} | {variant} | refused: {' '.join(outcome.sentence.split())} | |"
    merging = "refused" if outcome.merging else "PEFT has none" if outcome.merged is None else "right"
    return f"| {method} | {variant} | {'right' if outcome.right else 'WRONG'} | {merging} |"


def table() -> str:
    """Returns the table of all cases in Markdown."""
    outcomes = {(method, variant): try_case(method, variant) for method in CASES for variant in CASES[method]}
    rows = [row(method, variant, outcome) for (method, variant), outcome in outcomes.items()]
    merging = next(outcome.merging for outcome in outcomes.values() if outcome.merging)
    numbers = {
        "cases": len(rows),
        "right": sum(outcome.right for outcome in outcomes.values() if not outcome.sentence),
    }
    return HEAD.format(version=peft.__version__, merging=merging, **numbers) + "\n".join(rows)


if __name__ == "__main__":
    print(table())
