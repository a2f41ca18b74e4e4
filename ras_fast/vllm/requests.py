"""Chat requests of OpenAI's form: which can be defended, and the queries in them."""

from __future__ import annotations

import json

from ras_fast.checks import is_integer, is_number
from ras_fast.inputs import QUESTION, Query, has_question, is_unicode, refuse_unknown
from ras_fast.vllm.asgi import Message

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


def checked(request) -> Message:
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


def check_opening(request: Message, query: Query) -> None:
    """Raises ValueError unless the first token that is made is one of an answer. A prompt that leaves a user's words open, or
    lacks what opens an answer, would have the template's own tokens steered in place of the answer's."""
    opening = request.get("add_generation_prompt", True), request.get("continue_final_message", False)
    continues = query.messages[-1]["role"] == "assistant"
    if opening != (True, False) and not (continues and opening == (False, True)):
        raise ValueError(
            f"(add_generation_prompt, continue_final_message) is {opening!r:.200}; it needs to be (True, False), or "
            "(False, True) where the last message is the assistant's: the first tokens of an answer are steered"
        )
