#include "binding.h"
#include "fixed_point.h"

namespace hasten {

static void fixed_point(In<float> x, Out<float> y, Out<std::int64_t> counts, Out<float> sizes, int word, int fraction,
                        std::uint64_t key, bool stochastic, int threads) {
    constexpr std::int64_t CHUNK = 1 << 14;  // a multiple of 32; kernels/fixed_point.py has the same
    const std::int64_t n = static_cast<std::int64_t>(x.size()), tasks = (n + CHUNK - 1) / CHUNK;
    require(x.size() == y.size(), "fixed_point: x and y must have the same number of elements");
    require(static_cast<std::int64_t>(counts.size()) == tasks && static_cast<std::int64_t>(sizes.size()) == tasks,
            "fixed_point: one count and one size for each task");
    require(word >= 1 && word <= 24 && fraction >= -100 && fraction <= 100, "fixed_point: format out of range");
    HASTEN_PICK(fixed_point)(x.data(), y.data(), n, counts.data(), sizes.data(), CHUNK, word, fraction, key, stochastic,
                             threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("fixed_point", &fixed_point, nb::call_guard<nb::gil_scoped_release>());
});

}  // namespace hasten
