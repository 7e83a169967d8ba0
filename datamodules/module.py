"""The LightningDataModule: opens a packed dataset, gives every rank its share, and resumes at the committed batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules.collate import collate_classification
from datamodules.dataset import ClassificationDataset
from datamodules.index import ShardIndex
from datamodules.loader import EvalLoader, StartMethod, TrainLoader, WorkerConfig, available_cores
from datamodules.manifest import DatasetInfo, open_split, read_dataset
from datamodules.order import ORDER_VERSION, OrderSpec, check_at_least, check_world, probe_ids
from datamodules.pack import pack
from datamodules.resume import align_counters, epoch_batches, trained_batches
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.sources import source_classes
from datamodules.transforms import EvalTransform, TrainTransform, denormalise, eval_pipeline, train_pipeline
from datamodules.types import ClassificationBatch, DataError

SourceOption = Literal["digits"]

IMAGENET_TRAIN = TrainTransform()
IMAGENET_EVAL = EvalTransform()


class ClassificationDataModule(LightningDataModule):
    """Image classification from a folder of indexed shards.

    The order of samples depends on seed, lanes, window, batch_size, repeats and the dataset, not on the number of ranks
    or workers. A resumed run goes on with the sample after the last one trained on.

    Args:
        path: folder with dataset.json and train/, val/ and perhaps test/ shards.
        batch_size: samples in one forward pass over all ranks together.
        eval_batch_size: the same for evaluation, at most; batch_size if null.
        num_workers: loading processes per rank, at most its cores; 0 loads in the training process.
        seed: of order and augmentation.
        lanes: parts of the data that every batch draws from alike; must divide batch_size / repeats.
        window: samples of a lane that are shuffled together; more mixes better and opens more shards.
        repeats: copies of each sample in a batch, differently augmented; epochs keep their number of batches.
        train_transform: training augmentation.
        eval_transform: evaluation transform.
        sources: "digits" packs the embedded handwritten digits into path if that does not exist.
        worker_start: how workers start; forkserver is safe beside threads and GPUs.
        timeout_s: seconds to wait for a batch before the run stops with an error.

    Raises:
        DataError: from setup on, in one line with the mend, for a dataset or a setting that cannot work.
    """

    def __init__(
        self,
        path: str,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
        lanes: int = 8,
        window: int = 8000,
        repeats: int = 1,
        train_transform: TrainTransform = IMAGENET_TRAIN,
        eval_transform: EvalTransform = IMAGENET_EVAL,
        sources: SourceOption | None = None,
        worker_start: StartMethod = "forkserver",
        timeout_s: float = 600.0,
    ) -> None:
        super().__init__()
        self.path = Path(path)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.repeats = repeats
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.sources = sources
        self.worker_start: StartMethod = worker_start
        self.timeout_s = timeout_s
        self._info: DatasetInfo | None = None
        self._indexes: dict[str, ShardIndex] = {}
        self._restored: dict[str, Any] | None = None
        self._loaders: list[TrainLoader | EvalLoader] = []

    @property
    def info(self) -> DatasetInfo:
        """dataset.json, read once."""
        if self._info is None:
            self._info = read_dataset(self.path)
        return self._info

    @property
    def class_names(self) -> list[str]:
        """Names by class id; known before prepare_data, so that a model can be built for them."""
        known = source_classes(self.sources) if self.sources and not _occupied(self.path) else None
        return self.info.class_names if known is None else known

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def dataset_digest(self) -> str:
        """SHA-256 that two datasets share only if their shards and classes are the same."""
        return self.info.digest

    @property
    def order(self) -> OrderSpec:
        """What the training order depends on."""
        counts = self._index("train").counts
        return OrderSpec(self.seed, counts, self.batch_size, self.lanes, self.window, self.repeats)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of a training epoch."""
        return self.order.batches_per_epoch

    def prepare_data(self) -> None:
        """Pack the embedded source if asked to and not yet there; runs on one rank of every node."""
        if self.sources is not None and not _occupied(self.path):
            pack(self.sources, str(self.path))

    def setup(self, stage: str) -> None:
        """Check the settings and open the splits of a stage: "fit", "validate", "test" or "predict"."""
        self._check_settings()
        for split in self._splits(stage):
            self._index(split)
        if stage == "fit":
            check_world(self.order.batch_size, self._world())

    def train_dataloader(self) -> TrainLoader:
        """The training stream of this rank; its length is the number of global batches of an epoch."""
        self._check_restored()
        dataset = ClassificationDataset(self._index("train"), self.train_transform, self.num_classes, self.seed)
        sampler = TrainBatchSampler(self.order, self._rank(), self._world(), self._committed())
        loader = TrainLoader(dataset, sampler, self._workers(), self._position)
        self._loaders.append(loader)
        return loader

    def val_dataloader(self) -> EvalLoader:
        """Every validation sample once over all ranks."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Every sample of the test split once over all ranks; of the validation split if there is no test split."""
        return self._eval_loader(self._test_split())

    def predict_dataloader(self) -> EvalLoader:
        """The same samples as test_dataloader."""
        return self._eval_loader(self._test_split())

    def teardown(self, stage: str) -> None:
        """Stop all workers."""
        while self._loaders:
            self._loaders.pop().close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop all workers; Lightning skips teardown then."""
        self.teardown("exception")

    def probe_batch(self, count: int = 64) -> ClassificationBatch:
        """The same few validation samples on every rank and at every call, spread evenly over the split.

        Args:
            count: samples wanted; fewer if the split has fewer.
        """
        dataset = self._eval_dataset("val")
        return collate_classification([dataset[sample] for sample in probe_ids(len(dataset), count).tolist()])

    def denormalise(self, images: Tensor) -> Tensor:
        """Turn batch images (B, 3, H, W) back into pictures in [0, 1]."""
        return denormalise(images, self.eval_transform.mean, self.eval_transform.std)

    def state_dict(self) -> dict[str, Any]:
        """Global batches the trainer has trained on since step 0, and what the order depends on."""
        return {"committed": self._committed(), "guard": self._guard()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's position; it is checked when training data is asked for."""
        self._restored = dict(state_dict)

    def _check_settings(self) -> None:
        """Find out now what would otherwise fail in a worker, minutes later."""
        check_at_least(1, eval_batch_size=self.eval_batch_size)
        check_at_least(0, num_workers=self.num_workers, timeout_s=self.timeout_s)
        train_pipeline(self.train_transform)
        eval_pipeline(self.eval_transform)

    def _guard(self) -> dict[str, int | str]:
        return {
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
            "batch_size": self.batch_size,
            "repeats": self.repeats,
            "order_version": ORDER_VERSION,
            "dataset_digest": self.dataset_digest,
        }

    def _check_restored(self) -> None:
        """Refuse a checkpoint of another order: its position would mean other samples."""
        if self._restored is None:
            return
        for name, now in self._guard().items():
            then = self._restored["guard"].get(name)
            if then != now:
                raise DataError(
                    f"the checkpoint was written with data.{name} {then}, this run has {now}; "
                    "resume with the same value or start a new run"
                )
        if self.trainer is not None:
            self._hand_over(self.trainer, int(self._restored["committed"]))

    def _hand_over(self, trainer: Trainer, committed: int) -> None:
        """From here on the trainer counts; make sure that it starts from the checkpoint's position."""
        if committed != self._committed():
            raise DataError(
                f"the checkpoint's data position is batch {committed}, its training loop's {self._committed()}; "
                "it was altered, resume from another one"
            )
        align_counters(trainer.fit_loop, epoch_batches(self.batches_per_epoch, trainer.limit_train_batches))
        self._restored = None

    def _committed(self) -> int:
        """Global batches the trainer has finished since step 0; while it has not trained, what was last loaded."""
        trainer = self.trainer
        trained = 0 if trainer is None else trained_batches(trainer.fit_loop)
        if trained or (trainer is not None and trainer.state.fn == TrainerFn.FITTING):
            return trained
        return int(self._restored["committed"]) if self._restored else 0

    def _position(self) -> int | None:
        """Where the training stream must be now; None without a trainer: go on."""
        if self.trainer is None:
            return None
        overfit = getattr(self.trainer, "overfit_batches", 0) > 0  # asks for the same batches in every epoch
        return 0 if overfit else self._committed()

    def _index(self, split: str) -> ShardIndex:
        if split not in self._indexes:
            self._indexes[split] = open_split(self.path, self.info, split)
        return self._indexes[split]

    def _splits(self, stage: str) -> list[str]:
        if stage == "fit":
            return ["train", *(split for split in ("val",) if split in self.info.splits)]
        return ["val"] if stage == "validate" else [self._test_split()]

    def _test_split(self) -> str:
        return "test" if "test" in self.info.splits else "val"

    def _eval_dataset(self, split: str) -> ClassificationDataset:
        return ClassificationDataset(self._index(split), self.eval_transform, self.num_classes)

    def _eval_loader(self, split: str) -> EvalLoader:
        dataset = self._eval_dataset(split)
        sampler = EvalBatchSampler(len(dataset), self.eval_batch_size, self._rank(), self._world())
        loader = EvalLoader(dataset, sampler, self._workers())
        self._loaders.append(loader)
        return loader

    def _workers(self) -> WorkerConfig:
        on_gpu = torch.cuda.is_available() and (
            self.trainer is None or self.trainer.strategy.root_device.type == "cuda"
        )
        workers = min(self.num_workers, available_cores())
        return WorkerConfig(workers, timeout_s=self.timeout_s, start=self.worker_start, pin_memory=on_gpu)

    def _rank(self) -> int:
        return 0 if self.trainer is None else self.trainer.global_rank

    def _world(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size


def _occupied(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))
