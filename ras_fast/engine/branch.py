"""A branch of a batch: one sequence of each query, a token longer with each step. What slots and places are: batch.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ras_fast.decoding import next_tokens
from ras_fast.engine.answer import Sequence
from ras_fast.engine.workspace import Feed, Workspace

SCRATCH, ANSWER = 0, 1  # the branches of a row


class Branch:
    """One sequence of each query: the answers, or the contexts, or the starts of answers that the risk is read from.

    kind: SCRATCH or ANSWER. sequences: one per row; None where a row has none. feed: the tokens that the next forward is fed.
    lengths: how many of them are each row's own, the last ones.
    ends: for each row, how many slots from the boundary of scratch and prefix its sequence reaches after the next feed: an
        answer upwards, over the prefix, a scratch sequence downwards; 0 for rows that are fed nothing.
    states, logits: of the first ``recorded`` steps, each [B, d] and [B, V].
    """

    def __init__(
        self,
        kind: int,
        sequences: list[Sequence | None],
        feed: Feed,
        lengths: list[int],
        ends: list[int],
        recorded: int,
        every: int,
    ):
        self.kind, self.sequences, self.feed, self.lengths, self.ends = kind, sequences, feed, lengths, ends
        self.recorded, self.states, self.logits = recorded, [], []
        self._steps = [0 if own is None else len(own.tokens) for own in sequences]
        self._recent: list[Tensor] = []
        self._every = every

    @property
    def width(self) -> int:
        """Tokens per row of the next feed."""
        return self.feed.ids.shape[1]

    @property
    def live_ends(self) -> set[int]:
        """`ends` of the rows that still need what they are fed."""
        rows = zip(self.ends, self.sequences, strict=True)
        return {end for end, own in rows if end and (own is None or not own.done)}

    @property
    def steps(self) -> int:
        """Steps made by the row that has made the most."""
        return max(self._steps)

    @property
    def done(self) -> bool:
        return all(own is None or own.done for own in self.sequences)

    def advance(self, space: Workspace) -> None:
        """To be called once the feed has been through the model: the next feed is the one token after it. Rows that were fed
        nothing stay out."""
        self.ends = [end + (end > 0) for end in self.ends]
        self.lengths = [1] * len(self.ends)
        last = self.feed.places[:, -1:]
        if self.width > 1:
            self.feed = space.feed(self.kind, self.feed.ids[:, :1], last + (last >= 0))
        else:
            last.add_(last >= 0)

    def move(self, space: Workspace) -> None:
        """Goes on in another workspace."""
        self.feed = space.feed(self.kind, self.feed.ids, self.feed.places)

    def take(self, states: Tensor, logits: Tensor) -> None:
        """The next tokens, read from states [B, d] through logits [B, V]."""
        if len(self.states) < self.recorded:
            self.states.append(states.clone())
            self.logits.append(logits.clone())
        own = [sequence for sequence in self.sequences if sequence is not None]
        if all(sequence.plain for sequence in own):
            tokens = next_tokens(own[0].processors, None, logits)
        else:
            rows = zip(self.sequences, logits, self._steps, strict=True)
            tokens = torch.stack([row.argmax() if sequence is None else sequence.choose(row, n) for sequence, row, n in rows])
        self.feed.ids.copy_(tokens.clamp(min=0)[:, None])  # a sequence that is broken goes along until the host sees it
        self._steps = [n + 1 for n in self._steps]
        self._recent.append(tokens)
        if len(self._recent) >= self._every:
            self.sync()

    def sync(self) -> None:
        """Appends the tokens made since the last call to their sequences: the one point where the host waits for the device."""
        if self._recent:
            for sequence, tokens in zip(self.sequences, torch.stack(self._recent, 1).tolist(), strict=True):
                for token in tokens if sequence is not None else ():
                    sequence.append(token)
            self._recent.clear()
