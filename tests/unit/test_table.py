"""Tables of samples: what becomes a field, what is refused by row and name, and that neither order nor file is lost."""

import json
import os

import numpy as np
import pyarrow as pa
import pytest
from conftest import write_images
from pyarrow import parquet

from hpc_lbsgd.data import manifest, names, table
from hpc_lbsgd.data import tree as trees
from hpc_lbsgd.data.fields import Field
from hpc_lbsgd.errors import RequestError

N = 8


@pytest.fixture
def images(tmp_path):
    """Names of N pictures of 16x16 below tmp_path, by name."""
    write_images(tmp_path, N, 16)
    return sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.png"))


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def index(path, **named):
    return table.index(path, processes=1, **named)


def test_one_set_from_each_kind_of_table(images, tmp_path):
    """Columns in any order, rows too: equal samples, equal fingerprint."""
    big = 2**62 + 1
    rows = [{"file_name": name, "age": i + 0.5, "id": big + i, "ok": i % 2 == 0, "at": [i, 0.25, -1]}
            for i, name in enumerate(images)]  # fmt: skip
    back = rows[::-1]
    as_text = "at,id,ok,age,file_name\r\n" + "".join(
        f'"{r["at"]}",{r["id"]},{r["ok"]},{r["age"]},{r["file_name"]}\r\n' for r in back
    )
    write(tmp_path / "a.csv", b"\xef\xbb\xbf" + as_text.encode())
    write(tmp_path / "b.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n")
    parquet.write_table(pa.Table.from_pylist(back), tmp_path / "c.parquet")
    write(tmp_path / "d.tsv", as_text.replace(",", "\t").replace(f"{images[3]}", f"{tmp_path / images[3]}"))
    found = [index(tmp_path / name) for name in ("a.csv", "b.jsonl", "c.parquet")]
    kinds = {"age": Field("float"), "id": Field("int"), "ok": Field("int"), "at": Field("float", 3)}
    for m in found:
        assert [m.key(i) for i in range(N)] == images and m.classes == [] and m.own_fields == kinds
        assert m.values("id").tolist() == [big + i for i in range(N)]
        assert m.values("age").tolist() == [i + 0.5 for i in range(N)] and m.values("ok").tolist() == [1, 0] * (N // 2)
        assert m.values("at")[2].tolist() == [2, 0.25, -1] and m.values("at").shape == (N, 3)
        m.check_files()
    with pytest.raises(RequestError, match="'at' in row 1 is .*no number"):  # tabs in a list are none of JSON's commas
        index(tmp_path / "d.tsv", wanted=["at"])
    part = index(tmp_path / "d.tsv", wanted=["age"])
    assert list(part.own_fields) == ["age"] and [part.key(i) for i in range(N)] == images
    assert part.header["left_out"]["column id (not asked for)"] == 1
    assert len({m.fingerprint for m in found}) == 1


def test_a_class_is_a_column_of_names_or_numbers(images, tmp_path):
    names = ["eel", '"shark, white"']
    rows = "".join(f"{n},{names[i % 2]},{i}\n" for i, n in enumerate(images))
    m = index(write(tmp_path / "t.csv", f"path,label,x\n{rows}"))
    assert m.classes == ["eel", "shark, white"] and m.labels.tolist() == [0] * 4 + [1] * 4
    assert m.values("x").tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    write(tmp_path / "u.csv", "path,label\n" + "".join(f"{n},{i % 3}\n" for i, n in enumerate(images)))
    assert index(tmp_path / "u.csv").classes == ["0", "1", "2"]
    write(tmp_path / "v.csv", "path,label\n" + "".join(f"{n},{i / 2}\n" for i, n in enumerate(images)))
    v = index(tmp_path / "v.csv")
    assert v.classes == [] and v.own_fields == {"label": Field("float")}
    with pytest.raises(RequestError, match="a label is -3; classes are numbered from 0"):
        index(write(tmp_path / "w.csv", f"path,label\n{images[0]},-3\n"))
    with pytest.raises(RequestError, match="class 'ray' is not one of the given classes"):
        index(write(tmp_path / "x.csv", f"path,class,x\n{images[0]},ray,1\n"), like=m)


def test_a_set_for_evaluation_has_the_kinds_of_the_training_set(images, tmp_path):
    train = index(write(tmp_path / "t.csv", f"path,x\n{images[0]},1.5\n"))
    whole = write(tmp_path / "e.csv", f"path,x\n{images[1]},2\n")
    assert index(whole).own_fields == {"x": Field("int")}
    assert index(whole, like=train).own_fields == {"x": Field("float")}


WRONG = {
    "path,x\n": "has no rows",
    "": "has no rows",
    "file,x\n{0},1\nstray\n": r"row 2 \(line 3\) has 1 cells, and the first 2",
    "path,x,x\n{0},1,2\n": "has 'x' twice",
    "picture,x\n{0},1\n": "no column of paths .*; it has: picture, x. Say which one .* --path-column",
    "path,x\n{0},1\n{1},\n": "'x' in row 2 has no value: mend it; or say which columns to take with --fields",
    "path,x\n{0},1\n{1},nan\n": "'x' in row 2 is nan, not finite",
    "path,x\n{0},-Infinity\n": "'x' in row 1 is -inf, not finite",
    "path,x\n{0},1e400\n": "'x' in row 1 is inf, not finite",
    f"path,x\n{{0}},{'9' * 5000}\n": "'x' in row 1 is inf, not finite",
    "path,x\n{0},1e39\n": "'x' in row 1 is 1e.39, beyond float32",
    "path,x\n{0},9223372036854775808\n": "'x' in row 1 is 9223372036854775808, beyond 64 bits",
    "path,x\n{0},0.5\n{1},9007199254740993\n": "'x' in row 2 is 9007199254740993, which no float is",
    'path,x\n{0},"[1, 2]"\n{1},"[1]"\n': "'x' in row 2 has 1 numbers where rows before it have 2",
    'path,x\n{0},"[]"\n': "'x' in row 1 has 0 numbers",
    'path,x\n{0},"[1, 2]"\n{1},3\n': "'x' in row 2 is 3, and other rows have lists",
    'path,x\n{0},"[1, null]"\n': "'x' in row 1 has no value",
    "path,image\n{0},1\n": "'image' in row 1 is not the image of a sample: give the column another name",
    "path,class\n{0},0.5\n": "'class' in row 1 is not the class of a sample",
    "path,class\n{0},\n": "'class' in row 1 has no value",
    "path,x\n{0},1\n{0},2\n": "rows 1 and 2 have one image",
    "path,x\n../out.png,1\n": r"'path' in row 1 is ../out.png: not below .*--root",
    "path,x\n/etc/passwd,1\n": "is /etc/passwd: not below",
    "path,x\n,1\n": "'path' in row 1 is '', no path",
    "path,x\na\0b.png,1\n": "'a.x00b.png', no path",
    'path,x\n"{0},1\n': "unexpected end of data",
    b"path,x\xff\n{0},1\n": "a column whose name is not UTF-8",
    "path,x\nnot/there.png,1\n": "1 of 1 images cannot be read.*\n.*not/there.png: .*No such file",
}


@pytest.mark.parametrize("text", WRONG, ids=range(len(WRONG)))
def test_what_is_wrong_is_named(text, images, tmp_path):
    filled = text.replace(b"{0}", images[0].encode()) if isinstance(text, bytes) else text
    for i in range(2) if isinstance(text, str) else ():
        filled = filled.replace(f"{{{i}}}", images[i])
    with pytest.raises(RequestError, match=WRONG[text]):
        index(write(tmp_path / "t.csv", filled))
    assert not (tmp_path / "t.arrow").exists()


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"path": "a", "x": 1}\n{"path": "b"}\n', "'x' in row 2 has no value"),
        ('{"path": "a", "x": NaN}\n', "'x' in row 1 is nan, not finite"),
        ('{"path": "a", "x": 1, "x": 2}\n', "row 1: has 'x' twice"),
        ('{"path": "a"}\n[1]\n', "row 2: is no object of names and values"),
        ('{"path": "a"\n', "row 1: "),
        ('{"path": 7, "x": 1}\n', "'path' in row 1 is 7, no path"),
        ('{"path": "\\ud800.png", "x": 1}\n', "'path' in row 1 is .*, no path"),
        ("[" * 100_000 + "\n", "recursion"),
        ('{"path": "a", "x": 1' + "0" * 5000 + "}\n", "row 1: .*digits"),
    ],
)
def test_json_lines_that_are_wrong(tmp_path, text, says):
    with pytest.raises(RequestError, match=says):
        index(write(tmp_path / "t.jsonl", text))


def test_what_is_no_number_is_left_out_by_name_or_refused_where_it_is_wanted(images, tmp_path):
    rows = "".join(f'{i},{n},{i},"of, {i}",,{i or "N/A"}\n' for i, n in enumerate(images))
    path = write(tmp_path / "t.csv", f",path,x,caption,empty,odd\n{rows}")  # as pandas writes: rows are numbered
    m = index(path)
    assert list(m.own_fields) == ["x"] and m.values("x").tolist() == list(range(N))
    assert set(m.header["left_out"]) == {
        "column caption (row 1 is 'of, 0', no number)",
        "column empty (row 1 has no value)",
        "column odd (row 1 is 'N/A', no number)",
    }
    with pytest.raises(RequestError, match="'odd' in row 1 is 'N/A', no number: mend it$"):
        index(path, wanted=["odd"])
    with pytest.raises(RequestError, match="--fields: .* has no column 'y'; it has: path, x, caption, empty, odd"):
        index(path, wanted=["x", "y"])


def test_names_of_any_bytes_and_paths_from_elsewhere(images, tmp_path):
    odd = b"caf\xe9 \\ x.png"
    os.rename(os.path.join(os.fsencode(tmp_path), images[0].encode()), os.path.join(os.fsencode(tmp_path), odd))
    (tmp_path / "tables").mkdir()
    path = write(tmp_path / "tables" / "t.csv", b"where,x\n" + odd + b",1.5\n" + images[1].encode() + b",2\n")
    with pytest.raises(RequestError, match="no column of paths"):
        index(path)
    m = index(path, path_column="where", root=tmp_path)
    assert [m.key(i) for i in range(2)] == [os.fsdecode(odd), images[1]] and m.values("x").tolist() == [1.5, 2.0]
    assert m.path == path.with_suffix(".arrow") and os.path.exists(m.file(0))
    m.check_files()
    assert index(path, path_column="where", root=tmp_path, wanted=["x"]).fingerprint == m.fingerprint


def test_bad_images_take_their_rows_with_them(images, tmp_path):
    path = write(tmp_path / "t.csv", "path,x\n" + "".join(f"{n},{i}\n" for i, n in enumerate(images)))
    (tmp_path / images[2]).write_bytes(b"no picture")
    with pytest.raises(RequestError, match="1 of 8 images cannot be read"):
        index(path)
    m = index(path, exclude=True)
    assert m.values("x").tolist() == [0, 1, 3, 4, 5, 6, 7]
    names.add_excluded(tmp_path / names.EXCLUDE, [(images[5], "odd")])
    less = manifest.Manifest(m.path)
    assert less.values("x").tolist() == [0, 1, 3, 4, 6, 7] and less.values("x")[4] == 6
    assert manifest.pick(less, tmp_path / "p.arrow", np.array([4, 0])).values("x").tolist() == [6, 0]


def test_a_changed_number_is_another_set_and_an_edited_one_is_found(images, tmp_path):
    text = "path,x\n" + "".join(f"{n},{i}\n" for i, n in enumerate(images))
    first = index(write(tmp_path / "t.csv", text))
    assert index(write(tmp_path / "t.csv", text.replace(",3\n", ",4\n"))).fingerprint != first.fingerprint
    assert index(write(tmp_path / "t.csv", text.replace("path,x", "path,y"))).fingerprint != first.fingerprint
    m = index(write(tmp_path / "t.csv", text))
    assert m.fingerprint == first.fingerprint
    data = bytearray(m.path.read_bytes())
    at = data.index(np.arange(N, dtype=np.int64).tobytes())
    data[at + 16] ^= 4
    m.path.write_bytes(data)
    with pytest.raises(RequestError, match="damaged: what is in it is not what was written"):
        manifest.Manifest(m.path).check_files()


def test_sets_without_fields_are_what_they_were(tmp_path):
    """Manifests of images and classes have no column, no key and no hash more than before there were fields."""
    m = trees.index(write_images(tmp_path, 12, 16), processes=1)
    assert m.table.schema.names == manifest.SCHEMA.names and "fields" not in m.header and m.own_fields == {}
    assert list(m.fields) == ["image", "class"]


def test_a_million_rows_open_at_once_and_are_not_held(tmp_path):
    """What a process has of its own after a look at two fields of a million rows: some MB less than the columns."""
    import subprocess
    import sys

    n = 1_000_000
    columns = {"path": pa.array([f"{i:07d}" for i in range(n)], pa.large_string())}
    columns |= {c.name: pa.array(np.zeros(n, c.type.to_pandas_dtype())) for c in manifest.SCHEMA if c.name != "path"}
    columns["field.x"] = pa.array(np.arange(n, dtype=np.float64))
    columns["field.at"] = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(8.0 * n)), 8)
    whole = pa.table(columns).replace_schema_metadata(
        {"hpc_lbsgd": json.dumps({"root": ".", "classes": [], "fingerprint": ""})}
    )
    with pa.OSFile(str(tmp_path / "m.arrow"), "wb") as sink, pa.ipc.new_file(sink, whole.schema) as writer:
        writer.write_table(whole)
    code = """
import sys; import numpy as np
from hpc_lbsgd.data.manifest import Manifest
def own(): return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:"))
Manifest(sys.argv[2]); before = own()
m = Manifest(sys.argv[1]); at = np.arange(0, len(m), 1000)
print(float(m.values("at")[at].sum() + m.values("x")[at].sum()), own() - before)
"""
    small = trees.index(write_images(tmp_path / "s", 4, 8), processes=1)
    words = [sys.executable, "-c", code, str(tmp_path / "m.arrow"), str(small.path)]
    total, kilobytes = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    at = np.arange(0, n, 1000)
    assert float(total) == (8.0 * at[:, None] + np.arange(8)).sum() + at.sum() and int(kilobytes) < 4000


def test_texts_of_a_csv_may_be_as_long_as_others(images, tmp_path):
    long = "word " * 40_000
    write(tmp_path / "t.csv", f'path,t\n{images[0]},"{long}"\n')
    assert index(tmp_path / "t.csv", wanted=["t:text"]).values("t")[0] == long
    write(tmp_path / "t.csv", f'path,t\n{images[0]},"{long * 6}"\n')
    with pytest.raises(RequestError, match="is a text of 1200000 bytes, 1048576 are allowed"):
        index(tmp_path / "t.csv", wanted=["t:text"])


def test_times_that_python_has_no_type_for_are_in_nobodys_way(images, tmp_path):
    times = {"ns": pa.array([1_700_000_000_123_456_789], pa.timestamp("ns")), "far": pa.array([2**30], pa.date32())}
    parquet.write_table(pa.table({"path": images[:1], "x": [1.5], **times}), tmp_path / "t.parquet")
    m = index(tmp_path / "t.parquet")
    assert list(m.own_fields) == ["x"] and sum("no number" in what for what in m.header["left_out"]) == 2


def test_classes_that_are_bytes_or_half_a_character_and_paths_that_are_images(images, tmp_path):
    columns = {"path": images[:2], "class": [b"eel", "r\u00e4y".encode()]}
    parquet.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert index(tmp_path / "t.parquet").classes == ["eel", "r\u00e4y"]
    rows = [{"path": name, "class": text} for name, text in zip(images, ("eel", "\ud800"), strict=False)]
    with pytest.raises(RequestError, match=r"a class is '.ud800': half of a character"):
        index(write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, rows))))
    parquet.write_table(pa.table({"image": [{"bytes": bytes(100_000), "path": "a.png"}]}), tmp_path / "u.parquet")
    with pytest.raises(RequestError, match="no path") as refused:
        index(tmp_path / "u.parquet")
    assert len(str(refused.value)) < 500
