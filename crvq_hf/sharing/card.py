"""The model card: what the model is, how to load it, and the numbers of its report."""

from collections.abc import Iterator
from typing import Any

from ..checkpoint.breakdown import Breakdown, break_down
from ..checkpoint.info import CheckpointInfo
from ..naming import told_overrides
from .report import REPORT, about_errors, command_line, facts, kind_rows

PAPER = "https://arxiv.org/abs/2412.09282"


def model_card(
    info: CheckpointInfo,
    report: dict[str, Any] | None,
    repo_id: str,
    base_model: str | None = None,
    licence: dict[str, str] | None = None,
    tags: list[str] | None = None,
    picture: str | None = None,
) -> str:
    """Returns the text of a model card, README.md.

    Args:
        info: the checkpoint, in a folder.
        report: of the run that made it, if known; every measured number in the card is from it.
        repo_id: where the model will be.
        base_model: id on the hub of the dense model.
        licence: the fields `license`, `license_name` and `license_link` of its card, as far as it has them.
        tags: beside "crvq" and "quantized".
        picture: name of the report's picture in the repository.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["crvq", "quantized", *(tags or [])],
        **(licence or {}),
    )
    text = "\n\n".join(_sections(info, report, repo_id, base_model, licence, picture))
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n"))


def _sections(
    info: CheckpointInfo,
    report: dict[str, Any] | None,
    repo_id: str,
    base_model: str | None,
    licence: dict[str, str] | None,
    picture: str | None,
) -> Iterator[str]:
    """Yields the parts of the card below its metadata."""
    numbers = break_down(info, report)
    name = (report or {}).get("command", {}).get("model") or info.config.get("model_type")
    original = f"[{base_model}](https://huggingface.co/{base_model})" if base_model else f"A local model, `{name}`"
    yield f"# {repo_id.rpartition('/')[2]}"
    yield (
        f"{original}, its weights quantized to {info.bits_per_weight:.3f} bits each with [CRVQ]({PAPER}) "
        "(channel-relaxed vector quantization) by the transformers plugin `crvq-hf`."
    )
    yield "## Use\n\n```\npip install crvq-hf\n```\n\nNothing of it has to be imported:"
    yield f"```python\n{_example(repo_id)}\n```"
    yield "## Numbers\n\n" + _table([("", ""), *facts(info, report, numbers).items()])
    yield _evaluation(report)
    yield from _layers(numbers, report, picture)
    yield _settings(info, report)
    terms = f"`{licence.get('license_name') or licence['license']}`, as" if licence else "Not known here; that of"
    yield (
        "## Limits\n\nNear one bit per weight a model loses some of its ability, a small one most of it. What was not "
        "measured above is not known."
    )
    yield f"## Licence\n\n{terms} the model that was quantized."


def _example(repo_id: str) -> str:
    """Returns lines of Python that load the model and let it write."""
    return (
        "from transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", model="{repo_id}")\n'
        'print(generator("The sea is", max_new_tokens=20)[0]["generated_text"])'
    )


def _evaluation(report: dict[str, Any] | None) -> str:
    """Returns how the perplexity was measured."""
    evaluation = (report or {}).get("evaluation")
    if evaluation is None:
        return "The perplexity of this model was not measured when it was made; `crvq eval` measures it."
    return (
        f"Perplexity on the text `{evaluation['text']}` (SHA-256 `{evaluation['text_sha256']}`), "
        f"{evaluation['windows']} windows of {evaluation['seqlen']} tokens from its start, {evaluation['tokens']:,} "
        f"tokens predicted, {evaluation['dtype']} on {evaluation['device']}:\n\n```\n{evaluation['command']}\n```"
    )


def _layers(numbers: Breakdown, report: dict[str, Any] | None, picture: str | None) -> Iterator[str]:
    """Yields the picture and the table of layers."""
    yield "## Layers"
    if picture is not None:
        yield f"![errors by layer, bits by block, bytes of the checkpoint, time]({picture})"
    if report is not None:
        yield f"{about_errors(report)} All layers are in [{REPORT}]({REPORT})."
    yield _table(kind_rows(numbers.kinds))


def _settings(info: CheckpointInfo, report: dict[str, Any] | None) -> str:
    """Returns how the model was made."""
    command = report and command_line(report)
    text = f"## How it was made\n\n```\n{command}\n```\n\n" if command else "## How it was made\n\n"
    config = info.crvq
    return text + (
        f"Every {config.in_group_size} input channels of a row are one code of {config.nbits_per_codebook} bits; "
        f"{config.num_extended_codebooks} further codebooks refine the most important {config.critical_ratio:.1%} of "
        f"the channels (importance: `{config.importance}`){told_overrides(config.overrides)}."
    )


def _table(rows: list[tuple[str, ...]]) -> str:
    """Returns a table in Markdown; the first row is its head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("---" for _ in rows[0]) + " |", *lines[1:]])
