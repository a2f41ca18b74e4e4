"""SafeLLM: defended answers as requests of one vLLM engine. AutoSteer's are one each; MoRAS's three stages are overlapped by
vLLM's continuous batching."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field

from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind

from ras_fast.checks import check_counts
from ras_fast.engine import SafeOutput
from ras_fast.engine.answer import BAD_PIXELS, NO_RISK
from ras_fast.inputs import Query, make_queries, refuse_begun, short_ids
from ras_fast.methods.moras import context_query, context_text, marks_of, risk_query
from ras_fast.profile import RasProfile
from ras_fast.vllm.checkpoint import load_processor
from ras_fast.vllm.gate import check_known, known_questions
from ras_fast.vllm.options import NOISE, RECORD, RISK, new_number, read_settings

CONTEXT, ASSESS, DRAFT, ANSWER = "context", "risk", "draft", "answer"
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "seed")


class SafeLLM:
    """Defended generation in a vLLM engine.

    llm: made with ``LLM(model, **ras_fast.vllm.engine_args(profile))``.

    ``counters``: ``queries``; ``rejected``, MoRAS's drafts that steering changed; ``failed_closed``, risks that were set to 1;
    ``prompt_tokens`` of all requests, and ``cached_tokens``, how many of these came out of the prefix cache.

    Raises ValueError when the engine was made without a profile, with one that is no longer there, or its head cannot be
    steered in logits; with one of AutoSteer, too, when it finds other risks than calibration in questions that the profile
    knows. RuntimeError then when the engine has other requests already.
    """

    def __init__(self, llm: LLM):
        self.engine = llm.llm_engine
        config = self.engine.vllm_config
        profile, self.capacity = read_settings(config.additional_config)
        loaded = RasProfile.from_pretrained(profile)
        self.method, self.settings = loaded.method, loaded.config
        self.processor = load_processor(config.model_config)
        self.chat_marks = marks_of(self.processor)
        self.counters: Counter = Counter()
        self._names = itertools.count()
        self._prove()
        if self.method == "autosteer":
            self._ask_known()

    def generate(self, prompts, images=None, *, max_tokens: int = 64, **sampling) -> list[SafeOutput]:
        """Answers each prompt about its images.

        prompts, images: see `ras_fast.inputs.make_queries`.
        max_tokens: the most tokens of an answer.
        sampling: temperature (0, which is greedy), top_p, top_k, min_p and seed, as in vLLM's SamplingParams; each prompt has
            random numbers of its own.

        Any error, even of a single request, aborts all requests in flight and is raised; then no answer is returned at all.

        Raises TypeError for other settings, ValueError for input that cannot be used and when the engine's LM head is no longer
        the profile's, vLLM's own errors for prompts and settings that it does not take, and RuntimeError when the engine has
        other requests already, or ends one for another reason than its end or length.
        """
        check_counts(max_tokens=max_tokens)
        if unknown := sorted(set(sampling) - set(SAMPLING)):
            raise TypeError(f"generate takes no {', '.join(unknown)}; how answers are sampled is set by {', '.join(SAMPLING)}")
        sampling = {"temperature": 0} | sampling
        SamplingParams(**sampling)  # refuses what is none before anything has begun
        if self.engine.has_unfinished_requests():
            raise RuntimeError("the engine has unfinished requests; let them finish before SafeLLM.generate")
        self._prove()
        queries = make_queries(prompts, images, self.processor)
        run = (_AutoSteer if self.method == "autosteer" else _Moras)(self, max_tokens, sampling)
        try:
            return run.answers(queries)
        except BaseException:
            self.engine.abort_request(list(run.live))
            self.engine.collective_rpc("ras_forget", args=(run.records,))
            raise

    def _prove(self) -> None:
        """Weights may be loaded anew while an engine runs, and a profile written anew before this object is made."""
        self.engine.collective_rpc("ras_prove", args=(self.settings,))

    def _ask_known(self) -> None:
        """`check_known` of what the engine says."""
        outputs = self.generate(known_questions(self.settings), max_tokens=1)
        check_known(self.settings, [output.risk for output in outputs])
        self.counters.clear()


@dataclass
class _Job:
    """A query on its way. sampling: settings of its draft and its answer; noise: the number by which both draw their first
    tokens. records: by stage, what the workers keep of it under which number. tokens: of each stage so far; over: the stages
    that have ended."""

    query: Query
    sampling: dict
    noise: int
    records: dict[str, int] = field(default_factory=lambda: defaultdict(new_number))
    begin: float = field(default_factory=time.perf_counter)
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    over: set[str] = field(default_factory=set)
    output: SafeOutput | None = None  # when it has been judged
    context: str = ""
    times: dict[str, float] = field(default_factory=dict)

    def mark(self, event: str) -> None:
        """Notes the first time that an event happens, in seconds since the query's start."""
        self.times.setdefault(event, time.perf_counter() - self.begin)


class _Run:
    """One call of `SafeLLM.generate`. live: request id -> its job and stage. lengths: tokens of the stages before an answer."""

    def __init__(self, guard: SafeLLM, max_tokens: int, sampling: dict, lengths: dict[str, int] | None = None):
        self.guard, self.engine, self.counters = guard, guard.engine, guard.counters
        self.max_tokens, self.sampling, self.lengths = max_tokens, sampling, lengths or {}
        self.live: dict[str, tuple[_Job, str]] = {}
        self._jobs: dict[int, _Job] = {}  # of the queries in flight, by number

    @property
    def records(self) -> list[int]:
        """What the workers keep for the queries in flight."""
        return [record for job in self._jobs.values() for record in job.records.values()]

    def check(self, number: int, query: Query) -> None:
        """Raises ValueError for a query that the method cannot judge."""

    def start(self, job: _Job) -> None:
        """Submits the first requests of a query."""
        raise NotImplementedError

    def end(self, job: _Job, stage: str) -> None:
        """Goes on where a stage has ended."""

    def judge(self, jobs: list[_Job]) -> None:
        """Makes the outputs of those queries in flight that can be judged by now."""
        raise NotImplementedError

    def answer_stage(self, job: _Job) -> str:
        """The stage whose tokens are a judged query's answer."""
        return ANSWER

    def timings(self, job: _Job) -> dict[str, float]:
        """`SafeOutput.timings`."""
        raise NotImplementedError

    def answers(self, queries: list[Query]) -> list[SafeOutput]:
        for number, query in enumerate(queries):
            self.check(number, query)
        waiting, jobs = deque(enumerate(queries)), self._jobs
        outputs: dict[int, SafeOutput] = {}
        while waiting or jobs:
            while waiting and len(jobs) < self.guard.capacity:
                number, query = waiting.popleft()
                jobs[number] = job = _Job(query, *self._draw_of(number))
                self.counters["queries"] += 1
                self.start(job)
            if self.live and not self.engine.has_unfinished_requests():  # none will come: steps without requests go on for ever
                raise RuntimeError("requests of SafeLLM.generate were aborted by others; there is no answer")
            for output in self.engine.step() if self.live else ():
                self._receive(output)
            self.judge([job for job in jobs.values() if job.output is None])
            for number in [n for n, job in jobs.items() if job.output is not None and self.answer_stage(job) in job.over]:
                outputs[number] = self._finish(jobs.pop(number))
        return [outputs[number] for number in range(len(queries))]

    def _draw_of(self, number: int) -> tuple[dict, int]:
        """(the sampling settings, the number of the noise) of a query."""
        seed = self.sampling.get("seed")
        if seed in (None, -1):  # for vLLM both are none
            return self.sampling, new_number()
        own = random.Random(f"{seed}/{number}").getrandbits(53)
        return self.sampling | {"seed": own}, own

    def _finish(self, job: _Job) -> SafeOutput:
        output = job.output
        job.mark("total")
        output.tokens = job.tokens[self.answer_stage(job)]
        output.text = self.guard.processor.tokenizer.decode(output.tokens, skip_special_tokens=True)
        output.timings = self.timings(job)
        return output

    # Requests

    def _submit(self, job: _Job, stage: str, query: Query, extra_args: dict | None) -> None:
        prompt: dict = {"prompt_token_ids": short_ids(self.guard.processor, query)}
        if query.images:
            prompt["multi_modal_data"] = {"image": query.images}
        params = SamplingParams(
            **(job.sampling if stage in (DRAFT, ANSWER) else {"temperature": 0}),
            max_tokens=self.lengths.get(stage, self.max_tokens),
            detokenize=False,
            extra_args=extra_args,
            output_kind=RequestOutputKind.DELTA,
        )
        (rendered,) = self.engine.renderer.render_cmpl([prompt])
        name = f"ras-{next(self.guard._names)}-{stage}"
        self.live[name] = (job, stage)  # first: an interrupt in the middle of the next line has to abort it, too
        self.engine.add_request(name, rendered, params)

    def _receive(self, output) -> None:
        if output.request_id not in self.live:  # a draft that was given up
            return
        job, stage = self.live[output.request_id]
        (completion,) = output.outputs
        job.tokens[stage] += completion.token_ids
        if stage == ANSWER:
            job.mark("first_token")
        if not output.finished:
            return
        del self.live[output.request_id]
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended the {stage} request of a query with {completion.finish_reason!r}")
        made, wanted = len(job.tokens[stage]), self.lengths.get(stage, 0)
        if completion.finish_reason == "length" and made < wanted:
            raise ValueError(f"a prompt leaves room for {made} of its {stage} stage's {wanted} tokens; it needs to be shorter")
        self.counters["prompt_tokens"] += len(output.prompt_token_ids)
        self.counters["cached_tokens"] += output.num_cached_tokens or 0
        job.over.add(stage)
        self.end(job, stage)

    def _judgements(self, asked: list) -> list:
        """What the workers say of queries. Raises RuntimeError where they do not know one of them."""
        found = [result for result in self.engine.collective_rpc("ras_judge", args=(asked,)) if result is not None]
        if not found or len(found[0]) != len(asked) or None in found[0]:
            raise RuntimeError(f"the workers judged {found!r} of {len(asked)} queries")
        return found[0]


class _Moras(_Run):
    """Context and risk, with a draft beside them, and the answer anew where that falls."""

    def __init__(self, guard: SafeLLM, max_tokens: int, sampling: dict):
        self.settings = guard.settings
        lengths = {CONTEXT: self.settings["max_context_tokens"], ASSESS: self.settings["steps"]}
        super().__init__(guard, max_tokens, sampling, lengths)

    def start(self, job: _Job) -> None:
        # A draft and the answer in its place draw their first tokens by the same noise: a small risk changes few.
        self._submit(job, DRAFT, job.query, {RECORD: job.records[DRAFT], NOISE: job.noise})
        if job.query.images:
            self._submit(job, CONTEXT, context_query(job.query, self.settings), None)
        else:
            self._assess(job)

    def end(self, job: _Job, stage: str) -> None:
        if stage == CONTEXT:
            self._assess(job)

    def _assess(self, job: _Job) -> None:
        job.context = context_text(self.guard.processor, job.tokens[CONTEXT], self.guard.chat_marks)
        job.mark(CONTEXT)
        query = risk_query(job.query, job.context, self.settings, self.guard.chat_marks)
        self._submit(job, ASSESS, query, {RECORD: job.records[ASSESS]})

    def _can_be_judged(self, job: _Job) -> bool:
        drafted = DRAFT in job.over or len(job.tokens[DRAFT]) >= self.settings["steps"]
        return drafted and ASSESS in job.over

    def judge(self, jobs: list[_Job]) -> None:
        """Risks from the logits that the workers kept; a draft that steering changes is given up, and the answer made anew."""
        jobs = [job for job in jobs if self._can_be_judged(job)]
        if not jobs:
            return
        asked = [
            (job.records[ASSESS], len(job.tokens[ASSESS]), job.records[DRAFT], len(job.tokens[DRAFT]), job.query.poisoned)
            for job in jobs
        ]
        for job, (similarity, risk, failed, _, steered) in zip(jobs, self._judgements(asked), strict=True):
            changed = [n for n, (new, old) in enumerate(zip(steered, job.tokens[DRAFT], strict=False)) if new != old]
            job.output = SafeOutput(
                text="",
                tokens=[],
                risk=risk,
                similarity=similarity,
                context=job.context,
                rejected_at=changed[0] if changed else None,
                failed_closed=(BAD_PIXELS if job.query.poisoned else NO_RISK) if failed else None,
            )
            job.mark(ASSESS)
            self.counters["failed_closed"] += failed
            if changed:
                self._answer_anew(job)
            else:
                job.mark("first_token")

    def _answer_anew(self, job: _Job) -> None:
        self.counters["rejected"] += 1
        drafts = [name for name, (owner, stage) in self.live.items() if owner is job and stage == DRAFT]
        self.engine.abort_request(drafts)
        for name in drafts:
            del self.live[name]
        self._submit(job, ANSWER, job.query, {RISK: job.output.risk, NOISE: job.noise})

    def answer_stage(self, job: _Job) -> str:
        return ANSWER if job.output.steered else DRAFT

    def timings(self, job: _Job) -> dict[str, float]:
        times = job.times
        return {
            "context": times[CONTEXT],
            "risk": times[ASSESS] - times[CONTEXT],
            "answer": times["total"] - times[ASSESS],
            "first_token": times["first_token"],
            "total": times["total"],
        }


class _AutoSteer(_Run):
    """One request, which the workers judge and steer."""

    def check(self, number: int, query: Query) -> None:
        refuse_begun(f"prompts[{number}]", query, self.guard.method)

    def start(self, job: _Job) -> None:
        if not job.query.poisoned:
            self._submit(job, ANSWER, job.query, {RECORD: job.records[ANSWER]})
            return
        # The risk would be that of other pixels: the query never reaches the model, its answer stays empty.
        job.output = SafeOutput("", [], risk=1.0, failed_closed=BAD_PIXELS)
        self.counters["failed_closed"] += 1
        job.mark("first_token")
        job.over.add(ANSWER)

    def judge(self, jobs: list[_Job]) -> None:
        """Takes over the risks of answers that have ended."""
        jobs = [job for job in jobs if ANSWER in job.over]
        if not jobs:
            return
        records = [job.records[ANSWER] for job in jobs]
        for job, (risk, failed) in zip(jobs, self._judgements(records), strict=True):
            job.output = SafeOutput("", [], risk=risk, failed_closed=NO_RISK if failed else None)
            self.counters["failed_closed"] += failed
        self.engine.collective_rpc("ras_forget", args=(records,))

    def timings(self, job: _Job) -> dict[str, float]:
        first, total = job.times["first_token"], job.times["total"]
        return {"prompt": first, "answer": total - first, "first_token": first, "total": total}
