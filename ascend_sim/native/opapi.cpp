// A small libopapi.so: aclnn entry points that torch_npu's C++ code calls past the dispatcher, on torch's CPU kernels.
//
// torch_npu's own kernels then run down to the call: their checks, formats and the way onto the stream are real. An
// operator that is not here is unknown to torch_npu, as on an older CANN.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sim.h"

namespace {

constexpr int kFailed = 161002;

at::ScalarType dtype_of(int acl) {
  switch (acl) {
    case 0: return at::kFloat;
    case 1: return at::kHalf;
    case 2: return at::kChar;
    case 3: return at::kInt;
    case 4: return at::kByte;
    case 6: return at::kShort;
    case 9: return at::kLong;
    case 11: return at::kDouble;
    case 12: return at::kBool;
    case 16: return at::kComplexFloat;
    case 17: return at::kComplexDouble;
    case 27: return at::kBFloat16;
    default: throw std::runtime_error("no dtype for ACL type " + std::to_string(acl));
  }
}

using Integers = std::vector<int64_t>;
using Tensors = std::vector<at::Tensor>;

struct Executor {
  const char* name;
  Tensors reads, writes;
  std::function<void()> compute;
};

// Every aclnn operator has two halves: the first takes the arguments, the second puts the work on a stream.
int prepare(Executor** executor, uint64_t* workspace, const char* name, Tensors reads, Tensors writes,
            std::function<void()> compute) {
  *workspace = 0;
  *executor = new Executor{name, std::move(reads), std::move(writes), std::move(compute)};
  return 0;
}

void touch(void* stream, const Tensors& tensors, bool writes, const char* name) {
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.numel()) continue;
    int64_t last = 0;
    for (int64_t dim = 0; dim < tensor.dim(); ++dim) last += (tensor.size(dim) - 1) * tensor.stride(dim);
    ascend_sim_touch(stream, tensor.const_data_ptr(), (last + 1) * tensor.element_size(), writes, name);
  }
}

int launch(Executor* executor, void* stream) {
  touch(stream, executor->reads, false, executor->name);
  touch(stream, executor->writes, true, executor->name);
  return ascend_sim_push(stream, [executor] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    int code = 0;
    try {
      executor->compute();
    } catch (const std::exception& error) {
      ascend_sim_set_error((std::string("EZ1001: ") + executor->name + ": " + error.what()).c_str());
      code = kFailed;
    }
    delete executor;
    return code;
  });
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void* aclCreateTensor(const int64_t* sizes, uint64_t dims, int dtype, const int64_t* strides, int64_t offset, int,
                             const int64_t*, uint64_t, void* memory) {
  auto scalar_type = dtype_of(dtype);
  if (!memory) return new at::Tensor(at::empty({0}, scalar_type));
  char* begin = static_cast<char*>(memory) + offset * c10::elementSize(scalar_type);
  return new at::Tensor(
      at::from_blob(begin, at::IntArrayRef(sizes, dims), at::IntArrayRef(strides, dims), scalar_type));
}
EXPORT void* aclCreateScalar(void* value, int dtype) {
  return new at::Scalar(at::from_blob(value, {}, dtype_of(dtype)).item());
}
EXPORT void* aclCreateIntArray(const int64_t* values, uint64_t count) { return new Integers(values, values + count); }
EXPORT void* aclCreateTensorList(at::Tensor* const* tensors, uint64_t count) {
  auto* list = new Tensors;
  for (uint64_t k = 0; k < count; ++k) {
    list->push_back(*tensors[k]);
    delete tensors[k];
  }
  return list;
}
EXPORT int aclDestroyTensor(at::Tensor* tensor) {
  delete tensor;
  return 0;
}
EXPORT int aclDestroyScalar(at::Scalar* scalar) {
  delete scalar;
  return 0;
}
EXPORT int aclDestroyIntArray(Integers* integers) {
  delete integers;
  return 0;
}
EXPORT int aclDestroyTensorList(Tensors* tensors) {
  delete tensors;
  return 0;
}

// OPERATOR(name, (parameters), (reads), (writes), computation), where the computation sees copies of the parameters:
// the descriptions that torch_npu passed are gone by the time it runs.
#define UNPACK(...) __VA_ARGS__
#define OPERATOR(name, parameters, copies, reads, writes, computation)                                \
  EXPORT int name##GetWorkspaceSize(UNPACK parameters, uint64_t* workspace, Executor** executor) {     \
    return prepare(executor, workspace, #name, Tensors{UNPACK reads}, Tensors{UNPACK writes},          \
                   [UNPACK copies]() mutable { computation; });                                        \
  }                                                                                                    \
  EXPORT int name(void*, uint64_t, Executor* executor, void* stream) { return launch(executor, stream); }

using T = at::Tensor*;
using S = at::Scalar*;

OPERATOR(aclnnInplaceCopy, (T to, T from), (to = *to, from = *from), (*from), (*to), to.copy_(from))
OPERATOR(aclnnInplaceFillScalar, (T to, S value), (to = *to, value = *value), (), (*to), to.fill_(value))
OPERATOR(aclnnInplaceZero, (T to), (to = *to), (), (*to), to.zero_())
OPERATOR(aclnnInplaceOne, (T to), (to = *to), (), (*to), to.fill_(1))
OPERATOR(aclnnCast, (T from, int, T to), (from = *from, to = *to), (*from), (*to), to.copy_(from))
OPERATOR(aclnnConstantPadNd, (T from, Integers* pads, S value, T to),
         (from = *from, pads = *pads, value = *value, to = *to), (*from), (*to),
         to.copy_(at::constant_pad_nd(from, pads, value)))
OPERATOR(aclnnAdd, (T a, T b, S alpha, T to), (a = *a, b = *b, alpha = *alpha, to = *to), (*a, *b), (*to),
         to.copy_(at::add(a, b, alpha)))
OPERATOR(aclnnAdds, (T a, S b, S alpha, T to), (a = *a, b = *b, alpha = *alpha, to = *to), (*a), (*to),
         to.copy_(at::add(a, b, alpha)))
OPERATOR(aclnnMul, (T a, T b, T to), (a = *a, b = *b, to = *to), (*a, *b), (*to), to.copy_(at::mul(a, b)))
OPERATOR(aclnnMuls, (T a, S b, T to), (a = *a, b = *b, to = *to), (*a), (*to), to.copy_(at::mul(a, b)))
OPERATOR(aclnnMatmul, (T a, T b, T to, int8_t), (a = *a, b = *b, to = *to), (*a, *b), (*to), to.copy_(at::matmul(a, b)))
OPERATOR(aclnnMm, (T a, T b, T to, int8_t), (a = *a, b = *b, to = *to), (*a, *b), (*to), to.copy_(at::matmul(a, b)))
OPERATOR(aclnnReduceSum, (T from, Integers* dims, bool keep, int, T to),
         (from = *from, dims = *dims, keep, to = *to), (*from), (*to), to.copy_(at::sum(from, dims, keep)))
