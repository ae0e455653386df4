// `grouped_binary` matrices (docs/format.md): the linears of BiLLM, ARB-LLM, STBLLM and PBS²P, multiplied as they are stored.
//
// A row's kept weights in a block take few levels. Five bits a column say which: kept, sign, symbol, salient. They are
// brought in that order from the codewords and symbols of the row, and 16 levels looked up with them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.hpp"

namespace subbit {

struct Kernels;

constexpr int kLevels = 16;
constexpr int kLevelColumns = 16;  // that are looked up together; blocks are multiples of it
constexpr int kLargestBlock = 1024;
constexpr int padded(int columns) { return (columns + kLevelColumns - 1) / kLevelColumns * kLevelColumns; }
constexpr int kPlaneBytes = kLargestBlock / 8;

struct GroupedMatrix {
    const uint8_t* codes;
    const uint8_t* symbols;         // null: no symbols
    const uint16_t* scales;         // float16
    const uint8_t* salient;         // null: no salient columns
    const uint8_t* residuals;       // null: symbols say the residual signs of salient columns
    const uint16_t* column_scales;  // float16; null: there are shifts
    int rows, columns, n, m, block_size, regions, residual_bytes;

    int blocks() const { return (columns + block_size - 1) / block_size; }
    int columns_of(int block) const {  // the last one may be short
        const int left = columns - block * block_size;
        return left < block_size ? left : block_size;
    }
};

// A bit a column of a block, lowest first; zeros from its end to a multiple of 64. The number of a level has the bits `positive`, `first`,
// `second` and `salient`, lowest first.
struct LevelBits {
    uint8_t kept[kPlaneBytes], positive[kPlaneBytes], first[kPlaneBytes], second[kPlaneBytes];
    const uint8_t* salient;
};

// weights[0 .. columns - 1] for a multiple of kLevelColumns: 0, or for kept columns one of kLevels levels.
using LevelsKernel = void (*)(const LevelBits&, int columns, const float* levels, float* weights);
void look_levels_up(const LevelBits&, int columns, const float* levels, float* weights);  // in portable C++

// Some rows as dense float32 weights, column scales included. False: a symbol is none that its column can have.
bool decode_grouped(const Kernels& kernels, const GroupedMatrix& matrix, int first_row, int rows, float* weights,
                    int threads);

// outputs (batch x rows) = inputs (batch x columns) times the matrix, plus bias unless it is null; outputs have the dtype
// of the inputs. False as above.
bool multiply_grouped(const Kernels& kernels, const GroupedMatrix& matrix, Numbers inputs, int batch, Numbers bias,
                      void* outputs, int threads);

}  // namespace subbit
