"""Where blocks are computed: any `concurrent.futures.Executor` does; these come with the house, in a table by name."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ufm.sweep.errors import SweepError

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LOOK_EVERY = 1.0  # seconds between two looks of a worker for its parent
IN_FLIGHT = 4  # blocks per worker: none waits for work, and little is lost when all is stopped


class Serial(Executor):
    """Computes each block when it is submitted, here."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        """A future that is done."""
        future: Future[Any] = Future()
        try:
            future.set_result(function(*args, **named))
        except Exception as error:
            future.set_exception(error)
        return future


def serial(workers: int | None = None) -> Executor:
    """In this process; `workers` makes no difference."""
    return Serial()


def loky(workers: int | None = None) -> Executor:
    """Processes of this machine, one BLAS thread each; by default as many as there are CPUs for this process. They end with this one."""
    from loky import cpu_count, get_reusable_executor

    watched = {"initializer": end_with, "initargs": (os.getpid(),)}
    return get_reusable_executor(max_workers=workers or cpu_count(), env=ONE_THREAD, **watched)  # type: ignore[no-any-return]


def end_with(parent: int) -> None:
    """Make this worker end soon after its parent process, however that was killed (POSIX), and not only at the end of its block."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_EVERY)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def dask(workers: int | None = None) -> Iterator[Executor]:
    """A dask cluster of processes on this machine; for another cluster pass run its `client.get_executor(pure=False)`."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ImportError("the executor 'dask' needs distributed; install the extra: pip install ufm[cluster]") from error
    with Client(n_workers=workers, threads_per_worker=1) as client, client.get_executor(pure=False) as executor:
        yield executor


EXECUTORS: dict[str, Callable[[int | None], AbstractContextManager[Executor]]] = {"serial": serial, "loky": loky, "dask": dask}


def named(name: str, workers: int | None = None) -> AbstractContextManager[Executor]:
    """The executor of that name, to be used in a `with`; SweepError for an unknown name or fewer than one worker."""
    if name not in EXECUTORS:
        raise SweepError(f"executors.named: there is no executor {name!r}; use one of {', '.join(EXECUTORS)}")
    if workers is not None and workers < 1:
        raise SweepError(f"executors.named: workers is {workers}, but at least one is needed")
    return EXECUTORS[name](workers)


def workers_of(executor: Executor) -> int:
    """The number of workers as far as the executor tells; otherwise that of this machine's CPUs."""
    if isinstance(executor, Serial):
        return 1
    known = getattr(executor, "_max_workers", None)
    if (client := getattr(executor, "_client", None)) is not None:  # of dask
        known = sum(client.nthreads().values())
    return known if isinstance(known, int) and known > 0 else os.cpu_count() or 1


def in_flight(executor: Executor) -> int:
    """How many blocks to have submitted at a time; one in this process, so that each is stored as soon as it is done."""
    return 1 if isinstance(executor, Serial) else IN_FLIGHT * workers_of(executor)
