"""student.py of an export: a student in its teacher's space, in code that needs torch and the model's source alone.

The file is written for one student. It builds the raw model as its source does, runs it once for both outputs, and
applies the folded heads.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from distillery.export.expressions import ForwardPass, is_same
from distillery.export.student import Student, hub_folder
from distillery.system.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from distillery.losses.teacher_space import TeacherSpace

CODE_NAME = "student.py"
HUB_NAME = "hub"  # beside student.py: the code of a torch.hub folder


def weights_of(student: Student, space: TeacherSpace) -> dict[str, Tensor]:
    """The tensors of model.safetensors: student.*, with the raw model's own names, and heads.*."""
    own = {f"student.{name}": value for name, value in student.weights.items()}
    return own | {f"heads.{name}": value for name, value in space.heads.state_dict().items()}


def code_of(student: Student, space: TeacherSpace, forward: ForwardPass) -> str:
    """The text of student.py.

    Args:
        student: the student.
        space: the same, with folded heads.
        forward: one pass through the raw model that gives what each head takes.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    (height, width), (rows, columns) = student.backbone.img_size, student.backbone.grid
    build = _build_call(student)
    used = f"{build} {forward.raw} {forward.fields}"
    imports = [name for name in ("timm", "torch", "torchvision") if f"{name}." in used]
    texts = {"pooled": '"pooled": [B, {}]', "tokens": f'"tokens": [B, {rows * columns}, {{}}], the patches row by row'}
    return environment.get_template(f"{CODE_NAME}.jinja").render(
        architecture=student.architecture,
        teacher=student.config["model"]["teacher_name"],
        height=height,
        width=width,
        rows=rows,
        columns=columns,
        outputs=[texts[field].format(wide) for field, wide in space.widths.items()],
        is_local_hub=hub_folder(student.config["model"]) is not None,
        imports=[
            *(f"import {name}" for name in imports),
            "from safetensors.torch import load_file",
            "from torch import nn",
            "from torch.nn import functional as F",
        ],
        build=build,
        heads={field: _layer_call(head) for field, head in space.heads.items()},
        raw=forward.raw,
        fields=forward.fields,
    )


def _build_call(student: Student) -> str:
    """The call that builds the raw model without weights."""
    model, name = student.config["model"], student.architecture
    arguments = "".join(f", {key}={value!r}" for key, value in student.model_args.items())
    if student.is_timm:
        return f'timm.create_model("{name}", num_classes=0{arguments})'
    if model["student_source"] == "torchvision":
        return f'torchvision.models.get_model("{name}"{arguments})'
    if hub_folder(model) is not None:
        return f'torch.hub.load(str(FOLDER / "{HUB_NAME}"), "{name}", source="local"{arguments})'
    return f'torch.hub.load("{model["student_repo"]}", "{name}", trust_repo=True{arguments})'


def _layer_call(layer: nn.Module) -> str:
    """The call that builds a layer of build_projector."""
    from torch import nn

    if isinstance(layer, nn.Sequential):
        return f"nn.Sequential({', '.join(map(_layer_call, layer))})"
    if isinstance(layer, nn.Linear):
        return f"nn.Linear({layer.in_features}, {layer.out_features})"
    if isinstance(layer, nn.LayerNorm):
        return f"nn.LayerNorm({layer.normalized_shape[0]})"
    assert isinstance(layer, nn.GELU), f"student.py cannot build a {type(layer).__name__}"
    return "nn.GELU()"


def hub_code(folder: Path, out_dir: Path) -> dict[str, bytes]:
    """The .py files of a torch.hub folder, by the place that they get in an export.

    Args:
        folder: with hubconf.py.
        out_dir: of the export. It may lie in the folder, and is left out, as are hidden folders and environments.
    """
    found = {}
    for place, folders, files in os.walk(folder):
        inner = (Path(place, name) for name in sorted(folders) if not name.startswith((".", "__pycache__")))
        folders[:] = [
            path.name for path in inner if path.resolve() != out_dir.resolve() and not (path / "pyvenv.cfg").exists()
        ]
        for path in (Path(place, name) for name in sorted(files) if name.endswith(".py")):
            found[f"{HUB_NAME}/{path.relative_to(folder)}"] = path.read_bytes()
    return found


def check_alone(folder: Path, student: Student, space: TeacherSpace) -> None:
    """Build the student from its folder as a user does, and compare it with the one here, at two input sizes.

    Raises:
        UserError: it cannot be built or gives something else.
    """
    import torch

    from distillery.models.builders import short_error

    height, width = student.backbone.img_size
    generator = torch.Generator().manual_seed(1)
    advice = "Nothing is written; --space backbone does without student.py"
    if (hub := hub_folder(student.config["model"])) is not None:
        advice = f"Of {hub} only the .py files come along: does its code read others? {advice}"
    for size in ((height, width), (height + 9, width + 5)):
        images = torch.randn(2, 3, *size, generator=generator)
        with torch.no_grad(), _imports_of(folder):
            wanted = space(images)
            try:
                found = _load(folder)(images)
            except Exception as error:  # the model's own code runs here
                raise UserError(
                    f"{CODE_NAME} of {student.architecture} fails without this package: {short_error(error)}. {advice}"
                ) from error
        same = [is_same(found.get(field), value) for field, value in wanted.tensors().items()]
        if not all(same) or found["grid"] != wanted.grid or len(found) != len(same) + 1:
            raise UserError(f"{CODE_NAME} of {student.architecture} gives other features than were trained. {advice}")


def _load(folder: Path) -> nn.Module:
    spec = importlib.util.spec_from_file_location("exported_student", folder / CODE_NAME)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load_student(folder)


@contextlib.contextmanager
def _imports_of(folder: Path) -> Iterator[None]:
    """Forget afterwards what was imported from below a folder."""
    path = list(sys.path)
    try:
        yield
    finally:
        sys.path[:] = path
        inside = f"{folder.resolve()}{os.sep}"
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(inside):
                del sys.modules[name]
