"""What the layers keep for the backward pass, by name; the rest is computed again.

none: everything is kept, except weights gathered over fsdp: those are gathered again. block: only what goes from layer
to layer. attention: also what attention's backward kernel needs of its forward one, so that no attention runs twice.
offload: the same, kept in the host's memory. Attention's `reference` implementation has nothing under these names.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.attention import LSE_NAME, OUTPUT_NAME

REMAT = ("none", "block", "attention", "offload")
_NAMES = [OUTPUT_NAME, LSE_NAME]


def remat(layer: Callable, name: str, *, gathers: bool) -> Callable:
    """`layer`, the body of a scan, under the policy of that name; gathers: whether it gathers weights."""
    policies = jax.checkpoint_policies
    if name == "none":
        return jax.checkpoint(layer, policy=_all_but_gathered, prevent_cse=False) if gathers else layer
    if name == "offload":
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=_NAMES,
            offload_src="device", offload_dst="pinned_host",
        )  # fmt: skip
    else:
        policy = policies.save_only_these_names(*(_NAMES if name == "attention" else ()))
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)


def _all_but_gathered(primitive, *_, **parameters) -> bool:
    """Weights are gathered by a linear function that only says where its result lies (`Placement.gather`)."""
    body = parameters["callee"].jaxpr.eqns if primitive.name == "linear_call" else ()
    return primitive.name != "sharding_constraint" and [e.primitive.name for e in body] != ["sharding_constraint"]
