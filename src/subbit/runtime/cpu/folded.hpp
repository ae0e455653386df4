// Tables of 64 entries: what an entry is, for codes.cpp, and as factors of the inputs, for the kernels.
#pragma once

#include "codes.hpp"

namespace subbit {
namespace {

// Entry e is the sum of the columns of a group times weights[j][e].
struct Entries {
    float weights[8][64];
};

// Two codewords of 1:4, three bits each: a column of four, and 4 if it is positive.
constexpr Entries make_six() {
    Entries table{};
    for (int e = 0; e < 64; e++) {
        table.weights[e & 3][e] = e & 4 ? 1 : -1;
        table.weights[4 + (e >> 3 & 3)][e] = e & 32 ? 1 : -1;
    }
    return table;
}

// Two columns of eight, the left one positive: 56 entries.
constexpr Entries make_seven() {
    Entries table{};
    int e = 0;
    for (int right = 1; right < 8; right++) {
        for (int left = 0; left < right; left++) {
            for (int sign = -1; sign <= 1; sign += 2, e++) {
                table.weights[left][e] = 1;
                table.weights[right][e] = static_cast<float>(sign);
            }
        }
    }
    return table;
}

constexpr Entries kSix = make_six(), kSeven = make_seven();

// terms3 and terms4: a vector of weights, or its negative, is the sum of a left and a right entry. Entries are in blocks,
// and every left one of a block goes with every right one of it, so that the block is said once for both.
template <Layout layout>
struct Terms {
    static constexpr bool kThree = layout == Layout::terms3;
    static constexpr int kBlocks = kThree ? 8 : 4, kLeft = kThree ? 4 : 16, kRight = kThree ? 8 : 16;
    Entries left{}, right{};  // those of block b from kLeft * b and kRight * b on
};

// Vectors of weights.
struct Choices {
    float weights[24][8]{};
    int count = 0;
};

// Every choice of `kept` columns of some from `first` on, with all signs; `once`: the leftmost one is positive.
constexpr Choices choices_of(int kept, int first, int columns, bool once) {
    Choices choices{};
    for (int mask = 1; mask < 1 << columns; mask++) {
        int places[4] = {}, count = 0;
        for (int j = 0; j < columns; j++) {
            if (mask >> j & 1) places[count++] = first + j;
        }
        for (int negative = 0; count == kept && negative < 1 << kept; negative += once ? 2 : 1) {
            float* weights = choices.weights[choices.count++];
            for (int i = 0; i < kept; i++) weights[places[i]] = negative >> i & 1 ? -1 : 1;
        }
    }
    return choices;
}

// Choices from number `from` on, `count` of them if there are so many, into a table from entry `at` on.
constexpr void put_choices(Entries& table, int at, const Choices& choices, int from = 0, int count = 24) {
    for (int i = from; i < choices.count && i < from + count; i++, at++) {
        for (int j = 0; j < 8; j++) table.weights[j][at] = choices.weights[i][j];
    }
}

template <Layout layout>
constexpr Terms<layout> make_terms();

// For each half of the columns: one of them and two of the others, three blocks; two that are neighbours and one of the
// other two.
template <>
constexpr Terms<Layout::terms3> make_terms() {
    Terms<Layout::terms3> terms{};
    for (int first = 0; first < 8; first += 4) {
        for (int block = first; block < first + 3; block++) {
            put_choices(terms.left, 4 * block, choices_of(1, first, 4, true));
            put_choices(terms.right, 8 * block, choices_of(2, 4 - first, 4, false), 8 * (block - first), 8);
        }
        const int block = first + 3;
        for (int i = 0; i < 4; i += 2) put_choices(terms.left, 4 * block + i, choices_of(2, first + i, 2, true));
        put_choices(terms.right, 8 * block, choices_of(1, first, 4, false));
    }
    return terms;
}

// Two blocks for two columns of each half, 12 and 12 entries; in what is left of them, four of one half: the first two and
// the last two. One and three columns, three and one.
template <>
constexpr Terms<Layout::terms4> make_terms() {
    Terms<Layout::terms4> terms{};
    for (int half = 0; half < 2; half++) {
        put_choices(terms.left, 16 * half, choices_of(2, 0, 4, true));
        put_choices(terms.right, 16 * half, choices_of(2, 4, 4, false), 12 * half, 12);
        put_choices(terms.left, 16 * half + 12, choices_of(2, 4 * half, 2, true));
        put_choices(terms.right, 16 * half + 12, choices_of(2, 4 * half + 2, 2, false));
    }
    put_choices(terms.left, 32, choices_of(1, 0, 4, false));
    put_choices(terms.right, 32, choices_of(3, 4, 4, true));
    put_choices(terms.left, 48, choices_of(3, 0, 4, true));
    put_choices(terms.right, 48, choices_of(1, 4, 4, false));
    return terms;
}

template <Layout layout>
constexpr Terms<layout> kTerms = make_terms<layout>();

}  // namespace
}  // namespace subbit
