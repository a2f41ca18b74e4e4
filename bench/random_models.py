"""Vision-language models of random weights, in shapes of real ones, for benchmarks: what they say means nothing."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from word_processor import (
    QWEN_SPECIAL,
    SMOLVLM_SPECIAL,
    SPECIAL,
    qwen_word_processor,
    smolvlm_word_processor,
    word_processor,
)

# text: hidden, layers, heads, key-value heads, mlp; vision: hidden, layers, heads, mlp, and in Qwen3-VL which of its layers
# the text model's first ones are given as well.
# LLaVAs. All see 336-pixel images as 576 patches of 14 pixels, like CLIP-L/14-336; "tiny" is for trying a script.
LLAVA = {
    "tiny": ((64, 2, 4, 4, 128), (32, 2, 2, 64)),
    "0.3b": ((1024, 16, 16, 16, 2816), (512, 12, 8, 2048)),
    "hybrid": ((1024, 16, 16, 4, 2816), (512, 12, 8, 2048)),  # text model as Qwen3.5: three of four layers recurrent
    "7b": ((4096, 32, 32, 32, 11008), (1024, 24, 16, 4096)),
}
# Qwen3-VLs, dense. 576 image tokens are 768 × 768 pixels.
QWEN3_VL = {
    "qwen3-vl-tiny": ((64, 4, 4, 2, 128), (32, 4, 2, 64, [0, 1, 2])),
    "qwen3-vl-2b": ((2048, 28, 16, 8, 6144), (1024, 24, 16, 4096, [5, 11, 17])),
    "qwen3-vl-8b": ((4096, 36, 32, 8, 12288), (1152, 27, 16, 4304, [8, 16, 24])),
}
# SmolVLMs, which are Idefics 3s: four tiles of an image and the whole of it, each 64 tokens of 512 × 512 pixels.
SMOLVLM = {
    "smolvlm-tiny": ((64, 2, 4, 2, 128), (32, 2, 2, 64)),
    "smolvlm-500m": ((960, 32, 15, 5, 2560), (768, 12, 12, 3072)),
}
SHAPES = LLAVA | QWEN3_VL | SMOLVLM
# What transformers' configs call these numbers.
TEXT = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
VISION = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
QWEN_VISION = ("hidden_size", "depth", "num_heads", "intermediate_size", "deepstack_visual_indexes")
IMAGE_SIZE = 768, 768  # pixels
VOCABULARY = {"llava": 32000, "qwen": 151936, "smolvlm": 49280}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'] | upper }} : "
    "{% for part in m['content'] %}{{ 'IMAGE' if part['type'] == 'image' else ' ' + part['text'] }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %} ASSISTANT :{% endif %}"
)


def build(shape: str, device: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """(model, processor). Each word is one token. The logit of the end is 0, which is never the largest of so many random ones:
    all answers are as long as they may be."""
    family = next(made for shapes, made in ((LLAVA, _llava), (QWEN3_VL, _qwen3_vl), (SMOLVLM, _smolvlm)) if shape in shapes)
    kind, config, processor = family(shape)
    torch.manual_seed(0)
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        model = kind(config).eval()
        torch.set_default_dtype(before)
    eos = processor.tokenizer.eos_token_id
    with torch.no_grad():
        model.lm_head.weight[eos] = 0
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = eos, 0
    return model, processor


def _llava(shape: str):
    template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    processor = word_processor(_words(SPECIAL, "llava"), template, image_size=336, patch_size=14)
    text, vision = _named(TEXT, LLAVA[shape][0]), _named(VISION, LLAVA[shape][1])
    text_config = partial(Qwen3_5TextConfig, linear_num_value_heads=16) if shape == "hybrid" else LlamaConfig
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision, image_size=336, patch_size=14),
        text_config=text_config(
            **text,
            head_dim=text["hidden_size"] // text["num_attention_heads"],
            vocab_size=VOCABULARY["llava"],
            max_position_embeddings=4096,
        ),
        image_token_id=processor.image_token_id,
        image_seq_length=576,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration, config, processor


def _qwen3_vl(shape: str):
    template = CHAT_TEMPLATE.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = qwen_word_processor(_words(QWEN_SPECIAL, "qwen"), template, patch_size=16)
    text, vision = _named(TEXT, QWEN3_VL[shape][0]), _named(QWEN_VISION, QWEN3_VL[shape][1])
    ids = {token.strip("<|>"): i for i, token in enumerate(QWEN_SPECIAL)}
    config = Qwen3VLConfig(
        vision_config=vision | {"patch_size": 16, "out_hidden_size": text["hidden_size"]},
        text_config=text | {
            "head_dim": 128,
            "vocab_size": VOCABULARY["qwen"],
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
            },
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        tie_word_embeddings=False,
    )  # fmt: skip
    return Qwen3VLForConditionalGeneration, config, processor


def _smolvlm(shape: str):
    template = CHAT_TEMPLATE.replace("IMAGE", "<image>")
    processor = smolvlm_word_processor(_words(SMOLVLM_SPECIAL, "smolvlm"), template, tile_size=512, tile_tokens=64)
    text, vision = _named(TEXT, SMOLVLM[shape][0]), _named(VISION, SMOLVLM[shape][1])
    config = Idefics3Config(
        vision_config=vision | {"image_size": 512, "patch_size": 16},
        text_config=text | {
            "model_type": "llama",
            "vocab_size": VOCABULARY["smolvlm"],
            "max_position_embeddings": 8192,
            "pad_token_id": 0,
        },
        image_token_id=processor.image_token_id,
        scale_factor=4,
        tie_word_embeddings=False,
    )
    return Idefics3ForConditionalGeneration, config, processor


def _named(names: tuple[str, ...], numbers: tuple) -> dict[str, object]:
    return dict(zip(names, numbers, strict=True))


def _words(special: tuple[str, ...], family: str) -> list[str]:
    return [*special, *(f"w{i}" for i in range(VOCABULARY[family] - len(special)))]
