// Keyed random bits, the same as hasten.kernels.reference.noise: a pure function of (key, position).
//
// Word i is two rounds of a 32-bit mixing function of i, each after adding one half of the key. An element takes 16 bits:
// elements come in blocks of 32, and words 16 b .. 16 b + 15 serve block b, their low halves its first 16 elements and
// their high halves its last 16.
#pragma once

#include <cstdint>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hasten {

static inline std::uint32_t mix(std::uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352dU;
    x ^= x >> 15;
    x *= 0x846ca68bU;
    return x ^ (x >> 16);
}

static inline std::uint32_t noise_word(std::uint64_t key, std::uint64_t i) {
    const std::uint32_t low = static_cast<std::uint32_t>(key), high = static_cast<std::uint32_t>(key >> 32);
    return mix(mix(static_cast<std::uint32_t>(i) + low) + high + static_cast<std::uint32_t>(i >> 32));
}

// The 16 random bits of one element.
static inline std::uint32_t noise16(std::uint64_t key, std::int64_t element) {
    const std::uint64_t block = static_cast<std::uint64_t>(element) / 32, at = static_cast<std::uint64_t>(element) % 32;
    const std::uint32_t word = noise_word(key, block * 16 + at % 16);
    return at < 16 ? word & 0xffffU : word >> 16;
}

#if defined(__AVX512F__)
static inline __m512i mix(__m512i x) {
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(0x7feb352d));
    x = _mm512_xor_si512(x, _mm512_srli_epi32(x, 15));
    x = _mm512_mullo_epi32(x, _mm512_set1_epi32(static_cast<int>(0x846ca68bU)));
    return _mm512_xor_si512(x, _mm512_srli_epi32(x, 16));
}

// The 16 words of block b; `and 0xffff` and `shift right 16` give the bits of its first and last 16 elements.
static inline __m512i noise_words(std::uint64_t key, std::uint64_t block) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const std::uint64_t first = block * 16;  // a multiple of 16, so that lanes carry nothing into the upper half
    const __m512i i = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first)));
    const __m512i low = _mm512_set1_epi32(static_cast<int>(key));
    const __m512i high = _mm512_set1_epi32(static_cast<int>((key >> 32) + (first >> 32)));
    return mix(_mm512_add_epi32(mix(_mm512_add_epi32(i, low)), high));
}
#endif

}  // namespace hasten
