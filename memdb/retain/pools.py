"""Two pools and hand-over by age (LiveVLM, version 2 of arXiv 2505.15269).

The short-term pool is the newest frames, whole, first in first out. What is older than they are is handed over to the
long-term pool, where a retainer keeps its budget; a token never comes back. So what was just seen is there in full
whatever it seems to be worth, and nothing competes for the budget before more than a moment has looked at it.

Any bounded retainer takes `short_frames`; with none there is one pool. The paper does not say how large its pool is:
32 frames in recipe `livevlm`, beside the budget and not inside it, are ours.

A token's age is its position in the stream. So the encoder and, hours later, a question tell the pools apart by what a
keep set says anyway, and what was forgotten of one pool draws nothing back out of the other.
"""

from __future__ import annotations

from memdb.retain.view import LayerView


def short_from(end: int, short_frames: int, frame_tokens: int) -> int:
    """The position from which on tokens are short-term, of a stream that has come to `end` (one past its last)."""
    return end - short_frames * frame_tokens


def short_tokens(view: LayerView, short_frames: int) -> int:
    """How many of a view's tokens are short-term: its last ones, as many in every layer.

    The newest frame is whole, so that it tells how many tokens a frame has. Where the host knows nothing the device is
    asked.
    """
    if not short_frames or not view.tokens:
        return 0
    known = view.stream
    if known is not None:
        return known.tokens_from(short_from(known.end, short_frames, known.frame_tokens))
    newest = (view.frame == view.frame[..., -1:]) & ~view.prototype  # (..., T)
    end, frame_tokens = int(view.position.max()) + 1, int(newest.sum(-1).max())
    counts = (view.position >= short_from(end, short_frames, frame_tokens)).sum(-1)  # (...)
    short = int(counts.max())
    assert bool((counts == short).all()), "the newest frames are whole in all layers"
    return short
