"""Hugging Face model folders: `config.json` with `model.safetensors`, whole or in shards. Pickles are never opened."""

import json
import os
import re
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs to read BF16)
import numpy as np
from safetensors import SafetensorError, safe_open

from strop.core.errors import FormatError, StropError, UnsupportedError
from strop.formats.source_hash import files_hash
from strop.formats.values import DENSE_DTYPES, TensorInfo

MAX_JSON_BYTES = 64 << 20
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


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
        """The tensor, of whatever dtype numpy has for it."""
        array: np.ndarray = self._file.get_tensor(name)
        return array


def _num_bytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor; every safetensors dtype but BOOL carries its bits in its name."""
    digits = re.match(r"[A-Z]+(\d+)", kind)
    num_elements = 1
    for dim in shape:
        num_elements *= dim
    return num_elements * (int(digits[1]) if digits else 8) // 8


class HFCheckpoint:
    """A folder as `save_pretrained` writes it.

    Raises FormatError for damaged files or shards that disagree with the index, UnsupportedError for folders that hold
    only pickles or only an adapter.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        self._shards = _open_shards(self.path)
        self._shard_of: dict[str, SafetensorsFile] = {}
        for shard in self._shards:
            for name in shard.tensors:
                if name in self._shard_of:
                    both = f"{self._shard_of[name].path.name} and {shard.path.name}"
                    raise FormatError(f"{self.path}: the tensor {name!r} is in both {both}; download the model again")
                self._shard_of[name] = shard
        self.tensors = {name: shard.tensors[name] for name, shard in self._shard_of.items()}

    def read(self, name: str) -> np.ndarray:
        """The tensor as float32, float16 or bfloat16. Raises UnsupportedError for any other dtype."""
        shard = self._shard_of[name]
        kind = shard.tensors[name].format
        if kind not in DENSE_DTYPES:
            raise UnsupportedError(
                f"{shard.path}: the tensor {name!r} has dtype {kind}; supported are {', '.join(DENSE_DTYPES)}: use an"
                " unquantised checkpoint, or a GGUF file"
            )
        return shard.read(name)

    def outline(self, name: str) -> np.ndarray:
        """One row of zeros of the dtype that `read` gives the matrix `name`."""
        info = self.tensors[name]
        return np.zeros((1, info.shape[-1]), DENSE_DTYPES[info.format])

    def source_hash(self) -> str:
        """Hex SHA-256 over config.json and the weight files (each remembered: see `file_hash`)."""
        return files_hash([self.path / "config.json", *(shard.path for shard in self._shards)])


def _open_shards(folder: Path) -> list[SafetensorsFile]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [SafetensorsFile(whole)]
    if not index.is_file():
        raise _no_weights(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no 'weight_map'; download the file again")
    shards = {}
    for file_name in sorted({str(file_name) for file_name in weight_map.values()}):
        if file_name != Path(file_name).name or not file_name.endswith(".safetensors"):
            raise FormatError(f"{index}: {file_name!r} is not the name of a safetensors file in the same folder")
        if not (folder / file_name).is_file():
            raise FormatError(f"{folder}: the shard {file_name!r} named by {index.name} is missing; download it")
        shards[file_name] = SafetensorsFile(folder / file_name)
    absent = [name for name, file_name in weight_map.items() if name not in shards[file_name].tensors]
    if absent:
        raise FormatError(f"{index}: tensors that are not in their shards: {_some(absent)}; download the model again")
    return list(shards.values())


def _no_weights(folder: Path) -> StropError:
    if (folder / "adapter_config.json").is_file():
        return UnsupportedError(
            f"{folder}: a LoRA adapter, not a whole model: merge it into its base model (`merge_and_unload` in peft)"
            " and save that"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return UnsupportedError(
            f"{folder}: only pickled weights ({_some(pickles)}), which can run any code when opened: convert them with"
            " `save_pretrained(..., safe_serialization=True)` in transformers, or fetch a safetensors version"
        )
    return FormatError(f"{folder}: has a config.json but no model.safetensors; download the weights")


def download(model_id: str) -> Path:
    """The local folder of a Hub model, downloaded if it is not in the Hub's cache (`HF_HOME`, `HF_HUB_OFFLINE` apply).

    Raises UnsupportedError when huggingface_hub is not installed, FormatError when the model cannot be had.
    """
    try:
        import huggingface_hub  # only here: it is slow to import, and files need it not
    except ImportError as error:
        raise UnsupportedError(
            f"{model_id!r} is not a local path, and fetching it from the Hugging Face Hub needs huggingface_hub:"
            " `pip install huggingface_hub`"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(model_id, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        # The library passes on its own errors and those of whichever HTTP client it uses.
        cause = str(error).strip().partition("\n")[0] or type(error).__name__
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE") else ""
        raise FormatError(
            f"{model_id!r} is neither a local path nor to be had from the Hugging Face Hub{offline}: {cause}. Check the"
            " spelling and the network, log in with `hf auth login` if the model is gated, or pass a local folder"
        ) from error


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
