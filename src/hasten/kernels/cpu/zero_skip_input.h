// grad_input of zero_skip: for each pixel of grad_output the list of its non-zero channels; a tile of the gradient stays
// in registers while the list's rows of the weight are added to it.
#pragma once

#include "parallel.h"
#include "zero_skip_scan.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

// How the weight is cut into slices that are gone through one by one: kernel row, group of taps, chunk of channels.
struct Slices {
    int taps, vectors;                 // of a tile at most
    std::int64_t groups, chunks;
    std::int64_t row, step;            // floats from one output channel to the next in a slice, and from tap to tap
    bool in_place;                     // slices are read where they lie in the weight, not from a copy
    std::int64_t channels;             // input channels rounded up to WIDTH
    std::int64_t block;                // output channels that are gone through together

    // may_lie: the weight is float32 and its channels come in whole vectors.
    Slices(const SkipShape &s, double dense, bool may_lie) {
        channels = up(s.c, WIDTH) * WIDTH;
        groups = up(s.kw, MAX_TAPS);
        taps = static_cast<int>(up(s.kw, groups));
        // Slices that stay in the first cache (40 KiB), or nearly (100), pay where a block still holds several non-zeros
        // (measured on a Sapphire Rapids; our choice).
        const bool small = dense >= 0.047;
        vectors = vectors_of(channels / WIDTH, taps, small ? MAX_VECTORS / 2 : MAX_VECTORS);
        chunks = up(channels / WIDTH, vectors);
        const std::int64_t slice = taps * vectors * WIDTH;
        // a copy of a slice, whose rows lie close together, pays where each row is read some 160 times (measured likewise)
        in_place = may_lie && dense * static_cast<double>(s.n * s.oh * s.ow) < 160;
        row = in_place ? s.kh * s.kw * s.c : slice;
        step = in_place ? s.c : vectors * WIDTH;
        block = small ? most(16, (dense >= 0.16 ? 40 : 100) * 256 / slice / 16 * 16) : s.o;
        block = least(block, s.o);
        block = up(up(s.o, up(s.o, block)), 16) * 16;
    }
    std::int64_t count(const SkipShape &s) const { return s.kh * groups * chunks; }
    std::int64_t begin(const SkipShape &s, std::int64_t slice) const {
        if (!in_place) return slice * s.o * row;
        const std::int64_t ky = slice / (groups * chunks), group = slice / chunks % groups;
        return (ky * s.kw + group * taps) * s.c + slice % chunks * vectors * WIDTH;
    }
};

template <class T>
void pack_slice(const T *w, float *packed, const SkipShape &s, const Slices &k, std::int64_t slice) {
    const std::int64_t ky = slice / (k.groups * k.chunks), group = slice / k.chunks % k.groups, c0 = slice % k.chunks * k.vectors * WIDTH;
    const std::int64_t width = least(k.vectors * WIDTH, s.c - c0), padded = k.vectors * WIDTH;
    float *to = packed + slice * s.o * k.row;
    for (std::int64_t o = 0; o < s.o; ++o)
        for (std::int64_t tap = 0; tap < k.taps; ++tap, to += padded) {
            const std::int64_t kx = group * k.taps + tap;
            if (kx >= s.kw) continue;  // never read
            widen(w + ((o * s.kh + ky) * s.kw + kx) * s.c + c0, to, width);
        }
}

// The non-zero channels of each pixel, by blocks of channels: entries starts[p * blocks + b] .. starts[p * blocks + b + 1].
template <class T>
void list_pixels(const T *g, std::int64_t pixels, const SkipShape &s, const Slices &k, Entry *entries, std::int32_t *starts) {
    std::int64_t at = 0;
    for (std::int64_t p = 0; p < pixels; ++p)
        for (std::int64_t first = 0; first < s.o; first += k.block) {
            *starts++ = static_cast<std::int32_t>(at);
            const std::int64_t end = least(s.o, first + k.block);
            for (std::int64_t o = first; o < end; o += 16) {
                const T *from = g + p * s.o + o;
                const int n = static_cast<int>(least(16, end - o));
#if defined(__AVX512F__)
                const __m512 v = load_16(from, static_cast<__mmask16>((1U << n) - 1));
                const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
                if (mask == 0) continue;
                const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
                const __m512i rows = _mm512_mullo_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(static_cast<int>(o))),
                                                        _mm512_set1_epi32(static_cast<int>(k.row)));
                const __m512i values = _mm512_castps_si512(v);
                const __m512i low = _mm512_or_si512(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(rows)),
                    _mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(values)), 32));
                const __m512i high = _mm512_or_si512(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(rows, 1)),
                    _mm512_slli_epi64(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(values, 1)), 32));
                // whole registers are stored: the list has room for 16 more
                _mm512_storeu_si512(entries + at, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask), low));
                at += __builtin_popcount(mask & 0xffU);
                _mm512_storeu_si512(entries + at, _mm512_maskz_compress_epi64(static_cast<__mmask8>(mask >> 8), high));
                at += __builtin_popcount(mask >> 8);
#else
                float values[16];
                for (std::uint32_t mask = non_zeros(from, n, values); mask != 0; mask &= mask - 1) {
                    const int i = __builtin_ctz(mask);
                    entries[at++] = {static_cast<std::int32_t>((o + i) * k.row), values[i]};
                }
#endif
            }
        }
    *starts = static_cast<std::int32_t>(at);
}

// Adds one slice's part, for one block of output channels, to `images` gradients of `pitch` channels.
void add_slice(const Entry *entries, const std::int32_t *starts, std::int64_t blocks, const float *packed, float *gi,
               std::int64_t pitch, std::int64_t images, const SkipShape &s, const Slices &k, std::int64_t slice,
               const std::int32_t *first_tap, const std::int32_t *tap_count) {
    const std::int64_t ky = slice / (k.groups * k.chunks), group = slice / k.chunks % k.groups, c0 = slice % k.chunks * k.vectors * WIDTH;
    const int vectors = static_cast<int>(least(k.vectors, (k.channels - c0) / WIDTH));
    Tile tiles[MAX_TAPS + 1] = {nullptr};
    for (int r = 1; r <= k.taps; ++r) tiles[r] = tile_of(r, vectors);
    const float *rows = packed + k.begin(s, slice);
    for (std::int64_t image = 0; image < images; ++image)
        for (std::int64_t y = 0; y < s.oh; ++y) {
            const std::int64_t iy = y * s.sh - s.ph + ky * s.dh;
            if (iy < 0 || iy >= s.h) continue;
            const std::int32_t *range = starts + (image * s.oh + y) * s.ow * blocks;
            float *line = gi + (image * s.h + iy) * s.w * pitch + c0;
            for (std::int64_t x = 0; x < s.ow; ++x, range += blocks) {
                const std::int64_t n = range[1] - range[0], taps = tap_count[x];
                if (n == 0 || taps == 0) continue;
                const std::int64_t tap = first_tap[x], ix = x * s.sw - s.pw + (group * k.taps + tap) * s.dw;
                tiles[taps](entries + range[0], n, rows + tap * k.step, k.step, line + ix * pitch, s.dw * pitch);
            }
        }
}

template <class T>
void grad_input(const T *g, const T *w, T *gi, const SkipShape &s, int threads) {
    const std::int64_t pixels = s.oh * s.ow;
    const double dense = density(g, s.n * pixels * s.o);
    const bool whole = sizeof(T) == sizeof(float) && s.c % WIDTH == 0;
    const Slices k(s, dense, whole);
    const std::int64_t slices = k.count(s), blocks = up(s.o, k.block);
    const Scratch<float> copy(k.in_place ? 0 : slices * s.o * k.row);
    if (!k.in_place) parallel(slices, threads, [&](std::int64_t slice) { pack_slice(w, copy.get(), s, k, slice); });
    const float *packed = k.in_place ? reinterpret_cast<const float *>(w) : copy.get();

    // of each group of taps and each x: the first tap inside the image, and how many
    const Scratch<std::int32_t> first(k.groups * s.ow), count(k.groups * s.ow);
    for (std::int64_t group = 0; group < k.groups; ++group)
        for (std::int64_t x = 0; x < s.ow; ++x) {
            std::int64_t a, b;
            const std::int64_t tap = group * k.taps;
            taps_inside(x * s.sw - s.pw + tap * s.dw, s.dw, s.w, least(k.taps, s.kw - tap), a, b);
            first[group * s.ow + x] = static_cast<std::int32_t>(a);
            count[group * s.ow + x] = static_cast<std::int32_t>(b - a);
        }

    // the larger the weight, the more pixels must share one pass over it
    const bool big = s.o * s.kh * s.kw * k.channels > (1 << 18);
    const std::int64_t images = most(1, (big ? 256 : 64) / pixels);
    parallel(up(s.n, images), threads, [&](std::int64_t task) {
        const std::int64_t begin = task * images, here = least(images, s.n - begin), size = s.h * s.w;
        const Scratch<Entry> entries(here * pixels * s.o + 16);
        const Scratch<std::int32_t> starts(here * pixels * blocks + 1);
        list_pixels(g + begin * pixels * s.o, here * pixels, s, k, entries.get(), starts.get());
        const Scratch<float> own(whole ? 0 : here * size * k.channels);
        float *to = whole ? reinterpret_cast<float *>(gi + begin * size * s.c) : own.get();
        std::memset(to, 0, static_cast<std::size_t>(here * size * k.channels) * sizeof(float));
        for (std::int64_t block = 0; block < blocks; ++block)
            for (std::int64_t slice = 0; slice < slices; ++slice) {
                const std::int64_t group = slice / k.chunks % k.groups;
                add_slice(entries.get(), starts.get() + block, blocks, packed, to, k.channels, here, s, k, slice,
                          first.get() + group * s.ow, count.get() + group * s.ow);
            }
        if (whole) return;
        T *out = gi + begin * size * s.c;
        for (std::int64_t p = 0; p < here * size; ++p)
            for (std::int64_t c = 0; c < s.c; ++c) {
                if constexpr (sizeof(T) == sizeof(float)) out[p * s.c + c] = to[p * k.channels + c];
                else out[p * s.c + c] = narrow(to[p * k.channels + c]);
            }
    });
}

}  // namespace

}  // namespace HASTEN_ISA
}  // namespace hasten
