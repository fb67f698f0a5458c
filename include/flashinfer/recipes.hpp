// SPDX-License-Identifier: Apache-2.0
// Recipes (docs/registry.md): the source text of a kernel, from what is asked for. flashinfer/aot/recipes.py writes
// them.
#pragma once

#include <optional>

#include "flashinfer/registry.hpp"

namespace flashinfer::host {

// A kernel that is not compiled yet.
struct Source {
  Entry entry;  // what a registry would tell of it; without machine code
  std::string text, digest, spec;
  std::vector<std::string> headers;
};

class Recipes {
 public:
  // Raises Error where there is no file that this header can read, or one of another version.
  explicit Recipes(const std::string& path) : path_(path) {
    try {
      data_ = JsonReader::read(content_of(path));
      const Json* format = data_.find("format");
      require(format != nullptr && format->integer == kFormat, "format ", format == nullptr ? 0 : format->integer,
              "; expected ", kFormat);
      const std::string& version = data_.at("version", Json::Kind::kText).text;
      require(version == kVersion, "of version ", version, "; this program was compiled for ", kVersion);
      targets_ = &data_.at("targets", Json::Kind::kTable);
      for (const Json& flag : data_.at("flags", Json::Kind::kList).items) flags_.push_back(flag.text);
      for (const Json& option : data_.at("options", Json::Kind::kList).items) options_.push_back(option.text);
    } catch (const Error& error) {
      fail(path, " is not usable: ", error.what(), ". Next step: write it anew, by flashinfer aot recipes --target ",
           "sm_90a --out ", path);
    }
  }
  Recipes(const Recipes&) = delete;
  Recipes& operator=(const Recipes&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<std::string>& flags() const { return flags_; }      // that are part of a digest
  const std::vector<std::string>& options() const { return options_; }  // of the compiler, besides them
  bool has(const std::string& target) const { return targets_->find(target) != nullptr; }

  // Where the machine that wrote the file has "csrc", "nvrtc" or "cuda_include"; "" where it had none.
  std::string place(const char* name) const {
    const Json* found = data_.at("places", Json::Kind::kTable).find(name);
    return found == nullptr ? "" : found->text;
  }

  // The sha256 that a header of csrc/ had.
  const std::string& sha256_of(const std::string& header) const {
    return data_.at("headers", Json::Kind::kTable).at(header, Json::Kind::kText).text;
  }

  // None where there is no recipe for it.
  std::optional<Source> source_of(const Request& request, const std::string& target) const {
    try {
      return followed(request, target);
    } catch (const std::out_of_range&) {
      fail(path_, " is damaged. Next step: write it anew, by flashinfer aot recipes");
    }
  }

 private:
  static constexpr int kFormat = 1;

  std::optional<Source> followed(const Request& request, const std::string& target) const {
    using Kind = Json::Kind;
    const Json* of_target = targets_->find(target);
    const Json* recipe = of_target == nullptr ? nullptr : of_target->find(request.family());
    if (recipe == nullptr || !is_asked_well(request, recipe->at("axes", Kind::kList))) return std::nullopt;
    const Json* tree = recipe->find("which");
    const std::string* which = tree == nullptr ? nullptr : follow(*tree, request);
    if (which == nullptr) return std::nullopt;
    const Json& how = recipe->at("by", Kind::kList).items.at(size_t(std::atoi(which->c_str())));

    Source source;
    source.entry.family = request.family();
    source.entry.target = target;
    source.entry.key = request.key();
    name(source, request, recipe->at("axes", Kind::kList));
    const Json& text = how.at("text", Kind::kList);
    source.text = "// " + source.entry.name + "\n" + text.items.at(0).text;
    const char* between = "";
    for (const Json& constant : how.at("constants", Kind::kList).items) {
      const std::string& line = constant.items.at(1).text;
      const std::string* value = follow(constant.items.at(2), request);
      if (value == nullptr) return std::nullopt;
      const size_t at = line.find("{}");
      require(at != std::string::npos, path_, " is damaged: a constant has no place");
      source.text += between + line.substr(0, at) + *value + line.substr(at + 2);
      take_note(source.entry, constant.items.at(0).text, *value);
      between = "\n";
    }
    source.text += text.items.at(1).text;
    describe(source.entry, how, request);
    for (const Json& header : how.at("headers", Kind::kList).items) source.headers.push_back(header.text);
    source.digest = digest_of(source);
    return source;
  }

  // Whether each axis has a value that the recipe was made for.
  static bool is_asked_well(const Request& request, const Json& axes) {
    if (axes.items.size() != request.axes().size()) return false;
    for (const Json& axis : axes.items) {
      const std::string* value = request.value_of(axis.items.at(0).text);
      const auto is_it = [&](const Json& known) { return value != nullptr && known.text == *value; };
      if (std::none_of(axis.items.begin() + 1, axis.items.end(), is_it)) return false;
    }
    return true;
  }

  // A text; [axis], the value of an axis; or [axis, [values, tree], …], what follows from it.
  static const std::string* follow(const Json& tree, const Request& request) {
    if (tree.kind == Json::Kind::kText) return &tree.text;
    const std::string* value = request.value_of(tree.items.at(0).text);
    if (value == nullptr || tree.items.size() == 1) return value;
    for (size_t i = 1; i < tree.items.size(); ++i)
      for (const Json& known : tree.items[i].items.at(0).items)
        if (known.text == *value) return follow(tree.items[i].items.at(1), request);
    return nullptr;
  }

  // As KernelSpec.name and to_dict() of flashinfer/jit/spec.py.
  static void name(Source& source, const Request& request, const Json& axes) {
    source.entry.name = request.family();
    source.spec = "\"family\": \"" + request.family() + "\",\n \"args\": {";
    const char* between = "";
    for (const Json& axis : axes.items) {
      const auto& [value, literal] = request.axes().at(axis.items.at(0).text);
      const bool is_bool = literal == "true" || literal == "false";
      source.entry.name += "-" + axis.items[0].text + "=" + (is_bool ? (value == "true" ? "1" : "0") : value);
      source.spec += between + ("\n  \"" + axis.items[0].text + "\": " + literal);
      between = ",";
    }
    source.spec += "\n },\n \"target\": \"" + source.entry.target + "\",\n ";
  }

  static void take_note(Entry& entry, const std::string& constant, const std::string& value) {
    char* end = nullptr;
    const int64_t number = std::strtoll(value.c_str(), &end, 10);
    if (value == "true" || value == "false") {
      entry.numbers[constant] = value == "true";
    } else if (!value.empty() && *end == '\0') {
      entry.numbers[constant] = number;
    } else {
      entry.types[constant] = value;
    }
  }

  static void describe(Entry& entry, const Json& how, const Request& request) {
    entry.is_described = true;
    entry.num_threads = int(entry.numbers.at("kNumThreads"));
    entry.smem_bytes = int(entry.numbers.at("kSmemBytes"));
    entry.cluster_size = int(entry.numbers.at("kClusterSize"));
    const Json* units = how.find("units_per_block");
    const std::string* found = units == nullptr ? nullptr : follow(*units, request);
    require(found != nullptr, entry.name, ": its recipe lacks units_per_block");
    entry.units_per_block = std::atoi(found->c_str());
    entry.params = how.at("params", Json::Kind::kText).text;
    entry.abi = std::strtoull(how.at("abi", Json::Kind::kText).text.c_str(), nullptr, 16);
  }

  // As _digest() of flashinfer/jit/source.py.
  std::string digest_of(const Source& source) const {
    std::string parts = source.text + '\0';
    for (const std::string& flag : flags_) parts += flag + '\0';
    parts += source.entry.target + '\0';
    for (const std::string& header : source.headers) parts += header + ":" + sha256_of(header) + '\0';
    return Sha256::hex_of(parts);
  }

  std::string path_;
  Json data_;
  const Json* targets_ = nullptr;
  std::vector<std::string> flags_, options_;
};

}  // namespace flashinfer::host
