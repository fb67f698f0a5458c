// SPDX-License-Identifier: Apache-2.0
// NVRTC, NVIDIA's compiler of CUDA as a library, found by dlopen: no header of CUDA is needed to compile a program.
#pragma once

#include <dlfcn.h>

#include <cstdio>
#include <filesystem>

#include "flashinfer/tensor.hpp"

namespace flashinfer::host {

class Nvrtc {
 public:
  struct Compiled {
    bool succeeded;
    std::string machine_code, log;
  };

  // The library of one of these names or paths, the first that there is. Raises Error where there is none.
  explicit Nvrtc(const std::vector<std::string>& names) {
    std::string tried;
    for (const std::string& name : names) {
      library_ = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL);
      if (library_ != nullptr) break;
      tried += (tried.empty() ? "" : ", ") + name;
    }
    require(library_ != nullptr, "NVRTC, the compiler of CUDA kernels, was not found (tried ", tried,
            "). Install it by pip install nvidia-cuda-nvrtc nvidia-cuda-runtime (CUDA 12: nvidia-cuda-nvrtc-cu12 and "
            "nvidia-cuda-runtime-cu12) or a CUDA toolkit, and name the library in FLASHINFER_NVRTC");
    find(nvrtcVersion, "nvrtcVersion");
    find(nvrtcGetErrorString, "nvrtcGetErrorString");
    find(nvrtcCreateProgram, "nvrtcCreateProgram");
    find(nvrtcCompileProgram, "nvrtcCompileProgram");
    find(nvrtcDestroyProgram, "nvrtcDestroyProgram");
    find(nvrtcGetProgramLogSize, "nvrtcGetProgramLogSize");
    find(nvrtcGetProgramLog, "nvrtcGetProgramLog");
    find(nvrtcGetCUBINSize, "nvrtcGetCUBINSize");
    find(nvrtcGetCUBIN, "nvrtcGetCUBIN");
    Dl_info info;
    require(dladdr(reinterpret_cast<void*>(nvrtcVersion), &info) != 0, "NVRTC does not say where it is");
    path_ = info.dli_fname;
    // It asks the dynamic loader for a second library, which pip has beside it and on no path that the loader searches.
    std::error_code none;
    for (const auto& file : std::filesystem::directory_iterator(std::filesystem::path(path_).parent_path(), none))
      if (file.path().filename().string().compare(0, 20, "libnvrtc-builtins.so") == 0)
        dlopen(file.path().c_str(), RTLD_NOW | RTLD_LOCAL);
    int major = 0, minor = 0;
    check("nvrtcVersion", nvrtcVersion(&major, &minor));
    // It states no patch level; the size of the file tells two builds of one release apart. As in toolchain.py.
    identity_ = "nvrtc-" + std::to_string(major) + "." + std::to_string(minor) + "-" +
                std::to_string(std::filesystem::file_size(path_, none));
  }

  const std::string& path() const { return path_; }
  const std::string& identity() const { return identity_; }

  Compiled compile(const std::string& text, const std::string& name, const std::vector<std::string>& options) const {
    struct Program {
      const Nvrtc& nvrtc;
      void* handle = nullptr;
      ~Program() {
        if (handle != nullptr) nvrtc.nvrtcDestroyProgram(&handle);
      }
    } program{*this};
    check("nvrtcCreateProgram", nvrtcCreateProgram(&program.handle, text.c_str(), name.c_str(), 0, nullptr, nullptr));
    std::vector<const char*> passed;
    for (const std::string& option : options) passed.push_back(option.c_str());
    const int failed = nvrtcCompileProgram(program.handle, int(passed.size()), passed.data());
    Compiled result = {failed == 0, "", read(program.handle, nvrtcGetProgramLogSize, nvrtcGetProgramLog)};
    result.log.resize(result.log.find_last_not_of('\0') + 1);
    if (failed == 0) result.machine_code = read(program.handle, nvrtcGetCUBINSize, nvrtcGetCUBIN);
    if (failed != 0 && result.log.empty()) result.log = nvrtcGetErrorString(failed);
    return result;
  }

 private:
  template <class Function>
  void find(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library_, name));
    require(function != nullptr, "NVRTC has no ", name, "; expected one of CUDA 12 or later");
  }

  void check(const char* what, int code) const {
    if (code != 0) fail(what, ": ", nvrtcGetErrorString(code), " (NVRTC at ", path_, ")");
  }

  std::string read(void* program, int (*size_of)(void*, size_t*), int (*get)(void*, char*)) const {
    size_t size = 0;
    check("the size of what NVRTC made", size_of(program, &size));
    std::string content(size, '\0');
    check("what NVRTC made", get(program, content.data()));
    return content;
  }

  int (*nvrtcVersion)(int*, int*) = nullptr;
  const char* (*nvrtcGetErrorString)(int) = nullptr;
  int (*nvrtcCreateProgram)(void**, const char*, const char*, int, const char* const*, const char* const*) = nullptr;
  int (*nvrtcCompileProgram)(void*, int, const char* const*) = nullptr;
  int (*nvrtcDestroyProgram)(void**) = nullptr;
  int (*nvrtcGetProgramLogSize)(void*, size_t*) = nullptr;
  int (*nvrtcGetProgramLog)(void*, char*) = nullptr;
  int (*nvrtcGetCUBINSize)(void*, size_t*) = nullptr;
  int (*nvrtcGetCUBIN)(void*, char*) = nullptr;

  void* library_ = nullptr;
  std::string path_, identity_;
};

}  // namespace flashinfer::host
