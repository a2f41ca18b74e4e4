"""How the next token is chosen and when an answer ends. The reference pipeline and the engine share every rule here."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ras_fast.inputs import Query, encode
from ras_fast.patching.structure import find_head
from ras_fast.patching.tracking import token_ids
from ras_fast.profile import RasProfile, check_counts, is_integer, is_number, modules_of

BROKEN = -1  # in place of a token, where nothing may be read


class ModelLock(type(threading.RLock())):
    """A re-entrant lock, held by one thread at a time. Of the class that is written in C, whose `__exit__` Ctrl-C cannot strike
    before it has let go: other threads would wait for ever.

    busy_for: whom the thread that holds it has called in the middle of an answer (`at_rest`): until that returns, entering the
        lock raises RuntimeError.

    In a process that was forked while another thread held it, entering it raises RuntimeError: nobody would release it there,
    and the model still carries that thread's hooks.
    """

    def __init__(self):
        super().__init__()
        self._left_behind = False
        self.busy_for: object | None = None

    def __enter__(self) -> None:
        if self._left_behind:
            raise RuntimeError("this process was forked while another thread was answering with the model; load it anew here")
        if self.busy_for is not None and self._is_owned():
            raise in_mid_answer(self.busy_for)
        self.acquire()

    def after_fork(self) -> None:
        """In the child."""
        self._left_behind = not self.acquire(blocking=False)
        if not self._left_behind:
            self.release()


_LOCKS: WeakKeyDictionary[torch.nn.Module, ModelLock] = WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def _after_fork() -> None:
    global _LOCKS_LOCK
    _LOCKS_LOCK = threading.Lock()
    for lock in _LOCKS.values():
        lock.after_fork()


if hasattr(os, "register_at_fork"):  # Windows does not fork
    os.register_at_fork(after_in_child=_after_fork)


def transformers_model(model):
    """The transformers model inside what `torch.compile` makes of it, or a PEFT one, whose adapters are modules of it; else the
    model itself."""
    while hasattr(model, "_orig_mod") or hasattr(model, "get_base_model"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.get_base_model()
    return model


def lock_of(model) -> ModelLock:
    """One for all who patch a model, hang hooks on it or count its steps while it answers: the engine and the reference."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(transformers_model(model), ModelLock())


def check_mode(model) -> None:
    """Raises ValueError for a model with a part in training mode, whose dropout would make every answer another one."""

    def trains(module: torch.nn.Module) -> bool:
        return module.training and not isinstance(module, torch.nn.Identity)  # PEFT adds some that do nothing, in training mode

    if not any(map(trains, modules_of(model))):
        return
    part = next(name for name, module in model.named_modules() if trains(module))
    raise ValueError(f"model is in training mode{part and f' at {part}'}; it needs to be in eval mode: call model.eval()")


def check_parts(model, processor, profile) -> None:
    """Raises ValueError for what cannot be a model in eval mode, its processor and a profile."""
    if not isinstance(profile, RasProfile):
        raise ValueError(f"profile is a {type(profile).__name__}; it needs to be a RasProfile (RasProfile.from_pretrained)")
    check_model(model, processor)


def check_model(model, processor) -> None:
    """Raises ValueError for what cannot be a model in eval mode and its processor."""
    if not hasattr(model, "get_output_embeddings"):
        raise ValueError(f"model is a {type(model).__name__}; it needs to be a transformers model")
    if not hasattr(processor, "tokenizer"):
        raise ValueError(f"processor is a {type(processor).__name__}; it needs to be the model's multimodal processor")
    check_mode(model)


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded. Greedy unless ``do_sample``.

    max_new_tokens: of an answer, the end-of-sequence token included.
    temperature, top_k, top_p, min_p, repetition_penalty: as in transformers' GenerationConfig; all but the last are for
        ``do_sample``.
    seed: of the sampling noise.
    stop_strings: one string or several; an answer ends once its text holds one, and keeps it.
    logits_processors: transformers LogitsProcessors without state, which do not run the model; before the sampling ones.

    Sampling is argmax(processed logits + Gumbel noise), which draws from softmax(processed logits). On one kind of device the
    noise depends on (seed, query, step) alone, so two ways to compute the same logits draw the same tokens, whatever is
    batched with them.

    Raises ValueError for a setting that cannot be used: out of its range, of another type, or of sampling in greedy decoding.
    """

    max_new_tokens: int = 64
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    logits_processors: tuple[LogitsProcessor, ...] = ()

    def apart_from(self, model) -> Decoding:
        """A copy whose logits processors raise RuntimeError where they run ``model``: that forward would be steered, and
        counted as part of the answer."""
        return replace(self, logits_processors=tuple(_Apart(model, processor) for processor in self.logits_processors))

    @classmethod
    def of(cls, settings: dict) -> Decoding:
        """From the keyword arguments of a ``generate``. Raises TypeError for one that is none of the fields."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(settings) - set(names))
        if unknown:
            raise TypeError(f"generate takes no {', '.join(unknown)}; how answers are decoded is set by {', '.join(names)}")
        return cls(**settings)

    def __post_init__(self):
        check_counts(max_new_tokens=self.max_new_tokens)
        if not isinstance(self.do_sample, bool):
            raise ValueError(f"do_sample is {self.do_sample!r}; it needs to be True or False")
        if not is_integer(self.seed):  # a list, one a prompt, would be taken for one seed
            raise ValueError(f"seed is {self.seed!r}; it needs to be one integer, from which each query's noise follows")
        self._check_numbers()
        given = ([] if some is None else some for some in (self.stop_strings, self.logits_processors))
        stops, processors = (tuple(some) if isinstance(some, (list, tuple)) else (some,) for some in given)
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError(f"stop_strings is {self.stop_strings!r}; it needs to hold non-empty strings")
        if not all(map(callable, processors)):  # nor an iterator, which would serve the first sequence alone
            raise ValueError(f"logits_processors is {self.logits_processors!r}; it needs to be a list of LogitsProcessors")
        object.__setattr__(self, "stop_strings", stops)
        object.__setattr__(self, "logits_processors", processors)

    def _check_numbers(self) -> None:
        allowed = {
            "temperature": (lambda value: 0 < value < math.inf, "a number above 0"),
            "repetition_penalty": (lambda value: 0 < value < math.inf, "a number above 0, or None"),
            "top_k": (lambda value: isinstance(value, int) and value >= 0, "an integer of at least 0, or None"),
            "top_p": (lambda value: 0 < value <= 1, "in (0, 1], or None"),
            "min_p": (lambda value: 0 <= value <= 1, "in [0, 1], or None"),
        }
        if not self.do_sample:
            neutral = (0, 1)  # a temperature of 0 is how others ask for greedy decoding
            greedy = (lambda value: value in neutral, "given with do_sample=True only: without it decoding is greedy")
            allowed |= dict.fromkeys(("temperature", "top_k", "top_p", "min_p"), greedy)
        for name, (holds, need) in allowed.items():
            value = getattr(self, name)
            if not (value is None and name != "temperature") and not (is_number(value) and holds(value)):
                raise ValueError(f"{name} is {value!r}; it needs to be {need}")

    def processors(self, query: int, prompt_length: int, eos: list[int]) -> LogitsProcessorList:
        """What turns raw logits into scores whose argmax is the next token of query number ``query``."""
        chain = LogitsProcessorList([EndWhenNotFinite(eos)])
        if self.repetition_penalty not in (None, 1.0):
            chain.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        chain.extend(self.logits_processors)
        if self.do_sample:
            chain.extend(warpers(self.temperature, self.top_k, self.top_p))
            if self.min_p:
                chain.append(MinPLogitsWarper(self.min_p))  # transformers' order; it is vLLM's that `warpers` has
            chain.append(GumbelNoise(self.seed, query, prompt_length))
        return chain


def warpers(temperature: float, top_k: int | None, top_p: float | None, min_p: float = 0.0) -> LogitsProcessorList:
    """What makes of logits the scores whose softmax is sampled from. Settings as in transformers and vLLM, min_p before top_k
    as in vLLM; those that do nothing are left out."""
    chain = LogitsProcessorList()
    if temperature != 1.0:
        chain.append(TemperatureLogitsWarper(float(temperature)))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    if top_k is not None and top_k > 0:
        chain.append(TopKLogitsWarper(top_k))
    if top_p is not None and top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    return chain


class _Apart(LogitsProcessor):
    def __init__(self, model, processor: LogitsProcessor):
        self.model, self.processor = model, processor

    def __call__(self, input_ids, scores):
        with at_rest(self.model, self.processor):
            return self.processor(input_ids, scores)


@contextmanager
def at_rest(model, caller) -> Iterator[None]:
    """Inside the block a forward of the model by this thread, which holds its lock, raises RuntimeError, which names the type
    of ``caller``, and so does whatever takes the lock: another answer, or `SafeGenerator.close`."""
    lock = lock_of(model)

    def refuse(module, args):
        raise in_mid_answer(caller)

    with transformers_model(model).base_model.register_forward_pre_hook(in_this_thread(refuse)):
        lock.busy_for = caller
        try:
            yield
        finally:
            lock.busy_for = None


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """A forward hook that does nothing in forwards of other threads than the one that makes it."""
    thread = threading.get_ident()
    return lambda *args: hook(*args) if threading.get_ident() == thread else None


def in_mid_answer(caller) -> RuntimeError:
    """What is to be raised where ``caller``, a streamer or a logits processor, runs the model that it works for."""
    return RuntimeError(
        f"{type(caller).__name__} runs the model in the middle of an answer, whose steering would reach what it asks; it needs "
        "a model of its own"
    )


class EndWhenNotFinite(LogitsProcessor):
    """A row whose logits hold NaN or +inf can only end: nothing may be read out of them.

    broken: [B] bool, such rows of the latest call. No host sync.
    """

    def __init__(self, eos: list[int]):
        self.eos, self.broken = eos, None

    def __call__(self, input_ids, scores):
        self.broken = broken_rows(scores)
        only_end = torch.full_like(scores, -torch.inf)
        only_end[:, self.eos[0] if self.eos else 0] = 0
        return torch.where(self.broken[:, None], only_end, scores)


def broken_rows(logits: torch.Tensor) -> torch.Tensor:
    """[...] bool: the rows of logits [..., V] that hold NaN or +inf. No host sync."""
    return ~(logits < torch.inf).all(dim=-1)


def next_tokens(processors: LogitsProcessorList, ids: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """The tokens [B] that logits [B, V] give after ``ids``, by `Decoding.processors`; BROKEN where the logits are not finite,
    whatever other processors forbid. No host sync."""
    tokens = processors(ids, logits).argmax(dim=-1)
    return tokens.masked_fill(processors[0].broken, BROKEN)


class GumbelNoise(LogitsProcessor):
    """Adds the Gumbel noise of (seed, query, step), made on the device: a vocabulary of it would take longer to make on the CPU
    and to send than a decode step takes."""

    def __init__(self, seed: int, query: int, prompt_length: int):
        self.seed, self.query, self.prompt_length = seed, query, prompt_length

    def __call__(self, input_ids, scores):
        return add_gumbel_noise(scores, self.seed, self.query, input_ids.shape[1] - self.prompt_length)


def add_gumbel_noise(scores: torch.Tensor, seed: int, query: int, step: int) -> torch.Tensor:
    """Scores [..., V] with the noise [V] of (seed, query, step)."""
    key = hashlib.sha256(f"{seed}/{query}/{step}".encode()).digest()
    generator = torch.Generator(scores.device).manual_seed(int.from_bytes(key[:8], "big") >> 1)
    # Float64 keeps uniform numbers away from 0 and 1, where the double logarithm is infinite.
    options = {"dtype": torch.float64, "device": scores.device}
    uniform = torch.rand(scores.shape[-1], generator=generator, **options).clamp_(min=1e-300)
    return scores + (-(-uniform.log()).log()).to(scores.dtype)


class StopStrings(StoppingCriteria):
    """Ends an answer once its text holds one of the strings. For one sequence at a time."""

    def __init__(self, stops, tokenizer, prompt_length: int):
        self.stops, self.tokenizer, self.prompt_length = stops, tokenizer, prompt_length

    def __call__(self, input_ids, scores, **kwargs):
        stopped = holds_stop(self.stops, self.tokenizer, input_ids[0, self.prompt_length :].tolist())
        return torch.tensor([stopped], device=input_ids.device)


class StopWhenBroken(StoppingCriteria):
    """Ends an answer whose logits are not finite, also where no end-of-sequence token does: the model has none, or a processor
    forbids it. For one sequence at a time."""

    def __init__(self, end: EndWhenNotFinite):
        self.end = end

    def __call__(self, input_ids, scores, **kwargs):
        if self.end.broken is None:  # as Janus's
            raise ValueError(
                "this model's `generate` leaves out the `logits_processor` that it is given, which sees to it that an answer "
                "ends where its logits are not finite, and decodes as asked: use ras_fast.SafeGenerator, which does without"
            )
        return self.end.broken


def holds_stop(stops, tokenizer, tokens: list[int]) -> bool:
    """Whether the text of ``tokens`` holds one of ``stops``."""
    if not stops:
        return False
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return any(stop in text for stop in stops)


def output_head(model):
    """The function from hidden states after the last norm to logits, with what the model does to them after its last matrix: a
    factor, a soft cap, tokens that it rules out."""
    layer, text = find_head(model), model.config.get_text_config()
    named = [getattr(text, name, None) for name in ("logit_scale", "logits_scaling", "output_multiplier")]
    factors = [1.0, *(factor for value in named if value for factor in (value, 1 / value))]
    caps = [*filter(None, [getattr(text, "final_logit_softcapping", None)]), None]
    if len(factors) == len(caps) == 1 and not getattr(model.config, "vocabulary_map", None):
        return layer
    plain, logits = _small_forward(model, layer)
    # Chameleon's image tokens, which are in its vocabulary, get the lowest number there is.
    ruled_out = (logits == torch.finfo(logits.dtype).min).all(dim=1)[0]
    wanted = logits[..., ~ruled_out].double()

    def finish(logits: torch.Tensor, factor: float, cap: float | None) -> torch.Tensor:
        logits = logits if factor == 1 else logits * factor
        return cap * torch.tanh(logits / cap) if cap else logits

    def error(done: tuple) -> float:
        return float((finish(plain, *done)[..., ~ruled_out].double() - wanted).norm())

    # Some families divide by what others multiply with, some have a factor or a cap in their config and leave it out.
    factor, cap = min(product(factors, caps), key=error)
    only = ruled_out if ruled_out.any() else None

    def head(hidden: torch.Tensor) -> torch.Tensor:
        logits = finish(layer(hidden), factor, cap)
        return logits if only is None else logits.masked_fill(only, torch.finfo(logits.dtype).min)

    return head


@torch.no_grad()
def _small_forward(model, layer) -> tuple[torch.Tensor, torch.Tensor]:
    """What a small forward's last matrix gives, and the model's logits, both [1, 4, V]."""
    plain = []

    def note(module, args, output) -> None:
        plain.append(output.clone())  # the model may write into it

    ids = torch.arange(4, device=model.device)[None]  # one may be that of padding, and embedded as zeros
    with lock_of(model), layer.register_forward_hook(in_this_thread(note)):
        logits = model(input_ids=ids, use_cache=False).logits
    return plain[-1], logits


@torch.no_grad()
def reference_generate(model, processor, inputs, decoding: Decoding, *, query: int = 0, edit=None, streamer=None):
    """``model.generate`` for one query, with the hidden states after the last norm on view. One call at a time on a model, in
    turn with the engine's.

    inputs: from `ras_fast.inputs.encode`.
    edit: None, or ``edit(step, hidden [1, d]) -> hidden``, which replaces the state from which that step's token is read.

    Returns the produced token ids (an end-of-sequence token included), the states before ``edit`` [n, d], and the
    logits that the tokens were read from [n, V]. Where the last of these are not finite, the last token is that of the end of
    sequence; in a model that has none there are n − 1 tokens.
    """
    states = []

    def watch(module, args):
        states.append(args[0][:, -1])
        if edit is None:
            return None
        edited = args[0].clone()
        edited[:, -1] = edit(len(states) - 1, states[-1])
        return (edited, *args[1:])

    length = inputs["input_ids"].shape[1]
    check_length(model, inputs["input_ids"][0].tolist())
    chain = decoding.apart_from(model).processors(query, length, eos_ids(model))
    with lock_of(model), find_head(model).register_forward_pre_hook(in_this_thread(watch)), _own_config_set_aside(model):
        output = model.generate(
            **inputs,
            attention_mask=torch.ones_like(inputs["input_ids"]),
            max_new_tokens=decoding.max_new_tokens,
            do_sample=False,
            num_beams=1,
            logits_processor=chain,
            stopping_criteria=[StopStrings(decoding.stop_strings, processor.tokenizer, length), StopWhenBroken(chain[0])],
            return_dict_in_generate=True,
            output_logits=True,
            streamer=streamer,
        )
    tokens = output.sequences[0, length:].tolist()
    if chain[0].broken:
        tokens[-1:] = chain[0].eos[:1]
    return tokens, torch.cat(states), torch.cat(output.logits)


@contextmanager
def _own_config_set_aside(model) -> Iterator[None]:
    """generate() fills in what is not given from the model's own config, say a ban of repetitions; the engine does not."""
    model = transformers_model(model)
    own = model.generation_config
    tokens = {name: getattr(own, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:  # with the assignment, after which Ctrl-C may come at once
        model.generation_config = GenerationConfig(**tokens)
        yield
    finally:
        model.generation_config = own


def generate_text(model, processor, query: Query, decoding: Decoding, edit=None) -> str:
    """The answer of one ``model.generate``, as text; ``edit`` as in `reference_generate`."""
    inputs, _ = encode(processor, query, model.device, model.dtype)
    tokens, _, _ = reference_generate(model, processor, inputs, decoding, edit=edit)
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


def check_streamer(streamer) -> None:
    """Raises ValueError for what is neither None nor a streamer as transformers has them."""
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer is a {type(streamer).__name__}; it needs the methods put(tokens) and end()")


class TooLong(ValueError):
    """A prompt has more tokens than the model has positions."""


def check_length(model, prompt: Sequence[int]) -> None:
    """Raises TooLong for a prompt, as token ids, that takes more positions than the model has."""
    check_positions(model, _least_positions(model, prompt))


def check_positions(model, taken: int) -> None:
    """Raises TooLong for a prompt that takes more positions than the model has, however its RoPE is scaled: what it says of
    such a prompt, and so its risk, means nothing."""
    trained = positions_of(model)
    if taken > trained:
        raise TooLong(f"a prompt has {taken} tokens; {type(model).__name__} has {trained} positions")


def _least_positions(model, prompt: Sequence[int]) -> int:
    """How many positions a prompt takes at least. By M-RoPE an image takes fewer than it has tokens: what counts for sure is
    the words'."""
    if not hasattr(model.base_model, "get_rope_index"):
        return len(prompt)
    visual = {*token_ids(model.config).values()}
    return sum(token not in visual for token in prompt) if visual else 0


def positions_of(model) -> float:
    """How many positions a model is made for; infinity where its config does not say."""
    config = model.config.get_text_config()
    trained, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None) or {}
    if not trained:
        return math.inf
    if any(isinstance(part, dict) for part in rope.values()):  # by kind of layer, as Gemma 3's, which counts the scaled ones
        return trained
    # Where the length before scaling is told, the config's own is that or the one after it.
    return max(trained, int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1)))


def eos_ids(model) -> list[int]:
    """The token ids that end an answer, from the model's generation config; empty when it names none."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
