"""To the Hugging Face hub: a checkpoint, its tokenizer, its report and a model card, in one commit."""

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..checkpoint.sources import known_options, load_tokenizer
from ..modeling.linear import CRVQLinear
from .card import model_card
from .report import PICTURE, REPORT, command_of, read_quantized, write_report

logger = logging.getLogger("crvq")

CARD = "README.md"
LICENCE_FIELDS = ("license", "license_name", "license_link")
# Of an earlier push none of these may stay: a single file there would be loaded in place of new shards.
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")


def push(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    tags: list[str] | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    commit_description: str | None = None,
) -> Any:
    """Uploads a CRVQ model in one commit, with a model card.

    Args:
        folder: the output of `crvq quantize`, or any folder that a CRVQ model was saved in. A README.md in it is the
            card; without one the card is written from report.json.
        repo_id: `user/name`, made if need be.
        base_model: id on the hub of the model that was quantized; by default what report.json says.
        private: make a new repository private, or public; None leaves it to the hub.
        token: of the hub; by default the one of `hf auth login` or `HF_TOKEN`.
        tags: for the card, beside "crvq" and "quantized".
        revision: branch, made if need be; the main one by default.
        create_pr: open a pull request instead of changing the branch.
        commit_message: first line of the commit's message.
        commit_description: the rest of it.

    Returns:
        The `CommitInfo` of huggingface_hub.

    Raises:
        ValueError: the folder holds no complete CRVQ model, or the repository is public where a private one was asked.
        OSError: there is no token, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    api = HfApi(library_name="crvq_hf", token=token)
    files = prepare(folder, repo_id, base_model=base_model, token=token, tags=tags)
    if not isinstance(token, str) and get_token() is None:
        raise OSError("There is no token for the hub; run hf auth login, set HF_TOKEN, or give one.")
    with _explained(repo_id, api.endpoint):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        found = api.model_info(repo_id, revision=revision)
    if private and not found.private:
        raise ValueError(f"{repo_id} exists and is public; make it private on the hub, or name another.")
    there = [file.rfilename for file in found.siblings or []]
    stale = [name for name in there if _WEIGHTS.fullmatch(name) and name not in files]
    additions = [CommitOperationAdd(name, content) for name, content in files.items()]
    with _explained(repo_id, api.endpoint):
        return api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in stale)],
            commit_message=commit_message or "Upload CRVQ model",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def push_model(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    max_shard_size: int | str = "50GB",
    tags: list[str] | str | None = None,
    **options: Any,
) -> Any:
    """Uploads a CRVQ model in memory: what `model.push_to_hub` of a quantized model does.

    Args:
        model: quantized with CRVQ.
        repo_id: `user/name`, made if need be.
        tokenizer: to upload with it; by default the one at `model.name_or_path`, if there is one.
        max_shard_size: of one safetensors file.
        tags: for the card, beside those of the model.
        options: of `push`; those of transformers' own `push_to_hub` are among them.

    Returns:
        The `CommitInfo` of huggingface_hub.

    Raises:
        ValueError, OSError: see `push`.
    """
    tags = [tags] if isinstance(tags, str) else tags or []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer = _tokenizer_of(model) if tokenizer is None else tokenizer
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        report = _report_of(model)
        if report is not None:
            write_report(folder, report)
        return push(folder, repo_id, tags=[*tags, *(model.model_tags or [])], **options)


def prepare(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    base_model: str | None = None,
    token: str | bool | None = None,
    tags: list[str] | None = None,
) -> dict[str, Path | bytes]:
    """Returns what `push` uploads by name, a path or the content; the hub is asked for the base model's licence only.

    Raises:
        ValueError: the folder holds no complete CRVQ model.
    """
    folder = Path(folder)
    info, report = read_quantized(folder)
    relative = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = {name for name in relative if any(part.startswith(".") for part in name.parts)}
    files = {name.as_posix(): path for name, path in relative.items() if name not in hidden}
    if "tokenizer_config.json" not in files:
        logger.warning("There is no tokenizer to upload; whoever loads the model needs one from elsewhere.")
    if report is not None:
        files[REPORT] = (json.dumps(report, indent=1) + "\n").encode()
    if CARD not in files:
        base_model = base_model or (report or {}).get("base_model")
        licence = (report or {}).get("base_licence") or _licence_on_hub(base_model, token)
        picture = PICTURE if PICTURE in files else None
        files[CARD] = model_card(info, report, repo_id, base_model, licence, tags, picture).encode()
    return files


def card_text(files: dict[str, Path | bytes]) -> str:
    """Returns the model card among the `files` to upload."""
    card = files[CARD]
    return (card if isinstance(card, bytes) else card.read_bytes()).decode()


def licence_in(folder: str | os.PathLike) -> dict[str, str] | None:
    """Returns the licence that the README.md of a model's folder declares: fields of its metadata, None without."""
    from huggingface_hub import ModelCard

    file = Path(folder) / CARD
    if not file.is_file():
        return None
    try:
        return _licence(ModelCard.load(file, ignore_metadata_errors=True).data)
    except Exception as error:  # someone else's file: whatever is wrong with it, there is no licence to read
        logger.warning("%s tells no licence (%s).", file, error)
        return None


def _licence(data: Any) -> dict[str, str] | None:
    """Returns the licence fields of a model card's metadata."""
    fields = {name: value for name in LICENCE_FIELDS if isinstance(value := getattr(data, name, None), str)}
    return fields if "license" in fields else None


def _licence_on_hub(model: str | None, token: str | bool | None) -> dict[str, str] | None:
    """Returns the licence of a model on the hub, None if it is not known."""
    from huggingface_hub import HfApi

    if model is None:
        return None
    try:
        return _licence(HfApi(token=token).model_info(model).card_data)
    except Exception as error:  # whatever the hub client or the network raise
        logger.warning("The licence of %s cannot be read from the hub (%s); add it to the card.", model, _first(error))
        return None


def _tokenizer_of(model: PreTrainedModel) -> Any:
    """Returns the tokenizer that came with `model`, None if none did."""
    source = model.name_or_path
    try:
        return load_tokenizer(source, source, known_options(model)) if source else None
    except (OSError, ValueError, KeyError):
        return None


def _report_of(model: PreTrainedModel) -> dict[str, Any] | None:
    """Returns the report of a model in memory, None if there is none that fits.

    A model loaded from a folder may have been trained since, so that what was measured there counts no more.
    """
    layers = {name for name, module in model.named_modules() if isinstance(module, CRVQLinear)}
    report, source = getattr(model, "crvq_report", None), model.name_or_path
    if report is not None:
        command = command_of(source, None, model.config.quantization_config)
        return {**report, "command": command, "base_licence": licence_in(source)} if source else report
    report = read_quantized(Path(source))[1] if os.path.isdir(source) else None
    if report is None or report["layers"].keys() != layers:  # another class names its layers differently
        return None
    if report.pop("evaluation", None) is not None:
        logger.warning("The card will not quote what was measured of %s; crvq push %s does.", source, source)
    return report


@contextmanager
def _explained(repo_id: str, endpoint: str) -> Iterator[None]:
    """Turns what the hub client raises into an OSError of one sentence; nothing has been committed then."""
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except Exception as error:  # the client's own, those of its network library, RuntimeErrors around both
        cause = error if getattr(error, "response", None) is not None else error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        said = getattr(cause, "server_message", None) or _first(cause)
        if status == 401:
            reason = f"The hub does not accept this token for {repo_id}; make one with write access and log in with it"
        elif status == 403:
            reason = f"This token may not write to {repo_id} ({said}); name a repository of your own"
        elif status == 404:
            reason = f"The hub has no {repo_id} that this token may see; check the name and the token"
        elif status is not None:
            reason = f"The hub answered {status} for {repo_id} ({said}); nothing was committed, try again"
        elif isinstance(error, ValueError):
            reason = f"{_first(error)}; nothing was committed"
        elif isinstance(error, OfflineModeIsEnabled):
            reason = f"HF_HUB_OFFLINE is set, so {endpoint} is not asked; unset it to push"
        else:
            reason = f"{endpoint} cannot be reached ({said}); nothing was committed, try again"
        raise OSError(f"{reason}.") from error


def _first(error: BaseException) -> str:
    """Returns the first line of an error's message, its class if it has none."""
    return next((line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()), type(error).__name__)
