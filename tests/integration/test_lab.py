"""Run the plug-in of docs/extend.md in real runs, with the plug-in installed and without it."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import re
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support import forks
from tests.support.programs import BD3_SCALE
from tests.support.recipes import tiny_recipe
from tests.support.runs import losses, tensor_files

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs/extend.md").read_text()
PLUGINS = REPOSITORY / "tests/plugins"
STEPS = 4
ALONE = ["parallel.tensor=1", "parallel.pipeline=1", "train.steps=1"]
POEM = "a rose is red / a violet blue / " * 20


def bd3_scale(folder: Path, *words: object, installed: bool = True, returncode: int = 0) -> str:
    """Run a command with the plug-in or without it, and return what it printed."""
    path = [str(PLUGINS)] * installed + os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "COLUMNS": "200"}
    done = forks.run([BD3_SCALE, *words], cwd=folder, env=environment)
    assert done.returncode == returncode, done.stdout + done.stderr
    return done.stderr if returncode else done.stdout


def fenced(language: str, first: str) -> str:
    """Return the block of the page that begins with `first`."""
    (found,) = re.findall(rf"```{language}\n({re.escape(first)}.*?)```", PAGE, re.DOTALL)
    return found


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Run the commands of the page in a folder, with training on TP2 and PP2; return it and what each printed."""
    folder = tmp_path_factory.mktemp("lab")
    topics = list(pydoc_data.topics.topics.items())[:24]
    rows = [("name", "body"), *((name, " ".join(text.split())[:2000]) for name, text in topics)]
    (folder / "texts.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    (folder / "poem.txt").write_text(POEM)
    recipe = tiny_recipe(
        parallel={"tensor": 2, "pipeline": 2},
        train={"steps": STEPS, "global_batch_size": 4},
        checkpoint={"every_steps": 2},
        evaluation={"sequences": 4},
    )
    ideas, groups = (yaml.safe_load(fenced("yaml", first)) for first in ("plugins:", "optimizer:"))
    recipe |= ideas | {"optimizer": ideas["optimizer"] | groups["optimizer"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = [shlex.split(line)[1:] for line in fenced("sh", "bd3-scale ").splitlines()]
    said = {" ".join(words): bd3_scale(folder, *words) for words in commands}
    return folder, said


def test_a_run_used_what_the_plug_in_adds(workplace) -> None:
    folder, said = workplace
    (trained,) = (text for command, text in said.items() if command.startswith("train"))
    assert "attention: double; optimizer: signum, 3 groups" in trained
    rows = [line.split(",") for line in (folder / "runs/lab/loss.csv").read_text().splitlines()]
    assert {int(step): float(loss) for step, loss in rows} == {
        n: loss for n, (loss, _) in losses(folder / "runs/lab").items()
    }
    assert json.loads((folder / "data/manifest.json").read_text())["train"]["documents"] < 24
    manifest = json.loads((folder / f"runs/lab/checkpoints/step-{STEPS:08d}/manifest.json").read_text())
    assert manifest["states"] == ["master", "momentum"]
    assert manifest["trained_with"]["plugins"] == ["bd3_lab"]

    # One process computes the same, and without the plug-in's loss it computes something else.
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    del recipe["diffusion"]["objective_options"]
    (folder / "plain.yaml").write_text(yaml.safe_dump(recipe))
    bd3_scale(folder, "train", "recipe.yaml", "run_dir=runs/alone", *ALONE)
    bd3_scale(folder, "train", "plain.yaml", "run_dir=runs/plain", "diffusion.objective=block_diffusion", *ALONE)
    (split, alone, plain) = (losses(folder / "runs" / run)[1] for run in ("lab", "alone", "plain"))
    assert alone == pytest.approx(split, rel=1e-5)
    assert plain[0] > 1.001 * alone[0]


def test_it_resumes_bitwise_from_its_middle(workplace) -> None:
    """Check a directory as a kill in the third step leaves it."""
    folder, _ = workplace
    whole, resumed = folder / "runs/lab", folder / "runs/resumed"
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(f"step-{STEPS:08d}", "latest"))
    kept = [line for line in (whole / "metrics.jsonl").read_text().splitlines(True) if json.loads(line)["step"] <= 2]
    (resumed / "metrics.jsonl").write_text("".join(kept))
    assert "resumed after step 2" in bd3_scale(folder, "train", "recipe.yaml", "run_dir=runs/resumed")
    assert losses(resumed) == losses(whole)
    assert tensor_files(resumed, STEPS) == tensor_files(whole, STEPS)


@pytest.mark.slow
def test_killed_it_resumes_bitwise(workplace) -> None:
    folder, _ = workplace
    command = ["train", "recipe.yaml", "run_dir=runs/killed"]
    bd3_scale(folder, *command, "--inject", "kill@step:step=4,rank=2", returncode=137)
    assert "resumed after step 2" in bd3_scale(folder, *command)
    assert losses(folder / "runs/killed") == losses(folder / "runs/lab")
    assert tensor_files(folder / "runs/killed", STEPS) == tensor_files(folder / "runs/lab", STEPS)


def test_a_text_set_is_measured_as_the_plain_text_that_it_makes(workplace) -> None:
    folder, said = workplace
    (folder / "plain.txt").write_text(POEM.replace(" / ", "\n"))
    options = ["--json", "--text", "verses=poem.txt", "--text", "plain.txt"]
    poem, plain = json.loads(bd3_scale(folder, "--plugin", "bd3_lab", "evaluate", "runs/lab", *options))
    assert (poem["text"], plain["text"]) == ("verses", "plain")
    assert poem["nelbo"] == plain["nelbo"]
    assert 4 < poem["nelbo"] < 7
    assert f"{poem['perplexity']:.2f}" in next(text for command, text in said.items() if "evaluate" in command)


def test_a_rule_takes_the_passes_that_it_says(workplace) -> None:
    folder, _ = workplace
    options = ["--max-new-tokens", "16", "--json", "--temperature", "0.5"]
    for steps, passes in ((4, 8), (1, 2)):
        rule = ["--unmasking", "left-to-right", "--steps", steps]
        written = json.loads(bd3_scale(folder, "--plugin", "bd3_lab", "generate", "runs/lab", *rule, *options))
        assert written["nfe"] == passes


def test_without_the_plug_in_weights_suffice_where_no_idea_of_it_is_asked_for(workplace) -> None:
    folder, _ = workplace
    generate = ["generate", "runs/lab", "--max-new-tokens", "24", "--seed", "3", "--json", "--prompt", "def"]
    here, elsewhere = (
        json.loads(bd3_scale(folder, *words, installed=installed))
        for words, installed in ((["--plugin", "bd3_lab", *generate], True), (generate, False))
    )
    assert len(here["tokens"]) == 24
    assert here["tokens"] == elsewhere["tokens"]
    bd3_scale(folder, "convert", "export", "runs/lab", "--out", "again", installed=False)
    for file in (folder / "exported").iterdir():
        assert (folder / "again" / file.name).read_bytes() == file.read_bytes(), file.name
    assert "focal" in bd3_scale(folder, "convert", "inspect", "runs/lab", installed=False)
    for command in ("list", "verify"):
        assert f"{STEPS}" in bd3_scale(folder, "checkpoint", command, "runs/lab", installed=False)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "evaluate runs/lab",
            ["trained for the objective 'focal'", "comes from a plug-in that is not imported", "--plugin bd3_lab …"],
        ),
        ("train recipe.yaml run_dir=runs/lab train.steps=6", ["the plug-in bd3_lab cannot be imported", "PYTHONPATH"]),
        (
            "generate runs/lab --unmasking left-to-right",
            ["no unmasking rule is called 'left-to-right'", "--plugin MODULE"],
        ),
        ("evaluate runs/lab --text verses=poem.txt", ["no text set is called 'verses'", "--plugin MODULE"]),
        ("data prepare texts.tsv --out x --tokenizer bytes --seq-len 64", ["texts.tsv is not a kind of file"]),
    ],
)
def test_without_the_plug_in_what_is_missing_is_said_in_one_line(workplace, command: str, words: list[str]) -> None:
    said = bd3_scale(workplace[0], *command.split(), installed=False, returncode=2)
    assert said.count("\n") == 1, said
    assert all(word in said for word in words), said


def test_without_the_plug_in_a_recipe_that_does_not_name_it_lists_what_is_unknown(workplace) -> None:
    folder, _ = workplace
    said = bd3_scale(folder, "train", "recipe.yaml", "plugins=[]", installed=False, returncode=2)
    assert [re.match(r"  - (\S+)=", line)[1] for line in said.splitlines()[1:]] == [
        "diffusion.objective",
        "diffusion.noise_schedule",
        "attention_backend",
        "optimizer.family",
        "logging.loggers",
    ]


def test_an_objective_that_fills_no_masks_writes_nothing_and_needs_its_plug_in_for_an_export(workplace) -> None:
    folder, _ = workplace
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe |= {"diffusion": {"block_size": 1, "objective": "next_token_z"}, "attention_backend": "auto"}
    (folder / "next.yaml").write_text(yaml.safe_dump(recipe))
    bd3_scale(folder, "train", "next.yaml", "run_dir=runs/next", *ALONE)
    for installed in (True, False):
        said = bd3_scale(folder, "generate", "runs/next", installed=installed, returncode=2)
        assert "was trained for next_token_z and fills no masks" in said
    assert "next_token_z" in bd3_scale(folder, "convert", "inspect", "runs/next", installed=False)
    export = ["convert", "export", "runs/next", "--out", "causal"]
    assert "--plugin bd3_lab" in bd3_scale(folder, *export, installed=False, returncode=2)
    assert "Qwen3ForCausalLM" in bd3_scale(folder, "--plugin", "bd3_lab", *export, "--dry-run")
