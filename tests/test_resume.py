"""Ten updates are five, a restart, and five more: bit for bit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from accel_pretrain.launchers import is_restart_of, launch
from tests.running import TINY, Train, assert_same_bits, first_and_slow, losses, newest, reseal, rows, run_processes

PARTS = ("--checkpoint_interval", "5", "--dropout", "0.1", "--gradient_accumulation_steps", "2", "--max_iters", "10")


def stop_after_five(run_dir: Path) -> None:
    """Make the run look as if it had been killed right after its checkpoint of update 5."""
    import shutil

    shutil.rmtree(run_dir / "checkpoint_00000010")
    (run_dir / "latest").write_text("checkpoint_00000005\n")


def test_one_process_resumes_to_the_same_bits(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path / "whole", *PARTS) == 0
    assert run_train(tmp_path / "parts", *PARTS) == 0
    stop_after_five(tmp_path / "parts")
    capsys.readouterr()
    assert run_train(tmp_path / "parts", *PARTS) == 0
    assert "Resuming from" in capsys.readouterr().out
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    assert [row["step"] for row in rows(tmp_path / "parts") if "train/loss" in row] == list(range(1, 11))


def test_control_a_run_that_loses_its_position_ends_elsewhere(run_train: Train, tmp_path: Path) -> None:
    """The comparison above would notice data that starts over after a restart."""
    assert run_train(tmp_path / "whole", *PARTS) == 0
    assert run_train(tmp_path / "parts", *PARTS) == 0
    stop_after_five(tmp_path / "parts")
    state = newest(tmp_path / "parts") / "trainer_state.json"
    original = state.read_text()
    state.write_text(json.dumps(json.loads(original) | {"samples": 0}, indent=2) + "\n")
    reseal(newest(tmp_path / "parts"))
    assert run_train(tmp_path / "parts", *PARTS) == 0
    with pytest.raises(AssertionError):
        assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_two_processes_resume_to_the_same_bits(dataset: Path, tmp_path: Path) -> None:
    arguments = [*TINY, *PARTS, "--train_data_path", str(dataset)]
    for run in ("whole", "parts"):
        done = run_processes([*arguments, "--checkpoint_dir", str(tmp_path / run)], processes=2)
        assert done.returncode == 0, done.stderr
        assert "Processes: 2" in done.stdout
        if run == "parts":
            stop_after_five(tmp_path / run)
    done = run_processes([*arguments, "--checkpoint_dir", str(tmp_path / "parts")], processes=2)
    assert done.returncode == 0, done.stderr
    assert_same_bits(newest(tmp_path / "whole"), newest(tmp_path / "parts"))


def test_other_processes_and_micro_batches_continue_the_same_curve(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """Trained on one process, continued on two with another micro-batch: the same samples, the same losses."""
    common = ("--global_batch_size", "8", "--max_iters", "10", "--checkpoint_interval", "5", "--dropout", "0")
    assert run_train(tmp_path / "one", *common, "--batch_size", "4") == 0
    assert run_train(tmp_path / "two", *common, "--batch_size", "4") == 0
    stop_after_five(tmp_path / "two")
    arguments = [*TINY, *common, "--batch_size", "2", "--train_data_path", str(dataset)]
    done = run_processes([*arguments, "--checkpoint_dir", str(tmp_path / "two")], processes=2)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-6, rtol=0)


def test_a_changed_global_batch_repeats_and_skips_nothing(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_iters", "5", "--batch_size", "4") == 0
    assert run_train(tmp_path, "--max_iters", "8", "--batch_size", "6", "--allow_batch_change", "true") == 0
    state = json.loads((newest(tmp_path) / "trainer_state.json").read_text())
    assert (state["step"], state["samples"], state["tokens"]) == (8, 5 * 4 + 3 * 6, (5 * 4 + 3 * 6) * 32)


def test_hyperparameters_of_the_config_win_over_those_in_the_checkpoint(run_train: Train, tmp_path: Path) -> None:
    import torch

    assert run_train(tmp_path, "--max_iters", "3", "--weight_decay", "0.1") == 0
    assert run_train(tmp_path, "--max_iters", "4", "--weight_decay", "0.3", "--beta2", "0.99") == 0
    groups = torch.load(newest(tmp_path) / "optimizer.bin", weights_only=True)["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(tuple(group["betas"]) == (0.9, 0.99) for group in groups)
    assert all(type(group["lr"]) is float for group in groups)


def test_a_finished_run_has_nothing_to_do(run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_train(tmp_path, "--max_iters", "3") == 0
    before = newest(tmp_path).stat().st_mtime_ns
    assert run_train(tmp_path, "--max_iters", "3") == 0
    assert "Nothing to do: 3 of 3 updates are done" in capsys.readouterr().out
    assert newest(tmp_path).stat().st_mtime_ns == before


def test_resuming_from_a_path_without_a_config_takes_that_runs_own(run_train: Train, dataset: Path, tmp_path: Path) -> None:
    """Also by the name that earlier training programs gave their checkpoints."""
    from accel_pretrain import train

    assert run_train(tmp_path, "--max_iters", "3") == 0
    assert train.main(["--resume_from", str(tmp_path / "checkpoint_iter_3.pt"), "--max_iters", "5"]) == 0
    assert newest(tmp_path).name == "checkpoint_00000005"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("--d_model", "64"), "model.d_model: checkpoint_00000003 has 32, this config says 64"),
        (("--seed", "1"), "training.seed: checkpoint_00000003 has 42, this config says 1"),
        (("--optimizer.name", "sgd"), "optimizer.name: checkpoint_00000003 has adamw, this config says sgd"),
        (("--head_lr_scale", "2"), "optimizer.head_lr_scale: checkpoint_00000003 has 1.0, this config says 2.0"),
        (("--batch_size", "6"), "checkpoint_00000003 has 4 sequences per update, this is 6; type --global_batch_size 4"),
        (("--d_model", "64", "--seed", "1"), "3 problems:"),
        (("--sampling", "random"), "data.sampling: checkpoint_00000003 has shuffle, this config says random"),
        (("--resume_from", "never"), "already holds checkpoint_00000003; type --resume_from auto to go on with it"),
        (("--resume_from", "nowhere"), "nowhere does not exist or is not a checkpoint folder"),
        (("--train_data_path", "OTHER"), "was trained on other tokens"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: tuple[str, ...], message: str
) -> None:
    from tests.running import stdlib_text, write_dataset

    if "OTHER" in overrides:
        text = stdlib_text(5000)
        overrides = ("--train_data_path", str(write_dataset(tmp_path / "other", text[:4000], text[4000:])))
    assert run_train(tmp_path / "run", "--max_iters", "3") == 0
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert run_train(tmp_path / "run", "--max_iters", "5", *overrides) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_going_back_sets_the_newer_checkpoints_aside(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is saved after going back is kept, and is what ``auto`` finds; the other future is not lost either."""
    assert run_train(tmp_path, "--max_iters", "12", "--checkpoint_interval", "2", "--keep_last", "null") == 0
    back = str(tmp_path / "checkpoint_00000004")
    assert run_train(tmp_path, "--max_iters", "6", "--resume_from", back, "--keep_last", "1") == 0
    assert newest(tmp_path).name == "checkpoint_00000006"
    assert newest(tmp_path).is_dir()
    assert sorted(path.name for path in tmp_path.glob("set_aside_*")) == [
        f"set_aside_checkpoint_{step:08d}" for step in (6, 8, 10, 12)
    ]
    assert "set aside checkpoint_00000012, which is newer" in capsys.readouterr().out
    assert run_train(tmp_path, "--max_iters", "7") == 0
    assert "Resuming from" in (out := capsys.readouterr().out)
    assert "checkpoint_00000006" in out
    assert [row["step"] for row in rows(tmp_path) if "train/loss" in row] == list(range(1, 8))


@pytest.mark.parametrize("variable", first_and_slow(["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"]))
def test_a_restart_goes_on_and_only_a_person_goes_back(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """The launcher types the same command again, also when the checkpoint that it names is gone."""
    saving = ("--checkpoint_interval", "2", "--keep_last", "1")
    assert run_train(tmp_path, "--max_iters", "4", "--checkpoint_interval", "2") == 0
    words = ("--resume_from", str(tmp_path / "checkpoint_00000002"))
    monkeypatch.setenv(variable, "1")  # of a start that had done nothing yet
    assert run_train(tmp_path, "--max_iters", "6", *saving, *words) == 0
    assert len(list(tmp_path.glob("set_aside_*"))) == 1
    assert run_train(tmp_path, "--max_iters", "8", *saving, *words) == 0
    assert run_train(tmp_path, "--max_iters", "10", *saving, *words) == 0
    assert not (tmp_path / "checkpoint_00000002").exists()
    from accel_pretrain import train

    assert train.main([*words, "--max_iters", "11"]) == 0  # without a config of its own
    assert newest(tmp_path).name == "checkpoint_00000011"
    assert len(list(tmp_path.glob("set_aside_*"))) == 1
    monkeypatch.delenv(variable)
    assert run_train(tmp_path, "--max_iters", "9", "--resume_from", str(newest(tmp_path))) == 0
    words = ("--resume_from", str(tmp_path / "checkpoint_00000010"))
    for _ in range(2):
        assert run_train(tmp_path, "--max_iters", "11", *words) == 0
    assert len(list(tmp_path.glob("set_aside_*"))) == 3


def test_never_holds_for_a_person_and_not_for_a_restart(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a restart of a start that was refused is refused too: it would go on with a run that was not to be touched."""
    never = ("--resume_from", "never")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    assert run_train(tmp_path, "--max_iters", "2", *never) == 0
    assert run_train(tmp_path, "--max_iters", "3", *never) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_train(tmp_path, "--max_iters", "3", *never) == 0
    said = capsys.readouterr().out
    assert "going on with checkpoint_00000002: an automatic restart of a run" in said
    assert "will not start" not in said
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert run_train(tmp_path, "--max_iters", "4", *never) == 2
    assert "already holds checkpoint_00000003" in capsys.readouterr().err


def test_another_precision_that_nobody_chose_is_told(
    run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where a run moves to a processor that has bf16."""
    told = "changed since checkpoint_00000001: the precision no -> bf16; --mixed_precision no keeps it"
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert run_train(tmp_path, "--max_iters", "1", "--mixed_precision", "null") == 0
    assert run_train(tmp_path, "--max_iters", "1", "--mixed_precision", "null") == 0
    assert "the precision" not in capsys.readouterr().out
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert run_train(tmp_path, "--max_iters", "1", "--mixed_precision", "null") == 0
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("run_id", ["none", "c0ffee"])  # as accelerate launch and torchrun --standalone have it
def test_which_launcher_has_started_a_run_again(monkeypatch: pytest.MonkeyPatch, run_id: str) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert launch() == {"slurm": None, "elastic": None}
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", run_id)
    before = launch()
    assert not is_restart_of(before)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert is_restart_of(before)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert is_restart_of(before) is (run_id != "none")
    assert not is_restart_of({})


def test_a_run_that_began_with_another_runs_checkpoint_goes_on(
    run_train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tmp_path / "one", "--max_iters", "2") == 0
    words = ("--resume_from", str(tmp_path / "one"))
    assert run_train(tmp_path / "two", "--max_iters", "3", *words) == 0
    assert run_train(tmp_path / "two", "--max_iters", "4", *words) == 0
    assert "going on with checkpoint_00000003; this run has begun with" in capsys.readouterr().out
    assert [row["step"] for row in rows(tmp_path / "two") if "train/loss" in row] == [3, 4]
    assert run_train(tmp_path / "three", "--max_iters", "1") == 0
    assert run_train(tmp_path / "three", "--max_iters", "4", *words) == 2  # control: it has begun with nothing
    assert "of another run; type another --checkpoint_dir" in capsys.readouterr().err


def test_a_copy_of_another_name_is_gone_on_from(run_train: Train, tmp_path: Path) -> None:
    import shutil

    assert run_train(tmp_path / "one", "--max_iters", "4", "--checkpoint_interval", "2") == 0
    shutil.copytree(tmp_path / "one" / "checkpoint_00000002", tmp_path / "one" / "my copy")
    assert run_train(tmp_path / "one", "--max_iters", "5", "--resume_from", str(tmp_path / "one" / "my copy")) == 0
    assert (tmp_path / "one" / "set_aside_checkpoint_00000004").is_dir()


def test_going_back_takes_best_back_too(run_train: Train, tmp_path: Path) -> None:
    arguments = ("--eval_interval", "2", "--checkpoint_interval", "2", "--keep_last", "null")
    assert run_train(tmp_path, "--max_iters", "8", *arguments) == 0
    assert (tmp_path / "best").read_text().strip() == "checkpoint_00000008"
    back = str(tmp_path / "checkpoint_00000004")
    assert run_train(tmp_path, "--max_iters", "5", "--lr", "1e-9", "--min_lr", "0", "--resume_from", back, *arguments) == 0
    assert (tmp_path / "best").read_text().strip() in ("checkpoint_00000004", "checkpoint_00000005")


def test_epochs_and_tokens_count_what_a_smaller_batch_has_done(run_train: Train, tmp_path: Path) -> None:
    assert run_train(tmp_path, "--max_tokens", str(10 * 4 * 32)) == 0
    assert run_train(tmp_path, "--max_tokens", str(20 * 4 * 32), "--batch_size", "8", "--allow_batch_change", "true") == 0
    state = json.loads((newest(tmp_path) / "trainer_state.json").read_text())
    assert (state["step"], state["tokens"]) == (15, 20 * 4 * 32)


def test_a_moved_run_goes_on_where_it_is(run_train: Train, tmp_path: Path) -> None:
    from accel_pretrain import train

    assert run_train(tmp_path / "here", "--max_iters", "2") == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert train.main(["--resume_from", str(tmp_path / "there"), "--max_iters", "3"]) == 0
    assert newest(tmp_path / "there").name == "checkpoint_00000003"
    assert not (tmp_path / "here").exists()


def test_a_dataset_is_not_a_checkpoint(
    run_train: Train, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_train(tmp_path, "--max_iters", "2", "--resume_from", str(dataset)) == 2
    assert "its manifest.json is of accel_pretrain.tokens, not of a checkpoint" in capsys.readouterr().err
