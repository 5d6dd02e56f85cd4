"""The portable artifact: a folder with a model's canonical values, for any machine.

`strop.json` (version, spec, tensor table, SHA-256 of every other file, receipt, provenance), `weights*.safetensors`
(dense tensors as they are; a quantised one as `NAME.codes`, `NAME.scale` and perhaps `NAME.offset`, or `NAME.zero`
where the table has no number for it; 4-bit codes two to a byte, the even column in the low half; of a scale or offset
in two levels `NAME.scale` holds the upper one and `NAME.scale.local` the lower), and the tokenizer's files.
"""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from strop.core.errors import CapacityError, FormatError, UnsupportedError
from strop.formats.hf import SafetensorsFile, read_json
from strop.formats.source_hash import file_hash, files_hash
from strop.formats.values import (
    CODE_BITS,
    DENSE_DTYPES,
    GROUP_LEN,
    GROUP_LENS,
    SUPER_LEN,
    GroupQuantized,
    Scale,
    TensorInfo,
    TensorValue,
    TwoLevelScale,
)

MANIFEST = "strop.json"
VERSION = 1
SHARD_BYTES = 2 << 30
_DENSE_NAMES = {dtype: name for name, dtype in DENSE_DTYPES.items()}
_INTEGER_NAMES = {np.dtype(np.int8): "I8", np.dtype(np.uint8): "U8"}


def write_artifact(
    folder: str | Path,
    spec: Mapping[str, Any],
    tensors: Iterable[tuple[str, TensorValue]],
    *,
    files: Mapping[str, bytes] | None = None,
    receipt: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a new artifact; it appears under its name whole or not at all. Holds at most one shard in memory.

    `spec` is the model spec as JSON (`spec_to_json`), `files` the tokenizer's and template's files by name.
    Raises UnsupportedError when `folder` exists and CapacityError when the disk is full.
    """
    folder = Path(folder)
    if folder.exists():
        raise UnsupportedError(f"{folder}: exists already; an artifact is written to a new folder: remove or rename it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".part", dir=folder.parent))
    try:
        table = _write_weights(part, tensors, shard_bytes)
        for name, content in (files or {}).items():
            if name != Path(name).name or name == MANIFEST or name.endswith(".safetensors"):
                raise ValueError(f"{name!r} cannot be a file of an artifact")
            (part / name).write_bytes(content)
        hashes = {path.name: file_hash(path) for path in sorted(part.iterdir())}
        manifest = {
            "version": VERSION,
            "spec": spec,
            "tensors": table,
            "sha256": hashes,
            "receipt": receipt,
            "provenance": provenance,
        }
        (part / MANIFEST).write_text(json.dumps(manifest, indent=1, allow_nan=False), "utf-8")
        for path in part.iterdir():
            _sync(path)
        part.chmod(0o755)
        os.rename(part, folder)
        _sync(folder.parent)
    except OSError as error:
        free_bytes = shutil.disk_usage(folder.parent).free
        raise CapacityError(
            f"{folder}: cannot be written ({error.strerror}; {free_bytes} bytes free): make room or choose"
            " another place"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_weights(
    part: Path, tensors: Iterable[tuple[str, TensorValue]], shard_bytes: int
) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    shard: dict[str, np.ndarray] = {}
    num_shards = 1

    def file_name() -> str:
        return "weights.safetensors" if num_shards == 1 else f"weights-{num_shards}.safetensors"

    for name, value in tensors:
        if name in table:
            raise ValueError(f"the tensor {name!r} is given twice")
        if shard and sum(array.nbytes for array in shard.values()) >= shard_bytes:
            _save(shard, part / file_name())
            shard, num_shards = {}, num_shards + 1
        entry: dict[str, Any] = {"file": file_name(), "shape": list(value.shape)}
        if isinstance(value, GroupQuantized):
            entry |= {"format": "group", "bits": value.bits, "offset": value.offset is not None}
            if isinstance(value.zero, np.ndarray):
                shard[f"{name}.zero"] = value.zero
            else:
                entry["zero"] = value.zero
            shard[f"{name}.codes"] = _pack_nibbles(value.codes) if value.bits == 4 else value.codes
            if value.group_len != GROUP_LEN:
                entry["group_len"] = value.group_len
            for kind, scale in (("scale", value.scale), ("offset", value.offset)):
                if isinstance(scale, TwoLevelScale):
                    shard[f"{name}.{kind}"], shard[f"{name}.{kind}.local"] = scale.super_scale, scale.local
                    entry.setdefault("two_level", {})[kind] = _INTEGER_NAMES[scale.local.dtype]
                elif scale is not None:
                    shard[f"{name}.{kind}"] = scale
        else:
            entry["format"] = _DENSE_NAMES[value.dtype]
            shard[name] = value
        table[name] = entry
    _save(shard, part / file_name())
    return table


def _save(shard: Mapping[str, np.ndarray], path: Path) -> None:
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in shard.items()}, path)
    except SafetensorError as error:  # the library's name for a failed write
        raise OSError(errno.EIO, str(error)) from error


def _sync(path: Path) -> None:
    file_descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file_descriptor)
    finally:
        os.close(file_descriptor)


def _pack_nibbles(codes: np.ndarray) -> np.ndarray:
    packed: np.ndarray = codes[:, 0::2] | codes[:, 1::2] << 4
    return packed


def _unpack_nibbles(packed: np.ndarray) -> np.ndarray:
    codes = np.empty((packed.shape[0], packed.shape[1] * 2), np.uint8)
    np.bitwise_and(packed, 0x0F, out=codes[:, 0::2])
    np.right_shift(packed, 4, out=codes[:, 1::2])
    return codes


@dataclass(frozen=True, slots=True)
class _Group:
    """A quantised tensor's line in the table."""

    bits: int
    zero: int | None
    group_len: int
    parts: tuple[str, ...]
    """Its arrays: codes, scale, perhaps scale.local, offset, offset.local, zero."""


class ArtifactCheckpoint:
    """An artifact folder. Raises FormatError when the table and the weight files disagree in any way."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        manifest = read_json(self.path / MANIFEST)
        if manifest.get("version") != VERSION:
            raise UnsupportedError(
                f"{self.path}: artifact version {manifest.get('version')!r}; version {VERSION} is read: make it again,"
                " or use the Strop that made it"
            )
        self.spec: dict[str, Any] = self._object(manifest, "spec")
        """The model spec as JSON; `load_spec` turns it into a ModelSpec."""
        self.receipt: dict[str, Any] | None = manifest.get("receipt")
        self.provenance: dict[str, Any] | None = manifest.get("provenance")
        self._hashes = self._object(manifest, "sha256")
        for name in self._hashes:
            if name != Path(name).name or not (self.path / name).is_file():
                raise FormatError(f"{self.path}: the file {name!r} of its table is missing; copy the artifact again")
        self._files = {
            name: SafetensorsFile(self.path / name) for name in self._hashes if name.endswith(".safetensors")
        }
        self._file_of: dict[str, SafetensorsFile] = {}
        self._groups: dict[str, _Group] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in self._object(manifest, "tensors").items():
            try:
                self._enter(name, entry)
            except (LookupError, TypeError, ValueError) as error:
                raise FormatError(f"{self.path}: bad entry for the tensor {name!r} ({error}); copy it again") from error

    def _object(self, manifest: dict[str, Any], key: str) -> dict[str, Any]:
        content = manifest.get(key)
        if not isinstance(content, dict):
            raise FormatError(f"{self.path}: {MANIFEST} has no object {key!r}; copy the artifact again")
        return content

    def _enter(self, name: str, entry: dict[str, Any]) -> None:
        file = self._files[entry["file"]]
        shape = tuple(entry["shape"])
        self._file_of[name] = file
        if entry["format"] in DENSE_DTYPES:
            self._expect(file, name, shape, entry["format"])
            self.tensors[name] = TensorInfo(name, shape, entry["format"], file.tensors[name].num_bytes)
            return
        if entry["format"] != "group":
            raise ValueError(f"format {entry['format']!r} is none of {', '.join(DENSE_DTYPES)}, group")
        parts = self._group_parts(shape, entry)
        for part, (part_shape, kind) in parts.items():
            self._expect(file, f"{name}.{part}", part_shape, kind)
        num_bytes = sum(file.tensors[f"{name}.{part}"].num_bytes for part in parts)
        group_len = int(entry.get("group_len", GROUP_LEN))
        zero = int(entry["zero"]) if "zero" in entry else None
        self._groups[name] = _Group(int(entry["bits"]), zero, group_len, tuple(parts))
        self.tensors[name] = TensorInfo(name, shape, f"group{entry['bits']}", num_bytes)

    @staticmethod
    def _group_parts(shape: tuple[int, ...], entry: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype that each array of a quantised tensor must have. Raises ValueError for a bad entry."""
        bits, zero, group_len = int(entry["bits"]), int(entry.get("zero", 0)), int(entry.get("group_len", GROUP_LEN))
        if bits not in CODE_BITS or not 0 <= zero < 1 << bits or group_len not in GROUP_LENS:
            raise ValueError(f"bits={bits}, zero={zero}, group_len={group_len}")
        rows, columns = shape
        two_level = dict(entry.get("two_level", {}))
        if not set(two_level) <= {"scale", "offset"} or not set(two_level.values()) <= set(_INTEGER_NAMES.values()):
            raise ValueError(f"two_level={two_level!r}")
        block_len = SUPER_LEN if two_level else group_len
        if columns % block_len:
            raise ValueError(f"rows of {columns} weights are not whole groups of {block_len}")
        parts: dict[str, tuple[tuple[int, ...], str]] = {
            "codes": ((rows, columns // 2 if bits == 4 else columns), "U8")
        }
        for part in ("scale", "offset")[: 1 + bool(entry["offset"])]:
            parts[part] = ((rows, columns // (SUPER_LEN if part in two_level else group_len)), "F16")
            if part in two_level:
                parts[f"{part}.local"] = ((rows, columns // group_len), two_level[part])
        if "zero" not in entry:
            if entry["offset"]:
                raise ValueError("an offset needs one zero for all")
            parts["zero"] = ((rows, columns // group_len), "U8")
        return parts

    @staticmethod
    def _expect(file: SafetensorsFile, name: str, shape: tuple[int, ...], kind: str) -> None:
        info = file.tensors[name]
        if (info.shape, info.format) != (shape, kind):
            raise ValueError(f"{name} is {info.format} {info.shape}, the table says {kind} {shape}")

    def read(self, name: str) -> TensorValue:
        """The canonical value. Raises FormatError when codes exceed the range of their bits."""
        file = self._file_of[name]
        group = self._groups.get(name)
        if group is None:
            return file.read(name)
        codes = file.read(f"{name}.codes")
        if group.bits == 4:
            codes = _unpack_nibbles(codes)
        elif group.bits < 8 and codes.size and codes.max() >= 1 << group.bits:
            raise FormatError(f"{self.path}: the tensor {name!r} has codes above {group.bits} bits; copy it again")

        def scale(part: str) -> Scale:
            values = file.read(f"{name}.{part}")
            return (
                TwoLevelScale(values, file.read(f"{name}.{part}.local")) if f"{part}.local" in group.parts else values
            )

        offset = scale("offset") if "offset" in group.parts else None
        zero = file.read(f"{name}.zero") if group.zero is None else group.zero
        return GroupQuantized(codes, scale("scale"), offset, zero, group.bits, group.group_len)

    def outline(self, name: str) -> TensorValue:
        """One row of zeros in the form that `read` gives the matrix `name`."""
        info, group = self.tensors[name], self._groups.get(name)
        columns = info.shape[-1]
        if group is None:
            return np.zeros((1, columns), DENSE_DTYPES[info.format])

        def scale(part: str) -> Scale | None:
            if part not in group.parts:
                return None
            if f"{part}.local" not in group.parts:
                return np.zeros((1, columns // group.group_len), np.float16)
            integers = np.int8 if self._file_of[name].tensors[f"{name}.{part}.local"].format == "I8" else np.uint8
            local = np.zeros((1, columns // group.group_len), integers)
            return TwoLevelScale(np.zeros((1, columns // SUPER_LEN), np.float16), local)

        codes, own = np.zeros((1, columns), np.uint8), scale("scale")
        assert own is not None
        zero = np.zeros((1, columns // group.group_len), np.uint8) if group.zero is None else group.zero
        return GroupQuantized(codes, own, scale("offset"), zero, group.bits, group.group_len)

    def files(self) -> dict[str, Path]:
        """The tokenizer's and template's files, by name."""
        return {name: self.path / name for name in self._hashes if name not in self._files}

    def verify(self) -> None:
        """Compares every file with the SHA-256 in the table (remembered: see `file_hash`). Raises FormatError."""
        for name, expected in self._hashes.items():
            found = file_hash(self.path / name)
            if found != expected:
                raise FormatError(
                    f"{self.path / name}: its SHA-256 is {found}, the table says {expected}: the file was changed or"
                    " damaged, copy the artifact again"
                )

    def source_hash(self) -> str:
        """Hex SHA-256 over the table and the verified weights. Raises FormatError when they do not match the table."""
        self.verify()
        return files_hash([self.path / MANIFEST, *(file.path for file in self._files.values())])
