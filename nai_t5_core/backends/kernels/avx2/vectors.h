// What all kernels compute with, on AVX2 with FMA and F16C: eight numbers at a time. avx512/vectors.h has the same names.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "memory.h"

using Floats = __m256;
using Words = __m256i;

// Which of the numbers are meant: the first so many.
struct Lanes {
    int count;
};

constexpr Index kLanes = 8;
constexpr Index kTileRows = 6;  // times two are sums in registers, of 16 that there are

inline Lanes first_lanes(Index count) { return {int(count >= kLanes ? kLanes : count <= 0 ? 0 : count)}; }

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats all(float number) { return _mm256_set1_ps(number); }
inline Words all_words(int word) { return _mm256_set1_epi32(word); }
inline Words no_words() { return _mm256_setzero_si256(); }
inline Floats as_floats(Words words) { return _mm256_castsi256_ps(words); }
inline Words as_words(Floats numbers) { return _mm256_castps_si256(numbers); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory; lanes that are not meant are zeros, and are not touched
// ---------------------------------------------------------------------------------------------------------------------

inline Words mask_of(Lanes lanes) {
    const Words numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(all_words(lanes.count), numbers);
}

inline Words load_words(const Step* place) { return _mm256_loadu_si256(reinterpret_cast<const Words*>(place)); }
inline Words load_words(const Step* place, Lanes lanes) {
    return lanes.count == kLanes ? load_words(place) : _mm256_maskload_epi32(place, mask_of(lanes));
}
inline void store_words(Step* place, Words words) { _mm256_storeu_si256(reinterpret_cast<Words*>(place), words); }
inline void store_words(Step* place, Lanes lanes, Words words) {
    if (lanes.count == kLanes) return store_words(place, words);
    // Not by a mask, which some processors take dozens of cycles for.
    alignas(32) Step each[kLanes];
    store_words(each, words);
    for (int lane = 0; lane < lanes.count; lane++) std::memcpy(place + lane, each + lane, sizeof(Step));
}
inline Floats load(const float* place) { return _mm256_loadu_ps(place); }
inline Floats load(const float* place, Lanes lanes) {
    return as_floats(load_words(reinterpret_cast<const Step*>(place), lanes));
}
inline void store(float* place, Floats numbers) { _mm256_storeu_ps(place, numbers); }
inline void store(float* place, Lanes lanes, Floats numbers) {
    store_words(reinterpret_cast<Step*>(place), lanes, as_words(numbers));
}

inline __m128i load_eight(const void* place) { return _mm_loadl_epi64(static_cast<const __m128i*>(place)); }
// Numbers of `size` bytes, 1 or 2.
template <int size>
__m128i load_small(const void* place, Lanes lanes) {
    if (lanes.count == kLanes) return size == 2 ? _mm_loadu_si128(static_cast<const __m128i*>(place)) : load_eight(place);
    alignas(16) char each[16] = {};
    std::memcpy(each, place, lanes.count * size);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(each));
}
inline Words widened_bytes(__m128i bytes) { return _mm256_cvtepu8_epi32(bytes); }  // the first ones, as below
inline Words load_bytes(const void* place) { return widened_bytes(load_eight(place)); }
// 4 bits each, in the lower half of a word whose upper bits are anything: of a byte first the upper ones. All lanes are
// meant, or none is.
inline Words load_halves_in_turn(const void* place, Lanes lanes) {
    const __m128i bytes = _mm_cvtsi32_si128(lanes.count ? load_as<int>(place) : 0);
    return _mm256_srlv_epi32(_mm256_cvtepu8_epi32(_mm_unpacklo_epi8(bytes, bytes)), _mm256_set1_epi64x(4));
}
inline Floats load_int8(const void* place, Lanes lanes) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_small<1>(place, lanes)));
}
inline Floats load_int8(const void* place) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_eight(place))); }
inline float load_float16(const void* place) { return _cvtsh_ss(load_as<uint16_t>(place)); }
inline Floats load_bfloat16(const void* place, Lanes lanes) {
    return as_floats(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_small<2>(place, lanes)), 16));
}
inline Floats load_float16(const void* place, Lanes lanes) { return _mm256_cvtph_ps(load_small<2>(place, lanes)); }
// Bytes, each the high one of its lane.
inline __m128i load_high_bytes(const void* place, Lanes lanes) {
    return _mm_slli_epi16(_mm_cvtepu8_epi16(load_small<1>(place, lanes)), 8);
}
// As numbers of float16 with the same bits for the exponent.
inline Floats load_float8_e5m2(const void* place, Lanes lanes) {
    return _mm256_cvtph_ps(load_high_bytes(place, lanes));
}
// Those with four bits of exponent and no infinity (e4m3fn): moved to where float16 has its exponent, which is 8 larger
// there for the same power of two. The sign comes from the bits that widening fills with it.
inline Floats widened_e4m3(__m128i bytes) {
    const __m128i wide = _mm_cvtepi8_epi16(bytes);
    const __m128i moved = _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(short(0xbfff)));
    const Floats numbers = _mm256_mul_ps(_mm256_cvtph_ps(moved), all(256.f));
    const __m128i without_sign = _mm_or_si128(wide, _mm_set1_epi16(short(0xff80)));
    const Words none = _mm256_cvtepi16_epi32(_mm_cmpeq_epi16(without_sign, _mm_set1_epi16(-1)));
    return _mm256_blendv_ps(numbers, all(NAN), as_floats(none));
}
inline Floats load_float8_e4m3(const void* place, Lanes lanes) { return widened_e4m3(load_small<1>(place, lanes)); }

// ---------------------------------------------------------------------------------------------------------------------
// Words
// ---------------------------------------------------------------------------------------------------------------------

inline Words shifted_right(Words words, int bits) { return Words(__v8su(words) >> bits); }
inline Words shifted_left(Words words, int bits) { return Words(__v8su(words) << bits); }
inline Words minus(Words words, int word) { return _mm256_sub_epi32(words, all_words(word)); }
// With `added` where a bit is set, the lowest one being that of the first word.
inline Words with_bits(Words words, uint32_t bits, int added) {
    const Words each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const Words is_set = _mm256_cmpeq_epi32(_mm256_and_si256(all_words(int(bits)), each), each);
    return _mm256_or_si256(words, _mm256_and_si256(is_set, all_words(added)));
}
inline Floats as_numbers(Words words) { return _mm256_cvtepi32_ps(words); }

// Sixteen numbers that others look up by the lowest four bits of words.
struct Sixteen {
    Floats low, high;
};

inline Sixteen load_sixteen(const float* place) { return {load(place), load(place + kLanes)}; }
inline Sixteen scaled(Sixteen table, Floats factor) { return {table.low * factor, table.high * factor}; }
inline Sixteen scaled(Sixteen table, Floats factor, Floats addend) {
    return {_mm256_fmadd_ps(table.low, factor, addend), _mm256_fmadd_ps(table.high, factor, addend)};
}
inline Floats looked_up(Sixteen table, Words words) {
    const Floats low = _mm256_permutevar8x32_ps(table.low, words), high = _mm256_permutevar8x32_ps(table.high, words);
    return _mm256_blendv_ps(low, high, as_floats(_mm256_slli_epi32(words, 28)));
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic; of larger and smaller, the second operand is what comes out when either is not a number
// ---------------------------------------------------------------------------------------------------------------------

inline Floats multiply_add(Floats x, Floats y, Floats sum) { return _mm256_fmadd_ps(x, y, sum); }
inline Floats minus_product(Floats x, Floats y, Floats sum) { return _mm256_fnmadd_ps(x, y, sum); }
inline Floats larger(Floats x, Floats y) { return _mm256_max_ps(x, y); }
inline Floats smaller(Floats x, Floats y) { return _mm256_min_ps(x, y); }
inline Floats absolute(Floats x) { return _mm256_andnot_ps(all(-0.f), x); }
inline Floats only(Lanes lanes, Floats x) { return _mm256_and_ps(x, as_floats(mask_of(lanes))); }
// The larger of both in these lanes, and the first in the others.
inline Floats larger_in(Lanes lanes, Floats x, Floats y) {
    return _mm256_blendv_ps(x, larger(x, y), as_floats(mask_of(lanes)));
}
inline Floats rounded(Floats x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// 2^n of whole n from -126 to 127.
inline Floats power_of_two(Words n) { return as_floats(_mm256_slli_epi32(_mm256_add_epi32(n, all_words(127)), 23)); }
// x · 2^n of whole n from -252 to 254: rounded once, since the first half leaves numbers that are not too small.
inline Floats times_power_of_two(Floats x, Floats n) {
    const Words whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
    return _mm256_mul_ps(_mm256_mul_ps(x, power_of_two(half)), power_of_two(_mm256_sub_epi32(whole, half)));
}
inline float sum_of(Floats x) {
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float largest_of(Floats x) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}

// 8 · 8 words, by exchanging ever larger squares.
inline __attribute__((always_inline)) void transpose(Words (&rows)[8]) {
    Words other[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        other[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        rows[i] = _mm256_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm256_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm256_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm256_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 4; i++) {
        other[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
        other[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) rows[i] = other[i];
}
