// What all kernels compute with, on AVX512: sixteen numbers at a time. avx2/vectors.h has the same names.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "memory.h"

using Floats = __m512;
using Words = __m512i;
using Lanes = __mmask16;  // which of the numbers are meant

constexpr Index kLanes = 16;
constexpr Index kTileRows = 12;  // times two are sums in registers, of 32 that there are

inline Lanes first_lanes(Index count) {
    return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<Lanes>((1u << count) - 1);
}

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats all(float number) { return _mm512_set1_ps(number); }
inline Words all_words(int word) { return _mm512_set1_epi32(word); }
inline Words no_words() { return _mm512_setzero_si512(); }
inline Floats as_floats(Words words) { return _mm512_castsi512_ps(words); }
inline Words as_words(Floats numbers) { return _mm512_castps_si512(numbers); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory; lanes that are not meant are zeros, and are not touched
// ---------------------------------------------------------------------------------------------------------------------

inline Floats load(const float* place) { return _mm512_loadu_ps(place); }
inline Floats load(const float* place, Lanes lanes) { return _mm512_maskz_loadu_ps(lanes, place); }
inline void store(float* place, Floats numbers) { _mm512_storeu_ps(place, numbers); }
inline void store(float* place, Lanes lanes, Floats numbers) { _mm512_mask_storeu_ps(place, lanes, numbers); }
inline Words load_words(const Step* place) { return _mm512_loadu_si512(place); }
inline Words load_words(const Step* place, Lanes lanes) { return _mm512_maskz_loadu_epi32(lanes, place); }
inline void store_words(Step* place, Words words) { _mm512_storeu_si512(place, words); }
inline void store_words(Step* place, Lanes lanes, Words words) { _mm512_mask_storeu_epi32(place, lanes, words); }

inline __m128i load_sixteen_bytes(const void* place) { return _mm_loadu_si128(static_cast<const __m128i*>(place)); }
inline Words widened_bytes(__m128i bytes) { return _mm512_cvtepu8_epi32(bytes); }
inline Words load_bytes(const void* place) { return widened_bytes(load_sixteen_bytes(place)); }
// 4 bits each, in the lower half of a word whose upper bits are anything: of a byte first the upper ones. All lanes are
// meant, or none is.
inline Words load_halves_in_turn(const void* place, Lanes lanes) {
    const __m128i bytes = _mm_maskz_loadu_epi8(lanes & 0xff, place);
    const Words twice = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes));
    return _mm512_srlv_epi32(twice, _mm512_set1_epi64(4));
}
inline Floats load_int8(const void* place, Lanes lanes) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(lanes, place)));
}
inline Floats load_int8(const void* place) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_sixteen_bytes(place)));
}
inline float load_float16(const void* place) {
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(load_as<uint16_t>(place)))));
}

inline Floats widened_bfloat16(__m256i halves) {
    return as_floats(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Floats load_bfloat16(const void* place, Lanes lanes) {
    return widened_bfloat16(_mm256_maskz_loadu_epi16(lanes, place));
}
inline Floats load_float16(const void* place, Lanes lanes) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(lanes, place));
}
// Bytes, each the high one of its lane.
inline __m256i load_high_bytes(const void* place, Lanes lanes) {
    return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_maskz_loadu_epi8(lanes, place)), 8);
}
// As numbers of float16 with the same bits for the exponent.
inline Floats load_float8_e5m2(const void* place, Lanes lanes) {
    return _mm512_cvtph_ps(load_high_bytes(place, lanes));
}
// Those with four bits of exponent and no infinity (e4m3fn): moved to where float16 has its exponent, which is 8 larger
// there for the same power of two. The sign comes from the bits that widening fills with it.
inline Floats widened_e4m3(__m128i bytes) {
    const __m256i moved = _mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7);
    const Floats numbers = _mm512_cvtph_ps(_mm256_and_si256(moved, _mm256_set1_epi16(short(0xbfff))));
    const __m128i without_sign = _mm_or_si128(bytes, _mm_set1_epi8(char(0x80)));
    const __mmask16 are_numbers = _mm_cmpneq_epi8_mask(without_sign, _mm_set1_epi8(char(0xff)));
    return _mm512_mask_mul_ps(all(NAN), are_numbers, numbers, all(256.f));
}
inline Floats load_float8_e4m3(const void* place, Lanes lanes) {
    return widened_e4m3(_mm_maskz_loadu_epi8(lanes, place));
}

// ---------------------------------------------------------------------------------------------------------------------
// Words
// ---------------------------------------------------------------------------------------------------------------------

inline Words shifted_right(Words words, int bits) { return Words(__v16su(words) >> bits); }
inline Words shifted_left(Words words, int bits) { return Words(__v16su(words) << bits); }
inline Words minus(Words words, int word) { return _mm512_sub_epi32(words, all_words(word)); }
// With `added` where a bit is set, the lowest one being that of the first word.
inline Words with_bits(Words words, uint32_t bits, int added) {
    return _mm512_mask_or_epi32(words, Lanes(bits), words, all_words(added));
}
inline Floats as_numbers(Words words) { return _mm512_cvtepi32_ps(words); }

// Sixteen numbers that others look up by the lowest four bits of words.
struct Sixteen {
    Floats numbers;
};

inline Sixteen load_sixteen(const float* place) { return {load(place)}; }
inline Sixteen scaled(Sixteen table, Floats factor) { return {table.numbers * factor}; }
inline Sixteen scaled(Sixteen table, Floats factor, Floats addend) {
    return {_mm512_fmadd_ps(table.numbers, factor, addend)};
}
inline Floats looked_up(Sixteen table, Words words) { return _mm512_permutexvar_ps(words, table.numbers); }

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic; of larger and smaller, the second operand is what comes out when either is not a number
// ---------------------------------------------------------------------------------------------------------------------

inline Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm512_fmadd_ps(x, y, sum); }
inline Floats minus_product(Floats x, Floats y, Floats sum) { return _mm512_fnmadd_ps(x, y, sum); }
inline Floats larger(Floats x, Floats y) { return _mm512_max_ps(x, y); }
inline Floats smaller(Floats x, Floats y) { return _mm512_min_ps(x, y); }
inline Floats absolute(Floats x) { return _mm512_abs_ps(x); }
inline Floats only(Lanes lanes, Floats x) { return _mm512_maskz_mov_ps(lanes, x); }
// The larger of both in these lanes, and the first in the others.
inline Floats larger_in(Lanes lanes, Floats x, Floats y) { return _mm512_mask_max_ps(x, lanes, x, y); }
inline Floats rounded(Floats x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
// x · 2^n of whole n.
inline Floats times_power_of_two(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }
inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

// 16 · 16 words, by exchanging ever larger squares.
inline __attribute__((always_inline)) void transpose(Words (&rows)[16]) {
    Words other[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 4; i++) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
    }
}
