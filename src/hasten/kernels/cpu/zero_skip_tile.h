// The inner loop of zero_skip: a tile of accumulators that stays in registers while a list of non-zeros passes.
#pragma once

#include <cstdint>

namespace hasten {
namespace HASTEN_ISA {

namespace {

// One non-zero element: where the row of the dense operand that it multiplies begins (in floats), and its value.
struct Entry {
    std::int32_t at;
    float value;
};

#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 24;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 12;
#else
constexpr int LANES = 4, REGISTERS = 12;
#endif
constexpr int WIDTH = 16;  // channels come in groups of 16, whatever the instruction set
constexpr int MAX_TAPS = 5, MAX_VECTORS = 24;

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

// Accumulators FIRST .. FIRST + COUNT of the tile. The pointers to the taps are kept from being folded into indexed
// addresses, which would cost a micro-operation for every vector.
template <int L, int FIRST, int COUNT>
inline void part(const Entry *entries, std::int64_t n, const float *rows, std::int64_t row_step, float *out,
                 std::int64_t out_step) {
    constexpr int EACH = L * WIDTH / LANES;  // vectors of one tap
    constexpr int TAP = FIRST / EACH, TAPS = (FIRST + COUNT - 1) / EACH - TAP + 1;
    Vector sum[COUNT];
#pragma GCC unroll 32
    for (int j = 0; j < COUNT; ++j)
        sum[j] = *reinterpret_cast<const Loose *>(out + (FIRST + j) / EACH * out_step + (FIRST + j) % EACH * LANES);
    const Entry *end = entries + n;
    rows += TAP * row_step;
    for (; entries != end; ++entries) {
        const float *row[TAPS];
        row[0] = rows + entries->at;
#pragma GCC unroll 8
        for (int r = 1; r < TAPS; ++r) {
            row[r] = row[r - 1] + row_step;
            __asm__("" : "+r"(row[r]));
        }
        __asm__("" : "+r"(row[0]));
        const float value = entries->value;
#pragma GCC unroll 32
        for (int j = 0; j < COUNT; ++j)
            sum[j] += value * *reinterpret_cast<const Loose *>(row[(FIRST + j) / EACH - TAP] + (FIRST + j) % EACH * LANES);
    }
#pragma GCC unroll 32
    for (int j = 0; j < COUNT; ++j)
        *reinterpret_cast<Loose *>(out + (FIRST + j) / EACH * out_step + (FIRST + j) % EACH * LANES) = sum[j];
}

template <int L, int FIRST, int TOTAL>
inline void parts(const Entry *entries, std::int64_t n, const float *rows, std::int64_t row_step, float *out,
                  std::int64_t out_step) {
    constexpr int COUNT = TOTAL - FIRST < REGISTERS ? TOTAL - FIRST : REGISTERS;
    part<L, FIRST, COUNT>(entries, n, rows, row_step, out, out_step);
    if constexpr (FIRST + COUNT < TOTAL) parts<L, FIRST + COUNT, TOTAL>(entries, n, rows, row_step, out, out_step);
}

// out[r, j] += sum of value_i * rows[at_i + r * row_step + j] for r < R taps and j < 16 L channels; taps of out lie
// out_step apart.
template <int R, int L>
void tile(const Entry *entries, std::int64_t n, const float *rows, std::int64_t row_step, float *out,
          std::int64_t out_step) {
    parts<L, 0, R * L * WIDTH / LANES>(entries, n, rows, row_step, out, out_step);
}

using Tile = void (*)(const Entry *, std::int64_t, const float *, std::int64_t, float *, std::int64_t);

template <int R>
inline Tile tile_of(int l) {
    switch (l) {
        case 1: return tile<R, 1>;
        case 2: return tile<R, 2>;
        case 3: return tile<R, 3>;
        case 4: return tile<R, 4>;
        case 5: if constexpr (R <= 4) return tile<R, 5>; break;
        case 6: if constexpr (R <= 4) return tile<R, 6>; break;
        case 7: if constexpr (R <= 3) return tile<R, 7>; break;
        case 8: if constexpr (R <= 3) return tile<R, 8>; break;
        case 12: if constexpr (R <= 2) return tile<R, 12>; break;
        case 16: if constexpr (R <= 1) return tile<R, 16>; break;
        case 24: if constexpr (R <= 1) return tile<R, 24>; break;
    }
    return nullptr;
}

// The tile of r taps and l vectors of 16 channels; there is one where vectors_of could return l.
inline Tile tile_of(int r, int l) {
    switch (r) {
        case 1: return tile_of<1>(l);
        case 2: return tile_of<2>(l);
        case 3: return tile_of<3>(l);
        case 4: return tile_of<4>(l);
        default: return tile_of<5>(l);
    }
}

// How many vectors of 16 channels a tile of `taps` taps takes, of `all`: at most `limit` accumulators, in as few
// chunks as that allows, as even as that allows. More than 8 only if that leaves no rest.
inline int vectors_of(std::int64_t all, int taps, int limit) {
    static const int sizes[] = {24, 16, 12, 8, 7, 6, 5, 4, 3, 2, 1};
    int best = 1;
    std::int64_t fewest = all + 1;
    for (const int l : sizes) {
        if (l > 1 && (l * taps > limit || (l > 8 && all % l != 0) || l > all)) continue;
        const std::int64_t chunks = (all + l - 1) / l;
        if (chunks <= fewest) best = l, fewest = chunks;
    }
    return best;
}

}  // namespace

}  // namespace HASTEN_ISA
}  // namespace hasten
