// HCCL's numbers and structures as its callers lay them out, in declarations of our own: results, dtypes, reductions, the
// configuration of a communicator. What is checked against the ABI: sizes and offsets, by static_assert.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#define HCCL_API extern "C" __attribute__((visibility("default")))

namespace hccl {

enum Result : int {
  kSuccess = 0,
  kBadParameter = 1,
  kNullPointer = 2,
  kNoMemory = 3,
  kInternal = 4,
  kNotSupported = 5,
  kNotFound = 6,
  kUnavailable = 7,
  kTimeout = 9,
  kRemote = 21,
  kOutOfDeviceMemory = 24,
};

// What a stream fails with, of the runtime's codes.
enum StreamCode : int {
  kTaskTimeout = 107020,
  kAicpuException = 507018,
  kRemoteDevice = 507057,
};

enum DataType : int {
  kInt8 = 0,
  kInt16 = 1,
  kInt32 = 2,
  kFp16 = 3,
  kFp32 = 4,
  kInt64 = 5,
  kUint64 = 6,
  kUint8 = 7,
  kUint16 = 8,
  kUint32 = 9,
  kFp64 = 10,
  kBf16 = 11,
  kInt128 = 12,
  kHif8 = 14,
  kFp8E4M3 = 15,
  kFp8E5M2 = 16,
  kFp8E8M0 = 17,
};

enum ReduceOp : int { kSum = 0, kProd = 1, kMax = 2, kMin = 3, kNoReduction = 255 };

// Bytes of one element; 0 for a number that is no dtype.
size_t size_of(int dtype);
const char* name_of_dtype(int dtype);
const char* name_of_reduction(int op);

constexpr uint32_t kNotSet = 0xffffffff;
constexpr size_t kRootInfoBytes = 4108;
constexpr size_t kNameBytes = 128;

struct CommConfig {
  uint64_t size;
  uint32_t magic;
  uint32_t version;
  uint64_t unused;
  uint32_t buffer_mib;
  uint32_t deterministic;
  char name[kNameBytes];
  char user_name[kNameBytes];
  uint32_t expansion_mode;
  uint32_t traffic_class;
  uint32_t service_level;
  uint32_t world_rank;
  uint64_t job;
  uint8_t zero_copy;
  int32_t exec_timeout_s;
};
static_assert(offsetof(CommConfig, buffer_mib) == 24 && offsetof(CommConfig, name) == 32, "layout of the configuration");
static_assert(offsetof(CommConfig, job) == 304 && offsetof(CommConfig, exec_timeout_s) == 316, "layout");

// How many settings of the configuration this library knows: up to and including the name of the buffer.
constexpr uint32_t kNumCapabilities = 12;

struct SendRecvItem {
  int32_t kind;  // 0 send, 1 receive
  void* buffer;
  uint64_t count;
  int32_t dtype;
  uint32_t peer;
};
static_assert(sizeof(SendRecvItem) == 32, "layout of an item of a batch");

}  // namespace hccl
