"""MoRAS and AutoSteer in vLLM, by its extension points alone: a logits processor and a worker class. docs/vllm.md.

`import ras_fast.vllm` does not import vLLM: what needs it loads on first use.
"""

from importlib import import_module
from typing import Any

from ras_fast.vllm.options import engine_args

# Public name -> module that defines it.
_LAZY = {
    "RasLogitsProcessor": "ras_fast.vllm.processor",
    "RasWorker": "ras_fast.vllm.worker",
    "SafeLLM": "ras_fast.vllm.safe_llm",
}

__all__ = ["engine_args", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'ras_fast.vllm' has no attribute {name!r}")
