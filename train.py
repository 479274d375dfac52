"""How it learns: the presets, one loop, and checkpoints that survive anything.

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
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from unittest import mock

# Apple's GPU lacks a kernel now and then; torch then uses the CPU for it, if asked
# before it is imported.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import abacus
import data
import evaluate
import looped

# --------------------------------------------------------------------------------------
# 1. Presets: a row of values each, side by side
# --------------------------------------------------------------------------------------

PRESETS = ("paper", "fast", "laptop")

# Every row is also a flag. The column `paper` is the authors' configuration; # DIFFERS
# marks where `fast` and `laptop` depart from it for another reason than their size.
# `fast` is `laptop` with a longer reach, compiled, and with the paper's whole test; it
# was chosen for addition, other tasks may want a wider model. A width of 256 reached
# less far: 61% at 150 to 1,000 digits, after 1,500 steps at half the rate, one seed.
SETTINGS = {
    # name                  paper         fast            laptop          meaning
    # what is learned
    "task":                 ("addition",  "addition",     "addition",
                             "what to learn, one of " + ", ".join(data.TASKS)),
    "train_digits":         (20,          20,             20,
                             "operands have 1 to this many digits, lists as many "
                             "numbers"),
    # the model: looped.ModelConfig says more
    "layers":               (8,           1,              1,
                             "layers inside one recurrence"),
    "recurrences":          (2,           3,              3,
                             "how often the layers run"),
    "width":                (1024,        64,             64,
                             "of the state"),
    "heads":                (16,          2,              2,
                             "of attention"),
    "ffn_width":            (1024,        128,            128,
                             "of each half of the gated feed-forward network"),
    "input_injection":      ("recurrence", "recurrence",  "recurrence",
                             "add the input before: none, recurrence or layer"),
    # DIFFERS: the median and the worst seed reach farther with it, see the README.
    "norm":                 ("post",      "pre",          "pre",
                             "LayerNorm after (post) or before (pre) each part"),
    "ffn":                  ("glu",       "glu",          "glu",
                             "feed-forward network: glu, or the second paper's relu"),
    "head":                 ("glu",       "glu",          "glu",
                             "before the decoder: glu or none"),
    # DIFFERS: carries come sooner from torch's own initial weights, see the README.
    "init":                 ("xavier",    "torch",        "torch",
                             "initial weights: xavier, as the paper's, or torch's own"),
    # DIFFERS: the digit index turns queries and keys instead of choosing a learned row.
    "embeddings":           ("abacus", "digit_rotary+segment", "digit_rotary+segment",
                             "join with '+' any of " + ", ".join(looped.EMBEDDINGS)),
    # DIFFERS: the next three serve far pairs: LoopedTransformer.angles says how.
    "rotary_base":          (10000.0,     500.0,          500.0,
                             "base of the rotary frequencies"),
    "equals_position":      ("no",        "query",        "query",
                             "give '=' the position below the units: no, as query, or "
                             "as query and key (both)"),
    "max_offset":           (100,         10000,          2000,
                             "largest random offset of the digit positions"),
    "max_positions":        (1024,        1024,           1024,
                             "rows of the position tables"),
    # DIFFERS: evaluation from zeros instead of noise repeats to the last bit.
    "state_noise":          (0.02,        0.0,            0.0,
                             "noise in the state before the first recurrence"),
    # the data
    # DIFFERS: several problems in one context, at disjoint offsets: "far pairs". The
    # other ways of drawing offsets, and distractors, are there to test why that works.
    "problems_per_context": (1,           3,              3,
                             "problems in a row"),
    "offsets":              ("batch",     "disjoint",     "disjoint",
                             "drawn per microbatch (batch) or per context: disjoint, "
                             "adjacent or the same for its problems"),
    "distractors":          (False,       False,          False,
                             "all problems of a context but the last become random "
                             "digits: on or off"),
    # DIFFERS: uniform digits hardly ever make long chains of carries.
    "long_carries":         (0.0,         0.3,            0.3,
                             "share of sums with long chains of carries"),
    "long_borrows":         (0.0,         0.0,            0.0,
                             "share of differences with long chains of borrows"),
    "negatives":            (0.0,         0.0,            0.0,
                             "share of differences with digits of the second operand "
                             "raised"),
    "index_hints":          (False,       False,          False,
                             "a letter before each digit tells its place: on or off"),
    "spaces":               (0.0,         0.0,            0.0,
                             "chance of a space before each token of a question"),
    "question_loss":        (False,       False,          False,
                             "learn to predict the question as well: on or off"),
    # the schedule
    "init_from":            ("",          "",             "",
                             "start from the weights of this run"),
    "steps":                (15000,       2000,           2000,
                             "updates of the weights"),
    # DIFFERS: a small model learns more from many small steps: a constant, small batch,
    # a high rate, little warm-up, and a long decay.
    "batch_size":           (8192,        32,             32,
                             "contexts a step, once the batch has grown"),
    "first_batch_size":     (512,         0,              0,
                             "contexts in the first step; 0: the batch does not grow"),
    "microbatch_size":      (512,         32,             32,
                             "contexts that pass through the model at once"),
    "learning_rate":        (1e-4,        4e-3,           4e-3,
                             "at the flat top of the trapezoid"),
    "warmup":               (0.1,         0.03,           0.03,
                             "share of the time in which the rate rises"),
    "decay":                (0.1,         0.3,            0.3,
                             "share of the time in which it falls to zero"),
    "decay_shape":          ("linear",    "linear",       "linear",
                             "how it falls: linear or cosine"),
    "beta2":                (0.98,        0.98,           0.98,
                             "AdamW's second beta; the first is 0.9"),
    "adam_eps":             (1e-12,       1e-12,          1e-12,
                             "AdamW's epsilon"),
    "weight_decay":         (0.01,        0.01,           0.01,
                             "of matrices; vectors have none"),
    "grad_clip":            (0.5,         1.0,            1.0,
                             "largest norm of the gradient"),
    # DIFFERS: the full depth alone; see looped.progressive_loss.
    "alpha":                (1.0,         0.0,            0.0,
                             "weight of the random pass in the progressive loss"),
    # On a CPU, compiling takes about as long as this short run could save: not there.
    "compile":              (True,        True,           False,
                             "torch.compile the layers: on or off"),
    # the test at the end
    "eval_digits":          (160,         160,            1000,
                             "largest operand tested; past 100 equal lengths only"),
    "eval_every":           (1,           1,              50,
                             "test all lengths up to train_digits, then multiples"),
    "eval_samples":         (100,         100,            20,
                             "problems in each cell of the test"),
}

# The paper's data, embedding, offsets and initial weights in the laptop's model: two
# minutes on a CPU show most of its comparisons.
SMALL = {"train_digits": 10, "init": "xavier", "embeddings": "abacus",
         "equals_position": "no", "problems_per_context": 1, "offsets": "batch",
         "long_carries": 0.0, "max_offset": 25, "batch_size": 96, "microbatch_size": 96,
         "steps": 1500, "eval_digits": 30, "eval_every": 5}

# The second paper (arXiv 2402.02619), appendix: its models and their recipe. `fast` has
# a larger batch and a higher rate, `laptop` a sixtieth of the parameters.
SECOND_PAPER = {
    "train_digits": (6, 6, 6), "eval_digits": (6, 6, 6), "eval_every": (1, 1, 1),
    "eval_samples": (1000000, 1000000, 1000000),
    "layers": (2, 2, 2), "recurrences": (1, 1, 1), "heads": (3, 3, 4),
    "width": (510, 510, 64), "ffn_width": (2040, 2040, 256), "ffn": ("relu",) * 3,
    "head": ("none",) * 3, "norm": ("pre",) * 3, "input_injection": ("none",) * 3,
    "init": ("xavier",) * 3, "embeddings": ("learned",) * 3,
    "equals_position": ("no",) * 3,
    "max_positions": (128, 128, 128),
    "problems_per_context": (1, 1, 1), "alpha": (0.0, 0.0, 0.0),
    "state_noise": (0.0, 0.0, 0.0), "long_carries": (0.4, 0.4, 0.4),
    "steps": (30000, 20000, 6000), "batch_size": (64, 512, 128),
    "first_batch_size": (0, 0, 0), "microbatch_size": (64, 512, 128),
    "learning_rate": (8e-5, 3e-4, 4e-3), "warmup": (0.2, 0.2, 0.1),
    "decay": (0.8, 0.8, 0.9), "decay_shape": ("cosine",) * 3,
    "weight_decay": (0.1, 0.1, 0.1), "adam_eps": (1e-8, 1e-8, 1e-8),
    "grad_clip": (1.0, 1.0, 1.0)}

# Other tasks: what differs from addition, in the same columns.
TASK_SETTINGS = {
    "add": SECOND_PAPER,
    # PAPER: its differences are enriched with negative ones, and not with borrows.
    "sub": SECOND_PAPER | {"eval_samples": (1000000, 1000000, 200000),
                           "long_carries": (0.0, 0.0, 0.0),
                           "negatives": (0.4, 0.4, 0.0),
                           "long_borrows": (0.0, 0.0, 0.4)},
    # DIFFERS: the authors' mixed models have a fourth head of 170, so that the heads
    # are wider than the state of 510; here they share the state, and there are three.
    "mix": SECOND_PAPER | {"eval_samples": (1000000, 1000000, 200000),
                           "layers": (3, 3, 2), "negatives": (0.4, 0.4, 0.0),
                           "long_borrows": (0.0, 0.0, 0.4)},
    "multiplication": {"train_digits": (15, 15, 4), "eval_digits": (25, 25, 6),
                       "eval_every": (1, 1, 1), "layers": (4, 4, 1),
                       "recurrences": (4, 4, 4), "steps": (120000, 40000, 4000),
                       "long_carries": (0.0, 0.0, 0.0)},
    "subtraction": {"long_carries": (0.0, 0.0, 0.0), "long_borrows": (0.0, 0.3, 0.3)},
    "both": {"long_borrows": (0.0, 0.3, 0.3)},
    "or": {"eval_digits": (100, 100, 100), "long_carries": (0.0, 0.0, 0.0)},
    "sorting": {"train_digits": (10, 10, 4), "eval_digits": (30, 30, 8),
                "eval_every": (1, 1, 1), "layers": (8, 8, 2), "recurrences": (1, 1, 2),
                "input_injection": ("none", "none", "recurrence"),
                "embeddings": ("abacus+fire",) * 3, "max_offset": (100, 100, 25),
                "long_carries": (0.0, 0.0, 0.0)},
}

# What a user is told before the first step. Measured; the README has the table.
EXPECTED = {
    "paper": "the paper reports 99.1% on 21 to 100 digits, after a day on an RTX "
             "A4000; not measured here yet",
    "fast": "100% exact match up to 100 digits, 98% or more in the mean of 150 to "
            "1,000, as on a CPU; its time on a GPU is not measured yet",
    "laptop": "100% exact match up to 100 digits, 93% or more in the mean of 150 to "
              "1,000; about 2 minutes on two CPU cores",
    "small": "see the README's table; about 2 minutes on a CPU core",
}


def preset(name: str, task: str = "addition") -> dict:
    """The values of one column of SETTINGS, and of TASK_SETTINGS for another task."""
    column = PRESETS.index("laptop" if name == "small" else name)
    values = {key: row[column] for key, row in SETTINGS.items()}
    values |= SMALL if name == "small" else {}
    values |= {key: row[column] for key, row in TASK_SETTINGS.get(task, {}).items()}
    return values | {"task": task}


def model_config(settings: dict) -> looped.ModelConfig:
    """The settings that describe the model, and the vocabulary."""
    names = {f.name for f in fields(looped.ModelConfig)} & settings.keys()
    return looped.ModelConfig(vocab_size=data.vocabulary_size(settings["task"],
                                                              **text(settings)),
                              digit_tokens=tuple(data.DIGITS),
                              **{name: settings[name] for name in names})


def text(settings: dict) -> dict:
    """The settings of training problems that test problems share."""
    return {name: settings[name] for name in evaluate.TEXT}


def check(settings: dict) -> None:
    """ValueError, in one line, for a setting that cannot work."""
    tiny = 1e-30                                                  # stands for "above 0"
    limits = dict.fromkeys(("train_digits", "steps", "batch_size", "microbatch_size",
                            "problems_per_context", "eval_digits", "eval_every",
                            "eval_samples", "rotary_base"), (1, 1e9))
    limits |= dict.fromkeys(("first_batch_size", "max_offset", "seed"), (0, 2**31))
    limits |= dict.fromkeys(("weight_decay", "state_noise"), (0, 1e9))
    limits |= dict.fromkeys(("learning_rate", "adam_eps", "grad_clip"), (tiny, 1e9))
    limits |= dict.fromkeys(("warmup", "decay", "alpha", "spaces", *data.ENRICHMENTS),
                            (0, 1))
    limits["beta2"] = (0, 0.9999999)
    for name, (low, high) in limits.items():
        if not low <= settings[name] <= high:
            raise ValueError(f"--{_flag(name)} is {settings[name]}, but must be from "
                             f"{low:g} to {high:g}")
    task = settings["task"]
    for name, symbol in data.ENRICHMENTS.items():
        if settings[name] and symbol not in data.TASKS[task].symbols:
            raise ValueError(f"--{_flag(name)} {settings[name]} does not fit --task "
                             f"{task}, which has none: say 0")
    hidden = {"abacus", "digit_rotary", "segment"} & set(
        settings["embeddings"].split("+"))
    if settings["index_hints"] and (hidden or task == "sorting"):
        what = f"--embeddings {min(hidden)}" if hidden else "--task sorting"
        raise ValueError(f"--index-hints does not fit {what}: hints stand between the "
                         f"digits of a number")
    for name, allowed in (("offsets", OFFSETS), ("decay_shape", ("linear", "cosine"))):
        if settings[name] not in allowed:
            raise ValueError(f"--{_flag(name)} {settings[name]!r}: choose one of "
                             f"{', '.join(allowed)}")
    if settings["first_batch_size"] > settings["batch_size"]:
        raise ValueError(f"--first-batch-size {settings['first_batch_size']} is larger "
                         f"than --batch-size {settings['batch_size']}: the batch grows")
    for name in ("batch_size", "first_batch_size"):
        if settings[name] % min(settings["microbatch_size"], settings["batch_size"]):
            raise ValueError(f"--{_flag(name)} {settings[name]} is not a multiple of "
                             f"--microbatch-size {settings['microbatch_size']}")
    config = model_config(settings)                # raises for the model's settings
    digits, tested = settings["train_digits"], settings["eval_digits"]
    places = data.TASKS[task].places
    config.check_reach(
        places(digits) + settings["max_offset"], settings["problems_per_context"]
        * evaluate.line_tokens(task, digits, **text(settings)), "training")
    config.check_reach(places(tested) + config.test_offset, evaluate.line_tokens(
        task, tested, **text(settings)), f"--eval-digits {tested}")
    sample_offsets(settings, 1, torch.Generator())     # raises when they do not fit


def _flag(name: str) -> str:
    return name.replace("_", "-")


# --------------------------------------------------------------------------------------
# 2. The schedule: how the rate and the batch move
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


OFFSETS = ("batch", "disjoint", "adjacent", "same")


def sample_offsets(settings: dict, contexts: int, generator: torch.Generator) -> Tensor:
    """The random offset of each problem in each context, (contexts, problems).

    # PAPER (as run): one draw for the whole microbatch, "batch".
    # DIFFERS: one for each problem, and no position is used by two problems of a
    # context; abacus.disjoint_offsets says why. "adjacent" and "same" are the counter-
    # examples: as many problems, but few far pairs, or none.
    """
    problems = settings["problems_per_context"]
    digits = data.TASKS[settings["task"]].places(settings["train_digits"])
    how, largest = settings["offsets"], settings["max_offset"]
    draw = partial(abacus.disjoint_offsets, digits=digits, generator=generator)
    offsets = draw(1 if how == "batch" else contexts, 1 if how == "same" else problems,
                   max_offset=largest)
    if how == "adjacent":                    # the same random order, without the gaps
        first = draw(contexts, 1, max_offset=largest - (problems - 1) * digits)
        offsets = first + digits * offsets.argsort(dim=1)
    return offsets.expand(contexts, problems)


# --------------------------------------------------------------------------------------
# 3. A run: everything that a step changes, and how it is saved
# --------------------------------------------------------------------------------------


@dataclass
class Run:
    """All that training changes. What is not in here cannot matter after --resume."""

    settings: dict
    device: torch.device
    precision: torch.dtype
    model: looped.LoopedTransformer
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler         # scales the loss in float16, idle otherwise
    generator: torch.Generator           # of data, offsets and the progressive loss
    step: int = 0                        # updates made so far
    seconds: float = 0.0                 # spent on them


def new_run(settings: dict, device: torch.device, precision: torch.dtype) -> Run:
    """A fresh model and optimiser, a function of the arguments and their seed."""
    torch.manual_seed(settings["seed"])
    model = looped.LoopedTransformer(model_config(settings)).to(device)
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": settings["weight_decay"]},
         {"params": vectors, "weight_decay": 0.0}],
        betas=(0.9, settings["beta2"]), eps=settings["adam_eps"],
        fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    generator = torch.Generator().manual_seed(settings["seed"])
    return Run(settings, device, precision, model, optimizer, scaler, generator)


def copy_weights(model: looped.LoopedTransformer, source: str) -> list[str]:
    """Start from the weights of another run; the names of what was copied.

    Source: arXiv 2402.02619, "parameter transfer". The new model may have more layers
    and know more tokens: what is new keeps its random start.
    # DIFFERS: the authors left the attention's output matrices out; these are part of
    what the heads learned, and are copied too.

    Raises:  ValueError when the shapes do not fit
    """
    old, new = looped.load(source).state_dict(), model.state_dict()
    for name in old.keys() & new.keys():
        if not old[name].ndim:                                       # FIRE's scalars
            new[name].copy_(old[name])
            continue
        rows = min(len(old[name]), len(new[name]))
        if old[name].shape[1:] != new[name].shape[1:] or (
                old[name].shape[:1] != new[name].shape[:1]
                and name not in ("tokens.weight", "decoder.weight")):
            raise ValueError(
                f"--init-from {source}: its {name} is {tuple(old[name].shape)}, ours "
                f"{tuple(new[name].shape)}: train both with the same --width, --heads, "
                f"--ffn-width and --max-positions")
        new[name][:rows] = old[name][:rows]
    return sorted(old.keys() & new.keys())


def sample(run: Run, batch_size: int):
    """The next batch of the run, in microbatches: see data.sample_microbatches."""
    settings, how = run.settings, text(run.settings)
    how |= {name: settings[name] for name in data.ENRICHMENTS if settings[name]}
    for tokens, is_answer in data.sample_microbatches(
            settings["task"], batch_size, settings["microbatch_size"],
            settings["train_digits"], run.generator, run.device,
            settings["problems_per_context"], settings["distractors"], **how):
        # PAPER: Figure 16: a loss on the question too makes everything worse.
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
    # The loss is the mean over the answer tokens of the whole batch, so each microbatch
    # divides its sum by their common number.
    answer_tokens = sum(is_answer.sum() for _, is_answer in microbatches)
    total = torch.zeros((), device=run.device)
    for tokens, is_answer in microbatches:
        offsets = sample_offsets(settings, len(tokens), run.generator)
        offsets = offsets.to(run.device, non_blocking=True)
        problem = data.problem_index(tokens).clamp(max=offsets.shape[1] - 1)
        with looped.autocast(run.device, run.precision):
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


def save(run: Run, path: Path) -> None:
    """Write the checkpoint, whole or not at all: to a temporary name, then moved."""
    content = {
        "config": asdict(run.model.config), "settings": run.settings,
        "precision": str(run.precision).removeprefix("torch."),
        "step": run.step, "seconds": run.seconds,
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "generator": run.generator.get_state(),
        "torch_generator": torch.get_rng_state(),
        "cuda_generators": torch.cuda.get_rng_state_all() if run.device.type == "cuda"
                           else []}
    partial = path.with_name(path.name + ".partial")
    torch.save(content, partial)
    partial.replace(path)


def restore(path: Path, device: torch.device) -> Run:
    """The run of a checkpoint, as if it had never stopped. ValueError if unreadable."""
    checkpoint = looped.read_checkpoint(path)
    if not SETTINGS.keys() <= checkpoint["settings"].keys():
        lacking = sorted(SETTINGS.keys() - checkpoint["settings"].keys())
        raise ValueError(f"{path}: from a version of train.py without {lacking[0]!r}: "
                         f"start a new run")
    try:
        run = new_run(checkpoint["settings"], device,
                      getattr(torch, checkpoint["precision"]))
        run.model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.generator.set_state(checkpoint["generator"])
        run.step, run.seconds = checkpoint["step"], checkpoint["seconds"]
        torch.set_rng_state(checkpoint["torch_generator"])
        if device.type == "cuda" and checkpoint["cuda_generators"]:
            torch.cuda.set_rng_state_all(checkpoint["cuda_generators"])
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint to resume from "
                         f"({str(error).splitlines()[0]})") from None
    return run


# --------------------------------------------------------------------------------------
# 4. The loop
# --------------------------------------------------------------------------------------


class StopSignal:
    """Ctrl-C asks the loop to stop after this step; a second one stops at once."""

    def __enter__(self):
        self.asked = False
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True
        signal.signal(signal.SIGINT, self.before)

    def __exit__(self, *_):
        signal.signal(signal.SIGINT, self.before)


def train(run: Run, folder: Path, stop: StopSignal) -> None:
    """Train to the last step, with a line and a checkpoint at a steady rhythm.

    Raises SystemExit, with one line of advice, on Ctrl-C and on a non-finite loss.
    """
    steps = run.settings["steps"]
    rhythm = max(1, steps // 40)
    losses, real_tokens = [], torch.zeros((), device=run.device)
    first_bad = torch.full((), math.inf, device=run.device)
    clock = time.perf_counter()
    while run.step < steps:
        loss, tokens = train_step(run)
        losses.append(loss)
        real_tokens += tokens
        # The comparison stays on the device, and is looked at with the next line.
        bad = torch.where(loss.isfinite(), math.inf, float(run.step))
        first_bad = torch.minimum(first_bad, bad)
        if run.step % rhythm and run.step < steps and not stop.asked:
            continue
        stop_if_not_finite(run, first_bad, folder)
        seconds = time.perf_counter() - clock
        run.seconds += seconds
        line = {"step": run.step, "loss": float(torch.stack(losses).mean()),
                "tokens_per_second": float(real_tokens) / seconds,
                "seconds": run.seconds}
        line["exact_match"] = probe(run)
        shares = "  ".join(f"{digits} digits {share:.2f}"
                           for digits, share in line["exact_match"].items())
        remaining = run.seconds / run.step * (steps - run.step)
        print(f"step {run.step:>6}/{steps}  loss {line['loss']:7.4f}  {shares}  "
              f"{line['tokens_per_second']:>9,.0f} tokens/s  "
              f"elapsed {clock_time(run.seconds)}  remaining {clock_time(remaining)}",
              flush=True)
        # The log first: --resume drops lines past the checkpoint, but cannot add any.
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
        save(run, folder / "checkpoint.pt")
        if stop.asked and run.step < steps:
            raise SystemExit(f"\nStopped and saved at step {run.step}. Go on with\n"
                             f"    {resume_command(folder)}")
        losses, real_tokens = [], torch.zeros_like(real_tokens)
        clock = time.perf_counter()


def stop_if_not_finite(run: Run, first_bad: Tensor, folder: Path) -> None:
    """SystemExit if a loss or a weight is not finite, before it can be saved."""
    if first_bad.isfinite():
        fault = f"loss is not finite at step {int(first_bad)}"
    elif not all(weight.isfinite().all() for weight in run.model.parameters()):
        fault = f"weights are not finite at step {run.step}"
    else:
        return
    kept = folder / "checkpoint.pt"
    saved = f"{kept} is from before" if kept.exists() else "nothing was saved"
    raise SystemExit(f"train.py: the {fault}. Stopped; {saved}. Start again with a "
                     f"lower --learning-rate than {run.settings['learning_rate']:g}")


def resume_command(folder: Path | None) -> str:
    """What to type to go on with a run."""
    out = f" --out {shlex.quote(str(folder))}" if folder else ""
    return "python train.py --resume" + out


def probe(run: Run) -> dict[int, float]:
    """Exact match at 1, 2 and 3 times the training length, on 32 problems each."""
    digits = [times * run.settings["train_digits"] for times in (1, 2, 3)]
    reach = [n for n in digits if n <= run.settings["eval_digits"]]
    run.model.eval()
    shares = evaluate.exact_match(run.model, run.settings["task"],
                                  [(n, n) for n in reach], samples=32, seed=1,
                                  **text(run.settings))
    run.model.train()
    return dict(zip(reach, shares))


def clock_time(seconds: float) -> str:
    """75 -> "1:15"; 4000 -> "1:06:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --------------------------------------------------------------------------------------
# 5. Speed
# --------------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> str:
    """The most memory that was in use: of the GPU, or of this process."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB"
    try:
        import resource                                            # not on Windows
    except ImportError:
        return "unknown on this system"
    unit = 1 if sys.platform == "darwin" else 1024                 # bytes in ru_maxrss
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{used / 2**30:.2f} GiB"


def median_seconds(work, device: torch.device, calls: int = 4) -> float:
    """Seconds that one call of work() takes: the median of 5 blocks of calls, after one
    to warm up.

    As in training, the device is waited for between blocks alone, so that the host can
    prepare a call while the device is still busy with the one before.
    """
    times = []
    for _ in range(6):
        _wait_for(device)
        started = time.perf_counter()
        for _ in range(calls):
            work()
        _wait_for(device)
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times[1:])


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def benchmark(run: Run) -> None:
    """Time updates at the final batch size; print what the time is made of."""
    device = run.device
    run.settings |= {"first_batch_size": 0, "steps": 10**9}
    # torch counts the operations of updates as they run. Padding is work too, but not
    # useful work: the share of real tokens is taken off below.
    with FlopCounterMode(display=False) as counter:
        for _ in range(8):                    # several, for the depth may be random
            train_step(run)
    operations = counter.get_total_flops() / 8
    batches = [list(sample(run, run.settings["batch_size"])) for _ in range(20)]
    lines = [tokens for batch in batches for tokens, _ in batch]
    real = sum(int((tokens != data.PAD).sum()) for tokens in lines) / len(batches)
    padded = sum(tokens.numel() for tokens in lines) / len(batches)
    compiled = (looped.compile_layers(run.model) if run.settings["compile"]
                else "not compiled")
    if device.type == "cuda":
        # The steps that were counted above were not compiled.
        torch.cuda.reset_peak_memory_stats(device)
    step = median_seconds(lambda: train_step(run), device)
    memory = peak_memory(device)
    drawing = median_seconds(
        lambda: list(sample(run, run.settings["batch_size"])), device)
    size = 8192 if device.type == "cuda" else 1024
    x = torch.randn(size, size, device=device, dtype=run.precision)
    matmul = 2 * size**3 / median_seconds(lambda: x @ x, device)
    problems = run.settings["batch_size"] * run.settings["problems_per_context"]
    figures = {
        "layers": compiled,
        "problems/s": f"{problems / step:,.0f}",
        "real tokens/s": f"{real / step:,.0f}",
        "share of real tokens": f"{real / padded:.1%}",
        "milliseconds a step": f"{step * 1e3:.1f}, {drawing / step:.1%} of it for data",
        "peak memory": memory,
        "useful operations": f"{operations * real / padded / step / 1e12:.3g} TFLOP/s, "
                             f"{operations * real / padded / step / matmul:.1%} of the "
                             f"{matmul / 1e12:.3g} TFLOP/s measured for a large matrix"}
    if device.type == "cpu":
        # The same model written without a thought for the CPU.
        plain_run = new_run(run.settings, device, torch.float32)
        as_drawn = mock.patch.object(data, "deal", lambda task, n, _: n.transpose(0, 1))
        fused = mock.patch.object(looped, "attend", F.scaled_dot_product_attention)
        with as_drawn, fused:
            plain = median_seconds(lambda: train_step(plain_run), device)
        figures["against a plain step"] = (
            f"{plain / step:.1f} x as fast; plain is float32, fused attention, "
            f"problems as drawn")
    for name, value in figures.items():
        print(f"  {name:<21} {value}")


# --------------------------------------------------------------------------------------
# 6. The command
# --------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """A flag for each row of SETTINGS, and those that say what to do."""
    parser = argparse.ArgumentParser(
        usage="python train.py [flags]; --help lists them",
        description="Train a looped transformer on arithmetic, then test how far "
                    "beyond the training lengths it works.")
    parser.add_argument("--preset", choices=(*PRESETS, "small"),
                        help="default: paper with CUDA, laptop without")
    parser.add_argument("--seed", type=int, help="of everything random (default 0)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best here)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="run folder (default: a new one in runs/)")
    parser.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, or with the newest one")
    parser.add_argument("--overwrite", action="store_true",
                        help="start anew in a run folder that exists")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure the speed of training, and stop")
    rows = parser.add_argument_group(
        "settings", "the default is the preset's: " + " | ".join(PRESETS))
    for name, (*values, meaning) in SETTINGS.items():
        shown = " | ".join(str(value) for value in values)
        kind = _on_or_off if isinstance(values[0], bool) else type(values[0])
        rows.add_argument("--" + _flag(name), type=kind, help=f"{meaning} ({shown})",
                          metavar=kind.__name__.strip("_").upper())
    return parser


def _on_or_off(text: str) -> bool:
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"{text!r}: say on or off")
    return text == "on"


def new_settings(args: argparse.Namespace, default_preset: str) -> dict:
    """The settings of a new run: the preset's, and what the flags say otherwise.

    Raises ValueError, in one line, for a flag that cannot be followed.
    """
    given = _given(args)
    name, task = given.get("preset", default_preset), given.get("task", "addition")
    if task not in data.TASKS:
        raise ValueError(f"--task {task!r}: choose one of {', '.join(data.TASKS)}")
    settings = {**preset(name, task), "seed": 0, **given, "preset": name}
    check(settings)
    return settings


def _given(args: argparse.Namespace) -> dict:
    return {name: getattr(args, name) for name in (*SETTINGS, "seed", "preset")
            if getattr(args, name) is not None}


def open_run(args: argparse.Namespace) -> tuple[Run, Path, str]:
    """The run that the flags ask for, its folder, and why this preset.

    Raises ValueError, in one line, for every flag that cannot be followed.
    """
    device = looped.choose_device(args.device)
    if args.resume and args.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite starts it anew: "
                         "choose one")
    if args.resume:
        folder = args.out or evaluate.newest_run()
        run = restore(folder / "checkpoint.pt", device)
        for name, value in _given(args).items():
            if value != run.settings[name]:
                raise ValueError(f"--{_flag(name)} {value} does not fit {folder}, "
                                 f"which has {run.settings[name]}: leave the flag out")
        return run, folder, f"resumed at step {run.step}"
    with_cuda = device.type == "cuda"
    settings = new_settings(args, "paper" if with_cuda else "laptop")
    why = "as asked" if args.preset else (
        f"the default {'with' if with_cuda else 'without'} CUDA")
    run = new_run(settings, device, looped.fastest_precision(device))
    if settings["init_from"]:
        copied = copy_weights(run.model, settings["init_from"])
        why += f", {len(copied)} of {len(run.model.state_dict())} weights copied"
    name = f"{settings['preset']}-{settings['task']}"
    return run, args.out or _free_folder(name), why


def _free_folder(name: str) -> Path:
    names = itertools.chain([name], (f"{name}-{n}" for n in itertools.count(2)))
    return next(Path("runs") / name for name in names
                if not (Path("runs") / name).exists())


def _logged_step(line: str) -> float:
    """The step of a line of log.jsonl; infinite for a line that a kill cut short."""
    try:
        return json.loads(line)["step"]
    except (ValueError, TypeError, KeyError):
        return math.inf


def prepare_folder(folder: Path, run: Run, overwrite: bool, argv: list[str]) -> None:
    """Make the run's folder and write config.json. ValueError when it is in the way."""
    if run.step:
        # Lines of the log past the checkpoint belong to steps that will be run again.
        log = folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        kept = [line for line in lines if _logged_step(line) <= run.step]
        return evaluate.write_whole(log, "".join(line + "\n" for line in kept))
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not overwrite:
        resume = (folder / "checkpoint.pt").is_file()
        raise ValueError(f"{folder} exists: {'--resume goes on with it, ' * resume}"
                         f"--overwrite starts anew in it, another --out avoids it")
    if folder.is_file():
        raise ValueError(f"--out {folder} is a file: name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("log.jsonl", "checkpoint.pt", "accuracy.json", "accuracy.svg"):
        (folder / name).unlink(missing_ok=True)
    commit = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent).stdout.strip()
    facts = {"settings": run.settings, "model": asdict(run.model.config),
             "argv": argv, "commit": commit, "torch": torch.__version__,
             "device": looped.device_name(run.device),
             "python": platform.python_version(),
             "precision": str(run.precision).removeprefix("torch.")}
    evaluate.write_whole(folder / "config.json", json.dumps(facts, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Train, resume or benchmark, as the flags say (sys.argv when left out)."""
    parser = build_parser()
    args = parser.parse_args(argv)
    folder = args.out
    try:
        run, folder, why = open_run(args)
        settings, name = run.settings, run.settings["preset"]
        count = sum(weight.numel() for weight in run.model.parameters())
        fixed = data.TASKS[settings["task"]].fixed_width
        print(f"preset {name} ({why}): {settings['task']} of {'' if fixed else '1 to '}"
              f"{settings['train_digits']} digits, {settings['layers']} layers x "
              f"{settings['recurrences']} recurrences, {count:,} parameters\n"
              f"on {looped.device_name(run.device)}, torch {torch.__version__}, "
              f"{str(run.precision).removeprefix('torch.')}")
        if args.benchmark:
            return benchmark(run)
        prepare_folder(folder, run, args.overwrite, sys.argv if argv is None else argv)
        if settings["compile"]:
            print(looped.compile_layers(run.model))
        usual = preset(name, settings["task"])
        changed = [key for key in SETTINGS if settings[key] != usual[key]]
        print("expect: " + (
            "not known with " + ", ".join(f"{key} {settings[key]}" for key in changed)
            if changed else EXPECTED[name] if settings["task"] == "addition"
            else "see the README's table"))
        print(f"into:   {folder}/")
        with StopSignal() as stop:
            train(run, folder, stop)
        print(f"trained in {clock_time(run.seconds)}; the test:")
        evaluate.main([str(folder), "--device", str(run.device),
                       "--json", str(folder / "accuracy.json"),
                       "--svg", str(folder / "accuracy.svg")])
        print(f"saved: {folder}/ with "
              + ", ".join(sorted(file.name for file in folder.iterdir())))
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: {error}\n")
    except RuntimeError as error:
        if not looped.is_out_of_memory(error):
            raise
        parser.exit(1, "train.py: out of memory: use a smaller --microbatch-size, "
                       "--width or --layers\n")
    except KeyboardInterrupt:
        raise SystemExit(f"\nStopped. Go on from what was saved with\n"
                         f"    {resume_command(folder)}") from None
    longer = settings["train_digits"] * (1 if fixed else 3)
    symbol = next((symbol for symbol in data.TASKS[settings["task"]].symbols
                   if symbol in evaluate.SOLVE), None)
    question = f" --ask '{'7' * longer}{symbol}{'5' * longer}'" if symbol else ""
    print(f"next:  python evaluate.py {shlex.quote(str(folder))}{question}")


if __name__ == "__main__":
    main()
