// SPDX-License-Identifier: Apache-2.0
// Two ordered lists as one, so that items of either are spread evenly among those of the other. Shared by the planner
// and a test on the host.
#pragma once

#include "attention/params.h"

namespace flashinfer {

// Of n items of one list and m of another: the place of each in the list of n + m. The fewer come first and at equal
// distances.
struct Mix {
  int32_t n, m;

  FLASHINFER_FN int32_t place_of_first(int32_t i) const {
    if (m == 0) return i;
    return n <= m ? spaced(i, n, m) : filling(i, m, n);
  }
  FLASHINFER_FN int32_t place_of_second(int32_t i) const {
    if (n == 0) return i;
    return n <= m ? filling(i, n, m) : spaced(i, m, n);
  }

 private:
  FLASHINFER_FN static int32_t spaced(int32_t i, int32_t few, int32_t many) { return i + scaled(i, many, few); }
  // Behind those of the few whose place is no later: the u-th has floor(u * many / few) of the many before it.
  FLASHINFER_FN static int32_t filling(int32_t i, int32_t few, int32_t many) {
    if (few == 0) return i;
    const int32_t num_before = 1 + scaled(i + 1, few, many, 1);
    return i + (num_before < few ? num_before : few);
  }
  // floor((i * factor - less) / divisor). Of counts below 2^21 double precision keeps all there is.
  FLASHINFER_FN static int32_t scaled(int32_t i, int32_t factor, int32_t divisor, int32_t less = 0) {
    return int32_t((double(i) * factor - less) / divisor);
  }
};

}  // namespace flashinfer
