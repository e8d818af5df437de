"""The captions that a question takes: the same parameters whatever retrieves beside them."""

from __future__ import annotations

from dataclasses import dataclass, field

from memdb.schemas.params import at_least, share_or_none


@dataclass(frozen=True)
class TakesCaptions:
    """`caption_tokens`: how many tokens of captions a question reads at most; 0 for none. `beside_tokens`: how many in
    mode `both`, beside blocks; 0 for as many as without them. Ours: a small model is led astray by much text beside KV.

    `relevance`: lambda of maximal marginal relevance, the weight of relevance against novelty (paper: 0.5).
    `words`: captions are relevant by their words, too, and not by their vectors alone; see `joined_relevance`. Ours.
    """

    caption_tokens: int = field(default=0, kw_only=True)
    beside_tokens: int = field(default=0, kw_only=True)
    relevance: float = field(default=0.5, kw_only=True)
    words: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        at_least("retrieve.caption_tokens", self.caption_tokens, 0)
        at_least("retrieve.beside_tokens", self.beside_tokens, 0)
        share_or_none("retrieve.relevance", self.relevance)
