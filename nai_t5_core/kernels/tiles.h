// What all kernels share: the order of rows and weights in memory, and the product of a tile with a panel.
//
// A product takes rows (activations) in tiles of up to 12, and weights in panels of 32 columns. Both advance along the
// summed dimension in steps of four bytes: a pair of bfloat16, as the instruction vdpbf16ps adds them, or one float32. A
// tile is [steps][rows], a panel [steps][32]. The sums of a tile and a panel stay in registers (12 · 2 of 32), in
// float32, until all steps are done. Every element is summed in the same order whatever is computed beside it.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>

using Step = int32_t;

constexpr long kTileRows = 12;
constexpr long kLanes = 16;  // float32 numbers in a register
constexpr long kPanelColumns = 2 * kLanes;
constexpr long kPrefetchSteps = 64;  // 8 KiB: about what is on its way from memory at any time

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

// ---------------------------------------------------------------------------------------------------------------------
// What is computed in
// ---------------------------------------------------------------------------------------------------------------------

struct Bfloat16 {
    using Number = uint16_t;
    static constexpr long kPerStep = 2;

    static __m512 add_products(__m512 sums, __m512i row, __m512i columns) {
        return _mm512_dpbf16_ps(sums, (__m512bh)row, (__m512bh)columns);
    }
    static __m512 widened(__m256i numbers) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
    }
    static __m512 load(const Number* place, __mmask16 lanes) {
        return widened(_mm256_maskz_loadu_epi16(lanes, place));
    }
    static void store(Number* place, __mmask16 lanes, __m512 values) {
        _mm256_mask_storeu_epi16(place, lanes, (__m256i)_mm512_cvtneps_pbh(values));
    }
    static __m512 rounded(__m512 values) { return widened((__m256i)_mm512_cvtneps_pbh(values)); }
    static long put_steps(Step* steps, __m512 values) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(steps), (__m256i)_mm512_cvtneps_pbh(values));
        return kLanes / kPerStep;
    }
};

struct Float32 {
    using Number = float;
    static constexpr long kPerStep = 1;

    static __m512 add_products(__m512 sums, __m512i row, __m512i columns) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(columns), sums);
    }
    static __m512 load(const Number* place, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, place); }
    static void store(Number* place, __mmask16 lanes, __m512 values) { _mm512_mask_storeu_ps(place, lanes, values); }
    static __m512 rounded(__m512 values) { return values; }
    static long put_steps(Step* steps, __m512 values) {
        _mm512_store_ps(steps, values);
        return kLanes;
    }
};

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
template <class Kind>
void put_in_tile(Step* tile, long rows, long row, long column, __m512 values, long count) {
    alignas(64) Step steps[kLanes];
    const long all = Kind::put_steps(steps, values), present = (count + Kind::kPerStep - 1) / Kind::kPerStep;
    Step* place = tile + column / Kind::kPerStep * rows + row;
    for (long step = 0; step < std::min(all, present); step++) place[step * rows] = steps[step];
}

// ---------------------------------------------------------------------------------------------------------------------
// The product
// ---------------------------------------------------------------------------------------------------------------------

// As many bytes as the panel has, from `ahead` on, are brought into the second-level cache meanwhile.
template <class Kind, int rows>
void multiply_exactly(const Step* tile, const Step* panel, const void* ahead, long steps, __m512 (*sums_of_rows)[2]) {
    __m512 sums[rows][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (long step = 0; step < steps; step++, panel += kPanelColumns, tile += rows) {
        const __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + kLanes);
        _mm_prefetch(static_cast<const Step*>(ahead) + step * kPanelColumns, _MM_HINT_T1);
        _mm_prefetch(static_cast<const Step*>(ahead) + step * kPanelColumns + kLanes, _MM_HINT_T1);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            const __m512i numbers = _mm512_set1_epi32(tile[row]);
            sums[row][0] = Kind::add_products(sums[row][0], numbers, left);
            sums[row][1] = Kind::add_products(sums[row][1], numbers, right);
        }
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        sums_of_rows[row][0] = sums[row][0];
        sums_of_rows[row][1] = sums[row][1];
    }
}

// Calls finish(row, left sums, right sums) for each row of a tile.
template <class Kind, class Finish>
void multiply_tile(long rows, const Step* tile, const Step* panel, const void* ahead, long steps, Finish finish) {
    __m512 sums[kTileRows][2];
    switch (rows) {
        case 1: multiply_exactly<Kind, 1>(tile, panel, ahead, steps, sums); break;
        case 2: multiply_exactly<Kind, 2>(tile, panel, ahead, steps, sums); break;
        case 3: multiply_exactly<Kind, 3>(tile, panel, ahead, steps, sums); break;
        case 4: multiply_exactly<Kind, 4>(tile, panel, ahead, steps, sums); break;
        case 5: multiply_exactly<Kind, 5>(tile, panel, ahead, steps, sums); break;
        case 6: multiply_exactly<Kind, 6>(tile, panel, ahead, steps, sums); break;
        case 7: multiply_exactly<Kind, 7>(tile, panel, ahead, steps, sums); break;
        case 8: multiply_exactly<Kind, 8>(tile, panel, ahead, steps, sums); break;
        case 9: multiply_exactly<Kind, 9>(tile, panel, ahead, steps, sums); break;
        case 10: multiply_exactly<Kind, 10>(tile, panel, ahead, steps, sums); break;
        case 11: multiply_exactly<Kind, 11>(tile, panel, ahead, steps, sums); break;
        default: multiply_exactly<Kind, 12>(tile, panel, ahead, steps, sums);
    }
    for (long row = 0; row < rows; row++) finish(row, sums[row][0], sums[row][1]);
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of float32 numbers; not-a-number stays what it is
// ---------------------------------------------------------------------------------------------------------------------

// e^x with a relative error below 2e-7, infinite where float32 ends: 2^n · e^r with n = round(x / ln 2), and a
// polynomial for e^r.
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
