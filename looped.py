"""How the model thinks: a transformer whose layers run several times over.

Read it beside the paper ("Transformers Can Do Arithmetic with the Right Embeddings",
arXiv 2405.17399), sections 3 and 4.1, "Looped transformers" and "Input injection". It
needs torch, and abacus.py beside it.

    tokens -> embedding, LayerNorm = injected                             (B, T, D)
    state  = noise                                                        (B, T, D)
    repeat `recurrences` times:
        state = state + injected                  input injection
        state = layer(state), for every layer     attention, then GLU feed-forward
    logits = head(state)                                                  (B, T, V)

    >>> model = LoopedTransformer(ModelConfig(width=64, heads=4, ffn_width=64))
    >>> model(torch.tensor([[3, 2, 1, 10, 5, 4, 11]])).shape
    torch.Size([1, 7, 14])

Glossary
    layers          layers inside one recurrence          paper: "layers in the block"
    recurrences     how often they run, weights shared    paper: "recurrences"
    effective depth layers x recurrences; 16 in the paper's main figures
    alpha           weight of the random pass in the progressive loss     paper: alpha
    B, T, D, H, V   batch, tokens, width, heads, vocabulary

Not here: what the tokens mean (data.py), the training loop (train.py). `python
looped.py` prints the parameter counts of the paper's Table 3 next to ours.
"""

import functools
import pickle
import timeit
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abacus import (FIRE, Abacus, LearnedPositions, digit_positions, number_index,
                    rotary_angles, rotate)

EMBEDDINGS = ("none", "abacus", "learned", "fire", "randomised_fire", "rotary",
              "digit_rotary", "segment")


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are the paper's looped model, "8x2"."""

    vocab_size: int = 14                  # V
    digit_tokens: tuple = tuple(range(10))
    equals_token: int = 11                # asks for the units of the answer
    end_token: int = 12                   # ends the answer, and the problem
    width: int = 1024                     # D
    heads: int = 16                       # H, of width D / H each
    ffn_width: int = 1024                 # each half of the GLU: "intermediate 2048"
    layers: int = 8                       # in one recurrence
    recurrences: int = 2
    input_injection: str = "recurrence"   # "none", "recurrence" or "layer"
    embeddings: str = "abacus"            # of EMBEDDINGS, joined by "+"
    max_positions: int = 1024             # rows of the tables, range of random ones
    max_offset: int = 100                 # largest random offset of digit positions
    rotary_base: float = 10000.0          # of the rotary frequencies
    equals_position: str = "no"           # "no", "query" or "both": see `angles`
    norm: str = "post"                    # "post" or "pre"
    ffn: str = "glu"                      # "glu" or, in the second paper, "relu"
    head: str = "glu"                     # before the decoder: "glu" or "none"
    init: str = "xavier"                  # of the weights: "xavier" or "torch"
    state_noise: float = 0.02             # of the state before the first recurrence

    def __post_init__(self):
        kinds = self.embeddings.split("+")
        for name, allowed in (("input_injection", ("none", "recurrence", "layer")),
                              ("norm", ("post", "pre")), ("ffn", ("glu", "relu")),
                              ("head", ("glu", "none")),
                              ("init", ("xavier", "torch")),
                              ("equals_position", ("no", "query", "both"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of "
                                 f"{', '.join(allowed)}")
        if not set(kinds) <= set(EMBEDDINGS):
            raise ValueError(f"embeddings {self.embeddings!r}: join with '+' any of "
                             f"{', '.join(EMBEDDINGS)}")
        for one, other in (("rotary", "digit_rotary"), ("fire", "randomised_fire")):
            if {one, other} <= set(kinds):
                raise ValueError(f"embeddings: {one} and {other} both place the same "
                                 f"queries and keys; choose one")
        for name in ("width", "heads", "ffn_width", "layers", "recurrences",
                     "max_positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be >= 1")
        if self.max_offset < 0:
            raise ValueError(f"max_offset is {self.max_offset}, but must be >= 0")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the "
                             f"{self.heads} heads")

    @property
    def test_offset(self) -> int:
        """The offset of digit positions where none is given, outside of training."""
        # DIFFERS: the paper tests from the first row on. The rows at both ends of the
        # table are drawn least often, and a model may still be wrong at the very first
        # one, where "=" stands, when it is right everywhere else: stay clear of it.
        return 0 if self.equals_position == "no" else min(5, self.max_offset)

    def check_reach(self, position: int, tokens: int, when: str) -> None:
        """ValueError when a digit position (offset included), or the tokens of a line,
        run past the table of positions that this model has for them."""
        for kind, asked, last in (("abacus", position, self.max_positions - 1),
                                  ("learned", tokens, self.max_positions),
                                  ("randomised_fire", tokens, self.max_positions)):
            if kind in self.embeddings.split("+") and asked > last:
                raise ValueError(
                    f"{when} takes positions up to {asked}, but the {kind} table ends "
                    f"at {last}: use a larger --max-positions in training, a smaller "
                    f"--max-offset, or fewer digits")


# --------------------------------------------------------------------------------------
# 1. The layer: attention and a gated feed-forward network
# --------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal multi-head attention without biases (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, angles=None, bias: Tensor | None = None,
                cache: list | None = None) -> Tensor:
        """Mix each token with those before it.

        Arguments:
            x       (B, T, D)
            angles  of queries and of keys, from `abacus.rotary_angles`; or None
            bias    broadcasts to (B, H, T, keys), -inf where masked; None is causal
            cache   keys and values of earlier tokens, extended in place; or None
        Returns:    (B, T, D)
        """
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        # On a CPU the rotation is twice as fast on rows that lie whole in memory.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()          # (B, H, T, D / H)
        if angles is not None:
            q, k = rotate(q, angles[0]), rotate(k, angles[1])
        if cache is not None:
            if cache:
                k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
            cache[:] = k, v
        return self.out(attend(q, k, v, bias).transpose(1, 2).reshape(B, T, D))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k' / sqrt(head width) + bias) v; shapes (B, H, T, head width)."""
    if q.device.type == "cpu" and torch.is_grad_enabled() and bias is not None:
        # torch's fused attention is the better choice everywhere but here: its
        # backward pass on a CPU in bfloat16 is five times slower than these four lines.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)    # (B, H, T, keys)
        return (scores + bias).softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)


class GLU(nn.Module):
    """Feed-forward network with a gate: gelu(x A) * (x B), then back to width D.

    Source: Shazeer 2020 (arXiv 2002.05202), GEGLU, without biases.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.into = nn.Linear(config.width, 2 * config.ffn_width, bias=False)
        self.out = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.into(x).chunk(2, dim=-1)              # (B, T, ffn_width)
        return self.out(F.gelu(gate) * value)


class MLP(nn.Module):
    """Feed-forward network of the second paper: relu(x A), then back to width D.

    # DIFFERS: its authors' layers have biases; here no layer has any.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.into = nn.Linear(config.width, config.ffn_width, bias=False)
        self.out = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        return self.out(self.into(x).relu())


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.ffn = GLU(config) if config.ffn == "glu" else MLP(config)
        self.norm1 = nn.LayerNorm(config.width, eps=1e-12)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-12)
        self.post_norm = config.norm == "post"

    def forward(self, x: Tensor, angles=None, bias=None, cache=None) -> Tensor:
        """(B, T, D) -> the same; angles, bias and cache as in Attention.forward."""
        # PAPER: post-norm, the order of the original transformer: the state that
        # travels from one recurrence to the next is normalised and cannot grow.
        if self.post_norm:
            x = self.norm1(x + self.attention(x, angles, bias, cache))
            return self.norm2(x + self.ffn(x))
        x = x + self.attention(self.norm1(x), angles, bias, cache)
        return x + self.ffn(self.norm2(x))


# --------------------------------------------------------------------------------------
# 2. The model: embed, loop, read out
# --------------------------------------------------------------------------------------


class LoopedTransformer(nn.Module):
    """A decoder that applies the same layers `recurrences` times.

    Source: sections 3 and 4.1. A standard transformer is the special case of one
    recurrence: 16 layers x 1, with injection "none" or "layer".
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, width = config, config.width
        kinds = config.embeddings.split("+")
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.abacus = (Abacus(config.digit_tokens, width, config.max_positions,
                              config.max_offset) if "abacus" in kinds else None)
        self.learned = (LearnedPositions(width, config.max_positions)
                        if "learned" in kinds else None)
        self.segment = nn.Embedding(4, width) if "segment" in kinds else None
        self.fire = FIRE(config.heads) if "fire" in config.embeddings else None
        self.random_positions = "randomised_fire" in kinds
        self.rotation = next((kind for kind in kinds if "rotary" in kind), None)
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        head = [GLU(config), nn.Linear(width, width, bias=False)]
        self.head = nn.Sequential(*head * (config.head == "glu"),
                                  nn.LayerNorm(width, eps=1e-12))
        self.decoder = nn.Linear(width, config.vocab_size, bias=False)
        digits = torch.tensor(config.digit_tokens)
        self.register_buffer("digits", digits, persistent=False)
        if config.init == "xavier":
            self._initialise()

    def _initialise(self) -> None:
        # PAPER: xavier normal with gain (8 x effective depth)^(-1/4) (the DeepNorm
        # rule, arXiv 2203.00555), except for queries and keys, whose gain is 1.
        gain = (8 * self.config.layers * self.config.recurrences) ** -0.25
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.width ** -0.5)
            elif isinstance(module, nn.Linear) and not name.startswith("fire"):
                nn.init.xavier_normal_(module.weight, gain)
        for layer in self.layers:
            # One matrix holds three: give each the variance of a matrix of its own.
            parts = layer.attention.qkv.weight.chunk(3)
            for part, its_gain in zip(parts, (1, 1, gain)):
                nn.init.xavier_normal_(part, its_gain)

    def forward(self, tokens: Tensor, recurrences: int | None = None,
                offset: Tensor | int | None = None, without_gradient: int = 0,
                cache: dict | None = None) -> Tensor:
        """Logits for the token after each token.

        Arguments:
            tokens            (B, T) int64
            recurrences       as in the configuration when left out; more are allowed
            offset            of the digit positions: int, or broadcasts to (B, T). Left
                              out: one random offset in training, and outside of it
                              the configuration's test_offset
            without_gradient  recurrences run before these, without gradient
            cache             a dict that starts empty and keeps keys and values, so
                              that a longer line costs its new tokens only
        Returns:              (B, T, V), or with a cache the new tokens' rows of it
        Raises:               ValueError when a position lies past its table
        """
        if recurrences is None:
            recurrences = self.config.recurrences
        if offset is None:
            offset = self.config.test_offset if not self.training else torch.randint(
                self.config.max_offset + 1, (), device=tokens.device)
        injected = self.embed(tokens, offset)                             # (B, T, D)
        angles = self.angles(tokens, offset)
        known = cache[0, 0][0].shape[2] if cache else 0   # keys and values in the cache
        injected = injected[:, known:]
        angles = angles and [(cos[:, :, known:], sin[:, :, known:])
                             for cos, sin in angles]
        bias = self.attention_bias(tokens, known, causal_mode=cache is None)
        # PAPER: the authors' code starts from noise, in training and in evaluation.
        # Without injection the input would never arrive, so there it is the start.
        state = torch.zeros_like(injected)
        if self.config.state_noise:
            state = self.config.state_noise * torch.randn_like(injected)
        if self.config.input_injection == "none":
            state = injected
        for step in range(without_gradient + recurrences):
            if 0 < step == without_gradient:
                # TRAP: autocast keeps its 16-bit copies of the weights, and some
                # versions of torch use a copy that was made without gradient again, so
                # that the weight learns nothing.
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(torch.is_grad_enabled()
                                        and step >= without_gradient):
                state = self.recur(state, injected, angles, bias, cache, step)
        return self.decoder(self.head(state))

    def recur(self, state, injected, angles, bias, cache=None, step: int = 0) -> Tensor:
        """One recurrence: inject the input, then run every layer. (B, T, D) -> same."""
        for index, layer in enumerate(self.layers):
            # DIFFERS: section 3 reads as if the input were added before every layer of
            # every model; in the authors' code the looped model adds it once a
            # recurrence, and the standard model "with injection" before every layer.
            if self.config.input_injection == "layer" or (
                    self.config.input_injection == "recurrence" and index == 0):
                state = state + injected
            memory = None if cache is None else cache.setdefault((step, index), [])
            state = layer(state, angles, bias, memory)
        return state

    def embed(self, tokens: Tensor, offset: Tensor | int) -> Tensor:
        """What is injected: token embedding, plus the positions of digits or tokens."""
        embedded = self.tokens(tokens)
        if self.abacus is not None and self.config.equals_position == "no":
            embedded = embedded + self.abacus(tokens, offset)
        elif self.abacus is not None:
            # "=" gets the row below its problem's units: see `angles`.
            equals = tokens == self.config.equals_token
            row = self.abacus.embedding(torch.where(equals, offset, 0))
            embedded = embedded + torch.where(equals[..., None], row,
                                              self.abacus(tokens, offset))
        if self.learned is not None:
            embedded = embedded + self.learned(tokens.shape[1])
        if self.segment is not None:
            is_digit = torch.isin(tokens, self.digits)
            number = number_index(is_digit, tokens == self.config.end_token)
            embedded = embedded + self.segment(number)
        return self.embedding_norm(embedded)

    def angles(self, tokens: Tensor, offset: Tensor | int):
        """How far queries and keys are turned, once for all layers; or None."""
        if self.rotation is None:
            return None
        head_width, base = (self.config.width // self.config.heads,
                            self.config.rotary_base)
        if self.rotation == "rotary":
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
            return [rotary_angles(positions, head_width, base)] * 2
        keys = queries = digit_positions(torch.isin(tokens, self.digits), offset)
        # DIFFERS: the answer's digit at position p asks for the operands' digits at
        # p + 1. "=" asks for the units, so it asks from position 0, at its own
        # problem's offset: without that, nothing tells it which numbers in the context
        # are its own. As a key it stays at rest like all tokens that are no digits.
        if self.config.equals_position != "no":
            queries = torch.where(tokens == self.config.equals_token, offset, keys)
        if self.config.equals_position == "both":
            keys = queries
        return [rotary_angles(positions, head_width, base)
                for positions in (queries, keys)]

    def attention_bias(self, tokens: Tensor, known: int, causal_mode: bool):
        """FIRE and the causal mask, for the queries from `known` on: broadcasts to
        (B, H, T - known, T). None where the fused kernel's causal mode does."""
        length, device = tokens.shape[1], tokens.device
        fused = device.type == "cuda" or not torch.is_grad_enabled()     # see `attend`
        if self.fire is None and causal_mode and fused:
            return None
        bias = torch.full((length - known, length), -torch.inf, device=device)
        bias = bias.triu(1 + known)
        if self.fire is not None:
            positions = None
            if self.random_positions:
                # Source: Ruoss et al. 2023 (arXiv 2305.16843): an increasing draw from
                # a range longer than any line: no distance is new in the test.
                positions = torch.randperm(self.config.max_positions, device=device)
                positions = positions[:length].sort().values
            bias = bias + self.fire(length, device, positions)[:, :, known:]
        # Under autocast the scores are 16 bits wide, and the bias has to match them.
        enabled = torch.is_autocast_enabled(device.type)
        return bias.to(torch.get_autocast_dtype(device.type)) if enabled else bias


# --------------------------------------------------------------------------------------
# 3. The progressive loss
# --------------------------------------------------------------------------------------


def progressive_loss(model: LoopedTransformer, tokens: Tensor, is_answer: Tensor,
                     alpha: float, generator: torch.Generator,
                     offset: Tensor | int | None = None,
                     answer_tokens: Tensor | None = None) -> Tensor:
    """Cross entropy of the answer tokens, at full depth and at a random part of it.

    Source: section 4.1, "progressive loss", after Bansal et al. 2022 (2202.05826):

        (1 - alpha) loss(all recurrences) + alpha loss(k after n without gradient)

    The random pass teaches the recurrence to improve any state on its way to the
    answer, so that more recurrences than in training do not undo it.

    # DIFFERS: the paper writes this sum; the authors ran alpha = 1, the random pass
    # alone. The paper preset takes their value.

    Arguments:
        tokens, is_answer  (B, T) from data.sample_batch
        alpha              0 <= alpha <= 1
        generator          a CPU generator for n and k, one draw a call
        offset             of the digit positions, see LoopedTransformer.forward
        answer_tokens      what to divide the summed loss by; the answer tokens of these
                           rows when left out (give it for a part of a larger batch)
    Returns:               scalar
    """
    def loss(**how) -> Tensor:
        logits = model(tokens, offset=offset, **how)[:, :-1].flatten(0, 1).float()
        targets = torch.where(is_answer, tokens, -100)[:, 1:].flatten()
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=-100)

    total, full = 0.0, model.config.recurrences
    if alpha < 1:
        total = total + (1 - alpha) * loss()
    if alpha > 0:
        n = int(torch.randint(full, (), generator=generator))
        k = 1 + int(torch.randint(min(full - n, max(full // 2, 1)), (),
                                  generator=generator))
        total = total + alpha * loss(recurrences=k, without_gradient=n)
    return total / (is_answer.sum() if answer_tokens is None else answer_tokens)


# --------------------------------------------------------------------------------------
# 4. Checkpoints
# --------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint: tensors, numbers and strings, and nothing that runs.

    Arguments:  path  a checkpoint, or a run folder that holds checkpoint.pt
    Raises:     ValueError, in one line, for anything that is not one of ours
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; name a run folder or a "
                         f"checkpoint.pt, or train one with `python train.py`")
    try:
        # weights_only refuses every pickle that would call a function on loading.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
            KeyError, AttributeError, TypeError, IndexError) as error:
        raise ValueError(f"{path}: not a readable checkpoint: damaged, foreign, or "
                         f"with code in it ({type(error).__name__})") from None
    parts = ("config", "settings", "model")
    if not isinstance(checkpoint, dict) or not all(
            isinstance(checkpoint.get(part), dict) for part in parts):
        raise ValueError(f"{path}: a torch file, but not a checkpoint of this project")
    return checkpoint


def load(path: str | Path, device: str | torch.device = "cpu") -> LoopedTransformer:
    """The trained model of a run folder or checkpoint, in evaluation mode.

    Raises ValueError, in one line, when it cannot be loaded.
    """
    checkpoint = read_checkpoint(path)
    try:
        model = LoopedTransformer(ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{path}: its model does not fit this version of looped.py "
                         f"({str(error).splitlines()[0]})") from None
    return model.to(device).eval()


# --------------------------------------------------------------------------------------
# 5. The machine: device, precision and compiler
# --------------------------------------------------------------------------------------


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or else the best there is: cuda, mps, cpu.

    Raises ValueError when it does not exist.
    """
    there = {"cuda": torch.cuda.is_available(), "cpu": True,
             "mps": torch.backends.mps.is_available()}
    if name is None:
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not there.get(device.type) or (
            device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        present = ", ".join(kind for kind in there if there[kind])
        raise ValueError(f"there is no device {name!r} here; there is {present}")
    if device.type == "cuda":
        # cuDNN's attention, which newer versions of torch prefer on an H100 or H200,
        # plans anew for each shape, and here every batch may have another.
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def device_name(device: torch.device) -> str:
    """What a reader calls the device, e.g. "NVIDIA A100" or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


@functools.cache
def fastest_precision(device: torch.device) -> torch.dtype:
    """The type to multiply matrices in: bfloat16 where the hardware has it, float16
    where only that is fast (T4, V100; it needs loss scaling), or float32.

    # DIFFERS: the authors used float16. bfloat16 has float32's range: no loss scaling.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return (torch.bfloat16 if capability >= (8, 0) else
                torch.float16 if capability >= (7, 0) else torch.float32)
    if device.type != "cpu":
        return torch.float32
    # No public function tells whether a CPU multiplies bfloat16 in hardware (AMX,
    # AVX512-BF16) or imitates it slowly. A few milliseconds of stopwatch do.
    matrices = [torch.ones(256, 256, dtype=dtype)
                for dtype in (torch.float32, torch.bfloat16)]
    # In turn and often, so that a busy moment of the machine cannot decide.
    rounds = [[timeit.timeit(lambda: x @ x, number=5) for x in matrices]
              for _ in range(20)]
    plain, half = map(min, zip(*rounds))
    return torch.bfloat16 if half < 0.7 * plain else torch.float32


def autocast(device: torch.device, precision: torch.dtype | None = None):
    """A context that multiplies matrices in `precision`, by default the fastest."""
    dtype = precision or fastest_precision(device)
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says so; torch words it in one way for each kind of device."""
    return any(text in str(error) for text in ("out of memory", "allocate memory"))


def compile_layers(model: LoopedTransformer) -> str:
    """Compile every layer in place; says in a few words what was done.

    The layer is compiled and not the model, so that the loop around it can turn a
    different number of times in each step. State-dict names stay as they are.
    """
    try:
        # Whether there is a working compiler shows when it is used, and not before.
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=model.digits.device))
    except Exception as error:        # a lacking compiler shows in many ways
        torch._dynamo.reset()
        return f"not compiled: no working compiler ({type(error).__name__})"
    for layer in model.layers:
        layer.compile(dynamic=True)
    return "compiled"


# --------------------------------------------------------------------------------------
# A worked example: Table 3
# --------------------------------------------------------------------------------------


def parameter_count(config: ModelConfig) -> tuple[int, int]:
    """Parameters of a model: (all but the tables below, the tables that depend on the
    vocabulary or on the positions: token embedding, decoder, Abacus, learned)."""
    with torch.device("meta"):
        model = LoopedTransformer(config)
    total = sum(weight.numel() for weight in model.parameters())
    tables = [model.tokens, model.decoder, model.abacus, model.learned]
    in_tables = sum(weight.numel() for table in tables if table is not None
                    for weight in table.parameters())
    return total - in_tables, in_tables


def main() -> None:
    """Print the worked example."""
    reported = {(16, 1): 122.27, (8, 2): 63.51, (4, 4): 34.14, (2, 8): 19.45,
                (1, 16): 12.11}
    print("Effective depth 16, millions of parameters. Each row lacks the same 0.57:\n"
          "it is the size of the authors' vocabulary, and not of ours.\n")
    print("layers x recurrences   Table 3    ours   + tokens and Abacus   a layer")
    for (layers, recurrences), paper in reported.items():
        config = ModelConfig(layers=layers, recurrences=recurrences)
        counts = [count / 1e6 for count in parameter_count(config)]
        layer = sum(weight.numel() for weight in Layer(config).parameters()) / 1e6
        print(f"{layers:>6} x {recurrences:<11} {paper:>9.2f} {counts[0]:>7.2f} "
              f"{counts[1]:>15.2f} {layer:>15.3f}")


if __name__ == "__main__":
    main()
