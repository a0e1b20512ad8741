// Reductions of the simulated HCCL, always in the order of the ranks, so that every run and every rank gets the same bits.
#pragma once

#include <cstddef>

namespace hccl {

// Whether the card's HCCL reduces this dtype by this operation: int8/16/32/64, fp16, fp32, bf16 by sum, product, maximum
// and minimum, but no product of int16 or bf16 (documentation of HcclAllReduce for Atlas A2 and A3).
bool can_reduce(int dtype, int op);

// to[i] = parts[0][i] op parts[1][i] op …; 16-bit floats are accumulated in float32 and rounded once, integers wrap.
// `to` overlaps none of the parts.
void reduce(char* to, const char* const* parts, size_t num_parts, size_t count, int dtype, int op);

}  // namespace hccl
