"""The fast-weight product-key memory layer: projections, gate and output around the functional memory."""

from __future__ import annotations

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerConfig, MixerOutput, ParameterOptions, Traits
from mixers.fwpkm.functional import FastWeightOutput, fast_weight_pkm, resolve_impl
from mixers.fwpkm.reference import ChunkOptions
from mixers.masking import zero_padding
from mixers.norms import RMSNorm
from mixers.product_keys import read, select
from mixers.registry import register

ZSCORE_EPS = 1e-6


class FastWeightPKMConfig(MixerConfig):
    """Options of :class:`FastWeightPKM`. The paper: n_subkeys 512, top_k 8, key and value width 512, chunk 512."""

    n_heads: int = Field(1, gt=0)
    top_k: int = Field(8, gt=0, description="slots read per head")
    n_subkeys: int = Field(32, gt=0, description="sub-keys per half: n*n slots")
    key_dim: int | None = Field(None, gt=0, description="key width K; None: d_model")
    value_dim: int | None = Field(None, gt=0, description="value width V; None: d_model")
    chunk_size: int = Field(32, gt=0, description="tokens between writes: a read sees only earlier chunks")
    lookahead: int = Field(1, ge=0, description="the value written at token t is that of token t + lookahead")
    lr: float = Field(1.0, gt=0, description="step size of the writes")
    weight_decay: float = Field(0.0, ge=0, description="decay of the memory at every write")
    score: Literal["idw", "dot"] = "idw"
    temperature: float = Field(1.0, gt=0)
    address_weight: float = Field(1.0, ge=0, description="weight of the addressing loss; 0: keys stay")
    value_loss_to_keys: bool = False
    clip: bool = False
    scope: Literal["sequence", "shared"] = "sequence"
    update_scale: Literal["paper", "released"] = Field("released", description="see the layer's documentation")
    initial_memory: Literal["frozen", "learned"] = "frozen"
    use_gate: bool = Field(True, description="mix what was read with the own value by a learned gate")
    gate_weighting: bool = Field(True, description="the gate also weights what is written")
    gate_outputs: int = Field(1, gt=0, description="outputs of the gate projection, averaged before the sigmoid")
    z_score: bool = Field(True, description="standardise every value over its width")
    impl: Literal["auto", "reference", "sparse"] = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.key_dim or self.d_model) % 2:
            raise ValueError(f"the key width must be even to be cut in halves, got {self.key_dim or self.d_model}")
        if self.top_k > self.n_subkeys:
            raise ValueError(f"top_k must be at most n_subkeys={self.n_subkeys}, got {self.top_k}")
        if self.lookahead >= self.chunk_size:
            raise ValueError(
                f"lookahead must be below chunk_size={self.chunk_size}, or nothing is ever written; "
                f"got {self.lookahead}"
            )
        if self.z_score and (self.value_dim or self.d_model) < 2:
            raise ValueError("z_score needs a value width of at least 2; set z_score=false")
        return self


class FastWeightState(NamedTuple):
    """The memory and the tokens that wait for their chunk to fill. M is B (scope ``sequence``) or 1 (``shared``).

    keys (M,H,2,n,K/2), values (M,N,V): as written by all completed chunks.
    q (B,W,H,K), v (B,W,V), gate and mask (B,W) or None: the W < C tokens of the unfinished chunk.
    """

    keys: Tensor
    values: Tensor
    q: Tensor
    v: Tensor
    gate: Tensor | None
    mask: Tensor | None


@register("fwpkm")
class FastWeightPKM(Mixer):
    r"""A product-key memory written by gradient descent while it reads (Zhao & Jones 2026, arXiv:2601.00671).

    With h = RMSNorm(x), one norm each for q, v and gate:

        q = Linear(h) (H*K);  v = zscore(Linear(h)) (V);  g = sigmoid(Linear(h))
        read, memory' = fast_weight_pkm(q, v, g, memory)       # see mixers.fwpkm.fast_weight_pkm
        y = Linear(RMSNorm(g * read + (1 - g) * v))

    zscore uses the unbiased standard deviation over V, plus 1e-6. The layer normalises its own input, so a block
    adds y to x without another norm. State: keys and values (float32 or wider) and the queue of the unfinished
    chunk; outputs do not depend on how the input is cut into calls. A token's value is written ``lookahead`` tokens
    back, to the slots that the earlier token reads: with 1, "what follows this" is what a later read finds.

    ``initial_memory``: ``frozen``, drawn once and never trained, as released; ``learned``, trained with the model.
    Masked tokens count as zeros, never enter a pair (t, t+L), and their y is zero; they still count as accesses. As
    chunks are counted from the start of the input, left padding shifts the chunk boundaries of the real tokens and so
    changes which writes a read sees.

    ``update_scale``: the paper's equations average a chunk's errors over the accesses of a slot, so a token that reads
    k slots moves each by 1/k of its error; the released code multiplies that by H k ns / M and so writes the whole
    error. On MQAR the second recalls more reliably (``mixlab sweep run update_scale``, five seeds: with 16 pairs 0.996
    +-0.003 against 0.799 +-0.544, with 4 pairs equal), so it is the default of this layer. The function's default stays
    the paper's.

    Differences from the released code: per-sequence memories by default, one gate output (released: 8), and one-token
    decoding writes as strongly as one long call.
    """

    Config = FastWeightPKMConfig
    traits = Traits(state_scope="config", state_growth="constant", exact_chunking=False)
    family = "memory"
    source = "Zhao & Jones 2026, arXiv:2601.00671"
    default_slot = "memory"
    normalises_input = True
    # True: ``write`` gets one chunk a call, for variants that act between chunks.
    one_chunk_per_write: ClassVar[bool] = False
    config: FastWeightPKMConfig

    def __init__(self, config: FastWeightPKMConfig) -> None:
        super().__init__(config)
        c = config
        self.key_dim, self.value_dim = c.key_dim or c.d_model, c.value_dim or c.d_model
        self.q_norm, self.v_norm = RMSNorm(c.d_model), RMSNorm(c.d_model)
        self.q_proj = nn.Linear(c.d_model, c.n_heads * self.key_dim)
        self.v_proj = nn.Linear(c.d_model, self.value_dim)
        if c.use_gate or c.gate_weighting:
            self.gate_norm = RMSNorm(c.d_model)
            self.gate_proj = nn.Linear(c.d_model, c.gate_outputs)
        self.out_norm = RMSNorm(self.value_dim)
        self.out_proj = nn.Linear(self.value_dim, c.d_model)
        keys = torch.empty(c.n_heads, 2, c.n_subkeys, self.key_dim // 2)
        values = torch.empty(c.n_subkeys**2, self.value_dim)
        if c.initial_memory == "learned":
            self.keys, self.values = nn.Parameter(keys), nn.Parameter(values)
        else:
            self.register_buffer("keys", keys)
            self.register_buffer("values", values)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Keys uniform +-K^-0.5, values normal with std V^-0.5, query Xavier-uniform, others normal std D^-0.5."""
        c = self.config
        for norm in (self.q_norm, self.v_norm, self.out_norm):
            norm.reset_parameters()
        nn.init.xavier_uniform_(self.q_proj.weight)
        nn.init.zeros_(self.q_proj.bias)
        for linear in (self.v_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=c.d_model**-0.5)
            nn.init.zeros_(linear.bias)
        if c.use_gate or c.gate_weighting:
            self.gate_norm.reset_parameters()
            nn.init.normal_(self.gate_proj.weight, std=c.d_model**-0.5)
            nn.init.zeros_(self.gate_proj.bias)
        with torch.no_grad():
            self.keys.uniform_(-(self.key_dim**-0.5), self.key_dim**-0.5)
            self.values.normal_(std=self.value_dim**-0.5)

    @property
    def impl(self) -> str:
        c = self.config
        return resolve_impl(c.impl, self._options(), c.n_subkeys**2, c.n_heads)

    @property
    def state_scope(self) -> str:
        return self.config.scope

    def parameter_options(self) -> dict[str, ParameterOptions]:
        if self.config.initial_memory == "frozen":
            return {}
        return {name: ParameterOptions(weight_decay=False) for name in ("keys", "values")}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> FastWeightState:
        """The initial memory for everyone and an empty queue. The memory never is narrower than float32."""
        c = self.config
        dtype = torch.promote_types(dtype, torch.float32)
        n_memories = batch_size if c.scope == "sequence" else 1
        keys, values = (table.to(device=device, dtype=dtype) for table in (self.keys, self.values))
        queue = keys.new_zeros(batch_size, 0, c.n_heads, self.key_dim)
        return FastWeightState(
            keys.expand(n_memories, *keys.shape),
            values.expand(n_memories, *values.shape),
            queue,
            keys.new_zeros(batch_size, 0, self.value_dim),
            keys.new_zeros(batch_size, 0) if c.gate_weighting else None,
            None,
        )

    def forward(
        self, x: Tensor, state: FastWeightState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        c = self.config
        n_sequences, n_tokens, _ = x.shape
        x = zero_padding(x, mask)
        if state is None:
            state = self.initial_state(n_sequences, device=x.device, dtype=x.dtype)

        q = self.q_proj(self.q_norm(x)).view(n_sequences, n_tokens, c.n_heads, self.key_dim)
        v = self.v_proj(self.v_norm(x))
        if c.z_score and n_tokens:
            v = (v - v.mean(-1, keepdim=True)) / (v.std(-1, keepdim=True) + ZSCORE_EPS)
        gate = None
        if c.use_gate or c.gate_weighting:
            gate = torch.sigmoid(self.gate_proj(self.gate_norm(x)).mean(-1))

        with torch.autocast(x.device.type, enabled=False):
            memory_dtype = state.values.dtype
            write_gate = gate.to(memory_dtype) if c.gate_weighting else None
            rows, slots, state, losses = self._memory(
                q.to(memory_dtype), v.to(memory_dtype), write_gate, mask, state, return_state
            )
        mixed = rows.to(v.dtype)
        if c.use_gate:
            mixed = gate.unsqueeze(-1) * mixed + (1 - gate).unsqueeze(-1) * v
        y = self.out_proj(self.out_norm(mixed))
        y = zero_padding(y, mask)
        return MixerOutput(y, state if return_state else None, self._aux(gate, slots, losses))

    def _memory(
        self,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        mask: Tensor | None,
        state: FastWeightState,
        return_state: bool,
    ) -> tuple[Tensor, Tensor, FastWeightState, dict[str, Tensor]]:
        """Rows read by the new tokens (B,T,V), their slots (B,T,H,k), the state after them, losses of the writes."""
        c = self.config
        n_waiting, n_new = state.q.shape[1], q.shape[1]
        if mask is None and state.mask is not None:
            mask = state.mask.new_ones(q.shape[:2])
        if mask is not None and state.mask is None:
            state = state._replace(mask=mask.new_ones(mask.shape[0], n_waiting))
        if n_waiting:
            q = torch.cat([state.q, q], dim=1)
            v = torch.cat([state.v, v], dim=1)
            gate = None if gate is None else torch.cat([state.gate, gate], dim=1)
            mask = None if mask is None else torch.cat([state.mask, mask], dim=1)

        # Whole chunks are read and written; the rest only reads, and waits.
        n_full = (n_waiting + n_new) // c.chunk_size * c.chunk_size
        # Nothing reads a write of the call's last chunk, unless the state goes on.
        n_written = n_full if return_state or n_full < n_waiting + n_new else n_full - c.chunk_size
        n_written = max(n_written, 0)
        keys, values = state.keys, state.values
        rows, slots, losses = [], [], {}
        pairs = None if mask is None else _pair_mask(mask, c.lookahead)
        n_each = c.chunk_size if self.one_chunk_per_write else max(n_written, 1)
        for start in range(0, n_written, n_each):
            part = slice(start, start + n_each)
            out = self.write(
                q[:, part],
                v[:, part],
                None if gate is None else gate[:, part],
                keys,
                values,
                None if pairs is None else pairs[:, part],
            )
            keys, values = out.keys, out.values
            # The queue's tokens were read when they came; C > W, so they all lie in the first chunk.
            first_new = max(n_waiting - start, 0)
            rows.append(out.read[:, first_new:])
            slots.append(out.slots[:, first_new:])
            for name in ("value_loss", "address_loss"):
                losses[name] = losses.get(name, 0) + getattr(out, name) * (n_each / n_written)
        first_unread = max(n_written, n_waiting)
        if first_unread < q.shape[1] or not rows:
            tail_rows, tail_slots = self.read_memory(q[:, first_unread:], keys, values)
            rows.append(tail_rows)
            slots.append(tail_slots)
        new_state = FastWeightState(
            keys,
            values,
            # Copies: views would keep all of the call's projections alive as long as the state.
            q[:, n_full:].clone(),
            v[:, n_full:].clone(),
            None if gate is None else gate[:, n_full:].clone(),
            None if mask is None else mask[:, n_full:].clone(),
        )
        return torch.cat(rows, dim=1), torch.cat(slots, dim=1), new_state, losses

    def write(
        self, q: Tensor, v: Tensor, gate: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> FastWeightOutput:
        """Read and write whole chunks; what a variant of the write overrides.

        q (B,T,H,K), v (B,T,V), gate (B,T) or None, keys (M,H,2,n,K/2) and values (M,N,V) before the first of the
        chunks, mask (B,T) bool or None: whether the pair (t, t+L) may be written. Returns keys and values with M
        leading. T is any number of whole chunks, or one with ``one_chunk_per_write``. The reads of a chunk must come
        from the memory as it was before the chunk.
        """
        c = self.config
        shared = c.scope == "shared"
        out = fast_weight_pkm(
            q,
            v,
            gate,
            keys[0] if shared else keys,
            values[0] if shared else values,
            mask=mask,
            scope=c.scope,
            impl=c.impl,
            **vars(self._options()),
        )
        return out._replace(keys=out.keys[None], values=out.values[None]) if shared else out

    def _options(self) -> ChunkOptions:
        c = self.config
        return ChunkOptions(
            chunk_size=c.chunk_size,
            top_k=c.top_k,
            lookahead=c.lookahead,
            lr=c.lr,
            weight_decay=c.weight_decay,
            score=c.score,
            temperature=c.temperature,
            address_weight=c.address_weight,
            value_loss_to_keys=c.value_loss_to_keys,
            clip=c.clip,
            update_scale=c.update_scale,
        )

    def read_memory(self, q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B,T,V) and slots (B,T,H,k) that q (B,T,H,K) reads from the memory as it is."""
        c = self.config
        n_sequences, n_tokens = q.shape[:2]
        selection = select(q.reshape(keys.shape[0], -1, c.n_heads, self.key_dim), keys, c.top_k, c.score)
        weights = torch.softmax(selection.scores.flatten(-2) / c.temperature, dim=-1)
        rows = read(values, selection.slots.flatten(-2), weights)
        shape = (n_sequences, n_tokens)
        return rows.view(*shape, self.value_dim), selection.slots.view(*shape, c.n_heads, c.top_k)

    def _aux(self, gate: Tensor | None, slots: Tensor, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        aux = {name: loss.detach() for name, loss in losses.items()}
        if gate is not None and gate.numel():
            aux["gate_mean"] = gate.detach().mean()
        if slots.numel():
            aux |= _slot_use(slots, self.config.n_subkeys**2)
        return aux

    def flops_per_token(self, context: int) -> float:
        """Projections 2 D (H K + 2 V + gate), sub-key scores 2 H n K, read 2 H k V; the same at every context.

        A write's gathers and scatters move bytes and multiply element-wise: about 4 H k V + 6 H k K more, not
        counted here as the counter does not see them.
        """
        c = self.config
        gate = c.gate_outputs if c.use_gate or c.gate_weighting else 0
        projections = 2 * c.d_model * (c.n_heads * self.key_dim + 2 * self.value_dim + gate)
        scores = 2 * c.n_heads * c.n_subkeys * self.key_dim
        return projections + scores + 2 * c.n_heads * c.top_k * self.value_dim


def _pair_mask(mask: Tensor, lookahead: int) -> Tensor:
    """Whether both ends of the pair (t, t+L) are real tokens."""
    mask = mask.bool()
    if lookahead == 0:
        return mask
    later = torch.cat([mask[:, lookahead:], mask.new_zeros(mask.shape[0], min(lookahead, mask.shape[1]))], dim=1)
    return mask & later[:, : mask.shape[1]]


@torch.no_grad()
def _slot_use(slots: Tensor, n_slots: int) -> dict[str, Tensor]:
    """How the call's reads (B,T,H,k) spread over the slots, averaged over the sequences.

    coverage: share of all slots that a sequence reads at least once. collisions: share of its reads that go to a slot
    which it read before. kl_uniform: KL divergence of its reads' distribution from uniform over the slots, in nats.
    """
    n_sequences = slots.shape[0]
    flat = slots.reshape(n_sequences, -1)
    counts = torch.zeros(n_sequences, n_slots, device=slots.device).scatter_add_(
        1, flat, torch.ones(flat.shape, device=slots.device)
    )
    distinct = (counts > 0).sum(1).float()
    share = counts / flat.shape[1]
    return {
        "slot_coverage": (distinct / n_slots).mean(),
        "slot_collisions": (1 - distinct / flat.shape[1]).mean(),
        "slot_kl_uniform": (torch.xlogy(share, share * n_slots)).sum(1).mean(),
    }
