"""A checkpoint is anything that lists named tensors and can read one: GGUF file, Hugging Face folder, our artifact."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from strop.core.errors import FormatError, UnsupportedError
from strop.formats.artifact import MANIFEST, ArtifactCheckpoint
from strop.formats.foreign import kind_of_files
from strop.formats.gguf import MAGIC, GGUFCheckpoint, set_name
from strop.formats.hf import HFCheckpoint
from strop.formats.hub import fetch, parse_hub_id
from strop.formats.values import TensorInfo, TensorValue


class Checkpoint(Protocol):
    """What loading needs of a model file or folder."""

    path: Path

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor the checkpoint holds, by its own name for it."""

    def read(self, name: str) -> TensorValue:
        """The exact value of one tensor."""

    def outline(self, name: str) -> TensorValue:
        """One row of zeros in the form that `read` gives the matrix `name`: known without reading it."""

    def source_hash(self) -> str:
        """Hex SHA-256 that changes whenever config or weights change."""


AnyCheckpoint = GGUFCheckpoint | HFCheckpoint | ArtifactCheckpoint


def open_checkpoint(model: str | Path) -> AnyCheckpoint:
    """Opens a GGUF file, an artifact, a Hugging Face folder, a folder with one GGUF model, or a Hub id.

    A Hub id is `org/name`, with `@revision` (a branch, tag or commit) and `:TYPE` for one of many GGUF models.

    Raises FormatError or UnsupportedError that says what was found instead and what to do.
    """
    path = Path(model).expanduser()
    try:
        if path.exists():
            return _open(path)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}): check the file and its permissions") from error
    hub_model = parse_hub_id(str(model))
    if hub_model is None:
        raise FormatError(
            f"{model}: no such file or folder; pass a GGUF file, a folder with config.json and model.safetensors, an"
            " artifact folder, or a Hub id such as org/name, org/name@revision or org/name:Q4_K_M"
        )
    return _open(fetch(hub_model))


def _open(path: Path) -> AnyCheckpoint:
    return _open_folder(path) if path.is_dir() else _open_file(path)


def _open_file(path: Path) -> AnyCheckpoint:
    with path.open("rb") as file:
        start = file.read(4)
    if start == MAGIC or path.suffix == ".gguf":
        return GGUFCheckpoint(path)
    if path.name in ("config.json", "model.safetensors", "model.safetensors.index.json", MANIFEST):
        raise UnsupportedError(f"{path}: one file of a model folder: pass the folder, {path.parent}")
    raise UnsupportedError(f"{path}: not a GGUF file (it starts with {start!r}); a single file must be GGUF")


def _open_folder(path: Path) -> AnyCheckpoint:
    if (path / MANIFEST).is_file():
        return ArtifactCheckpoint(path)
    files = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() and (not files or any(path.glob("*.safetensors"))):
        return HFCheckpoint(path)
    if len({set_name(file) for file in files}) == 1:
        return GGUFCheckpoint(files[0])
    if files:
        names = ", ".join(file.name for file in files[:8])
        raise UnsupportedError(f"{path}: holds {len(files)} GGUF files ({names}): pass the path of one of them")
    if kind := kind_of_files(file.name for file in path.iterdir()):
        raise UnsupportedError(f"{path}: {kind}")
    if snapshots := sorted((path / "snapshots").glob("*/")):
        raise UnsupportedError(
            f"{path}: where the Hub's cache keeps a model: pass one of its snapshots, {snapshots[0]}"
        )
    raise FormatError(
        f"{path}: a folder without a model: neither {MANIFEST}, config.json nor a .gguf file is in it; pass the folder"
        " that holds them"
    )
