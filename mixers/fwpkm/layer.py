"""The fast-weight product-key memory layer: projections, gate and output around the functional memory."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mixers.base import Mixer, MixerConfig, MixerOutput, ParameterOptions, Traits, state_bytes
from mixers.fwpkm.functional import FastWeightOutput, choose_impl, empty_rows, fast_weight_pkm, read_and_forget
from mixers.fwpkm.reference import ChunkOptions
from mixers.fwpkm.sparse import write_chunks_sparsely
from mixers.fwpkm.sparse_rows import ascending
from mixers.fwpkm.touched_rows import in_code_order, overlay
from mixers.masking import zero_padding
from mixers.norms import RMSNorm, norms_of
from mixers.product_keys import read, select
from mixers.registry import register

ZSCORE_EPS = 1e-6
# Percent; of the gates, the shares above these are logged.
GATE_LEVELS = (10, 50, 90)


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
    impl: Literal["auto", "reference", "sparse", "triton"] = "auto"

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

    keys (M,H,2,n,K/2): as written by all completed chunks.
    The values, as written by them, are a table and the rows that differ from it. values: the table, (1 or M,N,V), or
    None: the layer's own frozen ``values``, which then cost the state nothing. codes (U,) int64 ascending, rows (U,V):
    memory m differs from the table at its slot u by the row of code m * N + u; U = 0 where whole tables are kept.
    FastWeightPKM.tables puts them together.
    q (B,W,H,K), v (B,W,V), gate and mask (B,W) or None: the W < C tokens of the unfinished chunk.
    """

    keys: Tensor
    values: Tensor | None
    codes: Tensor
    rows: Tensor
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

    ``impl=sparse`` keeps of the values only the rows that were written, so a state is as large as what was written, at
    most the whole memory, and a token inside a chunk costs the same at every N and U rows. A call that completes a
    chunk copies the U rows. The size that counts in comparisons (``full_state_bytes``) is that of the whole memory,
    with every implementation.

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
        return choose_impl(
            c.impl,
            self._options(),
            self.values.shape,
            scope=c.scope,
            device=self.values.device,
            dtype=torch.promote_types(self.values.dtype, torch.float32),
            place="mixer 'fwpkm'",
        )

    @property
    def _keeps_rows(self) -> bool:
        """Whether states hold the written rows: the layer's own sparse form. A variant's ``write`` gets tables."""
        return self._writes_as_usual and self.impl == "sparse"

    @property
    def _writes_as_usual(self) -> bool:
        """Whether this is no variant with a ``write`` or ``read_memory`` of its own."""
        cls = type(self)
        return cls.write is FastWeightPKM.write and cls.read_memory is FastWeightPKM.read_memory

    @property
    def state_scope(self) -> str:
        return self.config.scope

    def parameter_options(self) -> dict[str, ParameterOptions]:
        if self.config.initial_memory == "frozen":
            return {}
        return {name: ParameterOptions(weight_decay=False) for name in ("keys", "values")}

    def active_rows(self) -> dict[str, int]:
        """Of a learned initial table H k rows, at most all N. A frozen one is no parameter, a written one is state."""
        c = self.config
        return {"values": min(c.n_heads * c.top_k, c.n_subkeys**2)} if c.initial_memory == "learned" else {}

    def initial_state(self, batch_size: int, *, device: torch.device | str, dtype: torch.dtype) -> FastWeightState:
        """The initial memory for everyone and an empty queue. The memory never is narrower than float32."""
        return self._start(batch_size, device, dtype, outlives_call=True)

    def _start(
        self, batch_size: int, device: torch.device | str, dtype: torch.dtype, *, outlives_call: bool
    ) -> FastWeightState:
        """The initial state. One that outlives the call keeps a copy of what the optimiser would change."""
        c = self.config
        dtype = torch.promote_types(dtype, torch.float32)
        n_memories = batch_size if c.scope == "sequence" else 1
        keys, values = self.keys.to(device=device, dtype=dtype), None
        if outlives_call:
            if c.initial_memory == "learned":
                keys, values = keys.clone(), self.values.to(device=device, dtype=dtype, copy=True)[None]
            elif not self._keeps_rows:
                values = self.values.to(device=device, dtype=dtype)[None]
            if values is not None and not self._keeps_rows:
                values = values.expand(n_memories, -1, -1)
        codes, rows = empty_rows(keys.new_empty(0, self.value_dim))
        return FastWeightState(
            keys.expand(n_memories, *keys.shape),
            values,
            codes,
            rows,
            keys.new_zeros(batch_size, 0, c.n_heads, self.key_dim),
            keys.new_zeros(batch_size, 0, self.value_dim),
            keys.new_zeros(batch_size, 0) if c.gate_weighting else None,
            None,
        )

    def tables(self, state: FastWeightState) -> tuple[Tensor, Tensor]:
        """The memory of a state, whole: keys (M,H,2,n,K/2) and values (M,N,V). Copies M tables if rows differ."""
        return state.keys, overlay(self._table(state), state.codes, state.rows, state.keys.shape[0])

    def _table(self, state: FastWeightState) -> Tensor:
        """(1 or M,N,V): what the rows of a state differ from."""
        return self.values.to(state.keys)[None] if state.values is None else state.values

    def full_state_bytes(self, state: FastWeightState) -> int:
        """Keys, M whole tables of values, and the queue: the rows not written are part of the memory too.

        With ``initial_memory=learned``, ``sparse`` stores beside the rows the table as it was: one table more.
        """
        n_tables = state.keys.shape[0]
        if self._keeps_rows and state.values is not None:
            n_tables += state.values.shape[0]
        table_bytes = n_tables * self.values.numel() * state.keys.element_size()
        return table_bytes + state_bytes(state._replace(values=None, codes=None, rows=None))

    def forward(
        self, x: Tensor, state: FastWeightState | None = None, *, return_state: bool = False, mask: Tensor | None = None
    ) -> MixerOutput:
        c = self.config
        n_sequences, n_tokens, _ = x.shape
        x = zero_padding(x, mask)
        if state is None:
            state = self._start(n_sequences, x.device, x.dtype, outlives_call=return_state)

        has_gate = c.use_gate or c.gate_weighting
        for_q, for_v, *for_gate = norms_of(x, [self.q_norm, self.v_norm, *([self.gate_norm] if has_gate else [])])
        q = self.q_proj(for_q).view(n_sequences, n_tokens, c.n_heads, self.key_dim)
        v = self.v_proj(for_v)
        if c.z_score and n_tokens:
            # The norm of what is left is the deviation times sqrt(V - 1); Tensor.std takes three times as long.
            v = v - v.mean(-1, keepdim=True)
            deviation = torch.linalg.vector_norm(v, dim=-1, keepdim=True) * (self.value_dim - 1) ** -0.5
            v = v / (deviation + ZSCORE_EPS)
        gate = torch.sigmoid(self.gate_proj(for_gate[0]).mean(-1)) if has_gate else None

        with torch.autocast(x.device.type, enabled=False):
            memory_dtype = state.keys.dtype
            write_gate = gate.to(memory_dtype) if c.gate_weighting else None
            # What is not plain torch is no work for torch.compile, nor is what surrounds it.
            memory = self._memory if self.impl == "reference" else self._memory_uncompiled
            rows, slots, state, losses = memory(
                q.to(memory_dtype), v.to(memory_dtype), write_gate, mask, state, return_state
            )
        mixed = rows.to(v.dtype)
        if c.use_gate:
            mixed = torch.lerp(v, mixed, gate.to(v.dtype).unsqueeze(-1))
        y = self.out_proj(self.out_norm(mixed))
        y = zero_padding(y, mask)
        return MixerOutput(y, state if return_state else None, self._aux(gate, slots, losses))

    @torch._disable_dynamo  # torch.compiler.disable imports the compiler at once, which takes seconds
    def _memory_uncompiled(self, *arguments: Any) -> tuple[Tensor, Tensor, FastWeightState, dict[str, Tensor]]:
        return self._memory(*arguments)

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
        pairs = None if mask is None else _pair_mask(mask, c.lookahead)
        if self._keeps_rows:
            advance = self._advance_rows
        elif n_written and not return_state and self._writes_as_usual and self.impl == "triton":
            advance = self._advance_nothing
        else:
            advance = self._advance_tables
        read, slots, state, losses = advance(q, v, gate, pairs, state, n_waiting, n_written)
        if not return_state:
            return read, slots, state, losses
        if n_written:
            codes, rows = in_code_order(state.codes, state.rows)
            state = state._replace(codes=codes, rows=rows)

        def waiting(x: Tensor | None) -> Tensor | None:
            # Copies: views would keep all of the call's projections alive as long as the state.
            is_joined = n_waiting > 0 and n_full == 0
            return x if x is None or is_joined else x[:, n_full:].clone()

        state = state._replace(q=waiting(q), v=waiting(v), gate=waiting(gate), mask=waiting(mask))
        return read, slots, state, losses

    def _advance_rows(
        self,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        pairs: Tensor | None,
        state: FastWeightState,
        n_waiting: int,
        n_written: int,
    ) -> tuple[Tensor, Tensor, FastWeightState, dict[str, Tensor]]:
        """Read all but the first ``n_waiting`` tokens, write the first ``n_written``, on the rows that they touch:
        the state's rows come in the order in which they were met."""
        # The queue was read when it came; it takes part again only in a chunk that is written.
        first = 0 if n_written else n_waiting
        tokens = slice(first, None)
        out = write_chunks_sparsely(
            q[:, tokens],
            v[:, tokens],
            None if gate is None else gate[:, tokens],
            state.keys,
            self._table(state),
            state.codes,
            state.rows,
            None if pairs is None else pairs[:, tokens],
            n_written,
            self._options(),
        )
        losses = {}
        if n_written:
            state = state._replace(keys=out.keys, codes=out.codes, rows=out.rows)
            losses = {"value_loss": out.value_loss, "address_loss": out.address_loss}
        new = slice(n_waiting - first, None)
        slots = out.slots[:, new].unflatten(-1, (self.config.n_heads, self.config.top_k))
        return out.read[:, new], slots, state, losses

    def _advance_nothing(
        self,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        pairs: Tensor | None,
        state: FastWeightState,
        n_waiting: int,
        n_written: int,
    ) -> tuple[Tensor, Tensor, FastWeightState, dict[str, Tensor]]:
        """The same where the call's last chunk only reads and the state does not go on: no table is made."""
        out = read_and_forget(q, v, gate, *self.tables(state), pairs, self._options())
        losses = {"value_loss": out.value_loss, "address_loss": out.address_loss}
        return out.read[:, n_waiting:], out.slots[:, n_waiting:], state, losses

    def _advance_tables(
        self,
        q: Tensor,
        v: Tensor,
        gate: Tensor | None,
        pairs: Tensor | None,
        state: FastWeightState,
        n_waiting: int,
        n_written: int,
    ) -> tuple[Tensor, Tensor, FastWeightState, dict[str, Tensor]]:
        """The same on whole tables, through ``write`` and ``read_memory``."""
        keys, values = self.tables(state)
        rows, slots, losses = [], [], {}
        n_each = self.config.chunk_size if self.one_chunk_per_write else max(n_written, 1)
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
        codes, no_rows = empty_rows(values)
        state = state._replace(keys=keys, values=values, codes=codes, rows=no_rows)
        return torch.cat(rows, dim=1), torch.cat(slots, dim=1), state, losses

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
            # a histogram of four bins; while training only, as one token at a time is decoded in microseconds
            for percent in GATE_LEVELS if self.training else ():
                aux[f"gate_above_{percent}"] = (gate.detach() > percent / 100).float().mean()
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
    in_order = ascending(slots.flatten(1))
    n_reads = in_order.shape[1]
    # By runs of equal slots, not by a histogram: one token's reads must not cost a pass over all N.
    is_first = torch.ones_like(in_order, dtype=torch.bool)
    is_first[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    run = is_first.cumsum(1) - 1
    counts = torch.zeros_like(in_order).scatter_add_(1, run, torch.ones_like(in_order)).gather(1, run)
    distinct = is_first.sum(1).float()
    return {
        "slot_coverage": (distinct / n_slots).mean(),
        "slot_collisions": (1 - distinct / n_reads).mean(),
        # sum_u p_u log(p_u N), with p_u the share of slot u: the mean of log(p N) over the reads.
        "slot_kl_uniform": torch.log(counts.float() * (n_slots / n_reads)).mean(),
    }
