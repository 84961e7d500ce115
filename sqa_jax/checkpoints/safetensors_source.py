"""A Hugging Face directory: its weights (one safetensors file, or the shards that an index lists), and its JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sqa_jax.checkpoints.safetensors_file import open_safetensors
from sqa_jax.errors import UserError
from sqa_jax.files import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class SafetensorsSource:
    """The weights of a Hugging Face directory; see `WeightSource`.

    Raises:
      UserError: no weights, a missing shard, a file that is cut off, or a dtype that cannot be read.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        self.where, self._directory = str(directory), directory
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._file_of = {} if (directory / SINGLE).exists() else _listed(directory)
        for file in weight_files(directory):
            self._open(file)
        for name, file in self._file_of.items():
            if name not in self.shapes:
                raise UserError(
                    f"{directory / file}: tensor {name} is missing, but {INDEX} lists it; fetch the shard again"
                )

    def _open(self, file: str) -> None:
        path = self._directory / file
        if not path.exists():
            raise UserError(f"{path}: shard not found, but {INDEX} lists it; fetch it again")
        with open_safetensors(path) as handle:
            for name in handle.keys():
                if name in self.shapes:
                    other = self._file_of[name]
                    raise UserError(
                        f"{path}: tensor {name} is also in {other}; remove the shard that is not the model's"
                    )
                self._file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        # Opened for each tensor: pages read from a mapped file count as this process' memory until it is closed.
        with open_safetensors(self._directory / self._file_of[name]) as handle:
            return handle.get_slice(name)[rows]

    def locate(self, name: str) -> str:
        return f"{self._directory / self._file_of[name] if name in self._file_of else self._directory}: tensor {name}"


def read_hf_config(directory: str | Path) -> dict[str, Any]:
    """`config.json` of a Hugging Face directory. Raises `UserError` where it is missing or damaged."""
    raw = read_json(Path(directory) / "config.json", "the model's architecture")
    if not isinstance(raw, dict):
        raise UserError(f"{directory}/config.json: not a JSON object; fetch it again")
    return raw


PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def read_processor(directory: str | Path) -> dict[str, Any]:
    """The image preprocessor's configuration of a Hugging Face directory; {} where there is none.

    Raises:
      UserError: the file is damaged.
    """
    file = next((file for name in PROCESSORS if (file := Path(directory) / name).exists()), None)
    raw = {} if file is None else read_json(file, "how images are preprocessed")
    if not isinstance(raw, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return raw


def weight_files(directory: Path) -> list[str]:
    """The files of a directory's weights. As in transformers, a single file takes precedence over an index."""
    if (directory / SINGLE).exists() or not (directory / INDEX).exists():
        return [SINGLE]
    return sorted(set(_listed(directory).values()))


def _listed(directory: Path) -> dict[str, str]:
    """The index: {tensor: file}."""
    if not (directory / INDEX).exists():
        raise UserError(f"{directory}: has no {SINGLE} and no {INDEX}; fetch the weights in safetensors format")
    index = read_json(directory / INDEX, "the list of weight shards")
    listed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise UserError(f"{directory / INDEX}: has no weight_map of tensors to files; fetch it again")
    return listed
