// SPDX-License-Identifier: Apache-2.0
// Prefill: many query tokens a request, over pages or ragged rows.
#pragma once

#include "flashinfer/attention.hpp"

namespace flashinfer {
namespace host {

// Where in the workspaces a plan of prefill writes, and how much fits: of flashinfer/attention/prefill/launch.py.
struct PrefillPlace {
  PrefillSchedule* schedule = nullptr;
  int32_t* tile_indptr = nullptr;
  uint32_t* counters = nullptr;
  PrefillItem* items = nullptr;
  float *partial_out = nullptr, *partial_lse = nullptr;
  int64_t max_items = 0, max_counters = 0, max_partial_rows = 0;

  PrefillPlace() = default;
  // with_lse: false for kernels whose rows of partial results hold it. min_items: that there is room for at least.
  PrefillPlace(const char* op, const Workspace& workspace, int64_t batch_size, int64_t num_kv_heads,
               int64_t head_dim_vo, bool with_lse = true, int64_t min_items = 64) {
    max_counters = std::max<int64_t>(1, contract::kMaxCounters / num_kv_heads);
    Carver ints(op, "int", workspace.ints, workspace.int_bytes);
    schedule = ints.take<PrefillSchedule>(sizeof(PrefillSchedule));
    tile_indptr = ints.take<int32_t>((batch_size + 1) * 4);
    counters = ints.take<uint32_t>(max_counters * num_kv_heads * 4);
    items = ints.take<PrefillItem>(min_items * int64_t(sizeof(PrefillItem)));
    const char* end = static_cast<const char*>(workspace.ints) + workspace.int_bytes;
    max_items = std::min<int64_t>((end - reinterpret_cast<const char*>(items)) / int64_t(sizeof(PrefillItem)),
                                  contract::kMaxItems);
    const int64_t out_bytes = num_kv_heads * head_dim_vo * 4, lse_bytes = with_lse ? num_kv_heads * 4 : 0;
    const int64_t rows = std::max<int64_t>(0, (int64_t(workspace.float_bytes) - 512) / (out_bytes + lse_bytes));
    if (rows > 0) {
      Carver floats(op, "float", workspace.floats, workspace.float_bytes);
      partial_out = floats.take<float>(rows * out_bytes);
      partial_lse = floats.take<float>(rows * lse_bytes);
    }
    max_partial_rows = std::min<int64_t>(rows, 1 << 30);
  }

  void require_items(const char* op, int64_t num_rows, int64_t block_m, int64_t batch_size) const {
    const int64_t needed = ceil_of(num_rows, block_m) + batch_size;
    require(needed <= max_items, op, ": the int workspace holds ", max_items, " work items, ", num_rows,
            " query rows may need ", needed, ". Next step: a larger one");
  }

  void fill(PrefillScratch& params) const {
    params.items = items;
    params.schedule = schedule;
    params.counters = counters;
    params.partial_out = partial_out;
  }
  void fill(PrefillParams& params) const {
    fill(static_cast<PrefillScratch&>(params));
    params.partial_lse = partial_lse;
  }
  void fill(PrefillPlanParams& params) const {
    params.schedule = schedule;
    params.items = items;
    params.tile_indptr = tile_indptr;
    params.counters = counters;
    params.max_items = int32_t(max_items);
    params.max_counters = int32_t(max_counters);
    params.max_partial_rows = int32_t(max_partial_rows);
  }
};

// What a planner is told besides the lengths.
struct PrefillPlanOf {
  int32_t batch_size, page_size, num_kv_heads, group_size, mask, window_left, num_blocks;
  PlanCosts costs = contract::kPrefillCosts;
  int32_t qo_len = 0, kv_len = 0;  // of a single sequence
};

inline Request planner_request(const char* storage) {
  return Request("prefill_plan").with("kv_storage", storage);
}

inline void launch_planner(const Kernel& planner, const PrefillPlace& place, const PrefillPlanOf& of,
                           const Kernel& kernel, const int32_t* qo_indptr, const int32_t* kv_indptr,
                           const int32_t* last_page_len, Stream stream) {
  PrefillPlanParams params{};
  place.fill(params);
  params.qo_indptr = qo_indptr;
  params.kv.indptr = kv_indptr;
  params.kv.last_page_len = last_page_len;
  params.kv.len = of.kv_len;
  params.kv.page_size = FastDivisor::of(uint32_t(of.page_size));
  params.batch_size = of.batch_size;
  params.qo_len = of.qo_len;
  params.num_kv_heads = of.num_kv_heads;
  params.group_size = of.group_size;
  params.num_blocks = of.num_blocks;
  params.block_m = int32_t(kernel.number("kBlockM"));
  params.block_n = int32_t(kernel.number("kBlockN"));
  params.mask = of.mask;
  params.window_left = of.window_left;
  params.costs = of.costs;
  planner.launch({}, params, stream);
}

// Descriptors by which TMA (sm_90) finds rows of KV: of flashinfer/attention/tma.py.
class TensorMaps {
 public:
  // heads: how many, and their stride. Strides in bytes; page_stride 0: one page. is_swizzled: 128 bytes of the rows.
  TensorMaps(int64_t row_bytes, int32_t box_rows, int64_t row_stride, int64_t num_heads, int64_t head_stride,
             int64_t page_stride, bool is_swizzled)
      : box_rows_(box_rows),
        row_stride_(row_stride),
        is_swizzled_(is_swizzled),
        box_elements_(uint32_t((is_swizzled ? 128 : row_bytes) / 2)) {
    constexpr uint64_t kUnbounded = uint64_t(1) << 31;
    const uint64_t sizes[] = {uint64_t(row_bytes / 2), uint64_t(box_rows), uint64_t(num_heads),
                              page_stride != 0 ? kUnbounded : 1, kUnbounded};
    const int64_t strides[] = {row_stride, head_stride, page_stride, row_stride};
    std::copy(sizes, sizes + 5, sizes_);
    for (int axis = 1; axis < 5; ++axis) {
      const int64_t stride = strides[axis - 1];
      strides_[axis - 1] = sizes[axis] > 1 && stride % 16 == 0 ? uint64_t(stride) : 16;
    }
  }

  TensorMap at(const void* address) {
    const auto known = maps_.find(address);
    if (known != maps_.end()) return known->second;
    if (maps_.size() >= 256) maps_.clear();  // a serving process has a cache for each layer
    TensorMap map{};
    const int64_t before = int64_t(reinterpret_cast<uintptr_t>(address)) - box_rows_ * row_stride_;
    const uint32_t box[] = {box_elements_, uint32_t(box_rows_), 1, 1, 1}, steps[] = {1, 1, 1, 1, 1};
    const Driver& driver = Driver::get();
    driver.check("cuTensorMapEncodeTiled",
                 driver.cuTensorMapEncodeTiled(&map, 1, 5, reinterpret_cast<void*>(std::max<int64_t>(before, 16)),
                                               sizes_, strides_, box, steps, 0, is_swizzled_ ? 3 : 0, 3, 0));
    return maps_.emplace(address, map).first->second;
  }

 private:
  int64_t box_rows_, row_stride_;
  bool is_swizzled_;
  uint32_t box_elements_;
  uint64_t sizes_[5], strides_[4];
  std::unordered_map<const void*, TensorMap> maps_;
};

// The launch of a prefill kernel, whichever architecture it is for.
class PrefillLaunch {
 public:
  PrefillLaunch() = default;
  explicit PrefillLaunch(const Kernel& kernel, int32_t num_sms)
      : kernel_(&kernel), num_blocks_(kernel.is_cuda() ? num_sms * kernel.max_blocks_per_sm() : 0) {}

  static std::vector<Request> requests(const AttentionShape& shape, const Variant& variant, const char* storage,
                                       bool is_causal, int64_t num_rows, int64_t batch_size, bool is_cuda) {
    const bool is_paged = std::strcmp(storage, "paged") == 0;
    const Request request =
        variant.selecting(attention_request("prefill", shape, storage)).with("mask", is_causal ? "causal" : "none");
    std::vector<const char*> classes = {"medium"};
    const bool is_long =
        num_rows >= contract::kLongRows * batch_size && num_rows * shape.num_kv_heads >= contract::kManyRows;
    if (num_rows <= contract::kShortRows * batch_size) {
      classes.insert(classes.begin(), "short");
    } else if (is_long) {
      classes.insert(classes.begin(), "long");
    }
    if (!is_cuda) classes = {"medium"};
    // Which kernel is fastest; the results are the same. A set has those that make a difference on its targets.
    std::vector<Request> requests;
    for (const char* queries : classes)
      for (bool large_pages : {true, false})
        if (!large_pages || (is_cuda && is_paged && shape.page_size % contract::kMinBoxRows == 0))
          requests.push_back(request.with("queries", queries).with("large_pages", large_pages));
    return requests;
  }

  explicit operator bool() const { return kernel_ != nullptr; }
  const Kernel& kernel() const { return *kernel_; }
  int32_t num_blocks() const { return num_blocks_; }
  int64_t block_m() const { return kernel_->number("kBlockM"); }
  int64_t block_n() const { return kernel_->number("kBlockN"); }

  void operator()(const PrefillParams& params, uint32_t grid_size, bool is_paged, int32_t page_size, Stream stream) {
    if (!kernel_->takes<Sm90PrefillParams>()) {
      kernel_->launch({grid_size}, params, stream);
      return;
    }
    Sm90PrefillParams whole{};
    static_cast<PrefillParams&>(whole) = params;
    const int itemsize = itemsize_of_type(*kernel_, "Kv");
    const bool is_widened = itemsize < itemsize_of_type(*kernel_, "Q");
    const int64_t most_rows = block_n() / (is_widened ? 4 : 1);
    whole.box_rows = int32_t(is_paged ? std::gcd<int64_t>(page_size, most_rows) : most_rows);
    if (kernel_->number("kGathersKv") != 0) {
      whole.box_rows = 1;
    } else {
      const KvParams& kv = params.kv;
      const Strides k = {kv.k_page_stride, kv.k_entry_stride, kv.k_head_stride};
      const Strides v = {kv.v_page_stride, kv.v_entry_stride, kv.v_head_stride};
      whole.k_map = map(k_maps_, k, kv.k, kernel_->number("kHeadDimQk"), whole, itemsize, is_paged, is_widened);
      whole.v_map = map(v_maps_, v, kv.v, kernel_->number("kHeadDimVo"), whole, itemsize, is_paged, is_widened);
    }
    kernel_->launch({std::min(grid_size, uint32_t(num_blocks_))}, whole, stream);
  }

 private:
  struct Strides {
    int64_t page, entry, head;
    bool operator==(const Strides& other) const {
      return page == other.page && entry == other.entry && head == other.head;
    }
  };
  struct Maps {
    Strides strides;
    int64_t num_heads;
    std::optional<TensorMaps> maps;
  };

  static TensorMap map(Maps& held, const Strides& strides, const void* address, int64_t head_dim,
                       const Sm90PrefillParams& params, int itemsize, bool is_paged, bool is_widened) {
    if (!held.maps || !(held.strides == strides) || held.num_heads != params.num_kv_heads) {
      held.strides = strides;
      held.num_heads = params.num_kv_heads;
      const int64_t row = is_paged ? strides.entry : strides.page, pages = is_paged ? strides.page : 0;
      held.maps.emplace(head_dim * itemsize, params.box_rows, row * itemsize, int64_t(params.num_kv_heads),
                        strides.head * itemsize, pages * itemsize, !is_widened);
    }
    return held.maps->at(address);
  }

  const Kernel* kernel_ = nullptr;
  int32_t num_blocks_ = 0;  // that the device holds at a time
  Maps k_maps_{}, v_maps_{};
};

}  // namespace host

// A batch of requests with any number of query tokens each, over pages or over ragged rows.
class BatchPrefill {
 public:
  BatchPrefill(Kernels& kernels, const Workspace& workspace) : kernels_(kernels), workspace_(workspace) {}

  // Request i owns tokens qo_indptr[i] to qo_indptr[i + 1] - 1 of the num_tokens rows of q; int32 [batch_size + 1].
  void plan(const Tensor& qo_indptr, int64_t num_tokens, const PageTable& table, const AttentionShape& shape,
            const AttentionOptions& options = {}, Stream stream = nullptr) {
    settle(qo_indptr, num_tokens, table, shape, options, "paged", stream);
  }

  // Over rows of keys and values, of which request i owns kv_indptr[i] to kv_indptr[i + 1] - 1.
  void plan_ragged(const Tensor& qo_indptr, int64_t num_tokens, const Tensor& kv_indptr, AttentionShape shape,
                   const AttentionOptions& options = {}, Stream stream = nullptr) {
    shape.page_size = 1;
    settle(qo_indptr, num_tokens, {kv_indptr, {}, {}}, shape, options, "ragged", stream);
  }

  // q, out [num_tokens, num_qo_heads, head_dim]; lse fp32 [num_tokens, num_qo_heads], base 2, or none. A query that
  // sees no key gives zeros and -inf.
  void run(const Tensor& q, const PagedCache& cache, const Tensor& out, const Tensor& lse = {},
           Stream stream = nullptr) {
    planned_.require_one(kOp);
    host::require(is_paged_, kOp, ": the plan is over rows. Next step: run_ragged(), or plan()");
    PrefillParams params = params_;
    host::fill_pages(kOp, params.kv, shape_, cache, table_, kernels_.device().is_cuda());
    run(params, q, cache.k, out, lse, stream);
  }

  void run_ragged(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse = {},
                  Stream stream = nullptr) {
    planned_.require_one(kOp, "plan_ragged()");
    host::require(!is_paged_, kOp, ": the plan is over pages. Next step: run(), or plan_ragged()");
    PrefillParams params = params_;
    host::fill_kv_rows(kOp, params.kv, shape_, k, v, kernels_.device().is_cuda());
    params.kv.index.indptr = static_cast<const int32_t*>(table_.indptr.data);
    run(params, q, k, out, lse, stream);
  }

 private:
  static constexpr const char* kOp = "batch_prefill";

  void settle(const Tensor& qo_indptr, int64_t num_tokens, const PageTable& table, AttentionShape shape,
              const AttentionOptions& options, const char* storage, Stream stream) {
    using namespace host;
    if (shape.head_dim_vo == 0) shape.head_dim_vo = shape.head_dim_qk;
    const bool is_cuda = kernels_.device().is_cuda();
    const Variant variant(kOp, shape, options);
    require(num_tokens >= 0 && num_tokens < int64_t(1) << 31, kOp, ": num_tokens is ", num_tokens);
    const bool is_paged = std::strcmp(storage, "paged") == 0;
    check_indices(qo_indptr, num_tokens, table, shape.page_size, is_paged);
    const int32_t batch_size = table.batch_size(), group_size = shape.num_qo_heads / shape.num_kv_heads;
    const int64_t num_rows = num_tokens * group_size;
    const bool is_scheduled = is_cuda && batch_size > 0;
    std::vector<std::vector<Request>> wanted = {
        PrefillLaunch::requests(shape, variant, storage, options.is_causal, num_rows, batch_size, is_cuda)};
    if (is_scheduled) wanted.push_back({planner_request(storage)});
    const std::vector<const Kernel*> kernels = kernels_.find_each(wanted);
    PrefillLaunch launch(*kernels[0], kernels_.device().num_sms());
    PrefillParams params{};
    if (is_scheduled) {
      const PrefillPlace place(kOp, workspace_, batch_size, shape.num_kv_heads, shape.head_dim_vo);
      place.require_items(kOp, num_rows, launch.block_m(), batch_size);
      place.fill(params);
      const int32_t mask = options.is_causal ? contract::kMaskCausal : contract::kMaskNone;
      const PrefillPlanOf of = {batch_size, shape.page_size,       shape.num_kv_heads, group_size,
                                mask,       variant.window_left(), launch.num_blocks()};
      launch_planner(*kernels[1], place, of, launch.kernel(), static_cast<const int32_t*>(qo_indptr.data),
                     static_cast<const int32_t*>(table.indptr.data),
                     static_cast<const int32_t*>(table.last_page_len.data), stream);
    }
    variant.fill(params);
    params.qo_indptr = static_cast<const int32_t*>(qo_indptr.data);
    params.batch_size = batch_size;
    params.num_tokens = int32_t(num_tokens);
    qo_indptr_ = qo_indptr, table_ = table, shape_ = shape, params_ = params, launch_ = launch, is_paged_ = is_paged;
    planned_.note();
  }

  // How many pages or rows of keys the index tensors reach; -1 on a GPU. Of a plan, and again of its runs, as
  // check_pages.
  int64_t check_indices(const Tensor& qo_indptr, int64_t num_tokens, const PageTable& table, int32_t page_size,
                        bool is_paged) const {
    using namespace host;
    const bool is_cuda = kernels_.device().is_cuda();
    int64_t num_kv = -1;
    if (is_paged) {
      num_kv = check_pages(kOp, table, page_size, is_cuda, false);
    } else {
      const Tensor& kv_indptr = table.indptr;
      require_index(kOp, "kv_indptr", kv_indptr, -1);
      require(kv_indptr.shape[0] >= 1, kOp, ": kv_indptr is empty; expected [batch_size + 1]");
      if (!is_cuda) check_offsets(kOp, "kv_indptr", kv_indptr, INT32_MAX);
      if (!is_cuda) num_kv = index_at(kv_indptr, kv_indptr.shape[0] - 1);
    }
    require_index(kOp, "qo_indptr", qo_indptr, int64_t(table.batch_size()) + 1);
    if (!is_cuda) check_offsets(kOp, "qo_indptr", qo_indptr, num_tokens);
    return num_kv;
  }

  void run(PrefillParams& params, const Tensor& q, const Tensor& k, const Tensor& out, const Tensor& lse,
           Stream stream) {
    host::fill_rows(kOp, params, shape_, q, out, lse, params.num_tokens, kernels_.device().is_cuda());
    const int64_t num_kv = check_indices(qo_indptr_, params.num_tokens, table_, shape_.page_size, is_paged_);
    host::require(k.shape[0] >= num_kv, kOp, ": keys have ", k.shape[0], is_paged_ ? " pages" : " rows",
                  "; the planned index tensors reach ", num_kv);
    if (params.num_tokens == 0 || params.batch_size == 0) return;
    launch_(params, uint32_t(std::max(launch_.num_blocks(), 1)), is_paged_, shape_.page_size, stream);
  }

  Kernels& kernels_;
  Workspace workspace_;
  Tensor qo_indptr_;
  PageTable table_;
  AttentionShape shape_;
  PrefillParams params_{};
  host::Planned planned_;
  host::PrefillLaunch launch_;
  bool is_paged_ = false;
};

// Queries [qo_len, num_qo_heads, head_dim] over k, v [kv_len, num_kv_heads, head_dim]: one launch, or two where query
// tiles are too few to fill the device and KV are long.
inline void single_prefill(Kernels& kernels, const Workspace& workspace, const Tensor& q, const Tensor& k,
                           const Tensor& v, const Tensor& out, const AttentionOptions& options = {},
                           Stream stream = nullptr) {
  using namespace host;
  constexpr const char* op = "single_prefill";
  require(q.rank == 3 && k.rank == 3 && v.rank == 3, op, ": q, k and v have ", q.rank, ", ", k.rank, " and ", v.rank,
          " axes; expected 3 each");
  const AttentionShape shape = {int32_t(q.shape[1]),
                                int32_t(k.shape[1]),
                                int32_t(q.shape[2]),
                                int32_t(v.shape[2]),
                                1,
                                q.dtype,
                                k.dtype,
                                out.dtype};
  const bool is_cuda = kernels.device().is_cuda();
  const Variant variant(op, shape, options);
  const int64_t qo_len = q.shape[0], kv_len = k.shape[0], group_size = shape.num_qo_heads / shape.num_kv_heads;
  PrefillLaunch launch(kernels.find_first(PrefillLaunch::requests(shape, variant, "single", options.is_causal,
                                                                  qo_len * group_size, 1, is_cuda)),
                       kernels.device().num_sms());
  PrefillParams params{};
  variant.fill(params);
  fill_rows(op, params, shape, q, out, {}, qo_len, is_cuda);
  fill_kv_rows(op, params.kv, shape, k, v, is_cuda);
  params.kv.index.len = int32_t(kv_len);
  params.batch_size = 1;
  params.qo_len = int32_t(qo_len);
  params.num_tokens = int32_t(qo_len);
  if (qo_len == 0) return;
  int64_t grid_size = 1;
  if (is_cuda) {
    grid_size = ceil_of(qo_len * group_size, launch.block_m()) * shape.num_kv_heads;
    const bool has_room = launch.num_blocks() == 0 || grid_size < launch.num_blocks();  // 0: missing, at a rehearsal
    if (has_room && kv_len >= 16 * launch.block_n()) {
      const PrefillPlace place(op, workspace, 1, shape.num_kv_heads, shape.head_dim_vo);
      place.require_items(op, qo_len * group_size, launch.block_m(), 1);
      place.fill(params);
      PrefillPlanOf of = {1,
                          1,
                          shape.num_kv_heads,
                          int32_t(group_size),
                          options.is_causal ? contract::kMaskCausal : contract::kMaskNone,
                          variant.window_left(),
                          launch.num_blocks()};
      of.qo_len = int32_t(qo_len), of.kv_len = int32_t(kv_len);
      launch_planner(kernels.find(planner_request("single")), place, of, launch.kernel(), nullptr, nullptr, nullptr,
                     stream);
      grid_size = launch.num_blocks();
    }
  }
  launch(params, uint32_t(grid_size), false, 1, stream);
}

}  // namespace flashinfer
