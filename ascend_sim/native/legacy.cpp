// The older operator interface (aclop), dumps, custom kernels and the profiler's hooks: torch_npu links against them.
//
// No operator is computed here. What reaches aclopCompileAndExecute has no kernel in the simulator, or is refused by a
// fault; torch_npu words the error itself, as it does for an operator that CANN cannot compile (500002).
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "runtime.h"

using namespace ascend_sim;

namespace {

struct TensorDescription {
  int dtype, format;
  std::vector<int64_t> shape;
};

int cannot_compile(const char* name) {
  char text[256];
  std::snprintf(text, sizeof text,
                "EZ3003: No supported Ops kernel and engine are found for [%s], optype [%s]. "
                "[the simulated card has no such kernel]",
                name, name);
  ascend_sim_set_error(text);
  return kOperatorFailed;
}

}  // namespace

ASCEND_SIM_API void* aclCreateTensorDesc(int dtype, int dims, const int64_t* shape, int format) {
  return new TensorDescription{dtype, format, {shape, shape + dims}};
}
ASCEND_SIM_API void aclDestroyTensorDesc(const TensorDescription* description) { delete description; }
ASCEND_SIM_API int aclGetTensorDescType(const TensorDescription* description) { return description->dtype; }
ASCEND_SIM_API int aclGetTensorDescFormat(const TensorDescription* description) { return description->format; }
ASCEND_SIM_API size_t aclGetTensorDescNumDims(const TensorDescription* description) { return description->shape.size(); }
ASCEND_SIM_API int aclGetTensorDescDimV2(const TensorDescription* description, size_t dim, int64_t* size) {
  if (dim >= description->shape.size()) return kBadParam;
  *size = description->shape[dim];
  return kOk;
}
ASCEND_SIM_API void aclSetTensorDescName(void*, const char*) {}
ASCEND_SIM_API int aclSetTensorFormat(void*, int) { return kOk; }
ASCEND_SIM_API int aclSetTensorShape(void*, int, const int64_t*) { return kOk; }
ASCEND_SIM_API int aclSetTensorPlaceMent(void*, int) { return kOk; }
ASCEND_SIM_API void* aclCreateDataBuffer(void*, size_t) { return std::malloc(1); }
ASCEND_SIM_API int aclDestroyDataBuffer(void* buffer) {
  std::free(buffer);
  return kOk;
}

ASCEND_SIM_API void* aclopCreateAttr() { return std::malloc(1); }
ASCEND_SIM_API void aclopDestroyAttr(void* attributes) { std::free(attributes); }
ASCEND_SIM_API int aclopSetAttrBool(void*, const char*, uint8_t) { return kOk; }
ASCEND_SIM_API int aclopSetAttrInt(void*, const char*, int64_t) { return kOk; }
ASCEND_SIM_API int aclopSetAttrFloat(void*, const char*, float) { return kOk; }
ASCEND_SIM_API int aclopSetAttrString(void*, const char*, const char*) { return kOk; }
ASCEND_SIM_API int aclopSetAttrDataType(void*, const char*, int) { return kOk; }
ASCEND_SIM_API int aclopSetAttrListBool(void*, const char*, int, const uint8_t*) { return kOk; }
ASCEND_SIM_API int aclopSetAttrListInt(void*, const char*, int, const int64_t*) { return kOk; }
ASCEND_SIM_API int aclopSetAttrListFloat(void*, const char*, int, const float*) { return kOk; }
ASCEND_SIM_API int aclopSetAttrListListInt(void*, const char*, int, const int*, const int64_t* const*) { return kOk; }

ASCEND_SIM_API int aclopCompileAndExecute(const char* name, ...) {
  ASCEND_SIM_ENTER;
  return cannot_compile(name);
}
ASCEND_SIM_API int aclopCompileAndExecuteV2(const char* name, ...) {
  ASCEND_SIM_ENTER;
  return cannot_compile(name);
}
ASCEND_SIM_API int aclSetCompileopt(int, const char*) { return kOk; }
ASCEND_SIM_API size_t aclGetCompileoptSize(int) { return sizeof "disable"; }
ASCEND_SIM_API int aclGetCompileopt(int, char* value, size_t size) {
  if (size) std::snprintf(value, size, "disable");
  return kOk;
}
ASCEND_SIM_API void* aclCreateGraphDumpOpt() { return nullptr; }
ASCEND_SIM_API int aclDestroyGraphDumpOpt(void*) { return kOk; }

ASCEND_SIM_API int aclmdlInitDump() { return kOk; }
ASCEND_SIM_API int aclmdlSetDump(const char*) { return kOk; }
ASCEND_SIM_API int aclmdlFinalizeDump() { return kOk; }

ASCEND_SIM_API int aclrtBinaryLoadFromData(const void*, size_t, const void*, void**) { return kUnsupported; }
ASCEND_SIM_API int aclrtBinaryGetFunction(void*, const char*, void**) { return kUnsupported; }
ASCEND_SIM_API int aclrtGetFunctionAddr(void*, void**, void**) { return kUnsupported; }
ASCEND_SIM_API int rtDevBinaryRegister(...) { return kUnsupported; }
ASCEND_SIM_API int rtFunctionRegister(...) { return kUnsupported; }
ASCEND_SIM_API int rtGetC2cCtrlAddr(...) { return kUnsupported; }
ASCEND_SIM_API int rtKernelLaunch(...) { return kUnsupported; }

ASCEND_SIM_API uint64_t MsprofGetHashId(const char*, size_t) { return 0; }
ASCEND_SIM_API int MsprofRegisterCallback(...) { return kOk; }
ASCEND_SIM_API int MsprofReportAdditionalInfo(...) { return kOk; }
ASCEND_SIM_API int MsprofReportApi(...) { return kOk; }
ASCEND_SIM_API int MsprofReportCompactInfo(...) { return kOk; }
ASCEND_SIM_API uint64_t MsprofSysCycleTime() { return 0; }
