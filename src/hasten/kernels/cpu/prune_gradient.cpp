#include "prune_gradient.h"

#include <cstdlib>
#include <cstring>

#include "noise.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t CHUNK = 1 << 15;  // elements a task takes; a multiple of 32

struct Totals {
    double sum = 0.0;
    std::int64_t zeros = 0, pruned = 0, raised = 0;
};

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float value_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

// One element, given and returned as the bits of a float32.
inline std::uint32_t prune_one(std::uint32_t bits, std::uint32_t noise, float tau, Totals &t) {
    const float size = value_of(bits & 0x7fffffffU);
    t.sum += static_cast<double>(size);
    t.zeros += size == 0.0f;
    if (!(size < tau)) return bits;
    // the middle of the step that the noise names, so that rounding it has no direction
    if (size > (static_cast<float>(noise) + 0.5f) * (tau * 0x1p-16f)) {
        ++t.raised;
        return bits_of(tau) | (bits & 0x80000000U);
    }
    t.pruned += size != 0.0f;
    return 0;
}

inline std::uint32_t get(const float *g, std::int64_t i) { return bits_of(g[i]); }
inline std::uint32_t get(const std::uint16_t *g, std::int64_t i) { return static_cast<std::uint32_t>(g[i]) << 16; }
inline void put(float *y, std::int64_t i, std::uint32_t bits) { y[i] = value_of(bits); }
inline void put(std::uint16_t *y, std::int64_t i, std::uint32_t bits) { y[i] = static_cast<std::uint16_t>(bits >> 16); }

#if defined(__AVX512F__)
inline __m512 get_16(const float *g) { return _mm512_loadu_ps(g); }
inline __m512 get_16(const std::uint16_t *g) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(g))), 16));
}
inline void put_16(float *y, __m512 x) { _mm512_storeu_ps(y, x); }
inline void put_16(std::uint16_t *y, __m512 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(y), _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x), 16)));
}

template <class T>
inline void prune_16(const T *g, T *y, __m512i noise, __m512 tau, __m512 step, __m512 &sum, Totals &t) {
    const __m512 x = get_16(g), size = _mm512_abs_ps(x);
    sum = _mm512_add_ps(sum, size);
    const __mmask16 zero = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_EQ_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(size, tau, _CMP_LT_OQ);
    const __m512 bar = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(noise), _mm512_set1_ps(0.5f)), step);
    const __mmask16 up = _mm512_mask_cmp_ps_mask(below, size, bar, _CMP_GT_OQ);
    const __m512 raised = _mm512_or_ps(tau, _mm512_and_ps(x, _mm512_set1_ps(-0.0f)));
    put_16(y, _mm512_mask_mov_ps(_mm512_maskz_mov_ps(static_cast<__mmask16>(~below), x), up, raised));
    t.zeros += __builtin_popcount(zero);
    t.raised += __builtin_popcount(up);
    t.pruned += __builtin_popcount(below & ~up & ~zero & 0xffff);
}
#endif

template <class T>
Totals prune_range(const T *g, T *y, std::int64_t begin, std::int64_t end, float tau, std::uint64_t key) {
    Totals t;
    std::int64_t i = begin;
#if defined(__AVX512F__)
    const __m512 level = _mm512_set1_ps(tau), step = _mm512_set1_ps(tau * 0x1p-16f);
    while (i + 32 <= end) {
        __m512 low = _mm512_setzero_ps(), high = low;  // short sums, so that float32 is enough
        const std::int64_t stop = i + 4096 < end ? i + 4096 : end;
        for (; i + 32 <= stop; i += 32) {
            const __m512i words = noise_words(key, static_cast<std::uint64_t>(i) / 32);
            prune_16(g + i, y + i, _mm512_and_si512(words, _mm512_set1_epi32(0xffff)), level, step, low, t);
            prune_16(g + i + 16, y + i + 16, _mm512_srli_epi32(words, 16), level, step, high, t);
        }
        t.sum += static_cast<double>(_mm512_reduce_add_ps(low)) + static_cast<double>(_mm512_reduce_add_ps(high));
    }
#else
    for (; i + 32 <= end; i += 32) {
        std::uint32_t words[16];
        for (int lane = 0; lane < 16; ++lane) words[lane] = noise_word(key, static_cast<std::uint64_t>(i) / 2 + lane);
        for (int lane = 0; lane < 16; ++lane) put(y, i + lane, prune_one(get(g, i + lane), words[lane] & 0xffffU, tau, t));
        for (int lane = 0; lane < 16; ++lane) put(y, i + 16 + lane, prune_one(get(g, i + 16 + lane), words[lane] >> 16, tau, t));
    }
#endif
    for (; i < end; ++i) put(y, i, prune_one(get(g, i), noise16(key, i), tau, t));
    return t;
}

template <class T>
void prune(const T *g, T *y, double *totals, std::int64_t n, float tau, std::uint64_t key, int threads) {
    const std::int64_t tasks = (n + CHUNK - 1) / CHUNK;
    Totals *parts = static_cast<Totals *>(std::malloc(static_cast<std::size_t>(tasks + 1) * sizeof(Totals)));
    if (parts == nullptr) std::abort();
    parallel(tasks, threads, [&](std::int64_t task) {
        const std::int64_t begin = task * CHUNK, end = begin + CHUNK < n ? begin + CHUNK : n;
        parts[task] = prune_range(g, y, begin, end, tau, key);
    });
    Totals all;
    for (std::int64_t task = 0; task < tasks; ++task) {  // in a fixed order
        all.sum += parts[task].sum;
        all.zeros += parts[task].zeros;
        all.pruned += parts[task].pruned;
        all.raised += parts[task].raised;
    }
    std::free(parts);
    totals[0] = all.sum;
    totals[1] = static_cast<double>(all.zeros);
    totals[2] = static_cast<double>(all.pruned);
    totals[3] = static_cast<double>(all.raised);
}

}  // namespace

void prune_gradient(const void *g, void *y, double *totals, std::int64_t n, float tau, std::uint64_t key, bool half, int threads) {
    if (half)
        prune(static_cast<const std::uint16_t *>(g), static_cast<std::uint16_t *>(y), totals, n, tau, key, threads);
    else
        prune(static_cast<const float *>(g), static_cast<float *>(y), totals, n, tau, key, threads);
}

}  // namespace HASTEN_ISA
}  // namespace hasten
