"""RasProfile: what a calibrated method knows about one model. Stored as safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1
JSON_NAME = "ras_profile.json"
TENSORS_NAME = "ras_profile.safetensors"
METHODS = ("moras", "ras", "autosteer", "attention", "projection")
HEAD_ROWS = 64  # of the LM head, that go into the fingerprint
REQUIRED_TENSORS = {
    "moras": ("prototypes",),
    "ras": ("prototypes",),
    "autosteer": ("prober_in.weight", "prober_in.bias", "prober_out.weight", "prober_out.bias", "refusal"),
    "attention": ("prototypes", "attention_weights", "attention_bias"),
    "projection": ("vectors",),
}


def fingerprint(model, processor) -> dict:
    """What ties a profile to a model: architecture, sizes, dtype, a hash of the tokenizer's vocabulary and chat
    template, and a hash of the first rows of the LM head (which tells fine-tuned siblings apart)."""
    head = model.get_output_embeddings().weight.detach()[:HEAD_ROWS]
    return fingerprint_of_parts(type(model).__name__, model.config.get_text_config(), model.dtype, head, processor)


def fingerprint_of_parts(architecture: str, text_config, dtype: torch.dtype, head: torch.Tensor, processor) -> dict:
    """`fingerprint` where there is no transformers model; head: its LM head's first HEAD_ROWS rows, in its dtype."""
    tokenizer = getattr(processor, "tokenizer", processor)
    wording = [sorted(tokenizer.get_vocab().items()), getattr(processor, "chat_template", None)]
    return {
        "architecture": architecture,
        "hidden_size": text_config.hidden_size,
        "num_hidden_layers": text_config.num_hidden_layers,
        "vocab_size": text_config.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "tokenizer": hashlib.sha256(json.dumps(wording).encode()).hexdigest()[:16],
        "lm_head": hashlib.sha256(head.float().cpu().contiguous().numpy().tobytes()).hexdigest()[:16],
    }


@dataclass
class RasProfile:
    """A calibrated method.

    method: one of ``METHODS``.
    config: plain JSON values. MoRAS: gamma, steps, s_base, k, context_prompt, safety_prompt, max_context_tokens, gate.
    tensors: name -> tensor, all finite. MoRAS: ``prototypes`` [N, d] fp32. Any method: ``region_bias`` [layers, heads], what
        heads' scores of image tokens are raised by (`ras_fast.methods.region_bias`).
    fingerprint: of the model it was calibrated on (`fingerprint`).
    """

    method: str
    config: dict
    tensors: dict[str, torch.Tensor]
    fingerprint: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"profile method is {self.method!r}; it needs to be one of {', '.join(METHODS)}")
        missing = [name for name in REQUIRED_TENSORS.get(self.method, ()) if name not in self.tensors]
        if missing:
            raise ValueError(f"profile for {self.method!r} lacks the tensors {missing}; it has {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"profile tensor {name!r} holds NaN or infinite values; calibrate again")

    def check(self, model, processor) -> None:
        """Raises ValueError that lists what differs when this profile was not made on this model and tokenizer."""
        self.check_fingerprint(fingerprint(model, processor))

    def check_fingerprint(self, found: dict) -> None:
        """`check` against what `fingerprint` says of a model."""
        differing = [
            f"{key}: profile {self.fingerprint.get(key)!r}, model {value!r}"
            for key, value in found.items()
            if self.fingerprint.get(key) != value
        ]
        if differing:
            raise ValueError(
                f"this {self.method} profile was calibrated on another model ({'; '.join(differing)}); calibrate again"
            )

    def save_pretrained(self, directory) -> None:
        """Writes ras_profile.json and ras_profile.safetensors into ``directory`` (made if it is not there)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        header = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "config": self.config,
            "fingerprint": self.fingerprint,
        }
        # Both are checked and serialised before the first byte is written.
        text = json.dumps(header, indent=2, allow_nan=False)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, directory / TENSORS_NAME)
        (directory / JSON_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory_or_hub_id) -> RasProfile:
        """Reads a profile from a local directory or, if there is no such directory, from the Hugging Face hub.

        Raises FileNotFoundError when a file is missing, ValueError when one is corrupt, of a newer format, or holds
        values that are not finite.
        """
        json_path, tensors_path = (_locate(directory_or_hub_id, name) for name in (JSON_NAME, TENSORS_NAME))
        try:
            header = json.loads(json_path.read_text(encoding="utf-8"))
            version, method, config = header["format_version"], header["method"], header["config"]
            stored_fingerprint = header["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{json_path} is not a profile header: {type(error).__name__}: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{json_path} has format version {version}; this release reads version {FORMAT_VERSION}")
        try:
            tensors = load_file(tensors_path)
        except SafetensorError as error:
            raise ValueError(f"{tensors_path} is not a safetensors file: {error}") from error
        return cls(method, config, tensors, stored_fingerprint)


def _locate(directory_or_hub_id, name: str) -> Path:
    directory = Path(directory_or_hub_id)
    if directory.is_dir():
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} holds no {name}; a profile directory needs {JSON_NAME}, {TENSORS_NAME}"
            )
        return directory / name
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(str(directory_or_hub_id), name))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"no profile at {str(directory_or_hub_id)!r}: neither a local directory nor a readable hub id ({error})"
        ) from error
