"""Images and their classes: digits on every machine, Omniglot, folders, TFDS.

An `Images` is a random-access source of one split, decoded as it is read, so a set may
be larger than memory. `batches` shuffles and groups it for training as
`hope_jax.data.stream` does text: the order depends on the seed alone, and an iterator's
state (a few numbers) goes on at the exact example. Store `fingerprint` with it and call
`hope_jax.data.stream.check_fingerprint` before it is restored.
"""

import dataclasses
import hashlib
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np
from PIL import Image, ImageOps

from hope_jax.core.config import did_you_mean
from hope_jax.data import reading

SUFFIXES = frozenset(".bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp".split())
PARTS = {"valid": 0.15, "test": 0.2}  # of each class; the rest is "train"
OMNIGLOT = {  # split -> alphabets, which no other has
    "train": ("Japanese_(katakana)", "Korean", "Latin", "Sanskrit"),
    "valid": ("Greek",),
    "test": ("Balinese", "Early_Aramaic", "Tagalog"),
}
_MODES = {1: "L", 3: "RGB"}  # channels -> PIL's name
_SPLIT_SEED = 0
_LEAST_AREA = 0.25  # of an image, that a random crop keeps
_THREADS = 8  # that decode files


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How images are ordered, changed and grouped.

    Attributes:
      batch: images of a step, over all processes.
      seed: of the order and the crops; each epoch is shuffled anew from it.
      shuffle: False keeps the order of the source.
      augment: crop a random part (a quarter of the area at least, of a shape between
        3:4 and 4:3) and mirror half of them, as is usual for photographs.
      workers: processes that read ahead; 0 reads in this one. The order is the same
        for any number, and an iterator's state fits any.

    Raises:
      ValueError: a field out of range.
    """

    batch: int
    seed: int = 0
    shuffle: bool = True
    augment: bool = False
    workers: int = 0

    def __post_init__(self):
        for name, least in (("batch", 1), ("workers", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie in [0, 2**32), got {self.seed}.")


class Records(Protocol):
    """What pictures are read from: `{"image": ..., "label": ...}` by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


class Images:
    """One split: `images[i]` is `{"image": float32[S, S, N], "label": int32[]}`.

    Pixels lie in [0, 1]. An image of another shape is cut to its middle square and
    scaled (bicubic, with a filter); colours become grey or the other way round.

    Args:
      source: `source[i]` is `{"image": ..., "label": ...}`: a path, or uint8[H, W] or
        [H, W, 1 or 3], and a number of a class; what `tfds.data_source` gives is one.
      classes: names of the classes.
      size: S, the side.
      channels: N, 1 or 3.
      name: what a log calls it.

    Raises:
      ValueError: `size` or `channels` out of range, or no image.
    """

    def __init__(
        self,
        source: Records,
        *,
        classes: Sequence[str],
        size: int,
        channels: int,
        name: str = "images",
    ):
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        if channels not in _MODES:
            raise ValueError(f"channels must be 1 or 3, got {channels}.")
        if not len(source):
            raise ValueError(f"{name} holds no image.")
        self.source, self.classes, self.name = source, tuple(classes), name
        self.size, self.channels = size, channels

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray | np.int32]:
        return self.decode(self.raw(index))

    def __repr__(self) -> str:
        return f"Images({self.name}, {len(self)} of {len(self.classes)} classes)"

    @property
    def on_disk(self) -> bool:
        return not isinstance(self.source, _InMemory)

    def raw(self, index: int) -> dict[str, Any]:
        """As the source has it, with the label checked."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        record = self.source[index]
        missing = [key for key in ("image", "label") if key not in record]
        if missing:
            raise ValueError(
                f"{self.name} has no {' and no '.join(missing)}, only "
                f"{', '.join(sorted(record))}; images with one class each are needed."
            )
        label = int(record["label"])
        if not 0 <= label < len(self.classes):
            raise ValueError(
                f"label {label} of image {index} of {self.name} lies outside "
                f"[0, {len(self.classes)})."
            )
        return {"image": record["image"], "label": label}

    def decode(
        self, record: dict[str, Any], rng: np.random.Generator | None = None
    ) -> dict[str, np.ndarray | np.int32]:
        """A raw record in its final shape; with `rng` a random crop of it."""
        square = (self.size, self.size)
        picture, label = record["image"], np.int32(record["label"])
        if isinstance(picture, np.ndarray):
            same = picture.shape == (*square, self.channels)
            if same and rng is None and picture.dtype == np.uint8:
                return {"image": _scaled(picture), "label": label}
            picture = _from_array(picture, self.name)
        with _opened(picture) as opened:
            if opened.mode[0] in "IF":  # PIL would cut 16 bits off at 255
                raise ValueError(
                    f"{picture} has pixels of mode {opened.mode!r}; store it with 8 "
                    "bits a channel."
                )
            picture = opened.convert(_MODES[self.channels])
        if rng is None:
            picture = ImageOps.fit(picture, square, Image.Resampling.BICUBIC)
        else:
            box = _random_box(rng, *picture.size)
            picture = picture.resize(square, Image.Resampling.BICUBIC, box=box)
            if rng.random() < 0.5:
                picture = ImageOps.mirror(picture)
        pixels = np.asarray(picture).reshape(*square, self.channels)
        return {"image": _scaled(pixels), "label": label}


def load(
    data: str | os.PathLike = "digits",
    *,
    split: str,
    size: int = 8,
    channels: int = 1,
    data_dir: str | os.PathLike | None = None,
) -> Images:
    """The images that a command line names.

    Args:
      data: one of
        `digits`: scikit-learn's 1,797 handwritten digits, 8 x 8; nothing is downloaded;
        `tfds:NAME`: a set of TensorFlow Datasets with the features `image` and `label`,
        prepared as array records under `data_dir` (TensorFlow is not needed);
        `omniglot`: 242 characters of eight alphabets, 20 drawings of each, black on
        white, from the zip files of its two small background sets
        (github.com/brendenlake/omniglot) in `data_dir`;
        a folder, whose sub-folders are the classes and hold their images at any depth.
      split: `train`, `valid` or `test`. Digits and folders are divided 65 : 15 : 20 in
        each class, always alike; Omniglot by alphabet, so that no split has a class of
        another (`OMNIGLOT`). If the folder has a sub-folder `train`, its
        sub-folders are the splits instead, with the classes below. Of `tfds:NAME` any
        split that it knows, or a part: `train[:98%]`.
      size, channels: of what comes out; see `Images`.
      data_dir: where `tfds:NAME` was prepared, TFDS's own default if None; where the
        files of Omniglot are.

    Raises:
      FileNotFoundError: no such folder, or a set that is not prepared; the message says
        how to.
      ValueError: an unknown split (the message lists them), a folder without classes or
        without images, or another argument out of range.
    """
    data = os.fspath(data)
    if data == "digits":
        source, classes = _digits(split)
    elif data == "omniglot":
        source, classes = _omniglot(split, data_dir)
    elif data.startswith("tfds:"):
        source, classes = _tfds(data.removeprefix("tfds:"), split, data_dir)
    else:
        source, classes = _folder(Path(data).expanduser(), split)
    name = f"{data} ({split})"
    return Images(source, classes=classes, size=size, channels=channels, name=name)


def batches(
    images: Images,
    config: BatchConfig,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> grain.IterDataset:
    """An endless dataset of `{"image": float32[B, S, S, N], "label": int32[B]}`.

    `iter` of it has grain's `get_state` and `set_state`; call `close` on an iterator
    with workers when done. With several processes each reads `batch / process_count`
    images, every `process_count`-th of the common order, so that step `n` sees the same
    images over all of them however many there are.

    Raises:
      ValueError: fewer images than one batch; a batch that the processes cannot share
        equally; workers where absl flags are not parsed.
    """
    if len(images) < config.batch:
        raise ValueError(
            f"{images.name} has {len(images)} images, fewer than one batch of "
            f"{config.batch}. Use a smaller batch."
        )
    reading.check(config, process_index, process_count, "images")
    dataset = grain.MapDataset.source(_Raw(images)).seed(config.seed)
    if config.shuffle:
        dataset = dataset.shuffle()
    dataset = dataset.repeat()
    # Before the processes part, so that a crop does not depend on their number.
    dataset = dataset.random_map(_Decode(images, config.augment))
    dataset = dataset[process_index::process_count]
    threads = _THREADS if images.on_disk else 0
    return reading.batched(dataset, config, process_count, threads)


def evaluation_batches(images: Images, batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Every image once, in order: as `batches`, with `"mask": bool[B]`.

    All batches have `batch` rows; what fills up the last is masked, with label 0.

    Raises:
      ValueError: `batch` below 1.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}.")

    def group(start):
        rows = [images[i] for i in range(start, min(start + batch, len(images)))]
        empty = batch - len(rows)
        pixels = np.stack([row["image"] for row in rows])
        labels = np.array([row["label"] for row in rows], np.int32)
        return {
            "image": np.pad(pixels, ((0, empty), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(labels, (0, empty)),
            "mask": np.arange(batch) < len(rows),
        }

    return (group(start) for start in range(0, len(images), batch))


def by_class(images: Images) -> np.ndarray:
    """`float32[C, D, S, S, N]`: of each class its first D images, as many as the class
    with the fewest has.

    >>> by_class(load("digits", split="test")).shape
    (10, 35, 8, 8, 1)
    """
    rows = [images[i] for i in range(len(images))]
    labels = np.array([row["label"] for row in rows])
    classes = range(len(images.classes))
    count = min(int((labels == label).sum()) for label in classes)
    each = [np.flatnonzero(labels == label)[:count] for label in classes]
    return np.stack([np.stack([rows[i]["image"] for i in of]) for of in each])


def fingerprint(
    images: Images, config: BatchConfig, *, process_count: int = 1
) -> dict[str, int | bool | str]:
    """What an iterator's state belongs to; JSON, to be stored with a checkpoint.

    Of images on disk it knows the names, of others the pixels.
    """
    return {
        **dataclasses.asdict(config),
        "process_count": process_count,
        "images": images.name,
        "count": len(images),
        "size": images.size,
        "channels": images.channels,
        "classes": hashlib.sha256("\n".join(images.classes).encode()).hexdigest(),
        "source": getattr(images.source, "sha256", ""),
    }


class _Raw:
    """What grain reads: records that are not decoded yet."""

    def __init__(self, images: Images):
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._images.raw(index)


class _Decode(grain.transforms.RandomMap):
    def __init__(self, images: Images, augment: bool):
        self._images, self._augment = images, augment

    def random_map(self, element, rng: np.random.Generator):
        return self._images.decode(element, rng if self._augment else None)


class _InMemory:
    """uint8[I, H, W, N] and its labels."""

    def __init__(self, pixels: np.ndarray, labels: np.ndarray):
        self._pixels, self._labels = pixels, labels
        digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
        digest.update(np.ascontiguousarray(labels).data)
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self._pixels[index], "label": self._labels[index]}


class _Files:
    """Paths of images, relative to `root`, and the numbers of their classes."""

    def __init__(self, root: Path, names: Sequence[str], labels: np.ndarray):
        self._root, self._names, self._labels = root, tuple(names), labels
        self.sha256 = hashlib.sha256(os.fsencode("\n".join(names))).hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._root / self._names[index]
        return {"image": path, "label": self._labels[index]}


def _digits(split):
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "data='digits' is in scikit-learn; pip install scikit-learn."
        ) from error
    found: Any = load_digits()  # a tuple only where that is asked for
    pixels = np.round(found.images * (255 / 16)).astype(np.uint8)[..., None]
    chosen = _part("digits", found.target, split)
    source = _InMemory(pixels[chosen], found.target[chosen])
    return source, [str(name) for name in found.target_names]


def _omniglot(split, data_dir):
    if split not in OMNIGLOT:
        raise ValueError(
            f"split of omniglot must be one of {', '.join(OMNIGLOT)}, got {split!r}."
        )
    found: dict[str, list[np.ndarray]] = {}
    have: set[str] = set()  # the sets share Greek and Latin, to the byte
    for number in (1, 2):
        path = Path(data_dir or "") / f"images_background_small{number}.zip"
        if not path.is_file():
            raise FileNotFoundError(
                f"data='omniglot' needs {path.name} in data_dir, got "
                f"{None if data_dir is None else os.fspath(data_dir)!r}; it is in "
                "python/ of github.com/brendenlake/omniglot."
            )
        with zipfile.ZipFile(path) as files:
            drawings = sorted(n for n in files.namelist() if n.endswith(".png"))
            for name in drawings:
                alphabet, character, drawing = Path(name).parts[-3:]
                wanted = alphabet in OMNIGLOT[split] and drawing not in have
                have.add(drawing)
                if wanted:
                    with files.open(name) as file, Image.open(file) as picture:
                        pixels = np.asarray(picture.convert("L"))
                    found.setdefault(f"{alphabet}/{character}", []).append(pixels)
    classes = sorted(found)
    pixels = np.stack([one for name in classes for one in found[name]])[..., None]
    counts = [len(found[name]) for name in classes]
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return _InMemory(pixels, labels), classes


def _folder(root: Path, split: str):
    if not root.is_dir():
        raise FileNotFoundError(
            f"data names no folder: {str(root)!r}.{did_you_mean(root, ['digits'])}"
            " Give 'digits', 'tfds:NAME' or a folder whose sub-folders are classes."
        )
    parted = (root / "train").is_dir()
    if parted:
        splits = _folders(root)
        if split not in splits:
            raise ValueError(
                f"split {split!r} is no sub-folder of {str(root)!r}; it has "
                f"{', '.join(splits)}."
            )
        # A class has one number in all splits, also where one of them lacks it.
        classes = _folders(root / "train")
        strange = sorted(set(_folders(root / split)) - set(classes))
        if strange:
            raise ValueError(
                f"split {split!r} of {str(root)!r} has classes that train has not: "
                f"{', '.join(strange[:3])}."
            )
        root = root / split
    else:
        classes = _folders(root)
    names, labels = [], []
    for label, name in enumerate(classes):
        found = _pictures(root / name)
        names += [path.relative_to(root).as_posix() for path in found]
        labels += [label] * len(found)
    if not names:
        raise ValueError(
            f"data ({str(root)!r}) holds no images in sub-folders, one a class. "
            f"Images end in {', '.join(sorted(SUFFIXES))}."
        )
    labels = np.array(labels, np.int32)
    if not parted:
        chosen = _part(str(root), labels, split)
        names, labels = [names[i] for i in chosen], labels[chosen]
    return _Files(root, names, labels), classes


def _tfds(name, split, data_dir):
    import tensorflow_datasets as tfds

    prepare = (
        'Prepare it once, where there is a network: python -c "import '
        f"tensorflow_datasets as tfds; tfds.builder({name!r}, data_dir="
        f"{None if data_dir is None else os.fspath(data_dir)!r}, "
        "file_format='array_record').download_and_prepare()\"."
    )
    where = "TFDS's default folder" if data_dir is None else repr(os.fspath(data_dir))
    try:
        builder: Any = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(
            f"data: TFDS knows no {name!r}, and none is prepared in {where}; give "
            "data_dir the folder where it is."
        ) from None
    if not builder.is_prepared():
        raise FileNotFoundError(f"data: {name!r} is not in {where}. {prepare}")
    features = dict(builder.info.features.items())
    label = features.get("label")
    if not isinstance(label, tfds.features.ClassLabel):
        raise ValueError(
            f"data: tfds:{name} has no feature 'label' that names a class, only "
            f"{', '.join(features)}."
        )
    try:
        source = builder.as_data_source(split)
    except NotImplementedError:
        raise ValueError(
            f"data: tfds:{name} in {where} is stored as "
            f"{builder.info.file_format.value}, which cannot be read in any order. "
            f"Delete it. {prepare}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"split {split!r} of tfds:{name}: {error} It has "
            f"{', '.join(builder.info.splits)}, and parts such as 'train[:98%]'."
        ) from None
    return source, label.names


def _part(name: str, labels: np.ndarray, split: str) -> np.ndarray:
    """Indices of a split, in order: the same fraction of every class."""
    if split not in ("train", *PARTS):
        raise ValueError(
            f"split of {name} must be train, {' or '.join(PARTS)}, got {split!r}."
        )
    rng = np.random.default_rng(_SPLIT_SEED)
    chosen = []
    for label in np.unique(labels):
        rest = rng.permutation(np.flatnonzero(labels == label))
        of_class = len(rest)
        for part, fraction in PARTS.items():
            count = round(fraction * of_class)
            if part == split:
                chosen.append(rest[:count])
            rest = rest[count:]
        if split == "train":
            chosen.append(rest)
    return np.sort(np.concatenate(chosen))


def _folders(root: Path) -> list[str]:
    hidden = (".", "__")
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and not path.name.startswith(hidden)
    )


def _pictures(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    found = (path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file() and path.name[0] != ".")


def _from_array(pixels: np.ndarray, name: str) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    if pixels.dtype != np.uint8 or not (pixels.ndim == 2 or pixels.shape[-1] == 3):
        raise ValueError(
            f"{name}: an image must be uint8[H, W], [H, W, 1] or [H, W, 3], got "
            f"{pixels.dtype}{list(pixels.shape)}."
        )
    return Image.fromarray(pixels)


def _opened(picture: Image.Image | os.PathLike) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture
    try:
        return Image.open(picture)
    except OSError as error:
        raise ValueError(f"{os.fspath(picture)!r} is no image: {error}.") from None


def _scaled(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32) / np.float32(255)


def _random_box(rng: np.random.Generator, width: int, height: int) -> tuple:
    """Left, top, right, bottom of a part of an image."""
    area = width * height * rng.uniform(_LEAST_AREA, 1.0)
    shape = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
    wide = min(width, np.sqrt(area * shape))
    high = min(height, np.sqrt(area / shape))
    left, top = rng.uniform(0, width - wide), rng.uniform(0, height - high)
    return left, top, left + wide, top + high
