// Compares the kernels with plain loops in double: products, attention and a block, of drawn numbers and odd sizes.
//
// kernels_beside_reference: needs no Python and no torch, so that it runs wherever the kernels are compiled for. Prints
// the largest error of each, as a part of the largest value, and a number made of all bits, by which what two processors
// compute is compared; ends with 1 where an error is too large. It links what it tests.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using Numbers = std::vector<double>;

std::mt19937 generator(1);
bool all_good = true;

Numbers drawn(size_t count, double spread) {
    std::normal_distribution<double> normal(0, spread);
    Numbers made(count);
    // As float32 has them, so that both sides begin with the same.
    for (double& number : made) number = static_cast<float>(normal(generator));
    return made;
}

std::vector<float> floats(const Numbers& numbers) { return {numbers.begin(), numbers.end()}; }

// [rows, depth] · [columns, depth]ᵀ.
Numbers product(const Numbers& x, const Numbers& weight, size_t rows, size_t depth) {
    const size_t columns = weight.size() / depth;
    Numbers out(rows * columns);
    for (size_t row = 0; row < rows; row++)
        for (size_t column = 0; column < columns; column++)
            for (size_t k = 0; k < depth; k++)
                out[row * columns + column] += x[row * depth + k] * weight[column * depth + k];
    return out;
}

Numbers normed(const Numbers& x, const Numbers& weight, double epsilon) {
    const size_t width = weight.size();
    Numbers out(x.size());
    for (size_t row = 0; row < x.size() / width; row++) {
        double squares = 0;
        for (size_t k = 0; k < width; k++) squares += x[row * width + k] * x[row * width + k];
        const double factor = 1 / std::sqrt(squares / width + epsilon);
        for (size_t k = 0; k < width; k++) out[row * width + k] = x[row * width + k] * factor * weight[k];
    }
    return out;
}

double gelu(double x) { return x / (1 + std::exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))); }

// The first half of each row's columns, activated, times the second.
Numbers gated(const Numbers& x, size_t rows) {
    const size_t width = x.size() / rows / 2;
    Numbers out(rows * width);
    for (size_t row = 0; row < rows; row++)
        for (size_t k = 0; k < width; k++)
            out[row * width + k] = gelu(x[row * 2 * width + k]) * x[row * 2 * width + width + k];
    return out;
}

// Of one document: every row sees all.
Numbers attended(const Numbers& projected, size_t rows, size_t heads, size_t size, const Numbers& table,
                 Index reach) {
    Numbers out(rows * heads * size);
    const auto at = [&](size_t row, size_t part, size_t head) {
        return &projected[((row * 3 + part) * heads + head) * size];
    };
    for (size_t head = 0; head < heads; head++)
        for (size_t query = 0; query < rows; query++) {
            Numbers weights(rows);
            double sum = 0;
            for (size_t key = 0; key < rows; key++) {
                double logit = 0;
                for (size_t k = 0; k < size; k++) logit += at(query, 0, head)[k] * at(key, 1, head)[k];
                const Index apart = static_cast<Index>(key) - static_cast<Index>(query);
                const Index distance = std::clamp<Index>(apart, -reach, reach);
                weights[key] = std::exp(logit + table[head * (2 * reach + 1) + reach + distance]);
                sum += weights[key];
            }
            for (size_t key = 0; key < rows; key++)
                for (size_t k = 0; k < size; k++)
                    out[(query * heads + head) * size + k] += weights[key] / sum * at(key, 2, head)[k];
        }
    return out;
}

uint64_t number_of_bits(const std::vector<float>& values) {
    uint64_t number = 14695981039346656037u;  // FNV-1a
    for (const float& value : values) {
        unsigned char bytes[sizeof(value)];
        std::memcpy(bytes, &value, sizeof(value));
        for (unsigned char byte : bytes) number = (number ^ byte) * 1099511628211u;
    }
    return number;
}

void tell(const std::string& what, const Numbers& expected, const std::vector<float>& found, double allowed) {
    double largest = 0, error = 0;
    for (size_t i = 0; i < expected.size(); i++) {
        largest = std::max(largest, std::abs(expected[i]));
        const double apart = std::abs(expected[i] - found[i]);
        error = apart <= error ? error : apart;  // not a number stays
    }
    const bool is_good = error <= allowed * largest;
    all_good = all_good && is_good;
    std::printf("%s: %.1e of %.1e allowed, bits %016llx%s\n", what.c_str(), error / largest, allowed,
                static_cast<unsigned long long>(number_of_bits(found)), is_good ? "" : " WRONG");
}

// What a kind of weights is called, its number and that of its format, and which errors it may have.
struct Tested {
    const char* name;
    int kind, format;
    bool in_bfloat16;  // activations
    double allowed;
};

// A weight for the kernels, which lies here.
class Held {
  public:
    Held(const Numbers& numbers, Index depth, const Tested& as, bool is_gated)
        : depth_(depth), columns_(static_cast<Index>(numbers.size()) / depth), as_(as), is_gated_(is_gated) {
        if (as.format == kFloat32) {
            values_.resize(numbers.size() * 4);
            std::memcpy(values_.data(), floats(numbers).data(), values_.size());
        } else if (as.format == kBfloat16) {
            for (float number : floats(numbers)) {
                uint32_t bits;
                std::memcpy(&bits, &number, 4);
                const uint16_t half = static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
                values_.push_back(static_cast<char>(half & 255)), values_.push_back(static_cast<char>(half >> 8));
            }
        } else {
            for (Index column = 0; column < columns_; column++) quantise(&numbers[column * depth]);
        }
        piece_ = {values_.data(), scales_.data(), nullptr, columns_, 1, as.format};
        if (as.format == kInt8) to_panels();
    }

    // Of no use once this is gone, or has been put in panels.
    Matrix matrix() const {
        const bool is_piece = panels_.empty();
        const int32_t* panels = is_piece ? nullptr : panels_.data();
        return {panels, is_piece ? &piece_ : nullptr, is_piece, columns_, depth_, is_gated_, as_.kind};
    }

    void to_panels() {
        const Matrix from = matrix();
        std::vector<int32_t> panels(t5_panel_steps(&from));
        t5_to_panels(&from, panels.data());
        panels_ = panels;
    }

  private:
    void quantise(const double* row) {
        double largest = 1e-30;
        for (Index k = 0; k < depth_; k++) largest = std::max(largest, std::abs(row[k]));
        scales_.push_back(static_cast<float>(largest / 127));
        for (Index k = 0; k < depth_; k++) values_.push_back(static_cast<char>(std::lround(row[k] / largest * 127)));
    }

    Index depth_, columns_;
    Tested as_;
    bool is_gated_;
    std::vector<char> values_;
    std::vector<float> scales_;
    std::vector<int32_t> panels_;
    Piece piece_;
};

std::vector<float> read_back(const std::vector<char>& stored, bool in_bfloat16) {
    std::vector<float> out(stored.size() / (in_bfloat16 ? 2 : 4));
    for (size_t i = 0; i < out.size(); i++) {
        uint32_t bits = 0;
        if (in_bfloat16) std::memcpy(reinterpret_cast<char*>(&bits) + 2, &stored[2 * i], 2);
        else std::memcpy(&bits, &stored[4 * i], 4);
        std::memcpy(&out[i], &bits, 4);
    }
    return out;
}

void compare(const Tested& as, Index rows, bool in_panels) {
    const Index heads = 3, size = 10, width = 44, hidden = 68, reach = 4, attended_width = heads * size;
    const std::string place = in_panels ? ", in panels, " : ", in place, ";
    const std::string name = as.name + place + std::to_string(rows) + " rows";
    const Numbers x = drawn(rows * width, 1), attention_norm = drawn(width, 1), dense_norm = drawn(width, 1);
    const Numbers qkv = drawn(3 * attended_width * width, 0.1), o = drawn(width * attended_width, 0.1);
    const Numbers inner = drawn(2 * hidden * width, 0.1), wo = drawn(width * hidden, 0.1);
    const Numbers table = drawn(heads * (2 * reach + 1), 1);
    const float epsilon = 1e-6f;
    // Depths of bytes are multiples of four.
    const bool in_bytes = as.format == kInt8;
    const Index item = as.in_bfloat16 ? 2 : 4;

    Held held_inner(inner, width, as, true), held_wo(wo, hidden, as, false);
    if (in_panels && !in_bytes) held_inner.to_panels(), held_wo.to_panels();
    const Matrix inner_matrix = held_inner.matrix(), wo_matrix = held_wo.matrix();
    const std::vector<float> residual = floats(x), norm = floats(dense_norm);
    std::vector<char> wide(rows * hidden * item);
    int status = t5_normed_product(residual.data(), rows, norm.data(), epsilon, &inner_matrix, 2, wide.data());
    const Numbers wide_expected = gated(product(normed(x, dense_norm, epsilon), inner, rows, width), rows);
    tell(name + ", gated product", wide_expected, read_back(wide, as.in_bfloat16), as.allowed);

    std::vector<float> sum = residual;
    status |= t5_added_product(wide.data(), rows, &wo_matrix, sum.data());
    Numbers sum_expected = product(wide_expected, wo, rows, hidden);
    for (size_t i = 0; i < x.size(); i++) sum_expected[i] += x[i];
    tell(name + ", added product", sum_expected, sum, as.allowed);

    if (!in_bytes) {
        Held held_qkv(qkv, width, as, false), held_o(o, attended_width, as, false);
        if (in_panels) held_qkv.to_panels(), held_o.to_panels();
        const std::vector<float> own_table = floats(table), first_norm = floats(attention_norm);
        const int64_t documents[] = {0, rows, 0, rows};
        const Bias bias{documents, 1, own_table.data(), reach, 1.f};
        const BlockWeights weights{held_qkv.matrix(), held_o.matrix(), inner_matrix, wo_matrix, heads, epsilon, 2};
        std::vector<char> room(rows * std::max(3 * attended_width, hidden) * item), mixed(rows * attended_width * item);
        std::vector<float> block = residual;
        status |= t5_block(&weights, block.data(), rows, first_norm.data(), norm.data(), &bias, room.data(), mixed.data());
        const Numbers projected = product(normed(x, attention_norm, epsilon), qkv, rows, width);
        Numbers between = product(attended(projected, rows, heads, size, table, reach), o, rows, attended_width);
        for (size_t i = 0; i < x.size(); i++) between[i] += x[i];
        const Numbers dense = gated(product(normed(between, dense_norm, epsilon), inner, rows, width), rows);
        Numbers block_expected = product(dense, wo, rows, hidden);
        for (size_t i = 0; i < x.size(); i++) block_expected[i] += between[i];
        tell(name + ", block", block_expected, block, as.allowed);
    }
    if (status != 0) std::printf("%s: status %d WRONG\n", name.c_str(), status), all_good = false;
}

}  // namespace

int main() {
    // Without it a system ends a process at its first tile.
    t5_is_permitted();
#ifdef WITH_BFLOAT16
    const std::vector<Tested> kinds = {
        {"bfloat16", 0, kBfloat16, true, 3e-2}, {"float32", 1, kFloat32, false, 3e-6},
        {"bytes beside bfloat16", 2, kInt8, true, 4e-2}, {"bytes", 3, kInt8, false, 4e-2}};
#else
    const std::vector<Tested> kinds = {
        {"float32", 1, kFloat32, false, 3e-6},
        {"weights in bfloat16", 4, kBfloat16, false, 2e-2},
        {"bytes", 3, kInt8, false, 4e-2}};
#endif
    for (int threads : {1, 2, 5}) {
        t5_set_threads(threads);
        for (const Tested& as : kinds)
            for (Index rows : std::initializer_list<Index>{1, 7, 37})
                for (bool in_panels : {false, true}) compare(as, rows, in_panels);
    }
    std::printf(all_good ? "all good\n" : "something is wrong\n");
    return all_good ? 0 : 1;
}
