// SPDX-License-Identifier: Apache-2.0
// A serving loop: requests wait, are admitted as pages allow, are prefilled, and decode together until they are done.
//
//   engine SET [cpu | cuda]      SET: a folder with a registry.json; engine.toml beside this file is what a CPU takes
//
// The model is a toy whose layers are tables, so that all the rest is real: the page allocator, the paged cache, rotary
// embeddings, appends, attention, sampling. A token's q, k and v are rows of random tables, and attention's output over
// all heads are the logits of the next token. One line for each request: its tokens.
#include <cstdio>
#include <cstring>
#include <deque>
#include <vector>

#include "flashinfer/flashinfer.hpp"

using namespace flashinfer;

namespace {

constexpr int kQoHeads = 8, kKvHeads = 2, kHeadDim = 64, kVocab = kQoHeads * kHeadDim;
constexpr int kPageSize = 4, kNumPages = 14, kMaxBatch = 3;
constexpr uint64_t kSeed = 7;

struct Running {
  int idx;                  // of the request
  std::vector<int> tokens;  // prompt, then what was drawn
  int budget;               // tokens to draw yet
  int num_cached = 0;       // tokens whose keys and values are in the cache
  std::vector<int32_t> pages;
};

// Element i of table `which`: a hash, uniform in [-1, 1).
float element_of(uint32_t which, uint32_t i) {
  uint32_t hash = (i + which * 1000003u) * 2654435761u;
  hash ^= hash >> 15;
  hash *= 2246822519u;
  hash ^= hash >> 13;
  return float(hash >> 8) / float(1 << 23) - 1.f;
}

class Engine {
 public:
  Engine(Kernels& kernels, Dtype dtype)
      : kernels_(kernels),
        device_(kernels.device()),
        dtype_(dtype),
        workspace_(device_, 32 << 20),
        k_cache_(device_, size_t(kNumPages) * kPageSize * kKvHeads * kHeadDim * itemsize_of(dtype)),
        v_cache_(device_, k_cache_.num_bytes()),
        prefill_(kernels, Workspace::of(workspace_)),
        decode_(kernels, Workspace::of(workspace_)) {
    for (int page = kNumPages - 1; page >= 0; --page) free_pages_.push_back(page);
  }

  void submit(int idx, std::vector<int> prompt, int budget) {
    waiting_.push_back({idx, std::move(prompt), budget, 0, {}});
  }

  bool step() {
    std::vector<Running*> admitted;
    while (!waiting_.empty() && running_.size() < kMaxBatch && pages_of(waiting_.front()) <= int(free_pages_.size())) {
      running_.push_back(std::move(waiting_.front()));
      waiting_.pop_front();
      Running& request = running_.back();
      for (int count = pages_of(request); count > 0; --count) {  // for all it may grow to: nothing is ever preempted
        request.pages.push_back(free_pages_.back());
        free_pages_.pop_back();
      }
    }
    for (Running& request : running_)
      if (request.num_cached == 0) admitted.push_back(&request);
    if (!admitted.empty()) {
      forward(admitted, true);
    } else if (!running_.empty()) {
      for (Running& request : running_) admitted.push_back(&request);
      forward(admitted, false);
    }
    for (size_t i = running_.size(); i-- > 0;) {
      if (running_[i].budget > 0) continue;
      free_pages_.insert(free_pages_.end(), running_[i].pages.begin(), running_[i].pages.end());
      finished_.push_back(std::move(running_[i]));
      running_.erase(running_.begin() + long(i));
    }
    return !(running_.empty() && waiting_.empty());
  }

  const std::vector<Running>& finished() const { return finished_; }

 private:
  static int pages_of(const Running& request) {
    return (int(request.tokens.size()) + request.budget + kPageSize - 1) / kPageSize;
  }

  Buffer on_device(const std::vector<int32_t>& values) {
    Buffer buffer(device_, values.size() * 4);
    buffer.upload(values.data(), values.size() * 4);
    return buffer;
  }
  static Tensor indices_in(const Buffer& buffer) {
    return Tensor(buffer.data(), Dtype::kInt32, {int64_t(buffer.num_bytes() / 4)});
  }

  // Rows of a table, one for each token.
  Buffer rows_of(uint32_t table, const std::vector<int>& tokens, int length) {
    std::vector<float> wide;
    for (int token : tokens)
      for (int i = 0; i < length; ++i) wide.push_back(element_of(table, uint32_t(token * length + i)));
    Buffer buffer(device_, wide.size() * size_t(itemsize_of(dtype_)));
    if (dtype_ == Dtype::kFp32) {
      buffer.upload(wide.data(), buffer.num_bytes());
      return buffer;
    }
    std::vector<uint16_t> narrow;  // bf16, rounded to nearest even
    for (float value : wide) {
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      narrow.push_back(uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16));
    }
    buffer.upload(narrow.data(), buffer.num_bytes());
    return buffer;
  }

  // The tokens of these requests that are not cached yet, and a new one for each.
  void forward(const std::vector<Running*>& requests, bool is_prefill) {
    std::vector<int> tokens;
    std::vector<int32_t> batch_indices, positions, qo_indptr = {0}, indptr = {0}, pages, last_page_len, last_rows;
    for (size_t i = 0; i < requests.size(); ++i) {
      Running& request = *requests[i];
      for (int at = request.num_cached; at < int(request.tokens.size()); ++at) {
        tokens.push_back(request.tokens[size_t(at)]);
        batch_indices.push_back(int32_t(i));
        positions.push_back(at);
      }
      request.num_cached = int(request.tokens.size());
      const int num_pages = (request.num_cached + kPageSize - 1) / kPageSize;
      pages.insert(pages.end(), request.pages.begin(), request.pages.begin() + num_pages);
      qo_indptr.push_back(int32_t(tokens.size()));
      indptr.push_back(int32_t(pages.size()));
      last_page_len.push_back((request.num_cached - 1) % kPageSize + 1);
      last_rows.push_back(int32_t(tokens.size()) - 1);
    }
    const Buffer indptr_mem = on_device(indptr), pages_mem = on_device(pages), last_mem = on_device(last_page_len);
    const Buffer batch_mem = on_device(batch_indices), positions_mem = on_device(positions);
    const Buffer qo_mem = on_device(qo_indptr), rows_mem = on_device(last_rows);
    const PageTable table = {indices_in(indptr_mem), indices_in(pages_mem), indices_in(last_mem)};

    const int64_t num_tokens = int64_t(tokens.size()), batch_size = int64_t(requests.size());
    const Buffer q_mem = rows_of(0, tokens, kQoHeads * kHeadDim), k_mem = rows_of(1, tokens, kKvHeads * kHeadDim);
    const Buffer v_mem = rows_of(2, tokens, kKvHeads * kHeadDim), out_mem(device_, q_mem.num_bytes());
    const Tensor q(q_mem.data(), dtype_, {num_tokens, kQoHeads, kHeadDim});
    const Tensor k(k_mem.data(), dtype_, {num_tokens, kKvHeads, kHeadDim});
    const Tensor v(v_mem.data(), dtype_, {num_tokens, kKvHeads, kHeadDim});
    const Tensor out(out_mem.data(), dtype_, {num_tokens, kQoHeads, kHeadDim});
    const PagedCache cache = {Tensor(k_cache_.data(), dtype_, {kNumPages, kPageSize, kKvHeads, kHeadDim}),
                              Tensor(v_cache_.data(), dtype_, {kNumPages, kPageSize, kKvHeads, kHeadDim})};
    const AttentionShape shape = {kQoHeads, kKvHeads, kHeadDim, kHeadDim, kPageSize, dtype_, dtype_, dtype_};
    AttentionOptions options;
    options.sm_scale = 0.5;

    rope(kernels_, q, k, indices_in(positions_mem), q, k);
    append(kernels_, k, v, indices_in(batch_mem), indices_in(positions_mem), cache, table);
    if (is_prefill) {
      options.is_causal = true;
      prefill_.plan(indices_in(qo_mem), num_tokens, table, shape, options);
      prefill_.run(q, cache, out);
    } else {
      decode_.plan(table, shape, options);
      decode_.run(q, cache, out);
    }

    const Buffer drawn_mem(device_, size_t(batch_size) * 4);
    drawn_mem.zero();  // what a rehearsal draws
    SampleOptions sampling;
    sampling.are_logits = true;
    sampling.top_k = 40;
    sampling.top_p = 0.9f;
    sampling.top_k_first = true;
    sampling.seed = kSeed;
    sampling.offset = num_drawn_;
    sampling.row_indices = indices_in(rows_mem);
    sample(kernels_, Tensor(out_mem.data(), dtype_, {num_tokens, kVocab}), indices_in(drawn_mem), sampling);
    num_drawn_ += 8;  // words of the random generator that a call takes

    std::vector<int32_t> drawn(requests.size());
    drawn_mem.download(drawn.data(), drawn.size() * 4);
    for (size_t i = 0; i < requests.size(); ++i) {
      requests[i]->tokens.push_back(drawn[i]);
      requests[i]->budget -= 1;
    }
  }

  Kernels& kernels_;
  Device device_;
  Dtype dtype_;
  Buffer workspace_, k_cache_, v_cache_;
  BatchPrefill prefill_;
  BatchDecode decode_;
  std::vector<int32_t> free_pages_;
  std::deque<Running> waiting_;
  std::vector<Running> running_, finished_;
  uint64_t num_drawn_ = 0;
};

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::fprintf(stderr, "usage: engine SET [cpu | cuda]\n");
    return 2;
  }
  const bool is_cuda = argc > 2 && std::strcmp(argv[2], "cuda") == 0;
  Kernels kernels(is_cuda ? Device::cuda(0) : Device::cpu(), {argv[1]});
  const Dtype dtype = is_cuda ? Dtype::kBf16 : Dtype::kFp32;
  kernels.rehearse([&] {  // what the set lacks is told at once, before anything is served
    Engine engine(kernels, dtype);
    engine.submit(0, {1}, 2);
    while (engine.step()) {
    }
  });
  Engine engine(kernels, dtype);
  const int lengths[] = {5, 9, 2, 13, 1, 7}, budgets[] = {12, 6, 9, 4, 10, 5};
  for (int i = 0; i < 6; ++i) {
    std::vector<int> prompt;
    for (int j = 0; j < lengths[i]; ++j) prompt.push_back((i * 37 + j * 11) % kVocab);
    engine.submit(i, prompt, budgets[i]);
  }
  while (engine.step()) {
  }
  for (int i = 0; i < 6; ++i)
    for (const Running& request : engine.finished())
      if (request.idx == i) {
        for (int token : request.tokens) std::printf("%d ", token);
        std::printf("\n");
      }
  return 0;
} catch (const Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
