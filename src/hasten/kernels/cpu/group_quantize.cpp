#include "group_quantize.h"

#include "group_quantize_256.h"
#include "group_quantize_any.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

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

// Values first .. first + count of a sample as `by` says.
template <class T>
inline void normalise(const Normal &by, const T *x, std::int64_t first, std::int64_t count, float *to) {
    std::int64_t c = first / by.inner % by.channels, i = 0;
    if (by.inner == 1) {
        for (; i < count; c = 0) {
            const std::int64_t n = count - i < by.channels - c ? count - i : by.channels - c;
            for (std::int64_t k = 0; k < n; ++k)
                to[i + k] = __builtin_fmaf(widened(x[i + k]), by.scale[c + k], by.shift[c + k]);
            i += n;
        }
        return;
    }
    for (std::int64_t left = by.inner - first % by.inner; i < count; left = by.inner, c = c + 1 < by.channels ? c + 1 : 0) {
        const std::int64_t n = count - i < left ? count - i : left;
        const float scale = by.scale[c], shift = by.shift[c];
        for (std::int64_t k = 0; k < n; ++k) to[i + k] = __builtin_fmaf(widened(x[i + k]), scale, shift);
        i += n;
    }
}

template <class T>
void quantise_all(const Groups &g, const T *x, const Normal *normal, std::uint8_t *codes, std::uint16_t *meta,
                  std::uint64_t key, bool stochastic, int threads) {
    const int L = static_cast<int>(g.group / ROWS);
    const std::int64_t per = groups_per_sample(g);
    each_group(g, threads, [&](std::int64_t m, std::int64_t n, std::int64_t first, std::int64_t count) {
        const int bits = g.bits[n];
        std::uint8_t *to = codes + (g.starts[n] * per + m * bits) * (g.group / 8);
        const std::int64_t at = n * per + m;
        const auto pack = [&](const auto *group) {
            quantise_one(group, L, bits, key, at * g.group, stochastic, meta + 2 * at, to);
        };
        const auto fill_and_pack = [&](auto *filled) {
            for (std::int64_t i = count; i < g.group; ++i) filled[i] = filled[count - 1];
            pack(filled);
        };
        if (normal != nullptr) {
            float filled[LARGEST_GROUP];
            normalise(*normal, x + first, m * g.group, count, filled);
            fill_and_pack(filled);
        } else if (count == g.group) {
            pack(x + first);
        } else {
            T filled[LARGEST_GROUP];
            std::memcpy(filled, x + first, static_cast<std::size_t>(count) * sizeof(T));
            fill_and_pack(filled);
        }
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

void group_quantize(const Groups &groups, const float *x, const Normal *normal, std::uint8_t *codes, std::uint16_t *meta,
                    std::uint64_t key, bool stochastic, int threads) {
    quantise_all(groups, x, normal, codes, meta, key, stochastic, threads);
}

void group_quantize_bfloat16(const Groups &groups, const std::uint16_t *x, const Normal *normal, std::uint8_t *codes,
                    std::uint16_t *meta, std::uint64_t key, bool stochastic, int threads) {
    quantise_all(groups, x, normal, codes, meta, key, stochastic, threads);
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
