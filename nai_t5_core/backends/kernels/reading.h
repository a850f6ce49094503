// Numbers of a weight's columns, of whatever format, as the steps that a kind is multiplied from.

#pragma once

#include "beside.h"
#include "blocks.h"
#include "kernels.h"
#include "tiles.h"

// ---------------------------------------------------------------------------------------------------------------------
// Formats: how many numbers stand together in so many bytes, and how they are read
// ---------------------------------------------------------------------------------------------------------------------

template <Format format>
struct Reader {
    using Block = Blocks<format>;
    static constexpr Index kNumbers = Block::kNumbers, kBytes = Block::kBytes;

    static void prepare(const Piece&, Index, Index, const char* block, float* scales) { Block::prepare(block, scales); }
    static Floats numbers(const Piece&, const char* block, Index place, Lanes, const float* scales) {
        return Block::numbers(block, place, scales);
    }
};

template <Format format>
inline Floats load_numbers(const char* place, Lanes lanes) {
    switch (format) {
        case kFloat32: return load(reinterpret_cast<const float*>(place), lanes);
        case kFloat16: return load_float16(place, lanes);
        case kFloat8E4m3: return load_float8_e4m3(place, lanes);
        case kFloat8E5m2: return load_float8_e5m2(place, lanes);
        case kInt8: return load_int8(place, lanes);
        default: return load_bfloat16(place, lanes);
    }
}

// Numbers by themselves.
template <Format format, Index size>
struct PlainReader {
    static constexpr Index kNumbers = 1, kBytes = size;

    static void prepare(const Piece&, Index, Index, const char*, float*) {}
    static Floats numbers(const Piece&, const char* block, Index place, Lanes lanes, const float*) {
        return load_numbers<format>(block + place * size, lanes);
    }
};

// Numbers with the scale of their column.
template <Format format>
struct ScaledReader : PlainReader<format, 1> {
    static void prepare(const Piece& piece, Index column, Index, const char*, float* scales) {
        scales[0] = piece.scales ? piece.scales[column] : 1;
    }
    static Floats numbers(const Piece& piece, const char* block, Index place, Lanes lanes, const float* scales) {
        const Floats scaled = load_numbers<format>(block + place, lanes) * all(scales[0]);
        return format == kInt8 ? scaled * all(piece.unit) : scaled;
    }
};

template <> struct Reader<kBfloat16> : PlainReader<kBfloat16, 2> {};
template <> struct Reader<kFloat16> : PlainReader<kFloat16, 2> {};
template <> struct Reader<kFloat32> : PlainReader<kFloat32, 4> {};
template <> struct Reader<kFloat8E4m3> : ScaledReader<kFloat8E4m3> {};
template <> struct Reader<kFloat8E5m2> : ScaledReader<kFloat8E5m2> {};
template <> struct Reader<kInt8> : ScaledReader<kInt8> {};
template <> struct Reader<kFourBits> : BesideReader<NumbersOfATable, ScalesInFloat32> {};
template <> struct Reader<kFourBitsNested> : BesideReader<NumbersOfATable, ScalesOfATable> {};
template <> struct Reader<kNVFP4> : BesideReader<NumbersOfATable, TiledInE4m3> {};
template <> struct Reader<kMXFP8> : BesideReader<NumbersInE4m3, TiledPowers> {};
template <> struct Reader<kFloat8E4m3InBlocks> : BesideReader<NumbersInE4m3, ScalesInFloat32> {};
template <> struct Reader<kFloat8E5m2InBlocks> : BesideReader<NumbersInE5m2, ScalesInFloat32> {};

// Calls function(Reader()) with that of a format.
template <class Function>
auto with_reader(int format, Function function) {
    switch (format) {
        case kFloat16: return function(Reader<kFloat16>());
        case kFloat32: return function(Reader<kFloat32>());
        case kFloat8E4m3: return function(Reader<kFloat8E4m3>());
        case kFloat8E5m2: return function(Reader<kFloat8E5m2>());
        case kInt8: return function(Reader<kInt8>());
        case kQ8_0: return function(Reader<kQ8_0>());
        case kQ4_0: return function(Reader<kQ4_0>());
        case kQ4_1: return function(Reader<kQ4_1>());
        case kQ5_0: return function(Reader<kQ5_0>());
        case kQ5_1: return function(Reader<kQ5_1>());
        case kIQ4_NL: return function(Reader<kIQ4_NL>());
        case kQ2_K: return function(Reader<kQ2_K>());
        case kQ3_K: return function(Reader<kQ3_K>());
        case kQ4_K: return function(Reader<kQ4_K>());
        case kQ5_K: return function(Reader<kQ5_K>());
        case kQ6_K: return function(Reader<kQ6_K>());
        case kIQ4_XS: return function(Reader<kIQ4_XS>());
        case kFourBits: return function(Reader<kFourBits>());
        case kFourBitsNested: return function(Reader<kFourBitsNested>());
        case kNVFP4: return function(Reader<kNVFP4>());
        case kMXFP8: return function(Reader<kMXFP8>());
        case kFloat8E4m3InBlocks: return function(Reader<kFloat8E4m3InBlocks>());
        case kFloat8E5m2InBlocks: return function(Reader<kFloat8E5m2InBlocks>());
        default: return function(Reader<kBfloat16>());
    }
}

inline Index row_bytes(const Piece& piece, Index depth) {
    return with_reader(piece.format, [=](auto reader) { return depth * reader.kBytes / reader.kNumbers; });
}

// ---------------------------------------------------------------------------------------------------------------------
// Columns
// ---------------------------------------------------------------------------------------------------------------------

// The scales of a register's columns, as they were prepared for the block that is read.
using Scales = float[kLanes][kScales];

// Some of a register's columns, which lie in one piece; the first of them is number `lane` of the register.
struct Run {
    const Piece* piece;
    Index column, count, lane;
};

// Puts a register of steps of every column of a run into its place in `rows`. Steps are read in order, from one on that
// `begins` and is the first of a block.
template <class Kind>
using ReadSteps = void (*)(const Run& run, Index depth, Index step, bool begins, Scales& scales, Words* rows);

template <class Kind, class Reader>
void read_steps(const Run& run, Index depth, Index step, bool begins, Scales& scales, Words* rows) {
    // As many numbers of a column are read at once, of one block.
    constexpr Index at_once = kLanes * Kind::kPerStep;
    static_assert(Reader::kNumbers == 1 || Reader::kNumbers % at_once == 0);
    const Index number = step * Kind::kPerStep, bytes = depth * Reader::kBytes / Reader::kNumbers;
    const Index place = at_once % Reader::kNumbers ? number % Reader::kNumbers : 0;
    const char* block = static_cast<const char*>(run.piece->values) + run.column * bytes;
    block += number / Reader::kNumbers * Reader::kBytes;
    const bool has_new_scales = Reader::kNumbers == 1 ? begins : place == 0;
    const float* given = run.piece->factors;
    Floats factors[Kind::kPerStep];
    for (Index i = 0; i < Kind::kPerStep; i++) {
        const Index first = number + i * kLanes;
        factors[i] = given ? load(given + first, first_lanes(depth - first)) : all(1);
    }
    for (Index i = 0; i < run.count; i++, block += bytes) {
        float* own = scales[run.lane + i];
        if (has_new_scales) Reader::prepare(*run.piece, run.column + i, number, block, own);
        rows[run.lane + i] = Kind::weight_steps([&](Index offset) {
            const Lanes lanes = first_lanes(depth - number - offset);
            return Reader::numbers(*run.piece, block, place + offset, lanes, own) * factors[offset / kLanes];
        });
    }
}

// Whether a kind takes the numbers of a piece as they lie.
template <class Kind>
bool is_as_it_is(const Piece& piece) {
    return Kind::kIsInt8 || (piece.format == Kind::kOwnFormat && !piece.factors);
}

template <class Kind>
void read_as_they_are(const Run& run, Index depth, Index step, bool, Scales&, Words* rows) {
    const Index all = depth / Kind::kPerStep;
    const Step* start = static_cast<const Step*>(run.piece->values) + run.column * all + step;
    for (Index i = 0; i < run.count; i++) rows[run.lane + i] = load_words(start + i * all, first_lanes(all - step));
}

template <class Kind>
ReadSteps<Kind> reading(const Piece& piece) {
    if constexpr (!Kind::kIsInt8)
        if (!is_as_it_is<Kind>(piece))
            return with_reader(piece.format,
                               [](auto reader) -> ReadSteps<Kind> { return read_steps<Kind, decltype(reader)>; });
    return read_as_they_are<Kind>;
}
