// The gradients of deep reuse: sums of grad_output over the clusters, multiplied for grad_w and for grad_x.
#pragma once

#include "deep_reuse_vectors.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace hasten {
namespace HASTEN_ISA {
namespace {

// Where grad_output lies while it is gathered: (tiles, images, high, wide, WIDE), with a border of zeros for stride 1.
struct Field {
    int64_t border_h, border_w, high, wide;
    explicit Field(const DeepReuse &of) {
        const bool plain = of.stride_h == 1 && of.stride_w == 1;
        border_h = plain && of.kernel_h - 1 > of.pad_h ? of.kernel_h - 1 - of.pad_h : 0;
        border_w = plain && of.kernel_w - 1 > of.pad_w ? of.kernel_w - 1 - of.pad_w : 0;
        high = of.out_height + 2 * border_h;
        wide = of.out_width + 2 * border_w;
    }
};

template <class Y>
void lay_out(const Y *grad, const DeepReuse &of, const Field &field, int64_t tile, int64_t n, float *to) {
    const int64_t width = of.outputs - tile * WIDE < WIDE ? of.outputs - tile * WIDE : WIDE;
    if (field.border_h + field.border_w > 0 || width < WIDE)
        std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(field.high * field.wide * WIDE));
    for (int64_t r = 0; r < of.out_height; ++r)
        for (int64_t c = 0; c < of.out_width; ++c) {
            const Y *from = grad + ((n * of.out_height + r) * of.out_width + c) * of.outputs + tile * WIDE;
            float *line = to + ((r + field.border_h) * field.wide + c + field.border_w) * WIDE;
            for (int64_t j = 0; j < width; ++j) line[j] = number(from[j]);
        }
}

// g[tap] of the KW taps in one row of the kernel, for one cluster, at stride 1: `at` is where a member's last tap lies.
template <int KW, bool SCALED>
inline void sum_row(const float *field, const int32_t *at, const float *scale, const int32_t *members, int64_t count,
                    float *g) {
    V sum[KW][2];
    for (int k = 0; k < KW; ++k) sum[k][0] = sum[k][1] = all(0.0F);
    for (int64_t i = 0; i < count; ++i) {
        const int32_t p = members[i];
        const float *from = field + static_cast<int64_t>(at[i]) * WIDE;
        if (SCALED) {
            const V factor = all(scale[p]);
            for (int k = 0; k < KW; ++k) {
                sum[k][0] += factor * load(from + k * WIDE);
                sum[k][1] += factor * load(from + k * WIDE + 16);
            }
        } else {
            for (int k = 0; k < KW; ++k) {
                sum[k][0] += load(from + k * WIDE);
                sum[k][1] += load(from + k * WIDE + 16);
            }
        }
    }
    for (int k = 0; k < KW; ++k) {  // memory runs against the taps
        save(g + (KW - 1 - k) * WIDE, sum[k][0]);
        save(g + (KW - 1 - k) * WIDE + 16, sum[k][1]);
    }
}

template <bool SCALED>
void sum_plain(const float *field, const Field &shape, const DeepReuse &of, const float *scale, const int32_t *members,
               const int32_t *at, int64_t count, float *g) {
    for (int64_t row = 0; row < of.kernel_h; ++row, g += of.kernel_w * WIDE) {
        const float *from = field + (of.kernel_h - 1 - row) * shape.wide * WIDE;
        switch (of.kernel_w) {
            case 1: sum_row<1, SCALED>(from, at, scale, members, count, g); break;
            case 3: sum_row<3, SCALED>(from, at, scale, members, count, g); break;
            case 5: sum_row<5, SCALED>(from, at, scale, members, count, g); break;
            default:
                for (int64_t column = 0; column < of.kernel_w; ++column)
                    sum_row<1, SCALED>(from + (of.kernel_w - 1 - column) * WIDE, at, scale, members, count,
                                       g + column * WIDE);
        }
    }
}

// The same for other strides, where a member meets only some taps.
template <bool SCALED>
void sum_strided(const float *field, const DeepReuse &of, const float *scale, const int32_t *members, int64_t count,
                 float *g) {
    const int64_t image = of.height * of.width;
    std::memset(g, 0, sizeof(float) * static_cast<std::size_t>(of.taps() * WIDE));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t p = members[i], n = p / image, r = p % image / of.width, c = p % of.width;
        const V factor = all(SCALED ? scale[p] : 1.0F);
        for (int64_t row = 0; row < of.kernel_h; ++row) {
            const int64_t above = r + of.pad_h - row, out_r = above / of.stride_h;
            if (above < 0 || above % of.stride_h != 0 || out_r >= of.out_height) continue;
            for (int64_t column = 0; column < of.kernel_w; ++column) {
                const int64_t left = c + of.pad_w - column, out_c = left / of.stride_w;
                if (left < 0 || left % of.stride_w != 0 || out_c >= of.out_width) continue;
                const float *from = field + ((n * of.out_height + out_r) * of.out_width + out_c) * WIDE;
                float *to = g + (row * of.kernel_w + column) * WIDE;
                save(to, load(to) + factor * load(from));
                save(to + 16, load(to + 16) + factor * load(from + 16));
            }
        }
    }
}

struct Part {  // a part of the backward pass: one block, some tiles
    const float *fields;
    const ReuseClusters &from;
    const float *w;
    const DeepReuse &of;
    float *back;  // (rows, padded length): sums for grad_x of this part, or null
    float *grad_w;
    int64_t block, tile_begin, tile_end;
};

template <bool SCALED>
void backward_part(const Part &task) {
    const DeepReuse &of = task.of;
    const Field shape(of);
    const int64_t taps = of.taps(), line = taps * WIDE, length = of.length, lanes = (length + 15) / 16 * 16;
    const int64_t pixels = of.pixels(), capacity = of.capacity(), image = of.height * of.width, block = task.block;
    const bool plain = of.stride_h == 1 && of.stride_w == 1;
    const int64_t rows = task.from.starts[block * (of.groups + 1) + of.groups];
    const int32_t *ids = task.from.ids + block * pixels, *counts = task.from.counts + block * capacity;
    const float *means = task.from.means + block * capacity * length;
    const float *scale = SCALED ? task.from.scale + block * pixels : nullptr;
    int32_t *ends = room<int32_t>(rows + 1), *members = room<int32_t>(pixels), *at = room<int32_t>(pixels);
    float *g = room<float>(ROWS * line), *packed = room<float>(length * line), *turned = room<float>(line * lanes);
    float *sums = room<float>(length * line);

    // members in the order of their clusters
    ends[0] = 0;
    for (int64_t r = 0; r < rows; ++r) ends[r + 1] = ends[r] + counts[r];
    for (int64_t p = 0; p < pixels; ++p) members[ends[ids[p]]++] = static_cast<int32_t>(p);
    for (int64_t i = 0; i < pixels; ++i) {  // the output seen through the kernel's last tap
        const int64_t p = members[i], n = p / image, r = p % image / of.width, c = p % of.width;
        const int64_t up = r + of.pad_h - (of.kernel_h - 1) + shape.border_h;
        const int64_t left = c + of.pad_w - (of.kernel_w - 1) + shape.border_w;
        at[i] = static_cast<int32_t>((n * shape.high + up) * shape.wide + left);
    }
    if (task.back != nullptr) std::memset(task.back, 0, sizeof(float) * static_cast<std::size_t>(rows * lanes));

    for (int64_t tile = task.tile_begin; tile < task.tile_end; ++tile) {
        const float *field = task.fields + tile * of.images * shape.high * shape.wide * WIDE;
        pack(task.w, of, tile, block, packed);
        std::memset(turned, 0, sizeof(float) * static_cast<std::size_t>(line * lanes));
        for (int64_t l = 0; l < length; ++l)
            for (int64_t k = 0; k < line; ++k) turned[k * lanes + l] = packed[l * line + k];
        std::memset(sums, 0, sizeof(float) * static_cast<std::size_t>(length * line));
        for (int64_t begin = 0; begin < rows; begin += ROWS) {
            const int64_t many = rows - begin < ROWS ? rows - begin : ROWS;
            for (int64_t r = 0; r < many; ++r) {
                const int64_t stop = ends[begin + r], count = counts[begin + r], start = stop - count;
                if (plain) {
                    sum_plain<SCALED>(field, shape, of, scale, members + start, at + start, count, g + r * line);
                } else {
                    sum_strided<SCALED>(field, of, scale, members + start, count, g + r * line);
                }
            }
            if (task.grad_w != nullptr) {
                const float *mean = means + begin * length;
                for (int64_t t = 0; t < taps; ++t) {
                    int64_t l = 0;
                    for (; l + 8 <= length; l += 8)
                        columns_times<8>(mean + l, length, g + t * WIDE, line, many, sums + l * line + t * WIDE, line);
                    for (; l < length; ++l)
                        columns_times<1>(mean + l, length, g + t * WIDE, line, many, sums + l * line + t * WIDE, line);
                }
            }
            if (task.back != nullptr) {
                float *back = task.back + begin * lanes;
                int64_t l = 0;
                for (; l + 32 <= lanes; l += 32) {
                    int64_t r = 0;
                    for (; r + 12 <= many; r += 12)
                        rows_into<12, 2>(g + r * line, line, turned + l, lanes, line, back + r * lanes + l, lanes);
                    for (; r < many; ++r)
                        rows_into<1, 2>(g + r * line, line, turned + l, lanes, line, back + r * lanes + l, lanes);
                }
                for (; l < lanes; l += 16) {
                    int64_t r = 0;
                    for (; r + 12 <= many; r += 12)
                        rows_into<12, 1>(g + r * line, line, turned + l, lanes, line, back + r * lanes + l, lanes);
                    for (; r < many; ++r)
                        rows_into<1, 1>(g + r * line, line, turned + l, lanes, line, back + r * lanes + l, lanes);
                }
            }
        }
        if (task.grad_w != nullptr)
            for (int64_t j = 0; j < WIDE && tile * WIDE + j < of.outputs; ++j)
                for (int64_t t = 0; t < taps; ++t) {
                    float *to = task.grad_w + ((tile * WIDE + j) * taps + t) * of.channels + block * length;
                    for (int64_t l = 0; l < length; ++l) to[l] = sums[l * line + t * WIDE + j];
                }
    }
    std::free(sums);
    std::free(turned);
    std::free(packed);
    std::free(g);
    std::free(at);
    std::free(members);
    std::free(ends);
}

// How many parts the tiles are cut into, by the sizes alone, so that results do not depend on the threads.
inline int64_t parts(const DeepReuse &of) {
    const int64_t wanted = (PARTS + of.blocks() - 1) / of.blocks(), most = tiles(of);
    return wanted < most ? wanted : most;
}

// 1 / the sum of the lengths of each row's members, or of ones.
void shares(const ReuseClusters &from, const DeepReuse &of, float *share, int64_t block) {
    const int64_t pixels = of.pixels(), capacity = of.capacity();
    const int64_t rows = from.starts[block * (of.groups + 1) + of.groups];
    const int32_t *ids = from.ids + block * pixels, *counts = from.counts + block * capacity;
    float *to = share + block * capacity;
    if (from.scale == nullptr) {
        for (int64_t r = 0; r < rows; ++r) to[r] = static_cast<float>(counts[r]);
    } else {
        std::memset(to, 0, sizeof(float) * static_cast<std::size_t>(rows));
        for (int64_t p = 0; p < pixels; ++p) to[ids[p]] += from.scale[block * pixels + p];
    }
    for (int64_t r = 0; r < rows; ++r) to[r] = to[r] > 0.0F ? 1.0F / to[r] : 0.0F;
}

// The sums of a block's parts, times the shares, in the place of the first part.
void combine(float *back, const float *share, const ReuseClusters &from, const DeepReuse &of, int64_t block) {
    const int64_t lanes = (of.length + 15) / 16 * 16, capacity = of.capacity(), many = parts(of);
    const int64_t rows = from.starts[block * (of.groups + 1) + of.groups], next = of.blocks() * capacity * lanes;
    for (int64_t r = 0; r < rows; ++r) {
        float *to = back + (block * capacity + r) * lanes;
        const V factor = all(share[block * capacity + r]);
        for (int64_t l = 0; l < lanes; l += 16) {
            V total = load(to + l);
            for (int64_t k = 1; k < many; ++k) total += load(to + k * next + l);
            save(to + l, total * factor);
        }
    }
}

// grad_x[p] = its row of each block.
template <class X>
void spread(const float *back, const ReuseClusters &from, const DeepReuse &of, X *grad_x, int64_t begin, int64_t end) {
    const int64_t length = of.length, lanes = (length + 15) / 16 * 16, pixels = of.pixels(), capacity = of.capacity();
    for (int64_t p = begin; p < end; ++p)
        for (int64_t b = 0; b < of.blocks(); ++b) {
            const float *row = back + (b * capacity + from.ids[b * pixels + p]) * lanes;
            X *to = grad_x + p * of.channels + b * length;
            for (int64_t l = 0; l < length; ++l) put(to + l, row[l]);
        }
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
