"""What a problem looks like: the text of each task, and endless batches of it.

Read it beside section 3 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399). It needs torch.

Every number is written least significant digit first, operands and answer alike, with
no spaces; "$" ends the answer and "_" fills the line. The loss, and the score, see the
answer and its end token only (marked ^ below):

    321+54=861$        is 123 + 45 = 168
           ^^^^
    21-54=33-$         is 12 - 45 = -33: the sign comes last, like the highest digit
    21-54=76-$         the same in ten's complement: 67 - 100, see subtract_digits
    21*54=045$         is 12 * 45 = 540
    21*54=060+0840=045$     the same by partial products, 12 * 5 and 12 * 40
    001|0000=0010$     bitwise or of two vectors, one of them all zeros
    b:21,c:7=c,b$      sorts 12 and 7: the answer names them by their letters
    0012-0345=-00333$  the second paper's format, see `fixed_width`

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
    B, N, T    contexts, problems, tokens
    K, m       numbers in a question, problems in a context

Not here: offsets and positions (abacus.py), the schedule of batch sizes (train.py).
`python data.py` prints problems with their loss mask under them.
"""

import string
import sys
from dataclasses import dataclass
from functools import partial
from typing import Callable

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
EQUALS, END, PAD, SPACE = (VOCABULARY.index(symbol) for symbol in "=$_ ")
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
    # DIFFERS: people do ask for 0 + 7, and a model that never saw a 0 has to guess.
    may_be_zero = (lengths[:, None] == 1) & zeros
    digits = torch.where(is_first & ~may_be_zero, first, digits)
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
    field = lengths.new_full((len(lengths), 1), VOCABULARY.index(token))
    return field if where is None else torch.where(where, field, PAD)


def written(lengths: Tensor, a: Tensor, operator: Tensor, b: Tensor, *answer) -> list:
    """The fields of `a operator b=answer$`; a and b are digits, the others fields."""
    return [number(a, lengths[:, 0]), operator, number(b, lengths[:, 1]),
            symbol("=", lengths), *answer, symbol("$", lengths)]


def addition(lengths: Tensor, generator: torch.Generator, width: int,
             minus: float = 0.0, zeros: bool = False, complement: bool = False,
             **enrichment) -> list[Tensor]:
    """N problems `a+b=` or `a-b=` and their answers, digits least significant first.

    A difference of equal numbers is 0. A negative one ends with its sign, as in the
    authors' data (the text, reversed): the sign is known where the last borrow is.
    Its units, though, depend on the sign, and its end on all columns above.
    # DIFFERS: with `complement` they do not; the authors have no such text.

    Arguments:
        lengths       (N, 2) int64: digits of each operand
        generator     draws the digits; on the device of `lengths`
        width         the largest length, known to the host
        minus         share of problems that subtract
        zeros         operands may be 0
        complement    write differences in ten's complement: `21-54=76-`
        enrichment    long_carries, full_carries, long_borrows, negatives: see _enrich
    Returns:          fields, in the order of the text
    """
    a, drawn = (random_digits(n, width + 1, generator, zeros)
                for n in lengths.unbind(1))
    a, b, subtract = _enrich(a, drawn, lengths, generator, minus, **enrichment)
    # A leading digit that became 0 is made 1; with an 8 it still adds up to 9, and from
    # a 1 it still leaves 0.
    place = torch.arange(width + 1, device=a.device)
    bare = (place == lengths[:, 1:] - 1) & (b == 0) & (drawn != 0)
    b = torch.where(bare, 1, b)
    a = torch.where(bare & (place < lengths[:, :1]), torch.where(subtract, 1, 8), a)
    digits, negative = _solve(a, b, subtract, complement)
    answer = number(digits)
    if complement:
        answer = torch.where(subtract, number(digits, lengths.amax(dim=1)), answer)
    operator = torch.where(subtract, symbol("-", lengths), symbol("+", lengths))
    return written(lengths, a, operator, b, answer, symbol("-", lengths, negative))


def fixed_width(lengths: Tensor, generator: torch.Generator, width: int,
                minus: float = 0.0, **enrichment) -> list[Tensor]:
    """The same in the format of "Understanding Addition and Subtraction in
    Transformers" (arXiv 2402.02619): `0123+0456=+00579` and `0012-0345=-00333`, most
    significant digit first, padded with zeros, and the sign before the answer.

    Arguments and result as for `addition`; all lengths are `width`.
    # DIFFERS: the authors' text has no end token; here all tasks have one.
    """
    a, b = (torch.randint(10, (len(lengths), width), generator=generator,
                          device=lengths.device) for _ in range(2))
    a, b, subtract = _enrich(a, b, lengths, generator, minus, **enrichment)
    answer, negative = _solve(F.pad(a, (0, 1)), F.pad(b, (0, 1)), subtract)
    plus, dash = symbol("+", lengths), symbol("-", lengths)
    return written(lengths, a.flip(1), torch.where(subtract, dash, plus), b.flip(1),
                   torch.where(negative, dash, plus), answer.flip(1))


def _enrich(a, b, lengths, generator, minus, long_carries=0.0, full_carries=0.0,
            long_borrows=0.0, negatives=0.0):
    """Choose which problems subtract, (N, 1), and enrich what uniform digits lack.

    # DIFFERS: uniform digits pass a carry on in one column of ten, so that long chains
    # are rare. In a share of the sums (long_carries), columns are made to add up to 9,
    # each with a chance drawn for that problem: some pass carries on nearly throughout.
    # In a share of the differences (long_borrows), columns are made equal. For tests:
    # in a share of the sums (full_carries) the units carry and all others pass it on.
    # DIFFERS: the second paper's authors choose 40% of the columns in 40% of the
    # batches, and do not lengthen borrows. To get more negative differences they raise
    # every digit below 9 of the second operand by one, in 40% of their batches, and
    # make both operands equal in 1% of those; `negatives` raises random digits by
    # random amounts in a share of the problems, and makes none equal.
    """
    def draw(*shape):
        return torch.rand(shape, generator=generator, device=a.device)

    def some_columns(share: float) -> Tensor:
        if not share:
            return torch.zeros_like(a, dtype=torch.bool)
        return (draw(len(a), 1) < share) & (draw(*a.shape) < draw(len(a), 1))

    place = torch.arange(a.shape[1], device=a.device)
    in_a, in_b = (place < length for length in lengths[:, :, None].unbind(1))
    subtract = draw(len(a), 1) < minus
    full = (draw(len(a), 1) < full_carries) & ~subtract
    passing = full | torch.where(subtract, some_columns(long_borrows),
                                 some_columns(long_carries))
    b = torch.where(passing & in_a & in_b, torch.where(subtract, a, 9 - a), b)
    # Where one operand has ended, a 9 of the other passes a carry on, a 0 a borrow; but
    # no number begins with a 0.
    alone = passing & ~(subtract & (place == lengths.amax(dim=1, keepdim=True) - 1))
    digit = torch.where(subtract, 0, 9)
    a = torch.where(alone & in_a & ~in_b, digit, a)
    b = torch.where(alone & in_b & ~in_a, digit, b)
    units = full & (place == 0)
    a = torch.where(units, a.clamp(min=1), a)
    b = torch.where(units, 10 - a, b)
    if negatives:
        raised = some_columns(negatives) & subtract & in_a & in_b
        b = torch.where(raised, b + (draw(*a.shape) * (10 - b)).long(), b)
    return a, b, subtract


def _solve(a, b, subtract, complement=False) -> tuple[Tensor, Tensor]:
    difference, negative = subtract_digits(a, b, complement)
    return torch.where(subtract, difference, add_digits(a, b)), negative & subtract


def carried(columns: Tensor) -> Tensor:
    """The digits of sums of columns, units in column 0: 12 30 0 -> 2 1 3. (N, W)"""
    digits, carry = [], 0
    for column in columns.unbind(1):
        digits.append((column + carry) % 10)
        carry = (column + carry) // 10
    return torch.stack(digits, dim=1)


def multiplication(lengths: Tensor, generator: torch.Generator, width: int,
                   zeros: bool = False, shared_second: int = 1,
                   partial_products: bool = False) -> list[Tensor]:
    """N problems `a*b=` and their answers; arguments and result as for `addition`.

    # DIFFERS: so many problems in a row can share their second operand. Every digit of
    a product needs all of it, from any distance: where other problems of the context
    have other ones, a model learns not to look farther than a training number is long.
    # DIFFERS: with `partial_products` the answer begins as at school, with the products
    of `a` and each digit of `b` in their columns, added up one by one: 12 * 545 is
    `21*545=060+0840=0450+00060=0456`, and a digit needs few others. The paper's model
    has to find each digit in one go.
    """
    a, b = (random_digits(n, width, generator, zeros) for n in lengths.unbind(1))
    b = b[::shared_second].repeat_interleave(shared_second, dim=0)
    total, steps = 0, []
    for place in range(width):
        part = F.pad(a * b[:, place:place + 1], (place, width - place))
        total = total + part
        if not partial_products:
            continue
        digits = lengths[:, 0] + 1 + place                       # with leading zeros
        there, goes_on = (place + more < lengths[:, 1:] for more in (0, 1))    # (N, 1)
        steps += [symbol("+", lengths, there)] * (place > 0)
        steps += [torch.where(there, number(carried(part), digits), PAD)]
        if place > 0:                                      # the last sum is the answer
            steps += [symbol("=", lengths, goes_on),
                      torch.where(goes_on, number(carried(total), digits), PAD)]
    steps += [symbol("=", lengths)] * partial_products
    answer = number(carried(total))
    return written(lengths, a, symbol("*", lengths), b, *steps, answer)


def bitwise_or(lengths: Tensor, generator: torch.Generator, width: int) -> list[Tensor]:
    """N problems `a|b=` on vectors of 0 and 1; arguments and result as for `addition`.

    # PAPER: appendix: the shorter vector holds a single 1, the longer one none. Where
    # they are equally long, either may hold it.
    # DIFFERS: the authors train on all 2,870 such problems up to 20, so that long
    # vectors are more frequent; here lengths are uniform, as in the other tasks.
    """
    def draw():
        return torch.rand(len(lengths), generator=generator, device=lengths.device)

    in_first = lengths[:, 0] < lengths[:, 1] + (draw() < 0.5)
    spot = (draw() * lengths.amin(dim=1)).long()[:, None]
    answer = (torch.arange(width, device=lengths.device) == spot).long()
    a, b = answer * in_first[:, None], answer * ~in_first[:, None]
    return written(lengths, a, symbol("|", lengths), b,
                   number(answer, lengths.amax(dim=1)))


def sorting(lengths: Tensor, generator: torch.Generator, width: int,
            close_numbers: float = 0.0, letters: int = len(LETTERS),
            letter_gaps: float = 0.0) -> list[Tensor]:
    """N problems `a:21,b:7=`: the letters in ascending order of their numbers.

    # PAPER: section 4.3: each number has a letter, from a random place of an alphabet
    # that is a circle; equal numbers keep the order of the question.
    # DIFFERS: the authors' score does not ask for the end token; ours does.
    # DIFFERS: of uniform numbers the first digit tells nearly all apart, so that the
    # others are hardly learned. In a share of the lists (close_numbers) digits become
    # those of one number at the same distance from the first, each with a chance drawn
    # for the list; some numbers become equal.
    # DIFFERS: letters tell how far apart in the list two numbers stand, and those of a
    # row never more than a training list is long: in a longer one the model is lost.
    # In a share of the lists (letter_gaps) letters are left out, at random, as Abacus
    # offsets leave out positions. And a small circle is learned sooner.

    Arguments:  lengths (N, K) int64: digits of each number, 0 where there is none
                letters on the circle, the first ones of LETTERS; at least K
    """
    (count, K), there = lengths.shape, lengths > 0
    draw = partial(torch.rand, generator=generator, device=lengths.device)
    numbers = random_digits(lengths.flatten(), width, generator).view(count, K, width)
    if close_numbers:
        common = random_digits(lengths.new_full((count,), width), width, generator)
        place = torch.arange(width, device=lengths.device)
        at = width - lengths[:, :, None] + place      # the digit as far from the first
        same = common.gather(1, at.clamp(max=width - 1).flatten(1)).view_as(numbers)
        chosen = (draw(count, 1, 1) < close_numbers) & (draw(count, K, width)
                                                        < draw(count, 1, 1))
        numbers = torch.where(chosen & (at < width), same, numbers)
    start = torch.randint(letters, (count, 1), generator=generator,
                          device=lengths.device)
    row = torch.arange(K, device=start.device).expand(count, K)
    if letter_gaps:
        apart = draw(count, letters).argsort(dim=1)[:, :K].sort(dim=1).values
        row = torch.where(draw(count, 1) < letter_gaps, apart, row)
    names = FIRST_LETTER + (start + row) % letters
    # Sort by units, then stably by tens, and so on; last, by being there at all. That
    # is exact at any length, where the value of a number would overflow.
    order = torch.arange(K, device=start.device).expand(count, K)
    for key in (*numbers.unbind(2), ~there):
        step = key.long().gather(1, order).argsort(dim=1, stable=True)
        order = order.gather(1, step)
    commas = torch.full_like(names, VOCABULARY.index(","))
    answer = torch.stack((names.gather(1, order), commas), dim=2).flatten(1)
    question = []
    for k in range(K):
        here = there[:, k:k + 1]
        question += [symbol(",", lengths, here)] * (k > 0) + [
            torch.where(here, names[:, k:k + 1], PAD), symbol(":", lengths, here),
            number(numbers[:, k], lengths[:, k])]
    return [*question, symbol("=", lengths),
            number(answer, 2 * there.sum(dim=1) - 1), symbol("$", lengths)]


def list_lengths(sizes: Tensor, generator: torch.Generator | None) -> Tensor:
    """Digits of the numbers of lists: (..., 2) -> (..., K), 0 where there is none.

    Each number has 1 to sizes[..., 0] digits, uniformly, and a list sizes[..., 1]
    numbers. Without a generator all numbers are as long as they can be.
    """
    digits, count = sizes[..., :1], sizes[..., 1:]
    place = torch.arange(int(count.max()))
    drawn = digits.expand(*digits.shape[:-1], len(place))
    if generator is not None:
        drawn = 1 + (torch.rand(drawn.shape, generator=generator) * digits).long()
    return drawn * (place < count)


# What can be done to the problems of a task that knows it, and what leaves it undone.
ENRICHMENTS = {"zeros": False, "long_carries": 0.0, "long_borrows": 0.0,
               "negatives": 0.0, "complement": False, "shared_second": False,
               "partial_products": False, "minus": 0.0, "close_numbers": 0.0,
               "letters": len(LETTERS), "letter_gaps": 0.0}


def text_settings(settings: dict) -> dict:
    """Of the settings of a run, those that say how its problems are written: in the
    test as in training."""
    names = ["index_hints", "spaces"]
    names += [name for name in ("complement", "partial_products", "letters")
              if name in TASKS[settings["task"]].enrichments
              and settings[name] != ENRICHMENTS[name]]
    return {name: settings[name] for name in names}


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a task is made, how long its problems can be, and how they are written."""

    generate: Callable                # (lengths, generator, width, ...) -> fields
    operators: str                    # what may stand between the operands
    symbols: str = ""                 # the other tokens besides digits, "=", "$", "_"
    enrichments: tuple = ()           # the ENRICHMENTS that `generate` knows
    # The most tokens before "=", of lengths (..., K); those between "=" and "$".
    question: Callable = lambda lengths: lengths.sum(dim=-1) + 1
    answer: Callable = lambda lengths: lengths.amax(dim=-1) + 1
    # The most digits that any number has, of the sizes of the problem.
    places: Callable = lambda first, second: max(first, second) + 1
    lengths: Callable = lambda sizes, generator: sizes      # (..., 2) -> (..., K)
    fixed_width: bool = False         # all operands have max_digits digits
    axes: tuple = ("digits of the first operand", "digits of the second operand")

    def tokens(self, lengths: Tensor) -> Tensor:
        """The most tokens that problems take: (..., K) -> (...)."""
        return self.question(lengths) + self.answer(lengths) + 2        # "=" and "$"


SUM, DIFFERENCE = ("long_carries",), ("long_borrows", "negatives")
PLAIN = ("zeros", "complement", *DIFFERENCE)
# The second paper's, arXiv 2402.02619: 3 n + 4 tokens, and ours for the end.
fixed = partial(Task, symbols="+-", fixed_width=True,
                answer=lambda lengths: lengths.amax(dim=-1) + 2)
products = Task(generate=multiplication, operators="*", places=lambda a, b: a + b,
                answer=lambda lengths: lengths.sum(dim=-1),
                enrichments=("zeros", "shared_second", "partial_products"))
TASKS = {
    "addition": Task(generate=addition, operators="+", enrichments=("zeros", *SUM)),
    "subtraction": Task(generate=partial(addition, minus=1.0), operators="-",
                        enrichments=PLAIN),
    # PAPER: Figure 5: each problem adds or subtracts, with equal chances.
    "both": Task(generate=partial(addition, minus=0.5), operators="+-",
                 enrichments=PLAIN + SUM + ("minus",)),
    "multiplication": products, "short_multiplication": products,
    "or": Task(generate=bitwise_or, operators="|", places=max,
               answer=lambda lengths: lengths.amax(dim=-1)),
    "sorting": Task(generate=sorting, operators="", symbols=LETTERS,
                    enrichments=("close_numbers", "letters", "letter_gaps"),
                    lengths=list_lengths, places=lambda digits, _: digits,
                    question=lambda n: n.sum(dim=-1) + 3 * (n > 0).sum(dim=-1) - 1,
                    answer=lambda n: 2 * (n > 0).sum(dim=-1) - 1,
                    axes=("most digits of a number", "numbers in the list")),
    "add": fixed(generate=fixed_width, operators="+", enrichments=SUM),
    "sub": fixed(generate=partial(fixed_width, minus=1.0), operators="-",
                 enrichments=DIFFERENCE),
    # PAPER: two thirds of a mixed model's training are subtractions.
    # DIFFERS: the authors give each batch one operation, here each problem.
    "mix": fixed(generate=partial(fixed_width, minus=0.66), operators="+-",
                 enrichments=SUM + DIFFERENCE + ("minus",)),
}


def vocabulary_size(task: str, index_hints: bool = False, spaces: float = 0.0,
                    letters: int = len(LETTERS), **_) -> int:
    """How many tokens of VOCABULARY a model needs, from the first."""
    symbols = TASKS[task].operators + TASKS[task].symbols[:letters]
    symbols += "_" + LETTERS * index_hints + " " * (spaces > 0)
    return 1 + max(map(VOCABULARY.index, symbols))


# --------------------------------------------------------------------------------------
# 3. Labels: what the second paper says a model computes. (For a second reading.)
# --------------------------------------------------------------------------------------

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
        decided = (column_sums >= 10).long()
        return digits % 10, torch.where(column_sums == 9, UNDECIDED, decided)

    return {"S": labels(a + b, a + b), "M": labels(a - b, b + 9 - a),
            "N": labels(b - a, a + 9 - b)}


def answer_from_labels(kind: str, digit: Tensor, decided: Tensor) -> Tensor:
    """The digits of the answers of a class, by the algorithm that the paper finds.

    Arguments:  kind            "S", "M" or "N"
                digit, decided  (N, W), its two labels
    Returns:    (N, W + 1), units in column 0. The top digit of a difference is 0, or 9
                if the labels are of one with the other sign
    """
    out = carry_out(torch.where(decided == UNDECIDED, 9, 10 * decided)).long()
    carry = F.pad(out, (1, 0))
    return (F.pad(digit, (0, 1)) + (carry if kind == "S" else -carry)) % 10


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
# 4. Problems in a row: contexts and batches
# --------------------------------------------------------------------------------------


def count_before(token: int, tokens: Tensor) -> Tensor:
    """How many times `token` stands before each place of a line: (B, T) -> (B, T).
    Of END, that is the problem of its context that a token belongs to, from 0."""
    is_token = (tokens == token).long()
    return is_token.cumsum(dim=1) - is_token


def answer_mask(tokens: Tensor) -> Tensor:
    """True for the tokens after "=" up to and including the end token, (B, T) bool.

    These are the tokens that the model is asked for. In a row of problems, a token
    belongs to an answer when a "=" of its problem stands before it.
    """
    equals = count_before(EQUALS, tokens)
    ended = (equals * (tokens == END)).cummax(dim=1).values
    return equals > F.pad(ended, (1, -1))                # those of earlier problems


def most_tokens(task: str, lengths: Tensor, index_hints: bool = False,
                spaces: float = 0.0, partial_products: bool = False, **_) -> Tensor:
    """The most tokens that contexts can take: lengths (B, m, K) -> (B,)."""
    tokens = TASKS[task].tokens(lengths)
    if partial_products:    # at each place p a product and a sum, of a + 1 + p digits
        a, b = lengths.unbind(-1)    # and a symbol; but no sum at the first and last
        tokens = tokens + torch.where(b > 1, (b - 1) * (2 * a + b + 3), a + 2)
    return tokens.sum(dim=-1) * (1 + index_hints) * (1 + (spaces > 0))


def line_tokens(task: str, first: int, second: int | None = None, **text) -> int:
    """The most tokens of one problem of these sizes; of (first, first) by default.
    ValueError for a list of more numbers than there are letters."""
    letters = text.get("letters", len(LETTERS))
    if task == "sorting" and (second or first) > letters:
        raise ValueError(f"a list of {second or first} numbers needs as many letters, "
                         f"and here are {letters}: train with more, or sort fewer")
    sizes = torch.tensor([[[first, second or first]]])
    return int(most_tokens(task, TASKS[task].lengths(sizes, None), **text))


def make_contexts(task: str, lengths: Tensor, generator: torch.Generator, device="cpu",
                  index_hints: bool = False, spaces: float = 0.0, **settings) -> Tensor:
    """Random problems of the given lengths, m to a context, padded on the right.

    Nothing here waits for the device: all shapes follow from `lengths`, on the host.

    Arguments:
        lengths      (B, m, K) int64 on the CPU: the digits of each number
        generator    a CPU generator; it seeds the one that draws the digits on
                     `device`, so that its state alone repeats everything
        index_hints  write a letter before each digit that tells its place
        spaces       chance of a space before each token of the question
        settings     keywords of the task, e.g. long_carries=0.3; shared_second=True:
                     the problems of a context have the same second operand
    Returns:         tokens (B, T) int64 on `device`
    """
    if settings.pop("shared_second", False):
        lengths = lengths.clone()
        lengths[:, :, 1] = lengths[:, :1, 1]
        settings["shared_second"] = lengths.shape[1]
    seed = int(torch.randint(2**62, (), generator=generator))
    on_device = torch.Generator(device).manual_seed(seed)
    width = int(lengths.max())
    total = int(most_tokens(task, lengths, index_hints, spaces, **settings).max())
    contexts = len(lengths)
    lengths = lengths.flatten(0, 1).to(device, non_blocking=True)              # (N, K)
    problem = TASKS[task].generate(lengths, on_device, width, **settings)
    if index_hints:
        problem = _with_index_hints(problem, on_device)
    wide = torch.cat(problem, dim=1)
    if spaces:
        wide = _with_spaces(wide, on_device, spaces)
    wide = wide.view(contexts, -1)              # m problems, one after the other
    # Close the gaps: a token moves left to its rank among the row's tokens, and all
    # padding goes to one column more, which is dropped.
    real = wide != PAD
    rank = torch.where(real, real.cumsum(dim=1) - 1, total)
    tokens = wide.new_full((contexts, total + 1), PAD).scatter_(1, rank, wide)
    return tokens[:, :total]


def _with_index_hints(problem: list[Tensor], generator: torch.Generator) -> list:
    # Source: Zhou et al. 2024 (arXiv 2402.09371): 12 + 34 may read `f2g1+f4g3=f6g4$`.
    # The same letter marks the same place, from a random start on a circle of letters.
    # DIFFERS: in the authors' test the letters begin with the first one, and those of
    # the answer are not scored.
    start = torch.randint(len(LETTERS), (len(problem[0]), 1), generator=generator,
                          device=problem[0].device)
    hinted = []
    for field in problem:
        place = torch.arange(field.shape[1], device=field.device)
        letters = FIRST_LETTER + (start + place) % len(LETTERS)
        letters = torch.where(field < 10, letters, PAD)              # digits only
        hinted.append(torch.stack((letters, field), dim=2).flatten(1))
    return hinted


def _with_spaces(wide: Tensor, generator: torch.Generator, chance: float) -> Tensor:
    # PAPER: appendix, Figure 20: random spaces in the text.
    # DIFFERS: the authors put some into the answer too, where they are padding that
    # loss and score leave out; and theirs can stand several in a row.
    asked = (count_before(EQUALS, wide) == 0) & (wide != PAD)
    chosen = torch.rand(wide.shape, generator=generator, device=wide.device) < chance
    space = torch.where(asked & chosen, SPACE, PAD)
    return torch.stack((space, wide), dim=2).flatten(1)


def deal(task: str, lengths: Tensor, generator: torch.Generator, **text) -> Tensor:
    """Deal problems to contexts so that all contexts get about equally long.

    Example: with two to a context, problems of 5, 9, 14 and 20 tokens become the
    contexts 9 + 14 and 20 + 5. Longest problems first, one to a context; then, round by
    round, the fullest context gets the shortest of the next problems. In its context a
    problem stands at a random place, or the first would always be the longest.
    lengths (m, B, K), in any order -> (B, m, K), shortest context first; `text` is how
    the problems are written
    """
    problems, contexts, K = lengths.shape
    lengths = lengths.flatten(0, 1)
    lengths = lengths[most_tokens(task, lengths[:, None], **text).argsort(stable=True)]
    *rest, longest = lengths.view(problems, contexts, K)
    dealt = longest[:, None]                                                # (B, 1, K)
    for shorter in reversed(rest):
        fullest = most_tokens(task, dealt, **text).argsort(descending=True, stable=True)
        dealt = torch.cat((dealt[fullest], shorter[:, None]), dim=1)
    place = torch.rand(contexts, problems, generator=generator).argsort(dim=1)
    dealt = dealt.gather(1, place[:, :, None].expand_as(dealt))
    return dealt[most_tokens(task, dealt, **text).argsort(stable=True)]


def sample_microbatches(task: str, batch_size: int, microbatch_size: int,
                        max_digits: int, generator: torch.Generator, device="cpu",
                        problems_per_context: int = 1, second_digits: int = 0,
                        **settings):
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
        second_digits         the most of the second operand; 0: max_digits
        settings              index_hints, spaces, and keywords of the task
    Yields:                   tokens (B, T) int64, is_answer (B, T) bool
    """
    shape = (problems_per_context, batch_size, 2)
    fewest = max_digits if TASKS[task].fixed_width else 1
    sizes = torch.randint(fewest, max_digits + 1, shape, generator=generator)
    if second_digits:
        sizes[..., 1] = torch.randint(1, second_digits + 1, shape[:2],
                                      generator=generator)
    lengths = TASKS[task].lengths(sizes, generator)                         # (m, B, K)
    for part in deal(task, lengths, generator, **settings).split(microbatch_size):
        tokens = make_contexts(task, part, generator, device, **settings)
        yield tokens, answer_mask(tokens)


def sample_batch(task: str, batch_size: int, max_digits: int,
                 generator: torch.Generator, device="cpu",
                 **settings) -> tuple[Tensor, Tensor]:
    """A batch in one piece, see sample_microbatches: tokens and is_answer, (B, T)."""
    return next(sample_microbatches(task, batch_size, batch_size, max_digits, generator,
                                    device, **settings))


# --------------------------------------------------------------------------------------
# A worked example
# --------------------------------------------------------------------------------------


def main() -> None:
    """Print the worked example."""
    generator = torch.Generator().manual_seed(0)
    sys.stdout.reconfigure(errors="replace")           # some letters are Greek

    def show(what: str, *arguments, **settings) -> None:
        tokens, is_answer = sample_batch(*arguments, generator, **settings)
        print(f"{what:<20}", decode(tokens[-1]))
        print(" " * 20, "".join(" ^"[int(m)] for m in is_answer[-1]))

    print("The text that the model reads, and ^ where it is scored:\n")
    for task in TASKS:
        show(task, task, 4, 5, second_digits=int(task == "short_multiplication"))
    print("Settings, here of addition:\n")
    show("3 to a context", "addition", 1, 5, problems_per_context=3)
    show("full carries", "addition", 1, 9, full_carries=1.0)
    show("complement", "subtraction", 4, 5, complement=True)
    show("partial products", "multiplication", 4, 3, partial_products=True)
    show("index hints", "addition", 1, 5, index_hints=True)
    show("random spaces", "addition", 1, 5, spaces=0.3)


if __name__ == "__main__":
    main()
