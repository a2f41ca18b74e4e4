"""MoRAS's three stages overlapped, token for token the answer of the three calls made one after another.

It rests on three facts (docs/methods.md):

1. The three prompts begin alike, with the image. That prefix is encoded once and lies in the pool once; each stage branches
   off it.
2. Steering touches the first N states after the last norm, never a key or value. So the answer can be drafted unsteered
   before the risk is known, in the same steps as the context and the risk: decoding is bound by reading weights, a second
   token is cheap.
3. Once the risk is there, the steered token of each of the N steps is read from the draft's own states. Where all agree
   with the draft, the draft *is* the steered answer; else it is taken up again from the first step that differs.

Sampling stays exact because a token is the argmax of scores plus noise that depends on (seed, query, step) only.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ras_fast.batching import fit
from ras_fast.decoding import Decoding
from ras_fast.engine.answer import BAD_PIXELS, NO_RISK, SafeOutput, Sequence
from ras_fast.engine.batch import Batch, Prefix
from ras_fast.engine.branch import ANSWER, SCRATCH, Branch
from ras_fast.engine.plan import Clock, Plan, image_mass
from ras_fast.engine.prompts import Job, Prompts, image_key, image_tensors, tells_kinds_behind
from ras_fast.engine.runner import INSTEAD, Runner, close
from ras_fast.inputs import Query
from ras_fast.methods import region_bias
from ras_fast.methods.attention_gate import features
from ras_fast.methods.moras import Moras, context_query, context_text, risk_query
from ras_fast.model_checks import TooLong
from ras_fast.patching import Patch
from ras_fast.patching.steering import Steering
from ras_fast.patching.structure import has_foreign_hooks, is_heard
from ras_fast.profile import RasProfile

Prompt = tuple[dict[str, Tensor], int]  # the inputs of a prompt, and how many of its tokens are computed ahead
PADDED = 0.25  # of the longest of several prefixes in one forward, how much the shortest may be padded


class _OtherLogits(Exception):
    """A prompt means something else when it is cut."""


class Overlapped(Plan):
    """MoRAS and RAS. The methods below are the stages, in their order."""

    def __init__(self, runner: Runner, processor, profile: RasProfile, cache, counters, region_mass: bool):
        super().__init__(runner, processor, counters)
        self._cuts = not runner.both_ways  # whether prompts are cut after what they share
        self._proved: set[bool] = set()  # whether prompts that are cut, and that are not, were seen to get the model's logits
        self.moras = Moras(profile, runner.head, runner.device, runner.dtype)
        if runner.crosses and self.moras.attention is not None:
            raise ValueError("the profile's gate reads attention to a prompt's images; this model has them in cross-attention")
        self.prompts = Prompts(runner, processor, self.moras)
        self.bias = profile.tensors.get("region_bias")
        self.cache, self.region_mass = cache, region_mass
        self._safety = len(processor.tokenizer(self.moras.config["safety_prompt"])["input_ids"])

    def describe(self) -> list[str]:
        config, counts, steps = self.moras.config, self.counters, self.moras.steps
        rejected = [f"n={n}: {counts[f'rejected_at_{n}']}" for n in range(steps)]
        prefix = "1 prefix   the images and whatever the three prompts share before their end, once per image"
        whole = "1 prompts  each in one piece, as what comes later in one changes what comes before it"
        return [
            f"{steps} steered steps, gate {config['gate']}, S_base {config['s_base']:.3f}, k {config['k']:.2f}",
            prefix if self._cuts else whole,
            f"2 context  up to {config['max_context_tokens']} tokens, and the draft of the answer in the same steps",
            f"3 risk     the safety prompt, the context and the question; {steps} tokens beside the draft",
            "4 answer   the draft if its first tokens are the steered ones, else again from the first that differs",
            f"drafts kept {counts['accepted']}, changed at {', '.join(rejected)}",
            f"prompts that shared a prefix {counts['shared']}, that could not {counts['not_shared']}, "
            f"prefixes found again {counts['cache_hits']}",
        ]

    @property
    def needs_patch(self) -> bool:
        """Whether the model has to be patched."""
        return self.region_mass or self.moras.attention is not None or self.bias is not None

    def renew(self) -> None:
        super().renew()
        self.moras.read_prototypes(self.runner.head, self.runner.dtype)
        self._proved.clear()

    def answer(self, queries: list[tuple[int, Query]], decoding: Decoding, streamer) -> list[SafeOutput]:
        patch = Patch.of(self.runner.model)
        with region_bias(patch, self.bias):
            outputs = self._cut_or_not(queries, decoding, streamer)
        if self.bias is not None:
            _refuse_unpatched(patch, "region_bias")
        return outputs

    def _cut_or_not(self, queries: list[tuple[int, Query]], decoding: Decoding, streamer) -> list[SafeOutput]:
        clock, counted = Clock(), self.counters.copy()
        if self._cuts:
            try:
                return self._answer(queries, decoding, streamer, clock, cut=True)
            except _OtherLogits:  # nothing has been shown yet
                self.counters.clear()
                self.counters.update(counted)
        return self._answer(queries, decoding, streamer, clock, cut=False)

    @property
    def attaches(self) -> bool:
        return self.bias is not None

    def _answer(self, queries: list[tuple[int, Query]], decoding: Decoding, streamer, clock: Clock, cut: bool):
        """cut: whether a prompt is computed first up to the end of its images, which the stages share, or in one piece."""
        jobs = [self._prepare(number, query, decoding, cut) for number, query in queries]
        contexts = self._contexts(jobs)
        with self.runner.workspaces.lend(len(jobs), *self._slots(jobs, contexts)) as space:
            batch = Batch(self.runner, space)
            if cut:
                self._encode_prefixes(batch, jobs)
            else:
                self._read_prompts(batch, jobs)
            clock.lap("prefix")
            draft = self._context_and_draft(batch, jobs, contexts)
            self._prove(jobs, draft, cut)
            self._keep_contexts(jobs, contexts)
            clock.lap("context and draft")
            self._assess(batch, jobs, draft)
            clock.lap("risk")
            self._check_drafts(jobs, draft)
            clock.lap("check")
            self._finish(batch, jobs, streamer)
            clock.lap("answer")
        self.last_timings = clock.timings()
        return [self._output(job) for job in jobs]

    # Prompts

    def _prepare(self, number: int, query: Query, decoding: Decoding, cut: bool) -> Job:
        inputs, poisoned, draft = self.read(number, query, decoding)
        job = Job(query, inputs, draft)
        job.failed_closed = BAD_PIXELS if poisoned else None
        job.image_key = image_key(inputs) if self.cache.limit else ""
        job.image_tokens = self.prompts.image_tokens(job)
        ids = job.draft.prompt
        job.prefix = ids[: min(self.prompts.shared(job), len(ids) - 1)] if cut else ids
        if tells_kinds_behind(inputs, len(job.prefix)):
            raise _OtherLogits
        return job

    def _contexts(self, jobs: list[Job]) -> list[tuple[Query, Sequence] | None]:
        """The prompts of stage 1, for the queries that need one."""
        found = []
        for job in jobs:
            if not job.query.images:
                job.context = ""
            else:
                query = context_query(job.query, self.moras.config)
                ids = self.prompts.ids(job, query, "context")
                job.context_key = job.key("context", ids)
                job.context = self.cache.get(job.context_key)
            found.append(self._context_entry(job, query, ids) if job.context is None else None)
        return found

    def _context_entry(self, job: Job, query: Query, ids: list[int]) -> tuple[Query, Sequence] | None:
        try:
            return query, self.sequence(ids, Decoding(self.moras.config["max_context_tokens"]))
        except TooLong as error:
            job.context, job.failed_closed = "", job.failed_closed or str(error)
            return None

    # Stages

    def _slots(self, jobs: list[Job], contexts) -> tuple[int, int, int]:
        """How many slots the batch takes: before the prefixes, and from there on; and the most keys that a query's images have
        in layers of cross-attention."""
        context, wanted = self.moras.config["max_context_tokens"], jobs[0].draft.decoding.max_new_tokens
        feeds = [self.prompts.feed(job, entry[1].prompt)[1] for job, entry in zip(jobs, contexts, strict=True) if entry]
        rest = max(len(job.draft.prompt) - (0 if job.whole else len(job.prefix)) for job in jobs)
        risk = rest + self._safety + context + 8 + self.moras.steps
        scratch = max(max(feeds, default=0) + context, risk) + self.runner.sync_every
        answer = max(len(job.draft.prompt) for job in jobs) + wanted + self.runner.sync_every
        return scratch, answer, max(self.runner.image_keys(job.inputs) for job in jobs)

    def _encode_prefixes(self, batch: Batch, jobs: list[Job]) -> None:
        """Computes, or finds, the keys and values of each prompt up to the end of its last image; for neighbours that fit
        together in one forward."""
        found = {row: self._cached_prefix(job) for row, job in enumerate(jobs) if job.prefix}
        unknown = [row for row in found if found[row] is None]
        twins = {row: next((i for i in unknown if i < row and jobs[row].begins_as(jobs[i])), None) for row in unknown}
        missing = [row for row in unknown if twins[row] is None]
        self._prefill(batch, {row: (jobs[row].inputs, len(jobs[row].prefix)) for row in missing}, ANSWER)
        for row in missing:
            if self._caches_prefix(jobs[row]):
                entry = batch.extract(row)
                self.cache.put(jobs[row].key("prefix", jobs[row].prefix), entry, entry.nbytes)
        for row, entry in found.items():
            if row not in missing:
                self.counters["cache_hits"] += 1
                batch.insert(row, batch.extract(twins[row]) if entry is None else entry, jobs[row].inputs)

    def _read_prompts(self, batch: Batch, jobs: list[Job]) -> None:
        """Computes whole prompts."""
        prompts = {row: (job.inputs, len(job.draft.prompt)) for row, job in enumerate(jobs)}
        for rows in self._neighbours(prompts):
            with self._collect_mass([jobs[row] for row in rows]):
                self._prefill(batch, {row: prompts[row] for row in rows}, ANSWER)

    def _prefill(self, batch: Batch, prompts: dict[int, Prompt], kind: int) -> None:
        """Computes the beginnings of branches; those of neighbours that fit together in one forward."""
        for rows in self._neighbours(prompts):
            inputs, lengths = zip(*(prompts[row] for row in rows), strict=True)
            batch.prefill(rows[0], inputs, lengths, kind)

    def _caches_prefix(self, job: Job) -> bool:
        return bool(job.query.images and self.cache.limit)

    def _cached_prefix(self, job: Job) -> Prefix | None:
        return self.cache.get(job.key("prefix", job.prefix)) if self._caches_prefix(job) else None

    def _neighbours(self, prompts: dict[int, Prompt]) -> Iterator[list[int]]:
        """Groups of consecutive rows whose prompts fit together and are about equally long, as the shorter ones are padded."""

        def goes_on(group: list[int], row: int) -> bool:
            lengths = [prompts[i][1] for i in (*group, row)]
            alike = min(lengths) >= (1 - PADDED) * max(lengths) and fit(prompts[row][0]) == fit(prompts[group[0]][0])
            joins = self.runner.joins_images or not image_tensors(prompts[row][0])
            return row == group[-1] + 1 and joins and alike

        group: list[int] = []
        for row in prompts:
            if group and not goes_on(group, row):
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    def _context_and_draft(self, batch: Batch, jobs: list[Job], contexts) -> Branch:
        """Stage 1 with the answers drafted beside it. Returns the drafts' branch."""
        drafts, steps = [job.draft for job in jobs], self.moras.steps
        if jobs[0].whole:
            draft = batch.begun(ANSWER, drafts, recorded=steps)
        else:
            feeds, lengths = [job.draft.prompt[len(job.prefix) :] for job in jobs], [len(job.prefix) for job in jobs]
            draft = batch.branch(ANSWER, drafts, feeds, lengths, recorded=steps)
        context = self._stage(batch, jobs, contexts, self.moras.config["max_context_tokens"])
        branches = [draft] if context is None else [context, draft]
        if not jobs[0].whole:
            with self._collect_mass(jobs) as reads:
                batch.step(branches, captured=not reads)
        batch.note_prompts()
        while context is not None and not context.done:
            batch.step([branch for branch in branches if not branch.done])
        draft.sync()
        for job, entry in zip(jobs, contexts, strict=True):
            if entry is not None:
                job.context = context_text(self.processor, entry[1].tokens, self.prompts.marks)
        return draft

    def _keep_contexts(self, jobs: list[Job], contexts) -> None:
        for job, entry in zip(jobs, contexts, strict=True):
            if entry is not None and not entry[1].broken:  # another query's numbers may have broken it
                self.cache.put(job.context_key, job.context, sys.getsizeof(job.context))

    def _prove(self, jobs: list[Job], draft: Branch, cut: bool) -> None:
        """Compares prompts with an image to the model's own forward of them in one piece: the first one, and of those that are
        cut all that hold a special token after what closes their last image. Text after an image may mean something else in a
        forward without pixels, as Ovis2's delimiters do. Raises _OtherLogits where prompts that are cut differ, and ValueError
        where others do."""
        for row, job in enumerate(jobs):
            special = cut and self.prompts.has_special_token(job.draft.prompt)
            if not job.query.images or job.failed_closed or not (special or cut not in self._proved):
                continue
            wanted = self._own_logits(job)
            if close(draft.logits[0][row], wanted, self.runner.model):
                self._proved.add(cut)
            elif not torch.isfinite(wanted).all():
                continue  # it shows nothing, and fails closed by itself
            elif cut:
                self._cuts = special  # only such prompts are different, or all are
                raise _OtherLogits
            else:
                name = type(self.runner.model).__name__
                raise ValueError(f"{name}: a prompt with an image gets other logits than the model's own; {INSTEAD}")

    def _own_logits(self, job: Job) -> Tensor:
        """The logits [V] after a query's prompt, by the model's own forward of it in one piece."""
        model, mask = self.runner.model, torch.ones_like(job.inputs["input_ids"])
        self.runner.count(*mask.shape)
        with self.runner.own_offsets():
            return model(**job.inputs, attention_mask=mask, use_cache=False, logits_to_keep=1).logits[0, -1].float()

    def _assess(self, batch: Batch, jobs: list[Job], draft: Branch) -> None:
        """Stage 2: the similarity and the risk of each query. The drafts go on in the same steps."""
        entries = [self._risk_entry(job) for job in jobs]
        risk = self._stage(batch, jobs, entries, self.moras.steps, recorded=self.moras.steps)
        while not risk.done and risk.steps < self.moras.steps:
            batch.step([branch for branch in (risk, draft) if not branch.done])
        while not draft.done and draft.steps < self.moras.steps:
            batch.step([draft])
        risk.sync()
        draft.sync()
        produced = torch.tensor([len(own.produced) for _, own in entries], dtype=torch.int32, device=self.runner.device)
        similarity = self.moras.similarity(torch.stack(risk.logits, dim=1), produced)
        values, failed = self.moras.risk(similarity, *self._features(jobs))
        for job, s, r, f in zip(jobs, similarity.tolist(), values.tolist(), failed.tolist(), strict=True):
            if job.failed_closed is None:
                job.similarity, job.risk, job.failed_closed = s, r, NO_RISK if f else None

    def _risk_entry(self, job: Job) -> tuple[Query, Sequence]:
        """The prompt of stage 2. Where it is longer than the model can read, the risk is 1 whatever comes of the stage, and the
        query's own prompt goes along in its place."""
        query, wanted = risk_query(job.query, job.context, self.moras.config, self.prompts.marks), Decoding(self.moras.steps)
        try:
            return query, self.sequence(self.prompts.ids(job, query, "risk"), wanted)
        except TooLong as error:
            job.failed_closed = job.failed_closed or str(error)
            return job.query, self.sequence(job.draft.prompt, wanted)

    def _check_drafts(self, jobs: list[Job], draft: Branch) -> None:
        """Takes every draft back to the first step whose steered token is another one."""
        risks = torch.tensor([job.risk for job in jobs], device=self.runner.device)
        steered = torch.stack([self.moras.steer(states, risks, n) for n, states in enumerate(draft.states)])
        drafted = [(n, row, job) for n in range(len(steered)) for row, job in enumerate(jobs) if n < len(job.draft.produced)]
        logits = self.runner.head(steered).float()
        tokens = torch.stack([job.draft.token(logits[n, row], n) for n, row, job in drafted]).tolist()
        for (n, _, job), token in zip(drafted, tokens, strict=True):
            if job.rejected_at is None and token != job.draft.produced[n]:
                job.rejected_at = n
                job.draft.rewind(n, token)

    def _finish(self, batch: Batch, jobs: list[Job], streamer) -> None:
        """Stage 3: decodes what the drafts still lack. Steps below N are steered as they are made."""
        if streamer is not None:
            streamer.put(torch.tensor(jobs[0].draft.prompt))
            streamer.put(torch.tensor(jobs[0].draft.tokens))
        shown = len(jobs[0].draft.tokens)
        live = [row for row, job in enumerate(jobs) if not job.draft.done]
        if not live:
            return
        kept = [self._kept(batch, row, job) for row, job in enumerate(jobs)]
        if len(live) < batch.rows and not self.runner.captured:  # in a graph, rows that are done go along
            jobs, kept = [jobs[row] for row in live], [kept[row] for row in live]
            batch.keep_rows(live)
        answer = batch.branch(
            ANSWER, [None if job.draft.done else job.draft for job in jobs],
            [[] if job.draft.done else (job.draft.prompt + job.draft.tokens)[n:] for n, job in zip(kept, jobs, strict=True)],
            kept,
        )  # fmt: skip
        self._decode_steered(batch, jobs, answer)
        self.decode(batch, answer, streamer, shown)

    def _kept(self, batch: Batch, row: int, job: Job) -> int:
        """How many tokens of a draft's prompt and itself the pool holds, after which it goes on: all but the latest, or fewer
        where it is taken back."""
        length = len(job.draft.prompt) + len(job.draft.tokens) - 1
        return length if job.rejected_at is None else batch.rewind(row, len(job.draft.prompt), length)

    def _decode_steered(self, batch: Batch, jobs: list[Job], answer: Branch) -> None:
        """The steps below N, each row at its own step, steered inside the fused last norm where there is one."""
        moras, device = self.moras, self.runner.device
        risks = torch.tensor([job.risk for job in jobs], device=device)
        steps = torch.tensor([moras.steps if job.draft.done else len(job.draft.tokens) for job in jobs], device=device)
        with self._steered_norm() as steering:
            while bool((steps < moras.steps).any()) and not answer.done:
                slots = torch.where(steps < moras.steps, steps, -1)
                if steering is not None:
                    steering.set_rows(slots, risks)
                steer = partial(self._steer, risks=risks, slots=slots, done=steering is not None)
                batch.step([answer], steer, captured=False)
                steps = steps + 1

    def _steer(self, states: Tensor, risks: Tensor, slots: Tensor, done: bool) -> Tensor:
        """States [B, 1, d] steered towards the prototypes of steps ``slots`` [B] (−1: not steered).

        done: whether the fused norm has steered them already.
        """
        if done:
            # At r = 1 the state is left out, not multiplied by zero: it may be the NaN that made the risk 1.
            full = (risks >= 1) & (slots >= 0)
            return torch.where(full[:, None, None], self.moras.prototypes[slots][:, None].to(states.dtype), states)
        rows = zip(states, risks[:, None], torch.where(slots >= 0, slots, self.moras.steps).tolist(), strict=True)
        return torch.stack([self.moras.steer(state, risk, step) for state, risk, step in rows])

    @contextmanager
    def _steered_norm(self) -> Iterator[Steering | None]:
        """The `Steering` of the fused last norm inside the block; None where that norm is not fused, the user steers it, or has
        hooks on it or around the text model, which are to come before the steering."""
        patch, steering = Patch.of(self.runner.model), Steering()
        fused = patch is not None and patch.steers("final") and not has_foreign_hooks(patch.final_norm)
        if not fused or is_heard(self.runner.model, patch.text_model):
            yield None
            return
        try:
            patch.set_steering("final", self.moras.prototypes, steering=steering)
            yield steering
            _refuse_unpatched(patch, "steering")
        finally:
            patch.clear_steering(steering)

    def _output(self, job: Job) -> SafeOutput:
        self.counters["accepted" if job.rejected_at is None else f"rejected_at_{job.rejected_at}"] += 1
        return self.output(
            job.draft, job.risk, job.failed_closed, similarity=job.similarity, context=job.context,
            rejected_at=job.rejected_at, region_mass=job.region_mass,
        )  # fmt: skip

    # Scratch branches

    def _stage(self, batch: Batch, jobs: list[Job], entries, new_tokens: int, recorded: int = 0) -> Branch | None:
        """The scratch branch of a stage; None when no job takes part.

        entries: (query, sequence) for each job, None for one that takes no part. A prompt that does not begin with the job's
            prefix, or has images after it, gets a prefill of its own.
        new_tokens: the most that the stage produces. recorded: of how many steps the branch keeps states and logits.
        """
        if not any(entries):
            return None
        pairs = zip(jobs, entries, strict=True)
        plans = [self.prompts.feed(job, entry[1].prompt) if entry else (False, 0) for job, entry in pairs]
        slots = max(length for _, length in plans) + new_tokens + self.runner.sync_every
        batch.clear_scratch(slots, [shares for shares, _ in plans])
        whole, alone = jobs[0].whole, {}
        for row, ((shares, length), entry) in enumerate(zip(plans, entries, strict=True)):
            if entry:
                self.counters["shared" if shares else "not_shared"] += 1
                if not shares:
                    alone[row] = self.encode(entry[0])[0], length - (not whole)
        self._prefill(batch, alone, SCRATCH)
        sequences = [entry[1] if entry else None for entry in entries]
        if whole:
            return batch.begun(SCRATCH, sequences, recorded)
        prompts = [entry[1].prompt if entry else [] for entry in entries]
        # Where some go on from a prefix, the others are computed ahead but for their last token.
        counts = [length if shares else min(length, 1) for shares, length in plans]
        feeds = [prompt[len(prompt) - count :] for prompt, count in zip(prompts, counts, strict=True)]
        kept = [len(prompt) - count for prompt, count in zip(prompts, counts, strict=True)]
        return batch.branch(SCRATCH, sequences, feeds, kept, recorded)

    # Attention

    @contextmanager
    def _collect_mass(self, jobs: list[Job]) -> Iterator[bool]:
        """Reads how much the drafts' prompts attend to the images, in the forward that is run inside the block, of what comes
        after the images at least. Yields whether anything is to be read."""
        gate = self.moras.attention
        if gate is None and not self.region_mass:
            yield False
            return
        layers = None if self.region_mass else gate.layers
        patch = Patch.of(self.runner.model)
        after = [len(job.draft.prompt) - self.prompts.images_end(job.draft.prompt) if job.query.images else 1 for job in jobs]
        rows = 1 if gate is None else max(*after, 1)
        with patch.collect(rows=rows, layers=layers) as statistics:
            yield True
        mass = statistics.mass
        if self.region_mass:
            for row, job in enumerate(jobs):
                job.region_mass = image_mass(mass, row, patch.region_map)
        if gate is not None:
            text = torch.arange(rows, 0, -1) <= torch.tensor(after)[:, None]
            found = features(mass, gate.heads, text.to(self.runner.device))
            for row, job in enumerate(jobs):
                job.features = found[row]

    def _features(self, jobs: list[Job]) -> tuple[Tensor, Tensor] | tuple[()]:
        """What the gate needs beside the similarity."""
        if self.moras.attention is None:
            return ()
        has_images = torch.tensor([bool(job.query.images) for job in jobs], device=self.runner.device)
        return torch.stack([job.features for job in jobs]), has_images

def _refuse_unpatched(patch: Patch, lost: str) -> None:
    if not patch.applied:
        raise RuntimeError(f"the model was unpatched in the middle of an answer, which lost its {lost}")
