// Packed `codes` linears in the order in which the kernels read them, and what a kernel is.
//
// A look-up kernel computes, for one input vector, a small table for every group of 8 columns, and then reads a row's
// product with a group from the table: no weight is ever multiplied. Tables have 16 entries of two bytes, the size that
// one byte-shuffle instruction looks up in 16 or 32 rows at once; the bytes are kept apart in a low and a high plane.
#pragma once

#include <cstddef>
#include <cstdint>

#include "numbers.hpp"
#include "rows.hpp"

namespace subbit {

// A symbol is one kept weight of a group of 8: its column, plus 8 if it is positive.
//
// 3:8 and 4:8 are sums of two vectors of signs: a kept weight is (s + t) / 2 with s, t in {-1, +1}^8, a pruned one has
// s = -t. t is 8 signs, two half bytes. s is a row of a Hadamard matrix of order 12 (half a byte), for 4:8 or its
// negative (a bit more): in any three columns the 12 rows, in any four the 24, have every choice of signs.
enum class Layout {
    single,   // 1:8, a symbol a group: half a byte
    pair,     // 2:8 and 1:4, two symbols a group: a byte
    triple,   // 3:8: 12 bits
    quad,     // 4:8: 13 bits
    generic,  // any other N:M: the codewords of the file
};

constexpr int kTileRows = 64;     // rows that lie interleaved
constexpr int kChunkGroups = 32;  // groups that share a scale of their tables; their sums fit 16 bits
constexpr int kMaxKept = 4;

// What the entries of the tables are: an integer below radix^2, of which `zero` stands for 0; the largest sum of
// bytes before they are widened (2 or 3 entries) is below 256.
struct Grid {
    int radix, zero;
};
constexpr Grid kSymbolGrid{128, 8192}, kSignGrid{86, 3697};

constexpr int chunks_of(int groups) { return (groups + kChunkGroups - 1) / kChunkGroups; }
constexpr int in_chunk(int groups, int chunk) {  // groups of it: the last one may have fewer
    return chunk < groups / kChunkGroups ? kChunkGroups : groups % kChunkGroups;
}

constexpr bool has_symbols(Layout layout) { return layout == Layout::single || layout == Layout::pair; }
constexpr Grid grid_of(Layout layout) { return has_symbols(layout) ? kSymbolGrid : kSignGrid; }
constexpr int table_bytes(Layout layout) { return has_symbols(layout) ? 32 : 128; }  // of a group
constexpr int entries(Layout layout) {  // looked up for a row and group
    return layout == Layout::single ? 1 : layout == Layout::pair ? 2 : 3;
}
constexpr int group_multiple(Layout layout) { return has_symbols(layout) ? 2 : 8; }  // groups of a unit
constexpr int unit_bytes(Layout layout) {  // of a tile's rows in one unit
    return layout == Layout::single ? 64 : layout == Layout::pair ? 128 : layout == Layout::triple ? 768 : 832;
}

constexpr int chunk_codes(Layout layout) { return kChunkGroups / group_multiple(layout) * unit_bytes(layout); }
constexpr int chunk_tables(Layout layout) { return kChunkGroups * table_bytes(layout); }

// Where a row of a tile lies within 64 bytes (32 for 16 rows of `pair`). The order is the one in which widening 8 to 16
// to 32 bits leaves the lanes of a vector, so that sums come out in the order of the rows.
constexpr int word_of(int row) {
    const int lane = row % 16;
    return lane < 4 || lane >= 12 ? lane : lane < 8 ? lane + 4 : lane - 4;
}
constexpr int byte_of(int row) { return row / 32 * 32 + 2 * word_of(row) + row / 16 % 2; }

// Where a unit keeps things: low or high half bytes for even and odd groups, or whole bytes.
constexpr int symbol_at(Layout layout, int row, int slot) {
    return layout == Layout::single ? byte_of(row) : row / 16 * 32 + 2 * word_of(row) + slot;
}
constexpr int t_at(int row, int group) { return 64 * group + byte_of(row); }
constexpr int s_at(int row, int group) { return 512 + group / 2 * 64 + byte_of(row); }
constexpr int negative_at(int row) { return 768 + byte_of(row); }  // bit 7 - group

// Eight columns of the Hadamard matrix; bit j is 1 for +1.
constexpr uint8_t kHadamard[12] = {255, 71, 142, 29, 58, 116, 233, 210, 164, 72, 145, 35};

// What differs between instruction sets.
struct Kernels {
    const char* name;
    // Fill the tables of a chunk of `groups` groups from 8 * groups inputs; returns the value of one step of the grid.
    float (*build)(Layout, const float* inputs, int groups, uint8_t* tables);
    // sums[r] += steps[c] * (sum over the groups of chunk c of row r), for the kTileRows rows of a tile and all chunks
    // of `groups` groups, one after the other.
    void (*add)(Layout, const uint8_t* codes, const uint8_t* tables, int groups, const float* steps, float* sums);
    // Read memory and do nothing with it, 64 bytes at a time: the bound of any kernel, for benchmarks.
    uint64_t (*read)(const uint8_t* bytes, size_t count);
    RowsKernel rows;
};

extern const Kernels portable_kernels;
#ifdef SUBBIT_AVX2
extern const Kernels avx2_kernels;
#endif

// A linear in kernel order. The buffer holds the codes, then float32 row scales, then float32 column scales if any.
struct Shape {
    int rows, columns, n, m;
    bool column_scales;

    Layout layout() const;
    int width() const;                             // bits of a codeword in the file
    int codewords() const { return columns / m; }  // of a row
    int groups() const;                            // of 8 columns, rounded up to whole units
    int tiles() const { return (rows + kTileRows - 1) / kTileRows; }
    size_t file_row_bytes() const;
    size_t tile_bytes() const;
    size_t scales_offset() const;
    size_t bytes() const;
};

// Fill `buffer` (shape.bytes(), zeroed) from the codes of the file. Returns -1, or the first codeword that no encoder
// writes; then the buffer is of no use.
int64_t repack(const Shape& shape, const uint8_t* codes, const float* row_scales, const float* column_scales,
               uint8_t* buffer, int threads);

// The inverse: the codes of the file into `codes` (zeroed).
void unpack(const Shape& shape, const uint8_t* buffer, uint8_t* codes);

// Some rows as dense float32 weights, row scales and column scales included.
void decode(const Shape& shape, const uint8_t* buffer, int first_row, int rows, float* weights);

// outputs (batch x rows) = inputs (batch x columns) times the weights, plus bias unless it is null; outputs have the
// dtype of the inputs.
void multiply(const Kernels& kernels, const Shape& shape, const uint8_t* buffer, Numbers inputs, int batch,
              Numbers bias, void* outputs, int threads);

// Read `count` bytes on all threads, for benchmarks; returns their exclusive or.
uint64_t read_memory(const Kernels& kernels, const uint8_t* bytes, size_t count, int threads);

}  // namespace subbit
