"""Data sets: files written here and read back, splits and subsamples against loops, and a sentence for all that is wrong."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from ufm import counts as patterns  # noqa: E402
from ufm.arrays import NoDevice  # noqa: E402
from ufm.bridge import data  # noqa: E402

RNG = np.random.default_rng(5)
IMAGES = {"train": RNG.integers(0, 256, (40, 6, 5), dtype=np.uint8), "t10k": RNG.integers(0, 256, (20, 6, 5), dtype=np.uint8)}
LABELS = {"train": np.tile(np.arange(10, dtype=np.uint8), 4), "t10k": np.repeat(np.arange(10, dtype=np.uint8), 2)}


def write(path: Path, content: bytes, packed: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if packed:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def idx_bytes(array: np.ndarray, magic: int = 0x0800, dims: tuple[int, ...] | None = None) -> bytes:
    return struct.pack(f">{array.ndim + 1}I", magic + array.ndim, *(dims or array.shape)) + array.tobytes()


def mnist(root: Path, name: str = "MNIST", packed: bool = False, **changed: bytes) -> Path:
    """The four files, but for those given."""
    for part in ("train", "t10k"):
        write(root / name / "raw" / f"{part}-images-idx3-ubyte", changed.get(f"{part}_images", idx_bytes(IMAGES[part])), packed)
        write(root / name / "raw" / f"{part}-labels-idx1-ubyte", changed.get(f"{part}_labels", idx_bytes(LABELS[part])), packed)
    return root


def records(labels: np.ndarray, classes: int, seed: int = 0) -> tuple[np.ndarray, bytes]:
    """Pictures and the bytes of a CIFAR file."""
    pictures = np.random.default_rng([seed, classes]).integers(0, 256, (len(labels), 3, 32, 32), dtype=np.uint8)
    coarse = [bytes([int(y) % 7]) if classes == 100 else b"" for y in labels]
    return pictures, b"".join(c + bytes([int(y)]) + p.tobytes() for c, y, p in zip(coarse, labels, pictures, strict=True))


def cifar10(root: Path, packed: bool = False, batches: int = 5) -> list[np.ndarray]:
    made = []
    for i in range(batches):
        pictures, content = records(np.arange(10)[:: (-1) ** i], 10, i)
        write(root / "cifar-10-batches-bin" / f"data_batch_{i + 1}.bin", content, packed)
        made.append(pictures)
    pictures, content = records(np.arange(10), 10, 9)
    write(root / "cifar-10-batches-bin" / "test_batch.bin", content, packed)
    return [*made, pictures]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_idx(tmp_path: Path, name: str, packed: bool) -> None:
    """What was written is read, as uint8 pictures with one channel."""
    found = data.load(name.lower(), mnist(tmp_path, name, packed))
    assert found.name == name
    assert found.classes == 10
    for inputs, labels, part in ((found.inputs, found.labels, "train"), (found.test_inputs, found.test_labels, "t10k")):
        assert inputs.dtype == torch.uint8
        assert np.array_equal(inputs.numpy(), IMAGES[part][:, None])
        assert np.array_equal(labels.numpy(), LABELS[part])


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10(tmp_path: Path, packed: bool) -> None:
    """Five batches in order, then the test batch; labels are each record's first byte."""
    pictures = cifar10(tmp_path, packed)
    found = data.load("cifar10", tmp_path)
    assert np.array_equal(found.inputs.numpy(), np.concatenate(pictures[:5]))
    assert found.labels.tolist() == [*range(10), *range(9, -1, -1)] * 2 + [*range(10)]
    assert np.array_equal(found.test_inputs.numpy(), pictures[5])


@pytest.mark.parametrize("packed", [False, True])
def test_cifar100_has_fine_labels(tmp_path: Path, packed: bool) -> None:
    fine = np.random.default_rng(0).permutation(100)
    pictures, content = records(fine, 100)
    write(tmp_path / "cifar-100-binary" / "train.bin", content, packed)
    write(tmp_path / "cifar-100-binary" / "test.bin", content, packed)
    found = data.load("cifar100", tmp_path)
    assert np.array_equal(found.labels.numpy(), fine)
    assert np.array_equal(found.inputs.numpy(), pictures)
    assert found.classes == 100


IDX_FAULTS = {
    "truncated": ({"train_images": idx_bytes(IMAGES["train"])[:-1]}, "holds 1199 bytes, but its header says 40 x 6 x 5 = 1200"),
    "too long": ({"train_images": idx_bytes(IMAGES["train"]) + b"\0"}, "holds 1201 bytes"),
    "other dimensions": ({"t10k_images": idx_bytes(IMAGES["t10k"], dims=(20, 6, 6))}, "header says 20 x 6 x 6 = 720"),
    "huge": ({"t10k_images": idx_bytes(IMAGES["t10k"], dims=(2**32 - 1,) * 3)}, "but its header says 4294967295 x"),
    "empty": ({"train_labels": b""}, "begins with , an IDX file of 1-d bytes with 00 00 08 01"),
    "short header": ({"train_labels": idx_bytes(LABELS["train"])[:6]}, "train-labels-idx1-ubyte begins with 00 00 08 01"),
    "floats": ({"train_images": idx_bytes(IMAGES["train"], 0x0D00)}, "begins with 00 00 0d 03"),
    "labels for images": ({"train_images": idx_bytes(LABELS["train"])}, "begins with 00 00 08 01, an IDX file of 3-d bytes"),
    "fewer labels": ({"train_labels": idx_bytes(LABELS["train"][:-1])}, "40 train images but 39 labels"),
    "label 10": ({"train_labels": idx_bytes(LABELS["train"] + np.uint8(1))}, "labels hold 10, but the labels of 10 classes are 0 to 9"),
    "label 200 to test": ({"t10k_labels": idx_bytes(LABELS["t10k"] + np.uint8(200))}, "test_labels hold 200"),
    "empty class": ({"train_labels": idx_bytes(LABELS["train"] % np.uint8(9))}, "no training sample of class 9"),
}


@pytest.mark.parametrize("fault", IDX_FAULTS)
@pytest.mark.parametrize("packed", [False, True])
def test_wrong_idx_files(tmp_path: Path, fault: str, packed: bool) -> None:
    changed, message = IDX_FAULTS[fault]
    with pytest.raises(ValueError, match=message):
        data.idx(mnist(tmp_path, packed=packed, **changed))


def test_wrong_gzip_files(tmp_path: Path) -> None:
    """A cut-off, an altered and a plain file named .gz."""
    raw = mnist(tmp_path, packed=True) / "MNIST" / "raw" / "train-images-idx3-ubyte.gz"
    whole = raw.read_bytes()
    altered = bytearray(whole)
    altered[200] ^= 255
    no_block = whole[:10] + b"\xff" + whole[11:]
    for content in (whole[:-9], bytes(altered), no_block, idx_bytes(IMAGES["train"])):
        raw.write_bytes(content)
        with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz is no whole gzip file .* fetch it again"):
            data.idx(tmp_path)


def test_missing_files(tmp_path: Path) -> None:
    """The sentence has the path that was looked for."""
    with pytest.raises(FileNotFoundError, match=r"neither .*MNIST/raw/train-images-idx3-ubyte nor train-images-idx3-ubyte\.gz"):
        data.idx(tmp_path)
    (mnist(tmp_path) / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(FileNotFoundError, match="MNIST/raw/t10k-labels-idx1-ubyte"):
        data.idx(tmp_path)
    cifar10(tmp_path, batches=4)
    with pytest.raises(FileNotFoundError, match=r"cifar-10-batches-bin/data_batch_5\.bin"):
        data.cifar(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cifar-100-binary/train\.bin"):
        data.cifar(tmp_path / "nowhere", 100)


def test_wrong_cifar_files(tmp_path: Path) -> None:
    cifar10(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"data_batch_2\.bin holds {len(content)} bytes, which are no whole records of 3073"):
            data.cifar(tmp_path)
    path.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(ValueError, match="labels hold 10"):
        data.cifar(tmp_path)
    with pytest.raises(ValueError, match="classes is 20"):
        data.cifar(tmp_path, 20)


@pytest.mark.parametrize(("classes", "folder"), [(10, "cifar-10-batches-py"), (100, "cifar-100-python")])
def test_pickles_are_refused(tmp_path: Path, classes: int, folder: str) -> None:
    """The sentence says what to fetch in their place."""
    (tmp_path / folder).mkdir()
    with pytest.raises(ValueError, match=rf"{folder} holds Python pickles, .* download the binary version \(cifar-{classes}-binary"):
        data.cifar(tmp_path, classes)


def test_digits() -> None:
    """150 of each class to train, the other 297 to test, none lost and none twice; one mean and deviation for all pixels."""
    from sklearn.datasets import load_digits

    found, bundled = data.digits(), load_digits()
    assert found.counts == [150] * 10
    assert len(found.test_labels) == 297
    pixels = torch.cat([found.inputs, found.test_inputs]).double()
    raw = ((pixels - pixels.min()) / (pixels.max() - pixels.min()) * 16).round().long()
    rows = sorted([*row, y] for row, y in zip(raw.tolist(), torch.cat([found.labels, found.test_labels]).tolist(), strict=True))
    assert rows == sorted([*row, y] for row, y in zip(bundled.data.astype(int).tolist(), bundled.target.tolist(), strict=True))
    assert abs(float(found.inputs.mean())) < 1e-5
    assert abs(float(found.inputs.std(correction=0)) - 1) < 1e-5


def test_splits_of_the_digits() -> None:
    assert torch.equal(data.digits(seed=1).inputs, data.digits(seed=1).inputs)
    assert not torch.equal(data.digits(seed=1).inputs, data.digits(seed=2).inputs)
    assert data.digits(test=97).counts == [170] * 10
    with pytest.raises(ValueError, match="test is 20, but balanced training sets of the digits leave 57 to 1787"):
        data.digits(test=20)


def test_clusters() -> None:
    """n_k samples about each centre, of the noise asked for; a larger n_k keeps the samples of a smaller one, and the test set."""
    small, large = data.clusters([5, 3]), data.clusters(np.array([400, 300]), noise=0.3)
    assert small.counts == [5, 3]
    assert torch.equal(small.inputs[:5], large.inputs[:5])
    assert torch.equal(small.inputs[5:], large.inputs[400:403])
    assert torch.equal(small.test_inputs, large.test_inputs)
    assert small.test_labels.tolist() == [0] * 50 + [1] * 50
    assert not torch.equal(small.test_inputs[:5], small.inputs[:5])
    centres = data.clusters([1, 1], noise=0.0).inputs
    spread = large.inputs - centres[large.labels]
    assert abs(float(spread.std()) - 0.3) < 0.005
    assert abs(float(spread.mean())) < 0.01
    assert not torch.equal(data.clusters([5, 3], seed=1).inputs, small.inputs)
    assert len(data.clusters([5, 3], test=0).test_labels) == 0


def test_separation_of_clusters() -> None:
    """The root mean square distance of centres is the separation, over many."""
    centres = data.clusters([1] * 300, noise=0.0, separation=4.0, dimension=30, test=0).inputs
    distances = torch.pdist(centres)
    assert abs(float(distances.square().mean().sqrt()) - 4.0) < 0.05


@pytest.mark.parametrize("wanted", [patterns.step(10, 15, 10), patterns.exponential(10, 150, 50), [150, 1, 2, 3, 4, 5, 6, 7, 8, 9]])
def test_subsample(wanted: Any) -> None:
    """The first n_k of each class in their order, as a loop finds them; the test set stays."""
    whole = data.digits()
    part = data.subsample(whole, wanted)
    taken, left = [], [int(n) for n in wanted]
    for i, y in enumerate(whole.labels.tolist()):
        if left[y]:
            left[y] -= 1
            taken.append(i)
    assert torch.equal(part.inputs, whole.inputs[taken])
    assert part.counts == [int(n) for n in wanted]
    assert part.test_inputs is whole.test_inputs


def test_subsample_by_seed() -> None:
    whole = data.digits()
    first, again, other = (data.subsample(whole, [20] * 10, seed=s) for s in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs)
    assert not torch.equal(first.inputs, other.inputs)
    assert first.counts == [20] * 10
    assert not torch.equal(first.inputs, data.subsample(whole, [20] * 10).inputs)


def test_pictures_are_standardised(tmp_path: Path) -> None:
    """By channel over the training set as read, not as subsampled; test pictures by the same; float64 on request."""
    cifar10(tmp_path)
    whole = data.cifar(tmp_path)
    raw = whole.inputs.double()
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True, correction=0)
    inputs, labels = whole.to(dtype=torch.float64).batch()
    torch.testing.assert_close(inputs, (raw - mean) / std, rtol=0, atol=1e-5)
    assert torch.equal(labels, whole.labels)
    part = data.subsample(whole, [2] * 5 + [1] * 5)
    torch.testing.assert_close(part.batch()[0], ((raw - mean) / std)[[*range(10), *range(15, 20)]].float(), rtol=0, atol=1e-5)
    torch.testing.assert_close(whole.test()[0], ((whole.test_inputs - mean) / std).float(), rtol=0, atol=1e-5)
    assert whole.batch()[0].dtype == torch.float32
    assert whole.inputs.dtype == torch.uint8


def test_constant_channel() -> None:
    images = torch.full((4, 1, 2, 2), 7, dtype=torch.uint8)
    assert torch.equal(made(inputs=images, test_inputs=images).batch()[0], torch.zeros(4, 1, 2, 2))


def test_batches_are_rows() -> None:
    found = data.digits()
    index = torch.tensor([5, 5, 700, 0])
    inputs, labels = found.batch(index)
    assert torch.equal(inputs, torch.stack([found.inputs[i] for i in index.tolist()]))
    assert torch.equal(labels, found.labels[index])
    assert torch.equal(found.test(slice(3, 5))[0], found.test_inputs[3:5])


def test_variation_is_a_crop_and_a_flip() -> None:
    """Every varied picture is one of the 162 crops of the padded picture, plain or flipped; each shift and flip occurs about equally."""
    image = torch.arange(1, 61, dtype=torch.uint8).reshape(1, 3, 4, 5)
    whole = made(inputs=image.repeat(4, 1, 1, 1), test_inputs=image, mean=torch.zeros(3, 1, 1), std=torch.ones(3, 1, 1))
    n = 8000
    varied, _ = whole.batch(torch.zeros(n, dtype=torch.int64), augment=torch.Generator().manual_seed(0))
    wide = np.pad(image[0].numpy(), ((0, 0), (4, 4), (4, 4)))
    crops: dict[bytes, int] = {}
    for flipped in (0, 1):
        for down in range(9):
            for right in range(9):
                crop = wide[:, down : down + 4, right : right + 5]
                crops[np.ascontiguousarray(crop[:, :, ::-1] if flipped else crop).tobytes()] = flipped
    found = [picture.tobytes() for picture in varied.to(torch.uint8).numpy()]
    assert set(found) == set(crops)
    shares = np.array([found.count(key) for key in crops if any(key)]) / n
    assert abs(shares - 1 / 162).max() < 5 * np.sqrt(1 / 162 / n)
    again, _ = whole.batch(torch.zeros(n, dtype=torch.int64), augment=torch.Generator().manual_seed(0))
    assert torch.equal(varied, again)


def made(**changed: Any) -> data.Data:
    whole: dict[str, Any] = dict(
        name="mine",
        inputs=torch.randn(4, 3),
        labels=torch.tensor([0, 1, 1, 0]),
        classes=2,
        test_inputs=torch.randn(2, 3),
        test_labels=torch.tensor([0, 1]),
    )
    if "inputs" in changed and "test_inputs" in changed:
        whole["test_labels"] = torch.zeros(len(changed["test_inputs"]), dtype=torch.int64)
    return data.Data(**(whole | changed))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made(labels=torch.tensor([0, 1, 2, 0])), "data 'mine': labels hold 2, but the labels of 2 classes are 0 to 1"),
        (lambda: made(labels=torch.tensor([0, 1, -1, 0])), "labels hold -1"),
        (lambda: made(test_labels=torch.tensor([0, 2])), "test_labels hold 2"),
        (lambda: made(labels=torch.tensor([1, 1, 1, 1])), "no training sample of class 0; every class of 2 needs at least one"),
        (lambda: made(labels=torch.tensor([0, 1])), r"labels are int64 \(2,\) on cpu, inputs float32 \(4, 3\)"),
        (lambda: made(labels=torch.rand(4)), "labels are float32"),
        (lambda: made(inputs=torch.full((4, 3), torch.nan)), "inputs hold NaN or infinity"),
        (lambda: made(test_inputs=torch.full((2, 3), torch.inf)), "test_inputs hold NaN or infinity"),
        (lambda: made(inputs=torch.ones(4, 3, dtype=torch.uint8)), r"inputs are uint8 \(4, 3\) on cpu, but must be floats, or uint8 pic"),
        (lambda: made(test_inputs=torch.randn(2, 5)), "make them alike"),
        (lambda: made().batch(augment=torch.Generator()), "only pictures .* leave augment out"),
        (lambda: made().to("numpy"), "'numpy' trains no network"),
        (lambda: data.subsample(made(), [3, 1]), "3 samples of class 0 asked for, but there are 2; ask for fewer"),
        (lambda: data.subsample(made(), [2, 1, 1]), r"counts is \[2, 1, 1\], but each of the 2 classes"),
        (lambda: data.subsample(made(), [2, 0]), r"counts is \[2, 0\]"),
        (lambda: data.subsample(made(), [1.5, 1]), r"counts is \[1.5, 1\]"),  # type: ignore[list-item]
        (lambda: data.subsample(made(), [float("nan"), 1]), r"counts is \[nan, 1\], but each of the 2 classes needs a whole number"),  # type: ignore[list-item]
        (lambda: data.subsample(made(), [float("inf"), 1]), r"counts is \[inf, 1\]"),  # type: ignore[list-item]
        (lambda: data.subsample(made(), "11"), "counts is '11'"),  # type: ignore[arg-type]
        (lambda: data.clusters(3), "counts is 3, but each class needs a whole number of at least 1; give a list of them"),  # type: ignore[arg-type]
        (lambda: data.clusters([[3, 3]]), r"counts is \[\[3, 3\]\], but each class"),  # type: ignore[list-item]
        (lambda: data.clusters(np.ones((2, 2), dtype=int)), r"counts is \[\[1, 1\], \[1, 1\]\]"),
        (lambda: made().to("meta"), "device 'meta' is none to train on; use 'cpu' or 'cuda'$"),
        (lambda: made().to("gpu"), "device 'gpu' is none to train on; use 'cpu' or 'cuda'$"),
        (lambda: data.clusters([]), r"counts is \[\]"),
        (lambda: data.clusters([3, 0]), r"counts is \[3, 0\]"),
        (lambda: data.clusters([3, 2], noise=-1.0), "noise -1.0"),
        (lambda: data.load("clusters"), "give counts="),
        (lambda: data.load("imagenet"), "no data set is called 'imagenet'; there are digits, clusters, mnist"),
        (lambda: data.load("cifar10"), "cifar10 is read from files, and nothing is downloaded"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_device() -> None:
    with pytest.raises(NoDevice, match="device 'cuda' is not to be had here"):
        made().to("cuda")


def test_load() -> None:
    assert data.load("digits", counts=[150] * 5 + [15] * 5).counts == [150] * 5 + [15] * 5
    assert torch.equal(data.load("digits", seed=3).inputs, data.digits(seed=3).inputs)
    assert torch.equal(data.load("clusters", counts=[4, 2], seed=3).inputs, data.clusters([4, 2], seed=3).inputs)
