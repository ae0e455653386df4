// The kernels in plain C++, for processors without a variant of their own, and as the definition of the layouts.
#include <cmath>
#include <cstring>

#include "tables.hpp"

namespace subbit {
namespace {

// Entry i of a table: x, rounded to the grid. Ties go to even and -x is rounded like x: errors do not add up.
void put(const Grid& grid, uint8_t* table, int i, float x) {
    const int value = grid.zero + static_cast<int>(std::nearbyint(x));
    table[i] = static_cast<uint8_t>(value % grid.radix);
    table[16 + i] = static_cast<uint8_t>(value / grid.radix);
}

float build_symbols(const float* x, int groups, uint8_t* tables) {
    float largest = 0;
    for (int i = 0; i < 8 * groups; i++) largest = std::fmax(largest, std::fabs(x[i]));
    const float limit = kSymbolGrid.zero - 1, inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += 8, tables += 32) {
        for (int j = 0; j < 8; j++) {
            put(kSymbolGrid, tables, j, -x[j] * inverse);
            put(kSymbolGrid, tables, 8 + j, x[j] * inverse);
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
        largest = std::fmax(largest, 0.5F * sum);  // no sum of a table is larger
    }
    const float limit = kSignGrid.zero, inverse = largest > 0 ? limit / largest : 0;
    for (int g = 0; g < groups; g++, x += 8, tables += 128) {
        for (int i = 0; i < 16; i++) {
            float low = 0, high = 0, s = 0;
            for (int j = 0; j < 4; j++) low += x[j] * inverse * kFactors.half[j][i];
            for (int j = 0; j < 4; j++) high += x[4 + j] * inverse * kFactors.half[j][i];
            for (int j = 0; j < 8; j++) s += x[j] * inverse * kFactors.hadamard[j][i];
            put(kSignGrid, tables, i, low);
            put(kSignGrid, tables + 32, i, high);
            put(kSignGrid, tables + 64, i, s);
            put(kSignGrid, tables + 96, i, -s);
        }
    }
    return largest / limit;
}

float build_portable(Layout layout, const float* inputs, int groups, uint8_t* tables) {
    return has_symbols(layout) ? build_symbols(inputs, groups, tables) : build_signs(inputs, groups, tables);
}

int value(const uint8_t* table, int entry, int radix) { return table[entry] + radix * table[16 + entry]; }

void add_chunk(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, float step, float* sums) {
    const Grid grid = grid_of(layout);
    const int multiple = group_multiple(layout);
    int32_t total[kTileRows] = {};
    for (int g = 0; g < groups; g++) {
        const uint8_t* unit = codes + g / multiple * unit_bytes(layout);
        const uint8_t* table = tables + g * table_bytes(layout);
        const int j = g % multiple, shift = g % 2 * 4;
        for (int row = 0; row < kTileRows; row++) {
            const auto look_up = [&](int which, int entry) { return value(table + 32 * which, entry, grid.radix); };
            if (has_symbols(layout)) {
                for (int slot = 0; slot < entries(layout); slot++)
                    total[row] += look_up(0, unit[symbol_at(layout, row, slot)] >> shift & 15);
            } else {
                const int t = unit[t_at(row, j)], s = unit[s_at(row, j)] >> shift & 15;
                const int negative = layout == Layout::quad ? unit[negative_at(row)] >> (7 - j) & 1 : 0;
                total[row] += look_up(0, t & 15) + look_up(1, t >> 4) + look_up(2 + negative, s);
            }
        }
    }
    const int32_t zero = groups * entries(layout) * grid.zero;
    for (int row = 0; row < kTileRows; row++) sums[row] += step * static_cast<float>(total[row] - zero);
}

void add_portable(Layout layout, const uint8_t* codes, const uint8_t* tables, int groups, const float* steps,
                  float* sums) {
    for (int chunk = 0; chunk < chunks_of(groups); chunk++) {
        add_chunk(layout, codes, tables, in_chunk(groups, chunk), steps[chunk], sums);
        codes += chunk_codes(layout);
        tables += chunk_tables(layout);
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

const Kernels portable_kernels{"portable", build_portable, add_portable, read_portable, add_rows};

}  // namespace subbit
