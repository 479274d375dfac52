"""What a problem looks like: the text of each task, and endless batches of it.

Read it beside section 3 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399). It needs torch.

Every number is written least significant digit first, operands and answer alike, with
no spaces; "$" ends the answer and "_" fills the line. The loss, and the score, see the
answer and its end token only (marked ^ below):

    321+54=861$        is 123 + 45 = 168
           ^^^^

    >>> decode(encode("321+54=861$"))
    '321+54=861$'

A digit's token id is the digit itself, so that problems are made as tensors of digits,
on the training device and at any length: no Python integers, and no int64 to overflow.

Glossary
    operand    a number of the question
    lengths    digits of each operand: drawn on the host, the digits on the device
    piece      (digits (N, W), lengths (N,)): N numbers, of which the first `length`
               digits count; a problem is a row of pieces
    context    the line that the model reads: one problem, or several in a row
    B, N, T    contexts, problems, tokens

Not here: offsets and positions (abacus.py), the schedule of batch sizes (train.py).
`python data.py` prints problems with their loss mask under them.
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor

VOCABULARY = "0123456789+=$_"
DIGITS = range(10)
END, PAD = VOCABULARY.index("$"), VOCABULARY.index("_")


def encode(text: str) -> list[int]:
    """Token ids of a text as the model sees it, e.g. "321+54=861" for 123 + 45 = 168.

    Raises ValueError for a character that is no token.
    """
    unknown = sorted(set(text) - set(VOCABULARY))
    if unknown:
        raise ValueError(f"no token for {unknown[0]!r}: the tokens are {VOCABULARY}")
    return [VOCABULARY.index(character) for character in text]


def decode(ids) -> str:
    """The text of token ids, a sequence of integers or a tensor (T,)."""
    return "".join(VOCABULARY[int(token)] for token in ids)


# --------------------------------------------------------------------------------------
# 1. Numbers as digits
# --------------------------------------------------------------------------------------


def random_digits(lengths: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers of exactly the given lengths; no leading zero, hence no zero.

    Source: appendix "Datasets". Column 0 holds the units.

    Arguments:  lengths    (N,) int64, 1..width, on the generator's device
                width      W
    Returns:    (N, W) int64, zero beyond each number's length
    """
    shape, device = (len(lengths), width), lengths.device
    digits = torch.randint(10, shape, generator=generator, device=device)
    first = torch.randint(1, 10, (len(lengths), 1), generator=generator, device=device)
    place = torch.arange(width, device=device)
    digits = torch.where(place == lengths[:, None] - 1, first, digits)
    return digits * (place < lengths[:, None])


def carry_out(column_sums: Tensor) -> Tensor:
    """Which columns hand a carry to the next, all at once instead of one by one.

    A column sum of 10 or more hands one on, one of 8 or less does not, and a 9 passes
    on what it receives. So the carry out of a column is decided by the nearest column
    at or below it whose sum is not 9, and a running maximum finds that column.

    Arguments:  column_sums  (N, W) int64, a digit plus a digit, units in column 0
    Returns:    (N, W) bool
    """
    place = torch.arange(column_sums.shape[-1], device=column_sums.device)
    decider = torch.where(column_sums == 9, -1, place).cummax(dim=-1).values
    decided = column_sums.gather(-1, decider.clamp(min=0)) >= 10
    return decided & (decider >= 0)


# --------------------------------------------------------------------------------------
# 2. Tasks: a short function that returns the pieces of its problems
# --------------------------------------------------------------------------------------


def addition(lengths: Tensor, generator: torch.Generator, width: int,
             long_carries: float = 0.0):
    """N problems `a+b=` and their answers, digits least significant first.

    Arguments:
        lengths       (N, 2) int64: digits of each operand
        width         the largest of them, known to the host
        generator     draws the digits; on the device of `lengths`
        long_carries  share of problems in which columns are made to sum to 9
    Returns:          a list of pieces and literal tokens, in the order of the text
    """
    a = random_digits(lengths[:, 0], width + 1, generator)
    b = random_digits(lengths[:, 1], width + 1, generator)
    if long_carries:
        b = _with_long_carries(a, b, lengths, generator, long_carries)
    carry = carry_out(a + b)
    total = (a + b + carry.roll(1, dims=1)) % 10    # the last column never carries
    longer = lengths.amax(dim=1)
    answer_lengths = longer + carry.gather(1, longer[:, None] - 1)[:, 0]
    return [(a, lengths[:, 0]), "+", (b, lengths[:, 1]), "=",
            (total, answer_lengths), "$"]


def _with_long_carries(a, b, lengths, generator, share: float) -> Tensor:
    # DIFFERS: uniform digits pass a carry on in one column of ten, so that chains of
    # three and more are rare. In a `share` of the problems, columns of b become the
    # 9-complement of a's, each with a chance drawn for that problem: some problems are
    # nines nearly throughout. Off (0) in the paper preset.
    chance = torch.rand(len(a), 1, generator=generator, device=a.device)
    chosen = torch.rand(len(a), 1, generator=generator, device=a.device) < share
    place = torch.arange(a.shape[1], device=a.device)
    in_both = place < lengths.amin(dim=1, keepdim=True)
    nine = torch.rand(a.shape, generator=generator, device=a.device) < chance
    # A complement of 0 would be a leading zero where b ends: leave that digit alone.
    leading_zero = (a == 9) & (place == lengths[:, 1:] - 1)
    return torch.where(chosen & nine & in_both & ~leading_zero, 9 - a, b)


class Task(NamedTuple):
    """How a task is made, how long its answers can be, and what the truth is."""

    generate: Callable       # (lengths, generator, width, ...) -> pieces
    answer_digits: Callable  # lengths (..., 2) -> (...): the most that an answer has
    symbol: str              # between the operands, in the text
    solve: Callable          # two Python integers -> the true answer


TASKS = {
    "addition": Task(addition, lambda lengths: lengths.amax(-1) + 1, "+", int.__add__),
}


# --------------------------------------------------------------------------------------
# 3. Problems in a row: contexts and batches
# --------------------------------------------------------------------------------------


def answer_mask(tokens: Tensor) -> Tensor:
    """True for the tokens after "=" up to and including the end token, (B, T) bool.

    These are the tokens that the model is asked for. Works for several problems in one
    context: a token belongs to an answer when more "=" than ends stand before it.
    """
    def before(symbol):
        is_symbol = (tokens == VOCABULARY.index(symbol)).long()
        return is_symbol.cumsum(dim=1) - is_symbol
    return before("=") > before("$")


def problem_index(tokens: Tensor) -> Tensor:
    """Which problem of its context each token belongs to, from 0: (B, T) int64.

    Example: `1+1=2$3+4=7$__` -> 0 0 0 0 0 0 1 1 1 1 1 1 2 2
    """
    is_end = (tokens == END).long()
    return is_end.cumsum(dim=1) - is_end


def context_tokens(task: str, lengths: Tensor) -> Tensor:
    """The most tokens that contexts can take: lengths (B, m, 2) -> (B,)."""
    # Operands and answer, and one token each for the operator, "=" and the end.
    return (lengths.sum(dim=-1) + TASKS[task].answer_digits(lengths) + 3).sum(dim=-1)


def make_contexts(task: str, lengths: Tensor, generator: torch.Generator, device="cpu",
                  **settings) -> Tensor:
    """Random problems of the given lengths, m to a context, padded on the right.

    Nothing here waits for the device: all shapes follow from `lengths`, on the host.

    Arguments:
        task       a key of TASKS
        lengths    (B, m, 2) int64 on the CPU: the digits of both operands
        generator  a CPU generator; it seeds the one that draws the digits on `device`,
                   so that its state alone repeats everything
        settings   keywords of the task, e.g. long_carries=0.3
    Returns:       tokens (B, T) int64 on `device`
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(device).manual_seed(seed)
    width, total = int(lengths.max()), int(context_tokens(task, lengths).max())
    contexts = len(lengths)
    lengths = lengths.flatten(0, 1).to(device, non_blocking=True)              # (N, 2)
    # Write every piece in columns of its own, PAD where a number is shorter than them,
    pieces = TASKS[task].generate(lengths, on_device, width, **settings)
    wide = torch.cat([_columns(piece, lengths) for piece in pieces], dim=1)
    wide = wide.view(contexts, -1)              # m problems, one after the other
    # then close the gaps: a real token moves left to its rank among the row's real
    # tokens, and all padding goes to one column more, which is dropped.
    real = wide != PAD
    rank = torch.where(real, real.cumsum(dim=1) - 1, total)
    tokens = wide.new_full((contexts, total + 1), PAD).scatter_(1, rank, wide)
    return tokens[:, :total]


def _columns(piece, lengths: Tensor) -> Tensor:
    """The columns (N, W) of a number, or (N, 1) of a literal token such as "+"."""
    if isinstance(piece, str):
        return lengths.new_full((len(lengths), 1), VOCABULARY.index(piece))
    digits, digit_lengths = piece
    place = torch.arange(digits.shape[1], device=digits.device)
    return torch.where(place < digit_lengths[:, None], digits, PAD)


def deal(task: str, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Deal problems to contexts so that all contexts get about equally long.

    Longest problems first, and each round the fullest context gets the shortest of the
    next problems. Within its context a problem's place is random, or else the first
    would be the longest and the model could count on that.

    Arguments:  lengths  (m, B, 2) int64, in any order
    Returns:    (B, m, 2) the same lengths, shortest context first
    """
    problems, contexts = lengths.shape[:2]
    lengths = lengths.flatten(0, 1)
    lengths = lengths[context_tokens(task, lengths[:, None]).argsort(stable=True)]
    *rest, longest = lengths.view(problems, contexts, 2)
    dealt = longest[:, None]                                                # (B, 1, 2)
    for shorter in reversed(rest):
        fullest = context_tokens(task, dealt).argsort(descending=True, stable=True)
        dealt = torch.cat((dealt[fullest], shorter[:, None]), dim=1)
    place = torch.rand(contexts, problems, generator=generator).argsort(dim=1)
    dealt = dealt.gather(1, place[:, :, None].expand_as(dealt))
    return dealt[context_tokens(task, dealt).argsort(stable=True)]


def sample_microbatches(task: str, batch_size: int, microbatch_size: int,
                        max_digits: int, generator: torch.Generator, device="cpu",
                        problems_per_context: int = 1, distractors: bool = False,
                        **settings):
    """Yield a batch in microbatches of similar lengths, so that little padding is left.

    # PAPER: section 3, "Datasets": operand lengths are uniform over 1..max_digits, each
    # independently.
    # DIFFERS: the authors cut batches as they come. Sorting by length first changes no
    # problem; but an offset or depth that is drawn for a microbatch now meets problems
    # of one length, and reaches all lengths over many steps only.

    Arguments:  as for sample_batch
    Yields:     (tokens (B, T), is_answer (B, T) bool) with B <= microbatch_size
    """
    shape = (problems_per_context, batch_size, 2)
    lengths = torch.randint(1, max_digits + 1, shape, generator=generator)
    for part in deal(task, lengths, generator).split(microbatch_size):
        tokens = make_contexts(task, part, generator, device, **settings)
        is_answer = answer_mask(tokens)
        if distractors:
            asked = problem_index(tokens) >= problems_per_context - 1
            noise = torch.randint(10, tokens.shape, generator=generator)
            noise = noise.to(device, non_blocking=True)
            tokens = torch.where(asked | (tokens > 9), tokens, noise)
            is_answer &= asked
        yield tokens, is_answer


def sample_batch(task: str, batch_size: int, max_digits: int,
                 generator: torch.Generator, device="cpu",
                 problems_per_context: int = 1, distractors: bool = False,
                 **settings) -> tuple[Tensor, Tensor]:
    """A batch of random contexts, sorted by length.

    Arguments:
        task                  a key of TASKS
        batch_size            contexts, B
        max_digits            operands have 1..max_digits digits
        generator             a CPU generator, advanced by the call
        device                where the tensors are made
        problems_per_context  1 as in the paper, or several, one after the other
        distractors           all of them but the last get random digits, and are not
                              asked about
        settings              keywords of the task, e.g. long_carries=0.3
    Returns:                  tokens (B, T) int64, is_answer (B, T) bool
    """
    return next(sample_microbatches(task, batch_size, batch_size, max_digits, generator,
                                    device, problems_per_context, distractors,
                                    **settings))


# --------------------------------------------------------------------------------------
# A worked example
# --------------------------------------------------------------------------------------


def main() -> None:
    """Print the worked example."""
    generator = torch.Generator().manual_seed(0)
    for task in TASKS:
        tokens, is_answer = sample_batch(task, 4, 6, generator)
        print(f"{task}: the text that the model reads, and ^ where it is scored\n")
        for line, mask in zip(tokens, is_answer):
            print("   ", decode(line))
            print("   ", "".join(" ^"[int(m)] for m in mask))
        tokens, _ = sample_batch(task, 1, 6, generator, problems_per_context=3)
        print(f"\n    three to a context:\n    {decode(tokens[0])}")


if __name__ == "__main__":
    main()
