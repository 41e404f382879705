"""The command `matfound`. Nothing heavy is imported before a verb is chosen."""

import argparse
import errno
import importlib
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from matfound import __version__
from matfound.errors import InputError, nearest

#: Verb to the module that has it (`add_parser(subparsers)` and `run(args) -> int | None`) and its line in the help.
VERBS = {
    "fit": ("matfound.cli.lightning", "train a model: matfound fit --config recipes/minidft.yaml"),
    "validate": ("matfound.cli.lightning", "run a trained model on its validation data"),
    "test": ("matfound.cli.lightning", "run a trained model on its test data"),
    "finetune": ("matfound.cli.finetune", "adapt a model to your data: matfound finetune my.extxyz --model M --out DIR"),
    "fit-scales": ("matfound.cli.fit_scales", "GemNet-OC's scale factors: matfound fit-scales gemnet_oc/base FILE --out DIR"),
    "relax": ("matfound.cli.relax", "relax structures: matfound relax a.cif b.cif --model M --cell"),
    "predict": ("matfound.cli.verbs", "energies, forces, …: matfound predict in.extxyz out.extxyz --model M"),
    "evaluate": ("matfound.cli.verbs", "errors against labels: matfound evaluate errors FILE --model M"),
    "data": ("matfound.cli.data", "what is in a file: matfound data info PATH"),
    "models": ("matfound.cli.models", "published potentials: matfound models ls, show, fetch"),
    "convert": ("matfound.cli.models", "checkpoints of other projects: matfound convert FILE OUT"),
    "demo": ("matfound.cli.demo", "train, relax and report in five minutes, offline"),
    "env": ("matfound.cli.verbs", "versions and devices, for bug reports"),
}
#: These parse their own arguments.
LIGHTNING = ("fit", "validate", "test")

EPILOG = """\
exit codes: 0 fine; 1 bad input, said in one line; 2 wrong usage; 3 a relaxation did not converge; 130 interrupted
`matfound VERB --help` explains a verb."""


class Parser(argparse.ArgumentParser):
    """Errors are one line, exit code 2; options are not abbreviated, so that scripts do not break when one is added."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        # ASE's slices may begin with a minus: `--index -6:` is a value, not an option.
        self._negative_number_matcher = re.compile(r"-\d+$|-\d*\.\d+$|-\d*:[-:\d]*$")

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        hint = f"see {self.prog} --help"
        if message.startswith("unrecognized arguments: ") and unknown[0].startswith("-"):
            options = [option for parser in self._family() for option in parser._option_string_actions]
            guess = nearest(unknown[0].partition("=")[0], options)
            hint = guess if guess.startswith("did you") else hint
        self.exit(2, f"matfound: error: {message} ({hint})\n")

    def _family(self) -> list[argparse.ArgumentParser]:
        """This parser and those of its verbs."""
        found: list[argparse.ArgumentParser] = [self]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    found += parser._family() if isinstance(parser, Parser) else [parser]
        return found


def build_parser(verb: str | None = None) -> Parser:
    """The parser of the command with the arguments of one verb; without a verb, just the list of them."""
    parser = Parser(
        prog="matfound",
        description="Molecular and materials foundation models: train, predict, relax, evaluate.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"matfound {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs", parser_class=Parser)
    if verb in VERBS and verb not in LIGHTNING:
        importlib.import_module(VERBS[verb][0]).add_parser(verbs)
    for name, (_, line) in VERBS.items():
        if name not in verbs.choices:
            verbs.add_parser(name, help=line, add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (see `EPILOG`) and raises nothing that a user can cause."""
    args = list(sys.argv[1:] if argv is None else argv)
    if "OMP_WAIT_POLICY" not in os.environ:
        # Idle threads of torch's OpenMP spin for milliseconds, which makes two threads several times slower than one as soon as another
        # process wants the core. Read when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    try:
        return _main(args)
    except InputError as error:
        return _fail(str(error))
    except BrokenPipeError:
        # `matfound … | head`: nobody reads on. The interpreter must not try to flush to them either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(_describe(error))
    except KeyboardInterrupt:
        print("matfound: interrupted", file=sys.stderr)
        return 130
    except SystemExit as error:
        if isinstance(error.code, str):
            return _fail(error.code)
        return error.code or 0


def _main(args: list[str]) -> int:
    if not args:
        build_parser().print_help()
        return 2
    verb = args[0]
    if verb in LIGHTNING:
        return importlib.import_module(VERBS[verb][0]).run(args) or 0
    if not verb.startswith("-") and verb not in VERBS:
        print(f"matfound: error: unknown verb '{verb}' ({nearest(verb, VERBS)})", file=sys.stderr)
        return 2
    parsed = build_parser(verb).parse_args(args)
    if parsed.verb is None:
        build_parser().print_help()
        return 2
    _import(getattr(parsed, "imports", []))
    return importlib.import_module(VERBS[parsed.verb][0]).run(parsed) or 0


def _import(modules: Sequence[str]) -> None:
    """Import what the user named, from this folder too, as `python -m` would.

    Raises:
        InputError: a module cannot be imported.
    """
    for name in modules:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise InputError(f"--import {name}: {error}", remedy="check its name, and the folder that you are in") from None


def _fail(message: str) -> int:
    print("matfound: error: " + " ".join(message.split()), file=sys.stderr)
    return 1


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"{reason}: the disk is full; free space and try again, an older file there is untouched"
    files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    return ": ".join([" -> ".join(files), reason] if files else [reason])
