"""GGUF v2 and v3 files: a bounded parser over a memory map.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Every count and length is compared with the bytes
that are left in the file before anything is allocated for it.
"""

import math
import mmap
import re
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from strop.core.errors import FormatError, StropError, UnsupportedError
from strop.formats.k_quants import SUPER_BLOCK_FORMATS, decode_super_blocks
from strop.formats.source_hash import file_hash, files_hash
from strop.formats.values import (
    BLOCK_FORMATS,
    DENSE_DTYPES,
    GROUP_LEN,
    SUPER_LEN,
    GroupQuantized,
    TensorInfo,
    TensorValue,
    decode_blocks,
)

MAGIC = b"GGUF"
MAX_METADATA_ITEMS = 1 << 23
"""Array elements in all metadata together: room for five vocabularies of a million tokens."""
MAX_ARRAY_DEPTH = 4
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 20

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_MIN_VALUE_BYTES = {_BOOL: 1, _STRING: 8, _ARRAY: 12} | {kind: code.size for kind, code in _SCALARS.items()}
_MIN_ENTRY_BYTES = 8 + 4 + 1  # key length, value type, value
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # name length, number of dimensions, one dimension, type, offset

# fmt: off
_TENSOR_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K",
    13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS", 30: "BF16", 39: "MXFP4",
}
_UNREAD_TYPES = {
    9: ("Q8_1", 32, 36), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
}
# fmt: on
"""Name, weights and bytes of a block: only to tell what a file holds."""

_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def set_name(path: Path) -> str:
    """The same name for all parts of one split model (model-00001-of-00003.gguf, ...); any other file's own name."""
    match = _SPLIT_NAME.fullmatch(path.name)
    return f"{match['stem']}-*-of-{match['count']}.gguf" if match else path.name


@dataclass(frozen=True, slots=True)
class _Extent:
    """Where a tensor's bytes lie, counted from the start of the file."""

    start: int
    num_bytes: int


class GGUFCheckpoint:
    """One GGUF file, or all parts of a split one (whichever part is named); headers checked, tensors mapped.

    The files must not be shortened while they are open (the operating system kills readers of a vanished page).
    Raises FormatError for a damaged file or an incomplete set of parts and UnsupportedError for a well-formed one that
    Strop cannot read, both on opening: after that, `read` of a listed tensor succeeds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = _open_parts(self.path)
        self.metadata: dict[str, Any] = self._files[0].metadata
        """Every key of the file (of the first part, which holds the model's); arrays are lists."""
        self.tensors: dict[str, TensorInfo] = {}
        self._file_of: dict[str, _Header] = {}
        for file in self._files:
            for name, info in file.tensors.items():
                if name in self.tensors:
                    raise FormatError(
                        f"{file.path}: the tensor {name!r} is also in {self._file_of[name].path.name}; these parts do"
                        " not belong together, download all of them again"
                    )
                self.tensors[name] = info
                self._file_of[name] = file

    @property
    def paths(self) -> list[Path]:
        """The file, or all parts in order."""
        return [file.path for file in self._files]

    def read(self, name: str) -> TensorValue:
        """The tensor's exact value: a read-only view of the file where dense, decoded where quantised.

        A quantised one of three dimensions [E, N, K] comes as the matrix [E * N, K]. Raises UnsupportedError when an
        MXFP4 tensor has scales that no float16 holds.
        """
        return self._array(name, self.tensors[name].shape, 0)

    def read_part(self, name: str, index: int) -> TensorValue:
        """One of the arrays that a tensor stacks along its first axis, as `read` gives it."""
        return self._array(name, self.tensors[name].shape[1:], index)

    def _array(self, name: str, shape: tuple[int, ...], index: int) -> TensorValue:
        """The `index`th array of this shape in a tensor's bytes."""
        info, file = self.tensors[name], self._file_of[name]
        num_bytes = info.num_bytes * math.prod(shape) // math.prod(info.shape)
        raw = np.frombuffer(file.data, np.uint8, num_bytes, file.extents[name].start + index * num_bytes)
        if info.format in DENSE_DTYPES:
            return raw.view(DENSE_DTYPES[info.format]).reshape(shape)
        try:
            value = _decode(info.format, raw, (math.prod(shape[:-1]), shape[-1]))
        except OverflowError as error:
            raise UnsupportedError(
                f"{file.path}: the {info.format} tensor {name!r} {error}: use another type"
            ) from error
        return value if len(shape) > 1 else value.dequantize()[0]

    def outline(self, name: str) -> TensorValue:
        """One row of zeros in the form that `read` gives the matrix `name`."""
        info = self.tensors[name]
        shape = (1, info.shape[-1])
        if info.format in DENSE_DTYPES:
            return np.zeros(shape, DENSE_DTYPES[info.format])
        return _decode(info.format, np.zeros(info.num_bytes // math.prod(info.shape[:-1]), np.uint8), shape)

    def source_hash(self) -> str:
        """Hex SHA-256 of the file, or over all parts (remembered: see `file_hash`)."""
        return file_hash(self.paths[0]) if len(self.paths) == 1 else files_hash(self.paths)


def _decode(format_name: str, raw: np.ndarray, shape: tuple[int, int]) -> GroupQuantized:
    decode = decode_super_blocks if format_name in SUPER_BLOCK_FORMATS else decode_blocks
    return decode(format_name, raw, shape)


def _open_file(path: Path) -> "_Header":
    header = _map_file(path)
    header.parse(*header.preamble())
    return header


def _map_file(path: Path) -> "_Header":
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise FormatError(f"{path}: {size} bytes are too few for a GGUF header; download the file again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return _Header(data, path)


def _open_parts(path: Path) -> "list[_Header]":
    """The file, or every part of the set it belongs to, in order: all there, each saying the same of the set."""
    opened = _open_file(path)
    num_parts = _split_number(opened, "split.count", 1)
    if num_parts <= 1:
        return [opened]
    at = _split_number(opened, "split.no")
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None or (int(match["part"]), int(match["count"])) != (at + 1, num_parts):
        raise FormatError(
            f"{path}: split.no={at} and split.count={num_parts}, so its name must end in"
            f" -{at + 1:05d}-of-{num_parts:05d}.gguf: give all parts the names they were published with"
        )
    paths = [path.with_name(f"{match['stem']}-{i + 1:05d}-of-{num_parts:05d}.gguf") for i in range(num_parts)]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        names = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
        raise FormatError(
            f"{path}: one of {num_parts} parts, and {len(missing)} are not beside it: {names}; download them to"
            f" {path.parent}"
        )
    files = [opened if i == at else _open_file(part) for i, part in enumerate(paths)]
    num_tensors = sum(len(file.tensors) for file in files)
    for i, file in enumerate(files):
        expected = {"split.no": i, "split.count": num_parts, "split.tensors.count": num_tensors}
        for key, number in expected.items():
            if _split_number(file, key) != number:
                raise FormatError(
                    f"{file.path}: {key}={file.metadata[key]}, expected {number} ({num_parts} parts that hold"
                    f" {num_tensors} tensors): these parts do not belong together, download all of them again"
                )
    return files


def _split_number(file: "_Header", key: str, default: int | None = None) -> int:
    number = file.metadata.get(key, default)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise FormatError(
            f"{file.path}: {key}={number!r}; a part of a split model has a whole number there: download it again"
        )
    return number


def survey(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Metadata and tensors of one file that need not be readable: of any type, or listed before the damage begins.

    A tensor of an unknown type counts 0 bytes. Raises FormatError and UnsupportedError for what is no GGUF file.
    """
    header = _map_file(path)
    num_tensors, num_entries = header.preamble()
    with suppress(StropError):
        header.parse(num_tensors, num_entries, refuse=False)
    return header.metadata, header.tensors


def _block_of(type_id: int) -> tuple[str, int, int]:
    """A tensor type's name, and the weights and bytes of one block (a dense type's are single weights)."""
    name = _TENSOR_TYPES.get(type_id)
    if name is None:
        return _UNREAD_TYPES.get(type_id, ("unknown", 1, 0))
    if name in DENSE_DTYPES:
        return name, 1, DENSE_DTYPES[name].itemsize
    if name in BLOCK_FORMATS:
        return name, GROUP_LEN, BLOCK_FORMATS[name].block_bytes
    return name, SUPER_LEN, SUPER_BLOCK_FORMATS[name].block_bytes


class _Header:
    """Parses forward from byte 0 (`preamble`, then `parse`); `position` never passes the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.size = data, path, len(data)
        self.position = 0
        self.num_items = 0
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self.extents: dict[str, _Extent] = {}

    def parse(self, num_tensors: int, num_entries: int, *, refuse: bool = True) -> None:
        """Fills in metadata, tensors and extents; without `refuse` no extents, and tensors of any type."""
        for _ in range(num_entries):
            key = self._string("a metadata key")
            if key in self.metadata:
                self._damaged(f"the metadata key {key!r} appears twice")
            self.metadata[key] = self._value(self._u32("a value type"), key)
        offsets = {}
        for _ in range(num_tensors):
            name, offset = self._tensor(refuse)
            offsets[name] = offset
        if refuse:
            self._locate(offsets)

    def _damaged(self, cause: str) -> NoReturn:
        raise FormatError(f"{self.path}: {cause}; the file is damaged, download it again")

    def _take(self, num_bytes: int, what: str) -> int:
        """Claims the next `num_bytes` and returns where they start."""
        start = self.position
        if num_bytes > self.size - start:
            self._damaged(f"{what} at byte {start} needs {num_bytes} bytes and {self.size - start} are left")
        self.position = start + num_bytes
        return start

    def _u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.data, self._take(4, what))[0])

    def _u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.data, self._take(8, what))[0])

    def _string(self, what: str) -> str:
        length = self._u64(what)
        start = self._take(length, what)
        try:
            return self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError as error:
            self._damaged(f"{what} at byte {start} is not UTF-8 ({error.reason})")

    def preamble(self) -> tuple[int, int]:
        """The numbers of tensors and of metadata entries."""
        if self.data[:4] != MAGIC:
            raise FormatError(f"{self.path}: starts with {self.data[:4]!r}, not {MAGIC!r}: this is not a GGUF file")
        self.position = 4
        version = self._u32("the version")
        if version in (0x02000000, 0x03000000):
            raise UnsupportedError(
                f"{self.path}: a big-endian GGUF file; Strop reads little-endian ones: convert it again without"
                " the big-endian option"
            )
        if version not in (2, 3):
            raise UnsupportedError(f"{self.path}: GGUF version {version}; versions 2 and 3 are read: convert it again")
        num_tensors, num_entries = self._u64("the tensor count"), self._u64("the metadata count")
        for count, least, what in (
            (num_tensors, _MIN_TENSOR_BYTES, "tensors"),
            (num_entries, _MIN_ENTRY_BYTES, "metadata entries"),
        ):
            if count > (self.size - self.position) // least:
                self._damaged(f"claims {count} {what}, more than its {self.size} bytes can hold")
        return num_tensors, num_entries

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _SCALARS:
            code = _SCALARS[kind]
            return code.unpack_from(self.data, self._take(code.size, key))[0]
        if kind == _BOOL:
            return self._bool(self.data[self._take(1, key)], key)
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key, depth + 1)
        self._damaged(f"{key!r} has the unknown value type {kind}")

    def _bool(self, byte: int, key: str) -> bool:
        if byte > 1:
            self._damaged(f"{key!r} holds {byte} where a boolean is 0 or 1")
        return bool(byte)

    def _array(self, key: str, depth: int) -> list[Any]:
        kind, count = self._u32(key), self._u64(key)
        if kind not in _MIN_VALUE_BYTES:
            self._damaged(f"{key!r} is an array of the unknown value type {kind}")
        if depth > MAX_ARRAY_DEPTH:
            self._damaged(f"{key!r} nests arrays deeper than {MAX_ARRAY_DEPTH}")
        if count > (self.size - self.position) // _MIN_VALUE_BYTES[kind]:
            self._damaged(f"{key!r} claims {count} elements, more than the file can hold")
        self.num_items += count
        if self.num_items > MAX_METADATA_ITEMS:
            self._damaged(f"{key!r} takes the metadata past {MAX_METADATA_ITEMS} array elements")
        if kind == _STRING:
            return self._strings(key, count)
        if kind == _ARRAY:
            return [self._array(key, depth + 1) for _ in range(count)]
        if kind == _BOOL:
            start = self._take(count, key)
            return [self._bool(byte, key) for byte in self.data[start : start + count]]
        code = _SCALARS[kind]
        start = self._take(count * code.size, key)
        items: list[Any] = np.frombuffer(self.data, code.format, count, start).tolist()
        return items

    def _strings(self, key: str, count: int) -> list[str]:
        """The hot loop of opening a file (100,000 strings): `_string`, inlined."""
        data, size, position, unpack = self.data, self.size, self.position, _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                (length,) = unpack(data, position)
                position += 8
                if length > size - position:
                    raise struct.error
                strings.append(data[position : position + length].decode("utf-8"))
                position += length
        except struct.error:
            self._damaged(f"a string of {key!r} at byte {position} passes the end of the file")
        except UnicodeDecodeError as error:
            self._damaged(f"a string of {key!r} at byte {position} is not UTF-8 ({error.reason})")
        self.position = position
        return strings

    def _tensor(self, refuse: bool) -> tuple[str, int]:
        """Parses one tensor's entry; returns its name and offset into the data section."""
        name = self._string("a tensor name")
        if name in self.tensors:
            self._damaged(f"the tensor {name!r} appears twice")
        num_dims = self._u32(name)
        if not 1 <= num_dims <= MAX_DIMS:
            self._damaged(f"the tensor {name!r} has {num_dims} dimensions; 1 to {MAX_DIMS} are possible")
        shape = tuple(self._u64(name) for _ in range(num_dims))[::-1]
        type_id = self._u32(name)
        offset = self._u64(name)
        num_elements = 1
        for dim in shape:
            num_elements *= dim
        if num_elements == 0 or num_elements > self.size * 8:
            self._damaged(f"the tensor {name!r} has shape {shape}, which {self.size} bytes cannot hold")
        format_name, block_len, block_bytes = _block_of(type_id)
        if refuse:
            self._refuse_unread(name, shape, type_id)
        self.tensors[name] = TensorInfo(name, shape, format_name, num_elements // block_len * block_bytes)
        return name, offset

    def _refuse_unread(self, name: str, shape: tuple[int, ...], type_id: int) -> None:
        format_name, block_len, _ = _block_of(type_id)
        if type_id not in _TENSOR_TYPES:
            raise UnsupportedError(
                f"{self.path}: the tensor {name!r} has type {type_id} ({format_name}); supported are"
                f" {', '.join(_TENSOR_TYPES.values())}: use a file with one of these types"
            )
        if shape[-1] % block_len:
            self._damaged(f"the {format_name} tensor {name!r} has rows of {shape[-1]}, not whole blocks of {block_len}")
        if block_len > 1 and len(shape) not in (2, 3):
            raise UnsupportedError(
                f"{self.path}: the {format_name} tensor {name!r} has {len(shape)} dimensions; quantised tensors with 2"
                " or 3 are read: use a dense file"
            )

    def _locate(self, offsets: dict[str, int]) -> None:
        """Checks that every tensor lies in the data section, aligned, and that none overlap."""
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self._damaged(f"general.alignment={alignment!r}; a power of two from 8 to {MAX_ALIGNMENT} is possible")
        data_start = -(-self.position // alignment) * alignment
        end, previous = 0, ""
        for name in sorted(offsets, key=offsets.__getitem__):
            offset, num_bytes = offsets[name], self.tensors[name].num_bytes
            if offset % alignment:
                self._damaged(f"the tensor {name!r} starts at offset {offset}, not a multiple of {alignment}")
            if offset < end:
                self._damaged(f"the tensors {previous!r} and {name!r} overlap")
            end, previous = offset + num_bytes, name
            if end > self.size - data_start:
                left = max(0, self.size - data_start)
                self._damaged(f"the tensor {name!r} ends at byte {end} of the data section, which has {left}")
            self.extents[name] = _Extent(data_start + offset, num_bytes)
