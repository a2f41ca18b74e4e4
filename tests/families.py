"""One tiny random model of each family, built from the real class, with inputs spelled as in tiny_models."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import transformers
from packaging import version
from tiny_models import image_sums, spread
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import ras_fast

PAD, IMAGE, VIDEO, START, END, VOCABULARY = 0, 99, 98, 97, 96, 100
SIZE = 64  # hidden size of every text model

TEXT = {
    "hidden_size": SIZE, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": None,
    "max_position_embeddings": 512,
}  # fmt: skip
CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
}  # fmt: skip
SIGLIP = CLIP | {"model_type": "siglip_vision_model", "vision_use_head": False}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_VISION = {
    "depth": 2, "num_heads": 2, "in_channels": 3, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def square(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator)}


def grids(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Qwen: images of 4 × 4 and 4 × 6 patches, two of which merge in each direction."""
    thw = torch.tensor([[1, 4, 4 + 2 * (i % 2)] for i in range(images)])
    return {"pixel_values": torch.randn(int(thw.prod(1).sum()), 96, generator=generator), "image_grid_thw": thw}


def squares_of(grid: Callable) -> Callable:
    """The same images and grids, but of patches [3, 4, 4] without time."""

    def pixels(images: int, generator: torch.Generator) -> dict[str, Tensor]:
        batch = grid(images, generator)
        return batch | {"pixel_values": batch["pixel_values"][:, :48].reshape(-1, 3, 4, 4).contiguous()}

    return pixels


def flat_squares(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    batch = squares_of(grids)(images, generator)
    return batch | {"pixel_values": batch["pixel_values"].flatten(1)}


def strip(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """MiniCPM-V: the patches of all images side by side, of which 4 × 4 become one token."""
    sizes = torch.tensor([[8, 8 + 4 * (i % 2)] for i in range(images)])
    return {"pixel_values": torch.randn(1, 3, 4, 4 * int(sizes.prod(1).sum()), generator=generator), "target_sizes": sizes}


def packed(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Nemotron-H Omni: flat patches of all images one behind the other, and grids of two dimensions."""
    batch = flat_squares(images, generator)
    return {"pixel_values": batch["pixel_values"], "image_grid_hw": batch["image_grid_thw"][:, 1:]}


def merged_patches(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Gemma 4 without an encoder: 2 × 2 flat patches an image, each a token, and where each of them is."""
    where = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="xy"), -1).view(1, 4, 2)
    return {"pixel_values": torch.rand(images, 4, 192, generator=generator), "image_position_ids": where.repeat(images, 1, 1)}


def large(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}


def tiles(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """LLaVA-Next: a thumbnail and two tiles an image, of which padding is cut off."""
    pixels = torch.randn(images, 3, 3, 16, 16, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor([[16, 30 - 6 * (i % 2)] for i in range(images)])}


def two_tiles(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """InternVL: two tiles an image, in one run of tokens."""
    return {"pixel_values": torch.randn(2 * images, 3, 16, 16, generator=generator)}


def sized(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    sizes = [[16, 16 - 8 * (i % 2)] for i in range(images)]
    return {"pixel_values": torch.randn(images, 3, 16, 16, generator=generator), "image_sizes": torch.tensor(sizes)}


def two_crops(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """GOT-OCR2, whose encoder takes no smaller ones."""
    return {"pixel_values": torch.randn(2 * images, 3, 64, 64, generator=generator)}


def masked(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Phi-4-multimodal: a view of the whole image and one crop."""
    return {
        "image_pixel_values": torch.randn(images, 2, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[32, 32]] * images), "image_attention_mask": torch.ones(images, 2, 4, 4, dtype=torch.bool),
    }  # fmt: skip


def patches(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Gemma 4: 4 × 4 flat patches an image, and where each of them is."""
    where = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1).view(1, 16, 2)
    return {"pixel_values": torch.rand(images, 16, 48, generator=generator), "image_position_ids": where.repeat(images, 1, 1)}


def pooled(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Molmo 2: 4 × 4 flat patches an image, pooled by four, without crops."""
    squares = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": torch.randn(images, 16, 48, generator=generator),
        "image_token_pooling": torch.cat([squares + 16 * image for image in range(images)]),
        "image_grids": torch.tensor([[2, 2, 0, 0]] * images), "image_num_crops": torch.ones(images, dtype=torch.long),
    }  # fmt: skip


def flat_patches(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """LFM2-VL: images of 4 × 4 and 4 × 6 flat patches, two of which merge in each direction."""
    widths = torch.tensor([4 + 2 * (i % 2) for i in range(images)])
    return {
        "pixel_values": torch.randn(images, 24, 48, generator=generator),
        "spatial_shapes": torch.stack([torch.full_like(widths, 4), widths], 1),
        "pixel_attention_mask": (torch.arange(24) < 4 * widths[:, None]).long(),
    }


def tiled(images: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Mllama: an image has one tile or two, of which an odd number comes first with two."""
    aspect = torch.tensor([[1 + (image + images) % 2 for image in range(images)]])
    return {
        "pixel_values": torch.randn(1, images, 2, 3, 16, 16, generator=generator), "aspect_ratio_ids": aspect,
        "aspect_ratio_mask": (torch.arange(2) < aspect[..., None]).long(),
    }  # fmt: skip


@dataclass
class Family:
    """How to build a family.

    config: its config, sub-configs as dicts.
    pixels: images → what the processor would make of them.
    around: token ids before and after an image's placeholders.
    features_per_image: entries of `get_image_features` that make up one image.
    types: name of the token-type input that the family wants. image_type: that of an image's tokens in it; of others it is 0.
    """

    config: dict
    pixels: Callable[[int, torch.Generator], dict[str, Tensor]] | None = square
    around: tuple[list[int], list[int]] = ([], [])
    features_per_image: int = 1
    types: str | None = None
    image_type: int = 1
    tokens: int | None = None  # of an image, where `get_image_features` does not tell
    per_row: bool = False  # pixel_values [B, images, ...] instead of [images, ...]
    fused: tuple[int, int] = (3, 6)  # layers, norms
    reference: str = "sdpa"  # the unpatched model's attention

    @property
    def text(self) -> dict:
        """The text model's part of its config."""
        return self.config.get("text_config", self.config)

    def with_text(self, **values: object) -> Family:
        """The same with other values in that."""
        text = self.text | values
        return replace(self, config=self.config | {"text_config": text} if "text_config" in self.config else text)

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        config = AutoConfig.for_model(name.split("/")[0], **self.config)
        multimodal = type(config) in AutoModelForImageTextToText._model_mapping  # Phi-4-multimodal is not
        auto = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
        model = spread(auto.from_config(config, attn_implementation=self.reference)).to(dtype)
        model.generation_config.pad_token_id = PAD
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, model: nn.Module, rows: list[str], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """Rows such as "ttIt", left-padded; and "regions", the expected region ids."""
        generator = torch.Generator().manual_seed(seed)
        images = sum(row.count("I") for row in rows)
        batch = self.pixels(images, generator) if images else {}
        if images:
            lengths = iter([self.tokens] * images if self.tokens else self._lengths(model, batch))
        encoded, regions = [], []
        for row in rows:
            tokens, ids = [], []
            for position, kind in enumerate(row):
                if kind == "I":
                    count = next(lengths)
                    before, after = self.around
                    tokens += [*before, *[IMAGE] * count, *after]
                    ids += [-1] * len(before) + [row[:position].count("I")] * count + [-1] * len(after)
                else:
                    tokens += torch.randint(3, 90, (1,), generator=generator).tolist()
                    ids.append(-1)
            encoded.append(tokens)
            regions.append(ids)
        length = max(map(len, encoded))
        batch["input_ids"] = torch.tensor([[PAD] * (length - len(e)) + e for e in encoded])
        batch["attention_mask"] = torch.tensor([[0] * (length - len(e)) + [1] * len(e) for e in encoded])
        if self.types:
            batch[self.types] = (batch["input_ids"] == IMAGE).long() * self.image_type
        if self.per_row and images:
            batch["pixel_values"] = self._rows(batch["pixel_values"], [row.count("I") for row in rows])
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
        return batch | {"regions": torch.tensor([[-1] * (length - len(r)) + r for r in regions])}

    def sums(self, layer: int, probabilities: Tensor, regions: Tensor) -> Tensor:
        """What a layer's eager attention [B, H, Lq, Lk] pays to each of two images, `regions` being those of all tokens so far.

        A sliding cache has dropped the first of them, a static one has room for more.
        """
        keys = probabilities.shape[-1]
        ids = regions[:, max(regions.shape[1] - keys, 0) :]
        return image_sums(probabilities, nn.functional.pad(ids, (0, keys - ids.shape[1]), value=-1), 2)

    def _lengths(self, model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
        pixels = {name: value.to(model.device) for name, value in batch.items()}
        pixels = {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in pixels.items()}
        if self.per_row:
            pixels["pixel_values"] = pixels["pixel_values"][:, None]
        with torch.no_grad():
            inner = getattr(model, "model", model)
            find = (inner if hasattr(inner, "get_image_features") else model).get_image_features
            strategy = inspect.signature(find).parameters.get("vision_feature_select_strategy")
            if strategy is not None and strategy.default is inspect.Parameter.empty:
                pixels["vision_feature_select_strategy"] = "default"
            output = find(**pixels, return_dict=True)
        features = getattr(output, "pooler_output", None)
        features = output.last_hidden_state if features is None else features
        lengths = [feature.shape[:-1].numel() for feature in features]
        step = self.features_per_image
        return [sum(lengths[i : i + step]) for i in range(0, len(lengths), step)]

    @staticmethod
    def _rows(pixels: Tensor, counts: list[int]) -> Tensor:
        rows = pixels.new_zeros(len(counts), max(counts), *pixels.shape[1:])
        for row, part in enumerate(pixels.split(counts)):
            rows[row, : counts[row]] = part
        return rows


class CrossAttention(Family):
    """Mllama: an image is one token of text, and two tiles of 17 patches among the keys of cross-attention layers."""

    TILES, PATCHES = 2, 17

    def inputs(self, model: nn.Module, rows: list[str], seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """As for the other families; a second image has one tile only, and a token sees the last image before it."""
        generator = torch.Generator().manual_seed(seed)
        length, images = max(map(len, rows)), max(row.count("I") for row in rows)
        ids = torch.randint(3, 90, (len(rows), length), generator=generator)
        valid = torch.zeros_like(ids)
        aspect = torch.zeros(len(rows), images, dtype=torch.long)
        for row, kinds in enumerate(rows):
            start = length - len(kinds)
            ids[row, :start], valid[row, start:] = PAD, 1
            for image, place in enumerate(i for i, kind in enumerate(kinds) if kind == "I"):
                ids[row, start + place], aspect[row, image] = IMAGE, 2 - image
        batch = {"input_ids": ids, "attention_mask": valid}
        if images:
            pixels = torch.randn(len(rows), images, self.TILES, 3, 16, 16, generator=generator).to(dtype)
            tiles = (torch.arange(self.TILES) < aspect.clamp(min=1)[..., None]).long()
            batch |= {"pixel_values": pixels, "aspect_ratio_ids": aspect, "aspect_ratio_mask": tiles}
            batch["cross_attention_mask"] = self.sight(ids, aspect)
        regions = torch.where(aspect > 0, torch.arange(images), -1).repeat_interleave(self.TILES * self.PATCHES, 1)
        return batch | {"regions": regions}

    def sight(self, ids: Tensor, aspect: Tensor) -> Tensor:
        """The mask [B, L, images, tiles] of images with one or two tiles each, as ``aspect`` [B, images] says."""
        seen = torch.zeros(*ids.shape, aspect.shape[1], self.TILES, dtype=torch.long)
        for row, own in enumerate(ids):
            places = [*(own == IMAGE).nonzero().flatten().tolist(), len(own)]
            for image, (first, last) in enumerate(itertools.pairwise(places)):
                seen[row, first:last, image, : aspect[row, image]] = 1
        return seen

    def sums(self, layer: int, probabilities: Tensor, regions: Tensor) -> Tensor:
        if layer not in self.config["text_config"]["cross_attention_layers"]:
            return probabilities.new_zeros(*probabilities.shape[:3], 2)
        return image_sums(probabilities, regions, 2)


HYBRID_WINDOWS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
# Before, these hand their cache to layers that do not attend by another name.
HYBRID_FUSED = (4, 8) if version.parse(transformers.__version__) >= version.parse("5.18") else (2, 4)
QWEN = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
# Multi-head latent attention, and experts.
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
          "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2,
          "moe_intermediate_size": 32, "first_k_dense_replace": 1}  # fmt: skip
# An indexer chooses which of the keys that a query may see it does see, here 8. It has as many heads as it takes for scores
# that do not tie at 0.
CHOOSING = {name: value for name, value in (TEXT | LATENT).items() if name not in ("head_dim", "first_k_dense_replace")} | {
    "index_topk": 8, "index_head_dim": 16, "index_n_heads": 16}  # fmt: skip
LLAMA4 = {"intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 8, "no_rope_layers": [1, 0, 1],
          "interleave_moe_layer_step": 2}  # fmt: skip
GEMMA = {"image_token_id": IMAGE, "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}

FAMILIES = {
    "llava": Family({"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP, "image_token_id": IMAGE,
                     "vision_feature_layer": -1}),
    "vipllava": Family({"text_config": TEXT | {"model_type": "llama"}, "vision_config": CLIP, "image_token_id": IMAGE,
                        "image_token_index": IMAGE, "vision_feature_layers": [-1, -2]}),
    "llava_next": Family({"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "vision_config": CLIP,
                          "image_token_id": IMAGE, "image_token_index": IMAGE, "vision_feature_layer": -1,
                          "image_grid_pinpoints": [[16, 32], [32, 16]]}, tiles),
    "llava_next/granite": Family({"text_config": {name: value for name, value in TEXT.items() if name != "head_dim"} | {
        "model_type": "granite", "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2,
        "logits_scaling": 2.0}, "vision_config": CLIP, "image_token_id": IMAGE, "image_token_index": IMAGE,
        "vision_feature_layer": -1, "image_grid_pinpoints": [[16, 32], [32, 16]]}, tiles),
    "llava_onevision": Family({"text_config": TEXT | {"model_type": "qwen2"}, "vision_config": SIGLIP,
                               "image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_index": VIDEO,
                               "image_grid_pinpoints": [[16, 32], [32, 16]]}, tiles),
    "qwen2_vl": Family(QWEN | {"text_config": TEXT | {"rope_parameters": MROPE, "head_dim": 16},
                               "vision_config": QWEN_VISION | {"embed_dim": 16, "hidden_size": SIZE}},
                       grids, ([START], [END]), types="mm_token_type_ids"),
    "qwen2_5_vl": Family(QWEN | {"text_config": TEXT | {"rope_parameters": MROPE},
                                 "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32,
                                                                 "out_hidden_size": SIZE, "window_size": 16,
                                                                 "fullatt_block_indexes": [1]}},
                         grids, ([START], [END]), types="mm_token_type_ids"),
    "qwen2_5_omni_thinker": Family(QWEN | {
        "text_config": TEXT | {"rope_parameters": MROPE}, "audio_token_id": 95,
        "image_token_index": IMAGE, "video_token_index": VIDEO, "audio_token_index": 95,
        "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": SIZE, "window_size": 16,
                                        "fullatt_block_indexes": [1]},
        "audio_config": {"num_mel_bins": 20, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                         "d_model": 16, "output_dim": SIZE, "max_source_positions": 100}}, grids, ([START], [END])),
    "qwen3_vl": Family(QWEN | {"text_config": TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True}},
                               "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32,
                                                               "out_hidden_size": SIZE, "num_position_embeddings": 64,
                                                               "deepstack_visual_indexes": [0, 1]}},
                       grids, ([START], [END]), types="mm_token_type_ids"),
    "qwen3_vl_moe": Family(QWEN | {"text_config": TEXT | {"rope_parameters": MROPE | {"mrope_interleaved": True},
                                                          "num_experts": 4, "num_experts_per_tok": 2,
                                                          "moe_intermediate_size": 32, "decoder_sparse_step": 1},
                                   "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32,
                                                                   "out_hidden_size": SIZE, "num_position_embeddings": 64,
                                                                   "deepstack_visual_indexes": [0, 1]}},
                           grids, ([START], [END]), types="mm_token_type_ids"),
    "qwen3_5": Family(QWEN | {
        "text_config": TEXT | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2,
                               "linear_conv_kernel_dim": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
                               "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                               "rope_parameters": MROPE | {"mrope_section": [2, 1, 1], "mrope_interleaved": True,
                                                           "partial_rotary_factor": 0.5}},
        "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": SIZE,
                                        "num_position_embeddings": 64}},
                      grids, ([START], [END]), types="mm_token_type_ids", fused=HYBRID_FUSED),
    "lfm2_vl": Family({
        "text_config": {k: v for k, v in TEXT.items() if k != "head_dim"} | {
            "model_type": "lfm2", "num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2,
            "full_attn_idxs": None, "block_multiple_of": 16},
        "vision_config": {"model_type": "siglip2_vision_model", "hidden_size": 16, "intermediate_size": 32,
                          "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4, "num_patches": 16,
                          "vision_use_head": False},
        "image_token_id": IMAGE, "projector_hidden_size": 32}, flat_patches, ([START], [END]), fused=HYBRID_FUSED),
    "glm4v": Family({"text_config": TEXT | {"rope_parameters": MROPE | {"partial_rotary_factor": 1.0}},
                     "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": SIZE,
                                                     "image_size": 32},
                     "image_token_id": IMAGE, "image_start_token_id": START, "image_end_token_id": END,
                     "video_token_id": VIDEO, "video_start_token_id": 95, "video_end_token_id": 94},
                    grids, ([START], [END]), types="mm_token_type_ids"),
    "exaone4_5": Family({"text_config": TEXT | {"model_type": "exaone4", "sliding_window": 8,
                                                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
                         "image_token_id": IMAGE, "video_token_id": VIDEO,
                         "vision_config": QWEN_VISION | {"hidden_size": 16, "intermediate_size": 32, "out_hidden_size": SIZE,
                                                         "num_key_value_heads": 1, "window_size": 16,
                                                         "fullatt_block_indexes": [1]}},
                        grids, ([START], [END])),
    "molmo2": Family({"text_config": TEXT | {"additional_vocab_size": 8}, "image_patch_id": IMAGE, "image_token_id": IMAGE,
                      "image_start_token_id": START, "image_end_token_id": END, "low_res_image_start_token_id": 94,
                      "frame_start_token_id": 93, "frame_end_token_id": 92,
                      "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                                        "image_size": [16, 16], "patch_size": 4, "num_position_embeddings": 16},
                      "adapter_config": {"vision_feature_layer": [1, 0], "hidden_size": 16, "num_attention_heads": 2,
                                         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 32,
                                         "text_hidden_size": SIZE}},
                     pooled, ([START], [END]), types="mm_token_type_ids"),
    "internvl": Family({"text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE,
                        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                          "num_attention_heads": 2, "image_size": [16, 16], "patch_size": [4, 4]}},
                       two_tiles, ([START], [END]), features_per_image=2),
    "idefics2": Family({"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "image_token_id": IMAGE,
                        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                          "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
                        "perceiver_config": {"hidden_size": SIZE, "resampler_n_latents": 4, "resampler_depth": 1,
                                             "resampler_n_heads": 2, "num_key_value_heads": 1, "resampler_head_dim": 8}},
                       around=([START], [START]), per_row=True, tokens=4),
    "idefics3": Family({"text_config": TEXT | {"model_type": "llama"}, "image_token_id": IMAGE, "scale_factor": 2,
                        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                          "num_attention_heads": 2, "image_size": 16, "patch_size": 4}},
                       around=([START], [START]), per_row=True),
    "smolvlm": Family({"text_config": TEXT | {"model_type": "llama"}, "image_token_id": IMAGE, "scale_factor": 2,
                       "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                         "num_attention_heads": 2, "image_size": 16, "patch_size": 4}},
                      around=([START], [START]), per_row=True),
    "ovis2": Family({"text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE, "vocab_size": VOCABULARY,
                     "hidden_size": SIZE, "visual_indicator_token_ids": [START, 92, 93, 94, END],
                     "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                       "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "vocab_size": 32,
                                       "hidden_stride": 2, "num_visual_indicator_tokens": 5}}, around=([START], [END])),
    "gemma3": Family(GEMMA | {
        "text_config": TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 16,
                               "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
        "vision_config": SIGLIP, "mm_tokens_per_image": 4}, around=([START], [END]), types="token_type_ids"),
    "gemma4": Family(GEMMA | {
        "text_config": TEXT | HYBRID_WINDOWS | {"sliding_window": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 8,
                                                "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2},
        "vision_config": {"model_type": "gemma4_vision", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4,
                          "pooling_kernel_size": 2, "position_embedding_size": 64},
        "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END, "boa_token_id": 94, "eoa_token_id": 93,
        "audio_token_id": 95, "audio_config": None}, patches, ([START], [END]), types="mm_token_type_ids", fused=(4, 8)),
    "paligemma": Family({"text_config": TEXT | {"model_type": "gemma"}, "vision_config": SIGLIP, "image_token_index": IMAGE,
                         "image_token_id": IMAGE, "projection_dim": SIZE, "hidden_size": SIZE},
                        types="token_type_ids", image_type=0),
    "mistral3": Family({"text_config": TEXT | {"model_type": "mistral", "sliding_window": None}, "image_token_index": IMAGE,
                        "image_token_id": IMAGE, "spatial_merge_size": 2,
                        "vision_config": CLIP | {"model_type": "pixtral", "head_dim": 8}}, sized),
    "aya_vision": Family({"text_config": TEXT | {"model_type": "cohere2", "sliding_window": 8}, "vision_config": SIGLIP,
                          "image_token_index": IMAGE, "image_token_id": IMAGE}, around=([START], [END]), fused=(3, 3)),
    "paligemma/gemma2": Family({"text_config": TEXT | {"model_type": "gemma2", "sliding_window": 8,
                                                       "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0},
                                "vision_config": SIGLIP,
                                "image_token_index": IMAGE, "image_token_id": IMAGE, "projection_dim": SIZE,
                                "hidden_size": SIZE}, types="token_type_ids", image_type=0,
                               reference="eager"),  # SDPA has no softcap: it refuses, or ignores it in older versions
    "llava/gpt_oss": Family({"text_config": TEXT | {"model_type": "gpt_oss", "sliding_window": 8, "num_local_experts": 4,
                                                    "num_experts_per_tok": 2, "intermediate_size": 32},
                             "vision_config": CLIP, "image_token_id": IMAGE, "vision_feature_layer": -1},
                            reference="eager"),  # SDPA has no sinks
    "chameleon": Family({k: v for k, v in TEXT.items() if k != "head_dim"} | {
        "vocabulary_map": {"<image>": IMAGE} | {f"IMGIMG{letter}Z": 80 + i for i, letter in enumerate("ABCDEFGH")},
        "vq_config": {"embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "resolution": 16, "base_channels": 32,
                      "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}}, around=([START], [END])),
    "llama4": Family({"text_config": TEXT | LLAMA4,
                      "image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END,
                      "vision_config": {"hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 16,
                                        "num_attention_heads": 2, "patch_size": 4, "vision_output_dim": 32,
                                        "projector_input_dim": 32, "projector_output_dim": 32}},
                     around=([START], [END])),
    "mllama": CrossAttention({"text_config": {k: v for k, v in TEXT.items() if k != "head_dim"} | {
                                  "num_hidden_layers": 4, "cross_attention_layers": [1, 3],
                                  "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
                              "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
                                                "num_global_layers": 1, "attention_heads": 2, "image_size": 16,
                                                "patch_size": 4, "max_num_tiles": 2, "intermediate_layers_indices": [0],
                                                "vision_output_dim": 32,
                                                "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
                              "image_token_index": IMAGE}, tiled, tokens=1, fused=(4, 8)),
    "gemma4_unified": Family({
        "text_config": TEXT | HYBRID_WINDOWS | {"sliding_window": 8, "global_head_dim": 16},
        "vision_config": {"patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 16,
                          "output_proj_dims": 16},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "boi_token_id": START, "eoi_token_id": END, "boa_token_id": 94,
        "eoa_token_index": 93, "audio_token_id": 95, "audio_config": None},
                             merged_patches, ([START], [END]), types="mm_token_type_ids", fused=(4, 8)),
    "kimi_k25": Family(QWEN | {
        "text_config": TEXT | LATENT | {"model_type": "deepseek_v3", "n_group": 1, "topk_group": 1},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "patch_size": 4, "pos_emb_height": 8, "pos_emb_width": 8},
        "projection_hidden_size": 16}, squares_of(grids), ([START], [END])),
    "ernie4_5_vl_moe": Family(QWEN | {
        "text_config": {k: v for k, v in TEXT.items() if k != "head_dim"} | {
            "rope_parameters": MROPE | {"mrope_section": [2, 2, 4]}, "moe_intermediate_size": [32, 16], "moe_k": 2,
            "moe_num_experts": 4, "moe_num_shared_experts": 1, "mlp_layer_types": ["dense", "sparse", "sparse"]},
        "vision_config": {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4},
        "image_start_token_id": START, "image_end_token_id": END, "video_start_token_id": 95, "video_end_token_id": 94},
                              flat_squares, ([START], [END]), types="mm_token_type_ids", fused=(1, 2)),
    "hunyuan_vl": Family({
        "text_config": TEXT | {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2, 2]}},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "patch_size": 4, "out_hidden_size": SIZE, "text_hidden_size": SIZE, "max_image_size": 32,
                          "min_image_size": 16, "img_max_token_num": 64, "max_vit_seq_len": 256},
        "image_token_id": IMAGE, "im_start_id": START, "im_end_id": END, "im_newline_id": 93},
                         flat_squares, ([START], [END]), types="mm_token_type_ids"),
    "minicpmv4_6": Family({
        "text_config": TEXT | {"model_type": "qwen3"},  # those that are published have Qwen3.5's, tested above
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 4, "insert_layer_id": 0},
        "image_token_id": IMAGE, "video_token_id": VIDEO, "image_size": 16, "insert_layer_id": 0}, strip, ([START], [END])),
    "step3p7": Family({
        "text_config": TEXT | {
            "layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 8,
            "num_sliding_attention_heads": 8, "mlp_layer_types": ["dense"] * 3,
            "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
                                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 4, "mlp_ratio": 2.0, "max_position_embeddings": 64},
        "image_token_id": IMAGE}, large, ([START], [END])),
    "nemotron_h_omni": Family(QWEN | {
        "text_config": TEXT | {
            "num_hidden_layers": 5, "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "full_attention"],
            "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 8,
            "n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32},
        "vision_config": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
                          "image_size": 16, "max_img_size": 32, "num_cls_tokens": 1, "num_registers": 1, "summary_idxs": [0],
                          "video_temporal_patch_size": 2},
        "audio_config": None, "audio_token_id": 95, "vision_hidden_size": 16, "projector_hidden_size": 32},
                              packed, ([START], [END]), fused=(5, 5)),
    "hy_v4_vl": Family(QWEN | {
        "text_config": CHOOSING | {"hc_mult": 2, "indexer_types": ["full", "shared", "full"],
                                   "rope_parameters": MROPE | {"mrope_section": [1, 1, 2]}},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "patch_size": 4, "out_hidden_size": SIZE, "max_image_size": 32}},
                       flat_squares, ([START], [END]), types="mm_token_type_ids", fused=(0, 0),
                       reference="eager"),  # it has no SDPA
    "mistral_large4": Family({"text_config": CHOOSING | {"no_rope_layers": [1, 0, 1]}, "image_token_index": IMAGE,
                              "spatial_merge_size": 2, "vision_config": CLIP | {"model_type": "pixtral", "head_dim": 8}},
                             sized),
    "dots3_note": Family(QWEN | {
        "text_config": CHOOSING | {
            "layer_types": ["indexed_attention", "sliding_attention", "indexed_attention"], "sliding_window": 8,
            "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16, "swa_q_lora_rank": 24,
            "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 12},
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "patch_size": 4, "moe_intermediate_size": 16, "num_local_experts": 2, "num_experts_per_tok": 1,
                          "mlp_layer_types": ["dense"] * 2, "adapter_in_dim": 16, "adapter_out_dim": SIZE},
        "audio_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                         "feature_size": 20, "adapter_input_size": 16, "adapter_out_dim": SIZE, "downsample_hidden_size": 8},
        "audio_token_id": 95}, flat_squares, ([START], [END])),
    "llama": Family(TEXT, None),
    "qwen3": Family(TEXT, None),
    "llama4_text": Family(TEXT | LLAMA4, None),
}  # fmt: skip
# Some are newer than the oldest transformers that this package works with, or took other inputs and configs there.
CHANGED = set() if version.parse(transformers.__version__) >= version.parse("5.24") else {"hunyuan_vl", "minicpmv4_6", "aria"}


def of_this_version(families: dict[str, Family]) -> dict[str, Family]:
    return {name: own for name, own in families.items() if name.split("/")[0] in CONFIG_MAPPING and name not in CHANGED}


FAMILIES = of_this_version(FAMILIES)

# Of these only regions and steering are tested: cousins of the above that tell images apart in another way.
COUSINS = {
    "qianfan_ocr": replace(FAMILIES["internvl"], config=FAMILIES["internvl"].config
                           | {"text_config": TEXT | {"model_type": "qwen3"}}),
    "got_ocr2": Family({"text_config": TEXT | {"model_type": "qwen2"}, "image_token_id": IMAGE, "image_token_index": IMAGE,
                        "vision_config": {"hidden_size": 16, "output_channels": 8, "num_hidden_layers": 2, "mlp_dim": 32,
                                          "num_attention_heads": 2, "image_size": 64, "patch_size": 4, "window_size": 4,
                                          "global_attn_indexes": [1]}},
                       two_crops, ([START], [END]), features_per_image=2, reference="eager"),  # it has no SDPA
    "granite4_vision": Family({"text_config": {k: v for k, v in TEXT.items() if k != "head_dim"}
                               | {"residual_multiplier": 0.5}, "image_token_id": IMAGE,
                               "image_token_index": IMAGE, "image_grid_pinpoints": [[16, 32], [32, 16]],
                               "downsample_rate": "2/4", "deepstack_layer_map": [[-1, 0], [-2, 1]],
                               "spatial_vision_layer": -1, "spatial_target_layers": [2],
                               "vision_config": CLIP | {"hidden_size": 64},
                               "qformer_config": {"model_type": "blip_2_qformer", "hidden_size": 64, "num_hidden_layers": 1,
                                                  "num_attention_heads": 2, "intermediate_size": 32,
                                                  "encoder_hidden_size": 64, "cross_attention_frequency": 1}},
                              tiles, tokens=14),
    "aria": Family({"text_config": TEXT | {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
                    "vision_config": {"model_type": "idefics3_vision", "hidden_size": 16, "intermediate_size": 32,
                                      "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4},
                    "image_token_index": IMAGE, "projector_patch_to_query_dict": {16: 4}}, around=([START], [END])),
    "phi4_multimodal": Family({k: v for k, v in TEXT.items() if k != "head_dim"} | {
        "resid_pdrop": 0.0,
        "vision_config": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                          "image_size": 32, "patch_size": 8, "crop_size": 32, "image_token_id": IMAGE},
        "audio_config": {"hidden_size": 16, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2,
                         "ext_pw_out_channel": 16, "depthwise_separable_out_channel": 16, "nemo_conv_channels": 8,
                         "input_size": 16, "audio_token_id": 95}}, masked, tokens=13),
}  # fmt: skip
COUSINS = of_this_version(COUSINS)


def table() -> str:
    """What `patch` and the engine do with each family, as the Markdown table of docs/integration.md."""
    head = "| model class | text model | layers fused | adds fused with their norm | image statistics | `SafeGenerator` |"
    lines = [head, "|---|---|---|---|---|---|"]
    for name, family in FAMILIES.items():
        model = family.model(name)
        with ras_fast.patch(model) as patched:
            report = patched.report()
            attending = [] if report.regions else sorted(patched.head_counts)
        text = model.config.get_text_config().model_type.removesuffix("_text")
        statistics = report.regions or (f"in layers {', '.join(map(str, attending))}" if report.blind else "yes")
        lines.append(
            f"| {report.model} | {text} | {report.fused_layers} of {report.layers} "
            f"| {report.fused_norms} of {report.norms} | {statistics} | exact |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
