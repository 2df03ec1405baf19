#include "binding.h"
#include "prune_gradient.h"

namespace hasten {

template <class T>
static void prune_gradient(In<T> g, Out<T> y, Out<double> totals, double tau, std::uint64_t key, int threads) {
    require(g.size() == y.size(), "prune_gradient: g and y must have the same number of elements");
    require(totals.size() == 4, "prune_gradient: there are four totals");
    HASTEN_PICK(prune_gradient)(g.data(), y.data(), totals.data(), static_cast<std::int64_t>(g.size()), static_cast<float>(tau), key,
                                sizeof(T) == 2, threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("prune_gradient", &prune_gradient<float>, nb::call_guard<nb::gil_scoped_release>());
    m.def("prune_gradient", &prune_gradient<std::int16_t>, nb::call_guard<nb::gil_scoped_release>());
});

}  // namespace hasten
