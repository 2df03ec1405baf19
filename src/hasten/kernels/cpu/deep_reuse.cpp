#include "deep_reuse.h"

#include "deep_reuse_backward.h"
#include "deep_reuse_clusters.h"
#include "deep_reuse_output.h"
#include "parallel.h"

namespace hasten {
namespace HASTEN_ISA {

void deep_reuse_cluster(const void *x, bool half, const float *v, const float *shift, const DeepReuse &of,
                        const ReuseClusters &to, int32_t *finite, int threads) {
    if (half) {
        cluster_all(static_cast<const uint16_t *>(x), v, shift, of, to, finite, threads);
    } else {
        cluster_all(static_cast<const float *>(x), v, shift, of, to, finite, threads);
    }
}

void deep_reuse_output(const ReuseClusters &from, const float *w, const float *bias, const float *z,
                       const int64_t *first, const DeepReuse &of, void *y, bool half, int threads) {
    parallel(tiles(of), threads, [&](int64_t tile) {
        if (half) {
            uint16_t *to = static_cast<uint16_t *>(y);
            if (from.scale != nullptr) {
                output_tile<uint16_t, true>(from, w, bias, z, first, of, to, tile);
            } else {
                output_tile<uint16_t, false>(from, w, bias, z, first, of, to, tile);
            }
        } else {
            float *to = static_cast<float *>(y);
            if (from.scale != nullptr) {
                output_tile<float, true>(from, w, bias, z, first, of, to, tile);
            } else {
                output_tile<float, false>(from, w, bias, z, first, of, to, tile);
            }
        }
    });
}

int64_t deep_reuse_scratch(const DeepReuse &of) {
    const Field field(of);
    const int64_t lanes = (of.length + 15) / 16 * 16;
    const int64_t rows = of.blocks() * of.capacity();
    return tiles(of) * of.images * field.high * field.wide * WIDE + parts(of) * rows * lanes + rows;
}

void deep_reuse_gradients(const void *grad_output, bool half, const ReuseClusters &from, const float *w,
                          const DeepReuse &of, void *grad_x, float *grad_w, float *scratch, int threads) {
    const Field field(of);
    const int64_t place = field.high * field.wide * WIDE, many = parts(of), all_tiles = tiles(of);
    const int64_t lanes = (of.length + 15) / 16 * 16;
    float *back = scratch + all_tiles * of.images * place;
    parallel(all_tiles * of.images, threads, [&](int64_t i) {
        const int64_t tile = i / of.images, n = i % of.images;
        float *to = scratch + i * place;
        if (half) {
            lay_out(static_cast<const uint16_t *>(grad_output), of, field, tile, n, to);
        } else {
            lay_out(static_cast<const float *>(grad_output), of, field, tile, n, to);
        }
    });
    parallel(of.blocks() * many, threads, [&](int64_t i) {
        const int64_t part = i / of.blocks(), block = i % of.blocks();
        float *here = grad_x != nullptr ? back + i * of.capacity() * lanes : nullptr;
        const Part task{scratch, from, w, of, here, grad_w, block, part * all_tiles / many, (part + 1) * all_tiles / many};
        if (from.scale != nullptr) {
            backward_part<true>(task);
        } else {
            backward_part<false>(task);
        }
    });
    if (grad_x == nullptr) return;
    float *share = back + many * of.blocks() * of.capacity() * lanes;
    parallel(of.blocks(), threads, [&](int64_t block) {
        shares(from, of, share, block);
        combine(back, share, from, of, block);
    });
    const int64_t chunk = 256;
    parallel((of.pixels() + chunk - 1) / chunk, threads, [&](int64_t i) {
        const int64_t begin = i * chunk, end = begin + chunk < of.pixels() ? begin + chunk : of.pixels();
        if (half) {
            spread(back, from, of, static_cast<uint16_t *>(grad_x), begin, end);
        } else {
            spread(back, from, of, static_cast<float *>(grad_x), begin, end);
        }
    });
}

}  // namespace HASTEN_ISA
}  // namespace hasten
