"""The one training module: every target's loss, masked where labels are missing.

Losses are exact over several processes: a target's loss is the sum of its terms over all of them, divided by how many there are, so that
gradients are those of one process with all the structures in one batch.
"""

import fnmatch
import functools
import logging
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from matfound.errors import InputError, nearest
from matfound.models.base import Potential, Statistics
from matfound.nn.heads import BinaryHead, ClassHead, Float64Buffers
from matfound.structures.atomic_data import AtomicData
from matfound.tasks.denoising import Denoising
from matfound.tasks.losses import Total
from matfound.tasks.metrics import ColumnSums, TargetMetrics
from matfound.tasks.ranks import add_up, first_error, touched, world_size
from matfound.tasks.references import Refit, refit
from matfound.tasks.statistics import collect
from matfound.tasks.target import Comparison, Target

#: From parameters to an optimizer; in YAML a class path with its other arguments.
OptimizerFactory = Callable[[Any], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

log = logging.getLogger(__name__)

#: The energy errors of a good model are small, those of a few frames fitted away: their scale is no less than this share of the forces'
#: (Å), and than this (eV/atom), so that energies never drown the forces.
FORCE_SHARE, MIN_SPREAD = 0.01, 1e-3


class MultiTask(LightningModule):
    """Trains a potential on any set of targets.

    Parameters of heads that predict none of the targets stay as they are. All others get a gradient in every step, of zeros where a batch
    has nothing to say about them, in any number of processes.

    Args:
        potential: the model; to go on with a finished one, `class_path: matfound.models.checkpoint.load`.
        targets: what to learn; each needs a head.
        optimizer: makes the optimizer from the parameters. Default: AdamW with learning rate 1e-3.
        lr_scheduler: makes the schedule from the optimizer, stepped after every optimizer step; one with a method `set_total_steps`
            is told how many there will be. `ReduceLROnPlateau` is stepped after every validation, by `val/loss`
            (after every epoch, by `train/loss`, where nothing is validated).
        fit_scales: true fits the model's references, scales and neighbour counts to the training data first; "references", for
            fine-tuning, shifts only the references, to the level of theory of the data (see `matfound.tasks.references`).
        isolated_atoms: for "references": energies of isolated atoms by element, eV, where the data have them.
        refit: for "references": only these datasets. Default: all of the training data.
        denoising: move atoms in training, for the target "noise".
        no_decay: names of parameters without weight decay; * stands for anything, as in "*.bias".
        compile: compile the model with forces and stress inside (`Potential.compile`); the second step then takes up to minutes longer.
            Where torch cannot, a warning says so, and the model runs as it is.
        replay: record forward and backward pass on a GPU as CUDA graphs (`Potential.record`): several times as fast for small batches.

    Raises:
        InputError: no targets, two for one field, or one that no head predicts, or not of its kind.
    """

    def __init__(
        self,
        potential: Potential,
        targets: list[Target],
        optimizer: OptimizerFactory = torch.optim.AdamW,
        lr_scheduler: SchedulerFactory | None = None,
        fit_scales: bool | Literal["references"] = True,
        isolated_atoms: dict[str, float] | None = None,
        refit: list[str] | None = None,
        denoising: Denoising | None = None,
        no_decay: list[str] | None = None,
        compile: bool = False,  # noqa: A002 - torch's word for it
        replay: bool = False,
    ) -> None:
        super().__init__()
        self.potential = potential.train()
        if compile and replay:
            raise InputError("model.compile and model.replay exclude each other", remedy="replay for small batches, compile for large ones")
        if compile:
            self.potential.compile()
        if replay:
            self.potential.record()
        if not any(parameter.requires_grad for parameter in potential.parameters()):
            potential.requires_grad_(True)  # it comes from `checkpoint.load`
        self.targets = targets
        self.make_optimizer, self.make_scheduler = optimizer, lr_scheduler
        self.fit_scales, self.isolated_atoms, self.refit = fit_scales, isolated_atoms, refit
        if fit_scales != "references" and (isolated_atoms or refit):
            raise InputError("isolated_atoms and refit go with fit_scales: references", remedy="set model.fit_scales to references")
        #: What `fit_scales="references"` did.
        self.refitted: list[Refit] = []
        self._told: set[str] = set()
        if not targets:
            raise InputError("there are no targets", remedy="name what to learn, e.g. model.targets: [{field: energy}, {field: forces}]")
        for i, target in enumerate(targets):
            _check(target, potential)
            if target.field in (other.field for other in targets[:i]):
                raise InputError(f"two targets have the field '{target.field}'", remedy="keep one of them")
        wanted = {target.field for target in targets}
        if ("noise" in wanted) != (denoising is not None):
            raise InputError("the target 'noise' and model.denoising go together", remedy="set both, or neither")
        self.denoising, self.no_decay = denoising, no_decay or []
        idle = [name for name, head in potential.heads.items() if not wanted & set(head.outputs)]  # type: ignore[arg-type]
        idle = [f"potential.heads.{head}.{name}" for head in idle for name, _ in potential.heads[head].named_parameters()]
        #: `DistributedDataParallel` reads it: parameters that get no gradients.
        self._ddp_params_and_buffers_to_ignore = idle
        shape = {t.field: (t.columns,) if t.definition.group else () for t in targets}
        self.scales = Float64Buffers(**{t.field: torch.ones(len(potential.datasets), *shape[t.field]) for t in targets})
        self.metrics = nn.ModuleDict({stage: nn.ModuleDict({t.field: TargetMetrics(t) for t in targets}) for stage in ("val", "test")})
        self.judged = nn.ModuleDict({stage: ColumnSums() for stage in ("val", "test")})

    def setup(self, stage: str) -> None:
        """Fit what depends on the training data; a resumed run overwrites it with the same values from its checkpoint."""
        if stage != "fit":
            return
        statistics = collect(self.trainer.datamodule.samples("train"), self.potential.datasets)  # type: ignore[attr-defined]
        if self.fit_scales == "references":
            self._refit(statistics)
        elif self.fit_scales:
            self.potential.fit_scales(statistics)
        self._fit_loss_scales(statistics)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, WeightAveraging):
                callback.setup(self.trainer, self, stage)  # it has copied the model as it was before
                # Buffers are constants, indices among them: averages of one and the same would round them.
                callback._average_model.use_buffers = False  # type: ignore[union-attr]

    def _refit(self, statistics: Statistics) -> None:
        """Shift references; the spread of energies becomes that of what is left to learn."""
        home = next(self.potential.parameters()).device
        self.potential.to(self.trainer.strategy.root_device)  # Lightning moves the model after `setup`
        samples = self.trainer.datamodule.samples("train")  # type: ignore[attr-defined]
        self.refitted = refit(self.potential, samples, self.refit, self.isolated_atoms)
        self.potential.to(home)
        least = self._least_spread(statistics)
        for entry in self.refitted:
            d = self.potential.dataset_index(entry.dataset)
            if entry.frames:
                statistics.rms["energy"][d] = max(entry.spread, float(least[d]))

    def _fit_loss_scales(self, statistics: Statistics) -> None:
        for target in self.targets:
            if target.field in statistics.rms:
                group = target.definition.group and target.field in statistics.mean
                size = statistics.spread(target.field) if group else statistics.rms[target.field]
                otherwise = self._least_spread(statistics) if target.per_atom else torch.ones_like(size)
                getattr(self.scales, target.field).copy_(torch.where(size > 0, size, otherwise))
        if self.denoising is not None:
            self.scales.noise.fill_(self.denoising.sigma)

    @staticmethod
    def _least_spread(statistics: Statistics) -> Tensor:
        """Scale of the energies in each dataset where there is nothing to take it from."""
        energy = statistics.rms["energy"]
        return (FORCE_SHARE * statistics.rms.get("forces", torch.zeros_like(energy)).nan_to_num()).clamp(min=MIN_SPREAD)

    def forward(self, batch: AtomicData) -> dict[str, Tensor]:
        """The potential's predictions."""
        return self.potential(batch)

    def _row_scale(self, target: Target, comparison: Comparison, batch: AtomicData) -> Tensor:
        scales, dataset = getattr(self.scales, target.field), batch.dataset[comparison.system]
        return scales[dataset] if comparison.column is None else scales[dataset, comparison.column]

    def _step(self, batch: AtomicData, stage: str) -> Tensor:
        """The loss, of which this process has its share: the mean over all processes is the loss of all their structures."""
        device, world = batch.numbers.device, world_size()
        totals: dict[str, Total] = {}
        failure: InputError | None = None
        try:
            totals = self._totals(batch, stage)
        except InputError as error:
            failure = error
        terms, loss, systems = [float(totals[t.field].terms) if t.field in totals else 0.0 for t in self.targets], None, batch.num_systems
        if world > 1:
            sums = [totals[t.field].sum.detach() if t.field in totals else 0.0 for t in self.targets]
            mine = torch.tensor([*terms, *sums, systems, float(failure is not None)], dtype=torch.float64, device=device)
            *values, together, failed = add_up(mine).tolist()
            terms, sums, systems = values[: len(terms)], values[len(terms) :], round(together)
            loss = sum(t.weight * value / max(n, 1.0) for t, value, n in zip(self.targets, sums, terms, strict=True))
            failure = first_error(failure) if failed else None
        if failure is not None:
            raise failure
        total = torch.zeros((), dtype=torch.float64, device=device)
        for target, count in zip(self.targets, terms, strict=True):
            if target.field in totals:
                total = total + target.weight * (totals[target.field].sum / max(count, 1.0))
        if stage != "train":
            self.judged[stage].update(torch.ones(batch.num_systems, device=device))  # type: ignore[operator]
            return total
        if systems:
            value = total.detach() if loss is None else torch.tensor(loss, dtype=torch.float64, device=device)
            self.log("train/loss", value, batch_size=systems, on_step=False, on_epoch=True, sync_dist=world > 1)
        return touched(total if world == 1 else world * total, self._learning())

    def _learning(self) -> list[Tensor]:
        """The parameters that learn something from the targets."""
        return [parameter for parameter in self._asked if parameter.requires_grad]

    @functools.cached_property
    def _asked(self) -> list[Tensor]:
        """Parameters on which a target depends; listing them takes longer than a small batch."""
        idle = set(self._ddp_params_and_buffers_to_ignore)
        return [parameter for name, parameter in self.named_parameters() if name not in idle]

    def _totals(self, batch: AtomicData, stage: str) -> dict[str, Total]:
        """Losses of the labels that a batch has, by field.

        Raises:
            InputError: they are not finite; names the frames.
        """
        if not batch.num_systems:
            return {}
        if stage == "train" and self.denoising is not None:
            batch = self.denoising.apply(batch, self.potential.graphs, self.global_step, self.global_rank)
        predictions = self.potential(batch)
        seen = None if stage == "train" else self._seen(batch, stage)
        totals: dict[str, Total] = {}
        for target in self.targets:
            comparison = target.compare(predictions, batch)
            if comparison is None:
                continue
            comparison = comparison if seen is None else comparison.of(seen)
            scale = self._row_scale(target, comparison, batch) if target.scaled or (stage != "train" and target.columns > 1) else None
            totals[target.field] = target.total_of(comparison, scale)
            if stage != "train":
                self.metrics[stage][target.field].add(comparison, scale, totals[target.field])  # type: ignore[index]
        loss = sum(target.weight * totals[target.field].mean.detach() for target in self.targets if target.field in totals)
        if not torch.isfinite(torch.as_tensor(loss)):
            raise self._not_finite(float(loss), predictions, batch, stage)
        return totals

    def _seen(self, batch: AtomicData, stage: str) -> Tensor:
        """Mask (systems,) of the structures without elements that the model has not been trained on; the others cannot be judged."""
        tables = torch.zeros(len(self.potential.datasets), 119, dtype=torch.bool)
        for dataset in range(len(tables)):
            tables[dataset, sorted(self.potential.elements(dataset))] = True
        known = tables.to(batch.numbers.device)[batch.dataset[batch.batch], batch.numbers]
        seen = torch.ones(batch.num_systems, dtype=torch.bool, device=known.device)
        seen[batch.batch[~known]] = False
        if not seen.all() and stage not in self._told:
            self._told.add(stage)
            first = int(torch.nonzero(~seen)[0])
            elements = ", ".join(symbols(batch.numbers[(batch.batch == first) & ~known].tolist()))
            log.warning(
                "matfound: structure '%s' of the %s set has %s, which no training structure of '%s' has; such structures are left out",
                names(batch)[first], stage, elements, self.potential.datasets[int(batch.dataset[first])],
            )  # fmt: skip
        return seen

    def _not_finite(self, loss: float, predictions: dict[str, Tensor], batch: AtomicData, stage: str) -> InputError:
        """The error that names the structures whose predictions are not finite, or else all of the batch."""
        bad: set[int] = set()
        for target in self.targets:
            comparison = target.compare(predictions, batch)
            if comparison is not None:
                rows = comparison.prediction.unsqueeze(-1).flatten(1)
                bad |= set(comparison.system[~torch.isfinite(rows).all(1)].tolist())
        for system in sorted(bad):
            unseen = set(batch.numbers[batch.batch == system].tolist()) - self.potential.elements(int(batch.dataset[system]))
            if unseen:
                what = ", ".join(symbols(unseen))
                return InputError(
                    f"structure '{names(batch)[system]}' of the training data has {what}, which the model has not seen",
                    remedy="fit the scales (model.fit_scales: true), or leave such structures out",
                )
        shown = [names(batch)[i] for i in sorted(bad or range(batch.num_systems))]
        frames = ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
        return InputError(
            f"the {stage} loss became {loss} at step {self.global_step} on the frames {frames}",
            remedy="lower the learning rate, clip gradients, or check these labels",
        )

    def training_step(self, batch: AtomicData, batch_idx: int) -> Tensor:
        """Sum of the weighted losses.

        Raises:
            InputError: the loss is not finite; names the frames.
        """
        return self._step(batch, "train")

    def validation_step(self, batch: AtomicData, batch_idx: int) -> None:
        """Loss and metrics."""
        self._step(batch, "val")

    def test_step(self, batch: AtomicData, batch_idx: int) -> None:
        """Loss and metrics."""
        self._step(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the whole set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the whole set."""
        self._log_metrics("test")

    def _log_metrics(self, stage: str) -> None:
        """The loss as if the whole set were one batch, and every metric."""
        options: dict[str, Any] = {"sync_dist": True} if world_size() > 1 else {}
        judged = self.judged[stage].mean()  # type: ignore[operator]
        loss = torch.zeros((), dtype=torch.float64)
        for target in self.targets:
            metrics: TargetMetrics = self.metrics[stage][target.field]  # type: ignore[index]
            if (mean := metrics.mean_loss()) is not None:
                loss = loss.to(mean.device) + target.weight * mean
            for name, value in metrics.results().items():
                self.log(f"{stage}/{target.field}_{name}", value, **options)
            metrics.reset()
        if judged is not None:
            self.log(f"{stage}/loss", loss.to(judged.device), **options)
        self.judged[stage].reset()  # type: ignore[operator]

    def configure_optimizers(self) -> Any:
        """Optimizer, and its schedule by step.

        Raises:
            InputError: they refuse their arguments, or the schedule depends on a length that the run does not have.
        """
        try:
            optimizer = self.make_optimizer(self._groups())
            scheduler = None if self.make_scheduler is None else self.make_scheduler(optimizer)
        except (ValueError, TypeError) as error:
            raise InputError(f"the optimizer or its schedule cannot be made: {error}", remedy="check model.optimizer") from error
        if scheduler is None:
            return optimizer
        if isinstance(scheduler, ReduceLROnPlateau):
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler} | self._plateau()}
        if hasattr(scheduler, "set_total_steps"):
            scheduler.set_total_steps(self.total_steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _plateau(self) -> dict[str, Any]:
        """When a plateau is looked for, and in what: after every validation, or without one after every epoch, in the training loss."""
        trainer = self.trainer
        if not trainer.limit_val_batches or not len(trainer.datamodule.frames("val")):  # type: ignore[attr-defined]
            return {"interval": "epoch", "frequency": 1, "monitor": "train/loss"}
        every = trainer.val_check_interval
        if every == 1.0 or trainer.check_val_every_n_epoch != 1:
            return {"interval": "epoch", "frequency": trainer.check_val_every_n_epoch or 1, "monitor": "val/loss"}
        frequency = every if isinstance(every, int) else max(1, int(self._batches() * every))
        return {"interval": "step", "frequency": frequency, "monitor": "val/loss"}

    def _groups(self) -> list[Any]:
        """The parameters to train; in two groups where some have no weight decay."""
        named = {name: p for name, p in self.potential.named_parameters() if p.requires_grad}
        kept = {name for pattern in self.no_decay for name in fnmatch.filter(named, pattern)}
        for pattern in self.no_decay:
            if not fnmatch.filter(named, pattern):
                raise InputError(f"model.no_decay: no parameter is named '{pattern}'", remedy=nearest(pattern, named))
        if not kept:
            return list(named.values())
        groups = [[p for name, p in named.items() if (name in kept) == without] for without in (False, True)]
        return [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]

    def total_steps(self) -> int:
        """Optimizer steps of the whole run; from the first epoch's batches, so that a resumed run gets the same number.

        Raises:
            InputError: the run has no end in steps or epochs.
        """
        trainer = self.trainer
        limit = trainer.max_steps if trainer.max_steps > 0 else None
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            if limit is None:
                raise InputError("the schedule needs to know how long the run is", remedy="set trainer.max_epochs or trainer.max_steps")
            return limit
        steps = -(-self._batches() // trainer.accumulate_grad_batches) * trainer.max_epochs
        return max(1, steps if limit is None else min(steps, limit))

    def _batches(self) -> int:
        """Training batches of the first epoch."""
        batches: int = self.trainer.datamodule.batches_per_epoch()  # type: ignore[attr-defined]
        share = self.trainer.limit_train_batches
        return min(batches, share) if isinstance(share, int) else int(batches * share)


def _check(target: Target, potential: Potential) -> None:
    """Refuse a target that no head predicts, or another kind of head than its loss needs."""
    if target.field not in potential.outputs:
        raise InputError(f"no head of the model predicts the target '{target.field}'", remedy=nearest(target.field, potential.outputs))
    target.check()
    head = next(head for head in potential.heads.values() if target.field in head.outputs)  # type: ignore[operator]
    if (target.loss == "bce" and isinstance(head, ClassHead)) or (target.loss == "cross_entropy" and isinstance(head, BinaryHead)):
        wanted = "bce" if isinstance(head, BinaryHead) else "cross_entropy"
        raise InputError(f"target '{target.field}': the loss '{target.loss}' does not suit a {type(head).__name__}", remedy=f"use {wanted}")
    ranked = {"auroc", "ap"} & set(target.metrics or ())
    if isinstance(head, ClassHead) and head.classes != 2 and ranked:
        raise InputError(f"target '{target.field}': {min(ranked)} is for two classes, the head has {head.classes}", remedy="use accuracy")


def names(batch: AtomicData) -> list[str]:
    """What to call the structures of a batch."""
    known = list(batch["id"]) if "id" in batch else [""] * batch.num_systems
    return [name or f"number {i} of the batch" for i, name in enumerate(known)]


def symbols(numbers: Iterable[int]) -> list[str]:
    """Symbols of atomic numbers, each once."""
    from ase.data import chemical_symbols

    return [chemical_symbols[number] for number in sorted(set(numbers))]
