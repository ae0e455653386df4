// Running a function on several threads at once.
#pragma once

#include <atomic>
#include <cstddef>
#include <vector>

namespace subbit {

// Call `work(data)` on `threads` threads at once, the calling one included, and return when all are done. Fewer may
// come, so the callers share the work out among those that do.
void on_team(int threads, void (*work)(void*), void* data);

// How many of `threads` are worth waking for `parts` that can be shared out: one more for each of `portions` of work.
int worth_waking(int threads, int parts, size_t portions);

// The numbers 0 .. count - 1, for as many threads. Each takes its own, which follow each other, so that it reads memory
// from end to end, and fetches ahead what it will read itself; then what is left of those of the others.
class Shares {
   public:
    Shares(int count, int threads);
    int join() { return joined_.fetch_add(1); }  // for `take`
    int take(int thread);                        // -1: none are left

   private:
    struct alignas(64) Share {
        std::atomic<int> next;
        int end;
    };
    std::vector<Share> shares_;
    std::atomic<int> joined_{0};
};

// Use this OpenMP runtime's GOMP_parallel, that of torch: its threads then do torch's work and ours, instead of two
// teams taking the processors from each other. Without it, threads are started and joined for every call.
void use_gomp_parallel(void* function);

}  // namespace subbit
