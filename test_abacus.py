"""Every claim of the five files, held against an independent oracle.

`pytest` runs all of it in a minute or two on two CPU cores. An oracle is Python
integers, a slow loop, the formula written out, or a model whose weights are set by
hand. The name of a test is the claim. No test asserts what a trained model happens to
have learned.

    1. Tests that teach: ten that say what this project does; read them first
    2. The other oracles: a abacus.py, b data.py, c looped.py, d train.py, e evaluate.py
    3. The plumbing: runs, resuming, bad input, commands
"""

import collections
import contextlib
import doctest
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import xml.etree.ElementTree
from functools import partial
from pathlib import Path

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "2000")                          # see looped.py
os.environ["CUDA_VISIBLE_DEVICES"] = ""         # the CPU alone repeats a run bit by bit

import torch
import torch.nn.functional as F

import abacus
import data
import evaluate
import looped
import train

torch.backends.mps.is_available = lambda: False                  # nor Apple's GPU

HERE = Path(__file__).parent
CPU = torch.device("cpu")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_config(**changes) -> looped.ModelConfig:
    return looped.ModelConfig(**{"width": 32, "heads": 2, "ffn_width": 32, "layers": 2,
                                 "recurrences": 3, "state_noise": 0.0,
                                 "max_positions": 1024} | changes)


def small_model(seed: int = 0, **changes) -> looped.LoopedTransformer:
    torch.manual_seed(seed)
    return looped.LoopedTransformer(small_config(**changes)).eval()


def job(model, task="addition", digits=2, samples=50, **changes) -> evaluate.Job:
    """A Job of `laptop` with these changes, to settings and to options of the task."""
    settings = train.preset("laptop", task)
    options = {key: changes.pop(key, value)
               for key, value in settings["options"].items()}
    return evaluate.Job(model, settings | {
        "train_digits": digits, "eval_digits": digits, "eval_every": 1,
        "options": options} | changes, digits, samples)


def laptop_run(task="addition", **changes) -> train.Run:
    """A new run of `laptop` in float32, with these changes to its settings."""
    return train.start(train.preset("laptop", task) | changes, CPU)


def watched(monkeypatch, owner, name: str) -> list[tuple]:
    """A list of every call of owner.name from now on: arguments, keywords, result."""
    inner, calls = getattr(owner, name), []

    def watch(*arguments, **keywords):
        calls.append((arguments, keywords, inner(*arguments, **keywords)))
        return calls[-1][2]
    monkeypatch.setattr(owner, name, watch)
    return calls


def causal(T: int) -> torch.Tensor:
    """The causal mask, to be added to (T, T) scores."""
    return torch.full((T, T), -torch.inf).triu(1)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return data.sample_batch("addition", 8, 5, generator())[0]


def parts(problem: str) -> tuple[str, str, str, str]:
    """(a, operator, b, answer) of a problem without its end token, each as people write
    numbers."""
    found = re.fullmatch(r"(\d+)(\D)(\d+)=(.*)", problem)
    return tuple(part[::-1] for part in found.groups())


def split(line: torch.Tensor) -> list[tuple[str, str, str, str]]:
    """The same of each problem of a context."""
    text = data.decode(line).rstrip("_")
    assert text.endswith("$")
    return [parts(problem) for problem in text[:-1].split("$")]


def circuit() -> looped.LoopedTransformer:
    """A model whose circuit is known, for `add` with two digits: D1 D0 + D'1 D'0 = + A2
    A1 A0 $. At the token before A1 and A0 head 1 copies the first operand's digit of
    that column, head 2 the second's, and the MLP is a table of their sums. It knows no
    carries: it is right where there are none.

    Each vector is a few ones: token (15), position (11), and the digits that head 1,
    head 2 and the MLP put out (10 each). A LayerNorm of so many ones can be undone.
    """
    config = looped.ModelConfig(
        vocab_size=15, width=56, heads=2, ffn_width=100, layers=1, recurrences=1,
        input_injection="none", embeddings="learned", max_positions=11, norm="pre",
        norm_eps=1e-5, ffn="relu", embedding_norm=False, head="norm", state_noise=0.0)
    model = looped.LoopedTransformer(config).eval()
    at, first, second, total = 15, 26, 36, 46                  # where each part begins
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.tokens.weight[:, :15] = torch.eye(15)
        model.added["learned"].embedding.weight[:, at:at + 11] = torch.eye(11)
        layer = model.layers[0]
        q, k, v = layer.attention.qkv.weight.chunk(3)
        for head, (columns, begin) in enumerate((((1, 0), first), ((4, 3), second))):
            row = 28 * head
            for token in range(11):                # tokens 7 and 8 predict A1 and A0
                q[row + columns[token == 7], at + token] = 400.0
                k[row + token, at + token] = 1.0
            v[row:row + 10, :10] = torch.eye(10)
            layer.attention.out.weight[begin:begin + 10, row:row + 10] = torch.eye(10)
        for a, b in itertools.product(range(10), range(10)):
            # relu(a + b - everything / 4), of four ones: 1 where both digits are these.
            layer.ffn.into.weight[10 * a + b] = -0.25
            layer.ffn.into.weight[10 * a + b, first + a] += 1.0
            layer.ffn.into.weight[10 * a + b, second + b] += 1.0
            layer.ffn.out.weight[total + (a + b) % 10, 10 * a + b] = 1.0
        model.decoder.weight[:10, total:total + 10] = 5 * torch.eye(10)
        for token, symbol in ((5, "+"), (6, "0"), (9, "$")):
            model.decoder.weight[data.encode(symbol)[0], at + token] = 10.0
        for norm, ones in ((layer.norm1, 2), (layer.norm2, 4), (model.head, 5)):
            mean = ones / 56
            norm.weight.fill_((mean - mean**2 + 1e-5) ** 0.5)
            norm.bias.fill_(mean)
    return model


# --------------------------------------------------------------------------------------
# 1. Tests that teach
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_digits", [1, 7, 20, 400])
@pytest.mark.parametrize("long_carries", [0.0, 1.0])
def test_sums_agree_with_python_integers_at_any_length(max_digits, long_carries):
    lines, _ = data.sample_batch("addition", 300, max_digits, generator(),
                                 problems_per_context=2, long_carries=long_carries)
    for line in lines:
        problems = split(line)
        assert len(problems) == 2
        for a, _, b, answer in problems:
            assert answer == str(int(a) + int(b))
            for operand in (a, b):
                assert 1 <= len(operand) <= max_digits and operand[0] != "0"


def test_digit_positions_and_number_index_equal_a_slow_loop():
    ids = torch.randint(0, 13, (200, 40), generator=generator())
    ids[0] = 11                                     # more separators than vectors
    is_digit, is_start, is_end = ids < 10, ids == 11, ids == 12
    offset = torch.randint(0, 50, (200, 1), generator=generator(1))
    expected, number = torch.zeros_like(ids), torch.zeros_like(ids)
    for row in range(200):
        run = separators = 0
        for column in range(40):
            run = run + 1 if is_digit[row, column] else 0
            expected[row, column] = run
            if column and is_end[row, column - 1]:
                separators = 0
            separators += int(not is_digit[row, column] and not is_end[row, column])
            # An operator belongs to the number after it, an end token to what follows.
            number[row, column] = 0 if is_end[row, column] else min(separators, 15)
    moved = torch.where(is_digit, expected + offset, 0)
    assert torch.equal(abacus.digit_positions(is_digit), expected)
    assert torch.equal(abacus.digit_positions(is_digit, offset), moved)
    assert torch.equal(abacus.digit_positions(is_digit, offset, is_start),
                       torch.where(is_start, offset, moved))
    assert torch.equal(abacus.number_index(is_digit, is_end), number)


def test_fire_equals_its_formula_pair_by_pair():
    torch.manual_seed(0)
    fire = abacus.FIRE(3, init_L=6.0)
    fire.c.data, fire.L_multiplier.data = torch.tensor(0.3), torch.tensor(0.5)
    bias = fire(9, "cpu")
    assert bias.shape == (1, 3, 9, 9)
    for i in range(9):
        for j in range(i + 1):
            fraction = math.log(0.3 * (i - j) + 1) / (
                math.log(0.3 * max(i, 3) + 1) + 1e-6)
            expected = fire.mlp(torch.tensor([fraction]))
            assert torch.allclose(bias[0, :, i, j], expected, atol=1e-5)
    assert not fire.init_L.requires_grad
    assert set(fire.state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight",
                                      "mlp.2.bias", "c", "init_L", "L_multiplier"}


@pytest.mark.parametrize("layers, recurrences, millions", [
    (16, 1, 122.27), (8, 2, 63.51), (4, 4, 34.14), (2, 8, 19.45), (1, 16, 12.11)])
def test_parameters_are_those_of_table_3(layers, recurrences, millions):
    count = looped.parameter_count(looped.ModelConfig(
        vocab_size=19, layers=layers, recurrences=recurrences)) / 1e6
    # The paper prints 122; the decimals follow from the authors' code.
    assert count == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("injection", ["none", "recurrence", "layer"])
@pytest.mark.parametrize("norm, embeddings", [
    ("post", "abacus"), ("pre", "abacus+fire"), ("pre", "abacus+rotary")])
def test_the_model_equals_the_paper_written_out(tokens, injection, norm, embeddings):
    model = small_model(input_injection=injection, norm=norm, embeddings=embeddings)
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def layer_norm(x, name):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return scaled * weights[name + ".weight"] + weights[name + ".bias"]

    def glu(x, name):
        a, b = (x @ weights[name + ".into.weight"].T).chunk(2, -1)
        return (F.gelu(a) * b) @ weights[name + ".out.weight"].T

    def attention(x, index):
        name, (B, T, D) = f"layers.{index}.attention", x.shape
        qkv = (x @ weights[name + ".qkv.weight"].T).view(B, T, 3, 2, 16)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                             # (B, H, T, 16)
        if "rotary" in embeddings:             # a pair is a complex number, turned
            angles = torch.arange(T)[:, None] * 10000.0 ** (-torch.arange(8) / 8)
            q, k = (torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)
                    for x in (q, k))
        scores = (q @ k.mH).real / 4.0 + causal(T)
        fire = model.layers[index].attention.fire               # each layer has its own
        scores = scores + fire(T, "cpu").double() if fire else scores
        heads = scores.softmax(dim=-1) @ v
        return heads.transpose(1, 2).reshape(B, T, D) @ weights[name + ".out.weight"].T

    positions = abacus.digit_positions(tokens < 10)
    injected = layer_norm(weights["tokens.weight"][tokens]
                          + weights["added.abacus.embedding.weight"][positions],
                          "embedding_norm")
    state = injected if injection == "none" else torch.zeros_like(injected)
    for _ in range(5):                           # more recurrences than its own 3
        state = state + injected if injection == "recurrence" else state
        for index in range(2):
            name = f"layers.{index}"
            state = state + injected if injection == "layer" else state
            if norm == "post":
                state = layer_norm(state + attention(state, index), name + ".norm1")
                state = layer_norm(state + glu(state, name + ".ffn"), name + ".norm2")
            else:
                state = state + attention(layer_norm(state, name + ".norm1"), index)
                state = state + glu(layer_norm(state, name + ".norm2"), name + ".ffn")
    # The authors' head: one more GLU, the final LayerNorm, a matrix, the decoder.
    head = layer_norm(glu(state, "head.0"), "head.1") @ weights["head.2.weight"].T
    logits = head @ weights["decoder.weight"].T
    for training in (True, False):                        # each attends in its own way
        with torch.set_grad_enabled(training):
            got = model(tokens, recurrences=5).double()
        assert torch.allclose(got, logits, atol=1e-4)


def test_progressive_loss_at_alpha_0_is_the_mean_over_the_answer_tokens(tokens):
    model, is_answer = small_model(), data.answer_mask(tokens)
    log_p = model(tokens).log_softmax(-1)
    terms = [-log_p[b, t - 1, tokens[b, t]] for b in range(len(tokens))
             for t in range(1, tokens.shape[1]) if is_answer[b, t]]
    got = looped.progressive_loss(model, tokens, is_answer, 0.0, generator())
    assert got.item() == pytest.approx((sum(terms) / len(terms)).item(), rel=1e-5)


def test_the_schedule_in_steps_is_the_papers_schedule_on_the_wall_clock():
    settings = train.preset("paper") | {"steps": 4000, "microbatch_size": 1}
    total = sum(train.schedule(settings, step)[0] for step in range(4000))
    small, large, clock = 512, 8192, 0
    for step in range(4000):
        batch, rate = train.schedule(settings, step)
        # A step takes time in proportion to its batch: this is the share of it so far.
        share = (clock + batch / 2) / total
        clock += batch
        expected = min(large, small + (large - small) * share / 0.6)
        assert batch == pytest.approx(expected, rel=0.01)
        trapezoid = min(1, share / 0.1, (1 - share) / 0.1)
        assert rate == pytest.approx(1e-4 * trapezoid, rel=0.02, abs=1e-8)
    # A batch consists of whole microbatches.
    settings["microbatch_size"] = 512
    assert {train.schedule(settings, step)[0] % 512 for step in range(4000)} == {0}


def test_one_teacher_forced_pass_agrees_with_decoding_token_by_token():
    model = circuit()                                      # right where nothing carries
    problems = torch.cat(list(evaluate.cell_problems("add", (2, 2), 300, seed=5)))
    exact = evaluate.is_exact(problems, evaluate.predict(model, problems))
    answers = evaluate.generate(model, problems[:, :6], 5)
    assert torch.equal((answers == problems[:, 6:]).all(dim=1), exact)
    a, b, _ = evaluate.operands(job(None, "add"), problems)
    assert torch.equal(exact, (a + b <= 9).all(dim=1)) and 0 < exact.sum() < 300


def test_an_ablated_node_is_replaced_by_its_mean_as_written_out(monkeypatch):
    model = small_model(1, layers=1, recurrences=1, norm="pre", input_injection="none")
    layer, what = model.layers[0], job(model, digits=2)
    layer.attention.out.weight.data *= 8                    # so that a head can matter
    # The right answer is what the model says: it fails when it says anything else.
    questions = evaluate.questions(what)[:, :6]
    lines = torch.cat((questions, evaluate.generate(model, questions, 4)), dim=1)
    monkeypatch.setattr(evaluate, "questions", lambda _: lines)
    embedded = model.embed(lines, 0)
    qkv = layer.attention.qkv(layer.norm1(embedded)).view(*lines.shape, 3, 2, 16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / 4 + causal(10)
    heads = (scores.softmax(dim=-1) @ v).transpose(1, 2)            # (B, T, H, D / H)

    def said(token, part):
        """Predictions when one part at one token is replaced by its mean."""
        mixed = heads.clone()
        if part < 2:
            mixed[:, token, part] = heads[:, token, part].mean(dim=0)
        x = embedded + layer.attention.out(mixed.flatten(2))
        out = layer.ffn(layer.norm2(x))
        if part == 2:
            out[:, token] = out[:, token].mean(dim=0)
        logits = model.decoder(model.head(x + out))[:, :-1]
        return logits.index_fill(2, torch.tensor(data.PAD), -torch.inf).argmax(dim=-1)

    is_answer = data.answer_mask(lines)[:, 1:]
    found = evaluate.ablate(what)
    assert all(0 < found[0, 0, part, 7]["fails"] < 1 for part in range(3))
    assert set(found) == set(itertools.product((0,), (0,), range(3), range(9)))
    for token, part in itertools.product((5, 6, 7), range(3)):
        wrong = (said(token, part) != lines[:, 1:]) & is_answer
        damage = found[0, 0, part, token]
        assert damage["fails"] == pytest.approx(wrong.any(dim=1).double().mean().item())
        for name, column in (("A0", 5), ("A1", 6), ("A2", 7)):
            assert damage["tokens"].get(name, 0) == pytest.approx(
                wrong[:, column].double().mean().item())


def test_in_training_far_pairs_meet_and_no_position_belongs_to_two_problems(
        monkeypatch):
    calls = watched(monkeypatch, looped, "progressive_loss")
    train.train_step(laptop_run())
    ((_, tokens, _, _, _, offset, *_), _, _), = calls
    positions = abacus.digit_positions(tokens < 10, offset)
    problem = data.count_before(data.END, tokens)
    far = 0
    for line, at, owner in zip(tokens, positions, problem):
        ranges = [at[(owner == n) & (line < 10)].aminmax() for n in range(3)]
        for one, other in itertools.combinations(ranges, 2):
            assert one.max < other.min or other.max < one.min
            far += abs(one.min - other.min) > 20       # farther than any number is long
    assert far > len(tokens)


# --------------------------------------------------------------------------------------
# 2a. The other oracles: abacus.py
# --------------------------------------------------------------------------------------


def test_abacus_moves_digits_by_one_offset_in_training_and_by_none_in_evaluation(
        tokens):
    torch.manual_seed(0)
    module = abacus.Abacus(range(10), 8, max_seq_length=200, max_k=99)
    # A table whose row r holds the number r lets the rows be read off the output.
    module.embedding.weight.data = torch.arange(200.0)[:, None].expand(200, 8).clone()
    positions, before = abacus.digit_positions(tokens < 10), torch.get_rng_state()
    assert torch.equal(module.eval()(tokens)[..., 0].long(), positions)
    assert torch.equal(torch.get_rng_state(), before)            # only training draws
    module.train()
    rows = torch.stack([module(tokens)[..., 0].long() for _ in range(2000)])
    offsets = (rows - positions)[:, tokens < 10]
    assert not rows[:, tokens >= 10].any()                           # row 0 stays
    assert (offsets == offsets[:, :1]).all()                         # one for the batch
    assert set(offsets[:, 0].tolist()) == set(range(100))            # 0..max_k, all


def test_disjoint_offsets_never_share_a_position_and_reach_both_ends():
    offsets = abacus.disjoint_offsets(5000, 3, digits=11, max_offset=40,
                                      generator=generator())
    assert (offsets.sort(dim=1).values.diff(dim=1) >= 11).all()
    assert offsets.min() == 0 and offsets.max() == 40
    # Each problem, also the first, gets low and high ranges alike.
    assert (offsets.float().mean(dim=0) - 20).abs().max() < 1


def test_fire_tells_neighbours_apart_in_16_bits_however_far_they_stand(tokens):
    torch.manual_seed(0)
    fire = abacus.FIRE(2)
    exact, half = fire(600, "cpu"), fire.to(torch.bfloat16)(600, "cpu")
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), exact, atol=0.01)
    # As whole numbers of bfloat16, 595 to 599 are 596 and 600.
    assert half[0, :, 599, 595:].diff().any(dim=0).all()
    for dtype in (torch.bfloat16, torch.float16):
        model = small_model(embeddings="abacus+fire").to(dtype)
        assert model(tokens).dtype == dtype               # with gradients, on a CPU too


def test_fire_goes_into_torchs_own_layers_as_its_docstring_says():
    torch.manual_seed(0)
    B, T, H, fire = 3, 6, 2, abacus.FIRE(2, init_L=3.0)
    layer = torch.nn.TransformerEncoderLayer(16, H, dropout=0.0, batch_first=True)
    x = torch.randn(B, T, 16)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)                         # the TRAP
    try:
        mask = (causal(T) + fire(T, "cpu")).expand(B, H, T, T).reshape(B * H, T, T)
        with torch.no_grad():
            got = layer.eval()(x, src_mask=mask)
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    qkv = F.linear(x, layer.self_attn.in_proj_weight, layer.self_attn.in_proj_bias)
    q, k, v = qkv.view(B, T, 3, H, 8).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) / 8**0.5 + causal(T) + fire(T, "cpu")
    heads = (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    state = layer.norm1(x + layer.self_attn.out_proj(heads))
    expected = layer.norm2(state + layer.linear2(layer.linear1(state).relu()))
    assert torch.allclose(got, expected, atol=1e-5)


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def product(i: int, j: int) -> float:
        def turned(x, position):
            angles = abacus.rotary_angles(torch.tensor([[position]]), 16, 500.0)
            return abacus.rotate(x, angles)
        assert torch.allclose(turned(q, i).norm(), q.norm())
        return float((turned(q, i) * turned(k, j)).sum())

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)
    assert product(0, 0) == pytest.approx(float((q * k).sum()))


def test_the_demonstration_trains_on_right_sums_at_disjoint_offsets():
    random.seed(0)
    tokens, offset = abacus.training_batch(40, generator())
    positions = abacus.digit_positions(tokens < 10, offset)
    lengths = set()
    for line, at in zip(tokens.tolist(), positions):
        text = "".join(abacus.SYMBOLS[token] for token in line)
        problems = text.rstrip("_")[:-1].split("$")
        assert len(problems) == 3
        seen, start = [], 0
        for problem in problems:
            a, b, total = (int(part[::-1]) for part in re.split("[+=]", problem))
            assert a + b == total
            lengths |= {len(str(a)), len(str(b))}
            places = at[start:start + len(problem)]
            seen.append(set(places[places > 0].tolist()))
            start += len(problem) + 1                                    # the end token
        assert all(x.isdisjoint(y) for x, y in itertools.combinations(seen, 2))
    assert lengths == set(range(1, 21)) and positions.max() <= 110 + 21


def test_the_demonstrations_model_is_causal_looped_and_knows_each_digits_place():
    torch.manual_seed(0)
    model = abacus.Adder(width=16)
    tokens = abacus.to_tokens(["321+54=861$7+8=51$"])
    offset = torch.tensor([[40] * 11 + [70] * 7])
    rows = [41, 42, 43, 0, 41, 42, 40, 41, 42, 43, 0, 71, 0, 71, 70, 71, 72, 0]
    numbers = [0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 0, 0, 1, 1, 2, 2, 2, 0]
    injected = model.norm(model.tokens(tokens) + model.abacus.embedding.weight[rows]
                          + model.segments.embedding.weight[numbers])
    state = 0
    for _ in range(2):
        state = model.layer(state + injected, causal(18))
    assert torch.allclose(model(tokens, offset), model.decoder(state), atol=1e-5)


def test_the_demonstration_draws_all_numbers_and_its_loss_falls(monkeypatch, capsys):
    random.seed(0)
    numbers = [abacus.random_number(n) for n in [1] * 40 + [3] * 200]
    assert 10 < numbers[:40].count(0) < 30 and set(numbers[:40]) == set(range(10))
    assert {str(n)[0] for n in numbers[40:]} == set("123456789")
    assert {str(n)[2] for n in numbers[40:]} == set("0123456789")
    monkeypatch.setattr(abacus, "score", lambda *_: 0.0)
    abacus.demonstrate(steps=20, contexts=4)
    losses = [float(loss) for loss in re.findall(r"\d\.\d{4}", capsys.readouterr().out)]
    assert losses[-1] < losses[0] - 0.2


def test_the_demonstration_learns_and_scores_the_answers_alone():
    tokens = abacus.to_tokens(["321+54=861$7+8=51$", "1+1=2$"])
    offset, model = torch.zeros_like(tokens), abacus.Adder(width=16)
    asked = torch.zeros_like(tokens, dtype=torch.bool)
    asked[0, [7, 8, 9, 10, 15, 16, 17]] = asked[1, [4, 5]] = True
    log_p = model(tokens, offset).log_softmax(dim=-1)[:, :-1]
    terms = -log_p.gather(2, tokens[:, 1:, None])[..., 0][asked[:, 1:]]
    loss = abacus.answer_loss(model, tokens, offset)
    assert loss.item() == pytest.approx(terms.mean().item(), rel=1e-5)

    def knows(all_but):
        """A model that is right about every token but this one of the line."""
        def model(tokens, offset):
            following = tokens.roll(-1, dims=1)
            if all_but is not None:
                following[:, all_but - 1] = 13
            return F.one_hot(following, 14).float()
        return model
    # Sums of one digit: a + b = c, then another digit or the end.
    assert abacus.score(knows(None), 1) == abacus.score(knows(2), 1) == 1.0
    assert abacus.score(knows(4), 1) == abacus.score(knows(5), 1) == 0.0


# --------------------------------------------------------------------------------------
# 2b. The other oracles: data.py
# --------------------------------------------------------------------------------------


def test_operands_have_exactly_the_lengths_asked_for_and_uniform_digits():
    lengths = torch.tensor([[[3, 1]]]).expand(20000, 1, 2)
    for zeros in (False, True):
        problems = [split(line)[0] for line in data.make_contexts(
            "addition", lengths, generator(), zeros=zeros)]
        assert {(len(a), len(b)) for a, _, b, _ in problems} == {(3, 1)}
        some = [problem for problem in problems if problem[2] != "0"]
        assert len(some) == pytest.approx(10000 if zeros else 20000, rel=0.05 * zeros)
        for number, place, choices in ((0, 0, "123456789"), (0, 1, "0123456789"),
                                       (0, 2, "0123456789"), (2, 0, "123456789")):
            counts = collections.Counter(p[number][place] for p in some)
            assert set(counts) == set(choices)
            assert max(counts.values()) < 1.15 * len(some) / len(choices)


def test_operand_lengths_are_uniform_and_independent():
    lines, _ = data.sample_batch("addition", 20000, 4, generator())
    counts = collections.Counter((len(a), len(b)) for line in lines
                                 for a, _, b, _ in split(line))
    assert sorted(counts) == list(itertools.product(range(1, 5), range(1, 5)))
    assert all(16 * n / 20000 == pytest.approx(1, abs=0.12) for n in counts.values())


def problems_of(task: str, max_digits: int, count: int = 400, **options) -> list[str]:
    """The text of random problems, without the end token; checks that it is there, that
    the answer is what the loss sees, and that no line is longer than is said."""
    lines, is_answer = data.sample_batch(task, count, max_digits, generator(),
                                         **options)
    texts = [data.decode(line).rstrip("_") for line in lines]
    largest = data.TASKS[task].lengths(torch.tensor([max_digits, max_digits]), None)
    for line, mask, text in zip(lines, is_answer, texts):
        assert text.count("$") == 1 and text.endswith("$")
        assert text.partition("=")[2] == data.decode(line[mask])
        assert len(text) <= data.TASKS[task].tokens(largest, **options)
    return [text[:-1] for text in texts]


SOLVERS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@pytest.mark.parametrize("task, complement", [
    ("subtraction", False), ("subtraction", True), ("both", False), ("both", True)])
@pytest.mark.parametrize("max_digits", [1, 4, 30])
def test_sums_and_differences_agree_with_python_integers(task, complement, max_digits):
    seen = ""
    for share in (0, 1):
        enriched = {name: complement if name == "complement" else type(usual)(share)
                    for name, usual in data.TASKS[task].options.items()
                    if name not in ("minus", "plain_order")}
        for problem in problems_of(task, max_digits, **enriched):
            a, symbol, b, answer = parts(problem)
            for operand in (a, b):
                assert len(operand) <= max_digits
                assert operand[0] != "0" or (operand == "0" and share)
            digits, longer = answer.strip("-"), max(len(a), len(b))
            assert len(digits) <= data.TASKS[task].places(max_digits, max_digits)
            if complement and symbol == "-":                           # -67 is 67 - 100
                assert len(digits) == longer
                answer = str(int(digits) - 10**longer * answer.startswith("-"))
            assert answer == str(SOLVERS[symbol](int(a), int(b)))
            seen += symbol
    assert set(seen) == set(data.TASKS[task].operators)
    assert abs(seen.count("+") / len(seen) - 0.5) < 0.1 or task != "both"


def test_in_plain_order_a_problem_reads_as_people_write_it():
    for plain, reversed_ in zip(*(problems_of("addition", 9, plain_order=order)
                                  for order in (True, False))):
        a, b, answer = map(int, re.split("[+=]", plain))
        assert a + b == answer
        assert "".join(parts(reversed_)[n] for n in (0, 2, 3)) == f"{a}{b}{answer}"


@pytest.mark.parametrize("task, symbols", [("add", "+"), ("sub", "-"), ("mix", "+-")])
@pytest.mark.parametrize("digits", [1, 6, 20])
def test_the_second_papers_format_is_padded_signed_and_right(task, symbols, digits):
    seen = ""
    for share in (0.0, 1.0):
        enriched = {name: share for name in data.TASKS[task].options if name != "minus"}
        for problem in problems_of(task, digits, **enriched):
            a, symbol, b, sign, answer = re.fullmatch(
                r"(\d+)([+-])(\d+)=([+-])(\d+)", problem).groups()
            assert (len(a), len(b), len(answer)) == (digits, digits, digits + 1)
            assert int(sign + answer) == SOLVERS[symbol](int(a), int(b))
            assert sign == "+" or int(answer) > 0
            seen += symbol
    assert set(seen) == set(symbols)
    assert task != "mix" or 0.6 < seen.count("-") / len(seen) < 0.72
    if task == "mix":
        some = problems_of(task, digits, minus=0.1)
        assert 0.03 < sum("-" in text.split("=")[0] for text in some) / len(some) < 0.2


def carries(line: torch.Tensor) -> str:
    """Which columns of a sum carry, the slow way: "0110", units first."""
    (a, _, b, _), = split(line)
    found = "0"
    for x, y in itertools.zip_longest(a[::-1], b[::-1], fillvalue="0"):
        found += "01"[int(x) + int(y) + int(found[-1]) > 9]
    return found[1:]


@pytest.mark.parametrize("sizes", [(15, 15), (15, 4), (4, 15)])
def test_long_carries_make_the_chains_that_uniform_digits_lack(sizes):
    lengths = torch.tensor([[sizes]]).expand(2000, 1, 2)

    def chains(**settings):
        lines = data.make_contexts("addition", lengths, generator(), **settings)
        return [max(map(len, carries(line).split("0"))) for line in lines]
    uniform, enriched = (sum(chain >= 12 for chain in chains(long_carries=share))
                         for share in (0.0, 1.0))
    assert enriched > 1.5 * uniform + 20
    assert set(chains(full_carries=True)) == {15}       # from the units to the very top


def equal_columns(problems: list[tuple[str, str, str, str]]) -> float:
    """The mean share of the columns of both operands that have equal digits."""
    return sum(sum(x == y for x, y in zip(a[::-1], b[::-1])) / min(len(a), len(b))
               for a, _, b, _ in problems) / len(problems)


def test_long_borrows_make_equal_columns_in_differences():
    uniform, enriched = (
        equal_columns([*map(parts, problems_of("subtraction", 15, long_borrows=share))])
        for share in (0.0, 1.0))
    assert uniform < 0.2 and enriched > 0.4


@pytest.mark.parametrize("task", ["sub", "subtraction", "mix", "both"])
def test_raised_digits_make_more_differences_negative_and_leave_sums_alone(task):
    plain, raised = (list(map(parts, problems_of(task, 6, negatives=share)))
                     for share in (0.0, 1.0))
    for before, after in zip(plain, raised):
        assert before[:2] == after[:2] and len(before[2]) == len(after[2])
        assert all(x <= y for x, y in zip(before[2], after[2]))
        assert before == after or before[1] == "-"
    negative = [sum("-" in answer for *_, answer in each) for each in (plain, raised)]
    assert negative[1] > negative[0]


@pytest.mark.parametrize("max_digits", [1, 4, 30])
def test_products_agree_with_python_integers(max_digits):
    for text in problems_of("multiplication", max_digits, zeros=True):
        a, symbol, b, answer = parts(text)
        assert symbol == "*" and answer == str(int(a) * int(b))
        assert len(answer) <= data.TASKS["multiplication"].places(len(a), len(b))


@pytest.mark.parametrize("digits", [1, 2, 5])
def test_zeros_pad_products_and_their_rows_are_those_of_school(digits):
    options = {"zeros": True, "padded_to": digits}
    texts = problems_of("multiplication", digits, **options)
    lines, _ = data.sample_batch("multiplication", 400, digits, generator(), **options)
    beside = data.school_rows(lines, digits, digits)
    assert beside.shape == (*lines.shape, data.row_count(digits))
    lengths = set()
    for text, rows in zip(texts, beside):
        a, symbol, b, answer = parts(text)
        assert symbol == "*" and int(answer) == int(a) * int(b)
        assert (len(a), len(b), len(answer)) == (digits, digits, 2 * digits)
        lengths.add((len(str(int(a))), len(str(int(b)))))
        products = [int(a) * int(digit) * 10**place
                    for place, digit in enumerate(b[::-1])]
        expected = products[:1]
        for place in range(1, digits):
            expected += [products[place], sum(products[:place + 1])]
        rows, first = rows.T.tolist(), len(text) - 2 * digits
        # A digit stands beside each of the answer's, and nothing beside other tokens.
        assert all(row[:first] + row[-1:] == [-100] * (first + 1) for row in rows)
        said = [int("".join(map(str, row[first:-1]))[::-1]) for row in rows]
        assert said == (expected[:-1] if digits > 1 else expected)
    assert lengths == set(itertools.product(range(1, digits + 1), repeat=2))
    short = data.make_contexts("multiplication", torch.ones(4, 1, 2).long(),
                               generator(), padded_to=digits)
    assert short.shape[1] == lines.shape[1] == 4 * digits + 3


def test_a_share_of_padded_products_has_all_digits():
    for digits, share in itertools.product((1, 2, 5), (0.5, 1.0)):
        texts = problems_of("multiplication", digits, 2000, padded_to=digits,
                            longest=share)
        full = sum(a[0] != "0" != b[0] for a, _, b, _ in map(parts, texts)) / 2000
        assert full == pytest.approx(share + (1 - share) / digits**2, abs=0.04)


@pytest.mark.parametrize("enriched", [{}, {"long_carries": 0.5, "negatives": 0.5}])
def test_problems_of_a_context_share_their_operator_and_contexts_do_not(enriched):
    tokens, _ = data.sample_batch("both", 400, 6, generator(), problems_per_context=3,
                                  **enriched)
    shared = [{symbol for _, symbol, *_ in split(line)} for line in tokens]
    assert all(len(symbols) == 1 for symbols in shared)
    assert shared.count({"-"}) == pytest.approx(200, abs=40)


def test_problems_of_a_context_share_their_factor_of_two_digits_and_have_rows():
    tokens, _ = data.sample_batch("nx2", 100, 5, generator(), problems_per_context=3)
    factors = set()
    for line, rows in zip(tokens, data.school_rows(tokens, 5, 2, 3)):
        problems, expected, nothing = split(line), [], [[-100, -100]]
        for a, symbol, b, answer in problems:
            assert symbol == "*" and int(answer) == int(a) * int(b)
            partial_products = [f"{int(a) * factor:0{len(answer)}}"[::-1]
                                for factor in (int(b[1]), int(b[0]) * 10)]
            expected += nothing * len(f"{a}*{b}=")
            expected += [[*map(int, pair)] for pair in zip(*partial_products)] + nothing
        assert rows.tolist() == expected + nothing * (len(rows) - len(expected))
        (factor,) = {b for _, _, b, _ in problems}
        assert len(problems) == 3 and len(factor) == 2
        factors.add(factor)
    assert len(factors) > 40


@pytest.mark.parametrize("max_digits", [1, 20])
def test_or_has_one_one_in_the_shorter_vector_and_the_longer_length(max_digits):
    spots, first_holds = set(), []
    for problem in problems_of("or", max_digits, 2000):
        a, b, answer = re.split("[|=]", problem)
        assert answer == "".join(map(max, itertools.zip_longest(a, b, fillvalue="0")))
        assert set(a + b) <= set("01") and (a + b).count("1") == 1
        if len(a) != len(b):
            assert "1" in min(a, b, key=len)
        else:
            first_holds.append("1" in a)
        spots.add(answer.index("1"))
    assert spots == set(range(max_digits))
    assert 0.3 < sum(first_holds) / len(first_holds) < 0.7


@pytest.mark.parametrize("close_numbers", [0.0, 1.0])
@pytest.mark.parametrize("size", [1, 3, 10, 30])
@pytest.mark.parametrize("plain_order", [False, True])
def test_sorting_agrees_with_pythons_stable_sort(size, close_numbers, plain_order):
    ties, sizes, order = 0, set(), 1 if plain_order else -1
    for problem in problems_of("sorting", size, 200, close_numbers=close_numbers,
                               plain_order=plain_order):
        question, answer = problem.split("=")
        items = [(name, number[::order]) for name, number in (
            item.split(":") for item in question.split(","))]
        assert "".join(name for name, _ in items) in 2 * data.LETTERS       # a circle
        assert all(number[0] != "0" and len(number) <= size for _, number in items)
        items.sort(key=lambda item: int(item[1]))
        assert answer == ",".join(name for name, _ in items)
        ties += len({number for _, number in items}) < len(items)
        sizes.add(len(items))
    assert (min(sizes), max(sizes)) == (1, size) and (ties or size == 1)


def test_letters_stand_in_a_row_on_their_circle_or_leave_some_out():
    for share in (0.0, 0.5, 1.0):
        names = [re.sub("[^a-z]", "", problem.split("=")[0]) for problem in problems_of(
            "sorting", 3, 900, letters=7, letter_gaps=share)]
        names = [name for name in names if len(name) == 3]
        steps = [[(ord(b) - ord(a)) % 7 for a, b in zip(name, name[1:])]
                 for name in names]
        assert all(sum(step) < 7 for step in steps)                # once around at most
        # Three of seven letters stand in a row in one case of seven.
        in_a_row = steps.count([1, 1]) / len(steps)
        assert in_a_row == pytest.approx(1 - share * 6 / 7, abs=0.12)
        assert set("".join(names)) == set(data.LETTERS[:7])


def test_numbers_of_one_length_leave_the_order_to_their_digits():
    for share, expected in ((0.0, 0.25), (0.5, 0.625), (1.0, 1.0)):     # of two numbers
        lengths = data.list_lengths(torch.tensor([[4, 2]]).expand(2000, 2), generator(),
                                    one_length=share)
        equal = (lengths[:, 0] == lengths[:, 1]).double().mean()
        assert equal == pytest.approx(expected, abs=0.04)
    assert (lengths == 4).all()
    for problem in problems_of("sorting", 4, one_length=1.0):
        items = problem.partition("=")[0].split(",")
        assert len({len(item) for item in items}) == 1


def test_close_numbers_share_their_first_digits():
    def alike(problem):
        firsts = [item[-1] for item in problem.split("=")[0].split(",")]
        return all(first == firsts[0] for first in firsts) and len(firsts) > 3
    shares = [sum(map(alike, problems_of("sorting", 8, close_numbers=value)))
              for value in (0.0, 1.0)]
    assert shares[0] < 3 and shares[1] > 30


@pytest.mark.parametrize("task, options, last", [
    ("addition", {}, "_"), ("subtraction", {}, "-"), ("both", {}, "-"), ("or", {}, "|"),
    ("multiplication", {}, "*"), ("sorting", {}, data.LETTERS[-1]),
    ("sorting", {"letters": 26}, "z"), ("add", {}, "-")])
def test_a_model_knows_the_tokens_up_to_the_last_that_its_task_uses(
        task, options, last):
    size = data.vocabulary_size(task, **options)
    assert data.VOCABULARY[size - 1] == last
    assert data.sample_batch(task, 200, 9, generator(), **options)[0].max() < size


def test_the_answer_mask_covers_answer_and_end_token_of_every_problem():
    line = torch.tensor([data.encode("321+54=861$1+9=01$2*3=6$__")])
    expected = "       ^^^^    ^^^    ^^  "
    assert "".join(" ^"[int(m)] for m in data.answer_mask(line)[0]) == expected
    problem = data.count_before(data.END, line)
    assert problem[0].tolist() == [0] * 11 + [1] * 7 + [2] * 6 + [3] * 2


@pytest.mark.parametrize("task", ["addition", "multiplication"])
def test_problems_are_dealt_evenly_and_none_is_lost(task):
    lengths = torch.randint(1, 11, (3, 200, 2), generator=generator())
    dealt = data.deal(task, lengths, generator())
    assert dealt.shape == (200, 3, 2)
    assert sorted(map(tuple, dealt.view(-1, 2).tolist())) == sorted(
        map(tuple, lengths.view(-1, 2).tolist()))
    size = data.context_tokens(task, dealt).float()
    unsorted = data.context_tokens(task, lengths.transpose(0, 1)).float()
    assert size.std() < 0.3 * unsorted.std() and (size.diff() >= 0).all()
    # The place in the context tells nothing about the length.
    assert dealt.sum(dim=-1).float().mean(dim=0) == pytest.approx([11, 11, 11], abs=1)


def test_microbatches_are_one_batch_with_little_padding():
    batch = data.sample_microbatches("addition", 1000, 64, 20, generator())
    lines = [tokens for tokens, _ in batch]
    assert [len(tokens) for tokens in lines] == [64] * 15 + [40]
    real = sum(int((tokens != data.PAD).sum()) for tokens in lines)
    assert real / sum(tokens.numel() for tokens in lines) > 0.9


def test_labels_make_up_the_answers_of_all_pairs_of_three_digits():
    numbers = torch.arange(1000)[:, None] // torch.tensor([1, 10, 100]) % 10
    a, b = numbers.repeat_interleave(1000, 0), numbers.repeat(1000, 1)
    powers = 10 ** torch.arange(3)
    x, y = (a * powers).sum(dim=1), (b * powers).sum(dim=1)
    labels = data.digit_labels(a, b)
    for kind, truth, rows in (("S", x + y, x == x), ("M", x - y, x >= y),
                              ("N", y - x, x < y)):
        digits = data.answer_from_labels(kind, *labels[kind])
        assert torch.equal(digits[rows][:, :-1], (truth[:, None] // powers % 10)[rows])
        top = truth // 10 ** a.shape[1] if kind == "S" else 0 * truth
        assert torch.equal(digits[rows][:, -1], top[rows])


@pytest.mark.parametrize("question, name", [
    ("123+456", "S0"), ("105+205", "S1"), ("195+205", "S2"), ("999+001", "S3"),
    ("555+555", "S1"), ("195+905", "S2"), ("456-123", "M0"), ("450-105", "M1"),
    ("400-105", "M2"), ("511-401", "M0"), ("123-123", "M0"), ("105-450", "N1"),
    ("123-456", "N0"), ("401-500", "N2"),
    ("1" + 18 * "9" + "5+" + 19 * "0" + "5", "S19")])
def test_questions_are_classed_by_their_longest_cascade(question, name):
    a, symbol, b = re.fullmatch(r"(\d+)(.)(\d+)", question).groups()
    digits = [torch.tensor([[int(d) for d in n[::-1]]]) for n in (a, b)]
    assert data.question_class(*digits, torch.tensor([[symbol == "-"]])) == [name]


# --------------------------------------------------------------------------------------
# 2c. The other oracles: looped.py
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("embeddings", [
    "none", "abacus", "learned", "fire", "rotary", "digit_rotary", "abacus+fire",
    "abacus+rotary", "digit_rotary+segment+fire"])
def test_a_token_sees_only_what_stands_before_it(embeddings):
    model = small_model(embeddings=embeddings)
    lines = next(evaluate.cell_problems("addition", (4, 3), 6, seed=0))
    whole = model(lines)
    for end in (1, 9, 10, 13):
        assert torch.allclose(model(lines[:, :end]), whole[:, :end], atol=1e-5)
    assert whole.std(dim=0).max() > 0.1


def test_the_second_papers_model_has_relu_and_less_around_its_layers(tokens):
    model = small_model(ffn="relu", layers=1, recurrences=1, norm="pre", norm_eps=1e-5,
                        embedding_norm=False, head="norm", embeddings="learned",
                        input_injection="none")
    layer, x = model.layers[0], torch.randn(2, 5, 32)
    into, out = layer.ffn.into.weight, layer.ffn.out.weight
    assert torch.allclose(layer.ffn(x), F.relu(x @ into.T) @ out.T, atol=1e-6)
    embedded = model.tokens(tokens) + model.added["learned"](tokens)
    expected = model.decoder(model.head(layer(embedded, bias=causal(tokens.shape[1]))))
    assert isinstance(model.head, torch.nn.LayerNorm) and model.head.eps == 1e-5
    assert torch.allclose(model(tokens), expected, atol=1e-5)


def test_initial_weights_follow_the_depth_and_biases_start_at_0():
    model = small_model(width=512, heads=4, ffn_width=512, embeddings="abacus+fire")
    gain = (8 * 2 * 3) ** -0.25
    q, k, v = model.layers[0].attention.qkv.weight.chunk(3)
    wide = model.layers[0].ffn.into.weight                          # 512 -> 2 x 512
    for weight, std in ((q, 512 ** -0.5), (k, 512 ** -0.5), (v, gain * 512 ** -0.5),
                        (model.layers[1].attention.out.weight, gain * 512 ** -0.5),
                        (wide, gain * (2 / 1536) ** 0.5),
                        (model.added["abacus"].embedding.weight, 512 ** -0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
    for layer in model.layers:
        into, _, out = layer.attention.fire.mlp
        assert not into.bias.any() and not out.bias.any()


def test_a_table_of_sines_turns_each_row_into_the_next_by_one_rotation():
    model = small_model(init="sines", rotary_base=500.0)
    table = model.added["abacus"].embedding.weight.data
    cos, sin = table.chunk(2, dim=1)
    angle = 500.0 ** (-2 * torch.arange(16) / 32)                      # 16 pairs of 32
    turned = torch.cat((cos * angle.cos() - sin * angle.sin(),
                        cos * angle.sin() + sin * angle.cos()), dim=1)
    assert torch.allclose(turned[:-1], table[1:], atol=1e-4)
    assert table.norm(dim=1).mean().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("injection", ["none", "recurrence"])
def test_the_state_starts_from_noise_of_the_given_size(tokens, injection):
    model = small_model(state_noise=0.02, recurrences=1, input_injection=injection)
    seen = []
    model.recur = lambda state, *rest: seen.append(state) or state
    model(tokens)
    noise = seen[0] - model.embed(tokens, 0) * (injection == "none")
    assert noise.std().item() == pytest.approx(0.02, rel=0.05)


def test_equals_asks_from_position_0_of_its_own_problem():
    line = torch.tensor([data.encode("321+54=8")])
    for equals_position, as_query in (("no", 0), ("units", 40)):
        model = small_model(embeddings="digit_rotary", equals_position=equals_position)
        for angles, at_equals in zip(model.angles(line, 40), (as_query, 0)):
            positions = torch.tensor([[41, 42, 43, 0, 41, 42, at_equals, 41]])
            expected = abacus.rotary_angles(positions, 16, model.config.rotary_base)
            assert all(map(torch.equal, angles, expected))


def test_equals_gets_the_row_below_its_problems_units_and_row_0_stays_for_the_others():
    model = small_model(embeddings="abacus", equals_position="units")
    line = torch.tensor([data.encode("321+54=861$7+8=")])
    offset = torch.tensor([[40] * 11 + [70] * 4])
    rows = torch.tensor([[41, 42, 43, 0, 41, 42, 40, 41, 42, 43, 0, 71, 0, 71, 70]])
    expected = model.tokens(line) + model.added["abacus"].embedding(rows)
    assert torch.allclose(model.embed(line, offset), model.embedding_norm(expected))


def test_a_second_number_stays_where_it_is_whatever_the_offset(monkeypatch):
    model = small_model(embeddings="abacus", equals_position="units", fixed_second=True)
    line = torch.tensor([data.encode("321+54=861$7+8=51$")])
    looked_up = watched(monkeypatch, model.added["abacus"].embedding, "forward")
    for offset in (40, torch.tensor([[40] * 11 + [70] * 7])):
        model(line, offset=offset)
    first = [41, 42, 43, 0, 1, 2, 40, 41, 42, 43, 0]
    assert [rows.tolist() for (rows,), *_ in looked_up] == [
        [first + [41, 0, 1, 40, 41, 42, 0]], [first + [71, 0, 1, 70, 71, 72, 0]]]


def test_an_offset_left_out_is_random_in_training_and_the_tests_own_outside(tokens):
    model, drawn = small_model(max_offset=7, test_offset=5), []
    said, inner = model(tokens, offset=5), model.embed
    model.embed = lambda line, at: drawn.append(int(at)) or inner(line, at)
    assert torch.equal(model(tokens), said) and drawn == [5]
    for _ in range(100):
        model.train()(tokens)
    assert set(drawn[1:]) == set(range(8))


def test_no_gradient_flows_through_the_first_recurrences(tokens, monkeypatch):
    model = small_model(recurrences=4)
    calls = watched(monkeypatch, model, "recur")
    model(tokens, recurrences=2, without_gradient=2).sum().backward()
    assert [state.requires_grad for *_, state in calls] == [False, False, True, True]


def test_all_weights_learn_in_16_bits_after_recurrences_without_gradient(tokens):
    model, gradients = small_model(), []
    for precision in ("float32", "bfloat16"):
        model.config.precision = precision
        with looped.autocast(model):
            logits = model(tokens, recurrences=1, without_gradient=2)
        logits.float().logsumexp(dim=-1).sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
        model.zero_grad(set_to_none=True)
    for exact, rounded in zip(*gradients):
        assert 0 < (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("full", [1, 2, 5])
def test_progressive_loss_draws_every_legal_pair_and_no_other(tokens, full):
    model, drawn = small_model(recurrences=full), []
    inner = model.forward
    model.forward = lambda tokens, recurrences=None, offset=None, without_gradient=0: (
        drawn.append((without_gradient, recurrences)) or inner(tokens, 1))
    line, source = tokens[:1], generator()
    for _ in range(400):
        looped.progressive_loss(model, line, data.answer_mask(line), 1.0, source)
    most = {1: 1, 2: 1, 5: 2}[full]                                # max(full // 2, 1)
    assert set(drawn) == {(n, k) for n in range(full)
                          for k in range(1, min(full - n, most) + 1)}
    first = sum(n == 0 for n, _ in drawn)
    assert first == pytest.approx(400 / full, abs=40)               # n is uniform


@pytest.mark.parametrize("recurrences", [1, 3])
def test_alpha_mixes_full_and_random_pass(tokens, recurrences):
    model, is_answer = small_model(recurrences=recurrences), data.answer_mask(tokens)
    full, mixed, random_pass = (
        looped.progressive_loss(model, tokens, is_answer, alpha, generator(1)).item()
        for alpha in (0.0, 0.3, 1.0))
    assert mixed == pytest.approx(0.7 * full + 0.3 * random_pass, rel=1e-5)
    # With one recurrence both passes are the same.
    assert (random_pass == pytest.approx(full, rel=1e-5)) == (recurrences == 1)


def test_the_auxiliary_loss_is_the_mean_over_its_rows_and_leaves_answers_alone():
    tokens, is_answer = data.sample_batch("multiplication", 8, 2, generator(),
                                          padded_to=2)
    model = small_model(vocab_size=17, auxiliary_digits=2)
    auxiliary = data.school_rows(tokens, 2, 2)
    # 21*54=0450$: the digits of the answer are the tokens 6 to 9, its end is 10.
    log_p, told = model(tokens).split((17, 20), dim=-1)
    log_p, told = log_p.log_softmax(-1), told.unflatten(-1, (10, 2)).log_softmax(-2)
    answer = [-log_p[b, t - 1, tokens[b, t]] for b in range(8) for t in range(6, 11)]
    rows = [-told[b, t - 1, auxiliary[b, t, row], row] / 2
            for b in range(8) for t in range(6, 10) for row in range(2)]
    got = looped.progressive_loss(model, tokens, is_answer, 0.0, generator(),
                                  auxiliary=auxiliary, auxiliary_weight=0.3)
    assert got.item() == pytest.approx(
        ((sum(answer) + 0.3 * sum(rows)) / len(answer)).item(), rel=1e-5)
    run = laptop_run("multiplication", batch_size=4)
    before = run.model.decoder.weight.clone()
    train.train_step(run)
    assert (run.model.decoder.weight != before).any(dim=1)[17:].all()
    # However likely, what stands beside a token is never said in its place.
    before = evaluate.predict(model, tokens)
    model.decoder.weight.data[17:] *= 1000
    assert torch.equal(evaluate.predict(model, tokens), before)


@pytest.mark.parametrize("flags, precision", [
    ("fpu avx512_bf16 sse", "bfloat16"), ("amx_bf16 fpu", "bfloat16"),
    ("fpu avx2", "float32")])
def test_a_cpu_multiplies_in_16_bits_where_it_has_the_units(
        monkeypatch, flags, precision):
    monkeypatch.setattr(Path, "read_text", lambda path: f"flags : {flags}\n")
    monkeypatch.setattr(Path, "is_file", lambda path: True)
    assert looped.default_precision(CPU) == precision


@pytest.mark.parametrize("cuda, mps, capability, expected", [
    (1, True, (8, 0), ("cuda:0", "paper", "bfloat16")),
    (1, True, (7, 5), ("cuda:0", "paper", "float16")),
    (1, False, (6, 1), ("cuda:0", "paper", "float32")),
    (0, True, None, ("mps", "laptop", "float32"))])
def test_the_best_device_is_taken_and_cuda_gets_the_papers_model(
        monkeypatch, cuda, mps, capability, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    _, device, settings, _ = train.read_flags([])
    assert (str(device), settings["preset"], settings["precision"]) == expected
    assert train.read_flags(["--device", "cpu"])[1] == CPU


@pytest.mark.filterwarnings("ignore::DeprecationWarning")               # torch's own
def test_compiled_layers_keep_their_names_and_their_answers(tokens):
    model = small_model()
    before, names = model(tokens), set(model.state_dict())
    with torch.compiler.set_stance("force_eager"):
        looped.compile_layers(model)
        assert torch.equal(model(tokens), before) and set(model.state_dict()) == names
    assert all(layer._compiled_call_impl for layer in model.layers)


def test_an_embedding_of_ones_own_is_a_module_and_a_line(monkeypatch):
    class Parity(torch.nn.Embedding):
        def forward(self, tokens, offset, is_start):
            return super().forward(tokens % 2)
    monkeypatch.setitem(looped.ADDED, "own", lambda c: Parity(2, c.width))
    monkeypatch.setattr(looped, "EMBEDDINGS", (*looped.EMBEDDINGS, "own"))
    run = laptop_run(embeddings="abacus+own")
    before = run.model.added["own"].weight.clone()
    train.train_step(run)
    assert (run.model.added["own"].weight != before).all()


# --------------------------------------------------------------------------------------
# 2d. The other oracles: train.py
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", data.TASKS)
@pytest.mark.parametrize("preset", ["paper", "laptop", "far"])
def test_every_preset_starts_on_every_task_and_its_numbers_are_no_longer_than_said(
        preset, task):
    if preset == "far" and task not in ("addition", "subtraction", "both", "or", "nx2"):
        with pytest.raises(ValueError, match="--preset far does not fit"):
            train.preset(preset, task)
        return
    settings = train.preset(preset, task)
    settings |= {"width": 2 * settings["heads"], "ffn_width": 8}
    (lines, is_answer), = train.sample(train.start(settings, CPU), 16)
    digits = settings["train_digits"]
    positions = abacus.digit_positions(lines < 10)
    assert positions[~is_answer].max() <= digits and is_answer.any()
    assert positions[is_answer].max() <= data.TASKS[task].places(digits, digits)


def test_the_cosine_schedule_rises_for_its_warmup_and_falls_to_zero_along_a_cosine():
    settings = train.preset("paper", "add") | {"steps": 1000, "learning_rate": 1.0}
    rates = [train.schedule(settings, step)[1] for step in range(1000)]
    for step in (50, 150, 250, 500, 999):
        done = (step + 0.5) / 1000
        expected = done / 0.2 if done < 0.2 else (
            1 + math.cos(math.pi * (done - 0.2) / 0.8)) / 2
        assert rates[step] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", ["microbatch", "context"])
def test_offsets_lie_apart_and_are_drawn_once_for_all_contexts_or_for_each(kind):
    settings = train.preset("laptop") | {"offsets": kind, "train_digits": 3,
                                         "max_offset": 50}
    offsets = train.sample_offsets(settings, 2000, generator())
    assert offsets.shape == (2000, 3) and offsets.min() >= 0 and offsets.max() <= 50
    # 4 apart: 3 digits, and one of a carry.
    assert offsets.sort(dim=1).values.diff(dim=1).min() >= 4
    drawn = len(offsets.unique(dim=0))
    assert drawn == 1 if kind == "microbatch" else drawn > 1000


def test_the_options_of_a_task_reach_its_problems_and_no_others():
    for task, known in data.TASKS.items():
        settings = train.preset("laptop", task)
        assert settings["options"].keys() == known.options.keys() <= data.OPTIONS.keys()
    options = train.preset("laptop", "both")["options"] | {
        "minus": 1.0, "complement": True, "long_borrows": 1.0}
    (lines, _), = train.sample(laptop_run("both", options=options), 64)
    problems = [problem for line in lines for problem in split(line)]
    assert {symbol for _, symbol, _, _ in problems} == {"-"}
    assert all(len(answer.strip("-")) == max(len(a), len(b))
               for a, _, b, answer in problems)
    assert equal_columns(problems) > 0.4


def test_a_step_passes_on_alpha_and_what_is_to_be_learned(monkeypatch):
    calls = watched(monkeypatch, looped, "progressive_loss")
    for question_loss, alpha in ((False, 0.0), (True, 0.25)):
        train.train_step(laptop_run(question_loss=question_loss, alpha=alpha))
        (_, tokens, is_learned, its_alpha, *_), _, _ = calls[-1]
        expected = tokens != data.PAD if question_loss else data.answer_mask(tokens)
        assert torch.equal(is_learned, expected) and its_alpha == alpha


def test_a_batch_has_the_same_gradient_however_it_is_cut(monkeypatch):
    batch = data.sample_batch("addition", 64, 10, generator())
    gradients, losses = [], []
    for microbatch in (64, 16):
        run = laptop_run(batch_size=64, microbatch_size=microbatch, max_offset=0,
                         test_offset=0, problems_per_context=1, grad_clip=1e9)
        # The same problems either way: cut one batch, instead of drawing it in parts.
        monkeypatch.setattr(data, "sample_microbatches", lambda *_, **__: zip(
            *(part.split(microbatch) for part in batch)))
        run.optimizer.zero_grad = lambda **_: None
        losses.append(train.train_step(run)[0].item())
        gradients.append(torch.cat([w.grad.flatten() for w in run.model.parameters()]))
    assert torch.allclose(*gradients, atol=1e-6)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_update_is_adamw_written_out_and_decays_matrices_and_fires_scalars_alone():
    # Gradients so small that the epsilon of 1e-12 matters, and a large decay.
    run = laptop_run(embeddings="abacus+fire", grad_clip=1e-9, weight_decay=5.0,
                     warmup=0.0)
    learned = [w for w in run.model.parameters() if w.requires_grad]
    weights = [w.detach().clone() for w in learned]
    means, squares = ([torch.zeros_like(w) for w in weights] for _ in range(2))
    step, gradients = run.optimizer.step, []
    run.optimizer.step = lambda: gradients.append([w.grad for w in learned]) or step()
    for t in (1, 2, 3):
        rate = train.schedule(run.settings, t - 1)[1]
        train.train_step(run)
        norm = torch.cat([g.flatten() for g in gradients[-1]]).norm().item()
        assert norm == pytest.approx(1e-9, rel=1e-3)                      # it was above
        for w, m, s, g in zip(weights, means, squares, gradients[-1]):
            m += (1 - 0.9) * (g - m)
            s += (1 - 0.98) * (g**2 - s)
            w *= 1 - rate * 5.0 * (w.ndim != 1)
            w -= rate * m / (1 - 0.9**t) / ((s / (1 - 0.98**t)).sqrt() + 1e-12)
    for w, expected in zip(learned, weights):
        assert torch.allclose(w, expected, atol=1e-5)


def test_a_probe_tests_to_three_times_the_length_and_leaves_the_model_in_training():
    for most, expected in ((100, {2, 4, 6}), (5, {2, 4})):
        run = laptop_run(train_digits=2, eval_digits=most)
        assert set(train.probe(run)) == expected and run.model.training


def test_flags_change_the_preset_of_their_task_and_its_help_shows_what_holds(capsys):
    *_, settings, given = train.read_flags(
        "--preset laptop --task sorting --letters 9 --width 32 --device cpu".split())
    usual = train.preset("laptop", "sorting")
    assert settings["options"] == usual["options"] | {"letters": 9}
    assert settings["width"] == 32 and settings["layers"] == usual["layers"] == 4
    assert given.keys() == {"preset", "task", "width", "letters"}
    with pytest.raises(SystemExit):
        train.read_flags("--preset laptop --task sorting --device cpu --help".split())
    shown = " ".join(capsys.readouterr().out.split())
    assert "at most 52 (12)" in shown and "how often the layers run (1)" in shown
    *_, settings, _ = train.read_flags(
        "--preset laptop --task add --train-digits 9".split())
    assert settings["eval_digits"] == 9                          # a fixed width is one
    *_, settings, _ = train.read_flags(
        "--preset laptop --task multiplication --train-digits 4".split())
    assert settings["eval_digits"] == settings["options"]["padded_to"] == 4
    assert train.preset("laptop", "multiplication")["options"]["padded_to"] == 3
    assert train.introduction(laptop_run(width=32)).endswith("changed: width 32")


# --------------------------------------------------------------------------------------
# 2e. The other oracles: evaluate.py
# --------------------------------------------------------------------------------------


def test_problems_depend_on_the_cell_the_seed_and_their_number_alone():
    same = [next(evaluate.cell_problems("addition", (7, 9), 5, seed=0))
            for _ in range(2)]
    assert torch.equal(*same)
    for cell, seed in (((9, 7), 0), ((7, 9), 1)):
        other = next(evaluate.cell_problems("addition", cell, 5, seed))
        assert not torch.equal(other, same[0])
    # A large cell comes in parts, which are as many problems together.
    assert [len(part) for part in evaluate.cell_problems("or", (3, 3), 2100, 0)] == [
        1000, 1000, 100]


def test_the_cell_of_a_list_task_has_its_length_and_at_most_its_digits():
    lines = next(evaluate.cell_problems("sorting", (7, 4), 200, seed=0))
    items = [data.decode(line).split("=")[0].split(",") for line in lines]
    assert {len(item) for item in items} == {4}
    digits = {len(entry.split(":")[1]) for item in items for entry in item}
    assert digits == set(range(1, 8))


def test_an_answer_counts_only_if_every_digit_and_the_end_token_are_right():
    line = torch.tensor([data.encode("91+21=04$__")])
    for place in range(line.shape[1] - 1):
        said = line[:, 1:].clone()
        said[0, place] = data.encode("7")[0]
        asked = place in (5, 6, 7)                       # after "=": 0, 4 and the end
        assert evaluate.is_exact(line, said).item() == (not asked)
        assert evaluate.is_first_right(line, said).item() == (place != 5)


def test_noise_in_the_state_repeats_and_is_not_drawn_from_the_runs_generator(tokens):
    model, said = small_model(state_noise=5.0), []
    for seed in (1, 2):
        before = torch.manual_seed(seed).get_state()
        said.append(evaluate.predict(model, tokens))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*said)
    assert not torch.equal(said[0], model(tokens)[:, :-1].argmax(dim=-1))


class KnowsUpTo:
    """Stands in for a model: right where the first operand has at most n digits."""

    def __init__(self, n: int):
        self.n, self.device, self.config = n, CPU, small_config()
        self.training = False

    def __call__(self, tokens, recurrences=None):
        self.recurrences = recurrences
        following = tokens.roll(-1, dims=1)
        too_long = (tokens < 10).long().cumprod(dim=1).sum(dim=1) > self.n
        said = torch.where(too_long[:, None], data.END, following)
        return F.one_hot(said, len(data.VOCABULARY)).float()


def grid(knows: int, train_digits: int, max_digits: int, **settings) -> dict:
    return evaluate.measure(job(KnowsUpTo(knows), "addition", max_digits, 2,
                                train_digits=train_digits, **settings))


def test_the_grid_puts_the_first_operand_in_the_rows_and_the_bands_are_cell_means():
    result = grid(5, 3, 8)
    assert result["lengths"] == list(range(1, 9))
    assert result["grid"] == [[float(i <= 5)] * 8 for i in range(1, 9)]
    assert result["bands"] == {"id": 1.0, "ood": pytest.approx((5 * 8 - 9) / (64 - 9))}
    assert result["equal"] == {n: float(n <= 5) for n in range(1, 9)}
    mistakes = []
    evaluate.measure(job(KnowsUpTo(1), digits=2, samples=2), mistakes)
    assert mistakes and not any(evaluate.is_exact(line[None], said[None])
                                for line, said in mistakes)


def test_a_model_runs_as_often_as_the_job_says():
    model = KnowsUpTo(2)
    evaluate.measure(job(model, samples=2)._replace(recurrences=7))
    assert model.recurrences == 7


def test_the_flags_of_an_evaluation_are_followed(tmp_path):
    model, run = small_model(vocab_size=15), tmp_path / "checkpoint.pt"
    settings = job(model, "both").settings
    torch.save({"config": vars(model.config), "settings": settings,
                "model": model.state_dict()}, run)

    def opened(flags):
        return evaluate.open_job(run, evaluate.build_parser().parse_args(flags.split()),
                                 None)
    assert opened("")[1:] == (settings, 2, settings["eval_samples"], 0, None)
    own = opened("--task addition --max-digits 9 --every 3 --samples 7 --seed 2 "
                 "--recurrences 5 --precision bfloat16")
    assert own[2:] == (9, 7, 2, 5) and own.model.config.precision == "bfloat16"
    assert (own.task, own.settings["eval_every"]) == ("addition", 3)


def test_where_all_second_operands_are_equally_long_the_grid_has_one_column():
    settings = {"train_digits": 3, "eval_every": 4}
    result = evaluate.measure(job(KnowsUpTo(8), "nx2", 120, 2, **settings))
    assert (result["lengths"], result["columns"]) == ([1, 2, 3, *range(4, 101, 4)], [2])
    assert result["grid"] == [[float(n <= 8)] for n in result["lengths"]]
    assert result["bands"] == {"id": 1.0, "ood": pytest.approx(5 / 97), "ood_100": 0.0}
    assert result["equal"][8] == 1.0 and result["equal"][120] == 0.0
    short = evaluate.measure(job(KnowsUpTo(2), "nx2", 4, 2, train_digits=1))
    assert short["bands"] == {"id": 1.0, "ood": pytest.approx(1 / 3)}


def test_a_thinned_grid_estimates_the_same_means_and_long_equal_lengths_come_apart():
    result = grid(110, 10, 120, eval_every=10)
    assert result["lengths"] == [*range(1, 11), *range(20, 101, 10)]
    assert (result["equal"][110], result["equal"][120]) == (1.0, 0.0)
    assert result["bands"]["ood_100"] == 0.5
    assert grid(20, 10, 25, eval_every=10)["lengths"][-2:] == [20, 25]     # the largest
    thin = grid(20, 10, 40, eval_every=10)
    assert thin["bands"]["ood"] == pytest.approx((20 * 40 - 100) / (1600 - 100))


def test_the_bands_of_a_list_task_tell_longer_numbers_from_longer_lists(monkeypatch):
    # Right where the numbers are short, however long the list: a share for each band.
    monkeypatch.setattr(evaluate, "exact_match", lambda model, task, cells, *_, **__: [
        float(digits <= 2) for digits, count in cells])
    bands = evaluate.measure(job(None, "sorting")._replace(digits=4))["bands"]
    assert bands == {"id": 1.0, "ood": 4 / 12, "ood_digits": 0.0, "ood_list": 1.0,
                     "ood_both": 0.0}


def test_each_band_of_a_report_is_measured_on_what_its_name_says(monkeypatch):
    def exact_match(model, task, cells, samples, seed, recurrences, mistakes=None,
                    score=evaluate.is_exact, **options):
        share = {"both": 0.1, "addition": 0.2, "subtraction": 0.3, "sorting": 0.4}[task]
        share += 0.03 * (score is evaluate.is_first_right)
        share += 0.02 * options.get("one_length", 0) * all(n > 1 for _, n in cells)
        return [share + 0.05 * bool(options.get("full_carries"))] * len(cells)
    monkeypatch.setattr(evaluate, "exact_match", exact_match)
    expected = {"both": {"bands": 0.1, "bands_addition": 0.2, "bands_subtraction": 0.3},
                "addition": {"bands": 0.2, "bands_full_carries": 0.25},
                "sorting": {"bands": 0.4, "bands_least": 0.43,
                            "bands_one_length": 0.42}}
    for task, bands in expected.items():
        result, text, _ = evaluate.grid_report(job(small_model(), task))
        assert bands == pytest.approx({key: value["id"] for key, value in result.items()
                                       if key[:5] == "bands"})
        for key, share in bands.items():                           # and is printed so
            assert f"{evaluate.PARTS[key]}, in distribution: {share:.2%}" in text


def test_the_test_has_the_text_of_the_training_but_uniform_problems(monkeypatch):
    calls = watched(monkeypatch, evaluate, "cell_problems")
    options = {"complement": True, "long_carries": 1.0, "minus": 0.9, "zeros": True}
    evaluate.measure(job(KnowsUpTo(2), "both", **options))
    options = train.preset("laptop", "both")["options"] | options
    train.probe(laptop_run("both", train_digits=2, options=options))
    assert [options for _, options, _ in calls] == (4 + 3) * [{"complement": True}]
    assert job(None, "sorting", letters=9).options == {"letters": 9,
                                                       "plain_order": False}


def test_failures_are_counted_by_class_and_by_answer_token():
    # The circuit knows no carries: a sum fails where one arrives, or leaves the top.
    counts, shown = evaluate.count_failures(job(circuit(), "add", samples=3000))
    assert counts["failures"] == 3000 - counts["classes"]["S0"][1]
    assert all(failed == seen * (name != "S0")
               for name, (failed, seen) in counts["classes"].items())
    assert sum(seen for _, seen in counts["classes"].values()) == 3000
    assert {name for name, failed in counts["tokens"].items() if failed} == {"A2", "A1"}
    assert f"{counts['failures']} failures in 3,000" in shown and "A2 " in shown


def test_a_mistake_is_marked_where_it_is_also_in_a_long_line():
    line = "1" * 60 + "+" + "1" * 60 + "=" + "2" * 60 + "$"
    said = line[1:-4] + "7" + line[-3:]
    shown = evaluate.show_mistake(torch.tensor(data.encode(line)),
                                  torch.tensor(data.encode(said))).splitlines()
    true, wrong, marks = shown
    assert len(true) < 80 and marks.count("^") == 1
    assert (true[marks.index("^")], wrong[marks.index("^")]) == ("2", "7")


def test_the_svg_is_well_formed_and_covers_the_whole_grid_with_few_shapes():
    shares = [[float(i + j < 130) for j in range(100)] for i in range(100)]
    result = {"lengths": range(1, 101), "columns": range(1, 101), "grid": shares,
              "task": "addition", "train_digits": 20, "bands": {"id": 0.5}}
    svg = evaluate.grid_svg(result)
    _, *boxes, frame = [(float(element.get("width")), float(element.get("height")))
                        for element in xml.etree.ElementTree.fromstring(svg)
                        if element.tag.endswith("rect")]
    assert len(boxes) < 300
    size = boxes[0][1]                                                       # of a cell
    assert sum(width * height for width, height in boxes) == 10_000 * size**2
    assert frame == (20 * size, 20 * size) and "in distribution 50.0%" in svg


def test_a_curve_shows_median_and_range_of_the_seeds_and_its_name_at_its_end():
    runs = [{10: 1.0, 100: share} for share in (0.0, 0.75, 1.0)]
    root = xml.etree.ElementTree.fromstring(
        evaluate.curves_svg({"a <": runs, "b": runs}, 20))
    bands, medians = ([element.get("d") for element in root.iter() if element.get(name)]
                      for name in ("fill-opacity", "stroke-width"))
    assert medians == 2 * ["M300 80L540 140"]
    assert bands == 2 * ["M300 80L540 320L540 80L300 80Z"]
    names = {element.text: float(element.get("y")) for element in root.iter()
             if element.get("x") == "540"}
    heights = sorted(names[name] for name in ("a <", "b"))
    assert min(b - a for a, b in zip(heights, heights[1:])) >= 14    # not on each other


def test_a_group_of_runs_is_told_by_its_median_and_its_worst(monkeypatch):
    # name -> share, and a setting: the runs of a group differ in their seed alone.
    runs = {"runs/a-0": (0.9, 1), "runs/a-1": (0.2, 1),
            "runs/a-2/checkpoint.pt": (0.4, 1), "b.pt": (1.0, 1),
            "runs/c-0": (0.0, 1), "runs/c-1": (0.0, 2)}
    monkeypatch.setattr(evaluate, "grid_report", lambda job: ({
        "bands": {"id": job.samples}, "equal": {1: 0.5, 2: 0.5},
        "train_digits": 1}, "", ""))
    jobs = {name: job(None)._replace(samples=share, settings={"seed": name, "w": width})
            for name, (share, width) in runs.items()}
    figures, text, _ = evaluate.compare(jobs)
    shown = {row.split("  ")[-1]: row.split()[0] for row in text.splitlines()[1:]}
    assert shown["median of 3: a"] == "40.00%" and "20.00%  worst of 3" in text
    assert [run["group"] for run in figures["runs"]] == [*"aaab", "c-0", "c-1"]


def test_decoding_all_tokens_at_once_finds_what_one_by_one_finds():
    found = set()
    for seed in range(5):                  # random weights: each digit leads elsewhere
        model = small_model(seed, embeddings="digit_rotary+segment")
        questions = next(evaluate.cell_problems("addition", (3, 3), 20, seed))[:, :8]
        answers, line = evaluate.generate(model, questions, 9), questions
        for _ in range(9):
            following = evaluate.likeliest(model, line, None)[:, -1:]
            line = torch.cat((line, following), dim=1)
        ended = data.count_before(data.END, line[:, 8:]) > 0
        assert torch.equal(answers, line[:, 8:].masked_fill(ended, data.PAD))
        found |= set(map(tuple, answers.tolist()))
    assert len(found) > 20


def asked(monkeypatch, says: str, question: str, task="addition", digits=2, **options):
    """What is made of a model that answers `says`: the line it read, figures, text."""
    read = []
    monkeypatch.setattr(evaluate, "generate", lambda model, lines, most, _: read.append(
        (data.decode(lines[0]), most)) or torch.tensor([data.encode(says)]))
    model = small_model(vocab_size=data.vocabulary_size(task))
    figures, text, _ = evaluate.ask(job(model, task, digits, **options), question)
    (line, most), = read
    assert len(says) <= most
    return line, figures, [row[2:] for row in text.splitlines()]


def test_a_question_is_answered_under_its_operands_with_mistakes_marked(monkeypatch):
    _, figures, lines = asked(monkeypatch, "521$", "57+68")
    assert lines == ["  57", "+ 68", "----", " 125", "correct"] and figures["correct"]
    *_, lines = asked(monkeypatch, "531$", "57 + 68=")
    assert lines[3:] == [" 135", "  ^", " 125 is right"]
    assert "did not end" in asked(monkeypatch, "5211", "57+68")[2][-1]
    assert asked(monkeypatch, "7$", "007+0")[2][:2] == ["  7", "+ 0"]   # as people type
    with pytest.raises(ValueError, match="57[*]6.*second numbers of 2 digits"):
        asked(monkeypatch, "", "57*6", "nx2")
    # What is written otherwise than it should be is wrong, whatever its value.
    for question, task, says in (("0+0", "addition", "00$"), ("5-5", "mix", "-000$"),
                                 ("9-7", "mix", "+02$")):
        assert not asked(monkeypatch, says, question, task)[1]["correct"]


@pytest.mark.parametrize("task, options, question, line, says, shown", [
    ("addition", {"plain_order": True}, "57+68", "57+68=", "125$", "125"),
    ("both", {}, "12-45", "21-54=", "33-$", "-33"),
    ("multiplication", {}, "12*45", "210*540=", "045000$", "540"),
    ("multiplication", {"padded_to": 0}, "12*45", "21*54=", "045$", "540"),
    ("both", {"complement": True}, "12-45", "21-54=", "76-$", "-33"),
    ("both", {"complement": True}, "145-12", "541-21=", "331$", "133"),
    ("both", {"complement": True}, "145-99", "541-99=", "640$", "46"),
    ("both", {"complement": True}, "12+45", "21+54=", "75$", "57"),
    ("add", {}, "7+9", "07+09=", "+016$", "16"),
    ("mix", {}, "7-19", "07-19=", "-012$", "-12"),
    ("mix", {}, "19-19", "19-19=", "+000$", "0")])
def test_a_question_becomes_the_line_that_the_model_reads(
        monkeypatch, task, options, question, line, says, shown):
    read, figures, lines = asked(monkeypatch, says, question, task, **options)
    assert read == line and lines[-1] == "correct"
    assert figures["answer"] == figures["truth"] == shown
    assert not asked(monkeypatch, says[::-1], question, task, **options)[1]["correct"]
    digits = max(map(len, re.findall("[0-9]+", question)))
    names = evaluate.token_names(job(None, task, digits, **options), line + says)
    for name, token in zip(names, line + says):    # each operand digit has its own name
        if found := re.fullmatch("D('?)([0-9]+)", name):
            operand, place = re.split("[-+*]", question)[len(found[1])], int(found[2])
            assert token == operand.zfill(place + 1)[-1 - place]


def test_what_is_no_number_is_asked_as_the_model_reads_it_and_not_judged(monkeypatch):
    own = data.Task(generate=data.bitwise_or, tokens=None, operators={"+": None})
    monkeypatch.setitem(data.TASKS, "own", own)
    for task, question, says in (("or", "001|0000", "0010$"), ("own", "1+1", "7$"),
                                 ("sorting", "a:12,b:7=", "b,a$")):
        read, figures, lines = asked(monkeypatch, says, question, task)
        assert read == question.strip("=") + "=" and lines == [read + says[:-1]]
        assert "correct" not in figures
    with pytest.raises(ValueError, match="this model's tokens are 0123456789"):
        asked(monkeypatch, "1$", "a:1", "or")


def test_a_task_of_ones_own_is_trained_asked_and_judged_by_what_its_line_says(
        monkeypatch):
    own = data.TASKS["addition"]
    monkeypatch.setitem(data.TASKS, "own", data.Task(
        generate=own.generate, tokens=own.tokens, operators={"|": max, "+": None}))
    assert train.train_step(laptop_run("own"))[0].isfinite()
    read, figures, _ = asked(monkeypatch, "75$", "6|57", "own")
    assert (read, figures["truth"], figures["correct"]) == ("6|75=", "57", True)


@pytest.mark.parametrize("question, task", [
    ("", "addition"), ("1+", "addition"), ("1-2", "addition"), ("1+2+3", "addition"),
    ("x+1", "both"), ("-5+3", "both"), ("1.5+2", "addition"), ("٣+1", "addition"),
    ("1 2+3", "addition"), ("1+2==", "addition"), ("1+2", "sub"), ("1-2", "add"),
    ("100+1", "add")])
def test_a_question_that_cannot_be_asked_gets_one_line(monkeypatch, question, task):
    with pytest.raises(ValueError, match="cannot read|knows") as caught:
        asked(monkeypatch, "1$", question, task)
    assert "\n" not in str(caught.value)


def test_tokens_are_named_by_their_place_and_nodes_by_what_they_share():
    node = evaluate.Node
    for task, names in (("mix", "D1 D0 op D'1 D'0 = sign A2 A1 A0 end"),
                        ("addition", "D0 D1 op D'0 D'1 = A0 A1 A2 end")):
        assert evaluate.token_names(job(None, task)) == names.split()
    once, looped_three = small_model(recurrences=1), small_model(recurrences=3)
    for model, nodes, name in (
            (once, [node(0, 1, 0, 7)], "layer 2, head 1"),
            (once, [node(0, 0, 2, 6)], "layer 1, MLP"),
            (once, [node(0, 0, 0, 8), node(0, 0, 1, 8)], "layer 1, head 1 + 2"),
            (looped_three, [node(r, 1, 1, 5) for r in range(3)],
             "all recurrences, layer 2, head 2"),
            (looped_three, [node(2, 0, 1, 5)], "recurrence 3, layer 1, head 2")):
        assert evaluate.part_name(job(model), *nodes) == name
    # A model that runs more often than in training has more nodes, and names for them.
    twice = job(once, digits=2)._replace(recurrences=2)
    nodes = evaluate.all_nodes(twice)
    assert len(nodes) == len({evaluate.part_name(twice, node) for node in nodes}) * 9


def test_a_tap_sees_every_node_once_and_changes_nothing_unless_asked_to(tokens):
    model, seen = small_model(layers=2, recurrences=3), []
    before = model(tokens)
    with evaluate.tapped(model, lambda where, value: seen.append(where) or value):
        assert torch.equal(model(tokens), before)
        first = list(seen)
        model(tokens)
    assert seen == 2 * first and len(set(first)) == len(first)
    assert set(first) == {(r, l, kind) for r in range(3) for l in range(2)
                          for kind in ("attention", 0, 1, 2)}
    with evaluate.tapped(model, lambda where, value: value if where[2] == "attention"
                         else 0 * value):
        assert not torch.allclose(model(tokens), before)
    assert torch.equal(model(tokens), before)                       # the hooks are gone


def test_attention_maps_are_those_of_the_model_layer_by_layer(tokens):
    model = small_model(embeddings="abacus+fire")
    maps = evaluate.attention_maps(job(model), tokens)
    assert maps.shape == (3, 2, 2, tokens.shape[1], tokens.shape[1])
    assert torch.allclose(maps.sum(dim=-1), torch.ones(()), atol=1e-4)
    assert maps.triu(1).max() == 0
    injected, state = model.embed(tokens, 0), 0
    for recurrence in range(3):
        state = state + injected
        for index, layer in enumerate(model.layers):
            qkv, bias = layer.attention.qkv(state), model.attention_bias(layer, tokens)
            q, k, _ = qkv.view(*tokens.shape, 3, 2, 16).unbind(2)
            scores = torch.einsum("bihd,bjhd->bhij", q, k) / 4 + bias
            expected = scores.softmax(dim=-1).mean(dim=0)
            assert torch.allclose(maps[recurrence, index], expected, atol=1e-4)
            state = layer(state, bias=bias)


def test_what_a_head_reads_for_a_question_is_told_token_by_token():
    # The circuit: at the token before each digit, each head reads its own operand's.
    figures, text, picture = evaluate.attention_report(job(circuit(), "add"), "12+34")
    assert figures["line"] == "12+34=+046$"
    assert figures["tokens"] == "D1 D0 op D'1 D'0 = sign A2 A1 A0 end".split()
    rows = {row["answer"]: row for row in figures["most"]}
    assert list(rows) == ["sign: +", "A2: 0", "A1: 4", "A0: 6", "end: $"]
    for answer, *reads in (("A1: 4", "D1: 1 100%", "D'1: 3 100%"),
                           ("A0: 6", "D0: 2 100%", "D'0: 4 100%")):
        assert [rows[answer]["head 1"], rows[answer]["head 2"]] == reads
    assert "D'0: 4 100%" in text
    assert torch.tensor(figures["heads"]["head 1"]).shape == (5, 11)
    # A cell for each token that a reader can see, of two heads with five readers.
    root = xml.etree.ElementTree.fromstring(picture)
    cells = sum(element.tag.endswith("rect") for element in root.iter()) - 1
    assert cells == 2 * (6 + 7 + 8 + 9 + 10)


# Of the circuit: the token before a digit puts it together.
PARTS = set(itertools.product(("head 1", "head 2", "MLP"), ("A2", "A1")))


def test_ablation_finds_the_circuit_and_what_each_part_of_it_breaks():
    what = job(circuit(), "add", samples=200)
    figures, text, picture = evaluate.ablation_report(what)
    found = {(row["node"], row["token"]): row for row in figures["nodes"]}
    assert len(found) == 3 * 10
    for place, row in found.items():
        assert (row["fails"] > 0.3) == (row["fails"] > 0) == (place in PARTS), place
    assert set(found["head 1", "A2"]["tokens"]) == {"A1"}
    assert set(found["head 2", "A1"]["tokens"]) == {"A0"}
    assert found["head 2", "A1"]["reads"] == "D'0 100%"
    assert set(found["head 2", "A1"]["classes"]) == {"S0"}
    assert "head 1 at A2: " in text and "reads D1 100%" in text
    assert figures["served"] == {"S": len(PARTS)} and figures["inherited"] is None
    xml.etree.ElementTree.fromstring(picture)


def test_nodes_are_told_apart_by_the_kinds_of_questions_that_need_them(monkeypatch):
    lines = evaluate.questions(job(None, "mix", 12, 3000))
    classes, kinds = evaluate.rows_by_class(job(None, "mix", 12), lines)
    for row, line in enumerate(lines):
        a, b = re.findall("[0-9]+", data.decode(line))[:2]           # units last
        kind = "S" if line[12] == data.encode("+")[0] else "N" if a < b else "M"
        assert [name for name in kinds if kinds[name][row]] == [kind]
        (name,) = (name for name in classes if classes[name][row])
        assert name[0] == kind
    assert {"S1", "S10"} < classes.keys()              # one is no part of the other
    assert evaluate.served({"kinds": {"S": 0.3, "M": 0.009, "N": 0.01}}) == "SN"
    # The circuit, as the model that another one started from, has one node left.
    monkeypatch.setattr(looped, "load", lambda *_: circuit())
    monkeypatch.setattr(looped, "read_checkpoint",
                        lambda _: {"settings": job(None, "add").settings})
    what = job(circuit(), "mix", init_from=str(HERE))
    found = {node: {"kinds": {"S": 0.0, "M": 0.0}} for node in evaluate.all_nodes(what)}
    found[0, 0, 0, 7] = {"kinds": {"S": 0.5, "M": 0.2}}
    assert evaluate.inherited(what, found) == {"SM": 1, "nothing": len(PARTS) - 1}


def test_a_patch_finds_the_two_heads_that_share_a_digit():
    what = job(circuit(), "add", samples=40)
    figures, text, _ = evaluate.patch_report(what)
    rows = {f"{row['subtask']}{row['place']}": row for row in figures["subtasks"]}
    for name, token in (("SA0", "A1"), ("SA1", "A2")):
        assert rows[name]["exact"] == 1.0
        # Either both heads together, or the MLP, which has the sum.
        assert rows[name]["node"] in (f"head 1 + 2 at {token}", f"MLP at {token}")
    assert all(not row["node"] for name, row in rows.items() if name[:2] != "SA")
    assert text.count(" at A1") == text.count(" at A2") == 1
    # One head alone brings one operand only: never the sum of the other question.
    pairs, outputs = evaluate.answered(what, evaluate.patch_pairs(what, "SA", 0))
    node = evaluate.Node(0, 0, 0, 8)
    both = (node, node._replace(part=1))
    assert evaluate.interchange(what, both, pairs, outputs) == 1.0
    assert evaluate.interchange(what, both[:1], pairs, outputs) < 0.5


@pytest.mark.parametrize("subtask, task", [
    (subtask, task) for subtask in evaluate.SUBTASKS for task in ("add", "mix", "both")
    if task != "add" or subtask[0] == "S"])
def test_an_interchange_changes_an_answer_by_what_its_column_says(task, subtask):
    (kind, change), order = evaluate.SUBTASKS[subtask], 1 - 2 * (task == "both")
    sign = 1 if kind == "S" else -1

    def solved(line):
        a, symbol, b, value = (part[::-order] for part in split(line)[0])
        return int(a), symbol, int(b), int(value)

    def columns(a, b):
        """Each column, units first: its digit; its carry, None where it passes one."""
        sums = [a // 10**n % 10 + sign * (b // 10**n % 10) for n in range(6)]
        passing = 9 if kind == "S" else 0
        return [(each % 10, None if each == passing else int(not 0 <= each <= 9))
                for each in sums]

    def put_together(columns):
        total = carry = 0
        for place, (digit, out) in enumerate(columns):
            total += (digit + sign * carry) % 10 * 10**place
            carry = carry if out is None else out
        return total + carry * 10**6

    copied = []
    for place in range(6):
        what = job(None, task, 6, samples=30)._replace(seed=place)
        for rows in zip(*evaluate.patch_pairs(what, subtask, place)):
            *questions, (*same, expected) = map(solved, rows)
            assert same == list(questions[0][:3]) and (rows[0] != rows[2]).sum() == 1
            for a, symbol, b, value in questions:
                assert value == SOLVERS[symbol](a, b) and (value < 0) == (kind == "N")
                assert (symbol == "+") == (kind == "S")
            clean, other = (columns(*(b, a) if kind == "N" else (a, b))
                            for a, _, b, _ in questions)
            (digit, out), (new_digit, new_out) = clean[place], other[place]
            assert {"digit": digit != new_digit and out == new_out,
                    "carry": digit == new_digit and out != new_out,
                    "undecided": (out is None) != (new_out is None)}[change]
            clean[place] = (new_digit, out) if change == "digit" else (digit, new_out)
            assert expected == put_together(clean) * (-1 if kind == "N" else 1)
            # The digit that changes is not simply copied from the other answer.
            copied.append((rows[1] == rows[2])[rows[0] != rows[2]].item())
    assert len(copied) > 30 and sum(copied) < 0.7 * len(copied)


def test_the_sign_of_a_difference_can_be_interchanged():
    pairs = evaluate.sign_pairs(job(None, "mix", 3, samples=30))
    assert len(pairs[0]) == 30
    for clean, other, expected in zip(*map(partial(map, data.decode), pairs)):
        assert clean[3] == other[3] == "-" and {clean[8], other[8]} == {"+", "-"}
        assert expected == clean[:8] + other[8] + clean[9:]


@pytest.mark.parametrize("task", ["addition", "both"])
@pytest.mark.parametrize("report", [evaluate.patch_report, evaluate.ablation_report])
def test_a_model_that_is_never_right_has_nothing_to_patch_or_to_break(task, report):
    model = small_model(vocab_size=15, layers=1, recurrences=1)
    with pytest.raises(ValueError, match="answers no question of 3 digits right"):
        report(job(model, task, 3, 4))


def test_the_first_component_tells_carries_apart_where_a_head_holds_them(monkeypatch):
    model = small_model(layers=1, recurrences=1)
    what = job(model, "add", 3, 300)
    lines = evaluate.questions(what)
    labels = data.digit_labels(*evaluate.operands(what, lines)[:2])
    heads = 0.01 * torch.randn(*lines.shape, 32, generator=generator())
    # The second head, at token 7, holds ST of the tens along one direction.
    heads[:, 7, 16:] += labels["S"][1][:, 1:2] * torch.linspace(-1, 1, 16)
    outputs = {(0, 0, head): heads[..., 16 * head:16 * head + 16] for head in (0, 1)}
    monkeypatch.setattr(evaluate, "activations", lambda *_: (None, outputs))
    figures, text, picture = evaluate.pca_report(what)
    best, *others = figures["heads"]
    assert (best["label"], best["node"]) == ("ST1", "head 2 at =")
    assert best["between"] > 0.99 and best["variance"] > 0.9
    assert max(row["between"] for row in others if row["node"] != best["node"]) < 0.2
    assert picture.count("<circle") == 300 and f"{best['between']:.1%}" in text


# --------------------------------------------------------------------------------------
# 3. The plumbing: runs, resuming, bad input, commands
# --------------------------------------------------------------------------------------

# A run that takes seconds. What it learns is no matter of a test.
TINY = ("--preset laptop --device cpu --train-digits 2 --width 32 --heads 2 "
        "--ffn-width 32 --layers 1 --recurrences 2 --max-offset 30 --steps 80 "
        "--problems-per-context 2 --batch-size 16 --microbatch-size 8 --eval-digits 4 "
        "--eval-every 1 --eval-samples 10").split()


def trained(folder: Path, *flags: str) -> Path:
    train.main([*TINY, *flags, "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "tiny")


def saved(folder: Path) -> dict:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def read(file: Path) -> dict:
    return json.loads(file.read_text())


@contextlib.contextmanager
def started(until: str, *flags, **how):
    """`python train.py` with these flags, when it has printed a line that begins so. It
    does not outlive the test."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *map(str, flags)], cwd=HERE, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how)
    try:
        assert any(line.startswith(until) for line in process.stdout)
        yield process
    finally:
        process.kill()
        process.wait()


def refused(main, flags, capsys) -> str:
    """The one line of a command that ends with an error, below argparse's usage."""
    with pytest.raises(SystemExit) as caught:
        main([str(flag) for flag in flags])
    code, printed = caught.value.code, capsys.readouterr().err
    # With 2, argparse has written it; what else ends a command is a line to be written.
    *usage, error = (printed + str(code) * (code != 2)).strip().splitlines()
    assert code and len(usage) <= 1 and "Traceback" not in error
    return error


@pytest.mark.parametrize("changes", ["", "--alpha 1 --state-noise 0.02"])
def test_a_killed_run_resumes_to_bit_identical_weights(tmp_path, changes):
    whole, killed = trained(tmp_path / "whole", *changes.split()), tmp_path / "killed"
    with started("step     20/", *TINY, *changes.split(), "--out", killed) as process:
        process.kill()
        process.wait()
    assert 20 <= saved(killed)["step"] < 80
    train.main(["--resume", "--out", str(killed)])
    weights = saved(killed)["model"]
    assert all(torch.equal(weight, weights[name])
               for name, weight in saved(whole)["model"].items())
    for folder in (whole, killed):
        steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").open()]
        assert steps == list(range(2, 81, 2))


def test_a_run_cut_short_anywhere_resumes_and_refuses_to_be_another(tmp_path, capsys):
    # A log cut short or that runs past the checkpoint, and a lost config, do no harm.
    run = trained(tmp_path / "run")
    content = saved(run)
    whole, content["log"] = content["log"], content["log"][:-1]
    torch.save(content | {"step": 78}, run / "checkpoint.pt")
    (run / "config.json").unlink()
    train.main(["--resume", "--out", str(run)])
    lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    assert [line["step"] for line in lines] == [line["step"] for line in whole]
    for flag, value, known in (("--steps", 90, 80), ("--long-carries", 0.5, 0.1)):
        error = refused(train.main, ["--resume", "--out", run, flag, value], capsys)
        assert f"{flag} {value} does not fit" in error and f"has {known}" in error
        assert f"--init-from {run}" in error
    train.main([*TINY, "--resume", "--zeros", "--out", str(run)])      # as it was begun


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_saves_and_says_how_to_go_on(tmp_path, number):
    run = tmp_path / "run"
    with started("step ", *TINY, "--steps", "4000", "--out", run) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"--resume --out {run}" in errors
    assert 100 <= saved(run)["step"] < 4000


def test_ctrl_c_in_the_final_test_says_that_the_run_is_whole(tmp_path, monkeypatch):
    def stop(_):
        raise KeyboardInterrupt
    monkeypatch.setattr(evaluate, "evaluate", stop)
    with pytest.raises(SystemExit, match="the run is whole") as caught:
        trained(tmp_path / "run", "--steps", "2")
    assert f"--resume --out {tmp_path / 'run'}" in str(caught.value)
    monkeypatch.undo()
    train.main(["--resume", "--out", str(tmp_path / "run")])
    assert read(tmp_path / "run" / "accuracy.json")["bands"]


@pytest.mark.parametrize("what", ["loss", "weight"])
def test_a_loss_or_weight_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(
        tmp_path, monkeypatch, what):
    inner = train.train_step

    def poisoned(run):
        loss, tokens = inner(run)
        if (what, run.step) == ("weight", 16):
            run.model.tokens.weight.data[0] = math.nan
        # Between two lines of the log. In float16 the scaler leaves such a step out.
        return loss * (math.nan if (what, run.step) == ("loss", 15) else 1), tokens
    monkeypatch.setattr(train, "train_step", poisoned)
    with pytest.raises(SystemExit, match="not finite at step 16.*learning-rate"):
        trained(tmp_path / "run")
    checkpoint = saved(tmp_path / "run")
    assert checkpoint["step"] == 14
    assert all(weight.isfinite().all() for weight in checkpoint["model"].values())


def test_a_folder_belongs_to_one_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = train.Run({"preset": "laptop", "task": "or"}, *5 * [None])
    claimed = [str(train.claim_folder(None, run, False)) for _ in range(2)]
    assert claimed == ["runs/laptop-or", "runs/laptop-or-2"]     # both are empty still
    folder = trained(tmp_path / "run", "--steps", "2")
    assert {file.name for file in folder.iterdir()} == {
        "config.json", "log.jsonl", "checkpoint.pt", "accuracy.json", "accuracy.svg"}
    # Nothing is overwritten unasked, and then nothing but what a run consists of.
    before = (folder / "checkpoint.pt").read_bytes()
    assert "--resume goes on" in refused(train.main, [*TINY, "--out", folder], capsys)
    assert (folder / "checkpoint.pt").read_bytes() == before
    (folder / "notes").write_text("mine")
    trained(folder, "--steps", "4", "--overwrite")
    assert saved(folder)["step"] == 4 and (folder / "notes").read_text() == "mine"
    (folder / "checkpoint.pt").unlink()
    assert "--resume" not in refused(train.main, [*TINY, "--out", folder], capsys)
    with pytest.raises(ValueError, match="no run in"):
        looped.newest_run(tmp_path / "runs")


def test_the_precision_is_a_decision_that_a_run_keeps(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(looped, "default_precision", lambda device: "bfloat16")
    for flags, kept in (([], "bfloat16"), (["--precision", "float16"], "float16"),
                        (["--precision", "float32"], "float32")):
        run = tmp_path / kept
        train.main([*TINY, "--steps", "4", *flags, "--out", str(run)])
        assert kept in capsys.readouterr().out
        assert looped.load(run).config.precision == kept
        assert saved(run)["settings"]["precision"] == kept
        for file in ("config.json", "accuracy.json"):
            assert read(run / file)["precision"] == kept
        train.main(["--resume", "--out", str(run)])
        assert looped.load(run).config.precision == kept


def test_the_benchmark_prints_every_figure(capsys):
    train.main([*TINY, "--benchmark"])
    printed = capsys.readouterr().out
    for figure in ("problems/s", "milliseconds a step", "TFLOP/s measured"):
        assert figure in printed


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    def full(path, content):
        path.touch()                                           # what fitted
        raise OSError(28, "No space left on device")
    (tmp_path / "file").write_text("old")
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="file was not written: No space left"):
        looped.write_whole(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "old"


def test_what_was_measured_is_shown_before_a_file_can_fail(tiny_run, capsys):
    with pytest.raises(SystemExit, match="^evaluate.py: .*x.json was not written"):
        evaluate.main([str(tiny_run), "--json", "/nowhere/x.json"])
    assert "exact match, in distribution" in capsys.readouterr().out


@pytest.mark.parametrize("error, line", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
     "out of memory: use a smaller --microbatch-size"),
    (KeyboardInterrupt(), "stopped"), (ValueError("such a flag"), "such a flag")])
def test_a_lack_of_memory_or_a_stop_is_one_line(monkeypatch, capsys, error, line):
    def fail(*_):
        raise error
    monkeypatch.setattr(train, "start", fail)
    assert line in refused(train.main, ["--preset", "laptop"], capsys)


@pytest.mark.parametrize("bug, error", [
    (lambda *_: int("x"), ValueError), (lambda *_: [][1], IndexError)])
def test_a_bug_in_changed_code_shows_where_it_is(monkeypatch, bug, error):
    monkeypatch.setattr(train, "start", bug)
    with pytest.raises(error):
        train.main(["--preset", "laptop"])


@pytest.mark.parametrize("flags, message", [
    ("--device tpu", "device 'tpu'"), ("--embeddings abakus", "'abakus'"),
    ("--out " + __file__, "exists"),
    ("--task sorting --letters 5", "a list of 8 numbers needs as many letters"),
    ("--task or --long-carries 0.5", "unrecognized arguments: --long-carries 0.5"),
    ("--embeddings rotary+digit_rotary", "choose one"), ("--heads 7", "multiple"),
    ("--max-offset 20", "largest offset of 42 or more, not 20"),
    ("--max-offset 500", "positions up to 521"), ("--init-from nowhere", "no such"),
    ("--max-offset 3 --test-offset 4", "test_offset 4 is above max_offset 3"),
    ("--embeddings learned --eval-digits 900", "512 rows"),
    ("--task add --eval-digits 9", "--eval-digits 9 does not fit --train-digits 6"),
    ("--task multiplication --eval-digits 4", "train with --train-digits 4"),
    ("--task multiplication --padded-to 5", "--padded-to 5 does not fit"),
    ("--auxiliary-loss 1", "is for products, not for --task addition"),
    ("--resume --out /nowhere", "/nowhere")])
def test_every_kind_of_bad_flag_gets_one_clear_line(flags, message, tmp_path, capsys):
    flags = ["--device", "cpu", *flags.split()]
    flags = flags if "--out" in flags else [*flags, "--out", tmp_path / "r"]
    assert message in refused(train.main, flags, capsys)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("flags, message", [
    ("--max-digits x", "--max-digits: invalid count"), ("--device tpu", "no device"),
    ("--samples 0", "count value: '0'"),
    ("--ask 1x2", "cannot read '1x2'"), ("--ask 1+2 --svg x.svg", "no picture"),
    ("--patch 3 --svg x.svg", "no picture"), ("{run} --pca 3", "looks at one run"),
    ("--task subtraction", "lacks its tokens"),
    ("--max-digits 600", "positions up to 611"),
    ("--ask " + 600 * "9" + "+1", "ends at 511")])
def test_bad_flags_of_the_evaluation_get_one_clear_line(
        tiny_run, tmp_path, monkeypatch, flags, message, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [tiny_run, *flags.format(run=tiny_run).split()]
    assert message in refused(evaluate.main, flags, capsys)


@pytest.mark.parametrize("call, message", [
    (lambda: data.encode("1?2"), r"no token for '\?'"),
    (lambda: data.decode([1, -1]), "the id -1"),
    (lambda: data.decode([999]), "the id 999"),
    (lambda: abacus.Abacus(range(10), 8, 16), "max_k is 99, .* 14"),
    (lambda: abacus.Abacus(range(10), 8, max_k=-1), "max_k is -1"),
    (lambda: abacus.Abacus([1], 8, 16, 3)(torch.ones(1, 1).long(), 15),
     "to 16 .* ends at 15.*max_seq_length"),
    (lambda: abacus.LearnedPositions(8, 10)(torch.ones(1, 11).long()),
     "11 tokens.* 10 rows"),
    (lambda: abacus.disjoint_offsets(1, 3, 11, 21, generator()), "22 or more, not 21"),
    (lambda: small_config(embeddings="none+abacus"), r"'none\+abacus': join with"),
    (lambda: small_config(norm="middle"), "norm 'middle'"),
    (lambda: evaluate.rehearse(small_model(max_positions=101, max_offset=0),
                               "addition", 100),
     "positions up to 101 .* ends at 100"),
    (lambda: evaluate.exact_match(small_model().train(), "or", [(1, 1)], 1),
     "training mode"),
    (lambda: evaluate.generate(small_model().train(), [[1]], 3), "training mode"),
    (lambda: evaluate.generate(small_model(), [data.encode("12+7=_")], 3),
     "has padding")])
def test_what_cannot_be_done_is_an_error_of_one_clear_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_the_longest_lines_that_a_table_has_rows_for_are_not_refused():
    for embeddings, rows in (("abacus", 102), ("learned", 304)):
        model = small_model(embeddings=embeddings, max_positions=rows)
        evaluate.rehearse(model, "addition", 100)


@pytest.mark.parametrize("script, change, message", [
    (train, {"width": 99}, "can resume from"),
    (train, {"task": "cooking"}, "can resume from"),
    (train, {"alpha": None}, "without the setting alpha"),
    (evaluate, {"task": "cooking"}, "another version")])
def test_a_checkpoint_of_another_version_is_one_line(
        tiny_run, tmp_path, capsys, script, change, message):
    content = saved(tiny_run)
    content["settings"] |= change
    content["settings"] = {name: value for name, value in content["settings"].items()
                           if value is not None}
    torch.save(content, tmp_path / "checkpoint.pt")
    flags = ["--resume", "--out", tmp_path] if script is train else [tmp_path]
    assert message in refused(script.main, flags, capsys)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("malicious-code-ran"),))


def test_damaged_foreign_and_malicious_checkpoints_get_one_line_and_run_nothing(
        tiny_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    whole, good = (tiny_run / "checkpoint.pt").read_bytes(), saved(tiny_run)
    weight = good["model"]["tokens.weight"].numpy().tobytes()
    files = {"empty": b"", "truncated": whole[:len(whole) // 2],
             "text": b"not a checkpoint",
             "pickle": pickle.dumps(Malicious(), protocol=2),
             # One bit of one weight: torch itself reads such a file without a word.
             "flipped": whole.replace(weight, bytes([weight[0] ^ 1]) + weight[1:])}
    contents = {
        "malicious": Malicious(), "foreign": {"model": {}},
        "wrong-shape": good | {"config": good["config"] | {"width": 64}}}
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name, content in contents.items():
        torch.save(content, name)
    for name in (*files, *contents, "absent"):
        with pytest.raises(ValueError, match=name) as caught:
            looped.load(name)
        assert "\n" not in str(caught.value)
        refused(evaluate.main, [name], capsys)
    assert not Path("malicious-code-ran").exists() and files["flipped"] != whole


@pytest.mark.parametrize("flags", [
    "--task both --complement", "--task multiplication --padded-to 0 --eval-digits 5",
    "--task or", "--task sorting", "--task nx2 --train-digits 3", "--question-loss",
    "--embeddings abacus+rotary --equals-position units"])
def test_each_task_and_each_kind_of_text_trains_and_is_tested(flags, tmp_path, capsys):
    run = trained(tmp_path / "run", "--steps", "3", *flags.split())
    result = read(run / "accuracy.json")
    # What to try next is printed as it can be typed, where numbers can be asked.
    question = capsys.readouterr().out.splitlines()[-1].partition(' --ask "')[2][:-1]
    assert bool(question) == (result["task"] not in ("or", "sorting"))
    if question:
        evaluate.main([str(run), "--ask", question, "--json", str(tmp_path / "x.json")])
        assert "correct" in read(tmp_path / "x.json")


def test_a_fixed_width_run_is_tested_asked_and_handed_on(tmp_path, capsys):
    fixed = ["--eval-digits", "2", "--steps", "4", "--recurrences", "1"]
    first = trained(tmp_path / "first", *fixed, "--task", "add")
    result = read(first / "accuracy.json")
    assert result["uniform"]["questions"] == result["enriched"]["questions"] == 10
    assert result["grid"] == [[result["bands"]["id"]]]
    handed_on = [*fixed, "--task", "mix", "--init-from", str(first), "--layers", "3"]
    second = trained(tmp_path / "second", *handed_on, "--learning-rate", "1e-30")
    old, new = looped.load(first).state_dict(), looped.load(second).state_dict()
    assert all(torch.allclose(old[name], new[name], atol=1e-6) for name in old)
    assert "layers.2.ffn.into.weight" in new.keys() - old.keys()
    for flags in (["--ask", "100+1"], ["--max-digits", "3"]):
        assert "knows 2 digits only" in refused(evaluate.main, [second, *flags], capsys)
    flags = [*TINY, *handed_on, "--width", "64"]
    assert "same --width" in refused(train.main, flags, capsys)


def test_a_run_leaves_a_result_that_other_programs_can_read(tiny_run):
    result, config = read(tiny_run / "accuracy.json"), read(tiny_run / "config.json")
    assert {"task", "train_digits", "max_digits", "samples", "seed", "grid", "bands",
            "parameters", "device", "torch", "seconds"} <= result.keys()
    assert set(result["bands"]) == {"id", "ood"} and len(result["grid"]) == 4
    assert config["settings"]["steps"] == 80 and config["torch"] == torch.__version__
    assert result["parameters"] == sum(
        weight.numel() for weight in looped.load(tiny_run).parameters())


def test_several_runs_are_compared_and_drawn(tiny_run, tmp_path, capsys):
    files = ["--json", str(tmp_path / "x.json"), "--svg", str(tmp_path / "x.svg")]
    evaluate.main([str(tiny_run), str(tiny_run / "checkpoint.pt"), *files])
    assert "median of 2: tiny" in capsys.readouterr().out
    assert len(read(tmp_path / "x.json")["runs"]) == 2
    assert (tmp_path / "x.svg").read_text().count("fill-opacity") == 1


def test_the_newest_run_is_the_one_whose_checkpoint_was_written_last(tmp_path):
    for age, name in enumerate("bac"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "checkpoint.pt").touch()
        os.utime(tmp_path / name / "checkpoint.pt", (1e9 - age, 1e9 - age))
    assert looped.newest_run(tmp_path) == tmp_path / "b"


@pytest.mark.parametrize("flags, figures", [
    ("--attend 12+34", "heads"), ("--ablate 2", "nodes"), ("--patch 2", "subtasks"),
    ("--pca 2", "heads")])
def test_each_tool_writes_its_figures_and_its_picture(tmp_path, capsys, flags, figures):
    model, run = circuit(), tmp_path / "checkpoint.pt"
    settings = job(model, "add").settings | {"eval_digits": 2, "eval_samples": 50}
    torch.save({"config": vars(model.config), "settings": settings,
                "model": model.state_dict()}, run)
    svg = [] if "--patch" in flags else ["--svg", str(tmp_path / "x.svg")]
    evaluate.main([str(run), *flags.split(), "--samples", "60", *svg, "--json",
                   str(tmp_path / "x.json")])
    assert len(capsys.readouterr().out.splitlines()) > 2
    result = read(tmp_path / "x.json")
    assert result[figures] and (result.get("samples") == 60 or "--attend" in flags)
    assert not svg or xml.etree.ElementTree.parse(tmp_path / "x.svg")


@pytest.mark.parametrize("name, question, answer", [
    ("laptop", "9" * 100 + "+1", "1" + "0" * 100), ("laptop", "0+0", "0"),
    ("far", "9" * 500 + "+1", "1" + "0" * 500), ("mix", "123-654", "-531")])
def test_the_trained_models_in_results_load_and_answer(
        tmp_path, name, question, answer):
    # These are files, and not what a training happens to learn: a change of the model
    # that makes them unreadable, or reads them otherwise, fails here.
    evaluate.main([str(HERE / f"results/{name}.pt"), "--ask", question, "--json",
                   str(tmp_path / "x.json"), "--device", "cpu"])
    assert read(tmp_path / "x.json")["answer"] == answer
    assert (HERE / f"results/{name}.pt").stat().st_size < 700_000


def commands() -> list[str]:
    """Every command that the README shows, on a line of its own or in ``; what its
    table of claims adds to the longest of them; and what its other tables and its
    exercises add to `python train.py --preset laptop`."""
    text, bare = (HERE / "README.md").read_text(), "python train.py --preset laptop"
    lines = re.findall(r"^ *(python (?:train|evaluate)\.py.*)", text, re.MULTILINE)
    quoted = re.findall(r"`(python\s+(?:train|evaluate)\.py[^`]*)`", text)
    long = max(lines, key=len)
    rest, claims, more = re.split(r"(?s)(?<=to the command add \|)(.*?)(?=\n\n)", text)
    added = {bare: re.findall(r"^(?:\||\d\.).*?`(--[^`]*)`", rest + more, re.MULTILINE),
             long: re.findall(r"`(--[^`]*)`", claims)}
    return sorted({*(line.partition("  #")[0].strip() for line in lines),
                   *(" ".join(command.split()) for command in quoted),
                   *(f"{start} {flags}" for start in added for flags in added[start])})


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_accepted_and_draws_a_batch(command):
    _, script, *flags = shlex.split(command)
    if script == "evaluate.py":
        args = evaluate.build_parser().parse_args(flags)
        inside = [name for name in evaluate.INSIDE if getattr(args, name)]
        for run in args.runs:
            evaluate.open_job(HERE / run, args, *inside or [None])
        return
    args, _, settings, _ = train.read_flags(flags)
    if args.resume:
        return
    train.model_config(settings)                               # at its true width
    settings |= {"width": 2 * settings["heads"], "ffn_width": 8, "init_from": ""}
    (tokens, is_answer), = train.sample(train.start(settings, CPU), 4)
    assert is_answer.any() and len(tokens) == 4


def test_the_readmes_loop_table_and_links_are_right(tokens, capsys, monkeypatch):
    text, model = (HERE / "README.md").read_text(), small_model()
    names = {"torch": torch, "injected": model.embed(tokens, 0), "recurrences": 3,
             "layers": model.layers, "head": model.head, "decoder": model.decoder}
    with torch.no_grad():                  # then a layer masks itself
        exec(text.partition("```python\n")[2].partition("```")[0], names)
        assert torch.allclose(names["logits"], model(tokens), atol=1e-5)
    monkeypatch.setattr(abacus, "demonstrate", lambda _: None)
    abacus.main()
    shown = [line.split()[-11:] for line in capsys.readouterr().out.splitlines()]
    for line in re.findall("^(?:token|position in|with an offset) .*", text, re.M):
        assert line.split()[-11:] in shown
    assert all((HERE / link).exists() for link in re.findall(r"\]\(([^)]+)\)", text))


@pytest.mark.parametrize("module", [abacus, data, looped])
def test_the_examples_in_the_docstrings_are_right(module):
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


@pytest.mark.parametrize("files, command, shows", [
    ("data.py", "data.py", "^^^"), ("looped.py abacus.py", "looped.py", "122.27"),
    ("abacus.py", "-c 'import abacus; abacus.main(steps=2)'", "0.0%\n")])
def test_each_file_shows_a_worked_example_beside_no_more_files_than_it_says(
        tmp_path, files, command, shows):
    for file in files.split():
        shutil.copy(HERE / file, tmp_path)
    result = subprocess.run([sys.executable, *shlex.split(command)], cwd=tmp_path,
                            text=True, capture_output=True)
    assert result.returncode == 0 and shows in result.stdout
