// Groups of any row length in plain C++, and what the vector form shares with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "group_quantize.h"
#include "noise.h"

namespace hasten {
namespace HASTEN_ISA {
namespace {

constexpr std::int64_t TASK = 64;      // groups a task takes
constexpr int ROWS = 16;               // a group is ROWS rows of L values; a row is what one vector holds
constexpr float SMALLEST = 0x1p-110F;  // of a step, so that 2^17 / step stays finite
constexpr float SHARE = 0x1p17F;       // codes are cut from fixed-point numbers with 17 bits behind the point
constexpr double ROOM = 1.000001;      // so that rounding cannot carry the largest value beyond the last code

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}

inline float widened(float x) { return x; }
inline float widened(std::uint16_t x) { return float_of(static_cast<std::uint32_t>(x) << 16); }
inline void narrow(float x, float *y) { *y = x; }
inline void narrow(float x, std::uint16_t *y) {
    const std::uint32_t bits = bits_of(x);
    *y = static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// What the codes of one group mean: code q stands for lowest + q * step. Both are bfloat16 numbers, rounded outwards
// before anything is quantised, so that what is stored is exactly what was used.
struct Frame {
    float lowest, step, scale;  // scale = 2^17 / step
    bool bad;
};

inline Frame frame_of(float low, float high, bool odd, int bits) {
    Frame f;
    const std::uint32_t lowest = bits_of(low + 0.0F);  // + 0: no negative zero
    f.lowest = float_of((lowest + (lowest >> 31) * 0xffffU) & 0xffff0000U);
    const float part = static_cast<float>(ROOM / ((1 << bits) - 1));
    f.step = float_of((bits_of((high - f.lowest) * part) + 0xffffU) & 0xffff0000U);
    f.bad = odd || !(f.step < INFINITY);
    if (f.step < SMALLEST) f.step = SMALLEST;
    if (f.bad) f.lowest = f.step = float_of(0x7fc00000U);
    f.scale = SHARE / f.step;
    return f;
}

inline void store_frame(const Frame &f, std::uint16_t *meta) {
    meta[0] = static_cast<std::uint16_t>(bits_of(f.lowest) >> 16);
    meta[1] = static_cast<std::uint16_t>(bits_of(f.step) >> 16);
}

// A code of b bits is cut into fields of 8, 4, 2 and 1 bits, low bits first; b tells which there are. A field of F bits
// takes L * 2 * F bytes: words of 32 bits (16 for F = 1), of which word (w, lane) holds the rows from w * 32 / F on.
// (Rows of a lane lie above one another: packing and unpacking are shifts of whole vectors.)

template <int F, class Word>
inline std::uint8_t *pack_field(const std::int32_t *q, int L, int shift, std::uint8_t *codes) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    for (int first = 0; first < ROWS; first += rows) {
        for (int lane = 0; lane < L; ++lane) {
            std::uint32_t word = 0;
            for (int r = 0; r < rows; ++r)
                word |= ((static_cast<std::uint32_t>(q[(first + r) * L + lane]) >> shift) & ((1U << F) - 1)) << (F * r);
            const Word kept = static_cast<Word>(word);
            std::memcpy(codes + lane * sizeof(Word), &kept, sizeof(Word));
        }
        codes += L * sizeof(Word);
    }
    return codes;
}

template <int F, class Word>
inline const std::uint8_t *unpack_field(const std::uint8_t *codes, int L, int shift, std::int32_t *q) {
    constexpr int rows = F == 1 ? ROWS : 32 / F;
    for (int first = 0; first < ROWS; first += rows) {
        for (int r = 0; r < rows; ++r) {
            for (int lane = 0; lane < L; ++lane) {
                Word word;
                std::memcpy(&word, codes + lane * sizeof(Word), sizeof(Word));
                const std::uint32_t part = (static_cast<std::uint32_t>(word) >> (F * r)) & ((1U << F) - 1);
                q[(first + r) * L + lane] |= static_cast<std::int32_t>(part << shift);
            }
        }
        codes += L * sizeof(Word);
    }
    return codes;
}

template <class T>
void quantise_any(const T *x, int L, int bits, std::uint64_t key, std::int64_t element, bool stochastic,
                  std::uint16_t *meta, std::uint8_t *codes) {
    const int n = ROWS * L;
    float low = widened(x[0]), high = low, odd = 0;
    for (int i = 0; i < n; ++i) {
        const float v = widened(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        odd += v * 0.0F;
    }
    const Frame f = frame_of(low, high, odd != 0, bits);
    store_frame(f, meta);
    if (f.bad) {
        std::memset(codes, 0, static_cast<std::size_t>(L * 2 * bits));
        return;
    }
    std::int32_t q[LARGEST_GROUP];
    for (int i = 0; i < n; i += 32) {
        std::int32_t noise[32];
        if (stochastic) {
            const std::uint64_t word = static_cast<std::uint64_t>(element + i) / 2;
            for (int lane = 0; lane < 16; ++lane) {
                const std::uint32_t w = noise_word(key, word + static_cast<std::uint64_t>(lane));
                noise[lane] = static_cast<std::int32_t>(2 * (w & 0xffffU) + 1);
                noise[16 + lane] = static_cast<std::int32_t>(2 * (w >> 16) + 1);
            }
        } else {
            for (int lane = 0; lane < 32; ++lane) noise[lane] = 1 << 16;
        }
        for (int lane = 0; lane < 32; ++lane) {
            const float t = (widened(x[i + lane]) - f.lowest) * f.scale;
            q[i + lane] = (static_cast<std::int32_t>(t) + noise[lane]) >> 17;
        }
    }
    int shift = 0;
    if (bits & 8) codes = pack_field<8, std::uint32_t>(q, L, shift, codes), shift += 8;
    if (bits & 4) codes = pack_field<4, std::uint32_t>(q, L, shift, codes), shift += 4;
    if (bits & 2) codes = pack_field<2, std::uint32_t>(q, L, shift, codes), shift += 2;
    if (bits & 1) pack_field<1, std::uint16_t>(q, L, shift, codes);
}

template <class T>
void dequantise_any(const std::uint8_t *codes, const std::uint16_t *meta, int L, int bits, T *x) {
    const float lowest = widened(meta[0]), step = widened(meta[1]);
    const int n = ROWS * L;
    std::int32_t q[LARGEST_GROUP];
    std::memset(q, 0, static_cast<std::size_t>(n) * sizeof(q[0]));
    int shift = 0;
    if (bits & 8) codes = unpack_field<8, std::uint32_t>(codes, L, shift, q), shift += 8;
    if (bits & 4) codes = unpack_field<4, std::uint32_t>(codes, L, shift, q), shift += 4;
    if (bits & 2) codes = unpack_field<2, std::uint32_t>(codes, L, shift, q), shift += 2;
    if (bits & 1) unpack_field<1, std::uint16_t>(codes, L, shift, q);
    for (int i = 0; i < n; ++i) narrow(lowest + static_cast<float>(q[i]) * step, x + i);
}

template <class T>
float range_any(const T *x, std::int64_t n) {
    float low = widened(x[0]), high = low, odd = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const float v = widened(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        odd += v * 0.0F;
    }
    return high - low + odd;
}

}  // namespace
}  // namespace HASTEN_ISA
}  // namespace hasten
