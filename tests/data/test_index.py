"""Test that the table of an index equals the index, in any form of JSON, and that damage is found."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bd3_scale.data.index import SHARD_LIMIT, ShardTable, parse_index
from bd3_scale.data.manifest import Split

HASHES = st.integers(0, 2**64 - 1).map("{:016x}".format)
SIZES = st.sampled_from([0, 1, 9, 10, SHARD_LIMIT]) | st.integers(0, SHARD_LIMIT)
FORMAT = {
    "column_encodings": ["ndarray:int32", "ndarray:int32", "ndarray:uint16:64"],
    "column_names": ["counted_lengths", "document_lengths", "tokens"],
    "column_sizes": [None, None, 128],
    "format": "mds",
    "hashes": ["xxh64"],
    "size_limit": 67108864,
    "version": 2,
}


def entry(number: int, packed: bool, samples: int, files: list[tuple[int, str]]) -> dict[str, Any]:
    names = [f"shard.{number:05}.mds", f"shard.{number:05}.mds.zstd"]
    raw, zipped = (
        {"basename": name, "bytes": size, "hashes": {"xxh64": digits}}
        for name, (size, digits) in zip(names, files, strict=True)
    )
    how = {"compression": "zstd", "zip_data": zipped} if packed else {"compression": None, "zip_data": None}
    return FORMAT | how | {"raw_data": raw, "samples": samples}


@st.composite
def indices(draw: st.DrawFn) -> dict[str, Any]:
    """Draw an index of one to six shards; at least one has samples."""
    packed = draw(st.booleans())
    several = st.lists(st.tuples(SIZES, st.tuples(*[st.tuples(SIZES, HASHES)] * 2)), min_size=1, max_size=6)
    found = draw(several.filter(lambda shards: any(samples for samples, _ in shards)))
    return {
        "shards": [entry(n, packed, samples, list(files)) for n, (samples, files) in enumerate(found)],
        "version": 2,
    }


def shuffled(value: Any, seed: int) -> Any:
    """Return the same object with its keys in another order."""
    if isinstance(value, dict):
        names = sorted(value)
        random.Random(seed).shuffle(names)
        return {name: shuffled(value[name], seed) for name in names}
    return [shuffled(one, seed) for one in value] if isinstance(value, list) else value


@given(index=indices(), seed=st.integers(0, 50), how=st.sampled_from([{}, {"indent": 1}, {"separators": (",", ":")}]))
def test_a_table_says_what_its_index_does(index: dict[str, Any], seed: int, how: dict[str, Any]) -> None:
    as_written = json.dumps(index, sort_keys=True).encode()
    table = parse_index("index.json", as_written)
    assert [shard.model_dump() for shard in table] == index["shards"]
    mixed = {"shards": [shuffled(one, seed * (n % 3)) for n, one in enumerate(index["shards"])], "version": 2}
    again = parse_index("index.json", json.dumps(mixed, **how).encode())
    assert np.array_equal(again.rows, table.rows)
    assert again == table
    shards = index["shards"]
    assert list(table.identities()) == [f"{s['raw_data']['hashes']['xxh64']}/{s['samples']}" for s in shards]
    assert table.stored_bytes == sum((s["zip_data"] or s["raw_data"])["bytes"] for s in shards)


@given(index=indices(), data=st.data())
def test_what_is_damaged_is_refused(index: dict[str, Any], data: st.DataObject) -> None:
    """Check it for damage in any shard: entries that look like the first one take a shorter way."""
    number = data.draw(st.integers(0, len(index["shards"]) - 1))
    shard = index["shards"][number]
    if data.draw(st.booleans()) or shard["zip_data"] is None:
        name, value = data.draw(
            st.sampled_from(
                [
                    *(("bytes", size) for size in (SHARD_LIMIT + 1, -1, 1.0, "1")),
                    *(("hashes", hashes) for hashes in ({}, {"xxh64": "0" * 15}, {"xxh64": "0" * 15 + "g"})),
                    *(("basename", name) for name in ("../a", f"shard.{number + 1:05}.mds", f"shard.{number}.mds")),
                ]
            )
        )
        shard["raw_data"] = shard["raw_data"] | {name: value}
    else:
        shard["column_sizes" if number else "column_names"] = [None, None, 64] if number else ["a", "b", "tokens"]
    with pytest.raises(ValueError, match=rf"^index\.json is damaged \(.*shards?[. ]{number}\b"):
        parse_index("index.json", json.dumps(index, sort_keys=True).encode())


@pytest.mark.parametrize("place", [("raw_data", "bytes"), ("zip_data", "bytes"), ("samples",)])
def test_an_entry_that_looks_like_the_first_one_is_no_larger_than_a_shard(place: tuple[str, ...]) -> None:
    index: dict[str, Any] = {"shards": [entry(n, True, 3, [(5, "0" * 16)] * 2) for n in range(3)], "version": 2}
    *within, name = place
    target = index["shards"][1]
    for step in within:
        target = target[step]
    target[name] = SHARD_LIMIT
    parse_index("index.json", json.dumps(index, sort_keys=True).encode())
    target[name] = SHARD_LIMIT + 1
    with pytest.raises(ValueError, match=rf"^index\.json is damaged \(shards\.1\.{'.'.join(place)}: .* less than"):
        parse_index("index.json", json.dumps(index, sort_keys=True).encode())


def test_keys_in_an_order_that_looks_like_another_one() -> None:
    """Check it with the numbers of the packed file where streaming has those of the unpacked one."""
    shards = [entry(n, True, 3, [(n, f"{n:016x}"), (9 + n, f"{9 + n:016x}")]) for n in range(3)]
    order = ("zip_data", "samples", "raw_data")
    turned = [{name: one[name] for name in (*order, *(one.keys() - set(order)))} for one in shards]
    table = parse_index("index.json", json.dumps({"shards": turned, "version": 2}).encode())
    assert [shard.model_dump() for shard in table] == shards


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", '{"shards": []}', '{"shards": [], "version": 2}', '{"shards": [1], "version": 2}'),
        *('{"shards": [{}], "version": 2}', '{"version": 2, "shards": [{}, ]}', '{"shards": [ ] ] , "version": 2}'),
    ],
)
def test_what_is_no_index_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r"^index\.json is damaged"):
        parse_index("index.json", content.encode())


def test_an_entry_behind_a_comma_too_many_is_refused() -> None:
    shards = [entry(n, True, 3, [(5, "0" * 16)] * 2) for n in range(3)]
    whole = json.dumps({"shards": shards, "version": 2}, sort_keys=True)
    for wrong in (whole.replace('], "version', ', ], "version'), whole.replace("}}, {", "}},, {"), whole + "]"):
        with pytest.raises(ValueError, match=r"^index\.json is damaged"):
            parse_index("index.json", wrong.encode())


@given(index=indices(), other=indices())
def test_tables_differ_in_what_shards_hold(index: dict[str, Any], other: dict[str, Any]) -> None:
    one, two = (parse_index("index.json", json.dumps(found).encode()) for found in (index, other))
    names = [list(table.identities()) for table in (one, two)]
    longest = max(map(len, names))
    padded = [found + [None] * (longest - len(found)) for found in names]
    assert one.differing(two) == sum(a != b for a, b in zip(*padded, strict=True))
    assert (one == two) == (names[0] == names[1])


@given(index=indices())
def test_a_table_is_kept_for_other_ranks_and_by_a_run(
    tmp_path_factory: pytest.TempPathFactory, index: dict[str, Any]
) -> None:
    table = parse_index("index.json", json.dumps(index).encode())
    name: Path = tmp_path_factory.mktemp("table") / "train"
    table.save(name)
    loaded = ShardTable.load(name)
    assert [shard.model_dump() for shard in loaded] == index["shards"]
    counts = dict.fromkeys(("documents", "counted_tokens", "dropped_tokens", "text_bytes"), 1) | {"sequences": 1}
    written = Split(**counts, shards=table).model_dump_json()
    assert json.loads(written)["shards"] == list(table.identities())
    assert Split.model_validate_json(written).shards == table
