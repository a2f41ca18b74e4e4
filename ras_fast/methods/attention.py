"""Attention risk: a risk computed from how the words of a prompt attend to its images, in the forward pass that runs anyway.

Features are the attention that a head pays to the images: the mean and the maximum over the text rows after the last image,
and that of the last row. Calibration ranks heads by the Fisher discriminant ratio Δμᵀ(Σ₁ + Σ₂ + εI)⁻¹Δμ of their features
between harmful and harmless questions, keeps the best, and fits a logistic regression whose penalty is chosen by
cross-validation. Alone, its risk steers the answer as MoRAS's third stage does (`AttentionRisk`); or it joins S in MoRAS's own
gate (`calibrate(..., combine_with=...)`). docs/methods.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ras_fast import parallel
from ras_fast.checks import check_counts, is_number
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query, encode, question_pairs
from ras_fast.methods import attached, region_bias
from ras_fast.methods.attention_gate import FEATURES, AttentionGate, Head, Looks, features, features_so_far, rows_after_images
from ras_fast.methods.calibration import check_arguments, groups_of_equal, on_the_cpu
from ras_fast.methods.moras import PRESETS, Moras, assess, describe, refusal_prototypes
from ras_fast.methods.prompt_state import ModelCheck, PromptState, last_logits_only
from ras_fast.output_head import output_head
from ras_fast.patching import Patch, patched
from ras_fast.patching.state import Monitor
from ras_fast.patching.steering import Steering
from ras_fast.patching.structure import text_dtype
from ras_fast.patching.tracking import text_shape
from ras_fast.patching.undo import undone
from ras_fast.profile import RasProfile

STEPS = PRESETS["moras"]["steps"]  # the first answer states that are steered
FOLDS = 5  # of the cross-validation
# Inverse strength of the L2 penalty on the features' weights: C of scikit-learn's logistic regression, inputs at unit variance.
CS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
C_OF_S = 10.0
CERTAINTY = 1.645  # standard errors: of gates that tell nothing apart about one in 20 gets through


@dataclass(frozen=True)
class _Answer:
    """What is kept of each sequence: its risk, [B] fp32. start: the position of the prompts' last token, the same for all.
    looks: of the prompts so far, for their next piece."""

    risk: Tensor
    start: int | Tensor
    looks: Looks | None = None

    def select(self, rows: Tensor) -> _Answer:
        return self._with(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def repeat_interleave(self, repeats: int) -> _Answer:
        return self._with(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def _with(self, change: Callable[[Tensor], Tensor]) -> _Answer:
        return replace(self, risk=change(self.risk), looks=self.looks and tuple(map(change, self.looks)))

    def crop(self, length: int) -> _Answer:
        return replace(self, looks=None)  # which may count what was cut off: what follows is judged by its own rows


class AttentionRisk:
    """An attention profile at work on a patched model.

    risk: [B] fp32 on the device, of the latest prompts; 0 for a prompt without images, where there is nothing to read.
    failed: [B] bool, where a feature was not finite and the risk therefore is 1.
    own_steps: the first steps after the prompt that differ from each other; later ones are all alike.

    Raises ValueError when the profile's settings and tensors do not fit together.
    """

    def __init__(self, profile: RasProfile):
        if profile.method != "attention":
            raise ValueError(f"profile method is {profile.method!r}; this needs to be 'attention'")
        self.gate = AttentionGate(profile, "cpu")
        self.prototypes = profile.tensors["prototypes"].float()
        if self.prototypes.dim() != 2 or not len(self.prototypes) or not self.prototypes.any(-1).all():
            raise ValueError(f"prototypes have shape {tuple(self.prototypes.shape)}; they need to be [steps, d], none 0")
        self.own_steps = len(self.prototypes)
        self.profile, self._check = profile, ModelCheck(profile)
        self.risk: Tensor | None = None
        self.failed: Tensor | None = None

    def attach(self, patch: Patch) -> AbstractContextManager[AttentionRisk]:
        """Steers the first answer states of every generation of a patched model inside the block by the risk of its prompt.

        A prompt ends in the last position of the forward that reads it, so batches are to be padded on the left: a row that
        ends in padding is at risk 1. One that comes in several forwards is judged in each of them by all its rows so far, one
        that goes on from an earlier answer by its own. Outside of `generate`, a single token after others is a decode step.

        Raises ValueError when the model does not fit: no image statistics, images by cross-attention, a final norm that is not
        fused, another number of layers or heads, another hidden size.
        """
        return attached(patch, self)

    @contextmanager
    def hooked(self, patch: Patch) -> Iterator[AttentionRisk]:
        """What `attach` does but for what all methods share: the block's turn among threads, the profile's region bias."""
        _check_model(patch, self.gate.heads)
        self.gate = AttentionGate(self.profile, next(patch.text_model.parameters()).device)
        _check_last_norm(patch)
        run = _Run(self, patch, PromptState(self._check, self.profile.digest()), Steering())
        patch.set_steering("final", self.prototypes, steering=run.steering)
        try:
            run.monitor = patch.set_monitor(self.gate.layers, run.read)
            with run.state.watch(patch), undone() as hooks, last_logits_only(patch.model, run.state):
                hooks.hook_before(patch.text_model, run.begin)
                hooks.hook_after(patch.text_model, run.end)
                yield self
        finally:
            patch.clear_steering(run.steering)
            if run.monitor is not None:
                patch.clear_monitor()

    def assess(self, features: Tensor, has_images: Tensor) -> tuple[Tensor, Tensor]:
        """(risk [B] fp32, failed [B] bool) of features [B, 3n] and of which sequences have images."""
        risk = torch.sigmoid(self.gate.logit(features))
        failed = ~torch.isfinite(risk)
        return torch.where(has_images, risk, 0).masked_fill(failed, 1.0), failed


def _check_model(patch: Patch, heads: Sequence[Head]) -> None:
    if patch.report().regions is not None:
        raise ValueError(f"attention risk needs image statistics, which are off: {patch.report().regions}")
    if not patch.images_in_prompt:
        raise ValueError("attention risk reads the rows after a prompt's images; this model has its images in cross-attention")
    counts = patch.head_counts
    unknown = [[layer, head] for layer, head in heads if layer not in counts or not 0 <= head < counts[layer]]
    if unknown:
        raise ValueError(f"heads {unknown} are not there; the model has {len(counts)} layers of {max(counts.values())} heads")


def _check_last_norm(patch: Patch) -> None:
    if not patch.steers("final"):
        dtype = next(patch.text_model.parameters()).dtype
        raise ValueError(
            "attention risk steers at the model's last norm, which is steered by something else already, is not fused "
            f"(patch.report() says why; the model is in {dtype}), or had its forward replaced since"
        )


@dataclass
class _Run:
    """One `attach`."""

    method: AttentionRisk
    patch: Patch
    state: PromptState
    steering: Steering
    monitor: Monitor | None = None
    mass: dict[int, Tensor] = field(default_factory=dict)
    before: Looks | None = None  # of the pieces of the prompts before the one that is read
    by_sequence: tuple[Tensor, Tensor] | None = None  # slot and alpha [B], where there are some for each position

    def begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the text model. A prompt is at risk 1 until it has been read, which is before the final norm."""
        batch, length = text_shape(kwargs)[:2]
        device = self.method.gate.bias.device
        self.monitor.active = self.state.note_prompt(batch, length, device)
        answer = self.state.value
        if self.monitor.active:
            self.before = self._pieces_before(answer)
            risk = torch.ones(batch, device=device)
            self.method.failed = torch.ones_like(risk, dtype=torch.bool)
            self._decide(risk, self.state.past + length - 1)
            return
        step = torch.zeros(batch, dtype=torch.int64, device=device) + (self.state.past - answer.start)
        self.steering.set_rows(torch.where(step < self.method.own_steps, step, -1), answer.risk)

    def _pieces_before(self, answer: _Answer | None) -> Looks | None:
        """What counts of the pieces that this one follows with no step in between."""
        if answer is None or answer.looks is None:
            return None
        follows = self.state.past == answer.start + 1
        if not isinstance(follows, Tensor):  # as with a static cache
            return answer.looks if follows else None
        count, total, highest = answer.looks
        return torch.where(follows, count, 0), torch.where(follows, total, 0), torch.where(follows, highest, -torch.inf)

    def read(self, layer: int, mass: Tensor) -> None:
        """A layer's attention is done; after the last one that is needed the risk is known."""
        self.mass[layer] = mass.to(self.state.value.risk.device)
        if layer != self.method.gate.layers[-1]:
            return
        rows, has_images = rows_after_images(self.patch.region_map.ids, self.state.past, mass.shape[2])
        found, looks = features_so_far(self.mass, self.method.gate.heads, rows, self.before)
        risk, failed = self.method.assess(found, has_images)
        self.mass.clear()
        padded = self.state.ends_in_padding()
        self.method.failed = failed | padded
        self._decide(risk.masked_fill(self.method.failed, 1.0), self.state.value.start, looks)
        self._steer_positions(padded, mass.shape[2])

    def _decide(self, risk: Tensor, start: int | Tensor, looks: Looks | None = None) -> None:
        """The risk of these prompts, whose last token, at position `start`, is step 0."""
        self.method.risk = risk
        self.state.decide(_Answer(risk, start, looks))
        self.steering.set_rows(torch.zeros_like(risk, dtype=torch.int32), risk)

    def _steer_positions(self, padded: Tensor, length: int) -> None:
        """The last of a prompt's positions, and all of one that ends in padding [B] bool, which may be answered from any. Until
        the forward ends: to a decode step it would be another graph."""
        slots = torch.where(padded, 0, -1).to(torch.int32)[:, None].repeat(1, length)
        slots[:, -1] = 0
        self.by_sequence = self.steering.slot, self.steering.alpha
        self.steering.slot, self.steering.alpha = slots.flatten(), self.method.risk.repeat_interleave(length)

    def end(self, module: nn.Module, args: tuple, output: Any) -> None:
        """After the text model."""
        if self.by_sequence is not None:
            self.steering.slot, self.steering.alpha = self.by_sequence
            self.by_sequence = None


# Calibration


@on_the_cpu()
def calibrate(
    model,
    processor,
    *,
    pairs: Sequence[tuple],
    refused_texts: Sequence[str] = (),
    heads: int = 16,
    steps: int = STEPS,
    min_refused: int = 10,
    amplify: float = 0.0,
    combine_with: RasProfile | None = None,
    progress: bool = True,
) -> RasProfile:
    """A profile whose risk is read from attention; alone, or together with a MoRAS profile's S.

    pairs: labelled questions, (image, unsafe question, safe question), or with a fourth entry, the image of the safe one; at
        least 50, some hundreds are better. Those without an image are left out. Never use these in a test set.
    refused_texts: about 50 text-only requests that the model refuses, for the prototypes of the first `steps` states
        (`ras_fast.methods.moras.refusal_prototypes`); not needed with `combine_with`.
    min_refused: fewer refused texts than this are an error.
    heads: how many (layer, head) pairs to keep, the best by Fisher ratio first.
    amplify: added to the chosen heads' attention scores of image tokens, in calibration and whenever the profile is used, so
        that they attend to images more; the profile's tensor `region_bias`. Cross-validation is on the features without it.
    combine_with: a MoRAS or RAS profile of this model. The outcome is that profile with the risk "moras+attention": one
        logistic gate over S and the features, for `ras_fast.SafeGenerator`. S alone is among the gates that cross-validation
        chooses from, so that attention has a say only where it helps on pairs that a fit has not seen.

    The profile's config holds "C", the inverse L2 penalty that cross-validation chose from `CS` (0: S alone), and
    "held_out_loss", the loss with each of them.

    Raises ValueError for input that cannot be used, a model without image statistics, features or S that are not finite, a
    gate that does no better than chance on held-out pairs, and one whose risk does not rise with S. ImportError: there is no
    scikit-learn.
    """
    check_arguments(model, processor, pairs=pairs)
    _check_options(heads, steps, amplify, combine_with)
    _logistic_regression()  # before minutes of work
    queries, harmful, pair = _labelled(pairs, processor)
    tensors: dict[str, Tensor] = {}
    if combine_with is None:
        with patched(model) as patch:
            _check_model(patch, ())
            _check_last_norm(patch)
        tensors["prototypes"] = refusal_prototypes(model, processor, refused_texts, steps, min_refused, progress)
    else:
        combine_with.check(model, processor)
        tensors |= combine_with.tensors
    with patched(model) as patch:
        _check_model(patch, ())
        places = [(layer, head) for layer, count in sorted(patch.head_counts.items()) for head in range(count)]
        with region_bias(patch, tensors.get("region_bias")):
            found = _features(patch, processor, queries, places, progress)
        amplified = [places[i] for i in best_heads(found, harmful, heads)]
        if amplify:
            sizes = len(patch.layers), max(patch.head_counts.values())
            tensors["region_bias"] = _amplified(sizes, amplified, amplify)
        with region_bias(patch, tensors.get("region_bias")):
            found_amplified = _features(patch, processor, queries, amplified, progress) if amplify else None
            similarities = None if combine_with is None else _similarities(model, processor, queries, combine_with, progress)
    chosen, facts, losses = select(found, similarities, harmful, pair, heads)
    check_gate(losses, harmful, pair)
    if amplify:  # C is from the features before: these are of heads that were ranked by all pairs, held-out ones among them
        places, found = amplified, found_amplified
        check_gate(held_out_losses(found, similarities, harmful, pair, heads, facts["C"]), harmful, pair)
        chosen = fit(found, similarities, harmful, heads, facts["C"])
    tensors["attention_weights"], tensors["attention_bias"] = chosen.weights.float(), chosen.bias.float()
    config = {"heads": [list(places[i]) for i in chosen.heads]} | facts
    if combine_with is None:
        return RasProfile("attention", config, tensors, fingerprint(model, processor))
    return _combined(combine_with, chosen, config, tensors)


def _check_options(heads: int, steps: int, amplify: float, combine_with: RasProfile | None) -> None:
    check_counts(heads=heads, steps=steps)
    if not is_number(amplify) or not math.isfinite(amplify):
        raise ValueError(f"amplify is {amplify!r}; it needs to be a finite number")
    if combine_with is not None and (not isinstance(combine_with, RasProfile) or combine_with.method not in PRESETS):
        given = getattr(combine_with, "method", combine_with)
        raise ValueError(f"combine_with is {given!r}; it needs to be a profile of {', '.join(PRESETS)}")


def _combined(profile: RasProfile, gate: LogisticFit, config: dict[str, Any], tensors: dict[str, Tensor]) -> RasProfile:
    """A MoRAS profile with a gate over S and attention, and the config and tensors of that. Raises ValueError where its risk
    does not rise with S."""
    if not gate.similarity_weight > 0:
        raise ValueError(
            f"S has the weight {gate.similarity_weight.item():.3g} in the gate; it needs to be positive, as the risk of a "
            "prompt without an image is that of S alone: in these pairs S is no higher for the unsafe questions"
        )
    tensors |= {"similarity_weight": gate.similarity_weight.float(), "similarity_bias": gate.similarity_bias.float()}
    return replace(profile, config=profile.config | config | {"risk": "moras+attention"}, tensors=tensors)


def _labelled(pairs: Sequence[tuple], processor) -> tuple[list[Query], Tensor, Tensor]:
    """The questions of the pairs that have an image, which of them [n] are unsafe, and the pair [n] that each is of; equal
    pairs count as one."""
    unsafe, safe = question_pairs(pairs, processor)
    queries = [query for pair in zip(unsafe, safe, strict=True) for query in pair]
    seen = [i for i, query in enumerate(queries) if query.images]
    harmful, pair = torch.tensor([i % 2 == 0 for i in seen]), groups_of_equal(unsafe, safe).repeat_interleave(2)[seen]
    if not seen or harmful.all() or not harmful.any():
        raise ValueError(f"pairs holds {len(seen)} questions with an image; unsafe and safe ones are needed")
    different = min(len(pair[kind].unique()) for kind in (harmful, ~harmful))
    if different < FOLDS:
        raise ValueError(
            f"pairs holds {different} different pairs with an image; cross-validation needs at least {FOLDS} with one for the "
            f"unsafe question, and {FOLDS} with one for the safe question"
        )
    return [queries[i] for i in seen], harmful, pair


def _amplified(sizes: tuple[int, int], heads: list[Head], strength: float) -> Tensor:
    """`region_bias` of these sizes [layers, Hq]: `strength` for these heads, 0 for the others."""
    bias = torch.zeros(sizes)
    for layer, head in heads:
        bias[layer, head] = strength
    return bias


def fisher_ratio(found: Tensor, harmful: Tensor) -> Tensor:
    """Δμᵀ(Σ₁ + Σ₂ + εI)⁻¹Δμ [H] of features [n, H, k] between the harmful [n] and the other items (arXiv 2510.13698)."""
    groups = [found[harmful].double(), found[~harmful].double()]
    difference = groups[0].mean(0) - groups[1].mean(0)
    spread = sum(_covariance(group) for group in groups)
    scale = spread.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
    spread = spread + 1e-3 * scale[:, None, None] * torch.eye(found.shape[-1], dtype=torch.float64)
    return (difference * torch.linalg.solve(spread, difference)).sum(-1).float()


def _covariance(group: Tensor) -> Tensor:
    """[H, k, k] of [n, H, k]."""
    centred = group - group.mean(0)
    return torch.einsum("nhi,nhj->hij", centred, centred) / max(len(group) - 1, 1)


def best_heads(found: Tensor, harmful: Tensor, count: int) -> list[int]:
    """The heads of the highest Fisher ratio in features [n, H, k], best first."""
    return fisher_ratio(found, harmful).argsort(descending=True, stable=True)[:count].tolist()


@dataclass(frozen=True)
class LogisticFit:
    """logit = features[:, heads]·weights + bias, plus S · similarity_weight where there is one.

    heads: indices, best first. weights: [heads · k] fp64. bias, similarity_weight: [1] fp64. similarity_bias: [1] fp64, the
    bias for prompts without images: that of a prompt whose features have their mean values.
    """

    heads: list[int]
    weights: Tensor
    bias: Tensor
    similarity_weight: Tensor | None = None
    similarity_bias: Tensor | None = None

    def logit(self, found: Tensor, similarity: Tensor | None) -> Tensor:
        """[n] fp64 of features [n, H, k] and S [n]."""
        logit = found[:, self.heads].flatten(1).double() @ self.weights + self.bias
        return logit if similarity is None else logit + similarity.double() * self.similarity_weight


def select(
    found: Tensor, similarity: Tensor | None, harmful: Tensor, pair: Tensor, count: int
) -> tuple[LogisticFit, dict[str, Any], Tensor]:
    """The gate over the best `count` heads, with the inverse L2 penalty ("C") that cross-validation finds best.

    found: features [n, H, k]. similarity: S [n], or None. harmful: [n] bool. pair: [n], what is never on both sides of a fold.

    With S, a C of 0, which is S alone, is one of those to choose from. Each fold ranks the heads anew. Returns the fit to
    all, {"C", "held_out_loss": {c: mean cross-entropy of the held-out items}}, and that of each item [n] with this C.

    Raises ValueError when an input is not finite, ImportError without scikit-learn.
    """
    if not (torch.isfinite(found).all() and (similarity is None or torch.isfinite(similarity).all())):
        raise ValueError("a feature or a similarity of the calibration pairs is not finite")
    cs = CS if similarity is None else (0.0, *CS)
    losses = {c: held_out_losses(found, similarity, harmful, pair, count, c) for c in cs}
    means = {c: of_items.mean().item() for c, of_items in losses.items()}
    c = min(means, key=means.__getitem__)
    facts = {"C": c, "held_out_loss": {str(c): loss for c, loss in means.items()}}
    return fit(found, similarity, harmful, count, c), facts, losses[c]


def held_out_losses(
    found: Tensor, similarity: Tensor | None, harmful: Tensor, pair: Tensor, count: int, c: float
) -> Tensor:
    """The cross-entropy of each item [n] under the fit to the folds that it is not in; arguments as `select`."""
    groups = pair.unique(return_inverse=True)[1]
    fold = (torch.randperm(int(groups.max()) + 1, generator=torch.Generator().manual_seed(0)) % FOLDS)[groups]
    logits = torch.zeros(len(found), dtype=torch.float64)
    for held in (fold == i for i in range(FOLDS)):
        seen, held_similarity = (None, None) if similarity is None else (similarity[~held], similarity[held])
        logits[held] = fit(found[~held], seen, harmful[~held], count, c).logit(found[held], held_similarity)
    return F.binary_cross_entropy_with_logits(logits, harmful.double(), reduction="none")


def check_gate(losses: Tensor, harmful: Tensor, pair: Tensor) -> None:
    """Raises ValueError for a gate that tells nothing apart, by its `held_out_losses` [n]. Half of all gates that are fitted to
    noise have a mean loss below that of chance, so it has to lie below by more than `CERTAINTY` standard errors, over pairs."""
    groups = pair.unique(return_inverse=True)[1]
    share = harmful.double().mean()
    chance = torch.special.entr(share) + torch.special.entr(1 - share)  # of one risk for all
    gained = torch.zeros(int(groups.max()) + 1, dtype=torch.float64).index_add(0, groups, chance - losses)
    if not gained.sum() > CERTAINTY * gained.std() * len(gained) ** 0.5:
        raise ValueError(
            f"on held-out questions of the pairs the gate has a loss of {losses.mean():.3f}, which is no better than chance "
            f"({chance:.3f}) beyond doubt: more or clearer pairs are needed, or attention to images does not tell them apart"
        )


def _logistic_regression() -> type:
    """scikit-learn's. Raises ImportError, with the command that mends it, where there is none."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("calibrating attention risk needs scikit-learn: pip install 'ras-fast[calibrate]'") from error
    return LogisticRegression


def fit(found: Tensor, similarity: Tensor | None, harmful: Tensor, count: int, c: float) -> LogisticFit:
    """Logistic regression on the features of the best `count` heads, and on S, each at unit variance. The L2 penalty is
    1 / c for a feature's weight and next to nothing for that of S. Raises ImportError without scikit-learn."""
    heads = best_heads(found, harmful, count)
    inputs = found[:, heads].flatten(1).double()
    cs = torch.full(inputs.shape[1:], c, dtype=torch.float64)
    if similarity is not None:
        inputs = torch.cat([inputs, similarity[:, None].double()], 1)
        cs = torch.cat([cs, cs.new_tensor([C_OF_S])])
    # A wider input needs a smaller weight, which the one penalty of the regression then weighs less. One that varies by little
    # more than rounding gets none: with the weight that it would need, the least change in use would decide all.
    mean, spread = inputs.mean(0), inputs.std(0)
    stretch = torch.where(spread > mean.abs() * 2**-11, cs.sqrt() / spread, 0)
    model = _logistic_regression()(max_iter=1000).fit(((inputs - mean) * stretch).numpy(), harmful.numpy())
    weights = torch.from_numpy(model.coef_[0]) * stretch
    bias = torch.from_numpy(model.intercept_) - (weights * mean).sum()
    if similarity is None:
        return LogisticFit(heads, weights, bias)
    own, of_s = weights[:-1].clone(), weights[-1:].clone()
    return LogisticFit(heads, own, bias, of_s, bias + (own * mean[:-1]).sum())


@torch.no_grad()
def _features(patch: Patch, processor, queries: list[Query], heads: Sequence[Head], progress: bool) -> Tensor:
    """[n, heads, 3] fp32 on the CPU."""

    def of(query: Query) -> Tensor:
        return prompt_features(patch, processor, query, heads)[0].cpu().unflatten(0, (-1, FEATURES))

    return torch.stack(parallel.each(of, queries, "attention", progress))


def prompt_features(patch: Patch, processor, query: Query, heads: Sequence[Head]) -> tuple[Tensor, Tensor]:
    """([3n] fp32, bool) of one query by a forward of its own: its features, and whether it has images."""
    _check_model(patch, heads)
    model = patch.model
    inputs, _ = encode(processor, query, model.device, model.dtype)
    with patch.collect(rows=None, layers={layer for layer, _ in heads}) as statistics:
        model.base_model(**inputs, use_cache=False)
    rows, has_images = rows_after_images(patch.region_map.ids, 0, inputs["input_ids"].shape[1])
    return features(statistics.mass, heads, rows)[0], has_images[0]


@torch.no_grad()
def _similarities(model, processor, queries: list[Query], profile: RasProfile, progress: bool) -> Tensor:
    """S [n] of each query through MoRAS's first two stages."""
    alone = replace(profile, config=profile.config | {"risk": "moras"})
    moras = Moras(alone, output_head(model), model.device, text_dtype(model))

    def of(query: Query) -> Tensor:
        return assess(model, processor, query, describe(model, processor, query, moras), moras).cpu()

    return torch.cat(parallel.each(of, queries, "similarity", progress))
