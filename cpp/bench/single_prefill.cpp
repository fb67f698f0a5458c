// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

int main(int argc, char** argv) {
  const bench::Program program = {"bench_single_prefill", "query tokens of one sequence over its keys", false, true};
  return bench::run(program, argc, argv, [](bench::Options o, flashinfer::Kernels& kernels) {
    o.page_size = 1;  // rows in order
    const bench::PagedBatch batch(o, kernels.device());
    const flashinfer::Buffer workspace(kernels.device(), 128 << 20);
    const auto rows = [&](const flashinfer::Buffer& x) {
      return flashinfer::Tensor(x.data(), batch.kv_dtype, {o.kv_len, o.num_kv_heads, o.head_dim});
    };
    flashinfer::AttentionOptions options;
    options.is_causal = o.is_causal;
    return bench::microseconds(kernels.device(), batch.copies, o.repeats, [&](int i, flashinfer::Stream stream) {
      const size_t at = size_t(i);
      flashinfer::single_prefill(kernels, flashinfer::Workspace::of(workspace), batch.tokens(o, batch.q[at]),
                                 rows(batch.k[at]), rows(batch.v[at]), batch.tokens(o, batch.out[at]), options, stream);
    });
  });
}
