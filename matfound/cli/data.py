"""`matfound data VERB`: look into data, convert, check, fetch, split and compare them. Each verb has a file of its own."""

import argparse
import importlib
from typing import Any

#: Verb to the module that has it.
VERBS = {
    "info": "matfound.cli.data_info",
    "convert": "matfound.cli.data_convert",
    "verify": "matfound.cli.data_convert",
    "cat": "matfound.cli.data_convert",
    "fetch": "matfound.cli.data_fetch",
    "leakage": "matfound.cli.data_leakage",
    "split": "matfound.cli.data_leakage",
}


def add_parser(subparsers: Any) -> None:
    """Add `data` and its verbs to argparse's subparsers."""
    data = subparsers.add_parser("data", help="look into data", description="Look into data.")
    verbs = data.add_subparsers(dest="data_verb", metavar="VERB", required=True)
    for module in dict.fromkeys(VERBS.values()):
        importlib.import_module(module).add_parser(verbs)


def run(args: argparse.Namespace) -> int:
    """Run a verb of `data`; the exit code. Errors as the verb's own."""
    code: int = importlib.import_module(VERBS[args.data_verb]).run(args)
    return code
