"""Windows that begin with documents, and documents that do not see each other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from accel_pretrain import evaluate, lr_find
from accel_pretrain.checkpoint import TrainState
from accel_pretrain.data import TokenBatches, Windows
from accel_pretrain.errors import DataError
from accel_pretrain.loop import Update, train_step
from accel_pretrain.mixture import open_data
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.models import documents as documents_of_models
from accel_pretrain.models.attention import View, attend
from accel_pretrain.packing import packed_begins
from accel_pretrain.run import TrainingRun
from accel_pretrain.shards import Manifest, ShardWriter, open_split, write_manifest
from accel_pretrain.tokenizer import ByteTokenizer
from tests.running import Train, losses, newest, rows, stdlib_text

EOT, V = 0, 50

# ------------------------------------------------------------------------------------------------------------- packing


def begins_by_hand(ids: list[int], T: int) -> list[int]:
    """The rule, token by token."""
    starts = [0, *(i for i, own in enumerate(ids) if own == EOT and 0 < i < len(ids) - 1)]
    at, found = 0, []
    while at + T < len(ids):
        found.append(at)
        begin = max(start for start in starts if start <= at + T)
        at = begin if begin > at else at + T  # cut in a document that began in the window: again from there
    return found


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=25), T=st.integers(1, 12), ended=st.booleans())
def test_windows_begin_where_the_rule_says(lengths: list[int], T: int, ended: bool):
    ids = [token for length in lengths for token in [1] * length + [EOT]] + [1] * (0 if ended else 3)
    ends = np.flatnonzero(np.array(ids) == EOT).astype("<u8") + np.uint64(1)
    begins = packed_begins(len(ids), ends, T)
    assert begins.tolist() == begins_by_hand(ids, T)
    read = np.zeros(len(ids), dtype=bool)
    for begin in begins:
        read[begin : begin + T + 1] = True
    if begins.size:
        assert read[: begins[-1] + T + 1].all()
        assert len(ids) - (begins[-1] + T + 1) <= T or ids[begins[-1] :].count(EOT) > 1


def write_documents(folder: Path, texts: list[str], *, indexed: bool = True) -> Path:
    folder.mkdir(parents=True)
    tokenizer, infos = ByteTokenizer(), []
    for split, some in (("train", texts), ("val", texts[-4:])):
        eot = tokenizer.eot_id if indexed else None
        writer = ShardWriter(folder / f"{split}.bin", split, "uint16", tokenizer.vocab_size, eot)
        for text in some:
            writer.append(tokenizer.encode_document(text), utf8_bytes=len(text.encode()))
        infos.append(writer.close())
    tokenizer.save(folder / "tokenizer")
    about = {key: getattr(tokenizer, key) for key in ("name", "vocab_size", "eot_id", "fingerprint")}
    write_manifest(folder, Manifest(dtype="uint16", tokenizer=about, files=tuple(infos)))
    return folder


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Functions of the standard library, each a document."""
    texts = [f"def {text}" for text in stdlib_text(60_000).split("def ")]
    return write_documents(tmp_path_factory.mktemp("documents") / "data", texts)


@pytest.mark.parametrize("sampling", ["shuffle", "random"])
def test_what_is_read_begins_with_a_document_or_goes_on_with_a_long_one(documents: Path, sampling: Any):
    split, T = open_split(documents, "train"), 256
    packed = TokenBatches(split, context_length=T, batch_size=4, seed=1, packing="bos", sampling=sampling)
    count, eot = packed.samples_per_epoch, ByteTokenizer().eot_id
    read = packed.samples(np.arange(count))
    assert (read[:, 0] == eot).mean() > 0.1
    for start in packed.windows.starts_of(np.arange(count))[1:].tolist():
        before = split.files[0][start - T + 1 : start + 1]
        assert before[-1] == eot or eot not in before
    plain = TokenBatches(split, context_length=T, batch_size=4, seed=1, sampling=sampling).samples(np.arange(count))
    assert (plain[:, 0] == eot).mean() < 0.05  # control
    if sampling == "shuffle":
        again = packed.samples(np.arange(count, 2 * count))
        assert not np.array_equal(again, read)
        assert np.array_equal(np.unique(again, axis=0), np.unique(read, axis=0))


def test_a_mixture_is_packed_part_by_part(documents: Path, tmp_path: Path):
    other = write_documents(tmp_path / "other", ["x" * 40] * 30)
    mixed = open_data((Path(f"{documents}@0.5"), Path(f"{other}@0.5")), "train", mixed=True)
    read = TokenBatches(mixed, context_length=32, batch_size=4, seed=1, packing="bos").samples(np.arange(40))
    assert np.isin(read[1::2], [ord("x"), 256]).all() != np.isin(read[::2], [ord("x"), 256]).all()


def test_without_an_index_of_documents_it_is_refused(tmp_path: Path):
    split = open_split(write_documents(tmp_path / "data", ["a text " * 50], indexed=False), "train")
    assert Windows(split, 32).count == 10
    with pytest.raises(DataError, match=r"it is not known where its documents end.*--packing windows"):
        Windows(split, 32, "bos")


# ------------------------------------------------------------------------------------------------------------- masking

SHAPES: dict[str, dict[str, Any]] = {
    "rope": {},
    "learned": {"position": "learned"},
    "sliding": {"sliding_window": 4, "window_pattern": "SF"},
    "grouped": {"num_kv_heads": 1, "qk_norm": True},
    "soft cap": {"attention_softcap": 20.0},
}


def packed_and_alone(shape: dict[str, Any], document_id: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of windows of documents, and of every document run alone, which begins with its end-of-text id."""
    torch.manual_seed(1)
    config = ModelConfig(d_model=32, num_layers=2, num_heads=2, context_length=24, init_std=0.3, **shape)
    model = Transformer(config.resolved(), V).eval()
    model.document_id = document_id
    tokens_BT = torch.randint(1, V, (3, 24))
    tokens_BT[0, [5, 6, 17]], tokens_BT[1, [0, 12]] = EOT, EOT  # the third is one document, without its beginning
    packed_BTV = model(tokens_BT)
    model.document_id = None
    alone = []
    for row_T in tokens_BT:
        cuts = sorted({0, *torch.nonzero(row_T == EOT).flatten().tolist()})
        parts = [row_T[begin:end] for begin, end in zip(cuts, [*cuts[1:], 24], strict=True)]
        alone.append(torch.cat([model(part.unsqueeze(0))[0] for part in parts]))
    return packed_BTV, torch.stack(alone)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_packed_window_is_its_documents_alone(shape: dict[str, Any]):
    with torch.no_grad():
        packed_BTV, alone_BTV = packed_and_alone(shape, EOT)
        torch.testing.assert_close(packed_BTV, alone_BTV, atol=2e-5, rtol=1e-4)
        targets_BT = torch.randint(0, V, (3, 24))
        nats = [
            torch.nn.functional.cross_entropy(own.transpose(1, 2), targets_BT, reduction="none")
            for own in (packed_BTV, alone_BTV)
        ]
        torch.testing.assert_close(*nats, atol=2e-5, rtol=1e-4)
        control_BTV, _ = packed_and_alone(shape, None)
        torch.testing.assert_close(control_BTV[2], alone_BTV[2], atol=2e-5, rtol=1e-4)
        assert (control_BTV[:2] - alone_BTV[:2]).abs().max() > 0.05


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, 5.0)])
def test_blocks_see_what_the_mask_sees(monkeypatch: pytest.MonkeyPatch, window: int | None, softcap: float | None):
    """What flex attention gets on a GPU, computed here without its kernel."""
    monkeypatch.setattr(documents_of_models, "kernel", lambda: flex_attention)
    torch.manual_seed(1)
    tokens_BT = torch.randint(1, V, (2, 256))
    tokens_BT[0, [3, 140, 141]] = EOT
    begins_BT = documents_of_models.begins_of_documents(tokens_BT, EOT)
    q_BHTE, k_BGTE, v_BGTE = (torch.randn(2, heads, 256, 16) for heads in (4, 2, 2))
    mask = documents_of_models.visible_in_documents(begins_BT, window)
    blocks = documents_of_models.blocks_in_documents(begins_BT, window)
    found = [
        attend(q_BHTE, k_BGTE, v_BGTE, view, scale=0.25, softcap=softcap, dropout=0.0)
        for view in (View(None, None, False, blocks=blocks), View(None, mask, False))
    ]
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)
    control = attend(q_BHTE, k_BGTE, v_BGTE, View(None, None, True), scale=0.25, softcap=softcap, dropout=0.0)
    assert (control - found[0]).abs().max() > 0.1


@pytest.mark.parametrize("begin_id", [EOT, None])
def test_no_gradient_crosses_a_document(begin_id: int | None):
    torch.manual_seed(1)
    model = Transformer(ModelConfig(d_model=32, num_layers=2, num_heads=2, context_length=16).resolved(), V)
    model.document_id = begin_id
    tokens_BT = torch.arange(1, 17).unsqueeze(0)
    tokens_BT[0, 8] = EOT
    embedded: list[Any] = []
    model.embed_tokens.register_forward_hook(lambda *call: embedded.append(call[-1]))
    later = model(tokens_BT)[0, 8:].logsumexp(-1).sum()
    reached = torch.autograd.grad(later, embedded[0])[0][0].abs().sum(dim=1) > 0
    assert reached.tolist() == [begin_id is None] * 8 + [True] * 8


def test_a_range_test_reads_what_the_run_reads(
    documents: Path, run_train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begins: dict[str, list[int]] = {"bos": [], "windows": []}

    def watched(run: TrainingRun, state: TrainState) -> Update | None:
        micro_batches = run.batches.micro_batches(state.samples)
        begins[run.config.data.packing] += torch.cat([batch.ids_BS[:, 0] for batch in micro_batches]).tolist()
        return train_step(run, state)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lr_find, "train_step", watched)
    for packing in begins:
        words = ("--context_length", "128", "--packing", packing)
        assert run_train(tmp_path / "run", "--lr_find", *words, data=documents) == 0
    share = {packing: np.mean(np.array(ids) == ByteTokenizer().eot_id) for packing, ids in begins.items()}
    assert share["bos"] > 0.1 > share["windows"]


def test_a_run_with_both_trains_evaluates_and_goes_on(
    run_train: Train, documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--packing", "bos", "--intra_document_masking", "true", "--max_iters", "6", "--eval_iters", "null")
    for name, others in (("both", words), ("plain", ("--max_iters", "6", "--eval_iters", "null"))):
        assert run_train(tmp_path / name, *others, "--lr", "1e-2", data=documents) == 0
    assert losses(tmp_path / "both") != losses(tmp_path / "plain")
    final = rows(tmp_path / "both")[-1]["final/val_loss"]
    capsys.readouterr()
    assert evaluate.main(["--checkpoint", str(newest(tmp_path / "both")), "--device", "cpu", "--json", "true"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(final, abs=1e-4)
    assert run_train(tmp_path / "both", "--max_iters", "8", "--packing", "bos", data=documents) == 2
    said = capsys.readouterr().err
    assert "data.intra_document_masking: checkpoint_00000006 has True, this config says False" in said
