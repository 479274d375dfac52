"""What a problem looks like: the text of each task, and endless batches of it.

Read it beside section 3 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399). It needs torch.

Every number is written least significant digit first, operands and answer alike, with
no spaces; "$" ends the answer and "_" fills the line. The loss, and the score, see the
answer and its end token only (marked ^ in the first example):

    321+54=861$        is 123 + 45 = 168
           ^^^^
    21-54=33-$         is 12 - 45 = -33: the sign comes last, like the highest digit
    21-54=76-$         the same in ten's complement: 67 - 100, see subtract_digits
    21*54=045$         is 12 * 45 = 540
    210*540=045000$    the same, zeros pad it to three digits and six
    001|0000=0010$     bitwise or of two vectors, one of them all zeros
    b:21,c:7=c,b$      sorts 12 and 7: the answer names them by their letters
    0012-0345=-00333$  the second paper's format, see `fixed_width_addition`

    >>> decode(encode("321+54=861$"))
    '321+54=861$'

A digit's token id is the digit itself, so that problems are made as tensors of digits,
on the training device and at any length: no Python integers, and no int64 to overflow.

Glossary
    sizes      (..., 2), how large a problem is: the digits of both operands; of a list,
               the most digits of a number and how many numbers there are
    lengths    (..., K), the digits of each number of a question
    field      (N, W) tokens of N problems: a number, with PAD where it is shorter than
               W, or a symbol. Fields side by side, without the PADs, are the text
    context    the line that the model reads: one problem, or several in a row
    options    what a task can be asked to do otherwise, e.g. long_carries=0.3: keywords
               of the function that writes its problems, listed with it in TASKS
    B, N, T    contexts, problems, tokens
    K, m       numbers in a question, problems in a context

Not here: offsets and positions (abacus.py), the schedule of batch sizes (train.py).
`python data.py` prints problems with their loss mask under them. Sections 1 and 3 and,
of the tasks, `addition` are enough for a first reading; section 4 is for products and
for the second paper.
"""

import operator
import string
from dataclasses import dataclass, field
from functools import partial
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# They name the numbers of a list.
# DIFFERS: the authors' circle of names has some hundred symbols, Greek ones too.
LETTERS = string.ascii_letters
# What addition needs comes first: a model knows the tokens up to its task's last one.
VOCABULARY = "0123456789+=$_" + "-*|,:" + LETTERS
DIGITS = range(10)
EQUALS, END, PAD = (VOCABULARY.index(symbol) for symbol in "=$_")
FIRST_LETTER = VOCABULARY.index(LETTERS[0])


def encode(text: str) -> list[int]:
    """Token ids of a text as the model sees it, e.g. "321+54=861" for 123 + 45 = 168.
    Raises ValueError for a character that is no token."""
    unknown = sorted(set(text) - set(VOCABULARY))
    if unknown:
        raise ValueError(f"no token for {unknown[0]!r}: the tokens are {VOCABULARY}")
    return [VOCABULARY.index(character) for character in text]


def decode(ids) -> str:
    """The text of token ids, a sequence of integers or a tensor (T,). Raises ValueError
    for an id that is no token."""
    ids = [int(token) for token in ids]
    unknown = [token for token in ids if not 0 <= token < len(VOCABULARY)]
    if unknown:
        raise ValueError(f"no token has the id {unknown[0]}: they end at "
                         f"{len(VOCABULARY) - 1}")
    return "".join(VOCABULARY[token] for token in ids)


# --------------------------------------------------------------------------------------
# 1. Numbers as digits
# --------------------------------------------------------------------------------------


def random_digits(lengths: Tensor, width: int, generator: torch.Generator,
                  zeros: bool = False) -> Tensor:
    """Uniform numbers of so many digits: lengths (N,), 1..width -> (N, width), units in
    column 0, zero beyond the length.

    Source: appendix "Datasets": no leading zero, and, without `zeros`, no operand is 0.
    """
    draw = partial(torch.randint, generator=generator, device=lengths.device)
    digits, first = draw(10, (len(lengths), width)), draw(1, 10, (len(lengths), 1))
    place = torch.arange(width, device=lengths.device)
    is_first = place == lengths[:, None] - 1
    # DIFFERS: people ask for 0 + 0, and a model that hardly saw it has to guess. Half
    # of the numbers of one digit are 0, with `zeros`.
    zero = (lengths[:, None] == 1) & (digits[:, :1] < 5) & zeros
    digits = torch.where(is_first, torch.where(zero, 0, first), digits)
    return digits * (place < lengths[:, None])


def carry_out(column_sums: Tensor) -> Tensor:
    """Which columns hand a carry to the next, all at once instead of one by one.

    A column sum of 10 or more hands one on, one of 8 or less does not, and a 9 passes
    on what it receives. So the carry out of a column is decided by the nearest column
    at or below it whose sum is not 9, and a running maximum finds that column. From the
    units on, sums of 12 9 9 3 carry in columns 0, 1 and 2.
    (N, W) int64, a digit plus a digit, units in column 0 -> (N, W) bool
    """
    place = torch.arange(column_sums.shape[-1], device=column_sums.device)
    decider = torch.where(column_sums == 9, -1, place).cummax(dim=-1).values
    return column_sums.gather(-1, decider.clamp(min=0)) >= 10  # units if all are 9


def add_digits(a: Tensor, b: Tensor) -> Tensor:
    """The digits of a + b, units in column 0: (N, W), (N, W) -> (N, W). The sum must
    fit: the last column is not to carry."""
    carry = carry_out(a + b)
    return (a + b + carry.roll(1, dims=1)) % 10


def subtract_digits(a: Tensor, b: Tensor,
                    complement: bool = False) -> tuple[Tensor, Tensor]:
    """The digits of |a - b|, and whether a < b: (N, W), (N, W) -> (N, W), (N, 1).

    Or those of a - b in ten's complement, as computers write negative numbers: what is
    left when the top borrows from nowhere. 12 - 45 is 67 - 100: the digits 7 and 6.
    """
    # A column of x - y borrows where x < y, and there y + (9 - x) is 10 or more; it
    # passes a borrow on where x == y, and there that is 9: these borrows are carries.
    negative = carry_out(b + 9 - a)[:, -1:]
    swap = negative & (not complement)
    large, small = torch.where(swap, b, a), torch.where(swap, a, b)
    borrow = F.pad(carry_out(small + 9 - large), (1, 0))[:, :-1].long()
    return (large - small - borrow) % 10, negative


# --------------------------------------------------------------------------------------
# 2. Tasks: a short function that writes the fields of its problems
# --------------------------------------------------------------------------------------


def number(digits: Tensor, lengths: Tensor | None = None) -> Tensor:
    """A field (N, W) of numbers with so many digits (N,), or without leading zeros."""
    place = torch.arange(digits.shape[1], device=digits.device)
    if lengths is None:
        lengths = ((digits != 0) * (place + 1)).amax(dim=1).clamp(min=1)
    return torch.where(place < lengths[:, None], digits, PAD)


def symbol(token: str, lengths: Tensor, where: Tensor | None = None) -> Tensor:
    """A field (N, 1) of one token, or of padding where `where` (N, 1) is False."""
    tokens = lengths.new_full((len(lengths), 1), encode(token)[0])
    return tokens if where is None else torch.where(where, tokens, PAD)


def problem_fields(lengths: Tensor, a: Tensor, sign: Tensor, b: Tensor,
                   *answer) -> list[Tensor]:
    """The fields of `a sign b=answer$`; a and b are digits, the others fields."""
    return [number(a, lengths[:, 0]), sign, number(b, lengths[:, 1]),
            symbol("=", lengths), *answer, symbol("$", lengths)]


def addition(lengths: Tensor, generator: torch.Generator, width: int,
             minus: float = 0.0, zeros: bool = False, complement: bool = False,
             long_carries: float = 0.0, full_carries: bool = False,
             long_borrows: float = 0.0, negatives: float = 0.0,
             plain_order: bool = False, alike: int = 1) -> list[Tensor]:
    """N problems `a+b=` or `a-b=` and their answers, digits least significant first.

    A difference of equal numbers is 0. A negative one ends with its sign, as in the
    authors' data, whose whole text is reversed: there the last borrow is known. But the
    units, which come first, already depend on the sign, and the sign on every column.
    # DIFFERS: with `complement` they do not; the authors have no such text.

    Arguments:
        lengths       (N, 2) int64: digits of each operand
        generator     draws the digits; on the device of `lengths`
        width         the largest length, known to the host
        minus         share of problems that subtract
        zeros         operands may be 0
        complement    write differences in ten's complement: `21-54=76-`
        long_carries, full_carries      see enrich_sums
        long_borrows, negatives         see enrich_differences
        plain_order   most significant digit first, as people write: `123+45=168`
        alike         as many problems in a row, those of a context, share the operator
    Returns:          fields, in the order of the text
    """
    a, drawn = (random_digits(n, width + 1, generator, zeros)
                for n in lengths.unbind(1))
    subtract = in_runs(chosen(minus, a, generator), alike)
    a, b = enrich_sums(a, drawn, lengths, ~subtract, generator, long_carries,
                       full_carries)
    a, b = enrich_differences(a, b, lengths, subtract, generator, long_borrows,
                              negatives)
    # Making a column add up to 9, or its digits equal, may have put a 0 in front of b,
    # and no number begins with 0. There 9 + 0 becomes 8 + 1, and 0 - 0 becomes 1 - 1.
    place = torch.arange(width + 1, device=a.device)
    lost = (place == lengths[:, 1:] - 1) & (b == 0) & (drawn != 0)
    b = torch.where(lost, 1, b)
    a = torch.where(lost & (place < lengths[:, :1]), torch.where(subtract, 1, 8), a)
    digits, negative = solve(a, b, subtract, complement)
    answer = number(digits)
    if complement:
        answer = torch.where(subtract, number(digits, lengths.amax(dim=1)), answer)
    symbols = torch.where(subtract, symbol("-", lengths), symbol("+", lengths))
    fields = problem_fields(lengths, a, symbols, b, answer,
                            symbol("-", lengths, negative))
    return [field.flip(1) for field in fields] if plain_order else fields


def fixed_width_addition(lengths: Tensor, generator: torch.Generator, width: int,
                         minus: float = 0.0, long_carries: float = 0.0,
                         long_borrows: float = 0.0,
                         negatives: float = 0.0) -> list[Tensor]:
    """The same in the format of "Understanding Addition and Subtraction in
    Transformers" (arXiv 2402.02619): `0123+0456=+00579` and `0012-0345=-00333`, most
    significant digit first, padded with zeros, and the sign before the answer.

    Arguments and result as for `addition`; all lengths are `width`.
    # DIFFERS: the authors' text has no end token; here all tasks have one.
    """
    a, b = (torch.randint(10, (len(lengths), width), generator=generator,
                          device=lengths.device) for _ in range(2))
    subtract = chosen(minus, a, generator)
    a, b = enrich_sums(a, b, lengths, ~subtract, generator, long_carries)
    a, b = enrich_differences(a, b, lengths, subtract, generator, long_borrows,
                              negatives)
    answer, negative = solve(F.pad(a, (0, 1)), F.pad(b, (0, 1)), subtract)
    plus, dash = symbol("+", lengths), symbol("-", lengths)
    return problem_fields(
        lengths, a.flip(1), torch.where(subtract, dash, plus), b.flip(1),
        torch.where(negative, dash, plus), answer.flip(1))


def chosen(share: float, digits: Tensor, generator: torch.Generator) -> Tensor:
    """A random share of the problems whose digits these are: (N, W) -> (N, 1) bool."""
    return torch.rand(len(digits), 1, generator=generator, device=digits.device) < share


def in_runs(values: Tensor, alike: int) -> Tensor:
    """The first of every `alike` rows, in place of all of them: a b c d -> a a c c."""
    return values[::alike].repeat_interleave(alike, dim=0)


def chosen_columns(share: float, digits: Tensor, generator: torch.Generator) -> Tensor:
    """Random columns of a share of the problems, few of one and nearly all of another:
    each problem has its own chance for a column to be chosen. (N, W) -> (N, W) bool."""
    if not share:
        return torch.zeros_like(digits, dtype=torch.bool)
    draw = partial(torch.rand, generator=generator, device=digits.device)
    problems, shape = chosen(share, digits, generator), digits.shape
    return problems & (draw(shape) < draw(shape[0], 1))


def within(digits: Tensor, lengths: Tensor) -> list[Tensor]:
    """Which columns the first operand has, and which the second: two (N, W) bool."""
    place = torch.arange(digits.shape[1], device=digits.device)
    return [place < length for length in lengths[:, :, None].unbind(1)]


def enrich_sums(a: Tensor, b: Tensor, lengths: Tensor, sums: Tensor,
                generator: torch.Generator, long_carries: float = 0.0,
                full_carries: bool = False) -> tuple[Tensor, Tensor]:
    """Make columns of sums add up to 9, so that they pass a carry on.

    Uniform digits do so in one column of ten: long chains of carries are rare. If all
    columns of 123 + 45 are chosen, it becomes 923 + 76 = 999: where one number has
    ended, the other has a 9. With full_carries, the hardest test, it is 923 + 77 =
    1000: the units carry, and all other columns pass that on.

    # DIFFERS: the first paper has no such sums. The second paper's authors choose 40%
    # of the columns, in 40% of the batches.

    Arguments:  a, b (N, W) digits; lengths (N, 2); sums (N, 1) bool, the rows to change
                long_carries  the share of them that is enriched
    Returns:    a and b, of the same lengths
    """
    in_a, in_b = within(a, lengths)
    columns = sums & (chosen_columns(long_carries, a, generator) | full_carries)
    a = torch.where(columns & in_a & ~in_b, 9, a)
    b = torch.where(columns & in_b, torch.where(in_a, 9 - a, 9), b)
    if full_carries:
        units = sums & (torch.arange(a.shape[1], device=a.device) == 0)
        a = torch.where(units, a.clamp(min=1), a)
        b = torch.where(units, 10 - a, b)
    return a, b


def enrich_differences(a: Tensor, b: Tensor, lengths: Tensor, differences: Tensor,
                       generator: torch.Generator, long_borrows: float = 0.0,
                       negatives: float = 0.0) -> tuple[Tensor, Tensor]:
    """Make columns of differences equal, so that they pass a borrow on.

    If all columns of 4123 - 45 are chosen, it becomes 4023 - 23: where one number has
    ended, the other has a 0, but not as its first digit. `negatives` makes more of them
    negative: random digits of b rise by random amounts, 123 - 45 to 123 - 86.

    # DIFFERS: the second paper's authors do not lengthen borrows. For more negative
    # differences they raise every digit below 9 of b by one, in 40% of their batches,
    # and make both operands equal in 1% of those.

    Arguments:  as for enrich_sums; long_borrows and negatives are shares of the rows
    Returns:    a and b, of the same lengths
    """
    in_a, in_b = within(a, lengths)
    columns = differences & chosen_columns(long_borrows, a, generator)
    is_first = torch.arange(a.shape[1], device=a.device) == (
        lengths.amax(dim=1, keepdim=True) - 1)
    b = torch.where(columns & in_a & in_b, a, b)
    a = torch.where(columns & ~in_b & ~is_first, 0, a)
    b = torch.where(columns & ~in_a & ~is_first, 0, b)
    if negatives:
        raised = differences & chosen_columns(negatives, a, generator) & in_a & in_b
        more = torch.rand(a.shape, generator=generator, device=a.device)
        b = torch.where(raised, b + (more * (10 - b)).long(), b)
    return a, b


def solve(a: Tensor, b: Tensor, subtract: Tensor,
          complement: bool = False) -> tuple[Tensor, Tensor]:
    """The digits of a + b or |a - b|, and whether a negative difference: (N, W), (N, W)
    and (N, 1) bool -> (N, W), (N, 1) bool."""
    difference, negative = subtract_digits(a, b, complement)
    return torch.where(subtract, difference, add_digits(a, b)), negative & subtract


def carried(columns: Tensor) -> Tensor:
    """The digits of sums of columns, units in column 0: 12 30 0 -> 2 1 3. (N, W)"""
    digits, carry = [], 0
    for column in columns.unbind(1):
        digits.append((column + carry) % 10)
        carry = (column + carry) // 10
    return torch.stack(digits, dim=1)


def by_school(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Multiply as at school, (N, W) times (N, V). Yields, for each digit of `b`, the
    columns of its partial product and of the sum so far, (N, W + V) each, uncarried."""
    total, places = 0, b.shape[1]
    for place in range(places):
        part = F.pad(a * b[:, place:place + 1], (place, places - place))
        total = total + part
        yield part, total


def multiplication(lengths: Tensor, generator: torch.Generator, width: int,
                   zeros: bool = False, padded_to: int = 0, longest: float = 0.0,
                   alike: int = 1) -> list[Tensor]:
    """N problems `a*b=` and their answers; arguments and result as for `addition`.

    # DIFFERS: with `padded_to` zeros fill both factors up to so many digits, and the
    # answer up to twice as many, so that a digit of the answer finds those that it
    # needs at the same places in every problem. In a share of the problems (longest)
    # both factors have all these digits: these are hard, and few of uniform lengths.

    As many problems in a row as `alike` says, those of a context, share the second
    factor.
    Raises:  ValueError for a factor of more digits than `padded_to`
    """
    if padded_to and width > padded_to:
        raise ValueError(f"factors of {width} digits do not fit where zeros pad them "
                         f"to {padded_to}: train with --train-digits {width}")
    width = padded_to or width
    if longest and padded_to:                  # without zeros the line has no room
        lengths = torch.where(chosen(longest, lengths, generator), width, lengths)
    a, b = (random_digits(n, width, generator, zeros) for n in lengths.unbind(1))
    b = in_runs(b, alike)
    if padded_to:
        lengths = torch.full_like(lengths, padded_to)
    *_, (_, total) = by_school(a, b)                  # the last sum is the answer
    answer = number(carried(total), lengths.sum(dim=1) if padded_to else None)
    return problem_fields(lengths, a, symbol("*", lengths), b, answer)


def bitwise_or(lengths: Tensor, generator: torch.Generator, width: int) -> list[Tensor]:
    """N problems `a|b=` on vectors of 0 and 1; arguments and result as for `addition`.

    # PAPER: appendix: the shorter vector holds a single 1, the longer one none. Where
    # they are equally long, either may hold it.
    # DIFFERS: the paper trains on all such problems, in which long vectors are more
    # frequent, and tests on distinct ones. Here lengths are uniform, as in the other
    # tasks, and the problems of a test may be alike.
    """
    def draw():
        return torch.rand(len(lengths), generator=generator, device=lengths.device)

    in_first = lengths[:, 0] < lengths[:, 1] + (draw() < 0.5)
    spot = (draw() * lengths.amin(dim=1)).long()[:, None]
    answer = (torch.arange(width, device=lengths.device) == spot).long()
    a, b = answer * in_first[:, None], answer * ~in_first[:, None]
    return problem_fields(lengths, a, symbol("|", lengths), b,
                          number(answer, lengths.amax(dim=1)))


def sorting(lengths: Tensor, generator: torch.Generator, width: int,
            close_numbers: float = 0.0, letters: int = len(LETTERS),
            letter_gaps: float = 0.0, one_length: float = 0.0,
            plain_order: bool = False) -> list[Tensor]:
    """N problems `a:21,b:7=`: the letters in ascending order of their numbers.

    # PAPER: section 4.3: each number has a letter, from a random place of an alphabet
    # that is a circle; equal numbers keep the order of the question.
    # DIFFERS: the authors' score does not ask for the end token; ours does.
    # DIFFERS: a share of the lists has close_numbers, see share_digits.
    # DIFFERS: letters in a row, a to d in training, tell the model that two numbers
    # stand up to three places apart. "a" and "h" never meet, and in a longer list it is
    # lost. In a share of the lists (letter_gaps) some letters are left out, at random,
    # so that they do. And a small circle is learned sooner.
    # DIFFERS: with plain_order the highest digit of a number, which decides most, comes
    # first and has position 1 in longer numbers, too.

    Arguments:  lengths (N, K) int64: digits of each number, 0 where there is none
                letters on the circle, the first ones of LETTERS
                one_length  not used here, see list_lengths
    Raises:     ValueError for a list of more numbers than letters
    """
    (count, K), there = lengths.shape, lengths > 0
    if not K <= letters <= len(LETTERS):
        raise ValueError(f"a list of {K} numbers needs as many letters, at most "
                         f"{len(LETTERS)}, and --letters is {letters}")
    draw = partial(torch.rand, generator=generator, device=lengths.device)
    numbers = random_digits(lengths.flatten(), width, generator).view(count, K, width)
    if close_numbers:
        numbers = share_digits(numbers, lengths, close_numbers, generator)
    start = torch.randint(letters, (count, 1), generator=generator,
                          device=lengths.device)
    row = torch.arange(K, device=start.device).expand(count, K)
    if letter_gaps:
        apart = draw(count, letters).argsort(dim=1)[:, :K].sort(dim=1).values
        row = torch.where(draw(count, 1) < letter_gaps, apart, row)
    names = FIRST_LETTER + (start + row) % letters
    commas = torch.full_like(names, VOCABULARY.index(","))
    answer = torch.stack((names.gather(1, ascending(numbers, there)), commas), dim=2)
    question = []
    for k in range(K):
        here, digits = there[:, k:k + 1], number(numbers[:, k], lengths[:, k])
        question += [symbol(",", lengths, here),
                     torch.where(here, names[:, k:k + 1], PAD),
                     symbol(":", lengths, here),
                     digits.flip(1) if plain_order else digits]
    # Without the comma before the first number and that behind the last letter.
    return [*question[1:], symbol("=", lengths),
            number(answer.flatten(1), 2 * there.sum(dim=1) - 1), symbol("$", lengths)]


def share_digits(numbers: Tensor, lengths: Tensor, share: float,
                 generator: torch.Generator) -> Tensor:
    """Numbers that are harder to sort, in a share of the lists: (N, K, W) -> the same.

    # DIFFERS: of uniform numbers the first digit tells nearly all apart, so that the
    # others are hardly learned. Here digits become those of one number at the same
    # distance from the first, each with a chance drawn for the list; some numbers
    # become equal.
    """
    count, K, width = numbers.shape
    draw = partial(torch.rand, generator=generator, device=numbers.device)
    common = random_digits(lengths.new_full((count,), width), width, generator)
    place = torch.arange(width, device=numbers.device)
    at = width - lengths[:, :, None] + place          # the digit as far from the first
    same = common.gather(1, at.clamp(max=width - 1).flatten(1)).view_as(numbers)
    copied = (draw(count, 1, 1) < share) & (draw(count, K, width) < draw(count, 1, 1))
    return torch.where(copied & (at < width), same, numbers)


def ascending(numbers: Tensor, there: Tensor) -> Tensor:
    """The order of the numbers by value, those that are not there last: (N, K, W) and
    (N, K) bool -> (N, K) indices. Stable, so that equal numbers keep their order."""
    order = torch.arange(there.shape[1], device=there.device).expand(there.shape)
    # Sort by units, then stably by tens, and so on; last, by being there at all. That
    # is exact at any length, where the value of a number would overflow.
    for key in (*numbers.unbind(2), ~there):
        step = key.long().gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, step)
    return order


def list_lengths(sizes: Tensor, generator: torch.Generator | None,
                 one_length: float = 0.0, **options) -> Tensor:
    """Digits of the numbers of lists: (..., 2) -> (..., K), 0 where there is none.

    Each number has 1 to sizes[..., 0] digits, uniformly, and a list sizes[..., 1]
    numbers. Without a generator all numbers are as long as they can be.
    # DIFFERS: numbers that differ in length need no comparing of their digits. In a
    # share of the lists (one_length) all have sizes[..., 0] digits.
    """
    digits, count = sizes[..., :1], sizes[..., 1:]
    place = torch.arange(int(count.max()))
    drawn = digits.expand(*digits.shape[:-1], len(place))
    if generator is not None:
        draw = partial(torch.rand, generator=generator)
        drawn = 1 + (draw(drawn.shape) * digits).long()
        if one_length:
            drawn = torch.where(draw(digits.shape) < one_length, digits, drawn)
    return drawn * (place < count)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How the problems of a task are made, how long they can be, and what is optional.
    """

    generate: Callable                # (lengths, generator, width, **options) -> fields
    tokens: Callable                  # (lengths (..., K), **options) -> the most tokens
    # Its options, name -> what holds unless a preset or a flag says otherwise.
    options: dict = field(default_factory=dict)
    # What may stand between two operands -> what it makes of two integers; or None.
    operators: dict = field(default_factory=dict)
    symbols: str = ""                 # other tokens besides digits, "=", "$" and "_"
    # The most digits that any number has, answer included, of the sizes of a problem.
    places: Callable = lambda first, second: max(first, second) + 1
    # (sizes (..., 2), generator or None, **options) -> (..., K)
    lengths: Callable = lambda sizes, generator, **options: sizes
    fixed_width: bool = False         # all operands have max_digits digits
    second_digits: int = 0            # that the second operand has; 0: like the first
    # What no offset moves, an operator or a fixed second factor, looks the same in
    # every problem of a context, so that a model may not find its own. So all of them
    # have the same one: `generate` is told how many they are, as `alike`.
    shared: bool = False
    axes: tuple = ("digits of the first operand", "digits of the second operand")


# What the options do, which is also the help of train.py's flags. These choose which
# problems are shown in training; the test has uniform ones.
TRAINING_OPTIONS = {
    "zeros": "operands may be 0",
    "minus": "share of differences among the problems",
    "long_carries": "share of sums with long carry chains",
    "long_borrows": "share of differences with long borrow chains",
    "negatives": "share of differences with a raised second operand",
    "longest": "share of padded products whose factors both have full length",
    "close_numbers": "share of lists whose numbers share digits",
    "one_length": "share of lists whose numbers are equally long",
    "letter_gaps": "share of lists whose names leave out letters",
}
# And these change the text itself, and so hold in the test too.
TEXT_OPTIONS = {
    "complement": "write differences in ten's complement",
    "plain_order": "write numbers most significant digit first, as people do",
    "padded_to": "zeros pad both factors to so many digits; 0: none do",
    "letters": "on the circle that names the numbers of a list, at most 52",
}
OPTIONS = TRAINING_OPTIONS | TEXT_OPTIONS

PLUS, MINUS = {"+": operator.add}, {"-": operator.sub}
ZEROS, CARRIES = {"zeros": False}, {"long_carries": 0.0}
BORROWS = {"long_borrows": 0.0, "negatives": 0.0}
COMPLEMENT = {"complement": False}
# `a+b=`, the answer, which may be one longer than both or have a sign, and the end.
sum_task = partial(
    Task, tokens=lambda lengths, **options: lengths.sum(-1) + lengths.amax(-1) + 4)
# `a*b=`, the answer, which is as long as both together, and the end.
product_task = partial(
    Task, generate=multiplication, operators={"*": operator.mul}, places=operator.add,
    tokens=lambda lengths, padded_to=0, **options: (
        2 * lengths.clamp(min=padded_to).sum(-1) + 3))
# The second paper's, arXiv 2402.02619: 3 n + 4 tokens, and ours for the end.
fixed_task = partial(
    Task, fixed_width=True, symbols="+-",
    tokens=lambda lengths, **options: lengths.sum(-1) + lengths.amax(-1) + 5)
TASKS = {
    "addition": sum_task(generate=addition, operators=PLUS,
                         options=ZEROS | CARRIES | {"plain_order": False}),
    "subtraction": sum_task(generate=partial(addition, minus=1.0), operators=MINUS,
                            options=ZEROS | BORROWS | COMPLEMENT),
    # PAPER: Figure 5: each problem adds or subtracts, with equal chances.
    # DIFFERS: the problems of a context share their operator. Else some models never
    # read their own: they tell it from the digits of the answer that are written
    # already, and guess the units.
    "both": sum_task(generate=partial(addition, minus=0.5), operators=PLUS | MINUS,
                     options={"minus": 0.5} | ZEROS | CARRIES | BORROWS | COMPLEMENT,
                     shared=True),
    "multiplication": product_task(options=ZEROS | {"padded_to": 0, "longest": 0.0}),
    # N digits times two; not in the paper. With the model's `fixed_second` no offset
    # moves the second factor, so that the problems of a context share it.
    "nx2": product_task(
        shared=True, second_digits=2, options=ZEROS,
        lengths=lambda sizes, generator, **options: sizes.where(
            torch.tensor([True, False]), 2)),
    "or": Task(generate=bitwise_or, operators={"|": None}, places=max,
               tokens=lambda lengths: lengths.sum(-1) + lengths.amax(-1) + 3),
    "sorting": Task(
        generate=sorting, symbols=",:" + LETTERS, lengths=list_lengths,
        tokens=lambda lengths, **options: lengths.sum(-1) + 5 * (lengths > 0).sum(-1),
        options={"letters": len(LETTERS), "letter_gaps": 0.0, "close_numbers": 0.0,
                 "one_length": 0.0, "plain_order": False},
        places=lambda digits, count: digits,
        axes=("most digits of a number", "numbers in the list")),
    # The second paper's own sums and differences, whose numbers all have one width.
    "add": fixed_task(generate=fixed_width_addition, operators=PLUS, options=CARRIES),
    "sub": fixed_task(generate=partial(fixed_width_addition, minus=1.0),
                      operators=MINUS, options=BORROWS),
    # PAPER: two thirds of a mixed model's training are subtractions, and 80% where it
    # starts from a model of sums: --minus 0.8.
    # DIFFERS: the authors give each batch one operation, here each problem.
    "mix": fixed_task(generate=partial(fixed_width_addition, minus=0.66),
                      operators=PLUS | MINUS,
                      options={"minus": 0.66} | CARRIES | BORROWS),
}


def vocabulary_size(task: str, letters: int = len(LETTERS), **options) -> int:
    """How many tokens of VOCABULARY a model needs, from the first; of a task's options
    only `letters` matters."""
    known = VOCABULARY[:FIRST_LETTER + letters]
    symbols = [*TASKS[task].operators, *TASKS[task].symbols, "_"]
    return 1 + max(VOCABULARY.index(symbol) for symbol in symbols if symbol in known)


# --------------------------------------------------------------------------------------
# 3. Problems in a row: contexts and batches
# --------------------------------------------------------------------------------------


def count_before(token: int, tokens: Tensor) -> Tensor:
    """How many times `token` stands before each place of a line: (B, T) -> (B, T).
    Of END, that is the problem of its context that a token belongs to, from 0."""
    is_token = (tokens == token).long()
    return is_token.cumsum(dim=1) - is_token


def answer_mask(tokens: Tensor) -> Tensor:
    """True for the tokens after "=" up to and including the end token, (B, T) bool.

    These are the tokens that the model is asked for: before them stand more "=" than
    end tokens.
    """
    return count_before(EQUALS, tokens) > count_before(END, tokens)


def context_tokens(task: str, lengths: Tensor, **options) -> Tensor:
    """The most tokens that contexts can take: lengths (B, m, K) -> (B,)."""
    return TASKS[task].tokens(lengths, **options).sum(dim=-1)


def make_contexts(task: str, lengths: Tensor, generator: torch.Generator, device="cpu",
                  **options) -> Tensor:
    """Random problems of the given lengths, m to a context, padded on the right.

    Nothing here waits for the device: all shapes follow from `lengths`, on the host.

    Arguments:
        lengths      (B, m, K) int64 on the CPU: the digits of each number
        generator    a CPU generator; it seeds the one that draws the digits on
                     `device`, so that its state alone repeats everything
        options      of the task, e.g. long_carries=0.3
    Returns:         tokens (B, T) int64 on `device`
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(device).manual_seed(seed)
    width = int(lengths.max())
    total = int(context_tokens(task, lengths, **options).max())
    contexts, problems, _ = lengths.shape
    lengths = lengths.flatten(0, 1).to(device, non_blocking=True)              # (N, K)
    if TASKS[task].shared:
        options["alike"] = problems
    fields = TASKS[task].generate(lengths, on_device, width, **options)
    wide = torch.cat(fields, dim=1).view(contexts, -1)     # m problems, one by one
    # Close the gaps: a token moves left to its rank among the row's tokens, and all
    # padding goes to one column more, which is dropped.
    real = wide != PAD
    rank = torch.where(real, real.cumsum(dim=1) - 1, total)
    tokens = wide.new_full((contexts, total + 1), PAD).scatter_(1, rank, wide)
    return tokens[:, :total]


def deal(task: str, lengths: Tensor, generator: torch.Generator, **options) -> Tensor:
    """Deal problems to contexts so that all contexts get about equally long.

    Example: with two to a context, problems of 5, 9, 14 and 20 tokens become the
    contexts 9 + 14 and 20 + 5. Longest problems first, one to a context; then, round by
    round, the fullest context gets the shortest of the next problems. In its context a
    problem stands at a random place, or the first would always be the longest.

    Arguments:  lengths (m, B, K) int64, in any order; the task's options, since some
                make its problems longer
    Returns:    (B, m, K), the shortest context first
    """
    size = partial(context_tokens, task, **options)
    problems, contexts, K = lengths.shape
    lengths = lengths.flatten(0, 1)
    lengths = lengths[size(lengths[:, None]).argsort(stable=True)]
    *rest, longest = lengths.view(problems, contexts, K)
    dealt = longest[:, None]                                                # (B, 1, K)
    for shorter in reversed(rest):
        fullest = size(dealt).argsort(descending=True, stable=True)
        dealt = torch.cat((dealt[fullest], shorter[:, None]), dim=1)
    place = torch.rand(contexts, problems, generator=generator).argsort(dim=1)
    dealt = dealt.gather(1, place[:, :, None].expand_as(dealt))
    return dealt[size(dealt).argsort(stable=True)]


def sample_microbatches(task: str, batch_size: int, microbatch_size: int,
                        max_digits: int, generator: torch.Generator, device="cpu",
                        problems_per_context: int = 1, **options):
    """Yield a batch of random contexts in microbatches of similar lengths, so that
    little padding is left.

    # PAPER: section 3, "Datasets": operand lengths are uniform over 1..max_digits, each
    # independently; so are the most digits and the length of a list to sort.
    # DIFFERS: the authors train on 20 million fixed samples, here each is new; and they
    # cut batches as they come. Sorting by length first changes no problem; but an
    # offset or depth that is drawn for a microbatch now meets problems of one length,
    # and reaches all lengths over many steps only.

    Arguments:
        batch_size            contexts
        microbatch_size       B: contexts in each part, the last may have fewer
        max_digits            operands have 1..max_digits digits, lists as many numbers
        generator             a CPU generator, advanced by the call
        problems_per_context  1 as in the paper, or several, one after the other
        options               of the task, e.g. long_carries=0.3
    Yields:                   tokens (B, T) int64, is_answer (B, T) bool
    """
    fewest = max_digits if TASKS[task].fixed_width else 1
    sizes = torch.randint(fewest, max_digits + 1,
                          (problems_per_context, batch_size, 2), generator=generator)
    lengths = TASKS[task].lengths(sizes, generator, **options)              # (m, B, K)
    for part in deal(task, lengths, generator, **options).split(microbatch_size):
        tokens = make_contexts(task, part, generator, device, **options)
        yield tokens, answer_mask(tokens)


def sample_batch(task: str, batch_size: int, max_digits: int,
                 generator: torch.Generator, device="cpu",
                 **settings) -> tuple[Tensor, Tensor]:
    """A batch in one piece, tokens and is_answer, (B, T) each; further settings are
    problems_per_context and the options of the task, as for sample_microbatches."""
    return next(sample_microbatches(task, batch_size, batch_size, max_digits, generator,
                                    device, **settings))


# --------------------------------------------------------------------------------------
# 4. Labels: what a model is asked beside its answer, or is thought to compute
# --------------------------------------------------------------------------------------


def school_rows(tokens: Tensor, first: int, second: int, problems: int = 1) -> Tensor:
    """What else stands in the column of each digit of a product when it is worked out
    as at school: a digit of each partial product, and of each running sum below it. The
    first of the sums is a partial product, the last is the answer: both are left out.

    Targets of an auxiliary loss, after Bai et al. 2025 (arXiv 2510.00184), who ask for
    the running sum of each column. Below the answer of 123 * 456, in this order:

        321*654=880650$
                837000       123 * 6
                051600       123 * 50
                888600       the sum of both
                002940       123 * 400

    Arguments:  tokens (B, T), so many problems in each line
                first, second: the most digits of the two factors
    Returns:    (B, T, A) int64 for A = `row_count(second)` rows; -100, which torch's
                loss passes over, beside all tokens but the answers' digits
    """
    is_digit, width = tokens <= 9, first + second
    index = torch.arange(tokens.shape[1], device=tokens.device)
    # "*", "=" and "$" end a number each: a digit counts its place from the last of
    # them, and their count is the index of its number.
    start = torch.where(is_digit, -1, index).cummax(dim=1).values + 1
    # So each digit has a slot in a table of all numbers, three a problem, units first;
    # all other tokens share one more slot behind it.
    slot = torch.where(is_digit, (~is_digit).cumsum(dim=1) * width + index - start,
                       3 * problems * width)
    table = tokens.new_zeros(len(tokens), 3 * problems * width + 1)
    table = table.scatter_(1, slot, tokens)[:, :-1]
    a, b, _ = table.reshape(-1, 3, width).unbind(1)
    rows = []
    for place, (part, total) in enumerate(by_school(a[:, :first], b[:, :second])):
        rows += [carried(part)] + [carried(total)] * (0 < place < second - 1)
    rows = torch.stack(rows, dim=2)                             # (B problems, width, A)
    beside = F.pad(rows[:, None], (0, 0, 0, 0, 2, 0), value=-100)   # nothing for a, b
    beside = beside.reshape(len(tokens), -1, rows.shape[2])
    beside = F.pad(beside, (0, 0, 0, 1), value=-100)
    return beside.gather(1, slot[:, :, None].expand(-1, -1, rows.shape[2]))


def row_count(second: int) -> int:
    """How many rows `school_rows` has for a second factor of so many digits: a partial
    product for each, and all running sums but the first and the last."""
    return second + max(second - 2, 0)


UNDECIDED = 2       # the paper's U: passes on what comes in from below


def digit_labels(a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The sub-tasks of a + b and of a - b in every column.

    Source: arXiv 2402.02619, section 4. SA, MD and ND are the digit before any carry.
    ST, MT and NT are 1 for a carry or borrow, 0 for none, and UNDECIDED where it
    depends on the columns below. S is for sums, M for differences that are not
    negative, N for negative ones, whose operands change places. With the carry of the
    column below, digit n of an answer is

        (SA_n + carry) mod 10, (MD_n - carry) mod 10, (ND_n - carry) mod 10

    Arguments:  a, b  (N, W) int64 digits, units in column 0
    Returns:    "S" -> SA, ST; "M" -> MD, MT; "N" -> ND, NT: each (N, W) int64
    """
    def labels(digits: Tensor, column_sums: Tensor) -> tuple[Tensor, Tensor]:
        carry = (column_sums >= 10).long()
        return digits % 10, torch.where(column_sums == 9, UNDECIDED, carry)

    return {"S": labels(a + b, a + b), "M": labels(a - b, b + 9 - a),
            "N": labels(b - a, a + 9 - b)}


def answer_from_labels(kind: str, digit: Tensor, carry: Tensor) -> Tensor:
    """The digits of the answers of a class, by the algorithm that the paper finds.

    Arguments:  kind          "S", "M" or "N"
                digit, carry  (N, W), its two labels: SA and ST, MD and MT, ND and NT
    Returns:    (N, W + 1), units in column 0. The top digit of a difference is 0, or 9
                if the labels are of one with the other sign
    """
    out = carry_out(torch.where(carry == UNDECIDED, 9, 10 * carry)).long()
    incoming = F.pad(out, (1, 0))
    return (F.pad(digit, (0, 1)) + (incoming if kind == "S" else -incoming)) % 10


def question_class(a: Tensor, b: Tensor, subtract: Tensor) -> list[str]:
    """"S0", "S1", ... of sums, "M0", ... of differences, "N0", ... of negative ones.

    0: no carry or borrow; 1: one that no column passes on; k: the longest runs through
    k - 1 undecided columns.
    # DIFFERS: the authors' classes end at S5, M4+ and N4+, theirs of negative
    # differences have no N0 and count the columns of unswapped operands.

    Arguments:  a, b (N, W) int64 digits, units in column 0; subtract (N, 1) bool
    """
    negative = subtract_digits(a, b)[1] & subtract
    large, small = torch.where(negative, b, a), torch.where(negative, a, b)
    columns = torch.where(subtract, small + 9 - large, a + b)
    carry, place = carry_out(columns), torch.arange(a.shape[1], device=a.device)
    passed = carry & (columns == 9)
    run = place - torch.where(passed, -1, place).cummax(dim=1).values
    depths = ((run * passed).amax(dim=1) + 1) * carry.any(dim=1)
    kinds = torch.where(negative, 2, subtract.long())[:, 0]
    return [f"{'SMN'[kind]}{k}" for kind, k in zip(kinds.tolist(), depths.tolist())]


# --------------------------------------------------------------------------------------
# A worked example
# --------------------------------------------------------------------------------------


def main() -> None:
    """Print a problem of every task, and the options that change the text."""
    generator = torch.Generator().manual_seed(0)

    def show(name: str, task: str, max_digits: int, **settings) -> None:
        tokens, is_answer = sample_batch(task, 4, max_digits, generator, **settings)
        print(f"{name:<20}", decode(tokens[-1]))
        print(" " * 20, "".join(" ^"[int(m)] for m in is_answer[-1]))

    print("The text that the model reads, and ^ where it is scored:\n")
    for task in TASKS:
        show(task, task, 5)
    print("With options:\n")
    show("three to a context", "addition", 5, problems_per_context=3)
    show("long carries", "addition", 9, long_carries=1.0)
    show("complement", "subtraction", 5, complement=True)
    show("a shared operator", "both", 5, problems_per_context=3)
    show("padded", "multiplication", 3, padded_to=3)
    show("a shared factor", "nx2", 5, problems_per_context=3)
    show("plain order", "sorting", 4, plain_order=True, letters=12)


if __name__ == "__main__":
    main()
