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
    row           position + offset: the row of the table that is looked up
    max_k         the largest offset                                   paper: k
    rotation      rotary embedding: queries and keys turned by their position
    B, T, D, H    batch, tokens, width, heads

Not here: the attention that uses bias and rotation (looped.py). `python abacus.py`
prints the positions under a line of digits; then section 5, on its own, teaches a plain
torch transformer to add numbers of 100 digits, in a few minutes.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# --------------------------------------------------------------------------------------
# 1. The position of each digit within its number
# --------------------------------------------------------------------------------------


def is_one_of(input_ids: Tensor, tokens) -> Tensor:
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
                          number, such as "=", at offset + 0; or None
    Returns:    (B, T) int64
    """
    index = torch.arange(is_digit.shape[-1], device=is_digit.device).expand_as(is_digit)
    # The distance to the last token that was no digit is the answer. A running maximum
    # carries the index of that token along; -1 stands for "none so far", which makes a
    # number at the very start of the line count from 1 like every other.
    last_other = torch.where(is_digit, -1, index).cummax(dim=-1).values        # (B, T)
    positions = torch.where(is_digit, index - last_other + offset, 0)
    return positions if is_start is None else torch.where(is_start, offset, positions)


# Rows of the table of Segments; in a long list the tokens past them share the last.
MOST_NUMBERS = 16


def number_index(is_digit: Tensor, is_end: Tensor) -> Tensor:
    """Which number of its problem each token belongs to, from 0 to MOST_NUMBERS - 1.

    An operator belongs to the number that follows it, an end token to the next problem:
    `321+54=861$7+8=` -> 0 0 0 1 1 1 2 2 2 2 0 0 1 1 2. What is counted is the tokens
    that are no digits: a sign after "=" counts too, and so does each letter of a list.

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

    Source: section 3.1. The signature is the official module's, so that a copy swaps
    in; the released file itself lacks its imports and does not load.

    Why it works: to add two numbers, a model has to find the two digits of one column.
    With Abacus these carry the same vector, wherever the numbers stand in the text. Why
    it reaches beyond the training lengths: in training a random offset is added to all
    positions, so that rows far beyond the longest training number are trained too.

    In your own model, as `Adder` below has it, without other positions:

        x = tokens(ids) + segments(ids) + abacus(ids, offset, is_start=ids == EQUALS)
        x = norm(x)

    Each digit has to be a token of its own. Let the rows start as large as the vectors
    of the tokens; as they come they are N(0, 1). The offsets are those of
    disjoint_offsets in training, and 10 in evaluation.

    # TRAP: a digit that is fed alone, as with a cache of keys and values, counts as the
    # first of its number. Give the whole line.
    # TRAP: no row past (longest training number + max_k) is ever trained, whatever the
    # size of the table.
    # TRAP: row 0 is that of all other tokens, and the rows after it may come to look
    # like it: one run of ours had 10% of the sums right at an offset of 5, and all from
    # 6 on. So give an offset in evaluation, too: `score` below has 10.

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
        # A tuple and not a buffer, which a conversion or a state dict could change.
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
            # each Python integer. (For far pairs give offsets of disjoint_offsets.)
            offset = torch.randint(self.max_k + 1, (), device=input_ids.device)
        offset = 0 if offset is None else offset
        is_digit = is_one_of(input_ids, self.digit_tokens)
        rows = digit_positions(is_digit, offset, is_start)                     # (B, T)
        table = self.embedding.num_embeddings
        # To look at the rows a GPU has to wait, so it looks only at lines so long that
        # they may run past the table.
        look = rows.device.type == "cpu" or rows.shape[-1] + self.max_k >= table
        if look and not torch.compiler.is_compiling() and rows.max() >= table:
            raise ValueError(
                f"digits stand at positions up to {rows.max()} (offset included), but "
                f"the Abacus table ends at {table - 1}: use a larger max_seq_length "
                f"(train.py: --max-positions), a smaller offset, or shorter numbers")
        return self.embedding(rows)                                         # (B, T, D)


def disjoint_offsets(contexts: int, problems: int, digits: int, max_offset: int,
                     generator: torch.Generator) -> Tensor:
    """Random offsets for several problems in one context, no position used twice.

    Each problem covers the positions offset + 1 .. offset + digits, and these ranges do
    not overlap. (A "=" at offset + 0 may meet the last place of the range below, which
    only a carry can reach.) With one problem this is the plain uniform offset.

    # DIFFERS: the paper trains on one problem at a time. Then positions that meet in
    # one context are never farther apart than a training number is long, and nothing
    # teaches the attention to tell farther ones from its target: on a longer number our
    # small models stray. (Why the paper's large ones do not, we do not know.) Short
    # problems side by side, far apart in position, teach exactly that.

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
# 4. What else there is to compare with: learned absolute positions, and rotation
# --------------------------------------------------------------------------------------


class LearnedPositions(nn.Module):
    """A learned vector for each place in the line: the classical absolute embedding, an
    option of the authors' code, and what the second paper uses."""

    def __init__(self, embedding_dim: int, max_seq_length: int = 1024):
        super().__init__()
        self.embedding = nn.Embedding(max_seq_length, embedding_dim)

    def forward(self, input_ids: Tensor, *_) -> Tensor:
        """(B, T) -> (T, D), the same for every row. ValueError past the table."""
        if input_ids.shape[1] > self.embedding.num_embeddings:
            raise ValueError(
                f"the line has {input_ids.shape[1]} tokens, but the table of learned "
                f"positions has {self.embedding.num_embeddings} rows: use a larger "
                f"max_seq_length (train.py: --max-positions) or shorter numbers")
        return self.embedding.weight[:input_ids.shape[1]]


class Segments(nn.Module):
    """A learned vector for each number of a problem: operands, answer.

    # DIFFERS: neither the paper nor its code has it. Without it our small models learn
    # to add on some seeds only.
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
# 5. All of it at work: a plain transformer learns to add
# --------------------------------------------------------------------------------------

# A little of data.py stands here again, so that this file needs no other.
SYMBOLS = "0123456789+=$_"             # "$" ends an answer, "_" fills the line
EQUALS, END, PAD = (SYMBOLS.index(symbol) for symbol in "=$_")
LONGEST, MAX_OFFSET = 20, 110          # digits of a training number; see Abacus


def write_sum(a: int, b: int) -> str:
    """A problem as the model reads it, units first: 123 + 45 is `321+54=861$`."""
    return f"{str(a)[::-1]}+{str(b)[::-1]}={str(a + b)[::-1]}$"


def random_number(digits: int) -> int:
    """A number of exactly so many digits. Half of those of one digit are 0: people do
    ask for 0 + 0."""
    if digits == 1 and random.random() < 0.5:
        return 0
    return random.randrange(10 ** (digits - 1), 10 ** digits)


def to_tokens(lines: list[str]) -> Tensor:
    """Lines as token ids, padded on the right: (B, T) int64."""
    return nn.utils.rnn.pad_sequence(
        [torch.tensor([SYMBOLS.index(symbol) for symbol in line]) for line in lines],
        batch_first=True, padding_value=PAD)


def count_before(token: int, tokens: Tensor) -> Tensor:
    """How many times a token stands before each place of its line: (B, T) -> (B, T)."""
    return (tokens == token).cumsum(dim=1) - (tokens == token).long()


def answer_mask(tokens: Tensor) -> Tensor:
    """True for what follows "=", the end token included: (B, T) -> (B, T) bool."""
    return count_before(EQUALS, tokens) > count_before(END, tokens)


class Adder(nn.Module):
    """A decoder made of one of torch's own layers, which runs twice, with Abacus."""

    def __init__(self, width: int = 64, heads: int = 2, recurrences: int = 2):
        super().__init__()
        self.tokens = nn.Embedding(len(SYMBOLS), width)
        self.abacus = Abacus(range(10), width, max_seq_length=256, max_k=MAX_OFFSET)
        self.segments = Segments(range(10), END, width)
        for table in (self.tokens, self.segments.embedding):
            nn.init.normal_(table.weight, std=width ** -0.5)
        # Rows that start as sines and cosines: one rotation turns each into the next,
        # so that to look one place further is a single thing to learn.
        rows = torch.cat(rotary_angles(torch.arange(256)[None], width, 500.0), dim=-1)
        self.abacus.embedding.weight.data = (2 / width) ** 0.5 * rows[0, 0]
        self.norm, self.recurrences = nn.LayerNorm(width), recurrences
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout=0.0, activation="gelu", norm_first=True,
            batch_first=True)
        self.decoder = nn.Sequential(nn.LayerNorm(width),
                                     nn.Linear(width, len(SYMBOLS)))

    def forward(self, tokens: Tensor, offset: Tensor | int) -> Tensor:
        """(B, T) tokens, and their offsets -> (B, T, V) logits of the next ones."""
        injected = self.norm(self.tokens(tokens) + self.segments(tokens)
                             + self.abacus(tokens, offset, is_start=tokens == EQUALS))
        T, state = tokens.shape[1], torch.zeros_like(injected)
        causal = torch.full((T, T), -torch.inf, device=tokens.device).triu(1)
        for _ in range(self.recurrences):
            state = self.layer(state + injected, causal, is_causal=True)
        return self.decoder(state)


def training_batch(contexts: int, generator: torch.Generator):
    """Contexts of three sums each, at offsets that are far apart: (B, T) tokens, and
    the (B, T) offset of the sum that each belongs to."""
    sums = [write_sum(*(random_number(random.randint(1, LONGEST)) for _ in range(2)))
            for _ in range(3 * contexts)]
    # A long one, one of middle length and a short one together: little padding is left.
    sums.sort(key=len)
    short, middle, long = (sums[n * contexts:(n + 1) * contexts] for n in range(3))
    tokens = to_tokens(["".join(random.sample(three, 3))
                        for three in zip(short, middle, reversed(long))])
    offsets = disjoint_offsets(contexts, 3, LONGEST + 1, MAX_OFFSET, generator)
    return tokens, offsets.gather(1, count_before(END, tokens).clamp(max=2))


def answer_loss(model: nn.Module, tokens: Tensor, offset: Tensor) -> Tensor:
    """Cross entropy of the answer tokens: scalar, in nats."""
    targets = torch.where(answer_mask(tokens), tokens, -100)[:, 1:]
    return F.cross_entropy(model(tokens, offset)[:, :-1].flatten(0, 1),
                           targets.flatten())


@torch.no_grad()
def score(model: nn.Module, digits: int, count: int = 100) -> float:
    """The share of sums of two numbers of so many digits that are right to the end."""
    tokens = to_tokens([write_sum(random_number(digits), random_number(digits))
                        for _ in range(count)])
    # Each token is predicted from the true ones before it. All must be right, so that
    # writing the answer freely, token by token, would score the same.
    said = model(tokens, 10)[:, :-1].argmax(dim=-1)
    asked = answer_mask(tokens)[:, 1:]
    return float(((said == tokens[:, 1:]) | ~asked).all(dim=1).float().mean())


def demonstrate(steps: int = 2000, contexts: int = 32, seed: int = 0) -> nn.Module:
    """Train on sums of at most 20 digits, and show how longer ones get right."""
    random.seed(seed)
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Adder()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, betas=(0.9, 0.98))
    # Up during the first 3% of the steps, down during the last 70%.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(
        1, (step + 1) / (0.03 * steps), (steps - step) / (0.7 * steps)))
    print("   step    loss     right at 20, 40, 60, 80 and 100 digits")
    for step in range(1, steps + 1):
        loss = answer_loss(model, *training_batch(contexts, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 10) == 0:
            shares = "  ".join(f"{score(model, n):7.1%}" for n in (20, 40, 60, 80, 100))
            print(f"{step:>7} {loss:>7.4f}   {shares}", flush=True)
    return model


def main(steps: int = 2000) -> None:
    """Print the positions of a sum, then watch a model learn to add."""
    tokens = to_tokens([write_sum(123, 45)])
    is_digit = is_one_of(tokens, range(10))
    print("123 + 45 = 168 as the model reads it, least significant digit first:\n")
    print("    token          ", "   ".join(write_sum(123, 45)))
    for name, offset in (("position       ", 0), ("row, offset 40 ", 40)):
        rows = digit_positions(is_digit, offset, is_start=tokens == EQUALS)[0]
        print(f"    {name} " + "".join(f"{row:<4}" for row in rows.tolist()))
    print("\nDigits of one column share a row. Now a transformer learns to add, from\n"
          "sums of numbers of at most 20 digits:\n")
    demonstrate(steps)


if __name__ == "__main__":
    main()
