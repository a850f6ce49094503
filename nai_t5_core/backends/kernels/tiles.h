// What all kernels share: the order of rows and weights in memory, and the product of a tile with a panel.
//
// A product takes rows (activations) in tiles of up to 12, and weights in panels of 32 columns. Both advance along the
// summed dimension in steps of four bytes: a pair of bfloat16, as the instruction vdpbf16ps adds them, one float32, or
// four bytes of the 8-bit form (vpdpbusd). A tile is [steps][rows], a panel [steps][32]. The sums of a tile and a panel
// stay in registers (12 · 2 of 32), in float32 or int32, until all steps are done. Every element is summed in the same
// order whatever is computed beside it.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <type_traits>

using Step = int32_t;

constexpr long kTileRows = 12;
constexpr long kLanes = 16;  // float32 numbers in a register
constexpr long kPanelColumns = 2 * kLanes;
constexpr long kFloat32Part = 128;  // steps that are summed at once
constexpr long kPrefetchSteps = 64;  // 8 KiB: about what is on its way from memory at any time

enum Status { kOk = 0, kOutOfMemory = 1, kWrongDocuments = 2 };

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

// Of each: Number is what activations are stored as, Weight what the numbers of a weight in panels are, kPerStep how many of
// them a step has, and kTrailing how many more steps of 32 columns end a panel.

struct Bfloat16 {
    using Number = uint16_t;
    using Weight = uint16_t;
    static constexpr long kPerStep = 2, kTrailing = 0;

    static __m512 add_products(__m512 sums, __m512i row, __m512i columns) {
        return _mm512_dpbf16_ps(sums, (__m512bh)row, (__m512bh)columns);
    }
    static __m512 finished(__m512 sums, float, const Step*) { return sums; }
    static __m512 widened(__m256i numbers) {
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(numbers), 16));
    }
    static __m512 load(const Number* place, __mmask16 lanes) {
        return widened(_mm256_maskz_loadu_epi16(lanes, place));
    }
    static void store(Number* place, __mmask16 lanes, __m512 values) {
        _mm256_mask_storeu_epi16(place, lanes, (__m256i)_mm512_cvtneps_pbh(values));
    }
    // Sixteen steps of a row whose numbers from an offset on are numbers(offset).
    template <class Numbers>
    static __m512i steps(Numbers numbers) {
        const __m512 low = numbers(0);
        return (__m512i)_mm512_cvtne2ps_pbh(numbers(kLanes), low);
    }
    static __m512 added_up(__m512i steps) {
        const __m512i high = _mm512_and_si512(steps, _mm512_set1_epi32(int(0xffff0000u)));
        return _mm512_add_ps(_mm512_castsi512_ps(_mm512_slli_epi32(steps, 16)), _mm512_castsi512_ps(high));
    }
    // One step of sixteen columns, from the rows that it consists of; zeros for a row that is null.
    static __m512i step_of_columns(const Number* first, const Number* second, __mmask16 lanes) {
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, first));
        if (!second) return low;
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, second));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
};

struct Float32 {
    using Number = float;
    using Weight = float;
    static constexpr long kPerStep = 1, kTrailing = 0;

    static __m512 add_products(__m512 sums, __m512i row, __m512i columns) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(row), _mm512_castsi512_ps(columns), sums);
    }
    static __m512 finished(__m512 sums, float, const Step*) { return sums; }
    static __m512 load(const Number* place, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, place); }
    static void store(Number* place, __mmask16 lanes, __m512 values) { _mm512_mask_storeu_ps(place, lanes, values); }
    template <class Numbers>
    static __m512i steps(Numbers numbers) {
        return _mm512_castps_si512(numbers(0));
    }
    static __m512 added_up(__m512i steps) { return _mm512_castsi512_ps(steps); }
    static __m512i step_of_columns(const Number* row, const Number*, __mmask16 lanes) {
        return _mm512_maskz_loadu_epi32(lanes, row);
    }
};

// Bytes, between activations that are stored as `Outside` has them. The weights are signed, with a scale per column, and
// the rows unsigned around 128, with a scale per row. Two lines end a panel: the scales of its columns, and what the 128
// adds to their sums.
template <class Outside>
struct Int8 : Outside {
    using Weight = int8_t;
    static constexpr long kPerStep = 4, kTrailing = 2;
    static constexpr int kZeros = int(0x80808080u);

    static __m512 add_products(__m512 sums, __m512i row, __m512i columns) {
        return _mm512_castsi512_ps(_mm512_dpbusd_epi32(_mm512_castps_si512(sums), row, columns));
    }
    static __m512 finished(__m512 sums, float row_scale, const Step* trailing) {
        const __m512i zeros = _mm512_loadu_si512(trailing + kPanelColumns);
        const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(row_scale), _mm512_loadu_ps(trailing));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_castps_si512(sums), zeros)), scales);
    }
    // The numbers are between -127 and 127.
    template <class Numbers>
    static __m512i steps(Numbers numbers) {
        __m512i bytes = _mm512_castsi128_si512(byte_of_each(numbers(0)));
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(kLanes)), 1);
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(2 * kLanes)), 2);
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(3 * kLanes)), 3);
        return _mm512_xor_si512(bytes, _mm512_set1_epi32(kZeros));
    }
    static __m128i byte_of_each(__m512 numbers) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers)); }
};

template <class Kind>
constexpr bool kIsInt8 = std::is_same_v<typename Kind::Weight, int8_t>;

// Calls function(Kind()) with the kind of this number: 0 bfloat16, 1 float32, 2 bytes beside bfloat16, 3 bytes beside
// float32.
template <class Function>
auto with_kind(int number, Function function) {
    switch (number) {
        case 1: return function(Float32());
        case 2: return function(Int8<Bfloat16>());
        case 3: return function(Int8<Float32>());
        default: return function(Bfloat16());
    }
}

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

// 16 · 16 steps, by exchanging ever larger squares.
inline __attribute__((always_inline)) void transpose(__m512i (&rows)[16]) {
    __m512i other[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
    }
}

// Rows to columns: steps_of(row, step) is 16 steps of a row, and step s of row r goes to place[s · stride + r], for
// `lanes` rows; those from `present` on are zeros.
template <class Steps>
inline void put_as_columns(Step* place, long stride, long lanes, long present, long steps, Steps steps_of) {
    const __mmask16 stored = first_lanes(lanes);
    for (long step = 0; step < steps; step += kLanes) {
        __m512i rows[16];
#pragma GCC unroll 16
        for (long row = 0; row < 16; row++) rows[row] = row < present ? steps_of(row, step) : _mm512_setzero_si512();
        transpose(rows);
        for (long k = 0; k < std::min(kLanes, steps - step); k++)
            _mm512_mask_storeu_epi32(place + (step + k) * stride, stored, rows[k]);
    }
}

template <class Steps>
void put_in_tile(Step* tile, long rows, long steps, Steps steps_of) {
    put_as_columns(tile, rows, rows, rows, steps, steps_of);
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

template <class Kind>
void multiply_rows(long rows, const Step* tile, const Step* panel, const void* ahead, long steps, __m512 (*sums)[2]) {
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
}

// Calls finish(row, left sums, right sums) for each row of a tile. In float32, sums of parts are added up: a single sum
// over thousands of steps would be rounded thousands of times.
template <class Kind, class Finish>
void multiply_tile(long rows, const Step* tile, const Step* panel, const void* ahead, long steps, Finish finish) {
    const long part = std::is_same_v<Kind, Float32> ? kFloat32Part : steps;
    __m512 sums[kTileRows][2], more[kTileRows][2];
    multiply_rows<Kind>(rows, tile, panel, ahead, std::min(steps, part), sums);
    for (long step = part; step < steps; step += part) {
        const Step* numbers = panel + step * kPanelColumns;
        const Step* next = static_cast<const Step*>(ahead) + step * kPanelColumns;
        multiply_rows<Kind>(rows, tile + step * rows, numbers, next, std::min(steps - step, part), more);
        for (long row = 0; row < rows; row++)
            for (long half = 0; half < 2; half++) sums[row][half] = _mm512_add_ps(sums[row][half], more[row][half]);
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
