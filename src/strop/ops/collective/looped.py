"""A collective and the matrix product beside it as one loop around a ring: while a chunk travels, another is multiplied
(Wang et al. 2023, "Overlap communication with dependent computation via decomposition").

As many bytes are sent as by the collective itself, in K - 1 messages. The mesh's axes must be named in its own order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from strop.ops.collective import CollectiveCall, Kind, axes_size
from strop.ops.dispatch import Implementation, Platform, resolve

Products = list[jax.Array]


def all_gather_matmul(
    x: jax.Array,
    axes: Sequence[str],
    multiply: Callable[[jax.Array, jax.Array], Products],
    *,
    platform: Platform,
    point: str,
) -> Products:
    """The sums over all chunks of multiply(chunk, i), where chunk i is device i's x: products with the gathered x,
    whose columns are the chunks."""
    return _run("all_gather", x.shape, x.dtype, axes, platform, point)(x, multiply)


def matmul_reduce_scatter(
    multiply: Callable[[jax.Array], jax.Array],
    shape: tuple[int, int],
    dtype: jax.typing.DTypeLike,
    axes: Sequence[str],
    *,
    platform: Platform,
    point: str,
) -> jax.Array:
    """This device's chunk of the sum over all devices of a product, multiply(i) being chunk i of its columns.

    Args:
        shape: of the whole product.
        dtype: of sums on the way; they accumulate in the product's own.
    """
    result: jax.Array = _run("reduce_scatter", shape, dtype, axes, platform, point)(multiply, dtype)
    return result


def _run(
    kind: Kind, shape: tuple[int, ...], dtype: Any, axes: Sequence[str], platform: Platform, point: str
) -> Callable[..., Any]:
    axes = tuple(axis for axis in axes if jax.lax.axis_size(axis) > 1)
    call = CollectiveCall(kind, shape, jax.numpy.dtype(dtype).name, axes, axes_size(axes), point, looped=True)
    ring: Callable[..., Any] = _gather if kind == "all_gather" else _scatter
    implementation = Implementation("ring", ("native", "xla"), partial(ring, call))
    return resolve((implementation,), call, platform)


def _gather(call: CollectiveCall, x: jax.Array, multiply: Callable[[jax.Array, jax.Array], Products]) -> Products:
    k = call.num_devices
    here = jax.lax.axis_index(call.axes)
    totals = multiply(x, here)
    for step in range(1, k):
        x = jax.lax.ppermute(x, call.axes, [(i, (i - 1) % k) for i in range(k)])
        totals = [a + b for a, b in zip(totals, multiply(x, (here + step) % k), strict=True)]
    return totals


def _scatter(call: CollectiveCall, multiply: Callable[[jax.Array], jax.Array], dtype: Any) -> jax.Array:
    k = call.num_devices
    here = jax.lax.axis_index(call.axes)
    total = multiply((here - 1) % k)
    for step in range(1, k):
        sent = jax.lax.ppermute(total.astype(dtype), call.axes, [(i, (i + 1) % k) for i in range(k)])
        total = sent.astype(total.dtype) + multiply((here - 1 - step) % k)
    return total
