// The threads of a call, and how they share its tasks.
//
// Where the compiler has OpenMP they are those of its runtime, which is the one that torch has brought: so there are as
// many as torch has, and none that wait idly beside others that work. Elsewhere the kernels keep threads of their own
// (pool.h).

#pragma once

#include <algorithm>
#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#else
#include "pool.h"
#endif

// One of the threads of a call.
struct Member {
    Index index, count;

    // Its part of the tasks: as many, and as near to each other, as possible.
    template <class Work>
    void share(Index tasks, Work work) const {
        for (Index task = index * tasks / count; task < (index + 1) * tasks / count; task++) work(task);
    }

    // Until all threads of the call are here.
    void wait_for_others() const {
#ifdef _OPENMP
#pragma omp barrier
#else
        Pool::wait_for_others(count);
#endif
    }
};

// Tasks that threads take when they are free: neighbouring ones, at first a thread's part of what is left, and less and
// less at once, since a processor that is shared runs its threads at different speeds.
class Tasks {
  public:
    Tasks(Index count, Index least, Index most) : count_(count), least_(least), most_(most) {}

    template <class Work>
    void take(const Member& member, Work work) {
        Index first = next_.load();
        while (first < count_) {
            const Index part = (count_ - first + member.count - 1) / member.count;
            const Index end = std::min(count_, first + std::min(most_, std::max(least_, part)));
            if (!next_.compare_exchange_weak(first, end)) continue;
            for (; first < end; first++) work(first);
            first = next_.load();
        }
    }

  private:
    const Index count_, least_, most_;
    std::atomic<Index> next_{0};
};

// Calls work(member) in every thread.
template <class Work>
void in_threads(Work work) {
#ifdef _OPENMP
#pragma omp parallel
    work(Member{omp_get_thread_num(), omp_get_num_threads()});
#else
    Pool::run([](const void* with, Index index, Index count) {
        (*static_cast<const Work*>(with))(Member{index, count});
    }, &work);
#endif
}
