"""From a name to a model and its processor, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path

import torch

TINY = Path(__file__).resolve().parent / "assets" / "tiny-llava"
DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load(name: str | Path, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"):
    """A multimodal model in eval mode, and its processor.

    Args:
        name: "tiny" (the synthetic checkpoint that ships with the package), a local folder, or a Hugging Face hub id.
        device: "auto" (CUDA where there is one) or a torch device.
        dtype: one of DTYPES, or the torch dtype that it names; "auto": that of the checkpoint.

    Returns:
        (model, processor).

    Raises:
        ValueError: there is no such model, it does not take images, it cannot be read, or device or dtype is unknown.
    """
    name = str(name) if isinstance(name, Path) else name
    device = str(device) if isinstance(device, torch.device) else device
    dtype = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    for what, value in (("name", name), ("device", device)):
        if not isinstance(value, str):
            raise ValueError(f"{what} is {value!r}; it must be a string")
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    device = _device(device)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    path = _resolve(name)
    config = _read(name, AutoConfig.from_pretrained, path)
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise ValueError(f"model {name!r} is of type {config.model_type!r}, which does not take images; give a multimodal one")
    processor = _read(name, AutoProcessor.from_pretrained, path)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"model {name!r} comes without an image processor; add its preprocessor_config.json")
    model = _read(name, AutoModelForImageTextToText.from_pretrained, path, dtype=DTYPES[dtype])
    return model.to(device).eval(), processor


def _read(name: str, from_pretrained, path: str, **options):
    """Whatever is wrong with a checkpoint (a missing file, weights cut short, a config out of range, a package that its code
    needs) comes out as one line that names it."""
    try:
        return from_pretrained(path, **options)
    except Exception as error:
        raise ValueError(f"model {name!r} cannot be read: {type(error).__name__}: {_first_line(error)}") from error


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; it must be 'auto' or a torch device such as 'cpu' or 'cuda:0'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device")
    if device.type == "meta":
        raise ValueError(f"device is {name!r}, which holds no values; it must be one that computes")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device is {name!r}, which this torch cannot use: {_first_line(error)}") from error
    return device


def _resolve(name: str) -> str:
    if name == "tiny":
        if not (TINY / "config.json").is_file():
            raise ValueError(f"the tiny checkpoint is not in {TINY}; make it with examples/train_tiny_mllm.py")
        return str(TINY)
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    # A hub id is "name" or "owner/name"; anything else can only have been meant as a folder.
    if path.exists() or path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ValueError(f"model {name!r}: there is no such folder")
    return name


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]
