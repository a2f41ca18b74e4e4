"""Finds the image tokens of each forward, and keeps what belongs to a sequence with the KV cache.

Images are told apart by the lengths of the features that the model itself computes for them; in families whose features do
not come as one entry per image, by runs of image tokens. A decode step has no image tokens and costs one attribute lookup.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ras_fast.patching.cache_values import given_cache, keep, kept, returned_cache
from ras_fast.regions import Grid, RegionMap, image_regions, join_regions, square_grid

REGIONS = "regions"  # the name that the region map is kept under
_SEEN = "seen"  # and what tells up to where it holds
_TRACKERS = itertools.count()
_MODALITIES = {"image": ("image_token_id", "image_token_index"), "video": ("video_token_id", "video_token_index")}
# Names of arguments that hold images, or may.
_CONTENTS = re.compile(r"pixel_values|(image|video)_(hidden_states|embeds|features)$|^inputs_embeds$")
_MM_TYPE = {"image": 1, "video": 2}  # values of mm_token_type_ids
# Inputs that tell how many patches an image has: images come in any shape.
_SHAPES = {"image_grid_thw", "spatial_shapes", "target_sizes", "image_position_ids", "image_grids"}
_SIZES = "_ras_fast_sizes"  # attribute of a model's features: the inputs by which their images' shapes are told
_QUERIES = ("perceiver_config", "qformer_config", "projector_patch_to_query_dict")  # in the configs of encoders that have some
# Families whose features come by tile, or with all frames of a video in one entry, while a run of image tokens is an image.
_IMAGE_IS_A_RUN = {"internvl", "qianfan_ocr", "got_ocr2", "smolvlm"}


def token_ids(config: Any) -> dict[str, int]:
    """The placeholder token id of each modality that the config names, or else its encoder's, as in Phi-4-multimodal."""
    found = {modality: _first_integer(config, names) for modality, names in _MODALITIES.items()}
    found = {modality: token for modality, token in found.items() if token is not None}
    encoder = getattr(config, "vision_config", None)
    return found if found or encoder is None else token_ids(encoder)


def _first_integer(config: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


@dataclass
class Forward:
    """What the hooks have found out about the forward that a thread runs, or last ran.

    regions: its map. filled: how far it fills the cache. total: the same, where it is known without waiting for the device.
    attentions: whether its caller wants statistics of every layer.
    lengths: by modality, the token count of each image among this forward's features. encoded: the same of the features that
        the model computed last, maybe ahead of their forward. stacked: by modality, whether those have one entry for each row
        of the batch, as from pixels [n, m, channels, height, width]. encoding: of which modality it is computing features.
    pieces: whether it may hold parts of images.
    """

    running: bool = False
    regions: RegionMap | None = None
    filled: int | Tensor | None = None
    total: int | None = None
    attentions: bool = False
    inputs: dict[str, Any] | None = None
    lengths: dict[str, list[int] | None] = field(default_factory=dict)
    encoded: dict[str, list[int] | None] = field(default_factory=dict)
    stacked: dict[str, bool] = field(default_factory=dict)
    encoding: str | None = None
    pieces: bool = False


@dataclass(frozen=True)
class Seen:
    """Up to which `length` a cache was filled under the eyes of the tracker of this number."""

    tracker: int
    length: int | Tensor

    def select(self, rows: Tensor) -> Seen:
        return self

    def repeat_interleave(self, repeats: int) -> Seen:
        return self

    def crop(self, length: int) -> Seen:
        return Seen(self.tracker, min(self.length, length))


class RegionTracker:
    """Hooks of the multimodal model and of its text model. Threads may run forwards at the same time.

    given: a map that the user set, for forwards that bring neither input_ids nor a cache that saw them.
    attentions_asked: whether any forward has asked for statistics so far; else layers need not look for their own forward.
    """

    def __init__(self, multimodal: nn.Module) -> None:
        self.given: RegionMap | None = None
        self.attentions_asked = False
        self._number = next(_TRACKERS)
        self._last = Forward()  # the one that got to the text model last
        self._traced = Forward()  # in a graph, which runs all hooks of a forward and cannot ask for its thread
        self._threads: dict[int, Forward] = {}
        self._tokens = token_ids(multimodal.config)
        if self._tokens.get("video") == self._tokens.get("image"):  # Molmo 2's: each image would be a video as well
            self._tokens.pop("video", None)
        self._runs = multimodal.config.model_type in _IMAGE_IS_A_RUN
        self._parameters = tuple(inspect.signature(multimodal.forward).parameters)
        self._contents = tuple(filter(_CONTENTS.search, self._parameters))
        self._patches = _Patches(multimodal.config, not _SHAPES.isdisjoint(self._parameters))

    @property
    def forward(self) -> Forward:
        """The one that this thread runs; in a thread that runs none, the last one of any thread."""
        own = None if torch.compiler.is_compiling() else self._threads.get(get_ident())
        return own if own is not None and own.running else self._last

    @property
    def interrupted(self) -> bool:
        """Whether another thread's forward has got to the text model since that of this one did."""
        return self.forward is not self._last

    def _own(self) -> Forward:
        return self._traced if torch.compiler.is_compiling() else self._threads.setdefault(get_ident(), Forward())

    def keys(self, batch: int, length: int) -> tuple[Tensor, int]:
        """(ids [batch, length] int32 of the keys of an attention call, R).

        Raises:
            ValueError: no map is known, or it is of another batch size.
        """
        forward = self.forward
        if forward.regions is None:
            raise ValueError(
                "image statistics and region biases need to know where the image tokens are, and this forward brought "
                "neither input_ids nor a cache that saw them, goes on from a cache that was filled while the model was not "
                "patched, or is compiled: set patch.region_map first"
            )
        if forward.regions.ids.shape[0] != batch:
            raise ValueError(f"the region map is of {forward.regions.ids.shape[0]} rows; it must be of the batch's {batch}")
        return forward.regions.keys(length, forward.total), forward.regions.num_regions

    # Hooks, in the order in which they run.

    def before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        own = self._own()
        own.running = True
        own.inputs = dict(zip(self._parameters, args, strict=False)) | kwargs
        own.lengths, own.pieces = {}, False
        for modality, output in (own.inputs.get("mm_encoder_outputs") or {}).items():
            own.lengths[modality] = lengths = self._lengths_of(output)
            if modality == "image":  # `generate` has encoded them ahead, and does not hand on how large they are
                given = {name: value for name, value in own.inputs.items() if value is not None}
                own.inputs = getattr(output, "__dict__", {}).get(_SIZES, {}) | given
            # A chunk's share of the features comes as one entry, whatever they are of.
            if modality in own.encoded and lengths != own.encoded[modality] and len(lengths or ()) == 1:
                own.lengths[modality], own.pieces = None, True

    def features(self, modality: str, inputs: list[Any], sizes: dict[str, Any], compute: Callable[[], Any]) -> Any:
        """What ``compute`` returns, which is noted; on it are noted the ``sizes``, which tell the images' shapes. A graph
        notes nothing: it finds no images, and would be another one the next time. Nor is a video noted as images, as which
        many models compute its features."""
        if torch.compiler.is_compiling() or (own := self._own()).encoding is not None:
            return compute()
        own.encoding = modality
        try:
            output = compute()
        finally:
            own.encoding = None
        own.lengths[modality] = own.encoded[modality] = lengths = self._lengths_of(output)
        stacks = [pixels.shape[0] for pixels in inputs if isinstance(pixels, Tensor) and pixels.dim() == 5]
        own.stacked[modality] = lengths is not None and len(lengths) in stacks
        if hasattr(output, "__dict__"):
            output.__dict__[_SIZES] = sizes
        return output

    def _lengths_of(self, output: Any) -> list[int] | None:
        """The number of tokens of each image, from features with one entry per image; None for features of another form."""
        features = getattr(output, "pooler_output", None)
        if features is None:  # Granite 4 Vision has features for several layers, all of the same lengths
            features = output.deepstack_features[0][1] if getattr(output, "deepstack_features", None) else output
        if isinstance(features, Tensor) and features.dim() == 3:
            return [features.shape[1]] * features.shape[0]
        if isinstance(features, (list, tuple)) and all(isinstance(f, Tensor) for f in features):
            return [f.shape[:-1].numel() for f in features]
        return None

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        own = self._begin(kwargs)
        inputs, own.inputs = own.inputs, None
        cache = given_cache(kwargs)
        past = 0 if cache is None else cache.get_seq_length()
        shape = text_shape(kwargs, inputs)
        length = None if shape is None else shape[1]
        own.filled = None if length is None or torch.compiler.is_compiling() else past + length
        own.total = _total(cache, past, length)
        before = self._known(cache, past)
        if before is not None and own.total is not None and self.given is None and not hasattr(cache, "aim"):
            before = _still_held(before, own.total - length)
        no_image = not own.lengths and (length == 1 or not self._given(inputs))
        if before is not None and (no_image or _covers(before, own.total)):
            own.regions = before  # text alone, or a map that covers this forward's positions already, as the engine's does
        elif inputs is None or torch.compiler.is_compiling():  # finding images waits for the device: not in a graph
            own.regions = before if before is not None else self.given
        else:
            own.regions = self._find(own, inputs, before, int(past), no_image)
        self._keep(cache, own)

    def _known(self, cache: Any, past: int | Tensor) -> RegionMap | None:
        """The map of what a cache holds; None where the model has filled it further while it was not patched."""
        regions, seen = kept(cache, REGIONS), kept(cache, _SEEN)
        if regions is None or seen is None or seen.tracker == self._number or torch.compiler.is_compiling():
            return regions
        return None if int(past) > seen.length else regions

    def _keep(self, cache: Any, own: Forward) -> None:
        """The map, on the cache, where there is one; not from a graph, which cannot make the cache's class one that takes it
        along."""
        if cache is None or torch.compiler.is_compiling():
            return
        if kept(cache, REGIONS) is not own.regions:
            keep(cache, REGIONS, own.regions)
        if own.regions is not None and own.filled is not None and not hasattr(cache, "aim"):
            keep(cache, _SEEN, Seen(self._number, own.filled))

    def _begin(self, kwargs: dict[str, Any]) -> Forward:
        """This thread's forward gets to the text model."""
        self._last = own = self._own()
        own.running, own.attentions = True, bool(kwargs.get("output_attentions"))
        self.attentions_asked = self.attentions_asked or own.attentions
        return own

    def after(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Of the text model and of the multimodal one, also when they fail. A cache that they made gets the map, too."""
        own = self._own()
        own.running, own.inputs = False, None
        self._keep(returned_cache(output), own)

    def _given(self, inputs: dict[str, Any] | None) -> bool:
        """Whether the forward was given images, maybe within embeddings. Else its image tokens, typed by somebody or generated,
        are none."""
        return inputs is not None and any(inputs.get(name) is not None for name in self._contents)

    def _find(
        self, own: Forward, inputs: dict[str, Any], before: RegionMap | None, past: int, no_image: bool
    ) -> RegionMap | None:
        visual = self._visual(inputs)
        if not visual or any(mask.is_meta for mask in visual.values()):
            return before if before is not None else self.given
        if no_image:
            visual = {modality: torch.zeros_like(mask) for modality, mask in visual.items()}
        ids = join_regions([image_regions(mask, self._image_lengths(own, modality, mask)) for modality, mask in visual.items()])
        counts = (ids.amax(1) + 1).tolist() if ids.shape[1] else [0] * ids.shape[0]
        num_regions = max(counts, default=0)
        grids = self._grids(ids, counts, visual.get("image", ids < -1), inputs, own.lengths.get("image"))
        if past == 0:
            return RegionMap(ids, num_regions, grids, validate=False)
        if before is None:
            return self.given  # what the cache holds was not seen
        return before.extend(ids, grids, past, pieces=own.pieces, square=not self._patches.any_shape)

    def _visual(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """For each modality the positions [B, L] bool that hold its tokens."""
        input_ids, types = inputs.get("input_ids"), inputs.get("mm_token_type_ids")
        if input_ids is not None:
            return {modality: input_ids == token for modality, token in self._tokens.items()}
        if types is not None:
            return {modality: types == _MM_TYPE[modality] for modality in self._tokens}
        return {}

    def _image_lengths(self, own: Forward, modality: str, mask: Tensor) -> list[int] | None:
        """Those of the features, if an entry of them is an image: not a tile, nor all images of a row, as in Idefics2."""
        lengths = own.lengths.get(modality)
        if lengths is None and "video" not in self._tokens:  # Molmo 2's, whose videos have the token of images, and come alone
            lengths = own.lengths.get("video")
        by_row = lengths is not None and own.stacked.get(modality) and lengths == mask.sum(1).tolist()
        return None if self._runs or by_row else lengths

    def _grids(
        self, ids: Tensor, counts: list[int], images: Tensor, inputs: dict[str, Any], lengths: list[int] | None
    ) -> list[list[Grid | None]]:
        """Of images; a video, none of whose tokens is among `images` [B, L] bool, has none."""
        if not any(counts):
            return [[] for _ in counts]
        sizes = torch.stack([((ids == region) & images).sum(1) for region in range(max(counts))], 1).tolist()
        count = sum(n > 0 for row in sizes for n in row)
        told = (_patch_counts(inputs), inputs.get("image_grids"), inputs.get("image_sizes"))
        facts = zip(*(t.tolist() if t is not None and t.shape[0] == count else [None] * count for t in told), strict=True)
        # What holds more tokens than any entry of the features is several of them, as InternVL's tiles are.
        longest = max(lengths or [sys.maxsize])
        return [
            [self._patches.grid(n, longest, *next(facts)) if n else None for n in row[:regions]]
            for row, regions in zip(sizes, counts, strict=True)
        ]


def _patch_counts(inputs: dict[str, Any]) -> Tensor | None:
    """(frames, height, width) of each image in patches, by the name under which the family's processor tells it."""
    sizes = next((inputs[name] for name in ("spatial_shapes", "target_sizes") if inputs.get(name) is not None), None)
    places = inputs.get("image_position_ids")  # Gemma 4's [images, patches, (x, y)], −1 where there is no patch
    if sizes is None and places is not None:
        sizes = places.amax(1).flip(1) + 1
    return inputs.get("image_grid_thw") if sizes is None else F.pad(sizes, (1, 0), value=1)


class _Patches:
    """How the tokens of one image lie on it.

    any_shape: the family's images come in any shape, and its processor tells which.
    """

    def __init__(self, config: Any, any_shape: bool) -> None:
        vision = getattr(config, "vision_config", None)
        merge = getattr(config, "spatial_merge_size", getattr(vision, "spatial_merge_size", 1))
        size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
        self.any_shape = any_shape or getattr(vision, "model_type", None) == "pixtral"  # Mistral 3 tells their size in pixels
        # Tokens that are an encoder's queries, as Idefics2's, lie nowhere on the image.
        self._queries = any(hasattr(config, name) for name in _QUERIES)
        self._step = patch * merge if isinstance(patch, int) else None
        # LLaVA-Next and -OneVision: a square view of the whole image comes first, then its tiles.
        tiled = hasattr(config, "image_grid_pinpoints") and isinstance(size, int)
        self._view = size // patch if tiled else None

    def grid(
        self, tokens: int, longest: int, thw: list[int] | None, view: list[int] | None, pixels: list[int] | None
    ) -> Grid | None:
        """The patches (h, w) that the first tokens are; None where that cannot be told.

        longest: the most tokens that the encoder makes at once.
        thw, view, pixels: what the forward was told of the image: (frames, height, width) in patches, that of the view of the
            whole image that comes first (Molmo 2) and what follows it, `image_sizes`.
        """
        if self._queries or tokens > longest:
            return None
        if view is not None:
            return view[0], view[1]
        if self._view is not None:
            return (self._view, self._view) if pixels is not None and self._view**2 <= tokens else None
        if thw is not None:
            return _merged(tokens, *thw)
        if pixels is not None and self._step is not None:
            height, width = (side // self._step for side in pixels)
            return (height, width) if height * width == tokens else None
        return None if self.any_shape else square_grid(tokens)


def _merged(tokens: int, frames: int, height: int, width: int) -> Grid | None:
    """The grid of tokens each of which merges a square of an image's patches; None where there are other tokens among them, as
    HunYuan-VL's newlines. How many patches are merged goes by several names in configs, and by image in VideoLLaMA 3."""
    side = max(math.isqrt(frames * height * width // tokens), 1)
    height, width = height // side, width // side
    return (height, width) if frames * height * width == tokens else None


class CrossRegionTracker(RegionTracker):
    """The same for a model that reaches its images by cross-attention, as Mllama: the map is of those layers' keys.

    Every image has as many keys as the largest number of tiles gives. Images that only pad a row of the batch are in no region.
    """

    def __init__(self, multimodal: nn.Module) -> None:
        super().__init__(multimodal)
        self._tiles = multimodal.config.vision_config.max_num_tiles

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        own = self._begin(kwargs)
        inputs, own.inputs = own.inputs or {}, None
        cache, states = given_cache(kwargs), kwargs.get("cross_attention_states")
        past = 0 if cache is None else cache.get_seq_length()
        batch, length = text_shape(kwargs, inputs)[:2]
        own.filled = None if torch.compiler.is_compiling() else past + length
        own.regions = before = self._known(cache, past)
        if before is None and not torch.compiler.is_compiling() and int(past) > 0:
            own.regions = self.given  # what the cache holds was not seen
        elif states is not None:
            images = self._images(batch, states, inputs.get("aspect_ratio_ids"))
            own.regions = images if before is None else before.extend(images.ids, images.grids, before.ids.shape[1])
        elif before is None and self.given is not None:
            own.regions = self.given
        elif before is None:
            ids = torch.empty(batch, 0, dtype=torch.int32, device=next(module.parameters()).device)
            own.regions = RegionMap(ids, 0)
        self._keep(cache, own)

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
        encoder = getattr(self.module.config, "vision_config", None)
        if kwargs.get("output_attentions") and getattr(encoder, "_attn_implementation", "eager") != "eager":
            kwargs["output_attentions"] = False  # of the text alone: the encoder would give none, but warn, which breaks graphs
        get = getattr(type(self.module), f"get_{self.modality}_features")
        compute = partial(get, self.module, *args, **kwargs)
        sizes = {name: value for name, value in kwargs.items() if name in _SHAPES or name == "image_sizes"}
        return self.tracker.features(self.modality, [*args, *kwargs.values()], sizes, compute)


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


def _still_held(regions: RegionMap, past: int) -> RegionMap:
    """Of the positions that the cache still holds: it may have been cut layer by layer, which its own `crop` and `reset`, that
    the map follows, did not see. A map that was found is never longer for another reason."""
    return regions.crop(past) if past < regions.ids.shape[1] else regions


def _covers(regions: RegionMap, total: int | None) -> bool:
    return total is not None and regions.ids.shape[1] >= total
