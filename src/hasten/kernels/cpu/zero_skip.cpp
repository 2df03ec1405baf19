#include "zero_skip.h"

#include "zero_skip_input.h"
#include "zero_skip_weight.h"

namespace hasten {
namespace HASTEN_ISA {

void skip_grad_input(const void *g, const void *w, void *gi, const SkipShape &shape, bool half, int threads) {
    if (half)
        grad_input(static_cast<const Half *>(g), static_cast<const Half *>(w), static_cast<Half *>(gi), shape, threads);
    else
        grad_input(static_cast<const float *>(g), static_cast<const float *>(w), static_cast<float *>(gi), shape, threads);
}

void skip_grad_weight(const void *g, const void *x, float *gw, const SkipShape &shape, bool half, int threads) {
    if (half)
        grad_weight(static_cast<const Half *>(g), static_cast<const Half *>(x), gw, shape, threads);
    else
        grad_weight(static_cast<const float *>(g), static_cast<const float *>(x), gw, shape, threads);
}

}  // namespace HASTEN_ISA
}  // namespace hasten
