#include "team.hpp"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace subbit {
namespace {

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
GompParallel gomp_parallel = nullptr;

}  // namespace

void use_gomp_parallel(void* function) { gomp_parallel = reinterpret_cast<GompParallel>(function); }

void on_team(int threads, void (*work)(void*), void* data) {
    if (threads <= 1) return work(data);
    if (gomp_parallel) return gomp_parallel(work, data, static_cast<unsigned>(threads), 0);
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < threads; i++) others.emplace_back(work, data);
    } catch (const std::system_error&) {
        // No more threads to be had: those that there are do the work.
    }
    work(data);
    for (std::thread& other : others) other.join();
}

int worth_waking(int threads, int parts, size_t portions) {
    return std::min({threads, parts, 1 + static_cast<int>(std::min<size_t>(portions, 1 << 16))});
}

Shares::Shares(int count, int threads) : shares_(static_cast<size_t>(threads)) {
    int first = 0;
    for (int i = 0; i < threads; i++) {
        shares_[static_cast<size_t>(i)].next = first;
        first = shares_[static_cast<size_t>(i)].end = first + (count - first) / (threads - i);
    }
}

int Shares::take(int thread) {
    for (size_t i = 0; i < shares_.size(); i++) {
        Share& share = shares_[(static_cast<size_t>(thread) + i) % shares_.size()];
        const int number = share.next < share.end ? share.next.fetch_add(1) : share.end;
        if (number < share.end) return number;
    }
    return -1;
}

}  // namespace subbit
