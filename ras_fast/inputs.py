"""What users hand in - images, prompts, chats - checked and turned into model inputs."""

from __future__ import annotations

import base64
import io
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image

# What Pillow's readers raise over damaged files; its AVIF reader a RuntimeError.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
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


def load_image(image, name: str = "image") -> Image.Image | None:
    """An RGB image as a viewer would show it, or None when an array holds NaN or infinite pixels.

    image: PIL image, path, data: URL in base64, or array [H, W], [H, W, 3] (uint8, or float in 0..1; numpy or torch).
    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid on white; CMYK, grey and
    palette images are converted; 16-bit grey keeps its upper 8 bits, 32-bit grey that fits into 8 bits those.
    Raises ValueError for unreadable, empty or unsupported images.
    """
    if isinstance(image, torch.Tensor):
        image = _as_array(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(image, name)
    if isinstance(image, str) and image.startswith("data:"):
        image = _held_by(image, name)
    elif isinstance(image, str) and "://" in image:
        raise ValueError(f"{name} is the URL {image[:60]!r}; nothing is fetched here: hand in what it leads to")
    if isinstance(image, (str, Path, io.BytesIO)):
        try:
            image = Image.open(image)
        except UNREADABLE as error:  # it holds the path, which may be a whole image in base64
            raise ValueError(f"{name} cannot be read: {error!s:.300}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is a {type(image).__name__}; it needs to be a PIL image, a path or an array")
    if 0 in image.size:
        raise ValueError(f"{name} has zero size: {image.size}")
    shown = image.tell()
    try:
        image.seek(0)
        image.load()
        # `ImageOps.exif_transpose` writes all of the EXIF data anew, and raises whatever it likes where some of it is damaged.
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    rgb = _to_rgb(image if turn is None else image.transpose(turn), name)
    rgb.info.clear()  # or it would be turned again where it is handed in again
    image.seek(shown)  # an animation is its owner's, who may be in the middle of it
    return rgb


def _as_array(tensor: torch.Tensor, name: str) -> np.ndarray:
    kinds = {
        "without values (meta)": tensor.is_meta,
        "of tensors": tensor.is_nested,
        "of quantised values": tensor.is_quantized,
        f"of layout {tensor.layout}": tensor.layout is not torch.strided,
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is not None:
        raise ValueError(f"{name} is a tensor {kind}; it needs to be a dense one that holds its pixels")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def _held_by(url: str, name: str) -> io.BytesIO:
    """The file in a data: URL (RFC 2397)."""
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"{name} is the URL {url[:60]!r}; a data: URL needs to be in base64, data:image/png;base64,...")
    try:
        return io.BytesIO(base64.b64decode(data))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{name} has mode 'F' (unbounded floats); hand it in as a float array in 0..1 or 8-bit image")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has integer pixels in {values.min()}..{values.max()}; it needs 0..65535")
        spare = 0 if image.mode == "I" and values.max() < 256 else 8  # an 8-bit image as 32-bit integers
        return Image.fromarray((values >> spare).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # which is all that Pillow makes of it
    try:
        image = image.convert("RGBA")
    except (TypeError, ValueError) as error:  # more transparent colours than a palette has places, or what is no colour
        raise ValueError(f"{name} cannot be read: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image | None:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise ValueError(f"{name} is an array of shape {array.shape}; it needs to be [H, W] or [H, W, 3] (HWC), not empty")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            return None
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has float pixels in {array.min():g}..{array.max():g}; they need to be in 0..1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is an array of {array.dtype}; it needs to be uint8 or float in 0..1")
    return Image.fromarray(array).convert("RGB")


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


Beside = tuple[int | None, int | None]  # the tokens before and after a span; None where there is none


class ImageTokens(NamedTuple):
    """What the one image of a prompt becomes in its token ids.

    short: the placeholder in the ids of `short_ids`, with what is next to it where that is tokenized otherwise beside an image.
    full: what stands for it in the prompt's full ids.
    beside: what is next to `short`, which these were not joined with.
    """

    short: list[int]
    full: list[int]
    beside: Beside

    @classmethod
    def between(cls, short: list[int], ids: list[int], placeholder: int) -> ImageTokens | None:
        """From a prompt's `short_ids` and its full ids; None where it has not exactly one image."""
        if short.count(placeholder) != 1:
            return None
        at = short.index(placeholder)
        before = common_length(short[:at], ids)
        after = common_length(short[:at:-1], ids[before:][::-1])
        end = len(short) - after
        return cls(short[before:end], ids[before : len(ids) - after], _beside(short, before, end))

    def put_into(self, short: list[int], placeholder: int) -> tuple[list[int], Beside] | None:
        """(the full ids of another prompt about the same image, from its `short_ids`, what is next to the image there), if it
        is not joined with that; None where other tokens are in place of `short`, or there is not exactly one placeholder."""
        if short.count(placeholder) != 1:
            return None
        begin = short.index(placeholder) - self.short.index(placeholder)
        end = begin + len(self.short)
        if begin < 0 or short[begin:end] != self.short:
            return None
        return short[:begin] + self.full + short[end:], _beside(short, begin, end)


def _beside(ids: list[int], begin: int, end: int) -> Beside:
    return (ids[begin - 1] if begin else None), (ids[end] if end < len(ids) else None)


def common_length(a: Sequence, b: Sequence) -> int:
    """How many tokens of two lists, or letters of two texts, are the same at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


Inputs = dict[str, torch.Tensor]
_PATCH_INDICES = {"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"}
SIGHT = "cross_attention_mask"  # [1, L, images, tiles]: which tiles each token sees, where images are not among the tokens
_OF_IMAGES = ("pixel_", "aspect_", "spatial_", "image_grid", "image_size", "video_grid")


def is_per_token(name: str, inputs: Inputs) -> bool:
    """Whether a tensor holds one entry for each token of the prompt, not what an image is made of: a mask of its patches may be
    just as long."""
    return name == SIGHT or (inputs[name].shape == inputs["input_ids"].shape and not name.startswith(_OF_IMAGES))


def fit(inputs: Inputs) -> tuple:
    """Inputs of which this is the same can be joined: they have the same tensors, of the same sizes but for the length of those
    that are `is_per_token` and the dimension along which the others are joined."""
    return tuple((name, _other_sizes(name, inputs)) for name in sorted(inputs))


def _images_dim(name: str, inputs: Inputs) -> int:
    """Along which dimension images follow each other: the first, or where `target_sizes` cuts them out of one strip of patches
    [1, channels, patch, length], as in MiniCPM-V 4.6, the last."""
    return -1 if name == "pixel_values" and "target_sizes" in inputs else 0


def _other_sizes(name: str, inputs: Inputs) -> tuple[int, ...]:
    sizes = list(inputs[name].shape)
    if is_per_token(name, inputs):
        return tuple(sizes[2:])
    del sizes[_images_dim(name, inputs)]
    return tuple(sizes)


def batches(inputs: Iterable[Inputs], size: int) -> Iterator[tuple[list[int], list[Inputs]]]:
    """Groups inputs from `encode` into batches that `left_padded` can join (`fit`): (their numbers, the inputs), up to ``size``
    each."""
    waiting: dict[tuple, list[tuple[int, Inputs]]] = defaultdict(list)
    for number, one in enumerate(inputs):
        kind = fit(one)
        waiting[kind].append((number, one))
        if len(waiting[kind]) == size:
            yield _unzip(waiting.pop(kind))
    for rest in waiting.values():
        yield _unzip(rest)


def _unzip(numbered: list[tuple[int, Inputs]]) -> tuple[list[int], list[Inputs]]:
    numbers, inputs = zip(*numbered, strict=True)
    return list(numbers), list(inputs)


def _counted_on(batch: Sequence[Inputs], name: str) -> list[torch.Tensor]:
    """The tensors of this name. Indices of patches (Molmo 2) count from the first one of each, now from that of the batch."""
    if name not in _PATCH_INDICES:
        return [one[name] for one in batch]
    found, before = [], 0
    for one in batch:
        found.append(torch.where(one[name] >= 0, one[name] + before, one[name]))
        before += one[_PATCH_INDICES[name]].shape[:2].numel()
    return found


def left_padded(batch: Sequence[Inputs], pad: int, answer: Sequence[int] = ()) -> Inputs:
    """Joins inputs from `encode` into one left-padded batch with an attention mask.

    batch: inputs that fit together (`batches`); some may have images and others none.
    pad: the token id that prompts are padded with. Other tensors that are `is_per_token` are padded with 0, and the rest
        (pixels, grids) are concatenated.
    answer: token ids to put after every prompt. They see the images that its last token sees.
    """
    lengths = [one["input_ids"].shape[1] for one in batch]
    longest, device = max(lengths), batch[0]["input_ids"].device
    padded: Inputs = {"attention_mask": torch.ones(len(batch), longest + len(answer), dtype=torch.long, device=device)}
    for row, length in enumerate(lengths):
        padded["attention_mask"][row, : longest - length] = 0
    for name in dict.fromkeys(name for one in batch for name in one):
        if any(name in one and not is_per_token(name, one) for one in batch):
            found = [one for one in batch if name in one]
            padded[name] = torch.cat(_counted_on(found, name), _images_dim(name, found[0]))
            continue
        others = next(one[name].shape[2:] for one in batch if name in one)
        shape, filler = (len(batch), longest + len(answer), *others), pad if name == "input_ids" else 0
        padded[name] = torch.full(shape, filler, dtype=torch.long, device=device)
        for row, (one, length) in enumerate(zip(batch, lengths, strict=True)):
            if name in one:
                padded[name][row, longest - length : longest] = one[name][0]
                if name == SIGHT:
                    padded[name][row, longest:] = one[name][0, -1]
    if answer:
        padded["input_ids"][:, longest:] = torch.tensor(answer, device=device)
    return padded
