"""AutoSteer (arXiv 2507.13255): a small prober judges the prompt in the forward pass that reads it; where it finds harm, a
trained matrix moves every hidden state after the last norm towards a refusal.

Calibration picks the decoder layer at whose input safe and toxic questions differ most consistently (safety awareness score),
trains the prober there, and trains the refusal head M on the model's own final states with the model frozen. At work,
h' = h + ε M h for sequences whose prompt has t = P(toxic) > 0.5, and h for all others. Keys and values never depend on t.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ras_fast import ops, parallel
from ras_fast.batching import batches, left_padded
from ras_fast.checks import as_float32, check_counts, is_integer, is_number, number
from ras_fast.decoding import eos_ids
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query, encode, is_unicode, make_queries, question_pairs, short_ids, texts_of
from ras_fast.methods import attached
from ras_fast.methods.calibration import check_arguments, digest, groups_of_equal, on_the_cpu
from ras_fast.methods.checkpoint import Checkpoint
from ras_fast.methods.prober import assess, check_gate, choose_layer, gate_threshold, safety_awareness, split
from ras_fast.methods.prompt_state import ModelCheck, PromptState, last_logits_only
from ras_fast.methods.refusal_head import EPSILON, choose_strength, train_head
from ras_fast.output_head import output_head
from ras_fast.patching import Patch, patched
from ras_fast.patching.cache_values import Rows
from ras_fast.patching.structure import find_head, text_dtype
from ras_fast.patching.trace import states_of
from ras_fast.patching.undo import undone
from ras_fast.profile import RasProfile

REFUSAL = "I'm sorry, but I can't help with that."
SMALL = 8  # decoder layers up to which every layer is looked at; every 4th of more
CHUNK = 4  # batches' worth of questions that are encoded together, so that prompts of one shape find each other
KNOWN = 4  # questions whose risks a profile keeps, out of those of up to KNOWN_OF pairs
KNOWN_OF = 16
KNOWN_TOKENS = 256  # of such a question at most: engines may take shorter prompts than calibration


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
    training, validation = split(groups, seed)
    scores = {i: safety_awareness(states["safe"][n], states["toxic"][n]) for n, i in enumerate(layers)}
    chosen, prober, probed = choose_layer(layer, scores, states, training, validation, seed)

    held = [states[kind][layers.index(chosen)][validation] for kind in ("safe", "toxic")]
    threshold, gated = gate_threshold(prober, *held, over_refusal)
    check_gate(chosen, **gated)

    head, dtype = output_head(model), text_dtype(model)

    def logits(hidden: Tensor) -> Tensor:
        return head(hidden.to(dtype)).float()

    targets = torch.tensor(answer, device=model.device)
    m, trained = train_head(logits, states["final"], targets, training, validation, seed, saved, progress)
    held_final = states["final"][validation].to(model.device)
    factors, strength, rates, kept = choose_strength(logits, held_final, targets, m, rank, strength)
    config = {
        "layer": chosen, "strength": strength, "threshold": threshold, "refusal": refusal, "pairs": len(pairs),
        "seed": seed, "sas": {str(i): score for i, score in scores.items()}, "prober": probed | gated, "head": trained | kept,
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
