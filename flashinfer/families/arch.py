"""What distinguishes the GPU architectures, as far as tile tables ask."""

from __future__ import annotations

from flashinfer import target as targets


def smem_limits(target: str) -> tuple[int, int]:
    """Bytes of shared memory of an SM and of one block. A block keeps to the least of the targets its cubin runs on."""
    major, minor = targets.capability(target)
    if major in (9, 10, 11):
        return 228 * 1024, 227 * 1024
    return (164 if (major, minor) == (8, 0) else 100) * 1024, 99 * 1024
