"""SafeChat: a defence in front of a vLLM server's own chat endpoint, as middleware of that server. docs/vllm.md.

The stages of MoRAS are requests to the server inside, so images, templates, limits and errors are vLLM's own. AutoSteer's only
one is the client's, which is told to be judged. Knows ASGI and JSON; imports vLLM only to ask its engine before a client can.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Callable
from functools import partial

from ras_fast.inputs import Query, make_queries, refuse_begun, short_ids, texts_of
from ras_fast.methods.moras import context_query, context_text, marks_of, risk_query
from ras_fast.profile import RasProfile
from ras_fast.vllm.asgi import (
    Call,
    Client,
    Failed,
    Gone,
    Message,
    Outbox,
    Send,
    dumps,
    into,
    read_body,
    refusal,
    refuse,
    send_with,
)
from ras_fast.vllm.checkpoint import load_processor
from ras_fast.vllm.gate import Verdict, check_known, known_questions
from ras_fast.vllm.options import NOISE, PROCESSOR, RECORD, RISK, new_number, read_settings
from ras_fast.vllm.requests import NEUTRAL, PLAIN, SHARED, check_opening, checked, to_messages, to_query
from ras_fast.vllm.steering import Judgement

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
WITHOUT_ANSWERS = {"/tokenize", "/detokenize", "/ping"}  # what may be posted to undefended
POLL = 0.01  # seconds until a draft that was late is looked at again
HEALTH = 1.0  # seconds until an engine that does not answer is asked whether it lives


class SafeChat:
    """ASGI middleware that defends every answer of ``POST /v1/chat/completions`` by MoRAS or AutoSteer, streamed or whole.

    ``vllm serve ... --middleware ras_fast.vllm.serving.SafeChat`` (docs/vllm.md has the other flags). Answers carry the header
    ``x-ras-risk``, MoRAS's also ``x-ras-similarity`` and ``x-ras-draft`` ("kept", "fell", or "none" if the answer was not
    drafted).

    MoRAS's answers are drafted beside the context and the risk; those of several choices, with logprobs or ``vllm_xargs`` begin
    when the risk is known. AutoSteer judges an answer's own prompt; several choices begin when it has judged a request of one
    token. Nothing of an answer is sent before its risk is known. A seed repeats an answer, but what noise it stands for no
    client can know. Status 400 for requests that cannot be defended, 403 for all other endpoints that make answers, and where
    the server inside has an error for a stage of a query, that. Exceptions end the request without an answer. A server that was
    set up so that answers cannot be defended does not start.
    """

    def __init__(self, app):
        self.app = app
        self._guard: _Guard | None = None
        self._starting = asyncio.Lock()

    async def __call__(self, scope: Message, receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._begin(scope, receive, send)
            return
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": f"only {CHAT} is defended"})
            return
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if scope["method"] in ("GET", "HEAD", "OPTIONS") or path in WITHOUT_ANSWERS:
            await self.app(scope, receive, send)
        elif (scope["method"], path) == ("POST", CHAT):
            await self._chat(scope, receive, send)
        else:
            await refuse(send, 403, f"{scope['method']} {path} is not defended; this server answers at {CHAT}")

    async def _chat(self, scope: Message, receive, send: Send) -> None:
        if not await self._admits(scope, send):
            return
        try:
            request = checked(json.loads(await read_body(receive)))
            query = to_query(request["messages"])
            check_opening(request, query)
            request["messages"] = to_messages(query)
        except (ValueError, RecursionError) as error:
            await refuse(send, 400, str(error))
            return
        try:
            guard = await self._start(scope["app"].state)
        except Exception as error:  # vLLM would take some for the client's
            await refuse(send, 500, str(error))
            return
        try:
            guard.check(request, query)
            guard.hide_seed(request)
        except ValueError as error:
            await refuse(send, 400, str(error))
            return
        outbox = Outbox(send)
        try:
            async with guard.places:  # until vLLM has made the answer; a client that is slow to read it takes no place
                client = Client(self.app, scope, receive)
                try:
                    await guard.answer(guard, client, request, query).send_to(outbox.put)
                except Failed as failed:
                    for message in failed.messages:
                        await outbox.put(message)
                except Gone:
                    pass
                finally:
                    await client.leave()
            await outbox.close()
        finally:
            outbox.writer.cancel()

    async def _admits(self, scope: Message, send: Send) -> bool:
        """Whether the server inside lets this client in (``--api-key``); if not, its answer is sent. Before the body is read,
        which may be as long as the client likes: who may have the list of models may chat."""
        messages: list[Message] = []
        scope = scope | {"method": "GET", "path": scope["path"].removesuffix(CHAT) + MODELS}
        await Call(self.app, scope, b"", into(messages)).task
        if messages[0]["status"] == 200:
            return True
        for message in messages:
            await send(message)
        return False

    async def _begin(self, scope: Message, receive, send: Send) -> None:
        """The server's life: one that cannot defend answers does not start."""
        try:
            await self._start(scope["app"].state)
        except Exception as error:
            await receive()
            await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
            return
        await self.app(scope, receive, send)

    async def _start(self, state) -> _Guard:
        """``state``: vLLM's, of the server inside."""
        async with self._starting:
            if self._guard is None:
                guard = _Guard(state.engine_client, state.online_renderer.chat_template)
                await guard.call("ras_prove", guard.settings)
                if guard.method == "autosteer":
                    check_known(guard.settings, [await guard.risk_of(text) for text in known_questions(guard.settings)])
                self._guard = guard
        return self._guard


class _Guard:
    """What the requests of a server share. answer: makes one of them, by the profile's method. places: for so many queries at
    a time.

    chat_template: the server's own, None where it uses the model's.

    Raises ValueError for engines without a profile or a logits processor, for another chat template than the model's, which is
    the one that the profile was calibrated with, and for more than one engine; under MoRAS for one that keeps images: two
    requests that bring the same image at the same time, as its stages do, can overtake each other on their way into that cache,
    and vLLM then fails the one that comes without it; and where every answer is held to fewer tokens than a stage has.
    """

    def __init__(self, engine, chat_template: str | None):
        config = engine.vllm_config
        processors = config.model_config.logits_processors or ()
        if not processors:
            raise ValueError(f"there are no logits processors; start the server with --logits-processors {PROCESSOR}")
        profile, queries = read_settings(config.additional_config)
        engines, servers = config.parallel_config.data_parallel_size, config.parallel_config._api_process_count
        if engines != 1:
            raise ValueError(f"data_parallel_size is {engines}; a query's stages need one engine: start a server for each")
        if queries < servers:
            raise ValueError(f"queries is {queries}; the {servers} API servers need at least as many")
        self.engine, self.places = engine, asyncio.Semaphore(queries // servers)
        loaded = RasProfile.from_pretrained(profile)
        self.method, self.settings = loaded.method, loaded.config
        self.answer = _Judged if self.method == "autosteer" else _Staged
        self.processor = load_processor(config.model_config)
        if chat_template not in (None, self.processor.chat_template):
            raise ValueError("chat_template is not the model's, which the profile belongs to; leave --chat-template out")
        defaults = config.model_config.get_diff_sampling_param()
        if self.answer is _Staged:
            _check_stages(config.model_config, max(self.settings["max_context_tokens"], self.settings["steps"]))
        # Whether a token follows from the logits that steering sees.
        self.plain = all(defaults.get(name, none) == none for name, none in NEUTRAL.items())
        self.plain &= len(processors) == 1
        self.controls, self.chat_marks = _control_tokens(self.processor), marks_of(self.processor)
        self.tokens = config.model_config.max_model_len
        self.characters = self.tokens * max(map(len, self.processor.tokenizer.get_vocab()))
        self.shows_steered = config.model_config.logprobs_mode.startswith("processed_")
        self._key = secrets.token_bytes(32)

    def check(self, request: Message, query: Query) -> None:
        """Raises ValueError for a request that this server, as it was set up, would answer with what was not steered, for
        more words than it takes, and for words that its tokenizer reads as control tokens: they could close the question and
        begin the answer, where the risk is read too."""
        if self.answer is _Judged:
            refuse_begun("messages", query, self.method)
        messages = [*map(texts_of, request["messages"])]
        if (length := sum(len(text) for texts in messages for text in texts)) > self.characters:
            raise ValueError(
                f"messages hold {length} characters; the {self.tokens} tokens of a prompt hold at most {self.characters}"
            )
        for i, texts in enumerate(messages):
            # Templates may put texts next to each other, and some (Gemma's) trim each.
            readings = "".join(texts), "".join(text.strip() for text in texts)
            found = [token for token in self.controls if any(token in words for words in readings)]
            if found:
                raise ValueError(f"messages[{i}] holds {found[0]!r}, a control token of this model; it needs to be words alone")
        if not self.shows_steered and (request.get("logprobs") or request.get("top_logprobs")):
            raise ValueError(
                f"logprobs is {request.get('logprobs')!r}; this server's are those of the unsteered model, which tell what it "
                "would have answered: leave them out, or start the server with --logprobs-mode processed_logprobs"
            )

    def hide_seed(self, request: Message) -> None:
        """Puts a seed that follows from a client's in its place. By its own a client could try at home, without asking this
        server, which seed's noise outweighs the steering of a question."""
        if "seed" in request:
            words = dumps([request["seed"], request["messages"]])
            digest = hashlib.blake2b(words, key=self._key, digest_size=6).digest()
            request["seed"] = int.from_bytes(digest, "big")

    async def call(self, name: str, *args) -> list:
        """What each worker answers. Raises vLLM's own error when the engine dies meanwhile: it then leaves such calls open for
        ever, and a server that is to end waits for them."""
        answer = asyncio.create_task(self.engine.collective_rpc(name, args=args))
        try:
            while not (await asyncio.wait([answer], timeout=HEALTH))[0]:
                await self.engine.check_health()
            return answer.result()
        finally:
            answer.cancel()

    async def risk_of(self, question: str) -> float:
        """AutoSteer's, of a question that the engine itself is asked: no client has come yet, whose key a server may want.
        Raises RuntimeError where it is not judged."""
        from vllm import SamplingParams  # where there is an engine to be asked, vLLM is there

        (query,), record = make_queries([question], None, self.processor), new_number()
        params = SamplingParams(max_tokens=1, extra_args={RECORD: record})
        async for _ in self.engine.generate({"prompt_token_ids": short_ids(self.processor, query)}, params, f"ras-{record}"):
            pass
        verdict = await self.judge(record)
        await self.call("ras_forget", [record])
        if verdict is None:
            raise RuntimeError(f"the engine has not judged {question!r:.200}")
        return verdict[0]

    async def judge(self, query: tuple | int) -> Judgement | Verdict | None:
        """The steering's `judge` of one query. Raises RuntimeError when no worker could."""
        found = [result for result in await self.call("ras_judge", [query]) if result is not None]
        if not found:
            raise RuntimeError("no worker has kept the logits of a query")
        return found[0][0]


def _check_stages(model_config, longest: int) -> None:
    """Raises ValueError where stages of a query, of up to ``longest`` tokens, would be in each other's way, or cut off."""
    if model_config.get_multimodal_config().mm_processor_cache_gb > 0:
        raise ValueError("mm_processor_cache_gb is not 0; start the server with --mm-processor-cache-gb 0")
    limit = _most_tokens(model_config)
    if limit is not None and limit < longest:
        raise ValueError(f"max_new_tokens is {limit} for every request; a stage needs {longest}: leave it out, or raise it")


def _most_tokens(model_config) -> int | None:
    """What vLLM holds every request's ``max_tokens`` to. That of the model's own generation config is but a default."""
    if model_config.generation_config in ("auto", "vllm"):
        return model_config.override_generation_config.get("max_new_tokens")
    return model_config.get_diff_sampling_param().get("max_tokens")


def _control_tokens(processor) -> set[str]:
    """The tokens that a tokenizer finds in a text wherever they are spelt out, and that mean more than these words."""
    added = getattr(processor.tokenizer, "added_tokens_decoder", {}).values()  # not all of them are among all_special_tokens
    named = {getattr(processor, "image_token", None) or "", *processor.tokenizer.all_special_tokens}
    return {token for token in named | {str(token) for token in added if token.special} if token.strip()}


class _Answer:
    """One request on its way. records: what the workers keep of it."""

    def __init__(self, guard: _Guard, client: Client, request: Message, query: Query):
        self.guard, self.client, self.request, self.query = guard, client, request, query
        self.records = (new_number(), new_number())

    async def send_to(self, send: Send) -> None:
        """Defends the answer, and sends it."""
        raise NotImplementedError

    def marked(self, marks: Message) -> Message:
        """The client's request with marks for the workers."""
        return self.request | {"vllm_xargs": (self.request.get("vllm_xargs") or {}) | marks}

    async def _stage(self, query: Query, tokens: int, marks: Message) -> list[int]:
        """The tokens that the server inside answers a query with, greedily. Raises RuntimeError where vLLM has cut them off,
        and Failed where it leaves no room for so many: a risk that is read from fewer steps is another one."""
        request = {name: self.request[name] for name in SHARED if name in self.request} | NEUTRAL
        request |= {"messages": to_messages(query), "max_completion_tokens": tokens, "temperature": 0}
        request |= {"return_token_ids": True, "vllm_xargs": marks}
        messages: list[Message] = []
        await self.client.post(request, into(messages), names_request=False).task
        if self.client.gone:
            raise Gone
        if messages[0]["status"] != 200:
            raise Failed(messages)
        (choice,) = json.loads(b"".join(message.get("body", b"") for message in messages))["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a stage of a query with {choice['finish_reason']!r}")
        made = choice["token_ids"]
        if choice["finish_reason"] == "length" and len(made) < tokens:
            reason = f"messages leave room for {len(made)} of a stage's {tokens} tokens; they need to be shorter"
            raise Failed(refusal(400, reason))
        return made


class _Judged(_Answer):
    """By AutoSteer: the workers judge the request itself."""

    async def send_to(self, send: Send) -> None:
        try:
            if self.request.get("n", 1) == 1:
                await self._send_judged(send)
            else:
                await self._send_choices(send)
        finally:
            await self.client.leave()
            await self.guard.call("ras_forget", list(self.records))

    async def _send_judged(self, send: Send) -> None:
        answer = _Draft(self.client, self.marked({RECORD: self.records[0]}))
        await answer.begin()
        risk, _ = await self._verdict(answer.over)
        await answer.show(partial(send_with, send, {"risk": f"{risk:.6f}"}))

    async def _send_choices(self, send: Send) -> None:
        """A record is one request's: the choices are steered by what one token more has told."""
        await self._stage(self.query, 1, {RECORD: self.records[0]})
        risk, _ = await self._verdict(lambda: True)
        send = partial(send_with, send, {"risk": f"{risk:.6f}"})
        await self.client.post(self.marked({RISK: risk}), send).task

    async def _verdict(self, over: Callable[[], bool]) -> Verdict:
        """Raises RuntimeError where the workers have none of a request that is over."""
        while (verdict := await self.guard.judge(self.records[0])) is None:
            if over():
                raise RuntimeError("no worker has judged a request")
            await asyncio.sleep(POLL)
        return verdict


class _Staged(_Answer):
    """By MoRAS: its context and its risk are requests of their own. records: of the risk stage and the draft."""

    async def send_to(self, send: Send) -> None:
        # A sampled draft and the answer in its place draw their first tokens by the same noise: a small risk changes few.
        noise = {NOISE: self.request.get("seed", new_number())} if self._drafts() else {}
        draft = _Draft(self.client, self.marked({RECORD: self.records[1]} | noise)) if noise else None
        try:
            told, risk, kept = await self._judge(draft)
        except BaseException:
            await self.client.leave()  # a draft that began now would take a place again
            await self.guard.call("ras_forget", list(self.records))
            raise
        send = partial(send_with, send, told)
        if kept:
            await draft.show(send)
            return
        if draft is not None:
            await draft.call.end()
        await self.client.post(self.marked({RISK: risk} | noise), send).task

    def _drafts(self) -> bool:
        return self.request.get("n", 1) == 1 and set(self.request) <= PLAIN and self.guard.plain

    async def _judge(self, draft: _Draft | None) -> tuple[dict[str, str], float, bool]:
        """(the headers that tell of it, r, whether the draft is the answer)."""
        settings, context = self.guard.settings, ""
        if self.query.images:
            tokens = await self._stage(context_query(self.query, settings), settings["max_context_tokens"], {})
            context = context_text(self.guard.processor, tokens, self.guard.chat_marks)
        marks = {RECORD: self.records[0]}
        # In a thread: of a long text that takes seconds, in which nobody else would be served.
        query = await asyncio.to_thread(risk_query, self.query, context, settings, self.guard.chat_marks)
        tokens = await self._stage(query, settings["steps"], marks)
        similarity, risk, _, drafted, steered = await self._judgement(draft, len(tokens))
        fate = "none" if draft is None else "kept" if drafted and drafted == steered else "fell"
        return {"risk": f"{risk:.6f}", "similarity": f"{similarity:.6f}", "draft": fate}, risk, fate == "kept"

    async def _judgement(self, draft: _Draft | None, risk_steps: int) -> Judgement:
        """The judgement, once the draft has come past its steered steps, or is over."""
        record = None if draft is None else self.records[1]
        while True:
            needed = 0 if draft is None or draft.over() else None
            found = await self.guard.judge((self.records[0], risk_steps, record, needed, False))
            if found is not None:
                return found
            await asyncio.sleep(POLL)


class _Draft:
    """An answer that is held back until it is known to stand."""

    def __init__(self, client: Client, request: Message):
        self.client = client
        self._held: list[Message] = []
        self._show: Send | None = None
        self._first = asyncio.Event()
        self.call = client.post(request, self._take)

    async def begin(self) -> None:
        """Returns when some of it is there. Raises what keeps it from being an answer."""
        first = asyncio.create_task(self._first.wait())
        try:
            await asyncio.wait([self.call.task, first], return_when=asyncio.FIRST_COMPLETED)
        finally:
            first.cancel()
        if self._held and self._held[0]["status"] != 200:
            await self.call.task
        self.over()

    def over(self) -> bool:
        """Whether all of it is there. Raises what keeps it from being an answer."""
        if self.client.gone:
            raise Gone
        if not self.call.task.done():
            return False
        self.call.task.result()
        if self._held[0]["status"] != 200:
            raise Failed(self._held)
        return True

    async def show(self, send: Send) -> None:
        """Sends all of it, now and as it comes."""
        while self._held:
            await send(self._held.pop(0))
        self._show = send
        await self.call.task

    async def _take(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self._first.set()
        await self._show(message) if self._show is not None else self._held.append(message)


