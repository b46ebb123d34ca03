"""Run the reproduction in its quick form, interrupted and resumed, and check its measure and its statistics."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bd3_scale.data.batch import Batch
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.diffusion.interval import block_moments
from bd3_scale.evaluate.nelbo import HeldOut
from bd3_scale.objective import BlockDiffusion
from bd3_scale.recipe.checks import check_recipe
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DiffusionRecipe
from reproduction.jobs import Work, end_all, fingerprint
from reproduction.masking import expected, order_of_intervals, parts_of_variance
from reproduction.rows import SCALES, rows
from reproduction.statistics import (
    FAILS,
    HOLDS,
    UNDECIDED,
    Difference,
    Measured,
    Seeds,
    fluctuation,
    interval,
    together,
)
from reproduction.worker import moments_by_rate, sequence_nats, training
from tests.support import forks
from tests.support.runs import wait_for

ROOT = Path(__file__).parents[2]
BYTES = load_tokenizer("bytes")
ROWS = 16  # of the quick form
COMMAND = [sys.executable, "-m", "reproduction", "--quick"]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_form_interrupted_and_taken_up_again(tmp_path):
    work, page = tmp_path / "work", tmp_path / "work" / "quick-page.md"
    records = work / "quick-page" / "records"
    ptb = tmp_path / "ptb.txt"
    ptb.write_text("the <unk> rose N points \n" * 200)
    command = [*COMMAND, "--work", str(work), "--text", f"ptb={ptb}"]
    process = forks.Program(command, cwd=tmp_path, env=ENV)
    wait_for(lambda: process.poll() is not None or len(list(records.glob("*.json"))) >= 3, 300)
    process.send_signal(signal.SIGTERM)
    output = "".join(process.communicate(180))
    process.end()
    there = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert 3 <= len(there) < ROWS, output
    assert not page.exists()
    assert not list(records.glob("*.partial"))

    done = forks.run(command, cwd=tmp_path, env=ENV, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    now = {path.name: path.stat().st_mtime_ns for path in records.glob("*.json")}
    assert now.items() >= there.items()
    assert len(now) == ROWS + 1  # efficiency
    text = page.read_text()
    assert "Its numbers mean nothing" in text
    assert "Not measured yet" not in text
    assert text.count("\n## ") == 10
    assert "| model | ptb |" in text
    for name in ("perplexity", "intervals", "searched", "samples"):
        assert (work / "quick-page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"](quick-page/{name}.png)" in text
    record = json.loads((records / "ar-1.json").read_text())
    measured = record["texts"]["held-out, L'=1"]
    assert f"| AR | {sum(measured['nats']) / sum(measured['tokens']):.4f} ± " in text
    assert record["asked"]["recipe"] in text
    assert record["made"]["commit"] in text

    made = Work(SCALES["quick"], work / "quick", records, work / "topics.jsonl", None, {"ptb": f"ptb={ptb}"})
    assert made.missing() == []
    more = Work(made.scale, made.folder, records, made.train, None, made.texts | {"more": "more.txt"})
    assert [row.name for row, _ in more.missing()] == [row.name for row in rows(made.scale) if row.writes]

    (records / "l4-1.json").unlink()
    again = forks.run([*command, "--page"], cwd=tmp_path, env=ENV)
    assert "wrote" in again.stdout
    assert page.read_text().count("Not measured yet: l4 (") == 6
    (records / "l4-1.json").write_text("{")
    bad = forks.run(command, cwd=tmp_path, env=ENV)
    assert bad.returncode
    assert "is not a run record" in bad.stdout + bad.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no text to train on"),
        (["--scale", "huge"], "give one of quick, small, paper"),
        (["--train", "nowhere.txt"], "nowhere.txt"),
        (["--scale", "paper", "--page"], "has no record"),
        (
            ["--train", "nowhere.txt", "--text", "wiki=nowhere.txt"],
            "no text set is called 'wiki'",
        ),
    ],
)
def test_what_it_cannot_do_it_says(tmp_path, arguments, message):
    line = [sys.executable, "-m", "reproduction", *arguments]
    done = forks.run(line, cwd=tmp_path, env=ENV)
    assert done.returncode == 1
    assert message in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def model(random_model):
    return random_model(BYTES.vocabulary)


def batch_of(tokens):
    count, length = tokens.shape
    ids, start = torch.arange(count), torch.zeros(count, length, dtype=torch.int32)
    positions = torch.arange(length).expand(count, -1)
    counted = torch.ones(count, length, dtype=torch.bool)
    return Batch(ids, ids, 0 * ids, 0 * ids, tokens, start, positions, counted, ~counted)


def nll(model, block):
    """Return the nats of each token of a first block, [masked copies, L'], for the masks in `block`."""
    cache = model.new_cache(len(block), block.shape[1])
    return -model.decode(block, torch.arange(block.shape[1]).expand_as(block), cache).double().log_softmax(-1)


def test_a_sequence_costs_its_bound_given_the_first_token(groups, model):
    """Check each token given those before it at L'=1, and a block of 4 by all 7 masks of the other 3, at all rates."""
    tokens = torch.randint(0, 256, (1, 4), generator=torch.Generator().manual_seed(3))
    text = batch_of(tokens.expand(256, -1))
    mask = BYTES.vocabulary.mask_id
    nats, counts = sequence_nats(
        model, groups, batch_of(tokens), BlockDiffusion(DiffusionRecipe(block_size=1), BYTES.vocabulary), 1
    )
    cache = model.new_cache(1, 4)
    expected = 0.0
    for place in range(4):
        position = torch.tensor([[place]])
        logits = model.decode(torch.tensor([[mask]]), position, cache).double().log_softmax(-1)
        expected -= float(logits[0, 0, tokens[0, place]]) if place else 0.0
        model.prefill(tokens[:, place : place + 1], position, cache)
    assert counts == [3]
    assert nats == pytest.approx([expected], abs=1e-3)

    masks = torch.tensor([[0, *(number >> bit & 1 for bit in range(3))] for number in range(1, 8)], dtype=torch.bool)
    laws = nll(model, tokens.masked_fill(masks, mask))
    costs = (laws.gather(-1, tokens.expand(7, -1)[..., None])[..., 0] * masks).sum(1)
    # ∫ p^(m-1) (1-p)^(3-m) dp of m masked tokens.
    sizes = masks.sum(1).tolist()
    exact = sum(
        math.factorial(m - 1) * math.factorial(3 - m) / math.factorial(3) * float(cost)
        for m, cost in zip(sizes, costs, strict=True)
    )
    drawn, _ = sequence_nats(model, groups, text, BlockDiffusion(DiffusionRecipe(block_size=4), BYTES.vocabulary), 32)
    error = float(np.std(drawn)) / 16
    assert error < 0.02 * exact
    assert abs(np.mean(drawn) - exact) < 4 * error


def measured(nats):
    nats = np.asarray(nats, dtype=float)
    return Measured(nats, np.full(nats.shape[1], 10.0))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Check rows that differ by 0.02 nats a token, with a seed's shift of 0.01, sequences hard for both, and noise."""
    generator = np.random.default_rng(0)
    hits = margin_hits = 0
    for _ in range(400):
        hard = generator.normal(0, 3, 200)

        def row(mean, hard=hard):
            shifts = generator.normal(0, 0.01, (2, 1))
            return measured((mean + shifts) * 10 + hard + generator.normal(0, 1, (2, 200)))

        rows = [row(1.5) for _ in range(5)] + [row(1.52)]
        seeds = Seeds.pooled(rows)
        assert seeds.freedom == 6
        difference = Difference.between(rows[-1], rows[0], seeds)
        hits += abs(difference.value - 0.02) <= difference.margin
        margin_hits += abs(rows[0].mean - 1.5) <= interval(rows[0], seeds)
    assert 0.92 < hits / 400 <= 1
    assert 0.92 < margin_hits / 400 <= 1


def test_verdicts():
    assert [Difference(d, 0.1).verdict() for d in (0.2, -0.2, 0.05)] == [HOLDS, FAILS, UNDECIDED]
    assert Difference(0.2, 0.1).verdict(more=False) == FAILS
    assert together([HOLDS, HOLDS]) == HOLDS
    assert together([HOLDS, UNDECIDED]) == UNDECIDED
    assert together([UNDECIDED, FAILS]) == FAILS
    lone = Seeds.pooled([measured([[1.0, 2.0, 3.0]])])
    assert (lone.deviation, lone.freedom) == (0.0, 0)
    assert lone.quantile == pytest.approx(1.96, abs=1e-3)


def test_fluctuation_is_the_variance_around_a_slow_fall():
    noise = np.random.default_rng(1).normal(0, 0.3, 20_000)
    losses = list(3 - np.linspace(0, 1, 20_000) + noise)
    assert math.sqrt(fluctuation(losses)) == pytest.approx(0.3, rel=0.02)


def test_moments_by_mask_rate_are_those_of_the_blocks_counted_one_by_one():
    generator = torch.Generator().manual_seed(3)
    rates = torch.rand(2, 20, 8, generator=generator)
    nll = torch.rand(2, 20, 8, generator=generator, dtype=torch.float64) * 12
    counted = torch.rand(20, 8, generator=generator) < 0.8
    held_out = HeldOut(None, 4, block_moments(nll, rates, 4, counted))
    found = np.array(moments_by_rate(held_out, 4))
    losses = (nll / (4 * rates.double())).numpy()
    inside = counted.expand(2, 20, 8).numpy()
    for tenth in range(10):
        here = losses[inside & (np.floor(rates.numpy() * 10) == tenth)]
        np.testing.assert_allclose(found[tenth], [len(here), here.sum(), np.square(here).sum()], rtol=1e-9)
    assert moments_by_rate(HeldOut(None, 1, torch.zeros(37, 20, 3)), 1) == []


def test_a_training_is_summed_up_from_metrics_of_this_version_and_of_earlier_ones(tmp_path):
    step = {"train/loss": 2.5, "train/grad_norm": 1.0, "train/tokens": 100, "perf/tokens_per_second": 50.0}
    search = {"interval/mask_rate_low_block_4": 0.3, "interval/loss_variance_block_4": 8.0, "eval/nelbo": 2.0}
    names = {"train/loss": "train_loss", "train/tokens": "tokens", "perf/tokens_per_second": "tokens_per_second"}
    earlier = [
        {names.get(key, key.partition("/")[2]): value for key, value in record.items()} for record in (step, search)
    ]
    for folder, records in (("now", (step, search)), ("earlier", earlier)):
        (tmp_path / folder).mkdir()
        lines = (json.dumps({"step": number} | record) + "\n" for number, record in enumerate(records, 1))
        (tmp_path / folder / "metrics.jsonl").write_text("".join(lines))
    found = training(tmp_path / "now")
    assert found == training(tmp_path / "earlier")
    assert (found["tokens"], found["seconds"], found["losses"], found["grad_norms"]) == (100, 2.0, [2.5], [1.0])
    assert found["searches"] == [{"step": 2, "mask_rate_low_block_4": 0.3, "loss_variance_block_4": 8.0}]


def test_variance_splits_into_that_at_a_rate_and_that_from_rate_to_rate():
    """Compare with the variance of all losses at once, in tenths of equal size (the law of total variance)."""
    generator = np.random.default_rng(1)
    losses = [generator.normal(3 + tenth**2 / 10, 10 - tenth, size=500) for tenth in range(10)]
    rates = np.array([[len(own), own.sum(), np.square(own).sum()] for own in losses])
    for low, high in ((0, 5), (3, 8), (0, 10)):
        at, between = parts_of_variance(rates, (low / 10, high / 10))
        assert at + between == pytest.approx(np.concatenate(losses[low:high]).var())
        assert between == pytest.approx(np.var([own.mean() for own in losses[low:high]]))
    # Short blocks: the rate with the least noise decides. Long blocks: the one with the flattest mean does.
    assert expected(rates, 1) == (0.5, 1.0)
    assert expected(rates, 10**6) == (0.0, 0.5)


def test_the_order_of_intervals_needs_clear_moves_to_lighter_masks():
    heavy, light = (0.5, 1.0), (0.0, 0.5)
    short = {heavy: (1.0, 0.1), light: (5.0, 0.1)}
    tied = {heavy: (1.0, 0.1), light: (0.9, 0.1)}
    long = {heavy: (1.0, 0.1), light: (0.2, 0.1)}
    assert order_of_intervals([short, short]) == order_of_intervals([short, tied]) == UNDECIDED
    assert order_of_intervals([short, short, long]) == HOLDS
    assert order_of_intervals([long, short]) == order_of_intervals([short, long, short]) == FAILS
    assert order_of_intervals([short, {light: (0.2, 0.1)}]) == UNDECIDED


def test_sources_are_known_again_by_their_bytes(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("one")
    work = Work(SCALES["quick"], tmp_path / "work", tmp_path / "records", text, None, {})
    work.stamp("data", {"train": fingerprint(text)})
    copied = tmp_path / "copied" / "text.txt"
    copied.parent.mkdir()
    copied.write_text("one")
    work.stamp("data", {"train": fingerprint(copied)})
    assert fingerprint(tmp_path / "copied") != fingerprint(text)
    copied.write_text("two")
    with pytest.raises(ValueError, match="give another --work"):
        work.stamp("data", {"train": fingerprint(copied)})


def test_what_is_ended_is_waited_for_with_all_that_it_started(tmp_path):
    """Check that a worker ends at once when told to, and that its training saves first."""
    saving = (
        "import signal, sys, time\n"
        "def save(*_): time.sleep(1); print(end='saved'); sys.exit()\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "print(end='ready ', flush=True); time.sleep(60)"
    )
    worker = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {saving!r}])"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", worker], stdout=output, start_new_session=True)
    while "ready" not in (tmp_path / "output").read_text():
        time.sleep(0.05)
    end_all([process])
    assert (tmp_path / "output").read_text() == "ready saved"


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES.keys())
def test_every_row_is_a_recipe_that_trains(scale, tmp_path):
    """Check also the rows of the scale for a GPU, which no test trains."""
    work = Work(scale, tmp_path, tmp_path / "records", tmp_path, None, {})
    for row in rows(scale):
        recipe = load_recipe(scale.path, work.overrides(row, 1))
        check_recipe(recipe, 1)
        batch = scale.recipe.train.global_batch_size * scale.length
        assert recipe.train.global_batch_size * recipe.data.seq_len == batch
        assert row.block_sizes[0] in recipe.diffusion.block_sizes or recipe.diffusion.objective == "next_token"
