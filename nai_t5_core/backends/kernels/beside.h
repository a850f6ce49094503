// Rows whose scales do not lie among their numbers, but beside them: one for each so many numbers along the depth, a
// power of two from 16 on. backends/quantised/ has the same in Python, and numbers are equal to the bit.
//
// Numbers are read as if they stood in blocks of 256, of which the last one of a row may be shorter.

#pragma once

#include <algorithm>

#include "kernels.h"
#include "vectors.h"

// ---------------------------------------------------------------------------------------------------------------------
// Numbers without their scales
// ---------------------------------------------------------------------------------------------------------------------

// 4 bits each, which number the values of a table.
struct NumbersOfATable {
    static constexpr Index kBytes = 128;

    static Floats load(const Piece& piece, const char* block, Index place, Lanes lanes) {
        return looked_up(load_sixteen(piece.beside.table), load_halves_in_turn(block + place / 2, lanes));
    }
};

struct NumbersInE4m3 {
    static constexpr Index kBytes = 256;

    static Floats load(const Piece&, const char* block, Index place, Lanes lanes) {
        return load_float8_e4m3(block + place, lanes);
    }
};

struct NumbersInE5m2 {
    static constexpr Index kBytes = 256;

    static Floats load(const Piece&, const char* block, Index place, Lanes lanes) {
        return load_float8_e5m2(block + place, lanes);
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Scales: `prepare` makes those of 256 numbers of a column, from one on
// ---------------------------------------------------------------------------------------------------------------------

// By their places among all, row by row.
template <class ScaleAt>
void prepare_in_rows(const Beside& beside, Index column, Index number, float* scales, ScaleAt scale_at) {
    const Index row = (column >> beside.down_bits) * beside.in_row, first = number >> beside.across_bits;
    const Index end = std::min(beside.in_row, first + std::max(Index(1), Index(256) >> beside.across_bits));
    for (Index i = first; i < end; i++) *scales++ = scale_at(row + i);
}

struct ScalesInFloat32 {
    static void prepare(const Piece& piece, Index column, Index number, float* scales) {
        const char* given = static_cast<const char*>(piece.beside.scales);
        prepare_in_rows(piece.beside, column, number, scales,
                        [=](Index place) { return load_as<float>(given + place * sizeof(float)); });
    }
};

// Bytes that number the values of a table, each times an outer scale that so many of them share; and an offset, which is
// added to the rounded product.
struct ScalesOfATable {
    static void prepare(const Piece& piece, Index column, Index number, float* scales) {
        const Beside& beside = piece.beside;
        const auto* given = static_cast<const uint8_t*>(beside.scales);
        prepare_in_rows(beside, column, number, scales, [&](Index place) {
            float product = beside.codes[given[place]] * beside.outer[place >> beside.outer_bits];
            asm("" : "+x"(product));  // the compiler would round once, after the sum
            return product + beside.offset;
        });
    }
};

// Bytes in tiles of 128 columns by 4 scales. In a tile, those of column 0, 32, 64 and 96 stand beside each other, then
// those of column 1, 33, 65 and 97, and so on; tiles follow each other along the depth first. `widened` makes a register
// of scales of as many bytes.
template <class Widened>
void prepare_tiled(const Beside& beside, Index column, Index number, float* scales, Widened widened) {
    const Index first = number >> beside.across_bits;
    const Index count = std::min(beside.in_row - first, Index(256) >> beside.across_bits);
    const char* place = static_cast<const char*>(beside.scales) + column / 128 * beside.in_row * 128 + first * 128;
    place += column % 32 * 16 + column % 128 / 32 * 4;
    const auto four = [=](Index i) { return i < count ? load_as<int>(place + i * 128) : 0; };
    // Put together in a register: what is stored in parts cannot be loaded as a whole for a while.
    __m128i bytes = _mm_setr_epi32(four(0), four(4), four(8), four(12));
    for (Index i = 0; i < 16; i += kLanes, bytes = _mm_unpackhi_epi64(bytes, bytes)) store(scales + i, widened(bytes));
}

// In float8 e4m3, times the unit of the piece.
struct TiledInE4m3 {
    static void prepare(const Piece& piece, Index column, Index number, float* scales) {
        const Floats unit = all(piece.unit);
        prepare_tiled(piece.beside, column, number, scales, [=](__m128i bytes) { return widened_e4m3(bytes) * unit; });
    }
};

// Powers of two: the exponents of float32 numbers.
struct TiledPowers {
    static void prepare(const Piece& piece, Index column, Index number, float* scales) {
        prepare_tiled(piece.beside, column, number, scales,
                      [](__m128i bytes) { return as_floats(shifted_left(widened_bytes(bytes), 23)); });
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Both
// ---------------------------------------------------------------------------------------------------------------------

template <class Numbers, class Scales>
struct BesideReader {
    static constexpr Index kNumbers = 256, kBytes = Numbers::kBytes;

    static void prepare(const Piece& piece, Index column, Index number, const char*, float* scales) {
        Scales::prepare(piece, column, number, scales);
    }
    static Floats numbers(const Piece& piece, const char* block, Index place, Lanes lanes, const float* scales) {
        return Numbers::load(piece, block, place, lanes) * all(scales[place >> piece.beside.across_bits]);
    }
};
