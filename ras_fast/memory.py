"""What running out of memory looks like."""

from __future__ import annotations

WORDS = ("out of memory", "not enough memory", "can't allocate memory")  # of CUDA, and of torch on a CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on some device, had no memory left."""
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in WORDS)


def reraise_out_of_memory(error: BaseException) -> None:
    """For handlers to whom an error says something about what they tried: this one says nothing, and may not come again."""
    if is_out_of_memory(error):
        raise error
