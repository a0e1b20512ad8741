// One boxed kernel for the aten operators that torch_npu registers, computed by torch's CPU kernels in place.
//
// Device memory lies in this process, so every npu tensor is named again as a CPU tensor over the same bytes, the CPU
// kernel runs, and fresh results move to the device. What the program would see on a card is kept: the work belongs to
// the current stream (its queue is waited for, its accesses are checked), random numbers come from the npu generator,
// and operators whose result the host must know wait for the device. torch_npu's own kernels stay where they move
// memory or only make views, and its CPU fallback stays: it is wrapped to be counted.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "sim.h"

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

extern "C" void ascend_sim_operator_waits(void* stream, const char* name);
extern "C" int ascend_sim_num_misuses();
extern "C" int ascend_sim_take_misuse(char* text, int size);
extern "C" const char* aclGetRecentErrMsg();
extern "C" void ascend_sim_count_operator(const char* name);

namespace c10_npu {
// As torch_npu exports it: a c10::Stream with a way to the runtime's handle.
class NPUStream {
 public:
  explicit NPUStream(c10::Stream stream);
  // The handle; need_empty: first let the launch queue hand over what it holds.
  void* stream(bool need_empty) const;
  void synchronize() const;

 private:
  c10::Stream stream_;
};
}  // namespace c10_npu

namespace {

constexpr auto kNpu = c10::DeviceType::PrivateUse1;

// torch_npu's own kernels that work on the simulated card as they are: they allocate, make views or copy.
const std::unordered_set<std::string> kKept = {
    "empty.memory_format", "empty_strided", "empty_like", "new_empty_strided", "as_strided", "as_strided_", "view",
    "_reshape_alias", "view_as_real", "view_as_complex", "squeeze", "squeeze.dim", "unsqueeze", "unfold", "set_",
    "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "resize_", "resize_as_",
    "is_set_to", "record_stream", "is_pinned", "_pin_memory", "_to_copy", "_lazy_clone", "_copy_from_and_resize",
    "_to_sparse", "_to_sparse.sparse_dim"};

std::unordered_map<std::string, c10::SafeKernelFunction>& own_kernels() {
  static auto* kernels = new std::unordered_map<std::string, c10::SafeKernelFunction>;
  return *kernels;
}

bool on_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

std::string full_name(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// A CPU tensor over the bytes of an npu tensor.
at::Tensor named_on_cpu(const at::Tensor& tensor) {
  auto* from = tensor.unsafeGetTensorImpl();
  void* base = const_cast<void*>(from->unsafe_storage().data());
  c10::Storage storage(c10::Storage::use_byte_size_t{}, from->unsafe_storage().nbytes(),
                       c10::DataPtr(base, c10::Device(c10::kCPU)), nullptr, false);
  auto result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(DispatchKey::CPU), tensor.dtype());
  auto* to = result.unsafeGetTensorImpl();
  to->set_storage_offset(tensor.storage_offset());
  to->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  if (tensor.is_conj()) to->_set_conj(true);
  if (tensor.is_neg()) to->_set_neg(true);
  if (from->is_wrapped_number()) to->set_wrapped_number(true);
  return result;
}

// The current stream of a device, with all that was issued to it before in its queue.
void* current_stream(c10::Device device) {
  c10_npu::NPUStream stream(c10::impl::VirtualGuardImpl(kNpu).getStream(device));
  return stream.stream(true);
}

void wait_for(void* stream, c10::Device device) {
  if (ascend_sim_drain(stream, 0) == 0) return;
  // torch_npu words a failed stream itself.
  c10_npu::NPUStream(c10::impl::VirtualGuardImpl(kNpu).getStream(device)).synchronize();
}

// A core that fails while it works: the operator was accepted, and who waits for the stream is told.
void fail_later(void* stream, int code) {
  std::string text = aclGetRecentErrMsg();
  ascend_sim_push(stream, [code, text] {
    ascend_sim_set_error(text.c_str());
    return code;
  });
}

// Tell the check which bytes a tensor names. Views with gaps are told row by row, up to a number of rows.
void touch(void* stream, const at::Tensor& tensor, bool writes, const char* name) {
  constexpr int64_t kMostRows = 64;
  if (!tensor.numel() || !tensor.has_storage()) return;
  auto* begin = static_cast<const char*>(tensor.unsafeGetTensorImpl()->unsafe_storage().data());
  if (!begin) return;
  begin += tensor.storage_offset() * tensor.element_size();
  c10::SmallVector<std::pair<int64_t, int64_t>, 8> gaps;  // size and stride of the dimensions outside of a row
  int64_t row = 1, rows = 1;
  c10::SmallVector<int64_t, 8> order(tensor.dim());
  for (int64_t dim = 0; dim < tensor.dim(); ++dim) order[dim] = dim;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return tensor.stride(a) < tensor.stride(b); });
  for (int64_t dim : order) {
    int64_t size = tensor.size(dim), stride = tensor.stride(dim);
    if (size == 1 || stride == 0) continue;
    if (gaps.empty() && stride <= row) {
      row = stride * (size - 1) + row;
    } else {
      gaps.emplace_back(size, stride);
      rows *= size;
    }
  }
  if (rows > kMostRows) {
    for (auto [size, stride] : gaps) row += (size - 1) * stride;
    gaps.clear();
    rows = 1;
  }
  for (int64_t number = 0; number < rows; ++number) {
    int64_t rest = number, offset = 0;
    for (auto [size, stride] : gaps) {
      offset += rest % size * stride;
      rest /= size;
    }
    ascend_sim_touch(stream, begin + offset * tensor.element_size(), row * tensor.element_size(), writes, name);
  }
}

void raise_misuse() {
  if (C10_LIKELY(!ascend_sim_num_misuses())) return;
  char text[1024];
  if (ascend_sim_take_misuse(text, sizeof text) >= 0) TORCH_CHECK(false, "ascend_sim: stream misuse: ", text);
}

at::Tensor moved_to_npu(const at::Tensor& result, c10::Device device, void* stream, const char* name) {
  auto options = result.options().device(device);
  at::Tensor placed;
  if (result.is_non_overlapping_and_dense()) {
    placed = at::empty_strided(result.sizes(), result.strides(), options);
    if (result.numel()) {
      std::memcpy(placed.mutable_data_ptr(), result.const_data_ptr(), result.numel() * result.element_size());
    }
  } else {
    placed = at::empty(result.sizes(), options);
    named_on_cpu(placed).copy_(result);
  }
  touch(stream, placed, true, name);
  return placed;
}

// While it lives, a kernel that draws draws from (seed, offset) of an npu generator: the state that torch.npu saves
// and restores decides the numbers, as on a card, though the numbers are others.
class DrawsFromNpu {
 public:
  DrawsFromNpu(const std::optional<at::Generator>& given, c10::Device device) {
    at::Generator npu = given ? *given : at::globalContext().defaultGenerator(device);
    std::lock_guard<std::mutex> lock(npu.mutex());
    uint64_t offset = npu.get_offset();
    seed_ = npu.current_seed() + 0x9E3779B97F4A7C15ull * (offset / 4 + 1);
    seed_ ^= seed_ >> 29;
    npu.set_offset(offset + 4);
  }
  at::Generator cpu_generator() const { return at::detail::createCPUGenerator(seed_); }
  void lend_default() {
    auto cpu = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(cpu.mutex());
    saved_ = cpu.get_state();
    cpu.set_current_seed(seed_);
  }
  ~DrawsFromNpu() {
    if (!saved_.defined()) return;
    auto cpu = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(cpu.mutex());
    cpu.set_state(saved_);
  }

 private:
  uint64_t seed_;
  at::Tensor saved_;
};

// A fault asks for the operator to be refused: in the words of torch_npu for one that CANN cannot compile. Its own
// kernel is not asked to say them, because it says them on the launch queue, which then takes no more work.
[[noreturn]] void refuse(const std::string& name, c10::Device device) {
  char when[32];
  std::time_t now = std::time(nullptr);
  std::strftime(when, sizeof when, "%Y-%m-%d-%H:%M:%S", std::localtime(&now));
  const char* rank = std::getenv("RANK");
  TORCH_CHECK(false, "operator():../torch_npu/csrc/framework/OpParamMaker.cpp:348 OPS function error: ",
              name.substr(name.rfind(':') + 1), ", error code is 500002\n[ERROR] ", when, " (PID:", getpid(),
              ", Device:", static_cast<int>(device.index()), ", RankID:", rank ? rank : "-1",
              ") ERR01100 OPS call acl api failed\n[Error]: A GE error occurs in the system.\n"
              "        Rectify the fault based on the error information in the ascend log.");
}

struct Renamed {
  at::Tensor npu, cpu;
  bool writes;
};

// The arguments of one call, with npu tensors renamed.
struct Call {
  const OperatorHandle& op;
  Stack arguments;
  std::vector<Renamed> tensors;
  std::optional<c10::Device> device;
  int generator_at = -1;

  Call(const OperatorHandle& op, const Stack& stack) : op(op) {
    const auto& schema = op.schema().arguments();
    const size_t count = schema.size();
    tensors.reserve(count);
    arguments.reserve(count);
    for (size_t k = 0; k < count; ++k) arguments.push_back(rename(stack[stack.size() - count + k], schema[k], k));
    if (!device || device->index() < 0) device = c10::impl::VirtualGuardImpl(kNpu).getDevice();
  }

  at::Tensor rename(const at::Tensor& tensor, const c10::Argument& argument) {
    if (!on_npu(tensor)) return tensor;
    if (!device || device->index() < 0) device = tensor.device();
    bool writes = argument.alias_info() && argument.alias_info()->isWrite();
    // An empty out= may be resized by the kernel, which must not happen to memory that it does not own.
    bool replaced = writes && argument.is_out() && tensor.numel() == 0;
    auto cpu = replaced ? at::empty({0}, tensor.options().device(c10::kCPU)) : named_on_cpu(tensor);
    tensors.push_back({tensor, cpu, writes});
    return cpu;
  }

  IValue rename(const IValue& value, const c10::Argument& argument, size_t position) {
    if (value.isTensor()) return rename(value.toTensor(), argument);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(rename(tensor, argument));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList().vec()) {
        list.push_back(tensor ? std::optional<at::Tensor>(rename(*tensor, argument)) : tensor);
      }
      return list;
    }
    if (value.isDevice() && value.toDevice().type() == kNpu) {
      device = value.toDevice();
      return c10::Device(c10::kCPU);
    }
    if (argument.name() == "generator") generator_at = static_cast<int>(position);
    if (argument.name() == "pin_memory") return IValue();
    return value;
  }

  // What the kernel resized, or was given an empty stand-in for.
  void write_back() {
    for (Renamed& tensor : tensors) {
      bool same_memory = tensor.cpu.const_data_ptr() == tensor.npu.const_data_ptr();
      if (same_memory && tensor.cpu.sizes() == tensor.npu.sizes()) continue;
      if (tensor.cpu.sizes() != tensor.npu.sizes()) tensor.npu.resize_(tensor.cpu.sizes());
      if (tensor.cpu.numel() && tensor.cpu.const_data_ptr() != tensor.npu.const_data_ptr()) {
        named_on_cpu(tensor.npu).copy_(tensor.cpu);
      }
    }
  }

  // A result under its npu name: an argument, a view of one, or fresh.
  at::Tensor name_back(const at::Tensor& result, void* stream, const char* name) {
    if (!result.defined()) return result;
    for (Renamed& tensor : tensors) {
      if (tensor.cpu.is_same(result)) return tensor.npu;
    }
    if (result.device().type() != c10::kCPU) return result;
    if (result.layout() != c10::kStrided) return result.to(*device);
    const void* base = result.unsafeGetTensorImpl()->unsafe_storage().data();
    for (Renamed& tensor : tensors) {
      bool view = base && tensor.cpu.unsafeGetTensorImpl()->unsafe_storage().data() == base;
      if (view && result.scalar_type() == tensor.npu.scalar_type()) {
        return tensor.npu.as_strided(result.sizes(), result.strides(), result.storage_offset());
      }
    }
    return moved_to_npu(result, *device, stream, name);
  }
};

void compute(const OperatorHandle& op, Stack* stack) {
  const std::string& short_name = op.schema().name();
  const char* name = short_name.c_str();
  if (C10_UNLIKELY(ascend_sim_fault(name))) refuse(short_name, c10::impl::VirtualGuardImpl(kNpu).getDevice());
  ascend_sim_count_operator(name);
  raise_misuse();
  Call call(op, *stack);
  c10::DeviceGuard guard(*call.device);
  void* stream = current_stream(*call.device);
  wait_for(stream, *call.device);
  if (int code = ascend_sim_fault("stream"); C10_UNLIKELY(code)) fail_later(stream, code);
  for (const Renamed& tensor : call.tensors) touch(stream, tensor.npu, false, name);
  bool host_waits = op.hasTag(at::Tag::data_dependent_output) || op.hasTag(at::Tag::dynamic_output_shape);
  if (host_waits) ascend_sim_operator_waits(stream, name);
  bool draws = op.hasTag(at::Tag::nondeterministic_seeded) || call.generator_at >= 0;
  {
    std::optional<DrawsFromNpu> draw;
    if (draws) {
      std::optional<at::Generator> given;
      if (call.generator_at >= 0) {
        const IValue& generator = call.arguments[call.generator_at];
        if (generator.isGenerator()) given = generator.toGenerator();
      }
      draw.emplace(given, *call.device);
      if (call.generator_at >= 0) {
        call.arguments[call.generator_at] = IValue(draw->cpu_generator());
      } else {
        draw->lend_default();
      }
    }
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    op.callBoxed(&call.arguments);
  }
  call.write_back();
  for (const Renamed& tensor : call.tensors) {
    if (tensor.writes) touch(stream, tensor.npu, true, name);
  }
  torch::jit::drop(*stack, op.schema().arguments().size());
  for (IValue& value : call.arguments) {
    if (value.isTensor()) {
      stack->emplace_back(call.name_back(value.toTensor(), stream, name));
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(call.name_back(tensor, stream, name));
      stack->emplace_back(std::move(list));
    } else {
      stack->emplace_back(std::move(value));
    }
  }
  raise_misuse();
}

// copy_ between host and device goes through torch_npu's own kernel, which synchronises, records pinned memory and
// calls the runtime as it does on a card; here it only ever meets plain bytes of one dtype.
void copy(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  at::Tensor self = torch::jit::peek(*stack, 0, 3).toTensor();
  at::Tensor source = torch::jit::peek(*stack, 1, 3).toTensor();
  if (on_npu(self) == on_npu(source)) {
    // On the card itself, or between two.
    compute(op, stack);
    return;
  }
  if (C10_UNLIKELY(ascend_sim_fault("aten::copy_"))) refuse("copy_", on_npu(self) ? self.device() : source.device());
  raise_misuse();
  ascend_sim_count_operator("aten::copy_");
  bool non_blocking = torch::jit::peek(*stack, 2, 3).toBool();
  auto plain = [](const at::Tensor& tensor) { return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg(); };
  // Lives until the launch queue, which knows only its address, has handed the copy over.
  at::Tensor bytes = source;
  if (on_npu(self)) {
    if (source.scalar_type() != self.scalar_type() || source.sizes() != self.sizes() || !plain(source)) {
      bytes = source.to(self.scalar_type()).expand(self.sizes()).resolve_conj().resolve_neg().contiguous();
    }
    at::Tensor target = plain(self) ? self : at::empty(self.sizes(), self.options());
    Stack call{target, bytes, non_blocking};
    own_kernels().at("aten::copy_").callBoxed(op, keys, &call);
    if (!target.is_same(self)) self.copy_(target);
  } else {
    if (!plain(source)) bytes = source.resolve_conj().resolve_neg().contiguous();
    bool direct = bytes.scalar_type() == self.scalar_type() && bytes.sizes() == self.sizes() && plain(self);
    at::Tensor target = direct ? self : at::empty(bytes.sizes(), bytes.options().device(c10::kCPU));
    Stack call{target, bytes, non_blocking && direct};
    own_kernels().at("aten::copy_").callBoxed(op, keys, &call);
    if (!direct) self.copy_(target);
  }
  // Let the launch queue hand the copy over before the program goes on, so that its buffer is guarded from here on.
  current_stream(on_npu(self) ? self.device() : source.device());
  torch::jit::drop(*stack, 3);
  stack->emplace_back(self);
  raise_misuse();
}

// torch_npu's own _to_copy, which gives float32 where float64 is asked for by the dtype alone. With the device named as
// well, it gives what is asked for.
void to_copy(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  IValue &dtype = torch::jit::peek(*stack, 1, 7), &device = torch::jit::peek(*stack, 3, 7);
  if (dtype.isInt() && c10::ScalarType(dtype.toInt()) == c10::ScalarType::Double && device.isNone()) {
    device = torch::jit::peek(*stack, 0, 7).toTensor().device();
  }
  own_kernels().at("aten::_to_copy").callBoxed(op, keys, stack);
}

// torch_npu brings autograd kernels of its own for some aten operators, whose backwards call operators of CANN.
// torch's own formulas are taken instead.
void stock_autograd(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  DispatchKeySet below = keys & c10::after_autograd_keyset;
  op.redispatchBoxed(below | DispatchKeySet(DispatchKey::AutogradOther), stack);
}

// torch_npu's CPU fallback, counted by operator.
void fall_back(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
  std::string name = full_name(op.operator_name());
  ascend_sim_count(("fallback." + name).c_str(), 1);
  own_kernels().at(name).callBoxed(op, keys, stack);
}

std::vector<std::unique_ptr<torch::Library>>& libraries() {
  static auto* kept = new std::vector<std::unique_ptr<torch::Library>>;
  return *kept;
}

bool is_aten(const c10::OperatorName& name) { return name.name.rfind("aten::", 0) == 0; }

int64_t install(bool float64) {
  if (!libraries().empty()) return 0;
  auto& dispatcher = c10::Dispatcher::singleton();
  auto kernels = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::PrivateUse1, __FILE__,
                                                  __LINE__);
  auto autograd = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", DispatchKey::AutogradPrivateUse1,
                                                   __FILE__, __LINE__);
  int64_t count = 0;
  std::unordered_set<std::string> registered;
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::PrivateUse1)) {
    std::string full = full_name(name);
    registered.insert(full);
    bool is_to_copy = float64 && full == "aten::_to_copy";
    if (!is_aten(name) || (kKept.count(full.substr(6)) && !is_to_copy)) continue;
    auto op = dispatcher.findSchema(name);
    // A kernel whose operator this torch does not have.
    if (!op) continue;
    own_kernels().emplace(full, op->getComputedKernelForDispatchKey(DispatchKey::PrivateUse1));
    bool is_copy = full == "aten::copy_";
    kernels->impl(full.c_str() + 6, is_copy      ? torch::CppFunction::makeFromBoxedFunction<&copy>()
                                    : is_to_copy ? torch::CppFunction::makeFromBoxedFunction<&to_copy>()
                                                 : torch::CppFunction::makeFromBoxedFunction<&compute>());
    ++count;
  }
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::AutogradPrivateUse1)) {
    if (!is_aten(name)) continue;
    autograd->impl(full_name(name).c_str() + 6, torch::CppFunction::makeFromBoxedFunction<&stock_autograd>());
  }
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CPU)) {
    std::string full = full_name(name);
    if (!is_aten(name) || registered.count(full)) continue;
    auto found = dispatcher.findSchema(name);
    if (!found) continue;
    auto& op = *found;
    if (op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutograd) ||
        op.hasKernelForDispatchKey(DispatchKey::CompositeImplicitAutograd) ||
        op.hasKernelForDispatchKey(DispatchKey::CompositeExplicitAutogradNonFunctional)) {
      continue;
    }
    own_kernels().emplace(full, op.getComputedKernelForDispatchKey(DispatchKey::PrivateUse1));
    kernels->impl(full.c_str() + 6, torch::CppFunction::makeFromBoxedFunction<&fall_back>());
  }
  libraries().push_back(std::move(kernels));
  libraries().push_back(std::move(autograd));
  return count;
}

// Called by the reference kernels that are written in Python: catch up with the current stream, touch the arguments.
void before_kernel(const std::string& name, at::TensorList reads, at::TensorList writes) {
  static std::mutex mutex;
  static auto* names = new std::unordered_set<std::string>;
  const char* kept;
  {
    std::lock_guard<std::mutex> lock(mutex);
    kept = names->insert(name).first->c_str();
  }
  if (!reads.empty()) ascend_sim_count_operator(kept);
  raise_misuse();
  const at::Tensor* any = nullptr;
  for (const auto& tensor : reads) any = on_npu(tensor) ? &tensor : any;
  for (const auto& tensor : writes) any = on_npu(tensor) ? &tensor : any;
  if (!any) return;
  void* stream = current_stream(any->device());
  wait_for(stream, any->device());
  for (const auto& tensor : reads) {
    if (on_npu(tensor)) touch(stream, tensor, false, kept);
  }
  for (const auto& tensor : writes) {
    if (on_npu(tensor)) touch(stream, tensor, true, kept);
  }
  raise_misuse();
}

}  // namespace

TORCH_LIBRARY(ascend_sim, library) {
  library.def("install(bool float64) -> int", &install);
  library.def("before_kernel(str name, Tensor[] reads, Tensor[] writes) -> ()", &before_kernel);
}
