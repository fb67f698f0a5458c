// SPDX-License-Identifier: Apache-2.0
// JSON as registries are written in: a strict reader of RFC 8259, without surrogates beyond what names need.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "flashinfer/tensor.hpp"

namespace flashinfer::host {

struct Json {
  enum class Kind { kNull, kBool, kInteger, kReal, kText, kList, kTable };

  Kind kind = Kind::kNull;
  bool truth = false;
  int64_t integer = 0;
  double real = 0.0;
  std::string text;
  std::vector<Json> items;                            // of a list
  std::vector<std::pair<std::string, Json>> members;  // of a table, in its order

  const Json* find(const std::string& name) const {
    for (const auto& member : members)
      if (member.first == name) return &member.second;
    return nullptr;
  }
  // Raises unless it is there and of that kind.
  const Json& at(const std::string& name, Kind expected) const {
    const Json* found = find(name);
    require(found != nullptr && found->kind == expected, name, " is missing or of another type");
    return *found;
  }
};

class JsonReader {
 public:
  static Json read(const std::string& text) {
    JsonReader reader(text);
    Json value = reader.value(0);
    reader.skip_space();
    if (reader.at_ != text.size()) reader.fail_here("the end");
    return value;
  }

 private:
  static constexpr int kMaxDepth = 64;

  explicit JsonReader(const std::string& text) : text_(text) {}

  [[noreturn]] void fail_here(const char* expected) const { fail("no JSON: expected ", expected, " at byte ", at_); }
  void skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r'))
      ++at_;
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool takes(char c) {
    skip_space();
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  bool takes_word(const char* word) {
    const size_t length = std::string(word).size();
    if (text_.compare(at_, length, word) != 0) return false;
    at_ += length;
    return true;
  }

  Json value(int depth) {
    if (depth > kMaxDepth) fail_here("fewer levels");
    skip_space();
    Json result;
    const char c = peek();
    if (c == '{') {
      ++at_;
      result.kind = Json::Kind::kTable;
      if (takes('}')) return result;
      do {
        skip_space();
        std::string name = string();
        if (!takes(':')) fail_here("':'");
        result.members.emplace_back(std::move(name), value(depth + 1));
      } while (takes(','));
      if (!takes('}')) fail_here("'}'");
    } else if (c == '[') {
      ++at_;
      result.kind = Json::Kind::kList;
      if (takes(']')) return result;
      do result.items.push_back(value(depth + 1));
      while (takes(','));
      if (!takes(']')) fail_here("']'");
    } else if (c == '"') {
      result.kind = Json::Kind::kText;
      result.text = string();
    } else if (takes_word("true")) {
      result.kind = Json::Kind::kBool;
      result.truth = true;
    } else if (takes_word("false")) {
      result.kind = Json::Kind::kBool;
    } else if (!takes_word("null")) {
      number(result);
    }
    return result;
  }

  void number(Json& result) {
    const size_t begin = at_;
    while (at_ < text_.size() && std::string("+-0123456789.eE").find(text_[at_]) != std::string::npos) ++at_;
    const std::string digits = text_.substr(begin, at_ - begin);
    if (digits.empty()) fail_here("a value");
    char* end = nullptr;
    if (digits.find_first_of(".eE") == std::string::npos) {
      result.kind = Json::Kind::kInteger;
      result.integer = std::strtoll(digits.c_str(), &end, 10);
    } else {
      result.kind = Json::Kind::kReal;
      result.real = std::strtod(digits.c_str(), &end);
    }
    if (*end != '\0') fail_here("a number");
  }

  std::string string() {
    if (peek() != '"') fail_here("a string");
    ++at_;
    std::string result;
    while (true) {
      if (at_ >= text_.size()) fail_here("'\"'");
      const char c = text_[at_++];
      if (c == '"') return result;
      if (c != '\\') {
        result += c;
        continue;
      }
      const char escaped = at_ < text_.size() ? text_[at_++] : '\0';
      static const std::string kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
      const size_t which = kFrom.find(escaped);
      if (which != std::string::npos && escaped != '\0') {
        result += kTo[which];
      } else if (escaped == 'u') {
        append_utf8(result, unit());
      } else {
        fail_here("an escape");
      }
    }
  }

  uint32_t unit() {
    if (at_ + 4 > text_.size()) fail_here("four hexadecimal digits");
    const std::string digits = text_.substr(at_, 4);
    if (digits.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos) fail_here("four hexadecimal digits");
    at_ += 4;
    return uint32_t(std::strtoul(digits.c_str(), nullptr, 16));
  }

  static void append_utf8(std::string& text, uint32_t code) {
    if (code < 0x80) {
      text += char(code);
    } else if (code < 0x800) {
      text += char(0xC0 | code >> 6);
      text += char(0x80 | (code & 0x3F));
    } else {
      text += char(0xE0 | code >> 12);
      text += char(0x80 | (code >> 6 & 0x3F));
      text += char(0x80 | (code & 0x3F));
    }
  }

  const std::string& text_;
  size_t at_ = 0;
};

}  // namespace flashinfer::host
