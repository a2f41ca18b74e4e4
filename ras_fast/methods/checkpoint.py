"""What an unfinished calibration keeps on disk, and is resumed from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ras_fast import parallel


class Checkpoint:
    """A safetensors file for each stage of an unfinished calibration, its facts as JSON in the file's own header.

    folder: None keeps nothing. settings: what must be the same for a calibration to be resumed.

    Raises ValueError for a file in the folder's place.
    """

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]):
        self.folder = None if folder is None else Path(folder)
        self.settings = json.dumps(settings, sort_keys=True)
        if self.folder is not None and self.folder.exists() and not self.folder.is_dir():  # before minutes of work
            raise ValueError(f"checkpoint is {str(folder)!r}, which is there and no folder")

    def load(self, stage: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """(tensors, facts) of a stage; None where it has not been saved.

        Raises ValueError when the file cannot be read or is of another calibration.
        """
        path = None if self.folder is None else self.folder / f"{stage}.safetensors"
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is not a checkpoint: {error}") from error
        if header is None or header.get("settings") != self.settings:
            raise ValueError(f"{path} is of another calibration (model, pairs, refusal, layers or seed); give another folder")
        return tensors, json.loads(header["facts"])

    def save(self, stage: str, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Replaces the stage's file as a whole: a crash leaves the old one or the new one. Of several processes the first
        does it."""
        if self.folder is None or parallel.rank():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{stage}.safetensors"
        header = {"settings": self.settings, "facts": json.dumps(facts)}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, f"{path}.new", header)
        os.replace(f"{path}.new", path)
