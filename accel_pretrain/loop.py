"""The training loop. :func:`fit` is the whole of it, :func:`train_step` is one update; the rest is what happens now and then.

``step`` counts completed updates. During ``train_step`` the update in progress is number ``state.step + 1``.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from accel_pretrain.branching import longer
from accel_pretrain.checkpoint import TrainState, write_model_description
from accel_pretrain.data import Windows
from accel_pretrain.errors import PretrainError
from accel_pretrain.generate import SamplingConfig, generate
from accel_pretrain.hindsight import most_memory
from accel_pretrain.optim import set_lr
from accel_pretrain.parallel import alike, is_sharded, whole, withheld
from accel_pretrain.recovery import divergence, heed_alarm, went_back
from accel_pretrain.rules import begin_update
from accel_pretrain.run import TrainingRun
from accel_pretrain.runtime import seed_dropout
from accel_pretrain.typed_yaml import to_yaml
from accel_pretrain.validation import Abandoned, EvalResult, validate

RULE = "-" * 80
_NOTHING = contextlib.nullcontext()


@dataclass(frozen=True)
class Update:
    """What one update did: global mean loss in nats per token and norm before clipping, still on the device; rate and size."""

    loss: torch.Tensor
    grad_norm: torch.Tensor
    lr: float
    samples: int


def fit(run: TrainingRun, state: TrainState) -> TrainState:
    """Train from ``state`` to the end of the plan, or to a wish to stop; evaluate, report and save on the way."""
    config, plan = run.config, run.plan
    wanted = False  # whether a checkpoint is due
    run.watch.restart(state.step, state.tokens)
    if state.owes_evaluation:
        make_up_for_evaluation(run, state)
    run.watchdog.enter("first update")
    while state.step < plan.max_iters and not run.stop.agreed():
        with run.aids.around(state):
            update = train_step(run, state)
        if update is None:
            break  # asked to stop, and the update would have taken too long to finish
        if run.guard.wants_back and went_back(run, state):
            wanted = False
            continue
        state.step += 1
        state.samples += update.samples
        state.tokens += update.samples * config.model.context_length
        run.log.advance()
        run.watchdog.enter("update")
        after = None if config.debug.takes_time else run.hindsight.after
        if after and (line := after(state.step, run.watch, run.accelerator.device, state.tokens)):
            run.log.line(line)
        if due(state.step, config.logging.log_interval):
            log_update(run, state, update)
        if run.guard.alarmed:
            heed_alarm(run, state)
        if state.step == plan.max_iters:
            break  # the last evaluation and checkpoint are finish's
        with run.watch.paused():
            best = due(state.step, config.evaluation.eval_interval) and evaluate(run, state, "eval")
            if due(state.step, config.logging.sample_interval):
                show_sample(run, state)
            wanted = wanted or best or due(state.step, config.checkpoint.checkpoint_interval) or run.stop.save_due
            wanted = wanted or state.step == plan.last_stable
            if wanted and not amid_bad_updates(run, state, is_best=best):
                save(run, state, is_best=best)
                wanted = False
    finish(run, state)
    return state


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many updates happens after update ``step``."""
    return every is not None and step % every == 0


def train_step(run: TrainingRun, state: TrainState) -> Update | None:
    """One update: forward and backward over the micro-batches, clip, step.

    The gradient is that of the mean loss over all tokens of the update, on all processes: each micro-batch contributes its
    summed nats, divided by the tokens of the whole update. DDP averages over processes, so that is multiplied back in.
    Gradients are exchanged once, in the last micro-step. None, with nothing changed, when the run is to stop instead.
    """
    accelerator, plan, config = run.accelerator, run.plan, run.config
    lr = config.schedule.lr(state.step + 1, config.optimizer.lr, plan.max_iters)
    set_lr(run.optimizer, lr)
    begin_update(run.optimizer, ready=run.saver.wait_until_copied)  # a checkpoint may be in the making
    samples, micro_batches = plan.samples_of(state.samples), run.batches.micro_batches(state.samples)
    weights_B = run.weights_B if samples == plan.samples_per_step else run.weights_B * (plan.samples_per_step / samples)
    nats: list[torch.Tensor] = []
    for micro_step, cpu_batch in enumerate(micro_batches):
        if run.stop.drops_update(micro_step, len(micro_batches)):
            run.optimizer.zero_grad()
            return None
        run.watchdog.beat()
        batch = cpu_batch.to(accelerator.device)
        if config.model.dropout:
            seed_dropout(config.training.seed, state.step, micro_step * plan.world_size + accelerator.process_index)
        exchange = plan.world_size == 1 or micro_step == len(micro_batches) - 1
        with _NOTHING if exchange else withheld(accelerator, run.model):
            nats_B = run.model(batch.inputs_BT, batch.targets_BT)
            accelerator.backward(nats_B, gradient=weights_B)
        nats.append(nats_B.detach())
    run.aids.gradients()
    grad_norm = accelerator.clip_grad_norm_(run.parameters, config.training.grad_clip or float("inf"))
    assert grad_norm is not None  # as it would be under DeepSpeed
    grad_norm = whole(grad_norm)
    loss = _sum_over_processes(run, torch.cat(nats).sum()) / (samples * config.model.context_length)
    run.saver.wait_until_copied()
    run.guard.step(accelerator, run.optimizer, state.health, state.step + 1, loss, grad_norm)
    return Update(loss=loss, grad_norm=grad_norm, lr=lr, samples=samples)


def _sum_over_processes(run: TrainingRun, value: torch.Tensor) -> torch.Tensor:
    if run.plan.world_size == 1:
        return value
    return run.accelerator.reduce(value, reduction="sum")  # type: ignore[return-value]


# -------------------------------------------------------------------------------------------------------- now and then


def log_update(run: TrainingRun, state: TrainState, update: Update) -> None:
    """Report one update. The only place, besides evaluation, where the processor waits for the device."""
    run.guard.settle(state.health)
    loss, grad_norm, skipped = update.loss.item(), update.grad_norm.item(), state.health.skipped
    seconds = run.watch.seconds_per_step(state.step)
    tokens_per_sec = run.watch.tokens_per_second(state.tokens)
    metrics = {
        "train/loss": loss,
        "train/learning_rate": update.lr,
        "train/grad_norm": grad_norm,
        "train/tokens_per_sec": tokens_per_sec,
        "train/iter_time_ms": seconds * 1000,
    }
    line = (
        f"Iter {state.step:>6} | Loss: {loss:.4f} | LR: {update.lr:.2e} | Grad norm: {grad_norm:.2f} | "
        f"Time: {seconds * 1000:.1f}ms | Tokens/sec: {tokens_per_sec:.0f}"
    )
    if run.peak_flops is None:
        line += " | MFU: n/a"
    else:
        metrics["train/mfu"] = tokens_per_sec * run.plan.flops_per_token / (run.peak_flops * run.plan.world_size)
        line += f" | MFU: {metrics['train/mfu']:.1%}"
    if peak_memory := most_memory(run.accelerator.device):
        metrics["train/peak_memory_gb"] = peak_memory / 1e9
    if skipped:
        metrics["train/skipped_updates"] = skipped
        line += f" | Skipped: {skipped}"
    run.log.line(line)
    run.log.metrics(state.step, state.tokens, metrics | run.system.read())
    run.watch.restart(state.step, state.tokens)


def evaluate(run: TrainingRun, state: TrainState, prefix: str) -> bool:
    """Measure both losses and report them; says whether this is now the best model, which wants to be saved as such."""
    run.log.line(f"{RULE}\nEvaluating at iteration {state.step}...")
    try:
        with run.watchdog.phase("evaluation"):
            train, val = (_validate(run, which) for which in ("train", "val"))
    except Abandoned:
        state.owes_evaluation = True
        run.log.line(f"Evaluation abandoned to save and leave\n{RULE}")
        return False
    state.owes_evaluation = False
    improved = run.config.checkpoint.save_best and math.isfinite(val.loss)
    improved = improved and (state.best_val_loss is None or val.loss < state.best_val_loss)
    if improved:
        state.best_val_loss = val.loss
    metrics = {"eval/train_loss": train.loss, "eval/val_loss": val.loss, "eval/perplexity": val.perplexity}
    metrics["eval/val_loss_standard_error"] = val.standard_error
    line = (
        f"Train loss: {train.loss:.4f} | Val loss: {val.loss:.4f} ± {val.standard_error:.4f} | Perplexity: {val.perplexity:.2f}"
    )
    if val.bits_per_byte is not None:
        metrics["eval/bits_per_byte"] = val.bits_per_byte
        line += f" | Bits per byte: {val.bits_per_byte:.4f}"
    if prefix == "final":
        metrics |= {"final/train_loss": train.loss, "final/val_loss": val.loss}
    run.log.line(f"{line}\n{RULE}")
    run.log.metrics(state.step, state.tokens, metrics)
    return improved


def make_up_for_evaluation(run: TrainingRun, state: TrainState) -> None:
    """Evaluate where the run was left in the middle of that."""
    best = evaluate(run, state, "final" if state.step == run.plan.max_iters else "eval")
    if not state.owes_evaluation:
        save(run, state, is_best=best)


def _validate(run: TrainingRun, which: str) -> EvalResult:
    """The loss on a fixed part of one split; of the training split, as many windows as are taken of the validation split."""
    val = Windows(run.splits.val, run.config.model.context_length)
    windows = val if which == "val" else run.batches.windows
    split = run.splits.val if which == "val" else run.splits.train
    return validate(
        run.accelerator, run.module, windows, batch_size=run.plan.batch_size,
        wanted=min(val.count, run.plan.eval_windows or val.count),
        bytes_per_token=split.bytes_per_token, interrupted=run.interrupted,
    )  # fmt: skip


def show_sample(run: TrainingRun, state: TrainState) -> None:
    """Generate from the model as it is now, on the main process alone: the module itself, so that nobody else is asked.

    Of a sharded one, each process holds a part: then all generate the same text together.
    The draws have a random state of their own, and nothing of the run's is touched: it goes on to the same bits.
    """
    if run.tokenizer is None or not (run.accelerator.is_main_process or is_sharded(run.module)):
        return
    settings, tokenizer = run.config.logging, run.tokenizer
    sampling = SamplingConfig(
        max_new_tokens=settings.sample_tokens, temperature=settings.sample_temperature, seed=run.config.training.seed
    )
    texts: list[tuple[str, str]] = []
    run.module.eval()
    try:
        with alike(run.module), torch.compiler.set_stance("force_eager"):  # every length would be compiled anew
            for prompt in settings.prompts:
                ids = tokenizer.encode_prompt(prompt)
                new = generate(run.module, ids, sampling, vocab_size=tokenizer.vocab_size, stop_id=tokenizer.eot_id)
                texts.append((prompt, tokenizer.decode(list(new))))
    except (PretrainError, torch.OutOfMemoryError) as error:  # a sample must not end a run
        run.log.line(f"No sample at iteration {state.step}: {str(error).splitlines()[0]}")
    run.module.train()
    run.log.samples(state.step, texts)


def amid_bad_updates(run: TrainingRun, state: TrainState, *, is_best: bool) -> bool:
    """Whether a save has to wait for a finite update: what would be saved may be past saving. A best loss is then forgotten."""
    run.guard.settle(state.health)
    if state.health.in_a_row and is_best:
        run.saver.wait(state)
        state.best_val_loss = run.saver.saved.best_val_loss
    return state.health.in_a_row > 0


def save(run: TrainingRun, state: TrainState, *, is_best: bool = False) -> None:
    """Publish a checkpoint, with all that is needed to go on, to sample and to evaluate without anything else."""
    run.guard.settle(state.health)

    def write_extras(folder: Path) -> None:
        (folder / "config.yaml").write_text(to_yaml(run.config), encoding="utf-8")
        write_model_description(folder, run.config.model, run.plan.vocab_size)
        if run.tokenizer is not None:
            run.tokenizer.save(folder / "tokenizer")

    facts = {
        "world_size": run.plan.world_size, "tokens_per_step": run.plan.tokens_per_step,
        "warmup_iters": run.plan.warmup_iters, "max_iters": run.plan.max_iters,
        "batch_warmup_from": run.plan.batch_warmup_from, "document_id": run.plan.document_id,
        "data_fingerprint": run.splits.train.fingerprint, "precision": run.accelerator.mixed_precision,
        "tokenizer_fingerprint": (run.splits.train.tokenizer or {}).get("fingerprint"),
        "config_sha256": hashlib.sha256(to_yaml(run.config).encode()).hexdigest(),
    }  # fmt: skip
    run.watchdog.enter("save")
    is_stable = state.step == run.plan.last_stable
    run.saver.save(state, facts=facts, write_extras=write_extras, is_best=is_best, is_stable=is_stable)
    run.watchdog.enter("update")


def finish(run: TrainingRun, state: TrainState) -> None:
    """The end: a last evaluation and checkpoint; or, when asked to stop, only the checkpoint."""
    with run.watchdog.phase("save"):
        run.saver.wait(state)
    run.guard.settle(state.health)
    if run.guard.alarmed:
        heed_alarm(run, state)
    if 0 < run.plan.max_iters == state.step == state.health.skipped:
        raise divergence(run, state, f"none of the {state.step} updates could be applied")
    if state.step < run.plan.max_iters:
        if state.step > run.saver.saved.step:
            _save_last(run, state)
        again = "the same command goes on" if run.config.checkpoint.resume_from == "auto" else "go on with --resume_from auto"
        run.log.line(f"Stopped after update {state.step} of {run.plan.max_iters}; {again} from here")
    elif state.step == run.saver.saved.step:
        run.log.line(
            f"Nothing to do: {state.step} of {run.plan.max_iters} updates are done; "
            + (longer(run) or "more max_iters, tokens or epochs go on")
        )
    else:
        best = evaluate(run, state, "final")
        if run.config.logging.sample_interval is not None:
            show_sample(run, state)
        _save_last(run, state, is_best=best)
        if line := longer(run):
            run.log.line(line[0].upper() + line[1:])


def _save_last(run: TrainingRun, state: TrainState, *, is_best: bool = False) -> None:
    save(run, state, is_best=is_best)
    with run.watchdog.phase("save"):  # which may go on in the background
        run.saver.finish(state)
