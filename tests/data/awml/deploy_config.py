# ruff: noqa: C408
"""The form that AWML's deployment framework reads today, for this project's tiny model."""

task_type = "detection3d"

checkpoint_path = None

devices = dict(
    cpu="cpu",
    cuda="cuda:0",
)

export = dict(mode="onnx", work_dir="work_dirs/tiny/", onnx_path=None)

_WORK_DIR = str(export["work_dir"]).rstrip("/")
_ONNX_DIR = f"{_WORK_DIR}/onnx"

components = dict(
    voxel_encoder=dict(
        name="pts_voxel_encoder",
        onnx_file="pts_voxel_encoder.onnx",
        engine_file="pts_voxel_encoder.engine",
        io=dict(
            inputs=[dict(name="input_features", dtype="float32")],
            outputs=[dict(name="pillar_features", dtype="float32")],
            dynamic_axes={
                "input_features": {0: "num_voxels", 1: "num_max_points"},
                "pillar_features": {0: "num_voxels"},
            },
        ),
        tensorrt_profile=dict(
            input_features=dict(min_shape=[100, 20, 11], opt_shape=[4000, 20, 11], max_shape=[10000, 20, 11]),
        ),
    ),
    backbone_head=dict(
        name="pts_backbone_neck_head",
        onnx_file="pts_backbone_neck_head.onnx",
        engine_file="pts_backbone_neck_head.engine",
        io=dict(
            inputs=[dict(name="spatial_features", dtype="float32")],
            outputs=[
                dict(name=f"task{0}.heatmap"),
                dict(name="task0.reg"),
                dict(name="task0.height"),
                dict(name="task0.dim"),
                dict(name="task0.rot"),
                dict(name="task0.vel"),
                dict(name="task1.heatmap"),
                dict(name="task1.reg"),
                dict(name="task1.height"),
                dict(name="task1.dim"),
                dict(name="task1.rot"),
                dict(name="task1.vel"),
            ],
            dynamic_axes={"spatial_features": {0: "batch_size", 2: "H", 3: "W"}},
        ),
        tensorrt_profile=dict(
            spatial_features=dict(
                min_shape=[1, 32, 128, 128], opt_shape=[1, 32, 128, 128], max_shape=[2, 32, 128, 128]
            ),
        ),
    ),
)

runtime_io = dict(info_file=None, sample_idx=1)

onnx_config = dict(
    opset_version=16,
    do_constant_folding=True,
    export_params=True,
    keep_initializers_as_inputs=False,
    simplify=False,
)

tensorrt_config = dict(precision_policy="fp16", max_workspace_size=2 << 30)

evaluation = dict(
    enabled=True,
    num_samples=2,
    verbose=True,
    backends=dict(
        pytorch=dict(enabled=True, device=devices["cpu"]),
        onnx=dict(enabled=True, device=devices["cpu"], model_dir=_ONNX_DIR),
        tensorrt=dict(enabled=False, device=devices["cuda"], engine_dir=f"{_WORK_DIR}/tensorrt"),
    ),
)

verification = dict(
    enabled=True,
    tolerance=1e-1,
    num_verify_samples=2,
    devices=devices,
    scenarios=dict(
        both=[
            dict(ref_backend="pytorch", ref_device="cpu", test_backend="onnx", test_device="cpu"),
            dict(ref_backend="onnx", ref_device="cuda", test_backend="tensorrt", test_device="cuda"),
        ],
        onnx=[dict(ref_backend="pytorch", ref_device="cpu", test_backend="onnx", test_device="cpu")],
        trt=[dict(ref_backend="onnx", ref_device="cuda", test_backend="tensorrt", test_device="cuda")],
        none=[],
    ),
)
