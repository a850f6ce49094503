// The products of a T5 block with what is before and after them: norm, activation and gating, the residual.

#include <omp.h>

#include <cmath>

#include "tiles.h"

namespace {

// How many tiles a thread takes a panel through before it goes on to the next: their rows stay in its cache.
constexpr long kTilesAtOnce = 8;

// How the numbers of a weight lie in memory: row by row in one of these, or as panels of bfloat16.
enum Format { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kPanels = 3 };

// Up to 16 pairs of a row, rounded to bfloat16; zeros beyond.
template <Format format>
__m512i load_pairs(const char* row, long first_pair, long count) {
    const __mmask16 pairs = first_lanes(count);
    if (format == kBfloat16) return _mm512_maskz_loadu_epi32(pairs, row + first_pair * 4);
    if (format == kFloat16) {
        const __m512i halves = _mm512_maskz_loadu_epi32(pairs, row + first_pair * 4);
        const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
        return (__m512i)_mm512_cvtne2ps_pbh(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), low);
    }
    const float* numbers = reinterpret_cast<const float*>(row) + first_pair * 2;
    const __m512 low = _mm512_maskz_loadu_ps(first_lanes(2 * count), numbers);
    const __m512 high = _mm512_maskz_loadu_ps(first_lanes(2 * count - kLanes), numbers + kLanes);
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// A weight [columns, depth]. Gated weights are those of the gate, one above the other, and then those of up; a panel has
// 16 columns of each.
struct Weight {
    const char* values;
    Format format;
    long columns, depth;
    bool is_gated;

    Weight(const void* values, int format, long columns, long depth, int is_gated)
        : values(static_cast<const char*>(values)), format(Format(format)), columns(columns), depth(depth),
          is_gated(is_gated) {}

    long panel_width() const { return is_gated ? kLanes : kPanelColumns; }
    long panels() const {
        const long side = is_gated ? columns / 2 : columns;
        return (side + panel_width() - 1) / panel_width();
    }
    long panel_numbers() const { return depth / 2 * kPanelPair; }
    const char* row(long column) const { return values + column * depth * (format == kFloat32 ? 4 : 2); }
    const bfloat16* packed(long panel) const {
        return reinterpret_cast<const bfloat16*>(values) + panel * panel_numbers();
    }

    // What to bring closer to the processor while a tile is multiplied with a panel. Packed, it is what comes a little
    // later; otherwise the next panel's columns, of which the first tile brings in all, or the gate's, and the second
    // those of up. It need not be there.
    const void* ahead(const bfloat16* numbers, long panel, long tile) const {
        if (format == kPanels) return numbers + kPrefetchPairs * kPanelPair;
        if (tile == 0) return row((panel + 1) * panel_width());
        if (tile == 1 && is_gated) return row(columns / 2 + (panel + 1) * panel_width());
        return numbers;
    }

    void pack(long panel, bfloat16* packed) const {
        const long first = panel * panel_width();
        if (is_gated) {
            const long count = std::min(kLanes, columns / 2 - first);
            pack_half(first, count, packed);
            pack_half(columns / 2 + first, count, packed + kPanelPair / 2);
        } else {
            pack_half(first, columns - first, packed);
            pack_half(first + kLanes, columns - first - kLanes, packed + kPanelPair / 2);
        }
    }

  private:
    void pack_half(long first, long count, bfloat16* half) const {
        switch (format) {
            case kFloat16: return pack_half_from<kFloat16>(first, count, half);
            case kFloat32: return pack_half_from<kFloat32>(first, count, half);
            default: return pack_half_from<kBfloat16>(first, count, half);
        }
    }

    // Sixteen columns of a panel: [depth / 2][16][2] of [depth / 2][32][2]; those beyond `count` are zeros.
    template <Format from>
    void pack_half_from(long first, long count, bfloat16* half) const {
        const long pairs = depth / 2;
        for (long pair = 0; pair < pairs; pair += kLanes) {
            __m512i rows[16];
            for (long column = 0; column < 16; column++)
                rows[column] = column < count ? load_pairs<from>(row(first + column), pair, pairs - pair)
                                              : _mm512_setzero_si512();
            transpose(rows);
            for (long k = 0; k < std::min(kLanes, pairs - pair); k++)
                _mm512_storeu_si512(half + (pair + k) * kPanelPair, rows[k]);
        }
    }

    // 16 · 16 pairs, by exchanging ever larger squares.
    static void transpose(__m512i (&rows)[16]) {
        __m512i other[16];
        for (int i = 0; i < 16; i += 2) {
            other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
            other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        }
        for (int i = 0; i < 16; i += 4) {
            rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
            rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
            rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
            rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
        }
        for (int i = 0; i < 4; i++) {
            other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
            other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
            other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
            other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
        }
        for (int i = 0; i < 4; i++) {
            rows[i] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
            rows[i + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
            rows[i + 4] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0x88);
            rows[i + 12] = _mm512_shuffle_i32x4(other[i + 4], other[i + 12], 0xdd);
        }
    }
};

// Rows of bfloat16 as they are.
struct PlainRows {
    const bfloat16* values;
    long width;

    void put(long row, bfloat16* tile, long tile_rows, long tile_row) const {
        const bfloat16* numbers = values + row * width;
        for (long column = 0; column < width; column += kLanes) {
            const long count = std::min(kLanes, width - column);
            put_in_tile(tile, tile_rows, tile_row, column, _mm256_maskz_loadu_epi16(first_lanes(count), numbers + column), count);
        }
    }
};

// Rows of the residual after their norm: x / sqrt(mean(x²) + epsilon) · weight, rounded once. The weight may be null.
struct NormedRows {
    const float* values;
    long width;
    const float* weight;
    float epsilon;

    void put(long row, bfloat16* tile, long tile_rows, long tile_row) const {
        const float* numbers = values + row * width;
        __m512 squares = _mm512_setzero_ps();
        for (long column = 0; column < width; column += kLanes) {
            const __m512 x = _mm512_maskz_loadu_ps(first_lanes(width - column), numbers + column);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        const float scale = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + epsilon);
        for (long column = 0; column < width; column += kLanes) {
            const __mmask16 lanes = first_lanes(width - column);
            __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, numbers + column), _mm512_set1_ps(scale));
            if (weight) x = _mm512_mul_ps(x, _mm512_maskz_loadu_ps(lanes, weight + column));
            put_in_tile(tile, tile_rows, tile_row, column, rounded(x), std::min(kLanes, width - column));
        }
    }
};

// Calls finish(row, panel, left sums, right sums) for every row and panel, from several threads.
template <class Rows, class Finish>
Status compute(const Rows& source, long row_count, const Weight& weight, Finish finish) {
    const Tiles tiles(row_count);
    const long pairs = weight.depth / 2, panels = weight.panels(), groups = (tiles.count + kTilesAtOnce - 1) / kTilesAtOnce;
    const Buffer<bfloat16> tiled = allocate<bfloat16>(row_count * weight.depth);
    if (!tiled) return kOutOfMemory;
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        const Buffer<bfloat16> own = allocate<bfloat16>(weight.format == kPanels ? 1 : weight.panel_numbers());
        failed = !own;
        long packed_now = -1;
#pragma omp for schedule(static)
        for (long tile = 0; tile < tiles.count; tile++)
            for (long row = 0; row < tiles.size(tile); row++)
                source.put(tiles.start(tile) + row, tiled.get() + tiles.start(tile) * weight.depth, tiles.size(tile), row);
#pragma omp for schedule(static)
        for (long task = 0; task < panels * groups; task++) {
            const long panel = task / groups, group = task % groups;
            if (failed) continue;
            if (weight.format != kPanels && packed_now != panel) weight.pack(packed_now = panel, own.get());
            const bfloat16* numbers = weight.format == kPanels ? weight.packed(panel) : own.get();
            for (long tile = group * kTilesAtOnce; tile < std::min(tiles.count, (group + 1) * kTilesAtOnce); tile++) {
                const long start = tiles.start(tile);
                multiply_tile(tiles.size(tile), tiled.get() + start * weight.depth, numbers,
                              weight.ahead(numbers, panel, tile), pairs,
                              [&](long row, __m512 left, __m512 right) { finish(start + row, panel, left, right); });
            }
        }
    }
    return failed ? kOutOfMemory : kOk;
}

void store(bfloat16* place, long columns, __m512 values) {
    _mm256_mask_storeu_epi16(place, first_lanes(columns), rounded(values));
}

template <Activation activation>
Status normed_product(const NormedRows& source, long rows, const Weight& weight, bfloat16* out) {
    if (weight.is_gated) {
        const long width = weight.columns / 2;
        return compute(source, rows, weight, [=](long row, long panel, __m512 gate, __m512 up) {
            const long column = panel * kLanes;
            store(out + row * width + column, width - column, _mm512_mul_ps(activated<activation>(gate), up));
        });
    }
    const long width = weight.columns;
    return compute(source, rows, weight, [=](long row, long panel, __m512 left, __m512 right) {
        const long column = panel * kPanelColumns;
        bfloat16* place = out + row * width + column;
        store(place, width - column, activated<activation>(left));
        store(place + kLanes, width - column - kLanes, activated<activation>(right));
    });
}

void add_to(float* place, long columns, __m512 values) {
    const __mmask16 lanes = first_lanes(columns);
    _mm512_mask_storeu_ps(place, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, place), values));
}

}  // namespace

extern "C" {

// How many threads a call takes at most.
int t5_threads() { return omp_get_max_threads(); }

// How many numbers the panels of a weight take.
long t5_panel_numbers(long columns, long depth, int is_gated) {
    const Weight weight(nullptr, kPanels, columns, depth, is_gated);
    return weight.panels() * weight.panel_numbers();
}

// A weight [columns, depth] in panels.
void t5_pack(const void* values, int format, long columns, long depth, int is_gated, bfloat16* packed) {
    const Weight weight(values, format, columns, depth, is_gated);
#pragma omp parallel for schedule(static)
    for (long panel = 0; panel < weight.panels(); panel++) weight.pack(panel, packed + panel * weight.panel_numbers());
}

// The reverse: panels to a weight [columns, depth] of bfloat16.
void t5_unpack(const void* panels, long columns, long depth, int is_gated, bfloat16* values) {
    const Weight weight(panels, kPanels, columns, depth, is_gated);
#pragma omp parallel for schedule(static)
    for (long column = 0; column < columns; column++) {
        const bool is_up = is_gated && column >= columns / 2;
        const long side = is_up ? column - columns / 2 : column;
        const bfloat16* panel = weight.packed(side / weight.panel_width());
        const long place = side % weight.panel_width() + (is_up ? kLanes : 0);
        for (long k = 0; k < depth; k++) values[column * depth + k] = panel[k / 2 * kPanelPair + place * 2 + k % 2];
    }
}

// act(norm(residual) · weightᵀ), or act(norm(residual) · gateᵀ) · (norm(residual) · upᵀ), to bfloat16.
int t5_normed_product(const float* residual, long rows, const float* norm_weight, float epsilon, const void* values,
                      int format, long columns, long depth, int is_gated, int activation, bfloat16* out) {
    const NormedRows source{residual, depth, norm_weight, epsilon};
    const Weight weight(values, format, columns, depth, is_gated);
    switch (activation) {
        case kRelu: return normed_product<kRelu>(source, rows, weight, out);
        case kGeluTanh: return normed_product<kGeluTanh>(source, rows, weight, out);
        case kSilu: return normed_product<kSilu>(source, rows, weight, out);
        default: return normed_product<kNone>(source, rows, weight, out);
    }
}

// residual += x · weightᵀ, in float32.
int t5_added_product(const bfloat16* x, long rows, const void* values, int format, long columns, long depth,
                     float* residual) {
    const Weight weight(values, format, columns, depth, false);
    return compute(PlainRows{x, depth}, rows, weight, [=](long row, long panel, __m512 left, __m512 right) {
        const long column = panel * kPanelColumns;
        float* place = residual + row * columns + column;
        add_to(place, columns - column, left);
        add_to(place + kLanes, columns - column - kLanes, right);
    });
}

}  // extern "C"
