// What products are computed in on AVX512: bfloat16, float32 and bytes.

#pragma once

#include "instructions.h"

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

// The same for what activations are stored in.
template <class Function>
auto with_activations(int in_float32, Function function) {
    return in_float32 ? function(Float32()) : function(Bfloat16());
}
