#include <type_traits>

#include "binding.h"
#include "bit_mask.h"

namespace hasten {

static std::int64_t size_of(std::size_t n) { return static_cast<std::int64_t>(n); }
static bool fits(std::size_t mask, std::size_t n) { return mask == (n + 7) / 8; }
static const std::uint16_t *in(const std::int16_t *x) { return reinterpret_cast<const std::uint16_t *>(x); }
static std::uint16_t *out(std::int16_t *x) { return reinterpret_cast<std::uint16_t *>(x); }

template <class T>
static void make(const T *x, T *y, std::uint8_t *mask, std::int64_t n, int threads) {
    if constexpr (std::is_same_v<T, float>) {
        HASTEN_PICK(relu_mask)(x, y, mask, n, threads);
    } else {
        HASTEN_PICK(relu_mask_bfloat16)(in(x), out(y), mask, n, threads);
    }
}

template <class T>
static void relu_mask(In<T> x, Out<T> y, Out<std::uint8_t> mask, int threads) {
    require(x.size() == y.size() && fits(mask.size(), x.size()), "relu_mask: sizes of x, y and mask");
    make<T>(x.data(), y.data(), mask.data(), size_of(x.size()), threads);
}

template <class T>
static void bit_mask(In<T> x, Out<std::uint8_t> mask, int threads) {
    require(fits(mask.size(), x.size()), "bit_mask: sizes of x and mask");
    make<T>(x.data(), nullptr, mask.data(), size_of(x.size()), threads);
}

template <class T>
static void masked(In<std::uint8_t> mask, In<T> g, Out<T> y, double factor, int threads) {
    const float scale = static_cast<float>(factor);
    require(g.size() == y.size() && fits(mask.size(), g.size()), "masked: sizes of mask, g and y");
    const std::int64_t n = size_of(g.size());
    if constexpr (std::is_same_v<T, float>) {
        HASTEN_PICK(masked)(mask.data(), g.data(), y.data(), n, scale, threads);
    } else {
        HASTEN_PICK(masked_bfloat16)(mask.data(), in(g.data()), out(y.data()), n, scale, threads);
    }
}

// Without noconvert a tensor of another type would be copied into one of the first form's, and its result be lost.
template <class T>
static void offer(nb::module_ &m) {
    using nb::literals::operator""_a;
    const nb::call_guard<nb::gil_scoped_release> free;
    m.def("relu_mask", &relu_mask<T>, "x"_a.noconvert(), "y"_a.noconvert(), "mask"_a.noconvert(), "threads"_a, free);
    m.def("bit_mask", &bit_mask<T>, "x"_a.noconvert(), "mask"_a.noconvert(), "threads"_a, free);
    m.def("masked", &masked<T>, "mask"_a.noconvert(), "g"_a.noconvert(), "y"_a.noconvert(), "scale"_a, "threads"_a, free);
}

static const Binding binding([](nb::module_ &m) {
    offer<float>(m);
    offer<std::int16_t>(m);
});

}  // namespace hasten
