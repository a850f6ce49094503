// Attention of documents in a packed row, with T5's bias by distance.

#include <cmath>
#include <limits>

#include "kernels.h"
#include "threads.h"
#include "tiles.h"

namespace {

// The queries are `queries` rows from `start` on, the keys `keys` rows from `start + key_start` on; keys ≥ 1.
struct Document {
    int64_t start, queries, key_start, keys;
};

// Where queries, keys and values of all heads lie beside each other: [tokens, 3 · heads · size].
template <class Number>
struct Projected {
    const Number* values;
    Index heads, size;

    const Number* at(Index row, Index part, Index head) const {
        return values + (row * 3 + part) * heads * size + head * size;
    }
};

Index padded(Index count, Index multiple) { return (count + multiple - 1) / multiple * multiple; }

// One head of one document at a time; the memory serves the largest.
template <class Kind>
class Head {
    using Number = typename Kind::Number;

  public:
    Head(Index most_queries, Index most_keys, Index size)
        : size_(size), reach_(most_queries + most_keys),
          keys_(allocate<Step>(padded(most_keys, kPanelColumns) * size / Kind::kPerStep)),
          values_(allocate<Step>(padded(most_keys, kPanelColumns) * padded(size, kPanelColumns) / Kind::kPerStep)),
          queries_(allocate<Step>(kTileRows * size / Kind::kPerStep)),
          weights_(allocate<Step>(kTileRows * padded(most_keys, kPanelColumns) / Kind::kPerStep)),
          logits_(allocate<float>(kTileRows * padded(most_keys, kPanelColumns))),
          bias_(allocate<float>(2 * (most_queries + most_keys) + kPanelColumns)) {}

    bool has_memory() const { return keys_ && values_ && queries_ && weights_ && logits_ && bias_; }

    void attend(const Projected<Number>& from, const Document& document, Index head, const float* table, Index table_reach,
                float scale, Number* out) {
        const Index first_key = document.start + document.key_start;
        spread_bias(table, table_reach);
        arrange_keys(from, first_key, document.keys, head);
        arrange_values(from, first_key, document.keys, head);
        const Tiles tiles(document.queries);
        for (Index tile = 0; tile < tiles.count; tile++) {
            const Index first = tiles.start(tile), rows = tiles.size(tile);
            put_in_tile(queries_.get(), rows, size_ / Kind::kPerStep, [&](Index row, Index step) {
                return steps_at(from.at(document.start + first + row, 0, head), step);
            });
            find_logits(rows, document.keys, document.key_start - first, scale);
            find_weights(rows, document.keys);
            add_values(rows, document.keys, out + (document.start + first) * from.heads * size_ + head * size_,
                       from.heads * size_);
        }
    }

  private:
    template <class Finish>
    static void multiply_in_cache(Index rows, const Step* tile, const Step* panel, Index steps, Finish finish) {
        Sums sums[kTileRows];
        multiply_tile<Kind>(rows, tile, panel, Ahead(panel), steps, false, sums);
        for (Index row = 0; row < rows; row++) finish(row, sums[row][0], sums[row][1]);
    }

    // The bias of a key at distance d lies at reach_ + d, and beyond the table's reach is that at its end.
    void spread_bias(const float* table, Index table_reach) {
        const Index near = std::min(reach_, table_reach);
        float *start = bias_.get(), *middle = start + reach_, *end = start + 2 * reach_ + kPanelColumns;
        std::fill(start, middle - near, table[0]);
        std::copy(table + table_reach - near, table + table_reach + near + 1, middle - near);
        std::fill(middle + near + 1, end, table[2 * table_reach]);
    }

    Words steps_at(const Number* row, Index step) const {
        const Lanes lanes = first_lanes(size_ / Kind::kPerStep - step);
        return load_words(reinterpret_cast<const Step*>(row) + step, lanes);
    }

    // Keys are the columns of a product with queries.
    void arrange_keys(const Projected<Number>& from, Index first, Index count, Index head) {
        const Index steps = size_ / Kind::kPerStep;
        for (Index key = 0; key < padded(count, kPanelColumns); key += kLanes) {
            Step* half = keys_.get() + key / kPanelColumns * steps * kPanelColumns + key % kPanelColumns;
            put_as_columns(half, kPanelColumns, kLanes, count - key, steps, [&](Index column, Index step) {
                return steps_at(from.at(first + key + column, 1, head), step);
            }, as_they_are);
        }
    }

    // Keys are what a product with values sums over.
    void arrange_values(const Projected<Number>& from, Index first, Index count, Index head) {
        const Index steps = padded(count, kPanelColumns) / Kind::kPerStep;
        for (Index step = 0; step < steps; step++) {
            const Index key = step * Kind::kPerStep;
            const Number* row = key < count ? from.at(first + key, 2, head) : nullptr;
            const Number* next = key + 1 < count ? from.at(first + key + 1, 2, head) : nullptr;
            for (Index column = 0; column < padded(size_, kPanelColumns); column += kLanes) {
                const Lanes lanes = first_lanes(row ? size_ - column : 0);
                Step* panel = values_.get() + column / kPanelColumns * steps * kPanelColumns;
                store_words(panel + step * kPanelColumns + column % kPanelColumns,
                            Kind::step_of_columns(row + column, next ? next + column : nullptr, lanes));
            }
        }
    }

    // query · key · scale + bias; `shift` is the position of the first key less that of the tile's first query.
    void find_logits(Index rows, Index keys, Index shift, float scale) {
        const Index depth = padded(keys, kPanelColumns);
        const Floats factor = all(scale);
        for (Index key = 0; key < keys; key += kPanelColumns)
            multiply_in_cache(rows, queries_.get(), keys_.get() + key * size_ / Kind::kPerStep, size_ / Kind::kPerStep,
                              [&](Index row, Floats left, Floats right) {
                                  const float* bias = bias_.get() + reach_ + shift + key - row;
                                  const Floats other = load(bias + kLanes);
                                  float* place = logits_.get() + row * depth + key;
                                  store(place, multiply_add(left, factor, load(bias)));
                                  store(place + kLanes, multiply_add(right, factor, other));
                              });
    }

    // The softmax of every row before it is divided by the sum of its weights: that of the rounded ones, so that those
    // add up to 1.
    void find_weights(Index rows, Index keys) {
        const Index depth = padded(keys, kPanelColumns);
        Floats largest[kTileRows], sums[kTileRows];
        for (Index row = 0; row < rows; row++) {
            const float* logits = logits_.get() + row * depth;
            Floats large = all(-std::numeric_limits<float>::infinity());
            for (Index key = 0; key < keys; key += kLanes)
                large = larger_in(first_lanes(keys - key), large, load(logits + key));
            largest[row] = all(largest_of(large));
            sums[row] = zeros();
        }
        put_in_tile(weights_.get(), rows, depth / Kind::kPerStep, [&](Index row, Index step) {
            const Words steps = Kind::steps([&](Index offset) {
                const Index key = step * Kind::kPerStep + offset;
                const Floats logits = load(logits_.get() + row * depth + key);
                return only(first_lanes(keys - key), exponential(logits - largest[row]));
            });
            sums[row] = sums[row] + Kind::added_up(steps);
            return steps;
        });
        for (Index row = 0; row < rows; row++) sums_[row] = sum_of(sums[row]);
    }

    void add_values(Index rows, Index keys, Number* out, Index out_width) {
        const Index steps = padded(keys, kPanelColumns) / Kind::kPerStep;
        for (Index column = 0; column < size_; column += kPanelColumns)
            multiply_in_cache(rows, weights_.get(), values_.get() + column * steps, steps,
                              [&](Index row, Floats left, Floats right) {
                                  const Floats sum = all(sums_[row]);
                                  Number* place = out + row * out_width + column;
                                  Kind::store(place, first_lanes(size_ - column), left / sum);
                                  Kind::store(place + kLanes, first_lanes(size_ - column - kLanes), right / sum);
                              });
    }

    const Index size_, reach_;
    const Buffer<Step> keys_, values_, queries_, weights_;
    const Buffer<float> logits_, bias_;
    float sums_[kTileRows];
};

// Whether documents are one behind the other and take all rows, with keys that are rows of theirs.
bool are_all_rows(const Document* documents, Index count, Index rows) {
    Index next = 0;
    for (const Document* document = documents; document != documents + count; document++) {
        const auto [start, queries, key_start, keys] = *document;
        if (start != next || queries < 1 || queries > rows - start) return false;
        if (key_start < 0 || keys < 1 || key_start > queries || keys > queries - key_start) return false;
        next = start + queries;
    }
    return next == rows;
}

template <class Kind>
Status attend(const void* projected, Index rows, Index heads, Index size, const Bias& bias, void* out) {
    using Number = typename Kind::Number;
    const Projected<Number> from{static_cast<const Number*>(projected), heads, size};
    Number* to = static_cast<Number*>(out);
    const Document* documents = reinterpret_cast<const Document*>(bias.documents);
    if (!are_all_rows(documents, bias.count, rows)) return kWrongDocuments;
    Index most_queries = 0, most_keys = 0;
    for (Index i = 0; i < bias.count; i++) {
        most_queries = std::max<Index>(most_queries, documents[i].queries);
        most_keys = std::max<Index>(most_keys, documents[i].keys);
    }
    Tasks tasks(bias.count * heads, 1, 1);
    std::atomic<bool> failed{false};
    in_threads([&](const Member& member) {
        Head<Kind> work(most_queries, most_keys, size);
        if (!work.has_memory()) failed = true;
        tasks.take(member, [&](Index task) {
            const Index head = task % heads;
            const float* table = bias.table + head * (2 * bias.table_reach + 1);
            if (!failed) work.attend(from, documents[task / heads], head, table, bias.table_reach, bias.scale, to);
        });
    });
    return failed ? kOutOfMemory : kOk;
}

}  // namespace

int t5_attention(const void* projected, Index rows, Index heads, Index size, const Bias* bias, int in_float32, void* out) {
    return with_activations(in_float32, [=](auto kind) {
        return attend<decltype(kind)>(projected, rows, heads, size, *bias, out);
    });
}
