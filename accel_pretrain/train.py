"""Train a model: ``accelerate launch -m accel_pretrain.train --config C.yaml``, or plain ``python -m`` on one device.

``main -> pretrain -> fit -> train_step``: this file reads the command line and puts a run together, in the order that matters
(accelerator, data, seed, model, optimizer, prepare, resume, compile); :mod:`accel_pretrain.loop` does the rest.
"""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from accel_pretrain import agent
from accel_pretrain.branching import FIXED, as_begun, mark_stable, raised_again
from accel_pretrain.checkpoint import TrainState, read_facts, read_model_config, read_state, require_optimizer, restore
from accel_pretrain.commit import find_newest, go_back, resolve, sweep
from accel_pretrain.compiling import resolve_compile
from accel_pretrain.config import Plan, RunConfig, Splits, flat, make_plan, open_splits, told
from accel_pretrain.data import TokenBatches
from accel_pretrain.debugging import conclude, install
from accel_pretrain.errors import CheckpointError, ConfigError, PretrainError, reported
from accel_pretrain.files import expanded, write_whole
from accel_pretrain.foresight import foresee
from accel_pretrain.guard import Guard
from accel_pretrain.hindsight import Hindsight
from accel_pretrain.history import about, read_starts, record_start
from accel_pretrain.launchers import is_restart, is_restart_of, leave_after, place
from accel_pretrain.lint import notices
from accel_pretrain.loop import RULE, fit
from accel_pretrain.lr_find import find
from accel_pretrain.machines import refuse_differences, refuse_other_folders
from accel_pretrain.one_batch import OneBatch
from accel_pretrain.optim import describe_groups
from accel_pretrain.origin import find_origin, refuse_other_shape, weights_of
from accel_pretrain.pace import few_collections, tiny_is_zero
from accel_pretrain.parallel import build_model, fill, prepare
from accel_pretrain.peers import Peers
from accel_pretrain.preset import describe, load_with
from accel_pretrain.recovery import out_of_memory
from accel_pretrain.run import TrainingRun, batches_of, sequence_weights
from accel_pretrain.runtime import build_accelerator, describe_runtime, peak_for, seed_everything, together
from accel_pretrain.saver import Saver
from accel_pretrain.session import Session, session, watched
from accel_pretrain.stopping import follow_the_launcher
from accel_pretrain.system import SystemMeter
from accel_pretrain.tokenizer import load_tokenizer
from accel_pretrain.trackers import RunLog
from accel_pretrain.typed_values import NULLS
from accel_pretrain.typed_yaml import CommandLine, Entry, load, parse_command_line, reference, to_plain, to_yaml

USAGE = """\
usage: accelerate launch -m accel_pretrain.train --config FILE [--section.key VALUE | --key VALUE | section.key=VALUE]...
       python -m accel_pretrain.train --train_data_path DIR [...]      one process, one device

  --preset depth=N choose shape, rates, batch and length for N layers; what is typed, or in FILE, comes before that
  --print_config   show the resolved config and the plan, and stop
  --lr_find        try learning rates from too low to too high, say which to type, and stop; only (over)writes lr_find.png
  --help           show this

Every key, its default and its meaning (a key whose last part is unique may stand alone, as --batch_size 32):

"""


def main(argv: Sequence[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    with reported():
        words = sys.argv[1:] if argv is None else argv
        flags = {"help", "print_config", "lr_find", "find_batch_size"}
        line = parse_command_line(RunConfig, words, flags=flags, short={"-h": "help"}, presets=True)
        if "help" in line.flags:
            print(USAGE + reference(RunConfig))
            return 0
        if "find_batch_size" in line.flags:
            same = shlex.join(["--only", "batch_size", *(word for word in words if word.lstrip("-") != "find_batch_size")])
            raise ConfigError(f"--find_batch_size: type python -m accel_pretrain.tune {same}")
        line = replace(line, overrides=(*line.overrides, *agent.wishes()))
        config = load_config(line)
        if line.preset is not None and place()[0] == 0:
            print(describe(line.preset, config))
        if "lr_find" in line.flags:
            return find(config)
        return pretrain(agent.own_directory(config), only_print="print_config" in line.flags)
    return 2


def load_config(line: CommandLine) -> RunConfig:
    """Defaults, then the preset, the file, the overrides. Without a file, resuming from a path takes that run's own config."""
    file, overrides = line.config, line.overrides
    resume_from = dict(overrides).get("checkpoint.resume_from")
    if file is None and resume_from is not None and str(resume_from.raw).lower() not in ("auto", "never", *NULLS):
        checkpoint = _named(expanded(resume_from.raw))
        file = checkpoint / "config.yaml"
        here = Entry(str(checkpoint.parent), "--resume_from")  # the run may have been moved since it recorded its directory
        overrides = (("checkpoint.checkpoint_dir", here), *overrides)
    config = load_with(RunConfig, line.preset, file, overrides)
    if config.checkpoint.init_from is None:
        return config
    shape = read_model_config(find_origin(config.checkpoint)).resolved()
    origin = str(config.checkpoint.init_from)
    beneath = {f"model.{key}": Entry(value, origin) for key, value in to_plain(shape).items()}
    config = load_with(RunConfig, line.preset, file, overrides, beneath)
    model = replace(config.model, vocab_size=config.model.vocab_size or shape.vocab_size)
    if model.rope_scaling == shape.rope_scaling and model.rope_original_context is None:  # else it would follow context_length
        model = replace(model, rope_original_context=shape.rope_original_context)
    refuse_other_shape(origin, model.resolved(), shape)
    return replace(config, model=model)


def _named(path: Path) -> Path:
    """The checkpoint that a person has named; for a restart, which may come after that was removed, any of its run."""
    try:
        return resolve(path)
    except CheckpointError:
        if not is_restart():
            raise
        return resolve(path.parent)


@tiny_is_zero()
def pretrain(config: RunConfig, *, only_print: bool = False) -> int:
    """Put a run together and train it; returns the exit code."""
    run_dir = config.checkpoint.checkpoint_dir
    follow_the_launcher()
    accelerator = build_accelerator(config.training, config.logging.tracker_names, run_dir, config.parallel)
    say = accelerator.print
    with watched(accelerator, run_dir, config.training.hang_timeout) as watchdog:
        say("Loading data with memory mapping...")
        splits = open_splits(config.data)
        with Peers(accelerator).once():
            plan = make_plan(config, splits, accelerator.num_processes)
        if only_print:
            found = notices(config, plan, splits, cpu=accelerator.device.type == "cpu")
            groups = describe_groups(config.optimizer, config.model, plan.vocab_size)
            settings = f"{to_yaml(config)}\n# plan\n{plan.describe()}\n# parameters"
            say("\n".join([settings, *groups, *(f"notice: {notice}" for notice in found)]))
            return 0
        with session(accelerator, run_dir, watchdog) as around:
            around.forecast = foresee(config, plan, splits, accelerator)
            run, state = assemble(config, plan, splits, accelerator, around)
            around.afterwards.callback(around.close, run.log)
            try:
                with few_collections():
                    conclude(run, fit(run, state))
            except torch.OutOfMemoryError as error:
                raise out_of_memory(run, error) from None
            finally:
                with watchdog.phase("save"):
                    run.saver.close()
            unfinished = accelerator.is_main_process and state.step < run.plan.max_iters
            around.end(run.log, config.training.requeue if unfinished else False)
        return around.exit_code


def assemble(
    config: RunConfig, plan: Plan, splits: Splits, accelerator: Accelerator, around: Session
) -> tuple[TrainingRun, TrainState]:
    """Build model, optimizer and the rest, on every process alike, and go on from a checkpoint if there is one."""
    run_dir = config.checkpoint.checkpoint_dir
    checkpoint = prepare_run_directory(accelerator, config, plan, splits)
    if checkpoint is not None:
        config = as_begun(config, read_state(checkpoint))
        plan = make_plan(config, splits, plan.world_size, read_state(checkpoint))
    seed_everything(config.training.seed)
    module = build_model(accelerator, config.model, plan.vocab_size)
    origin = find_origin(config.checkpoint) if checkpoint is None and config.checkpoint.init_from is not None else None
    if checkpoint is None:
        fill(module, module.initial_weights() if origin is None else weights_of(origin, module, splits))
    model, optimizer = prepare(accelerator, module, config.optimizer.build)
    state = restore(accelerator, optimizer, checkpoint) if checkpoint else TrainState()
    flops = plan.flops_per_token * plan.tokens / plan.world_size
    wanted = replace(config.training, compile=False) if config.debug.detect_anomaly else config.training
    compiled, notice = resolve_compile(wanted, flops, accelerator.device)
    module.recompute(config.training.activation_checkpointing)
    module.chunked_loss, module.document_id = config.training.chunked_loss, plan.document_id
    if compiled:
        module.compile_parts()
    with together(accelerator, PretrainError):
        log = RunLog(accelerator, run_dir, step=state.step, total=plan.max_iters)
        if accelerator.is_main_process:
            mark_stable(run_dir, plan, checkpoint, state)
            where = describe_runtime(accelerator, config.training, config.parallel)
            record_start(run_dir, state.step, where, asdict(plan))

    def published(saved: TrainState, path: Path) -> None:
        log.line(f"Saved checkpoint to {path}")
        around.status.progress(step=saved.step, tokens=saved.tokens, checkpoint=path)

    saver = Saver(accelerator, run_dir, config.checkpoint, state, published)
    around.stop.clock = saver.due_by_clock
    run = TrainingRun(
        config=config, plan=plan, splits=splits, accelerator=accelerator, model=model.train(), module=module,
        optimizer=optimizer, stop=around.stop, watchdog=around.watchdog, status=around.status,
        parameters=list(model.parameters()), guard=Guard(config.training.on_spike), system=SystemMeter(accelerator.device),
        peak_flops=peak_for(accelerator, config.training),
        hindsight=Hindsight(around.forecast),
        weights_B=sequence_weights(plan, accelerator.device),
        tokenizer=load_tokenizer(splits.train.tokenizer_path) if splits.train.tokenizer_path else None,
        log=log, saver=saver,
        batches=batches_of(
            config, plan, splits, accelerator.process_index, OneBatch if config.debug.overfit_one_batch else TokenBatches
        ),
    )  # fmt: skip
    run.batches.leave_out(state.health.left_out)
    announce(run, state, checkpoint or origin, notice)
    run.status.progress(step=state.step, tokens=state.tokens, checkpoint=checkpoint)
    run.log.start_trackers(config.logging, {**to_plain(config), "about": about(), "plan": asdict(plan)})
    install(run)
    return run, state


def prepare_run_directory(accelerator: Accelerator, config: RunConfig, plan: Plan, splits: Splits) -> Path | None:
    """Sweep the run directory, find the checkpoint to go on from (None: start afresh), and record the config. Collective."""
    run_dir, peers = config.checkpoint.checkpoint_dir, Peers(accelerator)
    refuse_differences(peers, told(config, splits, accelerator.mixed_precision))
    found: list[Path | None] = [None]
    with together(accelerator, CheckpointError):
        if accelerator.is_main_process:
            sweep(run_dir)
            found[0] = find_checkpoint(config)
            if found[0] is not None:
                check_compatible(config, plan, splits, found[0], accelerator.mixed_precision)
            for path in go_back(run_dir, found[0]) if found[0] is not None else ():
                print(f"set aside {path.name}, which is newer than the checkpoint to go on from")
            write_whole(run_dir / "config.yaml", to_yaml(config).encode())
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    named = config.checkpoint.resume_from not in ("auto", "never", None)
    rolls_back = config.training.on_spike == "rollback"
    notice = refuse_other_folders(peers, run_dir, found[0], named=named, rolls_back=rolls_back)
    if notice and peers.is_main:
        print(f"Notice: {notice}")
    return found[0]


def find_checkpoint(config: RunConfig) -> Path | None:
    """The verified checkpoint that ``resume_from`` means, or None. Damaged ones are moved away: only for who holds the run."""
    run_dir, wanted = config.checkpoint.checkpoint_dir, config.checkpoint.resume_from
    if wanted not in ("auto", "never", None):
        place = expanded(wanted)
        inside = run_dir.resolve() in (place.resolve(), place.resolve().parent)
        if (is_restart() or not inside) and _began_with(run_dir, place) and (newest := find_newest(run_dir, quarantine=True)):
            print(f"going on with {newest.name}; this run has begun with {wanted}")
            return newest
        return resolve(place)
    newest = find_newest(run_dir, quarantine=True)
    if newest is not None and wanted != "auto":
        # A restart of the run that has begun here. One of a start that was refused below is refused again.
        before = [start.get("launch") for start in read_starts(run_dir)[-1:]]
        if any(isinstance(launch, dict) and is_restart_of(launch) for launch in before):
            print(f"going on with {newest.name}: an automatic restart of a run that has begun with --resume_from never")
            return newest
        raise CheckpointError(
            f"{run_dir} already holds {newest.name}; type --resume_from auto to go on with it, or another --checkpoint_dir"
        )
    return newest


def _began_with(run_dir: Path, place: Path) -> bool:
    """Whether the last start in ``run_dir`` was asked to go on from ``place`` too, and found it good."""
    try:
        before = load(RunConfig, run_dir / "config.yaml").checkpoint.resume_from
    except (PretrainError, OSError):
        return False
    return before is not None and expanded(before).resolve() == place.resolve()


def check_compatible(config: RunConfig, plan: Plan, splits: Splits, checkpoint: Path, precision: str) -> None:
    """Refuse to go on with another model, data, order or optimizer; say which other settings have changed since.

    ``precision`` is the one in force, in Accelerate's words: where nobody has chosen one, it is another on another processor.
    """
    require_optimizer(checkpoint)
    done = read_state(checkpoint)  # what does not count is refused before anything is moved for it
    before, config = load(RunConfig, checkpoint / "config.yaml"), as_begun(config, done)
    saved, now = flat(as_begun(before, done)), flat(config)
    changed = {key: (saved.get(key, "none"), now[key]) for key in now if saved.get(key) != now[key]}
    problems = [
        f"{key}: {checkpoint.name} has {old}, this config says {new}"
        for key, (old, new) in changed.items()
        if (key.startswith("model.") and key not in ("model.dropout", "model.vocab_size")) or key in FIXED
    ]
    facts = read_facts(checkpoint)
    if facts.get("data_fingerprint") != splits.train.fingerprint:
        weights = " with these weights" if splits.train.weights else ""
        problems.append(
            f"data.train_data_path: {checkpoint.name} was trained on other tokens than {splits.train.source} holds{weights}"
        )
    tokenizer = (splits.train.tokenizer or {}).get("fingerprint")
    if facts.get("tokenizer_fingerprint", tokenizer) != tokenizer:
        problems.append(f"data.train_data_path: {checkpoint.name} was trained with another tokenizer")
    batch = facts.get("tokens_per_step", plan.tokens_per_step) // config.model.context_length
    if batch != plan.samples_per_step and not config.checkpoint.allow_batch_change:
        problems.append(
            f"training.global_batch_size: {checkpoint.name} has {batch} sequences per update, this is {plan.samples_per_step};"
            f" type --global_batch_size {batch} for any number of processes, or --allow_batch_change true to change the curve"
        )
    plan = make_plan(config, splits, plan.world_size, done)
    if problem := raised_again(config, plan, before, checkpoint, done):
        problems.append(problem)
    if problems:
        raise ConfigError([*problems, "to start afresh instead, type another --checkpoint_dir"])
    for key, (old, new) in changed.items():
        if not key.startswith(("logging.", "checkpoint.", "debug.")):
            print(f"changed since {checkpoint.name}: {key} {old} -> {new}")
    if (had := facts.get("precision", precision)) != precision and "training.mixed_precision" not in changed:
        print(f"changed since {checkpoint.name}: the precision {had} -> {precision}; --mixed_precision {had} keeps it")


def announce(run: TrainingRun, state: TrainState, checkpoint: Path | None, notice: str | None) -> None:
    """The lines before the first update: what is about to happen, on what."""
    plan, say = run.plan, run.log.line
    trainable = sum(parameter.numel() for parameter in run.parameters if parameter.requires_grad)
    say(f"Train data size: {plan.train_tokens:,} tokens\nValidation data size: {plan.val_tokens:,} tokens\n")
    say(f"Total parameters: {plan.parameters:,}\nTrainable parameters: {trainable:,}\n")
    if checkpoint is not None:
        say(f"{'Resuming from' if state.step else 'Beginning with the weights of'} {checkpoint}")
    say(f"Starting training from iteration {state.step}...")
    say(describe_runtime(run.accelerator, run.config.training, run.config.parallel))
    say(
        f"Batch: {plan.batch_size} sequences x {plan.accumulation} micro-steps x {plan.world_size} processes = "
        f"{plan.tokens_per_step:,} tokens per update"
    )
    if plan.batch_warmup_from is not None:
        say(f"Batch warm-up: from {plan.batch_warmup_from} sequences, over {plan.batch_warmup_samples:,} of them")
    say(f"Max iterations: {plan.max_iters} ({plan.epochs:g} passes over the data)")
    for line in (*(f"Mixture: {part}" for part in plan.mixture), *run.hindsight.lines):
        say(line)
    found = notices(run.config, plan, run.splits, cpu=run.accelerator.device.type == "cpu")
    for line in (*found, *([notice] if notice else [])):
        say(f"Notice: {line}")
    say(RULE)


if __name__ == "__main__":
    leave_after(main)
