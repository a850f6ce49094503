// What products are computed in on AVX2: float32, from weights in float32, bfloat16 or float16, and bytes. tiles.h says
// what a kind is.

#pragma once

#include "float32.h"

// The 16-bit units of eight steps: first all first ones of a step, and then all second ones.
inline Words units_apart(Words steps) {
    const Words order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2,
                                         3, 6, 7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(steps, order), 0xd8);
}

// Two registers of eight words as one of sixteen 16-bit numbers in the same order.
inline Words packed(Words low, Words high) { return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8); }

// Weights in 16 bits, two to a step, which become float32 when they are multiplied. Rows are in float32.
struct Halves : Float32 {
    using Weight = uint16_t;
    static constexpr Index kPerStep = 2, kPart = 64;
    static constexpr bool kAreApart = true;

    static Words arranged(Words steps) { return units_apart(steps); }
};

alignas(32) const int8_t kHighHalves[32] = {-1, -1, 0, 1, -1, -1, 2,  3,  -1, -1, 4,  5,  -1, -1, 6,  7,
                                            -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15};

struct Bfloat16Weights : Halves {
    static constexpr Format kOwnFormat = kBfloat16;

    // Each is the high half of a float32. A shuffle, since shifts are for the ports that multiply on some processors; and
    // its order comes from memory, which the compiler would give a register that a sum needs.
    template <int half>
    static Words columns(const Step* panel) {
        const Words halves = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel) + half));
        Words wide;
        asm("vpshufb %2, %1, %0" : "=x"(wide) : "x"(halves), "m"(kHighHalves));
        return wide;
    }
    template <class Numbers>
    static Words weight_steps(Numbers numbers) {
        const Words low = high_halves(numbers(0)), high = high_halves(numbers(kLanes));
        return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
    }

  private:
    // Rounded to the nearest, to the even one of two; what is not a number stays none.
    static Words high_halves(Floats numbers) {
        const Words bits = as_words(numbers), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), all_words(1));
        const Words nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, all_words(0x7fff)));
        const Words none = as_words(_mm256_cmp_ps(numbers, numbers, _CMP_UNORD_Q));
        return _mm256_srli_epi32(_mm256_blendv_epi8(nearest, all_words(0x7fc00000), none), 16);
    }
};

struct Float16Weights : Halves {
    static constexpr Format kOwnFormat = kFloat16;

    template <int half>
    static Words columns(const Step* panel) {
        return as_words(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel) + half)));
    }
    template <class Numbers>
    static Words weight_steps(Numbers numbers) {
        const __m128i low = _mm256_cvtps_ph(numbers(0), _MM_FROUND_TO_NEAREST_INT);
        return _mm256_set_m128i(_mm256_cvtps_ph(numbers(kLanes), _MM_FROUND_TO_NEAREST_INT), low);
    }
};

// Bytes, between activations in float32: weights are signed, with a scale per column; rows have a scale each.
struct Bytes : Float32 {
    using Weight = int8_t;
    static constexpr Index kPerStep = 4, kTrailing = 2, kPart = 0;
    static constexpr bool kIsInt8 = true;

    static Floats finished(Floats sums, float row_scale, const Step* trailing) {
        const Words excess = load_words(trailing + 2 * kLanes);
        const Floats scales = _mm256_mul_ps(all(row_scale), _mm256_loadu_ps(reinterpret_cast<const float*>(trailing)));
        return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(as_words(sums), excess)), scales);
    }
};

#ifdef __AVXVNNI__
// The rows are unsigned around 128, as vpdpbusd takes them.
struct Int8 : Bytes {
    static constexpr Index kPerRowStep = 4;
    static constexpr int kZeros = int(0x80808080u);

    static Floats add_products(Floats sums, Words row, Words columns) {
        return as_floats(_mm256_dpbusd_avx_epi32(as_words(sums), row, columns));
    }
    // What the 128 adds to the sums of columns.
    static Words excess(Words sums, Words columns) { return _mm256_dpbusd_avx_epi32(sums, all_words(kZeros), columns); }
    // The numbers are between -127 and 127.
    template <class Numbers>
    static Words steps(Numbers numbers) {
        const Words first = _mm256_cvtps_epi32(numbers(0)), second = _mm256_cvtps_epi32(numbers(kLanes));
        const Words third = _mm256_cvtps_epi32(numbers(2 * kLanes)), fourth = _mm256_cvtps_epi32(numbers(3 * kLanes));
        const Words bytes = _mm256_packs_epi16(packed(first, second), packed(third, fourth));
        return _mm256_xor_si256(_mm256_permute4x64_epi64(bytes, 0xd8), all_words(kZeros));
    }
};
#else
// Bytes are multiplied as 16-bit numbers, pairs of whose products are added exactly (vpmaddwd). The instruction for
// bytes, vpmaddubsw, adds pairs in 16 bits, which are not enough.
struct Int8 : Bytes {
    static constexpr Index kPerRowStep = 2;
    static constexpr bool kAreApart = true;

    template <int half>
    static Words columns(const Step* panel) {
        return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(panel) + half));
    }
    static Floats add_products(Floats sums, Words row, Words columns) {
        Words more = _mm256_add_epi32(as_words(sums), _mm256_madd_epi16(row, columns));
        // The compiler would add products to each other first, for which there are not registers enough.
        asm("" : "+x"(more));
        return as_floats(more);
    }
    static Words excess(Words sums, Words) { return sums; }
    template <class Numbers>
    static Words steps(Numbers numbers) {
        const Words low = _mm256_cvtps_epi32(numbers(0));
        return packed(low, _mm256_cvtps_epi32(numbers(kLanes)));
    }
    static Words arranged(Words steps) { return units_apart(steps); }
};
#endif

// Calls function(Kind()) with the kind of this number: 1 float32, 3 bytes, 4 weights in bfloat16, 5 weights in float16.
template <class Function>
auto with_kind(int number, Function function) {
    switch (number) {
        case 3: return function(Int8());
        case 4: return function(Bfloat16Weights());
        case 5: return function(Float16Weights());
        default: return function(Float32());
    }
}

// Activations are stored in float32 alone.
template <class Function>
auto with_activations(int, Function function) {
    return function(Float32());
}
