// Finds the clusters of one block of channels: hashes, rows by hash, means.
#pragma once

#include <cmath>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "deep_reuse_vectors.h"

#pragma GCC diagnostic ignored "-Wpsabi"

namespace hasten {
namespace HASTEN_ISA {
namespace {

// Rows of one group by their hash. A slot that points outside the group's rows is empty, so nothing is ever cleared.
struct Table {
    int32_t *slot;
    uint32_t mask;
    const int32_t *keys;
    int32_t begin, end;  // rows of the group that have a hash

    // Returns the row of `key`, or the new row `end` after noting it.
    int32_t find(uint32_t key) {
        uint32_t at = key * 0x9e3779b1U;
        at = (at ^ (at >> 15)) & mask;
        for (;; at = (at + 1) & mask) {
            const int32_t row = slot[at];
            if (row < begin || row >= end) {
                slot[at] = end;
                return end;
            }
            if (static_cast<uint32_t>(keys[row]) == key) return row;
        }
    }
};

inline uint32_t above(const V &x, const V &y) {  // bit j: x[j] > y[j]
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(reinterpret_cast<const __m512 &>(x), reinterpret_cast<const __m512 &>(y), _CMP_GT_OQ);
#else
    const auto mask = x > y;
    uint32_t bits = 0;
    for (int j = 0; j < 16; ++j) bits |= (static_cast<uint32_t>(mask[j]) & 1U) << j;
    return bits;
#endif
}

// Hashes of TOGETHER pieces of `length` floats each.
template <int VECTORS>
inline void hashes(const float *pieces, int64_t length, const float *v, const float *shift, uint32_t keep, uint32_t *out) {
    V sum[TOGETHER][VECTORS];
    for (int i = 0; i < TOGETHER; ++i)
        for (int k = 0; k < VECTORS; ++k) sum[i][k] = all(0.0F);
    for (int64_t l = 0; l < length; ++l) {
        V column[VECTORS];
        for (int k = 0; k < VECTORS; ++k) column[k] = load(v + l * 32 + 16 * k);
        for (int i = 0; i < TOGETHER; ++i) {
            const V value = all(pieces[i * length + l]);
            for (int k = 0; k < VECTORS; ++k) sum[i][k] += value * column[k];
        }
    }
    for (int i = 0; i < TOGETHER; ++i) {
        uint32_t bits = 0;
        for (int k = 0; k < VECTORS; ++k)
            bits |= above(sum[i][k], shift != nullptr ? load(shift + 16 * k) : all(0.0F)) << (16 * k);
        out[i] = bits & keep;
    }
}

template <class X>
void cluster_block(const X *x, const float *v, const float *shift, const DeepReuse &of, const ReuseClusters &to,
                   int32_t *finite, int64_t block) {
    const int64_t length = of.length, pixels = of.pixels(), capacity = of.capacity(), each = pixels / of.groups;
    int32_t *ids = to.ids + block * pixels, *keys = to.keys + block * capacity, *counts = to.counts + block * capacity;
    int32_t *starts = to.starts + block * (of.groups + 1);
    float *means = to.means + block * capacity * length;
    float *scale = to.scale != nullptr ? to.scale + block * pixels : nullptr;
    const uint32_t keep = of.bits == 32 ? ~0U : (1U << of.bits) - 1U;
    uint32_t size = 64;
    while (size < 2 * each) size *= 2;
    int32_t *slot = static_cast<int32_t *>(std::calloc(size, sizeof(int32_t)));
    float *pieces = room<float>(TOGETHER * length);
    std::memset(pieces, 0, sizeof(float) * static_cast<std::size_t>(TOGETHER * length));
    Table table{slot, size - 1, keys, 0, 0};
    float wrong = 0.0F;
    int32_t rows = 0;
    for (int64_t group = 0; group < of.groups; ++group) {
        const int32_t zero = rows++;
        starts[group] = zero;
        keys[zero] = 0;
        counts[zero] = 0;
        std::memset(means + zero * length, 0, sizeof(float) * static_cast<std::size_t>(length));
        table.begin = table.end = rows;
        const int64_t stop = (group + 1) * each;
        for (int64_t p = group * each; p < stop; p += TOGETHER) {
            const int64_t here = stop - p < TOGETHER ? stop - p : TOGETHER;
            bool empty[TOGETHER];
            for (int64_t i = 0; i < here; ++i) {
                const X *from = x + (p + i) * of.channels + block * length;
                float *piece = pieces + i * length;
                uint32_t seen = 0;
                for (int64_t l = 0; l < length; ++l) {
                    const float value = number(from[l]);
                    piece[l] = value;
                    uint32_t bits;
                    std::memcpy(&bits, &value, 4);
                    seen |= bits << 1;  // without the sign: -0 is zero
                }
                empty[i] = seen == 0;
                // all exponent bits together are set in an infinity; a sum of several may look like one, so look closer
                if ((seen >> 24) == 0xffU)
                    for (int64_t l = 0; l < length; ++l) wrong += piece[l] * 0.0F;
            }
            uint32_t hash[TOGETHER];
            const float *limit = shift != nullptr ? shift + block * 32 : nullptr;
            if (of.bits > 16) {
                hashes<2>(pieces, length, v, limit, keep, hash);
            } else {
                hashes<1>(pieces, length, v, limit, keep, hash);
            }
            for (int64_t i = 0; i < here; ++i) {
                const float *piece = pieces + i * length;
                float factor = 1.0F;
                if (scale != nullptr) {
                    float square = 0.0F;
                    for (int64_t l = 0; l < length; ++l) square += piece[l] * piece[l];
                    const float norm = std::sqrt(square);
                    empty[i] = empty[i] || !(norm > 0.0F);
                    scale[p + i] = empty[i] ? 1.0F : norm;
                    factor = 1.0F / scale[p + i];
                }
                int32_t row = zero;
                if (!empty[i]) {
                    row = table.find(hash[i]);
                    if (row == table.end) {
                        ++table.end;
                        keys[row] = static_cast<int32_t>(hash[i]);
                        counts[row] = 0;
                        std::memset(means + row * length, 0, sizeof(float) * static_cast<std::size_t>(length));
                    }
                }
                ids[p + i] = row;
                ++counts[row];
                float *mean = means + row * length;
                if (!empty[i])
                    for (int64_t l = 0; l < length; ++l) mean[l] += piece[l] * factor;
            }
        }
        rows = table.end;
    }
    starts[of.groups] = rows;
    for (int32_t row = 0; row < rows; ++row) {
        const float share = counts[row] > 0 ? 1.0F / static_cast<float>(counts[row]) : 0.0F;
        for (int64_t l = 0; l < length; ++l) means[row * length + l] *= share;
    }
    finite[block] = wrong == 0.0F;
    std::free(pieces);
    std::free(slot);
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
