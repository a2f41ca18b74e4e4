"""The real processors of families, over tokenizers of a hundred words: pictures cut and scaled as each family does it.

Line feeds in a row are one token, as in most real tokenizers: some processors write some around an image.

Those of them that read videos as well go without, unless they are given a video processor, all of which need torchvision.
So do the image processors whose names do not end in Pil; `with_processor(..., torchvision=True)` takes it for all.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from importlib import import_module
from inspect import signature

from families import END, FAMILIES, IMAGE, START, VIDEO, VOCABULARY
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast
from word_processor import in_part

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


_GEMMA_4 = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>", "boa_token": "<boa>", "eoa_token": "<eoa>",
            "audio_token": "<audio>"}
_WRAPPED = {"image_token": "<image>", "image_start_token": "<start>", "image_end_token": "<end>"}
_FRAMED = {"video_token": "<video>", "video_start_token": "<video_start>", "video_end_token": "<video_end>"}


def _gemma_4(images: str, processor: str) -> Real:
    sizes = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    tokens = {"<image>": IMAGE, "<|video|>": VIDEO, "<boi>": START, "<eoi>": END, "<audio>": 95, "<boa>": 94, "<eoa>": 93}
    return Real((images, processor), sizes, tokens, named=_GEMMA_4)


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
    "mistral3": Real(("pixtral.PixtralImageProcessorPil", "pixtral.PixtralProcessor"),
                     {"size": {"longest_edge": 16}, "patch_size": {"height": 4, "width": 4}},
                     {"[IMG]": IMAGE, "[IMG_BREAK]": 95, "[IMG_END]": END}, "[IMG]",
                     {"patch_size": 4, "spatial_merge_size": 2}),
    "gemma4": _gemma_4("gemma4.Gemma4ImageProcessorPil", "gemma4.Gemma4Processor"),
    "gemma4_unified": _gemma_4("gemma4_unified.Gemma4UnifiedImageProcessor", "gemma4_unified.Gemma4UnifiedProcessor"),
    "exaone4_5": _qwen("exaone4_5.Exaone4_5_Processor"),
    "hunyuan_vl": Real(("hunyuan_vl.HunYuanVLImageProcessorPil", "hunyuan_vl.HunYuanVLProcessor"),
                       {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 1024}},
                       {"<image>": IMAGE, "<start>": START, "<end>": END}, "<start><image><end>", named=_WRAPPED),
    "ernie4_5_vl_moe": Real(("ernie4_5_vl_moe.Ernie4_5_VLMoeImageProcessorPil", "ernie4_5_vl_moe.Ernie4_5_VLMoeProcessor"),
                            {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 256, "longest_edge": 4096}},
                            {"<image>": IMAGE, "<start>": START, "<end>": END, "<video>": VIDEO, "<video_start>": 95,
                             "<video_end>": 94}, "<start> <image> <end>", named=_WRAPPED | _FRAMED),
    "kimi_k25": Real(("kimi_k25.Kimi_K25ImageProcessor", "kimi_k25.Kimi_K25Processor"),
                     {"patch_size": 4, "merge_size": 2, "size": {"max_height": 8, "max_width": 8}, "max_patches": 64},
                     {"<|media_begin|>": START, "<|media_end|>": END, "<|media_pad|>": IMAGE, "<|media_content|>": 95,
                      "<|kimi_k25_video_placeholder|>": VIDEO}, "<|media_begin|> <|media_pad|> <|media_end|>"),
    "lfm2_vl": Real(("lfm2_vl.Lfm2VlImageProcessor", "lfm2_vl.Lfm2VlProcessor"),
                    {"encoder_patch_size": 4, "tile_size": 16, "min_image_tokens": 1, "max_image_tokens": 6, "max_tiles": 4},
                    {"<image>": IMAGE, "<|image_start|>": START, "<|image_end|>": END, "<|img_thumbnail|>": 95}
                    | {f"<|img_row_{row}_col_{col}|>": 66 + 4 * row + col for row in range(1, 5) for col in range(1, 5)}),
    "molmo2": Real(("molmo2.Molmo2ImageProcessor", "molmo2.Molmo2Processor"),
                   {"size": _SQUARE, "patch_size": 4, "max_crops": 4, "overlap_margins": [1, 1], "pooling_size": [2, 2]},
                   {"<im_start>": START, "<im_end>": END, "<im_patch>": IMAGE, "<|video|>": VIDEO, "<low_res_im_start>": 94,
                    "<frame_start>": 93, "<frame_end>": 92, "<im_col>": 91, "<|image|>": 90}, "<|image|>"),
    "step3p7": Real(("step3p7.Step3p7ImageProcessor", "step3p7.Step3p7Processor"),
                    {"size": {"height": 32, "width": 32}, "patch_size": 32, "vision_patch_size": 4, "max_image_size": 128},
                    {"<im_start>": START, "<im_end>": END, "<im_patch>": IMAGE, "<patch_start>": 95, "<patch_end>": 94,
                     "<patch_newline>": 93}, "<im_patch>"),
}  # fmt: skip
REAL = {name: real for name, real in REAL.items() if name in FAMILIES}


def with_processor(name: str, videos: object = None, torchvision: bool = False, **text):
    """(a family's tiny random model, its real processor). Raises ImportError where this transformers has none without
    torchvision.

    videos: its video processor. torchvision: take the image processor that uses it. text: what the text model's config has
    otherwise.
    """
    real = REAL[name]
    images, processor = (class_of(path) for path in real.classes)
    if torchvision:
        images = class_of(real.classes[0].removesuffix("Pil"))
    family = replace(FAMILIES[name], config=FAMILIES[name].config | real.config).with_text(**text)
    parts = {"image_processor": images(**real.images), "tokenizer": _tokenizer(real), "chat_template": _template(real)}
    others = {"video_processor": videos, "feature_extractor": None}
    parts |= {part: others[part] for part in others.keys() & signature(processor.__init__).parameters}
    return family.model(name), in_part(processor)(**parts, **real.options)


def class_of(path: str) -> type:
    """Of "family.Class", of transformers' processors."""
    family, name = path.split(".")
    kinds = {"Pil": "image_processing_pil", "ImageProcessor": "image_processing", "VideoProcessor": "video_processing"}
    kind = next((kind for end, kind in kinds.items() if name.endswith(end)), "processing")
    return getattr(import_module(f"transformers.models.{family}.{kind}_{family}"), name)


def _template(real: Real) -> str:
    return _TEMPLATE.replace("IMAGE", real.image)


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
