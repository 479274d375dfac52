"""How well, how far, and why: exact match on a grid of lengths, pictures, questions.

Read it beside section 4 of the paper ("Transformers Can Do Arithmetic with the Right
Embeddings", arXiv 2405.17399) and its Figures 1 and 4. It needs torch, and data.py,
abacus.py and looped.py beside it.

    python evaluate.py                             the newest run
    python evaluate.py runs/laptop --max-digits 60 --every 5
    python evaluate.py runs/a runs/b --svg x.svg   several runs, compared
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
one. So one pass over the finished line scores a problem, and nothing is decoded token
by token; `--ask` decodes for real. In float32 the two agree; in 16 bits a pass over a
whole line may round otherwise than one over its beginning, and a token whose two best
candidates are closer than that may differ.

Glossary
    cell    all problems of one size: as a rule, of one pair of operand lengths
    id      in distribution: both operands within the training lengths
    ood     out of distribution: an operand is longer, and both have at most 100 digits
    ood_100 equal lengths beyond 100 digits              paper: "100+ OOD"
    node    a head, or a feed-forward network, at one token and one recurrence
    report  a function that takes a Job and returns figures, text and a picture or None

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
import os
import re
import shlex
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 10):
    sys.exit("evaluate.py needs Python 3.10 or newer")

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import looped

# PAPER: section 4: the grid ends at 100 digits; "100+ OOD" has equal lengths only.
GRID_LIMIT = 100
SHOWN_MISTAKES = 3


# --------------------------------------------------------------------------------------
# 1. Exact match: one forward pass for many problems
# --------------------------------------------------------------------------------------


def cell_problems(task: str, size: tuple[int, int], samples: int, seed: int, **settings):
    """Yield the test problems of one cell, (at most 1000, T), a function of cell and
    seed alone.

    They are made on the CPU, so that every device is asked the same questions, and in
    parts, so that a million of them fit. `settings` are those of data.make_contexts.
    """
    generator = torch.Generator().manual_seed(
        (seed + 1) * 10**12 + size[0] * 10**6 + size[1])
    for first in range(0, samples, 1000):
        sizes = torch.tensor([[size]]).expand(min(1000, samples - first), 1, 2)
        lengths = data.TASKS[task].lengths(sizes, generator)
        yield data.make_contexts(task, lengths, generator, **settings)


@torch.inference_mode()
def predict(model: looped.LoopedTransformer, tokens: Tensor,
            recurrences: int | None = None) -> Tensor:
    """The likeliest token after each token, given the true ones: (B, T) -> (B, T-1).

    # DIFFERS: the authors run the whole prefix again for every token of an answer. One
    # pass gives the same verdicts; a test compares the two.
    """
    with looped.autocast(model), torch.random.fork_rng():
        torch.manual_seed(0)          # the noise of the state: repeatable, and our own
        return likeliest(model(tokens.to(model.device), recurrences)[:, :-1]).cpu()


def likeliest(logits: Tensor) -> Tensor:
    """The likeliest token, (..., V) -> (...). Never padding, which no model is asked."""
    return logits.index_fill(-1, torch.tensor(data.PAD, device=logits.device),
                             -torch.inf).argmax(dim=-1)


def batches(model: looped.LoopedTransformer, tokens: Tensor) -> tuple[Tensor, ...]:
    """Lines cut into as many at once as fill a GPU, or a CPU's cache."""
    budget = 2**17 if model.device.type == "cuda" else 2**14            # tokens
    return tokens.split(max(1, budget // tokens.shape[1]))


def is_exact(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in every answer token and the end token: (B,) bool."""
    return ((predicted == tokens[:, 1:]) | ~data.answer_mask(tokens)[:, 1:]).all(dim=1)


def is_first_right(tokens: Tensor, predicted: Tensor) -> Tensor:
    """Which rows are right in the answer's first token: the units of a number, or the
    least element of a list. (B,) bool."""
    is_equals = tokens[:, :-1] == data.EQUALS
    return ((predicted == tokens[:, 1:]) | ~is_equals).all(dim=1)


def exact_match(model: looped.LoopedTransformer, task: str,
                cells: list[tuple[int, int]], samples: int, seed: int = 0,
                recurrences: int | None = None, mistakes: list | None = None,
                score=is_exact, **settings) -> list[float]:
    """Share of exactly right problems in each cell.

    Arguments:
        cells      sizes, see data.py: as a rule the lengths of both operands
        samples    problems in each cell
        mistakes   a list that receives the first (tokens, predicted) that are wrong
        score      what counts as right: is_exact or is_first_right
        settings   of the problems, see data.make_contexts
    Returns:       a share for each cell, in the order of `cells`
    Raises:        ValueError when a length lies past a position table of the model
    """
    shares, started = [], time.perf_counter()
    for size in cells:
        right = 0
        for part in cell_problems(task, size, samples, seed, **settings):
            for tokens in batches(model, part):
                predicted = predict(model, tokens, recurrences)
                verdicts = score(tokens, predicted)
                right += int(verdicts.sum())
                if mistakes is not None and len(mistakes) < SHOWN_MISTAKES:
                    mistakes += zip(tokens[~verdicts], predicted[~verdicts])
        shares.append(right / samples)
        if sys.stderr.isatty() and len(cells) > 10:
            print(f"\rscored {len(shares)} of {len(cells)} cells in "
                  f"{time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True,
                  end="\n" if len(shares) == len(cells) else "")
    return shares


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
    def text(self) -> dict:
        """How the problems are written, see data.TEXT."""
        return {name: self.settings[name] for name in data.TEXT}


def grid_lengths(train_digits: int, max_digits: int, every: int) -> list[int]:
    """The lengths of the grid: all up to train_digits, then the multiples of `every`.

    Example: grid_lengths(10, 100, 25) -> [1, 2, ..., 10, 25, 50, 75, 100]
    """
    lengths = range(1, min(max_digits, GRID_LIMIT) + 1)
    return [n for n in lengths if n <= train_digits or n % every == 0]


def measure(job: Job, task: str | None = None, mistakes: list | None = None,
            score=is_exact, **enrichment) -> dict:
    """The grid of exact match and the means of its bands.

    Where lengths are left out (`eval_every` above 1), a cell stands for the lengths
    between its neighbour below and itself, and counts so often in the mean of its band.

    Arguments:  task        when it is not the job's
                enrichment  of the problems, e.g. full_carries=1.0
    Returns:    lengths; grid (rows: first operand, or the most digits in a list;
                columns: second operand, or the length of a list); equal, the shares of
                equal lengths, also past 100; and bands: id, ood, the paper's three parts
                of it for lists, and, past 100 digits, ood_100 over equal lengths
    """
    task, trained = task or job.task, job.settings["train_digits"]
    every = job.settings["eval_every"]
    lengths = grid_lengths(trained, job.digits, every)
    cells = [(first, second) for first in lengths for second in lengths]
    beyond = [n for n in range(GRID_LIMIT + 1, job.digits + 1) if n % every == 0]
    shares = exact_match(job.model, task, cells + [(n, n) for n in beyond], job.samples,
                         job.seed, job.recurrences, mistakes, score, **job.text,
                         **enrichment)
    below = dict(zip(lengths, [0, *lengths]))
    bands = collections.defaultdict(list)                  # name -> (share, weight)
    for (first, second), share in zip(cells, shares):
        longer = first > trained, second > trained
        weight = (first - below[first]) * (second - below[second])
        bands["ood" if any(longer) else "id"].append((share, weight))
        if task == "sorting" and any(longer):
            names = {(True, False): "ood_digits", (False, True): "ood_list"}
            bands[names.get(longer, "ood_both")].append((share, weight))
    bands["ood_100"] = [(share, 1) for share in shares[len(cells):]]
    at = dict(zip(cells, shares))
    return {"lengths": lengths,
            "grid": [[at[first, second] for second in lengths] for first in lengths],
            "equal": {n: at[n, n] for n in lengths} | dict(zip(beyond,
                                                               shares[len(cells):])),
            "bands": {name: sum(share * weight for share, weight in parts)
                      / sum(weight for _, weight in parts)
                      for name, parts in bands.items() if parts}}


BANDS = {"id": "in distribution", "ood": "longer", "ood_digits": "longer numbers",
         "ood_list": "longer lists", "ood_both": "longer numbers in longer lists",
         "ood_100": "equal lengths past 100"}


def grid_report(job: Job) -> tuple[dict, str, str]:
    """The grid, its bands, the first mistakes; and a picture of the grid."""
    started, mistakes, task = time.perf_counter(), [], job.task
    if job.settings["compile"] and job.model.device.type == "cuda":
        looped.compile_layers(job.model)
    result = facts(job) | measure(job, mistakes=mistakes)
    if task == "both":               # PAPER: Figure 5 scores the operations apart
        result |= {f"bands_{part}": measure(job, part)["bands"]
                   for part in ("addition", "subtraction")}
    if task == "sorting":           # PAPER: Table 2: exact, and the least element alone
        result["bands_least"] = measure(job, score=is_first_right)["bands"]
    if task == "addition":
        # Uniform digits hide what carries through the whole of a number break.
        some = job._replace(samples=math.ceil(job.samples / 4),
                            digits=min(job.digits, GRID_LIMIT))
        result["bands_full_carries"] = measure(some, full_carries=1.0)["bands"]
    result["seconds"] = round(time.perf_counter() - started, 1)
    rows, columns = data.TASKS[task].axes
    lengths, grid = result["lengths"], result["grid"]
    step = math.ceil(len(lengths) / 50)           # at most 50 rows: leave some out
    shown = range(step - 1, len(lengths), step)
    lines = [f"rows: {rows}, {lengths[shown[0]]} to {lengths[shown[-1]]}; columns: "
             f"{columns}; from 0 to 1: \"{SHADES}\"",
             *(f"{lengths[row]:>5} " + shades([grid[row][n] for n in shown], wide=2)
               for row in shown)]
    for key in [key for key in result if key.startswith("bands")]:
        scored = " ".join(["exact match", *key.split("_")[1:]])
        lines += [f"  {scored}, {BANDS[band]}: {100 * share:.2f}%"
                  for band, share in result[key].items()]
    if mistakes:
        lines += ["  wrong, as the model reads it:"]
        lines += [show_mistake(*mistake) for mistake in mistakes[:SHOWN_MISTAKES]]
    means = ", ".join(f"{band} {100 * share:.1f}%"
                      for band, share in result["bands"].items())
    return result, "\n".join(lines), grid_svg(result, f"{task}: {means}")


def facts(job: Job) -> dict:
    """What a result has to say about the run, the test and the machine."""
    config, device = job.model.config, job.model.device
    return {"task": job.task, "train_digits": job.settings["train_digits"],
            "max_digits": job.digits, "samples": job.samples, "seed": job.seed,
            "every": job.settings["eval_every"],
            "recurrences": job.recurrences or config.recurrences,
            "parameters": looped.parameter_count(config),
            "device": looped.device_name(device), "torch": torch.__version__,
            "precision": config.precision}


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
    return "\n".join("    " + row[first:first + width].rstrip()
                     for row in (line, said, marks))


# --------------------------------------------------------------------------------------
# 3. The second paper's test: failures among a million questions
# --------------------------------------------------------------------------------------


def operands(lines: Tensor, task: str, digits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both operands (B, digits), units in column 0, and whether to subtract, (B, 1).

    Arguments:  lines (B, T), questions whose operands both have `digits` digits
    """
    a, b = lines[:, :digits], lines[:, digits + 1:2 * digits + 1]
    if data.TASKS[task].fixed_width:                      # most significant digit first
        a, b = a.flip(1), b.flip(1)
    return a, b, lines[:, digits:digits + 1] == data.VOCABULARY.index("-")


def binomial_interval(failures: int, questions: int) -> tuple[float, float]:
    """The 95% interval of a rate of failure, per million (Wilson 1927).

    Example: no failure in a million questions -> at most 3.8 per million
    """
    n, rate, z = questions, failures / questions, 1.959964
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return 1e6 * max(0.0, middle - half), 1e6 * min(1.0, middle + half)


def count_failures(job: Job, **enrichment) -> tuple[dict, str]:
    """Failures in fresh questions of a fixed-width task, by class and answer token.

    Source: arXiv 2402.02619, appendix: a million questions, teacher-forced.

    Arguments:  enrichment  long_carries and long_borrows, see data.py
    Returns:    questions; failures; interval per million; classes and tokens, each a
                dict: class -> [failures, questions]; token -> failures. And the text
    """
    classes, tokens_wrong = {}, collections.Counter()
    size, first = (job.digits, job.digits), 2 * job.digits + 2
    names = token_names(job.task, job.digits)[first:]
    for part in cell_problems(job.task, size, job.samples, job.seed, **enrichment):
        for lines in batches(job.model, part):
            wrong = (predict(job.model, lines, job.recurrences) != lines[:, 1:])
            wrong = wrong[:, first - 1:]                               # answer tokens
            named = data.question_class(*operands(lines, job.task, job.digits))
            for name, failed in zip(named, wrong.any(dim=1).tolist()):
                seen = classes.setdefault(name, [0, 0])
                seen[0] += failed
                seen[1] += 1
            tokens_wrong.update(dict(zip(names, wrong.sum(dim=0).tolist())))
    failures = sum(failed for failed, _ in classes.values())
    low, high = binomial_interval(failures, job.samples)
    text = (f"{failures} failures in {job.samples:,} questions: "
            f"{1e6 * failures / job.samples:,.1f} per million (95%: {low:,.1f} to "
            f"{high:,.1f})\n  by class:  " + "  ".join(
                f"{name} {failed}/{seen}" for name, (failed, seen)
                in sorted(classes.items())))
    if failures:
        text += "\n  by token:  " + "  ".join(
            f"{name} {failed}" for name, failed in tokens_wrong.items() if failed)
    return {"questions": job.samples, "failures": failures, "interval": [low, high],
            "classes": dict(sorted(classes.items())), "tokens": dict(tokens_wrong)}, text


def fixed_width_report(job: Job) -> tuple[dict, str, str]:
    """Failures in uniform and in enriched questions."""
    started, result, lines = time.perf_counter(), facts(job), []
    known = data.TASKS[job.task].enrichments
    for kind, share in (("uniform", 0.0), ("enriched", 0.4)):
        result[kind], text = count_failures(job, **{
            name: share for name in ("long_carries", "long_borrows") if name in known})
        lines.append(f"{kind}: {text}")
    exact = 1 - result["uniform"]["failures"] / job.samples
    result |= {"lengths": [job.digits], "grid": [[exact]], "equal": {job.digits: exact},
               "bands": {"id": exact}, "seconds": round(time.perf_counter() - started, 1)}
    return result, "\n".join(lines), grid_svg(result, f"{job.task}: {exact:.4%}")


# --------------------------------------------------------------------------------------
# 4. Pictures and tables
# --------------------------------------------------------------------------------------

SHADES = " .:-=+*#%@"      # from 0 to 1; "@" is exactly 1


def shades(shares: list[float], wide: int = 1) -> str:
    """A row of a heat map for the terminal."""
    return "".join(SHADES[int(share * 9)] * wide for share in shares)


def table(heading: list[str], rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell, the last one flush left."""
    rows = [heading, *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heading))]
    return "\n".join("  " + "  ".join(
        [cell.rjust(width) for cell, width in zip(row[:-1], widths)] + [row[-1]]).rstrip()
        for row in rows)


def svg(width: float, height: float, title: str, parts: list[str]) -> str:
    """A whole picture around its parts."""
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'font-family="sans-serif" font-size="12">',
        f'<rect width="{width:g}" height="{height:g}" fill="white"/>',
        svg_text(20, 22, title, 'font-size="14"'), *parts, "</svg>"])


def svg_text(x: float, y: float, content, more: str = "") -> str:
    """A line of text that starts, or with text-anchor is centred, at (x, y)."""
    return f'<text x="{x:g}" y="{y:g}" {more}>{html.escape(str(content))}</text>'


CENTRED = 'text-anchor="middle"'


def colour(share: float) -> str:
    """From dark blue (0) to pale yellow (1), in 20 steps and a last one for exactly 1."""
    level = math.floor(min(share, 1) * 20) / 20
    low, high = (38, 30, 90), (255, 245, 170)
    return "#" + "".join(f"{round(a + (b - a) * level):02x}" for a, b in zip(low, high))


def heat_map(shares: list[list[float]], xs: list[float], ys: list[float]) -> list[str]:
    """Cells between the edges xs and ys, coloured by share. Neighbours of one colour in
    a row become one rectangle, so that a grid of 10,000 stays small."""
    parts = []
    for row, (top, bottom) in zip(shares, zip(ys, ys[1:])):
        colours = [colour(share) for share in row]
        for fill, group in itertools.groupby(range(len(row)), key=colours.__getitem__):
            group = list(group)
            left, right = xs[group[0]], xs[group[-1] + 1]
            parts.append(f'<path d="M{left:.4g} {top:.4g}H{right:.4g}V{bottom:.4g}'
                         f'H{left:.4g}Z" fill="{fill}" shape-rendering="crispEdges"/>')
    return parts


def grid_svg(result: dict, title: str) -> str:
    """The grid as an SVG drawing to scale, the training square outlined."""
    lengths, top = result["lengths"], result["lengths"][-1]
    scale, left, base = 400 / top, 60, 450              # the first operand runs upwards
    xs = [left + n * scale for n in (0, *lengths)]
    ys = [base - n * scale for n in (0, *lengths)]
    rows, columns = data.TASKS[result["task"]].axes
    seen = min(result["train_digits"], top) * scale
    parts = heat_map(result["grid"], xs, ys)
    parts.append(f'<rect x="{left}" y="{base - seen:g}" width="{seen:g}" '
                 f'height="{seen:g}" fill="none" stroke="red" stroke-width="2"/>')
    step = next(step for step in (1, 2, 5, 10, 20, 50) if top <= 10 * step)
    for tick in range(step, top + 1, step):
        parts += [svg_text(left + tick * scale, 466, tick, CENTRED),
                  svg_text(left - 20, base + 4 - tick * scale, tick, CENTRED)]
    parts += [svg_text(260, 488, columns, CENTRED),
              svg_text(-250, 18, rows, CENTRED + ' transform="rotate(-90)"'),
              svg_text(260, 504, "red: lengths seen in training", CENTRED + ' fill="red"')]
    levels = [level / 10 for level in range(10, -1, -1)]
    parts += heat_map([[level] for level in levels], [480, 500], range(50, 451, 36))
    parts += [svg_text(506, 72 + 36 * place, level) for place, level in enumerate(levels)]
    return svg(580, 510, title, parts)


def curves_svg(groups: dict[str, list[dict]], train_digits: int, title: str) -> str:
    """Exact match against the digits of both operands, a curve for each group of runs:
    the median of its seeds, and a band from the worst to the best.

    Arguments:  groups  name -> for each run, digits -> exact match at equal lengths
    """
    longest = max(n for runs in groups.values() for run in runs for n in run)
    inks = itertools.cycle(("#264b96", "#c1272d", "#e6a117", "#2e8b57", "#7b3f99"))

    def x(n: float) -> float:
        return 60 + 480 * math.log(n) / math.log(max(longest, 2))

    def y(share: float) -> float:
        return 300 - 240 * share

    parts = [f'<rect x="60" y="60" width="{x(min(train_digits, longest)) - 60:g}" '
             f'height="240" fill="#eeeeee"/>',
             svg_text(64, 74, f"trained on: up to {train_digits}", 'fill="gray"')]
    for share in (0, 0.25, 0.5, 0.75, 1):
        parts += [f'<path d="M60 {y(share):g}H540" stroke="#dddddd"/>',
                  svg_text(30, y(share) + 4, f"{share:.0%}")]
    ticks = [m * 10**e for e in range(6) for m in (1, 2, 5) if m * 10**e <= longest]
    parts += [svg_text(x(tick), 318, f"{tick:,}", CENTRED) for tick in ticks]
    parts.append(svg_text(300, 338, "digits of both operands", CENTRED))
    for row, ((name, runs), ink) in enumerate(zip(groups.items(), inks)):
        lengths = sorted(set.intersection(*(set(run) for run in runs)))
        at = [sorted(run[n] for run in runs) for n in lengths]

        def line(shares: list[float], back: int = 1) -> str:
            return "L".join(f"{x(n):.4g} {y(share):.4g}"
                            for n, share in list(zip(lengths, shares))[::back])
        parts += [f'<path d="M{line([each[0] for each in at])}L'
                  f'{line([each[-1] for each in at], -1)}Z" fill="{ink}" '
                  f'fill-opacity="0.2"/>',
                  f'<path d="M{line([statistics.median(each) for each in at])}" '
                  f'fill="none" stroke="{ink}" stroke-width="2"/>',
                  svg_text(60, 362 + 18 * row, f"{name} ({len(runs)} "
                           f"{'runs' if len(runs) > 1 else 'run'})", f'fill="{ink}"')]
    return svg(570, 362 + 18 * len(groups), title, parts)


# --------------------------------------------------------------------------------------
# 5. Several runs, compared
# --------------------------------------------------------------------------------------


def compare(jobs: dict[str, Job]) -> tuple[dict, str, str]:
    """Measure runs, given by name; group seeds of the same settings: the bands of each
    run, median and worst of each group, and a curve for each group."""
    same = {"seed", "eval_digits", "eval_every", "eval_samples", "threads"}
    names = sorted({key for job in jobs.values() for key in job.settings} - same)
    differing = [key for key in names if len(
        {str(job.settings.get(key)) for job in jobs.values()}) > 1]
    runs, groups = [], {}
    for name, job in jobs.items():
        fixed = data.TASKS[job.task].fixed_width
        result = (fixed_width_report if fixed else grid_report)(job)[0]
        group = ", ".join(f"{key} {job.settings.get(key)}" for key in differing
                          ) or job.settings.get("preset", "all")
        runs.append({"run": name, "group": group, "settings": job.settings} | result)
        groups.setdefault(group, []).append(runs[-1])
    bands = [band for band in BANDS if any(band in run["bands"] for run in runs)]

    def row(name: str, parts: list[dict], choose) -> list[str]:
        found = [[part["bands"][band] for part in parts if band in part["bands"]]
                 for band in bands]
        return [f"{100 * choose(each):.2f}" if each else "" for each in found] + [name]

    rows = [row(run["run"], [run], min) for run in runs]
    for group, members in groups.items():
        rows += [row(f"median of {len(members)}: {group}", members, statistics.median),
                 row(f"worst of {len(members)}", members, min)]
    text = table([BANDS[band] for band in bands] + ["run"], rows)
    curves = {group: [run["equal"] for run in members]
              for group, members in groups.items()}
    trained = min(run["train_digits"] for run in runs)
    return {"runs": runs}, text, curves_svg(curves, trained, "exact match")


# --------------------------------------------------------------------------------------
# 6. Questions: decoding for real
# --------------------------------------------------------------------------------------


def generate(model: looped.LoopedTransformer, questions, max_new: int,
             recurrences: int | None = None, use_cache: bool = True) -> Tensor:
    """Greedy answers, token by token.

    Arguments:
        questions  rows of token ids, of any lengths: lists, or (B, T) padded on either
                   side; each ends with "="
        max_new    tokens to append at most; stops when every row has ended
        use_cache  keep keys and values of earlier tokens instead of running the whole
                   line again for every token
    Returns:       (B, max_new) int64; what follows an end token is padding
    Raises:        ValueError for a row without tokens, or with padding among them
    """
    rows = []
    for question in questions:
        row = torch.as_tensor(question)
        real = (row != data.PAD).nonzero()[:, 0]
        if not len(real) or len(real) <= real[-1] - real[0]:
            raise ValueError(f"the question {data.decode(row)!r} has "
                             f"{'padding among' if len(real) else 'no'} tokens")
        rows.append(row[real])
    answers = torch.full((len(rows), max_new), data.PAD)
    for length in {len(row) for row in rows}:         # rows of one length need no padding
        chosen = [index for index, row in enumerate(rows) if len(row) == length]
        said = _decode(model, torch.stack([rows[index] for index in chosen]), max_new,
                       recurrences, use_cache)
        answers[chosen] = F.pad(said, (0, max_new - said.shape[1]), value=data.PAD)
    return answers


@torch.inference_mode()
def _decode(model, questions: Tensor, max_new: int, recurrences, use_cache) -> Tensor:
    tokens, cache = questions.to(model.device), {} if use_cache else None
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for _ in range(max_new):
        with looped.autocast(model):
            token = likeliest(model(tokens, recurrences, cache=cache)[:, -1])
        tokens = torch.cat((tokens, token[:, None]), dim=1)
        ended |= token == data.END
        if ended.all():
            break
    said = tokens[:, questions.shape[1]:]
    return said.masked_fill(data.count_before(data.END, said) > 0, data.PAD).cpu()


SOLVE = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def example_question(settings: dict) -> str | None:
    """A question for --ask that a run of these settings can be asked, or None."""
    task, digits = data.TASKS[settings["task"]], settings["train_digits"]
    digits *= 1 if task.fixed_width else 3
    symbols = [symbol for symbol in task.operators if symbol in SOLVE]
    if not symbols or any(settings[name] for name in data.TEXT):
        return None
    return "7" * digits + symbols[0] + "5" * digits


def ask(model: looped.LoopedTransformer, settings: dict, question: str,
        recurrences: int | None = None) -> tuple[dict, str]:
    """The model's answer, and it written out under the operands, wrong digits marked.

    ValueError, in one line, for a question that the model cannot be asked.
    """
    # Python refuses by default to read numbers of more than 4,300 digits.
    getattr(sys, "set_int_max_str_digits", int)(0)
    task = data.TASKS[settings["task"]]
    if example_question(settings) is None:
        raise ValueError(f"--ask knows + - *, and a model of {settings['task']} "
                         f"none of them, or has to find other tokens between digits")
    match = re.fullmatch(rf"\s*([0-9]+)\s*([{re.escape(task.operators)}])\s*([0-9]+)"
                         rf"\s*=?\s*", question)
    if match is None:
        raise ValueError(f"cannot read {question!r}: this model answers questions such "
                         f"as \"12{task.operators[0]}34\"")
    a, symbol, b = int(match[1]), match[2], int(match[3])
    truth = str(SOLVE[symbol](a, b))
    width = settings["train_digits"] if task.fixed_width else 0
    if width and max(a, b) >= 10 ** width:
        raise ValueError(f"{question!r}: this model knows {width} digits only")
    line = (f"{a:0{width}}{symbol}{b:0{width}}=" if width else
            f"{str(a)[::-1]}{symbol}{str(b)[::-1]}=")
    longest = max(len(str(a)), len(str(b)))
    model.config.check_reach(task.places(longest) + model.config.test_offset,
                             data.line_tokens(settings["task"], longest), "this question")
    answer = generate(model, [data.encode(line)], max(len(truth), width + 2) + 2,
                      recurrences)
    said, ended, _ = data.decode(answer[0]).partition("$")
    said = said.rstrip("_")[::-1] if not width else (
        said[:1].replace("+", "") + said[1:].lstrip("0") or "0")
    correct = bool(said == truth and ended)
    wide = max(len(said), len(truth), len(str(a)) + 2, len(str(b)) + 2)
    lines = [f"{a:>{wide}}", symbol + f"{b:>{wide - 1}}", "-" * wide, f"{said:>{wide}}"]
    if correct:
        lines.append("correct")
    else:
        marks = "".join(" ^"[x != y]
                        for x, y in zip(said.rjust(wide), truth.rjust(wide)))
        lines += [marks.rstrip()] * (said != truth) + [f"{truth:>{wide}}  is right"]
        lines += [] if ended else ["the model did not end its answer"]
    return ({"question": question, "answer": said, "truth": truth, "correct": correct},
            "\n".join("  " + line for line in lines))


# --------------------------------------------------------------------------------------
# 7. Why: taps on the nodes of a model
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


def part_name(model: looped.LoopedTransformer, *nodes: Node) -> str:
    """What a reader calls the part of nodes at one token: "layer 1, head 2"."""
    first, last, H = nodes[0], nodes[-1], model.config.heads
    part = "MLP" if first.part == H else "head " + " + ".join(
        dict.fromkeys(str(node.part + 1) for node in nodes))
    loop = ""
    if first.recurrence != last.recurrence:
        loop = "all recurrences, "
    elif model.config.recurrences > 1 or first.recurrence > 0:
        loop = f"recurrence {first.recurrence + 1}, "
    return f"{loop}layer {first.layer + 1}, {part}"


def node_output(model: looped.LoopedTransformer, node: Node) -> tuple[tuple, slice]:
    """The `where` of `tapped` that holds a node's output, and its columns there."""
    if node.part == model.config.heads:
        return (node.recurrence, node.layer, "ffn"), slice(None)
    head_width = model.config.width // model.config.heads
    first = node.part * head_width
    return (node.recurrence, node.layer, "heads"), slice(first, first + head_width)


@contextlib.contextmanager
def tapped(model: looped.LoopedTransformer, edit):
    """Within it, every forward pass sends what happens in its layers through
    `edit(where, value)`, which returns what to use instead.

    `where` is (recurrence, layer, kind), counted from 0. The kind is "attention", value
    (q, k, v, bias), see looped.DotProduct; or "heads", value (B, T, D) with the heads
    side by side, before they are mixed; or "ffn", value (B, T, D). It is done with
    torch's hooks: the model itself knows nothing of this.

    Raises:  ValueError when no layer was seen, as in a compiled model
    """
    calls, seen = collections.Counter(), []

    def start(module, arguments):
        """A new forward pass: recurrences count from 0 again."""
        calls.clear()

    def before(layer, kind, module, arguments):
        """The inputs of the dot product, or of the matrix that mixes the heads."""
        seen.append(kind)
        where = (calls[layer], layer, kind)
        return edit(where, arguments if kind == "attention" else arguments[0])

    def after_ffn(layer, module, arguments, output):
        """After the last part of a layer: its next call is the next recurrence."""
        calls[layer] += 1
        return edit((calls[layer] - 1, layer, "ffn"), output)

    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(start))
        for index, layer in enumerate(model.layers):
            attention = layer.attention
            for module, kind in ((attention.dot_product, "attention"),
                                 (attention.out, "heads")):
                hooks.enter_context(module.register_forward_pre_hook(
                    partial(before, index, kind)))
            hooks.enter_context(layer.ffn.register_forward_hook(
                partial(after_ffn, index)))
        yield
    if not seen:
        raise ValueError("no layer was seen at work: a compiled model hides its parts; "
                         "look into the one that looped.load returns")


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
        said = predict(model, lines, recurrences)
    return said, {where: value for where, value in outputs.items()
                  if where[2] != "attention"}


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
                  if name in data.TASKS[task].enrichments}
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
# 8. Why: what each head reads, what breaks without a node, and what a node carries
# --------------------------------------------------------------------------------------


def attention_maps(model: looped.LoopedTransformer, tokens: Tensor,
                   recurrences: int | None = None) -> Tensor:
    """How much each token reads of each token, the mean over the lines of a batch.

    Arguments:  tokens (B, T), lines whose parts stand in the same columns
    Returns:    (recurrences, layers, H, T, T) float32 on the CPU; rows are the readers
    """
    maps = []

    def record(where, value):
        """Work out the weights of a dot product, and change nothing."""
        if where[2] == "attention":
            q, k, _, bias = value
            scores = (q @ k.transpose(-2, -1)).float() * q.shape[-1] ** -0.5
            if bias is None:
                bias = torch.full_like(scores[0, 0], -torch.inf).triu(1)
            maps.append((scores + bias).softmax(dim=-1).mean(dim=0).cpu())
        return value

    with tapped(model, record):
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


def attention_report(job: Job) -> tuple[dict, str, str]:
    """What the heads read, and a picture of the one that aligns digits best."""
    problems = next(cell_problems(job.task, (job.digits, job.digits),
                                  min(job.samples, 1000), job.seed))
    maps = attention_maps(job.model, problems, job.recurrences)
    reads = read_columns(maps, job.task, job.digits)
    near = job.settings["train_digits"]
    heads = head_table(reads, near)
    text = (f"attention of the answer at {job.digits} + {job.digits} digits, best aligned "
            f"heads first\n" + table(
                ["same place", f"up to {near} away", "farther", "other tokens", "head"],
                [[f"{row[name]:.2f}" for name in ("same", "near", "far", "rest")]
                 + [f"recurrence {row['recurrence']}, layer {row['layer']}, head "
                    f"{row['head']}"] for row in heads[:20]]))
    best = heads[0]
    index = [best[name] - 1 for name in ("recurrence", "layer", "head")]
    shares = reads[tuple(index)]                                # (places, 2, places)
    size, parts = 440 / (2 * job.digits + 1), []
    edges = [n * size for n in range(job.digits + 1)]
    for operand, name in enumerate(("first", "second")):
        left = 50 + operand * (job.digits + 1) * size
        # A head that reads both digits of a column has half left for each.
        parts += heat_map((2 * shares[:, operand]).tolist(), [left + n for n in edges],
                          [30 + n for n in edges])
        parts.append(svg_text(left + edges[-1] / 2, 48 + edges[-1],
                              f"{name} operand, place 1 to {job.digits}", CENTRED))
    parts += [svg_text(-30 - edges[-1] / 2, 40, "answer place",
                       CENTRED + ' transform="rotate(-90)"'),
              svg_text(50, 292, "dark blue: none of the attention; pale yellow: half of "
                                "it or more", 'fill="gray"')]
    title = (f"recurrence {best['recurrence']}, layer {best['layer']}, head "
             f"{best['head']}: {best['same']:.0%} on the same place, {best['far']:.0%} "
             f"far off")
    return {"train_digits": near, "heads": heads}, text, svg(520, 300, title, parts)


class Damage(NamedTuple):
    """What fails without a node, as shares of the questions that were right with it."""

    fails: float
    tokens: dict[str, float]           # the same of each answer token that fails
    classes: dict[str, float]          # and of each class of questions that does


def share(verdicts: Tensor) -> float:
    """How many of them are True, from 0 to 1."""
    return float(verdicts.double().mean())


def means_and_right(job: Job, lines: Tensor) -> tuple[dict, Tensor]:
    """The mean output of every node, and the lines that the model answers right.
    ValueError when there is none."""
    said, outputs = activations(job.model, lines, job.recurrences)
    right = lines[is_exact(lines, said)]
    if not len(right):
        raise ValueError(f"this model answers no question of {job.digits} digits right, "
                         f"so that nothing can break")
    return {where: value.mean(dim=0) for where, value in outputs.items()}, right


def ablate(job: Job) -> dict[Node, Damage]:
    """Replace every node by its own mean, one at a time, and see what breaks.

    Source: arXiv 2402.02619, "mean ablation"; the means are over the same questions.
    # DIFFERS: the authors' code takes the means of layer 0 for all layers.

    Raises:     ValueError when no question is answered right, so that none can fail
    """
    lines = questions(job.task, job.digits, job.samples, job.seed)
    means, lines = means_and_right(job, lines)
    named = data.question_class(*operands(lines, job.task, job.digits))
    rows = {name: torch.tensor([name == other for other in named])
            for name in sorted(set(named))}
    is_answer = data.answer_mask(lines)[:, 1:]
    names = token_names(job.task, job.digits)[1:]
    found = {}
    for node in all_nodes(job.model, lines.shape[1] - 1, job.recurrences):
        with replaced(job.model, [node], means):
            wrong = predict(job.model, lines, job.recurrences) != lines[:, 1:]
        wrong &= is_answer
        fails = wrong.any(dim=1)
        tokens = dict(zip(names, map(share, wrong.unbind(1))))
        classes = {name: share(fails[row]) for name, row in rows.items()}
        found[node] = Damage(share(fails), *({name: part for name, part in parts.items()
                                              if part} for parts in (tokens, classes)))
    return found


def node_map(model, shares: dict[Node, float], names: list[str]) -> tuple[dict, str]:
    """A share for each node: the second paper's maps, parts in the rows and tokens in
    the columns. The rows, part -> shares, and their text."""
    rows = collections.defaultdict(list)
    for node, part in shares.items():                # in the order of tokens, see above
        rows[part_name(model, node)].append(part)
    columns = names[:max(map(len, rows.values()))]
    # The names of the tokens are written downwards, a character to a line.
    heading = zip(*(name.ljust(max(map(len, columns))) for name in columns))
    left = max(map(len, rows))
    return rows, "\n".join([" " * left + "  " + "".join(line) for line in heading]
                           + [f"{name:<{left}}  {shades(row)}"
                              for name, row in rows.items()])


def node_svg(rows: dict[str, list[float]], labels: dict[tuple[str, int], str],
             names: list[str], title: str, legend: str) -> str:
    """The same as an SVG; labels are short texts by (part, token)."""
    columns = max(map(len, rows.values()))
    size, left, above = max(6, min(30, 900 // columns)), 190, 60
    xs = [left + size * n for n in range(columns + 1)]
    ys = [above + 22 * n for n in range(len(rows) + 1)]
    parts = heat_map(list(rows.values()), xs, ys)
    parts += [svg_text(10, y + 15, name) for name, y in zip(rows, ys)]
    if size > 20:
        small = CENTRED + ' font-size="9"'
        parts += [svg_text(x + size / 2, above - 6, name, small)
                  for x, name in zip(xs, names)]
        for (name, token), label in labels.items():
            ink = "black" if rows[name][token] > 0.5 else "white"
            y = ys[list(rows).index(name)] + 15
            parts.append(svg_text(xs[token] + size / 2, y, label,
                                  small + f' fill="{ink}"'))
    parts.append(svg_text(10, ys[-1] + 20, legend, 'fill="gray"'))
    return svg(xs[-1] + 20, ys[-1] + 30, title, parts)


def top_shares(shares: dict[str, float], most: int = 4) -> str:
    """The largest shares as text: {"S1": 0.5, "S2": 0.31} -> "S1 50%, S2 31%"."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:most]
    return ", ".join(f"{name} {part:.0%}" for name, part in largest if part >= 0.005)


def ablation_report(job: Job) -> tuple[dict, str, str]:
    """A map of what breaks without each node, and what the nodes that matter most
    read."""
    model, names = job.model, token_names(job.task, job.digits)
    found = ablate(job)
    rows, text = node_map(model, {node: damage.fails for node, damage in found.items()},
                          names)
    lines = [f"share of questions that fail without a node, from 0 to 1: \"{SHADES}\"",
             text, "the nodes that matter most: failures by class and by token, and what "
             "a head reads\n(a node at one token predicts the next)"]
    maps = attention_maps(model, questions(job.task, job.digits, job.samples, job.seed),
                          job.recurrences)
    result, labels = [], {}
    for node, damage in found.items():
        part, token = part_name(model, node), names[node.token]
        reads = "" if node.part == model.config.heads else top_shares(
            dict(zip(names, maps[node[:3]][node.token].tolist())))
        result.append({"node": part, "token": token} | damage._asdict()
                      | {"reads": reads})
        # As in the paper's maps, a cell names the answer digit that breaks.
        labels[part, node.token] = max(damage.tokens, key=damage.tokens.get, default="")
    for row in sorted(result, key=lambda row: -row["fails"])[:12]:
        if row["fails"]:
            lines.append(
                f"  {row['node']} at {row['token']}: {row['fails']:.0%}; "
                f"{top_shares(row['classes'])}; {top_shares(row['tokens'])}"
                + f"; reads {row['reads']}" * bool(row["reads"]))
    return {"nodes": result}, "\n".join(lines), node_svg(
        rows, labels, names,
        f"{job.task}, {job.digits} + {job.digits} digits: what fails without a node",
        "share of the questions that fail: dark blue, none; pale yellow, all. Named: the "
        "digit that fails most")


def keep_report(job: Job) -> tuple[dict, str, None]:
    """Keep the nodes that matter and replace all others by their means, all at once: do
    they suffice? The share of right answers that stay right, and that of random sets."""
    model, found = job.model, ablate(job)
    means, fresh = means_and_right(job, questions(job.task, job.digits, job.samples,
                                                  job.seed + 1))
    generator = torch.Generator().manual_seed(job.seed)

    def right(kept: set[Node]) -> float:
        """Share that is still right with these nodes alone."""
        with replaced(model, found.keys() - kept, means):
            return share(is_exact(fresh, predict(model, fresh, job.recurrences)))

    rows, cells = [], []
    for least in (0.0, 0.01, 0.05, 0.2):
        kept = {node for node, damage in found.items() if damage.fails > least}
        draws = [torch.randperm(len(found), generator=generator)[:len(kept)].tolist()
                 for _ in range(10)]
        random = max(right({list(found)[n] for n in draw}) for draw in draws)
        rows.append({"breaks_more_than": least, "nodes": len(kept),
                     "right": right(kept), "random": random})
        cells.append([f"> {least:.0%}", str(len(kept)), f"{rows[-1]['right']:.1%}",
                      f"{random:.1%}", ""])
    text = (f"share of right answers that stay right with the nodes alone that break so\n"
            f"much, of {len(found)}, and all others replaced by their means; and with as "
            f"many\nrandom nodes, best of 10\n"
            + table(["breaks", "nodes", "right", "random", ""], cells))
    return {"nodes": len(found), "kept": rows}, text, None


# What the second paper says that a node may hold: the class of questions that shows it,
# and how the column of the other question differs from the clean one's. "digit": in its
# digit alone. "carry": in whether it carries alone. "undecided": one of the two passes
# on what comes from below, and the other does not.
SUBTASKS = {"SA": ("S", "digit"), "SC": ("S", "carry"), "ST": ("S", "undecided"),
            "MD": ("M", "digit"), "MT": ("M", "undecided"),
            "ND": ("N", "digit"), "NT": ("N", "undecided")}


def class_pairs(job: Job, kind: str) -> tuple[Tensor, Tensor, list, list]:
    """Random pairs of questions of a class, clean and other, (N, T) each, and of both
    the two data.CLASS_LABELS, (N, digits) each."""
    lines = questions(job.task, job.digits, 100 * job.samples, job.seed)
    named = data.question_class(*operands(lines, job.task, job.digits))
    lines = lines[torch.tensor([name[0] == kind for name in named])]
    others = lines.roll(1, dims=0)
    labels = [data.digit_labels(*operands(part, job.task, job.digits)[:2])
              for part in (lines, others)]
    return lines, others, *([each[name] for name in data.CLASS_LABELS[kind]]
                            for each in labels)


def patch_pairs(job: Job, subtask: str, place: int) -> list[Tensor]:
    """Clean questions; others; and what the clean ones must answer if the sub-task had,
    in one column, the value that it has in the others.

    Source: arXiv 2402.02619, "interchange intervention".
    # DIFFERS: the authors choose one pair of questions for each sub-task. Here both are
    random ones of a class, unlike in every column, and the expected answer follows from
    data.answer_from_labels: a node that holds more than its sub-task gives itself away.

    Arguments:  subtask  a key of SUBTASKS
                place    of the column, units 0
    Returns:    clean, other, expected: each (N, T) with N <= samples
    """
    kind, change = SUBTASKS[subtask]
    lines, others, clean, other = class_pairs(job, kind)
    same_digit, same_carry = ((x == y)[:, place] for x, y in zip(clean, other))
    passes = [(labels[1] == data.UNDECIDED)[:, place] for labels in (clean, other)]
    differs = {"digit": ~same_digit & same_carry, "carry": same_digit & ~same_carry,
               "undecided": passes[0] ^ passes[1]}[change]
    mixed, swapped = [label.clone() for label in clean], int(change != "digit")
    mixed[swapped][:, place] = other[swapped][:, place]
    before, after = (data.answer_from_labels(kind, *labels)
                     for labels in (clean, mixed))
    # A node at one token cannot answer for a carry that is passed on from digit to digit.
    one_digit_changes = (before != after).sum(dim=1) == 1
    lengths = [((answer != 0) * torch.arange(1, job.digits + 2)).amax(dim=1)
               for answer in (before, after)]
    as_long = data.TASKS[job.task].fixed_width | (lengths[0] == lengths[1])
    same_sign = (kind == "S") | (lengths[1] <= job.digits)
    still_negative = (kind != "N") | (lengths[1] > 0)
    fits = differs & one_digit_changes & as_long & same_sign & still_negative
    expected, names = lines.clone(), token_names(job.task, job.digits)
    columns = [names.index(f"A{n}") for n in range(job.digits + 1)]
    expected[:, columns] = torch.where(lines[:, columns] < 10, after, lines[:, columns])
    return [part[fits][:job.samples] for part in (lines, others, expected)]


def null_pairs(job: Job, subtask: str, place: int) -> list[Tensor]:
    """Pairs whose column has the same labels in both, so that its sub-tasks must not
    change the answer: clean, other, and clean again."""
    lines, others, clean, other = class_pairs(job, SUBTASKS[subtask][0])
    same = torch.stack([(x == y)[:, place] for x, y in zip(clean, other)]).all(dim=0)
    return [part[same][:job.samples] for part in (lines, others, lines)]


def answered(job: Job, pairs: list[Tensor]) -> tuple[list[Tensor], dict] | None:
    """The pairs of which the model answers both questions right, and the outputs of its
    nodes in the others; None where there is none."""
    if not len(pairs[0]):                 # a carry out of the top would lengthen them
        return None
    right = torch.stack([is_exact(lines, predict(job.model, lines, job.recurrences))
                         for lines in pairs[:2]]).all(dim=0)
    if not right.any():
        return None
    pairs = [lines[right] for lines in pairs]
    return pairs, activations(job.model, pairs[1], job.recurrences)[1]


def candidates(job: Job) -> list[tuple[Node, ...]]:
    """What may carry a sub-task: a node alone, at all recurrences, and, since heads
    share work, with one other head of its layer and with all."""
    tokens = len(token_names(job.task, job.digits)) - 1
    singles = all_nodes(job.model, tokens, job.recurrences)
    loops = range(job.recurrences or job.model.config.recurrences)
    heads = range(job.model.config.heads)
    together = {*itertools.combinations(heads, 2), tuple(heads)}
    return [(node,) for node in singles] + [
        tuple(node._replace(recurrence=loop) for loop in loops)
        for node in singles if node.recurrence == 0 and len(loops) > 1] + [
        tuple(node._replace(part=head) for head in group)
        for node in singles if node.part == 0 for group in sorted(together)]


def interchange(job: Job, nodes, pairs: list[Tensor], outputs: dict) -> float:
    """Share of clean questions that are answered as expected when these nodes put out
    what they did in the other questions."""
    with replaced(job.model, nodes, outputs):
        said = predict(job.model, pairs[0], job.recurrences)
    return share(is_exact(pairs[2], said))


def patch(job: Job) -> list[dict]:
    """For each sub-task and column, the nodes that carry it best: put their output in
    other questions' runs into clean ones, and require the exact answer. The best are
    chosen on one set of pairs and scored on fresh ones.

    Returns:  for each sub-task and place: pairs, their number; exact, the share of
              answers that are as predicted; and, if it is above a half: nodes; null,
              the share that stay when the column has the same labels
    Raises:   ValueError when the model answers none of the pairs right
    """
    rows, groups = [], candidates(job)
    for subtask, place in itertools.product(SUBTASKS, range(job.digits)):
        choice, fresh = (answered(each, patch_pairs(each, subtask, place))
                         for each in (job, job._replace(seed=job.seed + 1)))
        if choice is None or fresh is None:
            continue
        best = max(groups, key=lambda nodes: interchange(job, nodes, *choice))
        row = {"subtask": subtask, "place": place, "pairs": len(fresh[0][0]),
               "exact": interchange(job, best, *fresh)}
        null = answered(job, null_pairs(job, subtask, place))
        if row["exact"] > 0.5 and null:
            row |= {"nodes": best, "null": interchange(job, best, *null)}
        rows.append(row)
    if not rows:
        raise ValueError(f"this model answers no question of {job.digits} digits right "
                         f"that could be changed")
    return rows


def patch_report(job: Job) -> tuple[dict, str, str]:
    """Which nodes carry each sub-task of each column, and a map of them."""
    model, names = job.model, token_names(job.task, job.digits)
    nodes = all_nodes(model, len(names) - 1, job.recurrences)
    shares, labels, cells, rows = dict.fromkeys(nodes, 0.0), {}, [], patch(job)
    for row in rows:
        name = f"{row['subtask']}{row['place']}"
        for node in row.get("nodes", ()):
            if row["exact"] >= shares[node]:
                shares[node] = row["exact"]
                labels[part_name(model, node), node.token] = name
        chosen = row.pop("nodes", ())
        row["node"] = chosen and f"{part_name(model, *chosen)} at {names[chosen[0].token]}"
        cells.append([name, str(row["pairs"]), f"{row['exact']:.1%}",
                      f"{row['null']:.1%}" if chosen else "",
                      row["node"] or "no single node"])
    text = ("the node that best carries a sub-task of a column; in how many pairs the\n"
            "answer is as predicted when it comes from another question; in how many it\n"
            "stays when the column's labels are the same\n"
            + table(["subtask", "pairs", "predicted", "stays", "node"], cells))
    return {"subtasks": rows}, text, node_svg(
        node_map(model, shares, names)[0], labels, names,
        f"{job.task}, {job.digits} + {job.digits} digits: the node that carries a "
        f"sub-task best",
        "named where more than half of the answers are as predicted; pale yellow: all")


def pca(job: Job) -> list[dict]:
    """Does the first principal component of a head's output tell a carry, no carry and
    undecided apart?

    Source: arXiv 2402.02619. For each class of questions and each head and token, the
    two first components of its outputs, and for each column the share of the first
    one's variance that lies between the three values of ST (MT, NT) in that column.

    Returns:  best first: label, e.g. "ST3"; node; between, that share; variance, the
              first component's share of all; points (N, 2) and values (N,)
    Raises:   ValueError when no class has ten questions
    """
    lines = questions(job.task, job.digits, job.samples, job.seed)
    a, b, subtract = operands(lines, job.task, job.digits)
    labels, named = data.digit_labels(a, b), data.question_class(a, b, subtract)
    outputs = activations(job.model, lines, job.recurrences)[1]
    rows = []
    for kind, (_, label) in data.CLASS_LABELS.items():
        of_class = torch.tensor([name[0] == kind for name in named])
        for node in all_nodes(job.model, lines.shape[1] - 1, job.recurrences):
            # What stands after the end of a short answer is no output.
            chosen = of_class & (lines[:, node.token + 1] != data.PAD)
            if node.part == job.model.config.heads or chosen.sum() < 10:
                continue
            where, columns = node_output(job.model, node)
            x = outputs[where][:, node.token, columns].float().cpu()[chosen]
            u, s, _ = torch.linalg.svd(x - x.mean(dim=0), full_matrices=False)
            if s[0] < 1e-6:
                continue                          # this head reads nothing that differs
            points, total = (u * s)[:, :2], s[0] ** 2
            for place in range(job.digits):
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


def pca_report(job: Job) -> tuple[dict, str, str]:
    """The heads whose output tells carries apart best, and a picture of the best one's
    first two components, coloured by carry, no carry and undecided."""
    names, rows = token_names(job.task, job.digits), pca(job)
    result = [{"label": row["label"], "between": row["between"],
               "variance": row["variance"], "node": part_name(job.model, row["node"])
               + f" at {names[row['node'].token]}"} for row in rows[:100]]
    text = ("the heads whose first principal component tells a carry, no carry and\n"
            "undecided apart best: the share of its variance between the three, and its\n"
            "share of all variance\n" + table(
                ["label", "between", "variance", "node"],
                [[row["label"], f"{row['between']:.1%}", f"{row['variance']:.1%}",
                  row["node"]] for row in result[:12]]))
    points, values = rows[0]["points"], rows[0]["values"]
    low, high = points.amin(dim=0), points.amax(dim=0)
    spots, parts = 40 + 420 * (points - low) / (high - low).clamp(min=1e-9), []
    for value, (name, ink) in enumerate((
            ("no carry", "#264b96"), ("carry", "#c1272d"), ("undecided", "#e6a117"))):
        parts.append(svg_text(40 + 120 * value, 515, name, f'fill="{ink}"'))
        parts += [f'<circle cx="{x:.0f}" cy="{y:.0f}" r="3" fill="{ink}" '
                  f'fill-opacity="0.6"/>' for x, y in spots[values == value].tolist()]
    title = f"{result[0]['label']}: {result[0]['node']}"
    return {"heads": result}, text, svg(500, 530, title, parts)


def readout(job: Job, lines: Tensor) -> dict[int, dict]:
    """When each digit becomes right: read the answer out after every recurrence, up to
    the job's number of them, or twice as many as in training.

    Arguments:  lines  (B, T), sums whose operands both have `digits` digits
    Returns:           length of the carry chain that feeds a digit -> the number of
                       such digits, and their share right after 1, 2, ... recurrences
    """
    digits, most = job.digits, job.recurrences or 2 * job.model.config.recurrences
    a, b, _ = operands(lines, job.task, digits)
    carry, place = data.carry_out(a + b), torch.arange(digits)
    # Columns that carry, without a gap, below each place and counted from there down.
    chain = place - torch.where(carry, -1, place).cummax(dim=1).values
    chain = F.pad(chain, (1, 0))[:, :digits]
    first = 2 * digits + 1                                    # "=" predicts the units
    right = torch.stack([predict(job.model, lines, n)[:, first:first + digits]
                         == lines[:, first + 1:first + 1 + digits]
                         for n in range(1, most + 1)])          # (most, B, digits)
    return {length: {"digits": int((chain == length).sum()),
                     "right": right[:, chain == length].double().mean(dim=1).tolist()}
            for length in chain.unique().tolist()}


def readout_report(job: Job) -> tuple[dict, str, None]:
    """The shares of `readout`, for sums with long carry chains."""
    shares = readout(job, questions(job.task, job.digits, job.samples, job.seed))
    most = len(shares[0]["right"])
    text = (f"share of digits right after so many recurrences, by the length of the\n"
            f"carry chain that feeds them, at {job.digits} + {job.digits} digits:\n"
            + table(["chain", "digits", *map(str, range(1, most + 1)), ""],
                    [[str(length), str(row["digits"]),
                      *(f"{part:.2f}" for part in row["right"]), ""]
                     for length, row in shares.items()]))
    return {"readout": shares}, text, None


# --------------------------------------------------------------------------------------
# 9. The command
# --------------------------------------------------------------------------------------

# The flags that look inside a model: a report, and what the user is told of it.
WHY = {"attend": (attention_report, "what each head reads of the operands"),
       "ablate": (ablation_report, "what breaks if a head or MLP, at any token, is "
                                   "replaced by its mean"),
       "keep": (keep_report, "do the nodes that matter suffice without the others"),
       "patch": (patch_report, "which node carries a digit or a carry of each column"),
       "pca": (pca_report, "which head's output tells carries apart"),
       "readout": (readout_report, "after which recurrence each digit is right")}

# What a run cannot do without, and nobody else may write.
RUN_FILES = ("config.json", "log.jsonl", "checkpoint.pt")


def number(kind: type, low: float, high: float):
    """An argparse type: a number of this kind, from low to high."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(
                f"{text} is not a{' whole' * (kind is int)} number from {low:g} to "
                f"{high:g}")
        return value
    read.__name__ = kind.__name__
    return read


def one_of(*names: str):
    """An argparse type: one of these names."""
    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} is not one of "
                                             f"{', '.join(filter(None, names))}")
        return text
    read.__name__ = "|".join(filter(None, names)) if len(names) < 6 else "name"
    return read


def say(text: str) -> None:
    """Print at once. A pipe that was closed, as by `| head`, stops nothing."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def any_terminal() -> None:
    """No character can stop the program where the terminal does not know it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def as_typed(*words) -> str:
    """A command as the user's shell wants it typed."""
    join = subprocess.list2cmdline if os.name == "nt" else shlex.join
    return join(map(str, words))


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, smaller: str):
    """Turn what a user can cause into one line and an exit status: bad input, files that
    cannot be read or written, and a lack of memory, with the flags that then help."""
    try:
        yield
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except (RuntimeError, MemoryError) as error:
        # torch words it in one way for each kind of device.
        lacking = any(words in str(error) for words in ("out of memory",
                                                        "allocate memory"))
        if not lacking and not isinstance(error, MemoryError):
            raise
        parser.exit(1, f"{parser.prog}: out of memory: use a smaller {smaller}\n")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    unfinished = path.with_name(path.name + ".partial")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def newest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last. ValueError when there is none."""
    found = [path for path in Path(folder).glob("*/checkpoint.pt") if path.is_file()]
    if not found:
        raise ValueError(f"no run in {folder}/: train one with `python train.py`, or "
                         f"name a run folder or checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def check_targets(targets: list[Path]) -> None:
    """Find out before the work whether its result can be written. ValueError if not."""
    for target in targets:
        if not target.parent.is_dir():
            raise ValueError(f"{target}: there is no folder {target.parent}")
        if target.is_dir() or target.name in RUN_FILES:
            raise ValueError(f"{target} is in the way: name another file")
        write_whole(target.with_name(target.name + ".test"), "")
        target.with_name(target.name + ".test").unlink()
    if len(set(targets)) < len(targets):
        raise ValueError(f"{targets[0]} is named twice: name two files")


def build_parser() -> argparse.ArgumentParser:
    """The flags of `python evaluate.py`."""
    count = number(int, 1, 10**9)
    parser = argparse.ArgumentParser(
        prog="evaluate.py", usage="python evaluate.py [RUN ...] [flags]; --help lists them",
        description="Score a run by exact match on a grid of operand lengths.")
    parser.add_argument("runs", nargs="*", metavar="RUN", type=Path,
                        help="run folder or checkpoint; the newest run when left out; "
                             "several are compared")
    parser.add_argument("--task", type=one_of(*data.TASKS), help="test on another task "
                        "of the same tokens, e.g. a model of both on its additions")
    parser.add_argument("--max-digits", type=count, metavar="N", help="largest operand; "
                        "past 100 only equal lengths (default: as in the run)")
    parser.add_argument("--samples", type=count, metavar="K", help="problems a cell")
    parser.add_argument("--every", type=count, metavar="N", help="beyond the training "
                        "lengths score only multiples of N")
    parser.add_argument("--recurrences", type=count, metavar="N",
                        help="run the layers this often instead of as in training")
    parser.add_argument("--seed", type=number(int, 0, 10**6), default=0,
                        help="of the problems (0)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best here)")
    parser.add_argument("--precision", type=one_of(*looped.CHOICES["precision"]),
                        help="of matrix products (default: as in training)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the grid")
    for name, (_, meaning) in WHY.items():
        parser.add_argument(f"--{name}", type=count, metavar="N",
                            help=f"{meaning}, in questions of N + N digits")
    parser.add_argument("--ask", metavar="SUM", help='one question, like "123+456"')
    return parser


# The settings of a run that a test needs, and their types.
TEST_SETTINGS = {"task": str, "train_digits": int, "eval_digits": int,
                 "eval_samples": int, "eval_every": int, "compile": bool,
                 "index_hints": bool, "spaces": float}


def open_job(run: Path, args: argparse.Namespace, why: str | None) -> Job:
    """The model of a run, and what the flags want to know of it.

    Raises ValueError, in one line, for every flag that cannot be followed.
    """
    device = looped.choose_device(args.device)
    settings = looped.read_checkpoint(run)["settings"]
    for name, kind in TEST_SETTINGS.items():
        value = settings.get(name)
        if type(value) is not kind or kind is int and value < 1 or (
                kind is float and not 0 <= value <= 1):
            raise ValueError(f"{run}: its setting {name} is {value!r}: not from this "
                             f"version of train.py")
    settings |= {"task": args.task or settings["task"],
                 "eval_every": args.every or settings["eval_every"]}
    if settings["task"] not in data.TASKS:
        raise ValueError(f"{run}: its task {settings['task']!r} is none of "
                         f"{', '.join(data.TASKS)}")
    model, task = looped.load(run, device), data.TASKS[settings["task"]]
    model.config.precision = args.precision or model.config.precision
    digits = getattr(args, why or "max_digits") or settings["eval_digits"]
    samples = args.samples or (200 if why else settings["eval_samples"])
    job = Job(model, settings, digits, samples, args.seed, args.recurrences)
    if data.vocabulary_size(job.task, **job.text) > model.config.vocab_size:
        raise ValueError(f"--task {job.task}: the model in {run} lacks the tokens for it")
    asked = f"--{why or 'max-digits'} {digits}"
    if task.fixed_width and digits != settings["train_digits"]:
        raise ValueError(f"{asked}: in the fixed-width format this model knows "
                         f"{settings['train_digits']} digits only")
    model.config.check_reach(task.places(digits) + model.config.test_offset,
                             data.line_tokens(job.task, digits, **job.text), asked)
    if why and (any(job.text.values()) or not set("+-") & set(task.operators)):
        raise ValueError(f"--{why} needs sums or differences, not {job.task} with other "
                         f"tokens between the digits")
    if why and samples < 20:
        raise ValueError(f"--samples {samples}: --{why} takes means over questions, say "
                         f"20 or more")
    if why == "readout" and job.task != "addition":
        raise ValueError(f"--readout needs --task addition, not {job.task}")
    return job


def answer(args: argparse.Namespace) -> tuple[dict, str, str | None]:
    """What the flags ask for: figures, text, and a picture or None."""
    chosen = [name for name in ("ask", *WHY) if getattr(args, name) is not None]
    check_targets([file for file in (args.json, args.svg) if file is not None])
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]} and --{chosen[1]}: choose one at a time")
    if args.svg and chosen and chosen[0] in ("ask", "keep", "readout"):
        raise ValueError(f"--{chosen[0]} has no picture: leave --svg out")
    runs = args.runs or [newest_run()]
    if len(runs) > 1 and chosen:
        raise ValueError(f"--{chosen[0]} looks at one run: name one")
    why = next((name for name in chosen if name != "ask"), None)
    jobs = {str(run): open_job(run, args, why) for run in runs}
    job = next(iter(jobs.values()))
    if len(jobs) > 1:
        return compare(jobs)
    if args.ask is not None:
        return *ask(job.model, job.settings, args.ask, args.recurrences), None
    if why is None:
        fixed = data.TASKS[job.task].fixed_width
        return (fixed_width_report if fixed else grid_report)(job)
    result, text, picture = WHY[why][0](job)
    common = {"task": job.task, "digits": job.digits, "samples": job.samples,
              "seed": job.seed}
    return common | result, text, picture


def main(argv: list[str] | None = None) -> None:
    """Score runs or ask one a question, as the flags say (sys.argv when left out)."""
    parser = build_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--ask" in argv[:-1]:                  # the question may begin with a minus sign
        at = argv.index("--ask")
        argv[at:at + 2] = [f"--ask={argv[at + 1]}"]
    args = parser.parse_args(argv)
    any_terminal()
    try:
        with one_line_errors(parser, "--samples or number of digits"):
            result, text, picture = answer(args)
            if args.json:
                write_whole(args.json, json.dumps(result) + "\n")
            if args.svg:
                write_whole(args.svg, picture)
    except KeyboardInterrupt:
        parser.exit(130, "\nevaluate.py: stopped; nothing was written\n")
    say(text)


if __name__ == "__main__":
    main()
