#include "latents.hpp"

#include <atomic>
#include <cmath>
#include <cstring>

#include "team.hpp"

namespace subbit {
namespace {

constexpr size_t kPartGroups = 4096;  // that a thread takes at a time

// Vectors of `lanes` latents, which the compiler maps to those of the processor.
template <int lanes>
struct Vectors {
    typedef float Floats __attribute__((vector_size(4 * lanes)));
    typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
    typedef int8_t Bytes __attribute__((vector_size(lanes)));
};

// A latent is kept if fewer than n of its group come before it. All pairs are compared, without a branch.
template <int m>
inline void round_groups(const float* latents, size_t groups, int n, int8_t* signs) {
    constexpr int lanes = m < 8 ? m : 8, parts = m / lanes;
    using Floats = typename Vectors<lanes>::Floats;
    using Ints = typename Vectors<lanes>::Ints;
    using Bytes = typename Vectors<lanes>::Bytes;
    Ints place[parts];
    for (int i = 0; i < m; i++) place[i / lanes][i % lanes] = i;
    for (size_t group = 0; group < groups; group++, latents += m, signs += m) {
        Floats latent[parts], size[parts];
        Ints before[parts] = {};
        std::memcpy(latent, latents, sizeof latent);
        for (int part = 0; part < parts; part++) size[part] = latent[part] < 0 ? -latent[part] : latent[part];
#pragma GCC unroll 16
        for (int j = 0; j < m; j++) {
            const Floats other = std::fabs(latents[j]) - Floats{};
            for (int part = 0; part < parts; part++)
                before[part] -= (other > size[part]) | ((other == size[part]) & (place[part] > j));
        }
        for (int part = 0; part < parts; part++) {
            const Ints sign = ((latent[part] < 0) | 1) & (before[part] < n);
            const Bytes bytes = __builtin_convertvector(sign, Bytes);
            std::memcpy(signs + lanes * part, &bytes, sizeof bytes);
        }
    }
}

inline void round_any(const float* latents, size_t groups, int n, int m, int8_t* signs) {
    if (m == 4) return round_groups<4>(latents, groups, n, signs);
    if (m == 8) return round_groups<8>(latents, groups, n, signs);
    round_groups<16>(latents, groups, n, signs);
}

using Round = void (*)(const float*, size_t, int, int, int8_t*);

#if defined(__x86_64__) && defined(__GNUC__)
__attribute__((target("avx2"), flatten)) void round_avx2(const float* latents, size_t groups, int n, int m,
                                                         int8_t* signs) {
    round_any(latents, groups, n, m, signs);
}
Round pick() { return __builtin_cpu_supports("avx2") ? round_avx2 : round_any; }
#else
Round pick() { return round_any; }
#endif

struct Work {
    Round round;
    const float* latents;
    size_t groups;
    int n, m;
    int8_t* signs;
    std::atomic<size_t> next{0};
};

void take_parts(void* data) {
    Work& work = *static_cast<Work*>(data);
    for (size_t first; (first = work.next.fetch_add(kPartGroups)) < work.groups;) {
        const size_t left = work.groups - first, at = first * static_cast<size_t>(work.m);
        work.round(work.latents + at, left < kPartGroups ? left : kPartGroups, work.n, work.m, work.signs + at);
    }
}

}  // namespace

void round_latents(const float* latents, size_t groups, int n, int m, int8_t* signs, int threads) {
    Work work{pick(), latents, groups, n, m, signs};
    on_team(threads, take_parts, &work);
}

}  // namespace subbit
