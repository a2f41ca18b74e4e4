"""Makes `attn_implementation="ras_fast"` known to transformers, without importing transformers first."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType

NAME = "ras_fast"  # where no mask is given, it is causal if the module says so, as SDPA
EXPLICIT = "ras_fast_explicit"  # where no mask is given, nothing is hidden, as in eager attention
TOWER = "ras_fast_tower"  # as SDPA, outside of text models
PACKED = "ras_fast_flash_tower"  # the same for several images at once: for a name with "flash" in it transformers packs them
_HOME = "transformers.modeling_utils"  # where the attention interface lives


def register() -> None:
    """Registers the attention and mask functions, now or as soon as transformers is imported.

    transformers takes seconds to import, so `import ras_fast` does not: it leaves an import hook, and the registration
    happens at the end of the first import of transformers' modeling code, whichever of the two comes first. Idempotent.
    """
    if _HOME in sys.modules:
        _register_now()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register_now() -> None:
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface

    from ras_fast.patching import attention, towers

    AttentionInterface.register(NAME, attention.attention)
    AttentionMaskInterface.register(NAME, attention.attention_mask)
    AttentionInterface.register(EXPLICIT, attention.explicit_attention)
    AttentionMaskInterface.register(EXPLICIT, attention.explicit_mask)
    for name, function in ((TOWER, towers.attention), (PACKED, towers.packed_attention)):
        AttentionInterface.register(name, function)
        AttentionMaskInterface.register(name, sdpa_mask)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds transformers' modeling module as usual, and registers once it has run."""

    def find_spec(self, fullname: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if fullname != _HOME:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register_now()
