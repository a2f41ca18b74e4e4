"""Steering along given directions: h ← h + α v on the residual stream, always or where a condition holds.

Constant α is contrastive activation addition (CAA, arXiv 2312.06681) and what control vectors do (repeng, llama.cpp). A
condition reads h along a direction of its own and steers where that exceeds a threshold: once for a whole answer, as CAST
does (arXiv 2409.05907), or token by token (after ASTRA, arXiv 2411.16721). The addition is part of the fused norm kernel and
the reading rides in it, so neither is a pass over memory or waits for the device.

Layers are counted from 0, and "layer l" is the *output* of decoder layer l: the index of repeng's and llama.cpp's
`direction.<l>`, and `hidden_states[l + 1]` in transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ras_fast import parallel
from ras_fast.checks import as_float32, is_integer, is_number, number
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query, encode, make_queries, refuse_poisoned
from ras_fast.methods import attached
from ras_fast.methods.calibration import check_arguments, on_the_cpu
from ras_fast.methods.prompt_state import ModelCheck, PromptState, last_logits_only
from ras_fast.patching import Patch, patched
from ras_fast.patching.cache_values import Rows
from ras_fast.patching.steering import Probe, Steering
from ras_fast.patching.trace import first
from ras_fast.patching.tracking import text_shape
from ras_fast.patching.undo import undone
from ras_fast.profile import RasProfile

MEASURES, SCOPES = ("projection", "cosine"), ("sequence", "token")


@dataclass(frozen=True)
class Condition:
    """When to steer: where h at `layer`, measured along `direction` [d], lies above (or below) `threshold`.

    measure: "projection", h·c / ‖c‖, or "cosine", h·c / (‖h‖ ‖c‖).
    per: "sequence": read at the prompt's last token, and acts from there on; "token": read and obeyed at every token, by
        steered layers after `layer`.
    """

    layer: int
    direction: Tensor
    threshold: float
    above: bool = True
    measure: str = "cosine"
    per: str = "sequence"


def from_vectors(
    model,
    processor,
    vectors: str | Path | Tensor | Mapping[int, Tensor],
    alpha: float = 1.0,
    *,
    layers: Sequence[int] | None = None,
    condition: Condition | None = None,
) -> RasProfile:
    """A profile that steers `model` by vectors made elsewhere.

    Args:
        vectors: {layer: [d]}; [d], for each of `layers`; or a file that `read_vectors` reads. Their length counts.
        alpha: how far; negative values steer the other way.
        layers: restricts {layer: [d]} to these, and says where [d] goes.
        condition: None: always.

    Raises:
        ValueError: a layer out of range, a wrong d, values that are not finite, or nothing to steer (no vector, vectors that
            are all 0, alpha 0); a file that cannot be read.
        ImportError: a .gguf file, and no `gguf` package.
    """
    if isinstance(vectors, (str, Path)):
        vectors = read_vectors(vectors)
    _check_alpha(alpha)
    layers = None if layers is None else _checked_layers(layers)
    if not isinstance(vectors, (Tensor, Mapping)):
        raise ValueError(f"vectors is a {type(vectors).__name__}; it needs to be a tensor [d], or a dict of one for each layer")
    if isinstance(vectors, Tensor):
        if layers is None:
            raise ValueError("vectors is one tensor; layers needs to say where it goes")
        vectors = dict.fromkeys(layers, vectors)
    elif layers is not None:
        missing = sorted(set(layers) - set(vectors))
        if missing:
            raise ValueError(f"layers {missing} have no vector; there are vectors for {sorted(vectors)}")
        vectors = {layer: vectors[layer] for layer in layers}
    if not vectors:
        raise ValueError("vectors is empty; at least one layer needs one")
    layers = sorted(_checked_layers([*vectors]))
    text = model.config.get_text_config()
    config: dict[str, Any] = {"alpha": float(alpha), "layers": layers, "condition": None}
    rows = [_direction(vectors[layer], f"the vector of layer {layer}", text.hidden_size) for layer in layers]
    tensors = {"vectors": torch.stack(rows)}
    if condition is not None:
        tensors["condition"] = _direction(condition.direction, "the condition's direction", text.hidden_size)
        config["condition"] = {name: value for name, value in asdict(condition).items() if name != "direction"}
    profile = RasProfile("projection", config, tensors, fingerprint(model, processor))
    Projection(profile).check(text.num_hidden_layers, text.hidden_size)
    return profile


def _direction(tensor: Tensor, name: str, d: int | None = None) -> Tensor:
    """`tensor` in fp32 on the CPU. Raises ValueError when it is not [d], or not finite."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or not tensor.is_floating_point():
        got = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} is {got}; it needs to be a floating tensor [d]")
    if d is not None and len(tensor) != d:
        raise ValueError(f"{name} has {len(tensor)} values; the model's hidden size is {d}")
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} holds NaN or infinite values")
    return tensor.detach().float().cpu()


def read_vectors(path: str | Path) -> Tensor | dict[int, Tensor]:
    """Steering vectors of a file: {layer: [d]} fp32, or [d] where the file holds one vector that names no layer.

    .gguf: a control vector as repeng and llama.cpp write it: architecture "controlvector", tensors "direction.<layer>".
    .safetensors: tensors [d] whose names end in the layer ("12", "layers.12", "direction.12"), or a single one of any name.

    Raises:
        ValueError: the file is not there, cannot be read, or holds something else.
        ImportError: a .gguf file, and no `gguf` package.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"vectors: there is no file {path}")
    readers = {".gguf": _read_gguf, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"vectors: {path} is neither a .gguf nor a .safetensors file")
    tensors = readers[path.suffix](path)
    layers: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        vector, layer = _direction(tensor, f"{path}: {name!r}"), re.search(r"(?:^|\.)(\d+)$", name)
        if layer is None and len(tensors) == 1:
            return vector
        if layer is None or int(layer[1]) in layers:
            raise ValueError(f"{path}: the name {name!r} does not end in a layer of its own; there are {sorted(tensors)}")
        layers[int(layer[1])] = vector
    return layers


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if not tensors:
        raise ValueError(f"{path} holds no tensor")
    return tensors


def _read_gguf(path: Path) -> dict[str, Tensor]:
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"reading {path} needs the gguf package: pip install 'ras-fast[gguf]'") from error
    try:
        reader = gguf.GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = None if field is None else field.contents()
        tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
            for tensor in reader.tensors
            if tensor.name.startswith("direction.")
        }
    except (ValueError, IndexError, KeyError, UnicodeDecodeError, NotImplementedError) as error:  # what a cut file leads to
        raise ValueError(f"{path} is not a GGUF file: {type(error).__name__}: {error}") from error
    if architecture != "controlvector" or not tensors:
        raise ValueError(
            f"{path} has architecture {architecture!r} and {len(tensors)} tensors 'direction.<layer>'; a control vector has "
            "'controlvector' and at least one"
        )
    return tensors


@on_the_cpu()
def calibrate(
    model,
    processor,
    *,
    pairs: Sequence[tuple],
    layers: Sequence[int] | None = None,
    alpha: float = 1.0,
    condition_pairs: Sequence[tuple] = (),
    condition_layer: int | None = None,
    measure: str = "cosine",
    per: str = "sequence",
    progress: bool = True,
) -> RasProfile:
    """A profile from contrastive pairs: v of a layer is the mean difference of its outputs at the prompt's last token (CAA).

    pairs: (towards, away from), each a (prompt, images) as `ras_fast.inputs.make_queries` takes one; a prompt may be a chat
        that ends in the assistant's words. For a defence: a request that is refused, and one like it that is answered.
    layers: None: the middle one.
    alpha: as `from_vectors`.
    condition_pairs: (steer, leave alone), likewise: the condition's direction is their mean difference at
        `condition_layer` (None: the one before the first steered), its threshold half-way between their means.
    measure, per: as `Condition`.

    Raises ValueError for input that cannot be used, when the outcome is not finite, and when the condition does not tell its
    pairs apart.
    """
    check_arguments(model, processor, pairs=pairs, condition_pairs=condition_pairs)
    if not pairs:
        raise ValueError("pairs is empty; a direction is the mean difference over at least one")
    _check_alpha(alpha)
    if measure not in MEASURES or per not in SCOPES:
        raise ValueError(f"measure is {measure!r} and per is {per!r}; they need to be one of {MEASURES} and one of {SCOPES}")
    count = model.config.get_text_config().num_hidden_layers
    layers = [count // 2] if layers is None else sorted(_checked_layers(layers))
    if condition_layer is not None and not is_integer(condition_layer):
        raise ValueError(f"condition_layer is {condition_layer!r}; it needs to be a decoder layer's index, or None")
    if condition_pairs:
        condition_layer = layers[0] - 1 if condition_layer is None else condition_layer
        if condition_layer < 0:
            raise ValueError(f"layers starts at {layers[0]}: a condition needs an earlier layer, not {condition_layer}")
        _check_order(condition_layer, layers)
    contrasts = _contrasts("pairs", pairs, processor)
    conditions = _contrasts("condition_pairs", condition_pairs, processor)
    towards, away = _last_states(model, processor, contrasts, layers, progress)
    vectors = dict(zip(layers, (towards - away).mean(0), strict=True))
    condition = None
    if conditions:
        on, off = (states[:, 0] for states in _last_states(model, processor, conditions, [condition_layer], progress))
        direction = (on - off).mean(0)
        measured = [_measure(states, direction, measure) for states in (on, off)]
        threshold = sum(values.mean().item() for values in measured) / 2
        _check_condition(condition_layer, measure, *(float((values > threshold).float().mean()) for values in measured))
        condition = Condition(condition_layer, direction, threshold, measure=measure, per=per)
    return from_vectors(model, processor, vectors, alpha, condition=condition)


def _check_condition(layer: int, measure: str, on: float, off: float) -> None:
    """Raises ValueError for a condition that holds for no larger share of what is to be steered than of the rest. By
    cosine even the means may lie the wrong way round: that of the first is less where their states vary more."""
    if on <= off:
        raise ValueError(
            f"the condition, by {measure} at layer {layer}, holds for {on:.0%} of the first and {off:.0%} of the second sides "
            "of condition_pairs: it does not tell them apart; the other measure, another condition_layer or other pairs may"
        )


def _measure(states: Tensor, direction: Tensor, measure: str) -> Tensor:
    if measure == "cosine":
        return torch.cosine_similarity(states, direction, dim=-1)
    return states @ direction / direction.norm()


def _contrasts(name: str, pairs: Sequence[tuple], processor) -> list[tuple[Query, Query]]:
    """Raises ValueError that names the pair that cannot be used."""
    for i, pair in enumerate(pairs):
        sides = pair if isinstance(pair, (list, tuple)) else ()
        if len(sides) != 2 or not all(isinstance(side, (list, tuple)) and len(side) == 2 for side in sides):
            raise ValueError(f"{name}[{i}] is {pair!r}; it needs to be ((prompt, images), (prompt, images))")
    sides = [side for pair in pairs for side in pair]
    queries = make_queries([prompt for prompt, _ in sides], [images for _, images in sides], processor)
    contrasts = list(zip(queries[::2], queries[1::2], strict=True))
    refuse_poisoned(name, contrasts)
    return contrasts


@torch.no_grad()
def _last_states(
    model, processor, pairs: list[tuple[Query, Query]], layers: Sequence[int], progress: bool
) -> tuple[Tensor, Tensor]:
    """The layers' outputs at the prompt's last token, [pairs, layers, d] fp32: those of each pair's first and second query."""
    states: list[Tensor] = []

    def last_states(query: Query) -> Tensor:
        inputs, _ = encode(processor, query, model.device, model.dtype)
        states.clear()
        model.base_model(**inputs, use_cache=False)
        return torch.stack(states)

    with patched(model) as handle, ExitStack() as hooks:
        outside = [layer for layer in layers if not 0 <= layer < len(handle.layers)]
        if outside:
            raise ValueError(f"layers {outside} are not there; the model has layers 0..{len(handle.layers) - 1}")
        for layer in layers:
            hooks.enter_context(handle.layers[layer].register_forward_hook(partial(_note_last, states)))
        found = parallel.each(last_states, [query for pair in pairs for query in pair], "contrastive pairs", progress)
    paired = torch.stack(found).view(len(pairs), 2, len(layers), -1)
    return paired[:, 0], paired[:, 1]


def _note_last(states: list[Tensor], module: nn.Module, args: tuple, output: Any) -> None:
    states.append(first(output)[0, -1].float().cpu())


class Projection:
    """A projection profile at work on a patched model.

    risk: [B] fp32 on the device, of the latest prompts: 1 where the answer is steered, else 0 (per token: at the last one).
    failed: [B] bool, where the condition could not be computed: there the answer is steered, unless by an alpha of 0.

    Raises ValueError when the profile's settings and tensors do not fit together.
    """

    def __init__(self, profile: RasProfile):
        if profile.method != "projection":
            raise ValueError(f"profile method is {profile.method!r}; this needs to be 'projection'")
        self.profile, self._check, config = profile, ModelCheck(profile), profile.config
        self.alpha, self.layers = number(config, "alpha"), _checked_layers(config.get("layers"))
        self.vectors = profile.tensors["vectors"]
        if self.vectors.dim() != 2 or len(self.vectors) != len(self.layers):
            raise ValueError(
                f"vectors have shape {tuple(self.vectors.shape)}; they need to be [layers = {len(self.layers)}, d]"
            )
        _check_alpha(self.alpha)
        if not bool(self.vectors.float().any()):  # as they are used: in float64 some may be below what float32 holds
            raise ValueError(f"the vectors of layers {self.layers} are 0; at least one needs to point somewhere")
        self.condition: Condition | None = None
        if config.get("condition") is not None or "condition" in profile.tensors:
            self.condition = _checked(_condition(profile), self.layers)
        self.risk: Tensor | None = None
        self.failed: Tensor | None = None

    def check(self, num_layers: int, d: int) -> None:
        """Raises ValueError when this cannot steer a model of that many decoder layers and that hidden size."""
        places = {f"vector of layer {layer}": (layer, v) for layer, v in zip(self.layers, self.vectors, strict=True)}
        if self.condition is not None:
            places["condition's direction"] = (self.condition.layer, self.condition.direction)
        for name, (layer, vector) in places.items():
            if not 0 <= layer < num_layers:
                raise ValueError(f"the {name} is for layer {layer}; the model has layers 0..{num_layers - 1}")
            if vector.shape[0] != d:
                raise ValueError(f"the {name} has {vector.shape[0]} values; the model's hidden size is {d}")

    def attach(self, patch: Patch, alpha: Tensor | None = None) -> AbstractContextManager[Projection]:
        """Steers every forward of a patched model inside the block.

        A condition per sequence is read at the last position of the forward that reads the prompt, so batches are to be padded
        on the left: a row that ends in padding is steered. Outside of `generate`, a single token after others is a decode step.

        alpha: [B] floating, a strength for each sequence instead of the profile's one for all; it holds for every batch inside
            the block. With beams or `num_return_sequences` still one for each prompt.

        Raises ValueError when the model does not fit the profile or one of the layers cannot be steered (`patch.report()`).
        """
        return attached(patch, self, alpha=alpha)

    @contextmanager
    def hooked(self, patch: Patch, alpha: Tensor | None = None) -> Iterator[Projection]:
        """What `attach` does but for what all methods share: the block's turn among threads, the profile's region bias."""
        self.check(len(patch.layers), self.vectors.shape[1])
        crossing = sorted({*(getattr(patch.text_model.config, "cross_attention_layers", None) or ())}.intersection(self.layers))
        if crossing:
            raise ValueError(
                f"layers {crossing} attend to images alone, and are skipped where there is none: such an answer would not be "
                "steered there; the profile needs vectors for other layers"
            )
        strengths, device = self._strengths(alpha), next(patch.text_model.parameters()).device
        state = PromptState(self._check, self.profile.digest(strengths))
        run = _Run(self, state, Steering(), strengths.to(device))
        try:
            for layer, vector in zip(self.layers, self.vectors, strict=True):
                patch.set_steering(layer, vector[None], rows="all", steering=run.steering)
            if self.condition is not None:
                unit = torch.nn.functional.normalize(self.condition.direction, dim=0)
                run.probe = patch.set_probe(self.condition.layer, unit[None], run.read)
            with state.watch(patch), undone() as hooks, last_logits_only(patch.model, state) if run.judges else nullcontext():
                hooks.hook_before(patch.text_model, run.begin)
                yield self
        finally:
            patch.clear_steering(run.steering)
            if run.probe is not None:
                patch.clear_probe(self.condition.layer)

    def _strengths(self, alpha: Tensor | None) -> Tensor:
        if alpha is None:
            return torch.tensor([self.alpha])
        usable = isinstance(alpha, Tensor) and alpha.dim() == 1 and len(alpha) and bool(torch.isfinite(alpha.float()).all())
        if not usable:
            got = f"of shape {tuple(alpha.shape)}" if isinstance(alpha, Tensor) else repr(alpha)
            raise ValueError(f"alpha is {got}; it needs to be a tensor [B] of finite values, one per sequence")
        return alpha.detach().float()

    def holds(self, dots: Tensor) -> tuple[Tensor, Tensor]:
        """(whether to steer, whether that could not be computed), both bool [...], of h·c (‖c‖ = 1) and ‖h‖² in [..., 2]."""
        measured, squared = dots.unbind(-1)
        if self.condition.measure == "cosine":
            # By a norm that overflows any cosine would be 0.
            measured = torch.where(torch.isfinite(squared), measured * squared.rsqrt(), torch.nan)
        failed = ~torch.isfinite(measured)
        met = measured > self.condition.threshold if self.condition.above else measured < self.condition.threshold
        return met | failed, failed


@dataclass
class _Run:
    """One `attach`. The state kept with the cache is each sequence's strength, 0 where its condition does not hold."""

    method: Projection
    state: PromptState
    steering: Steering
    strengths: Tensor  # [1], or one for each prompt of a batch
    probe: Probe | None = None
    reads_prompt: bool = False  # whether the forward that runs is where a prompt is decided about

    @property
    def judges(self) -> bool:
        """Whether a prompt is judged, at its last token."""
        return self.method.condition is not None and self.method.condition.per == "sequence"

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the text model. All is steered until a condition has been read, which is before the first steered layer."""
        batch, length = text_shape(kwargs)[:2]
        reads_piece = self.state.note_prompt(batch, length, self.strengths.device)
        self.reads_prompt = reads_piece if self.judges else self.state.value is None
        if self.reads_prompt:
            if batch % len(self.strengths):
                raise ValueError(f"alpha is for {len(self.strengths)} sequences; this batch has {batch}")
            self.state.decide(Rows(self.strengths.repeat_interleave(batch // len(self.strengths))))
        if self.reads_prompt or reads_piece:
            steered = self.state.value.tensor != 0
            self.method.risk, self.method.failed = steered.float(), torch.zeros_like(steered)
        if self.probe is not None:
            self.probe.active = self.reads_prompt or self.method.condition.per == "token"
        self._steer(self.state.value.tensor)

    def read(self, dots: Tensor) -> None:
        """The condition's layer is done, with dots [B, L, 2]."""
        strengths = self.state.value.tensor
        met, failed = self.method.holds(dots.to(strengths.device))
        if self.state.prompt_length:
            padded = self.state.ends_in_padding()
            met |= padded[:, None]  # such a row may be answered from any position
            self.method.failed = failed[:, -1] | padded
        alpha = strengths[:, None] * met
        if self.state.prompt_length:
            self.method.risk = (alpha[:, -1] != 0).float()
        if self.reads_prompt and self.judges:
            self.state.decide(Rows(alpha[:, -1]))
            alpha[:, :-1] *= padded[:, None]
        self._steer(alpha.flatten())

    def _steer(self, alpha: Tensor) -> None:
        self.steering.set_rows(torch.zeros_like(alpha, dtype=torch.int32), alpha)


def _checked_layers(layers: Sequence[int]) -> Sequence[int]:
    if not isinstance(layers, (list, tuple, range)) or not layers or not all(map(is_integer, layers)):
        raise ValueError(f"layers is {layers!r}; it needs to be a list of at least one decoder layer's index")
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers is {layers}; each needs to be there once, as it has one vector")
    return layers


def _check_alpha(alpha: float) -> None:
    """Raises ValueError for a strength at which answers would count as steered, and be the model's own or no words at all."""
    if not is_number(alpha):
        raise ValueError(f"alpha is {alpha!r}; it needs to be a number")
    if as_float32(alpha) == 0:
        raise ValueError(f"alpha is {alpha}; it needs to be another number, not 0 in float32, or nothing is steered")
    if not math.isfinite(as_float32(alpha)):
        raise ValueError(f"alpha is {alpha}; it needs to be finite in float32")


def _condition(profile: RasProfile) -> Condition:
    """From the profile's config and its tensor of that name, which belong together."""
    settings, direction = profile.config.get("condition"), profile.tensors.get("condition")
    names = {field.name for field in fields(Condition)} - {"direction"}
    if not isinstance(settings, dict) or not {"layer", "threshold"} <= set(settings) <= names or direction is None:
        raise ValueError(
            f"condition is {settings!r}, and its direction {'missing' if direction is None else 'there'}; it needs the tensor "
            f"'condition' and settings among {sorted(names)}, layer and threshold with them"
        )
    return Condition(direction=_direction(direction, "the condition's direction"), **settings)


def _checked(condition: Condition, layers: list[int]) -> Condition:
    if condition.measure not in MEASURES or condition.per not in SCOPES:
        raise ValueError(
            f"the condition's measure is {condition.measure!r} and per is {condition.per!r}; they need to be one of {MEASURES} "
            f"and one of {SCOPES}"
        )
    if not isinstance(condition.above, bool):
        raise ValueError(f"the condition's above is {condition.above!r}; it needs to be true or false")
    if not is_integer(condition.layer):
        raise ValueError(f"the condition's layer is {condition.layer!r}; it needs to be the index of a decoder layer")
    threshold = number(vars(condition), "threshold")
    if condition.measure == "cosine" and not -1 < as_float32(threshold) < 1:
        raise ValueError(f"the condition's threshold is {threshold}; for a cosine it needs to be between -1 and 1 in float32")
    if not bool(condition.direction.any()):
        raise ValueError("the condition's direction is 0; it needs to point somewhere")
    _check_order(condition.layer, layers)
    return condition


def _check_order(condition_layer: int, layers: list[int]) -> None:
    early = [layer for layer in layers if layer <= condition_layer]
    if early:
        raise ValueError(f"the condition is read at layer {condition_layer}; layers {early} are steered before it is known")
