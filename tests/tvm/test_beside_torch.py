# SPDX-License-Identifier: Apache-2.0
"""Streams and memory of TVM, of which torch knows nothing."""

from __future__ import annotations

import math
import os

import pytest
import torch

from tests.kit import finish, spawn
from tests.tvm.kit import Decode, Latent, Prefill, Step, Workspaces, call, check

KINDS = {"decode": Decode, "paged": Prefill, "latent": Latent}


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_default", [False, True])
def test_runs_are_on_the_stream_of_the_environment(kind: str, is_default: bool) -> None:
    """Queries and index arrays arrive there late; torch is on another stream meanwhile, and stays on it."""
    import tvm_ffi

    device, side = torch.device("cuda", 0), torch.cuda.Stream()
    theirs, ours = (torch.cuda.default_stream(), side) if is_default else (side, torch.cuda.default_stream())
    step: Step = KINDS[kind](Workspaces(device))
    step.run(step.plan())  # kernels are compiled
    outputs = [id(step.out), id(step.lse)]
    late = [given for given in step.run_with if isinstance(given, torch.Tensor) and id(given) not in outputs]
    values = [value.clone() for value in late]
    for value in late:
        value.zero_()
    step.out.fill_(math.nan)
    torch.cuda.synchronize()
    with torch.cuda.stream(theirs):
        torch.cuda._sleep(400_000_000)
        for value, arrived in zip(late, values):
            value.copy_(arrived, non_blocking=True)
    info = step.plan()
    with torch.cuda.stream(ours), tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), theirs.cuda_stream):
        step.run(info)
        assert torch.cuda.current_stream() == ours
        assert not theirs.query(), "nobody waited"
    theirs.synchronize()
    check((step.out, step.lse), step.expected())


@pytest.mark.gpu
def test_sampling_is_on_the_stream_of_the_environment() -> None:
    import tvm_ffi

    side, probs = torch.cuda.Stream(), torch.zeros(2, 64, device="cuda")
    uniform, rows = torch.full((3,), 0.5, device="cuda"), torch.tensor([0, 1, 1], dtype=torch.int32, device="cuda")
    tokens = torch.full((3,), -1, dtype=torch.int32, device="cuda")
    call("flashinfer.sampling.parallel_sampling_from_prob", probs, uniform, rows, tokens)  # the kernel is loaded
    tokens.fill_(-1)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)
        probs[:, 7] = 1.0
    with tvm_ffi.use_raw_stream(tvm_ffi.device("cuda", 0), side.cuda_stream):
        call("flashinfer.sampling.parallel_sampling_from_prob", probs, uniform, rows, tokens)
        assert not side.query(), "nobody waited"
    side.synchronize()
    assert tokens.tolist() == [7, 7, 7]


# Memory of the driver, or of ctypes, as tensors of the FFI: what DLPack calls a managed tensor.
FOREIGN = """
import ctypes

import torch
import tvm_ffi

from tests.tvm import kit

class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device", ctypes.c_int32 * 2), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p), ("strides", ctypes.c_void_p), ("byte_offset", ctypes.c_uint64),
        ("manager", ctypes.c_void_p), ("deleter", ctypes.c_void_p),
    ]

CODES = {torch.int32: 0, torch.uint8: 1, torch.float32: 2, torch.bfloat16: 4}
capsule = ctypes.pythonapi.PyCapsule_New
capsule.restype, capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
held, on_gpu = [], DEVICE == "cuda"
if on_gpu:
    cuda, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_void_p()
    assert cuda.cuInit(0) == 0
    assert cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0) == 0
    assert cuda.cuCtxSetCurrent(context) == 0

def foreign(values, offset=16, pinned=False):
    \"\"\"A copy at so many bytes behind the address that the tensor names. pinned: on the host, of that kind.\"\"\"
    values, size = values.contiguous(), values.nbytes + offset
    memory = ctypes.create_string_buffer(size)
    ctypes.memmove(ctypes.addressof(memory) + offset, values.data_ptr(), values.nbytes)
    address = ctypes.c_uint64(ctypes.addressof(memory))
    if on_gpu and not pinned:
        assert cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(size)) == 0
        assert cuda.cuMemcpyHtoD_v2(address, memory, ctypes.c_size_t(size)) == 0
    shape = (ctypes.c_int64 * values.dim())(*values.shape)
    kind = 3 if pinned else 2 if on_gpu else 1
    tensor = Tensor(address.value, (kind, 0), values.dim(), CODES[values.dtype],
                    8 * values.element_size(), 1, ctypes.addressof(shape), None, offset, None, None)
    held.extend((memory, shape, tensor))
    return tvm_ffi.from_dlpack(capsule(ctypes.addressof(tensor), b"dltensor", None))

step = kit.Decode(kit.Workspaces(torch.device("cpu")))
workspaces = [foreign(torch.empty(size, dtype=torch.uint8)) for size in (64 << 20 if on_gpu else 64, 8 << 20)]
queries = step.run_with[0]
planned = [foreign(step.planned[0], pinned=True), *step.planned[1:-2], foreign(queries), foreign(queries)]
run_with = [foreign(value) if isinstance(value, torch.Tensor) else value for value in step.run_with]
assert not torch.cuda.is_initialized()
info = kit.call("batch_decode_plan", *workspaces, step.workspaces[2], *planned)
kit.call("batch_decode_run", *workspaces, info, *run_with)
out, lse = (torch.utils.dlpack.from_dlpack(run_with[i].__dlpack__()) for i in (6, 7))
kit.check((out, lse), step.expected())
print("right")
"""


def test_memory_that_torch_did_not_make(device: torch.device) -> None:
    """In a process that has used its GPU without torch so far. Tensors start behind the address that they name,
    and those of the host are in memory that is pinned."""
    program = FOREIGN.replace("DEVICE", repr(device.type))
    out, _ = finish(spawn(program, FLASHINFER_CACHE_DIR=os.environ["FLASHINFER_CACHE_DIR"]))
    assert out.strip() == "right"
