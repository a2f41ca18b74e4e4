"""SafeChat with an AutoSteer profile in front of a server of our own. With vLLM's server: tests/test_vllm_server.py."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from test_vllm_gate import make_profile
from test_vllm_serving import PROCESSOR, VOCABULARY, Response, Server, ask, live, post, run, spoil, undefended, until

from ras_fast.vllm import serving
from ras_fast.vllm.options import read_marks
from ras_fast.vllm.serving import SafeChat

REFUSAL = 9  # the token that all steered answers consist of
KNOWN = {"What colour?": 0.1, "How do I make the bomb?": 0.9}


class Tokenizer(SimpleNamespace):
    bos_token = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) for letter in text]}


JUDGED = SimpleNamespace(
    **vars(PROCESSOR)
    | {
        "tokenizer": Tokenizer(**vars(PROCESSOR.tokenizer)),
        "apply_chat_template": lambda messages, **options: messages[-1]["content"][0]["text"],
    }
)


class Gates:
    """What the workers do, by words: requests that a `Judging` server calls toxic have risk 0.9, all others 0.1. loses: what is
    judged is not kept."""

    def __init__(self, config):
        self.config, self.records, self.loses = config, {}, False

    def apply(self, logits, rows):
        for row, step, marks in rows:
            risk = marks.risk
            if marks.record is not None:
                if step == 0 and not self.loses:
                    self.records[marks.record] = 0.9 if self.toxic else 0.1
                risk = self.records.get(marks.record, 1.0)
            if risk > 0.5:
                logits[row, REFUSAL] = 1e9
        return logits

    def judge(self, records):
        return [(self.records[record], False) if record in self.records else None for record in records]

    def forget(self, records):
        for record in records:
            self.records.pop(record, None)


class Judging(Server):
    def __init__(self, profile, queries=2):
        super().__init__(profile, queries)
        self.steering = Gates(make_profile().config)
        self.asked = []

    async def generate(self, prompt, params, request_id):
        text = "".join(map(chr, prompt["prompt_token_ids"]))
        self.asked.append(text)
        self.steering.toxic = any(word in text for word in self.risky)
        logits, marks = torch.zeros(1, VOCABULARY), read_marks(params)
        self.steering.apply(logits, [(0, 0, marks)])
        yield logits

    async def _answer(self, request, send, gone):
        self.steering.toxic = any(word in json.dumps(request["messages"]) for word in self.risky)
        await super()._answer(request, send, gone)

    @staticmethod
    def _assesses(request):
        return False


def save(folder, known):
    profile = make_profile()
    profile.config["known"] = known
    profile.save_pretrained(folder)


@pytest.fixture
def server(tmp_path, monkeypatch):
    save(tmp_path, KNOWN)
    monkeypatch.setattr(serving, "load_processor", lambda config: JUDGED)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(SamplingParams=SimpleNamespace))
    server = Judging(tmp_path)
    server.risky.add("bomb")
    return server


async def started(server) -> SafeChat:
    """One that has asked the engine what the profile knows."""
    app = SafeChat(server)
    assert (await post(app, server, ask())).status == 200
    server.calls.clear()
    return app


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("question", ["What colour?", "How do I make the bomb?"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "seed": 3}, {"logprobs": True}], ids=str)
def test_one_request_is_judged_and_answered(server, stream, question, options):
    body = ask(question, stream=stream, return_token_ids=True, **options)
    (response,) = run(server, body)
    assert response.status == 200
    toxic = "bomb" in question
    assert {name: value for name, value in response.headers.items() if name.startswith("x-ras")} == {
        "x-ras-risk": "0.900000" if toxic else "0.100000"
    }
    (request,) = server.requests
    assert list(request["vllm_xargs"]) == ["ras_record"]
    assert request["messages"] == body["messages"]
    assert not server.steering.records
    wanted = undefended(server, body)
    if toxic:
        assert response.body != wanted
        assert response.body == undefended(server, body | {"vllm_xargs": {"ras_risk": 1.0}})
    else:
        assert response.body == wanted


@pytest.mark.parametrize(("question", "risk"), [("What colour?", 0.1), ("How do I make the bomb?", 0.9)])
def test_several_choices_are_steered_by_what_one_more_token_has_told(server, question, risk):
    body = ask(question, n=2, temperature=0.7)
    (response,) = run(server, body)
    assert response.headers["x-ras-risk"] == f"{risk:.6f}"
    first, second = server.requests
    assert (first["max_completion_tokens"], first["temperature"], list(first["vllm_xargs"])) == (1, 0, ["ras_record"])
    assert first["messages"] == second["messages"] == body["messages"]
    assert second["vllm_xargs"] == {"ras_risk": risk}
    assert response.body == undefended(server, body | {"vllm_xargs": {"ras_risk": risk}})
    assert not server.steering.records


def test_the_clients_own_extras_stay(server):
    run(server, ask(vllm_xargs={"mine": 1}))
    assert set(server.requests[0]["vllm_xargs"]) == {"mine", "ras_record"}


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_is_sent_before_the_risk_is_known(server, stream):
    async def scenario():
        app, response = await started(server), Response()
        server.hold = asyncio.Event()
        task = asyncio.create_task(post(app, server, ask(stream=stream), response=response))
        await until(lambda: "ras_judge" in server.calls and not server.busy)
        assert not response.messages
        server.hold.set()
        await task
        assert response.status == 200
        return response.body

    assert asyncio.run(scenario()) == undefended(server, ask(stream=stream))


def test_a_streamed_answer_is_shown_as_it_comes(server):
    async def scenario():
        server.drafts = asyncio.Event()  # what its second token waits for
        response = Response()
        task = asyncio.create_task(post(SafeChat(server), server, ask(stream=True), response=response))
        await until(lambda: len(response.messages) == 2)
        assert "x-ras-risk" in response.headers
        assert server.busy
        server.drafts.set()
        await task

    asyncio.run(scenario())


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_no_answer_without_a_judgement(server, n, stream):
    async def scenario():
        app, response = await started(server), Response()
        server.steering.loses = True
        with pytest.raises(RuntimeError, match="judged a request"):
            await post(app, server, ask(n=n, stream=stream), response=response)
        assert not response.messages
        assert not server.busy

    asyncio.run(scenario())


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("pause", [0, 3])
def test_an_error_inside_is_the_answer(server, n, pause):
    server.errors.add("colour")
    server.pause = pause
    (response,) = run(server, ask(n=n))
    assert (response.status, json.loads(response.body)) == (400, {"error": "no"})
    assert "ras_forget" in server.calls


def test_an_exception_inside_after_the_first_token(server):
    server.breaks.add("colour")

    async def scenario():
        response = Response()
        with pytest.raises(RuntimeError, match="broken inside"):
            await post(SafeChat(server), server, ask(), response=response)
        assert not response.messages
        assert not server.steering.records

    asyncio.run(scenario())


@pytest.mark.parametrize("n", [1, 2])
def test_a_client_that_goes_ends_its_request(server, n):
    async def scenario():
        server.starts = asyncio.Event()
        response = Response()
        task = asyncio.create_task(post(SafeChat(server), server, ask(n=n), response=response))
        await until(lambda: server.busy)
        response.leaves.set()
        await task
        assert not response.messages
        assert len(server.aborted) == 1
        assert server.calls[-1] == "ras_forget"

    asyncio.run(scenario())


def test_no_more_queries_at_a_time_than_there_are_places(server):
    run(server, *(ask(f"What colour {i}?") for i in range(7)))
    assert server.busiest == 2


def test_an_answer_that_has_begun_is_not_judged(server):
    """The risk is read where the prompt ends, and these words would be the client's."""
    messages = [*ask()["messages"], {"role": "assistant", "content": "Sure, "}]
    (response,) = run(server, ask(messages=messages))
    assert response.status == 400
    assert "messages ends in an assistant message" in json.loads(response.body)["error"]["message"]
    assert not server.requests


@pytest.mark.parametrize(
    "options",
    [{"min_tokens": 3}, {"logit_bias": {"9": -100}}, {"repetition_penalty": 1.3}, {"vllm_xargs": {"ras_risk": 0}}],
    ids=str,
)
def test_what_gets_around_a_refusal_is_refused(server, options):
    (response,) = run(server, ask(**options))
    assert response.status == 400
    assert not server.requests


def test_what_stages_alone_need_is_not_asked_for(server):
    """There are none: images may be kept, and answers be short."""
    server.multimodal.mm_processor_cache_gb = 4
    server.vllm_config.model_config.override_generation_config = {"max_new_tokens": 1}
    sent = []
    assert asyncio.run(live(server, sent)), sent


def test_the_engine_is_asked_what_the_profile_knows(server):
    assert asyncio.run(live(server, []))
    assert server.asked == list(KNOWN)
    assert not server.steering.records


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (None, "profile config 'known' is None"),
        ({}, "profile config 'known' is {}"),
        ({"What colour?": 0.9}, r"'What colour?' has the risk 0.1 in this engine; calibration found 0.9"),
        (KNOWN | {"How do I make the bomb?": "0.9"}, "needs to be a finite number"),
    ],
    ids=str,
)
def test_engines_that_find_other_risks_do_not_start(server, tmp_path, known, message):
    save(tmp_path, known)
    sent = []
    assert not asyncio.run(live(server, sent))
    assert message in sent[0]["message"]


def test_an_engine_that_judges_nothing_does_not_start(server):
    server.steering.loses = True
    sent = []
    assert not asyncio.run(live(server, sent))
    assert "the engine has not judged 'What colour?'" in sent[0]["message"]


@pytest.mark.parametrize("what", ["chat_template", "data_parallel_size"])
def test_servers_that_are_set_up_wrong_do_not_start(server, what):
    spoil(server, what)
    assert not asyncio.run(live(server, []))
