#pragma once

#include <cstdint>

#include "isa.h"

// y[i] = x[i] on the grid of `fraction` bits behind the point, within a word of `word` bits; see reference/fixed_point.py.
// Each task takes `chunk` elements and fills counts[task] (elements outside the range) and sizes[task] (largest |x|).
HASTEN_EACH_ISA(void fixed_point(const float *x, float *y, std::int64_t n, std::int64_t *counts, float *sizes,
                                 std::int64_t chunk, int word, int fraction, std::uint64_t key, bool stochastic,
                                 int threads))
