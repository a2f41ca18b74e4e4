"""What comes out of the engine, and a sequence on its way there."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ras_fast.decoding import BROKEN, Decoding, holds_stop, next_tokens

# Values of `SafeOutput.failed_closed`.
CUT = "the model's logits are not finite: the answer ends there"
NO_RISK = "the risk could not be computed"
BAD_PIXELS = "an image holds NaN or infinite pixels"


@dataclass
class SafeOutput:
    """One defended answer.

    text, tokens: the answer; tokens end with the end-of-sequence token if it was produced.
    risk: r in [0, 1] of this query.
    similarity: MoRAS's S; NaN where it could not be computed, and for other methods.
    context: what stage 1 of MoRAS said about the images; empty without images.
    rejected_at: the first step whose token MoRAS's steering changed, None when it changed nothing.
    failed_closed: why the risk was set to 1 without having been computed, or else why the answer was cut short; None normally.
    region_mass: [layers, heads, images] fp32, how much attention the prompt's last token pays to each image of the query;
        to each tile where tiles are regions of their own (docs/integration.md); NaN for heads that a layer lacks. None unless
        the generator was made with ``region_mass=True``.
    timings: seconds per stage, of the batch that the query was in, and in all ("total"); "first_token", which
        `SequentialPipeline` does not tell, is when its first token could be shown.
    """

    text: str
    tokens: list[int]
    risk: float
    similarity: float = float("nan")
    context: str = ""
    rejected_at: int | None = None
    failed_closed: str | None = None
    region_mass: Tensor | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def steered(self) -> bool:
        """Whether MoRAS's steering changed a token of the answer."""
        return self.rejected_at is not None


class Sequence:
    """A prompt and what was produced after it.

    broken: whether it ended because the logits were not finite. Its last token is then that of the end of sequence, in a model
        that has one.
    """

    def __init__(self, prompt: list[int], decoding: Decoding, query: int, eos: list[int], tokenizer, device):
        self.prompt, self.tokens = prompt, []
        self.decoding, self.eos, self.tokenizer = decoding, eos, tokenizer
        self.processors = decoding.processors(query, len(prompt), eos)
        self.plain = len(self.processors) == 1  # argmax of the logits, but for the end of rows that are not finite
        self.done = self.broken = False
        # Processors may read what came before; it stays on the device, where the next token is made.
        self._history = None
        if not self.plain:
            self._history = torch.zeros(len(prompt) + decoding.max_new_tokens, dtype=torch.long, device=device)
            self._history[: len(prompt)] = torch.tensor(prompt)

    @property
    def produced(self) -> list[int]:
        """The token of each step that was made: `tokens`, with BROKEN as the last one where the sequence is."""
        return [*self.tokens[: len(self.tokens) - bool(self.eos)], BROKEN] if self.broken else self.tokens

    def append(self, token: int) -> None:
        """One more token; a sequence that is done takes no more."""
        if self.done:
            return
        if token == BROKEN:
            self.done = self.broken = True
            self.tokens += self.eos[:1]
            return
        self.tokens.append(token)
        self.done = (
            token in self.eos
            or len(self.tokens) >= self.decoding.max_new_tokens
            or holds_stop(self.decoding.stop_strings, self.tokenizer, self.tokens)
        )

    def rewind(self, step: int, token: int) -> None:
        """Back to ``step``, where ``token`` is now produced."""
        self.tokens, self.done, self.broken = self.tokens[:step], False, False
        self.append(token)
        if not self.plain and not self.broken:
            self._history[len(self.prompt) + step] = token

    def token(self, logits: Tensor, step: int) -> Tensor:
        """The token [] that a step's logits [V] give. No host sync."""
        ids = None if self.plain else self._history[None, : len(self.prompt) + step]
        return next_tokens(self.processors, ids, logits[None])[0]

    def choose(self, logits: Tensor, step: int) -> Tensor:
        """`token`, noted as what the step produced."""
        if step >= self.decoding.max_new_tokens:
            return logits.argmax()  # the sequence is over, nobody will read this
        token = self.token(logits, step)
        if not self.plain:
            self._history[len(self.prompt) + step] = token.clamp(min=0)  # no processor is to look up BROKEN
        return token
