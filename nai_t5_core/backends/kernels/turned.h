// Bytes that were rotated before they were rounded (ConvRot), turned back: every group of numbers along the depth was
// multiplied with a regular Hadamard matrix, which is that of four numbers in each place of itself, and its own inverse. So
// four numbers at a time, then four sums at a time, and so on, are added to and taken off each other; as whole numbers,
// which is exact: 16 bits hold all sums of a group of 256, since a row of the matrix has signs of both sorts.

#pragma once

#include <algorithm>

#include "reading.h"

constexpr Index kTurnedAtOnce = 256;  // numbers of a column: whole groups of 4, 16, 64 and 256

// Halves of a register's words. A word is of one column.
using Shorts = int16_t __attribute__((vector_size(sizeof(Words))));
using UnsignedShorts = uint16_t __attribute__((vector_size(sizeof(Words))));
using Ints = int32_t __attribute__((vector_size(sizeof(Words))));

inline Shorts lower_bytes(Words words) { return Shorts(UnsignedShorts(words) << 8) >> 8; }
inline Shorts upper_bytes(Words words) { return Shorts(words) >> 8; }
inline Floats lower_halves(Shorts halves) { return as_numbers(Words(Ints(shifted_left(Words(halves), 16)) >> 16)); }
inline Floats upper_halves(Shorts halves) { return as_numbers(Words(Ints(halves) >> 16)); }

template <class Numbers>
inline void turn_four(Numbers& a, Numbers& b, Numbers& c, Numbers& d) {
    const Numbers left = a + b, right = c + d, left_less = a - b, right_less = c - d;
    a = left + right_less;
    b = left - right_less;
    c = right + left_less;
    d = right - left_less;
}

// Every four that are `stride` apart.
inline void turn_fours(Shorts* numbers, Index count, Index stride) {
    for (Index start = 0; start < count; start += 4 * stride)
        for (Index i = start; i < start + stride; i++)
            turn_four(numbers[i], numbers[i + stride], numbers[i + 2 * stride], numbers[i + 3 * stride]);
}

// At most kTurnedAtOnce numbers of a run's columns, from one on at which a group begins, as sums of fours are: registers of
// number 0 and 2 of every four, each followed by that of 1 and 3.
struct TurnedFours {
    Shorts halves[kTurnedAtOnce / 2];

    TurnedFours(const Run& run, Index depth, Index number, Index fours) {
        const char* start = static_cast<const char*>(run.piece->values) + run.column * depth + number;
        for (Index first = 0; first < fours; first += kLanes) {
            const auto steps_of = [=](Index column) {
                const Step* place = reinterpret_cast<const Step*>(start + column * depth) + first;
                return load_words(place, first_lanes(fours - first));
            };
            Words words[kLanes];
#pragma GCC unroll 16
            for (Index i = 0; i < kLanes; i++) words[i] = i < run.count ? steps_of(i) : no_words();
            transpose(words);
#pragma GCC unroll 16
            for (Index i = 0; i < kLanes; i++) {
                halves[2 * (first + i)] = lower_bytes(words[i]);
                halves[2 * (first + i) + 1] = upper_bytes(words[i]);
            }
        }
        for (Index stride = 1; 16 * stride <= run.piece->turned; stride *= 4)
            turn_fours(halves, 2 * fours, 2 * stride);
    }

    // The four numbers of each column, as they are to be but for their scales.
    void numbers_at(Index four, Floats (&numbers)[4]) const {
        const Shorts sums = halves[2 * four] + halves[2 * four + 1], less = halves[2 * four] - halves[2 * four + 1];
        const Floats left = lower_halves(sums), right = upper_halves(sums);
        const Floats left_less = lower_halves(less), right_less = upper_halves(less);
        numbers[0] = left + right_less;
        numbers[1] = left - right_less;
        numbers[2] = right + left_less;
        numbers[3] = right - left_less;
    }
};

// Fills steps of a register of a panel with the columns of a run, from a step on at which a group begins. The run's first
// column is the register's, wherever it is to be in the end.
template <class Kind>
void fill_turned(const Run& run, Index depth, Index first, Index count, Step* half) {
    const Piece& piece = *run.piece;
    const Lanes lanes = first_lanes(run.count);
    // A power of two, so that nothing is rounded.
    const float size = 1 / std::sqrt(float(piece.turned));
    const Floats scales = (piece.scales ? load(piece.scales + run.column, lanes) : all(1)) * all(size);
    const Index end = (first + count) * Kind::kPerStep;
    for (Index number = first * Kind::kPerStep; number < end; number += kTurnedAtOnce) {
        const Index fours = std::min(end - number, kTurnedAtOnce) / 4;
        const TurnedFours turned(run, depth, number, fours);
        const float* factors = piece.factors ? piece.factors + number : nullptr;
        for (Index four = 0; four < fours; four++) {
            Floats numbers[4];
            turned.numbers_at(four, numbers);
#pragma GCC unroll 4
            for (Index i = 0; i < 4; i++) {
                numbers[i] = numbers[i] * scales;
                if (factors) numbers[i] = numbers[i] * all(factors[4 * four + i]);
            }
#pragma GCC unroll 4
            for (Index i = 0; i < 4; i += Kind::kPerStep, half += kPanelColumns) {
                const auto of_columns = [&](Index offset) { return numbers[i + offset / kLanes]; };
                store_words(half, Kind::alternating(Kind::weight_steps(of_columns)));
            }
        }
    }
}
