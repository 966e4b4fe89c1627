"""lm-eval on a model of ours: the same answers as its own adapter gives for the same weights in transformers."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from accel_pretrain.checkpoint import CheckpointConfig, TrainState, write_model_description
from accel_pretrain.config import RunConfig
from accel_pretrain.errors import ConfigError, DataError, PretrainError
from accel_pretrain.evaluate import main
from accel_pretrain.generate import SamplingConfig, generate
from accel_pretrain.harness import Scorer, TasksConfig, as_plain, as_tables, find_tasks, read_wishes, run_tasks, windows
from accel_pretrain.models import ModelConfig, Transformer
from accel_pretrain.publish import publish
from accel_pretrain.tokenizer import GPT2_PATTERN, BpeTokenizer
from accel_pretrain.typed_yaml import to_yaml
from tests.running import REPO, environment, launch, stdlib_text

pytest.importorskip("lm_eval", reason="pip install 'accel_pretrain[eval]'")
transformers = pytest.importorskip("transformers", reason="pip install 'accel_pretrain[hf]'")
pytestmark = []

T = 64
TEXT = stdlib_text(60_000)
END = "<|endoftext|>"


@dataclass(frozen=True)
class Twins:
    """One set of weights and one vocabulary, ours and in transformers; ``stranger`` has other weights."""

    model: Transformer
    stranger: Transformer
    tokenizer: BpeTokenizer
    llama: Any
    their_tokenizer: Any

    def scorer(self, model: Transformer | None = None, batch_size: int = 4) -> Scorer:
        return Scorer(Accelerator(cpu=True), model or self.model, self.tokenizer, batch_size=batch_size, context_length=T)

    @property
    def hflm(self) -> Any:
        """lm-eval's own adapter around the model in transformers."""
        from lm_eval.models import huggingface

        adapter: Any = huggingface.HFLM
        return adapter(pretrained=self.llama, tokenizer=self.their_tokenizer, batch_size=4, device="cpu", max_length=T)


def learn_bpe() -> tuple[BpeTokenizer, Any]:
    """A byte-level vocabulary of 500 and the end of text, as ours and as transformers'."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    theirs.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    theirs.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    )
    shown = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]  # GPT-2 shows these as themselves
    hidden = [byte for byte in range(256) if chr(byte) not in shown]
    byte_of = {character: ord(character) for character in shown} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    ranks = {bytes(byte_of[character] for character in token): id for token, id in theirs.get_vocab().items()}
    theirs.add_special_tokens([END])
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=theirs, eos_token=END, pad_token=END)
    return BpeTokenizer("tiny", ranks, GPT2_PATTERN), wrapped


@pytest.fixture(scope="module")
def twins() -> Twins:
    tokenizer, theirs = learn_bpe()
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=501, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=T, rms_norm_eps=1e-5, initializer_range=0.15,
            bos_token_id=None, eos_token_id=tokenizer.eot_id,
        )
    ).eval()  # fmt: skip
    shape = ModelConfig(context_length=T, d_model=64, num_layers=2, num_heads=4, num_kv_heads=2, d_ff=96, init_std=0.15)
    model, stranger = Transformer(shape, 501).eval(), Transformer(shape, 501).eval()
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in llama.state_dict().items()})
    return Twins(model, stranger, tokenizer, llama, theirs)


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=own, idx=number) for number, own in enumerate(arguments)]  # type: ignore[arg-type]


def pieces(count: int, longest: int) -> list[str]:
    """Cuts from the text, of all lengths, some of which end or begin with spaces."""
    draw = random.Random(count)
    begins = [draw.randrange(len(TEXT) - longest) for _ in range(count)]
    return [TEXT[begin : begin + draw.randrange(1, longest)] for begin in begins]


def greedy(twins: Twins, context: str, tokens: int = 3) -> str:
    ids = twins.tokenizer.encode(context).tolist()[-T // 2 :]
    return twins.tokenizer.decode(generate(twins.model, ids, SamplingConfig(max_new_tokens=tokens, temperature=0)))


def question_pairs(twins: Twins) -> list[tuple[str, str]]:
    """Contexts with continuations: too long for the model, ending in spaces, empty, alike, and as the model goes on itself."""
    contexts = [context if context.strip() else "def" for context in pieces(40, 400)]
    pairs = list(zip(contexts, (piece[:50] for piece in pieces(40, 60)), strict=True))
    pairs += [(context + "  ", continuation) for context, continuation in pairs[:8]]
    pairs += [("", continuation) for _, continuation in pairs[:8]]
    pairs += [(contexts[0], choice) for choice in (" A", " B", " C", " D")]
    own = [(context.rstrip()[-90:], greedy(twins, context.rstrip()[-90:])) for context in contexts]
    tokenizer = twins.tokenizer
    return pairs + [
        (context, continuation)
        for context, continuation in own
        if tokenizer.encode(context + continuation).size == tokenizer.encode(context).size + 3 and "�" not in continuation
    ]


# ------------------------------------------------------------------------------------------------------ against lm-eval


def test_loglikelihoods_are_those_of_transformers(twins: Twins):
    pairs = question_pairs(twins)
    theirs = twins.hflm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for batch_size in (1, 5, 64):
        ours = twins.scorer(batch_size=batch_size).loglikelihood(pairs)
        assert [nats for nats, _ in ours] == pytest.approx([nats for nats, _ in theirs], abs=1e-4)
        assert [likeliest for _, likeliest in ours] == [likeliest for _, likeliest in theirs]
    assert {likeliest for _, likeliest in theirs} == {True, False}
    other = twins.scorer(twins.stranger).loglikelihood(pairs)
    assert all(abs(one[0] - two[0]) > 1e-4 for one, two in zip(other, theirs, strict=True))


def test_whole_texts_are_those_of_transformers(twins: Twins):
    texts = [TEXT[:n] for n in (1, 50, 120, 300, 1500)] + pieces(6, 700)
    theirs = twins.hflm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    ours = twins.scorer().loglikelihood_rolling(texts)
    tokens = [twins.tokenizer.encode(text).size for text in texts]
    assert max(tokens) > 5 * T
    assert all(abs(one - two) < 1e-4 * max(1, n / T) for one, two, n in zip(ours, theirs, tokens, strict=True))
    other = twins.scorer(twins.stranger).loglikelihood_rolling(texts)
    assert all(abs(one - two) > 1e-2 for one, two in zip(other, theirs, strict=True))
    assert twins.scorer().loglikelihood_rolling([""]) == [0.0]


def test_continuations_are_those_of_transformers(twins: Twins):
    contexts = [piece if piece.strip() else "def" for piece in pieces(30, 300)]
    stops = [[greedy(twins, context, 12)[5:8]] for context in contexts[:10]]  # something that will come up
    wishes = [{"until": until, "max_gen_toks": 24, "do_sample": False} for until in (*stops, *[["\n\n", ":"]] * 20)]
    requests = list(zip(contexts, wishes, strict=True))
    # One at a time: in a batch theirs writes on past the stop string of the one until all the others have theirs.
    theirs = [twins.hflm.generate_until(instances("generate_until", [own]), disable_tqdm=True)[0] for own in requests]
    ours = twins.scorer().generate_until(requests)
    assert ours == theirs
    assert sum(len(text) > 10 for text in ours) > 10
    assert any(stop and stop in greedy(twins, context, 12) for [stop], context in zip(stops, contexts, strict=False))
    assert twins.scorer(twins.stranger).generate_until(requests) != theirs


def test_windows_are_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for count in range(1, 40):
        ids = list(range(1, count + 1))
        theirs = get_rolling_token_windows(token_list=ids, prefix_token=0, max_seq_len=7, context_len=1)
        expected = [((*context, *predicted), len(predicted)) for context, predicted in map(make_disjoint_window, theirs)]
        ours = list(windows([0], ids, 7))
        assert ours == expected
        assert [id for own, predicted in ours for id in own[-predicted:]] == ids
    assert list(windows(range(10), [10, 11], 4)) == [((7, 8, 9, 10, 11), 2)]


def test_a_first_token_of_the_models_own_comes_before_texts_as_in_lm_eval(twins: Twins):
    """Where there is one; else the end of a text, as in all the tests above."""
    tokenizer, theirs = copy.copy(twins.tokenizer), copy.deepcopy(twins.their_tokenizer)
    tokenizer.bos_id = 66
    theirs.bos_token = theirs.convert_ids_to_tokens(66)
    ours, other = replace(twins, tokenizer=tokenizer, their_tokenizer=theirs), twins.scorer()
    pairs, texts = [("", "import this"), (" ", "x"), ("import", " this")], [TEXT[:40], TEXT[:900]]
    scorer, adapter = ours.scorer(), ours.hflm
    assert adapter.prefix_token_id == scorer.prefix_id == 66
    found = [nats for nats, _ in scorer.loglikelihood(pairs)]
    expected = adapter.loglikelihood(instances("loglikelihood", pairs[::2]), disable_tqdm=True)
    assert found[::2] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    without = [nats for nats, _ in other.loglikelihood(pairs)]
    assert [abs(one - two) > 1e-4 for one, two in zip(found, without, strict=True)] == [True, True, False]
    whole = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    assert scorer.loglikelihood_rolling(texts) == pytest.approx(whole, abs=1e-2)
    assert other.loglikelihood_rolling(texts) != pytest.approx(whole, abs=1e-2)
    wish = {"until": [], "max_gen_toks": 4}
    assert scorer.generate_until([("", wish)]) == scorer.generate_until([(tokenizer.decode([66]), wish)])


# ------------------------------------------------------------------------------------------------- what lm-eval does not do


def test_a_continuation_longer_than_the_context_is_predicted_whole(twins: Twins):
    """There lm-eval's own adapter fails an assertion."""
    [(nats, _)] = twins.scorer().loglikelihood([("import", TEXT[:900])])
    context_ids, ids = twins.scorer().encode_pair("import", TEXT[:900])
    assert len(ids) > 3 * T
    with torch.no_grad():
        expected = 0.0
        for own, predicted in windows(context_ids, ids, T):
            logits_TV = twins.model(torch.tensor([own[:-1]]))[0, -predicted:].double()
            expected += float(logits_TV.log_softmax(dim=1).gather(1, torch.tensor(own[-predicted:])[:, None]).sum())
    assert nats == pytest.approx(expected, abs=1e-2)
    assert nats < twins.scorer().loglikelihood([("import", TEXT[:200])])[0][0]


def test_more_new_tokens_than_the_context_cost_one_warning(twins: Twins, caplog: pytest.LogCaptureFixture):
    requests = [(TEXT[:500], {"until": [], "max_gen_toks": 2 * T}), (TEXT[500:600], {"until": None})]
    texts = twins.scorer().generate_until(requests)
    assert len(twins.tokenizer.encode(texts[0])) > T
    [warning] = [record.getMessage() for record in caplog.records if record.name == "accel_pretrain.harness"]
    assert warning.startswith("a task wants 128 new tokens of a model with a context of 64: it sees the last 32 of a prompt, ")


def test_draws_differ_between_requests_and_not_between_runs(twins: Twins):
    requests = [("def ", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 3
    texts = twins.scorer().generate_until(requests)
    assert len(set(texts)) == 3
    assert twins.scorer(batch_size=1).generate_until(requests) == texts


def test_logits_that_are_not_finite_are_named(twins: Twins):
    broken = Transformer(twins.model.config, 501).eval()
    broken.load_state_dict(twins.model.state_dict())
    broken.output_matrix.data.fill_(torch.nan)
    with pytest.raises(PretrainError, match="logits are not finite"):
        twins.scorer(broken).loglikelihood([("a", " b")])


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ({}, (256, 0.0, None, None, [])),
        ({"until": "\n", "max_gen_toks": 5}, (5, 0.0, None, None, ["\n"])),
        ({"until": ["é", ""], "max_new_tokens": 7, "max_gen_toks": 6}, (6, 0.0, None, None, ["é"])),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, (256, 0.0, None, None, [])),
        ({"do_sample": True}, (256, 1.0, None, None, [])),
        ({"temperature": 0.2, "top_p": 0.95, "top_k": 40}, (256, 0.2, 40, 0.95, [])),
        ({"do_sample": True, "temperature": 0}, (256, 0.0, None, None, [])),
    ],
)
def test_what_a_task_may_wish(wishes: dict[str, Any], expected: tuple[Any, ...]):
    sampling, stops = read_wishes(wishes, 0)
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_k, sampling.top_p, stops) == expected


def test_what_a_task_may_not_wish():
    with pytest.raises(DataError, match="that are not known here: num_beams, length_penalty;"):
        read_wishes({"num_beams": 4, "length_penalty": 1.0, "until": ["\n"]}, 0)


# ---------------------------------------------------------------------------------------------------------- whole tasks

CHOICE = """
task: tiny_choice
output_type: multiple_choice
fewshot_split: train
doc_to_text: "{{question}} ->"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc, aggregation: mean}, {metric: acc_norm, aggregation: mean}]
"""
LAST = """
task: tiny_last
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: perplexity, aggregation: perplexity}, {metric: acc, aggregation: mean}]
"""
WHOLE = """
task: tiny_whole
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WRITE = """
task: tiny_write
output_type: generate_until
num_fewshot: 0
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["("], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean}]
"""
NAMES = ("tiny_choice", "tiny_last", "tiny_whole", "tiny_write")


@pytest.fixture(scope="module")
def folder(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks of 13 questions, each as files."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    for split in ("train", "test"):
        rows = []
        for number, question in enumerate(TEXT[draw.randrange(50_000) :][:120] for _ in range(13)):
            choices = [" " + TEXT[draw.randrange(50_000) :][: draw.randrange(1, 9)].strip() + "." for _ in range(3)]
            answer = greedy(twins, question, 8).partition("(")[0] if number % 3 == 0 else "something else"
            rows.append({"question": question, "choices": choices, "label": number % 3, "answer": answer})
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = json.dumps({"data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")}})
    for name, text in zip(NAMES, (CHOICE, LAST, WHOLE, WRITE), strict=True):
        (folder / f"{name}.yaml").write_text(f"{text}dataset_path: json\ndataset_kwargs: {files}\ntest_split: test\n")
    missing = json.dumps({"data_files": {"test": str(folder / "nowhere.jsonl")}})
    (folder / "broken.yaml").write_text(
        f"{LAST.replace('tiny_last', 'broken_last')}dataset_path: json\ndataset_kwargs: {missing}\ntest_split: test\n"
    )
    return folder


@pytest.fixture
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval would fork a process with threads to resample 13 numbers


@pytest.fixture(scope="module")
def run_dir(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model is the twins'."""
    run_dir = tmp_path_factory.mktemp("run")
    config = RunConfig(model=twins.model.config, checkpoint=CheckpointConfig(checkpoint_dir=run_dir))

    def write_extras(checkpoint: Path) -> None:
        (checkpoint / "config.yaml").write_text(to_yaml(config))
        write_model_description(checkpoint, twins.model.config, 501)
        twins.tokenizer.save(checkpoint / "tokenizer")

    accelerator = Accelerator(cpu=True)
    accelerator.prepare(twins.model, torch.optim.SGD(twins.model.parameters(), lr=0.1))
    publish(accelerator, run_dir, TrainState(step=3), facts={}, write_extras=write_extras)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return run_dir


def config_for(folder: Path, *names: str, **others: Any) -> TasksConfig:
    return TasksConfig(tasks=names or NAMES, task_path=folder, num_fewshot=2, bootstrap_iters=50, **others)


def plain_of(results: Any) -> dict[str, Any]:
    assert results is not None
    return as_plain(results)


@pytest.mark.usefixtures("_offline")
def test_results_are_those_of_lm_evals_own_adapter(twins: Twins, folder: Path, capsys: pytest.CaptureFixture[str]):
    from lm_eval.evaluator import simple_evaluate

    found = find_tasks(config_for(folder))
    theirs = plain_of(
        simple_evaluate(twins.hflm, tasks=found.names, task_manager=found.manager, num_fewshot=2, bootstrap_iters=50)
    )
    assert "bootstrapping" in capsys.readouterr().out
    results = run_tasks(found, twins.scorer(), config_for(folder))
    ours = plain_of(results)
    assert set(ours["results"]) == set(NAMES)
    assert ours["n-shot"]["tiny_choice"] == 2
    assert close(ours, theirs)
    right = [ours["results"][task][f"{how},none"] for task, how in (("tiny_write", "exact_match"), ("tiny_choice", "acc"))]
    assert any(0 < share < 1 for share in right), "what is compared is not all alike"
    assert not close(plain_of(run_tasks(found, twins.scorer(twins.stranger), config_for(folder))), theirs)
    assert "|tiny_whole |" in as_tables(results or {})
    assert capsys.readouterr().out == ""


def close(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(value, other[key]) for key, value in one.items())
    return one == pytest.approx(other, rel=1e-5) if isinstance(one, float) else one == other


def evaluated(folder: Path, run_dir: Path, cache: Path, processes: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The program itself, with no network to ask."""
    options = ["--checkpoint", str(run_dir), "--tasks", ",".join(NAMES), "--task_path", str(folder), "--num_fewshot", "2"]
    return subprocess.run(
        launch([*options, "--bootstrap_iters", "50", "--batch_size", "3", "--device", "cpu", *words], processes,
               "accel_pretrain.evaluate"),
        env=environment(HF_HOME=str(cache), HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", OMP_NUM_THREADS="1"),
        cwd=REPO, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(twins: Twins, folder: Path, run_dir: Path, tmp_path: Path):
    one, two = (evaluated(folder, run_dir, tmp_path, processes, "--json") for processes in (1, 2))
    assert (one.returncode, two.returncode) == (0, 0), one.stderr + two.stderr
    of_one, of_two = json.loads(one.stdout), json.loads(two.stdout)
    assert (of_one["processes"], of_two["processes"], of_one["step"]) == (1, 2, 3)
    assert of_one["tasks"] == of_two["tasks"]
    assert "loss" not in of_one


@pytest.mark.usefixtures("_offline")
def test_people_get_tables_and_a_limit_is_another_number(folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    words = ["--checkpoint", str(run_dir), "--tasks", "tiny_whole,tiny_choice", "--task_path", str(folder), "--device", "cpu"]
    shown = []
    for limit in ("null", "5"):
        assert main([*words, "--limit", limit]) == 0
        shown.append(capsys.readouterr().out)
        assert shown[-1].startswith("Checkpoint ")
        assert [line.split("|")[1].strip() for line in shown[-1].splitlines() if "|none  |" in line][:2] == ["tiny_choice", ""]
        AcceleratorState._reset_state(True)
    assert shown[0] != shown[1]


@pytest.mark.usefixtures("_offline")
def test_tasks_and_tokens_in_one_call(folder: Path, run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ids = torch.arange(400, dtype=torch.int64).numpy().astype("<u2") % 500
    ids.tofile(tmp_path / "val.bin")
    words = ["--tasks", "tiny_last", "--task_path", str(folder), "--bootstrap_iters", "0", "--device", "cpu", "--json"]
    assert main(["--checkpoint", str(run_dir), "--data", str(tmp_path / "val.bin"), *words]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["tokens"] == 6 * T
    assert document["tasks"]["results"]["tiny_last"]["perplexity,none"] > 1


@pytest.mark.usefixtures("_offline")
def test_what_cannot_be_run_is_one_line(folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    good = ["--checkpoint", str(run_dir), "--task_path", str(folder), "--device", "cpu"]
    cases = {
        ("--tasks", "tiny_wohle"): "harness.tasks: there is no task tiny_wohle; did you mean tiny_whole",
        ("--tasks", "broken_last"): "harness.tasks: broken_last cannot be loaded: FileNotFoundError",
        ("--tasks", "tiny_last", "--task_path", str(folder / "none")): "none is not a folder",
        ("--tasks", "tiny_last", "--xz"): "measure.xz: about tokens, add --data DIR",
        ("--tasks", "tiny_last", "--num_fewshot", "-1"): "harness.num_fewshot: must not be negative",
        ("--tasks", "tiny_last", "--limit", "0"): "harness.limit: must be positive",
        ("--tasks", "tiny_last", "--tokenizer", "bytes"): "holds its own, which is another one; leave --tokenizer out",
    }
    for words, expected in cases.items():
        with pytest.raises(SystemExit) as stop:
            main([*good, *words])
        out, err = capsys.readouterr()
        assert (stop.value.code, out) == (2, "")
        assert expected in err
        assert err.count("\n") == 1
        AcceleratorState._reset_state(True)


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError) as caught:
        find_tasks(TasksConfig(tasks=("hellaswag",)))
    assert caught.value.message.endswith("not installed; type: pip install 'accel_pretrain[eval]'")
