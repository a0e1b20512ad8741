// Devices, versions and attributes of the simulated card, and the error text of each thread.
#include <sys/prctl.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "runtime.h"

namespace ascend_sim {
namespace {

thread_local int device_of_thread = -1;
thread_local std::string error_text;
std::atomic<bool> initialised{false};
std::atomic<bool> active[kMaxDevices];
// One for each device, which its place tells.
struct Context {
} contexts[kMaxDevices];
std::atomic<int64_t> system_parameters[64];

// Cores of a 910B3: what torch_npu asks for; nothing here computes with them.
constexpr int kCubeCores = 20;
constexpr int kVectorCores = 40;

}  // namespace

const char* setting(const char* name, const char* fallback) {
  const char* value = std::getenv(name);
  return value && *value ? value : fallback;
}

int device_count() {
  static const int count = [] {
    int present = std::min(std::atoi(setting("ASCEND_SIM_DEVICES", "4")), kMaxDevices);
    const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
    if (!visible) return present;
    // As on a card: numbers up to the first that names no device.
    int seen = 0;
    for (const char* at = visible; *at; ++seen) {
      char* end;
      long device = std::strtol(at, &end, 10);
      if (end == at || device < 0 || device >= present) break;
      at = *end == ',' ? end + 1 : end;
      if (*end && *end != ',') break;
    }
    return seen;
  }();
  return count;
}

uint64_t device_capacity() {
  static const auto bytes = static_cast<uint64_t>(std::atof(setting("ASCEND_SIM_MEMORY_GIB", "64")) * (1ull << 30));
  return bytes;
}

int current_device() { return device_of_thread < 0 ? 0 : device_of_thread; }
void use_device(int device) { device_of_thread = device; }
const char* last_error() { return error_text.c_str(); }

namespace {

// Threads name themselves only after they have started, so that only a positive answer is final.
bool thread_is(const char* prefix, bool* known) {
  if (*known) return true;
  char name[16] = "";
  prctl(PR_GET_NAME, name, 0, 0, 0);
  return *known = std::strncmp(name, prefix, std::strlen(prefix)) == 0;
}

}  // namespace

bool is_watchdog_thread() {
  thread_local bool known = false;
  return thread_is("hccl_", &known);
}

bool is_launch_thread() {
  thread_local bool known = false;
  return thread_is("acl_thread", &known);
}

}  // namespace ascend_sim

using namespace ascend_sim;

ASCEND_SIM_API void ascend_sim_set_error(const char* text) {
  error_text = text ? text : "";
  if (!error_text.empty()) log_error(error_text);
}

ASCEND_SIM_API int aclInit(const char*) {
  ASCEND_SIM_ENTER;
  return initialised.exchange(true) ? kRepeatedInit : kOk;
}

ASCEND_SIM_API int aclFinalize() {
  ASCEND_SIM_ENTER;
  initialised = false;
  return kOk;
}

ASCEND_SIM_API const char* aclGetRecentErrMsg() { return last_error(); }

ASCEND_SIM_API int aclsysGetCANNVersion(int, char* version) {
  // The version's text, then four parts and a reserve that nobody reads.
  std::memset(version, 0, 128 + 4 * 64 + 128);
  std::snprintf(version, 128, "%s", setting("ASCEND_SIM_CANN", "8.5.0"));
  return kOk;
}

ASCEND_SIM_API int aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, setting("ASCEND_SIM_CANN", "8.5.0"));
  return kOk;
}

ASCEND_SIM_API const char* aclrtGetSocName() {
  static const std::string name = setting("ASCEND_SIM_SOC", "Ascend910B3");
  return name.c_str();
}

// 0: keeps inf and nan, 1: bfloat16, 2: compiles operators when they run.
ASCEND_SIM_API int aclGetCannAttributeList(const int** list, size_t* count) {
  static const int attributes[] = {0, 1, 2};
  *list = attributes;
  *count = 3;
  return kOk;
}

ASCEND_SIM_API int aclGetCannAttribute(int attribute, int32_t* value) {
  *value = attribute == 2 ? 0 : 1;
  return kOk;
}

ASCEND_SIM_API int aclGetDeviceCapability(uint32_t, int what, int64_t* value) {
  *value = what == 0 ? kCubeCores : what == 1 ? kVectorCores : 0;
  return kOk;
}

ASCEND_SIM_API int aclrtGetDeviceInfo(uint32_t, int what, int64_t* value) {
  *value = what == 201 ? kVectorCores : kCubeCores;
  return kOk;
}

ASCEND_SIM_API int aclrtGetDeviceCount(uint32_t* count) {
  ASCEND_SIM_ENTER;
  *count = device_count();
  return kOk;
}

ASCEND_SIM_API int aclrtSetDevice(int32_t device) {
  ASCEND_SIM_ENTER;
  if (device < 0 || device >= device_count()) {
    char text[128];
    std::snprintf(text, sizeof text, "EE1001: The argument is invalid. Reason: device id %d, of %d devices.", device,
                  device_count());
    ascend_sim_set_error(text);
    return kBadDevice;
  }
  use_device(device);
  active[device] = true;
  return kOk;
}

ASCEND_SIM_API int aclrtResetDevice(int32_t device) {
  ASCEND_SIM_ENTER;
  if (device >= 0 && device < kMaxDevices) active[device] = false;
  return kOk;
}

ASCEND_SIM_API int aclrtGetDevice(int32_t* device) {
  if (device_of_thread < 0) return kNoContext;
  *device = device_of_thread;
  return kOk;
}

ASCEND_SIM_API int aclrtGetCurrentContext(void** context) {
  if (device_of_thread < 0) return kNoContext;
  *context = &contexts[device_of_thread];
  return kOk;
}

ASCEND_SIM_API int aclrtSetCurrentContext(void* context) {
  if (!context) return kBadParam;
  use_device(static_cast<int>(static_cast<Context*>(context) - contexts));
  return kOk;
}

ASCEND_SIM_API int aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = device >= 0 && device < kMaxDevices && active[device];
  return kOk;
}

ASCEND_SIM_API int aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t* logical) {
  *logical = user;
  return kOk;
}

ASCEND_SIM_API int aclrtDeviceCanAccessPeer(int32_t* can, int32_t, int32_t) {
  *can = 1;
  return kOk;
}
ASCEND_SIM_API int aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return kOk; }

ASCEND_SIM_API int aclrtDeviceGetBareTgid(int32_t* process) {
  *process = getpid();
  return kOk;
}

ASCEND_SIM_API int aclrtDeviceGetUuid(int32_t device, char* uuid) {
  std::memset(uuid, 0, 16);
  uuid[15] = static_cast<char>(device + 1);
  return kOk;
}

ASCEND_SIM_API int aclrtGetDeviceUtilizationRate(int32_t, int32_t* rates) {
  // Cube, vector, AI CPU and memory, in percent.
  std::memset(rates, 0, 4 * sizeof(int32_t));
  return kOk;
}

ASCEND_SIM_API int aclrtSetSysParamOpt(int option, int64_t value) {
  system_parameters[option & 63] = value;
  return kOk;
}

ASCEND_SIM_API int aclrtGetSysParamOpt(int option, int64_t* value) {
  *value = system_parameters[option & 63];
  return kOk;
}

ASCEND_SIM_API int aclrtSetOpExecuteTimeOutV2(uint64_t wanted, uint64_t* actual) {
  if (actual) *actual = wanted;
  return kOk;
}

ASCEND_SIM_API int aclrtGetDeviceResLimit(int32_t, int type, uint32_t* value) {
  *value = type == 0 ? kCubeCores : kVectorCores;
  return kOk;
}
ASCEND_SIM_API int aclrtGetStreamResLimit(void*, int type, uint32_t* value) {
  return aclrtGetDeviceResLimit(0, type, value);
}
ASCEND_SIM_API int aclrtGetResInCurrentThread(int type, uint32_t* value) {
  return aclrtGetDeviceResLimit(0, type, value);
}
ASCEND_SIM_API int aclrtSetDeviceResLimit(int32_t, int, uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtResetDeviceResLimit(int32_t) { return kOk; }
ASCEND_SIM_API int aclrtSetStreamResLimit(void*, int, uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtResetStreamResLimit(void*) { return kOk; }
ASCEND_SIM_API int aclrtUseStreamResInCurrentThread(void*) { return kOk; }
ASCEND_SIM_API int aclrtUnuseStreamResInCurrentThread(void*) { return kOk; }

ASCEND_SIM_API int aclrtDeviceTaskAbort(int32_t, uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtSetDeviceSatMode(int) { return kOk; }
ASCEND_SIM_API int aclrtSetOpWaitTimeout(uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtSetOpExecuteTimeOut(uint32_t) { return kOk; }
ASCEND_SIM_API int aclrtCtxSetSysParamOpt(int, int64_t) { return kOk; }
ASCEND_SIM_API int aclrtGetLastError(int) { return kOk; }
ASCEND_SIM_API int aclrtPeekAtLastError(int) { return kOk; }

ASCEND_SIM_API int aclrtGetMemUceInfo(int32_t, void*, size_t, size_t* count) {
  if (count) *count = 0;
  return kOk;
}
ASCEND_SIM_API int aclrtMemUceRepair(int32_t, void*, size_t) { return kOk; }
