"""Random models of a few thousand weights, and inputs for them spelled as strings."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

PAD, IMAGE, VOCABULARY = 0, 99, 100
TOKENS_PER_IMAGE = 16


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that every part matters: the default initialisation is nearly the identity."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.1
        noise = torch.randn(parameter.shape, generator=generator) * scale
        norm_weight = parameter.dim() == 1 and name.endswith("weight")
        parameter.data.copy_(parameter + noise if norm_weight else noise)
    for index, (_, scalar) in enumerate(item for item in model.named_buffers() if item[0].endswith("layer_scalar")):
        scalar.fill_(1.2 + 0.1 * index)  # Gemma 4's: 1 before training, and not after
    return model.eval()


def llava(layers: int = 3, dtype: torch.dtype = torch.float32, **options) -> LlavaForConditionalGeneration:
    text = LlamaConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=1, eos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=TOKENS_PER_IMAGE,
        vision_feature_layer=-1, tie_word_embeddings=False,
    )  # fmt: skip
    if options:
        config._attn_implementation = options["attn_implementation"]
    model = spread(LlavaForConditionalGeneration(config)).to(dtype)
    model.generation_config.pad_token_id = PAD
    return model


def inputs(rows: list[str], seed: int = 0, dtype: torch.dtype = torch.float32, side: str = "left") -> dict[str, Tensor]:
    """Rows such as "ttItt": t a random text token, I an image. Padded on `side`."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(kind: str) -> list[int]:
        return [IMAGE] * TOKENS_PER_IMAGE if kind == "I" else torch.randint(3, 90, (1,), generator=generator).tolist()

    encoded = [[token for kind in row for token in tokens(kind)] for row in rows]
    length = max(map(len, encoded))
    batch = {"input_ids": torch.full((len(rows), length), PAD)}
    batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
    for row, tokens in enumerate(encoded):
        place = slice(length - len(tokens), None) if side == "left" else slice(len(tokens))
        batch["input_ids"][row, place] = torch.tensor(tokens)
        batch["attention_mask"][row, place] = 1
    images = sum(row.count("I") for row in rows)
    if images:
        batch["pixel_values"] = torch.randn(images, 3, 16, 16, generator=generator).to(dtype)
    return batch


def valid_rows(batch: dict[str, Tensor]) -> Tensor:
    return batch["attention_mask"].bool()


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).abs().max() / expected.double().abs().max())


def image_sums(attentions: Tensor, ids: Tensor, num_regions: int) -> Tensor:
    """Eager attention probabilities [B, H, Lq, Lk] summed over each region: [B, H, Lq, R]."""
    one_hot = (ids[:, : attentions.shape[-1], None] == torch.arange(num_regions)).to(attentions.dtype)
    return torch.einsum("bhqk,bkr->bhqr", attentions, one_hot)
