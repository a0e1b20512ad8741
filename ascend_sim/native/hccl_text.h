// Settings of the environment, clocks and texts that the parts of the simulated HCCL share.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <vector>

#include "hccl_types.h"

namespace hccl {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin);
// The number in an environment variable, or the fallback where it is unset or empty.
double setting(const char* name, double fallback);
std::string printed(double number);
std::string listed(const std::vector<uint32_t>& ranks);
// "EI0002: [PID: 7] 2026-11-01-10:45:23.586 <message>", as the vendor's texts begin.
std::string error_text(const char* code, const std::string& message);

// Whether a configuration is long enough to have the field; callers of older releases pass less.
inline bool has(const CommConfig* config, size_t offset) { return config && config->size > offset; }

}  // namespace hccl
