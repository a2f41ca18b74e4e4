"""AutoSteer (arXiv 2507.13255): a small prober judges the prompt in the forward pass that reads it; where it finds harm, a
trained matrix moves every hidden state after the last norm towards a refusal.

Calibration picks the decoder layer at whose input safe and toxic questions differ most consistently (safety awareness score),
trains the prober there, and trains the refusal head M on the model's own final states with the model frozen. At work,
h' = h + ε M h for sequences whose prompt has t = P(toxic) > 0.5, and h for all others. Keys and values never depend on t.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from ras_fast import ops, parallel
from ras_fast.batching import batches, left_padded
from ras_fast.checks import as_float32, check_counts, is_integer, is_number, number
from ras_fast.decoding import eos_ids
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query, encode, is_unicode, make_queries, question_pairs, short_ids, texts_of
from ras_fast.methods import attached
from ras_fast.methods.calibration import check_arguments, digest, groups_of_equal, on_the_cpu
from ras_fast.methods.prompt_state import ModelCheck, PromptState, last_logits_only
from ras_fast.ops._registry import outside_autocast
from ras_fast.output_head import output_head
from ras_fast.patching import Patch, patched
from ras_fast.patching.cache_values import Rows
from ras_fast.patching.structure import find_head, text_dtype
from ras_fast.patching.trace import states_of
from ras_fast.patching.undo import undone
from ras_fast.profile import RasProfile

EPSILON = 0.1  # ε at strength 1, the strength that M is trained at
THRESHOLD = 0.5
REFUSAL = "I'm sorry, but I can't help with that."
STRENGTHS = tuple(2.0**k for k in range(-2, 7))
WIDTH = 64  # of the prober's hidden layer
SMALL = 8  # decoder layers up to which every layer is looked at; every 4th of more
CHUNK = 4  # batches' worth of questions that are encoded together, so that prompts of one shape find each other
VALIDATION = 0.2  # share of the pairs that training does not see
KNOWN = 4  # questions whose risks a profile keeps, out of those of up to KNOWN_OF pairs
KNOWN_OF = 16
KNOWN_TOKENS = 256  # of such a question at most: engines may take shorter prompts than calibration
PROBER_EPOCHS, PROBER_RATE = 40, 1e-3
HEAD_EPOCHS, HEAD_RATE = 10, 1.6  # learning rate: HEAD_RATE / d, so that a step changes M h by the same share at any width


class AutoSteer:
    """An AutoSteer profile at work on a patched model.

    risk: [B] float32 on the device, t of the latest prompts; 1 where it could not be computed.
    failed: [B] bool, where it could not be computed: there the gate is on.

    Raises ValueError when the profile's settings and tensors do not fit together.
    """

    def __init__(self, profile: RasProfile):
        if profile.method != "autosteer":
            raise ValueError(f"profile method is {profile.method!r}; this needs to be 'autosteer'")
        missing = {"layer", "strength", "threshold"} - set(profile.config)
        if missing:
            raise ValueError(f"profile config lacks {sorted(missing)}; it has {sorted(profile.config)}")
        self.profile = profile
        self.layer, self.threshold = profile.config["layer"], number(profile.config, "threshold")
        if not is_integer(self.layer):
            raise ValueError(f"layer is {self.layer!r}; it needs to be the index of a decoder layer")
        strength = number(profile.config, "strength")
        self.epsilon = EPSILON * strength
        if not (0 < as_float32(self.epsilon) < math.inf and 0 <= as_float32(self.threshold) < 1):
            raise ValueError(
                f"strength is {strength} and threshold {self.threshold}; they need to be positive, and in [0, 1), in float32"
            )
        self.prober = {name: profile.tensors[f"prober_{name}"] for name in ("in.weight", "in.bias", "out.weight", "out.bias")}
        self.refusal, self.right = profile.tensors["refusal"], profile.tensors.get("refusal_right")
        self._check_shapes()
        # The refusal head of a 7 B model is 64 MB: hashing it and moving it to the device are not for every `attach`.
        self._digest, self._check = profile.digest(), ModelCheck(profile)
        self._placed: dict[tuple[torch.device, torch.dtype], tuple[dict[str, Tensor], Tensor, Tensor | None]] = {}
        self.risk: Tensor | None = None
        self.failed: Tensor | None = None

    def _check_shapes(self) -> None:
        d, width = self.refusal.shape[:1].numel(), self.prober["in.bias"].numel()
        shapes = {"in.weight": (width, d), "in.bias": (width,), "out.weight": (2, width), "out.bias": (2,)}
        needed = {f"prober_{name}": (self.prober[name], shape) for name, shape in shapes.items()}
        if self.right is None:
            needed["refusal"] = (self.refusal, (d, d))
        else:
            rank = self.right.shape[:1].numel()
            needed |= {"refusal": (self.refusal, (d, rank)), "refusal_right": (self.right, (rank, d))}
        for name, (tensor, shape) in needed.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; it needs to be {shape}")
            if name.startswith("refusal") and not bool(tensor.float().any()):
                raise ValueError(f"{name} is 0; it needs to be another matrix, or answers would be the model's own")

    def attach(self, patch: Patch) -> AbstractContextManager[AutoSteer]:
        """Defends every forward of a patched model inside the block.

        A prompt is judged at the last position of the forward that reads it, so batches are to be padded on the left: a row
        that ends in padding counts as toxic. Of a prompt that comes in several forwards each is judged; a sequence whose gate
        is on keeps it until its cache ends. Outside of `generate`, a single token after others is a decode step.

        Raises ValueError when the profile does not fit the model's layers and sizes.
        """
        return attached(patch, self)

    @contextmanager
    def hooked(self, patch: Patch) -> Iterator[AutoSteer]:
        """What `attach` does but for what all methods share: the block's turn among threads, the profile's region bias."""
        self._check_model(patch)
        weight = next(patch.final_norm.parameters())
        run = _Run(self, PromptState(self._check, self._digest), *self.placed(weight.device, weight.dtype))
        with run.state.watch(patch), undone() as hooks, last_logits_only(patch.model, run.state):
            hooks.hook_before(patch.layers[self.layer], run.judge)
            hooks.hook_after(patch.final_norm, run.steer)
            yield self

    def _check_model(self, patch: Patch) -> None:
        if patch.final_norm is None:
            raise ValueError(
                "no norm is applied to the last layer's output of this model, or another one than when it was patched: there "
                "is no place for the refusal head"
            )
        d, layers = patch.text_model.config.hidden_size, len(patch.layers)
        if self.refusal.shape[0] != d or not 0 <= self.layer < layers:
            raise ValueError(
                f"the profile is for layer {self.layer} and hidden size {self.refusal.shape[0]}; the model has layers "
                f"0..{layers - 1} and hidden size {d}"
            )

    def placed(self, device, dtype) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """(prober in fp32, the refusal head's factors in the model's dtype), on the device, where they stay."""
        if (device, dtype) not in self._placed:
            prober = {name: tensor.to(device, torch.float32) for name, tensor in self.prober.items()}
            right = None if self.right is None else self.right.to(device, dtype).contiguous()
            self._placed = {(device, dtype): (prober, self.refusal.to(device, dtype).contiguous(), right)}
        return self._placed[device, dtype]


def assess(prober: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """t = P(toxic) [B] fp32 of hidden states [B, d], and which could not be computed [B] bool: there t is 1."""
    logits = _prober_logits(hidden, prober)
    # A −inf would not survive the ReLU, so both ends are looked at.
    failed = ~(torch.isfinite(hidden).all(-1) & torch.isfinite(logits).all(-1))
    return logits.softmax(-1)[:, 1].masked_fill(failed, 1.0), failed


@outside_autocast
def _prober_logits(hidden: Tensor, prober: dict[str, Tensor]) -> Tensor:
    inner = F.relu(F.linear(hidden.float(), prober["in.weight"], prober["in.bias"]))
    return F.linear(inner, prober["out.weight"], prober["out.bias"])


@dataclass
class _Run:
    """One `attach`. The state kept with the cache is each sequence's gate: ε, or 0; −ε where only padding has come so far. Was
    that all of the prompt, its answer is steered."""

    method: AutoSteer
    state: PromptState
    prober: dict[str, Tensor]
    refusal: Tensor
    right: Tensor | None
    only_read: int = 0  # the positions before the last of the forward that runs, where it is the first of its prompt
    padded: Tensor | None = None  # [B] bool: which of the prompts end in padding

    def judge(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the prober's layer."""
        hidden, before = states_of(args, kwargs), self.state.value
        if hidden.dim() != 3:  # Hy-V4's residual stream has several lanes
            raise ValueError(
                f"layer {self.method.layer} is given states {list(hidden.shape)}; AutoSteer judges [batch, tokens, hidden size]"
            )
        batch, length = hidden.shape[:2]
        self.only_read = length - 1 if before is None else 0
        if not self.state.note_prompt(batch, length, self.refusal.device):
            return
        method = self.method
        last = hidden[:, -1].to(self.refusal.device)  # of the last norm: a device map may have put this layer elsewhere
        risk, failed = assess(self.prober, last)
        self.padded = self.state.ends_in_padding()
        method.failed = failed | self.padded
        method.risk = risk.masked_fill(method.failed, 1.0)
        on = (method.risk > method.threshold) | method.failed
        gate = method.epsilon * on.float()  # not in torch's default dtype
        gate = torch.where(self.state.begun, gate, -method.epsilon)
        self.state.decide(Rows(gate if before is None else torch.maximum(gate, before.tensor)))

    def steer(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """After the last norm: steers the last position of a prompt's first forward, all of one that ends in padding, which may
        be answered from any, and every position of later forwards."""
        if self.state.value is None:
            raise RuntimeError(f"the last norm ran, but layer {self.method.layer}, where the prompt is judged, did not")
        gates = self.state.value.tensor.abs()[:, None].repeat(1, output.shape[1])
        if self.only_read:
            gates[:, : self.only_read] *= self.padded[:, None]
        return ops.gated_linear(output, self.refusal, gates.flatten(), right=self.right)


# Calibration


def safety_awareness(safe: Tensor, toxic: Tensor) -> float:
    """Safety awareness score: the mean over i < j of cos(Δ_i, Δ_j), where Δ = safe − toxic, both [n, d] with n > 1.

    In O(n·d) time, as Σ_{i≠j} cos = ‖Σ Δ̂‖² − n. A pair without a difference counts as a cosine of 0. Raises ValueError when
    the shapes do not fit.
    """
    if safe.shape != toxic.shape or safe.dim() != 2 or len(safe) < 2:
        raise ValueError(f"safe is {tuple(safe.shape)} and toxic {tuple(toxic.shape)}; both need to be [n, d] with n > 1")
    units = F.normalize(safe.double() - toxic.double(), dim=-1)
    count = len(units)
    return float((units.sum(0).square().sum() - units.square().sum()) / (count * (count - 1)))


@on_the_cpu()
@torch.inference_mode(False)
@torch.enable_grad()
def calibrate(
    model,
    processor,
    *,
    pairs: Sequence[tuple],
    refusal: str = REFUSAL,
    layer: int | str = "sas",
    rank: int | None = None,
    strength: float | None = None,
    over_refusal: float | None = None,
    seed: int = 0,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> RasProfile:
    """A profile for `model`: the prober and the refusal head.

    Args:
        pairs: (image, unsafe question, safe question), or with a fourth entry, the image of the safe question (None: no image).
            Where the harm sits in the image, only pairs with an image of its own for the same question teach the prober to
            look there. Hundreds at least; never use them in a test set.
        refusal: what the head is trained to say.
        layer: whose input the prober reads: "sas", the highest safety awareness score, as in the paper; "validation", the one
            whose prober does best on the validation pairs; or an index. Both look at every 4th layer, or at all of up to 8,
            but for those that are entered by the same state whatever is asked, as layer 0 by the last token's embedding.
        rank: keep the refusal head as two factors [d, rank] and [rank, d], from its singular value decomposition. The profile's
            config says how faithful they are.
        strength: ε = 0.1 · strength; None: the one of STRENGTHS under which most validation answers are the refusal, the
            nearest to 1 among equals.
        over_refusal: share of safe validation questions up to which the gate's threshold is lowered from 0.5. It is never
            raised, so where more of them are refused at 0.5, this is no bound. None: 0.5, as in the paper.
        seed: of the split into training and validation pairs, of the prober's weights and of the shuffling.
        batch_size: prompts per forward.
        checkpoint: folder to save the captured states and each epoch of the head in, and to resume from.

    Raises ValueError for input that cannot be used, when a checkpoint is of another calibration, when the outcome is not
    finite, when the gate does no better than chance on the validation pairs, and when the refusal head refuses none of them.
    """
    check_arguments(model, processor, pairs=pairs)
    unsafe, safe, groups = _queries(pairs, processor)
    text_config = model.config.get_text_config()
    layers = _layers(layer, text_config.num_hidden_layers)
    _check_options(rank, text_config.hidden_size, strength, batch_size, over_refusal, seed)
    answer = _answer(model, processor, refusal)
    settings = {
        "model": fingerprint(model, processor), "pairs": digest([*unsafe, *safe]), "answer": answer, "layers": layers,
        "seed": seed,
    }  # fmt: skip
    saved = Checkpoint(checkpoint, settings)
    states = _states(model, processor, unsafe, safe, layers, answer, batch_size, saved, progress)
    training, validation = _split(groups, seed)
    scores = {i: safety_awareness(states["safe"][n], states["toxic"][n]) for n, i in enumerate(layers)}
    chosen, prober, probed = _choose_layer(layer, scores, states, training, validation, seed)

    held = [states[kind][layers.index(chosen)][validation] for kind in ("safe", "toxic")]
    threshold, gated = _threshold(prober, *held, over_refusal)
    _check_gate(chosen, **gated)

    head, dtype = output_head(model), text_dtype(model)

    def logits(hidden: Tensor) -> Tensor:
        return head(hidden.to(dtype)).float()

    targets = torch.tensor(answer, device=model.device)
    m, trained = _train_head(logits, states["final"], targets, training, validation, seed, saved, progress)
    strengths = sorted({*STRENGTHS, *([] if strength is None else [float(strength)])})
    sweep = partial(_sweep, logits, states["final"][validation].to(model.device), targets, strengths)
    factors = {"refusal": m} if rank is None else _truncate(m, rank)
    rates = sweep(**factors)
    if rank is not None:
        trained |= {"rank": rank, "energy": _energy(m, rank), "full": sweep(m)}
    if strength is None:
        strength = min(strengths, key=lambda s: (-rates[str(s)], abs(math.log(s))))
    _check_head(float(strength), rates)
    config = {
        "layer": chosen, "strength": float(strength), "threshold": threshold, "refusal": refusal, "pairs": len(pairs),
        "seed": seed, "sas": {str(i): score for i, score in scores.items()}, "prober": probed | gated, "head": trained,
        "strengths": rates,
    }  # fmt: skip
    tensors = {f"prober_{name}": tensor for name, tensor in prober.items()} | {n: t.cpu() for n, t in factors.items()}
    profile = RasProfile("autosteer", config, tensors, settings["model"])
    held_out = [query for i in validation[:KNOWN_OF].tolist() for query in (unsafe[i], safe[i])]
    config["known"] = known_risks(profile, model, processor, map(_question, held_out))
    return profile


def _question(query: Query) -> str:
    """The text of its last question."""
    return " ".join(texts_of([message for message in query.messages if message["role"] == "user"][-1]))


@torch.no_grad()
def known_risks(profile: RasProfile, model, processor, questions: Iterable[str]) -> dict[str, float]:
    """t of up to KNOWN of these questions, asked without an image: of the safest, the most toxic, and those between that the
    prober is least sure of, whose odds tell most.

    Another engine in which the profile is to work has to find the same (`ras_fast.vllm`). Empty where the profile's layer runs
    for images alone (Mllama).
    """
    prober = {name: tensor.to("cpu", torch.float32) for name, tensor in AutoSteer(profile).prober.items()}
    risks: dict[str, float] = {}
    entering: list[Tensor] = []  # the layer, as in `_capture`: `attach` refuses models that calibration takes

    def note(module, args, kwargs) -> None:
        entering.append(states_of(args, kwargs)[:, -1].float().cpu())

    with patched(model) as handle, handle.layers[profile.config["layer"]].register_forward_pre_hook(note, with_kwargs=True):
        for question in filter(None, questions):
            (query,) = make_queries([question], None, processor)
            ids = short_ids(processor, query)
            if len(ids) > KNOWN_TOKENS:
                continue
            entering.clear()
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            for states in entering:
                risk, failed = assess(prober, states)
                if not failed:
                    risks[question] = risk.item()
    ordered = sorted(risks, key=risks.__getitem__)
    between = sorted(ordered[1:-1], key=lambda question: -min(risks[question], 1 - risks[question]))
    return {question: risks[question] for question in (*ordered[:1], *ordered[1:][-1:], *between[: KNOWN - 2])}


def _check_options(
    rank: int | None, d: int, strength: float | None, batch_size: int, over_refusal: float | None, seed: int
) -> None:
    if rank is not None and not (is_integer(rank) and 0 < rank <= d):
        raise ValueError(f"rank is {rank!r}; it needs to be an integer in 1..{d}")
    if strength is not None and not (is_number(strength) and 0 < strength < math.inf):
        raise ValueError(f"strength is {strength!r}; it needs to be a positive, finite number")
    if not is_integer(seed) or not -(1 << 63) <= seed < 1 << 63:
        raise ValueError(f"seed is {seed!r}; it needs to be an integer of 64 bits")
    check_counts(batch_size=batch_size)
    if over_refusal is not None and not (is_number(over_refusal) and 0 <= over_refusal <= 1):
        raise ValueError(f"over_refusal is {over_refusal!r}; it needs to be a number in [0, 1], or None")


def _queries(pairs: Sequence[tuple], processor) -> tuple[list[Query], list[Query], Tensor]:
    """(unsafe, safe, the group of equal ones that it is in) of each pair."""
    unsafe, safe = question_pairs(pairs, processor)
    groups = groups_of_equal(unsafe, safe)
    different = len(groups.unique())
    if different < 10:
        raise ValueError(
            f"pairs holds {different} different ones; at least 10 are needed, and hundreds for a prober that can be relied on"
        )
    return unsafe, safe, groups


def _layers(layer: int | str, depth: int) -> list[int]:
    """The decoder layers whose inputs are captured."""
    if is_integer(layer):
        if not 0 <= layer < depth:
            raise ValueError(f"layer is {layer}; the model has layers 0..{depth - 1}")
        return [layer]
    if layer not in ("sas", "validation"):
        raise ValueError(f"layer is {layer!r}; it needs to be 'sas', 'validation' or an index")
    return list(range(0, depth, 1 if depth <= SMALL else 4))


def _answer(model, processor, refusal: str) -> list[int]:
    """The refusal as token ids, with the end of sequence."""
    if not isinstance(refusal, str) or not is_unicode(refusal):
        raise ValueError(f"refusal is {refusal!r}; it needs to be a string of whole characters")
    ids = processor.tokenizer(refusal, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"refusal is {refusal!r}; it needs to hold at least one token")
    return [*ids, *eos_ids(model)[:1]]


def _states(
    model, processor, unsafe, safe, layers: list[int], answer: list[int], batch_size: int, saved: Checkpoint, progress: bool
) -> dict[str, Tensor]:
    """The results of `_capture`: "toxic" and "final" for the unsafe questions, "safe" for the safe ones."""
    found = saved.load("states")
    if found is not None:
        return found[0]
    toxic, final = _capture(model, processor, unsafe, layers, answer, batch_size, "unsafe questions", progress)
    harmless, _ = _capture(model, processor, safe, layers, [], batch_size, "safe questions", progress)
    states = {"toxic": toxic, "safe": harmless, "final": final}
    saved.save("states", states, {})
    return states


@torch.no_grad()
def _capture(
    model, processor, queries, layers, answer: list[int], batch_size: int, name: str, progress: bool
) -> tuple[Tensor, Tensor]:
    """Teacher-forced passes over the queries followed by `answer`.

    Returns, fp32 on the CPU: what enters each layer at the prompt's last token [layers, n, d], and the states after the last
    norm from which the answer's tokens are read [n, len(answer), d].
    """
    last = -1 - len(answer)
    entering: list[list[Tensor]] = [[] for _ in layers]
    final: list[Tensor] = []

    def note_layer(rows: list[Tensor], module, args, kwargs) -> None:
        rows.append(states_of(args, kwargs)[:, last].float().cpu())

    def note_final(module, args) -> None:
        final.append(args[0][:, last:-1].float().cpu())

    def of_chunk(chunk: list[Query]) -> tuple[Tensor, Tensor]:
        for rows in (*entering, final):
            rows.clear()
        order: list[int] = []
        encoded = (encode(processor, query, model.device, model.dtype)[0] for query in chunk)
        for indices, batch in batches(encoded, batch_size):
            inputs = left_padded(batch, processor.tokenizer.pad_token_id or 0, answer)
            model(**inputs, use_cache=False, logits_to_keep=len(answer) + 1)
            order += indices
        back = torch.tensor(order).argsort()
        return torch.stack([torch.cat(rows) for rows in entering])[:, back], torch.cat(final)[back]

    size = CHUNK * batch_size
    chunks = [queries[i : i + size] for i in range(0, len(queries), size)]
    with patched(model) as handle, ExitStack() as hooks:
        for rows, layer in zip(entering, layers, strict=True):
            hook = handle.layers[layer].register_forward_pre_hook(partial(note_layer, rows), with_kwargs=True)
            hooks.enter_context(hook)
        hooks.enter_context(find_head(model).register_forward_pre_hook(note_final))
        found = parallel.each(of_chunk, chunks, name, progress)
    states, finals = torch.cat([entered for entered, _ in found], 1), torch.cat([left for _, left in found])
    if not (torch.isfinite(states).all() and torch.isfinite(finals).all()):
        raise ValueError(f"{name}: the model's hidden states hold NaN or infinite values")
    return states, finals


def _split(groups: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the training and of the validation pairs, [n] of whose `groups` of equal pairs none is on both sides, nor are
    the two questions of a pair."""
    count = int(groups.max()) + 1
    place = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).argsort()[groups]
    order, held = place.argsort(stable=True), place < max(1, round(VALIDATION * count))
    return order[int(held.sum()) :], order[: int(held.sum())]


def _choose_layer(layer, scores: dict[int, float], states, training, validation, seed: int):
    """(the layer, its prober, what is known about it)."""
    telling = [i for i, safe, toxic in zip(scores, states["safe"], states["toxic"], strict=True) if _differ(safe, toxic)]
    if not telling:
        raise ValueError(
            f"layer is {layer!r}, but what enters layers {list(scores)} at a prompt's end is the same for both questions of "
            "every pair; another layer is needed, or pairs whose questions differ"
        )
    candidates = telling if layer == "validation" else [max(telling, key=scores.__getitem__)]
    trained = {}
    for i in candidates:
        n = list(scores).index(i)
        trained[i] = train_prober(states["safe"][n], states["toxic"][n], training, validation, seed=seed)
    chosen = min(trained, key=lambda i: trained[i][1]["loss"])
    return (chosen, *trained[chosen])


def _differ(safe: Tensor, toxic: Tensor) -> bool:
    """Whether states [n, d] are others but for rounding: the rows of a batch need not be summed in the same order."""
    return bool((safe - toxic).norm() > 1e-5 * safe.norm())


def train_prober(
    safe: Tensor, toxic: Tensor, training: Tensor, validation: Tensor, *, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Trains the prober, an MLP d → 64 → ReLU → 2, by cross-entropy and AdamW.

    safe, toxic: [n, d] fp32, the states of each pair's two questions.
    training, validation: indices into n. The epoch with the least validation loss is kept.

    Returns the weights by name ("in.weight", "in.bias", "out.weight", "out.bias"), and {"epoch", "loss", "accuracy"} on the
    validation pairs. Inputs are standardised for training; the scaling is then folded into the first layer.

    Raises ValueError when the loss is not finite in any epoch.
    """
    def gather(indices: Tensor) -> tuple[Tensor, Tensor]:
        labels = torch.tensor([0, 1]).repeat_interleave(len(indices))
        return torch.cat([safe[indices], toxic[indices]]), labels

    x, y = gather(training)
    mean, scale = _standard(x)
    x, (held_x, held_y) = (x - mean) / scale, gather(validation)
    held_x = (held_x - mean) / scale
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=PROBER_RATE, weight_decay=1e-2)
        best: dict[str, float] = {"loss": math.inf}
        for epoch in range(PROBER_EPOCHS):
            for rows in torch.randperm(len(x)).split(32):
                optimizer.zero_grad()
                F.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
            with torch.no_grad():
                logits = net(held_x)
                loss = F.cross_entropy(logits, held_y).item()
            if loss < best["loss"]:
                accuracy = (logits.argmax(-1) == held_y).float().mean().item()
                best = {"epoch": epoch, "loss": loss, "accuracy": accuracy}
                kept = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if not math.isfinite(best["loss"]):
        raise ValueError("the prober's loss is not finite: the captured states are too large or constant")
    weight = kept["0.weight"] / scale
    bias = kept["0.bias"] - weight @ mean
    return {"in.weight": weight, "in.bias": bias, "out.weight": kept["2.weight"], "out.bias": kept["2.bias"]}, best


def _standard(x: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, scale) [d] of states [n, d]. A value that hardly varies in calibration is scaled by a rounding step of bfloat16,
    and one that does not vary is left out, with an infinite scale: else the next step would count as an event unheard of."""
    mean, spread = x.mean(0), x.std(0)
    return mean, torch.maximum(spread, mean.abs() * 2**-7).clamp_min(1e-6).masked_fill(spread == 0, torch.inf)


def _threshold(
    prober: dict[str, Tensor], safe: Tensor, toxic: Tensor, over_refusal: float | None
) -> tuple[float, dict[str, float]]:
    """The gate's threshold for states of validation questions [n, d], and the share of each kind that is above it."""
    safe_risk, toxic_risk = assess(prober, safe)[0], assess(prober, toxic)[0]
    threshold = THRESHOLD
    if over_refusal is not None:
        allowed = int(over_refusal * len(safe_risk))  # the highest risks of safe questions, which the threshold may lie below
        ordered = safe_risk.sort(descending=True).values
        threshold = min(threshold, float(ordered[allowed])) if allowed < len(ordered) else 0.0
    return threshold, {"refused_safe": _above(safe_risk, threshold), "refused_toxic": _above(toxic_risk, threshold)}


def _check_gate(layer: int, refused_safe: float, refused_toxic: float) -> None:
    """Raises ValueError for a gate that tells nothing apart: at worst it never opens, and the profile would defend nothing."""
    if refused_toxic <= refused_safe:
        raise ValueError(
            f"the gate, read at layer {layer}, opens for {refused_toxic:.0%} of the held-out unsafe questions and for "
            f"{refused_safe:.0%} of the safe ones, no better than chance; more or clearer pairs are needed, or another layer"
        )


def _check_head(strength: float, rates: dict[str, float]) -> None:
    """Raises ValueError for a refusal head that never refuses."""
    if rates[str(strength)] == 0:
        raise ValueError(
            f"at strength {strength} none of the held-out answers is the refusal, token for token; by strength the share is "
            f"{rates}. Another strength, more of the rank, or a refusal in words that the model knows is needed"
        )


def _above(risk: Tensor, threshold: float) -> float:
    return float((risk > threshold).float().mean())


def _loss(logits: Callable[[Tensor], Tensor], m: Tensor, states: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of the answer's tokens, states [n, A, d] turned at strength 1."""
    turned = states + EPSILON * F.linear(states, m)
    return F.cross_entropy(logits(turned).flatten(0, 1), targets.repeat(len(states)))


def _train_head(
    logits: Callable[[Tensor], Tensor], final: Tensor, targets: Tensor, training: Tensor, validation: Tensor, seed: int,
    saved: Checkpoint, progress: bool,
) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
    """M [d, d] fp32 of the epoch with the least validation loss, and {"epoch", "losses"}.

    The states after the last norm do not depend on M, so they are captured once and every epoch is a pass over them.
    """
    device, d = targets.device, final.shape[-1]
    m = torch.eye(d, device=device, requires_grad=True)
    optimizer = torch.optim.AdamW([m], lr=HEAD_RATE / d, weight_decay=0)
    best, losses = m.detach().clone(), []
    resumed = saved.load("head")
    if resumed is not None:
        tensors, facts = resumed
        losses, best = facts["losses"], tensors["best"].to(device)
        m.data.copy_(tensors["m"])
        moments = {name: tensors[name].to(device) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[m] = {"step": tensors["step"], **moments}
    held = final[validation].to(device)
    epochs = range(len(losses), HEAD_EPOCHS)
    for epoch in tqdm(epochs, desc="refusal head", initial=len(losses), total=HEAD_EPOCHS, disable=not progress):
        # Shuffled by (seed, epoch), so that a resumed training is the uninterrupted one.
        order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed * HEAD_EPOCHS + epoch))
        for rows in training[order].split(16):
            loss = _loss(logits, m, final[rows].to(device), targets)
            (m.grad,) = torch.autograd.grad(loss, [m])  # of M alone: the model stays as it is
            optimizer.step()
        with torch.no_grad():
            losses.append(_loss(logits, m, held, targets).item())
        if losses[-1] == min(losses):
            best = m.detach().clone()
        state = optimizer.state[m]
        tensors = {"m": m.detach(), "best": best, **{name: state[name] for name in ("step", "exp_avg", "exp_avg_sq")}}
        saved.save("head", tensors, {"losses": losses})
    return best, {"epoch": losses.index(min(losses)), "losses": losses}


def _truncate(m: Tensor, rank: int) -> dict[str, Tensor]:
    """M's best approximation of that rank, as "refusal" [d, rank] and "refusal_right" [rank, d]."""
    u, s, v = torch.linalg.svd(m)
    root = s[:rank].sqrt()
    return {"refusal": (u[:, :rank] * root).contiguous(), "refusal_right": (root[:, None] * v[:rank]).contiguous()}


def _energy(m: Tensor, rank: int) -> float:
    """The share of M's squared singular values that this rank keeps."""
    squares = torch.linalg.svdvals(m).square()
    return float(squares[:rank].sum() / squares.sum())


@torch.no_grad()
def _sweep(
    logits: Callable[[Tensor], Tensor], final: Tensor, targets: Tensor, strengths: Sequence[float], refusal: Tensor,
    refusal_right: Tensor | None = None,
) -> dict[str, float]:  # fmt: skip
    """For each strength the share of answers, states [n, A, d], that are the refusal, token for token. Each token is read after
    the refusal's own before it, so this is what greedy decoding would give."""
    moved = F.linear(final, refusal if refusal_right is None else refusal @ refusal_right)
    rates = {}
    for strength in strengths:
        tokens = logits(final + EPSILON * strength * moved).argmax(-1)
        rates[str(strength)] = float((tokens == targets).all(-1).float().mean())
    return rates


class Checkpoint:
    """A safetensors file for each stage of an unfinished calibration, its facts as JSON in the file's own header.

    folder: None keeps nothing. settings: what must be the same for a calibration to be resumed.

    Raises ValueError for a file in the folder's place.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.settings = json.dumps(settings, sort_keys=True)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():  # before minutes of work
            raise ValueError(f"checkpoint is {str(folder)!r}, which is there and no folder")

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, facts) of a stage; None where it has not been saved.

        Raises ValueError when the file cannot be read or is of another calibration.
        """
        path = None if self.folder is None else self.folder / f"{stage}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a checkpoint: {error}") from error
        if header is None or header.get("settings") != self.settings:
            raise ValueError(f"{path} is of another calibration (model, pairs, refusal, layers or seed); give another folder")
        return tensors, json.loads(header["facts"])

    def save(self, stage: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces the stage's file as a whole: a crash leaves the old one or the new one. Of several processes the first
        does it."""
        if self.folder is None or parallel.rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stage}.safetensors"
        header = {"settings": self.settings, "facts": json.dumps(facts)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, f"{path}.new", header)
        os.replace(f"{path}.new", path)
