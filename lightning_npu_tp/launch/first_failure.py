"""Name the rank that failed first on every rank that fails after it, also where nobody supervises all of them.

Under torchrun, or on several hosts, a rank that loses its peers does not know why. So each rank that fails leaves its
error in the key-value store, before it closes the process group and its peers can notice: the first one stays. Who
comes later notes it on its own error. torchrun prints what each rank writes into its error file.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

_KEY = "lightning_npu_tp/first_failure"
# The host of the store may be silent; then the others have failed for that reason.
_STORE_SECONDS = 3.0


@contextlib.contextmanager
def first_failure_named() -> Iterator[None]:
    """Around a trainer call of any rank, within the process group's life."""
    try:
        yield
    except (Exception, SystemExit) as error:
        if not isinstance(error, SIGTERMException):
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                _note_first_failure(error)
            if dist.is_torchelastic_launched():
                get_error_handler().record_exception(error)
        raise


def _note_first_failure(error: BaseException) -> None:
    rank, host = dist.get_rank(), socket.gethostname()
    text = next(iter(str(error).strip().splitlines()), "")
    own = f"{type(error).__name__}: {text}"
    mine = json.dumps([rank, host, own])
    store, answers = dist.distributed_c10d._get_default_store(), list[bytes]()

    def ask() -> None:
        # A connection of its own: one that waits for a silent host would hold up whoever comes next. torch's stubs do
        # not have it.
        with contextlib.suppress(RuntimeError):
            answers.append(store.clone().compare_set(_KEY, "", mine))  # type: ignore[attr-defined]

    thread = threading.Thread(target=ask, name="first failure", daemon=True)
    thread.start()
    thread.join(_STORE_SECONDS)
    first_rank, first_host, first = json.loads(answers[0]) if answers else (rank, host, own)
    # What all ranks refuse alike is nobody's fault.
    if first_rank != rank and first != own:
        error.add_note(f"Rank {first_rank} of host {first_host} failed first: {first}")
