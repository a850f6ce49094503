// Products in float32, of weights in float32: the kind that every instruction set has. tiles.h says what a kind is.

#pragma once

#include "kernels.h"
#include "vectors.h"

struct Float32 {
    using Number = float;
    using Weight = float;
    static constexpr Index kPerStep = 1, kPerRowStep = 1, kTrailing = 0, kPart = 128;
    static constexpr bool kIsInt8 = false, kAreApart = false;
    static constexpr Format kOwnFormat = kFloat32;

    template <int>
    static Words columns(const Step* panel) { return load_words(panel); }
    static Floats add_products(Floats sums, Words row, Words columns) {
        return multiply_add(as_floats(row), as_floats(columns), sums);
    }
    static Floats finished(Floats sums, float, const Step*) { return sums; }
    static Floats load(const Number* place, Lanes lanes) { return ::load(place, lanes); }
    static void store(Number* place, Lanes lanes, Floats values) { ::store(place, lanes, values); }
    template <class Numbers>
    static Words steps(Numbers numbers) { return as_words(numbers(0)); }
    template <class Numbers>
    static Words weight_steps(Numbers numbers) { return steps(numbers); }
    static Words arranged(Words steps) { return steps; }  // as a panel has them
    // As a panel has them, of first numbers of all columns and then second ones.
    static Words alternating(Words numbers) { return numbers; }
    static Floats added_up(Words steps) { return as_floats(steps); }
    static Words step_of_columns(const Number* row, const Number*, Lanes lanes) {
        return as_words(::load(row, lanes));
    }
};
