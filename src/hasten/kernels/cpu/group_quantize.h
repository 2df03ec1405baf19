#pragma once

#include <cstdint>

#include "isa.h"

namespace hasten {

// N samples of `values` numbers each, in groups of `group` = 16 L (L even, at most 256); the last group of a sample is
// filled up with the sample's last value. bits[n] in 1..8; starts[n] = bits[0] + ... + bits[n - 1].
struct Groups {
    std::int64_t samples, values, group;
    const std::int32_t *bits;
    const std::int64_t *starts;
};

static inline std::int64_t groups_per_sample(const Groups &g) { return (g.values + g.group - 1) / g.group; }

constexpr std::int64_t LARGEST_GROUP = 4096;

// What is packed is x * scale[c] + shift[c], rounded once; value i of a sample belongs to channel c = i / inner % channels.
struct Normal {
    const float *scale, *shift;
    std::int64_t channels, inner;
};

}  // namespace hasten

// codes: group * (sum of bits) * per_sample / 8 bytes; meta: (lowest, step) of each group as bfloat16.
// normal: null packs x as it is.
HASTEN_EACH_ISA(void group_quantize(const Groups &groups, const float *x, const Normal *normal, std::uint8_t *codes,
                                    std::uint16_t *meta, std::uint64_t key, bool stochastic, int threads);
                void group_quantize_bfloat16(const Groups &groups, const std::uint16_t *x, const Normal *normal,
                                    std::uint8_t *codes, std::uint16_t *meta, std::uint64_t key, bool stochastic, int threads);
                void group_dequantize(const Groups &groups, const std::uint8_t *codes, const std::uint16_t *meta,
                                      float *x, int threads);
                void group_dequantize_bfloat16(const Groups &groups, const std::uint8_t *codes, const std::uint16_t *meta,
                                      std::uint16_t *x, int threads);
                void group_spread(const Groups &groups, const float *x, float *spread, int threads);
                void group_spread_bfloat16(const Groups &groups, const std::uint16_t *x, float *spread, int threads))
