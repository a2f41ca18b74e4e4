"""What every way to a defended answer shares."""

from __future__ import annotations

import time
from collections import Counter

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ras_fast.batching import SIGHT
from ras_fast.decoding import Decoding
from ras_fast.engine.answer import CUT, SafeOutput, Sequence
from ras_fast.engine.batch import Batch
from ras_fast.engine.branch import Branch
from ras_fast.engine.runner import Runner
from ras_fast.inputs import Query, encode, refuse_typed_pieces
from ras_fast.model_checks import check_length
from ras_fast.regions import RegionMap


class Plan:
    """How a batch of queries becomes defended answers: `answer` does it, `describe` explains it in words.

    last_timings: seconds per stage of the latest batch.
    needs_patch: whether the method reads or steers inside the model, which then has to be patched.
    attaches: whether something in the model is not as its user left it while an answer is shown.
    """

    needs_patch = attaches = False

    def __init__(self, runner: Runner, processor, counters: Counter):
        self.runner, self.processor, self.counters = runner, processor, counters
        self.last_timings: dict[str, float] = {}

    def renew(self) -> None:
        """To be called when the model was changed: drops what was derived of it as it was."""
        self.runner.find_parts()

    def check(self, number: int, query: Query) -> None:
        """Raises ValueError for a query that the method cannot judge."""

    def answer(self, queries: list[tuple[int, Query]], decoding: Decoding, streamer) -> list[SafeOutput]:
        """The answers to (number, query) pairs, in their order."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """The plan and what was counted, in lines of text."""
        raise NotImplementedError

    def encode(self, query: Query) -> tuple[dict[str, Tensor], bool]:
        """`ras_fast.inputs.encode` for the model: (inputs, whether an image holds pixels that are not finite)."""
        return encode(self.processor, query, self.runner.device, self.runner.model.dtype)

    def read(self, number: int, query: Query, decoding: Decoding) -> tuple[dict[str, Tensor], bool, Sequence]:
        """(inputs, whether an image holds pixels that are not finite, the answer's sequence) of a query.

        Raises ValueError, which names the query, for one that the processor or the model cannot take.
        """
        try:
            refuse_typed_pieces(self.processor, query, self.runner.image_token)
            inputs, poisoned = self.encode(query)
            if self.runner.crosses and query.images and not (SIGHT in inputs and inputs[SIGHT][0, -1].any()):
                raise ValueError(f"the processor's {SIGHT} lets the last token see no image")
            return inputs, poisoned, self.sequence(inputs["input_ids"][0].tolist(), decoding, number)
        except ValueError as error:
            raise ValueError(f"prompts[{number}]: {error}") from error

    def sequence(self, prompt: list[int], decoding: Decoding, query: int = 0) -> Sequence:
        """What is to follow a prompt. Raises TooLong for one that the model, or the engine with it, cannot take."""
        check_length(self.runner.model, prompt)
        self.runner.check_reach(len(prompt) + decoding.max_new_tokens)
        return Sequence(prompt, decoding, query, self.runner.eos, self.processor.tokenizer, self.runner.device)

    def decode(self, batch: Batch, answer: Branch, streamer=None, shown: int = 0, own_steps: int = 0) -> None:
        """Decodes until every answer has ended.

        shown: how many tokens the streamer has been given already.
        own_steps: the first steps, which are not captured as graphs because each differs from the others.
        """
        sequence = answer.sequences[0]
        while True:
            if streamer is not None and len(sequence.tokens) > shown:
                streamer.put(torch.tensor(sequence.tokens[shown:]))
                shown = len(sequence.tokens)
            if answer.done:
                return
            batch.step([answer], captured=answer.steps >= own_steps)

    def output(self, sequence: Sequence, risk: float, failed_closed: str | None, **more) -> SafeOutput:
        """The answer that a sequence is, which is counted. more: other fields of `SafeOutput`."""
        failed_closed = CUT if failed_closed is None and sequence.broken else failed_closed
        self.counters["queries"] += 1
        self.counters["failed_closed"] += failed_closed is not None
        text = self.processor.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        return SafeOutput(text, sequence.tokens, risk, failed_closed=failed_closed, timings=self.last_timings, **more)


def image_mass(mass: dict[int, Tensor], row: int, regions: RegionMap) -> Tensor:
    """[layers, heads, images] fp32 on the CPU: the mass of the last token of a row.

    mass: {layer: [B, Hq, M, R]} of a forward; regions: its map. Layers that have fewer heads than others have NaN for the rest.
    """
    found = [mass[layer][row, :, -1, : len(regions.grids[row])] for layer in sorted(mass)]
    return pad_sequence(found, batch_first=True, padding_value=torch.nan).cpu()


class Clock:
    """Seconds of stages, the last of which is "answer". A stage that comes again adds up."""

    def __init__(self):
        self.begin = self.latest = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self.latest = self.laps.get(name, 0.0) + now - self.latest, now

    def timings(self) -> dict[str, float]:
        total = self.latest - self.begin
        return self.laps | {"first_token": total - self.laps["answer"], "total": total}
