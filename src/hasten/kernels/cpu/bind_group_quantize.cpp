#include <type_traits>

#include "binding.h"
#include "group_quantize.h"

namespace hasten {

// bfloat16 as the kernels take it.
static const std::uint16_t *values(const In<std::int16_t> &x) {
    return reinterpret_cast<const std::uint16_t *>(x.data());
}
static std::uint16_t *values(const Out<std::int16_t> &x) { return reinterpret_cast<std::uint16_t *>(x.data()); }

// The shapes of a call, checked against the sizes of what was handed over.
struct Checked : Groups {
    std::vector<std::int64_t> first;

    Checked(const In<std::int32_t> &given, std::size_t numbers, std::int64_t size, std::size_t codes, std::size_t meta) {
        bits = given.data();
        samples = static_cast<std::int64_t>(given.size());
        group = size;
        require(samples > 0 && numbers % given.size() == 0 && numbers > 0, "group_quantize: x must hold whole samples");
        require(size > 0 && size % 32 == 0 && size <= LARGEST_GROUP, "group_quantize: the group's size is not allowed");
        values = static_cast<std::int64_t>(numbers) / samples;
        std::int64_t total = 0;
        for (std::int64_t n = 0; n < samples; ++n) {
            require(bits[n] >= 1 && bits[n] <= 8, "group_quantize: bits must be 1 to 8");
            first.push_back(total);
            total += bits[n];
        }
        starts = first.data();
        require(static_cast<std::int64_t>(codes) == total * groups_per_sample(*this) * (group / 8), "group_quantize: size of codes");
        require(static_cast<std::int64_t>(meta) == 2 * samples * groups_per_sample(*this), "group_quantize: size of meta");
    }
    Checked(const Checked &) = delete;
};

// scale, shift: of the channels, `inner` values of one lie together; empty packs x as it is.
template <class T>
static void quantize(In<T> x, In<float> scale, In<float> shift, std::int64_t inner, In<std::int32_t> bits,
                     std::int64_t group, Out<std::uint8_t> codes, Out<std::int16_t> meta, std::uint64_t key, bool stochastic,
                     int threads) {
    const Checked g(bits, x.size(), group, codes.size(), meta.size());
    const Normal by = {scale.data(), shift.data(), static_cast<std::int64_t>(scale.size()), inner};
    require(scale.size() == shift.size() && (by.channels == 0 || (inner > 0 && g.values % (by.channels * inner) == 0)),
            "group_quantize: scale and shift do not fit x");
    const Normal *normal = by.channels > 0 ? &by : nullptr;
    if constexpr (std::is_same_v<T, float>) {
        HASTEN_PICK(group_quantize)(g, x.data(), normal, codes.data(), values(meta), key, stochastic, threads);
    } else {
        HASTEN_PICK(group_quantize_bfloat16)(g, values(x), normal, codes.data(), values(meta), key, stochastic, threads);
    }
}

template <class T>
static void dequantize(In<std::uint8_t> codes, In<std::int16_t> meta, In<std::int32_t> bits, std::int64_t group, Out<T> x,
                       int threads) {
    const Checked g(bits, x.size(), group, codes.size(), meta.size());
    if constexpr (std::is_same_v<T, float>) {
        HASTEN_PICK(group_dequantize)(g, codes.data(), values(meta), x.data(), threads);
    } else {
        HASTEN_PICK(group_dequantize_bfloat16)(g, codes.data(), values(meta), values(x), threads);
    }
}

template <class T>
static void spread(In<T> x, std::int64_t group, Out<float> result, int threads) {
    Groups g = {};
    g.samples = static_cast<std::int64_t>(result.size());
    g.group = group;
    require(g.samples > 0 && x.size() > 0 && x.size() % result.size() == 0, "group_spread: x must hold whole samples");
    require(group > 0, "group_spread: the group's size is not allowed");
    g.values = static_cast<std::int64_t>(x.size()) / g.samples;
    if constexpr (std::is_same_v<T, float>) {
        HASTEN_PICK(group_spread)(g, x.data(), result.data(), threads);
    } else {
        HASTEN_PICK(group_spread_bfloat16)(g, values(x), result.data(), threads);
    }
}

// Without noconvert a tensor of another type would be copied into one of the first form's, and its result be lost.
template <class T>
static void offer(nb::module_ &m) {
    using nb::literals::operator""_a;
    const nb::call_guard<nb::gil_scoped_release> free;
    m.def("group_quantize", &quantize<T>, "x"_a.noconvert(), "scale"_a.noconvert(), "shift"_a.noconvert(), "inner"_a,
          "bits"_a.noconvert(), "group"_a, "codes"_a.noconvert(), "meta"_a.noconvert(), "key"_a, "stochastic"_a, "threads"_a,
          free);
    m.def("group_dequantize", &dequantize<T>, "codes"_a.noconvert(), "meta"_a.noconvert(), "bits"_a.noconvert(),
          "group"_a, "x"_a.noconvert(), "threads"_a, free);
    m.def("group_spread", &spread<T>, "x"_a.noconvert(), "group"_a, "result"_a.noconvert(), "threads"_a, free);
}

static const Binding binding([](nb::module_ &m) {
    offer<float>(m);
    offer<std::int16_t>(m);
});

}  // namespace hasten
