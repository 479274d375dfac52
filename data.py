"""What a problem looks like: the text of each task, and endless batches of it.

Read it beside section 3 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399). It needs torch.

Every number is written least significant digit first, operands and answer alike, with
no spaces; "$" ends the answer and "_" fills the line. The loss, and the score, see the
answer and its end token only (marked ^ below):

    321+54=861$        is 123 + 45 = 168
           ^^^^
    21-54=33-$         is 12 - 45 = -33: the sign comes last, like the highest digit
    21*54=045$         is 12 * 45 = 540
    001|0000=0010$     bitwise or of two vectors, one of them all zeros
    B:21,C:7=C,B$      sorts 12 and 7: the answer names them by their letters
    0012-0345=-00333$  the second paper's format, see `fixed_width`

    >>> decode(encode("321+54=861$"))
    '321+54=861$'

A digit's token id is the digit itself, so that problems are made as tensors of digits,
on the training device and at any length: no Python integers, and no int64 to overflow.

Glossary
    operand    a number of the question
    pair       what a cell of the test's grid is made of, and what training draws: the
               digits of both operands, or the most digits and the length of a list
    lengths    digits of each number: drawn on the host, the digits on the device
    piece      (tokens (N, W), lengths (N,)): N numbers, of which the first `length`
               digits count; or a literal token. A problem is a row of pieces
    context    the line that the model reads: one problem, or several in a row
    B, N, T    contexts, problems, tokens
    K          numbers in a question

Not here: offsets and positions (abacus.py), the schedule of batch sizes (train.py).
`python data.py` prints problems with their loss mask under them.
"""

import string
from functools import partial
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# 26 + 26 ASCII letters and the Greek ones: 101 in all, as many as an answer of the
# 100 x 100 grid has digits. They name the numbers of a list, and serve as index hints.
LETTERS = (string.ascii_letters + "αβγδεζηθικλμνξοπρςστυφχψω"
           + "ΑΒΓΔΕΖΗΘΙΚΛΜΝΞΟΠΡΣΤΥΦΧΨΩ")
# What addition needs comes first: a model knows the tokens up to its task's last one.
VOCABULARY = "0123456789+=$_" + "-*| ,:" + LETTERS
DIGITS = range(10)
END, PAD, SPACE = (VOCABULARY.index(symbol) for symbol in "$_ ")
FIRST_LETTER = VOCABULARY.index(LETTERS[0])


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


def add_digits(a: Tensor, b: Tensor) -> Tensor:
    """The digits of a + b, units in column 0: (N, W), (N, W) -> (N, W).

    The sum must fit: the last column is not to carry.
    """
    carry = carry_out(a + b)
    return (a + b + carry.roll(1, dims=1)) % 10


def subtract_digits(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The digits of |a - b|, and whether a < b: (N, W), (N, W) -> (N, W), (N, 1)."""
    # A column of x - y borrows where x < y, and passes a borrow on where x == y: in
    # just these cases the columns of y + (9 - x) carry and pass a carry on.
    negative = carry_out(b + 9 - a)[:, -1:]
    large, small = torch.where(negative, b, a), torch.where(negative, a, b)
    borrow = carry_out(small + 9 - large)
    return (large - small - borrow.roll(1, dims=1).long()) % 10, negative


# --------------------------------------------------------------------------------------
# 2. Tasks: a short function that returns the pieces of its problems
# --------------------------------------------------------------------------------------


def addition(lengths: Tensor, generator: torch.Generator, width: int, **choices):
    """N problems `a+b=` or `a-b=` and their answers, digits least significant first.

    A difference of equal numbers is 0. A negative one ends with its sign, as in the
    authors' data (the text, reversed): the sign is known where the last borrow is.

    Arguments:
        lengths       (N, 2) int64: digits of each operand
        width         the largest of them, known to the host
        generator     draws the digits; on the device of `lengths`
        choices       minus, the share of problems that subtract, and what
                      _second_operand does with a share of them: long_carries,
                      long_borrows, negatives
    Returns:          a list of pieces and literal tokens, in the order of the text
    """
    a = random_digits(lengths[:, 0], width + 1, generator)
    drawn = random_digits(lengths[:, 1], width + 1, generator)
    b, subtract = _second_operand(a, drawn, lengths, generator, **choices)
    place = torch.arange(width + 1, device=a.device)
    leading_zero = (b == 0) & (place == lengths[:, 1:] - 1)
    b = torch.where(leading_zero, drawn, b)
    answer, negative = _solve(a, b, subtract)
    answer_lengths = ((answer != 0) * (place + 1)).amax(dim=1).clamp(min=1)
    return [(a, lengths[:, 0]), ("+", ~subtract), ("-", subtract), (b, lengths[:, 1]),
            "=", (answer, answer_lengths), ("-", negative), "$"]


def fixed_width(lengths: Tensor, generator: torch.Generator, width: int, **choices):
    """The same in the format of "Understanding Addition and Subtraction in
    Transformers" (arXiv 2402.02619): `0123+0456=+00579` and `0012-0345=-00333`, most
    significant digit first, padded with zeros, and the sign before the answer.

    Arguments and result as for `addition`; all lengths are `width`.
    # DIFFERS: the authors' text has no end token; here all tasks have one.
    """
    a, b = (torch.randint(10, (len(lengths), width), generator=generator,
                          device=lengths.device) for _ in range(2))
    b, subtract = _second_operand(a, b, lengths, generator, **choices)
    answer, negative = _solve(F.pad(a, (0, 1)), F.pad(b, (0, 1)), subtract)
    return [(a.flip(1), lengths[:, 0]), ("+", ~subtract), ("-", subtract),
            (b.flip(1), lengths[:, 1]), "=", ("+", ~negative), ("-", negative),
            (answer.flip(1), lengths[:, 0] + 1), "$"]


# What can be done to a share of a task's problems, and the symbol that it needs.
ENRICHMENTS = {"long_carries": "+", "long_borrows": "-", "negatives": "-"}


def _second_operand(a, b, lengths, generator, minus=0.0, long_carries=0.0,
                    long_borrows=0.0, negatives=0.0):
    """Choose the operation of each problem (N,), and enrich what uniform digits lack.

    # DIFFERS: uniform digits pass a carry on in one column of ten, so that chains of
    # three and more are rare. In a share of the problems, columns of b become the
    # 9-complement of a's (to subtract: equal to a's, which passes a borrow on), each
    # with a chance drawn for that problem: some pass nearly throughout. Off in `paper`.
    # The second paper's authors choose 40% of the columns in 40% of the batches, and do
    # not lengthen borrows: they raise digits of b, for more negative differences.
    """
    def draw(*shape):
        return torch.rand(shape, generator=generator, device=a.device)

    def passing(share: float):
        if not share:
            return torch.zeros_like(a, dtype=torch.bool)
        chance, chosen = draw(len(a), 1), draw(len(a), 1) < share
        return chosen & (draw(*a.shape) < chance)

    carries, borrows = passing(long_carries), passing(long_borrows)
    subtract = draw(len(a), 1) < minus
    partner = torch.where(subtract, a, 9 - a)     # with a, it passes on what comes in
    in_both = torch.arange(a.shape[1], device=a.device) < lengths.amin(1, keepdim=True)
    chosen = torch.where(subtract, borrows, carries) & in_both
    b = torch.where(chosen, partner, b)
    if negatives:
        raised = passing(negatives) & subtract & in_both
        b = torch.where(raised, b + (draw(*a.shape) * (10 - b)).long(), b)
    return b, subtract[:, 0]


def _solve(a: Tensor, b: Tensor, subtract: Tensor) -> tuple[Tensor, Tensor]:
    difference, negative = subtract_digits(a, b)
    answer = torch.where(subtract[:, None], difference, add_digits(a, b))
    return answer, negative[:, 0] & subtract


def multiplication(lengths: Tensor, generator: torch.Generator, width: int):
    """N problems `a*b=` and their answers; arguments and result as for `addition`."""
    a, b = (random_digits(n, width, generator) for n in lengths.unbind(1))
    columns = a.new_zeros(len(a), 2 * width)
    for place in range(width):                      # the sums of the school method,
        columns[:, place:place + width] += a * b[:, place:place + 1]
    carry = torch.zeros_like(columns[:, 0])
    for column in columns.unbind(1):                # then its carries, from the units
        column += carry
        carry = column // 10
        column %= 10
    top = columns.gather(1, lengths.sum(dim=1, keepdim=True) - 1)[:, 0]
    answer_lengths = lengths.sum(dim=1) - (top == 0).long()
    return [(a, lengths[:, 0]), "*", (b, lengths[:, 1]), "=", (columns, answer_lengths),
            "$"]


def bitwise_or(lengths: Tensor, generator: torch.Generator, width: int):
    """N problems `a|b=` on vectors of 0 and 1; arguments and result as for `addition`.

    # PAPER: appendix: the shorter vector holds a single 1, the longer one none. Where
    # they are equally long, either may hold it.
    """
    def draw():
        return torch.rand(len(lengths), generator=generator, device=lengths.device)

    in_first = lengths[:, 0] < lengths[:, 1] + (draw() < 0.5)
    spot = (draw() * lengths.amin(dim=1)).long()[:, None]
    place = torch.arange(width, device=lengths.device)
    answer = (place == spot).long()
    a, b = answer * in_first[:, None], answer * ~in_first[:, None]
    return [(a, lengths[:, 0]), "|", (b, lengths[:, 1]), "=",
            (answer, lengths.amax(dim=1)), "$"]


def sorting(lengths: Tensor, generator: torch.Generator, width: int):
    """N problems `A:21,B:7=`: the letters in ascending order of their numbers.

    # PAPER: section 4.3: each number has a letter, from a random place of an alphabet
    # that is a circle; equal numbers keep the order of the question.

    Arguments:  lengths (N, K) int64: digits of each number, 0 where there is none
    Returns:    pieces and literal tokens, as for `addition`
    """
    (count, K), there = lengths.shape, lengths > 0
    numbers = random_digits(lengths.flatten(), width, generator).view(count, K, width)
    start = torch.randint(len(LETTERS), (count, 1), generator=generator,
                          device=lengths.device)
    names = FIRST_LETTER + (start + torch.arange(K, device=start.device)) % len(LETTERS)
    # Sort by units, then stably by tens, and so on; last, by being there at all. That
    # is exact at any length, where the value of a number would overflow.
    order = torch.arange(K, device=start.device).expand(count, K)
    for key in (*numbers.unbind(2), ~there):
        step = key.long().gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, step)
    names_in_order = names.gather(1, order)
    commas = torch.full_like(names, VOCABULARY.index(","))
    answer = torch.stack((names_in_order, commas), dim=2).flatten(1)
    question = []
    for k in range(K):
        question += [(",", there[:, k])] * (k > 0) + [
            (names[:, k:k + 1], there[:, k].long()), (":", there[:, k]),
            (numbers[:, k], lengths[:, k])]
    return [*question, "=", (answer, 2 * there.sum(dim=1) - 1), "$"]


def list_lengths(pairs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Digits of the numbers of lists: (..., 2) -> (..., K), 0 where there is none.

    Each number has 1 to pairs[..., 0] digits, uniformly, and a list pairs[..., 1]
    numbers. Without a generator all numbers are as long as they can be.
    """
    digits, count = pairs[..., :1], pairs[..., 1:]
    place = torch.arange(int(count.max()))
    drawn = digits.expand(*digits.shape[:-1], len(place))
    if generator is not None:
        drawn = 1 + (torch.rand(drawn.shape, generator=generator) * digits).long()
    return drawn * (place < count)


class Task(NamedTuple):
    """How a task is made, how long its problems can be, and how they are written."""

    generate: Callable      # (lengths, generator, width, ...) -> pieces
    tokens: Callable        # lengths (..., K) -> (...): the most that a problem takes
    places: Callable        # digits of an operand -> the most of any of its numbers
    symbols: str            # the tokens besides digits, "=", "$" and "_"
    lengths: Callable = lambda pairs, generator: pairs      # (..., 2) -> (..., K)
    fixed_width: bool = False       # all operands have max_digits digits
    axes: tuple[str, str] = ("digits of the first operand",  # of the test's grid
                             "digits of the second operand")


def _binary_tokens(answer: Callable) -> Callable:
    # Operands and answer, and one token each for the operator, "=" and the end.
    return lambda lengths: lengths.sum(-1) + answer(lengths) + 3


_fixed_tokens = _binary_tokens(lambda lengths: lengths.amax(-1) + 2)
_longer_and_one = _binary_tokens(lambda lengths: lengths.amax(-1) + 1)
TASKS = {
    "addition": Task(addition, _longer_and_one, lambda n: n + 1, "+"),
    "subtraction": Task(partial(addition, minus=1.0), _longer_and_one, lambda n: n,
                        "-"),
    # PAPER: Figure 5: each problem adds or subtracts, with equal chances.
    "both": Task(partial(addition, minus=0.5), _longer_and_one, lambda n: n + 1, "+-"),
    "multiplication": Task(multiplication, _binary_tokens(lambda n: n.sum(-1)),
                           lambda n: 2 * n, "*"),
    "or": Task(bitwise_or, _binary_tokens(lambda n: n.amax(-1)), lambda n: n, "|"),
    "sorting": Task(sorting, lambda n: n.sum(-1) + 5 * (n > 0).sum(-1), lambda n: n,
                    LETTERS, list_lengths, False,
                    ("most digits of a number", "numbers in the list")),
    # The second paper's, arXiv 2402.02619: 3 n + 4 tokens, and ours for the end.
    "add": Task(fixed_width, _fixed_tokens, lambda n: n + 1, "+-", fixed_width=True),
    "sub": Task(partial(fixed_width, minus=1.0), _fixed_tokens, lambda n: n + 1, "+-",
                fixed_width=True),
    # PAPER: two thirds of a mixed model's training are subtractions.
    # DIFFERS: the authors take 80% when it starts from an addition model, here the
    # share is the same; and they give each batch one operation, here each problem.
    "mix": Task(partial(fixed_width, minus=0.66), _fixed_tokens, lambda n: n + 1, "+-",
                fixed_width=True),
}


def vocabulary_size(task: str, index_hints: bool = False, spaces: float = 0.0) -> int:
    """How many tokens of VOCABULARY a model needs, from the first."""
    symbols = "_" + TASKS[task].symbols + LETTERS * index_hints + " " * (spaces > 0)
    return 1 + max(map(VOCABULARY.index, symbols))


# --------------------------------------------------------------------------------------
# 3. Labels: what the second paper says a model computes, digit by digit
# --------------------------------------------------------------------------------------

UNDECIDED = 2       # the paper's U: passes on what comes in from below


def digit_labels(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """The sub-tasks of a + b and of a - b in every column.

    Source: arXiv 2402.02619, section 4. SA, MD and ND are digits. SC is a carry made in
    the column itself; ST, MT and NT are 1 for a carry or borrow, 0 for none, and
    UNDECIDED where it depends on the columns below; SV, MV and NV are what becomes of
    it. S is for sums, M for differences that are not negative, N for negative ones,
    whose operands change places. Digit n of an answer is

        (SA_n + SV_(n-1)) mod 10, (MD_n - MV_(n-1)) mod 10, (ND_n - NV_(n-1)) mod 10

    Arguments:  a, b  (N, W) int64 digits, units in column 0
    Returns:    each label as (N, W) int64
    """
    def three_ways(column_sums: Tensor) -> Tensor:
        decided = (column_sums >= 10).long()
        return torch.where(column_sums == 9, UNDECIDED, decided)

    return {"SA": (a + b) % 10, "SC": (a + b >= 10).long(),
            "ST": three_ways(a + b), "SV": carry_out(a + b).long(),
            "MD": (a - b) % 10, "MT": three_ways(b + 9 - a),
            "MV": carry_out(b + 9 - a).long(),
            "ND": (b - a) % 10, "NT": three_ways(a + 9 - b),
            "NV": carry_out(a + 9 - b).long()}


# The labels of a column that make up the answers of a class: its digit before any
# carry, and what becomes of a carry in it.
CLASS_LABELS = {"S": ("SA", "ST"), "M": ("MD", "MT"), "N": ("ND", "NT")}


def answer_from_labels(kind: str, digit: Tensor, decided: Tensor) -> Tensor:
    """The digits of the answers of a class, by the algorithm that the paper finds.

    Arguments:  kind            "S", "M" or "N"
                digit, decided  (N, W), the two CLASS_LABELS
    Returns:    (N, W + 1), units in column 0. The top digit of a difference is 0, or 9
                if the labels are of one with the other sign
    """
    out = carry_out(torch.where(decided == UNDECIDED, 9, 10 * decided)).long()
    carry = F.pad(out, (1, 0))
    return (F.pad(digit, (0, 1)) + (carry if kind == "S" else -carry)) % 10


def question_class(a: Tensor, b: Tensor, subtract: Tensor) -> list[str]:
    """"S0", "S1", ... of sums, "M0", ... of differences, "N0", ... of negative ones.

    0: no carry or borrow; 1: one that no column passes on; k: the longest runs through
    k - 1 undecided columns, without a cap.

    Arguments:  a, b (N, W) int64 digits, units in column 0; subtract (N,) bool
    """
    labels, negative = digit_labels(a, b), subtract_digits(a, b)[1][:, 0] & subtract
    letters = torch.where(negative, 2, subtract.long()).tolist()
    depths = []
    for decided, out in (("ST", "SV"), ("MT", "MV"), ("NT", "NV")):
        passed = (labels[decided] == UNDECIDED) & (labels[out] == 1)
        place = torch.arange(a.shape[1], device=a.device)
        run = place - torch.where(passed, -1, place).cummax(dim=1).values
        longest = (run * passed).amax(dim=1)
        depths.append(((longest + 1) * labels[out].amax(dim=1)).tolist())
    return [f"{'SMN'[kind]}{depths[kind][row]}" for row, kind in enumerate(letters)]


# --------------------------------------------------------------------------------------
# 4. Problems in a row: contexts and batches
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
    """The most tokens that contexts can take: lengths (B, m, K) -> (B,)."""
    return TASKS[task].tokens(lengths).sum(dim=-1)


def make_contexts(task: str, lengths: Tensor, generator: torch.Generator, device="cpu",
                  index_hints: bool = False, spaces: float = 0.0, **settings) -> Tensor:
    """Random problems of the given lengths, m to a context, padded on the right.

    Nothing here waits for the device: all shapes follow from `lengths`, on the host.

    Arguments:
        task         a key of TASKS
        lengths      (B, m, K) int64 on the CPU: the digits of each number
        generator    a CPU generator; it seeds the one that draws the digits on
                     `device`, so that its state alone repeats everything
        index_hints  write a letter before each digit that tells its place
        spaces       chance of a space before each token of the question
        settings     keywords of the task, e.g. long_carries=0.3
    Returns:         tokens (B, T) int64 on `device`
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(device).manual_seed(seed)
    width, total = int(lengths.max()), int(context_tokens(task, lengths).max())
    contexts = len(lengths)
    lengths = lengths.flatten(0, 1).to(device, non_blocking=True)              # (N, K)
    # Write every piece in columns of its own, PAD where a number is shorter than them,
    pieces = TASKS[task].generate(lengths, on_device, width, **settings)
    if index_hints:
        pieces, total = _with_index_hints(pieces, on_device), 2 * total
    wide = torch.cat([_columns(piece, lengths) for piece in pieces], dim=1)
    if spaces:
        wide, total = _with_spaces(wide, on_device, spaces), 2 * total
    wide = wide.view(contexts, -1)              # m problems, one after the other
    # then close the gaps: a real token moves left to its rank among the row's real
    # tokens, and all padding goes to one column more, which is dropped.
    real = wide != PAD
    rank = torch.where(real, real.cumsum(dim=1) - 1, total)
    tokens = wide.new_full((contexts, total + 1), PAD).scatter_(1, rank, wide)
    return tokens[:, :total]


def _columns(piece, lengths: Tensor) -> Tensor:
    """The columns (N, W) of a number, or (N, 1) of a literal token such as "+", alone
    or with a mask (N,) of the problems that have it."""
    if isinstance(piece, str):
        return lengths.new_full((len(lengths), 1), VOCABULARY.index(piece))
    content, extent = piece
    if isinstance(content, str):
        return torch.where(extent, VOCABULARY.index(content), PAD)[:, None]
    place = torch.arange(content.shape[1], device=content.device)
    return torch.where(place < extent[:, None], content, PAD)


def _with_index_hints(pieces: list, generator: torch.Generator) -> list:
    # Source: Zhou et al. 2024 (arXiv 2402.09371): 12 + 34 may read `f2g1+f4g3=f6g4$`.
    # The same letter marks the same place, from a random start on a circle of letters.
    hinted = []
    for piece in pieces:
        if isinstance(piece, tuple) and isinstance(piece[0], Tensor):
            digits, lengths = piece
            if not hinted:
                start = torch.randint(len(LETTERS), (len(digits), 1),
                                      generator=generator, device=digits.device)
            place = torch.arange(digits.shape[1], device=digits.device)
            letters = FIRST_LETTER + (start + place) % len(LETTERS)
            piece = torch.stack((letters, digits), dim=2).flatten(1), 2 * lengths
        hinted.append(piece)
    return hinted


def _with_spaces(wide: Tensor, generator: torch.Generator, chance: float) -> Tensor:
    # PAPER: appendix, Figure 20: random spaces in the text.
    # DIFFERS: the authors put some into the answer too, where no model can know them.
    is_equals = wide == VOCABULARY.index("=")
    asked = (is_equals.cumsum(dim=1) - is_equals.long() == 0) & (wide != PAD)
    chosen = torch.rand(wide.shape, generator=generator, device=wide.device) < chance
    space = torch.where(asked & chosen, SPACE, PAD)
    return torch.stack((space, wide), dim=2).flatten(1)


def deal(task: str, lengths: Tensor, generator: torch.Generator) -> Tensor:
    """Deal problems to contexts so that all contexts get about equally long.

    Longest problems first, and each round the fullest context gets the shortest of the
    next problems. Within its context a problem's place is random, or else the first
    would be the longest and the model could count on that.

    Arguments:  lengths  (m, B, K) int64, in any order
    Returns:    (B, m, K) the same lengths, shortest context first
    """
    problems, contexts, K = lengths.shape
    lengths = lengths.flatten(0, 1)
    lengths = lengths[context_tokens(task, lengths[:, None]).argsort(stable=True)]
    *rest, longest = lengths.view(problems, contexts, K)
    dealt = longest[:, None]                                                # (B, 1, K)
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
    # independently; so are the most digits and the length of a list to sort.
    # DIFFERS: the authors cut batches as they come. Sorting by length first changes no
    # problem; but an offset or depth that is drawn for a microbatch now meets problems
    # of one length, and reaches all lengths over many steps only.

    Arguments:  as for sample_batch
    Yields:     (tokens (B, T), is_answer (B, T) bool) with B <= microbatch_size
    """
    shape = (problems_per_context, batch_size, 2)
    fewest = max_digits if TASKS[task].fixed_width else 1
    pairs = torch.randint(fewest, max_digits + 1, shape, generator=generator)
    lengths = TASKS[task].lengths(pairs, generator)                         # (m, B, K)
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
        max_digits            operands have 1..max_digits digits, lists as many numbers
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

    def show(what: str, *arguments, **settings) -> None:
        tokens, is_answer = sample_batch(*arguments, generator, **settings)
        print(f"{what:<16}", decode(tokens[-1]))
        print(" " * 16, "".join(" ^"[int(m)] for m in is_answer[-1]))

    print("The text that the model reads, and ^ where it is scored:\n")
    for task in TASKS:
        show(task, task, 4, 5)
    print("Settings, here of addition:\n")
    show("3 to a context", "addition", 1, 5, problems_per_context=3)
    show("long carries", "addition", 1, 9, long_carries=1.0)
    show("index hints", "addition", 1, 5, index_hints=True)
    show("random spaces", "addition", 1, 5, spaces=0.3)


if __name__ == "__main__":
    main()
