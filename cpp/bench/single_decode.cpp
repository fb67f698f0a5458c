// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

int main(int argc, char** argv) {
  const bench::Program program = {"bench_single_decode", "one query token over one sequence", false, false};
  return bench::run(program, argc, argv, [](bench::Options o, flashinfer::Kernels& kernels) {
    o.page_size = 1;  // rows in order
    const bench::PagedBatch batch(o, kernels.device());
    const flashinfer::Buffer workspace(kernels.device(), 64 << 20);
    workspace.zero();
    const auto rows = [&](const flashinfer::Buffer& x) {
      return flashinfer::Tensor(x.data(), batch.kv_dtype, {o.kv_len, o.num_kv_heads, o.head_dim});
    };
    const auto token = [&](const flashinfer::Buffer& x) {
      return flashinfer::Tensor(x.data(), batch.dtype, {o.num_qo_heads, o.head_dim});
    };
    return bench::microseconds(kernels.device(), batch.copies, o.repeats, [&](int i, flashinfer::Stream stream) {
      const size_t at = size_t(i);
      flashinfer::single_decode(kernels, flashinfer::Workspace::of(workspace), token(batch.q[at]), rows(batch.k[at]),
                                rows(batch.v[at]), token(batch.out[at]), {}, stream);
    });
  });
}
