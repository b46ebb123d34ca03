"""Test the batch script of a recipe on a site with golden files, and what is refused before a submission."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from bd3_scale.launch import supervise
from bd3_scale.launch.job import Job, check_job, script, supervision
from bd3_scale.launch.profile import Profile, load_profile
from bd3_scale.launch.records import cache_override
from bd3_scale.launch.submit import make_job
from bd3_scale.recipe.load import load_recipe
from bd3_scale.recipe.schema import DataSource, Recipe, RecipeError

GOLDEN = Path(__file__).parent / "golden"
PROFILES = Path(__file__).parents[2] / "cluster/profiles"
BD3_SCALE = Path(sys.executable).with_name("bd3-scale")
RECIPE = Recipe.model_validate(
    {
        "name": "books",
        "run_dir": "/shared/runs/books",
        "model": {"num_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 128},
        "diffusion": {"block_size": 8},
        "data": {"path": "/shared/data", "seq_len": 64},
        "train": {"steps": 10, "global_batch_size": 32, "micro_batch_size": 2},
        "parallel": {"tensor": 2},
    }
)
GPU_SITE = {
    "partition": "gpu",
    "account": "lab",
    "qos": "long",
    "constraint": "h100",
    "gpus_per_node": 8,
    "cpus_per_process": 12,
    "memory": "0",
    "exclusive": True,
    "time_limit": "1-00:00:00",
    "modules": ["cuda/12.8", "nccl"],
    "environment": {"NCCL_DEBUG": "WARN", "NOTE": "two words"},
    "interface": "ib0",
    "scratch": "/scratch",
    "shared_storage": ["/shared"],
    "container": {"image": "/images/bd3.sqsh", "mounts": ["/shared:/shared"]},
    "preflight": {"min_free_gb": 100, "min_allreduce_gbps": 50},
}
CPU_SITE = {"processes_per_node": 2, "time_limit": "10:00", "requeue": False}


def job(site: dict, **more) -> Job:
    fixed = {"recipe_files": {"/home/me/books.yaml": "00ff"}, "commit": "0123456789ab"}
    fixed |= {"python": "/opt/bd3/bin/python", "supervisor": "/opt/bd3/supervise.py", "submission": "5eed"}
    more = {"recipe": RECIPE, "nodes": 2, "folder": Path("/shared/runs/books/slurm"), **fixed, **more}
    return Job(profile=Profile.model_validate(site), **more)


@pytest.mark.launch
@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("gpu", job(GPU_SITE, nodes=4, exclude=("n7", "n9"))),
        ("chain", job(CPU_SITE, chain=3, dependency="afterok:12")),
    ],
)
def test_script_and_supervision_are_the_golden_files(name: str, made: Job) -> None:
    """Compare with the golden files. To renew them after an intended change, copy what the assertion shows."""
    assert script(made) == (GOLDEN / f"{name}.sh").read_text()
    assert supervision(made) == json.loads((GOLDEN / f"{name}.json").read_text())
    done = subprocess.run(["bash", "-n"], input=script(made), text=True, capture_output=True, timeout=10, check=False)
    assert done.returncode == 0, done.stderr


def test_where_plug_ins_lie_is_kept_and_a_profile_goes_over_it() -> None:
    made = job(CPU_SITE | {"environment": {"PYTHONPATH": "/site"}}, python_path="/home/me/my lab:/home/me/other")
    lines = [line for line in script(made).splitlines() if "PYTHONPATH" in line]
    assert lines == ["export PYTHONPATH='/home/me/my lab:/home/me/other'", "export PYTHONPATH=/site"]
    assert "PYTHONPATH" not in script(job(CPU_SITE))


def test_a_cache_is_the_job_s_own_on_each_node() -> None:
    remote = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"remote": "s3://bucket/data"})})
    told = supervision(job(GPU_SITE, recipe=remote))
    assert told["cache"] == "/scratch/bd3_scale"
    assert told["command"][-1] == "data.path={cache}"


def test_two_runs_of_a_recipe_have_jobs_of_two_names() -> None:
    one, other = job(CPU_SITE), job(CPU_SITE, folder=Path("/shared/runs/other/slurm"))
    assert one.name != other.name
    assert one.name.startswith("books-")


def test_a_layout_that_does_not_fit_is_refused_with_those_that_would() -> None:
    wide = RECIPE.model_copy(update={"parallel": RECIPE.parallel.model_copy(update={"pipeline": 4})})
    with pytest.raises(RecipeError) as error:
        check_job(wide, Profile.model_validate(CPU_SITE), 3, Path("/runs"))
    assert "3 nodes x 2 processes = 6 ranks; these would fit: " in str(error.value)
    assert "--nodes 4" in str(error.value)


def test_a_run_directory_that_other_nodes_do_not_see_is_refused() -> None:
    with pytest.raises(ValueError, match=r"/home/x is not on shared storage \(/shared in the profile\)"):
        check_job(RECIPE, Profile.model_validate(GPU_SITE), 2, Path("/home/x"))
    check_job(RECIPE, Profile.model_validate(GPU_SITE), 2, Path("/shared/x"))


def test_a_wait_for_data_may_take_longer_than_a_remote_is_asked_again() -> None:
    patient = RECIPE.model_copy(update={"data": RECIPE.data.model_copy(update={"retry_minutes": 60.0})})
    with pytest.raises(RecipeError, match=r"the profile's deadlines\.data=3600 .*data\.retry_minutes=60 \(3600 s\)"):
        check_job(patient, Profile.model_validate(CPU_SITE | {"deadlines": {"data": 3600}}), 2, Path("/runs"))
    assert supervision(dataclasses.replace(job(CPU_SITE), recipe=patient))["deadlines"]["data"] == 4500
    assert supervision(job(CPU_SITE | {"deadlines": {"data": 1801}}))["deadlines"]["data"] == 1801


def test_apptainer_stands_between_srun_and_the_ranks() -> None:
    container = {
        "engine": "apptainer",
        "image": "/images/bd3.sif",
        "mounts": ["/shared:/shared", "/scratch:/scratch:ro"],
    }
    prefix = ["apptainer", "exec", "--bind=/shared:/shared", "--bind=/scratch:/scratch:ro", "/images/bd3.sif"]
    told = supervision(job(CPU_SITE | {"container": container}))
    assert (told["container"], told["rank_python"]) == (prefix, "python3")
    prefix.insert(2, "--nv")
    assert supervision(job(GPU_SITE | {"container": container}))["container"] == prefix


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"partion": "gpu", "time_limit": "1:00", "gpus_per_node": 1}, "partion: unknown key; did you mean partition?"),
        ({"time_limit": "1:00"}, "set gpus_per_node, or processes_per_node"),
        ({"gpus_per_node": 8}, "time_limit: is missing"),
        ({"gpus_per_node": 8, "time_limit": "a day"}, "time_limit: "),
        ({"gpus_per_node": 8, "time_limit": "1:00", "deadlines": {"steps": 3}}, "did you mean deadlines.step"),
        (CPU_SITE | {"environment": {"A=1; touch was-run; B": "2"}}, "environment: must have names of letters"),
        (CPU_SITE | {"environment": {"1A": "2"}}, "environment: must have names of letters"),
        (CPU_SITE | {"environment": {"RANK": "2"}}, "environment: must not set RANK"),
        (CPU_SITE | {"container": {"image": "a", "python": "--prolog=b"}}, "container.python: must match pattern"),
        (CPU_SITE | {"container": {"image": "--overlay=b"}}, "container.image: must match pattern"),
        (CPU_SITE | {"container": {"image": "a", "mounts": ["/a:/a,/etc:/b"]}}, "container.mounts.0: must match"),
        *(
            (CPU_SITE | site, f"{key}: must be text without control characters")
            for key, site in {
                "partition": {"partition": "main\n#SBATCH --wrap=id"},
                "memory": {"memory": "1G\r"},
                "modules": {"modules": ["cuda", "nccl\x85"]},
                "environment": {"environment": {"A": "1\u2028"}},
                "container.image": {"container": {"image": "a\x7f"}},
            }.items()
        ),
    ],
)
def test_a_wrong_profile_is_refused(content: dict, words: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=words.replace("?", r"\?")) as refused:
        load_profile(str(path))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overrides": [r'run_dir="runs/a\n#SBATCH --wrap=id"']}, "run_dir: must be text without control characters"),
        ({"overrides": [r'data.path="runs/a\e[2J"']}, "data.path: must be text without control characters"),
        ({"overrides": ["run_dir=runs/a\\b"]}, "holds a backslash"),
        ({"dependency": "afterok:1\n#SBATCH --wrap=id"}, "sbatch's --dependency must be text without control"),
        ({"exclude": ["n1", "n2\nid"]}, "sbatch's --exclude must be text without control"),
        ({"time_limit": "foo"}, "--time must be minutes, or in a form such as 4:00:00 or 1-00:00:00, not 'foo'"),
        ({"time_limit": "1:00\nid"}, "--time must be minutes"),
        ({"folder": "a\nid #"}, "sbatch's --output must be text without control characters"),
    ],
)
def test_no_text_becomes_a_line_of_the_script(
    options: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, site = tmp_path / "recipe.yaml", tmp_path / "site.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE.model_dump(mode="json", exclude={"run_dir"})))
    site.write_text(yaml.safe_dump(CPU_SITE))
    here = tmp_path / options.pop("folder", ".")
    here.mkdir(exist_ok=True)
    monkeypatch.chdir(here)
    with pytest.raises(ValueError, match=words) as refused:
        script(make_job(recipe, options.pop("overrides", ()), profile=str(site), nodes=2, **options))
    assert len(str(refused.value).splitlines()) == 1


def test_sbatch_reads_every_value_as_it_is_written() -> None:
    odd = "a b#c\"d'$HOME`id`, 90%u ü"
    made = script(
        job(
            CPU_SITE | {"partition": odd}, folder=Path(f"/runs/{odd}/slurm"), dependency="-x", exclude=("n[1-2]", "n 3")
        )
    )
    # Quotes of a directive are a shell's, but for `$` and backticks, which are nothing to sbatch.
    lines = [line.removeprefix("#SBATCH ") for line in made.splitlines() if line.startswith("#SBATCH")]
    read = dict(word.partition("=")[::2] for line in lines for word in shlex.split(line))
    assert read["--partition"] == odd
    assert read["--output"] == f"/runs/{odd.replace('%', '%%')}/logs/job-%j.log"
    assert (read["--exclude"], read["--dependency"]) == ("n[1-2],n 3", "-x")


def test_each_remote_source_has_a_folder_of_its_own_in_a_cache(tmp_path: Path) -> None:
    sources = (
        DataSource(name="web", path="cache", remote="s3://bucket/{cache}: #", weight=1e-9),
        DataSource(name="code", path="/shared/cöde", weight=1.0, max_epochs=2.0),
    )
    data = RECIPE.data.model_copy(update={"path": "", "sources": sources})
    told = supervision(job(GPU_SITE, recipe=RECIPE.model_copy(update={"data": data})))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_JOB_ID", "7")
        patch.setenv("SLURMD_NODENAME", "n1")
        override = cache_override(told)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE.model_dump(mode="json") | {"data": data.model_dump(mode="json")}))
    found = load_recipe(path, [override]).data.sources
    assert found == (sources[0].model_copy(update={"path": "/scratch/bd3_scale-7-n1/web"}), sources[1])
    here = data.model_copy(update={"sources": sources[1:]})
    told = supervision(job(GPU_SITE, recipe=RECIPE.model_copy(update={"data": here})))
    assert told["cache"] is None


def test_a_rank_s_own_cache_replaces_its_placeholder_and_no_other_text(tmp_path: Path) -> None:
    show = [sys.executable, "-c", "import sys; print(*sys.argv[1:], sep='\\n')", "/runs/{cache}/recipe.yaml"]
    told = {"command": [*show, "data.path={cache}"], "cache": "/a: b #c", "ntasks_per_node": 1}
    (tmp_path / "job.json").write_text(json.dumps(told))
    (tmp_path / "heartbeats").mkdir()
    task = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
    }
    done = subprocess.run(
        [sys.executable, supervise.__file__, "rank", tmp_path / "job.json"],
        env=os.environ | task,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    recipe, override = done.stdout.splitlines()
    assert recipe == "/runs/{cache}/recipe.yaml"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE.model_dump(mode="json")))
    assert load_recipe(path, [override]).data.path == "/a: b #c-7-n1"


def test_an_unknown_profile_names_the_known_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ValueError, match=r"no profile 'mysite'.*dev-slurm"):
        load_profile("mysite")


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_profile_loads(path: Path) -> None:
    assert dataclasses.is_dataclass(job(load_profile(str(path)).model_dump()))


@pytest.mark.launch
def test_a_dry_run_needs_no_slurm_and_a_submission_says_that_there_is_none(tmp_path: Path) -> None:
    recipe, site = tmp_path / "recipe.yaml", tmp_path / "site.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE.model_dump(mode="json", exclude={"run_dir"})))
    site.write_text(yaml.safe_dump(CPU_SITE))

    def submit(*options: str) -> subprocess.CompletedProcess[str]:
        command = [BD3_SCALE, "submit", recipe, "--profile", site, "--nodes", "2", *options]
        nowhere = {"PATH": str(tmp_path), "HOME": str(tmp_path)}
        return subprocess.run(
            command, env=nowhere, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )

    dry = submit("--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"#SBATCH --output={tmp_path}/runs/books/logs/job-%j.log" in dry.stdout
    assert not (tmp_path / "runs").exists()
    for command in (("status",), ("stop",), ("requeue",), ("logs",)):
        done = subprocess.run(
            [BD3_SCALE, *command, "runs/books"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 2
        assert "was not submitted" in done.stderr or "no such log" in done.stderr
