# SPDX-License-Identifier: Apache-2.0
"""Packing of booleans, eight to a byte."""

from __future__ import annotations

import ctypes

from flashinfer.jit.spec import Config, CxxType, Family, KernelSpec, Launch, register, twins

INDEX_TYPES = ("int32", "int64")


class PackbitsParams(ctypes.Structure):
    """Mirror of csrc/quantization/params.h."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("num_elements", ctypes.c_int64),
    ]


class PackedIndptrParams(ctypes.Structure):
    """Mirror of csrc/quantization/params.h."""

    _fields_ = [
        ("indptr", ctypes.c_void_p),
        ("packed_indptr", ctypes.c_void_p),
        ("num_segments", ctypes.c_int32),
    ]


class SegmentPackbitsParams(ctypes.Structure):
    """Mirror of csrc/quantization/params.h."""

    _fields_ = [
        ("input", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("indptr", ctypes.c_void_p),
        ("packed_indptr", ctypes.c_void_p),
        ("num_elements", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("num_segments", ctypes.c_int32),
    ]


def _packbits_config(spec: KernelSpec) -> Config:
    constants = {"kBigEndian": spec.arg("big_endian"), "kAligned": spec.arg("aligned"), "kVectorsPerThread": 4}
    return Config(constants, Launch(num_threads=256))


def _packed_indptr_config(spec: KernelSpec) -> Config:
    return Config({"Index": CxxType(spec.arg("index") + "_t")}, Launch(num_threads=256))


def _segment_packbits_config(spec: KernelSpec) -> Config:
    constants = {
        "Index": CxxType(spec.arg("index") + "_t"),
        "kBigEndian": spec.arg("big_endian"),
        "kAligned": spec.arg("aligned"),
        "kBytesPerThread": 4,
    }
    return Config(constants, Launch(num_threads=256))


PACKBITS = Family(
    name="packbits",
    axes={"big_endian": (False, True), "aligned": (False, True)},  # aligned: the input starts on 16 bytes
    implementations=twins(
        PackbitsParams, _packbits_config, cuda="quantization/packbits.cuh", cpu="cpu/quantization/packbits.h"
    ),
)
PACKED_INDPTR = Family(
    name="packed_indptr",
    axes={"index": INDEX_TYPES},
    implementations=twins(
        PackedIndptrParams,
        _packed_indptr_config,
        cuda="quantization/packed_indptr.cuh",
        cpu="cpu/quantization/packed_indptr.h",
    ),
)
SEGMENT_PACKBITS = Family(
    name="segment_packbits",
    axes={"index": INDEX_TYPES, "big_endian": (False, True), "aligned": (False, True)},
    implementations=twins(
        SegmentPackbitsParams,
        _segment_packbits_config,
        cuda="quantization/segment_packbits.cuh",
        cpu="cpu/quantization/segment_packbits.h",
    ),
)
register(PACKBITS, PACKED_INDPTR, SEGMENT_PACKBITS)
