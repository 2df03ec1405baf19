// What both products of zero_skip need: reading elements of either dtype, finding non-zeros, taps inside the image, scratch.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "zero_skip.h"
#include "zero_skip_tile.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

struct Half {
    std::uint16_t bits;  // a bfloat16
};

inline float read(const float *p) { return *p; }
inline float read(const Half *p) {
    const std::uint32_t bits = static_cast<std::uint32_t>(p->bits) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline Half narrow(float x) {  // to nearest, ties to even
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7fffffffU) > 0x7f800000U) return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16)};
}

// n values as float32, then zeros up to a multiple of WIDTH.
template <class T>
inline void widen(const T *from, float *to, std::int64_t n) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = read(from + i);
    for (std::int64_t i = n; i % WIDTH != 0; ++i) to[i] = 0.0f;
}

// Which of the `n` (at most 16) elements are not zero (one bit each), and their values.
template <class T>
inline std::uint32_t non_zeros(const T *p, int n, float *values) {
    std::uint32_t mask = 0;
    for (int i = 0; i < n; ++i) {
        values[i] = read(p + i);
        mask |= static_cast<std::uint32_t>(values[i] != 0.0f) << i;
    }
    return mask;
}

#if defined(__AVX512F__)
inline __m512 load_16(const float *p, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, p); }
inline __m512 load_16(const Half *p, __mmask16 inside) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, p)), 16));
}
#endif

// Memory of this many T, 64-byte aligned, until the end of the scope.
template <class T>
class Scratch {
  public:
    explicit Scratch(std::int64_t n)
        : p_(static_cast<T *>(std::aligned_alloc(64, (static_cast<std::size_t>(n) * sizeof(T) / 64 + 1) * 64))) {
        if (p_ == nullptr) std::abort();
    }
    ~Scratch() { std::free(p_); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
    T *get() const { return p_; }
    T &operator[](std::int64_t i) const { return p_[i]; }

  private:
    T *p_;
};

inline std::int64_t up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
inline std::int64_t most(std::int64_t a, std::int64_t b) { return a < b ? b : a; }

// The taps [first, end) of `taps` that meet the image: 0 <= start + tap * step < size.
inline void taps_inside(std::int64_t start, std::int64_t step, std::int64_t size, std::int64_t taps, std::int64_t &first,
                        std::int64_t &end) {
    first = start < 0 ? least(taps, up(-start, step)) : 0;
    end = start >= size ? 0 : least(taps, (size - 1 - start) / step + 1);
    if (end < first) end = first;
}

// The share of non-zeros, from up to 8192 groups of 16 elements evenly spaced: it decides how work is blocked.
template <class T>
inline double density(const T *g, std::int64_t n) {
    const std::int64_t groups = n / 16, stride = most(1, groups / 8192);
    std::int64_t seen = 0, found = 0;
    float values[16];
    for (std::int64_t i = 0; i < groups; i += stride, seen += 16) {
#if defined(__AVX512F__)
        (void)values;
        const __m512 v = load_16(g + i * 16, 0xffff);
        found += __builtin_popcount(_mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ));
#else
        found += __builtin_popcount(non_zeros(g + i * 16, 16, values));
#endif
    }
    return seen > 0 ? static_cast<double>(found) / static_cast<double>(seen) : 1.0;
}

}  // namespace

}  // namespace HASTEN_ISA
}  // namespace hasten
