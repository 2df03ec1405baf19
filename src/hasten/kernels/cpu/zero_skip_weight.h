// grad_weight of zero_skip: for each output channel the list of its non-zero pixels; a tile of its filter's gradient
// stays in registers while the list's patches of x are added to it.
#pragma once

#include "parallel.h"
#include "zero_skip_scan.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

// Neighbouring columns x of grad_output whose patches meet the same kernel columns.
struct Columns {
    std::int64_t begin, end, first, taps;
};

// What is computed: the convolution itself, or, where the channels are few, the one in which the kw * c numbers of a
// patch's row count as the channels of a single tap, and kernel rows are gone through together ("merged"). x is copied
// block by block, as float32, so that the channels of a tile lie together (reading it in place took up to twice as long),
// and padded to the left and right where that wastes little; merged, it is padded above and below too. It is read in place
// where each number is used only a few times.
struct View {
    std::int64_t c, kw, w, sw, pw, dw;  // as in SkipShape, of the view
    std::int64_t channels;              // c rounded up to WIDTH
    std::int64_t pitch;                 // floats from one pixel to the next
    bool merged, in_place;
    int taps, vectors;                  // of a tile at most
    std::int64_t chunks;
};

// in_place: read x where it lies if its channels come in whole vectors.
inline View view_of(const SkipShape &s, bool in_place) {
    View v{s.c, s.kw, s.w, s.sw, s.pw, s.dw, up(s.c, WIDTH) * WIDTH, 0, false, false, 0, 0, 0};
    std::int64_t inside = 0;
    for (std::int64_t x = 0; x < s.ow; ++x) {
        std::int64_t first, end;
        taps_inside(x * s.sw - s.pw, s.dw, s.w, s.kw, first, end);
        inside += end - first;
    }
    v.merged = s.c % WIDTH != 0 && s.dw == 1;
    v.in_place = in_place && s.c % WIDTH == 0;
    const bool padded = !v.in_place && s.pw > 0 && (v.merged || s.ow * s.kw * 8 <= inside * 9);
    if (padded) {
        v.pw = 0;
        v.w = s.w + 2 * s.pw;
    }
    if (v.merged) {
        v.c = s.kw * s.c;
        v.channels = up(v.c, WIDTH) * WIDTH;
        v.kw = 1;
    }
    v.taps = static_cast<int>(up(v.kw, up(v.kw, MAX_TAPS)));
    v.vectors = vectors_of(v.channels / WIDTH, v.taps, MAX_VECTORS);
    v.chunks = up(v.channels / WIDTH, v.vectors);
    v.pitch = v.merged || v.in_place ? s.c : v.vectors * WIDTH;
    return v;
}

// Rows of images as the tiles read them.
struct Source {
    const float *base;               // row 0 of the first image, whether or not it is there
    std::int64_t line, image, chunk;  // floats from row to row, image to image, and chunk to chunk
};

// Rows of images where they lie.
inline Source lying(const float *x, const SkipShape &s, const View &v) {
    return {x, s.w * s.c, s.h * s.w * s.c, v.vectors * WIDTH};
}

// Copies rows [top, bottom) of images.
template <class T>
Source source_of(const T *x, float *copy, std::int64_t images, std::int64_t top, std::int64_t bottom, const SkipShape &s, const View &v) {
    const std::int64_t rows = bottom - top, line = v.w * v.pitch, chunk = images * rows * line, side = (v.w - s.w) / 2;
    const std::int64_t width = v.merged ? s.c : v.pitch;
    for (std::int64_t image = 0; image < images; ++image)
        for (std::int64_t y = top; y < bottom; ++y)
            for (std::int64_t part = 0; part < (v.merged ? 1 : v.chunks); ++part) {
                const T *from = x + (image * s.h + y) * s.w * s.c + part * width;
                float *to = copy + part * chunk + (image * rows + y - top) * line;
                for (std::int64_t i = 0; i < side * v.pitch; ++i) to[i] = to[line - 1 - i] = 0.0f;
                to += side * v.pitch;
                if (y < 0 || y >= s.h)
                    for (std::int64_t i = 0; i < s.w * v.pitch; ++i) to[i] = 0.0f;
                else if (v.merged || v.pitch == s.c)
                    for (std::int64_t i = 0; i < s.w * s.c; ++i) to[i] = read(from + i);
                else
                    for (std::int64_t i = 0; i < s.w; ++i) widen(from + i * s.c, to + i * v.pitch, least(width, s.c - part * width));
            }
    return {copy - top * line, line, rows * line, v.merged ? v.vectors * WIDTH : chunk};
}

// Puts the non-zeros of 16 channels at one position behind `flat`: 16 at + channel, and the values.
template <class T>
inline std::int64_t collect(const T *from, int n, std::int32_t at, std::int32_t *flat, float *values) {
    const std::int32_t code = at * 16;
#if defined(__AVX512F__)
    const __m512 v = load_16(from, static_cast<__mmask16>((1U << n) - 1));
    const __mmask16 mask = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NEQ_UQ);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, v));
    _mm512_storeu_si512(flat, _mm512_add_epi32(_mm512_maskz_compress_epi32(mask, lane), _mm512_set1_epi32(code)));
    return __builtin_popcount(mask);
#else
    std::int64_t found = 0;
    for (int i = 0; i < n; ++i) {
        const float value = read(from + i);
        flat[found] = code + i;
        values[found] = value;
        found += value != 0.0f;
    }
    return found;
#endif
}

// The lists of 16 output channels from `o`: positions in the order (class of columns, row, column, image). Entry j of
// channel i is entries[i * room + j]; starts[(cls * (rows + 1) + row) * 16 + i] is where channel i begins there. `flat` and
// `values` have room for one row of all images, and 16 more.
template <class T>
void list_channels(const T *g, std::int64_t o, std::int64_t images, std::int64_t y0, std::int64_t y1, const SkipShape &s, const View &v,
                   const Source &source, const Columns *classes, std::int64_t n_classes, Entry *entries, std::int64_t room,
                   std::int32_t *starts, std::int32_t *flat, float *values) {
    const int n = static_cast<int>(least(16, s.o - o));
    const std::int64_t image_step = s.oh * s.ow * s.o, ahead = images > 1 ? 6 * image_step : 12 * s.o;
    const T *last = g + (images * image_step - 1);
    Entry *next[16];
    for (int i = 0; i < 16; ++i) next[i] = entries + i * room;
    for (std::int64_t cls = 0; cls < n_classes; ++cls)
        for (std::int64_t y = y0; y <= y1; ++y) {
            for (int i = 0; i < 16; ++i) *starts++ = static_cast<std::int32_t>(next[i] - entries - i * room);
            if (y == y1) continue;
            std::int64_t found = 0;
            for (std::int64_t x = classes[cls].begin; x < classes[cls].end; ++x) {
                const T *from = g + (y * s.ow + x) * s.o + o;
                std::int64_t at = (y * s.sh - s.ph) * source.line + (x * v.sw - v.pw) * v.pitch;
                for (std::int64_t image = 0; image < images; ++image, from += image_step, at += source.image) {
                    __builtin_prefetch(from + ahead < last ? from + ahead : last);
                    found += collect(from, n, static_cast<std::int32_t>(at), flat + found, values + found);
                }
            }
            for (std::int64_t i = 0; i < found; ++i) *next[flat[i] & 15]++ = {flat[i] >> 4, values[i]};
        }
}

template <class T>
struct WeightJob {
    const T *g, *x;
    SkipShape s;
    View v;
    const Columns *classes;
    std::int64_t n_classes, images, rows;  // images and rows of grad_output in a block

    // Adds images [begin, end) and output channels [o0, o1) to rows of kh * v.kw * v.channels in `out`, which is cleared.
    void run(std::int64_t begin, std::int64_t end, std::int64_t o0, std::int64_t o1, float *out) const {
        const std::int64_t filter = s.kh * v.kw * v.channels, reach = (s.kh - 1) * s.dh;
        const std::int64_t room = images * rows * s.ow, tail = v.channels;  // a tile of few channels reads beyond the end
        const std::int64_t most_rows = (rows - 1) * s.sh + reach + 1;
        const std::int64_t copied = images * (v.merged ? most_rows : least(s.h, most_rows)) * v.w * v.pitch * (v.merged ? 1 : v.chunks);
        const Scratch<float> copy(v.in_place ? 0 : copied + tail);
        const Scratch<Entry> entries(16 * room);
        const Scratch<std::int32_t> starts(n_classes * (rows + 1) * 16), flat(images * s.ow * 16 + 16);
        const Scratch<float> values(images * s.ow * 16 + 16);
        std::memset(out + o0 * filter, 0, static_cast<std::size_t>((o1 - o0) * filter) * sizeof(float));
        for (std::int64_t image = begin; image < end; image += images)
            for (std::int64_t y0 = 0; y0 < s.oh; y0 += rows) {
                const std::int64_t here = least(images, end - image), y1 = least(s.oh, y0 + rows);
                std::int64_t top = y0 * s.sh - s.ph, bottom = (y1 - 1) * s.sh - s.ph + reach + 1;
                if (!v.merged) {
                    top = least(s.h, most(0, top));
                    bottom = most(top, least(s.h, bottom));
                }
                const T *from = x + image * s.h * s.w * s.c;
                const Source source = v.in_place ? lying(reinterpret_cast<const float *>(from), s, v)
                                                 : source_of(from, copy.get(), here, top, bottom, s, v);
                if (v.merged) std::memset(copy.get() + here * source.image, 0, static_cast<std::size_t>(tail) * sizeof(float));
                for (std::int64_t o = o0; o < o1; o += 16) {
                    list_channels(g + image * s.oh * s.ow * s.o, o, here, y0, y1, s, v, source, classes, n_classes,
                                  entries.get(), room, starts.get(), flat.get(), values.get());
                    for (std::int64_t chunk = 0; chunk < v.chunks; ++chunk)
                        for (std::int64_t i = 0; i < least(16, o1 - o); ++i)
                            channel(source, entries.get() + i * room, starts.get() + i, y0, y1, chunk, out + (o + i) * filter);
                }
            }
    }

    // All taps of one output channel and one chunk of channels.
    void channel(const Source &source, const Entry *entries, const std::int32_t *starts, std::int64_t y0, std::int64_t y1, std::int64_t chunk, float *out) const {
        const std::int64_t c0 = chunk * v.vectors * WIDTH;
        const int vectors = static_cast<int>(least(v.vectors, (v.channels - c0) / WIDTH));
        if (v.merged) {
            const std::int64_t n = starts[(y1 - y0) * 16], down = s.dh * source.line;
            const std::int64_t together = least(MAX_TAPS, MAX_VECTORS / vectors);
            for (std::int64_t ky = 0; n > 0 && ky < s.kh; ky += together)
                tile_of(static_cast<int>(least(together, s.kh - ky)), vectors)(
                    entries, n, source.base + chunk * source.chunk + ky * down, down, out + ky * v.channels + c0, v.channels);
            return;
        }
        for (std::int64_t cls = 0; cls < n_classes; ++cls, starts += (y1 - y0 + 1) * 16) {
            if (starts[(y1 - y0) * 16] == starts[0]) continue;
            const Columns &columns = classes[cls];
            for (std::int64_t ky = 0; ky < s.kh; ++ky) {
                // rows y of grad_output for which row y * sh - ph + ky * dh of x exists
                const std::int64_t offset = ky * s.dh - s.ph;
                const std::int64_t low = most(y0, offset < 0 ? up(-offset, s.sh) : 0);
                const std::int64_t high = offset >= s.h ? 0 : least(y1, (s.h - 1 - offset) / s.sh + 1);
                if (low >= high) continue;
                const std::int64_t from = starts[(low - y0) * 16], to = starts[(high - y0) * 16];
                if (from == to) continue;
                const float *rows_at = source.base + chunk * source.chunk + ky * s.dh * source.line;
                float *filter = out + ky * v.kw * v.channels + c0;
                const std::int64_t last = columns.first + columns.taps;
                for (std::int64_t tap = columns.first; tap < last; tap += v.taps) {
                    const int taps = static_cast<int>(least(v.taps, last - tap));
                    tile_of(taps, vectors)(entries + from, to - from, rows_at + tap * v.dw * v.pitch, v.dw * v.pitch, filter + tap * v.channels, v.channels);
                }
            }
        }
    }
};

template <class T>
void grad_weight(const T *g, const T *x, float *gw, const SkipShape &s, int threads) {
    const std::int64_t pixels = s.oh * s.ow;
    const double dense = density(g, s.n * pixels * s.o);
    // x in place: all of it in the second cache, and each number used a few times (measured as above)
    const bool few = s.n * s.h * s.w * s.c <= (1 << 18) && dense * static_cast<double>(s.n * pixels) < 160;
    const View v = view_of(s, sizeof(T) == sizeof(float) && few);
    const std::int64_t filter = s.kh * v.kw * v.channels, weights = s.o * filter;

    const Scratch<Columns> classes(s.ow);
    std::int64_t n_classes = 0;
    for (std::int64_t at = 0; at < s.ow; ++at) {
        std::int64_t first, end;
        taps_inside(at * v.sw - v.pw, v.dw, v.merged ? s.ow * v.sw : v.w, v.kw, first, end);
        Columns *last = n_classes > 0 ? &classes[n_classes - 1] : nullptr;
        if (last != nullptr && last->first == first && last->taps == end - first) last->end = at + 1;
        else classes[n_classes++] = {at, at + 1, first, end - first};
    }

    // a block's x should stay in the first cache while each list passes, unless the lists are then too short to pay for
    // loading and storing the sums
    const std::int64_t cached = 32 * 1024 / (v.vectors * WIDTH * 4);
    const std::int64_t enough = static_cast<std::int64_t>(24 / (dense > 1e-3 ? dense : 1e-3));
    std::int64_t wanted = most(cached, enough);
    wanted = most(16, least(wanted, 768 * 1024 / (v.channels * 4 * s.sh * v.sw)));
    const std::int64_t rows = wanted < pixels ? up(s.oh, up(s.oh, most(1, wanted / s.ow))) : s.oh;
    const std::int64_t images = wanted < pixels ? 1 : least(s.n, most(1, wanted / pixels));

    // tasks: shards of images, each with its own sums, times ranges of output channels
    const std::int64_t inputs = s.n * s.h * s.w * v.channels / v.kw;
    std::int64_t shards = most(1, least(16, inputs / weights));
    const std::int64_t shard = up(up(s.n, shards), images) * images;
    shards = most(1, up(s.n, shard));
    const std::int64_t range = most(16, up(up(s.o, most(1, 8 / shards)), 16) * 16), ranges = up(s.o, range);
    const WeightJob<T> job{g, x, s, v, classes.get(), n_classes, images, rows};
    const bool direct = shards == 1 && v.channels == v.c;
    const Scratch<float> sums(direct ? 0 : shards * weights);
    float *to = direct ? gw : sums.get();
    parallel(shards * ranges, threads, [&](std::int64_t task) {
        const std::int64_t part = task / ranges, o0 = task % ranges * range;
        job.run(part * shard, least(s.n, (part + 1) * shard), o0, least(s.o, o0 + range), to + part * weights);
    });
    if (direct) return;
    parallel(s.o, threads, [&](std::int64_t o) {
        float *out = gw + o * s.kh * v.kw * v.c;
        for (std::int64_t tap = 0; tap < s.kh * v.kw; ++tap, out += v.c) {
            const float *from = sums.get() + o * filter + tap * v.channels;
            for (std::int64_t c = 0; c < v.c; ++c) out[c] = from[c];
            for (std::int64_t part = 1; part < shards; ++part)
                for (std::int64_t c = 0; c < v.c; ++c) out[c] += from[part * weights + c];
        }
    });
}

}  // namespace

}  // namespace HASTEN_ISA
}  // namespace hasten
