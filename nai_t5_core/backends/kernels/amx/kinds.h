// What products are computed in with AMX: bfloat16 and bytes in the processor's tile unit (tile_unit.h), float32 in
// vectors.

#pragma once

#include "../avx512/instructions.h"

// Which tiles are multiplied, and added to which: the names of tiles must be literals. Tiles 4 and 5 have the first and
// last sixteen rows, 6 and 7 the columns, and 0 to 3 the sums.
#define T5_FOUR_PRODUCTS(instruction)              \
    template <int sums>                            \
    static void add_products_of_tiles() {          \
        if constexpr (sums == 0) instruction(0, 4, 6); \
        if constexpr (sums == 1) instruction(1, 4, 7); \
        if constexpr (sums == 2) instruction(2, 5, 6); \
        if constexpr (sums == 3) instruction(3, 5, 7); \
    }

struct TiledBfloat16 : Bfloat16 {
    static constexpr bool kIsInTiles = true;
    T5_FOUR_PRODUCTS(_tile_dpbf16ps)
};

template <class Outside>
struct TiledInt8 : Int8<Outside> {
    static constexpr bool kIsInTiles = true;
    T5_FOUR_PRODUCTS(_tile_dpbusd)
};

#undef T5_FOUR_PRODUCTS

// Calls function(Kind()) with the kind of this number: 0 bfloat16, 1 float32, 2 bytes beside bfloat16, 3 bytes beside
// float32.
template <class Function>
auto with_kind(int number, Function function) {
    switch (number) {
        case 1: return function(Float32());
        case 2: return function(TiledInt8<Bfloat16>());
        case 3: return function(TiledInt8<Float32>());
        default: return function(TiledBfloat16());
    }
}

// The same for what activations are stored in; attention is computed in vectors.
template <class Function>
auto with_activations(int in_float32, Function function) {
    return in_float32 ? function(Float32()) : function(Bfloat16());
}
