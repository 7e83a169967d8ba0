"""Small real instances of the published layouts: ImageNet, ADE20K's scene parsing, and MNIST's files."""

import gzip
import io
import struct

import numpy as np
import pytest
from PIL import Image

from datamodules import sources_idx
from datamodules.annotations import parse_class_map
from datamodules.manifest import open_split
from datamodules.pack import pack
from datamodules.reader import ShardReader
from datamodules.sources import SourceOptions, open_source
from datamodules.types import DataError

SYNSETS = ["n01440764", "n02105855", "n09999999"]


def save(path, size=(24, 16), mode="RGB", form=None, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": (3,), "L": (), "CMYK": (4,)}[mode]
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], *channels), dtype=np.uint8)
    Image.fromarray(pixels, mode if mode == "CMYK" else None).save(path, format=form)


def packed(source, folder, out, **options):
    """Every sample's fields by split and key."""
    info = pack(open_source(source, SourceOptions(str(folder), **options)), str(out))
    found = {}
    for split in info.splits:
        reader = ShardReader(open_split(out, info, split))
        raw = [reader.read(i, reader.index.extensions) for i in range(len(reader.index))]
        found[split] = {one.key: one.fields for one in raw}
    return info, found


@pytest.fixture
def imagenet(tmp_path):
    root = tmp_path / "imagenet" / "ILSVRC" / "Data" / "CLS-LOC"
    for number, synset in enumerate(SYNSETS):
        for index in range(3):
            save(root / "train" / synset / f"{synset}_{index}.JPEG", seed=number * 3 + index, form="JPEG")
    save(root / "train" / SYNSETS[1] / "n02105855_2933.JPEG", form="PNG")  # the published one is a PNG, too
    save(root / "train" / SYNSETS[2] / "n09999999_cmyk.JPEG", mode="CMYK", form="JPEG")
    for index in range(1, 5):
        save(root / "val" / f"ILSVRC2012_val_{index:08d}.JPEG", seed=20 + index, form="JPEG")
    return tmp_path / "imagenet"


def kaggle(folder):
    (folder / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\n"
        + "".join(f"ILSVRC2012_val_{i:08d},{SYNSETS[i % 3]} 1 2 3 4 {SYNSETS[i % 3]} 5 6 7 8\n" for i in range(1, 5))
    )


def test_imagenet_as_kaggle_publishes_it(imagenet, tmp_path):
    kaggle(imagenet)
    info, found = packed("imagenet", imagenet, tmp_path / "out")
    assert info.class_names[0] == "n01440764 tench, Tinca tinca"
    assert info.class_names[2] == "n09999999"
    assert {key: fields["cls"] for key, fields in found["val"].items()} == {
        f"ILSVRC2012_val_{i:08d}": str(i % 3).encode() for i in range(1, 5)
    }
    assert len(found["train"]) == 11
    root = imagenet / "ILSVRC" / "Data" / "CLS-LOC" / "train"
    for key, fields in found["train"].items():
        assert fields["jpeg"] == (root / f"{key}.JPEG").read_bytes()
        assert SYNSETS[int(fields["cls"])] == key.partition("/")[0]


def test_imagenet_with_a_map_of_class_ids_and_with_synset_folders(imagenet, tmp_path):
    root = imagenet / "ILSVRC" / "Data" / "CLS-LOC"
    (tmp_path / "map.txt").write_text("".join(f"ILSVRC2012_val_{i:08d}.JPEG {i % 3}\n" for i in range(1, 5)))
    info, flat = packed("imagenet", root, tmp_path / "flat", val_labels=str(tmp_path / "map.txt"))
    for index in range(1, 5):
        name = f"ILSVRC2012_val_{index:08d}.JPEG"
        (root / "val" / SYNSETS[index % 3]).mkdir(exist_ok=True)
        (root / "val" / name).rename(root / "val" / SYNSETS[index % 3] / name)
    _, folders = packed("imagenet", root, tmp_path / "folders")
    assert sorted(map(repr, flat["val"].values())) == sorted(map(repr, folders["val"].values()))
    assert list(info.splits) == ["train", "val"]


def test_an_unfit_imagenet_is_refused_with_the_mend(imagenet, tmp_path):
    def refuse(message, **options):
        with pytest.raises(DataError, match=message):
            open_source("imagenet", SourceOptions(str(imagenet), **options))

    refuse("val has no synset folders; say which image is what with --val-labels")
    kaggle(imagenet)
    path = imagenet / "LOC_val_solution.csv"
    path.write_text(path.read_text().replace("ILSVRC2012_val_00000003", "ILSVRC2012_val_00000009"))
    refuse(r"ILSVRC2012_val_00000003.JPEG has no label in the file of --val-labels")
    path.write_text(path.read_text().replace(SYNSETS[0], "n00000001"))
    refuse(r"--val-labels .*LOC_val_solution.csv line 4: .* is not an image name and a synset of train or a class id")
    (tmp_path / "truth.txt").write_text("490\n361\n")
    refuse(r"truth.txt line 1: '490' is not", val_labels=str(tmp_path / "truth.txt"))
    refuse(r"nowhere.txt cannot be read", val_labels="nowhere.txt")
    (imagenet / "ILSVRC" / "Data" / "CLS-LOC" / "train" / "cat").mkdir()
    refuse(r"train/cat is no synset such as n01440764; for other trees use imagefolder")
    with pytest.raises(DataError, match="has no train folder; imagenet needs train/n01440764"):
        open_source("imagenet", SourceOptions(str(tmp_path)))


@pytest.fixture
def ade20k(tmp_path):
    folder = tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for name, count in (("training", 4), ("validation", 2)):
        for index in range(1, count + 1):
            stem = f"ADE_{name[:5].rstrip('i')}_{index:08d}"
            save(folder / "images" / name / f"{stem}.jpg", mode="L" if index == 1 else "RGB", seed=index)
            indices = rng.integers(0, 151, (16, 24), dtype=np.uint8)
            indices[0, :3] = 0, 1, 150
            (folder / "annotations" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(indices).save(folder / "annotations" / name / f"{stem}.png")
    rows = [f"{i}\t0.1\t1\t1\t0\t{'wall' if i == 1 else f'thing {i}'}" for i in range(1, 151)]
    (folder / "objectInfo150.txt").write_text("Idx\tRatio\tTrain\tVal\tStuff\tName\n" + "\n".join(rows) + "\n")
    return folder


def test_ade20k_shifts_its_indices_and_keeps_its_images(ade20k, tmp_path):
    info, found = packed("ade20k", ade20k, tmp_path / "out")
    assert (info.task, info.class_names[0], len(info.class_names)) == ("segmentation", "wall", 150)
    assert {split: len(samples) for split, samples in found.items()} == {"train": 4, "val": 2}
    for key, fields in found["train"].items():
        assert fields["jpg"] == (ade20k / "images" / "training" / f"{key}.jpg").read_bytes()
        indices = np.asarray(Image.open(ade20k / "annotations" / "training" / f"{key}.png")).astype(int)
        class_map = parse_class_map(fields["seg.png"], 150, (24, 16), key)
        assert np.array_equal(class_map, np.where(indices == 0, 255, indices - 1))
        assert class_map[0, :3].tolist() == [255, 0, 149]


def ade_missing(folder):
    (folder / "annotations" / "training" / "ADE_train_00000001.png").unlink()


def ade_index(folder):
    Image.fromarray(np.full((16, 24), 151, np.uint8)).save(folder / "annotations/training/ADE_train_00000001.png")


def ade_size(folder):
    Image.fromarray(np.zeros((8, 24), np.uint8)).save(folder / "annotations/training/ADE_train_00000001.png")


def ade_mode(folder):
    save(folder / "annotations/training/ADE_train_00000001.png")


def ade_names(folder):
    (folder / "objectInfo150.txt").write_text("1\twall\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (ade_missing, r"ADE_train_00000001.png is missing; every image needs its annotation"),
        (ade_index, r"ADE_train_00000001.png has index 151; scene parsing has 0 to 150"),
        (ade_size, r"ADE_train_00000001.png has 24x8 pixels, its image 24x16; restore both"),
        (ade_mode, r"ADE_train_00000001.png has mode RGB; a scene parsing annotation has one 8-bit channel"),
        (ade_names, r"objectInfo150.txt does not list the indices 1 to 150; restore it or remove it"),
    ],
)
def test_an_unfit_ade20k_is_refused_with_the_mend(ade20k, tmp_path, spoil, message):
    spoil(ade20k)
    with pytest.raises(DataError, match=message):
        packed("ade20k", ade20k, tmp_path / "out")
    with pytest.raises(DataError, match="has no images/training; ade20k needs"):
        open_source("ade20k", SourceOptions(str(tmp_path)))


def write_idx(path, array, shape=None, kind=8):
    header = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *(shape or array.shape))
    content = header + array.tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def mnist(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, count, end in (("train", 12, ".gz"), ("t10k", 5, "")):
        write_idx(folder / f"{name}-images-idx3-ubyte{end}", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8))
        write_idx(folder / f"{name}-labels-idx1-ubyte{end}", np.arange(count, dtype=np.uint8) % 4)
    return folder


def test_idx_files_are_packed_pixel_for_pixel(mnist, tmp_path):
    info, found = packed("idx", mnist, tmp_path / "out")
    assert (info.class_names, info.splits["train"].samples, info.splits["val"].samples) == (["0", "1", "2", "3"], 12, 5)
    images = sources_idx.read_idx(mnist / "train-images-idx3-ubyte.gz", 3)
    for key, fields in found["train"].items():
        index = int(key.removeprefix("train-"))
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(fields["png"]))), images[index])
        assert fields["cls"] == str(index % 4).encode()


def idx_bomb(folder):
    """A gigabyte of zeros behind a header that announces 12 images."""
    with gzip.open(folder / "train-images-idx3-ubyte.gz", "wb", compresslevel=1) as stream:
        stream.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", 12, 28, 28))
        for _ in range(64):
            stream.write(bytes(1 << 24))


def idx_giant(folder):
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros((1, 1, 1), np.uint8), (1 << 20, 1 << 10, 1 << 10))


def idx_short(folder):
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros((1, 28, 28), np.uint8), (12, 28, 28))


def idx_floats(folder):
    write_idx(folder / "train-images-idx3-ubyte.gz", np.zeros((1, 28, 28), np.uint8), kind=13)


def idx_cut(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])


def idx_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))


def idx_no_labels(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


def idx_twice(folder):
    write_idx(folder / "train-images-idx3-ubyte", np.zeros((1, 28, 28), np.uint8))


def idx_empty(folder):
    for path in folder.glob("train*"):
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (idx_bomb, r"train-images-idx3-ubyte.gz announces 9408 bytes \(12, 28, 28\) and holds more; restore it"),
        (idx_giant, r"announces 1099511627776 bytes \(1048576, 1024, 1024\); the limit is 2147483648"),
        (idx_short, r"announces 9408 bytes \(12, 28, 28\) and holds only 784; restore it"),
        (idx_floats, r"begins with b'\\x00\\x00\\r\\x03'; an IDX file of bytes in 3 dimensions was expected"),
        (idx_cut, r"train-images-idx3-ubyte.gz cannot be read \(.*\); restore it"),
        (idx_labels, r"has 12 images, train-labels-idx1-ubyte.gz has 11 labels; restore both"),
        (idx_no_labels, r"t10k-labels-idx1-ubyte is missing; t10k-images-idx3-ubyte needs its labels"),
        (idx_twice, r"train-images-idx3-ubyte.gz: which one is train\? leave one in the folder"),
        (idx_empty, r"has no train-images-idx3-ubyte or .gz; idx needs it and the labels"),
    ],
)
def test_an_unfit_idx_folder_is_refused_with_the_mend(mnist, spoil, message):
    spoil(mnist)
    with pytest.raises(DataError, match=message):
        open_source("idx", SourceOptions(str(mnist)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("coco", {"task": "classification"}, "--task classification: coco is packed for detection"),
        ("ade20k", {"task": "detection"}, "--task detection: ade20k is packed for segmentation"),
        ("idx", {"val_labels": "x"}, "--val-labels is for imagenet, not for idx; leave it out"),
        ("idx", {}, "--source idx needs --data, the folder to pack"),
    ],
)
def test_options_that_a_source_does_not_have_are_refused(name, options, message):
    with pytest.raises(DataError, match=message):
        open_source(name, SourceOptions(**options))
