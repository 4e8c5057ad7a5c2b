"""AWML's deployment files, of every generation: what is read, what is named as without effect, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from states import until
from test_cli import run
from typer.testing import CliRunner

from cp_debug.backends.tensorrt.config import decide
from cp_debug.cli.main import app
from cp_debug.cli.plain_steps import PlainSteps
from cp_debug.deploy.awml_schema import EvaluatedBackend
from cp_debug.deploy.config import load_config, override
from cp_debug.deploy.documents import read_settings
from cp_debug.deploy.schema import DeployConfig
from cp_debug.deploy.stages import Deployment
from cp_debug.errors import InputError

AWML = Path(__file__).parent / "data" / "awml" / "deploy_config.py"


def write(folder: Path, text: str, name: str = "deploy_config.py") -> Path:
    (folder / name).write_text(text)
    return folder / name


def read(folder: Path, text: str) -> DeployConfig:
    return load_config(write(folder, "export = dict(mode='both', work_dir='w')\n" + text))


def idle(config: DeployConfig) -> list[str]:
    (note,) = (n for n in config.notes if "without effect" in n)
    return note.partition("without effect here: ")[2].split(", ")


def test_the_first_int8_files_say_how_to_calibrate(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "quantization = dict(enabled=True, mode='ptq',\n"
        "    calibration=dict(num_batches=40, method='histogram', amax_method='entropy', cache_path=None),\n"
        "    fusion=dict(fuse_bn=True), sensitive_layers=['pts_neck.deblocks.0.0'],\n"
        "    precision=dict(default_input='int8', default_weight='int8', first_layer_input='fp16',\n"
        "                   last_layer_output='fp16'))\n"
        "backend_config = dict(common_config=dict(precision_policy='int8'))\n",
    )
    assert config.quantization is not None
    assert (config.quantization.samples, config.quantization.method) == (40, "entropy")
    assert config.quantization.skip_layers == ["pts_neck.deblocks.0.0"]
    assert idle(config) == ["quantization.mode", "quantization.precision.first_layer_input"]
    with pytest.raises(InputError, match=r"quantization\.fusion\.fuse_bn is false; expected True"):
        read(tmp_path, "quantization = dict(enabled=True, fusion=dict(fuse_bn=False))\n")


def test_the_tolerance_between_quantized_model_and_files_does_not_limit_what_int8_costs(tmp_path: Path) -> None:
    text = "verification = dict(enabled=True, tolerance=0.1)\n"
    assert read(tmp_path, text).verify.max_abs == 0.1
    config = read(tmp_path, f"{text}quantization = dict(enabled=True)\n")
    assert config.verify.max_abs is None
    assert ["verification.tolerance is not used" in note for note in config.notes] == [True]


def test_strongly_typed_engines_of_quantized_files(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "quantization = dict(enabled=True)\n"
        "backend_config = dict(common_config=dict(precision_policy='strongly_typed'))\n",
    )
    assert config.engine_backend == "trt-int8"
    built = decide("int8", "10.3.0", strongly_typed=True, quantized=True)
    assert (built.regime, built.set_flags) == ("strong", ())
    older = read(tmp_path, "tensorrt_config = dict(precision_policy='explicit_int8')\n")
    assert older.tensorrt.precision == "int8"


def test_a_strongly_typed_deployment_asks_for_no_fallback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr("cp_debug.deploy.stages.create", lambda spec, **options: asked.append(options))
    for precision in ("strongly_typed", "fp16"):
        settings = {"model": "m", "work_dir": tmp_path, "quantization": {}, "tensorrt": {"precision": precision}}
        Deployment(DeployConfig.model_validate(settings), "c.yaml").backend("trt-int8")
    assert [(o["strongly_typed"], o["fp16_fallback"]) for o in asked] == [(True, False), (False, True)]


def test_ptq_block_calibrates_where_the_quantized_checkpoint_is_not_there_yet(tmp_path: Path) -> None:
    text = (
        f"checkpoint_path = '{tmp_path}/q.pth'\n"
        "quantization = dict(enabled=True, keep_fp16=['pts_voxel_encoder'],\n"
        "    ptq=dict(checkpoint='fp32.pth', calibrate_samples=60, batch_size=1, calib_seed=7))\n"
        "evaluation = dict(enabled=True, num_samples=3, num_warmup=2)\n"
    )
    config = read(tmp_path, text)
    assert config.checkpoint == Path("fp32.pth")
    assert config.quantization is not None
    assert config.quantization.samples == 60
    assert "quantization.ptq.checkpoint is calibrated instead" in config.notes[0]
    assert idle(config) == ["evaluation.num_warmup", "quantization.ptq.batch_size", "quantization.ptq.calib_seed"]
    (tmp_path / "q.pth").touch()
    assert read(tmp_path, text).checkpoint == tmp_path / "q.pth"


def test_words_of_lists_may_be_capitals_and_members_of_awmls_enumerations(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            "from deployment.configs.enums import ExportMode as Mode, PrecisionPolicy\n"
            "from deployment.core.backend import Backend\n"
            "WORK = 'w' + '/d'\n"
            "export = dict(mode=Mode.BOTH.value, work_dir=WORK)\n"
            "tensorrt_config = dict(precision_policy=PrecisionPolicy.FP16)\n"
            "evaluation = dict(enabled=True, backends={Backend.PYTORCH.value: dict(enabled=True, device=' CPU')})\n"
            "verification = dict(scenarios={'BOTH': [dict(ref_backend='PyTorch', ref_device='cpu',\n"
            "    test_backend=Backend.TENSORRT, test_device='CUDA:1')]})\n",
        )
    )
    (scenario,) = config.scenarios()
    assert (scenario.reference, scenario.test) == ("torch@cpu", "trt-fp16@cuda:1")
    assert (config.export.mode, config.work_dir, config.evaluated()) == ("both", Path("w/d"), ["torch@cpu"])
    with pytest.raises(InputError, match="there is no item 'JAX'"):
        read(tmp_path, "from deployment.core.backend import Backend\nx = Backend.JAX\n")
    with pytest.raises(InputError, match="unknown key 'colour'"):
        read(tmp_path, "colour = 'red'\n")


def test_an_empty_log_path_means_none_and_a_tilde_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read(tmp_path, "checkpoint_path = '~/a.pth'\ndeploy_log_path = ' '\n")
    assert (config.checkpoint, config.log_file) == (tmp_path / "a.pth", None)


@pytest.mark.parametrize("inherits", [False, True])
def test_awmls_settings_may_stand_in_yaml(tmp_path: Path, inherits: bool) -> None:
    text = "export: {mode: onnx, work_dir: w}\nruntime_io: {info_file: a.pkl}\nevaluation: {num_warmup: 3}\n"
    if inherits:
        write(tmp_path, "export = dict(mode='both')\nonnx_config = dict(opset_version=13)\n", "base.py")
        text += "_base_: base.py\n"
    config = load_config(write(tmp_path, text, "deploy.yaml"))
    assert (config.export.mode, config.data.path, config.export.opset) == (
        "onnx",
        Path("a.pkl"),
        13 if inherits else 17,
    )
    assert idle(config) == ["evaluation.num_warmup"]
    with pytest.raises(InputError, match="a configuration of mmdeploy for mmdet3d"):
        load_config(write(tmp_path, "codebase_config: {type: mmdet3d}\n", "m.yaml"))


def test_awmls_settings_may_stand_in_json(tmp_path: Path) -> None:
    settings = {
        "export": {"mode": "onnx", "work_dir": "w"},
        "components": {
            "pts_voxel_encoder": {
                "onnx_file": "a.onnx",
                "io": {
                    "inputs": [{"name": "input_features"}],
                    "outputs": [{"name": "pillar_features"}],
                    "dynamic_axes": {"input_features": {"0": "num_voxels"}},
                },
            }
        },
        "tensorrt_config": {"precision_policy": "fp16", "max_workspace_size": 1 << 32},
    }
    config = load_config(write(tmp_path, json.dumps(settings), "a.json"))
    same = load_config(write(tmp_path, "\n".join(f"{key} = {value!r}" for key, value in settings.items()), "a.py"))
    assert config == same
    assert config.components["pts_voxel_encoder"].dynamic_axes == {"input_features": {0: "num_voxels"}}
    heir = load_config(write(tmp_path, '{"_base_": "a.json", "export": {"mode": "trt"}}', "b.json"))
    assert (heir.export.mode, heir.tensorrt.workspace_mib) == ("trt", 4096)


def test_qat_block_and_the_base_files_of_variants(tmp_path: Path) -> None:
    write(tmp_path, "quantization = dict(enabled=True, mode='ptq', ptq=dict(checkpoint='fp32.pth'))\n", "ptq.py")
    config = load_config(
        write(
            tmp_path,
            "_base_ = ['./ptq.py']\nmodel_cfg = 'second.py'\ncheckpoint_path = 'qat.pth'\n"
            "quantization = dict(mode='qat', ptq=None, qat=dict(train_cfg='second.py', epochs=3, lr=1e-4))\n",
        )
    )
    assert (config.model, config.checkpoint) == ("mmdet3d:second.py", Path("qat.pth"))
    assert idle(config) == ["quantization.mode", "quantization.qat"]


def test_layers_of_other_backbones_are_skipped_by_their_names(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "quantization = dict(enabled=True, quant_head=False, skip_vovnet_stages=[0, 2],\n"
        "    skip_backbone_downsample_layers=[1], quant_add=True, quant_ese_pool_input=True)\n",
    )
    assert config.quantization is not None
    assert config.quantization.skip_layers == [
        "pts_bbox_head",
        "pts_backbone.downsample_layers.1",
        "pts_backbone.stem",
        "pts_backbone.stage3",
    ]
    assert idle(config) == ["quantization.quant_add", "quantization.quant_ese_pool_input"]


def test_every_key_without_effect_is_named_once_and_defaults_are_not(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "model_io = dict(input_name='voxels')\n"
        "onnx_config = dict(save_file='a.onnx', multi_file=False, input_names=['a'], output_names=['b'],\n"
        "    dynamic_axes={'a': {0: 'n'}}, visualize_qdq_values=True)\n"
        "backend_config = dict(model_inputs=[dict(name='a'), dict(name='b')],\n"
        "    common_config=dict(disable_optimizations=True))\n"
        "evaluation = dict(enabled=True, verbose=True, num_warmup_samples=2,\n"
        "    models=dict(pytorch='a.pth', onnx='w', tensorrt='w/tensorrt'))\n"
        "components = dict(pts_voxel_encoder=dict(onnx_file='a.onnx', engine_file='a.engine',\n"
        "    io=dict(inputs=[dict(name='x', dtype='float16')], outputs=[dict(name='y', dtype='float32')])))\n",
    )
    assert idle(config) == [
        "backend_config.common_config.disable_optimizations",
        "backend_config.model_inputs.name",
        "components.pts_voxel_encoder.io.inputs.dtype",
        "evaluation.models.onnx",
        "evaluation.models.tensorrt",
        "evaluation.num_warmup_samples",
        "evaluation.verbose",
        "model_io",
        "onnx_config.dynamic_axes",
        "onnx_config.input_names",
        "onnx_config.multi_file",
        "onnx_config.output_names",
        "onnx_config.save_file",
        "onnx_config.visualize_qdq_values",
    ]
    assert config.notes[0].startswith(f"{tmp_path}/deploy_config.py: ")
    assert override(config, {"tensorrt.python": "x"}).notes == config.notes
    assert not read(tmp_path, "onnx_config = dict(multi_file=True)\nevaluation = dict(verbose=False)\n").notes


def test_folders_devices_and_the_log_count(tmp_path: Path) -> None:
    backends = (
        "dict(onnx=dict(enabled=True, model_dir='%s', device='cpu'), pytorch=dict(device='cuda'),\n"
        "    tensorrt=dict(enabled=True, device='cuda:1', engine_dir='%s'))"
    )
    text = (
        "export = dict(mode='none', work_dir='w')\ndeploy_log_path = 'deployment.log'\ndata_root = 'data/t4'\n"
        f"evaluation = dict(enabled=True, num_samples=2, backends={backends % ('elsewhere/onnx', 'elsewhere/trt')})\n"
        "verification = dict(devices=dict(cuda='cuda:3'), scenarios=dict(none=[dict(ref_backend='onnx',\n"
        "    ref_device='cuda', test_backend='tensorrt', test_device='cuda')]))\n"
    )
    config = load_config(write(tmp_path, text))
    assert config.export.onnx_dir == Path("elsewhere/onnx")
    assert Deployment(config, "c").engine_dir == Path("elsewhere/trt")
    assert config.log_file == Path("w/deployment.log")
    assert config.data.root == Path("data/t4")
    assert [(s.reference, s.test) for s in config.scenarios()] == [("ort@cuda:3", "trt-tf32@cuda:3")]
    assert not config.notes
    written = load_config(write(tmp_path, text.replace("mode='none'", "mode='both'")))
    assert idle(written) == ["evaluation.backends.onnx.model_dir", "evaluation.backends.tensorrt.engine_dir"]
    same = (
        text.replace("'none', ", "'both', ").replace("elsewhere/onnx", "w/onnx/").replace("elsewhere/trt", "w/tensorrt")
    )
    assert not load_config(write(tmp_path, same)).notes


def test_tensorrt_settings_with_a_common_part_and_engines_of_their_own(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        "onnx_config = dict(components=dict(head=dict(name='pts_backbone_neck_head', onnx_file='a.onnx')))\n"
        "tensorrt_config = dict(common_config=dict(precision_policy='fp16', max_workspace_size=2 << 30),\n"
        "    model_inputs=[dict(input_shapes=dict(x=dict(min_shape=[1], opt_shape=[2], max_shape=[3])))],\n"
        "    components=dict(head=dict(onnx_file='a.onnx', engine_file='a.engine')))\n",
    )
    assert (config.tensorrt.precision, config.tensorrt.workspace_mib) == ("fp16", 2048)
    component = config.components["pts_backbone_neck_head"]
    assert (component.engine_file, component.profile["x"].max) == ("a.engine", [3])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "codebase_config = dict(type='mmdet3d', task='VoxelDetection')\nbackend_config = dict(type='tensorrt')\n",
            "a configuration of mmdeploy for mmdet3d and tensorrt, which says how mmdeploy exports; expected AWML's",
        ),
        ("onnx_config = dict(type='onnx', opset_version=11)\n", "a configuration of mmdeploy, which says"),
        ("task_type = 'classification'\nx = 1\n", "task_type is 'classification'; expected 'detection3d'"),
        ("runtime_io = dict(ann_file='a.json', img_dir='b')\n", "runtime_io.ann_file names annotations of images"),
        ("tensorrt_config = dict(points=dict(min_shape=[1, 4]))\n", "tensorrt_config holds shapes of inputs (FRNet)"),
        ("quantization = dict(enabled=True, spconv_int8=True)\n", "quantization.spconv_int8 is BEVFusion's"),
        ("spconv_do_sort = False\n", "a deployment of another model: spconv_do_sort is BEVFusion's"),
        ("components = dict(bevfusion_sparse=dict(onnx_file='a'))\n", "components.bevfusion_sparse is BEVFusion's"),
        ("components = dict(pts_head_memory=dict(onnx_file='a'))\n", "components.pts_head_memory is StreamPETR's"),
        ("task_type = 'classification'\ncodebase_config = dict(type='mmpretrain')\n", "task_type is 'classification'"),
        ("_base_ = ['./gone.py']\n", "there is no "),
    ],
)
def test_files_of_other_tools_and_tasks_get_one_sentence(tmp_path: Path, text: str, says: str) -> None:
    path = write(tmp_path, text)
    code, printed = run("deploy", path, "--model", "centerpoint:tiny")
    assert code == 2
    assert says in " ".join(printed.split())
    with pytest.raises(InputError) as error:
        load_config(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("item", ["0", "True", "None", "''", "[]", "1.5"])
def test_a_list_that_doubles_itself_without_end_is_refused(tmp_path: Path, item: str) -> None:
    (tmp_path / "config.py").write_text(f"x = [{item}]\n" + "x = x + x\n" * 60)
    with pytest.raises(InputError, match=r"config\.py, line \d+: .*unfolds to more than"):
        read_settings(tmp_path / "config.py")


def test_a_recipe_of_other_features_is_told_before_the_export(tmp_path: Path) -> None:
    profile = AWML.read_text().replace("20, 11]", "20, 10]").replace("work_dirs/tiny/", f"{tmp_path}/work/")
    code, text = run("deploy", write(tmp_path, profile), "--model", "centerpoint:tiny")
    assert code == 2
    said = " ".join(text.split())
    takes = "centerpoint:tiny takes input_features: float32[num_voxels, "
    assert f"profile.input_features.min is [100, 20, 10]; {takes}" in said
    assert "11]: this configuration was made for another model" in said
    assert not (tmp_path / "work" / "onnx").exists()


def test_missing_tensorrt_is_told_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CPDEBUG_TRT_PYTHON", raising=False)
    text = AWML.read_text().replace('mode="onnx"', 'mode="both"').replace("work_dirs/tiny/", f"{tmp_path}/work/")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "tensorrt" else object())
    code, printed = run("deploy", write(tmp_path, text), "--model", "centerpoint:tiny")
    assert code == 3
    assert "TensorRT" in printed
    assert not (tmp_path / "work" / "onnx").exists()


@pytest.mark.slow
def test_flags_of_a_python_file_count_and_the_log_says_what_happened(tmp_path: Path) -> None:
    text = AWML.read_text().replace("work_dirs/tiny/", f"{tmp_path}/work/")
    text += "evaluation = dict(enabled=False)\nverification = dict(enabled=False)\n"
    log = tmp_path / "logs" / "deploy.log"
    path = write(tmp_path, text + f"model_io = dict(input_name='voxels')\ndeploy_log_path = '{log}'\n")
    code, printed = run("deploy", path, "--model", "centerpoint:tiny", "--rot-y-axis-reference")
    assert code == 0, printed
    lines = log.read_text().splitlines()
    assert any("without effect here: " in line for line in lines)
    assert any("export: begins" in line for line in lines)
    assert any("export: passed" in line for line in lines)
    assert len(list((tmp_path / "work/onnx").glob("*.onnx"))) == 2
    assert "note: " in printed
    code, printed = run("deploy", path, "--model", "centerpoint:tiny", "--data-root", tmp_path)
    assert code == 2
    assert "--data-root: it would do nothing here" in printed
    (tmp_path / "file").touch()
    path.write_text(f"{path.read_text()}deploy_log_path = '{tmp_path / 'file' / 'log'}'\n")
    code, printed = run("deploy", path, "--model", "centerpoint:tiny")
    assert code == 2, printed


def test_notes_and_errors_are_said_once(tmp_path: Path) -> None:
    text = "export = dict(work_dir='w')\nevaluation = dict(verbose=True)\ncheckpoint_path = 'gone.pth'\n"
    text += "export.update(mode='onnx')\n"
    arguments = ["deploy", str(write(tmp_path, text)), "--model", "centerpoint:tiny"]
    done = CliRunner().invoke(app, arguments)
    assert "checkpoint is gone.pth: no such file" in str(done.exception), "which main prints"
    said = "".join(done.output.split())
    assert said.count("withouteffecthere:evaluation.verbose") == 1
    assert "nosuchfile" not in said


def test_long_steps_are_said_where_nobody_draws_a_bar() -> None:
    said: list[str] = []
    steps = PlainSteps(said.append, first=0.02)
    with steps.running():
        steps("exporting pts_backbone_neck_head", 1, 2)
        until(lambda: said)
    assert said[0].endswith("s: exporting pts_backbone_neck_head (2 of 2)")
    quick: list[str] = []
    with PlainSteps(quick.append, first=60).running() as steps:
        steps("exporting", 0, 1)
    assert not quick


def test_a_backend_that_is_not_enabled_is_not_scored() -> None:
    assert not EvaluatedBackend().enabled
