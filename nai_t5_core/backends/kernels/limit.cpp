// What no product of this processor can exceed: the instruction that products are made of, and nothing else.

#include "kernels.h"
#include "threads.h"
#include "tiles.h"

namespace {

constexpr int kSums = 2 * kTileRows;

// As many sums as a product has under way, from numbers that are in registers already.
template <class Kind>
void add_products(long rounds) {
    Floats sums[kSums];
#pragma GCC unroll 24
    for (int i = 0; i < kSums; i++) sums[i] = zeros();
    Words ones = all_words(1);
    for (long round = 0; round < rounds; round++) {
        // The compiler must see neither that all sums and rounds are the same, nor that nobody reads them.
        asm volatile("" : "+v"(ones));
#pragma GCC unroll 24
        for (int i = 0; i < kSums; i++) {
            sums[i] = Kind::add_products(sums[i], ones, ones);
            asm volatile("" : "+v"(sums[i]));
        }
    }
}

}  // namespace

long t5_multiply_in_registers(int kind, long rounds) {
    return with_kind(kind, [=](auto a_kind) {
        using Kind = decltype(a_kind);
        std::atomic<long> threads{0};
        in_threads([&](const Member&) {
            add_products<Kind>(rounds);
            threads++;
        });
        return threads * rounds * kSums * kLanes * Kind::kPerRowStep * 2;
    });
}
