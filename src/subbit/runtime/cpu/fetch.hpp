// Fetching codes ahead of their use. Included by the translation unit of every x86 instruction set.
#pragma once

#include "codes.hpp"

namespace subbit {
namespace {

// How far ahead of the reads memory is fetched into the second-level cache, and from there into the first: the hardware
// alone stops at the end of a page.
constexpr int kFar = 16384, kNear = 1024;

// As assembly, because compilers gather intrinsics at the start of a loop, where loads wait behind all of them.
inline void fetch(const uint8_t* p) {
    asm volatile("prefetcht1 %c1(%0)\n\tprefetcht0 %c2(%0)" : : "r"(p), "i"(kFar), "i"(kNear) : "memory");
}

// Of 64 bytes, in a unit.
template <Layout layout>
constexpr int kLines = of(layout).unit_bytes / 64;

// The j-th eighth of some lines.
template <int lines>
inline void fetch_part(const uint8_t* first, int j) {
    for (int line = j * lines / 8; line < (j + 1) * lines / 8; line++) fetch(first + 64 * line);
}

}  // namespace
}  // namespace subbit
