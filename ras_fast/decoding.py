"""How the next token is chosen and when an answer ends. The reference pipeline and the engine share every rule here."""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass, fields, replace

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ras_fast.checks import check_counts, check_flags, is_integer, is_number
from ras_fast.model_lock import at_rest

BROKEN = -1  # in place of a token, where nothing may be read
MOST_TOKENS = 1 << 30  # of an answer; with its prompt they are counted in 32 bits


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
        if self.max_new_tokens > MOST_TOKENS:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it needs to be at most {MOST_TOKENS}")
        check_flags(do_sample=self.do_sample)
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
        finite = sys.float_info.max
        allowed = {
            "temperature": (lambda value: 0 < value <= finite, "a number above 0 that a float holds"),
            "repetition_penalty": (lambda value: 0 < value <= finite, "a number above 0 that a float holds, or None"),
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
            chain.append(RepetitionPenaltyLogitsProcessor(float(self.repetition_penalty)))
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


def holds_stop(stops, tokenizer, tokens: list[int]) -> bool:
    """Whether the text of ``tokens`` holds one of ``stops``."""
    if not stops:
        return False
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return any(stop in text for stop in stops)


def check_streamer(streamer) -> None:
    """Raises ValueError for what is neither None nor a streamer as transformers has them."""
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise ValueError(f"streamer is a {type(streamer).__name__}; it needs the methods put(tokens) and end()")


def eos_ids(model) -> list[int]:
    """The token ids that end an answer, from the model's generation config; empty when it names none."""
    eos = getattr(model.generation_config, "eos_token_id", None)
    return [] if eos is None else list(eos) if isinstance(eos, (list, tuple)) else [eos]
