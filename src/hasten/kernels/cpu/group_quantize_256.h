// Groups of 256 values as 16 vectors of AVX-512.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>

#include "group_quantize_any.h"

namespace hasten {
namespace HASTEN_ISA {
namespace {

inline __m512 row_of(const float *x) { return _mm512_loadu_ps(x); }
inline __m512 row_of(const std::uint16_t *x) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i *>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

template <int F, bool Alone>
inline std::uint8_t *pack_field(const __m512i *q, int shift, std::uint8_t *codes) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    const __m512i mask = _mm512_set1_epi32((1 << F) - 1);
#pragma GCC unroll 4
    for (int first = 0; first < ROWS; first += rows) {
        __m512i word = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int r = 0; r < rows; ++r) {
            __m512i part = q[first + r];
            if (!Alone) part = _mm512_and_si512(_mm512_srl_epi32(part, _mm_cvtsi32_si128(shift)), mask);
            word = _mm512_or_si512(word, _mm512_slli_epi32(part, F * r));
        }
        if (F == 1) {
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes), _mm512_cvtepi32_epi16(word));
            codes += 32;
        } else {
            _mm512_storeu_si512(codes, word);
            codes += 64;
        }
    }
    return codes;
}

struct Bounds {
    __m512 low, high, odd;
    inline void see(__m512 v) {
        low = _mm512_min_ps(low, v);
        high = _mm512_max_ps(high, v);
        odd = _mm512_fmadd_ps(v, _mm512_setzero_ps(), odd);  // 0, or NaN once a NaN or an infinity was seen
    }
    inline bool is_odd() const { return _mm512_cmp_ps_mask(odd, odd, _CMP_UNORD_Q) != 0; }
};

template <class T>
inline void quantise_256(const T *x, int bits, std::uint64_t key, std::int64_t element, bool stochastic,
                         std::uint16_t *meta, std::uint8_t *codes) {
    __m512 v[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) v[r] = row_of(x + 16 * r);
    Bounds a = {v[0], v[0], _mm512_setzero_ps()}, b = {v[1], v[1], _mm512_setzero_ps()};
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += 2) {
        a.see(v[r]);
        b.see(v[r + 1]);
    }
    const bool odd = a.is_odd() || b.is_odd();
    const float low = _mm512_reduce_min_ps(_mm512_min_ps(a.low, b.low));
    const float high = _mm512_reduce_max_ps(_mm512_max_ps(a.high, b.high));
    const Frame f = frame_of(low, high, odd, bits);
    store_frame(f, meta);
    if (__builtin_expect(f.bad, 0)) {
        std::memset(codes, 0, static_cast<std::size_t>(32 * bits));
        return;
    }
    __m512i q[ROWS];
    const __m512 lowest = _mm512_set1_ps(f.lowest), scale = _mm512_set1_ps(f.scale);
    const __m512i even = _mm512_set1_epi32(0x1fffe), one = _mm512_set1_epi32(1), half = _mm512_set1_epi32(1 << 16);
    const std::uint64_t block = static_cast<std::uint64_t>(element) / 32;
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r += 2) {
        __m512i first = half, second = half;
        if (stochastic) {  // 2 * noise + 1 of the low and the high halves of the words
            const __m512i words = noise_words(key, block + static_cast<std::uint64_t>(r / 2));
            first = _mm512_ternarylogic_epi32(_mm512_slli_epi32(words, 1), even, one, 0xea);
            second = _mm512_ternarylogic_epi32(_mm512_srli_epi32(words, 15), even, one, 0xea);
        }
        const __m512i s = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(v[r], lowest), scale));
        const __m512i t = _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_sub_ps(v[r + 1], lowest), scale));
        q[r] = _mm512_srli_epi32(_mm512_add_epi32(s, first), 17);
        q[r + 1] = _mm512_srli_epi32(_mm512_add_epi32(t, second), 17);
    }
    if (bits == 2) {
        pack_field<2, true>(q, 0, codes);
    } else if (bits == 1) {
        pack_field<1, true>(q, 0, codes);
    } else if (bits == 4) {
        pack_field<4, true>(q, 0, codes);
    } else if (bits == 8) {
        pack_field<8, true>(q, 0, codes);
    } else {
        int shift = 0;
        if (bits & 4) codes = pack_field<4, false>(q, shift, codes), shift += 4;
        if (bits & 2) codes = pack_field<2, false>(q, shift, codes), shift += 2;
        if (bits & 1) pack_field<1, false>(q, shift, codes);
    }
}

// The bits of v in the type of the result, in the lower half of each lane for bfloat16; and their way to memory.
inline __m512i bits_for(const float *, __m512 v) { return _mm512_castps_si512(v); }
inline __m512i bits_for(const std::uint16_t *, __m512 v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i tie = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), tie), 16);
}
inline void store_row(float *x, __m512i v) { _mm512_storeu_si512(x, v); }
inline void store_row(std::uint16_t *x, __m512i v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(x), _mm512_cvtepi32_epi16(v));
}

template <int F>
inline __m512i field_word(const std::uint8_t *codes, int word) {
    if (F == 1) return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(codes)));
    return _mm512_loadu_si512(codes + 64 * word);
}

template <int F>
inline const std::uint8_t *unpack_field(const std::uint8_t *codes, int shift, __m512i *q) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    const __m512i mask = _mm512_set1_epi32((1 << F) - 1);
    const __m128i up = _mm_cvtsi32_si128(shift);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        const __m512i word = field_word<F>(codes, r / rows);
        const __m512i part = _mm512_and_si512(_mm512_srli_epi32(word, F * (r % rows)), mask);
        q[r] = _mm512_or_si512(q[r], _mm512_sll_epi32(part, up));
    }
    return codes + 32 * F;
}

// Codes of 1, 2 or 4 bits: the 16 numbers they can stand for lie in one vector, repeated, and a code looks its up.
template <int F, class T>
inline void look_up(const std::uint8_t *codes, __m512 lowest, __m512 step, T *x) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i code = _mm512_and_si512(lane, _mm512_set1_epi32((1 << F) - 1));
    const __m512i table = bits_for(x, _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), step, lowest));
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        const __m512i word = field_word<F>(codes, r / rows);
        store_row(x + 16 * r, _mm512_permutexvar_epi32(_mm512_srli_epi32(word, F * (r % rows)), table));
    }
}

template <class T>
inline void dequantise_256(const std::uint8_t *codes, const std::uint16_t *meta, int bits, T *x) {
    const __m512 lowest = _mm512_set1_ps(widened(meta[0])), step = _mm512_set1_ps(widened(meta[1]));
    if (bits == 2) return look_up<2>(codes, lowest, step, x);
    if (bits == 1) return look_up<1>(codes, lowest, step, x);
    if (bits == 4) return look_up<4>(codes, lowest, step, x);
    __m512i q[ROWS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) q[r] = _mm512_setzero_si512();
    int shift = 0;
    if (bits & 8) codes = unpack_field<8>(codes, shift, q), shift += 8;
    if (bits & 4) codes = unpack_field<4>(codes, shift, q), shift += 4;
    if (bits & 2) codes = unpack_field<2>(codes, shift, q), shift += 2;
    if (bits & 1) unpack_field<1>(codes, shift, q);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
        store_row(x + 16 * r, bits_for(x, _mm512_fmadd_ps(_mm512_cvtepi32_ps(q[r]), step, lowest)));
    }
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
#endif
