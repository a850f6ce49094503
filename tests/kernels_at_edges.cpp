// Calls the kernels on random shapes, each buffer being as long as it must be and no longer.
//
// kernels_at_edges SEED COUNT MEMORY ACTIVATIONS [FAULT]: ACTIVATIONS is "float32" for kernels that store them in that
// alone, and "both" for those that have bfloat16, too. MEMORY is "heap", for sanitizers, or "pages": then a page that nobody may
// touch lies right before or right behind each buffer. FAULT, a word, gives each call a buffer that is too short by one
// number. Prints how many calls each function had; ends with 1 where a result is not finite, or depends on where a
// weight lies.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

std::mt19937 generator;
bool in_pages = false, in_float32_alone = false;
long missing = 0;  // bytes

long draw(long least, long most) { return std::uniform_int_distribution<long>(least, most)(generator); }
// Around the sizes of tiles, registers and panels as often as anywhere else.
long draw_size(long most) {
    static const long around[] = {1, 11, 12, 13, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 96, 127, 128, 129};
    const long found = draw(0, 1) ? around[draw(0, std::size(around) - 1)] : draw(1, most);
    return std::min(found, most);
}
long multiple(long size, long unit) { return (size + unit - 1) / unit * unit; }

// Memory of exactly so many bytes.
class Bytes {
  public:
    explicit Bytes(long size) : size_(size), given_(std::max(0L, size - missing)) {
        if (!in_pages) {
            start_ = static_cast<char*>(std::malloc(given_));
            return;
        }
        const long page = sysconf(_SC_PAGESIZE), inside = multiple(std::max(given_, 1L), page);
        mapped_ = inside + 2 * page;
        void* place = mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (place == MAP_FAILED || mprotect(static_cast<char*>(place) + page, inside, PROT_READ | PROT_WRITE)) {
            std::perror("mmap");
            std::exit(3);
        }
        map_ = static_cast<char*>(place);
        start_ = map_ + page + (draw(0, 1) ? inside - given_ : 0);
    }
    ~Bytes() {
        if (map_) munmap(map_, mapped_);
        else std::free(start_);
    }
    Bytes(const Bytes&) = delete;

    template <class T>
    T* as() const { return reinterpret_cast<T*>(start_); }
    char* data() const { return start_; }
    long size() const { return given_; }

  private:
    long size_, given_, mapped_ = 0;
    char *start_ = nullptr, *map_ = nullptr;
};

// ---------------------------------------------------------------------------------------------------------------------
// Numbers
// ---------------------------------------------------------------------------------------------------------------------

long bytes_of(int format) { return format == kFloat32 ? 4 : format >= kFloat8E4m3 ? 1 : 2; }

// A kind is a number of kinds.h: 0 bfloat16, 1 float32, 2 and 3 bytes beside these; 4 and 5 weights in bfloat16 and
// float16 beside float32.
int draw_kind() {
    static const int with_bfloat16[] = {0, 1, 2, 3}, with_float32[] = {1, 3, 4, 5};
    return (in_float32_alone ? with_float32 : with_bfloat16)[draw(0, 3)];
}
bool is_int8(int kind) { return kind == 2 || kind == 3; }
long number_bytes(int kind) { return kind == 0 || kind == 2 ? 2 : 4; }
// What the numbers of a weight in panels are.
Format kept(int kind) {
    static const Format formats[] = {kBfloat16, kFloat32, kInt8, kInt8, kBfloat16, kFloat16};
    return formats[kind];
}

void fill(const Bytes& bytes, int format, long first = 0) {
    const long unit = bytes_of(format);
    for (long i = first; i + unit <= bytes.size(); i += unit) {
        const float value = draw(-1000, 1000) / 1000.f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (format == kBfloat16) bits >>= 16;
        if (format == kFloat16) bits = (bits >> 16 & 0x8000) | (uint32_t)draw(0, 0x3bff);   // below 1
        if (format == kFloat8E4m3) bits = (bits >> 24 & 0x80) | (uint32_t)draw(0, 0x37);    // below 1
        if (format == kFloat8E5m2) bits = (bits >> 24 & 0x80) | (uint32_t)draw(0, 0x3b);    // below 1
        if (format == kInt8) bits = (uint32_t)draw(-127, 127);
        std::memcpy(bytes.data() + i, &bits, unit);
    }
}

void fill_numbers(const Bytes& bytes, int kind) { fill(bytes, number_bytes(kind) == 4 ? kFloat32 : kBfloat16); }

bool are_finite(const Bytes& bytes, long unit) {
    for (long i = 0; i + unit <= bytes.size(); i += unit) {
        uint32_t bits = 0;
        std::memcpy(&bits, bytes.data() + i, unit);
        if (unit == 2) bits <<= 16;
        if ((bits & 0x7f800000) == 0x7f800000) return false;
    }
    return true;
}

void expect(bool holds, const char* what) {
    if (holds) return;
    std::printf("%s\n", what);
    std::exit(1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights
// ---------------------------------------------------------------------------------------------------------------------

// A weight as it lies, and in panels.
struct Weight {
    int kind;
    long shift;  // values that are no panels may begin within a number, as they may in a file
    Bytes values, scales;
    Matrix plain;
    Bytes panels;
    Matrix packed;

    Weight(int kind, long columns, long depth, bool is_gated)
        : Weight(kind, columns, depth, is_gated, is_int8(kind) ? kInt8 : Format(draw(kBfloat16, kFloat8E5m2))) {}

    Weight(int kind, long columns, long depth, bool is_gated, Format format)
        : kind(kind), shift(draw(0, 1) ? draw(1, 3) : 0), values(columns * depth * bytes_of(format) + shift),
          scales(columns * 4), plain{values.data() + shift, format == kInt8 ? scales.as<float>() : nullptr, columns, depth, format, is_gated, kind},
          panels(t5_panel_steps(&plain) * 4), packed(plain) {
        fill(values, format, shift);
        fill(scales, kFloat32);
        t5_to_panels(&plain, panels.data());
        packed.values = panels.data();
        packed.format = kPanels;
        const Bytes back(columns * depth * bytes_of(kept(kind)));
        t5_from_panels(&packed, back.data());
        if (format == kept(kind))
            expect(!std::memcmp(back.data(), values.data() + shift, back.size()), "panels are not the weight");
    }

    // Bytes are multiplied from panels alone.
    const Matrix& any() const { return is_int8(kind) || draw(0, 1) ? packed : plain; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Calls
// ---------------------------------------------------------------------------------------------------------------------

void call_normed_product() {
    const int kind = draw_kind();
    const bool is_gated = draw(0, 1);
    const long rows = draw_size(150), depth = multiple(draw_size(300), is_int8(kind) ? 4 : 2);
    const long columns = multiple(draw_size(200), is_gated ? 2 : 1);
    const Weight weight(kind, columns, depth, is_gated);
    const Bytes residual(rows * depth * 4), norm(depth * 4);
    fill(residual, kFloat32);
    fill(norm, kFloat32);
    const float* norm_weight = draw(0, 1) ? norm.as<float>() : nullptr;
    const int activation = draw(0, 3);
    const long size = rows * (is_gated ? columns / 2 : columns) * number_bytes(kind);
    const Bytes out(size), other(size);
    for (const Bytes* place : {&out, &other}) {
        const Matrix& matrix = place == &out ? weight.packed : weight.any();
        const int status =
            t5_normed_product(residual.as<float>(), rows, norm_weight, 1e-6f, &matrix, activation, place->data());
        expect(status == 0 && are_finite(*place, number_bytes(kind)), "a normed product is not finite");
    }
    expect(!std::memcmp(out.data(), other.data(), out.size()), "a product depends on where its weight lies");
}

void call_added_product() {
    const int kind = draw_kind();
    const long rows = draw_size(150), depth = multiple(draw_size(300), is_int8(kind) ? 4 : 2), columns = draw_size(200);
    const Weight weight(kind, columns, depth, false);
    const Bytes x(rows * depth * number_bytes(kind)), residual(rows * columns * 4);
    fill_numbers(x, kind);
    fill(residual, kFloat32);
    const int status = t5_added_product(x.data(), rows, &weight.any(), residual.as<float>());
    expect(status == 0 && are_finite(residual, 4), "an added product is not finite");
}

// Documents that take all rows, and a table.
struct Attended {
    std::vector<int64_t> numbers;
    Bytes documents, table;
    Bias bias;

    Attended(long rows, long heads) : Attended(drawn(rows), draw(0, 1) ? draw(0, 3) : draw(0, 140), heads) {}

    Attended(std::vector<int64_t> drawn, long reach, long heads)
        : numbers(std::move(drawn)), documents(numbers.size() * 8), table(heads * (2 * reach + 1) * 4),
          bias{documents.as<int64_t>(), long(numbers.size() / 4), table.as<float>(), reach, 0.3f} {
        std::memcpy(documents.data(), numbers.data(), documents.size());
        fill(table, kFloat32);
    }

    static std::vector<int64_t> drawn(long rows) {
        std::vector<int64_t> found;
        for (long start = 0; start < rows;) {
            const long queries = std::min(rows - start, draw_size(100)), key_start = draw(0, queries - 1);
            const long first = draw(0, 1) ? 0 : key_start, keys = draw(0, 1) ? queries - first : draw(1, queries - first);
            found.insert(found.end(), {start, queries, first, keys});
            start += queries;
        }
        return found;
    }
};

void call_attention() {
    const int in_float32 = in_float32_alone || draw(0, 1);
    const long rows = draw_size(150), heads = draw(1, 4), size = 2 * draw(1, 40), width = heads * size;
    const long bytes = in_float32 ? 4 : 2;
    const Attended attended(rows, heads);
    const Bytes projected(rows * 3 * width * bytes), out(rows * width * bytes);
    fill_numbers(projected, in_float32);
    const int status = t5_attention(projected.data(), rows, heads, size, &attended.bias, in_float32, out.data());
    expect(status == 0 && are_finite(out, bytes), "attention is not finite");
}

// Documents that are not as they are to be: nothing is read or written by them.
void call_attention_in_vain() {
    const long rows = draw_size(40);
    const int64_t far = int64_t(1) << draw(0, 62);
    std::vector<int64_t> numbers = Attended::drawn(rows);
    int64_t& spoiled = numbers[draw(0, numbers.size() - 1)];
    spoiled = draw(0, 1) ? -far : spoiled + far;
    const Attended attended(numbers, 3, 2);
    const Bytes projected(rows * 24 * 4), out(rows * 8 * 4);
    fill(projected, kFloat32);
    const int status = t5_attention(projected.data(), rows, 2, 4, &attended.bias, 1, out.data());
    // A key or row more may be within the document.
    expect(status == 2 || (status == 0 && far < rows), "wrong documents were taken");
}

void call_block() {
    const int kind = draw_kind();
    const long unit = is_int8(kind) ? 4 : 2, heads = draw(1, 3), rows = draw_size(70);
    const long size = unit * draw(1, 12), width = multiple(draw_size(130), unit), hidden = multiple(draw_size(130), unit);
    const bool is_gated = draw(0, 1);
    const Weight qkv(kind, 3 * heads * size, width, false), o(kind, width, heads * size, false);
    const Weight inner(kind, is_gated ? 2 * hidden : hidden, width, is_gated), wo(kind, width, hidden, false);
    const BlockWeights weights{qkv.any(), o.any(), inner.any(), wo.any(), heads, 1e-6f, int(draw(1, 3))};
    const Attended attended(rows, heads);
    const Bytes residual(rows * width * 4), norm(width * 4);
    const Bytes wide(rows * std::max(3 * heads * size, hidden) * number_bytes(kind));
    const Bytes between(rows * heads * size * number_bytes(kind));
    fill(residual, kFloat32);
    fill(norm, kFloat32);
    const float* norm_weight = draw(0, 1) ? norm.as<float>() : nullptr;
    const int status = t5_block(&weights, residual.as<float>(), rows, norm_weight, norm_weight, &attended.bias,
                                wide.data(), between.data());
    expect(status == 0 && are_finite(residual, 4), "a block is not finite");
}

}  // namespace

int main(int count, char** words) {
    if (count < 5) return 3;
    generator.seed(std::atoi(words[1]));
    const long calls = std::atol(words[2]);
    in_pages = std::string(words[3]) == "pages";
    in_float32_alone = std::string(words[4]) == "float32";
    missing = count > 5 ? 2 : 0;
    void (*const functions[])() = {call_normed_product, call_added_product, call_attention, call_attention_in_vain,
                                   call_block};
    for (long call = 0; call < calls; call++) functions[call % std::size(functions)]();
    std::printf("%ld calls\n", calls);
}
