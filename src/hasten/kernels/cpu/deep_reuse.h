// Deep reuse: products of a convolution from the means of similar channel pieces.
//
// The input lies in memory as NHWC. A pixel's channels are cut into `blocks` pieces of `length`; the pieces of a block that
// share a hash (within a group of images) are a cluster, and each is replaced by the cluster's mean. A patch is made of the
// pieces of its pixels, so one clustering serves all taps of the kernel and the input is never unfolded:
//
//   z[q, tap] = mean[q] * w[tap, block]                  one row of products for each cluster q of a block
//   y[i]      = bias + sum over (tap, block) of z[id(pixel(i, tap), block), tap]
//   g[q, tap] = sum over members p of q of grad_output[the output that sees p through tap]
//   grad_w[tap, block] = sum over q of mean[q]^T g[q, tap];    grad_x[p] = sum over taps of g[id(p), tap] w^T / count
#pragma once

#include <cstdint>

#include "isa.h"

namespace hasten {

struct DeepReuse {
    std::int64_t images, height, width, channels, out_height, out_width, outputs;
    std::int64_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
    std::int64_t length, bits, groups;  // groups: parts of the batch that share no clusters; divides images

    std::int64_t blocks() const { return channels / length; }
    std::int64_t pixels() const { return images * height * width; }
    std::int64_t taps() const { return kernel_h * kernel_w; }
    std::int64_t capacity() const { return pixels() + groups; }  // rows of a block: each group begins with its zero cluster
};

// `half`: x, grad_output, y and grad_x hold bfloat16, else float. All other arrays hold float or int32.
struct ReuseClusters {
    std::int32_t *ids;      // (blocks, pixels): row of each piece
    std::int32_t *keys;     // (blocks, capacity): hash of each row
    std::int32_t *counts;   // (blocks, capacity): members of each row
    std::int32_t *starts;   // (blocks, groups + 1): first row of each group; the last is the number of rows
    float *means;           // (blocks, capacity, length)
    float *scale;           // (blocks, pixels): length of each piece, or null where pieces are not scaled
};

}  // namespace hasten

// Fills `to`. v (length, 32): hash vectors, lane j the hash of bit j; shift (blocks, 32): thresholds, or null for 0.
// finite (blocks): 0 where a value of the block is infinite or not a number.
HASTEN_EACH_ISA(void deep_reuse_cluster(const void *x, bool half, const float *v, const float *shift,
                                        const DeepReuse &of, const ReuseClusters &to, std::int32_t *finite, int threads))

// Fills y (images, out_height, out_width, outputs). w (outputs, taps, channels); bias (outputs) or null. z: rows of products
// (sum of rows, taps, outputs), those of block b from row first[b], or null to compute them.
HASTEN_EACH_ISA(void deep_reuse_output(const ReuseClusters &from, const float *w, const float *bias, const float *z,
                                       const std::int64_t *first, const DeepReuse &of, void *y, bool half, int threads))

// Elements of float scratch that deep_reuse_gradients needs.
HASTEN_EACH_ISA(std::int64_t deep_reuse_scratch(const DeepReuse &of))

// Fills grad_x like x and grad_w like w; either may be null. grad_output as y.
HASTEN_EACH_ISA(void deep_reuse_gradients(const void *grad_output, bool half, const ReuseClusters &from, const float *w,
                                          const DeepReuse &of, void *grad_x, float *grad_w, float *scratch, int threads))
