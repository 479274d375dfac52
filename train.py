"""How it learns: the presets, one loop, and checkpoints that a run goes on from.

Read it beside the paper ("Transformers Can Do Arithmetic with the Right Embeddings",
arXiv 2405.17399), appendix "Implementation details". It needs torch, and data.py,
abacus.py, looped.py and evaluate.py beside it.

    python train.py                     laptop preset on a CPU, paper preset with CUDA
    python train.py --preset paper      the paper's model, data and recipe
    python train.py --resume            go on with the newest run, or with --out's
    python train.py --benchmark         how fast, and what share of the machine's best

Every value of a preset has a flag of the same name: --layers 16 --recurrences 1.

Glossary
    step          one update of the weights, from one batch
    batch         contexts of one step, cut into microbatches that fit the memory
    real tokens   all tokens but the padding
    run           a folder with config.json, log.jsonl, checkpoint.pt and, at the end,
                  accuracy.json and accuracy.svg

Not here: several GPUs, hyperparameter search.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("train.py needs Python 3.10 or newer")
# Threads that wait for work spin, and on a busy machine take the time that the others
# need. Less of it costs nothing on an idle one. As evaluate.py, before torch is loaded.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# Apple's GPU lacks a kernel now and then; torch then uses the CPU for it, if asked
# before it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import abacus
import data
import evaluate
import looped

# --------------------------------------------------------------------------------------
# 1. Presets
# --------------------------------------------------------------------------------------

COUNT, WHOLE = evaluate.number(int, 1, 10**9), evaluate.number(int, 0, 2**31)
SHARE, POSITIVE = evaluate.number(float, 0, 1), evaluate.number(float, 1e-30, 1e9)
CHOICES, OFFSETS = looped.CHOICES, ("batch", "disjoint", "same")
PRESETS = ("paper", "laptop", "far")

# Every row is also a flag. `paper` is the authors' configuration; # DIFFERS marks where
# `laptop` departs from it for another reason than its size. The README and the notebook
# in results/ have what each departure buys.
SETTINGS = {
    # name                 paper     laptop    values, meaning
    "task":                 ("addition", "addition", tuple(data.TASKS), "to learn"),
    "train_digits":         (20,       20,       COUNT, "longest operand in training"),
    "second_digits":        (0,        0,        WHOLE,
                             "longest second one, also in the test; 0: as the first"),
    # the model: looped.ModelConfig says more
    "layers":               (8,        1,        COUNT, "inside of one recurrence"),
    "recurrences":          (2,        2,        COUNT, "how often the layers run"),
    "width":                (1024,     64,       COUNT, "of the state"),
    "heads":                (16,       2,        COUNT, "of attention"),
    "ffn_width":            (1024,     128,      COUNT, "of the feed-forward network"),
    "input_injection":      ("recurrence", "recurrence", CHOICES["input_injection"],
                             "add the input before each recurrence, layer, or never"),
    # DIFFERS: pre-norm, a table that starts as sines, segments, "=" with a position.
    "norm":                 ("post",   "pre",    CHOICES["norm"],
                             "LayerNorm after or before each part of a layer"),
    "ffn":                  ("glu",    "glu",    CHOICES["ffn"],
                             "feed-forward network, and head, of each paper"),
    "init":                 ("xavier", "sines",  CHOICES["init"], "initial weights"),
    "embeddings":           ("abacus", "abacus+segment", str,
                             "joined by '+': " + ", ".join(looped.EMBEDDINGS)),
    "equals_position":      ("no",     "units",  CHOICES["equals_position"],
                             "of '=': none, or right before the units, for abacus and "
                             "digit_rotary"),
    "rotary_base":          (10000.0,  500.0,    POSITIVE, "of rotation and sines"),
    "max_offset":           (100,      100,      WHOLE, "largest random offset"),
    # DIFFERS: the rows at both ends of a table are trained least; with the offset 0
    # "=" would stand at the very first, where a model may be wrong.
    "test_offset":          (0,        5,        WHOLE, "offset in the test"),
    "max_positions":        (512,      512,      COUNT, "rows of the position tables"),
    # DIFFERS: no noise, which is one thing less to understand; not measured apart.
    "state_noise":          (0.02,     0.0,      evaluate.number(float, 0, 1e9),
                             "in the state before the first recurrence"),
    # the data
    # DIFFERS: several problems in one context, at disjoint offsets: "far pairs".
    "problems_per_context": (1,        3,        COUNT, "problems in a row"),
    "offsets":              ("batch",  "disjoint", OFFSETS,
                             "one draw for a microbatch; or for each context, no "
                             "position in two of its problems; or the same for all"),
    # DIFFERS: data.random_digits and data._enrich say what the next four do, and why.
    "zeros":                (False,    True,     bool, "operands may be 0"),
    "long_carries":         (0.0,      0.0,      SHARE,
                             "share of sums with long carry chains"),
    "long_borrows":         (0.0,      0.0,      SHARE,
                             "share of differences with long borrow chains"),
    "negatives":            (0.0,      0.0,      SHARE,
                             "share of differences with a raised second operand"),
    # PAPER: (the second one) 80% in mixed models that start from a model of sums.
    "minus":                (0.0,      0.0,      SHARE,
                             "share of differences in both or mix; 0: the task's own"),
    "close_numbers":        (0.0,      0.0,      SHARE,
                             "share of lists whose numbers share digits"),
    "letters":              (101,      101,      evaluate.number(int, 1, 101),
                             "on the circle that names the numbers of a list"),
    "letter_gaps":          (0.0,      0.0,      SHARE,
                             "share of lists whose names leave out letters"),
    "shared_second":        (False,    False,    bool,
                             "the problems of a context have one second factor"),
    # DIFFERS: what makes differences and products learnable; the README has both texts.
    "complement":           (False,    False,    bool,
                             "write differences in ten's complement"),
    "partial_products":     (False,    False,    bool,
                             "write a product's partial ones before it"),
    "index_hints":          (False,    False,    bool, "a letter for each place"),
    "spaces":               (0.0,      0.0,      SHARE,
                             "chance of a space before each token of the question"),
    # PAPER: Figure 16: a loss on the question too makes everything worse.
    "question_loss":        (False,    False,    bool, "learn its tokens as well"),
    # the schedule
    "init_from":            ("",       "",       str,
                             "start from the weights of this run"),
    "transfer":             ("all",    "all",    ("all", "authors"),
                             "all its weights, or those that the authors copy"),
    "steps":                (15000,    3000,     COUNT, "updates of the weights"),
    # DIFFERS: a small model learns more from many small steps: a constant, small batch,
    # a high rate, little warm-up, and a long decay.
    "batch_size":           (8192,     32,       COUNT, "contexts a step, at the end"),
    "first_batch_size":     (512,      0,        WHOLE, "at first; 0: no growth"),
    # PAPER (as run): 256 for the plain standard model, whose batch also begins there.
    "microbatch_size":      (512,      32,       COUNT, "contexts in one forward pass"),
    "learning_rate":        (1e-4,     4e-3,     POSITIVE, "top of its trapezoid"),
    "warmup":               (0.1,      0.03,     SHARE,
                             "share of the time in which the rate rises"),
    "decay":                (0.1,      0.7,      SHARE,
                             "share of the time in which it falls"),
    "decay_shape":          ("linear", "linear", ("linear", "cosine"), "of the fall"),
    "weight_decay":         (0.01,     0.01,     SHARE, "of matrices and scalars"),
    "grad_clip":            (0.5,      1.0,      POSITIVE, "norm of the gradient"),
    # DIFFERS: the full depth alone; see looped.progressive_loss.
    "alpha":                (1.0,      0.0,      SHARE,
                             "weight of the random pass in the progressive loss"),
    # the machine; where no precision is named, the hardware decides
    "precision":            ("",       "",       ("", *CHOICES["precision"]),
                             "of matrix products; default: the hardware's best"),
    # On a CPU, compiling takes about as long as this short run could save: not there.
    "compile":              (True,     False,    bool, "torch.compile the layers"),
    # the test at the end
    "eval_digits":          (160,      100,      COUNT, "largest operand in the test"),
    "eval_every":           (1,        20,       COUNT,
                             "past train_digits test only multiples of this, and the "
                             "largest"),
    "eval_samples":         (100,      20,       COUNT, "problems in each cell"),
}

# The rotation instead of the table: the digit position turns queries and keys, so that
# what is learned for one place holds for all. Six problems to a context make 15 pairs
# instead of 3, which meet more of the distances at which a far digit may look near.
FAR = {"embeddings": "digit_rotary+segment", "init": "torch", "max_offset": 10000,
       "problems_per_context": 6, "batch_size": 16, "microbatch_size": 16,
       "long_carries": 0.3, "steps": 8000, "eval_digits": 1000, "eval_every": 50}

# The second paper (arXiv 2402.02619), appendix: its models and their recipe. Two values
# are for `paper` and for `laptop`, which has a sixtieth of the parameters.
SECOND_PAPER = {
    "train_digits": 6, "eval_digits": 6, "eval_every": 1,
    "layers": 2, "recurrences": 1, "heads": (3, 4), "width": (510, 64),
    "ffn_width": (2040, 256), "ffn": "relu", "norm": "pre", "input_injection": "none",
    "init": "xavier", "embeddings": "learned", "equals_position": "no",
    "max_positions": 128, "test_offset": 0, "state_noise": 0.0, "alpha": 0.0,
    "problems_per_context": 1, "offsets": "batch", "long_carries": 0.4,
    "negatives": (0.4, 0.0), "long_borrows": (0.0, 0.4),
    "steps": (30000, 6000), "batch_size": (64, 128), "first_batch_size": 0,
    "microbatch_size": (64, 128), "learning_rate": (8e-5, 4e-3), "warmup": (0.2, 0.1),
    "decay": (0.8, 0.9), "decay_shape": "cosine", "weight_decay": 0.1, "grad_clip": 1.0,
    "eval_samples": (1000000, 200000)}

# Other tasks: what differs from addition.
TASK_SETTINGS = {
    "add": SECOND_PAPER | {"eval_samples": 1000000},
    "sub": SECOND_PAPER,
    # DIFFERS: the authors' mixed models have a fourth head of 170, so that the heads
    # are wider than the state of 510; here they share it, so that `paper` has three.
    "mix": SECOND_PAPER | {"layers": (3, 2)},
    # DIFFERS: the authors average the loss over all positions, and train FIRE at 6e-5.
    # `laptop`: every digit of a product needs every digit of both factors, which is
    # easier where a digit's place is known, and other problems are not in the way.
    "multiplication": {"train_digits": (15, 3), "eval_digits": (25, 6), "eval_every": 1,
                       "layers": (4, 1), "recurrences": 4, "steps": (120000, 5000),
                       "first_batch_size": (4096, 0), "problems_per_context": 1,
                       "max_offset": (100, 0), "test_offset": 0,
                       "batch_size": (8192, 96), "microbatch_size": (512, 96)},
    # DIFFERS: not in the paper: by one digit, with as many in the first factor as sums.
    "short_multiplication": {"second_digits": 1, "shared_second": (False, True),
                             "recurrences": (2, 4)},
    # PAPER: an hour's recipe, and so a 24th of the steps.
    "or": {"eval_digits": (40, 100), "steps": (625, 3000)},
    "sorting": {"train_digits": (10, 4), "eval_digits": (30, 8), "eval_every": 1,
                "layers": (8, 4), "recurrences": 1, "heads": (16, 4),
                "embeddings": "abacus+fire", "input_injection": "none",
                "first_batch_size": (32, 0), "microbatch_size": (32, 48),
                "batch_size": (8192, 96), "problems_per_context": 1,
                # DIFFERS: to compare numbers, the rows of a table need an order, and
                # each has to be seen often: few offsets, and numbers that share digits.
                # So does each letter: twelve, with gaps. Of other lists in its context
                # a model learns that what is far off is not its own.
                "max_offset": (100, 16), "close_numbers": (0.0, 0.5),
                "letters": (101, 12), "letter_gaps": (0.0, 0.5), "steps": 15000},
}


def preset(name: str, task: str = "addition") -> dict:
    """The settings of a preset for a task; what the task does not know is off."""
    column, own = int(name != "paper"), TASK_SETTINGS.get(task, {})
    if name == "far" and own.keys() & {"embeddings", "max_offset"}:
        raise ValueError(f"--preset far does not fit --task {task}, whose positions "
                         f"are its own: use --preset laptop")
    values = {key: row[column] for key, row in SETTINGS.items()}
    values |= FAR if name == "far" else {}
    values |= {key: value[column] if isinstance(value, tuple) else value
               for key, value in own.items()}
    values |= {key: off for key, off in data.ENRICHMENTS.items()
               if key not in data.TASKS[task].enrichments}
    return values | {"task": task, "preset": name, "seed": 0}


def model_config(settings: dict) -> looped.ModelConfig:
    """The settings that describe the model, and the vocabulary."""
    names = {f.name for f in fields(looped.ModelConfig)} & settings.keys()
    vocab_size = data.vocabulary_size(settings["task"], **data.text_settings(settings))
    return looped.ModelConfig(
        vocab_size=vocab_size, digit_tokens=tuple(data.DIGITS), pad_token=data.PAD,
        equals_token=data.EQUALS, end_token=data.END,
        **{name: settings[name] for name in names})


def check(settings: dict) -> None:
    """ValueError, in one line, for settings that do not fit each other."""
    task, digits = data.TASKS[settings["task"]], settings["train_digits"]
    tested, written = settings["eval_digits"], data.text_settings(settings)
    if settings["second_digits"] > digits:
        raise ValueError(f"--second-digits {settings['second_digits']} is more than "
                         f"--train-digits {digits}: let the first operand be longer")
    if task.fixed_width and settings["second_digits"]:
        raise ValueError(f"--second-digits {settings['second_digits']} does not fit "
                         f"--task {settings['task']}, whose operands are equally long: "
                         f"leave it out")
    if task.fixed_width and digits != tested:
        raise ValueError(f"--eval-digits {tested} does not fit --train-digits {digits}:"
                         f" a fixed width has one length, name both")
    for name, off in data.ENRICHMENTS.items():
        if settings[name] != off and name not in task.enrichments:
            known = [other for other in data.TASKS
                     if name in data.TASKS[other].enrichments]
            raise ValueError(f"{flag(name)} does not fit --task {settings['task']}: it "
                             f"is for {', '.join(known)}")
    kinds = set(settings["embeddings"].split("+"))
    if settings["spaces"] and "segment" in kinds:
        raise ValueError("--spaces does not fit --embeddings segment, which counts "
                         "what stands between digits")
    hidden = sorted({"abacus", "digit_rotary", "segment"} & kinds)
    if settings["index_hints"] and (hidden or settings["task"] == "sorting"):
        other = f"--embeddings {hidden[0]}" if hidden else "--task sorting"
        raise ValueError(f"--index-hints does not fit {other}: hints stand between the "
                         f"digits of a number")
    numbers = 2 * evaluate.longest(settings, digits)[1] + 1      # in a long product
    if (settings["partial_products"] and "segment" in kinds
            and numbers > abacus.MOST_NUMBERS):
        raise ValueError(f"--train-digits {digits} does not fit --partial-products, "
                         f"which takes {numbers} numbers: segment knows "
                         f"{abacus.MOST_NUMBERS}; use --second-digits 7 or fewer")
    if settings["transfer"] != "all" and not settings["init_from"]:
        raise ValueError(f"--transfer {settings['transfer']} chooses from the weights "
                         f"of another run: it needs --init-from")
    if settings["first_batch_size"] > settings["batch_size"]:
        raise ValueError(f"--first-batch-size {settings['first_batch_size']} is larger "
                         f"than --batch-size {settings['batch_size']}: the batch grows")
    for name in ("batch_size", "first_batch_size"):
        if settings[name] % min(settings["microbatch_size"], settings["batch_size"]):
            raise ValueError(f"{flag(name)} {settings[name]} is not a multiple of "
                             f"--microbatch-size {settings['microbatch_size']}")
    config = model_config(settings)                # raises for the model's settings
    sizes = evaluate.longest(settings, digits)
    config.check_reach(task.places(*sizes) + settings["max_offset"],
                       settings["problems_per_context"] * data.line_tokens(
                           settings["task"], *sizes, **written), "training")
    sizes = evaluate.longest(settings, tested)
    config.check_reach(task.places(*sizes) + settings["test_offset"], data.line_tokens(
        settings["task"], *sizes, **written), f"--eval-digits {tested}")
    sample_offsets(settings, 1, torch.Generator())     # raises when they do not fit


def flag(name: str) -> str:
    """train_digits -> --train-digits"""
    return "--" + name.replace("_", "-")


# --------------------------------------------------------------------------------------
# 2. One step: the schedule, the batch, the update
# --------------------------------------------------------------------------------------

RAMP = 0.6      # PAPER: the batch grows during the first 60% of the time


def schedule(settings: dict, step: int) -> tuple[int, float]:
    """Batch size and learning rate of a step, counted from 0.

    # PAPER: appendix, "Implementation details": the rate is a trapezoid over the time
    # of the run, and the batch grows linearly with time.
    # DIFFERS: the authors read the time off the wall clock, so that no run can be
    # repeated. A step takes time in proportion to its batch, so the same curve can be
    # written in steps: linear growth in time is exponential growth in steps.
    """
    large = settings["batch_size"]
    small = settings["first_batch_size"] or large
    done = (step + 0.5) / settings["steps"]                        # share of the steps
    batch, spent = large, done                                     # share of the time
    if small < large:
        steps_in_ramp = RAMP * math.log(large / small) / (large - small)
        share = steps_in_ramp / (steps_in_ramp + (1 - RAMP) / large)
        if done < share:
            batch = small * (large / small) ** (done / share)
            spent = RAMP * (batch - small) / (large - small)
        else:
            spent = RAMP + (1 - RAMP) * (done - share) / (1 - share)
    micro = min(settings["microbatch_size"], large)
    batch = round(batch / micro) * micro                           # whole microbatches
    rise = min(1.0, spent / max(settings["warmup"], 1e-9))
    fall = min(1.0, (1 - spent) / max(settings["decay"], 1e-9))
    if settings["decay_shape"] == "cosine":                     # PAPER: the second one
        fall = (1 - math.cos(math.pi * fall)) / 2
    return batch, settings["learning_rate"] * min(rise, fall)


def sample_offsets(settings: dict, contexts: int, generator: torch.Generator) -> Tensor:
    """The random offset of each problem in each context, (contexts, problems).

    # PAPER (as run): one draw for the whole microbatch, "batch".
    # DIFFERS: one for each problem, and no position is used by two problems of a
    # context; abacus.disjoint_offsets says why. "same" is the counter-example: as many
    # problems, but no far pairs.
    """
    kind, problems = settings["offsets"], settings["problems_per_context"]
    places = data.TASKS[settings["task"]].places(
        *evaluate.longest(settings, settings["train_digits"]))
    offsets = abacus.disjoint_offsets(
        1 if kind == "batch" else contexts, 1 if kind == "same" else problems,
        places, settings["max_offset"], generator)
    return offsets.expand(contexts, problems)


@dataclass
class Run:
    """All that training changes. What is not in here cannot matter after --resume."""

    settings: dict
    device: torch.device
    model: looped.LoopedTransformer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler         # scales the loss in float16, idle otherwise
    generator: torch.Generator           # of data, offsets and the progressive loss
    step: int = 0                        # updates made so far
    seconds: float = 0.0                 # spent on them
    log: list = field(default_factory=list)                 # the lines of log.jsonl


def new_run(settings: dict, device: torch.device) -> Run:
    """A fresh model and optimiser, a function of the arguments and their seed."""
    torch.manual_seed(settings["seed"])
    model = looped.LoopedTransformer(model_config(settings)).to(device)
    # PAPER (as run): vectors do not decay; matrices do, and so do FIRE's scalars.
    groups = [{"params": [w for w in model.parameters() if (w.ndim != 1) == decays],
               "weight_decay": settings["weight_decay"] * decays}
              for decays in (True, False)]
    eps = 1e-12 if settings["ffn"] == "glu" else 1e-8              # PAPER: one of each
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=eps,
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type,
                                  enabled=settings["precision"] == "float16")
    generator = torch.Generator().manual_seed(settings["seed"])
    return Run(settings, device, model, optimizer, scaler, generator)


def sample(run: Run, batch_size: int):
    """The next batch of the run, in microbatches: see data.sample_microbatches."""
    settings = run.settings
    known = data.TASKS[settings["task"]].enrichments
    for tokens, is_answer in data.sample_microbatches(
            settings["task"], batch_size, settings["microbatch_size"],
            settings["train_digits"], run.generator, run.device,
            settings["problems_per_context"], settings["second_digits"],
            **{name: settings[name] for name in known if settings[name]}
            | data.text_settings(settings)):
        yield tokens, tokens != data.PAD if settings["question_loss"] else is_answer


def train_step(run: Run) -> tuple[Tensor, Tensor]:
    """One update from one batch; nothing in it waits for the device.

    Returns the mean loss of the answer tokens and the number of real tokens, both as
    tensors on the device.
    """
    settings, model = run.settings, run.model
    batch_size, rate = schedule(settings, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    microbatches = list(sample(run, batch_size))
    # DIFFERS: the loss is the mean over the answer tokens of the whole batch, so each
    # microbatch divides its sum by their common number; the authors take the mean of
    # the means, in which a token counts for more in a microbatch of short answers.
    answer_tokens = sum(is_answer[:, 1:].sum() for _, is_answer in microbatches)
    total = torch.zeros((), device=run.device)
    for tokens, is_answer in microbatches:
        offsets = sample_offsets(settings, len(tokens), run.generator)
        offsets = offsets.to(run.device, non_blocking=True)
        problem = data.count_before(data.END, tokens).clamp(max=offsets.shape[1] - 1)
        with looped.autocast(model):
            loss = looped.progressive_loss(model, tokens, is_answer, settings["alpha"],
                                           run.generator, offsets.gather(1, problem),
                                           answer_tokens)
        run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings["grad_clip"])
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return total, sum((tokens != data.PAD).sum() for tokens, _ in microbatches)


# --------------------------------------------------------------------------------------
# 3. The loop
# --------------------------------------------------------------------------------------


def train(run: Run, folder: Path, stop: list) -> None:
    """Train to the last step, with a line and a checkpoint at a steady rhythm.

    Raises SystemExit, with one line of advice, on Ctrl-C and on a non-finite loss.
    """
    steps = run.settings["steps"]
    rhythm = math.ceil(steps / 40)
    losses, real_tokens = [], torch.zeros((), device=run.device)
    clock = time.perf_counter()
    while run.step < steps:
        loss, tokens = train_step(run)
        losses.append(loss)
        real_tokens += tokens
        if run.step % rhythm and run.step < steps and not stop:
            continue
        # A loss that was not finite leaves no finite weight: the gradient is clipped.
        if not all(part.isfinite().all() for part in (loss, *run.model.parameters())):
            raise SystemExit(
                f"train.py: the loss or a weight is not finite at step {run.step}. "
                f"Stopped; what {folder} holds is from before. Start again with a "
                f"lower --learning-rate than {run.settings['learning_rate']:g}")
        seconds = time.perf_counter() - clock
        run.seconds += seconds
        line = {"step": run.step, "loss": float(torch.stack(losses).mean()),
                "tokens_per_second": float(real_tokens) / seconds,
                "seconds": run.seconds, "exact_match": probe(run)}
        run.log.append(line)
        # The log first: --resume writes it anew, but cannot add a line. The terminal
        # last: whatever happens to it, the step is saved.
        evaluate.write_whole(folder / "log.jsonl", "".join(
            json.dumps(each) + "\n" for each in run.log))
        save(run, folder / "checkpoint.pt")
        shares = "  ".join(f"{digits} digits {share:.2f}"
                           for digits, share in line["exact_match"].items())
        contexts = [schedule(run.settings, step)[0] for step in range(steps)]
        remaining = sum(contexts[run.step:]) / sum(contexts[:run.step]) * run.seconds
        evaluate.say(f"step {run.step:>6}/{steps}  loss {line['loss']:7.4f}  {shares}  "
                     f"{line['tokens_per_second']:>9,.0f} tokens/s  elapsed "
                     f"{clock_time(run.seconds)}  remaining {clock_time(remaining)}")
        if stop:
            raise SystemExit(
                f"\nStopped and saved at step {run.step}. Go on with\n    python "
                f"train.py --resume --out {shlex.quote(str(folder))}")
        losses, real_tokens = [], torch.zeros_like(real_tokens)
        clock = time.perf_counter()


@contextlib.contextmanager
def stop_signals():
    """Yields a list that holds something once Ctrl-C, a scheduler's SIGTERM or a closed
    terminal asked to stop: the loop does so after its step. A second one stops at
    once."""
    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    asked = []
    before = {getattr(signal, name): signal.signal(getattr(signal, name), ask)
              for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def probe(run: Run) -> dict[int, float]:
    """Exact match at 1, 2 and 3 times the training length, on 32 problems each."""
    digits = [times * run.settings["train_digits"] for times in (1, 2, 3)]
    reach = [n for n in digits if n <= run.settings["eval_digits"]]
    run.model.eval()
    shares = evaluate.exact_match(
        run.model, run.settings["task"], [evaluate.longest(run.settings, n)
                                          for n in reach], samples=32, seed=1,
        **data.text_settings(run.settings))
    run.model.train()
    return dict(zip(reach, shares))


def clock_time(seconds: float) -> timedelta:
    """Prints as 0:01:15 for 75 seconds."""
    return timedelta(seconds=round(seconds))


# --------------------------------------------------------------------------------------
# 4. Save, resume, start from another run
# --------------------------------------------------------------------------------------


def save(run: Run, path: Path) -> None:
    """Write the checkpoint, whole or not at all."""
    cuda = run.device.type == "cuda"
    content = {
        "config": asdict(run.model.config), "settings": run.settings, "log": run.log,
        "step": run.step, "seconds": run.seconds, "threads": torch.get_num_threads(),
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "generator": run.generator.get_state(),
        "torch_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(run.device) if cuda else None}
    # Through memory, so that a full disk is an OSError like that of any other file.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    evaluate.write_whole(path, buffer.getvalue())


def restore(path: Path, device: torch.device) -> Run:
    """The run of a checkpoint, as if it had never stopped. ValueError if unreadable."""
    checkpoint = looped.read_checkpoint(path)
    try:
        settings = checkpoint["settings"]
        if lacking := sorted(SETTINGS.keys() - settings.keys()):
            raise ValueError(f"without the setting {lacking[0]}")
        check(settings)
        run = new_run(settings, device)
        run.model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.generator.set_state(checkpoint["generator"])
        run.step, run.seconds, run.log = (
            checkpoint[name] for name in ("step", "seconds", "log"))
        torch.set_rng_state(checkpoint["torch_generator"])
        if device.type == "cuda" and checkpoint["cuda_generator"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_generator"], device)
        if checkpoint["threads"] != torch.get_num_threads():
            evaluate.say(f"note: {checkpoint['threads']} threads before, now "
                         f"{torch.get_num_threads()}: the last bits may differ")
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint to resume from "
                         f"({str(error).splitlines()[0]})") from None
    return run


def copy_weights(model: looped.LoopedTransformer, source: str,
                 transfer: str = "all") -> list[str]:
    """Start from the weights of another run; the names of what was copied.

    Source: arXiv 2402.02619, "parameter transfer". The new model may have more layers:
    what is new keeps its random start.
    # DIFFERS: the authors leave the attention's output matrices out, as does transfer
    "authors". These are part of what the heads learned: by default all is copied.

    Raises:  ValueError when the shapes do not fit
    """
    old = {name: weight for name, weight in looped.load(source).state_dict().items()
           if transfer == "all" or not name.endswith("attention.out.weight")}
    try:
        found = model.load_state_dict(old, strict=False)
    except RuntimeError:
        raise ValueError(f"--init-from {source}: its weights have other shapes: train "
                         f"both with the same --width, --heads, --ffn-width and "
                         f"--max-positions, and tokens of one --task") from None
    return sorted(old.keys() - set(found.unexpected_keys))


def prepare_folder(folder: Path, run: Run, overwrite: bool, argv: list[str]) -> None:
    """Make the run's folder and write config.json. ValueError when it is in the way."""
    results = [folder / "accuracy.json", folder / "accuracy.svg"]
    if run.step:
        return evaluate.check_targets(results)
    if folder.is_file():
        raise ValueError(f"--out {folder} is a file: name a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        resume = (folder / "checkpoint.pt").is_file()
        raise ValueError(f"{folder} exists: {'--resume goes on with it, ' * resume}"
                         f"--overwrite starts anew in it, another --out avoids it")
    folder.mkdir(parents=True, exist_ok=True)
    evaluate.check_targets(results)
    for file in (*(folder / name for name in evaluate.RUN_FILES), *results):
        file.unlink(missing_ok=True)
    commit = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent).stdout.strip()
    facts = {"settings": run.settings, "model": asdict(run.model.config),
             "argv": argv, "commit": commit, "torch": torch.__version__,
             "device": looped.device_name(run.device),
             "python": platform.python_version(),
             "precision": run.settings["precision"]}
    evaluate.write_whole(folder / "config.json", json.dumps(facts, indent=1) + "\n")


# --------------------------------------------------------------------------------------
# 5. Speed
# --------------------------------------------------------------------------------------


def seconds_each(work, calls: int = 20) -> float:
    """The mean time of a call of work(), after one to warm up. A GPU is waited for at
    the end alone, as in training: meanwhile the host prepares the next calls."""
    for count in (1, calls):
        started = time.perf_counter()
        for _ in range(count):
            result = work()
        float(result.sum())                                                # waits
    return (time.perf_counter() - started) / calls


def benchmark(run: Run) -> str:
    """Time updates at the final batch size; says what the time is made of."""
    run.settings |= {"first_batch_size": 0, "steps": 10**9}
    with FlopCounterMode(display=False) as counter:
        for _ in range(8):                    # several, for the depth may be random
            train_step(run)
    operations = counter.get_total_flops() / 8
    compiled = looped.compile_layers(run.model) if run.settings["compile"] else ""
    step = seconds_each(lambda: train_step(run)[0])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    size = 8192 if run.device.type == "cuda" else 1024
    x = torch.randn(size, size, device=run.device,
                    dtype=getattr(torch, run.settings["precision"]))
    rate = 2 * size**3 / seconds_each(lambda: x @ x)
    problems = run.settings["batch_size"] * run.settings["problems_per_context"]
    return (f"{compiled}\n" * bool(compiled)
            + f"  milliseconds a step  {step * 1e3:.1f}\n"
              f"  problems/s           {problems / step:,.0f}\n" +
              f"  peak memory          {memory / 2**30:.2f} GiB\n" * bool(memory) +
              f"  operations           {operations / step / 1e12:.3g} TFLOP/s, "
              f"{operations / step / rate:.1%} of the {rate / 1e12:.3g} TFLOP/s "
              f"measured for a large matrix")


# --------------------------------------------------------------------------------------
# 6. The command
# --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """A flag for each row of SETTINGS, and those that say what to do."""
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False,
        usage="python train.py [flags]; --help lists them",
        description="Train a looped transformer on arithmetic, then test how far "
                    "beyond the training lengths it works.")
    parser.add_argument("--preset", choices=PRESETS,
                        help="default: paper with CUDA, laptop without")
    parser.add_argument("--seed", type=WHOLE, help="of everything random (default 0)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best here)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="run folder (default: a new one in runs/)")
    choose = parser.add_mutually_exclusive_group()
    choose.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, or with the newest one")
    choose.add_argument("--overwrite", action="store_true",
                        help="start anew in a run folder that exists")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure the speed of training, and stop")
    rows = parser.add_argument_group(
        "settings", "in brackets: paper | laptop, both for addition; FAR and "
        "TASK_SETTINGS in train.py say what the preset far and other tasks change")
    for name, (paper, laptop, kind, meaning) in SETTINGS.items():
        how = {"choices": kind} if isinstance(kind, tuple) else {"type": kind}
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        rows.add_argument(flag(name), help=f"{meaning} ({paper} | {laptop})", **how)
    return parser


def new_settings(args: argparse.Namespace, device: torch.device) -> dict:
    """The settings of a new run: the preset's, and what the flags say otherwise.

    Raises ValueError, in one line, for a flag that cannot be followed.
    """
    settings = preset(args.preset or ("paper" if device.type == "cuda" else "laptop"),
                      args.task or "addition") | given(args)
    settings["precision"] = settings["precision"] or looped.default_precision(device)
    check(settings)
    return settings


def given(args: argparse.Namespace) -> dict:
    """The settings that the flags name."""
    return {name: getattr(args, name) for name in (*SETTINGS, "seed", "preset")
            if getattr(args, name) is not None}


def open_run(args: argparse.Namespace) -> tuple[Run, Path]:
    """The run that the flags ask for, and its folder.

    Raises ValueError, in one line, for every flag that cannot be followed.
    """
    device = looped.choose_device(args.device)
    if args.resume:
        folder = args.out or evaluate.newest_run()
        run = restore(folder / "checkpoint.pt", device)
        for name, value in given(args).items():
            if value != run.settings[name]:
                raise ValueError(
                    f"{flag(name)} {value} does not fit {folder}, which has "
                    f"{run.settings[name]!r}: leave the flag out, or start a new run "
                    f"from its weights with --init-from {folder}")
        return run, folder
    settings = new_settings(args, device)
    run = new_run(settings, device)
    if settings["init_from"]:
        copied = copy_weights(run.model, settings["init_from"], settings["transfer"])
        evaluate.say(f"{len(copied)} of {len(run.model.state_dict())} weights copied")
    name = f"{settings['preset']}-{settings['task']}"
    free = (Path("runs") / f"{name}{'-' * (n > 1)}{n if n > 1 else ''}"
            for n in itertools.count(1))
    return run, args.out or next(path for path in free if not path.exists())


def introduction(run: Run) -> str:
    """What a user wants to know before the first step."""
    settings, usual = run.settings, preset(run.settings["preset"], run.settings["task"])
    changed = [f"{key} {settings[key]}" for key in SETTINGS
               if settings[key] != usual[key] and key != "precision"]
    return (f"preset {settings['preset']}, {settings['task']} of at most "
            f"{settings['train_digits']} digits: {settings['layers']} layers x "
            f"{settings['recurrences']} recurrences, "
            f"{looped.parameter_count(run.model.config):,} parameters\n"
            f"on {looped.device_name(run.device)}, torch {torch.__version__}, "
            f"{settings['precision']}\nchanged: {', '.join(changed) or 'nothing'}")


def main(argv: list[str] | None = None) -> None:
    """Train, resume or benchmark, as the flags say (sys.argv when left out)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    with evaluate.one_line_errors(parser, "--microbatch-size, --width or --layers"):
        run, folder = open_run(args)
        evaluate.say(introduction(run))
        if args.benchmark:
            return evaluate.say(benchmark(run))
        prepare_folder(folder, run, args.overwrite, sys.argv if argv is None else argv)
        evaluate.say(f"into: {folder}" + f", from step {run.step}" * bool(run.step))
        if run.settings["compile"]:
            evaluate.say(looped.compile_layers(run.model))
        with stop_signals() as stop:
            train(run, folder, stop)
        evaluate.say(f"trained in {clock_time(run.seconds)} and saved; the test:")
        evaluate.main([str(folder), "--device", str(run.device),
                       "--json", str(folder / "accuracy.json"),
                       "--svg", str(folder / "accuracy.svg")])
        question = evaluate.example_question(run.settings)
        evaluate.say(f"next: python evaluate.py {shlex.quote(str(folder))}"
                     + (f' --ask "{question}"' if question else ""))


if __name__ == "__main__":
    main()
