// What the tables of 3:8 and 4:8 are made of. Included by the translation unit of every instruction set; the unnamed
// namespace keeps the copies apart.
#pragma once

#include "codes.hpp"

namespace subbit {
namespace {

// Signs of t in four columns, and those of the Hadamard rows, as factors: entry i of column j.
struct Factors {
    float half[4][16], hadamard[8][16];
};
constexpr Factors make_factors() {
    Factors f{};
    for (int i = 0; i < 16; i++) {
        for (int j = 0; j < 4; j++) f.half[j][i] = i >> j & 1 ? 0.5F : -0.5F;
        for (int j = 0; j < 8; j++) f.hadamard[j][i] = i >= 12 ? 0 : kHadamard[i] >> j & 1 ? 0.5F : -0.5F;
    }
    return f;
}
constexpr Factors kFactors = make_factors();

}  // namespace
}  // namespace subbit
