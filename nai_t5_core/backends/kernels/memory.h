// Memory that ends with its owner, and how a call ends.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>

using Step = int32_t;
using Index = int64_t;  // sizes and places; what C++ calls long has half of the bits on Windows

enum Status { kOk = 0, kOutOfMemory = 1, kWrongDocuments = 2 };

constexpr std::align_val_t kLine{64};  // of the cache

struct Release {
    void operator()(void* memory) const { ::operator delete(memory, kLine); }
};

template <class T>
using Buffer = std::unique_ptr<T[], Release>;

// Uninitialised; null where there is no memory.
template <class T>
Buffer<T> allocate(Index count) {
    return Buffer<T>(static_cast<T*>(::operator new(count * sizeof(T), kLine, std::nothrow)));
}

// A number that may begin anywhere.
template <class T>
T load_as(const void* place) {
    T number;
    std::memcpy(&number, place, sizeof(T));
    return number;
}
