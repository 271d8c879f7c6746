"""Declared FLOPs against those that torch counts."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mixers.contract.errors import ContractError, NotApplicable
from mixers.contract.subject import Subject

CONTEXTS = (0, 3, 11)


def bag_flops(table_shape: Any, index_shape: Any, *_: Any, **__: Any) -> int:
    """A fused gather and weighted sum of J rows of width V is a product (1,J) x (J,V) a bag: torch counts none."""
    return 2 * index_shape[0] * table_shape[1]


BAG_FLOPS = {torch.ops.aten._embedding_bag: bag_flops, torch.ops.aten._embedding_bag_forward_only: bag_flops}


def flops(subject: Subject) -> None:
    """flops_per_token(context) is what torch counts on the readable path for one token after 0, 3, 11 others."""
    mixer = subject.readable(torch.float64)
    if mixer.flops_per_token(CONTEXTS[0]) is None:
        raise NotApplicable("declared as unknown")
    for context in CONTEXTS:
        state = mixer(subject.tokens(mixer, 1, context, torch.float64), return_state=True).state
        with FlopCounterMode(display=False, custom_mapping=BAG_FLOPS) as counter:
            mixer(subject.tokens(mixer, 1, 1, torch.float64), state)
        declared, counted = mixer.flops_per_token(context), counter.get_total_flops()
        if declared != counted:
            raise ContractError(
                f"flops_per_token({context}) declares {declared:,.0f}, torch counts {counted:,}: off",
                position=f"context {context}",
                size=abs(declared - counted),
            )
