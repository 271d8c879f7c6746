"""The register of checks: names in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable

from mixers.contract import (
    activity,
    batches,
    causality,
    configuration,
    continuation,
    cost,
    gradients,
    initialisation,
    numerics,
    purity,
    shapes,
    states,
    twin,
)
from mixers.contract.subject import Subject

# Raises ContractError when the mixer breaks what the docstring says, NotApplicable when there's nothing to check.
Check = Callable[[Subject], None]

CHECKS: dict[str, Check] = {
    function.__name__: function
    for function in (
        configuration.config,
        initialisation.reset,
        initialisation.state_dict,
        shapes.shapes,
        purity.purity,
        numerics.determinism,
        numerics.train_eval,
        causality.causality,
        causality.nan_in_future,
        continuation.cuts,
        continuation.initial_state,
        batches.batch,
        batches.full_mask,
        batches.padding,
        gradients.parameter_gradients,
        gradients.finite_differences,
        states.state_growth,
        states.state_scope,
        states.state_storage,
        cost.flops,
        activity.active_parameters,
        numerics.bf16,
        numerics.compile,
        twin.twin,
    )
}
