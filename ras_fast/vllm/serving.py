"""SafeChat: a defence in front of a vLLM server's own chat endpoint, as middleware of that server. docs/vllm.md.

The stages of MoRAS are requests to the server inside, so images, templates, limits and errors are vLLM's own. AutoSteer's only
one is the client's, which is told to be judged. Knows ASGI and JSON; imports vLLM only to ask its engine before a client can.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from ras_fast.checks import is_integer, is_number
from ras_fast.inputs import (
    QUESTION,
    Query,
    has_question,
    is_unicode,
    make_queries,
    refuse_begun,
    refuse_unknown,
    short_ids,
    texts_of,
)
from ras_fast.methods.moras import context_query, context_text, marks_of, risk_query
from ras_fast.profile import RasProfile
from ras_fast.vllm.checkpoint import load_processor
from ras_fast.vllm.gate import Verdict, check_known, known_questions
from ras_fast.vllm.options import NOISE, PROCESSOR, RECORD, RISK, new_number, read_settings
from ras_fast.vllm.steering import Judgement

Message = dict[str, Any]
Send = Callable[[Message], Awaitable[None]]

CHAT = "/v1/chat/completions"
MODELS = "/v1/models"
WITHOUT_ANSWERS = {"/tokenize", "/detokenize", "/ping"}  # what may be posted to undefended
# What a request's other stages take over from it: how its images are read, and whose cache it may use.
SHARED = ("model", "mm_processor_kwargs", "cache_salt", "priority", "user")
# These are known with the value that does nothing. Until min_tokens every stop token is forbidden, also those that the client
# names; an answer that goes on behind the end of its refusal does so unsteered; and a penalty on the words of a refusal, which
# the question may hold, can outweigh the steering.
NEUTRAL = {
    "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0, "ignore_eos": False,
}  # fmt: skip
HOTTEST = 2  # temperature, as of OpenAI's own endpoint: the noise of a hotter answer outweighs its steering
# With these fields alone a token follows from the logits and what is known here of how it is drawn.
PLAIN = {
    *SHARED, *NEUTRAL, "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n",
    "stop", "stop_token_ids", "stream", "stream_options", "return_token_ids", "include_stop_str_in_output",
    "skip_special_tokens", "spaces_between_special_tokens", "add_generation_prompt", "continue_final_message",
}  # fmt: skip
# Others are refused: they may forbid the tokens of a refusal, make answers out of requests that carry no risk, or, as what a
# template is given (chat_template_kwargs), put words into every prompt, the context's too.
KNOWN = PLAIN | {"logprobs", "request_id", "top_logprobs", "vllm_xargs"}
# What vLLM reads out of vllm_xargs as if it were a field of the request, and does not check there.
FIELDS_IN_EXTRA = {"kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode", "session_id"}
# Templates write a role into the prompt, some in other letters: a control token in capitals would be none until then.
ROLES = ("system", "developer", "user", "assistant", "tool")
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
            await _refuse(send, 403, f"{scope['method']} {path} is not defended; this server answers at {CHAT}")

    async def _chat(self, scope: Message, receive, send: Send) -> None:
        if not await self._admits(scope, send):
            return
        try:
            request = _checked(json.loads(await _body(receive)))
            query = to_query(request["messages"])
            _check_opening(request, query)
            request["messages"] = to_messages(query)
        except (ValueError, RecursionError) as error:
            await _refuse(send, 400, str(error))
            return
        try:
            guard = await self._start(scope["app"].state)
        except Exception as error:  # vLLM would take some for the client's
            await _refuse(send, 500, str(error))
            return
        try:
            guard.check(request, query)
            guard.hide_seed(request)
        except ValueError as error:
            await _refuse(send, 400, str(error))
            return
        outbox = _Outbox(send)
        try:
            async with guard.places:  # until vLLM has made the answer; a client that is slow to read it takes no place
                client = _Client(self.app, scope, receive)
                try:
                    await guard.answer(guard, client, request, query).send_to(outbox.put)
                except _Failed as failed:
                    for message in failed.messages:
                        await outbox.put(message)
                except _Gone:
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
        await _Call(self.app, scope, b"", _into(messages)).task
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
            words = _dumps([request["seed"], request["messages"]])
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

    def __init__(self, guard: _Guard, client: _Client, request: Message, query: Query):
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
        and _Failed where it leaves no room for so many: a risk that is read from fewer steps is another one."""
        request = {name: self.request[name] for name in SHARED if name in self.request} | NEUTRAL
        request |= {"messages": to_messages(query), "max_completion_tokens": tokens, "temperature": 0}
        request |= {"return_token_ids": True, "vllm_xargs": marks}
        messages: list[Message] = []
        await self.client.post(request, _into(messages), names_request=False).task
        if self.client.gone:
            raise _Gone
        if messages[0]["status"] != 200:
            raise _Failed(messages)
        (choice,) = json.loads(b"".join(message.get("body", b"") for message in messages))["choices"]
        if choice["finish_reason"] not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a stage of a query with {choice['finish_reason']!r}")
        made = choice["token_ids"]
        if choice["finish_reason"] == "length" and len(made) < tokens:
            reason = f"messages leave room for {len(made)} of a stage's {tokens} tokens; they need to be shorter"
            raise _Failed(_refusal(400, reason))
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
        await answer.show(partial(_send_with, send, {"risk": f"{risk:.6f}"}))

    async def _send_choices(self, send: Send) -> None:
        """A record is one request's: the choices are steered by what one token more has told."""
        await self._stage(self.query, 1, {RECORD: self.records[0]})
        risk, _ = await self._verdict(lambda: True)
        send = partial(_send_with, send, {"risk": f"{risk:.6f}"})
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
        send = partial(_send_with, send, told)
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

    def __init__(self, client: _Client, request: Message):
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
            raise _Gone
        if not self.call.task.done():
            return False
        self.call.task.result()
        if self._held[0]["status"] != 200:
            raise _Failed(self._held)
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


class _Outbox:
    """What a client is sent, as fast as it reads."""

    def __init__(self, send: Send):
        self._messages: asyncio.Queue[Message | None] = asyncio.Queue()
        self.writer = asyncio.create_task(self._write(send))

    async def put(self, message: Message) -> None:
        self._messages.put_nowait(message)

    async def close(self) -> None:
        """Returns when all of it is sent."""
        self._messages.put_nowait(None)
        await self.writer

    async def _write(self, send: Send) -> None:
        while (message := await self._messages.get()) is not None:
            await send(message)


class _Client:
    """Who sent a request, and the requests to the server inside that are made for them."""

    def __init__(self, app, scope: Message, receive):
        self.app, self.gone, self._calls = app, False, []
        self._scope = scope | {"headers": [(name, value) for name, value in scope["headers"] if name != b"content-length"]}
        self._watch = asyncio.create_task(self._until_gone(receive))

    def post(self, request: Message, send: Send, names_request: bool = True) -> _Call:
        """Starts a request. names_request: whether it has the name that the client gave its own."""
        scope = dict(self._scope)
        if not names_request:
            scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        call = _Call(self.app, scope, _dumps(request), send)
        self._calls.append(call)
        if self.gone:
            call.gone.set()
        return call

    async def leave(self) -> None:
        """Ends what is still under way."""
        self._watch.cancel()
        await asyncio.gather(*(call.end() for call in self._calls))

    async def _until_gone(self, receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        for call in self._calls:
            call.gone.set()


class _Call:
    """One request to the server inside. task: of its whole response."""

    def __init__(self, app, scope: Message, body: bytes, send: Send):
        self.gone = asyncio.Event()
        self._body: bytes | None = body
        self.task = asyncio.create_task(app(scope, self._receive, send))

    async def end(self) -> None:
        """As if the client had gone: vLLM then aborts its part. Returns when it has."""
        self.gone.set()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


class _Failed(Exception):
    """A stage has no outcome. messages: the response that says why."""

    def __init__(self, messages: list[Message]):
        super().__init__()
        self.messages = messages


class _Gone(Exception):
    """The client waits no longer."""


# Chats


def to_query(messages) -> Query:
    """OpenAI chat messages as a query whose images are their ``image_url`` parts.

    Messages and parts are made anew of what is known here. vLLM reads far more out of them, by rules of its own, and hands what
    it does not know to the chat template.
    Raises ValueError for anything else in them, and for a chat that does not end in a question.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages is {messages!r:.200}; it needs to be a list of messages")
    images: list[Message] = []
    chat = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            raise ValueError(f"messages[{i}] is {message!r:.200}; it needs a role and a content")
        refuse_unknown(f"messages[{i}]", message, ("role", "content"))
        if message["role"] not in ROLES:
            raise ValueError(f"messages[{i}] has the role {message['role']!r:.200}; it needs to be one of {', '.join(ROLES)}")
        chat.append({"role": message["role"], "content": _parts(f"messages[{i}]", message["content"], images)})
    if not has_question(chat):
        raise ValueError(f"messages needs to end in {QUESTION}; its roles are {[message['role'] for message in chat]!r:.200}")
    return Query(chat, images)


def _parts(where: str, content, images: list[Message]) -> list[Message]:
    content = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(content, list):
        raise ValueError(f"{where} has the content {content!r:.200}; it needs to be a string or a list of parts")
    parts: list[Message] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image_url":
            refuse_unknown(f"{where}: an image_url part", part, ("type", "image_url"))
            images.append({"type": "image_url", "image_url": _image_url(where, part.get("image_url"))})
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            refuse_unknown(f"{where}: a text part", part, ("type", "text"))
            parts.append({"type": "text", "text": part["text"]})
        else:
            raise ValueError(f"{where} has the part {part!r:.200}; 'text' and 'image_url' parts can be defended")
    return parts


def _image_url(where: str, image) -> Message:
    """The value of an image_url part. Every stage reads it anew, and elsewhere than in the request itself could find another
    picture each time."""
    url = image.get("url") if isinstance(image, dict) else None
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"{where} has the image_url {image!r:.200}; it needs a url that holds the image: 'data:…'")
    refuse_unknown(f"{where}: an image_url", image, ("url", "detail"))
    return {key: image[key] for key in ("url", "detail") if image.get(key) is not None}


def to_messages(query: Query) -> list[Message]:
    """The way back from `to_query`."""
    images = iter(query.images)
    return [
        message | {"content": [next(images) if part["type"] == "image" else part for part in message["content"]]}
        for message in query.messages
    ]


def _checked(request) -> Message:
    """A request without fields that are null. Raises ValueError for one that cannot be defended."""
    if not isinstance(request, dict):
        raise ValueError(f"the request is a {type(request).__name__}; it needs to be a JSON object")
    request = {name: value for name, value in request.items() if value is not None}
    for name, value in request.items():
        if not is_unicode(json.dumps({name: value}, ensure_ascii=False)):
            raise ValueError(f"{name!a} holds half a character (a lone surrogate); it needs to be whole ones")
    unknown = sorted(set(request) - KNOWN)
    if unknown:
        raise ValueError(f"{', '.join(unknown):.200} cannot be defended; this server knows {', '.join(sorted(KNOWN))}")
    for name, none in NEUTRAL.items():
        if request.get(name) not in (None, none):
            value = f"{request[name]!r:.200}"
            raise ValueError(f"{name} is {value}, which could forbid a refusal or its end; it needs to be {none}, or left out")
    if not (is_number(request.get("temperature", 1)) and 0 <= request.get("temperature", 1) <= HOTTEST):
        raise ValueError(f"temperature is {request['temperature']!r:.200}; it needs to be in [0, {HOTTEST}], or left out")
    if not is_integer(request.get("seed", 0)):
        raise ValueError(f"seed is {request['seed']!r:.200}; it needs to be an integer")
    if request.get("seed") == -1:  # for vLLM none
        del request["seed"]
    extra = request.get("vllm_xargs", {})
    if not isinstance(extra, dict) or any(name.startswith("ras_") for name in extra):
        raise ValueError(f"vllm_xargs is {extra!r:.200}; it needs to be an object without ras_…, which are this server's own")
    smuggled = sorted(set(extra) & FIELDS_IN_EXTRA)
    if smuggled:
        raise ValueError(f"vllm_xargs has {', '.join(smuggled)}, a field of vLLM's own that cannot be defended")
    return request | {"messages": request.get("messages")}


def _check_opening(request: Message, query: Query) -> None:
    """Raises ValueError unless the first token that is made is one of an answer. A prompt that leaves a user's words open, or
    lacks what opens an answer, would have the template's own tokens steered in place of the answer's."""
    opening = request.get("add_generation_prompt", True), request.get("continue_final_message", False)
    continues = query.messages[-1]["role"] == "assistant"
    if opening != (True, False) and not (continues and opening == (False, True)):
        raise ValueError(
            f"(add_generation_prompt, continue_final_message) is {opening!r:.200}; it needs to be (True, False), or "
            "(False, True) where the last message is the assistant's: the first tokens of an answer are steered"
        )


# ASGI


async def _body(receive) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _into(messages: list[Message]) -> Send:
    """What keeps a response there."""

    async def take(message: Message) -> None:
        messages.append(message)

    return take


async def _refuse(send: Send, status: int, reason: str) -> None:
    for message in _refusal(status, reason):
        await send(message)


def _refusal(status: int, reason: str) -> list[Message]:
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    body = _dumps({"error": {"message": reason, "type": kind, "param": None, "code": status}})
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    return [
        {"type": "http.response.start", "status": status, "headers": headers},
        {"type": "http.response.body", "body": body, "more_body": False},
    ]


async def _send_with(send: Send, told: dict[str, str], message: Message) -> None:
    """``send``, with headers of ours at the start."""
    if message["type"] == "http.response.start":
        told_headers = [(f"x-ras-{name}".encode(), value.encode()) for name, value in told.items()]
        message = message | {"headers": [*message.get("headers", ()), *told_headers]}
    await send(message)


def _dumps(value) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
