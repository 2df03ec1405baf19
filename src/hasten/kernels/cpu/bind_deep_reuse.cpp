#include "binding.h"
#include "deep_reuse.h"

namespace hasten {

// sizes: the fields of DeepReuse in their order. Empty arrays stand for what is left out.
static DeepReuse shape_of(In<std::int64_t> sizes) {
    require(sizes.size() == 16, "deep_reuse: 16 sizes are needed");
    const std::int64_t *s = sizes.data();
    const DeepReuse of{s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9], s[10], s[11], s[12], s[13], s[14], s[15]};
    for (int i = 0; i < 16; ++i) require(s[i] >= (i == 11 || i == 12 ? 0 : 1), "deep_reuse: a size is too small");
    require(of.channels % of.length == 0 && of.images % of.groups == 0 && of.bits <= 32, "deep_reuse: sizes do not fit");
    require(of.height + 2 * of.pad_h >= of.kernel_h && of.width + 2 * of.pad_w >= of.kernel_w &&
                of.out_height == (of.height + 2 * of.pad_h - of.kernel_h) / of.stride_h + 1 &&
                of.out_width == (of.width + 2 * of.pad_w - of.kernel_w) / of.stride_w + 1,
            "deep_reuse: the output does not fit the input");
    return of;
}

static ReuseClusters clusters_of(const DeepReuse &of, const Out<std::int32_t> &ids, const Out<std::int32_t> &keys,
                                 const Out<std::int32_t> &counts, const Out<std::int32_t> &starts, const Out<float> &means,
                                 const Out<float> &scale) {
    const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
    const std::int64_t blocks = of.blocks(), pixels = of.pixels(), capacity = of.capacity();
    require(ids.size() == size(blocks * pixels) && keys.size() == size(blocks * capacity) &&
                counts.size() == size(blocks * capacity) && starts.size() == size(blocks * (of.groups + 1)) &&
                means.size() == size(blocks * capacity * of.length) &&
                (scale.size() == 0 || scale.size() == size(blocks * pixels)),
            "deep_reuse: arrays of clusters do not fit the sizes");
    return {ids.data(), keys.data(), counts.data(), starts.data(), means.data(), scale.size() ? scale.data() : nullptr};
}

template <class A>
static auto data_or_null(const A &a) {
    return a.size() ? a.data() : nullptr;
}

static void cluster(nb::ndarray<nb::c_contig, nb::device::cpu> x, bool half, In<float> v, In<float> shift,
                    In<std::int64_t> sizes, Out<std::int32_t> ids, Out<std::int32_t> keys, Out<std::int32_t> counts,
                    Out<std::int32_t> starts, Out<float> means, Out<float> scale, Out<std::int32_t> finite, int threads) {
    const DeepReuse of = shape_of(sizes);
    require(x.itemsize() == (half ? 2U : 4U) && x.size() == static_cast<std::size_t>(of.pixels() * of.channels) &&
                v.size() == static_cast<std::size_t>(of.length * 32) &&
                (shift.size() == 0 || shift.size() == static_cast<std::size_t>(of.blocks() * 32)) &&
                finite.size() == static_cast<std::size_t>(of.blocks()),
            "deep_reuse_cluster: arrays do not fit the sizes");
    const ReuseClusters to = clusters_of(of, ids, keys, counts, starts, means, scale);
    nb::gil_scoped_release release;
    HASTEN_PICK(deep_reuse_cluster)(x.data(), half, v.data(), data_or_null(shift), of, to, finite.data(), threads);
}

static void output(In<float> w, In<float> bias, In<float> z, In<std::int64_t> first, In<std::int64_t> sizes,
                   Out<std::int32_t> ids, Out<std::int32_t> keys, Out<std::int32_t> counts, Out<std::int32_t> starts,
                   Out<float> means, Out<float> scale, nb::ndarray<nb::c_contig, nb::device::cpu> y, bool half, int threads) {
    const DeepReuse of = shape_of(sizes);
    require(y.itemsize() == (half ? 2U : 4U) &&
                y.size() == static_cast<std::size_t>(of.images * of.out_height * of.out_width * of.outputs) &&
                w.size() == static_cast<std::size_t>(of.outputs * of.taps() * of.channels) &&
                (bias.size() == 0 || bias.size() == static_cast<std::size_t>(of.outputs)) &&
                (z.size() == 0 || first.size() == static_cast<std::size_t>(of.blocks() + 1)),
            "deep_reuse_output: arrays do not fit the sizes");
    const ReuseClusters from = clusters_of(of, ids, keys, counts, starts, means, scale);
    if (z.size())
        require(z.size() == static_cast<std::size_t>(first.data()[of.blocks()] * of.taps() * of.outputs),
                "deep_reuse_output: rows of products do not fit");
    nb::gil_scoped_release release;
    HASTEN_PICK(deep_reuse_output)(from, w.data(), data_or_null(bias), data_or_null(z), data_or_null(first), of, y.data(),
                                   half, threads);
}

static std::int64_t scratch(In<std::int64_t> sizes) { return HASTEN_PICK(deep_reuse_scratch)(shape_of(sizes)); }

static void gradients(nb::ndarray<nb::c_contig, nb::device::cpu> grad_output, bool half, In<float> w,
                      In<std::int64_t> sizes, Out<std::int32_t> ids, Out<std::int32_t> keys, Out<std::int32_t> counts,
                      Out<std::int32_t> starts, Out<float> means, Out<float> scale,
                      nb::ndarray<nb::c_contig, nb::device::cpu> grad_x, Out<float> grad_w, Out<float> room, int threads) {
    const DeepReuse of = shape_of(sizes);
    require(grad_output.itemsize() == (half ? 2U : 4U) && grad_x.itemsize() == grad_output.itemsize() &&
                grad_output.size() == static_cast<std::size_t>(of.images * of.out_height * of.out_width * of.outputs) &&
                w.size() == static_cast<std::size_t>(of.outputs * of.taps() * of.channels) &&
                (grad_x.size() == 0 || grad_x.size() == static_cast<std::size_t>(of.pixels() * of.channels)) &&
                (grad_w.size() == 0 || grad_w.size() == w.size()) &&
                room.size() >= static_cast<std::size_t>(HASTEN_PICK(deep_reuse_scratch)(of)),
            "deep_reuse_gradients: arrays do not fit the sizes");
    const ReuseClusters from = clusters_of(of, ids, keys, counts, starts, means, scale);
    void *to_x = grad_x.size() ? grad_x.data() : nullptr;
    nb::gil_scoped_release release;
    HASTEN_PICK(deep_reuse_gradients)(grad_output.data(), half, from, w.data(), of, to_x, data_or_null(grad_w), room.data(),
                                      threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("deep_reuse_cluster", &cluster);
    m.def("deep_reuse_output", &output);
    m.def("deep_reuse_scratch", &scratch);
    m.def("deep_reuse_gradients", &gradients);
});

}  // namespace hasten
