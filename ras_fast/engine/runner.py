"""A model as the engine uses it, and which models it can use."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ras_fast.batching import SIGHT, is_per_token
from ras_fast.decoding import eos_ids
from ras_fast.engine import recurrence
from ras_fast.engine.kv_cache import CROSS, INDEXED, KVPool
from ras_fast.engine.workspace import Workspaces
from ras_fast.model_checks import TooLong
from ras_fast.model_lock import in_this_thread
from ras_fast.output_head import output_head
from ras_fast.patching.attention import fresh, range_mask
from ras_fast.patching.cache_values import cache_name
from ras_fast.patching.structure import find_decoder, find_head, stacks, text_dtype
from ras_fast.registration import EXPLICIT, NAME

SYNC_EVERY = {"cuda": 8}  # steps between two looks at the tokens by the host; elsewhere a look costs nothing
CAPTURED = {"cuda"}  # devices whose steps are captured as graphs
WIDTH = 32  # tokens of a prompt that captured steps are fed are rounded up to this
INSTEAD = "use ras_fast.sequential, or ras_fast.methods.attach for methods of one pass, instead"
_CHUNKED = "chunked_attention"
_LAYERS = {"full_attention", "sliding_attention", _CHUNKED, INDEXED}
_MLPS = {"mlp", "moe"}  # layers that do not look at other tokens (Nemotron-H): they keep nothing, and take no mask


class Runner:
    """A model as the engine uses it: tokens in, hidden states after the last norm out.

    sync_every: steps that are made before the host looks at their tokens.
    captured: whether steps are captured as CUDA graphs: where all weights are on one GPU.
    passes, tokens: forwards so far, those that a graph stood for among them, and the token positions that they computed.

    layers: what each layer is, in transformers' words. kinds: the different ones among them that take a mask of the tokens.
    both_ways: whether a prompt's tokens may all see each other (PaliGemma), so that none of them can be computed without those
        after it.
    chunk: up to how many places attention in chunks (Llama 4) is attention to all keys, and queries are not scaled by their
        place; None: any number.
    crosses: whether images are the keys of cross-attention layers. patches: how many keys a tile of one has there.

    Raises ValueError for a model with layers that keep something else: these cannot branch.
    """

    def __init__(self, model, sync_every: int | None = None):
        self.layers = _layer_kinds(model)
        self.kinds, self.crosses = sorted({*self.layers} - {CROSS} - _MLPS), CROSS in self.layers
        self.window = getattr(model.config.get_text_config(), "sliding_window", None)
        self.chunk = _chunk(model.config.get_text_config(), _CHUNKED in self.kinds)
        self.model, self.base = model, model.base_model
        text, layers = next(iter(stacks(model)), (self.base, torch.nn.ModuleList()))
        self.both_ways = not all(getattr(module, "is_causal", True) for module in layers.modules())
        self.patches = getattr(getattr(self.base, "vision_model", None), "num_patches", 0)
        # Such models make masks themselves, out of what only their prompts have; their text models take those of a step.
        self._text, headless = text, self.base is not model
        self._steps = self.base if headless and not (self.both_ways or self.crosses) else text
        self.find_parts()
        # Families that give image tokens positions of their own (M-RoPE) count on with an offset after the images, in as many
        # channels as their rotary embedding has sections: most in three, HunYuan-VL in four.
        self.offsets = hasattr(self.base, "get_rope_index")
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self.channels = len(rope.get("mrope_section") or range(3))
        # In the fourth, images are numbered through all rows of a forward: those of a row would depend on the rows before it.
        self.joins_images = self.channels <= 3
        self.image_token = getattr(model.config, "image_token_id", None)
        # Tokens that its config names, an image's end among them: the model may treat them as special only beside an image.
        named = {name: value for name, value in vars(model.config).items() if name.endswith(("_id", "token_index"))}
        ordinary = {*self.eos, named.get("pad_token_id"), named.get("bos_token_id")}
        special = [*named.values(), *(getattr(model.config, "visual_indicator_token_ids", None) or ())]
        self.special_tokens = {token for token in special if isinstance(token, int) and token not in ordinary}
        self.cache_name = cache_name(self.base)
        self.sync_every = sync_every or SYNC_EVERY.get(model.device.type, 1)
        self.filler = next(i for i in range(2) if i != self.image_token)
        self.workspaces = Workspaces(model, self.layers, self.chunk)
        self.passes, self.tokens = 0, 0

    def find_parts(self) -> None:
        """The parts that are not called by the base model, or not by it alone. To be called again when the model was changed,
        which may have others by now."""
        self.head, self.dtype = output_head(self.model), text_dtype(self.model)
        stateful = [kind in recurrence.LAYERS for kind in self.layers]
        self.recurrences = recurrence.find(find_decoder(self.model)[2], stateful) if any(stateful) else {}
        # A graph holds one device's work; weights that hooks fetch for each forward (accelerate's offloading) have no address.
        devices = {parameter.device for parameter in self.model.parameters()}
        self.captured = self.device.type in CAPTURED and devices == {self.device}
        rotary = [module for module in self.model.modules() if hasattr(module, "rope_type")]
        self._following = [module for module in rotary if isinstance(module.rope_type, str) and "dynamic" in module.rope_type]
        self._same_up_to = min((length for module in rotary for length in _same_up_to(module)), default=None)

    def capture_nothing(self, why: Exception) -> None:
        """Steps run without graphs from now on, until the model is changed."""
        self.captured = False
        warnings.warn(f"{type(self.model).__name__}: decode steps run without CUDA graphs, as {why}", stacklevel=2)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def eos(self) -> list[int]:
        return eos_ids(self.model)

    def width(self, tokens: int) -> int:
        """The length that a feed of `tokens` tokens is padded to, so that few lengths have to be captured."""
        return -(-tokens // WIDTH) * WIDTH if self.captures(tokens) and tokens > 1 else tokens

    def captures(self, width: int) -> bool:
        """Whether a step that feeds so many tokens is captured. Segments of a recurrence are as long as each row's tokens; and
        Mllama in transformers 5.17 takes a step for a prompt whose padded tokens are as many as the slots that it sees."""
        return self.captured and (width == 1 or not (self.recurrences or self.crosses))

    def __call__(self, pool: KVPool, ids: Tensor, positions: Tensor | None, mask=None, **extras) -> Tensor:
        """States [B, T, d] after the last norm for ids [B, T] at positions [B, T], or where the model puts them (None)."""
        if positions is not None and self._same_up_to is not None:
            positions = positions.clamp(max=self._same_up_to - 1)  # rows that have ended count on, and would change the others'
        if positions is not None and self.offsets:
            positions = positions.expand(self.channels, *positions.shape)
        extras[self.cache_name] = pool
        with recurrence.in_segments(self.recurrences, pool), self._same_frequencies():
            forward = self.base if pool.view.begin is None else self._steps
            forward = self._run_with_head if forward is self.model else forward
            output = forward(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=True, **extras)
        return output.last_hidden_state

    def _run_with_head(self, **inputs) -> Any:
        """What the text model gives in a forward of a model of which no part without a head reads images (Nemotron-H Omni).
        The head gets the last position alone."""
        given = []
        note = in_this_thread(lambda module, args, output: given.append(output))
        cut = in_this_thread(lambda module, args: (args[0][:, -1:],))
        with self._text.register_forward_hook(note), find_head(self.model).register_forward_pre_hook(cut):
            self.model(**inputs)
        return given[-1]

    def check_reach(self, tokens: int) -> None:
        """Raises TooLong for a prompt and its answer of up to so many tokens, where at such a length the rotary embedding turns
        every token of a forward by other frequencies: stages, and rows of the batch, would depend on each other; or where
        attention falls into chunks."""
        if self._same_up_to is not None and tokens > self._same_up_to:
            raise TooLong(
                f"a prompt and its answer may take {tokens} tokens; beyond {self._same_up_to} the rotary frequencies of "
                f"{type(self.model).__name__} follow the length, and the stages could not share a prefix: ask for fewer, or "
                "use ras_fast.sequential"
            )
        self.workspaces.check(tokens)

    @contextmanager
    def _same_frequencies(self) -> Iterator[None]:
        """Inside the block rotary embeddings do not look whether their frequencies have to follow the length (InternVL's
        "dynamic"), for which the host waits in each forward: up to the length of training, which no position is beyond, they
        never have to."""
        following = [
            module
            for module in self._following
            if isinstance(module.max_seq_len_cached, int)  # it is a tensor once it has followed a longer one
            and module.max_seq_len_cached == module.original_max_seq_len
            and not self.offsets and "forward" not in vars(module)
        ]  # fmt: skip
        for module in following:
            module.forward = partial(inspect.unwrap(type(module).forward), module)
        try:
            yield
        finally:
            for module in following:
                del module.forward

    def count(self, rows: int, width: int) -> None:
        """Notes a forward over ids [rows, width]."""
        self.passes += 1
        self.tokens += rows * width

    def prefill(self, pool: KVPool, ids: Tensor, **extras) -> tuple[Tensor, Tensor | int]:
        """(states [B, T, d] of prompts [B, T] with their images, offset [B, 1] or 0 of the positions of what follows)."""
        self.count(*ids.shape)
        mask = extras.pop("attention_mask", None)
        counted = torch.ones_like(ids) if mask is None else mask  # Qwen2.5-Omni computes positions only where it gets one
        inputs = {"input_ids": ids, **extras}
        if not self.offsets or all(is_per_token(name, inputs) for name in inputs):
            # Without images such models would count a row's padding as well, and steps do not.
            return self(pool, ids, (counted.cumsum(-1) - 1).clamp(min=0), mask, **extras), 0
        with self.own_offsets():
            states = self(pool, ids, None, counted, **extras)
            return states, 0 if self.base.rope_deltas is None else self.base.rope_deltas.view(-1, 1)

    @contextmanager
    def own_offsets(self) -> Iterator[None]:
        """Inside the block the model counts positions anew; afterwards it goes on where its user has left it."""
        if not self.offsets:
            yield
            return
        before, self.base.rope_deltas = self.base.rope_deltas, None
        try:
            yield
        finally:
            self.base.rope_deltas = before

    def masks(self, start: Tensor, end: Tensor, keys: int, reach: int, distance):
        """The attention masks of tokens each of which sees the keys [start, end), both [B, T], out of `keys` many.

        reach: how many places there are up to the last token. distance: called where a sliding window is shorter than that;
            gives how many places before each token every key lies, [B, T, keys]. None: keys lie in the order of their places.

        Returns one mask, or {kind of layer: mask} for models with several kinds.
        """
        made, takes_ranges = {}, self.model.config.get_text_config()._attn_implementation in (NAME, EXPLICIT)
        for kind in self.kinds:
            if kind in recurrence.LAYERS:
                made[kind] = None
                continue
            windowed = kind == "sliding_attention" and self.window < reach
            in_order = distance is None
            first = torch.maximum(start, end - self.window) if windowed and in_order else start
            if takes_ranges and kind != INDEXED and (in_order or not windowed):
                made[kind] = fresh(range_mask(first, end))
                continue
            key = torch.arange(keys, device=start.device)
            seen = (key >= first[..., None]) & (key < end[..., None])
            if windowed and not in_order:
                seen &= distance() < self.window
            made[kind] = self._added(seen)
        return made if len(made) > 1 else made[self.kinds[0]]

    def image_masks(self, sees: Tensor) -> dict[str, Tensor]:
        """What a step is given for cross-attention, from which keys of its images each token sees, [B, T, keys]."""
        sighted = sees.any(-1)[:, None, :, None].to(self.dtype)
        return {"cross_attention_mask": self._added(sees), "full_text_row_masked_out_mask": sighted}

    def _added(self, seen: Tensor) -> Tensor:
        """The mask [B, 1, T, keys] that is added to scores, from which keys each token sees, [B, T, keys]."""
        blank = torch.zeros((), dtype=self.dtype, device=seen.device)
        return torch.where(seen, blank, torch.finfo(self.dtype).min)[:, None]

    def image_keys(self, inputs: dict[str, Tensor]) -> int:
        """How many keys of each prompt's images there are to cross-attend to."""
        return inputs[SIGHT].shape[2:].numel() * self.patches if SIGHT in inputs else 0

    def keys_of_tiles(self, sight: Tensor) -> Tensor:
        """Which of these keys [B, keys] a token sees, from the tiles [B, images, tiles] that it sees."""
        return sight.flatten(1).repeat_interleave(self.patches, 1).bool()


def _layer_kinds(model) -> list[str]:
    """What each layer of the text model is. Raises ValueError where the engine does not know one."""
    name, text = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; the engine knows decoders: {INSTEAD}")
    plain = "sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"
    kinds = getattr(text, "layer_types", None) or [plain] * text.num_hidden_layers
    crossing = getattr(text, "cross_attention_layers", None) or ()
    kinds = [CROSS if layer in crossing else kind for layer, kind in enumerate(kinds)]
    found, others = {*kinds}, recurrence.LAYERS | {CROSS} | _MLPS
    if INDEXED in found and not _chooses_among_seen(text):
        raise ValueError(f"{name} has an indexer that goes by the order of the cache, which the engine changes: {INSTEAD}")
    if found - _LAYERS - others or not found & _LAYERS:
        wanted = f"{sorted(_LAYERS)}, alone or among {sorted(others)}"
        raise ValueError(f"{name} has layers of {sorted(found)}; the engine knows {wanted}: {INSTEAD}")
    return kinds


def _chooses_among_seen(text) -> bool:
    """Whether indexers score each key that the mask shows by itself, as DeepSeek-V3.2's, wherever it lies in the cache: not
    blocks of neighbours, as those of GLM-5 Next and Qwen4."""
    return hasattr(text, "index_topk") and not hasattr(text, "index_kpool")


def _chunk(text, in_chunks: bool) -> int | None:
    """See `Runner`. Layers without a rotary embedding scale their queries whether or not others attend in chunks."""
    scaled = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    return min(filter(None, (text.attention_chunk_size if in_chunks else None, scaled)), default=None)


def _same_up_to(rotary) -> list[int]:
    """The lengths beyond which frequencies of a rotary embedding follow the longest sequence of a forward: none, one, or one
    for each kind of layer."""
    kinds = rotary.rope_type if isinstance(rotary.rope_type, dict) else {None: rotary.rope_type}
    found = []
    for layers, kind in kinds.items():
        if "dynamic" in kind:
            found.append(rotary.original_max_seq_len)
        elif kind == "longrope":
            parameters = rotary.config.rope_parameters
            found.append((parameters if layers is None else parameters[layers])["original_max_position_embeddings"])
    return found


def close(found: Tensor, wanted: Tensor, model) -> bool:
    """Whether logits [V] of a model are the same but for rounding and for a constant, which no softmax sees: in a trained model
    it may be most of their norm. Tokens that a model rules out have the lowest number of its dtype."""
    device = model.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else text_dtype(model)
    found, wanted, lowest = found.double(), wanted.double(), 0.99 * torch.finfo(dtype).min
    allowed = wanted > lowest
    if not torch.equal(found > lowest, allowed):
        return False
    found, wanted = (logits[allowed] - logits[allowed].mean() for logits in (found, wanted))
    return bool((found - wanted).norm() <= (0.1 if dtype.itemsize == 2 else 0.01) * wanted.norm())
