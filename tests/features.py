"""Every feature that five descriptions of training programs promise, and what shows it here: five tables, checked by a test.

A feature stands in the words of its document, in the document's order. ``room::name`` stands for
``tests/test_room.py::test_name``, several may follow each other, and ``README: text`` for a text that the README holds.
"""

from __future__ import annotations

Table = dict[str, str]

STEPS: Table = {
    # Core concepts
    "get batch, forward pass, compute loss, backward pass, update weights": "seed_000::07_full_step",
    "this repeats thousands of times": "seed_000::08_multiple_iterations loop::the_loss_falls_on_real_text",
    "periodically: log metrics, validate, save checkpoints": "train::what_a_run_records",
    "YAML file contains all hyperparameters": "config::the_reference_is_the_code",
    "command-line args can override any config value": "typed_yaml::every_form_of_an_override",
    "everything else uses these config values": "seed_001::a_command_means_what_the_document_says",
    "checkpoints save this state + iteration number": "seed_000::09_checkpoint_cycle",
    "resuming loads state and continues from that iteration": "resume::one_process_resumes_to_the_same_bits",
    # Part 1: configuration
    "load YAML file": "seed_000::01_config_system",
    "parse command-line overrides (--training.batch_size 128)": "seed_000::01_config_system",
    "merge overrides into config": "typed_yaml::later_override_wins_and_any_override_beats_the_file",
    "convert to easy-to-use format": "typed_yaml::round_trip",
    "nested keys": "typed_yaml::every_form_of_an_override",
    "type conversion (string 128 to integer 128)": "typed_yaml::text_becomes_its_value_in_a_file_and_on_the_command_line",
    "what happens if config file doesn't exist?": "typed_yaml::missing_file_is_named_with_its_absolute_path",
    "scientific notation in YAML (6.0e-4), booleans, null": "typed_yaml::yaml_spellings",
    "file paths relative to where script runs": "typed_yaml::relative_paths_are_recorded_absolute",
    # Part 2: initialization
    "set random seed": "transformer::initial_weights_are_a_function_of_the_seed",
    "choose device (CUDA, MPS, or CPU)": "runtime::what_the_machine_does_not_have_is_refused",
    "load data files with np.memmap": "shards::round_trip shards::bare_file",
    "create model instance": "seed_000::02_initialization",
    "create optimizer instance": "optim::hyperparameters_reach_torch",
    "optionally apply torch.compile": "runtime::runs_are_compiled_where_it_pays_or_where_one_says_so",
    "initialize W&B if enabled": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "seed, model, optimizer, checkpoint: in this order": "resume::one_process_resumes_to_the_same_bits",
    "compile after checkpoint (changes model object)": "checkpoint::names_in_the_checkpoint_are_plain",
    "np.memmap dtype must match how data was saved": "shards::dtype_that_contradicts_the_manifest shards::wrong_size",
    "model arguments must exactly match": "typed_yaml::unknown_key_suggests_the_nearest_known_one",
    "optimizer choice (AdamW vs SGD have different parameters)": "typed_yaml::union_takes_the_keys_of_the_chosen_member_only",
    # Part 3: the loop
    "loop from start_iter to max_iters": "resume::one_process_resumes_to_the_same_bits",
    "calculate current learning rate (warmup + cosine schedule)": "schedule::cosine_equals_the_reference_at_every_step",
    "update optimizer's learning rate": "loop::the_rate_in_the_optimizer_is_the_schedules",
    "get a batch of data": "data::batch_is_int64_inputs_and_targets_shifted_by_one",
    "forward pass through model: [batch, seq_len, vocab_size]": "transformer::output_has_one_row_of_logits_per_position",
    "compute loss (with proper reshaping)": "loss::is_one_scalar_after_flattening_by_hand",
    "backward pass (compute gradients)": "seed_000::06_backward_pass",
    "clip gradients, after backward, before step": "loop::what_is_clipped_is_the_accumulated_gradient",
    "optimizer step (update weights), zero gradients": "seed_000::07_full_step",
    "learning rate updates happen per-iteration, not per-batch": "seed_002::corrected_it_trains",
    # Part 4: monitoring
    "console logging every N iterations (loss, LR, grad norm)": "train::what_the_console_shows",
    "W&B logging if enabled (same metrics)": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "validation: eval mode, no gradients, train mode again": "validation::it_leaves_no_trace",
    "compute loss on validation data, average over batches": "validation::it_is_the_mean_over_all_targets",
    "track iteration number for all logging": "metrics::a_row_has_step_time_tokens_and_metrics",
    "call .item() on tensors before logging": "train::what_a_run_records",
    "validation batches (here the same windows each time)": "validation::wanted_windows_are_spread_and_always_the_same",
    # Part 5: checkpoints
    "save checkpoints every K iterations, and a final one": "seed_000::10_full_run",
    "resume from checkpoint if specified": "resume::resuming_from_a_path_without_a_config_takes_that_runs_own",
    "create checkpoint directory if needed": "seed_000::10_full_run",
    "save config file alongside checkpoint": "train::resuming_needs_only_the_checkpoint",
    "keep only last N checkpoints": "checkpoint::only_the_newest_and_the_best_are_kept",
    "save separate best checkpoint based on val_loss": "loop::best_is_the_lowest_validation_loss",
    "handle interrupted training (Ctrl+C)": "stop::a_signal_saves_the_last_update",
    "checkpoint filenames include iteration number": "checkpoint::the_folder_is_named_by_its_step_and_verifies",
    # Critical details
    "targets are already shifted, don't shift again": "data::batch_is_int64_inputs_and_targets_shifted_by_one",
    "call wandb.init() once, log metrics with wandb.log()": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "if in a sweep, wandb.config contains override values": (
        "sweep::a_trial_that_an_agent_starts_uses_its_values sweep::the_values_of_an_agent_reach_the_config"
    ),
    "save emergency checkpoint before exiting": "stop::a_signal_saves_the_last_update",
    # Testing: tests 1 to 10
    "test 1: config system": "seed_000::01_config_system",
    "test 2: initialization": "seed_000::02_initialization",
    "test 3: data pipeline": "seed_000::03_data_pipeline",
    "test 4: forward pass": "seed_000::04_forward_pass",
    "test 5: loss computation": "seed_000::05_loss_computation",
    "test 6: backward pass": "seed_000::06_backward_pass",
    "test 7: full step": "seed_000::07_full_step",
    "test 8: multiple iterations": "seed_000::08_multiple_iterations",
    "test 9: checkpoint cycle": "seed_000::09_checkpoint_cycle",
    "test 10: full run": "seed_000::10_full_run",
    # Common mistakes
    "forgetting to reshape for loss": "loss::is_one_scalar_after_flattening_by_hand",
    "not updating learning rate": "optim::the_rate_that_was_set_is_the_one_that_is_used",
    "gradients during validation, staying in eval mode": "validation::it_leaves_no_trace",
    "logging tensors directly: memory leak": "train::what_a_run_records",
    "missing directory creation": "seed_000::10_full_run",
    "wrong data dtype": "shards::bare_file_of_odd_length config::data_that_does_not_fit",
    "seed timing": "transformer::initial_weights_are_a_function_of_the_seed",
    # What working looks like
    "command runs without errors": "readme::the_commands_for_own_text_run_as_they_stand",
    "loss prints every N iterations, validation loss at intervals": "train::what_the_console_shows",
    "loss generally decreases over time": "loop::the_loss_falls_on_real_text",
    "checkpoint files appear in checkpoint directory": "seed_000::10_full_run",
    "can Ctrl+C and resume from checkpoint": "stop::interrupted_and_continued_is_the_uninterrupted_run",
    "can override config values from command line": "typed_yaml::every_form_of_an_override",
    "W&B dashboard shows graphs (if enabled)": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    # Architecture and decisions
    "main function structure": "train::what_the_console_shows README: `main → pretrain → fit → train_step`",
    "nested YAML: model.*, training.*, optimizer.*": "config::the_reference_is_the_code",
    "dot notation": "typed_yaml::every_form_of_an_override",
    "log_interval < eval_interval < checkpoint_interval": "lint::a_planted_mistake_is_found",
    "try CUDA first, fall back to MPS, then CPU; print which": "train::what_the_console_shows",
    "if wandb import fails, training should still work": "trackers::a_tracker_that_is_not_installed_costs_one_warning",
    # Existing components
    "Transformer (model)": "transformer::logits_equal_the_reference",
    "AdamW and SGD (optimizers)": "optim::adamw_equals_the_reference optim::sgd_equals_the_reference",
    "cross_entropy_loss": "loss::equals_the_reference_summed_per_sequence",
    "learning_rate_schedule": "schedule::cosine_equals_the_reference_at_every_step",
    "gradient_clipping": "optim::clipping_is_by_the_norm_of_all_parameters_together",
    "data_loading": "data::every_sample_is_a_slice_of_the_file",
    "save_checkpoint / load_checkpoint": "seed_000::09_checkpoint_cycle",
    # Tips
    "start small, use tiny configs": "doctor::a_small_run_from_text_to_text",
    "print shapes and values": "notebooks::a_notebook_holds_what_it_says",
    "read error messages": (
        "head_loss::sequences_that_count_differently_are_refused_on_the_device "
        "train::bad_input_is_one_clear_line_and_leaves_nothing_behind"
    ),
    "monitor val_loss": "plot::validation_has_its_standard_error",
    "save early, save often": "saver::every_minutes_saves_besides_the_interval",
}

SCRIPT: Table = {
    # Key features
    "full control over model architecture": "seed_001::a_command_means_what_the_document_says",
    "optimizer settings": "optim::hyperparameters_reach_torch",
    "training parameters (batch size, iterations, gradient clipping)": "seed_001::a_command_means_what_the_document_says",
    "all configurable via command-line arguments": "train::help_lists_every_key",
    "np.memmap for large datasets": "workflows::reading_keeps_no_copy_of_the_data",
    "efficient batch sampling from memory-mapped arrays": (
        "README: assembling a batch of 64 x 1024, against nanoGPT's `get_batch`"
    ),
    "multi-GB datasets with minimal memory footprint": (
        "data::far_samples_are_read_at_once workflows::reading_keeps_no_copy_of_the_data"
    ),
    "save checkpoints at configurable intervals": "seed_000::10_full_run",
    "resume training from any checkpoint": "resume::going_back_sets_the_newer_checkpoints_aside",
    "checkpoints include model state, optimizer state, iteration": "seed_000::09_checkpoint_cycle",
    "automatic checkpoint directory creation": "seed_000::10_full_run",
    "console logging (loss, learning rate, throughput)": "train::what_the_console_shows",
    "periodic validation evaluation": "train::what_a_run_records",
    "optional Weights & Biases integration": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "configurable logging intervals": "train::what_a_run_records",
    # Usage
    "basic training": "seed_001::a_command_trains",
    "full configuration example": "seed_001::a_command_trains",
    "resume from checkpoint": "seed_001::the_resume_command_goes_on_where_the_checkpoint_ends",
    # Arguments, 28 of them
    "required arguments": "seed_001::a_command_means_what_the_document_says config::a_path_is_asked_for",
    "model, optimizer, training, checkpointing, logging, other": "seed_001::the_defaults_are_the_documents_but_for_these",
    # Training loop
    "set random seeds for reproducibility": "equivalence::control_another_seed_gives_other_losses",
    "initialize model and move to device": "seed_000::02_initialization",
    "optionally resume from checkpoint": "resume::one_process_resumes_to_the_same_bits",
    "cosine schedule with warmup": "schedule::cosine_equals_the_reference_at_every_step",
    "sample a batch, forward, cross-entropy, backward, clip, step": "seed_000::07_full_step",
    "log metrics (every log_interval)": "train::what_a_run_records",
    "evaluate on both training and validation sets": "train::what_a_run_records",
    "save model, optimizer, iteration (every checkpoint_interval)": "seed_000::10_full_run",
    "final evaluation, final checkpoint": "loop::the_last_evaluation_is_final",
    # Output
    "console output": "train::what_the_console_shows",
    "train/loss, train/learning_rate, train/tokens_per_sec, train/iter_time_ms": "train::what_a_run_records",
    "eval/train_loss, eval/val_loss": "train::what_a_run_records",
    "final/train_loss, final/val_loss": "train::what_a_run_records",
    # Workflows
    "quick test run": "seed_001::a_command_trains",
    "production training": "seed_001::a_command_trains",
    # Tips
    "out of GPU memory: a smaller batch, context or model": "tune::a_run_that_does_not_fit_says_what_would",
    "a good starting learning rate depends on model size": "lint::a_planted_mistake_is_found",
    "warmup 2-5% of max_iters": "schedule::warm_up_and_floor_default_to_two_percent_and_a_tenth",
    "balance checkpoint frequency with disk space": "lint::a_planted_mistake_is_found plan::a_plan_for_people",
    "eval_interval based on training speed": "lint::a_planted_mistake_is_found",
}

MODULE: Table = {
    # training_config.py
    "hyperparameters from JSON configuration": "seed_002::every_key_finds_its_place",
    "its ten keys": "seed_002::every_key_finds_its_place",
    "min_lr 5e-4 above learning_rate 1e-4": "seed_002::a_smallest_rate_above_the_largest_is_refused",
    "automatic device selection based on CUDA availability": "runtime::what_the_machine_does_not_have_is_refused",
    "mixed precision context management": "runtime::precision_is_the_configs_else_the_launchers_else_the_devices",
    "data type compatibility checks": "runtime::precision_is_the_configs_else_the_launchers_else_the_devices",
    # get_batch.py
    "get_batch: train or val": "shards::missing_split data::every_sample_is_a_slice_of_the_file",
    "x, y of [batch_size, block_size], shifted by 1": "data::batch_is_int64_inputs_and_targets_shifted_by_one",
    "memory-mapped file access (minimal RAM usage)": "workflows::reading_keeps_no_copy_of_the_data",
    "random sampling from dataset": "data::random_sampling_reaches_every_start_and_nothing_else",
    "recreates memmap each call to prevent memory leaks": "workflows::reading_keeps_no_copy_of_the_data",
    # loss.py
    "estimate_loss: both splits, averages over batches": (
        "validation::it_is_the_mean_over_all_targets train::what_a_run_records"
    ),
    "inference mode, back to train mode": "validation::it_leaves_no_trace",
    "__init__ exports": "README: from accel_pretrain.checkpoint import load_model",
    # Pipeline
    "AdamW, betas=(0.9, 0.95), weight_decay=0.1": "seed_001::the_defaults_are_the_documents_but_for_these",
    "LinearLR, then CosineAnnealingLR": "schedule::cosine_equals_the_reference_at_every_step",
    "forward pass with mixed precision": "transformer::bf16_autocast_is_close_to_float32",
    "loss / gradient_accumulation_steps": "equivalence::the_micro_batch_does_not_change_the_losses",
    "scaler.scale(loss).backward(), scaler.step, scaler.update": "guard::with_fp16_the_scaler_skips_and_it_is_counted",
    "clip_grad_norm_(max_norm=0.5)": "seed_000::07_full_step loop::what_is_clipped_is_the_accumulated_gradient",
    "scheduler.step() (there once per micro-step)": "seed_002::corrected_it_trains",
    "if epoch % eval_iters == 0: estimate_loss": "train::what_a_run_records",
    # Techniques
    "bfloat16 for faster computation": "README: training on a CPU in bf16",
    "GradScaler for float16": "guard::with_fp16_the_scaler_skips_and_it_is_counted",
    "float32 master weights": "checkpoint::the_model_comes_back_in_evaluation_mode_and_float32",
    "32 steps x 32 batch size = 1024 effective batch": "config::the_global_batch_does_not_depend_on_the_number_of_processes",
    "reduces memory requirements": "README: micro-batches and activation checkpointing on this machine",
    "linear warmup, cosine annealing to min_lr": "schedule::curve_goes_through_its_points",
    "gradient clipping stabilizes training": "loop::without_clipping_the_norm_is_still_reported",
    "only accessed portions cached by OS": "workflows::reading_keeps_no_copy_of_the_data",
    "zero_grad(set_to_none=True)": "estimates::the_peak_is_that_of_the_allocator",
    # Monitoring
    "wandb.init(project=..., config=config)": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "wandb.log: train_loss, val_loss, learning_rate, grad_norm": ("train::what_a_run_records trackers::wandb_gets_a_table"),
    "run.watch(model, log_freq=100)": "debugging::histograms_reach_tensorboard",
    # Tips
    "24GB+ VRAM recommended": "plan::a_plan_for_people",
    "checkpoint regularly to resume training": "resume::one_process_resumes_to_the_same_bits",
    "start with smaller max_iters for testing": "seed_001::a_command_trains",
    "monitor gradient norms for instability": "guard::a_spike_in_the_data_is_reported_and_applied",
    "check validation loss for overfitting": "plot::validation_has_its_standard_error",
}

DIRECTORY: Table = {
    # pretraining_simple.py
    "training on Project Gutenberg books": "workflows::a_book_becomes_a_model_that_speaks_and_a_picture",
    "basic training loop with validation": "workflows::a_book_becomes_a_model_that_speaks_and_a_picture",
    "simple loss calculation and evaluation": "evaluate::the_loss_is_its_definition",
    "text generation sampling during training": "loop::samples_are_shown_and_recorded_and_once_more_at_the_end",
    "visualization of training progress": "plot::one_run_is_drawn_into_its_own_directory",
    "manual text processing and splitting": (
        "prep::adding_documents_moves_no_old_one prep::an_only_document_is_cut_at_a_paragraph"
    ),
    "basic tokenization with tiktoken": "tokenizer::same_ids_as_tiktoken prep::ids_equal_tiktoken_document_by_document",
    "understanding training dynamics": "notebooks::a_notebook_holds_what_it_says",
    # pretraining_advanced.py
    "HuggingFace smollm-corpus dataset support": "prep_hub::a_dataset_by_its_name README: `hf:NAME[:CONFIG][:SPLIT]`",
    "pre-tokenized dataset caching for faster loading": "prep::the_same_again_is_already_there",
    "cosine decay with linear warmup": "schedule::cosine_equals_the_reference_at_every_step",
    "gradient clipping for training stability": "optim::clipping_is_by_the_norm_of_all_parameters_together",
    "model and optimizer checkpointing with resume capability": "resume::one_process_resumes_to_the_same_bits",
    "Weights & Biases logging": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "Distributed Data Parallel (DDP) for multi-GPU training": (
        "equivalence::two_processes_give_the_same_losses_even_with_dropout"
    ),
    "Flash Attention via PyTorch's optimized implementation": (
        "transformer::logits_equal_the_reference gpu_benchmark::the_program_runs_on_a_cpu"
    ),
    "torch.compile optimization for faster training": (
        "recompute::compiled_in_place README: tokens per second, eager / compiled"
    ),
    "configurable model sizes and hyperparameters": "config::shapes_have_the_published_sizes",
    "flexible dataset loading and preprocessing": (
        "prep_sources::packed_files prep_sources::parquet prep::globs_are_expanded_here_and_nothing_is_read_twice"
    ),
    # prep_dataset.py
    "Project Gutenberg boilerplate removal, legal notices": "prep_clean::the_frame_goes_and_the_book_stays",
    "text cleaning and normalization": "prep_clean::forms prep_clean::cleaning_twice_is_cleaning_once",
    "batch processing of multiple books": "prep_clean::books_on_the_command_line prep_clean::several_books_in_one_file",
    "progress tracking with tqdm": "prep_crash::a_terminal_sees_a_bar_and_a_log_sees_lines",
    "fallback implementations for missing dependencies": (
        "prep_engines::without_gigatoken prep_sources::an_extra_that_is_missing"
    ),
    "combine into training-ready format": "prep::nanogpt_reads_it prep_tools::with_weights_every_prefix_has_its_shares",
    # gpt_train.py
    "calc_loss_batch(): loss calculation for batches": "loss::equals_the_reference_summed_per_sequence",
    "evaluate_model(): on validation set": "evaluate::the_loss_is_its_definition",
    "generate_and_print_sample()": "loop::samples_are_shown_and_recorded_and_once_more_at_the_end",
    "plot_losses()": "plot::the_axes_hold_the_data",
    "consistent evaluation metrics": "evaluate::without_data_it_is_the_runs_own",
    "memory-efficient implementations": "head_loss::a_model_gives_the_same_loss_and_gradients",
    # wt_load.py
    "load pre-trained weights from various sources": (
        "hf::import_export_import_for_every_family hf_foreign::nanogpt hf_foreign::tensorflow_gpt2 hf_litgpt::litgpt"
    ),
    "weight format conversion": "weight_files::every_kind_reads_back weight_writing::written_files_are_those_of_the_library",
    "checkpoint management": "commit::the_newest_the_best_the_pinned_and_the_protected_are_kept",
    "model state restoration": "hf::init_from_begins_with_the_very_weights",
    # test_smollm.py
    "dependency checking": "doctor::the_packages_are_those_of_the_project",
    "quick training verification": "doctor::a_small_run_from_text_to_text",
    "integration testing": "readme::the_commands_for_own_text_run_as_they_stand",
    "environment validation": "doctor::the_machine doctor::what_is_wrong_with_a_machine_is_a_problem",
    # notebook.py
    "training dynamics visualization": "notebooks::a_notebook_runs",
    "hyperparameter experimentation": "notebooks::a_notebook_runs",
    "model behavior analysis": "notebooks::a_notebook_runs",
    # Configurations
    "124M, 355M, 774M, 1558M": "config::shapes_have_the_published_sizes",
    "num_epochs, max_grad_norm and other names": "typed_yaml::other_names_of_a_key_stand_alone typed_yaml::flat_json_config",
    "Flash Attention, compile: speedups": "README: tokens per second, eager / compiled: against nanoGPT",
    "DDP: linear scaling with multiple GPUs": "launch::the_benchmark_of_scaling_runs",
    # Datasets and figures
    "Project Gutenberg": "prep_clean::the_frame_goes_and_the_book_stays",
    "smollm-corpus: web text and code": "prep_hub::a_stream_goes_on_where_it_broke prep_clean::code_keeps_its_literals",
    "performance benchmarks": "README: ## Measured",
    # Monitoring
    "automatic loss tracking, hyperparameter logging": "trackers::a_tracker_gets_the_config_and_the_rows_of_the_file",
    "gradient and parameter histograms": "debugging::histograms_reach_tensorboard debugging::histograms_reach_wandb",
    "system resource monitoring": "logging_cost::the_machine_is_read_at_log_steps",
    "GaLore optimizer support for memory-efficient training": (
        "frugal::galore_finds_the_directions_of_gradients frugal::galore_of_full_rank_is_adamw_turned"
    ),
    "tensorboard-compatible logs": "trackers::tensorboard_gets_texts",
    "checkpoint saving every N steps": "seed_000::10_full_run",
    "training progress reports": "report::a_real_run_from_plan_to_report",
    "error handling and recovery": (
        "guard::a_rollback_leaves_out_the_window_and_replays watchdog::a_run_that_hangs_ends_with_75_and_says_where"
    ),
    # Dependencies and hardware
    "PyTorch >= 2.0, datasets, wandb, tiktoken, tqdm": "doctor::the_packages_are_those_of_the_project",
    "GPU 8GB or 24GB, RAM, storage": "plan::a_plan_for_people lint::a_planted_mistake_is_found",
    "multiple GPUs for DDP training": "README: the GPUs of one machine",
}

COURSE: Table = {
    # What you'll learn, pipeline
    "creating batches for language modeling": "data::windows_count_as_the_loader_does",
    "cross-entropy for next-token prediction": "loss::equals_the_reference_summed_per_sequence",
    "AdamW with learning rate scheduling": "optim::adamw_equals_the_reference loop::the_rate_in_the_optimizer_is_the_schedules",
    "training loop: putting it all together": "seed_000::10_full_run",
    "saving and resuming training": "resume::one_process_resumes_to_the_same_bits",
    "tracking metrics and debugging": "train::what_a_run_records doctor::all_proofs_hold",
    "text to ids to batches to logits to loss to gradients to update": (
        "notebooks::the_tour_runs README: ## How a token travels"
    ),
    # Key concepts
    "target: tokens shifted by 1": "data::batch_is_int64_inputs_and_targets_shifted_by_one",
    "flatten for loss computation": "loss::is_one_scalar_after_flattening_by_hand",
    "Adam with weight decay decoupling": "optim::adamw_decay_is_decoupled",
    "warmup: linear increase from 0 to max_lr": "schedule::curve_goes_through_its_points",
    "cosine decay: smooth decrease to min_lr": "schedule::curve_has_no_jumps",
    "gradient clipping: clip norm to max value": "optim::clipping_is_by_the_norm_of_all_parameters_together",
    # What you'll implement
    "TextDataset: load and tokenize text": "prep::text_files",
    "sliding window batches": "data::every_sample_is_a_slice_of_the_file data::each_window_comes_exactly_once_per_epoch",
    "TrainingConfig dataclass": "config::the_reference_is_the_code",
    "epochs": "config::how_long_and_how_much_warm_up loop::an_epoch_visits_every_window_once",
    "Trainer.train_epoch": "loop::an_epoch_visits_every_window_once",
    "Trainer.evaluate": "validation::it_is_the_mean_over_all_targets",
    "Trainer.save_checkpoint: model, optimizer, scheduler, step": "resume::one_process_resumes_to_the_same_bits",
    # Best practices: monitoring
    "loss curves should decrease smoothly": "plot::the_axes_hold_the_data loop::the_loss_falls_on_real_text",
    "perplexity: exp(loss)": "validation::bits_per_byte_and_perplexity_are_the_loss_in_other_units",
    "learning rate: track schedule": "train::what_a_run_records",
    "gradient norms: watch for explosion/vanishing": "guard::the_threshold_is_six_standard_deviations_of_the_last_128",
    # Debugging
    "overfit single batch": (
        "loop::one_batch_is_learned_by_heart debugging::one_batch_is_learned_by_heart_and_is_no_beginning_of_another_run"
    ),
    "check gradients: all parameters should have gradients": "transformer::every_parameter_gets_a_gradient",
    "validate shapes": "seed_000::04_forward_pass",
    "loss not decreasing: check LR, initialization, data": "lint::a_planted_mistake_is_found",
    # Optimization
    "mixed precision: FP16": "guard::with_fp16_the_scaler_skips_and_it_is_counted",
    "gradient accumulation": "equivalence::the_micro_batch_does_not_change_the_losses",
    "data loading: use multiple workers (none are needed)": "README: 27 times as fast (0.049 ms)",
    "distributed training": (
        "equivalence::two_processes_give_the_same_losses_even_with_dropout fsdp::every_process_holds_its_share"
    ),
    # Contents, success criteria
    "training deep dive and best practices": "notebooks::a_notebook_holds_what_it_says",
    "LR schedules": "schedule::rate_is_a_float_between_zero_and_the_peak",
    "complete training script": "readme::the_commands_for_own_text_run_as_they_stand",
    "successfully train on small dataset, observe decreasing loss": "loop::the_loss_falls_on_real_text",
    "different sampling strategies": (
        "generate::top_k_keeps_the_k_most_likely generate::top_p_keeps_the_fewest_that_reach_p "
        "generate::temperature_zero_takes_the_first_of_the_most_likely"
    ),
}

DOCUMENTS = {"000": STEPS, "001": SCRIPT, "002": MODULE, "003": DIRECTORY, "004": COURSE}

# Promised by a document, and shown by nothing here.
NOT_SHOWN: Table = {
    "pinned memory for async GPU transfer, non-blocking": "data.Batch.to does so; where the tests run, there is no GPU",
    "download Project Gutenberg texts": "nothing fetches a book by its address: files, and datasets of the hub, are read",
    "2-3x by Flash Attention, GPU hours and final losses": "the figures of the README are those of a CPU",
    "wandb.log: epoch": "a row has its update and its tokens; passes over the data stand in the first lines of a run",
}
