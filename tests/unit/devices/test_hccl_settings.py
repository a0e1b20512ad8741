"""HCCL's settings as environment variables.

Catches: a misspelt or invented variable, a value that the library would silently replace, a user's
exported variable overwritten, and settings of one run taken for exported ones by the next.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from lightning_npu_tp.devices.hccl_settings import HcclSettings
from lightning_npu_tp.errors import ConfigError

CONF = Path(__file__).parents[3] / "conf" / "hccl"

# Every field, a value for it, and the variable that torch_npu 2.13 or CANN reads.
VARIABLES = [
    ({"connect_timeout_s": 120}, {"HCCL_CONNECT_TIMEOUT": "120"}),
    ({"exec_timeout_s": 0}, {"HCCL_EXEC_TIMEOUT": "0"}),
    ({"event_timeout_s": 1900}, {"HCCL_EVENT_TIMEOUT": "1900"}),
    ({"heartbeat_timeout_s": 60}, {"TORCH_HCCL_HEARTBEAT_TIMEOUT_SEC": "60"}),
    ({"buffer_mb": 64}, {"HCCL_BUFFSIZE": "64"}),
    ({"whitelist_disable": True}, {"HCCL_WHITELIST_DISABLE": "1"}),
    ({"interface_ip": "10.0.0.1"}, {"HCCL_IF_IP": "10.0.0.1"}),
    ({"socket_interface": "eth0"}, {"HCCL_SOCKET_IFNAME": "eth0"}),
    ({"deterministic": True}, {"HCCL_DETERMINISTIC": "true"}),
    ({"deterministic": False}, {"HCCL_DETERMINISTIC": "false"}),
    ({"deterministic": "strict"}, {"HCCL_DETERMINISTIC": "strict"}),
    ({"async_error_handling": 3}, {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "3"}),
    ({"blocking_wait": True}, {"TORCH_HCCL_BLOCKING_WAIT": "1"}),
    ({"desync_debug": False}, {"TORCH_HCCL_DESYNC_DEBUG": "0"}),
    ({"enable_monitoring": True}, {"TORCH_HCCL_ENABLE_MONITORING": "1"}),
    ({"dump_on_timeout": True}, {"TORCH_HCCL_DUMP_ON_TIMEOUT": "1"}),
    ({"task_queue": 2}, {"TASK_QUEUE_ENABLE": "2"}),
    ({"combined": True}, {"COMBINED_ENABLE": "1"}),
    ({"launch_blocking": True}, {"ASCEND_LAUNCH_BLOCKING": "1"}),
    ({"cpu_affinity": 1}, {"CPU_AFFINITY_CONF": "1"}),
    ({"inf_nan_mode": False}, {"INF_NAN_MODE_ENABLE": "0"}),
    ({"op_cache_mode": "force"}, {"ACL_OP_COMPILER_CACHE_MODE": "force"}),
    (
        {"op_cache_dir": "/cache", "op_cache_mode": "enable"},
        {"ACL_OP_COMPILER_CACHE_DIR": "/cache", "ACL_OP_COMPILER_CACHE_MODE": "enable"},
    ),
    ({"multi_stream_memory_reuse": 0}, {"MULTI_STREAM_MEMORY_REUSE": "0"}),
    ({"expandable_segments": True}, {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:True"}),
    (
        {"expandable_segments": False, "max_split_size_mb": 64},
        {"PYTORCH_NPU_ALLOC_CONF": "expandable_segments:False,max_split_size_mb:64"},
    ),
    (
        {"max_split_size_mb": 128, "garbage_collection_threshold": 0.8},
        {"PYTORCH_NPU_ALLOC_CONF": "max_split_size_mb:128,garbage_collection_threshold:0.8"},
    ),
    ({"extra": {"ASCEND_GLOBAL_LOG_LEVEL": 3}}, {"ASCEND_GLOBAL_LOG_LEVEL": "3"}),
    # Options of each group, no variable.
    ({"group_buffers_mb": {"world": 8}}, {}),
]


@pytest.mark.parametrize(("settings", "environment"), VARIABLES, ids=lambda value: "-".join(value))
def test_a_setting_becomes_the_variable_that_the_library_reads(settings, environment):
    assert HcclSettings(**settings).to_environment() == environment


def test_every_field_is_in_the_table_above():
    fields = {field.name for field in dataclasses.fields(HcclSettings)}
    assert fields == {name for settings, _ in VARIABLES for name in settings}


def test_settings_left_alone_set_nothing():
    assert HcclSettings().to_environment() == {}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"connect_timeout_s": 119}, "connect_timeout_s=119 is out of range. Set it to 120 to 7200"),
        ({"connect_timeout_s": 7201}, "120 to 7200"),
        ({"exec_timeout_s": -1}, "0 or more"),
        ({"buffer_mb": 0}, "1 or more"),
        (
            {"group_buffers_mb": {"tensor": 64}},
            "names 'tensor', which is no group. Name one of ('world',",
        ),
        ({"group_buffers_mb": {"world": 0}}, "hccl.group_buffers_mb.world=0 is out of range"),
        ({"task_queue": 3}, "0 to 2"),
        ({"cpu_affinity": 3}, "0 to 2"),
        ({"async_error_handling": 4}, "0 to 3"),
        ({"multi_stream_memory_reuse": -1}, "0 to 3"),
        ({"max_split_size_mb": 20}, "21 or more"),
        (
            {"expandable_segments": True, "max_split_size_mb": 64},
            "expandable_segments=true and hccl.max_split_size_mb=64 exclude each other",
        ),
        (
            {"expandable_segments": True, "garbage_collection_threshold": 0.8},
            "expandable_segments=true and hccl.garbage_collection_threshold=0.8 exclude each other",
        ),
        ({"garbage_collection_threshold": 1.5}, "0.0 to 1.0"),
        ({"connect_timeout_s": "7200"}, "not a whole number"),
        ({"connect_timeout_s": 7200.0}, "not a whole number"),
        ({"task_queue": True}, "not a whole number"),
        ({"combined": 1}, "none of: false, true"),
        ({"deterministic": "yes"}, "none of: false, true, strict"),
        ({"op_cache_mode": "on"}, "enable, disable, force"),
        ({"socket_interface": ""}, "not a text"),
        ({"exec_timeout_s": 7200}, "event_timeout_s=null (1868 by default) must exceed hccl.exec_timeout_s=7200"),
        ({"exec_timeout_s": 7200, "event_timeout_s": 7200}, "Set hccl.event_timeout_s to 7232"),
        ({"event_timeout_s": 1836}, "must exceed hccl.exec_timeout_s=null (1836 by default)"),
        ({"interface_ip": "10.0.0.1", "socket_interface": "eth0"}, "Set only one"),
        ({"launch_blocking": True, "task_queue": 1}, "switches the task queue off"),
        ({"op_cache_dir": "/cache"}, "has no effect without a mode"),
        ({"extra": {"TORCH_NPU_ENABLE_COMGR": 0}}, "neither HCCL nor torch_npu reads. Use instead: nothing"),
        ({"extra": {"NPU_FUSION_ENABLE": 1}}, "neither HCCL nor torch_npu reads"),
        ({"extra": {"TORCH_NPU_ALLOC_CONF": "max_split_size_mb:128"}}, "Use instead: PYTORCH_NPU_ALLOC_CONF"),
        ({"extra": {"HCCL_CONNECT_TIMEOUT": 9999}}, "Set hccl.connect_timeout_s instead"),
        ({"extra": {"HCCL_ASYNC_ERROR_HANDLING": 0}}, "Set hccl.async_error_handling instead"),
        ({"extra": {"PYTORCH_NPU_ALLOC_CONF": "x"}}, "Set hccl.expandable_segments"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_library_would_ignore_or_replace_is_refused(settings, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        HcclSettings(**settings)


def test_the_group_of_all_ranks_has_small_buffers_unless_an_axis_uses_it_or_the_user_says_otherwise():
    assert HcclSettings().buffers_mb([]) == {"world": 16}
    assert HcclSettings(buffer_mb=8).buffers_mb([]) == {"world": 8}
    assert HcclSettings().buffers_mb(["tensor_parallel"]) == {}
    settings = HcclSettings(group_buffers_mb={"world": 64, "expert_parallel": 400})
    assert settings.buffers_mb(["expert_parallel"]) == {"world": 64, "expert_parallel": 400}
    settings = HcclSettings(group_buffers_mb={"expert_parallel": 400})
    assert settings.buffers_mb(["expert_parallel"])["world"] == 400


def test_what_the_user_exported_wins_and_is_reported():
    environ = {"HCCL_CONNECT_TIMEOUT": "600", "HCCL_BUFFSIZE": "64"}
    settings = HcclSettings(connect_timeout_s=7200, buffer_mb=64, task_queue=2)
    report = settings.apply(environ)
    assert environ == {"HCCL_CONNECT_TIMEOUT": "600", "HCCL_BUFFSIZE": "64", "TASK_QUEUE_ENABLE": "2"}
    assert report.applied == {"TASK_QUEUE_ENABLE": "2"}
    assert report.kept == {"HCCL_CONNECT_TIMEOUT": "600"}
    assert report.lines() == [
        "TASK_QUEUE_ENABLE=2",
        "HCCL_CONNECT_TIMEOUT=600 (exported by you; the configuration's 7200 is not used)",
    ]


def test_applying_twice_changes_nothing_and_undo_leaves_only_what_was_exported():
    environ = {"HCCL_BUFFSIZE": "64"}
    settings = HcclSettings(buffer_mb=128, task_queue=2)
    first = settings.apply(environ)
    second = settings.apply(environ)
    assert second.applied == {} and second.kept == first.kept == {"HCCL_BUFFSIZE": "64"}
    second.undo(environ)
    assert environ["TASK_QUEUE_ENABLE"] == "2"
    first.undo(environ)
    assert environ == {"HCCL_BUFFSIZE": "64"}


def test_without_an_argument_the_process_environment_is_meant(monkeypatch):
    monkeypatch.delenv("TASK_QUEUE_ENABLE", raising=False)
    report = HcclSettings(task_queue=2).apply()
    assert os.environ["TASK_QUEUE_ENABLE"] == "2"
    report.undo()
    assert "TASK_QUEUE_ENABLE" not in os.environ


def test_two_allocator_variables_are_refused_since_torch_npu_refuses_them():
    environ = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    with pytest.raises(ConfigError, match="PYTORCH_ALLOC_CONF='max_split_size_mb:64' is exported(.|\n)*Unset"):
        HcclSettings(expandable_segments=True).apply(environ)
    HcclSettings(task_queue=2).apply(environ)
    assert environ["TASK_QUEUE_ENABLE"] == "2"


def configured(name):
    with initialize_config_dir(str(CONF), version_base=None):
        return instantiate(compose(name))


def test_the_default_configuration_names_every_field_and_sets_none():
    settings = configured("default")
    assert settings == HcclSettings()
    text = (CONF / "default.yaml").read_text()
    assert all(f"\n{field.name}:" in text for field in dataclasses.fields(HcclSettings))


def test_the_long_compile_configuration_waits_two_hours():
    assert configured("long_compile").to_environment() == {
        "HCCL_CONNECT_TIMEOUT": "7200",
        "HCCL_EXEC_TIMEOUT": "7200",
        "HCCL_EVENT_TIMEOUT": "7232",
    }
