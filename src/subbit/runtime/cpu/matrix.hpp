// Products of many inputs at a time, where there are matrix units.
#pragma once

#include <cstdint>

namespace subbit {

enum class Layout;

// A panel is what a matrix register holds: of inputs, a byte of 64 columns for each of 16 vectors; of weights, 64 columns
// for 16 rows. Inputs are integers of 16 bits on a grid of one step for all columns, their upper bytes in one plane of
// panels, the lower ones in the next. Sums are exact.
constexpr int kPanelVectors = 16, kPanelColumns = 64, kPanelBytes = kPanelVectors * kPanelColumns;

struct MatrixKernel {
    // One vector of 64 * `panels` inputs as row `row` of two planes; returns the value of one step of the grid.
    float (*split)(const float* inputs, int panels, int row, uint8_t* planes);
    // The weights of 64 rows for some groups: four panels for every 64 columns.
    void (*decode)(Layout, const uint8_t* codes, int groups, int8_t* weights);
    // sums (16 * tiles x 64 rows) = inputs, two planes for every 16 of them and a step for each, times weights, a scale for
    // each row.
    void (*multiply)(Layout, const uint8_t* planes, const float* steps, int tiles, const int8_t* weights,
                     const float* scales, int panels, float* sums);
};

}  // namespace subbit
