// Fetching codes ahead of their use. Included by the translation unit of every x86 instruction set.
#pragma once

#include <xmmintrin.h>

#include "codes.hpp"

namespace subbit {
namespace {

// How far ahead of the reads memory is fetched into the second-level cache, and from there into the first: the hardware
// alone stops at the end of a page.
constexpr int kFar = 16384, kNear = 1024;

inline void fetch(const uint8_t* p) {
    _mm_prefetch(reinterpret_cast<const char*>(p) + kFar, _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p) + kNear, _MM_HINT_T0);
}

// Every eighth part of a unit fetches an eighth of the lines: loads wait behind many at once.
template <Layout layout>
inline void fetch_part(const uint8_t* unit, int j) {
    constexpr int lines = of(layout).unit_bytes / 64;
    for (int line = j * lines / 8; line < (j + 1) * lines / 8; line++) fetch(unit + 64 * line);
}

}  // namespace
}  // namespace subbit
