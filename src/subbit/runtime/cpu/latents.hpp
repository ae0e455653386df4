// Rounding of latent weights to the codewords of N:M, in every step of a tuning.
#pragma once

#include <cstddef>
#include <cstdint>

namespace subbit {

// signs[i] = the sign of latents[i] where it is among the n largest sizes of its group of m (4, 8 or 16), else 0. Of
// equal sizes the first counts as the largest; a latent of 0 has the sign +1. Signs are int8, or bfloat16.
void round_latents(const float* latents, size_t groups, int n, int m, void* signs, bool bfloat16, int threads);

}  // namespace subbit
