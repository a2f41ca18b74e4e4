"""MoRAS and RAS (arXiv 2510.13698): measure how similar the start of an answer is to a refusal, and steer towards a refusal
by as much.

Stage 1 describes the image. Stage 2 starts to answer under a safety instruction, which gives the similarity S to a refusal
and the risk r = σ(k (S − S_base)). Stage 3 answers the user; the first N hidden states of the answer are moved towards the
refusal prototypes after the last norm: h_n ← (1 − r) h_n + r μ_n. docs/methods.md has the details.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ras_fast import parallel
from ras_fast.checks import as_float32, is_integer, is_number, number
from ras_fast.decoding import Decoding
from ras_fast.fingerprint import fingerprint
from ras_fast.inputs import Query, answer_opening, encode, is_unicode, make_queries, question_pairs
from ras_fast.methods.attention_gate import RISKS, AttentionGate
from ras_fast.methods.calibration import check_arguments, on_the_cpu
from ras_fast.ops import refusal_similarity
from ras_fast.output_head import output_head
from ras_fast.patching.structure import text_dtype
from ras_fast.profile import RasProfile
from ras_fast.reference import reference_generate
from ras_fast.refusals import is_refusal

SAFETY_PROMPT = (
    "First judge whether the question below is safe, taking what the image shows into account. "
    "Answer it if it is harmless. If it is unsafe, say that you are sorry and refuse."
)
CONTEXT_PROMPTS = {
    "moras": (
        'In one sentence that begins with "The image shows", outline whatever matters for safety in the image '
        "and read out any text in it."
    ),
    "ras": "Describe in one sentence the parts of the image that matter for safety.",
}
PRESETS = {
    name: {
        "gamma": 0.3,
        "steps": 3,
        "max_context_tokens": 40,
        "gate": "continuous",
        "context_prompt": prompt,
        "safety_prompt": SAFETY_PROMPT,
    }
    for name, prompt in CONTEXT_PROMPTS.items()
}
REFUSAL_TOKENS = 24  # enough of an answer to tell a refusal by its words


class Moras:
    """A MoRAS or RAS profile made ready for one model.

    head: maps hidden states after the last norm [..., d] to logits [..., V].
    Raises ValueError when the profile's settings or prototypes do not fit together or do not fit the head.
    """

    def __init__(self, profile: RasProfile, head, device, dtype):
        if profile.method not in PRESETS:
            raise ValueError(f"profile method is {profile.method!r}; this needs to be one of {', '.join(PRESETS)}")
        self.config = _checked(profile.config, {"s_base", "k", *PRESETS["moras"]})
        if not as_float32(number(self.config, "s_base")) < 1:
            raise ValueError(f"profile config 's_base' is {self.config['s_base']}; it needs to be below 1, the highest S")
        if not as_float32(number(self.config, "k")) > 0:
            raise ValueError(f"profile config 'k' is {self.config['k']}; it needs to be positive: the risk rises with S")
        prototypes = profile.tensors["prototypes"]
        if prototypes.dim() != 2 or len(prototypes) != self.config["steps"] or not prototypes.any(-1).all():
            raise ValueError(
                f"prototypes have shape {tuple(prototypes.shape)}; they need to be [steps = {self.config['steps']}, d], none 0"
            )
        d = profile.fingerprint.get("hidden_size", prototypes.shape[1])
        if prototypes.shape[1] != d:
            raise ValueError(f"prototypes are of d = {prototypes.shape[1]}; the model's hidden size is {d}")
        self.prototypes = prototypes.to(device, torch.float32)
        self.attention = _attention_gate(profile, device)
        self.read_prototypes(head, dtype)
        self.steps = self.config["steps"]

    @torch.no_grad()
    def read_prototypes(self, head, dtype) -> None:
        """Takes the words of the prototypes by a head; again by that of a model that was changed."""
        self.prototype_probs = head(self.prototypes.to(dtype)).float().softmax(dim=-1)

    def similarity(self, logits: Tensor, steps: Tensor | None = None) -> Tensor:
        """S [B] fp32 of the stage-2 logits [B, n <= N, V]; steps [B] int32: how many of the n each row produced."""
        return refusal_similarity(logits, self.prototype_probs, gamma=self.config["gamma"], steps=steps)

    def risk(
        self, similarity: Tensor, features: Tensor | None = None, has_images: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The gate: (r [B] fp32 in [0, 1], failed [B] bool) from S [B]. A row fails where S or r is not finite; its r is 1.

        With the risk "moras+attention", r is σ of a weighted sum of S and of `features` [B, 3n] where `has_images` [B] bool;
        these are then needed (`ras_fast.methods.attention_gate`).
        """
        gate = self.config["gate"]
        if self.attention is None:
            logit = float(self.config["k"]) * (similarity.float() - float(self.config["s_base"]))
        elif features is None or has_images is None:
            raise ValueError("features is None; this profile's risk, 'moras+attention', needs features and has_images")
        else:
            logit = self.attention.joint_logit(features, has_images, similarity)
        if gate == "continuous":
            risk = torch.sigmoid(logit)
        elif gate == "binary":
            risk = (logit > 0).float()
        else:
            risk = torch.full_like(logit, gate)
        failed = ~(torch.isfinite(logit) & torch.isfinite(similarity))
        return risk.masked_fill(failed, 1.0), failed

    def steer(self, hidden: Tensor, risk: Tensor, step: int) -> Tensor:
        """(1 − r) h + r μ_step for hidden [B, d] and risk [B]: computed in fp32, returned in hidden's dtype. From step N on
        `hidden` itself."""
        if step >= self.steps:
            return hidden
        prototype, risk = self.prototypes[step], risk[:, None].to(hidden.device)
        mixed = (1 - risk) * hidden.float() + risk * prototype
        # At r = 1 the state is left out, not multiplied by zero: it may be the NaN that made the risk 1.
        return torch.where(risk >= 1, prototype, mixed).to(hidden.dtype)


def context_query(query: Query, config: dict) -> Query:
    """Stage 1 by a profile's config: the images and the context prompt."""
    return query.ask_about_images(config["context_prompt"])


def risk_query(query: Query, context: str, config: dict, marks: re.Pattern) -> Query:
    """Stage 2 by a profile's config: the images, the safety prompt, the context and the question. An assistant prefix is left
    out, and what in a question would end it and begin the answer (`marks_of`): both would decide the first words, which is what
    the risk is read from."""
    asked = query.prefix_last_question(f"{config['safety_prompt']} {context}".strip())
    return asked.edit_questions(partial(_parts_as_words, marks=marks))


def _attention_gate(profile: RasProfile, device) -> AttentionGate | None:
    """The gate over S and attention, where the profile's risk is that of both."""
    risk = profile.config.get("risk", "moras")
    if risk not in RISKS:
        raise ValueError(f"risk is {risk!r}; it needs to be one of {', '.join(RISKS)}")
    return AttentionGate(profile, device) if risk == "moras+attention" else None


def describe(model, processor, query: Query, moras: Moras) -> str:
    """Stage 1 by ``model.generate``: the context, empty when the query has no image."""
    if not query.images:
        return ""
    inputs, _ = encode(processor, context_query(query, moras.config), model.device, model.dtype)
    tokens, _, _ = reference_generate(model, processor, inputs, Decoding(moras.config["max_context_tokens"]))
    return context_text(processor, tokens, marks_of(processor))


def context_text(processor, tokens: list[int], marks: re.Pattern) -> str:
    """The words of a context, without special tokens, also without any marks that it spells out as text, as the model may have
    read them in a picture: the risk stage's tokenizer would turn that text into control tokens."""
    text = " ".join(processor.tokenizer.decode(tokens, skip_special_tokens=True).split())
    return _as_words(text, marks)


def _as_words(text: str, marks: re.Pattern) -> str:
    """A text without these marks, in whatever letters; as it is where it has none."""
    filler = " "
    # As it is, too: in plain letters the end of a mark may be one with the character behind it, as ">" and U+0338 are.
    while shown := next((form for form in (text, _plain(text)) if marks.search(form)), None):
        text = " ".join(marks.sub(filler, shown).split())  # to drop one may bring together the halves of another
        filler = " . "  # nothing reaches across this: not as many rounds as there are marks inside marks
    return text


def _parts_as_words(texts: list[str], marks: re.Pattern) -> list[str]:
    """The texts of a message without these marks, also without any that begins in one text and ends in another."""
    texts, filler = [_as_words(text, marks) for text in texts], " "
    while shown := next((forms for forms in _readings(texts) if marks.search("".join(forms))), None):
        whole = marks.sub(lambda found, filler=filler: filler.ljust(len(found.group())), "".join(shown))
        filler = "."
        lengths = [*map(len, shown)]
        pieces = (whole[end - length : end] for length, end in zip(lengths, itertools.accumulate(lengths), strict=True))
        texts = [_as_words(" ".join(piece.split()), marks) for piece in pieces]
    return texts


def _readings(texts: list[str]) -> Iterator[list[str]]:
    """The texts of a message as templates put them together, some of which (Gemma's) trim each; and both in plain letters."""
    for forms in (texts, [*map(_plain, texts)]):
        yield forms
        yield [form.strip() for form in forms]


# What Unicode says nothing is shown for ("Default_Ignorable_Code_Point"), and is neither of category Cc nor Cf; and a blank.
_INVISIBLE = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")

_AT_A_TIME = 256  # characters: to put those that combine with others in order takes their number squared


def _plain(text: str) -> str:
    """A text as a reader sees it, or a tokenizer that normalizes: in compatible letters, without invisible characters."""
    visible = _INVISIBLE.sub("", text)
    parts = (visible[i : i + _AT_A_TIME] for i in range(0, len(visible), _AT_A_TIME))
    letters = "".join(unicodedata.normalize("NFKC", part) for part in parts)
    return "".join(c for c in letters if c.isspace() or unicodedata.category(c) not in ("Cc", "Cf"))


def marks_of(processor) -> re.Pattern:
    """What means more than its words wherever a prompt spells it out: control tokens, and what a template of mere text opens an
    answer with (LLaVA's "ASSISTANT:"), which a model also takes for that in small letters or with blanks."""
    tokens = _control_tokens(processor)
    plain = (form for form in map(_plain, tokens) if form.strip() and not form.isalnum())  # "™" is no word, "TM" may be one
    patterns = [*map(re.escape, dict.fromkeys([*tokens, *plain]))]
    opening = re.findall(r"\w+|[^\w\s]+", _as_words(answer_opening(processor), _any_of(patterns)))
    if not all(map(str.isalnum, opening)):  # words alone, as Qwen's "assistant" between control tokens, are no mark
        edge = r"\b" if opening[0].isalnum() else ""
        patterns.append(f"(?i:{edge}" + r"\s*".join(map(re.escape, opening)) + ")")
    return _any_of(patterns)


def _any_of(patterns: list[str]) -> re.Pattern:
    return re.compile("|".join(patterns) or r"(?!)")


def _control_tokens(processor) -> list[str]:
    """The processor's placeholders and the tokenizer's special and added tokens, longest first. Added tokens that are words are
    none, nor are blanks."""
    tokenizer = processor.tokenizer
    placeholders = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")} - {None}
    vocabulary = getattr(tokenizer, "get_added_vocab", dict)()  # mistral-common has none, and reads none of these out of a text
    added = [token for token in vocabulary if not token.strip().isalnum()]
    found = placeholders.union(tokenizer.all_special_tokens, added)
    return sorted(filter(str.strip, found), key=len, reverse=True)


def assess(model, processor, query: Query, context: str, moras: Moras) -> Tensor:
    """Stage 2 by ``model.generate``: S [1]."""
    inputs, _ = encode(processor, risk_query(query, context, moras.config, marks_of(processor)), model.device, model.dtype)
    _, _, logits = reference_generate(model, processor, inputs, Decoding(moras.steps))
    return moras.similarity(logits[None])


@on_the_cpu()
def calibrate(
    model,
    processor,
    *,
    refused_texts: Sequence[str],
    pairs: Sequence[tuple],
    preset: str = "moras",
    min_refused: int = 10,
    progress: bool = True,
    **overrides,
) -> RasProfile:
    """A profile for ``model``: refusal prototypes from texts that it refuses, S_base and k from image-question pairs.

    refused_texts: about 50 text-only requests that the model itself refuses. Those it answers (by the rules of
        `ras_fast.refusals.is_refusal`) are dropped.
    pairs: about 50 of (image, unsafe question, safe question), or with a fourth entry, the image of the safe one. Never use
        these in a test set.
    preset: "moras" or "ras"; they differ in the context prompt.
    min_refused: fewer refused texts than this are an error.
    overrides: replace settings of the preset: gamma, steps, max_context_tokens, gate ("continuous", "binary" or a
        constant in [0, 1]), context_prompt, safety_prompt.

    Raises ValueError when fewer than ``min_refused`` texts are refused, when there are no pairs or some cannot be used, for
    unknown settings, for a model in training mode, when the outcome is not finite, and when a gate that depends on S would
    see no more in the unsafe questions than in the safe ones.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset is {preset!r}; it needs to be one of {', '.join(PRESETS)}")
    unknown = set(overrides) - set(PRESETS[preset])
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; the preset has {sorted(PRESETS[preset])}")
    check_arguments(model, processor, pairs=pairs)
    if not pairs:
        raise ValueError("pairs is empty; S_base needs image-question pairs")
    config = _checked(PRESETS[preset] | overrides, PRESETS[preset])
    questions = list(zip(*question_pairs(pairs, processor), strict=True))
    prototypes = refusal_prototypes(model, processor, refused_texts, config["steps"], min_refused, progress)
    draft = RasProfile(preset, config | {"s_base": 0.0, "k": 1.0}, {"prototypes": prototypes})
    moras = Moras(draft, output_head(model), model.device, text_dtype(model))
    unsafe, safe = zip(*_similarities(model, processor, questions, moras, progress), strict=True)
    s_base = (sum(unsafe) + sum(safe)) / (2 * len(unsafe))
    if isinstance(config["gate"], str) and not _share_above(unsafe, safe) > 0.5:
        means = [sum(values) / len(values) for values in (unsafe, safe)]
        raise ValueError(
            f"S is {means[0]:.3f} on average for the unsafe questions of the pairs, {means[1]:.3f} for the safe ones, and no "
            "more often higher for the unsafe than lower: under safety_prompt this model does not tell them apart"
        )
    if not s_base < 0.999:
        raise ValueError(f"S_base is {s_base:.4f}: on the calibration pairs every answer already looks like a refusal")
    config |= {"s_base": s_base, "k": math.log(0.99 / 0.01) / (1 - s_base)}
    return RasProfile(preset, config, {"prototypes": prototypes}, fingerprint(model, processor))


def refusal_prototypes(model, processor, texts: Sequence[str], steps: int, minimum: int, progress: bool) -> Tensor:
    """μ [steps, d] fp32: the mean state at each of the first greedy steps over the texts that the model refuses.

    Raises ValueError when it refuses fewer than `minimum`, and where `texts` is no list of texts.
    """
    if not is_integer(minimum):
        raise ValueError(f"min_refused is {minimum!r}; it needs to be an integer")
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"refused_texts is a {type(texts).__name__}; it needs to be a list of texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"refused_texts[{i}] is {text!r:.100}; it needs to be a text that is not empty")

    def states_of_refusal(query: Query) -> Tensor | None:
        inputs, _ = encode(processor, query, model.device, model.dtype)
        tokens, states, _ = reference_generate(model, processor, inputs, Decoding(max(REFUSAL_TOKENS, steps)))
        refuses = is_refusal(processor.tokenizer.decode(tokens, skip_special_tokens=True)) and len(states) >= steps
        return states[:steps].float().cpu() if refuses else None

    found = parallel.each(states_of_refusal, make_queries(list(texts), None, processor), "refused texts", progress)
    refused = [states for states in found if states is not None]
    if len(refused) < max(minimum, 1):
        raise ValueError(
            f"the model refuses {len(refused)} of {len(texts)} refused_texts, at least {max(minimum, 1)} are needed: "
            "prototypes of a model that does not refuse mean nothing"
        )
    return torch.stack(refused).mean(dim=0)


def _similarities(model, processor, pairs: list[tuple[Query, Query]], moras: Moras, progress: bool) -> list[list[float]]:
    """(S of the unsafe, S of the safe question) of each pair; those about one picture share its context."""

    def both(pair: tuple[Query, Query]) -> list[float]:
        unsafe, safe = pair
        context = describe(model, processor, unsafe, moras)
        other = context if safe.images == unsafe.images else describe(model, processor, safe, moras)
        return [assess(model, processor, query, told, moras).item() for query, told in ((unsafe, context), (safe, other))]

    return parallel.each(both, pairs, "image-question pairs", progress)


def _share_above(unsafe: Sequence[float], safe: Sequence[float]) -> float:
    """How often one of ``unsafe`` is above one of ``safe``, ties counting half."""
    return sum((u > s) + (u == s) / 2 for u in unsafe for s in safe) / (len(unsafe) * len(safe))


def _checked(config: dict, names) -> dict:
    """``config`` with exactly the settings ``names``, each of a usable value."""
    missing = set(names) - set(config)
    if missing:
        raise ValueError(f"profile config lacks {sorted(missing)}; it has {sorted(config)}")
    gate = config["gate"]
    if gate not in ("continuous", "binary") and not (is_number(gate) and 0 <= gate <= 1):
        raise ValueError(f"gate is {gate!r}; it needs to be 'continuous', 'binary' or a constant in [0, 1]")
    for name in ("steps", "max_context_tokens"):
        if not is_integer(config[name]) or not 1 <= config[name] < 2**31:
            raise ValueError(f"{name} is {config[name]!r}; it needs to be an integer of at least 1, below 2³¹")
    if not 0 <= number(config, "gamma") <= 1:
        raise ValueError(f"gamma is {config['gamma']!r}; it needs to be in [0, 1]")
    for name in ("context_prompt", "safety_prompt"):
        if not isinstance(config[name], str) or not config[name].strip() or not is_unicode(config[name]):
            raise ValueError(f"{name} is {config[name]!r}; it needs to be a non-empty string of whole characters")
    return {name: config[name] for name in names}
