#include "latents.hpp"

#include <atomic>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

#include "team.hpp"

namespace subbit {
namespace {

constexpr size_t kPartGroups = 4096;  // that a thread takes at a time
constexpr size_t kAhead = 512;        // latents between the one that is rounded and the one that is fetched

// Vectors of `lanes` latents, which the compiler maps to those of the processor.
template <int lanes>
struct Vectors {
    typedef float Floats __attribute__((vector_size(4 * lanes)));
    typedef int32_t Ints __attribute__((vector_size(4 * lanes)));
    typedef int8_t Bytes __attribute__((vector_size(lanes)));
    typedef uint16_t Halves __attribute__((vector_size(2 * lanes)));
};

constexpr int32_t kSize = 0x7fffffff;               // all bits of a float but its sign: sizes compare like integers
constexpr int32_t kOne = 0x3f80, kMinus = 0x8000;  // of bfloat16

// A latent is kept if fewer than n of its group come before it: larger ones, and equal ones in earlier places. All
// pairs are compared, without a branch: `size - other - (place > j)` is negative where the other comes before.
template <int m, class Sign>
inline void round_groups(const float* latents, size_t groups, int n, Sign* signs) {
    constexpr int lanes = m < 8 ? m : 8, parts = m / lanes;
    using Floats = typename Vectors<lanes>::Floats;
    using Ints = typename Vectors<lanes>::Ints;
    Ints place[parts];
    for (int i = 0; i < m; i++) place[i / lanes][i % lanes] = i;
    for (size_t group = 0; group < groups; group++, latents += m, signs += m) {
        Floats latent[parts];
        Ints size[parts], before[parts] = {};
        int32_t others[m];
        std::memcpy(latent, latents, sizeof latent);
        std::memcpy(others, latents, sizeof others);
        std::memcpy(size, latents, sizeof size);
        for (int part = 0; part < parts; part++) size[part] &= kSize;
#pragma GCC unroll 16
        for (int j = 0; j < m; j++) {
            for (int part = 0; part < parts; part++)
                before[part] += (size[part] - (others[j] & kSize) + (place[part] > j)) >> 31;  // −1 where it does
        }
        for (int part = 0; part < parts; part++) {
            const Ints kept = before[part] > -n, negative = latent[part] < 0;
            if (sizeof(Sign) == 1) {
                const auto bytes = __builtin_convertvector((negative | 1) & kept, typename Vectors<lanes>::Bytes);
                std::memcpy(signs + lanes * part, &bytes, sizeof bytes);
            } else {
                const auto halves = __builtin_convertvector(((negative & kMinus) | kOne) & kept,
                                                            typename Vectors<lanes>::Halves);
                std::memcpy(signs + lanes * part, &halves, sizeof halves);
            }
        }
    }
}

template <class Sign>
inline void round_any(const float* latents, size_t groups, int n, int m, Sign* signs) {
    if (m == 4) return round_groups<4>(latents, groups, n, signs);
    if (m == 8) return round_groups<8>(latents, groups, n, signs);
    round_groups<16>(latents, groups, n, signs);
}

template <class Sign>
using Round = void (*)(const float*, size_t, int, int, Sign*);

#if defined(__x86_64__) && defined(__GNUC__)
template <class Sign>
__attribute__((target("avx2"), flatten)) void round_avx2(const float* latents, size_t groups, int n, int m,
                                                         Sign* signs) {
    round_any(latents, groups, n, m, signs);
}

// The same for 16 / m groups at a time.
template <int m, class Sign>
__attribute__((target("avx512f"))) inline void round_vectors(const float* latents, size_t vectors, int n, Sign* signs) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i place = _mm512_and_si512(lane, _mm512_set1_epi32(m - 1)), start = _mm512_sub_epi32(lane, place);
    const bool bytes = sizeof(Sign) == 1;
    const __m512i plus = _mm512_set1_epi32(bytes ? 1 : kOne), minus = _mm512_set1_epi32(bytes ? -1 : kMinus | kOne);
    for (size_t vector = 0; vector < vectors; vector++, latents += 16, signs += 16) {
        _mm_prefetch(reinterpret_cast<const char*>(latents + kAhead), _MM_HINT_T0);
        const __m512 latent = _mm512_loadu_ps(latents);
        const __m512i size = _mm512_and_si512(_mm512_castps_si512(latent), _mm512_set1_epi32(kSize));
        __m512i before = _mm512_setzero_si512();
#pragma GCC unroll 16
        for (int j = 0; j < m; j++) {
            const __m512i other = _mm512_permutexvar_epi32(_mm512_add_epi32(start, _mm512_set1_epi32(j)), size);
            const __m512i later =
                _mm512_maskz_set1_epi32(_mm512_cmpgt_epi32_mask(place, _mm512_set1_epi32(j)), 1);
            const __m512i ahead = _mm512_sub_epi32(size, _mm512_add_epi32(other, later));
            before = _mm512_add_epi32(before, _mm512_srli_epi32(ahead, 31));
        }
        const __mmask16 kept = _mm512_cmplt_epi32_mask(before, _mm512_set1_epi32(n));
        const __mmask16 negative = _mm512_cmp_ps_mask(latent, _mm512_setzero_ps(), _CMP_LT_OQ);
        const __m512i sign = _mm512_maskz_mov_epi32(kept, _mm512_mask_mov_epi32(plus, negative, minus));
        if (bytes) {
            _mm_storeu_si128(reinterpret_cast<__m128i*>(signs), _mm512_cvtepi32_epi8(sign));
        } else {
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(signs), _mm512_cvtepi32_epi16(sign));
        }
    }
}

template <class Sign>
__attribute__((target("avx512f"), flatten)) void round_avx512(const float* latents, size_t groups, int n, int m,
                                                              Sign* signs) {
    const size_t vectors = groups * m / 16, done = 16 * vectors;
    if (m == 4) round_vectors<4>(latents, vectors, n, signs);
    if (m == 8) round_vectors<8>(latents, vectors, n, signs);
    if (m == 16) round_vectors<16>(latents, vectors, n, signs);
    round_any(latents + done, groups - done / m, n, m, signs + done);
}

template <class Sign>
Round<Sign> pick() {
    if (__builtin_cpu_supports("avx512f")) return round_avx512<Sign>;
    return __builtin_cpu_supports("avx2") ? round_avx2<Sign> : round_any<Sign>;
}
#else
template <class Sign>
Round<Sign> pick() {
    return round_any<Sign>;
}
#endif

template <class Sign>
struct Work {
    Round<Sign> round;
    const float* latents;
    size_t groups;
    int n, m;
    Sign* signs;
    std::atomic<size_t> next{0};
};

template <class Sign>
void take_parts(void* data) {
    Work<Sign>& work = *static_cast<Work<Sign>*>(data);
    for (size_t first; (first = work.next.fetch_add(kPartGroups)) < work.groups;) {
        const size_t left = work.groups - first, at = first * static_cast<size_t>(work.m);
        work.round(work.latents + at, left < kPartGroups ? left : kPartGroups, work.n, work.m, work.signs + at);
    }
}

template <class Sign>
void round_all(const float* latents, size_t groups, int n, int m, Sign* signs, int threads) {
    Work<Sign> work{pick<Sign>(), latents, groups, n, m, signs};
    on_team(threads, take_parts<Sign>, &work);
}

}  // namespace

void round_latents(const float* latents, size_t groups, int n, int m, void* signs, bool bfloat16, int threads) {
    if (bfloat16) {
        round_all(latents, groups, n, m, static_cast<uint16_t*>(signs), threads);
    } else {
        round_all(latents, groups, n, m, static_cast<int8_t*>(signs), threads);
    }
}

}  // namespace subbit
