"""The policies: one file a family, and what they share."""

from otau.training.policies.checkpoint import FAMILIES, Checkpoint, build_policy, check_checkpoint
from otau.training.policies.flow_policy import FlowPolicy, PrefixInputs, StateTokens, lay_out
from otau.training.policies.pi0 import Pi0
from otau.training.policies.pi05 import Pi05

__all__ = [
    "FAMILIES",
    "Checkpoint",
    "FlowPolicy",
    "Pi0",
    "Pi05",
    "PrefixInputs",
    "StateTokens",
    "build_policy",
    "check_checkpoint",
    "lay_out",
]
