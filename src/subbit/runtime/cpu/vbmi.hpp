// What the kernels with VBMI share, look-ups (avx512.cpp) and matrix units (amx.cpp).
#pragma once

#include <cstring>

#include "avx512.hpp"

namespace subbit {
namespace {

inline __mmask64 load_mask(const uint8_t* p) {
    uint64_t bits;
    std::memcpy(&bits, p, 8);
    return _cvtu64_mask64(bits);
}

// four: the index of the lower half of each byte, in a table of 64 that has 16 entries for each byte of 32 bits.
inline __m512i place_four(__m512i codes) { return select(15, codes, _mm512_set1_epi32(0x30201000)); }

// halves: the entries of 64 rows for four columns, and which of them are to be negated.
struct Half {
    __m512i index;
    __mmask64 negative;
};

// Those of a unit of eight groups, in their order.
template <Layout layout>
struct Halves {
    static constexpr const Classes& classes = kClasses<layout == Layout::halves3 ? 3 : 4>;
    const uint8_t* codes;
    __m512i rest[2];

    explicit Halves(const uint8_t* unit) : codes(unit), rest{load(unit + 512), load(unit + 576)} {}

    Half left(int j) const {
        const __m512i code = load(codes + 64 * j), block = _mm512_permutexvar_epi8(code, load(classes.left));
        return {select(3, _mm512_srli_epi16(code, 5), block), _mm512_movepi8_mask(code)};
    }
    Half right(int j) {
        const __m512i block = _mm512_permutexvar_epi8(load(codes + 64 * j), load(classes.right));
        const __m512i index = select(3, rest[j / 4], block);
        rest[j / 4] = _mm512_srli_epi16(rest[j / 4], 2);
        return {index, load_mask(codes + 640 + 8 * j)};
    }
};

}  // namespace
}  // namespace subbit
