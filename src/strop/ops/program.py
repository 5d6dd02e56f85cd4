"""Native operations as programs: one call into the library for as many of them as follow one another.

Each operation is traced as a program of its own, so that the decoder needs to know nothing of this; `string_calls` then
strings the programs of a whole function together. What lies between two operations of a program is memory of the
library's, and XLA neither sees it nor pays for it.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

_TARGET = "strop_program"
_KINDS = ("linear", "embed", "attention", "sample", "greedy", "norm")  # as native/ffi/program.cpp numbers them
_TYPES = tuple(np.dtype(name) for name in ("float32", "int32", "uint32", jax.numpy.bfloat16, "uint8"))
_ALIGN = 64
_DEBUG_INFO = jax.make_jaxpr(lambda: ())().jaxpr.debug_info


class _Call(NamedTuple):
    """One operation: its kind, the slots of its operands and then of its results, its attributes."""

    kind: int
    slots: tuple[int, ...]
    attrs: tuple[int, ...]


def call_native(
    op: str,
    operands: Sequence[jax.typing.ArrayLike],
    outs: Sequence[jax.ShapeDtypeStruct],
    *attrs: int | float,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Results of one native operation, in the order its decoder in native/ffi takes operands, results and attributes.

    Args:
        aliases: operand -> result that is the same memory, written in place; the operation takes it once.
    """
    aliases = aliases or {}
    fresh = [i for i in range(len(outs)) if i not in aliases.values()]
    slots = (*range(len(operands)), *(len(operands) + i for i in fresh))
    bits = tuple(int(np.float32(a).view(np.int32)) if isinstance(a, float) else int(a) for a in attrs)
    return _ffi_call(operands, outs, aliases, _encode([], aliases, [_Call(_KINDS.index(op), slots, bits)]), 0)


def _encode(temporaries: list[tuple[Any, int]], aliases: dict[int, int], calls: list[_Call]) -> np.ndarray:
    """The code as native/ffi/program.cpp reads it; `temporaries` are shapes with their offsets in scratch memory."""
    code = [len(temporaries)]
    for aval, offset in temporaries:
        code += [type_of(aval), len(aval.shape), *aval.shape, offset // _ALIGN]
    code += [len(aliases), *(i for pair in aliases.items() for i in pair)]
    for kind, slots, attrs in calls:
        code += [kind, len(slots), *slots, len(attrs), *attrs]
    return np.array(code, np.int32)


def _ffi_call(
    operands: Sequence[Any], outs: Sequence[Any], aliases: dict[int, int], code: np.ndarray, scratch_bytes: int
) -> list[jax.Array]:
    run = jax.ffi.ffi_call(_TARGET, list(outs), input_output_aliases=aliases)
    return list(run(*operands, code=code, scratch_bytes=np.int64(scratch_bytes)))


def type_of(aval: Any) -> int:
    """A type's number in the code."""
    return _TYPES.index(np.dtype(aval.dtype))


def string_calls(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its native operations strung together; to be traced, like the function itself."""

    def strung(*args: Any) -> Any:
        closed, out_shapes = jax.make_jaxpr(function, return_shape=True)(*args)
        values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        values.update(zip(closed.jaxpr.invars, jax.tree.leaves(args), strict=True))
        _evaluate(closed.jaxpr, values)
        outs = [var.val if isinstance(var, Literal) else values[var] for var in closed.jaxpr.outvars]
        return jax.tree.unflatten(jax.tree.structure(out_shapes), outs)

    return strung


def _evaluate(jaxpr: Any, values: dict[Any, Any]) -> None:
    """Computes what `jaxpr` gives: XLA's part as soon as it can, then all native operations that can follow."""
    pending = list(jaxpr.eqns)
    while pending:
        for native, bind in ((False, _bind_xla), (True, _bind_program)):
            ready, pending = _split_ready(pending, values, native)
            used_later = variables(jaxpr.outvars, *(eqn.invars for eqn in pending))
            if ready:
                bind(ready, values, used_later)


def _split_ready(eqns: list[Any], values: dict[Any, Any], native: bool) -> tuple[list[Any], list[Any]]:
    """The equations of one kind that can run one after the other on `values` alone, and the rest."""
    known = set(values)
    ready: list[Any] = []
    rest: list[Any] = []
    for eqn in eqns:
        if is_native(eqn) == native and variables(eqn.invars).keys() <= known:
            ready.append(eqn)
            known.update(eqn.outvars)
        else:
            rest.append(eqn)
    return ready, rest


def _bind_xla(eqns: list[Any], values: dict[Any, Any], used_later: dict[Any, None]) -> None:
    """Traces these equations again; adds to `values` their results that are used later."""
    made = variables(*(eqn.outvars for eqn in eqns))
    operands = [var for var in variables(*(eqn.invars for eqn in eqns)) if var not in made]
    outs = [var for eqn in eqns for var in eqn.outvars if var in used_later]
    part = ClosedJaxpr(Jaxpr([], operands, outs, eqns, debug_info=_DEBUG_INFO), [])
    values.update(zip(outs, jaxpr_as_fun(part)(*(values[var] for var in operands)), strict=True))


class Program(NamedTuple):
    """Native operations strung together."""

    operands: list[Any]
    """Variables, as are the results."""
    outs: list[Any]
    in_place: dict[int, int]
    """Operand -> result that is the same memory."""
    code: np.ndarray
    scratch_bytes: int


def _bind_program(eqns: list[Any], values: dict[Any, Any], used_later: dict[Any, None]) -> None:
    """Traces native operations as one program; adds to `values` their results that are used later."""
    program = string(eqns, used_later)
    outs = [jax.ShapeDtypeStruct(var.aval.shape, var.aval.dtype) for var in program.outs]
    operands = [values[var] for var in program.operands]
    results = _ffi_call(operands, outs, program.in_place, program.code, program.scratch_bytes)
    values.update(zip(program.outs, results, strict=True))


def string(eqns: list[Any], used_later: dict[Any, None]) -> Program:
    """One program of native operations; its results are those used later."""
    memory = _memory(eqns)
    made = variables(*(eqn.outvars for eqn in eqns))
    operands = [var for var in memory.newest if var not in made]
    outs = [var for eqn in eqns for var in eqn.outvars if var in used_later]
    if any(memory.newest[memory.root[var]] is not var for var in outs):
        raise ValueError("memory written in place is wanted as it was before: copy it first")
    # What is written in place comes out, wanted or not: only so does XLA know.
    outs += [memory.newest[var] for var in operands if memory.newest[var] is not var and memory.newest[var] not in outs]
    in_place = {operands.index(memory.root[var]): i for i, var in enumerate(outs) if memory.root[var] in operands}
    slots = {var: i for i, var in enumerate(operands)}
    for i, var in enumerate(outs):
        slots.setdefault(memory.root[var], len(operands) + i)
    temporaries, scratch_bytes = _place(eqns, memory, slots)
    for i, (var, _) in enumerate(temporaries):
        slots[var] = len(operands) + len(outs) + i
    calls = []
    for eqn in eqns:
        (call,) = _decode(eqn)
        own = [*eqn.invars, *eqn.outvars]
        calls.append(_Call(call.kind, tuple(slots[memory.root[own[i]]] for i in call.slots), call.attrs))
    code = _encode([(var.aval, offset) for var, offset in temporaries], in_place, calls)
    return Program(operands, outs, in_place, code, scratch_bytes)


class _Memory(NamedTuple):
    """What the variables of some operations lie in."""

    root: dict[Any, Any]
    """Of a variable: the first one in its memory, which is itself unless an operation wrote in place."""
    newest: dict[Any, Any]
    """Of a root: the last variable in that memory."""
    last_use: dict[Any, int]
    """Of a root: the operation that needs that memory last."""


def _memory(eqns: list[Any]) -> _Memory:
    root: dict[Any, Any] = {}
    newest: dict[Any, Any] = {}
    last_use: dict[Any, int] = {}
    for step, eqn in enumerate(eqns):
        for var in eqn.invars:
            if var not in root:
                root[var] = newest[var] = var
            if newest[root[var]] is not var:
                raise ValueError("memory written in place is read as it was before: copy it first")
        written = {result: eqn.invars[operand] for operand, result in eqn.params["input_output_aliases"]}
        for i, var in enumerate(eqn.outvars):
            root[var] = root[written[i]] if i in written else var
            newest[root[var]] = var
        last_use.update((root[var], step) for var in (*eqn.invars, *eqn.outvars))
    return _Memory(root, newest, last_use)


def _place(eqns: list[Any], memory: _Memory, slots: dict[Any, int]) -> tuple[list[tuple[Any, int]], int]:
    """Each temporary with its offset, and the bytes of all: first fit, memory reused after its last use."""
    placed: list[tuple[Any, int]] = []
    live: list[tuple[int, int, int]] = []  # begin, end, last use; ascending
    total = 0
    for step, eqn in enumerate(eqns):
        live = [piece for piece in live if piece[2] >= step]
        for var in eqn.outvars:
            if memory.root[var] is not var or var in slots:
                continue
            size = -(-int(np.prod(var.aval.shape)) * var.aval.dtype.itemsize // _ALIGN) * _ALIGN
            begin = 0
            for taken_begin, taken_end, _ in live:
                if begin + size <= taken_begin:
                    break
                begin = max(begin, taken_end)
            live = sorted([*live, (begin, begin + size, memory.last_use[var])])
            placed.append((var, begin))
            total = max(total, begin + size)
    return placed, total


def _decode(eqn: Any) -> list[_Call]:
    """The calls of a program without temporaries."""
    code = np.asarray(dict(eqn.params["attributes"])["code"].val).tolist()
    at = 2 + 2 * code[1]
    calls = []
    while at < len(code):
        kind, num_slots = code[at : at + 2]
        slots_end = at + 2 + num_slots
        end = slots_end + 1 + code[slots_end]
        calls.append(_Call(kind, tuple(code[at + 2 : slots_end]), tuple(code[slots_end + 1 : end])))
        at = end
    return calls


def is_native(eqn: Any) -> bool:
    """Whether an equation of a jaxpr is a native operation."""
    return eqn.primitive.name == "ffi_call" and eqn.params["target_name"] == _TARGET


def variables(*atoms: Sequence[Any]) -> dict[Any, None]:
    """All that are not literals, in order, once."""
    return {atom: None for some in atoms for atom in some if not isinstance(atom, Literal)}
