"""How rows of different lengths are laid out for the model: which ones together, and what they share."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def token_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows into micro-batches whose padded size, rows × longest row, is at most `budget` tokens.

    Rows go by descending length, equal lengths in their given order, each into the current batch while it
    fits: as few batches as the order by length allows, little padding, and the largest batch first, so that a
    run that does not fit into memory fails at once. A row longer than the budget gets a batch of its own.

    Returns:
        Indices into `lengths`, each exactly once. The same arguments always give the same batches.

    Raises:
        ValueError: a budget below 1, or a negative length.
    """
    _require_lengths(lengths, budget=budget)
    batches: list[list[int]] = []
    longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and (len(batches[-1]) + 1) * longest <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
            longest = lengths[i]
    return batches


def even_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split rows into the fewest batches of at most `budget` tokens that longest-first balancing finds.

    Each row goes to the batch with the fewest tokens so far, the longest row first (LPT; Graham 1969): batches of about
    one size, the largest one first. For rows that are laid end to end, into one pack or into micro-batches of packs;
    padded ones want `token_batches`. A row longer than the budget gets a batch of its own.

    Returns:
        Indices into `lengths`, each exactly once. The same arguments always give the same batches.

    Raises:
        ValueError: a budget below 1, or a negative length.
    """
    _require_lengths(lengths, budget=budget)
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    single = [[i] for i in order if lengths[i] > budget]
    rest = order[len(single) :]
    long = sum(2 * lengths[i] > budget for i in rest)  # no two of these share a batch
    least = -(-sum(lengths[i] for i in rest) // budget)
    for count in range(max(least, long, 1), len(rest) + 1):
        batches: list[list[int]] = [[] for _ in range(count)]
        tokens = [0] * count
        for i in rest:
            emptiest = tokens.index(min(tokens))
            batches[emptiest].append(i)
            tokens[emptiest] += lengths[i]
        if max(tokens) <= budget:
            by_size = sorted(range(count), key=lambda b: -tokens[b])
            return single + [batches[b] for b in by_size if batches[b]]
    return single


def common_prefix(rows: Sequence[Sequence[int]], *, keep: int = 1) -> int:
    """The number of leading tokens that all rows share, while each keeps at least `keep` tokens after them.

    So a prefix can be computed once for all rows, and the model still has a token of each row to predict
    from. 0 when there is no row.

    Raises:
        ValueError: a negative `keep`, or a row shorter than it.
    """
    if keep < 0:
        raise ValueError(f"keep is {keep}; expected 0 or more")
    for i, row in enumerate(rows):
        if len(row) < keep:
            raise ValueError(f"row {i} has {len(row)} tokens; expected at least {keep}, which are to be kept")
    if not rows:
        return 0
    first, limit = rows[0], min(map(len, rows)) - keep
    return next((t for t in range(limit) if any(row[t] != first[t] for row in rows)), limit)


def _require_lengths(lengths: Sequence[int], **most: int) -> None:
    for name, tokens in most.items():
        if tokens < 1:
            raise ValueError(f"{name} is {tokens} tokens; expected 1 or more")
    if any(length < 0 for length in lengths):
        raise ValueError(f"row {min(range(len(lengths)), key=lengths.__getitem__)} has a negative length")
