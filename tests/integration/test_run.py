"""Run `bd3-scale train` on real text: interrupted, killed, resumed, resumed on another layout, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import write_recipe
from tests.support.runs import losses, nelbos, records, tensor_files, wait_for

STEPS = 12
PHASES = "diffusion.block_size_schedule=[{block_size: 4, steps: 5}]"
LION = ["optimizer.family=lion", "optimizer.groups=[{match: '*layernorm*', lr_scale: 2, weight_decay: 0.05}]"]
SEARCH = ["evaluation.sequences=24", "evaluation.draws=2"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, topics):
    """Make a folder with prepared data, a recipe, and the run `whole` that nothing disturbed."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copytree(topics, folder / "data")
    write_recipe(
        folder / "recipe.yaml",
        parallel={"tensor": 2},
        evaluation={"every_steps": 4, "sequences": 8},
        checkpoint={"every_steps": 4, "keep_last": 3},
    )
    train(folder, "whole")
    return folder


def command(folder, *arguments, returncode=0):
    done = forks.run([BD3_SCALE, *arguments], cwd=folder)
    assert done.returncode == returncode, done.stdout + done.stderr
    return done


def train(folder, run, *overrides, returncode=0):
    return command(folder, "train", "recipe.yaml", f"run_dir={run}", *overrides, returncode=returncode)


def started(folder, run, *overrides, step=5):
    """Start a training in the background, and return it when it has finished `step`."""
    process = forks.Program([BD3_SCALE, "train", "recipe.yaml", f"run_dir={run}", *overrides], cwd=folder)

    def reached():
        assert process.poll() is None, process.output()
        return max(losses(folder / run), default=0) >= step

    wait_for(reached)
    return process


def test_a_run_leaves_what_it_promises(workplace):
    run = workplace / "whole"
    assert sorted(losses(run)) == list(range(1, STEPS + 1))
    assert sorted(nelbos(run)) == [4, 8, 12]
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "latest",
        *(f"step-{s:08d}" for s in (4, 8, 12)),
    ]
    assert (run / "checkpoints" / "latest").read_text() == "step-00000012\n"
    manifest = json.loads((run / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert manifest["trained_with"] == yaml.safe_load((run / "recipe.yaml").read_text())
    assert manifest["recipe_hash"] == (run / "recipe.sha256").read_text().strip()
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_killed_outright_and_resumed_is_bitwise_the_undisturbed_run(workplace):
    process = started(workplace, "killed", "data.num_workers=1")
    process.send_signal(signal.SIGKILL)
    process.wait()
    # The files of a save that was killed half-way must neither count as a checkpoint nor be in the way.
    partial = workplace / "killed" / "checkpoints" / ".partial-step-00000008"
    shutil.copytree(workplace / "whole" / "checkpoints" / "step-00000008" / "tokenizer", partial / "tokenizer")
    output = train(workplace, "killed").stdout
    assert "resumed after step 4" in output
    assert losses(workplace / "killed") == losses(workplace / "whole")
    assert nelbos(workplace / "killed") == nelbos(workplace / "whole")
    assert tensor_files(workplace / "killed", STEPS) == tensor_files(workplace / "whole", STEPS)
    assert not partial.exists()


def test_asked_to_stop_it_saves_and_goes_on_bitwise(workplace):
    run = workplace / "asked"
    for number, step in ((signal.SIGTERM, 2), (signal.SIGUSR1, 6)):
        process = started(workplace, "asked", step=step)
        process.send_signal(number)
        output = "".join(process.communicate())
        assert process.returncode == 0, output
        assert f"by {number.name}: the same command continues" in output
        assert step <= max(losses(run)) < STEPS
    train(workplace, "asked")
    assert losses(run) == losses(workplace / "whole")
    assert tensor_files(run, STEPS) == tensor_files(workplace / "whole", STEPS)
    assert "nothing to do" in train(workplace, "asked").stdout


def test_a_last_evaluation_that_was_cut_off_is_made_up_for(workplace):
    """Check a run that ended between its last checkpoint and the evaluation; running it again only evaluates."""
    run = workplace / "cut-off"
    shutil.copytree(workplace / "whole", run)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert sorted(nelbos(run)) == [4, 8]
    assert "nothing to do" in train(workplace, "cut-off").stdout
    assert nelbos(run) == nelbos(workplace / "whole")
    assert losses(run) == losses(workplace / "whole")
    # When the run goes further, the evaluation at the former end stays.
    train(workplace, "cut-off", "train.steps=13", "evaluation.every_steps=5")
    assert nelbos(run)[12] == nelbos(workplace / "whole")[12]
    assert sorted(nelbos(run)) == [4, 8, 12, 13]


def test_resumed_on_another_layout_it_takes_the_same_steps(workplace):
    """Check TP2 resumed as DP2 with ZeRO 3 by torchrun, with data from a remote, and then other layouts."""
    layouts = {
        "zero3": (
            "whole",
            4,
            TORCHRUN,
            ["parallel.zero_stage=3", "data.remote=data", "data.path=cache", "data.num_workers=1"],
        ),
        "pipeline": ("zero3", 8, [], ["parallel.pipeline=2", "train.recompute=selective"]),
        "context": ("zero3", 8, [], ["parallel.context=2", "train.micro_batch_size=8"]),
        "alone": ("zero3", 8, [], ["launch.processes=1", "parallel.zero_stage=0"]),
    }
    expected = losses(workplace / "whole")
    for name, (origin, start, launcher, overrides) in layouts.items():
        run = workplace / name
        checkpoint = Path("checkpoints", f"step-{start:08d}")
        shutil.copytree(workplace / origin / checkpoint, run / checkpoint)
        arguments = [BD3_SCALE, "train", "recipe.yaml", f"run_dir={name}", "parallel.tensor=1", *overrides]
        done = forks.run([*launcher, *arguments], cwd=workplace)
        assert done.returncode == 0, done.stdout + done.stderr
        for step, (loss, norm) in losses(run).items():
            assert loss == pytest.approx(expected[step][0], rel=1e-5)
            assert norm == pytest.approx(expected[step][1], rel=1e-4)
        assert sorted(losses(run)) == list(range(start + 1, STEPS + 1))
        assert nelbos(run)[STEPS] == pytest.approx(nelbos(workplace / "whole")[STEPS], rel=1e-5)
    of_pipeline = json.loads(command(workplace, "evaluate", "pipeline", "--sequences", "8", "--json").stdout)[0]
    assert of_pipeline["step"] == STEPS


@pytest.mark.parametrize(
    "overrides",
    [
        ["diffusion.block_size=64", "data.isolate_documents=false", "train.precision=bf16", "model.qk_norm=false"],
        ["diffusion.block_size=1", "diffusion.mask_rate_low=1.0", "diffusion.mask_rate_high=1.0"],
        ["diffusion.block_size_choices=[1,4,8]", "diffusion.search_interval=true", *SEARCH],
        ["diffusion.objective=score_entropy", "diffusion.clip_masked_share=true"],
        ["diffusion.noise_schedule=cosine", "diffusion.mask_rate_low=0.0", "diffusion.mask_rate_high=1.0", PHASES],
        pytest.param([*LION, "parallel.zero_stage=3"], marks=pytest.mark.slow),
        pytest.param([*LION, "parallel.zero_stage=1", "train.precision=bf16"], marks=pytest.mark.slow),
    ],
    ids=["mdlm-bf16", "autoregressive", "searched", "sedd", "cosine", "lion-zero3", "lion-zero1-bf16"],
)
def test_every_objective_resumes_bitwise_on_data_parallel_ranks(workplace, overrides, tmp_path):
    """Check DP2 without a moving average; an evaluation at the checkpoint's step is repeated."""
    common = ["optimizer.ema_decay=0.0", "parallel.tensor=1", "launch.processes=2", "train.steps=8"]
    runs = [tmp_path / name for name in ("first", "second")]
    train(workplace, runs[0], *common, *overrides)
    shutil.copytree(runs[0] / "checkpoints" / "step-00000004", runs[1] / "checkpoints" / "step-00000004")
    train(workplace, runs[1], *common, *overrides)
    first, second = losses(runs[0]), losses(runs[1])
    assert second == {step: first[step] for step in (5, 6, 7, 8)}
    assert tensor_files(runs[0], 8) == tensor_files(runs[1], 8)
    assert nelbos(runs[0])[8] == nelbos(runs[1])[8] < 5.7
    evaluated = [[r for r in records(run) if "eval/nelbo" in r] for run in runs]
    assert evaluated[0] == evaluated[1]
    if PHASES in overrides:
        for record in (r for r in records(runs[0]) if "train/loss" in r):
            assert record[f"train/loss_block_{4 if record['step'] <= 5 else 8}"] == record["train/loss"]
        assert [set(r) & {"eval/nelbo_block_4", "eval/nelbo_block_8"} for r in evaluated[0]] == [
            {"eval/nelbo_block_4", "eval/nelbo_block_8"},
            set(),
        ]
    if "diffusion.search_interval=true" in overrides:
        assert any("train/loss_block_4" in r and "train/loss_block_1" in r for r in records(runs[0]))
        last = evaluated[0][-1]
        assert {
            f"{key}_block_{n}"
            for key in ("eval/nelbo", "interval/mask_rate_low", "interval/loss_variance")
            for n in (1, 4, 8)
        } < set(last)
        assert (last["interval/mask_rate_low_block_1"], last["interval/mask_rate_high_block_1"]) == (1.0, 1.0)
        manifest = json.loads((runs[1] / "checkpoints/step-00000008/manifest.json").read_text())
        assert manifest["intervals"]["1"] == [1.0, 1.0]
        assert (runs[1] / "intervals.png").read_bytes().startswith(b"\x89PNG")
        check_search(workplace, runs[1])


def check_search(workplace, run):
    """Check that `evaluate --intervals` finds the same on any number of ranks, and names text that is too short."""
    options = ["evaluate", run, "--draws", "2", "--sequences", "24", "--intervals", "--json"]
    alone = command(workplace, *options).stdout
    both = forks.run([*TORCHRUN, BD3_SCALE, *options], cwd=workplace)
    assert both.stdout == alone, both.stderr
    intervals = json.loads(alone)[0]["intervals"]
    assert len(intervals) == 36
    assert min(i["variance"] for i in intervals) < intervals[0]["variance"] / 2
    refused = command(workplace, *options[:4], "--sequences", "9", "--intervals", returncode=2)
    assert "has 9 sequences and needs 16" in refused.stderr


def test_the_attention_is_chosen_by_the_recipe_and_over_it_by_the_environment(workplace, monkeypatch):
    """Check that another backend takes the same steps, and that one that cannot run ends the run at the start."""
    impossible = "cpu" if torch.cuda.is_available() else "triton"
    refused = [train(workplace, "impossible", f"attention_backend={impossible}", returncode=2)]
    assert not (workplace / "impossible" / "recipe.yaml").exists()
    monkeypatch.setenv("BD3_SCALE_ATTENTION", impossible)
    refused.append(command(workplace, "evaluate", "whole", returncode=2))
    for done in refused:
        assert f"attention backend '{impossible}' cannot run" in done.stderr
        assert "Traceback" not in done.stderr
    monkeypatch.setenv("BD3_SCALE_ATTENTION", "reference")
    output = train(workplace, "reference", f"attention_backend={impossible}").stdout
    assert output.count("attention: ") == output.count("attention: reference; ") == 1
    expected = losses(workplace / "whole")
    found = losses(workplace / "reference")
    assert found.keys() == expected.keys()
    assert [x for pair in found.values() for x in pair] == pytest.approx(
        [x for pair in expected.values() for x in pair], rel=1e-4
    )


def test_evaluate_and_generate(workplace):
    options = ["--draws", "1", "--sequences", "8", "--json"]
    (found,) = json.loads(command(workplace, "evaluate", "whole", *options).stdout)
    assert found["nelbo"] == pytest.approx(nelbos(workplace / "whole")[12], rel=1e-5)
    checkpoint = workplace / "whole" / "checkpoints" / "step-00000012"
    prompt = ["--prompt", "The [MASK] é", "--max-new-tokens", "20", "--seed", "3", "--json"]
    texts = [json.loads(command(workplace, "generate", path, *prompt).stdout) for path in ("whole", checkpoint)]
    assert texts[0]["tokens"] == texts[1]["tokens"]
    assert 0 < len(texts[0]["tokens"]) <= 20
    assert max(texts[0]["tokens"]) < 256  # bytes, never EOS or the mask
    (workplace / "prompts.txt").write_text("The [MASK] é\nOne\n")
    several = ["--prompts-file", "prompts.txt", "--max-new-tokens", "20", "--seed", "3", "--json"]
    lines = command(workplace, "generate", "whole", *several).stdout.splitlines()
    written = [json.loads(line) for line in lines]
    assert [text["prompt"] for text in written] == ["The [MASK] é", "One"]
    assert written[0]["tokens"] == texts[0]["tokens"], "the batch around it changes nothing"
    gaps = ["--infill", "--prompt", "The [MASK][MASK] of", "--max-new-tokens", "0", "--json"]
    filled = json.loads(command(workplace, "generate", "whole", *gaps).stdout)
    assert (filled["tokens"], filled["nfe"] > 0) == ([], True)
    assert filled["text"].startswith("The ")
    assert filled["text"].endswith(" of")
    unknown = command(workplace, "generate", "whole", "--unmasking", "beam", returncode=2)
    assert "no unmasking rule is called 'beam': known are first-hitting" in unknown.stderr
    longer = ["--prompt", "x" * 90, "--max-new-tokens", "30", "--temperature", "0", "--unmasking", "static", "--json"]
    assert json.loads(command(workplace, "generate", "whole", *longer).stdout)["window"] == 64


def test_two_trainings_in_one_run_directory(workplace):
    process = started(workplace, "shared", "train.steps=100000", step=1)
    recipe = (workplace / "shared/recipe.yaml").read_bytes()
    try:
        refused = train(workplace, "shared", "optimizer.lr=0.5", returncode=2)
        assert (workplace / "shared/recipe.yaml").read_bytes() == recipe
        assert "shared is in use by process" in refused.stderr
        assert "choose another run_dir" in refused.stderr
    finally:
        process.send_signal(signal.SIGTERM)
        output = "".join(process.communicate())
    assert process.returncode == 0, output


def test_a_run_cannot_become_another(workplace):
    """Check another shape, too few steps and no moving average: all are named at once, and no file is touched."""
    before = everything(workplace / "whole")
    changes = ["model.hidden_size=64", "train.steps=6", "optimizer.ema_decay=0.0"]
    refused = train(workplace, "whole", *changes, returncode=2).stderr
    assert "model.hidden_size is 64, the checkpoint has 32" in refused
    assert "train.steps is 6, the checkpoint has done 12" in refused
    assert "a moving average is kept from the start" in refused
    assert "run_dir=FOLDER" in refused
    assert everything(workplace / "whole") == before


def everything(run):
    """Return the contents of all files of a run except the ranks' logs and the lock."""
    files = [path for path in run.rglob("*") if path.is_file() and path.name != ".lock" and path.parent.name != "logs"]
    return {path: path.read_bytes() for path in files}


def test_damaged_data_is_named(workplace, tmp_path):
    """Check a byte flipped in a shard, and a tokeniser that does not belong to the shards."""
    data = tmp_path / "data"
    shutil.copytree(workplace / "data", data, ignore=shutil.ignore_patterns("*.mds"))
    shard = data / "train" / "shard.00000.mds.zstd"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused = train(workplace, tmp_path / "flipped", f"data.path={data}", "data.num_workers=1", returncode=2)
    assert "shard.00000.mds.zstd is damaged" in refused.stderr
    assert "Traceback" not in refused.stderr
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"A"', '"Ā"', 1))
    refused = train(workplace, tmp_path / "other", f"data.path={data}", returncode=2)
    assert "is not the one that the data was prepared with" in refused.stderr


def test_damaged_records_and_a_checkpoint_of_another_name_are_told_and_the_run_goes_on(workplace):
    run = workplace / "recorded"
    shutil.copytree(workplace / "whole", run)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([lines[0], "#?\n", *lines[2:]]))
    (run / "events.jsonl").write_text('{"step": null}\n{"step": 2, "kind": "loss_spike"}\n')
    done = train(workplace, "recorded", "name=renamed")
    assert "recorded/metrics.jsonl has a damaged line, from line 2 on: dropped" in done.stderr
    assert "recorded/events.jsonl has a damaged line, from line 1 on: dropped" in done.stderr
    assert "step-00000008 was written by a run named 'tiny', and this one is named 'renamed'" in done.stderr
    found = {step: value for step, value in losses(workplace / "whole").items() if step != 2}
    assert losses(run) == found
    assert tensor_files(run, STEPS) == tensor_files(workplace / "whole", STEPS)
    assert (run / "loss.png").is_file()


def test_damaged_checkpoints_are_named(workplace):
    run = workplace / "damaged"
    whole = workplace / "whole" / "checkpoints" / "step-00000012"
    checkpoint = run / "checkpoints" / "step-00000012"
    shutil.copytree(whole, checkpoint)
    os.truncate(checkpoint / "rank-00001.safetensors", 1000)
    refused = command(workplace, "generate", checkpoint, returncode=2)
    assert "rank-00001.safetensors has 1000 bytes" in refused.stderr
    assert "earlier checkpoint" in refused.stderr
    alone = train(workplace, "damaged", returncode=2).stderr
    assert "rank-00001.safetensors has 1000 bytes" in alone
    assert "none of the checkpoints in damaged/checkpoints is sound" in alone
    assert list(checkpoint.parent.iterdir()) == [checkpoint], "nothing moves before an older one is known sound"
    (checkpoint / "manifest.json").unlink()
    assert "no complete checkpoint" in command(workplace, "evaluate", "damaged", returncode=2).stderr


def test_a_run_directory_that_cannot_be_written(workplace):
    (workplace / "occupied").write_text("a file, not a folder")
    refused = train(workplace, "occupied", returncode=2)
    assert "occupied" in refused.stderr
    assert "Traceback" not in refused.stderr
