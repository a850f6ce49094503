// AMX: a unit with eight registers of 16 rows by 64 bytes, and an instruction that multiplies two of them.
//
// A panel lies as the unit takes columns: sixteen of its steps are the rows of two registers beside each other. Of the rows
// of a product, sixteen by sixteen steps are a register. So two registers of each make four registers of sums.

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "tiles.h"

// Has the compiler write all that belongs to memory before the unit reads it: g++ does not know what its instructions read.
// Of a configuration it takes eight bytes to be read, and of what is loaded nothing.
inline void is_read_by_the_unit(const void* place) { __asm__ volatile("" : : "r"(place) : "memory"); }

template <class Kind>
class TileUnit {
  public:
    static constexpr Index kRows = 32;

    // Rows one behind the other.
    struct Rows {
        const Step* place;
        Index count, row_steps;
    };

    template <class Steps>
    static void put(Step* place, Index rows, Index steps, Steps steps_of) {
        for (Index row = 0; row < rows; row++, place += steps)
            for (Index step = 0; step < steps; step += kLanes)
                store_words(place + step, first_lanes(steps - step), steps_of(row, step));
    }

    // The unit is given back, since what it holds would be saved with the thread.
    ~TileUnit() {
        if (rows_) _tile_release();
    }

    // The sums of rows, from step `first` of theirs on, with `count` steps of a panel; added to those that there are
    // unless `first` is 0. `ahead` is brought into the second-level cache meanwhile.
    void multiply(const Rows& rows, Index first, const Step* panel, Ahead ahead, Index count, Sums* sums) {
        const Step* place = rows.place + first;
        bool continues = first > 0;
        for (Index step = 0; step < count; continues = true) {
            const Index depth = std::min(kDepth, count - step), times = depth < kDepth ? 1 : (count - step) / kDepth;
            configure(rows.count, depth);
            const Rows from{place + step, rows.count, rows.row_steps};
            const Step* columns = panel + step * kPanelColumns;
            if (rows.count > kHeight) multiply_some<true>(from, columns, ahead.from(step), times, continues, sums);
            else multiply_some<false>(from, columns, ahead.from(step), times, continues, sums);
            step += times * depth;
        }
    }

    // As many products as there may be, of whatever the unit holds; the operations.
    static Index multiply_in_registers(Index rounds) {
        TileUnit unit;
        unit.configure(kRows, kDepth);
        for (Index round = 0; round < rounds; round++) add_products<true>();
        return rounds * kRows * kPanelColumns * kDepth * Kind::kPerRowStep * 2;
    }

  private:
    static constexpr Index kHeight = 16, kDepth = 16;

    struct alignas(64) Configuration {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};
    };

    // Shapes the registers for so many rows and steps; they are zeros then.
    void configure(Index rows, Index depth) {
        if (rows == rows_ && depth == depth_) return;
        rows_ = rows, depth_ = depth;
        Configuration all;
        const auto shape = [&](int tile, Index height, Index width) {
            all.rows[tile] = static_cast<uint8_t>(height);
            all.row_bytes[tile] = static_cast<uint16_t>(width * sizeof(Step));
        };
        for (int half = 0; half < 2; half++) {
            const Index height = std::clamp<Index>(rows - half * kHeight, 1, kHeight);
            shape(2 * half, height, kLanes), shape(2 * half + 1, height, kLanes);
            shape(4 + half, height, depth), shape(6 + half, depth, kLanes);
        }
        is_read_by_the_unit(&all);
        _tile_loadconfig(&all);
    }

    template <bool both>
    static void add_products() {
        Kind::template add_products_of_tiles<0>();
        Kind::template add_products_of_tiles<1>();
        if constexpr (both) {
            Kind::template add_products_of_tiles<2>();
            Kind::template add_products_of_tiles<3>();
        }
    }

    // Of some times as many steps as the registers have; with `both` there are more than sixteen rows.
    template <bool both>
    void multiply_some(const Rows& rows, const Step* panel, Ahead ahead, Index times, bool continues, Sums* sums) {
        is_read_by_the_unit(sums);
        if (continues) {
            _tile_loadd(0, &sums[0][0], sizeof(Sums));
            _tile_loadd(1, &sums[0][1], sizeof(Sums));
            if constexpr (both) {
                _tile_loadd(2, &sums[kHeight][0], sizeof(Sums));
                _tile_loadd(3, &sums[kHeight][1], sizeof(Sums));
            }
        } else {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (both) {
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        const Step* place = rows.place;
        const Index row_bytes = rows.row_steps * sizeof(Step), panel_bytes = kPanelColumns * sizeof(Step);
        for (Index time = 0; time < times; time++, place += depth_, panel += depth_ * kPanelColumns) {
            for (Index step = 0; step < depth_; step++)
                for (Index line = 0; line < panel_bytes; line += kLineSteps * sizeof(Step))
                    _mm_prefetch(ahead.place + (time * depth_ + step) * ahead.stride + line, _MM_HINT_T1);
            _tile_loadd(6, panel, panel_bytes);
            _tile_loadd(7, panel + kLanes, panel_bytes);
            _tile_loadd(4, place, row_bytes);
            if constexpr (both) _tile_loadd(5, place + kHeight * rows.row_steps, row_bytes);
            add_products<both>();
        }
        _tile_stored(0, &sums[0][0], sizeof(Sums));
        _tile_stored(1, &sums[0][1], sizeof(Sums));
        if constexpr (both) {
            _tile_stored(2, &sums[kHeight][0], sizeof(Sums));
            _tile_stored(3, &sums[kHeight][1], sizeof(Sums));
        }
    }

    Index rows_ = 0, depth_ = 0;
};
