// SPDX-License-Identifier: Apache-2.0
// Multi-head latent attention (DeepSeek-V2 and later), over a paged cache of latent rows.
#pragma once

#include <limits>

#include "flashinfer/prefill.hpp"

namespace flashinfer {

struct MlaShape {
  int32_t num_heads = 0;
  int32_t head_dim_ckv = 512, head_dim_kpe = 64;
  int32_t page_size = 1;
  Dtype q_dtype = Dtype::kBf16, kv_dtype = Dtype::kBf16;  // of the cache: that of q, or fp8 e4m3
};

struct MlaOptions {
  bool is_causal = false;
  double sm_scale = 0.0;  // of the logits; has no default, as it is that of the model before the projections
  double kv_scale = 1.0;  // of a quantized cache
};

// Queries after the absorbed projection, over latent rows that are keys and values of all heads.
class Mla {
 public:
  Mla(Kernels& kernels, const Workspace& workspace) : kernels_(kernels), workspace_(workspace) {}

  // Request i owns tokens qo_indptr[i] to qo_indptr[i + 1] - 1 of the num_tokens rows of q. table.last_page_len holds
  // the lengths of whole requests, int32 [batch_size].
  void plan(const Tensor& qo_indptr, int64_t num_tokens, const PageTable& table, const MlaShape& shape,
            const MlaOptions& options, Stream stream = nullptr) {
    using namespace host;
    const bool is_cuda = kernels_.device().is_cuda();
    require(shape.num_heads > 0 && shape.head_dim_ckv > 0 && shape.head_dim_kpe >= 0 && shape.page_size > 0, kOp,
            ": num_heads is ", shape.num_heads, ", head_dim_ckv ", shape.head_dim_ckv, ", page_size ", shape.page_size,
            "; expected 1 or more");
    const double max = std::numeric_limits<float>::max(), both = options.sm_scale * options.kv_scale;
    require(options.sm_scale > 0 && options.kv_scale > 0 && options.kv_scale <= max && both <= max, kOp,
            ": sm_scale is ", options.sm_scale, ", kv_scale ", options.kv_scale,
            "; expected positive numbers, and with their product of 32 bits");
    check_pages(kOp, table, shape.page_size, is_cuda, true);
    const int32_t batch_size = table.batch_size();
    require_index(kOp, "qo_indptr", qo_indptr, int64_t(batch_size) + 1);
    require(num_tokens >= 0 && num_tokens < int64_t(1) << 31, kOp, ": num_tokens is ", num_tokens);
    if (!is_cuda) check_offsets(kOp, "qo_indptr", qo_indptr, num_tokens);
    const int64_t num_rows = num_tokens * shape.num_heads;
    const bool is_scheduled = is_cuda && batch_size > 0;
    std::vector<std::vector<Request>> wanted = {
        requests(shape, options.is_causal, num_rows <= int64_t(contract::kMlaShortRows) * batch_size)};
    if (is_scheduled) wanted.push_back({planner_request("paged_lens")});
    const std::vector<const Kernel*> kernels = kernels_.find_each(wanted);
    const Kernel& kernel = *kernels[0];
    int32_t num_blocks = 0;
    MlaParams params{};
    if (is_scheduled) {
      num_blocks = std::min(kernels_.device().num_sms() * kernel.max_blocks_per_sm(), contract::kMlaMaxBlocks);
      const PrefillPlace place(kOp, workspace_, batch_size, 1, shape.head_dim_ckv, false, contract::kMlaMaxBlocks);
      const int64_t block_m = kernel.number("kBlockM");
      place.require_items(kOp, num_rows, block_m, batch_size);
      place.fill(static_cast<PrefillScratch&>(params));
      const PlanCosts costs = kernel.takes<Sm90MlaParams>()        ? contract::kMlaSm90Costs
                              : block_m <= contract::kMlaShortRows ? contract::kMlaShortCosts
                                                                   : contract::kMlaCosts;
      const PrefillPlanOf of = {batch_size,
                                shape.page_size,
                                1,
                                shape.num_heads,
                                options.is_causal ? contract::kMaskCausal : contract::kMaskNone,
                                -1,
                                num_blocks,
                                costs};
      launch_planner(*kernels[1], place, of, kernel, static_cast<const int32_t*>(qo_indptr.data),
                     static_cast<const int32_t*>(table.indptr.data),
                     static_cast<const int32_t*>(table.last_page_len.data), stream);
    }
    params.qo_indptr = static_cast<const int32_t*>(qo_indptr.data);
    params.batch_size = batch_size;
    params.num_qo_heads = shape.num_heads;
    params.num_tokens = int32_t(num_tokens);
    params.sm_scale = float(options.sm_scale * options.kv_scale);
    params.v_scale = float(options.kv_scale);
    qo_indptr_ = qo_indptr, table_ = table, shape_ = shape, params_ = params, kernel_ = &kernel,
    num_blocks_ = num_blocks;
    ckv_maps_.reset();
    planned_.note();
  }

  // q_nope, out [num_tokens, num_heads, head_dim_ckv], q_pe [.., head_dim_kpe]; ckv [num_pages, page_size,
  // head_dim_ckv], kpe [.., head_dim_kpe], often views of one row; lse fp32 [num_tokens, num_heads], base 2, or none.
  void run(const Tensor& q_nope, const Tensor& q_pe, const Tensor& ckv, const Tensor& kpe, const Tensor& out,
           const Tensor& lse = {}, Stream stream = nullptr) {
    using namespace host;
    planned_.require_one(kOp);
    const bool is_cuda = kernels_.device().is_cuda();
    const int64_t num_tokens = params_.num_tokens, num_heads = shape_.num_heads;
    const auto check = [&](const char* name, const Tensor& x, int64_t first, int64_t second, int64_t dim, Dtype dtype) {
      require_shape(kOp, name, x, {first, second, dim}, "as planned");
      require_dtype(kOp, name, x, dtype);
      require_aligned_rows(kOp, name, x, is_cuda);
    };
    check("q_nope", q_nope, num_tokens, num_heads, shape_.head_dim_ckv, shape_.q_dtype);
    check("q_pe", q_pe, num_tokens, num_heads, shape_.head_dim_kpe, shape_.q_dtype);
    check("out", out, num_tokens, num_heads, shape_.head_dim_ckv, shape_.q_dtype);
    check("ckv", ckv, -1, shape_.page_size, shape_.head_dim_ckv, shape_.kv_dtype);
    check("kpe", kpe, ckv.shape[0], shape_.page_size, shape_.head_dim_kpe, shape_.kv_dtype);
    check_lse(kOp, lse, num_tokens, num_heads);
    require_pages(kOp, check_pages(kOp, table_, shape_.page_size, is_cuda, true), ckv);
    if (!is_cuda) check_offsets(kOp, "qo_indptr", qo_indptr_, num_tokens);
    MlaParams params = params_;
    params.q_pe = q_pe.data;
    params.q_nope = q_nope.data;
    params.out = out.data;
    params.lse = static_cast<float*>(lse.data);
    params.kv.ckv = ckv.data;
    params.kv.kpe = kpe.data;
    params.kv.index.indptr = static_cast<const int32_t*>(table_.indptr.data);
    params.kv.index.last_page_len = static_cast<const int32_t*>(table_.last_page_len.data);
    params.kv.index.indices = static_cast<const int32_t*>(table_.indices.data);
    params.kv.index.page_size = FastDivisor::of(uint32_t(shape_.page_size));
    params.kv.ckv_page_stride = ckv.stride[0], params.kv.ckv_entry_stride = ckv.stride[1];
    params.kv.kpe_page_stride = kpe.stride[0], params.kv.kpe_entry_stride = kpe.stride[1];
    params.q_nope_token_stride = q_nope.stride[0], params.q_nope_head_stride = q_nope.stride[1];
    params.q_pe_token_stride = q_pe.stride[0], params.q_pe_head_stride = q_pe.stride[1];
    params.out_token_stride = out.stride[0], params.out_head_stride = out.stride[1];
    if (num_tokens == 0 || params.batch_size == 0) return;
    const Grid grid = {uint32_t(std::max(num_blocks_, 1))};
    if (!kernel_->takes<Sm90MlaParams>()) {
      kernel_->launch(grid, params, stream);
      return;
    }
    Sm90MlaParams whole{};
    static_cast<MlaParams&>(whole) = params;
    whole.box_rows = int32_t(std::gcd<int64_t>(shape_.page_size, kernel_->number("kBlockN") / 2));
    if (kernel_->number("kGathersKv") == 0) {
      if (!ckv_maps_ || !std::equal(ckv.stride, ckv.stride + 2, ckv_stride_) ||
          !std::equal(kpe.stride, kpe.stride + 2, kpe_stride_)) {
        std::copy(ckv.stride, ckv.stride + 2, ckv_stride_);
        std::copy(kpe.stride, kpe.stride + 2, kpe_stride_);
        const auto maps = [&](std::optional<TensorMaps>& held, const Tensor& x) {
          const int64_t size = itemsize_of(x.dtype);
          held.emplace(x.shape[2] * size, whole.box_rows, x.stride[1] * size, 1, 0, x.stride[0] * size, true);
        };
        maps(ckv_maps_, ckv);
        maps(kpe_maps_, kpe);
      }
      whole.ckv_map = ckv_maps_->at(ckv.data);
      if (shape_.head_dim_kpe > 0) whole.kpe_map = kpe_maps_->at(kpe.data);
    }
    kernel_->launch(grid, whole, stream);
  }

 private:
  static constexpr const char* kOp = "mla";

  std::vector<Request> requests(const MlaShape& shape, bool is_causal, bool has_short_queries) const {
    const bool is_cuda = kernels_.device().is_cuda();
    const Request request = Request("mla")
                                .with("q_dtype", shape.q_dtype)
                                .with("kv_dtype", shape.kv_dtype)
                                .with("head_dim_ckv", shape.head_dim_ckv)
                                .with("head_dim_kpe", shape.head_dim_kpe)
                                .with("mask", is_causal ? "causal" : "none");
    std::vector<Request> requests;
    for (bool is_short : {true, false})
      for (bool large_pages : {true, false})
        if ((!is_short || (is_cuda && has_short_queries)) &&
            (!large_pages || (is_cuda && shape.page_size % contract::kMinBoxRows == 0)))
          requests.push_back(request.with("short_queries", is_short).with("large_pages", large_pages));
    return requests;
  }

  Kernels& kernels_;
  Workspace workspace_;
  Tensor qo_indptr_;
  PageTable table_;
  MlaShape shape_;
  MlaParams params_{};
  host::Planned planned_;
  const Kernel* kernel_ = nullptr;
  int32_t num_blocks_ = 0;
  int64_t ckv_stride_[2] = {}, kpe_stride_[2] = {};
  std::optional<host::TensorMaps> ckv_maps_, kpe_maps_;
};

}  // namespace flashinfer
