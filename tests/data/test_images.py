"""Images: which are read, how they are cut, in which order; exact resume; errors."""

import json
import os
import zipfile
from pathlib import Path

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from PIL import Image

from hope_jax.data import images, stream
from hope_jax.data.images import BatchConfig, Images


class Records:
    """A source as TFDS gives it: uint8[4, 4, 1] filled with its index."""

    def __init__(self, count=10, classes=3):
        self.count, self.classes = count, classes

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.full((4, 4, 1), index, np.uint8)
        return {"image": pixels, "label": index % self.classes, "id": index}


def some(count=10, size=4, channels=1):
    return Images(Records(count), classes="abc", size=size, channels=channels)


def which(batch):
    """The indices that images of `Records` came from."""
    return np.round(batch["image"][:, 0, 0, 0] * 255).astype(int).tolist()


def taken(dataset, count):
    iterator = iter(dataset)
    try:
        return [next(iterator) for _ in range(count)]
    finally:
        iterator.close()


def written(root: Path, classes, count, side=(6, 6), suffix="png"):
    """Folders of plain images: class `c` is `40 c + 100` red, image `i` is `i` blue."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.full((*side, 3), (40 * label + 100, 0, i), np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.{suffix}")
    return root


def test_digits_are_all_there_and_parted_in_every_class():
    parts = {split: images.load(split=split) for split in ("train", "valid", "test")}
    assert {split: len(part) for split, part in parts.items()} == {
        "train": 1169,
        "valid": 269,
        "test": 359,
    }
    seen = []
    for part in parts.values():
        records = [part[i] for i in range(len(part))]
        seen += [r["image"].tobytes() + bytes([r["label"]]) for r in records]
        labels = np.bincount([r["label"] for r in records], minlength=10)
        assert labels.min() > 0.9 * labels.mean() and part.classes[7] == "7"
    assert len(seen) == 1797 and len(set(seen)) == 1797
    first = parts["train"][0]
    assert first["image"].shape == (8, 8, 1) and first["image"].dtype == np.float32
    assert first["label"].dtype == np.int32
    assert 0 == first["image"].min() < 0.9 < first["image"].max() <= 1
    assert parts["train"].source.sha256.startswith(
        "235a4e7c"
    )  # the split never changes


def test_a_folder_of_classes(tmp_path):
    root = written(tmp_path / "pets", ["cat", "dog"], 20)
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "dog" / "deep").mkdir()
    (root / "dog" / "19.png").rename(root / "dog" / "deep" / "19.PNG")
    written(root, [".hidden"], 1)
    parts = {
        s: images.load(root, split=s, size=4, channels=3)
        for s in ("train", "valid", "test")
    }
    assert [len(part) for part in parts.values()] == [26, 6, 8]
    found = set()
    for part in parts.values():
        assert part.classes == ("cat", "dog")
        for i in range(len(part)):
            red, green, blue = np.round(part[i]["image"][0, 0] * 255).astype(int)
            assert red == 40 * part[i]["label"] + 100 and green == 0
            found.add((red, blue))
    assert len(found) == 40
    grey = images.load(root, split="test", size=4, channels=1)
    assert grey[0]["image"].shape == (4, 4, 1)
    assert 0.1 < grey[0]["image"].mean() < 0.2  # 100 of red


def test_a_folder_of_splits(tmp_path):
    written(tmp_path / "train", ["a", "b", "c"], 3)
    written(tmp_path / "val", ["a", "c"], 2)
    train = images.load(tmp_path, split="train", channels=3)
    valid = images.load(tmp_path, split="val", channels=3)
    assert (len(train), len(valid)) == (9, 4) and valid.classes == ("a", "b", "c")
    assert [valid[i]["label"] for i in range(4)] == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="'valid' is no sub-folder.*train, val"):
        images.load(tmp_path, split="valid")
    written(tmp_path / "test", ["d"], 1)
    with pytest.raises(ValueError, match="classes that train has not: d"):
        images.load(tmp_path, split="test")


def test_the_middle_square_is_kept(tmp_path):
    pixels = np.zeros((4, 10, 3), np.uint8)
    pixels[:, 3:7] = 200
    (tmp_path / "c").mkdir()
    for i in range(4):
        Image.fromarray(pixels).save(tmp_path / "c" / f"{i}.png")
    part = images.load(tmp_path, split="train", size=4, channels=3)
    np.testing.assert_allclose(part[0]["image"], 200 / 255, atol=0.01)
    source = [{"image": pixels[..., 0], "label": 0}]
    grey = Images(source, classes=["c"], size=4, channels=3)
    np.testing.assert_allclose(grey[0]["image"], 200 / 255, atol=0.01)


class H5TinyPictures(tfds.core.GeneratorBasedBuilder):
    """A set of TFDS as anyone writes one."""

    VERSION = tfds.core.Version("1.0.0")
    pictures: Path

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(names=["no", "yes"]),
        }
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {name: self._generate_examples(name) for name in ("no", "yes")}

    def _generate_examples(self, split):
        for path in sorted((self.pictures / split).iterdir()):
            label = int(path.stem) % 2
            yield path.name, {"image": os.fspath(path), "label": label}


@pytest.fixture
def prepared(tmp_path):
    H5TinyPictures.pictures = written(tmp_path / "pictures", ["no", "yes"], 6)
    builder = H5TinyPictures(data_dir=tmp_path / "tfds", file_format="array_record")
    builder.download_and_prepare()
    return tmp_path / "tfds"


def test_a_set_of_tfds(prepared):
    name = "tfds:h5_tiny_pictures"
    part = images.load(name, split="yes", size=4, channels=3, data_dir=prepared)
    assert len(part) == 6 and part.classes == ("no", "yes") and part.on_disk
    for i in range(6):
        blue = round(float(part[i]["image"][0, 0, 2]) * 255)
        assert part[i]["label"] == blue % 2
    half = images.load(name, split="yes[:50%]", data_dir=prepared)
    assert len(half) == 3
    batch = taken(images.batches(part, BatchConfig(batch=4)), 1)[0]
    assert batch["image"].shape == (4, 4, 4, 3)
    with pytest.raises(ValueError, match="'test' of tfds.*It has no, yes"):
        images.load(name, split="test", data_dir=prepared)


def test_a_set_of_tfds_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="knows no 'never_heard_of'"):
        images.load("tfds:never_heard_of", split="train", data_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match="(?s)'mnist' is not in.*array_record"):
        images.load("tfds:mnist", split="train", data_dir=tmp_path)


def test_an_epoch_holds_every_image_once_and_the_next_another_order():
    dataset = images.batches(some(), BatchConfig(batch=5, seed=1))
    first, second, third, fourth = map(which, taken(dataset, 4))
    assert sorted(first + second) == sorted(third + fourth) == list(range(10))
    assert first + second != third + fourth and first + second != list(range(10))
    plain = images.batches(some(), BatchConfig(batch=5, shuffle=False))
    assert which(taken(plain, 1)[0]) == [0, 1, 2, 3, 4]
    batch = taken(plain, 1)[0]
    assert batch["label"].tolist() == [0, 1, 2, 0, 1]
    assert batch["image"].dtype == np.float32 and batch["label"].dtype == np.int32


def same(a, b):
    for x, y in zip(a, b, strict=True):
        for key in ("image", "label"):
            np.testing.assert_array_equal(x[key], y[key])


@pytest.mark.parametrize("augment", [False, True])
def test_goes_on_at_the_exact_image(augment):
    part = images.load(split="test")
    dataset = images.batches(part, BatchConfig(batch=100, seed=3, augment=augment))
    whole = taken(dataset, 6)
    iterator = iter(dataset)
    for _ in range(2):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    iterator.close()
    again = iter(dataset)
    again.set_state(state)
    same([next(again) for _ in range(4)], whole[2:])
    again.close()


def test_a_crop_is_random_but_of_the_seed(tmp_path):
    ramp = np.tile(np.arange(0, 256, 16, dtype=np.uint8), (16, 1))[..., None]
    source = [{"image": ramp, "label": 0}] * 8
    part = Images(source, classes=["c"], size=16, channels=1)

    def cropped(seed):
        config = BatchConfig(batch=8, seed=seed, augment=True)
        return taken(images.batches(part, config), 1)[0]["image"]

    np.testing.assert_array_equal(cropped(1), cropped(1))
    assert np.abs(cropped(1) - cropped(2)).max() > 0.05
    slopes = cropped(1)[:, 8, 15, 0] - cropped(1)[:, 8, 0, 0]
    assert (slopes > 0).any() and (slopes < 0).any()  # mirrored, some
    assert np.ptp(np.abs(slopes)) > 0.05  # and of several sizes
    np.testing.assert_allclose(np.ptp(cropped(1), axis=1), 0, atol=0.01)  # upright


def test_processes_share_a_batch_and_its_crops():
    part = images.load(split="valid")
    config = BatchConfig(batch=6, seed=2, augment=True)
    whole = taken(images.batches(part, config), 3)
    parts = [
        taken(images.batches(part, config, process_index=i, process_count=2), 3)
        for i in range(2)
    ]
    for step, batch in enumerate(whole):
        for i in range(2):
            np.testing.assert_array_equal(parts[i][step]["image"], batch["image"][i::2])


def test_evaluation_sees_every_image_once():
    groups = list(images.evaluation_batches(some(), 4))
    assert [which(g) for g in groups] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert groups[-1]["mask"].tolist() == [True, True, False, False]
    assert all(g["mask"].all() for g in groups[:-1])
    assert groups[1]["label"].tolist() == [1, 2, 0, 1]
    assert groups[-1]["image"].shape == (4, 4, 4, 1)


def test_another_stream_is_refused():
    config = BatchConfig(batch=5)
    saved = json.loads(json.dumps(images.fingerprint(some(), config)))
    stream.check_fingerprint(saved, images.fingerprint(some(), config))
    for other in (
        images.fingerprint(some(9), config),
        images.fingerprint(some(size=8), config),
        images.fingerprint(some(), BatchConfig(batch=5, seed=1)),
        images.fingerprint(some(), config, process_count=5),
    ):
        with pytest.raises(ValueError, match="not the data of this run"):
            stream.check_fingerprint(saved, other)
    digits = images.load(split="test"), images.load(split="test")
    one, same_again = (images.fingerprint(d, config) for d in digits)
    assert one == same_again and len(one["source"]) == 64


@pytest.mark.parametrize(
    "record, said",
    [
        ({"image": np.zeros((4, 4), np.uint8)}, "has no label, only image"),
        ({"image": np.zeros((4, 4), np.uint8), "label": 3}, r"label 3 .* \[0, 3\)"),
        ({"image": np.zeros((4, 4)), "label": 0}, r"uint8.*got float64\[4, 4\]"),
        ({"image": np.zeros((4, 4, 2), np.uint8), "label": 0}, r"got uint8\[4, 4, 2\]"),
    ],
)
def test_a_bad_record_is_named(record, said):
    part = Images([record], classes="abc", size=4, channels=1)
    with pytest.raises(ValueError, match=said):
        part[0]


def test_bad_files_are_named(tmp_path):
    folder = written(tmp_path / "train", ["c"], 3) / "c"
    (folder / "00.png").write_bytes(b"not a picture")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "01.png")
    part = images.load(tmp_path, split="train")
    for index, said in enumerate(("00.png' is no image", "01.png.*8 bits")):
        with pytest.raises(ValueError, match=said):
            part[index]
    assert part[2]["label"] == 0


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="split of digits must be.*got 'dev'"):
        images.load(split="dev")
    with pytest.raises(FileNotFoundError, match="Did you mean 'digits'"):
        images.load("digit", split="train")
    with pytest.raises(ValueError, match="holds no images"):
        images.load(tmp_path, split="train")
    with pytest.raises(ValueError, match="channels must be 1 or 3, got 4"):
        some(channels=4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        some(size=0)
    with pytest.raises(ValueError, match="holds no image"):
        some(count=0)
    with pytest.raises(ValueError, match="has 10 images, fewer than one batch of 11"):
        images.batches(some(), BatchConfig(batch=11))
    with pytest.raises(ValueError, match=r"batch \(5\) must be a multiple"):
        images.batches(some(), BatchConfig(batch=5), process_count=2)
    with pytest.raises(ValueError, match=r"process_index \(2\)"):
        images.batches(some(), BatchConfig(batch=4), process_index=2, process_count=2)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        images.evaluation_batches(some(), 0)
    for changes, said in (
        ({"batch": 0}, "batch must be"),
        ({"batch": 1, "workers": -1}, "workers must be"),
        ({"batch": 1, "seed": -1}, "seed must lie"),
    ):
        with pytest.raises(ValueError, match=said):
            BatchConfig(**changes)


def test_workers_need_parsed_flags(monkeypatch):
    monkeypatch.setattr(flags, "FLAGS", flags.FlagValues())
    with pytest.raises(ValueError, match="mark_as_parsed"):
        images.batches(some(), BatchConfig(batch=2, workers=1))


def test_workers_read_the_same():
    part = images.load(split="valid")
    config = dict(batch=64, seed=5, augment=True)
    alone = taken(images.batches(part, BatchConfig(**config)), 2)
    dataset = images.batches(part, BatchConfig(**config, workers=1))
    assert isinstance(dataset, grain.IterDataset)
    same(taken(dataset, 2), alone)


def test_real_characters_from_files(tmp_path):
    root = os.environ.get("HOPE_DATA_DIR", Path(__file__).parents[2] / "../shared/data")
    path = Path(root) / "omniglot-small" / "images_background_small1.zip"
    if not path.exists():
        pytest.skip("needs omniglot-small under HOPE_DATA_DIR")
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if "/Balinese/character0" in n]
        archive.extractall(tmp_path, names)
    root = tmp_path / "images_background_small1" / "Balinese"
    part = images.load(root, split="train", size=28)
    assert len(part.classes) == 9 and len(part) == 9 * 13
    pixels = part[0]["image"]
    assert pixels.shape == (28, 28, 1) and pixels.mean() > 0.7 > 0.3 > pixels.min()


def test_splits_of_omniglot_share_no_character():
    root = os.environ.get("HOPE_DATA_DIR", Path(__file__).parents[2] / "../shared/data")
    folder = Path(root) / "omniglot-small"
    if not folder.exists():
        pytest.skip("needs omniglot-small under HOPE_DATA_DIR")
    found = {
        split: images.load("omniglot", split=split, size=14, data_dir=folder)
        for split in images.OMNIGLOT
    }
    sizes = {split: len(part.classes) for split, part in found.items()}
    assert sizes == {"train": 155, "valid": 24, "test": 63}  # Greek and Latin once
    assert len(set().union(*(part.classes for part in found.values()))) == 242
    grouped = images.by_class(found["valid"])
    assert grouped.shape == (24, 20, 14, 14, 1)  # all drawings there are
    assert grouped.mean() > 0.7 > 0.3 > grouped.min()  # black on white


def test_omniglot_says_what_it_needs(tmp_path):
    with pytest.raises(FileNotFoundError, match="small1.zip in data_dir, got None"):
        images.load("omniglot", split="test")
    with pytest.raises(FileNotFoundError, match="needs images_background_small1.zip"):
        images.load("omniglot", split="test", data_dir=tmp_path)
    with pytest.raises(ValueError, match="one of train, valid, test, got 'all'"):
        images.load("omniglot", split="all", data_dir=tmp_path)


def test_images_by_class():
    pixels = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    source = images._InMemory(pixels, np.array([1, 0, 1, 0, 1], np.int32))
    given = images.Images(source, classes=("a", "b"), size=1, channels=1)
    found = np.round(255 * images.by_class(given)[..., 0, 0, 0])
    assert found.tolist() == [[1, 3], [0, 2]]
