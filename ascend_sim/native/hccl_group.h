// HcclGroupStart and HcclGroupEnd: what one thread issues between them is queued at the end, and the sends and receives
// of a communicator among it become one batch, so that two ranks that both send first do not wait for each other for ever.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "hccl_comm.h"
#include "hccl_data.h"

namespace hccl {

void submit(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, const std::vector<Access>& accesses,
            std::function<void()> body);
void submit_messages(const std::shared_ptr<Comm>& comm, void* stream, const Issue& issue, std::vector<Message> messages);

void group_start();
// False if there is no group to end. Groups nest; only the outermost end queues.
bool group_end();

}  // namespace hccl
