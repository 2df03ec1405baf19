// Finds the clusters of each block of channels: hashes, rows by hash, means.
#pragma once

#include <cmath>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "deep_reuse_vectors.h"
#include "parallel.h"

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

constexpr int64_t CHUNK = 512;  // pixels of a task; a multiple of TOGETHER
constexpr int64_t LANES = 32;   // channels of a task of `average`

// Hashes of the pieces [begin, end) of a block, which lie in `to.ids` until `number_rows`; `empty` notes pieces of zeros.
// Returns whether all values are finite.
template <class X>
bool hash_pieces(const X *x, const float *v, const float *shift, const DeepReuse &of, const ReuseClusters &to,
                 uint8_t *empty, int64_t block, int64_t begin, int64_t end) {
    const int64_t length = of.length, first = block * of.pixels();
    const uint32_t keep = of.bits == 32 ? ~0U : (1U << of.bits) - 1U;
    const float *limit = shift != nullptr ? shift + block * 32 : nullptr;
    float *pieces = room<float>(TOGETHER * length);
    std::memset(pieces, 0, sizeof(float) * static_cast<std::size_t>(TOGETHER * length));
    float wrong = 0.0F;
    for (int64_t p = begin; p < end; p += TOGETHER) {
        const int64_t here = end - p < TOGETHER ? end - p : TOGETHER;
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
            empty[first + p + i] = seen == 0;
            // all exponent bits together are set in an infinity; a sum of several may look like one, so look closer
            if ((seen >> 24) == 0xffU)
                for (int64_t l = 0; l < length; ++l) wrong += piece[l] * 0.0F;
            if (to.scale != nullptr) {
                float square = 0.0F;
                for (int64_t l = 0; l < length; ++l) square += piece[l] * piece[l];
                const float norm = std::sqrt(square);
                empty[first + p + i] |= !(norm > 0.0F);
                to.scale[first + p + i] = norm > 0.0F ? norm : 1.0F;
            }
        }
        uint32_t hash[TOGETHER];
        if (of.bits > 16) {
            hashes<2>(pieces, length, v, limit, keep, hash);
        } else {
            hashes<1>(pieces, length, v, limit, keep, hash);
        }
        std::memcpy(to.ids + first + p, hash, sizeof(uint32_t) * static_cast<std::size_t>(here));
    }
    std::free(pieces);
    return wrong == 0.0F;
}

// Rows of a block in the order in which their hashes first appear, those of a group after its row of zeros.
void number_rows(const DeepReuse &of, const ReuseClusters &to, const uint8_t *empty, int64_t block) {
    const int64_t pixels = of.pixels(), capacity = of.capacity(), each = pixels / of.groups;
    int32_t *ids = to.ids + block * pixels, *keys = to.keys + block * capacity, *counts = to.counts + block * capacity;
    int32_t *starts = to.starts + block * (of.groups + 1);
    empty += block * pixels;
    uint32_t size = 64;
    while (size < 2 * each) size *= 2;
    int32_t *slot = static_cast<int32_t *>(std::calloc(size, sizeof(int32_t)));
    Table table{slot, size - 1, keys, 0, 0};
    int32_t rows = 0;
    for (int64_t group = 0; group < of.groups; ++group) {
        const int32_t zero = rows++;
        starts[group] = zero;
        keys[zero] = 0;
        counts[zero] = 0;
        table.begin = table.end = rows;
        for (int64_t p = group * each; p < (group + 1) * each; ++p) {
            int32_t row = zero;
            if (!empty[p]) {
                const uint32_t hash = static_cast<uint32_t>(ids[p]);
                row = table.find(hash);
                if (row == table.end) {
                    ++table.end;
                    keys[row] = static_cast<int32_t>(hash);
                    counts[row] = 0;
                }
            }
            ids[p] = row;
            ++counts[row];
        }
        rows = table.end;
    }
    starts[of.groups] = rows;
    std::free(slot);
}

// Means of the rows of a block in the channels [begin, end) of its pieces. Pieces of zeros add nothing.
template <class X>
void average(const X *x, const DeepReuse &of, const ReuseClusters &to, int64_t block, int64_t begin, int64_t end) {
    const int64_t length = of.length, pixels = of.pixels(), capacity = of.capacity(), many = end - begin;
    const int32_t *ids = to.ids + block * pixels, *counts = to.counts + block * capacity;
    const int64_t rows = to.starts[block * (of.groups + 1) + of.groups];
    float *means = to.means + block * capacity * length + begin;
    for (int64_t row = 0; row < rows; ++row)
        std::memset(means + row * length, 0, sizeof(float) * static_cast<std::size_t>(many));
    const X *from = x + block * length + begin;
    for (int64_t p = 0; p < pixels; ++p, from += of.channels) {
        const float factor = to.scale != nullptr ? 1.0F / to.scale[block * pixels + p] : 1.0F;
        float *mean = means + ids[p] * length;
        for (int64_t l = 0; l < many; ++l) mean[l] += number(from[l]) * factor;
    }
    for (int64_t row = 0; row < rows; ++row) {
        const float share = counts[row] > 0 ? 1.0F / static_cast<float>(counts[row]) : 0.0F;
        for (int64_t l = 0; l < many; ++l) means[row * length + l] *= share;
    }
}

template <class X>
void cluster_all(const X *x, const float *v, const float *shift, const DeepReuse &of, const ReuseClusters &to,
                 int32_t *finite, int threads) {
    const int64_t blocks = of.blocks(), pixels = of.pixels(), chunks = (pixels + CHUNK - 1) / CHUNK;
    const int64_t cuts = (of.length + LANES - 1) / LANES;
    uint8_t *empty = room<uint8_t>(blocks * pixels), *sound = room<uint8_t>(blocks * chunks);
    parallel(blocks * chunks, threads, [&](int64_t i) {
        const int64_t begin = i % chunks * CHUNK, end = begin + CHUNK < pixels ? begin + CHUNK : pixels;
        sound[i] = hash_pieces(x, v, shift, of, to, empty, i / chunks, begin, end);
    });
    parallel(blocks, threads, [&](int64_t block) {
        number_rows(of, to, empty, block);
        finite[block] = std::memchr(sound + block * chunks, 0, static_cast<std::size_t>(chunks)) == nullptr;
    });
    parallel(blocks * cuts, threads, [&](int64_t i) {
        const int64_t begin = i % cuts * LANES, end = begin + LANES < of.length ? begin + LANES : of.length;
        average(x, of, to, i / cuts, begin, end);
    });
    std::free(sound);
    std::free(empty);
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
