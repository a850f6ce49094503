// What no product of this processor can exceed: the instruction that products are made of, and nothing else.

#include "kernels.h"
#include "multiplier.h"
#include "threads.h"

Index t5_multiply_in_registers(int kind, Index rounds) {
    return with_kind(kind, [=](auto a_kind) {
        std::atomic<Index> operations{0};
        in_threads([&](const Member&) { operations += Multiplier<decltype(a_kind)>::multiply_in_registers(rounds); });
        return operations.load();
    });
}
