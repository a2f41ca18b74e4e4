"""What an image becomes in the token ids of a prompt, so that other prompts about it need not process it again."""

from __future__ import annotations

from typing import NamedTuple

from ras_fast.inputs import common_length

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
