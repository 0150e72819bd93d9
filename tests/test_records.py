"""Records come back from their file as they went in; a file that is not theirs is refused; a failed save leaves nothing."""

from __future__ import annotations

import stat
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ufm.records import Certificate, EndPoint, Prediction, Regime, Saved, Solution, Stop, Trajectory

B, G, K, COLS = 2, 2, 3, 4
RNG = np.random.default_rng(0)


def prediction() -> Prediction:
    return Prediction(
        value=np.array([0.5, np.nan]),
        regime=(Regime.DISTINCT, Regime.UNKNOWN),
        distance=np.array([-np.inf, np.nan]),
        collapsed=np.array([[True, False, True], [False, False, False]]),
        margins=RNG.normal(size=(G, K)),
        logits=RNG.normal(size=(G, K, K)),
        feature_gram=RNG.normal(size=(G, K, K)),
        classifier_gram=RNG.normal(size=(G, K, K)),
        bias=np.zeros((G, K)),
        source=np.array(["Theorem 1 (λ* of Dang et al.)", "no theorem: width < K - 1"]),
    )


def certificate() -> Certificate:
    return Certificate(
        value=np.array([0.5, 1e-300]),
        lower=np.array([0.5, 0.0]),
        gap=np.array([1e-12, np.nan]),
        gradient_norm=np.array([1e-11, 2.0]),
        rho=np.array([1.0, 3.0]),
        bound=np.array(["exact", "row norms"]),
        regime=(Regime.MERGED, Regime.ALL_ZERO),
        collapsed=np.zeros((B, K), dtype=bool),
    )


def solution() -> Solution:
    return Solution(
        value=np.array([0.5, 0.25]),
        gap=np.array([np.nan, 1e-10]),
        gradient_norm=np.array([1e-9, 1e-12]),
        rho=np.array([1.0, 1.0]),
        regime=(Regime.MINORITY_ZERO, Regime.DISTINCT),
        collapsed=np.array([[False, False, True], [False, False, False]]),
        stop=(Stop.GAP, Stop.DIVERGED),
        steps=np.array([12, 2**40]),
        rounds=np.array([0, 3]),
        factors=tuple(RNG.normal(size=shape) for shape in ((B, 5, COLS), (B, 5, 5), (B, K, 5), (B, K, 1))),
        logits=RNG.normal(size=(B, K, COLS)),
    )


def trajectory() -> Trajectory:
    """One run of three records, one that diverged at its second; probes of one number and of K."""
    return Trajectory(
        step=np.array([0, 10, 2**40]),
        value=np.array([[0.5, 0.25, 0.125], [0.5, np.inf, np.nan]]),
        gradient_norm=RNG.normal(size=(B, 3)),
        time=np.array([[0.0, 1.0, 2.0], [0.0, 1.0, np.nan]]),
        probes={"nc1": RNG.normal(size=(B, 3)), "class norms ‖h‖": RNG.normal(size=(B, 3, K)), "<lambda>": np.zeros((B, 3, 0))},
        stop=(Stop.TIME, Stop.DIVERGED),
        steps=np.array([2**40, 10]),
        factors=tuple(RNG.normal(size=shape) for shape in ((B, 5, COLS), (B, K, 5))),
        logits=RNG.normal(size=(B, K, COLS)),
    )


def end_point() -> EndPoint:
    return EndPoint(
        kind=np.array(["dnc", "other"]),
        name=np.array(["DNC", "other, rank 2"]),
        rank=np.array([2, 2]),
        rank_gap=np.array([np.inf, 1e15]),
        singular_values=RNG.random((B, K)),
        value=RNG.random(B),
        level=np.array([0.5, np.nan]),
        excess=np.array([-1e-16, np.nan]),
        gradient_norm=np.array([0.0, 1e-9]),
        polished=np.array([True, False]),
        negative=np.array([0.0, np.nan]),
        zero=np.array([7.0, np.nan]),
        is_minimum=np.array([1.0, np.nan]),
        reason=np.array(["logits and value of the closed form; λ ≤ λ_c", ""]),
    )


def bare_trajectory() -> Trajectory:
    return replace(trajectory(), probes={})


@dataclass(frozen=True, eq=False)
class Odd(Saved):
    """A record with every kind of field a record may have."""

    number: float
    whole: int
    flag: bool
    text: str
    nothing: Any
    empty: tuple[Any, ...]
    many: tuple[Any, ...]
    one: tuple[Stop, ...]
    array: Any
    named: dict[str, Any]


def odd() -> Odd:
    many = tuple(np.full(2, i) for i in range(12))  # more than ten: 10 sorts after 2
    return Odd(
        0.1,
        2**60,
        True,
        "ü",
        None,
        (),
        many,
        (Stop.STALLED,),
        np.zeros((0, 3), dtype=np.float32),
        {"b": np.arange(3), "a": np.zeros(2), "10": RNG.normal(size=(2, 2))},
    )


RECORDS = [prediction, certificate, solution, trajectory, bare_trajectory, end_point, odd]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) or isinstance(b, tuple):
        return isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) or isinstance(b, dict):
        return isinstance(a, dict) and isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, np.ndarray):
        exact = isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape
        return exact and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("make", RECORDS)
def test_round_trip(make: Any, tmp_path: Path) -> None:
    """load(save(record)) equals the record in every field: values, types, shapes, enumerations, None and NaN."""
    record = make()
    record.save(tmp_path / "r.npz")
    again = type(record).load(str(tmp_path / "r.npz"))
    assert type(again) is type(record)
    assert [] == [f.name for f in fields(record) if not same(getattr(record, f.name), getattr(again, f.name))]


def test_last_reads_the_last_record_of_each_run(tmp_path: Path) -> None:
    """Of value, norm, time and probes, run by run, also after a round trip."""
    record = trajectory()
    record.save(tmp_path / "r.npz")
    for found in (record, Trajectory.load(tmp_path / "r.npz")):
        assert found.last("value").tolist() == [0.125, np.inf]
        assert found.last("time").tolist() == [2.0, 1.0]
        assert found.last("gradient_norm").tolist() == [record.gradient_norm[0, 2], record.gradient_norm[1, 1]]
        expected = [record.probes["class norms ‖h‖"][0, 2].tolist(), record.probes["class norms ‖h‖"][1, 1].tolist()]
        assert found.last("class norms ‖h‖").tolist() == expected
        assert found.last("nc1").shape == (B,)


def test_saving_replaces(tmp_path: Path) -> None:
    """A second save to the same path replaces the first, and leaves one file, which others may read as any new file."""
    path = tmp_path / "r.npz"
    solution().save(path)
    replace(solution(), value=np.array([7.0, 8.0])).save(path)
    assert Solution.load(path).value.tolist() == [7.0, 8.0]
    assert [p.name for p in tmp_path.iterdir()] == ["r.npz"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_torch_factors_are_saved_as_arrays(tmp_path: Path) -> None:
    """Factors on another library or device, with or without a graph behind them, are saved as numpy arrays."""
    torch = pytest.importorskip("torch")
    on_torch = tuple(torch.asarray(f).requires_grad_() for f in solution().factors)
    replace(solution(), factors=on_torch).save(tmp_path / "r.npz")
    again = Solution.load(tmp_path / "r.npz")
    assert all(np.array_equal(a, b.detach().numpy()) for a, b in zip(again.factors, on_torch, strict=True))


def truncated(path: Path) -> None:
    solution().save(path)
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path: Path) -> None:
    solution().save(path)
    data = bytearray(path.read_bytes())
    at = data.index(solution().value.tobytes())
    data[at] ^= 0xFF
    path.write_bytes(data)


def unknown_name(path: Path) -> None:
    solution().save(path)
    with np.load(path) as stored:
        flat = dict(stored)
    np.savez(path, **(flat | {"stop/Stop": np.array(["GAP", "TIRED"])}))


def missing_field(path: Path) -> None:
    solution().save(path)
    with np.load(path) as stored:
        flat = {name: stored[name] for name in stored.files if name != "value"}
    np.savez(path, **flat)


BROKEN = {
    "truncated": truncated,
    "flipped": flipped,
    "unknown_name": unknown_name,
    "missing_field": missing_field,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not a record"),
    "another record": lambda path: prediction().save(path),
    "another program's npz": lambda path: np.savez(path, value=np.ones(2)),
    "an npy file": lambda path: np.save(path, np.ones(2)),
    "objects": lambda path: np.savez(path, ufm_record=np.array("Solution"), value=np.array([{}, None])),
    "folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", BROKEN)
def test_load_refuses(case: str, tmp_path: Path) -> None:
    """Anything but a whole file of this record is a ValueError of one line that names the call and the file."""
    path = tmp_path / "r.npz"
    BROKEN[case](path)
    path = path if path.exists() else tmp_path / "r.npz.npy"
    with pytest.raises(ValueError, match=r"^Solution\.load: ") as caught:
        Solution.load(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_of_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Solution.load(tmp_path / "none.npz")


class Explosive:
    """An array that cannot be made."""

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        raise MemoryError("no room")


@pytest.mark.parametrize("bad", [Explosive(), object(), np.array([{}, None])], ids=["raises", "object", "object array"])
@pytest.mark.parametrize("before", [False, True], ids=["new", "over an old file"])
def test_failed_save_leaves_nothing(bad: Any, before: bool, tmp_path: Path) -> None:
    """A record that cannot be stored is refused when saved, not when read; an earlier file stays whole, and no part is left."""
    path = tmp_path / "r.npz"
    if before:
        solution().save(path)
    with pytest.raises((MemoryError, TypeError, ValueError)):
        replace(solution(), logits=bad).save(path)
    assert [p.name for p in tmp_path.iterdir()] == (["r.npz"] if before else [])
    if before:
        assert Solution.load(path).value.tolist() == [0.5, 0.25]


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in mid-write leaves neither a file nor a part of one."""

    def interrupted(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        solution().save(tmp_path / "r.npz")
    assert list(tmp_path.iterdir()) == []


def test_the_messages_are_the_enumerations() -> None:
    """Every regime and reason has its own sentence."""
    for kind in (Regime, Stop):
        assert len({entry.value for entry in kind}) == len(kind.__members__)
        assert all(isinstance(entry.value, str) and entry.value for entry in kind)
