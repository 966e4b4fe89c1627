"""What a model costs, by formula, before any of it exists: parameters, operations, and bytes on one device.

Nothing here allocates or measures. The formulas follow the code in :mod:`accel_pretrain.models` operation by operation, and
tests compare them with what PyTorch counts there (``FlopCounterMode``, the tensors that autograd keeps, the allocator's peak):
whoever changes the block changes these. Sizes in bytes, B, T, D, H, G, E, F, V as everywhere, N = B T tokens of a micro-batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from accel_pretrain.models import ModelConfig, cpu_loss, head_loss

FP32 = 4
_GATE_INPUTS = 32  # of a value embedding


# -------------------------------------------------------------------------------------------- parameters and operations


def parameters(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """How many parameters each group has. ``output`` is 0 where the token embedding serves as the output matrix."""
    D, F, L = model.d_model, model.ff_width, model.num_layers
    HE, GE = model.num_heads * model.head_width, model.kv_heads * model.head_width
    bias, qkv_bias = int(model.bias), int(model.has_qkv_bias)
    norm = {"rmsnorm_plain": 0, "layernorm": 1 + bias}.get(model.norm, 1)
    head_norm = 2 * model.head_width if model.qk_norm and model.norm != "rmsnorm_plain" else 0
    embedding_layers = sum(model.embeds_values(layer) for layer in range(L))
    up = 2 if model.is_gated else 1
    return {
        "token embeddings": vocab_size * D,
        "position embeddings": model.context_length * D if model.position == "learned" else 0,
        "value embeddings": embedding_layers * (vocab_size * GE + min(_GATE_INPUTS, D) * model.kv_heads),
        "attention": L * (2 * D * (HE + GE) + qkv_bias * (HE + 2 * GE) + bias * D),
        "feed-forward": L * ((up + 1) * D * F + bias * (up * F + D)),
        "norms": norm * D * (L * (4 if model.sandwich_norm else 2) + 1) + L * head_norm,
        "output": 0 if model.tie_embeddings else vocab_size * D,
    }


def decayed(model: ModelConfig, vocab_size: int) -> int:
    """Parameters with two or more dimensions: those that weight decay and matrix products touch, and embeddings."""
    groups = parameters(model, vocab_size)
    D, L = model.d_model, model.num_layers
    qkv = model.has_qkv_bias * (model.num_heads + 2 * model.kv_heads) * model.head_width
    up = 2 if model.is_gated else 1
    biases = L * (qkv + model.bias * (2 * D + up * model.ff_width))
    return sum(groups.values()) - groups["norms"] - biases


def seen_positions(model: ModelConfig, *, causal: bool = True) -> float:
    """Keys that a query attends to, summed over the layers: the mean over all positions of the context.

    ``causal=False`` counts the whole context or window, as :meth:`Transformer.flops_per_token` and most published figures do.
    """
    T, total = model.context_length, 0.0
    for layer in range(model.num_layers):
        window = min(model.sliding_window or T, T) if model.slides(layer) else T
        total += window - window * (window - 1) / (2 * T) if causal else window
    return total


def flops_per_token(model: ModelConfig, vocab_size: int) -> dict[str, int]:
    """Floating-point operations of one token, forward and backward, by group.

    6 per weight that multiplies; 12 H E per key for scores and averages (Chowdhery et al. 2022, PaLM, appendix B). Embedding
    tables are looked up and cost nothing; a tied one multiplies as the output matrix. The sum is that of ``train/mfu``.
    """
    D, L, HE, GE = model.d_model, model.num_layers, model.num_heads * model.head_width, model.kv_heads * model.head_width
    gates = sum(model.embeds_values(layer) for layer in range(L)) * min(_GATE_INPUTS, D) * model.kv_heads
    return {
        "attention matrices": 6 * (L * 2 * D * (HE + GE) + gates),
        "attention scores": 12 * HE * round(seen_positions(model, causal=False)),
        "feed-forward": 6 * L * (3 if model.is_gated else 2) * D * model.ff_width,
        "output": 6 * vocab_size * D,
    }


# ------------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One process's share of a run: what its memory and its time depend on."""

    model: ModelConfig
    vocab_size: int
    batch_size: int
    accumulation: int = 1
    precision: str = "no"  # no, bf16 or fp16, in Accelerate's words
    device: str = "cpu"  # cpu or cuda: their kernels keep different things
    compiled: bool = False
    moments: float = 2  # float32 numbers that the optimizer keeps per parameter
    strategy: str = "ddp"  # ddp, zero2, fsdp2
    world_size: int = 1
    checkpointing: str = "none"  # none, selective or full: training.activation_checkpointing
    chunked: bool = False  # training.chunked_loss; a CPU takes its own where that pays
    update_bytes: int = 0  # that the optimizer needs for a while; this and the next two are update_costs'
    update_flops: float = 0.0  # in products of matrices
    set_aside: float = 0.0  # float32 numbers per parameter, while gradients are computed

    @property
    def tokens(self) -> int:
        """Of one micro-batch, on this process."""
        return self.batch_size * self.model.context_length

    @property
    def width(self) -> int:
        """Bytes of an activation between two matrix products."""
        return FP32 if self.precision == "no" else 2

    @property
    def own_attention(self) -> bool:
        """Whether attention goes through :mod:`accel_pretrain.models.cpu_attention`."""
        plain = self.model.attention_softcap is None and not self.model.dropout
        return plain and self.device == "cpu" and self.precision == "bf16"

    @property
    def loss_in_chunks(self) -> bool:
        """Whether the loss goes through :mod:`accel_pretrain.models.cpu_loss`."""
        return self.device == "cpu" and self.precision != "fp16" and self.tokens * self.vocab_size >= cpu_loss.PAYS_FROM

    @property
    def parameters(self) -> int:
        return sum(parameters(self.model, self.vocab_size).values())


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of an update, by what they are for; ``moment`` names it."""

    moment: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def kept_by_norm(load: Workload, numbers: int, *, heads: int = 0, width: int = FP32) -> int:
    """Bytes per token that a norm of so many numbers, or one per head, keeps: its input, and statistics.

    The residual stream is float32. RMSNorm makes a float32 copy of another input; LayerNorm takes it as wide as it is.
    """
    if load.model.norm == "layernorm" and not heads:
        return numbers * (width if load.device == "cpu" else FP32) + 2 * FP32
    return numbers * FP32 + FP32 * (heads or 1)


def kept_by_attention(load: Workload, layer: int) -> tuple[int, int]:
    """Bytes per token, and bytes once per layer, that autograd keeps between the first norm's output and o_proj's input."""
    model, a, T = load.model, load.width, load.model.context_length
    H, E = model.num_heads, model.head_width
    HE, GE = H * E, model.kv_heads * E
    kept, once = HE * a, 0  # the input of o_proj
    if model.qk_norm:
        kept += kept_by_norm(load, HE, heads=H) + kept_by_norm(load, GE, heads=model.kv_heads)
    if model.embeds_values(layer):
        kept += GE * FP32 + 2 * model.kv_heads * a
    slides = model.slides(layer) and (model.sliding_window or T) < T
    if model.attention_softcap is not None:  # by hand: scores after tanh, and weights
        dropped = (FP32 if a != FP32 else 2 * FP32) * H * T if model.dropout else 0
        kept += 3 * HE * a + H * T * (a + FP32) + (H * T * a if a != FP32 else 0) + dropped
        return kept, once + T * T
    if model.dropout and load.device == "cpu":  # no fused kernel there: weights, mask, weights that are left, in float32
        return kept + 3 * HE * FP32 + 3 * FP32 * H * T, 0
    kept += (HE + 2 * GE) * a  # q, k, v; the output is o_proj's input
    if load.own_attention:
        return kept, 0
    return kept + FP32 * H, T * T * a if slides else 0  # sums of exponentials, and the mask


def kept_by_block(load: Workload, layer: int) -> int:
    """Bytes of one micro-batch that the block number ``layer`` keeps for its backward pass."""
    model, a, N = load.model, load.width, load.tokens
    D, F, H, E = model.d_model, model.ff_width, model.num_heads, model.head_width
    attention, once = kept_by_attention(load, layer)
    if load.compiled:  # what inductor keeps: inputs of matrix products, queries, keys, values; it computes the rest again
        heads = 2 * (H + model.kv_heads) * E * a + (0 if load.own_attention else FP32 * H)
        if model.attention_softcap is not None or (model.dropout and load.device == "cpu"):
            heads = attention
        return N * (D * FP32 + 3 * D * a + heads + (3 if model.is_gated else 2) * F * a + 2 * FP32) + once
    inputs = ff_inputs = D * a
    feed_forward = (4 if model.is_gated else 2) * F * a
    norms = 2 * kept_by_norm(load, D)
    if model.sandwich_norm:
        norms += 2 * kept_by_norm(load, D, width=a)
    masks = 2 * D * (a if load.device == "cpu" else 1) if model.dropout else 0
    return N * (norms + inputs + attention + ff_inputs + feed_forward + masks) + once


def left_of_block(load: Workload, layer: int) -> int:
    """What the block number ``layer`` keeps from the forward to the backward pass when it is computed again there.

    Its input; ``selective`` also what linear layers and fused attention give.
    """
    model, a, N = load.model, load.width, load.tokens
    if load.checkpointing == "none":
        return kept_by_block(load, layer)
    kept = model.d_model * FP32
    if load.checkpointing == "selective":
        HE, GE = model.num_heads * model.head_width, model.kv_heads * model.head_width
        kept += (HE + 2 * GE + 2 * model.d_model + (2 if model.is_gated else 1) * model.ff_width) * a
        kept += model.kv_heads * a if model.embeds_values(layer) else 0
        if model.attention_softcap is None and not model.dropout:
            kept += HE * a + (0 if load.own_attention else FP32 * model.num_heads)
    return N * kept


def kept_outside_blocks(load: Workload) -> int:
    """Bytes that are kept before the first block and after the last, but for the logits: ids, targets, the last norm."""
    model, D, N = load.model, load.model.d_model, load.tokens
    mask = (D * (FP32 if load.device == "cpu" else 1)) if model.dropout else 0
    return N * (16 + mask + kept_by_norm(load, D) + D * load.width) + 8 * load.batch_size


def activations(load: Workload) -> int:
    """Bytes that the forward pass of one micro-batch leaves for the backward pass, without logits and weight copies."""
    return sum(left_of_block(load, layer) for layer in range(load.model.num_layers)) + kept_outside_blocks(load)


def logits(load: Workload) -> int:
    """Bytes of what has the size of the logits at its fullest, in the first moments of the backward pass.

    log-probabilities, their gradient, and the gradient of the logits, all float32; with a soft cap also its tanh. In chunks:
    those of one chunk, a piece of it in float32, and what a chunk adds to the gradient of the output matrix.
    """
    if load.loss_in_chunks:
        capped = 1 if load.model.logit_softcap is not None else 0  # its slope
        matrix = load.vocab_size * load.model.d_model
        chunk = load.vocab_size * load.width * cpu_loss.chunk_rows(load.tokens, load.vocab_size, load.model.d_model, load.width)
        piece = min(cpu_loss.CACHE_BYTES, FP32 * load.tokens * load.vocab_size)
        lowered = 0 if load.width == FP32 else load.width * matrix
        return chunk + (1 + capped) * piece + lowered + min(cpu_loss.CACHE_BYTES, FP32 * matrix) * load.width // FP32
    if load.chunked:  # by head_loss
        V, D, capped = load.vocab_size, load.model.d_model, load.model.logit_softcap is not None
        return head_loss.chunk_bytes(load.tokens, V, D, load.width, capped=capped) + (load.width % FP32) * V * D
    capped = load.width if load.model.logit_softcap is not None else 0
    return load.tokens * load.vocab_size * (3 * FP32 + capped)


def weight_copies(load: Workload) -> int:
    """Bytes of the matrices that autocast has copied to 16 bits, kept until the backward pass has used them."""
    if load.width == FP32:
        return 0
    groups = flops_per_token(load.model, load.vocab_size)
    copied = (
        sum(groups.values()) - groups["attention scores"] - (groups["output"] if load.loss_in_chunks or load.chunked else 0)
    )
    return 2 * copied // 6


def tables(load: Workload) -> int:
    """Bytes of the rotary angles."""
    model = load.model
    if model.position != "rope":
        return 0
    both = 2 if model.sliding_window is not None and model.sliding_rope_theta is not None else 1
    return both * 2 * model.context_length * model.head_width * FP32


def memory(load: Workload) -> Memory:
    """The fullest moment of an update on one device.

    Four moments can be it: the loss (all activations and three times the logits, or a chunk of them and the gradients at the
    output), the output matrix's gradient (all activations, one gradient of the logits, and that matrix's), the end (all
    gradients) and the update (the optimizer's work, too); where blocks are computed again, also the last or the first.
    Gradients exist throughout where they are accumulated, beside the buckets of DDP, which stand from the first update on;
    else they come as the activations go.
    """
    shard = load.world_size if load.strategy != "ddp" else 1
    weights, output = FP32 * load.parameters, FP32 * load.vocab_size * load.model.d_model
    state = math.ceil(FP32 * (load.moments + load.set_aside) * math.ceil(load.parameters / shard))
    standing = {"weights": math.ceil(weights / shard), "optimizer": state, "tables": tables(load)}
    copies, kept, N = weight_copies(load), activations(load), load.tokens
    gradients, early = _gradients(load, weights)
    if shard > 1:
        standing["gathered weights"], copies = _gathered(load), 0
    elif load.world_size > 1:
        standing["buckets of DDP"] = weights
    head = N * (load.vocab_size * (FP32 if load.width == FP32 else FP32 + load.width) + 2 * load.model.d_model * load.width)
    known = 0
    if load.loss_in_chunks:  # then the gradients of the output matrix and of its input are known in the forward pass already
        known = output + N * load.model.d_model * load.width
        head = 0 if load.width == FP32 else N * load.model.d_model * FP32
    elif load.chunked:  # there as well, and a backward pass multiplies them
        known = output + N * load.model.d_model * load.width
        head = known
    again = output if early else 0  # a new gradient is made beside the one that it is added to,
    if load.model.tie_embeddings and not load.loss_in_chunks:  # and that of a tied one the sum of two, in place if autocast
        again += output if load.device == "cpu" and load.width != FP32 else 2 * output
    forward = {"weight copies": copies, "activations": kept}
    moments = [
        Memory("the loss", {**standing, "gradients": early + known, **forward, "logits": logits(load)}),
        Memory("the gradient of the output", {**standing, "gradients": early + max(known, output), **forward, "logits": head}),
        Memory("the end of the backward pass", {**standing, "gradients": gradients + again}),
        Memory("the update", {**standing, "gradients": min(gradients, weights // shard), "the update": load.update_bytes}),
    ]
    if load.checkpointing != "none":
        beneath = gradients if early or load.world_size > 1 else gradients - FP32 * _matrices_of_block(load)
        last = {"gradients": early + max(known, output), "activations": kept, "a block again": computed_again(load, -1)}
        first = {"gradients": beneath, "activations": left_of_block(load, 0), "a block again": computed_again(load, 0)}
        moments.append(Memory("the last block, computed again", {**standing, **last}))
        moments.append(Memory("the first block, computed again", {**standing, **first}))
    return max(moments, key=lambda moment: moment.total)


def computed_again(load: Workload, layer: int) -> int:
    """Bytes of all that a block keeps, but for what is left of it anyway; its weights' copies, and gradients on their way."""
    layer %= load.model.num_layers
    copies = 0 if load.width == FP32 else load.width * _matrices_of_block(load)
    on_their_way = load.tokens * (load.model.d_model * FP32 + 2 * load.model.ff_width * load.width)
    return kept_by_block(load, layer) - left_of_block(load, layer) + copies + on_their_way


def _matrices_of_block(load: Workload) -> int:
    groups = parameters(load.model, load.vocab_size)
    return (groups["attention"] + groups["feed-forward"]) // load.model.num_layers


def _gradients(load: Workload, weights: int) -> tuple[int, int]:
    """Bytes of gradients at the end of the backward pass, and of those that exist already when it begins."""
    if load.world_size > 1 and load.strategy != "ddp":
        share = math.ceil(weights / load.world_size)
        if load.strategy == "zero2" and load.accumulation > 1:  # whole until the last micro-step
            return weights + share, weights
        return _gathered(replace(load, strategy="fsdp2")) + share, share if load.accumulation > 1 else 0
    early = weights if load.accumulation > 1 else 0
    return (0 if load.world_size > 1 else weights), early  # of DDP they move into its buckets, which stand anyway


def _gathered(load: Workload) -> int:
    """Bytes of whole weights at a time: what is outside the blocks, in float32, and all blocks, or two: one is on its way."""
    blocks = block_parameters(load)
    held = 2 * blocks // load.model.num_layers if load.strategy == "fsdp2" else blocks
    return FP32 * (load.parameters - blocks) + load.width * min(held, blocks)


def block_parameters(load: Workload) -> int:
    """Those of all blocks together, which are shared out one by one."""
    groups = parameters(load.model, load.vocab_size)
    last_norm = groups["norms"] and {"layernorm": 1 + int(load.model.bias)}.get(load.model.norm, 1) * load.model.d_model
    outside = groups["token embeddings"] + groups["position embeddings"] + groups["output"] + last_norm
    return load.parameters - outside


def checkpoint_bytes(load: Workload) -> int:
    """Bytes of one checkpoint: float32 weights once (a tied matrix is stored once), and the optimizer's numbers."""
    return round(FP32 * (1 + load.moments) * load.parameters)
