"""Devices and processes: the mesh, the sharding rules, multi-process runs, and the TPU chips that plans compile for.

mesh        `make_mesh` (axes data, fsdp, tensor), `batch_sharding`, `place_rows`
rules       `shardings`: the `NamedSharding` of every parameter, by its path in the tree
processes   `start`, `barrier`, `is_main`, `main_first`, `Votes`: several processes of one run
supervisor  `supervise`: the parent process that explains why its child ended
chips       `CHIPS`, `topology`, `collective_seconds`: published TPU figures, and devices for ahead-of-time compilation
"""
