"""Checkpoint -> ModelSpec, and its tensors as canonical parameters: renamed, re-ordered, checked."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.artifact import ArtifactCheckpoint
from strop.formats.checkpoint import AnyCheckpoint
from strop.formats.gguf import GGUFCheckpoint
from strop.formats.hf import READABLE_FORMATS, HFCheckpoint
from strop.formats.values import DENSE_DTYPES, GroupQuantized, TensorValue, dense
from strop.models.from_gguf import ROPE_FACTORS, family_from_gguf, spec_from_gguf
from strop.models.from_hf import family_from_hf, spec_from_hf
from strop.models.names import NameMap
from strop.models.params import ParamInfo, check_spec, inventory
from strop.models.spec import ModelSpec


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """The spec as JSON-ready data."""
    data: dict[str, Any] = msgspec.to_builtins(spec)
    return data


def spec_from_json(data: Mapping[str, Any]) -> ModelSpec:
    """The inverse of `spec_to_json`. Raises UnsupportedError when the data is no spec this version knows."""
    try:
        spec = msgspec.convert(data, ModelSpec)
    except msgspec.ValidationError as error:
        raise UnsupportedError(f"the artifact's spec is not one this Strop knows ({error}): make it again") from error
    if msgspec.json.decode(msgspec.json.encode(spec)) != msgspec.json.decode(msgspec.json.encode(data)):
        raise UnsupportedError("the artifact's spec has keys this Strop does not know: use the Strop that made it")
    return check_spec(spec)


def load_spec(checkpoint: AnyCheckpoint) -> ModelSpec:
    """The network a checkpoint describes. Raises UnsupportedError naming what Strop cannot do."""
    if isinstance(checkpoint, ArtifactCheckpoint):
        return spec_from_json(checkpoint.spec)
    if isinstance(checkpoint, HFCheckpoint):
        return spec_from_hf(checkpoint.config)
    family_from_gguf(checkpoint.metadata)
    factors = {name: dense(checkpoint.read(name)) for name in ROPE_FACTORS if name in checkpoint.tensors}
    return spec_from_gguf(checkpoint.metadata, checkpoint.tensors, factors)


class ParameterReader:
    """Reads parameters by path, as `inventory(spec)` lists them, whatever the checkpoint calls and orders them.

    Opening checks names, shapes and formats of all tensors, reading checks the numbers. Raises FormatError for missing
    tensors and wrong shapes, UnsupportedError for tensors the spec has no place for; both name every one of them.
    """

    def __init__(self, checkpoint: AnyCheckpoint, spec: ModelSpec) -> None:
        self.checkpoint, self.spec = checkpoint, spec
        self.inventory: dict[str, ParamInfo] = inventory(spec)
        self._names = _name_map(checkpoint)
        self._tensor_names = {path: self.tensor_name(path) for path in self.inventory}
        self._paths: dict[str, list[str]] = {}
        for path, name in self._tensor_names.items():
            self._paths.setdefault(name, []).append(path)
        self._num_stacked = {name: _num_stacked(paths) for name, paths in self._paths.items()}
        """How many experts or heads a tensor holds along its first axis; 0 if it has no such axis."""
        self._last: tuple[str, TensorValue] | None = None  # a tensor of many parameters is decoded once
        self._check_names()
        self._check_infos()

    def tensor_name(self, path: str) -> str:
        """The checkpoint's own name of a parameter."""
        return path if self._names is None else self._names.tensor_name(path)

    def _check_names(self) -> None:
        present = self.checkpoint.tensors
        missing = [name for name in self._paths if name not in present]
        if missing:
            raise FormatError(
                f"{self.checkpoint.path}: tensors are missing: {', '.join(missing)}; the file is incomplete or its"
                " config belongs to another model: download it again"
            )
        wanted = set(self._tensor_names.values())
        unexpected = [
            name for name in present if name not in wanted and not (self._names and self._names.is_ignored(name))
        ]
        if self.spec.tied_embeddings and self._names is not None and self._names.names["head"] in unexpected:
            self._check_tied_head(self._names.names["head"])
            unexpected.remove(self._names.names["head"])
        if isinstance(self.checkpoint, HFCheckpoint):
            unexpected = [name for name in unexpected if not self.checkpoint.is_empty_bias(name)]
        if unexpected:
            raise UnsupportedError(
                f"{self.checkpoint.path}: tensors that a model with this config does not have: {', '.join(unexpected)};"
                " ignoring them would change its answers: use a checkpoint of a supported model"
            )

    def _check_tied_head(self, head_name: str) -> None:
        """Old files store a tied head a second time; that is harmless only if it is the same matrix."""
        embed_name = self._tensor_names["embed"]
        head, embed = self.checkpoint.read(head_name), self.checkpoint.read(embed_name)
        if head.shape != embed.shape or not np.array_equal(dense(head), dense(embed)):
            raise UnsupportedError(
                f"{self.checkpoint.path}: the config ties the head to the embedding, yet {head_name!r} and"
                f" {embed_name!r} differ: set tie_word_embeddings to what the model was trained with"
            )

    def _check_infos(self) -> None:
        for name, paths in self._paths.items():
            info, expected = self.checkpoint.tensors[name], self._expected_shape(name)
            if info.shape != expected:
                axes = " x ".join(self.inventory[paths[0]].axes)
                parts = f" of each of {len(paths)} parameters" if len(paths) > 1 else ""
                raise FormatError(
                    f"{self.checkpoint.path}: the tensor {name!r} has shape {info.shape}, expected {expected}"
                    f" ({axes}{parts}); the file is damaged or its config belongs to another model"
                )
            if isinstance(self.checkpoint, HFCheckpoint) and info.format not in READABLE_FORMATS:
                raise UnsupportedError(
                    f"{self.checkpoint.path}: the tensor {name!r} has dtype {info.format}; supported are"
                    f" {', '.join(DENSE_DTYPES)}: use an unquantised checkpoint, or a GGUF file"
                )

    def _expected_shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor as the checkpoint stores it."""
        num_experts = self._num_stacked[name]
        shapes = [self.inventory[path].shape for path in self._paths[name]]
        shape = (sum(shape[0] for shape in shapes) // max(1, num_experts), *shapes[0][1:])
        shape = shape[::-1] if self._is_transposed(name) else shape
        return (num_experts, *shape) if num_experts else shape

    def _is_transposed(self, name: str) -> bool:
        return self._names is not None and self._names.is_transposed(name)

    def read(self, path: str) -> TensorValue:
        """The parameter's exact value. Raises FormatError when it, or one of its scales, is not finite."""
        value = self._read(path)
        if self._names is not None and self._names.adjacent_rotary_pairs:
            return self._with_halves_apart(path, value)
        return value

    def _read(self, path: str) -> TensorValue:
        name = self._tensor_names[path]
        if self._num_stacked[name]:
            return self._read_stacked(path, name)
        if self._last is None or self._last[0] != name:
            self._last = name, self._read_tensor(name)
        value = self._last[1]
        paths = self._paths[name]
        if len(paths) > 1:
            rows = self._rows_of(path, paths)
            value = value.take_rows(rows) if isinstance(value, GroupQuantized) else value[rows]
        else:
            self._last = None
        return value

    def _read_stacked(self, path: str, name: str) -> TensorValue:
        """A parameter of one expert or head, of the tensor that holds those of all."""
        assert not isinstance(self.checkpoint, ArtifactCheckpoint), "an artifact has a tensor per parameter"
        _, _, _, expert, role = path.split(".")
        value = self._checked(name, self.checkpoint.read_part(name, int(expert)))
        if len(self._paths[name]) == self._num_stacked[name]:
            return value
        is_up, num_rows = role.startswith("up"), value.shape[0]  # with the gate
        alternate = self._names is not None and self._names.alternating_gates
        rows = slice(int(is_up), None, 2) if alternate else slice(num_rows // 2 * is_up, num_rows // 2 * (1 + is_up))
        return value.take_rows(rows) if isinstance(value, GroupQuantized) else value[rows]

    def outline(self, path: str) -> TensorValue:
        """One row of zeros in the matrix's form; its tensor is not read."""
        return self.checkpoint.outline(self._tensor_names[path])

    def _read_tensor(self, name: str) -> TensorValue:
        return self._checked(name, self.checkpoint.read(name))

    def _checked(self, name: str, value: TensorValue) -> TensorValue:
        """The value as [out, in]. Raises FormatError when it is not finite."""
        finite = value.is_finite() if isinstance(value, GroupQuantized) else np.isfinite(value).all()
        if not finite:
            raise FormatError(
                f"{self.checkpoint.path}: the tensor {name!r} holds NaN or infinity; the file is damaged, download"
                " it again"
            )
        if isinstance(value, np.ndarray) and self._is_transposed(name):
            return np.ascontiguousarray(value.T)
        return value

    def _rows_of(self, path: str, paths: list[str]) -> slice | np.ndarray:
        """Which rows of a tensor, that holds all of `paths`, are this parameter's."""
        role = path.rpartition(".")[2]
        if self._names is not None and self._names.qkv_by_group and role[0] in "qkv" and len(paths) == 3:
            heads = self.spec.layers[int(path.split(".")[1])].attention
            group = heads.num_heads // heads.num_kv_heads
            shape = heads.num_kv_heads, group + 2, heads.head_dim
            by_group = np.arange(math.prod(shape)).reshape(shape)
            part = {"q": slice(0, group), "k": slice(group, group + 1), "v": slice(group + 1, None)}[role[0]]
            return by_group[:, part].reshape(-1)
        begin = sum(self.inventory[other].shape[0] for other in paths[: paths.index(path)])
        return slice(begin, begin + self.inventory[path].shape[0])

    def read_all(self) -> Iterable[tuple[str, TensorValue]]:
        """(path, value) of every parameter, one at a time."""
        for path in self.inventory:
            yield path, self.read(path)

    def _with_halves_apart(self, path: str, value: TensorValue) -> TensorValue:
        """Undoes the row order of GGUF's llama converter: rows (2j, 2j + 1) of a head become (j, j + H // 2)."""
        if not _OF_QUERIES_OR_KEYS.fullmatch(path):
            return value
        attention = self.spec.layers[int(path.split(".")[1])].attention
        num_heads = value.shape[0] // attention.head_dim
        rows = np.arange(num_heads * attention.head_dim).reshape(num_heads, attention.head_dim)
        rotary_dim = attention.head_dim if attention.rope is None else attention.rope.rotary_dim
        pairs = rows[:, :rotary_dim].reshape(num_heads, rotary_dim // 2, 2)
        rows[:, :rotary_dim] = pairs.swapaxes(1, 2).reshape(num_heads, rotary_dim)
        order = rows.reshape(-1)
        return value.take_rows(order) if isinstance(value, GroupQuantized) else value[order]


_OF_QUERIES_OR_KEYS = re.compile(r"layers\.\d+\.(heads\.\d+\.)?[qk](_norm)?(_bias)?")
"""Parameters with a row, or an element, for each dimension of some heads."""


def _num_stacked(paths: list[str]) -> int:
    """How many experts or heads a tensor of these parameters has along its first axis; 0 if it has no such axis."""
    is_stacked = len(paths) > 1 and (".experts." in paths[0] or ".heads." in paths[0])
    return len({path.split(".")[3] for path in paths}) if is_stacked else 0


def _name_map(checkpoint: AnyCheckpoint) -> NameMap | None:
    """The checkpoint's naming; None for an artifact, which uses parameter paths."""
    if isinstance(checkpoint, GGUFCheckpoint):
        gguf = family_from_gguf(checkpoint.metadata).gguf
        return None if gguf is None else gguf.names.for_tensors(checkpoint.tensors)
    if isinstance(checkpoint, HFCheckpoint):
        return family_from_hf(checkpoint.config).names.for_tensors(checkpoint.tensors)
    return None
