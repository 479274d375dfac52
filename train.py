"""How it learns: the presets, one loop, and checkpoints that a run goes on from.

Read it beside the paper ("Transformers Can Do Arithmetic with the Right Embeddings",
arXiv 2405.17399), appendix "Implementation details". It needs torch, and data.py,
abacus.py, looped.py and evaluate.py beside it.

    python train.py                     laptop preset, with CUDA the paper preset
    python train.py --preset paper      the paper's model, data and recipe
    python train.py --task both --help  every flag, with what holds for that task
    python train.py --resume            go on with the newest run, or with --out's
    python train.py --benchmark         how fast, and what share of the machine's best

Every row of the presets and every option of a task has a flag of the same name:
--layers 16 --recurrences 1 --long-carries 0.3.

Glossary
    step          one update of the weights, from one batch
    batch         contexts of one step, cut into microbatches that fit the memory
    real tokens   all tokens but the padding
    run           a folder with config.json, log.jsonl, checkpoint.pt and, at the end,
                  accuracy.json and accuracy.svg

Not here: several GPUs, hyperparameter search. Sections 1 to 3 are how it learns; 4 to 6
are files, speed and flags: skip them at first.
"""

import argparse
import contextlib
import itertools
import json
import math
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

import looped        # before torch: its first lines say how torch is to be loaded

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import abacus
import data
import evaluate

# --------------------------------------------------------------------------------------
# 1. Presets
# --------------------------------------------------------------------------------------

# The paper's table, and ours beside it. `paper` is the authors' configuration; DIFFERS
# marks where `laptop` departs from it for another reason than its size. The README and
# the notebook in results/ say what most departures buy. "PAPER (as run)" is what the
# authors' code does where the text is silent or says otherwise.
SETTINGS = {
    # name                 paper     laptop    meaning
    "train_digits":         (20,       20,       "longest operand in training, digits"),
    # DIFFERS: several problems in one context, and no position in two of them, so that
    # there are "far pairs": see abacus.disjoint_offsets.
    "problems_per_context": (1,        3,        "problems in a row"),
    "offsets":              ("microbatch", "context", "draw random offsets once for "
                             "a whole microbatch, or for each context"),
    # DIFFERS: the test keeps away from both ends of the table. Its last rows are
    # trained least; of its first ones see the TRAP in abacus.Abacus.
    "max_offset":           (100,      110,      "largest random offset of positions"),
    "test_offset":          (0,        10,       "their offset in the test"),
    # the model: looped.ModelConfig says more
    "layers":               (8,        1,        "layers inside of one recurrence"),
    "recurrences":          (2,        2,        "how often the layers run"),
    "width":                (1024,     64,       "width of the state"),
    "heads":                (16,       2,        "heads of attention"),
    "ffn_width":            (1024,     128,      "width of the feed-forward network"),
    "input_injection":      ("recurrence", "recurrence",
                             "add the input before each recurrence, layer, or never"),
    # DIFFERS: pre-norm, a table that starts as sines, segments, "=" with a position.
    "norm":                 ("post",   "pre",    "LayerNorm after or before each part"),
    "init":                 ("xavier", "sines",  "initial weights"),
    "embeddings":           ("abacus", "abacus+segment",
                             "joined by '+': " + ", ".join(looped.EMBEDDINGS)),
    "equals_position":      ("no",     "units",  "of '=': none, or right before the "
                             "units, for abacus and digit_rotary"),
    "fixed_second":         (False,    False,    "no offset moves the second operand, "
                             "for abacus and digit_rotary"),
    "rotary_base":          (10000.0,  500.0,    "base of the frequencies, of RoPE and "
                             "of the sines"),
    "max_positions":        (512,      512,      "rows of the position tables"),
    # DIFFERS: no noise, which is one thing less to understand; not measured apart.
    "state_noise":          (0.02,     0.0,      "noise in the first state"),
    # These differ in the models of the second paper alone.
    "norm_eps":             (1e-12,    1e-12,    "epsilon of LayerNorm"),
    "ffn":                  ("glu",    "glu",    "kind of feed-forward network"),
    "embedding_norm":       (True,     True,     "a LayerNorm after the embedding"),
    "head":                 ("ffn",    "ffn",    "before the decoder: a feed-forward "
                             "network, LayerNorm and a matrix, or a LayerNorm alone"),
    # the loss
    # DIFFERS: the full depth alone; see looped.progressive_loss.
    "alpha":                (1.0,      0.0,
                             "weight of the random pass in the progressive loss"),
    "auxiliary_loss":       (0.0,      0.0,      "weight of an auxiliary loss on the "
                             "partial products of a product, and on their sums"),
    # PAPER: Figure 16: a loss on the question too makes everything worse.
    "question_loss":        (False,    False,    "learn the question's tokens as well"),
    # the schedule and the optimiser
    # PAPER: a time, and no number of steps. 15,000 is an estimate from the batch sizes.
    "steps":                (15000,    2500,     "updates of the weights"),
    # DIFFERS: a small model learns more from many small steps: a constant, small batch,
    # a high rate, little warm-up, and a long decay.
    "batch_size":           (8192,     32,       "contexts a step, at the end"),
    "first_batch_size":     (512,      0,        "at first, if the batch is to grow"),
    # PAPER (as run): 256 for the plain standard model, and for Abacus + FIRE and Abacus
    # + RoPE with injection; the batch begins there, too.
    "microbatch_size":      (512,      512,      "most contexts in one forward pass"),
    "learning_rate":        (1e-4,     4e-3,     "the highest learning rate"),
    "warmup":               (0.1,      0.03,     "share of the time in which it rises"),
    "decay":                (0.1,      0.7,      "share of the time in which it falls"),
    "decay_shape":          ("linear", "linear", "shape of its fall"),
    "weight_decay":         (0.01,     0.01,     "weight decay of matrices, scalars"),
    "adam_eps":             (1e-12,    1e-12,    "epsilon of AdamW"),
    "grad_clip":            (0.5,      1.0,      "norm of the gradient, at most"),
    # On a CPU, compiling takes about as long as this short run could save.
    "compile":              (True,     False,    "torch.compile the layers"),
    # the test at the end
    "eval_digits":          (160,      100,      "longest operand in the test, digits"),
    "eval_every":           (1,        20,       "past train_digits test multiples of "
                             "this alone, and the largest"),
    "eval_samples":         (100,      20,       "problems in each cell"),
}
PRESETS = ("paper", "laptop", "far")
CHOICES = looped.CHOICES | {"offsets": ("microbatch", "context"),
                            "decay_shape": ("linear", "cosine")}

# RoPE on digit positions instead of the table: the position of a digit turns queries
# and keys, so that what is learned for one place holds for all. Six problems to a
# context make 15 pairs instead of 3, which meet more of the distances at which a far
# digit may look near.
FAR = {"embeddings": "digit_rotary+segment", "init": "torch", "max_offset": 10000,
       "problems_per_context": 6, "batch_size": 16, "long_carries": 0.3, "steps": 8000,
       "eval_digits": 1000, "eval_every": 50}

# What other tasks change, and the options of all: a value for `paper` and one for
# `laptop` in brackets, or one for both.
# DIFFERS: the authors' operands are never 0; see data.random_digits.
ZEROS = {"zeros": (False, True)}

# The second paper (arXiv 2402.02619), appendix: its models and their recipe. `laptop`
# has a sixtieth of the parameters, and of a mixed model a hundredth.
# DIFFERS: the authors decay all parameters, train in float32 with a loss of float64,
# and take 15 to 85 thousand steps, by model.
SECOND_PAPER = {
    "train_digits": 6, "eval_digits": 6, "eval_every": 1,
    "eval_samples": (10**6, 200000),
    "layers": 2, "recurrences": 1, "heads": (3, 4), "width": (510, 64),
    "ffn_width": (2040, 256), "input_injection": "none", "norm": "pre",
    "norm_eps": 1e-5, "ffn": "relu", "embedding_norm": False, "head": "norm",
    "init": "xavier", "embeddings": "learned", "equals_position": "no",
    "max_positions": 128, "test_offset": 0, "state_noise": 0.0, "alpha": 0.0,
    "problems_per_context": 1, "offsets": "microbatch", "long_carries": 0.4,
    "negatives": (0.4, 0.0), "long_borrows": (0.0, 0.4),
    "steps": (30000, 6000), "batch_size": (64, 128), "first_batch_size": 0,
    "learning_rate": (8e-5, 4e-3), "warmup": (0.2, 0.1), "decay": (0.8, 0.9),
    "decay_shape": "cosine", "weight_decay": 0.1, "adam_eps": 1e-8,
    "grad_clip": (0.0, 1.0)}

TASK_SETTINGS = {
    # DIFFERS: without a few more long carries one seed of five, after 2,000 steps, has
    # 99.2% of the sums in which a carry runs through every column; with them all.
    "addition": ZEROS | {"long_carries": (0.0, 0.1)},
    # A difference asks for more than a sum, and takes more steps.
    "subtraction": ZEROS | {"steps": (15000, 3000)},
    "both": ZEROS | {"steps": (15000, 3000)},
    # DIFFERS: the authors average the loss over all positions, and train FIRE at 6e-5.
    # In `laptop` zeros pad all numbers to one width, each token has a learned place,
    # and a context has one problem: a digit of a product needs nearly all digits of
    # both factors, which is easier where the place of each is known, and other problems
    # are not in the way. It is the last digit of a sum of many products, which an
    # auxiliary loss asks for. The notebook says what the parts buy.
    "multiplication": ZEROS | {
        "train_digits": (15, 3), "eval_digits": (25, 3), "eval_every": 1,
        "eval_samples": (100, 1000), "padded_to": (0, 3), "longest": (0.0, 0.75),
        "auxiliary_loss": (0.0, 1.0),
        # PAPER: eight times the time of a model of sums; the steps are an estimate. (As
        # run: eight GPUs with 512 contexts each, where the batch begins.)
        "layers": 4, "recurrences": (4, 1), "heads": (16, 4),
        "input_injection": ("recurrence", "none"), "embeddings": ("abacus", "learned"),
        "equals_position": "no", "steps": (68000, 14000),
        "learning_rate": (1e-4, 2e-3),
        "batch_size": (8192, 128), "first_batch_size": (4096, 0),
        "problems_per_context": 1, "max_offset": (100, 0), "test_offset": 0},
    # DIFFERS: not in the paper: N digits times two. The model of products, with the
    # positions of sums, and a second factor that no offset moves.
    "nx2": ZEROS | {
        "layers": 4, "recurrences": (4, 1), "heads": (16, 4),
        "input_injection": ("recurrence", "none"), "auxiliary_loss": (0.0, 1.0),
        "fixed_second": (False, True),
        "steps": (68000, 12000), "learning_rate": (1e-4, 2e-3),
        "eval_samples": (100, 1000)},
    # PAPER: an hour's recipe, and so a 24th of the steps. (As run: this shape, and 16
    # layers that run once with injection, at a microbatch of 256.)
    "or": {"layers": 1, "recurrences": (16, 2), "eval_digits": (40, 100),
           "steps": (625, 3000)},
    "sorting": {
        "train_digits": (10, 4), "eval_digits": (30, 8), "eval_every": 1,
        "eval_samples": (100, 300),
        "layers": (8, 4), "recurrences": 1, "heads": (16, 4),
        "embeddings": "abacus+fire", "input_injection": "none",
        "batch_size": (8192, 96), "first_batch_size": (32, 0),
        # PAPER (as run): microbatches of 32, where the batch begins.
        "microbatch_size": (32, 48), "problems_per_context": 1, "steps": 15000,
        # DIFFERS: to compare numbers, the rows of a table need an order, and each has
        # to be seen often: few offsets, and numbers that share digits. So does each
        # letter: twelve, with gaps. Of other lists in its context a model learns that
        # what is far off is not its own.
        "max_offset": (100, 16), "test_offset": (0, 5), "close_numbers": (0.0, 0.5),
        "letters": (52, 12), "letter_gaps": (0.0, 0.5)},
    "add": SECOND_PAPER | {"eval_samples": 10**6},
    "sub": SECOND_PAPER,
    # DIFFERS: the authors' mixed models have a fourth head of 170, so that the heads
    # are wider than the state of 510; here they share it, so that `paper` has three.
    "mix": SECOND_PAPER | {"layers": (3, 2)},
}


def preset(name: str, task: str = "addition") -> dict:
    """The settings of a preset for a task; the options of the task are one of them."""
    own, column = TASK_SETTINGS.get(task, {}), int(name != "paper")
    if name == "far" and own.keys() & {"embeddings", "max_offset"}:
        raise ValueError(f"--preset far does not fit --task {task}, whose positions "
                         f"are its own: use --preset laptop")
    values = {key: row[column] for key, row in SETTINGS.items()}
    values |= {key: value[column] if isinstance(value, tuple) else value
               for key, value in own.items()}
    values |= FAR if name == "far" else {}
    options = {key: values.get(key, usual)
               for key, usual in data.TASKS[task].options.items()}
    return {key: values[key] for key in SETTINGS} | {
        "task": task, "options": options, "preset": name, "seed": 0, "init_from": "",
        "precision": "float32"}


def second_digits(settings: dict) -> int:
    """The most digits of a second operand in training."""
    return data.TASKS[settings["task"]].second_digits or settings["train_digits"]


def model_config(settings: dict) -> looped.ModelConfig:
    """The settings that describe the model, and the vocabulary."""
    names = {f.name for f in fields(looped.ModelConfig)} & settings.keys()
    rows = data.row_count(second_digits(settings)) if settings["auxiliary_loss"] else 0
    return looped.ModelConfig(
        auxiliary_digits=rows,
        vocab_size=data.vocabulary_size(settings["task"], **settings["options"]),
        digit_tokens=tuple(data.DIGITS), equals_token=data.EQUALS, end_token=data.END,
        **{name: settings[name] for name in names})


# --------------------------------------------------------------------------------------
# 2. One step: the schedule, the batch, the update
# --------------------------------------------------------------------------------------

RAMP = 0.6      # PAPER: the batch grows during the first 60% of the time


def batch_and_time(settings: dict, step: float) -> tuple[int, float]:
    """The batch size after so many steps, and the share of the run's time that they
    take."""
    large = settings["batch_size"]
    small = settings["first_batch_size"] or large
    done = step / settings["steps"]                                # share of the steps
    if small >= large:
        return large, done
    # A step takes time in proportion to its batch, so that there are 1 / batch steps in
    # a unit of time. In the ramp the batch grows linearly with time: this is the
    # integral. After it there are (1 - RAMP) / large. So this share of the steps:
    in_ramp = RAMP * math.log(large / small) / (large - small)
    share = in_ramp / (in_ramp + (1 - RAMP) / large)
    if done >= share:
        return large, RAMP + (1 - RAMP) * (done - share) / (1 - share)
    batch = small * (large / small) ** (done / share)
    micro = min(settings["microbatch_size"], small)                # whole microbatches
    return (min(large, round(batch / micro) * micro),
            RAMP * (batch - small) / (large - small))


def schedule(settings: dict, step: int) -> tuple[int, float]:
    """Batch size and learning rate of a step, counted from 0.

    # PAPER: appendix, "Implementation details": the rate is a trapezoid over the time
    # of the run, and the batch grows linearly with time.
    # DIFFERS: the authors read the time off the wall clock, so that no run can be
    # repeated. A step takes time in proportion to its batch, so the same curve can be
    # written in steps: linear growth in time is exponential growth in steps.
    """
    batch, spent = batch_and_time(settings, step + 0.5)
    rise = min(1.0, spent / max(settings["warmup"], 1e-9))
    fall = min(1.0, (1 - spent) / max(settings["decay"], 1e-9))
    if settings["decay_shape"] == "cosine":                     # PAPER: the second one
        fall = (1 - math.cos(math.pi * fall)) / 2
    return batch, settings["learning_rate"] * min(rise, fall)


def sample_offsets(settings: dict, contexts: int, generator: torch.Generator) -> Tensor:
    """The random offset of each problem in each context, (contexts, problems).

    No position is used by two problems of a context, but those of a fixed second
    factor; abacus.disjoint_offsets says why.
    # PAPER (as run): one draw for all contexts of a microbatch.
    # DIFFERS: `laptop` draws for each context.
    """
    digits, problems = settings["train_digits"], settings["problems_per_context"]
    offsets = abacus.disjoint_offsets(
        1 if settings["offsets"] == "microbatch" else contexts, problems,
        data.TASKS[settings["task"]].places(digits, second_digits(settings)),
        settings["max_offset"], generator)
    return offsets.expand(contexts, problems)


@dataclass
class Run:
    """What training changes, and what it goes by. Together with torch's own random
    state, which a checkpoint has as well, it is all that matters after --resume."""

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
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=settings["adam_eps"],
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type,
                                  enabled=settings["precision"] == "float16")
    generator = torch.Generator().manual_seed(settings["seed"])
    return Run(settings, device, model, optimizer, scaler, generator)


def sample(run: Run, batch_size: int):
    """The next batch of the run, in microbatches: tokens (B, T), and is_learned (B, T)
    bool, the tokens that the loss sees."""
    settings = run.settings
    for tokens, is_answer in data.sample_microbatches(
            settings["task"], batch_size, settings["microbatch_size"],
            settings["train_digits"], run.generator, run.device,
            settings["problems_per_context"], **settings["options"]):
        yield tokens, tokens != data.PAD if settings["question_loss"] else is_answer


def train_step(run: Run) -> tuple[Tensor, Tensor]:
    """One update from one batch; nothing in it waits for the device.

    Returns the mean loss of the tokens that are learned, the auxiliary one included,
    and the number of real tokens, both as tensors on the device.
    """
    settings, model = run.settings, run.model
    batch_size, rate = schedule(settings, run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    microbatches = list(sample(run, batch_size))
    # DIFFERS: the loss is the mean over the answer tokens of the whole batch, so each
    # microbatch divides its sum by their common number; the authors take the mean of
    # the means, in which a token counts for more in a microbatch of short answers.
    learned_count = sum(is_learned[:, 1:].sum() for _, is_learned in microbatches)
    total = torch.zeros((), device=run.device)
    for tokens, is_learned in microbatches:
        offsets = sample_offsets(settings, len(tokens), run.generator)
        offsets = offsets.to(run.device, non_blocking=True)
        problem = data.count_before(data.END, tokens).clamp(max=offsets.shape[1] - 1)
        # DIFFERS: of a product more is asked than its digits; see data.school_rows.
        auxiliary = data.school_rows(
            tokens, settings["train_digits"], second_digits(settings),
            settings["problems_per_context"]) if settings["auxiliary_loss"] else None
        with looped.autocast(model):
            loss = looped.progressive_loss(
                model, tokens, is_learned, settings["alpha"], run.generator,
                offsets.gather(1, problem), learned_count, auxiliary,
                settings["auxiliary_loss"])
        run.scaler.scale(loss).backward()
        total += loss.detach()
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(),
                                   settings["grad_clip"] or math.inf)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    return total, sum((tokens != data.PAD).sum() for tokens, _ in microbatches)


# --------------------------------------------------------------------------------------
# 3. The loop
# --------------------------------------------------------------------------------------


def train(run: Run, folder: Path, stop: list) -> None:
    """Train to the last step, or until `stop` holds something; with a line in the log
    and a checkpoint at a steady rhythm.

    Raises SystemExit, with one line of advice, when it was asked to stop, and on a loss
    that is not finite.
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
        mean_loss = torch.stack(losses).mean()
        if not all(part.isfinite().all()
                   for part in (mean_loss, *run.model.parameters())):
            raise SystemExit(
                f"train.py: the loss or a weight is not finite at step {run.step}. "
                f"Stopped; what {folder} holds is from before. Start again with a "
                f"lower --learning-rate than {run.settings['learning_rate']:g}")
        seconds = time.perf_counter() - clock
        run.seconds += seconds
        line = {"step": run.step, "loss": float(mean_loss),
                "tokens_per_second": float(real_tokens) / seconds,
                "seconds": run.seconds, "exact_match": probe(run)}
        run.log.append(line)
        # The log first: --resume writes it anew, but cannot add a line. The terminal
        # last: whatever happens to it, the step is saved.
        looped.write_whole(folder / "log.jsonl", "".join(
            json.dumps(each) + "\n" for each in run.log))
        save(run, folder / "checkpoint.pt")
        shares = "  ".join(f"{digits} digits {share:.2f}"
                           for digits, share in line["exact_match"].items())
        spent = batch_and_time(run.settings, run.step)[1]
        print(f"step {run.step:>6}/{steps}  loss {line['loss']:7.4f}  {shares}  "
              f"{line['tokens_per_second']:>9,.0f} tokens/s  elapsed "
              f"{clock_time(run.seconds)}  remaining "
              f"{clock_time(run.seconds / spent * (1 - spent))}", flush=True)
        if stop:
            raise SystemExit(
                f"\nStopped and saved at step {run.step}. Go on with\n    python "
                f"train.py --resume --out {shlex.quote(str(folder))}")
        losses, real_tokens = [], torch.zeros_like(real_tokens)
        clock = time.perf_counter()


@contextlib.contextmanager
def stop_signals():
    """Yields a list that holds something once Ctrl-C or a scheduler's SIGTERM asked to
    stop: the loop does so after its step. A second one stops at once."""
    def ask(number, _):
        asked.append(number)
        signal.signal(number, before[number])

    asked = []
    before = {number: signal.signal(number, ask)
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def probe(run: Run) -> dict[int, float]:
    """Exact match at 1, 2 and 3 times the training length, on 32 problems each."""
    settings = run.settings
    digits = [times * settings["train_digits"] for times in (1, 2, 3)]
    reach = [n for n in digits if n <= settings["eval_digits"]]
    run.model.eval()
    shares = evaluate.exact_match(
        run.model, settings["task"], [(n, n) for n in reach], samples=32, seed=1,
        **evaluate.text_options(settings))
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
    looped.write_whole(path, {
        "config": asdict(run.model.config), "settings": run.settings, "log": run.log,
        "step": run.step, "seconds": run.seconds,
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(), "generator": run.generator.get_state(),
        "torch_generator": torch.get_rng_state(),
        "cuda_generator": torch.cuda.get_rng_state(run.device) if cuda else None})


def restore(path: Path, device: torch.device) -> Run:
    """The run of a checkpoint, as if it had never stopped; to the last bit, where the
    machine and its number of threads are the same. ValueError if unreadable."""
    checkpoint = looped.read_checkpoint(path)
    try:
        if lacking := sorted(SETTINGS.keys() - checkpoint["settings"].keys()):
            raise ValueError(f"without the setting {lacking[0]}")
        run = new_run(checkpoint["settings"], device)
        run.model.load_state_dict(checkpoint["model"])
        run.optimizer.load_state_dict(checkpoint["optimizer"])
        run.scaler.load_state_dict(checkpoint["scaler"])
        run.generator.set_state(checkpoint["generator"])
        run.step, run.seconds, run.log = (
            checkpoint[name] for name in ("step", "seconds", "log"))
        torch.set_rng_state(checkpoint["torch_generator"])
        if device.type == "cuda" and checkpoint["cuda_generator"] is not None:
            torch.cuda.set_rng_state(checkpoint["cuda_generator"], device)
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: not a checkpoint that this version can resume from "
                         f"({type(error).__name__}: {str(error).splitlines()[0]})"
                         ) from None
    return run


def copy_weights(model: looped.LoopedTransformer, source: str) -> list[str]:
    """Start from the weights of another run; the names of what was copied.

    Source: arXiv 2402.02619, "parameter transfer". The new model may have more layers:
    what is new keeps its random start.
    # DIFFERS: the authors copy neither the attention's output matrices nor the second
    # LayerNorm of a layer, nor the bias of the final one; here all is copied. Their new
    # models have a layer and a head more, ours of --task mix the same.

    Raises:  ValueError when the shapes do not fit
    """
    old = looped.load(source).state_dict()
    try:
        found = model.load_state_dict(old, strict=False)
    except RuntimeError:
        raise ValueError(f"--init-from {source}: its weights have other shapes: train "
                         f"both with the same --width, --heads, --ffn-width, "
                         f"--max-positions and --auxiliary-loss, and tokens of one "
                         f"--task") from None
    return sorted(old.keys() - set(found.unexpected_keys))


def claim_folder(out: Path | None, run: Run, overwrite: bool) -> Path:
    """Make the folder of a new run, or a free one in runs/ if `out` is None. ValueError
    when another run is in it."""
    if out is None:
        name = f"{run.settings['preset']}-{run.settings['task']}"
        for n in itertools.count(1):
            folder = Path("runs") / (f"{name}-{n}" if n > 1 else name)
            with contextlib.suppress(FileExistsError):       # then another run has it
                folder.mkdir(parents=True)
                return folder
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()) and not overwrite:
        resume = "--resume goes on with it, " * (out / "checkpoint.pt").is_file()
        raise ValueError(f"{out} exists: {resume}--overwrite starts anew in it, "
                         f"another --out avoids it")
    for name in ("config.json", "log.jsonl", "checkpoint.pt", "accuracy.json",
                 "accuracy.svg"):
        (out / name).unlink(missing_ok=True)
    return out


def write_config(run: Run, folder: Path, argv: list[str]) -> None:
    """config.json: what is needed to make the run again."""
    commit = shutil.which("git") and subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True,
        cwd=Path(__file__).parent).stdout.strip()
    facts = {"settings": run.settings, "model": asdict(run.model.config),
             "argv": argv, "commit": commit, "torch": torch.__version__,
             "device": looped.device_name(run.device),
             "python": platform.python_version(),
             "precision": run.settings["precision"]}
    looped.write_whole(folder / "config.json", json.dumps(facts, indent=1) + "\n")


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
    if run.settings["compile"]:
        looped.compile_layers(run.model)
    step = seconds_each(lambda: train_step(run)[0])
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    size = 8192 if run.device.type == "cuda" else 1024
    x = torch.randn(size, size, device=run.device,
                    dtype=getattr(torch, run.settings["precision"]))
    rate = 2 * size**3 / seconds_each(lambda: x @ x)
    problems = run.settings["batch_size"] * run.settings["problems_per_context"]
    return (f"  milliseconds a step  {step * 1e3:.1f}\n"
              f"  problems/s           {problems / step:,.0f}\n" +
              f"  peak memory          {memory / 2**30:.2f} GiB\n" * bool(memory) +
              f"  operations           {operations / step / 1e12:.3g} TFLOP/s, "
              f"{operations / step / rate:.1%} of the {rate / 1e12:.3g} TFLOP/s "
              f"measured for a large matrix")


# --------------------------------------------------------------------------------------
# 6. The command
# --------------------------------------------------------------------------------------


def build_parser(usual: dict) -> argparse.ArgumentParser:
    """A flag for each setting and each option of the task, and those that say what to
    do. The help shows the settings of this preset and task."""
    parser = argparse.ArgumentParser(
        prog="train.py", allow_abbrev=False,
        usage="python train.py [flags]; --help lists them",
        description="Train a looped transformer on arithmetic, then test how far "
                    "beyond the training lengths it works.")
    parser.add_argument("--preset", choices=PRESETS, default=argparse.SUPPRESS,
                        help="default: paper with CUDA, laptop without")
    parser.add_argument("--task", choices=tuple(data.TASKS), default=argparse.SUPPRESS,
                        help="to learn (addition)")
    parser.add_argument("--seed", type=int, default=argparse.SUPPRESS,
                        help="of everything random (0)")
    parser.add_argument("--init-from", metavar="RUN", default=argparse.SUPPRESS,
                        help="start from the weights of this run")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best here)")
    parser.add_argument("--precision", choices=CHOICES["precision"],
                        default=argparse.SUPPRESS,
                        help="of matrix products (default: the hardware's best)")
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="run folder (default: a new one in runs/)")
    choose = parser.add_mutually_exclusive_group()
    choose.add_argument("--resume", action="store_true",
                        help="go on with the run in --out, or with the newest one")
    choose.add_argument("--overwrite", action="store_true",
                        help="start anew in a run folder that exists")
    parser.add_argument("--benchmark", action="store_true",
                        help="measure the speed of training, and stop")

    def add(group, name: str, value, meaning: str) -> None:
        """A flag for one setting, of the type of its present value."""
        if isinstance(value, bool):
            kind = {"action": argparse.BooleanOptionalAction}
        else:
            kind = {"type": type(value), "choices": CHOICES.get(name),
                    "metavar": None if name in CHOICES else type(value).__name__}
        group.add_argument("--" + name.replace("_", "-"), default=argparse.SUPPRESS,
                           help=f"{meaning} ({value})", **kind)

    chosen = f"in brackets: --preset {usual['preset']} --task {usual['task']}"
    group = parser.add_argument_group("settings", chosen)
    for name, (_, _, meaning) in SETTINGS.items():
        add(group, name, usual[name], meaning)
    group = parser.add_argument_group(f"options of {usual['task']}", chosen)
    for name, value in usual["options"].items():
        add(group, name, value, data.OPTIONS[name])
    return parser


def read_flags(argv: list[str]) -> tuple[argparse.Namespace, torch.device, dict, dict]:
    """The flags; the device; the settings of a new run that they lead to; and, of
    these, what the flags name.

    The preset and the task are read first: they decide what else there is to set.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--preset", "--task", "--device"):
        first.add_argument(name)
    early, _ = first.parse_known_args(argv)
    device = looped.choose_device(early.device)
    default = "paper" if device.type == "cuda" else "laptop"
    usual = preset(early.preset if early.preset in PRESETS else default,
                   early.task if early.task in data.TASKS else "addition")
    usual["precision"] = looped.default_precision(device)
    args = build_parser(usual).parse_args(argv)
    flags = vars(args)
    given = {name: flags[name] for name in (*usual, *usual["options"]) if name in flags}
    of_task = {name: value for name, value in given.items() if name in data.OPTIONS}
    settings = usual | {name: value for name, value in given.items()
                        if name not in of_task}
    settings["options"] = usual["options"] | of_task
    padded = bool(settings["options"].get("padded_to"))
    if padded and "padded_to" not in given:
        settings["options"]["padded_to"] = settings["train_digits"]
    fixed = padded or data.TASKS[settings["task"]].fixed_width
    if fixed and "eval_digits" not in given:
        settings["eval_digits"] = settings["train_digits"]             # all that it has
    return args, device, settings, given


def start(settings: dict, device: torch.device) -> Run:
    """A new run, once its largest problems have shown that they fit its tables."""
    digits, tested = settings["train_digits"], settings["eval_digits"]
    if data.TASKS[settings["task"]].fixed_width and digits != tested:
        raise ValueError(f"--eval-digits {tested} does not fit --train-digits {digits}:"
                         f" a fixed width has one length, so leave --eval-digits out")
    padded_to = settings["options"].get("padded_to", 0)
    if padded_to not in (0, digits):
        raise ValueError(f"--padded-to {padded_to} does not fit --train-digits "
                         f"{digits}: leave it out, or make it 0 to pad nothing")
    products = "*" in data.TASKS[settings["task"]].operators
    if settings["auxiliary_loss"] and not products:
        raise ValueError(f"--auxiliary-loss {settings['auxiliary_loss']} is for "
                         f"products, not for --task {settings['task']}")
    run = new_run(settings, device)
    if settings["init_from"]:
        copied = copy_weights(run.model, settings["init_from"])
        print(f"{len(copied)} of {len(run.model.state_dict())} weights copied")
    evaluate.rehearse(run.model, settings["task"], digits,
                      settings["problems_per_context"], settings["max_offset"],
                      **settings["options"])
    evaluate.rehearse(run.model, settings["task"], tested,
                      **evaluate.text_options(settings))
    sample_offsets(settings, 1, torch.Generator())         # ValueError if they overlap
    return run


def resume(folder: Path, device: torch.device, given: dict) -> Run:
    """The run of a folder. ValueError for a flag that asks it to be another."""
    run = restore(folder / "checkpoint.pt", device)
    known = run.settings | run.settings["options"]
    for name, value in given.items():
        if value != known.get(name):
            raise ValueError(
                f"--{name.replace('_', '-')} {value} does not fit {folder}, which has "
                f"{known.get(name)!r}: leave the flag out, or start a new run from its "
                f"weights with --init-from {folder}")
    return run


def introduction(run: Run) -> str:
    """What a user wants to know before the first step."""
    settings, usual = run.settings, preset(run.settings["preset"], run.settings["task"])
    now, before = (each | each["options"] | {"options": None, "precision": None}
                   for each in (settings, usual))
    changed = [f"{key} {now[key]}" for key in before
               if key in now and now[key] != before[key]]
    return (f"preset {settings['preset']}, {settings['task']} of at most "
            f"{settings['train_digits']} digits: {settings['layers']} layers x "
            f"{settings['recurrences']} recurrences, "
            f"{looped.parameter_count(run.model.config):,} parameters\n"
            f"on {looped.device_name(run.device)}, torch {torch.__version__}, "
            f"{settings['precision']}\nchanged: {', '.join(changed) or 'nothing'}")


def main(argv: list[str] | None = None) -> None:
    """Train, resume or benchmark, as the flags say (sys.argv when left out)."""
    argv = sys.argv[1:] if argv is None else argv
    with looped.one_line_errors("train.py", "use a smaller --microbatch-size, --width "
                                            "or --layers"):
        args, device, settings, given = read_flags(argv)
        if args.resume:
            folder = args.out or looped.newest_run()
            run = resume(folder, device, given)
        else:
            run = start(settings, device)
        print(introduction(run), flush=True)
        if args.benchmark:
            return print(benchmark(run))
        if not args.resume:
            folder = claim_folder(args.out, run, args.overwrite)
            write_config(run, folder, argv)
        print(f"into: {folder}, from step {run.step}", flush=True)
        if run.settings["compile"]:
            looped.compile_layers(run.model)
        with stop_signals() as stop:
            train(run, folder, stop)
        print(f"trained in {clock_time(run.seconds)} and saved; the test:", flush=True)
        final_test(run, folder)


def final_test(run: Run, folder: Path) -> None:
    """Score the finished run, and say what to try next."""
    try:
        evaluate.evaluate([str(folder), "--device", str(run.device),
                           "--json", str(folder / "accuracy.json"),
                           "--svg", str(folder / "accuracy.svg")])
    except KeyboardInterrupt:
        raise SystemExit(f"\nThe test was stopped; the run is whole. Test it with\n"
                         f"    python train.py --resume --out "
                         f"{shlex.quote(str(folder))}") from None
    solvers = data.TASKS[run.settings["task"]].operators
    question = "".join(f' --ask "57{symbol}68"' for symbol in list(solvers)[:1]
                       if solvers[symbol])
    print(f"next: python evaluate.py {shlex.quote(str(folder))}{question}")


if __name__ == "__main__":
    main()
