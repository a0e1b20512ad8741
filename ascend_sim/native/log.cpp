// The log of a process, as CANN's documentation has it: plog-<pid>_<time>.log, or stdout.
//
// CANN writes into the user's home unless ASCEND_PROCESS_LOG_PATH names a folder. The simulator writes only where it
// does, so that it leaves nothing behind that nobody asked for. Lines look like
// [ERROR] HCCL(4711,python3):2026-01-31-12:00:00.123.456 [file.cc:12]text
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>

#include "runtime.h"

namespace ascend_sim {
namespace {

constexpr int kError = 3;

bool is_wanted(int level) {
  static const int lowest = std::atoi(setting("ASCEND_GLOBAL_LOG_LEVEL", "3"));
  return level >= lowest && (*setting("ASCEND_PROCESS_LOG_PATH", "") ||
                             !std::strcmp(setting("ASCEND_SLOG_PRINT_TO_STDOUT", "0"), "1"));
}

std::string now(bool with_fraction) {
  timeval time;
  gettimeofday(&time, nullptr);
  tm local;
  localtime_r(&time.tv_sec, &local);
  char text[40];
  size_t length = std::strftime(text, sizeof text, with_fraction ? "%Y-%m-%d-%H:%M:%S" : "%Y%m%d%H%M%S", &local);
  int microseconds = static_cast<int>(time.tv_usec);
  if (with_fraction) {
    std::snprintf(text + length, sizeof text - length, ".%03d.%03d", microseconds / 1000, microseconds % 1000);
  } else {
    std::snprintf(text + length, sizeof text - length, "%03d", microseconds / 1000);
  }
  return text;
}

// The file of this process; a forked child has one of its own.
FILE* file() {
  static FILE* opened = nullptr;
  static pid_t owner = 0;
  if (owner == getpid()) return opened;
  owner = getpid();
  opened = nullptr;
  std::string folder = setting("ASCEND_PROCESS_LOG_PATH", "");
  for (const char* below : {"", "/debug", "/plog"}) mkdir((folder += below).c_str(), 0750);
  folder += "/plog-" + std::to_string(owner) + "_" + now(false) + ".log";
  return opened = std::fopen(folder.c_str(), "a");
}

void write(int level, const char* module, const char* place, const char* text) {
  static const char* const kLevels[] = {"DEBUG", "INFO", "WARNING", "ERROR"};
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  bool to_stdout = !std::strcmp(setting("ASCEND_SLOG_PRINT_TO_STDOUT", "0"), "1");
  FILE* target = to_stdout ? stdout : file();
  if (!target) return;
  const char* name = kLevels[level < 0 ? 0 : level > kError ? kError : level];
  std::fprintf(target, "[%s] %s(%d,python):%s [%s]%s\n", name, module, getpid(), now(true).c_str(), place, text);
  std::fflush(target);
}

}  // namespace

void log_error(const std::string& text) {
  if (!is_wanted(kError)) return;
  bool of_hccl = text.rfind("EI", 0) == 0;
  write(kError, of_hccl ? "HCCL" : "RUNTIME", "ascend_sim", text.c_str());
}

}  // namespace ascend_sim

using namespace ascend_sim;

// torch_npu names the file first.
ASCEND_SIM_API void aclAppLog(int level, const char* file, const char* function, uint32_t line, const char* format, ...) {
  if (!is_wanted(level)) return;
  char text[2048];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  std::string place = std::string(file) + ":" + std::to_string(line) + "][" + function;
  write(level, "APP", place.c_str(), text);
}
