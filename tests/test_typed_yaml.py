"""What somebody wrote becomes the value they meant, or one exact message. Text in, value or message out."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accel_pretrain.checkpoint import CheckpointConfig
from accel_pretrain.config import RunConfig
from accel_pretrain.data import DataConfig
from accel_pretrain.errors import ConfigError
from accel_pretrain.models import ModelConfig
from accel_pretrain.optim import SGD, AdamW, Muon
from accel_pretrain.runtime import TrainingConfig
from accel_pretrain.schedule import Constant, Cosine, InverseSqrt, Linear, WarmupStableDecay
from accel_pretrain.trackers import LoggingConfig
from accel_pretrain.typed_yaml import Entry, from_mapping, leaves, load, option, parse_command_line, reference, section, to_yaml
from accel_pretrain.validation import EvaluationConfig


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """One field of every type that a config may have."""

    whole: int = option(0, "")
    number: float = option(0.0, "")
    switch: bool = option(False, "")
    text: str = option("-", "")
    path: Path = option(Path(), "")
    maybe: int | None = option(-1, "")
    maybe_text: str | None = option("-", "")
    choice: Literal["One", "two"] = option("One", "")
    words: tuple[str, ...] = option(("-",), "")
    numbers: tuple[float, ...] = option((), "")


@dataclass(frozen=True, kw_only=True)
class Toy:
    kinds: Kinds = section(Kinds, "")


def written(folder: Path, text: str | bytes, name: str = "config.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def from_argv(*words: str, cls: type[Any] = RunConfig) -> Any:
    line = parse_command_line(cls, words)
    return load(cls, line.config, line.overrides)


def message(call: Callable[..., Any], *arguments: Any, **named: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **named)
    return caught.value.message


# --------------------------------------------------------------------------------------------------------- text to values

HUGE = "1" + "0" * 400
VALUES = [
    ("whole", "1e9", 1_000_000_000), ("whole", "1_000", 1000), ("whole", "010", 10), ("whole", "-3", -3), ("whole", "2.0", 2),
    ("number", "6e-4", 6e-4), ("number", "6.0e-4", 6e-4), ("number", "1e9", 1e9), ("number", ".5", 0.5), ("number", "-1", -1.0),
    ("number", "010", 10.0), ("number", "1_000", 1000.0), ("number", "3", 3.0),
    ("switch", "true", True), ("switch", "True", True), ("switch", "TRUE", True), ("switch", "false", False),
    ("text", "null", "null"), ("text", "yes", "yes"), ("text", "010", "010"), ("text", "12:30", "12:30"), ("text", "", ""),
    ("path", "a b/c", Path("a b/c")), ("path", "~/x", Path.home() / "x"), ("path", "~nobody-here/x", Path("~nobody-here/x")),
    ("maybe", "null", None), ("maybe", "None", None), ("maybe", "~", None), ("maybe", "", None), ("maybe", "NULL", None),
    ("maybe", "0", 0), ("maybe_text", "none", None), ("maybe_text", "nothing", "nothing"),
    ("choice", "one", "One"), ("choice", "TWO", "two"),
    ("words", "a,b", ("a", "b")), ("words", "[a, b]", ("a", "b")), ("words", "a , b", ("a", "b")), ("words", "a", ("a",)),
    ("words", "[]", ()), ("words", "", ()), ("words", "null", ()), ("words", "none", ()),
    ("numbers", "1e-3, 2", (0.001, 2.0)), ("numbers", "[1e-3, 2]", (0.001, 2.0)),
]  # fmt: skip
MISTAKES = [
    ("whole", "12:30", "a whole number"), ("whole", "1.5", "a whole number"), ("whole", "0x10", "a whole number"),
    ("whole", "true", "a whole number"), ("whole", "null", "a whole number"), ("whole", "", "a whole number"),
    ("whole", "1e400", "a whole number"), ("whole", "1__0", "a whole number"), ("whole", "9" * 5000, "a whole number"),
    ("number", "six", "a number"), ("number", "inf", "a number"), ("number", ".nan", "a number"), ("number", HUGE, "a number"),
    ("number", "1e400", "a number"), ("number", "12:30", "a number"), ("number", "", "a number"), ("number", "1,5", "a number"),
    ("switch", "yes", "true or false"), ("switch", "on", "true or false"), ("switch", "1", "true or false"),
    ("switch", "null", "true or false"), ("path", "", "a path"), ("maybe", "x", "a whole number or null"),
    ("choice", "three", "One | two"), ("numbers", "1, x", "a number"), ("words", "[a, [b]]", "text"),
    ("words", "[" * 3000, "a list of text"), ("words", '["\\UFFFFFFFF"]', "a list of text"), ("words", "[a", "a list of text"),
]  # fmt: skip


def short(value: object) -> str:
    return str(value)[:20]


@pytest.mark.parametrize(("key", "text", "value"), VALUES, ids=short)
def test_text_becomes_its_value_in_a_file_and_on_the_command_line(tmp_path: Path, key: str, text: str, value: Any):
    from_file = load(Toy, written(tmp_path, f"kinds:\n  {key}: {text}\n"))
    for config in (from_file, from_argv(f"--{key}={text}", cls=Toy), from_argv(f"--kinds.{key}", text, cls=Toy)):
        found = getattr(config.kinds, key)
        assert found == (None if value == "~" else value)
        assert type(found) is type(value)


@pytest.mark.parametrize(("key", "text", "expected"), MISTAKES, ids=short)
def test_text_of_the_wrong_type_is_refused_with_what_was_expected(key: str, text: str, expected: str):
    found = message(from_argv, f"--{key}={text}", cls=Toy)
    assert found.startswith(f"kinds.{key}: expected {expected}, got '")
    assert len(found) < 200  # however long the text was


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ('switch: "true"', "switch", True),
        ("switch: 'False'", "switch", False),
        ('whole: "12"', "whole", 12),
        ("number: '6e-4'", "number", 6e-4),
        ("text: on", "text", "on"),
        ("text: 0123", "text", "0123"),
        ("text: 2024-01-01", "text", "2024-01-01"),
        ('text: " a "', "text", " a "),
        ("maybe:", "maybe", None),
        ("words:\n    - a\n    - 1", "words", ("a", "1")),
        ("words: [null, 'b,c']", "words", ("null", "b,c")),
        ("whole: &n 3\n  maybe: *n", "maybe", 3),
    ],
)
def test_yaml_spellings(tmp_path: Path, line: str, field: str, value: Any):
    assert getattr(load(Toy, written(tmp_path, f"kinds:\n  {line}")).kinds, field) == value


@pytest.mark.parametrize(
    ("document", "field", "value"),
    [
        ({"whole": 1e9}, "whole", 1_000_000_000),
        ({"number": 3}, "number", 3.0),
        ({"number": "6e-4"}, "number", 6e-4),
        ({"switch": True}, "switch", True),
        ({"maybe": None}, "maybe", None),
        ({"text": 5}, "text", "5"),
        ({"words": ["a", "b"]}, "words", ("a", "b")),
        ({"words": None}, "words", ()),
    ],
)
def test_json_values(tmp_path: Path, document: Any, field: str, value: Any):
    found = getattr(load(Toy, written(tmp_path, json.dumps({"kinds": document}), "c.json")).kinds, field)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"whole": True}, "kinds.whole: expected a whole number, got True"),
        ({"number": None}, "kinds.number: expected a number, got None"),
        ({"number": math.nan}, "kinds.number: expected a number, got nan"),
        ({"switch": 1}, "kinds.switch: expected true or false, got 1"),
        ({"maybe": [1]}, "kinds.maybe: expected a whole number or null, got [1]"),
        ({"whole": {"a": 1}}, "kinds.whole: expected a whole number, got {'a': 1}"),
        ({"text": None}, "kinds.text: expected text, got None"),
    ],
)
def test_json_values_of_the_wrong_type(tmp_path: Path, document: Any, problem: str):
    path = written(tmp_path, json.dumps({"kinds": document}), "c.json")
    assert message(load, Toy, path) == f"{path}: {problem}"


# ------------------------------------------------------------------------------------------------------------------ files


def test_missing_file_is_named_with_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert message(from_argv, "--config", "no.yaml") == f"--config no.yaml: {tmp_path}/no.yaml does not exist"
    assert message(from_argv, "--config", ".") == f"--config .: {tmp_path} is a directory, not a config file"
    assert "does not exist" in message(from_argv, "--config", "~nobody-here/c.yaml")
    assert "does not exist" in message(from_argv, "--config", "x" * 5000)


@pytest.mark.parametrize("text", ["", "\n", "# only a comment\n", "---\n", "training:\n", "training: {}\n"])
def test_file_that_says_nothing_gives_the_defaults(tmp_path: Path, text: str):
    assert load(RunConfig, written(tmp_path, text)) == RunConfig()


# Eight lists that hold the one before nine times each: a hundred million words, were they written out.
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{own}: &{own} [{','.join([f'*{before}'] * 9)}]\n" for before, own in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("c.yaml", b"\xff\xfe\x00\x01binary", "not UTF-8 text"),
        ("c.yaml", b"a: \x00\x01", "unacceptable character #x0000: special characters are not allowed"),
        ("c.yaml", "x: " + "y" * (64 << 10), "larger than 64 KiB, so not a config file"),
        ("c.yaml", "training: " + "[" * 3000, "nested too deeply"),
        ("c.yaml", "training: " + "{a: " * 3000, "nested too deeply"),
        ("c.json", '{"training": ' + "[" * 60_000, "nested too deeply"),
        ("c.yaml", "training:\n\tbatch_size: 3", "line 2: found character '\\t' that cannot start any token"),
        ("c.yaml", "training:\n  lr 3\n  a: b", "line 3: mapping values are not allowed here"),
        ("c.yaml", "- a\n- b", "expected keys and values, found ['a', 'b']"),
        ("c.yaml", "just words", "expected keys and values, found 'just words'"),
        ("c.yaml", "a: 1\n---\nb: 2", "line 2: but found another document"),
        ("c.yaml", "? [a]\n: b", "line 1: found unhashable key"),
        ("c.yaml", "a: &a [*a]", "line 1: found unconstructable recursive node"),
        ("c.yaml", "a: *b", "line 1: found undefined alias 'b'"),
        ("c.yaml", 'a: "\\UFFFFFFFF"', "a character or a number is out of range"),
        ("c.yaml", BOMB + "? *i\n: 1", "line 9: found unhashable key"),
        ("c.json", "", "Expecting value: line 1 column 1 (char 0)"),
        ("c.json", "{'a': 1}", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("c.yaml", "training:\n  batch_size: 1\n  batch_size: 2", "line 3: the key 'batch_size' stands twice"),
        ("c.yaml", "training: {}\n'training': {}", "line 2: the key 'training' stands twice"),
        ("c.json", '{"training": {"seed": 1, "seed": 1}}', "the key 'seed' stands twice"),
        ("c.yaml", "optimizer: {lr: 1}\nlearning_rate: 2", "optimizer.lr is given twice (once as 'learning_rate')"),
        ("c.yaml", "training: 5", "training is a section and holds keys, found '5'"),
        ("c.yaml", "training: {batch_size: {a: 1}}", "training.batch_size: expected a whole number, got {'a': '1'}"),
    ],
    ids=short,
)
def test_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, text: str | bytes, reason: str):
    path = written(tmp_path, text, name)
    begin = time.perf_counter()
    assert message(load, RunConfig, path).startswith(f"{path}: {reason}")
    assert time.perf_counter() - begin < 10


def test_aliases_that_multiply_are_refused_without_being_written_out(tmp_path: Path):
    path = written(tmp_path, f"{BOMB}model: {{vocab_size: *i}}\noptimizer: {{name: *i}}\nlogging: {{trackers: *i}}\n")
    begin = time.perf_counter()
    found = message(load, RunConfig, path)
    assert "model.vocab_size: expected a whole number or null, got [[" in found
    assert "optimizer.name: expected adamw" in found
    assert time.perf_counter() - begin < 10


def test_all_problems_come_in_one_report(tmp_path: Path):
    text = "training: {batch_size: x, seed: -1}\nmodle: {d_model: 1}\nschedule: {name: cosin}\nmodel: {num_heads: 7}\nlr: 0\n"
    path = written(tmp_path, text)
    line = parse_command_line(RunConfig, ["--log_interval", "often"])
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, path, line.overrides)
    assert set(caught.value.problems) == {
        "logging.log_interval: expected a whole number, got 'often'",
        "model.num_heads: 7 heads do not divide d_model 512; try --num_heads 8",
        "optimizer.lr: must be positive, got 0.0",
        "schedule.name: expected cosine | linear | wsd | inverse_sqrt | constant, got 'cosin'",
        f"{path}: modle: there is no such key; did you mean model.d_model?",
        f"{path}: training.batch_size: expected a whole number, got 'x'",
    }


def test_all_problems_of_a_command_line_come_in_one_report():
    with pytest.raises(ConfigError) as caught:
        parse_command_line(RunConfig, ["--bogus_key", "1", "stray", "--seed", "--lr", "1", "--max_iters"])
    assert [problem.split(":")[0] for problem in caught.value.problems] == ["bogus_key", "stray", "--seed", "--max_iters"]


# --------------------------------------------------------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("trianing.batch_size", "training.batch_size"),
        ("training.batchsize", "training.batch_size"),
        ("training.lr", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("batchsize", "training.batch_size"),
        ("num_layer", "model.num_layers"),
        ("warmup", "schedule.warmup_iters"),
        ("wandb", "logging.use_wandb"),
        ("momentun", "optimizer.momentum"),
    ],
)
@pytest.mark.parametrize("form", ["--{} 1", "--{}=1", "{}=1"])
def test_unknown_key_suggests_the_nearest_known_one(key: str, nearest: str, form: str):
    found = message(from_argv, *form.format(key).split())
    assert found == f"{key}: there is no such key; did you mean {nearest}?"


def test_key_that_resembles_nothing_lists_the_sections():
    sections = "checkpoint, data, debug, evaluation, logging, model, optimizer, parallel, schedule, training"
    assert message(from_argv, "--qqqq", "1") == f"qqqq: there is no such key; the sections are {sections}"
    assert message(from_argv, "--" + "q" * 7000, "1") == f"{'q' * 100}...: there is no such key; the sections are {sections}"


def test_words_that_are_no_overrides_are_refused_unless_they_are_wanted():
    refused = "a.txt: an override is written --section.key VALUE or section.key=VALUE"
    assert message(parse_command_line, RunConfig, ["a.txt"]) == refused
    assert parse_command_line(RunConfig, ["a.txt", "b=c.txt", "-"], positionals=True).positionals == ("a.txt", "b=c.txt", "-")


@pytest.mark.parametrize(
    "words",
    [
        "--training.batch_size 128", "--training.batch_size=128", "training.batch_size=128", "--batch_size 128",
        "--batch_size=128", "batch_size=128", "--batch-size 128", "--training.batch-size=128",
    ],
)  # fmt: skip
def test_every_form_of_an_override(words: str):
    assert from_argv(*words.split()) == RunConfig(training=TrainingConfig(batch_size=128))


@pytest.mark.parametrize(
    "words",
    ["--use_wandb", "--use-wandb", "--use_wandb true", "--use_wandb=True", "use_wandb=true", "--logging.use_wandb --lr 6e-4"],
)
def test_every_form_of_a_flag(words: str):
    assert from_argv(*words.split()).logging.use_wandb is True
    assert from_argv("--use_wandb", "false").logging.use_wandb is False


def test_flag_does_not_swallow_the_next_word():
    line = parse_command_line(RunConfig, ["--use_wandb", "text.txt"], positionals=True)
    assert line.positionals == ("text.txt",)
    assert [(key, entry.raw) for key, entry in line.overrides] == [("logging.use_wandb", "true")]


@pytest.mark.parametrize(("words", "lr"), [("--lr -1", "-1.0"), ("--lr=-1e-3", "-0.001"), ("lr=-1", "-1.0")])
def test_negative_number_is_a_value_and_not_an_option(words: str, lr: str):
    assert message(from_argv, *words.split()) == f"optimizer.lr: must be positive, got {lr}"


def test_value_may_be_empty_hold_equals_signs_or_begin_with_dashes():
    config = from_argv("--sample_prompt=--a=b", "--wandb_run_name", "", "--wandb_project=")
    assert (config.logging.sample_prompt, config.logging.wandb_run_name, config.logging.wandb_project) == ("--a=b", None, "")


def test_bare_leaf_that_several_sections_have_goes_where_its_value_fits():
    assert from_argv("--dtype", "bfloat16").training.mixed_precision == "bfloat16"
    assert from_argv("--dtype", "bfloat16").data.dtype is None
    assert from_argv("--dtype", "uint16").data.dtype == "uint16"
    assert from_argv("--dtype", "uint16").training.mixed_precision is None
    assert from_argv("--name", "sgd").optimizer == SGD()
    assert message(from_argv, "--name", "x") == "name: several keys end so; write one of optimizer.name, schedule.name"
    expected = "dtype: several keys end so; write one of data.dtype, training.mixed_precision"
    assert message(from_argv, "--dtype", "float8") == expected
    assert message(from_argv, "--dtype", "null") == expected


def test_other_names_of_a_key_stand_alone(tmp_path: Path):
    path = written(tmp_path, "learning_rate: 1e-4\nblock_size: 128\nn_layer: 2\nwarmup_steps: 7\n")
    config = load(RunConfig, path)
    found = config.optimizer.lr, config.model.context_length, config.model.num_layers, config.schedule.warmup_iters
    assert found == (1e-4, 128, 2, 7)


def test_flat_json_config(tmp_path: Path):
    document = {
        "learning_rate": 1e-4, "max_iters": 150000, "warmup_steps": 1000, "min_lr": 5e-5, "eval_iters": 500, "batch_size": 32,
        "block_size": 128, "gradient_accumulation_steps": 32, "device": "cpu", "dtype": "bfloat16",
    }  # fmt: skip
    config = load(RunConfig, written(tmp_path, json.dumps(document), "training.json"))
    assert config == RunConfig(
        model=ModelConfig(context_length=128),
        optimizer=AdamW(lr=1e-4),
        schedule=Cosine(warmup_iters=1000, min_lr=5e-5),
        training=TrainingConfig(
            batch_size=32, max_iters=150000, gradient_accumulation_steps=32, device="cpu", mixed_precision="bfloat16"
        ),
        evaluation=EvaluationConfig(eval_iters=500),
    )


def test_flat_command_line():
    words = (
        "--train_data_path data/t.ids --val_data_path data/v.ids --vocab_size 10000 --context_length 512 --d_model 768 "
        "--num_heads 12 --d_ff 3072 --num_layers 12 --lr 3e-4 --min_lr 3e-5 --weight_decay 0.1 --batch_size 32 --eps 1e-8 "
        "--max_iters 100000 --checkpoint_dir checkpoints/my_run --use_wandb --wandb_project my-project --beta2 0.99"
    )
    assert from_argv(*words.split()) == RunConfig(
        data=DataConfig(train_data_path=Path("data/t.ids"), val_data_path=Path("data/v.ids")),
        model=ModelConfig(vocab_size=10000, context_length=512, d_model=768, num_heads=12, d_ff=3072, num_layers=12),
        optimizer=AdamW(lr=3e-4, weight_decay=0.1, beta2=0.99),
        schedule=Cosine(min_lr=3e-5),
        training=TrainingConfig(batch_size=32, max_iters=100000),
        checkpoint=CheckpointConfig(checkpoint_dir=Path("checkpoints/my_run")),
        logging=LoggingConfig(use_wandb=True, wandb_project="my-project"),
    )


def test_union_takes_the_keys_of_the_chosen_member_only(tmp_path: Path):
    assert from_argv("--optimizer.name", "sgd", "--momentum", "0.5").optimizer == SGD(momentum=0.5)
    assert from_argv("--optimizer.name", "SGD").optimizer == SGD()  # as every other choice, in any case
    assert message(from_argv, "--nesterov", "true") == "optimizer.nesterov: optimizer.name adamw has no such key (sgd has)"
    path = written(tmp_path, "optimizer: {name: adamw, beta1: 0.8}")
    refused = "optimizer.beta1: optimizer.name sgd has no such key (adamw, muon, lion, adamw8, galore, schedule_free has)"
    assert message(from_argv, "--config", str(path), "--optimizer.name=sgd") == refused
    names = "adamw | sgd | muon | lion | adamw8 | galore | schedule_free"
    assert message(from_argv, "--optimizer.name", "adam") == f"optimizer.name: expected {names}, got 'adam'"
    owners = "schedule.min_lr: schedule.name constant has no such key (cosine, linear, wsd has)"
    assert message(from_argv, "--schedule.name", "constant", "--min_lr", "0") == owners


def test_later_override_wins_and_any_override_beats_the_file(tmp_path: Path):
    path = str(written(tmp_path, "training: {batch_size: 2, seed: 3}"))
    config = from_argv("--batch_size", "4", "--config", path, "training.batch_size=8")
    assert (config.training.batch_size, config.training.seed) == (8, 3)
    assert from_argv("--config", path).training.batch_size == 2  # control


def test_switches_of_the_program_are_kept_apart():
    line = parse_command_line(
        RunConfig, ["-h", "--print-config", "--lr", "1"], flags={"help", "print_config"}, short={"-h": "help"}
    )
    assert line.flags == {"help", "print_config"}
    assert "no such key" in message(parse_command_line, RunConfig, ["--print-config"])  # control: not declared


def test_absurd_sizes_are_answered_at_once():
    begin = time.perf_counter()
    assert from_argv("--d_model", "1e15", "--num_heads", "1").model.d_model == 10**15
    assert "heads do not divide" in message(from_argv, "--d_model", "1000000000000037", "--num_heads", "7")
    assert time.perf_counter() - begin < 5


# -------------------------------------------------------------------------------------------------- round trip and reference


def test_reference_text_reads_back_as_the_defaults_and_holds_every_key(tmp_path: Path):
    text = reference(RunConfig)
    assert load(RunConfig, written(tmp_path, text)) == RunConfig()
    assert all(f"{leaf.rpartition('.')[2]}:" in text for leaf in leaves(RunConfig))


finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
below_one = st.floats(0, 1, exclude_max=True)
counts = st.integers(1, 2**70)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x85"), max_size=20)  # PyYAML makes NEL a space
names = texts.filter(lambda text: text.strip().lower() not in ("", "~", "null", "none"))
file_names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0\x85"), min_size=1, max_size=8)
paths = st.lists(file_names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=3).map(lambda p: Path("/", *p))


trackers = st.lists(st.sampled_from(["wandb", "tensorboard", "mlflow"]), max_size=3).map(tuple)


def maybe(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


def configs() -> st.SearchStrategy[RunConfig]:
    rates = {"lr": positive, "weight_decay": finite.map(abs)}
    warmup = {"warmup_iters": maybe(st.integers(0, 2**40))}
    decay = {**warmup, "min_lr": maybe(finite.map(abs))}
    return st.builds(
        RunConfig,
        data=st.builds(DataConfig, train_data_path=maybe(paths), sampling=st.sampled_from(["shuffle", "random"])),
        model=st.builds(
            ModelConfig, vocab_size=maybe(counts), d_model=st.integers(1, 512).map(lambda n: 8 * n), d_ff=maybe(counts),
            num_heads=st.sampled_from([1, 2, 4]), rope_theta=positive, dropout=below_one, bias=st.booleans(),
            norm=st.sampled_from(["rmsnorm", "layernorm"]),
        ),
        optimizer=st.one_of(
            st.builds(AdamW, **rates, beta1=below_one, beta2=below_one, eps=positive),
            st.builds(SGD, **rates, momentum=st.floats(0.1, 0.9), nesterov=st.booleans()),
            st.builds(Muon, **rates, momentum=below_one, embedding_lr_scale=positive),
        ),
        schedule=st.one_of(
            st.builds(Cosine, **decay), st.builds(Linear, **decay),
            st.builds(WarmupStableDecay, **decay, decay_shape=st.sampled_from(["sqrt", "linear"])),
            st.builds(InverseSqrt, **warmup), st.builds(Constant, **warmup),
        ),
        training=st.builds(TrainingConfig, batch_size=counts, epochs=maybe(positive), seed=st.integers(0, 2**63 - 1)),
        checkpoint=st.builds(CheckpointConfig, checkpoint_dir=paths, keep_last=maybe(counts), resume_from=maybe(names)),
        logging=st.builds(
            LoggingConfig, trackers=trackers, wandb_run_name=maybe(names), sample_prompt=texts
        ),
    )  # fmt: skip


quick = settings(max_examples=200, deadline=None, derandomize=True, database=None)
thorough = settings(quick, max_examples=600)


@quick
@given(config=configs())
def test_round_trip(config: RunConfig):
    with tempfile.TemporaryDirectory() as folder:
        again = load(RunConfig, written(Path(folder), to_yaml(config)))
    absolute = Path(config.checkpoint.checkpoint_dir).absolute()
    assert again == dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, checkpoint_dir=absolute))


def test_round_trip_control():
    assert from_mapping(RunConfig, {"seed": 1}, "") != RunConfig()


def test_relative_paths_are_recorded_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert f"train_data_path: {tmp_path}/data\n" in to_yaml(from_argv("--train_data_path", "data"))


# -------------------------------------------------------------------------------------------------------------------- fuzz

KEYS = [
    *leaves(RunConfig),
    "name",
    "dtype",
    "learning_rate",
    "optimizer",
    "model",
    "batch-size",
    "config",
    "",
    "-",
    "x.y.z",
    "\ud800",
]
NASTY = [
    "",
    "null",
    "~",
    "~x/y",
    "true",
    "-1",
    "0",
    "1e400",
    HUGE,
    "9" * 5000,
    "nan",
    "[",
    "[a, [b]]",
    "{a: b}",
    "*a",
    "!!int x",
    "\0",
    "a,b",
]
scalars = st.sampled_from(NASTY) | st.text(max_size=10) | st.integers().map(str) | st.floats().map(str)


def accepted_or_refused(call: Callable[[], Any]) -> None:
    """Anything but a config or a ConfigError fails the test; a refusal has something to say."""
    try:
        config, problems = call(), None
    except ConfigError as error:
        config, problems = None, error.problems
    if problems is None:
        assert isinstance(config, RunConfig)
    else:
        assert problems
        assert all(problem.strip() for problem in problems)
        assert sum(map(len, problems)) < 100_000


@thorough
@given(raw=st.binary(max_size=60) | st.text(max_size=60), name=st.sampled_from(["c.yaml", "c.json"]))
def test_fuzz_files_of_any_bytes(raw: str | bytes, name: str):
    with tempfile.TemporaryDirectory() as folder:
        raw = raw.encode("utf-8", "surrogatepass") if isinstance(raw, str) else raw
        path = written(Path(folder), raw, name)
        accepted_or_refused(lambda: load(RunConfig, path))


punctuation = st.lists(
    st.sampled_from([*"{}[]:,-?!&*|>%@`#'\"\\ \n\t~=<", "a", "lr", "model", "\\U", "FFFF", "---", "%YAML 9.9", "!!"])
)


@thorough
@given(text=punctuation.map("".join))
def test_fuzz_yaml_of_its_own_punctuation(text: str):
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), text)
        accepted_or_refused(lambda: load(RunConfig, path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=8,
)


@thorough
@given(document=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), json_values, max_size=4))
def test_fuzz_mappings_of_known_keys(document: Mapping[str, Any]):
    accepted_or_refused(lambda: from_mapping(RunConfig, document, "fuzz"))


words = st.one_of(
    st.sampled_from(KEYS).map("--{}".format),
    st.builds("{}{}={}".format, st.sampled_from(["--", ""]), st.sampled_from(KEYS), scalars),
    scalars,
    st.text(max_size=8),
)


@thorough
@given(argv=st.lists(words, max_size=6))
def test_fuzz_command_lines(argv: list[str]):
    accepted_or_refused(lambda: from_argv(*argv))


@pytest.mark.parametrize("broken", [ValueError("x"), ConfigError([]), ConfigError(" ")], ids=repr)
def test_fuzz_control_sees_other_errors_and_empty_reports(broken: Exception):
    def call() -> None:
        raise broken

    with pytest.raises((ValueError, AssertionError)):
        accepted_or_refused(call)


def test_what_a_run_could_not_read_back_is_refused():
    with pytest.raises(ConfigError, match="larger than 64 KiB"):
        load(RunConfig, None, [("logging.sample_prompts", Entry([f"prompt {number}" for number in range(5000)], "here"))])


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["--compile"], True), (["--compile", "null"], None), (["--compile", "false"], False), (["--compile", "--lr", "1"], True)],
)
def test_a_boolean_that_may_be_null_stands_alone_too(words: list[str], expected: bool | None):
    assert load(RunConfig, None, parse_command_line(RunConfig, words).overrides).training.compile is expected
