// Tables of 64 entries: what an entry is, for codes.cpp, and as factors of the inputs, for the kernels.
#pragma once

#include "codes.hpp"

namespace subbit {
namespace {

// Entry e is the sum of the columns of a group (or of half of it) times weights[j][e].
template <int columns>
struct Entries {
    float weights[columns][64];
};

// Two codewords of 1:4, three bits each: a column of four, and 4 if it is positive.
constexpr Entries<8> make_six() {
    Entries<8> table{};
    for (int e = 0; e < 64; e++) {
        table.weights[e & 3][e] = e & 4 ? 1 : -1;
        table.weights[4 + (e >> 3 & 3)][e] = e & 32 ? 1 : -1;
    }
    return table;
}

// Two columns of eight, the left one positive: 56 entries.
constexpr Entries<8> make_seven() {
    Entries<8> table{};
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

// Some columns of four, the leftmost of them positive. Blocks of four entries keep as many columns: 1, 4, 12, 16 and 8
// entries keep 0 to 4.
constexpr int kBlocks = 11;
constexpr int kKept[kBlocks] = {0, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4};

constexpr Entries<4> make_half() {
    Entries<4> table{};
    int e = 4;
    for (int kept = 1; kept <= 4; kept++) {
        for (int mask = 1; mask < 16; mask++) {
            int columns[4] = {}, count = 0;
            for (int j = 0; j < 4; j++) {
                if (mask >> j & 1) columns[count++] = j;
            }
            if (count != kept) continue;
            for (int negative = 0; negative < 1 << kept; negative += 2, e++) {
                for (int i = 0; i < kept; i++) table.weights[columns[i]][e] = negative >> i & 1 ? -1 : 1;
            }
        }
    }
    return table;
}

constexpr Entries<8> kSix = make_six(), kSeven = make_seven();
constexpr Entries<4> kHalf = make_half();

// The pairs of blocks that keep n columns together, a class each: 21 for four, 14 for three. Entries of 64 because a
// look-up ignores what is above bit 4, but not bit 5; blocks are there times four.
struct Classes {
    uint8_t left[64], right[64];
    uint8_t of[kBlocks][kBlocks];
};
constexpr Classes make_classes(int n) {
    Classes classes{};
    int count = 0;
    for (int left = 0; left < kBlocks; left++) {
        for (int right = 0; right < kBlocks; right++) {
            if (kKept[left] + kKept[right] != n) continue;
            classes.of[left][right] = static_cast<uint8_t>(count);
            for (int i = count; i < 64; i += 32) {
                classes.left[i] = static_cast<uint8_t>(4 * left);
                classes.right[i] = static_cast<uint8_t>(4 * right);
            }
            count++;
        }
    }
    return classes;
}
template <int n>
constexpr Classes kClasses = make_classes(n);

}  // namespace
}  // namespace subbit
