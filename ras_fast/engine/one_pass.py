"""Methods that judge a prompt in the forward that reads it: prefill, then decode, with the method attached to the model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ras_fast.batching import batches, left_padded
from ras_fast.decoding import Decoding
from ras_fast.engine.answer import BAD_PIXELS, NO_RISK, SafeOutput, Sequence
from ras_fast.engine.batch import Batch
from ras_fast.engine.plan import Clock, Plan, image_mass
from ras_fast.engine.runner import Runner
from ras_fast.inputs import Query, refuse_begun
from ras_fast.methods import attached, method_of
from ras_fast.patching import Patch, patched
from ras_fast.profile import RasProfile


@dataclass
class Job:
    """One query on its way."""

    inputs: dict[str, Tensor]
    answer: Sequence
    risk: float = 1.0
    failed_closed: str | None = None
    region_mass: Tensor | None = None


class OnePass(Plan):
    """AutoSteer, attention risk and projection steering. Raises ValueError when the profile does not fit the model."""

    needs_patch = attaches = True

    def __init__(self, runner: Runner, processor, profile: RasProfile, counters, region_mass: bool):
        super().__init__(runner, processor, counters)
        # Made once: what a method derives from its profile and copies to the device is not the work of an answer.
        self.profile, self.method, self.region_mass = profile, method_of(profile), region_mass
        with patched(runner.model) as patch, attached(patch, self.method):
            pass  # a profile that does not fit the model is refused here, not at the first query

    def describe(self) -> list[str]:
        return [
            "1 prompt   images and question in one forward, in which the risk is read",
            "2 answer   token by token, steered as the method does",
        ]

    def check(self, number: int, query: Query) -> None:
        refuse_begun(f"prompts[{number}]", query, self.profile.method)

    def answer(self, queries: list[tuple[int, Query]], decoding: Decoding, streamer) -> list[SafeOutput]:
        clock = Clock()
        jobs = [self._prepare(number, query, decoding) for number, query in queries]
        sound = [job for job in jobs if job.failed_closed is None]
        size = max(len(sound), 1) if self.runner.joins_images else 1
        with self._attached() as method:
            for numbers, inputs in batches([job.inputs for job in sound], size):
                self._answer_alike([sound[i] for i in numbers], inputs, method, streamer, clock)
        clock.lap("answer")
        self.last_timings = clock.timings()
        return [self.output(job.answer, job.risk, job.failed_closed, region_mass=job.region_mass) for job in jobs]

    def _attached(self):
        """The method at work in the model, inside a `with` block."""
        return attached(Patch.of(self.runner.model), self.method)

    def _prepare(self, number: int, query: Query, decoding: Decoding) -> Job:
        inputs, poisoned, answer = self.read(number, query, decoding)
        job = Job(inputs, answer)
        if poisoned:
            # The risk would be that of other pixels: the query never reaches the model, its answer stays empty.
            job.failed_closed, job.answer.done = BAD_PIXELS, True
        return job

    def _answer_alike(self, jobs: list[Job], inputs, method, streamer, clock: Clock) -> None:
        """Answers queries whose inputs can be joined into one batch."""
        joined, new_tokens = left_padded(inputs, self.runner.filler), jobs[0].answer.decoding.max_new_tokens
        slots = joined["input_ids"].shape[1] + new_tokens + self.runner.sync_every
        with self.runner.workspaces.lend(len(jobs), 0, slots, self.runner.image_keys(joined)) as space:
            batch = Batch(self.runner, space)
            with Patch.of(self.runner.model).collect(rows=1) if self.region_mass else nullcontext() as statistics:
                answer = batch.prompts([job.answer for job in jobs], joined)
            self._read(jobs, method, statistics)
            clock.lap("prompt")
            if streamer is not None:
                streamer.put(torch.tensor(jobs[0].answer.prompt))
            self.decode(batch, answer, streamer, own_steps=getattr(method, "own_steps", 0))
        clock.lap("answer")

    def _read(self, jobs: list[Job], method, statistics) -> None:
        """Takes over the risks, and the masses if they were collected, from the forward that read the prompts."""
        for row, (job, risk, failed) in enumerate(zip(jobs, method.risk.tolist(), method.failed.tolist(), strict=True)):
            job.risk, job.failed_closed = risk, NO_RISK if failed else None
            if statistics is not None:
                job.region_mass = image_mass(statistics.mass, row, Patch.of(self.runner.model).region_map)
