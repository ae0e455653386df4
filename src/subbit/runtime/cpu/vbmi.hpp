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

// terms3 and terms4: where in its tables the entries of 64 rows are, and whose sum is to be negated.
struct Indices {
    __m512i left, right;
    __mmask64 negative;
};

// Those of a unit of eight groups, in their order. A look-up ignores the two upper bits of an index.
template <Layout layout>
class TermIndices {
   public:
    explicit TermIndices(const uint8_t* unit) : codes_(unit) {
        if (layout == Layout::terms4) rest_[0] = load(unit + 512), rest_[1] = load(unit + 576);
    }

    Indices of_group(int j) {
        const __m512i code = load(codes_ + 64 * j);
        if (layout == Layout::terms3) return {code, _mm512_srli_epi16(code, 2), load_mask(codes_ + 512 + 8 * j)};
        __m512i& rest = rest_[j / 4];
        if (j % 4 == 2) rest = _mm512_srli_epi16(rest, 2);
        // The rest of every other group goes above the bits of the code, that of the others below them: so it is shifted
        // once for four groups.
        const __m512i right = j % 2 ? select(3, rest, _mm512_srli_epi16(code, 2))
                                    : select(0x30, rest, _mm512_srli_epi16(code, 4));
        return {code, right, load_mask(codes_ + 640 + 8 * j)};
    }

   private:
    const uint8_t* codes_;
    __m512i rest_[2] = {};
};

// The tables in the order of these indices: the left one, the right one of the first, third, … group, and of the others.
struct TermTables {
    Entries of[3];
};
template <Layout layout>
constexpr TermTables make_term_tables() {
    using Own = Terms<layout>;
    TermTables tables{};
    for (int e = 0; e < 64; e++) {
        const int left = e % (Own::kBlocks * Own::kLeft), right = e % Own::kBlocks * Own::kRight + e / Own::kBlocks;
        const int other = Own::kThree ? right : e / 4 % 4 * Own::kRight + e % 4 * 4 + e / 16;
        for (int j = 0; j < 8; j++) {
            tables.of[0].weights[j][e] = kTerms<layout>.left.weights[j][left];
            tables.of[1].weights[j][e] = kTerms<layout>.right.weights[j][right];
            tables.of[2].weights[j][e] = kTerms<layout>.right.weights[j][other];
        }
    }
    return tables;
}
template <Layout layout>
constexpr TermTables kTermTables = make_term_tables<layout>();

}  // namespace
}  // namespace subbit
