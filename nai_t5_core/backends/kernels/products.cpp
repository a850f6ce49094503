// The products of a T5 block with what is before and after them: norm, activation and gating, the residual.

#include "kernels.h"
#include "rows.h"
#include "threads.h"
#include "tiles.h"
#include "weight.h"

namespace {

// How many rows a thread takes a panel through before it goes on to the next: they stay in its cache.
constexpr Index kRowsAtOnce = 96;

// Tiles shared out evenly among as few groups as possible.
struct Groups {
    Index tiles, count;

    Groups(Index tiles, Index at_once) : tiles(tiles), count((tiles + at_once - 1) / at_once) {}
    Index start(Index group) const { return group * tiles / count; }
};

// Calls finish(row, panel, left sums, right sums) for every row and panel, from several threads, and expect(row, panel)
// some time before.
template <class Kind, class Rows, class Expect, class Finish>
Status compute(const Rows& source, Index row_count, const Weight<Kind>& weight, Expect expect, Finish finish) {
    const Tiles tiles(row_count, Multiplier<Kind>::kRows);
    const Index steps = weight.steps(), row_steps = steps * kRowSteps<Kind>, panels = weight.panels();
    const Groups groups(tiles.count, kRowsAtOnce / Multiplier<Kind>::kRows);
    const Buffer<Step> tiled = allocate<Step>(row_count * row_steps);
    const Buffer<float> units = allocate<float>(Kind::kIsInt8 ? row_count : 1);
    if (!tiled || !units) return kOutOfMemory;
    // Neighbouring panels to a thread, since those are prefetched.
    Tasks tasks(panels * groups.count, groups.count, panels * groups.count);
    std::atomic<bool> failed{false};
    in_threads([&](const Member& member) {
        // A panel that is filled here is kept as long as there are groups to come, or else only what is taken at once.
        const Index at_once = weight.steps_at_once(tiles.count), kept = groups.count > 1 ? steps : at_once;
        const Buffer<Step> own = allocate<Step>(weight.is_in_panels() ? 1 : kept * kPanelColumns);
        const Buffer<Sums> sums = allocate<Sums>(kRowsAtOnce);
        if (!own || !sums) failed = true;
        Multiplier<Kind> multiplier;
        Index filled_now = -1;
        member.share(tiles.count, [&](Index tile) {
            const Index start = tiles.start(tile);
            source.put(start, tiles.size(tile), tiled.get() + start * row_steps, units.get() + start);
        });
        member.wait_for_others();
        if (failed) return;
        tasks.take(member, [&](Index task) {
            const Index panel = task / groups.count, group = task % groups.count;
            const Index first = groups.start(group), end = groups.start(group + 1), first_row = tiles.start(first);
            for (Index row = first_row; row < tiles.start(end); row++) expect(row, panel);
            const bool is_filled = weight.is_in_panels() || filled_now == panel;
            for (Index step = 0; step < steps; step += at_once) {
                const Index count = std::min(at_once, steps - step);
                Step* place = own.get() + (groups.count > 1 ? step * kPanelColumns : 0);
                if (!is_filled) weight.fill_steps(panel, step, count, place);
                const Step* numbers = weight.is_in_panels() ? weight.panel_at(panel) : place;
                for (Index tile = first; tile < end; tile++) {
                    const Index start = tiles.start(tile), rows = tiles.size(tile);
                    const typename Multiplier<Kind>::Rows steps_of_rows{tiled.get() + start * row_steps, rows, row_steps};
                    const Ahead ahead = weight.ahead(numbers, panel, tile).from(step);
                    Sums* own_sums = sums.get() + start - first_row;
                    multiplier.multiply(steps_of_rows, step, numbers, ahead, count, own_sums);
                    if (step + count < steps) continue;
                    const Step* trailing = numbers + steps * kPanelColumns;
                    for (Index row = 0; row < rows; row++) {
                        const float unit = Kind::kIsInt8 ? units[start + row] : 1;
                        finish(start + row, panel, Kind::finished(own_sums[row][0], unit, trailing),
                               Kind::finished(own_sums[row][1], unit, trailing + kLanes));
                    }
                }
            }
            filled_now = panel;
        });
    });
    return failed ? kOutOfMemory : kOk;
}

template <class Kind, Activation activation, class Rows>
Status stored_product(const Rows& source, Index rows, const Weight<Kind>& weight, typename Kind::Number* out) {
    const Index width = weight.is_gated ? weight.columns / 2 : weight.columns;
    const auto expect_nothing = [](Index, Index) {};
    if (weight.is_gated)
        return compute(source, rows, weight, expect_nothing, [=](Index row, Index panel, Floats gate, Floats up) {
            const Index column = panel * kLanes;
            const Floats product = activated<activation>(gate) * up;
            Kind::store(out + row * width + column, first_lanes(width - column), product);
        });
    return compute(source, rows, weight, expect_nothing, [=](Index row, Index panel, Floats left, Floats right) {
        const Index column = panel * kPanelColumns;
        typename Kind::Number* place = out + row * width + column;
        Kind::store(place, first_lanes(width - column), activated<activation>(left));
        Kind::store(place + kLanes, first_lanes(width - column - kLanes), activated<activation>(right));
    });
}

template <class Kind>
Status normed_product(const NormedRows<Kind>& source, Index rows, const Weight<Kind>& weight, int activation,
                      void* out) {
    auto* numbers = static_cast<typename Kind::Number*>(out);
    switch (activation) {
        case kRelu: return stored_product<Kind, kRelu>(source, rows, weight, numbers);
        case kGeluTanh: return stored_product<Kind, kGeluTanh>(source, rows, weight, numbers);
        case kSilu: return stored_product<Kind, kSilu>(source, rows, weight, numbers);
        default: return stored_product<Kind, kNone>(source, rows, weight, numbers);
    }
}

void add_to(float* place, Lanes lanes, Floats values) {
    store(place, lanes, load(place, lanes) + values);
}

template <class Kind>
Status added_product(const void* x, Index rows, const Weight<Kind>& weight, float* residual) {
    const PlainRows<Kind> source{static_cast<const typename Kind::Number*>(x), weight.depth};
    const Index columns = weight.columns;
    // The residual's rows lie pages apart, so that the processor does not foresee them.
    const auto expect = [=](Index row, Index panel) {
        const float* place = residual + row * columns + panel * kPanelColumns;
        _mm_prefetch(place, _MM_HINT_T1);
        _mm_prefetch(place + kLanes, _MM_HINT_T1);
    };
    return compute(source, rows, weight, expect, [=](Index row, Index panel, Floats left, Floats right) {
        const Index column = panel * kPanelColumns;
        float* place = residual + row * columns + column;
        add_to(place, first_lanes(columns - column), left);
        add_to(place + kLanes, first_lanes(columns - column - kLanes), right);
    });
}

template <class Kind>
Status product(const void* x, Index rows, const Weight<Kind>& weight, void* out) {
    using Number = typename Kind::Number;
    const PlainRows<Kind> source{static_cast<const Number*>(x), weight.depth};
    return stored_product<Kind, kNone>(source, rows, weight, static_cast<Number*>(out));
}

template <class Kind>
void to_panels(const Weight<Kind>& weight, void* panels) {
    in_threads([&](const Member& member) {
        member.share(weight.panels(), [&](Index panel) {
            weight.fill_panel(panel, static_cast<Step*>(panels) + panel * weight.panel_steps());
        });
    });
}

template <class Kind>
void from_panels(const Weight<Kind>& weight, void* values) {
    using Number = typename Kind::Weight;
    in_threads([&](const Member& member) {
        member.share(weight.columns, [&](Index column) {
            const bool is_up = weight.is_gated && column >= weight.columns / 2;
            const Index side = is_up ? column - weight.columns / 2 : column;
            const Index place = side % weight.panel_width() + (is_up ? kLanes : 0);
            const Number* panel = reinterpret_cast<const Number*>(weight.panel_at(side / weight.panel_width()));
            Number* numbers = static_cast<Number*>(values) + column * weight.depth;
            for (Index k = 0; k < weight.depth; k++) numbers[k] = panel[weight.place_of(place, k)];
        });
    });
}

}  // namespace

Index t5_panel_steps(const Matrix* weight) {
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

int t5_normed_product(const float* residual, Index rows, const float* norm_weight, float epsilon, const Matrix* weight,
                      int activation, void* out) {
    return with_kind(weight->kind, [=](auto kind) {
        using Kind = decltype(kind);
        const NormedRows<Kind> source{residual, weight->depth, norm_weight, epsilon};
        return normed_product(source, rows, Weight<Kind>(*weight), activation, out);
    });
}

int t5_added_product(const void* x, Index rows, const Matrix* weight, float* residual) {
    return with_kind(weight->kind,
                     [=](auto kind) { return added_product(x, rows, Weight<decltype(kind)>(*weight), residual); });
}

int t5_product(const void* x, Index rows, const Matrix* weight, void* out) {
    return with_kind(weight->kind, [=](auto kind) { return product(x, rows, Weight<decltype(kind)>(*weight), out); });
}
