// Attention of documents in a packed row, with T5's bias by distance.

#include <cmath>
#include <cstring>
#include <limits>

#include "tiles.h"

namespace {

// The queries are `queries` rows from `start` on, the keys `keys` rows from `start + key_start` on; keys ≥ 1.
struct Document {
    int64_t start, queries, key_start, keys;
};

// Where queries, keys and values of all heads lie beside each other: [tokens, 3 · heads · size].
struct Projected {
    const bfloat16* values;
    long heads, size;

    const bfloat16* at(long row, long part, long head) const {
        return values + (row * 3 + part) * heads * size + head * size;
    }
};

long padded(long count, long multiple) { return (count + multiple - 1) / multiple * multiple; }

// One head of one document at a time; the memory serves the largest.
class Head {
  public:
    Head(long most_queries, long most_keys, long size)
        : size_(size), reach_(most_queries + most_keys),
          keys_(allocate<bfloat16>(padded(most_keys, kPanelColumns) * size)),
          values_(allocate<bfloat16>(padded(most_keys, kPanelColumns) * padded(size, kPanelColumns))),
          queries_(allocate<bfloat16>(kTileRows * size)),
          weights_(allocate<bfloat16>(kTileRows * padded(most_keys, kPanelColumns))),
          logits_(allocate<float>(kTileRows * padded(most_keys, kPanelColumns))),
          bias_(allocate<float>(2 * (most_queries + most_keys) + kPanelColumns)) {}

    bool has_memory() const { return keys_ && values_ && queries_ && weights_ && logits_ && bias_; }

    void attend(const Projected& from, const Document& document, long head, const float* table, long table_reach,
                float scale, bfloat16* out) {
        const long first_key = document.start + document.key_start;
        spread_bias(table, table_reach);
        pack_keys(from, first_key, document.keys, head);
        pack_values(from, first_key, document.keys, head);
        const Tiles tiles(document.queries);
        for (long tile = 0; tile < tiles.count; tile++) {
            const long first = tiles.start(tile), rows = tiles.size(tile);
            for (long row = 0; row < rows; row++) put_query(from.at(document.start + first + row, 0, head), rows, row);
            find_logits(rows, document.keys, document.key_start - first, scale);
            for (long row = 0; row < rows; row++) sums_[row] = find_weights(rows, row, document.keys);
            add_values(rows, document.keys, out + (document.start + first) * from.heads * size_ + head * size_,
                       from.heads * size_);
        }
    }

  private:
    // The bias of a key at distance d lies at reach_ + d, and beyond the table's reach is that at its end.
    void spread_bias(const float* table, long table_reach) {
        for (long place = 0; place < 2 * reach_ + kPanelColumns; place++) {
            const long distance = std::max(-table_reach, std::min(table_reach, place - reach_));
            bias_[place] = table[distance + table_reach];
        }
    }

    // Keys are the columns of a product with queries.
    void pack_keys(const Projected& from, long first, long count, long head) {
        int32_t* panels = reinterpret_cast<int32_t*>(keys_.get());
        const long pairs = size_ / 2;
        for (long key = 0; key < padded(count, kPanelColumns); key++) {
            int32_t* place = panels + key / kPanelColumns * pairs * kPanelColumns + key % kPanelColumns;
            const int32_t* numbers =
                key < count ? reinterpret_cast<const int32_t*>(from.at(first + key, 1, head)) : nullptr;
            for (long pair = 0; pair < pairs; pair++) place[pair * kPanelColumns] = numbers ? numbers[pair] : 0;
        }
    }

    // Keys are what a product with values sums over.
    void pack_values(const Projected& from, long first, long count, long head) {
        const long depth = padded(count, kPanelColumns);
        std::memset(values_.get(), 0, depth * padded(size_, kPanelColumns) * sizeof(bfloat16));
        for (long key = 0; key < count; key++) {
            const bfloat16* numbers = from.at(first + key, 2, head);
            for (long column = 0; column < size_; column++)
                values_[column / kPanelColumns * depth * kPanelColumns + key / 2 * kPanelPair +
                        column % kPanelColumns * 2 + key % 2] = numbers[column];
        }
    }

    void put_query(const bfloat16* numbers, long rows, long row) {
        for (long column = 0; column < size_; column += kLanes) {
            const long count = std::min(kLanes, size_ - column);
            put_in_tile(queries_.get(), rows, row, column, _mm256_maskz_loadu_epi16(first_lanes(count), numbers + column), count);
        }
    }

    // query · key · scale + bias; `shift` is the position of the first key less that of the tile's first query.
    void find_logits(long rows, long keys, long shift, float scale) {
        const long depth = padded(keys, kPanelColumns);
        const __m512 factor = _mm512_set1_ps(scale);
        for (long key = 0; key < keys; key += kPanelColumns)
            multiply_tile(rows, queries_.get(), keys_.get() + key * size_, keys_.get() + key * size_, size_ / 2,
                          [&](long row, __m512 left, __m512 right) {
                              const float* bias = bias_.get() + reach_ + shift + key - row;
                              float* place = logits_.get() + row * depth + key;
                              _mm512_storeu_ps(place, _mm512_fmadd_ps(left, factor, _mm512_loadu_ps(bias)));
                              _mm512_storeu_ps(place + kLanes,
                                               _mm512_fmadd_ps(right, factor, _mm512_loadu_ps(bias + kLanes)));
                          });
    }

    // The softmax of a row before it is divided by the sum of its weights, which is returned: that of the rounded ones,
    // so that those add up to 1.
    float find_weights(long rows, long row, long keys) {
        const long depth = padded(keys, kPanelColumns);
        const float* logits = logits_.get() + row * depth;
        __m512 largest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        for (long key = 0; key < keys; key += kLanes)
            largest = _mm512_mask_max_ps(largest, first_lanes(keys - key), largest, _mm512_loadu_ps(logits + key));
        const __m512 offset = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
        __m512 sum = _mm512_setzero_ps();
        for (long key = 0; key < depth; key += kLanes) {
            const __m512 weights = exponential(_mm512_sub_ps(_mm512_loadu_ps(logits + key), offset));
            const __m256i round = rounded(_mm512_maskz_mov_ps(first_lanes(keys - key), weights));
            sum = _mm512_add_ps(sum, widened(round));
            put_in_tile(weights_.get(), rows, row, key, round, kLanes);
        }
        return _mm512_reduce_add_ps(sum);
    }

    void add_values(long rows, long keys, bfloat16* out, long out_width) {
        const long depth = padded(keys, kPanelColumns);
        for (long column = 0; column < size_; column += kPanelColumns)
            multiply_tile(rows, weights_.get(), values_.get() + column * depth, values_.get() + column * depth, depth / 2,
                          [&](long row, __m512 left, __m512 right) {
                              const __m512 sum = _mm512_set1_ps(sums_[row]);
                              bfloat16* place = out + row * out_width + column;
                              const long columns = size_ - column;
                              _mm256_mask_storeu_epi16(place, first_lanes(columns), rounded(_mm512_div_ps(left, sum)));
                              _mm256_mask_storeu_epi16(place + kLanes, first_lanes(columns - kLanes),
                                                       rounded(_mm512_div_ps(right, sum)));
                          });
    }

    const long size_, reach_;
    const Buffer<bfloat16> keys_, values_, queries_, weights_;
    const Buffer<float> logits_, bias_;
    float sums_[kTileRows];
};

}  // namespace

// softmax(q · kᵀ · scale + bias) · v for every document and head. `table` is the bias by distance, [heads,
// 2 · table_reach + 1]; `projected` is [tokens, 3 · heads · size], the result [tokens, heads · size].
extern "C" int t5_attention(const bfloat16* projected, long heads, long size, const int64_t* documents, long count,
                            const float* table, long table_reach, float scale, bfloat16* out) {
    const Projected from{projected, heads, size};
    const Document* all = reinterpret_cast<const Document*>(documents);
    long most_queries = 0, most_keys = 0;
    for (long i = 0; i < count; i++) {
        most_queries = std::max<long>(most_queries, all[i].queries);
        most_keys = std::max<long>(most_keys, all[i].keys);
    }
    bool failed = false;
#pragma omp parallel reduction(|| : failed)
    {
        Head work(most_queries, most_keys, size);
        failed = !work.has_memory();
#pragma omp for schedule(dynamic)
        for (long task = 0; task < count * heads; task++) {
            const long head = task % heads;
            if (!failed)
                work.attend(from, all[task / heads], head, table + head * (2 * table_reach + 1), table_reach, scale, out);
        }
    }
    return failed ? kOutOfMemory : kOk;
}
