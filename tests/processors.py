"""The real processors of families, over tokenizers of a hundred words: pictures cut and scaled as each family does it.

Line feeds in a row are one token, as in most real tokenizers: some processors write some around an image.

Those of them that read videos as well go without: their video processors need torchvision.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature

from families import END, FAMILIES, IMAGE, START, VIDEO, VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ {'user': 'w50', 'assistant': 'w51'}[m['role']] }}\n"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    " w52\n{% endfor %}{% if add_generation_prompt %} w51\n{% endif %}"
)
_SQUARE = {"height": 16, "width": 16}
_PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}}
_PINPOINTS = [[16, 32], [32, 16], [32, 32]]
_TILES = {"size": _SQUARE, "crop_to_patches": True, "min_patches": 1, "max_patches": 4}
_LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_QWEN = {"<|vision_start|>": START, "<|vision_end|>": END, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
_ROWS = {f"<row_{row}_col_{column}>": 70 + 2 * row + column for row in (1, 2) for column in (1, 2)}


@dataclass
class Real:
    """What a family's processor is made of.

    classes: of the image processor and of the processor, each as "module.Class" in transformers.models.
    images, options: what each of them is given beside.
    tokens: special tokens by text. named: those that the tokenizer has to know by name.
    image: what the chat template writes for an image.
    config: of the model, where it has to fit.
    """

    classes: tuple[str, str]
    images: dict
    tokens: dict[str, int]
    image: str = "<image>"
    options: dict = field(default_factory=dict)
    named: dict[str, str] = field(default_factory=dict)
    config: dict = field(default_factory=dict)


def _qwen(processor: str) -> Real:
    image = "<|vision_start|> <|image_pad|> <|vision_end|>"
    return Real(("qwen2_vl.Qwen2VLImageProcessorPil", processor), _PATCHES, _QWEN, image)


REAL = {
    "llava": Real(("llava.LlavaImageProcessorPil", "llava.LlavaProcessor"), {"size": _SQUARE, "crop_size": _SQUARE},
                  {"<image>": IMAGE}, options=_LLAVA),
    "vipllava": Real(("clip.CLIPImageProcessorPil", "llava.LlavaProcessor"), {"size": _SQUARE, "crop_size": _SQUARE},
                     {"<image>": IMAGE}, options=_LLAVA),
    "llava_next": Real(("llava_next.LlavaNextImageProcessorPil", "llava_next.LlavaNextProcessor"),
                       {"size": {"shortest_edge": 16}, "crop_size": _SQUARE, "image_grid_pinpoints": _PINPOINTS},
                       {"<image>": IMAGE}, options=_LLAVA, config={"image_grid_pinpoints": _PINPOINTS}),
    "llava_onevision": Real(("llava_onevision.LlavaOnevisionImageProcessorPil", "llava_onevision.LlavaOnevisionProcessor"),
                            {"size": _SQUARE, "image_grid_pinpoints": _PINPOINTS}, {"<image>": IMAGE, "<video>": VIDEO},
                            options={"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
                            config={"image_grid_pinpoints": _PINPOINTS}),
    "qwen2_vl": _qwen("qwen2_vl.Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("qwen2_5_vl.Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("qwen3_vl.Qwen3VLProcessor"),
    "qwen3_vl_moe": _qwen("qwen3_vl.Qwen3VLProcessor"),
    "qwen3_5": _qwen("qwen3_vl.Qwen3VLProcessor"),
    "glm4v": Real(("glm4v.Glm4vImageProcessorPil", "glm4v.Glm4vProcessor"), _PATCHES,
                  {"<|begin_of_image|>": START, "<|end_of_image|>": END, "<|image|>": IMAGE, "<|video|>": VIDEO,
                   "<|begin_of_video|>": 95, "<|end_of_video|>": 94}, "<|begin_of_image|> <|image|> <|end_of_image|>"),
    "internvl": Real(("got_ocr2.GotOcr2ImageProcessorPil", "internvl.InternVLProcessor"), _TILES,
                     {"<img>": START, "</img>": END, "<IMG_CONTEXT>": IMAGE, "<video>": VIDEO}, "<IMG_CONTEXT>",
                     {"image_seq_length": 4}, {"start_image_token": "<img>", "end_image_token": "</img>",
                                               "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}),
    "idefics2": Real(("idefics2.Idefics2ImageProcessorPil", "idefics2.Idefics2Processor"),
                     {"size": {"longest_edge": 16, "shortest_edge": 8}, "do_image_splitting": False},
                     {"<fake_token_around_image>": START, "<end_of_utterance>": END, "<image>": IMAGE},
                     options={"image_seq_len": 4}),
    "idefics3": Real(("idefics3.Idefics3ImageProcessorPil", "idefics3.Idefics3Processor"),
                     {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}},
                     {"<fake_token_around_image>": START, "<end_of_utterance>": END, "<image>": IMAGE,
                      "<global-img>": 80} | _ROWS, options={"image_seq_len": 4}),
    "ovis2": Real(("ovis2.Ovis2ImageProcessorPil", "ovis2.Ovis2Processor"), {"size": _SQUARE},
                  {"<image>": 98, "<IMG_ATOM>": IMAGE, "<IMG_START>": START, "<IMG_GRID>": 92, "<IMG_COL>": 93,
                   "<IMG_ROW>": 94, "<IMG_END>": END}, options={"image_seq_length": 4}),
    "gemma3": Real(("gemma3.Gemma3ImageProcessorPil", "gemma3.Gemma3Processor"), {"size": _SQUARE},
                   {"<start_of_image>": START, "<end_of_image>": END, "<image_soft_token>": IMAGE}, "<start_of_image>",
                   {"image_seq_length": 4}, {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
                                             "image_token": "<image_soft_token>"}),
    "aya_vision": Real(("got_ocr2.GotOcr2ImageProcessorPil", "aya_vision.AyaVisionProcessor"), _TILES,
                       {"<|START_OF_IMG|>": START, "<|END_OF_IMG|>": END, "<|IMG_PATCH|>": IMAGE, "<image>": 98,
                        "TILE_GLOBAL": 80} | {f"TILE_{i}": 80 + i for i in range(1, 5)},
                       options={"patch_size": 4, "img_size": 16, "downsample_factor": 2}),
    "paligemma": Real(("siglip.SiglipImageProcessorPil", "paligemma.PaliGemmaProcessor"),
                      {"size": _SQUARE, "image_seq_length": 16}, {"<image>": IMAGE}, named={"image_token": "<image>"}),
    "mllama": Real(("mllama.MllamaImageProcessorPil", "mllama.MllamaProcessor"), {"size": _SQUARE, "max_image_tiles": 2},
                   {"<|image|>": IMAGE, "<|python_tag|>": 98}, "<|image|>"),
}  # fmt: skip
REAL = {name: real for name, real in REAL.items() if name in FAMILIES}


def with_processor(name: str, videos: object = None, **text):
    """(a family's tiny random model, its real processor). Raises ImportError where this transformers has none without
    torchvision.

    videos: its video processor. text: what the text model's config has otherwise.
    """
    real = REAL[name]
    images, processor = (class_of(path) for path in real.classes)
    config = FAMILIES[name].config | real.config
    config["text_config"] = config["text_config"] | text
    parts = {"image_processor": images(**real.images), "tokenizer": _tokenizer(real), "chat_template": _template(real)}
    if "video_processor" in signature(processor.__init__).parameters:
        parts["video_processor"] = videos
        processor = processor if videos is not None else _without_videos(processor)
    return replace(FAMILIES[name], config=config).model(name), processor(**parts, **real.options)


def class_of(path: str) -> type:
    """Of "family.Class", of transformers' processors."""
    family, name = path.split(".")
    kinds = {"Pil": "image_processing_pil", "VideoProcessor": "video_processing"}
    kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "processing")
    return getattr(import_module(f"transformers.models.{family}.{kind}_{family}"), name)


def _template(real: Real) -> str:
    return _TEMPLATE.replace("IMAGE", real.image)


def _without_videos(processor: type) -> type:
    class WithoutVideos(processor):
        def check_argument_for_proper_class(self, name, argument):
            return None if name == "video_processor" else super().check_argument_for_proper_class(name, argument)

    return WithoutVideos


def _tokenizer(real: Real) -> PreTrainedTokenizerFast:
    words = {**{i: f"w{i}" for i in range(VOCABULARY)}, 0: "<pad>", 1: "<bos>", 2: "<unk>"}
    words |= {59 + count: "\n" * count for count in (1, 2, 3, 4)} | {token: text for text, token in real.tokens.items()}
    raw = Tokenizer(models.WordLevel({text: token for token, text in words.items()}, unk_token="<unk>"))
    lines, blanks = pre_tokenizers.Split(Regex("\n+"), "isolated"), pre_tokenizers.Split(" ", "removed")
    raw.pre_tokenizer = pre_tokenizers.Sequence([lines, blanks])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", unk_token="<unk>", extra_special_tokens=real.named
    )
    tokenizer.add_tokens([AddedToken(text, special=True, normalized=False) for text in real.tokens], special_tokens=True)
    return tokenizer
