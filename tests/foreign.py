"""Models of transformers with random weights, and what is imported from files of them in other programs' layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from accel_pretrain.errors import CheckpointError
from accel_pretrain.hf.convert import links_by_ours, read_ours, read_theirs
from accel_pretrain.hf.described import Described
from accel_pretrain.hf.families import FAMILIES
from accel_pretrain.hf.family import names_of
from accel_pretrain.hf.foreign import describe_foreign
from accel_pretrain.hf.weight_files import open_weights
from accel_pretrain.models import ModelConfig, Transformer

transformers = pytest.importorskip("transformers")

V, T, B = 211, 40, 3
State = dict[str, torch.Tensor]
LLAMA = ModelConfig(vocab_size=V, context_length=T, d_model=48, num_layers=3, num_heads=4, num_kv_heads=2, d_ff=96)


def theirs(model_type: str, config: ModelConfig, seed: int = 0) -> Any:
    """A model of transformers, every parameter far from its initial value, biases and norms too."""
    family = next(family for family in FAMILIES if family.model_type == model_type)
    return randomised(transformers.AutoConfig.for_model(**family.write_config(config)), seed)


def randomised(config: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape)
    return model


def imported(path: Path) -> tuple[Described, Transformer]:
    """Our model from a file of theirs. Every tensor of the file is used or known to mean nothing."""
    with open_weights(path) as weights:
        described = describe_foreign(weights)
        assert described is not None
        shapes = names_of(described.config)
        links = links_by_ours(described.links, shapes)
        used = {link.theirs for link in described.links}
        assert used == {link.theirs for link in links.values()} <= set(weights)
        assert not [name for name in weights if name not in used and not described.ignored(name)]
        for link in described.links:  # and back, to the same bits
            again = read_theirs(link, shapes, lambda name: read_ours(name, links, shapes, weights.read))
            assert torch.equal(again, weights.read(link.theirs).reshape(again.shape))
        own = Transformer(described.config, V)
        own.load_state_dict({name: read_ours(name, links, shapes, weights.read) for name in shapes})
    return described, own.eval()


def refusal(path: Path) -> str:
    with open_weights(path) as weights, pytest.raises(CheckpointError) as caught:
        describe_foreign(weights)
    return str(caught.value)


@torch.no_grad()
def assert_same_logits(own: Transformer, model: Any) -> None:
    """At most 1e-4 apart, which is not so once a tenth is added to one column of one matrix."""
    tokens_BT = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    expected = model(tokens_BT).logits
    assert expected.abs().max() > 0.5
    assert (own(tokens_BT) - expected).abs().max() <= 1e-4
    own.layers[1].self_attn.k_proj.weight[:, 5] *= 1.1  # type: ignore[union-attr,operator]
    assert (own(tokens_BT) - expected).abs().max() > 1e-4
