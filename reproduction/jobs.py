"""Run the jobs of a reproduction: prepare data once, then a job for each row and seed without a record."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.sources import DocumentReader
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.sets import NamedText
from bd3_scale.recipe.load import load_recipe
from reproduction.records import read_records
from reproduction.rows import Row, Scale, rows

COMMAND = Path(sys.executable).with_name("bd3-scale")
ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 120.0  # for an interrupted training to save and end


@dataclass(frozen=True, eq=False)
class Work:
    """The inputs and folders of a reproduction: `folder` has data and runs, which may be lost; `records` the
    results."""

    scale: Scale
    folder: Path
    records: Path
    train: Path
    validation: Path | None
    texts: dict[str, str]

    def data(self, longer: int = 1) -> Path:
        """Return the folder of tokens in sequences of `longer` times the scale's length."""
        return self.folder / ("data" if longer == 1 else f"data-{longer}")

    def overrides(self, row: Row, seed: int) -> list[str]:
        """Return a row's overrides of the scale's recipe, as the command line takes them."""
        values = {"name": f"{self.scale.name}-{row.name}", "seed": seed, "data.path": self.data(row.longer)}
        values |= {"run_dir": self.run(row, seed)} | row.overrides
        return [f"{key}={value}" for key, value in values.items()]

    def run(self, row: Row, seed: int) -> Path:
        """Return the run directory, one for each recipe: a changed recipe must not resume this run."""
        return self.folder / "runs" / f"{row.name}-{seed}-{self.recipe_hash(row, seed)}"

    def recipe_hash(self, row: Row, seed: int) -> str:
        """Return a hash of all values that differ from the defaults, so that a new option does not change it."""
        values = {"seed": seed, "data.path": "any"} | row.overrides
        recipe = load_recipe(self.scale.path, [f"{key}={value}" for key, value in values.items()])
        settings = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"name"})
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def log(self, row: Row, seed: int) -> Path:
        """Return the path of a job's output."""
        return self.folder / "jobs" / f"{row.name}-{seed}.txt"

    def prepare(self, tokenizer: str) -> None:
        """Prepare training and held-out data, and the other texts, unless they exist.

        ValueError: existing data were made from other sources.
        """
        sources = {"train": fingerprint(self.train), "validation": fingerprint(self.validation), "tokenizer": tokenizer}
        for longer in sorted({row.longer for row in rows(self.scale)}):
            self._prepare_data(longer, sources)
        for name, argument in self.texts.items():
            out = self.folder / "texts" / name
            text = NamedText.parse(argument)
            self.stamp(f"texts/{name}", {"text": fingerprint(text.path), "tokenizer": tokenizer})
            if not out.exists():
                text.prepare(out, load_tokenizer(tokenizer), seq_len=self.scale.length, document_multiple=1)

    def _prepare_data(self, longer: int, made_of: dict[str, Any]) -> None:
        out = self.data(longer)
        self.stamp(out.name, made_of)
        if out.exists():
            return
        sources = self._cut(self.train, self.scale.text_bytes, "train")
        held_out: list[object] = []
        if self.validation is not None:
            # A little more than is measured, from all documents; a subword token has about five characters.
            size = 5 * self.scale.sequences * self.scale.length // 4 * (1 if self.scale.unit == "byte" else 6)
            held_out = ["--validation", self._cut(self.validation, size, "valid")]
        length = str(longer * self.scale.length)
        line = [COMMAND, "data", "prepare", sources, *held_out, "--out", out, "--seq-len", length]
        subprocess.run([*map(str, line), "--tokenizer", made_of["tokenizer"], "--document-multiple", "1"], check=True)

    def stamp(self, made: str, sources: dict[str, Any]) -> None:
        """Record the sources of the file `made`. ValueError: it was made from other sources."""
        path = self.folder / f"{made}.sources.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(sources))
        recorded = json.loads(path.read_text())
        if recorded != json.loads(json.dumps(sources)):
            raise ValueError(
                f"{self.folder / made} was made from {recorded}, not from {sources}: give another --work, or "
                f"remove {self.folder / made} and {path}"
            )

    def _cut(self, source: Path, size: int, name: str) -> Path:
        """Write about `size` characters of the text, the same number of each document, and return the file."""
        documents = [document.text for document in DocumentReader([source])]
        share = max(1, size // len(documents))
        out = self.folder / f"{name}.jsonl"
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text[:share]}) + "\n" for text in documents)
        return out

    def missing(self) -> list[tuple[Row, int]]:
        """Return rows and seeds without a record of their recipe, in order."""
        records = read_records(self.records)
        missing = [
            (row, seed)
            for row in rows(self.scale)
            for seed in row.seeds or self.scale.seeds
            if not self._is_current(records.get((row.name, seed)), row, seed)
        ]
        without_judge = any(row.writes for row, _ in missing) and not self.judge.exists()
        if without_judge and all(row.name != "judge" for row, _ in missing):
            return [self.judging, *missing]
        return missing

    def _is_current(self, record: dict[str, Any] | None, row: Row, seed: int) -> bool:
        """Tell whether a record has the current conditions and was measured on every text."""
        if record is None or record["asked"] != self.conditions(row, seed):
            return False
        return not row.writes or set(self.texts) <= {key.rpartition(", L'=")[0] for key in record["texts"]}

    @property
    def data_hash(self) -> str:
        """Return 16 hexadecimal digits of the SHA-256 of the documents, their split and their tokeniser."""
        digest = hashlib.sha256(load_manifest(self.data()).tokenizer_hash.encode())
        for split in ("train", "validation"):
            digest.update((self.data() / f"{split}-documents.u64").read_bytes())
        return digest.hexdigest()[:16]

    def conditions(self, row: Row, seed: int) -> dict[str, Any]:
        """Return the conditions of a record, which it stores as `asked`; with other conditions a row is run again."""
        conditions = {
            "recipe": self.recipe_hash(row, seed),
            "data": self.data_hash,
            "sequences": self.scale.sequences // row.longer,
            "draws": self.scale.draws,
            "samples": self.scale.samples if row.writes else 0,
        }
        return conditions | ({"judge": self.recipe_hash(*self.judging)} if row.writes else {})

    @property
    def judging(self) -> tuple[Row, int]:
        """Return the judge's row and seed."""
        row = next(row for row in rows(self.scale) if row.name == "judge")
        return row, row.seeds[0]

    @property
    def judge(self) -> Path:
        """Return the folder of the exported judge, which transformers reads."""
        return self.folder / f"judge-{self.recipe_hash(*self.judging)}"

    def job(self, row: Row, seed: int) -> dict[str, Any]:
        """Return the description of a job for `reproduction.worker`."""
        held_out = {"held-out": str(self.data(row.longer))}
        return {
            "row": row.name,
            "seed": seed,
            "recipe": str(self.scale.path),
            "asked": self.conditions(row, seed),
            "overrides": self.overrides(row, seed),
            "run_dir": str(self.run(row, seed)),
            "record": str(self.records / f"{row.name}-{seed}.json"),
            "texts": held_out | ({n: str(self.folder / "texts" / n) for n in self.texts} if row.writes else {}),
            "block_sizes": row.block_sizes,
            "length": row.longer * self.scale.length,
            "writes": row.writes,
            "exports": row.name in ("judge", "ar"),
            "judge": str(self.judge),
        }


def run_jobs(work: Work, at_once: int, progress: Callable[[int, int, str], object]) -> list[str]:
    """Run missing jobs, `at_once` at a time, the judge before rows that it scores; return the rows that failed.

    progress: called with the finished jobs, all jobs, and the job that just ended. If it is interrupted, running
    trainings save and end.
    """
    waiting, running, failed = work.missing(), {}, []
    total = len(waiting)
    try:
        while waiting or running:
            ready = [job for job in waiting if work.judge.exists() or not job[0].writes]
            while ready and len(running) < at_once:
                row, seed = ready.pop(0)
                waiting.remove((row, seed))
                running[row, seed] = _start(work, row, seed)
            if not running:
                return [*failed, *(f"{row.name}, seed {seed}: there is no judge" for row, seed in waiting)]
            time.sleep(1)
            for (row, seed), process in list(running.items()):
                if process.poll() is None:
                    continue
                del running[row, seed]
                progress(total - len(waiting) - len(running), total, f"{row.name}, seed {seed}")
                if process.returncode:
                    failed.append(f"{row.name}, seed {seed}: see {work.log(row, seed)}")
    finally:
        end_all(list(running.values()))
    return failed


def fingerprint(path: Path | None) -> list[str] | None:
    """Return the name of a file or folder and 16 hexadecimal digits of the SHA-256 of its bytes."""
    if path is None:
        return None
    digest = hashlib.sha256()
    for part in sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]:
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return [path.name, digest.hexdigest()[:16]]


def _start(work: Work, row: Row, seed: int) -> subprocess.Popen[bytes]:
    log = work.log(row, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    path = log.with_suffix(".json")
    path.write_text(json.dumps(work.job(row, seed)))
    with log.open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "reproduction.worker", str(path)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            start_new_session=True,
        )


def end_all(processes: list[subprocess.Popen[bytes]]) -> None:
    """End the processes and wait until their trainings have saved: another command may resume them at once."""
    for process in processes:
        _signal_group(process, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for process in processes:
        while time.monotonic() < deadline and _signal_group(process, 0):
            process.poll()  # reaps the process; a zombie would stay in its group
            time.sleep(0.1)
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> bool:
    """Send a signal to a process's group; return whether the group still has a process."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return False
    return True
