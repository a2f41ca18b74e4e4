"""The reference: MoRAS as three calls of ``model.generate``, one query at a time, with nothing shared between them.

Slow and plain on purpose. Tests hold the engine to its tokens, benchmarks to its time.
"""

from __future__ import annotations

import time

import torch
from tqdm.auto import tqdm

from ras_fast.decoding import BROKEN, Decoding, broken_rows, check_streamer, eos_ids, next_tokens
from ras_fast.engine import SafeOutput
from ras_fast.engine.answer import BAD_PIXELS, CUT, NO_RISK
from ras_fast.fingerprint import wording
from ras_fast.inputs import Query, encode, make_queries, refuse_typed_pieces
from ras_fast.methods import refuse_attached, region_bias
from ras_fast.methods.attention import prompt_features
from ras_fast.methods.moras import Moras, assess, describe
from ras_fast.model_checks import TooLong, check_length, check_mode, check_parts
from ras_fast.model_lock import at_rest, lock_of
from ras_fast.output_head import output_head
from ras_fast.patching import patched
from ras_fast.patching.structure import text_dtype
from ras_fast.profile import RasProfile
from ras_fast.reference import reference_generate


class _EndedLater:
    """A streamer whose end `model.generate` does not reach, so that it is ended once. It cannot run the model meanwhile."""

    def __init__(self, model, streamer):
        self.model, self.streamer = model, streamer

    def put(self, tokens) -> None:
        with at_rest(self.model, self.streamer):
            self.streamer.put(tokens)

    def end(self) -> None:
        pass


class SequentialPipeline:
    """MoRAS or RAS without the engine: the answers of `SafeGenerator`, by three full generations per query.

    model, processor, profile: as for `SafeGenerator`; the model may be patched or not. One call at a time on a model, in turn
        with those of `SafeGenerator`s.

    Raises ValueError when an argument has the wrong type, the profile is of another model, or of a method without stages.
    """

    def __init__(self, model, processor, profile: RasProfile):
        check_parts(model, processor, profile)
        profile.check(model, processor)
        self.model, self.processor, self.profile, self._wording = model, processor, profile, wording(processor)
        self.head = output_head(model)
        self.moras = Moras(profile, self.head, model.device, text_dtype(model))

    def generate(self, prompts, images=None, *, streamer=None, progress=None, **decoding) -> list[SafeOutput]:
        """See `SafeGenerator.generate`; a batch is one query here."""
        check_streamer(streamer)
        try:
            decoding = Decoding.of(decoding)
            queries = make_queries(prompts, images, self.processor)
            if streamer is not None and len(queries) != 1:
                raise ValueError(f"a streamer takes one prompt, got {len(queries)}")
            progress = len(queries) > 1 if progress is None else progress
            with lock_of(self.model):
                check_mode(self.model)
                refuse_attached(self.model)
                self._renew()
                return [
                    self._answer(number, query, decoding, None if streamer is None else _EndedLater(self.model, streamer))
                    for number, query in enumerate(tqdm(queries, desc="queries", disable=not progress))
                ]
        finally:
            if streamer is not None:
                streamer.end()  # whatever happened, or the thread that reads it waits for ever

    def _renew(self) -> None:
        """The model may be another one than at the last call: its adapters switched, its head changed; or the processor may."""
        self.profile.check(self.model)
        self._wording = self.profile.check_again(self.model, self.processor, self._wording)
        self.head = output_head(self.model)
        self.moras.read_prototypes(self.head, text_dtype(self.model))

    def describe(self, query: Query) -> str:
        """Stage 1: the context. A subclass may put another one in its place."""
        return describe(self.model, self.processor, query, self.moras)

    def _answer(self, number: int, query: Query, decoding: Decoding, streamer) -> SafeOutput:
        bias = self.profile.tensors.get("region_bias")
        if bias is None:
            return self._stages(number, query, decoding, streamer)
        with patched(self.model) as patch, region_bias(patch, bias):
            return self._stages(number, query, decoding, streamer)

    @torch.no_grad()
    def _stages(self, number: int, query: Query, decoding: Decoding, streamer) -> SafeOutput:
        begin = described = time.perf_counter()
        try:
            refuse_typed_pieces(self.processor, query, getattr(self.model.config, "image_token_id", None))
            inputs, poisoned = encode(self.processor, query, self.model.device, self.model.dtype)
            check_length(self.model, inputs["input_ids"][0].tolist())
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}") from error
        context, similarity, too_long = "", torch.full((1,), torch.nan, device=self.model.device), None
        try:
            context = self.describe(query)
            described = time.perf_counter()
            similarity = assess(self.model, self.processor, query, context, self.moras)
        except TooLong as error:
            too_long = str(error)
        if poisoned:
            similarity = torch.full_like(similarity, torch.nan)
        risk, failed = self.moras.risk(similarity, *self._features(query))
        assessed = time.perf_counter()

        tokens, states, logits = reference_generate(
            self.model,
            self.processor,
            inputs,
            decoding,
            query=number,
            edit=lambda step, hidden: self.moras.steer(hidden, risk, step),
            streamer=streamer,
        )
        answered = time.perf_counter()
        broken = bool(broken_rows(logits[-1]))
        produced = [*tokens[: len(states) - 1], BROKEN] if broken else tokens
        why = BAD_PIXELS if poisoned else too_long or (NO_RISK if failed.item() else CUT if broken else None)
        return SafeOutput(
            text=self.processor.tokenizer.decode(tokens, skip_special_tokens=True),
            tokens=tokens,
            risk=risk.item(),
            similarity=similarity.item(),
            context=context,
            rejected_at=self._first_changed(number, inputs, decoding, produced, states),
            failed_closed=why,
            timings={
                "context": described - begin,
                "risk": assessed - described,
                "answer": answered - assessed,
                "total": answered - begin,
            },
        )

    def _features(self, query: Query) -> tuple[torch.Tensor, torch.Tensor] | tuple[()]:
        """The arguments of `Moras.risk` beside S, computed by a forward of their own: () unless the gate reads attention."""
        if self.moras.attention is None:
            return ()
        with patched(self.model) as patch:
            found, has_images = prompt_features(patch, self.processor, query, self.moras.attention.heads)
        return found[None], has_images[None]

    def _first_changed(self, number: int, inputs, decoding: Decoding, produced, states) -> int | None:
        """The first step whose token would have been another one without steering."""
        prompt = inputs["input_ids"]
        processors = decoding.processors(number, prompt.shape[1], eos_ids(self.model))
        for n, token in enumerate(produced[: self.moras.steps]):
            ids = torch.cat([prompt, torch.tensor([produced[:n]], dtype=torch.long, device=prompt.device)], dim=1)
            if next_tokens(processors, ids, self.head(states[n][None]).float()).item() != token:
                return n
        return None
