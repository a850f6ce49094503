// Bfloat16 and bytes as the instructions of AVX512 multiply them. tiles.h says what a kind is.

#pragma once

#include "float32.h"

// Steps are pairs, as the instruction vdpbf16ps adds them.
struct Bfloat16 {
    using Number = uint16_t;
    using Weight = uint16_t;
    static constexpr Index kPerStep = 2, kPerRowStep = 2, kTrailing = 0, kPart = 0;
    static constexpr bool kIsInt8 = false, kAreApart = false;
    static constexpr Format kOwnFormat = kBfloat16;

    template <int>
    static Words columns(const Step* panel) { return load_words(panel); }
    static Floats add_products(Floats sums, Words row, Words columns) {
        return _mm512_dpbf16_ps(sums, (__m512bh)row, (__m512bh)columns);
    }
    static Floats finished(Floats sums, float, const Step*) { return sums; }
    static Floats load(const Number* place, Lanes lanes) { return load_bfloat16(place, lanes); }
    static void store(Number* place, Lanes lanes, Floats values) {
        _mm256_mask_storeu_epi16(place, lanes, (__m256i)_mm512_cvtneps_pbh(values));
    }
    template <class Numbers>
    static Words steps(Numbers numbers) {
        const Floats low = numbers(0);
        return (Words)_mm512_cvtne2ps_pbh(numbers(kLanes), low);
    }
    template <class Numbers>
    static Words weight_steps(Numbers numbers) { return steps(numbers); }
    static Words arranged(Words steps) { return steps; }  // as a panel has them
    // As a panel has them, of first numbers of all columns and then second ones.
    static Words alternating(Words numbers) {
        const Words order =
            _mm512_setr_epi32(0x100000, 0x110001, 0x120002, 0x130003, 0x140004, 0x150005, 0x160006, 0x170007, 0x180008,
                              0x190009, 0x1a000a, 0x1b000b, 0x1c000c, 0x1d000d, 0x1e000e, 0x1f000f);
        return _mm512_permutexvar_epi16(order, numbers);
    }
    static Floats added_up(Words steps) {
        const Words high = _mm512_and_si512(steps, all_words(int(0xffff0000u)));
        return _mm512_add_ps(as_floats(_mm512_slli_epi32(steps, 16)), as_floats(high));
    }
    static Words step_of_columns(const Number* first, const Number* second, Lanes lanes) {
        const Words low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, first));
        if (!second) return low;
        const Words high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, second));
        return _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
};

// Bytes, between activations that are stored as `Outside` has them. The weights are signed, with a scale per column, and
// the rows unsigned around 128, with a scale per row, as vpdpbusd takes them.
template <class Outside>
struct Int8 : Outside {
    using Weight = int8_t;
    static constexpr Index kPerStep = 4, kPerRowStep = 4, kTrailing = 2, kPart = 0;
    static constexpr bool kIsInt8 = true;
    static constexpr int kZeros = int(0x80808080u);

    static Floats add_products(Floats sums, Words row, Words columns) {
        return as_floats(_mm512_dpbusd_epi32(as_words(sums), row, columns));
    }
    static Floats finished(Floats sums, float row_scale, const Step* trailing) {
        const Words zeros = load_words(trailing + 2 * kLanes);
        const Floats scales = _mm512_mul_ps(all(row_scale), _mm512_loadu_ps(trailing));
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(as_words(sums), zeros)), scales);
    }
    // What the 128 adds to the sums of columns.
    static Words excess(Words sums, Words columns) { return _mm512_dpbusd_epi32(sums, all_words(kZeros), columns); }
    // The numbers are between -127 and 127.
    template <class Numbers>
    static Words steps(Numbers numbers) {
        Words bytes = _mm512_castsi128_si512(byte_of_each(numbers(0)));
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(kLanes)), 1);
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(2 * kLanes)), 2);
        bytes = _mm512_inserti32x4(bytes, byte_of_each(numbers(3 * kLanes)), 3);
        return _mm512_xor_si512(bytes, all_words(kZeros));
    }
    static __m128i byte_of_each(Floats numbers) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(numbers)); }
};
