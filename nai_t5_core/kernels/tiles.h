// What all kernels share: the order of rows and weights in memory, and the product of a tile with a panel.
//
// A product takes rows (activations) in tiles of up to 12, and weights in panels of 32 columns. Both hold pairs of
// bfloat16 along the summed dimension, as the instruction vdpbf16ps adds them: a tile is [pairs][rows][2], a panel is
// [pairs][32][2]. The sums of a tile and a panel stay in registers (12 · 2 of 32), in float32, until all pairs are
// added. Every element is summed in the same order whatever is computed beside it.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

using bfloat16 = uint16_t;

constexpr long kTileRows = 12;
constexpr long kLanes = 16;  // float32 numbers in a register
constexpr long kPanelColumns = 2 * kLanes;
constexpr long kPanelPair = 2 * kPanelColumns;  // numbers of a panel that belong to one pair
constexpr long kPrefetchPairs = 64;             // 8 KiB: about what is on its way from memory at any time

enum Status { kOk = 0, kOutOfMemory = 1 };

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

struct Release {
    void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Release>;

// Uninitialised; null where there is no memory.
template <class T>
Buffer<T> allocate(long count) {
    const long line = 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(line, (count * sizeof(T) + line - 1) / line * line)));
}

inline __mmask16 first_lanes(long count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widened(__m256i values) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16)); }

inline __m256i rounded(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

// ---------------------------------------------------------------------------------------------------------------------
// Rows in tiles
// ---------------------------------------------------------------------------------------------------------------------

// Rows shared out evenly among as few tiles as possible.
struct Tiles {
    long rows, count;

    explicit Tiles(long rows) : rows(rows), count((rows + kTileRows - 1) / kTileRows) {}
    long start(long tile) const { return tile * rows / count; }
    long size(long tile) const { return start(tile + 1) - start(tile); }
};

// Puts up to 16 numbers of one row of a tile, those from `column` on, into their places.
inline void put_in_tile(bfloat16* tile, long rows, long row, long column, __m256i values, long count) {
    alignas(32) int32_t pairs[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), values);
    int32_t* place = reinterpret_cast<int32_t*>(tile) + column / 2 * rows + row;
    for (long pair = 0; pair < (count + 1) / 2; pair++) place[pair * rows] = pairs[pair];
}

// ---------------------------------------------------------------------------------------------------------------------
// The product
// ---------------------------------------------------------------------------------------------------------------------

// Calls finish(row, left sums, right sums) for each row of a tile. As many bytes as the panel has, from `ahead` on, are
// brought into the second-level cache meanwhile.
template <int rows, class Finish>
__attribute__((noinline)) void multiply_exactly(const bfloat16* tile, const bfloat16* panel, const void* ahead, long pairs, Finish finish) {
    __m512 sums[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (long pair = 0; pair < pairs; pair++, panel += kPanelPair, tile += 2 * rows) {
        const __m512bh left = (__m512bh)_mm512_loadu_si512(panel);
        const __m512bh right = (__m512bh)_mm512_loadu_si512(panel + kPanelPair / 2);
        _mm_prefetch(static_cast<const char*>(ahead) + pair * 128, _MM_HINT_T1);
        _mm_prefetch(static_cast<const char*>(ahead) + pair * 128 + 64, _MM_HINT_T1);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            const __m512bh both = (__m512bh)_mm512_set1_epi32(*reinterpret_cast<const int32_t*>(tile + 2 * row));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], both, left);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], both, right);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) finish(row, sums[row][0], sums[row][1]);
}

template <class Finish>
void multiply_tile(long rows, const bfloat16* tile, const bfloat16* panel, const void* ahead, long pairs, Finish finish) {
    switch (rows) {
        case 1: return multiply_exactly<1>(tile, panel, ahead, pairs, finish);
        case 2: return multiply_exactly<2>(tile, panel, ahead, pairs, finish);
        case 3: return multiply_exactly<3>(tile, panel, ahead, pairs, finish);
        case 4: return multiply_exactly<4>(tile, panel, ahead, pairs, finish);
        case 5: return multiply_exactly<5>(tile, panel, ahead, pairs, finish);
        case 6: return multiply_exactly<6>(tile, panel, ahead, pairs, finish);
        case 7: return multiply_exactly<7>(tile, panel, ahead, pairs, finish);
        case 8: return multiply_exactly<8>(tile, panel, ahead, pairs, finish);
        case 9: return multiply_exactly<9>(tile, panel, ahead, pairs, finish);
        case 10: return multiply_exactly<10>(tile, panel, ahead, pairs, finish);
        case 11: return multiply_exactly<11>(tile, panel, ahead, pairs, finish);
        default: return multiply_exactly<12>(tile, panel, ahead, pairs, finish);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of float32 numbers; not-a-number stays what it is
// ---------------------------------------------------------------------------------------------------------------------

// e^x with a relative error below 2e-7, infinite where float32 ends: 2^n · e^r with n = round(x / ln 2), and a polynomial for e^r.
inline __m512 exponential(__m512 x) {
    // The second operand is what comes out when either is not a number.
    x = _mm512_min_ps(_mm512_set1_ps(100.f), _mm512_max_ps(_mm512_set1_ps(-104.f), x));
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 sum = _mm512_set1_ps(1.f / 5040);
    for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(sum, n);
}

inline __m512 times_sigmoid(__m512 x, __m512 logit) {
    const __m512 one = _mm512_set1_ps(1.f);
    return _mm512_div_ps(x, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), logit))));
}

enum Activation { kNone = 0, kRelu = 1, kGeluTanh = 2, kSilu = 3 };

template <Activation activation>
inline __m512 activated(__m512 x) {
    if (activation == kRelu) return _mm512_max_ps(_mm512_setzero_ps(), x);
    if (activation == kSilu) return times_sigmoid(x, x);
    if (activation == kGeluTanh) {
        // (1 + tanh(u)) / 2 is the sigmoid of 2 u, here with u = √(2/π) · (x + 0.044715 x³).
        const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.044715f), _mm512_set1_ps(1.f));
        return times_sigmoid(x, _mm512_mul_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.59576912f)), cubic));
    }
    return x;
}
