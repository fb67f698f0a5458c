// SPDX-License-Identifier: Apache-2.0
// Registries of precompiled kernels (docs/registry.md): opened, and asked for what they hold.
#pragma once

#include <algorithm>
#include <fstream>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "flashinfer/contract.hpp"
#include "flashinfer/json.hpp"
#include "flashinfer/sha256.hpp"

namespace flashinfer {

// A kernel that is asked for: a family, and a value for each of its axes.
class Request {
 public:
  explicit Request(std::string family) : family_(std::move(family)) {}

  Request with(const std::string& axis, const std::string& value) const {
    return and_also(axis, value, '"' + value + '"');
  }
  Request with(const std::string& axis, const char* value) const { return with(axis, std::string(value)); }
  Request with(const std::string& axis, Dtype value) const { return with(axis, name_of(value)); }
  Request with(const std::string& axis, int64_t value) const {
    return and_also(axis, std::to_string(value), std::to_string(value));
  }
  Request with(const std::string& axis, int value) const { return with(axis, int64_t(value)); }
  Request with(const std::string& axis, bool value) const {
    return and_also(axis, value ? "true" : "false", value ? "true" : "false");
  }

  const std::string& family() const { return family_; }

  // Of each axis its value, as it is and in TOML.
  const std::map<std::string, std::pair<std::string, std::string>>& axes() const { return axes_; }
  const std::string* value_of(const std::string& axis) const {
    const auto found = axes_.find(axis);
    return found == axes_.end() ? nullptr : &found->second.first;
  }

  // The same of requests that ask for the same.
  std::string key() const {
    std::string text = family_;
    for (const auto& axis : axes_) text += '\n' + axis.first + '=' + axis.second.first;
    return text;
  }

  // A row for a config of `flashinfer aot build`.
  std::string row() const {
    std::string text = "[[kernel]]\nfamily = \"" + family_ + "\"\n";
    for (const auto& axis : axes_) text += axis.first + " = " + axis.second.second + "\n";
    return text;
  }

 private:
  Request and_also(const std::string& axis, const std::string& value, const std::string& toml) const {
    Request more = *this;
    more.axes_[axis] = {value, toml};
    return more;
  }

  std::string family_;
  std::map<std::string, std::pair<std::string, std::string>> axes_;
};

// A kernel of a registry.
struct Entry {
  std::string name, family, target, file, sha256, compiler;
  std::string key;     // of the Request that it answers
  int cuda_major = 0;  // that the driver must have; 0: none
  // How it is launched. Only where is_described: registries of early builds did not say.
  bool is_described = false;
  int num_threads = 0, smem_bytes = 0, cluster_size = 1, units_per_block = 1;
  std::string params;
  uint64_t abi = 0;                          // of the struct's layout
  std::map<std::string, int64_t> numbers;    // constants the kernel was compiled with
  std::map<std::string, std::string> types;  // and its types
};

namespace host {

inline std::string content_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  require(bool(file), path, " cannot be read");
  try {
    return std::string(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  } catch (const std::ios_base::failure&) {  // of a folder, or of the device
    fail(path, " cannot be read");
  }
}

inline std::string key_of(const std::string& family, const Json& args) {
  Request request(family);
  for (const auto& [axis, value] : args.members) {
    if (value.kind == Json::Kind::kText) request = request.with(axis, value.text);
    if (value.kind == Json::Kind::kInteger) request = request.with(axis, value.integer);
    if (value.kind == Json::Kind::kBool) request = request.with(axis, value.truth);
  }
  return request.key();
}

inline void describe(Entry& entry, const Json& launch) {
  using Kind = Json::Kind;
  entry.is_described = true;
  entry.num_threads = int(launch.at("num_threads", Kind::kInteger).integer);
  entry.smem_bytes = int(launch.at("smem_bytes", Kind::kInteger).integer);
  entry.cluster_size = int(launch.at("cluster_size", Kind::kInteger).integer);
  entry.units_per_block = int(launch.at("units_per_block", Kind::kInteger).integer);
  require(entry.num_threads > 0 && entry.smem_bytes >= 0 && entry.cluster_size > 0 && entry.units_per_block > 0,
          entry.name, ": launch holds numbers that mean nothing");
  entry.params = launch.at("params", Kind::kText).text;
  entry.abi = std::strtoull(launch.at("abi", Kind::kText).text.c_str(), nullptr, 16);
  for (const auto& [name, value] : launch.at("constants", Kind::kTable).members) {
    if (value.kind == Kind::kInteger) entry.numbers[name] = value.integer;
    if (value.kind == Kind::kBool) entry.numbers[name] = value.truth;
    if (value.kind == Kind::kText) entry.types[name] = value.text;
  }
}

}  // namespace host

class Registry {
 public:
  // Raises Error where there is none that this header can read, or one of another version.
  explicit Registry(const std::string& root) : root_(root) {
    using host::Json;
    const std::string path = root + "/registry.json";
    try {
      const Json data = host::JsonReader::read(host::content_of(path));
      const Json* format = data.find("format");
      host::require(format != nullptr && format->integer == kRegistryFormat, "format ",
                    format == nullptr ? 0 : format->integer, "; expected ", kRegistryFormat);
      version_ = data.at("version", Json::Kind::kText).text;
      for (const Json& raw : data.at("kernels", Json::Kind::kList).items) add(raw);
    } catch (const Error& error) {
      host::fail(path, " is not usable: ", error.what(),
                 ". Next step: name the folder of a set, or build one there by flashinfer aot build --out ", root);
    }
    // Python compares digests of sources, which are not at hand here: the version stands for them.
    host::require(version_ == kVersion, path, " is of version ", version_, ", this program was compiled for ", kVersion,
                  ". Next step: pip install 'flashinfer-aot==", kVersion,
                  "', or for a set of your own flashinfer aot build --refresh --out ", root);
  }

  const std::string& root() const { return root_; }
  const std::string& version() const { return version_; }
  const std::vector<Entry>& entries() const { return entries_; }

  // Positions in entries() of the kernels that answer a request, whatever their targets.
  const std::vector<size_t>* find(const std::string& key) const {
    const auto found = index_.find(key);
    return found == index_.end() ? nullptr : &found->second;
  }

 private:
  void add(const host::Json& raw) {
    using Kind = host::Json::Kind;
    Entry entry;
    entry.name = raw.at("name", Kind::kText).text;
    entry.family = raw.at("family", Kind::kText).text;
    entry.target = raw.at("target", Kind::kText).text;
    entry.file = raw.at("file", Kind::kText).text;
    entry.sha256 = raw.at("sha256", Kind::kText).text;
    entry.compiler = raw.at("compiler", Kind::kText).text;
    entry.key = host::key_of(entry.family, raw.at("args", Kind::kTable));
    if (const host::Json* cuda = raw.find("cuda"); cuda != nullptr && cuda->kind == Kind::kText)
      entry.cuda_major = std::atoi(cuda->text.c_str());
    if (const host::Json* launch = raw.find("launch"); launch != nullptr && launch->kind == Kind::kTable)
      host::describe(entry, *launch);
    index_[entry.key].push_back(entries_.size());
    entries_.push_back(std::move(entry));
  }

  std::string root_, version_;
  std::vector<Entry> entries_;
  std::map<std::string, std::vector<size_t>> index_;
};

// Targets whose machine code runs on one, best first: flashinfer/target.py says why.
inline std::vector<std::string> candidates(const std::string& target) {
  std::vector<std::string> names;
  if (target.compare(0, 3, "sm_") != 0) {
    const auto add_levels = [&](const auto& levels) {
      for (const contract::CpuLevel& level : levels) {
        names.insert(names.begin(), level.name);
        if (target == level.name) return true;
      }
      names.clear();
      return false;
    };
    if (add_levels(contract::kX86Levels) || add_levels(contract::kArmLevels)) return names;
    host::fail("target ", target, " is unknown; expected sm_80, sm_90a, x86-64-v3 or the like");
  }
  size_t end = target.size();
  while (end > 3 && (target[end - 1] < '0' || target[end - 1] > '9')) --end;
  host::require(end > 4, "target ", target, " is unknown; expected sm_80, sm_90a or the like");
  const std::string major = target.substr(3, end - 4);
  const bool has_suffix = end < target.size();
  if (has_suffix && target.back() == 'a') names.push_back(target);
  for (int minor = target[end - 1] - '0'; minor >= 0; --minor) {
    if (std::atoi(major.c_str()) >= 10 && has_suffix) names.push_back("sm_" + major + std::to_string(minor) + "f");
    names.push_back("sm_" + major + std::to_string(minor));
  }
  return names;
}

}  // namespace flashinfer
