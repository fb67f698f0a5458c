// SPDX-License-Identifier: Apache-2.0
// Precompiled kernels from C++17: no Python, no torch, no compiler of CUDA at run time.
//
//   flashinfer::Kernels kernels(flashinfer::Device::cuda(0), {"/path/of/a/set"});
//   flashinfer::rmsnorm(kernels, x, weight, out);
//
// Needs the folder of these headers and that of the kernels' own, csrc, on the include path, and -ldl. docs/cpp.md.
#pragma once

#include "flashinfer/decode.hpp"
#include "flashinfer/mla.hpp"
#include "flashinfer/operators.hpp"
#include "flashinfer/prefill.hpp"
