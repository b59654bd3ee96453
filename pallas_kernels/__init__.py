"""Compressed N:M matrices and their products: arrays in, arrays out."""

from pallas_kernels.compressed import (
    CompressedMatrix,
    compress,
    compressed_shapes,
    decompress,
    kept_mask,
    positions_of,
)
from pallas_kernels.dispatch import Choice, NarrowQuery, Query, choose, choose_gate, choose_narrow
from pallas_kernels.pattern import Pattern
from pallas_kernels.products import narrow_matmul, nm_matmul, nm_sddmm, nm_transpose
from pallas_kernels.sections import Sections

__all__ = [
    "Choice",
    "CompressedMatrix",
    "NarrowQuery",
    "Pattern",
    "Query",
    "Sections",
    "choose",
    "choose_gate",
    "choose_narrow",
    "compress",
    "compressed_shapes",
    "decompress",
    "kept_mask",
    "narrow_matmul",
    "nm_matmul",
    "nm_sddmm",
    "nm_transpose",
    "positions_of",
]
