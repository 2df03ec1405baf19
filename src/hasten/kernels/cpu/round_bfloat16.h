#pragma once

#include <cstdint>

#include "isa.h"

// y[i] = x[i] rounded stochastically to bfloat16 with the 16 random bits of element i under `key`.
HASTEN_EACH_ISA(void round_bfloat16(const float *x, std::uint16_t *y, std::int64_t n, std::uint64_t key, int threads))
