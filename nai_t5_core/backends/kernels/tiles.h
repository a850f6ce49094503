// What all kernels share: the order of rows and weights in memory, and the product of a tile with a panel.
//
// A product takes rows (activations) in tiles of up to kTileRows, and weights in panels of two registers' columns. Both
// advance along the summed dimension in steps. A panel is [steps][kPanelColumns], of four bytes each: as many numbers of
// a column as fit. A tile is [row steps][rows], of four bytes each: as many numbers of a row as the instruction takes. The
// sums of a tile and a panel stay in registers, in float32 or int32, until all steps are done. Every element is summed
// in the same order whatever is computed beside it.
//
// What products are computed in is a kind (kinds.h). Of each: Number is what activations are stored as, Weight what the
// numbers of a weight in panels are, and kOwnFormat the Format of these; kPerStep and kPerRowStep how many of them are in
// a step; kTrailing how many more steps end a panel; kPart how many steps of a panel are summed at once, all if it is 0;
// kAreApart whether a panel has the second halves of a register's steps behind the first halves.

#pragma once

#include <algorithm>

#include "kinds.h"
#include "memory.h"
#include "vectors.h"

constexpr Index kPanelColumns = 2 * kLanes;
constexpr Index kLineSteps = 16;      // four bytes each, in a line of the cache
constexpr Index kPrefetchSteps = 64;  // about what is on its way from memory at any time

// How many row steps a step of a panel is.
template <class Kind>
constexpr int kRowSteps = Kind::kPerStep / Kind::kPerRowStep;

// ---------------------------------------------------------------------------------------------------------------------
// Rows in tiles
// ---------------------------------------------------------------------------------------------------------------------

// Rows shared out evenly among as few tiles as possible.
struct Tiles {
    Index rows, count;

    explicit Tiles(Index rows, Index most = kTileRows) : rows(rows), count((rows + most - 1) / most) {}
    Index start(Index tile) const { return tile * rows / count; }
    Index size(Index tile) const { return start(tile + 1) - start(tile); }
};

constexpr auto as_they_are = [](Words steps) { return steps; };

// Rows to columns: steps_of(row, step) is a register of steps of a row, and step s of row r goes to place[s · stride + r],
// for `lanes` rows; those from `present` on are zeros. What is stored together is arrange(steps).
template <class Steps, class Arrange>
inline void put_as_columns(Step* place, Index stride, Index lanes, Index present, Index steps, Steps steps_of,
                           Arrange arrange) {
    const Lanes stored = first_lanes(lanes);
    const Step* end = place + steps * stride;
    for (Index step = 0; step < steps; step += kLanes) {
        Words rows[kLanes];
#pragma GCC unroll 16
        for (Index row = 0; row < kLanes; row++) rows[row] = row < present ? steps_of(row, step) : no_words();
        transpose(rows);
        for (Index k = 0; k < std::min(kLanes, steps - step); k++) {
            Step* to = place + (step + k) * stride;
            // What is beyond `lanes` is where the next step goes, unless this is near the end.
            if (to + kLanes <= end) store_words(to, arrange(rows[k]));
            else store_words(to, stored, arrange(rows[k]));
        }
    }
}

template <class Steps>
void put_in_tile(Step* tile, Index rows, Index steps, Steps steps_of) {
    put_as_columns(tile, rows, rows, rows, steps, steps_of, as_they_are);
}

// ---------------------------------------------------------------------------------------------------------------------
// The product
// ---------------------------------------------------------------------------------------------------------------------

// The sums of a row, of the left and right register of a panel's columns.
using Sums = Floats[2];

// Adds a row step of each row to its sums.
template <class Kind, int rows, int row_step>
inline __attribute__((always_inline)) void add_row_step(const Step* tile, const Step* panel, Sums* sums) {
    const Words left = Kind::template columns<row_step>(panel), right = Kind::template columns<row_step>(panel + kLanes);
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        const Words numbers = all_words(tile[row_step * rows + row]);
        sums[row][0] = Kind::add_products(sums[row][0], numbers, left);
        sums[row][1] = Kind::add_products(sums[row][1], numbers, right);
    }
}

// What to bring into the second-level cache while a tile is multiplied, `stride` bytes for each step. It need not be
// there.
struct Ahead {
    const char* place;
    Index stride;

    Ahead(const void* place, Index stride) : place(static_cast<const char*>(place)), stride(stride) {}
    explicit Ahead(const Step* panel) : Ahead(panel, kPanelColumns * sizeof(Step)) {}
    Ahead from(Index step) const { return {place + step * stride, stride}; }
};

// Goes on from the sums if it `continues` them; where these are added up in parts, adds a part to them.
template <class Kind, int rows>
void multiply_exactly(const Step* tile, const Step* panel, Ahead ahead, Index steps, bool continues,
                      Sums* sums_of_rows) {
    constexpr bool is_part = Kind::kPart;
    Sums sums[rows];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++)
            sums[row][half] = continues && !is_part ? sums_of_rows[row][half] : zeros();
    for (Index step = 0; step < steps; step++, panel += kPanelColumns, tile += rows * kRowSteps<Kind>) {
#pragma GCC unroll 2
        for (Index line = 0; line < kPanelColumns; line += kLineSteps)
            _mm_prefetch(ahead.place + step * ahead.stride + line * sizeof(Step), _MM_HINT_T1);
        add_row_step<Kind, rows, 0>(tile, panel, sums);
        if constexpr (kRowSteps<Kind> == 2) add_row_step<Kind, rows, 1>(tile, panel, sums);
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++)
        for (int half = 0; half < 2; half++)
            sums_of_rows[row][half] =
                continues && is_part ? sums_of_rows[row][half] + sums[row][half] : sums[row][half];
}

template <class Kind, int most = kTileRows>
void multiply_rows(Index rows, const Step* tile, const Step* panel, Ahead ahead, Index steps, bool continues,
                   Sums* sums) {
    if constexpr (most > 1)
        if (rows < most) return multiply_rows<Kind, most - 1>(rows, tile, panel, ahead, steps, continues, sums);
    multiply_exactly<Kind, most>(tile, panel, ahead, steps, continues, sums);
}

// Sums of parts are added up in float32: a single sum over thousands of steps would be rounded thousands of times.
template <class Kind>
void multiply_tile(Index rows, const Step* tile, const Step* panel, Ahead ahead, Index steps, bool continues, Sums* sums) {
    const Index part = Kind::kPart ? Kind::kPart : steps;
    for (Index step = 0; step < steps; step += part) {
        const Step* numbers = panel + step * kPanelColumns;
        const Step* start = tile + step * kRowSteps<Kind> * rows;
        const Index count = std::min(steps - step, part);
        multiply_rows<Kind>(rows, start, numbers, ahead.from(step), count, continues || step > 0, sums);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of float32 numbers; not-a-number stays what it is
// ---------------------------------------------------------------------------------------------------------------------

// e^x with a relative error below 2e-7, infinite where float32 ends: 2^n · e^r with n = round(x / ln 2), and a
// polynomial for e^r.
inline Floats exponential(Floats x) {
    x = smaller(all(100.f), larger(all(-104.f), x));
    const Floats n = rounded(x * all(1.44269504f));
    Floats r = minus_product(n, all(0.693359375f), x);
    r = minus_product(n, all(-2.12194440e-4f), r);
    Floats sum = all(1.f / 5040);
    for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 1.f / 2, 1.f, 1.f})
        sum = multiply_add(sum, r, all(factor));
    return times_power_of_two(sum, n);
}

inline Floats times_sigmoid(Floats x, Floats logit) { return x / (all(1.f) + exponential(zeros() - logit)); }

enum Activation { kNone = 0, kRelu = 1, kGeluTanh = 2, kSilu = 3 };

template <Activation activation>
inline Floats activated(Floats x) {
    if (activation == kRelu) return larger(zeros(), x);
    if (activation == kSilu) return times_sigmoid(x, x);
    if (activation == kGeluTanh) {
        // (1 + tanh(u)) / 2 is the sigmoid of 2 u, here with u = √(2/π) · (x + 0.044715 x³).
        const Floats cubic = multiply_add(x * x, all(0.044715f), all(1.f));
        return times_sigmoid(x, x * all(1.59576912f) * cubic);
    }
    return x;
}
