// Memory that ends with its owner, and how a call ends.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

using Step = int32_t;

enum Status { kOk = 0, kOutOfMemory = 1, kWrongDocuments = 2 };

struct Release {
    void operator()(void* memory) const { std::free(memory); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Release>;

// Uninitialised; null where there is no memory.
template <class T>
Buffer<T> allocate(long count) {
    const long line = 64;
    return Buffer<T>(static_cast<T*>(std::aligned_alloc(line, (count * sizeof(T) + line - 1) / line * line)));
}

// A number that may begin anywhere.
template <class T>
T load_as(const void* place) {
    T number;
    std::memcpy(&number, place, sizeof(T));
    return number;
}
