"""The benchmark measures what it says: every reader, stage and number of workers, on the same images."""

import csv
import gc
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader
from datamodules import bench as bench_module
from datamodules.bench import WINDOWS, Rate, bench, measure, rate_table, window_rates
from datamodules.bench_streams import file_batches, our_batches, unpack, webdataset_batches
from datamodules.index import ShardIndex
from datamodules.pack import pack
from datamodules.types import DataError
from lightning_modules import cli

# webdataset leaves the shard it was reading open, for the garbage collector to close
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
STAGES = ("read", "crc", "decode", "augment", "collate")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench") / "digits"
    pack("digits", str(folder), shard_size_mib=0.25)
    return folder


@pytest.fixture(autouse=True)
def collect():
    yield
    gc.collect()


def test_every_reader_and_stage_is_measured_without_workers(dataset):
    rates = measure(dataset, [0], seconds=0.03, batch_size=8, samples=50)
    assert [(rate.stage, rate.reader) for rate in rates] == [
        (stage, reader)
        for stage in STAGES
        for reader in ("mirrorla", "webdataset", "files")
        if stage != "crc" or reader == "mirrorla"
    ]
    assert all(0 < rate.lowest <= rate.samples_per_s <= rate.highest for rate in rates)
    assert all(rate.mb_per_s > 0 for rate in rates)


def test_every_reader_works_in_a_worker(dataset, tmp_path):
    index = ShardIndex(dataset / "train")
    unpack(index, tmp_path, 40)
    streams = [
        our_batches(index, "crc", 1, 8),
        webdataset_batches(index, "read", 1, 8),
        file_batches(tmp_path, "read", 1, 8),
    ]
    for stream in streams:
        assert list(itertools.islice(stream, 3)) == [8, 8, 8]
        stream.close()


def test_plain_files_hold_the_same_bytes(dataset, tmp_path):
    index = ShardIndex(dataset / "train")
    mean = unpack(index, tmp_path, 30)
    files = sorted(tmp_path.glob("*/*.png"), key=lambda path: path.name)
    assert [path.name for path in files] == [f"{i:08d}.png" for i in range(30)]
    assert [path.stat().st_size for path in files] == [index.locate(i).fields["png"].size for i in range(30)]
    assert mean == np.mean([path.stat().st_size for path in files])
    assert [int(path.parent.name) for path in files] == index.labels()[:30].tolist()


def test_windows_take_turns_count_all_samples_and_skip_the_warm_up():
    taken = {0: [], 1: []}
    turns = []

    def batches(place, size):
        for number in itertools.count():
            taken[place].append(number)
            turns.append(place)
            yield size

    rates = window_rates([batches(0, 4), batches(1, 8)], 0.07, warm_up=5)
    assert [len(windows) for windows in rates] == [WINDOWS, WINDOWS]
    assert [place for place, _ in itertools.groupby(turns)] == [0, 1] * WINDOWS
    for place, size in ((0, 4), (1, 8)):
        counted = size * (len(taken[place]) - 5 * WINDOWS)
        assert sum(rates[place]) / WINDOWS == pytest.approx(counted / 0.07, rel=0.2)


def test_the_table_has_a_row_for_each_reader_and_stage():
    rates = [Rate("mirrorla", "read", 0, 100.0, 90.0, 110.0, 1.0), Rate("files", "read", 1, 50.0, 40.0, 60.0, 0.5)]
    table = rate_table(rates)
    assert table.row_count == 2
    assert [column.header for column in table.columns] == ["reader", "stage", "0 workers", "1 workers"]


def test_unusable_options_are_named(dataset, tmp_path):
    with pytest.raises(DataError, match="--workers is 'two'; it must be numbers by commas, such as 0,1,2"):
        bench(str(dataset), workers="two")
    with pytest.raises(DataError, match="does not exist"):
        bench(str(tmp_path / "nothing"))


def test_the_command_prints_its_table(dataset, capsys, monkeypatch):
    monkeypatch.setattr(bench_module, "READERS", ("mirrorla",))
    options = ["--workers", "0", "--seconds", "0.03", "--batch-size", "8", "--samples", "4"]
    assert cli.main(["shards", "bench", str(dataset), *options]) == 0
    printed = capsys.readouterr().out
    assert all(stage in printed for stage in STAGES)


def test_the_images_are_the_same_every_time_and_of_the_size_they_say():
    first = [loader.photograph(np.random.default_rng(3)) for _ in range(2)]
    assert first[0] == first[1]
    rng = np.random.default_rng(0)
    images = [loader.photograph(rng) for _ in range(20)]
    sizes = np.array([Image.open(io.BytesIO(data)).size for data in images])
    assert np.abs(sizes.mean(axis=0) - (500, 400)).max() < 30
    assert 50_000 < np.mean([len(data) for data in images]) < 200_000


def test_the_whole_benchmark_writes_its_results_and_the_index_meets_its_targets(tmp_path):
    arguments = ["--images", "40", "--workers", "0", "--seconds", "0.03", "--scale_shards", "256"]
    assert loader.main([*arguments, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 0
    with (tmp_path / "out" / "loader.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["reader"] for row in rows} == {"mirrorla", "webdataset", "files"}
    assert all(row["commit"] and float(row["samples_per_s"]) > 0 for row in rows)
    with (tmp_path / "out" / "loader_scale.csv").open() as stream:
        figures = {row["figure"]: float(row["value"]) for row in csv.DictReader(stream)}
    assert figures["index open"] < 50
    assert figures["order of one batch, mean"] < 1
    assert figures["seek to any batch"] < 10
    assert figures["memory a sample"] < 150  # 97 at full scale; here the interpreter's own growth counts five times
    assert figures["of it private to the process"] < 50
    assert (tmp_path / "out" / "loader.png").stat().st_size > 5000
    assert not (tmp_path / "data" / "images").exists()
