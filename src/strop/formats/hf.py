"""Hugging Face model folders: `config.json` with `model.safetensors`, whole or in shards. Pickles are never opened."""

import copy
import json
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes  # registers bfloat16 with numpy, which safetensors needs to read BF16
import numpy as np
from safetensors import SafetensorError, safe_open

from strop.core.errors import FormatError, StropError, UnsupportedError
from strop.formats.foreign import kind_of_files, some_of
from strop.formats.quantized import INTEGER_FORMATS
from strop.formats.quantizers import QuantizedTensors
from strop.formats.source_hash import files_hash
from strop.formats.values import DENSE_DTYPES, GroupQuantized, TensorInfo, TensorValue

MAX_JSON_BYTES = 64 << 20
READABLE_FORMATS = (*DENSE_DTYPES, *INTEGER_FORMATS)
"""Formats of the tensors that `HFCheckpoint.read` reads."""
_FLOAT8_DTYPES = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
SETTINGS_FILES = ("quantize_config.json", "quant_config.json")
"""Where old quantisers keep what now stands in config.json."""


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises FormatError when it is too large, damaged, or not an object."""
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise FormatError(f"{path}: {size} bytes; a JSON file of a model has at most {MAX_JSON_BYTES}")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); download the file again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path}: holds a {type(content).__name__}, not a JSON object; download the file again")
    return content


class SafetensorsFile:
    """One mapped safetensors file. Raises FormatError when its header is damaged or lies about the file's size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        try:
            self._file = safe_open(path, framework="numpy")
            self.tensors: dict[str, TensorInfo] = {}
            for name in self._file.keys():  # noqa: SIM118  (not a mapping)
                part = self._file.get_slice(name)
                shape, kind = tuple(part.get_shape()), part.get_dtype()
                self.tensors[name] = TensorInfo(name, shape, kind, _num_bytes(shape, kind))
        except (SafetensorError, OSError) as error:
            raise FormatError(f"{path}: not a whole safetensors file ({error}); download it again") from error

    def read(self, name: str) -> np.ndarray:
        """The tensor, of the dtype that numpy or ml_dtypes has for it."""
        if self.tensors[name].format in _FLOAT8_DTYPES:
            return self._read_float8(name)
        array: np.ndarray = self._file.get_tensor(name)
        return array

    def _read_float8(self, name: str) -> np.ndarray:
        """The library has no numpy dtype for these; it has checked the header that says where they are."""
        start, end = self._extents[name]
        with self.path.open("rb") as file:
            file.seek(start)
            stored = np.fromfile(file, np.uint8, end - start)
        info = self.tensors[name]
        return stored.view(_FLOAT8_DTYPES[info.format]).reshape(info.shape)

    @cached_property
    def _extents(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends in the file."""
        with self.path.open("rb") as file:
            header_len = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_len))
        offsets = {name: header[name]["data_offsets"] for name in self.tensors}
        return {name: (8 + header_len + start, 8 + header_len + end) for name, (start, end) in offsets.items()}

    def read_part(self, name: str, index: int) -> np.ndarray:
        """One entry of the tensor's first axis."""
        array: np.ndarray = self._file.get_slice(name)[index]
        return array


def _num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor; every safetensors dtype but BOOL carries its bits in its name."""
    digits = re.match(r"[A-Z]+(\d+)", kind)
    num_elements = 1
    for dim in shape:
        num_elements *= dim
    return num_elements * (int(digits[1]) if digits else 8) // 8


class HFCheckpoint:
    """A folder as `save_pretrained` writes it. Weights that a known quantiser split into several tensors appear whole.

    Raises FormatError for damaged files or shards that disagree with the index, UnsupportedError for folders that hold
    only pickles or only an adapter, and for quantisers that Strop does not read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        config = read_json(self.path / "config.json")
        self._files = _Shards(self.path)
        beside = {name: self.path / name for name in SETTINGS_FILES if (self.path / name).is_file()}
        self._quantized = QuantizedTensors(
            config, {name: read_json(file) for name, file in beside.items()}, self._files
        )
        self._settings_files = list(beside.values())
        self.config = {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}
        """Without the quantiser's settings, which `tensors` and `read` have followed."""
        self.tensors = self._quantized.tensors
        self._outlines: dict[str, TensorValue] = {}

    def read(self, name: str) -> TensorValue:
        """The weight's exact value, or a tensor as float32, float16 or bfloat16. Raises UnsupportedError for others."""
        weight = self._quantized.weight(name)
        if weight is not None:
            return weight.decode()
        self._refuse_dtype(name)
        return self._files.read(name)

    def read_part(self, name: str, index: int) -> np.ndarray:
        """One of the arrays that a tensor, not quantised, stacks along its first axis."""
        self._refuse_dtype(name)
        return self._files.read_part(name, index)

    def _refuse_dtype(self, name: str) -> None:
        info = self.tensors[name]
        if info.format not in DENSE_DTYPES:
            raise UnsupportedError(
                f"{self.path}: the tensor {name!r} has dtype {info.format}; supported are {', '.join(DENSE_DTYPES)}:"
                " use an unquantised checkpoint, or a GGUF file"
            )

    def outline(self, name: str) -> TensorValue:
        """One row in the form that `read` gives the matrix `name`.

        That of a quantised weight depends on its numbers: it is read, once.
        """
        info = self.tensors[name]
        if self._quantized.weight(name) is None and info.format in DENSE_DTYPES:
            return np.zeros((1, info.shape[-1]), DENSE_DTYPES[info.format])
        if name not in self._outlines:
            value, first = self.read(name), slice(0, 1)
            row = value.take_rows(first) if isinstance(value, GroupQuantized) else value[first]
            self._outlines[name] = copy.deepcopy(row)  # a view would keep the whole
        return self._outlines[name]

    def is_empty_bias(self, name: str) -> bool:
        """Whether a tensor is a bias of zeros that the quantiser added."""
        return self._quantized.is_empty_bias(name)

    def source_hash(self) -> str:
        """Hex SHA-256 over the config and the weight files (each remembered: see `file_hash`)."""
        return files_hash([self.path / "config.json", *self._settings_files, *self._files.paths])


class _Shards:
    """The tensors of a folder's safetensors files, as they are stored."""

    def __init__(self, path: Path) -> None:
        self.path = path
        shards = _open_shards(path)
        self.paths = [shard.path for shard in shards]
        self._shard_of: dict[str, SafetensorsFile] = {}
        for shard in shards:
            for name in shard.tensors:
                if name in self._shard_of:
                    both = f"{self._shard_of[name].path.name} and {shard.path.name}"
                    raise FormatError(f"{path}: the tensor {name!r} is in both {both}; download the model again")
                self._shard_of[name] = shard
        self.tensors: Mapping[str, TensorInfo] = {name: shard.tensors[name] for name, shard in self._shard_of.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor, of whatever dtype it is stored in."""
        return self._shard_of[name].read(name)

    def read_part(self, name: str, index: int) -> np.ndarray:
        """One entry of the tensor's first axis."""
        return self._shard_of[name].read_part(name, index)


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [SafetensorsFile(whole)]
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no 'weight_map'; download the file again")
    file_names = sorted({str(file_name) for file_name in weight_map.values()})
    for file_name in file_names:
        if file_name != Path(file_name).name or not file_name.endswith(".safetensors"):
            raise FormatError(f"{index}: {file_name!r} is not the name of a safetensors file in the same folder")
    missing = [file_name for file_name in file_names if not (folder / file_name).is_file()]
    if missing:
        raise FormatError(
            f"{folder}: {len(missing)} of the {len(file_names)} shards that {index.name} names are missing:"
            f" {some_of(missing)}; download them into that folder, or the model again"
        )
    shards = {file_name: SafetensorsFile(folder / file_name) for file_name in file_names}
    absent = [name for name, file_name in weight_map.items() if name not in shards[file_name].tensors]
    if absent:
        raise FormatError(f"{index}: tensors that are not in their shards: {some_of(absent)}; download the model again")
    return list(shards.values())


def _no_weights(folder: Path) -> StropError:
    names = [path.name for path in folder.iterdir()]
    shards = sorted(name for name in names if re.fullmatch(r"model-\d+-of-\d+\.safetensors", name))
    if shards:
        return FormatError(
            f"{folder}: has shards ({some_of(shards)}) but no model.safetensors.index.json, which says what is in them;"
            " download that file too"
        )
    if kind := kind_of_files(names):
        return UnsupportedError(f"{folder}: {kind}")
    return FormatError(f"{folder}: has a config.json but no model.safetensors; download the weights")
