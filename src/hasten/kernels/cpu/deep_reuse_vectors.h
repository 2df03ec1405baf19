// What the parts of deep_reuse.cpp share: vectors of 16 floats, tiles of 32 outputs, and products of small matrices in cache.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "deep_reuse.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace hasten {
namespace HASTEN_ISA {
namespace {

using std::int32_t;
using std::int64_t;
using std::uint16_t;
using std::uint32_t;
using std::uint8_t;

// Sixteen floats, in one, two or four registers as the instruction set has them.
typedef float V __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));

inline V load(const float *p) { return *reinterpret_cast<const Loose *>(p); }
inline void save(float *p, V v) { *reinterpret_cast<Loose *>(p) = v; }
inline V all(float x) { return V{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

inline float number(float x) { return x; }
inline float number(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void put(float *p, float x) { *p = x; }
inline void put(uint16_t *p, float x) {  // to the nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffU) > 0x7f800000U) {
        *p = static_cast<uint16_t>((bits >> 16) | 0x40U);
    } else {
        *p = static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
    }
}

constexpr int WIDE = 32;                 // outputs of a tile: two vectors
constexpr int TOGETHER = 8;              // pieces hashed at once
constexpr int64_t ROWS = 48;             // clusters whose sums of gradients are held at once
constexpr int64_t HELD = 320 * 1024;     // floats of products held at once; they must stay in the second cache
constexpr int64_t PARTS = 8;             // tasks of the backward pass, at least, where the sizes allow

template <class T>
inline T *room(int64_t n) {
    return static_cast<T *>(std::aligned_alloc(64, static_cast<std::size_t>((n * int64_t(sizeof(T)) + 127) / 64 * 64)));
}

inline int64_t tiles(const DeepReuse &of) { return (of.outputs + WIDE - 1) / WIDE; }

// -- small matrix products, on rows that lie in cache

// z[i][0..WIDE) = sum over l of a[i][l] * b[l][0..WIDE), for R rows.
template <int R>
inline void rows_times(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner, float *z, int64_t z_row) {
    V sum[R][2];
    for (int i = 0; i < R; ++i) sum[i][0] = sum[i][1] = all(0.0F);
    for (int64_t l = 0; l < inner; ++l) {
        const V low = load(b + l * b_row), high = load(b + l * b_row + 16);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const V value = all(a[i * a_row + l]);
            sum[i][0] += value * low;
            sum[i][1] += value * high;
        }
    }
    for (int i = 0; i < R; ++i) {
        save(z + i * z_row, sum[i][0]);
        save(z + i * z_row + 16, sum[i][1]);
    }
}

// z[i][0..WIDE) += sum over r of a[r][i] * b[r][0..WIDE), for R rows of z.
template <int R>
inline void columns_times(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner, float *z, int64_t z_row) {
    V sum[R][2];
    for (int i = 0; i < R; ++i) {
        sum[i][0] = load(z + i * z_row);
        sum[i][1] = load(z + i * z_row + 16);
    }
    for (int64_t r = 0; r < inner; ++r) {
        const V low = load(b + r * b_row), high = load(b + r * b_row + 16);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const V value = all(a[r * a_row + i]);
            sum[i][0] += value * low;
            sum[i][1] += value * high;
        }
    }
    for (int i = 0; i < R; ++i) {
        save(z + i * z_row, sum[i][0]);
        save(z + i * z_row + 16, sum[i][1]);
    }
}

// z[i][0..16 N) += sum over k of a[i][k] * b[k][0..16 N), for R rows.
template <int R, int N>
inline void rows_into(const float *a, int64_t a_row, const float *b, int64_t b_row, int64_t inner, float *z, int64_t z_row) {
    V sum[R][N];
    for (int i = 0; i < R; ++i)
        for (int n = 0; n < N; ++n) sum[i][n] = load(z + i * z_row + 16 * n);
    for (int64_t k = 0; k < inner; ++k) {
        V right[N];
        for (int n = 0; n < N; ++n) right[n] = load(b + k * b_row + 16 * n);
#pragma GCC unroll 12
        for (int i = 0; i < R; ++i) {
            const V value = all(a[i * a_row + k]);
            for (int n = 0; n < N; ++n) sum[i][n] += value * right[n];
        }
    }
    for (int i = 0; i < R; ++i)
        for (int n = 0; n < N; ++n) save(z + i * z_row + 16 * n, sum[i][n]);
}

// packed[l][tap][0..WIDE) = w[m][tap][block * length + l] of the outputs m of a tile; 0 beyond the last.
void pack(const float *w, const DeepReuse &of, int64_t tile, int64_t block, float *packed) {
    const int64_t taps = of.taps(), length = of.length;
    for (int64_t j = 0; j < WIDE; ++j) {
        const int64_t m = tile * WIDE + j;
        for (int64_t t = 0; t < taps; ++t) {
            float *to = packed + t * WIDE + j;
            if (m < of.outputs) {
                const float *from = w + (m * taps + t) * of.channels + block * length;
                for (int64_t l = 0; l < length; ++l) to[l * taps * WIDE] = from[l];
            } else {
                for (int64_t l = 0; l < length; ++l) to[l * taps * WIDE] = 0.0F;
            }
        }
    }
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
