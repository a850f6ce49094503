// Calls the kernels on random shapes, each buffer being as long as it must be and no longer.
//
// kernels_at_edges SEED COUNT MEMORY ACTIVATIONS [FAULT]: ACTIVATIONS is "float32" for kernels that store them in that
// alone, and "both" for those that have bfloat16, too. MEMORY is "heap", for sanitizers, or "pages": then a page that nobody may
// touch lies right before or right behind each buffer. FAULT, a word, gives each call a buffer that is too short by one
// number. Prints how many calls there were, and to the error output a number made of all results' bits, by which what two
// processors compute is compared; ends with 1 where a result is not finite, or depends on where a weight lies.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
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
// Also whole blocks of 32 and 256 numbers.
long draw_depth(long most, long unit) {
    const long blocks[] = {unit, 32, 256};
    return multiple(draw_size(most), blocks[draw(0, 2)]);
}

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

// How many numbers stand together in how many bytes, and where float16 numbers begin in these; -1 for none.
struct Layout {
    long numbers, bytes;
    int halves[2];
};

Layout layout_of(int format) {
    static const Layout layouts[] = {
        {1, 2, {-1, -1}}, {1, 2, {-1, -1}}, {1, 4, {-1, -1}}, {1, 1, {-1, -1}}, {1, 1, {-1, -1}}, {1, 1, {-1, -1}},
        {32, 34, {0, -1}}, {32, 18, {0, -1}}, {32, 20, {0, 2}}, {32, 22, {0, -1}}, {32, 24, {0, 2}}, {32, 18, {0, -1}},
        {256, 84, {80, 82}}, {256, 110, {108, -1}}, {256, 144, {0, 2}}, {256, 176, {0, 2}}, {256, 210, {208, -1}},
        {256, 136, {0, -1}}, {2, 1, {-1, -1}}, {2, 1, {-1, -1}}, {2, 1, {-1, -1}}, {1, 1, {-1, -1}}, {1, 1, {-1, -1}},
        {1, 1, {-1, -1}}};
    return layouts[format];
}
long bytes_of(int format) { return layout_of(format).bytes; }
long row_bytes(int format, long depth) { return depth / layout_of(format).numbers * bytes_of(format); }

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

// Any bytes, and float16 numbers below 1/1024 where they stand.
void fill_blocks(const Bytes& bytes, const Layout& layout, long first) {
    for (long i = first; i < bytes.size(); i++) bytes.data()[i] = char(draw(0, 255));
    for (long i = first; i + layout.bytes <= bytes.size(); i += layout.bytes)
        for (int place : layout.halves) {
            const uint16_t half = draw(0, 1) << 15 | draw(0, 0x13ff);
            if (place >= 0) std::memcpy(bytes.data() + i + place, &half, 2);
        }
}

bool is_e4m3(int format) { return format == kFloat8E4m3 || format == kMXFP8 || format == kFloat8E4m3InBlocks; }

void fill(const Bytes& bytes, int format, long first = 0) {
    const long unit = bytes_of(format);
    if (layout_of(format).numbers > 1) return fill_blocks(bytes, layout_of(format), first);
    for (long i = first; i + unit <= bytes.size(); i += unit) {
        const float value = draw(-1000, 1000) / 1000.f;
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (format == kBfloat16) bits >>= 16;
        if (format == kFloat16) bits = (bits >> 16 & 0x8000) | (uint32_t)draw(0, 0x3bff);   // below 1
        if (is_e4m3(format)) bits = (bits >> 24 & 0x80) | (uint32_t)draw(0, 0x37);    // below 1
        if (format == kFloat8E5m2 || format == kFloat8E5m2InBlocks) bits = (bits >> 24 & 0x80) | (uint32_t)draw(0, 0x3b);    // below 1
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

uint64_t number_of_bits = 14695981039346656037u;  // of all results, as FNV-1a makes it

void expect_finite(int status, const Bytes& bytes, long unit, const char* what) {
    expect(status == 0 && are_finite(bytes, unit), what);
    for (long i = 0; i < bytes.size(); i++)
        number_of_bits = (number_of_bits ^ static_cast<unsigned char>(bytes.data()[i])) * 1099511628211u;
}

// ---------------------------------------------------------------------------------------------------------------------
// Weights
// ---------------------------------------------------------------------------------------------------------------------

// How scales lie beside numbers: how many there are, of how many bytes, and for how much each is.
struct BesideLayout {
    long across = 0, count = 0, bytes = 1;
    int across_bits = 0, down_bits = 0, outer_bits = 0;

    BesideLayout(int format, long columns, long depth) {
        if (format < kFourBits) return;
        const bool is_tiled = format == kNVFP4 || format == kMXFP8, is_in_blocks = format > kMXFP8;
        int whole = 4;  // of 4 bits, scales are for whole parts of the depth
        while (depth % (2L << whole) == 0) whole++;
        across_bits = format == kNVFP4 ? 4 : format == kMXFP8 ? 5 : draw(4, is_in_blocks ? 9 : whole);
        down_bits = is_in_blocks ? draw(0, 9) : 0;
        outer_bits = draw(0, 9);
        across = multiple((depth - 1 >> across_bits) + 1, is_tiled ? 4 : 1);
        count = across * multiple((columns - 1 >> down_bits) + 1, is_tiled ? 128 : 1);
        bytes = format == kFourBits || is_in_blocks ? 4 : 1;
    }
};

// Some columns of a weight, of any format that its depth allows.
struct SomeColumns {
    long shift;  // values may begin within a number, as they may in a file
    BesideLayout beside;
    Bytes values, scales, factors, beside_scales, table, codes, outer;
    bool is_plain;
    Piece piece;

    SomeColumns(int kind, long columns, long depth)
        : SomeColumns(columns, depth, drawn(kind, depth), draw(0, 1), !is_int8(kind)) {}

    SomeColumns(long columns, long depth, int format, bool is_plain, bool may_be_turned)
        : shift(draw(0, 1) ? draw(1, 3) : 0), beside(format, columns, depth),
          values(columns * row_bytes(format, depth) + shift), scales(columns * 4), factors(depth * 4),
          beside_scales(beside.count * beside.bytes + shift), table(16 * 4), codes(256 * 4),
          outer(((beside.count - 1 >> beside.outer_bits) + 1) * 4), is_plain(is_plain),
          piece{values.data() + shift, nullptr, nullptr, columns, 1, format, 0, {}} {
        fill(values, format, shift);
        fill(scales, kFloat32);
        fill(factors, kFloat32);
        const bool is_byte = format == kInt8 || format == kFloat8E4m3 || format == kFloat8E5m2;
        if (is_byte && (format == kInt8 || !is_plain)) piece.scales = scales.as<float>();
        if (!is_plain) piece.factors = factors.as<float>();
        if (format == kInt8 && !is_plain) piece.unit = 1 / 127.f;
        if (format == kInt8 && may_be_turned && depth % 4 == 0 && draw(0, 1)) turn(depth);
        if (format >= kFourBits) fill_beside(format);
    }

    void turn(long depth) {
        piece.unit = 1;
        do piece.turned = 4 << 2 * draw(0, 3);
        while (depth % piece.turned);
    }

    void fill_beside(int format) {
        const int most = format == kMXFP8 ? 127 : 255;  // 127 is 1
        for (long i = shift; i < beside_scales.size(); i++) beside_scales.data()[i] = char(draw(0, most));
        if (beside.bytes == 4) fill(beside_scales, kFloat32, shift);
        if (format == kNVFP4) fill(beside_scales, kFloat8E4m3, shift);
        for (const Bytes* each : {&table, &codes, &outer}) fill(*each, kFloat32);
        piece.beside = {beside_scales.data() + shift, table.as<float>(), codes.as<float>(), outer.as<float>(), beside.across,
                        0.5f, beside.across_bits, beside.down_bits, beside.outer_bits};
    }

    static int drawn(int kind, long depth) {
        if (is_int8(kind)) return kInt8;
        if (draw(0, 1)) return draw(depth % 32 == 0 ? kFourBits : kFloat8E4m3InBlocks, kFloat8E5m2InBlocks);
        return draw(kBfloat16, depth % 256 == 0 ? kIQ4_XS : depth % 32 == 0 ? kIQ4_NL : kInt8);
    }
};

// A weight as it lies, in up to four pieces, and in panels.
struct Weight {
    int kind;
    std::vector<std::unique_ptr<SomeColumns>> some;
    std::vector<Piece> pieces;
    Matrix plain;
    Bytes panels;
    Matrix packed;

    Weight(int kind, long columns, long depth, bool is_gated)
        : kind(kind), plain{nullptr, drawn_pieces(kind, columns, depth), long(pieces.size()), columns, depth, is_gated, kind},
          panels(t5_panel_steps(&plain) * 4), packed{panels.data(), nullptr, 0, columns, depth, is_gated, kind} {
        t5_to_panels(&plain, panels.data());
        const Bytes back(columns * depth * bytes_of(kept(kind)));
        t5_from_panels(&packed, back.data());
        long first = 0;
        for (const auto& part : some) {
            const long size = part->piece.columns * row_bytes(kept(kind), depth);
            const bool is_kept = part->piece.format == kept(kind) && (part->is_plain || is_int8(kind));
            if (is_kept && first + size <= back.size())
                expect(!std::memcmp(back.data() + first, part->piece.values, size), "panels are not the weight");
            first += size;
        }
    }

    const Piece* drawn_pieces(int kind, long columns, long depth) {
        while (columns > 0) {
            const long count = some.size() < 3 && draw(0, 1) ? draw(1, columns) : columns;
            some.push_back(std::make_unique<SomeColumns>(kind, count, depth));
            pieces.push_back(some.back()->piece);
            columns -= count;
        }
        return pieces.data();
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
    const long rows = draw_size(150), depth = draw_depth(300, is_int8(kind) ? 4 : 2);
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
        expect_finite(status, *place, number_bytes(kind), "a normed product is not finite");
    }
    expect(!std::memcmp(out.data(), other.data(), out.size()), "a product depends on where its weight lies");
}

void call_added_product() {
    const int kind = draw_kind();
    const long rows = draw_size(150), depth = draw_depth(300, is_int8(kind) ? 4 : 2), columns = draw_size(200);
    const Weight weight(kind, columns, depth, false);
    const Bytes x(rows * depth * number_bytes(kind)), residual(rows * columns * 4);
    fill_numbers(x, kind);
    fill(residual, kFloat32);
    const int status = t5_added_product(x.data(), rows, &weight.any(), residual.as<float>());
    expect_finite(status, residual, 4, "an added product is not finite");
}

void call_product() {
    const int kind = draw_kind();
    const long rows = draw_size(150), depth = draw_depth(300, is_int8(kind) ? 4 : 2), columns = draw_size(200);
    const Weight weight(kind, columns, depth, false);
    const Bytes x(rows * depth * number_bytes(kind)), out(rows * columns * number_bytes(kind)), other(out.size());
    fill_numbers(x, kind);
    for (const Bytes* place : {&out, &other}) {
        const int status = t5_product(x.data(), rows, place == &out ? &weight.packed : &weight.any(), place->data());
        expect_finite(status, *place, number_bytes(kind), "a product by itself is not finite");
    }
    expect(!std::memcmp(out.data(), other.data(), out.size()), "a product by itself depends on where its weight lies");
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
    expect_finite(status, out, bytes, "attention is not finite");
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
    const long size = unit * draw(1, 12), width = draw_depth(130, unit), hidden = draw_depth(130, unit);
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
    expect_finite(status, residual, 4, "a block is not finite");
}

}  // namespace

int main(int count, char** words) {
    if (count < 5) return 3;
    // Without it a system ends a process at its first tile.
    t5_is_permitted();
    generator.seed(std::atoi(words[1]));
    const long calls = std::atol(words[2]);
    in_pages = std::string(words[3]) == "pages";
    in_float32_alone = std::string(words[4]) == "float32";
    missing = count > 5 ? 2 : 0;
    void (*const functions[])() = {call_normed_product, call_added_product, call_product, call_attention,
                                   call_attention_in_vain, call_block};
    for (long call = 0; call < calls; call++) functions[call % std::size(functions)]();
    std::printf("%ld calls\n", calls);
    std::fprintf(stderr, "bits %016llx\n", static_cast<unsigned long long>(number_of_bits));
}
