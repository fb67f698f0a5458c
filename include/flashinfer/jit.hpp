// SPDX-License-Identifier: Apache-2.0
// Kernels that no registry holds, compiled by NVRTC on first use. docs/cpp.md.
//
//   flashinfer::JitOptions how;
//   how.recipes = "recipes.json";  // flashinfer aot recipes --target sm_90a --out recipes.json
//   flashinfer::Kernels kernels(flashinfer::Device::cuda(0), {"/path/of/a/set"}, flashinfer::jit(how));
//
// Source text and options are Python's, so the machine code is, and both share a cache of it.
#pragma once

#include "flashinfer/jit_cache.hpp"
#include "flashinfer/kernels.hpp"
#include "flashinfer/nvrtc.hpp"

namespace flashinfer {

// That a kernel was not in a registry, and what was done about it.
struct JitEvent {
  enum class Kind { kCompiling, kCompiled, kFound };  // found: in the cache
  Kind kind;
  std::string kernel, target, why;  // why: no registry answered
  double seconds = 0.0;
  size_t num_bytes = 0;  // of machine code
  std::string place;     // its file in the cache, or why there is none
};

// A line on stderr.
inline void print_event(const JitEvent& event) {
  const char *kernel = event.kernel.c_str(), *target = event.target.c_str(), *place = event.place.c_str();
  if (event.kind == JitEvent::Kind::kCompiling) {
    std::fprintf(stderr, "flashinfer: compiling %s for %s: %s\n", kernel, target, event.why.c_str());
  } else if (event.kind == JitEvent::Kind::kCompiled) {
    std::fprintf(stderr, "flashinfer: compiled %s for %s in %.2f s, %zu bytes, %s\n", kernel, target, event.seconds,
                 event.num_bytes, place);
  } else {
    std::fprintf(stderr, "flashinfer: %s for %s is from the JIT cache, %s: %s\n", kernel, target, place,
                 event.why.c_str());
  }
}

struct JitOptions {
  std::string recipes;  // the file that flashinfer aot recipes wrote
  // "": FLASHINFER_NVRTC, where the recipes were written, or what the dynamic loader finds.
  std::string nvrtc;
  // "": where the recipes were written. The headers of CUDA, with cuda_fp16.h, may be beside NVRTC too.
  std::string csrc, cuda_include;
  std::string cache_dir;  // "": FLASHINFER_CACHE_DIR, or the user's cache, as in Python
  // Called by the thread that asks, while others wait for the same Jit: it must not ask for kernels.
  std::function<void(const JitEvent&)> on_event = print_event;
};

// May be shared by the Kernels of several devices.
class Jit final : public Compiler {
 public:
  // Raises Error where there are no recipes that this header can read. NVRTC is looked for once it is needed.
  explicit Jit(JitOptions options)
      : options_(std::move(options)), recipes_(options_.recipes), cache_(options_.cache_dir) {}

  const host::Recipes& recipes() const { return recipes_; }

  Answer make(const std::vector<Request>& requests, const std::vector<std::string>& targets,
              const std::string& reasons) override {
    std::lock_guard<std::mutex> one_at_a_time(mutex_);
    std::string why;  // in a line
    for (char c : reasons)
      if (c != '\n' && !(c == ' ' && !why.empty() && why.back() == ' '))
        why += c;
      else if (why.empty() || why.back() != ' ')
        why += ' ';
    std::string lack;  // of a compiler: then another request may be in the cache
    for (const std::string& target : targets)
      for (const Request& request : requests)
        if (const auto source = recipes_.source_of(request, target)) {
          Answer made = make(*source, why);
          if (made.why_not.empty()) return made;
          lack = made.why_not;
        }
    if (!lack.empty()) return {{}, {}, lack};
    return {{},
            {},
            recipes_.path() + ": " + (recipes_.has(targets.front()) ? "no recipe for it" : "no recipes for ") +
                (recipes_.has(targets.front()) ? "" : targets.front()) + " (flashinfer aot recipes)"};
  }

 private:
  using Kind = JitEvent::Kind;

  Answer make(const host::Source& source, const std::string& why) {
    const std::string lack = require_compiler();
    const std::string compiler = nvrtc_ ? nvrtc_->identity() : "";
    if (auto found = from_cache(source, compiler, why)) return *found;
    if (!nvrtc_) return {{}, {}, lack};
    const host::JitCache::Lock lock(cache_, source);
    if (auto found = from_cache(source, compiler, why)) return *found;  // another process was faster
    tell({Kind::kCompiling, source.entry.name, source.entry.target, why, 0, 0, ""});
    const auto started = std::chrono::steady_clock::now();
    std::vector<std::string> options = {"-arch=" + source.entry.target};
    for (const auto* more : {&recipes_.flags(), &recipes_.options()})
      options.insert(options.end(), more->begin(), more->end());
    const std::string csrc = place(options_.csrc, "csrc");
    std::error_code none;
    host::require(std::filesystem::is_directory(csrc, none), "the headers of kernels are not in ", csrc,
                  ". Next step: name their folder in JitOptions::csrc, or write recipes here (flashinfer aot recipes)");
    options.push_back("-I" + csrc);
    options.push_back("-I" + cuda_include());
    require_headers(csrc, source);
    const host::Nvrtc::Compiled made = nvrtc_->compile(source.text, source.entry.family + ".cu", options);
    host::require(made.succeeded, source.entry.name, " (", source.entry.target, ") did not compile\n", made.log);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    std::string kept;
    try {
      kept = cache_.publish(source, compiler, recipes_.flags(), made.machine_code, made.log);
    } catch (const std::exception& error) {
      kept = std::string("kept in this process alone: ") + error.what();
    }
    tell({Kind::kCompiled, source.entry.name, source.entry.target, why, took.count(), made.machine_code.size(), kept});
    return {source.entry, made.machine_code, ""};
  }

  std::optional<Answer> from_cache(const host::Source& source, const std::string& compiler, const std::string& why) {
    auto found = cache_.find(source, compiler);
    if (!found) return std::nullopt;
    tell({Kind::kFound, source.entry.name, source.entry.target, why, 0, found->first.size(), found->second});
    return Answer{source.entry, std::move(found->first), ""};
  }

  void tell(const JitEvent& event) const {
    if (options_.on_event) options_.on_event(event);
  }

  // Why there is no NVRTC; "" where there is.
  std::string require_compiler() {
    if (nvrtc_) return "";
    std::vector<std::string> names = {options_.nvrtc};
    if (options_.nvrtc.empty()) {
      const char* chosen = std::getenv("FLASHINFER_NVRTC");
      names = {chosen == nullptr ? "" : chosen};
      if (names[0].empty()) names = {recipes_.place("nvrtc"), "libnvrtc.so.13", "libnvrtc.so.12"};
      if (names[0].empty()) names.erase(names.begin());
    }
    try {
      nvrtc_.emplace(names);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }

  std::string place(const std::string& chosen, const char* name) const {
    return chosen.empty() ? recipes_.place(name) : chosen;
  }

  std::string cuda_include() const {
    const std::string beside = std::filesystem::path(nvrtc_->path()).parent_path().string();
    const std::vector<std::string> folders =
        options_.cuda_include.empty()
            ? std::vector<std::string>{beside + "/../include", beside + "/../../cuda_runtime/include",
                                       recipes_.place("cuda_include"), "/usr/local/cuda/include"}
            : std::vector<std::string>{options_.cuda_include};
    std::string tried;
    for (const std::string& folder : folders) {
      if (std::filesystem::exists(folder + "/cuda_fp16.h")) return folder;
      tried += (tried.empty() ? "" : ", ") + folder;
    }
    host::fail("the headers of CUDA (cuda_fp16.h) were not found in ", tried,
               ". Next step: pip install nvidia-cuda-runtime, or name their folder in JitOptions::cuda_include");
  }

  // What is compiled is what the digest speaks of, by which Python trusts the cache.
  void require_headers(const std::string& csrc, const host::Source& source) {
    for (const std::string& header : source.headers) {
      if (verified_.count(header) > 0) continue;
      const std::string path = csrc + "/" + header;
      host::require(host::Sha256::hex_of(host::content_of(path)) == recipes_.sha256_of(header), path,
                    " is not the one that ", recipes_.path(), " was written of. Next step: write it anew, by ",
                    "flashinfer aot recipes, or name the folder of the headers in JitOptions::csrc");
      verified_.insert(header);
    }
  }

  JitOptions options_;
  host::Recipes recipes_;
  host::JitCache cache_;
  std::optional<host::Nvrtc> nvrtc_;
  std::set<std::string> verified_;
  std::mutex mutex_;
};

inline std::shared_ptr<Jit> jit(JitOptions options) {
  return std::make_shared<Jit>(std::move(options));
}

}  // namespace flashinfer
