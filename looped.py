"""How the model thinks: a transformer whose layers run several times over.

Read it beside the paper ("Transformers Can Do Arithmetic with the Right Embeddings",
arXiv 2405.17399), section 3, above all 3.2, looped transformers. It needs torch, and
abacus.py beside it.

    tokens -> embedding, LayerNorm = injected                             (B, T, D)
    state  = noise, or zeros                                              (B, T, D)
    repeat `recurrences` times:
        state = state + injected                  input injection
        state = layer(state), for every layer     attention, then GLU feed-forward
    logits = decoder(head(state))                                         (B, T, V)

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
looped.py` prints the parameter counts of the paper's Table 3. Sections 4 and 5 are
files and the machine; skip them at first.
"""

import contextlib
import io
import os
import sys
import traceback
import zipfile
from dataclasses import dataclass
from pathlib import Path

# Torch reads these two when it is loaded. Where Apple's GPU lacks a kernel, the CPU is
# to stand in. And threads that wait for work spin, which on a busy machine takes the
# time that the others need: 2000 turns cost nothing on an idle one.
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abacus import (FIRE, Abacus, LearnedPositions, Segments, digit_positions,
                    is_one_of, number_index, rotary_angles, rotate)

# Embeddings that are added to those of the tokens. Each is one line here: a module that
# is called with (tokens, offset, is_start) and returns what broadcasts to (B, T, D).
ADDED = {
    "abacus": lambda c: Abacus(c.digit_tokens, c.width, c.max_positions, c.max_offset),
    "learned": lambda c: LearnedPositions(c.width, c.max_positions),
    "segment": lambda c: Segments(c.digit_tokens, c.end_token, c.width),
}
# The others turn queries and keys, or are added to the attention logits.
EMBEDDINGS = ("none", *ADDED, "rotary", "digit_rotary", "fire")

CHOICES = {"input_injection": ("none", "recurrence", "layer"), "norm": ("post", "pre"),
           "ffn": ("glu", "relu"), "head": ("ffn", "norm"),
           "init": ("xavier", "sines", "torch"), "equals_position": ("no", "units"),
           "precision": ("float32", "bfloat16", "float16")}


@dataclass
class ModelConfig:
    """The shape of a model. The defaults are the paper's looped model, "8x2", but for
    the vocabulary, which has 19 tokens there."""

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
    max_positions: int = 512              # rows of the position tables
    max_offset: int = 100                 # largest random offset of digit positions
    test_offset: int = 0                  # their offset outside of training
    rotary_base: float = 10000.0          # of the frequencies of rotation and sines
    equals_position: str = "no"           # "units": "=" stands right before them
    fixed_second: bool = False            # no offset moves the second number
    norm: str = "post"                    # "post" or "pre"
    norm_eps: float = 1e-12               # of every LayerNorm
    ffn: str = "glu"                      # "glu", or the second paper's "relu"
    embedding_norm: bool = True           # a LayerNorm after the embedding
    head: str = "ffn"                     # one more "ffn"; or, the second's, a "norm"
    auxiliary_digits: int = 0             # A: more digits to predict, in training
    init: str = "xavier"                  # "xavier", "sines": see _initialise; "torch"
    state_noise: float = 0.02             # of the state before the first recurrence
    precision: str = "float32"            # that matrices are multiplied in

    def __post_init__(self):
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of "
                                 f"{', '.join(allowed)}")
        if not self.kinds <= set(EMBEDDINGS) or {"none"} < self.kinds:
            raise ValueError(f"embeddings {self.embeddings!r}: join with '+' any of "
                             f"{', '.join(EMBEDDINGS)}")
        if self.kinds >= {"rotary", "digit_rotary"}:
            raise ValueError(f"embeddings {self.embeddings!r}: rotary and digit_rotary "
                             f"exclude each other; choose one")
        if self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice the "
                             f"{self.heads} heads")
        if self.test_offset > self.max_offset:
            raise ValueError(f"test_offset {self.test_offset} is above max_offset "
                             f"{self.max_offset}: nothing there is trained")

    @property
    def kinds(self) -> set[str]:
        """The embeddings, one by one."""
        return set(self.embeddings.split("+"))


# --------------------------------------------------------------------------------------
# 1. The layer: attention and a feed-forward network
# --------------------------------------------------------------------------------------


class DotProduct(nn.Module):
    """softmax(q k' / sqrt(head width) + bias) v, (B, H, T, D / H) each. It is a module,
    without weights, so that torch's hooks can see what a head reads."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        """The heads side by side; `bias` as in Attention.forward."""
        if bias is None or is_fused(q.device):
            return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)       # (B, H, T, T)
        return (scores + bias).softmax(dim=-1) @ v


def is_fused(device: torch.device) -> bool:
    """Whether to use torch's fused attention: with CUDA, and wherever no gradient is
    asked for. On a CPU its backward pass in bfloat16 takes five times as long."""
    return device.type == "cuda" or not torch.is_grad_enabled()


class Attention(nn.Module):
    """Causal multi-head attention without biases (Vaswani et al. 2017)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.dot_product = DotProduct()
        self.out = nn.Linear(config.width, config.width, bias=False)
        # PAPER: one FIRE for each attention layer, shared by its recurrences.
        self.fire = FIRE(config.heads) if "fire" in config.kinds else None

    def forward(self, x: Tensor, angles=None, bias: Tensor | None = None) -> Tensor:
        """Mix each token with those before it.

        Arguments:
            x       (B, T, D)
            angles  of queries and of keys, from `abacus.rotary_angles`; or None
            bias    broadcasts to (B, H, T, T), -inf where masked; None is causal
        Returns:    (B, T, D)
        """
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)
        # On a CPU the rotation is twice as fast on rows that lie whole in memory.
        q, k, v = qkv.permute(2, 0, 3, 1, 4).contiguous()          # (B, H, T, D / H)
        if angles is not None:
            q, k = rotate(q, angles[0]), rotate(k, angles[1])
        heads = self.dot_product(q, k, v, bias)                    # (B, H, T, D / H)
        return self.out(heads.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """gelu(x A) * (x B), then back to width D: GEGLU, Shazeer 2020 (arXiv 2002.05202);
    or, in the second paper, relu(x A), then back.

    # DIFFERS: the layers of the second paper's authors have biases; here none has any.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gated = config.ffn == "glu"
        self.into = nn.Linear(config.width, (1 + self.gated) * config.ffn_width,
                              bias=False)
        self.out = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> the same."""
        if not self.gated:
            return self.out(self.into(x).relu())
        gate, value = self.into(x).chunk(2, dim=-1)              # (B, T, ffn_width)
        return self.out(F.gelu(gate) * value)


class Layer(nn.Module):
    """Attention and feed-forward, each with a residual connection and a LayerNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention, self.ffn = Attention(config), FeedForward(config)
        self.norm1, self.norm2 = layer_norm(config), layer_norm(config)
        self.post_norm = config.norm == "post"

    def forward(self, x: Tensor, angles=None, bias=None) -> Tensor:
        """(B, T, D) -> the same; angles and bias as in Attention.forward."""
        # PAPER (as run): post-norm, the order of the original transformer: the state
        # that travels from one recurrence to the next is normalised and cannot grow.
        if self.post_norm:
            x = self.norm1(x + self.attention(x, angles, bias))
            return self.norm2(x + self.ffn(x))
        x = x + self.attention(self.norm1(x), angles, bias)
        return x + self.ffn(self.norm2(x))


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
    """A LayerNorm of the state."""
    return nn.LayerNorm(config.width, eps=config.norm_eps)


# --------------------------------------------------------------------------------------
# 2. The model: embed, loop, read out
# --------------------------------------------------------------------------------------


class LoopedTransformer(nn.Module):
    """A decoder that applies the same layers `recurrences` times; the standard one is
    the case of one recurrence, with injection "none" or "layer".

    Source: section 3; the loop in 3.2.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, width = config, config.width
        self.tokens = nn.Embedding(config.vocab_size, width)
        self.added = nn.ModuleDict({kind: make(config) for kind, make in ADDED.items()
                                    if kind in config.kinds})
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.embedding_norm = (layer_norm(config) if config.embedding_norm
                               else nn.Identity())
        # PAPER (as run): one more GLU, the final LayerNorm, a matrix, the decoder. The
        # second paper has a LayerNorm alone before the decoder.
        self.head = layer_norm(config) if config.head == "norm" else nn.Sequential(
            FeedForward(config), layer_norm(config),
            nn.Linear(width, width, bias=False))
        self.decoder = nn.Linear(
            width, config.vocab_size + 10 * config.auxiliary_digits, bias=False)
        if config.init != "torch":
            self._initialise()

    def _initialise(self) -> None:
        # PAPER: xavier normal with gain (8 x effective depth)^(-1/4) (the DeepNorm
        # rule, arXiv 2203.00555), except for queries and keys, whose gain is 1. Biases,
        # which FIRE alone has, are 0.
        # DIFFERS: the authors' models with FIRE or rotary split the matrix of queries,
        # keys and values in another order, so that most heads have gain 1 in all three.
        # DIFFERS: the second paper's weights start from N(0, 0.8 / sqrt(D)), the
        # standard of its library; here both papers' models start alike.
        gain = (8 * self.config.layers * self.config.recurrences) ** -0.25
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.width ** -0.5)
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, gain)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for layer in self.layers:
            # One matrix holds three: give each the variance of a matrix of its own.
            parts = layer.attention.qkv.weight.chunk(3)
            for part, its_gain in zip(parts, (1, 1, gain)):
                nn.init.xavier_normal_(part, its_gain)
        if self.config.init == "sines" and "abacus" in self.added:
            # DIFFERS: each digit asks for the row after its own. Of random rows, every
            # such pair has to be learned by itself, and at 100 digits all must hold; of
            # sines and cosines one matrix turns all rows into the next. They are as
            # large as the random ones, and learned like them.
            table = self.added["abacus"].embedding.weight.data
            width, base = table.shape[1], self.config.rotary_base
            cos, sin = rotary_angles(torch.arange(len(table))[None], width, base)
            table[:] = (2 / width) ** 0.5 * torch.cat((cos, sin), dim=-1)[0, 0]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tokens.weight.device

    def forward(self, tokens: Tensor, recurrences: int | None = None,
                offset: Tensor | int | None = None,
                without_gradient: int = 0) -> Tensor:
        """Logits for the token after each token.

        Arguments:
            tokens            (B, T) int64, padded on the right only
            recurrences       as in the configuration when left out; more are allowed
            offset            of the digit positions: int, or broadcasts to (B, T). Left
                              out: one random offset in training, test_offset outside
            without_gradient  recurrences run before these, without gradient
        Returns:              (B, T, V), or with A auxiliary digits (B, T, V + 10 A):
                              the others are theirs, for A times the digit 0 first
        Raises:               ValueError when a position lies past its table
        """
        config = self.config
        if recurrences is None:
            recurrences = config.recurrences
        if offset is None:
            offset = config.test_offset if not self.training else torch.randint(
                config.max_offset + 1, (), device=tokens.device)
        if config.fixed_second:
            # DIFFERS: every digit of a product needs the whole second factor, which is
            # in no column. So its digits always stand at positions 1, 2, ...
            number = number_index(is_one_of(tokens, config.digit_tokens),
                                  tokens == config.end_token)
            offset = torch.where(number == 1, 0, offset)
        injected = self.embed(tokens, offset)                             # (B, T, D)
        angles = self.angles(tokens, offset)
        biases = [self.attention_bias(layer, tokens) for layer in self.layers]
        # PAPER (as run): the state starts from noise, in training and in evaluation.
        # Without injection the input would never arrive, so it is part of the start.
        state = config.state_noise * torch.randn_like(injected) if (
            config.state_noise) else torch.zeros_like(injected)
        if config.input_injection == "none":
            state = state + injected
        for step in range(without_gradient + recurrences):
            if without_gradient and step == without_gradient:
                # TRAP: autocast keeps its 16-bit copies of the weights, and some
                # versions of torch use a copy that was made without gradient again, so
                # that the weight learns nothing.
                torch.clear_autocast_cache()
            with torch.set_grad_enabled(torch.is_grad_enabled()
                                        and step >= without_gradient):
                state = self.recur(state, injected, angles, biases)
        return self.decoder(self.head(state))

    def recur(self, state, injected, angles, biases) -> Tensor:
        """One recurrence: inject the input, then run every layer. (B, T, D) -> same."""
        for index, (layer, bias) in enumerate(zip(self.layers, biases)):
            # DIFFERS: section 3 reads as if the input were added before every layer of
            # every model; in the authors' code the looped model adds it once a
            # recurrence, and the standard model "with injection" before every layer.
            if self.config.input_injection == "layer" or (
                    self.config.input_injection == "recurrence" and index == 0):
                state = state + injected
            state = layer(state, angles, bias)
        return state

    def _is_start(self, tokens: Tensor) -> Tensor | None:
        # DIFFERS: the answer's digit at position p asks for the operands' digits at
        # p + 1. "=" asks for the units, so it asks from position 0, at its own
        # problem's offset: without that, nothing tells it which numbers of the context
        # are its own.
        return (tokens == self.config.equals_token
                if self.config.equals_position == "units" else None)

    def embed(self, tokens: Tensor, offset: Tensor | int) -> Tensor:
        """What is injected: token embedding, plus the positions of digits or tokens."""
        embedded = self.tokens(tokens)
        for module in self.added.values():
            embedded = embedded + module(tokens, offset, self._is_start(tokens))
        return self.embedding_norm(embedded)

    def angles(self, tokens: Tensor, offset: Tensor | int):
        """How far queries and keys are turned, once for all layers; or None."""
        if "rotary" in self.config.kinds:
            queries = keys = torch.arange(tokens.shape[1], device=tokens.device)[None]
        elif "digit_rotary" in self.config.kinds:
            is_digit = is_one_of(tokens, self.config.digit_tokens)
            # As a key "=" stays at rest, like all tokens that are no digits.
            queries = digit_positions(is_digit, offset, self._is_start(tokens))
            keys = digit_positions(is_digit, offset)
        else:
            return None
        head_width = self.config.width // self.config.heads
        return [rotary_angles(positions, head_width, self.config.rotary_base)
                for positions in (queries, keys)]

    def attention_bias(self, layer: Layer, tokens: Tensor) -> Tensor | None:
        """FIRE and the causal mask of a layer: broadcasts to (B, H, T, T). None where
        the fused kernel masks itself."""
        length, device, fire = tokens.shape[1], tokens.device, layer.attention.fire
        if fire is None and is_fused(device):
            return None
        bias = torch.full((length, length), -torch.inf, device=device).triu(1)
        if fire is not None:
            bias = bias + fire(length, device)
        # The scores have the type of the weights, or autocast's, and so must the bias.
        kind = device.type
        return bias.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind)
                       else self.tokens.weight.dtype)


# --------------------------------------------------------------------------------------
# 3. The progressive loss
# --------------------------------------------------------------------------------------


def progressive_loss(model: LoopedTransformer, tokens: Tensor, is_answer: Tensor,
                     alpha: float, generator: torch.Generator,
                     offset: Tensor | int | None = None,
                     answer_count: Tensor | None = None,
                     auxiliary: Tensor | None = None,
                     auxiliary_weight: float = 0.0) -> Tensor:
    """Cross entropy of the answer tokens, at full depth and at a random part of it.

    Source: section 3.2, "progressive loss", after Bansal et al. 2022 (2202.05826):

        (1 - alpha) loss(all recurrences) + alpha loss(k after n without gradient)

    Of R recurrences, n is uniform in 0..R - 1, and k in 1..min(R - n, R // 2) but at
    least 1. The random pass teaches the recurrence to improve any state on its way to
    the answer, so that more recurrences than in training do not undo it.

    # DIFFERS: the paper writes this sum; the authors ran alpha = 1, the random pass
    # alone. The paper preset takes their value. In their code the full pass has no
    # gradient in its first half; here it has gradient throughout.

    Arguments:
        tokens, is_answer  (B, T) from data.sample_batch
        alpha              0 <= alpha <= 1
        generator          a CPU generator: n and k are drawn anew in each call
        offset             of the digit positions, see LoopedTransformer.forward
        answer_count       what to divide the summed loss by; the answer tokens of these
                           rows when left out (give it for a part of a larger batch)
        auxiliary          (B, T, A) int64: more digits to predict together with each
                           token, -100 for none. Their loss, the mean over A, is added
                           with `auxiliary_weight`
    Returns:               scalar
    """
    def loss(**passes) -> Tensor:
        """The sum over all that is asked for, at the end of these passes (keywords of
        LoopedTransformer.forward): scalar, in nats."""
        logits = model(tokens, offset=offset, **passes)[:, :-1].flatten(0, 1).float()
        targets = torch.where(is_answer, tokens, -100)[:, 1:].flatten()
        vocabulary = model.config.vocab_size
        total = F.cross_entropy(logits[:, :vocabulary], targets, reduction="sum")
        if auxiliary is not None:
            digits = logits[:, vocabulary:].unflatten(1, (10, -1))
            total = total + auxiliary_weight / auxiliary.shape[2] * F.cross_entropy(
                digits, auxiliary[:, 1:].flatten(0, 1), reduction="sum")
        return total

    total, full = 0.0, model.config.recurrences
    if alpha < 1:
        total = total + (1 - alpha) * loss()
    if alpha > 0:
        n = int(torch.randint(full, (), generator=generator))
        k = 1 + int(torch.randint(min(full - n, max(full // 2, 1)), (),
                                  generator=generator))
        total = total + alpha * loss(recurrences=k, without_gradient=n)
    return total / (is_answer[:, 1:].sum() if answer_count is None else answer_count)


# --------------------------------------------------------------------------------------
# 4. Files: checkpoints, whole or not there
# --------------------------------------------------------------------------------------


def read_checkpoint(path: str | Path) -> dict:
    """The content of a checkpoint: tensors, numbers and strings, and nothing that runs.

    `weights_only` refuses every pickle that would call a function. (Before torch 2.10 a
    file made for the purpose could get past it: CVE-2025-32434 and CVE-2026-24747.)

    Arguments:  path  a checkpoint, or a run folder that holds checkpoint.pt
    Raises:     ValueError, in one line, for anything that is not one of ours
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such checkpoint; name a run folder or a "
                         f"checkpoint.pt, or train one with `python train.py`")
    try:
        # Torch does not look at the checksums of the archive that it reads.
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(checkpoint[part], dict)
                   for part in ("config", "settings", "model")):
            raise ValueError("a part of it is missing")
    except Exception as error:                 # a file can be wrong in very many ways
        raise ValueError(f"{path}: not a readable checkpoint of this project: damaged, "
                         f"foreign, or with code in it ({type(error).__name__})"
                         ) from None
    return checkpoint


def load(path: str | Path, device: str | torch.device = "cpu") -> LoopedTransformer:
    """The trained model of a run folder or checkpoint, in evaluation mode. ValueError,
    in one line, when it cannot be loaded."""
    checkpoint = read_checkpoint(path)
    try:
        model = LoopedTransformer(ModelConfig(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"{path}: its model does not fit this version of looped.py "
                         f"({' '.join(str(error).split())[:200]})") from None
    return model.to(device).eval()


def newest_run(folder: str | Path = "runs") -> Path:
    """The run whose checkpoint was written last. ValueError when there is none."""
    found = list(Path(folder).glob("*/checkpoint.pt"))
    if not found:
        raise ValueError(f"no run in {folder}/: train one with `python train.py`, or "
                         f"name a run folder or checkpoint")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def write_whole(path: Path, content: str | bytes | dict) -> None:
    """Write a text, bytes, or a dict for `torch.load`, so that the file is there whole
    or not at all: under another name first, then moved into place."""
    if isinstance(content, dict):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    content = content.encode() if isinstance(content, str) else content
    try:
        partial_path = path.with_name(path.name + ".partial")
        partial_path.write_bytes(content)
        partial_path.replace(path)
    except OSError as error:
        raise OSError(f"{path} was not written: {error.strerror}") from None


@contextlib.contextmanager
def one_line_errors(program: str, advice: str):
    """End a program with one line for what its user can cause: bad input, a file that
    cannot be used, a lack of memory (with advice), Ctrl-C."""
    try:
        yield
    except (ValueError, OSError) as error:
        # A ValueError that nobody raised on purpose is a bug: a reader who changes this
        # code is to see where.
        last = traceback.extract_tb(error.__traceback__)[-1].line
        if isinstance(error, ValueError) and not last.startswith("raise"):
            raise
        sys.exit(f"{program}: {error}")
    except torch.OutOfMemoryError:
        sys.exit(f"{program}: out of memory: {advice}")
    except KeyboardInterrupt:
        sys.exit(f"\n{program}: stopped")


# --------------------------------------------------------------------------------------
# 5. The machine: device, precision and compiler
# --------------------------------------------------------------------------------------


def choose_device(name: str | None = None) -> torch.device:
    """The device called `name`, or else the best there is: cuda, mps, cpu. ValueError
    when it does not exist."""
    there = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    there += ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if name and name not in there and f"{name}:0" not in there:
        raise ValueError(f"there is no device {name!r} here; there is "
                         f"{', '.join(there)}")
    # cuDNN's attention, which newer versions of torch prefer on an H100 or H200, plans
    # anew for each shape, and here every batch may have another.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name or there[0])


def device_name(device: torch.device) -> str:
    """What a reader calls the device, e.g. "NVIDIA A100" or "cpu, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def default_precision(device: torch.device) -> str:
    """The type to multiply matrices in: bfloat16 where the hardware has it, float16
    where only that is fast (T4, V100; it needs loss scaling), or float32.

    # DIFFERS: the first paper's authors trained in float16 and tested in float32, the
    # second's did both in float32. bfloat16 has float32's range: no loss scaling.
    """
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return ("bfloat16" if capability >= (8, 0) else
                "float16" if capability >= (7, 0) else "float32")
    # A CPU without these units imitates bfloat16, slowly. Linux tells; elsewhere say
    # --precision bfloat16 where you know better.
    cpu = Path("/proc/cpuinfo")
    units = cpu.read_text() if device.type == "cpu" and cpu.is_file() else ""
    return "bfloat16" if "amx_bf16" in units or "avx512_bf16" in units else "float32"


def autocast(model: LoopedTransformer) -> torch.autocast:
    """A context that multiplies the model's matrices in its precision."""
    dtype = getattr(torch, model.config.precision)
    return torch.autocast(model.device.type, dtype, enabled=dtype != torch.float32)


def compile_layers(model: LoopedTransformer) -> None:
    """Compile every layer in place. Not the whole model: the loop around its layers may
    turn a different number of times in each step. State-dict names stay as they are."""
    # Where there is no working compiler, go on without, after a warning.
    torch._dynamo.config.suppress_errors = True
    for layer in model.layers:
        layer.compile(dynamic=True)


# --------------------------------------------------------------------------------------
# A worked example: Table 3
# --------------------------------------------------------------------------------------


def parameter_count(config: ModelConfig) -> int:
    """All parameters of a model of this shape."""
    with torch.device("meta"):
        model = LoopedTransformer(config)
    return sum(weight.numel() for weight in model.parameters())


def main() -> None:
    """Print the worked example."""
    print("Effective depth 16, with the authors' vocabulary of 19 tokens and table of\n"
          "512 rows. The paper prints 122 million parameters for the first.\n\n"
          "layers x recurrences   millions")
    for layers, recurrences in ((16, 1), (8, 2), (4, 4), (2, 8), (1, 16)):
        count = parameter_count(ModelConfig(
            vocab_size=19, layers=layers, recurrences=recurrences)) / 1e6
        print(f"{layers:>6} x {recurrences:<11} {count:>10.2f}")


if __name__ == "__main__":
    main()
