// The matrix registers of AMX in plain C++, in the place of the compiler's intrinsics: included before all else.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace amx {

struct Register {
    uint8_t bytes[16][64];
};
inline thread_local Register registers[8];

inline void load(int to, const void* from, int stride) {
    for (int i = 0; i < 16; i++) std::memcpy(registers[to].bytes[i], static_cast<const char*>(from) + i * stride, 64);
}

inline void store(int from, void* to, int stride) {
    for (int i = 0; i < 16; i++) std::memcpy(static_cast<char*>(to) + i * stride, registers[from].bytes[i], 64);
}

// sum[i][j] += four products of bytes for every 32 bits of row i of a, with row k of b; those of a are of type Byte.
template <class Byte>
void multiply(int sum, int a, int b) {
    for (int i = 0; i < 16; i++) {
        int32_t row[16];
        std::memcpy(row, registers[sum].bytes[i], 64);
        for (int j = 0; j < 16; j++) {
            for (int k = 0; k < 64; k++) {
                const auto left = static_cast<Byte>(registers[a].bytes[i][k]);
                row[j] += left * static_cast<int8_t>(registers[b].bytes[k / 4][4 * j + k % 4]);
            }
        }
        std::memcpy(registers[sum].bytes[i], row, 64);
    }
}

}  // namespace amx

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#undef _tile_dpbusd
#define _tile_zero(to) amx::registers[to] = {}
#define _tile_loadd(to, from, stride) amx::load(to, from, stride)
#define _tile_stored(from, to, stride) amx::store(from, to, stride)
#define _tile_dpbssd(sum, a, b) amx::multiply<int8_t>(sum, a, b)
#define _tile_dpbusd(sum, a, b) amx::multiply<uint8_t>(sum, a, b)
#define _tile_loadconfig(from) static_cast<void>(from)
#define _tile_storeconfig(to) static_cast<void>(to)
