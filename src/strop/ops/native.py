"""The native library: found, loaded, its FFI targets registered with jax. Absent is a state, not an error."""

import ctypes
import logging
import os
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

log = logging.getLogger(__name__)

_NAME = "libstrop_native.so"
_TARGETS = ("strop_program", "strop_allocate")


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None without one (no compiler at install time, or a CPU that runs none of its ISAs).

    `STROP_NATIVE=0` hides it, `STROP_ISA=avx2|avx512_vnni|avx512_bf16|...` forces one of its instruction sets.
    """
    path = library_path()
    if os.environ.get("STROP_NATIVE") == "0" or path is None:
        return None
    lib = ctypes.CDLL(str(path))
    lib.strop_isa.restype = ctypes.c_char_p
    lib.strop_num_starved.restype = ctypes.c_int64
    missing = [name for name in (*_TARGETS, "strop_bind") if not hasattr(lib, name)]
    if missing:
        log.warning("%s is left out: it lacks %s and so is of another version; build it again", path, missing[0])
        return None
    return lib if lib.strop_isa() else None


def library_path() -> Path | None:
    """Where the library lies, if it was built."""
    beside = Path(__file__).with_name(_NAME)
    if beside.exists():
        return beside
    try:  # an editable install keeps built files apart from the sources
        installed = Path(str(distribution("strop").locate_file(f"strop/ops/{_NAME}")))
    except PackageNotFoundError:
        return None
    return installed if installed.exists() else None


@cache
def register() -> bool:
    """Registers the kernels with jax (once); False without the library."""
    lib = library()
    if lib is None:
        return False
    import jax

    for name in _TARGETS:
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(lib, name)), platform="cpu")
    return True


def isa() -> str | None:
    """The instruction set the kernels run on, e.g. "avx512_bf16"; None without the library."""
    lib = library()
    return lib.strop_isa().decode() if lib is not None else None


ISAS = ("amx", "avx512_bf16", "avx512_vnni", "avx2", "amx_emulated")
"""Every instruction set the library has kernels for, best first; the last runs AMX's part in plain code, for tests."""


def select_isa(name: str) -> bool:
    """Switches the kernels to an instruction set, between steps; False when this machine does not run it."""
    lib = library()
    return lib is not None and bool(lib.strop_select_isa(name.encode()))


def set_num_threads(num_threads: int) -> None:
    """Sizes the process-wide pool, the calling thread included."""
    lib = library()
    if lib is not None:
        lib.strop_set_num_threads(num_threads)
