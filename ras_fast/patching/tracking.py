"""Finds the image tokens of each forward, and keeps what belongs to a sequence with the KV cache.

Images are told apart by the lengths of the features that the model itself computes for them; in families whose features do
not come as one entry per image, by runs of image tokens. A decode step has no image tokens and costs one attribute lookup.

What one forward decides and later ones need (the map of the images, a gate, a risk) is stored on the KV cache object under a
name (`keep`, `kept`). There it lives as long as the cache, is copied with it, and follows the reordering of its rows.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from ras_fast.patching.attention import is_range
from ras_fast.regions import Grid, RegionMap, image_regions, join_regions, square_grid

REGIONS = "regions"  # the name that the region map is kept under
CACHE_NAMES = ("cache", "past_key_values")  # a forward's KV cache, for transformers from 5.24 on and for those before
_KEPT = "_ras_fast_kept"  # attribute of a KV cache: {name: value}
_MODALITIES = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
_MM_TYPE = {"image": 1, "video": 2}  # values of mm_token_type_ids
# Families whose features come by tile or by row of the batch; there a run of image tokens is a region.
_IMAGE_IS_A_RUN = {"internvl", "idefics3", "smolvlm"}


def token_ids(config: Any) -> dict[str, int]:
    """The placeholder token id of each modality that the config names."""
    found = {modality: _first_integer(config, names) for modality, names in _MODALITIES.items()}
    return {modality: token for modality, token in found.items() if token is not None}


def _first_integer(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


class RegionTracker:
    """Hooks of the multimodal model and of its text model.

    current: the map of the forward that runs, or last ran.
    given: a map that the user set, for forwards that bring neither input_ids nor a cache that saw them.
    attentions: whether the caller of this forward wants statistics of every layer.
    """

    def __init__(self, multimodal: nn.Module) -> None:
        self.current: RegionMap | None = None
        self.given: RegionMap | None = None
        self.attentions = False
        self._tokens = token_ids(multimodal.config)
        self._runs = multimodal.config.model_type in _IMAGE_IS_A_RUN
        self._parameters = tuple(inspect.signature(multimodal.forward).parameters)
        self._patches = _Patches(multimodal.config, "image_grid_thw" in self._parameters)
        self._inputs: dict[str, Any] | None = None
        self._lengths: dict[str, list[int] | None] = {}
        self._encoded: dict[str, list[int] | None] = {}  # of the features that the model computed last
        self._pieces = False  # whether this forward may hold parts of images
        self._total: int | None = None

    def keys(self, batch: int, length: int) -> tuple[Tensor, int]:
        """(ids [batch, length] int32 of the keys of an attention call, R).

        Raises:
            ValueError: no map is known, or it is of another batch size.
        """
        if self.current is None:
            raise ValueError(
                "image statistics and region biases need to know where the image tokens are, and this forward brought "
                "neither input_ids nor a cache that saw them, or goes on from a cache that was filled before the model was "
                "patched: set patch.region_map first"
            )
        if self.current.ids.shape[0] != batch:
            raise ValueError(f"the region map is of {self.current.ids.shape[0]} rows; it must be of the batch's {batch}")
        return self.current.keys(length, self._total), self.current.num_regions

    # Hooks, in the order in which they run.

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        self._lengths, self._pieces = {}, False
        for modality, output in (self._inputs.get("mm_encoder_outputs") or {}).items():
            self._lengths[modality] = lengths = self._lengths_of(output)
            # A chunk's share of the features comes as one entry, whatever they are of.
            if modality in self._encoded and lengths != self._encoded[modality] and len(lengths or ()) == 1:
                self._lengths[modality], self._pieces = None, True

    def features(self, modality: str, output: Any) -> None:
        """The model computed features."""
        self._lengths[modality] = self._encoded[modality] = self._lengths_of(output)

    def _lengths_of(self, output: Any) -> list[int] | None:
        """The number of tokens of each image, from features with one entry per image; None for features of another form."""
        features = getattr(output, "pooler_output", None)
        features = output if features is None else features
        if isinstance(features, Tensor) and features.dim() == 3:
            return [features.shape[1]] * features.shape[0]
        if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
            return [f.shape[:-1].numel() for f in features]
        return None

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs, self._inputs = self._inputs, None
        self.attentions = bool(kwargs.get("output_attentions"))
        cache = given_cache(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        before = kept(cache, REGIONS)
        length = _length(inputs, kwargs)
        self._total = _total(cache, past, length)
        no_image = length == 1 and not self._lengths
        if before is not None and (no_image or _covers(before, self._total)):
            self.current = before  # a decode step, or a map that covers this forward's positions already, as the engine's does
        elif inputs is None or torch.compiler.is_compiling():  # finding images waits for the device: not in a graph
            self.current = before if before is not None else self.given
        else:
            self.current = self._find(inputs, before, int(past))
        if cache is not None and self.current is not before:
            keep(cache, REGIONS, self.current)

    def after_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        """A cache that the model made itself gets the map, too."""
        cache = returned_cache(output)
        if cache is not None and kept(cache, REGIONS) is not self.current:
            keep(cache, REGIONS, self.current)

    def _find(self, inputs: dict[str, Any], before: RegionMap | None, past: int) -> RegionMap | None:
        visual = self._visual(inputs)
        if not visual:
            return before if before is not None else self.given
        ids = self._ids(visual)
        counts = (ids.amax(1) + 1).tolist() if ids.shape[1] else [0] * ids.shape[0]
        num_regions = max(counts, default=0)
        grids = self._grids(ids, counts, inputs)
        if past == 0:
            return RegionMap(ids, num_regions, grids, validate=False)
        if before is None:
            return self.given  # what the cache holds was not seen
        return before.extend(ids, grids, past, pieces=self._pieces)

    def _visual(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """For each modality the positions [B, L] bool that hold its tokens."""
        input_ids, types = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
        if input_ids is not None:
            return {modality: input_ids == token for modality, token in self._tokens.items()}
        if types is not None:
            return {modality: types == _MM_TYPE[modality] for modality in self._tokens}
        return {}

    def _ids(self, visual: dict[str, Tensor]) -> Tensor:
        lengths = {} if self._runs else self._lengths
        return join_regions([image_regions(mask, lengths.get(modality)) for modality, mask in visual.items()])

    def _grids(self, ids: Tensor, counts: list[int], inputs: dict[str, Any]) -> list[list[Grid | None]]:
        if not any(counts):
            return [[] for _ in counts]
        sizes = torch.stack([(ids == region).sum(1) for region in range(max(counts))], 1).tolist()
        told = (inputs.get(name) for name in ("image_grid_thw", "image_sizes"))
        thw, pixels = (iter(t.tolist() if t is not None and t.shape[0] == sum(counts) else ()) for t in told)
        # What holds more tokens than any entry of the features is several of them, as InternVL's tiles are.
        longest = max(self._lengths.get("image") or [sys.maxsize])
        return [
            [self._patches.grid(n, next(thw, None), next(pixels, None)) if n <= longest else None for n in sizes[row][:count]]
            for row, count in enumerate(counts)
        ]


class _Patches:
    """How the tokens of one image lie on it.

    any_shape: the family's images come in any shape, and `image_grid_thw` tells which.
    """

    def __init__(self, config: Any, any_shape: bool) -> None:
        vision = getattr(config, "vision_config", None)
        merge = getattr(config, "spatial_merge_size", getattr(vision, "spatial_merge_size", 1))
        size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
        self._any_shape, self._merge = any_shape, merge
        self._step = patch * merge if isinstance(patch, int) else None
        # LLaVA-Next and -OneVision: a square view of the whole image comes first, then its tiles.
        tiled = hasattr(config, "image_grid_pinpoints") and isinstance(size, int)
        self._view = size // patch if tiled else None

    def grid(self, tokens: int, thw: list[int] | None, pixels: list[int] | None) -> Grid | None:
        """The patches (h, w) that the first tokens are; None where that cannot be told.

        thw, pixels: what the forward was told of the image's size, as `image_grid_thw` and `image_sizes`.
        """
        if self._view is not None:
            return (self._view, self._view) if pixels is not None and self._view**2 <= tokens else None
        if thw is not None:
            return thw[1] // self._merge, thw[2] // self._merge
        if pixels is not None and self._step is not None:
            height, width = (side // self._step for side in pixels)
            return (height, width) if height * width == tokens else None
        return None if self._any_shape else square_grid(tokens)


class CrossRegionTracker(RegionTracker):
    """The same for a model that reaches its images by cross-attention, as Mllama: the map is of those layers' keys.

    Every image has as many keys as the largest number of tiles gives. Images that only pad a row of the batch are in no region.
    """

    def __init__(self, multimodal: nn.Module) -> None:
        super().__init__(multimodal)
        self._tiles = multimodal.config.vision_config.max_num_tiles

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs, self._inputs = self._inputs or {}, None
        self.attentions = bool(kwargs.get("output_attentions"))
        cache, states = given_cache(kwargs), kwargs.get("cross_attention_states")
        before = kept(cache, REGIONS)
        self.current = before if before is not None else self.given
        if states is not None:
            images = self._images(_batch(inputs, kwargs), states, inputs.get("aspect_ratio_ids"))
            self.current = images if before is None else before.extend(images.ids, images.grids, before.ids.shape[1])
        elif self.current is None:
            ids = torch.empty(_batch(inputs, kwargs), 0, dtype=torch.int32, device=next(module.parameters()).device)
            self.current = RegionMap(ids, 0)
        if cache is not None and self.current is not before:
            keep(cache, REGIONS, self.current)

    def _images(self, batch: int, states: Tensor, aspect_ratio_ids: Tensor | None) -> RegionMap:
        """From states [B · images · tiles, patches, d] and the images' aspect ratios [B, images], 0 where there is none."""
        keys, per_image = states.shape[:-1].numel() // batch, self._tiles * states.shape[1]
        ids = torch.arange(keys, dtype=torch.int32, device=states.device).div(per_image, rounding_mode="floor")
        ids = ids.expand(batch, keys)
        counts = [keys // per_image] * batch
        if aspect_ratio_ids is not None:
            there = (aspect_ratio_ids != 0).to(states.device)
            ids = torch.where(there.repeat_interleave(per_image, 1), ids, -1)
            if not torch.compiler.is_compiling():
                counts = there.sum(1).tolist()
        return RegionMap(ids, keys // per_image, [[None] * count for count in counts], validate=False)


class RecordFeatures:
    """Stands in for `get_image_features` or `get_video_features` of one model, and tells the tracker what it returned."""

    def __init__(self, module: nn.Module, modality: str, tracker: RegionTracker) -> None:
        self.module, self.modality, self.tracker = module, modality, tracker
        self.__signature__ = inspect.signature(getattr(module, f"get_{modality}_features"))  # generate() reads it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = getattr(type(self.module), f"get_{self.modality}_features")(self.module, *args, **kwargs)
        self.tracker.features(self.modality, output)
        return output


def _length(inputs: dict[str, Any] | None, kwargs: dict[str, Any]) -> int | None:
    shape = text_shape(kwargs, inputs)
    return None if shape is None else shape[1]


def _batch(inputs: dict[str, Any] | None, kwargs: dict[str, Any]) -> int:
    return text_shape(kwargs, inputs)[0]


def text_shape(kwargs: dict[str, Any], inputs: dict[str, Any] | None = None) -> torch.Size | None:
    """[B, L, ...] of what a text model is called with, else of its multimodal model's inputs; None where neither says."""
    for source, name in ((kwargs, "inputs_embeds"), (kwargs, "input_ids"), (inputs or {}, "input_ids")):
        if source.get(name) is not None:
            return source[name].shape
    return None


def _total(cache: Any, past: int | Tensor, length: int | None) -> int | None:
    """Positions seen once this forward is over, where that is known without a host sync; sliding caches need it."""
    if length is None:
        return None
    if isinstance(past, int):
        return past + length
    counters = (getattr(layer, "cumulative_length_int", None) for layer in cache.layers)
    seen = next((count for count in counters if count is not None), None)
    return None if seen is None else seen + length


def _covers(regions: RegionMap, total: int | None) -> bool:
    return total is not None and regions.ids.shape[1] >= total


class PerSequence(Protocol):
    """What can be kept on a cache: a value with an entry for each batch row, which follows what happens to the cache."""

    def select(self, rows: Tensor) -> PerSequence:
        """The entries of `rows` [B'] int64, in that order."""

    def repeat_interleave(self, repeats: int) -> PerSequence:
        """Each entry `repeats` times in a row."""

    def crop(self, length: int) -> PerSequence:
        """After the cache was cut to its first `length` positions."""


@dataclass(frozen=True)
class Rows:
    """A tensor [B, ...] with one entry per sequence, whatever the sequence's length: a gate, for instance."""

    tensor: Tensor

    def select(self, rows: Tensor) -> Rows:
        return Rows(self.tensor.index_select(0, rows.to(self.tensor.device)))

    def repeat_interleave(self, repeats: int) -> Rows:
        return Rows(self.tensor.repeat_interleave(repeats, 0))

    def crop(self, length: int) -> Rows:
        return self


def cache_name(module: nn.Module) -> str:
    """The name of the KV cache among the arguments of a model's forward.

    Raises ValueError where there is none that is known: what is kept between the steps of an answer could not be found again.
    """
    parameters = inspect.signature(type(module).forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    kind = type(module).__name__
    raise ValueError(f"{kind}.forward takes no KV cache by the name {' or '.join(CACHE_NAMES)}, and cannot be defended")


def given_cache(kwargs: dict[str, Any]) -> Any:
    """The KV cache among a forward's keyword arguments; None without one. The blocks of continuous batching, which go by the
    same name, are none: they have no rows."""
    for name in CACHE_NAMES:
        if hasattr(kwargs.get(name), "get_seq_length"):
            return kwargs[name]
    return None


def returned_cache(output: Any) -> Any:
    """The KV cache in a forward's output; None without one."""
    new, old = CACHE_NAMES
    return getattr(output, new) if hasattr(output, new) else getattr(output, old, None)  # where both are, the old one warns


def keep(cache: Any, name: str, value: PerSequence | None) -> None:
    """Stores a value on a KV cache under `name` and makes it follow `reorder_cache`, `batch_*` and `crop`; `reset` drops it."""
    if _KEPT not in cache.__dict__:
        cache.__class__ = _following(type(cache))
    # A new dict, so that a shallow copy of the cache keeps what it had.
    cache.__dict__[_KEPT] = cache.__dict__.get(_KEPT, {}) | {name: value}


def kept(cache: Any, name: str) -> Any:
    """What was kept under `name`; None where there is nothing, or no cache."""
    values = getattr(cache, _KEPT, None)
    return None if values is None else values.get(name)


def kept_rows(cache: Any) -> dict[str, Rows]:
    """The kept values that are `Rows`, by name."""
    values = getattr(cache, _KEPT, {})
    return {name: value for name, value in values.items() if isinstance(value, Rows)}


class PromptState:
    """A method's decision about each sequence, made when its prompt is read and found again at each decode step.

    value: the decision that holds for the forward that runs. None: neither this forward nor an earlier one with the same cache
        has decided yet, so the forward reads a prompt. Without a cache every forward does.
    prefills: whether `generate` is reading a prompt just now. A single token on a cache that has a value is then the last piece
        of the prompt, and not a decode step.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.value: Any = None
        self.prefills = False
        self._patch: Any = None
        self._cache: Any = None
        self._mask: Any = None

    def decide(self, value: PerSequence) -> None:
        """Sets the value for this forward and for those to come with its cache. No host sync."""
        self.value = value
        if self._cache is not None:
            keep(self._cache, self.name, value)

    def reads_prompt(self, length: int) -> bool:
        """Whether this forward, of so many positions, reads a prompt or a piece of one; else it is a decode step."""
        return self.value is None or length > 1 or self.prefills

    def ends_in_padding(self, batch: int, length: int, device: torch.device) -> Tensor:
        """[batch] bool: the rows that are padded on the right, so that their prompt cannot be judged at the last position.
        No host sync. A row of which only left padding has come so far is not among them."""
        mask = self._mask
        if isinstance(mask, dict):  # by kind of layer
            mask = mask.get("full_attention", next(iter(mask.values()), None))
        if mask is None or is_range(mask):  # which ends with the forward
            return torch.zeros(batch, dtype=torch.bool, device=device)
        if not isinstance(mask, Tensor):
            return torch.ones(batch, dtype=torch.bool, device=device)  # it cannot be known
        if mask.dim() == 2:
            seen, own = mask != 0, mask.shape[1] - 1
        else:  # what the last position sees, booleans or scores to add
            seen = mask[:, 0, -1]
            seen = seen if seen.dtype == torch.bool else seen >= 0
            own = (0 if self._cache is None else self._cache.get_seq_length()) + length - 1
        last = seen.shape[1] - 1
        ends = seen[:, min(own, last)] if isinstance(own, int) else seen.index_select(1, own.clamp(max=last).reshape(1))[:, 0]
        return (seen.any(1) & ~ends).to(device).expand(batch)

    @contextmanager
    def watch(self, patch: Any) -> Iterator[PromptState]:
        """Follows the forwards of a `Patch`'s model inside the block. Hooks that read `value` are to be registered in it."""
        cache_name(patch.text_model)
        self._patch = patch
        with ExitStack() as stack:
            stack.enter_context(patch.text_model.register_forward_pre_hook(self._before_text, with_kwargs=True))
            stack.enter_context(patch.text_model.register_forward_hook(self._after_text))
            stack.enter_context(replaced(patch.model, "_prefill", partial(_Prefill, self)))
            yield self

    def _before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._patch.applied:
            raise RuntimeError("the model was unpatched while a method defends it: its answer would not be steered")
        self._mask, self._cache = kwargs.get("attention_mask"), given_cache(kwargs)
        self.value = kept(self._cache, self.name)

    def _after_text(self, module: nn.Module, args: tuple, output: Any) -> None:
        """A cache that the model made itself gets the value, too."""
        cache = returned_cache(output)
        if cache is not None and kept(cache, self.name) is not self.value:
            keep(cache, self.name, self.value)
        self._cache = self._mask = None


class _Prefill:
    """Stands in for the part of `generate` that reads a prompt, in as many forwards as it likes."""

    def __init__(self, state: PromptState, read: Callable[..., Any]) -> None:
        self.state, self.read = state, read

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.state.prefills = True
        try:
            return self.read(*args, **kwargs)
        finally:
            self.state.prefills = False


@contextmanager
def replaced(model: nn.Module, name: str, stand_in: Callable[[Callable[..., Any]], Any]) -> Iterator[None]:
    """Inside the block the model's method of this name, which `generate` calls, is replaced by `stand_in(method)`.

    Raises RuntimeError for a model that has `generate` but no such method: a defence that relies on it would not see prompts.
    """
    owner = next((m for m in model.modules() if hasattr(type(m), name)), None)
    if owner is None:
        if any(hasattr(type(m), "generate") for m in model.modules()):
            raise RuntimeError(f"generate() of this version of transformers has no {name}, which this method relies on")
        yield
        return
    before = owner.__dict__.get(name)
    owner.__dict__[name] = stand_in(getattr(owner, name))
    try:
        yield
    finally:
        if before is None:
            del owner.__dict__[name]
        else:
            owner.__dict__[name] = before


@contextmanager
def last_logits_only(model: nn.Module, prompt_length: Callable[[], int]) -> Iterator[None]:
    """Refuses assisted decoding inside the block, for methods that judge a prompt at its last token.

    The first forward of assisted decoding ends in guessed tokens: the method would judge these, and the tokens that are
    accepted in that forward would leave unsteered.

    prompt_length: gives the length of the prompt in the forward that runs; 0 where it reads none.
    """

    def refuse(what: str) -> NoReturn:
        raise RuntimeError(
            f"{what} are wanted, as in assisted decoding; this method judges a prompt at its last position, and needs that to "
            "be the last of its forward"
        )

    def before_head(module: nn.Module, args: tuple) -> None:
        if args[0].dim() == 3 and 1 < args[0].shape[1] < prompt_length():
            refuse(f"the logits of {args[0].shape[1]} positions of a prompt")

    def no_candidates(method: Callable[..., Any]) -> Callable[..., NoReturn]:
        return lambda *args, **kwargs: refuse("guessed tokens after a prompt")

    with (
        model.get_output_embeddings().register_forward_pre_hook(before_head),
        replaced(model, "_get_candidate_generator", no_candidates),
    ):
        yield


def _revive(kind: type) -> Any:
    following = _following(kind)
    return following.__new__(following)


@functools.cache
def _following(kind: type) -> type:
    """The cache class whose rows the kept values follow. A subclass, because a wrapper on the instance would be a reference
    cycle that keeps a cache's memory until the garbage collector runs, and would not survive a deepcopy."""

    def follow(self: Any, change: Callable[[PerSequence], PerSequence]) -> None:
        values = self.__dict__[_KEPT]
        self.__dict__[_KEPT] = {name: None if value is None else change(value) for name, value in values.items()}

    class Following(kind):
        def reorder_cache(self, beam_idx: Tensor) -> None:
            super().reorder_cache(beam_idx)
            follow(self, lambda value: value.select(beam_idx))

        def batch_select_indices(self, indices: Tensor) -> None:
            super().batch_select_indices(indices)
            rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
            follow(self, lambda value: value.select(rows))

        def batch_repeat_interleave(self, repeats: int) -> None:
            super().batch_repeat_interleave(repeats)
            follow(self, lambda value: value.repeat_interleave(repeats))

        def crop(self, *args: int, **kwargs: int) -> None:
            super().crop(*args, **kwargs)
            length = int(self.get_seq_length())
            follow(self, lambda value: value.crop(length))

        def reset(self) -> None:
            super().reset()
            self.__dict__[_KEPT] = {}

        def __reduce_ex__(self, protocol: Any) -> tuple:
            """By the cache's own class, which a pickle can name."""
            _, _, *state = super().__reduce_ex__(protocol)
            return _revive, (kind,), *state

    Following.__name__, Following.__qualname__, Following.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Following
