"""`CRVQConfig`: every knob of the method, once, with its default, its range and its help text.

The fields below are the only place where options are written down. `CRVQConfig` checks them on every assignment, the
command line prints their help, `to_dict` stores those that describe a checkpoint.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from .dataset.grammar import checked_dataset, has_samples, shareable_dataset
from .naming import checked_overrides, checked_patterns, is_named_by
from .quantized_weight import LayerShape, num_critical_groups

QUANT_METHOD = "crvq"
QUANTIZER_PACKAGE = "crvq-hf"  # stands in config.json for those who meet a checkpoint and do not know the method
FORMAT_VERSIONS = (1, 2, 3, 4, 5)  # that can be read; a checkpoint is written in the oldest that can hold it


# Bits per weight of embeddings and heads: as they are, int8 rows, and codes (see `quantized_weight.TableShape`).
EMBEDDING_BITS = (16, 8, 6, 4, 3.5, 3, 2.5, 2)
ROW_BITS = 8

# What a preset sets, instead of the defaults; README.md has what each costs and gives.
PRESETS: dict[str, dict[str, int]] = {
    "fast": {"nsamples": 32, "e2e_finetune_epochs": 0},
    "default": {},
    "best": {"nsamples": 384, "e2e_finetune_epochs": 2},
}
# What a budget of `bits` decides, and the fewest channels that it may give a code; and what `fit` decides.
BUDGETED = ("in_group_size", "nbits_per_codebook", "num_extended_codebooks", "critical_ratio")
FINEST_GROUP = 4
DECIDED = {"bits": (*BUDGETED, "overrides"), "fit": ("bits", *BUDGETED, "overrides", "embedding_bits")}
# Bytes of the units of a size, in small letters.
UNITS = {"b": 1} | {f"{letter}b": 1000**i for i, letter in enumerate("kmgt", 1)}
UNITS |= {f"{letter}ib": 1024**i for i, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:e[0-9]{1,2})?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def _option(default: Any, help: str, check: Callable[[str, Any], Any], stored: bool = True) -> Any:
    """Returns a dataclass field that carries its help text, its check and whether a checkpoint stores it."""
    return dataclasses.field(default=default, metadata={"help": help, "check": check, "stored": stored})


def _one_of(*allowed: Any) -> Callable[[str, Any], Any]:
    def check(name: str, value: Any) -> Any:
        if isinstance(value, bool) or value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        return allowed[allowed.index(value)]  # 8 where 8.0 is given

    return check


def _integer(low: int, high: int | None = None) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        allowed = f"an integer >= {low}" if high is None else f"an integer from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
            raise ValueError(f"{name} must be {allowed}, got {value!r}.")
        return value

    return check


def _number(low: float, high: float) -> Callable[[str, Any], float]:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}.")
        return float(value)

    return check


def _budget(name: str, value: Any) -> float | None:
    return None if value is None else _number(0.5, 8)(name, value)


def _size(name: str, value: Any) -> int | None:
    """Returns bytes, of a number of them or of text such as "40MB"."""
    if value is None:
        return None
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    unit = UNITS.get(match[2].lower() or "b") if match else None
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    number = float(match[1]) * unit if unit else number
    if number is None or not 1 <= number < 2**63:
        raise ValueError(
            f"{name} must be a size such as '40MB', '4GB' or '3.7GiB' (units B, kB, MB, GB, TB of 1000, KiB, MiB, "
            f"GiB, TiB of 1024; a plain number is bytes), got {value!r:.80}."
        )
    return int(number)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}.")
    return value


def _overrides(name: str, value: Any) -> dict[str, dict[str, Any]] | None:
    return checked_overrides(name, value, {key: FIELDS[key].metadata["check"] for key in BUDGETED})


def _device(name: str, value: Any) -> str | torch.device | None:
    if value is None or isinstance(value, torch.device):
        return value
    try:
        torch.device(value)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{name} must be a device such as 'cpu' or 'cuda:0', or None to choose, got {value!r}."
        ) from None
    return value


def _path(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
        raise ValueError(f"{name} must be the path of a folder or None, got {value!r}.")
    return os.fspath(value)


def _format_version(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in FORMAT_VERSIONS:
        raise ValueError(
            f"The checkpoint has CRVQ {name} {value!r}, this crvq_hf reads only {name} "
            f"{', '.join(map(str, FORMAT_VERSIONS[:-1]))} and {FORMAT_VERSIONS[-1]}; "
            f"install a crvq_hf that knows format {value!r}."
        )
    return value


def _anything(name: str, value: Any) -> Any:
    return value


@dataclass(init=False, repr=False, eq=False)
class CRVQConfig(QuantizationConfigMixin):
    """How a model is, or is to be, quantized with CRVQ.

    Takes its fields as keyword arguments; `crvq quantize --help` explains each. `preset="fast"` or `"best"` changes
    the defaults of some. Fields are checked on every assignment. `tokenizer`, `device`, `work_dir` and `dequantize`
    steer one run and are never stored, and neither are `bits` and `fit` once they have been spent.

    Raises:
        ValueError: a value is out of range, an argument is unknown, or the format version is not this one's.
    """

    quant_method: str = _option(QUANT_METHOD, "name of the method", _one_of(QUANT_METHOD))
    quantizer_package: str = _option(QUANTIZER_PACKAGE, "package that reads it", _one_of(QUANTIZER_PACKAGE))
    format_version: int = _option(
        3,
        "version of the checkpoint format: 5 with overrides, else 4 with embeddings in fewer than 8 bits, else 3 with "
        "8-bit codebooks, else 2 with 8-bit embeddings, else 1; follows by itself",
        _format_version,
    )
    bits: float | None = _option(
        None,
        "budget of stored bits per quantized weight, 1.1 say; chooses channels and bits per code, extended codebooks "
        "and critical channels",
        _budget,
    )
    fit: int | None = _option(
        None,
        "size that the whole checkpoint is to have at most, all files counted: 40MB, 4GB, 3.7GiB, a number of bytes; "
        "chooses bits and embedding_bits",
        _size,
    )
    in_group_size: int = _option(8, "input channels that share one code: 4, 8 or 16", _one_of(4, 8, 16))
    nbits_per_codebook: int = _option(8, "bits per code, 4 to 12; a codebook has 2**bits entries", _integer(4, 12))
    num_extended_codebooks: int = _option(
        1, "codebooks that serve only the critical channels, 0 to 7; 0 is plain vector quantization", _integer(0, 7)
    )
    critical_ratio: float = _option(0.04, "share of input channels that are critical, 0 to 1", _number(0, 1))
    overrides: dict[str, dict[str, Any]] | None = _option(
        None,
        'what is set otherwise for some layers, by names or regexes of modules: {"layers.0": {"in_group_size": 4}}',
        _overrides,
    )
    codebook_bits: int = _option(8, "bits of a codebook entry: 8 (int8) or 16 (float16)", _one_of(8, 16))
    importance: str = _option(
        "weight_activation",
        "what makes a channel critical: 'weight_activation', 'weight' or 'random'",
        _one_of("weight_activation", "weight", "random"),
    )
    dataset: list[dict[str, torch.Tensor]] | list[str] | str | None = _option(
        "self",
        "calibration text: 'self' (written by the model), 'wikitext2', 'c4', a path (of a table: path:field), "
        "a dataset of the hub (owner/name:config:split:field), a mixture of these (a.txt:0.7,b.txt:0.3), "
        "a list of texts, or None; for models that hear, a folder of sound files; for any model, a list of dicts, "
        "each a batch as model(**sample) takes it",
        checked_dataset,
    )
    nsamples: int = _option(
        64, "calibration sequences (sound files, dicts) for fitting and tuning block by block", _integer(1)
    )
    seqlen: int = _option(
        256, "tokens per calibration sequence; at most, where the model writes what is said", _integer(1)
    )
    seed: int = _option(0, "seed of everything random", _integer(0))
    embedding_bits: float = _option(
        16,
        "bits per weight of embeddings and lm_head: 16 leaves them as they are, 8 stores int8 with a scale per row, "
        "6, 4, 3.5, 3, 2.5 and 2 store codes, finer ones for the most frequent tokens",
        _one_of(*EMBEDDING_BITS),
    )
    block_finetune_epochs: int = _option(1, "epochs of fine-tuning after each block, 0 switches it off", _integer(0))
    e2e_finetune_epochs: int = _option(1, "epochs of end-to-end fine-tuning, 0 switches it off", _integer(0))
    e2e_nsamples: int = _option(
        0, "calibration sequences for end-to-end fine-tuning; 0: 6 times nsamples, or what the text has", _integer(0)
    )
    modules_to_not_convert: list[str] | None = _option(
        None, "names or regexes of modules to leave dense", checked_patterns
    )
    tokenizer: Any = _option(None, "tokenizer, or its name; None takes the model's own", _anything, stored=False)
    device: str | torch.device | None = _option(
        None, "device to compute on; None takes cuda if present, else cpu", _device, stored=False
    )
    work_dir: str | None = _option(None, "folder for resuming an interrupted run", _path, stored=False)
    dequantize: bool = _option(False, "load the checkpoint as a dense model", _flag, stored=False)

    def __init__(self, /, preset: str = "default", **values: Any) -> None:
        values = PRESETS[_one_of(*PRESETS)("preset", preset)] | values
        self.format_version = values.pop("format_version", 3)  # a newer format may have unknown fields
        if self.format_version < 3:
            values = {"codebook_bits": 16} | values
        unknown = [name for name in values if name not in FIELDS]
        if unknown:
            longer = [name for name in FIELDS if unknown[0] in name]
            closest = (longer or difflib.get_close_matches(unknown[0], FIELDS, n=1, cutoff=0.0))[0]
            raise ValueError(
                f"CRVQConfig has no field {unknown[0]!r}, did you mean {closest!r}? "
                f"Its fields are {', '.join(FIELDS)}."
            )
        for budget, decided in DECIDED.items():
            given = [name for name in decided if values.get(name) is not None]
            if values.get(budget) is not None and given:
                raise ValueError(
                    f"{budget}={values[budget]!r} chooses {', '.join(decided)}; leave out {', '.join(given)}."
                )
        for name, field in FIELDS.items():
            if name != "format_version":
                setattr(self, name, values.get(name, field.default))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FIELDS:
            if getattr(value, "ndim", None) == 0:  # a number of numpy or torch
                value = value.item()
            value = FIELDS[name].metadata["check"](name, value)
        super().__setattr__(name, value)
        if name in ("codebook_bits", "embedding_bits", "overrides"):
            has = self.__dict__.get
            coded, rows = self.has_coded_embeddings, has("embedding_bits") == ROW_BITS
            version = 4 if coded else 3 if has("codebook_bits") == 8 else 2 if rows else 1
            self.__dict__["format_version"] = 5 if has("overrides") else version

    @property
    def has_coded_embeddings(self) -> bool:
        """Whether embeddings and head are stored in fewer than 8 bits."""
        return self.__dict__.get("embedding_bits", 16) < ROW_BITS

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> CRVQConfig | tuple[CRVQConfig, dict[str, Any]]:
        """Returns the config described by `config_dict`, fields in `kwargs` overriding it.

        Args:
            config_dict: fields by name, as `to_dict` writes them.
            return_unused_kwargs: also return the entries of `kwargs` that are no fields.
        """
        unused = {name: value for name, value in kwargs.items() if name not in FIELDS}
        config = cls(**{**config_dict, **{name: value for name, value in kwargs.items() if name in FIELDS}})
        return (config, unused) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns the stored fields, all of them plain JSON values."""
        stored = [name for name, field in FIELDS.items() if field.metadata["stored"]]
        later = {1: ("embedding_bits", "codebook_bits"), 2: ("codebook_bits",)}.get(self.format_version, ())
        later += () if self.overrides else ("overrides",)
        undecided = [name for name in DECIDED if getattr(self, name) is None]
        undecided += [name for budget in DECIDED.keys() - undecided for name in DECIDED[budget]]
        # Readers of older formats do not know `later` fields.
        stored = [name for name in stored if name not in (*later, *undecided)]
        fields = {name: list(value) if isinstance(value := getattr(self, name), list) else value for name in stored}
        if fields.get("overrides"):
            fields["overrides"] = copy.deepcopy(self.overrides)
        if has_samples(self.dataset):  # tensors
            fields["dataset"] = shareable_dataset(self.dataset)
        return fields

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CRVQConfig) and self.__dict__ == other.__dict__

    def get_loading_attributes(self) -> dict[str, Any]:
        """Returns what a config given to `from_pretrained` may change about a checkpoint that is already quantized."""
        return {"dequantize": self.dequantize}

    @property
    def has_budget(self) -> bool:
        """Whether `bits` or `fit` is yet to be spent, so that the shapes of layers are not decided."""
        return self.bits is not None or self.fit is not None

    def of_layer(self, name: str) -> CRVQConfig:
        """Returns the config of the layer `name`: this one, or one with what `overrides` sets for it.

        Raises:
            ValueError: two of them set different values.
        """
        found: dict[str, Any] = {}
        for pattern, own in (self.overrides or {}).items():  # in any order: writers of JSON sort them
            for key, value in own.items() if is_named_by(name, [pattern]) else ():
                if found.setdefault(key, value) != value:
                    raise ValueError(
                        f"overrides set {key} of {name} to {found[key]:g} and, by {pattern!r}, to {value:g}; let one "
                        "of them not name it."
                    )
        if not found:
            return self
        config = copy.copy(self)
        config.__dict__.update(found, overrides=None)
        return config

    def group_size(self, name: str) -> int:
        """Returns d of the layer `name`, the least that can be chosen while a budget is yet to be spent."""
        return FINEST_GROUP if self.has_budget else self.of_layer(name).in_group_size

    def fits(self, name: str, in_features: int) -> bool:
        """Returns whether the input channels of the layer `name` can be cut into its groups."""
        return in_features % self.group_size(name) == 0

    def layer_shape(self, in_features: int, out_features: int) -> LayerShape:
        """Returns the shape that this config, one `of_layer`, gives to a layer; the one place where it is derived.

        Args:
            in_features: K, a multiple of `in_group_size`.
            out_features: N.

        Raises:
            ValueError: K is no multiple of `in_group_size`.
        """
        if in_features % self.in_group_size != 0:
            raise ValueError(
                f"A layer with {in_features} input channels cannot be cut into groups of {self.in_group_size}."
            )
        critical = num_critical_groups(
            in_features, self.in_group_size, self.critical_ratio, self.num_extended_codebooks
        )
        num_groups = in_features // self.in_group_size
        return LayerShape(
            in_features=in_features,
            out_features=out_features,
            in_group_size=self.in_group_size,
            nbits=self.nbits_per_codebook,
            num_codebooks=1 + self.num_extended_codebooks if critical else 1,
            codebook_size=min(2**self.nbits_per_codebook, out_features * num_groups),
            num_critical_groups=critical,
            codebook_bits=self.codebook_bits,
        )


FIELDS: dict[str, dataclasses.Field] = {field.name: field for field in dataclasses.fields(CRVQConfig)}

CRVQConfig.__signature__ = inspect.Signature(
    [
        inspect.Parameter("preset", inspect.Parameter.POSITIONAL_OR_KEYWORD, default="default", annotation="str"),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for name, field in FIELDS.items()
        ),
    ]
)
