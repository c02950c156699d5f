import copy
import os
import pickle
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from distillery.models.backbone import Backbone, ModelSpec, build_backbone

DATA = {"data_mean": (0.5, 0.5, 0.5), "data_std": (0.25, 0.25, 0.25), "image_size": 32}
NET = """
    import torch
    from torch import nn
    {imports}
    def scaled(x): return x * WIDTH
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, WIDTH, 4, 4)
        def forward_features(self, x):
            {at_forward}
            return scaled(self.stem(x))
"""
ENTRY = """
    {imports}
    def net(pretrained=False): return Net()
"""
# name of a layout -> files of a repository; {width} is all that differs between the two
LAYOUTS = {
    "one module": {
        "models.py": NET.format(imports="WIDTH = {width}", at_forward="pass"),
        "hubconf.py": ENTRY.format(imports="from models import Net"),
    },
    "packages": {
        "utils/__init__.py": "",
        "utils/sizes.py": "WIDTH = {width}",
        "models/__init__.py": "from .net import Net",
        "models/net.py": NET.format(imports="from utils.sizes import WIDTH", at_forward="pass"),
        "hubconf.py": ENTRY.format(imports="import models\n    Net = models.Net"),
    },
    "folders without __init__": {
        "utils/sizes.py": "WIDTH = {width}",
        "models/net.py": NET.format(
            imports="import utils.sizes\n    WIDTH = utils.sizes.WIDTH",
            at_forward="pass",
        ),
        "hubconf.py": ENTRY.format(imports="from models.net import Net"),
    },
    "imports at the first forward": {
        "sizes.py": "WIDTH = {width}",
        "late/__init__.py": "",
        "late/deep.py": "import sizes",
        "models.py": NET.format(
            imports="from sizes import WIDTH",
            at_forward="from late import deep; assert deep.sizes.WIDTH == WIDTH",
        ),
        "hubconf.py": ENTRY.format(imports="from models import Net"),
    },
    "relative imports at the first forward": {
        "models/__init__.py": "",
        "models/sizes.py": "WIDTH = {width}",
        "models/late.py": "from .sizes import WIDTH",
        "models/net.py": NET.format(
            imports="from .sizes import WIDTH",
            at_forward="from . import late; assert late.WIDTH == WIDTH",
        ),
        "hubconf.py": ENTRY.format(imports="from models.net import Net"),
    },
    "imports by name": {
        "sizes.py": "WIDTH = {width}",
        "late.py": "import sizes",
        "models.py": NET.format(
            imports="import importlib.util\n    WIDTH = importlib.import_module('sizes').WIDTH",
            at_forward="assert importlib.import_module('late').sizes.WIDTH == __import__('sizes').WIDTH == WIDTH",
        ),
        "hubconf.py": ENTRY.format(imports="from models import Net"),
    },
    "a model in hubconf.py and a path of its own": {
        "src/sizes.py": "WIDTH = {width}",
        "hubconf.py": "import os, sys; sys.path.append(os.path.join(os.path.dirname(__file__), 'src'))\n"
        + textwrap.dedent(
            NET.format(imports="from sizes import WIDTH", at_forward="import sizes; assert sizes.WIDTH == WIDTH")
        )
        + "def net(pretrained=False): return Net()",
    },
}


def write(folder: Path, files: dict[str, str], width: int) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).replace("{width}", str(width)))
    return folder


def from_hub(repo: Path | str) -> Backbone:
    torch.manual_seed(0)
    return build_backbone(ModelSpec(source="torch_hub", name="net", repo=str(repo), pretrained=False), **DATA).eval()


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_each_repository_gets_its_own_modules_and_python_is_left_as_it_was(layout, tmp_path):
    a, b = (write(tmp_path / f"{n}", LAYOUTS[layout], n) for n in (8, 24))
    path, modules = list(sys.path), dict(sys.modules)
    of_a, of_b, again = from_hub(a), from_hub(b), from_hub(a)
    assert [model.pooled_width for model in (of_a, of_b, again)] == [8, 24, 8]
    assert sys.path == path and {k: v for k, v in sys.modules.items() if k in modules} == modules
    assert not {"models", "utils", "sizes", "late"} & (set(sys.modules) - set(modules))
    for model in (of_a, copy.deepcopy(of_a), of_b):
        images = torch.ones(1, 3, 32, 32)
        expected = model.model.stem(images) * model.pooled_width
        assert torch.allclose(model(images).pooled, expected.mean((2, 3)), rtol=1e-4)
    of_a.load_state_dict(again.state_dict())


def test_a_repository_in_the_hubs_download_folder_is_kept_apart_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *args: pytest.fail("no network in tests"))
    for owner, width in (("anna", 8), ("bert", 24)):
        write(tmp_path / f"{owner}_repo_v1", LAYOUTS["packages"], width)
    assert [from_hub(f"{owner}/repo:v1").pooled_width for owner in ("anna", "bert")] == [8, 24]
    write(tmp_path / "local", LAYOUTS["packages"], 12)
    assert from_hub(tmp_path / "local").pooled_width == 12


def test_a_module_of_the_environment_is_neither_hidden_for_good_nor_loaded_twice(tmp_path, monkeypatch):
    import timm
    import torchvision

    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "models.py").write_text("WIDTH = 3")
    monkeypatch.syspath_prepend(tmp_path / "environment")
    import models

    imports = "import timm, torchvision\n    from models import WIDTH\n    FOUND = [timm, torchvision]"
    net = NET.format(imports=imports, at_forward="pass") + "    def net(pretrained=False): return Net()"
    files = {"models.py": "WIDTH = {width}", "timm/readme.txt": "", "torchvision/__init__.py": "", "hubconf.py": net}
    backbone = from_hub(write(tmp_path / "hub", files, 8))
    assert backbone.pooled_width == 8 and sys.modules["models"] is models
    found = type(backbone.model).forward_features.__globals__["FOUND"]
    assert found[0] is timm and found[1] is torchvision
    del sys.modules["models"]


def test_a_repository_that_fails_to_load_leaves_nothing_behind(tmp_path):
    files = {"models.py": "import late_one", "late_one.py": "1 / 0", "hubconf.py": "import models"}
    before = list(sys.path), set(sys.modules)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        from_hub(write(tmp_path, files, 1))
    assert (sys.path, set(sys.modules)) == before


@pytest.mark.parametrize("layout", ["packages", "imports at the first forward", "imports by name"])
def test_models_of_both_repositories_compile(layout, tmp_path):
    # autograd starts its threads at its first backward pass, and after torch.compile some that tests cannot fork with
    torch.ones(1, requires_grad=True).sum().backward()
    torch._dynamo.reset()
    for width in (8, 24):
        backbone = from_hub(write(tmp_path / f"{width}", LAYOUTS[layout], width))
        images = torch.ones(1, 3, 32, 32)
        compiled = torch.compile(backbone, backend="eager")
        assert torch.allclose(compiled(images).pooled, backbone(images).pooled, rtol=1e-4)
    torch._dynamo.reset()


def test_imports_of_everyone_else_are_untouched(tmp_path):
    from_hub(write(tmp_path, LAYOUTS["one module"], 8))
    assert pickle.loads(pickle.dumps(os.path.join)) is os.path.join
    with pytest.raises(ModuleNotFoundError, match="No module named 'models'"):
        import models  # noqa: F401
