"""RasProfile: what a calibrated method knows about one model. Stored as safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.weak import WeakTensorKeyDictionary

from ras_fast.fingerprint import fingerprint, wording

FORMAT_VERSION = 1
JSON_NAME = "ras_profile.json"
TENSORS_NAME = "ras_profile.safetensors"
HASHES = ("lm_head", "decoder", "other_parts")  # of weights: with the dtype they all change
REQUIRED_TENSORS = {
    "moras": ("prototypes",),
    "ras": ("prototypes",),
    "autosteer": ("prober_in.weight", "prober_in.bias", "prober_out.weight", "prober_out.bias", "refusal"),
    "attention": ("prototypes", "attention_weights", "attention_bias"),
    "projection": ("vectors",),
}
METHODS = tuple(REQUIRED_TENSORS)
_DIGESTS = WeakTensorKeyDictionary()  # tensor -> (how often it had been written to, digest)


@dataclass
class RasProfile:
    """A calibrated method.

    method: one of ``METHODS``.
    config: plain JSON values. MoRAS: gamma, steps, s_base, k, context_prompt, safety_prompt, max_context_tokens, gate.
    tensors: name -> floating tensor of at least 16 bits, all finite; REQUIRED_TENSORS lists those of each method. MoRAS:
        ``prototypes`` [N, d] fp32. Any method may have ``region_bias`` [layers, heads], added to the attention scores of image
        tokens (`ras_fast.methods.region_bias`).
    fingerprint: of the model it was calibrated on (`fingerprint`).

    Raises ValueError when one of these is of another type, or a tensor that the method needs is missing.
    """

    method: str
    config: dict
    tensors: dict[str, torch.Tensor]
    fingerprint: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"profile method is {self.method!r}; it needs to be one of {', '.join(METHODS)}")
        for name in ("config", "tensors", "fingerprint"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"profile {name} is {getattr(self, name)!r}; it needs to be a dict")
        missing = [name for name in REQUIRED_TENSORS[self.method] if name not in self.tensors]
        if missing:
            raise ValueError(f"profile for {self.method!r} lacks the tensors {missing}; it has {sorted(self.tensors)}")
        for name, tensor in self.tensors.items():
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.itemsize < 2:
                got = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
                raise ValueError(f"profile tensor {name!r} is {got}; it needs to be a floating tensor of at least 16 bits")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"profile tensor {name!r} holds NaN or infinite values; calibrate again")

    def check(self, model, processor=None) -> None:
        """Raises ValueError that lists what differs when this profile was not made on this model and tokenizer.

        Without a processor the tokenizer is not looked at.
        """
        self.check_fingerprint(fingerprint(model, processor))

    def check_fingerprint(self, found: dict) -> None:
        """As `check`, from the model's `fingerprint`."""
        own = {"other_parts": found.get("other_parts")} | self.fingerprint  # which profiles of earlier releases do not hold
        differing = {
            key: f"{key}: profile {own.get(key)!r}, model {value!r}" for key, value in found.items() if own.get(key) != value
        }
        if not differing:
            return
        words, advice = "; ".join(differing.values()), "calibrate again"
        if "dtype" in differing and set(differing) <= {"dtype", *HASHES}:
            words, advice = differing["dtype"], "load the model in the profile's dtype, or calibrate again in its own"
        raise ValueError(f"this {self.method} profile was calibrated on another model ({words}); {advice}")

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in self.tensors.items())
        return f"RasProfile({self.method!r}, {self.config}, {shapes})"

    def check_again(self, model, processor, passed: str) -> str:
        """`check` where the processor's `wording` is no longer the one that passed it, and the wording that passes now: to hash
        a vocabulary takes as long as some tokens of an answer."""
        now = wording(processor)
        if now != passed:
            self.check(model, processor)
        return now

    def digest(self, *more: torch.Tensor) -> str:
        """16 hex digits of what the method decides by, as it is now: its name, config and tensors, and `more` of them."""
        tensors = {name: _digest_of(tensor) for name, tensor in self.tensors.items()}
        parts = [self.method, self.config, tensors, [_digest_of(tensor) for tensor in more]]
        return _digest(json.dumps(parts, sort_keys=True).encode())[:16]

    def save_pretrained(self, directory) -> None:
        """Writes ras_profile.json and ras_profile.safetensors into ``directory`` (made if it is not there).

        A profile that was there is replaced. A crash leaves the old one, the new one, or files that do not load together.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # Copies, because tensors that share memory cannot be stored.
        form = torch.contiguous_format
        tensors = save({name: tensor.detach().cpu().clone(memory_format=form) for name, tensor in self.tensors.items()})
        header = {
            "format_version": FORMAT_VERSION,
            "method": self.method,
            "config": self.config,
            "fingerprint": self.fingerprint,
            "tensors": _digest(tensors),
        }
        # All is checked and on disk before the first file is replaced: the header, which then names the tensors to come.
        text = json.dumps(header, indent=2, allow_nan=False) + "\n"
        contents = {directory / JSON_NAME: text.encode(), directory / TENSORS_NAME: tensors}
        for path, content in contents.items():
            Path(f"{path}.new").write_bytes(content)
        for path in contents:
            os.replace(f"{path}.new", path)

    @classmethod
    def from_pretrained(cls, directory_or_hub_id) -> RasProfile:
        """Reads a profile from a local directory or, if there is no such directory, from the Hugging Face hub.

        Raises FileNotFoundError when a file is missing, and ValueError when one is corrupt, of another format version, or
        holds values that are not finite, or when the two files were not saved together.
        """
        if not isinstance(directory_or_hub_id, str | os.PathLike):
            raise ValueError(f"directory_or_hub_id is {directory_or_hub_id!r}; it needs to be a path or a hub id")
        json_path, tensors_path = (_locate(directory_or_hub_id, name) for name in (JSON_NAME, TENSORS_NAME))
        try:
            header = json.loads(json_path.read_text(encoding="utf-8-sig"))
            version, method, config = header["format_version"], header["method"], header["config"]
            stored_fingerprint = header["fingerprint"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{json_path} is not a profile header: {type(error).__name__}: {error}") from error
        if version != FORMAT_VERSION:
            raise ValueError(f"{json_path} has format version {version}; this release reads version {FORMAT_VERSION}")
        try:
            content = tensors_path.read_bytes()
            tensors = load(content)
        except SafetensorError as error:
            raise ValueError(f"{tensors_path} is not a safetensors file: {error}") from error
        profile = cls(method, config, tensors, stored_fingerprint)
        if header.get("tensors") != _digest(content):
            raise ValueError(f"{tensors_path} is not the one that {json_path.name} was saved with; save or calibrate again")
        return profile


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _digest_of(tensor: torch.Tensor) -> str:
    """Computed again only where the tensor was written to: that of a refusal head takes a while."""
    written = None if tensor.is_inference() else tensor._version  # inference tensors do not count it
    known = _DIGESTS.get(tensor)
    if known is None or written is None or known[0] != written:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        known = _DIGESTS[tensor] = written, _digest(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return known[1]


def _locate(directory_or_hub_id, name: str) -> Path:
    directory = Path(directory_or_hub_id)
    if directory.is_dir():
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} holds no {name}; a profile directory needs {JSON_NAME}, {TENSORS_NAME}")
        return directory / name
    if directory.exists():
        raise FileNotFoundError(f"no profile at {str(directory)!r}: it is a file; it needs to be a folder")
    if "/" not in str(directory_or_hub_id):
        raise FileNotFoundError(f"no profile at {str(directory)!r}: there is no such folder, and a hub id is OWNER/NAME")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(str(directory_or_hub_id), name))
    except (HFValidationError, OSError) as error:
        raise FileNotFoundError(
            f"no profile at {str(directory_or_hub_id)!r}: neither a local directory nor a readable hub id ({error})"
        ) from error
