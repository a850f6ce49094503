// The products of a T5 block with what is before and after them: norm, activation and gating, the residual.

#include <omp.h>

#include <cmath>

#include "kernels.h"
#include "tiles.h"

namespace {

// How many tiles a thread takes a panel through before it goes on to the next: their rows stay in its cache.
constexpr long kTilesAtOnce = 8;

// How the numbers of a weight lie in memory: row by row in one of these, or as panels. kInt8 is for products in 8 bits,
// and nothing else is.
enum Format { kBfloat16 = 0, kFloat16 = 1, kFloat32 = 2, kFloat8E4m3 = 3, kFloat8E5m2 = 4, kInt8 = 5, kPanels = 6 };

constexpr long size_of(Format format) { return format == kFloat32 ? 4 : format >= kFloat8E4m3 ? 1 : 2; }

// Sixteen numbers of 8 bits, each the high byte of its lane, as those of float16 with the same bits for the exponent.
inline __m512 of_float8_e5m2(__m256i high) { return _mm512_cvtph_ps(high); }

// Those with four bits of exponent and no infinity (e4m3fn): moved to where float16 has its exponent, which is 8 larger
// there for the same power of two.
inline __m512 of_float8_e4m3(__m256i high) {
    const __m256i sign = _mm256_and_si256(high, _mm256_set1_epi16(short(0x8000)));
    const __m256i rest = _mm256_srli_epi16(_mm256_slli_epi16(high, 1), 2);
    const __m512 numbers = _mm512_cvtph_ps(_mm256_or_si256(sign, rest));
    const __mmask16 none = _mm256_cmpeq_epi16_mask(rest, _mm256_set1_epi16(0x3f80));
    return _mm512_mask_mov_ps(_mm512_mul_ps(numbers, _mm512_set1_ps(256.f)), none, _mm512_set1_ps(NAN));
}

template <Format format>
inline __attribute__((always_inline)) __m512 load_numbers(const char* place, __mmask16 lanes) {
    if (format == kFloat32) return _mm512_maskz_loadu_ps(lanes, place);
    if (size_of(format) == 1) {
        const __m128i bytes = _mm_maskz_loadu_epi8(lanes, place);
        const __m256i high = _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 8);
        return format == kFloat8E4m3 ? of_float8_e4m3(high) : of_float8_e5m2(high);
    }
    const __m256i halves = _mm256_maskz_loadu_epi16(lanes, place);
    return format == kFloat16 ? _mm512_cvtph_ps(halves) : Bfloat16::widened(halves);
}

// A weight [columns, depth]. Gated weights are those of the gate, one above the other, and then those of up; a panel
// has 16 columns of each.
template <class Kind>
struct Weight {
    const char* values;
    Format format;
    long columns, depth;
    bool is_gated;
    const float* scales;  // of the columns, for putting bytes in panels

    explicit Weight(const Matrix& matrix)
        : values(static_cast<const char*>(matrix.values)), format(Format(matrix.format)), columns(matrix.columns),
          depth(matrix.depth), is_gated(matrix.is_gated), scales(matrix.scales) {}

    long panel_width() const { return is_gated ? kLanes : kPanelColumns; }
    long panels() const {
        const long side = is_gated ? columns / 2 : columns;
        return (side + panel_width() - 1) / panel_width();
    }
    long steps() const { return depth / Kind::kPerStep; }
    long panel_steps() const { return (steps() + Kind::kTrailing) * kPanelColumns; }
    const char* row(long column) const { return values + column * depth * size_of(format); }
    const Step* panel_at(long panel) const { return reinterpret_cast<const Step*>(values) + panel * panel_steps(); }

    // What to bring closer to the processor while a tile is multiplied with a panel. In panels, it is what comes a little
    // later; otherwise the next panel's columns, of which the first tile brings in all, or the gate's, and the second
    // those of up. It need not be there.
    const void* ahead(const Step* numbers, long panel, long tile) const {
        if (format == kPanels) return numbers + kPrefetchSteps * kPanelColumns;
        if (tile == 0) return row((panel + 1) * panel_width());
        if (tile == 1 && is_gated) return row(columns / 2 + (panel + 1) * panel_width());
        return numbers;
    }

    void fill_panel(long panel, Step* filled) const {
        const long first = panel * panel_width();
        if (is_gated) {
            const long count = std::min(kLanes, columns / 2 - first);
            fill_half(first, count, filled);
            fill_half(columns / 2 + first, count, filled + kLanes);
        } else {
            fill_half(first, columns - first, filled);
            fill_half(first + kLanes, columns - first - kLanes, filled + kLanes);
        }
    }

  private:
    // Sixteen columns of a panel: [steps][16] of [steps][32]; those beyond `count` are zeros.
    void fill_half(long first, long count, Step* half) const {
        if constexpr (kIsInt8<Kind>) {
            fill_half_as_it_is(first, count, half);
            end_half(first, count, half);
        } else {
            if (format == (Kind::kPerStep == 1 ? kFloat32 : kBfloat16)) return fill_half_as_it_is(first, count, half);
            switch (format) {
                case kFloat16: return fill_half_from<kFloat16>(first, count, half);
                case kFloat32: return fill_half_from<kFloat32>(first, count, half);
                case kFloat8E4m3: return fill_half_from<kFloat8E4m3>(first, count, half);
                case kFloat8E5m2: return fill_half_from<kFloat8E5m2>(first, count, half);
                default: return fill_half_from<kBfloat16>(first, count, half);
            }
        }
    }

    void fill_half_as_it_is(long first, long count, Step* half) const {
        const long all = steps();
        const Step* start = reinterpret_cast<const Step*>(row(first));
        put_as_columns(half, kPanelColumns, kLanes, count, all, [=](long column, long step) {
            return _mm512_maskz_loadu_epi32(first_lanes(all - step), start + column * all + step);
        });
    }

    template <Format from>
    void fill_half_from(long first, long count, Step* half) const {
        const long all = steps();
        const char* start = row(first);
        put_as_columns(half, kPanelColumns, kLanes, count, all, [=](long column, long step) {
            return Kind::steps([=](long offset) {
                const long number = step * Kind::kPerStep + offset;
                return load_numbers<from>(start + (column * depth + number) * size_of(from),
                                          first_lanes(depth - number));
            });
        });
    }

    void end_half(long first, long count, Step* half) const {
        const __m512i zero = _mm512_set1_epi32(Kind::kZeros);
        __m512i sums = _mm512_setzero_si512();
        Step* end = half + steps() * kPanelColumns;
        for (; half < end; half += kPanelColumns) sums = _mm512_dpbusd_epi32(sums, zero, _mm512_loadu_si512(half));
        _mm512_storeu_ps(end, _mm512_maskz_loadu_ps(first_lanes(count), scales + first));
        _mm512_storeu_si512(end + kPanelColumns, sums);
    }
};

// The scales of rows in bytes: what a unit is worth, from the largest number of a row.
template <class Numbers>
float unit_of(long width, Numbers numbers) {
    const __m512 zero = _mm512_setzero_ps();
    __m512 largest = _mm512_set1_ps(1e-30f), strange = zero;
    for (long column = 0; column < width; column += kLanes) {
        const __m512 x = numbers(column, first_lanes(width - column));
        largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
        strange = _mm512_fmadd_ps(x, zero, strange);  // not a number where x is none, or is infinite
    }
    return _mm512_reduce_max_ps(largest) / 127 + _mm512_reduce_add_ps(strange);
}

// Rows as they are.
template <class Kind>
struct PlainRows {
    const typename Kind::Number* values;
    long width;

    void put(long first, long rows, Step* tile, float* units) const {
        const long steps = width / Kind::kPerStep;
        const auto* start = values + first * width;
        if constexpr (kIsInt8<Kind>) {
            for (long row = 0; row < rows; row++)
                units[row] = unit_of(width, [=](long column, __mmask16 lanes) {
                    return Kind::load(start + row * width + column, lanes);
                });
            put_in_tile(tile, rows, steps, [=](long row, long step) {
                const __m512 factor = _mm512_set1_ps(1 / units[row]);
                return Kind::steps([=](long offset) {
                    const long column = step * Kind::kPerStep + offset;
                    const __m512 x = Kind::load(start + row * width + column, first_lanes(width - column));
                    return _mm512_mul_ps(x, factor);
                });
            });
        } else {
            put_in_tile(tile, rows, steps, [=](long row, long step) {
                const Step* place = reinterpret_cast<const Step*>(start) + row * steps + step;
                return _mm512_maskz_loadu_epi32(first_lanes(steps - step), place);
            });
        }
    }
};

// Rows of the residual after their norm: x / sqrt(mean(x²) + epsilon) · weight, rounded once. The weight may be null.
template <class Kind>
struct NormedRows {
    const float* values;
    long width;
    const float* weight;
    float epsilon;

    float scale(const float* numbers) const {
        __m512 squares = _mm512_setzero_ps();
        for (long column = 0; column < width; column += kLanes) {
            const __m512 x = _mm512_maskz_loadu_ps(first_lanes(width - column), numbers + column);
            squares = _mm512_fmadd_ps(x, x, squares);
        }
        return 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + epsilon);
    }

    __m512 weighted(const float* numbers, long column, __m512 factor) const {
        const __mmask16 lanes = first_lanes(width - column);
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, numbers + column), factor);
        return weight ? _mm512_mul_ps(x, _mm512_maskz_loadu_ps(lanes, weight + column)) : x;
    }

    void put(long first, long rows, Step* tile, float* units) const {
        const float* start = values + first * width;
        float factors[kTileRows];
        for (long row = 0; row < rows; row++) {
            const float* numbers = start + row * width;
            factors[row] = scale(numbers);
            if constexpr (kIsInt8<Kind>) {
                const __m512 factor = _mm512_set1_ps(factors[row]);
                units[row] = unit_of(width, [=](long column, __mmask16) { return weighted(numbers, column, factor); });
                factors[row] /= units[row];
            }
        }
        put_in_tile(tile, rows, width / Kind::kPerStep, [&](long row, long step) {
            const __m512 factor = _mm512_set1_ps(factors[row]);
            return Kind::steps([&](long offset) {
                return weighted(start + row * width, step * Kind::kPerStep + offset, factor);
            });
        });
    }
};

// Calls finish(row, panel, left sums, right sums) for every row and panel, from several threads, and expect(row, panel)
// some time before.
template <class Kind, class Rows, class Expect, class Finish>
Status compute(const Rows& source, long row_count, const Weight<Kind>& weight, Expect expect, Finish finish) {
    const Tiles tiles(row_count);
    const long steps = weight.steps(), panels = weight.panels();
    const long groups = (tiles.count + kTilesAtOnce - 1) / kTilesAtOnce;
    const Buffer<Step> tiled = allocate<Step>(row_count * steps);
    const Buffer<float> units = allocate<float>(kIsInt8<Kind> ? row_count : 1);
    if (!tiled || !units) return kOutOfMemory;
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        const Buffer<Step> own = allocate<Step>(weight.format == kPanels ? 1 : weight.panel_steps());
        failed = !own;
        long filled_now = -1;
#pragma omp for schedule(static)
        for (long tile = 0; tile < tiles.count; tile++) {
            const long start = tiles.start(tile);
            source.put(start, tiles.size(tile), tiled.get() + start * steps, units.get() + start);
        }
        // Neighbouring panels to a thread, since those are prefetched; less and less at once, since a processor that is
        // shared runs its threads at different speeds.
#pragma omp for schedule(guided, groups)
        for (long task = 0; task < panels * groups; task++) {
            const long panel = task / groups, group = task % groups;
            if (failed) continue;
            if (weight.format != kPanels && filled_now != panel) weight.fill_panel(filled_now = panel, own.get());
            const Step* numbers = weight.format == kPanels ? weight.panel_at(panel) : own.get();
            for (long tile = group * kTilesAtOnce; tile < std::min(tiles.count, (group + 1) * kTilesAtOnce); tile++) {
                const long start = tiles.start(tile), rows = tiles.size(tile);
                for (long row = start; row < start + rows; row++) expect(row, panel);
                multiply_tile<Kind>(
                    rows, tiled.get() + start * steps, numbers, weight.ahead(numbers, panel, tile), steps,
                    [&](long row, __m512 left, __m512 right) {
                        const float unit = kIsInt8<Kind> ? units[start + row] : 1;
                        const Step* end = numbers + steps * kPanelColumns;
                        finish(start + row, panel, Kind::finished(left, unit, end),
                               Kind::finished(right, unit, end + kLanes));
                    });
            }
        }
    }
    return failed ? kOutOfMemory : kOk;
}

template <class Kind, Activation activation>
Status normed_product(const NormedRows<Kind>& source, long rows, const Weight<Kind>& weight,
                      typename Kind::Number* out) {
    const long width = weight.is_gated ? weight.columns / 2 : weight.columns;
    const auto expect_nothing = [](long, long) {};
    if (weight.is_gated)
        return compute(source, rows, weight, expect_nothing, [=](long row, long panel, __m512 gate, __m512 up) {
            const long column = panel * kLanes;
            const __m512 product = _mm512_mul_ps(activated<activation>(gate), up);
            Kind::store(out + row * width + column, first_lanes(width - column), product);
        });
    return compute(source, rows, weight, expect_nothing, [=](long row, long panel, __m512 left, __m512 right) {
        const long column = panel * kPanelColumns;
        typename Kind::Number* place = out + row * width + column;
        Kind::store(place, first_lanes(width - column), activated<activation>(left));
        Kind::store(place + kLanes, first_lanes(width - column - kLanes), activated<activation>(right));
    });
}

template <class Kind>
Status normed_product(const NormedRows<Kind>& source, long rows, const Weight<Kind>& weight, int activation,
                      void* out) {
    auto* numbers = static_cast<typename Kind::Number*>(out);
    switch (activation) {
        case kRelu: return normed_product<Kind, kRelu>(source, rows, weight, numbers);
        case kGeluTanh: return normed_product<Kind, kGeluTanh>(source, rows, weight, numbers);
        case kSilu: return normed_product<Kind, kSilu>(source, rows, weight, numbers);
        default: return normed_product<Kind, kNone>(source, rows, weight, numbers);
    }
}

void add_to(float* place, __mmask16 lanes, __m512 values) {
    Float32::store(place, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, place), values));
}

template <class Kind>
Status added_product(const void* x, long rows, const Weight<Kind>& weight, float* residual) {
    const PlainRows<Kind> source{static_cast<const typename Kind::Number*>(x), weight.depth};
    const long columns = weight.columns;
    // The residual's rows lie pages apart, so that the processor does not foresee them.
    const auto expect = [=](long row, long panel) {
        const float* place = residual + row * columns + panel * kPanelColumns;
        _mm_prefetch(place, _MM_HINT_T1);
        _mm_prefetch(place + kLanes, _MM_HINT_T1);
    };
    return compute(source, rows, weight, expect, [=](long row, long panel, __m512 left, __m512 right) {
        const long column = panel * kPanelColumns;
        float* place = residual + row * columns + column;
        add_to(place, first_lanes(columns - column), left);
        add_to(place + kLanes, first_lanes(columns - column - kLanes), right);
    });
}

template <class Kind>
void to_panels(const Weight<Kind>& weight, void* panels) {
#pragma omp parallel for schedule(static)
    for (long panel = 0; panel < weight.panels(); panel++)
        weight.fill_panel(panel, static_cast<Step*>(panels) + panel * weight.panel_steps());
}

template <class Kind>
void from_panels(const Weight<Kind>& weight, void* values) {
    using Number = typename Kind::Weight;
#pragma omp parallel for schedule(static)
    for (long column = 0; column < weight.columns; column++) {
        const bool is_up = weight.is_gated && column >= weight.columns / 2;
        const long side = is_up ? column - weight.columns / 2 : column;
        const long place = side % weight.panel_width() + (is_up ? kLanes : 0);
        const Number* panel = reinterpret_cast<const Number*>(weight.panel_at(side / weight.panel_width()));
        for (long k = 0; k < weight.depth; k++) {
            const long step = k / Kind::kPerStep * kPanelColumns + place;
            static_cast<Number*>(values)[column * weight.depth + k] = panel[step * Kind::kPerStep + k % Kind::kPerStep];
        }
    }
}

}  // namespace

int t5_threads() { return omp_get_max_threads(); }

long t5_panel_steps(const Matrix* weight) {
    return with_kind(weight->kind, [=](auto kind) {
        const Weight<decltype(kind)> typed(*weight);
        return typed.panels() * typed.panel_steps();
    });
}

void t5_to_panels(const Matrix* weight, void* panels) {
    with_kind(weight->kind, [=](auto kind) { to_panels(Weight<decltype(kind)>(*weight), panels); });
}

void t5_from_panels(const Matrix* weight, void* values) {
    with_kind(weight->kind, [=](auto kind) { from_panels(Weight<decltype(kind)>(*weight), values); });
}

int t5_normed_product(const float* residual, long rows, const float* norm_weight, float epsilon, const Matrix* weight,
                      int activation, void* out) {
    return with_kind(weight->kind, [=](auto kind) {
        using Kind = decltype(kind);
        const NormedRows<Kind> source{residual, weight->depth, norm_weight, epsilon};
        return normed_product(source, rows, Weight<Kind>(*weight), activation, out);
    });
}

int t5_added_product(const void* x, long rows, const Matrix* weight, float* residual) {
    return with_kind(weight->kind,
                     [=](auto kind) { return added_product(x, rows, Weight<decltype(kind)>(*weight), residual); });
}
