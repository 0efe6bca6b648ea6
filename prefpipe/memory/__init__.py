"""How much memory and disk training takes: sums over a model's shape and a batch's lengths, without weights or torch.

The sums follow the tensors that training/loop.py, engine.py and head.py keep, layer by layer through the forward and
the backward pass; benchmarks/memory_plan.py compares them with measured processes. They are bytes in use. Fragmentation
comes on top, on a GPU also the CUDA context, and on a CPU the freed blocks below 32 MiB that glibc's heap keeps.

shapes.py reads a model's shape, setting.py holds what an estimate is made for, layers.py counts what the layers keep,
and estimates.py adds it all up.
"""

from prefpipe.memory.estimates import Disk, Memory, disk, estimate, size
from prefpipe.memory.setting import Lengths, Setting, longest_allowed, micro_batch, resolved
from prefpipe.memory.shapes import ModelShape, read_shape, shape_of

__all__ = [
    "Disk",
    "Lengths",
    "Memory",
    "ModelShape",
    "Setting",
    "disk",
    "estimate",
    "longest_allowed",
    "micro_batch",
    "read_shape",
    "resolved",
    "shape_of",
    "size",
]
