"""The models that configurations and documents name exist in the timm that requirements.txt asks for."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import timm
import torchvision
import yaml

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("vit", "naflexvit", "convnext", "convnextv2", "efficientnet", "mobilenetv3", "mobilenetv4", "resnet",
            "deit", "deit3", "swin", "eva", "eva02", "beit", "beitv2", "hiera", "volo", "regnety")  # fmt: skip
NAME = re.compile(rf"(?<![\w./-])(?:{'|'.join(FAMILIES)})_[a-z0-9_]+(?:\.[a-z0-9_]+)?(?![\w(/-])")
# teachers that people of the field ask for: what the floor in requirements.txt is for
WANTED = ["vit_base_patch14_dinov2.lvd142m", "vit_base_patch16_dinov3.lvd1689m", "vit_large_patch16_dinov3.lvd1689m",
          "vit_base_patch16_radio_v3.c_radio", "vit_so400m_patch16_radio_v4.c_radio",
          "vit_small_patch16_dinov3_qkvb.eupe_lvd1689m", "convnext_tiny.eupe_lvd1689m"]  # fmt: skip


def files_of(pattern: str) -> list[Path]:
    return [
        *ROOT.glob(pattern),
        *(path for name in ("docs", "configs", "examples") for path in ROOT.glob(f"{name}/**/{pattern}")),
    ]


def named_by_configurations() -> dict[str, Path]:
    """Each timm name in a model_config_kd.yaml, its default included, and where it stands."""
    found = {}
    for path in files_of("*model_config*.yaml"):
        content = yaml.safe_load(path.read_text())
        for role in ("teacher", "student"):
            name = content.get(f"{role}_name")
            if name and content.get(f"{role}_source", "timm") == "timm":
                found[name] = path
    return found


def named_by_documents() -> dict[str, Path]:
    """Each name in the prose, the examples and the configurations' comments that looks like one of timm's."""
    paths = [*files_of("*.md"), *files_of("*.yaml")]
    return {name: path for path in paths for name in NAME.findall(path.read_text())}


def exists(name: str) -> bool:
    if "." in name:
        return name in timm.list_pretrained()
    return timm.is_model(name) or name in torchvision.models.list_models()


@pytest.mark.parametrize("named", [named_by_configurations, named_by_documents])
def test_every_model_that_is_named_exists(named):
    names = named()
    assert "vit_base_patch14_dinov2.lvd142m" in names
    missing = {name: str(path.relative_to(ROOT)) for name, path in names.items() if not exists(name)}
    assert not missing


def test_the_teachers_of_the_field_are_in_the_oldest_timm_that_requirements_allow():
    floor = re.search(r"^timm>=(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)[1]
    as_numbers = [tuple(map(int, re.findall(r"\d+", text)[:3])) for text in (version("timm"), floor)]
    assert as_numbers[0] >= as_numbers[1] >= (1, 0, 31)  # it has all of these
    assert [name for name in WANTED if not exists(name)] == []
