# SPDX-License-Identifier: Apache-2.0
"""One request on several GPUs: attention over a KV cache that the ranks of a torch.distributed group share.

Which bytes travel is settled here, how they travel by the group: NCCL on GPUs, gloo on CPUs.
"""

from flashinfer.parallel.context import ContextParallel
from flashinfer.parallel.exchange import Pending
from flashinfer.parallel.heads import all_to_all_heads
from flashinfer.parallel.ring import ring_prefill, zigzag_positions
from flashinfer.parallel.sharded import GraphSizes, ShardedAppend, ShardedDecode, ShardedMLA

__all__ = [
    "ContextParallel",
    "GraphSizes",
    "Pending",
    "ShardedAppend",
    "ShardedDecode",
    "ShardedMLA",
    "all_to_all_heads",
    "ring_prefill",
    "zigzag_positions",
]
