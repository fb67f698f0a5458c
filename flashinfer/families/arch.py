# SPDX-License-Identifier: Apache-2.0
"""What distinguishes the GPU architectures, as far as tile tables ask: one row for each.

A GPU that old algorithms serve is a row here and nothing else. One without a row takes that of the newest architecture
before it; `flashinfer.target` says what launches themselves depend on.
"""

from __future__ import annotations

from typing import NamedTuple

from flashinfer import target as targets
from flashinfer.errors import UnsupportedConfig


class Arch(NamedTuple):
    """An architecture's limits.

    smem_per_sm     bytes of shared memory of an SM
    smem_per_block  bytes that one block may have, the least of all GPUs that run this architecture's cubins
    has_clusters    whether a row of the vocabulary is spread over a thread-block cluster, where that was tried
    """

    smem_per_sm: int
    smem_per_block: int
    has_clusters: bool


_ARCHS = {  # by compute capability
    (8, 0): Arch(164 << 10, 99 << 10, False),  # A100; its cubins run on the next row as well
    (8, 6): Arch(100 << 10, 99 << 10, False),  # Ampere and Ada of consumers, L4, L40
    (9, 0): Arch(228 << 10, 227 << 10, True),  # Hopper
    (10, 0): Arch(228 << 10, 227 << 10, True),  # Blackwell
    (11, 0): Arch(228 << 10, 227 << 10, False),  # Thor
    (12, 0): Arch(100 << 10, 99 << 10, False),  # Blackwell of consumers; newer ones, until they have a row
}


def arch(target: str) -> Arch:
    """The row of a CUDA target. Raises UnsupportedConfig for one before sm_80."""
    capability = targets.capability(target)
    known = [start for start in _ARCHS if start <= capability]
    if not known:
        raise UnsupportedConfig(f"target {target}: kernels need sm_80 or later")
    return _ARCHS[max(known)]
