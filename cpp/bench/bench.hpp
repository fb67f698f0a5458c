// SPDX-License-Identifier: Apache-2.0
// What the benchmark programs share: options, tensors of random numbers, timing, the table. `flashinfer bench` has the
// same options, and the same table for Python's operators.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <new>
#include <string>
#include <vector>

#include "flashinfer/flashinfer.hpp"

namespace bench {

using namespace flashinfer;

struct Options {
  std::string set, device, dtype = "bf16", kv_dtype;
  int64_t batch_size = 1, qo_len = 1, kv_len = 4096, num_qo_heads = 32, num_kv_heads = 8, head_dim = 128;
  int64_t page_size = 16, repeats = 20;
  bool is_causal = true, is_json = false;
};

// Of one program: what it does, and which options it has beside those that all have.
struct Program {
  const char *name, *about;
  bool is_batch, is_prefill;
};

[[noreturn]] inline void usage(const Program& program, int status, const std::string& error = "") {
  std::FILE* to = status == 0 ? stdout : stderr;
  if (!error.empty()) std::fprintf(to, "%s: %s\n\n", program.name, error.c_str());
  std::fprintf(to, "%s: %s\n\n", program.name, program.about);
  std::fprintf(to, "  --set DIR            a folder with a registry.json; FLASHINFER_AOT_PATH unless given\n");
  std::fprintf(to, "  --device NAME        cuda or cpu; cuda where there is a GPU unless given\n");
  if (program.is_batch) std::fprintf(to, "  --batch-size N       requests, 1 unless given\n");
  if (program.is_prefill) std::fprintf(to, "  --qo-len N           query tokens of each, 4096 unless given\n");
  std::fprintf(to, "  --kv-len N           keys and values of each, 4096 unless given\n");
  std::fprintf(to, "  --num-qo-heads N     32 unless given\n");
  std::fprintf(to, "  --num-kv-heads N     8 unless given\n");
  std::fprintf(to, "  --head-dim N         128 unless given\n");
  if (program.is_batch) std::fprintf(to, "  --page-size N        16 unless given\n");
  std::fprintf(to, "  --dtype NAME         of q and out: bf16 (the default), fp16, fp32 (on a CPU)\n");
  std::fprintf(to, "  --kv-dtype NAME      of keys and values: that of q unless given, fp8_e4m3, fp8_e5m2\n");
  if (program.is_prefill) std::fprintf(to, "  --no-causal          every query sees every key\n");
  std::fprintf(to, "  --repeats N          timings, the median of which counts, 20 unless given\n");
  std::fprintf(to, "  --json               one JSON object in the place of a table\n");
  std::exit(status);
}

inline Options parse(const Program& program, int argc, char** argv) {
  Options options;
  if (program.is_prefill) options.qo_len = 4096;
  const auto text = [&](int& at) {
    if (at + 1 >= argc) usage(program, 2, std::string(argv[at]) + " takes a value");
    return std::string(argv[++at]);
  };
  const auto number = [&](int& at) {
    const std::string name = argv[at], value = text(at);
    char* end = nullptr;
    const int64_t read = std::strtoll(value.c_str(), &end, 10);
    if (value.empty() || *end != '\0' || read <= 0 || read > INT32_MAX)
      usage(program, 2, name + " takes a positive number of 32 bits, not " + value);
    return read;
  };
  for (int at = 1; at < argc; ++at) {
    const std::string name = argv[at];
    if (name == "--help" || name == "-h") usage(program, 0);
    if (name == "--set")
      options.set = text(at);
    else if (name == "--device")
      options.device = text(at);
    else if (name == "--dtype")
      options.dtype = text(at);
    else if (name == "--kv-dtype")
      options.kv_dtype = text(at);
    else if (name == "--kv-len")
      options.kv_len = number(at);
    else if (name == "--num-qo-heads")
      options.num_qo_heads = number(at);
    else if (name == "--num-kv-heads")
      options.num_kv_heads = number(at);
    else if (name == "--head-dim")
      options.head_dim = number(at);
    else if (name == "--repeats")
      options.repeats = number(at);
    else if (name == "--json")
      options.is_json = true;
    else if (program.is_batch && name == "--batch-size")
      options.batch_size = number(at);
    else if (program.is_batch && name == "--page-size")
      options.page_size = number(at);
    else if (program.is_prefill && name == "--qo-len")
      options.qo_len = number(at);
    else if (program.is_prefill && name == "--no-causal")
      options.is_causal = false;
    else
      usage(program, 2, name + " is no option");
  }
  if (options.kv_dtype.empty()) options.kv_dtype = options.dtype;
  if (!options.device.empty() && options.device != "cuda" && options.device != "cpu")
    usage(program, 2, "--device is cuda or cpu");
  return options;
}

inline Dtype dtype_named(const std::string& name) {
  for (Dtype dtype : {Dtype::kFp32, Dtype::kFp16, Dtype::kBf16, Dtype::kFp8E4m3, Dtype::kFp8E5m2})
    if (name == name_of(dtype)) return dtype;
  throw Error("dtype " + name + " is unknown; expected fp32, fp16, bf16, fp8_e4m3 or fp8_e5m2");
}

// Bytes of numbers that are finite in every dtype, between -2 and 2 in those of 16 bits and more.
inline Buffer random_rows(const Device& device, int64_t num_elements, Dtype dtype) {
  std::vector<uint8_t> bytes(size_t(num_elements) * size_t(itemsize_of(dtype)));
  uint64_t state = 88172645463325252ull;
  const int width = itemsize_of(dtype);
  for (size_t i = 0; i < bytes.size(); ++i) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    bytes[i] = uint8_t(state >> 32);
    if (int(i) % width == width - 1)
      bytes[i] = uint8_t((bytes[i] & 0x80) | (width == 1 ? 0x30 : 0x3C) | (bytes[i] & 3));
  }
  Buffer buffer(device, bytes.size());
  buffer.upload(bytes.data(), bytes.size());
  return buffer;
}

inline Buffer ints_on(const Device& device, const std::vector<int32_t>& values) {
  Buffer buffer(device, values.size() * 4);
  buffer.upload(values.data(), values.size() * 4);
  return buffer;
}

inline Tensor as_ints(const Buffer& buffer) {
  return Tensor(buffer.data(), Dtype::kInt32, {int64_t(buffer.num_bytes() / 4)});
}

// How many sets of buffers are taken in turns, so that none is found in the L2 cache.
inline int num_copies(const Device& device, int64_t num_bytes) {
  constexpr int64_t kL2Bytes = 256 << 20;
  return device.is_cuda() ? int(std::max<int64_t>(2, std::min<int64_t>(32, (kL2Bytes + num_bytes - 1) / num_bytes)))
                          : 1;
}

// What `launch` launches on a stream, as a graph: nothing of the host lies between launches, as in `flashinfer bench`.
class Graph {
 public:
  explicit Graph(const std::function<void(Stream)>& launch) {
    check("cuStreamCreate", driver_.cuStreamCreate(&stream_, host::kNonBlockingStream));
    launch(stream_);  // which loads kernels
    check("cuStreamSynchronize", driver_.cuStreamSynchronize(stream_));
    void* graph = nullptr;
    check("cuStreamBeginCapture", driver_.cuStreamBeginCapture(stream_, host::kThreadLocalCapture));
    launch(stream_);
    check("cuStreamEndCapture", driver_.cuStreamEndCapture(stream_, &graph));
    check("cuGraphInstantiate", driver_.cuGraphInstantiate(&graph_, graph, 0));
    check("cuEventCreate", driver_.cuEventCreate(&begin_, 0));
    check("cuEventCreate", driver_.cuEventCreate(&end_, 0));
  }

  double microseconds() const {
    float milliseconds = 0.f;
    check("cuEventRecord", driver_.cuEventRecord(begin_, stream_));
    check("cuGraphLaunch", driver_.cuGraphLaunch(graph_, stream_));
    check("cuEventRecord", driver_.cuEventRecord(end_, stream_));
    check("cuEventSynchronize", driver_.cuEventSynchronize(end_));
    check("cuEventElapsedTime", driver_.cuEventElapsedTime(&milliseconds, begin_, end_));
    return milliseconds * 1e3;
  }

 private:
  void check(const char* what, int code) const { driver_.check(what, code); }

  const host::Driver& driver_ = host::Driver::get();
  void *stream_ = nullptr, *graph_ = nullptr, *begin_ = nullptr, *end_ = nullptr;  // until the program ends
};

// The median microseconds of a call; call(i, stream) is on the i-th set of buffers.
inline double microseconds(const Device& device, int copies, int64_t repeats,
                           const std::function<void(int, Stream)>& call) {
  const auto call_all = [&](Stream stream) {
    for (int i = 0; i < copies; ++i) call(i, stream);
  };
  device.synchronize();  // with what prepared the calls, on another stream
  std::vector<double> times;
  if (device.is_cuda()) {
    const Graph graph(call_all);
    for (int i = 0; i < 2; ++i) graph.microseconds();  // until the clocks have come up
    for (int64_t repeat = 0; repeat < repeats; ++repeat) times.push_back(graph.microseconds());
  } else {
    call_all(nullptr);
    for (int64_t repeat = 0; repeat < repeats; ++repeat) {
      const auto started = std::chrono::steady_clock::now();
      call_all(nullptr);
      times.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - started).count());
    }
  }
  std::sort(times.begin(), times.end());
  return (times[(times.size() - 1) / 2] + times[times.size() / 2]) / 2 / copies;
}

// Of one benchmark: what is timed over how many bytes and operations.
struct Work {
  int64_t bytes, flops;

  // K and V once, q and the output; two products of each query with each key that it sees.
  static Work of(const Options& o, bool is_prefill) {
    const int64_t sizes = itemsize_of(dtype_named(o.dtype)), kv_sizes = itemsize_of(dtype_named(o.kv_dtype));
    const int64_t kv = 2 * o.kv_len * o.num_kv_heads * o.head_dim * kv_sizes;
    const int64_t rows = 2 * o.qo_len * o.num_qo_heads * o.head_dim * sizes;
    int64_t pairs = o.qo_len * o.kv_len;
    if (is_prefill && o.is_causal && o.kv_len >= o.qo_len) pairs -= o.qo_len * (o.qo_len - 1) / 2;
    return {o.batch_size * (kv + rows), o.batch_size * 4 * pairs * o.num_qo_heads * o.head_dim};
  }
};

inline void report(const Program& program, const Options& o, const Device& device, double us) {
  const Work work = Work::of(o, program.is_prefill);
  const std::string name = std::to_string(o.batch_size) + " x " + std::to_string(o.qo_len) + " on " +
                           std::to_string(o.kv_len) + ", " + std::to_string(o.num_qo_heads) + "/" +
                           std::to_string(o.num_kv_heads) + ", d" + std::to_string(o.head_dim) +
                           (program.is_batch ? ", p" + std::to_string(o.page_size) : "") +
                           (program.is_prefill && o.is_causal ? ", causal" : "") + ", " + o.kv_dtype;
  if (o.is_json) {
    std::printf(
        "{\"benchmark\": \"%s\", \"case\": \"%s\", \"target\": \"%s\", \"us\": %.3f, \"bytes\": %lld, \"flops\": "
        "%lld}\n",
        program.name + 6, name.c_str(), device.target().c_str(), us, (long long)work.bytes, (long long)work.flops);
    return;
  }
  std::printf("| %s, %s | us | TB/s | TFLOP/s |\n| --- | --- | --- | --- |\n", program.name + 6,
              device.target().c_str());
  std::printf("| %s | %.1f | %.3f | %.1f |\n", name.c_str(), us, double(work.bytes) / us * 1e-6,
              double(work.flops) / us * 1e-6);
}

inline Device device_named(const std::string& name) {
  if (name == "cpu") return Device::cpu();
  try {
    return Device::cuda(0);
  } catch (const Error&) {
    if (!name.empty()) throw;
    return Device::cpu();  // which the table says
  }
}

// main() of a program: measure(options, kernels) returns the microseconds of a call.
inline int run(const Program& program, int argc, char** argv,
               const std::function<double(const Options&, Kernels&)>& measure) {
  const Options options = parse(program, argc, argv);
  try {
    std::vector<std::string> roots;
    if (!options.set.empty()) roots.push_back(options.set);
    Kernels kernels(device_named(options.device), roots);
    report(program, options, kernels.device(), measure(options, kernels));
    return 0;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "%s: no memory for this case; expected fewer or shorter requests\n", program.name);
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program.name, error.what());
    return 1;
  }
}

// Requests of equal length over pages in order, and their tensors, as often as none stays in the L2 cache.
struct PagedBatch {
  PagedBatch(const Options& o, const Device& device)
      : num_pages((o.kv_len + o.page_size - 1) / o.page_size),
        dtype(dtype_named(o.dtype)),
        kv_dtype(dtype_named(o.kv_dtype)),
        copies(num_copies(device, Work::of(o, false).bytes)) {
    std::vector<int32_t> starts, numbers, rest(size_t(o.batch_size), int32_t((o.kv_len - 1) % o.page_size + 1));
    std::vector<int32_t> rows;
    for (int64_t i = 0; i <= o.batch_size; ++i) {
      starts.push_back(int32_t(i * num_pages));
      rows.push_back(int32_t(i * o.qo_len));
    }
    for (int64_t page = 0; page < o.batch_size * num_pages; ++page) numbers.push_back(int32_t(page));
    indptr = ints_on(device, starts), indices = ints_on(device, numbers), last = ints_on(device, rest);
    qo_indptr = ints_on(device, rows);
    const int64_t cache = o.batch_size * num_pages * o.page_size * o.num_kv_heads * o.head_dim;
    const int64_t tokens = o.batch_size * o.qo_len * o.num_qo_heads * o.head_dim;
    for (int i = 0; i < copies; ++i) {
      k.push_back(random_rows(device, cache, kv_dtype));
      v.push_back(random_rows(device, cache, kv_dtype));
      q.push_back(random_rows(device, tokens, dtype));
      out.push_back(random_rows(device, tokens, dtype));
    }
    shape = {int32_t(o.num_qo_heads),
             int32_t(o.num_kv_heads),
             int32_t(o.head_dim),
             0,
             int32_t(o.page_size),
             dtype,
             kv_dtype,
             dtype};
  }

  PageTable table() const { return {as_ints(indptr), as_ints(indices), as_ints(last)}; }
  PagedCache cache(const Options& o, int i) const {
    const auto of = [&](const Buffer& x) {
      return Tensor(x.data(), kv_dtype, {o.batch_size * num_pages, o.page_size, o.num_kv_heads, o.head_dim});
    };
    return {of(k[size_t(i)]), of(v[size_t(i)])};
  }
  Tensor tokens(const Options& o, const Buffer& x) const {
    return Tensor(x.data(), dtype, {o.batch_size * o.qo_len, o.num_qo_heads, o.head_dim});
  }

  int64_t num_pages;
  Dtype dtype, kv_dtype;
  int copies;
  Buffer indptr, indices, last, qo_indptr;
  std::vector<Buffer> k, v, q, out;
  AttentionShape shape;
};

}  // namespace bench
