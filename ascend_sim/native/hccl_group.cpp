#include "hccl_group.h"

#include "hccl_text.h"

namespace hccl {
namespace {

// One operation that waits for the end of its group; a batch has messages instead of a body.
struct Waiting {
  std::shared_ptr<Comm> comm;
  void* stream;
  Issue issue;
  std::vector<Access> accesses;
  std::function<void()> body;
  std::vector<Message> messages;
};

thread_local int depth = 0;
thread_local std::vector<Waiting> group;

void launch(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, const std::vector<Access>& accesses,
            std::function<void()> body) {
  const int code = comm->launch(stream, issue, accesses, std::move(body));
  if (code != 0) {
    throw Failure{kInternal, code, error_text("EI9999", "The runtime did not take the task, error " + std::to_string(code))};
  }
}

void launch_messages(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, std::vector<Message> messages) {
  std::vector<Access> accesses;
  for (const Message& message : messages) accesses.push_back({message.data, message.bytes, !message.is_send});
  launch(comm, stream, issue, accesses, [&c = *comm, messages]() mutable { exchange(c, messages); });
}

}  // namespace

void submit(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, const std::vector<Access>& accesses,
            std::function<void()> body) {
  comm->count(issue);
  if (depth == 0) return launch(comm, stream, issue, accesses, std::move(body));
  group.push_back({comm, stream, issue, accesses, std::move(body), {}});
}

void submit_messages(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, std::vector<Message> messages) {
  comm->count(issue);
  if (depth == 0) return launch_messages(comm, stream, issue, std::move(messages));
  for (Waiting& batch : group) {
    if (batch.body || batch.comm != comm || batch.stream != stream) continue;
    batch.issue.op = Op::kBatchSendRecv;
    batch.issue.bytes += issue.bytes;
    batch.issue.count += issue.count;
    batch.messages.insert(batch.messages.end(), messages.begin(), messages.end());
    return;
  }
  group.push_back({comm, stream, issue, {}, nullptr, std::move(messages)});
}

void group_start() { ++depth; }

bool group_end() {
  if (depth == 0) return false;
  if (--depth > 0) return true;
  std::vector<Waiting> waiting;
  waiting.swap(group);
  for (Waiting& one : waiting) {
    if (one.body) {
      launch(one.comm, one.stream, one.issue, one.accesses, std::move(one.body));
    } else {
      launch_messages(one.comm, one.stream, one.issue, std::move(one.messages));
    }
  }
  return true;
}

}  // namespace hccl
