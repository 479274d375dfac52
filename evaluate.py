"""How well, how far, and why: exact match on a grid of lengths, pictures, questions.

Read it beside section 4 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399) and its Figures 1 and 4. It needs torch, and data.py,
abacus.py and looped.py beside it.

    python evaluate.py                             the newest run
    python evaluate.py runs/laptop --max-digits 60 --every 5
    python evaluate.py --ask "123456789+987654321"
    python evaluate.py --attend 40                 what each head reads
    python evaluate.py --readout 20                when each digit becomes right
    python evaluate.py --ablate 6                  what breaks without a head or MLP
    python evaluate.py --keep 6                    whether the others can all go
    python evaluate.py --patch 6                   which of them carries what
    python evaluate.py --pca 6                     which head tells carries apart

The last four are the tools of the second paper (arXiv 2402.02619), for every model.

A problem counts when every answer token and the end token are right. A greedy answer is
right if and only if, given the true answer so far, every next token is the most likely
one (up to the noise that a model may start from). So one pass over the finished line
scores a problem, and nothing is decoded token by token; `--ask` decodes for real.

Glossary
    cell    all problems of one pair of operand lengths
    id      in distribution: both operands within the training lengths
    ood     out of distribution: an operand is longer, and both have at most 100 digits
    ood_100 equal lengths beyond 100 digits              paper: "100+ OOD"
    node    a head, or a feed-forward network, at one token and one recurrence

Not here: anything that trains (train.py).
"""

import argparse
import collections
import contextlib
import html
import itertools
import json
import math
import operator
import re
import sys
import time
import timeit
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor

import data
import looped

# PAPER: section 4: the grid ends at 100 digits; "100+ OOD" has equal lengths only.
GRID_LIMIT = 100
TEXT = ("index_hints", "spaces")    # settings of training problems that the test shares
KEPT_MISTAKES = 1000      # enough to see what goes wrong, and little memory


# --------------------------------------------------------------------------------------
# 1. Exact match: one forward pass for many problems
# --------------------------------------------------------------------------------------


def cell_problems(task: str, pair: tuple[int, int], samples: int, seed: int,
                  **text) -> Tensor:
    """The test problems of one cell, (samples, T): a function of cell and seed alone.

    They are made on the CPU, so that every device is asked the same questions. `text`
    is index_hints and spaces, see data.make_contexts.
    """
    first, second = pair
    number = (seed + 1) * 10**12 + first * 10**6 + second
    generator = torch.Generator().manual_seed(number)
    pairs = torch.tensor([[pair]]).expand(samples, 1, 2)
    lengths = data.TASKS[task].lengths(pairs, generator)
    return data.make_contexts(task, lengths, generator, **text)


@torch.inference_mode()
def predict(model: looped.LoopedTransformer, tokens: Tensor,
            recurrences: int | None = None) -> Tensor:
    """The likeliest token after each token, given the true ones: (B, T) -> (B, T-1).

    # DIFFERS: the authors run the whole prefix again for every token of an answer. One
    # pass gives the same verdicts; a test compares the two.
    """
    device = model.digits.device
    with looped.autocast(device), torch.random.fork_rng():
        torch.manual_seed(0)          # the noise of the state: repeatable, and our own
        return model(tokens.to(device), recurrences)[:, :-1].argmax(dim=-1).cpu()


def token_budget(model: looped.LoopedTransformer) -> int:
    """How many tokens to score at once: what fills a GPU, or a CPU's cache."""
    return 2**17 if model.digits.device.type == "cuda" else 2**14


def is_exact(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in every answer token and the end token: (B,) bool."""
    return ((predicted == tokens[:, 1:]) | ~data.answer_mask(tokens)[:, 1:]).all(dim=1)


def is_first_right(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in the answer's first token: the units of a number, or the
    least element of a list. (B,) bool."""
    is_equals = tokens[:, :-1] == data.VOCABULARY.index("=")
    return ((predicted == tokens[:, 1:]) | ~is_equals).all(dim=1)


def exact_match(model: looped.LoopedTransformer, task: str,
                cells: list[tuple[int, int]], samples: int, seed: int = 0,
                recurrences: int | None = None, progress: bool = False,
                mistakes: list | None = None, score=is_exact, **text) -> list[float]:
    """Share of exactly right problems in each cell.

    Arguments:
        cells      pairs, see data.py: as a rule the lengths of both operands
        samples    problems in each cell
        progress   show a line that counts the cells
        mistakes   a list that receives (tokens, predicted) of wrong rows, the shortest
                   first and KEPT_MISTAKES at most; or None
        score      what counts as right: is_exact or is_first_right
        text       index_hints and spaces, see data.make_contexts
    Returns:       a share for each cell, in the order of `cells`
    Raises:        ValueError when a length lies past a position table of the model
    """
    # Long and short cells do not mix: sorted by length, then cut into batches that keep
    # the machine busy without filling its memory.
    tokens_of = {cell: line_tokens(task, *cell, **text) for cell in cells}
    budget = token_budget(model)
    batches = []
    for cell in sorted(cells, key=tokens_of.get):       # each is the longest so far
        if not batches or (len(batches[-1]) + 1) * samples * tokens_of[cell] > budget:
            batches.append([])
        batches[-1].append(cell)
    share, started = {}, time.perf_counter()
    for batch in batches:
        parts = [cell_problems(task, cell, samples, seed, **text) for cell in batch]
        width = max(part.shape[1] for part in parts)
        tokens = torch.cat([torch.nn.functional.pad(
            part, (0, width - part.shape[1]), value=data.PAD) for part in parts])
        # A single cell of long numbers may exceed the budget by itself: cut it.
        predicted = torch.cat([predict(model, rows, recurrences) for rows in
                               tokens.split(max(1, budget // width))])
        exact = score(tokens, predicted)
        shares = exact.double().view(len(batch), samples).mean(dim=1)
        share |= zip(batch, shares.tolist())
        if mistakes is not None:
            room = KEPT_MISTAKES - len(mistakes)
            mistakes += zip(tokens[~exact][:room], predicted[~exact][:room])
        if progress:
            _show_progress(len(share), len(cells), time.perf_counter() - started)
    return [share[cell] for cell in cells]


def line_tokens(task: str, first: int, second: int | None = None,
                index_hints: bool = False, spaces: float = 0.0) -> int:
    """The most tokens that a problem of a cell takes; of (first, first) by default."""
    pair = torch.tensor([[[first, second or first]]])
    lengths = data.TASKS[task].lengths(pair, None)
    return int(data.context_tokens(task, lengths)) * (1 + index_hints) * (
        1 + (spaces > 0))


def _show_progress(done: int, total: int, seconds: float) -> None:
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\rscored {done} of {total} cells in {seconds:.0f} s", end=end,
              file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------
# 2. The grid and its bands
# --------------------------------------------------------------------------------------


def grid_lengths(train_digits: int, max_digits: int, every: int) -> list[int]:
    """The lengths of the grid: all up to train_digits, then the multiples of `every`.

    Example: grid_lengths(10, 100, 25) -> [1, 2, ..., 10, 25, 50, 75, 100]
    """
    lengths = range(1, min(max_digits, GRID_LIMIT) + 1)
    return [n for n in lengths if n <= train_digits or n % every == 0]


def measure(model: looped.LoopedTransformer, task: str, train_digits: int,
            max_digits: int, samples: int, every: int = 1, seed: int = 0,
            recurrences: int | None = None, mistakes: list | None = None,
            score=is_exact, **text) -> dict:
    """The grid of exact match and the means of its bands.

    Where lengths are left out (`every` above 1), a cell stands for the lengths between
    its neighbour below and itself, and counts as many times in the mean of its band.

    Returns:  lengths; grid (rows: first operand, or the most digits in a list; columns:
              second operand, or the length of a list); bands: id, ood, the paper's
              three parts of it for lists, and, when max_digits exceeds 100, ood_100
              over equal lengths, with them in `diagonal`
    """
    lengths = grid_lengths(train_digits, max_digits, every)
    cells = [(first, second) for first in lengths for second in lengths]
    beyond = [(n, n) for n in range(GRID_LIMIT + 1, max_digits + 1) if n % every == 0]
    shares = exact_match(model, task, cells + beyond, samples, seed, recurrences,
                         progress=True, mistakes=mistakes, score=score, **text)
    stands_for = dict(zip(lengths, torch.tensor(lengths).diff(
        prepend=torch.tensor([0])).tolist()))
    sums = {}
    for (first, second), share in zip(cells, shares):
        longer = first > train_digits, second > train_digits
        names = ["ood" if any(longer) else "id"]
        if task == "sorting" and any(longer):
            names.append({(True, False): "ood_digits", (False, True): "ood_list",
                          (True, True): "ood_both"}[longer])
        weight = stands_for[first] * stands_for[second]
        for name in names:
            total, weights = sums.get(name, (0.0, 0))
            sums[name] = total + weight * share, weights + weight
    bands = {name: total / weights for name, (total, weights) in sums.items()}
    result = {"lengths": lengths, "bands": bands, "grid": [
        shares[row:row + len(lengths)] for row in range(0, len(cells), len(lengths))]}
    if beyond:
        result["diagonal"] = {n: share for (n, _), share in
                              zip(beyond, shares[len(cells):])}
        bands["ood_100"] = sum(result["diagonal"].values()) / len(beyond)
    return result


def operands(lines: Tensor, task: str, digits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both operands (B, digits), units in column 0, and whether to subtract, (B,) bool.

    Arguments:  lines (B, T), questions whose operands both have `digits` digits
    """
    a, b = lines[:, :digits], lines[:, digits + 1:2 * digits + 1]
    if data.TASKS[task].fixed_width:                      # most significant digit first
        a, b = a.flip(1), b.flip(1)
    return a, b, lines[:, digits] == data.VOCABULARY.index("-")


def binomial_interval(failures: int, questions: int) -> tuple[float, float]:
    """The exact (Clopper-Pearson) 95% interval of a rate of failure, per million.

    Example: no failure in a million questions -> at most 3.7 per million
    """
    count = torch.arange(failures + 1, dtype=torch.float64)
    n = torch.tensor(float(questions), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(count + 1) - torch.lgamma(n - count + 1)

    def at_most(k: int, rate: float) -> float:
        """The chance of k failures or fewer."""
        if k < 0 or rate >= 1:
            return float(k >= questions)
        terms = ways[:k + 1] + count[:k + 1] * math.log(rate) + (
            n - count[:k + 1]) * math.log1p(-rate)
        return float(terms.exp().sum())

    def rate_where(k: int, chance: float) -> float:
        """The rate per million at which that chance is `chance`, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(60):                      # the chance falls as the rate grows
            middle = (low + high) / 2
            low, high = (middle, high) if at_most(k, middle) > chance else (low, middle)
        return 1e6 * low

    low = rate_where(failures - 1, 0.975) if failures else 0.0
    return low, rate_where(failures, 0.025) if failures < questions else 1e6


def count_failures(model: looped.LoopedTransformer, task: str, digits: int,
                   samples: int, seed: int, recurrences: int | None = None,
                   **enrichment) -> dict:
    """Failures in fresh questions of a fixed-width task, by class and answer token.

    Source: arXiv 2402.02619, appendix: a million questions, teacher-forced.

    Arguments:  enrichment  long_carries and long_borrows, see data.py
    Returns:    questions; failures; interval per million; classes and tokens, each a
                dict: class -> [failures, questions]; sign or place -> failures
    """
    generator = torch.Generator().manual_seed((seed + 1) * 10**12)
    classes, tokens_wrong = {}, collections.Counter()
    names = ["sign", *(f"A{place}" for place in range(digits, -1, -1)), "end"]
    at_once = max(1, token_budget(model) // line_tokens(task, digits))   # questions
    for first in range(0, samples, at_once):
        lengths = torch.full((min(at_once, samples - first), 1, 2), digits)
        lines = data.make_contexts(task, lengths, generator, **enrichment)
        predicted = predict(model, lines, recurrences)
        wrong = (predicted != lines[:, 1:])[:, 2 * digits + 1:]         # answer tokens
        named = data.question_class(*operands(lines, task, digits))
        for name, failed in zip(named, wrong.any(dim=1).tolist()):
            seen = classes.setdefault(name, [0, 0])
            seen[0] += failed
            seen[1] += 1
        tokens_wrong.update(dict(zip(names, wrong.sum(dim=0).tolist())))
    failures = sum(failed for failed, _ in classes.values())
    return {"questions": samples, "failures": failures,
            "interval": binomial_interval(failures, samples),
            "classes": dict(sorted(classes.items())), "tokens": dict(tokens_wrong)}


def failure_table(counts: dict) -> str:
    """What count_failures returns, as text."""
    low, high = counts["interval"]
    rate = 1e6 * counts["failures"] / counts["questions"]
    lines = [f"{counts['failures']} failures in {counts['questions']:,} questions: "
             f"{rate:,.1f} per million (95%: {low:,.1f} to {high:,.1f})"]
    classes = counts["classes"].items()
    lines += ["  by class:  " + "  ".join(f"{name} {failed}/{seen}"
                                          for name, (failed, seen) in classes)]
    if counts["failures"]:
        lines += ["  by token:  " + "  ".join(
            f"{name} {failed}" for name, failed in counts["tokens"].items() if failed)]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# 3. Pictures: a grid for the terminal, an SVG, and what kind of mistakes there are
# --------------------------------------------------------------------------------------

SHADES = " .:-=+*#%@"      # exact match from 0 to 1; "@" is all right


def terminal_picture(result: dict) -> str:
    """The grid as text: a row for each length of the first operand, shortest on top."""
    lengths, grid = result["lengths"], result["grid"]
    step = math.ceil(len(lengths) / 50)           # at most 50 rows: leave some out
    shown = range(step - 1, len(lengths), step)
    rows, columns = data.TASKS[result["task"]].axes
    lines = [f"rows: {rows}, {lengths[shown[0]]} to {lengths[shown[-1]]}; "
             f"columns: {columns}"]
    for row in shown:
        shades = (SHADES[int(grid[row][column] * 9)] for column in shown)
        lines.append(f"{lengths[row]:>5} " + "".join(shade * 2 for shade in shades))
    lines.append(f'      exact match from 0 to 1: "{SHADES}"')
    return "\n".join(lines)


def svg_picture(result: dict, title: str) -> str:
    """The grid as an SVG drawing to scale, the training square outlined."""
    lengths, grid, top = result["lengths"], result["grid"], result["lengths"][-1]
    scale, left, above = 400 / top, 60, 50
    edges = [0, *lengths]
    rows, columns = data.TASKS[result["task"]].axes

    def x(length: float) -> str:
        return f"{left + length * scale:.1f}".removesuffix(".0")

    def y(length: float) -> str:                       # the first operand runs upwards
        return f"{above + 400 - length * scale:.1f}".removesuffix(".0")

    parts = []
    for row in range(len(lengths)):
        # Neighbours of one colour become one rectangle: a grid of 10,000 stays small.
        start = 0
        for column in range(1, len(lengths) + 1):
            same = (column < len(lengths)
                    and _colour(grid[row][column]) == _colour(grid[row][start]))
            if not same:
                parts.append(
                    f'<path d="M{x(edges[start])} {y(edges[row])}H{x(edges[column])}'
                    f'V{y(edges[row + 1])}H{x(edges[start])}Z" '
                    f'fill="{_colour(grid[row][start])}"/>')
                start = column
    seen = min(result["train_digits"], top)
    parts.append(f'<path d="M{x(0)} {y(0)}V{y(seen)}H{x(seen)}V{y(0)}Z" fill="none" '
                 f'stroke="red" stroke-width="2"/>')
    for tick in _ticks(top):
        parts += [_text(x(tick), 466, tick, 'text-anchor="middle"'),
                  _text(left - 8, y(tick), tick, 'dy="4" text-anchor="end"')]
    parts += [_text(260, 488, columns, 'text-anchor="middle"'),
              _text(-250, 18, rows, 'text-anchor="middle" transform="rotate(-90)"'),
              _text(260, 504, "red: lengths seen in training",
                    'text-anchor="middle" fill="red"')]
    for level in range(11):
        parts += [_rect(480, 430 - 38 * level, 20, 20, level / 10, 'stroke="gray"'),
                  _text(506, 445 - 38 * level, level / 10)]
    return _svg(580, 510, title, parts)


def _svg(width: int, height: int, title: str, parts: list[str]) -> str:
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="12" shape-rendering="crispEdges">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(20, 22, title, 'font-size="14"'), *parts, "</svg>"])


def _text(x, y, content, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" {more}>{html.escape(str(content))}</text>'


def _rect(x, y, width, height, share: float, more: str = "") -> str:
    return (f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'fill="{_colour(share)}" {more}/>')


def _colour(share: float) -> str:
    # From dark blue (0) to pale yellow (1), in 20 steps and a last one for exactly 1.
    level = math.floor(share * 20) / 20
    low, high = (38, 30, 90), (255, 245, 170)
    return "#" + "".join(f"{round(a + (b - a) * level):02x}" for a, b in zip(low, high))


def _ticks(top: int) -> list[int]:
    step = next(step for step in (1, 2, 5, 10, 20, 50) if top <= 10 * step)
    return list(range(step, top + 1, step))


def show_mistake(tokens: Tensor, predicted: Tensor, width: int = 64) -> str:
    """A wrong answer under the true line, around its first mistake, and ^ under it.

    Each token is predicted from the true tokens before it, so that one slip does not
    spoil the rest. The text is as the model reads it, least significant digit first.
    """
    line = data.decode(tokens).rstrip("_")
    start = line.index("=") + 1
    said = " " * start + data.decode(predicted[start - 1:len(line) - 1])
    marks = "".join(" ^"[a != b and b != " "] for a, b in zip(line, said))
    first = max(0, min(marks.index("^") - width // 2, len(line) - width))
    dots = ("..." if first else "", "..." if first + width < len(line) else "")
    return "\n".join(f"    {dots[0]}{row[first:first + width]}{dots[1]}".rstrip()
                     if row is line else
                     " " * (4 + len(dots[0])) + row[first:first + width].rstrip()
                     for row in (line, said, marks))


KINDS = ("carry", "digit", "ended early", "ended late")


def mistake_kind(tokens: Tensor, predicted: Tensor) -> tuple[str, int]:
    """The kind of the first wrong token of a sum, and the carry chain that feeds it.

    A "carry" is one off, a "digit" is farther off. The chain counts the columns below
    the mistake that hand a carry on, without a gap.
    """
    answer = data.answer_mask(tokens[None])[0, 1:]
    place = int(((predicted != tokens[1:]) & answer).nonzero()[0]) + 1
    said, true = int(predicted[place - 1]), int(tokens[place])
    question, _, _ = data.decode(tokens).partition("=")
    column = place - len(question) - 1
    a, b = (torch.tensor([int(d) for d in n.ljust(column + 1, "0")[:column + 1]])
            for n in question.split("+"))
    below = data.carry_out((a + b)[None])[0, :column].flip(0)
    chain = int(below.long().cumprod(dim=0).sum())
    if data.END in (said, true):
        return ("ended early" if said == data.END else "ended late"), chain
    one_off = said in data.DIGITS and (said - true) % 10 in (1, 9)
    return ("carry" if one_off else "digit"), chain


def mistake_table(mistakes: list[tuple[Tensor, Tensor]]) -> str:
    """First mistakes by kind, by carry chain and by digits of the longer operand."""
    counts = collections.Counter()
    for tokens, predicted in mistakes:
        kind, chain = mistake_kind(tokens, predicted)
        operands = data.decode(tokens).partition("=")[0].split("+")
        for what, size in (("carry chain", chain), ("digits", max(map(len, operands)))):
            # Bands that double: 0, 1, 2, 3 to 4, 5 to 8, ...
            counts[what, size and 2 ** math.ceil(math.log2(size)), kind] += 1
    lines = [f"  {'first mistakes':<22}" + "".join(f"{kind:>13}" for kind in KINDS)]
    for what, band in sorted({key[:2] for key in counts}):
        lines.append(f"  {what + ' up to ' + str(band):<22}"
                     + "".join(f"{counts[what, band, kind]:>13}" for kind in KINDS))
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# 4. Questions: decoding for real
# --------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: looped.LoopedTransformer, questions: Tensor, max_new: int,
             recurrences: int | None = None, use_cache: bool = True) -> Tensor:
    """Greedy answers to questions of equal length, token by token.

    Arguments:
        questions  (B, T) int64, each ends with "="
        max_new    tokens to append at most; stops when every row has ended
        use_cache  keep keys and values of earlier tokens instead of running the whole
                   line again for every token
    Returns:       (B, at most max_new) int64; what follows an end token is padding
    """
    tokens = questions.to(model.digits.device)
    cache = {} if use_cache else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new):
        with looped.autocast(tokens.device):
            token = model(tokens, recurrences, cache=cache)[:, -1].argmax(dim=-1)
        token = torch.where(ended, data.PAD, token)
        tokens = torch.cat((tokens, token[:, None]), dim=1)
        ended |= token == data.END
        if ended.all():
            break
    return tokens[:, questions.shape[1]:]


SOLVE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def parse_question(text: str, task: str) -> tuple[int, str, int]:
    """The operands and the symbol of "123+456". ValueError, in one line, for anything
    that the task's models cannot be asked."""
    symbols = [symbol for symbol in data.TASKS[task].symbols if symbol in SOLVE]
    if not symbols:
        raise ValueError(f"--ask knows + - *, and a model of {task} none of them")
    number = r"\s*([0-9]+)\s*"
    known = re.escape("".join(symbols))
    match = re.fullmatch(f"{number}([{known}]){number}=?\\s*", text)
    if match is None:
        raise ValueError(f"cannot read {text!r}: ask for example "
                         f"\"123{symbols[0]}456\"")
    first, symbol, second = match.groups()
    for operand in (first, second):
        if operand.startswith("0"):
            raise ValueError(f"the operand {operand} starts with 0: the model has only "
                             f"seen positive numbers without leading zeros")
    return int(first), symbol, int(second)


def ask(model: looped.LoopedTransformer, task: str, text: str,
        recurrences: int | None = None, width: int | None = None) -> str:
    """The model's answer written out under the operands, wrong digits marked.

    `width` is the number of digits in the fixed-width format. ValueError, in one line,
    for a question that the model cannot be asked.
    """
    # Python refuses by default to read numbers of more than 4,300 digits.
    sys.set_int_max_str_digits(0)
    a, symbol, b = parse_question(text, task)
    truth = str(SOLVE[symbol](a, b))
    fixed = width if data.TASKS[task].fixed_width else 0
    if fixed and max(a, b) >= 10 ** fixed:
        raise ValueError(f"{text!r}: this model knows {fixed} digits only")
    question = (f"{a:0{fixed}}{symbol}{b:0{fixed}}=" if fixed else
                f"{str(a)[::-1]}{symbol}{str(b)[::-1]}=")
    answer = generate(model, torch.tensor([data.encode(question)]),
                      max(len(truth), fixed + 2) + 2, recurrences)
    said, ended, _ = data.decode(answer[0]).partition("$")
    if fixed:
        said = said[:1].replace("+", "") + said[1:].lstrip("0") or "0"
    else:
        said = said[::-1]
    width = max(len(said), len(truth), len(str(a)) + 2, len(str(b)) + 2)
    lines = [f"{a:>{width}}", symbol + f"{b:>{width - 1}}", "-" * width,
             f"{said:>{width}}"]
    marks = "".join(" ^"[x != y] for x, y in zip(said.rjust(width), truth.rjust(width)))
    if said == truth and ended:
        lines.append("correct")
    else:
        lines += [marks.rstrip()] * (said != truth) + [f"{truth:>{width}}  is right"]
        lines += [] if ended else ["the model did not end its answer"]
    return "\n".join("  " + line for line in lines)


def compare_speed(model: looped.LoopedTransformer, task: str, digits: int = 50,
                  samples: int = 100) -> str:
    """Time three ways to score 100 problems of 50 + 50 digits, as a table."""
    problems = cell_problems(task, (digits, digits), samples, seed=0)
    question = problems[:, :2 * digits + 2]              # both operands, "+" and "="
    new = problems.shape[1] - question.shape[1]
    ways = {"one pass": lambda: predict(model, problems),
            "decoding with a cache": lambda: generate(model, question, new),
            "decoding without": lambda: generate(model, question, new, use_cache=False)}
    seconds = {}
    for name, way in ways.items():
        way()                                                             # warm up
        seconds[name] = min(timeit.repeat(way, number=1, repeat=3))
    return "\n".join(f"  {name:<22} {s:8.3f} s   {s / seconds['one pass']:6.1f} x"
                     for name, s in seconds.items())


# --------------------------------------------------------------------------------------
# 5. Why: taps on the nodes of a model
# --------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A head, or a feed-forward network, at one token and one recurrence, from 0."""

    recurrence: int
    layer: int
    part: int           # 0 .. H - 1: that head; H: the feed-forward network
    token: int


def all_nodes(model: looped.LoopedTransformer, tokens: int,
              recurrences: int | None = None) -> list[Node]:
    """Every node at the first so many tokens, in the order of work."""
    config = model.config
    return [Node(*index) for index in itertools.product(
        range(recurrences or config.recurrences), range(config.layers),
        range(config.heads + 1), range(tokens))]


def part_name(model: looped.LoopedTransformer, node: Node) -> str:
    """What a reader calls the part of a node, e.g. "layer 1, head 2"."""
    facts = node_facts(model, node)
    is_looped = model.config.recurrences > 1 or node.recurrence > 0
    loop = f"recurrence {facts['recurrence']}, " * is_looped
    return f"{loop}layer {facts['layer']}, {facts['part']}"


def node_facts(model: looped.LoopedTransformer, node: Node) -> dict:
    """What a program is told of a node, counted from 1."""
    part = "MLP" if node.part == model.config.heads else f"head {node.part + 1}"
    return {"recurrence": node.recurrence + 1, "layer": node.layer + 1, "part": part}


def node_output(model: looped.LoopedTransformer, node: Node) -> tuple[tuple, slice]:
    """The `where` of `tapped` that holds a node's output, and its columns there."""
    if node.part == model.config.heads:
        return (node.recurrence, node.layer, "ffn"), slice(None)
    head_width = model.config.width // model.config.heads
    first = node.part * head_width
    return (node.recurrence, node.layer, "heads"), slice(first, first + head_width)


@contextlib.contextmanager
def tapped(model: looped.LoopedTransformer, edit):
    """Within it, every forward pass sends the output of all heads and feed-forward
    networks through `edit(where, value)`, which returns what to use instead.

    `where` is (recurrence, layer, kind), counted from 0. The kind is "heads", value
    (B, T, D) with the heads side by side, before they are mixed; or "ffn", value
    (B, T, D). It is done with torch's hooks: the model itself knows nothing of this.
    """
    calls, hooks = collections.Counter(), []

    def start(module, arguments):
        """A new forward pass: recurrences count from 0 again."""
        calls.clear()

    def heads_hook(layer, module, arguments):
        """Before the heads of a layer are mixed."""
        return edit((calls[layer], layer, "heads"), arguments[0])

    def ffn_hook(layer, module, arguments, output):
        """After the last part of a layer: its next call is the next recurrence."""
        calls[layer] += 1
        return edit((calls[layer] - 1, layer, "ffn"), output)

    hooks.append(model.register_forward_pre_hook(start))
    for index, layer in enumerate(model.layers):
        hooks.append(layer.attention.out.register_forward_pre_hook(
            partial(heads_hook, index)))
        hooks.append(layer.ffn.register_forward_hook(partial(ffn_hook, index)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def activations(model: looped.LoopedTransformer, lines: Tensor,
                recurrences: int | None = None) -> tuple[Tensor, dict[tuple, Tensor]]:
    """What `predict` returns, and the output of every node as `tapped` sees it:
    (recurrence, layer, kind) -> (B, T, D)."""
    outputs = {}

    def note(where, value):
        """Remember, and change nothing."""
        outputs[where] = value
        return value

    with tapped(model, note):
        return predict(model, lines, recurrences), outputs


def replaced(model: looped.LoopedTransformer, nodes, by: dict[tuple, Tensor]):
    """Within it, these nodes put out what stands at their place in `by`: (T, D) for
    each `where`, their means; or (B, T, D), the outputs of other questions."""
    masks = {}
    for node in nodes:
        where, columns = node_output(model, node)
        if where not in masks:
            masks[where] = torch.zeros_like(by[where], dtype=torch.bool)
        masks[where][..., node.token, columns] = True
    return tapped(model, lambda where, value: value if where not in masks else
                  torch.where(masks[where], by[where], value))


def questions(task: str, digits: int, samples: int, seed: int) -> Tensor:
    """Questions of `digits` + `digits`, (samples, T), 40% of them with long cascades of
    carries and borrows: uniform ones hardly have any."""
    enrichment = {name: 0.4 for name in ("long_carries", "long_borrows")
                  if data.ENRICHMENTS[name] in data.TASKS[task].symbols}
    return data.make_contexts(task, torch.full((samples, 1, 2), digits),
                              torch.Generator().manual_seed(seed), **enrichment)


def token_names(task: str, digits: int) -> list[str]:
    """The second paper's names of the tokens of a line: operands D and D', answer A,
    each with the place of the digit, units 0.

    Example: 12+34=46$ -> D0 D1 op D'0 D'1 = A0 A1 A2 end. Where the format pads
    nothing, the sign and the end of a shorter answer stand under the name of a digit.
    """
    places = [str(place) for place in range(digits + 1)]
    fixed = data.TASKS[task].fixed_width
    order = slice(None, None, -1 if fixed else 1)
    D, A = places[:digits][order], places[order]
    return [*("D" + place for place in D), "op", *("D'" + place for place in D), "=",
            *["sign"] * fixed, *("A" + place for place in A), "end"]


# --------------------------------------------------------------------------------------
# 6. Why: what each head reads, what breaks without a node, and what a node carries
# --------------------------------------------------------------------------------------


def attention_maps(model: looped.LoopedTransformer, tokens: Tensor,
                   recurrences: int | None = None) -> Tensor:
    """How much each token reads of each token, the mean over the lines of a batch.

    Arguments:  tokens (B, T), lines whose parts stand in the same columns
    Returns:    (recurrences, layers, H, T, T) float32 on the CPU; rows are the readers
    """
    maps = []

    def recording(q, k, v, bias):
        """looped.attend, keeping the weights: nothing there has to know of it."""
        if bias is None:
            bias = torch.full(q.shape[2:3] * 2, -torch.inf, device=q.device).triu(1)
        weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5 + bias).softmax(dim=-1)
        maps.append(weights.float().mean(dim=0).cpu())
        return weights.to(v.dtype) @ v

    with mock.patch.object(looped, "attend", recording):
        predict(model, tokens, recurrences)
    return torch.stack(maps).unflatten(0, (-1, model.config.layers))


def read_columns(maps: Tensor, task: str, digits: int) -> Tensor:
    """The part of the maps in which the answer reads the operands, place by place.

    Arguments:  maps    (..., T, T) of problems whose operands both have `digits` digits
    Returns:    (..., digits, 2, digits): how much the token that predicts answer place
                i reads of place j of the first operand and of the second
    """
    names = token_names(task, digits)

    def columns(letter: str) -> list[int]:
        """Where the digits of a number stand, units first."""
        return [names.index(f"{letter}{place}") for place in range(digits)]

    rows = maps[..., [column - 1 for column in columns("A")], :]     # they predict A
    return torch.stack((rows[..., columns("D")], rows[..., columns("D'")]), dim=-2)


def head_table(reads: Tensor, near: int) -> list[dict]:
    """Where each head looks, best aligned first: shares of its attention, the mean over
    the answer's places.

    Arguments:  reads  (recurrences, layers, H, places, 2, places), from read_columns
                near   the largest distance in places that counts as near
    Returns:       a dict for each head: recurrence, layer and head, counted from 1;
                   `same`, `near` and `far` places of the operands; `rest`, other tokens
    """
    place = torch.arange(reads.shape[-1])
    distance = (place[:, None] - place).abs()[:, None]           # (places, 1, places)
    bands = {"same": distance == 0, "near": (distance > 0) & (distance <= near),
             "far": distance > near}
    rows = []
    for index in itertools.product(*map(range, reads.shape[:3])):
        shares = {name: float((reads[index] * band).sum(dim=(1, 2)).mean())
                  for name, band in bands.items()}
        where = dict(zip(("recurrence", "layer", "head"), (n + 1 for n in index)))
        rows.append(where | shares | {"rest": 1 - sum(shares.values())})
    return sorted(rows, key=lambda row: -row["same"])


def attention_svg(reads: Tensor, title: str) -> str:
    """One head as an SVG: reads (places, 2, places); answer places run downwards."""
    places = len(reads)
    size = 440 / (2 * places + 1)
    parts = []
    for operand, name in enumerate(("first", "second")):
        left = 50 + operand * (places + 1) * size
        parts += [_rect(left, 30, places * size, places * size, 0),
                  _text(left + places * size / 2, 272, f"{name} operand, place 1 to "
                        f"{places}", 'text-anchor="middle"')]
        for row, column in (reads[:, operand] >= 0.025).nonzero().tolist():
            # A head that reads both digits of a column has half left for each.
            share = min(1.0, 2 * float(reads[row, operand, column]))
            parts.append(_rect(left + column * size, 30 + row * size, size, size,
                               share))
    parts += [_text(-30 - places * size / 2, 40, "answer place",
                    'text-anchor="middle" transform="rotate(-90)"'),
              _text(50, 292, "dark blue: less than 2.5% of the attention; pale yellow: "
                             "half of it or more", 'fill="gray"')]
    return _svg(520, 300, title, parts)


def attention_report(model, settings: dict, digits: int, samples: int, seed: int,
                     recurrences: int | None) -> tuple[dict, str]:
    """Print what the heads read in problems of `digits` + `digits`; returns the figures
    and a picture of the best aligned head."""
    task, train_digits = settings["task"], settings["train_digits"]
    problems = cell_problems(task, (digits, digits), samples, seed)
    reads = read_columns(attention_maps(model, problems, recurrences), task, digits)
    heads = head_table(reads, near=train_digits)
    print(f"attention of the answer at {digits} + {digits} digits, best aligned heads "
          f"first\n  recurrence layer head   same place   up to {train_digits} away   "
          f"farther   other tokens")
    for row in heads[:20]:
        print(f"  {row['recurrence']:>10} {row['layer']:>5} {row['head']:>4}"
              f"{row['same']:>13.2f} {row['near']:>14.2f} {row['far']:>9.2f} "
              f"{row['rest']:>14.2f}")
    best = heads[0]
    index = [best[name] for name in ("recurrence", "layer", "head")]
    title = (f"recurrence {index[0]}, layer {index[1]}, head {index[2]}: "
             f"{best['same']:.0%} on the same place, {best['far']:.0%} far off")
    return ({"train_digits": train_digits, "heads": heads},
            attention_svg(reads[tuple(n - 1 for n in index)], title))



class Damage(NamedTuple):
    """What fails without a node, as shares of the questions that were right with it."""

    fails: float
    tokens: dict[str, float]           # the same of each answer token that fails
    classes: dict[str, float]          # and of each class of questions that does


def ablate(model: looped.LoopedTransformer, task: str, lines: Tensor, digits: int,
           recurrences: int | None = None) -> dict[Node, Damage]:
    """Replace every node by its own mean, one at a time, and see what breaks.

    Source: arXiv 2402.02619, "mean ablation"; the means are over the given questions.
    # DIFFERS: the authors' code takes the means of layer 0 for all layers.

    Arguments:  lines  (B, T), questions whose operands both have `digits` digits
    Raises:     ValueError when no question is answered right, so that none can fail
    """
    means, lines = means_and_right(model, lines, digits, recurrences)
    named = data.question_class(*operands(lines, task, digits))
    rows = {name: torch.tensor([name == other for other in named])
            for name in sorted(set(named))}
    is_answer, names = data.answer_mask(lines)[:, 1:], token_names(task, digits)[1:]
    found = {}
    for node in all_nodes(model, lines.shape[1] - 1, recurrences):
        with replaced(model, [node], means):
            wrong = (predict(model, lines, recurrences) != lines[:, 1:]) & is_answer
        fails = wrong.any(dim=1)
        found[node] = Damage(_share(fails), *(
            {name: share for name, share in shares if share} for shares in (
                zip(names, map(_share, wrong.unbind(1))),
                ((name, _share(fails[row])) for name, row in rows.items()))))
    return found


def _share(verdicts: Tensor) -> float:
    return float(verdicts.double().mean())


def means_and_right(model, lines: Tensor, digits: int, recurrences: int | None):
    """The mean output of every node, and the lines that the model answers right.
    ValueError when there is none."""
    said, outputs = activations(model, lines, recurrences)
    right = lines[is_exact(lines, said)]
    if not len(right):
        raise ValueError(f"this model answers no question of {digits} digits right, so "
                         f"that nothing can break")
    return {where: value.mean(dim=0) for where, value in outputs.items()}, right


def map_text(model, shares: dict[Node, float], names: list[str]) -> str:
    """A share for each node as text: the second paper's maps, parts in the rows and
    tokens in the columns."""
    columns = 1 + max(node.token for node in shares)
    rows = collections.defaultdict(lambda: [" "] * columns)
    for node, share in shares.items():
        rows[part_name(model, node)][node.token] = SHADES[int(share * 9)]
    # The names of the tokens are written downwards, a character to a line.
    wide = max(map(len, names[:columns]))
    heading = zip(*(name.ljust(wide) for name in names[:columns]))
    return "\n".join([" " * 31 + "".join(line) for line in heading]
                     + [f"{row:<31}" + "".join(cells) for row, cells in rows.items()])


def map_svg(model, shares: dict[Node, float], labels: dict[Node, str],
            names: list[str], title: str, legend: str) -> str:
    """The same as an SVG, with a short label in each cell."""
    rows = {name: index for index, name in enumerate(dict.fromkeys(
        part_name(model, node) for node in shares))}
    columns = 1 + max(node.token for node in shares)
    size, left, above = max(6, min(30, 900 // columns)), 190, 60
    height = above + 22 * len(rows) + 30
    parts = [_text(10, above + 22 * row + 15, name) for name, row in rows.items()]
    for node, share in shares.items():
        x, y = left + size * node.token, above + 22 * rows[part_name(model, node)]
        parts.append(_rect(x, y, size, 22, share))
        if labels.get(node) and size > 20:
            ink = "black" if share > 0.5 else "white"
            parts.append(_text(x + size / 2, y + 15, labels[node], 'font-size="9" '
                               f'text-anchor="middle" fill="{ink}"'))
    parts += [_text(left + size * (column + 0.5), above - 6, names[column],
                    'font-size="10" text-anchor="middle"')
              for column in range(columns) if size > 20]
    parts.append(_text(10, height - 10, legend, 'fill="gray"'))
    return _svg(left + size * columns + 20, height, title, parts)


def ablation_report(model, settings: dict, digits: int, samples: int, seed: int,
                    recurrences: int | None) -> tuple[dict, str]:
    """Print the map of what breaks without each node, and what the nodes that matter
    most read; returns the figures and an SVG of the map."""
    task = settings["task"]
    lines, names = questions(task, digits, samples, seed), token_names(task, digits)
    found = ablate(model, task, lines, digits, recurrences)
    shares = {node: damage.fails for node, damage in found.items()}
    print(f"share of questions that fail without a node, from 0 to 1: \"{SHADES}\"\n"
          + map_text(model, shares, names))
    print("the nodes that matter most: failures by class and by token, and what a\n"
          "head reads (a node at one token predicts the next)")
    maps = attention_maps(model, lines, recurrences)
    reads = {node: top_shares(dict(zip(names, maps[node[:3]][node.token].tolist())))
             for node in found if node.part < model.config.heads}
    for node in sorted(filter(shares.get, found), key=shares.get, reverse=True)[:12]:
        damage, read = found[node], reads.get(node)
        print(f"  {part_name(model, node)} at {names[node.token]}: {damage.fails:.0%}; "
              + "; ".join(map(top_shares, (damage.classes, damage.tokens)))
              + (f"; reads {read}" if read else ""))
    result = {"nodes": [
        node_facts(model, node) | {"token": names[node.token]} | damage._asdict()
        | {"reads": reads.get(node)} for node, damage in found.items()]}
    # As in the paper's maps, a cell names the answer digit that breaks.
    labels = {node: max(damage.tokens, key=damage.tokens.get, default="")
              for node, damage in found.items()}
    return result, map_svg(model, shares, labels, names,
                           f"{task}, {digits} + {digits} digits: what fails without a "
                           f"node", "share of the questions that fail: dark blue, "
                           "none; pale yellow, all. Named: the digit that fails most")


def top_shares(shares: dict[str, float], most: int = 4) -> str:
    """The largest shares as text: {"S1": 0.5, "S2": 0.31} -> "S1 50%, S2 31%"."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {share:.0%}" for name, share in largest if share >= 0.005)


def keep_report(model, settings: dict, digits: int, samples: int, seed: int,
                recurrences: int | None) -> tuple[dict, None]:
    """Keep the nodes that matter and replace all others by their means, all at once: do
    they suffice? Prints and returns the share of the questions answered right that stay
    right, and the same of random sets of nodes."""
    task = settings["task"]
    lines = questions(task, digits, samples, seed)
    found = ablate(model, task, lines, digits, recurrences)
    fresh = questions(task, digits, samples, seed + 1)
    means, fresh = means_and_right(model, fresh, digits, recurrences)
    generator = torch.Generator().manual_seed(seed)

    def right(kept: set[Node]) -> float:
        """Share that is still right with these nodes alone."""
        with replaced(model, found.keys() - kept, means):
            return _share(is_exact(fresh, predict(model, fresh, recurrences)))

    print(f"share of right answers that stay right with the nodes alone that break so\n"
          f"much, of {len(found)}, and all others replaced by their means; and with as "
          f"many\nrandom nodes, best of 10\n     breaks   nodes    right   random")
    rows = []
    for least in (0.0, 0.01, 0.05, 0.2):
        kept = {node for node, damage in found.items() if damage.fails > least}
        draws = [torch.randperm(len(found), generator=generator)[:len(kept)].tolist()
                 for _ in range(10)]
        random = max(right({list(found)[n] for n in draw}) for draw in draws)
        rows.append({"breaks_more_than": least, "nodes": len(kept),
                     "right": right(kept), "random": random})
        print(f"  > {least:7.1%} {len(kept):>7} {rows[-1]['right']:>8.1%} "
              f"{rows[-1]['random']:>8.1%}")
    return {"nodes": len(found), "kept": rows}, None


# What the second paper says that a node may hold, the class of question that shows it,
# and how the column of the other question differs: `digit`; `carry`, made or not; or
# `undecided`, in one of the two only.
SUBTASKS = {"SA": ("S", "digit"), "SC": ("S", "carry"), "ST": ("S", "undecided"),
            "MD": ("M", "digit"), "MT": ("M", "undecided"),
            "ND": ("N", "digit"), "NT": ("N", "undecided")}


def patch_pairs(task: str, subtask: str, place: int, digits: int, samples: int,
                seed: int, null: bool = False) -> list[Tensor]:
    """Clean questions; others; and what the clean ones must answer if the sub-task had,
    in one column, the value that it has in the others.

    Source: arXiv 2402.02619, "interchange intervention".
    # DIFFERS: the authors choose one pair of questions for each sub-task. Here both are
    random ones of a class, unlike in every column, and the expected answer follows from
    data.answer_from_labels: a node that holds more than its sub-task gives itself away.

    Arguments:  subtask  a key of SUBTASKS
                place    of the column, units 0
                null     the column has the same labels in both, so that its sub-tasks
                         must not change the answer
    Returns:    clean, other, expected: each (N, T) with N <= samples
    """
    kind, what = SUBTASKS[subtask]
    lines = questions(task, digits, 100 * samples, seed)
    named = data.question_class(*operands(lines, task, digits))
    lines = lines[torch.tensor([name[0] == kind for name in named])]
    others = lines.roll(1, dims=0)
    clean, other = ([labels[name] for name in data.CLASS_LABELS[kind]]
                    for labels in (data.digit_labels(*operands(part, task, digits)[:2])
                                   for part in (lines, others)))
    mixed, swapped = [label.clone() for label in clean], int(what != "digit")
    mixed[swapped][:, place] = other[swapped][:, place]
    same_digit, same_carry = ((x == y)[:, place] for x, y in zip(clean, other))
    undecided = [(labels[1] == data.UNDECIDED)[:, place] for labels in (clean, other)]
    fits = same_digit & same_carry if null else {
        "digit": ~same_digit & same_carry, "carry": same_digit & ~same_carry,
        "undecided": undecided[0] ^ undecided[1]}[what]
    before, after = (data.answer_from_labels(kind, *labels)
                     for labels in (clean, mixed))
    # One digit may change: a node at one token cannot answer for a carry passed on.
    # The answer has to stay in its class, and as long as it is.
    fits &= (before != after).sum(dim=1) == int(not null)
    size = torch.arange(1, digits + 2)
    lengths = [((answer != 0) * size).amax(dim=1) for answer in (before, after)]
    fits &= data.TASKS[task].fixed_width | (lengths[0] == lengths[1])
    fits &= (kind == "S") | (lengths[1] <= digits)
    fits &= (kind != "N") | (lengths[1] > 0)
    expected, names = lines.clone(), token_names(task, digits)
    columns = [names.index(f"A{n}") for n in range(digits + 1)]
    expected[:, columns] = torch.where(lines[:, columns] < 10, after, lines[:, columns])
    return [part[fits][:samples] for part in (lines, others, expected)]


def interchange(model: looped.LoopedTransformer, nodes, pairs: list[Tensor],
                outputs: dict, recurrences: int | None) -> float:
    """Share of clean questions that are answered as expected when these nodes put out
    what they did in the other questions."""
    with replaced(model, nodes, outputs):
        return _share(is_exact(pairs[2], predict(model, pairs[0], recurrences)))


def patch(model: looped.LoopedTransformer, task: str, digits: int, samples: int,
          seed: int = 0, recurrences: int | None = None) -> list[dict]:
    """For each sub-task and column, the node that carries it best: put its output in
    other questions' runs into clean ones, and require the exact answer.

    A node is tried alone, at all recurrences, and, since heads share work, with one
    other head of its layer and with all. The best is chosen on one set of pairs and
    scored on fresh ones.

    Returns:  for each sub-task and place: pairs, their number; exact, the share of
              answers that are as predicted; and, if it is above a half: where and
              nodes; null, the share that stay when the column has the same labels
    Raises:   ValueError when the model answers none of the pairs right
    """
    H, names = model.config.heads, token_names(task, digits)
    singles = all_nodes(model, len(names) - 1, recurrences)
    loops = range(recurrences or model.config.recurrences)
    groups = [(node,) for node in singles]
    groups += [tuple(node._replace(recurrence=loop) for loop in loops)
               for node in singles if node.recurrence == 0 and len(loops) > 1]
    together = {*itertools.combinations(range(H), 2), tuple(range(H))}
    groups += [tuple(node._replace(part=head) for head in heads)
               for node in singles if node.part == 0 for heads in sorted(together)]

    def drawn(subtask: str, place: int, seed: int, null: bool = False):
        """Pairs of which the model answers both questions right, and the outputs of its
        nodes in the others; or None."""
        pairs = patch_pairs(task, subtask, place, digits, samples, seed, null)
        if not len(pairs[0]):             # a carry out of the top would lengthen them
            return None
        right = torch.stack([is_exact(lines, predict(model, lines, recurrences))
                             for lines in pairs[:2]]).all(dim=0)
        if not right.any():
            return None
        pairs = [lines[right] for lines in pairs]
        return pairs, activations(model, pairs[1], recurrences)[1]

    rows = []
    for subtask, place in itertools.product(SUBTASKS, range(digits)):
        choice, fresh = (drawn(subtask, place, part) for part in (seed, seed + 1))
        if choice is None or fresh is None:
            continue
        best = max(groups, key=lambda nodes: interchange(model, nodes, *choice,
                                                         recurrences))
        row = {"subtask": subtask, "place": place, "pairs": len(fresh[0][0]),
               "exact": interchange(model, best, *fresh, recurrences)}
        null = drawn(subtask, place, seed, null=True)
        if row["exact"] > 0.5 and null:
            row |= {"where": nodes_name(model, best, names), "nodes": best,
                    "null": interchange(model, best, *null, recurrences)}
        rows.append(row)
    if not rows:
        raise ValueError(f"this model answers no question of {digits} digits right "
                         f"that could be changed")
    return rows


def nodes_name(model, nodes: tuple[Node, ...], names: list[str]) -> str:
    """Nodes at one token in words: "layer 1, head 2 at A3", "layer 1, head 1 + 2"."""
    part, first, last = part_name(model, nodes[0]), nodes[0], nodes[-1]
    if first.part != last.part:
        part += "".join(f" + {node.part + 1}" for node in nodes[1:])
    if first.recurrence != last.recurrence:
        part = part.replace("recurrence 1", "all recurrences")
    return f"{part} at {names[first.token]}"


def patch_report(model, settings: dict, digits: int, samples: int, seed: int,
                 recurrences: int | None) -> tuple[dict, str]:
    """Print which node carries each sub-task of each column; returns the figures and a
    map of these nodes."""
    task, names = settings["task"], token_names(settings["task"], digits)
    rows = patch(model, task, digits, samples, seed, recurrences)
    print("the node that best carries a sub-task of a column; in how many pairs the\n"
          "answer is as predicted when it comes from another question; in how many it\n"
          "stays when the column's labels are the same\n"
          "  subtask   pairs  predicted   stays   node")
    best = {}
    for row in rows:
        where = f"{row['null']:>8.1%}   {row['where']}" if "where" in row else (
            f"{'':>8}   no single node")
        print(f"  {row['subtask'] + str(row['place']):<7} {row['pairs']:>7} "
              f"{row['exact']:>10.1%}{where}")
        for node in row.get("nodes", ()):
            best[node] = max(best.get(node, row), row, key=lambda row: row["exact"])
    shares = {node: best[node]["exact"] if node in best else 0.0
              for node in all_nodes(model, len(names) - 1, recurrences)}
    picture = map_svg(
        model, shares, {node: f"{row['subtask']}{row['place']}"
                        for node, row in best.items()}, names,
        f"{task}, {digits} + {digits} digits: the node that carries a sub-task best",
        "named where more than half of the answers are as predicted; pale yellow: all")
    for row in rows:
        row["nodes"] = [node_facts(model, node) | {"token": names[node.token]}
                        for node in row.get("nodes", ())]
    return {"subtasks": rows}, picture


def pca(model: looped.LoopedTransformer, task: str, lines: Tensor, digits: int,
        recurrences: int | None = None) -> list[dict]:
    """Does the first principal component of a head's output tell a carry, no carry and
    undecided apart?

    Source: arXiv 2402.02619. For each class of questions and each head and token, the
    two first components of its outputs, and for each column the share of the first
    one's variance that lies between the three values of ST (MT, NT) in that column.

    Returns:  best first: label, e.g. "ST3"; node; between, that share; variance, the
              first component's share of all; points (N, 2) and values (N,)
    Raises:   ValueError when no class has ten questions
    """
    a, b, subtract = operands(lines, task, digits)
    labels = data.digit_labels(a, b)
    named = data.question_class(a, b, subtract)
    outputs = activations(model, lines, recurrences)[1]
    rows = []
    for kind, (_, label) in data.CLASS_LABELS.items():
        of_class = torch.tensor([name[0] == kind for name in named])
        for node in all_nodes(model, lines.shape[1] - 1, recurrences):
            # What stands after the end of a short answer is no output.
            chosen = of_class & (lines[:, node.token + 1] != data.PAD)
            if node.part == model.config.heads or chosen.sum() < 10:
                continue
            where, columns = node_output(model, node)
            x = outputs[where][chosen, node.token, columns].float().cpu()
            u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
            if s[0] < 1e-6:
                continue                          # this head reads nothing that differs
            points, total = (u * s)[:, :2], s[0] ** 2
            for place in range(digits):
                values = labels[label][chosen, place]
                between = sum(
                    (values == value).sum() * points[values == value, 0].mean() ** 2
                    for value in values.unique())
                rows.append({"label": f"{label}{place}", "node": node,
                             "between": float(between / total),
                             "variance": float(total / s.square().sum()),
                             "points": points, "values": values})
    if not rows:
        raise ValueError(f"{len(lines)} questions are too few: no class has 10 of them")
    return sorted(rows, key=lambda row: -row["between"])


def pca_report(model, settings: dict, digits: int, samples: int, seed: int,
               recurrences: int | None) -> tuple[dict, str]:
    """Print the heads whose output tells carries apart best; returns the figures and a
    picture of the best one's first two components."""
    task, names = settings["task"], token_names(settings["task"], digits)
    rows = pca(model, task, questions(task, digits, samples, seed), digits, recurrences)
    print("the heads whose first principal component tells a carry, no carry and\n"
          "undecided apart best: the share of its variance between the three, and its\n"
          "share of all variance")
    for row in rows[:12]:
        print(f"  {row['label']:<5} {row['between']:>6.1%} {row['variance']:>7.1%}  "
              f"{nodes_name(model, (row['node'],), names)}")
    best = rows[0]
    title = f"{best['label']}: {nodes_name(model, (best['node'],), names)}"
    return {"heads": [{"label": row["label"], "between": row["between"],
                       "variance": row["variance"]}
                      | node_facts(model, row["node"])
                      | {"token": names[row["node"].token]} for row in rows[:100]]
            }, scatter_svg(best["points"], best["values"], title)


def scatter_svg(points: Tensor, values: Tensor, title: str) -> str:
    """Points (N, 2) as an SVG, coloured by carry, no carry and undecided."""
    low, high = points.amin(dim=0), points.amax(dim=0)
    spots = 40 + 420 * (points - low) / (high - low).clamp(min=1e-9)
    parts = []
    for value, (name, colour) in enumerate((
            ("no carry", "#264b96"), ("carry", "#c1272d"), ("undecided", "#e6a117"))):
        parts.append(_text(40 + 120 * value, 515, name, f'fill="{colour}"'))
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{colour}" '
                  f'fill-opacity="0.6"/>' for x, y in spots[values == value].tolist()]
    return _svg(500, 530, title, parts)


def readout(model: looped.LoopedTransformer, task: str, lines: Tensor, digits: int,
            most: int) -> dict[int, dict]:
    """When each digit becomes right: read the answer out after every recurrence.

    Arguments:  lines  (B, T), sums whose operands both have `digits` digits
                most   recurrences to try, 1 to this many
    Returns:           length of the carry chain that feeds a digit -> the number of
                       such digits, and their share right after 1, 2, ... recurrences
    """
    a, b, _ = operands(lines, task, digits)
    carry = data.carry_out(a + b)
    place = torch.arange(digits)
    # Columns that carry, without a gap, below each place and counted from there down.
    chain = place - torch.where(carry, -1, place).cummax(dim=1).values
    chain = torch.nn.functional.pad(chain, (1, 0))[:, :digits]
    first = 2 * digits + 1                                    # "=" predicts the units
    right = torch.stack([predict(model, lines, n)[:, first:first + digits]
                         == lines[:, first + 1:first + 1 + digits]
                         for n in range(1, most + 1)])          # (most, B, digits)
    return {length: {"digits": int((chain == length).sum()),
                     "right": right[:, chain == length].double().mean(dim=1).tolist()}
            for length in chain.unique().tolist()}


def readout_report(model, settings: dict, digits: int, samples: int, seed: int,
                   recurrences: int | None) -> tuple[dict, None]:
    """Print and return the shares of `readout`, for sums with long carry chains."""
    task, most = settings["task"], recurrences or 2 * model.config.recurrences
    lines = questions(task, digits, samples, seed)
    shares = readout(model, task, lines, digits, most)
    print(f"share of digits right after so many recurrences, by the length of the\n"
          f"carry chain that feeds them, at {digits} + {digits} digits:\n"
          f"  chain  digits" + "".join(f"{n:>7}" for n in range(1, most + 1)))
    for length, row in shares.items():
        print(f"  {length:>5} {row['digits']:>7}"
              + "".join(f"{share:>7.2f}" for share in row["right"]))
    return {"readout": shares}, None


# --------------------------------------------------------------------------------------
# 7. The command
# --------------------------------------------------------------------------------------


# The flags that look inside a model: a report, which prints what it finds and returns
# (figures, picture or None), and what the user is told of it.
WHY = {"attend": (attention_report, "what each head reads of the operands"),
       "ablate": (ablation_report, "what breaks if a head or MLP, at any token, is "
                                   "replaced by its mean"),
       "keep": (keep_report, "do the nodes that matter suffice without the others"),
       "patch": (patch_report, "which node carries a digit or a carry of each column"),
       "pca": (pca_report, "which head's output tells carries apart"),
       "readout": (readout_report, "after which recurrence each digit is right")}


def newest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last. ValueError when there is none."""
    found = sorted(Path(folder).glob("*/checkpoint.pt"),
                   key=lambda path: path.stat().st_mtime)
    if not found:
        raise ValueError(f"no run in {folder}/: train one with `python train.py`, or "
                         f"name a run folder or checkpoint")
    return found[-1].parent


def check_targets(targets: list[Path]) -> None:
    """Find out before the work whether its result can be written. ValueError if not."""
    for target in targets:
        if not target.parent.is_dir():
            raise ValueError(f"{target}: there is no folder {target.parent}")
        if target.exists() and not (target.is_file() and target.suffix != ".pt"):
            raise ValueError(f"{target} is in the way: name another file")
        unfinished = target.with_name(target.name + ".partial")
        unfinished.touch()                  # an OSError here says what is not allowed
        unfinished.unlink()
    if len(set(targets)) < len(targets):
        raise ValueError(f"{targets[0]} is named twice: name two files")


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    unfinished = path.with_name(path.name + ".partial")
    unfinished.write_text(text)
    unfinished.replace(path)


def build_parser() -> argparse.ArgumentParser:
    """The flags of `python evaluate.py`."""
    parser = argparse.ArgumentParser(
        usage="python evaluate.py [RUN] [flags]; --help lists them",
        description="Score a run by exact match on a grid of operand lengths.")
    parser.add_argument("run", nargs="?", metavar="RUN",
                        help="run folder or checkpoint; the newest run when left out")
    parser.add_argument("--task", help="test on another task of the same tokens, e.g. "
                        "a model of both on its additions")
    parser.add_argument("--max-digits", type=int, metavar="N", help="largest operand; "
                        "past 100 only equal lengths (default: as in the run)")
    parser.add_argument("--samples", type=int, metavar="K", help="problems a cell")
    parser.add_argument("--every", type=int, metavar="N", help="beyond the training "
                        "lengths score only multiples of N")
    parser.add_argument("--recurrences", type=int, metavar="N",
                        help="run the layers this often instead of as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the problems (0)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best here)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the grid")
    parser.add_argument("--benchmark", action="store_true",
                        help="time one pass against decoding token by token")
    for name, (_, meaning) in WHY.items():
        parser.add_argument(f"--{name}", type=int, metavar="N",
                            help=f"{meaning}, in questions of N + N digits")
    parser.add_argument("--ask", metavar="SUM", help='one question, like "123+456"')
    return parser


def fixed_width_report(model, settings: dict, digits: int, samples: int, seed: int,
                       recurrences: int | None) -> dict:
    """Count failures in uniform and in enriched questions, print and return them."""
    task, started = settings["task"], time.perf_counter()
    kinds = {"uniform": {}, "enriched": {"long_carries": 0.4, "long_borrows": 0.4}}
    parts = {kind: count_failures(model, task, digits, samples, seed, recurrences,
                                  **enrichment) for kind, enrichment in kinds.items()}
    for name, counts in parts.items():
        print(f"{name}: {failure_table(counts)}")
    exact = 1 - parts["uniform"]["failures"] / samples
    return {"task": task, "train_digits": digits, "max_digits": digits,
            "samples": samples, "seed": seed, "lengths": [digits], "grid": [[exact]],
            "bands": {"id": exact}, **parts, **machine(model, started)}


def machine(model, started: float) -> dict:
    """What a result has to say about the model, the machine and the time."""
    device = model.digits.device
    return {"parameters": sum(weight.numel() for weight in model.parameters()),
            "device": looped.device_name(device), "torch": torch.__version__,
            "precision": str(looped.fastest_precision(device))[6:],
            "seconds": round(time.perf_counter() - started, 1)}


def grid_report(model, settings: dict, max_digits: int, samples: int, seed: int,
                recurrences: int | None) -> dict:
    """Measure, print the picture, the bands and the first mistakes; return it all."""
    started, mistakes = time.perf_counter(), []
    task, train_digits = settings["task"], settings["train_digits"]
    every, text = settings["eval_every"], {name: settings[name] for name in TEXT}
    result = {"task": task, "train_digits": train_digits, "max_digits": max_digits,
              "samples": samples, "every": every, "seed": seed,
              "recurrences": recurrences or model.config.recurrences}
    how = (train_digits, max_digits, samples, every, seed, recurrences)
    if settings.get("compile") and model.digits.is_cuda:
        looped.compile_layers(model)
    result |= measure(model, task, *how, mistakes, **text)
    if task == "both":               # PAPER: Figure 5 scores the operations apart
        result |= {f"bands_{part}": measure(model, part, *how, **text)["bands"]
                   for part in ("addition", "subtraction")}
    if task == "sorting":           # PAPER: Table 2: exact, and the least element alone
        result["bands_least"] = measure(model, task, *how, score=is_first_right,
                                        **text)["bands"]
    result |= machine(model, started)
    print(terminal_picture(result))
    names = {"id": f"in distribution (up to {min(train_digits, max_digits)} digits)",
             "ood": f"longer, up to {min(max_digits, GRID_LIMIT)}",
             "ood_digits": "longer numbers", "ood_list": "longer lists",
             "ood_both": "longer numbers in longer lists",
             "ood_100": f"equal lengths 101 to {max_digits}"}
    for key in [key for key in result if key.startswith("bands")]:
        for band, share in result[key].items():
            what = " ".join(["exact match", *key.split("_")[1:]])
            print(f"  {what}, {names[band]}: {100 * share:.2f}%")
    if mistakes:
        many = "or more " * (len(mistakes) == KEPT_MISTAKES)
        print(f"  {len(mistakes)} {many}wrong; the shortest, as the model reads it:")
        for mistake in mistakes[:3]:
            print(show_mistake(*mistake))
        if task == "addition" and not any(text.values()):
            print(mistake_table(mistakes))
    return result


def open_run(args: argparse.Namespace) -> tuple[looped.LoopedTransformer, dict]:
    """The model and the settings of the run that the flags name.

    Raises ValueError, in one line, for every flag that cannot be followed.
    """
    for name in ("max_digits", "samples", "every", "recurrences", *WHY):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, but must be at "
                             f"least 1")
    if not 0 <= args.seed <= 10**6:
        raise ValueError(f"--seed is {args.seed}, but must be from 0 to 1000000")
    run = newest_run() if args.run is None else Path(args.run)
    check_targets([file for file in (args.json, args.svg) if file is not None])
    device = looped.choose_device(args.device)
    settings = looped.read_checkpoint(run)["settings"]
    for name in ("task", "train_digits", "eval_digits", "eval_samples", "eval_every",
                 *TEXT):
        if name not in settings:
            raise ValueError(f"{run}: its settings lack {name!r}")
    model, task = looped.load(run, device), args.task or settings["task"]
    if task not in data.TASKS:
        raise ValueError(f"--task {task!r}: choose one of {', '.join(data.TASKS)}")
    text = {name: settings[name] for name in TEXT}
    if data.vocabulary_size(task, **text) > model.config.vocab_size:
        raise ValueError(f"--task {task}: this model was trained on "
                         f"{settings['task']} and lacks the tokens for it")
    other_text = task == "sorting" or any(text.values())
    flags = [name for name in ("ask", "benchmark", *WHY) if getattr(args, name)]
    if other_text and flags:
        raise ValueError(f"--{flags[0]} needs two operands, without index hints or "
                         f"spaces between them")
    if len(flags) > 1:
        raise ValueError(f"--{flags[0]} and --{flags[1]}: choose one at a time")
    if flags and flags[0] in WHY and (args.samples or 200) < 20:
        raise ValueError(f"--samples {args.samples}: --{flags[0]} takes means over "
                         f"questions, say 20 or more")
    if args.readout and task != "addition":
        raise ValueError(f"--readout needs --task addition, not {task}")
    if flags and flags[0] in WHY and not set("+-") & set(data.TASKS[task].symbols):
        raise ValueError(f"--{flags[0]} needs sums or differences, not {task}")
    tables = [f"--{name}" for name in ("keep", "readout") if getattr(args, name)]
    if tables and args.svg:
        raise ValueError(f"{tables[0]} prints a table and has no picture: leave --svg "
                         f"out")
    return model, {"preset": run.name, **settings, "task": task,
                   "eval_every": args.every or settings["eval_every"]}


def check_digits(model, settings: dict, digits: int, flag: str) -> None:
    """ValueError, in one line, when the model cannot be tested on so many digits."""
    task = data.TASKS[settings["task"]]
    if task.fixed_width and digits != settings["train_digits"]:
        raise ValueError(f"{flag}: in the fixed-width format this model knows "
                         f"{settings['train_digits']} digits only")
    text = {name: settings[name] for name in TEXT}
    model.config.check_reach(task.places(digits) + model.config.test_offset,
                             line_tokens(settings["task"], digits, **text), flag)


def main(argv: list[str] | None = None) -> None:
    """Score a run or ask it a question, as the flags say (sys.argv when left out)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        model, settings = open_run(args)
        task, train_digits = settings["task"], settings["train_digits"]
        if args.ask is not None:
            return print(ask(model, task, args.ask, args.recurrences, train_digits))
        if args.benchmark:
            return print(compare_speed(model, task))
        why = next((name for name in WHY if getattr(args, name)), None)
        digits = getattr(args, why or "max_digits") or settings["eval_digits"]
        samples = args.samples or (200 if why else settings["eval_samples"])
        check_digits(model, settings, digits, f"--{why or 'max-digits'} {digits}")
        how = (model, settings, digits, samples, args.seed, args.recurrences)
        if why:
            result, picture = WHY[why][0](*how)
            result = {"task": task, "digits": digits, "samples": samples,
                      "seed": args.seed} | result
        else:
            fixed = data.TASKS[task].fixed_width
            result = (fixed_width_report if fixed else grid_report)(*how)
            means = ", ".join(f"{band} {100 * share:.1f}%"
                              for band, share in result["bands"].items())
            picture = svg_picture(result, f"{settings['preset']}, {task}: {means}")
        if args.json:
            write_whole(args.json, json.dumps(result) + "\n")
        if args.svg and picture is not None:
            write_whole(args.svg, picture)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except RuntimeError as error:
        if not looped.is_out_of_memory(error):
            raise
        parser.exit(1, "evaluate.py: out of memory: ask for fewer digits\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nevaluate.py: stopped; nothing was written\n")


if __name__ == "__main__":
    main()
