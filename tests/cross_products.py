"""Which tests wait for `make test-all`: cross products beyond each mechanism, each family and each layout once.

`make test` is what a contributor waits for. Of the tests below it runs the cases that are named here, patterns of what
stands in a case's brackets; all others are marked `full`, and `make test-all` runs them. An empty tuple leaves a test
to `make test-all` as a whole, since another test has the same mechanism in a smaller form; a comment says which.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import pytest

IN_MAKE_TEST: dict[str, tuple[str, ...]] = {
    # Every family and every layout once.
    "test_every_family_in_every_layout_equals_transformers": (
        "llama-1x2x2",
        "qwen2-1x2x2-sliced",
        "qwen3-2x2x2",
        "mixtral-1x4x4",
        "mixtral-4x1x2",
        "olmoe-1x4x4-sliced",
        "olmoe-4x1x4",
        "qwen3_moe-2x1x2",
        "qwen2_moe-2x2x4",
        "deepseek_v3-2x2x2-sliced",
        "deepseek_v3-2x2x4-sliced",
        "uneven-2x2x4-sliced",
    ),
    # Every family and every layout once.
    "test_every_argument_of_the_forward_gives_the_numbers_of_one_process": (
        "deepseek_v2-sliced",
        "deepseek_v3-tensor",
        "qwen2_moe-both",
        "qwen3_moe-tensor",
        "mixtral-shard",
        "olmoe-sliced",
        "llama-tensor",
        "qwen2-shard",
        "qwen3-replicate",
    ),
    "test_what_was_made_before_conversion_trains_as_in_one_process": ("tensor-Early", "shard-*", "replicate-Early"),
    "test_what_save_pretrained_writes_is_what_transformers_loads": ("*-tensor-*", "mixtral-*", "llama-*"),
    "test_every_layout_equals_one_process": tuple(f"everything-sizes{i}-{bool(i % 2)}" for i in range(7)),
    "test_a_sharded_training_run_equals_transformers_in_one_process": ("uneven_vocabulary-4", "*-2"),
    "test_router_losses_and_counts_do_not_depend_on_the_layout": ("slices sent-False",),
    "test_masters_are_those_of_float32_training_in_every_layout": ("*-12",),
    "test_masters_come_out_of_a_checkpoint_bit_for_bit": ("float32",),
    "test_an_optimizer_gives_the_weights_of_one_process_or_is_refused": ("data 2, tensor 2, expert 4",),
    "test_padding_counts_nowhere_in_any_family": ("deepseek_v3", "qwen2_moe"),
    "test_padding_counts_nowhere_in_any_layout": ("tensor 2, slices", "data 2, tensor 2, expert 4"),
    "test_an_id_outside_of_the_vocabulary_is_an_error_in_every_layout": ("tensor 2, slices", "data 2 shard"),
    "test_the_same_run_twice_is_bit_identical": ("sizes2",),
    "test_arithmetic_of_what_a_rank_holds_is_what_it_holds": ("sizes0-replicate", "sizes1-shard"),
    "test_fewer_experts_than_replicas_and_tied_embeddings_over_data_ranks": ("sizes2",),
    "test_replicated_tokens_give_the_numbers_of_one_process": ("*-2",),
    "test_slices_of_the_sequence_give_the_whole_loss_and_each_its_part_of_the_gradient": ("*-uneven-masked",),
    "test_a_training_step_has_no_host_sync_and_no_dynamic_shape": ("2-*-npu", "2-greedy-cuda"),
    "test_all_to_all_asks_the_host_once_per_layer_and_never_backward": ("none-whole-npu", "block-slices-npu"),
    "test_a_step_moves_hardly_more_than_its_layout_must": ("sizes5-*",),
    "test_data_ranks_train_what_one_process_trains": ("*-2",),
    # One way first in each layout; both families and a tied embedding once.
    "test_parts_called_by_themselves_compute_what_one_process_computes": (
        "tensor-llama-",
        "shard-deepseek_v2-tied",
        "replicate-llama-",
    ),
    "test_an_expression_over_shards_has_the_value_and_the_gradient_of_the_whole": ("4",),
    "test_norms_penalties_logs_and_clipping_are_those_of_whole_tensors": ("shard-clipped", "replicas-logged"),
    "test_any_layout_resumes_from_any_other": ("tensor-both",),
    # Each habit that needed something of ours, once; the other layouts and habits are its cross product.
    "test_a_habit_gives_the_numbers_of_plain_lightning": (
        "tensor-finetuning resumed",
        "tensor-learning rate",
        "tensor-no optimizer",
        "tensor-scheduler added",
        "replicate-manual",
        "shard-backbone",
    ),
    "test_a_file_of_plain_lightning_goes_on_here": ("tensor",),
    # 25 pairs of layouts; `test_any_layout_resumes_from_any_other` has one.
    "test_every_layout_resumes_from_every_other": (),
    # All layouts; tests/unit/tools/test_audit.py and `test_what_one_rank_does_is_found` have one.
    "test_no_layout_of_ours_stalls": (),
    "test_no_family_of_ours_stalls": ("deepseek_v2",),
    "test_every_layout_holds_what_transformers_loads": ("deepseek_v2",),
    # `test_a_trained_model_says_the_same_in_transformers` exports from four ranks too.
    "test_a_round_trip_is_bit_identical": (),
    "test_a_trained_model_says_the_same_in_transformers": ("deepseek_v3-*",),
    "test_every_family_generates_in_transformers_what_the_trained_shards_generated": (),
    # In two versions of transformers; tests/unit/weights/test_hf_config.py has what is written for the older one.
    "test_transformers_4_57_says_of_an_export_what_transformers_5_says": (),
    "test_the_options_of_model_checkpoint_keep_working": ("background",),
    "test_a_full_disk_can_be_survived_and_the_stand_in_goes_when_a_save_succeeds": ("background-1",),
    # `test_a_checkpoint_asked_for_within_a_step_is_saved_at_its_end` resumes too.
    "test_nothing_is_left_out_and_nothing_done_twice": (),
    "test_every_way_to_use_a_layout_equals_one_process": (
        "replicate_all_to_all",
        "all_to_all_over_slices",
        "recompute_block_of_slices",
        "experts_not_divided",
    ),
    # One each: `test_exchanged_rows_need_the_sum_of_the_tensor_ranks`, `test_a_norm_over_all_heads_needs_its_sum`.
    "test_every_rule_that_loses_its_collective_is_caught_and_named": (),
    # tests/distributed/test_checkpoints.py loads folders; these go through Lightning's own script.
    "test_one_command_makes_a_file_that_plain_modules_of_all_families_load": (),
    "test_a_run_goes_on_from_the_consolidated_file_too": (),
    "test_a_resumed_run_goes_on_bit_for_bit": ("adamw",),
    # Whole runs of train.py in processes of their own.
    "test_a_preempted_run_saves_and_goes_on": ("child",),
    # `test_a_resumed_run_goes_on_bit_for_bit` stops in one place.
    "test_a_run_stopped_anywhere_goes_on_bit_for_bit": (),
    # kill -9 in mid-run.
    "test_a_run_that_is_killed_and_gone_on_with_ends_as_if_it_had_not_been": (),
    "test_rows_that_a_kill_took_come_back": (),
    # tests/distributed/test_strategy.py and test_load_ranks.py have their parts.
    "test_a_module_that_knows_nothing_of_us_trains": (),
    "test_train_from_a_folder": (),
    # The run's files are those of `test_the_run_folder_holds_everything_the_run_promises`.
    "test_more_devices_train_the_same_model_in_one_folder": (),
    # A family of one's own is converted and trained in tests/unit/models/test_new_family.py.
    "test_a_model_of_ones_own_trains_with_a_family_and_with_a_function": (),
    "test_the_package_imports_and_trains_without_its_extras": (),
    # tests/distributed/test_launcher_sweep.py has sweeps, of lighter jobs.
    "test_a_sweep_gives_every_job_a_folder_and_goes_on_after_a_failure": (),
    "test_the_first_job_of_a_sweep_may_fail_on_two_devices_and_the_second_trains_on_one": (),
    "test_a_sweep_in_one_process_gives_each_job_its_own_ranks_and_leaks_nothing": (),
    # Each is a run or several; that they compose and name what exists is in tests/unit/test_documented_commands.py.
    "test_a_documented_command_runs": (),
    "test_a_run_resumes_from_its_checkpoint": (),
    "test_the_card_experiment_says_in_one_sentence_what_is_missing": (),
    # Scripts in processes of their own, each of whose ranks imports everything. Of the launcher `make test` has
    # `test_the_rank_that_failed_in_a_step_is_named_last` and `test_two_trainers_of_one_script_use_the_same_ranks…`.
    "test_a_signal_to_one_rank_ends_all_even_when_blocked_in_a_collective": (),
    "test_a_rank_that_dies_before_the_process_group_exists_is_an_error_of_the_call": (),
    "test_torchrun_with_another_number_of_processes_is_told_both_numbers": (),
    "test_torchrun_ends_with_the_error_of_the_rank_that_failed": (),
    "test_a_job_of_a_sweep_has_the_time_to_save_that_its_strategy_sets": (),
    "test_a_job_that_saves_no_config_is_composed_again_for_its_ranks": (),
    "test_sigterm_ends_a_sweep_with_its_job": ("its job",),
    "test_a_model_trains_on_after_a_run_that_failed": ("replicate",),
    # `test_the_four_steps_and_the_comparison` is the whole command.
    "test_float64_over_data_and_expert_ranks": (),
    "test_no_rank_holds_the_whole_model": (),
    "test_a_checkpoint_that_cannot_be_loaded_says_why": (),
    # Each order is a process that imports everything.
    "test_lightning_knows_our_names_in_every_order_of_imports": ("imports1",),
    # Two network namespaces; tests/unit/launch/test_hosts.py has what several hosts decide.
    "test_two_hosts_train_as_one_and_a_cut_link_ends_both_with_the_silent_hosts_name": (),
    "test_ranks_that_slurm_starts_on_two_nodes_are_one_run_in_one_folder": (),
    # A thousand inputs for each parser, more with `make fuzz`; test_attacks.py has the inputs that did harm.
    "test_no_input_makes_a_parser_fail_hang_or_swell": ("fault text", "hccl"),
    # On simulated cards. All operators that torch describes, in one test.
    "test_the_operators_of_torch_compute_on_the_card_what_they_compute_on_the_cpu": (),
    "test_data_arrives_bit_by_bit": ("2",),
    "test_a_layout_on_four_cards_learns_as_one_process_on_the_cpu": (
        "tensor 4",
        "data 2, tensor 2, experts 4, slices, recompute",
    ),
    # `test_a_layout_on_four_cards_learns_as_one_process_on_the_cpu` compares losses; these more, more closely.
    "test_a_layout_on_cards_is_proven_as_closely_as_on_the_cpu": (),
    "test_the_default_job_on_cards_has_the_numbers_of_one_process": (),
    "test_a_lost_collective_is_seen_on_cards": (),
    "test_a_folder_is_checked_on_cards_in_float64": (),
    "test_tensor_ranks_train_as_the_cpu_and_never_wait_for_the_host": (),
    "test_travelling_rows_train_as_the_cpu_and_wait_once_per_mixture_layer": (),
    "test_cards_accumulate_and_export_what_the_cpu_does": (),
    "test_one_cards_overflow_is_everybodys_and_costs_one_step": (),
    # Whole runs of train.py, and of the table of faults, whose parts tests/sim/test_faults.py has.
    "test_the_default_job_on_two_data_ranks_writes_its_files_and_says_no_more_than_it_should": (),
    "test_a_fault_ends_all_ranks_with_cause_and_remedy_and_a_whole_checkpoint": (),
    "test_each_process_leaves_its_report": ("sys.exit(0)",),
    "test_a_swallowed_error_is_read_in_the_log": ("acl_thread",),
    "test_a_run_whose_queue_is_dead_ends_with_the_cause_and_without_a_checkpoint": (),
    "test_a_run_that_is_well_leaves_no_watch": (),
    # Ends of a run with a dead queue; `test_a_trainer_that_hangs_is_ended_with_the_error` has one.
    "test_one_that_hangs_on_its_way_out_is_ended_even_if_it_holds_the_interpreters_lock": (),
    "test_one_that_hangs_on_its_way_out_is_not_interrupted_again_but_ended": (),
    "test_a_rank_that_hangs_over_its_dead_queue_is_reported_with_the_cause": (),
    "test_a_queue_that_is_busy_is_not_taken_for_a_dead_one": (),
    "test_errors_are_logged_where_asked_for_as_cann_does": (),
    "test_a_fault_of_the_environment_strikes_only_its_rank_and_may_end_the_process": (),
    "test_cards_log_the_share_of_their_peak": (),
    "test_sixteen_bits_train_as_float32_but_for_their_rounding": ("bf16-mixed",),
    # tests/sim/test_float64.py proves layouts too, to more digits.
    "test_a_layout_on_several_cards_is_proven": (),
}


def mark(items: Iterable[pytest.Item], *, are_all: bool = True) -> None:
    """Give the marker `full` to the collected tests that wait for `make test-all`.

    are_all: whether no case was left out of the collection.
    Raises UsageError where none of the cases of a product is one that stays in `make test`.
    """
    verdicts: dict[str, list[bool]] = {}
    for item in items:
        name, bracket, case = item.name.partition("[")
        patterns = IN_MAKE_TEST.get(name)
        if patterns is not None:
            kept = bool(bracket) and any(fnmatchcase(case[:-1], pattern) for pattern in patterns)
            verdicts.setdefault(name, []).append(kept)
            if not kept:
                item.add_marker(pytest.mark.full)
    for name, kept_cases in verdicts.items():
        if are_all and IN_MAKE_TEST[name] and not any(kept_cases):
            raise pytest.UsageError(f"No case of {name} is in `make test`: none matches {IN_MAKE_TEST[name]}.")
