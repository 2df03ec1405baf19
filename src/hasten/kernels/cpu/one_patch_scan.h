// The first pass of one_patch.cpp: sums and largest places of the maps of grad_output. Included there alone.
#pragma once

#include <cmath>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "one_patch.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

using Index = std::int64_t;
using Half = std::uint16_t;

constexpr Index LANES = 16, BLOCK = 64;  // channels a vector and a task of the first pass take

inline float value(float x) { return x; }
inline float value(Half x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <bool ABS>
inline float rank(float x) {
    return ABS ? std::fabs(x) : x;
}

#if defined(__AVX512F__)
inline __m512 load(const float *x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load(const Half *x, __mmask16 mask) {
    // the forms with a mask throughout: g++ 12 warns of uninitialised registers in the others
    const __m512i words = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_maskz_loadu_epi16(mask, x));
    return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, words, 16));
}
inline __mmask16 first_lanes(Index count) {
    return count >= LANES ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << count) - 1u);
}
#endif

// Sum and first largest place of `count` (up to BLOCK) channels of one image in channels_last.
template <class T, bool ABS>
void scan_last(const T *map, Index places, Index pitch, Index count, float *sum, std::int32_t *at) {
#if defined(__AVX512F__)
    // four chains of dependent instructions at a time: vectors of channels, and where these are few, every second or
    // fourth place by itself
    __m512 best[4], total[4];
    __m512i where[4];
    const int used = static_cast<int>((count + LANES - 1) / LANES);
    const int ways = used == 1 ? 4 : used == 2 ? 2 : 1;
    __mmask16 mask[4];
    for (int k = 0; k < 4; ++k) {
        best[k] = _mm512_set1_ps(-HUGE_VALF);
        total[k] = _mm512_setzero_ps();
        where[k] = _mm512_setzero_si512();
        const Index left = count - (ways == 4 ? 0 : ways == 2 ? k % 2 : k) * LANES;
        mask[k] = first_lanes(left > 0 ? left : 0);
    }
    const auto step = [&](int k, const T *row, Index p) {
        const __m512 v = load(row, mask[k]);
        const __m512 r = ABS ? _mm512_abs_ps(v) : v;
        const __mmask16 more = _mm512_cmp_ps_mask(r, best[k], _CMP_GT_OQ);
        best[k] = _mm512_mask_mov_ps(best[k], more, r);
        where[k] = _mm512_mask_mov_epi32(where[k], more, _mm512_set1_epi32(static_cast<int>(p)));
        total[k] = _mm512_add_ps(total[k], v);
    };
    Index p = 0;
    if (ways == 4) {
        for (; p + 4 <= places; p += 4) {
            step(0, map + p * pitch, p);
            step(1, map + (p + 1) * pitch, p + 1);
            step(2, map + (p + 2) * pitch, p + 2);
            step(3, map + (p + 3) * pitch, p + 3);
        }
        for (; p < places; ++p) step(0, map + p * pitch, p);
    } else if (ways == 2) {
        for (; p + 2 <= places; p += 2) {
            step(0, map + p * pitch, p);
            step(1, map + p * pitch + LANES, p);
            step(2, map + (p + 1) * pitch, p + 1);
            step(3, map + (p + 1) * pitch + LANES, p + 1);
        }
        if (p < places) {
            step(0, map + p * pitch, p);
            step(1, map + p * pitch + LANES, p);
        }
    } else {
        for (; p < places; ++p) {
            const T *row = map + p * pitch;
            step(0, row, p);
            step(1, row + LANES, p);
            step(2, row + 2 * LANES, p);
            if (used == 4) step(3, row + 3 * LANES, p);
        }
    }
    for (int k = 0; k < used; ++k) {
        for (int other = k + used; ways > 1 && other < 4; other += used) {
            const __mmask16 equal = _mm512_cmp_ps_mask(best[other], best[k], _CMP_EQ_OQ);
            const __mmask16 more = _mm512_cmp_ps_mask(best[other], best[k], _CMP_GT_OQ) |
                                   _mm512_mask_cmplt_epi32_mask(equal, where[other], where[k]);
            best[k] = _mm512_mask_mov_ps(best[k], more, best[other]);
            where[k] = _mm512_mask_mov_epi32(where[k], more, where[other]);
            total[k] = _mm512_add_ps(total[k], total[other]);
        }
        _mm512_mask_storeu_ps(sum + k * LANES, mask[k], total[k]);
        _mm512_mask_storeu_epi32(at + k * LANES, mask[k], where[k]);
    }
#else
    float best[BLOCK], total[BLOCK];
    std::int32_t where[BLOCK];
    for (Index k = 0; k < count; ++k) {
        best[k] = -HUGE_VALF;
        total[k] = 0.0f;
        where[k] = 0;
    }
    for (Index p = 0; p < places; ++p) {
        const T *row = map + p * pitch;
        for (Index k = 0; k < count; ++k) {
            const float v = value(row[k]), r = rank<ABS>(v);
            const bool more = r > best[k];
            best[k] = more ? r : best[k];
            where[k] = more ? static_cast<std::int32_t>(p) : where[k];
            total[k] += v;
        }
    }
    for (Index k = 0; k < count; ++k) {
        sum[k] = total[k];
        at[k] = where[k];
    }
#endif
}

// The same for one map whose places lie side by side.
template <class T, bool ABS>
void scan_map(const T *map, Index places, float *sum, std::int32_t *at) {
    float best[LANES], total[LANES];
    std::int32_t where[LANES];
#if defined(__AVX512F__)
    __m512 b = _mm512_set1_ps(-HUGE_VALF), s = _mm512_setzero_ps();
    __m512i w = _mm512_setzero_si512();
    __m512i p16 = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (Index p = 0; p < places; p += LANES) {
        const __mmask16 mask = first_lanes(places - p);
        const __m512 v = load(map + p, mask);
        const __m512 r = ABS ? _mm512_abs_ps(v) : v;
        const __mmask16 more = _mm512_mask_cmp_ps_mask(mask, r, b, _CMP_GT_OQ);
        b = _mm512_mask_mov_ps(b, more, r);
        w = _mm512_mask_mov_epi32(w, more, p16);
        s = _mm512_add_ps(s, v);
        p16 = _mm512_add_epi32(p16, _mm512_set1_epi32(static_cast<int>(LANES)));
    }
    _mm512_storeu_ps(best, b);
    _mm512_storeu_ps(total, s);
    _mm512_storeu_si512(where, w);
#else
    for (Index k = 0; k < LANES; ++k) {
        best[k] = -HUGE_VALF;
        total[k] = 0.0f;
        where[k] = 0;
    }
    for (Index p = 0; p < places; p += LANES) {
        const Index count = places - p < LANES ? places - p : LANES;
        for (Index k = 0; k < count; ++k) {
            const float v = value(map[p + k]), r = rank<ABS>(v);
            const bool more = r > best[k];
            best[k] = more ? r : best[k];
            where[k] = more ? static_cast<std::int32_t>(p + k) : where[k];
            total[k] += v;
        }
    }
#endif
    float most = best[0], all = 0.0f;
    std::int32_t place = where[0];
    for (Index k = 0; k < LANES; ++k) {
        all += total[k];
        if (best[k] > most || (best[k] == most && where[k] < place)) {
            most = best[k];
            place = where[k];
        }
    }
    *sum = all;
    *at = place;
}

template <class T, bool ABS>
void scan(const OnePatch &s, const T *grad_output, float *t, std::int32_t *q, int threads) {
    const Index places = s.ho * s.wo, blocks = (s.o + BLOCK - 1) / BLOCK;
    const Index fixed = (s.ho > 1 ? s.wo : 0) + (s.wo > 1 ? 1 : 0);
    parallel(s.n * blocks, threads, [&](Index task) {
        const Index image = task / blocks, first = task % blocks * BLOCK;
        const Index count = s.o - first < BLOCK ? s.o - first : BLOCK;
        const T *maps = grad_output + image * s.o * places;
        float *sum = t + image * s.o + first;
        std::int32_t *at = q + image * s.o + first;
        if (s.grad_last) {
            scan_last<T, ABS>(maps + first, places, s.o, count, sum, at);
        } else {
            for (Index k = 0; k < count; ++k) scan_map<T, ABS>(maps + (first + k) * places, places, sum + k, at + k);
        }
        for (Index k = 0; k < count; ++k) {
            if (s.position == 2) at[k] = static_cast<std::int32_t>(fixed);
            if (s.weight == 1) {
                sum[k] = value(s.grad_last ? maps[at[k] * s.o + first + k] : maps[(first + k) * places + at[k]]);
            }
        }
    });
}

}  // namespace

}  // namespace HASTEN_ISA
}  // namespace hasten
