// Two passes. The first reads each map of grad_output once for its sum t and the place q of its largest element. The
// second adds up patches: one output channel's gradient is a row of kh * kw * c floats, of which a tile stays in
// registers while the images of a group pass by.
//
// Under channels_last a row of a patch, kw * c elements, lies in one piece:
//
//     x[n]:   . . . . . .        u = 0:  [ v=0: c floats | v=1 | v=2 ]
//             . P P P . .        u = 1:  [ ...                       ]
//             . P P P . .
//             . P P P . .
//
// Where patches overlap much (many output channels on small maps), the images of a group are first copied into scratch as
// padded float32 in channels_last; elsewhere x is read where it lies, and patches that reach into the padding are cut.
// Sums over images run in the order of images within a group, groups one after the other: the same for any number of threads.
#include "one_patch.h"

#include "one_patch_scan.h"

namespace hasten {
namespace HASTEN_ISA {

namespace {

constexpr Index TILE = 12;   // vectors of a row that stay in registers
constexpr Index GROUP = 64;  // most images in a group

// Copy one image into `to` as padded float32 in channels_last, (hi + 2 ph, wi + 2 pw, c).
template <class T>
void prepare(const OnePatch &s, const T *x, float *to) {
    const Index width = (s.wi + 2 * s.pw) * s.c, height = s.hi + 2 * s.ph;
    if (s.ph > 0) {
        std::memset(to, 0, static_cast<std::size_t>(s.ph * width) * sizeof(float));
        std::memset(to + (height - s.ph) * width, 0, static_cast<std::size_t>(s.ph * width) * sizeof(float));
    }
    for (Index i = 0; i < s.hi; ++i) {
        float *row = to + (i + s.ph) * width;
        if (s.pw > 0) {
            std::memset(row, 0, static_cast<std::size_t>(s.pw * s.c) * sizeof(float));
            std::memset(row + width - s.pw * s.c, 0, static_cast<std::size_t>(s.pw * s.c) * sizeof(float));
        }
        row += s.pw * s.c;
        if (s.x_last) {
            const T *from = x + i * s.wi * s.c;
            for (Index k = 0; k < s.wi * s.c; ++k) row[k] = value(from[k]);
        } else {
            // channels in blocks: each line of x is read once, and the lines written stay near
            for (Index first = 0; first < s.c; first += LANES) {
                const Index count = s.c - first < LANES ? s.c - first : LANES;
                const T *from = x + (first * s.hi + i) * s.wi;
                for (Index j = 0; j < s.wi; ++j) {
                    float *to_place = row + j * s.c + first;
                    for (Index k = 0; k < count; ++k) to_place[k] = value(from[k * s.hi * s.wi + j]);
                }
            }
        }
    }
}

// row[k] += sum over the list of weights[m] * from[m][offset + k], for k < count.
template <class T>
void add_rows(float *row, const T *const *from, const float *weights, Index many, Index offset, Index count) {
    Index k = 0;
#if defined(__AVX512F__)
    for (; k + TILE * LANES <= count; k += TILE * LANES) {
        __m512 sum[TILE];
        for (Index a = 0; a < TILE; ++a) sum[a] = _mm512_setzero_ps();
        for (Index m = 0; m < many; ++m) {
            const __m512 w = _mm512_set1_ps(weights[m]);
            const T *patch = from[m] + offset + k;
            for (Index a = 0; a < TILE; ++a) sum[a] = _mm512_fmadd_ps(w, load(patch + a * LANES, 0xffff), sum[a]);
        }
        for (Index a = 0; a < TILE; ++a) {
            _mm512_storeu_ps(row + k + a * LANES, _mm512_add_ps(_mm512_loadu_ps(row + k + a * LANES), sum[a]));
        }
    }
    for (; k < count; k += 3 * LANES) {
        const __mmask16 m0 = first_lanes(count - k);
        const __mmask16 m1 = first_lanes(count - k > LANES ? count - k - LANES : 0);
        const __mmask16 m2 = first_lanes(count - k > 2 * LANES ? count - k - 2 * LANES : 0);
        __m512 a = _mm512_setzero_ps(), b = a, c = a;
        for (Index m = 0; m < many; ++m) {
            const __m512 w = _mm512_set1_ps(weights[m]);
            const T *patch = from[m] + offset + k;
            a = _mm512_fmadd_ps(w, load(patch, m0), a);
            b = _mm512_fmadd_ps(w, load(patch + LANES, m1), b);
            c = _mm512_fmadd_ps(w, load(patch + 2 * LANES, m2), c);
        }
        float *to = row + k;
        _mm512_mask_storeu_ps(to, m0, _mm512_add_ps(load(to, m0), a));
        _mm512_mask_storeu_ps(to + LANES, m1, _mm512_add_ps(load(to + LANES, m1), b));
        _mm512_mask_storeu_ps(to + 2 * LANES, m2, _mm512_add_ps(load(to + 2 * LANES, m2), c));
    }
#else
    constexpr Index WIDE = 64;
    for (; k + WIDE <= count; k += WIDE) {
        float sum[WIDE];
        for (Index a = 0; a < WIDE; ++a) sum[a] = 0.0f;
        for (Index m = 0; m < many; ++m) {
            const float w = weights[m];
            const T *patch = from[m] + offset + k;
            for (Index a = 0; a < WIDE; ++a) sum[a] += w * value(patch[a]);
        }
        for (Index a = 0; a < WIDE; ++a) row[k + a] += sum[a];
    }
    for (; k < count; ++k) {
        float sum = 0.0f;
        for (Index m = 0; m < many; ++m) sum += weights[m] * value(from[m][offset + k]);
        row[k] += sum;
    }
#endif
}

// Images of one group: element (0, 0) of x[n] without padding, the number of elements in a row of places, and how far the
// memory reaches beyond x on each side.
template <class T>
struct Images {
    const T *first;
    Index pitch, row, around_h, around_w;
};

// grad_weight of output channel `o`, plus what the group's `many` images add.
template <class T>
void add_group(const OnePatch &s, const Images<T> &images, Index many, Index o, const float *t, const std::int32_t *q,
               float *grad) {
    const T *whole[GROUP];
    float weights[GROUP];
    Index inner = 0;
    const Index line = s.kw * s.c;
    for (Index m = 0; m < many; ++m) {
        const float w = t[m * s.o + o];
        const Index place = q[m * s.o + o];
        const Index i = place / s.wo * s.sh - s.ph, j = place % s.wo * s.sw - s.pw;
        // index arithmetic before any pointer, for a patch may begin outside of x
        const Index at = m * images.pitch + i * images.row + j * s.c;
        if (i >= -images.around_h && i + s.kh <= s.hi + images.around_h && j >= -images.around_w &&
            j + s.kw <= s.wi + images.around_w) {
            whole[inner] = images.first + at;
            weights[inner++] = w;
            continue;
        }
        const Index v0 = j < 0 ? -j : 0, v1 = s.wi - j < s.kw ? s.wi - j : s.kw;
        for (Index u = 0; u < s.kh; ++u) {
            if (i + u < 0 || i + u >= s.hi || v1 <= v0) continue;
            const T *cut = images.first + (at + u * images.row + v0 * s.c);
            add_rows(grad + u * line + v0 * s.c, &cut, &w, 1, 0, (v1 - v0) * s.c);
        }
    }
    for (Index u = 0; u < s.kh; ++u) add_rows(grad + u * line, whole, weights, inner, u * images.row, line);
}

template <class T>
void add_all(const OnePatch &s, const T *x, float *grad_weight, const float *t, const std::int32_t *q, float *scratch,
             int threads) {
    const Index size = s.c * s.hi * s.wi, row = s.kh * s.kw * s.c, group = one_patch_group(s);
    const Index padded_row = (s.wi + 2 * s.pw) * s.c, padded = (s.hi + 2 * s.ph) * padded_row;
    const bool copy = one_patch_scratch(s) > 0;
    std::memset(grad_weight, 0, static_cast<std::size_t>(s.o * row) * sizeof(float));
    constexpr Index CHANNELS = 8;
    for (Index first = 0; first < s.n; first += group) {
        const Index many = s.n - first < group ? s.n - first : group;
        const float *weights = t + first * s.o;
        const std::int32_t *places = q + first * s.o;
        if (copy) {
            parallel(many, threads, [&](Index m) { prepare(s, x + (first + m) * size, scratch + m * padded); });
        }
        parallel((s.o + CHANNELS - 1) / CHANNELS, threads, [&](Index task) {
            const Index end = (task + 1) * CHANNELS < s.o ? (task + 1) * CHANNELS : s.o;
            for (Index o = task * CHANNELS; o < end; ++o) {
                float *grad = grad_weight + o * row;
                if (copy) {
                    const Images<float> images{scratch + s.ph * padded_row + s.pw * s.c, padded, padded_row, s.ph, s.pw};
                    add_group(s, images, many, o, weights, places, grad);
                } else {
                    const Images<T> images{x + first * size, size, s.wi * s.c, 0, 0};
                    add_group(s, images, many, o, weights, places, grad);
                }
            }
        });
    }
}

template <class T>
void run(const OnePatch &s, const T *grad_output, const T *x, float *grad_weight, float *t, std::int32_t *q,
         float *scratch, int threads) {
    if (s.position == 0) {
        scan<T, true>(s, grad_output, t, q, threads);
    } else {
        scan<T, false>(s, grad_output, t, q, threads);
    }
    add_all(s, x, grad_weight, t, q, scratch, threads);
}

}  // namespace

void one_patch(const OnePatch &s, const void *grad_output, const void *x, float *grad_weight, float *t, std::int32_t *q,
               float *scratch, int threads) {
    if (s.half) {
        run(s, static_cast<const Half *>(grad_output), static_cast<const Half *>(x), grad_weight, t, q, scratch, threads);
    } else {
        run(s, static_cast<const float *>(grad_output), static_cast<const float *>(x), grad_weight, t, q, scratch,
            threads);
    }
}

}  // namespace HASTEN_ISA
}  // namespace hasten
