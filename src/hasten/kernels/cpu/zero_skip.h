#pragma once

#include <cstdint>

#include "isa.h"

namespace hasten {

// A convolution without groups; n images of x (h, w, c), grad_output (oh, ow, o), weight (o, kh, kw, c).
struct SkipShape {
    std::int64_t n, h, w, c, oh, ow, o, kh, kw, sh, sw, ph, pw, dh, dw;
};

}  // namespace hasten

// Both read grad_output (n, oh, ow, o) and multiply by its non-zeros only. Tensors lie channels last; with `half` all but
// gw are bfloat16, else float32. What the results are does not depend on the number of threads.

// gi (n, h, w, c) is filled with the gradient of x; w (o, kh, kw, c).
HASTEN_EACH_ISA(void skip_grad_input(const void *g, const void *w, void *gi, const SkipShape &shape, bool half, int threads))

// gw (o, kh, kw, c) float32 is filled with the gradient of the weight; x (n, h, w, c).
HASTEN_EACH_ISA(void skip_grad_weight(const void *g, const void *x, float *gw, const SkipShape &shape, bool half, int threads))
