"""What is read of a checkpoint beside vLLM: its LM head, from the safetensors without loading the model, and its processor."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 8192  # rows in fp32 at a time: a whole head can be 2 GB
# A head that does more than W h cannot be steered in logits. Settings that say so, with the value that means nothing.
BENT = {"final_logit_softcapping": None, "logit_scale": 1, "logits_scaling": 1, "lm_head_multiplier": 1}


class CheckpointHead:
    """W [V, d] of a checkpoint: a local folder or a Hugging Face hub id.

    config: the model's config; text_config: that of its language model.
    Raises ValueError when the head has a bias, caps or scales its logits, is quantised, or cannot be told from the names.
    """

    def __init__(self, model: str, revision: str | None, config, text_config):
        for name, plain in BENT.items():
            value = getattr(text_config, name, None)
            if value not in (None, plain):
                raise ValueError(f"model {model!r} has {name} = {value!r}; steering in logits needs a head that is W h alone")
        self.model, self.revision = model, revision
        files = self._files()
        self.name = self._head_name(list(files), config, text_config)
        self.file = self._path(files[self.name])
        with safe_open(self.file, "pt") as tensors:
            self.shape, first = tensors.get_slice(self.name).get_shape(), tensors.get_slice(self.name)[:1]
        wanted = [text_config.vocab_size, text_config.hidden_size]
        if self.shape != wanted or not first.is_floating_point() or first.element_size() < 2:
            raise ValueError(
                f"{self.name} of {model!r} is {first.dtype} {self.shape}; it needs to be {wanted} in a floating-point type"
            )

    def rows(self, count: int, dtype: torch.dtype) -> Tensor:
        """The first ``count`` rows as the model holds them in ``dtype``."""
        with safe_open(self.file, "pt") as tensors:
            return tensors.get_slice(self.name)[:count].to(dtype)

    def logits(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        """W h in fp32, [..., V] for hidden [..., d], with W as the model holds it in ``dtype``."""
        with safe_open(self.file, "pt") as tensors:
            weight = tensors.get_slice(self.name)
            chunks = (weight[at : at + CHUNK].to(dtype).float() for at in range(0, self.shape[0], CHUNK))
            return torch.cat([hidden.float() @ chunk.T for chunk in chunks], dim=-1)

    def _files(self) -> dict[str, str]:
        """Tensor name -> file name."""
        try:
            return json.loads(self._path(INDEX).read_text(encoding="utf-8"))["weight_map"]
        except FileNotFoundError:
            with safe_open(self._path(SINGLE), "pt") as tensors:
                return dict.fromkeys(tensors.keys(), SINGLE)

    def _path(self, name: str) -> Path:
        """Raises FileNotFoundError when the checkpoint has no such file."""
        if Path(self.model).is_dir():
            path = Path(self.model) / name
            if not path.is_file():
                raise FileNotFoundError(f"{self.model} holds no {name}; steering needs the LM head as safetensors")
            return path
        from huggingface_hub import hf_hub_download  # its errors for a file that is not there are FileNotFoundErrors

        return Path(hf_hub_download(self.model, name, revision=self.revision))

    def _head_name(self, names: list[str], config, text_config) -> str:
        if any(name.endswith("lm_head.bias") for name in names):
            raise ValueError(f"model {self.model!r} has an LM head with a bias; steering in logits needs one without")
        tied = getattr(config, "tie_word_embeddings", False) or getattr(text_config, "tie_word_embeddings", False)
        for ending in ("lm_head.weight", *(("embed_tokens.weight",) if tied else ())):
            found = [name for name in names if name.endswith(ending)]
            if len(found) == 1:
                return found[0]
        raise ValueError(f"model {self.model!r} has no one tensor that ends in lm_head.weight; its LM head cannot be told")


def load_processor(model_config):
    """The model's transformers processor."""
    return AutoProcessor.from_pretrained(
        model_config.model, revision=model_config.revision, trust_remote_code=model_config.trust_remote_code
    )
