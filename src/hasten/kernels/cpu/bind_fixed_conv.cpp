#include "binding.h"
#include <nanobind/stl/vector.h>

#include "fixed_conv.h"

namespace hasten {

using Numbers = std::vector<std::int64_t>;

// Fills scratch with x, converted; sizes: images, channels, rows, columns, height, width, padded channels, top, left, spread
// of rows and columns; place: start and strides of (image, channel, row, column) in x.
static std::int32_t fixed_pack_x(In<float> x, const Numbers &place, Out<std::int16_t> scratch, const Numbers &sizes,
                                 float scale, int threads) {
    require(place.size() == 5 && sizes.size() == 11, "fixed_pack_x: wrong number of sizes");
    require(static_cast<std::int64_t>(scratch.size()) == sizes[0] * sizes[4] * sizes[5] * sizes[6], "fixed_pack_x: scratch");
    require((sizes[2] - 1) * sizes[9] + sizes[7] < sizes[4] && (sizes[3] - 1) * sizes[10] + sizes[8] < sizes[5] &&
                sizes[7] >= 0 && sizes[8] >= 0 && sizes[1] <= sizes[6],
            "fixed_pack_x: the image does not fit");
    std::int64_t last = place[0];
    for (int d = 0; d < 4; ++d) last += (sizes[static_cast<std::size_t>(d)] - 1) * place[static_cast<std::size_t>(d) + 1];
    require(place[0] >= 0 && last < static_cast<std::int64_t>(x.size()), "fixed_pack_x: strides leave x");
    const Source src{x.data() + place[0], place[1], place[2], place[3], place[4]};
    return HASTEN_PICK(fixed_pack_x)(src, sizes[0], sizes[1], sizes[2], sizes[3], scratch.data(), sizes[4], sizes[5], sizes[6],
                                     sizes[7], sizes[8], sizes[9], sizes[10], scale, threads);
}

static FixedConv shape_of(const Numbers &n) {
    require(n.size() == 13, "fixed_conv: wrong number of sizes");
    const FixedConv s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], n[10], n[11], n[12]};
    for (const std::int64_t value : n) require(value > 0, "fixed_conv: sizes must be above 0");
    require(s.channels % 2 == 0, "fixed_conv: the number of channels must be even");
    require((s.out_height - 1) * s.stride_rows + (s.tap_rows - 1) * s.dilation_rows < s.height &&
                (s.out_width - 1) * s.stride_columns + (s.tap_columns - 1) * s.dilation_columns < s.width,
            "fixed_conv: the filter leaves the image");
    return s;
}

static std::int64_t packed(const FixedConv &s) {
    return (s.outputs + FIXED_LANES - 1) / FIXED_LANES * FIXED_LANES * s.tap_rows * s.tap_columns * s.channels;
}

static void fixed_pack_w(In<float> w, const Numbers &place, const Numbers &shape, std::int64_t real, Out<std::int16_t> scratch,
                         float scale, int threads) {
    const FixedConv s = shape_of(shape);
    require(static_cast<std::int64_t>(scratch.size()) == packed(s) && real <= s.channels && real > 0, "fixed_pack_w: scratch");
    const std::int64_t ends[4] = {s.outputs - 1, real - 1, s.tap_rows - 1, s.tap_columns - 1};
    std::int64_t low = place[0], high = place[0];
    for (std::size_t d = 0; d < 4; ++d) (place[d + 1] < 0 ? low : high) += ends[d] * place[d + 1];
    require(low >= 0 && high < static_cast<std::int64_t>(w.size()), "fixed_pack_w: strides leave w");
    const Source src{w.data() + place[0], place[1], place[2], place[3], place[4]};
    HASTEN_PICK(fixed_pack_w)(src, s, real, scratch.data(), scale, threads);
}

static bool fixed_conv(In<std::int16_t> x, In<std::int16_t> w, Out<float> y, const Numbers &shape, std::int32_t largest,
                       float scale, int threads) {
    const FixedConv s = shape_of(shape);
    require(static_cast<std::int64_t>(x.size()) == s.images * s.height * s.width * s.channels, "fixed_conv: x");
    require(static_cast<std::int64_t>(w.size()) == packed(s), "fixed_conv: w");
    require(static_cast<std::int64_t>(y.size()) == s.images * s.out_height * s.out_width * s.outputs, "fixed_conv: y");
    return HASTEN_PICK(fixed_conv)(s, x.data(), w.data(), largest, y.data(), scale, threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("fixed_pack_x", &fixed_pack_x, nb::call_guard<nb::gil_scoped_release>());
    m.def("fixed_pack_w", &fixed_pack_w, nb::call_guard<nb::gil_scoped_release>());
    m.def("fixed_conv", &fixed_conv, nb::call_guard<nb::gil_scoped_release>());
});

}  // namespace hasten
