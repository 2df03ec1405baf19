#include "fixed_conv.h"

#include <cstdlib>
#include <cstring>

#include "parallel.h"
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr std::int64_t LANES = FIXED_LANES;
constexpr int PIXELS = 12;                  // pixels of a tile: 12 x 32 sums fill 24 of the 32 registers
constexpr std::int64_t RANGE = 32 * PIXELS;  // pixels of a task
constexpr std::int64_t PANEL = 2048;        // pairs of channels of w taken at once: 256 KB, half of a small L2 (our choice)
constexpr std::int64_t LONGEST = 128;        // pairs of a segment at most
constexpr std::int64_t MOST = 2147483647;

// A run of pairs of one tap. `flush`: the 32-bit sums are widened after it.
struct Segment {
    std::int64_t x_at;  // first element of x, from the pixel's
    std::int64_t w_at;  // first pair of w, from the block's
    std::int32_t pairs;
    bool flush;
};

inline std::int64_t segments_of(const FixedConv &s, std::int64_t length) {
    return s.tap_rows * s.tap_columns * ((s.channels / 2 + length - 1) / length);
}

// Sum of |w| of each lane over pairs [from, from + pairs) of a block; at most LONGEST pairs, so that it fits.
void magnitudes(const std::int16_t *block, std::int64_t from, std::int64_t pairs, std::int32_t *sums) {
    const std::int16_t *w = block + from * 2 * LANES;
#if defined(__AVX512F__)
    const __m512i one = _mm512_set1_epi16(1), minus = _mm512_set1_epi16(-1);
    __m512i low = _mm512_setzero_si512(), high = low;
    for (std::int64_t p = 0; p < pairs; ++p, w += 2 * LANES) {
        const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + LANES);
        low = _mm512_dpwssd_epi32(low, a, _mm512_mask_blend_epi16(_mm512_movepi16_mask(a), one, minus));
        high = _mm512_dpwssd_epi32(high, b, _mm512_mask_blend_epi16(_mm512_movepi16_mask(b), one, minus));
    }
    _mm512_storeu_si512(sums, low);
    _mm512_storeu_si512(sums + 16, high);
#else
    for (std::int64_t k = 0; k < LANES; ++k) sums[k] = 0;
    for (std::int64_t p = 0; p < pairs; ++p, w += 2 * LANES) {
        for (std::int64_t k = 0; k < LANES; ++k) {
            const std::int32_t a = w[2 * k], b = w[2 * k + 1];
            sums[k] += (a < 0 ? -a : a) + (b < 0 ? -b : b);
        }
    }
#endif
}

// Cuts the sum of a block into segments of at most `length` pairs, widened wherever |x| * sum |w| could pass 2^31 - 1.
// Returns false if one segment alone could.
bool cut(const FixedConv &s, const std::int16_t *block, std::int64_t largest, std::int64_t length, Segment *out) {
    std::int64_t running[LANES] = {}, n = 0, pair = 0;
    std::int32_t sums[LANES];
    for (std::int64_t i = 0; i < s.tap_rows; ++i) {
        for (std::int64_t j = 0; j < s.tap_columns; ++j) {
            const std::int64_t tap = (i * s.dilation_rows * s.width + j * s.dilation_columns) * s.channels;
            for (std::int64_t c = 0; c < s.channels / 2; c += length) {
                const std::int64_t pairs = s.channels / 2 - c < length ? s.channels / 2 - c : length;
                magnitudes(block, pair, pairs, sums);
                bool fits = true, alone = true;
                for (std::int64_t k = 0; k < LANES; ++k) {
                    fits = fits && (running[k] + sums[k]) * largest <= MOST;
                    alone = alone && sums[k] * largest <= MOST;
                }
                if (!alone) return false;
                if (!fits) out[n - 1].flush = true;
                for (std::int64_t k = 0; k < LANES; ++k) running[k] = fits ? running[k] + sums[k] : sums[k];
                out[n++] = {tap + 2 * c, pair, static_cast<std::int32_t>(pairs), false};
                pair += pairs;
            }
        }
    }
    out[n - 1].flush = true;
    return true;
}

#if defined(__AVX512F__)
// The two numbers at x in every lane.
inline __m512i two_of(const std::int16_t *x) {
    std::int32_t two;
    std::memcpy(&two, x, 4);
    return _mm512_set1_epi32(two);
}

struct Tile {
    __m512i sum[PIXELS][2];

    void clear() {
        for (int i = 0; i < PIXELS; ++i) sum[i][0] = sum[i][1] = _mm512_setzero_si512();
    }

    void add(const std::int16_t *const *x, std::int64_t x_at, const std::int16_t *w, std::int32_t pairs) {
        __m512i left[PIXELS], right[PIXELS];  // in registers: the compiler leaves a member in memory
        const std::int16_t *from[PIXELS];
#pragma GCC unroll 12
        for (int i = 0; i < PIXELS; ++i) {
            left[i] = sum[i][0];
            right[i] = sum[i][1];
            from[i] = x[i] + x_at;
        }
        std::int32_t k = 0;
        for (; k + 2 <= pairs; k += 2, w += 4 * LANES) {
            const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + LANES);
            const __m512i c = _mm512_loadu_si512(w + 2 * LANES), d = _mm512_loadu_si512(w + 3 * LANES);
#pragma GCC unroll 12
            for (int i = 0; i < PIXELS; ++i) {
                const __m512i first = two_of(from[i] + 2 * k), second = two_of(from[i] + 2 * k + 2);
                left[i] = _mm512_dpwssd_epi32(left[i], first, a);
                right[i] = _mm512_dpwssd_epi32(right[i], first, b);
                left[i] = _mm512_dpwssd_epi32(left[i], second, c);
                right[i] = _mm512_dpwssd_epi32(right[i], second, d);
            }
        }
        for (; k < pairs; ++k, w += 2 * LANES) {
            const __m512i a = _mm512_loadu_si512(w), b = _mm512_loadu_si512(w + LANES);
#pragma GCC unroll 12
            for (int i = 0; i < PIXELS; ++i) {
                const __m512i two = two_of(from[i] + 2 * k);
                left[i] = _mm512_dpwssd_epi32(left[i], two, a);
                right[i] = _mm512_dpwssd_epi32(right[i], two, b);
            }
        }
#pragma GCC unroll 12
        for (int i = 0; i < PIXELS; ++i) {
            sum[i][0] = left[i];
            sum[i][1] = right[i];
        }
    }

    // Adds the sums to doubles, which hold them exactly, and clears them.
    void widen(double *wide) {
        for (int i = 0; i < PIXELS; ++i) {
            for (int half = 0; half < 2; ++half) {
                double *at = wide + i * LANES + half * 16;
                const __m512d low = _mm512_cvtepi32_pd(_mm512_castsi512_si256(sum[i][half]));
                const __m512d high = _mm512_cvtepi32_pd(_mm512_extracti64x4_epi64(sum[i][half], 1));
                _mm512_storeu_pd(at, _mm512_add_pd(_mm512_loadu_pd(at), low));
                _mm512_storeu_pd(at + 8, _mm512_add_pd(_mm512_loadu_pd(at + 8), high));
            }
        }
        clear();
    }
};
#else
struct Tile {
    std::int32_t sum[PIXELS][LANES];

    void clear() { std::memset(sum, 0, sizeof sum); }

    void add(const std::int16_t *const *x, std::int64_t x_at, const std::int16_t *w, std::int32_t pairs) {
        for (int i = 0; i < PIXELS; ++i) {
            const std::int16_t *from = x[i] + x_at;
            for (std::int32_t k = 0; k < pairs; ++k) {
                const std::int32_t a = from[2 * k], b = from[2 * k + 1];
                const std::int16_t *row = w + 2 * LANES * k;
                for (std::int64_t o = 0; o < LANES; ++o) sum[i][o] += a * row[2 * o] + b * row[2 * o + 1];
            }
        }
    }

    void widen(double *wide) {
        for (int i = 0; i < PIXELS; ++i) {
            for (std::int64_t o = 0; o < LANES; ++o) wide[i * LANES + o] += sum[i][o];
        }
        clear();
    }
};
#endif

// The first element of x that pixel p (counted through images, rows, columns) meets.
inline std::int64_t pixel(const FixedConv &s, std::int64_t p) {
    const std::int64_t column = p % s.out_width, row = p / s.out_width % s.out_height, image = p / (s.out_width * s.out_height);
    return ((image * s.height + row * s.stride_rows) * s.width + column * s.stride_columns) * s.channels;
}

// Pixels [begin, end) of one block of outputs; wide: RANGE * LANES doubles.
void run_range(const FixedConv &s, const std::int16_t *x, const std::int16_t *w, const Segment *list, std::int64_t n,
               std::int64_t begin, std::int64_t end, std::int64_t first_output, float *y, float scale, double *wide) {
    std::memset(wide, 0, sizeof(double) * RANGE * LANES);
    const std::int64_t outputs = s.outputs - first_output < LANES ? s.outputs - first_output : LANES;
    for (std::int64_t from = 0, to; from < n; from = to) {
        // segments whose part of w stays in the cache while all pixels of the range pass
        for (to = from + 1; to < n && list[to].w_at + list[to].pairs - list[from].w_at <= PANEL; ++to) {
        }
        for (std::int64_t p = begin; p < end; p += PIXELS) {
            const std::int16_t *at[PIXELS];
            for (int i = 0; i < PIXELS; ++i) at[i] = x + pixel(s, p + i < end ? p + i : end - 1);
            Tile tile;
            tile.clear();
            double *mine = wide + (p - begin) * LANES;
            for (std::int64_t g = from; g < to; ++g) {
                tile.add(at, list[g].x_at, w + list[g].w_at * 2 * LANES, list[g].pairs);
                if (list[g].flush || g + 1 == to) tile.widen(mine);
            }
            if (to < n) continue;
            for (std::int64_t i = 0; i < PIXELS && p + i < end; ++i) {
                float *row = y + (p + i) * s.outputs + first_output;
                for (std::int64_t o = 0; o < outputs; ++o) row[o] = static_cast<float>(mine[i * LANES + o]) * scale;
            }
        }
    }
}

// On the grid v is whole; anything else is cut, and what is not a number becomes 0.
inline std::int16_t narrow(float v) {
    v = v == v ? v : 0.0F;
    v = v < -32768.0F ? -32768.0F : v;
    v = v > 32767.0F ? 32767.0F : v;
    return static_cast<std::int16_t>(static_cast<std::int32_t>(v));
}

inline std::int32_t magnitude(std::int16_t v) { return v < 0 ? -static_cast<std::int32_t>(v) : v; }

// n numbers that lie side by side, converted; returns their largest magnitude.
inline std::int32_t convert(const float *x, std::int16_t *y, std::int64_t n, float scale) {
    std::int32_t largest = 0;
    for (std::int64_t k = 0; k < n; ++k) {
        y[k] = narrow(x[k] * scale);
        const std::int32_t size = magnitude(y[k]);
        largest = size > largest ? size : largest;
    }
    return largest;
}

constexpr std::int64_t SIDE = 16;  // of the squares in which a tensor is turned round

// to[q * step + r] = from[r * stride + q]: q and r run to `across` and `down`.
inline std::int32_t turn(const float *from, std::int64_t stride, std::int64_t down, std::int64_t across, std::int16_t *to,
                         std::int64_t step, float scale) {
    std::int16_t square[SIDE][SIDE];
    std::int32_t largest = 0;
    for (std::int64_t r = 0; r < down; r += SIDE) {
        const std::int64_t rows = down - r < SIDE ? down - r : SIDE;
        for (std::int64_t q = 0; q < across; q += SIDE) {
            const std::int64_t columns = across - q < SIDE ? across - q : SIDE;
            for (std::int64_t i = 0; i < rows; ++i) {
                const float *line = from + (r + i) * stride + q;
                const std::int32_t mine = columns == SIDE ? convert(line, square[i], SIDE, scale) : convert(line, square[i], columns, scale);
                largest = mine > largest ? mine : largest;
            }
            for (std::int64_t j = 0; j < columns; ++j) {
                std::int16_t *row = to + (q + j) * step + r;
                if (rows == SIDE) {
                    for (std::int64_t i = 0; i < SIDE; ++i) row[i] = square[i][j];
                } else {
                    for (std::int64_t i = 0; i < rows; ++i) row[i] = square[i][j];
                }
            }
        }
    }
    return largest;
}

}  // namespace

std::int32_t fixed_pack_x(const Source &src, std::int64_t images, std::int64_t channels, std::int64_t rows, std::int64_t columns,
                          std::int16_t *dst, std::int64_t height, std::int64_t width, std::int64_t padded, std::int64_t top,
                          std::int64_t left, std::int64_t spread_rows, std::int64_t spread_columns, float scale, int threads) {
    std::int32_t largest = 0;
    const std::int64_t size = height * width * padded, step = spread_columns * padded;
    const std::int64_t group = src.sa == 1 && src.sb != 1 ? SIDE : 1;  // images that lie side by side are taken together
    parallel((images + group - 1) / group, threads, [&](std::int64_t task) {
        const std::int64_t a = task * group, many = images - a < group ? images - a : group;
        std::int16_t *image = dst + a * size;
        std::memset(image, 0, static_cast<std::size_t>(many * size) * 2);
        std::int32_t mine = 0;
        for (std::int64_t i = 0; i < rows; ++i) {
            std::int16_t *line = image + ((i * spread_rows + top) * width + left) * padded;
            const float *from = src.start + a * src.sa + i * src.si;
            if (src.sb != 1 && group == 1 && src.sj == 1) {
                const std::int32_t found = turn(from, src.sb, channels, columns, line, step, scale);
                mine = found > mine ? found : mine;
                continue;
            }
            for (std::int64_t j = 0; j < columns; ++j) {
                const float *at = from + j * src.sj;
                std::int16_t *to = line + j * step;
                std::int32_t found = 0;
                if (src.sb == 1) {
                    found = convert(at, to, channels, scale);
                } else if (group > 1) {
                    found = turn(at, src.sb, channels, many, to, size, scale);
                } else {
                    for (std::int64_t b = 0; b < channels; ++b) {
                        to[b] = narrow(at[b * src.sb] * scale);
                        found = magnitude(to[b]) > found ? magnitude(to[b]) : found;
                    }
                }
                mine = found > mine ? found : mine;
            }
        }
        std::int32_t seen = __atomic_load_n(&largest, __ATOMIC_RELAXED);
        while (mine > seen && !__atomic_compare_exchange_n(&largest, &seen, mine, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
        }
    });
    return largest;
}

void fixed_pack_w(const Source &src, const FixedConv &s, std::int64_t real, std::int16_t *dst, float scale, int threads) {
    const std::int64_t pairs = s.channels / 2, blocks = (s.outputs + LANES - 1) / LANES;
    parallel(blocks * s.tap_rows, threads, [&](std::int64_t task) {
        const std::int64_t block = task / s.tap_rows, i = task % s.tap_rows, first = block * LANES;
        const std::int64_t lanes = s.outputs - first < LANES ? s.outputs - first : LANES;
        for (std::int64_t j = 0; j < s.tap_columns; ++j) {
            std::int16_t *to = dst + ((block * s.tap_rows + i) * s.tap_columns + j) * s.channels * LANES;
            const float *tap = src.start + first * src.sa + i * src.si + j * src.sj;
            for (std::int64_t p = 0; p < pairs; ++p, to += 2 * LANES) {
                const float *a = tap + 2 * p * src.sb, *b = a + src.sb;
                if (src.sa == 1 && lanes == LANES && 2 * p + 1 < real) {
                    for (std::int64_t k = 0; k < LANES; ++k) {
                        to[2 * k] = narrow(a[k] * scale);
                        to[2 * k + 1] = narrow(b[k] * scale);
                    }
                    continue;
                }
                for (std::int64_t k = 0; k < LANES; ++k) {
                    to[2 * k] = k < lanes ? narrow(a[k * src.sa] * scale) : std::int16_t{0};
                    to[2 * k + 1] = k < lanes && 2 * p + 1 < real ? narrow(b[k * src.sa] * scale) : std::int16_t{0};
                }
            }
        }
    });
}

bool fixed_conv(const FixedConv &s, const std::int16_t *x, const std::int16_t *w, std::int32_t largest, float *y, float scale,
                int threads) {
    const std::int64_t blocks = (s.outputs + LANES - 1) / LANES, panel = s.tap_rows * s.tap_columns * s.channels * LANES;
    const std::int64_t pixels = s.images * s.out_height * s.out_width, ranges = (pixels + RANGE - 1) / RANGE;
    std::int64_t length = s.channels / 2 < LONGEST ? s.channels / 2 : LONGEST;
    Segment *lists = nullptr;
    std::int64_t n = 0;
    for (bool proved = false; !proved; length /= 2) {
        if (length == 0) return false;
        n = segments_of(s, length);
        std::free(lists);
        lists = static_cast<Segment *>(std::malloc(sizeof(Segment) * static_cast<std::size_t>(n * blocks)));
        if (lists == nullptr) return false;
        bool failed = false;
        parallel(blocks, threads, [&](std::int64_t b) {
            if (!cut(s, w + b * panel, largest, length, lists + b * n)) __atomic_store_n(&failed, true, __ATOMIC_RELAXED);
        });
        proved = !failed;
        if (failed && length == 1) {
            std::free(lists);
            return false;
        }
    }
    bool enough = true;
    parallel(blocks * ranges, threads, [&](std::int64_t task) {
        const std::int64_t b = task / ranges, begin = task % ranges * RANGE, end = begin + RANGE < pixels ? begin + RANGE : pixels;
        double *wide = static_cast<double *>(std::malloc(sizeof(double) * RANGE * LANES));
        if (wide == nullptr) {
            __atomic_store_n(&enough, false, __ATOMIC_RELAXED);
            return;
        }
        run_range(s, x, w + b * panel, lists + b * n, n, begin, end, b * LANES, y, scale, wide);
        std::free(wide);
    });
    std::free(lists);
    return enough;
}

}  // namespace HASTEN_ISA
}  // namespace hasten
