// SPDX-License-Identifier: Apache-2.0
// The cache of compiled kernels that Python has too (JitCache of flashinfer/jit/stores.py, which says why it is safe):
// <root>/<digest prefix>-<compiler>/{kernel.cubin, spec.json, source.cu, log.txt}, a folder published by one rename.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "flashinfer/recipes.hpp"

namespace flashinfer::host {

class JitCache {
 public:
  // folder "": FLASHINFER_CACHE_DIR, or the user's cache. Without either, nothing is kept.
  explicit JitCache(std::string folder) {
    const auto of = [](const char* name) -> std::string {
      const char* value = std::getenv(name);
      return value == nullptr ? "" : value;
    };
    if (folder.empty()) folder = of("FLASHINFER_CACHE_DIR");
    if (folder.empty() && !of("XDG_CACHE_HOME").empty()) folder = of("XDG_CACHE_HOME") + "/flashinfer";
    if (folder.empty() && !of("HOME").empty()) folder = of("HOME") + "/.cache/flashinfer";
    if (folder.compare(0, 2, "~/") == 0) folder = of("HOME") + folder.substr(1);
    std::error_code error;
    if (!folder.empty()) root_ = std::filesystem::absolute(folder, error) / "jit";
  }

  // The machine code of a source, and the file that it is in; of any compiler where none is named. None where there is
  // none, or what there is is damaged.
  std::optional<std::pair<std::string, std::string>> find(const Source& source, const std::string& compiler) const {
    if (root_.empty()) return std::nullopt;
    const std::string prefix = source.digest.substr(0, 32) + "-";
    if (!compiler.empty()) return read(root_ / (prefix + compiler), source);
    std::error_code error;
    for (const auto& folder : std::filesystem::directory_iterator(root_, error))
      if (folder.path().filename().string().compare(0, prefix.size(), prefix) == 0)
        if (auto found = read(folder.path(), source)) return found;
    return std::nullopt;
  }

  // Writes a compiled kernel; the file of its machine code. Raises Error, or what std::filesystem does.
  std::string publish(const Source& source, const std::string& compiler, const std::vector<std::string>& flags,
                      const std::string& machine_code, const std::string& log) const {
    require(!root_.empty(), "there is no home directory; set FLASHINFER_CACHE_DIR to a writable folder");
    std::filesystem::create_directories(root_);
    const Path folder = root_ / (source.digest.substr(0, 32) + "-" + compiler);
    std::string name = (root_ / ".partial-XXXXXX").string();
    require(mkdtemp(name.data()) != nullptr, root_.string(), " cannot be written");
    const Removed partial{name};
    std::string meta = "{\n " + source.spec + "\"digest\": \"" + source.digest + "\",\n \"file\": \"kernel.cubin\",\n" +
                       " \"sha256\": \"" + Sha256::hex_of(machine_code) + "\",\n \"compiler\": \"" + compiler +
                       "\",\n \"flags\": [";
    for (const std::string& flag : flags) meta += (meta.back() == '[' ? "\n  \"" : ",\n  \"") + flag + '"';
    write(partial.path / "kernel.cubin", machine_code);
    write(partial.path / "source.cu", source.text);
    write(partial.path / "log.txt", log);
    write(partial.path / "spec.json", meta + "\n ]\n}");
    std::filesystem::permissions(partial.path, std::filesystem::perms(0755));
    std::error_code error;
    std::filesystem::rename(partial.path, folder, error);
    if (error && !read(folder, source)) {  // damaged: take its place; otherwise another process was faster
      std::string doomed = (root_ / ".partial-XXXXXX").string();
      require(mkdtemp(doomed.data()) != nullptr, root_.string(), " cannot be written");
      const Removed old{doomed};
      std::filesystem::rename(folder, old.path, error);
      std::filesystem::rename(partial.path, folder);
    }
    return (folder / "kernel.cubin").string();
  }

  // Keeps other processes, Python's too, from compiling the same meanwhile. Saves work alone: without it all goes well.
  class Lock {
   public:
    Lock(const JitCache& cache, const Source& source) {
      if (cache.root_.empty()) return;
      std::error_code error;
      std::filesystem::create_directories(cache.root_, error);
      const Path path = cache.root_ / ("." + source.digest.substr(0, 32) + ".lock");
      file_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
      // On a file system without locks there is nothing to wait for.
      const auto is_held = [this] {
        return flock(file_, LOCK_EX | LOCK_NB) != 0 && (errno == EWOULDBLOCK || errno == EINTR);
      };
      for (int i = 0; file_ >= 0 && i < kMostTries && is_held(); ++i)
        std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    ~Lock() {
      if (file_ >= 0) close(file_);
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    static constexpr int kMostTries = 1200;  // a minute
    int file_ = -1;
  };

 private:
  using Path = std::filesystem::path;

  struct Removed {  // when it goes out of scope
    explicit Removed(Path of) : path(std::move(of)) {}
    ~Removed() {
      std::error_code error;
      std::filesystem::remove_all(path, error);
    }
    Path path;
  };

  static std::optional<std::pair<std::string, std::string>> read(const Path& folder, const Source& source) {
    try {
      const Json meta = JsonReader::read(content_of((folder / "spec.json").string()));
      const Path file = folder / meta.at("file", Json::Kind::kText).text;
      std::string machine_code = content_of(file.string());
      if (meta.at("digest", Json::Kind::kText).text != source.digest ||
          meta.at("sha256", Json::Kind::kText).text != Sha256::hex_of(machine_code))
        return std::nullopt;
      std::error_code error;
      std::filesystem::last_write_time(folder, std::filesystem::file_time_type::clock::now(), error);
      return std::pair(std::move(machine_code), file.string());
    } catch (const std::exception&) {  // damaged, or gone meanwhile
      return std::nullopt;
    }
  }

  static void write(const Path& path, const std::string& content) {
    const int file = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
    size_t done = 0;
    while (file >= 0 && done < content.size()) {
      const ssize_t count = ::write(file, content.data() + done, content.size() - done);
      if (count <= 0) break;
      done += size_t(count);
    }
    const bool is_whole = file >= 0 && done == content.size() && fsync(file) == 0;
    if (file >= 0) close(file);
    require(is_whole, path.string(), " cannot be written");
  }

  Path root_;  // "": nothing is kept
};

}  // namespace flashinfer::host
