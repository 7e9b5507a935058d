"""Parallel building blocks: the device mesh, tensor-parallel collectives and layers, sharded data parallelism."""
