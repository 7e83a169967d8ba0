"""Run by test_sampler.py: the same batches under every start method, then wait with live workers to be killed."""

import hashlib
import json
import sys
import time
from pathlib import Path

from datamodules.dataset import SampleDataset
from datamodules.loader import TrainLoader, WorkerConfig
from datamodules.manifest import open_split, read_dataset
from datamodules.order import OrderSpec
from datamodules.reader import ShardReader
from datamodules.sampler import TrainBatchSampler
from datamodules.tasks import CLASSIFICATION
from datamodules.transforms import TrainTransform

TRAIN = TrainTransform(16, crop=False, degrees=10, auto_augment=None, color_jitter=0.3, random_erasing=0.5)


def main(path):
    folder = Path(path)
    index = open_split(folder, read_dataset(folder), "train")
    digests, loaders = [], []
    for start in ("fork", "spawn", "forkserver"):
        dataset = SampleDataset(ShardReader(index), CLASSIFICATION, TRAIN, 10, seed=1)
        sampler = TrainBatchSampler(OrderSpec(1, index.counts, 48))
        loaders.append(TrainLoader(dataset, sampler, WorkerConfig(1, start=start)))
        stream, total = iter(loaders[-1]), hashlib.sha256()
        for _ in range(6):
            batch = next(stream)
            for key in sorted(batch):
                total.update(batch[key].numpy().tobytes())
        digests.append(total.hexdigest())
    workers = [worker.pid for loader in loaders for worker in loader._iterator._workers]
    print(json.dumps({"digests": digests, "workers": workers}), flush=True)
    time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
