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

from strop.ops.program import Program, is_native, string, type_of

_MESSAGE_BYTES = 256


class _View(NamedTuple):
    """A contiguous part of an argument: which leaf, and where in it."""

    leaf: int
    offset_bytes: int


class BoundProgram:
    """Takes the leaves of the arguments after `kept`; returns numpy arrays, and the very array it writes in place.

    Shapes and types must be those it was bound for: nothing checks them again. The next call overwrites the results.
    Not thread-safe.
    """

    def __init__(
        self, library: ctypes.CDLL, program: Program, views: dict[Any, _View], outs: list[Any], kept: Sequence[Any]
    ) -> None:
        num_leaves = 1 + max(view.leaf for view in views.values())
        made = {
            i: np.empty(var.aval.shape, var.aval.dtype)
            for i, var in enumerate(program.outs)
            if i not in program.in_place.values()
        }
        operands = [views[var] for var in program.operands]
        aliased = {result: operands[i].leaf - len(kept) for i, result in program.in_place.items()}
        order = [program.outs.index(var) for var in outs]
        self._outs = [(aliased.get(i), made.get(i)) for i in order]  # which leaf, or which array
        self._kept, self._made = list(kept), made
        self._addresses = np.zeros(len(program.operands) + len(program.outs), np.int64)
        self._places: list[list[tuple[int, int]]] = [
            [] for _ in range(num_leaves)
        ]  # of a leaf: slots, and offsets of their views
        for slot, view in enumerate(operands):
            self._places[view.leaf].append((slot, view.offset_bytes))
            if slot in program.in_place:
                self._places[view.leaf].append((len(operands) + program.in_place[slot], view.offset_bytes))
        for i, array in made.items():
            self._addresses[len(operands) + i] = _address(array)
        for leaf, array in enumerate(kept):
            self._place(leaf, array)
        self._places = self._places[len(kept) :]
        self._last: list[Any] = [None] * len(self._places)
        avals = [var.aval for var in (*program.operands, *program.outs)]
        types = np.array([type_of(aval) for aval in avals], np.int32)
        ranks = np.array([len(aval.shape) for aval in avals], np.int32)
        dims = np.array([dim for aval in avals for dim in aval.shape], np.int64)
        library.strop_bind.restype = ctypes.c_void_p
        handle = ctypes.c_void_p(
            library.strop_bind(
                len(program.operands),
                len(program.outs),
                types.ctypes,
                ranks.ctypes,
                dims.ctypes,
                program.code.ctypes,
                ctypes.c_int64(program.code.size),
                ctypes.c_int64(program.scratch_bytes),
            )
        )
        weakref.finalize(self, library.strop_unbind, handle)
        self._message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        pointers = ctypes.c_void_p(self._addresses.ctypes.data)
        self._run = partial(library.strop_run_bound, handle, pointers, self._message, ctypes.c_int64(_MESSAGE_BYTES))

    def __call__(self, *leaves: Any) -> list[Any]:
        """Runs the program.

        Raises:
            RuntimeError: it refused its operands, and changed nothing.
        """
        for i, leaf in enumerate(leaves):
            if leaf is not self._last[i]:
                self._place(i, leaf)
                self._last[i] = leaf
        if self._run():
            raise RuntimeError(self._message.value.decode(errors="replace"))
        return [made if leaf is None else leaves[leaf] for leaf, made in self._outs]

    def _place(self, leaf: int, array: Any) -> None:
        address = _address(array)
        for slot, offset_bytes in self._places[leaf]:
            self._addresses[slot] = address + offset_bytes


def bind_native(
    library: ctypes.CDLL, function: Callable[..., Any], kept: Sequence[Any], *args: Any
) -> BoundProgram | None:
    """`function(kept, *args)` for arguments like these; None if it is more than native operations on parts of them."""
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
    program = string(native, {id(var) for var in jaxpr.outvars})
    if not set(program.operands) <= views.keys() or not all(var in program.outs for var in jaxpr.outvars):
        return None
    return BoundProgram(library, program, views, jaxpr.outvars, jax.tree.leaves(kept))


def _view_of(eqn: Any, views: dict[Any, _View]) -> _View | None:
    """The part of an argument that a slice or a reshape of such a part is, where that is contiguous."""
    var, out = eqn.invars[0], eqn.outvars[0]
    if len(eqn.invars) > 1 or isinstance(var, Literal) or var not in views:
        return None
    if eqn.primitive.name in ("reshape", "squeeze"):
        return views[var]
    shape, params = var.aval.shape, eqn.params
    if eqn.primitive.name != "slice" or params["strides"] is not None or out.aval.shape[1:] != shape[1:]:
        return None
    leaf, offset_bytes = views[var]
    row_bytes = math.prod(shape[1:]) * var.aval.dtype.itemsize
    return _View(leaf, offset_bytes + params["start_indices"][0] * row_bytes)


def _address(array: Any) -> int:
    if isinstance(array, np.ndarray):
        return int(array.ctypes.data)
    return int(array.block_until_ready().unsafe_buffer_pointer())
