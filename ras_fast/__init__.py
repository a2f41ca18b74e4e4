"""ras_fast: fused kernels, drop-in modules and an engine for fast, safe multimodal decoding.

`import ras_fast` loads torch and the native libraries, never transformers: the parts that need it load on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ras_fast import ops
from ras_fast.backend import backends, set_backend
from ras_fast.registration import register as _register_with_transformers

try:
    __version__ = version("ras-fast")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0.0.0"

_register_with_transformers()

# Public name -> module that defines it.
_LAZY = {
    "patch": "ras_fast.patching",
    "Patch": "ras_fast.patching",
    "RegionMap": "ras_fast.regions",
    "RasProfile": "ras_fast.profile",
    "SafeGenerator": "ras_fast.engine",
    "SafeOutput": "ras_fast.engine",
}
_SUBMODULES = ("evaluation", "methods", "nn", "parallel", "patching", "regions", "sequential", "viz", "vllm")

__all__ = ["__version__", "backends", "ops", "set_backend", *_LAZY, *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    if name in _SUBMODULES:
        return import_module(f"ras_fast.{name}")
    raise AttributeError(f"module 'ras_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
