// AMX's tiles in plain C++, for processors that have none: included before the kernels, it takes the place of the
// intrinsics, and of the system, which must be asked for tiles. Shapes come from the configuration, which makes all tiles
// zeros; what is used against the rules aborts.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    int rows = 0, row_bytes = 0;
    char bytes[16][64] = {};
};

inline Tile& tile(int number) {
    static thread_local Tile tiles[8];
    return tiles[number];
}

inline void refuse(const char* why) {
    std::fprintf(stderr, "a tile is used as it may not be: %s\n", why);
    std::abort();
}

inline std::atomic<bool> is_permitted{false};

// As Linux takes ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA; without it a process ends at its first tile.
inline long ask_system(long call, long request, long feature) {
    if (call != SYS_arch_prctl || request != 0x1023 || feature != 18) return -1;
    is_permitted = true;
    return 0;
}

inline Tile& shaped(int number) {
    Tile& found = tile(number);
    if (found.rows == 0) refuse("it has no shape");
    return found;
}

inline void configure(const void* from) {
    const auto* bytes = static_cast<const uint8_t*>(from);
    if (!is_permitted) refuse("the system was not asked");
    if (bytes[0] != 1) refuse("an unknown palette");
    for (int place = 2; place < 64; place++)
        if (bytes[place] && (place < 16 || (place >= 32 && place < 48) || place >= 56)) refuse("a reserved byte");
    for (int number = 0; number < 8; number++) {
        Tile& one = tile(number);
        one = Tile();
        std::memcpy(&one.row_bytes, bytes + 16 + 2 * number, 2);
        one.rows = bytes[48 + number];
        if (one.rows > 16 || one.row_bytes > 64 || (one.rows == 0) != (one.row_bytes == 0)) refuse("a wrong shape");
    }
}

inline void release() {
    for (int number = 0; number < 8; number++) tile(number) = Tile();
}

inline void zero(int number) { std::memset(shaped(number).bytes, 0, sizeof(Tile::bytes)); }

inline void load(int number, const void* from, long stride) {
    Tile& one = shaped(number);
    std::memset(one.bytes, 0, sizeof(one.bytes));
    for (int row = 0; row < one.rows; row++)
        std::memcpy(one.bytes[row], static_cast<const char*>(from) + row * stride, one.row_bytes);
}

inline void store(int number, void* to, long stride) {
    const Tile& one = shaped(number);
    for (int row = 0; row < one.rows; row++)
        std::memcpy(static_cast<char*>(to) + row * stride, one.bytes[row], one.row_bytes);
}

template <class T>
T read(const Tile& from, int row, int place) {
    T number;
    std::memcpy(&number, from.bytes[row] + place * sizeof(T), sizeof(T));
    return number;
}

template <class Sum, class Add>
void multiply(int sums, int rows, int columns, Add add) {
    Tile& to = shaped(sums);
    const Tile &left = shaped(rows), &right = shaped(columns);
    if (to.rows != left.rows || to.row_bytes != right.row_bytes || left.row_bytes != 4 * right.rows)
        refuse("shapes do not fit");
    for (int row = 0; row < to.rows; row++)
        for (int column = 0; column < to.row_bytes / 4; column++) {
            const Sum sum = add(read<Sum>(to, row, column), left, row, right, column);
            std::memcpy(to.bytes[row] + column * 4, &sum, 4);
        }
}

inline float widened(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float number;
    std::memcpy(&number, &bits, 4);
    return number;
}

// A number below the least normal one is taken as zero, and becomes zero.
inline float without_denormals(float number) { return std::fabs(number) < FLT_MIN ? std::copysign(0.f, number) : number; }

// Even and odd places are summed apart, and then added to what there is: in this order, so that sums are the same to
// the bit.
inline void multiply_bfloat16(int sums, int rows, int columns) {
    multiply<float>(sums, rows, columns, [](float sum, const Tile& left, int row, const Tile& right, int column) {
        float parts[2] = {};
        for (int k = 0; k < right.rows; k++)
            for (int i = 0; i < 2; i++) {
                const float one = without_denormals(widened(read<uint16_t>(left, row, 2 * k + i)));
                const float other = without_denormals(widened(read<uint16_t>(right, k, 2 * column + i)));
                parts[i] = without_denormals(std::fma(one, other, parts[i]));
            }
        return without_denormals(without_denormals(sum) + without_denormals(parts[0] + parts[1]));
    });
}

inline void multiply_bytes(int sums, int rows, int columns) {
    multiply<int32_t>(sums, rows, columns, [](int32_t sum, const Tile& left, int row, const Tile& right, int column) {
        for (int place = 0; place < 4 * right.rows; place++)
            sum += read<uint8_t>(left, row, place) * read<int8_t>(right, place / 4, 4 * column + place % 4);
        return sum;
    });
}

}  // namespace emulated

#define syscall emulated::ask_system
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbusd
#define _tile_loadconfig emulated::configure
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_dpbf16ps emulated::multiply_bfloat16
#define _tile_dpbusd emulated::multiply_bytes
