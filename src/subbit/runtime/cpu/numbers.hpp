// Numbers of a tensor of either dtype that the kernels read and write.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace subbit {

inline float from_bfloat16(uint16_t x) {
    const uint32_t bits = static_cast<uint32_t>(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Rounded to the nearest, ties to even, as torch rounds.
inline uint16_t to_bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // not a number
    return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// Exact; infinities and what is not a number, which no packed tensor has, become large numbers.
inline float from_float16(uint16_t x) {
    const uint32_t bits = (x & 0x8000U) << 16 | (x & 0x7FFFU) << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value * 0x1p112F;
}

struct Numbers {
    const void* data;  // may be null
    bool bfloat16;     // float32 otherwise

    float operator[](ptrdiff_t i) const {
        return bfloat16 ? from_bfloat16(static_cast<const uint16_t*>(data)[i]) : static_cast<const float*>(data)[i];
    }
    void copy(ptrdiff_t first, int count, float* values) const {
        if (bfloat16) {
            const auto* source = static_cast<const uint16_t*>(data) + first;
            for (int i = 0; i < count; i++) values[i] = from_bfloat16(source[i]);
        } else {
            std::memcpy(values, static_cast<const float*>(data) + first, sizeof(float) * static_cast<size_t>(count));
        }
    }
};

// numbers[first .. first + count - 1] = values, plus bias[at ..] unless it is null.
inline void store(void* numbers, bool bfloat16, ptrdiff_t first, int count, const float* values, Numbers bias, int at) {
    auto* brief = static_cast<uint16_t*>(numbers) + first;
    auto* whole = static_cast<float*>(numbers) + first;
    if (!bias.data && bfloat16) {  // a loop of its own, which compilers make vectors of
        for (int i = 0; i < count; i++) brief[i] = to_bfloat16(values[i]);
        return;
    }
    if (!bias.data) {
        std::memcpy(whole, values, sizeof(float) * static_cast<size_t>(count));
        return;
    }
    for (int i = 0; i < count; i++) {
        const float value = values[i] + bias[at + i];
        if (bfloat16) {
            brief[i] = to_bfloat16(value);
        } else {
            whole[i] = value;
        }
    }
}

}  // namespace subbit
