"""`matfound fit | validate | test`: LightningCLI with one module, one datamodule and errors in one line."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from matfound import catalog
from matfound.cli.recipe import check_recipe, read_recipe
from matfound.data.datamodule import AtomicDataModule
from matfound.errors import InputError
from matfound.tasks.multitask import MultiTask
from matfound.training.callbacks import ResumePoint, RunReport
from matfound.training.progress import RunProgress

#: Top-level keys of a recipe, and the class whose arguments each holds.
SECTIONS: dict[str, Any] = {
    "seed_everything": None, "trainer": Trainer, "model": MultiTask, "data": AtomicDataModule, "checkpoint": ResumePoint,
    "report": RunReport, "ckpt_path": None, "weights_only": None, "verbose": None,
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
    r".*there is no last checkpoint available.*",
)


class Parser(LightningArgumentParser):
    """Errors are one line, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if isinstance(ex, InputError):
            raise ex
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, InputError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        print("matfound: error: " + " ".join(str(message).split()), file=sys.stderr)
        raise SystemExit(2)


class CLI(LightningCLI):
    """`fit`, `validate` and `test` of a recipe; `predict` is a verb of its own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's without predict."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Parser with one-line errors."""
        parser = Parser(**{**kwargs, "prog": "matfound"})
        parser.add_argument("-c", "--config", action=ActionConfigFile, help="a recipe; of several, the last wins")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What a run keeps."""
        parser.add_lightning_class_args(ResumePoint, "checkpoint")
        parser.add_lightning_class_args(RunReport, "report")

    def before_instantiate_classes(self) -> None:
        """Everything that a run writes goes to `trainer.default_root_dir`."""
        assert self.subcommand is not None
        trainer = self.config[self.subcommand].trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = "runs/latest"
        if trainer.logger is True:
            trainer.logger = None
        config = self.config[self.subcommand]
        if config.checkpoint.dirpath is None:
            # Set here, because "last" is looked up before callbacks are set up.
            config.checkpoint.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if config.get("ckpt_path") == "last" and not any(Path(config.checkpoint.dirpath).glob("last*.ckpt")):
            print(f"matfound: nothing to resume in {config.checkpoint.dirpath} yet, starting from the beginning", file=sys.stderr)
        self.text = yaml.safe_dump(yaml.safe_load(self._parser(self.subcommand).dump(self.config[self.subcommand])), sort_keys=False)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """With the CSV logger unless another was asked for."""
        assert self.subcommand is not None
        root = Path(self.config[self.subcommand].trainer.default_root_dir)
        if self.config_init[self.subcommand].trainer.logger is None:
            kwargs["logger"] = CSVLogger(str(root), name="logs")
        trainer = super().instantiate_trainer(**kwargs)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, RunReport):
                callback.config = self.text
        return trainer

    def before_fit(self) -> None:
        """Keep the merged configuration beside the results."""
        root = Path(self.trainer.default_root_dir)
        root.mkdir(parents=True, exist_ok=True)
        (root / "config.yaml").write_text(self.text, encoding="utf-8")


def run(argv: Sequence[str]) -> int:
    """Run `fit`, `validate` or `test` with Lightning's own options.

    Raises:
        InputError: bad recipe or data.
    """
    train(argv)
    return 0


def train(argv: Sequence[str]) -> CLI:
    """As `run`; returns the finished command with its trainer, model and datamodule."""
    with warnings.catch_warnings():
        for message in QUIET:
            warnings.filterwarnings("ignore", message)
        logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
        logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
        return CLI(
            MultiTask,
            AtomicDataModule,
            args=_recipes(list(argv)),
            auto_configure_optimizers=False,
            save_config_callback=None,
            trainer_defaults={
                "reload_dataloaders_every_n_epochs": 1,
                "inference_mode": False,
                "enable_model_summary": False,
                "callbacks": [RunProgress()],
            },
            seed_everything_default=0,
        )


def _recipes(argv: list[str]) -> list[str]:
    """Arguments with every recipe found (in the catalog too) and its names checked."""
    place = 0
    while place < len(argv):
        option, equals, value = argv[place].partition("=")
        if option in ("--config", "-c"):
            if not equals and place + 1 == len(argv):
                break
            path = catalog.resolve(value if equals else argv[place + 1])
            check_recipe(read_recipe(path), SECTIONS, path)
            argv[place : place + (1 if equals else 2)] = ["--config", str(path)]
            place += 1
        place += 1
    return argv
