"""Files from outside that were made to do harm: nothing runs, nothing is read elsewhere, one line says why.

What `SECURITY.md` promises is what this file holds. More of safetensors headers and indices is in
`test_conversion_bad_input`, templates that reach for Python in `test_prepare_dialogs`, lines of
50 megabytes in `test_prepare_faults`.
"""

import ast
import dataclasses
import gzip
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pyarrow
import pytest

from a3_jax.checkpoints import families
from a3_jax.checkpoints.a3_format import Meta, load_meta, save_checkpoint
from a3_jax.checkpoints.conversion import convert
from a3_jax.checkpoints.hf_config import config_from_hf
from a3_jax.checkpoints.hf_format import check_source
from a3_jax.checkpoints.safetensors import list_tensors
from a3_jax.data.dialogs import ChatTemplate, chat_template
from a3_jax.data.documents import BadRecord
from a3_jax.data.prepare_state import PrepareProgress, read_progress, read_waiting
from a3_jax.data.prepared import find_prepared, open_tables
from a3_jax.data.prepared_manifest import _text_crc32
from a3_jax.decoding.requests import read_lines
from a3_jax.errors import InputError
from a3_jax.model.config import CHOICES, ModelConfig
from a3_jax.paths import read_json, read_text
from a3_jax.tokenizer import bytes_tokenizer, from_files
from tests import tiny
from tests.checkpoint_fixtures import reseal
from tests.decoding_cli import assert_refused, run
from tests.prepare_fixtures import prepare
from tests.prepared_fixtures import make_prepared, rows
from tests.tiny_families import hf_fields
from tests.tiny_hf import write_tiny_llama

PACKAGE = pathlib.Path(__file__).parent.parent / "a3_jax"
DEEP = "[" * 100_000 + "]" * 100_000
LONG = "1" * 5000
FILES = bytes_tokenizer().files()


class Evil:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


# Code that runs what a file holds.


def test_no_room_runs_what_files_hold():
    """Benchmarks import the user's own file, and `training.command` runs the user's own config.

    `evaluation.tasks.sandbox_child` runs what a model wrote, in its own process, where a flag asks for it.
    """
    refused = re.compile(
        r"(pickle|dill|cloudpickle|joblib|marshal|shelve)\.|torch\.load|allow_pickle=True|yaml\.(unsafe_)?load|"
        r"trust_remote_code=True|^eval$|^exec$|^compile$|^__import__$|os\.system|shell=True|extractall"
    )
    wrong = []
    for path in {*PACKAGE.rglob("*.py")} - {PACKAGE / "evaluation" / "tasks" / "sandbox_child.py"}:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                arguments = [f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords]
                wrong += [
                    f"{path}:{node.lineno} {text}"
                    for text in (ast.unparse(node.func), *arguments)
                    if refused.search(text)
                ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
def test_pickled_weights_are_not_loaded(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(InputError):
        list_tensors(tmp_path)
    assert not (tmp_path / "ran").exists()


def progress(tmp_path, **changes):
    """What an interrupted `a3 data prepare` left, read as the next one does."""
    fields = dataclasses.asdict(PrepareProgress({}, [])) | changes
    (tmp_path / "progress.json").write_text(json.dumps(fields))
    return read_waiting(tmp_path, read_progress(tmp_path))


def test_pickled_documents_are_not_loaded(tmp_path):
    evil = np.array([Evil(tmp_path / "ran")], object)
    arrays = {f"{split}_{name}": evil for split in ("train", "heldout") for name in ("lengths", "tokens")}
    np.savez(tmp_path / "pending-0.npz", **arrays)
    (tmp_path / "pending-1.npz").write_bytes(pickle.dumps(evil))
    for number in (0, 1):
        with pytest.raises(InputError, match="is damaged"):
            progress(tmp_path, pending=f"pending-{number}.npz")
    assert not (tmp_path / "ran").exists()


TEMPLATES = [
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{% for a in messages %}" * 30 + "{% endfor %}" * 30,  # more than Python nests
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'inf'|float|int }}",  # which becomes Python that names `inf`
    "{{ 1" + LONG + " }}",
    "{{ range(10000000)|list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os }}",
    "{{ messages|tojson(cls=dict) }}",
    "{{ namespace()|tojson(default='{0.__class__.__mro__}'.format) }}",
    "{{ '{0.__class__}'.format(messages) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum.__globals__.os }}",
]


@pytest.mark.parametrize("text", TEMPLATES, ids=lambda text: text[:30])
def test_templates_neither_leave_nor_break(text):
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises((InputError, BadRecord)) as refused:
        ChatTemplate(text, bytes_tokenizer()).render(messages, True)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("value", [[1], [{"name": [1], "template": "x"}], [{"name": "default"}], 5, {"a": 1}])
def test_templates_of_the_wrong_kind_are_none(value):
    config = json.dumps({"chat_template": value})
    assert chat_template(from_files(FILES | {"tokenizer_config.json": config})) is None


# Names that lead elsewhere.


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "sub/x.safetensors", "..", "", 3, ["x"], {}, "x" * 300, "x\0"]
)
def test_an_index_names_files_beside_it_only(tmp_path, name):
    write_tiny_llama(tmp_path, shards=2)
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], name)
    file.write_text(json.dumps(index))
    with pytest.raises(InputError, match="is no file name inside this directory"):
        list_tensors(tmp_path)


def prepared(tmp_path, change):
    """Rows of prepared data whose manifest was changed, checksum and all."""
    directory = tmp_path / "rows"
    directory.mkdir()
    make_prepared(directory, rows(7))
    file = directory / "manifest.json"
    fields = json.loads(file.read_text())
    del fields["crc32"]
    change(fields, fields["splits"]["train"][0])
    file.write_text(json.dumps(fields | {"crc32": _text_crc32(fields)}))
    return open_tables(find_prepared(str(directory)), 8)[0].take([0, 6])


@pytest.mark.parametrize(
    "place", ["../elsewhere.array_record", "{tmp_path}/elsewhere.array_record", "a/../b"]
)
def test_a_manifest_names_shards_beside_it_only(tmp_path, place):
    name = place.format(tmp_path=tmp_path)

    def change(fields, shard):
        (tmp_path / "rows" / shard["file"]).rename(tmp_path / "elsewhere.array_record")
        shard["file"] = name

    with pytest.raises(InputError, match="is no shard of this directory"):
        prepared(tmp_path, change)


def test_an_unchanged_manifest_is_read(tmp_path):
    assert prepared(tmp_path, lambda *_: None)["tokens"].shape == (2, 8)


@pytest.mark.parametrize("pending", ["../pending-0.npz", "/pending-0.npz", "pending-0.npz/../x", 3, [1]])
def test_progress_names_files_beside_it_only(tmp_path, pending):
    with pytest.raises(InputError, match=r"progress\.json: not what"):
        progress(tmp_path, pending=pending)


def test_progress_names_shards_beside_it_only(tmp_path):
    shard = {"file": "../x.array_record", "rows": 1, "tokens": 1, "bytes": 1, "crc32": 1}
    with pytest.raises(InputError, match=r"progress\.json: not what"):
        progress(tmp_path, splits={"train": [shard], "heldout": []})


def test_a_tokenizer_reads_no_file_that_its_files_name(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    main = json.loads(FILES["tokenizer.json"])
    main["model"]["vocab"] = str(tmp_path / "vocab.json")
    with pytest.raises(InputError, match="not a tokenizer"):
        from_files({"tokenizer.json": json.dumps(main)})


def test_a_name_with_a_zero_byte():
    with pytest.raises(InputError, match="no file can have this name"):
        read_text("a\0b")


# Sizes that files claim.


CLAIMS = {
    "seq_len": lambda fields, shard: fields.update(seq_len=10**30),
    "rows": lambda fields, shard: shard.update(rows=2**63),
    "negative rows": lambda fields, shard: shard.update(rows=-1),
    "rows as text": lambda fields, shard: shard.update(rows="7"),
    "more rows than there are": lambda fields, shard: shard.update(rows=10**12),
    "bytes": lambda fields, shard: shard.update(bytes=10**12),
    "wider rows": lambda fields, shard: fields.update(segment_dtype="uint32"),
    "objects": lambda fields, shard: fields.update(token_dtype="O"),
    "roles": lambda fields, shard: fields.update(has_roles=5),
    "a missing field": lambda fields, shard: fields.pop("seq_len"),
    "an unknown field": lambda fields, shard: shard.update(x=1),
    "a list of splits": lambda fields, shard: fields.update(splits=[1]),
    "numbers as shards": lambda fields, shard: fields.update(splits={"train": [3]}),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_what_a_manifest_claims_is_checked(tmp_path, claim):
    with pytest.raises(InputError, match="is damaged"):
        prepared(tmp_path, CLAIMS[claim])


def test_a_tokenizer_with_a_huge_id():
    main = json.loads(FILES["tokenizer.json"])
    main["model"]["vocab"]["far"] = 2**32 - 1
    with pytest.raises(InputError, match="token id 4294967295"):
        from_files({"tokenizer.json": json.dumps(main)})


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_compressed_file_is_never_held_whole(tmp_path, suffix):
    """Half a gigabyte of zeros in one line."""
    file = tmp_path / f"bomb.jsonl.{suffix}"
    content = bytes(1 << 29) + b'\n{"text": "after it"}\n'
    small = gzip.compress(content, 1) if suffix == "gz" else pyarrow.compress(content, "zstd", asbytes=True)
    file.write_bytes(small)
    code = f"""
from a3_jax.data.documents import BadRecord, DocumentSource
(_, first), (_, second) = DocumentSource({str(file)!r}).records(("text",))
assert isinstance(first, BadRecord) and first.reason == "too_long", first
assert second == {{"text": "after it"}}
status = open("/proc/self/status").read()  # getrusage would count the parent's memory too
print(status.split("VmHWM:")[1].split()[0])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) << 10 < 1 << 29


def tensor(**changes):
    return json.dumps({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} | changes})


HEADERS = {
    "deep": (f'{{"a": {DEEP}}}', "its header is no JSON"),
    "long": (f'{{"a": {LONG}}}', "its header is no JSON"),
    "dtype": (tensor(dtype=["F32"]), "is not supported"),
    "size": (tensor(shape=[0, 2**63 - 1]), "no tensor can have this shape"),
    "sizes": (tensor(shape=[0, 2**31, 2**31]), "no tensor can have this shape"),
    "axes": (tensor(shape=[1] * 100, data_offsets=[0, 4]), "no tensor can have this shape"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_a_header_claims_is_checked(tmp_path, name):
    header, reason = HEADERS[name]
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(4 * (name == "axes"))
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(InputError, match=reason):
        list_tensors(tmp_path)


HUGE = [("d_model", 10**400), ("vocab_size", 2**31), ("num_layers", 10**9), ("num_layers", 10**12),
        ("norm_eps", 10**400), ("rope_theta", "x"), ("window", 2**31), ("query_init_scale", [1]),
        ("family", [1]), ("rope_scaling", 5),
        ("rope_scaling", {"kind": "yarn", "factor": 10**400})]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), HUGE, ids=lambda value: str(value)[:20])
def test_sizes_of_a_config(field, value):
    with pytest.raises(InputError) as refused:
        ModelConfig.from_dict(tiny.CONFIG.to_dict() | {field: value})
    assert str(refused.value).startswith(field) and len(str(refused.value)) < 300


def test_every_family_has_a_table():
    assert CHOICES["family"] == tuple(families.FAMILIES)


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden_size", 10**400), ("num_hidden_layers", 10**12), ("num_hidden_layers", 2**31 - 1),
     ("rms_norm_eps", 10**400), ("hidden_act", ["silu"])],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_sizes_of_a_hugging_face_config(field, value):
    for name in ("llama", "gemma3"):  # Gemma looks at each layer before there is a config
        with pytest.raises(InputError) as refused:
            config_from_hf(hf_fields(name, **{field: value, "hidden_activation": value}))
        assert field in str(refused.value) and len(str(refused.value)) < 300


# What an A3 checkpoint says of the Hugging Face files that it came from: they are written from it.

SOURCES = {
    "no config": ({"config": [1]}, "source.config"),
    "no tensors": ({"tensors": ["x"]}, "source.tensors"),
    "no files": ({"files": ["x"]}, "source.files"),
    **{
        f"dtype {dtype}": ({"tensors": {"lm_head.weight": dtype}}, "lm_head.weight: .* no parameter dtype")
        for dtype in ("object", "zz", "int32", [1], None, 5)
    },
    **{
        f"name {name[:20]!r}": ({"files": {name: "x"}}, "no name for a file to keep")
        for name in ("..", "", "a\0.json", "x" * 300 + ".json", "/x.json", "../x.json", "modeling_x.py",
                     "model.safetensors", "model.safetensors.index.json", "config.json", "pytorch_model.bin")
    },
    **{
        f"content {content}": ({"files": {"a.txt": content}}, "neither text nor base64")
        for content in (5, [], {}, {"base64": 5}, {"base64": "a"}, {"base64": "\u00e9"})
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_what_a_checkpoint_says_of_its_source_is_checked(name):
    changes, reason = SOURCES[name]
    source = {"config": {}, "tensors": {}, "files": {"a.json": "x", "tokenizer.model": {"base64": "AA=="}}}
    check_source(source, "a3.json")
    with pytest.raises(InputError, match=rf"^a3\.json: source.*{reason}|^a3\.json: {reason}") as refused:
        check_source(source | changes, "a3.json")
    assert "\n" not in str(refused.value)


def test_no_code_is_written_from_a_checkpoint(tmp_path):
    source = {"config": {}, "tensors": {}, "files": {"modeling_x.py": "x"}}
    save_checkpoint(tmp_path / "a3", tiny.params(), Meta(tiny.CONFIG, source))
    for to in ("a3", "hf"):
        with pytest.raises(InputError, match=r"a3\.json: source\.files: 'modeling_x\.py'"):
            convert(tmp_path / "a3", tmp_path / "out", to=to)
    assert not (tmp_path / "out").exists()
    file = tmp_path / "a3" / "meta" / "a3.json"
    text = file.read_text()
    file.write_text(text.replace('"x"', '"\\ud800"'))
    reseal(tmp_path / "a3")
    with pytest.raises(InputError, match=r"a3\.json: holds half of a surrogate pair"):
        load_meta(tmp_path / "a3")


# JSON that overflows what reads it.


@pytest.mark.parametrize(("text", "reason"), [(DEEP, "nested too deeply"), (LONG, "too many digits")])
def test_deep_json_and_long_numbers(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(f'{{"a": {text}}}')
    with pytest.raises(InputError, match=reason):
        read_json(tmp_path / "x.json")
    with pytest.raises(InputError, match=reason):
        from_files(FILES | {"tokenizer_config.json": f'{{"a": {text}}}'})
    bad = []
    (tmp_path / "x.jsonl").write_text(f'{{"tokens": {text}}}\n')
    assert not read_lines(tmp_path / "x.jsonl", bad)
    assert len(bad) == 1 and "not JSON" in str(bad[0]) and len(str(bad[0])) < 400


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_the_commands_say_one_line(tmp_path, capsys, text):
    checkpoint = tmp_path / "hf"
    write_tiny_llama(checkpoint)
    config = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(f'{{"a": {text}, {config[1:]}')
    outcome = run(capsys, "convert", checkpoint, tmp_path / "out")
    assert_refused(outcome, "config.json: not JSON")
    assert len(outcome[2]) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", [DEEP, LONG], ids=["deep", "long"])
def test_such_documents_are_passed_over(tmp_path, capsys, text):
    (tmp_path / "a.jsonl").write_text(f'{{"text": {text}}}\n{{"text": "fine"}}\n')
    status, out, err = prepare(capsys, tmp_path / "a.jsonl", tmp_path / "rows", "--holdout=0")
    assert status == 0, err
    assert "not_json" in out


# Tokenizers that make the library stumble.


def charsmap(text):
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


TOKENIZERS = {
    "charsmap": charsmap("////////AAAAAAAA"),
    "empty trie": charsmap("AAAAAAAA"),
    "trie that points outside": charsmap("CAAAAP////////8AAAA="),
    "pieces of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "template": {
        "post_processor": {
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "absent", "type_id": 0}}],
        }
    },
    "unknown": {"model": {"type": "Unigram", "unk_id": 5, "vocab": [["a", -1.0]]}},
    "merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "absent"]]}},
    "negative": {"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}},
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizers_that_panic_are_refused(name):
    text = json.dumps(json.loads(FILES["tokenizer.json"]) | TOKENIZERS[name])
    with pytest.raises(InputError):
        from_files({"tokenizer.json": text}).encode("abc")
