"""Operations, parameters and receptive fields of networks: by formula, and counted on networks as they are.

One convention throughout: a multiply-add (MAC) is two floating-point operations (FLOPs). Convolutions and matrix
products count, the two products of attention among them. Biases, norms, activations, softmax, pooling, interpolation
and sampling do not: they take a few operations a voxel where the others take thousands. A transposed convolution counts
by the positions of its input. What pads an input is multiplied like anything else.
"""

from __future__ import annotations

from medseg3d.flops.closed_forms import Attention, Convolution, PatchEmbedding, swin_stages
from medseg3d.flops.counting import Count, ModuleCount, Operation, count_operations
from medseg3d.flops.fields import Reach, receptive_field

__all__ = [
    "Attention",
    "Convolution",
    "Count",
    "ModuleCount",
    "Operation",
    "PatchEmbedding",
    "Reach",
    "count_operations",
    "receptive_field",
    "swin_stages",
]
