// The rows that a product takes: as they are, or after their norm; put in tiles, and in bytes where it computes in those.

#pragma once

#include <cmath>

#include "multiplier.h"

// The scales of rows in bytes: what a unit is worth, from the largest number of a row.
template <class Numbers>
float unit_of(Index width, Numbers numbers) {
    Floats largest = all(1e-30f), strange = zeros();
    for (Index column = 0; column < width; column += kLanes) {
        const Floats x = numbers(column, first_lanes(width - column));
        largest = larger(largest, absolute(x));
        strange = multiply_add(x, zeros(), strange);  // not a number where x is none, or is infinite
    }
    return largest_of(largest) / 127 + sum_of(strange);
}

// Rows as they are.
template <class Kind>
struct PlainRows {
    const typename Kind::Number* values;
    Index width;

    void put(Index first, Index rows, Step* tile, float* units) const {
        const Index steps = width / Kind::kPerRowStep;
        const auto* start = values + first * width;
        if constexpr (Kind::kIsInt8) {
            for (Index row = 0; row < rows; row++)
                units[row] = unit_of(width, [=](Index column, Lanes lanes) {
                    return Kind::load(start + row * width + column, lanes);
                });
            Multiplier<Kind>::put(tile, rows, steps, [=](Index row, Index step) {
                const Floats factor = all(1 / units[row]);
                return Kind::steps([=](Index offset) {
                    const Index column = step * Kind::kPerRowStep + offset;
                    return Kind::load(start + row * width + column, first_lanes(width - column)) * factor;
                });
            });
        } else {
            Multiplier<Kind>::put(tile, rows, steps, [=](Index row, Index step) {
                const Step* place = reinterpret_cast<const Step*>(start) + row * steps + step;
                return load_words(place, first_lanes(steps - step));
            });
        }
    }
};

// Rows of the residual after their norm: x / sqrt(mean(x²) + epsilon) · weight, rounded once. The weight may be null.
template <class Kind>
struct NormedRows {
    const float* values;
    Index width;
    const float* weight;
    float epsilon;

    float scale(const float* numbers) const {
        Floats squares = zeros();
        for (Index column = 0; column < width; column += kLanes) {
            const Floats x = load(numbers + column, first_lanes(width - column));
            squares = multiply_add(x, x, squares);
        }
        return 1.f / std::sqrt(sum_of(squares) / width + epsilon);
    }

    Floats weighted(const float* numbers, Index column, Floats factor) const {
        const Lanes lanes = first_lanes(width - column);
        const Floats x = load(numbers + column, lanes) * factor;
        return weight ? x * load(weight + column, lanes) : x;
    }

    void put(Index first, Index rows, Step* tile, float* units) const {
        const float* start = values + first * width;
        float factors[Multiplier<Kind>::kRows];
        for (Index row = 0; row < rows; row++) {
            const float* numbers = start + row * width;
            factors[row] = scale(numbers);
            if constexpr (Kind::kIsInt8) {
                const Floats factor = all(factors[row]);
                units[row] = unit_of(width, [=](Index column, Lanes) { return weighted(numbers, column, factor); });
                factors[row] /= units[row];
            }
        }
        Multiplier<Kind>::put(tile, rows, width / Kind::kPerRowStep, [&](Index row, Index step) {
            const Floats factor = all(factors[row]);
            return Kind::steps([&](Index offset) {
                return weighted(start + row * width, step * Kind::kPerRowStep + offset, factor);
            });
        });
    }
};
