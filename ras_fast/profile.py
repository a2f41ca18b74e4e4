"""RasProfile: what a calibrated method knows about one model. Stored as safetensors and JSON, never pickle."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch.utils.weak import WeakTensorKeyDictionary

FORMAT_VERSION = 1
JSON_NAME = "ras_profile.json"
TENSORS_NAME = "ras_profile.safetensors"
HEAD_ROWS = 64  # of the LM head, that go into the fingerprint
OTHER_VALUES = 64  # of each parameter outside the decoder layers, likewise
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


def fingerprint(model, processor=None) -> dict:
    """What ties a profile to a model: architecture, sizes, dtype, a hash of the tokenizer's vocabulary and chat template
    (without a processor left out), hashes of the first rows of the LM head, of the first row of every parameter of the decoder
    layers and of the last values of every other parameter (which tell fine-tuned siblings apart, also those by adapters), and
    which adapters act. A spot check: weights that differ elsewhere alone have the same fingerprint.

    Raises ValueError where the weights cannot be read.
    """
    from ras_fast.patching.structure import find_decoder, find_head

    root, _, layers = find_decoder(model)
    head = find_head(root)
    if head is None:
        raise ValueError(f"model is a {type(root).__name__}, which has no head that makes logits")
    rows = head.weight[:HEAD_ROWS]
    found = fingerprint_of_parts(type(root).__name__, root.config.get_text_config(), root.dtype, rows, processor)
    decoder = list(layers.parameters())
    inside = set(map(id, decoder))
    others = [parameter for parameter in root.parameters() if id(parameter) not in inside]
    return found | {
        "decoder": _hash_of([_row(parameter, 0) for parameter in decoder]),
        "other_parts": _hash_of([_row(parameter, -1) for parameter in others], OTHER_VALUES),
        "adapters": _adapters(root),
    }


def _row(parameter: torch.Tensor, index: int) -> torch.Tensor:
    if parameter.dim() < 2:
        return parameter
    try:
        return parameter[(index,) * (parameter.dim() - 1)]
    except NotImplementedError:  # of a quantised one
        return _row(parameter.detach().dequantize(), index)


def fingerprint_of_parts(architecture: str, text_config, dtype: torch.dtype, head: torch.Tensor, processor=None) -> dict:
    """`fingerprint` of a model that is not a transformers object, from its parts.

    head: [HEAD_ROWS, d], the first rows of the LM head in the model's dtype.
    """
    found = {
        "architecture": architecture,
        "hidden_size": text_config.hidden_size,
        "num_hidden_layers": text_config.num_hidden_layers,
        "vocab_size": text_config.vocab_size,
        "dtype": str(dtype).removeprefix("torch."),
        "lm_head": _hash_of([head]),
        "adapters": None,
    }
    if processor is not None:
        tokenizer = getattr(processor, "tokenizer", processor)
        wording = [sorted(tokenizer.get_vocab().items()), getattr(processor, "chat_template", None)]
        found["tokenizer"] = hashlib.sha256(json.dumps(wording).encode()).hexdigest()[:16]
    return found


def wording(processor) -> str:
    """The chat template and the size of the vocabulary: what changes where a processor comes to make other prompts."""
    return json.dumps([getattr(processor, "chat_template", None), len(processor.tokenizer)])


def adapters_of(module: torch.nn.Module) -> tuple | None:
    """How the PEFT adapters of a layer act now: (whether they are off, the active ones, their scales, those that are merged
    into its weights). None for a layer without adapters."""
    own = module.__dict__
    if "_active_adapter" not in own:
        return None
    active, scales = own["_active_adapter"], own.get("scaling", {})
    active = (active,) if isinstance(active, str) else tuple(active)
    merged = tuple(own.get("merged_adapters", ()))
    return own.get("_disable_adapters", False), active, tuple(scales.get(name) for name in active), merged


def _adapters(model: torch.nn.Module) -> str | None:
    """`adapters_of` the layers in words: "a × 2.0, b × 0.5", "off". None for a model without adapters."""

    def words(off: bool, active: tuple, scales: tuple, merged: tuple) -> str:
        acting = [name if scale is None else f"{name} × {scale}" for name, scale in zip(active, scales, strict=True)]
        return ", ".join((["off"] if off else acting) + [f"{name} merged" for name in merged]) or "off"

    states = {adapters_of(module) for module in model.modules()} - {None}
    return "; ".join(sorted({words(*state) for state in states})) or None


def weights_of(modules: list[torch.nn.Module]) -> tuple[list, tuple]:
    """(objects, which must live for their ids to mean something; a key), of the parameters and adapters of a model's
    `modules_of`. While the key stays the same, so does `fingerprint`, but for values written through `tensor.data`."""
    objects, key = tensors_of(held(modules, "_parameters"))
    return objects, (key, [adapters_of(module) for module in modules if "_active_adapter" in module.__dict__])


def held(modules: list[torch.nn.Module], kind: str) -> list[torch.Tensor]:
    """What these modules themselves hold of a kind: "_parameters" or "_buffers"."""
    return [tensor for module in modules for tensor in module.__dict__[kind].values() if tensor is not None]


def tensors_of(tensors: list[torch.Tensor]) -> tuple[list, tuple]:
    """As `weights_of`, of these tensors."""
    references = [*map(weakref.ref, tensors)]  # to keep old weights alive could take all the memory
    written = [-1 if tensor.is_inference() else tensor._version for tensor in tensors]  # inference tensors do not count it
    return references, ([*map(id, references)], [tensor.data_ptr() for tensor in tensors], written)


def modules_of(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """`model.modules()` by levels, and in a fraction of its time."""
    found, seen = [model], {model}
    for module in found:
        yield module
        for child in module.__dict__["_modules"].values():
            if child is not None and child not in seen:
                seen.add(child)
                found.append(child)


def _hash_of(tensors: list[torch.Tensor], last: int = 0) -> str:
    """Of their values, or of the `last` ones of each (0: all), as float32, copied from the device at once."""
    if any(tensor.is_meta for tensor in tensors):
        raise ValueError("the model's weights are not in memory (device meta), so a profile cannot be compared with it")
    if any(hasattr(tensor, "full_tensor") for tensor in tensors):  # of DTensors; a rank would see its own heads alone, too
        raise ValueError(
            "the model's weights are split among processes (tensor parallelism, FSDP), so a profile cannot be compared with it"
        )
    # A quantised tensor may be of a class that has no float().
    plain = [t.detach() if type(t) in (torch.Tensor, torch.nn.Parameter) else t.detach().dequantize() for t in tensors]
    values = torch.cat([tensor.reshape(-1)[-last:].to(plain[0].device, torch.float32) for tensor in plain])
    return hashlib.sha256(values.cpu().numpy().tobytes()).hexdigest()[:16]


def number(config: dict, name: str) -> float:
    """The finite number that a profile's config holds under `name`. Raises ValueError where it does not."""
    value = config.get(name)
    if not is_number(value) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"profile config {name!r} is {value!r}; it needs to be a finite number")
    return value


def as_float32(value: float) -> float:
    """The number that it becomes on the device: a small one may be 0 there, one next to 1 may be 1, a large one infinite."""
    return torch.tensor(float(value), dtype=torch.float32).item()


def is_integer(value: object) -> bool:
    """Whether it is one, and not a truth value, which Python counts among them."""
    return isinstance(value, int) and not isinstance(value, bool)


def check_counts(**given: object) -> None:
    """Raises ValueError where one of these, by its name, is no integer of at least 1."""
    for name, value in given.items():
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; it needs to be an integer of at least 1")


def is_number(value: object) -> bool:
    """Whether it is an integer or a float, finite or not, and not a truth value."""
    return is_integer(value) or isinstance(value, float)


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
            header = json.loads(json_path.read_text(encoding="utf-8"))
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
