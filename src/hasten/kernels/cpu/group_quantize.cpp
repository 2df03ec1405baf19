#include "group_quantize.h"

#include <cmath>
#include <cstring>

#include "noise.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t TASK = 64;      // groups a task takes
constexpr int ROWS = 16;               // a group is ROWS rows of L values; a row is what one vector holds
constexpr float SMALLEST = 0x1p-110F;  // of a step, so that 2^17 / step stays finite
constexpr float SHARE = 0x1p17F;       // codes are cut from fixed-point numbers with 17 bits behind the point
constexpr double ROOM = 1.000001;      // so that rounding cannot carry the largest value beyond the last code

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widened(float x) { return x; }
inline float widened(std::uint16_t x) { return float_of(static_cast<std::uint32_t>(x) << 16); }
inline void narrow(float x, float *y) { *y = x; }
inline void narrow(float x, std::uint16_t *y) {
    const std::uint32_t bits = bits_of(x);
    *y = static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// What the codes of one group mean: code q stands for lowest + q * step. Both are bfloat16 numbers, rounded outwards
// before anything is quantised, so that what is stored is exactly what was used.
struct Frame {
    float lowest, step, scale;  // scale = 2^17 / step
    bool bad;
};

inline Frame frame_of(float low, float high, bool odd, int bits) {
    Frame f;
    const std::uint32_t lowest = bits_of(low + 0.0F);  // + 0: no negative zero
    f.lowest = float_of((lowest + (lowest >> 31) * 0xffffU) & 0xffff0000U);
    const float part = static_cast<float>(ROOM / ((1 << bits) - 1));
    f.step = float_of((bits_of((high - f.lowest) * part) + 0xffffU) & 0xffff0000U);
    f.bad = odd || !(f.step < INFINITY);
    if (f.step < SMALLEST) f.step = SMALLEST;
    if (f.bad) f.lowest = f.step = float_of(0x7fc00000U);
    f.scale = SHARE / f.step;
    return f;
}

inline void store_frame(const Frame &f, std::uint16_t *meta) {
    meta[0] = static_cast<std::uint16_t>(bits_of(f.lowest) >> 16);
    meta[1] = static_cast<std::uint16_t>(bits_of(f.step) >> 16);
}

// A code of b bits is cut into fields of 8, 4, 2 and 1 bits, low bits first; b tells which there are. A field of F bits
// takes L * 2 * F bytes: words of 32 bits (16 for F = 1), of which word (w, lane) holds the rows from w * 32 / F on.
// (Rows of a lane lie above one another: packing and unpacking are shifts of whole vectors.)

template <int F, class Word>
inline std::uint8_t *pack_field(const std::int32_t *q, int L, int shift, std::uint8_t *codes) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    for (int first = 0; first < ROWS; first += rows) {
        for (int lane = 0; lane < L; ++lane) {
            std::uint32_t word = 0;
            for (int r = 0; r < rows; ++r)
                word |= ((static_cast<std::uint32_t>(q[(first + r) * L + lane]) >> shift) & ((1U << F) - 1)) << (F * r);
            const Word kept = static_cast<Word>(word);
            std::memcpy(codes + lane * sizeof(Word), &kept, sizeof(Word));
        }
        codes += L * sizeof(Word);
    }
    return codes;
}

template <int F, class Word>
inline const std::uint8_t *unpack_field(const std::uint8_t *codes, int L, int shift, std::int32_t *q) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    for (int first = 0; first < ROWS; first += rows) {
        for (int r = 0; r < rows; ++r) {
            for (int lane = 0; lane < L; ++lane) {
                Word word;
                std::memcpy(&word, codes + lane * sizeof(Word), sizeof(Word));
                const std::uint32_t part = (static_cast<std::uint32_t>(word) >> (F * r)) & ((1U << F) - 1);
                q[(first + r) * L + lane] |= static_cast<std::int32_t>(part << shift);
            }
        }
        codes += L * sizeof(Word);
    }
    return codes;
}

template <class T>
void quantise_any(const T *x, int L, int bits, std::uint64_t key, std::int64_t element, bool stochastic,
                  std::uint16_t *meta, std::uint8_t *codes) {
    const int n = ROWS * L;
    float low = widened(x[0]), high = low, odd = 0;
    for (int i = 0; i < n; ++i) {
        const float v = widened(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        odd += v * 0.0F;
    }
    const Frame f = frame_of(low, high, odd != 0, bits);
    store_frame(f, meta);
    if (f.bad) {
        std::memset(codes, 0, static_cast<std::size_t>(L * 2 * bits));
        return;
    }
    std::int32_t q[LARGEST_GROUP];
    for (int i = 0; i < n; i += 32) {
        std::int32_t noise[32];
        if (stochastic) {
            const std::uint64_t word = static_cast<std::uint64_t>(element + i) / 2;
            for (int lane = 0; lane < 16; ++lane) {
                const std::uint32_t w = noise_word(key, word + static_cast<std::uint64_t>(lane));
                noise[lane] = static_cast<std::int32_t>(2 * (w & 0xffffU) + 1);
                noise[16 + lane] = static_cast<std::int32_t>(2 * (w >> 16) + 1);
            }
        } else {
            for (int lane = 0; lane < 32; ++lane) noise[lane] = 1 << 16;
        }
        for (int lane = 0; lane < 32; ++lane) {
            const float t = (widened(x[i + lane]) - f.lowest) * f.scale;
            q[i + lane] = (static_cast<std::int32_t>(t) + noise[lane]) >> 17;
        }
    }
    int shift = 0;
    if (bits & 8) codes = pack_field<8, std::uint32_t>(q, L, shift, codes), shift += 8;
    if (bits & 4) codes = pack_field<4, std::uint32_t>(q, L, shift, codes), shift += 4;
    if (bits & 2) codes = pack_field<2, std::uint32_t>(q, L, shift, codes), shift += 2;
    if (bits & 1) pack_field<1, std::uint16_t>(q, L, shift, codes);
}

template <class T>
void dequantise_any(const std::uint8_t *codes, const std::uint16_t *meta, int L, int bits, T *x) {
    const float lowest = widened(meta[0]), step = widened(meta[1]);
    const int n = ROWS * L;
    std::int32_t q[LARGEST_GROUP];
    std::memset(q, 0, static_cast<std::size_t>(n) * sizeof(q[0]));
    int shift = 0;
    if (bits & 8) codes = unpack_field<8, std::uint32_t>(codes, L, shift, q), shift += 8;
    if (bits & 4) codes = unpack_field<4, std::uint32_t>(codes, L, shift, q), shift += 4;
    if (bits & 2) codes = unpack_field<2, std::uint32_t>(codes, L, shift, q), shift += 2;
    if (bits & 1) unpack_field<1, std::uint16_t>(codes, L, shift, q);
    for (int i = 0; i < n; ++i) narrow(lowest + static_cast<float>(q[i]) * step, x + i);
}

template <class T>
float range_any(const T *x, std::int64_t n) {
    float low = widened(x[0]), high = low, odd = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = widened(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        odd += v * 0.0F;
    }
    return high - low + odd;
}

#if defined(__AVX512F__)
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
#endif

template <class T>
inline void quantise_one(const T *x, int L, int bits, std::uint64_t key, std::int64_t element, bool stochastic,
                         std::uint16_t *meta, std::uint8_t *codes) {
#if defined(__AVX512F__)
    if (L == 16) return quantise_256(x, bits, key, element, stochastic, meta, codes);
#endif
    quantise_any(x, L, bits, key, element, stochastic, meta, codes);
}

template <class T>
inline void dequantise_one(const std::uint8_t *codes, const std::uint16_t *meta, int L, int bits, T *x) {
#if defined(__AVX512F__)
    if (L == 16) return dequantise_256(codes, meta, bits, x);
#endif
    dequantise_any(codes, meta, L, bits, x);
}

template <class T>
inline float range_of(const T *x, std::int64_t n) {
    std::int64_t i = 0;
    float low = widened(x[0]), high = low, odd = 0;
#if defined(__AVX512F__)
    if (n >= 16) {
        Bounds all = {row_of(x), row_of(x), _mm512_setzero_ps()};
        for (; i + 16 <= n; i += 16) all.see(row_of(x + i));
        low = _mm512_reduce_min_ps(all.low);
        high = _mm512_reduce_max_ps(all.high);
        odd = _mm512_reduce_add_ps(all.odd);
    }
#endif
    if (i == n) return high - low + odd;
    for (; i < n; ++i) {
        const float v = widened(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        odd += v * 0.0F;
    }
    return high - low + odd;
}

// Calls body(group of the sample, sample, first value, number of values) for every group of a task.
template <class Body>
inline void each_group(const Groups &g, int threads, const Body &body) {
    const std::int64_t per = groups_per_sample(g), all = g.samples * per;
    parallel((all + TASK - 1) / TASK, threads, [&](std::int64_t task) {
        const std::int64_t end = (task + 1) * TASK < all ? (task + 1) * TASK : all;
        std::int64_t n = task * TASK / per, m = task * TASK % per;
        for (std::int64_t i = task * TASK; i < end; ++i) {
            const std::int64_t first = m * g.group, left = g.values - first;
            body(m, n, n * g.values + first, left < g.group ? left : g.group);
            if (++m == per) m = 0, ++n;
        }
    });
}

template <class T>
void quantise_all(const Groups &g, const T *x, std::uint8_t *codes, std::uint16_t *meta, std::uint64_t key,
                  bool stochastic, int threads) {
    const int L = static_cast<int>(g.group / ROWS);
    const std::int64_t per = groups_per_sample(g);
    each_group(g, threads, [&](std::int64_t m, std::int64_t n, std::int64_t first, std::int64_t count) {
        const int bits = g.bits[n];
        std::uint8_t *to = codes + (g.starts[n] * per + m * bits) * (g.group / 8);
        const std::int64_t at = n * per + m;
        if (count == g.group) {
            quantise_one(x + first, L, bits, key, at * g.group, stochastic, meta + 2 * at, to);
            return;
        }
        T filled[LARGEST_GROUP];
        std::memcpy(filled, x + first, static_cast<std::size_t>(count) * sizeof(T));
        for (std::int64_t i = count; i < g.group; ++i) filled[i] = filled[count - 1];
        quantise_one(filled, L, bits, key, at * g.group, stochastic, meta + 2 * at, to);
    });
}

template <class T>
void dequantise_all(const Groups &g, const std::uint8_t *codes, const std::uint16_t *meta, T *x, int threads) {
    const int L = static_cast<int>(g.group / ROWS);
    const std::int64_t per = groups_per_sample(g);
    each_group(g, threads, [&](std::int64_t m, std::int64_t n, std::int64_t first, std::int64_t count) {
        const int bits = g.bits[n];
        const std::uint8_t *from = codes + (g.starts[n] * per + m * bits) * (g.group / 8);
        const std::uint16_t *frame = meta + 2 * (n * per + m);
        if (count == g.group) {
            dequantise_one(from, frame, L, bits, x + first);
            return;
        }
        T filled[LARGEST_GROUP];
        dequantise_one(from, frame, L, bits, filled);
        std::memcpy(x + first, filled, static_cast<std::size_t>(count) * sizeof(T));
    });
}

template <class T>
void spread_all(const Groups &g, const T *x, float *spread, int threads) {
    parallel(g.samples, threads, [&](std::int64_t n) {
        double sum = 0;
        for (std::int64_t first = 0; first < g.values; first += g.group) {
            const std::int64_t left = g.values - first;
            const double range = range_of(x + n * g.values + first, left < g.group ? left : g.group);
            sum += range * range;
        }
        spread[n] = static_cast<float>(sum);
    });
}

}  // namespace

void group_quantize(const Groups &groups, const float *x, std::uint8_t *codes, std::uint16_t *meta, std::uint64_t key,
                    bool stochastic, int threads) {
    quantise_all(groups, x, codes, meta, key, stochastic, threads);
}

void group_quantize_bfloat16(const Groups &groups, const std::uint16_t *x, std::uint8_t *codes, std::uint16_t *meta,
                    std::uint64_t key, bool stochastic, int threads) {
    quantise_all(groups, x, codes, meta, key, stochastic, threads);
}

void group_dequantize(const Groups &groups, const std::uint8_t *codes, const std::uint16_t *meta, float *x,
                      int threads) {
    dequantise_all(groups, codes, meta, x, threads);
}

void group_dequantize_bfloat16(const Groups &groups, const std::uint8_t *codes, const std::uint16_t *meta, std::uint16_t *x,
                      int threads) {
    dequantise_all(groups, codes, meta, x, threads);
}

void group_spread(const Groups &groups, const float *x, float *spread, int threads) {
    spread_all(groups, x, spread, threads);
}

void group_spread_bfloat16(const Groups &groups, const std::uint16_t *x, float *spread, int threads) {
    spread_all(groups, x, spread, threads);
}

}  // namespace HASTEN_ISA
}  // namespace hasten
