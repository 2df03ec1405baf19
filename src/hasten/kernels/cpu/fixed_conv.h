#pragma once

#include <cstdint>

#include "isa.h"

namespace hasten {

// Where the element (a, b, i, j) of a float32 tensor lies: start + a*sa + b*sb + i*si + j*sj.
struct Source {
    const float *start;
    std::int64_t sa, sb, si, sj;
};

// A convolution in 16-bit fixed point on packed operands, all sizes in elements.
// x: [images][height][width][channels], zero where padded, channels even. w: [ceil(outputs/32)][taps][channels/2][32][2].
struct FixedConv {
    std::int64_t images, height, width, channels, outputs, tap_rows, tap_columns, out_height, out_width;
    std::int64_t stride_rows, stride_columns, dilation_rows, dilation_columns;
};

constexpr std::int64_t FIXED_LANES = 32;  // output channels in one block

}  // namespace hasten

// dst[a][i*spread + top][j*spread + left][b] = round(src(a, b, i, j) * scale), zero elsewhere; returns the largest |value|.
HASTEN_EACH_ISA(std::int32_t fixed_pack_x(const Source &src, std::int64_t images, std::int64_t channels, std::int64_t rows,
                                          std::int64_t columns, std::int16_t *dst, std::int64_t height, std::int64_t width,
                                          std::int64_t padded, std::int64_t top, std::int64_t left, std::int64_t spread_rows,
                                          std::int64_t spread_columns, float scale, int threads))

// Packs w, src(o, c, i, j), as above; channels is the padded number, `real` the one in src.
HASTEN_EACH_ISA(void fixed_pack_w(const Source &src, const FixedConv &shape, std::int64_t real, std::int16_t *dst, float scale,
                                  int threads))

// y[image][row][column][output] = sum of products * scale, exact but for the last rounding to float32.
// largest: of |x|, by which and by w it is proved when 32-bit sums must be widened. False if no proof is possible.
HASTEN_EACH_ISA(bool fixed_conv(const FixedConv &shape, const std::int16_t *x, const std::int16_t *w, std::int32_t largest,
                                float *y, float scale, int threads))
