// Rows in the blocks of GGUF files: 32 or 256 numbers, with their scales among them. Halves in a block are float16, and a
// block may begin anywhere. backends/quantised/ has the same in Python; numbers are equal to the bit, since all products
// that are added to something here are exact.
//
// Of each, `prepare` makes the scales of a block, at most kScales; and `numbers` a register of its numbers, from one on
// whose place divides by kLanes.

#pragma once

#include "kernels.h"
#include "vectors.h"

constexpr Index kScales = 32;

template <Format format>
struct Blocks;

alignas(64) inline constexpr float kCounted[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) inline constexpr float kFromMinusEight[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(64) inline constexpr float kUneven[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

// ---------------------------------------------------------------------------------------------------------------------
// Of 32 numbers
// ---------------------------------------------------------------------------------------------------------------------

struct BlocksOf32 {
    static constexpr Index kNumbers = 32;

    // 4 bits of a number in the lower half of a word, whose upper bits are anything: of 16 bytes first all lower halves,
    // then the upper ones.
    static Words halves(const char* bytes, Index place) {
        const Words both = load_bytes(bytes + place % 16);
        return place < 16 ? both : shifted_right(both, 4);
    }
    // As numbers of five bits, the fifth of which stand in 4 bytes in order.
    static Words with_fifth_bits(const char* fifth, const char* bytes, Index place) {
        return with_bits(halves(bytes, place) & all_words(15), load_as<uint32_t>(fifth) >> place, 16);
    }
};

// A half, and 32 signed bytes.
template <>
struct Blocks<kQ8_0> : BlocksOf32 {
    static constexpr Index kBytes = 34;
    static void prepare(const char* block, float* scales) { scales[0] = load_float16(block); }
    static Floats numbers(const char* block, Index place, const float* scales) {
        return load_int8(block + 2 + place) * all(scales[0]);
    }
};

// A half, and 16 bytes of 4 bits each, which number the values of a table.
template <const float* table>
struct HalfAndTable : BlocksOf32 {
    static constexpr Index kBytes = 18;
    static void prepare(const char* block, float* scales) { scales[0] = load_float16(block); }
    static Floats numbers(const char* block, Index place, const float* scales) {
        return looked_up(scaled(load_sixteen(table), all(scales[0])), halves(block + 2, place));
    }
};

template <>
struct Blocks<kQ4_0> : HalfAndTable<kFromMinusEight> {};
template <>
struct Blocks<kIQ4_NL> : HalfAndTable<kUneven> {};

// Two halves, the second of which is added, and 16 bytes of 4 bits each.
template <>
struct Blocks<kQ4_1> : BlocksOf32 {
    static constexpr Index kBytes = 20;
    static void prepare(const char* block, float* scales) {
        scales[0] = load_float16(block);
        scales[1] = load_float16(block + 2);
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        return looked_up(scaled(load_sixteen(kCounted), all(scales[0]), all(scales[1])), halves(block + 4, place));
    }
};

// A half, 4 bytes of fifth bits, and 16 of 4 bits each; numbers are around 16.
template <>
struct Blocks<kQ5_0> : BlocksOf32 {
    static constexpr Index kBytes = 22;
    static void prepare(const char* block, float* scales) { scales[0] = load_float16(block); }
    static Floats numbers(const char* block, Index place, const float* scales) {
        return as_numbers(minus(with_fifth_bits(block + 2, block + 6, place), 16)) * all(scales[0]);
    }
};

// Two halves, the second of which is added, 4 bytes of fifth bits, and 16 of 4 bits each.
template <>
struct Blocks<kQ5_1> : BlocksOf32 {
    static constexpr Index kBytes = 24;
    static void prepare(const char* block, float* scales) {
        scales[0] = load_float16(block);
        scales[1] = load_float16(block + 2);
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Floats fives = as_numbers(with_fifth_bits(block + 4, block + 8, place));
        return multiply_add(fives, all(scales[0]), all(scales[1]));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// Of 256 numbers, in 8 or 16 parts with a scale of a few bits each
// ---------------------------------------------------------------------------------------------------------------------

struct BlocksOf256 {
    static constexpr Index kNumbers = 256;

    // 4 bits of a number in the lower half of a word, whose upper bits are anything: of every 32 bytes first all lower
    // halves, then the upper ones.
    static Words halves(const char* bytes, Index place) {
        return shifted_right(load_bytes(bytes + place / 64 * 32 + place % 32), place & 32 ? 4 : 0);
    }
    // 2 bits of a number in the lowest of a word, whose others are anything: of every 32 bytes first all lowest pairs, then
    // the next ones, and so on.
    static Words pairs(const char* bytes, Index place) {
        return shifted_right(load_bytes(bytes + place / 128 * 32 + place % 32), place % 128 / 32 * 2);
    }
    // A bit of a number in the lowest of a word, whose others are anything: of 32 bytes first all lowest bits, then the
    // next ones, and so on.
    static Words bits(const char* bytes, Index place) {
        return shifted_right(load_bytes(bytes + place % 32), place / 32);
    }
    // Scales of 16 signed bytes, times a number.
    static void times(const char* bytes, float factor, float* scales) {
        for (Index i = 0; i < 16; i += kLanes) store(scales + i, load_int8(bytes + i) * all(factor));
    }
    // The same of signed words of 8 bits, four in each.
    static void times(const uint32_t (&words)[4], float factor, float* scales) {
        times(reinterpret_cast<const char*>(words), factor, scales);
    }
    // Eight scales and then eight minima of 6 bits, in 12 bytes: the first four of each have a byte, in whose two upper
    // bits are those of the others; the last four bytes have the lower halves of these, scales below minima. Scales are
    // from 0 on, and minima, which are to be taken off, from 24 on.
    static void prepare_minima(const char* bytes, float scale, float minimum, float* scales) {
        const uint32_t a = load_as<uint32_t>(bytes), b = load_as<uint32_t>(bytes + 4), c = load_as<uint32_t>(bytes + 8);
        const uint32_t six = 0x3f3f3f3f, four = 0x0f0f0f0f, upper = 0x30303030;
        const uint32_t words[4] = {a & six, (c & four) | (a >> 2 & upper), b & six, (c >> 4 & four) | (b >> 2 & upper)};
        times(words, scale, scales);
        times(words, -minimum, scales + 16);
    }
};

// Two halves, for scales and minima; scales and minima; and 128 bytes of 4 bits each.
template <>
struct Blocks<kQ4_K> : BlocksOf256 {
    static constexpr Index kBytes = 144;
    static void prepare(const char* block, float* scales) {
        prepare_minima(block + 4, load_float16(block), load_float16(block + 2), scales);
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Floats scale = all(scales[place / 32]), minimum = all(scales[24 + place / 32]);
        return looked_up(scaled(load_sixteen(kCounted), scale, minimum), halves(block + 16, place));
    }
};

// As before, with 32 bytes of fifth bits before the others.
template <>
struct Blocks<kQ5_K> : BlocksOf256 {
    static constexpr Index kBytes = 176;
    static void prepare(const char* block, float* scales) { Blocks<kQ4_K>::prepare(block, scales); }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Words fifth = shifted_left(bits(block + 16, place) & all_words(1), 4);
        const Words fives = (halves(block + 48, place) & all_words(15)) | fifth;
        return multiply_add(as_numbers(fives), all(scales[place / 32]), all(scales[24 + place / 32]));
    }
};

// 128 bytes of 4 bits each, of every 64 first all lower halves; 64 bytes of two more bits; 16 scales in signed bytes; and
// a half for them. Numbers are around 32.
template <>
struct Blocks<kQ6_K> : BlocksOf256 {
    static constexpr Index kBytes = 210;
    static void prepare(const char* block, float* scales) { times(block + 192, load_float16(block + 208), scales); }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Words both = load_bytes(block + place / 128 * 64 + place % 64);
        const Words lower = shifted_right(both, place & 64 ? 4 : 0) & all_words(15);
        const Words upper = shifted_left(pairs(block + 128, place) & all_words(3), 4);
        return as_numbers(minus(lower | upper, 32)) * all(scales[place / 16]);
    }
};

// 16 bytes of scales in the lower halves and minima in the upper ones; 64 bytes of 2 bits each; and two halves for scales
// and minima, which are from 16 on.
template <>
struct Blocks<kQ2_K> : BlocksOf256 {
    static constexpr Index kBytes = 84;
    static void prepare(const char* block, float* scales) {
        const Floats scale = all(load_float16(block + 80)), minimum = all(-load_float16(block + 82));
        for (Index i = 0; i < 16; i += kLanes) {
            const Words both = load_bytes(block + i);
            store(scales + i, as_numbers(both & all_words(15)) * scale);
            store(scales + 16 + i, as_numbers(shifted_right(both, 4)) * minimum);
        }
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Words twos = pairs(block + 16, place) & all_words(3);
        return multiply_add(as_numbers(twos), all(scales[place / 16]), all(scales[16 + place / 16]));
    }
};

// 32 bytes of third bits; 64 bytes of 2 bits each; 12 bytes of 16 scales around 32: of 8 all lower halves, then the upper
// ones, and of 4 two more bits for each; and a half for them. Numbers are around 4.
template <>
struct Blocks<kQ3_K> : BlocksOf256 {
    static constexpr Index kBytes = 110;
    static void prepare(const char* block, float* scales) {
        const uint32_t a = load_as<uint32_t>(block + 96), b = load_as<uint32_t>(block + 100);
        const uint32_t c = load_as<uint32_t>(block + 104), four = 0x0f0f0f0f, two = 0x03030303;
        const uint32_t lower[4] = {a & four, b & four, a >> 4 & four, b >> 4 & four};
        const Floats scale = all(load_float16(block + 108));
        uint32_t words[4];
        for (int i = 0; i < 4; i++) words[i] = lower[i] | (c >> 2 * i & two) << 4;
        const char* bytes = reinterpret_cast<const char*>(words);
        for (Index i = 0; i < 16; i += kLanes) store(scales + i, as_numbers(minus(load_bytes(bytes + i), 32)) * scale);
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Words third = shifted_left(bits(block, place) & all_words(1), 2);
        const Words threes = (pairs(block + 32, place) & all_words(3)) | third;
        return as_numbers(minus(threes, 4)) * all(scales[place / 16]);
    }
};

// A half; 2 bytes of the upper two bits of 8 scales around 32, and 4 of the lower four; and 128 bytes of 4 bits each, of
// every 16 first all lower halves, which number the values of a table.
template <>
struct Blocks<kIQ4_XS> : BlocksOf256 {
    static constexpr Index kBytes = 136;
    static void prepare(const char* block, float* scales) {
        const uint32_t upper = load_as<uint16_t>(block + 2), lower = load_as<uint32_t>(block + 4);
        const float scale = load_float16(block);
        for (int i = 0; i < 8; i++) {
            const int six = int((lower >> 4 * i & 15) | (upper >> 2 * i & 3) << 4);
            scales[i] = scale * float(six - 32);
        }
    }
    static Floats numbers(const char* block, Index place, const float* scales) {
        const Words words = BlocksOf32::halves(block + 8 + place / 32 * 16, place % 32);
        return looked_up(scaled(load_sixteen(kUneven), all(scales[place / 32])), words);
    }
};
