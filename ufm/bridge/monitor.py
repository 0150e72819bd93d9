"""Neural collapse in one's own network: hooks on named layers, moments batch by batch, the metrics of `ufm.metrics` at the end.

Three lines of a user's own loop:

    monitor = bridge.Monitor(model, head="fc", classes=10)
    with monitor.watch(labels): model(inputs)    # each batch
    report = monitor.report()                    # report.row() -> {"nc2@fc": ..., ...}, report["fc"].arrays["means"]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ufm import metrics
from ufm.bridge.classifier import check, linear_layers, product, scaled, weight
from ufm.bridge.moments import CPU, Asked, Batch, Moments, Seen, gathered, pooled
from ufm.bridge.readings import Centre, Report, View, read
from ufm.frames import Targets

Measure = Literal["traces", "full"]
WIDEST = 16384  # features whose d x d factor, of 2 GB, is still made


class Monitor:
    """Watches the outputs of named layers, and the features that enter the head, of any `nn.Module`.

    layers: names as in `model.named_modules()`. head: name of the classifier, an `nn.Linear`, a head of `ufm.bridge` (features are then its
    radius h/|h|), or a Sequential that ends in a linear layer: what enters its linear layers is watched under their names, the first under
    the head's; those behind the last activation multiply to the classifier, and the last layer is what enters them. That each gives
    W h + b is checked on the first sample of a pass.
    measure: "traces" (means, variances, and of the last layer all but what needs a spectrum of samples) or "full" (scatter, spectra and
    ranks too), for all layers or {name: ...}, "traces" elsewhere. keep: the layers whose samples are kept, in their dtype. conv:
    (n, C, H, W) flattened, or "pool", the mean over pixels. centre, weights: as in `ufm.metrics`. targets: Grams of `ufm.frames`.
    penalties (lam_h, lam_1, ..., lam_L): for the balance of the head's L linear layers. distributed: reports are of what all processes
    of torch.distributed have seen, equal on all; all must ask for them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str] | None = None,
        *,
        head: str | None = None,
        classes: int,
        measure: Measure | Mapping[str, Measure] = "traces",
        keep: Literal["none", "last", "all"] = "last",
        conv: Literal["flatten", "pool"] = "flatten",
        centre: Centre = "classes",
        weights: Centre = "classes",
        targets: Targets | None = None,
        penalties: Sequence[float] | None = None,
        distributed: bool = False,
    ) -> None:
        if isinstance(classes, bool) or not isinstance(classes, (int, np.integer)) or classes < 2:
            raise ValueError(f"Monitor: classes is {classes!r}, but must be a whole number, at least 2")
        if isinstance(layers, str) or (not layers and head is None):
            raise ValueError(f"Monitor: layers is {layers!r} and head is {head!r}; give a list of layer names, or head=, or both")
        layers = list(layers or ())
        _choice("keep", keep, ("none", "last", "all"))
        _choice("conv", conv, ("flatten", "pool"))
        _choice("centre", centre, ("classes", "samples"))
        _choice("weights", weights, ("classes", "samples"))
        modules = dict(model.named_modules(remove_duplicate=False))
        self.model, self.classes, self.head = model, int(classes), None if head is None else _module(modules, head)
        self._linear, self._tail = ({}, []) if self.head is None else linear_layers(str(head), self.head)
        self._layers = {name: _module(modules, name) for name in layers}
        self.last = self._tail[0] if self._tail else None
        self.names = (*self._layers, *self._linear)
        if len(set(self.names)) < len(layers) + len(self._linear):
            twice = next(name for name in layers if name in self._linear or layers.count(name) > 1)
            raise ValueError(f"Monitor: layer {twice!r} is named twice; the head and its linear layers are watched by themselves")
        if penalties is not None and len(penalties) != len(self._linear) + 1:
            raise ValueError(f"Monitor: {len(penalties)} penalties for {len(self._linear)} linear layers; give (lam_h, lam_1, ..., lam_L)")
        full = _full(measure, self.names)
        last = {self.last} if self.last is not None else set[str]()
        kept = {"none": set[str](), "last": last, "all": set(self.names)}[keep]
        self._asked = {name: Asked(name in full, name in full | last, name in kept) for name in self.names}
        self._pool, self._centre, self._weights = conv == "pool", centre, weights
        self._targets, self._penalties, self._distributed = targets, penalties, distributed
        self._batches: dict[torch.device, Batch] | None = None  # of the open watch, by device
        self._ran: set[str] = set()
        self.reset()

    @property
    def settings(self) -> dict[str, Any]:
        """What a reading depends on beside the network, name -> value."""
        return {
            "layers": list(self._layers),
            "head": list(self._linear),
            "classes": self.classes,
            "measure and keep": self._asked,
            "conv": "pool" if self._pool else "flatten",
            "centre": self._centre,
            "weights": self._weights,
            "targets": self._targets,
            "penalties": None if self._penalties is None else list(map(float, self._penalties)),
        }

    def reset(self) -> None:
        """Forget all that was seen."""
        self._seen = Seen()

    @contextmanager
    def watch(self, labels: Any) -> Iterator[None]:
        """Inside, the model runs forward once on a batch with these integer labels (n,); hooks are gone afterwards, whatever happens."""
        if self._batches is not None:
            raise RuntimeError("Monitor.watch: a watch is open already; close it first, one for each forward pass")
        if self._seen.torn:
            raise RuntimeError("Monitor.watch: an earlier batch failed half-way through the layers; call reset() and begin again")
        y = self._checked(labels)
        self._batches, self._ran = {CPU: Batch.of(y, self.classes)}, set()
        with ExitStack() as hooks:
            hooks.callback(self._close, y)
            for name, module in self._layers.items():
                hooks.enter_context(module.register_forward_hook(partial(self._output, name)))
            for name, module in self._linear.items():
                hooks.enter_context(module.register_forward_hook(partial(self._input, name), with_kwargs=True))
            if self.head is not None:
                hooks.enter_context(self.head.register_forward_hook(self._logits))
            yield
            if silent := [name for name in self.names if name not in self._ran]:
                raise RuntimeError(
                    f"Monitor.watch: no forward pass came through layer {silent[0]!r}; run the model once inside the watch, and if it was "
                    "compiled, watch and run the uncompiled one: what torch.compile has made skips hooks that come later"
                )

    def measure(self, batches: Iterable[Any]) -> Report:
        """The report of one pass over (inputs, labels) in evaluation mode without gradients; each module's mode is as before afterwards.

        What was watched before is discarded, as by `reset()`.
        """
        if self._batches is None:
            self.reset()
        modes = {module: module.training for module in self.model.modules()}
        place = _device(self.model)
        self.model.eval()
        try:
            with torch.no_grad():
                for inputs, labels in batches:
                    with self.watch(labels):
                        self.model(inputs.to(place))
        finally:
            for module, mode in modes.items():
                module.training = mode
        return self.report()

    @torch.no_grad()
    def report(self) -> Report:
        """All readings of what was seen since the last report, which is then forgotten; ValueError where it is not enough, keeping it."""
        if self._batches is not None:
            raise RuntimeError("Monitor.report: a watch is still open; ask for the report after it")
        seen = gathered(self._seen, _device(self.model)) if self._distributed else self._seen
        if seen.torn:
            raise RuntimeError("Monitor.report: a batch failed half-way through the layers; call reset() and begin again")
        if not seen.labels:
            raise ValueError("Monitor.report: no batch was seen; run the model inside `with monitor.watch(labels):` first")
        counts = seen.moments[self.names[0]].counts
        if absent := torch.nonzero(counts == 0)[:, 0].tolist():
            raise ValueError(
                f"Monitor.report: class {absent[0]} of {self.classes} has no samples among the {int(counts.sum())} seen, hence no mean; "
                "show more batches, or number the classes that occur"
            )
        if broken := [name for name in self.names if not seen.moments[name].finite]:
            raise ValueError(
                f"Monitor.report: features of layer {broken[0]!r} hold NaN or infinity; look for a step size that is too long, or for half "
                "precision that overflows"
            )
        layers = {name: read(name, self._view(name, seen)) for name in self.names}
        self.reset()
        return Report(layers, counts.numpy().astype(np.int64), self.last)

    def _checked(self, labels: Any) -> Tensor:
        try:
            y = labels.detach() if isinstance(labels, Tensor) else torch.as_tensor(np.array(labels))
        except (TypeError, ValueError):  # numpy's or torch's, of what is no array of numbers
            raise ValueError(f"Monitor.watch: labels is {labels!r:.60}, but must be integers (n,), n >= 1") from None
        if y.ndim != 1 or not len(y) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"Monitor.watch: labels have shape {tuple(y.shape)} and dtype {y.dtype}, but must be integers (n,), n >= 1")
        y = y.to("cpu", torch.int64)
        if int(y.min()) < 0 or int(y.max()) >= self.classes:
            raise ValueError(
                f"Monitor.watch: labels run from {int(y.min())} to {int(y.max())}, but must lie between 0 and {self.classes - 1}; "
                "give classes= as many as there are"
            )
        return y

    def _close(self, labels: Tensor) -> None:
        if self._ran.issuperset(self.names) and (self.head is None or len(self._seen.margins) > len(self._seen.labels)):
            self._seen.labels.append(labels)
            self._seen.torn = False
        self._batches = None

    def _output(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        batch = self._batch(f"layer {name!r}", output)
        with _apart(output):
            x = output.detach()
            if x.ndim == 4 and self._pool:
                x = pooled(x)
            self._add(name, x.reshape(len(x), -1), batch)

    def _input(self, name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        features = (*args, *kwargs.values())[0]
        batch = self._batch(f"layer {name!r}", features)
        if features.ndim != 2:
            raise ValueError(f"Monitor.watch: features of shape {tuple(features.shape)} enter the head at {name!r}, but must be (n, d)")
        self._batch(f"layer {name!r}", output)
        if name not in self._seen.moments:
            check(name, module, features.detach(), output.detach())
        with _apart(features):
            self._add(name, scaled(module, features.detach()), batch)

    def _logits(self, module: nn.Module, args: Any, output: Any) -> None:
        batch = self._batch("the head", output)
        if tuple(output.shape[1:]) != (self.classes,):
            raise ValueError(f"Monitor.watch: the head gives logits of shape {tuple(output.shape)}, but classes is {self.classes}")
        with _apart(output):
            self._seen.margins.append(metrics.margins(output.detach().to(torch.float64).mT[None], batch.labels)[0])

    def _batch(self, what: str, x: Any) -> Batch:
        """The open batch where x is; x is what a layer gave."""
        if not isinstance(x, Tensor) or not x.is_floating_point() or not x.ndim:
            kind = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
            raise ValueError(f"Monitor.watch: {what} gives {kind}, but features are floating-point numbers (n, ...); watch another layer")
        batches: dict[torch.device, Batch] = self._batches or {}
        n = len(batches[CPU].labels)
        if len(x) != n:
            raise ValueError(f"Monitor.watch: {n} labels, but {what} has a batch of {len(x)}; give each sample its label")
        if x.device not in batches:
            batches[x.device] = batches[CPU].to(x.device)
        return batches[x.device]

    def _add(self, name: str, X: Tensor, batch: Batch) -> None:
        """Features (n, d) of a layer to its moments."""
        if name in self._ran:
            raise RuntimeError(f"Monitor.watch: layer {name!r} ran twice within one watch; open one watch for each forward pass")
        asked = self._asked[name]
        if asked.scatter and X.shape[1] > WIDEST:
            raise ValueError(
                f"Monitor.watch: layer {name!r} has {X.shape[1]} features, too many for measure='full' (at most {WIDEST}); "
                "give conv='pool', or measure={name: 'full'} for other layers alone"
            )
        moments = self._seen.moments.get(name) or Moments(asked, self.classes, X)
        if moments.width != X.shape[1]:
            raise ValueError(f"Monitor.watch: layer {name!r} has {X.shape[1]} features, but {moments.width} in the batches before")
        self._seen.torn = True  # until the batch has come through all layers
        self._seen.moments[name] = moments
        moments.add(X, batch)
        self._ran.add(name)

    def _view(self, name: str, seen: Seen) -> View:
        """What the formulas take of a layer."""
        moments, asked = seen.moments[name], self._asked[name]
        place, n = moments.device, moments.counts.to(moments.device)
        means, variances = moments.means(), moments.variances()
        y = torch.cat(seen.labels).to(place)
        M, counts = means.mT[None], n[None]
        base = metrics.class_statistics(M, np.arange(self.classes), self.classes, n)
        view = View(self._centre, self._weights, counts, M, variances[None], replace(base, variances=variances[None]), y)
        view = replace(view, targets=self._targets, penalties=self._penalties)
        if asked.samples:
            H = torch.cat(moments.samples).to(torch.float64).mT[None]
            view = replace(view, samples=H, stats=None if asked.scatter else metrics.class_statistics(H, y, self.classes))
        if asked.extremes:
            view = replace(view, tops=torch.cat(moments.tops)[None, None], coordinates=moments.largest[None, :, None])
        if asked.scatter:
            R = torch.cat(moments.rows)
            stats = metrics.from_scatter(counts, M, variances[None], (R.mT @ R / n.sum())[None])
            view = replace(view, stats=stats, rows=torch.cat([R, torch.sqrt(n)[:, None] * means]).mT[None])
        if name in self._linear:
            view = replace(view, weight=weight(self._linear[name]).to(place)[None])
        if name == self.last:
            W, b = (x.to(place)[None] for x in product([self._linear[layer] for layer in self._tail]))
            view = replace(view, W=W, b=b, margins=torch.cat(seen.margins).to(place)[None])
        if name == next(iter(self._linear), None):
            view = replace(view, chain=tuple(weight(layer).to(place)[None] for layer in self._linear.values()))
        return view


@contextmanager
def _apart(x: Tensor) -> Iterator[None]:
    """No autocast and no inference tensors: what is made here of detached tensors can be added to in any later mode."""
    with torch.inference_mode(False), torch.autocast(x.device.type, enabled=False):
        yield


def _device(model: nn.Module) -> torch.device:
    return next((t.device for t in (*model.parameters(), *model.buffers())), CPU)


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if name in modules:
        return modules[name]
    near = get_close_matches(name, modules, n=3, cutoff=0.3) or [n for n in modules if n][:3]
    raise ValueError(f"Monitor: the model has no layer {name!r}; near names of its named_modules are {', '.join(map(repr, near))}")


def _full(measure: Measure | Mapping[str, Measure], names: Sequence[str]) -> set[str]:
    """The layers measured in full."""
    each = measure if isinstance(measure, Mapping) else dict.fromkeys(names, measure)
    for name, value in each.items():
        if name not in names:
            raise ValueError(f"Monitor: measure names {name!r}, but the watched layers are {', '.join(map(repr, names))}")
        _choice(f"measure of {name!r}", value, ("traces", "full"))
    return {name for name, value in each.items() if value == "full"}


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"Monitor: {name} is {value!r}, but must be one of {', '.join(map(repr, allowed))}")
