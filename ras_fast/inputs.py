"""What users hand in - prompts, chats, pairs - checked and turned into model inputs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from ras_fast.images import load_image

PICTURES = ("image", "path", "url")  # keys of an image part that hold the image
# What `has_question` asks of a chat.
QUESTION = 'a "user" message with a question, or in that and one "assistant" message of words alone'


@dataclass(frozen=True)
class Query:
    """One chat and its images.

    messages: chat-template messages whose contents are lists of ``{"type": "image"}`` and ``{"type": "text"}`` parts.
    images: RGB images in the order of the image parts.
    poisoned: an image held NaN or infinite pixels. It was replaced by a black one, and the risk of this query is 1.
    """

    messages: list[dict]
    images: list[Image.Image]
    poisoned: bool = False

    def ask_about_images(self, text: str) -> Query:
        """A fresh chat: all images, then ``text``."""
        return replace(self, messages=[{"role": "user", "content": [*_image_parts(len(self.images)), _text_part(text)]}])

    def edit_questions(self, edit: Callable[[list[str]], list[str]]) -> Query:
        """The same chat with what ``edit`` makes of the texts of each message of its user."""

        def edited(message: dict) -> dict:
            if message["role"] != "user":
                return message
            texts = iter(edit(texts_of(message)))
            parts = [_text_part(next(texts)) if part["type"] == "text" else part for part in message["content"]]
            return message | {"content": parts}

        return replace(self, messages=[edited(message) for message in self.messages])

    def prefix_last_question(self, text: str) -> Query:
        """The same chat with ``text`` put before the last question, and that question's images before both; an assistant
        message after it is dropped. The question's texts stay parts of their own: templates put them together in ways of their
        own, and its words have to be those that are answered."""
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        question = self.messages[last]
        images = [part for part in question["content"] if part["type"] == "image"]
        first, *others = texts_of(question)
        asked = {"role": "user", "content": [*images, *map(_text_part, (f"{text} {first}", *others))]}
        return replace(self, messages=[*self.messages[:last], asked])


def texts_of(message: dict) -> list[str]:
    """What the text parts of a chat-template message say."""
    return [part["text"] for part in message["content"] if part["type"] == "text"]


def make_queries(prompts, images, processor) -> list[Query]:
    """Pairs prompts with their images.

    prompts: list of strings, or of chats (lists of ``{"role", "content"}`` whose content is a string or a list of
        parts; it ends with a user message, or with that and one assistant message without images, which the answer continues).
    images: None, or one entry per prompt: an image, a list of images, or None. An image is whatever `load_image` takes.

    Images go where the prompt has image parts or the processor's image placeholder, else before the first question. Instead
    of in ``images``, all images of a chat may be in its parts: of type "image" under "image", "path" or "url", or of type
    "image_url" as in OpenAI's requests, which name no files here, as a client may have written them.
    Raises ValueError when counts do not match, a prompt does not end in a question, or an image cannot be used.
    """
    if isinstance(prompts, str) or not isinstance(prompts, (list, tuple)):
        raise ValueError(f"prompts is a {type(prompts).__name__}; it needs to be a list with one prompt per query")
    images = [None] * len(prompts) if images is None else images
    if not isinstance(images, (list, tuple)) or len(images) != len(prompts):
        got = f"{len(images)} entries" if isinstance(images, (list, tuple)) else f"a {type(images).__name__}"
        raise ValueError(f"images is {got}; it needs to be a list with one entry per prompt ({len(prompts)})")
    placeholder = image_placeholder(processor)
    return [_make_query(i, prompt, entry, placeholder) for i, (prompt, entry) in enumerate(zip(prompts, images, strict=True))]


def image_placeholder(processor) -> str:
    """What stands for an image in a chat's text; the processor puts the image's tokens there, which may be others."""
    return getattr(processor, "image_token", None) or "<image>"


def question_pairs(pairs: Sequence[tuple], processor) -> tuple[list[Query], list[Query]]:
    """The unsafe and the safe queries of labelled pairs, as two lists.

    pairs: (image, unsafe question, safe question), both about that image; or (image, unsafe question, safe question, image of
        the safe question). Images as in `make_queries`.

    Raises ValueError for an entry of another form, for pixels that are not finite, and where `make_queries` does.
    """
    for i, pair in enumerate(pairs):
        if not isinstance(pair, (list, tuple)) or len(pair) not in (3, 4):
            got = f"has {len(pair)} entries" if isinstance(pair, (list, tuple)) else f"is a {type(pair).__name__}"
            raise ValueError(f"pairs[{i}] {got}; it needs to be (image, unsafe, safe[, image])")
    unsafe = make_queries([pair[1] for pair in pairs], [pair[0] for pair in pairs], processor)
    safe = make_queries([pair[2] for pair in pairs], [pair[3 if len(pair) == 4 else 0] for pair in pairs], processor)
    refuse_poisoned("pairs", zip(unsafe, safe, strict=True))
    for i, sides in enumerate(zip(unsafe, safe, strict=True)):
        if sides[0] == sides[1]:
            raise ValueError(f"pairs[{i}] asks the same unsafe and safe question about one image; nothing tells them apart")
    return unsafe, safe


def read_pairs(path: str | Path) -> list[tuple]:
    """Pairs as `question_pairs` takes them, from a file with lines of {"image", "unsafe", "safe"} and, where the safe question
    has an image of its own, "safe_image"; image paths are relative to the file. An image is a path or a list of paths; where
    "image" is null, the questions have none.

    Raises ValueError, which names the line that is wrong, or the file without any. A key of another name is wrong, too:
    "safe_img" means a picture.
    """
    path, pairs = Path(path), []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            pair = (_images_of(path, row["image"]), row["unsafe"], row["safe"])  # before `get`, which a list has not
            others = [_images_of(path, row["safe_image"])] if row.get("safe_image") is not None else []
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f'{path}:{number} needs to be {{"image": …, "unsafe": …, "safe": …}}: {error!r}') from error
        refuse_unknown(f"{path}:{number}", row, ("image", "unsafe", "safe", "safe_image"))
        if not all(isinstance(text, str) and text.strip() for text in pair[1:]):
            raise ValueError(f"{path}:{number}: unsafe and safe need to be texts that are not empty: {pair[1:]}")
        for image in _flat([pair[0], *others]):
            if not is_file(image):
                raise ValueError(f"{path}:{number}: there is no image {str(image)[:300]}")
        pairs.append((*pair, *others))
    if not pairs:
        raise ValueError(f'{path} holds no pair; it needs lines of {{"image": …, "unsafe": …, "safe": …}}')
    return pairs


def _images_of(path: Path, given: str | list[str] | None) -> Path | list[Path] | None:
    """The image, or images, that a row of the file names. Raises TypeError or ValueError for what names none."""
    if given == []:
        raise ValueError("an image is []; a pair without one has null")
    if given is None:
        return None
    return [path.parent / image for image in given] if isinstance(given, list) else path.parent / given


def _flat(images: list[Path | list[Path] | None]) -> list[Path]:
    return [image for some in images if some is not None for image in (some if isinstance(some, list) else [some])]


def read_lines(path: Path) -> list[str]:
    """Of a text in UTF-8, between line feeds alone: JSON and texts may hold other line ends.

    Raises ValueError for another kind of file.
    """
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text in UTF-8: {error}") from error


def is_file(path: Path) -> bool:
    """Also of what cannot be a path, such as an image in base64, which is longer than a name may be."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_unicode(text: str) -> bool:
    """Whether every character is a whole one. JSON may hold half of one ("\\ud800"), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def refuse_unknown(where: str, given: dict, known: tuple[str, ...]) -> None:
    """Raises ValueError where a message or a part of one says anything under other keys than ``known``: words or a picture that
    one stage would read and another would not, or that none would."""
    unknown = {key: value for key, value in given.items() if key not in known and not _says_nothing(value)}
    if unknown:
        shown = ", ".join(f"{key!r}: {value!r:.100}" for key, value in unknown.items())
        raise ValueError(f"{where} has {shown}; it can have {', '.join(known)} and nothing else")


def _says_nothing(value) -> bool:
    """What data sets and other servers put under keys that are not used."""
    return value is None or (isinstance(value, list) and not value)


def refuse_poisoned(name: str, groups: Iterable[Iterable[Query]]) -> None:
    """Raises ValueError when a query of some group has NaN or infinite pixels: calibrating on the black image that stands for
    them would mean nothing."""
    poisoned = next((i for i, queries in enumerate(groups) if any(query.poisoned for query in queries)), None)
    if poisoned is not None:
        raise ValueError(f"{name}[{poisoned}] has an image with NaN or infinite pixels")


def has_question(messages: list[dict]) -> bool:
    """Whether a chat of parts ends in a user message with a text that is not blank, or in that and one assistant message with
    such a text. After other messages, and images in that last one, a model would answer what its risk is not read from."""
    continues = bool(messages) and messages[-1]["role"] == "assistant"
    asked, begun = (messages[:-1], messages[-1]["content"]) if continues else (messages, [])
    if any(part["type"] == "image" for part in begun) or continues != any(_has_words(part) for part in begun):
        return False
    return bool(asked) and asked[-1]["role"] == "user" and any(_has_words(part) for part in asked[-1]["content"])


def refuse_begun(where: str, query: Query, method: str) -> None:
    """Raises ValueError for a chat in which the answer has begun, where ``method`` reads the risk at the end of the prompt: it
    is not to be read at one of the answer's words. where: what the chat is called."""
    if query.messages[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends in an assistant message; a {method!r} profile reads the risk where the prompt ends, so it needs to "
            "end in the user's words"
        )


def _has_words(part: dict) -> bool:
    return part["type"] == "text" and bool(part["text"].strip())


def _make_query(index: int, prompt, entry, placeholder: str) -> Query:
    where = f"prompts[{index}]"
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(chat, (list, tuple)) or not all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in chat):
        one = "one chat is prompts=[chat]; " if isinstance(prompt, dict) else ""
        raise ValueError(f"{where} needs to be a string or a list of messages with 'role' and 'content'; {one}got {prompt!r}")
    for message in chat:
        refuse_unknown(f"{where}: a message", message, ("role", "content"))
    messages = [{"role": m["role"], "content": _parts(where, m["content"], placeholder)} for m in chat]
    if not has_question(messages):
        raise ValueError(f"{where} needs to end in {QUESTION}, got {prompt!r}")
    if not all(is_unicode(text) for message in messages for text in texts_of(message)):
        raise ValueError(f"{where} holds half a character (a lone surrogate): {prompt!r}")

    raw = [] if entry is None else list(entry) if isinstance(entry, (list, tuple)) else [entry]
    own = [part.pop("image", None) for m in messages for part in m["content"] if part["type"] == "image"]
    if any(image is not None for image in own):
        if raw or any(image is None for image in own):
            raise ValueError(f"{where} holds images in its parts; all of them need to be there, and images[{index}] to be None")
        raw = own
    loaded = [load_image(image, f"images[{index}]") for image in raw]
    wanted = len(own)
    if wanted == 0 and loaded:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = _image_parts(len(loaded))
    elif wanted != len(loaded):
        raise ValueError(f"{where} has {wanted} image placeholder(s) but images[{index}] holds {len(loaded)} image(s)")
    poisoned = any(image is None for image in loaded)
    return Query(messages, [Image.new("RGB", (64, 64)) if image is None else image for image in loaded], poisoned)


def _parts(where: str, content, placeholder: str) -> list[dict]:
    """Chat content as parts; a placeholder inside a text becomes an image part. One that came with its image keeps it."""
    content = [_text_part(content)] if isinstance(content, str) else content
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
        raise ValueError(f"{where} has the content {content!r}; it needs to be a string or a list of parts, which are dicts")
    parts = []
    for part in content:
        if part.get("type") in ("image", "image_url"):
            parts.append(_image_part(where, part))
        elif part.get("type") == "text":
            refuse_unknown(f"{where}: a text part", part, ("type", "text"))
            if not isinstance(part.get("text"), str):
                raise ValueError(f"{where} has the text part {part!r}; it needs a string as its 'text'")
            parts += _split(part["text"], placeholder)
        else:
            frames = " (of a video hand in some frames, as images)" if part.get("type") == "video" else ""
            got = f"{where} has a content part of type {part.get('type')!r}"
            raise ValueError(f"{got}; it needs to be 'text' or 'image'{frames}")
    return parts


def _image_part(where: str, part: dict) -> dict:
    """A part of type "image", with its image if it came with one."""
    keys = PICTURES if part["type"] == "image" else ("image_url",)
    refuse_unknown(f"{where}: an image part", part, ("type", *keys))
    named = [part[key] for key in keys if part.get(key) is not None]
    if len(named) > 1:
        raise ValueError(f"{where}: an image part has {len(named)} pictures; it can have one of {', '.join(keys)}")
    if part["type"] == "image":
        return {"type": "image", "image": named[0]} if named else {"type": "image"}
    url = named[0] if named else None
    if isinstance(url, dict):
        refuse_unknown(f"{where}: an image_url", url, ("url",))
        url = url.get("url")
    if not isinstance(url, str) or not url.startswith("data:"):
        raise ValueError(f"{where} has the image_url {url!r:.100}; it needs to be a data: URL, which holds the image itself")
    return {"type": "image", "image": url}


def _split(text: str, placeholder: str) -> list[dict]:
    """A text as parts, an image part for each placeholder. Blanks beside a placeholder go with it; others are the user's, and
    may be all that keeps two texts apart."""
    pieces = text.split(placeholder)
    parts = []
    for i, piece in enumerate(pieces):
        piece = piece.lstrip() if i > 0 else piece
        piece = piece.rstrip() if i < len(pieces) - 1 else piece
        parts += [*_image_parts(i > 0), *([_text_part(piece)] if piece else [])]
    return parts


def _text_part(text: str) -> dict:
    return {"type": "text", "text": text}


def _image_parts(count: int) -> list[dict]:
    return [{"type": "image"} for _ in range(count)]


def encode(processor, query: Query, device, dtype) -> tuple[dict[str, torch.Tensor], bool]:
    """The chat through the processor's template, and whether the query is poisoned.

    Returns the model's inputs (input_ids [1, L], pixel_values, ...) and True when an image held NaN or infinite pixels,
    from the start or after the processor. Such pixels become 0, so that they stay out of the model.
    """
    text, special = _render(processor, query)
    batch = processor(text=[text], images=query.images or None, return_tensors="pt", add_special_tokens=special)
    inputs, poisoned = {}, query.poisoned
    for name, value in batch.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{type(processor).__name__} gives {name} as a {type(value).__name__}; it needs to be a tensor")
        if value.is_floating_point():
            poisoned |= not bool(torch.isfinite(value).all())
            inputs[name] = value.nan_to_num(0, 0, 0).to(device, dtype)
        elif name not in ("attention_mask", "labels"):  # PaliGemma's gives labels, which are for training
            inputs[name] = value.to(device)
    return inputs, poisoned


def refuse_typed_pieces(processor, query: Query, image_token: int | None) -> None:
    """Raises ValueError where a text beside images spells out the token in whose place the model puts a piece of one: it would
    lack that piece, and its error name no query. What stands for a whole image is in no text any more."""
    if image_token is None or not query.images:
        return
    piece = processor.tokenizer.convert_ids_to_tokens(image_token)
    if piece and any(piece in text for message in query.messages for text in texts_of(message)):
        raise ValueError(f"a text spells out {piece!r}, which stands for a piece of an image")


def _render(processor, query: Query) -> tuple[str, bool]:
    """The chat as text, and whether the tokenizer adds special tokens to it."""
    continues = query.messages[-1]["role"] == "assistant"
    text = processor.apply_chat_template(
        query.messages, tokenize=False, add_generation_prompt=not continues, continue_final_message=continues
    )
    # A template that writes <bos> itself must not get a second one from the tokenizer.
    bos = processor.tokenizer.bos_token
    return text, bos is None or not text.startswith(bos)


def answer_opening(processor) -> str:
    """What the chat template puts after a question, for the answer to follow; empty where that is nothing."""
    chat = [{"role": "user", "content": [_text_part("?")]}]
    closed, opened = (
        processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=opens, continue_final_message=False)
        for opens in (False, True)
    )
    return opened[common_length(closed, opened) :]


def short_ids(processor, query: Query) -> list[int]:
    """The prompt's token ids with one placeholder token per image, from the text alone: no image is processed."""
    text, special = _render(processor, query)
    return processor.tokenizer(text, add_special_tokens=special)["input_ids"]


def common_length(a: Sequence, b: Sequence) -> int:
    """How many tokens of two lists, or letters of two texts, are the same at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
