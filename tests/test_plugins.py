"""Recipes, backends and readers of deploy files that other distributions add; the example in ``examples/plugin``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_cli import run

from cp_debug import plugins
from cp_debug.backends.registry import create
from cp_debug.backends.spec import BackendSpec
from cp_debug.deploy.config import load_config
from cp_debug.errors import BackendUnavailable, InputError
from cp_debug.recipes.registry import known_models, load_model

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).parents[1]
EXAMPLE = REPO / "examples" / "plugin"
AWML = Path(__file__).parent / "data" / "awml" / "deploy_config.py"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed distributions."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    plugins.names.cache_clear()
    yield folder
    plugins.names.cache_clear()
    for name in [n for n, m in sys.modules.items() if str(folder) in str(getattr(m, "__file__", ""))]:
        del sys.modules[name]


def install(site: Path, name: str, entries: dict[str, dict[str, str]], summary: str = "") -> None:
    """What pip leaves of a distribution: the folder that says what it declares."""
    folder = site / f"{name.replace('-', '_')}-1.0.dist-info"
    folder.mkdir()
    about = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nSummary: {summary}\n"
    (folder / "METADATA").write_text(about)
    lines: list[str] = []
    for group, named in entries.items():
        lines += [f"[{group}]", *(f"{entry} = {target}" for entry, target in named.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")
    plugins.names.cache_clear()


@pytest.fixture
def example(site: Path) -> Path:
    """The example, installed as its own ``pyproject.toml`` says."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(site, project["name"], project["entry-points"], project["description"])
    for package in tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]:
        (site / package).symlink_to(EXAMPLE / package)
    return site


@pytest.mark.slow
def test_the_example_s_recipe_and_backend_are_bisected(example: Path, tmp_path: Path) -> None:
    summary = "Example of a plug-in for cpdebug: a recipe, a backend and a reader of deploy files"
    assert ("example", f"{summary} (cpdebug-example 1.0)") in known_models()
    code, out = run("bisect", "example:small", "-b", "torch,onnxref", "--json", tmp_path / "r.json")
    assert code == 0, out
    assert "onnxref: agrees" in out
    code, out = run("models")
    assert code == 0
    assert "cpdebug-example 1.0" in " ".join(out.split())


def test_a_distribution_whose_entry_points_cannot_be_read_hides_no_other(example: Path) -> None:
    install(example, "torn", {})
    (example / "torn-1.0.dist-info" / "entry_points.txt").write_text("[console_scripts]\nno equals sign\n")
    assert [plugin.name for plugin in plugins.others(plugins.BACKENDS)] == ["onnxref"]


def test_a_library_that_gives_up_over_entry_points_is_told_by_the_file(example: Path) -> None:
    from importlib.metadata import entry_points

    install(example, "torn", {})
    file = example / "torn-1.0.dist-info" / "entry_points.txt"
    file.write_text("[console_scripts]\nno equals sign\n")
    with pytest.raises(TypeError) as raised:
        entry_points(group="torch.backends")
    assert (plugins.told_by(raised.value) or "").startswith(f"{file}: damaged")
    assert plugins.told_by(TypeError("of another place")) is None


def test_the_example_says_what_it_lacks(example: Path) -> None:
    with pytest.raises(InputError, match="there is no 'huge'; expected one of small, wide"):
        load_model("example:huge")
    with pytest.raises(BackendUnavailable, match="FP32 on the CPU alone"):
        create(BackendSpec.parse("onnxref-fp16"))
    with pytest.raises(InputError, match="did you mean onnxref"):
        BackendSpec.parse("onyxref")


def test_the_example_reads_the_team_s_configuration(example: Path) -> None:
    config = load_config(EXAMPLE / "net.team.json")
    assert (config.model, config.work_dir, config.verify.samples) == ("example:small", Path("deployed"), 2)
    wrong = example / "net.team.json"
    wrong.write_text("{}")
    with pytest.raises(InputError, match=r"net\.team\.json: network is missing"):
        load_config(wrong)


BROKEN = {
    "raises": "raise RuntimeError('no licence\\nfound')",
    "misspelt": "def f(:",
    "lacks": "import a_package_that_is_not_there",
    "leaves": "raise SystemExit(3)",
    "empty": "",
    "evil": "class Evil(BaseException): pass\nraise Evil",
    "number": "thing = 3",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_plug_in_that_cannot_be_imported_is_one_sentence(site: Path, kind: str) -> None:
    (site / f"broken_{kind}.py").write_text(BROKEN[kind])
    target = {"acme": f"broken_{kind}:thing"}
    install(site, "acme-tools", dict.fromkeys((plugins.RECIPES, plugins.BACKENDS, plugins.CONFIGS), target))
    (site / "net.acme").write_text("")
    bisect = ["bisect", "centerpoint:tiny", "-b", "torch,acme"]
    for arguments in (["check", "acme:net"], bisect, ["deploy", site / "net.acme"]):
        code, said = run(*arguments)
        assert code == 2
        assert "(acme-tools 1.0)" in said
        assert len(said.strip().splitlines()) == 1
        assert "Traceback" not in said
    assert load_config(AWML).work_dir == Path("work_dirs/tiny"), "what works is not hindered"
    assert run("models")[0] == 0


def test_what_a_plug_in_raises_and_returns_is_checked(site: Path) -> None:
    (site / "acme.py").write_text(
        "def fails(*_, **__):\n    raise KeyError('weights')\n"
        "def nothing(*_, **__):\n    return None\n"
        "class Backend:\n    emulated, device, precision = False, 'cpu', 'fp12'\n    open = versions = None\n"
        "    def __init__(self, spec):\n        self.spec = spec\n"
    )
    entries = {"fails": "acme:fails", "nothing": "acme:nothing", "odd": "acme:Backend"}
    install(site, "acme-tools", {plugins.RECIPES: entries, plugins.BACKENDS: entries})
    raised = r"plug-in 'fails' of cpdebug\.recipes \(acme-tools 1\.0\) raised KeyError: 'weights'"
    with pytest.raises(InputError, match=raised):
        load_model("fails:x")
    with pytest.raises(InputError, match=r"\(acme-tools 1\.0\) returned NoneType without name, components"):
        load_model("nothing")
    precisions = "precision 'fp12'; expected one of fp64"
    for name, said in (("fails", "raised KeyError"), ("nothing", "without spec"), ("odd", precisions)):
        with pytest.raises(InputError, match=said):
            create(BackendSpec.parse(name))


@pytest.mark.parametrize("name", ["torch", "ort", "emu", "trt"])
def test_a_backend_of_a_name_that_is_taken_is_refused(site: Path, name: str) -> None:
    install(site, "acme-tools", {plugins.BACKENDS: {name: "acme:Backend"}})
    with pytest.raises(InputError, match=rf"'{name}' of cpdebug\.backends is declared by cpdebug, acme-tools 1\.0"):
        BackendSpec.parse(name if name != "emu" else "emu-tf32")
    BackendSpec.parse("ort" if name != "ort" else "torch")


def test_two_distributions_of_one_name_are_refused(site: Path) -> None:
    (site / "acme.py").write_text("def read(path):\n    return None\n")
    for distribution in ("acme-tools", "other-tools"):
        everywhere = {group: {"acme": "acme:read"} for group in (plugins.RECIPES, plugins.BACKENDS, plugins.CONFIGS)}
        install(site, distribution, everywhere)
    both = r"'acme' of cpdebug\.{} is declared by acme-tools 1\.0, other-tools 1\.0; uninstall"
    with pytest.raises(InputError, match=both.format("recipes")):
        load_model("acme:net")
    with pytest.raises(InputError, match=both.format("backends")):
        BackendSpec.parse("acme")
    (site / "net.acme").write_text("")
    with pytest.raises(InputError, match=both.format("configs")):
        load_config(site / "net.acme")
    assert run("models")[0] == 0


@pytest.mark.parametrize("name", ["centerpoint", "mmdet3d"])
def test_a_recipe_of_a_name_that_is_taken_is_refused(site: Path, name: str) -> None:
    install(site, "acme-tools", {plugins.RECIPES: {name: "acme:load"}})
    with pytest.raises(InputError, match=rf"'{name}' of cpdebug\.recipes is declared by cpdebug, acme-tools 1\.0"):
        load_model(f"{name}:tiny")
