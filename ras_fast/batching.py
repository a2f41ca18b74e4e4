"""Which inputs of a model can be joined into one batch, and the batch that they are joined into."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch

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
