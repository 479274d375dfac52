"""Where a digit stands: the Abacus embedding, and the embeddings it is compared with.

Read it beside "Transformers Can Do Arithmetic with the Right Embeddings" (McLeish et
al. 2024, arXiv 2405.17399), section 3 and Figure 2. It needs torch and nothing else:
copy this file into your own project, nothing of ours comes with it.

    >>> is_digit = torch.tensor([[1, 1, 1, 0, 1, 1, 0, 1, 1, 1]])       # 321+54=861
    >>> digit_positions(is_digit.bool())
    tensor([[1, 2, 3, 0, 1, 2, 0, 1, 2, 3]])

The numbers are written least significant digit first, so position 1 is always the
units, position 2 the tens: equal positions are the digits that belong in one column.

Glossary
    position      place of a digit within its own number, from 1; 0 for other tokens
    offset        added to all positions of a problem in training      paper: i
    max_k         the largest offset                                   paper: k
    rotation      rotary embedding: queries and keys turned by their position
    B, T, D, H    batch, tokens, width, heads

Not here: the attention that uses bias and rotation (looped.py). `python abacus.py`
prints the positions under a line of digits.
"""

import torch
from torch import Tensor, nn


# --------------------------------------------------------------------------------------
# 1. The position of each digit within its number
# --------------------------------------------------------------------------------------


def is_one_of(input_ids: Tensor, tokens: tuple) -> Tensor:
    """Where a token is one of these ids: (B, T) int64 -> (B, T) bool."""
    # Comparisons with Python integers: nothing is copied to a GPU, or waits for it.
    return sum(input_ids == token for token in tokens) > 0


def digit_positions(is_digit: Tensor, offset: Tensor | int = 0,
                    is_start: Tensor | None = None) -> Tensor:
    """Place of every digit in its own run of digits, counted from 1; 0 for the others.

    Source: section 3, "Abacus Embeddings". `321+54=861` -> 1 2 3 0 1 2 0 1 2 3

    Arguments:  is_digit  (B, T) bool, True where the token is a digit
                offset    int, or int64 that broadcasts to (B, T): added to the digits
                is_start  (B, T) bool: tokens that stand right before the units of a
                          number, at offset + 0; or None
    Returns:    (B, T) int64
    """
    index = torch.arange(is_digit.shape[-1], device=is_digit.device).expand_as(is_digit)
    # The distance to the last token that was no digit is the answer. A running maximum
    # carries the index of that token along; -1 stands for "none so far", which makes a
    # number at the very start of the line count from 1 like every other.
    last_other = torch.where(is_digit, -1, index).cummax(dim=-1).values        # (B, T)
    positions = torch.where(is_digit, index - last_other + offset, 0)
    return positions if is_start is None else torch.where(is_start, offset, positions)


# Operands, answer and steps to it: products of 7 digits by 7 take 15 of them.
MOST_NUMBERS = 16


def number_index(is_digit: Tensor, is_end: Tensor) -> Tensor:
    """Which number of its problem each token belongs to, from 0 to MOST_NUMBERS - 1.

    An operator belongs to the number that follows it, an end token to the next problem:
    `321+54=861$7+8=` -> 0 0 0 1 1 1 2 2 2 2 0 0 1 1 2

    Arguments:  is_digit, is_end  (B, T) bool: the digits, the end tokens of answers
    Returns:    (B, T) int64
    """
    separators = (~is_digit & ~is_end).cumsum(dim=-1)
    # What had been counted by the last end token is taken off: a problem starts at 0.
    index = separators - (separators * is_end).cummax(dim=-1).values
    return index.clamp(max=MOST_NUMBERS - 1)


# --------------------------------------------------------------------------------------
# 2. Abacus: one learned row for each position
# --------------------------------------------------------------------------------------


class Abacus(nn.Module):
    """A learned vector for the place of each digit in its number.

    Source: section 3. The signature is the official module's, so that a copy swaps in.

    Why it works: to add two numbers, a model has to find the two digits of one column.
    With Abacus these carry the same vector, wherever the numbers stand in the text. Why
    it reaches beyond the training lengths: in training a random offset is added to all
    positions, so that rows far beyond the longest training number are trained too.

    # TRAP: no row past (longest training number + max_k) is ever trained, whatever the
    # size of the table.

    Arguments:
        digit_tokens    the token ids of the digits, for example range(10)
        embedding_dim   D
        max_seq_length  rows of the table; position + offset must stay below it
        max_k           largest offset in training
    Raises:             ValueError for a table too short for max_k
    """

    def __init__(self, digit_tokens, embedding_dim: int, max_seq_length: int = 1024,
                 max_k: int = 99):
        super().__init__()
        # A tuple and not a buffer: it survives `meta`, conversions and any state dict.
        self.digit_tokens = tuple(map(int, digit_tokens))
        if not 0 <= max_k <= max_seq_length - 2:
            raise ValueError(f"max_k is {max_k}, but must be from 0 to max_seq_length "
                             f"- 2 = {max_seq_length - 2}, so that each row exists")
        self.embedding = nn.Embedding(max_seq_length, embedding_dim)
        self.max_k = max_k

    def forward(self, input_ids: Tensor, offset: Tensor | int | None = None,
                is_start: Tensor | None = None) -> Tensor:
        """Look up the row of each digit; tokens that are no digits share row 0.

        Arguments:
            input_ids  (B, T) int64
            offset     int, or int64 that broadcasts to (B, T), within 0..max_k. Left
                       out: one random offset for the whole batch in training, as the
                       paper's runs had, and 0 in evaluation
            is_start   (B, T) bool, see digit_positions; or None
        Returns:       (B, T, D)
        Raises:        ValueError when a number runs past the table
        """
        if offset is None and self.training:
            # DIFFERS: section 3 draws from 1..k; the authors' runs drew from 0..k, and
            # so do we. The draw stays a tensor: torch.compile would build one graph for
            # each Python integer.
            offset = torch.randint(self.max_k + 1, (), device=input_ids.device)
        offset = 0 if offset is None else offset
        is_digit = is_one_of(input_ids, self.digit_tokens)
        rows = digit_positions(is_digit, offset, is_start)                     # (B, T)
        table = self.embedding.num_embeddings
        # Looking at the rows makes a GPU wait: there, only where they may be too many.
        look = rows.device.type == "cpu" or rows.shape[-1] + self.max_k >= table
        if look and not torch.compiler.is_compiling() and rows.max() >= table:
            raise ValueError(
                f"digits stand at positions up to {rows.max()} (offset included), but "
                f"the Abacus table ends at {table - 1}: use a larger max_seq_length, a "
                f"smaller offset, or shorter numbers")
        return self.embedding(rows)                                         # (B, T, D)


def disjoint_offsets(contexts: int, problems: int, digits: int, max_offset: int,
                     generator: torch.Generator) -> Tensor:
    """Random offsets for several problems in one context, no position used twice.

    Each problem covers the positions offset + 1 .. offset + digits, and these ranges do
    not overlap. With one problem this is the plain uniform offset.

    # DIFFERS: the paper trains on one problem at a time. Then positions that meet in
    # one context are never farther apart than a training number is long, and nothing
    # teaches the attention to tell farther ones from its target: on a longer number it
    # strays. Short problems side by side, far apart in position, teach exactly that.

    Arguments:  digits      the longest number of any problem, its answer included
                max_offset  the largest offset
                generator   on the CPU
    Returns:    (contexts, problems) int64, within 0..max_offset
    Raises:     ValueError when the ranges do not fit
    """
    free = max_offset - (problems - 1) * digits
    if free < 0:
        raise ValueError(f"{problems} disjoint ranges of {digits} positions need a "
                         f"largest offset of {(problems - 1) * digits} or more, not "
                         f"{max_offset}")
    # Place the ranges as if they had no width, in order, then make room for each. A
    # random order decides which problem gets which range.
    starts = torch.randint(free + 1, (contexts, problems), generator=generator)
    starts = starts.sort(dim=1).values + digits * torch.arange(problems)
    order = torch.rand(contexts, problems, generator=generator).argsort(dim=1)
    return starts.gather(1, order)


# --------------------------------------------------------------------------------------
# 3. FIRE: a learned function of the distance, added to the attention logits
# --------------------------------------------------------------------------------------


class FIRE(nn.Module):
    """Functional interpolation for relative positions: a small MLP of the distance.

    Source: Li et al. 2023 (arXiv 2310.04418), equation 8; in the paper, section 3. With
    psi(x) = log(c x + 1), query i and key j:

        bias(i, j) = mlp( psi(i - j) / psi(max(i, L)) ),    L = init_L x L_multiplier

    so that the argument stays in 0..1 at every length. The parameters are named as in
    the official module, so that its weights load.

    In torch's own layers the bias goes into `src_mask`, a matrix for each row and head:

        mask = torch.full((T, T), -torch.inf).triu(1)                          # causal
        mask = (mask + fire(T, x.device)).expand(B, H, T, T).reshape(B * H, T, T)
        y = encoder_layer(x, src_mask=mask)

    # TRAP: without gradients these layers take a fast path in evaluation that turns a
    # float mask with -inf into NaN: torch.backends.mha.set_fastpath_enabled(False).

    Arguments:
        num_heads  H: one bias for each head
        mlp_width  hidden units
        init_c     initial c: how early the logarithm flattens
        init_L     length below which distances are not normalised by the position
        eps        keeps the quotient finite should c or L become 0
    """

    def __init__(self, num_heads: int, mlp_width: int = 32, init_c: float = 0.1,
                 init_L: float = 512.0, eps: float = 1e-6):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, mlp_width), nn.ReLU(),
                                 nn.Linear(mlp_width, num_heads))
        self.c = nn.Parameter(torch.tensor(init_c))
        self.init_L = nn.Parameter(torch.tensor(init_L), requires_grad=False)
        self.L_multiplier = nn.Parameter(torch.tensor(1.0))
        self.eps = eps

    def forward(self, seq_length: int, device: torch.device | str) -> Tensor:
        """The bias of query i and key j in entry [0, h, i, j]: (1, H, T, T). The mask
        is not included; j > i gets the bias of |i - j|."""
        # Always float32: whole numbers of bfloat16 end at 256.
        position = torch.arange(seq_length, device=device, dtype=torch.float32)
        distance = (position[:, None] - position[None, :]).abs()               # (T, T)
        c, threshold = self.c.abs().float(), (self.L_multiplier * self.init_L).abs()
        longest = torch.maximum(position, threshold.float())[:, None]          # (T, 1)
        fraction = torch.log1p(c * distance) / (torch.log1p(c * longest) + self.eps)
        fraction = fraction.to(self.mlp[0].weight.dtype)[..., None]
        return self.mlp(fraction).permute(2, 0, 1)[None]                 # (1, H, T, T)


# --------------------------------------------------------------------------------------
# 4. What else the paper compares with: learned absolute positions, and rotation
# --------------------------------------------------------------------------------------


class LearnedPositions(nn.Module):
    """A learned vector for each place in the line: the classical absolute embedding."""

    def __init__(self, embedding_dim: int, max_seq_length: int = 1024):
        super().__init__()
        self.embedding = nn.Embedding(max_seq_length, embedding_dim)

    def forward(self, input_ids: Tensor, *_) -> Tensor:
        """(B, T) -> (T, D), the same for every row. ValueError past the table."""
        if input_ids.shape[1] > self.embedding.num_embeddings:
            raise ValueError(
                f"the line has {input_ids.shape[1]} tokens, but the table of learned "
                f"positions has {self.embedding.num_embeddings} rows: use a larger "
                f"max_seq_length or shorter numbers")
        return self.embedding.weight[:input_ids.shape[1]]


class Segments(nn.Module):
    """A learned vector for each number of a problem: operands, answer, steps to it.

    # DIFFERS: neither the paper nor its code has it. The README says what it buys.
    """

    def __init__(self, digit_tokens, end_token: int, embedding_dim: int):
        super().__init__()
        self.digit_tokens, self.end_token = tuple(digit_tokens), end_token
        self.embedding = nn.Embedding(MOST_NUMBERS, embedding_dim)

    def forward(self, input_ids: Tensor, *_) -> Tensor:
        """(B, T) -> (B, T, D)"""
        is_digit = is_one_of(input_ids, self.digit_tokens)
        return self.embedding(number_index(is_digit, input_ids == self.end_token))


def rotary_angles(positions: Tensor, head_width: int, base: float = 10000.0):
    """Cosine and sine of each position's rotation angles, for `rotate`.

    Source: Su et al. 2021 (arXiv 2104.09864), equation 15: pair p of a head turns by
    position x base^(-2p / head_width). positions (B or 1, T) int64; returns two tensors
    (B or 1, 1, T, head_width / 2), float32.
    """
    pair = torch.arange(head_width // 2, device=positions.device, dtype=torch.float32)
    frequencies = base ** (-2.0 * pair / head_width)
    angles = positions[:, None, :, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn each pair (x[p], x[p + half]) of a head by its angle, from `rotary_angles`:
    x (B, H, T, head_width) -> the same. The product of a query turned by position i and
    a key turned by position j depends on i - j alone."""
    cos, sin = (angle.to(x.dtype) for angle in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


# --------------------------------------------------------------------------------------
# A worked example
# --------------------------------------------------------------------------------------


def main() -> None:
    """Print the worked example."""
    line = "321+54=861"
    ids = torch.tensor([[ord(character) for character in line]])
    digits = [ord(digit) for digit in "0123456789"]
    is_digit = is_one_of(ids, digits)
    positions, rows = digit_positions(is_digit), digit_positions(is_digit, offset=40)
    print("123 + 45 = 168 as the model reads it, least significant digit first:\n")
    print("    token          ", "   ".join(line))
    print("    position       ", "   ".join(str(p) for p in positions[0].tolist()))
    print("    row, offset 40 ", "".join(f"{row:<4}" for row in rows[0].tolist()))
    print("\nDigits of one column share a row.")


if __name__ == "__main__":
    main()
