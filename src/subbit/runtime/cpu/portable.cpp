// The kernels in plain C++, for processors without a variant of their own, and as the definition of the layouts.
#include <cmath>
#include <cstring>

#include "tables.hpp"

namespace subbit {
namespace {

// Entry i of a table: x, rounded to the grid. Ties go to even and -x is rounded like x: errors do not add up.
void put(const Grid& grid, uint8_t* table, int i, float x) {
    const int value = grid.zero + (std::isfinite(x) ? static_cast<int>(std::nearbyint(x)) : 0);
    table[i] = static_cast<uint8_t>(value % grid.radix);
    table[16 + i] = static_cast<uint8_t>(value / grid.radix);
}

// NaN if one of the two is NaN.
float larger_of(float a, float b) { return b <= a || std::isnan(a) ? a : b; }

// -x and x of each column of 8; x of each of 16.
float build_symbols(const Properties& properties, const float* x, int groups, uint8_t* tables) {
    const int columns = properties.columns;
    float largest = 0;
    for (int i = 0; i < columns * groups; i++) largest = larger_of(largest, std::fabs(x[i]));
    const float limit = static_cast<float>(properties.grid.limit), inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += columns, tables += properties.table_bytes) {
        for (int j = 0; j < columns; j++) {
            put(properties.grid, tables, j, columns == 8 ? -x[j] * inverse : x[j] * inverse);
            if (columns == 8) put(properties.grid, tables, 8 + j, x[j] * inverse);
        }
    }
    return largest / limit;
}

// Four tables a group: t in columns 0-3, t in columns 4-7, s, and s negated.
float build_signs(const float* x, int groups, uint8_t* tables) {
    float largest = 0;
    for (int g = 0; g < groups; g++) {
        float sum = 0;
        for (int j = 0; j < 8; j++) sum += std::fabs(x[8 * g + j]);
        largest = larger_of(largest, 0.5F * sum);  // no sum of a table is larger
    }
    const float limit = kThreeGrid.limit, inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        for (int i = 0; i < 16; i++) {
            float low = 0, high = 0, s = 0;
            for (int j = 0; j < 4; j++) low += x[j] * inverse * kFactors.half[j][i];
            for (int j = 0; j < 4; j++) high += x[4 + j] * inverse * kFactors.half[j][i];
            for (int j = 0; j < 8; j++) s += x[j] * inverse * kFactors.hadamard[j][i];
            put(kThreeGrid, tables, i, low);
            put(kThreeGrid, tables + 32, i, high);
            put(kThreeGrid, tables + 64, i, s);
            put(kThreeGrid, tables + 96, i, -s);
        }
    }
    return largest / limit;
}

float build_portable(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    const bool signs = layout == Layout::triple || layout == Layout::quad;
    return signs ? build_signs(inputs, groups, tables) : build_symbols(of(layout), inputs, groups, tables);
}

// The product of a row with group j of a unit, zeros included.
int look_up(Layout layout, const uint8_t* unit, const uint8_t* tables, int row, int j) {
    const Grid& grid = of(layout).grid;
    int sum = 0;
    for (int k = 0; k < of(layout).entries; k++) {
        const int at = !has_symbols(layout)        ? half_byte_at(layout, k, j) + byte_of(row)
                       : layout == Layout::single ? byte_of(row)
                                                  : pair_of(row) + k;
        const int entry = (has_symbols(layout) ? j % 2 : is_upper(layout, k, j)) ? unit[at] >> 4 : unit[at] & 15;
        const uint8_t* table = tables + table_at(layout, has_symbols(layout) ? 0 : k);
        const int value = table[entry] + grid.radix * table[16 + entry];
        const bool negative = has_bit(layout, k) && unit[bit_at(layout, k) + byte_of(row)] >> (7 - j) & 1;
        sum += negative ? 2 * grid.zero - value : value;
    }
    return sum;
}

void add_portable(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums,
                  int tiles) {
    const Properties& properties = of(layout);
    const int32_t zero = groups * properties.entries * properties.grid.zero;
    for (int tile = 0; tile < tiles; tile++, codes += bytes_of(layout, groups), sums += kTileRows) {
        int32_t total[kTileRows] = {};
        for (int g = 0; g < groups; g++) {
            const uint8_t* unit = codes + g / properties.groups * properties.unit_bytes;
            const uint8_t* table = tables + g * properties.table_bytes;
            for (int row = 0; row < kTileRows; row++) total[row] += look_up(layout, unit, table, row, g % properties.groups);
        }
        for (int row = 0; row < kTileRows; row++) sums[row] += step * static_cast<float>(total[row] - zero);
    }
}

uint64_t read_portable(const uint8_t* bytes, size_t count) {
    uint64_t parts[2] = {}, words[2];
    for (size_t at = 0; at + 16 <= count; at += 16) {
        std::memcpy(words, bytes + at, 16);
        parts[0] ^= words[0];
        parts[1] ^= words[1];
    }
    return parts[0] ^ parts[1];
}

}  // namespace

const Kernels portable_kernels{"portable", Order::small, build_portable, add_portable, read_portable, add_rows,
                                look_levels_up};

}  // namespace subbit
