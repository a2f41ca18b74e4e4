"""`patch`: one call that swaps fused layers and image statistics into a Hugging Face model, and its handle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast.backend import request_backend, withdraw_backend
from ras_fast.checks import check_flags
from ras_fast.memory import is_out_of_memory
from ras_fast.ops._check import FLOATS, is_integer, is_tensor
from ras_fast.ops.attention import REDUCTIONS
from ras_fast.patching.cache_values import lacks_rows
from ras_fast.patching.fusion import Fused, fuse
from ras_fast.patching.growing_cache import grow_in_place
from ras_fast.patching.image_statistics import link
from ras_fast.patching.layers import FusedNorm, SteeredLayer, named_parameters
from ras_fast.patching.linear import speed_up_linears
from ras_fast.patching.mlp import fuse_mlps
from ras_fast.patching.report import Report
from ras_fast.patching.state import Collection, ModelState, Monitor, Statistics
from ras_fast.patching.steering import Probe, Site, Steering
from ras_fast.patching.structure import find_decoder
from ras_fast.patching.towers import lay_out_by_rows, speed_up_gelus, speed_up_towers
from ras_fast.patching.trace import Trace, trace
from ras_fast.patching.tracking import CrossRegionTracker
from ras_fast.patching.undo import Undo, runs
from ras_fast.regions import RegionMap
from ras_fast.weights import modules_of

_PATCH = "_ras_fast_patch"  # attribute of a patched text model


def patch(
    model: nn.Module,
    *,
    regions: bool = True,
    norms: bool = True,
    linears: bool = True,
    caches: bool = True,
    backend: str = "auto",
) -> Patch:
    """Makes a Hugging Face model fast and observable, in place.

    The text model runs on a few random tokens, then every fused layer and every attention on what its original was given there,
    then the text model once more, also behind padding and in steps. Only what agrees is kept. Hooks on the model see all this.

    Args:
        model: a transformers model (or a wrapper of one, such as PEFT's) in eval mode. A text-only model gets norms alone.
        regions: use this package's attention, so that `output_attentions=True` gives, for each layer, how much attention
            falls on each image [B, Hq, Lq, R], and `Patch.collect` and heat maps work; in vision towers where that is faster.
        norms: fuse each residual add with the norm after it, and what rotates queries and keys into one kernel.
        linears: run the decoder layers' and the head's `torch.nn.Linear` by `ops.linear` where that is faster, as in a step,
            and the first half of gated MLPs as one; all of the model's where the processor lacks instructions for their dtype.
        caches: let a `DynamicCache` grow in place where its copies at every step would be large.
        backend: "auto", or the backend to force until `unpatch` ("cuda", "triton", "cpu", "torch"), as `ras_fast.set_backend`
            does: for the whole process, not for this model alone. Of several patched models the last one counts.

    Returns:
        The handle: `unpatch()`, also as a context manager; `report()`; `collect`, `steering`, `region_map`.

    Raises:
        TypeError: not a transformers model with decoder layers, or its text model does not run from tokens alone.
        ValueError: in training mode, patched already, with the config object of another patched model, or an argument has no
            such value.
        RuntimeError: `backend` is not available here; says what mends it. Or memory ran out: it may do at the next call.

    A failure half-way leaves the model as it was.
    """
    check_flags(regions=regions, norms=norms, linears=linears, caches=caches)
    handle = Patch(model)
    try:
        with _without_autocast(model):
            handle._apply(regions, norms, linears, caches, backend)
            handle.applied = True
    except BaseException as error:
        handle.unpatch()
        if isinstance(error, RuntimeError) and any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
            raise TypeError(
                f"model has weights that are split among processes, and a part of it does not run by itself ({error}): where "
                "fully_shard did that, call ras_fast.patch before it"
            ) from error
        raise
    return handle


@contextmanager
def patched(model: nn.Module) -> Iterator[Patch]:
    """Inside the `with` block the model is patched; yields its handle. Afterwards it is patched only if it was before."""
    before = Patch.of(model)
    if before is not None:
        yield before
        return
    with patch(model) as handle:
        yield handle


@contextmanager
def _without_autocast(model: Any) -> Iterator[None]:
    """Originals and fused forms are to be compared in the model's own precision, whatever autocast is around `patch`."""
    device = next((p.device.type for p in model.parameters()), "cpu") if isinstance(model, nn.Module) else "cpu"
    if not torch.amp.is_autocast_available(device):
        yield
        return
    with torch.autocast(device, enabled=False):
        yield


class Patch:
    """The handle of a patched model, as `patch` returns it.

    steering: a :class:`Steering`, which says for each sequence by which of `set_steering`'s vectors it is steered, and how far.
    statistics: the :class:`Statistics` of the last forward under `collect`.
    text_model, layers, final_norm: where a method puts its hooks; `final_norm` is None where no module of the text model is
        applied to the last layer's output, or another one than when it was patched.
    applied: whether the model is patched; False after `unpatch`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.text_model, self.layers, self._final_norm = None, None, None
        self.applied = False
        self.steering = Steering()
        self._undo = Undo()
        self._state: ModelState | None = None
        self._fused = Fused()
        self._report: Report | None = None
        self._backend_request = object()  # a deepcopy of it is no request

    @staticmethod
    def of(model: nn.Module) -> Patch | None:
        """The handle of a patched model, for instance of a deepcopy; None where the model is not patched."""
        # By levels: a text model lies above hundreds of a vision tower's modules.
        return next((m.__dict__[_PATCH] for m in modules_of(model) if _PATCH in m.__dict__), None)

    # Life

    def unpatch(self) -> None:
        """Puts everything back as it was before `patch`. Calling it again does nothing."""
        self.applied = False
        withdraw_backend(self._backend_request)  # first: as long as not all is restored, `Patch.of` finds the handle
        self._undo.restore()
        self._fused, self._state = Fused(), None

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()

    def in_force(self) -> list[Any]:
        """The objects that decide what forwards steer and read now. A captured graph is valid as long as they are the same."""
        sites, state = self._sites(), self._state
        rows = [tensor for site in sites for tensor in (site.steering.slot, site.steering.alpha)]
        probes = [layer.probe for layer in self._fused.layers.values() if layer.probe is not None]
        reads = [] if state is None else [state.collection, state.monitor, *state.biases.values()]
        return [*sites, *rows, *probes, *(probe.active for probe in probes), *reads]

    def report(self) -> Report:
        """What was fused, what was not and why; prints as a few lines."""
        return self._report

    @property
    def final_norm(self) -> nn.Module | None:
        norm = self._final_norm
        return norm if norm is not None and _is_among(norm, self.text_model.children()) else None

    # Image statistics

    @property
    def region_map(self) -> RegionMap | None:
        """Where the image tokens of the last forward lie. Set it for forwards that get `inputs_embeds` instead of ids."""
        return self._regions().tracker.forward.regions

    @region_map.setter
    def region_map(self, regions: RegionMap | None) -> None:
        if regions is not None and not isinstance(regions, RegionMap):
            raise ValueError(f"region_map is a {type(regions).__name__}; it must be a RegionMap or None")
        tracker = self._regions().tracker
        tracker.given = tracker.forward.regions = regions

    @property
    def statistics(self) -> Statistics:
        return self._regions().statistics

    @contextmanager
    def collect(
        self,
        rows: int | None = 1,
        *,
        scores: bool = False,
        reduce: str = "mean",
        layers: Iterable[int] | None = None,
    ) -> Iterator[Statistics]:
        """Takes statistics in the forwards inside the block, without `output_attentions`; each forward replaces the last.

        Args:
            rows: the last query rows to look at; None: all.
            scores: also each key's attention from those rows, for heat maps, reduced by `reduce` ("mean", "sum", "max").
            layers: indices to restrict to; None: all.

        Yields:
            The :class:`Statistics` that the forwards fill; also `Patch.statistics` afterwards.

        Raises:
            RuntimeError: image statistics are off; says why.
            ValueError: `rows` is negative or no integer, `reduce` is unknown, or an index is not there.
        """
        state = self._regions()
        if rows is not None and not (is_integer(rows) and rows >= 0):
            raise ValueError(f"rows is {rows!r}; it must be None or an integer of at least 0")
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce is {reduce!r}; it must be one of {', '.join(REDUCTIONS)}")
        layers = None if layers is None else _indices(layers, state.layers)
        with state.collecting(Collection(rows, scores, reduce, None if layers is None else frozenset(layers))) as statistics:
            yield statistics

    def set_monitor(self, layers: Iterable[int], receive: Callable[[int, Tensor], None]) -> Monitor:
        """Reads the mass of some layers while a forward runs, whatever `collect` and `output_attentions` ask for.

        Args:
            layers: indices of decoder layers.
            receive: called in each forward, in each of the layers, with its index and its mass [B, Hq, Lq, R] float32.

        Returns:
            The monitor, whose `active` switches the reading off and on. `clear_monitor()` ends it.

        Raises:
            RuntimeError: image statistics are off; says why.
            ValueError: a layer that is not there, or none, the model has a monitor already, or `receive` cannot be called.
        """
        state = self._regions()
        layers = frozenset(_indices(layers, state.layers))
        if state.monitor is not None:
            raise ValueError("the model has a monitor already: end that first (clear_monitor)")
        _check_callable(receive)
        state.monitor = Monitor(layers, receive)
        return state.monitor

    def clear_monitor(self) -> None:
        """Ends `set_monitor`; nothing happens where there is none, or no patch any more."""
        if self._state is not None:
            self._state.monitor = None

    @property
    def head_counts(self) -> dict[int, int]:
        """Query heads by decoder layer, as statistics are given for them."""
        return {layer: state.heads for layer, state in self._regions().layers.items()}

    @property
    def images_in_prompt(self) -> bool:
        """Whether image tokens are positions of the prompt, not the keys of cross-attention layers."""
        return not isinstance(self._regions().tracker, CrossRegionTracker)

    # Region bias

    def set_region_bias(self, bias: Tensor | Mapping[int, Tensor]) -> None:
        """Raises or lowers the attention of heads to the images, in every forward until `clear_region_bias`.

        Replaces what was set before. Layers that are not named, and the scores of text tokens, are not changed. Biased
        attention runs in this package's kernels; without a bias it is SDPA, bit for bit as before.

        Args:
            bias: added to the scaled score of every image token's key: [Hq] for all images, or [Hq, R] for the first R images
                of a row, floating. By decoder layer, or one tensor for all layers.

        Raises:
            RuntimeError: image statistics are off; says why.
            ValueError: a layer that is not there, a wrong shape, or a value that is not finite.
        """
        state = self._regions()
        states = state.layers
        biases = bias if isinstance(bias, Mapping) else dict.fromkeys(states, bias)
        checked = {}
        for layer, tensor in biases.items():
            if layer not in states:
                raise ValueError(f"bias is for layer {layer!r}; the model has layers {_listed(states)}")
            heads = states[layer].heads
            is_tensor(f"bias of layer {layer}", tensor, "a tensor [Hq] or [Hq, R]")
            if tensor.dim() not in (1, 2) or tensor.shape[0] != heads or not tensor.is_floating_point():
                raise ValueError(
                    f"bias of layer {layer} is {tensor.dtype} {tuple(tensor.shape)}; it must be floating, [Hq] or [Hq, R], "
                    f"with Hq = {heads}"
                )
            checked[layer] = tensor.detach().to(torch.float32, copy=True)
            if not bool(torch.isfinite(checked[layer]).all()):
                raise ValueError(f"bias of layer {layer} holds NaN or infinite values; they must be finite in float32")
        state.biases = checked

    @property
    def region_bias(self) -> dict[int, Tensor]:
        """What `set_region_bias` has put in force, by decoder layer."""
        return dict(self._regions().biases)

    def clear_region_bias(self) -> None:
        """Ends `set_region_bias`: attention is as it was before."""
        if self._state is not None:
            self._state.biases = {}

    def _regions(self) -> ModelState:
        if self._state is None:
            why = self._report.regions if self._report and self._report.regions else "the model is not patched"
            raise RuntimeError(f"image statistics are off: {why}")
        return self._state

    # Steering

    def set_steering(
        self, layer: int | str, vectors: Tensor, *, rows: str | None = None, steering: Steering | None = None
    ) -> None:
        """Steers the residual stream after a decoder layer, or the final norm's output.

        Args:
            layer: index of a decoder layer, whose output h becomes h + α·v; or "final", where the last norm's output y becomes
                (1−α)·y + α·v.
            vectors: [S, d], floating; row s is used where `steering.slot` is s. They are copied.
            rows: which positions of a sequence are steered when `steering` has one entry a sequence: "last" (the default
                for "final") or "all" (the default otherwise, and needed where guessed tokens are checked, as in assisted
                decoding, which reads a token at each position).
            steering: which rows are steered here, and how far; None: `Patch.steering`. A layer follows one of them.

        Raises:
            ValueError: an argument is wrong, the layer cannot be steered, or another `steering` does it already; says why.
            RuntimeError: the model is unpatched.
        """
        steering = self.steering if steering is None else steering
        final = layer == "final"
        rows = rows or ("last" if final else "all")
        if rows not in ("last", "all"):
            raise ValueError(f"rows is {rows!r}; it must be 'last' or 'all'")
        place = self._place(layer)
        if place.site is not None and place.site.steering is not steering:
            raise ValueError(f"layer {layer!r} is steered by something else already: end that first (clear_steering)")
        directions = self._directions("vectors", vectors, place)
        place.site = Site(layer, steering, directions, "lerp" if final else "add", rows == "last")

    def steers(self, layer: int | str) -> bool:
        """Whether `set_steering` can steer this layer, or the "final" norm, now: the patch holds it, and nobody steers it.

        Raises RuntimeError where the model is unpatched.
        """
        if not self.applied:
            raise RuntimeError("the model is not patched")
        place = self._held(layer)
        return place is not None and place.site is None

    def clear_steering(self, steering: Steering | None = None) -> None:
        """Ends the steering of the layers that follow `steering`; None: `Patch.steering`, as in `set_steering`. What a method
        steers goes on."""
        steering = self.steering if steering is None else steering
        for place in self._fused.places:
            if place.site is not None and place.site.steering is steering:
                place.site = None
        steering.slot = steering.alpha = None

    def set_probe(self, layer: int, directions: Tensor, receive: Callable[[Tensor], None]) -> Probe:
        """Reads a decoder layer's output along directions, in the pass over memory that a fused norm after it makes anyway.

        Args:
            layer: index of a decoder layer; what is read is its output h, steered if that layer is.
            directions: [P, d], floating. They are copied.
            receive: called in each forward, before the next layer runs, with [B, L, P+1] float32: h·directions, and ‖h‖² last.

        Returns:
            The probe, whose `active` switches the reading off and on. `clear_probe(layer)` ends it.

        Raises:
            ValueError: an argument is wrong, the layer cannot be read, or it has a probe already; says why.
            RuntimeError: the model is unpatched.
        """
        place = self._place(layer)
        if layer == "final" or place.probe is not None:
            raise ValueError(f"layer is {layer!r}; it must be a decoder layer without a probe")
        _check_callable(receive)
        place.probe = Probe(self._directions("directions", directions, place), receive)
        return place.probe

    def clear_probe(self, layer: int) -> None:
        """Ends `set_probe`; nothing happens where there is no probe."""
        if is_integer(layer) and layer in self._fused.layers:
            self._fused.layers[layer].probe = None

    def _sites(self) -> list[Site]:
        return [place.site for place in self._fused.places if place.site is not None]

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Hook of the text model: all that steers waits for this thread's forward."""
        if torch.compiler.is_compiling():
            return
        for site in self._sites():
            if not site.covers_all() and lacks_rows(kwargs):
                raise RuntimeError(
                    f"layer {site.name!r} is steered by sequence or at the last position, but the model is given a cache "
                    "without rows, as in continuous batching, which puts all sequences into one: most would not be steered. "
                    "Use generate, or steer all positions alike (rows='all', one row)"
                )
            site.waiting.add(get_ident())

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Hook of the text model: an answer must not go out unsteered where others run than the modules that steer it."""
        if torch.compiler.is_compiling():
            return
        for site in self._sites():
            if get_ident() in site.waiting and not self._may_skip(site.name):
                raise RuntimeError(
                    f"layer {site.name!r} is steered, but did not run: it, or its forward, was replaced, or left out, since. "
                    "End the steering first (clear_steering), or unpatch the model"
                )

    def _may_skip(self, layer: int | str) -> bool:
        """Whether the model, as it was patched, may do without a layer: one that has nothing to do where there is no image, or
        one behind those that the config asks for now, as `generate` has it while it drafts by an early exit."""
        place = self._held(layer)
        return isinstance(place, SteeredLayer) and (place.crosses or layer >= self.text_model.config.num_hidden_layers)

    def _place(self, layer: int | str) -> SteeredLayer | FusedNorm:
        if not self.applied:
            raise RuntimeError("the model is not patched")
        place = self._held(layer)
        if place is None:
            able = [name for name in (*self._fused.layers, "final") if self._held(name) is not None]
            raise ValueError(f"layer is {layer!r}; it must be one of {able}, still in the model\n{self._report}")
        return place

    def _held(self, layer: object) -> SteeredLayer | FusedNorm | None:
        """What the patch holds of that index, or by the name "final", and the model still runs; None where there is nothing."""
        if is_integer(layer):
            place, running = self._fused.layers.get(layer), self.layers
        elif isinstance(layer, str) and layer == "final":
            place, running = self._fused.final_norm, self.text_model.children()
        else:
            return None
        there = place is not None and _is_among(_module(place), running) and runs(_module(place), place)
        return place if there else None

    def _directions(self, name: str, directions: Tensor, place: SteeredLayer | FusedNorm) -> Tensor:
        """A copy [S, d] as the kernels take it, on the device where it will be used."""
        d = self.text_model.config.hidden_size
        is_tensor(name, directions, "a tensor [S, d]")
        if directions.dim() != 2 or directions.shape[0] == 0 or directions.shape[1] != d:
            raise ValueError(f"{name} is of shape {tuple(directions.shape)}; it must be [S, d] with S > 0 and d = {d}")
        if directions.dtype not in FLOATS:
            raise ValueError(f"{name} is of dtype {directions.dtype}; it must be float32, float16, bfloat16 or float64")
        weight = next(_module(place).parameters())
        device = directions.device if weight.is_meta else weight.device
        dtype = torch.float32 if directions.dtype == torch.float64 != weight.dtype else directions.dtype
        return directions.detach().to(device, dtype, copy=True, memory_format=torch.contiguous_format)

    def _apply(self, regions: bool, norms: bool, linears: bool, caches: bool, backend: str) -> None:
        root, text_model, decoder_layers = find_decoder(self.model)
        if _PATCH in text_model.__dict__:
            raise ValueError(f"{type(root).__name__} is patched already: call unpatch() on its handle first")
        if self.model.training:
            raise ValueError("model is in training mode; it must be in eval mode: call model.eval()")
        if backend != "auto":
            request_backend(backend, self._backend_request)
        self._undo.whole = root, text_model
        self._undo.set(text_model, _PATCH, self)
        self._undo.hook_before(text_model, partial(_name_arguments, named_parameters(type(text_model).forward)[1:]))
        self._undo.hook_before(text_model, self._begin)
        self._undo.hook_after(text_model, self._end)
        self._report = report = Report(type(root).__name__, len(decoder_layers))
        recorded = _traced(root, text_model, decoder_layers)
        self.text_model, self.layers = text_model, decoder_layers
        self._final_norm = getattr(text_model, recorded.final_norm.name) if recorded.final_norm is not None else None
        if norms:
            self._fused = fuse(root, text_model, recorded, self._undo, report)
        report.regions = "not asked for"
        if regions:
            self._state, report.regions = link(root, text_model, recorded, self._undo)
            speed_up_towers(root, text_model, self._undo, report)
            speed_up_gelus(root, text_model, self._undo, report)
            lay_out_by_rows(root, text_model, self._undo)
        if linears:
            speed_up_linears(root, decoder_layers, recorded.linears, self._undo, report)
            fuse_mlps(decoder_layers, self._undo, report)
        if caches:
            grow_in_place(text_model, self._undo)
        if self._state is not None:
            report.blind = [index for index in range(report.layers) if index not in self._state.layers]


def _traced(root: nn.Module, text_model: nn.Module, layers: nn.ModuleList) -> Trace:
    """`trace`. Raises TypeError for a text model that does not run from tokens alone, or not without autocast."""
    try:
        return trace(text_model, layers)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:  # what it makes of inputs it does not get
        dtypes = {p.dtype for p in text_model.parameters() if p.is_floating_point()}
        if isinstance(error, RuntimeError) and (len(dtypes) < 2 or is_out_of_memory(error)):
            raise
        what = f"the text model of {type(root).__name__}, a {type(text_model).__name__},"
        mixed = f" and, with weights of {len(dtypes)} dtypes, without autocast" if len(dtypes) > 1 else ""
        raise TypeError(f"{what} cannot be traced on tokens alone{mixed} ({type(error).__name__}: {error})") from error


def _name_arguments(names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
    """Hook of the text model, before all others: these look for its arguments by their names."""
    if not 0 < len(args) <= len(names):
        return None
    return (), dict(zip(names, args, strict=False)) | kwargs


def _module(place: SteeredLayer | FusedNorm) -> nn.Module:
    """The module that it stands in for the forward of."""
    return place.norm if isinstance(place, FusedNorm) else place.layer


def _is_among(module: nn.Module, running: Iterable[nn.Module]) -> bool:
    """Whether it, or what torch.compile made of it, is one of these; inside of one, as in PEFT's wrapper, it may not be run."""
    return any(getattr(other, "_orig_mod", other) is module for other in running)


def _indices(given: Iterable[int], layers: Mapping[int, Any]) -> tuple[int, ...]:
    """Raises ValueError unless these are some of the layers."""
    indices = tuple(given) if isinstance(given, Iterable) else ()
    if not indices or not all(is_integer(index) and index in layers for index in indices):
        raise ValueError(f"layers is {given!r}; it must hold at least one index, of those in {_listed(layers)}")
    return indices


def _check_callable(receive: object) -> None:
    if not callable(receive):  # else the first forward would say so
        raise ValueError(f"receive is {receive!r}; it must be a function")


def _listed(layers: Mapping[int, Any]) -> str:
    return f"0..{len(layers) - 1}" if list(layers) == list(range(len(layers))) else ", ".join(map(str, layers))
