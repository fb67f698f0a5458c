// SPDX-License-Identifier: Apache-2.0
// Of requests on stdin, a line each, the digest and the name that recipes have: sources RECIPES TARGET. A request is
// its family and then axis=value, where true, false and what begins with a digit are no texts.
#include <cstdio>
#include <iostream>

#include "flashinfer/recipes.hpp"

using namespace flashinfer;

int main(int, char** argv) {
  const host::Recipes recipes(argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string word;
    words >> word;
    Request request(word);
    while (words >> word) {
      const size_t at = word.find('=');
      const std::string axis = word.substr(0, at), value = word.substr(at + 1);
      const bool is_number = value[0] >= '0' && value[0] <= '9';
      request = value == "true" || value == "false" ? request.with(axis, value == "true")
                : is_number                         ? request.with(axis, int64_t(std::atoll(value.c_str())))
                                                    : request.with(axis, value);
    }
    const auto source = recipes.source_of(request, argv[2]);
    if (!source) {
      std::puts("none");
      continue;
    }
    const Entry& entry = source->entry;
    std::printf("%s %s %d %d %d %d %s %llx\n", source->digest.c_str(), entry.name.c_str(), entry.num_threads,
                entry.smem_bytes, entry.cluster_size, entry.units_per_block, entry.params.c_str(),
                static_cast<unsigned long long>(entry.abi));
  }
}
