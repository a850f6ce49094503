// A weight as a product takes it: row by row as it lies in memory, or in panels.

#pragma once

#include "kernels.h"
#include "tiles.h"

constexpr long size_of(Format format) { return format == kFloat32 ? 4 : format >= kFloat8E4m3 ? 1 : 2; }

template <Format format>
inline __attribute__((always_inline)) Floats load_numbers(const char* place, Lanes lanes) {
    if (format == kFloat32) return load(reinterpret_cast<const float*>(place), lanes);
    if (format == kFloat8E4m3) return load_float8_e4m3(place, lanes);
    if (format == kFloat8E5m2) return load_float8_e5m2(place, lanes);
    return format == kFloat16 ? load_float16(place, lanes) : load_bfloat16(place, lanes);
}

// A weight [columns, depth]. Gated weights are those of the gate, one above the other, and then those of up; a panel
// has a register's columns of each.
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

    // Where number k of a column lies in its panel, counted in numbers; `place` is that of the column in the panel.
    static long place_of(long place, long k) {
        constexpr long unit = Kind::kAreApart ? Kind::kPerStep / 2 : Kind::kPerStep;
        const long start = k / Kind::kPerStep * kPanelColumns + place / kLanes * kLanes;
        return start * Kind::kPerStep + k % Kind::kPerStep / unit * kLanes * unit + place % kLanes * unit + k % unit;
    }

  private:
    static constexpr auto arranged = [](Words steps) { return Kind::arranged(steps); };

    // A register's columns of a panel: [steps][kLanes] of [steps][kPanelColumns]; those beyond `count` are zeros.
    void fill_half(long first, long count, Step* half) const {
        if constexpr (Kind::kIsInt8) {
            fill_half_as_it_is(first, count, half);
            end_half(first, count, half);
        } else {
            if (format == Kind::kOwnFormat) return fill_half_as_it_is(first, count, half);
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
        const auto steps_of = [=](long column, long step) {
            return load_words(start + column * all + step, first_lanes(all - step));
        };
        put_as_columns(half, kPanelColumns, kLanes, count, all, steps_of, arranged);
    }

    template <Format from>
    void fill_half_from(long first, long count, Step* half) const {
        const long all = steps();
        const char* start = row(first);
        const auto steps_of = [=](long column, long step) {
            return Kind::weight_steps([=](long offset) {
                const long number = step * Kind::kPerStep + offset;
                return load_numbers<from>(start + (column * depth + number) * size_of(from),
                                          first_lanes(depth - number));
            });
        };
        put_as_columns(half, kPanelColumns, kLanes, count, all, steps_of, arranged);
    }

    void end_half(long first, long count, Step* half) const {
        Words excess = no_words();
        Step* end = half + steps() * kPanelColumns;
        for (; half < end; half += kPanelColumns) excess = Kind::excess(excess, load_words(half));
        store(reinterpret_cast<float*>(end), load(scales + first, first_lanes(count)));
        store_words(end + kPanelColumns, excess);
    }
};
