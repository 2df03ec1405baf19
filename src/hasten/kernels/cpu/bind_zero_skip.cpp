#include "binding.h"
#include "zero_skip.h"

namespace hasten {

static SkipShape shape_of(const In<std::int64_t> &numbers) {
    require(numbers.size() == 15, "zero_skip: the shape must be 15 numbers");
    const std::int64_t *p = numbers.data();
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10], p[11], p[12], p[13], p[14]};
}

static void require_sizes(const SkipShape &s, std::size_t g, std::size_t x, std::size_t w) {
    require(g == static_cast<std::size_t>(s.n * s.oh * s.ow * s.o), "zero_skip: grad_output has another size");
    require(x == static_cast<std::size_t>(s.n * s.h * s.w * s.c), "zero_skip: x has another size");
    require(w == static_cast<std::size_t>(s.o * s.kh * s.kw * s.c), "zero_skip: the weight has another size");
}

template <class T>
static void grad_input(In<T> g, In<T> w, Out<T> gi, In<std::int64_t> numbers, int threads) {
    const SkipShape s = shape_of(numbers);
    require_sizes(s, g.size(), gi.size(), w.size());
    HASTEN_PICK(skip_grad_input)(g.data(), w.data(), gi.data(), s, sizeof(T) == 2, threads);
}

template <class T>
static void grad_weight(In<T> g, In<T> x, Out<float> gw, In<std::int64_t> numbers, int threads) {
    const SkipShape s = shape_of(numbers);
    require_sizes(s, g.size(), x.size(), gw.size());
    HASTEN_PICK(skip_grad_weight)(g.data(), x.data(), gw.data(), s, sizeof(T) == 2, threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("skip_grad_input", &grad_input<float>, nb::call_guard<nb::gil_scoped_release>());
    m.def("skip_grad_input", &grad_input<std::int16_t>, nb::call_guard<nb::gil_scoped_release>());
    m.def("skip_grad_weight", &grad_weight<float>, nb::call_guard<nb::gil_scoped_release>());
    m.def("skip_grad_weight", &grad_weight<std::int16_t>, nb::call_guard<nb::gil_scoped_release>());
});

}  // namespace hasten
