"""Functions that are one native program, called without XLA: a step then pays for a call and not for a dispatch."""

import ctypes
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from strop.ops.program import Program, is_native, string, type_of, variables

_MESSAGE_BYTES = 256


class _View(NamedTuple):
    """A contiguous part of an argument: which leaf, and where in it."""

    leaf: int
    offset_bytes: int


class BoundProgram:
    """Takes the leaves of the arguments after `kept`; returns numpy arrays, and the very array it writes in place.

    The next call overwrites the results. Not thread-safe.
    """

    def __init__(
        self, library: ctypes.CDLL, program: Program, views: dict[Any, _View], outs: list[Any], kept: Sequence[Any]
    ) -> None:
        operands = [views[var] for var in program.operands]
        num_operands, in_place = len(operands), program.in_place
        self._kept = list(kept)
        self._addresses = np.zeros(num_operands + len(program.outs), np.int64)
        # Where the address of each leaf goes, offset to the view of it.
        self._places: dict[int, list[tuple[int, int]]] = {}
        for slot, (leaf, offset_bytes) in enumerate(operands):
            places = self._places.setdefault(leaf, [])
            places.append((slot, offset_bytes))
            if slot in in_place:
                places.append((num_operands + in_place[slot], offset_bytes))
        for leaf, array in enumerate(kept):
            self._place(leaf, array)
        results: dict[int, np.ndarray | int] = {result: operands[slot].leaf for slot, result in in_place.items()}
        for i, var in enumerate(program.outs):
            if i not in results:
                made = results[i] = np.empty(var.aval.shape, var.aval.dtype)
                self._addresses[num_operands + i] = made.ctypes.data
        self._written = {leaf for leaf in results.values() if isinstance(leaf, int)}
        self._results = [results[program.outs.index(var)] for var in outs]
        """An array, or the leaf that was written in place."""
        self._last: dict[int, Any] = {}
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        pointers = ctypes.c_void_p(self._addresses.ctypes.data)
        handle = _bind(library, program)
        weakref.finalize(self, library.strop_unbind, handle)
        self._run = partial(library.strop_run_bound, handle, pointers, self._message, ctypes.c_int64(_MESSAGE_BYTES))

    def __call__(self, *leaves: Any) -> list[Any]:
        """Runs the program.

        Raises:
            RuntimeError: it refused its operands, and changed nothing; or one of them was deleted.
        """
        first = len(self._kept)
        for i, leaf in enumerate(leaves, first):
            last: Any = self._last.get(i)
            if leaf is not last or (i in self._written and leaf.is_deleted()):  # its address is asked for: that raises
                self._place(i, leaf)
                self._last[i] = leaf
        if self._run():
            raise RuntimeError(self._message.value.decode(errors="replace"))
        return [leaves[result - first] if isinstance(result, int) else result for result in self._results]

    def _place(self, leaf: int, array: Any) -> None:
        address = _address(array)
        for slot, offset_bytes in self._places.get(leaf, ()):
            self._addresses[slot] = address + offset_bytes


def _bind(library: ctypes.CDLL, program: Program) -> ctypes.c_void_p:
    """The program in the library's memory."""
    avals = [var.aval for var in (*program.operands, *program.outs)]
    types = np.array([type_of(aval) for aval in avals], np.int32)
    ranks = np.array([len(aval.shape) for aval in avals], np.int32)
    dims = np.array([dim for aval in avals for dim in aval.shape], np.int64)
    arrays = [array.ctypes for array in (types, ranks, dims, program.code)]
    sizes = [ctypes.c_int64(program.code.size), ctypes.c_int64(program.scratch_bytes)]
    library.strop_bind.restype = ctypes.c_void_p
    return ctypes.c_void_p(library.strop_bind(len(program.operands), len(program.outs), *arrays, *sizes))


def bind_native(
    library: ctypes.CDLL, function: Callable[..., Any], kept: Sequence[Any], *args: Any
) -> BoundProgram | None:
    """`function(kept, *args)` for arguments of these shapes and types, which nothing checks again.

    None if it is more than native operations on parts of its arguments.
    """
    if not all(_is_plain(leaf) for leaf in jax.tree.leaves((kept, args))):
        return None
    jaxpr = jax.make_jaxpr(function)(kept, *args).jaxpr
    views = {var: _View(i, 0) for i, var in enumerate(jaxpr.invars)}
    native = []
    for eqn in jaxpr.eqns:
        if is_native(eqn):
            native.append(eqn)
            continue
        view = _view_of(eqn, views)
        if view is None:
            return None
        views[eqn.outvars[0]] = view
    program = string(native, variables(jaxpr.outvars))
    if not views.keys() >= set(program.operands) or any(
        isinstance(var, Literal) or var not in program.outs for var in jaxpr.outvars
    ):
        return None
    return BoundProgram(library, program, views, jaxpr.outvars, jax.tree.leaves(kept))


def _view_of(eqn: Any, views: dict[Any, _View]) -> _View | None:
    """The part of an argument that a slice or a reshape of such a part is, where that is contiguous."""
    if len(eqn.invars) != 1 or not variables(eqn.invars).keys() <= views.keys():
        return None
    (var,), (out,) = eqn.invars, eqn.outvars
    if eqn.primitive.name in ("reshape", "squeeze"):
        return views[var]
    shape, params = var.aval.shape, eqn.params
    if eqn.primitive.name != "slice" or params["strides"] is not None or out.aval.shape[1:] != shape[1:]:
        return None
    leaf, offset_bytes = views[var]
    row_bytes = math.prod(shape[1:]) * var.aval.dtype.itemsize
    return _View(leaf, offset_bytes + params["start_indices"][0] * row_bytes)


def _is_plain(array: Any) -> bool:
    """Whether it lies in memory as jax describes it."""
    if not isinstance(array, np.ndarray):
        return isinstance(array, jax.Array)
    return array.flags.c_contiguous and array.dtype == jax.dtypes.canonicalize_dtype(array.dtype)


def _address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.block_until_ready().unsafe_buffer_pointer())
