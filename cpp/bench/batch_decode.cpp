// SPDX-License-Identifier: Apache-2.0
#include "bench.hpp"

int main(int argc, char** argv) {
  const bench::Program program = {"bench_batch_decode", "one query token of each request over a paged cache", true,
                                  false};
  return bench::run(program, argc, argv, [](const bench::Options& o, flashinfer::Kernels& kernels) {
    const bench::PagedBatch batch(o, kernels.device());
    const flashinfer::Buffer workspace(kernels.device(), 128 << 20);
    flashinfer::BatchDecode decode(kernels, flashinfer::Workspace::of(workspace));
    decode.plan(batch.table(), batch.shape);
    return bench::microseconds(kernels.device(), batch.copies, o.repeats, [&](int i, flashinfer::Stream stream) {
      decode.run(batch.tokens(o, batch.q[size_t(i)]), batch.cache(o, i), batch.tokens(o, batch.out[size_t(i)]), {},
                 stream);
    });
  });
}
