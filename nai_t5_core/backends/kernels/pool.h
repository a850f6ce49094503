// Threads of our own, for compilers without OpenMP: kept between calls, one call at a time.

#pragma once

#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

class Pool {
  public:
    using Work = void (*)(const void* with, Index index, Index count);

    // Calls work(with, index, count) in as many threads as there may be, one of which is the caller's. A call that finds
    // the threads at work for another caller has its own thread only.
    static void run(Work work, const void* with) {
        Pool& pool = *current();
        std::unique_lock<std::mutex> turn(pool.turn_, std::try_to_lock);
        if (turn.owns_lock()) pool.run_together(work, with);
        else work(with, 0, 1);
    }

    static void wait_for_others(Index count) {
        if (count > 1) current()->meet(count);
    }

    static void set_threads(Index count) { threads() = std::max<Index>(1, count); }
    static Index most_threads() { return threads(); }

  private:
    static constexpr int kLooks = 4000;  // for less than a tenth of a millisecond, before a thread sleeps or lets others go first

    // Never destroyed: its threads may outlive what ends with the process. After a fork it is another, since threads are
    // not copied.
    static Pool*& current() {
        static Pool* pool = made();
        return pool;
    }
    static Pool* made() {
#ifndef _WIN32
        pthread_atfork(nullptr, nullptr, [] { current() = new Pool; });
#endif
        return new Pool;
    }
    static std::atomic<Index>& threads() {
        static std::atomic<Index> count{std::max<Index>(1, std::thread::hardware_concurrency())};
        return count;
    }

    void run_together(Work work, const void* with) {
        const Index count = threads();
        while (helpers_ < count - 1) std::thread(&Pool::help, this, ++helpers_).detach();
        {
            std::lock_guard<std::mutex> guard(lock_);
            work_ = work, with_ = with, count_ = count, left_ = count - 1;
            calls_++;
        }
        if (count > 1) called_.notify_all();
        work(with, 0, count);
        wait_until([=] { return left_ == 0; });
    }

    // What a thread of the pool does; its number in a call is `index`.
    void help(Index index) {
        for (Index seen = 0;;) {
            wait_for_call(seen);
            Work work;
            const void* with;
            Index count;
            {
                std::lock_guard<std::mutex> guard(lock_);
                seen = calls_, work = work_, with = with_, count = count_;
            }
            if (index >= count) continue;
            work(with, index, count);
            left_--;
        }
    }

    void wait_for_call(Index seen) {
        for (int look = 0; look < kLooks; look++) {
            if (calls_ != seen) return;
            _mm_pause();
        }
        std::unique_lock<std::mutex> guard(lock_);
        called_.wait(guard, [=] { return calls_ != seen; });
    }

    void meet(Index count) {
        const Index meeting = meetings_;
        if (++arrived_ == count) {
            arrived_ = 0;
            meetings_++;
        } else {
            wait_until([=] { return meetings_ != meeting; });
        }
    }

    template <class Done>
    static void wait_until(Done done) {
        for (int look = 0; !done(); look++) {
            if (look < kLooks) _mm_pause();
            else std::this_thread::yield();
        }
    }

    std::mutex turn_, lock_;
    std::condition_variable called_;
    Work work_ = nullptr;
    const void* with_ = nullptr;
    Index count_ = 0, helpers_ = 0;
    std::atomic<Index> calls_{0}, left_{0}, arrived_{0}, meetings_{0};
};
