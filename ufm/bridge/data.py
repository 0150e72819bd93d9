"""Data sets to train on, whole on one device and never downloaded: bundled digits, Gaussian clusters, and readers of local files.

    data.digits()                    scikit-learn's 8 x 8 digits: 1500 balanced ones, 297 to test
    data.clusters((200, 20))         Gaussian clusters
    data.idx(root, "MNIST")          root/MNIST/raw/train-images-idx3-ubyte[.gz] and so on; FashionMNIST, KMNIST alike
    data.cifar(root, classes=10)     root/cifar-10-batches-bin/data_batch_1.bin[.gz] and so on; classes=100: root/cifar-100-binary
    data.subsample(all, ufm.counts.exponential(10, 5000, 100))

Pictures stay uint8 and are standardised when asked for, by each channel's mean and standard deviation over the training set as it was
read: a picture looks the same whichever class counts are then taken, and a sweep over counts changes nothing else.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ufm.arrays import NoDevice, place

Bytes = NDArray[np.uint8]
Index = Tensor | slice | None

IDX_CLASSES = 10
CIFAR = {  # classes -> folder, training files, test files, bytes of labels before each picture (the last of them counts)
    10: ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"], 1),
    100: ("cifar-100-binary", ["train.bin"], ["test.bin"], 2),
}
CIFAR_SHAPE = (3, 32, 32)


@dataclass(frozen=True, eq=False)
class Data:
    """A data set on one device; labels are 0 ... classes - 1 and every class has a training sample.

    inputs (N, ...) of floats, or uint8 pictures (N, C, H, W); labels (N,); test_inputs, test_labels alike, of length 0 without a test set.
    mean, std: what pictures are standardised by, (C, 1, 1); by default those of `inputs`. ValueError for tensors that do not fit.
    """

    name: str
    inputs: Tensor
    labels: Tensor
    classes: int
    test_inputs: Tensor
    test_labels: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None

    def __post_init__(self) -> None:
        for part, inputs, labels in (("", self.inputs, self.labels), ("test_", self.test_inputs, self.test_labels)):
            _check(self.name, part, inputs, labels, self.classes)
            object.__setattr__(self, f"{part}labels", labels.to(torch.int64))
        if self.test_inputs.shape[1:] != self.inputs.shape[1:] or self.test_inputs.dtype != self.inputs.dtype:
            raise ValueError(f"data {self.name!r}: test_inputs are {_kind(self.test_inputs)}, inputs {_kind(self.inputs)}; make them alike")
        if empty := [k for k, n in enumerate(self.counts) if n == 0]:
            raise ValueError(
                f"data {self.name!r}: no training sample of class {empty[0]}; every class of {self.classes} needs at least one"
            )
        if self.inputs.dtype == torch.uint8 and (self.mean is None or self.std is None):
            for name, value in zip(("mean", "std"), _moments(self.inputs), strict=True):
                object.__setattr__(self, name, value)

    @property
    def counts(self) -> list[int]:
        """n_k, class by class."""
        return [int(n) for n in torch.bincount(self.labels, minlength=self.classes).tolist()]

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> Data:
        """The same data on another device, its floats in another precision; NoDevice where this machine has no such device."""
        device = self.inputs.device if device is None else device_named(device)
        named = {name: getattr(self, name) for name in ("inputs", "labels", "test_inputs", "test_labels", "mean", "std")}
        moved = {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in named.items() if x is not None}
        return replace(self, **moved)

    def batch(self, index: Index = None, *, augment: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of the training samples in `index`, all by default, as floats; `augment`, of the same device, varies pictures.

        Variation is a crop at random after 4 pixels of zeros were added on every side, and a flip from left to right with probability 1/2.
        """
        inputs, labels = (self.inputs, self.labels) if index is None else (self.inputs[index], self.labels[index])
        return self._standardised(inputs if augment is None else self._varied(inputs, augment)), labels

    def test(self, index: Index = None) -> tuple[Tensor, Tensor]:
        """(inputs, labels) of the test samples in `index`, all by default, as floats."""
        at = slice(None) if index is None else index
        return self._standardised(self.test_inputs[at]), self.test_labels[at]

    def _standardised(self, inputs: Tensor) -> Tensor:
        return inputs if self.mean is None or self.std is None else (inputs.to(self.mean.dtype) - self.mean) / self.std

    def _varied(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if images.ndim != 4:
            raise ValueError(
                f"data {self.name!r}: inputs are {_kind(images)}, but only pictures (N, C, H, W) can be varied; leave augment out"
            )
        n, channels, height, width = images.shape
        device = images.device
        down, right = torch.randint(9, (2, n, 1), generator=generator, device=device)
        flipped = torch.rand((n, 1), generator=generator, device=device) < 0.5
        rows, columns = torch.arange(height, device=device) + down, torch.arange(width, device=device)
        columns = torch.where(flipped, width - 1 - columns, columns) + right
        wide = torch.nn.functional.pad(images, (4, 4, 4, 4))
        sample, channel = torch.arange(n, device=device)[:, None, None, None], torch.arange(channels, device=device)[:, None, None]
        return wide[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def device_named(device: str | torch.device) -> torch.device:
    """The torch device of that name; NoDevice where this machine has none."""
    if str(device) == "numpy":
        raise NoDevice("device 'numpy' trains no network; use 'cpu' or 'cuda'")
    try:
        known = torch.device(str(device)).type != "meta"  # which holds no numbers
    except RuntimeError:
        known = False
    if not known:
        raise NoDevice(f"device {str(device)!r} is none to train on; use 'cpu' or 'cuda'")
    return torch.device(place(np.zeros(1), str(device)).device)


def digits(*, test: int = 297, seed: int = 0) -> Data:
    """The 1797 digits of 8 x 8 pixels bundled with scikit-learn, (N, 64), standardised by one mean and deviation of all training pixels.

    The training set is balanced: (1797 - test) // 10 of each class, drawn by the seed; the others are the test set.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("data.digits needs scikit-learn; install the extra: pip install ufm[torch]") from error
    found = load_digits()
    total, smallest = len(found.target), int(np.bincount(found.target).min())
    each = (total - test) // 10
    if not 1 <= each <= smallest:
        low, high = total - 10 * smallest, total - 10
        raise ValueError(f"data.digits: test is {test}, but balanced training sets of the digits leave {low} to {high} to test")
    inputs, labels = torch.tensor(found.data, dtype=torch.float32), torch.tensor(found.target)
    chosen = _chosen("digits", labels, [each] * 10, seed)
    other = torch.ones(total, dtype=torch.bool).index_fill(0, chosen, False)
    pixels = inputs[chosen]
    inputs = (inputs - pixels.mean()) / pixels.std(correction=0)
    return Data("digits", inputs[chosen], labels[chosen], 10, inputs[other], labels[other])


def clusters(
    counts: Sequence[int] | NDArray[np.integer[Any]],
    *,
    dimension: int = 20,
    noise: float = 0.3,
    separation: float = 6.0,
    seed: int = 0,
    test: int = 50,
) -> Data:
    """Gaussian clusters N(c_k, noise^2 I) in R^dimension, n_k samples of class k and `test` more of each to test.

    c_k ~ N(0, separation^2/(2 dimension) I), so that the root mean square distance of two centres is `separation`. Centres depend on the
    seed and the number of classes only, and a larger n_k adds samples to those of a smaller one.
    """
    n = _counts("clusters", counts)
    if dimension < 1 or not (math.isfinite(noise) and noise >= 0 and math.isfinite(separation) and separation >= 0) or test < 0:
        raise ValueError(
            f"data.clusters: dimension {dimension}, noise {noise}, separation {separation}, test {test}: "
            "the dimension is at least 1, the others finite and not negative"
        )
    classes = len(n)
    centres = np.random.default_rng([seed, 0]).standard_normal((classes, dimension)) * (separation / math.sqrt(2 * dimension))

    def drawn(part: int, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
        noises = [np.random.default_rng([seed, part, k]).standard_normal((size, dimension)) for k, size in enumerate(sizes)]
        samples = np.concatenate([c + noise * e for c, e in zip(centres, noises, strict=True)])
        return torch.tensor(samples, dtype=torch.float32), torch.tensor(np.repeat(np.arange(classes), sizes))

    return Data("clusters", *drawn(1, n), classes, *drawn(2, [test] * classes))


def subsample(data: Data, counts: Sequence[int] | NDArray[np.integer[Any]], *, seed: int | None = None) -> Data:
    """The first n_k training samples of each class in their order, or n_k drawn by the seed; the test set and standardisation are kept."""
    chosen = _chosen("subsample", data.labels.cpu(), _counts("subsample", counts, data.classes), seed).to(data.labels.device)
    return replace(data, inputs=data.inputs[chosen], labels=data.labels[chosen])


def idx(root: str | Path, name: str = "MNIST") -> Data:
    """A data set of the MNIST family from its IDX files, plain or .gz: root/name/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte."""
    folder = Path(root) / name / "raw"
    parts = []
    for part in ("train", "t10k"):
        images, labels = _idx(folder / f"{part}-images-idx3-ubyte", 3), _idx(folder / f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(f"data.idx: {folder} holds {len(images)} {part} images but {len(labels)} labels; fetch the files again")
        parts += [torch.from_numpy(images[:, None]), torch.from_numpy(labels)]
    return Data(name, parts[0], parts[1], IDX_CLASSES, parts[2], parts[3])


def cifar(root: str | Path, classes: int = 10) -> Data:
    """CIFAR-10 or CIFAR-100 (fine labels), binary version, plain or .gz, from root/cifar-10-batches-bin/ or root/cifar-100-binary/."""
    if classes not in CIFAR:
        raise ValueError(f"data.cifar: classes is {classes}, but there are CIFAR-10 and CIFAR-100; give 10 or 100")
    folder, *parts, ahead = CIFAR[classes]
    made = [_cifar(Path(root) / folder, names, ahead, classes) for names in parts]
    return Data(f"CIFAR-{classes}", *made[0], classes, *made[1])


def load(name: str, root: str | Path | None = None, *, counts: Sequence[int] | None = None, seed: int = 0) -> Data:
    """The data set of that name: digits, clusters (counts needed), or mnist, fashionmnist, kmnist, cifar10, cifar100, read from `root`.

    counts: of the training samples, as in `subsample`; seed: of the split of the digits and of the clusters.
    """
    if name == "clusters":
        if counts is None:
            raise ValueError("data.load: clusters are made to measure; give counts=")
        return clusters(counts, seed=seed)
    if name != "digits" and name not in FILES:
        raise ValueError(f"data.load: no data set is called {name!r}; there are digits, clusters, {', '.join(FILES)}")
    if name in FILES and root is None:
        raise ValueError(f"data.load: {name} is read from files, and nothing is downloaded; give the folder that holds them as root=")
    whole = digits(seed=seed) if name == "digits" else FILES[name](Path(str(root)))
    return whole if counts is None else subsample(whole, counts)


FILES: dict[str, Callable[[Path], Data]] = {
    "mnist": lambda root: idx(root, "MNIST"),
    "fashionmnist": lambda root: idx(root, "FashionMNIST"),
    "kmnist": lambda root: idx(root, "KMNIST"),
    "cifar10": lambda root: cifar(root, 10),
    "cifar100": lambda root: cifar(root, 100),
}


def _check(name: str, part: str, inputs: Tensor, labels: Tensor, classes: int) -> None:
    """ValueError for inputs and labels that are no data set."""
    if labels.ndim != 1 or len(inputs) != len(labels) or labels.is_floating_point() or labels.device != inputs.device:
        raise ValueError(
            f"data {name!r}: {part}labels are {_kind(labels)}, {part}inputs {_kind(inputs)}; give one whole number a sample, on one device"
        )
    if not inputs.is_floating_point() and (inputs.dtype != torch.uint8 or inputs.ndim != 4):
        raise ValueError(f"data {name!r}: {part}inputs are {_kind(inputs)}, but must be floats, or uint8 pictures (N, C, H, W)")
    if wrong := labels[(labels < 0) | (labels >= classes)][:1].tolist():
        raise ValueError(f"data {name!r}: {part}labels hold {wrong[0]}, but the labels of {classes} classes are 0 to {classes - 1}")
    if inputs.is_floating_point() and not bool(torch.isfinite(inputs).all()):
        raise ValueError(f"data {name!r}: {part}inputs hold NaN or infinity; leave such samples out, or fill them in")


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)} on {x.device}"


def _moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1), from exact counts of the 256 levels; a constant channel has deviation 1."""
    levels = torch.arange(256, dtype=torch.float64)
    found = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.cpu().unbind(1)])
    shares = found.to(torch.float64) / images[:, 0].numel()
    mean = shares @ levels
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    std = torch.where(std > 0, std, 1.0)
    mean, std = (x.to(images.device, torch.float32)[:, None, None] for x in (mean, std))
    return mean, std


def _counts(call: str, counts: Any, classes: int | None = None) -> list[int]:
    """n_k as ints, of as many classes as there are counts by default; ValueError for anything but a list of whole numbers."""
    given = counts.tolist() if hasattr(counts, "tolist") else counts
    listed = list(given) if isinstance(given, Iterable) else []
    found = [int(float(n)) for n in listed if isinstance(n, Real) and float(n).is_integer() and float(n) >= 1]
    if not found or len(found) != len(listed) or len(found) != (classes or len(listed)):
        each = "each class" if classes is None else f"each of the {classes} classes"
        raise ValueError(f"data.{call}: counts is {given!r}, but {each} needs a whole number of at least 1; give a list of them")
    return found


def _chosen(call: str, labels: Tensor, counts: Sequence[int], seed: int | None) -> Tensor:
    """The places of n_k samples of each class, rising: the first in order, or after a shuffle by the seed."""
    order = torch.arange(len(labels)) if seed is None else torch.from_numpy(np.random.default_rng(seed).permutation(len(labels)))
    taken = []
    for k, n in enumerate(counts):
        places = order[labels[order] == k]
        if len(places) < n:
            raise ValueError(f"data.{call}: {n} samples of class {k} asked for, but there are {len(places)}; ask for fewer")
        taken.append(places[:n])
    return torch.cat(taken).sort().values


def _contents(call: str, path: Path) -> Bytes:
    """The bytes of a file, or of the same file with .gz added."""
    packed = path.with_name(f"{path.name}.gz")
    try:
        if path.is_file():
            return np.fromfile(path, dtype=np.uint8)
        with gzip.open(packed) as file:
            return np.frombuffer(file.read(), dtype=np.uint8)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"data.{call}: neither {path} nor {packed.name} beside it is there; nothing is downloaded, put it there"
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"data.{call}: {packed} is no whole gzip file ({error}); fetch it again") from error


def _idx(path: Path, dimensions: int) -> Bytes:
    """IDX: two zeros, 8 for bytes, the number of dimensions, each of them as a big-endian 32-bit integer, then the bytes."""
    raw = _contents("idx", path)
    start = 4 + 4 * dimensions
    if len(raw) < start or raw[:4].tolist() != [0, 0, 8, dimensions]:
        magic = raw[:4].tobytes().hex(" ")
        raise ValueError(
            f"data.idx: {path} begins with {magic}, an IDX file of {dimensions}-d bytes with 00 00 08 {dimensions:02x}; fetch it again"
        )
    shape = [int(n) for n in raw[4:start].view(">u4")]
    if len(raw) - start != math.prod(shape) or not math.prod(shape[1:]):
        says = f"{' x '.join(map(str, shape))} = {math.prod(shape)}"
        raise ValueError(f"data.idx: {path} holds {len(raw) - start} bytes, but its header says {says}; fetch it again")
    return raw[start:].reshape(shape).copy()


def _cifar(folder: Path, names: Sequence[str], ahead: int, classes: int) -> tuple[Tensor, Tensor]:
    """CIFAR's binary version: records of `ahead` bytes of labels, the last of which counts, and 3 x 32 x 32 bytes."""
    others = {10: "cifar-10-batches-py", 100: "cifar-100-python"}[classes]
    if not folder.is_dir() and (folder.parent / others).is_dir():
        raise ValueError(
            f"data.cifar: {folder.parent / others} holds Python pickles, which can run code when opened and are not read; "
            f"download the binary version (cifar-{classes}-binary.tar.gz) and unpack it to {folder}"
        )
    length = ahead + math.prod(CIFAR_SHAPE)
    made = []
    for name in names:
        raw = _contents("cifar", folder / name)
        if not len(raw) or len(raw) % length:
            raise ValueError(f"data.cifar: {folder / name} holds {len(raw)} bytes, which are no whole records of {length}; fetch it again")
        made.append(raw.reshape(-1, length))
    records = np.concatenate(made)
    return torch.from_numpy(records[:, ahead:].reshape(-1, *CIFAR_SHAPE).copy()), torch.from_numpy(records[:, ahead - 1].copy())
