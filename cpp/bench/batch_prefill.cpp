// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

int main(int argc, char** argv) {
  const bench::Program program = {"bench_batch_prefill", "query tokens of each request over a paged cache", true, true};
  return bench::run(program, argc, argv, [](const bench::Options& o, flashinfer::Kernels& kernels) {
    const bench::PagedBatch batch(o, kernels.device());
    const flashinfer::Buffer workspace(kernels.device(), 128 << 20);
    flashinfer::BatchPrefill prefill(kernels, flashinfer::Workspace::of(workspace));
    flashinfer::AttentionOptions options;
    options.is_causal = o.is_causal;
    prefill.plan(bench::as_ints(batch.qo_indptr), o.batch_size * o.qo_len, batch.table(), batch.shape, options);
    return bench::microseconds(kernels.device(), batch.copies, o.repeats, [&](int i, flashinfer::Stream stream) {
      prefill.run(batch.tokens(o, batch.q[size_t(i)]), batch.cache(o, i), batch.tokens(o, batch.out[size_t(i)]), {},
                  stream);
    });
  });
}
