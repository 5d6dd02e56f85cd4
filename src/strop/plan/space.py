"""What a plan chooses from: numbers of devices, meshes, batches, and how prompts are taken in."""

import math
from collections.abc import Iterator

from strop.core.errors import RequestError
from strop.machine.catalog import Device, Machines
from strop.models.mesh import MeshShape
from strop.models.published import with_heads
from strop.models.spec import ModelSpec
from strop.plan.latency import Pass
from strop.plan.traffic import Traffic

BATCHES = tuple(1 << power for power in range(11))
LEAST_CHUNK_TOKENS = 64
WEIGHT_DTYPES = ("bf16", "int8")


def divisors(number: int) -> list[int]:
    """Ascending."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})


def meshes(device: Device, num_devices: int) -> list[MeshShape]:
    """Shapes of so many devices: of a torus the most cubic slice, turned any way; else all of two axes."""
    axes = device.num_torus_axes if device.topology == "torus" else 2
    shapes = list(_shapes(num_devices, axes))
    if device.topology == "torus":
        most_cubic = min((sum(shape), tuple(sorted(shape))) for shape in shapes)[1]
        shapes = [shape for shape in shapes if tuple(sorted(shape)) == most_cubic]
    return [MeshShape(*shape) for shape in sorted(set(shapes))]


def _shapes(number: int, axes: int) -> Iterator[tuple[int, ...]]:
    if axes == 1:
        yield (number,)
        return
    for first in divisors(number):
        for rest in _shapes(number // first, axes - 1):
            yield (first, *rest)


def indivisible(spec: ModelSpec, mesh: MeshShape) -> str | None:
    """Which axis of the mesh does not divide what lies over it, and what would; None if all do."""
    for name, size, axes in (
        ("model_dim", spec.model_dim, "x"),
        *(("ffn_dim", ffn_dim, "yz") for ffn_dim in dict.fromkeys(layer.mlp.ffn_dim for layer in spec.layers)),
    ):
        parts = math.prod(getattr(mesh, axis) for axis in axes)
        if size % parts:
            would = [divisor for divisor in divisors(size) if divisor <= 2 * parts]
            return (
                f"mesh {mesh}: {' times '.join(axes)} = {parts} does not divide {name}={size}; "
                f"{', '.join(map(str, would[-6:]))} would"
            )
    return None


def parse_mesh(text: str, machines: Machines) -> MeshShape:
    """Of "8", "2x4" or "4x4x4".

    Raises:
        RequestError: it is no shape, has more axes than the devices' torus, or as many devices as do not divide those
            that there are.
    """
    mesh, device = MeshShape.parse(text), machines.device
    if machines.num_devices % mesh.size():
        raise RequestError(
            f"mesh {text}: {mesh.size()} devices do not divide the {machines.num_devices} of {device.name}: take "
            f"{', '.join(map(str, divisors(machines.num_devices)))}"
        )
    if device.topology == "torus" and sum(size > 1 for size in mesh) > device.num_torus_axes:
        raise RequestError(
            f"mesh {text} has more axes than the torus of {device.name}, which has {device.num_torus_axes}: set one of "
            "them to 1"
        )
    return mesh


def padded(spec: ModelSpec, num_devices: int) -> ModelSpec:
    """The network with query heads of zeros added where devices would not share its heads evenly."""
    needed = max(
        math.lcm(num_devices, layer.attention.num_kv_heads)
        * math.ceil(layer.attention.num_heads / math.lcm(num_devices, layer.attention.num_kv_heads))
        for layer in dict.fromkeys(spec.layers)
    )
    if all(layer.attention.num_heads % num_devices == 0 for layer in dict.fromkeys(spec.layers)):
        return spec
    return with_heads(spec, needed)


def prompt_passes(traffic: Traffic, batch: int) -> list[tuple[Pass, int]]:
    """Ways to take prompts in, and how many such passes a prompt needs: several prompts whole, or one in chunks.

    A chunk sees on average half of what comes before its prompt's end.
    """
    tokens = traffic.input_tokens
    found = [(Pass(count, tokens, tokens), 1) for count in BATCHES if count <= batch]
    chunk = LEAST_CHUNK_TOKENS
    while chunk < tokens:
        found.append((Pass(1, chunk, (tokens + chunk) // 2), math.ceil(tokens / chunk)))
        chunk *= 2
    return found
