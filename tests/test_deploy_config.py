"""Deployment configurations: AWML's file as it is, this project's own, and what is wrong in either."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import run

from cp_debug import plugins
from cp_debug.deploy.config import load_config
from cp_debug.deploy.documents import read_settings
from cp_debug.deploy.schema import DeployConfig, EvaluateConfig, ExportConfig, TensorRTConfig, VerifyConfig
from cp_debug.deploy.stages import Deployment
from cp_debug.errors import InputError

AWML = Path(__file__).parent / "data" / "awml" / "deploy_config.py"


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_awml_file_is_read_as_it_is() -> None:
    config = load_config(AWML)
    assert config.work_dir == Path("work_dirs/tiny")
    assert (config.export.mode, config.export.opset, config.export.fold) == ("onnx", 16, True)
    assert config.tensorrt.precision == "fp16"
    assert config.tensorrt.workspace_mib == 2048
    assert config.engine_backend == "trt-fp16"
    encoder = config.components["pts_voxel_encoder"]
    assert encoder.profile["input_features"].shapes == ([100, 20, 11], [4000, 20, 11], [10000, 20, 11])
    assert encoder.dynamic_axes["input_features"] == {0: "num_voxels", 1: "num_max_points"}
    assert [(s.reference, s.test) for s in config.scenarios()] == [("torch@cpu", "ort@cpu")]
    assert config.verify.max_abs == 0.1
    assert config.evaluated() == ["torch@cpu", "ort@cpu"]
    assert config.data.first == 1


def test_awml_scenarios_follow_the_export_mode(tmp_path: Path) -> None:
    text = AWML.read_text().replace('mode="onnx"', 'mode="both"').replace('"fp16"', '"auto"')
    config = load_config(write(tmp_path, "deploy_config.py", text))
    assert [(s.reference, s.test) for s in config.scenarios()] == [
        ("torch@cpu", "ort@cpu"),
        ("ort@cuda:0", "trt-tf32@cuda:0"),
    ]


def test_older_awml_file_with_shapes_under_the_backend(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            "old.py",
            """
export = dict(mode="trt", verify=True, device="cuda:0", work_dir="w")
runtime_io = dict(info_file="infos.pkl", sample_idx=0)
model_io = dict(input_name="voxels", input_shape=(32, 4), batch_size=None)
onnx_config = dict(opset_version=13, simplify=True, multi_file=True, components=dict(
    voxel_encoder=dict(name="pts_voxel_encoder", onnx_file="a.onnx", engine_file="a.engine")))
backend_config = dict(common_config=dict(precision_policy="int8", max_workspace_size=4 << 30), model_inputs=[
    dict(input_shapes=dict(input_features=dict(min_shape=[1, 32, 11], opt_shape=[2, 32, 11], max_shape=[3, 32, 11])))])
evaluation = dict(enabled=True, num_samples=5, models=dict(pytorch="best.pth", onnx="w", tensorrt="w/tensorrt"))
verification = dict(enabled=False, tolerance=1e-1, num_verify_samples=1)
""",
        )
    )
    assert config.checkpoint == Path("best.pth")
    assert config.verify.enabled  # export.verify decides
    assert config.components["pts_voxel_encoder"].profile["input_features"].max == [3, 32, 11]
    assert config.evaluated() == ["torch@cuda:0", "ort@cuda:0", "trt-int8@cuda:0"]
    assert config.tensorrt.workspace_mib == 4096


def test_all_samples_need_data_that_ends(tmp_path: Path) -> None:
    text = "export = dict(work_dir='w')\nevaluation = dict(enabled=True, num_samples=-1)\n"
    with pytest.raises(InputError, match=r"c\.py: evaluation\.num_samples is -1, all, but runtime_io\.info_file"):
        load_config(write(tmp_path, "c.py", text))
    config = load_config(write(tmp_path, "c.py", text + "runtime_io = dict(info_file='infos.pkl')\n"))
    assert config.evaluate.samples > 1_000_000
    with pytest.raises(InputError, match=r"evaluate\.samples is 0; expected greater than 0"):
        load_config(write(tmp_path, "c.py", text.replace("-1", "0")))


def doubling(functions: int) -> str:
    """A chain of functions that each call the one before twice."""
    lines = ["def f0(n):\n  return n"]
    lines += [f"def f{i}(n):\n  return f{i - 1}(n) + f{i - 1}(n)" for i in range(1, functions)]
    return "\n".join([*lines, f"x = f{functions - 1}(1)"])


def test_several_names_functions_and_mmengines_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = """
_H, _W = 480, 640
(_C, _D) = [_H // 16, _W // 16]

def _static(shape, batch):
    \"\"\"All alike.\"\"\"
    return dict(min=shape, opt=shape, batch=batch)

_size = 2 ** 5
_size += _C if _D else 0
x = _static([1, _C], batch=_D)
size = _size if _C else 0
folder = '{{ fileDirname }}/{{ fileBasenameNoExtension }}{{ fileExtname }}'
data = '{{$CPDEBUG_TEST_DATA:/default/set}}/images'
count = {{'$CPDEBUG_TEST_COUNT:80'}}
"""
    path = write(tmp_path, "c.py", text)
    monkeypatch.setenv("CPDEBUG_TEST_COUNT", "7")
    assert read_settings(path) == {
        "x": {"min": [1, 30], "opt": [1, 30], "batch": 40},
        "size": 62,
        "folder": f"{tmp_path}/c.py",
        "data": "/default/set/images",
        "count": 7,
    }
    monkeypatch.setenv("CPDEBUG_TEST_DATA", "/mine")
    yaml = write(tmp_path, "c.yaml", "work_dir: '{{$CPDEBUG_TEST_DATA:/default}}/w'\nlog_file: ~/deploy.log\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(yaml).work_dir == Path("/mine/w")
    assert load_config(yaml).log_file == tmp_path / "deploy.log"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("import os", "line 2: 'import os': only literals are read"),
        ("x = open('y').read()", "line 2"),
        ("x = __import__('os').system('true')", "line 2"),
        ("x = [i for i in range(9)]", "line 2"),
        ("x = unknown", "unknown is not assigned above"),
        ("x = dict(a=1)['b']", "there is no item 'b'"),
        ("x = 1 << 10 ** 9", "expected a shift of 0 to 64"),
        ("x = 1 << 1000000", "expected a shift of 0 to 64"),
        ("x = 2 ** 1000000", "expected a power of 0 to 64"),
        ("x = 99999 ** 64", "expected a power of 0 to 64"),
        ("x = 0.0 ** -1", "expected a power of 0 to 64"),
        ("x = 1 if y else 2", "y is not assigned above"),
        ("x += 1", "x is not assigned above"),
        ("x = 'a' * 10", "expected a number"),
        ("x = 1 / 0", "division by zero"),
        ("x.y = 1", "only literals"),
        ("_base_ = ['other.py']", "there is no "),
        ("_base_ = 3", "expected the names of files"),
        ("_base_ = 'c.py'", "inherits from itself"),
        ("x = {{_base_.y}}", "there is no item 'y'"),
        ("x = lambda: 1", "only literals"),
        ("if True:\n  x = 1", "line 2"),
        ("x, y = 1, 2, 3", "expected 2 values"),
        ("x, y[0] = 1, 2", "only literals"),
        ("def f(n):\n  import os\n  return n", "line 2"),
        ("def f(n=1):\n  return n", "line 2"),
        ("def f(n):\n  return f(n)\nx = f(1)", "only literals"),
        ("def f(n):\n  return n\nx = f(1, 2)", "expected as arguments: n"),
        ("def f(n):\n  return n\nx = f(m=2)", "expected as arguments: n"),
        ("def f(n):\n  return open(n)\nx = f('y')", "line 3"),
        ("x = dict(a=1, a=2)", "keyword argument repeated: a"),
        ("x = dict(a=1, b=1, c=1, b=2, c=2)", "keyword argument repeated: b"),
        (doubling(12), "more than 1000 calls"),
    ],
)
def test_anything_but_literals_is_refused_with_its_line(tmp_path: Path, line: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        read_settings(write(tmp_path, "c.py", f'"""doc"""\n{line}\n'))
    assert says in str(error.value)
    assert "c.py" in str(error.value)


def test_settings_are_inherited_as_mmengine_does(tmp_path: Path) -> None:
    write(tmp_path, "_a.py", "build = dict(policy='fp16', size=1 << 30, shapes=dict(x=[1], y=[2]))\nname = 'a'\n")
    write(tmp_path, "_b.py", "devices = dict(cuda='cuda:0')\n")
    path = write(
        tmp_path,
        "c.py",
        "_base_ = ['./_a.py', './_b.py']\n"
        "build = dict(policy='int8', shapes=dict(_delete_=True, z=[3]))\n"
        "device = {{_base_.devices.cuda}}\nwhere = f'{_base_.name}/onnx'\n",
    )
    assert read_settings(path) == {
        "build": {"policy": "int8", "size": 1 << 30, "shapes": {"z": [3]}},
        "name": "a",
        "devices": {"cuda": "cuda:0"},
        "device": "cuda:0",
        "where": "a/onnx",
    }


def test_dictionaries_are_changed_and_spread_as_in_python(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "c.py",
        "a: dict = dict(x=1, deep=dict(y=[1] + [2]))\nb = {**a, 'x': 2}\nc = dict(a, z=not True)\n"
        "a['deep']['y'] = 3\na.update(x=4)\na.update({'w': 5}, **c)\n",
    )
    deep = {"y": 3}
    assert read_settings(path) == {
        "a": {"x": 1, "deep": deep, "w": 5, "z": False},
        "b": {"x": 2, "deep": deep},
        "c": {"x": 1, "deep": deep, "z": False},
    }
    for text, says in (
        ("a = {}\na['a'] = a\n", "unfolds to more than 50000 values or 64 levels"),
        ("a = {}\na['a'] = a\nb = f'{a}'\n", "line 3: .* unfolds to more than"),
        ("a = [0]\n" + "a = [a, a]\n" * 60 + "b = {}\nb[a]\n", "only literals"),
        ("a = [0]\n" + "a = [a, a]\n" * 60 + "b = {}\nc = b[a]\n", "unfolds to more than"),
        ("a = [0]\n" + "a = [a, a]\n" * 60, "unfolds to more than"),
        ("a = 3\n" + "a = a * a\n" * 60, r"line 11: .* a number of \d+ bits"),
        ("a = 'x'\n" + "a = f'{a}{a}'\n" * 60, "too long a text"),
        ("a = 'x'\n" + "a = a + a\n" * 60, "unfolds to more than"),
        ("a = 'text'\na['b'] = 1\n", "expected a dictionary"),
        ("a = dict(**[1])\n", "expected a dictionary"),
        ("a = {}\na[[1]] = 2\n", "a list or a dictionary cannot be a key"),
        ("a = {{}: 2}\n", "a list or a dictionary cannot be a key"),
        ("a = {}\na.update({{}: 2})\n", "a list or a dictionary cannot be a key"),
        ("a = [0] * 3\n", "expected a number"),
        ("a = {}\nb = [a] * 1\n", "expected a number"),
        ("a = {}\nb = [" + "a, " * 13_000 + "]\na['x'] = ['b', 'c', 'd', 'e']\n", "unfolds to more than"),
    ):
        with pytest.raises(InputError, match=says):
            read_settings(write(tmp_path, "d.py", text))


def test_yaml_and_toml_inherit(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "model: centerpoint:tiny\nexport: {mode: onnx, opset: 13}\n")
    write(tmp_path, "b.toml", "_base_ = 'a.yaml'\nwork_dir = 'w'\n[export]\nopset = 18\n")
    config = load_config(tmp_path / "b.toml")
    assert (config.model, config.export.mode, config.export.opset) == ("centerpoint:tiny", "onnx", 18)
    for text, says in (
        ("_base_: gone.yaml\n", r"c\.yaml: _base_ is 'gone\.yaml': there is no .*gone\.yaml"),
        ("_base_: [1]\n", r"c\.yaml: _base_ is '\[1\]': expected the names of files"),
        ("_base_: c.yaml\n", "inherits from itself"),
        ("_base_: d.yaml\n", "d.yaml holds no settings by name"),
    ):
        write(tmp_path, "d.yaml", "- 1\n")
        with pytest.raises(InputError, match=says):
            load_config(write(tmp_path, "c.yaml", text))


def test_two_bases_may_not_set_the_same(tmp_path: Path) -> None:
    write(tmp_path, "a.py", "order = 1\nname = 2\npath = 3\n")
    write(tmp_path, "b.py", "path = 3\nname = 2\norder = 1\n")
    with pytest.raises(InputError, match="name is set by two of them"):
        read_settings(write(tmp_path, "c.py", "_base_ = ['a.py', 'b.py']\n"))


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(LITERALS)
def test_every_literal_is_read_as_python_reads_it(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("literal") / "c.py"
    path.write_text(f"x = {value!r}\n", encoding="utf-8")
    assert read_settings(path) == {"x": value}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "work_dir: w\nexport: {opsett: 3}", "a.yaml: export: unknown key 'opsett'; did you mean opset?"),
        ("a.toml", "work_dir = 'w'\n[export]\nmode = 'onyx'", "a.toml: export.mode is \"onyx\"; expected 'onnx'"),
        ("a.yaml", "model: x", "a.yaml: work_dir is missing"),
        ("a.yaml", "work_dir: w/../../x", "a.yaml: work_dir: leaves the folder where the command runs"),
        ("a.py", "export = dict(work_dir='../outside')", "a.py: work_dir: leaves the folder where the command runs"),
        ("a.yaml", "work_dir: w\nverify: {scenarios: [{reference: torch, test: orp}]}", "did you mean ort?"),
        ("a.yaml", "work_dir: w\nverify: {samples: 0}", "verify.samples is 0; expected greater than 0"),
        (
            "a.yaml",
            "work_dir: w\ncomponents: {c: {profile: {x: {min: [2], opt: [1], max: [3]}}}}",
            "components.c.profile.x: expected min ≤ opt ≤ max",
        ),
        ("a.yaml", "[1, 2", "a.yaml: not YAML"),
        ("a.yaml", 'x: !!int "abc"', "a.yaml: not YAML (its contents are damaged, or of another kind)"),
        ("a.yaml", "x: " + ":".join(["1"] * 100_000), "a.yaml: 200002 bytes; a configuration has at most 131072"),
        ("a.toml", "x = ", "a.toml: not TOML"),
        ("a.json", "{}", "a.json: work_dir is missing"),
        ("a.json", "[]", "a.json: the document is []; expected settings by name"),
        ("a.json", '{"work_dir": null}', "a.json: work_dir is null; expected a path"),
        ("a.py", "", "a.py: holds no settings; expected AWML's, such as export and components"),
        (
            "a.py",
            "model = dict(type='CenterPoint')",
            "a.py: a model's configuration (model is a dictionary with a type)",
        ),
        ("a.py", "work_dir = 'w'", "a.py: work_dir is a setting of cpdebug, which belongs in YAML, TOML or JSON"),
        ("a.json", '{"work_dir": "w",}', "a.json: not JSON that can be read"),
        ("a.json", '{"work_dir": "w", "work_dir": "v"}', "a.json: not JSON that can be read ('work_dir' is set twice)"),
        ("a.yaml", "work_dir: w\nexport: {mode: trt, mode: onnx}", "a.yaml: not YAML ('mode' is set twice in line 2"),
        ("a.yaml", "work_dir: $HOME/w", "work_dir: '$HOME/w': variables are not expanded; expected the path itself"),
        ("a.yaml", "work_dir: '{{$CPDEBUG_NOWHERE}}/w'", "the environment has no CPDEBUG_NOWHERE"),
        ("a.txt", "{}", "expected a .yaml, .toml, .json or .py file"),
        ("a.py", "export = dict(mod='onnx')", "a.py: export: unknown key 'mod'; did you mean mode?"),
        ("a.py", "tensorrt_config = dict(precision_policy='fp61')", 'precision_policy is "fp61"; expected'),
    ],
)
def test_errors_name_file_key_and_what_was_expected(tmp_path: Path, name: str, text: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, name, text))
    assert says in str(error.value)


def deployment(folder: Path, text: str) -> Deployment:
    path = write(folder, "c.yaml", f"model: centerpoint:tiny\nwork_dir: {folder}\n{text}")
    return Deployment(load_config(path), str(path))


@pytest.mark.parametrize(("options", "built"), [([], "trt-fp16"), (["--precision", "bf16"], "trt-bf16")])
def test_what_is_not_on_the_command_line_is_as_configured(
    options: list[str], built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def backend(deployment: Deployment, spec: str) -> None:
        asked.append(spec)
        raise InputError("no further")

    monkeypatch.setattr(Deployment, "backend", backend)
    config = write(tmp_path, "c.yaml", "model: centerpoint:tiny\nwork_dir: w\ntensorrt: {precision: fp16}\n")
    code, text = run("build", config, "-o", tmp_path / "engines", *options)
    assert (code, asked) == (2, [built]), text
    (tmp_path / "engines").mkdir()
    (tmp_path / "engines" / "engines.json").touch()
    code, text = run("build", config, "-o", tmp_path / "engines", *options)
    assert "engines.json exists already; --overwrite replaces it" in " ".join(text.split())
    run("build", config, "-o", tmp_path / "engines", *options, "--overwrite")
    assert (code, asked) == (2, [built, built]), "the second was refused before a backend was asked for"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("checkpoint: nowhere.pt", "c.yaml: checkpoint is nowhere.pt: no such file"),
        ("components: {pts_voxel_encodr: {}}", "no such component; did you mean pts_voxel_encoder?"),
        (
            "components: {pts_backbone_neck_head: {outputs: [heatmap, reg]}}",
            r"components.pts_backbone_neck_head.outputs is \['heatmap', 'reg'\]; centerpoint:tiny has \['task0",
        ),
    ],
)
def test_configuration_of_another_model_is_refused(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        _ = deployment(tmp_path, text).model


def test_awml_variants_inherit_a_skeleton_and_say_what_stays_in_fp16(tmp_path: Path) -> None:
    skeleton = Path(__file__).parent / "data/awml/deploy_config.py"
    write(tmp_path, "_base.py", skeleton.read_text())
    config = load_config(
        write(
            tmp_path,
            "deploy_config_int8.py",
            "_base_ = ['./_base.py']\n"
            "model_cfg = 'projects/CenterPoint/configs/second.py'\n"
            "quantization = dict(enabled=True, mode='ptq', fuse_bn=True, default_precision='int8',\n"
            "                    keep_fp16=['pts_voxel_encoder', 'pts_backbone.blocks.0'], disable_recipes=['add'])\n"
            "onnx_config = dict(opset_version=17, visualize_qdq_values=True)\n"
            "tensorrt_config = dict(plugin_libraries=[])\n"
            "evaluation = dict(num_samples=3, num_warmup_samples=2)\n",
        )
    )
    assert config.quantization is not None
    assert config.quantization.skip_layers == ["pts_voxel_encoder", "pts_backbone.blocks.0"]
    assert (config.export.opset, config.evaluate.samples) == (17, 3)
    assert config.tensorrt.precision == "fp16", "inherited: what is not INT8 may run in FP16"
    with pytest.raises(InputError, match=r"plugin_libraries: engines with plug-in libraries \(a.so\) are not built"):
        load_config(write(tmp_path, "d.py", "_base_ = '_base.py'\ntensorrt_config = dict(plugin_libraries=['a.so'])\n"))


def test_the_example_of_the_documentation_says_every_key_and_default(tmp_path: Path) -> None:
    page = Path(__file__).parent.parent / "docs" / "deploy.md"
    example = page.read_text().partition("```yaml\n")[2].partition("```")[0]
    config = load_config(write(tmp_path, "example.yaml", example))
    plain = load_config(write(tmp_path, "plain.yaml", "model: centerpoint:tiny\nwork_dir: deployed\n"))
    changed = {"components": config.components, "tensorrt": config.tensorrt}  # what the example shows set
    assert plain.model_copy(update=changed) == config
    told = yaml.safe_load(example)
    assert set(told) == set(DeployConfig.model_fields)
    assert {name: set(told[name]) for name in ("export", "tensorrt", "verify", "evaluate")} == {
        "export": set(ExportConfig.model_fields),
        "tensorrt": set(TensorRTConfig.model_fields),
        "verify": set(VerifyConfig.model_fields),
        "evaluate": set(EvaluateConfig.model_fields),
    }


def test_the_range_of_the_evaluation_counts_and_is_checked_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"model: centerpoint:tiny\nwork_dir: {tmp_path}\nevaluate: {{samples: 1, backends: [torch], range: %s}}\n"
    wrong = write(tmp_path, "wrong.yaml", text % "bus=5")
    with pytest.raises(InputError, match=r"wrong\.yaml: evaluate\.range: the model has no class 'bus'; its classes"):
        _ = Deployment(load_config(wrong), str(wrong)).model
    right = write(tmp_path, "right.yaml", text % "car=30")
    deployment = Deployment(load_config(right), str(right))
    given = []
    monkeypatch.setattr(Deployment, "programs", lambda self: [])
    monkeypatch.setattr("cp_debug.deploy.stages.evaluate", lambda *args, **_: given.append(args[3]))
    deployment.evaluate()
    assert given[0].ranges == {"car": 30.0}


def test_a_plug_in_reads_another_team_s_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "their_reader.py"
    module.write_text(
        "def read(path):\n    return {'work_dir': path.read_text().strip()} if path.suffix == '.ours' else None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    own = {name: plugins.BUILT_IN[plugins.CONFIGS][name] for name in plugins.BUILT_IN[plugins.CONFIGS]}
    monkeypatch.setitem(plugins.BUILT_IN, plugins.CONFIGS, own | {"theirs": "their_reader:read"})
    plugins.names.cache_clear()
    try:
        assert load_config(write(tmp_path, "net.ours", "their/folder")).work_dir == Path("their/folder")
        with pytest.raises(InputError, match=r"net\.other: expected a \.yaml, \.toml, \.json or \.py file"):
            load_config(write(tmp_path, "net.other", ""))
        monkeypatch.setitem(plugins.BUILT_IN, plugins.CONFIGS, {"gone": "their_reader:missing"})
        plugins.names.cache_clear()
        with pytest.raises(InputError, match=r"plug-in 'gone' of cpdebug\.configs"):
            load_config(tmp_path / "net.ours")
    finally:
        plugins.names.cache_clear()


CALLS = "export = dict(mode='both', work_dir='w')\ndef f(n):\n  return n\n"


@pytest.mark.parametrize(("calls", "refused"), [(1000, False), (1001, True)])
def test_a_configuration_calls_its_functions_a_thousand_times(tmp_path: Path, calls: int, refused: bool) -> None:
    path = write(tmp_path, "deploy_config.py", CALLS + "\n".join(f"x{i} = f({i})" for i in range(calls)))
    with pytest.raises(InputError) as error:
        load_config(path)
    assert ("more than 1000 calls" in str(error.value)) is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("x = 1 << 64", ""),
        ("x = 1 << 65", "expected a shift of 0 to 64"),
        ("x = 2 ** 64", ""),
        ("x = 2 ** 65", "expected a power of 0 to 64"),
        ("x = 20000 ** 2", ""),
        ("x = 20001 ** 2", "expected a power of 0 to 64"),
        ("x = 1 << 0", ""),
        (f"x = [{'0,' * 49_990}]", ""),
        (f"x = [{'0,' * 50_000}]", "unfolds to more than 50000"),
    ],
    ids=lambda text: text[:20],
)
def test_a_configuration_computes_within_limits(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        load_config(write(tmp_path, "deploy_config.py", f"export = dict(mode='both', work_dir='w')\n{text}\n"))
    assert (says in str(error.value)) if says else ("unknown key 'x'" in str(error.value))


def test_what_awml_leaves_out_is_as_awml_has_it(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "deploy_config.py", "export = dict(work_dir='w')\nquantization = dict()\n"))
    assert (config.export.mode, config.export.opset) == ("both", 17)
    assert (config.export.fold, config.export.simplify, config.export.rot_y_axis_reference) == (True, False, False)
    assert (config.tensorrt.precision, config.tensorrt.workspace_mib) == ("auto", 1024)
    assert (config.verify.enabled, config.verify.samples, config.verify.max_abs) == (True, 3, 0.1)
    assert (config.evaluate.enabled, config.evaluate.samples) == (False, 10)
    assert config.quantization is None
    quantized = load_config(write(tmp_path, "q.py", "export = dict(work_dir='w')\nquantization = dict(enabled=True)\n"))
    assert quantized.quantization is not None
    assert quantized.quantization.skip_layers == []
    assert quantized.quantization.samples == 100
