// SPDX-License-Identifier: Apache-2.0
// What a rehearsal tells, and that no plan of one is run: on a CPU, with an empty set: rehearsals SET. Each line on stdout is an error.
#include <cstdio>

#include "flashinfer/flashinfer.hpp"

using namespace flashinfer;

template <class Part>
void tell(const Part& part) {
  try {
    part();
    std::puts("nothing");
  } catch (const Error& error) {
    std::puts(error.what());
  }
}

int main(int, char** argv) {
  Kernels kernels(Device::cpu(), {argv[1]});
  int32_t indptr[] = {0, 1}, pages[] = {0}, lengths[] = {1};
  float rows[64] = {};
  const PageTable table = {Tensor(indptr, Dtype::kInt32, {2}), Tensor(pages, Dtype::kInt32, {1}),
                           Tensor(lengths, Dtype::kInt32, {1})};
  const PagedCache cache = {Tensor(rows, Dtype::kFp32, {1, 1, 1, 64}), Tensor(rows, Dtype::kFp32, {1, 1, 1, 64})};
  const Tensor q(rows, Dtype::kFp32, {1, 1, 64});
  AttentionShape shape;
  shape.num_qo_heads = shape.num_kv_heads = 1, shape.head_dim_qk = 64, shape.page_size = 1;
  shape.q_dtype = shape.kv_dtype = shape.o_dtype = Dtype::kFp32;

  BatchDecode decode(kernels, {});
  BatchPrefill prefill(kernels, {});
  const auto run = [&] { decode.run(q, cache, q); };
  const auto run_prefill = [&] { prefill.run(q, cache, q); };
  tell(run);
  tell([&] { kernels.rehearse([&] { decode.plan(table, shape), run(); }); });
  tell(run);
  tell([&] { kernels.rehearse([&] { prefill.plan(table.indptr, 1, table, shape), run_prefill(); }); });
  tell(run_prefill);
}
