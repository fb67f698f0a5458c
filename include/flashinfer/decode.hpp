// SPDX-License-Identifier: Apache-2.0
// Decode: one query token a request.
#pragma once

#include "flashinfer/attention.hpp"

namespace flashinfer {
namespace host {

inline std::vector<Request> decode_requests(const AttentionShape& shape, const Variant& variant, const char* storage,
                                            bool is_cuda) {
  const Request request = variant.selecting(attention_request("decode", shape, storage));
  // Sixteen query heads of a KV head to a block where a kernel has room for them.
  const int most = is_cuda && shape.num_qo_heads / shape.num_kv_heads > 8 ? 16 : 8;
  std::vector<Request> requests;
  for (int tile = most; tile >= 8; tile /= 2) requests.push_back(request.with("group_tile", tile));
  return requests;
}

// A decode kernel on a device, and how its grid follows from the head counts: of flashinfer/attention/decode/launch.py.
struct DecodeKernel {
  const Kernel* kernel = nullptr;
  int32_t num_head_blocks = 0, num_chunks = 0;  // none on a CPU

  DecodeKernel() = default;
  DecodeKernel(const Kernel& found, const Device& device, const AttentionShape& shape) : kernel(&found) {
    if (!device.is_cuda()) return;
    const auto group_tile = int32_t(found.number("kGroupTile"));
    num_head_blocks = shape.num_kv_heads * int32_t(ceil_of(shape.num_qo_heads / shape.num_kv_heads, group_tile));
    // Chunks that fill the device once; where that would leave a fifth of it idle, enough for several rounds.
    const int32_t resident = device.num_sms() * found.max_blocks_per_sm();
    const int32_t whole = resident / num_head_blocks;
    const bool fills = whole * num_head_blocks * 5 >= resident * 4;
    num_chunks = fills ? whole : int32_t(ceil_of(4 * int64_t(resident), num_head_blocks));
  }

  int32_t tile_len() const { return kernel->units_per_block(); }

  int64_t num_counters(int64_t batch_size) const { return (batch_size + 2 * int64_t(num_chunks)) * num_head_blocks; }

  // Two slots for each chunk, and two of the groups that begin with it (csrc/attention/decode/schedule.cuh).
  static int64_t num_slots(int64_t chunks, int64_t num_qo_heads) { return 4 * chunks * num_qo_heads; }
};

}  // namespace host

// One query token for each request of a batch.
class BatchDecode {
 public:
  BatchDecode(Kernels& kernels, const Workspace& workspace) : kernels_(kernels), workspace_(workspace) {}

  void plan(const PageTable& table, AttentionShape shape, const AttentionOptions& options = {},
            Stream stream = nullptr) {
    using namespace host;
    if (shape.head_dim_vo == 0) shape.head_dim_vo = shape.head_dim_qk;
    const bool is_cuda = kernels_.device().is_cuda();
    const Variant variant(kOp, shape, options);
    check_pages(kOp, table, shape.page_size, is_cuda, false);
    const int64_t batch_size = table.batch_size();
    const bool is_scheduled = is_cuda && batch_size > 0;
    std::vector<std::vector<Request>> wanted = {decode_requests(shape, variant, "paged", is_cuda)};
    if (is_scheduled) wanted.push_back({Request("decode_plan")});
    const std::vector<const Kernel*> kernels = kernels_.find_each(wanted);
    const DecodeKernel found(*kernels[0], kernels_.device(), shape);
    DecodeParams params{};
    if (is_scheduled) {
      DecodePlanParams plan{};
      lay_out(params, plan, found, shape, batch_size);
      plan.kv_indptr = static_cast<const int32_t*>(table.indptr.data);
      plan.last_page_len = static_cast<const int32_t*>(table.last_page_len.data);
      plan.batch_size = int32_t(batch_size);
      plan.num_chunks = found.num_chunks;
      plan.num_head_blocks = found.num_head_blocks;
      plan.page_size = shape.page_size;
      plan.tile_len = found.tile_len();
      plan.window_left = variant.window_left();
      kernels[1]->launch({}, plan, stream);
    }
    variant.fill(params);
    params.batch_size = int32_t(batch_size);
    table_ = table, shape_ = shape, kernel_ = found, params_ = params;
    planned_.note();
    is_settled_ = false;
  }

  // q, out [batch_size, num_qo_heads, head_dim]; lse fp32 [batch_size, num_qo_heads], base 2, or none. A request
  // without keys gives zeros and -inf.
  void run(const Tensor& q, const PagedCache& cache, const Tensor& out, const Tensor& lse = {},
           Stream stream = nullptr) {
    using namespace host;
    planned_.require_one(kOp);
    const bool is_cuda = kernels_.device().is_cuda();
    DecodeParams params = params_;
    fill_rows(kOp, params, shape_, q, out, lse, params.batch_size, is_cuda);
    fill_pages(kOp, params.kv, shape_, cache, table_, is_cuda);
    require_pages(kOp, check_pages(kOp, table_, shape_.page_size, is_cuda, false), cache.k);
    if (params.batch_size == 0) return;
    params.plan_is_settled = is_settled_ && kernel_.kernel->is_dependent();
    kernel_.kernel->launch({uint32_t(std::max(kernel_.num_head_blocks, 1)), uint32_t(std::max(kernel_.num_chunks, 1))},
                           params, stream);
    if (rehearsal == nullptr) is_settled_ = true;  // a kernel was launched since the planner
  }

 private:
  static constexpr const char* kOp = "batch_decode";

  void lay_out(DecodeParams& params, DecodePlanParams& plan, const host::DecodeKernel& found,
               const AttentionShape& shape, int64_t batch_size) const {
    host::Carver ints(kOp, "int", workspace_.ints, workspace_.int_bytes);
    plan.chunks = ints.take<DecodeChunk>(found.num_chunks * int64_t(sizeof(DecodeChunk)));
    plan.requests = ints.take<DecodeRequest>(batch_size * int64_t(sizeof(DecodeRequest)));
    plan.empty = ints.take<int32_t>(batch_size * 4);
    plan.counters = ints.take<uint32_t>(found.num_counters(batch_size) * 4);
    plan.tile_indptr = ints.take<int32_t>((batch_size + 1) * 4);
    const int64_t num_slots = host::DecodeKernel::num_slots(found.num_chunks, shape.num_qo_heads);
    host::Carver floats(kOp, "float", workspace_.floats, workspace_.float_bytes);
    params.partial_out = floats.take<float>(num_slots * shape.head_dim_vo * 4);
    params.partial_lse = floats.take<float>(num_slots * 4);
    params.chunks = plan.chunks;
    params.requests = plan.requests;
    params.empty = plan.empty;
    params.counters = plan.counters;
  }

  Kernels& kernels_;
  Workspace workspace_;
  PageTable table_;
  AttentionShape shape_;
  host::DecodeKernel kernel_;
  DecodeParams params_{};
  host::Planned planned_;
  bool is_settled_ = false;
};

// One query token [num_qo_heads, head_dim] over k, v [kv_len, num_kv_heads, head_dim]: no plan, one launch. On a GPU
// the integers of the workspace must be zero at first, and are so after each call.
inline void single_decode(Kernels& kernels, const Workspace& workspace, const Tensor& q, const Tensor& k,
                          const Tensor& v, const Tensor& out, const AttentionOptions& options = {},
                          Stream stream = nullptr) {
  using namespace host;
  constexpr const char* op = "single_decode";
  require(q.rank == 2 && out.rank == 2 && k.rank == 3 && v.rank == 3, op, ": q, k, v and out have ", q.rank, ", ",
          k.rank, ", ", v.rank, " and ", out.rank, " axes; expected 2, 3, 3 and 2");
  const AttentionShape shape = {int32_t(q.shape[0]),
                                int32_t(k.shape[1]),
                                int32_t(q.shape[1]),
                                int32_t(v.shape[2]),
                                1,
                                q.dtype,
                                k.dtype,
                                out.dtype};
  const bool is_cuda = kernels.device().is_cuda();
  const Variant variant(op, shape, options);
  const DecodeKernel found(kernels.find_first(decode_requests(shape, variant, "single", is_cuda)), kernels.device(),
                           shape);
  DecodeParams params{};
  variant.fill(params);
  const auto as_batch = [](const Tensor& x) {
    return Tensor(x.data, x.dtype, {1, x.shape[0], x.shape[1]}, {0, x.stride[0], x.stride[1]});
  };
  fill_rows(op, params, shape, as_batch(q), as_batch(out), {}, 1, is_cuda);
  fill_kv_rows(op, params.kv, shape, k, v, is_cuda);
  const int64_t kv_len = k.shape[0];
  params.kv.index.len = int32_t(kv_len);
  params.batch_size = 1;
  params.plan_is_settled = 1;
  const int64_t visible = variant.window_left() < 0 ? kv_len : std::min<int64_t>(kv_len, variant.window_left() + 1);
  const int64_t num_chunks =
      is_cuda ? std::max<int64_t>(1, std::min<int64_t>(found.num_chunks, ceil_of(visible, found.tile_len()))) : 1;
  if (num_chunks > 1) {
    params.counters = Carver(op, "int", workspace.ints, workspace.int_bytes).take<uint32_t>(found.num_counters(1) * 4);
    const int64_t num_slots = DecodeKernel::num_slots(num_chunks, shape.num_qo_heads);
    Carver floats(op, "float", workspace.floats, workspace.float_bytes);
    params.partial_out = floats.take<float>(num_slots * shape.head_dim_vo * 4);
    params.partial_lse = floats.take<float>(num_slots * 4);
  }
  found.kernel->launch({uint32_t(std::max(found.num_head_blocks, 1)), uint32_t(num_chunks)}, params, stream);
}

}  // namespace flashinfer
