"""`crvq push`: uploads a quantized model with a model card."""

import argparse

from ..sharing.hub import card_text, prepare, push

HELP = "upload a quantized model to the Hugging Face hub, with a model card"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.add_argument("out", metavar="OUT", help="output folder of crvq quantize; a README.md in it is the card")
    parser.add_argument("repository", metavar="USER/NAME", help="repository, made if need be")
    parser.add_argument("--private", action="store_true", default=None, help="make it private")
    parser.add_argument("--token", help="token of the hub; safer are hf auth login, and HF_TOKEN")
    parser.add_argument("--base-model", metavar="ID", help="hub id of what was quantized, where report.json has none")
    parser.add_argument("--dry-run", action="store_true", help="print the card and the files, upload nothing")


def run(args: argparse.Namespace) -> None:
    """Uploads, then prints the address; or prints what would be uploaded."""
    options = {"base_model": args.base_model, "token": args.token}
    if args.dry_run:
        files = prepare(args.out, args.repository, **options)
        print(card_text(files), *files, sep="\n")
        return
    print(push(args.out, args.repository, private=args.private, **options).repo_url)
