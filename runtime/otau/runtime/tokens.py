"""Token ids: of the right shape, and rows of the policy's token table."""

from __future__ import annotations

import numpy as np

from otau.runtime.errors import UsageError
from otau.runtime.messages import excerpt

__all__ = ["check_range", "checked_ids", "checked_tokens"]


def checked_tokens(tokens: np.ndarray, masks: np.ndarray | None, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids (B, L) int64 and masks (B, L) bool that were given.

    Args:
        tokens: Ids of the whole prompt.
        masks: True for a real token.
        size: B, as the states have it.

    Raises:
        UsageError: Shapes or dtypes are others, or masks are missing.
    """
    if masks is None:
        raise UsageError("token ids are given without their masks", expected="token_masks (B, L) bool")
    fits = tokens.ndim == 2 and len(tokens) == size and tokens.shape == masks.shape
    if not fits or tokens.dtype.kind not in "iu" or masks.dtype != np.bool_:
        raise UsageError(
            "token ids and masks do not fit each other or the state",
            expected=f"integers and bools, both ({size}, L)",
            got=f"{tokens.dtype} {tokens.shape} and {masks.dtype} {masks.shape}",
        )
    return tokens, masks


def checked_ids(ids: np.ndarray, vocab: int, where: str) -> np.ndarray:
    """Token ids (n,) int64 of a text inside the prefix.

    Raises:
        UsageError: Another shape or dtype, or an id that is not in the token table.
    """
    ids = np.asarray(ids)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise UsageError(
            "token ids around the state have the wrong shape or dtype",
            where=where,
            expected="integers (n,)",
            got=f"{ids.dtype} {ids.shape}",
        )
    return check_range(ids, vocab, where)


def check_range(ids: np.ndarray, vocab: int, where: str, masks: np.ndarray | None = None) -> np.ndarray:
    """Token ids as int64; a graph would count a negative one from the end, and fail on one too large.

    Args:
        ids: Of any shape, also at masked positions within the table: the graph looks those up, too.
        vocab: Rows of the policy's token table.
        where: Named in errors.
        masks: (B, L) bool; where given, every row must have a real token.

    Raises:
        UsageError: An id is outside 0..vocab - 1, or a row has no real token.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= vocab):
        raise UsageError(
            "a token id is not in the policy's token table",
            where=where,
            expected=f"0..{vocab - 1}",
            got=int(ids.min() if ids.min() < 0 else ids.max()),
            fix="use the tokenizer that the policy was trained with",
        )
    if masks is not None and not masks.any(axis=-1).all():
        raise UsageError(
            "a prompt has no token",
            where=where,
            expected="at least one real token a prompt",
            got=f"{excerpt(masks.sum(axis=-1))} real tokens",
        )
    return ids.astype(np.int64)
