"""`patch`: one call that swaps fused layers and image statistics into a Hugging Face model, and its handle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast.backend import request_backend, withdraw_backend
from ras_fast.ops.attention import REDUCTIONS
from ras_fast.patching import fusion
from ras_fast.patching.attention import STATE
from ras_fast.patching.layers import FusedNorm, SteeredLayer, first
from ras_fast.patching.state import AttentionState, Collection, ModelState, Monitor, Statistics
from ras_fast.patching.steering import Probe, Site, Steering
from ras_fast.patching.trace import LayerTrace, Trace, compare, reproduce, trace
from ras_fast.patching.tracking import CrossRegionTracker, RecordFeatures, RegionTracker, token_ids
from ras_fast.patching.undo import Undo, forward_slot
from ras_fast.regions import RegionMap
from ras_fast.registration import EXPLICIT, NAME, register

_PATCH = "_ras_fast_patch"  # attribute of a patched text model
_NO_INTERFACE = "do not go through transformers' attention interface"


@dataclass
class Report:
    """What `patch` did.

    fused_norms: residual adds that are fused with the norm after them, out of `norms` such adds.
    unfused: what stayed as it was, by module name, and why.
    regions: None where image statistics are on, else why they are not.
    blind: where they are on, the decoder layers without: those that do not go through transformers' attention interface.
    """

    model: str
    layers: int
    fused_layers: int
    fused_norms: int
    norms: int
    unfused: dict[str, str] = field(default_factory=dict)
    regions: str | None = None
    blind: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.fused_layers} of {self.layers} decoder layers fused, "
            f"{self.fused_norms} of {self.norms} residual adds with their norm",
            f"image statistics: {self._statistics()}",
        ]
        return "\n".join([*lines, *(f"  {name}: {why}" for name, why in self.unfused.items())])

    def _statistics(self) -> str:
        if self.regions is not None:
            return f"off, {self.regions}"
        return f"on, but for the layers {', '.join(map(str, self.blind))}, which {_NO_INTERFACE}" if self.blind else "on"


def patch(model: nn.Module, *, regions: bool = True, norms: bool = True, backend: str = "auto") -> Patch:
    """Makes a Hugging Face model fast and observable, in place.

    The text model runs on a few random tokens, then every fused layer and every attention on what its original was given there,
    then the text model once more, also behind padding and in steps. Only what agrees is kept. Hooks on the model see all this.

    Args:
        model: a transformers model (or a wrapper of one, such as PEFT's) in eval mode. A text-only model gets norms alone.
        regions: use this package's attention, so that `output_attentions=True` gives, for each layer, how much attention
            falls on each image [B, Hq, Lq, R], and `Patch.collect` and heat maps work.
        norms: fuse each residual add with the norm after it.
        backend: "auto", or the backend to force until `unpatch` ("cuda", "triton", "cpu", "torch"), as `ras_fast.set_backend`
            does: for the whole process, not for this model alone. Of several patched models the last one counts.

    Returns:
        The handle: `unpatch()`, also as a context manager; `report()`; `collect`, `steering`, `region_map`.

    Raises:
        TypeError: not a transformers model with decoder layers, or its text model does not run from tokens alone.
        ValueError: in training mode, patched already, or `backend` is unknown.
        RuntimeError: `backend` is not available here; says what mends it.

    A failure half-way leaves the model as it was.
    """
    handle = Patch(model)
    try:
        with _without_autocast(model):
            handle._apply(regions, norms, backend)
            handle.applied = True
    except BaseException:
        handle.unpatch()
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
        applied to the last layer's output.
    applied: whether the model is patched; False after `unpatch`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.text_model, self.layers, self.final_norm = None, None, None
        self.applied = False
        self.steering = Steering()
        self._undo = Undo()
        self._state: ModelState | None = None
        self._placed: dict[int, SteeredLayer] = {}  # what stands in for a decoder layer
        self._final_norm: FusedNorm | None = None
        self._report: Report | None = None
        self._backend_request: object = None

    @staticmethod
    def of(model: nn.Module) -> Patch | None:
        """The handle of a patched model, for instance of a deepcopy; None where the model is not patched."""
        return next((m.__dict__[_PATCH] for m in model.modules() if _PATCH in m.__dict__), None)

    # Life

    def unpatch(self) -> None:
        """Puts everything back as it was before `patch`. Calling it again does nothing."""
        self.applied = False
        self._undo.restore()
        self._placed.clear()
        self._final_norm = self._state = None
        withdraw_backend(self._backend_request)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.unpatch()

    def in_force(self) -> list[Any]:
        """The objects that decide what forwards steer and read now. A captured graph is valid as long as they are the same."""
        places = [place for place in (*self._placed.values(), self._final_norm) if place is not None]
        sites = [place.site for place in places if place.site is not None]
        rows = [tensor for site in sites for tensor in (site.steering.slot, site.steering.alpha)]
        probes = [(probe, probe.active) for probe in (getattr(place, "probe", None) for place in places) if probe is not None]
        state = self._state
        reads = [] if state is None else [state.collection, state.monitor, *state.biases.values()]
        return [*sites, *rows, *(part for probe in probes for part in probe), *reads]

    def report(self) -> Report:
        """What was fused, what was not and why; prints as a few lines."""
        return self._report

    # Image statistics

    @property
    def region_map(self) -> RegionMap | None:
        """Where the image tokens of the last forward lie. Set it for forwards that get `inputs_embeds` instead of ids."""
        return self._regions().tracker.forward.regions

    @region_map.setter
    def region_map(self, regions: RegionMap | None) -> None:
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
        if rows is not None and (not isinstance(rows, int) or rows < 0):
            raise ValueError(f"rows is {rows!r}; it must be None or an integer of at least 0")
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce is {reduce!r}; it must be one of {', '.join(REDUCTIONS)}")
        layers = None if layers is None else _indices(layers, state.layers)
        previous, outer = state.collection, state.statistics
        state.statistics = Statistics()
        state.collection = Collection(rows, scores, reduce, None if layers is None else frozenset(layers))
        try:
            yield state.statistics
        finally:
            state.collection = previous
            if previous is not None:
                state.statistics = outer

    def set_monitor(self, layers: Iterable[int], receive: Callable[[int, Tensor], None]) -> Monitor:
        """Reads the mass of some layers while a forward runs, whatever `collect` and `output_attentions` ask for.

        Args:
            layers: indices of decoder layers.
            receive: called in each forward, in each of the layers, with its index and its mass [B, Hq, Lq, R] float32.

        Returns:
            The monitor, whose `active` switches the reading off and on. `clear_monitor()` ends it.

        Raises:
            RuntimeError: image statistics are off; says why.
            ValueError: a layer that is not there, or the model has a monitor already.
        """
        state, layers = self._regions(), frozenset(layers)
        if not layers <= set(state.layers):
            raise ValueError(f"layers are {sorted(layers)}; the model has layers {_listed(state.layers)}")
        if state.monitor is not None:
            raise ValueError("the model has a monitor already: end that first (clear_monitor)")
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
        states = self._regions().layers
        biases = bias if isinstance(bias, Mapping) else dict.fromkeys(states, bias)
        checked = {}
        for layer, tensor in biases.items():
            if layer not in states:
                raise ValueError(f"bias is for layer {layer!r}; the model has layers {_listed(states)}")
            heads = states[layer].heads
            if tensor.dim() not in (1, 2) or tensor.shape[0] != heads or not tensor.is_floating_point():
                raise ValueError(
                    f"bias of layer {layer} is {tensor.dtype} {tuple(tensor.shape)}; it must be floating, [Hq] or [Hq, R], "
                    f"with Hq = {heads}"
                )
            if not bool(torch.isfinite(tensor).all()):
                raise ValueError(f"bias of layer {layer} holds NaN or infinite values; they must be finite")
            checked[layer] = tensor.detach().float().clone()
        self._regions().biases = checked

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
            vectors: [S, d]; row s is used where `steering.slot` is s.
            rows: which positions of a sequence are steered when `steering` has one entry a sequence: "last" (the default
                for "final") or "all" (the default otherwise).
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
        place.site = Site(steering, self._directions("vectors", vectors, place), "lerp" if final else "add", rows == "last")

    def steers(self, layer: int | str) -> bool:
        """Whether `set_steering` can steer this layer, or the "final" norm, now: the patch holds it, and nobody steers it."""
        if not self.applied:
            raise RuntimeError("the model is not patched")
        place = self._final_norm if layer == "final" else self._placed.get(layer)
        return place is not None and place.site is None

    def clear_steering(self, steering: Steering | None = None) -> None:
        """Ends all steering; with `steering`, only that of layers which follow it."""
        for place in (*self._placed.values(), self._final_norm):
            if place is not None and place.site is not None and steering in (None, place.site.steering):
                place.site = None
        if steering is None:
            self.steering.slot = self.steering.alpha = None

    def set_probe(self, layer: int, directions: Tensor, receive: Callable[[Tensor], None]) -> Probe:
        """Reads a decoder layer's output along directions, in the pass over memory that a fused norm after it makes anyway.

        Args:
            layer: index of a decoder layer; what is read is its output h, steered if that layer is.
            directions: [P, d].
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
        place.probe = Probe(self._directions("directions", directions, place), receive)
        return place.probe

    def clear_probe(self, layer: int) -> None:
        """Ends `set_probe`; nothing happens where there is no probe."""
        if layer in self._placed:
            self._placed[layer].probe = None

    def _place(self, layer: int | str) -> SteeredLayer | FusedNorm:
        if not self.applied:
            raise RuntimeError("the model is not patched")
        place = self._final_norm if layer == "final" else self._placed.get(layer)
        if place is None:
            able = [*self._placed, *(["final"] if self._final_norm is not None else [])]
            raise ValueError(f"layer is {layer!r}; it must be one of {able}\n{self._report}")
        return place

    def _directions(self, name: str, directions: Tensor, place: SteeredLayer | FusedNorm) -> Tensor:
        """[S, d] on the device where they will be used."""
        d = self.text_model.config.hidden_size
        if directions.dim() != 2 or directions.shape[0] == 0 or directions.shape[1] != d:
            raise ValueError(f"{name} is of shape {tuple(directions.shape)}; it must be [S, d] with S > 0 and d = {d}")
        weight = next((place.norm if isinstance(place, FusedNorm) else place.layer).parameters())
        return directions.detach() if weight.is_meta else directions.detach().to(weight.device)

    # Patching

    def _apply(self, regions: bool, norms: bool, backend: str) -> None:
        root, text_model, decoder_layers = find_decoder(self.model)
        if _PATCH in text_model.__dict__:
            raise ValueError(f"{type(root).__name__} is patched already: call unpatch() on its handle first")
        if self.model.training:
            raise ValueError("model is in training mode; it must be in eval mode: call model.eval()")
        if backend != "auto":
            self._backend_request = request_backend(backend)
        self._undo.set(text_model, _PATCH, self)
        self._report = Report(type(root).__name__, len(decoder_layers), 0, 0, 0)
        try:
            recorded = trace(text_model, decoder_layers)
        except (AttributeError, TypeError, ValueError) as error:  # what the model makes of the inputs that it does not get
            what = f"the text model of {type(root).__name__}, a {type(text_model).__name__},"
            raise TypeError(f"{what} cannot be traced on tokens alone ({type(error).__name__}: {error})") from error
        self.text_model, self.layers = text_model, decoder_layers
        self.final_norm = getattr(text_model, recorded.final_norm.name) if recorded.final_norm is not None else None
        if norms:
            before = self._undo.mark()
            self._fuse(text_model, recorded)
            self._keep_only_if_equal(text_model, recorded, before)
        self._report.regions = self._watch(root, text_model, recorded) if regions else "not asked for"

    def _fuse(self, text_model: nn.Module, recorded: Trace) -> None:
        """Fuses what can be proved, from the trace of the unpatched model."""
        fused_norms = self._fuse_norms(text_model, recorded)
        names = {id(module): name for name, module in text_model.named_modules()}
        report = self._report
        for index, record in enumerate(recorded.layers):
            shape = fusion.pattern(record, lambda module: isinstance(fused_norms.get(id(module)), FusedNorm))
            report.norms += 1 if shape == "nbb" else 2
            name = names[id(record.module)]
            why = self._fuse_layer(text_model, recorded, index, shape, fused_norms)
            if why is not None:
                report.unfused[name] = why
        for module_id, fused in fused_norms.items():
            if isinstance(fused, str):
                report.unfused[names[module_id]] = fused
        if any(record.crosses for record in recorded.layers):
            handle = text_model.register_forward_hook(self._forget_skipped)
            self._undo.hooked(text_model._forward_hooks, handle=handle)

    def _keep_only_if_equal(self, text_model: nn.Module, recorded: Trace, before: int) -> None:
        """Undoes all fusion where the text model gives something else with it."""
        why = compare(text_model, recorded)
        if why is not None:
            self._undo.restore(before)
            self._placed.clear()
            self._final_norm = None
            self._report.fused_layers = self._report.fused_norms = 0
            self._report.unfused = {type(text_model).__name__: f"with fused layers it {why}"}

    def _forget_skipped(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Without images, cross-attention layers are skipped and the norms computed ahead for them are never fetched."""
        for layer in self._placed.values():
            if layer.end is not None:
                layer.end.forget()

    def _fuse_norms(self, text_model: nn.Module, recorded: Trace) -> dict[int, FusedNorm | str]:
        """By id of a norm module: its fused form, now in place of its forward, or why there is none."""
        calls = [(record.module, call) for record in recorded.layers for call in record.calls]
        if recorded.final_norm is not None:
            calls.append((text_model, recorded.final_norm))
        fused: dict[int, FusedNorm | str] = {}
        for parent, call in calls:
            module = getattr(parent, call.name)
            if not _looks_like_norm(module) or id(module) in fused:
                continue
            with torch.no_grad():
                fused[id(module)] = candidate = fusion.fuse_norm(module, call)
            if isinstance(candidate, FusedNorm):
                self._undo.set(module, forward_slot(module), candidate)
        if recorded.final_norm is not None:
            last = fused.get(id(getattr(text_model, recorded.final_norm.name)))
            self._final_norm = last if isinstance(last, FusedNorm) else None
        return fused

    def _fuse_layer(self, text_model, recorded, index: int, shape: str, fused_norms) -> str | None:
        """Fuses one layer; returns why not. One that cannot be fused can still be steered and read."""
        record = recorded.layers[index]
        if not record.called:
            return "is not called"
        slot = forward_slot(record.module)
        if slot is None:
            return "has a forward of its own on the instance already"
        states = (*recorded.sample["input_ids"].shape, text_model.config.hidden_size)
        given = tuple(getattr(first(record.output), "shape", ()))
        if given != states:
            return f"gives {given} instead of hidden states {states}"
        end = self._next_norm(text_model, recorded, index, fused_norms)
        layer, why = self._fused_layer(record, index, shape, fused_norms, end)
        if why is None:
            self._report.fused_layers += 1
            self._report.fused_norms += (layer.middle is not None) + (end is not None)
        else:
            layer = SteeredLayer(record.module, index, end)
            if fusion.differs(layer, record) is not None:
                return why
        if end is not None:
            following = recorded.layers[index + 1 : index + 2]
            end.between = (record.module, *(layer.module for layer in following), end.norm)
        self._undo.set(record.module, slot, layer)
        self._placed[index] = layer
        return why

    def _fused_layer(self, record, index: int, shape: str, fused_norms, end):
        """(the fused form of a layer, None), or (None, why there is none)."""
        if shape not in fusion.PATTERNS:
            return None, f"calls its children in the order {shape!r}; known are {', '.join(fusion.PATTERNS)}"
        names = fusion.roles(record, shape)
        middle = fused_norms.get(id(getattr(record.module, names["middle_norm"]))) if names["middle_norm"] else None
        fused = fusion.fuse_layer(record, index, names, middle, end)
        why = fusion.prove(fused, record)
        return (fused, None) if why is None else (None, why)

    def _next_norm(self, text_model, recorded, index: int, fused_norms) -> FusedNorm | None:
        """The norm that is applied to a layer's output, where it is fused and on the same device."""
        output = first(recorded.layers[index].output)
        if index + 1 < len(recorded.layers):
            following = recorded.layers[index + 1]
            parent, call = following.module, next(iter(following.calls), None)
        else:
            parent, call = text_model, recorded.final_norm
        fused = None if call is None else fused_norms.get(id(getattr(parent, call.name)))
        follows = isinstance(fused, FusedNorm) and call.x is output and fused.norm.weight.device == output.device
        return fused if follows else None

    def _watch(self, root: nn.Module, text_model: nn.Module, recorded: Trace) -> str | None:
        """Turns image statistics on; returns why not."""
        multimodal = _owner(root, text_model)
        if multimodal is None or not token_ids(multimodal.config):
            return "the model has no image tokens"
        if len(_stacks(root)) > 1:
            return "an encoder and a decoder share the text model's config"
        if not all(record.called for record in recorded.layers):
            return "not every layer is called on plain text"
        register()
        crosses = any(record.crosses for record in recorded.layers)
        tracker = (CrossRegionTracker if crosses else RegionTracker)(multimodal)
        self._state = ModelState(tracker)
        before = self._undo.mark()
        name = _implementation(text_model.config._attn_implementation, recorded)
        for config in {id(c): c for c in (text_model.config, multimodal.config.get_text_config())}.values():
            self._undo.set(config, "_attn_implementation_internal", name)
        why = self._watch_layers(recorded)
        if why is None:
            self._watch_forwards(multimodal, text_model, tracker)
            why = compare(text_model, recorded)
            why = why and f"the text model under this package's attention {why}"
        if why is not None:
            self._undo.restore(before)
            self._state = None
        return why

    def _watch_layers(self, recorded: Trace) -> str | None:
        """Links each layer's attention to the model's state; returns why image statistics are impossible."""
        for index, record in enumerate(recorded.layers):
            why = self._watch_layer(index, record)
            if why is not None:
                return f"the attention of layer {index} {why}"
        self._report.blind = [index for index in range(len(recorded.layers)) if index not in self._state.layers]
        return None if self._state.layers else f"the layers {_NO_INTERFACE}"

    def _watch_layer(self, index: int, record: LayerTrace) -> str | None:
        """Links a layer's attention, the first child that goes through transformers' attention interface, and proves it on the
        traced call; returns how it fails. A layer without such a child is left out."""
        for call in record.calls:
            child = getattr(record.module, call.name)
            if _looks_like_norm(child) or not isinstance(call.x, Tensor) or call.x.dim() != 3:
                continue
            before = self._undo.mark()
            sees_images = record.crosses or not isinstance(self._state.tracker, CrossRegionTracker)
            state = self._state.layers[index] = AttentionState(self._state, index, sees_images=sees_images)
            self._undo.set(child, STATE, state)
            self._state.tracker.forward.regions = RegionMap(call.x.new_zeros(call.x.shape[:2], dtype=torch.int32), 1)
            with self.collect(layers=[index]) as statistics:
                _, why = reproduce(child, call.args, call.kwargs, call.output)
            self._state.tracker.forward.regions = None
            if why is not None:
                return why
            if index in statistics.mass:
                state.heads = statistics.mass[index].shape[1]
                return None
            self._undo.restore(before)
            del self._state.layers[index]
        return None

    def _watch_forwards(self, multimodal: nn.Module, text_model: nn.Module, tracker: RegionTracker) -> None:
        """Hooks that find the image tokens of each forward."""
        for modality in ("image", "video"):
            if hasattr(type(multimodal), f"get_{modality}_features"):
                self._undo.set(multimodal, f"get_{modality}_features", RecordFeatures(multimodal, modality, tracker))
        self._hook(multimodal, tracker.before_model)
        self._hook(text_model, self._state.before_text)
        for module in (text_model, multimodal):
            handle = module.register_forward_hook(tracker.after, always_call=True)
            self._undo.hooked(module._forward_hooks, module._forward_hooks_always_called, handle=handle)

    def _hook(self, module: nn.Module, function: Any) -> None:
        handle = module.register_forward_pre_hook(function, with_kwargs=True)
        self._undo.hooked(module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, handle=handle)


def _indices(given: Iterable[int], layers: Mapping[int, Any]) -> tuple[int, ...]:
    """Raises ValueError unless these are some of the layers."""
    indices = tuple(given) if isinstance(given, Iterable) else ()
    if not indices or not all(isinstance(index, int) and index in layers for index in indices):
        raise ValueError(f"layers is {given!r}; it must hold at least one index, of those in {_listed(layers)}")
    return indices


def _listed(layers: Mapping[int, Any]) -> str:
    return f"0..{len(layers) - 1}" if list(layers) == list(range(len(layers))) else ", ".join(map(str, layers))


def _implementation(before: str, recorded: Trace) -> str:
    """The name under which this package's attention stands in for `before`.

    SDPA leaves masks out that others are given in full. That is faster, and the same where all modules attend to the text, and
    call themselves causal: not PaliGemma's, and not those of layers that attend to images.
    """
    modules = (getattr(record.module, call.name) for record in recorded.layers for call in record.calls)
    plain = all(getattr(module, "is_causal", True) for module in modules) and not any(r.crosses for r in recorded.layers)
    return NAME if plain or before == "sdpa" else EXPLICIT


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() or (isinstance(weight, Tensor) and weight.dim() == 1)


def find_decoder(model: Any) -> tuple[nn.Module, nn.Module, nn.ModuleList]:
    """(the transformers model, its text model, the text model's decoder layers)."""
    from transformers import PreTrainedModel

    modules = model.modules() if isinstance(model, nn.Module) else ()
    root = next((module for module in modules if isinstance(module, PreTrainedModel)), None)
    if root is None:
        raise TypeError(f"model is a {type(model).__name__}; it must be a transformers model, as AutoModel classes give")
    found = next(iter(_stacks(root)), None)
    if found is None:
        raise TypeError(f"model is a {type(root).__name__}, in which no text model with decoder `layers` was found")
    return root, *found


def _stacks(root: nn.Module) -> list[tuple[nn.Module, nn.ModuleList]]:
    """The models in it with the text config's layers: one, or an encoder and a decoder."""
    from transformers import PreTrainedModel

    config = root.config.get_text_config(decoder=True)
    models = (module for module in root.modules() if isinstance(module, PreTrainedModel) and module.config is config)
    stacks = ((model, getattr(model, "layers", None)) for model in models)
    return [(model, layers) for model, layers in stacks if isinstance(layers, nn.ModuleList) and len(layers)]


def _owner(root: nn.Module, text_model: nn.Module) -> nn.Module | None:
    """The multimodal model: the innermost one around the text model whose config names image tokens."""
    around = (m for m in root.modules() if hasattr(m, "config") and any(part is text_model for part in m.modules()))
    return next((m for m in reversed(list(around)) if token_ids(m.config)), None)
