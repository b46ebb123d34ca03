"""List every reader of foreign files: a sound input, and how to read it. `test_readers.py` damages each in turn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
import zstandard
from safetensors.torch import save_file

from bd3_scale.checkpoint.manifest import read_manifest
from bd3_scale.checkpoint.source_ids import source_ids
from bd3_scale.checkpoint.tensors import TensorReader
from bd3_scale.convert.architectures import config_json
from bd3_scale.convert.export import plan_export, rows_of_source
from bd3_scale.convert.gguf import plan_gguf, write_gguf
from bd3_scale.convert.importer import plan_import, run_import
from bd3_scale.convert.inspect import inspect
from bd3_scale.convert.names import named_tensors
from bd3_scale.convert.official import open_official
from bd3_scale.convert.official_pickle import load_pickle
from bd3_scale.convert.upcycle import plan_upcycle
from bd3_scale.data.chat import ChatTemplate
from bd3_scale.data.index import Shard, read_index, read_shards
from bd3_scale.data.manifest import load_manifest
from bd3_scale.data.mds import shards
from bd3_scale.data.prepare import Preparation, prepare
from bd3_scale.data.prompts import read_messages, read_prompts
from bd3_scale.data.stored import StoredData, read_sequences
from bd3_scale.data.tasks import read_plan, read_result
from bd3_scale.data.tokenizer import load_tokenizer
from bd3_scale.evaluate.generative import Judge
from bd3_scale.generate.llama_file import open_llama_file
from bd3_scale.launch.profile import Profile, load_profile
from bd3_scale.launch.status import read_status
from bd3_scale.observe.follow import RecordFollower
from bd3_scale.observe.metrics import read_metrics
from bd3_scale.observe.report_data import read_run
from bd3_scale.plan.calibrate import read_results
from bd3_scale.plan.hardware import load_hardware
from bd3_scale.recipe.load import load_recipe, load_section, merged_yaml, recipe_files
from bd3_scale.recipe.schema import ModelRecipe
from bd3_scale.resilience.readers import read_regular

REPOSITORY = Path(__file__).parents[2]
MODEL = ModelRecipe(num_layers=2, hidden_size=8, num_attention_heads=2, ffn_hidden_size=16, qk_norm=False)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@dataclass(frozen=True)
class Case:
    """A reader's input: `make` writes it into a folder, `read` reads it there. files: those that are spoilt, by name.

    examples: how often; those that take long have fewer.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], object]
    files: tuple[str, ...]
    examples: int = 30


def a_foundry_corpus(folder: Path) -> None:
    file = {"basename": "shard.00000.mds", "bytes": 40, "hashes": {}}
    columns = {"column_encodings": ["bytes"], "column_names": ["tokens"], "column_sizes": [None]}
    rest = {"compression": None, "format": "mds", "hashes": [], "samples": 1, "size_limit": 67108864, "version": 2}
    shard = {**columns, **rest, "raw_data": file, "zip_data": None}
    (folder / "index.json").write_text(json.dumps({"shards": [shard], "version": 2}))
    (folder / "shard.00000.mds").write_bytes(b"")


def a_recipe(folder: Path) -> None:
    shutil.copy(REPOSITORY / "recipes/quickstart.yaml", folder / "base.yaml")
    (folder / "recipe.yaml").write_text("extends: base.yaml\nname: other\n")


def a_profile(folder: Path) -> None:
    (folder / "site.yaml").write_text(
        "partition: a\nprocesses_per_node: 2\ntime_limit: '10:00'\nenvironment: {A: b}\nmodules: [m]\n"
        "preflight: {timeout: 10}\n"
    )


def a_model(folder: Path) -> None:
    """Make a Hugging Face Llama in two files that its index names, with a tokeniser and a chat template."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        tensor.name: torch.randn(tensor.shape, generator=generator)
        for tensor in named_tensors(MODEL, vocab_rows=258, padded_rows=384, tied=False)
    }
    names = list(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, {"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = config_json(
        "llama", MODEL, block_size=1, vocab_rows=258, special_ids={"eos_token_id": 256, "bos_token_id": 256},
        mask_id=257, max_position_embeddings=64, dtype="float32",
    )  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"eos_token_id": [256], "temperature": 0.5}')
    load_tokenizer("bytes").save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def an_import(folder: Path) -> None:
    source = folder / "source"
    source.mkdir()
    a_model(source)
    run_import(plan_import(source), folder / "checkpoint")


def a_gguf(folder: Path) -> None:
    """Make a GGUF file of a block diffusion model."""
    model, source = MODEL.model_copy(update={"qk_norm": True}), folder / "source"
    source.mkdir()
    tensors = {
        tensor.name: torch.zeros(tensor.shape)
        for tensor in named_tensors(model, vocab_rows=258, padded_rows=384, tied=False)
    }
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    ids = {"eos_token_id": 256, "bos_token_id": None, "pad_token_id": 256}
    config = config_json(
        "sdar", model, block_size=4, vocab_rows=258, special_ids=ids, mask_id=257, max_position_embeddings=64,
        dtype="float32",
    )  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    load_tokenizer("bytes").save(source)
    run_import(plan_import(source), folder / "checkpoint")
    write_gguf(plan_gguf(folder / "checkpoint", "f32", importance=False), folder / "m.bd3.gguf")


def _manifest(path: Path) -> object:
    with open_llama_file(path) as file:
        return file.manifest


def a_dit(folder: Path) -> None:
    """Make a Lightning checkpoint like those of the official code, but small."""
    block = {
        "norm1.weight": (4,), "attn_qkv.weight": (12, 4), "attn_out.weight": (4, 4), "norm2.weight": (4,),
        "mlp.0.weight": (16, 4), "mlp.0.bias": (16,), "mlp.2.weight": (4, 16), "mlp.2.bias": (4,),
        "adaLN_modulation.weight": (24, 8), "adaLN_modulation.bias": (24,),
    }  # fmt: skip
    shapes = {
        "vocab_embed.embedding": (9, 4), "sigma_map.mlp.0.weight": (8, 16), "sigma_map.mlp.0.bias": (8,),
        "sigma_map.mlp.2.weight": (8, 8), "sigma_map.mlp.2.bias": (8,),
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "output_layer.norm_final.weight": (4,), "output_layer.linear.weight": (9, 4), "output_layer.linear.bias": (9,),
        "output_layer.adaLN_modulation.weight": (8, 8), "output_layer.adaLN_modulation.bias": (8,),
    }  # fmt: skip
    state = {f"backbone.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    state["backbone.rotary_emb.inv_freq"] = torch.ones(1)
    settings = {"config": {"block_size": 4, "model": {"length": 8, "hidden_size": 4}, "algo": {"cross_attn": True}}}
    torch.save({"state_dict": state, "hyper_parameters": settings}, folder / "last.ckpt")


def prepared_data(folder: Path) -> None:
    (folder / "text.txt").write_text("a few words of text and a few more " * 30)
    prepare([folder / "text.txt"], folder / "data", load_tokenizer("bytes"), 32, holdout=0.0, workers=1, progress=False)


def a_task(folder: Path) -> None:
    """Make the folder of an unfinished preparation."""
    (folder / "text.txt").write_text("a few words of text and a few more " * 30)
    options = {"holdout": 0.0, "workers": 1, "progress": False}
    Preparation([folder / "text.txt"], folder / "data", load_tokenizer("bytes"), 32, **options).work([0])


def a_shard(folder: Path) -> None:
    """Make the sequences of prepared data, unpacked."""
    prepared_data(folder)
    packed = next((folder / "data/train").glob("*.zstd"))
    (folder / "shard.mds").write_bytes(zstandard.decompress(packed.read_bytes()))


def _sequences(folder: Path) -> None:
    """Read a shard whose index agrees with whatever it holds."""
    (shard,) = StoredData(str(folder / "data")).shards("train")
    content = read_regular(folder / "shard.mds")
    raw = {"basename": "shard.mds", "bytes": len(content), "hashes": {"xxh64": xxhash.xxh64_hexdigest(content)}}
    told = Shard.model_validate(shard.model_dump() | {"raw_data": raw, "zip_data": None, "compression": None})
    read_sequences(str(folder / "shard.mds"), told)


def prompts(folder: Path) -> None:
    (folder / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    (folder / "prompts.txt").write_text("a\nb\n")


def messages(folder: Path) -> None:
    conversation = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (folder / "messages.jsonl").write_text(json.dumps({"messages": conversation}) + "\n")


def a_gpu(folder: Path) -> None:
    (folder / "gpu.yaml").write_text("extends: h100\nmatmul: 0.5\n")


def a_measurement(folder: Path) -> None:
    seconds = {"forward": 0.1, "backward": 0.2, "optimizer": 0.1, "step": 0.5}
    step = {"hardware": load_hardware("h100").device, "rows": [{"objective": "bd3", "seconds": seconds}]}
    (folder / "step.json").write_text(json.dumps(step) + "\n")


def a_run(folder: Path) -> None:
    """Make the folder of a submitted run with two attempts."""
    slurm = folder / "slurm"
    (slurm / "heartbeats").mkdir(parents=True)
    attempt = {"outcome": "requeued", "failure": False, "started": 1.0, "ended": 3.0, "step": 4, "saved": 4}
    attempt |= {
        "from_step": 0,
        "submission": "a",
        "attempt": 0,
        "job_id": "1",
        "nodes": [],
        "reason": "",
        "signals": [],
    }
    (slurm / "attempts.jsonl").write_text(json.dumps(attempt) + "\n" + json.dumps(attempt | {"attempt": 1}) + "\n")
    job = {"steps": 10, "exclude": [], "name": "a", "submission": "a", "nodes": 1, "run_dir": str(folder)}
    (slurm / "job.json").write_text(json.dumps(job))
    (slurm / "submitted.json").write_text('{"jobs": ["1"]}')
    records = [{"step": step, "train/tokens": 8 * step, "perf/tokens_per_second": 4.0} for step in (2, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _index(checkpoint: Path) -> None:
    with TensorReader(checkpoint) as reader:
        for tensor, shape in reader.shapes.items():
            reader.read(tensor, (0,) * len(shape), shape)


_WEIGHTS = ("config.json", "model.safetensors.index.json", "a.safetensors")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_IMPORTED = tuple(f"checkpoint/{name}" for name in ("manifest.json", "index.json", "part-00000.safetensors"))
_TASK = "data.tasks/00000"
_RUN = ("slurm/attempts.jsonl", "slurm/job.json", "slurm/submitted.json", "metrics.jsonl")

CASES = {
    "recipe.load.load_recipe": Case(
        a_recipe, lambda folder: load_recipe(folder / "recipe.yaml"), ("recipe.yaml", "base.yaml")
    ),
    "recipe.load.load_section": Case(
        a_profile, lambda folder: load_section(folder / "site.yaml", Profile), ("site.yaml",)
    ),
    "recipe.load.recipe_files": Case(
        a_recipe, lambda folder: recipe_files(folder / "recipe.yaml"), ("recipe.yaml", "base.yaml")
    ),
    "recipe.load.merged_yaml": Case(
        a_recipe, lambda folder: merged_yaml(folder / "recipe.yaml"), ("recipe.yaml", "base.yaml")
    ),
    "launch.profile.load_profile": Case(
        a_profile, lambda folder: load_profile(str(folder / "site.yaml")), ("site.yaml",)
    ),
    "launch.status.read_status": Case(a_run, read_status, _RUN),
    "observe.metrics.read_metrics": Case(a_run, lambda folder: read_metrics(folder / "metrics.jsonl"), _RUN[-1:]),
    "observe.report_data.read_run": Case(a_run, read_run, _RUN[-1:]),
    "observe.follow.RecordFollower._read": Case(
        a_run, lambda folder: RecordFollower(folder / "metrics.jsonl").refresh(), _RUN[-1:]
    ),
    "data.manifest.load_manifest": Case(
        prepared_data, lambda folder: load_manifest(folder / "data"), ("data/manifest.json",)
    ),
    "data.index.read_index": Case(
        prepared_data, lambda folder: read_index(folder / "data/train/index.json"), ("data/train/index.json",)
    ),
    "data.index.read_shards": Case(
        a_task, lambda folder: read_shards(folder / f"{_TASK}/train/index.json"), (f"{_TASK}/train/index.json",)
    ),
    "data.tasks.read_plan": Case(
        a_task, lambda folder: read_plan(folder / "data.tasks/plan.json"), ("data.tasks/plan.json",)
    ),
    "data.tasks.read_result": Case(
        a_task, lambda folder: read_result(folder / f"{_TASK}/task.json"), (f"{_TASK}/task.json",)
    ),
    "data.stored.read_sequences": Case(a_shard, _sequences, ("shard.mds",)),
    "data.stored.read_stored": Case(
        prepared_data, lambda folder: StoredData(str(folder / "data")).manifest, ("data/manifest.json",)
    ),
    "data.prompts.read_prompts": Case(prompts, lambda folder: read_prompts(folder), ("prompts.jsonl", "prompts.txt")),
    "data.prompts.read_messages": Case(
        messages, lambda folder: read_messages(folder / "messages.jsonl"), ("messages.jsonl",)
    ),
    "data.tokenizer.load_tokenizer": Case(a_model, lambda folder: load_tokenizer(folder).encode("a b"), _TOKENIZER),
    "checkpoint.manifest.read_manifest": Case(
        an_import, lambda folder: read_manifest(folder / "checkpoint"), _IMPORTED[:1]
    ),
    "checkpoint.storage.read_index": Case(an_import, lambda folder: _index(folder / "checkpoint"), _IMPORTED[1:]),
    "checkpoint.source_ids.source_ids": Case(
        an_import, lambda folder: source_ids(folder / "checkpoint"), ("checkpoint/tokenizer/source_ids.json",)
    ),
    "checkpoint.source_ids.ids_of_model": Case(
        a_model, lambda folder: plan_import(folder), ("config.json", "generation_config.json")
    ),
    "convert.official_pickle.load_pickle": Case(
        a_dit, lambda folder: load_pickle(folder / "last.ckpt"), ("last.ckpt",)
    ),
    "convert.official.open_official": Case(a_dit, lambda folder: open_official(folder / "last.ckpt"), ("last.ckpt",)),
    "convert.importer.plan_import": Case(a_model, lambda folder: plan_import(folder).tensors, _WEIGHTS + _TOKENIZER),
    "convert.inspect.inspect": Case(a_model, inspect, _WEIGHTS + _TOKENIZER),
    "convert.export.plan_export": Case(an_import, lambda folder: plan_export(folder / "checkpoint"), _IMPORTED[:2]),
    "convert.upcycle.plan_upcycle": Case(
        an_import, lambda folder: plan_upcycle(folder / "checkpoint", num_experts=2, top_k=1), _IMPORTED[:2]
    ),
    "convert.export.rows_of_source": Case(
        an_import, lambda folder: rows_of_source(folder / "checkpoint"), ("checkpoint/imported/mask_rows.safetensors",)
    ),
    "evaluate.generative._open_judge": Case(a_model, Judge, _WEIGHTS + _TOKENIZER, examples=4),
    "generate.llama_file._open": Case(a_gguf, lambda folder: _manifest(folder / "m.bd3.gguf"), ("m.bd3.gguf",)),
    "plan.hardware.load_hardware": Case(a_gpu, lambda folder: load_hardware(str(folder / "gpu.yaml")), ("gpu.yaml",)),
    "plan.calibrate.read_results": Case(
        a_measurement, lambda folder: read_results([folder / "step.json"], load_hardware("h100")), ("step.json",)
    ),
    "data.mds._read_index": Case(a_foundry_corpus, lambda folder: shards([folder]), ("index.json",)),
    "data.chat._template_and_tokens": Case(a_model, ChatTemplate, (*_TOKENIZER, "chat_template.jinja")),
}

# What opens files and is no reader, by the reason why it need not be one.
OPENERS = {
    "how readers open files": {
        *("resilience.readers.read_regular", "resilience.readers.open_regular", "resilience.files.read_object"),
        *("resilience.foreign.object_in", "resilience.foreign.weight_map", "resilience.foreign.for_transformers"),
        *("convert.folder.read_config", "convert.folder._open", "recipe.plain_yaml.parse_yaml"),
    },
    "a part of a reader": {
        *("checkpoint.tensors.TensorReader._slice", "checkpoint.storage.SafetensorsReader.read_data"),
        *("convert.official._config_in", "convert.official._is_safetensors", "convert.official._open_safetensors"),
        *("convert.official._read_safetensors", "convert.official_pickle._program", "generate.llama_file.check_seal"),
        *(
            "convert.official_pickle._describe_file",
            "convert.importer._keep_source_files",
            "data.chat.template_file",
            "data.chat.chat_template",
        ),
        *("data.prompts._prompts_of_jsonl", "data.prompts._prompts_of_txt", "data.tokenizer._read_backend"),
        *("data.tokenizer.converted_sentencepiece", "data.tokenizer_folder.write_tokenizer", "data.manifest._fetched"),
        "data.remote.fetch",
        *(
            "launch.attempts.read_attempts",
            "launch.records.read_json",
            "observe.metrics._lines",
            "observe.report_data._records",
            "observe.report_data._starts",
            "observe.report_data.read_recipe",
            "observe.report_data.why_unreadable",
        ),
        *(
            "plan.calibrate._objects",
            "recipe.load._read_extended",
            "train.resume._data_differences",
            "launch.submit.make_job",
        ),
    },
    "documents, which `tests/data/test_sources.py`, `test_columns.py` and `test_imported.py` spoil": {
        *("data.sources.DocumentReader.__iter__", "data.columns.parquet_rows", "data.columns.row_groups"),
        *("data.columns.record_batches", "data.megatron._Index.__init__"),
    },
    "other files are recognised and refused": {"data.files._saved_names", "launch.run_report._check_page"},
    "how remote files are opened": {"data.remote_files.RemoteFile.open"},
    "what the system says of this process": {"resilience.limits.limited_memory"},
    "the bytes alone count, which are compared with a hash": {
        *("resilience.files.file_hash", "data.shards.Shards._is_damaged"),
        *("data.shard_files._verified", "data.shards._sample_bytes"),
    },
    "a file of its own making, or of the machine": {
        *("checkpoint.folder.name_latest", "checkpoint.store._delete_surplus", "convert.check_export.check_export"),
        *("convert.check_export.problems", "convert.check_export.main", "convert.remote_code_files._read"),
        *("data.shard_files._shared", "data.shard_files.ShardFiles._locked", "data.shard_files._lock_cache"),
        *("data.index.ShardTable.load", "data.node._load"),
        *("convert.gguf._add_keys", "convert.gguf_tokenizer.tokenizer_keys", "generate.llama_file.seal"),
        *("lazy.lazy_names", "serve.page.page", "observe.report_page.report_page", "project.recipes._text"),
        *("data.prepare._check_new", "launch.attempts.write_attempt", "launch.commands.logs"),
        *("launch.cluster_doctor.visit", "launch.cluster_doctor._wait", "launch.cluster_doctor._no_answer"),
        *("launch.doctor._token", "launch.machine.storage", "launch.network.rdma_ports", "launch.network._is_up"),
        *(
            "plan.fake_gpu._shim",
            "plan.server._silence_libraries",
            "plan.trace_cache._read",
            "plan.trace_cache._source",
        ),
        "quickstart._write_corpus",
        *("launch.commands._follow", "launch.local._explain", "launch.ranks.Ranks.explain_failure"),
        *("launch.records.excluded_nodes", "launch.supervise.Supervisor._begin", "processor.fields"),
        *(
            "observe.environment.available_bytes",
            "observe.environment._fields",
            "observe.loggers.weights_and_biases._run_id",
            "resilience.faults._flip",
        ),
        *("resilience.files.Lines.__init__", "resilience.files.sync", "resilience.leftovers._make"),
        *("resilience.leftovers._remove_if_unlocked", "resilience.leftovers._protected_from_cleaners"),
        *(
            "resilience.output.reserve_standard_descriptors",
            "resilience.output._SurvivingFile._continue_in_log",
            "resilience.output.writing_results",
        ),
        *(
            "resilience.runlock.lock_run",
            "resilience.runlock.is_in_use",
            "resilience.secret.shared_secret",
            "resilience.secret._make",
        ),
    },
}
