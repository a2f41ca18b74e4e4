"""Where a model looks: attention from the words of a prompt to its images, in one forward pass at full speed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ras_fast.inputs import encode, make_queries
from ras_fast.patching import Patch, patch
from ras_fast.patching.tracking import token_ids

TOP_HEADS = 8

Box = tuple[int, int, int, int]


class NoImageStatistics(ValueError):
    """Attention to images cannot be measured in this model; the message says why."""


@dataclass
class ImageAttention:
    """Attention of the prompt's text rows after the last image.

    mass: [layers, heads, R] fp32, probability on each of R images, mean over those rows; NaN for heads that a layer lacks.
    maps: for each image [h, w] fp32, the highest probability that any of those rows puts on each patch, mean over the
        `TOP_HEADS` heads of the model that look most at the images (arXiv 2510.13698's effective attention). None where it is
        not known how the image's tokens lie on it: those of several tiles.
    images: what the model was shown, RGB; where the processor pads a picture to a square, that square.
    boxes: for each image the part that the patches cover, (left, top, right, bottom) in its pixels.
    """

    mass: Tensor
    maps: list[Tensor | None]
    images: list[Image.Image]
    boxes: list[Box]


@torch.inference_mode()
def image_attention(model, processor, prompt, images) -> ImageAttention:
    """One forward pass of `model` over prompt and images. The model is patched for it and unpatched again afterwards.

    model: not patched yet.
    prompt, images: one prompt and its images, as `ras_fast.inputs.make_queries` takes them in lists; at least one image.

    Raises:
        NoImageStatistics: the model's architecture gives none, or none by image: each tile of an image is a region, or images
            are no tokens of the prompt.
        ValueError: there is no image, an input cannot be used, or the model is patched already.
    """
    (query,) = make_queries([prompt], [images], processor)
    if not query.images:
        raise ValueError("images is empty; a map of the attention to images needs at least one")
    if query.poisoned:  # it would be attention to the black one in its place
        raise ValueError("images holds one with NaN or infinite pixels")
    inputs, _ = encode(processor, query, model.device, model.dtype)
    with _patched(model) as handle:
        tokens = inputs["input_ids"][0]
        rows = len(tokens) - 1 - int((tokens == token_ids(model.config)["image"]).nonzero().max())
        with handle.collect(rows, scores=True, reduce="max") as statistics:
            model.base_model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]), use_cache=False)
        grids = handle.region_map.grids[0]
        if len(grids) != len(query.images):
            cut = f"the model cuts {len(query.images)} image(s) into {len(grids)} tiles, and attention is taken by tile"
            raise NoImageStatistics(f"no image statistics: {cut}")
        mass = [mass[0].mean(1) for _, mass in sorted(statistics.mass.items())]
        scores = [scores[0] for _, scores in sorted(statistics.scores.items())]
        mass, scores = (pad_sequence(found, batch_first=True, padding_value=torch.nan) for found in (mass, scores))
        heads = mass.sum(-1).flatten().nan_to_num(-1)
        looking = heads.topk(min(TOP_HEADS, int((heads >= 0).sum()))).indices
        effective = scores.flatten(0, 1)[looking].mean(0)
        found = zip(handle.region_map.heat_maps(effective[None])[0], grids, strict=True)
        maps = [None if grid is None else heat.cpu() for heat, grid in found]
    images = [_shown(image, processor.image_processor) for image in query.images]
    return ImageAttention(mass.cpu(), maps, images, [_seen(image.size, processor.image_processor) for image in images])


def _patched(model) -> Patch:
    try:
        handle = patch(model, norms=False, linears=False)
    except TypeError as error:
        raise NoImageStatistics(f"no image statistics: {error}") from error
    if handle.report().regions is not None:
        handle.unpatch()
        raise NoImageStatistics(f"no image statistics: {handle.report().regions}")
    if not handle.images_in_prompt:
        handle.unpatch()
        raise NoImageStatistics("no map of an image: the model's images are keys of cross-attention layers, not of the prompt")
    return handle


def _shown(image: Image.Image, image_processor) -> Image.Image:
    """The picture, in the middle of a square where the processor (LLaVA's, DeepSeek-VL's, Janus's) makes it one first: patches
    lie on that."""
    pads = getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square")
    if not pads or hasattr(image_processor, "image_grid_pinpoints"):
        return image
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in image_processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _seen(size: tuple[int, int], image_processor) -> Box:
    """The part of a picture of `size` (width, height) that is left once the processor has resized and cropped it."""
    width, height = size
    target, crop = getattr(image_processor, "size", None) or {}, getattr(image_processor, "crop_size", None) or {}
    tiled = hasattr(image_processor, "image_grid_pinpoints")
    if tiled or not getattr(image_processor, "do_center_crop", False) or not {"height", "width"} <= set(dict(crop)):
        return 0, 0, width, height
    across = down = 1.0
    if getattr(image_processor, "do_resize", False):
        if dict(target).get("shortest_edge"):
            across = down = target["shortest_edge"] / min(width, height)
        elif {"height", "width"} <= set(dict(target)):
            across, down = target["width"] / width, target["height"] / height
    kept_width, kept_height = min(crop["width"] / across, width), min(crop["height"] / down, height)
    (left, right), (top, bottom) = _centred(width, kept_width), _centred(height, kept_height)
    return left, top, right, bottom


def _centred(length: int, kept: float) -> tuple[int, int]:
    """The pixels, at least one, of the middle `kept` of a length."""
    start = (length - kept) / 2
    return round(start), max(round(start + kept), round(start) + 1)
