// What multiplies rows with a panel: the registers of vectors, or a unit of the processor where a set has one for a kind.

#pragma once

#include <type_traits>

#include "tiles.h"

template <class Kind>
class InVectors {
  public:
    static constexpr Index kRows = kTileRows;

    // Rows as a tile.
    struct Rows {
        const Step* place;
        Index count, row_steps;
    };

    template <class Steps>
    static void put(Step* place, Index rows, Index steps, Steps steps_of) { put_in_tile(place, rows, steps, steps_of); }

    // The sums of rows, from step `first` of theirs on, with `count` steps of a panel; added to those that there are
    // unless `first` is 0. `ahead` is brought into the second-level cache meanwhile.
    void multiply(const Rows& rows, Index first, const Step* panel, Ahead ahead, Index count, Sums* sums) const {
        const Step* place = rows.place + first * kRowSteps<Kind> * rows.count;
        multiply_tile<Kind>(rows.count, place, panel, ahead, count, first > 0, sums);
    }

    // As many products as a tile has under way, of numbers that are in registers already; the operations.
    static Index multiply_in_registers(Index rounds) {
        constexpr int count = 2 * kTileRows;
        Floats sums[count];
#pragma GCC unroll 24
        for (int i = 0; i < count; i++) sums[i] = zeros();
        Words ones = all_words(1);
        for (Index round = 0; round < rounds; round++) {
            // The compiler must see neither that all sums and rounds are the same, nor that nobody reads them.
            asm volatile("" : "+v"(ones));
#pragma GCC unroll 24
            for (int i = 0; i < count; i++) {
                sums[i] = Kind::add_products(sums[i], ones, ones);
                asm volatile("" : "+v"(sums[i]));
            }
        }
        return rounds * count * kLanes * Kind::kPerRowStep * 2;
    }
};

template <class Kind, class = void>
struct MultiplierOf {
    using Type = InVectors<Kind>;
};

#if __has_include("tile_unit.h")
#include "tile_unit.h"

template <class Kind>
struct MultiplierOf<Kind, std::enable_if_t<Kind::kIsInTiles>> {
    using Type = TileUnit<Kind>;
};
#endif

template <class Kind>
using Multiplier = typename MultiplierOf<Kind>::Type;
