#include "hccl_reduce.h"

// These loops are what a reduction costs; at O2 GCC leaves most of them without vector instructions.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3")
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "hccl_types.h"

namespace hccl {
namespace {

// Elements reduced at a time: the accumulator stays in the first-level cache.
constexpr size_t kBlock = 1024;

template <class To, class From>
To bits(From value) {
  static_assert(sizeof(To) == sizeof(From), "the same number of bits");
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

// float16 -> float32: the exponent is rebased by one multiplication, which is exact for subnormal numbers as well.
inline float from_fp16(uint16_t half) {
  const uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t finite = bits<uint32_t>(bits<float>(magnitude) * bits<float>(uint32_t(0x77800000)));
  const uint32_t special = magnitude | 0x7f800000;
  return bits<float>((magnitude >= 0x0f800000 ? special : finite) | sign);
}

// float32 -> float16, to nearest, ties to even. A subnormal result is rounded by the adder: 0.5's last bit is 2^-24.
inline uint16_t to_fp16(float value) {
  const uint32_t all = bits<uint32_t>(value);
  const uint32_t magnitude = all & 0x7fffffff;
  const uint32_t half_bits = 0x3f000000;
  const uint32_t subnormal = bits<uint32_t>(bits<float>(magnitude) + bits<float>(half_bits)) - half_bits;
  const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  const uint32_t result = magnitude >= 0x47800000 ? special : magnitude < 0x38800000 ? subnormal : normal;
  return uint16_t(result | ((all >> 16) & 0x8000));
}

inline float from_bf16(uint16_t value) { return bits<float>(uint32_t(value) << 16); }

inline uint16_t to_bf16(float value) {
  const uint32_t all = bits<uint32_t>(value);
  const uint32_t rounded = (all + 0x7fff + ((all >> 16) & 1)) >> 16;
  return uint16_t((all & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// How a dtype lies in memory, and what it is accumulated in.
template <class T>
struct Plain {
  using Stored = T;
  using Sum = T;
  static Sum load(Stored value) { return value; }
  static Stored store(Sum value) { return value; }
};
struct Fp16 {
  using Stored = uint16_t;
  using Sum = float;
  static Sum load(Stored value) { return from_fp16(value); }
  static Stored store(Sum value) { return to_fp16(value); }
};
struct Bf16 {
  using Stored = uint16_t;
  using Sum = float;
  static Sum load(Stored value) { return from_bf16(value); }
  static Stored store(Sum value) { return to_bf16(value); }
};

// Integers wrap as the card's do; unsigned arithmetic, because an overflow of signed integers is undefined in C++.
template <int op, class T>
inline T combine(T a, T b) {
  if constexpr (op == kMax) return a < b ? b : a;
  if constexpr (op == kMin) return b < a ? b : a;
  if constexpr (std::is_integral_v<T>) {
    using U = std::common_type_t<std::make_unsigned_t<T>, uint32_t>;
    return op == kSum ? T(U(a) + U(b)) : T(U(a) * U(b));
  } else {
    return op == kSum ? a + b : a * b;
  }
}

template <class Format, int op>
void reduce_as(char* to, const char* const* parts, size_t num_parts, size_t count) {
  using Stored = typename Format::Stored;
  typename Format::Sum sum[kBlock];
  for (size_t begin = 0; begin < count; begin += kBlock) {
    const size_t n = std::min(kBlock, count - begin);
    const auto* first = reinterpret_cast<const Stored*>(parts[0]) + begin;
    for (size_t i = 0; i < n; ++i) sum[i] = Format::load(first[i]);
    for (size_t part = 1; part < num_parts; ++part) {
      const auto* next = reinterpret_cast<const Stored*>(parts[part]) + begin;
      for (size_t i = 0; i < n; ++i) sum[i] = combine<op>(sum[i], Format::load(next[i]));
    }
    auto* result = reinterpret_cast<Stored*>(to) + begin;
    for (size_t i = 0; i < n; ++i) result[i] = Format::store(sum[i]);
  }
}

template <class Format>
void reduce_by(char* to, const char* const* parts, size_t num_parts, size_t count, int op) {
  switch (op) {
    case kSum: return reduce_as<Format, kSum>(to, parts, num_parts, count);
    case kProd: return reduce_as<Format, kProd>(to, parts, num_parts, count);
    case kMax: return reduce_as<Format, kMax>(to, parts, num_parts, count);
    default: return reduce_as<Format, kMin>(to, parts, num_parts, count);
  }
}

}  // namespace

bool can_reduce(int dtype, int op) {
  if (op < kSum || op > kMin) return false;
  switch (dtype) {
    case kInt8: case kInt32: case kInt64: case kFp16: case kFp32: return true;
    case kInt16: case kBf16: return op != kProd;
    case kUint64: case kFp64: {
      // As torch_npu has it in ProcessGroupHCCL.cpp: from the Ascend950 on.
      const char* soc = std::getenv("ASCEND_SIM_SOC");
      return soc && !std::strncmp(soc, "Ascend950", 9);
    }
    default: return false;
  }
}

void reduce(char* to, const char* const* parts, size_t num_parts, size_t count, int dtype, int op) {
  switch (dtype) {
    case kInt8: return reduce_by<Plain<int8_t>>(to, parts, num_parts, count, op);
    case kInt16: return reduce_by<Plain<int16_t>>(to, parts, num_parts, count, op);
    case kInt32: return reduce_by<Plain<int32_t>>(to, parts, num_parts, count, op);
    case kInt64: return reduce_by<Plain<int64_t>>(to, parts, num_parts, count, op);
    case kFp16: return reduce_by<Fp16>(to, parts, num_parts, count, op);
    case kBf16: return reduce_by<Bf16>(to, parts, num_parts, count, op);
    case kUint64: return reduce_by<Plain<uint64_t>>(to, parts, num_parts, count, op);
    case kFp64: return reduce_by<Plain<double>>(to, parts, num_parts, count, op);
    default: return reduce_by<Plain<float>>(to, parts, num_parts, count, op);
  }
}

}  // namespace hccl
