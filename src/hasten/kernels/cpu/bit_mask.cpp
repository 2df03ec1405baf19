#include "bit_mask.h"

#include <cstring>

#include "parallel.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t CHUNK = 1 << 15;  // elements a task takes; a multiple of 64, so that tasks share no byte

inline float widened(float x) { return x; }
inline float widened(std::uint16_t x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}
inline void narrow(float x, float *y) { *y = x; }
inline void narrow(float x, std::uint16_t *y) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffU) > 0x7f800000U) {
        *y = static_cast<std::uint16_t>((bits >> 16) | 0x40U);
        return;
    }
    *y = static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// Eight elements, or the last few.
template <class T>
inline std::uint8_t mask_of(const T *x, T *y, int n) {
    std::uint32_t byte = 0;
    T kept[8];
    for (int i = 0; i < n; ++i) {
        const std::uint32_t bit = !(widened(x[i]) <= 0.0F);
        byte |= bit << i;
        kept[i] = bit ? x[i] : T(0);
    }
    if (y != nullptr) std::memcpy(y, kept, static_cast<std::size_t>(n) * sizeof(T));
    return static_cast<std::uint8_t>(byte);
}

template <class T>
inline void apply(std::uint32_t byte, const T *g, T *y, int n, float scale) {
    for (int i = 0; i < n; ++i) {
        const bool kept = (byte >> i) & 1U;
        if (scale == 1.0F) {
            y[i] = kept ? g[i] : T(0);
        } else {
            narrow(kept ? widened(g[i]) * scale : 0.0F, y + i);
        }
    }
}

#if defined(__AVX512F__)
inline void store_16(std::uint8_t *mask, __mmask16 bits) {
    const std::uint16_t two = static_cast<std::uint16_t>(bits);
    std::memcpy(mask, &two, 2);
}

inline std::int64_t mask_vectors(const float *x, float *y, std::uint8_t *mask, std::int64_t i, std::int64_t end) {
    const __m512 zero = _mm512_setzero_ps();
    for (; i + 16 <= end; i += 16) {
        const __m512 v = _mm512_loadu_ps(x + i);
        const __mmask16 bits = _mm512_cmp_ps_mask(v, zero, _CMP_NLE_UQ);
        if (y != nullptr) _mm512_storeu_ps(y + i, _mm512_maskz_mov_ps(bits, v));
        store_16(mask + i / 8, bits);
    }
    return i;
}

// As integers: above 0 are the bits 1 to 0x7fff, and 0xff81 to 0xffff are negative numbers that are none.
inline std::int64_t mask_vectors(const std::uint16_t *x, std::uint16_t *y, std::uint8_t *mask, std::int64_t i,
                                 std::int64_t end) {
    const __m512i zero = _mm512_setzero_si512(), infinite = _mm512_set1_epi16(static_cast<short>(0xff80));
    for (; i + 32 <= end; i += 32) {
        const __m512i v = _mm512_loadu_si512(x + i);
        const __mmask32 bits = _mm512_cmpgt_epi16_mask(v, zero) | _mm512_cmpgt_epu16_mask(v, infinite);
        if (y != nullptr) _mm512_storeu_si512(y + i, _mm512_maskz_mov_epi16(bits, v));
        const std::uint32_t four = static_cast<std::uint32_t>(bits);
        std::memcpy(mask + i / 8, &four, 4);
    }
    return i;
}

inline std::int64_t apply_vectors(const std::uint8_t *mask, const float *g, float *y, std::int64_t i, std::int64_t end,
                                  float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (; i + 16 <= end; i += 16) {
        std::uint16_t bits;
        std::memcpy(&bits, mask + i / 8, 2);
        _mm512_storeu_ps(y + i, _mm512_maskz_mul_ps(static_cast<__mmask16>(bits), _mm512_loadu_ps(g + i), factor));
    }
    return i;
}

inline std::int64_t apply_vectors(const std::uint8_t *mask, const std::uint16_t *g, std::uint16_t *y, std::int64_t i,
                                  std::int64_t end, float scale) {
    if (scale != 1.0F) return i;
    for (; i + 32 <= end; i += 32) {
        std::uint32_t bits;
        std::memcpy(&bits, mask + i / 8, 4);
        _mm512_storeu_si512(y + i, _mm512_maskz_loadu_epi16(static_cast<__mmask32>(bits), g + i));
    }
    return i;
}
#else
template <class T>
inline std::int64_t mask_vectors(const T *, T *, std::uint8_t *, std::int64_t i, std::int64_t) {
    return i;
}
template <class T>
inline std::int64_t apply_vectors(const std::uint8_t *, const T *, T *, std::int64_t i, std::int64_t, float) {
    return i;
}
#endif

template <class T>
void mask_all(const T *x, T *y, std::uint8_t *mask, std::int64_t n, int threads) {
    parallel((n + CHUNK - 1) / CHUNK, threads, [&](std::int64_t task) {
        const std::int64_t end = (task + 1) * CHUNK < n ? (task + 1) * CHUNK : n;
        std::int64_t i = mask_vectors(x, y, mask, task * CHUNK, end);
        for (; i + 8 <= end; i += 8) mask[i / 8] = mask_of(x + i, y == nullptr ? y : y + i, 8);
        if (i < end) mask[i / 8] = mask_of(x + i, y == nullptr ? y : y + i, static_cast<int>(end - i));
    });
}

template <class T>
void apply_all(const std::uint8_t *mask, const T *g, T *y, std::int64_t n, float scale, int threads) {
    parallel((n + CHUNK - 1) / CHUNK, threads, [&](std::int64_t task) {
        const std::int64_t end = (task + 1) * CHUNK < n ? (task + 1) * CHUNK : n;
        std::int64_t i = apply_vectors(mask, g, y, task * CHUNK, end, scale);
        for (; i + 8 <= end; i += 8) apply(mask[i / 8], g + i, y + i, 8, scale);
        if (i < end) apply(mask[i / 8], g + i, y + i, static_cast<int>(end - i), scale);
    });
}

}  // namespace

void relu_mask(const float *x, float *y, std::uint8_t *mask, std::int64_t n, int threads) {
    mask_all(x, y, mask, n, threads);
}

void relu_mask_bfloat16(const std::uint16_t *x, std::uint16_t *y, std::uint8_t *mask, std::int64_t n, int threads) {
    mask_all(x, y, mask, n, threads);
}

void masked(const std::uint8_t *mask, const float *g, float *y, std::int64_t n, float scale, int threads) {
    apply_all(mask, g, y, n, scale, threads);
}

void masked_bfloat16(const std::uint8_t *mask, const std::uint16_t *g, std::uint16_t *y, std::int64_t n, float scale,
            int threads) {
    apply_all(mask, g, y, n, scale, threads);
}

}  // namespace HASTEN_ISA
}  // namespace hasten
