#include "binding.h"
#include "round_bfloat16.h"

namespace hasten {

static void round_bfloat16(In<float> x, Out<std::int16_t> y, std::uint64_t key, int threads) {
    require(x.size() == y.size(), "round_bfloat16: x and y must have the same number of elements");
    HASTEN_PICK(round_bfloat16)(x.data(), reinterpret_cast<std::uint16_t *>(y.data()),
                                static_cast<std::int64_t>(x.size()), key, threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("round_bfloat16", &round_bfloat16, nb::call_guard<nb::gil_scoped_release>());
});

}  // namespace hasten
