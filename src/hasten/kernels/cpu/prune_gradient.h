#pragma once

#include <cstdint>

#include "isa.h"

// y[i] = g[i] where |g[i]| >= tau or g[i] is not a number, else +-tau with probability |g[i]| / tau and the sign of g[i], else 0;
// the 16 random bits of element i under `key` decide. totals: sum of |g|, zeros in g, others set to 0, others set to
// +-tau. With `half` g and y are bfloat16, else float32.
HASTEN_EACH_ISA(void prune_gradient(const void *g, void *y, double *totals, std::int64_t n, float tau, std::uint64_t key, bool half, int threads))
