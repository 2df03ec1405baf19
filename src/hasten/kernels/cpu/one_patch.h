#pragma once

#include <cstdint>

#include "isa.h"

namespace hasten {

// A convolution and where its tensors lie. Elements of grad_output and x are float, or bfloat16 where `half`.
struct OnePatch {
    std::int64_t n, o, ho, wo;            // grad_output (n, o, ho, wo)
    std::int64_t c, hi, wi;               // x (n, c, hi, wi)
    std::int64_t kh, kw, sh, sw, ph, pw;  // kernel, stride, padding
    bool half;
    bool grad_last, x_last;  // memory order: channels last, or channels before places
    int position;            // of the patch: 0 largest magnitude, 1 largest value, 2 place (1, 1)
    int weight;              // of the patch: 0 sum of the map, 1 its value at the patch
};

// Images that are prepared together, and numbers of floats that `scratch` must hold (0: x is read where it lies).
std::int64_t one_patch_group(const OnePatch &s);
std::int64_t one_patch_scratch(const OnePatch &s);

}  // namespace hasten

// grad_weight (o, kh, kw, c), the last fastest: the sum over n of t[n][o] times the patch of x[n] at q[n][o].
// t (n, o) and q (n, o) are filled on the way; scratch as above.
HASTEN_EACH_ISA(void one_patch(const OnePatch &s, const void *grad_output, const void *x, float *grad_weight, float *t,
                               std::int32_t *q, float *scratch, int threads))
