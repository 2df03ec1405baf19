#include "round_bfloat16.h"

#include <cstring>

#include "noise.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t CHUNK = 1 << 15;  // elements a task takes; a multiple of 32
constexpr std::uint32_t LARGEST = 0x7f7f0000U, MAGNITUDE = 0x7fffffffU, INFINITE = 0x7f800000U;

inline std::uint16_t round_one(std::uint32_t bits, std::uint32_t noise) {
    const std::uint32_t size = bits & MAGNITUDE;
    if (size >= INFINITE) return static_cast<std::uint16_t>((bits >> 16) | (size > INFINITE ? 0x40U : 0U));
    std::uint32_t sum = size + noise;
    if (sum > LARGEST) sum = LARGEST;  // finite stays finite
    return static_cast<std::uint16_t>((sum | (bits & ~MAGNITUDE)) >> 16);
}

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

#if defined(__AVX512F__)
inline __m512i round_16(__m512i bits, __m512i noise) {
    const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(MAGNITUDE));
    const __m512i size = _mm512_and_si512(bits, magnitude);
    const __mmask16 odd = _mm512_cmpge_epu32_mask(size, _mm512_set1_epi32(static_cast<int>(INFINITE)));
    __m512i sum = _mm512_min_epu32(_mm512_add_epi32(size, noise), _mm512_set1_epi32(static_cast<int>(LARGEST)));
    sum = _mm512_or_si512(sum, _mm512_andnot_si512(magnitude, bits));
    if (__builtin_expect(odd != 0, 0)) {  // infinity keeps its bits, and what is not a number stays none
        const __mmask16 nan = _mm512_cmpgt_epu32_mask(size, _mm512_set1_epi32(static_cast<int>(INFINITE)));
        sum = _mm512_mask_mov_epi32(sum, odd, bits);
        sum = _mm512_mask_or_epi32(sum, nan, sum, _mm512_set1_epi32(0x400000));
    }
    return _mm512_srli_epi32(sum, 16);
}
#endif

void round_range(const float *x, std::uint16_t *y, std::int64_t begin, std::int64_t end, std::uint64_t key) {
    std::int64_t i = begin;
#if defined(__AVX512F__)
    for (; i + 32 <= end; i += 32) {
        const __m512i words = noise_words(key, static_cast<std::uint64_t>(i) / 32);
        const __m512i a = round_16(_mm512_loadu_si512(x + i), _mm512_and_si512(words, _mm512_set1_epi32(0xffff)));
        const __m512i b = round_16(_mm512_loadu_si512(x + i + 16), _mm512_srli_epi32(words, 16));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + i), _mm512_cvtepi32_epi16(a));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(y + i + 16), _mm512_cvtepi32_epi16(b));
    }
#else
    for (; i + 32 <= end; i += 32) {
        std::uint32_t words[16];
        for (int lane = 0; lane < 16; ++lane) words[lane] = noise_word(key, static_cast<std::uint64_t>(i) / 2 + lane);
        for (int lane = 0; lane < 16; ++lane) y[i + lane] = round_one(bits_of(x[i + lane]), words[lane] & 0xffffU);
        for (int lane = 0; lane < 16; ++lane) y[i + 16 + lane] = round_one(bits_of(x[i + 16 + lane]), words[lane] >> 16);
    }
#endif
    for (; i < end; ++i) y[i] = round_one(bits_of(x[i]), noise16(key, i));
}

}  // namespace

void round_bfloat16(const float *x, std::uint16_t *y, std::int64_t n, std::uint64_t key, int threads) {
    parallel((n + CHUNK - 1) / CHUNK, threads, [&](std::int64_t task) {
        const std::int64_t begin = task * CHUNK, end = begin + CHUNK < n ? begin + CHUNK : n;
        round_range(x, y, begin, end, key);
    });
}

}  // namespace HASTEN_ISA
}  // namespace hasten
