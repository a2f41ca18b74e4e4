import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny_random import random_image, tiny_processor

from ras_fast.batching import batches, is_per_token, left_padded
from ras_fast.engine.image_tokens import ImageTokens
from ras_fast.images import load_image
from ras_fast.inputs import _render, encode, make_queries, question_pairs


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def decoded(processor, query):
    inputs, _ = encode(processor, query, "cpu", torch.float32)
    return processor.tokenizer.decode(inputs["input_ids"][0]).replace("<image>" + " <image>" * 15, "IMG")


def test_images_go_first_unless_placed(processor):
    a, b = random_image(0), random_image(1)
    queries = make_queries(["w1 w2", "w1 <image> w2", "w3"], [[a, b], a, None], processor)
    assert decoded(processor, queries[0]) == "<bos> USER : IMG IMG w1 w2 ASSISTANT :"
    assert decoded(processor, queries[1]) == "<bos> USER : w1 IMG w2 ASSISTANT :"
    assert decoded(processor, queries[2]) == "<bos> USER : w3 ASSISTANT :"


def test_chats_and_assistant_prefixes(processor):
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "image"}]},
        {"role": "assistant", "content": "w4"},
    ]
    (query,) = make_queries([chat], [random_image(0)], processor)
    assert decoded(processor, query) == "<bos> USER : w1 ASSISTANT : w2 USER : w3 IMG ASSISTANT : w4"
    asked = query.prefix_last_question("w8 w9")
    assert decoded(processor, asked) == "<bos> USER : w1 ASSISTANT : w2 USER : IMG w8 w9 w3 ASSISTANT :"
    assert decoded(processor, query.ask_about_images("w7")) == "<bos> USER : IMG w7 ASSISTANT :"


@pytest.mark.parametrize("between", ["", " ", "\\n"])
def test_the_risk_is_read_from_the_very_words_that_are_answered(between):
    """A template may write the texts of a question one right after the other: "gu" and "n" are a gun."""
    template = (
        "{% for part in messages[-1].content if part.type == 'image' %}<image>{% endfor %}USER : "
        f"{{{{ messages[-1].content | selectattr('type', 'eq', 'text') | map(attribute='text') | join('{between}') }}}}"
    )
    processor = tiny_processor(template)
    texts = ["w1", "2 w", "3", "w4"]
    parts = [{"type": "image"}, *({"type": "text", "text": text} for text in texts)]
    (query,) = make_queries([[{"role": "user", "content": parts}]], [random_image(0)], processor)
    answered, _ = _render(processor, query)
    judged, _ = _render(processor, query.prefix_last_question("w8 w9"))
    assert answered.endswith(between.replace("\\n", "\n").join(texts))
    assert judged == answered.replace("USER : ", "USER : w8 w9 ")


def test_an_image_in_the_assistants_prefix_is_refused(processor):
    """The risk's prompt lacks that message. An earlier answer may have one."""
    asked = {"role": "user", "content": "w1"}
    for content in (f"w4 {processor.image_token}", [{"type": "image"}, {"type": "text", "text": "w4"}]):
        begun = [asked, {"role": "assistant", "content": content}]
        with pytest.raises(ValueError, match=r'prompts\[0\] needs to end in .* one "assistant" message of words alone'):
            make_queries([begun], [random_image(0)], processor)
        assert make_queries([[*begun, asked]], [random_image(0)], processor)


@pytest.mark.parametrize("pair", [(0, "w1", "w1"), (0, "w1", "w1", 0), (None, "w1", "w1")], ids=str)
def test_a_pair_of_equals_is_refused(processor, pair):
    apart, pair = (random_image(1), "w1", "w2"), tuple(random_image(one) if isinstance(one, int) else one for one in pair)
    with pytest.raises(ValueError, match=r"pairs\[1\] asks the same unsafe and safe question"):
        question_pairs([apart, pair], processor)
    question_pairs([apart, (random_image(1), "w1", "w1", random_image(2))], processor)


@pytest.mark.parametrize("content", ["", " ", []], ids=repr)
def test_an_empty_assistants_prefix_is_refused(processor, content):
    with pytest.raises(ValueError, match=r'prompts\[0\] needs to end in .* one "assistant" message of words alone'):
        make_queries([[{"role": "user", "content": "w1"}, {"role": "assistant", "content": content}]], None, processor)


@pytest.mark.parametrize("ends", [["User"], ["tool"], ["system"], ["assistant", "system"], ["assistant", "assistant"]], ids=str)
def test_a_chat_that_goes_on_after_its_question_is_refused(processor, ends):
    """The model would answer those words, and the risk would be that of the question before."""
    chat = [{"role": role, "content": f"w{i}"} for i, role in enumerate(["user", *ends])]
    with pytest.raises(ValueError, match=r'prompts\[1\] needs to end in a "user" message with a question, or in that and one'):
        make_queries(["w1", chat], None, processor)


def data_url(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_image_urls_hold_their_images(processor):
    """As in a chat of OpenAI's API."""
    def chat(part):
        return [{"role": "user", "content": [part, {"type": "text", "text": "w1"}]}]

    image = random_image(0)
    url = data_url(image)
    expected = make_queries([chat({"type": "image"})], [image], processor)
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "url": url},
    ):
        assert make_queries([chat(part)], None, processor) == expected
    assert make_queries(["w1"], [url], processor) == make_queries(["w1"], [image], processor)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ({"url": "/etc/secret.png"}, r"prompts\[0\] has the image_url '/etc/secret.png'; it needs to be a data: URL"),
        ("https://example.com/a.png", "has the image_url 'https://example.com/a.png'; it needs"),
        (None, "has the image_url None"),
        ({"url": "data:,", "detail": "low"}, r"an image_url has 'detail': 'low'; it can have url and nothing else"),
    ],
)
def test_image_urls_that_name_something_else(processor, url, message):
    chat = [{"role": "user", "content": [{"type": "image_url", "image_url": url}, {"type": "text", "text": "w1"}]}]
    with pytest.raises(ValueError, match=message):
        make_queries([chat], None, processor)


@pytest.mark.parametrize("key", ["image", "path", "url"])
def test_images_may_be_in_the_parts_of_a_chat(processor, key, tmp_path):
    def chat(first, second):
        return [
            {"role": "user", "content": [{"type": "image"} | first, {"type": "text", "text": "w1"}]},
            {"role": "assistant", "content": "w2"},
            {"role": "user", "content": [{"type": "text", "text": "w3"}, {"type": "image"} | second]},
        ]

    images = [random_image(0), random_image(1)]
    for number, image in enumerate(images):
        image.save(tmp_path / f"{number}.png")
    held = images if key == "image" else [str(tmp_path / "0.png"), str(tmp_path / "1.png")]
    expected = make_queries([chat({}, {})], [images], processor)
    assert make_queries([chat({key: held[0]}, {key: held[1]})], None, processor) == expected
    for first, second, others in (({key: held[0]}, {key: held[1]}, [images]), ({key: held[0]}, {}, None)):
        with pytest.raises(ValueError, match=r"all of them need to be there, and images\[0\] to be None"):
            make_queries([chat(first, second)], others, processor)


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        ("w1", None, "prompts is a str"),
        (["w1"], [], "images is 0 entries"),
        (["w1"], random_image(0), "images is a Image"),
        (["w1 <image>"], None, r"1 image placeholder\(s\) but images\[0\] holds 0"),
        (["<image> <image> w1"], [random_image(0)], r"2 image placeholder\(s\) but images\[0\] holds 1"),
        ([""], None, "with a question"),
        ([[]], None, "with a question"),
        ([[{"role": "assistant", "content": "w1"}]], None, "with a question"),
        ([[{"role": "user", "content": None}]], None, r"prompts\[0\] has the content None"),
        ([[{"role": "user", "content": 5}]], None, "has the content 5"),
        ([[{"role": "user", "content": ["hi"]}]], None, r"has the content \['hi'\]; it needs to be a string or"),
        ([[{"role": "user", "content": {"type": "text", "text": "w1"}}]], None, "has the content {"),
        ([[{"role": "user", "content": [{"type": "text"}]}]], None, "has the text part {'type': 'text'}"),
        ([[{"role": "user", "content": [{"type": "text", "text": None}]}]], None, "needs a string as its 'text'"),
        ([[{"content": "w1"}]], None, "'role' and 'content'"),
        ([3], None, "string or a list of messages"),
        ([{"role": "user", "content": "w1"}], None, r"one chat is prompts=\[chat\]"),
        (["a\ud800b"], None, r"prompts\[0\] holds half a character"),
        ([[{"role": "user", "content": [{"type": "video"}]}]], None, "'video'; it needs .* hand in some frames, as images"),
        ([[{"role": "user", "content": [{"type": "audio"}]}]], None, "'audio'; it needs to be 'text' or 'image'$"),
    ],
)
def test_bad_prompts(processor, prompts, images, message):
    with pytest.raises(ValueError, match=message):
        make_queries(prompts, images, processor)


PICTURE = Image.new("RGB", (4, 4))


@pytest.mark.parametrize(
    ("more", "part", "shown"),
    [
        ({"tool_calls": [{}]}, {}, r"a message has 'tool_calls': \[{}\]; it can have role, content"),
        ({"name": "w3"}, {}, "a message has 'name': 'w3'"),
        ({}, {"image": PICTURE}, "a text part has 'image': <PIL"),
        ({}, {"image": np.zeros((4, 4))}, "a text part has 'image': array"),
        ({}, {"type": "image", "text": None, "base64": "AAAA"}, "an image part has 'base64': 'AAAA'"),
        ({}, {"type": "image", "text": None, "image": PICTURE, "path": "a"}, "an image part has 2 pictures; it can have one"),
    ],
    ids=range(6),
)
def test_what_would_be_left_out_is_refused(processor, more, part, shown):
    chat = [{"role": "user", "content": [{"type": "text", "text": "w2"} | part]} | more, {"role": "user", "content": "w1"}]
    with pytest.raises(ValueError, match=rf"^prompts\[1\]: {shown}"):
        make_queries(["w1", chat], [None, PICTURE], processor)


def test_what_says_nothing_is_no_error(processor):
    """A data set's rows have all keys."""
    parts = [{"type": "image", "text": None, "image": PICTURE}, {"type": "text", "text": "w1", "image": None}]
    chat = [{"role": "user", "content": parts, "tool_calls": [], "name": None}]
    assert make_queries([chat], None, processor) == make_queries(["w1"], [PICTURE], processor)


def test_every_mode_gives_the_rgb_a_viewer_shows():
    assert load_image(Image.new("L", (3, 2), 70)).getpixel((0, 0)) == (70, 70, 70)
    assert load_image(Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("CMYK", (3, 2), (0, 255, 255, 0))).getpixel((0, 0)) == (255, 0, 0)
    assert load_image(Image.new("RGBA", (3, 2), (255, 0, 0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (3, 2), (0, 0))).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(Image.new("LA", (3, 2), (70, 255)).convert("La")).getpixel((0, 0)) == (70, 70, 70)
    deep = Image.fromarray(np.full((2, 3), 0x80FF, dtype=np.uint16))
    assert deep.mode.startswith("I")
    assert load_image(deep).getpixel((0, 0)) == (128, 128, 128)
    assert load_image(Image.new("L", (3, 2), 70).convert("I")).getpixel((0, 0)) == (70, 70, 70)
    assert load_image(Image.fromarray(np.full((2, 3), 0x0046, dtype=np.uint16))).getpixel((0, 0)) == (0, 0, 0)


def test_exif_orientation_is_applied():
    image, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif)
    assert load_image(Image.open(file)).size == (2, 4)


@pytest.mark.parametrize("orientation", range(10))
def test_a_picture_with_damaged_exif_data_is_turned_all_the_same(orientation):
    """Here a text of an unknown type. Pillow's `exif_transpose` would write it anew, and raise a struct.error."""
    image, exif = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 9), Image.Exif()
    exif[0x010E], exif[0x0112] = "hello", orientation
    file = io.BytesIO()
    image.save(file, "PNG", exif=exif)
    wanted = ImageOps.exif_transpose(Image.open(file))
    damaged = bytearray(exif.tobytes())
    damaged[17] = 0  # what the text is
    file = io.BytesIO()
    image.save(file, "PNG", exif=bytes(damaged))
    loaded = load_image(Image.open(file))
    for got in (loaded, load_image(loaded)):
        assert (got.size, got.tobytes()) == (wanted.size, wanted.tobytes())


def test_first_frame_of_an_animation():
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    image = Image.open(file)
    image.seek(1)
    assert load_image(image).getpixel((0, 0)) == (255, 0, 0)
    assert image.tell() == 1
    assert image.convert("RGB").getpixel((0, 0)) == (0, 0, 255)


def test_arrays():
    pixels = np.zeros((2, 3, 3), dtype=np.uint8)
    pixels[..., 1] = 200
    assert load_image(pixels).getpixel((0, 0)) == (0, 200, 0)
    assert load_image(torch.from_numpy(pixels) / 255).getpixel((2, 1)) == (0, 200, 0)
    assert load_image((torch.from_numpy(pixels) / 255).bfloat16()).getpixel((2, 1)) == (0, 200, 0)
    assert load_image(np.array([[0.0, np.nan]])) is None
    assert load_image(np.ma.masked_invalid(np.array([[0.0, np.nan]]))) is None
    assert load_image(np.array([[0.0, np.inf]])) is None


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((0, 3, 3), dtype=np.uint8), "shape"),
        (np.zeros((3, 4, 4), dtype=np.uint8), r"shape .* \(HWC\)"),
        (np.zeros(4, dtype=np.uint8), r"shape \(4,\)"),
        (np.zeros((1, 2, 3, 4), dtype=np.uint8), r"shape \(1, 2, 3, 4\)"),
        (np.full((2, 2), 7.0), "in 7..7"),
        (np.full((2, 2), 1.001), "in 1.001..1.001"),
        (np.full((2, 2), -0.001), "in -0.001..-0.001"),
        (np.zeros((2, 2), dtype=np.int64), "int64"),
        (Image.new("RGB", (0, 5)), "zero size"),
        (Image.new("F", (2, 2)), "mode 'F'"),
        (Image.fromarray(np.full((2, 2), -4, dtype=np.int32)), "integer pixels"),
        (Image.fromarray(np.full((2, 2), 65536, dtype=np.int32)), "integer pixels in 65536..65536"),
        (b"raw", "is a bytes"),
        ("/no/such/picture.png", "cannot be read"),
        ("iVBORw0KGgo" * 9000, "^.{,400}$"),
        (torch.full((2, 2), 7.0, dtype=torch.bfloat16), "in 7..7"),
        (torch.zeros(2, 2, device="meta"), r"without values \(meta\); it needs to be a dense one"),
        (torch.eye(2).to_sparse(), r"of layout torch\.sparse_coo"),
        (torch.zeros(2, 2, dtype=torch.complex64).conj(), "is an array of complex64"),
        (torch.nested.nested_tensor([torch.zeros(2, 2)]), "is a tensor of tensors; it needs to be a dense one"),
        (torch.quantize_per_tensor(torch.eye(2), 0.1, 0, torch.quint8), "is a tensor of quantised values"),
        ("https://example.com/a.png", "is the URL 'https://example.com/a.png'; nothing is fetched"),
        ("data:image/png;base64,iVBORw0KGgo=", "^image cannot be read: cannot identify"),
        ("data:image/png;base64,iVBORw0KGg", "^image cannot be read: .*padding"),
        ("data:image/svg+xml,<svg>", "is the URL 'data:.*; a data: URL needs to be in base64"),
    ],
)
def test_bad_images(image, message):
    with pytest.raises(ValueError, match=message):
        load_image(image)


def test_truncated_and_unreadable_files(tmp_path):
    random_image(0, (200, 200)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no picture")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match=r"images\[0\] cannot be read"):
            make_queries(["w1"], [tmp_path / name], tiny_processor())


def test_more_transparent_colours_than_a_palette_has_places():
    image = Image.new("P", (4, 4))
    image.info["transparency"] = bytes(300)  # as Pillow reads it from such a PNG
    with pytest.raises(ValueError, match=r"images\[2\] cannot be read: palette index out of range"):
        load_image(image, "images[2]")


def test_a_transparent_colour_that_is_none():
    image = Image.new("L", (4, 4))
    image.info["transparency"] = "white"
    with pytest.raises(ValueError, match="image cannot be read"):
        load_image(image)


def test_a_view_whose_sign_is_still_to_be_turned():
    pixels = torch.complex(torch.zeros(2, 3), torch.full((2, 3), -1.0)).conj().imag
    assert pixels.is_neg()
    assert load_image(pixels).getpixel((0, 0)) == (255, 255, 255)


def test_a_reader_that_raises_a_runtime_error(monkeypatch):
    """As Pillow's does over damaged AVIF files."""
    image = random_image(0)

    def load():
        raise RuntimeError("Failed to decode frame 0")

    monkeypatch.setattr(image, "load", load)
    with pytest.raises(ValueError, match="image cannot be read: Failed to decode"):
        load_image(image)


def test_pixels_that_are_not_finite_poison_the_query_and_stay_out_of_the_model(processor, monkeypatch):
    (query,) = make_queries(["w1"], [np.full((4, 4), np.nan)], processor)
    inputs, poisoned = encode(processor, query, "cpu", torch.float32)
    assert poisoned
    assert torch.isfinite(inputs["pixel_values"]).all()

    (query,) = make_queries(["w1"], [random_image(0)], processor)
    assert not encode(processor, query, "cpu", torch.float32)[1]
    monkeypatch.setattr(processor.image_processor, "image_std", [0.0, 0.3, 0.3])
    inputs, poisoned = encode(processor, query, "cpu", torch.float32)
    assert poisoned
    assert torch.isfinite(inputs["pixel_values"]).all()


def test_a_mask_of_patches_that_is_as_long_as_the_prompt_is_the_images():
    """LFM2-VL's, for one image."""
    short, long = (
        {
            "input_ids": torch.arange(2, 2 + length)[None],
            "mm_token_type_ids": torch.ones(1, length, dtype=torch.long),
            "pixel_attention_mask": torch.ones(1, 6, dtype=torch.long),
        }
        for length in (4, 6)
    )
    assert [name for name in long if is_per_token(name, long)] == ["input_ids", "mm_token_type_ids"]
    ((numbers, together),) = batches([short, long], 2)
    joined = left_padded(together, pad=0)
    assert numbers == [0, 1]
    assert joined["pixel_attention_mask"].tolist() == [[1] * 6] * 2
    assert joined["mm_token_type_ids"].tolist() == [[0, 0, 1, 1, 1, 1], [1] * 6]


def test_strips_of_patches_are_joined_side_by_side():
    """MiniCPM-V's, of images of several sizes."""
    one, two = (
        {
            "input_ids": torch.arange(2, 2 + n)[None],
            "pixel_values": torch.full((1, 3, 4, 8 * n), n),
            "target_sizes": torch.tensor([[2, n]] * n),
        }
        for n in (1, 2)
    )
    ((numbers, together),) = batches([one, two], 2)
    joined = left_padded(together, pad=0)
    assert numbers == [0, 1]
    assert torch.equal(joined["pixel_values"], torch.cat([one["pixel_values"], two["pixel_values"]], 3))
    assert joined["target_sizes"].tolist() == [[2, 1], [2, 2], [2, 2]]


def test_what_a_processor_gives_has_to_be_tensors(processor, monkeypatch):
    own = type(processor).__call__
    monkeypatch.setattr(type(processor), "__call__", lambda *args, **kwargs: own(*args, **kwargs) | {"tiles": [[1, 2]]})
    (query,) = make_queries(["w1"], None, processor)
    with pytest.raises(ValueError, match="LlavaProcessor gives tiles as a list; it needs to be a tensor"):
        encode(processor, query, "cpu", torch.float32)


def test_an_image_becomes_the_same_tokens_in_another_prompt():
    """9: the placeholder, which becomes 7 8 8 7; the 1 before it merges with what the processor writes there to 2."""
    image = ImageTokens.between([5, 1, 9, 6], [5, 2, 7, 8, 8, 7, 6], placeholder=9)
    assert image == ImageTokens([1, 9], [2, 7, 8, 8, 7], (5, 6))
    assert image.put_into([4, 1, 9, 3, 3], 9) == ([4, 2, 7, 8, 8, 7, 3, 3], (4, 3))
    assert image.put_into([1, 9], 9) == ([2, 7, 8, 8, 7], (None, None))
    for other in ([9, 6], [5, 9], [1, 9, 1, 9], [4, 1]):  # something else before it; two images; none
        assert image.put_into(other, 9) is None
    for short in ([5, 6], [9, 5, 9]):
        assert ImageTokens.between(short, [5, 7, 6], placeholder=9) is None
