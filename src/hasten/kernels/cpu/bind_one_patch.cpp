#include "binding.h"
#include "one_patch.h"

namespace hasten {

static constexpr std::int64_t NEAR = 1 << 18;  // floats of x that a group may hold: 1 MiB, half of a large second-level cache

static std::int64_t padded(const OnePatch &s) { return (s.hi + 2 * s.ph) * (s.wi + 2 * s.pw) * s.c; }

// A copy pays where the patches hold more elements than the image, or where x has no rows of channels to read.
static bool copies(const OnePatch &s) { return !s.x_last || s.o * s.kh * s.kw > 2 * s.hi * s.wi; }

std::int64_t one_patch_group(const OnePatch &s) {
    const std::int64_t each = padded(s), fits = each > 0 ? NEAR / each : 1;
    const std::int64_t group = fits < 1 ? 1 : fits > 64 ? 64 : fits;
    return group < s.n ? group : s.n > 0 ? s.n : 1;
}

std::int64_t one_patch_scratch(const OnePatch &s) { return copies(s) ? one_patch_group(s) * padded(s) : 0; }

static OnePatch shape(nb::tuple sizes, bool half, bool grad_last, bool x_last, int position, int weight) {
    require(sizes.size() == 13, "one_patch: sizes must be n, o, ho, wo, c, hi, wi, kh, kw, sh, sw, ph, pw");
    std::int64_t v[13];
    for (int k = 0; k < 13; ++k) v[k] = nb::cast<std::int64_t>(sizes[k]);
    const OnePatch s{v[0], v[1], v[2], v[3], v[4],  v[5],  v[6],      v[7],   v[8],
                     v[9], v[10], v[11], v[12], half, grad_last, x_last, position, weight};
    for (int k = 0; k < 11; ++k) require(v[k] >= (k == 0 ? 0 : 1), "one_patch: every size must be positive");
    require(s.ph >= 0 && s.pw >= 0, "one_patch: padding must not be negative");
    require((s.ho - 1) * s.sh + s.kh <= s.hi + 2 * s.ph && (s.wo - 1) * s.sw + s.kw <= s.wi + 2 * s.pw,
            "one_patch: grad_output is larger than this convolution's output");
    require(s.ho <= (1 << 15) && s.wo <= (1 << 15), "one_patch: a map has too many places");
    require(0 <= position && position <= 2 && 0 <= weight && weight <= 1, "one_patch: unknown variant");
    return s;
}

template <class T>
static void one_patch(In<T> grad_output, In<T> x, Out<float> grad_weight, Out<float> t, Out<std::int32_t> q,
                      Out<float> scratch, nb::tuple sizes, bool grad_last, bool x_last, int position, int weight,
                      int threads) {
    const OnePatch s = shape(sizes, sizeof(T) == 2, grad_last, x_last, position, weight);
    const auto holds = [](std::size_t have, std::int64_t need) { return static_cast<std::int64_t>(have) == need; };
    require(holds(grad_output.size(), s.n * s.o * s.ho * s.wo), "one_patch: grad_output has another size");
    require(holds(x.size(), s.n * s.c * s.hi * s.wi), "one_patch: x has another size");
    require(holds(grad_weight.size(), s.o * s.c * s.kh * s.kw), "one_patch: grad_weight has another size");
    require(holds(t.size(), s.n * s.o) && holds(q.size(), s.n * s.o), "one_patch: t and q must be (n, o)");
    require(holds(scratch.size(), one_patch_scratch(s)), "one_patch: scratch has another size");
    nb::gil_scoped_release release;
    HASTEN_PICK(one_patch)(s, grad_output.data(), x.data(), grad_weight.data(), t.data(), q.data(), scratch.data(),
                           threads);
}

static const Binding binding([](nb::module_ &m) {
    m.def("one_patch", &one_patch<float>);
    m.def("one_patch", &one_patch<std::int16_t>);
    m.def("one_patch_scratch", [](nb::tuple sizes, bool x_last) {
        return one_patch_scratch(shape(sizes, false, true, x_last, 0, 0));
    });
});

}  // namespace hasten
