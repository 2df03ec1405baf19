#pragma once

#include <cstdint>

#include "isa.h"

// Bit i of a mask says that x[i] is above 0 (or not a number): bit i % 8 of byte i / 8; the last byte is filled up with 0.
HASTEN_EACH_ISA(
    // y[i] = x[i] where its bit is set, else 0; y may be x. Without y the mask alone is made.
    void relu_mask(const float *x, float *y, std::uint8_t *mask, std::int64_t n, int threads);
    void relu_mask_bfloat16(const std::uint16_t *x, std::uint16_t *y, std::uint8_t *mask, std::int64_t n, int threads);
    // y[i] = scale * g[i] where bit i is set, else 0.
    void masked(const std::uint8_t *mask, const float *g, float *y, std::int64_t n, float scale, int threads);
    void masked_bfloat16(const std::uint8_t *mask, const std::uint16_t *g, std::uint16_t *y, std::int64_t n, float scale,
                int threads))
