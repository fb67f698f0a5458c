// SPDX-License-Identifier: Apache-2.0
// Kernels of registries on one device: found, loaded once, launched.
#pragma once

#include <dlfcn.h>

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "flashinfer/device.hpp"
#include "flashinfer/registry.hpp"

namespace flashinfer {

struct Grid {
  uint32_t x = 1, y = 1, z = 1;
};

// No registry holds a kernel, or several that a call takes. rows() is what to add to a config.
class KernelMissing : public Error {
 public:
  struct Lack {
    std::string row, why;
  };
  KernelMissing(std::vector<Lack> lacks, const std::string& next_step)
      : Error(joined(lacks, &Lack::why, "\n") + "\nNext step: " + next_step + "\n\n" + joined(lacks, &Lack::row, "\n")),
        lacks_(std::move(lacks)) {}

  std::string rows() const { return joined(lacks_, &Lack::row, "\n"); }
  const std::vector<Lack>& lacks() const { return lacks_; }

 private:
  static std::string joined(const std::vector<Lack>& lacks, std::string Lack::* part, const char* between) {
    std::string text;
    for (const Lack& lack : lacks) text += (text.empty() ? "" : between) + lack.*part;
    return text;
  }

  std::vector<Lack> lacks_;
};

namespace host {
// What Kernels::rehearse() has found missing on this thread; null where it does not run.
inline thread_local std::vector<KernelMissing::Lack>* rehearsal = nullptr;

// Whether there is a plan to run. One of a rehearsal is for rehearsals alone: its planner was not launched.
class Planned {
 public:
  void note() { state_ = rehearsal == nullptr ? State::kPlanned : State::kRehearsed; }
  void require_one(const char* op, const char* plan = "plan()") const {
    require(state_ == State::kPlanned || (state_ == State::kRehearsed && rehearsal != nullptr), op, ": ",
            state_ == State::kNone ? "nothing is planned" : "the last plan was a rehearsal", ". Next step: ", plan);
  }

 private:
  enum class State { kNone, kRehearsed, kPlanned } state_ = State::kNone;
};
}  // namespace host

// One that is loaded. Lives as long as the Kernels it is from; safe to launch from several threads.
class Kernel {
 public:
  const Entry& entry() const { return entry_; }
  bool is_cuda() const { return function_ != nullptr; }
  int units_per_block() const { return entry_.units_per_block; }
  int max_blocks_per_sm() const { return max_blocks_per_sm_; }  // 1 on a CPU
  // Whether a launch may overlap the kernel before it on the stream (programmatic dependent launch).
  bool is_dependent() const { return is_dependent_; }

  // A constant the kernel was compiled with, such as kBlockM. Raises Error where there is none.
  int64_t number(const std::string& name) const {
    if (is_stand_in_) return 64;  // that fits wherever one is asked for
    const auto found = entry_.numbers.find(name);
    host::require(found != entry_.numbers.end(), entry_.name, ": the registry tells no constant ", name);
    return found->second;
  }

  template <class Params>
  bool takes() const {
    return entry_.params == Layout<Params>::kName && entry_.abi == Layout<Params>::kAbi;
  }

  // On a CPU the call returns when the kernel has ended, and the grid is of no meaning. Raises Error where the kernel
  // takes another struct, or the launch fails.
  template <class Params>
  void launch(Grid grid, const Params& params, Stream stream = nullptr) const {
    if (!is_stand_in_ && entry_.abi != Layout<Params>::kAbi) refuse(Layout<Params>::kName, Layout<Params>::kAbi);
    if (host::rehearsal != nullptr) return;
    host::require(!is_stand_in_, "a kernel was missing at a rehearsal. Next step: plan again, which says which");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (is_cuda()) {
      launch_on_gpu(grid, &params, stream);
    } else {
      host::require(call_(&params), entry_.name,
                    ": no memory for what the kernel writes down on its way; the result is ",
                    "not complete. Next step: free memory, or use fewer threads (OMP_NUM_THREADS)");
    }
  }

 private:
  friend class Kernels;

  Kernel() : is_stand_in_(true) {}  // for a missing one, at a rehearsal
  // path: of the machine code, which the dynamic loader reads on a CPU.
  Kernel(const Device& device, const Entry& entry, const std::string& machine_code, const std::string& path)
      : entry_(entry), context_(device.context()) {
    if (device.is_cuda()) {
      load_on_gpu(device, machine_code);
    } else {
      load_on_cpu(path);
    }
  }

  static std::unique_ptr<Kernel> of_registry(const Device& device, const Entry& entry, const std::string& root) {
    const std::string path = root + "/" + entry.file;
    std::string machine_code;
    try {
      machine_code = host::content_of(path);
      host::require(host::Sha256::hex_of(machine_code) == entry.sha256, path,
                    ": sha256 mismatch: the file is not the one that the registry describes");
    } catch (const Error& error) {
      host::fail(error.what(), ". Next step: build the set anew (flashinfer aot build)");
    }
    return std::unique_ptr<Kernel>(new Kernel(device, entry, machine_code, path));
  }

  void load_on_gpu(const Device& device, const std::string& machine_code) {
    const host::Driver& driver = host::Driver::get();
    void *library = nullptr, *kernel = nullptr;
    host::InContext in(device.context());
    int mode = 2;  // relaxed: loading while a stream is captured does not spoil the capture
    driver.check("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(&mode));
    const int code = driver.cuLibraryLoadData(&library, machine_code.data(), nullptr, nullptr, 0, nullptr, nullptr, 0);
    driver.cuThreadExchangeStreamCaptureMode(&mode);
    driver.check(("loading " + entry_.name).c_str(), code);
    driver.check("cuLibraryGetKernel", driver.cuLibraryGetKernel(&kernel, library, entry_.family.c_str()));
    driver.check("cuKernelGetFunction", driver.cuKernelGetFunction(&function_, kernel));
    if (entry_.smem_bytes > 48 * 1024)
      driver.check("cuFuncSetAttribute",
                   driver.cuFuncSetAttribute(function_, host::kMaxDynamicSmem, entry_.smem_bytes));
    driver.check("cuOccupancyMaxActiveBlocksPerMultiprocessor",
                 driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(&max_blocks_per_sm_, function_, entry_.num_threads,
                                                                    size_t(entry_.smem_bytes)));
    if (entry_.cluster_size > 1)
      attributes_.push_back({host::kClusterDimension, 0, {uint32_t(entry_.cluster_size), 1, 1}});
    // Drivers before 12.3 do not capture dependent launches into graphs.
    is_dependent_ = std::atoi(entry_.target.c_str() + 3) >= 90 && driver.version() >= 12030;
    if (is_dependent_) attributes_.push_back({host::kProgrammaticSerialization, 0, {1}});
  }

  void load_on_cpu(const std::string& path) {
    // Kernels leave the symbols of OpenMP open, and share the threads of whatever runtime the process has.
    static void* const openmp = [] {
      for (const char* name : {"libgomp.so.1", "libomp.so", "libomp.so.5"})
        if (void* found = dlopen(name, RTLD_NOW | RTLD_GLOBAL); found != nullptr) return found;
      return static_cast<void*>(nullptr);
    }();
    host::require(openmp != nullptr, "no OpenMP runtime was found. Next step: install libgomp1");
    void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) host::fail(path, " does not load: ", dlerror());
    call_ = reinterpret_cast<bool (*)(const void*)>(dlsym(library, entry_.family.c_str()));
    host::require(call_ != nullptr, path, " has no function ", entry_.family);
  }

  void launch_on_gpu(Grid grid, const void* params, Stream stream) const {
    const host::Driver& driver = host::Driver::get();
    host::LaunchConfig config = {{grid.x, grid.y, grid.z},
                                 {uint32_t(entry_.num_threads), 1, 1},
                                 uint32_t(entry_.smem_bytes),
                                 stream,
                                 attributes_.empty() ? nullptr : const_cast<host::LaunchAttribute*>(attributes_.data()),
                                 uint32_t(attributes_.size())};
    void* arguments[] = {const_cast<void*>(params)};
    int code = driver.cuLaunchKernelEx(&config, function_, arguments, nullptr);
    // A thread that has made no CUDA call yet has no current context, and a caller may be on another device.
    if (code == host::kInvalidContext || code == host::kInvalidHandle) {
      host::InContext in(context_);
      code = driver.cuLaunchKernelEx(&config, function_, arguments, nullptr);
    }
    if (code != 0) driver.check(("launch of " + entry_.name).c_str(), code);
  }

  [[noreturn]] void refuse(const char* given, uint64_t abi) const {
    host::fail(entry_.name, " takes ", entry_.params, " of the layout ", std::hex, entry_.abi, "; given ", given,
               " of the layout ", abi);
  }

  Entry entry_;
  bool is_stand_in_ = false;
  void* context_ = nullptr;
  void* function_ = nullptr;             // CUfunction
  bool (*call_)(const void*) = nullptr;  // of a CPU
  int max_blocks_per_sm_ = 1;
  bool is_dependent_ = false;
  std::vector<host::LaunchAttribute> attributes_;
};

// Where kernels come from that no registry holds: Jit, of jit.hpp.
class Compiler {
 public:
  struct Answer {
    Entry entry;
    std::string machine_code;
    std::string why_not;  // "": here it is
  };
  virtual ~Compiler() = default;
  // One that answers the first of these requests that can be answered, for the first of these targets. why: no registry
  // does. Raises Error where compiling fails. Safe to call from several threads.
  virtual Answer make(const std::vector<Request>& requests, const std::vector<std::string>& targets,
                      const std::string& why) = 0;
};

// What the registries of some folders hold for a device, and what a compiler makes. Safe to use from several threads.
class Kernels {
 public:
  // roots: folders with a registry.json, asked in this order; none: those of FLASHINFER_AOT_PATH, which ':' parts.
  explicit Kernels(Device device, std::vector<std::string> roots = {}, std::shared_ptr<Compiler> compiler = nullptr)
      : device_(std::move(device)), compiler_(std::move(compiler)) {
    host::require(compiler_ == nullptr || device_.is_cuda(), "a compiler is given, and kernels are compiled for GPUs ",
                  "alone; expected none for a CPU. Next step: build a set by flashinfer aot build");
    if (roots.empty()) roots = roots_of_environment();
    host::require(!roots.empty() || compiler_ != nullptr,
                  "no folder with a registry.json is given. Next step: build one by flashinfer aot build ",
                  "--config core --target ", device_.target(),
                  " --out DIR, and name it here or in FLASHINFER_AOT_PATH");
    for (const std::string& root : roots) registries_.push_back(std::make_unique<Registry>(root));
    targets_ = candidates(device_.target());
  }

  const Device& device() const { return device_; }
  const std::vector<std::unique_ptr<Registry>>& registries() const { return registries_; }

  // The kernel that answers a request on this device, loaded. Raises KernelMissing where there is none, Error where one
  // is damaged or does not load.
  const Kernel& find(const Request& request) { return find_first({request}); }

  // The first of several requests that has a kernel: those that differ in speed alone, best first.
  const Kernel& find_first(const std::vector<Request>& requests) { return *find_each({requests}).front(); }

  // That of each list, for a call that takes several kernels: one KernelMissing tells of all that are missing.
  std::vector<const Kernel*> find_each(const std::vector<std::vector<Request>>& wanted) {
    std::vector<const Kernel*> found;
    std::vector<KernelMissing::Lack> lacks;
    for (const std::vector<Request>& requests : wanted) {
      const Kernel* kernel = nullptr;
      for (size_t i = 0; i < requests.size() && kernel == nullptr; ++i) kernel = look_up(requests[i]);
      if (kernel == nullptr) {
        std::string why = reason_of(requests.front());
        if (compiler_ != nullptr) kernel = compile(requests, why);
        if (kernel == nullptr) lacks.push_back({requests.front().row(), std::move(why)});
      }
      found.push_back(kernel == nullptr ? &stand_in() : kernel);
    }
    if (!lacks.empty() && host::rehearsal == nullptr) throw KernelMissing(std::move(lacks), next_step());
    for (KernelMissing::Lack& lack : lacks) {
      const auto is_same = [&](const KernelMissing::Lack& known) { return known.row == lack.row; };
      if (std::none_of(host::rehearsal->begin(), host::rehearsal->end(), is_same))
        host::rehearsal->push_back(std::move(lack));
    }
    return found;
  }

  // Runs part of a program without its launches: kernels are found and loaded, and memory stays as it is. Then raises
  // one KernelMissing with the rows of all that is missing. To be called before a server starts:
  //
  //   kernels.rehearse([&] { rope(kernels, …); append(kernels, …); decode.plan(…); decode.run(…); });
  void rehearse(const std::function<void()>& part) const {
    std::vector<KernelMissing::Lack> lacks;
    struct Rehearsing {
      explicit Rehearsing(std::vector<KernelMissing::Lack>& into) : before(std::exchange(host::rehearsal, &into)) {}
      ~Rehearsing() { host::rehearsal = before; }
      std::vector<KernelMissing::Lack>* before;
    };
    {
      const Rehearsing here(lacks);
      part();
    }
    if (!lacks.empty()) throw KernelMissing(std::move(lacks), next_step());
  }

  // Whether a kernel is there, without loading it.
  bool holds(const Request& request) const { return find_entry(request.key()).first != nullptr; }

 private:
  static std::vector<std::string> roots_of_environment() {
    std::vector<std::string> roots;
    const char* text = std::getenv("FLASHINFER_AOT_PATH");
    std::istringstream paths(text == nullptr ? "" : text);
    for (std::string path; std::getline(paths, path, ':');)
      if (!path.empty()) roots.push_back(path);
    return roots;
  }

  static const Kernel& stand_in() {
    static const Kernel kernel;
    return kernel;
  }

  const Kernel* look_up(const Request& request) {
    const std::string key = request.key();
    std::lock_guard<std::mutex> lock(mutex_);
    if (const auto known = loaded_.find(key); known != loaded_.end()) return known->second.get();
    const auto [entry, registry] = find_entry(key);
    if (entry == nullptr) return nullptr;
    return loaded_.emplace(key, Kernel::of_registry(device_, *entry, registry->root())).first->second.get();
  }

  // One of several requests; null where the compiler has none of them, and then `why` says that too.
  const Kernel* compile(const std::vector<Request>& requests, std::string& why) {
    std::lock_guard<std::mutex> one_at_a_time(compiling_);
    for (const Request& request : requests)  // another thread may have been faster
      if (const Kernel* found = look_up(request)) return found;
    Compiler::Answer made = compiler_->make(requests, targets_, why);
    if (!made.why_not.empty()) {
      why += "\n  " + made.why_not;
      return nullptr;
    }
    std::unique_ptr<Kernel> kernel(new Kernel(device_, made.entry, made.machine_code, ""));
    std::lock_guard<std::mutex> lock(mutex_);
    return loaded_.emplace(made.entry.key, std::move(kernel)).first->second.get();
  }

  std::pair<const Entry*, const Registry*> find_entry(const std::string& key) const {
    for (const auto& registry : registries_) {
      const std::vector<size_t>* found = registry->find(key);
      if (found == nullptr) continue;
      for (const std::string& target : targets_)
        for (size_t at : *found)
          if (const Entry& entry = registry->entries()[at]; entry.target == target && reason(entry).empty())
            return {&entry, registry.get()};
    }
    return {nullptr, nullptr};
  }

  // Why an entry of a right target is not used; "" where it is.
  std::string reason(const Entry& entry) const {
    if (!entry.is_described) return "the registry does not tell how it is launched (flashinfer aot build --refresh)";
    if (!device_.is_cuda() || entry.cuda_major == 0) return "";
    const int version = host::Driver::get().version();
    if (version / 1000 >= entry.cuda_major) return "";
    return "needs a driver of CUDA " + std::to_string(entry.cuda_major) + ", found " + std::to_string(version / 1000);
  }

  // Why no registry answers a request: a line, and one for each registry.
  std::string reason_of(const Request& wanted) const {
    std::string reasons = "no kernel " + wanted.family() + " for " + device_.target() + ":";
    for (const auto& registry : registries_) {
      std::string why = "not in the registry";
      if (const std::vector<size_t>* found = registry->find(wanted.key()); found != nullptr) {
        why = "no machine code for " + device_.target() + ", only for";
        for (size_t at : *found) why += " " + registry->entries()[at].target;
        for (size_t at : *found) {
          const Entry& entry = registry->entries()[at];
          const bool runs = std::count(targets_.begin(), targets_.end(), entry.target) > 0;
          if (runs && !reason(entry).empty()) why = reason(entry);
        }
      }
      reasons += "\n  " + registry->root() + ": " + why;
    }
    if (registries_.empty()) reasons += "\n  no set is given";
    return reasons;
  }

  std::string next_step() const {
    return "add these rows to a config, mine.toml, and run flashinfer aot build --config mine.toml --target " +
           device_.target() + " --out " + (registries_.empty() ? "SET" : registries_.front()->root());
  }

  Device device_;
  std::vector<std::string> targets_;
  std::vector<std::unique_ptr<Registry>> registries_;
  std::unordered_map<std::string, std::unique_ptr<Kernel>> loaded_;
  std::shared_ptr<Compiler> compiler_;
  mutable std::mutex mutex_;
  std::mutex compiling_;  // taken before the other, which others need meanwhile
};

}  // namespace flashinfer
