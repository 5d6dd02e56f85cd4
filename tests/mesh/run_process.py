"""One of two processes, with two devices each, that run a network on one mesh; the first prints how far it is off.

python run_process.py RANK PORT
"""

import json
import sys

import jax
import numpy as np
from jax.sharding import PartitionSpec as P
from networks import NETWORKS, STEPS, Steps, layout_of, on_one_device, random_parameters, step_of

from strop.models.mesh import MeshShape
from strop.models.sharding import cache_spec, make_mesh, new_sharded_caches, on_mesh, parameter_specs, shard


def main(rank: int, port: int) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    spec, layout, steps = NETWORKS["grouped_serial"], layout_of("ws2d/heads", MeshShape(2, 2)), Steps(4)
    mesh = make_mesh(layout.mesh)
    whole = random_parameters(spec)
    params = shard(whole, spec, layout, mesh)
    specs = parameter_specs(params, spec, layout), P(), (cache_spec(layout),)
    step = jax.jit(on_mesh(step_of(spec, layout), mesh, specs, (P(), specs[2])))
    caches = new_sharded_caches(spec, layout, mesh, [steps.blocks_per_cache])
    errors = []
    for which, expected in zip(STEPS, on_one_device(spec, whole, steps), strict=True):
        rows = jax.tree.map(np.asarray, steps.rows(*which))
        logits, caches = step(params, rows, caches)
        errors.append(float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max()))
    if rank == 0:
        print(json.dumps({"errors": errors, "devices": [device.process_index for device in mesh.devices.flat]}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
