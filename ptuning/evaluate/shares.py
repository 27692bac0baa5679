"""Which of several processes answers which rows."""

from collections.abc import Sequence


def deal_rows(lengths: Sequence[int], num_shares: int) -> list[list[int]]:
    """Return the row numbers of each share, ascending: like numbers of rows, like lengths.

    The longest rows are dealt first, back and forth. The same for the same lengths everywhere.

    >>> deal_rows([5, 1, 9, 5, 7], 2)
    [[1, 2, 3], [0, 4]]
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for place, row in enumerate(longest_first):
        turn, seat = divmod(place, num_shares)
        shares[seat if turn % 2 == 0 else num_shares - 1 - seat].append(row)
    return [sorted(share) for share in shares]
