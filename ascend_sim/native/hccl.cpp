// The calls of HCCL that torch_npu makes, by the names and signatures it looks up: arguments checked, then queued.
// What is not simulated (rank tables, symmetric memory, several devices in one process) says so by HCCL_E_NOT_SUPPORT.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "hccl_comm.h"
#include "hccl_data.h"
#include "hccl_group.h"
#include "hccl_reduce.h"
#include "hccl_text.h"
#include "sim.h"

extern "C" int aclrtMalloc(void** address, size_t bytes, int policy);
extern "C" int aclrtFree(void* address);

using namespace hccl;

namespace {

struct RootInfo {
  char bytes[kRootInfoBytes];
};

union ConfigValue {
  int32_t value;
};

std::mutex handles_mutex;
std::map<void*, std::shared_ptr<Comm>> handles;
// Memory of root informations given out here, to be let go once everybody has attached.
std::map<uint64_t, Address> roots;

[[noreturn]] void refuse(int result, const char* api, const std::string& argument, const std::string& value,
                         const std::string& reason) {
  throw Failure{result, 0,
                error_text("EI0003", "In " + std::string(api) + ", the value [" + value + "] for [" + argument +
                                         "] is invalid: " + reason)};
}

// Run the rest of a call: count it and fail it as a fault says, and turn failures into a result and its text.
template <class Rest>
int entry(const char* api, const Rest& rest) {
  if (const int code = ascend_sim_fault(api)) return code;
  try {
    rest(api);
    return kSuccess;
  } catch (const Failure& failure) {
    ascend_sim_set_error(failure.text.c_str());
    return failure.result;
  } catch (const std::string& reason) {
    ascend_sim_set_error(error_text("EI0007", reason).c_str());
    return kNoMemory;
  }
}

int not_simulated(const char* api) {
  return entry(api, [](const char* name) {
    throw Failure{kNotSupported, 0, error_text("EI0003", std::string(name) + " is not simulated.")};
  });
}

std::shared_ptr<Comm> comm_of(const char* api, void* handle) {
  std::lock_guard<std::mutex> guard(handles_mutex);
  const auto found = handles.find(handle);
  if (found == handles.end()) refuse(kNullPointer, api, "comm", "not a communicator", "it was never made, or destroyed.");
  return found->second;
}

void* keep(const std::shared_ptr<Comm>& comm) {
  std::lock_guard<std::mutex> guard(handles_mutex);
  handles[comm.get()] = comm;
  return comm.get();
}

size_t element_size(const char* api, int dtype) {
  const size_t size = size_of(dtype);
  if (size == 0) refuse(kBadParameter, api, "dataType", std::to_string(dtype), "there is no such type.");
  return size;
}

void check_reduction(const char* api, int dtype, int op) {
  element_size(api, dtype);
  if (!can_reduce(dtype, op)) {
    refuse(kNotSupported, api, "dataType, op", std::string(name_of_dtype(dtype)) + ", " + name_of_reduction(op),
           "HCCL reduces int8, int16, int32, int64, fp16, fp32 and bfp16 by sum, prod, max and min, but int16 and bfp16 "
           "not by prod.");
  }
}

void check_rank(const char* api, const Comm& comm, const char* argument, uint32_t rank) {
  if (rank >= comm.num_ranks()) {
    refuse(kBadParameter, api, argument, std::to_string(rank),
           "communicator " + comm.name() + " has " + std::to_string(comm.num_ranks()) + " ranks.");
  }
}

void check_buffer(const char* api, const char* argument, const void* buffer, uint64_t bytes) {
  if (bytes > 0 && !buffer) refuse(kNullPointer, api, argument, "null", "the operation needs the buffer.");
}

Parts equal_parts(const Comm& comm, uint64_t bytes) {
  Parts parts;
  for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) {
    parts.bytes.push_back(bytes);
    parts.offsets.push_back(rank * bytes);
  }
  return parts;
}

// From counts and displacements in elements, which the caller keeps only until the call returns.
Parts uneven_parts(const char* api, const Comm& comm, const void* counts, const void* displacements, size_t size) {
  if (!counts || !displacements) refuse(kNullPointer, api, "counts, displacements", "null", "they are needed.");
  Parts parts;
  for (uint32_t rank = 0; rank < comm.num_ranks(); ++rank) {
    parts.bytes.push_back(static_cast<const uint64_t*>(counts)[rank] * size);
    parts.offsets.push_back(static_cast<const uint64_t*>(displacements)[rank] * size);
  }
  return parts;
}

uint64_t sum(const std::vector<uint64_t>& numbers) {
  uint64_t total = 0;
  for (const uint64_t number : numbers) total += number;
  return total;
}

std::vector<Access> accesses_of(const void* buffer, const Parts& parts, bool writes) {
  std::vector<Access> accesses;
  for (size_t i = 0; i < parts.bytes.size(); ++i) {
    accesses.push_back({static_cast<const char*>(buffer) + parts.offsets[i], parts.bytes[i], writes});
  }
  return accesses;
}

std::vector<Access> both(std::vector<Access> some, const std::vector<Access>& others) {
  some.insert(some.end(), others.begin(), others.end());
  return some;
}

int give_root(const char* api, RootInfo* root) {
  return entry(api, [&](const char* name) {
    if (!root) refuse(kNullPointer, name, "rootInfo", "null", "it is needed.");
    const Address address = make_memory();
    std::memset(root, 0, sizeof(*root));
    std::memcpy(root, &address, sizeof(address));
    std::lock_guard<std::mutex> guard(handles_mutex);
    roots[address.nonce] = address;
  });
}

int connect_as(const char* api, uint32_t num_ranks, const void* root, uint32_t rank, const CommConfig* config, void** comm) {
  return entry(api, [&](const char* name) {
    if (!root || !comm) refuse(kNullPointer, name, "rootInfo, comm", "null", "they are needed.");
    if (num_ranks == 0 || num_ranks > kMaxRanks) {
      refuse(kBadParameter, name, "nRanks", std::to_string(num_ranks),
             "the simulation joins 1 to " + std::to_string(kMaxRanks) + " ranks.");
    }
    if (rank >= num_ranks) refuse(kBadParameter, name, "rank", std::to_string(rank), "it is below nRanks.");
    Address address;
    std::memcpy(&address, root, sizeof(address));
    // The connection may fail: the memory is let go all the same.
    struct Root {
      uint64_t nonce;
      ~Root() {
        std::lock_guard<std::mutex> guard(handles_mutex);
        const auto found = roots.find(nonce);
        if (found == roots.end()) return;
        release(found->second);
        roots.erase(found);
      }
    } let_go{address.nonce};
    *comm = keep(Comm::connect(address, num_ranks, rank, config));
  });
}

int all_to_all_parts(const char* api, Op op, void* comm_handle, void* stream, const void* send, const void* receive,
                     int send_type, uint64_t count, const std::function<void(const char*, Comm&, Parts&, Parts&)>& sizes) {
  return entry(api, [&](const char* name) {
    const auto comm = comm_of(name, comm_handle);
    Parts to, from;
    sizes(name, *comm, to, from);
    check_buffer(name, "sendBuf", send, sum(to.bytes));
    check_buffer(name, "recvBuf", receive, sum(from.bytes));
    const auto accesses = both(accesses_of(send, to, false), accesses_of(receive, from, true));
    submit(comm, stream, {op, count, send_type, kNoReduction, 0, sum(to.bytes)}, accesses, [=, &comm = *comm] {
      all_to_all(comm, static_cast<const char*>(send), to, static_cast<char*>(const_cast<void*>(receive)), from);
    });
  });
}

}  // namespace

// Communicators

HCCL_API int HcclGetRootInfo(RootInfo* root) { return give_root(__func__, root); }
HCCL_API int HcclGetRootInfoScalable(RootInfo* root) { return give_root(__func__, root); }

HCCL_API int HcclCommInitRootInfo(uint32_t num_ranks, const RootInfo* root, uint32_t rank, void** comm) {
  return connect_as(__func__, num_ranks, root, rank, nullptr, comm);
}

HCCL_API int HcclCommInitRootInfoConfig(uint32_t num_ranks, const RootInfo* root, uint32_t rank, const CommConfig* config,
                                        void** comm) {
  return connect_as(__func__, num_ranks, root, rank, config, comm);
}

HCCL_API int HcclCommInitRootInfoScalable(uint32_t num_ranks, uint32_t, const RootInfo* roots_list, uint32_t rank, uint32_t,
                                          const CommConfig* config, void** comm) {
  return connect_as(__func__, num_ranks, roots_list, rank, config, comm);
}

HCCL_API int HcclCreateSubCommConfig(void** comm, uint32_t num_ranks, uint32_t* ranks, uint64_t id, uint32_t rank,
                                     CommConfig* config, void** sub_comm) {
  return entry(__func__, [&](const char* api) {
    if (!comm || !sub_comm) refuse(kNullPointer, api, "comm, subComm", "null", "they are needed.");
    const auto parent = comm_of(api, *comm);
    *sub_comm = nullptr;
    if (!ranks && id == kNotSet) return;  // this rank is not among the members
    if (!ranks || num_ranks == 0 || num_ranks > parent->num_ranks() || rank >= num_ranks) {
      refuse(kBadParameter, api, "rankNum, rankIds, subCommRankId", std::to_string(num_ranks) + ", " + std::to_string(rank),
             "they do not fit communicator " + parent->name() + ".");
    }
    *sub_comm = keep(parent->split({ranks, ranks + num_ranks}, id, rank, config));
  });
}

HCCL_API int HcclCommDestroy(void* comm) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    {
      std::lock_guard<std::mutex> guard(handles_mutex);
      handles.erase(comm);
    }
    held->destroy();
  });
}

HCCL_API int HcclGetCommAsyncError(void* comm, int* result) {
  return entry(__func__, [&](const char* api) {
    const Failure failure = comm_of(api, comm)->failure();
    *result = failure.result;
    // torch_npu's watchdog asks for the text on its own thread.
    if (failure.result != kSuccess) ascend_sim_set_error(failure.text.c_str());
  });
}

HCCL_API int HcclGetCommName(void* comm, char* name) {
  return entry(__func__, [&](const char* api) { std::snprintf(name, kNameBytes, "%s", comm_of(api, comm)->name().c_str()); });
}

HCCL_API int HcclGetRankSize(void* comm, uint32_t* num_ranks) {
  return entry(__func__, [&](const char* api) { *num_ranks = comm_of(api, comm)->num_ranks(); });
}

HCCL_API int HcclGetRankId(void* comm, uint32_t* rank) {
  return entry(__func__, [&](const char* api) { *rank = comm_of(api, comm)->rank(); });
}

HCCL_API uint32_t HcclGetCommConfigCapability() { return kNumCapabilities; }

// Determinism and how operations are expanded: here every reduction is deterministic and nothing is expanded.
HCCL_API int HcclSetConfig(int, ConfigValue) { return entry(__func__, [](const char*) {}); }

HCCL_API int HcclGetConfig(int, ConfigValue* value) {
  return entry(__func__, [&](const char*) { value->value = 1; });
}

HCCL_API const char* HcclGetErrorString(int result) {
  switch (result) {
    case kSuccess: return "no error";
    case kBadParameter: return "parameter error";
    case kNullPointer: return "empty pointer";
    case kNoMemory: return "memory error";
    case kNotSupported: return "feature not supported";
    case kTimeout: return "timeout";
    case kRemote: return "error of a remote rank";
    case kOutOfDeviceMemory: return "out of memory";
    default: return "internal error";
  }
}

// Operations

HCCL_API int HcclAllReduce(void* send, void* receive, uint64_t count, int dtype, int op, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    check_reduction(api, dtype, op);
    const uint64_t bytes = count * size_of(dtype);
    check_buffer(api, "sendBuf", send, bytes);
    check_buffer(api, "recvBuf", receive, bytes);
    submit(held, stream, {Op::kAllReduce, count, dtype, op, 0, bytes}, {{send, bytes, false}, {receive, bytes, true}},
           [=, &c = *held] { all_reduce(c, static_cast<char*>(send), static_cast<char*>(receive), count, dtype, op, -1); });
  });
}

HCCL_API int HcclReduce(void* send, void* receive, uint64_t count, int dtype, int op, uint32_t root, void* comm,
                        void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    check_reduction(api, dtype, op);
    check_rank(api, *held, "root", root);
    const uint64_t bytes = count * size_of(dtype);
    check_buffer(api, "sendBuf", send, bytes);
    std::vector<Access> accesses{{send, bytes, false}};
    if (held->rank() == root) {
      check_buffer(api, "recvBuf", receive, bytes);
      accesses.push_back({receive, bytes, true});
    }
    submit(held, stream, {Op::kReduce, count, dtype, op, int(root), bytes}, accesses, [=, &c = *held] {
      all_reduce(c, static_cast<char*>(send), static_cast<char*>(receive), count, dtype, op, int(root));
    });
  });
}

HCCL_API int HcclBroadcast(void* buffer, uint64_t count, int dtype, uint32_t root, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const uint64_t bytes = count * element_size(api, dtype);
    check_rank(api, *held, "root", root);
    check_buffer(api, "buf", buffer, bytes);
    const bool is_root = held->rank() == root;
    submit(held, stream, {Op::kBroadcast, count, dtype, kNoReduction, int(root), is_root ? bytes : 0},
           {{buffer, bytes, !is_root}}, [=, &c = *held] { broadcast(c, static_cast<char*>(buffer), bytes, root); });
  });
}

HCCL_API int HcclAllGather(void* send, void* receive, uint64_t count, int dtype, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const uint64_t bytes = count * element_size(api, dtype);
    check_buffer(api, "sendBuf", send, bytes);
    check_buffer(api, "recvBuf", receive, bytes);
    const Parts parts = equal_parts(*held, bytes);
    submit(held, stream, {Op::kAllGather, count, dtype, kNoReduction, 0, bytes},
           {{send, bytes, false}, {receive, sum(parts.bytes), true}},
           [=, &c = *held] { all_gather(c, static_cast<char*>(send), static_cast<char*>(receive), parts); });
  });
}

HCCL_API int HcclAllGatherV(void* send, uint64_t count, void* receive, const void* counts, const void* displacements,
                            int dtype, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const size_t size = element_size(api, dtype);
    const Parts parts = uneven_parts(api, *held, counts, displacements, size);
    if (parts.bytes[held->rank()] != count * size) {
      refuse(kBadParameter, api, "sendCount", std::to_string(count), "recvCounts says otherwise of this rank.");
    }
    check_buffer(api, "sendBuf", send, count);
    check_buffer(api, "recvBuf", receive, sum(parts.bytes));
    submit(held, stream, {Op::kAllGatherV, 0, dtype, kNoReduction, 0, count * size},
           both({{send, count * size, false}}, accesses_of(receive, parts, true)),
           [=, &c = *held] { all_gather(c, static_cast<char*>(send), static_cast<char*>(receive), parts); });
  });
}

HCCL_API int HcclReduceScatter(void* send, void* receive, uint64_t count, int dtype, int op, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    check_reduction(api, dtype, op);
    const uint64_t bytes = count * size_of(dtype);
    const Parts parts = equal_parts(*held, bytes);
    check_buffer(api, "sendBuf", send, bytes);
    check_buffer(api, "recvBuf", receive, bytes);
    submit(held, stream, {Op::kReduceScatter, count, dtype, op, 0, sum(parts.bytes)},
           {{send, sum(parts.bytes), false}, {receive, bytes, true}},
           [=, &c = *held] { reduce_scatter(c, static_cast<char*>(send), static_cast<char*>(receive), parts, dtype, op); });
  });
}

HCCL_API int HcclReduceScatterV(void* send, const void* counts, const void* displacements, void* receive, uint64_t count,
                                int dtype, int op, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    check_reduction(api, dtype, op);
    const size_t size = size_of(dtype);
    const Parts parts = uneven_parts(api, *held, counts, displacements, size);
    if (parts.bytes[held->rank()] != count * size) {
      refuse(kBadParameter, api, "recvCount", std::to_string(count), "sendCounts says otherwise of this rank.");
    }
    check_buffer(api, "sendBuf", send, sum(parts.bytes));
    check_buffer(api, "recvBuf", receive, count);
    submit(held, stream, {Op::kReduceScatterV, 0, dtype, op, 0, sum(parts.bytes)},
           both({{receive, count * size, true}}, accesses_of(send, parts, false)),
           [=, &c = *held] { reduce_scatter(c, static_cast<char*>(send), static_cast<char*>(receive), parts, dtype, op); });
  });
}

HCCL_API int HcclScatter(void* send, void* receive, uint64_t count, int dtype, uint32_t root, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const uint64_t bytes = count * element_size(api, dtype);
    check_rank(api, *held, "root", root);
    const uint64_t sent = held->rank() == root ? bytes * held->num_ranks() : 0;
    check_buffer(api, "sendBuf", send, sent);
    check_buffer(api, "recvBuf", receive, bytes);
    submit(held, stream, {Op::kScatter, count, dtype, kNoReduction, int(root), sent},
           {{send, sent, false}, {receive, bytes, true}},
           [=, &c = *held] { scatter(c, static_cast<char*>(send), static_cast<char*>(receive), bytes, root); });
  });
}

HCCL_API int HcclAlltoAll(const void* send, uint64_t send_count, int send_type, const void* receive, uint64_t receive_count,
                          int receive_type, void* comm, void* stream) {
  return all_to_all_parts(__func__, Op::kAlltoAll, comm, stream, send, receive, send_type, send_count,
                          [&](const char* api, Comm& held, Parts& to, Parts& from) {
                            to = equal_parts(held, send_count * element_size(api, send_type));
                            from = equal_parts(held, receive_count * element_size(api, receive_type));
                          });
}

HCCL_API int HcclAlltoAllV(const void* send, const void* send_counts, const void* send_displacements, int send_type,
                           const void* receive, const void* receive_counts, const void* receive_displacements,
                           int receive_type, void* comm, void* stream) {
  return all_to_all_parts(
      __func__, Op::kAlltoAllV, comm, stream, send, receive, send_type, 0,
      [&](const char* api, Comm& held, Parts& to, Parts& from) {
        to = uneven_parts(api, held, send_counts, send_displacements, element_size(api, send_type));
        from = uneven_parts(api, held, receive_counts, receive_displacements, element_size(api, receive_type));
      });
}

HCCL_API int HcclAlltoAllVC(const void* send, const void* count_matrix, int send_type, const void* receive, int receive_type,
                            void* comm, void* stream) {
  return all_to_all_parts(__func__, Op::kAlltoAllVC, comm, stream, send, receive, send_type, 0,
                          [&](const char* api, Comm& held, Parts& to, Parts& from) {
                            if (!count_matrix) refuse(kNullPointer, api, "sendCountMatrix", "null", "it is needed.");
                            const auto* counts = static_cast<const uint64_t*>(count_matrix);
                            const uint32_t n = held.num_ranks(), me = held.rank();
                            for (uint32_t peer = 0; peer < n; ++peer) {
                              to.offsets.push_back(sum(to.bytes));
                              to.bytes.push_back(counts[me * n + peer] * element_size(api, send_type));
                              from.offsets.push_back(sum(from.bytes));
                              from.bytes.push_back(counts[peer * n + me] * element_size(api, receive_type));
                            }
                          });
}

HCCL_API int HcclBarrier(void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    submit(held, stream, {Op::kBarrier, 0, kUint8, kNoReduction, 0, 0}, {}, [&c = *held] { barrier(c); });
  });
}

HCCL_API int HcclSend(void* buffer, uint64_t count, int dtype, uint32_t peer, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const uint64_t bytes = count * element_size(api, dtype);
    check_rank(api, *held, "destRank", peer);
    check_buffer(api, "sendBuf", buffer, bytes);
    submit_messages(held, stream, {Op::kSend, count, dtype, kNoReduction, 0, bytes},
                    {{true, static_cast<char*>(buffer), bytes, dtype, peer}});
  });
}

HCCL_API int HcclRecv(void* buffer, uint64_t count, int dtype, uint32_t peer, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    const uint64_t bytes = count * element_size(api, dtype);
    check_rank(api, *held, "srcRank", peer);
    check_buffer(api, "recvBuf", buffer, bytes);
    submit_messages(held, stream, {Op::kRecv, count, dtype, kNoReduction, 0, 0},
                    {{false, static_cast<char*>(buffer), bytes, dtype, peer}});
  });
}

HCCL_API int HcclBatchSendRecv(SendRecvItem* items, uint32_t num_items, void* comm, void* stream) {
  return entry(__func__, [&](const char* api) {
    const auto held = comm_of(api, comm);
    if (!items || num_items == 0) refuse(kBadParameter, api, "itemNum", std::to_string(num_items), "there is nothing to do.");
    std::vector<Message> messages;
    uint64_t sent = 0;
    for (uint32_t i = 0; i < num_items; ++i) {
      const SendRecvItem& item = items[i];
      if (item.kind != 0 && item.kind != 1) refuse(kBadParameter, api, "sendRecvType", std::to_string(item.kind), "0 or 1.");
      const uint64_t bytes = item.count * element_size(api, item.dtype);
      check_rank(api, *held, "remoteRank", item.peer);
      check_buffer(api, "buf", item.buffer, bytes);
      messages.push_back({item.kind == 0, static_cast<char*>(item.buffer), bytes, item.dtype, item.peer});
      sent += item.kind == 0 ? bytes : 0;
    }
    submit_messages(held, stream, {Op::kBatchSendRecv, num_items, items[0].dtype, kNoReduction, 0, sent}, messages);
  });
}

HCCL_API int HcclGroupStart() {
  return entry(__func__, [](const char*) { group_start(); });
}

HCCL_API int HcclGroupEnd() {
  return entry(__func__, [](const char* api) {
    if (!group_end()) refuse(kBadParameter, api, "group", "none", "no HcclGroupStart came before.");
  });
}

// Memory for symmetric access, as plain memory of the card.
HCCL_API int HcommMemAlloc(void** address, uint64_t bytes) {
  return entry(__func__, [&](const char*) {
    if (aclrtMalloc(address, bytes, 0) != 0) throw std::string("the card's memory is used up");
  });
}

HCCL_API int HcommMemFree(void* address) {
  return entry(__func__, [&](const char*) { aclrtFree(address); });
}

// Not simulated

HCCL_API int HcclCommInitAll(uint32_t, int32_t*, void**) { return not_simulated(__func__); }
HCCL_API int HcclCommInitClusterInfo(const char*, uint32_t, void**) { return not_simulated(__func__); }
HCCL_API int HcclCommInitClusterInfoConfig(const char*, uint32_t, CommConfig*, void**) { return not_simulated(__func__); }
HCCL_API int HcclCommSuspend(void*) { return not_simulated(__func__); }
HCCL_API int HcclCommResume(void*) { return not_simulated(__func__); }
HCCL_API int HcclCommWorkingDevNicSet(void*, uint32_t*, bool*, uint32_t) { return not_simulated(__func__); }
HCCL_API int HcclCommRegister(void*, void*, uint64_t, void**, uint32_t) { return not_simulated(__func__); }
HCCL_API int HcclCommDeregister(void*, void*) { return not_simulated(__func__); }
HCCL_API int HcclCommExchangeMem(void*, void*, uint32_t*, uint32_t) { return not_simulated(__func__); }
HCCL_API int HcclCommSymWinRegister(void*, void*, uint64_t, void**, uint32_t) { return not_simulated(__func__); }
HCCL_API int HcclCommSymWinDeregister(void*) { return not_simulated(__func__); }
HCCL_API int HcclCommSetMemoryRange(void*, void*, size_t, size_t, uint64_t) { return not_simulated(__func__); }
HCCL_API int HcclCommUnsetMemoryRange(void*, void*) { return not_simulated(__func__); }
HCCL_API int HcclCommActivateCommMemory(void*, void*, size_t, size_t, void*, uint64_t) { return not_simulated(__func__); }
HCCL_API int HcclCommDeactivateCommMemory(void*, void*) { return not_simulated(__func__); }
