"""`matfound fit | validate | test`: LightningCLI with one module, one datamodule and errors in one line."""

import logging
import re
import signal
import sys
import threading
import traceback
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only  # type: ignore[attr-defined]

from matfound import catalog
from matfound.cli.recipe import OWN_OPTIONS, check_option, check_recipe, merge, read_recipe
from matfound.data.datamodule import AtomicDataModule
from matfound.errors import InputError, nearest
from matfound.report.files import write_text
from matfound.tasks.multitask import MultiTask
from matfound.training import ranks
from matfound.training.callbacks import RunReport
from matfound.training.progress import RunProgress
from matfound.training.resume import ResumePoint, resume_file
from matfound.training.scale_factors import ScaleFactors

if TYPE_CHECKING:
    from rich.console import Console

#: Top-level keys of a recipe, and the class whose arguments each holds.
SECTIONS: dict[str, Any] = {
    "seed_everything": None, "trainer": Trainer, "model": MultiTask, "data": AtomicDataModule, "checkpoint": ResumePoint,
    "report": RunReport, "scale_factors": ScaleFactors, "threads": None, "ckpt_path": None, "weights_only": None, "verbose": None,
}  # fmt: skip

#: Remarks of other packages that a user can do nothing about.
QUIET = (
    r".*LightningCLI's args parameter is intended to run from within Python.*",
    r".*does not have many workers.*",
    r".*`torch.jit.*` is deprecated.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*Checkpoint directory .* exists and is not empty.*",
    r".*Experiment logs directory .* exists and is not empty.*",
    r".*No device id is provided via `init_process_group`.*",
    r".*No `val_dataloader`.*",
    r".*Be aware that when using `ckpt_path`, callbacks used to create the checkpoint.*",
    r".*Total length of `list` across ranks is zero.*",
    r".*WeightAveraging callback, but loading a checkpoint outside the 'fit' stage.*",
)


class Parser(LightningArgumentParser):
    """Errors are one line, exit code 2."""

    #: Recipes, for messages.
    source = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # an alternative that does not fit; there may be others
            super().error(message, ex)
        if (cause := _input_error(ex)) is not None:
            raise cause.at(self.source or None)
        start = f"{self.source}: " if self.source else ""
        print(f"matfound: error: {start}{_shorter(str(message))}", file=sys.stderr)
        raise SystemExit(2)


def _input_error(error: BaseException | None) -> InputError | None:
    """The InputError behind an exception, if one is."""
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    return error


def _shorter(message: str) -> str:
    """What jsonargparse says, without its words on types."""
    message = " ".join(message.split())
    if match := re.fullmatch(r"the following arguments are required: (.*)", message):
        missing = match[1].replace("fit.", "").replace("validate.", "").replace("test.", "")
        return f"missing: {missing} (give a recipe that has them: --config FILE)"
    if match := re.match(r'Parser key "(.*?)": .*?(?:Given value: (.*)|Got value: (.*))', message):
        return f"{match[1]}: the value {match[2] or match[3]} is not accepted"
    return message


class CLI(LightningCLI):
    """`fit`, `validate` or `test` of a recipe; `predict` is a verb of its own.

    Args:
        argv: the command; its first word says which of them.
        recipes: files, for messages.
        options: of LightningCLI.
    """

    def __init__(self, argv: Sequence[str], recipes: Sequence[Path], **options: Any) -> None:
        self.argv, self.verb = list(argv), argv[0]
        self.source = ", ".join(map(str, recipes))
        super().__init__(MultiTask, AtomicDataModule, **options)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the one that is run: each has a parser that takes its time to build."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parser with one-line errors."""
        # jsonargparse makes further parsers of the same class.
        parser = type("Parser", (Parser,), {"source": self.source})(**{**kwargs, "prog": "matfound", "allow_abbrev": False})
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe; of several, the last wins")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run keeps."""
        parser.add_lightning_class_args(ResumePoint, "checkpoint")
        parser.add_lightning_class_args(RunReport, "report")
        parser.add_lightning_class_args(ScaleFactors, "scale_factors")
        parser.add_argument("--threads", type=int | None, default=None, help="CPU threads of torch (default: torch's own choice)")

    def _parse_ckpt_path(self) -> None:
        """Not here: the hyperparameters are in the recipe, and Lightning would read the whole checkpoint to look for some."""

    def before_instantiate_classes(self) -> None:
        """Everything that a run writes goes to `trainer.default_root_dir`."""
        config = self.config[self.verb]
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        if config.trainer.default_root_dir is None:
            config.trainer.default_root_dir = "runs/latest"
        if config.trainer.logger is True:
            config.trainer.logger = None
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(Path(config.trainer.default_root_dir) / "checkpoints")
        self.text = yaml.safe_dump(yaml.safe_load(self._parser(self.verb).dump(config)), sort_keys=False, allow_unicode=True)
        config.ckpt_path = self._checkpoint(config.ckpt_path, config.checkpoint.dirpath)
        if self.verb != "fit":
            config.verbose = False  # `run` prints a table of its own

    def _checkpoint(self, given: str | None, folder: str) -> str | None:
        """The file that `--ckpt_path` names; None to start from the beginning.

        Raises:
            InputError: there is no such file, or it is no checkpoint; also where `validate` and `test` find none.
        """
        last = resume_file(folder)
        if given is None and self.verb == "fit":
            return None
        if given in (None, "last"):
            if not last.is_file():
                if self.verb == "fit":
                    if not _is_other_rank():
                        print(f"matfound: nothing to resume in {folder} yet, starting from the beginning", file=sys.stderr)
                    return None
                raise InputError("there is no checkpoint to use", remedy="run fit first, or name one with --ckpt_path", file=last)
            given = str(last)
        path = Path(given)
        if path.is_dir():
            remedy = "name its .ckpt file; `matfound evaluate errors` takes a finished model"
            raise InputError("a folder, expected the .ckpt file of a run", remedy=remedy, file=path)
        if not path.is_file():
            near = [str(other) for other in path.parent.glob("*.ckpt")] if path.parent.is_dir() else []
            raise InputError("no such checkpoint", remedy=nearest(str(path), near) if near else "check --ckpt_path", file=path)
        if not zipfile.is_zipfile(path):
            raise InputError("damaged, or no checkpoint of a run", remedy="use another one", file=path)
        return str(path)

    def instantiate_classes(self) -> None:
        """Make datamodule, model, callbacks and trainer.

        Raises:
            InputError: one of them refuses its arguments.
        """
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ArithmeticError, LookupError, ImportError, MisconfigurationException) as error:
            cause = _input_error(error)
            if cause is None:
                cause = InputError(_in_short(error), remedy="check the recipe")
            raise cause.at(self.source or None) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the CSV logger unless another was asked for. The datamodule shares batches out over processes; Lightning must not.

        Raises:
            InputError: several processes, which Lightning would start by running this program again, but not as `matfound fit …`.
        """
        root = Path(self.config[self.verb].trainer.default_root_dir)
        if self.config_init[self.verb].trainer.logger is None:
            kwargs["logger"] = CSVLogger(str(root), name="logs")
        trainer = super().instantiate_trainer(**kwargs, use_distributed_sampler=False)
        strategy: Any = trainer.strategy
        starts = isinstance(strategy.launcher, _SubprocessScriptLauncher) and not strategy.cluster_environment.creates_processes_externally
        if starts and trainer.world_size > 1 and sys.argv[1:] != self.argv:
            raise InputError(
                f"a run of {trainer.world_size} processes has to be started as a command",
                remedy=f"run matfound {self.verb} …, or set trainer.devices to 1",
            )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunReport):
                callback.config = self.text
        return trainer

    def before_fit(self) -> None:
        """Keep the merged configuration beside the results."""
        if not self.trainer.is_global_zero:
            return
        write_text(Path(self.trainer.default_root_dir) / "config.yaml", self.text)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except (RuntimeError, ValueError, LookupError, TypeError, MisconfigurationException) as error:
            if not ranks.is_first_to_fail(error):
                raise SystemExit(1) from None
            if isinstance(error, InputError):
                raise
            if ranks.is_lost_connection(error):
                remedy = "look for why: out of memory, say; then resume with --ckpt_path last"
                raise InputError("another process of the run has ended", remedy=remedy) from error
            modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
            if "lightning.pytorch.trainer.connectors.checkpoint_connector" in modules:
                problem, remedy = f"the checkpoint does not fit this run: {_in_short(error)}", "use the recipe that it was made with"
                raise InputError(problem, remedy=remedy, file=self.config[self.verb].ckpt_path) from error
            if modules[-1].startswith("lightning."):  # Lightning itself complains
                raise InputError(_in_short(error), remedy="check trainer", file=self.source or None) from error
            raise


def _is_other_rank() -> bool:
    """Whether this process leaves it to another to talk to the user."""
    return bool(rank_zero_only.rank)  # type: ignore[attr-defined]


def _in_short(error: BaseException) -> str:
    """What an exception says that may quote others, in one line: a union's alternatives, say."""
    lines = [line.strip(" -\t") for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Does not validate against any of the Union subtypes"):
        lines = lines[lines.index("Errors:") + 1 :][:1] if "Errors:" in lines else lines[1:]
    return " ".join(lines[:2]) or type(error).__name__


def run(argv: Sequence[str]) -> int:
    """Run `fit`, `validate` or `test` with Lightning's own options.

    Raises:
        InputError: bad recipe or data.
    """
    from rich.console import Console

    cli, console = train(argv), Console(highlight=False)
    if not cli.trainer.is_global_zero:
        return 0
    if cli.verb == "fit":
        _print_results(cli, console)
    else:
        _print_metrics(cli, console)
    return 0


def _print_metrics(cli: CLI, console: "Console") -> None:
    """Loss and metrics of `validate` and `test`."""
    from matfound.report.errors import unit
    from matfound.report.tables import terminal
    from matfound.tasks.metrics import OVER_SPREAD
    from matfound.tasks.target import CLASS_METRICS

    stage = {"validate": "val", "test": "test"}[cli.verb]
    values = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    rows: list[dict[str, Any]] = [{"quantity": "loss", "value": values.get(f"{stage}/loss"), "unit": ""}]
    for target in cli.model.targets:
        for metric in (variant for known in target.metrics for variant in (known, known + OVER_SPREAD)):
            if (name := f"{stage}/{target.field}_{metric}") in values:
                plain = metric in CLASS_METRICS or metric.endswith(OVER_SPREAD)
                label = f"{target.field}, {metric if metric == 'accuracy' else metric.upper()}"
                rows.append({"quantity": label.replace(OVER_SPREAD.upper(), "/spread"), "value": values[name],
                             "unit": "" if plain else unit(target.field)})  # fmt: skip
    console.print(f"{cli.config[cli.verb].ckpt_path}, {stage} set", soft_wrap=True)
    console.print(terminal(rows))


def _in_spreads(row: dict[str, Any]) -> dict[str, Any]:
    """A group of several units has no MAE in one of them: errors are given in spreads of the labels."""
    share, gain = row.get("MAE/spread"), row.get("gain")
    if share is None or row.get("MAE") is not None:
        return row
    return row | {"MAE": share, "baseline MAE": None if gain is None else gain * share, "unit": "spread"}


def _print_results(cli: CLI, console: "Console") -> None:
    """Errors on held-out structures, and where the results are."""
    from matfound.report.tables import terminal

    report = next(callback for callback in cli.trainer.callbacks if isinstance(callback, RunReport))  # type: ignore[attr-defined]
    for part in ("test", "val"):
        table = report.tables.get(part)
        if table is not None and len(table):
            columns = ("field", "dataset", "n", "MAE", "baseline MAE", "unit", "accuracy")
            names = {"baseline MAE": "baseline"}  # 80 columns are few
            found = [_in_spreads(row) for row in table.rows(("dataset",))]
            rows = [{names.get(key, key): row[key] for key in columns if key in row} for row in found]
            console.print(terminal(rows, f"Errors, {part} set"))
            if part in report.left_out:
                console.print(f"Left out for elements that were not trained on: {report.left_out[part]} structures")
            break
    folder = Path(report.folder or cli.trainer.default_root_dir)
    console.print(f"model: {folder / 'model'}  report: {folder / 'report.html'}", soft_wrap=True)


def train(argv: Sequence[str]) -> CLI:
    """As `run`; returns the finished command with its trainer, model and datamodule."""
    args, recipes = _recipes(list(argv))
    handler = signal.getsignal(signal.SIGINT)
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        try:
            return CLI(
                argv,
                recipes,
                args=args,
                auto_configure_optimizers=False,
                load_from_checkpoint_support=False,
                save_config_callback=None,
                trainer_defaults={
                    "reload_dataloaders_every_n_epochs": 1,
                    "inference_mode": False,
                    "enable_model_summary": False,
                    "devices": 1,
                    "callbacks": [RunProgress()],
                },
                seed_everything_default=0,
            )
        except SIGTERMException:
            raise SystemExit(128 + signal.SIGTERM) from None
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's code for it would be 1
                if _is_other_rank():  # rank 0 says so
                    raise SystemExit(128 + signal.SIGINT) from None
                raise KeyboardInterrupt from None
            raise
        finally:
            # Lightning leaves Ctrl-C switched off.
            if handler is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)


def _recipes(argv: list[str]) -> tuple[list[str], list[Path]]:
    """Arguments with every recipe found (in the catalog too), and the recipes, whose names have been checked like the options'."""
    recipes: list[Path] = []
    options: list[tuple[str, str | None]] = []
    place = 1
    while place < len(argv):
        option, equals, value = argv[place].partition("=")
        follows = None if place + 1 == len(argv) or argv[place + 1].startswith("--") else argv[place + 1]
        if option in ("--config", "-c") and (equals or follows is not None):
            path = catalog.resolve(value if equals or follows is None else follows)
            argv[place : place + (1 if equals else 2)] = ["--config", str(path)]
            recipes.append(path)
            place += 1
        elif option.startswith("--") and option[2:].partition(".")[0] not in OWN_OPTIONS:
            options.append((option[2:], value if equals else follows))
        place += 1
    _check(recipes, options)
    return argv, recipes


def _check(recipes: list[Path], options: list[tuple[str, str | None]]) -> None:
    contents = [read_recipe(path) for path in recipes]
    complete = len(recipes) == 1 and not any(name.startswith(("model", "data")) for name, _ in options)
    merged: dict[str, Any] = {}
    for path, content in zip(recipes, contents, strict=True):
        check_recipe(content, SECTIONS, path, complete=complete)
        merged = merge(merged, content)
    for name, value in options:
        check_option(name, value, merged, SECTIONS)
