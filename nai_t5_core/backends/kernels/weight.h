// A weight as a product takes it: in panels, or in pieces of which panels are made.

#pragma once

#include "turned.h"

// A weight [columns, depth]. Gated weights are those of the gate, one above the other, and then those of up; a panel
// has a register's columns of each.
template <class Kind>
struct Weight {
    const Step* panels_or_null;
    const Piece* pieces;
    Index piece_count, columns, depth;
    bool is_gated;

    explicit Weight(const Matrix& matrix)
        : panels_or_null(static_cast<const Step*>(matrix.panels)), pieces(matrix.pieces),
          piece_count(matrix.piece_count), columns(matrix.columns), depth(matrix.depth), is_gated(matrix.is_gated) {}

    bool is_in_panels() const { return panels_or_null; }
    Index panel_width() const { return is_gated ? kLanes : kPanelColumns; }
    Index panels() const {
        const Index side = is_gated ? columns / 2 : columns;
        return (side + panel_width() - 1) / panel_width();
    }
    Index steps() const { return depth / Kind::kPerStep; }
    Index panel_steps() const { return (steps() + Kind::kTrailing) * kPanelColumns; }
    // How many steps of a panel are multiplied before others. Of pieces it is what the fastest cache holds once it is
    // filled, unless many tiles follow: to leave and take up their sums would take longer.
    Index steps_at_once(Index tiles) const {
        return is_in_panels() || tiles > kFewTiles ? steps() : std::min(steps(), kAtOnce);
    }
    const Step* panel_at(Index panel) const { return panels_or_null + panel * panel_steps(); }

    // In panels, it is what comes a little later; otherwise the next panel's columns, of which the first tile brings in
    // all, or the gate's, and the second those of up.
    Ahead ahead(const Step* numbers, Index panel, Index tile) const {
        if (is_in_panels()) return Ahead(numbers + kPrefetchSteps * kPanelColumns);
        const Index side = tile == 0 ? 0 : columns / 2, column = side + (panel + 1) * panel_width();
        if (tile > is_gated || column >= columns) return Ahead(numbers);
        const Run run = run_at(column, 0, 1);
        const Index row = row_bytes(*run.piece, depth);
        return {static_cast<const char*>(run.piece->values) + run.column * row, panel_width() * row / steps()};
    }

    void fill_panel(Index panel, Step* filled) const {
        fill_steps(panel, 0, steps(), filled);
        if constexpr (Kind::kIsInt8)
            for (Index half = 0; half < 2; half++) end_half(half_of(panel, half), filled + half * kLanes);
    }

    // Steps of a panel from one on, which divides by those that are taken at once.
    void fill_steps(Index panel, Index first, Index count, Step* filled) const {
        for (Index half = 0; half < 2; half++) fill_half(half_of(panel, half), first, count, filled + half * kLanes);
    }

    // Where number k of a column lies in its panel, counted in numbers; `place` is that of the column in the panel.
    static Index place_of(Index place, Index k) {
        constexpr Index unit = Kind::kAreApart ? Kind::kPerStep / 2 : Kind::kPerStep;
        const Index start = k / Kind::kPerStep * kPanelColumns + place / kLanes * kLanes;
        return start * Kind::kPerStep + k % Kind::kPerStep / unit * kLanes * unit + place % kLanes * unit + k % unit;
    }

  private:
    static constexpr Index kFewTiles = 4;
    // Whole blocks of all formats, and of a tile the parts that are summed.
    static constexpr Index kAtOnce = 256 / Kind::kPerStep;
    static_assert(!Kind::kPart || kAtOnce % Kind::kPart == 0);
    static constexpr auto arranged = [](Words steps) { return Kind::arranged(steps); };

    // A register's columns of a panel, in runs.
    struct Half {
        Run runs[kLanes];
        Index count = 0;
    };

    Half half_of(Index panel, Index half) const {
        const Index side = is_gated ? columns / 2 : columns;
        const Index place = panel * panel_width() + (is_gated ? 0 : half * kLanes);
        const Index first = place + (is_gated ? half * side : 0), count = std::min(kLanes, side - place);
        Half found;
        for (Index lane = 0; lane < count; lane += found.runs[found.count++].count)
            found.runs[found.count] = run_at(first + lane, lane, count - lane);
        return found;
    }

    // The columns from one on that lie in its piece, at most `count`.
    Run run_at(Index column, Index lane, Index count) const {
        const Piece* piece = pieces;
        while (column >= piece->columns) column -= piece++->columns;
        return {piece, column, std::min(count, piece->columns - column), lane};
    }

    // [count][kLanes] of [count][kPanelColumns]; lanes without a column are zeros.
    void fill_half(const Half& from, Index first, Index count, Step* half) const {
        const Run& run = from.runs[0];
        if (from.count == 1 && is_as_it_is<Kind>(*run.piece)) return fill_half_as_it_is(run, first, count, half);
        if constexpr (Kind::kIsInt8) return fill_half_from(from, first, count, half);
        else {
            if (from.count == 1 && run.piece->turned) return fill_turned<Kind>(run, depth, first, count, half);
            fill_half_from(from, first, count, half);
            for (Index i = 0; i < from.count; i++)
                if (from.runs[i].piece->turned) fill_lanes_turned(from.runs[i], first, count, half);
        }
    }

    void fill_half_as_it_is(const Run& run, Index first, Index count, Step* half) const {
        const Index all = steps();
        const Step* start = static_cast<const Step*>(run.piece->values) + run.column * all + first;
        const auto steps_of = [=](Index column, Index step) {
            return load_words(start + column * all + step, first_lanes(count - step));
        };
        put_as_columns(half, kPanelColumns, kLanes, run.count, count, steps_of, arranged);
    }

    void fill_half_from(const Half& from, Index first, Index count, Step* half) const {
        ReadSteps<Kind> read[kLanes];
        for (Index i = 0; i < from.count; i++) read[i] = reading<Kind>(*from.runs[i].piece);
        Scales scales;
        Words rows[kLanes];
        for (Words& row : rows) row = no_words();
        for (Index step = 0; step < count; step += kLanes, half += kLanes * kPanelColumns) {
            for (Index i = 0; i < from.count; i++) read[i](from.runs[i], depth, first + step, step == 0, scales, rows);
            Words columns[kLanes];
#pragma GCC unroll 16
            for (Index i = 0; i < kLanes; i++) columns[i] = rows[i];
            transpose(columns);
#pragma GCC unroll 16
            for (Index i = 0; i < kLanes; i++)
                if (i < count - step) store_words(half + i * kPanelColumns, Kind::arranged(columns[i]));
        }
    }

    // The same in the lanes of a run alone.
    void fill_lanes_turned(const Run& run, Index first, Index count, Step* half) const {
        using Number = typename Kind::Weight;
        Step own[kAtOnce * kPanelColumns];
        for (Index step = 0; step < count; step += kAtOnce, half += kAtOnce * kPanelColumns) {
            const Index here = std::min(kAtOnce, count - step);
            fill_turned<Kind>(run, depth, first + step, here, own);
            const Number* from = reinterpret_cast<const Number*>(own);
            Number* to = reinterpret_cast<Number*>(half);
            for (Index lane = 0; lane < run.count; lane++)
                for (Index k = 0; k < here * Kind::kPerStep; k++)
                    to[place_of(run.lane + lane, k)] = from[place_of(lane, k)];
        }
    }

    void end_half(const Half& from, Step* half) const {
        Words excess = no_words();
        Step* end = half + steps() * kPanelColumns;
        for (; half < end; half += kPanelColumns) excess = Kind::excess(excess, load_words(half));
        float scales[kLanes] = {};
        for (const Run* run = from.runs; run < from.runs + from.count; run++)
            std::copy_n(run->piece->scales + run->column, run->count, scales + run->lane);
        store(reinterpret_cast<float*>(end), load(scales));
        store_words(end + kPanelColumns, excess);
    }
};
