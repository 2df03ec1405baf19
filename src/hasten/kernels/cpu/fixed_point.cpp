#include "fixed_point.h"

#include <cmath>
#include <cstring>

#include "noise.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::uint64_t SECOND = 0x5851F42D4C957F2DULL;  // changes the key for an element's further bits

struct Grid {
    float scale, eps, top, bottom;  // 2^fraction, 2^-fraction, and the ends of the range in steps

    Grid(int word, int fraction)
        : scale(std::ldexp(1.0F, fraction)), eps(std::ldexp(1.0F, -fraction)), top(std::ldexp(1.0F, word - 1) - 1.0F),
          bottom(-std::ldexp(1.0F, word - 1)) {}
};

struct Seen {
    std::int64_t outside = 0;
    float largest = 0.0F;
};

// The integer part of a number that is not negative; whole numbers, infinity and NaN stay.
inline float whole_part(float size) {
    const float small = size < 8388608.0F ? size : 0.0F;
    return size < 8388608.0F ? static_cast<float>(static_cast<std::int32_t>(small)) : size;
}

inline float within(float r, const Grid &grid) {  // NaN stays
    r = r > grid.top ? grid.top : r;
    return r < grid.bottom ? grid.bottom : r;
}

inline void see(float x, float v, const Grid &grid, Seen &seen) {
    seen.outside += static_cast<int>(v > grid.top) | static_cast<int>(v < grid.bottom);
    const float size = std::fabs(x);
    seen.largest = size > seen.largest ? size : seen.largest;
}

inline float nearest(float v) {
    float low = std::copysign(whole_part(std::fabs(v)), v);
    low = v < low ? low - 1.0F : low;
    return v - low >= 0.5F ? low + 1.0F : low;  // a tie goes up
}

float stochastic_one(float v, std::uint64_t key, std::int64_t i) {
    const float size = std::fabs(v), low = whole_part(size), share = (size - low) * 65536.0F;
    const float whole = whole_part(share), first = static_cast<float>(noise16(key, i));
    bool up = first < whole;
    if (first == whole) up = static_cast<float>(noise16(key ^ SECOND, i)) < (share - whole) * 65536.0F;
    return std::copysign(low + (up ? 1.0F : 0.0F), v);
}

#if defined(__AVX512F__)
// 16 numbers in steps; `tie` gets those whose first bits do not decide.
inline __m512 stochastic_16(__m512 v, __m512i noise, __mmask16 &tie) {
    const __m512 size = _mm512_abs_ps(v);
    const __m512 low = _mm512_roundscale_ps(size, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __m512 share = _mm512_mul_ps(_mm512_sub_ps(size, low), _mm512_set1_ps(65536.0F));
    const __m512i whole = _mm512_cvttps_epi32(share);  // NaN, of infinity and NaN, becomes a negative number
    const __mmask16 up = _mm512_cmplt_epi32_mask(noise, whole);
    tie = _mm512_cmpeq_epi32_mask(noise, whole);
    const __m512 r = _mm512_mask_add_ps(low, up, low, _mm512_set1_ps(1.0F));
    const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000U));
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(sign, _mm512_castps_si512(v), _mm512_castps_si512(r), 0xca));
}

inline __m512 nearest_16(__m512 v) {
    const __m512 low = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    const __mmask16 up = _mm512_cmp_ps_mask(_mm512_sub_ps(v, low), _mm512_set1_ps(0.5F), _CMP_GE_OQ);
    return _mm512_mask_add_ps(low, up, low, _mm512_set1_ps(1.0F));
}

struct Wide {
    __m512 scale, eps, top, bottom, largest = _mm512_setzero_ps();
    std::int64_t outside = 0;

    explicit Wide(const Grid &grid)
        : scale(_mm512_set1_ps(grid.scale)), eps(_mm512_set1_ps(grid.eps)), top(_mm512_set1_ps(grid.top)),
          bottom(_mm512_set1_ps(grid.bottom)) {}

    __m512 load(const float *x) {
        const __m512 given = _mm512_loadu_ps(x), v = _mm512_mul_ps(given, scale);
        largest = _mm512_max_ps(_mm512_abs_ps(given), largest);  // of NaN and a number the second is taken
        const __mmask16 out = _mm512_cmp_ps_mask(v, top, _CMP_GT_OQ) | _mm512_cmp_ps_mask(v, bottom, _CMP_LT_OQ);
        outside += __builtin_popcount(out);
        return v;
    }

    void store(float *y, __m512 r) const {
        _mm512_storeu_ps(y, _mm512_mul_ps(_mm512_max_ps(bottom, _mm512_min_ps(top, r)), eps));
    }

    void add_to(Seen &seen) const {
        seen.outside += outside;
        const float size = _mm512_reduce_max_ps(largest);
        seen.largest = size > seen.largest ? size : seen.largest;
    }
};
#endif

Seen convert(const float *x, float *y, std::int64_t i, std::int64_t end, const Grid &grid, std::uint64_t key, bool stochastic) {
    Seen seen;
#if defined(__AVX512F__)
    Wide wide(grid);
    if (stochastic) {
        for (; i + 32 <= end; i += 32) {
            const __m512i words = noise_words(key, static_cast<std::uint64_t>(i) / 32);
            const __m512 a = wide.load(x + i), b = wide.load(x + i + 16);
            __mmask16 tie_a, tie_b;
            wide.store(y + i, stochastic_16(a, _mm512_and_si512(words, _mm512_set1_epi32(0xffff)), tie_a));
            wide.store(y + i + 16, stochastic_16(b, _mm512_srli_epi32(words, 16), tie_b));
            std::uint32_t tie = tie_a | (static_cast<std::uint32_t>(tie_b) << 16);
            for (; __builtin_expect(tie != 0, 0); tie &= tie - 1) {
                const std::int64_t at = i + __builtin_ctz(tie);
                y[at] = within(stochastic_one(x[at] * grid.scale, key, at), grid) * grid.eps;
            }
        }
    } else {
        for (; i + 16 <= end; i += 16) wide.store(y + i, nearest_16(wide.load(x + i)));
    }
    wide.add_to(seen);
#else
    for (; stochastic && i + 32 <= end; i += 32) {
        std::uint32_t words[16], noise[32];
        for (int lane = 0; lane < 16; ++lane) words[lane] = noise_word(key, static_cast<std::uint64_t>(i) / 2 + lane);
        for (int lane = 0; lane < 16; ++lane) noise[lane] = words[lane] & 0xffffU;
        for (int lane = 0; lane < 16; ++lane) noise[16 + lane] = words[lane] >> 16;
        int ties = 0, outside = 0;
        float largest = seen.largest;
        for (int lane = 0; lane < 32; ++lane) {
            const float v = x[i + lane] * grid.scale, size = std::fabs(v), low = whole_part(size);
            const float share = (size - low) * 65536.0F, whole = whole_part(share);
            const float first = static_cast<float>(static_cast<std::int32_t>(noise[lane]));
            ties |= static_cast<int>(first == whole);
            const float r = std::copysign(low + (first < whole ? 1.0F : 0.0F), v);
            y[i + lane] = within(r, grid) * grid.eps;
            outside += static_cast<int>(v > grid.top) | static_cast<int>(v < grid.bottom);
            const float mine = std::fabs(x[i + lane]);
            largest = mine > largest ? mine : largest;
        }
        for (int lane = 0; ties != 0 && lane < 32; ++lane) {
            y[i + lane] = within(stochastic_one(x[i + lane] * grid.scale, key, i + lane), grid) * grid.eps;
        }
        seen.outside += outside;
        seen.largest = largest;
    }
#endif
    for (; i < end; ++i) {
        const float v = x[i] * grid.scale;
        see(x[i], v, grid, seen);
        y[i] = within(stochastic ? stochastic_one(v, key, i) : nearest(v), grid) * grid.eps;
    }
    return seen;
}

}  // namespace

void fixed_point(const float *x, float *y, std::int64_t n, std::int64_t *counts, float *sizes, std::int64_t chunk, int word,
                 int fraction, std::uint64_t key, bool stochastic, int threads) {
    const Grid grid(word, fraction);
    parallel((n + chunk - 1) / chunk, threads, [&](std::int64_t task) {
        const std::int64_t begin = task * chunk, end = begin + chunk < n ? begin + chunk : n;
        const Seen seen = convert(x, y, begin, end, grid, key, stochastic);
        counts[task] = seen.outside;
        sizes[task] = seen.largest;
    });
}

}  // namespace HASTEN_ISA
}  // namespace hasten
