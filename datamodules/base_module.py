"""What the LightningDataModules share: open the data, give every rank its share, resume at the committed batch."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor

from datamodules.dataset import JoinedDataset, SampleDataset
from datamodules.grouping import Grouping
from datamodules.loader import EvalLoader, OnFaults, TrainLoader, WorkerConfig, ignore_faults
from datamodules.mixing import MixtureSpec, augmentation_seeds, training_order
from datamodules.opening import MixtureSource, OpenedData
from datamodules.order import ORDER_VERSION, OrderSpec, check_at_least, check_world, probe_ids
from datamodules.pack import pack
from datamodules.prefetch import Prefetcher, start_prefetch
from datamodules.quarantine import Quarantine, skip_budget
from datamodules.resume import GuardField, Progress
from datamodules.sampler import EvalBatchSampler, TrainBatchSampler
from datamodules.sources import SourceOptions, open_source, source_classes
from datamodules.tasks import Task
from datamodules.transforms import denormalise
from datamodules.types import FaultKind
from datamodules.worker import StartMethod, available_cores

SourceOption = Literal["digits", "digits-recall", "digits-same-different", "digits-counting"]
OnError = Literal["raise", "skip"]
Images = TypeVar("Images", Tensor, list[Tensor])


class PackedDataModule(LightningDataModule):
    """What the data modules of all tasks share; see the one of your task for path and transforms.

    Args:
        task: how samples are understood.
        path: see there.
        train_transform: see there.
        eval_transform: see there.
        batch_size: samples in one forward pass over all ranks together.
        eval_batch_size: the same for evaluation, at most; batch_size if null.
        num_workers: loading processes per rank, at most its cores; 0 loads in the training process.
        seed: of order and augmentation.
        lanes: parts of the data that every batch draws from alike; must divide batch_size / repeats.
        window: samples of a lane that are shuffled together; more mixes better and opens more shards.
        repeats: copies of each sample in a batch, differently augmented; epochs keep their number of batches.
        sources: packs the embedded handwritten digits, scenes or grids of them, into path if that does not exist.
        worker_start: how workers start; forkserver is safe beside threads and GPUs.
        timeout_s: seconds to wait for a worker's batch before the run stops and names the sample it hangs at.
        worker_memory_gib: memory a worker may take beyond what it starts with; one that needs more stops the run,
            naming the sample. Null: no limit.
        on_error: what to do with a sample whose bytes are damaged, that does not decode, breaks a limit or has an
            annotation that does not fit: "raise" stops the run; "skip" gives it weight 0 and lists it in
            quarantine.jsonl.
        max_skipped: different samples that may be skipped before the run stops: a number, or below 1 a share of the
            training samples.
        quarantine_dir: folder of quarantine.jsonl, shared by all ranks; the run directory if null.
        allow_changed: what may differ from a resumed checkpoint's run. The stream then goes on at the same number of
            batches in the new order: samples of the epoch under way come twice or not at all, later ones are exact.
        cache_dir: local folder for the shards of a URL, shared by all runs on a node; null: in the temporary folder.
        cache_gib: the most that they take there; shards unused for longest make room.

    Raises:
        DataError: from setup on, in one line with the mend, for a dataset or a setting that cannot work.
    """

    guarded: ClassVar[tuple[GuardField, ...]] = ("seed", "lanes", "window", "batch_size", "repeats")
    """Options that the training order depends on."""

    def __init__(
        self,
        task: Task,
        path: str | list[MixtureSource],
        train_transform: Any,
        eval_transform: Any,
        batch_size: int = 256,
        eval_batch_size: int | None = None,
        num_workers: int = 4,
        seed: int = 0,
        lanes: int = 8,
        window: int = 8000,
        repeats: int = 1,
        sources: SourceOption | None = None,
        worker_start: StartMethod = "forkserver",
        timeout_s: float = 600.0,
        worker_memory_gib: float | None = None,
        on_error: OnError = "raise",
        max_skipped: float = 0.001,
        quarantine_dir: str | None = None,
        allow_changed: list[GuardField] | None = None,
        cache_dir: str | None = None,
        cache_gib: float = 50.0,
    ) -> None:
        super().__init__()
        self.task = task
        self.opened = OpenedData(path, task.name, cache_dir, cache_gib)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.seed = seed
        self.lanes = lanes
        self.window = window
        self.repeats = repeats
        self.train_transform = train_transform
        self.eval_transform = eval_transform
        self.sources = sources
        self._loading = WorkerConfig(num_workers, 2, timeout_s, worker_start, memory_gib=worker_memory_gib)
        self.on_error = on_error
        self.max_skipped = max_skipped
        self.quarantine_dir = quarantine_dir
        self.allow_changed = allow_changed or []
        self._quarantine: Quarantine | None = None
        self._progress = Progress()
        self._loaders: list[TrainLoader | EvalLoader | Prefetcher] = []

    @property
    def class_names(self) -> list[str]:
        """Names by class id, for detection by label - 1; known before prepare_data, so that a model can be built.

        Empty for a plain folder of images: only a checkpoint knows the names then.
        """
        known = source_classes(self.sources, self.task.name) if self.sources and not self.opened.is_there else None
        return self.opened.class_names if known is None else known

    @property
    def num_classes(self) -> int:
        """Number of classes, for detection without the background; 0 for a plain folder of images."""
        return len(self.class_names)

    @property
    def dataset_digest(self) -> str:
        """SHA-256 that two datasets share only if their shards and classes are the same."""
        return self.opened.digest

    @property
    def order(self) -> OrderSpec | MixtureSpec:
        """What the training order depends on."""
        counts, weights = [index.counts for index in self.opened.split("train")], self.opened.weights
        return training_order(self.seed, counts, weights, self.batch_size, self.lanes, self.window, self.repeats)

    @property
    def batches_per_epoch(self) -> int:
        """Global batches of a training epoch."""
        return self.order.batches_per_epoch

    def prepare_data(self) -> None:
        """Pack the embedded source if asked to and not yet there; runs on one rank of every node."""
        if self.sources is not None and not self.opened.is_there:
            pack(open_source(self.sources, SourceOptions(task=self.task.name)), str(self.opened.folder))

    def setup(self, stage: str) -> None:
        """Check the settings and open the splits of a stage: "fit", "validate", "test" or "predict"."""
        self._check_settings()
        self.opened.require_packed(stage)
        for split in self._splits(stage):
            self.opened.readers(split)
        if stage == "fit":
            check_world(self.order.batch_size, self._place()[1])

    def train_dataloader(self) -> TrainLoader:
        """The training stream of this rank; its length is the number of global batches of an epoch."""
        self._progress.hand_over(self.trainer, self._guard(), self.allow_changed, self.batches_per_epoch)
        position = partial(self._progress.position, self.trainer)
        committed = partial(self._progress.committed, self.trainer)
        dataset = self._dataset("train", self.train_transform)
        sampler = TrainBatchSampler(self.order, *self._place(), committed(), self._grouping())
        loader = TrainLoader(dataset, sampler, self._workers(), position, self._on_faults("train"))
        ranks, indexes = getattr(self.trainer, "num_devices", 1), self.opened.split("train")
        self._loaders += [loader, *start_prefetch(indexes, sampler, committed, ranks)]
        return loader

    def val_dataloader(self) -> EvalLoader:
        """Every validation sample once over all ranks."""
        return self._eval_loader("val")

    def test_dataloader(self) -> EvalLoader:
        """Every sample of the test split once over all ranks; of the validation split if there is no test split."""
        return self._eval_loader(self._test_split())

    def predict_dataloader(self) -> EvalLoader:
        """The same samples as test_dataloader; of a plain folder all images, sorted by name."""
        return self.test_dataloader()

    def teardown(self, stage: str) -> None:
        """Stop all workers."""
        while self._loaders:
            self._loaders.pop().close()

    def on_exception(self, exception: BaseException) -> None:
        """Stop all workers; Lightning skips teardown then."""
        self.teardown("exception")

    def probe_batch(self, count: int = 64) -> Any:
        """A batch in its evaluation form: the same validation samples on every rank and at every call.

        Args:
            count: samples wanted, spread evenly over the split; fewer if it has fewer.
        """
        dataset = self._dataset("val", self.eval_transform)
        return self.task.collate([dataset[sample] for sample in probe_ids(len(dataset), count).tolist()])

    def image_name(self, sample: int) -> str:
        """Key of a sample that predict gives, in a plain folder the image's name below it."""
        return self._predicted.name(sample)

    def picture(self, sample: int) -> NDArray[np.uint8]:
        """The image of a sample that predict gives as it is stored: pixels (H, W, 3), uint8.

        Raises:
            CorruptSampleError: it cannot be read or decoded.
        """
        return np.array(self._predicted.picture(sample))

    def denormalise(self, images: Images) -> Images:
        """Turn a batch's images, a stack (..., 3, H, W) or a list of (3, H, W), back into pictures in [0, 1]."""
        restore = partial(denormalise, mean=self.eval_transform.mean, std=self.eval_transform.std)
        return restore(images) if isinstance(images, Tensor) else [restore(image) for image in images]

    def skipped_counts(self) -> dict[FaultKind, int]:
        """Different samples skipped so far in this run by kind; empty where bad samples are errors."""
        return {} if self._quarantine is None else self._quarantine.counts()

    def source_counts(self) -> dict[str, int]:
        """Training samples that each dataset of a mixture has given since step 0; empty without a mixture."""
        order = self.order
        if isinstance(order, OrderSpec):
            return {}
        return dict(zip(self.opened.names, order.samples_given(self._progress.committed(self.trainer)), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Global batches the trainer has trained on since step 0, and what the order depends on."""
        return {"committed": self._progress.committed(self.trainer), "guard": self._guard()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember a checkpoint's position; it is checked when training data is asked for."""
        self._progress.restored = dict(state_dict)

    def _check_settings(self) -> None:
        """Find out now what would otherwise fail in a worker, minutes later."""
        check_at_least(1, eval_batch_size=self.eval_batch_size)
        self._loading.check()
        check_at_least(0, max_skipped=self.max_skipped)
        self.task.train_pipeline(self.train_transform)
        self.task.eval_pipeline(self.eval_transform)

    def _guard(self) -> dict[str, int | str]:
        settings: dict[str, int | str] = {name: getattr(self, name) for name in self.guarded}
        return {**settings, "order_version": ORDER_VERSION, "dataset_digest": self.dataset_digest}

    def _splits(self, stage: str) -> list[str]:
        if stage == "fit":
            return ["train", *(split for split in ("val",) if split in self.opened.splits)]
        return ["val"] if stage == "validate" else [self._test_split()]

    def _test_split(self) -> str:
        return "test" if "test" in self.opened.splits else "val"

    def _grouping(self) -> Grouping | None:
        return None  # a task may have a reason to keep samples together

    @cached_property
    def _predicted(self) -> SampleDataset | JoinedDataset:
        return self._dataset(self._test_split(), self.eval_transform)

    def _dataset(self, split: str, transform: Any) -> SampleDataset | JoinedDataset:
        readers, skips = self.opened.readers(split), self.on_error == "skip"
        seeds = augmentation_seeds(self.order) if split == "train" else [0] * len(readers)
        rows = zip(readers, seeds, strict=True)
        parts = [SampleDataset(reader, self.task, transform, self.num_classes, seed, skips) for reader, seed in rows]
        return parts[0] if len(parts) == 1 else JoinedDataset(parts)

    def _eval_loader(self, split: str) -> EvalLoader:
        dataset = self._dataset(split, self.eval_transform)
        sampler = EvalBatchSampler(len(dataset), self.eval_batch_size, *self._place())
        loader = EvalLoader(dataset, sampler, self._workers(), self._on_faults(split))
        self._loaders.append(loader)
        return loader

    def _on_faults(self, split: str) -> OnFaults:
        if self.on_error == "raise":
            return ignore_faults  # never called: an error came instead
        if self._quarantine is None:
            root = "." if self.trainer is None else self.trainer.default_root_dir
            budget = skip_budget(self.max_skipped, self.opened.num_samples("train"))
            self._quarantine = Quarantine(Path(self.quarantine_dir or root), budget)
        return partial(self._quarantine.add, split)

    def _workers(self) -> WorkerConfig:
        on_gpu = torch.cuda.is_available() and (not self.trainer or self.trainer.strategy.root_device.type == "cuda")
        most = min(self._loading.num_workers, available_cores())
        return replace(self._loading, num_workers=most, pin_memory=on_gpu, rank=self._place()[0])

    def _place(self) -> tuple[int, int]:
        """This process's rank, and the number of ranks."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)
