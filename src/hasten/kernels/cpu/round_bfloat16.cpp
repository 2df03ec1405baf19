#include "round_bfloat16.h"

#include <cstring>

#include "noise.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t CHUNK = 1 << 15;  // elements a task takes; a multiple of 32
constexpr std::int64_t STREAM = 1 << 20;  // from this many elements on, written past the caches (our choice, measured)
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
// Indices of the upper 16 bits of each of the 32 elements of two vectors.
inline __m512i upper_halves() {
    const __m512i even = _mm512_setr_epi32(0x00030001, 0x00070005, 0x000b0009, 0x000f000d, 0x00130011, 0x00170015,
                                           0x001b0019, 0x001f001d, 0x00230021, 0x00270025, 0x002b0029, 0x002f002d,
                                           0x00330031, 0x00370035, 0x003b0039, 0x003f003d);
    return even;
}

// The noise of one block of 32 elements after another: words that `noise_words` gives, with the sums that repeat kept.
// Blocks must not cross a multiple of 2**32 words, which the first of a task and CHUNK see to.
struct Noise {
    __m512i low, high;

    Noise(std::uint64_t key, std::uint64_t block) {
        const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        const std::uint64_t first = block * 16;
        low = _mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(first + key)));
        high = _mm512_set1_epi32(static_cast<int>((key >> 32) + (first >> 32)));
    }

    __m512i next() {
        const __m512i words = mix(_mm512_add_epi32(mix(low), high));
        low = _mm512_add_epi32(low, _mm512_set1_epi32(16));
        return words;
    }
};

// The 32 elements at x, rounded with these words.
inline __m512i round_32(const float *x, __m512i words) {
    const __m512i magnitude = _mm512_set1_epi32(static_cast<int>(MAGNITUDE));
    const __m512i largest = _mm512_set1_epi32(static_cast<int>(LARGEST));
    const __m512i infinite = _mm512_set1_epi32(static_cast<int>(INFINITE));
    const __m512i a = _mm512_loadu_si512(x), b = _mm512_loadu_si512(x + 16);
    const __m512i size_a = _mm512_and_si512(a, magnitude), size_b = _mm512_and_si512(b, magnitude);
    __m512i sum_a = _mm512_add_epi32(size_a, _mm512_and_si512(words, _mm512_set1_epi32(0xffff)));
    __m512i sum_b = _mm512_add_epi32(size_b, _mm512_srli_epi32(words, 16));
    sum_a = _mm512_ternarylogic_epi32(magnitude, _mm512_min_epu32(sum_a, largest), a, 0xca);  // sign of a, rest raised
    sum_b = _mm512_ternarylogic_epi32(magnitude, _mm512_min_epu32(sum_b, largest), b, 0xca);
    const __mmask16 odd = _mm512_cmpge_epu32_mask(_mm512_max_epu32(size_a, size_b), infinite);
    if (__builtin_expect(odd != 0, 0)) {  // infinity keeps its bits, and what is not a number stays none
        const __m512i quiet = _mm512_set1_epi32(0x400000);
        sum_a = _mm512_mask_mov_epi32(sum_a, _mm512_cmpge_epu32_mask(size_a, infinite), a);
        sum_b = _mm512_mask_mov_epi32(sum_b, _mm512_cmpge_epu32_mask(size_b, infinite), b);
        sum_a = _mm512_mask_or_epi32(sum_a, _mm512_cmpgt_epu32_mask(size_a, infinite), sum_a, quiet);
        sum_b = _mm512_mask_or_epi32(sum_b, _mm512_cmpgt_epu32_mask(size_b, infinite), sum_b, quiet);
    }
    return _mm512_permutex2var_epi16(sum_a, upper_halves(), sum_b);
}
#endif

// stream: write past the caches, for what is too large to be found there again; y + begin is then a multiple of 64 bytes.
void round_range(const float *x, std::uint16_t *y, std::int64_t begin, std::int64_t end, std::uint64_t key, bool stream) {
    std::int64_t i = begin;
#if defined(__AVX512F__)
    Noise noise(key, static_cast<std::uint64_t>(i) / 32);
    if (stream) {
        for (; i + 32 <= end; i += 32) {
            _mm512_stream_si512(reinterpret_cast<__m512i *>(y + i), round_32(x + i, noise.next()));
        }
        _mm_sfence();
    }
    for (; i + 32 <= end; i += 32) _mm512_storeu_si512(y + i, round_32(x + i, noise.next()));
#else
    (void)stream;
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
    const bool stream = n >= STREAM && reinterpret_cast<std::uintptr_t>(y) % 64 == 0;
    parallel((n + CHUNK - 1) / CHUNK, threads, [&](std::int64_t task) {
        const std::int64_t begin = task * CHUNK, end = begin + CHUNK < n ? begin + CHUNK : n;
        round_range(x, y, begin, end, key, stream);
    });
}

}  // namespace HASTEN_ISA
}  // namespace hasten
