# SPDX-License-Identifier: Apache-2.0
"""csrc/attention/mla/partial_unit.h: rows of partial results fit into 16 bits, whatever they are multiplied with."""

from __future__ import annotations

import subprocess
from pathlib import Path

from flashinfer import env
from flashinfer.jit.source import include_root

# As the kernels multiply: with the factor of the row and then the inverse of its unit, or, on Hopper, with the product
# of the two. `largest` is that of the row before its factor.
PROGRAM = r"""
#include "attention/mla/partial_unit.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <initializer_list>

using namespace flashinfer;

static bool keeps(float x, float factor, float in_units, PartialUnit unit) {
  const double exact = double(x) * factor, most_lost = std::fabs(exact) * 0x1p-20 + unit.value() * 0x1p-20;
  return std::fabs(in_units) < 0x1p15f && std::fabs(double(in_units) * unit.value() - exact) <= most_lost;
}

static bool fits(float largest, float factor) {
  const PartialUnit unit = PartialUnit::of(largest * factor), unit_at_once = PartialUnit::of(largest * factor, factor);
  const float at_once = factor * unit_at_once.inverse();
  if (!std::isfinite(at_once)) return false;
  for (float x : {0.f, largest, -largest, largest / 3, largest / 1000}) {
    if (!keeps(x, factor, x * factor * unit.inverse(), unit)) return false;
    if (!keeps(x, factor, x * at_once, unit_at_once)) return false;
  }
  // Of a row of normal numbers 16 bits hold all that they can, unless it comes to less than 2^-80.
  if (std::fabs(largest * factor) >= 0x1p-80f && std::fabs(largest) >= FLT_MIN) {
    if (std::fabs(largest * at_once) < 1.f) return false;
  }
  return true;
}

int main() {
  for (int of_factor = -100; of_factor <= 127; ++of_factor) {
    for (float mantissa : {1.f, 1.25f, 1.9999999f, -1.5f}) {
      const float factor = std::ldexp(mantissa, of_factor);
      if (!fits(0.f, factor)) return std::printf("a row of zeros times %g\n", factor), 1;
      for (int of_row = -149; of_row <= 127; ++of_row) {
        const float largest = std::ldexp(1.75f, of_row);
        if (std::isinf(largest * factor)) continue;
        if (!fits(largest, factor)) return std::printf("a row up to %g times %g\n", largest, factor), 1;
      }
    }
  }
}
"""


def test_rows_fit_into_16_bits(tmp_path: Path) -> None:
    source, program = tmp_path / "unit.cpp", tmp_path / "unit"
    source.write_text(PROGRAM)
    compiler = env.CXX.get() or "c++"
    subprocess.run([compiler, "-std=c++17", "-O1", f"-I{include_root()}", source, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
