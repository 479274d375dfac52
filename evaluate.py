"""How well, how far, and why: exact match on a grid of lengths, pictures, questions.

Read it beside section 4 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399) and its Figures 1 and 4; sections 3, 6 and 7 beside the
second paper (arXiv 2402.02619). It needs torch, and data.py, abacus.py and looped.py
beside it.

    python evaluate.py                             the newest run
    python evaluate.py runs/laptop-addition --max-digits 60 --every 5
    python evaluate.py runs/a-0 runs/a-1 runs/b-0 --svg x.svg      several, compared
    python evaluate.py --ask "123456789+987654321"
    python evaluate.py --attend "3456+7890"        what each head reads
    python evaluate.py --ablate 6                  what breaks without a head or MLP

A problem counts when every answer token and the end token are right. A greedy answer is
right if and only if, given the true answer so far, every next token is the most likely
one. So one pass over the finished line scores a problem, and nothing is decoded token
by token; `--ask` decodes for real. (In 16 bits the two may round otherwise.)

Glossary
    cell    all problems of one size: as a rule, of one pair of operand lengths
    id      "in distribution": both operands within the training lengths
    ood     "longer", out of distribution: at least one operand is longer than those of
            the training, and both have at most 100 digits. The numbers of a list have
            up to so many digits, and some lists by chance none that is longer
    ood_100 "past 100 digits", operands equally long     paper: "100+ OOD"
    node    a head, or a feed-forward network, at one token and one recurrence
    report  a function that takes a Job and returns figures, text, and a picture or None

Not here: anything that trains (train.py).
"""

import argparse
import collections
import contextlib
import html
import itertools
import json
import math
import re
import statistics
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import looped        # before torch: its first lines say how torch is to be loaded

import torch
from torch import Tensor

import data

# PAPER: section 4: the grid ends at 100 digits; "100+ OOD" has equal lengths only.
GRID_LIMIT = 100


# --------------------------------------------------------------------------------------
# 1. Exact match: one forward pass for many problems
# --------------------------------------------------------------------------------------


def cell_problems(task: str, size: tuple[int, int], samples: int, seed: int,
                  **options):
    """Yield the test problems of a cell, (1000 or fewer, T): they depend on cell, seed
    and number alone.

    They are made on the CPU, so that every device is asked the same questions, and in
    parts, so that a million of them fit. `options` are those of the task.
    """
    generator = torch.Generator().manual_seed(
        (seed + 1) * 10**12 + size[0] * 10**6 + size[1])
    for first in range(0, samples, 1000):
        sizes = torch.tensor([[size]]).expand(min(1000, samples - first), 1, 2)
        lengths = data.TASKS[task].lengths(sizes, generator, **options)
        yield data.make_contexts(task, lengths, generator, **options)


@torch.inference_mode()
def predict(model: looped.LoopedTransformer, tokens: Tensor,
            recurrences: int | None = None) -> Tensor:
    """The likeliest token after each token, given the true ones: (B, T) -> (B, T-1).

    # DIFFERS: the authors run the whole prefix again for every token of an answer. One
    # pass gives the same verdicts; a test compares the two. (Their state starts from
    # new noise each time, so that two of their tests may differ; here it repeats.)
    """
    return likeliest(model, tokens.to(model.device), recurrences)[:, :-1].cpu()


def likeliest(model: looped.LoopedTransformer, tokens: Tensor,
              recurrences: int | None) -> Tensor:
    """The likeliest token after each, (B, T), and never padding, which is no answer.
    The noise of the state repeats, and is not drawn from the run's. ValueError for a
    model in training mode, whose offsets are random."""
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices), looped.autocast(model):
        torch.manual_seed(0)
        logits = model(tokens, recurrences)[..., :model.config.vocab_size]
    logits[..., data.PAD] = -torch.inf
    return logits.argmax(dim=-1)


def batches(model: looped.LoopedTransformer, tokens: Tensor) -> tuple[Tensor, ...]:
    """Lines cut into as many at once as fill a GPU, or a CPU's cache."""
    budget = 2**17 if model.device.type == "cuda" else 2**14            # tokens
    return tokens.split(max(1, budget // tokens.shape[1]))


def is_exact(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in every answer token and the end token: (B,) bool."""
    return ((predicted == tokens[:, 1:]) | ~data.answer_mask(tokens)[:, 1:]).all(dim=1)


def is_first_right(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in the answer's first token, e.g. the least of a list."""
    return ((predicted == tokens[:, 1:]) | (tokens[:, :-1] != data.EQUALS)).all(dim=1)


def exact_match(model: looped.LoopedTransformer, task: str,
                cells: list[tuple[int, int]], samples: int, seed: int = 0,
                recurrences: int | None = None, mistakes: list | None = None,
                score=is_exact, **options) -> list[float]:
    """Share of exactly right problems in each cell, in the order of `cells`.

    Arguments:
        cells      sizes, see data.py: as a rule the lengths of both operands
        mistakes   a list that receives the first few (tokens, predicted) that are wrong
        score      what counts as right: is_exact or is_first_right
        options    of the task, see data.TASKS
    Raises:        ValueError when a length lies past a position table of the model
    """
    shares = []
    for size in cells:
        right = 0
        for part in cell_problems(task, size, samples, seed, **options):
            for tokens in batches(model, part):
                predicted = predict(model, tokens, recurrences)
                verdicts = score(tokens, predicted)
                right += int(verdicts.sum())
                if mistakes is not None and len(mistakes) < 3:
                    mistakes += zip(tokens[~verdicts], predicted[~verdicts])
        shares.append(right / samples)
        if sys.stderr.isatty() and len(cells) > 10:
            print(f"{len(shares)} of {len(cells)} cells", end="\r", file=sys.stderr)
    return shares


def rehearse(model: looped.LoopedTransformer, task: str, digits: int, problems: int = 1,
             offset: int | None = None, **options) -> None:
    """Embed some of the largest problems that are to come, so that a number that runs
    past a table is an error now and not after hours of smaller ones.

    Arguments:  problems  to a context
                offset    the largest; the test's when left out
                options   of the task
    Raises:     ValueError, by whatever does not fit
    """
    sizes = torch.full((16, problems, 2), digits)
    lines = data.make_contexts(task, data.TASKS[task].lengths(sizes, None),
                               torch.Generator().manual_seed(0), **options)
    offset = model.config.test_offset if offset is None else offset
    with torch.no_grad():
        model.embed(lines.to(model.device), offset)


def text_options(settings: dict) -> dict:
    """Of the options of a run, those that change the text: the test has them too."""
    return {name: value for name, value in settings["options"].items()
            if name in data.TEXT_OPTIONS}


# --------------------------------------------------------------------------------------
# 2. The grid and its bands
# --------------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a report is to look at."""

    model: looped.LoopedTransformer
    settings: dict                  # of the run; its task may be another than trained
    digits: int                     # of the questions, or the most of them
    samples: int
    seed: int = 0
    recurrences: int | None = None  # as in training when left out

    @property
    def task(self) -> str:
        """The name of the task."""
        return self.settings["task"]

    @property
    def options(self) -> dict:
        """How the problems are written."""
        return text_options(self.settings)

    @property
    def loops(self) -> int:
        """How often the layers run."""
        return self.recurrences or self.model.config.recurrences

    @property
    def operand_digits(self) -> int:
        """The digits up to which zeros pad every operand; 0 if none do."""
        if data.TASKS[self.task].fixed_width:
            return self.settings["train_digits"]
        return self.options.get("padded_to", 0)

    @property
    def units_first(self) -> bool:
        """Whether numbers are written least significant digit first."""
        return not (data.TASKS[self.task].fixed_width
                    or self.options.get("plain_order"))


def measure(job: Job, mistakes: list | None = None, score=is_exact, fewest: int = 1,
            **options) -> dict:
    """The grid of exact match and the means of its bands.

    Where lengths are left out (`eval_every` above 1), a cell stands for the lengths
    between its neighbour below and itself, and weighs as much in the mean of its band.

    Arguments:  fewest   numbers in a list, or digits of the second operand
                options  more of them, e.g. full_carries=True
    Returns:    lengths and columns, the axes of the grid; grid (rows: first operand, or
                most digits in a list; columns: second operand, or length of the list);
                equal: the shares of equal lengths, also past 100 (of nx2, by the first
                factor's); bands: id, ood, and, past 100 digits, ood_100; for lists also
                the paper's three parts of ood
    """
    trained, every = job.settings["train_digits"], job.settings["eval_every"]
    lengths = [n for n in range(1, min(job.digits, GRID_LIMIT) + 1)
               if n <= trained or n % every == 0 or n == job.digits]
    only = data.TASKS[job.task].second_digits
    columns = [only] if only else [n for n in lengths if n >= fewest]
    cells = list(itertools.product(lengths, columns))
    beyond = [(n, only or n) for n in range(GRID_LIMIT + 1, job.digits + 1)
              if n % every == 0 or n == job.digits]
    shares = dict(zip(cells + beyond, exact_match(
        job.model, job.task, cells + beyond, job.samples, job.seed, job.recurrences,
        mistakes, score, **job.options, **options)))
    below = dict(zip(lengths, [0, *lengths]))
    bands = {name: [] for name in BANDS}                   # name -> (share, weight)
    for first, second in cells:
        part = (shares[first, second],
                (first - below[first]) * (second - below.get(second, 0)))
        longer = first > trained, second > max(trained, only)
        bands["ood" if any(longer) else "id"].append(part)
        if job.task == "sorting" and any(longer):
            bands[{(True, False): "ood_digits", (False, True): "ood_list",
                   (True, True): "ood_both"}[longer]].append(part)
    bands["ood_100"] = [(shares[size], 1) for size in beyond]
    return {"lengths": lengths, "columns": columns,
            "grid": [[shares[row, column] for column in columns] for row in lengths],
            "equal": {first: share for (first, second), share in shares.items()
                      if second == (only or first)},
            "bands": {name: sum(share * weight for share, weight in parts)
                      / sum(weight for _, weight in parts)
                      for name, parts in bands.items() if parts}}


BANDS = {"id": "in distribution", "ood": "longer", "ood_digits": "longer numbers",
         "ood_list": "longer lists", "ood_both": "longer numbers in longer lists",
         "ood_100": "past 100 digits"}
# The bands of a part of the problems, or of another score.
PARTS = {"bands": "exact match", "bands_addition": "sums",
         "bands_subtraction": "differences", "bands_full_carries": "carries throughout",
         "bands_least": "the least number of a list",
         "bands_one_length": "two numbers or more, all of one length"}


def grid_report(job: Job) -> tuple[dict, str, str]:
    """The grid, its bands, the first mistakes; and a picture of the grid."""
    if data.TASKS[job.task].fixed_width:
        return fixed_width_report(job)
    started, mistakes, task = time.perf_counter(), [], job.task
    if job.settings["compile"] and job.model.device.type == "cuda":
        looped.compile_layers(job.model)
    result = facts(job) | measure(job, mistakes=mistakes)
    if task == "both":               # PAPER: Figure 5 scores the operations apart
        for part in ("addition", "subtraction"):
            alone = job._replace(settings=job.settings | {"task": part})
            result[f"bands_{part}"] = measure(alone)["bands"]
    if task == "sorting":           # PAPER: Table 2: exact, and the least element alone
        result["bands_least"] = measure(job, score=is_first_right)["bands"]
        # Numbers that differ in length need no comparing of their digits.
        result["bands_one_length"] = measure(job, fewest=2, one_length=1.0)["bands"]
    if task == "addition":
        # Of uniform numbers carries are short. One that runs through a whole number may
        # fail all the same.
        some = job._replace(samples=math.ceil(job.samples / 4),
                            digits=min(job.digits, GRID_LIMIT))
        result["bands_full_carries"] = measure(some, full_carries=True)["bands"]
    result["seconds"] = round(time.perf_counter() - started, 1)
    text = ["rows: {}; columns: {}".format(*data.TASKS[task].axes),
            heat_text(result["grid"], *grid_names(result))]
    text += [f"  {name}, {BANDS[band]}: {100 * share:.2f}%"
             for key, name in PARTS.items() if key in result
             for band, share in result[key].items()]
    text += ["  wrong, as the model reads it:"] * bool(mistakes)
    text += [show_mistake(*mistake) for mistake in mistakes[:3]]
    return result, "\n".join(text), grid_svg(result)


def grid_names(result: dict) -> list[list[str]]:
    """What stands beside the rows of a result's grid, and above its columns."""
    return [list(map(str, result[axis])) for axis in ("lengths", "columns")]


def facts(job: Job) -> dict:
    """What a result has to say about the run, the test and the machine."""
    config, device = job.model.config, job.model.device
    return {"task": job.task, "train_digits": job.settings["train_digits"],
            "max_digits": job.digits, "samples": job.samples, "seed": job.seed,
            "every": job.settings["eval_every"],
            "recurrences": job.loops,
            "parameters": looped.parameter_count(config), "torch": torch.__version__,
            "device": looped.device_name(device), "precision": config.precision}


def show_mistake(tokens: Tensor, predicted: Tensor, width: int = 64) -> str:
    """A wrong answer under the true line, around its first mistake, and ^ under it.

    Each token is predicted from the true tokens before it, so that one slip does not
    spoil the rest. The text is as the model reads it.
    """
    line = data.decode(tokens).rstrip("_")
    start = line.index("=") + 1
    said = " " * start + data.decode(predicted[start - 1:len(line) - 1])
    marks = "".join(" ^"[a != b and b != " "] for a, b in zip(line, said))
    first = max(0, min(marks.index("^") - width // 2, len(line) - width))
    return "\n".join("    " + row[first:first + width].rstrip()
                     for row in (line, said, marks))


# --------------------------------------------------------------------------------------
# 3. The second paper's test: failures among a million questions
# --------------------------------------------------------------------------------------


def operands(job: Job, lines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both operands (B, digits), units in column 0, and whether to subtract, (B, 1), of
    lines (B, T) whose operands both have the job's digits."""
    a, b = lines[:, :job.digits], lines[:, job.digits + 1:2 * job.digits + 1]
    if not job.units_first:
        a, b = a.flip(1), b.flip(1)
    return a, b, lines[:, job.digits:job.digits + 1] == data.VOCABULARY.index("-")


def long_chains(task: str) -> dict[str, float]:
    """Options: 40% of the questions have long cascades of carries or borrows; uniform
    ones hardly have any."""
    return {name: 0.4 for name in ("long_carries", "long_borrows")
            if name in data.TASKS[task].options}


def count_failures(job: Job, **options) -> tuple[dict, str]:
    """Failures in fresh questions of a fixed-width task, by class and answer token.

    Source: arXiv 2402.02619, appendix: a million questions, teacher-forced.
    # DIFFERS: theirs are enriched as in their training; here uniform questions and such
    # with long chains are counted apart.

    Returns:    questions; failures; classes, each [failures, questions]; tokens,
                failures of each. And the text
    """
    seen, failed, wrong_tokens = (collections.Counter() for _ in range(3))
    first = 2 * job.digits + 2                                # of the answer's tokens
    names = token_names(job)[first:]
    for part in cell_problems(job.task, (job.digits, job.digits), job.samples, job.seed,
                              **options):
        for lines in batches(job.model, part):
            wrong = predict(job.model, lines, job.recurrences) != lines[:, 1:]
            wrong = wrong[:, first - 1:]
            named = data.question_class(*operands(job, lines))
            seen.update(named)
            failed.update(itertools.compress(named, wrong.any(dim=1).tolist()))
            wrong_tokens.update(dict(zip(names, wrong.sum(dim=0).tolist())))
    text = (f"{failed.total()} failures in {job.samples:,} questions: "
            f"{1e6 * failed.total() / job.samples:,.1f} per million\n  by class:  "
            + "  ".join(f"{name} {failed[name]}/{seen[name]}" for name in sorted(seen))
            + "\n  by token:  "
            + "  ".join(f"{name} {wrong_tokens[name]}" for name in names))
    classes = {name: [failed[name], seen[name]] for name in sorted(seen)}
    return {"questions": job.samples, "failures": failed.total(), "classes": classes,
            "tokens": dict(wrong_tokens)}, text


def fixed_width_report(job: Job) -> tuple[dict, str, str]:
    """Failures in uniform and in enriched questions."""
    started, result, text = time.perf_counter(), facts(job), []
    for kind, options in (("uniform", {}), ("enriched", long_chains(job.task))):
        result[kind], shown = count_failures(job, **options)
        text.append(f"{kind}: {shown}")
    exact = 1 - result["uniform"]["failures"] / job.samples
    result |= {"lengths": [job.digits], "columns": [job.digits], "grid": [[exact]],
               "bands": {"id": exact}, "equal": {job.digits: exact},
               "seconds": round(time.perf_counter() - started, 1)}
    return result, "\n".join(text), grid_svg(result)


# --------------------------------------------------------------------------------------
# 4. Tables and pictures
# --------------------------------------------------------------------------------------

SHADES = " .:-=+*#%@"      # from 0 to 1; "@" is exactly 1
INKS = "#264b96", "#c1272d", "#e6a117", "#2e8b57", "#7b3f99"
CENTRED = 'text-anchor="middle"'


def table(rows: list[dict], formats: dict[str, str]) -> str:
    """These columns of the rows, each in its format and as wide as its widest cell; the
    last one is flush left."""
    cells = [[*formats]] + [[format(row[name], form) if name in row else ""
                             for name, form in formats.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  " + "  ".join(
        [cell.rjust(width) for cell, width in zip(row[:-1], widths)] + row[-1:])
        for row in cells)


def heat_text(shares: list[list[float]], rows: list[str], columns: list[str]) -> str:
    """A heat map for the terminal: a name before each row, those of the columns written
    downwards above them."""
    left = max(map(len, rows)) + 2
    heading = zip(*(name.ljust(max(map(len, columns))) for name in columns))
    return "\n".join([" " * left + "".join(line) for line in heading] + [
        f"{name:>{left - 1}} " + "".join(SHADES[int(share * 9)] for share in row)
        for name, row in zip(rows, shares)]
        + [f'  columns: read downwards; from 0 to 1: "{SHADES}"'])


def heat_svg(shares: list[list], rows: list[str], columns: list[str], title: str,
             legend: str, labels: dict = {}, framed: int = 0) -> str:
    """The same as an SVG: short labels by (row, column), and a frame around so many of
    the first rows and columns. Neighbours of one colour in a row become one rectangle,
    so that a grid of 10,000 cells stays small."""
    wide = max(4, min(30, 900 // len(columns)))
    high, left, above = min(wide, 22), 190, 60
    parts = []
    for row, (name, line) in enumerate(zip(rows, shares)):
        x, y = left, above + high * row
        for ink, group in itertools.groupby(map(colour, line)):
            width = wide * len(list(group))
            parts.append(f'<rect x="{x}" y="{y}" height="{high}" width="{width}" '
                         f'fill="{ink}"/>')
            x += width
        if wide >= 10 or row % 5 == 4:
            parts.append(svg_text(left - 6, y + 0.7 * high, name, 'text-anchor="end"'))
    for column, name in enumerate(columns):
        if wide >= 10 or column % 5 == 4:
            parts.append(svg_text(left + wide * (column + 0.5), above - 6, name,
                                  CENTRED))
    for (row, column), label in labels.items():
        light = sum(bytes.fromhex(colour(shares[row][column])[1:])) > 400
        ink = "black" if light else "white"
        parts.append(svg_text(left + wide * (column + 0.5), above + high * (row + 0.7),
                              label, CENTRED + f' fill="{ink}"'))
    if framed:
        parts.append(f'<rect x="{left}" y="{above}" height="{high * framed}" '
                     f'width="{wide * min(framed, len(columns))}" fill="none" '
                     f'stroke="red"/>')
    below = above + high * len(rows) + 20
    across = max(640, left + wide * len(columns) + 20)         # the legend needs 640
    return svg(across, below + 10, title,
               [*parts, svg_text(20, below, legend, 'fill="gray"')])


def svg(width: int, height: int, title: str, parts: list[str]) -> str:
    """A whole picture around its parts."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        svg_text(20, 22, title, 'font-size="14"'), *parts, "</svg>"])


def svg_text(x: float, y: float, content, more: str = "") -> str:
    """A line of text at (x, y)."""
    return f'<text x="{x:g}" y="{y:g}" {more}>{html.escape(str(content))}</text>'


def colour(share: float | tuple) -> str:
    """From dark blue (0) to pale yellow (1), in 20 steps and one for 1 itself; three
    shares are mixed as red, green and blue."""
    if isinstance(share, tuple):
        return "#" + "".join(f"{round(255 * part):02x}" for part in share)
    level = math.floor(min(share, 1) * 20) / 20
    low, high = (38, 30, 90), (255, 245, 170)
    return "#" + "".join(f"{round(a + (b - a) * level):02x}" for a, b in zip(low, high))


def attention_svg(heads: dict[str, list], line: str, columns: int) -> str:
    """A panel for each head, so many side by side: a row for each token of an answer
    ("= > 6": at "=", to say 6), and in it how much is read of each token before."""
    asked, cell, parts = line.index("="), 17, []
    wide, high = cell * len(line) + 60, cell * (len(line) - asked) + 50
    for n, (name, shares) in enumerate(heads.items()):
        left, above = 70 + wide * (n % columns), 80 + high * (n // columns)
        parts.append(svg_text(left, above - 22, name, 'font-size="12"'))
        parts += [svg_text(left + cell * (column + 0.5), above - 5, token, CENTRED)
                  for column, token in enumerate(line[:-1])]
        for row, (reader, reads) in enumerate(enumerate(shares, asked)):
            parts.append(svg_text(left - 5, above + cell * (row + 0.7),
                                  f"{line[reader]} > {line[reader + 1]}",
                                  'text-anchor="end"'))
            parts += [f'<rect x="{left + cell * column}" y="{above + cell * row}" '
                      f'width="{cell - 1}" height="{cell - 1}" fill="{colour(part)}"/>'
                      for column, part in enumerate(reads[:reader + 1])]
    below = 60 + high * math.ceil(len(heads) / columns)
    legend = "dark blue: none of the attention; pale yellow: all of it"
    return svg(40 + wide * columns, below + 10, f"what each head reads: {line[:-1]}",
               [*parts, svg_text(20, below, legend, 'fill="gray"')])


def points_svg(points: Tensor, values: Tensor, names: list[str], title: str) -> str:
    """Points (N, 2), coloured by their values (N,), each of which has a name."""
    low, high = points.amin(dim=0), points.amax(dim=0)
    spots, parts = 40 + 420 * (points - low) / (high - low).clamp(min=1e-9), []
    for value, (name, ink) in enumerate(zip(names, INKS)):
        parts.append(svg_text(40 + 120 * value, 515, name, f'fill="{ink}"'))
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{ink}" '
                  f'fill-opacity="0.6"/>' for x, y in spots[values == value].tolist()]
    return svg(500, 530, title, parts)


def grid_svg(result: dict) -> str:
    """The grid of a result, the training square framed."""
    rows, columns = data.TASKS[result["task"]].axes
    means = ", ".join(f"{BANDS[band]} {share:.1%}"
                      for band, share in result["bands"].items())
    return heat_svg(result["grid"], *grid_names(result), f"{result['task']}: {means}",
                    f"rows: {rows}; columns: {columns}; dark blue: none right; pale "
                    f"yellow: all; framed: the sizes seen in training",
                    framed=sum(n <= result["train_digits"] for n in result["lengths"]))


def curves_svg(groups: dict[str, list[dict]], train_digits: int) -> str:
    """Exact match against the digits of the operands: for each group of runs a curve,
    the median of its seeds, named at its end, and a band from the worst to the best.

    Arguments:  groups  name -> for each run, digits -> exact match at equal lengths
    """
    longest = max(n for runs in groups.values() for run in runs for n in run)

    def x(n: float) -> float:
        return 60 + 480 * math.log(n) / math.log(max(longest, 2))

    def y(share: float) -> float:
        return 320 - 240 * share

    def line(points) -> str:
        return "L".join(f"{x(n):.4g} {y(share):.4g}" for n, share in points)

    parts = [f'<rect x="60" y="80" width="{x(min(train_digits, longest)) - 60:g}" '
             f'height="240" fill="#eeeeee"/>',
             svg_text(66, 312, f"trained on: up to {train_digits}", 'fill="gray"')]
    for percent in (0, 25, 50, 75, 100):
        parts += [f'<path d="M60 {y(percent / 100):g}H540" stroke="#dddddd"/>',
                  svg_text(30, y(percent / 100) + 4, f"{percent}%")]
    parts += [svg_text(x(n), 338, f"{n:,}", CENTRED) for n in
              (m * 10**e for e in range(6) for m in (1, 2, 5)) if n <= longest]
    parts.append(svg_text(300, 358, "digits", CENTRED))
    ends = []
    for (name, runs), ink in zip(groups.items(), itertools.cycle(INKS)):
        lengths = sorted(set.intersection(*map(set, runs)))
        low, middle, high = ([(n, choose([run[n] for run in runs])) for n in lengths]
                             for choose in (min, statistics.median, max))
        parts += [f'<path d="M{line(low)}L{line(high[::-1])}Z" fill="{ink}" '
                  f'fill-opacity="0.2"/>',
                  f'<path d="M{line(middle)}" fill="none" stroke="{ink}" '
                  f'stroke-width="2"/>']
        ends.append((*middle[-1], name, ink))
    above = math.inf
    for n, share, name, ink in sorted(ends, key=lambda end: end[1]):
        above = min(y(share) - 9, above - 14)       # no name stands on another
        room = "start" if x(n) < 400 else "end"
        parts += [f'<circle cx="{x(n):.4g}" cy="{y(share):.4g}" r="3.5" fill="{ink}"/>',
                  svg_text(x(n), above, name, f'text-anchor="{room}" fill="{ink}"')]
    return svg(570, 370, "exact match: the median of the seeds, and their range", parts)


def compare(jobs: dict[str, Job]) -> tuple[dict, str, str]:
    """Measure runs, given by name: the bands of each, median and worst of each group,
    and a curve for each group. Runs of a group differ in their seed alone, and in the
    number at the end of their names: runs/far-0 and runs/far-1 are "far"."""
    called = {name: Path(name.removesuffix("/checkpoint.pt")).name.removesuffix(".pt")
              for name in jobs}
    stems = {name: re.sub(r"-[0-9]+$", "", called[name]) for name in jobs}
    settings = collections.defaultdict(set)
    for name, job in jobs.items():
        settings[stems[name]].add(str(job.settings | {"seed": None}))
    runs, groups = [], collections.defaultdict(list)
    for name, job in jobs.items():
        group = stems[name] if len(settings[stems[name]]) == 1 else called[name]
        runs.append({"run": name, "group": group, "settings": job.settings}
                    | grid_report(job)[0])
        groups[group].append(runs[-1])

    def row(name: str, parts: list[dict], choose) -> dict:
        return {"run": name} | {shown: choose([part["bands"][band] for part in parts])
                                for band, shown in BANDS.items()
                                if all(band in part["bands"] for part in parts)}

    rows = [row(run["run"], [run], min) for run in runs]
    for group, parts in groups.items():
        rows += [row(f"median of {len(parts)}: {group}", parts, statistics.median),
                 row(f"worst of {len(parts)}", parts, min)]
    curves = {group: [run["equal"] for run in parts] for group, parts in groups.items()}
    known = {name: ".2%" for name in BANDS.values() if any(name in row for row in rows)}
    return {"runs": runs}, table(rows, known | {"run": ""}), curves_svg(
        curves, min(run["train_digits"] for run in runs))


# --------------------------------------------------------------------------------------
# 5. Questions: decoding for real
# --------------------------------------------------------------------------------------


@torch.inference_mode()
def generate(model: looped.LoopedTransformer, questions, max_new: int,
             recurrences: int | None = None) -> Tensor:
    """Greedy answers, decoded all tokens at once.

    Source: Santilli et al. 2023 (arXiv 2305.10427), "Jacobi decoding". The model reads
    a guess of the answer and says what it takes each token to be, given those before:
    the next guess. A token that follows right ones is right, so each pass finds at
    least one more; and a guess that comes back unchanged is what token by token would
    have found. Digits depend on few others, so that a handful of passes is enough.

    Arguments:
        questions  (B, T) token ids without padding, or lists of them; each row ends
                   with "="
        max_new    tokens to append
    Returns:       (B, max_new) int64; what follows an end token is padding
    Raises:        ValueError for questions with padding
    """
    questions = torch.as_tensor(questions)
    if (questions == data.PAD).any():
        raise ValueError("a question has padding: ask those of one length at a time")
    questions, last = questions.to(model.device), questions.shape[1] - 1
    guess = questions.new_zeros(len(questions), max_new)
    for _ in range(max_new):
        line = torch.cat((questions, guess[:, :-1]), dim=1)
        said = likeliest(model, line, recurrences)[:, last:]
        if torch.equal(said[:, :-1], guess[:, :-1]):
            break
        guess = said
    return said.masked_fill(data.count_before(data.END, said) > 0, data.PAD).cpu()


def ask(job: Job, question: str) -> tuple[dict, str, None]:
    """The model's answer to "123+456", "12-45" or "12*45", under its operands and with
    wrong digits marked. Tasks whose operands are no numbers are asked in the text that
    they read, "001|0000" or "a:12,b:7", and answer in it.

    Raises:  ValueError, in one line, for a question that the model cannot be asked
    """
    task = data.TASKS[job.task]
    if not any(task.operators.values()):
        return ask_as_read(job, question.removesuffix("=") + "=")
    a, symbol, b = read_question(job, question)
    truth = str(task.operators[symbol](int(a), int(b)))
    said, ended, _ = answer_line(job, a, symbol, b).partition("=")[2].partition("$")
    answer = as_number(job, symbol, said)
    correct = answer == truth and bool(ended)
    wide = max(map(len, (answer, truth, a + "  ", b + "  ")))
    marks = "".join(" ^"[x != y] for x, y in zip(answer.rjust(wide), truth.rjust(wide)))
    lines = [a.rjust(wide), symbol + b.rjust(wide - 1), "-" * wide, answer.rjust(wide)]
    lines += [marks.rstrip()] * ("^" in marks)
    lines += ["correct"] if correct else [f"{truth:>{wide}} is right"]
    lines += ["the model did not end its answer"] * (not ended)
    return {"question": question, "answer": answer, "truth": truth, "correct": correct
            }, "\n".join("  " + line for line in lines), None


def read_question(job: Job, question: str) -> tuple[str, str, str]:
    """What a user typed, "007+12", as its parts "7", "+", "12"."""
    sys.set_int_max_str_digits(0)        # else numbers of 4,300 digits are refused
    task = data.TASKS[job.task]
    known = [symbol for symbol, solve in task.operators.items() if solve]
    if not known:
        raise ValueError(f"{job.task}: this model is not asked in numbers; see --ask")
    asked = question.strip().removesuffix("=").strip()
    symbols = "|".join(map(re.escape, known))
    found = re.fullmatch(rf"([0-9]+)\s*({symbols})\s*([0-9]+)", asked)
    if not found:
        raise ValueError(f"cannot read {question!r}: this model answers questions such "
                         f"as {' or '.join(f'57{symbol}68' for symbol in known)}")
    a, b = str(int(found[1])), str(int(found[3]))
    only = task.second_digits
    if only and len(b) != only:
        raise ValueError(f"{question!r}: this model knows second numbers of {only} "
                         f"digits only")
    if job.operand_digits and max(len(a), len(b)) > job.operand_digits:
        raise ValueError(f"{question!r}: this model knows {job.operand_digits} digits "
                         f"only")
    return a, found[2], b


def answer_line(job: Job, a: str, symbol: str, b: str) -> str:
    """The whole line, as the model reads it, with the answer that it gives."""
    task = data.TASKS[job.task]
    a, b = (number.zfill(job.operand_digits) for number in (a, b))
    order = -1 if job.units_first else 1
    line = f"{a[::order]}{symbol}{b[::order]}="
    lengths = torch.tensor([len(part) for part in re.findall("[0-9]+", line)])
    most = int(task.tokens(lengths, **job.options)) - len(line)
    said = generate(job.model, [data.encode(line)], most, job.recurrences)
    return line + data.decode(said[0])


def ask_as_read(job: Job, line: str) -> tuple[dict, str, None]:
    """The answer to a question in the text that the model reads."""
    ids, known = data.encode(line), job.model.config.vocab_size
    if max(ids) >= known:
        raise ValueError(f"{line!r}: this model's tokens are {data.VOCABULARY[:known]}")
    said = data.decode(generate(job.model, [ids], len(line) + 2, job.recurrences)[0])
    answer = said.partition("$")[0]
    return {"question": line, "answer": answer}, f"  {line}{answer}", None


def as_number(job: Job, symbol: str, said: str) -> str:
    """An answer as people write it: "33-" -> "-33". What is no number is left alone.

    In ten's complement "76-" is 67 - 100, in the fixed-width format "-0012" is -12, and
    of a padded product "045000" is 540.
    """
    if data.TASKS[job.task].fixed_width:
        whole = f"[+-][0-9]{{{job.operand_digits + 1}}}"
        is_number = re.fullmatch(whole, said) and not re.fullmatch("-0+", said)
        return str(int(said)) if is_number else said
    if job.operand_digits:
        whole = re.fullmatch(f"[0-9]{{{2 * job.operand_digits}}}", said)
        return str(int(said[::-1])) if whole else said
    sign = "-" * said.endswith("-")
    digits = said.removesuffix("-")[::-1 if job.units_first else 1]
    if job.options.get("complement") and symbol == "-" and digits.isdigit():
        return str(int(digits) - 10 ** len(digits) * bool(sign))
    return sign + digits


# --------------------------------------------------------------------------------------
# 6. Why: taps on the nodes of a model
# --------------------------------------------------------------------------------------


class Node(NamedTuple):
    """A head, or a feed-forward network, at one token and one recurrence, from 0."""

    recurrence: int
    layer: int
    part: int           # 0 .. H - 1: that head; H: the feed-forward network
    token: int


def all_nodes(job: Job) -> list[Node]:
    """Every node at the tokens of a line but the last, in the order of work."""
    config, tokens = job.model.config, len(token_names(job)) - 1
    return [Node(*index) for index in itertools.product(
        range(job.loops), range(config.layers), range(config.heads + 1),
        range(tokens))]


def part_name(job: Job, *nodes: Node) -> str:
    """What a reader calls the part of nodes at one token: "layer 1, head 2"."""
    first, last, config = nodes[0], nodes[-1], job.model.config
    part = "MLP" if first.part == config.heads else "head " + " + ".join(
        dict.fromkeys(str(node.part + 1) for node in nodes))
    loop = f"recurrence {first.recurrence + 1}, " * (job.loops > 1)
    if first.recurrence != last.recurrence:
        loop = "all recurrences, "
    layer = f"layer {first.layer + 1}, " * (config.layers > 1)
    return loop + layer + part


@contextlib.contextmanager
def tapped(model: looped.LoopedTransformer, edit):
    """Within it, every forward pass sends what happens in its layers through
    `edit(where, value)`, which returns what to use instead.

    `where` is (recurrence, layer, part), as in Node, and value (B, T, ...) what that
    part puts out: a head, before all are mixed, or the feed-forward network. Or part is
    "attention", and value (q, k, v, bias), see looped.DotProduct. It is done with
    torch's hooks: the model itself knows nothing of this.
    # TRAP: a compiled model hides its parts; take the one that looped.load returns.
    """
    calls, heads = collections.Counter(), model.config.heads

    def send(layer: int, part, value):
        calls[layer, part] += 1
        return edit((calls[layer, part] - 1, layer, part), value)

    def hooks_of(index: int, layer: looped.Layer):
        """Attach the hooks of one layer and yield their handles."""
        yield layer.attention.dot_product.register_forward_pre_hook(
            lambda _, inputs: send(index, "attention", inputs))
        yield layer.attention.out.register_forward_pre_hook(
            lambda _, inputs: torch.cat([
                send(index, head, value)
                for head, value in enumerate(inputs[0].chunk(heads, dim=-1))], dim=-1))
        yield layer.ffn.register_forward_hook(
            lambda _, inputs, output: send(index, heads, output))

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(lambda *_: calls.clear()))
        for index, layer in enumerate(model.layers):
            for hook in hooks_of(index, layer):
                hooks.enter_context(hook)
        yield


def activations(job: Job, lines: Tensor) -> tuple[Tensor, dict[tuple, Tensor]]:
    """What `predict` returns, and the outputs of the nodes as `tapped` sees them:
    (recurrence, layer, part) -> (B, T, ...)."""
    outputs = {}
    with tapped(job.model, outputs.setdefault):
        said = predict(job.model, lines, job.recurrences)
    return said, {where: value for where, value in outputs.items()
                  if where[2] != "attention"}


def replaced(model: looped.LoopedTransformer, nodes, by: dict[tuple, Tensor]):
    """Within it, these nodes put out what stands at their place in `by`: (T, ...) for
    each `where`, their means; or (B, T, ...), the outputs of other questions."""
    tokens = collections.defaultdict(list)
    for node in nodes:
        tokens[node[:3]].append(node.token)

    def edit(where, value):
        if where in tokens:
            value = value.clone()
            value[:, tokens[where]] = by[where][..., tokens[where], :]
        return value

    return tapped(model, edit)


def questions(job: Job) -> Tensor:
    """Questions of `digits` + `digits`, (samples, T), some with long cascades."""
    return data.make_contexts(
        job.task, torch.full((job.samples, 1, 2), job.digits),
        torch.Generator().manual_seed(job.seed), **long_chains(job.task))


def token_names(job: Job, line: str = "") -> list[str]:
    """The second paper's names of the tokens of a line: operands D and D', answer A,
    each with the place of the digit, units 0. Of any question of the job's length when
    the line is left out.

    Example: 12+34=46$ -> D0 D1 op D'0 D'1 = A0 A1 end; of two digits D0 D1 op D'0 D'1
    = A0 A1 A2 end, so that the end of a shorter answer stands under a digit's name.
    """
    fixed, n = data.TASKS[job.task].fixed_width, "0" * job.digits
    line = line or f"{n}+{n}={'+' * fixed}{n}0$"
    asked = line.index("=")
    names = ["op"] * asked + ["="] + ["sign"] * (len(line) - asked - 2) + ["end"]
    for letter, found in zip(("D", "D'", "A"), re.finditer("[0-9]+", line)):
        places = range(len(found[0]))[::1 if job.units_first else -1]
        names[found.start():found.end()] = [f"{letter}{place}" for place in places]
    return names


def share(verdicts: Tensor) -> float:
    """How many of them are True, from 0 to 1."""
    return float(verdicts.double().mean())


def top_shares(shares: dict[str, float], most: int = 4) -> str:
    """The largest shares as text: {"S1": 0.5, "S2": 0.31} -> "S1 50%, S2 31%"."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {part:.0%}" for name, part in largest if part >= 0.005)


# --------------------------------------------------------------------------------------
# 7. Why: what each head reads, what breaks without a node, and what a node carries
# --------------------------------------------------------------------------------------


def attention_maps(job: Job, lines: Tensor) -> Tensor:
    """How much each token reads of each token, the mean over lines (B, T) whose parts
    stand in the same columns: (recurrences, layers, H, T, T) float32 on the CPU; rows
    are the readers."""
    maps = []

    def record(where, value):
        """Keep a dot product's mean weights, (H, T, T); change nothing."""
        if where[2] == "attention":
            q, k, _, bias = value
            scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
            if bias is None:
                bias = torch.full_like(scores[0, 0], -torch.inf).triu(1)
            maps.append((scores + bias).softmax(dim=-1).mean(dim=0).cpu())
        return value

    with tapped(job.model, record):
        predict(job.model, lines, job.recurrences)
    return torch.stack(maps).unflatten(0, (-1, job.model.config.layers))


def attention_report(job: Job, question: str) -> tuple[dict, str, str]:
    """What each head reads at each token of an answer: the token that it attends to
    most, with its share of the attention; and a picture of all shares."""
    line = answer_line(job, *read_question(job, question)).rstrip("_")
    names, asked = token_names(job, line), line.index("=")
    maps = attention_maps(job, torch.tensor([data.encode(line)]))
    heads = {part_name(job, Node(*index, 0)): maps[index]
             for index in itertools.product(*map(range, maps.shape[:3]))}
    rows = []
    for reader in range(asked, len(line) - 1):      # "=" reads what the units need
        row = {"answer": f"{names[reader + 1]}: {line[reader + 1]}"}
        for head, reads in heads.items():
            best = int(reads[reader].argmax())
            row[head] = f"{names[best]}: {line[best]} {reads[reader, best]:4.0%}"
        rows.append(row)
    text = (f"{line}\nwhat each head reads most before each token of the answer, and "
            f"its share;\nD: first number, D': second, A: answer; D0: its units\n"
            + table(rows, dict.fromkeys(rows[0], "")))
    shares = {head: reads[asked:-1].tolist() for head, reads in heads.items()}
    return {"line": line, "tokens": names, "heads": shares, "most": rows
            }, text, attention_svg(shares, line, job.model.config.heads)


def means_and_right(job: Job) -> tuple[dict, Tensor]:
    """The mean output of every node over questions, and those of them that the model
    answers right. ValueError when there is none."""
    lines = questions(job)
    said, outputs = activations(job, lines)
    right = lines[is_exact(lines, said)]
    if not len(right):
        raise ValueError(f"this model answers no question of {job.digits} digits "
                         f"right, so that nothing can break")
    return {where: value.mean(dim=0) for where, value in outputs.items()}, right


def ablate(job: Job) -> dict[Node, dict]:
    """Replace every node by its own mean, one at a time, and see what breaks.

    Source: arXiv 2402.02619, "mean ablation"; the means are over the same questions.
    # DIFFERS: the authors' code takes the means of layer 0 for all layers.

    Returns:  for each node, of the questions that were right with it, the shares that
              are wrong without it: `fails`, of all of them; `tokens`, for each token,
              of all of them too; `classes` and `kinds`, of those of each class ("S0")
              and of each kind ("S", "M", "N"). What never fails is left out of `tokens`
              and `classes`
    """
    means, lines = means_and_right(job)
    classes, kinds = rows_by_class(job, lines)
    is_answer = data.answer_mask(lines)[:, 1:]
    names, found = token_names(job)[1:], {}
    for node in all_nodes(job):
        with replaced(job.model, [node], means):
            wrong = predict(job.model, lines, job.recurrences) != lines[:, 1:]
        wrong &= is_answer
        fails = wrong.any(dim=1)
        found[node] = {
            "fails": share(fails),
            "tokens": {name: share(column) for name, column
                       in zip(names, wrong.unbind(1)) if column.any()},
            "classes": {name: share(fails[rows]) for name, rows in classes.items()
                        if fails[rows].any()},
            "kinds": {name: share(fails[rows]) for name, rows in kinds.items()}}
    return found


def rows_by_class(job: Job, lines: Tensor) -> tuple[dict[str, Tensor], dict]:
    """Which lines are of a class, "S0", "N3", ...; and of a kind, "S", "M" or "N":
    sums, differences, negative ones. Name -> (B,) bool, of those that there are."""
    named = data.question_class(*operands(job, lines))
    classes = {name: torch.tensor([each == name for each in named])
               for name in sorted(set(named))}
    kinds = {kind: torch.tensor([each[0] == kind for each in named])
             for kind in "SMN" if kind in "".join(named)}
    return classes, kinds


def served(damage: dict) -> str:
    """The kinds of questions that need a node, "S", "MN", ...: those of which 1 in 100
    or more fail without it. From the values of `ablate`."""
    return "".join(kind for kind, part in damage["kinds"].items() if part >= 0.01)


def inherited(job: Job, found: dict[Node, dict]) -> collections.Counter | None:
    """Of the nodes that the model needs which this one's training started from: how
    many serve which kinds of questions now. None if it started from random weights, or
    from a run that is gone or reads other questions."""
    source = job.settings.get("init_from")
    if not source or not Path(source).exists():
        return None
    settings = looped.read_checkpoint(source)["settings"]
    if settings["train_digits"] != job.settings["train_digits"]:
        return None
    needed = ablate(job._replace(model=looped.load(source, job.model.device),
                                 settings=settings))
    return collections.Counter(
        served(found[node]) or "nothing" for node, damage in needed.items()
        if node in found and served(damage))


def ablation_report(job: Job) -> tuple[dict, str, str]:
    """The second paper's map, a row for each part and a column for each token, of what
    breaks without each node; and what those that matter most read."""
    names, found = token_names(job), ablate(job)
    maps, result, labels = attention_maps(job, questions(job)), [], {}
    rows = collections.defaultdict(list)                        # part -> its nodes
    for node, damage in found.items():
        rows[part_name(job, node)].append(node)
        reads = ""
        if node.part < job.model.config.heads:
            reads = top_shares(dict(zip(names, maps[node[:3]][node.token].tolist())))
        result.append({"node": part_name(job, node), "token": names[node.token]}
                      | damage | {"reads": reads})
        if damage["tokens"]:    # as in the paper's maps, a cell names what breaks most
            labels[len(rows) - 1, node.token] = max(damage["tokens"],
                                                    key=damage["tokens"].get)
    legend = "dark blue: no question fails; pale yellow: all"
    mixed = {"+", "-"} <= data.TASKS[job.task].operators.keys()
    parts, columns = list(rows), names[:-1]
    grid = inks = [[found[node]["fails"] for node in row] for row in rows.values()]
    if mixed:
        legend = ("red: sums fail, green: differences, blue: negative ones, white: all "
                  "of them, black: nothing")
        inks = [[tuple(found[node]["kinds"].get(kind, 0.0) for kind in "SMN")
                 for node in row] for row in rows.values()]
    picture = heat_svg(inks, parts, columns, f"{job.task}, {job.digits} + {job.digits} "
                       "digits: what fails without a node",
                       f"{legend}; named: the digit that fails most", labels)
    serve = collections.Counter(filter(None, map(served, found.values())))
    text = ["share of questions that fail without a node",
            heat_text(grid, parts, columns)]
    if mixed:
        text += ["nodes by the kinds of questions that need them (S sums, M "
                 f"differences, N negative ones): {counts(serve)}"]
    kept = inherited(job, found)
    if kept is not None:
        text += [f"of the {sum(kept.values())} nodes that {job.settings['init_from']} "
                 f"needs, these now serve: {counts(kept)}"]
    text += ["the nodes that matter most: failures by class (S3: a carry that two "
             "columns pass on)\nand by token, and what a head reads (a node at one "
             "token predicts the next)"]
    text += [f"  {row['node']} at {row['token']}: {row['fails']:.0%}; "
             f"{top_shares(row['classes'])}; {top_shares(row['tokens'])}"
             + f"; reads {row['reads']}" * bool(row["reads"])
             for row in sorted(result, key=lambda row: -row["fails"])[:12]
             if row["fails"]]
    return {"nodes": result, "served": serve, "inherited": kept}, "\n".join(
        text), picture


def counts(found: collections.Counter) -> str:
    """As text, the most first: {"S": 3, "SMN": 9} -> "SMN 9, S 3"."""
    return ", ".join(f"{name} {number}" for name, number in found.most_common())


# What the second paper says that a node may hold: the class of questions that shows it,
# and how the column of the other question differs from the clean one's. "digit": in its
# digit alone. "carry": in whether it carries alone. "undecided": one of the two passes
# on what comes from below, and the other does not.
SUBTASKS = {"SA": ("S", "digit"), "SC": ("S", "carry"), "ST": ("S", "undecided"),
            "MD": ("M", "digit"), "MT": ("M", "undecided"),
            "ND": ("N", "digit"), "NT": ("N", "undecided")}


def patch_pairs(job: Job, subtask: str, place: int) -> list[Tensor]:
    """Clean questions; others; and what the clean ones must answer if the sub-task had,
    in one column, the value that it has in the others.

    Source: arXiv 2402.02619, "interchange intervention".
    # DIFFERS: the authors choose one pair of questions for each sub-task, and a second
    one, alike in the column, that must change nothing. Here both are random ones of a
    class, which have nothing else in common, and the expected answer follows from
    data.answer_from_labels: a node that holds more than its sub-task gives itself away.

    Arguments:  subtask  a key of SUBTASKS
                place    of the column, units 0
    Returns:    clean, other, expected: each (N, T) with N <= samples
    """
    names, lines = token_names(job), questions(job._replace(samples=100 * job.samples))
    named = data.question_class(*operands(job, lines))
    kind, change = SUBTASKS[subtask]
    lines = lines[torch.tensor([name[0] == kind for name in named])]
    others = lines.roll(1, dims=0)
    # Digit and carry of each column, (N, digits) each, of the clean and of the others.
    clean, other = (data.digit_labels(*operands(job, part)[:2])[kind]
                    for part in (lines, others))
    same_digit, same_carry = ((x == y)[:, place] for x, y in zip(clean, other))
    passes = [(labels[1] == data.UNDECIDED)[:, place] for labels in (clean, other)]
    differs = {"digit": ~same_digit & same_carry, "carry": same_digit & ~same_carry,
               "undecided": passes[0] ^ passes[1]}[change]
    digit, carry = (label.clone() for label in clean)
    if change == "digit":
        digit[:, place] = other[0][:, place]
    else:
        carry[:, place] = other[1][:, place]
    before, after = (data.answer_from_labels(kind, *labels)
                     for labels in (clean, (digit, carry)))
    # A node at one token cannot answer for a carry that is passed on through digits.
    one_digit_changes = (before != after).sum(dim=1) == 1
    lengths = [((answer != 0) * torch.arange(1, job.digits + 2)).amax(dim=1)
               for answer in (before, after)]
    as_long = data.TASKS[job.task].fixed_width | (lengths[0] == lengths[1])
    same_sign = (kind == "S") | (lengths[1] <= job.digits)
    still_negative = (kind != "N") | (lengths[1] > 0)
    fits = differs & one_digit_changes & as_long & same_sign & still_negative
    expected = lines.clone()
    columns = [names.index(f"A{n}") for n in range(job.digits + 1)]
    expected[:, columns] = torch.where(lines[:, columns] < 10, after, lines[:, columns])
    return [part[fits][:job.samples] for part in (lines, others, expected)]


def sign_pairs(job: Job) -> list[Tensor]:
    """The same for the sign of a difference, in the fixed-width format, which begins an
    answer with it: the clean question must get the sign of the other, and keep its own
    digits."""
    lines = questions(job._replace(samples=100 * job.samples))
    named = data.question_class(*operands(job, lines))
    lines = lines[torch.tensor([name[0] != "S" for name in named])]
    others, at = lines.roll(1, dims=0), token_names(job).index("sign")
    expected = lines.clone()
    expected[:, at] = others[:, at]
    fits = lines[:, at] != others[:, at]
    return [part[fits][:job.samples] for part in (lines, others, expected)]


def answered(job: Job, pairs: list[Tensor]) -> tuple[list[Tensor], dict]:
    """The pairs of which the model answers both questions right, and the outputs of its
    nodes in the others."""
    if not len(pairs[0]):                                     # nothing to ask it
        return pairs, {}
    clean, other, _ = (is_exact(lines, predict(job.model, lines, job.recurrences))
                       for lines in pairs)
    pairs = [lines[clean & other] for lines in pairs]
    return pairs, activations(job, pairs[1])[1] if len(pairs[0]) else {}


def candidates(job: Job) -> list[tuple[Node, ...]]:
    """What may carry a sub-task: a node alone, at all recurrences, and, since heads
    share work, with one other head of its layer and with all."""
    singles, heads = all_nodes(job), range(job.model.config.heads)
    together = {*itertools.combinations(heads, 2), tuple(heads)}
    return [(node,) for node in singles] + [
        tuple(node._replace(recurrence=loop) for loop in range(job.loops))
        for node in singles if node.recurrence == 0 and job.loops > 1] + [
        tuple(node._replace(part=head) for head in group)
        for node in singles if node.part == 0 for group in sorted(together)]


def interchange(job: Job, nodes, pairs: list[Tensor], outputs: dict) -> float:
    """Share of clean questions that are answered as expected when these nodes put out
    what they did in the other questions."""
    with replaced(job.model, nodes, outputs):
        said = predict(job.model, pairs[0], job.recurrences)
    return share(is_exact(pairs[2], said))


def patch_report(job: Job) -> tuple[dict, str, None]:
    """For each sub-task and column, the nodes that carry it best: put their output in
    other questions' runs into clean ones, and require the exact answer. The best are
    chosen on one set of pairs and scored on fresh ones, and named if more than half of
    these are answered as predicted."""
    names, rows, groups = token_names(job), [], candidates(job)
    tasks = {(subtask, place): partial(patch_pairs, subtask=subtask, place=place)
             for subtask in SUBTASKS for place in range(job.digits)}
    if data.TASKS[job.task].fixed_width and "-" in data.TASKS[job.task].operators:
        tasks["sign", job.digits] = sign_pairs
    for (subtask, place), pairs in tasks.items():
        choice, fresh = (answered(each, pairs(each))
                         for each in (job, job._replace(seed=job.seed + 1)))
        if not (len(choice[0][0]) and len(fresh[0][0])):
            continue          # the model is wrong, or the pairs would differ in length
        best = max(groups, key=lambda nodes: interchange(job, nodes, *choice))
        exact, name = interchange(job, best, *fresh), ""
        if exact > 0.5:
            name = f"{part_name(job, *best)} at {names[best[0].token]}"
        rows.append({"subtask": subtask, "place": place, "pairs": len(fresh[0][0]),
                     "exact": exact, "node": name})
    if not rows:
        raise ValueError(f"this model answers no question of {job.digits} digits right "
                         f"that could be changed")
    text = ("the node that best carries a sub-task of a column, named if in more than\n"
            "half of the pairs the answer is exactly as predicted when its output is\n"
            "that of another question\n" + table(rows, {
                "subtask": "", "place": "", "pairs": "", "exact": ".1%", "node": ""}))
    return {"subtasks": rows}, text, None


def pca_report(job: Job) -> tuple[dict, str, str]:
    """Does the first principal component of a head's output tell a carry, no carry and
    undecided apart? And a picture of the two first of the head that does it best.

    Source: arXiv 2402.02619. For each class of questions and each head and token, the
    two first components of its outputs, and for each column, `between`: the share of
    the first one's variance that lies between the three values of ST (MT, NT) in that
    column; and `variance`, its share of all.
    """
    lines, names, rows = questions(job), token_names(job), []
    a, b, subtract = operands(job, lines)
    labels, named = data.digit_labels(a, b), data.question_class(a, b, subtract)
    outputs = activations(job, lines)[1]
    for (kind, (_, carry)), node in itertools.product(labels.items(), all_nodes(job)):
        # What stands after the end of a short answer is no output.
        chosen = torch.tensor([name[0] == kind for name in named])
        chosen &= lines[:, node.token + 1] != data.PAD
        if node.part == job.model.config.heads or chosen.sum() < 10:
            continue
        x = outputs[node[:3]][:, node.token].float().cpu()[chosen]
        u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
        if s[0] < 1e-6:
            continue                              # this head reads nothing that differs
        points, total = (u * s)[:, :2], s[0] ** 2
        for place, values in enumerate(carry[chosen].unbind(1)):
            groups = [points[values == value, 0] for value in values.unique()]
            between = sum(len(group) * group.mean() ** 2 for group in groups)
            row = {"label": f"{kind}T{place}", "between": float(between / total),
                   "variance": float(total / s.square().sum()),
                   "node": f"{part_name(job, node)} at {names[node.token]}"}
            rows.append((row, points, values))
    if not rows:
        raise ValueError(f"{len(lines)} questions are too few: no class has 10 of them")
    rows.sort(key=lambda found: -found[0]["between"])
    result, (best, points, values) = [row for row, _, _ in rows[:100]], rows[0]
    text = ("the heads whose first principal component tells a carry, no carry and\n"
            "undecided apart: the share of its variance between the three, and its\n"
            "share of all variance\n" + table(result[:12], {
                "label": "", "between": ".1%", "variance": ".1%", "node": ""}))
    return {"heads": result}, text, points_svg(
        points, values, ["no carry", "carry", "undecided"],
        f"{best['label']}: {best['node']}")


# --------------------------------------------------------------------------------------
# 8. The command
# --------------------------------------------------------------------------------------

# The flags that look inside a model: a report, and what the user is told of it.
INSIDE = {"ablate": (ablation_report, "what breaks if a head or MLP, at any token, is "
                                      "replaced by its mean"),
          "patch": (patch_report, "which node carries a digit or carry of each column"),
          "pca": (pca_report, "which head's output tells carries apart")}


def count(text: str) -> int:
    """An argparse type: a whole number from 1."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The flags of `python evaluate.py`."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", allow_abbrev=False,
        usage="python evaluate.py [RUN ...] [flags]; --help lists them",
        description="Score a run by exact match on a grid of operand lengths.")
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", type=Path, help="run folder or checkpoint; "
        "the newest run when left out; several are compared")
    add("--task", choices=tuple(data.TASKS), help="test on another task of the same "
        "tokens, e.g. a model of both on its additions")
    add("--max-digits", type=count, metavar="N", help="largest operand; past 100 only "
        "equal lengths (default: as in the run)")
    add("--samples", type=count, metavar="K", help="problems a cell")
    add("--every", type=count, metavar="N", help="beyond the training lengths score "
        "only multiples of N, and the largest")
    add("--recurrences", type=count, metavar="N", help="run the layers this often "
        "instead of as in training")
    add("--seed", type=int, default=0, help="of the problems (0)")
    add("--device", help="cpu, cuda or mps (default: the best here)")
    add("--precision", choices=looped.CHOICES["precision"], help="of matrix products "
        "(default: as in training)")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--svg", type=Path, metavar="FILE", help="draw what was measured")
    add_one = parser.add_mutually_exclusive_group().add_argument
    for name, (_, meaning) in INSIDE.items():
        add_one(f"--{name}", type=count, metavar="N",
                help=f"{meaning}, in questions of N + N digits")
    add_one("--ask", metavar="QUESTION", help='like "123+456"')
    add_one("--attend", metavar="QUESTION", help="what each head reads to answer it")
    return parser


def open_job(run: Path, args: argparse.Namespace, inside: str | None) -> Job:
    """The model of a run, and what the flags want to know of it.

    Raises ValueError, in one line, for every flag that cannot be followed.
    """
    settings = looped.read_checkpoint(run)["settings"]
    if "options" not in settings or settings["task"] not in data.TASKS:
        raise ValueError(f"{run}: a run of another version of train.py, whose tasks or "
                         f"options are not known here")
    name = args.task or settings["task"]
    task = data.TASKS[name]
    settings |= {"task": name, "eval_every": args.every or settings["eval_every"],
                 "options": {key: settings["options"].get(key, usual)
                             for key, usual in task.options.items()}}
    model = looped.load(run, looped.choose_device(args.device))
    model.config.precision = args.precision or model.config.precision
    digits = getattr(args, inside or "max_digits") or settings["eval_digits"]
    job = Job(model, settings, digits, args.samples or (
        200 if inside else settings["eval_samples"]), args.seed, args.recurrences)
    if data.vocabulary_size(name, **job.options) > model.config.vocab_size:
        raise ValueError(f"--task {name}: the model in {run} lacks its tokens")
    if task.fixed_width and digits != settings["train_digits"]:
        raise ValueError(f"{digits} digits: in the fixed-width format this model knows "
                         f"{settings['train_digits']} digits only")
    if inside and (not task.operators.keys() & {"+", "-"} or set(job.options.values())
                   & {True}):
        raise ValueError(f"--{inside} needs a model of sums or differences, not in "
                         f"ten's complement or plain order")
    rehearse(model, name, digits, **job.options)
    return job


def evaluate(argv: list[str]) -> None:
    """Do what the flags ask for: print it, then write the files. ValueError, in one
    line, for what cannot be done."""
    args = build_parser().parse_args(argv)
    asked = [name for name in ("ask", "attend", *INSIDE)
             if getattr(args, name) is not None]
    kind, runs = asked[0] if asked else None, args.runs or [looped.newest_run()]
    if args.svg and kind in ("ask", "patch"):
        raise ValueError(f"--{kind} has no picture: leave --svg out")
    if len(runs) > 1 and kind:
        raise ValueError(f"--{kind} looks at one run: name one")
    jobs = {str(run): open_job(run, args, kind if kind in INSIDE else None)
            for run in runs}
    job = next(iter(jobs.values()))
    if kind in ("ask", "attend"):
        report = {"ask": ask, "attend": attention_report}[kind]
        result, text, picture = report(job, getattr(args, kind))
    elif kind:
        result, text, picture = INSIDE[kind][0](job)
        result = {"task": job.task, "digits": job.digits, "samples": job.samples,
                  "seed": job.seed} | result
    else:
        result, text, picture = compare(jobs) if len(jobs) > 1 else grid_report(job)
    # What was measured is shown first: a file that cannot be written does not lose it.
    print(text, flush=True)
    if args.json:
        looped.write_whole(args.json, json.dumps(result) + "\n")
    if args.svg:
        looped.write_whole(args.svg, picture)


def main(argv: list[str] | None = None) -> None:
    """Score runs or ask one a question, as the flags say (sys.argv when left out)."""
    with looped.one_line_errors("evaluate.py", "use fewer --samples or digits"):
        evaluate(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    main()
