"""The command line. The options of `crvq quantize` are the fields of `CRVQConfig`."""

import argparse
import dataclasses
import json
import logging
import os
import sys
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from tqdm.contrib.logging import logging_redirect_tqdm

from . import distributed
from .config import FIELDS, PRESETS, CRVQConfig
from .convert import check_source, convert
from .demo import MODEL, demo
from .device import compute_device
from .doctor import examine, installed_version
from .evaluate import perplexity, read_text_tokens, tokens_per_second
from .harness import Tasks, run_tasks, table
from .hub import card_text, prepare, push
from .info import describe, megabytes, read_info
from .measure import Measurement, convert_and_measure, load
from .report import draw_report
from .serve import serve
from .verify import verify

# What can go wrong without a bug of ours: told in one line, without a traceback.
EXPECTED_ERRORS = (ValueError, OSError, ImportError, SafetensorError, MemoryError, torch.OutOfMemoryError)
NOT_OPTIONS = ("quant_method", "quantizer_package", "format_version", "dequantize")
GROUPS = {
    "method": (
        "bits",
        "in_group_size",
        "nbits_per_codebook",
        "num_extended_codebooks",
        "critical_ratio",
        "codebook_bits",
        "importance",
    ),
    "embeddings": ("embedding_bits",),
    "calibration": ("dataset", "nsamples", "seqlen", "tokenizer"),
    "fine-tuning": ("block_finetune_epochs", "e2e_finetune_epochs", "e2e_nsamples"),
}


class _Parser(argparse.ArgumentParser):
    """An argument parser that takes no abbreviations and whose errors are one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"crvq: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: the arguments, those of the process by default.

    Returns:
        The exit code: 0, 1 if `crvq doctor` or `crvq verify` found a problem, 2 after an error, 130 after Ctrl-C.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    serves = arguments[:1] == ["serve"]  # what follows is for transformers
    args = build_parser().parse_args(arguments[:1] if serves else arguments)
    args.rest = arguments[1:]
    logger = logging.getLogger("crvq")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("crvq: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with logging_redirect_tqdm([logger]):  # lines go above the progress bar
            return args.run(args) or 0
    except KeyboardInterrupt:
        print("crvq: interrupted; the same command again continues", file=sys.stderr)
        return 130
    except distributed.EndedElsewhere:  # the process that has failed says why
        return 2
    except EXPECTED_ERRORS as error:
        if args.debug or os.environ.get("CRVQ_DEBUG") == "1":
            raise
        start = "\n" if distributed.rank() else ""  # where the first process's progress bar ends
        print(f"{start}crvq: error: {_one_line(error)}", file=sys.stderr)
        return 2
    finally:
        logger.removeHandler(handler)
        distributed.leave()


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser; `parse_args` sets `run` to the function of the command."""
    parser = _Parser(prog="crvq", description="Channel-relaxed vector quantization of language models.")
    parser.add_argument("--version", action="version", version=f"crvq-hf {installed_version('crvq-hf')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    quantize = _command(commands, "quantize", _quantize, "quantize a model into a new folder; run again to resume")
    quantize.add_argument("model", metavar="MODEL", help="folder or hub id of a dense causal language model")
    quantize.add_argument("out", metavar="OUT", help="folder to make")
    quantize.add_argument("--gguf-file", metavar="FILE", help="read this GGUF file of MODEL")
    _add_config_options(quantize)
    _add_evaluation_options(quantize)

    evaluate = _command(commands, "eval", _eval, "perplexity of a model on a text, or benchmark tasks")
    _add_model_options(evaluate)
    evaluate.add_argument("--text", metavar="FILE", help="UTF-8 text, read from its start")
    evaluate.add_argument("--seqlen", type=int, default=2048, help="tokens per window (default: %(default)s)")
    evaluate.add_argument("--windows", type=int, default=10, help="windows at most (default: %(default)s)")
    evaluate.add_argument("--speed", type=int, metavar="N", help="also time the writing of N tokens")
    evaluate.add_argument("--tasks", metavar="NAME[,NAME]", help="tasks of the lm-evaluation-harness (lm_eval)")
    evaluate.add_argument("--include-path", metavar="DIR", help="folder with task files of your own")
    evaluate.add_argument("--limit", type=int, metavar="N", help="examples per task at most")
    evaluate.add_argument("--json", action="store_true", help="print one line of JSON")

    info = _command(commands, "info", _info, "sizes, shapes and bits of a checkpoint, from its headers")
    info.add_argument("model", metavar="MODEL", help="folder or hub id")

    report = _command(commands, "report", _report, "draw report.html and report.png of a quantized model again")
    report.add_argument("out", metavar="OUT", help="output folder of crvq quantize")

    push = _command(commands, "push", _push, "upload a quantized model to the Hugging Face hub, with a model card")
    push.add_argument("out", metavar="OUT", help="output folder of crvq quantize; a README.md in it is the card")
    push.add_argument("repository", metavar="USER/NAME", help="repository, made if need be")
    push.add_argument("--private", action="store_true", default=None, help="make it private")
    push.add_argument("--token", help="token of the hub; safer are hf auth login, and HF_TOKEN")
    push.add_argument("--base-model", metavar="ID", help="hub id of what was quantized, where report.json has none")
    push.add_argument("--dry-run", action="store_true", help="print the card and the files, upload nothing")
    check = _command(
        commands, "verify", _verify, "check that nothing of a checkpoint was lost or changed since saving"
    )
    check.add_argument("out", metavar="OUT", help="folder of a quantized model")

    generate = _command(commands, "generate", _generate, "let a model write")
    _add_model_options(generate)
    generate.add_argument("--prompt", required=True, help="a message to a chat model, the start of a text for others")
    generate.add_argument("--raw", action="store_true", help="take the prompt as the start of a text in any case")
    generate.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")

    _command(commands, "serve", _serve, "answer OpenAI-style requests: takes what `transformers serve` takes")

    doctor = _command(commands, "doctor", _doctor, "versions, the kernel in use, and whether it computes correctly")
    doctor.add_argument("--device", help="device to examine; cuda if present, else cpu")

    comparison = _command(commands, "demo", _demo, f"quantize {MODEL}, reload it and compare")
    comparison.add_argument("--out", default="crvq-demo", metavar="DIR", help="work folder (default: %(default)s)")
    return parser


def _command(commands: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    """Returns the parser of a new command."""
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error (as CRVQ_DEBUG=1 does)")
    parser.set_defaults(run=run)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="folder or hub id, dense or quantized")
    parser.add_argument("--device", help="device to run on; cuda if present, else cpu")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="dtype of what is not quantized, auto is as stored (default: float32 on a CPU, else auto)",
    )


def _add_config_options(parser: argparse.ArgumentParser) -> None:
    """Adds an option for every field of `CRVQConfig` that a command can set."""
    presets = {name: ", ".join(f"{key} {value}" for key, value in values.items()) for name, values in PRESETS.items()}
    changes = "; ".join(f"{name} is {text}" for name, text in presets.items() if text)
    parser.add_argument("--preset", choices=PRESETS, default="default", help=f"other defaults: {changes}")
    groups = {title: parser.add_argument_group(title) for title in (*GROUPS, "run")}
    title_of = {name: title for title, names in GROUPS.items() for name in names}
    for name, field in FIELDS.items():
        if name not in NOT_OPTIONS:
            groups[title_of.get(name, "run")].add_argument(f"--{name.replace('_', '-')}", **_option(field))


def _add_evaluation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("evaluation")
    text = "also measure the perplexity on this UTF-8 text, before and after, for the report"
    group.add_argument("--evaluate", metavar="FILE", help=text)
    for name, default, text in (("seqlen", 2048, "tokens per window"), ("windows", 10, "windows at most")):
        options = {"type": int, "default": default, "metavar": "N", "help": f"{text} (default: {default})"}
        group.add_argument(f"--evaluate-{name}", **options)


def _option(field: dataclasses.Field) -> dict[str, Any]:
    """Returns the arguments of `add_argument` for one field."""
    text = field.metadata["help"].replace("%", "%%")
    options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text}
    if field.default is not None:
        options["help"] += f" (default: {field.default})"
    if isinstance(field.default, (int, float)):
        options |= {"type": type(field.default), "metavar": "N" if isinstance(field.default, int) else "X"}
    elif field.name == "bits":
        options |= {"type": float, "metavar": "X"}
    elif field.name == "dataset":  # the one field that takes other values here than in Python
        sources = "'self' (written by the model), 'wikitext2', 'c4', a text file, or 'none'"
        options |= {"metavar": "TEXT", "help": f"calibration text: {sources} (default: {field.default})"}
    elif field.type.startswith("list["):
        options |= {"action": "append", "metavar": "NAME", "help": f"{text}; may be repeated"}
    return options


def _quantize(args: argparse.Namespace) -> None:
    fields = {name: value for name, value in vars(args).items() if name in FIELDS or name == "preset"}
    if fields.get("dataset") == "none":
        fields["dataset"] = None
    with distributed.together(fields.get("device")):
        config = CRVQConfig(**fields)
        if args.evaluate is None:
            report = convert(args.model, args.out, config, args.gguf_file)
        else:
            measurement = Measurement(args.evaluate, args.evaluate_seqlen, args.evaluate_windows, config.device)
            report = convert_and_measure(args.model, args.out, config, args.gguf_file, measurement)
    if distributed.rank():
        return
    print(summary(report))
    print(f"{'checkpoint':<18} {megabytes(read_info(args.out).nbytes)} in {args.out}")


def summary(report: dict[str, Any]) -> str:
    """Returns a few lines on how a run went."""
    errors = {name: layer["relative_error"] for name, layer in report["layers"].items()}
    mean, worst = sum(errors.values()) / len(errors), max(errors, key=errors.get)
    seconds = ", ".join(f"{phase} {value:.1f}" for phase, value in report["seconds"].items())
    rows = {
        "layers": f"{len(errors)}",
        "bits per weight": f"{report['bits_per_weight']:.3f} (stored, channel order counted)",
        "relative error": f"{mean:.4f} on average, at worst {errors[worst]:.4f} in {worst}",
        "calibration": f"{report['calibration_tokens']} tokens",
        "seconds": f"{sum(report['seconds'].values()):.0f} ({seconds})",
        "peak memory": megabytes(report["peak_memory_bytes"]),
    }
    if "evaluation" in report:
        rows["perplexity"] = "{before[value]:.4f} before, {after[value]:.4f} after".format(**report["evaluation"])
    return "\n".join(f"{title:<18} {value}" for title, value in rows.items())


def _eval(args: argparse.Namespace) -> None:
    if args.text is None and args.tasks is None:
        raise ValueError("Nothing to evaluate on; give --text FILE, --tasks NAME or both.")
    tasks = None if args.tasks is None else Tasks(args.tasks.split(","), args.include_path)
    model, tokenizer = load(args.model, args.device, args.dtype)
    found: dict[str, Any] = {"device": str(model.device), "dtype": str(model.dtype)}
    lines = []
    if args.text is not None:
        result = perplexity(model, read_text_tokens(tokenizer, args.text), args.seqlen, args.windows)
        found |= dataclasses.asdict(result)
        lines.append(
            f"perplexity {result.value:.4f} over {result.tokens} tokens ({result.windows} windows of "
            f"{result.seqlen}), {result.seconds:.1f} s, {model.dtype} on {model.device}"
        )
    if tasks is not None:
        results = run_tasks(model, tokenizer, tasks, args.limit)
        found["tasks"] = results["results"]
        lines.append(table(results))
    found["tokens_per_second"] = None if args.speed is None else tokens_per_second(model, tokenizer, args.speed)
    if args.speed is not None:
        lines.append(f"{found['tokens_per_second']:.1f} tokens/s written, greedy, one sequence")
    print(json.dumps(found, default=str) if args.json else "\n".join(lines))


def _info(args: argparse.Namespace) -> None:
    check_source(args.model)
    print(describe(read_info(args.model)))


def _report(args: argparse.Namespace) -> None:
    print("\n".join(map(str, draw_report(args.out))))


def _push(args: argparse.Namespace) -> None:
    options = {"base_model": args.base_model, "token": args.token}
    if args.dry_run:
        files = prepare(args.out, args.repository, **options)
        print(card_text(files), *files, sep="\n")
        return
    print(push(args.out, args.repository, private=args.private, **options).repo_url)


def _verify(args: argparse.Namespace) -> int:
    result = verify(args.out)
    print("\n".join(result.problems or [result.summary]))
    return 1 if result.problems else 0


def _generate(args: argparse.Namespace) -> None:
    if args.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    model, tokenizer = load(args.model, args.device, args.dtype)
    if tokenizer.chat_template and not args.raw:
        messages = [{"role": "user", "content": args.prompt}]
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        tokens = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False)
    if tokens["input_ids"].numel() == 0:
        raise ValueError("The prompt is empty; give some text.")
    written = model.generate(**tokens.to(model.device), max_new_tokens=args.max_new_tokens, do_sample=False)
    print(tokenizer.decode(written[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True))


def _serve(args: argparse.Namespace) -> None:
    serve(args.rest)


def _doctor(args: argparse.Namespace) -> int:
    lines, well = examine(compute_device(args.device))
    print("\n".join(lines))
    return 0 if well else 1


def _demo(args: argparse.Namespace) -> None:
    demo(args.out)


def _one_line(error: BaseException, most: int = 600) -> str:
    """Returns the message of an error in one line, the errors' class if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[:most]} ... (--debug shows all)"
