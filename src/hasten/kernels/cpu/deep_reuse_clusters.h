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

// Hashes of TOGETHER pieces of `length` floats each; the thresholds `shift` are those of pieces of length 1.
template <int VECTORS>
inline void hashes(const float *pieces, int64_t length, const float *v, const float *shift, const float *norm, uint32_t keep,
                   uint32_t *out) {
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
            bits |= above(sum[i][k], shift != nullptr ? load(shift + 16 * k) * all(norm[i]) : all(0.0F)) << (16 * k);
        out[i] = bits & keep;
    }
}

constexpr int64_t CHUNK = 512;  // pixels of a task; a multiple of TOGETHER
constexpr int64_t LANES = 32;   // channels of a task of `Average`, where there are fewer blocks than
constexpr int64_t FEW = 4;

// Hashes of the pieces [begin, end) of a block, which lie in `to.ids` until they are numbered; `empty` notes pieces of zeros.
// Returns whether all values are finite.
template <class X>
bool hash_pieces(const X *x, const float *v, const float *shift, const DeepReuse &of, const ReuseClusters &to,
                 uint8_t *empty, int64_t block, int64_t begin, int64_t end) {
    const int64_t length = of.length, first = block * of.pixels();
    const uint32_t keep = of.bits == 32 ? ~0U : (1U << of.bits) - 1U;
    const float *limit = shift != nullptr ? shift + block * 32 : nullptr;
    float *pieces = room<float>(TOGETHER * length);
    std::memset(pieces, 0, sizeof(float) * static_cast<std::size_t>(TOGETHER * length));
    float wrong = 0.0F, norms[TOGETHER];
    for (float &norm : norms) norm = 1.0F;
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
                to.scale[first + p + i] = norms[i] = norm > 0.0F ? norm : 1.0F;
            }
        }
        uint32_t hash[TOGETHER];
        if (of.bits > 16) {
            hashes<2>(pieces, length, v, limit, norms, keep, hash);
        } else {
            hashes<1>(pieces, length, v, limit, norms, keep, hash);
        }
        std::memcpy(to.ids + first + p, hash, sizeof(uint32_t) * static_cast<std::size_t>(here));
    }
    std::free(pieces);
    return wrong == 0.0F;
}

// Rows of a block in the order in which their hashes first appear, those of a group after its row of zeros.
class Numbering {
  public:
    Numbering(const DeepReuse &of, const ReuseClusters &to, const uint8_t *empty, int64_t block)
        : of_(of), each_(of.pixels() / of.groups), ids_(to.ids + block * of.pixels()), keys_(to.keys + block * of.capacity()),
          counts_(to.counts + block * of.capacity()), starts_(to.starts + block * (of.groups + 1)),
          empty_(empty + block * of.pixels()) {
        uint32_t size = 64;
        while (size < 2 * each_) size *= 2;
        table_ = Table{static_cast<int32_t *>(std::calloc(size, sizeof(int32_t))), size - 1, keys_, 0, 0};
    }
    ~Numbering() { std::free(table_.slot); }
    Numbering(const Numbering &) = delete;
    Numbering &operator=(const Numbering &) = delete;

    // Puts rows in the place of the hashes of the pieces [begin, end), which follow those before.
    void number(int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            if (p % each_ == 0) {
                zero_ = table_.end;
                starts_[p / each_] = zero_;
                keys_[zero_] = 0;
                counts_[zero_] = 0;
                table_.begin = ++table_.end;
            }
            int32_t row = zero_;
            if (!empty_[p]) {
                const uint32_t hash = static_cast<uint32_t>(ids_[p]);
                row = table_.find(hash);
                if (row == table_.end) {
                    ++table_.end;
                    keys_[row] = static_cast<int32_t>(hash);
                    counts_[row] = 0;
                }
            }
            ids_[p] = row;
            ++counts_[row];
        }
        starts_[of_.groups] = table_.end;
    }
    int32_t rows() const { return table_.end; }

  private:
    const DeepReuse &of_;
    const int64_t each_;
    int32_t *ids_, *keys_, *counts_, *starts_;
    const uint8_t *empty_;
    Table table_;
    int32_t zero_ = 0;
};

// Means of the rows of a block in the channels [low, high) of its pieces. Pieces of zeros add nothing.
template <class X>
class Average {
  public:
    Average(const X *x, const DeepReuse &of, const ReuseClusters &to, int64_t block, int64_t low, int64_t high)
        : x_(x + block * of.length + low), channels_(of.channels), length_(of.length), many_(high - low),
          ids_(to.ids + block * of.pixels()), counts_(to.counts + block * of.capacity()),
          scale_(to.scale != nullptr ? to.scale + block * of.pixels() : nullptr),
          means_(to.means + block * of.capacity() * of.length + low) {}

    // Adds the pieces [begin, end), whose rows are numbered; `rows` rows are in use.
    void add(int64_t begin, int64_t end, int64_t rows) {
        for (; rows_ < rows; ++rows_)
            std::memset(means_ + rows_ * length_, 0, sizeof(float) * static_cast<std::size_t>(many_));
        const X *from = x_ + begin * channels_;
        for (int64_t p = begin; p < end; ++p, from += channels_) {
            const float factor = scale_ != nullptr ? 1.0F / scale_[p] : 1.0F;
            float *mean = means_ + ids_[p] * length_;
            for (int64_t l = 0; l < many_; ++l) mean[l] += number(from[l]) * factor;
        }
    }
    void finish() {
        for (int64_t row = 0; row < rows_; ++row) {
            const float share = counts_[row] > 0 ? 1.0F / static_cast<float>(counts_[row]) : 0.0F;
            for (int64_t l = 0; l < many_; ++l) means_[row * length_ + l] *= share;
        }
    }

  private:
    const X *x_;
    const int64_t channels_, length_, many_;
    const int32_t *ids_, *counts_;
    const float *scale_;
    float *means_;
    int64_t rows_ = 0;
};

// Where blocks are few, a block's pieces are hashed and averaged by several tasks; else a block is one task, which goes
// through the pieces once, in chunks that stay in cache. The results are the same.
template <class X>
void cluster_all(const X *x, const float *v, const float *shift, const DeepReuse &of, const ReuseClusters &to,
                 int32_t *finite, int threads) {
    const int64_t blocks = of.blocks(), pixels = of.pixels(), chunks = (pixels + CHUNK - 1) / CHUNK;
    const int64_t cuts = blocks < FEW ? (of.length + LANES - 1) / LANES : 1;
    const auto end_of = [&](int64_t chunk) { return (chunk + 1) * CHUNK < pixels ? (chunk + 1) * CHUNK : pixels; };
    uint8_t *empty = room<uint8_t>(blocks * pixels), *sound = room<uint8_t>(blocks * chunks);
    if (blocks < FEW)
        parallel(blocks * chunks, threads, [&](int64_t i) {
            const int64_t chunk = i % chunks;
            sound[i] = hash_pieces(x, v, shift, of, to, empty, i / chunks, chunk * CHUNK, end_of(chunk));
        });
    parallel(blocks, threads, [&](int64_t block) {
        Numbering rows(of, to, empty, block);
        if (blocks < FEW) {
            rows.number(0, pixels);
        } else {
            Average<X> means(x, of, to, block, 0, of.length);
            for (int64_t chunk = 0; chunk < chunks; ++chunk) {
                const int64_t begin = chunk * CHUNK, end = end_of(chunk);
                sound[block * chunks + chunk] = hash_pieces(x, v, shift, of, to, empty, block, begin, end);
                rows.number(begin, end);
                means.add(begin, end, rows.rows());
            }
            means.finish();
        }
        finite[block] = std::memchr(sound + block * chunks, 0, static_cast<std::size_t>(chunks)) == nullptr;
    });
    if (blocks < FEW)
        parallel(blocks * cuts, threads, [&](int64_t i) {
            const int64_t block = i / cuts, low = i % cuts * LANES, high = low + LANES < of.length ? low + LANES : of.length;
            Average<X> means(x, of, to, block, low, high);
            means.add(0, pixels, to.starts[block * (of.groups + 1) + of.groups]);
            means.finish();
        });
    std::free(sound);
    std::free(empty);
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
