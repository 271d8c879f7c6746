"""Evaluation on one split, under the experiment's state protocol."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from experiments.backbone import Backbone, BackboneState
from experiments.config import StateConfig
from experiments.device import Compute
from experiments.tasks.base import IGNORE, Batch, Split, Task


@torch.no_grad()
def evaluate(
    model: Backbone, task: Task, split: Split, state_protocol: StateConfig, batch_size: int, compute: Compute
) -> dict[str, float]:
    """Metrics of ``split`` by full name, such as ``select/accuracy``.

    Every batch starts from a fresh state, unless ``reset_between_samples`` is off: then the state goes on to the next
    batch of the same size. With ``reads = n`` each batch is read n times, the state carried; the last read is scored.
    """
    was_training = model.training
    model.eval()
    scorer = task.scorer(split)
    state: BackboneState | None = None
    last_size = 0
    for batch in task.eval_batches(split, batch_size):
        if state_protocol.reset_between_samples or batch.tokens.shape[0] != last_size:
            state = None
        last_size = batch.tokens.shape[0]
        keep = state_protocol.reads > 1 or not state_protocol.reset_between_samples
        tokens = torch.from_numpy(batch.tokens).to(compute.device)
        for _ in range(state_protocol.reads):
            with compute.autocast():
                out = model(tokens, state, return_state=keep)
            state = out.state
        nll, correct = score_positions(model, out.hidden, batch, compute)
        scorer.update(batch, nll, correct)
    model.train(was_training)
    return {f"{split}/{name}": value for name, value in scorer.result().items()}


def score_positions(
    model: Backbone, hidden: torch.Tensor, batch: Batch, compute: Compute
) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood in nats (B,T) and whether the argmax is right (B,T), zeros where not scored."""
    targets = torch.from_numpy(batch.targets).to(compute.device)
    scored = targets != IGNORE
    with compute.autocast():
        logits = model.logits(hidden[scored])
    wanted = targets[scored]
    nll = F.cross_entropy(logits.float(), wanted, reduction="none")
    all_nll = torch.zeros(targets.shape, device=compute.device)
    all_correct = torch.zeros(targets.shape, dtype=torch.bool, device=compute.device)
    all_nll[scored] = nll
    all_correct[scored] = logits.argmax(-1) == wanted
    return all_nll.cpu().numpy(), all_correct.cpu().numpy()
