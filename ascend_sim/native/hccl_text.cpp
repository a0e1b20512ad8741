#include "hccl_text.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <ctime>

namespace hccl {

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double setting(const char* name, double fallback) {
  const char* value = std::getenv(name);
  return value && *value ? std::atof(value) : fallback;
}

std::string printed(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", number);
  return text;
}

std::string listed(const std::vector<uint32_t>& ranks) {
  std::string text;
  for (const uint32_t rank : ranks) text += (text.empty() ? "" : ",") + std::to_string(rank);
  return "[" + text + "]";
}

std::string error_text(const char* code, const std::string& message) {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  tm local{};
  localtime_r(&now.tv_sec, &local);
  char stamp[64], head[128];
  std::strftime(stamp, sizeof(stamp), "%Y-%m-%d-%H:%M:%S", &local);
  std::snprintf(head, sizeof(head), "%s: [PID: %d] %s.%03ld ", code, int(getpid()), stamp, now.tv_nsec / 1000000);
  return head + message;
}

size_t size_of(int dtype) {
  switch (dtype) {
    case kInt8: case kUint8: case kHif8: case kFp8E4M3: case kFp8E5M2: case kFp8E8M0: return 1;
    case kInt16: case kUint16: case kFp16: case kBf16: return 2;
    case kInt32: case kUint32: case kFp32: return 4;
    case kInt64: case kUint64: case kFp64: return 8;
    case kInt128: return 16;
    default: return 0;
  }
}

const char* name_of_dtype(int dtype) {
  static const char* const names[] = {"int8",   "int16",  "int32",  "fp16", "fp32", "int64",   "uint64",  "uint8",  "uint16",
                                      "uint32", "fp64",   "bfp16",  "int128", "?",  "hif8",    "fp8e4m3", "fp8e5m2",
                                      "fp8e8m0"};
  return dtype >= 0 && dtype <= kFp8E8M0 ? names[dtype] : "?";
}

const char* name_of_reduction(int op) {
  static const char* const names[] = {"sum", "prod", "max", "min"};
  return op >= kSum && op <= kMin ? names[op] : "none";
}

}  // namespace hccl
