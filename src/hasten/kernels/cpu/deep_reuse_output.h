// The output of deep reuse: products of a tile of outputs with all clusters, gathered at each position.
#pragma once

#include "deep_reuse_vectors.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace hasten {
namespace HASTEN_ISA {
namespace {

// The products of all rows of a block with the outputs of a tile: z (rows, taps, WIDE).
void products(const float *means, int64_t rows, const float *packed, const DeepReuse &of, float *z) {
    const int64_t taps = of.taps(), length = of.length, line = taps * WIDE;
    int64_t row = 0;
    for (; row + 12 <= rows; row += 12)
        for (int64_t t = 0; t < taps; ++t)
            rows_times<12>(means + row * length, length, packed + t * WIDE, line, length, z + row * line + t * WIDE, line);
    for (; row + 4 <= rows; row += 4)
        for (int64_t t = 0; t < taps; ++t)
            rows_times<4>(means + row * length, length, packed + t * WIDE, line, length, z + row * line + t * WIDE, line);
    for (; row < rows; ++row)
        for (int64_t t = 0; t < taps; ++t)
            rows_times<1>(means + row * length, length, packed + t * WIDE, line, length, z + row * line + t * WIDE, line);
}

// y = start + the products that the patches of N neighbouring outputs meet in `held` blocks.
template <int N, bool SCALED>
inline void gather(const float *z, const int32_t *offset, const float *scale, int64_t held, const DeepReuse &of,
                   int64_t plane, int64_t wide, const float *start, int64_t step, float *y) {
    V sum[N][2];
    for (int i = 0; i < N; ++i) {
        sum[i][0] = load(start + i * step);
        sum[i][1] = load(start + i * step + 16);
    }
    for (int64_t b = 0; b < held; ++b) {
        const float *tap = z;
        for (int64_t row = 0; row < of.kernel_h; ++row) {
            const int32_t *at = offset + b * plane + row * wide;
            const float *by = SCALED ? scale + b * plane + row * wide : nullptr;
            for (int64_t column = 0; column < of.kernel_w; ++column, tap += WIDE) {
                for (int i = 0; i < N; ++i) {
                    const float *from = tap + at[i * of.stride_w + column];
                    if (SCALED) {
                        const V factor = all(by[i * of.stride_w + column]);
                        sum[i][0] += factor * load(from);
                        sum[i][1] += factor * load(from + 16);
                    } else {
                        sum[i][0] += load(from);
                        sum[i][1] += load(from + 16);
                    }
                }
            }
        }
    }
    for (int i = 0; i < N; ++i) {
        save(y + i * WIDE, sum[i][0]);
        save(y + i * WIDE + 16, sum[i][1]);
    }
}

template <class Y, bool SCALED>
void output_tile(const ReuseClusters &from, const float *w, const float *bias, const float *z, const int64_t *first,
                 const DeepReuse &of, Y *y, int64_t tile) {
    const int64_t taps = of.taps(), line = taps * WIDE, pixels = of.pixels(), capacity = of.capacity();
    const int64_t high = of.height + 2 * of.pad_h, wide = of.width + 2 * of.pad_w, plane = high * wide;
    const int64_t outs = of.out_height * of.out_width, image = of.height * of.width, blocks = of.blocks();
    int64_t most = 0, all_rows = 0;
    for (int64_t b = 0; b < blocks; ++b) {
        const int64_t rows = from.starts[b * (of.groups + 1) + of.groups];
        most = rows > most ? rows : most;
        all_rows += rows;
    }
    int64_t space = most * line > HELD ? most * line : HELD;
    if (all_rows * line < space) space = all_rows * line;
    float *held_z = room<float>(space);
    float *packed = room<float>(of.length * line);
    float *sums = room<float>(of.images * outs * WIDE);
    int32_t *offset = room<int32_t>(blocks * plane);
    float *scale = SCALED ? room<float>(blocks * plane) : nullptr;
    float start[WIDE];
    for (int64_t j = 0; j < WIDE; ++j) start[j] = bias != nullptr && tile * WIDE + j < of.outputs ? bias[tile * WIDE + j] : 0.0F;
    for (int64_t begin = 0; begin < blocks;) {
        int64_t end = begin, used = 0;
        int64_t *bases = room<int64_t>(blocks);
        for (; end < blocks; ++end) {
            const int64_t rows = from.starts[end * (of.groups + 1) + of.groups];
            if (used + rows * line > space) break;
            float *to = held_z + used;
            if (z == nullptr) {
                pack(w, of, tile, end, packed);
                products(from.means + end * capacity * of.length, rows, packed, of, to);
            } else {
                const int64_t width = of.outputs - tile * WIDE < WIDE ? of.outputs - tile * WIDE : WIDE;
                std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(rows * line));
                for (int64_t r = 0; r < rows * taps; ++r)
                    std::memcpy(to + r * WIDE, z + (first[end] * taps + r) * of.outputs + tile * WIDE,
                                sizeof(float) * static_cast<std::size_t>(width));
            }
            bases[end] = used;
            used += rows * line;
        }
        for (int64_t n = 0; n < of.images; ++n) {
            for (int64_t b = begin; b < end; ++b) {  // offsets of the padded image; padding is the zero cluster
                const int32_t base = static_cast<int32_t>(bases[b]), step = static_cast<int32_t>(line);
                int32_t *to = offset + (b - begin) * plane;
                float *factor = SCALED ? scale + (b - begin) * plane : nullptr;
                const int32_t *ids = from.ids + b * pixels + n * image;
                if (of.pad_h + of.pad_w > 0)
                    for (int64_t i = 0; i < plane; ++i) {
                        to[i] = base;
                        if (SCALED) factor[i] = 0.0F;
                    }
                for (int64_t r = 0; r < of.height; ++r)
                    for (int64_t c = 0; c < of.width; ++c) {
                        const int64_t at = (r + of.pad_h) * wide + of.pad_w + c;
                        to[at] = base + ids[r * of.width + c] * step;
                        if (SCALED) factor[at] = from.scale[b * pixels + n * image + r * of.width + c];
                    }
            }
            for (int64_t r = 0; r < of.out_height; ++r) {
                const int64_t corner = r * of.stride_h * wide;
                float *to = sums + (n * outs + r * of.out_width) * WIDE;
                int64_t c = 0;
                for (; c + 4 <= of.out_width; c += 4) {
                    const int64_t at = corner + c * of.stride_w;
                    gather<4, SCALED>(held_z, offset + at, SCALED ? scale + at : nullptr, end - begin, of, plane, wide,
                                      begin == 0 ? start : to + c * WIDE, begin == 0 ? 0 : WIDE, to + c * WIDE);
                }
                for (; c < of.out_width; ++c) {
                    const int64_t at = corner + c * of.stride_w;
                    gather<1, SCALED>(held_z, offset + at, SCALED ? scale + at : nullptr, end - begin, of, plane, wide,
                                      begin == 0 ? start : to + c * WIDE, begin == 0 ? 0 : WIDE, to + c * WIDE);
                }
            }
        }
        std::free(bases);
        begin = end;
    }
    const int64_t width = of.outputs - tile * WIDE < WIDE ? of.outputs - tile * WIDE : WIDE;
    for (int64_t i = 0; i < of.images * outs; ++i)
        for (int64_t j = 0; j < width; ++j) put(y + i * of.outputs + tile * WIDE + j, sums[i * WIDE + j]);
    std::free(scale);
    std::free(offset);
    std::free(sums);
    std::free(packed);
    std::free(held_z);
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
