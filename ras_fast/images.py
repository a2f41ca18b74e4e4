"""Pictures as users hand them in, made into what a viewer would show."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

# What Pillow's readers raise over damaged files; its AVIF reader a RuntimeError.
UNREADABLE = (OSError, EOFError, SyntaxError, ValueError, RuntimeError, Image.DecompressionBombError)
TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(image, name: str = "image") -> Image.Image | None:
    """An RGB image as a viewer would show it, or None when an array holds NaN or infinite pixels.

    image: PIL image, path, data: URL in base64, or array [H, W], [H, W, 3] (uint8, or float in 0..1; numpy or torch).
    EXIF orientation is applied; of an animation the first frame is taken; transparency is laid on white; CMYK, grey and
    palette images are converted; 16-bit grey keeps its upper 8 bits, 32-bit grey that fits into 8 bits those.
    Raises ValueError for unreadable, empty or unsupported images.
    """
    if isinstance(image, torch.Tensor):
        image = _as_array(image, name)
    if isinstance(image, np.ndarray):
        return _from_array(np.asarray(image), name)  # what lies under a mask would be drawn, too
    if isinstance(image, str) and image.startswith("data:"):
        image = _held_by(image, name)
    elif isinstance(image, str) and "://" in image:
        raise ValueError(f"{name} is the URL {image[:60]!r}; nothing is fetched here: hand in what it leads to")
    if isinstance(image, (str, Path, io.BytesIO)):
        try:
            image = Image.open(image)
        except UNREADABLE as error:  # it holds the path, which may be a whole image in base64
            raise ValueError(f"{name} cannot be read: {error!s:.300}") from error
    if not isinstance(image, Image.Image):
        raise ValueError(f"{name} is a {type(image).__name__}; it needs to be a PIL image, a path or an array")
    if 0 in image.size:
        raise ValueError(f"{name} has zero size: {image.size}")
    shown = image.tell()
    try:
        image.seek(0)
        image.load()
        # `ImageOps.exif_transpose` writes all of the EXIF data anew, and raises whatever it likes where some of it is damaged.
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    rgb = _to_rgb(image if turn is None else image.transpose(turn), name)
    rgb.info.clear()  # or it would be turned again where it is handed in again
    image.seek(shown)  # an animation is its owner's, who may be in the middle of it
    return rgb


def _as_array(tensor: torch.Tensor, name: str) -> np.ndarray:
    kinds = {
        "without values (meta)": tensor.is_meta,
        "of tensors": tensor.is_nested,
        "of quantised values": tensor.is_quantized,
        f"of layout {tensor.layout}": tensor.layout is not torch.strided,
    }
    kind = next((kind for kind, holds in kinds.items() if holds), None)
    if kind is not None:
        raise ValueError(f"{name} is a tensor {kind}; it needs to be a dense one that holds its pixels")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy has no bfloat16


def _held_by(url: str, name: str) -> io.BytesIO:
    """The file in a data: URL (RFC 2397)."""
    head, _, data = url.partition(",")
    if not head.endswith(";base64"):
        raise ValueError(f"{name} is the URL {url[:60]!r}; a data: URL needs to be in base64, data:image/png;base64,...")
    try:
        return io.BytesIO(base64.b64decode(data))
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "F":
        raise ValueError(f"{name} has mode 'F' (unbounded floats); hand it in as a float array in 0..1 or 8-bit image")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"{name} has integer pixels in {values.min()}..{values.max()}; it needs 0..65535")
        spare = 0 if image.mode == "I" and values.max() < 256 else 8  # an 8-bit image as 32-bit integers
        return Image.fromarray((values >> spare).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("LA") if image.mode == "La" else image  # which is all that Pillow makes of it
    try:
        image = image.convert("RGBA")
    except (TypeError, ValueError) as error:  # more transparent colours than a palette has places, or what is no colour
        raise ValueError(f"{name} cannot be read: {error}") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _from_array(array: np.ndarray, name: str) -> Image.Image | None:
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)) or 0 in array.shape:
        raise ValueError(f"{name} is an array of shape {array.shape}; it needs to be [H, W] or [H, W, 3] (HWC), not empty")
    if np.issubdtype(array.dtype, np.floating):
        if not np.isfinite(array).all():
            return None
        if array.min() < 0 or array.max() > 1:
            raise ValueError(f"{name} has float pixels in {array.min():g}..{array.max():g}; they need to be in 0..1")
        array = np.round(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"{name} is an array of {array.dtype}; it needs to be uint8 or float in 0..1")
    return Image.fromarray(array).convert("RGB")
